"""Correspondence: coordinates of patches, true matches, overlap, ranking, and the script on tiny data."""
import itertools

import numpy as np
import pytest
import torch
from analysis_data import nano, run_main, write_checkpoint, write_images
from PIL import Image

import engine
from analysis import common
from analysis.correspondence import visualize_correspondence as corr

WHOLE = (0, 0, 100, 200)  # top, left, height, width of an image of 200 x 100


def test_identical_and_flipped_views_by_hand():
    plain, flipped = (corr.patch_centres((200, 100), WHOLE, flip, 14) for flip in (False, True))
    assert plain[0, 0].item() == pytest.approx(1 / 28) and plain[1, 13].item() == pytest.approx(27 / 28)
    assert corr.true_matches(plain, plain).tolist() == list(range(196))
    assert corr.overlapping(plain, plain, 8 / 224).all() and corr.overlapping(plain, flipped, 8 / 224).all()
    for patch, other in enumerate(corr.true_matches(plain, flipped).tolist()):
        assert divmod(other, 14) == (patch // 14, 13 - patch % 14)


def test_coordinates_find_the_pixels_again():
    """A picture whose red is its row and whose green is its column tells where each pixel of a view comes from."""
    H, W = 240, 320
    rows, columns = np.mgrid[:H, :W]
    image = Image.fromarray(np.stack((rows * 255 / H, columns * 255 / W, 0 * rows), -1).round().astype(np.uint8))

    class Images:
        def with_transform(self, _):
            return self

    views, plain = corr.TwoViews(Images(), 112, 8, 0), corr.COLOUR
    for seed in range(6):
        torch.manual_seed(seed)
        try:
            corr.COLOUR = lambda image: image
            view, centres = views.view(image)
        finally:
            corr.COLOUR = plain
        pixels = (view * torch.tensor(common.normalize.__globals__["IMAGENET_STD"]).view(3, 1, 1) + torch.tensor(common.normalize.__globals__["IMAGENET_MEAN"]).view(3, 1, 1))
        cells = pixels.unflatten(2, (14, 8)).unflatten(1, (14, 8)).mean((2, 4))  # [3, 14, 14]
        torch.testing.assert_close(cells[0].mean(1).double(), centres[0], atol=0.01, rtol=0)
        torch.testing.assert_close(cells[1].mean(0).double(), centres[1], atol=0.01, rtol=0)


def test_true_matches_and_overlap_equal_a_loop_over_patches():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes = [(*rng.integers(0, 60, 2), *rng.integers(20, 40, 2)) for _ in range(2)]
        one, two = (corr.patch_centres((100, 100), box, bool(seed % 2 * k), 5) for k, box in enumerate(boxes))
        points = [[(y.item(), x.item()) for y in c[0] for x in c[1]] for c in (one, two)]
        for patch, (y, x) in enumerate(points[0]):
            distances = [(y - v) ** 2 + (x - u) ** 2 for v, u in points[1]]
            assert distances[corr.true_matches(one, two)[patch]] == pytest.approx(min(distances))
            v, u = zip(*points[1], strict=True)
            inside = y + .04 > min(v) and y - .04 < max(v) and x + .04 > min(u) and x - .04 < max(u)
            assert corr.overlapping(one, two, .04)[patch].item() == inside


def test_matching_accuracy_by_hand():
    true, found = torch.arange(9), torch.tensor([0, 2, 2, 3, 8, 5, 0, 7, 7])
    overlap = torch.tensor([True] * 8 + [False])
    assert corr.matching_accuracy(found, true, overlap, 3) == (5, 8)
    assert corr.matching_accuracy(found, true, overlap, 3, radius=1) == (7, 8)  # 1 -> 2, 4 -> 8; 6 -> 0 is two rows off
    assert corr.matching_accuracy(found, true, ~overlap & overlap, 3) == (0, 0)


def test_saliency_takes_even_cells_and_ranks_allowed_patches():
    fine = torch.arange(64.0).view(1, 64).repeat(2, 1) + torch.tensor([[0.0], [2.0]])
    assert corr.saliency(fine, 4).tolist() == [8 * 2 * r + 2 * c + 1 for r in range(4) for c in range(4)]
    assert corr.saliency(fine, 8).tolist() == [i + 1 for i in range(64)]
    salience, allowed = torch.tensor([.1, .9, .3, .3, .5]), torch.tensor([True, False, True, True, True])
    assert corr.drawn_matches(salience, allowed, 3) == [4, 2, 3]
    assert corr.drawn_matches(salience, allowed, 9) == [4, 2, 3, 0]  # never one outside


def test_pairs_of_a_class_go_both_ways():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    pairs = corr.class_pairs(labels, 2, 1)
    assert sorted(pairs) == [(0, 1), (1, 0), (3, 4), (4, 3), (5, 6), (6, 5)] and pairs == corr.class_pairs(labels, 2, 1)
    assert all(a[::-1] == b for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert sorted(corr.class_pairs(labels, 3, 1)) == [(0, 2), (1, 0), (2, 1), (3, 5), (4, 3), (5, 4)]


def test_tokens_are_matched_by_their_product():
    x = torch.tensor([[1.0, 0], [0, 1], [3, 3]])
    assert corr.match(x, x).tolist() == [2, 2, 2]  # not by the cosine


def test_lines_end_in_the_middle_of_patches():
    views = [torch.zeros(3, 224, 224)] * 2
    red = np.argwhere((np.asarray(corr.draw_pair(views, [(15, 29)], 16)) == (255, 0, 0)).all(-1))
    assert red.min(0).tolist() == [24, 24] and red.max(0).tolist() == [40, 248]  # (1, 1) to (2, 1) of the right view
    assert corr.draw_pair(views, [], 16, torch.rand(196)).size == (672, 224)
    assert corr.draw_pair([torch.zeros(3, 32, 32)] * 2, [(0, 0)], 8).size == (448, 224)


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("correspondence")
    write_images(root / "val", "ab", 4, size=(48, 44))
    write_checkpoint(root / "checkpoint.pth")
    torch.save({"state_dict": nano(3).state_dict()}, root / "other.pth")
    return root


def flags(job, out, *words):
    return ["--pretrained_weights", job / "checkpoint.pth", "--data_path", job / "val", "--output_path", out, *words]


def test_instance_pairs(job, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, corr, *flags(job, tmp_path, "--sample_type", "instance", "--show_pics", "false"))
    text = capsys.readouterr().out
    views, model = corr.TwoViews(common.image_folder(job / "val"), 32, 8, 1), nano()
    right = total = 0
    for i in range(8):
        one, c1, two, c2, *_ = views[i]
        x, y = (model(view[None], return_all_tokens=True)[0, 1:] for view in (one, two))
        for patch, (row, column) in enumerate(itertools.product(range(4), repeat=2)):
            here = torch.stack((c1[0, row], c1[1, column]))
            if all(c2[k].min() - 4 / 32 < here[k] < c2[k].max() + 4 / 32 for k in (0, 1)):
                there = torch.cartesian_prod(c2[0], c2[1])
                right += int((x[patch] @ y.T).argmax() == (there - here).square().sum(1).argmin())
                total += 1
    assert f"over patches {right / total:.4f} of {total}" in text and "mean over 4 batches" in text
    assert not list(tmp_path.iterdir())

    run_main(monkeypatch, corr, *flags(job, tmp_path / "new", "--sample_type", "instance", "--show_nums", "3", "--show_with_attn", "true"))
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [name[:17] for name in names] == [f"instance_corresp{i}" for i in range(3)] and all("_nh0.png" in name for name in names)
    assert Image.open(tmp_path / "new" / names[0]).size == (672, 224)


def test_class_pairs_and_another_networks_attention(job, tmp_path, monkeypatch, capsys):
    for name, words in (("own", ()), ("other", ("--attention_from", job / "other.pth", "--attention_arch", "vit_nano", "--attention_patch_size", "8"))):
        run_main(monkeypatch, corr, *flags(job, tmp_path / name, "--topk", "3", *words))
        assert len(list((tmp_path / name).iterdir())) == 8 and "accuracy" not in capsys.readouterr().out
    own, other = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("own", "other"))
    assert own != other


@pytest.mark.parametrize("words, message", [
    (("--show_pics", "false"), "no accuracy of --sample_type class"),
    (("--batch_size", "5"), "no class has 5 images"),
    (("--attention_from", "/nowhere.pth"), "checkpoint /nowhere.pth: no such file"),
])
def test_mistakes_are_named(job, tmp_path, monkeypatch, words, message):
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, corr, *flags(job, tmp_path, *words))
