"""Time of a segmentation step and of a test image, by part, at the recipe's sizes; memory of labels for a large image.

    python benchmarks/segmentation_step.py                                   # ViT-S/16 and UPerNet, two images, on a CPU
    python benchmarks/segmentation_step.py --device cuda --batch_size 4 --amp_dtype bfloat16 --steps 10
    python benchmarks/segmentation_step.py --memory                          # 2048 x 2048 pixels, 150 classes, 36 windows

The first step is not counted. Images are noise: what they hold does not matter here.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from common import step_parser
from torch import nn

import engine
from evaluation.semantic_segmentation.heads import AUXILIARY_TAP, AUXILIARY_WEIGHT, pixel_loss, predict
from evaluation.semantic_segmentation.segmentation import label_map, new_segmenter, training_parser

PARTS = ("backbone", "heads", "loss", "backward", "optimizer")


def timed(seconds, name, device, call):
    """`call()`; its seconds are added to those of `name`."""
    since = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - since
    return result


def step(model, optimizer, batch, amp_dtype, seconds):
    images, labels = batch
    device = images.device
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        maps = timed(seconds, "backbone", device, lambda: model.backbone(images))
        logits = timed(seconds, "heads", device, lambda: (model.head(maps), model.auxiliary(maps[AUXILIARY_TAP])))
        losses = timed(seconds, "loss", device, lambda: [pixel_loss(part, labels)[0] for part in logits])
    timed(seconds, "backward", device, lambda: (losses[0] + AUXILIARY_WEIGHT * losses[1]).backward())
    timed(seconds, "optimizer", device, lambda: (optimizer.step(), optimizer.zero_grad()))


class Noise(nn.Module):
    """A network that costs nothing: 150 logits of each cell of 4 pixels."""

    def forward(self, images):
        return F.avg_pool2d(images[:, :1], 4) * torch.linspace(-1, 1, 150).view(1, 150, 1, 1)


def memory():
    """Print by how much the process grows while the labels of a large image are made."""
    image = torch.randn(3, 2048, 2048)
    predict(Noise(), image[:, :600, :600], (600, 600), 512, 341)  # what is loaded once
    before, since = engine.peak_memory_mib(image.device), time.perf_counter()
    predict(Noise(), image, (2048, 2048), 512, 341)
    more = engine.peak_memory_mib(image.device) - before
    print(f"labels of 2048 x 2048 pixels, 150 classes, 36 windows: {more:.0f} MiB more, "
          f"{time.perf_counter() - since:.1f} s; all logits at that size alone take {150 * 2048**2 * 4 / 2**20:.0f} MiB")


def main():
    parser = step_parser(__doc__)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        return memory()
    device, amp_dtype = engine.choose_device(args.device), args.amp_dtype and getattr(torch, args.amp_dtype)
    flags = training_parser("").parse_args(["--pretrained_weights", "random", "--arch", args.arch])
    _, model, _, network, _ = new_segmenter(flags, "random", {})
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    side, seconds = network["crop_size"], {}
    batch = (torch.randn(args.batch_size, 3, side, side, device=device),
             torch.randint(150, (args.batch_size, side, side), device=device))
    for i in range(args.steps + 1):
        step(model, optimizer, batch, amp_dtype, seconds)
        if not i:
            seconds.clear()
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.arch}, a step on {args.batch_size} images of {side} pixels, {amp_dtype or torch.float32}, {threads}: "
          + ", ".join(f"{name} {seconds[name] / args.steps:.3f} s" for name in PARTS)
          + f"; together {sum(seconds.values()) / args.steps:.3f} s")
    model.eval()
    image, seconds = torch.randn(3, 512, 683, device=device), {}
    for i in range(args.steps + 1):
        timed(seconds, "image", device, lambda: label_map(model, image, (960, 1280), network, amp_dtype))
        if not i:
            seconds.clear()
    print(f"{args.arch}, a test image of 683 x 512 pixels at 1280 x 960: {seconds['image'] / args.steps:.3f} s")


if __name__ == "__main__":
    main()
