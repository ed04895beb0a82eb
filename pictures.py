"""Pictures made of tiles: scaling, letters, a grid under titles, and the crops with which a pre-training run begins."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import engine
import loader

CROPS = "crops.png"
TILE, GAP, TITLE = 112, 6, 22  # pixels


def fit(picture, side):
    """A PIL image with its longer side at `side` pixels; small ones keep visible pixels."""
    scale = side / max(picture.size)
    size = [max(1, round(length * scale)) for length in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def font(size):
    return ImageFont.load_default(size=size)


def save_grid(rows, titles, path):
    """Write rows of tiles under column titles as one picture."""
    step = TILE + GAP
    canvas = Image.new("RGB", (GAP + step * len(titles), TITLE + GAP + step * len(rows)), "white")
    draw, letters = ImageDraw.Draw(canvas), font(12)
    for column, title in enumerate(titles):
        draw.text((GAP + column * step + TILE / 2, TITLE / 2 + 2), title, fill="black", font=letters, anchor="mm")
        for row, tiles in enumerate(rows):
            canvas.paste(tiles[column], (GAP + column * step, TITLE + GAP + row * step))
    canvas.save(path)


def crops_of(dataset, index, masked):
    """The crops that training makes of an image of an `ImageFolderMask`, as PIL images; what is masked is grey."""
    crops, _, masks, *rows = dataset[index]
    if rows:  # left for the device
        crops = [loader.apply_photometry(crop[None], row[None])[0] for crop, row in zip(crops, rows[0], strict=True)]
    crops = [crop.permute(1, 2, 0).numpy().copy() for crop in crops]  # uint8 [S, S, 3]
    if masked:
        for crop, mask in zip(crops, masks):  # noqa: B905 - local crops have no mask
            mask = mask if mask.dtype == bool else mask >= 0
            crop[np.kron(mask, np.ones((dataset.patch_size, dataset.patch_size), dtype=bool))] = 128
    return [Image.fromarray(crop) for crop in crops]


@torch.inference_mode()
def write_crops(dataset, indices, masked, output_dir):
    """Write CROPS: a row for each of the images, itself, its global crops, up to four local ones. A full disk is a warning.

    No generator is drawn from. masked: whether the student sees masks.
    """
    count, rows = dataset.transform.global_crops_number, []
    for index in indices:
        tiles = [fit(crop, TILE) for crop in crops_of(dataset, index, masked)[:count + 4]]
        if not dataset.bad[index]:  # or another has taken its place
            rows.append([fit(dataset.load(index)[0], TILE), *tiles])
    locals_ = min(len(dataset.transform.sizes) - count, 4)
    titles = ["image"] + [f"global crop {i + 1}" for i in range(count)] + ["local crop"] * locals_
    try:
        save_grid(rows, titles, output_dir / CROPS)
    except OSError as error:
        engine.say_once(f"warning: {output_dir / CROPS} cannot be written ({error.strerror})")
