"""What retrieval and copy detection share: images from lists of files, their features, and which are nearest to which.

Letters: B images of a batch, N patch tokens, D width, F feature size, n images of the database, Q queries, W processes.
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import engine
from evaluation.common.features import extract_features, pool_features
from images import IMAGE_FORMATS, BadImage, load_rgb, normalize, open_image

SCALES = (1, 2 ** -0.5, 0.5)
MAX_BLOCK = 2**26  # similarities at a time: 256 MB


# ---------------------------------------------------------------- files

def folder_images(folder, flag):
    """Sorted paths of the image files in a folder. Raises InputError, naming `flag`, if it is none or has none."""
    def stop(error):
        raise engine.InputError(f"{flag} {error.filename or folder}: {error.strerror}") from error

    paths = []
    for place, folders, names in os.walk(os.path.expanduser(folder), onerror=stop):
        paths += [os.path.join(place, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        folders.clear()
    if not paths:
        raise engine.InputError(f"{flag} {folder}: no image in it ({', '.join(IMG_EXTENSIONS)})")
    return sorted(paths)


def check_files(paths, name):
    """Raise InputError unless all `paths` are files."""
    with ThreadPoolExecutor(16) as pool:
        missing = [path for path, found in zip(paths, pool.map(os.path.isfile, paths), strict=True) if not found]
    if missing:
        raise engine.InputError(f"{name}: {len(missing)} of {len(paths)} images are missing, the first one is {missing[0]}")


def load_tolerantly(path):
    """(PIL RGB image, was its file cut short?); what lacks is grey or black. Raises `BadImage` for other damage."""
    try:
        return load_rgb(path), False
    except BadImage:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return load_rgb(path), True
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False


def crop(image, box):
    """The part of a PIL image in `box` (left, upper, right, lower; rounded, within the image); all of it for None."""
    return image if box is None else image.crop(_within(box, image.size))


def _within(box, size):
    left, upper, right, lower = (round(side) for side in box)
    return max(left, 0), max(upper, 0), min(right, size[0]), min(lower, size[1])


def image_size(path, box=None):
    """(width, height) of what `crop` leaves of an image file; only its head is read. Raises InputError."""
    try:
        with open_image(path)[0] as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            size = image.size
    except Exception:  # decoders raise almost anything; this says what is wrong
        size = load_rgb(path).size
    if box is None:
        return size
    left, upper, right, lower = _within(box, size)
    if right <= left or lower <= upper:
        raise engine.InputError(f"{path}: nothing of the image of {size[0]} x {size[1]} pixels lies in the box {list(box)}")
    return right - left, lower - upper


def image_sizes(items):
    """`image_size` of every (path, box or None)."""
    with ThreadPoolExecutor(16) as pool:  # on network drives each look takes a while
        return list(pool.map(lambda item: image_size(*item), items))


# ---------------------------------------------------------------- images

def thumbnail(image, side):
    """PIL image -> PIL image whose longer side is at most `side`; the aspect is kept, nothing is enlarged."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)  # shrinks by whole factors first, which resize() does not
    return image


@lru_cache
def thumbnail_size(size, side):
    """(width, height) that `thumbnail` gives for an image of this size."""
    blank = Image.new("L", size)
    blank.thumbnail((side, side), Image.Resampling.NEAREST, reducing_gap=None)
    return blank.size


def thumbnail_transform(side, normalize=normalize):
    """PIL RGB image -> normalised float32 [3, H, W] of its `thumbnail`."""
    return v2.Compose([partial(thumbnail, side=side), v2.PILToTensor(), normalize])


def square_transform(side, normalize=normalize):
    """PIL RGB image -> normalised float32 [3, side, side]: bicubic, the aspect is lost."""
    return v2.Compose([v2.Resize((side, side), v2.InterpolationMode.BICUBIC), v2.PILToTensor(), normalize])


class ListedImages(Dataset):
    """(transform(PIL RGB image), 0, index) of a list of (path, box or None), see `crop`.

    `bad`, uint8, shared with the workers: which files are cut short, see `load_tolerantly`.
    """

    def __init__(self, items, transform):
        self.items, self.transform = items, transform
        self.bad = torch.zeros(len(items), dtype=torch.uint8).share_memory_()

    def __len__(self):
        return len(self.items)

    def source(self, index):
        """Path of an image."""
        return self.items[index][0]

    def __getitem__(self, index):
        path, box = self.items[index]
        image, self.bad[index] = load_tolerantly(path)
        return self.transform(crop(image, box)), 0, index


class SizeBatches:
    """Batch sampler: this process's batches of images of one size each, large groups first.

    sizes: one hashable per image. Every image is in a batch of one process; at each step all processes have a batch of the
    same length, for which the shorter ones repeat images.
    """

    def __init__(self, sizes, batch_size, process):
        groups = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        batches = []
        for group in groups.values():
            length = min(batch_size, math.ceil(len(group) / process.world_size))
            batches += [group[i:i + length] for i in range(0, len(group), length)]
        batches.sort(key=len, reverse=True)
        self.own = []
        for first in range(0, len(batches), process.world_size):
            step = batches[first:first + process.world_size]
            own = step[min(process.rank, len(step) - 1)]
            self.own.append(own + own[-1:] * (len(step[0]) - len(own)))

    def __len__(self):
        return len(self.own)

    def __iter__(self):
        return iter(self.own)


# ---------------------------------------------------------------- features

def whole_patches(images, patch_size):
    """Images [B, 3, H, W] without the rows and columns at the bottom and right that fill no patch."""
    H, W = (side // patch_size * patch_size for side in images.shape[-2:])
    return images[..., :H, :W]


def retrieval_features(model, images, patch_size, multiscale=False, n_last_blocks=1, avgpool_patchtokens=0):
    """Features [B, F] of length 1 of images [B, 3, H, W]; `multiscale`: of the mean over three scales."""
    features = 0
    for scale in SCALES if multiscale else SCALES[:1]:
        scaled = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        features = features + pool_features(model, whole_patches(scaled, patch_size), n_last_blocks, avgpool_patchtokens)
    return F.normalize(features, dim=1)


def gem(tokens, power=4, floor=1e-6):
    """Generalised mean [B, D] over tokens [B, N, D]: (mean of max(x, floor)^power)^(1/power), in float32 at least."""
    return tokens.float().clamp(min=floor).pow(power).mean(dim=1).pow(1 / power)


def copy_descriptors(model, images, patch_size):
    """[CLS] and `gem` of the patches [B, 2 D] after the final norm, not normalised."""
    tokens = model.get_intermediate_layers(whole_patches(images, patch_size), 1)[0]  # [B, 1 + N, D]
    return torch.cat((tokens[:, 0].float(), gem(tokens[:, 1:])), dim=1)


def check_sizes(items, sizes, least):
    """Raise InputError for the first image with a side below `least` pixels; sizes: its (width, height) in the network."""
    for (path, _), size in zip(items, sizes, strict=True):
        if min(size) < least:
            raise engine.InputError(f"{path}: {size[0]} x {size[1]} pixels are too small, the network needs {least}")


def extract_listed(model_fn, items, transform, sizes, batch_size, num_workers, process, name):
    """Features [n, F] of a list of (path, box or None), float32 on the CPU of rank 0, None elsewhere.

    model_fn: images [B, 3, H, W] on `process.device` to features; sizes: of what `transform` gives, see `SizeBatches`.
    Files that are cut short are named in a line. Raises InputError for others that cannot be read.
    """
    images = ListedImages(items, transform)
    loader = DataLoader(images, batch_sampler=SizeBatches(sizes, batch_size, process), num_workers=num_workers,
                        pin_memory=process.device.type == "cuda")
    features, _ = extract_features(model_fn, loader, process, name)
    note_short_files(images, name, process)
    return features


def note_short_files(images, name, process):
    """Name the files of `ListedImages` that were cut short, for all processes on rank 0; all processes call it."""
    short = engine.gather_bad_images(images, set(), process.device)
    if short and process.rank == 0:
        print(f"note: {len(short)} of the {name} files are cut short and used as far as they go: "
              f"{', '.join(short[:5])}{', ...' if len(short) > 5 else ''}", flush=True)


# ---------------------------------------------------------------- neighbours

def similarity_blocks(queries, database, device, max_block=MAX_BLOCK):
    """(rows, similarities [rows, n] on `device`) of blocks of the queries [Q, F] against the database [n, F]."""
    database = database.to(device)
    for rows in torch.arange(len(queries)).split(max(1, max_block // len(database))):
        yield rows, queries[rows].to(device) @ database.T


def best_places(similarities, k):
    """(values, places) [Q, k] of the k largest in each row [Q, n], largest first; of equals the lower place comes first."""
    values, places = similarities.topk(k, dim=1)
    tied = (similarities >= values[:, -1:]).sum(dim=1) > k  # at the end, where topk takes any
    if tied.any():
        places[tied] = similarities[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(dim=1).values
    values, order = similarities.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def nearest(queries, database, k, device="cpu", same=None, max_block=MAX_BLOCK):
    """(similarities, places) [Q, min(k, n)] on the CPU of each query's nearest in the database, see `best_places`.

    same: None, or integers ([Q], [n]); a pair with the same number is no pair and has the similarity -inf.
    """
    found = []
    for rows, block in similarity_blocks(queries, database, device, max_block):
        if same is not None:
            block.masked_fill_(same[0][rows, None].to(device) == same[1].to(device), -math.inf)
        found.append([part.cpu() for part in best_places(block, min(k, len(database)))])
    values, places = zip(*found, strict=True)
    return torch.cat(values), torch.cat(places)


def near_duplicates(queries, database, threshold, most, same, device="cpu", max_block=MAX_BLOCK):
    """(number of pairs with a similarity from `threshold` on, [(similarity, query, place)] of the `most` first ones).

    same: as in `nearest`. Where both sides have the same images, each pair counts once.
    """
    symmetric = set(same[0].tolist()) == set(same[1].tolist())
    count, pairs = 0, []
    for rows, block in similarity_blocks(queries, database, device, max_block):
        own, other = same[0][rows, None].to(device), same[1].to(device)
        block.masked_fill_(own >= other if symmetric else own == other, -math.inf)
        found = int((block >= threshold).sum())
        count += found
        values, at = (part.cpu() for part in block.flatten().topk(min(most, found)))
        pairs += zip(values.tolist(), rows[at // len(database)].tolist(), (at % len(database)).tolist(), strict=True)
        pairs = sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))[:most]
    return count, pairs


def relative(path, root):
    """A path below the folder `root`, for tables and pages."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else str(path)
