"""Time of a detector's training step and of a test image, by part, at the recipe's sizes, on drawn scenes.

    python benchmarks/detection_step.py                                  # ViT-S/16, two images, float32 on a CPU
    python benchmarks/detection_step.py --device cuda --batch_size 4 --amp_dtype bfloat16 --steps 10

Parts of the forward pass are those of the network; `rest` is assignment, sampling, pooling of boxes, targets and losses.
The first step is not counted. Untrained networks find next to nothing: a trained one's masks take longer in tests.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from common import step_parser

import engine
from evaluation.common.data import fitted
from evaluation.common.shapes import as_annotations, draw_scene
from evaluation.object_detection.coco import Augment, Categories, as_results, collate, truth_of
from evaluation.object_detection.detection import detect, masks_of, new_detector, to_device, training_parser
from images import normalize

SIZE = 480, 640  # of the drawn images, as most of COCO's


class Clock:
    """Seconds by name, of parts of a network and of what is between `mark`s."""

    def __init__(self, device):
        self.device, self.seconds, self.since = device, {}, time.perf_counter()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, name):
        since, self.since = self.since, self.now()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.since - since

    def watch(self, name, module):
        """Also count the forward pass of a module."""
        def before(*_):
            self.started = self.now()

        def after(*_):
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - self.started
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def show(self, title, times):
        parts = sum(self.seconds.get(name, 0.0) for name in PARTS)
        self.seconds["rest"] = self.seconds.pop("forward") - parts
        print(title)
        for name in ("data", *PARTS, "rest", "backward", "optimizer", "masks"):
            if name in self.seconds:
                print(f"  {name:<12}{self.seconds[name] / times:9.3f} s")
        print(f"  {'together':<12}{sum(self.seconds.values()) / times:9.3f} s", flush=True)
        self.seconds, self.since = {}, self.now()


PARTS = ("backbone", "fpn", "rpn", "box heads", "mask heads")


def sample(seed):
    """A drawn image, uint8 [3, h, w], and what is in it."""
    image, *scene, _ = draw_scene(np.random.default_rng(seed), SIZE[1], SIZE[0], most=12)
    annotations = as_annotations(0, 1, *scene)
    record = {"id": 0, "file_name": "drawn", "height": SIZE[0], "width": SIZE[1],
              "boxes": [[x, y, x + w, y + h] for x, y, w, h in (own["bbox"] for own in annotations)],
              "labels": [own["category_id"] - 1 for own in annotations],
              "segmentations": [own["segmentation"] for own in annotations]}
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), record


def main():
    parser = step_parser(__doc__)
    args = parser.parse_args()
    device, amp_dtype = engine.choose_device(args.device), args.amp_dtype and getattr(torch, args.amp_dtype)
    flags, detector, *_ = new_detector(training_parser("").parse_args(
        ["--pretrained_weights", "random", "--arch", args.arch]), {}, 80)
    detector.to(device)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    clock, augment = Clock(device), Augment()
    for name, modules in zip(PARTS, ([detector.backbone], [detector.fpn], [detector.rpn], detector.box_heads,
                                     detector.mask_heads), strict=True):
        for module in modules:
            clock.watch(name, module)

    for step in range(args.steps + 1):
        clock.mark("between")
        items = []
        for i in range(args.batch_size):
            image, record = sample(step * args.batch_size + i)
            clock.mark("between")  # drawing is not counted
            truth = truth_of(record)
            image, boxes, labels, masks = augment(image, *truth.values(), np.random.default_rng(i))
            items.append((normalize(image), {"boxes": boxes, "labels": labels, "masks": masks.bool()}))
            clock.mark("data")
        images, sizes, targets = collate(items)
        targets = [to_device(target, device) for target in targets]
        clock.mark("data")
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = sum(detector(images.to(device), sizes, targets).values())
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        clock.seconds.pop("between")
        if not step:
            clock.seconds = {}
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    clock.show(f"{args.arch}, a step on {args.batch_size} images, {amp_dtype or torch.float32}, {threads}", args.steps)

    detector.eval()
    image, _ = sample(0)
    for step in range(args.steps + 1):
        clock.mark("between")
        images, sizes, _ = collate([(normalize(fitted(image, flags.test_side, flags.long_side)), None)])
        clock.mark("data")
        [found] = detect(detector, images, sizes, [SIZE], amp_dtype)
        clock.mark("forward")
        as_results(found, masks_of(found, *SIZE), 0, Categories(list(range(1, 81)), ["object"] * 80))
        clock.mark("masks")
        clock.seconds.pop("between")
        if not step:
            clock.seconds = {}
    clock.show(f"{args.arch}, a test image of {SIZE[1]} x {SIZE[0]} pixels, {len(found['scores'])} detections", args.steps)


if __name__ == "__main__":
    engine.run(main)
