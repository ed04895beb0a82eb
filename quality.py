"""How good the teacher is while it trains (`--eval_every`): k-NN accuracy where there are labels, RankMe and LiDAR always.

Training is left as it is: a copy of the backbone is looked at, in single precision and uncompiled, as `eval_knn.py` would
look at the checkpoint; no random number is drawn.

Letters: B images of a batch, n images, q views of an image, D feature size, S side of an image in pixels.
"""
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import augmentation
import engine
import loader
from evaluation.common.data import eval_transform, image_sets
from evaluation.common.features import extract_features, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy
from evaluation.common.rank import lidar, rankme
from images import BadImage, CheckedImageFolder, normalize

K = 20  # neighbours
# Images of a part at most, evenly spread over it; docs/your_images.md has what they cost.
MOST = {"train": 10_000, "val": 5_000, "images": 5_000, "views": 1_000}
PAIRS, BATCH = 5, 128  # pairs of views of an image; images at a time
PATIENCE = 3
STATE = {"of": "", "best": -1.0, "epoch": -1, "last": -1.0, "falls": 0}  # what a checkpoint holds


class Sample(Dataset):
    """At most `most` of the images of a data set with `load` and `source`: items are (transform(image), label, number).

    Of one that cannot be read the label is -1. Whatever the transform draws depends on the number alone.
    """

    def __init__(self, images, most, transform):
        self.images, self.transform = images, transform
        self.places = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        try:
            image, label = self.images.load(int(self.places[index]))
        except BadImage:
            image, label = Image.new("RGB", (32, 32)), -1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(index)  # torch.manual_seed would seed the GPUs too
            return self.transform(image), label, index


class Fetched:
    """Batches of a DataLoader by way of `run.fetch`: when any process got a signal, all stop at the same one."""

    def __init__(self, run, batches):
        self.run, self.batches, self.dataset = run, batches, batches.dataset

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(partial(self.run.fetch, iter(self.batches), training=False), None)


@contextmanager
def undisturbed(device):
    """Afterwards random states and the precision of products are what they were."""
    states, precision = engine.random_state(device), torch.get_float32_matmul_precision()
    try:
        engine.use_fast_products(device)
        yield
    finally:
        engine.set_random_state(states, device)
        torch.set_float32_matmul_precision(precision)


def read_images(folder, dataset):
    """{"train": ..., "val": ...} of a folder with labels; {"images": ...} of images without or, for None, of training."""
    if folder and all((Path(folder) / part).is_dir() for part in ("train", "val")):
        return dict(zip(("train", "val"), image_sets("imagefolder", folder), strict=True))
    return {"images": CheckedImageFolder(folder, labelled=False) if folder else dataset}


def pairs_of_views(crops, image):
    """Views of a PIL image, drawn as its global crops in training: uint8 [q, 3, S, S]."""
    return torch.stack([crop for _ in range(PAIRS) for crop in crops(image)])


class Judge:
    """Looks at the teacher after epochs. `state` is what a checkpoint holds: see STATE."""

    def __init__(self, args, run, data_loader, backbone, pixel_stats):
        """Raises `engine.InputError` for an `--eval_data` that cannot be used."""
        self.args, self.run, self.workers = args, run, data_loader.num_workers
        self.model = deepcopy(backbone).cpu().float().eval().requires_grad_(False)
        self.normalize = partial(normalize, stats=pixel_stats)
        parts = read_images(args.eval_data, data_loader.dataset)
        plain = eval_transform(args.global_crops_size, self.normalize)
        self.samples = {name: Sample(images, MOST[name], plain) for name, images in parts.items()}
        crops = loader.MultiCropAugmentation(2, args.global_crops_scale, global_crops_size=args.global_crops_size,
                                             augment=augmentation.augment_of(args))
        first = next(iter(parts.values()))
        self.samples["views"] = Sample(first, MOST["views"], partial(pairs_of_views, crops))
        self.classes = len(first.classes)
        self.figure = "knn" if "val" in parts else "rankme"
        self.state = STATE | {"of": f"{self.figure} of {args.eval_data or 'the training images'}"}
        self._go_on((run.checkpoint or {}).get("quality", self.state))
        run.entries["quality"] = self.state
        if run.is_main:
            counts = ", ".join(f"{len(sample)} {name}" for name, sample in self.samples.items() if name != "views")
            print(f"quality every {args.eval_every} epochs: {f'{K}-NN, ' if self.figure == 'knn' else ''}RankMe and LiDAR "
                  f"({2 * PAIRS} views of {len(self.samples['views'])} images); images: {counts}", flush=True)

    def _go_on(self, stored):
        """From what a checkpoint holds, unless it is of other images."""
        engine.need(isinstance(stored, dict) and {k: type(v) for k, v in stored.items()} == {
            k: type(v) for k, v in STATE.items()}, f"checkpoint {self.run.path}: its entry 'quality' cannot be used")
        if stored["of"] == self.state["of"]:
            self.state |= stored

    def is_due(self, epoch):
        return (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs

    def __call__(self, backbone):
        """All processes call it together. Returns figures by name, and names for a checkpoint that is the best so far;
        both are empty but on process 0."""
        with undisturbed(self.run.process.device):
            self.model.to(self.run.process.device).load_state_dict(backbone.state_dict())
            found = {name: self._features(name) for name in self.samples}
            self.model.cpu()
        if not self.run.is_main:
            return {}, []
        (views, _), (features, labels) = found.pop("views"), next(iter(found.values()))
        figures = {}
        if self.figure == "knn":
            tests, expected = found["val"]
            k = min(K, len(features))
            ranked = knn_classify(features, labels, tests, self.classes, (k,), device=self.run.process.device)[k]
            figures["knn"] = topk_accuracy(ranked, expected)[0]
        figures |= {"rankme": rankme(features), "lidar": lidar(views.unflatten(1, (2 * PAIRS, -1)))}
        return figures, self._note(figures[self.figure])

    def _features(self, name):
        """Features, of "views" [n, q * D], else [n, D], and labels [n] of the images of a sample that can be read."""
        sample = self.samples[name]

        def pooled(images):
            if name != "views":
                return pool_features(self.model, images)
            return pool_features(self.model, self.normalize(images.flatten(0, 1))).view(len(images), -1)

        batches = sharded_loader(sample, BATCH if name != "views" else BATCH // (2 * PAIRS), self.workers, self.run.process,
                                 worker_init_fn=engine.ignore_signals)
        features, labels = extract_features(pooled, Fetched(self.run, batches), self.run.process, name, quiet=True)
        if not self.run.is_main:
            return None
        good, folder = labels >= 0, sample.images.root
        if not good.all():
            bad = [sample.images.source(place) for place in sample.places[~good.numpy()].tolist()]
            engine.need(good.any(), f"evaluation: of {folder} ({name}) no image can be read, the first is {bad[0]}")
            if name != "views":  # they are among the others
                engine.say_once(f"note: {len(bad)} of {len(good)} images of {folder} ({name}) cannot be read and are not "
                                f"evaluated; the first: {', '.join(bad[:10])}")
        return features[good], labels[good]

    def _note(self, value):
        """Note a value; returns names for the checkpoint. When it has fallen three times in a row, a sentence says so."""
        state, best = self.state, self.run.files.best
        state["falls"] = state["falls"] + 1 if value < state["last"] else 0
        state["last"] = value
        if value > state["best"]:
            state |= {"best": value, "epoch": self.run.epoch}
            return [best]
        if state["falls"] == PATIENCE:
            print(f"warning: {self.figure} has fallen {PATIENCE} times in a row, to {value:.4g}; it was best, "
                  f"{state['best']:.4g}, after epoch {state['epoch']}, whose checkpoint is {self.run.folder / best}",
                  flush=True)
        return []
