"""A run that is stopped, killed or meets bad files, numbers and disks goes on as if nothing had been, or says why not."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import loader
import main_ibot
import utils
from tests.conftest import ROOT

TINY = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size", "16", "--device", "cpu",
        "--local_crops_number", "2", "--out_dim", "64", "--patch_out_dim", "64", "--batch_size_per_gpu", "16", "--epochs", "2",
        "--num_workers", "0", "--print_freq", "3", "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2", "--lr", "0.01",
        "--shared_head", "true", "--drop_path", "0.2", "--use_fp16", "false", "--head_hidden_dim", "64"]


def train(*words):
    main_ibot.train_ibot(main_ibot.get_args_parser().parse_args([*TINY, *map(str, words)]))


def everything(folder):
    """All that a run leaves, flat: tensors, numbers and log lines."""
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
    checkpoint = utils.load_checkpoint(folder / "checkpoint.pth")
    for key in checkpoint.keys() - {"args"}:
        walk(key, checkpoint[key])
    return found


def assert_same_run(a, b):
    a, b = everything(a), everything(b)
    assert a.keys() == b.keys() and len(a) > 300
    differ = [name for name in a if not (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name])]
    assert not differ, differ[:5]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train("--data_path", digits / "train", "--output_dir", folder)
    return folder


@pytest.fixture
def after_batches(monkeypatch):
    """after_batches(n, action): call `action` while the n-th batch of this run is waited for."""
    def install(count, action):
        fetched, device_batches = 0, loader.device_batches

        def counting(*args):
            nonlocal fetched
            for batch in device_batches(*args):
                fetched += 1
                if fetched == count:
                    action()
                yield batch
        monkeypatch.setattr(loader, "device_batches", counting)
        return lambda: monkeypatch.setattr(loader, "device_batches", device_batches)
    return install


# ---------------------------------------------------------------- exact resume

@pytest.mark.parametrize("batches, number, extra", [
    (1, "SIGTERM", []), (5, "SIGUSR1", ["--num_workers", 2]), (11, "SIGTERM", []),
    (8, "SIGTERM", ["--save_every_steps", 3])])
def test_stopped_run_goes_on_bit_for_bit(batches, number, extra, whole, digits, tmp_path, after_batches):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto", *extra]
    undo = after_batches(batches, lambda: os.kill(os.getpid(), getattr(signal, number)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(utils.Preempted, match=f"epoch {(batches - 1) // 7}, step {(batches - 1) % 7}, and saved"):
        train(*flags)
    assert signal.getsignal(signal.SIGTERM) is before
    undo()
    progress = utils.load_checkpoint(tmp_path / "checkpoint.pth")["progress"]
    assert progress["step"] == (batches - 1) % 7 and len(progress["labels"]) == 16 * progress["step"]
    train(*flags)
    assert_same_run(tmp_path, whole)


def test_stop_amid_accumulation(digits, tmp_path, after_batches):
    """The update whose batches are half computed is computed again, with the same drop path."""
    flags = ["--data_path", digits / "train", "--accum_iter", 2, "--batch_size_per_gpu", 8, "--epochs", 1]
    train(*flags, "--output_dir", tmp_path / "whole")
    undo = after_batches(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(utils.Preempted, match="epoch 0, step 2"):
        train(*flags, "--output_dir", tmp_path / "part")
    undo()
    train(*flags, "--output_dir", tmp_path / "part", "--load_from", "auto")
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_save_by_the_clock(digits, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(main_ibot, "save", lambda *args: saved.append((args[1], args[-1]["step"])) or True)
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--epochs", 1, "--save_every_minutes", 1e-9)
    assert saved == [(0, step) for step in range(7)] + [(1, 0)]


def test_resume_says_what_is_not_as_it_was(whole, digits, tmp_path, capsys, after_batches):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto"]
    undo = after_batches(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(utils.Preempted):
        train(*flags)
    undo()
    capsys.readouterr()
    train(*flags, "--batch_size_per_gpu", 12, "--lr", 0.02, "--epochs", 1)
    out = capsys.readouterr().out
    assert f"resumed from {tmp_path / 'checkpoint.pth'}" in out and "starting at epoch 0 of 1, step 5" in out
    assert "note: --lr is 0.02, the checkpoint's run had 0.01" in out and "--print_freq is" not in out
    assert "the last 4 images that were used come again" in out  # 64 seen, 5 updates of 12
    capsys.readouterr()
    train(*flags, "--epochs", 1)
    assert "nothing to do" in capsys.readouterr().out


def test_random_state_holds_every_generator():
    import random
    device = torch.device("cpu")

    def draw():
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), torch.randn(()).item()]
    random.gauss(0, 1), np.random.randn()  # both generators now keep a second number
    state = utils.random_state(device)
    first = draw()
    assert draw() != first
    utils.set_random_state(state, device)
    assert draw() == first


# ---------------------------------------------------------------- kills

def start(*words, processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [sys.executable, *launcher, *options.pop("launcher_flags", []), "main_ibot.py", *TINY, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_kill_while_saving(digits, tmp_path):
    """kill -9 as soon as a temporary file shows, which is in the middle of writing it; then the same command."""
    flags = ["--data_path", digits / "train", "--load_from", "auto", "--save_every_steps", "1", "--num_workers", "1"]
    train(*flags, "--output_dir", tmp_path / "whole")
    part = tmp_path / "part"
    process = start(*flags, "--output_dir", part)
    wait_for(lambda: (part / "checkpoint_previous.pth").exists(), process)
    wait_for(lambda: list(part.glob(".checkpoint*")), process)
    process.kill()
    process.communicate()
    assert utils.load_checkpoint(part / "checkpoint.pth")["progress"]["step"] > 0
    train(*flags, "--output_dir", part)
    assert not list(part.glob(".checkpoint*"))
    assert_same_run(part, tmp_path / "whole")


def test_stalled_file_does_not_keep_sigterm_from_saving(digits, tmp_path):
    """A loader process hangs in a file that never comes; the run saves and ends with its documented code."""
    data = tmp_path / "data/all"
    data.mkdir(parents=True)
    for i, path in enumerate(sorted((digits / "train").rglob("*.png"))):
        (data / f"{i:03}.png").write_bytes(path.read_bytes())
    order = list(loader.ResumableSampler(range(120), 1, 0, seed=0))
    stalled = data / f"{order[40]:03}.png"  # in the third batch
    stalled.unlink()
    os.mkfifo(stalled)
    process = start("--data_path", data.parent, "--output_dir", tmp_path / "run", "--num_workers", "2", "--print_freq", "1")
    lines = []
    while "[2/7]" not in (lines[-1] if lines else ""):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == utils.EXIT_PREEMPTED == 75
    assert errors.splitlines() == ["stopped by a signal at epoch 0, step 2, and saved: the same command with --load_from auto goes "
                                   "on from there"]
    assert utils.load_checkpoint(tmp_path / "run/checkpoint.pth")["progress"]["step"] == 2


def two_processes(digits, folder, *extra):
    return ["--data_path", digits / "train", "--output_dir", folder, "--load_from", "auto", "--num_workers", "1",
            "--batch_size_per_gpu", "10", "--save_every_steps", "2", "--print_freq", "1", *extra]


def children(process):
    """{rank: process id} of torchrun's processes, read from their environment."""
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


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
def test_one_of_two_processes_is_killed(digits, tmp_path):
    """torchrun ends, soon; started again it goes on, and ends where an undisturbed run of two processes does."""
    for name in ("whole", "part"):
        process = start(*two_processes(digits, tmp_path / name), processes=2)
        if name == "part":
            wait_for(lambda: (tmp_path / "part/checkpoint_previous.pth").exists(), process)
            os.kill(children(process)[1], signal.SIGKILL)
            killed = time.monotonic()
            _, errors = process.communicate(timeout=60)
            assert process.returncode != 0 and time.monotonic() - killed < 30
            assert "error: the connection to another process broke" in errors and "Traceback (most recent call last):\n  File \"" \
                + str(ROOT) not in errors
            process = start(*two_processes(digits, tmp_path / name), processes=2)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert "step " in out[out.index("starting at epoch"):].splitlines()[0]
    assert_same_run(tmp_path / "part", tmp_path / "whole")
