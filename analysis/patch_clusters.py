"""k-means of image patches' colours: the offline tokenizer of iBOT's Table 20 (Appendix F).

    python analysis/patch_clusters.py --data_path data/imagenet/train --out centroids.safetensors
    python main_ibot.py --tokenizer kmeans --tokenizer_file centroids.safetensors --lambda1 0 --global_crops_number 1 ...

Images are scaled to 256/224 of `--image_size` and cut in the middle, all patches are taken, colours are in 0..1. The paper
has K 4096 and a tenth of ImageNet-1K's training images; how it starts and ends is not said: here k-means++ on 65,536
patches, then 20 rounds of Lloyd's algorithm. Rows are kept as bytes in a file beside `--out` until the end.

Letters: n patches, K centroids, F = 3 p p numbers of a patch (row, column, colour).
"""
import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

import engine
from evaluation.common.arguments import int_from
from evaluation.common.clustering import spread_out
from evaluation.common.data import eval_transform, subset_places
from images import ImageFolderInstance
from patch_tokenizers import nearest

BLOCK = 2**16  # rows at a time, and rows of the start


def get_args_parser():
    parser = argparse.ArgumentParser(description="k-means of image patches' colours", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_path", default="data/imagenet/train", **engine.SEVERAL,
                        help="folder of images, a list of them (.txt), tar shards, or several of these")
    parser.add_argument("--out", required=True, help="file of the centroids, .safetensors")
    parser.add_argument("--clusters", type=int_from(2), default=4096, help="K")
    parser.add_argument("--patch_size", type=int_from(1), default=16)
    parser.add_argument("--image_size", type=int_from(1), default=224, help="side of the crop in pixels")
    parser.add_argument("--subset", default="0.1", help="share of each class's images, or a list of file names; 1: all")
    parser.add_argument("--patches", type=int_from(1), help="draw so many patches; by default all")
    parser.add_argument("--rounds", type=int_from(1), default=20, help="of Lloyd's algorithm")
    parser.add_argument("--seed", type=int_from(0), default=0)
    parser.add_argument("--num_workers", type=int_from(0), default=engine.default_workers(), help="loader processes")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser


def patches_of(image, side):
    """uint8 [3, S, S] to the rows of its patches, uint8 [N, F]."""
    x = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [3, h, p, w, p]
    return x.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def rows_of(images, args, path):
    """Patches of a data set as a memory map of the file `path`, uint8 [n, F]; with `--patches` a draw of them."""
    per_image = (args.image_size // args.patch_size) ** 2
    total = per_image * len(images)
    wanted = min(args.patches or total, total)
    rows = np.memmap(path, dtype=np.uint8, mode="w+", shape=(wanted, 3 * args.patch_size**2))
    chosen = np.sort(np.random.default_rng(args.seed).permutation(total)[:wanted]) if wanted < total else None
    start, since = 0, time.time()
    loader = DataLoader(images, 64, num_workers=args.num_workers, worker_init_fn=engine.ignore_signals)
    for i, (batch, *_) in enumerate(loader):
        found = torch.cat([patches_of(image, args.patch_size) for image in batch]).numpy()
        if chosen is not None:
            first = 64 * per_image * i
            low, high = np.searchsorted(chosen, (first, first + len(found)))
            found = found[chosen[low:high] - first]
        rows[start:start + len(found)] = found
        start += len(found)
        if i % 100 == 99:
            left = (time.time() - since) / (i + 1) * (len(loader) - i - 1)
            print(f"{64 * (i + 1)} of {len(images)} images  eta {engine.eta_string(left)}", flush=True)
    return rows


def lloyd(rows, centroids, rounds, device):
    """Centroids [K, F] after so many rounds over rows, uint8 [n, F], and the mean squared distance before the last.

    A centroid without rows is put at the row that is farthest from its own.
    """
    for i in range(rounds):
        since, sums = time.time(), torch.zeros(centroids.shape, dtype=torch.float64)
        counts, distances = torch.zeros(len(centroids)), torch.zeros(len(rows))
        for first in range(0, len(rows), BLOCK):
            x = to_device(rows[first:first + BLOCK], device)
            found, relative = nearest(x, centroids)
            part = torch.zeros_like(centroids).index_add_(0, found, x)
            sums += part.cpu()
            counts += found.bincount(minlength=len(centroids)).cpu()
            distances[first:first + len(x)] = (relative + x.square().sum(dim=1)).clamp(min=0).cpu()
        new = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        far = distances.topk(len(empty)).indices.sort().values
        new[empty] = to_device(rows[far.numpy()], "cpu").double()
        inertia, centroids = distances.double().mean().item(), new.float().to(device)
        print(f"round {i + 1} of {rounds}: mean squared distance {inertia:.5f}, {len(empty)} empty, "
              f"{time.time() - since:.1f} s", flush=True)
    return centroids, inertia


def to_device(rows, device):
    """uint8 numpy rows to float32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device).float() / 255


def main():
    args = get_args_parser().parse_args()
    engine.need(args.out.endswith(".safetensors"), f"--out {args.out}: the file must end in .safetensors")
    engine.need(args.image_size % args.patch_size == 0,
                f"--image_size {args.image_size} is not a multiple of --patch_size {args.patch_size}")
    device = engine.choose_device(args.device, 0)
    images = ImageFolderInstance(args.data_path, eval_transform(args.image_size, normalize=torch.nn.Identity()),
                                 labelled=False)
    count = len(images)
    if args.subset != "1":
        images.targets = np.asarray(images.targets, dtype=np.int64)
        images = Subset(images, subset_places(images, args.subset, args.seed).tolist())
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    kept = Path(f"{args.out}.rows")
    try:
        rows = rows_of(images, args, kept)
        print(f"{len(rows)} patches of {len(images)} of {count} images, {rows.nbytes / 2**20:.0f} MiB", flush=True)
        engine.need(len(rows) >= args.clusters, f"--clusters {args.clusters} of {len(rows)} patches")
        generator = torch.Generator().manual_seed(args.seed)
        drawn = torch.randperm(len(rows), generator=generator)[:BLOCK].sort().values.numpy()
        start = to_device(rows[drawn], device)
        centroids = start[spread_out(start, args.clusters, generator)]
        centroids, inertia = lloyd(rows, centroids, args.rounds, device)
        about = {"p": args.patch_size, "K": args.clusters, "rows": len(rows), "images": len(images), "seed": args.seed,
                 "rounds": args.rounds, "inertia": inertia * len(rows)}
    finally:
        kept.unlink(missing_ok=True)
    temporary = f"{args.out}.tmp"
    save_file({"centroids": centroids.cpu()}, temporary, {name: str(value) for name, value in about.items()})
    os.replace(temporary, args.out)
    print(f"{args.clusters} centroids in {args.out}: {about}")


if __name__ == "__main__":
    engine.run(main)
