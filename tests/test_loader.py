import pickle
import random
import traceback
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

import loader
from utils import InputError

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
    return all(torch.equal(x, y) for x, y in pairs)


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


def reference_block_mask(height, width, ratio, rng, aspect=(0.3, 1 / 0.3)):
    """The words of BEiT's algorithm, with the interpreter's generator."""
    mask, count, target = np.zeros((height, width), dtype=bool), 0, ratio * height * width
    while count < target:
        for _ in range(10):
            area = rng.uniform((min(height, width) // 3) ** 2, target - count)
            a = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
            h, w = round(np.sqrt(area * a)), round(np.sqrt(area / a))
            if h >= height or w >= width:
                continue
            y, x = rng.randint(0, height - h), rng.randint(0, width - w)
            new = (~mask[y:y + h, x:x + w]).sum()
            if 0 < new <= target - count:
                mask[y:y + h, x:x + w] = True
                count += new
                break
        else:
            break
    return mask


@pytest.mark.parametrize(("size", "ratio"), [(14, 0.1), (14, 0.3), (14, 0.5), (7, 0.3)])
def test_block_masks_have_the_plain_algorithms_distribution(size, ratio):
    def statistics(draw):
        masks = np.stack([draw() for _ in range(1500)]).astype(float)
        edges = np.abs(np.diff(masks, axis=1)).sum((1, 2)) + np.abs(np.diff(masks, axis=2)).sum((1, 2))
        return masks.mean((1, 2)), edges, masks[:, 0].mean(1), masks[:, size // 2, size // 2]

    rng, plain = np.random.default_rng(1), random.Random(1)
    ours = statistics(lambda: loader.block_mask(size, size, ratio, rng))
    theirs = statistics(lambda: reference_block_mask(size, size, ratio, plain))
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
    ({"pred_ratio": [0, 0.3], "pred_ratio_var": [0, 0.4]}, "0.3 with pred_ratio_var 0.4"),
    ({"pred_ratio": [0, 0.3], "pred_ratio_var": 0.2}, "0 with pred_ratio_var 0.2"),
    ({"pred_ratio": 30, "pred_ratio_var": 0}, "pred_ratio 30"),
    ({"pred_shape": "blob"}, "blob"),
    ({"on_bad_image": "hide"}, "hide"),
    ({"seed": -1}, "seed -1"),
])
def test_bad_options_are_named(folder, options, words):
    with pytest.raises(InputError, match=words):
        masked_folder(folder, **options)


# ---------------------------------------------------------------- random streams

@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_batches_epoch_by_epoch(folder, context):
    alone = batches(masked_folder(folder), workers=0, epochs=2)
    workers = batches(masked_folder(folder), workers=2, epochs=2, multiprocessing_context=context)
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
            loaded = loader.load_rgb(tmp_path / name)
            assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(expected)), name
    assert len(loader.MultiCropAugmentation(**SMALL)(loader.load_rgb(tmp_path / "one.png"))) == 3


def test_16_bit_images_keep_their_grey_levels(tmp_path):
    levels = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "b.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "b.tif", "a.pgm"):
        loaded = np.asarray(loader.load_rgb(tmp_path / name))
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
        with pytest.raises(loader.BadImage, match=name) as caught:
            loader.load_rgb(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert name in str(pickle.loads(pickle.dumps(caught.value)))


def test_bad_images_are_skipped_once_and_listed(folder, monkeypatch):
    for name in ("class0/0.png", "class1/5.png"):
        (folder / name).write_bytes(b"no image")
    dataset = masked_folder(folder)
    bad = [path for path, _ in dataset.samples if path.endswith(("0.png", "5.png"))]
    alone = batches(dataset)
    assert dataset.bad_files() == bad and sum(len(batch.labels) for batch in alone) == 8

    decoded = []
    monkeypatch.setattr(dataset, "loader", lambda path: decoded.append(path) or loader.load_rgb(path))
    assert equal(batches(dataset), alone)  # a known bad file has the same substitute
    assert len(decoded) == 8 and not set(decoded) & set(bad)

    with_workers = masked_folder(folder)
    assert equal(batches(with_workers, workers=2), alone)
    assert with_workers.bad_files() == bad  # what workers found, seen here


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
    dataset = loader.ImageFolderInstance(str(folder), transform=lambda image: (image.mode, image.size))
    assert dataset[5] == (("RGB", (64, 48)), 1, 5)
    (folder / "class0/0.png").write_bytes(b"no image")
    with pytest.raises(loader.BadImage, match="0.png"):
        dataset[0]


@pytest.mark.parametrize("build", [loader.check_image_folder, loader.ImageFolderInstance, masked_folder])
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
    assert "no class folders" in message(tmp_path / "root")
    photo().save(tmp_path / "root/flat.png")
    assert "move the images into a sub-folder" in message(tmp_path / "root")


def test_class_folders_without_images_are_named(folder):
    (folder / "void").mkdir()
    (folder / "void/notes.txt").write_text("")
    with pytest.raises(InputError, match="class folder void"):
        loader.ImageFolderInstance(str(folder))


# ---------------------------------------------------------------- augmentation

def test_crop_order_sizes_and_types():
    augmentation = loader.MultiCropAugmentation(3, (0.25, 1), 4, (0.05, 0.25), 28, 12)
    crops = augmentation(photo())
    assert [tuple(crop.shape) for crop in crops] == [(3, 28, 28)] * 3 + [(3, 12, 12)] * 4
    assert all(crop.dtype == torch.uint8 for crop in crops)


def test_photometry_of_each_crop_type(monkeypatch):
    calls = []
    monkeypatch.setattr(loader, "random_crop", lambda image, size, scale: calls.append((size, scale)) or size)
    monkeypatch.setattr(loader, "random_photometry", lambda crop, *p: calls.append(p))
    loader.MultiCropAugmentation(3, (0.2, 1), 2, (0.05, 0.2))(photo())
    assert calls[0::2] == [(224, (0.2, 1))] * 3 + [(96, (0.05, 0.2))] * 2
    assert calls[1::2] == [(1.0, 0.0), (0.1, 0.2), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)]


def test_photometry_probabilities_and_ranges(monkeypatch):
    torch.manual_seed(0)
    seen = {}

    def count(name, target=loader.F):
        monkeypatch.setattr(target, name, lambda x, *a, **k: seen.setdefault(name, []).append(a or k.get("sigma")) or x)

    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation", "rgb_to_grayscale"):
        count(name)
    count("adjust_hue", loader)
    count("gaussian_blur", loader)
    crop = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    solarized = sum(int(loader.random_photometry(crop, 0.5, 0.2)[0, 0, 0] == 55) for _ in range(4000))
    assert abs(solarized / 4000 - 0.2) < 0.03
    ranges = {"adjust_brightness": (0.6, 1.4), "adjust_contrast": (0.6, 1.4), "adjust_saturation": (0.8, 1.2),
              "adjust_hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = torch.tensor(seen[name]).flatten()
        assert abs(len(values) / 4000 - 0.8) < 0.03
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
    assert abs(len(seen["rgb_to_grayscale"]) / 4000 - 0.2) < 0.03
    sigmas = torch.tensor(seen["gaussian_blur"])
    assert abs(len(sigmas) / 4000 - 0.5) < 0.03 and 0.1 <= sigmas.min() < 0.12 and 1.98 < sigmas.max() <= 2


def test_photometry_order(monkeypatch):
    """Jitter in random order, then grey, blur; solarise last (test_photometry_probabilities_and_ranges)."""
    torch.manual_seed(0)
    monkeypatch.setattr(loader, "chance", lambda p: p > 0)
    orders, calls = set(), []
    jitter = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    for target, names in ((loader.F, (*jitter, "rgb_to_grayscale")), (loader, ("adjust_hue", "gaussian_blur"))):
        for name in names:
            monkeypatch.setattr(target, name, lambda x, *a, name=name, **k: calls.append(name) or x)
    for _ in range(400):
        calls.clear()
        loader.random_photometry(torch.zeros(3, 2, 2, dtype=torch.uint8), 1.0, 0.0)
        assert calls[4:] == ["rgb_to_grayscale", "gaussian_blur"]
        orders.add(tuple(calls[:4]))
    assert len(orders) == 24


def test_crop_areas_flips_and_untouched_pixels(monkeypatch):
    torch.manual_seed(0)
    # Red rises to the right, green downwards: the crop's box can be read off its pixels.
    x = torch.linspace(0, 255, 256).round().expand(256, 256)
    image = torch.stack([x, x.T, torch.zeros(256, 256)]).to(torch.uint8)
    areas, flips = [], 0
    for _ in range(1500):
        crop = loader.random_crop(image, 32, (0.14, 0.5)).float()
        red = (crop[0, :, -1] - crop[0, :, 0]).mean() * 32 / 31  # between pixel centres
        green = (crop[1, -1] - crop[1, 0]).mean() * 32 / 31
        areas.append(float(red.abs() * green / 256**2))
        flips += int(red < 0)
        assert 0.7 < abs(red) / green < 1.4
    assert abs(flips / 1500 - 0.5) < 0.05
    assert 0.12 < min(areas) < 0.16 and 0.47 < max(areas) < 0.52 and abs(np.mean(areas) - 0.32) < 0.015

    monkeypatch.setattr(loader, "chance", lambda p: False)
    every = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(loader.random_photometry(every, 1.0, 0.0), every)


def test_crops_are_pillows_within_rounding():
    image = photo(120, 160)
    torch.manual_seed(0)
    ours = loader.random_crop(F.pil_to_tensor(image), 32, (0.2, 0.5))
    torch.manual_seed(0)
    top, left, height, width = transforms.RandomResizedCrop.get_params(image, (0.2, 0.5), (3 / 4, 4 / 3))
    theirs = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.BICUBIC)
    if loader.chance(0.5):
        theirs = ImageOps.mirror(theirs)
    assert (ours.int() - F.pil_to_tensor(theirs).int()).abs().max() <= 2


def levels(x):
    return (x * 255).round().int()


@pytest.mark.parametrize(("operation", "factors"), [
    (F.adjust_brightness, (0.6, 1.0, 1.4)), (F.adjust_contrast, (0.6, 1.4)), (F.adjust_saturation, (0.8, 1.2))])
def test_float_jitter_is_pillows_within_two_levels(operation, factors):
    image = photo()
    for factor in factors:
        ours = levels(operation(F.pil_to_tensor(image) / 255, factor))
        assert (ours - F.pil_to_tensor(operation(image, factor)).int()).abs().max() <= 2


def test_hue_is_torchvisions():
    tensor = F.pil_to_tensor(photo()) / 255
    corners = [[0, 1, 0.5, 1, 0, 0, 1, 0], [0, 1, 0.5, 0, 1, 0, 1, 0], [0, 1, 0.5, 0, 0, 1, 0, 1]]
    tensor[:, 0, :8] = torch.tensor(corners)
    for factor in (-0.5, -0.1, -0.03, 0, 0.05, 0.1, 0.5):
        before = tensor.clone()
        torch.testing.assert_close(loader.adjust_hue(tensor, factor), F.adjust_hue(tensor, factor), rtol=0, atol=1e-5)
        assert torch.equal(tensor, before)
    # Pillow keeps the hue in 8 bits, and int(0.1 * 255) / 255 of a turn is what it adds.
    pillow = F.pil_to_tensor(F.adjust_hue(photo(), 0.1)).int()
    ours = levels(loader.adjust_hue(F.pil_to_tensor(photo()) / 255, int(0.1 * 255) / 255))
    assert (ours - pillow).abs().float().mean() < 2


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.4, 1.5, 2.0])
def test_blur_is_pillows(sigma):
    image = photo(60, 80)
    tensor = F.pil_to_tensor(image) / 255
    ours = levels(loader.gaussian_blur(tensor, sigma))
    difference = (ours - F.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(sigma))).int()).abs()
    assert difference[:, 6:-6, 6:-6].max() <= 3
    assert difference.float().mean() < 1  # the border, where Pillow extends the image between its three passes

    impulse = torch.zeros(1, 41, 41)
    impulse[0, 20, 20] = 1
    taps = loader.gaussian_blur(impulse, sigma)[0].double()
    distance = torch.arange(41).double() - 20
    assert taps.sum() == pytest.approx(1, abs=1e-5)
    assert (taps.sum(0) * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)
    assert (taps.sum(1) * distance**2).sum() == pytest.approx(sigma**2, rel=1e-4)


def test_grey_and_solarise_are_pillows(monkeypatch):
    image = photo()
    tensor = F.pil_to_tensor(image)
    monkeypatch.setattr(loader, "chance", lambda p: p == 0.2)  # grey and solarise, no jitter, no blur
    expected = ImageOps.solarize(image.convert("L").convert("RGB"), 128)
    ours = loader.random_photometry(tensor, 0.5, 0.2).int()
    difference = (ours - F.pil_to_tensor(expected).int()).abs()
    assert difference.max() <= 2
    monkeypatch.setattr(loader, "chance", lambda p: p == 0.25)  # solarise alone
    every = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = ImageOps.solarize(Image.fromarray(every.permute(1, 2, 0).numpy()), 128)
    assert torch.equal(loader.random_photometry(every, 0.5, 0.25), F.pil_to_tensor(expected))


def test_normalize():
    image = photo()
    expected = transforms.Normalize(loader.IMAGENET_MEAN, loader.IMAGENET_STD)(transforms.functional.to_tensor(image))
    tensor = F.pil_to_tensor(image)
    with torch.inference_mode():
        assert torch.allclose(loader.normalize(tensor), expected, atol=1e-6)
    assert torch.allclose(loader.normalize(tensor[None, None] / 255), expected[None, None], atol=1e-6)
    assert loader.normalize(tensor).dtype == torch.float32
    loader.normalize((tensor / 255).requires_grad_()).sum().backward()


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
