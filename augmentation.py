"""What is done to the colours and turns of crops, and what their pixels are normalised with: flags, presets, checks."""
import argparse
from typing import NamedTuple

from engine import InputError, need
from images import IMAGENET, PixelStats, check_pixel_stats, folder_stats, stored_pixel_stats


class Augment(NamedTuple):
    """What is done to crops: probabilities; of three, for the first global crop, other global crops and local crops.

    rotate90: of a turn by 0, 90, 180 or 270 degrees, each as likely. color_jitter: a probability, then the largest changes
    of brightness, contrast, saturation (factors of 1 minus to 1 plus that) and hue (in turns). These are the reference's.
    """
    hflip: float = 0.5
    vflip: float = 0.0
    rotate90: float = 0.0
    color_jitter: tuple[float, ...] = (0.8, 0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: tuple[float, ...] = (1.0, 0.1, 0.5)
    solarize: tuple[float, ...] = (0.0, 0.2, 0.0)


NEVER = (0.0, 0.0, 0.0)
AUGMENT_PRESETS = {
    "photos": Augment(),
    "grey": Augment(color_jitter=(0.8, 0.4, 0.4, 0.0, 0.0), grayscale=0.0, solarize=NEVER),
    "overhead": Augment(vflip=0.5, rotate90=1.0, color_jitter=(0.8, 0.4, 0.4, 0.2, 0.05), grayscale=0.1, solarize=NEVER),
    # BEiT's: colours always change, no blur, grey or inversion (arXiv 2106.08254); with --global_crops_scale 0.08 1
    "beit": Augment(color_jitter=(1.0, 0.4, 0.4, 0.4, 0.0), grayscale=0.0, blur=NEVER, solarize=NEVER),
    "none": Augment(hflip=0.0, color_jitter=(0.0,) * 5, grayscale=0.0, blur=NEVER, solarize=NEVER),
}


def check_augment(augment):
    """Raise `InputError`, naming the flag, for numbers of an `Augment` that are too few or none that can be."""
    for name, value, like in zip(Augment._fields, augment, Augment(), strict=True):
        values, count = (value, len(like)) if isinstance(like, tuple) else ((value,), 1)
        if len(values) != count:
            what = "P B C S H" if name == "color_jitter" else "for the first global, other global and local crops"
            raise InputError(f"--{name} takes {count} numbers ({what}), not {len(values)}")
        if not all(0 <= v <= 1 for v in values):
            raise InputError(f"--{name} must lie in 0..1: {' '.join(map(str, values))}")
    if augment.color_jitter[4] > 0.5:
        raise InputError(f"--color_jitter: its last number, the hue, must lie in 0..0.5: {augment.color_jitter[4]}")


def add_augment_flags(group):
    numbers = {"type": float, "nargs": "+"}
    group.add_argument("--augment", default="photos", choices=tuple(AUGMENT_PRESETS),
                         help="sets the flags below that are not given; photos: the reference's values")
    group.add_argument("--hflip", type=float, metavar="P", help="probability of a flip left to right; photos: 0.5")
    group.add_argument("--vflip", type=float, metavar="P", help="the same top to bottom; photos: 0")
    group.add_argument("--rotate90", type=float, metavar="P",
                         help="probability of a turn by 0, 90, 180 or 270 degrees, each as likely; photos: 0")
    group.add_argument("--color_jitter", metavar=("P", "B C S H"), help="probability, then the largest change of "
                         "brightness, contrast, saturation and hue (in turns); photos: 0.8 0.4 0.4 0.2 0.1", **numbers)
    group.add_argument("--grayscale", type=float, metavar="P", help="probability of no colours; photos: 0.2")
    group.add_argument("--blur", metavar=("P1", "P2 PL"), help="probability of a Gaussian blur of 0.1..2 pixels for the "
                         "first global crop, other global crops, local crops; photos: 1 0.1 0.5", **numbers)
    group.add_argument("--solarize", metavar=("P1", "P2 PL"),
                         help="the same for inverting what is brighter than the middle; photos: 0 0.2 0", **numbers)
    group.add_argument("--pixel_stats", default="imagenet", choices=("imagenet", "auto"),
                         help="what pixels are normalised with; auto: mean and standard deviation of a thousand images")
    group.add_argument("--mean", help="of red, green and blue, in 0..1, instead", **numbers)
    group.add_argument("--std", help="their standard deviations", **numbers)


def check_augment_flags(args):
    """Raise `InputError`, naming the flag, for values that cannot be."""
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        need(0 < low <= high <= 1, f"--{name} takes two areas 0 < low <= high <= 1, not {low} {high}")
    check_augment(augment_of(args))
    need((args.mean is None) == (args.std is None), "--mean and --std go together: give both or none")
    need(args.mean is None or args.pixel_stats != "auto", "--pixel_stats auto and --mean: give one of them")
    if args.mean is not None:
        check_pixel_stats(PixelStats(args.mean, args.std))


def augment_of(args):
    """The `Augment` of the preset and the flags that are given."""
    preset = AUGMENT_PRESETS[args.augment]
    return preset._replace(**{name: getattr(args, name) for name in preset._fields if getattr(args, name) is not None})


def pixel_stats_of(args, path, checkpoint, dataset, device):
    """The `PixelStats` of a run; all processes call it. `auto` takes those of a `checkpoint` that is resumed."""
    if args.mean is not None:
        return PixelStats(tuple(args.mean), tuple(args.std))
    if args.pixel_stats == "imagenet":
        return IMAGENET
    if checkpoint is not None:
        return stored_pixel_stats(checkpoint, path)
    return folder_stats(dataset, device)


def with_resolved(args, stats):
    """A copy of `args` in which the flags of the augmentation and of the pixels have the values that are used."""
    values = {name: list(value) if isinstance(value, tuple) else value
              for name, value in {**augment_of(args)._asdict(), **stats._asdict()}.items()}
    return argparse.Namespace(**{**vars(args), **values})
