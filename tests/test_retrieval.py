"""Retrieval, copy detection and embeddings: scores worked out by hand, ground truth that runs nothing, scripts on toy data."""
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analysis_data import nano, run_in_two_processes, run_main, write_checkpoint
from PIL import Image
from torchvision.transforms import v2

import engine
import loader
from evaluation import embed, eval_copy_detection, eval_image_retrieval
from evaluation.common import nearest as module
from evaluation.common import ranking
from evaluation.common.data import eval_transform
from evaluation.common.nearest import (
    SizeBatches,
    gem,
    image_size,
    near_duplicates,
    nearest,
    retrieval_features,
    thumbnail_size,
)
from evaluation.common.ranking import average_precision, retrieval_scores
from evaluation.common.whitening import Moments, whiten, whitening, whitening_projection
from evaluation.eval_copy_detection import BLOCKS, LEVELS, copy_score
from images import load_rgb, normalize

# ---------------------------------------------------------------- scores

def test_scores_worked_out_by_hand():
    order, truth = np.array([[5, 2, 7, 0, 1, 3, 4, 6]]), {"easy": [2], "hard": [0, 3], "junk": [5, 1]}

    def percent(scores):
        return [round(scores[name] / 100, 6) for name in ("map", "p1", "p5", "p10")]

    scores = retrieval_scores(order, [truth])
    assert percent(scores["easy"]) == [1, 1, 1, 1]
    assert percent(scores["medium"]) == [0.763889, 1, 0.75, 0.75]
    assert percent(scores["hard"]) == [0.416667, 0, 0.666667, 0.666667]
    without_junk = {"easy": [2, 0, 3], "hard": [], "junk": []}
    assert percent(retrieval_scores(order, [without_junk])["easy"]) == [0.372222, 0, 0.4, 0.5]
    assert retrieval_scores(order, [without_junk])["hard"] == {}  # nobody asks
    nothing = {"easy": [], "hard": [], "junk": [1]}
    assert retrieval_scores(np.repeat(order, 2, axis=0), [nothing, truth]) == scores


@pytest.mark.parametrize("ranks, count, expected", [
    ([0], 1, 1), ([1], 1, 0.25), ([4], 1, 0.1), ([19], 1, 0.025), ([0, 2], 2, 0.791667), ([0, 2], 4, 0.395833), ([0, 1, 2], 3, 1),
    ([], 1, 0)])
def test_average_precision(ranks, count, expected):
    assert average_precision(ranks, count) == pytest.approx(expected, abs=1e-6)


def test_the_truth_itself_gives_100_and_a_shifted_one_what_it_must():
    """60 images, the i-th query's positives are 3 i .. 3 i + 2; shifted by one place, one of them comes first and two last."""
    gnd = [{"easy": [3 * i], "hard": [3 * i + 1, 3 * i + 2], "junk": []} for i in range(20)]
    right = np.array([np.roll(np.arange(60), -3 * i) for i in range(20)])
    for scores in retrieval_scores(right, gnd).values():
        assert list(scores.values()) == pytest.approx([100] * 4)
    shifted = np.roll(right, 1, axis=1)  # a wrong image first: ranks 1, 2, 3
    expected = ((1 / 2 + 0) + (2 / 3 + 1 / 2) + (3 / 4 + 2 / 3)) / 6
    assert retrieval_scores(shifted, gnd)["medium"]["map"] == pytest.approx(100 * expected)
    positives = [[i] for i in range(20)]
    places = np.array([np.roll(np.arange(20), -i) for i in range(20)])
    assert copy_score(places, positives) == 1 and copy_score(np.roll(places, 1, axis=1), positives) == 0.25
    assert copy_score(places[:, 1:], positives) == 0  # never found


# ---------------------------------------------------------------- whitening and descriptors

def test_whitening_and_gem_worked_out_by_hand():
    tokens = torch.tensor([[1.0, 2, -3, 0], [0.5] * 4, [-1, -2, -3, -4]]).T[None]  # [1, N, D]
    torch.testing.assert_close(gem(tokens), torch.tensor([[1.435811, 0.5, 1e-6]]))
    moments = Moments(2)
    for row in ((3.0, 1.0), (1.0, 3.0)):
        moments.add(torch.tensor([row]))
    mean, P = whitening(moments.sums(), 2)
    assert mean.tolist() == [2, 2]
    torch.testing.assert_close((P * P[:, :1].sign()), torch.tensor([[0.25, 0.25], [0.5, -0.5]]))
    torch.testing.assert_close(P @ torch.tensor([[5.0, 3], [3, 5]]) @ P.T, torch.eye(2))
    x = whiten(torch.tensor([[4.0, 2], [2, 3]]), mean, P)
    assert x.abs().tolist() == pytest.approx(np.array([[0.5, 1], [0.25, 0.5]]))
    assert F.cosine_similarity(x[0], x[1], dim=0).item() == pytest.approx(-0.6)
    assert np.abs(whitening_projection(np.diag([4, 1e-6]))).sum(axis=1).tolist() == pytest.approx([0.5, 158.113883])


@torch.no_grad()
def test_features_equal_a_plain_computation():
    """Whole patches only, cut after scaling; every row by its own norm."""
    model, images = nano(), torch.randn(3, 3, 45, 61)
    expected = 0
    for scale, (H, W) in ((1, (40, 56)), (2 ** -0.5, (24, 40)), (0.5, (16, 24))):
        scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False) if scale < 1 else images
        assert (scaled.shape[2] // 8 * 8, scaled.shape[3] // 8 * 8) == (H, W)
        expected = expected + model.get_intermediate_layers(scaled[:, :, :H, :W], 1)[0][:, 0] / 3
    for i in range(3):
        found = retrieval_features(model, images[i:i + 1], 8, multiscale=True)[0]
        torch.testing.assert_close(found, expected[i] / expected[i].norm(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(retrieval_features(model, images, 8, True), F.normalize(expected, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, small", [((1024, 768), (512, 384)), ((1024, 681), (512, 341)), ((500, 333), (500, 333)),
                                         ((681, 1024), (340, 512)), ((2000, 3), (512, 1)), ((2400, 1800), (512, 384))])
def test_thumbnails(size, small):
    assert thumbnail_size(size, 512) == small
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    expected = image.copy()
    expected.thumbnail((512, 512), Image.Resampling.LANCZOS)
    found = module.thumbnail_transform(512)(image)
    assert found.shape[1:] == small[::-1] and image.size == size
    assert torch.equal(found, normalize(v2.functional.pil_to_tensor(expected)))


# ---------------------------------------------------------------- neighbours

def test_nearest_equals_a_stable_sort():
    """Small integers, hence many ties, also where the list is cut."""
    torch.manual_seed(0)
    database, queries = torch.randint(-1, 2, (40, 3)).float(), torch.randint(-1, 2, (15, 3)).float()
    similarity = queries @ database.T
    for k in (1, 5, 40, 60):
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
        for block in (1, 100, 10**6):
            values, places = nearest(queries, database, k, max_block=block)
            assert torch.equal(places, order) and torch.equal(values, similarity.gather(1, order))
    ids = torch.arange(40)
    values, places = nearest(database, database, 39, same=(ids, ids))
    assert not (places == ids[:, None]).any() and values.isfinite().all()


def test_near_duplicates_equal_all_pairs():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(30, 3), dim=1), F.normalize(torch.randn(11, 3), dim=1)
    similarity, ids = x @ x.T, torch.arange(30)
    expected = sorted(((similarity[i, j].item(), i, j) for i in range(30) for j in range(i + 1, 30)
                       if similarity[i, j] >= 0.8), reverse=True)
    for block in (30, 10**6):
        count, pairs = near_duplicates(x, x, 0.8, 20, (ids, ids), max_block=block)
        assert count == len(expected) > 20 and [pair[1:] for pair in pairs] == [pair[1:] for pair in expected[:20]]
        count, pairs = near_duplicates(y, x, 0.8, 999, (torch.arange(11) - 1, ids), max_block=block)
        assert count == len(pairs) == (y @ x.T >= 0.8).sum() - sum((y[i] @ x[i - 1] >= 0.8).item() for i in range(1, 11))
        assert near_duplicates(x, x, 2, 20, (ids, ids), max_block=block) == (0, [])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_have_one_size_and_every_image_is_in_one(world_size):
    sizes = [(4, 3)] * 11 + [(3, 4)] * 5 + [(i, 9) for i in range(4)]
    shares = [list(SizeBatches(sizes, 4, engine.Process(rank, world_size, rank, None))) for rank in range(world_size)]
    for step in zip(*shares, strict=True):  # equally many, and equally long
        assert len({len(batch) for batch in step}) == 1
        assert all(len({sizes[i] for i in batch}) == 1 for batch in step)
    assert {i for share in shares for batch in share for i in batch} == set(range(20))
    lengths = [len(batch) for batch in shares[0]]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) == 4


# ---------------------------------------------------------------- ground truth

TRUTH = {"imlist": [f"im{i}" for i in range(10)], "qimlist": ["q0", "q1"],
         "gnd": [{"bbx": [20.5, 10.0, 300.0, 280.0], "easy": [2], "hard": [3], "junk": [7]},
                 {"bbx": [0.0, 0.0, 500.0, 300.0], "easy": [4, 5], "hard": [], "junk": []}]}


def with_lists(make, box=list, outer=list):
    return {"imlist": outer(TRUTH["imlist"]), "qimlist": outer(TRUTH["qimlist"]), "gnd": outer([
        {"bbx": box(query["bbx"]), **{key: make(query[key]) for key in ("easy", "hard", "junk")}} for query in TRUTH["gnd"]])}


@pytest.mark.parametrize("protocol", range(6))
def test_ground_truth_of_all_kinds(tmp_path, protocol):
    def objects(values):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array

    for content in (TRUTH, with_lists(tuple), with_lists(lambda places: np.array(places, dtype=np.int64), np.array),
                    with_lists(lambda places: np.array(places, dtype=">u2")), with_lists(lambda places: [np.int32(place) for place in places], lambda box: np.array(box, dtype=np.float32)),
            with_lists(objects, lambda box: [np.float64(side) for side in box], objects)):
        (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert ranking.read_ground_truth(tmp_path, "x") == TRUTH
    del content["gnd"][1]["junk"]
    (tmp_path / "gnd_x.json").write_text(json.dumps(TRUTH | {"gnd": [{**TRUTH["gnd"][0], "junk": []}, TRUTH["gnd"][1]]}))
    assert ranking.read_ground_truth(tmp_path, "x")["gnd"][0]["junk"] == []  # rather than the pickle
    (tmp_path / "gnd_x.json").unlink()
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert ranking.read_ground_truth(tmp_path, "x") == TRUTH


def test_pickle_of_python_2(tmp_path):
    """Names and the bytes of arrays are text there."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR"
             b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntb")
    box = b"(lF0.0\naF0.0\naF5.0\naF5.0\na"
    data = (b"(dS'imlist'\n(lS'a'\naS'b'\naS'c'\nasS'qimlist'\n(lS'q'\nasS'gnd'\n(l(dS'bbx'\n" + box + b"sS'easy'\n" + array
            + b"sS'hard'\n(lsas.")
    (tmp_path / "gnd_x.pkl").write_bytes(data)
    assert ranking.read_ground_truth(tmp_path, "x") == {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [
        {"bbx": [0, 0, 5, 5], "easy": [2], "hard": [], "junk": []}]}


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def changed(**changes):
    return {**TRUTH, "gnd": [{**TRUTH["gnd"][0], **changes}, TRUTH["gnd"][1]]}


def hostile_files(folder):
    """[(what the message says, a pickle's content or its bytes)]."""
    lists = []
    for _ in range(50):  # 2^50 of them, if each were looked at
        lists = [lists, lists]
    deep = pickle.dumps({**TRUTH, "qimlist": ["HERE", "y"]}, protocol=2).replace(b"X\x04\0\0\0HERE", b"]" * 10**5 + b"a" * (10**5 - 1))
    array = pickle.dumps(np.arange(3), protocol=2)[2:-1].replace(b"K\x03\x85", b"K\x04\x85")
    return [
        ("it holds posix.system", Evil(os.system, f"touch {folder / 'ran'}")),
        ("it holds __builtin__.eval", changed(easy=Evil(eval, f"open({str(folder / 'ran')!r}, 'w')"))),
        ("it holds __builtin__.getattr", changed(easy=Evil(getattr, [], "append"))),
        ("in a way that numpy does not", changed(easy=Evil(bytes, 10**12))),
        ("easy is no list", changed(easy=3)), ("a place that is none", changed(easy=lists)),
        ("twice in", changed(easy=[3])), ("twice in", changed(easy=[2, 2])), ("none of the 10 images", changed(easy=[10])),
        ("none of the 10 images", changed(easy=[-1])), ("none of the 10 images", changed(easy=[True])),
        ("more places", changed(easy=[0] * 11)), ("not four numbers", changed(bbx=[0, 0, 1])),
        ("not four numbers", changed(bbx=[0, 0, float("nan"), 1])), ("bbx is empty", changed(bbx=[5, 0, 5, 1])),
        ("../x is no plain name", {**TRUTH, "imlist": ["../x"] + TRUTH["imlist"][1:]}),
        ("a/../x is no plain name", {**TRUTH, "imlist": ["a/../x"] + TRUTH["imlist"][1:]}), ("no plain name", {**TRUTH, "qimlist": [".x", "y"]}),
        ("a list is no plain name", deep), ("holds a name twice", {**TRUTH, "imlist": ["a"] * 10}),
        ("3 entries for 2", {**TRUTH, "gnd": TRUTH["gnd"] + TRUTH["gnd"][:1]}), ("no imlist", [TRUTH]), ("no hard", {
            **TRUTH, "gnd": [{"bbx": [0, 0, 1, 1], "easy": []}] * 2}),
        ("type U1", changed(easy=np.array(["a"]))), ("no list", changed(easy=np.zeros((2, 2), dtype=np.int64))),
        ("damaged", b"\x80\x02r\xff\xff\xff\xff."), ("", b""), ("", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."),
        ("", pickle.dumps(TRUTH)[:-20]), ("outside", b"Pstorage\n."),
        ("another size", pickle.dumps(changed(easy="HERE"), protocol=2).replace(b"X\x04\0\0\0HERE", array))]


def test_hostile_ground_truth_runs_nothing(tmp_path):
    for words, content in hostile_files(tmp_path):
        (tmp_path / "gnd_x.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
        with pytest.raises(engine.InputError, match=rf"^ground truth .*gnd_x\.pkl: .*{re.escape(words)}") as error:
            ranking.read_ground_truth(tmp_path, "x")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400, content
        assert not (tmp_path / "ran").exists()


def test_conversion_to_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(with_lists(np.array), protocol=2))
    monkeypatch.setattr(sys, "argv", ["ranking.py", str(tmp_path / "a.pkl"), str(tmp_path / "gnd_x.json")])
    ranking.main()
    assert json.loads((tmp_path / "gnd_x.json").read_text()) == ranking.read_ground_truth(tmp_path, "x") == TRUTH
    assert "10 images, 2 queries" in capsys.readouterr().out
    for content in ("[" * 10**5, "{", json.dumps({**TRUTH, "imlist": [1]})):
        (tmp_path / "gnd_x.json").write_text(content)
        with pytest.raises(engine.InputError, match="gnd_x.json"):
            ranking.read_ground_truth(tmp_path, "x")


# ---------------------------------------------------------------- toy data

def picture(path, size, seed, quality=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(30, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("job") / "checkpoint.pth")


@pytest.fixture(scope="module")
def oxford(tmp_path_factory):
    """DATA/SET/{gnd_SET.pkl,jpg}: images of many sizes, one cut short; the queries are copies of im2 and im4."""
    root = tmp_path_factory.mktemp("oxford")
    sizes = [(500, 333), (333, 500), (512, 384), (512, 384), (102, 68), (30, 20), (90, 131), (64, 48), (64, 48), (64, 48)]
    for name, protocol, make in (("roxford5k", 2, np.array), ("rparis6k", 5, list)):
        for i, size in enumerate(sizes):
            picture(root / name / "jpg" / f"im{i}.jpg", size, i)
        picture(root / name / "jpg" / "q0.jpg", (640, 480), 2, 70)
        picture(root / name / "jpg" / "q1.jpg", (600, 400), 4, 70)
        cut = root / name / "jpg" / "im9.jpg"
        cut.write_bytes(cut.read_bytes()[:-100])
        truth = with_lists(make)
        if name == "roxford5k":
            truth["gnd"] = [{**query, "easy": make([place])} for query, place in zip(truth["gnd"], (2, 4), strict=True)]
        (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth, protocol=protocol))
    return root


@pytest.fixture(scope="module")
def copydays(tmp_path_factory):
    """Four originals; every block holds copies of them, `strong` two each."""
    root = tmp_path_factory.mktemp("copydays")
    for i in range(4):
        picture(root / "original" / f"200{i}.jpg", (50, 40), 50 + i)
        for letter in "ab":
            picture(root / "strong" / f"200{i}{letter}.jpg", (50, 40), 50 + i)
    for block in BLOCKS[2:]:
        shutil.copytree(root / "original", root / block)
    for i in range(7):
        picture(root / "other" / f"{i}.png", (50, 40), 100 + i)
    return root


def records(folder):
    return json.loads((folder / "results.json").read_text())


RETRIEVE = ["--imsize", 64, "--multiscale", "--checkpoint_key", "teacher,student", "--dataset", "rparis6k", "roxford5k"]


@pytest.fixture(scope="module")
def retrieved(checkpoint, oxford, tmp_path_factory):
    """(output folder, what was printed) of both sets and both keys."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        run_main(patch, eval_image_retrieval, "--pretrained_weights", checkpoint, "--data_path", oxford, *RETRIEVE, "--output_dir", out)
        return out, sys.stdout.getvalue()


@torch.no_grad()
def test_retrieval_equals_the_definition(retrieved, oxford):
    out, printed = retrieved
    found = records(out)
    assert [(record["protocol"], record["key"]) for record in found] == [
        (f"retrieval_{name}", key) for key in ("teacher", "student") for name in ("rparis6k", "roxford5k")]
    assert printed.count("note: 1 of the roxford5k files are cut short") == 2 and "im9.jpg" in printed
    assert "teacher, roxford5k, whole queries:\n  easy: mAP 100.00, mP@1 100.00, mP@5 100.00, mP@10 100.00\n  medium: " in printed
    model, truth = nano(0), ranking.read_ground_truth(oxford / "roxford5k", "roxford5k")

    def feature(name):
        image, _ = module.load_tolerantly(oxford / "roxford5k" / "jpg" / f"{name}.jpg")
        image.thumbnail((64, 64), Image.Resampling.LANCZOS)
        return retrieval_features(model, normalize(v2.functional.pil_to_tensor(image))[None], 8, True)[0]

    similarity = torch.stack(list(map(feature, truth["qimlist"]))) @ torch.stack(list(map(feature, truth["imlist"]))).T
    order = similarity.argsort(dim=1, descending=True, stable=True)
    assert found[1]["metrics"] == retrieval_scores(order.numpy(), truth["gnd"])
    assert found[1]["settings"] | {"imsize": 64, "multiscale": True, "crop_queries": False, "database_images": 10,
                                   "query_images": 2} == found[1]["settings"]
    with open(out / "retrieval/roxford5k/teacher/neighbours.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["image"] for line in lines if line["query"] == "q1.jpg"] == [f"im{i}.jpg" for i in order[1].tolist()]
    assert [line["mark"] for line in lines if line["image"] == "im7.jpg"] == ["junk", "wrong"]
    assert (lines[0]["image"], lines[0]["mark"], lines[0]["rank"]) == ("im2.jpg", "right", "1")


class Page(HTMLParser):
    """What a page loads, and the balance of its tags."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_of_neighbours_needs_nothing_else(retrieved):
    folder = retrieved[0] / "retrieval/roxford5k/student"
    text = (folder / "index.html").read_text()
    pictures = [source for source in Page(text).sources if source.startswith("data:image/jpeg;base64,")]
    assert len(pictures) == 2 * (1 + 10) and not re.search("https?://", text)
    assert text.count('class="right"') == 3 and text.count('class="junk"') == 1 and text.count('class="wrong"') == 16
    assert sorted(path.name for path in folder.glob("*.png")) == ["query1.png", "query2.png"]
    strip = np.asarray(Image.open(folder / "query1.png"))
    assert strip.shape == (188, 6 * 180 + 12, 3)
    green = (strip[1] == (0x2c, 0xa0, 0x2c)).all(axis=1).nonzero()[0]
    assert green.tolist()[:168] == list(range(192, 360))  # the nearest is right


def test_cropped_queries_and_other_batches(checkpoint, oxford, retrieved, tmp_path, monkeypatch, capsys):
    """A batch of one gives the same; a query that is cut to its box gives other features."""
    words = ["--pretrained_weights", checkpoint, "--data_path", oxford, "--imsize", 64, "--multiscale", "--results_dir", tmp_path]
    run_main(monkeypatch, eval_image_retrieval, *words, "--batch_size_per_gpu", 1)
    assert records(tmp_path)[0]["metrics"] == records(retrieved[0])[1]["metrics"]
    boxes = []
    with monkeypatch.context() as patch:
        patch.setattr(eval_image_retrieval, "extract_listed", lambda _, items, *rest: boxes.extend(items) or torch.eye(12))
        run_main(patch, eval_image_retrieval, *words, "--crop_queries")
    assert "queries cut to their boxes" in capsys.readouterr().out and records(tmp_path)[-1]["settings"]["crop_queries"]
    assert [box for _, box in boxes] == [None] * 10 + [(20.5, 10, 300, 280), (0, 0, 500, 300)]
    path = oxford / "roxford5k/jpg/q1.jpg"
    whole = load_rgb(path)
    assert module.crop(whole, (20.5, 9.6, 300.2, 1e9)).size == image_size(path, (20.5, 9.6, 300.2, 1e9)) == (280, 390)
    assert module.crop(whole, (20.5, 10, 300, 280)).tobytes() == whole.crop((20, 10, 300, 280)).tobytes()
    with pytest.raises(engine.InputError, match="q1.jpg: nothing of the image of 600 x 400 pixels"):
        image_size(path, (600, 0, 700, 9))


def test_folders_of_ones_own(checkpoint, tmp_path, monkeypatch, capsys):
    """Copies are found, whatever their place and name; nobody is its own neighbour; names are data, not markup."""
    for i in range(6):
        picture(tmp_path / "photos" / "ab"[i % 2] / f"{i} <b>.png", (45, 33), i)
    shutil.copy(tmp_path / "photos/a/2 <b>.png", tmp_path / "photos/copy.png")
    words = ["--pretrained_weights", checkpoint, "--data_path", tmp_path / "photos", "--output_dir", tmp_path / "out",
             "--topk", 3, "--threshold", 0.9999]
    run_main(monkeypatch, eval_image_retrieval, *words, "--queries", tmp_path / "photos")
    printed = capsys.readouterr().out
    assert "7 queries among 7 images; 1 pair(s) of images with a similarity from 0.9999 on" in printed
    assert "1.0000  a/2 <b>.png  copy.png" in printed
    folder = tmp_path / "out/retrieval/photos/teacher"
    with open(folder / "neighbours.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7 * 3 and all(line["query"] != line["image"] for line in lines)
    assert [line["image"] for line in lines if line["query"] == "copy.png"][0] == "a/2 <b>.png"
    assert list(csv.reader((folder / "duplicates.csv").read_text().splitlines()))[1:] == [["a/2 <b>.png", "copy.png", "1.0000"]]
    text = (folder / "index.html").read_text()
    assert len([source for source in Page(text).sources if source.startswith("data:")]) == 7 * 4 + 2 and "<b>" not in text
    assert len(list(folder.glob("query*.png"))) == 3 and not (tmp_path / "out/results.json").exists()

    # Queries of another folder, one of them a link to an image of the first.
    picture(tmp_path / "asked/new.png", (45, 33), 3)
    (tmp_path / "asked/linked.png").symlink_to(tmp_path / "photos/b/1 <b>.png")
    run_main(monkeypatch, eval_image_retrieval, *words, "--queries", tmp_path / "asked")
    assert "2 queries among 7 images; 1 pair(s)" in capsys.readouterr().out
    with open(tmp_path / "out/retrieval/asked/teacher/neighbours.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["query"] for line in lines} == {"photos/b/1 <b>.png", "asked/new.png"} and len(lines) == 6
    assert ("asked/new.png", "photos/b/3 <b>.png", "1") in [(line["query"], line["image"], line["rank"]) for line in lines]

    # Of a list and of shards.
    (tmp_path / "list.txt").write_text("asked/new.png\n")
    loader.pack([tmp_path / "photos"], tmp_path / "tars", 0, 1.0)
    run_main(monkeypatch, eval_image_retrieval, *words, "--queries", tmp_path / "list.txt", tmp_path / "tars")
    assert "8 queries among 7 images; 10 pair(s)" in capsys.readouterr().out
    with open(tmp_path / "out/retrieval/list.txt+tars/teacher/neighbours.csv") as file:
        nearest = {line["query"]: line["image"] for line in csv.DictReader(file) if line["rank"] == "1"}
    assert len(nearest) == 8 and nearest["tars/00000.tar:b/1 <b>.png"] == "photos/b/1 <b>.png"


# ---------------------------------------------------------------- features of any folder

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images at the top and below it: one is there twice, one is cut short."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(9):
        picture(folder / ("" if i % 3 else "sub/deep") / f"{i} é.jpg", (45 + i, 40), i)
    shutil.copy(folder / "1 é.jpg", folder / "sub/copy.jpg")
    cut = folder / "5 é.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    (folder / "notes.txt").write_text("no image")
    return folder


def embedded(path):
    with np.load(path, allow_pickle=False) as file:
        return file["names"].tolist(), file["features"], json.loads(str(file["settings"]))


def test_features_of_any_folder(checkpoint, photos, tmp_path, monkeypatch, capsys):
    words = ["--pretrained_weights", checkpoint, "--data_path", photos, "--batch_size_per_gpu", 4]
    run_main(monkeypatch, embed, *words, "--output", tmp_path / "new/x.npz", "--threshold", 0.9999, "--topk", 3)
    printed = capsys.readouterr().out
    assert "features of" in printed and "1 of the" in printed and "cut short" in printed and "1 pair(s)" in printed
    names, features, settings = embedded(tmp_path / "new/x.npz")
    assert names == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg")) and len(names) == 10
    transform = eval_transform(32)
    with torch.no_grad():
        images = torch.stack([transform(module.load_tolerantly(photos / name)[0]) for name in names])
        torch.testing.assert_close(torch.from_numpy(features), nano(0)(images), atol=1e-5, rtol=1e-5)
    assert (settings["arch"], settings["image_size"], settings["key"]) == ("vit_nano", 32, "teacher")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x", "x.npz"]  # no temporary file is left
    duplicates = (tmp_path / "new/x/duplicates.csv").read_text().splitlines()[1:]
    assert [sorted(line.split(",")[:2]) for line in duplicates] == [["1 é.jpg", "sub/copy.jpg"]]
    text = (tmp_path / "new/x/index.html").read_text()
    assert len([source for source in Page(text).sources if source.startswith("data:")]) == 10 * 4 + 2

    run_main(monkeypatch, embed, *words, "--output", tmp_path / "y.npz", "--page", "false", "--avgpool_patchtokens", 2)
    assert embedded(tmp_path / "y.npz")[1].shape == (10, 2 * 96) and not (tmp_path / "y").exists()


@pytest.mark.parametrize("words, message", [
    (["--output", "{tmp}/a.npy"], r"a.npy: its name must end in .npz"),
    (["--data_path", "{tmp}/nowhere"], r"nowhere: No such file"),
    (["--data_path", "{tmp}"], r"no image .* in it"),
    (["--output", "{data}/notes.txt/a.npz"], r"a.npz: its folder cannot be made"),
    (["--checkpoint_key", "teacher,student"], r"key 'teacher,student' is not in the file"),
    (["--n_last_blocks", "9"], r"--n_last_blocks 9"),
    (["--image_size", "36"], r"--image_size 36 does not divide"),
])
def test_mistakes_of_embedding(checkpoint, photos, tmp_path, monkeypatch, words, message):
    words = [word.format(tmp=tmp_path, data=photos) for word in words]
    given = ["--pretrained_weights", checkpoint, "--data_path", photos, "--output", tmp_path / "a.npz"]
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, embed, *given, *words)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Copydays

def detect(monkeypatch, checkpoint, data, *words):
    run_main(monkeypatch, eval_copy_detection, "--pretrained_weights", checkpoint, "--data_path", data, "--imsize", 37, *words)


def test_copies_are_found(checkpoint, copydays, tmp_path, monkeypatch, capsys):
    """Sides of 37 pixels are no multiple of the patches' 8."""
    others = ["--distractors_path", copydays / "other", "--whitening_path", copydays / "other"]
    detect(monkeypatch, checkpoint, copydays, *others, "--output_dir", tmp_path)
    out, err = capsys.readouterr()
    for block in BLOCKS:
        assert f"eval on {block} mAP=1.000\n" in out
    assert "84 images of 20 blocks among 4 originals and 7 distractors" in out
    assert "whitening by 7 images: 192 directions kept" in out and "do not trust" in out
    [record] = records(tmp_path)
    assert record["protocol"] == "copy_detection" and record["settings"]["whitening_images"] == 7
    assert record["metrics"] == {"strong": 100, "original": 100, "jpegqual": 100, "crops": 100, "levels": {
        kind: {str(level): 100 for level in levels} for kind, levels in LEVELS.items()}}


@torch.no_grad()
def test_descriptors_equal_a_plain_computation(copydays):
    model = nano(0)
    image = load_rgb(copydays / "original/2001.jpg").resize((37, 37), Image.Resampling.BICUBIC)
    tokens = model.get_intermediate_layers(normalize(v2.functional.pil_to_tensor(image))[None, :, :32, :32], 1)[0]
    expected = torch.cat((tokens[:, 0], tokens[:, 1:].clamp(min=1e-6).pow(4).mean(dim=1).pow(0.25)), dim=1)
    images = module.square_transform(37)(load_rgb(copydays / "original/2001.jpg"))[None]
    torch.testing.assert_close(module.copy_descriptors(model, images, 8), expected, atol=1e-5, rtol=1e-5)


def test_order_distractors_and_missing_blocks(checkpoint, copydays, tmp_path, monkeypatch, capsys):
    shutil.copytree(copydays, tmp_path / "data")
    data = tmp_path / "data"
    names = sorted(path.name for path in (data / "crops/80").iterdir())
    for old, new in zip(names, reversed(names), strict=True):
        shutil.copy(data / "original" / old, data / "crops/80" / f"9{new}")
        (data / "crops/80" / new).unlink()
    for i in range(25):  # all nearer to the query than its original
        picture(data / "distractors" / f"{i}.png", (50, 40), 77)
    picture(data / "strong/2000a.jpg", (50, 40), 77, 100)
    detect(monkeypatch, checkpoint, data, "--distractors_path", data / "distractors")
    out, err = capsys.readouterr()
    assert "eval on strong mAP=0.875\n" in out and "eval on original mAP=1.000\n" in out
    assert float(re.search(r"eval on crops/80 mAP=(.*)", out)[1]) < 0.3  # compared with the wrong ones
    assert "published are 229 images in strong and 157 in all other blocks, here are original 4, strong 8, jpegqual/3 4" in err
    assert re.search(r"warning: 4 images have another name than the original at their place .*crops/80/92000.jpg", err)


@pytest.mark.parametrize("script, words, message", [
    ("copies", ["--data_path", "{tmp}/missing"], r"Copydays .*missing/crops/10: No such file"),
    ("copies", ["--data_path", "{tmp}/empty"], r"Copydays .*empty/jpegqual/3: no image in it"),
    ("copies", ["--data_path", "{tmp}/alone"], r"strong/3000.jpg: none of the 4 originals"),
    ("copies", ["--distractors_path", "{tmp}/nowhere"], r"--distractors_path .*nowhere: No such file"),
    ("copies", ["--whitening_path", "{tmp}/file"], r"--whitening_path .*file: Not a directory"),
    ("copies", ["--imsize", "7"], r"--imsize 7: smaller than a patch of 8"),
    ("copies", ["--pretrained_weights", "random", "--arch", "swin_tiny"], r"swin_tiny has no \[CLS\] token"),
    ("images", ["--pretrained_weights", "random", "--arch", "swin_tiny"], r"swin_tiny has no \[CLS\] token"),
    ("images", ["--imsize", "15", "--multiscale"], r"im0.jpg: 15 x 10 pixels are too small, the network needs 16"),
    ("images", ["--data_path", "{tmp}"], r"ground truth .*gnd_roxford5k.pkl: no such file"),
    ("images", ["--data_path", "{tmp}/lack"], r"roxford5k: 1 of 12 images are missing, the first one is .*im3.jpg"),
    ("images", ["--data_path", "{tmp}/broken"], r"im3.jpg: cannot be read as an image"),
    ("images", ["--data_path", "{tmp}/evil"], r"gnd_roxford5k.pkl: it holds posix.system"),
    ("images", ["--queries", "{tmp}", "--dataset", "rparis6k"], r"--queries and --dataset: either"),
    ("images", ["--queries", "{tmp}"], r"--queries: --output_dir is needed"),
    ("images", ["--queries", "{tmp}/nowhere", "--output_dir", "{tmp}/out"], r"data folder .*nowhere: No such file"),
    ("images", ["--queries", "{tmp}/none", "--output_dir", "{tmp}/out"], r"data folder .*none: no image .* in it"),
    ("images", ["--queries", "{data}", "--output_dir", "{tmp}/file"], r"file/.*: cannot be written"),
    ("images", ["--n_last_blocks", "9"], r"--n_last_blocks 9: the backbone has 4 blocks"),
])
def test_what_is_wrong_is_said_in_one_line(checkpoint, oxford, copydays, tmp_path, monkeypatch, capsys, script, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "none").mkdir()
    case = words[1].rpartition("/")[2]
    if case in ("missing", "empty", "alone"):
        shutil.copytree(copydays, tmp_path / case)
        if case != "alone":
            shutil.rmtree(tmp_path / case / ("crops/10" if case == "missing" else "jpegqual/3"))
        (tmp_path / case / "jpegqual/3").mkdir(exist_ok=True)
        picture(tmp_path / case / "strong/3000.jpg", (50, 40), 9)
    elif case in ("lack", "broken", "evil"):
        shutil.copytree(oxford, tmp_path / case)
        image = tmp_path / case / "roxford5k/jpg/im3.jpg"
        if case == "lack":
            image.unlink()
        elif case == "broken":
            image.write_text("no image")
        else:
            image.parent.with_name("gnd_roxford5k.pkl").write_bytes(pickle.dumps(Evil(os.system, f"touch {tmp_path / 'ran'}")))
    main = {"copies": eval_copy_detection, "images": eval_image_retrieval}[script]
    given = ["--pretrained_weights", checkpoint, "--data_path", copydays if script == "copies" else oxford, "--imsize", "32"]
    words = [word.format(tmp=tmp_path, data=oxford) for word in words]
    monkeypatch.setattr(sys, "argv", ["", *map(str, given), "--device", "cpu", "--num_workers", "0", *words])
    with pytest.raises(SystemExit) as end:
        engine.run(main.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert end.value.code == 1 and len(lines) == 1 and re.match(f"error: .*{message}", lines[0]), lines
    assert not (tmp_path / "ran").exists()


def test_two_processes_equal_one(checkpoint, oxford, copydays, photos, retrieved, call, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(copydays, data)
    for i, path in enumerate(sorted(data.glob("crops/*/*.jpg"))):  # no copies any more, so that scores tell features apart
        picture(path, (50, 40), 500 + i)
    others = ["--distractors_path", data / "other", "--whitening_path", data / "other", "--imsize", 37, "--batch_size_per_gpu", 3]
    copies = ["--pretrained_weights", checkpoint, "--data_path", data, *others]
    features = ["--pretrained_weights", checkpoint, "--data_path", photos, "--batch_size_per_gpu", 2, "--page", "false"]
    run_main(monkeypatch, eval_copy_detection, *copies, "--output_dir", tmp_path / "one")
    run_main(monkeypatch, embed, *features, "--output", tmp_path / "one.npz")
    assert 5 < records(tmp_path / "one")[0]["metrics"]["crops"] < 60
    run_in_two_processes(call, tmp_path, [
        (eval_image_retrieval, ["--pretrained_weights", checkpoint, "--data_path", oxford, *RETRIEVE, "--output_dir", tmp_path / "two"]),
        (eval_copy_detection, [*copies, "--output_dir", tmp_path / "two"]),
        (embed, [*features, "--output", tmp_path / "two.npz"])])
    one, two = embedded(tmp_path / "one.npz"), embedded(tmp_path / "two.npz")
    assert one[0] == two[0] and one[1] == pytest.approx(two[1], abs=1e-6) and one[2] == two[2]
    one, two = records(retrieved[0]) + records(tmp_path / "one"), records(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert [left[key] for key in ("protocol", "key", "settings")] == [right[key] for key in ("protocol", "key", "settings")]
        for name, scores in left["metrics"].items():
            assert right["metrics"][name] == (scores if name == "levels" else pytest.approx(scores))
    tables = [(folder / "retrieval/rparis6k/student/neighbours.csv").read_text() for folder in (retrieved[0], tmp_path / "two")]
    left, right = (list(csv.reader(table.splitlines()[1:])) for table in tables)
    assert [row[:3] for row in left] == [row[:3] for row in right]
    assert [float(row[3]) for row in left] == pytest.approx([float(row[3]) for row in right], abs=2e-4)
