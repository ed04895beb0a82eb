"""Linear probe: features, heads and optimisers against plain torch, one and two processes, resuming, bad input."""
import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import engine
import models
import utils
from evaluation import eval_linear, eval_linear_multi
from evaluation.common.augment import AugmentedImages, ShareOfBatches
from evaluation.common.data import epoch_order, eval_transform, image_sets
from evaluation.common.features import feature_dim, pool_features
from evaluation.common.heads import HeadConfig, LinearHeads, sweep_configs
from evaluation.common.linear import best_head

# ---------------------------------------------------------------- the grid

def test_grid_is_the_reference_s():
    rates = [config.lr for config in sweep_configs()]
    assert len(rates) == 45 and rates == sorted(rates) and (rates[0], rates[-1]) == (0.0001, 9.0)
    assert rates[:11] == [0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0007, 0.0008, 0.0009, 0.001, 0.002]
    full = sweep_configs(sweep_lr_only=False)
    assert len(full) == 180
    for r in (0, 17, 44):
        for d, decay in enumerate((0.0, 1e-6)):
            for o, optimizer in enumerate(("sgd", "lars")):
                assert full[(r * 2 + d) * 2 + o] == HeadConfig(rates[r], decay, optimizer)
    assert [i for i, config in enumerate(full) if config.is_plain] == list(range(0, 180, 4))


# ---------------------------------------------------------------- features

@torch.no_grad()
@pytest.mark.parametrize("n, mode", [(1, 0), (4, 0), (1, 1), (4, 1), (1, 2), (4, 2)])
def test_features_of_every_option_equal_a_plain_computation(n, mode):
    torch.manual_seed(0)
    vit = models.build_backbone("vit_nano", patch_size=8, img_size=32).eval()
    for parameter in vit.parameters():  # a norm that is not the identity
        parameter.add_(0.05 * torch.randn_like(parameter))
    images, raw = torch.randn(3, 3, 32, 32), []
    x = vit.prepare_tokens(images)
    for block in vit.blocks:
        x = block(x)
        raw.append(x)
    normed = [(x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt() * vit.norm.weight
              + vit.norm.bias for x in raw]
    parts = {0: [x[:, 0] for x in normed[-n:]], 1: [raw[-1][:, 1:].sum(1) / 16],
             2: [x[:, 0] for x in normed[-n:]] + [normed[-1][:, 1:].sum(1) / 16]}[mode]
    features = pool_features(vit, images, n, mode)
    assert features.shape[1] == feature_dim(vit, n, mode)
    torch.testing.assert_close(features, torch.cat(parts, dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_swin_taps_equal_a_plain_computation():
    """Means over the tokens of each of the last four blocks; those of the last stage after the final norm."""
    torch.manual_seed(0)
    swin = models.swin_tiny(drop_path_rate=0.0).eval()
    outputs = []
    for stage in swin.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, given, output: outputs.append(output))
    images = torch.randn(1, 3, 224, 224)
    features = pool_features(swin, images, 4, 0)
    tokens = [x.flatten(1, -2) for x in outputs[-4:]]  # [1, N, D]
    assert [x.shape[2] for x in tokens] == [384, 384, 768, 768]
    expected = torch.cat([tokens[0].mean(1), tokens[1].mean(1), swin.norm(tokens[2]).mean(1), swin.norm(tokens[3]).mean(1)], 1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert features.shape[1] == feature_dim(swin, 4) == 2304


# ---------------------------------------------------------------- heads

def toy(n=200, dim=12, classes=7):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, dim, generator=generator) + F.one_hot(labels, dim), labels


def first_linear(dim, classes, seed=0):
    """The head that training starts from, as a plain module."""
    linear = torch.nn.Linear(dim, classes)
    with torch.no_grad():
        torch.nn.init.zeros_(linear.bias)
        linear.weight.copy_(torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)) * 0.01)
    return linear


@pytest.mark.parametrize("sweep_lr_only, block", [(True, None), (True, 1000), (False, None), (False, 1000)])
def test_heads_of_a_sweep_equal_the_same_heads_trained_one_by_one(sweep_lr_only, block):
    """Against plain modules with torch's SGD, and LARS as written in this project's utils, over 20 steps of changing rates.

    In float64: the largest rates blow up the rounding of float32, which differs by processor.
    """
    features, labels = toy()
    features, configs = features.double(), sweep_configs(sweep_lr_only)
    heads = LinearHeads(configs, 12, 7, block=block)
    for name in ("weight", "bias", "weight_momentum", "bias_momentum", "rate", "decay"):
        setattr(heads, name, getattr(heads, name).double())
    heads.rate = torch.tensor([config.lr for config in configs], dtype=torch.float64)
    batches = [torch.arange(10 * i, 10 * i + 10) % 200 for i in range(20)]
    losses = torch.stack([heads.step(features[rows], labels[rows], 0.5 * (1 + math.cos(math.pi * i / 20)))
                          for i, rows in enumerate(batches)])
    assert losses.shape == (20, len(configs))
    for i in range(0, len(configs), 1 if sweep_lr_only else 3):
        config, linear = configs[i], first_linear(12, 7).double()
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(linear.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
        else:
            optimizer = utils.LARS(linear.parameters(), config.lr, weight_decay=config.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0)
        for step, rows in enumerate(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(linear(features[rows]), labels[rows])
            torch.testing.assert_close(losses[step, i], loss.detach(), rtol=1e-6, atol=1e-6)
            loss.backward()
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(heads.weight[i], linear.weight.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(heads.bias[i], linear.bias.detach(), rtol=1e-6, atol=1e-6)
    assert (heads.weight[0] - heads.weight[-1 if sweep_lr_only else -4]).abs().max() > 0.1


@pytest.mark.parametrize("classes, rows", [(7, 13), (3, 1024)])
def test_validation_equals_plain_accuracies(classes, rows):
    features, labels = toy(classes=classes)
    heads = LinearHeads(sweep_configs()[::9], 12, classes, block=50)
    for _ in range(5):
        heads.step(features, labels, 1.0)
    scores = heads.evaluate(features, labels, rows)
    assert scores.shape == (5, 3)
    for i in range(5):
        logits = features @ heads.weight[i].T + heads.bias[i]
        top = logits.topk(min(5, classes)).indices == labels[:, None]
        expected = [F.cross_entropy(logits, labels).item(), 100 * top[:, 0].double().mean().item(), 100 * top.any(1).double().mean().item()]
        assert scores[i].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_diverged_head_counts_as_wrong():
    features, labels = toy()
    heads = LinearHeads(sweep_configs()[:2], 12, 7)
    heads.weight[1] = math.nan
    scores = heads.evaluate(features, labels)
    assert math.isnan(scores[1, 0]) and scores[1, 1:].tolist() == [0, 0]
    assert math.isfinite(scores[0, 0]) and scores[0, 2] > 0


def test_of_equally_good_heads_the_last_is_best():
    configs = sweep_configs()[:4]
    scores = [(1.0, 50.0, 80.0), (2.0, 60.0, 70.0), (9.0, 60.0, None), (0.5, 10.0, 90.0)]
    assert best_head(scores, range(4), configs, 5) == {"top1": 60.0, "epoch": 5, "head": 2, "lr": 0.0003, "weight_decay": 0.0, "optimizer": "sgd"}
    assert best_head(scores, [0, 1, 3], configs, 5)["head"] == 1


# ---------------------------------------------------------------- images of an epoch

@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_make_up_the_same_batches_for_any_number_of_processes(processes):
    n, size = 22, 7  # of the last batch, one image: some shares are empty
    samplers = [ShareOfBatches(n, size, engine.Process(rank, processes, rank, torch.device("cpu")), seed=3) for rank in range(processes)]
    orders = []
    for epoch in (0, 5):
        order = epoch_order(n, 3, epoch).tolist()
        orders.append(order)
        assert sorted(order) == list(range(n))
        for sampler in samplers:
            sampler.epoch = epoch
        for start, shares in zip(range(0, n, size), zip(*samplers, strict=True), strict=True):
            batch = [(epoch, index) for index in order[start:start + size]]
            assert len(samplers[0]) == 4
            for rank, share in enumerate(shares):
                assert share == (batch[rank::processes] or batch[:1])
    assert orders[0] != orders[1]


def test_training_crops_are_torchvision_s_and_depend_on_epoch_and_index_alone(digits):
    train, _ = image_sets("imagefolder", digits)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    crops = AugmentedImages(train, 32, seed=7)
    first, label, index = crops[3, 11]
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32) and (label, index) == (train.targets[11], 11)
    assert torch.equal(AugmentedImages(train, 32, seed=7)[3, 11][0], first)
    for other in (crops[4, 11][0], crops[3, 12][0], AugmentedImages(train, 32, seed=8)[3, 11][0]):
        assert not torch.equal(other, first)
    # The same draws through Pillow, by hand.
    image = Image.open(train.samples[11][0]).convert("RGB")
    torch.manual_seed(int(np.random.SeedSequence((7, 3, 11)).generate_state(1, np.uint64)[0]))
    box = v2.RandomResizedCrop(32, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)).make_params([image])
    flip = torch.rand(1) < 0.5
    plain = image.crop((box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])).resize((32, 32), Image.Resampling.BILINEAR)
    plain = torch.from_numpy(np.asarray(plain).copy()).permute(2, 0, 1)
    assert torch.equal(first, plain.flip(2) if flip else plain)


# ---------------------------------------------------------------- the scripts

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights as a file of pre-training, with two keys."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("job") / "checkpoint.pth"
    networks = {key: {f"backbone.{name}": value for name, value in models.vit_nano(patch_size=8, img_size=32).state_dict().items()}
                for key in ("teacher", "student")}
    torch.save(networks | {"args": argparse.Namespace(arch="vit_nano", patch_size=8, window_size=7, global_crops_size=32)}, path)
    return path


@pytest.fixture
def probe(checkpoint, digits, monkeypatch, capfd):
    """probe(script module, folder, *flags): run it in this process; returns what it printed, or fails as `engine.run` does."""
    def run(script, folder, *words):
        given = ["--pretrained_weights", checkpoint, "--data_path", digits, "--device", "cpu", "--num_workers", 0,
                 "--batch_size_per_gpu", 50, "--epochs", 3, "--output_dir", folder, *words]
        monkeypatch.setattr(sys, "argv", ["script", *map(str, given)])
        engine.run(script.main)
        return capfd.readouterr().out
    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def read(path):
    return torch.load(path, weights_only=True)


def test_sweep_on_kept_features_equals_plain_torch(probe, checkpoint, digits, tmp_path):
    """The whole protocol, against modules, SGD and cosine schedules of torch on features computed here."""
    output = probe(eval_linear_multi, tmp_path, "--augment", "false")
    train, val = image_sets("imagefolder", digits)
    model = models.vit_nano(patch_size=8, img_size=32).eval()
    model.load_state_dict(engine.backbone_state_dict(engine.load_checkpoint(checkpoint), "teacher", checkpoint))
    with torch.no_grad():
        features, val_features = (pool_features(model, torch.stack([image for image, _, _ in part.with_transform(eval_transform(32))]), 4)
                                  for part in (train, val))
    labels, val_labels = torch.from_numpy(train.targets), torch.from_numpy(val.targets)
    last, best = (read(tmp_path / f"checkpoint_teacher_linear{name}.pth") for name in ("_last", ""))
    log = lines(tmp_path)
    accuracies = np.zeros((3, 45))
    for i in (0, 9, 18, 31, 44):
        linear = first_linear(4 * 96, 10)
        rate = sweep_configs()[i].lr * 50 / 256
        optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        for epoch in range(3):
            assert log[epoch][f"train_lr{i}"] == pytest.approx(optimizer.param_groups[0]["lr"])
            total = 0
            for rows in epoch_order(120, 0, epoch).split(50):
                optimizer.zero_grad()
                loss = F.cross_entropy(linear(features[rows]), labels[rows])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            scheduler.step()
            logits = linear(val_features)
            assert log[epoch][f"train_loss{i}"] == pytest.approx(total / 120, rel=1e-4)
            assert log[epoch][f"test_loss{i}"] == pytest.approx(F.cross_entropy(logits, val_labels).item(), rel=1e-4)
            accuracies[epoch, i] = 100 * (logits.argmax(1) == val_labels).double().mean()
            assert log[epoch][f"test_acc{i}@1"] == pytest.approx(accuracies[epoch, i])
            assert log[epoch][f"test_acc{i}@5"] == pytest.approx(100 * (logits.topk(5).indices == val_labels[:, None]).any(1).double().mean().item())
        for ours, plain in ((last["state_dict"][f"{i}.module.linear.weight"], linear.weight.detach()),
                            (last["optimizers"][i]["state"][0]["momentum_buffer"], optimizer.state[linear.weight]["momentum_buffer"])):
            if i < 44:
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
            else:  # the largest rate blows up the rounding of float32, which differs by processor
                assert (ours - plain).norm() < 1e-3 * plain.norm()
        # What is saved continues in torch's own optimiser and schedule.
        for epoch in range(1, 4):
            assert log[epoch - 1]["epoch"] == epoch - 1
        again = torch.optim.SGD(linear.parameters(), 1.0, momentum=0.5)
        again.load_state_dict(last["optimizers"][i])
        assert again.param_groups[0]["momentum"] == 0.9
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(again, 7)
        schedule.load_state_dict(last["schedulers"][i])
        assert {k: v for k, v in schedule.state_dict().items() if k in last["schedulers"][i]} == last["schedulers"][i]
        assert (schedule.T_max, schedule.last_epoch, schedule.base_lrs) == (3, 3, [pytest.approx(rate)])
        assert scheduler.state_dict()["_last_lr"] == pytest.approx(last["schedulers"][i]["_last_lr"], abs=1e-12)

    # Of all heads and epochs the best; of equal heads the last.
    top1 = np.array([[line[f"test_acc{i}@1"] for i in range(45)] for line in log])
    assert {"epoch", "state_dict", "optimizers", "schedulers", "best_acc", "best_acc_hidx", "best_acc_sweep_lr_only"} <= best.keys()
    assert best["best_acc"] == last["best_acc"] == best["best_acc_sweep_lr_only"] == top1.max()
    epoch = max(e for e in range(3) if top1[e].max() == top1.max())
    head = max(i for i in range(45) if top1[epoch, i] == top1.max())
    assert (best["epoch"], best["best_acc_hidx"]) == (epoch + 1, head) and last["epoch"] == 3
    record, = json.loads((tmp_path / "results.json").read_text())
    assert record["protocol"] == "linear" and record["settings"]["heads"] == 45
    assert record["metrics"]["best"] == {"top1": top1.max(), "top5": log[epoch][f"test_acc{head}@5"], "epoch": epoch, "head": head,
                                         "lr": sweep_configs()[head].lr, "weight_decay": 0.0, "optimizer": "sgd"}
    assert record["metrics"]["last"]["top1"] == top1[2].max() and record["metrics"]["last"]["epoch"] == 2
    assert f"teacher, best: top-1 {top1.max():.2f} %" in output and "images/s  eta" in output


def test_a_head_of_the_sweep_is_the_head_of_its_rate_alone(probe, tmp_path):
    """On random crops; the solo files have the reference's names."""
    probe(eval_linear_multi, tmp_path / "sweep", "--n_last_blocks", 1, "--avgpool_patchtokens", 2)
    probe(eval_linear, tmp_path / "solo", "--n_last_blocks", 1, "--avgpool_patchtokens", 2, "--lr", 0.3, "--results_dir", tmp_path / "job")
    i = [config.lr for config in sweep_configs()].index(0.3)
    sweep, solo = (read(tmp_path / name / "checkpoint_teacher_linear_last.pth") for name in ("sweep", "solo"))
    assert solo["state_dict"].keys() == {"module.linear.weight", "module.linear.bias"}
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= solo.keys() and "best_acc_hidx" not in solo
    for name in ("weight", "bias"):
        torch.testing.assert_close(sweep["state_dict"][f"{i}.module.linear.{name}"], solo["state_dict"][f"module.linear.{name}"])
    for mine, theirs in zip(lines(tmp_path / "solo"), lines(tmp_path / "sweep"), strict=True):
        assert mine == pytest.approx({"epoch": theirs["epoch"], "train_loss": theirs[f"train_loss{i}"], "train_lr": theirs[f"train_lr{i}"],
                                      "test_loss": theirs[f"test_loss{i}"], "test_acc1": theirs[f"test_acc{i}@1"], "test_acc5": theirs[f"test_acc{i}@5"]})
    record, = json.loads((tmp_path / "job" / "results.json").read_text())
    assert record["protocol"] == "linear_solo" and record["metrics"]["best"]["lr"] == 0.3
    assert not (tmp_path / "solo" / "results.json").exists()


@pytest.mark.parametrize("script, words", [(eval_linear_multi, ["--sweep_lr_only", "false"]), (eval_linear, ["--lr", "1"])])
def test_resuming_equals_an_uninterrupted_run(probe, script, words, tmp_path, monkeypatch):
    probe(script, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    # What is there when the run is killed in epoch 1, after a validation.
    with monkeypatch.context() as patch:
        original = engine.save_atomically

        def killed(state, path, previous):
            original(state, path)
            if path.name.endswith("_last.pth") and state["epoch"] == 2:
                raise KeyboardInterrupt
        patch.setattr(engine.files, "save_atomically", killed)
        with pytest.raises(SystemExit):  # engine.run turned it into an exit code
            probe(script, tmp_path / "cut", *words, "--overwrite", "true")
    assert len(lines(tmp_path / "cut")) == 2
    probe(script, tmp_path / "cut", *words, "--load_from", "checkpoint_teacher_linear_last.pth")
    whole, cut = (read(tmp_path / name / "checkpoint_teacher_linear_last.pth") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert whole["best"] == cut["best"] and whole["best_acc"] == cut["best_acc"]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole") and len(lines(tmp_path / "cut")) == 3
    # Back to the best epoch: the later lines go and come again.
    probe(script, tmp_path / "whole", *words, "--load_from", "checkpoint_teacher_linear.pth")
    assert [line["epoch"] for line in lines(tmp_path / "whole")] == [0, 1, 2]
    output = probe(script, tmp_path / "whole", *words, "--load_from", "checkpoint_teacher_linear_last.pth")
    assert "nothing to do" in output and f"best: top-1 {whole['best_acc']:.2f} %" in output


def test_a_file_of_the_reference_is_resumed(probe, tmp_path, monkeypatch):
    """Its entries alone, optimiser and schedule as torch writes them."""
    states, original = [], engine.save_atomically
    with monkeypatch.context() as patch:
        patch.setattr(engine.files, "save_atomically", lambda state, path, previous: (original(state, path), states.append(read(path))))
        probe(eval_linear, tmp_path, "--lr", 1)
    state = next(state for state in states if state["epoch"] == 2)
    whole = read(tmp_path / "checkpoint_teacher_linear_last.pth")
    linear = torch.nn.Linear(384, 10)
    optimizer = torch.optim.SGD(linear.parameters(), 1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.save({"epoch": state["epoch"], "state_dict": state["state_dict"], "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "best_acc": state["best_acc"]}, tmp_path / "reference.pth")
    output = probe(eval_linear, tmp_path, "--lr", 1, "--load_from", "reference.pth")
    assert "starting at epoch 2 of 3" in output
    again = read(tmp_path / "checkpoint_teacher_linear_last.pth")
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert again["best_acc"] == whole["best_acc"]


def stop_at(fetch, patch):
    """SIGTERM while that fetch of this process, counted from 1, is waited for."""
    original, fetched = engine.StopSignals.wait_for, []

    def wait_for(signals, call):
        fetched.append(call)
        return original(signals, (lambda: os.kill(os.getpid(), signal.SIGTERM)) if len(fetched) == fetch else call)
    patch.setattr(engine.StopSignals, "wait_for", wait_for)


def assert_same_end(whole, cut):
    """All that two runs leave is the same, but for the time and what they were called with."""
    for name in ("checkpoint_teacher_linear_last.pth", "checkpoint_teacher_linear.pth"):
        a, b = (flat({**read(folder / name), "args": None}) for folder in (whole, cut))
        assert a.keys() == b.keys()
        assert [key for key in a if not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key])] == []
    assert lines(whole) == lines(cut)


def flat(value, name=""):
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for place, part in items for key, leaf in flat(part, f"{name}.{place}").items()}


@pytest.mark.parametrize("script, words", [(eval_linear_multi, ["--sweep_lr_only", "false", "--augment", "false"]),
                                           (eval_linear, ["--lr", "1", "--val_freq", "2"])])
def test_a_stopped_probe_goes_on_bit_for_bit(probe, script, words, tmp_path, monkeypatch, capfd):
    """SIGTERM before the first validation, in mid-epoch after it, and before the first batch of an epoch."""
    probe(script, tmp_path / "whole", *words)
    for fetch, epoch, step in ((2, 0, 1), (5, 1, 1), (7, 2, 0)):
        with monkeypatch.context() as patch, pytest.raises(engine.Preempted, match=(
                f"stopped by a signal at epoch {epoch}, step {step}, and saved: the same command with --load_from auto")):
            stop_at(fetch, patch)
            patch.setattr(engine, "run", lambda main: main())
            probe(script, tmp_path / str(fetch), *words)
        output = probe(script, tmp_path / str(fetch), *words, "--load_from", "auto")
        assert f"starting at epoch {epoch} of 3" + f", step {step}" * (step > 0) + "\n" in output
        assert_same_end(tmp_path / "whole", tmp_path / str(fetch))


def test_a_full_disk_is_a_warning(probe, tmp_path, capfd, file_limit):
    file_limit(20_000)  # of some 35,000
    output = probe(eval_linear, tmp_path, "--lr", 1)
    file_limit(resource.RLIM_INFINITY)
    assert "teacher, best: top-1" in output and [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "results.json", ".results.json.lock"}
    file_limit(20_000)
    with pytest.raises(SystemExit):
        probe(eval_linear, tmp_path / "stop", "--lr", 1, "--on_save_error", "stop", "--print_freq", 1)
    file_limit(resource.RLIM_INFINITY)
    captured = capfd.readouterr()
    assert re.fullmatch(r"error: .*checkpoint_teacher_linear_last.pth could not be written .*intact\n", captured.err)
    assert re.search(r"epoch 0/3 \[2/3\]  loss \d\.\d+  .* images/s", captured.out)


PARTS = {"augmented": ("multi", ["--augment", "true"]), "kept": ("multi", ["--augment", "false"]), "solo": ("solo", [])}


def run_parts(rank, processes, folder, words):
    """All of PARTS in this process, one of `processes`; of two also a run that is stopped and resumed."""
    if processes > 1:
        torch.set_num_threads(1)
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)})
    for name, (script, more) in PARTS.items():
        sys.argv = ["script", *words, *more, "--batch_size_per_gpu", str(34 // processes), "--output_dir", f"{folder}/{processes}/{name}",
                    "--dist_url", f"file://{folder}/rendezvous-{name}"]
        engine.run({"multi": eval_linear_multi, "solo": eval_linear}[script].main)
    if processes == 1:
        return
    # The first of them once more: a signal to one of two processes stops both, in mid-epoch, and they go on.
    for i, more in enumerate(([], ["--load_from", "auto"])):
        sys.argv = ["script", *words, "--batch_size_per_gpu", "17", "--output_dir", f"{folder}/cut",
                    "--dist_url", f"file://{folder}/rendezvous-cut{i}", *more]
        if more:
            engine.run(eval_linear_multi.main)
            continue
        with pytest.MonkeyPatch.context() as patch, pytest.raises(engine.Preempted, match="at epoch 1, step 1, and saved"):
            if rank == 1:
                stop_at(6, patch)
            eval_linear_multi.main()
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(checkpoint, digits, tmp_path, monkeypatch):
    """120 images in batches of 34: the last is smaller. The one head of the solo run is trained by one of the processes."""
    words = ["--pretrained_weights", checkpoint, "--data_path", digits, "--device", "cpu", "--num_workers", "0", "--epochs", "2"]
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", [])
    run_parts(0, 1, tmp_path, words)
    torch.multiprocessing.spawn(run_parts, (2, str(tmp_path), words), nprocs=2)
    for name in PARTS:
        one, two = (read(tmp_path / str(p) / name / "checkpoint_teacher_linear_last.pth") for p in (1, 2))
        assert one["state_dict"].keys() == two["state_dict"].keys()
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-5)
        assert [line["epoch"] for line in lines(tmp_path / "2" / name)] == [0, 1]
        assert lines(tmp_path / "2" / name)[1] == pytest.approx(lines(tmp_path / "1" / name)[1], rel=1e-4)
        assert read(tmp_path / "2" / name / "checkpoint_teacher_linear.pth")["settings"]["total_batch"] == 34
    assert_same_end(tmp_path / "2" / "augmented", tmp_path / "cut")


def test_validation_frequency_keys_and_outputs(probe, tmp_path):
    output = probe(eval_linear, tmp_path, "--checkpoint_key", "teacher,student", "--val_freq", 2, "--epochs", 4, "--num_labels", 12)
    for key in ("teacher", "student"):
        assert [(line["epoch"], "test_acc1" in line) for line in lines(tmp_path / key)] == [(0, True), (1, False), (2, True), (3, True)]
        assert read(tmp_path / key / f"checkpoint_{key}_linear.pth")["state_dict"]["module.linear.weight"].shape == (12, 384)
        assert f"{key}, best: " in output
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["key"] for record in records] == ["teacher", "student"]


def test_overwriting(probe, tmp_path, capfd):
    probe(eval_linear, tmp_path, "--epochs", 2)
    with pytest.raises(SystemExit):
        probe(eval_linear, tmp_path, "--epochs", 1)
    assert "checkpoint_teacher_linear_last.pth" in capfd.readouterr().err
    probe(eval_linear, tmp_path, "--epochs", 1, "--overwrite", "true")
    assert len(lines(tmp_path)) == 1
    (tmp_path / "checkpoint_teacher_linear_last.pth").unlink()
    with pytest.raises(SystemExit):  # a log that another script may have written
        probe(eval_linear, tmp_path, "--overwrite", "true")
    assert "log.txt" in capfd.readouterr().err and len(lines(tmp_path)) == 1


def test_resuming_what_is_there(probe, tmp_path, capfd):
    """`--load_from auto`, as run.sh gives it: the same command starts, goes on, or says that nothing is left."""
    again = ("--load_from", "auto", "--lr", 1)
    (tmp_path / "job").mkdir()
    (tmp_path / "job/log.txt").touch()  # killed in its first epoch
    first = probe(eval_linear, tmp_path / "job", *again)
    assert "starting at epoch 0 of 3" in first
    assert "nothing to do" in probe(eval_linear, tmp_path / "job", *again)
    last = tmp_path / "job/checkpoint_teacher_linear_last.pth"
    torch.save(read(tmp_path / "job/checkpoint_teacher_linear.pth") | {"epoch": 2}, last)
    assert "starting at epoch 2 of 3" in probe(eval_linear, tmp_path / "job", *again)
    assert [line["epoch"] for line in lines(tmp_path / "job")] == [0, 1, 2]
    # Of other weights: only with --overwrite true, which takes nothing away from one of the same weights.
    assert "nothing to do" in probe(eval_linear, tmp_path / "job", *again, "--overwrite", "true")
    torch.save(read(last) | {"settings": read(last)["settings"] | {"weights_hash": "others"}}, last)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        probe(eval_linear, tmp_path / "job", *again)
    assert re.fullmatch(r"error: checkpoint .*_last\.pth: trained on features of other weights; --overwrite true starts over\n", capfd.readouterr().err)
    output = probe(eval_linear, tmp_path / "job", *again, "--overwrite", "true")
    assert "is of other weights: starting over" in output and "starting at epoch 0 of 3" in output
    assert [line["epoch"] for line in lines(tmp_path / "job")] == [0, 1, 2]
    output = probe(eval_linear, tmp_path / "keys", *again, "--checkpoint_key", "teacher,student")
    assert output.count("starting at epoch 0") == 2
    (tmp_path / "keys/teacher/checkpoint_teacher_linear_last.pth").unlink()
    with pytest.raises(SystemExit):  # a log that another script may have written
        probe(eval_linear, tmp_path / "keys", *again, "--checkpoint_key", "teacher,student")
    assert "already holds log.txt; which is not of this probe" in capfd.readouterr().err


@pytest.mark.parametrize("script, words, message", [
    (eval_linear, ["--lr", "0"], "--lr 0.0"),
    (eval_linear, ["--lr", "1e39"], "teacher.*epoch 0.*learning rate"),
    (eval_linear, ["--num_labels", "3"], "--num_labels 3.*10 classes"),
    (eval_linear, ["--checkpoint_key", "nobody"], "nobody.*teacher"),
    (eval_linear, ["--n_last_blocks", "9"], "--n_last_blocks 9"),
    (eval_linear, ["--load_from", "no.pth"], "no.pth does not exist"),
    (eval_linear, ["--load_from", "a.pth", "--checkpoint_key", "teacher,student"], "--load_from a.pth.*one --checkpoint_key"),
    (eval_linear_multi, ["--load_from", "solo.pth"], "solo.pth.*sweep.*optimizers"),
    (eval_linear, ["--load_from", "solo.pth", "--lr", "5"], r"solo.pth.*rate \[0.39.*\[0.97"),
    (eval_linear, ["--load_from", "solo.pth", "--epochs", "9", "--lr", "2"], "solo.pth.*3 epochs"),
    (eval_linear, ["--load_from", "solo.pth", "--seed", "1", "--lr", "2"], "solo.pth.*other seed"),
    (eval_linear, ["--load_from", "other.pth", "--lr", "2"], r"other.pth.*weight.*\(10, 5\).*\(10, 384\)"),
    (eval_linear, ["--load_from", "empty.pth", "--lr", "2"], "empty.pth.*module.linear.weight"),
])
def test_bad_input_ends_with_one_line(probe, tmp_path, capfd, script, words, message):
    if "--load_from" in words:
        probe(eval_linear, tmp_path, "--lr", 2)
        state = read(tmp_path / "checkpoint_teacher_linear_last.pth")
        torch.save(state, tmp_path / "solo.pth")
        del state["settings"]  # as the reference's
        torch.save(state | {"state_dict": {}}, tmp_path / "empty.pth")
        state["state_dict"]["module.linear.weight"] = torch.zeros(10, 5)
        torch.save(state, tmp_path / "other.pth")
    with pytest.raises(SystemExit) as end:
        probe(script, tmp_path, *words)
    error = capfd.readouterr().err.splitlines()
    assert end.value.code == 1 and len(error) == 1 and error[0].startswith("error: "), error
    assert re.search(message, error[0]), error[0]
