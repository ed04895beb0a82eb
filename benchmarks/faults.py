"""Faults on purpose: a training is stopped at a random moment and started again by the same command; its end must be, bit
for bit, that of the run which nobody disturbed. On a GPU, whose sums come in any order, only the lines of log.txt are
compared, to 1 % of each loss.

    python benchmarks/faults.py --trials 50                             # kill -9 of pre-training, 50 times
    python benchmarks/faults.py --trials 20 --task finetune             # the same of fine-tuning; linear: of a probe
    python benchmarks/faults.py --trials 10 --fault term corrupt process disk

Faults: `kill` and `term` send SIGKILL and SIGTERM; `corrupt` kills, then truncates the newest checkpoint or flips a byte of
it; `process` kills one of two processes (Linux); `disk` gives the first run a file system without room for a second
checkpoint (a tmpfs as root, a limited file size otherwise). Prints trials, kills during a save (a half-written file was
left), and differences. scikit-learn's digits, a checkpoint after every update.
"""
import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "starting at epoch"  # said by all trainings
COMMON = ["--arch", "vit_nano", "--patch_size", "8", "--print_freq", "2", "--num_workers", "2", "--save_every_steps", "1",
          "--load_from", "auto"]


@dataclass(frozen=True)
class Task:
    """Words of a command; the folder of its data; its newest checkpoint; what it says when all epochs are done."""
    words: list
    data: str = "."
    newest: str = engine.CHECKPOINT
    end: str = "training time"


RANDOM = ["--pretrained_weights", "random", "--image_size", "32"]
TASKS = {
    "pretrain": Task(["main_ibot.py", "--global_crops_size", "32", "--local_crops_size", "16", "--local_crops_number", "2",
                      "--out_dim", "64", "--shared_head", "true", "--head_hidden_dim", "64", "--drop_path", "0.2",
                      "--epochs", "3", "--lr", "0.01", "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2"],
                     data="train"),
    "finetune": Task(["evaluation/classification_layer_decay/run_class_finetuning.py", *RANDOM, "--epochs", "3",
                      "--warmup_epochs", "1", "--lr", "0.002", "--drop_path", "0.2", "--model_ema", "true",
                      "--model_ema_decay", "0.9"]),
    "linear": Task(["evaluation/eval_linear.py", *RANDOM, "--epochs", "10", "--lr", "0.1"],
                   newest="checkpoint_random_linear_last.pth", end="checkpoints:"),
}
FAULTS = ("kill", "term", "corrupt", "process", "disk")


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", default=10, type=int, help="of each fault")
    parser.add_argument("--task", default="pretrain", choices=tuple(TASKS))
    parser.add_argument("--fault", default=["kill"], nargs="+", choices=FAULTS)
    parser.add_argument("--seed", default=0, type=int, help="of the moments")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args()


def write_digits(folder):
    """120 images in train/ and 40 in val/."""
    data = load_digits()
    for i in range(160):
        path = folder / ("train" if i < 120 else "val") / str(data.target[i]) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).resize((32, 32)).save(path)


def start(task, device, data, output, processes, preexec=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    batch = ["--batch_size_per_gpu", str(16 // processes)]
    words = [sys.executable, *launcher, *task.words, *COMMON, *batch, "--device", device, "--data_path", data / task.data,
             "--output_dir", output]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=preexec,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(process, words):
    """Until a line with these words; raises RuntimeError where none comes."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return
    raise RuntimeError(f"the run never said {words!r}:\n" + "".join(lines))


def finish(process):
    output = process.communicate(timeout=600)[0]
    if process.returncode:
        raise RuntimeError(f"a run that nobody disturbed ended with code {process.returncode}:\n{output}")
    return output


def children(process):
    """{rank: process id} of torchrun's processes, read from their environment (Linux)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid:
                words = (entry / "environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(entry.name) for word in words if word.startswith(b"RANK=")}
        except (OSError, ValueError, IndexError):
            continue
    return found


def everything(folder, newest=engine.CHECKPOINT):
    """All that a run leaves, flat: {name: tensor, number or log line}, but for its arguments."""
    found = {f"log.{i}": line for i, line in enumerate((folder / "log.txt").read_text().splitlines())}

    def walk(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                walk(f"{name}.{i}", part)
        else:
            found[name] = value
    checkpoint = engine.load_checkpoint(folder / newest)
    for key in checkpoint.keys() - {"args", "settings"}:
        walk(key, checkpoint[key])
    if (folder / "results.json").exists():
        walk("results", [record["metrics"] for record in json.loads((folder / "results.json").read_text())])
    return found


def differences(a, b, newest=engine.CHECKPOINT):
    """Names of what differs between the ends of two runs."""
    a, b = everything(a, newest), everything(b, newest)
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not (
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])]


def far_losses(a, b, newest):
    """Epochs whose mean losses in the logs of two runs are more than 1 % apart."""
    a, b = ([json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()] for folder in (a, b))
    return [f"epoch {i}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if abs(x / y - 1) > 0.01]


def disturb(fault, task, process, output, seconds, rng, notes):
    """Let `fault` happen within `seconds` of training, each second time during a save; returns when the run has ended."""
    time.sleep(rng.uniform(0, 0.7 * seconds))
    if rng.random() < 0.5:
        while process.poll() is None and not list(output.glob(".checkpoint*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.005))
    if process.poll() is not None:
        pass
    elif fault == "term":
        process.send_signal(signal.SIGTERM)
    elif fault == "process":
        os.kill(rng.choice(list(children(process).values())), signal.SIGKILL)
    else:
        process.kill()
    since = time.monotonic()
    over = task.end in process.communicate(timeout=120)[0]
    notes["over before"] += over  # the signal met a process that was leaving
    notes["slowest end, s"] = max(notes["slowest end, s"], round(time.monotonic() - since, 1))
    if fault == "term" and process.returncode != engine.EXIT_PREEMPTED and not over:
        notes["wrong exit codes"] += 1
    if list(output.glob(".checkpoint*")):
        notes["during a save"] += 1
    newest = output / task.newest
    if fault == "corrupt" and newest.exists() and (output / engine.PREVIOUS).exists():
        data = bytearray(newest.read_bytes())
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)):]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        newest.unlink()  # not in place: the previous one may be the same file by another name
        newest.write_bytes(data)
        notes["corrupted"] += 1


def small_disk(folder, size):
    """(function for the child process, undo): `folder` has room for `size` bytes, or no file grows beyond."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    if mounted:
        return None, lambda: subprocess.run(["umount", folder], check=True)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), lambda: None


def run_trial(fault, task, device, data, whole, folder, seconds, rng, notes):
    """One disturbed run; returns what differs at its end."""
    output, processes = folder / "run", 2 if fault == "process" else 1
    if fault == "disk":
        size = int((whole / task.newest).stat().st_size * rng.uniform(0.3, 3.5))  # for no checkpoint to three
        limit, undo = small_disk(output, size)
        process = start(task, device, data, output, 1, limit)
        text = process.communicate(timeout=600)[0]
        notes["saves that failed"] += text.count("could not be written")
        notes["runs with such"] += "could not be written" in text
        notes["wrong exit codes"] += process.returncode != 0
        kept = folder / "kept"
        kept.mkdir()
        for path in output.iterdir():  # the folder moves to a larger disk
            if path.is_file():
                (kept / path.name).write_bytes(path.read_bytes())
        notes["half files"] += len(list(kept.glob(".checkpoint*")))
        for path in kept.glob("*.pth"):
            engine.load_checkpoint(path)  # raises if it is no good
        undo()
        output = kept
    else:
        process = start(task, device, data, output, processes)
        wait_until(process, BEGIN)
        disturb(fault, task, process, output, seconds, rng, notes)
    finish(start(task, device, data, output, processes))
    return (differences if device == "cpu" else far_losses)(whole, output, task.newest)


def main():
    args = get_args()
    task = TASKS[args.task]
    rng = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = temporary
        data, whole, seconds = folder / "data", {}, {}
        write_digits(data)
        print(f"torch {torch.__version__}, {args.device}; {args.task}; {args.trials} trials of each fault", flush=True)
        for fault in args.fault:
            processes = 2 if fault == "process" else 1
            if processes not in whole:
                whole[processes] = folder / f"whole{processes}"
                process = start(task, args.device, data, whole[processes], processes)
                wait_until(process, BEGIN)
                since = time.monotonic()
                wait_until(process, task.end)
                seconds[processes] = time.monotonic() - since
                finish(process)
            notes, lost = Counter(), Counter()
            for trial in range(args.trials):
                place = folder / f"{fault}{trial}"
                place.mkdir()
                try:
                    lost.update(run_trial(fault, task, args.device, data, whole[processes], place, seconds[processes], rng,
                                          notes))
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    lost["runs that did not go on"] += 1
            print(f"{fault}: {args.trials} trials, " + "".join(f"{name}: {n}, " for name, n in sorted(notes.items()))
                  + (f"differences: {dict(lost)}" if lost else "no differences"), flush=True)
            failed |= bool(lost)
    sys.exit(failed)


if __name__ == "__main__":
    main()
