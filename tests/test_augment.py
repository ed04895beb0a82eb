"""Augmentation by flags and presets, statistics of the pixels from training to evaluation, the picture of the crops."""
import argparse
import copy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed, multiprocessing

import engine
import extract_backbone_weights
import loader
import main_ibot
import pictures
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import eval_transform, image_sets
from evaluation.common.features import frozen_features, pool_features
from evaluation.common.linear import AugmentedImages
from images import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, ImageFolderInstance, PixelStats, folder_stats, stored_pixel_stats

TINY = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size", "16", "--device", "cpu",
        "--local_crops_number", "2", "--out_dim", "32", "--patch_out_dim", "32", "--head_hidden_dim", "32", "--num_workers", "0",
        "--batch_size_per_gpu", "16", "--warmup_epochs", "0", "--warmup_teacher_temp_epochs", "0", "--epochs", "1"]
AUTO = ["--augment", "overhead", "--hflip", "0", "--blur", "0.5", "0.25", "0", "--pixel_stats", "auto"]


def parse(*words):
    return main_ibot.get_args_parser().parse_args([*TINY, *map(str, words)])


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """(flags, folder) of a run with flags of its own; `data/` in the folder are its images."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(digits / "train", folder / "data")
    words = [*AUTO, "--data_path", folder / "data", "--output_dir", folder / "out"]
    args = parse(*words)
    before = copy.deepcopy(args)
    main_ibot.train_ibot(args)
    assert args == before  # only read
    return words, folder


def args_of(folder):
    return engine.load_checkpoint(folder / "out/checkpoint.pth")["args"]


def plain_stats(data):
    """Mean and standard deviation of all pixels of grey images of one size."""
    pixels = np.stack([np.asarray(Image.open(path).convert("L")) for path in data.rglob("*.png")]) / 255
    return pixels.mean(), pixels.std()


def test_a_run_keeps_what_it_used(run):
    args = args_of(run[1])
    assert (args.augment, args.hflip, args.vflip, args.rotate90, args.grayscale) == ("overhead", 0.0, 0.5, 1.0, 0.1)
    assert args.color_jitter == [0.8, 0.4, 0.4, 0.2, 0.05] and args.solarize == [0.0, 0.0, 0.0] and args.blur == [0.5, 0.25, 0.0]
    mean, std = plain_stats(run[1] / "data")
    assert args.mean == pytest.approx([mean] * 3, abs=1e-4) and args.std == pytest.approx([std] * 3, abs=1e-4)


def test_resuming_takes_the_statistics_of_the_checkpoint(run, tmp_path, capsys):
    words, before = run
    folder = tmp_path / "copy"
    shutil.copytree(before, folder)
    for path in (folder / "data").rglob("*.png"):
        Image.new("L", (32, 32), 7).save(path)
    (folder / "out/crops.png").write_bytes(b"of the beginning")
    words = [*AUTO, "--data_path", folder / "data", "--output_dir", folder / "out", "--epochs", 2]
    main_ibot.train_ibot(parse(*words, "--load_from", "auto"))
    assert args_of(folder).mean == args_of(before).mean and args_of(folder).epochs == 2
    assert "note: --mean" not in capsys.readouterr().out
    assert (folder / "out/crops.png").read_bytes() == b"of the beginning"
    main_ibot.train_ibot(parse(*words, "--load_from", "auto", "--epochs", 3, "--pixel_stats", "imagenet"))
    assert "note: --mean is [0.485, 0.456, 0.406], the checkpoint's run had" in capsys.readouterr().out
    with pytest.raises(engine.InputError, match="--pixel_stats auto: the images of .* have no spread"):
        main_ibot.train_ibot(parse(*words, "--overwrite", "true"))


def test_evaluations_and_extracted_files_have_them_too(run, digits, tmp_path, monkeypatch, capsys):
    folder = run[1]
    stats = PixelStats(tuple(args_of(folder).mean), tuple(args_of(folder).std))
    files = [folder / "out/checkpoint.pth"]
    for name in ("a.pth", "b.safetensors"):
        files.append(tmp_path / name)
        monkeypatch.setattr(sys, "argv", ["extract", str(files[0]), str(files[-1]), "--checkpoint_key", "teacher"])
        extract_backbone_weights.main()
        assert f"images are normalised with {stats}" in capsys.readouterr().out
    backbones = [load_evaluated_backbone(file, key, "vit_nano", 8, image_size=32)
                 for file, key in zip(files, ("teacher", "state_dict", "any"), strict=True)]
    assert capsys.readouterr().out.count(f"normalised with {stats}") == 3
    assert {backbone.pixel_stats for backbone in backbones} == {stats} and len({b.weights_hash for b in backbones}) == 1
    # timm's names in a .pth file are {name: tensor}, with no room for more.
    monkeypatch.setattr(sys, "argv", ["extract", str(files[0]), str(tmp_path / "c.pth"), "--checkpoint_key", "teacher",
                                      "--format", "timm"])
    extract_backbone_weights.main()
    other = load_evaluated_backbone(tmp_path / "c.pth", "any", "vit_nano", 8, image_size=32)
    assert other.pixel_stats == IMAGENET and "normalised with ImageNet's statistics" in capsys.readouterr().out

    images, process = image_sets("imagefolder", digits)[1], engine.Process(0, 1, 0, torch.device("cpu"))
    features, _ = frozen_features(backbones[0], images, process, num_workers=0, dump_to=tmp_path / "kept")
    pixels = torch.stack([image for image, _, _ in images.with_transform(eval_transform(32, lambda x: x / 255))])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats)
    with torch.inference_mode():
        assert (pool_features(backbones[0].model, (pixels - mean) / std) - features).abs().max() < 1e-4
    (tmp_path / "kept").rename(tmp_path / "given")
    for backbone, words in ((backbones[1], "other"), (other, "other pixel statistics")):
        kept = next((tmp_path / "given").glob("*.pth"))  # named by key
        shutil.copy(kept, kept.with_name(kept.name.replace("teacher", backbone.key)))
        again, _ = frozen_features(backbone, images, process, num_workers=0, load_from=tmp_path / "given")
        assert (words in capsys.readouterr().out) == (backbone is other)
        assert torch.equal(again, features) == (backbone is not other)


@pytest.mark.parametrize(("stored", "words"), [
    ({"mean": [0.5, 0.5]}, "its mean takes three numbers"), ({"mean": [0.5] * 3, "std": [0.0] * 3}, "its std takes three"),
    ({"mean": [0.5] * 3, "std": [float("nan")] * 3}, "its std takes"), ({"mean": [0.5] * 3}, "its std takes"),
    ({"mean": ["a"] * 3, "std": [1.0] * 3}, "its mean takes"), ({}, None),
])
def test_statistics_of_foreign_files(stored, words):
    checkpoint = {"args": argparse.Namespace(**stored)}
    if words is None:
        assert stored_pixel_stats(checkpoint, "file.pth") == IMAGENET
        return
    with pytest.raises(engine.InputError, match=f"^checkpoint file.pth: {words}"):
        stored_pixel_stats(checkpoint, "file.pth")


@pytest.mark.parametrize(("words", "message"), [
    (("--hflip", 2), "--hflip must lie in 0..1"), (("--vflip", -1), "--vflip"), (("--rotate90", "nan"), "--rotate90"),
    (("--grayscale", 1.1), "--grayscale"), (("--color_jitter", 0.8), "--color_jitter takes 5 numbers .P B C S H., not 1"),
    (("--blur", 1, 0.1), "--blur takes 3 numbers"), (("--solarize", 0, 2, 0), "--solarize must lie in 0..1: 0.0 2.0 0.0"),
    (("--mean", 0.5, 0.5, 0.5), "--mean and --std go together"), (("--mean", 0.5, "--std", 1, 1, 1), "--mean takes three"),
    (("--mean", 0, 0, 0, "--std", 1, 1, 0), "--std takes three"), (("--std", 1, 1, 1), "--mean and --std"),
    (("--mean", 0, 0, 0, "--std", 1, 1, 1, "--pixel_stats", "auto"), "--pixel_stats auto and --mean"),
])
def test_bad_numbers_name_their_flag(words, message, digits, tmp_path):
    with pytest.raises(engine.InputError, match=message) as caught:
        main_ibot.check_args(parse("--data_path", digits / "train", "--output_dir", tmp_path / "out", *words))
    assert "\n" not in str(caught.value)


def test_given_statistics_reach_the_network(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(main_ibot, "train_step", lambda batches, *args, **kwargs: seen.append(next(batches)) or 1 / 0)
    for words in ((), ("--mean", 0, 0, 0, "--std", 1, 1, 1)):
        with pytest.raises(ZeroDivisionError):
            main_ibot.train_ibot(parse("--data_path", digits / "train", "--output_dir", tmp_path / "out", "--overwrite", "true",
                                       *words))
    first, plain = (batch.global_crops for batch in seen)
    assert plain.min() >= 0 and plain.max() <= 1
    torch.testing.assert_close(first, (plain - torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
                               / torch.tensor(IMAGENET_STD).view(3, 1, 1), rtol=1e-4, atol=1e-5)


def stats_of(rank, folder, out):
    distributed.init_process_group("gloo", init_method=f"file://{out}/meet", world_size=2, rank=rank)
    dataset = ImageFolderInstance(folder)
    if rank:
        dataset.loader = None  # process 0 alone looks at the images
    torch.save(folder_stats(dataset, torch.device("cpu"), count=50), f"{out}/{rank}.pth")
    distributed.destroy_process_group()


def test_statistics_are_the_same_on_all_processes(digits, tmp_path):
    folder = shutil.copytree(digits / "train", tmp_path / "data")
    dataset = ImageFolderInstance(folder)
    places = np.linspace(0, 119, 50).round().astype(int)
    pixels = np.stack([np.asarray(Image.open(dataset.samples[i][0])) for i in places[1:]]) / 255
    (tmp_path / "data/0").joinpath(dataset.samples[0][0]).write_bytes(b"no image")  # left out
    multiprocessing.start_processes(stats_of, (str(folder), str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1))
    assert first == second
    assert first.mean == pytest.approx([pixels.mean()] * 3, abs=1e-4) and first.std == pytest.approx([pixels.std()] * 3, abs=1e-4)


def test_crops_of_the_first_batch_are_drawn(run, tmp_path, monkeypatch):
    words, folder = run
    picture = np.asarray(Image.open(folder / "out/crops.png"))
    step = pictures.TILE + pictures.GAP
    assert picture.shape == (pictures.TITLE + pictures.GAP + 6 * step, pictures.GAP + 5 * step, 3)
    seen = []
    monkeypatch.setattr(loader, "device_batches", lambda data, *rest: seen.append(next(iter(data))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main_ibot.train_ibot(parse(*words, "--output_dir", tmp_path / "again"))
    batch = seen[0]
    for row in range(6):
        for column in range(4):
            crop = (batch.global_crops[column] if column < 2 else batch.local_crops[column - 2])[row].permute(1, 2, 0).numpy().copy()
            if column < 2:
                crop[np.kron(batch.masks[column, row].numpy(), np.ones((8, 8), bool))] = 128
            y, x = pictures.TITLE + pictures.GAP + row * step, pictures.GAP + (column + 1) * step
            tile = picture[y:y + pictures.TILE, x:x + pictures.TILE]
            assert np.array_equal(tile, np.asarray(pictures.fit(Image.fromarray(crop), pictures.TILE))), (row, column)


def test_drawing_crops_disturbs_no_draw(run, tmp_path, monkeypatch):
    words, folder = run
    monkeypatch.setattr(pictures, "write_crops", lambda *_: None)
    main_ibot.train_ibot(parse(*words, "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out/crops.png").exists()
    first, other = (engine.load_checkpoint(f / "out/checkpoint.pth") for f in (folder, tmp_path))
    assert all(torch.equal(other["student"][key], value) for key, value in first["student"].items())
    assert torch.equal(other["progress"]["random"][0], first["progress"]["random"][0])


def test_crops_on_a_full_disk_are_a_warning(digits, tmp_path, capsys, file_limit):
    augmentation = loader.MultiCropAugmentation(global_crops_size=32, local_crops_number=1, local_crops_size=16)
    file_limit(1000)
    pictures.write_crops(loader.ImageFolderMask(str(digits / "train"), augmentation, 8, 0.3), range(3), True, tmp_path)
    assert f"warning: {tmp_path / 'crops.png'} cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_device_is_left_to_do_is_drawn(digits, tmp_path):
    for where in ("cpu", "device"):
        augmentation = loader.MultiCropAugmentation(global_crops_size=32, local_crops_number=1, local_crops_size=16,
                                                    photometry=where)
        dataset = loader.ImageFolderMask(str(digits / "train"), augmentation, 8, 0.3)
        (tmp_path / where).mkdir()
        pictures.write_crops(dataset, range(3), True, tmp_path / where)
    first, second = (np.asarray(Image.open(tmp_path / where / "crops.png")).astype(int) for where in ("cpu", "device"))
    assert first.shape == second.shape and np.abs(first - second).max() <= 1


@pytest.mark.parametrize("hflip", [0, 1])
def test_probes_flip_as_asked(digits, hflip):
    images = image_sets("imagefolder", digits)[0]
    never, asked = (AugmentedImages(images, 32, 0, p) for p in (0, hflip))
    for index in range(5):
        one, two = never[0, index][0], asked[0, index][0]
        assert torch.equal(two, one.flip(2) if hflip else one)
