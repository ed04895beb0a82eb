"""COCO in small, in its own layout, for the tests of detection: drawn shapes with what real annotations have of odd."""
import json

import numpy as np

from evaluation.common.shapes import as_annotations, draw_scene

CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 3, "name": "triangle"}, {"id": 90, "name": "square"}]


def scene(rng, width, height, image_id, annotations):
    """A drawn image; its shapes are added to `annotations`."""
    image, polygons, labels, boxes, masks, _ = draw_scene(rng, width, height)
    for annotation in as_annotations(image_id, len(annotations) + 1, polygons, labels, boxes, masks):
        annotations.append({**annotation, "category_id": CATEGORIES[annotation["category_id"] - 1]["id"]})
    return image


def odd(number, annotations):
    """What is special in image `number` of the training set."""
    own = [a for a in annotations if a["image_id"] == number]
    if number in (2, 3):  # nothing in it; a crowd alone
        for annotation in own:
            annotations.remove(annotation)
    if number == 3:
        annotations.append({"id": 900, "image_id": 3, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 1,
                            "segmentation": {"size": [80, 100], "counts": [810, 30] + [50, 30] * 39 + [8000 - 810 - 30 - 80 * 39]}})
    if number == 4:  # of two parts
        x, y, w, h = own[0]["bbox"]
        own[0]["segmentation"] = [[x, y, x + w / 3, y, x + w / 3, y + h, x, y + h],
                                  [x + w / 2, y, x + w, y, x + w, y + h, x + w / 2, y + h]]
    if number == 5:  # a box too narrow, one of an unknown class, one across the border
        more = dict(own[0], bbox=[5, 5, 0.5, 20]), dict(own[0], category_id=77), dict(own[0], bbox=[-5, 20, 25, 20])
        annotations += [{**annotation, "id": 901 + i} for i, annotation in enumerate(more)]


def make_coco(root, train=8, val=4, side=(60, 120), plain=False):
    """Write ROOT/{train2017,val2017,annotations}. plain: without what is odd, all images landscape but every third."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            width, height = (int(v) for v in sorted(rng.integers(*side, 2)))
            if number % 3:
                width, height = height, width
            if split == "train" and not plain:
                width, height = (100, 80) if number == 3 else (24, 70) if number == 6 else (width, height)
            image = scene(rng, width, height, number, annotations)
            if split == "train" and not plain:
                odd(number, annotations)
                image = image.convert("L") if number == 1 else image
            image.save(folder / f"{number:06}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number:06}.jpg", "width": width, "height": height})
        (root / "annotations").mkdir(exist_ok=True)
        content = {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root
