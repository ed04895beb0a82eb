"""Semantic segmentation as training and test share it: recipes, flags, building and reading networks, scores, pictures."""
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

import engine
import models
from evaluation.common import davis
from evaluation.common.arguments import int_from
from evaluation.common.data import fitted
from evaluation.common.dense import DenseBackbone, dense_parser, filled, load_dense_backbone
from evaluation.semantic_segmentation.ade20k import (
    IGNORED,
    TestImages,
    confusion,
    load_pair,
    scores,
)
from evaluation.semantic_segmentation.heads import Segmenter, predict
from images import PixelStats, check_pixel_stats, load_rgb, normalize
from models.pretrained import registers_of

# Published settings (iBOT, Appendix C; its command lines), for batches of 16 images; `width` is UPerNet's.
RECIPES = {
    ("upernet", "vit_small"): {"batch_size_per_gpu": 4, "lr": 3e-5, "layer_decay": 0.9, "weight_decay": 0.05,
                               "drop_path": 0.1, "width": 384, "inference": "slide"},
    ("upernet", "vit_base"): {"batch_size_per_gpu": 2, "lr": 8e-5, "layer_decay": 0.65, "weight_decay": 0.05,
                              "drop_path": 0.1, "width": 768, "inference": "slide"},
    ("upernet", "swin_tiny"): {"batch_size_per_gpu": 2, "lr": 6e-5, "layer_decay": 1.0, "weight_decay": 0.01,
                               "drop_path": 0.3, "width": 512, "inference": "whole"},
    ("linear", "vit_base"): {"batch_size_per_gpu": 4, "lr": 8e-4, "layer_decay": 1.0, "weight_decay": 0.05,
                             "drop_path": 0.0, "inference": "slide"},
}
RECIPES["linear", "vit_small"] = RECIPES["linear", "vit_base"]
BATCH = 16
PROTOCOLS = {"upernet": "ade20k_upernet", "linear": "ade20k_linear"}
# Numbers that build a network from its checkpoint, and the least of each.
NUMBERS = {"patch_size": 1, "window_size": 1, "num_classes": 1, "crop_size": 1, "width": 1, "short_side": 16,
           "long_side": 16, "slide_stride": 1}
# The reference's words and what they are called here.
OVERRIDES = {
    "data.samples_per_gpu": "batch_size_per_gpu", "data.workers_per_gpu": "num_workers", "runner.max_iters": "iterations",
    "lr_config.warmup_iters": "warmup_iterations", "optimizer.lr": "lr", "optimizer.weight_decay": "weight_decay",
    "optimizer.paramwise_cfg.layer_decay_rate": "layer_decay", "model.backbone.out_with_norm": "final_norm",
    "model.backbone.use_checkpoint": "grad_checkpointing", "model.backbone.drop_path_rate": "drop_path",
    "evaluation.interval": None, "checkpoint_config.interval": None}
FILES = engine.Files(others=("classes.tsv", "segmentations.png"))
PROGRESS = {**engine.PROGRESS, "metrics": {}}  # of the finished network


# ---------------------------------------------------------------- recipes and flags

def recipe_of(head, arch):
    """(the settings of RECIPES for a network, name of the network they are of: a like one where it has none)."""
    known = arch.replace("deit_", "vit_")
    if known.startswith("swin"):
        engine.need(head == "upernet", f"--head {head}: on a Swin there is UPerNet alone")
        known = "swin_tiny"
    elif (head, known) not in RECIPES:
        known = "vit_base" if known == "vit_large" else "vit_small"
    return RECIPES[head, known], known


def training_parser(description):
    """All flags of training; those without a default have the recipe's of the network."""
    parser = dense_parser(description)
    parser.set_defaults(data_path="data/ade/ADEChallengeData2016")
    network = parser.add_argument_group("network")
    network.add_argument("--head", choices=("upernet", "linear"), default="upernet",
                         help="upernet: all is trained; linear: a 1x1 convolution on the frozen network")
    network.add_argument("--width", type=int_from(8), help="channels of UPerNet")
    network.add_argument("--final_norm", default=True, help="take a ViT's maps through its final norm", **engine.SWITCH)
    network.add_argument("--num_classes", type=int_from(2), default=150, help="annotations hold 0 (other) to this number")
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--iterations", type=int_from(1), default=160000, help="updates; the rate falls to 0 over them")
    schedule.add_argument("--warmup_iterations", type=int_from(0), default=1500, help="of the rate, from a millionth on")
    schedule.add_argument("--epoch_iterations", type=int_from(1), default=4000,
                          help="updates between saves and lines of log.txt; --iterations is a multiple of it")
    schedule.add_argument("--val_freq", type=int_from(0), default=0,
                          help="also evaluate every so many times --epoch_iterations; 0: only at the end")
    data = parser.add_argument_group("images")
    data.add_argument("--crop_size", type=int_from(32), default=512, help="side of training crops and of test windows")
    data.add_argument("--short_side", type=int_from(16), default=512,
                      help="of test images, unless the long side is more than --long_side; in training 0.5 to 2 times that")
    data.add_argument("--long_side", type=int_from(16), default=2048)
    data.add_argument("--inference", choices=("slide", "whole"), help="windows of --crop_size pixels, or the whole image")
    data.add_argument("--slide_stride", type=int_from(1), default=341)
    return parser


# ---------------------------------------------------------------- networks

def network_of(args, source):
    """What a checkpoint says of the network of `args` on an `EvaluatedBackbone`."""
    names = ("head", "final_norm", "inference", *(NUMBERS.keys() - {"patch_size", "window_size", "width"}))
    return {"arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
            "width": args.width or 1, **{name: getattr(args, name) for name in sorted(names)},
            "mean": list(source.pixel_stats.mean), "std": list(source.pixel_stats.std)}


def backbone_options(network):
    """Of `network_of`: what `DenseBackbone` gets."""
    if network["arch"].startswith("swin"):
        return {}
    cells = network["crop_size"] // network["patch_size"]
    linear = network["head"] == "linear"
    return {"grid": (cells, cells), "final_norm": network["final_norm"], "pyramid": not linear, "frozen": linear}


def build(backbone, network):
    """The `Segmenter` that `network_of` describes, on its `DenseBackbone`."""
    return Segmenter(backbone, network["num_classes"], network["width"] if network["head"] == "upernet" else None)


def new_segmenter(args, key, content):
    """A network on the backbone of a checkpoint's `content`, entry `key`.

    Returns: `args` with the recipe's values where a flag was not given, the `Segmenter`, the `EvaluatedBackbone`, what a
    checkpoint says of the network, and a note where the recipe is another network's.
    """
    arch = str(args.arch or engine.stored_args(content, args.pretrained_weights).get("arch", "vit_small"))
    recipe, known = recipe_of(args.head, arch)
    args = Namespace(**filled(vars(args) | ({"width": None} if args.head == "linear" else {}), recipe))
    patch = 4 if arch.startswith("swin") else args.patch_size or engine.stored_args(
        content, args.pretrained_weights).get("patch_size", 16)
    engine.need(type(patch) is int and patch > 0 and args.crop_size % patch == 0,
                f"--crop_size {args.crop_size} does not divide into patches of {engine.printable(patch)} pixels")
    network = {"arch": arch, "patch_size": patch, "crop_size": args.crop_size, "head": args.head,
               "final_norm": args.final_norm}
    backbone, source = load_dense_backbone(
        args.pretrained_weights, key, args.arch, args.patch_size, args.window_size, args.drop_path, args.grad_checkpointing,
        content, **backbone_options(network))
    network = network_of(args, source)
    note = f"note: no recipe for {arch} with --head {args.head}; that of {known}" if known != source.arch else ""
    return args, build(backbone, network), source, network, note


def load_segmenter(path):
    """Of a training's checkpoint: (`Segmenter` in evaluation mode, what the file says of it, the file's content).

    Raises InputError, naming file and entry, for what is none or does not fit.
    """
    content = engine.read_checkpoint(Path(path), {"model": dict, "network": dict, "settings": dict, "source": dict},
                                     "segmentation", PROGRESS)
    network = content["network"]
    numbers = {name: network.get(name) for name in NUMBERS}
    if (network.get("arch") not in models.ARCHS or network.get("head") not in PROTOCOLS
            or network.get("inference") not in ("slide", "whole") or type(network.get("final_norm")) is not bool
            or not all(type(value) is int and NUMBERS[name] <= value <= 2**14 for name, value in numbers.items())
            or not {"checkpoint", "key"} <= content["source"].keys()):
        raise engine.InputError(f"checkpoint {path}: its entry 'network' or 'source' cannot be used")
    stats = PixelStats(*(tuple(network.get(name, ())) for name in ("mean", "std")))
    check_pixel_stats(stats, f"checkpoint {path}: its mean", f"checkpoint {path}: its std")
    body = models.build_backbone(network["arch"], network["patch_size"], network["window_size"],
                                 img_size=network["patch_size"],  # a ViT's positions: one cell, which becomes the grid
                                 registers=registers_of(content["model"], "backbone.body."))
    segmenter = build(DenseBackbone(body, **backbone_options(network)), network)
    engine.load_strictly(segmenter, content["model"], path)
    return segmenter.eval(), network, content


# ---------------------------------------------------------------- evaluation

def label_map(segmenter, image, size, network, amp_dtype):
    """Labels uint8 [H, W] of `size` for a normalised image [3, h, w]; network: see `network_of`."""
    slide = network["inference"] == "slide"
    multiple = 1 if network["arch"].startswith("swin") else network["patch_size"]
    with torch.autocast(image.device.type, amp_dtype, enabled=amp_dtype is not None):
        return predict(segmenter, image, size, network["crop_size"] if slide else None, network["slide_stride"], multiple)


def test_images(pairs, network):
    stats = PixelStats(tuple(network["mean"]), tuple(network["std"]))
    return TestImages(pairs, network["num_classes"], (network["short_side"], network["long_side"]), stats)


def evaluate(segmenter, dataset, network, process, amp_dtype, num_workers, fetch):
    """The `confusion` of a data set, int64 [K, K] on the CPU, the same on all processes: each image counts once.

    Every W-th image is this process's. fetch: from an iterator to its next item, None at its end; all processes call it
    equally often.
    """
    was_training = segmenter.training
    segmenter.eval()
    K, W = network["num_classes"], process.world_size
    matrix = torch.zeros(K, K, dtype=torch.int64, device=process.device)
    own = range(process.rank, len(dataset), W)
    items = iter(DataLoader(dataset, batch_size=None, sampler=own, num_workers=min(num_workers, len(own)),
                            pin_memory=process.device.type == "cuda", worker_init_fn=engine.ignore_signals))
    for _ in range(-(-len(dataset) // W)):
        item = fetch(items)
        if item is not None:
            image, labels, _ = (x if isinstance(x, int) else x.to(process.device, non_blocking=True) for x in item)
            matrix += confusion(labels, label_map(segmenter, image, labels.shape, network, amp_dtype), K)
    if W > 1:
        torch.distributed.all_reduce(matrix)
    segmenter.train(was_training)
    return matrix.cpu()


def described(metrics):
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def class_table(matrix, names):
    """Rows (name, IoU, accuracy, pixels) of the classes, the best first, as text; in percent, - where there is none."""
    _, iou, accuracy = scores(matrix)
    rows = [("class", "IoU", "accuracy", "pixels")]
    for place in iou.nan_to_num(nan=-1).argsort(descending=True, stable=True).tolist():
        values = (f"{float(value):.2f}" if value.isfinite() else "-" for value in (iou[place], accuracy[place]))
        rows.append((names[place], *values, str(int(matrix[place].sum()))))
    return rows


def write_classes(rows, path):
    """Write a `class_table`, tab-separated. Raises InputError."""
    try:
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be written ({error.strerror})") from error


# ---------------------------------------------------------------- pictures

COLOURS = np.array(davis.pascal_palette(), dtype=np.uint8).reshape(256, 3)
TILE, GAP, LINE = 320, 6, 16  # pixels: height of an image in a picture, room between, a line of the legend


def painted(image, labels, weight=0.7):
    """A PIL RGB image under the colours of labels uint8 [H, W]; what is IGNORED keeps its own."""
    pixels = np.array(image)
    colours = COLOURS[(labels.astype(int) + 1) % 256]
    mixed = (weight * colours + (1 - weight) * pixels).astype(np.uint8)
    return Image.fromarray(np.where((labels == IGNORED)[..., None], pixels, mixed))


def sheet(rows, names):
    """[(PIL image, [labels uint8 [H, W], ...])] as one picture: a line each, and the colours of the commonest classes."""
    lines = []
    for image, maps in rows:
        tiles = [picture.resize((round(picture.width * TILE / picture.height), TILE))
                 for picture in (image, *(painted(image, labels) for labels in maps))]
        lines.append(tiles)
    width = max(sum(tile.width + GAP for tile in tiles) for tiles in lines) + GAP
    counts = sum(np.bincount(labels[labels != IGNORED], minlength=256) for _, maps in rows for labels in maps)
    shown = [place for place in counts.argsort()[::-1][:15] if counts[place]]
    columns = max(1, width // 150)
    legend = -(-len(shown) // columns) * LINE
    canvas = Image.new("RGB", (width, len(lines) * (TILE + GAP) + GAP + legend), "white")
    for i, tiles in enumerate(lines):
        x = GAP
        for tile in tiles:
            canvas.paste(tile, (x, GAP + i * (TILE + GAP)))
            x += tile.width + GAP
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for i, place in enumerate(shown):
        x, y = GAP + i % columns * 150, len(lines) * (TILE + GAP) + GAP + i // columns * LINE
        draw.rectangle((x, y, x + 11, y + 11), fill=tuple(int(v) for v in COLOURS[place + 1]))
        draw.text((x + 16, y - 1), names[place], "black", font)
    return canvas


def write_pictures(networks, pairs, names, device, amp_dtype, path):
    """Write a line for each of [(image, annotation or None)]: the image, the truth if it is known, what is predicted.

    networks: [(`Segmenter`, its `network_of`)]. Raises InputError.
    """
    rows = []
    for pair in pairs:
        image, maps = load_rgb(pair[0]), []
        size = image.height, image.width
        for segmenter, network in networks:
            if pair[1] is not None and not maps:
                maps.append(load_pair(pair, network["num_classes"])[1].numpy())
            stats = PixelStats(tuple(network["mean"]), tuple(network["std"]))
            x = normalize(fitted(pil_to_tensor(image), network["short_side"], network["long_side"]), stats).to(device)
            maps.append(label_map(segmenter.eval(), x, size, network, amp_dtype).cpu().numpy())
        rows.append((image, maps))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, names).save(path)
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be written ({error.strerror or error})") from error
