"""ADE20K's scene parsing (Zhou et al., 2017): its folders, the augmentation of training images, the scores.

Letters: H, W pixels of an image, K classes, B images per process and batch, W processes.
"""
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

import engine
from evaluation.common import davis
from evaluation.common.data import epoch_order, fitted, fitted_size, resize_pixels
from images import IMAGENET, BadImage, load_or_replace, load_rgb, normalize

IGNORED = 255  # label of pixels that do not count
RATIOS = (0.5, 2.0)  # of training images to those of tests
CROPS, MOST_OF_A_CLASS = 10, 0.75  # crops that are drawn again while one class has more of the pixels
FLOOR = v2.InterpolationMode.NEAREST


# ---------------------------------------------------------------- files

def read_pairs(root, split):
    """[(path of an image, path of its annotation)] of `training` or `validation`, by name. Raises InputError."""
    images, annotations = (Path(root) / kind / split for kind in ("images", "annotations"))
    for folder in (images, annotations):
        if not folder.is_dir():
            raise engine.InputError(f"--data_path {root}: no folder {folder}; ADE20K has images/ and annotations/, each "
                                    "with training/ and validation/")
    found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in IMG_EXTENSIONS]
    pairs = [(path, annotations / f"{path.stem}.png") for path in found]
    lacking = [label.name for _, label in pairs if not label.is_file()]
    if lacking or not pairs:
        what = f"{len(lacking)} images have no annotation, the first {lacking[0]}" if lacking else f"no image in {images}"
        raise engine.InputError(f"--data_path {root}: {what}")
    return pairs


def read_labels(path, classes):
    """Labels uint8 [H, W] of an annotation: 0..K-1 for its values 1..K, IGNORED for 0 (other) and 255.

    Raises `BadImage` for a file that cannot be read, InputError for values beyond K.
    """
    try:
        values, _ = davis.read_labels(path)
    except engine.InputError as error:
        raise BadImage(str(error)) from error
    highest = int(values.max(where=values != IGNORED, initial=0))
    if highest > classes:
        raise engine.InputError(f"{path}: class {highest}, but --num_classes is {classes}")
    return np.where(values == IGNORED, IGNORED, values - np.uint8(1))  # 0 becomes 255 by itself


def class_names(root, classes):
    """Names of the classes: of objectInfo150.txt in the data folder, else their numbers."""
    path = Path(root) / "objectInfo150.txt"
    rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].isdigit()}
    return [engine.printable(names.get(number, f"class {number}"), 30) for number in range(1, classes + 1)]


# ---------------------------------------------------------------- colours

def change_saturation(image, factor):
    """uint8 [3, H, W] with HSV's saturation times `factor`, at most 1; hue and value stay."""
    x = image.float()
    value, low = x.amax(dim=0), x.amin(dim=0)
    room = value / (value - low).clamp(min=1e-6)  # factor at which the saturation is 1
    return (value - (value - x) * room.clamp(max=factor)).round().clamp(0, 255).to(torch.uint8)


def distort(image, rng):
    """Photometric distortion of uint8 [3, H, W]: each change with probability 1/2, contrast second or last."""
    def scaled(x, factor, shift):
        return (x.float() * factor + shift).clamp(0, 255).to(torch.uint8)

    def contrast(x):
        return scaled(x, rng.uniform(0.5, 1.5), 0) if rng.random() < 0.5 else x

    if rng.random() < 0.5:
        image = scaled(image, 1, rng.uniform(-32, 32))
    last = rng.random() < 0.5
    if not last:
        image = contrast(image)
    if rng.random() < 0.5:
        image = change_saturation(image, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:  # an integer on OpenCV's scale of 0..179
        image = vision.adjust_hue(image, int(rng.integers(-18, 18)) / 180)
    return contrast(image) if last else image


# ---------------------------------------------------------------- training

def crop_place(labels, side, rng):
    """(top, left) of a crop of labels uint8 [H, W]: drawn again while it has one class, or too much of one."""
    height, width = labels.shape
    for _ in range(CROPS + 1):
        top, left = (int(rng.integers(max(length - side, 0) + 1)) for length in (height, width))
        counts = labels[top:top + side, left:left + side].flatten().bincount(minlength=256)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum():
            break
    return top, left


def train_sample(image, labels, rng, side, bounds, stats=IMAGENET):
    """uint8 [3, H, W] and labels uint8 [H, W] -> normalised float32 [3, side, side], int64 [side, side].

    Another size, a crop, a flip, other colours; padded at the right and at the bottom, with 0 after normalisation and with
    IGNORED. All is drawn by the numpy generator `rng`. bounds: most of the shorter and of the longer side in tests.
    """
    ratio = rng.uniform(*RATIOS)
    size = fitted_size(*labels.shape, *(int(bound * ratio) for bound in bounds))
    image, labels = resize_pixels(image, size), vision.resize(labels[None], size, FLOOR)[0]
    top, left = crop_place(labels, side, rng)
    image, labels = image[:, top:top + side, left:left + side], labels[top:top + side, left:left + side]
    if rng.random() < 0.5:
        image, labels = image.flip(2), labels.flip(1)
    image = normalize(distort(image, rng), stats)
    padding = (0, 0, side - labels.shape[1], side - labels.shape[0])
    return vision.pad(image, padding), vision.pad(labels[None], padding, fill=IGNORED)[0].long()


class TrainingImages(Dataset):
    """`train_sample`s, indexed by (pass over the images, place in its order, index): what is drawn depends on these and the
    seed alone. `on_bad_image`, `bad` (shared with the workers): see `load_or_replace`; options: of `train_sample`."""

    def __init__(self, pairs, classes, seed, on_bad_image, **options):
        self.pairs, self.classes, self.seed, self.on_bad_image, self.options = pairs, classes, seed, on_bad_image, options
        self.bad = torch.zeros(len(pairs), dtype=torch.uint8).share_memory_()

    def __len__(self):
        return len(self.pairs)

    def source(self, index):
        """Path of an image; it is bad too if its annotation is."""
        return str(self.pairs[index][0])

    def load(self, index):
        """uint8 [3, H, W], labels uint8 [H, W]. Raises `BadImage`."""
        return load_pair(self.pairs[index], self.classes)

    def __getitem__(self, item):
        rng = np.random.default_rng((self.seed, *item[:2]))
        return train_sample(*load_or_replace(self, item[2], rng), rng, **self.options)


def load_pair(pair, classes):
    """uint8 [3, H, W] of an image, uint8 [H, W] of its annotation. Raises `BadImage`, also where their sizes differ."""
    image, labels = load_rgb(pair[0]), read_labels(pair[1], classes)
    if image.size != labels.shape[::-1]:
        raise BadImage(f"{pair[1]}: {labels.shape[1]} x {labels.shape[0]} pixels, its image has {image.width} x "
                       f"{image.height}")
    return vision.pil_to_tensor(image), torch.from_numpy(labels)


class RandomBatches:
    """Batch sampler: this process's batches `start` to `stop` of endless passes over n images, each in an order of its own.

    Of a pass the last, incomplete batch of all processes is left out. Items are those of `TrainingImages`.
    """

    def __init__(self, n, batch_size, process, seed, stop):
        self.n, self.batch_size, self.process, self.seed, self.start, self.stop = n, batch_size, process, seed, 0, stop
        self.in_pass = n // (batch_size * process.world_size)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        own, W = self.batch_size, self.process.world_size
        turn = order = None
        for number in range(self.start, self.stop):
            if number // self.in_pass != turn:
                turn = number // self.in_pass
                order = epoch_order(self.n, self.seed, turn)
            first = number % self.in_pass * own * W
            yield [(turn, place, int(order[place])) for place in range(first + self.process.rank, first + own * W, W)]


# ---------------------------------------------------------------- tests

class TestImages(Dataset):
    """(normalised float32 [3, h, w] at the size of tests, labels uint8 [H, W], index)."""

    def __init__(self, pairs, classes, bounds, stats=IMAGENET):
        self.pairs, self.classes, self.bounds, self.stats = pairs, classes, bounds, stats

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, labels = load_pair(self.pairs[index], self.classes)
        return normalize(fitted(image, *self.bounds), self.stats), labels, index


def confusion(labels, predicted, classes):
    """How many pixels of class g were taken for p: int64 [K, K]; labels and predictions uint8 of one shape."""
    counted = labels != IGNORED
    places = labels[counted].long() * classes + predicted[counted].long()
    return places.bincount(minlength=classes ** 2).view(classes, classes)


def scores(matrix):
    """({"mIoU", "mAcc", "aAcc"}, IoU [K], accuracy [K]) of a `confusion`, in percent; not a number where undefined.

    The means are over the classes that have a value: IoU for those that are there or were predicted, accuracy for those
    that are there.
    """
    matrix = matrix.double().cpu()
    right, there, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, accuracy = 100 * right / (there + predicted - right), 100 * right / there
    means = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": 100 * right.sum() / there.sum()}
    return {name: float(value) for name, value in means.items()}, iou, accuracy
