"""Quality while it trains: its figures against plain definitions and eval_knn.py, and that training stays as it is."""
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.linalg import sqrtm
from torch import multiprocessing

import engine
import main_ibot
import quality
from benchmarks.faults import differences, everything
from evaluation import eval_knn, report
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.charts import read_log
from evaluation.common.data import image_sets
from evaluation.common.features import frozen_features
from evaluation.common.rank import lidar, rankme
from tests.test_faults import TINY, train

ALONE = engine.Process(0, 1, 0, torch.device("cpu"))
BEST, FIGURES = "checkpoint_best.pth", ("knn", "rankme", "lidar")


@pytest.fixture(scope="module", autouse=True)
def few_views():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quality.MOST, "views", 30)
        yield


# ---------------------------------------------------------------- ranks

def entropy_rank(values):
    p = values / values.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("spectrum", [[3, 3, 3, 3], [8, 4, 2, 1, 0.5], [1, 0, 0]])
def test_rankme_of_a_known_spectrum(spectrum):
    rng = np.random.default_rng(0)
    D, values = len(spectrum), np.array(spectrum, dtype=float)
    left, right = (np.linalg.qr(rng.normal(size=(rows, D)))[0] for rows in (40, D))
    features = torch.from_numpy((left * values) @ right.T)
    assert rankme(features) == pytest.approx(entropy_rank(values), rel=1e-9)
    assert rankme(100 * features.float()) == pytest.approx(entropy_rank(values), rel=1e-5)
    if len(set(spectrum)) == 1:
        assert rankme(features) == pytest.approx(D, rel=1e-5)
    assert rankme(torch.zeros(5, 3)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("n, q, D", [(30, 4, 6), (5, 3, 8)])
def test_lidar_equals_the_plain_definition(n, q, D):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(n, 1, D)) * np.linspace(0.1, 2, D) + 0.3 * rng.normal(size=(n, q, D))
    B, W = np.zeros((D, D)), 1e-4 * np.eye(D)
    for image in features:
        B += np.outer(image.mean(0) - features.mean((0, 1)), image.mean(0) - features.mean((0, 1))) / n
        for view in image:
            W += np.outer(view - image.mean(0), view - image.mean(0)) / (n * q)
    root = np.linalg.inv(sqrtm(W))
    expected = entropy_rank(np.linalg.eigvalsh(root @ B @ root).clip(0))
    assert lidar(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-6)


def test_directions_in_which_views_differ_do_not_count():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 1, 6, generator=generator) + 0.1 * torch.randn(500, 8, 6, generator=generator)
    assert lidar(features) == pytest.approx(6, rel=0.02) and rankme(features.mean(dim=1)) == pytest.approx(6, rel=0.02)
    features[..., 0] = torch.randn(500, 8, generator=generator)
    assert lidar(features) == pytest.approx(5, rel=0.02) and rankme(features.flatten(0, 1)) == pytest.approx(6, rel=0.02)


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train("--data_path", digits / "train", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def judged(digits, tmp_path_factory):
    """The same, judged after both epochs; the checkpoint of the first stays as checkpoint_0.pth."""
    folder, write = tmp_path_factory.mktemp("runs") / "judged", engine.files.write_checkpoint

    def keeping(state, *rest):
        done = write(state, *rest)
        if state["epoch"] == 1:
            shutil.copy(folder / engine.CHECKPOINT, folder / "checkpoint_0.pth")
        return done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.training.write_checkpoint", keeping)
        train("--data_path", digits / "train", "--output_dir", folder, "--eval_every", 1, "--eval_data", digits)
    return folder


def figures(folder):
    return [{name: values.get(name) for name in FIGURES} for values in epochs_of(folder)]


def epochs_of(folder):
    return list(read_log(folder / "log.txt")[0].values())


def test_training_is_what_it_is_without(plain, judged):
    a, b = everything(plain), everything(judged)
    assert {name for name in a.keys() ^ b.keys() if not name.startswith("quality.")} == set()
    assert sum(name.startswith("progress.random") for name in a) == 1 and len(a) > 300
    differ = [name for name in differences(plain, judged) if not name.startswith(("quality.", "log."))]
    assert not differ
    for without, with_ in zip(epochs_of(plain), epochs_of(judged), strict=True):
        assert {name: value for name, value in with_.items() if name not in FIGURES} == without
        assert with_.keys() - without.keys() == set(FIGURES)


def test_figures_are_those_of_the_checkpoint(judged, digits, monkeypatch, capfd):
    for name, found in zip(("checkpoint_0.pth", engine.CHECKPOINT), figures(judged), strict=True):
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--pretrained_weights", str(judged / name), "--data_path", str(digits),
                                          "--device", "cpu", "--num_workers", "0", "--nb_knn", "20"])
        eval_knn.main()
        assert f"20-NN: top-1 {found['knn']:.2f} %" in capfd.readouterr().out
        sets = image_sets("imagefolder", digits)
        features, _ = frozen_features(load_evaluated_backbone(judged / name, "teacher"), sets[0], ALONE, num_workers=0)
        assert found["rankme"] == pytest.approx(rankme(features), rel=1e-6)
        assert 1 < found["lidar"] < 96
    best = int(np.argmax([found["knn"] for found in figures(judged)]))
    assert engine.load_checkpoint(judged / BEST)["epoch"] == best + 1
    state = engine.load_checkpoint(judged / engine.CHECKPOINT)["quality"]
    assert (state["best"], state["epoch"]) == (figures(judged)[best]["knn"], best)
    assert judged / BEST in main_ibot.FILES.held(judged)
    pictures, _ = report.curves(judged)
    assert pictures["knn"][1] == {"20-NN": [(epoch, found["knn"]) for epoch, found in enumerate(figures(judged))]}
    assert {*pictures["ranks"][1]} == {"RankMe", "LiDAR"}


def test_stop_amid_the_evaluation(digits, tmp_path, monkeypatch):
    """What the epoch has had goes on: its line of the log, its tokens, the best so far. Training images, without labels."""
    flags = ["--data_path", digits / "train", "--eval_every", 1, "--tokenizer", "mpp", "--output_dir"]
    train(*flags, tmp_path / "whole")
    assert [found["knn"] for found in figures(tmp_path / "whole")] == [None, None]
    load, seen = quality.Sample.__getitem__, []

    def stopping(sample, index):
        seen.append(index)
        if len(seen) == 120 + 30 + 110:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(sample, index)
    monkeypatch.setattr(quality.Sample, "__getitem__", stopping)
    monkeypatch.setattr(quality, "BATCH", 50)
    with pytest.raises(engine.Preempted, match="epoch 1, step 7, and saved"):
        train(*flags, tmp_path / "part")
    assert len((tmp_path / "part" / "log.txt").read_text().splitlines()) == 1
    monkeypatch.undo()
    train(*flags, tmp_path / "part", "--load_from", "auto")
    assert all(".param_groups." in name for name in differences(tmp_path / "part", tmp_path / "whole"))  # set by every update
    assert engine.load_checkpoint(tmp_path / "part" / engine.CHECKPOINT)["quality"]["best"] > 1
    best = [engine.load_checkpoint(tmp_path / name / BEST)["epoch"] for name in ("part", "whole")]
    assert best[0] == best[1] == 1 + int(np.argmax([found["rankme"] for found in figures(tmp_path / "whole")]))


# ---------------------------------------------------------------- one judge

def judge_of(folder, process, checkpoint=None, out=Path(".")):
    """(judge, backbone) of images with labels in `folder`, and an untrained teacher."""
    args = main_ibot.get_args_parser().parse_args([*TINY, "--eval_every", "1", "--eval_data", str(folder)])
    with engine.StopSignals() as signals:
        run = engine.Run(args, process, signals, out, main_ibot.FILES, main_ibot.PROGRESS)
    run.checkpoint, run.path = checkpoint, "a.pth"
    torch.manual_seed(0)
    backbone = main_ibot.build_networks(args)[1].backbone
    batches = SimpleNamespace(num_workers=0, dataset=None)
    return quality.Judge(args, run, batches, backbone, quality.normalize.__defaults__[0]), backbone


def share(rank, world_size, folder):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    judge, backbone = judge_of(folder / "data", engine.Process(rank, world_size, rank, torch.device("cpu")))
    before = torch.get_rng_state()
    found, names = judge(backbone)
    assert torch.equal(torch.get_rng_state(), before) and backbone.training and bool(names) == (rank == 0)
    if rank == 0:
        torch.save(found, folder / f"{world_size}.pth")
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_equal_one_and_unreadable_images_are_left_out(digits, tmp_path, capfd):
    """41 and 120 images do not share out evenly; one is damaged."""
    shutil.copytree(digits, tmp_path / "data")
    good = sorted((tmp_path / "data" / "train").glob("*/*.png"))[1:]
    damaged = min((tmp_path / "data" / "train").glob("*/*.png"))
    damaged.write_bytes(b"no image")
    for world_size in (1, 2):
        multiprocessing.start_processes(share, (world_size, tmp_path), nprocs=world_size, start_method="fork")
        note = capfd.readouterr().err
        assert f"note: 1 of 120 images of {tmp_path / 'data'} (train) cannot be read" in note and str(damaged) in note
    one, two = (engine.load_checkpoint(tmp_path / f"{n}.pth") for n in (1, 2))
    assert one["knn"] == two["knn"] and len(good) == 119
    assert one == pytest.approx(two, rel=1e-5)
    damaged.unlink()
    share(0, 1, tmp_path)
    assert engine.load_checkpoint(tmp_path / "1.pth")["rankme"] == pytest.approx(one["rankme"], rel=1e-5)


def test_best_and_falls(digits, tmp_path, capsys):
    names, said, unlabelled = [], [], tmp_path / "unlabelled"
    judge, _ = judge_of(digits, ALONE)
    for epoch, value in enumerate([40.0, 50.0, 45.0, 44.0, 43.0, 42.0, 50.0, 51.0, 51.0, 9.0, 8.0]):
        if epoch == 4:  # a resume
            judge, _ = judge_of(digits, ALONE, {"quality": judge.state})
        judge.run.epoch = epoch
        capsys.readouterr()
        names.append(judge._note(value))
        said.append(capsys.readouterr().out)
    assert [bool(name) for name in names] == [e in (0, 1, 7) for e in range(11)] and names[1] == [BEST]
    assert [e for e in range(11) if said[e]] == [4]
    assert said[4] == f"warning: knn has fallen 3 times in a row, to 43; it was best, 50, after epoch 1, whose checkpoint is {BEST}\n"
    other, _ = judge_of(shutil.copytree(digits / "train", unlabelled), ALONE, {"quality": judge.state})
    assert other.state["best"] == -1  # of other images
    with pytest.raises(engine.InputError, match="a.pth: its entry 'quality' cannot be used"):
        judge_of(digits, ALONE, {"quality": judge.state | {"best": "51"}})


@pytest.mark.parametrize("words, message", [
    (["--eval_every", 1, "--eval_data", "nowhere"], "data folder nowhere: No such file or directory"),
    (["--eval_data", "nowhere"], "--eval_every"), (["--eval_every", -1], "--eval_every must not be negative: -1")])
def test_mistakes_are_found_before_training(words, message, digits, tmp_path):
    with pytest.raises(engine.InputError, match=message) as caught:
        train("--data_path", digits / "train", "--output_dir", tmp_path / "new", *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
