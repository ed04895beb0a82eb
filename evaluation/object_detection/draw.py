"""Pictures of detections: boxes, masks, names and scores drawn on images."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_segmentation_masks

import engine
from evaluation.common.charts import COLOURS

TILE = 360  # pixels, height of an image in a sheet
SMALLEST = 240  # pixels, shorter side from which on names do not hide what they belong to; smaller images are enlarged


def draw_detections(image, found, masks, names, threshold=0.3):
    """A PIL RGB image, enlarged if it is small, with what is found in it with a score of `threshold` at least.

    found: {"boxes" [n, 4], "labels" [n], "scores" [n]}, see `CascadeMaskRCNN.detect`; true objects have no "scores". masks:
    bool [h, w] of each, an iterable. names: of the labels, each of which has a colour of its own as far as there are any.
    """
    scores = found["scores"].tolist() if "scores" in found else [None] * len(found["labels"])
    items = [(box, int(label), score, mask) for box, label, score, mask in zip(
        found["boxes"].tolist(), found["labels"], scores, masks, strict=True) if score is None or score >= threshold]
    scale = -(-SMALLEST // min(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    if not items:
        return image
    colours = [COLOURS[label % len(COLOURS)] for _, label, _, _ in items]
    masks = torch.stack([mask for *_, mask in items])
    masks &= masks.cumsum(dim=0) == 1  # the best on top: where masks meet, torchvision would paint black
    masks = masks.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    pixels = draw_segmentation_masks(torch.from_numpy(np.array(image)).permute(2, 0, 1), masks, alpha=0.45, colors=colours)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(10, min(image.size) // 32))
    for (box, label, score, _), colour in reversed(list(zip(items, colours, strict=True))):
        box = [scale * value for value in box]
        draw.rectangle(box, outline=colour, width=max(1, min(image.size) // 200))
        text = names[label] + (f" {score:.2f}" if score is not None else "")
        left, top, right, bottom = draw.textbbox((box[0] + 1, box[1] + 1), text, font)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
        draw.text((box[0] + 1, box[1] + 1), text, "white", font)
    return image


def write_picture(rows, path, gap=8):
    """Rows of PIL images, scaled to the same height, as one PNG file. A full disk is a warning."""
    rows = [[image.resize((round(image.width * TILE / image.height), TILE)) for image in row] for row in rows]
    width = max(sum(image.width + gap for image in row) for row in rows) + gap
    picture = Image.new("RGB", (width, len(rows) * (TILE + gap) + gap), "white")
    for i, row in enumerate(rows):
        x = gap
        for image in row:
            picture.paste(image, (x, gap + i * (TILE + gap)))
            x += image.width + gap
    try:
        picture.save(path)
    except OSError as error:
        engine.say_once(f"warning: {path} cannot be written ({error.strerror})")
