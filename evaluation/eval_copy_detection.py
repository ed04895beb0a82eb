"""Copy detection on Copydays (Douze et al., 2009) by frozen features, as DINO does it (Caron et al., 2021, Section 4.2).

    python evaluation/eval_copy_detection.py --pretrained_weights work_dirs/JOB/checkpoint.pth --data_path data/copydays
    torchrun --nproc_per_node 8 evaluation/eval_copy_detection.py --pretrained_weights ... --imsize 320 \
        --distractors_path data/yfcc_10k --whitening_path data/yfcc_20k

Which original does an image of one of 20 blocks come from: the originals themselves, strong edits, nine qualities of JPEG,
nine crops? Average precision among the 20 best of originals and distractors. Descriptors are the [CLS] token and the
generalised mean of the patch tokens, whitened by the statistics of other images, if there are some.

Features come from all processes; the first one ranks.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

import engine
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.nearest import (
    ListedImages,
    copy_descriptors,
    extract_listed,
    folder_images,
    nearest,
    note_short_files,
    square_transform,
)
from evaluation.common.protocol import read_vits, start_process
from evaluation.common.ranking import average_precision
from evaluation.common.results import append_result, results_folder
from evaluation.common.whitening import Moments, whiten, whitening

LEVELS = {"jpegqual": (3, 5, 8, 10, 15, 20, 30, 50, 75), "crops": (10, 15, 20, 30, 40, 50, 60, 70, 80)}
BLOCKS = ("original", "strong", *(f"{kind}/{level}" for kind, levels in LEVELS.items() for level in levels))
BEST = 20  # of the database that count
SAME = 4  # characters at the start of a file's name that tell which original it is of


def get_args_parser():
    parser = evaluation_parser("Copy detection by features of a frozen backbone", frozen=False, labelled=False)
    parser.set_defaults(data_path="data/copydays", batch_size_per_gpu=16)
    copies = parser.add_argument_group("copy detection")
    copies.add_argument("--imsize", type=int_from(1), default=224, help="side that all images are squashed to, in pixels")
    copies.add_argument("--distractors_path", metavar="FOLDER", help="images to add to the originals (DINO: 10,000)")
    copies.add_argument("--whitening_path", metavar="FOLDER", help="other images, to whiten descriptors by (DINO: 20,000)")
    return parser


# ---------------------------------------------------------------- data

def read_blocks(data_path):
    """{block: paths of its images, sorted}. Raises InputError for one that is missing or empty; warns of other sizes."""
    blocks = {block: folder_images(Path(data_path) / block, "Copydays") for block in BLOCKS}
    odd = [f"{block} {len(paths)}" for block, paths in blocks.items() if len(paths) != (229 if block == "strong" else 157)]
    if odd:
        engine.say_once(f"warning: {data_path}: published are 229 images in strong and 157 in all other blocks, here are "
                       f"{', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}")
    return blocks


def find_positives(blocks):
    """{block: for each of its images the places of its originals}.

    Of `strong` the originals whose names begin with the same four characters, of other blocks the one at the same place;
    a warning where those characters then differ. Raises InputError for an image without an original.
    """
    def start(path):
        return os.path.basename(path)[:SAME]

    places = {}
    for place, path in enumerate(blocks["original"]):
        places.setdefault(start(path), []).append(place)
    positives, differ = {}, []
    for block, paths in blocks.items():
        positives[block] = [places.get(start(path), []) for path in paths] if block == "strong" else [
            [place] if place < len(blocks["original"]) else [] for place in range(len(paths))]
        for path, found in zip(paths, positives[block], strict=True):
            if not found:
                raise engine.InputError(f"{path}: none of the {len(blocks['original'])} originals belongs to it")
            if start(blocks["original"][found[0]]) != start(path):
                differ.append(path)
    if differ:
        engine.say_once(f"warning: {len(differ)} images have another name than the original at their place in the sorted "
                       f"list, which they are compared with; the first one is {differ[0]}")
    return positives


# ---------------------------------------------------------------- descriptors

def read_whitening(model_fn, dim, paths, transform, args, process):
    """`whitening` on rank 0 by the descriptors of the images `paths`, which have `dim` numbers; None elsewhere."""
    images = ListedImages([(path, None) for path in paths], transform)
    own = Subset(images, range(process.rank, len(images), process.world_size))
    moments = Moments(dim)
    with torch.inference_mode():
        for batch, _, _ in DataLoader(own, args.batch_size_per_gpu, num_workers=args.num_workers,
                                      pin_memory=process.device.type == "cuda"):
            moments.add(model_fn(batch.to(process.device, non_blocking=True)))
    sums = moments.sums()
    if process.world_size > 1:
        sums = sums.to(process.device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    if not sums.isfinite().all():
        raise engine.InputError("features of the whitening images are not finite: the weights hold NaN or overflow")
    note_short_files(images, "whitening", process)
    if process.rank > 0:
        return None
    enough = "" if len(images) >= dim else f"; fewer than the {dim} directions: some are blown up, do not trust the result"
    print(f"whitening by {len(images)} images: {dim} directions kept, 100 % of the energy{enough}", flush=True)
    return whitening(sums, len(images))


def extract(args, backbone, paths, whitening_paths, process):
    """Descriptors [n, 2 D] of length 1 of the images `paths` on rank 0, whitened if there are images for it; else None."""
    model, patch_size = backbone.model.to(process.device), backbone.patch_size
    if args.imsize < patch_size:
        raise engine.InputError(f"--imsize {args.imsize}: smaller than a patch of {patch_size} pixels")

    def model_fn(images):
        return copy_descriptors(model, images, patch_size)
    transform, statistics = square_transform(args.imsize, backbone.normalize), None
    if whitening_paths:
        statistics = read_whitening(model_fn, 2 * model.embed_dim, whitening_paths, transform, args, process)
    items, sizes = [(path, None) for path in paths], [args.imsize] * len(paths)
    x = extract_listed(model_fn, items, transform, sizes, args.batch_size_per_gpu, args.num_workers, process, "Copydays")
    model.cpu()
    if process.rank > 0:
        return None
    return F.normalize(x if statistics is None else whiten(x, *statistics), dim=1)


# ---------------------------------------------------------------- scores

def copy_score(places, positives):
    """Mean average precision of rankings [Q, k], the places of the k best, best first.

    positives: for each query the places of its originals. One that is not among the k best counts as never found.
    """
    return float(np.mean([average_precision(np.flatnonzero(np.isin(ranking, right)), len(right))
                          for ranking, right in zip(places, positives, strict=True)]))


def evaluate(args, key, backbone, features, counts, positives, device):
    """Rank, print and record for one key. Returns {block: mean average precision}.

    features: [n, F] of the images of all blocks, in their order, then of the distractors; counts: how many images each
    block, "distractors" and "whitening" have.
    """
    ends = np.cumsum([counts[block] for block in BLOCKS])
    parts = dict(zip(BLOCKS, features[:ends[-1]].split([counts[block] for block in BLOCKS]), strict=True))
    database = torch.cat((parts["original"], features[ends[-1]:]))
    places = nearest(features[:ends[-1]], database, BEST, device)[1].numpy()
    scores = {block: copy_score(ranking, positives[block])
              for block, ranking in zip(BLOCKS, np.split(places, ends[:-1]), strict=True)}
    print(f"{key}: {ends[-1]} images of {len(BLOCKS)} blocks among {counts['original']} originals and "
          f"{counts['distractors']} distractors", flush=True)
    for block, score in scores.items():
        print(f"eval on {block} mAP={score:.3f}", flush=True)
    if results_folder(args):
        settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "weights_hash": backbone.weights_hash,
                    "imsize": args.imsize, "data_path": str(args.data_path), "query_images": int(ends[-1]),
                    "distractors": counts["distractors"], "whitening_images": counts["whitening"]}
        levels = {kind: {str(level): 100 * scores[f"{kind}/{level}"] for level in LEVELS[kind]} for kind in LEVELS}
        metrics = {block: 100 * scores[block] for block in ("strong", "original")}
        metrics |= {kind: float(np.mean(list(values.values()))) for kind, values in levels.items()}
        append_result(results_folder(args), "copy_detection", args.pretrained_weights, key, settings,
                      metrics | {"levels": levels})
    return scores


def main():
    args = get_args_parser().parse_args()
    process = start_process(args)
    backbones = read_vits(args)
    blocks = read_blocks(args.data_path)
    positives = find_positives(blocks)
    more = {name: folder_images(path, f"--{name}_path") if path else []
            for name, path in (("distractors", args.distractors_path), ("whitening", args.whitening_path))}
    paths = [path for found in blocks.values() for path in found] + more["distractors"]
    # All keys before the first is ranked: meanwhile the other processes would wait.
    features = {key: extract(args, backbone, paths, more["whitening"], process) for key, backbone in backbones.items()}
    if process.rank == 0:
        counts = {name: len(found) for name, found in (blocks | more).items()}
        for key, backbone in backbones.items():
            evaluate(args, key, backbone, features[key], counts, positives, process.device)


if __name__ == "__main__":
    engine.run(main)
