"""Images of the evaluations: the test transform, the data sets behind `--dataset`, and subsets of their training images.

Letter: n images.
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import Dataset
from torchvision.transforms import v2

import engine
from images import CheckedImageFolder, ImageFolderInstance, file_state, load_rgb, normalize

# Where each data set is looked for by default, and what must be in that folder.
DATASETS = {
    "imagefolder": ("data/imagenet", "train/CLASS/IMAGE and val/CLASS/IMAGE"),
    "cifar10": ("data/cifar", "cifar-10-batches-py/"),
    "cifar100": ("data/cifar", "cifar-100-python/"),
    "flowers": ("data/flwrs", "jpg/, imagelabels.mat and setid.mat, there or in flowers-102/"),
    "cars": ("data/cars", "cars_annos.mat and the images that it names, or stanford_cars/ with devkit/, cars_train/, "
                          "cars_test/ and cars_test_annos_withlabels.mat"),
    "inat2018": ("data/inat/2018", "train2018.json, val2018.json and train_val2018/"),
    "inat2019": ("data/inat/2019", "train2019.json, val2019.json and train_val2019/"),
    "inat2021": ("data/inat", "2021_train/ and 2021_valid/"),
    "inat2021_mini": ("data/inat", "2021_train_mini/ and 2021_valid/"),
}
DOWNLOADABLE = ("cifar10", "cifar100", "flowers", "inat2021", "inat2021_mini")


def fitted_size(height, width, short, long):
    """Height and width of an image whose shorter side becomes `short`, or less so that the longer is at most `long`."""
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_pixels(image, size):
    """uint8 [3, h, w] to the `size` (height, width), bilinear without antialiasing, as OpenCV does."""
    return v2.functional.resize(image, list(size), antialias=False)


def fitted(image, short, long):
    """uint8 [3, h, w] at its `fitted_size`."""
    return resize_pixels(image, fitted_size(*image.shape[1:], short, long))


def eval_transform(size, normalize=normalize):
    """PIL image -> normalised float32 [3, size, size]: shorter side to 256/224 of `size` (bicubic), centre crop."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC),
                       v2.CenterCrop(size), v2.PILToTensor(), normalize])


class ImageSet(Dataset):
    """One part of a data set, or a selection from it; items are (transform(PIL RGB image), label, index).

    Without a transform they hold the PIL image.

    Attributes:
        name: what errors and logs call it, as "cifar10 train".
        root: folder of the files.
        targets: labels, int64 numpy array [n]. `classes`: their names.
        samples: sequence of (path, label) or, for images in memory, of (uint8 array [H, W, 3], label).
        rows: places of the n images in `samples`, int64 numpy array [n], rising.
    """

    def __init__(self, name, root, samples, targets, classes, transform=None, rows=None):
        self.name, self.root, self.samples, self.classes, self.transform = name, str(root), samples, classes, transform
        self.rows = np.arange(len(samples)) if rows is None else rows
        self.targets = np.asarray(targets, dtype=np.int64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        image, label = self.load(index)
        return image if self.transform is None else self.transform(image), label, index

    def load(self, index):
        """(PIL RGB image, label), untransformed."""
        source, _ = self.samples[int(self.rows[index])]
        image = Image.fromarray(source).convert("RGB") if isinstance(source, np.ndarray) else load_rgb(source)
        return image, int(self.targets[index])

    def source(self, index):
        """Path of an image; of one in memory its number."""
        source, _ = self.samples[int(self.rows[index])]
        return str(index) if isinstance(source, np.ndarray) else source

    def with_transform(self, transform):
        """The same images through another transform."""
        return ImageSet(self.name, self.root, self.samples, self.targets, self.classes, transform, self.rows)

    def select(self, places, name):
        """The images at `places` [m] (rising) as a set of its own, called `name`; the classes stay all."""
        return ImageSet(name, self.root, self.samples, self.targets[places], self.classes, self.transform,
                        self.rows[places])

    def paths(self):
        """Paths relative to `root` with forward slashes, in order. For images in memory their numbers, as text."""
        for row in self.rows.tolist():
            source, _ = self.samples[row]
            yield str(row) if isinstance(source, np.ndarray) else self._relative(source).replace(os.sep, "/")

    def _relative(self, path):
        return path.removeprefix(self.root + os.sep)  # relpath is many times slower

    def fingerprint(self):
        """sha256 over every image's path, label, size in bytes and time of change (in memory: its pixels)."""
        def states(first):
            lines, part = [], slice(first, first + 1024)
            for row, label in zip(self.rows[part].tolist(), self.targets[part].tolist(), strict=True):
                source, _ = self.samples[row]
                if isinstance(source, np.ndarray):
                    state = hashlib.sha256(source.tobytes()).hexdigest()
                else:
                    state = f"{self._relative(source)} {' '.join(map(str, file_state(source)))}"
                lines.append(f"{state} {label}\n")
            return "".join(lines).encode(errors="surrogateescape")

        digest = hashlib.sha256(json.dumps(list(self.classes)).encode())
        with ThreadPoolExecutor(16) as pool:  # on network drives each look takes a while
            for block in pool.map(states, range(0, len(self), 1024)):
                digest.update(block)
        return digest.hexdigest()


def epoch_order(n, seed, epoch):
    """The order of the images in an epoch: a permutation, int64 [n], that depends on nothing else."""
    seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- data sets

def image_sets(dataset, data_path=None, train_transform=None, val_transform=None, train_subset=None, subset_seed=0,
               download=False):
    """The training and validation images of `dataset`, a name of DATASETS: two `ImageSet`s.

    Flowers train on their official training and validation images and are tested on the test images; Cars and CIFAR on
    their test images.

    Args:
        data_path: folder of the data; by default the first entry of DATASETS.
        train_transform, val_transform: PIL RGB image -> item.
        train_subset: None, or the text of `--train_subset` (see `subset_places`); `subset_seed` is for its draw.
        download: let torchvision fetch what is missing; call it in one process only.

    Raises InputError, naming the folder and what is expected in it, for missing or damaged data.
    """
    default, expected = DATASETS[dataset]
    root = Path(default if data_path is None else data_path).expanduser()
    if download:
        if dataset not in DOWNLOADABLE:
            raise engine.InputError(f"--download: {dataset} cannot be fetched; put {expected} into {root}")
        if engine.get_world_size() > 1:
            raise engine.InputError("--download: fetch the data in one process first, then start several")
    elif dataset != "imagefolder" and not root.is_dir():
        raise engine.InputError(_missing(dataset, root, "no such folder"))
    try:
        parts = _SOURCES[dataset](dataset, root, download)
    except engine.InputError:
        raise
    except (RuntimeError, OSError, ValueError, TypeError, LookupError) as error:
        raise engine.InputError(_missing(dataset, root, str(error).partition(". ")[0])) from error
    train, val = (ImageSet(f"{dataset} {name}", root, *part, transform) for name, part, transform
                  in zip(("train", "val"), parts, (train_transform, val_transform), strict=True))
    if train_subset is not None:
        train = train.select(subset_places(train, train_subset, subset_seed),
                             f"{train.name} subset {Path(train_subset).name}")
    return train, val


def _missing(dataset, root, reason):
    hint = "; --download fetches it" if dataset in DOWNLOADABLE else ""
    return f"--dataset {dataset}: cannot be read from {root} ({reason}); expected there: {DATASETS[dataset][1]}{hint}"


def image_folders(data_path, size, normalize=normalize):
    """The data sets DATA/train and DATA/val of (image, label, index), both through `eval_transform(size, normalize)`.

    Labels follow train's sorted class folders: a class of val gets the number of train's folder of the same name, so
    that val may lack classes. Raises InputError for a missing or empty folder and for a class that train does not have.
    """
    transform = eval_transform(size, normalize)
    train, val = (ImageFolderInstance(Path(data_path) / part, transform) for part in ("train", "val"))
    _renumber(train, val)
    return train, val


def _renumber(train, val):
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise engine.InputError(f"data folder {val.root}: {len(unknown)} class folder(s) that {train.root} lacks: "
                               f"{', '.join(unknown[:5])}")
    number = [train.class_to_idx[name] for name in val.classes]
    val.samples = val.imgs = [(path, number[label]) for path, label in val.samples]
    val.targets = [label for _, label in val.samples]
    val.classes, val.class_to_idx = train.classes, train.class_to_idx


# Each source gives ((samples, targets, classes) of train, the same of val).

def _from_folders(dataset, root, download):
    names = {"imagefolder": ("train", "val"), "inat2021": ("2021_train", "2021_valid"),
             "inat2021_mini": ("2021_train_mini", "2021_valid")}[dataset]
    if download:
        for name in names:
            torchvision.datasets.INaturalist(root, version=name, download=True)
    for name in names:
        if dataset != "imagefolder" and not (root / name).is_dir():
            raise FileNotFoundError(f"no {name}/")
    train, val = (CheckedImageFolder(root / name) for name in names)
    _renumber(train, val)
    return [(part.samples, part.targets, part.classes) for part in (train, val)]


def _from_cifar(dataset, root, download):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    parts = [kind(root, train=train, download=download) for train in (True, False)]
    return [(list(zip(part.data, part.targets, strict=True)), part.targets, part.classes) for part in parts]


def _from_flowers(dataset, root, download):
    """As torchvision keeps them, in flowers-102/, or as the reference does, without that folder."""
    if download:
        torchvision.datasets.Flowers102(root, download=True)
    base = root / "flowers-102" if (root / "flowers-102").is_dir() else root
    labels, ids = read_mat(base / "imagelabels.mat")["labels"], read_mat(base / "setid.mat")
    if not (base / "jpg").is_dir():
        raise FileNotFoundError("no jpg/")
    # Images and labels are numbered from 1.
    train, val, test = ([(str(base / "jpg" / f"image_{number:05d}.jpg"), int(labels[number - 1]) - 1)
                         for number in np.atleast_1d(ids[name])] for name in ("trnid", "valid", "tstid"))
    classes = [str(label) for label in range(102)]
    return [(samples, [label for _, label in samples], classes) for samples in (sorted(train + val), test)]


def _from_cars(dataset, root, download):
    """As torchvision keeps them, in stanford_cars/, or as the reference does, with one list of all images."""
    if (root / "stanford_cars").is_dir() or not (root / "cars_annos.mat").exists():
        parts = [torchvision.datasets.StanfordCars(root, split, loader=str) for split in ("train", "test")]
        return [(samples, [label for _, label in samples], parts[0].classes) for samples in map(_paths, parts)]
    # A record: path, four sides of a box, class from 1, whether the image is for tests.
    notes = [(str(root / str(note[0])), int(note[5]) - 1, bool(note[6]))
             for note in np.atleast_1d(read_mat(root / "cars_annos.mat")["annotations"])]
    classes = [str(label) for label in range(max(label for _, label, _ in notes) + 1)]
    parts = ([(path, label) for path, label, is_test in notes if is_test == wanted] for wanted in (False, True))
    return [(samples, [label for _, label in samples], classes) for samples in parts]


def read_mat(path):
    """Variables of a MATLAB file by name. Raises ValueError, naming the file, when it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name}")
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # a damaged file can make the reader raise anything
        raise ValueError(f"{path.name} cannot be read: {type(error).__name__}") from error


def _paths(dataset):
    """(path, label) of a torchvision data set that was made with `loader=str`, which hands the path through."""
    return [(path, int(label)) for path, label in (dataset[i] for i in range(len(dataset)))]


def _from_inat_lists(dataset, root, download):
    """The competition's lists; torchvision has no such division of the images of these years."""
    year = dataset.removeprefix("inat")
    parts, numbers = [], {}
    for part in ("train", "val"):
        content = json.loads((root / f"{part}{year}.json").read_text())
        category = {note["image_id"]: note["category_id"] for note in content["annotations"]}
        if part == "train":
            numbers = {name: label for label, name in enumerate(sorted(set(category.values())))}
        samples = sorted((str(root / image["file_name"]), numbers[category[image["id"]]]) for image in content["images"])
        parts.append((samples, [label for _, label in samples], [str(name) for name in numbers]))
    if not (root / f"train_val{year}").is_dir():
        raise FileNotFoundError(f"no train_val{year}/")
    return parts


_SOURCES = {"imagefolder": _from_folders, "inat2021": _from_folders, "inat2021_mini": _from_folders,
            "cifar10": _from_cifar, "cifar100": _from_cifar, "flowers": _from_flowers, "cars": _from_cars,
            "inat2018": _from_inat_lists, "inat2019": _from_inat_lists}


# ---------------------------------------------------------------- subsets

def subset_places(images, text, seed=0):
    """Places, rising, of the images of a `--train_subset`: int64 numpy array [m].

    `text` is the name of a file with one image per line, as the published lists of 1 % and 10 % of ImageNet (Chen et
    al., 2020): the name of an image, or CLASS/NAME; empty lines are skipped. Or it is a fraction in (0, 1): of each
    class that share is drawn, rounded, at least one image. The draw depends on `seed` and the labels alone.
    """
    if Path(text).is_file():
        return _listed(images, Path(text))
    try:
        fraction = float(text)
    except ValueError:
        raise engine.InputError(f"--train_subset {text}: no such file, nor a fraction") from None
    if not 0 < fraction < 1:
        raise engine.InputError(f"--train_subset {text}: a fraction must be above 0 and below 1")
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(images.targets):
        places = np.flatnonzero(images.targets == label)
        drawn.append(rng.permutation(places)[:max(1, round(fraction * len(places)))])
    return np.sort(np.concatenate(drawn))


def _listed(images, path):
    try:
        wanted = {line.strip() for line in path.read_text().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise engine.InputError(f"--train_subset {path}: cannot be read as text ({type(error).__name__})") from error
    if not wanted:
        raise engine.InputError(f"--train_subset {path}: the list is empty")
    places, found, twice = [], set(), set()
    for place, name in enumerate(images.paths()):
        # NAME, CLASS/NAME or the path below the data folder.
        hits = wanted.intersection((name, name.rpartition("/")[2], "/".join(name.split("/")[-2:])))
        if hits:
            places.append(place)
            twice |= hits & found
            found |= hits
    for names, problem in ((wanted - found, f"are not among the {len(images)} images of {images.name}"),
                           (twice, "stand for several images; write CLASS/NAME")):
        if names:
            raise engine.InputError(f"--train_subset {path}: {len(names)} names {problem}: {', '.join(sorted(names)[:3])}")
    return np.array(places)
