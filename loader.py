"""Images in: decoding, the masked image folder, multi-crop augmentation and the batches of pre-training.

Workers deliver uint8 crops (a quarter of the bytes of float32); `normalize` runs later, on the training device.
Letters in shape comments: B images of a batch, G global crops, L local crops, S and s their sides in pixels,
h x w the mask grid of a global crop, M masked cells of a batch.
"""
import hashlib
import itertools
import math
import os
import stat
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, default_collate
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine import (
    InputError,
    default_workers,
    get_world_size,
    host_reduce,
    ignore_signals,
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

MAX_BAD_IN_A_ROW = 100


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


# ---------------------------------------------------------------- bad images

BAD_IMAGES = "bad_images.txt"


def bad_images(dataset, before, device):
    """Sorted paths of all images found unreadable, by any process, and `before` a resume. All processes call it.

    dataset: has `bad`, uint8 [n], and `bad_files()`, see `ImageFolderMask`.
    """
    if get_world_size() > 1:
        bad = dataset.bad.to(device, copy=True)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        torch.maximum(dataset.bad, bad.cpu(), out=dataset.bad)  # workers may have found more meanwhile
    return sorted(before | set(dataset.bad_files()))


def write_bad_images(output_dir, names):
    """List bad images in the output folder. A full disk is a warning."""
    try:
        (output_dir / BAD_IMAGES).write_text("\n".join(names) + "\n")
    except OSError as error:
        say_once(f"warning: {output_dir / BAD_IMAGES} cannot be written ({error.strerror})")


def check_images(dataset, before, most, output_dir, device):
    """Raise `InputError`, after naming them in a file, when too many images are bad (`--max_bad_images`)."""
    limit = most * len(dataset) if most < 1 else most
    if host_reduce(int(dataset.bad.sum()), "sum") + len(before) <= limit:  # some may count twice
        return
    bad = bad_images(dataset, before, device)
    if len(bad) > limit:
        if is_main_process():
            write_bad_images(output_dir, bad)
        raise InputError(f"{len(bad)} of {len(dataset)} images cannot be read, more than --max_bad_images {most:g}; "
                         f"{output_dir / BAD_IMAGES} has their names")


# ---------------------------------------------------------------- listing of an image folder

INDEX_VERSION = 1


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
            image = dataset.loader(dataset.samples[index][0])
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


# ---------------------------------------------------------------- masks

def draw_ratio(ratios, variances, rng):
    """Prediction ratio of one crop: one of `ratios`, each as likely, then uniform within its `variances` around it."""
    choice = rng.integers(len(ratios))
    return ratios[choice] + variances[choice] * rng.uniform(-1, 1)


def block_mask(height, width, ratio, rng, aspect=(0.3, 1 / 0.3)):
    """BEiT's block-wise mask (Bao et al., 2022, algorithm 1): bool [height, width], True is masked.

    At most `ratio` of the cells; fewer when ten attempts at a rectangle in a row find no place.
    """
    mask = np.zeros((height, width), dtype=bool)
    left = ratio * height * width  # not rounded
    min_area = (min(height, width) // 3) ** 2
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    attempts = 0
    while left > 0 and attempts < 10:
        attempts += 1
        u = rng.random(4).tolist()
        area = min_area + (left - min_area) * u[0]  # `left` may be the smaller end
        aspect_ratio = math.exp(log_low + (log_high - log_low) * u[1])
        h, w = round(math.sqrt(area * aspect_ratio)), round(math.sqrt(area / aspect_ratio))
        if h >= height or w >= width:
            continue
        top, start = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
        rectangle = mask[top:top + h, start:start + w]
        added = h * w - np.count_nonzero(rectangle)
        if 0 < added <= left:
            rectangle[:] = True
            left -= added
            attempts = 0
    return mask


def random_mask(height, width, ratio, rng):
    """Exactly floor(ratio * cells) cells, uniformly: bool [height, width], True is masked."""
    cells = height * width
    mask = np.zeros(cells, dtype=bool)
    mask[rng.permutation(cells)[:int(ratio * cells)]] = True
    return mask.reshape(height, width)


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_ratios(ratios, variances):
    """The variance of each prediction ratio. Raises `InputError`, naming the flags, for values that cannot be."""
    if len(variances) not in (1, len(ratios)):
        raise InputError(f"--pred_ratio has {len(ratios)} values and --pred_ratio_var {len(variances)}: give one variance "
                         "or one per ratio")
    variances = list(variances) * len(ratios) if len(variances) == 1 else list(variances)
    for ratio, variance in zip(ratios, variances, strict=True):
        if not (0 <= variance and 0 <= ratio <= 1):
            raise InputError(f"--pred_ratio {ratio} --pred_ratio_var {variance}: ratios lie in 0..1")
        if ratio < variance:
            raise InputError(f"--pred_ratio {ratio} is below its --pred_ratio_var {variance}")
    return variances


class ImageFolderMask(CheckedImageFolder):
    """Items are (crops, label, masks): the transform's list of tensors, and a bool grid for each global crop.

    Args:
        transform: PIL RGB image -> list of [3, S, S] tensors, global crops first. The first
            `transform.global_crops_number` crops get masks, all of them when it has no such attribute. With
            `transform.photometry == "device"` it gives (crops, rows), and items are (crops, label, masks, rows).
        patch_size: pixels per side of a mask cell (the patch size of a ViT, 32 for Swin).
        pred_ratio, pred_ratio_var: a number or a list each, see `draw_ratio`; one variance may serve all ratios.
        pred_aspect_ratio: range of the rectangles of block masks.
        pred_shape: "block" or "rand".
        pred_start_epoch: masks are empty before this epoch.
        seed: a sample's augmentation and masks are a pure function of (seed, epoch, index), whatever the number of
            workers and processes. The generators of the calling process stay as they are; `transform` must draw from
            torch's CPU generator only (torchvision's transforms do).
        on_bad_image: "error" raises `BadImage`; "skip" marks the file in `bad` and takes a random other one instead.

    Raises `InputError` on a folder or values that cannot be used, and when MAX_BAD_IN_A_ROW files in a row are bad.
    """

    def __init__(self, root, transform, patch_size, pred_ratio, pred_ratio_var=0, pred_aspect_ratio=(0.3, 1 / 0.3),
                 pred_shape="block", pred_start_epoch=0, seed=0, on_bad_image="skip"):
        ratios = _as_list(pred_ratio)
        variances = check_ratios(ratios, _as_list(pred_ratio_var))
        if pred_shape not in ("block", "rand"):
            raise InputError(f"pred_shape {pred_shape!r}: must be block or rand")
        if on_bad_image not in ("error", "skip"):
            raise InputError(f"on_bad_image {on_bad_image!r}: must be error or skip")
        if seed < 0:
            raise InputError(f"seed {seed}: must not be negative")
        super().__init__(root, transform)
        self.patch_size = patch_size
        self.pred_ratio, self.pred_ratio_var = ratios, variances
        self.pred_aspect_ratio = pred_aspect_ratio
        self.pred_shape = pred_shape
        self.pred_start_epoch = pred_start_epoch
        self.seed = seed
        self.on_bad_image = on_bad_image
        # Shared with the workers, both ways: they see a new epoch, the main process sees the files they could not read.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad = torch.zeros(len(self.samples), dtype=torch.uint8).share_memory_()

    def set_epoch(self, epoch):
        """Call before iterating over the loader; reaches persistent workers too."""
        self.epoch.fill_(epoch)

    def bad_files(self):
        """Paths of the files found bad so far."""
        return [self.samples[index][0] for index in self.bad.nonzero().flatten().tolist()]

    def __getitem__(self, index):
        index = range(len(self))[index]  # seeds are not negative
        rng = np.random.default_rng((self.seed, int(self.epoch), index))
        torch_seed = int(rng.integers(2**63))
        image, label = self._load(index, rng)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would seed the GPUs too
            crops = self.transform(image)
        rest = ()
        if getattr(self.transform, "photometry", None) == "device":
            crops, *rest = crops
        masked = getattr(self.transform, "global_crops_number", len(crops))
        return crops, label, [self._draw_mask(crop, rng) for crop in crops[:masked]], *rest

    def _load(self, index, rng):
        for _ in range(MAX_BAD_IN_A_ROW):
            path, label = self.samples[index]
            if not self.bad[index]:
                try:
                    return self.loader(path), label
                except BadImage:
                    if self.on_bad_image == "error":
                        raise
                    self.bad[index] = 1
            index = int(rng.integers(len(self)))
        raise InputError(f"data folder {self.root}: {MAX_BAD_IN_A_ROW} bad images in a row, the last one {path}")

    def _draw_mask(self, crop, rng):
        height, width = (side // self.patch_size for side in crop.shape[-2:])
        if self.epoch < self.pred_start_epoch:
            return np.zeros((height, width), dtype=bool)
        ratio = draw_ratio(self.pred_ratio, self.pred_ratio_var, rng)
        if self.pred_shape == "rand":
            return random_mask(height, width, ratio, rng)
        return block_mask(height, width, ratio, rng, self.pred_aspect_ratio)


# ---------------------------------------------------------------- augmentation

class Augment(NamedTuple):
    """What is done to crops: probabilities; of three, for the first global crop, other global crops and local crops.

    rotate90: of a turn by 0, 90, 180 or 270 degrees, each as likely. color_jitter: a probability, then the largest changes
    of brightness, contrast, saturation (factors of 1 minus to 1 plus that) and hue (in turns). These are the reference's.
    """
    hflip: float = 0.5
    vflip: float = 0.0
    rotate90: float = 0.0
    color_jitter: Sequence[float] = (0.8, 0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: Sequence[float] = (1.0, 0.1, 0.5)
    solarize: Sequence[float] = (0.0, 0.2, 0.0)


NEVER = (0.0, 0.0, 0.0)
AUGMENT_PRESETS = {
    "photos": Augment(),
    "grey": Augment(color_jitter=(0.8, 0.4, 0.4, 0.0, 0.0), grayscale=0.0, solarize=NEVER),
    "overhead": Augment(vflip=0.5, rotate90=1.0, color_jitter=(0.8, 0.4, 0.4, 0.2, 0.05), grayscale=0.1, solarize=NEVER),
    "none": Augment(hflip=0.0, color_jitter=(0.0,) * 5, grayscale=0.0, blur=NEVER, solarize=NEVER),
}


def check_augment(augment):
    """Raise `InputError`, naming the flag, for numbers of an `Augment` that are too few or none that can be."""
    for name, value, like in zip(Augment._fields, augment, Augment(), strict=True):
        values, count = (value, len(like)) if isinstance(like, tuple) else ((value,), 1)
        if len(values) != count:
            what = "P B C S H" if name == "color_jitter" else "for the first global, other global and local crops"
            raise InputError(f"--{name} takes {count} numbers ({what}), not {len(values)}")
        if not all(0 <= v <= 1 for v in values):
            raise InputError(f"--{name} must lie in 0..1: {' '.join(map(str, values))}")
    if augment.color_jitter[4] > 0.5:
        raise InputError(f"--color_jitter: its last number, the hue, must lie in 0..0.5: {augment.color_jitter[4]}")


# A crop's photometry is one float32 row: the four jitter operations in the order in which they are applied, their factors
# in that order, whether to grey and to solarise, and the taps 0..2 of the blur's box (1, 0, 0 for none).
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ROW = (4, 4, 1, 1, 3)
BOX_DRAWS, ROW_DRAWS, TURN_DRAWS = 2 + 2 * 10, 13, 3  # uniform numbers that a crop takes


def blur_taps(sigma):
    """Taps 0..2 of the symmetric filter that Pillow's GaussianBlur applies three times (Gwosdek et al., 2011).

    It has variance sigma**2 / 3 exactly: a box of ones, here one or three, between two fractional ends. (A sampled
    Gaussian of small sigma hardly blurs.) `sigma` [n] in pixels, 0 to 2 -> float64 [n, 3], rows 1, 0, 0 where it is 0.
    """
    variance = sigma[:, None] ** 2 / 3
    return np.where(variance < 2 / 3, (1, 0, 0) + variance * (-1, 0.5, 0),
                    (0.4, 0.4, -0.1) + variance * (-0.1, -0.1, 0.15))


def draw_box(uniform, width, height, scale):
    """Box of a random resized crop, distributed as in torchvision's `RandomResizedCrop.get_params`.

    Args:
        uniform: list of BOX_DRAWS floats in [0, 1).
        width, height: of the image in pixels.
        scale: range of the box's area relative to the image's; its aspect is log-uniform in 3/4..4/3.

    Returns (left, top, width, height). Of ten attempts the first that fits inside the image counts; when none does, the
    largest centred box of an aspect in 3/4..4/3.
    """
    low, high = scale
    for area, aspect in zip(uniform[2::2], uniform[3::2], strict=True):
        side = math.sqrt((low + (high - low) * area) * width * height)
        stretch = (4 / 3) ** (aspect - 0.5)  # square root of the aspect
        w, h = round(side * stretch), round(side / stretch)
        if 0 < w <= width and 0 < h <= height:
            return int(uniform[0] * (width - w + 1)), int(uniform[1] * (height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_photometry(uniform, blur_p, solarize_p, augment=AUGMENT_PRESETS["photos"]):
    """Photometry of n crops: uniform [n, ROW_DRAWS] in [0, 1), probabilities [n] -> float32 rows [n, 13]."""
    jitter_p, *strengths = augment.color_jitter
    jitter = (2 * uniform[:, 1:5] - 1) * (uniform[:, :1] < jitter_p)
    factors = jitter * strengths + (1, 1, 1, 0)
    order = uniform[:, 5:9].argsort(axis=1)
    rows = np.empty((len(uniform), sum(ROW)), np.float32)
    rows[:, :4] = order
    rows[:, 4:8] = np.take_along_axis(factors, order, axis=1)
    rows[:, 8] = uniform[:, 9] < augment.grayscale
    rows[:, 9] = uniform[:, 10] < solarize_p
    rows[:, 10:] = blur_taps((0.1 + 1.9 * uniform[:, 12]) * (uniform[:, 11] < blur_p))
    return rows


def _luma(images):
    """[..., 3, H, W] -> [..., 1, H, W] with the weights of ITU-R 601."""
    r, g, b = images.unbind(-3)
    return (r * 0.299).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(-3)


def adjust_hue(images, factor):
    """Turn the hue of float images [..., 3, H, W] by `factor` [..., 1, 1] of the circle; as torchvision's to 1e-6.

    Value and saturation stay, so with hi, lo the largest and smallest channel of a pixel each channel is
    lo + (hi - lo) * t(hue), t a trapezoid wave with red, green and blue a third of the circle apart. Several times faster
    on CPU than by way of HSV, where it would be the most expensive operation of all.
    """
    r, g, b = images.unbind(-3)
    hi = torch.maximum(torch.maximum(r, g), b)
    lo = torch.minimum(torch.minimum(r, g), b)
    chroma = hi - lo
    # Distance from red along the hexagon, 0..3 sixths, is 1 - t(red) + t(green) + t(blue); no branch for each sextant.
    hue = (chroma - r).add_(g).add_(b).sub_(lo).div_((6 * chroma).clamp_(min=1e-6))
    hue = torch.copysign(hue, g - b).add_(factor)
    # frac keeps the sign, so the channels' phases 0, 2/3, 1/3 start some turns on. (arange: no copy from the host.)
    phase = hue.unsqueeze(-3) + (2 - torch.arange(3, device=images.device) / 3).view(3, 1, 1)
    wave = phase.frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return wave.mul_(chroma.unsqueeze(-3)).add_(lo.unsqueeze(-3))


def gaussian_blur(levels, taps):
    """Blur grey levels 0..255, float [..., 3, H, W] of whole numbers, with `taps` [..., R + 1] of `blur_taps`.

    As Pillow does: along each axis three times, the border extended anew and the levels rounded each time.
    """
    levels = levels.clone()
    _, *taps = taps[..., None, None, None].movedim(-4, 0)  # each [..., 1, 1, 1]
    for dim in (-1, -2):
        size = levels.shape[dim]
        for _ in range(3):
            # The taps sum to 1, so the levels flow between neighbours; beyond the border there is no difference.
            flows = [levels.narrow(dim, shift, size - shift) - levels.narrow(dim, 0, size - shift)
                     for shift in range(1, min(len(taps) + 1, size))]
            for shift, (flow, tap) in enumerate(zip(flows, taps), 1):  # noqa: B905 - an image may be of one pixel
                levels.narrow(dim, 0, size - shift).addcmul_(flow, tap)
                levels.narrow(dim, shift, size - shift).addcmul_(flow, tap, value=-1)
            if len(taps) > 1 and size > 1:  # two beyond the last but one is the last
                levels.narrow(dim, 1, 1).addcmul_(flows[0].narrow(dim, 0, 1), taps[1], value=-1)
                levels.narrow(dim, size - 2, 1).addcmul_(flows[0].narrow(dim, size - 2, 1), taps[1])
            levels.round_()
    return levels


def _to_uint8(levels):
    return levels.to(torch.int16).to(torch.uint8)  # straight to uint8 takes twice as long on CPU


def _solarize(images):
    return torch.minimum(images, ~images)  # inverts all values >= 128


def photometry_of_crop(crop, row):
    """`apply_photometry` for one crop on CPU, fast because it skips what its row leaves out.

    uint8 [3, S, S] in and out; float32 in between, which is faster than 8 bits or Pillow and rounds only once.
    """
    x = crop.contiguous() / 255
    values = row.tolist()
    for operation, factor in zip(values[:4], values[4:8], strict=True):
        if operation == HUE:
            x = adjust_hue(x, factor) if factor else x
        elif factor != 1:  # a blend with black, the mean luma or the luma
            luma = _luma(x) if operation != BRIGHTNESS else x.new_zeros(())
            x = x.mul_(factor).add_(luma.mean() if operation == CONTRAST else luma, alpha=1 - factor).clamp_(0, 1)
    if values[8]:
        x = _luma(x)
    x = (x * 255).round_()
    radius = sum(tap > 1e-6 for tap in values[10:]) - 1
    if radius:
        x = gaussian_blur(x, row[10:11 + radius])
    x = _to_uint8(x)
    return (_solarize(x) if values[9] else x).expand(3, -1, -1).contiguous()


def apply_photometry(crops, rows):
    """Colours of a batch of crops, each by its own row and in its own order, on the crops' device.

    uint8 [n, 3, S, S], float32 [n, 13] (see `draw_photometry`) -> uint8 [n, 3, S, S], contiguous; equal to
    `photometry_of_crop` within one level. The host is never waited for, and no shape depends on the rows: may be compiled.
    """
    order, factors, grey, solarize, taps = rows.split(ROW, dim=1)
    is_hue = order == HUE
    before = is_hue.cumsum(dim=1) == 0

    def blends(x, wanted, steps):
        scale = torch.where(wanted, factors, 1.0)
        to_mean, to_luma = (1 - scale) * (order == CONTRAST), (1 - scale) * (order == SATURATION)
        for k in steps:
            f, m, g = (v[:, k, None, None, None] for v in (scale, to_mean, to_luma))
            luma = _luma(x)
            anchor = torch.addcmul(luma.mean(dim=(2, 3), keepdim=True) * m, luma, g)
            x = torch.addcmul(anchor, x, f).clamp_(0, 1)
        return x

    # Hue is the dearest and stands anywhere among the four: so three blends, hue, and three blends again, of which each
    # crop takes those before and those after its own hue and gives the others factor 1.
    x = blends(crops.contiguous() / 255, before, (0, 1, 2))
    x = adjust_hue(x, (factors * is_hue).sum(dim=1)[:, None, None])
    x = blends(x, ~(before | is_hue), (1, 2, 3))
    x = torch.where(grey[..., None, None] > 0, _luma(x), x)
    x = _to_uint8(gaussian_blur((x * 255).round_(), taps))
    return torch.where(solarize[..., None, None] > 0, _solarize(x), x)


class MultiCropAugmentation:
    """PIL RGB image -> list of uint8 [3, S, S] crops: the first global crop, the other global ones, the local ones.

    Scales are area ranges relative to the image, sizes are pixels; `augment` is an `Augment`, by default the reference's.
    All draws come from torch's CPU generator. With photometry="device" the crops are only cut and turned, and a call gives
    (crops, rows): float32 [G + L, 13] for `apply_photometry` to finish the crops on the training device.
    """

    def __init__(self, global_crops_number=2, global_crops_scale=(0.14, 1.0), local_crops_number=0,
                 local_crops_scale=(0.05, 0.4), global_crops_size=224, local_crops_size=96, photometry="cpu",
                 augment=AUGMENT_PRESETS["photos"]):
        check_augment(augment)
        if photometry not in ("cpu", "device"):
            raise InputError(f"photometry {photometry!r}: must be cpu or device")
        self.photometry, self.augment = photometry, augment
        self.global_crops_number = global_crops_number
        counts = (1, global_crops_number - 1, local_crops_number)
        self.sizes = [global_crops_size] * global_crops_number + [local_crops_size] * local_crops_number
        self.scales = [global_crops_scale] * global_crops_number + [local_crops_scale] * local_crops_number
        self.blur_p, self.solarize_p = (np.repeat(p, counts) for p in (augment.blur, augment.solarize))

    def __call__(self, image):
        boxes, turns, rows = self.draw(*image.size)
        crops = self.cut(np.asarray(image), boxes, turns)
        if self.photometry == "device":
            return crops, rows
        return [photometry_of_crop(crop, row) for crop, row in zip(crops, rows, strict=True)]

    def draw(self, width, height):
        """Everything random about the crops of an image: boxes, turns (see `cut`), float32 rows [G + L, 13]."""
        # One call for all: drawing number by number took as long as the masks of a sample.
        uniform = torch.rand(len(self.sizes), ROW_DRAWS + 1 + BOX_DRAWS).numpy()
        rows = draw_photometry(uniform[:, :ROW_DRAWS], self.blur_p, self.solarize_p, self.augment)
        turns = [(flip, False, 0) for flip in (uniform[:, ROW_DRAWS] < self.augment.hflip).tolist()]
        if self.augment.vflip or self.augment.rotate90:
            down, turned, quarters = torch.rand(TURN_DRAWS, len(self.sizes)).tolist()
            turns = [(flip, d < self.augment.vflip, int(4 * q) if t < self.augment.rotate90 else 0)
                     for (flip, _, _), d, t, q in zip(turns, down, turned, quarters, strict=True)]
        boxes = [draw_box(u, width, height, scale)
                 for u, scale in zip(uniform[:, ROW_DRAWS + 1:].tolist(), self.scales, strict=True)]
        return boxes, turns, torch.from_numpy(rows)

    def cut(self, pixels, boxes, turns):
        """Boxes of uint8 pixels [H, W, 3], each resized (bicubic) to its size, then turned -> list of uint8 [3, S, S],
        interleaved. A turn is (flip left to right, flip top to bottom, number of quarter turns after that)."""
        crops = []
        for (left, top, width, height), size, (flip, down, quarters) in zip(boxes, self.sizes, turns, strict=True):
            # A copy without gaps: what resizing is fastest on. It leaves pixels interleaved, and so do flips.
            box = torch.from_numpy(pixels[top:top + height, left:left + width].copy())[None].permute(0, 3, 1, 2)
            crop = torch.nn.functional.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]
            if flip or down:
                crop = crop.flip([2] * flip + [1] * down)
            crops.append(crop.permute(1, 2, 0).rot90(quarters).contiguous().permute(2, 0, 1) if quarters else crop)
        return crops


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """One batch of pre-training, made by `collate` in the worker.

    `mask_index` lists the masked cells of the flattened `masks`: nonzero() on a GPU would stall it. `mask_weight` is
    what each adds to the patch loss: 1 / (masked cells of its crop * G * B), the means over cells, images and crops.
    Padding has index 0 and weight 0.
    """
    global_crops: torch.Tensor  # uint8 [G, B, 3, S, S]; after `finish_batch` float32
    local_crops: torch.Tensor | None  # uint8 [L, B, 3, s, s]; after `finish_batch` float32
    labels: torch.Tensor  # int64 [B]
    masks: torch.Tensor  # bool [G, B, h, w]
    mask_index: torch.Tensor  # int64 [M], into G * B * h * w
    mask_weight: torch.Tensor  # float32 [M]
    photometry: torch.Tensor | None = None  # float32 [G + L, B, 13], what is left for the device to do


class ResumableSampler(DistributedSampler):
    """`DistributedSampler` that can start in the middle of an epoch; its length stays that of a whole one."""

    start = 0

    def set_epoch(self, epoch, start=0):
        """Epoch, and how many of this process's samples of it were used already."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.start, None)


def collate(samples, pad_masks=1):
    """List of B items of `ImageFolderMask` -> `Batch`.

    M is padded to a multiple of `pad_masks`, to one at least when that is above 1, so that compiled code meets few sizes.
    """
    crops, labels, masks, *photometry = zip(*samples, strict=True)
    masks = torch.from_numpy(np.stack(masks, axis=1))  # [G, B, h, w]
    positions = list(zip(*crops, strict=True))  # G + L tuples of B crops
    counts = masks.sum(dim=(2, 3)).flatten()  # [G * B]
    index = masks.flatten().nonzero().flatten()
    weights = 1 / (counts.clamp(min=1) * len(counts))
    padding = (0, max(math.ceil(len(index) / pad_masks), pad_masks > 1) * pad_masks - len(index))
    return Batch(
        _stack(positions[:len(masks)]),
        _stack(positions[len(masks):]) if len(positions) > len(masks) else None,
        torch.tensor(labels),
        masks,
        torch.nn.functional.pad(index, padding),
        torch.nn.functional.pad(weights.repeat_interleave(counts), padding),
        torch.stack(photometry[0], dim=1) if photometry else None,
    )


def _stack(positions):
    """P tuples of B crops [3, S, S] -> [P, B, 3, S, S] of the crops' layout in memory, copied once (shared in a worker)."""
    crops = [crop for position in positions for crop in position]
    if crops[0].is_contiguous():
        stacked = default_collate(crops)
    else:
        stacked = default_collate([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)
    return stacked.unflatten(0, (len(positions), -1))


def data_loader(dataset, batch_size, process, workers, pad_masks, seed):
    """DataLoader of `Batch`es of `batch_size` images of an `ImageFolderMask`, this process's share of each epoch.

    workers: processes that load, None: as many as there are cores for. pad_masks: see `collate`.
    """
    workers = default_workers() if workers is None else workers
    return DataLoader(
        dataset, batch_size, num_workers=workers, drop_last=True,
        sampler=ResumableSampler(dataset, process.world_size, process.rank, shuffle=True, seed=seed),
        collate_fn=partial(collate, pad_masks=pad_masks), pin_memory=process.device.type == "cuda",
        persistent_workers=workers > 0, worker_init_fn=ignore_signals,
        generator=torch.Generator())  # its own, or starting workers in mid-epoch would draw from the run's


def finish_batch(batch, photometry=apply_photometry, stats=IMAGENET, dtype=torch.float32):
    """`Batch` of uint8 crops, on the training device -> the same with normalised crops, ready for the networks.

    What `batch.photometry` asks for is done first, one crop position at a time: temporaries are of B crops, not of
    (G + L) B. `photometry` may be a compiled `apply_photometry`.
    """
    crops = [batch.global_crops, batch.local_crops]
    if batch.photometry is not None:
        rows = batch.photometry.split([0 if x is None else len(x) for x in crops])
        crops = [None if x is None else torch.stack([photometry(*pair) for pair in zip(x, r, strict=True)])
                 for x, r in zip(crops, rows, strict=True)]
    global_crops, local_crops = (None if x is None else normalize(x, stats, dtype) for x in crops)
    return batch._replace(global_crops=global_crops, local_crops=local_crops, photometry=None)


def device_batches(data_loader, device, photometry=apply_photometry, stats=IMAGENET, dtype=torch.float32):
    """Batches of a DataLoader, moved to `device` and finished there (`finish_batch`).

    On CUDA a batch is copied on a side stream while the device still computes on the one before (with `pin_memory=True`;
    without, the copy waits). None is waited for before the caller has given the device its work on the one before.
    dtype: that of mixed precision, which else would keep a copy of the crops beside them.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in data_loader:
        with torch.cuda.stream(side) if side else nullcontext():
            batch = Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))
        if side:
            main = torch.cuda.current_stream(device)
            main.wait_stream(side)
            for x in batch:
                if x is not None:
                    x.record_stream(main)  # its memory may not go to a later copy before `main` has read it
        yield finish_batch(batch, photometry, stats, dtype)
