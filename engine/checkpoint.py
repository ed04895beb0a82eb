"""Checkpoint files: safe reading, atomic writing, strict loading."""
import argparse
import contextlib
import math
import os
import pickletools
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from engine.errors import InputError

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

