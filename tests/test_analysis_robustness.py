"""Robustness: joining backbone and head, ImageNet-9, -A and -C, occlusion and shuffling, by hand and on tiny folders."""
import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analysis_data import nano, run_in_two_processes, run_main, write_checkpoint, write_images
from conftest import ROOT
from PIL import Image

import engine
from analysis import classifier, combine_ckpt, common, table8
from analysis.backgrounds_challenge import challenge_eval, in9, in9_eval
from analysis.corruptions_surf_variations import eval as imagenet_c
from analysis.linear_part import eval as linear_part
from analysis.natural_adv_examples import eval as imagenet_a
from analysis.occlusion import eval as occlusion
from evaluation.common.results import append_result
from images import normalize


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A checkpoint, sweeps of three heads for 1000, 9 and 3 classes, and the classifiers made of them."""
    root = tmp_path_factory.mktemp("robust")
    write_checkpoint(root / "checkpoint.pth")
    for name, C in (("1000", 1000), ("9", 9), ("3", 3)):
        torch.manual_seed(5)
        state = {f"{i}.module.linear.{part}": torch.randn(*shape) for i in range(3) for part, shape in (("weight", (C, 4 * 96)), ("bias", (C,)))}
        torch.save({"state_dict": state, "best_acc_hidx": 1, "best_acc": 12.5, "epoch": 7, "optimizers": [{}]}, root / f"linear{name}.pth")
        with pytest.MonkeyPatch.context() as patch:
            combine(patch, root, f"linear{name}.pth", f"classifier{name}.pth")
    return root


def combine(monkeypatch, root, linear, output, *words):
    monkeypatch.setattr(sys, "argv", ["", "--checkpoint_backbone", str(root / "checkpoint.pth"), "--checkpoint_linear", str(root / linear),
                                      "--output_file", str(root / output), *map(str, words)])
    combine_ckpt.main()


def logits_of(root, C, images):
    """The classifier's outputs, from the files it was made of."""
    state = torch.load(root / f"linear{C}.pth")["state_dict"]
    with torch.no_grad():
        taps = nano().get_intermediate_layers(images, 4)
        return F.linear(torch.cat([tap[:, 0] for tap in taps], -1), state["1.module.linear.weight"], state["1.module.linear.bias"])


def result(folder, protocol):
    return [r for r in json.loads((folder / "results.json").read_text()) if r["protocol"] == protocol][-1]["metrics"]


# ---------------------------------------------------------------- the classifier

def test_combined_file_gives_the_best_heads_logits(job):
    model, backbone = classifier.load_classifier(job / "classifier1000.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), logits_of(job, 1000, images))
    content = torch.load(job / "classifier1000.pth", weights_only=True)
    assert set(content) == {"state_dict", "settings", "epoch", "best_acc", "best_acc_hidx"} and content["epoch"] == 7
    assert (backbone.arch, backbone.patch_size, backbone.image_size) == ("vit_nano", 8, 32)


def test_one_head_and_the_settings_of_its_probe(job, monkeypatch):
    state = {"module.linear.weight": torch.randn(5, 192), "module.linear.bias": torch.randn(5)}
    hashed = classifier.load_evaluated_backbone(job / "checkpoint.pth", "student").weights_hash
    settings = {"n_last_blocks": 1, "avgpool_patchtokens": 2, "weights_hash": hashed}
    torch.save({"state_dict": state, "settings": settings, "best_acc": 1.0}, job / "one.pth")
    combine(monkeypatch, job, "one.pth", "one_out.pth", "--checkpoint_key", "student")
    images = torch.randn(1, 3, 32, 32)
    tokens = nano(1)(images, return_all_tokens=True)
    expected = F.linear(torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1), *state.values())
    torch.testing.assert_close(classifier.load_classifier(job / "one_out.pth")[0](images), expected)
    with pytest.raises(engine.InputError, match="trained on another backbone than teacher"):
        combine(monkeypatch, job, "one.pth", "x.pth")


def test_fine_tuned_vit_and_the_references_layout(job):
    """Under `model`, with `module.` and a head on [CLS]; a reference's combined file has no settings."""
    state = {f"module.{name}": value for name, value in nano().state_dict().items()}
    torch.save({"model": state | {"module.head.weight": torch.ones(3, 96), "module.head.bias": torch.zeros(3)}, "epoch": 1}, job / "tuned.pth")
    images = torch.randn(1, 3, 32, 32)
    model, _ = classifier.load_classifier(job / "tuned.pth", "vit_nano", 8)
    torch.testing.assert_close(model(images), nano()(images).sum(1, keepdim=True).expand(1, 3))
    # What fine-tuning here writes says what the network is.
    state = nano().state_dict() | {"head.weight": torch.ones(3, 96), "head.bias": torch.zeros(3)}
    args = argparse.Namespace(arch="vit_nano", patch_size=8, global_crops_size=32)
    torch.save({"model": state, "epoch": 1, "args": args}, job / "tuned.pth")
    torch.testing.assert_close(classifier.load_classifier(job / "tuned.pth")[0](images), model(images))
    torch.save({"model": state | {"fc_norm.weight": torch.ones(96)}, "args": args}, job / "mean.pth")
    with pytest.raises(engine.InputError, match="mean.pth: fine-tuned on the mean patch token"):
        classifier.load_classifier(job / "mean.pth")
    assert classifier.feature_settings({}, "vit_small") == {"n_last_blocks": 4, "avgpool_patchtokens": 0}
    assert classifier.feature_settings({}, "vit_large") == {"n_last_blocks": 1, "avgpool_patchtokens": 2}


@pytest.mark.parametrize("file, message", [
    ("checkpoint.pth", "no classifier .no state_dict in it.; analysis/combine_ckpt.py makes one"), ("linear3.pth", "no classifier under 'state_dict'"), ("none.pth", "no such file")])
def test_what_is_no_classifier(job, file, message):
    with pytest.raises(engine.InputError, match=message):
        classifier.load_classifier(job / file)


# ---------------------------------------------------------------- ImageNet-9

def test_class_map():
    numbers = in9.class_map()
    assert torch.bincount(numbers + 1).tolist() == [630, 116, 52, 42, 36, 35, 27, 26, 20, 16]
    assert [int(numbers[i]) for i in (171, 86, 870, 889, 0, 397, 151, 172, 384)] == [-1, -1, 2, 6, 8, 8, 0, -1, 7]
    logits = F.one_hot(torch.tensor([171, 870, 889, 86]), 1000).float()
    for label in range(9):
        assert in9.right(logits, torch.full((4,), label)).tolist() == [False, label == 2, label == 6, False]


NAMES = [f"{i:02}_{name}" for i, name in enumerate(("dog", "bird", "wheeled vehicle", "reptile", "carnivore", "insect", "musical instrument", "primate", "fish"))]


@pytest.fixture(scope="module")
def backgrounds(tmp_path_factory):
    root = tmp_path_factory.mktemp("in9")
    rng = np.random.default_rng(0)
    for seed, variant in enumerate(in9.VARIANTS):
        write_images(root / variant / "val", NAMES, 2, (32, 32), seed)
    for name in NAMES[:4]:
        (root / "fg_mask/val" / name).mkdir(parents=True)
        np.save(root / "fg_mask/val" / name / "01.npy", rng.integers(0, 2, (32, 32)).astype(bool))
    for name in NAMES[4:]:
        (root / "fg_mask/val" / name).mkdir(parents=True)
    return root


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("C", [1000, 9])
def test_variants_equal_a_plain_loop(C, job, backgrounds, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    run_main(monkeypatch, in9_eval, "--checkpoint", job / f"classifier{C}.pth", "--data-path", backgrounds, "--output_dir", tmp_path, *["--in9"] * (C == 9))
    text, numbers = capsys.readouterr().out, in9.class_map() if C == 1000 else torch.arange(9)
    for variant in in9.VARIANTS:
        hits = [numbers[logits_of(job, C, common.normalize(pixels_of(path))[None]).argmax()] == label
                for label, name in enumerate(NAMES) for path in sorted((backgrounds / variant / "val" / name).iterdir())]
        assert f"{variant}: {100 * sum(map(int, hits)) / 18:.2f} %" in text and f"{variant}:" in text
    metrics = result(tmp_path, "imagenet9")
    assert metrics["bg_gap"] == metrics["mixed_same"] - metrics["mixed_rand"]


def test_a_folder_that_cannot_be_is_found_before_the_work(job, backgrounds, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(engine.InputError, match="--output_dir .*file: cannot be made"):
        run_main(monkeypatch, in9_eval, "--checkpoint", job / "classifier9.pth", "--in9", "--data-path", backgrounds, "--output_dir", tmp_path / "file")
    assert "original: " not in capsys.readouterr().out


def test_images_of_other_sizes_are_named(job, backgrounds, tmp_path, monkeypatch):
    for folder in backgrounds.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for variant in ("original", "mixed_same"):
        (tmp_path / variant).unlink()
        write_images(tmp_path / variant / "val", NAMES, 2, (32, 32))
    flags = ["--checkpoint", job / "classifier1000.pth", "--data-path", tmp_path]
    write_images(tmp_path / "mixed_same/val", NAMES[3:4], 1, (40, 32))
    with pytest.raises(engine.InputError, match="mixed_same/val: an image of 40 x 32 pixels, others have 32 x 32"):
        run_main(monkeypatch, in9_eval, *flags, "--eval-dataset", "mixed_same")
    write_images(tmp_path / "original/val", NAMES[:4], 2, (32, 40))
    with pytest.raises(engine.InputError, match="original/val/00_dog: an image of 32 x 40 pixels, others have 32 x 32"):
        run_main(monkeypatch, challenge_eval, *flags)


def test_challenge_equals_a_plain_loop(job, backgrounds, tmp_path, monkeypatch):
    """With a class map under which most outputs are the first class."""
    monkeypatch.setattr(in9, "class_map", lambda: torch.arange(1000) % 40 // 39)
    run_main(monkeypatch, challenge_eval, "--checkpoint", job / "classifier1000.pth", "--data-path", backgrounds, "--output_dir", tmp_path, "--batch_size", "5")
    vulnerable = []
    for label, name in enumerate(NAMES[:4]):
        mask = torch.from_numpy(np.load(backgrounds / "fg_mask/val" / name / "01.npy")).float()
        front = pixels_of(backgrounds / "original/val" / name / "01.png")
        images = torch.stack([common.normalize(pixels_of(path) * (1 - mask) + front * mask)
                              for path in sorted((backgrounds / "only_bg_t/val").rglob("*.png"))])
        vulnerable.append(bool((logits_of(job, 1000, images).argmax(1) % 40 // 39 != label).any()))
    assert result(tmp_path, "backgrounds_challenge")["vulnerable"] == 100 * sum(vulnerable) / 4


def test_a_foreground_is_safe_only_if_no_background_fools(monkeypatch):
    monkeypatch.setattr(challenge_eval, "right", lambda logits, label: logits[:, 0] > 0)
    backgrounds, mask = torch.zeros(7, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    seen = []

    def model(images):
        seen.append(len(images))
        return images.mean((1, 2, 3))[:, None]
    image = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    assert challenge_eval.is_vulnerable(model, image, mask, 0, backgrounds, 3, "cpu") and seen == [3]  # stops at the first
    backgrounds[:] = 255
    assert not challenge_eval.is_vulnerable(model, image, mask, 0, backgrounds, 3, "cpu")
    backgrounds[6] = 0
    assert challenge_eval.is_vulnerable(model, image, mask, 0, backgrounds, 3, "cpu")
    assert not challenge_eval.is_vulnerable(model, image, mask + 1, 0, backgrounds, 3, "cpu")  # nothing but foreground


def test_what_is_no_mask(tmp_path):
    path = tmp_path / "a.npy"
    for content, message in ((None, "No data left"), (np.zeros((4, 5)), "of shape .4, 5., its image is .4, 4."), (np.full((4, 4), "x"), "no array of numbers")):
        path.write_bytes(b"") if content is None else np.save(path, content)
        with pytest.raises(engine.InputError, match=f"a.npy: .*{message}"):
            challenge_eval.read_mask(path, (4, 4))
    with path.open("wb") as file:
        np.savez(file, mask=np.zeros((4, 4)))
    with pytest.raises(engine.InputError, match="a.npy: .*no array of numbers"):
        challenge_eval.read_mask(path, (4, 4))


# ---------------------------------------------------------------- ImageNet-A

def test_aurra_by_hand():
    assert imagenet_a.aurra(torch.tensor([.8, .6, .9, .7]), torch.tensor([False, False, True, True])) == pytest.approx(0.66667, abs=1e-4)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.2] * 100 + [0.6] * 100 + [0.9] * 100)
    right = torch.tensor([True, False] * 150)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert imagenet_a.calibration_error(confidence[order], right[order], all_bins=False) == pytest.approx(0.18257, abs=1e-5)
    assert imagenet_a.calibration_error(confidence[order], right[order]) == pytest.approx(0.29439, abs=1e-5)
    assert imagenet_a.calibration_error(confidence[:150], right[:150], all_bins=False) is None
    # 250 images: bins of 100 and of the other 150.
    expected = (100 / 250 * .3 ** 2 + 150 / 250 * ((100 * .6 + 50 * .9) / 150 - .5) ** 2) ** 0.5
    assert imagenet_a.calibration_error(confidence[:250], right[:250]) == pytest.approx(expected, abs=1e-5)


def test_classes_are_timms():
    import timm.data
    path = os.path.join(os.path.dirname(timm.data.__file__), "_info/imagenet_a_indices.txt")
    with open(path) as file:
        assert list(imagenet_a.CLASSES) == [int(line) for line in file.read().split()]


def test_imagenet_a_equals_a_plain_loop(job, tmp_path, monkeypatch, capsys):
    names = [f"n{i:08}" for i in range(200)]
    write_images(tmp_path / "imagenet-a", names, 1, (36, 32))
    run_main(monkeypatch, imagenet_a, "--checkpoint", job / "classifier1000.pth", "--data", tmp_path / "imagenet-a", "--output_dir", tmp_path)
    images = common.image_folder(tmp_path / "imagenet-a")
    crops = torch.stack([common.normalize(imagenet_a.v2.functional.pil_to_tensor(common.centre(32)(images.with_transform(lambda i: i)[k][0]))) for k in range(200)])
    p = logits_of(job, 1000, crops)[:, list(imagenet_a.CLASSES)].softmax(1)
    right = p.argmax(1) == torch.arange(200)
    metrics = result(tmp_path, "imagenet_a")
    assert metrics["acc"] == pytest.approx(100 * right.double().mean().item())
    assert metrics["aurra"] == pytest.approx(100 * imagenet_a.aurra(p.max(1).values, right), abs=1e-3)
    with pytest.raises(engine.InputError, match="1 class folders, ImageNet-A has 200"):
        run_main(monkeypatch, imagenet_a, "--checkpoint", job / "classifier1000.pth", "--data", tmp_path)


# ---------------------------------------------------------------- ImageNet-C

def test_means_of_corruptions_by_hand():
    errors = {name: [imagenet_c.ALEXNET.get(name, 0.5)] * 5 for name in imagenet_c.CORRUPTIONS}
    means = imagenet_c.corruption_means(errors)
    assert means["mce"] == pytest.approx(100) and means["mean15"] == pytest.approx(78.899, abs=1e-3)
    assert means["mean19"] == pytest.approx((15 * 78.89937 + 4 * 50) / 19, abs=1e-3)
    errors["fog"] = [0, .1, .2, .3, .4]
    assert imagenet_c.corruption_means(errors)["mce"] == pytest.approx(100 + (20 / .819324 - 100) / 15)
    del errors["saturate"]
    assert imagenet_c.corruption_means(errors)["mean19"] is None and imagenet_c.corruption_means(errors)["mean15"]
    extra = {"speckle_noise": 0.845388, "gaussian_blur": 0.787108, "spatter": 0.717512, "saturate": 0.658248}
    alexnet = {name: [value] for name, value in (imagenet_c.ALEXNET | extra).items()}
    assert imagenet_c.corruption_means(alexnet)["mean19"] == pytest.approx(78.122, abs=1e-3)


def test_imagenet_c_equals_a_plain_loop(job, tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("fog", "snow")):
        for severity in range(1, 6):
            write_images(tmp_path / "c" / name / str(severity), "abc", 2, (32, 32), 10 * seed + severity)
    flags = ["--checkpoint", job / "classifier3.pth", "--data", tmp_path / "c", "--output_dir", tmp_path, "--corruptions"]
    run_main(monkeypatch, imagenet_c, *flags, "fog", "snow")
    errors = result(tmp_path, "imagenet_c")["errors"]
    for name in ("fog", "snow"):
        for severity in range(1, 6):
            wrong = [int(logits_of(job, 3, common.normalize(pixels_of(tmp_path / "c" / name / str(severity) / folder / f"0{i}.png"))[None]).argmax()) != label
                     for label, folder in enumerate("abc") for i in range(2)]
            assert errors[name][severity - 1] == pytest.approx(sum(wrong) / 6)
    assert "fog" in capsys.readouterr().out
    run_main(monkeypatch, imagenet_c, *flags, "fog", "--per_class", "1")
    assert len(imagenet_c.cell_images(tmp_path / "c", "fog", 1, 32, 1)) == 3
    with pytest.raises(engine.InputError, match=r"no folder .*frost/1; expected: .*without the level noise/.*hendrycks/robustness"):
        run_main(monkeypatch, imagenet_c, *flags, "fog", "frost")


# ---------------------------------------------------------------- occlusion and shuffling

def test_drop_counts_and_exact_pixels():
    assert occlusion.drop_counts(196) == [0, 19, 39, 58, 78, 98, 117, 137, 156, 176]
    kept = occlusion.cell_mask([0, 5], (2, 3), 6)
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[:3, :2] = expected[3:, 4:] = False
    assert torch.equal(kept, expected)
    moved = occlusion.cell_mask([0, 5], (2, 3), 6, 1)
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[1:4, 1:3] = expected[4:, 5:] = False
    assert torch.equal(moved, expected)


def test_shuffled_pixels_are_where_the_order_says():
    images, order = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12), [3, 0, 5, 1, 4, 2]
    found = occlusion.shuffled(images, (2, 3), order)
    for place, source in enumerate(order):
        (r, c), (y, x) = divmod(place, 3), divmod(source, 3)
        assert torch.equal(found[..., 4 * r:4 * r + 4, 4 * c:4 * c + 4], images[..., 4 * y:4 * y + 4, 4 * x:4 * x + 4])
    assert torch.equal(occlusion.shuffled(images, (2, 3), range(6)), images)


def test_salient_patches_by_hand():
    attention = torch.tensor([[0.50, 0.20, 0.10, 0.15, 0.05, 0, 0, 0, 0]])
    found = occlusion.Degradations(6, 1, 1, saliency=lambda images: attention)
    images = torch.ones(1, 3, 6, 6)
    versions = dict(zip(found.names, found(images, torch.tensor([0])), strict=True))
    salient, lost = versions["salient", 6]
    assert lost.item() == pytest.approx(2 / 9) and not salient[..., :2, :4].any() and salient.sum() == 3 * (36 - 8)
    rest, lost = versions["non-salient", 6]
    assert lost.item() == pytest.approx(7 / 9) and torch.equal(rest, 1 - salient)
    assert versions["non-salient", 10][1].item() == pytest.approx(4 / 9)  # patches of no attention hold none of it


def test_random_choices_of_groups():
    found = occlusion.Degradations(8, 3, 1, drop=((4, 4), 0), grids=[(2, 2)])
    images, indices = torch.randn(7, 3, 8, 8), torch.arange(7)
    versions = dict(zip(found.names, found(images, indices), strict=True))
    for step, count in enumerate(occlusion.drop_counts(16)):
        degraded, lost = versions["random", step]
        assert lost.tolist() == pytest.approx([count / 16] * 7)
        gone = (degraded == 0).all(1)
        assert (gone.flatten(1).sum(1) == 4 * count).all() and torch.equal(degraded[~gone.unsqueeze(1).expand_as(degraded)], images[~gone.unsqueeze(1).expand_as(images)])
        assert torch.equal(gone[0], gone[3]) and torch.equal(gone[0], gone[6]) and (step in (0, 1) or not torch.equal(gone[0], gone[1]))
    # The same choices however the images are put into batches; others with another seed.
    part = dict(zip(found.names, found(images[2:5], indices[2:5]), strict=True))
    for name, (degraded, _) in versions.items():
        assert torch.equal(part[name][0], degraded[2:5])
    other = dict(zip(found.names, occlusion.Degradations(8, 3, 2, drop=((4, 4), 0))(images, indices), strict=False))
    assert not torch.equal(other["random", 5][0], versions["random", 5][0])


def test_grids():
    def grids(*words, size=224, patch=16):
        args = occlusion.get_args_parser().parse_args(["--pretrained_weights", "c", *words])
        return occlusion.grids_of(args, size, patch)

    figure10 = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (14, 14), (16, 16)]
    assert grids("--shuffle") == (None, figure10) and grids("--shuffle", size=16, patch=4)[1] == figure10[:6] + figure10[7:]
    assert grids("--random_drop") == (((14, 14), 0), []) and grids("--random_drop", "--random_offset_drop")[0] == ((14, 14), 8)
    assert grids("--random_drop", "--shuffle_size", "4", "8") == (((4, 8), 0), [])
    assert grids("--random_drop", "--shuffle", "--shuffle_size", "4", "8") == (((14, 14), 0), [(4, 4), (8, 8)])
    assert grids("--shuffle", "--shuffle_h", "2", "--shuffle_w", "4")[1] == [(2, 4)]


def test_interpolation():
    assert occlusion.at_loss([(80, 10), (20, 70), (40, 50)], 50) == 40 and occlusion.at_loss([(60, 1), (80, 2)], 50) is None


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("val"), "abc", 5)


def test_occlusion_equals_a_plain_loop(job, val, tmp_path, monkeypatch):
    run_main(monkeypatch, occlusion, "--pretrained_weights", job / "classifier3.pth", "--test_data", val, "--random_drop", "--dino",
             "--shuffle", "--shuffle_size", "1", "2", "4", "--batch_size", "4", "--output_dir", tmp_path)
    found, shuffle = (result(tmp_path, name) for name in ("occlusion", "shuffle"))
    images = common.image_folder(val, occlusion.v2.Compose([common.centre(32), occlusion.v2.PILToTensor(), normalize]))
    batch, labels = torch.stack([images[i][0] for i in range(15)]), torch.from_numpy(images.targets)
    clean = 100 * (logits_of(job, 3, batch).argmax(1) == labels).double().mean().item()
    assert found["random"]["0"] == pytest.approx([clean, 0]) and shuffle["1x1"] == pytest.approx(clean)
    assert found["non-salient"]["10"][1] == pytest.approx(0) and found["salient"]["10"][1] == pytest.approx(100)
    attention = nano().get_last_selfattention(batch)[:, 1, 0, 1:]
    kept = ~common.mass_mask(attention, 0.5)
    masks = kept.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert found["S.5"] == pytest.approx(100 * (logits_of(job, 3, batch * masks).argmax(1) == labels).double().mean().item())
    assert found["salient"]["5"][1] == pytest.approx(100 * (1 - kept.double().mean().item()))
    for name in ("occlusion.png", "shuffle.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.getcolors(2**20)) > 20


@pytest.mark.parametrize("words, message", [
    ((), "give --random_drop, --dino or --shuffle"),
    (("--shuffle", "--shuffle_size", "5"), "a grid of 5 cells a side: images of 32 pixels"),
    (("--shuffle", "--shuffle_h", "2"), "as many heights as widths"),
    (("--dino", "--saliency_head", "3"), "there are 3 heads"),
    (("--random_drop", "--test_data", "/nowhere"), "no folder /nowhere; expected: .*validation images .*image-net.org"),
])
def test_mistakes_are_named(job, val, monkeypatch, words, message):
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, occlusion, "--pretrained_weights", job / "classifier3.pth", "--test_data", val, *words)


def test_saliency_of_another_network(job, val, tmp_path, monkeypatch):
    flags = ["--pretrained_weights", job / "classifier3.pth", "--test_data", val, "--dino", "--output_dir", tmp_path]
    run_main(monkeypatch, occlusion, *flags)
    run_main(monkeypatch, occlusion, *flags, "--saliency_from", job / "checkpoint.pth", "--saliency_head", "-1", "--exp_count", "2")
    records = json.loads((tmp_path / "results.json").read_text())
    assert [r["settings"]["seed"] for r in records] == [1, 1, 2]
    assert records[0]["metrics"]["salient"] != records[1]["metrics"]["salient"] == records[2]["metrics"]["salient"]  # nothing random


# ---------------------------------------------------------------- all together

def test_two_processes_equal_one(job, backgrounds, val, digits, tmp_path, call, monkeypatch):
    """All robustness tests and, as it is started once, part-wise probing."""
    write_images(tmp_path / "a", [f"n{i:08}" for i in range(200)], 1, (36, 32))
    for severity in range(1, 6):
        write_images(tmp_path / "c/fog" / str(severity), "abc", 5, (32, 32), severity)
    large, small = (["--checkpoint", job / f"classifier{C}.pth", "--batch_size", "4"] for C in (1000, 3))
    calls = [(in9_eval, [*large, "--data-path", backgrounds]), (challenge_eval, [*large, "--data-path", backgrounds]),
             (imagenet_a, [*large, "--data", tmp_path / "a"]), (imagenet_c, [*small, "--data", tmp_path / "c", "--corruptions", "fog"]),
             (occlusion, ["--pretrained_weights", *small[1:], "--test_data", val, "--random_drop", "--dino", "--shuffle"])]
    part = ["--pretrained_weights", job / "checkpoint.pth", "--data_path", digits, "--topk", "1", "16", "--epochs", "2", "--augment", "false"]
    for script, words in (*calls, (linear_part, [*part, "--batch_size", "40"])):
        run_main(monkeypatch, script, *words, "--output_dir", tmp_path / "1")
    run_in_two_processes(call, tmp_path, [(script, [*words, "--output_dir", tmp_path / "2"])
                                          for script, words in (*calls, (linear_part, [*part, "--batch_size_per_gpu", "20"]))])

    def numbers(value):
        values = value.values() if isinstance(value, dict) else value
        return [n for part in values for n in numbers(part)] if isinstance(value, (dict, list)) else [value]

    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in "12")
    assert [r["protocol"] for r in one] == [r["protocol"] for r in two] == [
        "imagenet9", "backgrounds_challenge", "imagenet_a", "imagenet_c", "occlusion", "shuffle", "linear_part", "linear_part"]
    for a, b in zip(one[6:], two[6:], strict=True):
        assert a["metrics"]["best"]["top1"] == pytest.approx(b["metrics"]["best"]["top1"], abs=2.5)  # an image of 41
        a, b = (torch.load(tmp_path / n / f"top{r['settings']['topk']}/checkpoint_teacher_linear_last.pth")["state_dict"]
                for n, r in (("1", a), ("2", b)))
        for name in ("0.module.linear.weight", "9.module.linear.weight", "9.module.linear.bias"):  # large rates diverge
            torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
    for a, b in zip(one[:6], two[:6], strict=True):
        assert a["settings"] == b["settings"] and a["metrics"].keys() == b["metrics"].keys()
        assert numbers(b["metrics"]) == pytest.approx(numbers(a["metrics"]), abs=1e-3)


def test_table(tmp_path, monkeypatch, capsys):
    records = [{"protocol": "imagenet9", "metrics": {"only_fg": 1.0, "original": 8.0}}, {"protocol": "imagenet_a", "metrics": {"acc": 11.0}},
               {"protocol": "occlusion", "metrics": {"S.5": 9.0, "NS.5": 10.0, "random": {"0": [13.0, 0.0]}}},
               {"protocol": "occlusion", "metrics": {"shuffle": {}}}, {"protocol": "imagenet_c", "metrics": {"mean19": 12.0}},
               {"protocol": "imagenet9", "metrics": {"only_fg": 2.0}}]
    for record in records:
        append_result(tmp_path, record["protocol"], "c.pth", "state_dict", {}, record["metrics"])
    append_result(tmp_path, "linear", "checkpoint.pth", "teacher", {}, {})  # no test of a classifier
    assert table8.table_row(records) == [2.0, None, None, None, None, None, None, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0]
    with pytest.raises(engine.InputError, match="results.json: no results"):
        monkeypatch.setattr(sys, "argv", ["", "--output_dir", str(tmp_path / "none")])
        table8.main()
    monkeypatch.setattr(sys, "argv", ["", "--output_dir", str(tmp_path)])
    table8.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["DINO", "89.2", "89.2"] and lines[3].split() == ["here", "2.0", *"------", "8.0", "9.0", "10.0", "11.0", "12.0", "13.0"]

    # Another classifier: nothing of the one before is in its row.
    append_result(tmp_path, "imagenet_a", "other.pth", "state_dict", {}, {"acc": 14.0})
    table8.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["here", *"-" * 10, "14.0", "-", "-"] and lines[4] == "here: other.pth"


def test_one_command_names_what_is_missing(job, tmp_path):
    """Nothing is there but the validation images' folder: every test says what it needs, the table still comes."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@" >>"$LOG"\ncase $1 in *in9_eval*) exit 1;; esac\n')
    fake.chmod(0o755)
    run = subprocess.run([ROOT / "analysis/robustness.sh", "c.pth", "out", "--num_workers", "0"], capture_output=True, text=True,
                         env={**os.environ, "PYTHON": str(fake), "LOG": str(tmp_path / "log")})
    lines = (tmp_path / "log").read_text().splitlines()
    assert run.returncode == 1 and run.stderr.strip() == "robustness.sh: failed: backgrounds_challenge/in9_eval.py"
    assert [line.split()[0].removeprefix(f"{ROOT}/analysis/") for line in lines] == [
        "backgrounds_challenge/in9_eval.py", "natural_adv_examples/eval.py", "corruptions_surf_variations/eval.py", "occlusion/eval.py", "table8.py"]
    assert all(line.endswith("--num_workers 0") for line in lines[:4])
    assert subprocess.run([ROOT / "analysis/robustness.sh"], capture_output=True).returncode == 2


@pytest.mark.parametrize("name, scripts", [
    ("eval_bg_challenge", ["backgrounds_challenge/in9_eval.py", "backgrounds_challenge/challenge_eval.py"]),
    ("eval_natural_adv_examp", ["natural_adv_examples/eval.py"]), ("eval_corr_surf_vari", ["corruptions_surf_variations/eval.py"]),
    ("eval_occlusion", ["occlusion/eval.py"]), ("eval_shuffle", ["occlusion/eval.py"]),
    ("visualize_attn_map", ["attention_map/visualize_attention.py"]), ("visualize_corresp", ["correspondence/visualize_correspondence.py"])])
def test_wrappers_of_the_reference(tmp_path, name, scripts):
    """Called from anywhere, with a CHECKPOINT or a flag of one's own."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@" >>"$LOG"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), "LOG": str(tmp_path / "log"), "CHECKPOINT": "c.pth"}
    subprocess.run([ROOT / f"analysis/{name}.sh", "--batch_size", "7"], check=True, cwd=tmp_path, env=env)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0].removeprefix(f"{ROOT}/analysis/") for line in lines] == scripts
    for line in lines:
        assert line.endswith("--batch_size 7") and ("data/" in line)
        assert ("--checkpoint c.pth" in line) == (name in ("eval_bg_challenge", "eval_natural_adv_examp", "eval_corr_surf_vari"))


def test_both_background_tests_take_the_flags_of_the_wrapper(job, backgrounds, monkeypatch, capsys):
    """README: `--foregrounds N` may follow eval_bg_challenge.sh, which gives its flags to both."""
    for script, expected in ((in9_eval, "no_fg: "), (challenge_eval, "% of 2; ")):
        run_main(monkeypatch, script, "--checkpoint", job / "classifier1000.pth", "--data-path", backgrounds, "--foregrounds", "2", "--eval-dataset", "no_fg")
        text = capsys.readouterr().out
        assert expected in text and "original: " not in text
