"""The first run: handwritten digits as an image folder, and what a pre-training run has learned.

    python analysis/quickstart.py data --output_dir data/digits
    python analysis/quickstart.py report --output_dir work_dirs/quickstart

`./run.sh quickstart` calls the first, then main_ibot.py, then the second. Works on every run of main_ibot.py.
"""
import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import loader
import models
import utils
from analysis import common
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import eval_transform, image_folders
from evaluation.common.features import extract_features, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy
from pictures import CROPS, TILE, fit, save_grid

K = 10  # neighbours


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


def train_and_val(data_path, size, normalize=loader.normalize):
    """Data sets of (image, label, index) to compare with, for images of `size` pixels: (train, val).

    DATA/train and DATA/val where these are (`data_path` may name either DATA or DATA/train). Otherwise every fifth
    image of each class folder of `data_path` is for validation.
    """
    path = Path(data_path)
    for root in (path, path.resolve().parent):
        if (root / "val").is_dir() and (root == path or path.resolve().name == "train") and (root / "train").is_dir():
            return image_folders(root, size, normalize)
    parts = [loader.ImageFolderInstance(path, transform=eval_transform(size, normalize)) for _ in ("train", "val")]
    samples, seen, val = parts[0].samples, {}, []
    for _, label in samples:
        seen[label] = seen.get(label, 0) + 1
        val.append(seen[label] % 5 == 0)
    for part, wanted in zip(parts, (False, True), strict=True):
        part.samples = part.imgs = [sample for sample, is_val in zip(samples, val, strict=True) if is_val is wanted]
        part.targets = [label for _, label in part.samples]
    return parts


# ---------------------------------------------------------------- k-NN

def knn_accuracy(model, train, val, num_workers, process, name):
    """Top-1 accuracy in percent of the backbone `model`."""
    model = model.to(process.device)
    (train_features, train_labels), (val_features, val_labels) = (
        extract_features(lambda images: pool_features(model, images), sharded_loader(data, 128, num_workers, process),
                         process, f"{part}, {name}")
        for data, part in ((train, "train"), (val, "val")))
    k = min(K, len(train))
    predictions = knn_classify(train_features, train_labels, val_features, len(train.classes), (k,),
                               device=process.device)
    return topk_accuracy(predictions[k], val_labels)[0]


def compare_knn(trained, train, val, args, process):
    """A line with the k-NN accuracy of the untrained and the trained network, or with the reason why there is none."""
    if len(train.classes) < 2:
        return "k-NN: skipped, it needs two classes"
    if not val.samples:
        return "k-NN: skipped, it needs five images in a class"
    torch.manual_seed(args.seed)
    untrained = models.build_backbone(trained.arch, trained.patch_size, trained.window_size)
    try:
        before, after = (knn_accuracy(model, train, val, args.num_workers, process, name)
                         for model, name in ((untrained.eval(), "untrained"), (trained.model, "trained")))
    except utils.InputError as error:  # an image that cannot be read, which training may have skipped
        return f"k-NN: skipped, {utils.one_line(error)}"
    return (f"k-NN top-1 (k = {min(K, len(train))}, {len(val)} validation images): "
            f"untrained network {before:.1f} %, trained teacher {after:.1f} %")


# ---------------------------------------------------------------- pictures

def spread(length, count=6):
    """Up to `count` indices, evenly over 0..length-1."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


@torch.inference_mode()
def draw_attention(trained, dataset, process, path):
    """Where [CLS] looks in the last block of a ViT, a column a head; dark is the smallest value of a map."""
    model, rows = trained.model.to(process.device), []
    for index in spread(len(dataset)):
        try:
            image, _, _ = dataset[index]  # [3, S, S]
        except loader.BadImage:
            continue
        cells = trained.image_size // trained.patch_size
        attention = common.cls_attention(model, image[None].to(process.device))[0].view(-1, cells, cells)  # [heads, h, w]
        pixels = loader.denormalize(image, trained.pixel_stats).permute(1, 2, 0).numpy()
        pixels = fit(Image.fromarray(pixels), TILE)
        heats = [Image.fromarray(common.heat_map(weights, "inferno")) for weights in attention.cpu().numpy()]
        rows.append([pixels, *(Image.blend(pixels, heat.resize(pixels.size, Image.Resampling.BILINEAR), 0.75)
                               for heat in heats)])
    save_grid(rows, ["image"] + [f"head {i + 1}" for i in range(model.blocks[-1].attn.num_heads)], path)


# ---------------------------------------------------------------- report

def losses(log):
    """A line with the losses of the first and of the last epoch in log.txt."""
    epochs = [json.loads(line) for line in log.read_text().splitlines()]
    first, last = epochs[0], epochs[-1]
    parts = ", ".join(f"{name} {first[f'train_{key}']:.3f} -> {last[f'train_{key}']:.3f}"
                      for key, name in (("loss", "total"), ("cls", "[CLS]"), ("patch", "patch")))
    return f"loss, epoch {first['epoch']} -> {last['epoch']}: {parts}"


def report(folder):
    """Evaluate the run in `folder`, write pictures and print a summary."""
    folder = Path(folder)
    checkpoint = folder / "checkpoint.pth"
    args = utils.load_checkpoint(checkpoint).get("args")
    if args is None:
        raise utils.InputError(f"checkpoint {checkpoint}: no run of main_ibot.py (it holds no args)")
    process = utils.init_process(args.device)
    trained = load_evaluated_backbone(checkpoint, "teacher")
    train, val = train_and_val(args.data_path, trained.image_size, trained.normalize)
    lines = [compare_knn(trained, train, val, args, process), losses(folder / "log.txt"), ""]

    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    files = [(checkpoint, "the networks"), (folder / "log.txt", "a line of JSON per epoch")]
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
        lines += [f"what it learned: {sys.executable} {page} --pretrained_weights {checkpoint}",
                  "                 (a page for the browser: clusters, attention, correspondence, robustness)"]
    lines += [f"curves:          {sys.executable} -m tensorboard.main --logdir {folder / 'tf_logs'}",
              "your own images: ./run.sh quickstart --data_path FOLDER --output_dir work_dirs/mine",
              "                 (FOLDER/CLASS/IMAGE; one class will do)",
              "the real thing:  ./run.sh imagenet_pretrain+imagenet_knn JOB_NAME vit_small teacher 8   (see README.md)"]
    print("\n" + "=" * 80 + "\n" + "\n".join(lines), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("data", "write the digits as an image folder"), ("report", "evaluate a run and draw pictures")):
        commands.add_parser(name, help=what).add_argument("--output_dir", required=True)
    args = parser.parse_args()
    (write_digits if args.command == "data" else report)(args.output_dir)


if __name__ == "__main__":
    utils.run(main)
