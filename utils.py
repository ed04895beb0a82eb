"""What every script shares: processes, signals, checkpoints, schedules, parameter groups, clipping, EMA, LARS, log lines.

Letter in shape comments: T any number of values.
"""
import argparse
import contextlib
import datetime
import gc
import json
import math
import multiprocessing
import os
import pickletools
import platform
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import sysconfig
import time
import traceback
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names the file, flag or key."""


class Preempted(Exception):  # noqa: N818 - no error
    """A signal asked the run to stop, and all that it needs to go on is saved; the message says how it does."""


EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, once more, goes on


def run(main):
    """Call `main()` and end the process: exit code 0, 1 after an error, `EXIT_PREEMPTED`, or 130 after Ctrl-C.

    An `InputError`, a `FloatingPointError` of training, a dead loader process or a lost peer becomes one line on stderr;
    any other error is a bug and keeps its traceback.
    """
    code, held = 0, None  # what is raised is held: it keeps the DataLoader, which would wait for workers that hang
    try:
        try:
            main()
        except BaseException:
            if hasattr(signal, "SIGCHLD"):  # torch's handler would raise at the death of a loader process
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise
    except Preempted as stop:
        code, held = EXIT_PREEMPTED, stop
        if is_main_process():
            print(stop, file=sys.stderr)
    except KeyboardInterrupt as stop:
        code, held = 130, stop
        if _environment_rank() == 0:
            print("interrupted; what is saved stays", file=sys.stderr)
    except Exception as error:
        code, held, text = 1, error, str(error)
        rank = _environment_rank()
        name = f"error{f' (process {rank})' if rank else ''}"
        if isinstance(error, (InputError, FloatingPointError)):
            if rank:
                # What all met, process 0 says, and the launcher then ends the others; what this one alone met, it must say.
                time.sleep(5)
            print(f"{name}: {one_line(error)}", file=sys.stderr)
        elif "DataLoader worker" in text or isinstance(error, (ConnectionError, EOFError)):
            # The second kind where it died in the middle of handing over a batch.
            cause = one_line(error) if "DataLoader worker" in text else f"DataLoader worker broke off, {one_line(error)}"
            print(f"{name}: a loader process died: {cause.rstrip('. ')}. If memory ran out, lower --num_workers",
                  file=sys.stderr)
        elif dist.is_initialized() and re.search(r"gloo|nccl|connection (closed|reset)|broken pipe", text, re.IGNORECASE):
            time.sleep(1)  # the other one's error comes first
            print(f"{name}: the connection to another process broke; if none has said why above, it was killed "
                  f"({one_line(error)[:160]})", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if not code:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    # Loader processes may hang in a read; an error must not wait for them, nor for the other processes.
    for child in multiprocessing.active_children():
        child.kill()
    del held
    os._exit(code) if dist.is_initialized() or code == EXIT_PREEMPTED else sys.exit(code)


def _environment_rank():
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def one_line(error):
    """Message of an error; out of a loader worker it comes wrapped in a traceback, as the last line, after its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\w+\.)+\w+(Error|Image): ", "", lines[-1])


def bool_flag(text):
    """argparse type for `true/false`, `on/off`, `1/0` in any case."""
    word = text.lower()
    if word in ("true", "on", "1"):
        return True
    if word in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


# ---------------------------------------------------------------- processes

@dataclass(frozen=True)
class Process:
    """Where this process stands: its rank among `world_size`, its place on the node and its device."""
    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def _launch_environment():
    """(rank, world_size, local_rank) as torchrun, torch.distributed.launch or Slurm announce them; alone otherwise."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env:
        # Outside srun, in a batch script, SLURM_NTASKS is set but the other tasks do not run; the step's count is not set.
        in_step = env["SLURM_PROCID"] != "0" or "MASTER_ADDR" in env
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1") if in_step else "1")
        return int(env["SLURM_PROCID"]), int(tasks), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def _set_slurm_rendezvous():
    """`env://` needs MASTER_ADDR and MASTER_PORT, which srun does not set: first host of the step, port by job id."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
        if "[" in nodes or "," in nodes:
            listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            nodes = listing.stdout.split()[0]
        os.environ["MASTER_ADDR"] = nodes
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))


def choose_device(name, local_rank=0):
    """`auto` takes CUDA, then MPS, then the CPU. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: no CUDA device is available here")
        if torch.cuda.device_count() == 1 and "RANK" not in os.environ:
            local_rank = 0  # Slurm shows each task its own GPU only
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"local process {local_rank} has no GPU of its own: this machine has "
                             f"{torch.cuda.device_count()}; start fewer processes per node")
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available here")
    return torch.device(name)


def init_process(device="auto", dist_url="env://"):
    """Join the process group of the launcher, if there is one: NCCL on GPUs, gloo elsewhere. Returns a `Process`.

    A run of one process makes no group. `print` is left alone; use `is_main_process()`.
    """
    rank, world_size, local_rank = _launch_environment()
    device = choose_device(device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        if device.type == "mps":
            raise InputError("several processes on --device mps are not supported; use one process or --device cpu")
        if dist_url == "env://" and "RANK" not in os.environ:
            _set_slurm_rendezvous()
        place = {"init_method": dist_url}
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":  # several nodes may count differently
            # After a restart torchrun's store may still hold the addresses of the processes before: gloo waits for them.
            place = {"store": dist.PrefixStore(f"attempt {attempt}", next(rendezvous(dist_url, rank, world_size))[0])}
        if device.type == "cuda":
            place["device_id"] = device  # NCCL connects now, and need not guess the device of a barrier
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", world_size=world_size, rank=rank, **place)
    return Process(rank, world_size, local_rank, device)


def use_fast_products(device):
    """On CUDA: products of float32 in TF32 (10 bits of mantissa), convolutions by the quickest of cuDNN's ways for a shape.

    Returns the precision of products in words.
    """
    if device.type != "cuda":
        return "float32"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return "TF32"


def check_compiler(device):
    """Raise InputError unless `torch.compile` finds here what it needs; without this it would fail at the first step."""
    def need(condition, what):
        if not condition:
            raise InputError(f"--compile needs {what}; --compile false does without")

    if device.type == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        need(major >= 7, f"a GPU of compute capability 7.0 or newer, {name} has {major}.{minor}")
    # Triton builds its launchers in C, torch's kernels for CPUs are C++; both take what these variables name.
    variable, known = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    if device.type == "cuda":
        variable, known = "CC", ("gcc", "clang")
    names = [os.environ[variable].split()[0]] if os.environ.get(variable, "").strip() else known
    need(any(map(shutil.which, names)), f"a {'C++' if variable == 'CXX' else 'C'} compiler, and there is no "
                                        f"{' or '.join(names)} here ({variable} names another one)")
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    need(header.exists(), f"Python's headers, and there is no {header} (Debian and Ubuntu: apt install python3-dev)")


# Dense products of bfloat16 or float16 with sums in float32, in 10^12 operations a second, by the makers' data sheets. The
# first pattern that is found in a device's name counts.
_PEAKS = (("MIG", None), (r"\bB200\b", 2250), (r"\bH[12]00 NVL", 835), (r"\bH100 PCIe", 756), (r"\bG?H[12]00\b", 989),
          (r"\bA100\b", 312), (r"\bA30\b", 165), (r"\bA40\b", 150), (r"\bA10\b", 125), (r"\bL40S\b", 362), (r"\bL4\b", 121),
          (r"\bV100-PCIE", 112), (r"\bV100-SXM", 125), (r"\bT4\b", 65), (r"RTX 4090$", 165), (r"RTX 3090$", 71))


def peak_flops(device, dtype):
    """Largest number of operations a second of products in `dtype`; None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)
    return peak and 1e12 * peak


@contextlib.contextmanager
def collecting_by_hand():
    """Within it Python looks for unreachable objects only when `gc.collect` is called, and not among those there are now.

    By itself it would do so amid a step, on each process in another one, for which all others would wait.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def default_workers():
    """Loader processes for this process: its share of the cores, less one for itself, at least 1 and at most 10."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(10, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def data_parallel(network, device, accum_iter=1):
    """`network` for several processes, each with its share of the batch."""
    # Every step uses the same parameters; but torch cannot skip the synchronisation of some batches in a static graph.
    # Buffers are constants, or statistics that batch norm takes over all processes itself.
    return torch.nn.parallel.DistributedDataParallel(
        network, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
        broadcast_buffers=False, static_graph=accum_iter == 1)


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    return get_rank() == 0


def all_reduce_mean(tensor):
    """Mean of `tensor` over the processes (in place where there are several)."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


@lru_cache
def _host_group():
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def host_reduce(value, op="max"):
    """Largest ("max") or total ("sum") of an integer over the processes, by way of the hosts: no device is waited for."""
    if get_world_size() == 1:
        return value
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[op], group=_host_group())
    return int(tensor)


def gather_parts(tensor):
    """List of the 1-D tensors of all processes, of differing lengths, by rank."""
    if get_world_size() == 1:
        return [tensor]
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(n) for n in lengths)
    padded = tensor.new_zeros(longest)
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [part[:int(n)] for part, n in zip(parts, lengths, strict=True)]


# ---------------------------------------------------------------- signals and random states

class StopSignals:
    """Notes SIGTERM and SIGUSR1, by which schedulers announce the end; while data are waited for they end the wait."""

    class WaitEnded(BaseException):  # noqa: N818 - no error, and no `except Exception` on its way may take it for one
        """Raised inside `wait_for`."""

    def __init__(self):
        self.received, self._waiting, self._process = None, False, os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in self._numbers()}

    @staticmethod
    def _numbers():
        return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # no USR1 on Windows

    def _note(self, number, frame):
        if os.getpid() != self._process:  # a loader process that was just forked
            return
        self.received = signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise self.WaitEnded

    def wait_for(self, call):
        """`call()`, or None when a signal came before or meanwhile."""
        try:
            try:
                self._waiting = True
                return None if self.received else call()
            finally:
                self._waiting = False
        except self.WaitEnded:
            return None
        except Exception:
            if self.received:  # torch.compile wraps what is raised while it traces
                return None
            raise

    def restore(self):
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_signals(worker_id=None):
    """`worker_init_fn` of a DataLoader: schedulers and Ctrl-C signal all processes, but only the main one is to react.

    When it stops amid taking a batch over, the thread that hands batches over is not to print a traceback.
    """
    gc.enable()  # within `collecting_by_hand` it was off when this process was forked
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    hook = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (ConnectionError, EOFError)) else hook(kind, *rest)


def random_state(device):
    """State of all generators of this process (Python, numpy, torch, device): one uint8 tensor for `set_random_state`."""
    _, keys, gauss = random.getstate()
    _, np_keys, *np_rest = np.random.get_state()
    parts = [torch.tensor(keys), torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
             torch.from_numpy(np_keys.astype(np.int64)), torch.tensor(np_rest, dtype=torch.float64), torch.get_rng_state()]
    if device.type in ("cuda", "mps"):
        parts.append(getattr(torch, device.type).get_rng_state())
    parts = [part.view(torch.uint8) for part in parts]
    return torch.cat([torch.tensor([len(parts), *map(len, parts)]).view(torch.uint8), *parts])


def set_random_state(state, device):
    """Make the generators of this process go on from a `random_state`; a device's only on a device of that kind."""
    count = int(state[:8].view(torch.int64))
    sizes = state[8:8 * (count + 1)].view(torch.int64).tolist()
    keys, gauss, np_keys, np_rest, cpu, *rest = (part.clone() for part in state[8 * (count + 1):].split(sizes))
    gauss, np_rest = gauss.view(torch.float64).item(), np_rest.view(torch.float64).tolist()
    random.setstate((3, tuple(keys.view(torch.int64).tolist()), None if math.isnan(gauss) else gauss))
    np.random.set_state(("MT19937", np_keys.view(torch.int64).numpy().astype(np.uint32), int(np_rest[0]), int(np_rest[1]),
                         np_rest[2]))
    torch.set_rng_state(cpu)
    if rest and device.type in ("cuda", "mps"):
        getattr(torch, device.type).set_rng_state(rest[0])


# ---------------------------------------------------------------- checkpoints

_numpy_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [argparse.Namespace, np.dtype, np.dtypes.Float64DType,
                (_numpy_scalar, "numpy.core.multiarray.scalar"), (_numpy_scalar, "numpy._core.multiarray.scalar")]


def load_checkpoint(path):
    """Read a `.safetensors` or a `torch.save` file without running any code in it.

    Beside tensors and plain containers only `argparse.Namespace` and numpy's float64 scalars are allowed: the reference
    stores its arguments, and its optimiser's rates come from numpy schedules. `_check_archive` goes through the whole file
    first, so that a damaged or hostile one takes no more memory than a good one of its size. Raises InputError, naming the
    file, when it is missing, broken or holds anything else.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise InputError(f"checkpoint {path}: is no file")
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file
                return load_file(path)
            _check_archive(file)
            file.seek(0)
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path}: no such file") from error
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        reason = printable(reason.strip().splitlines()[0], 160)
        raise InputError(f"checkpoint {path}: cannot be read safely ({reason})") from error


def safetensors_metadata(path):
    """The texts by name in the head of a `.safetensors` file; empty for any other file."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def printable(text, length=60):
    """`text` of a foreign file for a message of one line: cut to `length`, escapes for what is no printable character."""
    text = repr(str(text)[:length + 1])[1:-1]
    return text if len(text) <= length else text[:length - 3] + "..."


def _listed(names, count=4):
    names = list(names)
    return ", ".join(map(printable, names[:count])) + (", ..." if len(names) > count else "")


# What `torch.save` needs for tensors, with the bytes of an element; what else a pickle may name is in `_called`.
_STORAGES = {f"torch {kind}Storage": size for kind, size in (
    ("Double", 8), ("Float", 4), ("Half", 2), ("BFloat16", 2), ("Long", 8), ("Int", 4), ("Short", 2), ("Char", 1),
    ("Byte", 1), ("Bool", 1))}
_NAMES = {"collections OrderedDict", "argparse Namespace", "torch._utils _rebuild_tensor_v2",
          "torch._utils _rebuild_parameter", "numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar",
          "_codecs encode", *_STORAGES}
_MOST_VALUES, _DEEPEST, _LARGEST_DIRECTORY = 10**6, 20, 2**22


def _check_archive(file):
    """Raise ValueError unless `file` is a sound archive as `torch.save` writes it, from one end to the other.

    That is a zip file of uncompressed records that add up to no more than its size and agree with their checksums
    (torch does not look at these), with a pickle that passes `_check_pickle`. The directory must fill the place between the
    records and the end: where two readers of zip files could see two directories, torch might read another than this one.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    if not head.startswith(b"PK\3\4"):
        known = {b"": "it is empty",
                 b"\x80\x02\x8a\nl\xfc\x9cF": "it has the format of PyTorch before 1.6; torch.load and torch.save renew it"}
        raise ValueError(known.get(head, "it was not written by torch.save"))
    file.seek(max(0, size - 98))
    tail = file.read()
    end, directory = size - 22, tail[-22:]
    if directory[:4] != b"PK\5\6" or directory[20:] != b"\0\0":
        raise ValueError("it is cut short or damaged: its end is missing")
    length, offset = struct.unpack("<LL", directory[12:20])
    if tail[-42:-38] == b"PK\6\7":  # zip64, as torch writes it
        end = size - 98
        if tail[:4] != b"PK\6\6" or struct.unpack("<Q", tail[-34:-26]) != (end,):
            raise ValueError("it is damaged: its directory is not at its end")
        length, offset = struct.unpack("<QQ", tail[40:56])
    if offset + length != end or length > _LARGEST_DIRECTORY:
        raise ValueError("it is damaged: its directory is not at its end, or too long")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        prefix = records[0].filename.partition("/")[0] + "/" if records else ""
        names = {record.filename.removeprefix(prefix).lower() for record in records}  # torch ignores case
        if "data.pkl" not in names:
            raise ValueError("it is a zip file, but not one of torch.save")
        if "constants.pkl" in names:
            raise ValueError("it is a program, in TorchScript")
        if len(names) < len(records) or not all(
                record.filename.startswith(prefix) and record.filename == record.orig_filename for record in records):
            raise ValueError("its records have ambiguous names")
        if any(record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
               for record in records):
            raise ValueError("it holds compressed records, which torch.save does not write")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records claim more bytes than the file has")
        sizes = {record.filename.removeprefix(prefix): record.file_size for record in records}
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its record {damaged} is damaged")
        try:
            _check_pickle(archive.read(prefix + "data.pkl"), sizes)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError("its pickle is damaged") from error


class _Part:
    """What a pickle would build: its kind, how deep it is nested, its number of values, and where they matter its items."""

    def __init__(self, kind, items=()):
        self.kind, self.items, self.depth, self.values, self.closed = kind, items, 1, 1, False
        if kind == "tuple":
            self.add(items)

    def add(self, items):
        parts = [item for item in items if isinstance(item, _Part)]
        for part in parts:
            part.closed = True
        if self.closed:  # so that nothing can contain itself, and depth and number stay what they are
            raise ValueError("its pickle changes a container after it was put into another")
        self.values += len(items) - len(parts)
        for part in parts:
            if part.kind == "name" and self.kind != "tuple":
                raise ValueError(f"it holds {part.items.replace(' ', '.')}")
            self.depth, self.values = max(self.depth, part.depth + 1), self.values + part.values
        if self.depth > _DEEPEST or self.values > _MOST_VALUES:
            raise ValueError(f"its pickle is nested more than {_DEEPEST} deep or holds more than {_MOST_VALUES} values")


def _check_pickle(data, sizes):
    """Go through the pickle of an archive without building anything of it; raises on all that `load_checkpoint` refuses.

    torch's own restricted reader runs no code either, but it lets a pickle allocate what it likes (`bytearray`, tensors of
    a given size), nest without end, and in some versions (2.8) give tensors more elements than their record has, which
    are then read from elsewhere in memory. `sizes`: bytes of each record.
    """
    stack, marks, memo = [], [], {}

    def pop(count):
        if not 0 < count <= len(stack):
            raise ValueError("its pickle is damaged")
        items = stack[-count:]
        del stack[-count:]
        return items

    for count, (code, value, _) in enumerate(pickletools.genops(data)):
        if count > 4 * _MOST_VALUES:
            raise ValueError("its pickle is too long")
        match code.name:
            case "PROTO" if value == 2:
                pass
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(value)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code.name == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append(_Part(code.name[6:].lower()))
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                if code.name in ("TUPLE", "APPENDS", "SETITEMS"):
                    items, stack = stack, marks.pop()
                else:
                    items = pop({"APPEND": 1, "SETITEM": 2}.get(code.name) or int(code.name[-1]))
                if code.name.startswith("TUPLE"):
                    stack.append(_Part("tuple", tuple(items)))
                    continue
                if code.name.startswith("SETITEM") and (
                        len(items) % 2 or not all(isinstance(key, (str, int)) for key in items[::2])):
                    raise ValueError("it holds a dictionary with keys that are no text and no integer")
                if stack[-1].kind != ("list" if code.name.startswith("APPEND") else "dict"):
                    raise ValueError("its pickle is damaged")
                stack[-1].add(items)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                if value not in _NAMES:
                    raise ValueError(f"it holds {value.replace(' ', '.')}")
                stack.append(_Part("name", value))
            case "NEWOBJ" | "REDUCE":
                function, arguments = pop(2)
                if function.kind != "name" or arguments.kind != "tuple":
                    raise ValueError("its pickle is damaged")
                stack.append(_called(function.items, code.name, arguments.items))
            case "BUILD":
                built, state = pop(2)
                if built.kind == "dtype":
                    if state.items != (3, "<", None, None, None, -1, -1, 0):
                        raise ValueError("it holds a numpy type other than float64")
                elif built.kind not in ("Namespace", "dict") or state.kind != "dict":
                    raise ValueError("its pickle is damaged")
                built.add([state])
                stack.append(built)
            case "BINPERSID":
                stack.append(_storage(pop(1)[0].items, sizes))
            case "STOP":
                top = stack[-1]
                if not isinstance(top, _Part) or top.kind != "dict":
                    kind = top.kind if isinstance(top, _Part) else type(top).__name__
                    raise ValueError(f"it holds a {kind}, not a dictionary")
            case _:
                raise ValueError(f"its pickle holds the operation {code.name}, which torch.save does not write")


def _storage(items, sizes):
    """The storage that a persistent id of `torch.save` names: ("storage", type, record, device, number of elements)."""
    if len(items) != 5:
        raise ValueError("its pickle is damaged")
    word, kind, key, _, elements = items
    if word != "storage" or sizes.get(f"data/{key}") != elements * _STORAGES[kind.items] or type(elements) is not int:
        raise ValueError(f"its tensor {key} claims another size than its record has")
    return _Part("storage", elements)


def _called(name, code, arguments):
    """What the function `name` of a pickle would return for `arguments`; raises ValueError for all but harmless calls."""
    match name, code, arguments:
        case "collections OrderedDict", "REDUCE", ():
            return _Part("dict")
        case "argparse Namespace", "NEWOBJ", ():
            return _Part("Namespace")
        case "torch._utils _rebuild_tensor_v2", "REDUCE", (
                _Part(kind="storage") as storage, int(offset), _Part(kind="tuple") as shape, _Part(kind="tuple") as stride,
                bool(), _Part(kind="dict", values=1)):
            numbers = [offset, *shape.items, *stride.items]
            if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(shape.items) != len(stride.items):
                raise ValueError("it holds a tensor whose shape is damaged")
            last = offset + sum((n - 1) * step for n, step in zip(shape.items, stride.items, strict=True))
            # A stride of 0 would give one value any number of elements; an empty tensor might have a side of any length.
            empty = 0 in shape.items
            if math.prod(max(n, 1) for n in shape.items) > (_MOST_VALUES if empty else storage.items) or (
                    not empty and last >= storage.items):
                raise ValueError(f"the file has {storage.items} values for a tensor of shape {shape.items}")
            return _Part("tensor")
        case "torch._utils _rebuild_parameter", "REDUCE", (_Part(kind="tensor"), bool(), _Part(kind="dict", values=1)):
            return _Part("tensor")
        case "numpy dtype", "REDUCE", ("f8", 0, 1):
            return _Part("dtype")
        case "numpy.core.multiarray scalar" | "numpy._core.multiarray scalar", "REDUCE", (
                _Part(kind="dtype", values=values), _Part(kind="bytes", items=text)) if values > 1 and len(text) == 8:
            return 0.0
        case "_codecs encode", "REDUCE", (str(text), "latin1"):
            return _Part("bytes", text)
    raise ValueError(f"it calls {name.replace(' ', '.')} in a way that torch.save does not write")


def save_atomically(obj, path, previous=None):
    """`torch.save` to a temporary file in the same folder, synced, then renamed: no reader ever sees half a file.

    With `previous` the file that `path` replaces is kept under that name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            Path(previous).unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:  # no hard links on this file system: for an instant only the previous one has a name
                os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name must outlast a crash too
        folder = os.open(path.parent, os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def locked(path):
    """Hold the lock file `path` against all other processes, also on other nodes; gives None, or why there are no locks."""
    with open(path, "ab") as file:
        reason = None
        try:
            import fcntl  # POSIX only
            fcntl.lockf(file, fcntl.LOCK_EX)  # unlike flock, also between the nodes of every network file system
        except (ImportError, OSError) as error:
            reason = error
        yield reason


def without_prefix(state_dict, prefix):
    """`state_dict` with `prefix` taken off the names that begin with it."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items()}


def _is_state_dict(value):
    return isinstance(value, dict) and bool(value) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in value.items())


def network_state_dict(checkpoint, key, path):
    """The state dictionary stored under `key`, without the data-parallel `module.` prefix.

    A file that is itself a state dictionary (a bare backbone) is taken whole. Raises InputError, with the keys that the
    file has, when there is neither.
    """
    state = checkpoint.get(key)
    if state is None and _is_state_dict(checkpoint):
        state = checkpoint
    if not _is_state_dict(state):
        what = "holds no network" if key in checkpoint else "is not in the file"
        raise InputError(f"checkpoint {path}: key {key!r} {what}; keys: {_listed(checkpoint, 20) or 'none'}")
    return without_prefix(state, "module.")


def backbone_state_dict(checkpoint, key, path):
    """Bare backbone names of the network under `key` (see `network_state_dict`); head weights are dropped."""
    state = network_state_dict(checkpoint, key, path)
    if any(name.startswith("backbone.") for name in state):
        state = {name: value for name, value in state.items() if name.startswith("backbone.")}
    return {name: value for name, value in without_prefix(state, "backbone.").items() if not name.startswith("head.")}


def load_strictly(module, state_dict, path):
    """Load every tensor of `module` from `state_dict`; raises InputError in one line naming what does not fit.

    Beside names and shapes that is a tensor of integers for one of floating point, or the other way round, and values that
    are not finite.
    """
    if not _is_state_dict(state_dict):
        raise InputError(f"checkpoint {path} does not fit this network: it holds no tensors for {type(module).__name__}")
    own = module.state_dict()
    both = sorted(own.keys() & state_dict.keys())
    found = {
        "missing": sorted(own.keys() - state_dict.keys()),
        "unexpected": sorted(name for name in state_dict.keys() - own.keys() if not name.endswith("attn_mask")),
        "of another shape": [f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
                             for name in both if state_dict[name].shape != own[name].shape],
        "of another type": [f"{name} {state_dict[name].dtype}" for name in both
                            if _number_kind(state_dict[name]) != _number_kind(own[name])]}
    if not any(found.values()):
        found["not finite"] = [name for name in both if not state_dict[name].to(own[name].dtype).isfinite().all()]
    problems = [f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names]
    if problems:
        raise InputError(f"checkpoint {path} does not fit this network: {'; '.join(problems)}")
    module.load_state_dict({name: state_dict[name] for name in own})


def _number_kind(tensor):
    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return "floating point"
    return "other" if tensor.is_floating_point() or tensor.is_complex() else "integer"


def load_backbone(backbone, state_dict, path):
    """`load_strictly` for a backbone alone: the student's `masked_embed` may be left over, nothing may be missing."""
    state = {name: value for name, value in state_dict.items() if name != "masked_embed"}
    if "masked_embed" in dict(backbone.named_parameters()):
        state["masked_embed"] = state_dict.get("masked_embed", backbone.masked_embed.detach())
    # Constants of the architecture, absent from files of other libraries.
    for name, value in backbone.named_buffers():
        state.setdefault(name, value)
    load_strictly(backbone, state, path)


def load_optimizer(optimizer, state_dict, path):
    """Load the optimiser's state: steps and moments. Everything else (rates, momenta, implementation) stays as built here.

    Raises InputError unless there is, for every parameter or none, what this kind of optimiser keeps, in the parameter's
    shape and finite.
    """
    def need(condition, what):
        if not condition:
            raise InputError(f"checkpoint {path}: its optimizer {what}")

    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    need(isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups),
         "has no groups of parameters")
    need(isinstance(state, dict), "has no state")
    sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (groups, optimizer.param_groups))
    need(sizes == own_sizes, f"has groups of {sizes[:4]} parameters, this run {own_sizes}")
    numbers = [n for group in groups for n in group["params"]]
    need(all(type(n) is int for n in numbers) and len(set(numbers)) == len(numbers), "does not number its parameters")
    parameters = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))

    kind = type(optimizer).__name__
    names = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}, "LARS": {"mu"}}[kind]
    clean = {}
    for number, values in state.items():
        need(number in parameters and isinstance(values, dict), "holds a state for no parameter")
        need(values.keys() == names, f"state ({_listed(values)}) is not that of {kind}")
        clean[number] = {}
        for name, value in values.items():
            value, like = torch.as_tensor(value) if type(value) in (int, float) else value, parameters[number]
            good = torch.is_tensor(value) and _number_kind(value) != "other" and (
                value.numel() == 1 if name == "step" else value.shape == like.shape)
            value = value.to(torch.float32 if name == "step" else like.dtype, copy=True) if good else value
            need(good and value.isfinite().all() and (name not in ("step", "exp_avg_sq") or (value >= 0).all()),
                 f"state has no valid {name} for parameter {number}")
            clean[number][name] = value.reshape(()) if name == "step" else value
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": clean, "param_groups": [
        {**group, "params": stored["params"]} for group, stored in zip(own, groups, strict=True)]})


def load_scaler(scaler, state_dict, path):
    """Load scale and growth of a gradient scaler; its factors stay as built here. Raises InputError for unfit values."""
    stored = state_dict if isinstance(state_dict, dict) else {}
    scale, grown = stored.get("scale"), stored.get("_growth_tracker")
    if type(scale) not in (int, float) or not 0 < scale < 2**127 or type(grown) is not int or not 0 <= grown < 2**31:
        raise InputError(f"checkpoint {path}: its fp16_scaler is not that of a gradient scaler")
    scaler.load_state_dict({**scaler.state_dict(), "scale": float(scale), "_growth_tracker": grown})


def stored_args(checkpoint, path):
    """The arguments that a checkpoint holds, as a dictionary, empty where it has none. Raises InputError for others."""
    stored = checkpoint.get("args", {})
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(stored, dict):
        raise InputError(f"checkpoint {path}: its args are a {type(stored).__name__}")
    return stored


def load_pretraining(path):
    """`load_checkpoint` for a file to resume from. Raises InputError when an entry is missing or of another kind."""
    checkpoint = load_checkpoint(path)
    kinds = {"student": dict, "teacher": dict, "optimizer": dict, "epoch": int, "ibot_loss": dict}
    missing = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if missing:
        raise InputError(f"checkpoint {path} is no pre-training checkpoint: it lacks {', '.join(missing)}")
    if isinstance(checkpoint["epoch"], bool) or not 0 <= checkpoint["epoch"] < 2**31:
        raise InputError(f"checkpoint {path}: its epoch is {printable(checkpoint['epoch'])}")
    stored_args(checkpoint, path)
    return checkpoint


# ---------------------------------------------------------------- runs that can be resumed

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"  # the newest state of a run and the one before
SAVE, STOP = 1, 2  # what a process wants to happen before the next batch
# Flags that may change in a resumed run without a word.
FREE_FLAGS = {"output_dir", "load_from", "overwrite", "num_workers", "print_freq", "device", "dist_url", "local_rank",
              "save_every_steps", "save_every_minutes", "on_save_error", "on_bad_image", "max_bad_images"}


def check_output(folder, load_from, overwrite, held):
    """Raise InputError when the output folder cannot take a run, or has no checkpoint `load_from` (None: a fresh start;
    "auto": whatever there is). held: files of another run in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file")
    if load_from not in (None, "auto") and not (folder / load_from).is_file():
        raise InputError(f"--load_from: {folder / load_from} does not exist")
    if held and not load_from and not overwrite:
        raise InputError(f"--output_dir {folder} already holds a run ({', '.join(path.name for path in held[:3])}): resume "
                         "with --load_from auto, start over with --overwrite true, or choose another folder")


def start_output(folder, epoch, held):
    """Make the output folder and remove what a killed run left half written; without `epoch` all files `held` of an earlier
    run, with it what `log.txt` says of that epoch and later ones, which will be run again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob(".checkpoint*.pth.tmp*"), *(held if epoch is None else ())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        trim_log(folder / "log.txt", epoch)  # there is none in a fresh start
    except OSError as error:
        raise InputError(f"--output_dir {error.filename or folder}: {error.strerror}") from error


def find_checkpoint(paths, read):
    """(path, content) of the first of `paths` that `read` takes; (None, None) if there are none.

    Raises InputError when all of them are bad.
    """
    for path in paths:
        try:
            return path, read(path)
        except InputError as error:
            if get_rank() == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if paths:
        raise InputError(f"--load_from auto: none of the {len(paths)} checkpoints in {paths[0].parent} can be used; "
                         "--overwrite true starts over")
    return None, None


def check_same_start(step, load_from, folder):
    """Raise InputError unless all processes are about to start at this step."""
    if host_reduce(step) != -host_reduce(-step):
        raise InputError(f"--load_from {load_from}: the processes found different checkpoints; all nodes must see the same "
                         f"{folder}")


def changed_flags(flags, checkpoint, free=FREE_FLAGS):
    """{name: line that says so} of the `flags` (values by name), but `free` ones, that a checkpoint's run had otherwise."""
    then = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), argparse.Namespace) else {}
    return {name: f"note: --{name} is {value}, the checkpoint's run had {printable(then[name])}"
            for name, value in flags.items() if name not in free and name in then and repr(then[name]) != repr(value)}


def check_finite(modules, epoch):
    """Raise FloatingPointError unless all weights and buffers are finite: what is not must not replace a checkpoint."""
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        raise FloatingPointError(f"a weight or centre became non-finite in epoch {epoch}; the last checkpoint is intact")


def not_saved(path, error, on_save_error):
    """Say that a checkpoint could not be written; raises InputError if `--on_save_error` is "stop"."""
    message = f"{path} could not be written ({one_line(error)}); the checkpoints before it are intact"
    if on_save_error == "stop":
        raise InputError(message) from error
    print(f"warning: {message}", file=sys.stderr, flush=True)


def stopped(saved, epoch, step):
    """The exception that ends a run after a signal; all processes call it. saved: whether this process could save."""
    if host_reduce(int(not saved)):  # also waits for process 0, which a launcher would kill when another ends
        return InputError("a signal asked to stop, but the run could not be saved")
    return Preempted(f"stopped by a signal at epoch {epoch}, step {step}, and saved: the same command with --load_from "
                     "auto goes on from there")


# ---------------------------------------------------------------- schedules

def cosine_scheduler(base_value, final_value, epochs, steps_per_epoch, warmup_epochs=0, start_warmup_value=0.0):
    """Value of every step: linear warm-up (both ends included), then a half cosine to `final_value`.

    Returns float64 [epochs * steps_per_epoch]. `warmup_epochs` must not exceed `epochs`.
    """
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * steps_per_epoch)
    i = np.arange(epochs * steps_per_epoch - len(warmup))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * i / max(len(i), 1)))
    return np.concatenate((warmup, cosine))


def temperature_schedule(warmup_value, value, warmup_epochs, epochs, start_epoch=0):
    """Teacher temperature of every epoch: constant for `start_epoch` epochs, linear, then constant. float64 [epochs]."""
    return np.concatenate((np.full(start_epoch, warmup_value), np.linspace(warmup_value, value, warmup_epochs),
                           np.full(epochs, value)))[:epochs]


# ---------------------------------------------------------------- optimisation

def get_params_groups(model):
    """Two groups: weights, which are decayed, and biases and one-dimensional tensors, which are not. Frozen ones: none."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale each gradient by itself to a norm of at most `max_norm` (DINO's clipping, not a global norm); 0: leave it.

    No host synchronisation. Returns the norms before clipping, one 0-d tensor per parameter that has a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm:
        scales = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(gradients, scales)
    return norms


def step_if(finite, optimizer):
    """`optimizer.step()` if the 0-d tensor `finite` is true. Fused AdamW reads it on the device, others wait for it."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~finite).float()  # as a gradient scaler sets it
        optimizer.step()
        del optimizer.found_inf
    elif finite:
        optimizer.step()


def ema_pairs(student, teacher):
    """([teacher parameters], [student parameters of the same names]); aliases of shared student layers count too."""
    students = dict(student.named_parameters(remove_duplicate=False))
    pairs = [(p, students[name]) for name, p in teacher.named_parameters() if name in students]
    return [t for t, _ in pairs], [s for _, s in pairs]


@torch.no_grad()
def ema_update(teacher_parameters, student_parameters, momentum):
    """teacher <- m teacher + (1 - m) student, for all parameters at once."""
    torch._foreach_lerp_(teacher_parameters, [p.detach() for p in student_parameters], 1.0 - momentum)


def choose_amp_dtype(use_fp16, amp_dtype, device):
    """The autocast type, or None for single precision."""
    if not use_fp16 or (amp_dtype == "auto" and device.type not in ("cuda", "cpu")):
        return None
    if amp_dtype == "auto" and device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None  # others only emulate it
    if amp_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, amp_dtype)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al., 2017).

    Weight decay and the trust ratio eta * |p| / |g + wd p| apply to tensors of two or more dimensions; the ratio is 1
    where either norm is 0.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # Matrices first: only they are decayed and scaled.
            params.sort(key=lambda p: p.ndim < 2)
            updates, matrices = [p.grad for p in params], [p for p in params if p.ndim > 1]
            if matrices:
                scaled = torch._foreach_add(updates[:len(matrices)], matrices, alpha=group["weight_decay"])
                p_norms, u_norms = torch.stack(torch._foreach_norm(matrices)), torch.stack(torch._foreach_norm(scaled))
                ratios = torch.where((p_norms > 0) & (u_norms > 0), group["eta"] * p_norms / u_norms, 1.0)
                torch._foreach_mul_(scaled, list(ratios.unbind()))
                updates[:len(matrices)] = scaled
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            buffers = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


# ---------------------------------------------------------------- progress and logs

MAX_DROPPED = 20  # updates in a row; float16's scaler finds its scale in fewer


def add_row(progress, row):
    """Add the values of a row to the sums of an epoch: `progress` has "totals" and "counts" by name."""
    for name, value in row.items():
        progress["totals"][name] = progress["totals"].get(name, 0.0) + value
        progress["counts"][name] = progress["counts"].get(name, 0) + 1


def mean_of(progress, name):
    return progress["totals"][name] / progress["counts"][name] if name in progress["totals"] else math.nan


def count_step(progress, step, row, has_scaler, on_nonfinite, quiet):
    """Add a step's row to the means of the epoch, unless its update was dropped ("nonfinite" in it): then say so, or raise.

    `progress["dropped"]` counts updates dropped in a row. Raises FloatingPointError by `--on_nonfinite`.
    """
    failed = row.get("nonfinite")
    if failed is None:
        progress["dropped"] = 0
        return add_row(progress, row)
    progress["dropped"] += 1
    if has_scaler and math.isfinite(row["loss"]):  # float16 gradients overflow now and then
        failed = "float16 gradients overflow"
    elif on_nonfinite == "stop":
        raise FloatingPointError(f"not finite at step {step}: {failed} (learning rate {row['lr']:.3g}). The update was not "
                                 "made, the last checkpoint is intact. --on_nonfinite skip goes on; with float16, try "
                                 "--amp_dtype bfloat16 or --use_fp16 false")
    elif not quiet:
        print(f"warning: step {step} dropped, not finite: {failed}", flush=True)
    if progress["dropped"] >= MAX_DROPPED:
        raise FloatingPointError(f"{MAX_DROPPED} updates in a row dropped up to step {step}: {failed}; the last checkpoint "
                                 "is intact")


def log_scalars(writer, group, values, step):
    """Values by name to TensorBoard, if there is a writer. A full disk is a warning."""
    if writer is None:
        return
    try:
        for name, value in values.items():
            if name != "nonfinite":
                writer.add_scalar(f"{group}/{name}", value, step)
    except OSError as error:
        say_once(f"warning: TensorBoard's events cannot be written ({error.strerror})")


def close_writer(writer):
    """Write TensorBoard's last events. A full disk is a warning."""
    try:
        writer.close()
    except OSError as error:
        say_once(f"warning: TensorBoard's events cannot be written ({error.strerror})")


def clustering_scores(labels, clusters):
    """Agreement of integer clusters [T] with labels [T]: {"nmi", "ari", "fscore", "adjacc"}.

    `fscore` is Fowlkes-Mallows; `adjacc` the accuracy after the best one-to-one assignment of clusters to labels.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    counts = metrics.cluster.contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return {"nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
            "ari": float(metrics.adjusted_rand_score(labels, clusters)),
            "fscore": float(metrics.fowlkes_mallows_score(labels, clusters)),
            "adjacc": float(counts[rows, columns].sum() / len(labels))}


class DeviceMeters:
    """Values of the steps since the last `read`, kept on the device so that the step never waits for the host."""

    def __init__(self, names):
        self.names = names
        self.pending = []

    def add(self, *values):
        """Values in the order of `names`: 0-d device tensors, or numbers."""
        device = next(v.device for v in values if torch.is_tensor(v))
        self.pending.append(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values]))

    def read(self):
        """Means over processes, {name: float} for each step. Waits for the device; all processes call it together.

        Where a mean is not finite, "nonfinite" says of which values and on which processes.
        """
        if not self.pending:
            return []
        own, self.pending = torch.stack(self.pending), []
        means = all_reduce_mean(own.clone()).tolist()
        rows = [dict(zip(self.names, row, strict=True)) for row in means]
        if not all(math.isfinite(value) for row in means for value in row):
            parts = [part.view(own.shape) for part in gather_parts(own.flatten())]
            for i, row in enumerate(rows):
                found = [f"{name} {part[i, k].item()}{f' on process {rank}' if len(parts) > 1 else ''}"
                         for k, name in enumerate(self.names) for rank, part in enumerate(parts)
                         if not part[i, k].isfinite()]
                row |= {"nonfinite": ", ".join(found)} if found else {}
        return rows


def peak_memory_mib(device):
    """Peak memory in MiB: what the allocator gave on CUDA, the resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # POSIX only
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@lru_cache
def say_once(text):
    """Print a line on stderr, on process 0, the first time only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def append_log(path, line):
    """Add a dictionary as a line to a log; numbers that are not finite become null. A full disk is a warning."""
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        say_once(f"warning: {path} cannot be written ({error.strerror})")


def trim_log(path, epoch):
    """Leave in `path`, a JSON object with "epoch" per line, the epochs before `epoch`; half lines go. May be missing."""
    def is_kept(line):
        try:
            return line.endswith("\n") and json.loads(line)["epoch"] < epoch
        except (ValueError, KeyError, TypeError):  # of a full disk or a kill
            return False

    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if is_kept(line)]
        if kept != lines:
            path.write_text("".join(kept))


def eta_string(seconds):
    return str(datetime.timedelta(seconds=int(seconds)))


def describe_run(args, process):
    """Lines that identify a run: commit, arguments, versions, device."""
    import timm
    import torchvision
    on_gpu = process.device.type == "cuda"
    device = torch.cuda.get_device_name(process.device) if on_gpu else platform.processor() or platform.machine()
    lines = [f"commit: {git_commit()}", f"started: {time.strftime('%Y-%m-%d %H:%M:%S')}",
             f"versions: python {platform.python_version()}, torch {torch.__version__}, "
             f"torchvision {torchvision.__version__}, timm {timm.__version__}, numpy {np.__version__}",
             f"device: {process.device} ({device}), {process.world_size} process(es), "
             f"{torch.get_num_threads()} threads each"]
    return "\n".join(lines + [f"{name}: {value}" for name, value in sorted(vars(args).items())])


def git_commit():
    """Commit of this checkout, marked when it has uncommitted changes; `unknown` outside a checkout."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode:
            return "unknown"
        changed = git("status", "--porcelain", "-uno").stdout.strip()
        return commit.stdout.strip() + (" with local changes" if changed else "")
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def fix_random_seeds(seed):
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
