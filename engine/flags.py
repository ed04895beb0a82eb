"""Flags that scripts share, their types and checks."""
import argparse
import math

from engine.errors import InputError
from engine.log import MAX_DROPPED


def bool_flag(text):
    """argparse type for `true/false`, `on/off`, `1/0` in any case."""
    word = text.lower()
    if word in ("true", "on", "1"):
        return True
    if word in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


SWITCH = {"type": bool_flag, "nargs": "?", "const": True}  # `--flag` alone is true


class _OneOrMore(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


SEVERAL = {"nargs": "+", "action": _OneOrMore}  # a string, and a list of them only where several are given


def add_device_flags(group):
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    group.add_argument("--dist_url", default="env://", help="rendezvous of several processes")
    # Old launchers pass it; the environment says the same.
    group.add_argument("--local_rank", "--local-rank", default=0, type=int, help=argparse.SUPPRESS)


def add_precision_flags(group):
    """Mixed precision, and what becomes of its failures; see `engine.choose_amp_dtype`, `engine.count_step`."""
    group.add_argument("--on_nonfinite", default="stop", choices=("stop", "skip"),
                       help="losses or gradients that are not finite: end the run, or go on without that update "
                            f"({MAX_DROPPED} in a row end it too)")
    group.add_argument("--use_fp16", default=True, help="mixed precision", **SWITCH)
    group.add_argument("--amp_dtype", default="auto", choices=("auto", "bfloat16", "float16"),
                       help="auto: bfloat16 on GPUs that have it and CPUs with matrix units for it (AMX), float16 with a "
                            "gradient scaler on other CUDA devices, off elsewhere")


def add_bad_image_flags(group):
    """Training images that cannot be read; see `engine.bad_images`."""
    group.add_argument("--on_bad_image", default="skip", choices=("error", "skip"),
                       help="skip: another image takes the place of one that cannot be read; counted and named")
    group.add_argument("--max_bad_images", default=0.01, type=float,
                       help="end the run when more images cannot be read: a share of all below 1, else a number")


def add_run_flags(group, overwrite=""):
    """The flags that `engine.Run` reads. overwrite: what else there is to say of that flag."""
    group.add_argument("--load_from", default=None,
                       help="resume from this file of the output folder, e.g. checkpoint.pth; auto: from the newest good "
                            "one, or a fresh start where there is none")
    group.add_argument("--overwrite", default=False, help="start over in an output folder that holds a run" + overwrite,
                       **SWITCH)
    group.add_argument("--save_every_steps", default=0, type=int, help="also save every so many updates; 0: never")
    group.add_argument("--save_every_minutes", default=0.0, type=float, help="the same by the clock")
    group.add_argument("--on_save_error", default="continue", choices=("continue", "stop"),
                       help="when a checkpoint cannot be written, e.g. on a full disk; the one before it stays")
    group.add_argument("--print_freq", default=10, type=int, help="steps between log lines; the device is read only then")
    group.add_argument("--seed", default=0, type=int)


def add_compile_flags(group, recompute):
    """Compilation, and what is kept for the backward pass: one of `recompute`."""
    group.add_argument("--compile", type=bool_flag, help="compile networks and loss at the first steps; default: on CUDA")
    group.add_argument("--recompute", choices=recompute,
                       help="what the backward pass computes again instead of keeping it: elementwise operations, or as "
                            "much as halves what is kept (both need --compile); blocks: all but each block's input; "
                            "default: elementwise where compiled, else none")
    group.add_argument("--grad_checkpointing", default=False, type=bool_flag, help="the same as --recompute blocks")


def need(condition, message):
    """Raise `InputError` unless `condition`."""
    if not condition:
        raise InputError(message)


# What `check_numbers` can ask for: which numbers are good, and how the others are called.
BOUNDS = {
    "count": (lambda value: value >= 1, "must be at least 1, not {}"),
    "not_negative": (lambda value: 0 <= value < math.inf, "must not be negative: {}"),
    "positive": (lambda value: 0 < value < math.inf, "must be positive: {}"),
    "share": (lambda value: 0 <= value <= 1, "must lie in 0..1: {}"),
    "below_1": (lambda value: 0 <= value < 1, "must lie in 0..1: {}"),
}


def check_numbers(args, **names):
    """Raise `InputError` for flags of `args` whose numbers cannot be: {kind of BOUNDS: "names of flags"}; None is good."""
    for kind, flags in names.items():
        good, words = BOUNDS[kind]
        for name in flags.split():
            value = getattr(args, name)
            need(value is None or good(value), f"--{name} " + words.format(value))
