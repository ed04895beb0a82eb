"""Images that cannot be read, in a run: found by all processes, named in a file, counted against `--max_bad_images`."""
import torch

from engine.errors import InputError
from engine.log import say_once
from engine.process import get_world_size, host_reduce, is_main_process

BAD_IMAGES = "bad_images.txt"


def bad_files(dataset):
    """Paths of the files found bad so far: `dataset.source(index)` of those that are marked in `dataset.bad`, uint8 [n]."""
    return [dataset.source(index) for index in dataset.bad.nonzero().flatten().tolist()]


def gather_bad_images(dataset, before, device):
    """Sorted paths of all images found unreadable, by any process, and `before` a resume. All processes call it."""
    if get_world_size() > 1:
        bad = dataset.bad.to(device, copy=True)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        torch.maximum(dataset.bad, bad.cpu(), out=dataset.bad)  # workers may have found more meanwhile
    return sorted(before | set(bad_files(dataset)))


def write_bad_images(output_dir, names):
    """List bad images in the output folder. A full disk is a warning."""
    try:
        (output_dir / BAD_IMAGES).write_text("\n".join(names) + "\n")
    except OSError as error:
        say_once(f"warning: {output_dir / BAD_IMAGES} cannot be written ({error.strerror})")


def check_images(dataset, before, most, output_dir, device):
    """Raise `InputError`, after naming them in a file, when too many images are bad (`--max_bad_images`)."""
    limit = most * len(dataset) if most < 1 else most
    if host_reduce(int(dataset.bad.sum()), "sum") + len(before) <= limit:  # some may count twice
        return
    bad = gather_bad_images(dataset, before, device)
    if len(bad) > limit:
        if is_main_process():
            write_bad_images(output_dir, bad)
        raise InputError(f"{len(bad)} of {len(dataset)} images cannot be read, more than --max_bad_images {most:g}; "
                         f"{output_dir / BAD_IMAGES} has their names")
