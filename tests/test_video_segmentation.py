"""Label propagation and the scores of DAVIS 2017, against values worked out by hand and plain definitions written here."""
import csv
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analysis_data import nano, run_main, write_checkpoint
from PIL import Image
from scipy.ndimage import distance_transform_edt
from test_knn import LargestTensor
from torch import multiprocessing

import engine
from analysis import report as analysis_report
from evaluation import eval_video_segmentation as script
from evaluation import report
from evaluation.common import davis
from evaluation.common.propagation import cell_mask, follow, frame_size, full_labels, propagate, resize_frame
from evaluation.common.results import append_result, read_results

# ---------------------------------------------------------------- J and F


@pytest.mark.parametrize("down, right, J, accuracy", [(0, 0, 1, 1), (0, 1, 0.5, 1), (0, 2, 0.2, 0.727273), (0, 3, 0, 0.6),
                                                      (1, 1, 0.285714, 0.916667)])
def test_shifted_squares(down, right, J, accuracy):
    true, predicted = np.zeros((2, 6, 6), dtype=bool)
    true[1:4, 1:4] = predicted[1 + down:4 + down, 1 + right:4 + right] = True  # cut at the border
    assert davis.region_similarity(predicted, true) == pytest.approx(J, abs=1e-6)
    assert davis.boundary_accuracy(predicted, true) == pytest.approx(accuracy, abs=1e-6)
    if not right:
        edge = davis.boundary(true).astype(int)
        assert ["".join(map(str, row)) for row in edge] == ["111100", "100100", "100100", "111100", "000000", "000000"]


def test_masks_without_a_boundary():
    square, none, everything = np.zeros((3, 6, 6), dtype=bool)
    square[1:4, 1:4] = everything[:] = True
    for a, b, J, accuracy in ((none, square, 0, 0), (square, none, 0, 0), (none, none, 1, 1), (everything, everything, 1, 1)):
        assert (davis.region_similarity(a, b), davis.boundary_accuracy(a, b)) == (J, accuracy)


@pytest.mark.parametrize("height, width, radius", [(480, 854, 8), (480, 910, 9), (480, 1152, 10), (90, 60, 1)])
def test_boundaries_against_distance_transforms(height, width, radius):
    """The definition: a boundary pixel counts if the other boundary is at most `radius` away."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        coarse = [Image.fromarray(rng.integers(256, size=(5, 8), dtype=np.uint8)).resize((width, height)) for _ in range(2)]
        masks = [np.asarray(image) > 128 for image in coarse]
        edges = []
        for mask in masks:
            padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
            edges.append((padded[:-1, :-1] != padded[:-1, 1:]) | (padded[:-1, :-1] != padded[1:, :-1])
                         | (padded[:-1, :-1] != padded[1:, 1:]))
            edges[-1][-1, -1] = False
        precision, recall = (np.mean(distance_transform_edt(~b)[a] <= radius) for a, b in (edges, edges[::-1]))
        expected = 2 * precision * recall / (precision + recall)
        assert davis.boundary_accuracy(*masks) == pytest.approx(expected, abs=1e-12) and 0 < expected < 1


def test_statistics():
    for values, expected in (([1, 1, .9, .8, .7, .6, .5, .4], (0.7375, 0.75, 0.466667)), ([.2, .6, .6, .6, .6], (0.52, 0.8, -0.2)),
                             ([.9, .8, .7], (0.8, 1, 0.15)), ([.5], (0.5, 0, 0))):
        assert davis.statistics(values) == pytest.approx(expected, abs=1e-6)
    for n, (first, last) in ((32, (8, 23)), (102, (25, 76)), (1001, (250, 750))):  # 8-bit bounds would wrap
        values = np.random.default_rng(n).random(n)
        assert davis.statistics(values)[2] == pytest.approx(values[:first + 1].mean() - values[last:].mean())
    # Over objects, not over sequences.
    found = davis.global_scores({"a_1": np.ones((4, 2)), "a_2": np.ones((9, 2)), "b_1": np.tile([0.4, 0.7], (5, 1))})
    assert found == pytest.approx({"J&F-Mean": 0.85, "J-Mean": 0.8, "J-Recall": 2 / 3, "J-Decay": 0, "F-Mean": 0.9,
                                   "F-Recall": 1, "F-Decay": 0})


# ---------------------------------------------------------------- propagation

def unit(rows):
    """Unit features [1, w, D] of a grid of one row."""
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)[None]


def two_channels(values):
    values = torch.tensor(values, dtype=torch.float32)
    return torch.stack((1 - values, values), dim=1)[None]


def test_propagation_by_hand():
    found = propagate(unit([(1, 0), (0, 1), (1, 1)]), [unit([(1, 0), (0, 1), (0, 2)])], [two_channels([0, 1, 1])], 1, 2)
    torch.testing.assert_close(found[0, :, 1], torch.tensor([0.000045, 1, 1]), atol=1e-6, rtol=0)
    sources = [unit([(1, 0), (1, 1), (0, 1)]), unit([(4, 1), (1, 1), (1, 3)])]
    masks = [two_channels([0, .5, 1]), two_channels([.2, .7, 1])]
    for topk, radius, expected in ((2, 1, [0.123725, 0.772134, 0.6]), (3, 0, [0.270022, 0.772134, 0.659276])):
        found = propagate(unit([(3, 1), (1, 2), (2, 2)]), sources, masks, radius, topk)
        torch.testing.assert_close(found[0, :, 1], torch.tensor(expected), atol=1e-6, rtol=0)


def dense(queries, sources, masks, radius, topk):
    """The rule as it is written down, in float64, one query cell after the other."""
    h, w, C = masks[0].shape
    result = torch.empty(h, w, C, dtype=torch.float64)
    keys, values = torch.stack(sources).double(), torch.stack(masks).double()
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    for i in range(h):
        for j in range(w):
            affinity = (keys @ queries[i, j].double() / 0.1).exp()  # [S, h, w]
            if radius:
                affinity = affinity * ((y - i).abs() <= radius) * ((x - j).abs() <= radius)
            threshold = affinity.flatten().sort(descending=True).values[min(topk, affinity.numel()) - 1]
            affinity[affinity < threshold] = 0
            result[i, j] = (affinity[..., None] * values).sum(dim=(0, 1, 2)) / affinity.sum()
    return result


@pytest.mark.parametrize("h, w, S, radius, topk", [(7, 12, 3, 2, 5), (7, 12, 3, 0, 5), (5, 4, 1, 1, 30), (1, 9, 2, 1, 2), (6, 6, 2, 20, 3)])
@pytest.mark.parametrize("ties", [True, False])
def test_tiles_equal_the_dense_rule(h, w, S, radius, topk, ties):
    """With entries of +-1 all products are exact, and most values occur many times."""
    torch.manual_seed(h * w + S)
    features = torch.randn(S + 1, h, w, 4)
    features = features.sign() / 2 if ties else F.normalize(features, dim=-1)
    masks = list(torch.rand(S, h, w, 3).softmax(dim=-1))
    expected = dense(features[0], list(features[1:]), masks, radius, topk)
    for tile, block in ((None, 2**25), (3, 2**25), (5, 40), (100, 1)):
        found = propagate(features[0], list(features[1:]), masks, radius, topk, tile, block)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(h, w))


def test_memory_is_bounded():
    """Neither the length of the video nor the number of cells counts."""
    largest = []
    for h, w, frames, radius, block in ((24, 30, 5, 2, 2**25), (24, 90, 25, 2, 2**25), (24, 30, 25, 0, 50_000), (48, 60, 5, 0, 50_000)):
        features = F.normalize(torch.randn(frames, h, w, 4), dim=-1)
        with LargestTensor() as watch:
            if radius:
                list(follow(iter(features), torch.ones(h, w, 1), 3, radius))
            else:
                propagate(features[0], list(features[1:5]), [torch.ones(h, w, 1)] * 4, 0, max_block=block)
        largest.append(watch.values)
    assert largest[0] == largest[1] == 64 * 4 * 12 * 12 and max(largest[2:]) <= 50_000


def test_a_still_video_keeps_its_mask():
    mask = torch.eye(3)[torch.randint(3, (6, 7))]
    features = F.normalize(torch.randn(6, 7, 16), dim=-1)
    for found in follow([features] * 9, mask, topk=1, radius=0):
        torch.testing.assert_close(found, mask, atol=1e-6, rtol=0)


def test_sources_are_the_first_frame_and_the_last_ones(monkeypatch):
    from evaluation.common import propagation
    seen = []
    monkeypatch.setattr(propagation, "propagate", lambda q, sources, masks, *_: seen.append((q, *sources)) or masks[0])
    for n in (0, 3):
        list(follow(range(6), "mask", n_last_frames=n))
    assert seen == [(t, 0) for t in range(1, 6)] + [(1, 0), (2, 0, 1), (3, 0, 1, 2), (4, 0, 1, 2, 3), (5, 0, 2, 3, 4)]


# ---------------------------------------------------------------- pixels and cells

def test_sizes_and_resizing():
    assert [frame_size(w, 480, 480) for w in (854, 910, 1152, 480)] == [(832, 480), (896, 480), (1152, 480), (448, 480)]
    assert frame_size(480, 854, 480) == (480, 832) and frame_size(96, 64, 64) == (64, 64)
    pixels = np.random.default_rng(0).integers(256, size=(20, 31, 3), dtype=np.uint8)
    found = resize_frame(Image.fromarray(pixels), (16, 30)).permute(1, 2, 0).numpy()

    def axis(size, source):
        place = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, source - 1), place - low

    (top, bottom, v), (left, right, u) = axis(30, 20), axis(16, 31)
    rows = pixels[top] * (1 - v)[:, None, None] + pixels[bottom] * v[:, None, None]
    expected = rows[:, left] * (1 - u)[None, :, None] + rows[:, right] * u[None, :, None]
    assert np.abs(found - expected).max() <= 0.5 + 1e-4


def test_masks_of_cells_and_back():
    labels = np.zeros((48, 64), dtype=np.uint8)
    labels[8:24, 16:40], labels[0, 0] = 3, 7  # 7 falls between the cells
    mask, channels = cell_mask(labels, 8, 6)
    assert channels.tolist() == [0, 3] and mask.shape == (6, 8, 2) and mask[1:3, 2:5, 1].eq(1).all() and mask.sum() == 48
    found = full_labels(mask, channels, 8, (64, 48))
    assert (found == labels).mean() > 0.97 and set(np.unique(found)) == {0, 3}
    # A constant channel counts as zero: 0/0 would win everywhere. Of equal channels the first wins.
    soft = torch.stack((mask[..., 1], torch.full((6, 8), 0.9), mask[..., 1]), dim=2)
    assert set(np.unique(full_labels(soft, np.array([0, 1, 2], dtype=np.uint8), 8, (64, 48)))) == {0}


def test_usual_palette():
    palette = np.array(davis.pascal_palette()).reshape(256, 3).tolist()
    assert palette[:6] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert len(set(map(tuple, palette))) == 256 and palette[8] == [64, 0, 0]


# ---------------------------------------------------------------- the script

SQUARES = {"one": [((12, 20), (5, 2), 20)], "leaves": [((10, 8), (3, 0), 16), ((72, 40), (8, 0), 14)],
           "tiny": [((20, 20), (2, 2), 24), ((80, 50), (0, 0), 2)]}  # (left, top) of each object, its way, its side


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """DATA/DAVIS with three videos of five frames of 96 x 64 pixels."""
    root = tmp_path_factory.mktemp("data") / "DAVIS"
    rng = np.random.default_rng(0)
    for name, squares in SQUARES.items():
        coarse = Image.fromarray(rng.integers(60, 130, size=(8, 12, 3), dtype=np.uint8))
        for t in range(5):
            pixels, labels = np.array(coarse.resize((96, 64))), np.zeros((64, 96), dtype=np.uint8)
            for number, ((x, y), (dx, dy), side) in enumerate(squares, 1):
                part = slice(y + t * dy, y + t * dy + side), slice(x + t * dx, x + t * dx + side)
                pixels[part], labels[part] = ((230, 60, 40), (40, 80, 240))[number - 1], number
            for kind in ("JPEGImages", "Annotations"):
                (root / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / f"JPEGImages/480p/{name}/{t:05}.jpg", quality=95)
            davis.write_labels(labels, root / f"Annotations/480p/{name}/{t:05}.png", [0, 0, 0, 9, 8, 7] + [100] * 12)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("\n".join([*SQUARES, ""]))
    return root.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("job") / "checkpoint.pth")


@pytest.fixture(scope="module")
def done(data, checkpoint):
    """The folder of the job after the script has run for both keys in one process; there were tables of another run."""
    stale = checkpoint.parent / "viseg/teacher/global_results-val.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, script, *flags(data, checkpoint, checkpoint.parent), "--checkpoint_key", "student,teacher")
    return checkpoint.parent


def flags(data, checkpoint, output):
    return ("--pretrained_weights", checkpoint, "--data_path", data, "--scale_size", 64, "--output_dir", output, "--bs", 2)


def labels_of(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_masks_equal_a_plain_computation(data, done):
    """Frames one by one through a second copy of the network, the dense rule, and the output rule in numpy."""
    model = nano(0)
    frames, grids = [], []
    folder = data / "DAVIS/JPEGImages/480p/leaves"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.228, 0.224, 0.225])
    first = labels_of(data / "DAVIS/Annotations/480p/leaves/00000.png")
    assert np.array_equal(labels_of(done / "viseg/teacher/leaves/00000.png"), first)
    for t in range(5):
        pixels = resize_frame(Image.open(folder / f"{t:05}.jpg"), (64, 64)).permute(1, 2, 0)
        image = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            frames.append(F.normalize(model(image, return_all_tokens=True)[0, 1:], dim=1).view(8, 8, -1))
            own = script.frame_features(model, pixels.permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(own, frames[t], atol=1e-5, rtol=0)
        if t == 0:
            small = first[(8 * np.arange(8) + 4)][:, (12 * np.arange(8) + 6)]
            grids.append(torch.eye(3)[torch.from_numpy(small).long()])
            continue
        grids.append(dense(frames[t], frames[:t], grids[:t], 12, 5).float())
        channels = F.interpolate(grids[t].permute(2, 0, 1)[None], scale_factor=8, mode="bilinear")[0].numpy()
        channels = [(c - c.min()) / (c.max() - c.min()) if c.max() > 0 else c for c in channels]
        expected = np.argmax(channels, axis=0)[:, np.floor((np.arange(96) + 0.5) * 64 / 96).astype(int)]
        differ = labels_of(done / f"viseg/teacher/leaves/{t:05}.png") != expected
        # Where two channels are equal, half-way between cells, rounding decides.
        assert differ.mean() < 4e-3 and set(np.unique(expected)) >= {0, 1}


def test_scores_tables_and_records(data, done, monkeypatch, capsys):
    student, teacher = read_results(done)
    assert [record["key"] for record in (student, teacher)] == ["student", "teacher"]
    assert student["settings"]["weights_hash"] != teacher["settings"]["weights_hash"]
    metrics = teacher["metrics"]
    assert (metrics["sequences"], metrics["frames"], metrics["objects"]) == (3, 15, 5)
    header, values = table(done / "viseg/teacher/global_results-val.csv")
    assert header == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    assert values == [f"{metrics[name] / 100:.3f}" for name in header]
    header, *rows = table(done / "viseg/teacher/per-sequence_results-val.csv")
    assert header == ["Sequence", "J-Mean", "F-Mean"]
    assert [row[0] for row in rows] == ["one_1", "leaves_1", "leaves_2", "tiny_1", "tiny_2"]
    assert rows[-1][1:] == ["0.000", "0.000"]  # too small for a cell
    assert np.mean([float(row[1]) for row in rows]) == pytest.approx(metrics["J-Mean"] / 100, abs=1e-3) and metrics["J-Mean"] > 30
    # The files say the same when they are scored by themselves; palette and pictures are there.
    copy = shutil.copytree(done / "viseg/teacher", done / "copy")
    (copy / "global_results-val.csv").write_text("stale")
    run_main(monkeypatch, script, "--data_path", data, "--score_only", copy)
    for name in ("global_results-val.csv", "per-sequence_results-val.csv"):
        assert table(copy / name) == table(done / "viseg/teacher" / name)
    assert f"J-Mean {metrics['J-Mean']:.1f}" in capsys.readouterr().out
    with Image.open(done / "viseg/teacher/one/00002.png") as image:
        assert image.getpalette()[:6] == [0, 0, 0, 9, 8, 7]
    with Image.open(done / "viseg/teacher/one.jpg") as image:
        assert image.size == (960, 213)


def test_the_truth_and_the_shifted_truth(data, tmp_path, monkeypatch):
    """Squares of side a, three pixels to the right, radius 1: J (a - 3) / (a + 3); half of the outline's 4a pixels are near."""
    truth = shutil.copytree(data / "DAVIS/Annotations/480p", tmp_path / "truth")
    for number in (0, 4):  # the first and the last frame do not count
        davis.write_labels(np.full((64, 96), 9, dtype=np.uint8), truth / f"one/{number:05}.png")
    run_main(monkeypatch, script, "--data_path", data, "--score_only", truth)
    assert table(truth / "global_results-val.csv")[1] == ["1.000", "1.000", "1.000", "0.000", "1.000", "1.000", "0.000"]
    for path in truth.glob("one/*[123].png"):
        davis.write_labels(np.roll(labels_of(path), 3, axis=1), path)
    run_main(monkeypatch, script, "--data_path", data, "--score_only", truth, "--sequences", "one")
    assert table(truth / "global_results-val.csv")[1] == ["0.620", "0.739", "1.000", "0.000", "0.500", "0.000", "0.000"]
    assert table(truth / "per-sequence_results-val.csv")[1:] == [["one_1", f"{17 / 23:.3f}", "0.500"]]


def of_two(rank, folder, calls):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    for number, words in enumerate(calls):
        sys.argv = ["", "--device", "cpu", "--num_workers", "0", "--dist_url", f"file://{folder}/rendezvous{number}", *words]
        engine.run(script.main)


def test_two_processes_equal_one(data, checkpoint, done, tmp_path):
    calls = ((*flags(data / "DAVIS", checkpoint, tmp_path / "two"), "--results_dir", tmp_path),
             ("--data_path", data, "--score_only", tmp_path / "two/viseg/teacher"))
    calls = [list(map(str, words)) for words in calls]
    multiprocessing.start_processes(of_two, (str(tmp_path), calls), nprocs=2, start_method="fork")  # imports nothing again
    paths = sorted(path.relative_to(done) for path in (done / "viseg/teacher").rglob("*") if path.is_file())
    assert len(paths) == 15 + 3 + 2
    for path in paths:
        assert (done / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    [found], [one] = read_results(tmp_path), [record for record in read_results(done) if record["key"] == "teacher"]
    assert (found["metrics"], found["settings"]) == (one["metrics"], one["settings"])


def test_videos_without_annotations_are_only_segmented(data, checkpoint, tmp_path, monkeypatch, capsys):
    """As in the test sets; and without files of masks only the scores are kept. Void counts as background."""
    root = shutil.copytree(data / "DAVIS", tmp_path / "data")
    for path in root.glob("Annotations/480p/one/*[1-9].png"):
        path.unlink()
    labels = labels_of(root / "Annotations/480p/one/00000.png")
    davis.write_labels(np.where(labels, labels, 255).astype(np.uint8), root / "Annotations/480p/one/00000.png")
    words = (*flags(root, checkpoint, tmp_path / "out"), "--sequences", "one")
    run_main(monkeypatch, script, *words)
    assert "masks only" in capsys.readouterr().out and not (tmp_path / "out/results.json").exists()
    folder = tmp_path / "out/viseg/teacher"
    assert sorted(path.name for path in folder.iterdir()) == ["one", "one.jpg"]
    assert labels_of(folder / "one/00000.png").max() == 255 and set(np.unique(labels_of(folder / "one/00004.png"))) == {0, 1}
    run_main(monkeypatch, script, *words, "tiny", "--write_masks", "false", "--topk", 1, "--size_mask_neighborhood", 0,
             "--n_last_frames", 0, "--output_dir", tmp_path / "scores")
    assert sorted(path.name for path in (tmp_path / "scores/viseg/teacher").iterdir()) == ["global_results-val.csv",
                                                                                        "per-sequence_results-val.csv"]
    assert read_results(tmp_path / "scores")[0]["metrics"]["objects"] == 2


# ---------------------------------------------------------------- mistakes

def remove(path):
    return lambda root: (root / path).unlink()


def repaint(path, change):
    def paint(root):
        labels = change(np.array(Image.open(root / path)))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(root / path)
    return paint


ANNOTATION, FRAME = "Annotations/480p/one/0000{}.png", "JPEGImages/480p/one/0000{}.jpg"


@pytest.mark.parametrize("spoil, words, message", [
    (None, ("--arch", "swin_tiny", "--pretrained_weights", "random"), "swin_tiny .* needs a ViT"),
    (None, ("--scale_size", "100"), "sequence one: frames of 128 x 100 pixels do not divide into patches of 8; see --scale_size"),
    (None, ("--sequences", "nobody"), "sequence nobody: no frames"),
    (None, ("--sequences", "../480p"), r"sequence \.\./480p: is not the name of a folder"),
    (None, ("--data_path", "nowhere"), "nowhere/ImageSets/2017/val.txt: no list of sequences"),
    (remove(FRAME.format(2)), (), r"sequence one: the frame of .*Annotations/480p/one/00002\.png is missing"),
    (remove(ANNOTATION.format(2)), (), r"annotation .*one/00002\.png is missing"),
    (remove(ANNOTATION.format(0)), (), r"annotation .*one/00000\.png is missing"),
    (repaint(ANNOTATION.format(0), lambda labels: 255 * labels), (), r"00000\.png: no object in it"),
    (repaint(ANNOTATION.format(0), lambda labels: labels[..., None].repeat(3, 2)), (), r"00000\.png: .*mode RGB; .* mode P or L"),
    (repaint(ANNOTATION.format(3), lambda labels: labels[:-1]), (), r"00003\.png: .*96 x 63 pixels instead of 96 x 64"),
    (repaint(FRAME.format(3), lambda pixels: pixels[:-1]), (), r"00003\.jpg: 96 x 63 pixels, but the annotation has 96 x 64"),
    (lambda root: (root / FRAME.format(1)).write_bytes(b"x"), (), r"00001\.jpg: cannot be read as an image"),
    (lambda root: [(root / kind.format(t)).unlink() for kind in (ANNOTATION, FRAME) for t in (2, 3, 4)], (), "one: 2 frames are too few"),
])
def test_mistakes_are_named(data, checkpoint, tmp_path, monkeypatch, spoil, words, message):
    root = data
    if spoil:
        root = shutil.copytree(data / "DAVIS", tmp_path / "data")
        spoil(root)
    with pytest.raises(engine.InputError, match=message) as error:
        run_main(monkeypatch, script, *flags(root, checkpoint, tmp_path / "out"), *words)
    assert "\n" not in str(error.value) and not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize("spoil, message", [
    (remove("one/00002.png"), r"one/00002\.png: cannot be read as a mask \(No such file"),
    (repaint("one/00002.png", lambda labels: 2 * labels), r"one/00002\.png: label 2, but the sequence has 1 object"),
    (repaint("one/00002.png", lambda labels: labels[:, :-1]), r"one/00002\.png: .*95 x 64 pixels instead of 96 x 64"),
    (lambda root: (root / "one/00002.png").write_bytes((root / "one/00002.png").read_bytes()[:90]), r"one/00002\.png: cannot be read"),
])
def test_masks_that_cannot_be_scored(data, tmp_path, monkeypatch, spoil, message):
    masks = shutil.copytree(data / "DAVIS/Annotations/480p", tmp_path / "masks")
    spoil(masks)
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, script, "--data_path", data, "--score_only", masks)
    assert not list(masks.glob("*.csv"))


def test_what_is_needed_without_score_only(monkeypatch):
    for words, name in (((), "pretrained_weights"), (("--pretrained_weights", "random"), "output_dir")):
        with pytest.raises(engine.InputError, match=f"--{name}: is needed unless --score_only"):
            run_main(monkeypatch, script, *words)


# ---------------------------------------------------------------- where it is shown

def test_report_and_page(done, tmp_path, capsys):
    report.report(done)
    printed, text = capsys.readouterr().out, (done / "report.md").read_text()
    assert "objects in videos" in printed and re.search(r"vit_small/16 +iBOT, 800 epochs +61\.8 +60\.4 +63\.2", printed)
    assert "| vit_base/8 | DINO | 71.4 | 67.9 | 74.9 |" in text
    settings = {"arch": "vit_small", "patch_size": 16, "scale_size": 480, "weights_hash": "a"}
    metrics = {"J&F-Mean": 61.7, "J-Mean": 60.3, "F-Mean": 63.1, "sequences": 30, "frames": 1999, "objects": 61}
    append_result(tmp_path, "video_segmentation", "c.pth", "teacher", settings, metrics)
    append_result(tmp_path, "video_segmentation", "c.pth", "student", settings, metrics | {"frames": 90})
    report.report(tmp_path)
    [whole, part] = [line for line in (tmp_path / "report.md").read_text().splitlines() if "J&F-Mean 61.70" in line]
    assert "| J&F-Mean 61.8, J-Mean 60.4, F-Mean 63.2 |" in whole and "61.8" not in part
    section = analysis_report.video_section(done, "teacher")
    assert section.count("<img") == 3 and "tiny: first, middle and last frame" in section
    assert analysis_report.video_section(done, "nobody") is None
