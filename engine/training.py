"""The folder of a training run: what is in it, when it is saved, how it is resumed."""
import argparse
import shutil
import sys

import torch

from engine.checkpoint import printable
from engine.errors import InputError, Preempted, one_line
from engine.log import trim_log
from engine.process import get_rank, host_reduce

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"  # the newest state of a run and the one before


SAVE, STOP = 1, 2  # what a process wants to happen before the next batch


# Flags that may change in a resumed run without a word.
FREE_FLAGS = {"output_dir", "load_from", "overwrite", "num_workers", "print_freq", "device", "dist_url", "local_rank",
              "save_every_steps", "save_every_minutes", "on_save_error", "on_bad_image", "max_bad_images"}


def check_output(folder, load_from, overwrite, held):
    """Raise InputError when the output folder cannot take a run, or has no checkpoint `load_from` (None: a fresh start;
    "auto": whatever there is). held: files of another run in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file")
    if load_from not in (None, "auto") and not (folder / load_from).is_file():
        raise InputError(f"--load_from: {folder / load_from} does not exist")
    if held and not load_from and not overwrite:
        raise InputError(f"--output_dir {folder} already holds a run ({', '.join(path.name for path in held[:3])}): resume "
                         "with --load_from auto, start over with --overwrite true, or choose another folder")


def start_output(folder, epoch, held):
    """Make the output folder and remove what a killed run left half written; without `epoch` all files `held` of an earlier
    run, with it what `log.txt` says of that epoch and later ones, which will be run again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob(".checkpoint*.pth.tmp*"), *(held if epoch is None else ())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        trim_log(folder / "log.txt", epoch)  # there is none in a fresh start
    except OSError as error:
        raise InputError(f"--output_dir {error.filename or folder}: {error.strerror}") from error


def find_checkpoint(paths, read):
    """(path, content) of the first of `paths` that `read` takes; (None, None) if there are none.

    Raises InputError when all of them are bad.
    """
    for path in paths:
        try:
            return path, read(path)
        except InputError as error:
            if get_rank() == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if paths:
        raise InputError(f"--load_from auto: none of the {len(paths)} checkpoints in {paths[0].parent} can be used; "
                         "--overwrite true starts over")
    return None, None


def check_same_start(step, load_from, folder):
    """Raise InputError unless all processes are about to start at this step."""
    if host_reduce(step) != -host_reduce(-step):
        raise InputError(f"--load_from {load_from}: the processes found different checkpoints; all nodes must see the same "
                         f"{folder}")


def changed_flags(flags, checkpoint, free=FREE_FLAGS):
    """{name: line that says so} of the `flags` (values by name), but `free` ones, that a checkpoint's run had otherwise."""
    then = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), argparse.Namespace) else {}
    return {name: f"note: --{name} is {value}, the checkpoint's run had {printable(then[name])}"
            for name, value in flags.items() if name not in free and name in then and repr(then[name]) != repr(value)}


def check_finite(modules, epoch):
    """Raise FloatingPointError unless all weights and buffers are finite: what is not must not replace a checkpoint."""
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()]
    if not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
        raise FloatingPointError(f"a weight or centre became non-finite in epoch {epoch}; the last checkpoint is intact")


def not_saved(path, error, on_save_error):
    """Say that a checkpoint could not be written; raises InputError if `--on_save_error` is "stop"."""
    message = f"{path} could not be written ({one_line(error)}); the checkpoints before it are intact"
    if on_save_error == "stop":
        raise InputError(message) from error
    print(f"warning: {message}", file=sys.stderr, flush=True)


def stopped(saved, epoch, step):
    """The exception that ends a run after a signal; all processes call it. saved: whether this process could save."""
    if host_reduce(int(not saved)):  # also waits for process 0, which a launcher would kill when another ends
        return InputError("a signal asked to stop, but the run could not be saved")
    return Preempted(f"stopped by a signal at epoch {epoch}, step {step}, and saved: the same command with --load_from "
                     "auto goes on from there")

