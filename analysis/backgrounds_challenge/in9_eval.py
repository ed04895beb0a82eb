"""Background change (iBOT, Table 8): accuracy on the eight variants of ImageNet-9.

    python analysis/backgrounds_challenge/in9_eval.py --checkpoint classifier.pth --data-path data/imnet_bg/bg_challenge

The largest of all 1000 outputs is mapped to one of nine classes; classes of ImageNet that belong to none count as wrong.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import engine
from analysis.backgrounds_challenge.in9 import in9_parser, right, variant_images
from analysis.classifier import accuracy, record, start


def main():
    args = in9_parser("Accuracy on the variants of ImageNet-9").parse_args()
    process, classifier, backbone = start(args, 9 if args.in9 else 1000)
    # All are there before the first runs.
    sets = {variant: variant_images(args.data, variant, backbone.normalize) for variant in args.variants}
    metrics = {}
    for variant, images in sets.items():
        metrics[variant] = 100 * accuracy(classifier, images, args.batch_size, args.num_workers, process, right)
        if process.rank == 0:
            print(f"{variant}: {metrics[variant]:.2f} %", flush=True)
    if {"mixed_same", "mixed_rand"} <= metrics.keys():
        metrics["bg_gap"] = metrics["mixed_same"] - metrics["mixed_rand"]
        if process.rank == 0:
            print(f"background gap (mixed_same - mixed_rand): {metrics['bg_gap']:.2f}", flush=True)
    if process.rank == 0:
        record(args, "imagenet9", backbone, {"images": {variant: len(images) for variant, images in sets.items()}}, metrics)


if __name__ == "__main__":
    engine.run(main)
