"""Variants of the masks and losses: the time of a step of each against iBOT's, and a toy table of what each learns.

    python benchmarks/variants.py steps                        # ViT-S/16, random images; one after the other, in turns
    python benchmarks/variants.py table --output_dir work_dirs/variants   # digits, three seeds, one budget for all

The table is a toy: what helps on 1,294 digits of 16 pixels need not help anywhere else. Its runs stay in the folder, and
those that are there already are not made again.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine
import loader
import main_ibot
from benchmarks.common import TOY, Ours, timed
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.charts import loss_curves, read_log
from evaluation.common.data import image_folders
from evaluation.common.features import extract_features, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy

ROOT = Path(__file__).resolve().parents[1]
UNMASKED = ["--use_masked_im_modeling", "false"]
ONE_CROP = ["--lambda1", "0", "--koleo", "0", "--global_crops_number", "1", "--local_crops_number", "0"]
# What differs from iBOT; {dino} and {centroids} are files made before.
VARIANTS = {
    "iBOT": [],
    "DINO": ["--lambda2", "0", *UNMASKED],
    "iBOT without [CLS] loss": ["--lambda1", "0", "--koleo", "0", "--local_crops_number", "0"],
    "heads apart but for the MLP": ["--shared_head", "false", "--shared_head_teacher", "false"],
    "heads apart": ["--head_sharing", "full", "--head_sharing_teacher", "full"],
    "heads: two layers in common": ["--head_sharing", "mlp2", "--head_sharing_teacher", "mlp2"],
    "no patch centre": ["--patch_centering", "false"],
    "hard patch targets": ["--patch_targets", "hard"],
    "masks always": ["--pred_ratio", "0.3", "--pred_ratio_var", "0"],
    "masks, one ratio an image": ["--pred_ratio_per", "image"],
    "masks on all crops": ["--mask_crops", "all", "--local_crops_number", "4"],
    "masks on one crop": ["--mask_crops", "one"],
    "dense, by position": ["--patch_match", "position", *UNMASKED],
    "dense, by feature": ["--patch_match", "feature", *UNMASKED],
    "tokens of mean colours": ["--tokenizer", "mpp", *ONE_CROP],
    "tokens of centroids": ["--tokenizer", "kmeans", "--tokenizer_file", "{centroids}", *ONE_CROP],
    "tokens of DINO": ["--tokenizer", "dino", "--tokenizer_file", "{dino}", *ONE_CROP],
    "tokens of mean colours, [CLS] loss": ["--tokenizer", "mpp"],
    "Sinkhorn-Knopp": ["--centering", "sinkhorn"],
    "registers": ["--registers", "4"],
    "layer decay 0.9": ["--layer_decay", "0.9", "--patch_embed_lr", "0.2"],
}


# ---------------------------------------------------------------- steps

def batches_of(args, ours, folder, device):
    """Four batches of the folder's images, as the loader gives them for this variant: uint8, on the device."""
    process = engine.Process(0, 1, 0, device)
    ours.args.data_path, ours.args.batch_size_per_gpu = str(folder), args.batch
    data = main_ibot.build_data(ours.args, process, "cpu", 64 if args.compile else 1, ours.tokenizer)
    batches = []
    for epoch in range(4):
        data.dataset.set_epoch(epoch)
        batches += [loader.Batch(*(None if x is None else x.to(device) for x in batch)) for batch in data]
    return batches


def measure_steps(args):
    device = torch.device(args.device)
    args.compile = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        rng, folder = np.random.default_rng(0), Path(folder)
        (folder / "all").mkdir()
        for i in range(args.batch):
            noise = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
            noise.resize((320, 240), Image.Resampling.BICUBIC).save(folder / "all" / f"{i}.jpg")
        save_file({"centroids": torch.rand(4096, 768)}, folder / "centroids.safetensors")
        dino = Ours(args, device, out_dim=65536, lambda2=0)
        torch.save({"args": dino.args, "teacher": dino.teacher.state_dict()}, folder / "dino.pth")
        del dino
        steps, batches = {}, {}
        for name, words in VARIANTS.items():
            if name not in args.only and args.only:
                continue
            words = [word.format(centroids=folder / "centroids.safetensors", dino=folder / "dino.pth") for word in words]
            ours = Ours(args, device, ["--num_workers", "0", "--pred_ratio", "0.3", "--pred_ratio_var", "0", *words,
                                       "--global_crops_number", "2"])  # the same for all
            steps[name], batches[name] = ours, batches_of(args, ours, folder, device)
        seconds = {name: [] for name in steps}
        for i in range(-1, args.steps):
            for name, ours in steps.items():
                def step(ours=ours, batch=batches[name][i % 4]):
                    ours.step(loader.finish_batch(batch, tokenizer=getattr(ours.tokenizer, "of_crops", None)))
                taken = timed(step, device)
                if i >= 0:
                    seconds[name].append(taken)
    base = statistics.median(seconds["iBOT"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.arch}, batch {args.batch}, 2 + {args.local_crops_number} crops, {args.steps} steps each in turns, tokens "
          f"included; {name}, torch {torch.__version__}\n")
    print("| variant | seconds, median | times iBOT's |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} | {statistics.median(values) / base:.2f} |")


# ---------------------------------------------------------------- table

def pretrain(folder, words, data_path):
    """Losses of the patches and of [CLS], first and last epoch, of a run in `folder`, which is made if it is not there."""
    if not (folder / "done").exists():
        command = [sys.executable, "main_ibot.py", *TOY, "--data_path", data_path / "train", "--output_dir", folder,
                   "--overwrite", "true", *words]
        run = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise engine.InputError(f"{' '.join(map(str, command))}: {(run.stdout + run.stderr).strip().splitlines()[-1]}")
        (folder / "done").touch()
    curves = loss_curves(read_log(folder / "log.txt")[0])
    return {name: (points[0][1], points[-1][1]) for name, points in curves.items()}


def accuracies(checkpoint, data_path, key):
    """10-NN accuracy in percent of the [CLS] tokens and of the mean patch tokens."""
    backbone, process = load_evaluated_backbone(checkpoint, key), engine.Process(0, 1, 0, torch.device("cpu"))
    train, val = image_folders(data_path, backbone.image_size, backbone.normalize)
    found = []
    for pooling in (0, 1):
        (x, y), (tests, labels) = (
            extract_features(lambda images, p=pooling: pool_features(backbone.model, images, 1, p),
                             sharded_loader(part, 128, 0, process), process) for part in (train, val))
        ranked = knn_classify(x, y, tests, len(train.classes), (10,))[10]
        found.append(topk_accuracy(ranked, labels)[0])
    return found


def measure_table(args):
    out, data_path = Path(args.output_dir).resolve(), Path(args.data_path).resolve()
    rows = {}
    centroids = out / "centroids.safetensors"
    if not centroids.exists():
        flags = "--clusters 256 --patch_size 4 --image_size 16 --subset 1 --num_workers 0 --device cpu".split()
        command = [sys.executable, "analysis/patch_clusters.py", "--data_path", data_path / "train", "--out", centroids]
        subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    for seed in args.seeds:
        for name, words in VARIANTS.items():
            if name not in args.only and args.only:
                continue
            folder = out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
            words = [word.format(centroids=centroids, dino=out / f"DINO_{seed}" / "checkpoint.pth") for word in words]
            losses = pretrain(folder, [*words, "--epochs", args.epochs, "--seed", seed], data_path)
            kept = folder / "knn.json"
            if not kept.exists():
                kept.write_text(json.dumps(accuracies(folder / "checkpoint.pth", data_path, "teacher")))
            rows.setdefault(name, []).append((json.loads(kept.read_text()), losses))
            print(f"seed {seed}, {name}: 10-NN [CLS], patches {rows[name][-1][0]}, losses {losses}", file=sys.stderr,
                  flush=True)
    print(f"Digits, {args.epochs} epochs, seeds {' '.join(map(str, args.seeds))}; 10-NN of the teacher in percent, of "
          "each seed, then mean ± standard deviation; a toy\n")
    print("| variant | [CLS] | mean | patches | mean | patch loss |\n|---|---|---|---|---|---|")
    for name, found in rows.items():
        cells = []
        for i in (0, 1):
            values = [accuracy[i] for accuracy, _ in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells += [" ".join(f"{v:.1f}" for v in values), f"{statistics.mean(values):.1f}{spread}"]
        first, last = (statistics.mean(losses["patch"][i] for _, losses in found) for i in (0, 1))
        print(f"| {name} | {' | '.join(cells)} | {first:.2f} → {last:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    steps, table = commands.add_parser("steps"), commands.add_parser("table")
    for command in (steps, table):
        command.add_argument("--only", nargs="+", default=[], choices=VARIANTS, metavar="NAME", help="variants to measure")
    steps.add_argument("--arch", default="vit_small")
    steps.add_argument("--batch", type=int, default=2)
    steps.add_argument("--local_crops_number", type=int, default=0)
    steps.add_argument("--steps", type=int, default=5)
    steps.add_argument("--device", default="cpu")
    steps.add_argument("--amp_dtype", default="none", choices=("none", "bfloat16", "float16"))
    table.add_argument("--data_path", default="data/digits", help="with train/ and val/; ./run.sh quickstart writes it")
    table.add_argument("--output_dir", default="work_dirs/variants")
    table.add_argument("--epochs", type=int, default=20)
    table.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    (measure_steps if args.command == "steps" else measure_table)(args)


if __name__ == "__main__":
    engine.run(main)
