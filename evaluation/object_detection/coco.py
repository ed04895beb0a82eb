"""COCO's images, boxes and masks (Lin et al., 2014): reading, augmentation, batches, and average precision by pycocotools.

Layout: ROOT/{train2017,val2017}/*.jpg and ROOT/annotations/instances_{train,val}2017.json. Boxes are x1, y1, x2, y2 in
pixels; labels count the sorted category ids from 0 on.

Letters: B images, G objects of an image, h x w pixels of an image, H x W of a batch, W (alone) processes.
"""
import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as v2

import engine
from evaluation.common.data import fitted, fitted_size, resize_pixels
from images import BadImage, load_or_replace, load_rgb, normalize

MULTIPLE = 32  # of which the sides of batches are
SMALLEST = 32  # training images with a shorter side are left out
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first of pycocotools' numbers


def coco_tools():
    """The package pycocotools with its modules; raises InputError where it is not installed."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError as error:
        raise engine.InputError(f"detection needs pycocotools: pip install pycocotools ({engine.one_line(error)})"
                                ) from error
    return pycocotools


# ---------------------------------------------------------------- reading

class Categories(NamedTuple):
    """Ids and names of the classes, by label."""
    ids: list
    names: list


def annotation_file(root, split):
    return Path(root) / "annotations" / f"instances_{split}2017.json"


def read_annotations(root, split):
    """(images, {image id: its annotations}, `Categories`) of a split, "train" or "val". Raises InputError."""
    path = annotation_file(root, split)
    try:
        content = json.loads(path.read_bytes())
        images, ids = content["images"], {image["id"] for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        found = {number: [] for number in ids}
        for annotation in content["annotations"]:
            found[annotation["image_id"]].append(annotation)
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise engine.InputError(f"{path}: no annotations as COCO has them ({engine.one_line(error)})") from error
    if not images or not names:
        raise engine.InputError(f"{path}: no images, or no categories")
    return images, found, Categories(sorted(names), [names[number] for number in sorted(names)])


def objects_of(image, annotations, labels):
    """{"boxes", "labels", "segmentations"}, lists, of an image's annotations that a detector learns from.

    Left out are crowds, other classes than `labels` (by category id), and boxes outside the image, without area or with a
    side below a pixel.
    """
    boxes, classes, segmentations = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        overlap = min(x + w, image["width"]) > max(x, 0) and min(y + h, image["height"]) > max(y, 0)
        if (annotation.get("ignore") or annotation.get("iscrowd") or annotation["category_id"] not in labels
                or not overlap or annotation["area"] <= 0 or w < 1 or h < 1):
            continue
        boxes.append([x, y, x + w, y + h])
        classes.append(labels[annotation["category_id"]])
        segmentations.append(annotation["segmentation"])
    return {"boxes": boxes, "labels": classes, "segmentations": segmentations}


def decode_masks(segmentations, height, width):
    """Polygons or run lengths, as COCO has them, as masks: uint8 [G, height, width] of 0 and 1."""
    tools = coco_tools().mask
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for i, parts in enumerate(segmentations):
        if isinstance(parts, list):
            runs = tools.merge(tools.frPyObjects(parts, height, width))
        else:
            runs = tools.frPyObjects(parts, height, width) if isinstance(parts["counts"], list) else parts
        masks[i] = tools.decode(runs)
    return torch.from_numpy(masks)


def truth_of(record):
    """{"boxes" [G, 4], "labels" int64 [G], "masks" uint8 [G, h, w]} of an image's record. Raises InputError for masks that
    are none."""
    try:
        masks = decode_masks(record["segmentations"], record["height"], record["width"])
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise engine.InputError(f"annotations of {record['file_name']}: a mask is not as COCO has them "
                                f"({engine.one_line(error)})") from error
    return {"boxes": torch.tensor(record["boxes"], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(record["labels"], dtype=torch.int64), "masks": masks}


class CocoImages(Dataset):
    """Images of a split and what is in them; `load` of the base of both data sets below.

    Training leaves out images without any annotation of a known class (a crowd is one), and those under 32 pixels.
    `categories`; `aspects`: float64 [images], width / height. Raises InputError for missing folders and bad annotations.
    """

    def __init__(self, root, split):
        coco_tools()
        self.root, self.folder = root, Path(root) / f"{split}2017"
        if not self.folder.is_dir():
            raise engine.InputError(f"--data_path {root}: no folder {self.folder}")
        images, annotations, self.categories = read_annotations(root, split)
        labels = {number: label for label, number in enumerate(self.categories.ids)}
        records, aspects = [], []
        try:
            for image in images:
                own = annotations[image["id"]]
                if split == "train" and (min(image["width"], image["height"]) < SMALLEST
                                         or not any(annotation["category_id"] in labels for annotation in own)):
                    continue
                aspects.append(image["width"] / image["height"])
                records.append(json.dumps({name: image[name] for name in ("id", "file_name", "width", "height")}
                                          | objects_of(image, own, labels)))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise engine.InputError(f"{annotation_file(root, split)}: image {engine.printable(image)} or its annotations "
                                    f"are not as COCO has them ({engine.one_line(error)})") from error
        if not records:
            raise engine.InputError(f"{annotation_file(root, split)}: no image can be used")
        # In two arrays: reference counting would copy all these Python objects into every loader process.
        records = [record.encode() for record in records]
        self.records, self.ends = np.frombuffer(b"".join(records), np.uint8), np.cumsum([len(own) for own in records])
        self.aspects = np.array(aspects)

    def __len__(self):
        return len(self.ends)

    def record(self, index):
        """What the annotations say of an image: "id", "file_name", "width", "height", and its `objects_of`."""
        return json.loads(self.records[self.ends[index - 1] if index else 0:self.ends[index]].tobytes())

    def source(self, index):
        """Path of an image."""
        return str(self.folder / self.record(index)["file_name"])

    def load(self, index):
        """(image uint8 [3, h, w], its `record`). Raises `BadImage`, also for another size than the annotations say."""
        record = self.record(index)
        path = self.folder / record["file_name"]
        image = v2.pil_to_tensor(load_rgb(path))
        if image.shape[1:] != (record["height"], record["width"]):
            raise BadImage(f"{path}: has {image.shape[2]} x {image.shape[1]} pixels, its annotations are for "
                           f"{record['width']} x {record['height']}")
        return image, record


class TrainingImages(CocoImages):
    """(image [3, h, w], {"boxes", "labels", "masks"}), indexed by (epoch, place in its order, index of the image).

    What is drawn depends on (seed, epoch, place) alone. `on_bad_image`, `bad`: see `load_or_replace`.
    """

    def __init__(self, root, augment, normalize=normalize, seed=0, on_bad_image="skip"):
        super().__init__(root, "train")
        self.augment, self.normalize, self.seed, self.on_bad_image = augment, normalize, seed, on_bad_image
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def __getitem__(self, item):
        epoch, place, index = item
        rng = np.random.default_rng((self.seed, epoch, place))
        image, record = load_or_replace(self, index, rng)
        truth = truth_of(record)
        image, boxes, labels, masks = self.augment(image, truth["boxes"], truth["labels"], truth["masks"], rng)
        return self.normalize(image), {"boxes": boxes, "labels": labels, "masks": masks.bool()}


class ValidationImages(CocoImages):
    """(image [3, h, w] in the size of tests, its `record`), indexed from 0 on."""

    def __init__(self, root, short=800, long=1333, normalize=normalize):
        super().__init__(root, "val")
        self.short, self.long, self.normalize = short, long, normalize

    def __getitem__(self, index):
        image, record = self.load(index)
        return self.normalize(fitted(image, self.short, self.long)), record


# ---------------------------------------------------------------- augmentation

class Augment:
    """A flip, and either another size, or another size, a crop and again another size (Appendix C).

    Args:
        flip: its probability. sides: of the shorter side, one is drawn. long: most pixels of the longer side.
        crop_sides: the same before the crop. crop_range: least and most of the crop's height and width, drawn apart.
    """

    def __init__(self, flip=0.5, sides=tuple(range(480, 801, 32)), long=1333, crop_sides=(400, 500, 600),
                 crop_range=(384, 600)):
        self.flip, self.sides, self.long, self.crop_sides, self.crop_range = flip, sides, long, crop_sides, crop_range

    def __call__(self, image, boxes, labels, masks, rng):
        """Of an image, uint8 [3, h, w], boxes [G, 4], labels [G] and masks uint8 [G, h, w] the changed ones.

        rng: numpy's generator. An object that the crop leaves nothing of goes; there may be none left.
        """
        if rng.random() < self.flip:
            image, masks = image.flip(-1), masks.flip(-1)
            width = image.shape[2]
            boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
        if rng.random() < 0.5:
            image, boxes, masks = self.scale(image, boxes, masks, self.crop_sides, rng)
            image, boxes, labels, masks = self.crop(image, boxes, labels, masks, rng)
        image, boxes, masks = self.scale(image, boxes, masks, self.sides, rng)
        return image, boxes, labels, masks

    def scale(self, image, boxes, masks, sides, rng):
        height, width = image.shape[1:]
        size = fitted_size(height, width, int(rng.choice(sides)), self.long)
        ratio = boxes.new_tensor((size[1] / width, size[0] / height)).repeat(2)
        masks = F.interpolate(masks[None], size)[0] if len(masks) else masks.new_zeros(0, *size)  # nearest
        return resize_pixels(image, size), clip(boxes * ratio, *size), masks

    def crop(self, image, boxes, labels, masks, rng):
        (low, high), sides = self.crop_range, image.shape[1:]
        h, w = (int(rng.integers(min(side, low), min(side, high) + 1)) for side in sides)
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(sides, (h, w), strict=True))
        boxes = clip(boxes - boxes.new_tensor((left, top, left, top)), h, w)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        rows, columns = slice(top, top + h), slice(left, left + w)
        return image[..., rows, columns], boxes[kept], labels[kept], masks[kept][..., rows, columns]


def clip(boxes, height, width):
    """Boxes [G, 4] within an image."""
    return boxes.clamp(min=0).minimum(boxes.new_tensor((width, height, width, height)))


# ---------------------------------------------------------------- batches

def collate(samples):
    """(images [B, 3, H, W] padded with 0 to multiples of 32, [(h, w)], [what is known of each]) of a list of samples."""
    sizes = [tuple(image.shape[1:]) for image, _ in samples]
    height, width = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*sizes, strict=True))
    images = torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image, _ in samples])
    return images, sizes, [known for _, known in samples]


class GroupedBatches:
    """Batch sampler: this process's batches of an epoch, each of landscapes or of other images alone.

    Both groups are shuffled and filled up with repeats to whole batches, which are shuffled; of these too some are
    repeated, so that all processes make `steps` whole updates. Set `epoch`, and `start`: the updates made.
    """

    def __init__(self, aspects, batch_size, accum_iter, process, seed):
        self.landscape, self.batch_size, self.process, self.seed = aspects > 1, batch_size, process, seed
        self.accum_iter, self.epoch, self.start = accum_iter, 0, 0
        batches = sum(-(-count // batch_size) for count in (self.landscape.sum(), (~self.landscape).sum()))
        self.steps = int(-(-batches // (process.world_size * accum_iter)))

    def __len__(self):
        return (self.steps - self.start) * self.accum_iter

    def __iter__(self):
        rng, size = np.random.default_rng((self.seed, self.epoch)), self.batch_size
        batches = []
        for group in (self.landscape, ~self.landscape):
            order = rng.permutation(np.flatnonzero(group))
            batches += np.resize(order, (-(-len(order) // size), size)).tolist()
        W = self.process.world_size
        order = np.resize(rng.permutation(len(batches)), self.steps * self.accum_iter * W)
        for place in range(self.start * self.accum_iter * W + self.process.rank, len(order), W):
            yield [(self.epoch, place * size + i, index) for i, index in enumerate(batches[order[place]])]


# ---------------------------------------------------------------- average precision

def as_results(found, masks, image_id, categories):
    """A list of what is found in an image, as COCO writes results; masks as run lengths.

    found: of `CascadeMaskRCNN.detect`; masks: an iterator over bool [h, w] of each detection, of which one at a time is
    held.
    """
    tools, results = coco_tools().mask, []
    boxes = torch.cat((found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]), dim=1)
    for box, score, label, mask in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), masks,
                                       strict=True):
        runs = tools.encode(np.asfortranarray(mask.cpu().numpy().view(np.uint8)))
        results.append({"image_id": image_id, "category_id": categories.ids[label], "bbox": box, "score": score,
                        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()}})
    return results


def average_precision(root, results, image_ids):
    """{"bbox_AP": percent, ..., "segm_APl": percent} of results for those images of the validation set.

    Left out is what is not defined, as the AP of large objects where there are none. Without results all are 0.
    """
    if not results:  # loadRes refuses an empty list
        return {f"{kind}_{name}": 0.0 for kind in ("bbox", "segm") for name in METRICS}
    tools, metrics = coco_tools(), {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tools.coco.COCO(str(annotation_file(root, "val")))
        truth.dataset.setdefault("info", {})
        for kind in ("bbox", "segm"):
            # Given a box, pycocotools would take its area for that of the mask.
            own = results if kind == "bbox" else [{name: value for name, value in result.items() if name != "bbox"}
                                                  for result in results]
            evaluation = tools.cocoeval.COCOeval(truth, truth.loadRes(own), kind)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics |= {f"{kind}_{name}": 100 * float(value)
                        for name, value in zip(METRICS, evaluation.stats, strict=False) if value >= 0}
    return metrics
