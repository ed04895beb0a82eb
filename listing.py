"""Which images there are: in class folders, flat or nested ones, in lists of paths, in tar shards, in several of these.

A class is the first folder below the one that is given; images at its top are the class TOP.
"""
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

import shards
from engine import InputError, is_main_process, load_checkpoint, locked, printable, save_atomically, say_once

INDEX_VERSION = 2  # of the listings of folders that are kept
TOP = "."  # class of the images at the top of a folder, and of those of a list without labels


class FileList(Sequence):
    """(path, label) of every image, as torchvision's list `samples`, in a few arrays: reference counting would copy
    millions of Python objects into every worker. A path in a tar is a `shards.Member`.

    folders: paths of folders or tars; counts: how many images each has, one after the other; labels: of every image.
    names: all file names as one array of bytes; ends: where each of them ends. offsets, sizes: of every image in its tar,
    -1 outside tars; None where there are no tars.
    """

    def __init__(self, folders, counts, labels, names, ends, offsets=None, sizes=None):
        self.folders, self.counts, self.labels = folders, counts, labels
        self.first = np.cumsum(counts) - counts
        self.names, self.ends, self.offsets, self.sizes = names, ends, offsets, sizes

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        folder = self.folders[np.searchsorted(self.first, index, side="right") - 1]
        name = os.fsdecode(self.names[self.ends[index - 1] if index else 0:self.ends[index]].tobytes())
        if self.offsets is None or self.offsets[index] < 0:
            return os.path.join(folder, name), int(self.labels[index])
        return shards.Member(folder, name, int(self.offsets[index]), int(self.sizes[index])), int(self.labels[index])


class Listing(NamedTuple):
    """Images with their labels, the names of the classes that labels stand for, and what is to be said of them."""
    samples: FileList
    classes: list
    notes: tuple = ()


def places_of(source):
    """The paths in what `list_images` takes."""
    return [source] if isinstance(source, (str, os.PathLike)) else list(source)


def name_of(source):
    """A short name of what `list_images` takes."""
    return "+".join(Path(place).resolve().name for place in places_of(source))


def list_images(source, labelled=True):
    """The `Listing` of an image folder, a list of paths (.txt), a folder of shards, or several of them one after the other.

    Classes of one name are one. labelled: labels count: images without a class are left out, and there must be classes,
    each with an image. Without, images at the top are a class of their own. Raises `InputError`, naming the
    place, for what cannot be read or has no image.
    """
    listings = [_list_one(os.path.expanduser(place), labelled) for place in places_of(source)]
    return _joined(listings) if len(listings) > 1 else listings[0]


def _list_one(path, labelled):
    if os.path.isfile(path):
        if path.endswith(".txt"):
            return _from_list(path, labelled)
        raise InputError(f"data folder {path}: Not a directory; a list of images ends in .txt, of tars the folder is given")
    if shards.is_shards(path):
        index = shards.read_index(path)
        if labelled and TOP in index["classes"]:
            raise InputError(f"data folder {path}: images in its shards have no class, which is needed here")
        arrays = (index[name] for name in ("tars", "counts", "labels", "names", "ends", "offsets", "sizes"))
        return Listing(FileList(*arrays), index["classes"])
    return _from_folder(path, labelled)


def _joined(listings):
    """One `Listing` of several."""
    parts, classes = [one.samples for one in listings], sorted(set().union(*(one.classes for one in listings)))
    number = {name: label for label, name in enumerate(classes)}
    labels = [np.array([number[name] for name in one.classes], dtype=np.int32)[one.samples.labels] for one in listings]
    starts = np.cumsum([0, *(len(part.names) for part in parts[:-1])])
    in_tars = []
    if any(part.offsets is not None for part in parts):
        nowhere = [np.full(len(part), -1) for part in parts]
        in_tars = [np.concatenate([none if part.offsets is None else getattr(part, name)
                                   for part, none in zip(parts, nowhere, strict=True)]) for name in ("offsets", "sizes")]
    return Listing(FileList(
        [folder for part in parts for folder in part.folders], np.concatenate([part.counts for part in parts]),
        np.concatenate(labels), np.concatenate([part.names for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=True)]), *in_tars), classes,
        sum((one.notes for one in listings), ()))


# ---------------------------------------------------------------- lists of paths

def _split(line):
    """(path, label or None) of a line of a list: the label is behind the last tab or, if the line does not end as an image
    file does, behind the last space."""
    if "\t" in line:
        path, _, label = line.rpartition("\t")
    elif " " in line and not line.lower().endswith(IMG_EXTENSIONS):
        path, _, label = line.rpartition(" ")
    else:
        return line, None
    return path.strip(), label.strip()


def _from_list(path, labelled):
    """Images of a text file with a path a line, relative to its folder; empty lines and those that begin with # are no
    images. Process 0 looks whether all are there."""
    try:
        lines = os.fsdecode(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n")
    except OSError as error:
        raise InputError(f"list {path}: {error.strerror}") from error
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"list {path}: no path of an image in it")
    root, entries = os.path.dirname(path), [_split(line) for _, line in lines]
    if is_main_process():
        with ThreadPoolExecutor(16) as pool:  # on network drives each look takes a while
            there = list(pool.map(lambda entry: os.path.isfile(os.path.join(root, entry[0])), entries))
        missing = [place for place, found in enumerate(there) if not found]
        if missing:
            name = printable(os.path.join(root, entries[missing[0]][0]), 200)
            raise InputError(f"list {path}, line {lines[missing[0]][0]}: no file {name}"
                             + f" ({len(missing)} of {len(lines)} are missing)" * (len(missing) > 1))
    without = next((number for (number, _), (_, label) in zip(lines, entries, strict=True) if label is None), None)
    if labelled and without is not None:
        raise InputError(f"list {path}, line {without}: no label, which is needed here; write it behind a tab")
    labels = [TOP if label is None else label for _, label in entries]
    classes = sorted(set(labels))
    number = {name: label for label, name in enumerate(classes)}
    names = [os.fsencode(name) for name, _ in entries]
    return Listing(FileList([root], np.array([len(names)]), np.array([number[label] for label in labels], dtype=np.int32),
                            np.frombuffer(b"".join(names), dtype=np.uint8), np.cumsum([len(name) for name in names])),
                   classes)


# ---------------------------------------------------------------- folders

def _from_folder(root, labelled):
    index = folder_index(root)
    folders, counts, ends, names = _folders(index), *(index[name].numpy() for name in ("counts", "ends", "names"))
    groups = [folder.split(os.sep)[0] if folder else TOP for folder in folders]
    top = int(counts[0])
    if labelled and top:
        counts, names, ends = np.r_[0, counts[1:]], names[ends[top - 1]:], ends[top:] - ends[top - 1]
    notes, filled = [], {group for group, count in zip(groups, counts.tolist(), strict=True) if count}
    empty = sorted(set(groups[1:]) - filled)
    shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    kinds = ", ".join(IMG_EXTENSIONS)
    if labelled:
        if not set(groups[1:]):
            hint = (f"move the images into a sub-folder, one folder per class, e.g. {os.path.join(root, 'all', '')}" if top
                    else "expected one folder of images per class")
            raise InputError(f"data folder {root}: no class folders in it; {hint}")
        if empty:
            raise InputError(f"data folder {root}: no image ({kinds}) in class folder {shown}")
        if top:
            notes.append(f"note: data folder {root}: images at its top, which have no class, are left out: {top}")
    elif not filled:
        raise InputError(f"data folder {root}: no image ({kinds}) in it" if not shards.has_tars(root) else
                         f"data folder {root}: tars without an index; this writes one: python loader.py index {root}")
    else:
        if top and len(filled) > 1:
            notes.append(f"note: data folder {root}: images at its top are a class of their own: {top}")
        if empty:
            notes.append(f"note: data folder {root}: no image ({kinds}) in {shown}")
        if index["others"]:
            notes.append(f"note: data folder {root}: files that do not end in {kinds} are left out: {index['others']}")
    classes = sorted(filled)
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number.get(group, 0) for group in groups], dtype=np.int32).repeat(counts)
    return Listing(FileList([os.path.join(root, folder) for folder in folders], counts, labels, names, ends), classes,
                   tuple(notes))


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:
        if entry.name.lower().endswith(IMG_EXTENSIONS):
            return False  # a link to itself: a bad image, not a bad folder
        raise


def _bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _walk(root):
    """List an image folder: dictionary of tensors for `_read_index`, and whether it may be kept.

    First the images at its top, which torchvision's `ImageFolder` leaves out; then the same files in the same order as
    there, symbolic links followed. A modification time is read before its folder is, so that a change in between shows
    later; a folder changed less than two seconds ago may change again within one tick of the file system's clock, unseen.
    Raises `InputError` for a folder that cannot be read (torchvision leaves it out) and for links in a circle.
    """
    now, found, pending, others = time.time_ns(), [], [""], 0
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder) if folder else root
        files = []
        try:
            modified = os.stat(path).st_mtime_ns
            with os.scandir(path) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        pending.append(os.path.join(folder, entry.name))
                    elif entry.name.lower().endswith(IMG_EXTENSIONS):
                        files.append(entry.name)
                    else:
                        others += not entry.name.startswith(".")
        except OSError as error:
            raise InputError(f"data folder {path}: {error.strerror}") from error
        found.append((folder.split(os.sep)[0], folder, modified, sorted(files)))
    found.sort()  # class by class
    names = [os.fsencode(name) for *_, files in found for name in files]
    index = {
        "version": INDEX_VERSION,
        "extensions": list(IMG_EXTENSIONS),
        "others": others,  # files that are left out
        "folders": _bytes(os.fsencode("\0".join(folder for _, folder, *_ in found))),  # relative; the root is the first
        "modified": torch.tensor([modified for *_, modified, _ in found]),
        "counts": torch.tensor([len(files) for *_, files in found]),
        "names": _bytes(b"".join(names)),
        "ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
    }
    return index, all(now - modified > 2e9 for _, _, modified, _ in found)


def _folders(index):
    return os.fsdecode(index["folders"].numpy().tobytes()).split("\0")


def _is_sound(index):
    """Whether an index out of a file can be used: arrays that fit together, and names that stay in the folder."""
    kinds = {"folders": torch.uint8, "modified": torch.int64, "counts": torch.int64, "names": torch.uint8,
             "ends": torch.int64}
    arrays = [index.get(name) for name in kinds]
    if not all(torch.is_tensor(array) and array.dtype == kind and array.ndim == 1
               for array, kind in zip(arrays, kinds.values(), strict=True)):
        return False
    _, modified, counts, names, ends = arrays
    folders = _folders(index)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    return (type(index.get("others")) is int and folders[0] == ""
            and len(folders) == len(modified) == len(counts) and not any(
                os.path.isabs(folder) or ".." in folder.split(os.sep) for folder in folders)
            and bool((counts >= 0).all()) and int(counts.sum()) == len(ends) and bool((lengths > 0).all())
            and int(lengths.sum()) == len(names) and not bool((names == ord(os.sep)).any()))


def _read_index(path, root):
    """The index at `path`, or None when there is none, it is broken (said once), or a folder changed since."""
    if not os.path.exists(path):
        return None
    try:
        index = load_checkpoint(path)
    except InputError as error:
        say_once(f"note: {error}; the folder is walked instead")
        return None
    if index.get("version") != INDEX_VERSION or index.get("extensions") != list(IMG_EXTENSIONS):
        return None
    if not _is_sound(index):
        say_once(f"note: index {path} is damaged; the folder is walked instead")
        return None
    try:
        modified = [os.stat(os.path.join(root, folder)).st_mtime_ns for folder in _folders(index)]
    except OSError:
        return None
    return index if modified == index["modified"].tolist() else None


def folder_index(root):
    """Listing of the image folder `root`, from `$XDG_CACHE_HOME/ibot/` (default `~/.cache/ibot/`) while it holds.

    It holds as long as no folder in it has another modification time. Of several processes one walks the folder and the
    others wait. Where nothing can be written there each walks, and says so once.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    path = Path(base, "ibot", f"{name}.index")
    index = _read_index(path, root)
    if index is not None:
        return index
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            index = _read_index(path, root)
            if index is None:
                index, lasting = _walk(root)
                if lasting:
                    save_atomically(index, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        say_once(f"note: no index of image folders can be kept ({error}); each start walks them")
    return index or _walk(root)[0]
