"""The first run's parts: the digits as a folder, and the report on a run."""
import json

import numpy as np
from PIL import Image

RUN = ["--arch", "vit_nano", "--patch_size", "4", "--global_crops_size", "16", "--local_crops_size", "8", "--device", "cpu",
       "--local_crops_number", "2", "--out_dim", "32", "--head_hidden_dim", "64", "--shared_head", "true", "--num_workers", "0"]


def test_digits_folder_and_report(call, tmp_path):
    data, out = tmp_path / "digits", tmp_path / "run"
    assert "1797 new" in call("analysis/quickstart.py", "data", "--output_dir", data).stdout
    files = sorted(data.rglob("*.png"))
    assert len(files) == 1797 and len(list((data / "val").rglob("*.png"))) == 503
    assert {p.parent.name for p in files} == set("0123456789")
    files[7].unlink()
    assert "1 new" in call("analysis/quickstart.py", "data", "--output_dir", data).stdout
    assert np.asarray(Image.open(files[7])).shape == (32, 32)

    for number, file in enumerate(sorted((data / "train").rglob("*.png"))):
        if number % 6:
            file.unlink()  # fewer will do for what follows
    call("main_ibot.py", *RUN, "--data_path", data / "train", "--output_dir", out, "--epochs", "2", "--batch_size_per_gpu", "50")
    text = call("analysis/quickstart.py", "report", "--output_dir", out).stdout
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert "k-NN top-1 (k = 10, 503 validation images): untrained network" in text and "trained teacher" in text
    assert f"total {log[0]['train_loss']:.3f} -> {log[1]['train_loss']:.3f}" in text
    for name in ("checkpoint.pth", "log.txt", "pictures/crops.png", "pictures/attention.png"):
        assert str(out / name) in text and (out / name).stat().st_size > 0
    crops = np.asarray(Image.open(out / "pictures/crops.png"))
    assert crops.std() > 30 and (crops == 128).all(-1).mean() > 0.005  # masked patches are grey


def test_report_on_one_class_says_why_there_is_no_knn(digits, call, tmp_path):
    import shutil
    shutil.copytree(digits / "train/3", tmp_path / "data/all")
    call("main_ibot.py", *RUN, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run", "--epochs", "1",
         "--batch_size_per_gpu", "4")
    text = call("analysis/quickstart.py", "report", "--output_dir", tmp_path / "run").stdout
    assert "k-NN: skipped, it needs two classes" in text and (tmp_path / "run/pictures/attention.png").exists()


def test_report_needs_a_run(call, tmp_path):
    result = call("analysis/quickstart.py", "report", "--output_dir", tmp_path, check=False)
    assert result.returncode == 1 and result.stderr.startswith(f"error: checkpoint {tmp_path / 'checkpoint.pth'}")
