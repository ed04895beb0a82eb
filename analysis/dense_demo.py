"""A first run of dense tasks: scenes of handwritten digits as ADE20K and COCO have theirs, and what networks make of them.

    python analysis/dense_demo.py data --digits data/digits --output_dir data/scenes
    python analysis/dense_demo.py report --output_dir work_dirs/dense_demo

`./run.sh dense_demo` calls the first, then trains from pre-trained and from random weights, then calls the second. The
digits are those of the quickstart: training scenes hold its training images, validation scenes its validation images.
"""
import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull

import engine
from evaluation.common.results import read_results
from evaluation.common.shapes import as_annotations, extent
from evaluation.object_detection.coco import ValidationImages
from evaluation.object_detection.detection import drawn_examples, drawn_truth, load_detector
from evaluation.object_detection.draw import write_picture
from evaluation.semantic_segmentation.ade20k import class_names, read_pairs
from evaluation.semantic_segmentation.segmentation import load_segmenter, write_pictures
from images import PixelStats, load_rgb, normalize

CLASSES = ("0", "1", "2", "3", "4")  # five digits: minutes are too short for ten
SCENES = {"training": 100, "validation": 60}
FOLDERS = {"training": "train", "validation": "val"}  # of the digits, and as COCO calls the splits
HEIGHT, WIDTHS, SIDES = 48, (64, 97), (28, 43)  # pixels of scenes and of digits
MOST, TRIES = 3, 40  # digits of a scene, and how often a free place for one is looked for
NOISE, TINT, INK = 4, 0.15, 0.4  # deviation of the ground; most that a channel loses; where a digit's outline is
STARTS = ("pretrained", "random")  # sub-folders of the runs
SCORES = ("mIoU", "mAcc", "aAcc")
SHOWN = 6


# ---------------------------------------------------------------- data

def read_digits(folder, split):
    """The images of CLASSES below FOLDER/{train,val}: of each a list of float32 [32, 32] in 0..1. Raises InputError."""
    folders = [Path(folder) / FOLDERS[split] / name for name in CLASSES]
    for path in folders:
        engine.need(path.is_dir(), f"--digits {folder}: no folder {path}; ./run.sh quickstart makes it")
    return [[np.array(load_rgb(path).convert("L"), dtype=np.float32) / 255 for path in sorted(own.glob("*.png"))]
            for own in folders]


def draw_scene(rng, digits):
    """One to MOST digits side by side, light on black, drawn by the numpy generator `rng`. digits: of `read_digits`.

    An object is what is within the convex hull of a digit's ink. Returns what `shapes.draw_scene` does.
    """
    width = int(rng.integers(*WIDTHS))
    pixels = rng.normal(0, NOISE, (HEIGHT, width, 1)).repeat(3, axis=2)
    polygons, labels, masks, taken = [], [], [], np.zeros((HEIGHT, width), dtype=bool)
    wanted = int(rng.integers(1, MOST + 1))
    for _ in range(TRIES):
        if len(labels) == wanted:
            break
        side, label = int(rng.integers(*SIDES)), int(rng.integers(len(CLASSES)))
        x, y = int(rng.integers(width - side)), int(rng.integers(HEIGHT - side))
        place = slice(y, y + side), slice(x, x + side)
        if taken[place].any():
            continue
        taken[place] = True
        digit = digits[label][rng.integers(len(digits[label]))]
        ink = np.array(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC))[..., None]
        pixels[place] += (255 * rng.uniform(1 - TINT, 1, 3) - pixels[place]) * ink
        points = np.argwhere(ink[..., 0] > INK)[:, ::-1]
        polygons.append([(float(a + x), float(b + y)) for a, b in points[ConvexHull(points).vertices]])
        mask = Image.new("L", (width, HEIGHT))
        ImageDraw.Draw(mask).polygon(polygons[-1], fill=1)
        labels.append(label)
        masks.append(np.array(mask, dtype=bool))
    classes = np.zeros((HEIGHT, width), dtype=np.uint8)
    for label, mask in zip(labels, masks, strict=True):
        classes[mask] = label + 1
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, polygons, np.array(labels), np.array([extent(mask) for mask in masks]), np.stack(masks), classes


def save(image, path):
    """Write a PNG file at once, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    image.save(temporary, "PNG")
    os.replace(temporary, path)


def write_data(digits, folder):
    """The scenes as ADE20K has them in FOLDER/ade, where 1 is the ground, and as COCO has them in FOLDER/coco. Raises
    InputError where there are no digits, or where nothing can be written."""
    ade, coco = folder / "ade", folder / "coco"
    try:
        for number, (split, count) in enumerate(SCENES.items()):
            drawn, images, annotations, short = read_digits(digits, split), [], [], FOLDERS[split]
            for i in range(count):
                image, *objects, classes = draw_scene(np.random.default_rng((number, i)), drawn)
                save(image, ade / "images" / split / f"{i:04}.png")
                save(Image.fromarray(classes + 1), ade / "annotations" / split / f"{i:04}.png")
                save(image, coco / f"{short}2017" / f"{i:04}.png")
                images.append({"id": i, "file_name": f"{i:04}.png", "width": image.width, "height": image.height})
                annotations += as_annotations(i, len(annotations) + 1, *objects)
            categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
            (coco / "annotations").mkdir(exist_ok=True)
            (coco / "annotations" / f"instances_{short}2017.json").write_text(json.dumps(
                {"info": {}, "images": images, "annotations": annotations, "categories": categories}))
            print(f"{folder}: {count} {split} scenes with {len(annotations)} digits")
        (ade / "objectInfo150.txt").write_text("".join(f"{i}\t{name}\n" for i, name in enumerate(("ground", *CLASSES), 1)))
    except OSError as error:
        raise engine.InputError(f"--output_dir {error.filename or folder}: {error.strerror}") from error


# ---------------------------------------------------------------- report

def print_results(folder, title, metrics):
    """Print the metrics of the runs in `folder`, one of each start. Returns the settings of the last. Raises InputError."""
    print(f"{title}\n{'start':<12}" + "".join(f"{name:>11}" for name in metrics))
    for start in STARTS:
        records = read_results(folder / start)
        engine.need(records, f"{folder / start / 'results.json'}: no results; ./run.sh dense_demo makes them")
        print(f"{start:<12}" + "".join(f"{records[-1]['metrics'].get(name, math.nan):>11.2f}" for name in metrics))
    return records[-1]["settings"]


def report_detection(folder):
    """Print AP of the runs in FOLDER/det, and write a picture of both below the truth. Raises InputError."""
    settings = print_results(folder / "det", "Cascade Mask R-CNN", ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"))
    images = ValidationImages(settings["data_path"], settings["test_side"], settings["long_side"])
    rows = [drawn_truth(images, SHOWN)]
    for start in STARTS:
        detector, network, *_ = load_detector(folder / "det" / start / engine.CHECKPOINT)
        images.normalize = partial(normalize, stats=PixelStats(tuple(network["mean"]), tuple(network["std"])))
        rows.append(drawn_examples(detector, images, None, SHOWN))
    write_picture(rows, folder / "detections.png")
    print(f"{folder / 'detections.png'}: the truth, from pre-trained and from random weights\n", flush=True)


def report_segmentation(folder):
    """Print mIoU of the runs in FOLDER/{seg_linear,seg}, and write a picture of UPerNet's two beside the truth. Raises
    InputError."""
    print_results(folder / "seg_linear", "a linear head on the frozen network", SCORES)
    settings = print_results(folder / "seg", "\nUPerNet", SCORES)
    pairs = read_pairs(settings["data_path"], "validation")[:SHOWN]
    names = class_names(settings["data_path"], settings["num_classes"])
    networks = [load_segmenter(folder / "seg" / start / engine.CHECKPOINT)[:2] for start in STARTS]
    write_pictures(networks, pairs, names, torch.device("cpu"), None, folder / "segmentations.png")
    print(f"{folder / 'segmentations.png'}: images, the truth, from pre-trained and from random weights", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("command", choices=("data", "report"))
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--digits", default="data/digits", type=Path, help="folder that the quickstart wrote")
    args = parser.parse_args()
    if args.command == "data":
        return write_data(args.digits, args.output_dir)
    report_detection(args.output_dir)
    report_segmentation(args.output_dir)


if __name__ == "__main__":
    engine.run(main)
