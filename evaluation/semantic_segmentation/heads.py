"""Heads on four feature maps, their loss, and labels for whole images: UPerNet (Xiao et al., 2018) and a linear head.

Letters: B images, K classes, c channels of UPerNet, C of a map, h x w its cells, H x W pixels.
"""
import torch
import torch.nn.functional as F
from torch import nn

import models
from evaluation.semantic_segmentation.ade20k import IGNORED

POOLS = (1, 2, 3, 6)  # sides of the pooled maps of the pyramid
AUXILIARY_TAP, AUXILIARY_CHANNELS, AUXILIARY_WEIGHT = 2, 256, 0.4
DROPOUT = 0.1  # of whole channels, before classification
BAND = 2**25  # logits that exist at a time at an image's own size
COARSEST = 32  # pixels: a cell of the coarsest map
WINDOWS = 4  # that go through the network together


def resized(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Block(nn.Sequential):
    """Convolution k x k without bias, batch norm, ReLU."""

    def __init__(self, channels, out_channels, k):
        super().__init__(nn.Conv2d(channels, out_channels, k, padding=k // 2, bias=False), nn.BatchNorm2d(out_channels),
                         nn.ReLU())
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")


class Scores(nn.Conv2d):
    """Logits of K classes for each cell."""

    def __init__(self, channels, classes):
        super().__init__(channels, classes, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest of four maps, a feature pyramid over all, one map of them at the finest's size."""

    def __init__(self, channels, classes, width):
        super().__init__()
        *finer, top = channels
        self.pools = nn.ModuleList(Block(top, width, 1) for _ in POOLS)
        self.top = Block(top + len(POOLS) * width, width, 3)
        self.laterals = nn.ModuleList(Block(C, width, 1) for C in finer)
        self.smooth = nn.ModuleList(Block(width, width, 3) for _ in finer)
        self.fuse = Block(len(channels) * width, width, 3)
        self.dropout, self.scores = nn.Dropout2d(DROPOUT), Scores(width, classes)

    def forward(self, maps):
        """Four maps [B, C, h, w], fine to coarse, to logits [B, K, h, w] of the finest's size."""
        *finer, top = maps
        pooled = [resized(block(F.adaptive_avg_pool2d(top, side)), top.shape[-2:])
                  for block, side in zip(self.pools, POOLS, strict=True)]
        maps = [block(x) for block, x in zip(self.laterals, finer, strict=True)]
        maps.append(self.top(torch.cat([top, *pooled], 1)))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + resized(maps[i], maps[i - 1].shape[-2:])
        maps = [block(x) for block, x in zip(self.smooth, maps[:-1], strict=True)] + maps[-1:]
        x = self.fuse(torch.cat([resized(x, maps[0].shape[-2:]) for x in maps], 1))
        return self.scores(self.dropout(x))


def auxiliary_head(channels, classes):
    """Logits of K classes from one map, at its size: in training alone."""
    return nn.Sequential(Block(channels, AUXILIARY_CHANNELS, 3), nn.Dropout2d(DROPOUT), Scores(AUXILIARY_CHANNELS, classes))


class Linear(nn.Module):
    """A classifier of the four maps, side by side, for each cell of the first."""

    def __init__(self, channels, classes):
        super().__init__()
        self.scores = Scores(sum(channels), classes)

    def forward(self, maps):
        return self.scores(torch.cat([resized(x, maps[0].shape[-2:]) for x in maps], 1))


class Segmenter(nn.Module):
    """A `DenseBackbone` and a head: UPerNet of `width` channels and its auxiliary head, or without width the linear one."""

    def __init__(self, backbone, classes, width=None):
        super().__init__()
        self.backbone, self.classes, self.auxiliary = backbone, classes, None
        if width is None:
            self.head = Linear(backbone.channels, classes)
        else:
            self.head = UPerNet(backbone.channels, classes, width)
            self.auxiliary = auxiliary_head(backbone.channels[AUXILIARY_TAP], classes)

    def forward(self, images):
        """Images [B, 3, H, W] to logits [B, K, h, w] and, in training, those of the auxiliary head or None."""
        maps = self.backbone(images)
        if not self.training:
            return self.head(maps)
        return self.head(maps), None if self.auxiliary is None else self.auxiliary(maps[AUXILIARY_TAP])


# ---------------------------------------------------------------- loss

def pixel_loss(logits, labels):
    """(cross-entropy, share of pixels that are right) of logits [B, K, h, w] at the size of labels [B, H, W].

    The mean is over all pixels, those that are IGNORED included, as in the reference: they weigh nothing, but count.
    """
    logits = resized(models.at_least_float32(logits), labels.shape[-2:])
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()
    with torch.no_grad():
        counted = labels != IGNORED
        right = (logits.argmax(dim=1) == labels) & counted
    return loss, right.sum() / counted.sum().clamp(min=1)


def losses(network, batch):
    """{"loss", "acc" and with an auxiliary head "aux"} of a batch (images, labels); `acc` in percent."""
    images, labels = batch
    logits, auxiliary = network(images)
    loss, right = pixel_loss(logits, labels)
    if auxiliary is None:
        return {"loss": loss, "acc": 100 * right}
    aux, _ = pixel_loss(auxiliary, labels)
    return {"loss": loss + AUXILIARY_WEIGHT * aux, "aux": aux, "acc": 100 * right}


# ---------------------------------------------------------------- whole images

def window_starts(length, window, stride):
    """First pixels of windows that cover `length`; the last ends where it ends."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def rows_between(height, new_height, first, last):
    """(row above, row below int64 [last - first], weight of the one below) of rows first..last-1 after resizing."""
    y = ((torch.arange(first, last) + 0.5) * (height / new_height) - 0.5).clamp(min=0)
    above = y.long()
    return above, (above + 1).clamp(max=height - 1), y - above


def resized_rows(x, size, first, last, low=0, height=None):
    """Rows first..last-1 of a map [B, K, height, w] at another `size`; x are its rows from `low` on (default: all)."""
    above, below, weight = rows_between(height or x.shape[-2], size[0], first, last)
    start, stop = int(above[0]), int(below[-1]) + 1
    x = resized(x[..., start - low:stop - low, :], (stop - start, size[1]))
    return torch.lerp(x[..., above - start, :], x[..., below - start, :], weight.to(x)[:, None])


@torch.inference_mode()
def predict(network, image, size, window=None, stride=None, multiple=16):
    """Labels uint8 of `size` (H, W) for a normalised image [3, h, w].

    The network sees windows of at most `window` pixels a side, `stride` apart, or without them the whole image, padded with
    0 to a `multiple` (and a cell of the coarsest map). Where windows overlap their logits are averaged, before they are
    resized to (H, W). At full size they exist in bands of rows only.
    """
    h, w = image.shape[-2:]
    height, width = (h, w) if window is None else (min(h, window), min(w, window))
    rows, columns = ([0], [0]) if window is None else (window_starts(h, window, stride), window_starts(w, window, stride))
    places = [(top, left) for top in rows for left in columns]
    padded = [-(-max(side, COARSEST) // multiple) * multiple for side in (height, width)]
    logits = []
    for i in range(0, len(places), WINDOWS):
        parts = [image[:, top:top + height, left:left + width] for top, left in places[i:i + WINDOWS]]
        parts = F.pad(torch.stack(parts), (0, padded[1] - width, 0, padded[0] - height))
        logits += models.at_least_float32(network(parts)).split(1)  # [1, K, h / 4, w / 4]
    K = logits[0].shape[1]

    def summed(first, last):  # rows of the image of the network's size, with the mean logits there: [1, K, last - first, w]
        total = logits[0].new_zeros(1, K, last - first, w)
        cover = total.new_zeros(last - first, w)
        for (top, left), part in zip(places, logits, strict=True):
            low, high = max(first, top), min(last, top + height)
            if low < high:
                band = resized_rows(part, padded, low - top, high - top)[..., :width]
                total[..., low - first:high - first, left:left + width] += band
                cover[low - first:high - first, left:left + width] += 1
        return total / cover

    labels, step = [], max(1, BAND // (K * max(size[1], w)))
    for first in range(0, size[0], step):
        last = min(first + step, size[0])
        above, below, _ = rows_between(h, size[0], first, last)
        low, high = int(above[0]), int(below[-1]) + 1
        band = resized_rows(summed(low, high), size, first, last, low, h)
        labels.append(band.argmax(dim=1)[0].to(torch.uint8))
    return torch.cat(labels)
