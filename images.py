"""Image files, as everything that looks at images reads them: decoded, listed in class folders, normalised.

Images are uint8 until they are on the device that works with them; `normalize` makes floats of them there.
"""
import hashlib
import math
import os
import stat
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine import (
    InputError,
    default_workers,
    get_world_size,
    is_main_process,
    load_checkpoint,
    locked,
    safetensors_metadata,
    save_atomically,
    say_once,
    stored_args,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PixelStats(NamedTuple):
    """Mean and standard deviation of red, green and blue, of values in 0..1: what images are normalised with."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __str__(self):
        mean, std = (" ".join(f"{v:g}" for v in values) for values in self)
        return "ImageNet's statistics" if self == IMAGENET else f"mean {mean}, std {std}"

    def as_settings(self):
        """{"mean": list, "std": list} for what is saved; nothing where they are ImageNet's, as in files without."""
        return {} if self == IMAGENET else {name: list(values) for name, values in self._asdict().items()}


IMAGENET = PixelStats()


@lru_cache
def _mean_std(device, scale, stats):
    # Cached: a copy of host constants would make the GPU wait at every batch. No inference tensors in the cache.
    with torch.inference_mode(False):
        return [scale * torch.tensor(v, device=device).view(3, 1, 1) for v in stats]


def normalize(images, stats=IMAGENET, dtype=torch.float32):
    """[*, 3, H, W] -> `dtype` of the same shape, normalised in float32 with `PixelStats`, on the images' device.

    uint8 counts as 0..255; any other dtype is taken to be in 0..1 already.
    """
    mean, std = _mean_std(images.device, 255 if images.dtype == torch.uint8 else 1, stats)
    return ((images.float() - mean) / std).to(dtype)


def check_pixel_stats(stats, mean="--mean", std="--std"):
    """Raise `InputError`, calling the two what is said, unless they are three numbers each that can be."""
    for name, values, lowest in ((mean, stats.mean, 0), (std, stats.std, 1e-4)):
        if not (isinstance(values, (list, tuple)) and len(values) == 3
                and all(type(v) in (int, float) and lowest <= v <= 1 for v in values)):
            raise InputError(f"{name} takes three numbers, of red, green and blue, in {lowest:g}..1")


def stored_pixel_stats(checkpoint, path):
    """`PixelStats` that the network in a checkpoint was trained with: of its arguments or, in a `.safetensors` file, of its
    head; ImageNet's where these say nothing. Raises `InputError` for what are none."""
    stored = stored_args(checkpoint, path)
    stats = PixelStats(*(stored.get(name) for name in PixelStats._fields))
    texts = safetensors_metadata(path)
    if texts.keys() >= set(PixelStats._fields):
        try:
            stats = PixelStats(*([float(v) for v in texts[name].split()] for name in PixelStats._fields))
        except ValueError:
            raise InputError(f"checkpoint {path}: its mean and std are no numbers") from None
    if stats == (None, None):
        return IMAGENET
    check_pixel_stats(stats, *(f"checkpoint {path}: its {name}" for name in PixelStats._fields))
    return PixelStats(*map(tuple, stats))


def denormalize(images, stats=IMAGENET):
    """What `normalize` was given, as uint8."""
    mean, std = _mean_std(images.device, 255, stats)
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- image files

# Others that Pillow knows are left out: for EPS, whatever the file is called, it would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
# An image takes 3 bytes a pixel and more in each worker. Below, 20,000 x 20,000 pixels can be read, which Pillow refuses by
# default, but beyond Pillow's bound for doubt only if the file is not a tiny one, which would unpack to almost nothing.
MAX_PIXELS, DOUBTFUL_PIXELS, DOUBTFUL_RATIO = 2**29, Image.MAX_IMAGE_PIXELS, 100
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `load_rgb` raises instead
MAX_BAD_IN_A_ROW = 100
INDEX_VERSION = 1  # of the listings that are kept


class BadImage(InputError):
    """A file cannot be decoded as an image; the message names it."""


def load_rgb(path):
    """Decode an image file to a PIL RGB image. Raises `BadImage` for whatever keeps it from being decoded.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled by 1/257, alpha is dropped. The EXIF orientation
    is ignored, as in the reference (and in torchvision's `ImageFolder`), whose published numbers assume it. What has more
    than MAX_PIXELS, or more than DOUBTFUL_PIXELS out of a file that is small for that, is refused before it is unpacked.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")  # opening a pipe would wait for ever
        # By the file, not by its name: Pillow would map it, and the process die when the file is cut meanwhile.
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS or pixels > max(DOUBTFUL_PIXELS, DOUBTFUL_RATIO * status.st_size):
                raise ValueError(f"{image.width} x {image.height} pixels in {status.st_size} bytes; up to {MAX_PIXELS} "
                                 f"and {DOUBTFUL_RATIO} for each byte are read; cut it or shrink it")
            if image.mode == "F":
                raise ValueError("float pixels have no known range")
            if image.mode.startswith("I"):  # 16 bits; convert() clips some of these modes at 255
                values = np.array(image, dtype=np.int32).clip(0, 65535)
                return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
            if image.mode == "P":  # by way of RGBA: a palette with transparency warns otherwise
                image = image.convert("RGBA")
            if image.mode == "RGB":
                image.load()
                return image  # convert() would copy it
            return image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"{path}: cannot be read as an image (no {', '.join(IMAGE_FORMATS)} file)") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadImage(f"{path}: cannot be read as an image ({' '.join(reason.split())})") from error


def load_or_replace(dataset, index, rng):
    """`dataset.load(index)` or, as long as that raises `BadImage`, of another index that the numpy generator `rng` draws.

    Bad files are marked in `dataset.bad`, uint8 [n], and not tried again. Raises `BadImage` at once when
    `dataset.on_bad_image` is "error", `InputError` when MAX_BAD_IN_A_ROW files in a row are bad.
    """
    for _ in range(MAX_BAD_IN_A_ROW):
        last = index
        if not dataset.bad[index]:
            try:
                return dataset.load(index)
            except BadImage:
                if dataset.on_bad_image == "error":
                    raise
                dataset.bad[index] = 1
        index = int(rng.integers(len(dataset)))
    raise InputError(f"{MAX_BAD_IN_A_ROW} bad images in a row, the last one {dataset.source(last)}")


# ---------------------------------------------------------------- image folders

def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:
        if entry.name.lower().endswith(IMG_EXTENSIONS):
            return False  # a link to itself: a bad image, not a bad folder
        raise


def check_image_folder(path):
    """Raise `InputError` unless `path` is a folder with one folder per class (looks at the top level only)."""
    try:
        with os.scandir(os.path.expanduser(path)) as scan:
            entries = list(scan)
        folders = any(map(_is_folder, entries))
    except OSError as error:
        raise InputError(f"data folder {path}: {error.strerror}") from error
    if not folders:
        hint = "expected one folder of images per class"
        if any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
            hint = f"move the images into a sub-folder, one folder per class, e.g. {os.path.join(path, 'all', '')}"
        raise InputError(f"data folder {path}: no class folders in it; {hint}")


class FileList(Sequence):
    """(path, label) of every file, as torchvision's list `samples`, in a few arrays: reference counting would copy
    millions of Python objects into every worker."""

    def __init__(self, folders, labels, counts, names, ends):
        self.folders, self.labels = folders, labels  # path and class of each folder
        self.first = np.cumsum(counts) - counts  # a folder's files follow one another
        self.names, self.ends = names, ends  # all file names as one array of bytes, and where each ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        folder = np.searchsorted(self.first, index, side="right") - 1
        name = self.names[self.ends[index - 1] if index else 0:self.ends[index]].tobytes()
        return os.path.join(self.folders[folder], os.fsdecode(name)), int(self.labels[folder])


def _bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _walk(root):
    """List an image folder: dictionary of tensors for `_read_index`, and whether it may be kept.

    Same files in the same order as torchvision's `ImageFolder`, symbolic links followed. A modification time is read
    before its folder is, so that a change in between shows later; a folder changed less than two seconds ago may change
    again within one tick of the file system's clock, unseen. Raises `InputError` for a folder that cannot be read
    (torchvision leaves it out) and for links in a circle.
    """
    now, found, pending = time.time_ns(), [], [""]
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder)
        files = []
        try:
            modified = os.stat(path).st_mtime_ns
            with os.scandir(path) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        pending.append(os.path.join(folder, entry.name))
                    elif folder and entry.name.lower().endswith(IMG_EXTENSIONS):
                        files.append(entry.name)
        except OSError as error:
            raise InputError(f"data folder {path}: {error.strerror}") from error
        found.append((folder.split(os.sep)[0], folder, modified, sorted(files)))
    found.sort()  # class by class
    names = [os.fsencode(name) for *_, files in found for name in files]
    index = {
        "version": INDEX_VERSION,
        "extensions": list(IMG_EXTENSIONS),
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
    return (len(folders) == len(modified) == len(counts) and not any(
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
    check_image_folder(root)
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


class CheckedImageFolder(ImageFolder):
    """torchvision's `ImageFolder` on `load_rgb` and `folder_index`, whose errors are `InputError`s of one line."""

    def __init__(self, root, transform=None, target_transform=None):
        # Not ImageFolder's, which walks the folder and makes a tuple of every file.
        VisionDataset.__init__(self, root, transform=transform, target_transform=target_transform)
        self.root = os.path.expanduser(root)
        index = folder_index(self.root)
        folders = _folders(index)
        self.loader, self.extensions = load_rgb, IMG_EXTENSIONS
        self.classes = sorted(folder for folder in folders if folder and os.sep not in folder)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        labels = np.array([self.class_to_idx.get(folder.split(os.sep)[0], -1) for folder in folders])
        counts = index["counts"].numpy()
        self.samples = self.imgs = FileList([os.path.join(self.root, folder) for folder in folders], labels, counts,
                                            index["names"].numpy(), index["ends"].numpy())
        # A list as in torchvision, but all files of a class share one number, for the reason that `FileList` gives.
        self.targets = np.arange(len(self.classes)).astype(object)[labels.repeat(counts)].tolist()
        empty = sorted(set(self.classes) - {self.classes[label] for label in set(self.targets)})
        if empty:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            raise InputError(f"data folder {root}: no image ({', '.join(IMG_EXTENSIONS)}) in class folder {names}")

    def source(self, index):
        """Path of an image."""
        return self.samples[index][0]

    def load(self, index):
        """(PIL image, label), untransformed. Raises `BadImage`."""
        path, label = self.samples[index]
        return self.loader(path), label


class ImageFolderInstance(CheckedImageFolder):
    """Items are (image, label, index); `transform` gets a PIL RGB image. A bad file raises `BadImage`."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label, index


def folder_stats(dataset, device, count=1000):
    """`PixelStats` of `count` images (or all) of an image folder, evenly spread over it, each counting the same.

    Process 0 looks at them and tells the others. Raises `InputError` when they have but one value, or none can be read.
    """
    def histogram(index):
        try:
            image, _ = dataset.load(index)
        except BadImage:
            return None
        return np.array(image.histogram()).reshape(3, 256) / (image.width * image.height)

    values = torch.full((2, 3), math.nan)
    if is_main_process():
        places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
        with ThreadPoolExecutor(default_workers()) as pool:
            found = [shares for shares in pool.map(histogram, places) if shares is not None]
        if found:
            shares, levels = np.mean(found, axis=0), np.arange(256) / 255  # [3, 256], [256]
            mean = shares @ levels
            std = ((shares * (levels - mean[:, None]) ** 2).sum(axis=1)) ** 0.5
            values = torch.from_numpy(np.stack((mean, std))).float()
    if get_world_size() > 1:
        values = values.to(device)
        torch.distributed.broadcast(values, 0)
    stats = PixelStats(*(tuple(round(v, 4) for v in row) for row in values.tolist()))
    if not all(std > 0 for std in stats.std):
        raise InputError(f"--pixel_stats auto: the images of {dataset.root} have no spread, or none can be read; give "
                         "--mean and --std")
    return stats
