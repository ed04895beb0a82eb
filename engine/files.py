"""Files in the folder of a run: their names, whether the folder can be used, which checkpoint to go on from."""
import os
import reprlib
import shutil
import sys
from dataclasses import dataclass

import torch

from engine.bad_images import BAD_IMAGES
from engine.checkpoint import load_checkpoint, printable, save_atomically, stored_args
from engine.errors import InputError, one_line
from engine.log import trim_log
from engine.process import get_rank

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"  # the newest state of a run and the one before
# Flags that may change in a resumed run without a word.
FREE_FLAGS = {"output_dir", "load_from", "overwrite", "num_workers", "print_freq", "device", "dist_url", "local_rank",
              "save_every_steps", "save_every_minutes", "on_save_error", "on_bad_image", "max_bad_images"}
# What a checkpoint holds of the running epoch: updates made, sums and counts of the meters, updates dropped in a row; and
# of the run: names of bad images, images of an update.
PROGRESS = {"step": 0, "totals": {}, "counts": {}, "dropped": 0, "bad": [], "total_batch": 0}


# ---------------------------------------------------------------- the folder

@dataclass(frozen=True)
class Files:
    """Names of a run's files, beside log.txt and the list of bad images: the newest checkpoint and the one before it,
    pattern of those that stay, the best one, the folder of TensorBoard's events, and what else the script writes. None, and
    "" for the pattern: there is no such file."""
    newest: str = CHECKPOINT
    previous: str | None = PREVIOUS
    numbered: str = "checkpoint[0-9]*.pth"
    best: str | None = None
    events: str | None = "tf_logs"
    others: tuple[str, ...] = ()

    def checkpoints(self, folder):
        """Checkpoints in `folder`, newest first; the best one last."""
        numbered = sorted(folder.glob(self.numbered) if self.numbered else (),
                          key=lambda path: (len(path.name), path.name), reverse=True)
        names = [name for name in (self.newest, self.previous) if name]
        found = [*(folder / name for name in names), *numbered, *([folder / self.best] if self.best else ())]
        return [path for path in found if path.exists()]

    def held(self, folder):
        """All files of a run, as far as they are there."""
        others = (folder / name for name in ("log.txt", self.events, BAD_IMAGES, *self.others) if name)
        return self.checkpoints(folder) + [path for path in others if path.exists()]


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


def copy_file(path, other):
    """Another name for a file that is only ever replaced, not changed; a copy where there are no hard links."""
    temporary = other.with_name(f".{other.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, other)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(folder, files, epoch, fell_back):
    """Make the folder and remove what a killed run left half written; without `epoch` all files of an earlier run, with it
    what `log.txt` says of that epoch and later ones, which will be run again.

    fell_back: the newest checkpoint is damaged; the one before takes its place, lest the next save keeps the damaged one.
    """
    try:
        if fell_back:
            (folder / files.previous).replace(folder / files.newest)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob(".checkpoint*.pth.tmp*"), *(files.held(folder) if epoch is None else ())]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        trim_log(folder / "log.txt", epoch)  # there is none in a fresh start
    except OSError as error:
        raise InputError(f"--output_dir {error.filename or folder}: {error.strerror}") from error


def write_checkpoint(state, folder, files, names, on_save_error):
    """Write the newest checkpoint, and the same file as `names`. Returns whether that worked, see `--on_save_error`."""
    path = folder / files.newest
    try:
        save_atomically(state, path, previous=files.previous and folder / files.previous)
        for name in names:
            path = folder / name
            copy_file(folder / files.newest, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        message = f"{path} could not be written ({one_line(error)}); the checkpoints before it are intact"
        if on_save_error == "stop":
            raise InputError(message) from error
        print(f"warning: {message}", file=sys.stderr, flush=True)
        return False
    return True


# ---------------------------------------------------------------- reading

def read_checkpoint(path, kinds, what, blank=PROGRESS):
    """Content of a file to resume from. Raises InputError when an entry is missing or of another kind.

    Args:
        kinds: {entry: type}; "progress" among them must be there, else it may.
        what: name of the training.
        blank: the progress of a run that begins: what is stored has the same names and kinds of values.
    """
    checkpoint = load_checkpoint(path)
    kinds = {**kinds, "epoch": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise InputError(f"checkpoint {path} is none of {what}: it lacks {', '.join(lacking)}")
    if isinstance(checkpoint["epoch"], bool) or not 0 <= checkpoint["epoch"] < 2**31:
        raise InputError(f"checkpoint {path}: its epoch is {printable(checkpoint['epoch'])}")
    stored_args(checkpoint, path)
    if "progress" in checkpoint:
        progress = checkpoint["progress"]
        if not (isinstance(progress, dict) and progress.keys() == blank.keys()
                and all(_is_like(progress[name], value) for name, value in blank.items())
                and progress["totals"].keys() == progress["counts"].keys()
                and all(count >= 1 for count in progress["counts"].values()) and progress["total_batch"] >= 1):
            raise InputError(f"checkpoint {path}: its entry 'progress' cannot be used")
    return checkpoint


def _is_like(value, blank):
    """Whether a value of a file is like `blank`: a count, a text, numbers by name, a vector, a list of texts or states."""
    if type(value) is not type(blank):
        return False
    if isinstance(blank, int):
        return 0 <= value < 2**40
    if isinstance(blank, dict):
        return all(type(number) in (int, float) for number in value.values())
    if torch.is_tensor(blank):
        return value.dtype is blank.dtype and value.ndim == 1
    if isinstance(blank, list):
        return all(isinstance(item, str) or torch.is_tensor(item) and item.dtype is torch.uint8 and item.ndim == 1
                   for item in value)
    return True


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


_short = reprlib.Repr()  # of foreign values, however deep
_short.maxstring = _short.maxother = _short.maxlist = 4000


def changed_flags(flags, checkpoint, free=FREE_FLAGS):
    """{name: line that says so} of the `flags` (values by name), but `free` ones, that a checkpoint's run had otherwise."""
    then = stored_args(checkpoint, "of the run")
    return {name: f"note: --{name} is {value}, the checkpoint's run had {printable(then[name])}"
            for name, value in flags.items()
            if name not in free and name in then and _short.repr(then[name]) != _short.repr(value)}


def notes_of_epoch(progress, again, images, processes):
    """Lines that say what is not as it was before a stop in mid-epoch.

    progress: a checkpoint's, with "folder" and "random"; again: images of that epoch that come again; images: of the
    folder; processes: of this run.
    """
    notes, before = [], len(progress["random"])
    if before != processes:
        notes.append(f"note: {processes} processes instead of {before}: in this epoch images are shared out, and drop path "
                     "is drawn, otherwise than without the stop")
    if again:
        notes.append(f"note: other batches than before: the last {again} images that were used come again")
    if progress["folder"] != images:
        notes.append(f"note: the folder holds {images} images instead of {progress['folder']}: the rest of this epoch is "
                     "drawn from another order")
    return notes
