import itertools
import pickle
import random
import traceback
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

import augmentation
import images
import loader
from benchmarks.data_loader import crop_moments, plain_mask
from engine import InputError, bad_files

SMALL = {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1}


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """As in a loader worker; small operations are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photo(height=48, width=64, seed=0):
    """A smooth colour image with some noise, PIL RGB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-15, 16, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes of four images each."""
    for index in range(8):
        path = tmp_path / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        photo(seed=index).save(path)
    return tmp_path


def masked_folder(root, **options):
    options = {"transform": loader.MultiCropAugmentation(**SMALL), "patch_size": 4, "pred_ratio": [0, 0.3],
               "pred_ratio_var": [0, 0.2]} | options
    return loader.ImageFolderMask(str(root), **options)


def batches(dataset, workers=0, epochs=1, **options):
    """All batches of some epochs; one loader, so its workers persist."""
    data_loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=loader.collate,
                             persistent_workers=workers > 0, **options)
    out = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        out += list(data_loader)
    return out


def equal(a, b):
    """Whether two lists of batches are the same in every tensor."""
    pairs = [pair for p, q in zip(a, b, strict=True) for pair in zip(p, q, strict=True)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- masks

def test_drawn_ratios_follow_the_recipe():
    rng = np.random.default_rng(0)
    drawn = np.array([loader.draw_ratio([0, 0.3], [0, 0.2], rng) for _ in range(10_000)])
    positive = drawn[drawn > 0]
    assert abs(len(positive) / len(drawn) - 0.5) < 0.02  # 4 standard errors
    assert 0.1 <= positive.min() < 0.11 and 0.49 < positive.max() <= 0.5
    assert abs(positive.mean() - 0.3) < 0.01
    assert np.histogram(positive, 4, (0.1, 0.5))[0].min() > 0.22 * len(positive)  # uniform


def test_block_masks_over_ten_thousand_draws():
    rng = np.random.default_rng(0)
    ratios, covered = [], []
    for _ in range(10_000):
        ratio = loader.draw_ratio([0, 0.3], [0, 0.2], rng)
        mask = loader.block_mask(14, 14, ratio, rng)
        assert mask.shape == (14, 14) and mask.dtype == bool
        assert mask.sum() <= ratio * 196
        ratios.append(ratio)
        covered.append(mask.mean())
    ratios, covered = np.array(ratios), np.array(covered)
    assert np.array_equal(covered == 0, ratios == 0)
    assert abs((covered == 0).mean() - 0.5) < 0.02
    assert covered.max() <= 0.5 and covered[covered > 0].min() > 0.05
    # A mask ends short of its target by the fraction of a cell and where ten attempts fail.
    assert 0 <= (ratios - covered).mean() < 0.01
    assert abs(covered.mean() - 0.15) < 0.01


@pytest.mark.parametrize(("size", "ratio"), [(14, 0.1), (14, 0.3), (14, 0.5), (7, 0.3)])
def test_block_masks_have_the_plain_algorithms_distribution(size, ratio):
    def statistics(draw):
        masks = np.stack([draw() for _ in range(1500)]).astype(float)
        edges = np.abs(np.diff(masks, axis=1)).sum((1, 2)) + np.abs(np.diff(masks, axis=2)).sum((1, 2))
        return masks.mean((1, 2)), edges, masks[:, 0].mean(1), masks[:, size // 2, size // 2]

    rng, plain = np.random.default_rng(1), random.Random(1)
    ours = statistics(lambda: loader.block_mask(size, size, ratio, rng))
    theirs = statistics(lambda: plain_mask(size, size, ratio, plain))
    # Means of cover, length of edges, first row and centre, within 5 standard errors.
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a.mean() - b.mean()) <= 5 * np.sqrt((a.var() + b.var()) / 1500)


def test_a_block_mask_is_made_of_rectangles():
    rng = np.random.default_rng(0)
    compact = 0
    for _ in range(200):
        mask = loader.block_mask(14, 14, 0.3, rng)
        padded = np.pad(mask, 1).astype(int)
        neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        compact += neighbours[mask].mean()
    assert compact / 200 > 2.8  # a random mask of this ratio has 1.1


def test_block_mask_without_room_ends():
    rng = np.random.default_rng(0)
    assert loader.block_mask(1, 1, 1.0, rng).sum() == 0
    assert loader.block_mask(14, 14, 0, rng).sum() == 0
    assert loader.block_mask(14, 14, 1.0, rng).mean() > 0.8
    assert loader.block_mask(7, 9, 0.4, rng).shape == (7, 9)


@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.77, 1])
def test_random_masks_are_exact(ratio):
    rng = np.random.default_rng(0)
    masks = np.stack([loader.random_mask(14, 10, ratio, rng) for _ in range(300)])
    assert (masks.sum((1, 2)) == int(ratio * 140)).all()
    if 0 < ratio < 1:
        assert len({mask.tobytes() for mask in masks}) == 300
        assert np.abs(masks.mean(0) - ratio).max() < 0.15  # no cell is preferred


def test_masks_start_at_their_epoch_and_differ_by_epoch_and_crop(folder):
    dataset = masked_folder(folder, pred_ratio=0.5, pred_ratio_var=0, pred_shape="rand", pred_start_epoch=2)
    dataset.set_epoch(1)
    assert not any(mask.any() for index in range(8) for mask in dataset[index][2])
    dataset.set_epoch(2)
    crops, label, masks = dataset[4]
    assert label == 1 and [tuple(crop.shape) for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)]
    assert [mask.shape for mask in masks] == [(8, 8)] * 2 and all(mask.sum() == 32 for mask in masks)
    assert (masks[0] != masks[1]).any()
    dataset.set_epoch(3)
    assert (dataset[4][2][0] != masks[0]).any()


def test_one_variance_serves_all_ratios(folder):
    dataset = masked_folder(folder, pred_ratio=(0.3, 0.4), pred_ratio_var=[0.1])
    assert dataset.pred_ratio_var == [0.1, 0.1]


@pytest.mark.parametrize(("options", "words"), [
    ({"pred_ratio": [0, 0.3], "pred_ratio_var": [0, 0.1, 0.2]}, "pred_ratio_var"),
    ({"pred_ratio": 0.3, "pred_ratio_var": [0, 0.1]}, "pred_ratio_var"),
    ({"pred_ratio": [0, 0.3], "pred_ratio_var": [0, 0.4]}, "0.3 is below its --pred_ratio_var 0.4"),
    ({"pred_ratio": [0, 0.3], "pred_ratio_var": 0.2}, "0 is below its --pred_ratio_var 0.2"),
    ({"pred_ratio": 30, "pred_ratio_var": 0}, "pred_ratio 30"),
    ({"pred_shape": "blob"}, "blob"),
    ({"on_bad_image": "hide"}, "hide"),
    ({"seed": -1}, "seed -1"),
])
def test_bad_options_are_named(folder, options, words):
    with pytest.raises(InputError, match=words):
        masked_folder(folder, **options)


# ---------------------------------------------------------------- random streams

@pytest.mark.parametrize(("context", "photometry"), [("fork", "cpu"), ("spawn", "cpu"), ("fork", "device")])
def test_workers_give_the_same_batches_epoch_by_epoch(folder, context, photometry):
    options = {"transform": loader.MultiCropAugmentation(**SMALL, photometry=photometry)}
    alone = batches(masked_folder(folder, **options), workers=0, epochs=2)
    workers = batches(masked_folder(folder, **options), workers=2, epochs=2, multiprocessing_context=context)
    assert (alone[0].photometry is None) == (photometry == "cpu")
    assert equal(alone, workers)
    assert not equal(alone[:2], alone[2:])  # set_epoch


def test_a_sample_depends_on_seed_epoch_and_index_only(folder):
    dataset = masked_folder(folder)
    first = dataset[0]
    random.seed(1), np.random.seed(1), torch.manual_seed(1), dataset[5]
    again = dataset[0]
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert all((a == b).all() for a, b in zip(first[2], again[2], strict=True))
    other_seed = masked_folder(folder, seed=1)[0]
    assert not torch.equal(first[0][0], other_seed[0][0])
    dataset.set_epoch(1)
    assert not torch.equal(first[0][0], dataset[0][0][0])


def test_generators_of_the_caller_stay_as_they_are(folder):
    dataset = masked_folder(folder)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    dataset[0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and (states[2] == np.random.get_state()[1]).all()


def test_any_transform_to_a_list_may_be_used(folder):
    cut = transforms.Compose([transforms.RandomCrop(24), transforms.ToTensor()])
    dataset = masked_folder(folder, transform=lambda image: [cut(image), cut(image), cut(image)], patch_size=8)
    crops, _, masks = dataset[-1]
    assert len(crops) == 3 and [mask.shape for mask in masks] == [(3, 3)] * 3
    assert torch.equal(crops[0], dataset[7][0][0])


# ---------------------------------------------------------------- image files

def test_odd_images_load_as_rgb(tmp_path):
    rgb = photo()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 1), dtype=np.uint8)
    with_alpha = Image.fromarray(np.concatenate([np.asarray(rgb), noise], axis=2))
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    cases = {
        "rgb.png": (rgb, {}, rgb),
        "grey.png": (rgb.convert("L"), {}, rgb.convert("L").convert("RGB")),
        "bits.png": (rgb.convert("1"), {}, rgb.convert("1").convert("RGB")),
        "grey_alpha.png": (with_alpha.convert("LA"), {}, rgb.convert("L").convert("RGB")),
        "alpha.png": (with_alpha, {}, rgb),
        "palette.png": (palette, {}, palette.convert("RGB")),
        "palette_alpha.png": (palette, {"transparency": bytes(range(16))}, palette.convert("RGB")),
        "cmyk.tif": (rgb.convert("CMYK"), {}, rgb.convert("CMYK").convert("RGB")),
        "one.png": (rgb.crop((0, 0, 1, 1)), {}, rgb.crop((0, 0, 1, 1))),
        "rotated.png": (rgb, {"exif": exif}, rgb),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ResourceWarning of an open file, Pillow's on palettes
        for name, (image, options, expected) in cases.items():
            image.save(tmp_path / name, **options)
            loaded = images.load_rgb(tmp_path / name)
            assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(expected)), name
    assert len(loader.MultiCropAugmentation(**SMALL)(images.load_rgb(tmp_path / "one.png"))) == 3


def test_16_bit_images_keep_their_grey_levels(tmp_path):
    levels = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "b.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "b.tif", "a.pgm"):
        loaded = np.asarray(images.load_rgb(tmp_path / name))
        assert np.abs(loaded - levels[..., None] / 257).max() <= 0.5, name


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    photo().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[40:60] = bytes(20)
    (tmp_path / "damaged.png").write_bytes(damaged)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("text.png", "empty.jpg", "cut.png", "damaged.png", "float.tif", "missing.png"):
        with pytest.raises(images.BadImage, match=name) as caught:
            images.load_rgb(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name in str(pickle.loads(pickle.dumps(caught.value)))


def test_bad_images_are_skipped_once_and_listed(folder, monkeypatch):
    for name in ("class0/0.png", "class1/5.png"):
        (folder / name).write_bytes(b"no image")
    dataset = masked_folder(folder)
    bad = [path for path, _ in dataset.samples if path.endswith(("0.png", "5.png"))]
    alone = batches(dataset)
    assert bad_files(dataset) == bad and sum(len(batch.labels) for batch in alone) == 8

    decoded = []
    monkeypatch.setattr(dataset, "loader", lambda path: decoded.append(path) or images.load_rgb(path))
    assert equal(batches(dataset), alone)  # a known bad file has the same substitute
    assert len(decoded) == 8 and not set(decoded) & set(bad)

    with_workers = masked_folder(folder)
    assert equal(batches(with_workers, workers=2), alone)
    assert bad_files(with_workers) == bad  # what workers found, seen here


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_can_be_errors(folder, workers):
    (folder / "class0/0.png").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        batches(masked_folder(folder, on_bad_image="error"), workers)
    assert "class0/0.png" in str(caught.value).strip().splitlines()[-1]
    traceback.clear_frames(caught.tb)  # ends the workers; the garbage collector would wait ten seconds for them


def test_too_many_bad_images_end_the_run(folder):
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="100 bad images in a row"):
        masked_folder(folder)[0]


def test_image_folder_instance(folder):
    dataset = images.ImageFolderInstance(str(folder), transform=lambda image: (image.mode, image.size))
    assert dataset[5] == (("RGB", (64, 48)), 1, 5)
    (folder / "class0/0.png").write_bytes(b"no image")
    with pytest.raises(images.BadImage, match="0.png"):
        dataset[0]


@pytest.mark.parametrize("build", [images.ImageFolderInstance, masked_folder])
def test_folder_errors(tmp_path, build):
    def message(path):
        with pytest.raises(InputError) as caught:
            build(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in message(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in message(tmp_path / "file")
    (tmp_path / "root").mkdir()
    if build is masked_folder:
        assert "no image (.jpg, .jpeg, " in message(tmp_path / "root")
        return
    assert "no class folders" in message(tmp_path / "root")
    photo().save(tmp_path / "root/flat.png")
    assert "move the images into a sub-folder" in message(tmp_path / "root")


def test_class_folders_without_images_are_named(folder):
    (folder / "void").mkdir()
    (folder / "void/notes.txt").write_text("")
    with pytest.raises(InputError, match="class folder void"):
        images.ImageFolderInstance(str(folder))


# ---------------------------------------------------------------- augmentation

def test_defaults_draw_what_they_always_drew(folder):
    """Recorded before the augmentation had flags; but for the blur at borders and its rounding the crops stay too."""
    golden = np.load(Path(__file__).parent / "data/loader_draws.npz")
    torch.manual_seed(0)
    several = multi_crop(global_crops_number=3)
    boxes, turns, rows = zip(*(several.draw(64, 48) for _ in range(8)), strict=True)
    assert np.array_equal(boxes, golden["boxes"])
    assert np.array_equal(np.array(turns)[..., 0], golden["flips"]) and not np.array(turns)[..., 1:].any()
    rows = torch.stack(rows).double().numpy()
    assert np.array_equal(rows[..., :10].astype(np.float32), golden["rows"])
    assert np.sqrt(6 * rows[..., 10:] @ np.arange(3) ** 2) == pytest.approx(golden["sigma"], abs=1e-3)
    for where in ("cpu", "device"):
        dataset = masked_folder(folder, transform=multi_crop(photometry=where))
        dataset.set_epoch(3)
        for place, (crops, _, masks, *_) in enumerate(map(dataset.__getitem__, (0, 5))):
            assert np.array_equal(masks, golden["masks"][place])
            for crop, then in zip(crops, [*golden[f"{where}_global"][place], golden[f"{where}_local"][place]], strict=True):
                difference = np.abs(crop.numpy().astype(int) - then)
                assert difference.max() == 0 if where == "device" else difference[:, 6:-6, 6:-6].max() <= 3


def test_turns_and_colours_follow_their_numbers():
    torch.manual_seed(0)
    augment = augmentation.Augment(0.3, 0.6, 0.8, (0.5, 0.1, 0.2, 0.3, 0.4), 0.7, (0.2, 0.4, 0.6), (0.7, 0.5, 0.3))
    _, turns, rows = zip(*(multi_crop(augment=augment).draw(64, 48) for _ in range(2000)), strict=True)
    turns, rows = torch.tensor(turns).float(), torch.stack(rows)  # [2000, 3, 3], [2000, 3, 13]
    for position in range(3):
        flip, down, quarters = turns[:, position].T
        order, factors, grey, solarize, taps = rows[:, position].split(loader.ROW, dim=1)
        jittered = (factors - (order != loader.HUE).float() != 0).any(1).float()
        found = [flip, down, *(quarters == k for k in range(4)), grey, solarize, taps[:, 0] < 1, jittered]
        wanted = [0.3, 0.6, 0.4, 0.2, 0.2, 0.2, 0.7, augment.solarize[position], augment.blur[position], 0.5]
        assert torch.stack([x.float().mean() for x in found]) == pytest.approx(torch.tensor(wanted), abs=0.045)
        assert abs(np.corrcoef([flip, down, quarters, grey[:, 0]]) - np.eye(4)).max() < 0.1
        changes = torch.empty(2000, 4).scatter(1, order.long(), factors) - torch.tensor([1.0, 1.0, 1.0, 0.0])
        assert changes.abs().amax(0) == pytest.approx(torch.tensor([0.1, 0.2, 0.3, 0.4]), rel=0.02)


@pytest.mark.parametrize(("change", "words"), [
    ({"hflip": 1.5}, "--hflip must lie in 0..1: 1.5"), ({"grayscale": float("nan")}, "--grayscale must"),
    ({"blur": (1.0, 0.5)}, "--blur takes 3 numbers"), ({"solarize": (0, 0, -1)}, "--solarize must lie"),
    ({"color_jitter": (0.8,)}, "--color_jitter takes 5 numbers"), ({"color_jitter": (1, 1, 1, 1, 0.6)}, "hue, must lie in 0..0.5"),
])
def test_impossible_augmentations_are_named(change, words):
    with pytest.raises(InputError, match=words) as caught:
        multi_crop(augment=augmentation.Augment()._replace(**change))
    assert "\n" not in str(caught.value)


def test_crop_order_sizes_and_types():
    crop = loader.MultiCropAugmentation(3, (0.25, 1), 4, (0.05, 0.25), 28, 12)
    crops = crop(photo())
    assert [tuple(crop.shape) for crop in crops] == [(3, 28, 28)] * 3 + [(3, 12, 12)] * 4
    assert all(crop.dtype == torch.uint8 for crop in crops)


def multi_crop(**options):
    return loader.MultiCropAugmentation(**SMALL | options)


def test_where_the_photometry_happens_must_be_known():
    with pytest.raises(InputError, match="gpu"):
        multi_crop(photometry="gpu")


def photometry_rows(n, blur_p=0.5, solarize_p=0.2, seed=0):
    uniform = np.random.default_rng(seed).random((n, loader.ROW_DRAWS))
    return torch.from_numpy(loader.draw_photometry(uniform, np.full(n, blur_p), np.full(n, solarize_p)))


def row(order=(0, 1, 2, 3), brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=0, solarize=0, sigma=0.0):
    factors = [(brightness, contrast, saturation, hue)[operation] for operation in order]
    return torch.tensor([*order, *factors, grey, solarize, *loader.blur_taps(np.array([sigma]))[0]])


def both_paths(image, rows):
    """PIL image or uint8 [3, S, S], list of rows -> int32 [n, 3, S, S]; the two paths must agree within a level."""
    crop = image if torch.is_tensor(image) else F.pil_to_tensor(image)
    rows = torch.stack(rows)
    device = loader.apply_photometry(crop.expand(len(rows), -1, -1, -1), rows)
    cpu = torch.stack([loader.photometry_of_crop(crop, row) for row in rows])
    assert device.dtype == cpu.dtype == torch.uint8
    assert (device.int() - cpu.int()).abs().max() <= 1
    return device.int()


def pixels(image):
    return F.pil_to_tensor(image).int()


def test_each_crop_type_has_its_photometry():
    rows = torch.stack([multi_crop(global_crops_number=3, local_crops_number=2).draw(64, 48)[2] for _ in range(2000)])
    blurred, solarized = (rows[:, :, 10] < 1).float().mean(0), rows[:, :, 9].mean(0)
    error = 4 * 0.5 / 2000**0.5
    assert (blurred - torch.tensor([1, 0.1, 0.1, 0.5, 0.5])).abs().max() < error and blurred[0] == 1
    assert (solarized - torch.tensor([0, 0.2, 0.2, 0, 0])).abs().max() < error
    assert solarized[0] == solarized[3:].sum() == 0


def test_photometry_probabilities_and_ranges():
    n = 8000
    rows = photometry_rows(n)
    order, factors, grey, solarize, taps = rows.split(loader.ROW, dim=1)
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and (counts - n / 24).abs().max() < 5 * (n / 24) ** 0.5
    assert (order.sort(dim=1).values == torch.arange(4)).all()
    factors = torch.empty(n, 4).scatter(1, order.long(), factors)
    jittered = (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)
    assert torch.equal(jittered, (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1))
    assert abs(jittered.float().mean() - 0.8) < 0.02
    for values, centre, half in zip(factors[jittered].T, (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1), strict=True):
        unit = (values - centre) / half
        assert -1 <= unit.min() < -0.99 and 0.99 < unit.max() <= 1 + 1e-6
        assert abs(unit.mean()) < 0.03 and abs(unit.var() - 1 / 3) < 0.02  # uniform
    draws = torch.cat([factors, grey, solarize, taps[:, :1]], dim=1)[jittered]
    assert abs(np.corrcoef(draws.T) - np.eye(7)).max() < 0.06
    assert abs(np.corrcoef(order.argsort(dim=1)[jittered].T, draws.T)[:4, 4:]).max() < 0.06
    assert abs(grey.mean() - 0.2) < 0.02 and abs(solarize.mean() - 0.2) < 0.02
    sigma = (6 * taps @ torch.arange(3.0) ** 2).sqrt()  # second moment of the filter, applied three times
    blurred = sigma > 0.01
    assert abs(blurred.float().mean() - 0.5) < 0.025
    sigma = sigma[blurred[:, 0] if blurred.ndim > 1 else blurred]
    assert 0.099 < sigma.min() < 0.12 and 1.98 < sigma.max() < 2.001 and abs(sigma.mean() - 1.05) < 0.04


def test_crop_areas_flips_and_untouched_pixels():
    torch.manual_seed(0)
    # Red rises to the right, green downwards: the crop's box can be read off its pixels.
    x = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = Image.fromarray(np.stack([x, x.T, 0 * x], axis=-1))
    cutter = loader.MultiCropAugmentation(1, (0.14, 0.5), 0, global_crops_size=32, photometry="device")
    areas, flips = [], 0
    for _ in range(1500):
        crop = cutter(image)[0][0].float()
        red = (crop[0, :, -1] - crop[0, :, 0]).mean() * 32 / 31  # between pixel centres
        green = (crop[1, -1] - crop[1, 0]).mean() * 32 / 31
        areas.append(float(red.abs() * green / 256**2))
        flips += int(red < 0)
        assert 0.7 < abs(red) / green < 1.4
    assert abs(flips / 1500 - 0.5) < 0.05
    assert 0.12 < min(areas) < 0.16 and 0.47 < max(areas) < 0.52 and abs(np.mean(areas) - 0.32) < 0.015

    every = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, -1, -1)
    for order in itertools.permutations(range(4)):
        assert torch.equal(both_paths(every, [row(order)])[0], every.int())


@pytest.mark.parametrize(("width", "height", "scale"), [(500, 375, (0.14, 1)), (375, 500, (0.05, 0.4)), (90, 30, (0.3, 1))])
def test_boxes_have_torchvisions_distribution(width, height, scale):
    n = 6000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in theirs], float)
    uniform = np.random.default_rng(0).random((n, loader.BOX_DRAWS)).tolist()
    ours = np.array([loader.draw_box(u, width, height, scale) for u in uniform], float)

    def statistics(boxes):
        left, top, w, h = boxes.T
        assert min(left.min(), top.min()) >= 0 and (left + w).max() <= width and (top + h).max() <= height
        area, aspect = w * h / (width * height), np.log(w / h)
        right, below = left / np.maximum(width - w, 1), top / np.maximum(height - h, 1)
        return np.stack([area, aspect, right, below, area**2, aspect**2, right**2, below**2, area * aspect, area * right,
                         right * below, aspect * below, area < 0.3, w == width, h == height])

    a, b = statistics(ours), statistics(theirs)
    assert (np.abs(a.mean(1) - b.mean(1)) <= 4.5 * np.sqrt((a.var(1) + b.var(1)) / n) + 1e-12).all()


def test_extreme_images_give_the_centred_box():
    for width, height in ((100, 10), (10, 100), (100, 4), (1, 1)):
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.9, 1), (3 / 4, 4 / 3))
        left, top, w, h = loader.draw_box([0.999] * loader.BOX_DRAWS, width, height, (0.9, 1))
        assert (top, left, h, w) == theirs


def test_crops_are_pillows_within_rounding():
    image = photo(120, 160)
    boxes, turns = [(10, 20, 90, 70), (0, 0, 160, 120), (100, 5, 20, 25)], [(False, True, 0), (True, False, 0), (True, True, 1)]
    crops = loader.MultiCropAugmentation(2, local_crops_number=1, global_crops_size=32, local_crops_size=48).cut(
        np.asarray(image), boxes, turns)
    for crop, (left, top, width, height), (flip, down, quarters), size in zip(crops, boxes, turns, (32, 32, 48), strict=True):
        theirs = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
        theirs = ImageOps.mirror(theirs) if flip else theirs
        theirs = (ImageOps.flip(theirs) if down else theirs).rotate(90 * quarters)
        assert (crop.int() - pixels(theirs)).abs().max() <= 2
        assert crop.permute(1, 2, 0).is_contiguous() or flip or down


@pytest.mark.parametrize(("name", "enhance", "factors"), [
    ("brightness", ImageEnhance.Brightness, (0.6, 0.9, 1.4)), ("contrast", ImageEnhance.Contrast, (0.6, 1.1, 1.4)),
    ("saturation", ImageEnhance.Color, (0.8, 1.05, 1.2))])
def test_jitter_is_pillows_within_two_levels(name, enhance, factors):
    image = photo()
    ours = both_paths(image, [row(**{name: factor}) for factor in factors])
    for crop, factor in zip(ours, factors, strict=True):
        assert (crop - pixels(enhance(image).enhance(factor))).abs().max() <= 2


def test_hue_is_torchvisions():
    tensor = F.pil_to_tensor(photo()) / 255
    corners = [[0, 1, 0.5, 1, 0, 0, 1, 0], [0, 1, 0.5, 0, 1, 0, 1, 0], [0, 1, 0.5, 0, 0, 1, 0, 1]]
    tensor[:, 0, :8] = torch.tensor(corners)
    factors = (-0.5, -0.1, -0.03, 0, 0.05, 0.1, 0.5)
    before = tensor.clone()
    together = loader.adjust_hue(tensor.expand(len(factors), -1, -1, -1), torch.tensor(factors).view(-1, 1, 1))
    for factor, turned in zip(factors, together, strict=True):
        torch.testing.assert_close(loader.adjust_hue(tensor, factor), F.adjust_hue(tensor, factor), rtol=0, atol=1e-5)
        torch.testing.assert_close(turned, F.adjust_hue(tensor, factor), rtol=0, atol=1e-5)
    assert torch.equal(tensor, before)
    ours = both_paths(photo(), [row(hue=factor) for factor in (-0.1, 0.04)])
    for crop, factor in zip(ours, (-0.1, 0.04), strict=True):
        assert (crop - (F.adjust_hue(F.pil_to_tensor(photo()) / 255, factor) * 255).round().int()).abs().max() <= 2
    # Pillow keeps the hue in 8 bits, and int(0.1 * 255) / 255 of a turn is what it adds.
    ours = both_paths(photo(), [row(hue=int(0.1 * 255) / 255)])[0]
    assert (ours - pixels(F.adjust_hue(photo(), 0.1))).abs().float().mean() < 2


@pytest.mark.parametrize("size", [224, 96, 33, 8, 3, 2, 1])
def test_blur_is_pillows_in_every_pixel(size):
    rng = np.random.default_rng(size)
    hard = Image.fromarray((rng.integers(0, 2, (size, size, 3)) * 255).astype(np.uint8))
    for image in (photo(size, size), hard):
        crop = F.pil_to_tensor(image)
        for sigma in (0.1, 0.3, 0.5, 1.4, 1.5, 2.0, *rng.uniform(0.1, 2, 8).tolist()):
            theirs, how = pixels(image.filter(ImageFilter.GaussianBlur(sigma))), row(sigma=sigma).float()
            for ours in (loader.photometry_of_crop(crop, how), loader.apply_photometry(crop[None], how[None])[0]):
                assert (ours.int() - theirs).abs().max() <= 2, sigma


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5, 2.0])
def test_blur_spreads_by_sigma(sigma):
    impulse = torch.zeros(3, 41, 41)
    impulse[:, 20, 20] = 1e9  # rounding does not matter
    taps = loader.gaussian_blur(impulse, torch.from_numpy(loader.blur_taps(np.array([sigma]))[0]).float())[0].double() / 1e9
    assert impulse.sum() == 3e9
    distance = torch.arange(41).double() - 20
    assert taps.sum() == pytest.approx(1, abs=1e-5)
    assert (taps.sum(0) * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)
    assert (taps.sum(1) * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)


def test_blur_taps_are_those_of_a_box_with_fractional_ends():
    for sigma in (0.0, 0.1, 0.7, 1.2, 2**0.5, 1.7, 2.0):
        # The definition: `inner` whole pixels each side of the centre, then fractional ones.
        variance, inner = sigma**2 / 3, 0 if sigma < 2**0.5 else 1
        width = 2 * inner + 1
        end = width * (variance - inner * (inner + 1) / 3) / (2 * ((inner + 1) ** 2 - variance))
        box = np.array([end] + [1] * width + [end]) / (width + 2 * end)
        taps = loader.blur_taps(np.array([sigma]))[0]
        assert taps[:inner + 2] == pytest.approx(box[inner + 1:], abs=1e-12)
        assert taps[inner + 2:] == pytest.approx(0, abs=1e-12)


def test_grey_and_solarise_are_pillows():
    image = photo()
    grey = image.convert("L").convert("RGB")
    ours = both_paths(image, [row(grey=1), row(grey=1, solarize=1), row(solarize=1)])
    assert (ours[0] - pixels(grey)).abs().max() <= 2
    assert (ours[1] - pixels(ImageOps.solarize(grey, 128))).abs().max() <= 2
    assert torch.equal(ours[2], pixels(ImageOps.solarize(image, 128)))


def test_every_order_of_jitter_is_torchvisions():
    image = photo()
    values = {"brightness": 1.35, "contrast": 0.65, "saturation": 1.2, "hue": 0.08}
    orders = list(itertools.permutations(range(4)))
    ours = both_paths(image, [row(order, **values) for order in orders])
    results = set()
    for order, crop in zip(orders, ours, strict=True):
        x = F.pil_to_tensor(image) / 255
        for operation in order:
            name = list(values)[operation]
            x = getattr(F, f"adjust_{name}")(x, values[name])
        assert (crop - (x * 255).round().int()).abs().max() <= 2, order
        results.add(crop.numpy().tobytes())
    assert len(results) > 12  # (some orders commute where nothing is clipped)


def test_grey_comes_after_jitter_then_blur_then_solarise():
    image = photo()
    ours = both_paths(image, [row((3, 0, 1, 2), 1.3, 1.2, 1.1, 0.1, grey=1, solarize=1, sigma=1.5)])[0]
    x = F.adjust_brightness(F.adjust_hue(F.pil_to_tensor(image) / 255, 0.1), 1.3)
    x = F.rgb_to_grayscale(F.adjust_saturation(F.adjust_contrast(x, 1.2), 1.1), 3)
    x = F.to_pil_image((x * 255).round().to(torch.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    assert (ours - pixels(ImageOps.solarize(x, 128))).abs().max() <= 4


def test_both_paths_give_the_same_crops(folder):
    """Random rows on crops of all kinds, as they come out of the loader."""
    cpu, device = (batches(masked_folder(folder, transform=multi_crop(photometry=where)), epochs=4) for where in ("cpu", "device"))
    assert device[0].photometry.shape == (3, 4, sum(loader.ROW)) and device[0].photometry.dtype == torch.float32
    untouched = 0
    for a, b in zip(cpu, device, strict=True):
        assert equal([a[2:6]], [b[2:6]])
        untouched += int((a.global_crops == b.global_crops).all())
        a, b = loader.finish_batch(a), loader.finish_batch(b)
        assert b.photometry is None and b.global_crops.dtype == torch.float32 and b.global_crops.is_contiguous()
        for x, y in ((a.global_crops, b.global_crops), (a.local_crops, b.local_crops)):
            assert (x - y).abs().max() <= 1.01 / 255 / min(images.IMAGENET_STD)  # one level
    assert not untouched
    rows = photometry_rows(500, seed=1)
    both_paths(photo(24, 24), list(rows))


@pytest.mark.parametrize("preset", augmentation.AUGMENT_PRESETS)
def test_moments_of_crops_agree_between_the_paths(preset):
    """benchmarks/data_loader.py --moments has the same for ten thousand crops of each preset."""
    for name, values in crop_moments(preset, [photo()], 500, sizes=(12, 8), seed=1).items():
        ours, theirs = values
        error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() <= 4.5 * error + 1e-9).all(), name


def test_device_photometry_never_waits_for_the_host():
    """On the meta device there are no values: reading one fails."""
    crops, rows = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.empty(4, 13, device="meta")
    assert loader.apply_photometry(crops, rows).shape == crops.shape


def test_device_photometry_may_be_compiled():
    compiled = torch.compile(loader.apply_photometry, backend="aot_eager", fullgraph=True, dynamic=False)
    crops = torch.stack([F.pil_to_tensor(photo(16, 16, seed)) for seed in range(6)])
    rows = photometry_rows(6)
    assert (compiled(crops, rows).int() - loader.apply_photometry(crops, rows).int()).abs().max() <= 1


def test_normalize():
    image = photo()
    expected = transforms.Normalize(images.IMAGENET_MEAN, images.IMAGENET_STD)(transforms.functional.to_tensor(image))
    tensor = F.pil_to_tensor(image)
    with torch.inference_mode():
        assert torch.allclose(images.normalize(tensor), expected, atol=1e-6)
    assert torch.allclose(images.normalize(tensor[None, None] / 255), expected[None, None], atol=1e-6)
    assert images.normalize(tensor).dtype == torch.float32
    images.normalize((tensor / 255).requires_grad_()).sum().backward()
    stats = images.PixelStats((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = transforms.Normalize(*stats)(tensor / 255)
    assert torch.allclose(images.normalize(tensor, stats), expected, atol=1e-6)
    assert torch.equal(images.denormalize(images.normalize(tensor, stats), stats), tensor)


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("locals_", [0, 3])
@pytest.mark.parametrize("case", ["mixed", "none", "all"])
def test_collate_against_a_plain_loop(case, locals_):
    rng = np.random.default_rng(0)
    n_global, n_batch, side = 2, 5, 4
    masks = rng.random((n_batch, n_global, side, side)) < 0.4
    masks[1, 0] = masks[2] = False
    masks = {"mixed": masks, "none": np.zeros_like(masks), "all": np.ones_like(masks)}[case]
    samples = []
    for b in range(n_batch):
        crops = [torch.full((3, 8, 8), 10 * b + g, dtype=torch.uint8) for g in range(n_global)]
        crops += [torch.full((3, 6, 6), 10 * b + 5 + i, dtype=torch.uint8) for i in range(locals_)]
        samples.append((crops, b % 3, list(masks[b])))
    batch = loader.collate(samples)

    index, weight = [], []
    for g in range(n_global):
        for b in range(n_batch):
            for cell, masked in enumerate(masks[b, g].flatten()):
                if masked:
                    index.append((g * n_batch + b) * side**2 + cell)
                    weight.append(1 / max(masks[b, g].sum(), 1) / n_global / n_batch)
    assert batch.mask_index.dtype == torch.int64 and batch.mask_index.tolist() == index
    assert batch.mask_weight.dtype == torch.float32 and batch.mask_weight.tolist() == pytest.approx(weight)
    assert batch.masks.dtype == torch.bool and batch.masks.shape == (n_global, n_batch, side, side)
    assert batch.masks.flatten()[batch.mask_index].all() and batch.masks.sum() == len(index)
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [0, 1, 2, 0, 1]
    assert batch.global_crops.dtype == torch.uint8
    assert batch.global_crops.shape == (n_global, n_batch, 3, 8, 8) and batch.global_crops.is_contiguous()
    assert all(batch.global_crops[g, b].eq(10 * b + g).all() for g in range(n_global) for b in range(n_batch))
    if locals_:
        assert batch.local_crops.shape == (locals_, n_batch, 3, 6, 6)
        assert all(batch.local_crops[i, b].eq(10 * b + 5 + i).all() for i in range(locals_) for b in range(n_batch))
    else:
        assert batch.local_crops is None


@pytest.mark.parametrize(("masked", "length"), [(0, 8), (1, 8), (8, 8), (9, 16)])
def test_mask_indices_are_padded(masked, length):
    mask = np.arange(16).reshape(4, 4) < masked
    samples = [([torch.zeros(3, 8, 8, dtype=torch.uint8)], 0, [mask])]
    plain, padded = loader.collate(samples), loader.collate(samples, pad_masks=8)
    assert len(plain.mask_index) == masked and len(padded.mask_index) == len(padded.mask_weight) == length
    assert torch.equal(padded.mask_index[:masked], plain.mask_index)
    assert torch.equal(padded.mask_weight[:masked], plain.mask_weight)
    assert not padded.mask_index[masked:].any() and not padded.mask_weight[masked:].any()
    assert padded.mask_index.dtype == torch.int64 and padded.mask_weight.dtype == torch.float32


def test_interleaved_crops_are_stacked_as_they_lie():
    crops = [torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(4)]
    stacked = loader.collate([(crops[:2], 0, [np.zeros((2, 2), bool)]), (crops[2:], 1, [np.zeros((2, 2), bool)])])
    assert stacked.global_crops.permute(0, 1, 3, 4, 2).is_contiguous()
    assert torch.equal(stacked.global_crops[0], torch.stack(crops[::2]))
    assert torch.equal(stacked.local_crops[0], torch.stack(crops[1::2]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("photometry", ["cpu", "device"])
def test_device_batches(folder, workers, photometry):
    dataset = masked_folder(folder, transform=multi_crop(photometry=photometry))
    fetched, data_loader = [], DataLoader(dataset, 4, num_workers=workers, collate_fn=partial(loader.collate, pad_masks=64))
    expected = [loader.finish_batch(batch) for batch in data_loader]

    def watched():
        for batch in data_loader:
            fetched.append(batch)
            yield batch

    seen = []
    for batch in loader.device_batches(watched(), torch.device("cpu")):
        seen.append(batch)
        assert len(fetched) <= len(seen) + 1
        assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float32 and batch.photometry is None
        assert len(batch.mask_index) % 64 == 0
    assert len(seen) == 2 and equal(seen, expected)


def test_a_batch_is_handed_on_before_the_next_one_is_waited_for(monkeypatch):
    """On a GPU, stood in for: a loader that is behind must not hold up work that the device could begin with."""
    class OnDevice:
        def to(self, device, non_blocking):
            events.append("copied")
            return self

        def record_stream(self, stream):
            events.append("recorded")

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            events.append("waited for the copy")

    def loaded():
        for i in range(2):
            events.append(f"loaded {i}")
            yield loader.Batch(*[None] * (len(loader.Batch._fields) - 1), OnDevice())
    events = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(loader, "finish_batch", lambda batch, *_: batch)
    for i, _ in enumerate(loader.device_batches(loaded(), torch.device("cuda"))):
        events.append(f"computed {i}")
    assert events == [event for i in range(2) for event in (f"loaded {i}", "copied", "waited for the copy", "recorded", f"computed {i}")]


def test_batches_of_other_transforms_and_without_local_crops_are_finished(folder):
    cut = transforms.Compose([transforms.RandomCrop(24), transforms.ToTensor()])
    batch = batches(masked_folder(folder, transform=lambda image: [cut(image)], patch_size=8))[0]
    assert torch.equal(loader.finish_batch(batch).global_crops, images.normalize(batch.global_crops))
    batch = batches(masked_folder(folder, transform=multi_crop(local_crops_number=0, photometry="device")))[0]
    finished = loader.finish_batch(batch)
    assert batch.local_crops is finished.local_crops is None
    assert finished.global_crops.shape == batch.global_crops.shape == (2, 4, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_device_batches_on_cuda(folder, workers):
    dataset, device = masked_folder(folder, transform=multi_crop(photometry="device")), torch.device("cuda")
    data_loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=loader.collate, pin_memory=True)
    expected = [loader.finish_batch(batch) for batch in data_loader]
    images.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device=device))  # its constants are copied once
    device_batches = loader.device_batches(data_loader, device)
    for other in expected:
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = next(device_batches)
            for _ in range(4):  # would overwrite memory that was given back too early
                torch.full_like(batch.global_crops, float("nan"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (batch.global_crops.cpu() - other.global_crops).abs().max() <= 1.01 / 255 / min(images.IMAGENET_STD)
        assert torch.equal(batch.mask_index.cpu(), other.mask_index)
    assert next(device_batches, None) is None
