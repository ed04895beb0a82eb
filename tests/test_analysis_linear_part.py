"""Part-wise linear probing: the features, and the script in one process, in two and resumed."""
import json
from pathlib import Path

import pytest
import torch
from analysis_data import nano, run_main, write_checkpoint

import engine
from analysis.linear_part import eval as linear_part
from evaluation.common.heads import sweep_configs
from evaluation.common.linear import ProbeRun


def test_features_by_hand():
    tokens, scores = torch.tensor([[[1.0], [10], [100], [1000]]]), torch.tensor([[.1, .4, .2, .4]])
    assert linear_part.part_features(tokens, scores, [2, 1, 4, 3]).flatten().tolist() == [505, 10, 277.75, 370]
    assert linear_part.part_features(tokens, scores, [1, 3], reverse=True).flatten().tolist() == [1, 37]


def test_all_patches_are_the_plain_mean_and_order_has_no_say():
    model, images = nano(), torch.randn(3, 3, 32, 32)
    plain = model.get_intermediate_layers(images, 1, norm=False)[0][:, 1:].mean(1)
    found = linear_part.feature_fn(model, [3, 16], False)(images).view(3, 2, -1)
    torch.testing.assert_close(found[:, 1], plain)
    scores = model.get_last_selfattention(images)[:, :, 0, 1:].mean(1)
    tokens = model.get_intermediate_layers(images, 1, norm=False)[0][:, 1:]
    for i in range(3):
        torch.testing.assert_close(found[i, 0], tokens[i, scores[i].topk(3).indices].mean(0))
    order = torch.randperm(16)
    for reverse in (False, True):
        torch.testing.assert_close(linear_part.part_features(tokens[:, order], scores[:, order], [1, 5], reverse),
                                   linear_part.part_features(tokens, scores, [1, 5], reverse))


def test_rates_are_the_papers():
    rates = [config.lr for config in sweep_configs()]
    assert len(rates) == 45 and (rates[0], rates[9], rates[-1]) == (0.0001, 0.001, 9.0)
    settings = {"epochs": 100, "seed": 0, "total_batch": 1024}  # 8 processes of 128
    run = ProbeRun("teacher", Path(), sweep_configs(), 2, 3, settings, True, engine.Process(0, 1, 0, torch.device("cpu")))
    assert run.scale == 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("part") / "checkpoint.pth")


def flags(checkpoint, digits, out, *words):
    return ["--pretrained_weights", checkpoint, "--data_path", digits, "--output_dir", out, "--topk", "1", "16", "4", "--epochs", "3",
            "--augment", "false", *words]


def records(folder):
    return {(r["key"], r["settings"]["topk"]): r for r in json.loads((folder / "results.json").read_text())}


def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint, digits, tmp_path, monkeypatch):
    run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path / "1", "--batch_size", "40"))
    one = records(tmp_path / "1")
    assert set(one) == {("teacher", k) for k in (1, 16, 4)} and (tmp_path / "1/accuracy.png").stat().st_size > 1000
    # Stopped between the files of two k: those that are behind catch up.
    calls, plain = [], ProbeRun.validate

    def stop(run, epoch, *rest):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(plain(run, epoch, *rest))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProbeRun, "validate", stop)
        run_main(patch, linear_part, *flags(checkpoint, digits, tmp_path / "3", "--batch_size", "40"))
    for _ in range(2):  # the second time there is nothing to do
        run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path / "3", "--batch_size", "40", "--load_from", "auto"))
    assert len(json.loads((tmp_path / "3/results.json").read_text())) == 3
    for place, record in records(tmp_path / "3").items():
        assert record["metrics"] == one[place]["metrics"]
        logs = [(tmp_path / n / f"top{place[1]}/log.txt").read_text() for n in "13"]
        assert logs[0] == logs[1] and logs[0].count("\n") == 3


@pytest.mark.parametrize("stop, words", [(engine.Preempted, ()), (KeyboardInterrupt, ("--save_every_steps", "1"))])
def test_all_k_stop_and_are_saved_together(checkpoint, digits, tmp_path, monkeypatch, stop, words):
    """In the second epoch, after one of three updates: by a signal, or killed with a checkpoint after every update."""
    words = ("--batch_size", "40", "--topk", "1", "16", "--epochs", "2", *words)
    run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path / "whole", *words))
    plain, calls = engine.StopSignals.wait_for, []

    def wait_for(signals, call):
        calls.append(call)
        if len(calls) == 5 and stop is KeyboardInterrupt:
            raise stop
        signals.received = signals.received or ("SIGTERM" if len(calls) == 5 else None)
        return plain(signals, call)

    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(engine.StopSignals, "wait_for", wait_for)
        run_main(patch, linear_part, *flags(checkpoint, digits, tmp_path / "cut", *words))
    for k in (1, 16):
        state = engine.load_checkpoint(tmp_path / f"cut/top{k}/checkpoint_teacher_linear_last.pth")
        assert (state["epoch"], state["progress"]["step"]) == (1, 1)
    run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path / "cut", *words, "--load_from", "auto"))
    for k in (1, 16):
        whole, cut = (tmp_path / name / f"top{k}" for name in ("whole", "cut"))
        assert (whole / "log.txt").read_text() == (cut / "log.txt").read_text()
        a, b = (engine.load_checkpoint(folder / "checkpoint_teacher_linear_last.pth")["state_dict"] for folder in (whole, cut))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_random_crops_and_two_keys(checkpoint, digits, tmp_path, monkeypatch):
    run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path, "--augment", "true", "--checkpoint_key", "teacher,student",
                                              "--epochs", "1", "--reverse_top", "true"))
    assert set(records(tmp_path)) == {(key, k) for key in ("teacher", "student") for k in (1, 16, 4)}
    assert (tmp_path / "student/top4_reverse/checkpoint_student_linear.pth").exists()


@pytest.mark.parametrize("words, message", [
    (("--topk", "17"), "--topk 17: images of 32 pixels have 16 patches"),
    (("--topk", "3", "3"), "a number is there twice"),
    (("--load_from", "last.pth"), "top1/last.pth does not exist"),
    (("--data_path", "/nowhere"), "/nowhere/train"),
])
def test_mistakes_are_named(checkpoint, digits, tmp_path, monkeypatch, words, message):
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, linear_part, *flags(checkpoint, digits, tmp_path, *words))
