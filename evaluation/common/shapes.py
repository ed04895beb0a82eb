"""Drawn scenes of shapes with their boxes, masks and class maps: for tests and benchmarks of dense tasks."""
import numpy as np
from PIL import Image, ImageDraw

NAMES = ("disc", "triangle", "square")
SMALLEST = 1 / 7  # radius of a shape, as a share of the image's shorter side; the largest is twice that
COLOURS = np.array([[200, 60, 60], [60, 180, 70], [70, 80, 210]])  # of each kind of shape, give or take SPREAD
SPREAD = 60


def _outline(kind, x, y, radius):
    """Polygon [(x, y)] of a shape about its centre."""
    corners = {"disc": 24, "triangle": 3, "square": 4}[kind]
    start = {"disc": 0.0, "triangle": -np.pi / 2, "square": np.pi / 4}[kind]
    angles = start + 2 * np.pi * np.arange(corners) / corners
    return [(float(x + radius * np.cos(a)), float(y + radius * np.sin(a))) for a in angles]


def extent(mask):
    """Box (x1, y1, x2, y2) about a mask, bool [h, w], in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def draw_scene(rng, width, height, most=3):
    """A scene of 1 to `most` shapes that do not touch, on noise, drawn by the numpy generator `rng`.

    Returns:
        image: PIL RGB. polygons: [[(x, y), ...]] in pixels, one of each shape. labels: int64 [n], places in NAMES.
        boxes: float64 [n, 4], x1 y1 x2 y2 of the masks, in pixels. masks: bool [n, height, width].
        classes: uint8 [height, width], 0 for the background, else label + 1.
    """
    image = np.clip(rng.normal(rng.integers(0, 256, 3), rng.uniform(10, 40), (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(image)
    polygons, labels, masks, centres = [], [], [], []
    side = min(width, height)
    for _ in range(int(rng.integers(1, most + 1))):
        radius = rng.uniform(SMALLEST, 2 * SMALLEST) * side
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        label = int(rng.integers(len(NAMES)))
        colour = tuple(int(v) for v in np.clip(COLOURS[label] + rng.integers(-SPREAD, SPREAD + 1, 3), 0, 255))
        if any(np.hypot(x - a, y - b) < radius + other + 1 for a, b, other in centres):
            continue
        polygon = _outline(NAMES[label], x, y, radius)
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
        ImageDraw.Draw(image).polygon(polygon, fill=colour)
        polygons.append(polygon)
        labels.append(label)
        masks.append(np.array(mask, dtype=bool))
        centres.append((x, y, radius))
    classes = np.zeros((height, width), dtype=np.uint8)
    for label, mask in zip(labels, masks, strict=True):
        classes[mask] = label + 1
    return image, polygons, np.array(labels), np.array([extent(mask) for mask in masks]), np.stack(masks), classes


def as_annotations(image_id, first_id, polygons, labels, boxes, masks):
    """What COCO's annotations would say of a scene: a list of one dictionary a shape; category ids are labels + 1."""
    return [{"id": first_id + i, "image_id": image_id, "category_id": int(label) + 1, "iscrowd": 0, "area": int(mask.sum()),
             "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
             "segmentation": [[round(value, 2) for point in polygon for value in point]]}
            for i, (polygon, label, box, mask) in enumerate(zip(polygons, labels, boxes, masks, strict=True))]
