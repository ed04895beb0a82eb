"""COCO's data: what is learnt from, augmentation, batches, and average precision against numbers worked out by hand."""
import json

import numpy as np
import pytest
import torch
from dense_data import make_coco
from PIL import Image

import engine
from engine import Process
from evaluation.common.data import fitted_size
from evaluation.object_detection import coco
from evaluation.object_detection.coco import (
    Augment,
    Categories,
    GroupedBatches,
    TrainingImages,
    ValidationImages,
    as_results,
    average_precision,
    collate,
    decode_masks,
)

pytest.importorskip("pycocotools")
PLAIN = Augment(flip=0, sides=(80,), long=200, crop_sides=(80,), crop_range=(60, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco"))


def read(folder, split="train"):
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


# ---------------------------------------------------------------- reading

def test_which_images_and_objects_are_learnt_from(folder):
    images = TrainingImages(folder, PLAIN)
    assert images.categories == Categories([1, 3, 90], ["disc", "triangle", "square"])
    records = {images.record(i)["id"]: images.record(i) for i in range(len(images))}
    assert set(records) == {0, 1, 3, 4, 5, 7}  # without 2, which has nothing, and 6, which is 24 pixels wide
    assert records[3]["boxes"] == []  # a crowd alone: all background
    annotations = [a for a in read(folder)["annotations"] if a["image_id"] == 5 and a["category_id"] != 77 and a["bbox"][2] >= 1]
    assert len(records[5]["boxes"]) == len(annotations) and set(records[5]["labels"]) <= {0, 1, 2}
    assert [-5, 20, 20, 40] in records[5]["boxes"]
    image, record = images.load([images.record(i)["id"] for i in range(len(images))].index(1))
    assert image.shape == (3, record["height"], record["width"])  # a grey file
    assert len(ValidationImages(folder)) == 4


def test_masks_of_polygons_and_run_lengths():
    parts = [[0, 0, 10, 0, 10, 20, 0, 20], [20, 0, 30, 0, 30, 20, 20, 20]]
    runs = {"size": [20, 40], "counts": [0, 200, 200, 200, 200]}  # columns 0 to 9 and 20 to 29
    masks = decode_masks([parts, runs], 20, 40)
    assert masks.shape == (2, 20, 40) and torch.equal(masks[0], masks[1]) and masks[0].sum() == 400
    assert decode_masks([], 20, 40).shape == (0, 20, 40)


@pytest.mark.parametrize("change, words", [
    (lambda c: c.pop("images"), "no annotations as COCO has them"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2]), "are not as COCO has them"),
    (lambda c: c["annotations"][0].update(image_id=77), "no annotations as COCO has them"),
    (lambda c: c.update(categories=[]), "no images, or no categories")])
def test_bad_annotations_are_one_line(folder, tmp_path, change, words):
    content = read(folder)
    change(content)
    for name in ("train2017", "val2017"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(engine.InputError, match=words):
        TrainingImages(tmp_path, PLAIN)
    with pytest.raises(engine.InputError, match="instances_val2017.json: cannot be read"):
        ValidationImages(tmp_path)
    with pytest.raises(engine.InputError, match="no folder"):
        ValidationImages(tmp_path / "nothing")


def test_without_pycocotools_an_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(engine.InputError, match="pip install pycocotools"):
        ValidationImages(folder)


def test_an_image_of_another_size_is_a_bad_one(folder, tmp_path):
    root = make_coco(tmp_path, plain=True)
    images = TrainingImages(root, PLAIN)
    Image.new("RGB", (50, 40)).save(images.source(2))
    assert images[0, 0, 2][0].shape[0] == 3 and images.bad.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(engine.InputError, match="has 50 x 40 pixels, its annotations are for"):
        TrainingImages(root, PLAIN, on_bad_image="error")[0, 0, 2]


# ---------------------------------------------------------------- augmentation

@pytest.mark.parametrize("size, short, expected", [
    ((480, 640), 800, (800, 1067)), ((427, 640), 800, (800, 1199)), ((640, 427), 480, (719, 480)),
    ((333, 1000), 800, (444, 1333))])
def test_sizes(size, short, expected):
    assert fitted_size(*size, short, 1333) == expected


def drawn(height=427, width=640, count=300, **options):
    """What the policies draw: sizes of results, and of crops, by a watched `Augment`."""
    crops, finals, sides = [], [], []

    class Watched(Augment):
        def crop(self, image, *rest):
            result = super().crop(image, *rest)
            crops.append((tuple(image.shape[1:]), tuple(result[0].shape[1:])))
            return result

        def scale(self, image, boxes, masks, choices, rng):
            result = super().scale(image, boxes, masks, choices, rng)
            sides.append((len(choices), min(result[0].shape[1:])))
            return result

    augment = Watched(**options)
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), torch.tensor([[0.0, 0, 9, 9]])
    masks = torch.ones(1, height, width, dtype=torch.uint8)
    for seed in range(count):
        result = augment(image, boxes, torch.tensor([1]), masks, np.random.default_rng(seed))
        finals.append(result)
    return crops, finals, sides


def test_draws_of_both_policies():
    crops, finals, sides = drawn(60, 90, 400, sides=tuple(range(48, 81, 3)), crop_sides=(40, 50, 60), crop_range=(38, 60), long=133)
    assert 0.42 < len(crops) / len(finals) < 0.58  # a half each
    for (height, width), (h, w) in crops:
        assert height in (40, 50, 60) and min(height, 38) <= h <= min(height, 60) and 38 <= w <= min(width, 60)
    assert {before[0] for before, _ in crops} == {40, 50, 60}
    first = [side for choices, side in sides if choices == 11]
    assert set(first) <= set(range(48, 81, 3)) and len(set(first)) == 11  # each size
    counts = np.bincount([(side - 48) // 3 for side in first], minlength=11)
    assert counts.min() > 15 and counts.max() < 65  # of 400, 36 each
    assert all(len(boxes) == len(labels) == len(masks) for _, boxes, labels, masks in finals)
    assert any(not len(boxes) for _, boxes, *_ in finals)  # none left is allowed


def tight(mask):
    y, x = np.nonzero(mask.numpy())
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_boxes_stay_around_their_masks():
    mask = torch.zeros(1, 80, 120, dtype=torch.uint8)
    mask[0, 20:50, 30:90] = 1
    image = mask.expand(3, -1, -1) * 200
    for seed in range(30):
        changed, boxes, _, masks = Augment(sides=(64, 100), crop_sides=(70, 90), crop_range=(50, 70), long=200)(
            image, torch.tensor([[30.0, 20, 90, 50]]), torch.tensor([0]), mask, np.random.default_rng(seed))
        if len(boxes) and masks.any():
            cropped = np.random.default_rng(seed).random(2)[1] < 0.5  # then a pixel of before is two
            assert np.abs(boxes[0].numpy() - tight(masks[0])).max() <= 1 + 2 * cropped, seed
            assert ((changed[0] > 100) != masks[0].bool()).float().mean() < 0.05


def test_a_flip_and_what_a_crop_leaves():
    image, boxes = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40), torch.tensor([[0.0, 5, 10, 15], [30, 5, 40, 15]])
    masks = torch.zeros(2, 20, 40, dtype=torch.uint8)
    masks[0, 5:15, :10] = masks[1, 5:15, 30:] = 1
    flip = Augment(flip=1, sides=(20,), long=40, crop_sides=(20,), crop_range=(20, 40))
    flipped, moved, _, mirrored = next(r for r in (flip(image, boxes, torch.tensor([0, 1]), masks, np.random.default_rng(s))
                                                    for s in range(9)) if r[0].shape[2] == 40)
    assert flipped[0, 0, 0] == 39 and moved.tolist() == [[30, 5, 40, 15], [0, 5, 10, 15]] and mirrored[0, 10, 35] == 1

    class Left:  # draws a crop of 20 x 20 at the left
        def integers(self, low, high=None):
            return 20 if high is not None else 0
    part, left, labels, rest = Augment(crop_range=(20, 20)).crop(image, boxes, torch.tensor([0, 1]), masks, Left())
    assert part.shape == (3, 20, 20) and left.tolist() == [[0, 5, 10, 15]] and labels.tolist() == [0] and len(rest) == 1


def test_batches_are_padded_with_zeros(folder):
    images = TrainingImages(folder, PLAIN)
    samples = [images[0, 0, 0], images[0, 1, 1]]
    batch, sizes, targets = collate(samples)
    assert batch.shape[2] % 32 == 0 == batch.shape[3] % 32
    for padded, (image, _), (h, w) in zip(batch, samples, sizes, strict=True):
        assert torch.equal(padded[:, :h, :w], image) and not padded[:, h:].any() and not padded[:, :, w:].any()
    assert all(len(t["masks"]) == len(t["boxes"]) and t["masks"].dtype == torch.bool for t in targets)


def test_what_is_drawn_depends_on_the_place_alone(folder):
    images = TrainingImages(folder, Augment(sides=(64, 80), long=200, crop_sides=(60,), crop_range=(40, 60)))
    one, other = images[1, 5, 0], images[1, 5, 0]
    assert torch.equal(one[0], other[0]) and torch.equal(one[1]["boxes"], other[1]["boxes"])
    assert len({tuple(images[epoch, 5, 0][0].shape) + (float(images[epoch, 5, 0][0].sum()),) for epoch in range(4)}) > 1


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("size, accum, world", [(2, 1, 1), (4, 1, 3), (3, 2, 2)])
def test_batches_of_one_orientation(size, accum, world):
    aspects = np.array([1.5] * 17 + [0.7] * 6 + [1.0])
    samplers = [GroupedBatches(aspects, size, accum, Process(rank, world, rank, torch.device("cpu")), 3) for rank in range(world)]
    epochs = []
    for sampler in samplers:
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == sampler.steps * accum
        for batch in epochs[-1]:
            assert len(batch) == size and len({bool(aspects[index] > 1) for *_, index in batch}) == 1
    seen = [item for batches in epochs for batch in batches for item in batch]
    assert {index for *_, index in seen} == set(range(24))
    assert len({place for _, place, _ in seen}) == len(seen)  # each draws by itself, repeats too
    samplers[0].start = 1  # behind the first update
    assert list(samplers[0]) == epochs[0][accum:]
    samplers[0].start, samplers[0].epoch = 0, 1
    assert list(samplers[0]) != epochs[0]


# ---------------------------------------------------------------- average precision

BOX = [0, 0, 100, 100]  # x, y, w, h


def annotation(number, box, category=1, image=0, crowd=0):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    runs = coco.coco_tools().mask.frPyObjects([polygon], 200, 400)[0]
    segmentation = {"size": runs["size"], "counts": runs["counts"].decode()} if crowd else [polygon]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": w * h, "iscrowd": crowd,
            "segmentation": segmentation}


def precision(tmp_path, truth, found, metric="bbox_AP", images=1):
    """A metric of the detections [(box, score, category)] of image 0, for truth [(box, category, crowd)]."""
    (tmp_path / "annotations").mkdir(exist_ok=True)
    content = {"images": [{"id": i, "file_name": "x", "width": 400, "height": 200} for i in range(images)],
               "annotations": [annotation(i + 1, *own[:2], crowd=own[2] if len(own) > 2 else 0) for i, own in enumerate(truth)],
               "categories": [{"id": i, "name": str(i)} for i in sorted({own[1] for own in truth})]}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    ids = [category["id"] for category in content["categories"]]
    boxes = torch.tensor([own[0] for own in found], dtype=torch.float32)
    masks = torch.zeros(len(found), 200, 400, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y:y + h, x:x + w] = True
    boxes[:, 2:] += boxes[:, :2]
    results = as_results({"boxes": boxes, "scores": torch.tensor([own[1] for own in found]),
                          "labels": torch.tensor([ids.index(own[2]) for own in found])}, masks, 0, Categories(ids, ids))
    return average_precision(tmp_path, results, list(range(images))).get(metric)


FAR, SMALL, MEDIUM = [250, 50, 100, 100], [0, 0, 20, 20], [100, 0, 50, 50]


@pytest.mark.parametrize("truth, found, expected", [
    ([(BOX, 1)], [(BOX, 0.9, 1)], 1.0),
    ([(BOX, 1)], [([0, 0, 75, 100], 0.9, 1)], 0.6),  # IoU 0.75: six of ten thresholds
    ([(BOX, 1)], [([0, 0, 74.9, 100], 0.9, 1)], 0.5),
    ([(BOX, 1)], [(BOX, 0.8, 1), (FAR, 0.9, 1)], 0.5),
    ([(BOX, 1)], [(BOX, 0.8, 1), (FAR, 0.7, 1)], 1.0),
    ([(BOX, 1)], [(BOX, 0.8, 1), (BOX, 0.7, 1)], 1.0),  # found twice
    ([(BOX, 1), (FAR, 1)], [(BOX, 0.9, 1)], 51 / 101),  # 0.505: recall up to a half
    ([(BOX, 1), (FAR, 2)], [(BOX, 0.9, 1)], 0.5),  # of two classes
    ([(BOX, 1), (FAR, 1, 1)], [(BOX, 0.8, 1), ([260, 60, 50, 50], 0.9, 1)], 1.0)])  # within a crowd
def test_average_precision_by_hand(tmp_path, truth, found, expected):
    assert precision(tmp_path, truth, found) == pytest.approx(100 * expected, abs=1e-6)


def test_average_precision_by_size(tmp_path):
    truth, found = [(SMALL, 1), (MEDIUM, 1)], [(SMALL, 0.9, 1)]
    for kind in ("bbox", "segm"):
        values = [precision(tmp_path, truth, found, f"{kind}_{name}") for name in ("APs", "APm", "APl")]
        assert values == [pytest.approx(100), 0, None]  # there is no large one


def test_size_of_masks_is_their_own_area(tmp_path):
    """A thin mask in a large box: with the box in its results pycocotools would call it large, and miss it there."""
    (tmp_path / "annotations").mkdir()
    polygon = [0, 0, 120, 0, 0, 4]  # 240 pixels in a box of 120 x 120
    tools = coco.coco_tools().mask
    content = {"images": [{"id": 0, "file_name": "x", "width": 400, "height": 200}], "categories": [{"id": 1, "name": "1"}],
               "annotations": [{**annotation(1, [0, 0, 120, 120]), "segmentation": [polygon], "area": 240}]}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    mask = torch.from_numpy(tools.decode(tools.merge(tools.frPyObjects([polygon], 200, 400)))).bool()
    extra = torch.zeros_like(mask)
    extra[150:153, 200:360] = True  # a wrong one, also small by its mask and large by its box
    found = {"boxes": torch.tensor([[0.0, 0, 120, 120], [200, 20, 360, 180]]), "scores": torch.tensor([0.8, 0.9]),
             "labels": torch.tensor([0, 0])}
    results = as_results(found, [mask, extra], 0, Categories([1], ["1"]))
    assert average_precision(tmp_path, results, [0])["segm_APs"] == pytest.approx(50)  # the wrong one counts among the small


def test_nothing_found_is_zero(tmp_path):
    metrics = average_precision(tmp_path, [], [0])
    assert len(metrics) == 12 and not any(metrics.values())


def truth_as_results(folder):
    images, results = ValidationImages(folder), []
    annotations = read(folder, "val")["annotations"]
    for i in range(len(images)):
        record = images.record(i)
        own = [a for a in annotations if a["image_id"] == record["id"]]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found = {"boxes": boxes, "scores": torch.linspace(1, 0.5, len(own)),
                 "labels": torch.tensor([images.categories.ids.index(a["category_id"]) for a in own])}
        masks = decode_masks([a["segmentation"] for a in own], record["height"], record["width"]).bool()
        results += as_results(found, masks, record["id"], images.categories)
    return results, [images.record(i)["id"] for i in range(len(images))]


def test_the_truth_scores_a_hundred(folder):
    results, ids = truth_as_results(folder)
    metrics = average_precision(folder, results, ids)
    assert metrics["bbox_AP"] == pytest.approx(100) and metrics["segm_AP"] == pytest.approx(100)
    assert {result["category_id"] for result in results} <= {1, 3, 90}
    part = [result for result in results if result["image_id"] in ids[:2]]
    assert average_precision(folder, part, ids[:2])["bbox_AP"] == pytest.approx(100)  # of a part of the images


def test_numbers_of_faster_coco_eval(folder):
    """An independent implementation says the same of boxes and masks that are off."""
    faster = pytest.importorskip("faster_coco_eval")
    results, ids = truth_as_results(folder)
    rng = np.random.default_rng(0)
    for result in results:
        result["bbox"] = [value + float(rng.normal(0, 3)) for value in result["bbox"]]
        result["score"] = float(rng.random())
    metrics = average_precision(folder, results, ids)
    truth = faster.COCO(str(folder / "annotations" / "instances_val2017.json"))
    for kind in ("bbox", "segm"):
        own = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
        evaluation = faster.COCOeval_faster(truth, truth.loadRes(own), kind)
        evaluation.run()
        for name, value in zip(coco.METRICS, evaluation.stats, strict=False):
            if value >= 0:
                assert metrics[f"{kind}_{name}"] == pytest.approx(100 * value, abs=1e-9), (kind, name)
    assert 0 < metrics["bbox_AP"] < 100
