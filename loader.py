"""What pre-training sees: the masked image folder, multi-crop augmentation, photometry and batches; packing of shards.

    python loader.py pack FOLDER SHARDS [--max_side 512]   # main_ibot.py then takes --data_path SHARDS (docs/data.md)
    python loader.py index SHARDS                          # the same for plain tars that were packed elsewhere

Workers deliver uint8 crops, a quarter of the bytes of float32; they are normalised later, on the training device.
Letters: B images of a batch, G global crops, L local crops, S and s their sides in pixels, h x w the mask grid of a global
crop, M masked cells of a batch.
"""
import argparse
import itertools
import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, default_collate

import engine
import shards
from augmentation import AUGMENT_PRESETS, check_augment
from engine import InputError, default_workers, ignore_signals
from images import IMAGENET, JPEG_QUALITY, CheckedImageFolder, load_or_replace, normalize, packed
from listing import list_images

# ---------------------------------------------------------------- masks

def draw_ratio(ratios, variances, rng):
    """Prediction ratio of one crop: one of `ratios`, each as likely, then uniform within its `variances` around it."""
    choice = rng.integers(len(ratios))
    return ratios[choice] + variances[choice] * rng.uniform(-1, 1)


def block_mask(height, width, ratio, rng, aspect=(0.3, 1 / 0.3)):
    """BEiT's block-wise mask (Bao et al., 2022, algorithm 1) of at most `ratio` of the cells, fewer when ten attempts at a
    rectangle in a row find no place: bool [height, width], True is masked."""
    mask = np.zeros((height, width), dtype=bool)
    left = ratio * height * width  # not rounded
    min_area = (min(height, width) // 3) ** 2
    log_low, log_high = map(math.log, aspect)
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
    mask = np.zeros((height, width), dtype=bool)
    mask.flat[rng.permutation(mask.size)[:int(ratio * mask.size)]] = True
    return mask


def check_ratios(ratios, variances):
    """The variance of each prediction ratio. Raises `InputError`, naming the flags, for values that cannot be."""
    if len(variances) not in (1, len(ratios)):
        raise InputError(f"--pred_ratio has {len(ratios)} values and --pred_ratio_var {len(variances)}: give one variance "
                         "or one per ratio")
    variances = variances * len(ratios) if len(variances) == 1 else variances
    for ratio, variance in zip(ratios, variances, strict=True):
        if not (0 <= variance and 0 <= ratio <= 1):
            raise InputError(f"--pred_ratio {ratio} --pred_ratio_var {variance}: ratios lie in 0..1")
        if ratio < variance:
            raise InputError(f"--pred_ratio {ratio} is below its --pred_ratio_var {variance}")
    return variances


class ImageFolderMask(CheckedImageFolder):
    """Items are (crops, label, masks): the transform's list of tensors, and a bool grid for each global crop.
    Raises `InputError` on a folder or values that cannot be used.

    Args:
        root: a folder of images, flat or nested, a list, shards, or several of them: see `listing.list_images`.
        transform: PIL RGB image -> list of [3, S, S] tensors. The first `transform.global_crops_number` get masks, all if
            it has no such attribute. With its `photometry` "device" it gives (crops, rows), the items (..., masks, rows).
        patch_size: pixels per side of a mask cell (the patch size of a ViT, 32 for Swin).
        pred_ratio, pred_ratio_var: a number or a list each, see `draw_ratio`; one variance may serve all ratios.
        pred_shape, pred_aspect_ratio: "block", with rectangles of that range of aspects, or "rand".
        pred_start_epoch: masks are empty before this epoch.
        seed: a sample is a pure function of (seed, epoch, index), whatever the number of workers and processes. The
            caller's generators stay as they are; `transform` must draw from torch's CPU generator only.
        on_bad_image: "error", or "skip", which marks a bad file in `bad`, uint8 [n]; see `load_or_replace`.
    Attributes to set: mask_crops, "global", "all", "one" (the first) or "none", when the loss is of all cells; one_ratio, a
        ratio for all crops of an image; cells, what gives an image's cells their targets: (index, size, boxes, turns, numpy
        generator) -> boxes, turns, int64 grid for each crop with masks, -1 for a cell that does not count.
    """
    mask_crops, one_ratio, cells = "global", False, None

    def __init__(self, root, transform, patch_size, pred_ratio, pred_ratio_var=0, pred_aspect_ratio=(0.3, 1 / 0.3),
                 pred_shape="block", pred_start_epoch=0, seed=0, on_bad_image="skip"):
        ratios, variances = (np.atleast_1d(values).tolist() for values in (pred_ratio, pred_ratio_var))
        variances = check_ratios(ratios, variances)
        if pred_shape not in ("block", "rand"):
            raise InputError(f"pred_shape {pred_shape!r}: must be block or rand")
        if on_bad_image not in ("error", "skip"):
            raise InputError(f"on_bad_image {on_bad_image!r}: must be error or skip")
        if seed < 0:
            raise InputError(f"seed {seed}: must not be negative")
        super().__init__(root, transform, labelled=False)
        self.patch_size, self.pred_ratio, self.pred_ratio_var = patch_size, ratios, variances
        self.pred_shape, self.pred_aspect_ratio, self.pred_start_epoch = pred_shape, pred_aspect_ratio, pred_start_epoch
        self.seed, self.on_bad_image = seed, on_bad_image
        # Shared with the workers, both ways: they see a new epoch, the main process sees the files they could not read.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad = torch.zeros(len(self.samples), dtype=torch.uint8).share_memory_()

    def set_epoch(self, epoch):
        """Call before iterating over the loader; reaches persistent workers too."""
        self.epoch.fill_(epoch)

    def __getitem__(self, index):
        index = range(len(self))[index]  # seeds are not negative
        rng = np.random.default_rng((self.seed, int(self.epoch), index))
        torch_seed = int(rng.integers(2**63))
        image, label = load_or_replace(self, index, rng)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would seed the GPUs too
            if self.cells is None:
                crops = self.transform(image)
            else:
                boxes, turns, rows = self.transform.draw(*image.size)
                boxes, turns, targets = self.cells(self.loaded, image.size, boxes, turns, rng)
                crops = self.transform.finish(image, boxes, turns, rows)
        crops, *rest = crops if getattr(self.transform, "photometry", None) == "device" else (crops,)
        masks = self._draw_masks(crops, rng)
        if self.cells is not None:
            masks = [np.where(mask, target, -1) for mask, target in zip(masks, targets, strict=True)]
        return crops, label, masks, *rest

    def load(self, index):
        self.loaded = index  # perhaps of an image in place of a bad one
        return super().load(index)

    def _draw_masks(self, crops, rng):
        masked = len(crops) if self.mask_crops == "all" else getattr(self.transform, "global_crops_number", len(crops))
        if self.mask_crops == "none":
            return [np.ones([side // self.patch_size for side in crop.shape[1:]], dtype=bool) for crop in crops[:masked]]
        ratio = self._draw_ratio(rng) if self.one_ratio else None
        masks = [self._draw_mask(crop, rng, ratio) for crop in crops[:masked]]
        return masks if self.mask_crops != "one" else [masks[0], *map(np.zeros_like, masks[1:])]

    def _draw_ratio(self, rng):
        return draw_ratio(self.pred_ratio, self.pred_ratio_var, rng) if self.epoch >= self.pred_start_epoch else 0

    def _draw_mask(self, crop, rng, ratio):
        height, width = (side // self.patch_size for side in crop.shape[-2:])
        ratio = self._draw_ratio(rng) if ratio is None else ratio
        if self.pred_shape == "rand":
            return random_mask(height, width, ratio, rng)
        return block_mask(height, width, ratio, rng, self.pred_aspect_ratio)


# ---------------------------------------------------------------- augmentation

# A crop's photometry is one float32 row: the four jitter operations in the order in which they are applied, their factors
# in that order, whether to grey and to solarise, and the taps 0..2 of the blur's box (1, 0, 0 for none).
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ROW = (4, 4, 1, 1, 3)
BOX_DRAWS, ROW_DRAWS, TURN_DRAWS = 2 + 2 * 10, 13, 3  # uniform numbers that a crop takes


def blur_taps(sigma):
    """Taps 0..2 of the symmetric filter that Pillow's GaussianBlur applies three times (Gwosdek et al., 2011): a box of
    ones, here one or three, between two fractional ends, of variance sigma**2 / 3 exactly.

    `sigma` [n] in pixels, 0 to 2 -> float64 [n, 3], rows 1, 0, 0 where it is 0.
    """
    variance = sigma[:, None] ** 2 / 3
    return np.where(variance < 2 / 3, (1, 0, 0) + variance * (-1, 0.5, 0), (0.4, 0.4, -0.1) + variance * (-0.1, -0.1, 0.15))


def draw_box(uniform, width, height, scale):
    """Box (left, top, width, height) of a random resized crop in pixels, distributed as in torchvision's
    `RandomResizedCrop.get_params`, out of a list of BOX_DRAWS floats in [0, 1).

    `scale` is the range of its area relative to the image's, its aspect is log-uniform in 3/4..4/3. Of ten attempts the
    first that fits inside the image counts; when none does, the largest centred box of an aspect in 3/4..4/3.
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
    factors = (2 * uniform[:, 1:5] - 1) * (uniform[:, :1] < jitter_p) * strengths + (1, 1, 1, 0)
    order = uniform[:, 5:9].argsort(axis=1)
    switches = np.stack((uniform[:, 9] < augment.grayscale, uniform[:, 10] < solarize_p), axis=1)
    taps = blur_taps((0.1 + 1.9 * uniform[:, 12]) * (uniform[:, 11] < blur_p))
    return np.concatenate((order, np.take_along_axis(factors, order, axis=1), switches, taps), axis=1, dtype=np.float32)


def _luma(images):
    """[..., 3, H, W] -> [..., 1, H, W] with the weights of ITU-R 601."""
    r, g, b = images.unbind(-3)
    return (r * 0.299).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(-3)


def adjust_hue(images, factor):
    """Turn the hue of float images [..., 3, H, W] by `factor` [..., 1, 1] of the circle; as torchvision's to 1e-6.

    With hi, lo the largest and smallest channel of a pixel, which stay, each channel is lo + (hi - lo) * t(hue), t a
    trapezoid wave with red, green and blue a third of the circle apart: several times faster on CPU than by way of HSV.
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


def photometry_of_crop(crop, row):
    """`apply_photometry` for one crop on CPU, uint8 [3, S, S] in and out, fast because it skips what its row leaves out and
    computes in float32, which is faster than 8 bits or Pillow and rounds only once."""
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
    x = x.to(torch.int16).to(torch.uint8)  # straight to uint8 takes twice as long on CPU
    if values[9]:
        x = torch.minimum(x, ~x)  # inverts all values >= 128
    return x.expand(3, -1, -1).contiguous()


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
    x = gaussian_blur((x * 255).round_(), taps).to(torch.int16).to(torch.uint8)
    return torch.where(solarize[..., None, None] > 0, torch.minimum(x, ~x), x)


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
        self.photometry, self.augment, self.global_crops_number = photometry, augment, global_crops_number
        self.sizes = [global_crops_size] * global_crops_number + [local_crops_size] * local_crops_number
        self.scales = [global_crops_scale] * global_crops_number + [local_crops_scale] * local_crops_number
        counts = (1, global_crops_number - 1, local_crops_number)
        self.blur_p, self.solarize_p = (np.repeat(p, counts) for p in (augment.blur, augment.solarize))

    def __call__(self, image):
        return self.finish(image, *self.draw(*image.size))

    def finish(self, image, boxes, turns, rows):
        """What a call gives, of numbers that `draw` gave."""
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
            crop = F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]
            if flip or down:
                crop = crop.flip([2] * flip + [1] * down)
            crops.append(crop.permute(1, 2, 0).rot90(quarters).contiguous().permute(2, 0, 1) if quarters else crop)
        return crops


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    """One batch of pre-training, made by `collate` in the worker.

    `mask_index` lists the masked cells of the flattened `masks` (and, behind them, `local_masks`): nonzero() on a GPU would
    stall it. `mask_weight` is what each adds to the patch loss: 1 / (masked cells of its crop * G * B), the means over
    cells, images and crops that are masked. Padding has index 0 and weight 0.
    """
    global_crops: torch.Tensor  # uint8 [G, B, 3, S, S]; after `finish_batch` float32
    local_crops: torch.Tensor | None  # uint8 [L, B, 3, s, s]; after `finish_batch` float32
    labels: torch.Tensor  # int64 [B]
    masks: torch.Tensor  # bool [G, B, h, w]
    mask_index: torch.Tensor  # int64 [M], into G * B * h * w
    mask_weight: torch.Tensor  # float32 [M]
    photometry: torch.Tensor | None = None  # float32 [G + L, B, 13], what is left for the device to do
    local_masks: torch.Tensor | None = None  # bool [L, B, h', w'], where local crops are masked too
    targets: torch.Tensor | None = None  # int64 [M], the masked cells' tokens, or their matches in the other crop's grid


class ResumableSampler(DistributedSampler):
    """`DistributedSampler` that can start in the middle of an epoch; its length stays that of a whole one."""
    start = 0

    def set_epoch(self, epoch, start=0):
        """Epoch, and how many of this process's samples of it were used already."""
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.start, None)


def collate(samples, pad_masks=1, global_crops_number=None, masked_crops=None):
    """List of B items of `ImageFolderMask` -> `Batch`. M is padded to a multiple of `pad_masks`, to one at least when that
    is above 1, so that compiled code meets few sizes.

    global_crops_number: G, by default that of the masks. masked_crops: over how many crops of an image the patch loss is a
    mean, by default those with a mask, be it empty.
    """
    crops, labels, masks, *photometry = zip(*samples, strict=True)
    G = global_crops_number or len(masks[0])
    positions = list(zip(*crops, strict=True))  # G + L tuples of B crops
    grids = [torch.from_numpy(np.stack(position)) for position in zip(*masks, strict=True)]  # each [B, h, w]
    cells = torch.cat([grid.flatten() for grid in grids])
    masked = cells if cells.dtype == torch.bool else cells >= 0
    index = masked.nonzero().flatten()
    masks = [grid if grid.dtype == torch.bool else grid >= 0 for grid in grids]
    counts = torch.cat([mask.sum(dim=(1, 2)) for mask in masks])  # [G * B]
    weights = 1 / (counts.clamp(min=1) * ((masked_crops or len(masks)) * len(labels)))
    padding = (0, max(math.ceil(len(index) / pad_masks), pad_masks > 1) * pad_masks - len(index))
    return Batch(
        _stack(positions[:G]), _stack(positions[G:]) if len(positions) > G else None,
        torch.tensor(labels), torch.stack(masks[:G]), F.pad(index, padding),
        F.pad(weights.repeat_interleave(counts), padding), torch.stack(photometry[0], dim=1) if photometry else None,
        torch.stack(masks[G:]) if len(masks) > G else None,
        None if cells.dtype == torch.bool else F.pad(cells[index].long(), padding))


def _stack(positions):
    """P tuples of B crops [3, S, S] -> [P, B, 3, S, S] of the crops' layout in memory, copied once (shared in a worker)."""
    crops = [crop for position in positions for crop in position]
    interleaved = not crops[0].is_contiguous()
    stacked = default_collate([crop.permute(1, 2, 0) for crop in crops] if interleaved else crops)
    return (stacked.permute(0, 3, 1, 2) if interleaved else stacked).unflatten(0, (len(positions), -1))


def data_loader(dataset, batch_size, accum_iter, process, workers, pad_masks, seed):
    """DataLoader of `Batch`es of `batch_size` images of an `ImageFolderMask`, this process's share of each epoch.

    workers: processes that load, None: as many as there are cores for. pad_masks: see `collate`. Raises `InputError` unless
    there are images for an update of `accum_iter` batches.
    """
    workers = default_workers() if workers is None else workers
    batches = DataLoader(
        dataset, batch_size, num_workers=workers, drop_last=True,
        sampler=ResumableSampler(dataset, process.world_size, process.rank, shuffle=True, seed=seed),
        collate_fn=partial(collate, pad_masks=pad_masks, global_crops_number=dataset.transform.global_crops_number,
                           masked_crops=1 if dataset.mask_crops == "one" else None),
        pin_memory=process.device.type == "cuda",
        persistent_workers=workers > 0, worker_init_fn=ignore_signals,
        generator=torch.Generator())  # its own, or starting workers in mid-epoch would draw from the run's
    if len(batches) < accum_iter:
        raise InputError(f"--data_path {dataset.root}: {len(dataset)} images are fewer than one batch of "
                         f"{batch_size * process.world_size * accum_iter}; lower --batch_size_per_gpu"
                         + " or --accum_iter" * (accum_iter > 1))
    return batches


def finish_batch(batch, photometry=apply_photometry, stats=IMAGENET, dtype=torch.float32, tokenizer=None):
    """`Batch` of uint8 crops, on the training device -> the same with normalised crops, ready for the networks.

    tokenizer: (uint8 global crops [G, B, 3, S, S], `mask_index`) -> `targets` (`patch_tokenizers`).

    First `photometry`, which may be compiled, does what `batch.photometry` asks for, one crop position at a time:
    temporaries are of B crops, not of (G + L) B.
    """
    crops = [batch.global_crops, batch.local_crops]
    if batch.photometry is not None:
        rows = batch.photometry.split([0 if x is None else len(x) for x in crops])
        crops = [None if x is None else torch.stack(list(map(photometry, x, r))) for x, r in zip(crops, rows, strict=True)]
    targets = tokenizer(crops[0], batch.mask_index) if tokenizer else batch.targets
    global_crops, local_crops = (None if x is None else normalize(x, stats, dtype) for x in crops)
    return batch._replace(global_crops=global_crops, local_crops=local_crops, photometry=None, targets=targets)


def device_batches(data_loader, device, photometry=apply_photometry, stats=IMAGENET, dtype=torch.float32,
                   tokenizer=None):
    """Batches of a DataLoader, moved to `device` and finished there (`finish_batch`).

    On CUDA a batch is copied on a side stream while the device computes on the one before (with `pin_memory=True`; without,
    the copy waits). None is waited for before the caller has given the device its work on the one before.
    dtype: that of mixed precision, which else would keep a copy of the crops beside them.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in data_loader:
        with torch.cuda.stream(side) if side else nullcontext():
            batch = Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))
        if side:
            main = torch.cuda.current_stream(device)
            main.wait_stream(side)
            for x in (x for x in batch if x is not None):
                x.record_stream(main)  # its memory may not go to a later copy before `main` has read it
        yield finish_batch(batch, photometry, stats, dtype, tokenizer)


# ---------------------------------------------------------------- packing

def pack(sources, folder, max_side, shard_size):
    """Pack images (see `listing.list_images`) into shards, and say what was done; shard_size: in GiB."""
    samples, classes, notes = list_images(sources, labelled=False)
    print("\n".join(notes), end="\n" * (len(notes) > 0), flush=True)
    done = shards.pack(samples, classes, folder, shard_size * 2**30, partial(packed, max_side=max_side))
    print(f"packed {len(samples)} images of {len(classes)} class{'es' * (len(classes) > 1)}; now: --data_path {folder}")
    for word, what in (("shrunk", f"made smaller, JPEGs of quality {JPEG_QUALITY} with a longer side of {max_side}"),
                       ("bad", "no images that can be read, packed as they are"),
                       ("unreadable", "files that could not be read, empty in the shards")):
        if word in done:
            names = "" if word == "shrunk" else f" ({', '.join(done[word][:10])}{', ...' * (len(done[word]) > 10)})"
            print(f"{what}: {len(done[word])}{names}")


def main():
    parser = argparse.ArgumentParser("loader.py", allow_abbrev=False, description="Tar shards of images for --data_path")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", allow_abbrev=False, help="pack images into shards")
    command.add_argument("sources", nargs="+", help="folder of images, flat or nested; a list (.txt); several of these")
    command.add_argument("folder", help="new folder of the shards")
    command.add_argument("--max_side", type=int, default=0, help="make images with a longer side smaller; 0: none")
    command.add_argument("--shard_size", type=float, default=2.0, help="GiB of a tar at most")
    command = commands.add_parser("index", allow_abbrev=False, help="write the index of tars that were packed elsewhere")
    command.add_argument("folder", help="folder of the tars")
    command.add_argument("--output_dir", help="folder of the index, for --data_path; by default that of the tars")
    args = parser.parse_args()
    if args.command == "pack":
        engine.check_numbers(args, not_negative="max_side", positive="shard_size")
        pack(args.sources, args.folder, args.max_side, args.shard_size)
    else:
        tars, count, others = shards.index_tars(args.folder, args.output_dir)
        print(f"{count} images in {tars} tars, {others} other files in them; now: --data_path "
              f"{args.output_dir or args.folder}")


if __name__ == "__main__":
    engine.run(main)
