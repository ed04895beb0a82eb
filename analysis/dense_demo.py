"""A first run of dense tasks: drawn shapes in the layouts of ADE20K and COCO, and what a pre-trained network makes of them.

    python analysis/dense_demo.py data --output_dir data/shapes
    python analysis/dense_demo.py report --output_dir work_dirs/dense_demo

`./run.sh dense_demo` calls the first, then trains from pre-trained and from random weights, then calls the second.
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
from PIL import Image

import engine
from evaluation.common.results import read_results
from evaluation.common.shapes import NAMES, as_annotations, draw_scene
from evaluation.object_detection.coco import ValidationImages
from evaluation.object_detection.detection import drawn_examples, drawn_truth, load_detector
from evaluation.object_detection.draw import write_picture
from evaluation.semantic_segmentation.ade20k import class_names, read_pairs
from evaluation.semantic_segmentation.segmentation import load_segmenter, write_pictures
from images import PixelStats, normalize

SCENES = {"training": 240, "validation": 60}
SIDES = (64, 96)  # pixels
STARTS = ("pretrained", "random")  # sub-folders of the runs
SHOWN = 6


def save(image, path):
    """Write an image file at once, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    image.save(temporary, path.suffix[1:].upper().replace("JPG", "JPEG"))
    os.replace(temporary, path)


def write_ade(folder):
    """The scenes in FOLDER/{images,annotations}/{training,validation}: 1 is the background, then come the shapes."""
    for number, (split, count) in enumerate(SCENES.items()):
        for i in range(count):
            rng = np.random.default_rng((number, i))
            width, height = (int(side) for side in rng.integers(*SIDES, 2))
            image, *_, classes = draw_scene(rng, width, height)
            save(image, folder / "images" / split / f"{i:04}.jpg")
            save(Image.fromarray(classes + 1), folder / "annotations" / split / f"{i:04}.png")
    names = "".join(f"{i}\t{name}\n" for i, name in enumerate(("background", *NAMES), 1))
    (folder / "objectInfo150.txt").write_text(names)
    print(f"{folder}: " + ", ".join(f"{count} {split} images" for split, count in SCENES.items()))


def write_coco(folder):
    """The same scenes in FOLDER/{train2017,val2017}, with their polygons in FOLDER/annotations."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(SCENES.items()):
        split, images, annotations = {"training": "train", "validation": "val"}[split], [], []
        for i in range(count):
            rng = np.random.default_rng((number, i))
            width, height = (int(side) for side in rng.integers(*SIDES, 2))
            image, polygons, labels, boxes, masks, _ = draw_scene(rng, width, height)
            save(image, folder / f"{split}2017" / f"{i:04}.jpg")
            images.append({"id": i, "file_name": f"{i:04}.jpg", "width": width, "height": height})
            annotations += as_annotations(i, len(annotations) + 1, polygons, labels, boxes, masks)
        categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(
            {"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    print(f"{folder}: the same with boxes and polygons")


def write_data(folder):
    """Draw the scenes below `folder`. Raises InputError where nothing can be written."""
    try:
        write_ade(folder / "ade")
        write_coco(folder / "coco")
    except OSError as error:
        raise engine.InputError(f"--output_dir {error.filename or folder}: {error.strerror}") from error


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
    """Print mIoU of the runs in FOLDER/seg, and write a picture of both beside the truth. Raises InputError."""
    settings = print_results(folder / "seg", "UPerNet", ("mIoU", "mAcc", "aAcc"))
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
    args = parser.parse_args()
    if args.command == "data":
        return write_data(args.output_dir)
    report_detection(args.output_dir)
    report_segmentation(args.output_dir)


if __name__ == "__main__":
    engine.run(main)
