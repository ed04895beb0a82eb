"""Evaluate a detector that `train.py` has saved, on COCO's validation images, or by eye on any others.

    python evaluation/object_detection/test.py --checkpoint work_dirs/J/det/teacher/checkpoint.pth --output_dir work_dirs/J
    torchrun --nproc_per_node 8 evaluation/object_detection/test.py --checkpoint ... --data_path data/coco
    python evaluation/object_detection/test.py --checkpoint ... --visualize photo.jpg more/*.jpg --output_dir pictures

The first two print AP of boxes and masks, and record it in OUTPUT_DIR/results.json with the settings of the training. The
third writes OUTPUT_DIR/NAME_detections.png of each image, with boxes, masks, names and scores; NAME_2 for a second NAME.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import engine
from evaluation.common.arguments import probability
from evaluation.common.data import fitted
from evaluation.common.dense import dense_test_parser, picture_paths
from evaluation.common.protocol import start_process
from evaluation.common.results import append_result, read_results
from evaluation.object_detection.coco import ValidationImages, collate
from evaluation.object_detection.detection import described, detect, evaluate, load_detector, masks_of
from evaluation.object_detection.draw import draw_detections
from images import PixelStats, load_rgb, normalize


def get_args_parser():
    parser = dense_test_parser("Evaluate a detector", "COCO")
    parser.add_argument("--threshold", type=probability, default=0.3, help="least score of what is drawn")
    return parser


def visualize(paths, folder, detector, categories, prepare, amp_dtype, threshold):
    """Write a picture of what is found in each image; prepare: from uint8 [3, h, w] to what the detector sees."""
    for path, target in picture_paths(paths, folder, "detections"):
        image = load_rgb(path)
        images, sizes, _ = collate([(prepare(pil_to_tensor(image)), None)])
        original = image.height, image.width
        [found] = detect(detector, images, sizes, [original], amp_dtype)
        picture = draw_detections(image, found, masks_of(found, *original), categories.names, threshold)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
        except OSError as error:
            raise engine.InputError(f"{target}: cannot be written ({error.strerror})") from error
        print(f"{target} of {path}: {int((found['scores'] >= threshold).sum())} detections", flush=True)


def test(args):
    """What the flags ask for. Raises `engine.InputError`."""
    process = start_process(args)
    torch.backends.cudnn.benchmark = False  # each image has another size
    detector, network, categories, content = load_detector(args.checkpoint)
    detector.to(process.device)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, process.device)
    stats = PixelStats(tuple(network["mean"]), tuple(network["std"]))
    sides = network["test_side"], network["long_side"]
    if args.visualize:
        if process.rank == 0:
            visualize(args.visualize, args.output_dir or ".", detector, categories,
                      lambda image: normalize(fitted(image, *sides), stats), amp_dtype,
                      args.threshold)
        return
    if args.output_dir:
        read_results(args.output_dir)
    settings, source = content["settings"], content["source"]
    root = args.data_path or settings.get("data_path", "data/coco")
    images = ValidationImages(root, *sides, partial(normalize, stats=stats))
    engine.need(images.categories == categories, f"--data_path {root}: its categories are not those of {args.checkpoint}")
    metrics = evaluate(detector, images, process, amp_dtype, args.num_workers, lambda batches: next(batches, None))
    if process.rank == 0:
        print(f"{args.checkpoint}, epoch {content['epoch']}, {len(images)} images: {described(metrics)}", flush=True)
        if args.output_dir:
            append_result(args.output_dir, "coco", source["checkpoint"], source["key"], {
                **settings, "data_path": str(root), "val_images": len(images)}, metrics)


if __name__ == "__main__":
    engine.run(lambda: test(get_args_parser().parse_args()))
