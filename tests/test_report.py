"""The file of results that evaluations share, and the report of a job."""
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine
from evaluation import eval_knn, report
from evaluation.common import charts
from evaluation.common.results import append_result, read_results

ROOT = Path(report.__file__).parent.parent
SETTINGS = {"arch": "vit_small", "patch_size": 16, "window_size": 7, "weights_hash": "a" * 64, "n_last_blocks": 1,
            "avgpool_patchtokens": 0, "dataset": "imagefolder", "data_path": "data/imagenet", "train_subset": None,
            "train_images": 1281167, "val_images": 50000}
KNN = {"10": {"top1": 74.5, "top5": 89.25}, "20": {"top1": 75.125, "top5": 90.0}, "200": {"top1": 73.0, "top5": 90.5}}
LINEAR = {"best": {"top1": 77.75, "top5": 93.5, "epoch": 97, "head": 20, "lr": 0.003, "weight_decay": 0.0, "optimizer": "sgd"},
          "last": {"top1": 77.5, "top5": 93.25, "epoch": 99, "head": 21, "lr": 0.004, "weight_decay": 0.0, "optimizer": "sgd"}}
CLUSTERS = {"head": {"acc": 43.0, "ari": 32.0, "nmi": 78.0, "fmi": 35.0, "clusters": 998},
            "kmeans": {"acc": 40.0, "ari": 30.0, "nmi": 70.0, "fmi": 31.0, "clusters": 1000}}


def record(folder, protocol="knn", metrics=KNN, key="teacher", checkpoint="checkpoint.pth", **settings):
    append_result(folder, protocol, folder / checkpoint, key, SETTINGS | settings, metrics)


def rows(text, name):
    """Cells of the rows of report.md's tables that have the cell `name`."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [row for row in cells if name in row]


def run(folder, capsys):
    """(what is printed, report.md)."""
    report.report(folder)
    return capsys.readouterr().out, (folder / "report.md").read_text()


# ---------------------------------------------------------------- results.json

def append(folder, number, count):
    for i in range(count):
        append_result(folder, "knn", "c.pth", f"{number}-{i}", {}, {"10": {"top1": 1.0}})


def test_processes_that_record_at_the_same_time_lose_nothing(tmp_path):
    """As evaluations of different keys on several nodes do."""
    context = get_context("fork")
    processes = [context.Process(target=append, args=(tmp_path, number, 25)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    keys = [record["key"] for record in read_results(tmp_path)]
    assert sorted(keys) == sorted(f"{number}-{i}" for number in range(4) for i in range(25))
    for number in range(4):  # in the order of each
        assert [key for key in keys if key[0] == str(number)] == [f"{number}-{i}" for i in range(25)]
    assert not list(tmp_path.glob("*.tmp*"))


def test_without_locks_a_warning_is_printed(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    record(tmp_path)
    assert len(read_results(tmp_path)) == 1
    assert re.fullmatch(r"warning: .*no locks here .*No locks available.*\n", capsys.readouterr().err)


GOOD = {"protocol": "knn", "checkpoint": "c", "key": "k", "settings": {}, "metrics": {}, "time": "", "versions": {}}


@pytest.mark.parametrize("content, reason", [
    (b"", "Expecting value"), (b'[{"protocol": "kn', "Unterminated"), (b"\xff\xfe[", "codec"), (b"{}", "holds a dict"),
    (b"[3]", "entry 1 lacks protocol"), (json.dumps([GOOD, GOOD | {"metrics": []}]).encode(), "entry 2 lacks metrics"),
    (b"[" * 100000 + b"]" * 100000, "recursion"), (b"9" * 5000, "digits"),
    (json.dumps([GOOD]).replace('"settings": {}', '"settings": {"a": ' + "[" * 985 + "]" * 985 + "}").encode(), "recursion"),
])
def test_damaged_results(tmp_path, content, reason, capsys, request):
    """One line for those who read, and those who append, who leave the file as it is."""
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # the usual one, which compilations in tests before this have raised
    path = tmp_path / "results.json"
    path.write_bytes(content)
    for use in (lambda: record(tmp_path), lambda: report.report(tmp_path)):
        with pytest.raises(engine.InputError, match=rf"results\.json: damaged, .*{reason}.*; move it away$") as error:
            use()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert path.read_bytes() == content and not capsys.readouterr().out


@pytest.mark.parametrize("script, words, content, message", [
    (report, [], None, r"results\.json: no results; .*imagenet_knn"),
    (report, [], "[", r"results\.json: damaged, .*"),
    # Hours before it would have something to add.
    (eval_knn, ["--pretrained_weights", "random", "--device", "cpu"], "{}", r"results\.json: damaged, .*")])
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, script, words, content, message):
    if content:
        (tmp_path / "results.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["", "--output_dir", str(tmp_path), *words])
    with pytest.raises(SystemExit) as end:
        engine.run(script.main)
    error = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(error) == 1 and re.match(f"error: .*{message}", error[0]), error


def test_results_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(engine.InputError, match="file/results.json: cannot be written"):
        record(tmp_path / "file")
    (tmp_path / "results.json").mkdir()
    with pytest.raises(engine.InputError, match="results.json: cannot be read"):
        record(tmp_path)


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("changed, shown", [
    ({}, ["-", "61.5", "34.1"]), ({"database_images": 9}, ["-", "(61.5)", "(34.1)"]),
    ({"crop_queries": True}, ["-", "(61.5)", "(34.1)"]), ({"patch_size": 8}, ["-", "-", "-"])])
def test_retrieval_beside_the_papers(tmp_path, capsys, changed, shown):
    scores = {"easy": {"map": 70.0, "p1": 90.0}, "medium": {"map": 61.0, "p1": 80.0}, "hard": {}}
    for hard in ({}, {"map": 34.0}):  # no query has hard positives, in the first one
        settings = {"arch": "vit_small", "patch_size": 16, "weights_hash": "a", "database_images": 6322, "crop_queries": False}
        append_result(tmp_path, "retrieval_rparis6k", "c.pth", "teacher", settings | changed, scores | {"hard": hard})
        printed, text = run(tmp_path, capsys)
        found = rows(text, "Paris retrieval")
        assert [row[3] for row in found] == ["easy", "medium", "hard"][:2 + bool(hard)]
    assert [row[5] for row in found] == shown and found[1][4] == "map 61.00, p1 80.00"
    assert ("whole queries" in text) == ("(" in shown[1])
    append_result(tmp_path, "copy_detection", "c.pth", "teacher", {"arch": "vit_base", "patch_size": 16, "distractors": 0},
                  {"strong": 80.0, "crops": 90.0, "levels": {"crops": {"10": 70.0}}})
    printed, text = run(tmp_path, capsys)
    assert [row[3:6] for row in rows(text, "Copydays")] == [["", "strong 80.00, crops 90.00", "-"]]
    for line in ("iBOT ViT-S/16, 800 epochs | 36.6 | 13.0 | 61.5 | 34.1 | -", "DINO ViT-B/16, 224 pixels | - | - | - | - | 81.7"):
        assert line in text



def test_results_beside_the_papers(tmp_path, capsys):
    record(tmp_path)
    record(tmp_path, "linear", LINEAR, n_last_blocks=4)
    record(tmp_path, "unsupervised", CLUSTERS)
    record(tmp_path, "logistic", {"0.1": {"top1": 65.0, "top5": 80.0, "iterations": 9}}, train_subset="1percent.txt",
           train_images=12811)
    printed, text = run(tmp_path, capsys)
    assert [row[:7] for row in rows(text, "k-NN") if "time" not in row and row[2] == "k-NN"] == [
        ["teacher", "a" * 10, "k-NN", "k = 10", "74.50", "89.25", "-"],
        ["teacher", "a" * 10, "k-NN", "k = 20", "75.12", "90.00", "75.2"],  # the paper reports the best k
        ["teacher", "a" * 10, "k-NN", "k = 200", "73.00", "90.50", "-"]]
    best, last = rows(text, "linear, sweep")
    assert best[3:7] == ["best, epoch 97, lr 0.003", "77.75", "93.50", "77.9"]
    assert last[3:7] == ["last, epoch 99, lr 0.004", "77.50", "93.25", "-"]
    head, kmeans = rows(text, "clusters")
    assert head[4:6] == ["acc 43.00, ari 32.00, nmi 78.00, fmi 35.00, clusters 998", "acc 43.4, ari 32.8, nmi 78.6, fmi 35.6"]
    assert kmeans[5] == "-"
    [regression] = rows(text, "logistic regression")
    assert regression[3:7] == ["lambda 0.1", "65.00", "80.00", "65.9"]
    assert ["vit_small/16", "800", "vit_s16_800ep", "iBOT", "75.2", "77.9", "82.3"] in rows(text, "vit_small/16")
    # The terminal shows the same numbers; what repeats is left out.
    for number in ("75.12  90.00  75.2", "77.75  93.50  77.9", "43.4, ari 32.8", "1 % of the labels"):
        assert number in printed
    assert printed.count("k-NN  ") == 1 + 1 and "do not compare" not in printed and "report.md" in printed
    assert re.search(r"teacher  a{10}  k-NN +k = 10 .*\d{4}-\d\d-\d\d \d\d:\d\d\n {21}.*k = 20", printed)


@pytest.mark.parametrize("protocol, changed, shown", [
    ("knn", {"val_images": 41}, "(75.2)"), ("knn", {"train_images": 120}, "(75.2)"), ("knn", {"dataset": "cifar10"}, "-"),
    ("knn", {"patch_size": 8}, "-"), ("knn", {"arch": "deit_small"}, "75.2"), ("knn", {"arch": "vit_nano"}, "-"),
    ("knn", {"arch": "vit_base"}, "77.1"), ("knn", {"arch": "vit_large"}, "78.0"), ("linear", {"arch": "vit_large"}, "81.0"),
    ("linear_solo", {"arch": "swin_tiny", "patch_size": 4}, "78.6"), ("linear", {"arch": "swin_tiny", "window_size": 14}, "79.3"),
    ("knn", {"train_subset": "0.1", "train_images": 128119}, "70.1"), ("linear", {"train_subset": "0.5", "train_images": 640583}, "-"),
    ("knn", {"train_subset": "a", "train_images": 12811, "arch": "vit_base"}, "-"), ("logistic", {}, "-"),
    ("fine-tuning", {}, "-"), ("knn", {"arch": None}, "-"), ("finetune", {}, "82.3"), ("finetune", {"arch": "vit_large"}, "84.8"),
    ("finetune", {"image_size": 384}, "-"), ("finetune", {"arch": "swin_tiny", "train_images": 120}, "-"),
    ("semi_supervised", {"train_images": 12811, "finetune_head_layer": 1}, "61.9"),
    ("semi_supervised", {"train_subset": "0.1", "train_images": 128119, "finetune_head_layer": 0, "val_images": 9}, "(74.0)"),
    ("semi_supervised", {"finetune_head_layer": 1}, "-"), ("semi_supervised", {"train_images": 12811, "finetune_head_layer": 2}, "-"),
    ("transfer_cifar10", {"dataset": "cifar10", "train_images": 50000}, "99.1"),
    ("transfer_inat2019", {"dataset": "inat2019", "arch": "vit_base", "train_images": 1}, "79.6"),
    ("transfer_cars", {"dataset": "cars", "arch": "vit_large"}, "-"), ("transfer_flowers", {"train_subset": "0.1"}, "-"),
])
def test_which_number_of_the_paper(tmp_path, capsys, protocol, changed, shown):
    record(tmp_path, protocol, LINEAR if protocol in report.TRAINED else KNN, **changed)
    printed, text = run(tmp_path, capsys)
    column = [row[6] for row in rows(text, "teacher")]
    assert [cell for cell in column if cell != "-"] == ([] if shown == "-" else [shown])
    assert ("do not compare" in printed) == shown.startswith("(")
    assert ("The paper has no numbers" in text) == (changed.get("arch", "") in ("vit_nano", None) or "patch_size" in changed
                                                    and protocol == "knn")


@pytest.mark.parametrize("protocol, changed, shown", [
    ("knn", {"recipe": "table9_dino", "recipe_otherwise": ""}, "67.9"), ("finetune", {"recipe": "table9_dino"}, "80.6"),
    ("linear", {"recipe": "table9_dino", "recipe_otherwise": "--epochs 2", "arch": "vit_nano"}, "(72.5)"),
    ("knn", {"recipe": "vit_s16_300ep", "recipe_otherwise": ""}, "-"), ("knn", {"recipe": "foreign"}, "75.2"),
    ("knn", {"recipe": "table9_dino", "val_images": 9}, "(67.9)"), ("knn", {"recipe": ["vit_s16_800ep"]}, "75.2")])
def test_numbers_of_the_recipe(tmp_path, capsys, protocol, changed, shown):
    """Where a network's pre-training names one, its row of the paper counts; its ablation is shown whole."""
    record(tmp_path, protocol, LINEAR if protocol in report.TRAINED else KNN, **changed)
    printed, text = run(tmp_path, capsys)
    column = [row[6] for row in rows(text, "teacher")]
    assert [cell for cell in column if cell != "-"] == ([] if shown == "-" else [shown])
    assert ("pre-trained otherwise: --epochs 2" in printed) == (changed.get("recipe_otherwise") == "--epochs 2")
    names = [row[2] for row in rows(text, "vit_small/16") if len(row) == 7]
    assert names.count("table9_no_cls") == names.count("table9_dino") == (changed["recipe"] == "table9_dino")
    assert ["vit_small/16", "300", "table9_ibot", "iBOT, to which the ablations refer", "69.1", "74.2", "81.5"] in rows(text, "300")


def test_a_repeated_evaluation_replaces_the_older_one(tmp_path, capsys):
    record(tmp_path, metrics={"10": {"top1": 11.0}})
    record(tmp_path, key="student", metrics={"10": {"top1": 22.0}})
    record(tmp_path, metrics={"10": {"top1": 33.0}}, n_last_blocks=4)
    record(tmp_path, metrics={"10": {"top1": 44.0}}, weights_hash="b" * 64)  # after more training
    printed, text = run(tmp_path, capsys)
    assert "11.00" not in text and "1 older result(s)" in printed
    first, second, student = rows(text, "k = 10")
    assert first[:2] + first[4:6] == ["teacher", "b" * 10, "44.00", "-"] and "n_last_blocks 1" in first[2]
    # With other settings it is a row of its own, of older weights here.
    assert second[:2] + second[4:5] == ["teacher", "a" * 10 + "*", "33.00"] and "n_last_blocks 4" in second[2]
    assert student[:3] == ["student", "a" * 10, "k-NN"] and "* of other weights" in text
    record(tmp_path, metrics={"10": {"top1": 55.0}}, checkpoint="checkpoint0040.pth", n_last_blocks=4)
    printed, text = run(tmp_path, capsys)
    assert len(rows(text, "k = 10")) == 4 and "checkpoint0040.pth" in printed and "1 older" in printed


def test_results_of_the_analyses(tmp_path, capsys):
    """Figures with and without parts of their own; lists are left to the pictures."""
    for k in (1, 56):
        record(tmp_path, "linear_part", LINEAR, topk=k)
    append_result(tmp_path, "occlusion", "c.pth", "state_dict", {}, {"S.5": 60.0, "salient": {"1": [70.0, 3.0]}})
    append_result(tmp_path, "imagenet_c", "c.pth", "state_dict", {}, {"mean19": 48.1, "mce": None, "errors": {"fog": [0.1]}})
    printed, text = run(tmp_path, capsys)
    assert [row[:6] for row in rows(text, "best, epoch 97, lr 0.003")] == [
        ["teacher", "a" * 10, f"part-wise linear (topk {k})", "best, epoch 97, lr 0.003", "77.75", "93.50"] for k in (1, 56)]
    assert [row[2:5] for row in rows(text, "occlusion")] == [["occlusion", "", "S.5 60.00"]]
    assert [row[2:5] for row in rows(text, "ImageNet-C")] == [["ImageNet-C", "", "mean19 48.10"]]


def test_odd_records_do_not_break_the_tables(tmp_path, capsys):
    """Of later versions, or changed by hand."""
    append_result(tmp_path, "video|objects", "c.pth", "a\nb", {"arch": 3}, {"jf": 61.8, "name": "x", "big": 10**400, "no": None})
    append_result(tmp_path, "knn", "c.pth", "\ud800", {}, {"10": {"top1": None}, "20": 3, "x": {"top1": float("nan")}})
    append_result(tmp_path, "linear", "c.pth", "teacher", {"arch": "vit_small", "patch_size": [1]}, {})
    printed, text = run(tmp_path, capsys)
    assert "jf 61.80" in printed and "video\\|objects" in text and "a\\nb" in text


# ---------------------------------------------------------------- curves

def test_curves(tmp_path, capsys):
    record(tmp_path)
    lines = [{"epoch": e, "train_loss": 9 - e, "train_cls": 5 - e / 2, "train_patch": 4 - e / 2} for e in (0, 1, 2)]
    lines.append(lines[1] | {"train_loss": 3.5})  # a resumed run said it again
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "tra')
    for folder, line in (("linear/teacher", {"test_acc0@1": 20, "test_acc1@1": 30, "test_acc1@5": 90, "test_loss1": 95}),
                         ("linear_solo/teacher", {"test_acc1": 25.0, "test_acc5": 80}),
                         ("cls/imnet/teacher/lr_0.001", {"test_acc1": 81.0}), ("semi_cls/0.01/teacher", {"test_acc1": 60.0})):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "log.txt").write_text("".join(json.dumps(line | {"epoch": e}) + "\n" for e in range(2))
                                                   + json.dumps({"epoch": 2, "train_loss0": None}) + "\n")
    pictures, notes = report.curves(tmp_path)
    _, series = pictures["losses"]
    assert series == {"total": [(0, 9), (1, 3.5), (2, 7)], "[CLS]": [(0, 5), (1, 4.5), (2, 4)], "patch": [(0, 4), (1, 3.5), (2, 3)]}
    _, series = pictures["linear"]
    assert series == {"teacher, linear, sweep": [(0, 30), (1, 30)], "teacher, linear, one rate": [(0, 25), (1, 25)]}
    _, series = pictures["finetuning"]
    assert series == {"imnet/teacher/lr_0.001": [(0, 81), (1, 81)], "0.01/teacher, few labels": [(0, 60), (1, 60)]}
    assert len(notes) == 1 and "log.txt: 1 line(s)" in notes[0]
    printed, text = run(tmp_path, capsys)
    assert notes[0] in printed
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.size == charts.SIDE
            assert len(image.getcolors(2**20)) > 20  # axes, text and lines
    assert len(re.findall(r"!\[", text)) == 3


def test_jobs_are_compared(tmp_path, capsys, monkeypatch):
    """Each job's tables, and a line a job in the pictures; one without results or NMI is no mistake, one without both is."""
    jobs = [tmp_path / name for name in ("a", "b", "other/a", "gone")]
    for i, job in enumerate(jobs[:3]):
        job.mkdir(parents=True)
        lines = [{"epoch": e, "train_loss": 9 - e - i} | ({"train_nmi": 0.1 * e + 0.2 * i} if i < 2 else {}) for e in range(3)]
        (job / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record(jobs[1])
    drawn = {}
    monkeypatch.setattr(report, "draw_curves", lambda series, title, path: drawn.update({path: series}) or charts.draw_curves(
        series, title, path))
    monkeypatch.setattr("sys.argv", ["report.py", "--output_dir", *map(str, jobs[:3]), str(jobs[0])])
    report.main()
    printed = capsys.readouterr().out
    assert "75.2" in printed and printed.count("no results of evaluations") == 2 and (jobs[1] / "report.md").exists()
    nmi, losses = drawn[jobs[0] / "pictures/jobs_nmi.png"], drawn[jobs[0] / "pictures/jobs_loss.png"]
    assert nmi == {str(jobs[0]): [(e, pytest.approx(0.1 * e)) for e in range(3)], "b": [(e, pytest.approx(0.1 * e + 0.2)) for e in range(3)]}
    assert losses == {name: [(e, 9 - e - i) for e in range(3)] for i, name in enumerate([str(jobs[0]), "b", str(jobs[2])])}
    with pytest.raises(engine.InputError, match="gone: there is neither"):
        report.compare([jobs[1], jobs[3]])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("points", [
    [(0, 5.0)], [(0, 1e-12), (1, 2e-12)], [(0, 7.0), (400, 7.0)], [(0, -1e299), (1, 1e299)],
    [(e, 1000 + 1e-9 * e) for e in range(50)], [(3, 0), (4, 0)]])
def test_any_curve_can_be_drawn(tmp_path, points):
    series = {f"a curve with quite a long name, number {i}": points for i in range(7)}
    charts.draw_curves(series, "title", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in charts.COLOURS} <= colours


def test_points_are_in_their_places(tmp_path):
    """Also on a logarithmic axis: 1, 10 and 100 are equally far from each other."""
    for log_x, middle in ((False, 50.5), (True, 10)):
        curves = {"a": [(1, 0.0), (middle, 50.0), (100, 100.0)], "b": [(1, 50.0), (100, 50.0)]}
        charts.draw_curves(curves, "", tmp_path / "a.png", log_x=log_x)
        with Image.open(tmp_path / "a.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)[70:]  # below the legend
        a, b = (np.argwhere(abs(pixels - tuple(bytes.fromhex(colour[1:]))).max(-1) < 12) for colour in charts.COLOURS[:2])
        (top, left), (bottom, right) = a.min(0), a.max(0)
        assert np.median(b[:, 0]) == pytest.approx((top + bottom) / 2, abs=2)
        at_half = a[abs(a[:, 0] - (top + bottom) / 2) < 3, 1]
        assert at_half.mean() == pytest.approx((left + right) / 2, abs=3) and a[a[:, 1].argmin(), 0] > bottom - 8


def test_ticks():
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(0.93, 4.1) == [1, 2, 3, 4]
    assert charts.ticks(-0.05, 1.05) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


# ---------------------------------------------------------------- pre-training, evaluations and report in one go

def test_pretraining_evaluations_and_report(tmp_path, digits):
    """Two keys; the linear probes use the k-NN evaluations' features of the validation images again."""
    data, job = tmp_path / "data", tmp_path / "job"
    for path in sorted(digits.glob("*/*/*.png")):
        if int(path.stem) < 20 or int(path.stem) >= 150:
            (data / path.relative_to(digits)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, data / path.relative_to(digits))

    def start(*words):
        result = subprocess.run(["bash", ROOT / "run.sh", *words], capture_output=True, text=True, timeout=300,
                                env={**os.environ, "PYTHON": sys.executable, "DATA_PATH": str(data), "OUTPUT_DIR": str(job),
                                     "LINEAR_AVGPOOL": "0", "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    flags = ("--patch_size 8 --global_crops_size 16 --out_dim 32 --head_hidden_dim 32 --shared_head true --epochs 1 "
             "--warmup_epochs 0 --warmup_teacher_temp_epochs 0 --batch_size_per_gpu 20 --num_workers 0 --device cpu "
             "--recipe table9_ibot").split()
    printed = start("imagenet_pretrain+imagenet_knn+imagenet_linear", "job", "vit_nano", "teacher,student", "1", *flags)
    assert "recipe table9_ibot (" in printed and "recipe's total batch is 1024, here it is 20" in printed
    for key in ("teacher", "student"):
        assert printed.count(f"features of imagefolder val: read from {job}/features/imagefolder_val_{key}_n1_avgpool0.pth") == 1
    assert printed.count("features of imagefolder val: 11/11") == 2
    records = read_results(job)
    assert [(record["protocol"], record["key"]) for record in records] == [
        ("knn", "teacher"), ("knn", "student"), ("linear", "teacher"), ("linear", "student")]
    assert {(record["settings"]["recipe"], record["settings"]["recipe_otherwise"]) for record in records} == {(
        "table9_ibot", "--arch vit_nano --patch_size 8 --epochs 1 --out_dim 32 --warmup_teacher_temp_epochs 0")}
    hashes = [record["settings"]["weights_hash"] for record in records]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]

    printed = start("report", "job")
    text = (job / "report.md").read_text()
    for record in records:
        assert f"{max(part['top1'] for part in record['metrics'].values()):.2f}" in printed
    assert {(row[0], row[2], row[6]) for row in rows(text, "k = 10")} <= {(key, "k-NN", paper) for key in ("teacher", "student")
                                                                          for paper in ("-", "(69.1)")}
    assert "(69.1)" in text and "(74.2)" in text and "75.2" not in "".join(sum(rows(text, "k-NN"), []))
    assert {path.name for path in (job / "pictures").iterdir()} == {"losses.png", "nmi.png", "linear.png"}
    _, series = report.curves(job)[0]["linear"]
    assert {name: len(points) for name, points in series.items()} == {f"{key}, linear, sweep": 100 for key in ("teacher", "student")}
