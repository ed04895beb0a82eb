"""Training and evaluation of a detector: it learns, resumes bit for bit, and tells the same over processes."""
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from dense_data import make_coco
from PIL import Image

import engine
from analysis import dense_demo
from evaluation import report
from evaluation.common import dense
from evaluation.common.reference_flags import override_words
from evaluation.object_detection import test as test_script
from evaluation.object_detection import train as train_script
from evaluation.object_detection.coco import ValidationImages, truth_of
from evaluation.object_detection.detection import OVERRIDES, drawn_truth, load_detector, recipe_of, training_parser
from evaluation.semantic_segmentation.ade20k import load_pair, read_pairs

pytest.importorskip("pycocotools")
SMALL = ["--arch", "vit_nano", "--pretrained_weights", "random", "--device", "cpu", "--num_workers", "0", "--channels", "32",
         "--hidden", "64", "--sampled", "64", "--train_proposals", "200", "--test_proposals", "100", "--grid", "6", "6",
         "--short_sides", "96", "--long_side", "160", "--crop_sides", "96", "--crop_range", "64", "96", "--test_side", "96",
         "--use_fp16", "false", "--print_freq", "50"]


def train(folder, output, *words):
    words = [*SMALL, "--data_path", folder, "--output_dir", output, *words]
    train_script.train(training_parser("").parse_args(list(map(str, words))))
    return results(output)


def results(output):
    return json.loads((output / "results.json").read_text())


def load(path):
    return engine.load_checkpoint(path)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Four training images, of which the third has a crowd alone; two for validation."""
    return make_coco(tmp_path_factory.mktemp("coco"), train=4, val=2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two images that are the training and the validation set."""
    root = make_coco(tmp_path_factory.mktemp("pair"), train=2, val=1, plain=True)
    shutil.rmtree(root / "val2017")
    shutil.copytree(root / "train2017", root / "val2017")
    shutil.copy(root / "annotations" / "instances_train2017.json", root / "annotations" / "instances_val2017.json")
    return root


def test_two_images_are_learnt_by_heart(pair, tmp_path, capsys):
    words = ("--epochs", 60, "--batch_size_per_gpu", 1, "--flip", 0, "--crop_range", 96, 96, "--lr", 2e-3,
             "--drops", 50, "--warmup_iters", 10, "--layer_decay", 1, "--drop_path", 0)
    [record] = train(pair, tmp_path / "o", *words)
    assert record["protocol"] == "coco" and record["metrics"]["bbox_AP50"] > 95 and record["metrics"]["segm_AP50"] > 95
    out = capsys.readouterr().out
    assert "warning: a batch of 1 images, the recipe's rate is for 32" in out and "eta" in out
    lines = [json.loads(line) for line in (tmp_path / "o" / "log.txt").read_text().splitlines()]
    assert lines[-1]["train_loss"] < 0.5 * lines[0]["train_loss"]

    # Alone, of the finished checkpoint: the same numbers and settings.
    checkpoint = tmp_path / "o" / "checkpoint.pth"
    test_script.test(test_script.get_args_parser().parse_args([
        "--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "o"), "--device", "cpu", "--num_workers", "0",
        "--use_fp16", "false"]))
    first, second = results(tmp_path / "o")
    assert {**first, "time": ""} == {**second, "time": ""}

    # What it finds is drawn, in any image.
    image = pair / "val2017" / "000000.jpg"
    test_script.test(test_script.get_args_parser().parse_args([
        "--checkpoint", str(checkpoint), "--visualize", str(image), "--output_dir", str(tmp_path / "p"), "--device", "cpu"]))
    with Image.open(image) as before, Image.open(tmp_path / "p" / "000000_detections.png") as after:
        before = before.resize(after.size, Image.Resampling.NEAREST)  # small images are enlarged
        assert (np.array(before) != np.array(after)).any(axis=2).mean() > 0.02
    assert (tmp_path / "o" / "detections.png").exists() and "000000_detections.png of " in capsys.readouterr().out

    # Once more: nothing to do, and nothing is recorded twice.
    train(pair, tmp_path / "o", *words, "--load_from", "auto")
    assert "nothing to do" in capsys.readouterr().out and len(results(tmp_path / "o")) == 2
    with pytest.raises(engine.InputError, match="its run had lr 0.002, this one 0.001"):
        train(pair, tmp_path / "o", *words, "--load_from", "auto", "--lr", 1e-3)


class Signal:
    """Stops `engine.Run.fetch` at a batch, as a signal does."""

    def __init__(self, monkeypatch, at):
        self.left, fetch = at, engine.Run.fetch

        def stopped(run, batches, training=True):
            self.left -= 1
            if self.left == 0:
                run.signals.received = "SIGTERM"
            return fetch(run, batches, training)
        monkeypatch.setattr(engine.Run, "fetch", stopped)


def terminate_at_first_update(folder, output, *words):
    """Train in a process of its own, which gets SIGTERM when it has printed an update."""
    words = [*SMALL, "--data_path", folder, "--output_dir", output, *words, "--print_freq", 1]
    process = subprocess.Popen([sys.executable, "evaluation/object_detection/train.py", *map(str, words)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert any(line.startswith("epoch 0/2 [1/2]") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "and saved: the same command" in text, text


# Amid the first epoch's second update of two batches; in the evaluation; by a real signal.
@pytest.mark.parametrize("at", [3, 9, "SIGTERM"])
def test_a_stopped_run_goes_on_bit_for_bit(coco, tmp_path, monkeypatch, at):
    words = ("--epochs", 2, "--batch_size_per_gpu", 1, "--accum_iter", 2, "--warmup_iters", 2, "--lr", 1e-3)
    whole = tmp_path.parent / "whole"
    if not whole.exists():
        train(coco, whole, *words)
    if at == "SIGTERM":
        terminate_at_first_update(coco, tmp_path / "o", *words)
    else:
        with monkeypatch.context() as patch:
            Signal(patch, at)
            with pytest.raises(engine.Preempted, match="and saved: the same command"):
                train(coco, tmp_path / "o", *words)
    [record] = train(coco, tmp_path / "o", *words, "--load_from", "auto")
    assert record["metrics"] == results(whole)[0]["metrics"]
    one, other = load(whole / "checkpoint.pth"), load(tmp_path / "o" / "checkpoint.pth")
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert one["progress"]["metrics"] == other["progress"]["metrics"]
    logs = [(folder / "log.txt").read_text() for folder in (whole, tmp_path / "o")]
    assert logs[0] == logs[1]


def test_two_processes_train_and_test_as_one_tests(coco, tmp_path, call):
    """One of them has no box in some batches: the crowd's image."""
    call("evaluation/object_detection/train.py", *SMALL, "--data_path", coco, "--output_dir", tmp_path / "o", "--epochs", 2,
         "--batch_size_per_gpu", 1, "--warmup_iters", 0, processes=2)
    test_script.test(test_script.get_args_parser().parse_args([
        "--checkpoint", str(tmp_path / "o" / "checkpoint.pth"), "--output_dir", str(tmp_path / "o"), "--device", "cpu",
        "--num_workers", "0", "--use_fp16", "false"]))
    first, second = results(tmp_path / "o")
    assert first["metrics"] == second["metrics"] and first["settings"]["total_batch"] == 2


def test_numbers_that_are_not_finite_end_the_run(coco, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        train(coco, tmp_path / "o", "--epochs", 3, "--batch_size_per_gpu", 1, "--lr", 1e30, "--warmup_iters", 0)


def test_bad_images_are_counted_and_named(coco, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(coco, root)
    (root / "train2017" / "000000.jpg").write_bytes(b"no image")
    words = ("--epochs", 1, "--batch_size_per_gpu", 1, "--max_bad_images", 1)
    train(root, tmp_path / "o", *words)
    assert (tmp_path / "o" / "bad_images.txt").read_text() == f"{root / 'train2017' / '000000.jpg'}\n"
    with pytest.raises(engine.InputError, match="more than --max_bad_images 0"):
        train(root, tmp_path / "p", *words, "--max_bad_images", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(coco, tmp_path, dtype):
    """Float16's losses are scaled for their gradients; what is skipped for it is no number that ends the run."""
    [record] = train(coco, tmp_path / "o", "--epochs", 1, "--batch_size_per_gpu", 2, "--use_fp16", "true", "--amp_dtype", dtype)
    assert record["settings"]["precision"] == dtype
    content = load(tmp_path / "o" / "checkpoint.pth")
    assert (content.get("fp16_scaler") is not None) == (dtype == "float16")
    assert all(value.isfinite().all() for value in content["model"].values())


def test_a_swin(coco, tmp_path):
    """Four stages with norms of their own, no layer decay; loaded again from the checkpoint."""
    args = training_parser("").parse_args([*SMALL, "--arch", "swin_tiny"])
    args, detector, source, network = train_script.new_detector(args, {}, 3)
    assert args.batch_size_per_gpu == 2 and args.drop_path == 0 and detector.backbone.channels == [96, 192, 384, 768]
    content = {"model": detector.state_dict(), "network": network, "categories": {"ids": [1, 3, 90], "names": ["a", "b", "c"]},
               "settings": {}, "source": {"checkpoint": "random", "key": "random"}, "epoch": 1, "args": args}
    torch.save(content, tmp_path / "c.pth")
    again = load_detector(tmp_path / "c.pth")[0]
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        maps = [part.backbone(images) for part in (detector.eval(), again)]
    assert all(torch.equal(one, other) for one, other in zip(*maps, strict=True))


@pytest.mark.parametrize("entry, value", [("network", {"arch": "vit_huge"}), ("categories", {"ids": [1], "names": []}), ("source", {})])
def test_a_checkpoint_that_cannot_be_used(tmp_path, entry, value):
    content = {"model": {}, "network": {}, "categories": {}, "settings": {}, "source": {}, "epoch": 1, "args": Namespace(), entry: value}
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(engine.InputError, match="c.pth: its entry"):
        load_detector(tmp_path / "c.pth")
    torch.save({"model": {}, "epoch": 1}, tmp_path / "c.pth")
    with pytest.raises(engine.InputError, match="is none of detection: it lacks network"):
        load_detector(tmp_path / "c.pth")


# ---------------------------------------------------------------- recipes, words, schedule, report

def test_schedule():
    rates = train_script.schedule(1e-4, 12, 1000, [8, 11], 500)
    factors = rates / 1e-4
    assert factors[[0, 250, 500, 7999, 8000, 10999, 11000]] == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    assert train_script.schedule(1e-4, 2, 3, [], 0).tolist() == [1e-4] * 6


@pytest.mark.parametrize("arch, factors", [("vit_small", (0.05498, 0.06872, 0.8)), ("vit_base", (0.02376, 0.03168, 0.75))])
def test_recipes_and_factors_of_rates(arch, factors):
    """By id 0, block 0 and block 11, of rho^(13 - id)."""
    rho = recipe_of(arch)["layer_decay"]
    assert [rho ** (13 - i) for i in (0, 1, 12)] == pytest.approx(factors, abs=1e-5)
    assert recipe_of("deit_small") == recipe_of("vit_small") and recipe_of("swin_small") == recipe_of("swin_tiny")


def test_groups_of_parameters():
    args = training_parser("").parse_args(SMALL)
    _, detector, *_ = train_script.new_detector(args, {}, 3)
    groups = dense.parameter_groups(detector, 0.8)
    names = {id(p): name for name, p in detector.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    for name, scale, decayed in (("backbone.body.pos_embed", 0.8 ** 5, True), ("backbone.body.blocks.0.mlp.fc1.weight", 0.8 ** 4, True),
                                 ("backbone.body.blocks.3.norm1.weight", 0.8, False), ("backbone.pyramid.0.0.weight", 1, True),
                                 ("box_heads.1.layers.0.1.weight", 1, False), ("rpn.head.bbox_pred.bias", 1, False)):
        assert (found[name]["lr_scale"], found[name]["decayed"]) == (pytest.approx(scale), decayed), name


def test_words_of_the_reference():
    words = override_words(["--device", "cpu", "data.samples_per_gpu=4", "lr_config.step=8,11", "runner.max_epochs=12",
                            "optimizer.lr=1e-4", "optimizer.paramwise_cfg.layer_decay_rate=0.8",
                            "model.backbone.out_with_norm=true", "model.backbone.use_checkpoint=False"], OVERRIDES)
    args = training_parser("").parse_args(["--pretrained_weights", "random", *words])
    assert (args.device, args.batch_size_per_gpu, args.drops, args.epochs, args.lr) == ("cpu", 4, [8, 11], 12, 1e-4)
    assert (args.layer_decay, args.final_norm, args.grad_checkpointing) == (0.8, True, False)
    with pytest.raises(engine.InputError, match="model.neck.out_channels=64: not known here"):
        override_words(["model.neck.out_channels=64"], OVERRIDES)


def test_run_sh_has_a_row():
    env = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "PYTHON": "python3"}
    line = subprocess.run(["bash", "run.sh", "coco_det", "J", "vit_small", "teacher", "2", "lr_config.step=8,11"], env=env,
                          cwd=report.__file__.rsplit("/evaluation/", 1)[0], capture_output=True, text=True, check=True).stdout
    for part in ("evaluation/object_detection/train.py", "--data_path data/coco", "--output_dir work_dirs/J/det/teacher",
                 "--results_dir work_dirs/J", "lr_config.step=8", "--load_from auto"):
        assert part in line


def test_the_demonstrations_scenes_are_found_in_coco(tmp_path, digits, monkeypatch):
    """The polygons that are written give the masks that were drawn, and boxes around them; ADE20K's maps show the same."""
    monkeypatch.setattr(dense_demo, "SCENES", {"training": 2, "validation": 3})
    dense_demo.write_data(digits, tmp_path)
    images = ValidationImages(tmp_path / "coco")
    assert len(images) == 3 and images.categories.names == list(dense_demo.CLASSES)
    drawn, pairs = dense_demo.read_digits(digits, "validation"), read_pairs(tmp_path / "ade", "validation")
    for index in range(3):
        *_, labels, boxes, masks, classes = dense_demo.draw_scene(np.random.default_rng((1, index)), drawn)
        truth = truth_of(images.record(index))
        assert truth["labels"].tolist() == labels.tolist() and truth["boxes"].tolist() == boxes.tolist()
        found = truth["masks"].bool().numpy()
        assert ((found & masks).sum(axis=(1, 2)) / (found | masks).sum(axis=(1, 2)) > 0.8).all()
        assert not (masks.sum(axis=0) > 1).any()  # objects do not touch
        image, shown = load_pair(pairs[index], 1 + len(dense_demo.CLASSES))
        assert (shown.numpy() == classes).all() and image.shape[1:] == classes.shape
    assert len(drawn_truth(images, 2)) == 2
    with pytest.raises(engine.InputError, match="no folder .*; ./run.sh quickstart makes it"):
        dense_demo.write_data(tmp_path, tmp_path)


def test_numbers_beside_the_papers(tmp_path):
    record = {"protocol": "coco", "checkpoint": "c", "key": "teacher", "time": "2026-01-01T00:00:00", "versions": {},
              "settings": {"arch": "vit_small", "patch_size": 16, "train_images": 117266, "val_images": 5000},
              "metrics": {"bbox_AP": 49.0, "segm_AP": 42.0}}
    (tmp_path / "results.json").write_text(json.dumps([record]))
    (tmp_path / "det" / "teacher").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "det" / "teacher" / "detections.png")
    report.report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "bbox_AP 49.4, bbox_AP50 68.7" in text and "segm_AP 42.6" in text and "| BEiT |" in text
    assert "(det/teacher/detections.png)" in text and "do not compare" not in text
