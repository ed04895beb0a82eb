"""Tar shards: many images in few plain tar files, each read where it lies by an index; and their packing.

A folder of shards holds 00000.tar, 00001.tar, ... and INDEX: names, places and labels of all images, in order.
"""
import os
import tarfile
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine import InputError, default_workers, locked, printable, save_atomically

INDEX, UNFINISHED = "shards.npz", "shards.unfinished"
VERSION = 1
OPEN_TARS = 128  # of a process; a usual limit of its files is 1024
BLOCK = 512  # bytes; a tar is made of them
AT_ONCE = 64  # images in memory while they are packed
# Arrays of an index: texts are UTF-8 bytes, `names` one after the other up to `ends`, the others with zeros between.
KINDS = {"version": np.int64, "classes": np.uint8, "tars": np.uint8, "tar_sizes": np.int64, "counts": np.int64,
         "labels": np.int32, "names": np.uint8, "ends": np.int64, "offsets": np.int64, "sizes": np.int64}


# ---------------------------------------------------------------- reading

class _Descriptor:
    def __init__(self, path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # when it is left out of the cache and no thread reads by it
        if hasattr(self, "number"):
            close(self.number)


_opened = lru_cache(OPEN_TARS)(_Descriptor)


class Member(str):
    """An image in a tar; as text TAR:NAME. `offset` and `size` in bytes."""

    def __new__(cls, tar, name, offset, size):
        member = super().__new__(cls, f"{tar}:{name}")
        member.tar, member.name, member.offset, member.size = tar, name, offset, size
        return member

    def __getnewargs__(self):
        return self.tar, self.name, self.offset, self.size

    def read(self):
        """The bytes of the file. A descriptor has no place of its own here, so that processes may share it."""
        opened = _opened(self.tar)  # held, or another thread could have it closed before it is read
        data = os.pread(opened.number, self.size, self.offset)
        if len(data) < self.size:
            raise ValueError("the tar is cut short")
        return data


def is_shards(folder):
    """Whether the folder is one of shards. Raises `InputError` where their packing was interrupted."""
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise InputError(f"data folder {folder}: its packing into shards is not finished; if none is running, pack again")
    return os.path.isfile(os.path.join(folder, INDEX))


def read_index(folder):
    """The index of a folder of shards: arrays by name, see KINDS, with lists of texts for classes and paths of tars.

    Raises `InputError` when it is damaged, or a tar is missing or has another size than it was written with.
    """
    path = os.path.join(folder, INDEX)
    try:
        with np.load(path, allow_pickle=False) as file:  # compares checksums
            index = {name: file[name] for name in KINDS}
        _check(index)
    except Exception as error:  # a damaged file can make the reader raise anything
        raise InputError(f"{path}: cannot be used ({printable(error, 160)}); pack the images again, or write it anew: "
                         f"python loader.py index {folder}") from error
    index["classes"], tars = _texts(index["classes"]), _texts(index["tars"])
    index["tars"] = [os.path.join(folder, tar) for tar in tars]
    for tar, size in zip(index["tars"], index["tar_sizes"].tolist(), strict=True):
        try:
            found = os.stat(tar).st_size
        except OSError as error:
            raise InputError(f"{tar}: {error.strerror}, but {path} names it") from error
        if found != size:
            raise InputError(f"{tar}: {found} bytes instead of {size}: it is cut short or was changed after {path} was "
                             "written; copy it again")
    return index


def _check(index):
    """Raise ValueError unless the arrays of an index fit together."""
    for name, kind in KINDS.items():
        if index[name].dtype != kind or index[name].ndim != (name != "version"):
            raise ValueError(f"its {name} is of another kind")
    if index["version"] != VERSION:
        raise ValueError(f"it has version {index['version']}, not {VERSION}")
    counts, labels, ends, offsets, sizes = (index[name] for name in ("counts", "labels", "ends", "offsets", "sizes"))
    lengths, tar_sizes = np.diff(ends, prepend=0), index["tar_sizes"]
    if not (len(_texts(index["tars"])) == len(tar_sizes) == len(counts) and len(labels) == len(ends) == len(offsets)
            == len(sizes) == counts.sum() > 0 and (counts >= 0).all() and (lengths > 0).all()
            and lengths.sum() == len(index["names"]) and (0 <= labels).all()
            and labels.max() < len(_texts(index["classes"])) and (offsets >= 0).all() and (sizes >= 0).all()
            and (offsets + sizes <= tar_sizes.repeat(counts)).all()):
        raise ValueError("its arrays do not fit together")


def _texts(array):
    return os.fsdecode(array.tobytes()).split("\0")


def _bytes(texts):
    return np.frombuffer(os.fsencode("\0".join(texts)), dtype=np.uint8)


def _write_index(folder, tars, counts, classes, labels, names, offsets, sizes):
    """tars: paths relative to the folder, or absolute; the sequences behind `classes` have an entry an image."""
    encoded = [os.fsencode(name) for name in names]
    index = {"version": VERSION, "classes": _bytes(classes), "tars": _bytes(tars),
             "tar_sizes": [os.stat(os.path.join(folder, tar)).st_size for tar in tars], "counts": counts, "labels": labels,
             "names": np.frombuffer(b"".join(encoded), dtype=np.uint8), "ends": np.cumsum([len(name) for name in encoded]),
             "offsets": offsets, "sizes": sizes}
    save_atomically({name: np.asarray(index[name], dtype=kind) for name, kind in KINDS.items()},
                    os.path.join(folder, INDEX), write=lambda arrays, file: np.savez(file, **arrays))


# ---------------------------------------------------------------- packing

def pack(samples, classes, folder, shard_size, content):
    """Write images into the tars and the index of a new folder, in their order. Progress is printed.

    An interrupted packing leaves the file UNFINISHED; another call starts over. Two calls at a time wait for one another.

    Args:
        samples: sequence of (path or `Member`, label), with their `folders`: `listing.FileList`.
        shard_size: bytes of a tar at most, unless one image has more.
        content: path -> (bytes, word for what was done with the file), called in several threads.

    Returns {word: paths}, of all words but "kept". Raises `InputError` for a folder that is not empty, or a full disk.
    """
    folder = Path(folder)
    mark = folder / UNFINISHED
    try:
        found = sorted(os.listdir(folder)) if folder.exists() else []
        if found and UNFINISHED not in found:
            what = "holds shards already" if INDEX in found else f"is not empty ({', '.join(found[:3])})"
            raise InputError(f"{folder} {what}: pack into a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(mark):
            if (folder / INDEX).exists() and not mark.exists():
                raise InputError(f"{folder} was packed by another process meanwhile")
            if found:
                print(f"{folder}: an earlier packing was interrupted; it is started over", flush=True)
                for name in found:
                    if name == INDEX or name.endswith(".tar") and name[:-4].isdigit():
                        (folder / name).unlink()
            done = _write_tars(samples, classes, folder, shard_size, content)
            mark.unlink()
        return done
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}; the packing is not finished") from error


def _write_tars(samples, classes, folder, shard_size, content):
    tars, counts, names, done, file = [], [], [], {}, None
    labels, offsets, sizes = array("i"), array("q"), array("q")
    root = os.path.commonpath([os.path.abspath(place) for place in samples.folders])
    try:
        with ThreadPoolExecutor(default_workers() + 1) as pool:
            for first in range(0, len(samples), AT_ONCE):
                block = samples[first:first + AT_ONCE]
                paths = [path for path, _ in block]
                for (path, label), (data, word) in zip(block, pool.map(content, paths), strict=True):
                    name = member_name(path, root)
                    head = tarfile.TarInfo(name)
                    head.size = len(data)
                    head = head.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
                    if file is None or counts[-1] and file.tell() + len(head) + len(data) > shard_size - 3 * BLOCK:
                        _end(file, len(names), len(samples))
                        tars.append(f"{len(tars):05}.tar")
                        counts.append(0)
                        file = open(folder / tars[-1], "wb")
                    offsets.append(file.tell() + len(head))
                    file.write(head + data + bytes(-len(data) % BLOCK))
                    counts[-1] += 1
                    labels.append(label)
                    names.append(name)
                    sizes.append(len(data))
                    if word != "kept":
                        done.setdefault(word, []).append(path)
        _end(file, len(names), len(samples))
        _write_index(folder, tars, counts, classes, labels, names, offsets, sizes)
    finally:
        if file is not None:
            file.close()
    return done


def _end(file, packed, images):
    """Write what ends a tar, and have it on disk before the index says so."""
    if file is not None:
        file.write(bytes(2 * BLOCK))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        print(f"{file.name}: {packed} of {images} images", flush=True)


def member_name(path, root):
    """Name of an image in a tar: its path below `root`, without what leads out of it; of a `Member` its name."""
    if isinstance(path, Member):
        return path.name
    name = os.path.relpath(path, root).replace(os.sep, "/")
    while name.startswith("../"):
        name = name[3:]
    return name


# ---------------------------------------------------------------- tars of others

def has_tars(folder):
    """Whether there are tars in a folder, compressed ones too."""
    return any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in os.listdir(folder))


def index_tars(folder, output=None):
    """Write the index of plain tars that were not packed here; their heads are read once. Returns (tars, images, others).

    A class is the first folder of a member's name, "." without one. output: folder of the index, by default `folder`.
    Raises `InputError` for a tar that is compressed or damaged, and without any image.
    """
    folder = os.path.expanduser(folder)
    try:
        found = sorted(name for name in os.listdir(folder) if name.endswith((".tar", ".tar.gz", ".tgz")))
        tars, counts, groups, names, offsets, sizes, others = [], [], [], [], [], [], 0
        for tar in found:
            path = os.path.join(folder, tar)
            counts.append(0)
            tars.append(tar if output is None else os.path.abspath(path))
            for member in _members(path):
                if not (member.isreg() and not member.issparse() and member.name.lower().endswith(IMG_EXTENSIONS)):
                    others += member.isreg()
                    continue
                name = member.name.removeprefix("./")
                counts[-1] += 1
                groups.append(name.split("/")[0] if "/" in name else ".")
                names.append(name)
                offsets.append(member.offset_data)
                sizes.append(member.size)
            print(f"{path}: {counts[-1]} images", flush=True)
        if not names:
            raise InputError(f"data folder {folder}: no image ({', '.join(IMG_EXTENSIONS)}) in its {len(found)} tars")
        classes = sorted(set(groups))
        number = {name: label for label, name in enumerate(classes)}
        if output is not None:
            os.makedirs(output, exist_ok=True)
        _write_index(folder if output is None else output, tars, counts, classes, [number[name] for name in groups], names,
                     offsets, sizes)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return len(found), len(names), others


def _members(path):
    """Heads of the members of a plain tar, one by one. Raises `InputError` for what is none, or is cut short."""
    size = os.stat(path).st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member
                tar.members = []  # or it keeps them all
            tar.fileobj.seek(tar.offset)  # where no head was found: the end, or what tarfile passes over
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise InputError(f"{path}: no plain tar, or cut short ({error}); a compressed one must be unpacked, as by gunzip: "
                         "nothing in it can be read at its place") from error
