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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import collapse
import engine
import images
import loader
import main_ibot
from benchmarks.faults import children, differences, everything
from tests.conftest import ROOT, wait_for

TINY = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size", "16", "--device", "cpu",
        "--local_crops_number", "2", "--out_dim", "64", "--patch_out_dim", "64", "--batch_size_per_gpu", "16", "--epochs", "2",
        "--num_workers", "0", "--print_freq", "3", "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2", "--lr", "0.01",
        "--shared_head", "true", "--drop_path", "0.2", "--use_fp16", "false", "--head_hidden_dim", "64"]


def train(*words):
    main_ibot.train_ibot(main_ibot.get_args_parser().parse_args([*TINY, *map(str, words)]))


def assert_same_run(a, b):
    assert everything(a).keys() == everything(b).keys() and len(everything(a)) > 300
    assert not differences(a, b)


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
    with pytest.raises(engine.Preempted, match=f"epoch {(batches - 1) // 7}, step {(batches - 1) % 7}, and saved"):
        train(*flags)
    assert signal.getsignal(signal.SIGTERM) is before
    undo()
    progress = engine.load_checkpoint(tmp_path / "checkpoint.pth")["progress"]
    assert progress["step"] == (batches - 1) % 7 and len(progress["labels"]) == 16 * progress["step"]
    train(*flags)
    assert_same_run(tmp_path, whole)
    events = EventAccumulator(str(tmp_path / "tf_logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(14))  # none lost, none twice


def test_stop_amid_accumulation(digits, tmp_path, after_batches):
    """The update whose batches are half computed is computed again, with the same drop path."""
    flags = ["--data_path", digits / "train", "--accum_iter", 2, "--batch_size_per_gpu", 8, "--epochs", 1]
    train(*flags, "--output_dir", tmp_path / "whole")
    undo = after_batches(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(engine.Preempted, match="epoch 0, step 2"):
        train(*flags, "--output_dir", tmp_path / "part")
    undo()
    train(*flags, "--output_dir", tmp_path / "part", "--load_from", "auto")
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_save_by_the_clock(digits, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(engine.Run, "save", lambda run, *_: saved.append((run.epoch, run.step)) or True)
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--epochs", 1, "--save_every_minutes", 1e-9)
    assert saved == [(0, step) for step in range(7)] + [(1, 0)]


def test_resume_says_what_is_not_as_it_was(whole, digits, tmp_path, capsys, after_batches):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto"]
    undo = after_batches(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(engine.Preempted):
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
    state = engine.random_state(device)
    first = draw()
    assert draw() != first
    engine.set_random_state(state, device)
    assert draw() == first


# ---------------------------------------------------------------- kills

def start(*words, processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [sys.executable, *launcher, *options.pop("launcher_flags", []), "main_ibot.py", *TINY, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, **options)


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
    assert engine.load_checkpoint(part / "checkpoint.pth")["progress"]["step"] > 0
    train(*flags, "--output_dir", part)
    assert not list(part.glob(".checkpoint*"))
    assert_same_run(part, tmp_path / "whole")


STALL = """
import sys, time, engine, images, main_ibot
load_rgb, stalled = images.load_rgb, sys.argv.pop(1)
images.load_rgb = lambda path: time.sleep(1000) if path == stalled else load_rgb(path)
engine.run(main_ibot.main)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_stalled_file_does_not_keep_sigterm_from_saving(workers, digits, tmp_path):
    """A file that never comes: the run saves and ends with its documented code, soon, whoever waits for the file."""
    order = list(loader.ResumableSampler(range(120), 1, 0, seed=0))
    stalled = images.CheckedImageFolder(digits / "train").samples[order[40]][0]  # in the third batch
    words = [sys.executable, "-c", STALL, stalled, *TINY, "--data_path", digits / "train", "--output_dir", tmp_path, "--num_workers",
             str(workers), "--print_freq", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = ""
    while "[2/7]" not in line:
        line = process.stdout.readline()
        assert line, process.communicate()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < 8  # a DataLoader alone waits ten seconds for each worker that hangs
    assert process.returncode == engine.EXIT_PREEMPTED == 75
    assert errors.splitlines() == ["stopped by a signal at epoch 0, step 2, and saved: the same command with --load_from auto goes "
                                   "on from there"]
    progress = engine.load_checkpoint(tmp_path / "checkpoint.pth")["progress"]
    assert progress["step"] == 2 and progress["bad"] == []


def two_processes(digits, folder, *extra):
    return ["--data_path", digits / "train", "--output_dir", folder, "--load_from", "auto", "--num_workers", "1",
            "--batch_size_per_gpu", "10", "--save_every_steps", "2", "--print_freq", "1", *extra]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
def test_processes_are_killed(digits, tmp_path):
    """torchrun ends soon when one of two is killed; with --max-restarts it goes on by itself; the end is as without kills."""
    process = start(*two_processes(digits, tmp_path / "whole"), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors

    part = tmp_path / "part"
    process = start(*two_processes(digits, part), processes=2)
    wait_for(lambda: (part / "checkpoint_previous.pth").exists(), process)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 30
    assert "error: the connection to another process broke" in errors and "Error:" not in errors.partition("torch.distributed")[0]

    newest = part / "checkpoint.pth"
    before = newest.stat().st_mtime_ns
    process = start(*two_processes(digits, part), processes=2, launcher_flags=["--max-restarts=2"])
    wait_for(lambda: newest.stat().st_mtime_ns > before, process)
    os.kill(children(process)[0], signal.SIGKILL)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("resumed from") == 2 and out.count("epoch 1 done") == 1
    assert_same_run(part, tmp_path / "whole")


def test_another_number_of_processes(digits, tmp_path, capsys, after_batches):
    """One process goes on where two stopped: told by images, with a note."""
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--epochs", 1, "--batch_size_per_gpu", 8]
    undo = after_batches(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(engine.Preempted):
        train(*flags)
    undo()
    checkpoint = engine.load_checkpoint(tmp_path / "checkpoint.pth")
    progress = checkpoint["progress"]  # as if two processes had made three updates
    progress |= {"total_batch": 16, "step": 3, "random": 2 * progress["random"]}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    train(*flags, "--load_from", "auto")
    out = capsys.readouterr().out
    assert "starting at epoch 0 of 1, step 6" in out and "note: 1 processes instead of 2" in out and "come again" not in out


# ---------------------------------------------------------------- disks and files

def test_truncated_newest_checkpoint_is_named_and_the_one_before_used(whole, digits, tmp_path, capsys):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto"]
    train(*flags)
    newest, before = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth"
    assert engine.load_checkpoint(before)["epoch"] == 1
    newest.write_bytes(newest.read_bytes()[:20000])
    capsys.readouterr()
    train(*flags)
    captured = capsys.readouterr()
    assert f"warning: checkpoint {newest}: " in captured.err and f"resumed from {before}" in captured.out
    assert_same_run(tmp_path, whole)
    assert engine.load_checkpoint(before)["epoch"] == 1  # not the damaged one
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"train_loss": 1.0, "ep{"epoch": 0}\n')  # a full disk, then room again
    train(*flags)
    assert_same_run(tmp_path, whole)
    good = newest.read_bytes()
    train(*flags[:-1], before.name)  # asked for by name: the newest, which is good, is kept
    assert_same_run(tmp_path, whole)
    assert before.read_bytes() == good
    for path in (newest, before):
        path.write_bytes(b"rotten")
    with pytest.raises(engine.InputError, match="none of the 2 checkpoints"):
        train(*flags)
    assert newest.read_bytes() == b"rotten"  # nothing is removed


def test_flipped_byte_is_noticed(whole, tmp_path):
    data = bytearray((whole / "checkpoint.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "checkpoint.pth").write_bytes(data)
    with pytest.raises(engine.InputError, match="checkpoint.pth"):
        engine.load_checkpoint(tmp_path / "checkpoint.pth")


def test_disk_full_while_saving(whole, digits, tmp_path, capsys, file_limit):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto"]
    good = (whole / "checkpoint_previous.pth").read_bytes()  # after epoch 0
    (tmp_path / "checkpoint.pth").write_bytes(good)
    file_limit(len(good) // 2)
    with pytest.raises(engine.InputError, match="checkpoint.pth could not be written .*; the checkpoints before it are intact"):
        train(*flags, "--on_save_error", "stop")
    assert (tmp_path / "checkpoint.pth").read_bytes() == good and not list(tmp_path.glob(".*"))
    capsys.readouterr()
    train(*flags)  # goes on to the end of its epochs
    captured = capsys.readouterr()
    assert "warning: " in captured.err and "could not be written" in captured.err and "epoch 1 done" in captured.out
    assert (tmp_path / "checkpoint.pth").read_bytes() == good and not list(tmp_path.glob(".*"))
    file_limit(resource.RLIM_INFINITY)
    train(*flags)
    progress = everything(tmp_path)
    assert progress["epoch"] == 2
    assert all(torch.equal(value, progress[name]) for name, value in everything(whole).items() if name.startswith("student"))


def test_stop_that_cannot_be_saved_is_an_error(digits, tmp_path, after_batches, file_limit):
    after_batches(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    file_limit(100_000)
    with pytest.raises(engine.InputError, match="could not be saved"):
        train("--data_path", digits / "train", "--output_dir", tmp_path)
    assert not list(tmp_path.glob("*.pth"))


# ---------------------------------------------------------------- data

def break_images(digits, folder, count):
    """The digits with `count` files that are no images; returns the folder and their names."""
    broken = []
    for i, path in enumerate(sorted((digits / "train").rglob("*.png"))):
        copy = folder / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[:60] if i < count else path.read_bytes())
        broken += [str(copy)] * (i < count)
    return folder, sorted(broken)


def test_bad_images_are_listed(digits, tmp_path, capsys, after_batches):
    """Also those that were found before a stop."""
    data, broken = break_images(digits, tmp_path / "data", 6)
    flags = ["--data_path", data, "--output_dir", tmp_path / "run", "--max_bad_images", "0.05", "--load_from", "auto", "--epochs", 1,
             "--batch_size_per_gpu", 20, "--num_workers", 2]
    undo = after_batches(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(engine.Preempted):
        train(*flags)
    undo()
    train(*flags)
    assert (tmp_path / "run/bad_images.txt").read_text().splitlines() == broken
    assert "skipped 6 unreadable images" in capsys.readouterr().out


def test_too_many_bad_images_stop_the_run(digits, tmp_path):
    data, broken = break_images(digits, tmp_path / "data", 30)
    with pytest.raises(engine.InputError, match=r"\d+ of 120 images cannot be read, more than --max_bad_images 0.01"):
        train("--data_path", data, "--output_dir", tmp_path / "run")
    names = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert len(names) > 1 and set(names) <= set(broken)
    with pytest.raises(engine.InputError, match="more than --max_bad_images 29"):
        train("--data_path", data, "--output_dir", tmp_path / "run", "--max_bad_images", 29, "--epochs", 1, "--overwrite", "true",
              "--batch_size_per_gpu", 120)


def test_dead_loader_process_is_reported(digits, tmp_path):
    process = start("--data_path", digits / "train", "--output_dir", tmp_path, "--num_workers", "1", "--print_freq", "1",
                    "--epochs", "1000")
    while "[1/7]" not in process.stdout.readline():
        assert process.poll() is None
    worker = next(int(entry.name) for entry in Path("/proc").glob("[0-9]*")
                  if f"\nPPid:\t{process.pid}\n" in (entry / "status").read_text())
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("error: a loader process died: DataLoader worker") and errors.count("\n") == 1


# ---------------------------------------------------------------- numbers

def test_loader_process_that_dies_while_it_hands_over_is_reported(capsys):
    """The socket breaks before torch learns of the death."""
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        def broken(error=error):
            raise error
        with pytest.raises(SystemExit):
            engine.run(broken)
        line = capsys.readouterr().err
        assert line.startswith("error: a loader process died: DataLoader worker broke off, ") and line.count("\n") == 1


def poison(monkeypatch, step_numbers):
    """The crops of these steps hold a NaN."""
    step, calls = main_ibot.train_step, []

    def poisoned(batches, *args, **kwargs):
        calls.append(1)
        batch, = batches
        if len(calls) - 1 in step_numbers:
            batch.global_crops[0, 0, 0, 0, 0] = float("nan")
        return step([batch], *args, **kwargs)
    monkeypatch.setattr(main_ibot, "train_step", poisoned)


def test_non_finite_loss_stops(digits, tmp_path, monkeypatch):
    """The step and its terms are named, and the checkpoint of the epoch before is as it was."""
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path, "--load_from", "auto"]
    train(*flags, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    poison(monkeypatch, [4])
    with pytest.raises(FloatingPointError, match="not finite at step 11: loss nan, cls nan, (patch nan, )?grad_norm nan"):
        train(*flags, "--epochs", 3)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("optimizer, norm", [("adamw", "none"), ("sgd", "bn"), ("lars", "none")])
def test_non_finite_step_is_dropped(optimizer, norm, digits, tmp_path, monkeypatch, capsys):
    """Student, optimiser and centres after a poisoned step are those before it."""
    states = []
    step = main_ibot.train_step

    def recording(batches, training, *args, **kwargs):
        result = step(batches, training, *args, **kwargs)
        student, teacher, _, ibot_loss, opt, *_ = training
        tensors = [*student.parameters(), *ibot_loss.buffers(), *(v for s in opt.state.values() for v in s.values() if torch.is_tensor(v))]
        assert all(x.isfinite().all() for x in [*tensors, *teacher.parameters(), *student.buffers(), *teacher.buffers()])
        states.append([x.detach().clone() for x in tensors])
        return result
    monkeypatch.setattr(main_ibot, "train_step", recording)
    poison(monkeypatch, [2, 3])
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--on_nonfinite", "skip", "--optimizer", optimizer, "--epochs", 1,
          "--freeze_last_layer", 0, "--norm_in_head", norm)
    same = [len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) for a, b in zip(states, states[1:], strict=False)]
    assert same == [False, True, True, False, False, False]
    out = capsys.readouterr().out
    assert "warning: step 2 dropped, not finite: loss nan" in out and "step 3 dropped" in out and out.count("dropped") == 2
    line = json.loads((tmp_path / "log.txt").read_text())
    assert all(np.isfinite(value) for value in line.values()) and line["train_loss"] > 0


def test_dropped_updates_are_bounded(digits, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 1000))
    with pytest.raises(FloatingPointError, match="20 updates in a row dropped up to step 24"):
        train("--data_path", digits / "train", "--output_dir", tmp_path, "--on_nonfinite", "skip", "--epochs", 9)


def test_centre_stays_when_the_teacher_is_not_finite():
    module = main_ibot.iBOTLoss(4, 4, [0.05], [0.05])
    before = module.center.clone(), module.center2.clone()
    for finite, mean in ((True, float("inf")), (False, 1.0)):
        module(torch.randn(4, 4), torch.randn(2, 4), torch.randn(4, 4), torch.randn(2, 4), torch.full((4,), mean), torch.rand(2), 2, 0)
        assert not module.update_centers(torch.tensor(finite))
        assert torch.equal(module.center, before[0]) and torch.equal(module.center2, before[1])


def test_failing_process_is_named():
    meters = engine.DeviceMeters(("cls", "patch"))
    meters.add(torch.tensor(1.0), torch.tensor(2.0))
    meters.add(torch.tensor(1.0), torch.tensor(float("inf")))
    assert meters.read() == [{"cls": 1.0, "patch": 2.0}, {"cls": 1.0, "patch": float("inf"), "nonfinite": "patch inf"}]


# ---------------------------------------------------------------- collapse

def test_collapse_signs_equal_plain_ones():
    torch.manual_seed(0)
    module = main_ibot.iBOTLoss(8, 8, np.full(1, 0.05), np.full(1, 0.06)).double()
    module.center.normal_(), module.center2.normal_()
    G, B = 2, 3
    s_cls, s_patch, t_cls, t_patch = (torch.randn(n, 8, dtype=torch.float64) for n in (G * B, 5, G * B, 5))
    weight = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.0], dtype=torch.float64)
    losses = module(s_cls, s_patch, t_cls, t_patch, None, weight, G, 0)
    signs = collapse.signs(module, t_cls, t_patch, weight, losses, 0, None)
    p = ((t_cls - module.center) / 0.05).softmax(-1)
    q = (s_cls / 0.1).log_softmax(-1)
    kl = sum((p[g * B:(g + 1) * B] * (p[g * B:(g + 1) * B].log() - q[(1 - g) * B:(2 - g) * B])).sum(-1).mean() for g in range(2)) / 2
    assert abs(signs["cls_entropy"] + (p * p.log()).sum(-1).mean()) < 1e-10 and abs(signs["cls_kl"] - kl) < 1e-10
    assert abs(signs["cls_std"] - t_cls.numpy().std(axis=0).mean()) < 1e-10
    p = ((t_patch - module.center2[0]) / 0.06).softmax(-1)
    kl = (weight * (p * (p.log() - (s_patch / 0.1).log_softmax(-1))).sum(-1)).sum()
    assert abs(signs["patch_cross"] - signs["patch_entropy"] - kl) < 1e-10 and abs(signs["patch_share"] - 0.8) < 1e-10
    assert abs(signs["patch_used"] - len(set(t_patch[:4].argmax(-1).tolist())) / 8) < 1e-6


def test_collapse_is_said_in_words(digits, tmp_path, capsys):
    healthy = {"cls_entropy": 3.0, "patch_entropy": 3.0, "cls_used": 0.5, "patch_used": 0.5, "cls_std": 0.05}
    assert collapse.warnings(healthy, 64, 64, 0.04) == {}
    for change, words in (({"cls_entropy": np.log(64)}, "[CLS] targets are all but uniform"), ({"cls_entropy": np.log(64)}, "--centering sinkhorn"),
                          ({"patch_entropy": np.log(64)}, "lower --teacher_patch_temp"),
                          ({"cls_used": 1 / 64}, "one of 64 [CLS] clusters"), ({"cls_std": 1e-6}, "hardly differ between images")):
        (sign, warning), = collapse.warnings(healthy | change, 64, 64, 0.04).items()
        assert words in warning and [sign] == list(change)
    # A run that collapses: the teacher's targets are hardly sharpened at all.
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--warmup_teacher_temp", 50, "--teacher_temp", 50,
          "--epochs", 4)
    assert capsys.readouterr().out.count("warning: the [CLS] targets are all but uniform") == 1  # after three of four epochs
