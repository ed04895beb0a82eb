"""Meters and logs."""
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from engine.process import all_reduce_mean, gather_parts, is_main_process

MAX_DROPPED = 20  # updates in a row; float16's scaler finds its scale in fewer


def add_row(progress, row):
    """Add the values of a row to the sums of an epoch: `progress` has "totals" and "counts" by name."""
    for name, value in row.items():
        progress["totals"][name] = progress["totals"].get(name, 0.0) + value
        progress["counts"][name] = progress["counts"].get(name, 0) + 1


def mean_of(progress, name):
    return progress["totals"][name] / progress["counts"][name] if name in progress["totals"] else math.nan


def count_step(progress, step, row, has_scaler, on_nonfinite, quiet):
    """Add a step's row to the means of the epoch, unless its update was dropped ("nonfinite" in it): then say so, or raise.

    `progress["dropped"]` counts updates dropped in a row. Raises FloatingPointError by `--on_nonfinite`.
    """
    failed = row.get("nonfinite")
    if failed is None:
        progress["dropped"] = 0
        return add_row(progress, row)
    progress["dropped"] += 1
    if has_scaler and math.isfinite(row["loss"]):  # float16 gradients overflow now and then
        failed = "float16 gradients overflow"
    elif on_nonfinite == "stop":
        raise FloatingPointError(f"not finite at step {step}: {failed} (learning rate {row['lr']:.3g}). The update was not "
                                 "made, the last checkpoint is intact. --on_nonfinite skip goes on; with float16, try "
                                 "--amp_dtype bfloat16 or --use_fp16 false")
    elif not quiet:
        print(f"warning: step {step} dropped, not finite: {failed}", flush=True)
    if progress["dropped"] >= MAX_DROPPED:
        raise FloatingPointError(f"{MAX_DROPPED} updates in a row dropped up to step {step}: {failed}; the last checkpoint "
                                 "is intact")


def log_scalars(writer, group, values, step):
    """Values by name to TensorBoard, if there is a writer. A full disk is a warning."""
    if writer is None:
        return
    try:
        for name, value in values.items():
            if name != "nonfinite":
                writer.add_scalar(f"{group}/{name}", value, step)
    except OSError as error:
        say_once(f"warning: TensorBoard's events cannot be written ({error.strerror})")


def close_writer(writer):
    """Write TensorBoard's last events. A full disk is a warning."""
    try:
        writer.close()
    except OSError as error:
        say_once(f"warning: TensorBoard's events cannot be written ({error.strerror})")


class DeviceMeters:
    """Values of the steps since the last `read`, kept on the device so that the step never waits for the host."""

    def __init__(self, names):
        self.names = names
        self.pending = []

    def add(self, *values):
        """Values in the order of `names`: 0-d device tensors, or numbers."""
        device = next(v.device for v in values if torch.is_tensor(v))
        self.pending.append(torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in values]))

    def read(self):
        """Means over processes, {name: float} for each step. Waits for the device; all processes call it together.

        Where a mean is not finite, "nonfinite" says of which values and on which processes.
        """
        if not self.pending:
            return []
        own, self.pending = torch.stack(self.pending), []
        means = all_reduce_mean(own.clone()).tolist()
        rows = [dict(zip(self.names, row, strict=True)) for row in means]
        if not all(math.isfinite(value) for row in means for value in row):
            parts = [part.view(own.shape) for part in gather_parts(own.flatten())]
            for i, row in enumerate(rows):
                found = [f"{name} {part[i, k].item()}{f' on process {rank}' if len(parts) > 1 else ''}"
                         for k, name in enumerate(self.names) for rank, part in enumerate(parts)
                         if not part[i, k].isfinite()]
                row |= {"nonfinite": ", ".join(found)} if found else {}
        return rows


@lru_cache
def say_once(text):
    """Print a line on stderr, on process 0, the first time only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def append_log(path, line):
    """Add a dictionary as a line to a log; numbers that are not finite become null. A full disk is a warning."""
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        say_once(f"warning: {path} cannot be written ({error.strerror})")


def trim_log(path, epoch):
    """Leave in `path`, a JSON object with "epoch" per line, the epochs before `epoch`; half lines go. May be missing."""
    def is_kept(line):
        try:
            return line.endswith("\n") and json.loads(line)["epoch"] < epoch
        except (ValueError, KeyError, TypeError):  # of a full disk or a kill
            return False

    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if is_kept(line)]
        if kept != lines:
            path.write_text("".join(kept))


def eta_string(seconds):
    return str(datetime.timedelta(seconds=int(seconds)))


def describe_run(args, process):
    """Lines that identify a run: commit, arguments, versions, device."""
    import timm
    import torchvision
    on_gpu = process.device.type == "cuda"
    device = torch.cuda.get_device_name(process.device) if on_gpu else platform.processor() or platform.machine()
    lines = [f"commit: {git_commit()}", f"started: {time.strftime('%Y-%m-%d %H:%M:%S')}",
             f"versions: python {platform.python_version()}, torch {torch.__version__}, "
             f"torchvision {torchvision.__version__}, timm {timm.__version__}, numpy {np.__version__}",
             f"device: {process.device} ({device}), {process.world_size} process(es), "
             f"{torch.get_num_threads()} threads each"]
    return "\n".join(lines + [f"{name}: {value}" for name, value in sorted(vars(args).items())])


def git_commit():
    """Commit of this checkout, marked when it has uncommitted changes; `unknown` outside a checkout."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode:
            return "unknown"
        changed = git("status", "--porcelain", "-uno").stdout.strip()
        return commit.stdout.strip() + (" with local changes" if changed else "")
    except FileNotFoundError:  # no git on this machine
        return "unknown"

