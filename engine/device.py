"""What a device can do, and its random states."""
import contextlib
import gc
import math
import os
import random
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch

from engine.errors import InputError


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


def choose_amp_dtype(use_fp16, amp_dtype, device):
    """The autocast type, or None for single precision."""
    if not use_fp16 or (amp_dtype == "auto" and device.type not in ("cuda", "cpu")):
        return None
    if amp_dtype == "auto" and device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None  # others only emulate it
    if amp_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, amp_dtype)


def peak_memory_mib(device):
    """Peak memory in MiB: what the allocator gave on CUDA, the resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # POSIX only
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

