"""Time of the frozen-feature evaluations: the sweep against one head, k-NN against scikit-learn, features kept or not.

    python benchmarks/evaluation.py                                  # all parts, on a GPU or the CPU
    python benchmarks/evaluation.py --parts heads --classes 10 1000 --batch 1024
    python benchmarks/evaluation.py --parts crops features --arch vit_tiny --images 128

    heads     an epoch of linear probing on kept features: 45 heads at once, one head, and both as plain torch modules
    commands  the same as whole commands on handwritten digits, features read from their folder
    crops     an epoch of it on random crops of images, the default: 45 heads at once against one
    knn       weighted votes of the nearest neighbours, against scikit-learn's brute force
    logistic  logistic regression to the bound 1e-4, against scikit-learn's
    propagation  masks of a DAVIS frame by tiles, against the dense rule; F by boundary points, against distance transforms
    features  all protocols of a joined command: features taken once and kept, against once per protocol

What is compared alternates within one process (`commands`: in processes of their own), so that both meet the same noise;
ratios are those of the medians. Features of `heads` and `knn` are random, with a class mean each.
"""
import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from common import risen, timed
from PIL import Image
from scipy.ndimage import distance_transform_edt
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import engine
import models
from evaluation.common import davis
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import image_sets
from evaluation.common.features import feature_dim, frozen_features, pool_features
from evaluation.common.heads import HeadConfig, LinearHeads, sweep_configs
from evaluation.common.knn import knn_classify
from evaluation.common.linear import FeaturesOfCrops, KeptFeatures
from evaluation.common.logistic import fit_logistic
from evaluation.common.propagation import propagate

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("heads", "commands", "crops", "knn", "logistic", "propagation", "features")
ONE = [HeadConfig(0.1)]
PROTOCOLS = 4  # k-NN, logistic regression, clustering, linear probing


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", default=7, type=int, help="timed calls of each")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--dim", default=384, type=int, help="size of random features")
    parser.add_argument("--classes", default=[10, 100, 1000], type=int, nargs="+", help="of heads, one row each")
    parser.add_argument("--batch", default=256, type=int, help="images of a training step")
    parser.add_argument("--steps", default=10, type=int, help="of an epoch in `heads`")
    parser.add_argument("--train", default=50000, type=int, help="training features of k-NN")
    parser.add_argument("--tests", default=10000, type=int, help="test features of k-NN")
    parser.add_argument("--k", default=20, type=int)
    parser.add_argument("--arch", default="vit_small", choices=models.ARCHS, help="of crops and features")
    parser.add_argument("--images", default=64, type=int, help="images of crops and features")
    parser.add_argument("--image_size", default=224, type=int)
    parser.add_argument("--num_workers", default=0, type=int, help="loader processes of crops and features")
    parser.add_argument("--epochs", default=100, type=int, help="of commands")
    return parser.parse_args()


def alternate(calls, rounds, device):
    """{name: seconds of each round} of the functions `calls`, after one untimed round."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            elapsed = timed(call, device)
            if i:
                seconds[name].append(elapsed)
    return seconds


def report(title, seconds, count, unit, base):
    """Print one line for each of `seconds`: its median, range, `unit`s per second and ratio to `base`; returns medians."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(title)
    for name, values in seconds.items():
        print(f"  {name:<34} {1e3 * medians[name]:10.1f} ms ({1e3 * min(values):.1f}..{1e3 * max(values):.1f})  "
              f"{count / medians[name]:12.1f} {unit}/s  {medians[name] / medians[base]:6.2f} of {base}", flush=True)
    return medians


def random_features(n, dim, classes):
    labels = torch.randint(classes, (n,))
    return torch.randn(n, dim) + torch.randn(classes, dim)[labels], labels


# ---------------------------------------------------------------- heads

def train_epoch(heads, data):
    for batch in data.batches(0):
        heads.step(*data.load(batch), 1.0)


def measure_heads(args, classes, device):
    features, labels = (x.to(device) for x in random_features(args.batch * args.steps, args.dim, classes))
    data = KeptFeatures(features, labels, args.batch, 0, device)
    sweep, one = (LinearHeads(configs, args.dim, classes, device=device) for configs in (sweep_configs(), ONE))
    modules = []
    for config in sweep_configs():
        linear = torch.nn.Linear(args.dim, classes).to(device)
        modules.append((linear, torch.optim.SGD(linear.parameters(), config.lr, momentum=0.9)))

    def plain(modules):
        for x, y in map(data.load, data.batches(0)):
            for linear, optimizer in modules:
                optimizer.zero_grad()
                F.cross_entropy(linear(x), y).backward()
                optimizer.step()

    seconds = alternate({"45 heads": lambda: train_epoch(sweep, data),
                         "one head": lambda: train_epoch(one, data),
                         "45 torch modules in turn": lambda: plain(modules),
                         "one torch module": lambda: plain(modules[27:28])},  # of rate 0.1 too
                        args.rounds, device)
    report(f"heads: {args.steps} steps of {args.batch} kept features of {args.dim}, {classes} classes",
           seconds, len(features), "images", "one head")


def measure_commands(args, folder):
    """Whole processes: start, imports, features from their folder, training, validations, files."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / "digits" / ("val" if i % 5 == 0 else "train") / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).save(path)

    def call(script, name):
        words = ["--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32",
                 "--data_path", folder / "digits", "--num_workers", "0", "--augment", "false", "--epochs", args.epochs,
                 "--device", args.device, "--dump_features", folder / "kept", "--load_features", folder / "kept",
                 "--output_dir", folder / name, "--overwrite", "true"]
        subprocess.run([sys.executable, ROOT / "evaluation" / script, *map(str, words)], check=True,
                       stdout=subprocess.DEVNULL)

    calls = {"eval_linear_multi.py, 45 heads": partial(call, "eval_linear_multi.py", "multi"),
             "eval_linear.py, one head": partial(call, "eval_linear.py", "one")}
    seconds = alternate(calls, args.rounds, torch.device("cpu"))
    report(f"commands: {args.epochs} epochs of {sum(1 for _ in (folder / 'digits' / 'train').rglob('*.png'))} digits, "
           "features read from their folder", seconds, args.epochs, "epochs", "eval_linear.py, one head")


# ---------------------------------------------------------------- images

def write_images(folder, count):
    """`count` JPEGs of 400 x 300 pixels in two classes as train/, the same as val/."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(count):
            path = folder / part / str(i % 2) / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).resize((400, 300)).save(path, quality=90)


def backbone_and_images(args, folder):
    if not (folder / "train").exists():
        write_images(folder, args.images)
    with contextlib.redirect_stdout(io.StringIO()):
        backbone = load_evaluated_backbone("random", "random", args.arch, None, None, args.image_size)
        return backbone, image_sets("imagefolder", folder)


def measure_crops(args, folder, process):
    backbone, (train, _) = backbone_and_images(args, folder)
    flags = argparse.Namespace(num_workers=args.num_workers, seed=0, hflip=0.5)
    data = FeaturesOfCrops(flags, backbone, train, min(args.batch, args.images), process,
                           partial(pool_features, backbone.model.to(process.device), n_last_blocks=4))
    dim = feature_dim(backbone.model, 4)
    sweep, one = (LinearHeads(configs, dim, 1000, device=process.device) for configs in (sweep_configs(), ONE))
    seconds = alternate({"45 heads": lambda: train_epoch(sweep, data),
                         "one head": lambda: train_epoch(one, data)}, args.rounds, process.device)
    report(f"crops: {args.images} images through {args.arch}, {dim} features, 1000 classes", seconds, args.images, "images",
           "one head")


def measure_features(args, folder, process):
    """Extraction, extraction with keeping, and reading of the same training and validation images."""
    backbone, sets = backbone_and_images(args, folder)
    kept = folder / "kept"

    def take(**folders):
        with contextlib.redirect_stdout(io.StringIO()):
            for images in sets:
                frozen_features(backbone, images, process, num_workers=args.num_workers, **folders)

    seconds = alternate({"once per protocol": lambda: [take() for _ in range(PROTOCOLS)],
                         "kept": lambda: [take(dump_to=kept), *(take(load_from=kept) for _ in range(PROTOCOLS - 1))]},
                        args.rounds, process.device)
    report(f"features: 2 x {args.images} images through {args.arch} for {PROTOCOLS} protocols", seconds, 2 * args.images,
           "images", "once per protocol")


# ---------------------------------------------------------------- k-NN

def measure_knn(args, device):
    """Both vote by exp(cosine / 0.07); scikit-learn's distances are Euclidean ones of unit vectors, its fastest path."""
    features, labels = random_features(args.train + args.tests, args.dim, 1000)
    train, tests, y = features[:args.train], features[args.train:], labels[:args.train]
    predictions = {}

    def ours():
        predictions["ours"] = knn_classify(train, y, tests, 1000, (args.k,), device=device)[args.k][:, 0].numpy()

    def theirs():
        unit, unit_tests = (F.normalize(x, dim=1).numpy() for x in (train, tests))
        classifier = KNeighborsClassifier(args.k, algorithm="brute", weights=lambda d: np.exp((1 - d ** 2 / 2) / 0.07))
        predictions["scikit-learn"] = classifier.fit(unit, y.numpy()).predict(unit_tests)

    seconds = alternate({"ours": ours, "scikit-learn": theirs}, args.rounds, device)
    same = 100 * np.mean(predictions["ours"] == predictions["scikit-learn"])
    report(f"knn: {args.tests} tests among {args.train} features of {args.dim}, k {args.k}, 1000 classes; same answer for "
           f"{same:.2f} %", seconds, args.tests, "tests", "scikit-learn")


# ---------------------------------------------------------------- logistic regression

def measure_logistic(args, device, penalty=1e-4):
    """A fifth of the features of k-NN, 100 classes; scikit-learn's C is 1 / (n penalty)."""
    features, labels = random_features(args.train // 5, args.dim, 100)
    x, y = features.to(device), labels.to(device)
    theirs = LogisticRegression(C=1 / (len(features) * penalty), fit_intercept=False, tol=1e-6, max_iter=1000)
    seconds = alternate({"ours": lambda: fit_logistic(x, y, 100, penalty),
                         "scikit-learn": lambda: theirs.fit(features.numpy(), labels.numpy())}, args.rounds, device)
    report(f"logistic: {len(features)} features of {args.dim}, 100 classes, penalty {penalty}", seconds, len(features),
           "images", "scikit-learn")


# ---------------------------------------------------------------- objects in videos

def dense_rule(queries, sources, masks, radius, topk, rows):
    """As the reference: affinities of `rows` query cells to all source cells, exponential, neighbourhood, the best."""
    h, w, C = masks[0].shape
    keys, values = torch.stack(sources).flatten(0, 2), torch.stack(masks).flatten(0, 2)  # [S N, D], [S N, C]
    cells = torch.arange(h * w, device=keys.device)
    y, x = cells // w, cells % w
    found = []
    for part, top, left in zip(queries.flatten(0, 1).split(rows), y.split(rows), x.split(rows), strict=True):
        near = ((top[:, None] - y).abs() <= radius) & ((left[:, None] - x).abs() <= radius)  # [rows, N]
        affinity = (part @ keys.T / 0.1).exp() * near.repeat(1, len(sources))  # [rows, S N]
        affinity[affinity < affinity.topk(topk, dim=1).values[:, -1:]] = 0
        found.append(affinity / affinity.sum(dim=1, keepdim=True) @ values)
    return torch.cat(found).view(h, w, C)


def measure_propagation(args, patch_size, h, w, device):
    """A frame of 480 x 832 pixels with 8 sources and 4 channels; neighbouring frames are alike."""
    torch.manual_seed(0)
    scene = torch.randn(h, w, args.dim)
    queries, *sources = (F.normalize(scene + 0.5 * torch.randn_like(scene), dim=-1).to(device) for _ in range(9))
    masks = [torch.rand(h, w, 4, device=device).softmax(dim=-1) for _ in sources]
    calls = {"tiles": lambda: propagate(queries, sources, masks, 12, 5),
             "dense, 260 cells at a time": lambda: dense_rule(queries, sources, masks, 12, 5, 260),
             "dense": lambda: dense_rule(queries, sources, masks, 12, 5, h * w)}
    with torch.inference_mode():
        memory = {name: risen(call, device) for name, call in calls.items()}  # first, while the allocator holds nothing
        differ = int(((calls["tiles"]() - calls["dense, 260 cells at a time"]()).abs() > 1e-6).any(dim=-1).sum())
        seconds = alternate(calls, args.rounds, device)
    # float32 decides whether the fifth best source or one that is as good but for its last digit is taken.
    medians = report(f"propagation: {h} x {w} cells (patches of {patch_size} pixels), features of {args.dim}, 8 sources; "
                     f"{differ} of {h * w} cells differ by more than 1e-6", seconds, 1, "frames", "dense")
    print("  dense / tiles: " + ", ".join(f"{name} {medians[name] / medians['tiles']:.2f}" for name in list(calls)[1:])
          + "; memory " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items()), flush=True)


def measure_boundaries(args):
    """F of two masks of 480 x 854 pixels."""
    y, x = np.mgrid[:480, :854]

    def blob(top, left, radius):
        return np.hypot((y - top) / 1.3, x - left) < radius * (1 + 0.15 * np.sin(5 * np.arctan2(y - top, x - left)))

    predicted, true = blob(240, 400, 110), blob(246, 409, 115)

    def by_transforms():
        edges = [davis.boundary(mask) for mask in (predicted, true)]
        precision, recall = (np.mean(distance_transform_edt(~b)[a] <= 8) for a, b in (edges, edges[::-1]))
        return 2 * precision * recall / (precision + recall)

    assert by_transforms() == davis.boundary_accuracy(predicted, true)
    seconds = alternate({"boundary points": lambda: davis.boundary_accuracy(predicted, true),
                         "distance transforms": by_transforms}, args.rounds, torch.device("cpu"))
    report("propagation: F of an object in a frame of 480 x 854 pixels", seconds, 1, "frames", "distance transforms")


def main():
    args = get_args()
    device = engine.choose_device(args.device)
    process = engine.Process(0, 1, 0, device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {name}; torch {torch.__version__}, scikit-learn {sklearn.__version__}; "
          f"medians of {args.rounds} rounds, what is compared in turn", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # listings of folders that will be gone
        if "heads" in args.parts:
            for classes in args.classes:
                measure_heads(args, classes, device)
        if "commands" in args.parts:
            measure_commands(args, folder)
        if "crops" in args.parts:
            measure_crops(args, folder, process)
        if "knn" in args.parts:
            measure_knn(args, device)
        if "logistic" in args.parts:
            measure_logistic(args, device)
        if "propagation" in args.parts:
            for patch_size, h, w in ((16, 30, 52), (8, 60, 104)):
                measure_propagation(args, patch_size, h, w, device)
            measure_boundaries(args)
        if "features" in args.parts:
            measure_features(args, folder, process)


if __name__ == "__main__":
    engine.run(main)
