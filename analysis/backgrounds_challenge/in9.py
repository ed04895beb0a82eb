"""ImageNet-9 (Xiao et al., 2021): its folders, and ImageNet's classes that belong to its nine."""
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms import v2

import engine
from analysis.classifier import classifier_parser, require
from analysis.common import image_folder
from evaluation.common.arguments import int_from

WHERE = "https://github.com/MadryLab/backgrounds_challenge"
DATA = "data/imnet_bg/bg_challenge"
VARIANTS = ("mixed_next", "mixed_rand", "mixed_same", "no_fg", "only_bg_b", "only_bg_t", "only_fg", "original")

# Indices of ImageNet-1k, first-last or single: dog, bird, vehicle, reptile, carnivore, insect, instrument, primate, fish.
CLASSES = (
    "151-170 173-268",
    "7-24 87-100 127-146",
    "407-408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670-671 675 690 705 717 734 751 "
    "757 791 802-803 817 820 829 847 864 866-867 870 880",
    "33-68",
    "269-280 286-299 356-362 387-388",
    "300-326",
    "401-402 420 432 486 494 513 541 546 558 566 577 579 593-594 641-642 683-684 687 699 776 822 875 881 889",
    "365-384",
    "0-6 389-397")


def class_map():
    """int64 [1000]: class of ImageNet-9, 0 to 8, of each class of ImageNet; -1 for those that are in none."""
    numbers = torch.full((1000,), -1)
    for label, text in enumerate(CLASSES):
        for part in text.split():
            first, _, last = part.partition("-")
            numbers[int(first):int(last or first) + 1] = label
    return numbers


def right(logits, labels):
    """Whether the class of ImageNet-9 of the largest of all logits is the label's: bool [B].

    Logits are those of ImageNet's classes, [B, 1000], or of ImageNet-9's own, [B, 9].
    """
    found = logits.argmax(dim=1)
    return (found if logits.shape[1] == 9 else class_map().to(logits.device)[found]) == labels


def in9_parser(description):
    """`classifier_parser` with the flags of both tests of backgrounds."""
    parser = classifier_parser(description, DATA, data_flag="--data-path")
    parser.add_argument("--in9", action="store_true", help="the classifier has the nine classes of ImageNet-9, in the "
                        "order of the folders; images are normalised as elsewhere here")
    # Each counts in one of the two scripts; eval_bg_challenge.sh gives all flags to both.
    parser.add_argument("--eval-dataset", dest="variants", choices=VARIANTS, nargs="+", default=list(VARIANTS),
                        help="variants that in9_eval.py tests")
    parser.add_argument("--foregrounds", type=int_from(1), help="how many challenge_eval.py tries; by default all")
    return parser


def of_size(image, size, folder):
    """The PIL image as it is, if its (width, height) is `size`; else raises InputError: nothing is resized here."""
    if image.size != size:
        raise engine.InputError(f"data folder {folder}: an image of {image.width} x {image.height} pixels, others have "
                               f"{size[0]} x {size[1]} ({WHERE})")
    return image


def variant_images(data, variant, normalize=None):
    """The images DATA/VARIANT/val/CLASS/*, labels 0 to 8, not resized: uint8 [3, S, S], or what `normalize` makes of it."""
    folder = Path(data) / variant / "val"
    require(folder, f"{data}/VARIANT/val/CLASS/*.JPEG with the variants {', '.join(VARIANTS)}", WHERE)
    images = image_folder(folder)
    if len(images.classes) != 9:
        raise engine.InputError(f"data folder {folder}: {len(images.classes)} class folders, ImageNet-9 has 9 ({WHERE})")
    check = partial(of_size, size=images[0][0].size, folder=folder)
    return images.with_transform(v2.Compose([check, v2.PILToTensor(), normalize or v2.Identity()]))
