"""Corruptions (iBOT, Table 8): errors on ImageNet-C (Hendrycks and Dietterich, 2019).

    torchrun --nproc_per_node 8 analysis/corruptions_surf_variations/eval.py --checkpoint classifier.pth --data data/imnet_c
    python analysis/corruptions_surf_variations/eval.py --checkpoint ... --per_class 5   # five images a class

Prints the table of all corruptions and three means: over 19 corruptions as they are, which is what the paper's Table 8 most
likely gives; over the benchmark's 15; and over these 15 divided by AlexNet's errors, the usual mCE.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from torchvision.transforms import v2

import engine
from analysis.classifier import accuracy, classifier_parser, record, require, start
from analysis.common import image_folder
from evaluation.common.arguments import int_from
from images import normalize

LAYOUT = "CORRUPTION/SEVERITY/WNID/*.JPEG, without the level noise/, blur/, ... of the archives"
WHERE = "https://github.com/hendrycks/robustness"
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's errors, means over the severities (Hendrycks and Dietterich, 2019).
ALEXNET = {"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
           "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
           "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
           "pixelate": 0.717840, "jpeg_compression": 0.606500}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
CORRUPTIONS = (*ALEXNET, *EXTRA)


def get_args_parser():
    parser = classifier_parser("Errors on ImageNet-C", "data/imnet_c")
    parser.add_argument("--per_class", type=int_from(1), help="images of each class and cell; by default all")
    parser.add_argument("--corruptions", choices=CORRUPTIONS, nargs="+", default=list(CORRUPTIONS))
    return parser


def corruption_means(errors):
    """Means in percent of {corruption: [5 error rates as shares]}; None where a corruption of the mean is missing.

    mean19, mean15: plain means; mce: mean over the 15 of error / AlexNet's error.
    """
    mean = {name: sum(values) / len(values) for name, values in errors.items()}

    def over(names, divisors=None):
        if not set(names) <= mean.keys():
            return None
        return 100 * sum(mean[name] / (divisors[name] if divisors else 1) for name in names) / len(names)
    return {"mean19": over(CORRUPTIONS), "mean15": over(ALEXNET), "mce": over(ALEXNET, ALEXNET)}


def cell_images(data, corruption, severity, size, per_class=None, normalize=normalize):
    """The images DATA/CORRUPTION/SEVERITY/WNID/*, cropped to `size`; the first `per_class` of each class."""
    folder = Path(data) / corruption / str(severity)
    require(folder, f"{data}/{LAYOUT}", WHERE)
    images = image_folder(folder, v2.Compose([v2.CenterCrop(size), v2.PILToTensor(), normalize]))
    if per_class is None:
        return images
    places = [np.flatnonzero(images.targets == label)[:per_class] for label in range(len(images.classes))]
    return images.select(np.concatenate(places), images.name)


def main():
    args = get_args_parser().parse_args()
    process, classifier, backbone = start(args)
    classes = len(classifier.linear.bias)
    for corruption in args.corruptions:  # all are there before the first one runs
        for severity in SEVERITIES:
            require(Path(args.data) / corruption / str(severity), f"{args.data}/{LAYOUT}", WHERE)
    errors = {}
    for corruption in args.corruptions:
        errors[corruption] = []
        for severity in SEVERITIES:
            images = cell_images(args.data, corruption, severity, backbone.image_size, args.per_class,
                                 backbone.normalize)
            if len(images.classes) != classes:
                raise engine.InputError(f"data folder {images.root}: {len(images.classes)} class folders, the classifier "
                                       f"has {classes} classes")
            errors[corruption].append(1 - accuracy(classifier, images, args.batch_size, args.num_workers, process))
        if process.rank == 0:
            cells = "  ".join(f"{100 * error:6.2f}" for error in errors[corruption])
            print(f"{corruption:18}{cells}   mean {100 * sum(errors[corruption]) / 5:6.2f} %", flush=True)
    if process.rank == 0:
        means = corruption_means(errors)
        for name, what in (("mean19", "mean error over 19 corruptions (as in Table 8)"), ("mean15", "mean error over 15"),
                           ("mce", "mCE, divided by AlexNet's errors, over 15")):
            print(f"{what}: {'-' if means[name] is None else f'{means[name]:.2f} %'}", flush=True)
        record(args, "imagenet_c", backbone, {"per_class": args.per_class}, means | {"errors": errors})


if __name__ == "__main__":
    engine.run(main)
