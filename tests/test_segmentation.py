"""Semantic segmentation: ADE20K's data and scores, heads, whole images, training."""
import colorsys
import json
import os
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import engine
from evaluation.common import dense
from evaluation.common.data import fitted_size
from evaluation.common.reference_flags import override_words
from evaluation.common.shapes import draw_scene
from evaluation.semantic_segmentation import ade20k, heads, segmentation, test, train
from images import BadImage, normalize

ALONE = types.SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


# ---------------------------------------------------------------- data

def write_png(path, values):
    Image.fromarray(np.array(values, dtype=np.uint8)).save(path)
    return path


def test_labels(tmp_path):
    path = write_png(tmp_path / "a.png", [[0, 1, 2], [150, 255, 0]])
    assert ade20k.read_labels(path, 150).tolist() == [[255, 0, 1], [149, 255, 255]]
    with pytest.raises(engine.InputError, match="a.png: class 150, but --num_classes is 149"):
        ade20k.read_labels(path, 149)
    (tmp_path / "b.png").write_text("none")
    with pytest.raises(BadImage, match="b.png"):
        ade20k.read_labels(tmp_path / "b.png", 150)
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    with pytest.raises(BadImage, match="mode RGB"):
        ade20k.read_labels(tmp_path / "c.png", 150)


def test_sizes():
    for size, expected in (((480, 640), (512, 683)), ((300, 1500), (410, 2048)), ((2048, 2048), (512, 512)), ((100, 90), (569, 512))):
        assert fitted_size(*size, 512, 2048) == expected


def test_saturation():
    torch.manual_seed(0)
    image = torch.randint(256, (3, 5, 6), dtype=torch.uint8)
    image[:, 0, 0] = 77  # grey
    image[:, 0, 1] = 0
    for factor in (0.5, 1.0, 1.5):
        got = ade20k.change_saturation(image, factor)
        for y in range(5):
            for x in range(6):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                expected = np.array(colorsys.hsv_to_rgb(h, min(s * factor, 1), v)) * 255
                assert np.abs(got[:, y, x].numpy() - expected).max() <= 0.5 + 1e-3


class Draws:
    """A generator of the draws that are given."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)

    def uniform(self, low, high):
        value = self.values.pop(0)
        assert low <= value <= high
        return value

    def integers(self, low, high=None):
        value = self.values.pop(0)
        assert (0 if high is None else low) <= value < (low if high is None else high)
        return value


def test_distortion_in_order():
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    none = 0.9
    # brightness +30, contrast before the rest: 230, 130, 80 x 1.5 clipped
    assert ade20k.distort(image, Draws(0.1, 30.0, none, 0.1, 1.5, none, none)).flatten().tolist() == [255, 195, 120]
    # contrast last: after a halved saturation, which leaves the value
    assert ade20k.distort(image, Draws(none, 0.1, 0.1, 0.5, none, 0.1, 0.5)).flatten().tolist() == [100, 75, 62]
    # a hue of 18 on a scale of 180: 36 degrees of the 360
    turned = ade20k.distort(image, Draws(none, none, none, none, 0.1, -18)).flatten() / 255
    assert colorsys.rgb_to_hsv(*turned.tolist())[0] == pytest.approx((1 / 18 - 0.1) % 1, abs=0.01)  # 20 degrees before
    assert torch.equal(ade20k.distort(image, Draws(*[none] * 5)), image)


def test_crops_hold_two_classes():
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 20:] = 1
    labels[:5] = 255
    draws = Draws(0, 0, 20, 20, 10, 12, 0, 0)  # one class, one class, 8 of 20 columns of the other: taken
    assert ade20k.crop_place(labels, 20, draws) == (10, 12) and draws.values == [0, 0]
    draws = Draws(*[0, 0] * 10, 3, 4, 7, 7)
    assert ade20k.crop_place(labels, 20, draws) == (3, 4) and draws.values == [7, 7]  # the last one, whatever it holds
    assert ade20k.crop_place(labels[:10, :15], 20, Draws(*[0] * 22)) == (0, 0)


def test_training_samples(monkeypatch):
    """Images and labels go the same way; what is beyond the image is 0 and 255."""
    monkeypatch.setattr(ade20k, "distort", lambda image, rng: image)
    labels = torch.arange(6, dtype=torch.uint8).repeat_interleave(12).expand(50, 72)
    image = (labels * 40).expand(3, -1, -1)
    sizes = []
    for seed in range(20):
        x, y = ade20k.train_sample(image, labels, np.random.default_rng(seed), 64, (50, 200))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and y.dtype == torch.int64
        there = y != 255
        assert set(y[there].tolist()) <= set(range(6)) and (x[:, ~there] == 0).all()
        pixels = (x[0] * 0.229 + 0.485) * 255 / 40
        assert ((pixels - y).abs()[there] < 0.1).float().mean() > 0.85  # the rest is at edges, which are blurred
        sizes.append(int(there[:, 0].sum()))
    assert min(sizes) < 40 and max(sizes) == 64  # 25 to 100 rows, cut to 64


def test_batches_of_a_pass():
    """Each pass has every image once, in another order; from any number on they are the same; processes share them."""
    batches = ade20k.RandomBatches(11, 2, ALONE, seed=5, stop=10)
    items = list(batches)
    assert len(items) == len(batches) == 10 and batches.in_pass == 5
    passes = [[index for batch in items[i:i + 5] for *_, index in batch] for i in (0, 5)]
    assert all(len(set(indices)) == 10 for indices in passes) and passes[0] != passes[1]
    assert [item[:2] for batch in items[5:] for item in batch] == [(1, place) for place in range(10)]
    batches.start = 7
    assert list(batches) == items[7:]
    double = list(ade20k.RandomBatches(11, 4, ALONE, seed=5, stop=2))
    shares = [list(ade20k.RandomBatches(11, 2, types.SimpleNamespace(rank=rank, world_size=2), 5, 2)) for rank in (0, 1)]
    for whole, *parts in zip(double, *shares, strict=True):
        assert sorted(whole) == sorted(item for part in parts for item in part)


# ---------------------------------------------------------------- scores

def test_scores_by_definition():
    rng = np.random.default_rng(0)
    K, matrix, maps = 6, torch.zeros(6, 6, dtype=torch.int64), []
    for _ in range(3):
        truth, found = rng.choice([0, 1, 2, 3, 255], (7, 9)), rng.choice([0, 1, 2, 4], (7, 9))  # 3 never found, 4 only, 5 neither
        maps.append((truth, found))
        matrix += ade20k.confusion(torch.tensor(truth, dtype=torch.uint8), torch.tensor(found, dtype=torch.uint8), K)
    plain = np.zeros((K, K), dtype=int)
    for truth, found in maps:
        for y in range(7):
            for x in range(9):
                if truth[y, x] != 255:
                    plain[truth[y, x], found[y, x]] += 1
    assert (matrix.numpy() == plain).all() and matrix.sum() > 0
    means, iou, accuracy = ade20k.scores(matrix)
    union = [plain[k].sum() + plain[:, k].sum() - plain[k, k] for k in range(K)]
    expected = [100 * plain[k, k] / union[k] for k in range(5)]
    assert iou[:5].tolist() == pytest.approx(expected) and iou[3] == iou[4] == 0 and iou[5].isnan()
    assert accuracy[4].isnan() and accuracy[5].isnan() and accuracy[3] == 0
    assert means == pytest.approx({"mIoU": np.mean(expected), "aAcc": 100 * np.trace(plain) / plain.sum(),
                                   "mAcc": np.mean([100 * plain[k, k] / plain[k].sum() for k in range(4)])})
    assert ade20k.scores(matrix * 2**40)[0] == pytest.approx(means)


# ---------------------------------------------------------------- heads

@pytest.mark.parametrize("channels, width, count, auxiliary", [(384, 384, 17024406, 923798), (768, 768, 67963542, 1808534)])
def test_numbers_of_parameters(channels, width, count, auxiliary):
    with torch.device("meta"):
        parts = (heads.UPerNet([channels] * 4, 150, width), heads.auxiliary_head(channels, 150),
                 heads.Linear([channels] * 4, 150))
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sizes == [count, auxiliary, 4 * channels * 150 + 150]


@pytest.fixture(scope="module")
def upernet():
    """(UPerNet with statistics in its norms, its maps)."""
    torch.manual_seed(0)
    head = heads.UPerNet([8, 12, 16, 20], 7, 10)
    maps = [torch.randn(2, c, s, s + 1) for c, s in ((8, 24), (12, 12), (16, 6), (20, 3))]
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(head.scores.weight)
    return head.eval(), maps


def test_upernet_by_definition(upernet):
    head, maps = upernet

    def block(x, part, padding):
        x = F.conv2d(x, part[0].weight, padding=padding)
        bn = part[1]
        x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
        return (x * bn.weight[:, None, None] + bn.bias[:, None, None]).clamp(min=0)

    def to(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
    pools = [to(block(F.adaptive_avg_pool2d(maps[3], side), head.pools[i], 0), maps[3]) for i, side in enumerate((1, 2, 3, 6))]
    level3 = block(torch.cat([maps[3], *pools], 1), head.top, 1)
    level2 = block(maps[2], head.laterals[2], 0) + to(level3, maps[2])
    level1 = block(maps[1], head.laterals[1], 0) + to(level2, maps[1])
    level0 = block(maps[0], head.laterals[0], 0) + to(level1, maps[0])
    levels = [block(level, head.smooth[i], 1) for i, level in enumerate((level0, level1, level2))] + [level3]
    x = block(torch.cat([to(level, maps[0]) for level in levels], 1), head.fuse, 1)
    expected = F.conv2d(x, head.scores.weight, head.scores.bias)
    torch.testing.assert_close(head(maps), expected, rtol=1e-4, atol=1e-4)


def test_upernet_equals_that_of_transformers(upernet):
    pytest.importorskip("transformers")
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead
    head, maps = upernet
    other = UperNetHead(UperNetConfig(hidden_size=10, num_labels=7, pool_scales=[1, 2, 3, 6], backbone_config=None),
                        in_channels=[8, 12, 16, 20]).eval()
    parts = [*zip([block.layers[1] for block in other.psp_modules.blocks], head.pools, strict=True), (other.bottleneck, head.top),
             *zip(other.lateral_convs, head.laterals, strict=True), *zip(other.fpn_convs, head.smooth, strict=True),
             (other.fpn_bottleneck, head.fuse)]
    for theirs, ours in parts:
        theirs.conv.load_state_dict(ours[0].state_dict())
        theirs.batch_norm.load_state_dict(ours[1].state_dict())
    other.classifier.load_state_dict(head.scores.state_dict())
    torch.testing.assert_close(head(maps), other(maps), rtol=0, atol=1e-5)


def test_dropout_takes_whole_channels(upernet):
    head, _ = upernet
    x = head.dropout.train()(torch.ones(4, 200, 3, 3))
    head.dropout.eval()
    assert all(len(channel.unique()) == 1 for channel in x.flatten(0, 1)) and 0 < (x == 0).float().mean() < 0.25


def test_loss():
    """The mean is over all pixels; what is ignored weighs nothing."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(5, (2, 8, 8))
    labels[:, 2:] = 255
    loss, right = heads.pixel_loss(logits, labels)
    full = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    logs = full.log_softmax(dim=1)
    places = [(b, y, x) for b in range(2) for y in range(2) for x in range(8)]
    expected = -sum(logs[b, labels[b, y, x], y, x] for b, y, x in places) / labels.numel()
    torch.testing.assert_close(loss, expected)
    hits = [int(full[b, :, y, x].argmax() == labels[b, y, x]) for b, y, x in places]
    assert right.item() == pytest.approx(np.mean(hits))
    assert heads.pixel_loss(logits, torch.full_like(labels, 255))[0] == 0


# ---------------------------------------------------------------- whole images

def test_window_starts():
    for length, starts in ((512, [0]), (683, [0, 171]), (700, [0, 188]), (1100, [0, 341, 588]), (300, [0]),
                           (2048, [0, 341, 682, 1023, 1364, 1536])):
        assert heads.window_starts(length, 512, 341) == starts


class Pixels(nn.Module):
    """A network that looks at each cell of 4 pixels alone, with 4 classes."""

    def forward(self, images):
        assert not (images.shape[-1] % 16 or images.shape[-2] % 16)
        x = F.avg_pool2d(images[:, :2], 4)
        return torch.cat([x, -x], dim=1)


@pytest.mark.parametrize("h, w, size", [(64, 96, (150, 230)), (41, 205, (41, 205)), (70, 133, (20, 31)), (20, 64, (60, 60))])
def test_predictions(h, w, size, monkeypatch):
    """Windows and bands give what the plain definition gives."""
    torch.manual_seed(0)
    image = torch.randn(3, h, w)
    if (h, w) == (41, 205):
        image = F.interpolate(image[None, :, ::4, ::4], (h, w), mode="nearest")[0]
    total, cover = torch.zeros(4, h, w), torch.zeros(h, w)
    height, width = min(h, 64), min(w, 64)
    for top in heads.window_starts(h, 64, 43):
        for left in heads.window_starts(w, 64, 43):
            part = F.pad(image[None, :, top:top + height, left:left + width], (0, -width % 16 if width > 32 else 32 - width, 0,
                                                                             -height % 16 if height > 32 else 32 - height))
            logits = F.interpolate(Pixels()(part), part.shape[-2:], mode="bilinear")[0, :, :height, :width]
            total[:, top:top + height, left:left + width] += logits
            cover[top:top + height, left:left + width] += 1
    assert (cover > 0).all()
    full = F.interpolate((total / cover)[None], size, mode="bilinear")[0]
    expected = full.argmax(dim=0)
    sure = full.topk(2, dim=0).values.diff(dim=0).abs()[0] > 1e-4
    for band in (2**25, 2**11):
        monkeypatch.setattr(heads, "BAND", band)
        got = heads.predict(Pixels(), image, size, 64, 43)
        assert got.dtype == torch.uint8 and got.shape == size
        assert sure.float().mean() > 0.99 and torch.equal(got[sure].long(), expected[sure])


def test_windows_of_a_local_network_equal_the_whole_image():
    image = F.interpolate(torch.randn(1, 3, 32, 48), scale_factor=4.0)[0]  # each cell of one colour, windows on cells

    class Cells(Pixels):
        def forward(self, images):
            return F.interpolate(super().forward(images), scale_factor=4.0)  # at full size: no blur over borders
    whole = heads.predict(Cells(), image, (128, 192))
    assert torch.equal(heads.predict(Cells(), image, (128, 192), 64, 40), whole) and len(whole.unique()) == 4


# ---------------------------------------------------------------- runs

def write_scenes(root, training, validation, side=(56, 90)):
    rng = np.random.default_rng(0)
    for split, count in (("training", training), ("validation", validation)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, *_, classes = draw_scene(rng, *(int(v) for v in rng.integers(*side, 2)))
            if i == 1:
                image = image.convert("L")
            image.save(root / "images" / split / f"s{i}.jpg")
            write_png(root / "annotations" / split / f"s{i}.png", classes + 1)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.5\t1\t1\tground, floor\n2\t0\t1\t1\tdisc\n")
    return root


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", 4, 5)


def words(data, output, *more):
    return [str(word) for word in (
        "--pretrained_weights", "random", "--arch", "vit_nano", "--data_path", data, "--output_dir", output,
        "--num_classes", 4, "--crop_size", 64, "--short_side", 64, "--long_side", 256, "--slide_stride", 43, "--width", 16,
        "--iterations", 6, "--epoch_iterations", 3, "--warmup_iterations", 2, "--lr", 1e-3, "--batch_size_per_gpu", 2,
        "--num_workers", 0, "--print_freq", 2, "--device", "cpu", *more)]


def run_train(data, output, *more):
    train.train(segmentation.training_parser("").parse_args(words(data, output, *more)))
    return torch.load(output / "checkpoint.pth", weights_only=False)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """(folder, checkpoint) of a run that nothing disturbed, with two batches an update."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_train(scenes, folder, "--accum_iter", 2)


def test_a_run_leaves_its_files(finished, scenes):
    folder, checkpoint = finished
    [record] = json.loads((folder / "results.json").read_text())
    assert record["protocol"] == "ade20k_upernet" and set(record["metrics"]) == {"mIoU", "mAcc", "aAcc"}
    assert record["settings"]["total_batch"] == 4 and record["settings"]["layer_decay"] == 0.9
    assert checkpoint["progress"]["metrics"] == record["metrics"] and checkpoint["epoch"] == 2
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and {"train_loss", "train_aux", "train_acc"} <= lines[0].keys()
    table = [line.split("\t") for line in (folder / "classes.tsv").read_text().splitlines()]
    assert table[0] == ["class", "IoU", "accuracy", "pixels"] and {row[0] for row in table[1:]} == {"ground", "disc", "class 3", "class 4"}
    assert Image.open(folder / "segmentations.png").width > 600


def test_stopped_and_resumed_bit_for_bit(finished, scenes, tmp_path, monkeypatch):
    """A signal amid the second epoch, between the batches of an update."""
    fetch, calls = engine.Run.fetch, []

    def signalled(run, batches, training=True):
        calls.append(training)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(run, batches, training)
    monkeypatch.setattr(engine.Run, "fetch", signalled)
    with pytest.raises(engine.Preempted, match="epoch 1, step 1"):
        run_train(scenes, tmp_path, "--accum_iter", 2)
    calls.append(None)
    assert len(calls) == 11 and not (tmp_path / "results.json").exists()
    resumed = run_train(scenes, tmp_path, "--accum_iter", 2, "--load_from", "auto")
    whole = finished[1]
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert resumed["progress"]["metrics"] == whole["progress"]["metrics"]
    before = (tmp_path / "checkpoint.pth").read_bytes()
    run_train(scenes, tmp_path, "--accum_iter", 2, "--load_from", "auto")  # it has nothing to do
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    with pytest.raises(engine.InputError, match="its run had lr 0.001, this one 0.002"):
        run_train(scenes, tmp_path, "--accum_iter", 2, "--load_from", "auto", "--lr", 0.002)


def test_stopped_in_the_evaluation(finished, scenes, tmp_path, monkeypatch):
    def stop(run, batches, training=True):
        if not training:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(run, batches, training)
    fetch = engine.Run.fetch
    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "fetch", stop)
        with pytest.raises(engine.Preempted):
            run_train(scenes, tmp_path, "--accum_iter", 2)
    resumed = run_train(scenes, tmp_path, "--accum_iter", 2, "--load_from", "auto")
    assert resumed["progress"]["metrics"] == finished[1]["progress"]["metrics"]


def test_the_test_script(finished, scenes, tmp_path, capsys):
    folder, checkpoint = finished
    parser = test.get_args_parser()
    common = ["--checkpoint", str(folder / "checkpoint.pth"), "--device", "cpu", "--num_workers", "0", "--output_dir", str(tmp_path)]
    test.test(parser.parse_args(common))
    assert "ground" in capsys.readouterr().out
    [record] = json.loads((tmp_path / "results.json").read_text())
    assert record["metrics"] == checkpoint["progress"]["metrics"] and record["key"] == "random"
    photos = [str(scenes / "images" / split / "s0.jpg") for split in ("validation", "training")]
    test.test(parser.parse_args([*common, "--visualize", *photos]))
    pictures = [(tmp_path / f"{name}_segmentation.png").read_bytes() for name in ("s0", "s0_2")]
    assert pictures[0] != pictures[1]
    content = torch.load(folder / "checkpoint.pth", weights_only=False)
    content["network"]["num_classes"] = 10**9
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(engine.InputError, match="bad.pth: its entry 'network'"):
        segmentation.load_segmenter(tmp_path / "bad.pth")


def test_it_learns_two_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ade20k, "train_sample", lambda image, labels, rng, **_: (normalize(image), labels.long()))
    data = write_scenes(tmp_path / "data", 2, 0, side=(64, 65))
    for kind in ("images", "annotations"):
        (data / kind / "validation").rmdir()
        (data / kind / "validation").symlink_to(data / kind / "training")
    checkpoint = run_train(data, tmp_path / "out", "--iterations", 70, "--epoch_iterations", 70, "--lr", 5e-3, "--warmup_iterations", 0, "--width", 32, "--patch_size", 8,
                           "--drop_path", 0, "--print_freq", 40)
    assert checkpoint["progress"]["metrics"]["mIoU"] > 80


def test_linear_head_leaves_the_backbone(scenes, tmp_path):
    checkpoint = run_train(scenes, tmp_path, "--head", "linear", "--iterations", 5, "--epoch_iterations", 5)
    backbone, _ = dense.load_dense_backbone("random", arch="vit_nano", grid=(4, 4))
    own = {name.removeprefix("backbone.body."): value for name, value in checkpoint["model"].items() if "body" in name}
    expected = backbone.body.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in own.items() if name != "pos_embed")
    assert sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]) == 2
    [record] = json.loads((tmp_path / "results.json").read_text())
    assert record["protocol"] == "ade20k_linear" and record["settings"]["width"] is None


def test_bad_images_and_numbers(scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    (data / "images" / "training" / "s2.jpg").write_text("none")
    run_train(data, tmp_path / "out", "--max_bad_images", 1, "--iterations", 3)
    assert "s2.jpg" in (tmp_path / "out" / engine.BAD_IMAGES).read_text()
    with pytest.raises(engine.InputError, match="s2.jpg"):
        run_train(data, tmp_path / "strict", "--on_bad_image", "error", "--iterations", 3)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        run_train(scenes, tmp_path / "wild", "--lr", 1e38, "--warmup_iterations", 0)


@pytest.mark.parametrize("more, message", [
    (("--iterations", 7), "7 is no multiple of --epoch_iterations 3"),
    (("--batch_size_per_gpu", 1), "batch norm needs 2"),
    (("--batch_size_per_gpu", 5), "4 training images are fewer than one batch of 5"),
    (("--crop_size", 72), "72 does not divide into patches of 16"),
    (("--slide_stride", 65), "leaves gaps"),
    (("--head", "linear", "--arch", "swin_tiny"), "on a Swin there is UPerNet alone"),
    (("--num_classes", 2), "--num_classes is 2"),
    (("--data_path", "nowhere"), "nowhere: no folder"),
    (("--num_classes", 255), "annotations of 8 bits hold 254"),
])
def test_what_cannot_be_trained(scenes, tmp_path, more, message):
    with pytest.raises(engine.InputError, match=message):
        run_train(scenes, tmp_path, *more)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_recipes_and_words_of_the_reference():
    assert segmentation.recipe_of("upernet", "deit_small")[1] == "vit_small" and segmentation.recipe_of("linear", "vit_large")[1] == "vit_base"
    assert segmentation.recipe_of("upernet", "swin_base")[0]["inference"] == "whole"
    given = ["--pretrained_weights", "a=b.pth", "data.samples_per_gpu=4", "optimizer.lr=3e-5", "model.backbone.out_with_norm=true",
             "model.backbone.use_checkpoint=true", "optimizer.paramwise_cfg.layer_decay_rate=0.65"]
    args = segmentation.training_parser("").parse_args(override_words(given[:1] + ["x.pth"] + given[2:], segmentation.OVERRIDES))
    assert (args.batch_size_per_gpu, args.lr, args.final_norm, args.grad_checkpointing, args.layer_decay) == (4, 3e-5, True, True, 0.65)
    with pytest.raises(engine.InputError, match="model.decode_head.channels"):
        override_words(["model.decode_head.channels=4"], segmentation.OVERRIDES)


def test_schedule():
    lr = train.schedule(2.0, 160000, 1500)
    assert lr[0] == pytest.approx(2e-6) and lr[1500] == pytest.approx(2 * (1 - 1500 / 160000))
    assert lr[750] == pytest.approx(2 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6))) and lr[-1] == pytest.approx(2 / 160000)
    assert train.schedule(1.0, 4, 0).tolist() == [1, 0.75, 0.5, 0.25]


# ---------------------------------------------------------------- several processes

TWO = """
import sys
sys.path.insert(0, {root!r})
import torch
import engine
from evaluation.semantic_segmentation import segmentation, test, train
process = engine.init_process("cpu")  # once
engine.init_process = lambda *_: process
train.train(segmentation.training_parser("").parse_args({linear!r}))
train.train(segmentation.training_parser("").parse_args({upernet!r}))
test.test(test.get_args_parser().parse_args({evaluated!r}))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes(finished, scenes, tmp_path, call):
    """A frozen network's training in two processes equals that in one; an evaluation in two always does."""
    linear = ("--head", "linear", "--iterations", 3, "--epoch_iterations", 3, "--warmup_iterations", 0)
    script = tmp_path / "two.py"
    script.write_text(TWO.format(
        root=str(Path(__file__).parent.parent), linear=[*words(scenes, tmp_path / "linear", *linear, "--batch_size_per_gpu", 2)],
        upernet=words(scenes, tmp_path / "upernet"), evaluated=[
            "--checkpoint", str(finished[0] / "checkpoint.pth"), "--device", "cpu", "--num_workers", "0", "--output_dir",
            str(tmp_path / "test")]))
    call(str(script), processes=2)
    [record] = json.loads((tmp_path / "test" / "results.json").read_text())
    assert record["metrics"] == finished[1]["progress"]["metrics"]
    one = run_train(scenes, tmp_path / "one", *linear, "--batch_size_per_gpu", 4)
    two = torch.load(tmp_path / "linear" / "checkpoint.pth", weights_only=False)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6)
    assert two["progress"]["metrics"] == pytest.approx(one["progress"]["metrics"], abs=0.1)
    upernet = torch.load(tmp_path / "upernet" / "checkpoint.pth", weights_only=False)
    assert upernet["epoch"] == 2 and upernet["progress"]["total_batch"] == 4


def test_statistics_of_processes_are_evened_out(monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    monkeypatch.setattr(engine, "get_world_size", lambda: 2)
    monkeypatch.setattr(engine, "all_reduce_mean", lambda tensor: tensor + 1)
    dense.share_statistics(network)
    assert (network[1].running_mean == 1).all() and (network[1].running_var == 2).all()
