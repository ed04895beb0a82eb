"""The first run: handwritten digits as an image folder, and what a pre-training run has learned.

    python analysis/quickstart.py data --output_dir data/digits
    python analysis/quickstart.py report --output_dir work_dirs/quickstart

`./run.sh quickstart` calls the first, then main_ibot.py, then the second. Works on every run of main_ibot.py.
"""
import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import engine
import models
from analysis import common
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.charts import draw_curves, loss_curves, read_log
from evaluation.common.data import eval_transform, image_folders
from evaluation.common.features import extract_features, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy
from images import BadImage, ImageFolderInstance, denormalize, load_rgb, normalize
from listing import list_images
from pictures import CROPS, TILE, fit, save_grid

K, SHOWN = 10, 5  # neighbours that vote, and that are drawn
TRAIN, VAL = 10_000, 2_000  # images of each part that are compared, at most about


# ---------------------------------------------------------------- data

def write_digits(folder):
    """scikit-learn's 1797 digits of 8 x 8 pixels as FOLDER/{train,val}/DIGIT/NNNN.png, grey, 32 x 32 pixels.

    Of every 18 images of a digit, 5 are for validation. Files that are there already stay, and none is ever half
    written, so that a second call completes an interrupted one.
    """
    digits = load_digits()
    seen, written, parts = [0] * 10, 0, {"train": 0, "val": 0}
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "val" if seen[digit] * 5 % 18 < 5 else "train"
        seen[digit] += 1
        parts[part] += 1
        path = Path(folder) / part / str(digit) / f"{number:04}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        image = image.resize((32, 32), Image.Resampling.BICUBIC)
        temporary = path.with_suffix(".tmp")
        image.save(temporary, "PNG")
        os.replace(temporary, path)
        written += 1
    print(f"{folder}: {parts['train']} training and {parts['val']} validation images of digits, {written} new")


def train_and_val(data_path, size, normalize=normalize):
    """Data sets of (image, label, index) to compare with, for images of `size` pixels: (train, val).

    DATA/train and DATA/val where these are (`data_path` may name either DATA or DATA/train). Otherwise every fifth
    image of each class of `data_path`, see `listing.list_images`, is for validation.
    """
    if isinstance(data_path, (str, os.PathLike)):
        path = Path(data_path)
        for root in (path, path.resolve().parent):
            if (root / "val").is_dir() and (root == path or path.resolve().name == "train") and (root / "train").is_dir():
                return image_folders(root, size, normalize)
    parts = [ImageFolderInstance(data_path, eval_transform(size, normalize), labelled=False) for _ in ("train", "val")]
    samples, seen, val = parts[0].samples, {}, []
    for _, label in samples:
        seen[label] = seen.get(label, 0) + 1
        val.append(seen[label] % 5 == 0)
    for part, wanted in zip(parts, (False, True), strict=True):
        part.samples = part.imgs = [sample for sample, is_val in zip(samples, val, strict=True) if is_val is wanted]
        part.targets = [label for _, label in part.samples]
    return parts


# ---------------------------------------------------------------- k-NN

def thin_out(dataset, most):
    """Leave at most about `most` images in an `ImageFolderInstance`, evenly over its order."""
    step = -(-len(dataset) // most)
    if step > 1:
        dataset.samples = dataset.imgs = [dataset.samples[i] for i in range(0, len(dataset), step)]
        dataset.targets = [label for _, label in dataset.samples]


def features_of(model, train, val, num_workers, process, name):
    """((features, labels) of train, the same of val) by the backbone `model`: [n, D] and [n], in the order of the sets."""
    model = model.to(process.device)
    return [extract_features(lambda images: pool_features(model, images), sharded_loader(data, 128, num_workers, process),
                             process, f"{part}, {name}") for data, part in ((train, "train"), (val, "val"))]


def knn_accuracy(features, classes, device):
    """Top-1 accuracy in percent of what `features_of` gives."""
    (train_features, train_labels), (val_features, val_labels) = features
    k = min(K, len(train_features))
    predictions = knn_classify(train_features, train_labels, val_features, classes, (k,), device=device)
    return topk_accuracy(predictions[k], val_labels)[0]


def compare(trained, train, val, seed, num_workers, process, path):
    """A line with the k-NN accuracy of the untrained and the trained network, or with the reason why there is none.

    With it, `path` becomes a picture of neighbours by both.
    """
    if len(train.classes) < 2:
        return "k-NN: skipped, it needs two classes"
    if not val.samples:
        return "k-NN: skipped, it needs five images in a class"
    torch.manual_seed(seed)
    untrained = models.build_backbone(trained.arch, trained.patch_size, trained.window_size)
    thin_out(train, TRAIN)
    thin_out(val, VAL)
    try:
        features = {name: features_of(model, train, val, num_workers, process, name)
                    for name, model in (("untrained", untrained.eval()), ("trained", trained.model))}
    except engine.InputError as error:  # an image that cannot be read, which training may have skipped
        return f"k-NN: skipped, {engine.one_line(error)}"
    draw_neighbours(features, train, val, path)
    before, after = (knn_accuracy(parts, len(train.classes), process.device) for parts in features.values())
    return (f"k-NN top-1 (k = {min(K, len(train))}, {len(val)} validation images): "
            f"untrained network {before:.1f} %, trained teacher {after:.1f} %")


# ---------------------------------------------------------------- pictures

def spread(length, count=6):
    """Up to `count` indices, evenly over 0..length-1."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def framed(picture, colour):
    """A square tile with a frame of the colour."""
    tile = Image.new("RGB", (TILE, TILE), colour)
    inner = fit(picture, TILE - 12)
    tile.paste(inner, ((TILE - inner.width) // 2, (TILE - inner.height) // 2))
    return tile


def draw_neighbours(features, train, val, path):
    """Six images of `val` with their nearest ones in `train`, by each of `features` {name: as `features_of` gives them}.

    Frames: green where the neighbour is of the query's class, red where it is not.
    """
    queries, shown = spread(len(val)), min(SHOWN, len(train))
    rows = [[framed(load_rgb(val.samples[query][0]), "white")] for query in queries]
    for (train_features, train_labels), (val_features, val_labels) in features.values():
        tests, bank = (torch.nn.functional.normalize(x.float(), dim=1) for x in (val_features[queries], train_features))
        for row, query, places in zip(rows, queries, (tests @ bank.T).topk(shown).indices.tolist(), strict=True):
            row += [framed(load_rgb(train.samples[i][0]),
                           "#2ca02c" if train_labels[i] == val_labels[query] else "#d62728") for i in places]
    save_grid(rows, ["query"] + [f"{name}: {i + 1}" for name in features for i in range(shown)], path)


@torch.inference_mode()
def draw_attention(trained, dataset, process, path):
    """Where [CLS] looks in the last block of a ViT, a column a head; dark is the smallest value of a map."""
    model, rows = trained.model.to(process.device), []
    for index in spread(len(dataset)):
        try:
            image, _, _ = dataset[index]  # [3, S, S]
        except BadImage:
            continue
        cells = trained.image_size // trained.patch_size
        attention = common.cls_attention(model, image[None].to(process.device))[0].view(-1, cells, cells)  # [heads, h, w]
        pixels = denormalize(image, trained.pixel_stats).permute(1, 2, 0).numpy()
        pixels = fit(Image.fromarray(pixels), TILE)
        heats = [Image.fromarray(common.heat_map(weights, "inferno")) for weights in attention.cpu().numpy()]
        rows.append([pixels, *(Image.blend(pixels, heat.resize(pixels.size, Image.Resampling.BILINEAR), 0.75)
                               for heat in heats)])
    save_grid(rows, ["image"] + [f"head {i + 1}" for i in range(model.blocks[-1].attn.num_heads)], path)


# ---------------------------------------------------------------- report

def losses(epochs, out_dim):
    """A line with the losses of the first and of the last epoch of a log (see `read_log`) of a head with K `out_dim`."""
    first, last = min(epochs), max(epochs)
    parts = ", ".join(f"{name} {points[0][1]:.3f} -> {points[-1][1]:.3f}" for name, points in loss_curves(epochs).items())
    uniform = f" ([CLS] of uniform targets: ln K = {math.log(out_dim):.3f})" if out_dim else ""
    return f"loss, epoch {first} -> {last}: {parts}{uniform}"


def report(folder, data_path=None, device="auto", num_workers=1):
    """Evaluate the run in `folder`, write pictures, print a summary. data_path: None for the folder it was trained on."""
    folder = Path(folder)
    checkpoint = folder / "checkpoint.pth"
    args = engine.load_checkpoint(checkpoint).get("args")
    if args is None:
        raise engine.InputError(f"checkpoint {checkpoint}: no run of main_ibot.py (it holds no args)")
    process = engine.init_process(device)
    trained = load_evaluated_backbone(checkpoint, "teacher")
    train, val = train_and_val(data_path or args.data_path, trained.image_size, trained.normalize)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    (pictures / "neighbours.png").unlink(missing_ok=True)  # of an earlier state, should there be no k-NN now
    epochs = read_log(folder / "log.txt")[0]
    lines = [compare(trained, train, val, args.seed, num_workers, process, pictures / "neighbours.png"),
             losses(epochs, getattr(args, "out_dim", None)), ""]
    draw_curves({name: points for name, points in loss_curves(epochs).items() if name != "total"},
                "Losses of pre-training", pictures / "loss.png")

    files = [(checkpoint, "the networks"), (folder / "log.txt", "a line of JSON per epoch"),
             (pictures / "loss.png", "the two losses, epoch by epoch")]
    if (pictures / "neighbours.png").exists():
        files.append((pictures / "neighbours.png", "validation images and their nearest training images, before and after"))
    if (folder / CROPS).exists():
        files.append((folder / CROPS, "what the student sees: crops of the first batch, masked patches in grey"))
    if args.arch.startswith("swin"):
        files.append(("(no attention picture)", "a Swin has no [CLS] token"))
    else:
        draw_attention(trained, val if val.samples else train, process, pictures / "attention.png")
        files.append((pictures / "attention.png", "where the teacher's [CLS] looks"))
    width = max(len(str(name)) for name, _ in files) + 2
    lines += [f"{str(name):{width}}{what}" for name, what in files]
    lines.append("")
    if not args.arch.startswith("swin"):
        page = Path(sys.argv[0]).with_name("report.py")
        lines += [f"next:            {sys.executable} {page} --pretrained_weights {checkpoint}",
                  "                 (what it learned, as a page: clusters, attention, correspondence, robustness)"]
    lines += [f"curves:          {sys.executable} -m tensorboard.main --logdir {folder / 'tf_logs'}",
              "your own images: ./run.sh quickstart --data_path FOLDER --output_dir work_dirs/mine",
              "                 (a folder with images in it, or in folders of it)",
              "the real thing:  ./run.sh imagenet_pretrain+imagenet_knn JOB_NAME vit_small teacher 8   (see README.md)"]
    print("\n" + "=" * 80 + "\n" + "\n".join(lines), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("data", "write the digits as an image folder"), ("count", "how many images --data_path holds"),
                       ("report", "evaluate a run and draw pictures")):
        command = commands.add_parser(name, help=what)
        if name != "count":
            command.add_argument("--output_dir", required=True)
        if name != "data":
            command.add_argument("--data_path", help="by default the images that the run was trained on",
                                 **engine.SEVERAL)
    command.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    command.add_argument("--num_workers", default=1, type=int)
    args, others = parser.parse_known_args()
    if args.command == "count":  # run.sh hands all flags of the quickstart on
        print(len(list_images(args.data_path, labelled=False).samples))
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.command == "data":
        write_digits(args.output_dir)
    else:
        report(args.output_dir, args.data_path, args.device, args.num_workers)


if __name__ == "__main__":
    engine.run(main)
