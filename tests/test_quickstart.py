"""The first run's parts: the digits as a folder, and the report on a run."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import main_ibot
from analysis import quickstart

RUN = ["--arch", "vit_nano", "--patch_size", "4", "--global_crops_size", "16", "--local_crops_size", "8", "--device", "cpu",
       "--local_crops_number", "2", "--out_dim", "32", "--head_hidden_dim", "64", "--shared_head", "true", "--num_workers", "0"]


@pytest.fixture
def main(monkeypatch, capsys):
    """main(module, "--flag", value) runs the `main` of a script in this process and returns what it printed."""
    def main(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
        module.main()
        return capsys.readouterr().out
    return main


def test_digits_folder_and_report(call, main, tmp_path):
    data, out = tmp_path / "digits", tmp_path / "run"
    assert "1797 new" in call("analysis/quickstart.py", "data", "--output_dir", data).stdout
    files = sorted(data.rglob("*.png"))
    assert len(files) == 1797 and len(list((data / "val").rglob("*.png"))) == 503
    assert {p.parent.name for p in files} == set("0123456789")
    files[7].unlink()
    assert "1 new" in main(quickstart, "data", "--output_dir", data)
    assert np.asarray(Image.open(files[7])).shape == (32, 32)

    for number, file in enumerate(sorted((data / "train").rglob("*.png"))):
        if number % 6:
            file.unlink()  # fewer will do for what follows
    main(main_ibot, *RUN, "--data_path", data / "train", "--output_dir", out, "--epochs", "2", "--batch_size_per_gpu", "50")
    text = main(quickstart, "report", "--output_dir", out)
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert "k-NN top-1 (k = 10, 503 validation images): untrained network" in text and "trained teacher" in text
    assert f"total {log[0]['train_loss']:.3f} -> {log[1]['train_loss']:.3f}" in text
    assert "ln K = 3.466" in text
    for name in ("checkpoint.pth", "log.txt", "crops.png", "pictures/loss.png", "pictures/neighbours.png",
                 "pictures/attention.png"):
        assert str(out / name) in text and (out / name).stat().st_size > 0
    crops = np.asarray(Image.open(out / "crops.png"))
    assert crops.std() > 30 and (crops == 128).all(-1).mean() > 0.005  # masked patches are grey


def test_neighbours_are_the_nearest_and_framed_by_class(tmp_path):
    for i in range(4):  # a shade of grey each
        Image.new("RGB", (8, 8), (60 * i,) * 3).save(tmp_path / f"{i}.png")
    samples = [(tmp_path / f"{i}.png", i // 2) for i in range(4)]
    images = type("Images", (), {"samples": samples, "__len__": lambda self: len(self.samples)})()
    bank, labels = torch.eye(4) + 0.1 * torch.eye(4).roll(1, 1), torch.tensor([0, 0, 1, 1])  # i is nearest to i, then to i - 1
    quickstart.draw_neighbours({"trained": ((bank, labels), (torch.eye(4), labels))}, images, images, tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    step, top = quickstart.TILE + 6, 22 + 6
    for row in range(4):
        for column, shade in ((0, row), (1, row), (2, (row - 1) % 4)):
            x, y = 6 + step * column, top + step * row
            assert picture[y + 56, x + 56].tolist() == [60 * shade] * 3
            colour = (255, 255, 255) if not column else (0x2c, 0xa0, 0x2c) if shade // 2 == row // 2 else (0xd6, 0x27, 0x28)
            assert tuple(picture[y + 2, x + 2]) == colour


def test_report_on_one_class_says_why_there_is_no_knn(digits, main, tmp_path):
    shutil.copytree(digits / "train/3", tmp_path / "data/all")
    main(main_ibot, *RUN, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run", "--epochs", "1",
         "--batch_size_per_gpu", "4")
    text = main(quickstart, "report", "--output_dir", tmp_path / "run")
    assert "k-NN: skipped, it needs two classes" in text and (tmp_path / "run/pictures/attention.png").exists()


def test_report_needs_a_run(main, tmp_path):
    with pytest.raises(engine.InputError, match=f"^checkpoint {tmp_path / 'checkpoint.pth'}"):
        main(quickstart, "report", "--output_dir", tmp_path)
