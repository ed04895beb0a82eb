"""Checkpoint files: safe reading, atomic writing, strict loading."""
import argparse
import contextlib
import os
import pickle
import pickletools
import re
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import torch

from engine.errors import InputError


class _Float64:
    """Stands for numpy's dtype where a file is read, which takes any state that a pickle sets; none but float64 is."""

    def __init__(self, kind, *_):
        if kind != "f8":
            raise ValueError("it holds a numpy type other than float64")

    def __setstate__(self, state):
        if state != (3, "<", None, None, None, -1, -1, 0):
            raise ValueError("it holds a numpy type other than float64")

    @staticmethod
    def scalar(dtype, data):
        if not isinstance(dtype, _Float64):
            raise ValueError("it holds a numpy type other than float64")
        return struct.unpack("<d", data)[0]


SAFE_GLOBALS = [argparse.Namespace, (_Float64, "numpy.dtype"), (_Float64.scalar, "numpy.core.multiarray.scalar"),
                (_Float64.scalar, "numpy._core.multiarray.scalar")]
# What `torch.save` needs for what is written here and in the reference. torch by itself takes more: sparse, quantised and
# empty tensors, and buffers of any size.
_NAMES = re.compile(r"torch\.(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage|argparse\.Namespace|"
                    r"torch\._utils\._rebuild_(tensor_v2|parameter)|collections\.OrderedDict|_codecs\.encode|"
                    r"numpy\.dtype|numpy\._?core\.multiarray\.scalar")


def load_checkpoint(path):
    """Read the dictionary in a `.safetensors` or a `torch.save` file without running any code in it.

    Beside tensors and plain containers only `argparse.Namespace` and numpy's float64 scalars are allowed: the reference
    stores its arguments, and its optimiser's rates come from numpy schedules. `_check_archive` goes through the file first,
    for damage, of which torch sees none; that tensors lie within their records is torch's part (2.10 and newer). Raises
    InputError, naming the file, when it is missing, broken or holds anything else.
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
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, not a dictionary")
        return loaded
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {path}: no such file") from error
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        cause = error.__context__ if isinstance(error, pickle.UnpicklingError) else None  # without advice to read unsafely
        if isinstance(error, (AttributeError, IndexError, KeyError, TypeError)):
            cause = "its pickle is damaged"
        reason = (error.strerror if isinstance(error, OSError) else None) or str(cause or error) or type(error).__name__
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


def _check_archive(file):
    """Raise ValueError unless `file` is a sound archive as `torch.save` writes it, from one end to the other.

    That is a zip file of uncompressed records that add up to no more than its size and agree with their checksums
    (torch does not look at these), with a pickle that names nothing but `_NAMES`.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    if not head.startswith(b"PK\3\4"):
        known = {b"": "it is empty",
                 b"\x80\x02\x8a\nl\xfc\x9cF": "it has the format of PyTorch before 1.6; torch.load and torch.save renew it"}
        raise ValueError(known.get(head, "it was not written by torch.save"))
    file.seek(max(0, size - 22))
    tail = file.read()
    if tail[:4] != b"PK\5\6" or tail[20:] != b"\0\0":
        raise ValueError("it is cut short or damaged: its end is missing")
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
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its record {damaged} is damaged")
        for operation, value, _ in pickletools.genops(archive.read(prefix + "data.pkl")):
            if operation.name == "GLOBAL" and not _NAMES.fullmatch(value.replace(" ", ".")):
                raise ValueError(f"it holds {value.replace(' ', '.')}")
            if operation.name == "PROTO" and value != 2:  # torch would warn, and then fail
                raise ValueError(f"its pickle has protocol {value}, not 2 as torch.save writes it")


def save_atomically(obj, path, previous=None, write=None):
    """`write(obj, file)`, by default `torch.save`, to a temporary file in the same folder, synced, then renamed: no reader
    ever sees half a file.

    With `previous` the file that `path` replaces is kept under that name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            (write or torch.save)(obj, file)
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
def replacing(path, what):
    """A name beside `path` for a file or folder that takes its place when it is complete.

    Raises InputError, calling the path `what`, when the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


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
    for tensor in state.values():  # a stride of 0 makes one value any number of them
        stored = tensor.untyped_storage().nbytes() // tensor.itemsize
        if tensor.numel() > stored:
            raise InputError(f"checkpoint {path}: the file has {stored} values for a tensor of shape {tuple(tensor.shape)}")
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
