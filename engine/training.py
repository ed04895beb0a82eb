"""A training run in its folder: where it stands, when it is saved and stopped, how it goes on, what is said of it.

A script calls a `Run` from its own loop; nothing here calls the script:

    with engine.Run(args, process, signals, folder) as run:
        run.find({"student": dict, ...}, "pre-training")
        run.resume({"student": student, ...}, total_batch, steps)
        run.start(notes)
        for run.epoch in range(run.epoch, args.epochs):
            for it in run.updates(steps):
                run.add(train_step(run.fetch(batches) ...))
                if run.is_log_step: run.log(...)
            run.end_epoch(stats)
            run.next_epoch()

Trainings that count in updates have epochs of as many as they like. `args` are those of a parser with `engine.flags`.
"""
import gc
import time
from contextlib import ExitStack
from functools import partial

import torch
from torch.utils.tensorboard import SummaryWriter

from engine.bad_images import BAD_IMAGES, check_images, gather_bad_images, write_bad_images
from engine.device import collecting_by_hand, peak_memory_mib, random_state, set_random_state
from engine.errors import InputError, Preempted
from engine.files import (
    FREE_FLAGS,
    PROGRESS,
    Files,
    changed_flags,
    find_checkpoint,
    notes_of_epoch,
    prepare_folder,
    read_checkpoint,
    write_checkpoint,
)
from engine.log import (
    DeviceMeters,
    add_row,
    append_log,
    close_writer,
    count_step,
    eta_string,
    log_scalars,
    mean_of,
)
from engine.parts import Named, load_part, state_of
from engine.process import gather_parts, host_reduce

SAVE, STOP = 1, 2  # what a process wants to happen before the next batch


class Run:
    """A training in its folder; all processes make one and call its methods together. Scripts read and set:
        args: what a checkpoint is to hold; entries: what it holds beside parts and progress.
        epoch, step: the next update; progress: see PROGRESS, with the script's own entries.
        path, checkpoint: what `find` found, or None.
        schedules: {name: float [updates]}, logged with each update.
        seconds_per_image: what the device needs at least, for the share of it that is used (MFU); None: not known.
        writer: TensorBoard's, on process 0 after `start`, if the run has events.
        beside: other runs that make the same updates: where this one is saved amid an epoch, they are too.
    """

    def __init__(self, args, process, signals, folder, files=Files(), own=None):  # noqa: B008 - frozen
        """own: {name: value at the beginning} of what the script adds to the progress."""
        self.args, self.process, self.signals, self.folder, self.files = args, process, signals, folder, files
        self.blank = {**PROGRESS, **(own or {})}
        self.progress = {name: value.copy() if isinstance(value, (dict, list)) else value
                         for name, value in self.blank.items()}
        self.entries, self.parts, self.schedules = {}, {}, {}
        self.epoch, self.path, self.checkpoint, self.steps, self.total_batch = 0, None, None, 0, 0
        self.dataset, self.writer, self.seconds_per_image, self.beside = None, None, None, []
        self.meters, self.kept, self.before = None, {}, None
        self.fetched, self.waited, self.since, self.since_step = 0, 0.0, time.time(), 0
        self.saved_at, self.known_bad, self.at_end = time.monotonic(), set(), ExitStack()

    @property
    def is_main(self):
        return self.process.rank == 0

    @property
    def step(self):
        """Updates made in this epoch."""
        return self.progress["step"]

    @property
    def update(self):
        """Updates made in all."""
        return self.epoch * self.steps + self.step

    # ---- going on

    def find(self, kinds, what, read=read_checkpoint):
        """Read the checkpoint that `--load_from` means into `path` and `checkpoint`, see `read_checkpoint`."""
        read = partial(read, kinds=kinds, what=what, blank=self.blank)
        if self.args.load_from == "auto":
            self.path, self.checkpoint = find_checkpoint(self.files.checkpoints(self.folder), read)
        elif self.args.load_from:
            self.path = self.folder / self.args.load_from
            self.checkpoint = read(self.path)

    def forget(self):
        """Start over in spite of what `find` found."""
        self.path = self.checkpoint = None

    def changes(self, free):
        """Lines that say what is resumed, and which flags its run had otherwise, but `free` ones."""
        if not self.path:
            return []
        return [f"resumed from {self.path}",
                *changed_flags(vars(self.args), self.checkpoint, FREE_FLAGS | free).values()]

    def resume(self, parts, total_batch, steps, images=None, may_lack=("fp16_scaler", "scaler")):
        """Load the parts {entry: network, optimiser, ...; None: there is none} from the checkpoint, if there is one.

        may_lack: entries that a file need not have. With other batches than before the epoch goes on behind the last whole
        one. total_batch: images of an update, of all processes; steps: updates of an epoch.

        images: of the folder, for a run with "folder" and "random" in its progress. Returns lines that say what is not as
        it was before a stop in mid-epoch.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.steps, self.total_batch, used = steps, total_batch, 0
        if self.path:
            for name, part in self.parts.items():
                if name in self.checkpoint or name not in may_lack:
                    load_part(name, part, self.checkpoint, self.path)
            self.epoch = self.checkpoint["epoch"]
            self.progress |= self.checkpoint.get("progress", {})
            used = self.step * self.progress["total_batch"]
            self.progress["step"] = min(used // total_batch, steps)
        self.checkpoint = None  # its tensors make room
        if host_reduce(self.update) != -host_reduce(-self.update):
            raise InputError(f"--load_from {self.args.load_from}: the processes found different checkpoints; all nodes "
                             f"must see the same {self.folder}")
        notes = []
        if images is not None:
            if used // total_batch > steps:
                raise InputError(f"checkpoint {self.path}: {used} images of its epoch were used, the folder has {images}")
            if used:
                notes = notes_of_epoch(self.progress, used % total_batch, images, self.process.world_size)
            self.progress["folder"] = images
        return notes

    def start(self, dataset=None):
        """Prepare the folder: what an earlier run left goes, or with `path` what is run again. Process 0 says where it is.

        dataset: of the training images, with `bad` and `source()`, see `engine.bad_images`.
        """
        self.dataset, self.known_bad = dataset, set(self.progress["bad"])
        self.at_end.enter_context(collecting_by_hand())
        if not self.is_main:
            return
        previous, newest = (self.folder / (name or "") for name in (self.files.previous, self.files.newest))
        fell_back = self.args.load_from == "auto" and self.path == previous
        prepare_folder(self.folder, self.files, self.epoch if self.path else None, fell_back)
        self.path = newest if fell_back else self.path
        if self.files.events:
            self.writer = SummaryWriter(self.folder / self.files.events, purge_step=self.update or None)
            self.at_end.callback(close_writer, self.writer)

    def draw_on(self):
        """In mid-epoch, with as many processes as before, random numbers go on as if there had been no stop."""
        if self.step and len(self.progress["random"]) == self.process.world_size:
            try:
                set_random_state(self.progress["random"][self.process.rank], self.process.device)
            except (RuntimeError, ValueError, IndexError, OverflowError) as error:
                raise InputError(f"checkpoint {self.path}: its random state cannot be used ({error})") from error

    def where(self):
        """Words that say where the run starts."""
        if self.epoch >= self.args.epochs:
            return f"nothing to do: {self.path} has finished {self.epoch} epochs"
        return f"starting at epoch {self.epoch} of {self.args.epochs}" + f", step {self.step}" * (self.step > 0)

    # ---- the loop

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """A bare `Preempted`, of `fetch`, is saved and raised again with words."""
        with self.at_end:
            if kind is not Preempted or error.args:
                return
            if self.before is not None:  # of the update that is given up, some batches were computed
                set_random_state(self.before, self.process.device)
            saved = self._save_amid()
            if host_reduce(int(not saved)):  # also waits for process 0, which a launcher would kill when another ends
                raise InputError("a signal asked to stop, but the run could not be saved") from None
            raise Preempted(f"stopped by a signal at epoch {self.epoch}, step {self.step}, and saved: the same command "
                            "with --load_from auto goes on from there") from None

    def updates(self):
        """Numbers of the updates that are left of the epoch; between them the run is saved, by `--save_every_steps`."""
        first = self.since_step = self.step
        self.waited, self.since = 0.0, time.time()
        for it in range(first, self.steps):
            if self.args.save_every_steps and it > first and self.update % self.args.save_every_steps == 0:
                self._save_amid()
            # With one batch an update nothing is drawn before a stop.
            amid = "random" in self.progress and self.args.accum_iter > 1
            self.before = random_state(self.process.device) if amid else None
            self.fetched = 0
            yield it
        self.before = None

    def is_log_step(self, it):
        """Whether the log is to say something after update `it`."""
        return (it + 1) % self.args.print_freq == 0 or it + 1 == self.steps

    def fetch(self, batches, training=True):
        """The next of an iterator's batches, None at its end. Raises a bare `Preempted` when any process got a signal.

        The hosts agree before each batch, so that all stop at the same one, whichever of them a signal or a stall met;
        before an update's first one `--save_every_minutes` saves.
        """
        since = time.time()
        batch = self.signals.wait_for(partial(next, batches, None))
        self.waited += time.time() - since
        minutes = self.args.save_every_minutes
        due = self.is_main and minutes and time.monotonic() - self.saved_at > 60 * minutes
        want = host_reduce(STOP if self.signals.received else SAVE if due else 0)
        if want == STOP:
            raise Preempted
        if want == SAVE and training and not self.fetched:
            self._save_amid()
        self.fetched += 1
        return batch

    def add(self, means, **kept):
        """Note an update: its means by name, 0-d tensors; kept: integers [B] that a checkpoint holds of the whole epoch."""
        self.progress["step"] += 1
        if means:
            self.meters = self.meters or DeviceMeters(tuple(means))
            self.meters.add(*means.values())
        for name, values in kept.items():
            self._kept(name).append(values)

    def _kept(self, name):
        # What a checkpoint held is of all processes; one of them goes on with it.
        stored = self.progress[name][:None if self.is_main else 0]
        return self.kept.setdefault(name, [stored.to(self.process.device)])

    def gathered(self, name):
        """What was kept under that name in this epoch, of all processes: int64 [images] on the CPU."""
        return torch.cat(gather_parts(torch.cat(self._kept(name)))).cpu()

    def _read(self):
        """Bring what the device still holds into progress and events; the one wait for the device. Returns the rows."""
        rows = self.meters.read() if self.meters else []
        scaler = next((part for part in self.parts.values() if isinstance(part, torch.amp.GradScaler)), None)
        for update, row in enumerate(rows, start=self.update - len(rows)):
            row |= {name: float(values[update]) for name, values in self.schedules.items()}
            if scaler is not None:
                row["loss_scale"] = scaler.get_scale()
            count_step(self.progress, update, row, scaler is not None, self.args.on_nonfinite, quiet=not self.is_main)
            log_scalars(self.writer, "step", row, update)
        return rows

    def add_rows(self, rows):
        """Add values by name, means over processes, to those of the epoch and to the events of the last update."""
        for row in rows:
            if "nonfinite" not in row:
                add_row(self.progress, row)
                log_scalars(self.writer, "step", row, self.update - 1)

    def speed(self):
        """Images a second since the last log line of this epoch, and seconds that are left of the run."""
        elapsed, updates = time.time() - self.since, self.step - self.since_step
        left = (self.args.epochs * self.steps - self.update) * elapsed / updates
        return updates * self.total_batch / elapsed, left

    def log(self, printed=(), note=""):
        """The log line of this step, with values and means of `printed` and `note`; bad images are counted."""
        last, elapsed = (self._read() or [{}])[-1], time.time() - self.since
        if self.is_main:
            rate, left = self.speed()
            speed = {"images_per_second": rate}
            if self.seconds_per_image:  # model FLOPs utilisation, of all devices
                speed["mfu"] = rate * self.seconds_per_image / self.process.world_size
            print(f"epoch {self.epoch}/{self.args.epochs} [{self.step:>{len(str(self.steps))}}/{self.steps}]"
                  + "".join(f"  {name} {last[name]:.4f} ({mean_of(self.progress, name):.4f})" for name in printed)
                  + (f"  lr {last['lr']:.2e}" if "lr" in last else "") + (f"  wd {last['wd']:.3f}" if "wd" in last else "")
                  + note + f"  {rate:.1f} images/s" + (f"  mfu {100 * speed['mfu']:.1f} %" if "mfu" in speed else "")
                  + f"  data {100 * self.waited / elapsed:.0f} %  memory {peak_memory_mib(self.process.device):.0f} MiB"
                  f"  eta {eta_string(left)}", flush=True)
            log_scalars(self.writer, "step", speed, self.update - 1)
        self.waited, self.since, self.since_step = 0.0, time.time(), self.step
        if self.dataset is not None:
            check_images(self.dataset, self.known_bad, self.args.max_bad_images, self.folder, self.process.device)
        gc.collect(1)  # young objects: the others wait for the end of the epoch

    def means(self):
        """Means of the epoch so far, by name."""
        return {name: mean_of(self.progress, name) for name in self.progress["totals"]}

    def end_epoch(self, line, scalars, note=""):
        """Write an epoch's line of log.txt and its events, say its values, list bad images. `note` ends what is said."""
        gc.collect()
        bad = [] if self.dataset is None else gather_bad_images(self.dataset, self.known_bad, self.process.device)
        if not self.is_main:
            return
        log_scalars(self.writer, "epoch", scalars, self.epoch)
        append_log(self.folder / "log.txt", {**line, "epoch": self.epoch})
        print(f"epoch {self.epoch} done: " + "  ".join(f"{k} {v:.4g}" for k, v in scalars.items()) + note, flush=True)
        if bad:
            write_bad_images(self.folder, bad)
            print(f"skipped {len(bad)} unreadable images so far; the first: {', '.join(bad[:10])}; all: "
                  f"{self.folder / BAD_IMAGES}", flush=True)

    def next_epoch(self, names=(), save=True):
        """Begin the next epoch, and save unless it is not to be; under other `names` too."""
        own = {name: value for name, value in self.blank.items() if torch.is_tensor(value)}
        self.progress |= {"step": 0, "totals": {}, "counts": {}, **own}
        self.epoch, self.kept = self.epoch + 1, {}
        return self.save(names) if save else True

    # ---- saving

    def _save_amid(self):
        return all([run.save() for run in (self, *self.beside)])

    def save(self, names=()):
        """Write the newest checkpoint, from which the next update is to be made, and the same file as `names`.

        Returns False if this process should and could not. Raises FloatingPointError for weights that are not finite: what
        is not must not replace a checkpoint.
        """
        self._read()
        device = self.process.device
        own = {"total_batch": self.total_batch, **{name: self.gathered(name) for name in self.kept}}
        if self.dataset is not None:
            own["bad"] = gather_bad_images(self.dataset, self.known_bad, device)
        if "random" in self.progress:
            own["random"] = [part.cpu() for part in gather_parts(random_state(device).to(device))]
        state = {**{name: state_of(part) for name, part in self.parts.items()}, "epoch": self.epoch, "args": self.args,
                 **self.entries, "progress": self.progress | own}
        tensors = [x for name, part in self.parts.items() if isinstance(part, (torch.nn.Module, Named))
                   for x in state[name].values() if x.is_floating_point()]
        if tensors and not torch.stack(torch._foreach_norm(tensors)).isfinite().all():
            raise FloatingPointError(f"a weight or centre became non-finite in epoch {self.epoch}; the last checkpoint is "
                                     "intact")
        saved = not self.is_main or write_checkpoint(state, self.folder, self.files, names, self.args.on_save_error)
        self.saved_at = time.monotonic()
        return saved
