"""Data sets behind --dataset, laid out as torchvision and the competitions do, and subsets of training images."""
import json
import os
import pickle

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

import engine
from evaluation.common.arguments import evaluation_parser
from evaluation.common.data import DATASETS, DOWNLOADABLE, ImageSet, image_folders, image_sets, subset_places


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, value, value)).save(path)


def grey(image):
    return image.getpixel((0, 0))[0]


def keep(image):
    return image


# ---------------------------------------------------------------- layouts, with images whose grey value tells them apart

def cifar(root, patch, kind, folder, train_files, test_files, key, meta):
    """CIFAR's pickled batches; image i of a file is grey with value 10 * file + i."""
    (root / folder).mkdir(parents=True)
    for number, name in enumerate(train_files + test_files):
        pixels = np.stack([np.full(3072, 10 * number + i, dtype=np.uint8) for i in range(3)])
        (root / folder / name).write_bytes(pickle.dumps({"data": pixels, key: [(number + i) % 3 for i in range(3)]}))
    (root / folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: ["a", "b", "c"]}))
    patch.setattr(kind, "train_list", [[name, None] for name in train_files])
    patch.setattr(kind, "test_list", [[name, None] for name in test_files])
    patch.setattr(kind, "meta", {**meta, "md5": None})


def cifar10(root, patch):
    cifar(root, patch, torchvision.datasets.CIFAR10, "cifar-10-batches-py", ["data_batch_1", "data_batch_2"], ["test_batch"],
          "labels", {"filename": "batches.meta", "key": "label_names"})
    return [(0, 0), (1, 1), (2, 2), (10, 1), (11, 2), (12, 0)], [(20, 2), (21, 0), (22, 1)], 3


def cifar100(root, patch):
    cifar(root, patch, torchvision.datasets.CIFAR100, "cifar-100-python", ["train"], ["test"], "fine_labels",
          {"filename": "meta", "key": "fine_label_names"})
    return [(0, 0), (1, 1), (2, 2)], [(10, 1), (11, 2), (12, 0)], 3


def flowers(root, patch):
    """Six images; labels in the file count from 1. Training and validation images are trained on together."""
    base = root / "flowers-102"
    for i in range(1, 7):
        picture(base / "jpg" / f"image_{i:05d}.jpg", 10 * i)
    savemat(base / "imagelabels.mat", {"labels": np.array([1, 2, 3, 3, 2, 102])})
    savemat(base / "setid.mat", {"trnid": np.array([6, 1]), "valid": np.array([3, 2]), "tstid": np.array([4, 5])})
    patch.setattr(torchvision.datasets.Flowers102, "_file_dict",
                  {"image": ("", None), "label": ("imagelabels.mat", None), "setid": ("setid.mat", None)})
    return [(10, 0), (20, 1), (30, 2), (60, 101)], [(40, 2), (50, 1)], 102


def cars(root, patch):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW", "Fiat"], dtype=object)})
    for part, path, values in (("train", base / "devkit" / "cars_train_annos.mat", [(10, 3), (20, 1)]),
                               ("test", base / "cars_test_annos_withlabels.mat", [(30, 2), (40, 3)])):
        for value, _ in values:
            picture(base / f"cars_{part}" / f"{value}.jpg", value)
        savemat(path, {"annotations": np.array([(f"{value}.jpg", label) for value, label in values],
                                               dtype=[("fname", object), ("class", object)])})
    return [(10, 2), (20, 0)], [(30, 1), (40, 2)], 3


def flowers_of_the_reference(root, patch):
    expected = flowers(root, patch)
    for path in (root / "flowers-102").iterdir():
        path.rename(root / path.name)
    (root / "flowers-102").rmdir()
    return expected


def cars_of_the_reference(root, patch):
    """One list with paths, boxes, classes from 1, and whether an image is for tests."""
    notes = [("car_ims/1.jpg", 10, 3, 0), ("car_ims/2.jpg", 30, 2, 1), ("car_ims/3.jpg", 20, 1, 0), ("car_ims/4.jpg", 40, 3, 1)]
    for name, value, *_ in notes:
        picture(root / name, value)
    names = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    savemat(root / "cars_annos.mat", {"annotations": np.array([[(name, 1, 2, 3, 4, label, test) for name, _, label, test in notes]],
                                                              dtype=[(field, object) for field in names])})
    return [(10, 2), (20, 0)], [(30, 1), (40, 2)], 3


def inat(year):
    """The lists of the competition; categories have numbers with gaps."""
    def make(root, patch):
        truth, number = [], 0
        for part, values in (("train", [(10, 7), (20, 3), (30, 7)]), ("val", [(40, 3)])):
            images, notes = [], []
            for value, category in values:
                name = f"train_val{year}/Plantae/{category}/{value}.jpg"
                picture(root / name, value)
                images.append({"id": number, "file_name": name})
                notes.append({"image_id": number, "category_id": category})
                number += 1
            (root / f"{part}{year}.json").write_text(json.dumps({"images": images, "annotations": notes[::-1]}))
            truth.append(sorted(((value, [3, 7].index(category)) for value, category in values), key=lambda item: item[1]))
        return *truth, 2  # in the order of the paths
    return make


def inat2021(name):
    def make(root, patch):
        classes = ["00000_Animalia_A_B_C_D_E_f", "00001_Plantae_A_B_C_D_E_g"]
        for part, values in ((name, [(10, 0), (20, 1)]), ("2021_valid", [(30, 1)])):
            for value, label in values:
                picture(root / part / classes[label] / f"{value}.jpg", value)
        return [(10, 0), (20, 1)], [(30, 1)], 2
    return make


def imagefolder(root, patch):
    for part, values in (("train", [(10, 0), (20, 1)]), ("val", [(30, 1)])):
        for value, label in values:
            picture(root / part / f"class {label}" / f"{value}.jpg", value)
    return [(10, 0), (20, 1)], [(30, 1)], 2


LAYOUTS = {"imagefolder": imagefolder, "cifar10": cifar10, "cifar100": cifar100, "flowers": flowers, "cars": cars,
           "inat2018": inat(2018), "inat2019": inat(2019), "inat2021": inat2021("2021_train"),
           "inat2021_mini": inat2021("2021_train_mini")}
OLD_LAYOUTS = {"flowers": flowers_of_the_reference, "cars": cars_of_the_reference}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*words, **named):
        raise AssertionError("something was fetched")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    for module in ("cifar", "flowers102", "inaturalist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)


@pytest.mark.parametrize("dataset, layout", [*LAYOUTS.items(), *OLD_LAYOUTS.items()])
def test_images_and_labels_of_every_data_set(dataset, layout, tmp_path, monkeypatch, no_network):
    expected = layout(tmp_path, monkeypatch)
    for part, items in zip(image_sets(dataset, tmp_path, keep, keep), expected, strict=False):
        found = [(grey(image), label) for image, label, _ in (part[i] for i in range(len(part)))]
        assert [label for _, label in found] == part.targets.tolist()
        assert [label for _, label in found] == [label for _, label in items]
        assert np.abs(np.array(found) - items).max() <= 1  # JPEG
        assert [part[i][2] for i in range(len(part))] == list(range(len(part)))
        assert part[0][0].mode == "RGB" and part[0][0].size == ((32, 32) if "cifar" in dataset else (6, 5))
        assert len(part.classes) == expected[2]
        assert part.fingerprint() == part.with_transform(None).fingerprint()


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("there", ["no folder", "empty folder"])
def test_missing_data_are_named_and_nothing_is_fetched(dataset, there, tmp_path, no_network):
    root = tmp_path / "data"
    if there == "empty folder":
        root.mkdir()
    with pytest.raises(engine.InputError, match=str(root)) as caught:
        image_sets(dataset, root)
    message = str(caught.value)
    assert "\n" not in message
    if dataset != "imagefolder":
        assert DATASETS[dataset][1] in message and ("--download" in message) == (dataset in DOWNLOADABLE)
    assert not root.exists() or not list(root.iterdir())


@pytest.mark.parametrize("dataset, path, content, reason", [
    ("flowers", "jpg", None, "no jpg/"), ("flowers", "setid.mat", None, "no setid.mat"),
    ("flowers", "imagelabels.mat", b"MATLAB 5.0", "imagelabels.mat cannot be read"), ("cars", "cars_annos.mat", b"", "cars_annos.mat cannot be read"),
    ("cars", "cars_annos.mat", {"other": 1}, "annotations"), ("flowers", "imagelabels.mat", {"labels": [1, 2]}, "out of bounds"),
    ("cars", "cars_annos.mat", {"annotations": [1.0]}, "")])
def test_wrong_layouts(dataset, path, content, reason, tmp_path, monkeypatch):
    OLD_LAYOUTS[dataset](tmp_path, monkeypatch)
    if content is None:
        (tmp_path / path).rename(tmp_path / "elsewhere")
    elif isinstance(content, bytes):
        (tmp_path / path).write_bytes(content)
    else:
        savemat(tmp_path / path, content)
    with pytest.raises(engine.InputError, match=f"{dataset}: cannot be read from .*{reason}.*; expected there: ") as caught:
        image_sets(dataset, tmp_path)
    assert "\n" not in str(caught.value) and DATASETS[dataset][1] in str(caught.value)


@pytest.mark.parametrize("content", ["{", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}'])
def test_damaged_lists(content, tmp_path):
    inat(2018)(tmp_path, None)
    (tmp_path / "val2018.json").write_text(content)
    with pytest.raises(engine.InputError, match="--dataset inat2018.*val2018.json"):
        image_sets("inat2018", tmp_path)


def test_download_is_torchvisions_and_only_on_demand(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive",
                        lambda url, *words, **named: fetched.append(url))
    with pytest.raises(engine.InputError, match="cifar10"):  # what was fetched here is nothing
        image_sets("cifar10", tmp_path / "new", download=True)
    assert fetched == 2 * [torchvision.datasets.CIFAR10.url] or fetched == [torchvision.datasets.CIFAR10.url]
    with pytest.raises(engine.InputError, match="--download: cars"):
        image_sets("cars", tmp_path, download=True)
    parse = evaluation_parser("").parse_args
    for words, value in (([], False), (["--download"], True), (["--download", "false"], False)):
        assert parse(["--pretrained_weights", "a", *words]).download is value


def test_flag_and_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = evaluation_parser("").parse_args(["--pretrained_weights", "a"])
    assert (args.dataset, args.data_path, args.train_subset) == ("imagefolder", None, None)
    imagefolder(tmp_path / "data" / "imagenet", None)
    train, val = image_sets(args.dataset, args.data_path)
    assert (train.name, train.root, len(val)) == ("imagefolder train", "data/imagenet", 1)
    with pytest.raises(engine.InputError, match="data/cifar"):
        image_sets("cifar10")


def test_image_folders_agree_with_the_older_interface(digits):
    for new, old in zip(image_sets("imagefolder", digits, keep, keep), image_folders(digits, 16), strict=True):
        assert new.targets.tolist() == old.targets and new.classes == old.classes
        assert [os.path.join(new.root, path) for path in new.paths()] == [path for path, _ in old.samples]
        assert new[7][1:] == old[7][1:]


# ---------------------------------------------------------------- subsets

@pytest.fixture
def four_classes(tmp_path):
    """12 training images of four classes of 1, 2, 3 and 6; one name is in two classes."""
    for label, count in (("a", 1), ("b", 2), ("c", 3), ("d", 6)):
        for i in range(count):
            picture(tmp_path / "train" / label / f"{label}_{i}.png", 20 * i)
    (tmp_path / "train" / "d" / "d_5.png").rename(tmp_path / "train" / "d" / "a_0.png")
    picture(tmp_path / "val" / "b" / "x.png", 0)
    return tmp_path


def names(part):
    return list(part.paths())


@pytest.mark.parametrize("text, expected", [
    ("b_0.png\n\nd_2.png\n", ["train/b/b_0.png", "train/d/d_2.png"]),  # as published: names alone
    ("d/d_2.png\nd/a_0.png\r\na/a_0.png", ["train/a/a_0.png", "train/d/a_0.png", "train/d/d_2.png"]),
    ("train/c/c_1.png\nc_1.png", ["train/c/c_1.png"]),
])
def test_list_of_names(text, expected, four_classes):
    (four_classes / "list.txt").write_text(text)
    train, val = image_sets("imagefolder", four_classes, keep, keep, str(four_classes / "list.txt"))
    assert names(train) == expected
    assert len(train.classes) == 4 and len(val) == 1
    for i in range(len(train)):  # images, labels and indices are those of the listed files
        image, label, index = train[i]
        assert (train.classes[label], index) == (expected[i].split("/")[1], i)
        assert grey(image) == Image.open(four_classes / expected[i]).getpixel((0, 0))[0]


@pytest.mark.parametrize("text, words", [
    ("b_0.png\nmissing.png\n", "1 names are not among the 12 .*missing.png"),
    ("a_0.png\n", "several images.*a_0.png"),
    ("\n\n", "empty"),
])
def test_lists_that_do_not_fit(text, words, four_classes):
    (four_classes / "list.txt").write_text(text)
    with pytest.raises(engine.InputError, match=f"--train_subset .*list.txt: .*{words}") as caught:
        image_sets("imagefolder", four_classes, train_subset=str(four_classes / "list.txt"))
    assert "\n" not in str(caught.value)


def test_stratified_draw(four_classes):
    counts = np.bincount(image_sets("imagefolder", four_classes, train_subset="0.5")[0].targets)
    assert counts.tolist() == [1, 1, 2, 3]  # of 1, 2, 3 and 6; at least one each
    samples = [("", label) for label in np.random.default_rng(1).integers(5, size=1000)]
    images = ImageSet("x", "", samples, [label for _, label in samples], list("abcde"))
    drawn = [subset_places(images, "0.1", seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and not np.array_equal(drawn[0], drawn[2])
    for places in drawn:
        assert (np.diff(places) > 0).all()
        assert (np.bincount(images.targets[places]) == np.round(np.bincount(images.targets) / 10)).all()
    assert max(np.diff(drawn[0])) < 100  # over the whole of each class, not its first images
    for text, words in (("0", "above 0"), ("1.0", "below 1"), ("nan", "above 0"), ("nowhere.txt", "nowhere.txt: no such file")):
        with pytest.raises(engine.InputError, match=f"--train_subset .*{words}"):
            subset_places(images, text)


# ---------------------------------------------------------------- identity

def test_fingerprint_sees_every_change(four_classes, monkeypatch):
    def fingerprint(**named):
        return image_sets("imagefolder", four_classes, **named)[0].fingerprint()
    seen = {fingerprint()}
    path = four_classes / "train" / "c" / "c_1.png"
    stat = path.stat()

    def new(**named):
        seen.add(fingerprint(**named))
        return len(seen)
    assert new() == 1
    assert new(train_subset="0.5") == 2
    assert new(train_subset="0.5", subset_seed=1) == 3
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert new() == 4
    path.write_bytes(data + b"0")  # of the same age
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert new() == 5
    path.rename(path.with_name("c_11.png"))
    assert new() == 6
    (four_classes / "train" / "c").rename(four_classes / "train" / "cc")  # the same labels by another name
    assert new() == 7
    LAYOUTS["cifar10"](four_classes, monkeypatch)
    train = image_sets("cifar10", four_classes)[0]
    before = train.fingerprint()
    train.samples[1][0][0, 0, 0] += 1
    assert train.fingerprint() != before


