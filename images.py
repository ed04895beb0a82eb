"""Image files, as everything that looks at images reads them: decoded, as data sets, normalised.

Images are uint8 until they are on the device that works with them; `normalize` makes floats of them there.
"""
import io
import math
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
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
    safetensors_metadata,
    say_once,
    stored_args,
)
from listing import list_images, places_of
from shards import Member

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
JPEG_QUALITY = 90  # of images that are packed smaller


class BadImage(InputError):
    """A file cannot be decoded as an image; the message names it."""


def open_image(path):
    """(open file, its size in bytes) of an image file or of a `Member` of a tar."""
    if isinstance(path, Member):
        return io.BytesIO(path.read()), path.size
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")  # opening a pipe would wait for ever
    return open(path, "rb"), status.st_size


def file_state(path):
    """(size in bytes, time of change in ns) of an image file; of a `Member` of a tar its size and the tar's time."""
    found = os.stat(path.tar if isinstance(path, Member) else path)
    return path.size if isinstance(path, Member) else found.st_size, found.st_mtime_ns


def _decode(file, size):
    # By the file, not by its name: Pillow would map it, and the process die when the file is cut meanwhile.
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS or pixels > max(DOUBTFUL_PIXELS, DOUBTFUL_RATIO * size):
            raise ValueError(f"{image.width} x {image.height} pixels in {size} bytes; up to {MAX_PIXELS} "
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


def load_rgb(path):
    """Decode an image file, or a `Member` of a tar, to a PIL RGB image. Raises `BadImage` for whatever keeps it from being
    decoded.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled by 1/257, alpha is dropped. The EXIF orientation
    is ignored, as in the reference (and in torchvision's `ImageFolder`), whose published numbers assume it. What has more
    than MAX_PIXELS, or more than DOUBTFUL_PIXELS out of a file that is small for that, is refused before it is unpacked.
    """
    try:
        file, size = open_image(path)
        with file:
            return _decode(file, size)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"{path}: cannot be read as an image (no {', '.join(IMAGE_FORMATS)} file)") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadImage(f"{path}: cannot be read as an image ({' '.join(reason.split())})") from error


def packed(path, max_side=0):
    """(bytes to put into a shard for an image file, what was done): those of the file, "kept"; where its longer side is
    above `max_side`, if that is not 0, those of a smaller JPEG, "shrunk"; those of a file that is no image, "bad"; none of
    one that cannot be read, "unreadable"."""
    try:
        file, size = open_image(path)
        with file:
            data = file.read()
    except (OSError, ValueError):
        return b"", "unreadable"
    if not max_side:
        return data, "kept"
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if max(image.size) <= max_side:
                return data, "kept"
        image = _decode(io.BytesIO(data), size)
    except Exception:  # decoders raise almost anything; as in a folder, training says what is wrong
        return data, "bad"
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue(), "shrunk"


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


# ---------------------------------------------------------------- data sets

class CheckedImageFolder(ImageFolder):
    """torchvision's `ImageFolder` on `load_rgb` and `listing.list_images`, whose errors are `InputError`s of one line.

    root: what `list_images` takes, also a list, shards or several folders. labelled: whether there must be classes;
    without, `notes` are lines to print.
    """

    def __init__(self, root, transform=None, target_transform=None, labelled=True):
        # Not ImageFolder's, which walks the folder and makes a tuple of every file.
        self.samples, self.classes, self.notes = list_images(root, labelled)
        for note in self.notes if labelled else ():
            say_once(note)
        root = " ".join(os.path.expanduser(place) for place in places_of(root))
        VisionDataset.__init__(self, root, transform=transform, target_transform=target_transform)
        self.imgs, self.loader, self.extensions = self.samples, load_rgb, IMG_EXTENSIONS
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        # A list as in torchvision, but all files of a class share one number, for the reason that `FileList` gives.
        self.targets = np.arange(len(self.classes)).astype(object)[self.samples.labels].tolist()

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
