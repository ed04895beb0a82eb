"""Label propagation: the objects of a video's first frame, found again by the likeness of patches (Jabri et al., 2020).

Letters: h x w cells of the patch grid, S source frames, D width, C channels of a soft mask, T queries, K cells around them.
"""
from collections import deque
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TEMPERATURE = 0.1
CPU_TILE, GPU_TILE = 8, 32  # cells along a side: small ones waste less, large ones need fewer kernels
MAX_BLOCK = 2**25  # similarities held at once: 128 MB
CONSTANT = 1e-6  # a soft mask that differs by less, relative to its maximum, does so by rounding alone


def propagate(queries, sources, masks, radius=12, topk=5, tile=None, max_block=MAX_BLOCK):
    """Soft mask of a frame from those of other frames: [h, w, C].

    A query cell takes the mean of the source cells that are most like it, over all frames together, weighted by
    exp(cosine / 0.1): the `topk` best and all that are as good as the last of them.

    Args:
        queries: unit features [h, w, D]. sources: list of S such. masks: list of S soft masks [h, w, C].
        radius: source cells are at most so many rows and columns away; 0: they are anywhere.
        tile: side in cells of the squares of queries that are done at once; by default as suits the device.
        max_block: most similarities held at once, which bounds the memory.

    Exact whatever the tile: all the cells that its queries may see, of all frames, are looked at together.
    """
    h, w, C = masks[0].shape
    tile = max(h, w) if not radius else tile or (CPU_TILE if queries.device.type == "cpu" else GPU_TILE)
    result = masks[0].new_empty(h, w, C)
    for top in range(0, h, tile):
        for left in range(0, w, tile):
            own = slice(top, min(top + tile, h)), slice(left, min(left + tile, w))
            seen = tuple(slice(max(0, part.start - radius), min(side, part.stop + radius)) if radius else slice(0, side)
                         for part, side in zip(own, (h, w), strict=True))
            far = _far(own, seen, radius, queries.device) if radius else None  # [T, K]
            q = queries[own].flatten(0, 1) / TEMPERATURE  # [T, D]
            keys = torch.stack([source[seen] for source in sources]).flatten(0, 2)  # [S K, D]
            values = torch.stack([mask[seen] for mask in masks]).flatten(0, 2)  # [S K, C]
            rows = max(1, max_block // len(keys))
            parts = [_weighted_mean(part, keys, values, None if far is None else far[start:start + rows], topk)
                     for start, part in zip(range(0, len(q), rows), q.split(rows), strict=True)]
            result[own] = torch.cat(parts).view(*result[own].shape)
    return result


def _weighted_mean(q, keys, values, far, topk):
    """Masks [T, C] of queries [T, D] from all keys [S K, D] but those in `far`, bool [T, K] or None."""
    similarity = q @ keys.T  # [T, S K]
    if far is not None:
        similarity.view(len(q), -1, far.shape[1]).masked_fill_(far[:, None], -torch.inf)
    best, places = similarity.topk(min(topk + 1, len(keys)), dim=1)
    last = best[:, :topk][:, -1:]
    if (best[:, topk:] < last).all():  # none is as good as the last of them: only these are looked at again
        return (best[:, :topk].softmax(dim=1)[..., None] * values[places[:, :topk]]).sum(dim=1)
    return similarity.masked_fill_(similarity < last, -torch.inf).softmax(dim=1) @ values


@lru_cache(maxsize=1024)
def _far_cells(rows, columns, seen_rows, seen_columns, radius, device):
    """Which of the cells of one rectangle, given as ranges, are too far from those of another: bool [T, K]."""
    rows, columns, seen_rows, seen_columns = (torch.arange(*ends, device=device)
                                              for ends in (rows, columns, seen_rows, seen_columns))
    far_rows = (rows[:, None] - seen_rows).abs() > radius
    far_columns = (columns[:, None] - seen_columns).abs() > radius
    return (far_rows[:, None, :, None] | far_columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _far(own, seen, radius, device):
    """`_far_cells` of two pairs of slices. Places are counted from the tile, so that few masks serve all tiles."""
    ends = [(part.start - first.start, part.stop - first.start) for part, first in zip(own + seen, own + own, strict=True)]
    return _far_cells(*ends, radius, device)


def follow(features, first_mask, n_last_frames=7, radius=12, topk=5):
    """Yield the soft masks [h, w, C] of a video's frames after the first.

    features: iterable of unit features [h, w, D], frame by frame; they are asked for one at a time. Each frame is found
    from the first one and the `n_last_frames` before it, whose masks are those found here; no more frames are kept.
    """
    features = iter(features)
    first, recent = (next(features), first_mask), deque(maxlen=n_last_frames)
    for queries in features:
        sources, masks = zip(first, *recent, strict=True)
        mask = propagate(queries, sources, masks, radius, topk)
        recent.append((queries, mask))
        yield mask


# ---------------------------------------------------------------- between pixels and cells

def frame_size(width, height, side):
    """(width, height) at which a frame is looked at: the shorter side has `side` pixels, the other a multiple of 64."""
    if width >= height:
        return side * width // height // 64 * 64, side
    return side, side * height // width // 64 * 64


def resize_frame(image, size):
    """PIL RGB image to uint8 [3, H, W] of `size` (W, H): bilinear without antialiasing, as OpenCV's default."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size[::-1], mode="bilinear", align_corners=False, antialias=False)
    return pixels[0].round().to(torch.uint8)


def cell_mask(labels, width, height):
    """Labels uint8 [H, W] to (one-hot mask float32 [height, width, C], the label of each channel).

    By the nearest pixel, straight from full size. Channel 0 is the background; an object that no cell hits has none.
    """
    small = np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    channels = np.union1d([0], small).astype(np.uint8)
    return torch.from_numpy(small[..., None] == channels).float(), channels


def full_labels(mask, channels, patch_size, size):
    """Soft mask [h, w, C] of cells to labels uint8 [H, W] of `size` (W, H).

    Each channel is enlarged to the pixels of the frame (bilinear) and stretched to 0..1; a constant one counts as 0. The
    largest wins, of equal ones the first. The nearest pixel then gives the original size.
    """
    best = winner = None
    for number, channel in enumerate(mask.permute(2, 0, 1)):
        channel = F.interpolate(channel[None, None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0, 0]
        low, high = channel.aminmax()
        channel = torch.where(high - low > CONSTANT * high, (channel - low) / (high - low), 0.0)
        if best is None:
            best, winner = channel, torch.zeros_like(channel, dtype=torch.uint8)
        else:
            winner.masked_fill_(channel > best, number)
            best = torch.maximum(best, channel)
    found = Image.fromarray(channels[winner.cpu().numpy()])
    return np.array(found.resize(size, Image.Resampling.NEAREST))
