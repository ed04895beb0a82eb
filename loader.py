"""Images in: decoding, the masked image folder, multi-crop augmentation and the batches of pre-training.

Workers deliver uint8 crops (a quarter of the bytes of float32); `normalize` runs later, on the training device.
Letters in shape comments: B images of a batch, G global crops, L local crops, S and s their sides in pixels,
h x w the mask grid of a global crop, M masked cells of a batch.
"""
import math
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from utils import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_BAD_IN_A_ROW = 100


@lru_cache
def _mean_std(device, scale):
    # Cached: a copy of host constants would make the GPU wait at every batch. No inference tensors in the cache.
    with torch.inference_mode(False):
        return [scale * torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]


def normalize(images):
    """[*, 3, H, W] -> float32 of the same shape, normalised with ImageNet's statistics, on the images' device.

    uint8 counts as 0..255; any other dtype is taken to be in 0..1 already.
    """
    mean, std = _mean_std(images.device, 255 if images.dtype == torch.uint8 else 1)
    return (images.float() - mean) / std


# ---------------------------------------------------------------- image files

class BadImage(InputError):
    """A file cannot be decoded as an image; the message names it."""


def load_rgb(path):
    """Decode an image file to a PIL RGB image. Raises `BadImage` for whatever keeps it from being decoded.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled by 1/257, alpha is dropped. The EXIF orientation
    is ignored, as in the reference (and in torchvision's `ImageFolder`), whose published numbers assume it.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("float pixels have no known range")
            if image.mode.startswith("I"):  # 16 bits; convert() clips some of these modes at 255
                values = np.asarray(image).astype(np.int64).clip(0, 65535)
                return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
            if image.mode == "P":  # by way of RGBA: a palette with transparency warns otherwise
                image = image.convert("RGBA")
            return image.convert("RGB")
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadImage(f"{path}: cannot be read as an image ({' '.join(reason.split())})") from error


def check_image_folder(path):
    """Raise `InputError` unless `path` is a folder with one folder per class (looks at the top level only)."""
    try:
        with os.scandir(os.path.expanduser(path)) as scan:
            entries = list(scan)
    except OSError as error:
        raise InputError(f"data folder {path}: {error.strerror}") from error
    if not any(entry.is_dir() for entry in entries):
        hint = "expected one folder of images per class"
        if any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
            hint = f"move the images into a sub-folder, one folder per class, e.g. {os.path.join(path, 'all', '')}"
        raise InputError(f"data folder {path}: no class folders in it; {hint}")


class CheckedImageFolder(ImageFolder):
    """torchvision's `ImageFolder` on `load_rgb`, whose errors are `InputError`s of one line."""

    def __init__(self, root, transform=None, target_transform=None):
        check_image_folder(root)
        super().__init__(root, transform, target_transform, loader=load_rgb, allow_empty=True)
        empty = sorted(set(self.classes) - {self.classes[label] for label in set(self.targets)})
        if empty:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            raise InputError(f"data folder {root}: no image ({', '.join(IMG_EXTENSIONS)}) in class folder {names}")


class ImageFolderInstance(CheckedImageFolder):
    """Items are (image, label, index); `transform` gets a PIL RGB image. A bad file raises `BadImage`."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label, index


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
    log_aspect = np.log(aspect)
    attempts = 0
    while left > 0 and attempts < 10:
        attempts += 1
        area = min_area + (left - min_area) * rng.random()  # `left` may be the smaller end
        aspect_ratio = math.exp(rng.uniform(*log_aspect))
        h, w = round(math.sqrt(area * aspect_ratio)), round(math.sqrt(area / aspect_ratio))
        if h >= height or w >= width:
            continue
        top, start = rng.integers(height - h + 1), rng.integers(width - w + 1)
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


class ImageFolderMask(CheckedImageFolder):
    """Items are (crops, label, masks): the transform's list of tensors, and a bool grid for each global crop.

    Args:
        transform: PIL RGB image -> list of [3, S, S] tensors, global crops first. The first
            `transform.global_crops_number` crops get masks, all of them when it has no such attribute.
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
        ratios, variances = _as_list(pred_ratio), _as_list(pred_ratio_var)
        if len(variances) == 1:
            variances = variances * len(ratios)
        if len(ratios) != len(variances):
            counts = f"pred_ratio {len(ratios)}, pred_ratio_var {len(variances)}"
            raise InputError(f"number of values differs: {counts} (one variance may serve all)")
        for ratio, variance in zip(ratios, variances, strict=True):
            if not 0 <= variance <= ratio <= 1:
                raise InputError(f"pred_ratio {ratio} with pred_ratio_var {variance}: need 0 <= variance <= ratio <= 1")
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
        masked = getattr(self.transform, "global_crops_number", len(crops))
        return crops, label, [self._draw_mask(crop, rng) for crop in crops[:masked]]

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

def adjust_hue(image, factor):
    """Turn the hue of a float [3, H, W] image by `factor` of the circle; the same as torchvision's to 1e-6.

    Value and saturation stay, so with hi, lo the largest and smallest channel of a pixel each channel is
    lo + (hi - lo) * t(hue), t a trapezoid wave with red, green and blue a third of the circle apart. Four times faster
    on CPU than by way of HSV, where it would be the most expensive operation of all.
    """
    r, g, b = image
    hi = torch.maximum(torch.maximum(r, g), b)
    lo = torch.minimum(torch.minimum(r, g), b)
    chroma = hi - lo
    sextant = torch.where(hi == r, g - b, torch.where(hi == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = sextant.mul_((6 * chroma).clamp_(min=1e-6).reciprocal_()).add_(factor)
    # frac keeps the sign, so the channels' phases 0, 2/3, 1/3 start one turn on.
    phase = hue + torch.tensor([1, 5 / 3, 4 / 3], device=image.device).view(3, 1, 1)
    return phase.frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1).mul_(chroma).add_(lo)


def _blur_taps(sigma):
    """Taps 0..r of the symmetric filter by which Pillow blurs: three extended box filters (Gwosdek et al., 2011).

    Each has variance sigma**2 / 3 exactly: a box of `width` ones between two fractional ends. (A sampled Gaussian of
    small sigma hardly blurs.)
    """
    variance = sigma**2 / 3
    half = int((math.sqrt(12 * variance + 1) - 1) / 2)
    width = 2 * half + 1
    end = width * (variance - half * (half + 1) / 3) / (2 * ((half + 1) ** 2 - variance))
    box = np.array([end] + [1] * width + [end]) / (width + 2 * end)
    taps = np.convolve(np.convolve(box, box), box)
    return taps[len(taps) // 2:].tolist()


def gaussian_blur(image, sigma):
    """Blur a float [3, H, W] image with standard deviation `sigma` pixels as Pillow's GaussianBlur(sigma) does.

    A sum of shifted images along each axis: on CPU faster than Pillow or a depthwise convolution. Only in the outermost
    pixels (radius at most 6) do the two differ by more than rounding: Pillow extends the border anew before each box.
    """
    taps = _blur_taps(sigma)
    radius = len(taps) - 1
    for dim, padding in ((2, (radius, radius, 0, 0)), (1, (0, 0, radius, radius))):
        size = image.shape[dim]
        padded = torch.nn.functional.pad(image, padding, mode="replicate")
        image = image * taps[0]
        for shift in range(1, radius + 1):
            image.add_(padded.narrow(dim, radius - shift, size), alpha=taps[shift])
            image.add_(padded.narrow(dim, radius + shift, size), alpha=taps[shift])
    return image


def chance(probability):
    return torch.rand(()).item() < probability


def random_crop(image, size, scale):
    """Geometry of a crop: resized crop (bicubic, aspect 3/4..4/3) and flip; uint8 [3, H, W] -> [3, size, size]."""
    box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
    crop = F.resized_crop(image, *box, (size, size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.horizontal_flip(crop) if chance(0.5) else crop


def random_photometry(crop, blur_p, solarize_p):
    """Colours of a crop: jitter, grey, blur and solarise in this order, with the reference's probabilities and ranges.

    uint8 [3, S, S] in and out; float32 in between, which is faster than 8 bits or Pillow and rounds only once.
    """
    x = crop / 255
    if chance(0.8):
        order, brightness, contrast, saturation, hue = ColorJitter.get_params(
            (0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
        for operation in order.tolist():
            if operation == 0:
                x = F.adjust_brightness(x, brightness)
            elif operation == 1:
                x = F.adjust_contrast(x, contrast)
            elif operation == 2:
                x = F.adjust_saturation(x, saturation)
            else:
                x = adjust_hue(x, hue)
    if chance(0.2):
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if chance(blur_p):
        x = gaussian_blur(x, sigma=torch.empty(()).uniform_(0.1, 2).item())
    crop = (x * 255).add_(0.5).to(torch.uint8)
    if chance(solarize_p):
        crop = torch.minimum(crop, ~crop)  # inverts all values >= 128
    return crop


class MultiCropAugmentation:
    """PIL RGB image -> list of uint8 [3, S, S] crops: the first global crop, the other global ones, the local ones.

    The distribution is the reference's. Scales are area ranges relative to the image, sizes are pixels. All draws
    come from torch's CPU generator.
    """

    def __init__(self, global_crops_number=2, global_crops_scale=(0.14, 1.0), local_crops_number=0,
                 local_crops_scale=(0.05, 0.4), global_crops_size=224, local_crops_size=96):
        self.global_crops_number = global_crops_number
        first, others, local = (1.0, 0.0), (0.1, 0.2), (0.5, 0.0)  # probabilities of blur and of solarise
        self.crops = [(global_crops_size, tuple(global_crops_scale), *p)
                      for p in [first] + [others] * (global_crops_number - 1)]
        self.crops += [(local_crops_size, tuple(local_crops_scale), *local)] * local_crops_number

    def __call__(self, image):
        image = F.pil_to_tensor(image)  # stays interleaved in memory, for which resizing is fastest
        return [random_photometry(random_crop(image, size, scale), blur_p, solarize_p)
                for size, scale, blur_p, solarize_p in self.crops]


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """One batch of pre-training, made by `collate` in the worker.

    `mask_index` lists the masked cells of the flattened `masks`: nonzero() on a GPU would stall it. `mask_weight` is
    what each adds to the patch loss: 1 / (masked cells of its crop * G * B), the means over cells, images and crops.
    """
    global_crops: torch.Tensor  # uint8 [G, B, 3, S, S]
    local_crops: torch.Tensor | None  # uint8 [L, B, 3, s, s]
    labels: torch.Tensor  # int64 [B]
    masks: torch.Tensor  # bool [G, B, h, w]
    mask_index: torch.Tensor  # int64 [M], into G * B * h * w
    mask_weight: torch.Tensor  # float32 [M]


def collate(samples):
    """List of B items of `ImageFolderMask` -> `Batch`."""
    crops, labels, masks = zip(*samples, strict=True)
    masks = torch.from_numpy(np.stack(masks, axis=1))  # [G, B, h, w]
    positions = list(zip(*crops, strict=True))  # G + L tuples of B crops
    counts = masks.sum(dim=(2, 3)).flatten()  # [G * B]
    weights = 1 / (counts.clamp(min=1) * len(counts))
    return Batch(
        _stack(positions[:len(masks)]),
        _stack(positions[len(masks):]) if len(positions) > len(masks) else None,
        torch.tensor(labels),
        masks,
        masks.flatten().nonzero().flatten(),
        weights.repeat_interleave(counts),
    )


def _stack(positions):
    """P tuples of B crops [3, S, S] -> [P, B, 3, S, S], copied once."""
    return torch.stack([crop for position in positions for crop in position]).unflatten(0, (len(positions), -1))
