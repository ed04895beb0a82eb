"""Natural adversarial examples (iBOT, Table 8): accuracy, calibration error and AURRA on ImageNet-A.

    python analysis/natural_adv_examples/eval.py --checkpoint classifier.pth --data data/imnet_a/imagenet-a

Only the outputs of ImageNet-A's 200 classes take part. Measures as in Hendrycks et al. (2021).

Letter: n images.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torchvision.transforms import v2

import engine
from analysis.classifier import classifier_parser, record, require, start
from analysis.common import centre, image_folder
from evaluation.common.features import extract_features, sharded_loader

WHERE = "https://github.com/hendrycks/natural-adv-examples"

# Index in ImageNet-1k of each class of ImageNet-A, in the order of its sorted folders.
CLASSES = tuple(map(int, """
    6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113 124 125 130 132
    143 144 150 151 207 234 235 254 277 283 287 291 295 298 301 306 307 308 309 310 311 313 314 315 317 319 323 324
    326 327 330 334 335 336 347 361 363 372 378 386 397 400 401 402 404 407 411 416 417 420 425 428 430 437 438 445
    456 457 461 462 470 472 483 486 488 492 496 514 516 528 530 539 542 543 549 552 557 561 562 569 572 573 575 579
    589 606 607 609 614 626 627 640 641 642 643 658 668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768
    773 774 776 779 780 786 792 797 802 803 804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879 880 888
    890 897 900 907 913 924 932 933 934 937 943 945 947 951 954 956 957 959 971 972 980 981 984 986 987 988""".split()))


def get_args_parser():
    parser = classifier_parser("Accuracy and calibration on ImageNet-A", "data/imnet_a/imagenet-a")
    parser.set_defaults(batch_size=128)
    return parser


def calibration_error(confidence, right, bin_size=100, all_bins=True):
    """Root mean square difference of confidence and accuracy in bins of equal confidence, a share: inputs float [n].

    Images are sorted by confidence and cut into bins of `bin_size`, the last one with the rest. The published tool leaves
    the last bin, the most confident one, out of the sum (`all_bins=False`): then there is no value (None) below two bins.
    """
    n = len(confidence)
    order = confidence.argsort(stable=True)
    bins = max(1, n // bin_size)
    if bins == 1 and not all_bins:
        return None
    total = 0.0
    for b in range(bins if all_bins else bins - 1):
        part = order[b * bin_size:(b + 1) * bin_size if b + 1 < bins else n]
        total += len(part) / n * (confidence[part].double().mean() - right[part].double().mean()).item() ** 2
    return total ** 0.5


def aurra(confidence, right):
    """Area under the response rate accuracy curve: mean over m of the accuracy on the m most confident images, a share."""
    hits = right[confidence.argsort(descending=True, stable=True)].double().cumsum(0)
    return (hits / torch.arange(1, len(hits) + 1)).mean().item()


def main():
    args = get_args_parser().parse_args()
    process, classifier, backbone = start(args, 1000)
    require(Path(args.data), f"{args.data}/WNID/*.jpg, the 200 folders of imagenet-a.tar", WHERE)
    images = image_folder(args.data, v2.Compose([centre(backbone.image_size), v2.PILToTensor(), backbone.normalize]))
    if len(images.classes) != len(CLASSES):
        raise engine.InputError(f"data folder {args.data}: {len(images.classes)} class folders, ImageNet-A has 200; "
                               "is it the folder imagenet-a itself?")

    def confidence_and_class(batch):
        confidence, label = classifier(batch)[:, list(CLASSES)].softmax(dim=1).max(dim=1)
        return torch.stack((confidence, label.float()), dim=1)

    loader = sharded_loader(images, args.batch_size, args.num_workers, process)
    found, labels = extract_features(confidence_and_class, loader, process, "ImageNet-A")
    if process.rank > 0:
        return
    confidence, right = found[:, 0], found[:, 1].long() == labels
    published = calibration_error(confidence, right, all_bins=False)
    metrics = {"acc": 100 * right.double().mean().item(), "rms_calibration_published": published and 100 * published,
               "rms_calibration": 100 * calibration_error(confidence, right), "aurra": 100 * aurra(confidence, right)}
    print(f"ImageNet-A, {len(images)} images: accuracy {metrics['acc']:.4f} %, AURRA {metrics['aurra']:.2f} %")
    without = "none, it needs 200 images" if published is None else f"{metrics['rms_calibration_published']:.2f} %"
    print(f"RMS calibration error: {metrics['rms_calibration']:.2f} %; without the most confident bin, as published: "
          f"{without}", flush=True)
    record(args, "imagenet_a", backbone, {"images": len(images)}, metrics)


if __name__ == "__main__":
    engine.run(main)
