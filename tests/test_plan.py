"""`./run.sh plan`: what it prints follows from what it measures, and it writes nothing."""
import re

import pytest
import torch

import engine
import loader
import main_ibot
from benchmarks import plan

FLAGS = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--device", "cpu", "--head_hidden_dim", "64",
         "--batch_size_per_gpu", "8", "--num_workers", "0", "--pred_ratio", "0.3", "--pred_ratio_var", "0", "--shared_head", "true", "--use_fp16", "false",
         "--out_dim", "64", "--patch_out_dim", "64", "--epochs", "10"]


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["plan.py", *FLAGS, *map(str, words)])
    plan.main()


def test_plan(digits, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "loader_speed", lambda *args: 50.0)
    monkeypatch.setattr(plan, "timed", lambda call, device: call() and 0.5 or 0.5)  # half a second an update
    monkeypatch.setattr(plan, "memory_of", lambda device: 1e6)
    run(monkeypatch, "--data_path", digits / "train", "--devices", 3, "--recipe", "vit_s16_800ep", "--epochs", 10,
        "--local_crops_number", 0)
    out = capsys.readouterr().out
    assert "recipe vit_s16_800ep, batch 1024" in out and "10 epochs of 120 images" in out
    assert re.search(r"step +16\.0 images/s, 8 at once in float32", out) and "limit    the step, 3.1 times slower" in out
    assert f"{10 * 120 / (3 * 16) / 3600:8.1f} hours" in out
    per, accum = map(int, re.search(r"batch    1024 = 3 x --batch_size_per_gpu (\d+) x --accum_iter (\d+)", out).groups())
    assert 3 * per * accum >= 1024 > 3 * (per - 1) * accum
    assert not list(tmp_path.iterdir())


def test_part_of_a_batch(digits):
    args = main_ibot.get_args_parser().parse_args([*FLAGS, "--data_path", str(digits / "train"), "--local_crops_number", "1"])
    dataset = main_ibot.build_data(args, engine.Process(0, 1, 0, torch.device("cpu")), "cpu", 1).dataset
    samples = [dataset[i] for i in range(8)]
    found, expected = plan.cut(loader.collate(samples), 3), loader.collate(samples[:3])
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_mistakes(digits, monkeypatch):
    for words, message in ((["--devices", 0], "--devices 0: must be positive"), (["--data_path", "absent"], "absent"),
                           (["--mask_crops", "all"], "no --mask_crops all")):
        with pytest.raises(engine.InputError, match=message):
            run(monkeypatch, "--data_path", digits / "train", *words)
