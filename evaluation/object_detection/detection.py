"""A detector on a pre-trained backbone: recipes by network, flags, how it is built and saved, and its evaluation.

Letters: see `cascade`.
"""
import json
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import engine
import models
from evaluation.common.arguments import int_from, probability
from evaluation.common.dense import DenseBackbone, dense_parser, filled, load_dense_backbone
from evaluation.object_detection.cascade import CascadeMaskRCNN, paste_mask
from evaluation.object_detection.coco import Categories, as_results, average_precision, collate, truth_of
from evaluation.object_detection.draw import draw_detections
from images import PixelStats, check_pixel_stats, load_rgb
from models.pretrained import registers_of

# What the paper's numbers were made with (Appendix C and the published commands), for a batch of that many images; the
# Swin's is that of its authors. Rates are not scaled with the batch.
RECIPES = {
    "vit_small": {"batch": 32, "batch_size_per_gpu": 4, "layer_decay": 0.8, "drop_path": 0.1, "grid": [50, 63]},
    "vit_base": {"batch": 16, "batch_size_per_gpu": 2, "layer_decay": 0.75, "drop_path": 0.2, "grid": [42, 68]},
    "swin_tiny": {"batch": 16, "batch_size_per_gpu": 2, "layer_decay": 1.0, "drop_path": 0.0, "grid": None},
}
COMMON = {"lr": 1e-4, "weight_decay": 0.05}
FILES = engine.Files(others=("detections.png",))
PROGRESS = {**engine.PROGRESS, "metrics": {}}  # of the finished detector
# What a detector is built from again, with numbers that a file may have; "grid" and the images' sizes beside.
NETWORK = ("patch_size", "window_size", "channels", "hidden", "sampled", "train_proposals", "test_proposals",
           "anchor_scale", "test_side", "long_side")


def recipe_of(arch):
    """The settings of RECIPES and COMMON for a network; those of a like one where it has none."""
    arch = arch.replace("deit_", "vit_")
    like = "swin_tiny" if arch.startswith("swin") else "vit_base" if arch == "vit_large" else "vit_small"
    return COMMON | RECIPES.get(arch, RECIPES[like])


def training_parser(description):
    """All flags of training; those without a default have the recipe's of the network."""
    parser = dense_parser(description)
    parser.set_defaults(data_path="data/coco", num_workers=engine.default_workers())
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=int_from(1), default=12, help="36 in the reference's files (with --drops 27 33)")
    schedule.add_argument("--drops", type=int_from(0), nargs="*", default=[8, 11],
                          help="epochs, from 0 on, at whose start the rate falls to a tenth")
    schedule.add_argument("--warmup_iters", type=int_from(0), default=500, help="updates of linear warm-up from lr / 1000")
    augment = parser.add_argument_group("images")
    augment.add_argument("--flip", type=probability, default=0.5, help="probability of a horizontal flip")
    augment.add_argument("--short_sides", type=int_from(16), nargs="+", default=list(range(480, 801, 32)),
                         help="of these the shorter side is drawn in training")
    augment.add_argument("--long_side", type=int_from(16), default=1333, help="most pixels of the longer side")
    augment.add_argument("--crop_sides", type=int_from(16), nargs="+", default=[400, 500, 600],
                         help="the shorter side before the crop, which half of the images get")
    augment.add_argument("--crop_range", type=int_from(16), nargs=2, default=[384, 600], help="of the crop's sides")
    augment.add_argument("--test_side", type=int_from(16), default=800, help="the shorter side in tests")
    network = parser.add_argument_group("network")
    network.add_argument("--grid", type=int_from(1), nargs=2, metavar=("ROWS", "COLUMNS"),
                         help="patches that a ViT's positions are resized to once and trained for; default: the recipe's")
    network.add_argument("--final_norm", default=False, help="take a ViT's maps through its final norm", **engine.SWITCH)
    network.add_argument("--channels", type=int_from(8), default=256, help="of the pyramid and the heads")
    network.add_argument("--hidden", type=int_from(8), default=1024, help="width of the box heads' hidden layer")
    network.add_argument("--anchor_scale", type=int_from(1), default=8, help="side of the anchors in cells of their map")
    network.add_argument("--sampled", type=int_from(8), default=512, help="boxes of an image that each stage learns from")
    network.add_argument("--train_proposals", type=int_from(8), default=2000, help="of an image, before the first stage")
    network.add_argument("--test_proposals", type=int_from(8), default=1000, help="the same in tests")
    return parser


# The reference's words and what they are called here.
OVERRIDES = {
    "data.samples_per_gpu": "batch_size_per_gpu", "data.workers_per_gpu": "num_workers", "lr_config.step": "drops",
    "lr_config.warmup_iters": "warmup_iters", "runner.max_epochs": "epochs", "optimizer.lr": "lr",
    "optimizer.weight_decay": "weight_decay", "optimizer.paramwise_cfg.layer_decay_rate": "layer_decay",
    "model.backbone.out_with_norm": "final_norm", "model.backbone.use_checkpoint": "grad_checkpointing",
    "model.backbone.drop_path_rate": "drop_path"}


# ---------------------------------------------------------------- building, saving

def build_detector(backbone, num_classes, network):
    """A `CascadeMaskRCNN` on a `DenseBackbone`; network: what `network_of` gives."""
    return CascadeMaskRCNN(backbone, backbone.channels, num_classes, network["channels"], network["hidden"],
                           network["sampled"], (network["train_proposals"], network["test_proposals"]),
                           network["anchor_scale"])


def network_of(args, source):
    """What a checkpoint says of the detector of `args` on an `EvaluatedBackbone`."""
    return {"arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
            **{name: getattr(args, name) for name in ("grid", "final_norm", *NETWORK[2:])},
            "mean": list(source.pixel_stats.mean), "std": list(source.pixel_stats.std)}


def new_detector(args, content, num_classes):
    """A detector on the backbone of a checkpoint's `content`.

    Returns: `args` with the recipe of its network where a flag was not given, the detector, the `EvaluatedBackbone`, and
    what a checkpoint says of the detector.
    """
    arch = args.arch or engine.stored_args(content, args.pretrained_weights).get("arch", "vit_small")
    args = Namespace(**filled(vars(args), {**recipe_of(str(arch)), "arch": arch}))
    backbone, source = load_dense_backbone(
        args.pretrained_weights, args.checkpoint_key, arch, args.patch_size, args.window_size, args.drop_path,
        args.grad_checkpointing, content, final_norm=args.final_norm, grid=args.grid)
    network = network_of(args, source)
    return args, build_detector(backbone, num_classes, network), source, network


def load_detector(path):
    """A finished or running training's detector, from its checkpoint: (network in evaluation mode, what the checkpoint says
    of it, `Categories`, settings for results.json, the checkpoint's content).

    Raises InputError, naming the file and the entry, for what is none or does not fit.
    """
    content = engine.read_checkpoint(Path(path), {"model": dict, "network": dict, "categories": dict, "settings": dict,
                                                  "source": dict}, "detection", PROGRESS)
    network, categories = content["network"], content["categories"]
    grid, names, ids = network.get("grid"), categories.get("names"), categories.get("ids")
    numbers = [*(network.get(name) for name in NETWORK), *(grid if isinstance(grid, list) else ())]
    if (network.get("arch") not in models.ARCHS
            or not all(type(number) is int and 1 <= number <= 2**12 for number in numbers)
            or grid is not None and (not isinstance(grid, list) or len(grid) != 2)
            or not {"checkpoint", "key"} <= content["source"].keys()
            or not (isinstance(names, list) and isinstance(ids, list) and 1 <= len(names) == len(ids) <= 2**14)):
        raise engine.InputError(f"checkpoint {path}: its entry 'network', 'categories' or 'source' cannot be used")
    stats = PixelStats(tuple(network.get("mean", ())), tuple(network.get("std", ())))
    check_pixel_stats(stats, f"checkpoint {path}: its mean", f"checkpoint {path}: its std")
    body = models.build_backbone(network["arch"], network["patch_size"], network["window_size"],
                                 img_size=network["patch_size"],  # a ViT's positions: one cell, which becomes the grid
                                 registers=registers_of(content["model"], "backbone.body."))
    backbone = DenseBackbone(body, grid=grid, final_norm=network.get("final_norm") is True)
    detector = build_detector(backbone, len(names), network)
    engine.load_strictly(detector, content["model"], path)
    return detector.eval(), network, Categories(ids, [str(name) for name in names]), content


# ---------------------------------------------------------------- evaluation

def to_device(found, device):
    """{name: tensor} of an image, on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in found.items()}


@torch.no_grad()
def detect(detector, images, sizes, originals, amp_dtype):
    """Detections of a batch on the detector's device, see `CascadeMaskRCNN.detect`, on the CPU."""
    device = next(detector.parameters()).device
    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        found = detector(images.to(device), sizes, originals=originals)
    return [to_device(own, "cpu") for own in found]


def masks_of(found, height, width):
    """The mask of each detection in the image, bool [height, width], one after the other."""
    return (paste_mask(part, box, height, width) for part, box in zip(found["maps"], found["boxes"], strict=True))


def evaluate(detector, dataset, process, amp_dtype, num_workers, fetch):
    """Average precision of the detector on `ValidationImages`, see `average_precision`; {} on all processes but 0.

    Each process takes every W-th image, one at a time; of an image results are kept as text, masks as run lengths.
    fetch: takes the next of an iterator's batches, None at its end, see `engine.Run.fetch`.
    """
    W = process.world_size
    loader = DataLoader(dataset, batch_size=1, sampler=range(process.rank, len(dataset), W), num_workers=num_workers,
                        collate_fn=collate, worker_init_fn=engine.ignore_signals)
    detector.eval()
    batches, lines = iter(loader), []
    for _ in range(-(-len(dataset) // W)):  # on all processes as often
        batch = fetch(batches)
        if batch is None:
            continue
        images, sizes, [record] = batch
        original = record["height"], record["width"]
        [found] = detect(detector, images, sizes, [original], amp_dtype)
        results = as_results(found, masks_of(found, *original), record["id"], dataset.categories)
        lines.append(json.dumps(results).encode())
    text = b"\n".join(lines) or b"[]"
    parts = engine.gather_parts(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(process.device))
    if process.rank:
        return {}
    results = [result for part in parts for line in part.cpu().numpy().tobytes().split(b"\n")
               for result in json.loads(line)]
    results.sort(key=lambda result: (result["image_id"], -result["score"]))  # whatever the number of processes
    return average_precision(dataset.root, results, [dataset.record(i)["id"] for i in range(len(dataset))])


def drawn_truth(dataset, count):
    """The first of `ValidationImages` with what is in them drawn: PIL images."""
    truths = [truth_of(dataset.record(index)) for index in range(min(count, len(dataset)))]
    return [draw_detections(load_rgb(dataset.source(index)), truth, truth["masks"].bool(), dataset.categories.names)
            for index, truth in enumerate(truths)]


def drawn_examples(detector, dataset, amp_dtype, count):
    """The same with what the detector finds."""
    pictures = []
    for index in range(min(count, len(dataset))):
        images, sizes, [record] = collate([dataset[index]])
        original = record["height"], record["width"]
        [found] = detect(detector, images, sizes, [original], amp_dtype)
        pictures.append(draw_detections(load_rgb(dataset.source(index)), found, masks_of(found, *original),
                                        dataset.categories.names))
    return pictures


def described(metrics):
    """What is printed of `average_precision`."""
    return "; ".join(f"{title}: " + "  ".join(f"{name.partition('_')[2]} {value:.2f}" for name, value in metrics.items()
                                              if name.startswith(kind))
                     for kind, title in (("bbox", "boxes"), ("segm", "masks")))
