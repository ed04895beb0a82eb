"""Retrieval by frozen features: revisited Oxford and Paris (iBOT, Table 16; Radenovic et al., 2018), or your own folders.

    python evaluation/eval_image_retrieval.py --pretrained_weights JOB/checkpoint.pth --imsize 512 --multiscale true
    torchrun --nproc_per_node 8 evaluation/eval_image_retrieval.py --pretrained_weights ... --dataset rparis6k roxford5k
    python evaluation/eval_image_retrieval.py --pretrained_weights ... --data_path photos --queries photos --output_dir out

The data set SET is read from DATA/SET/gnd_SET.{json,pkl} and DATA/SET/jpg/. With `--queries` images of a folder are looked
for among those of another, or of the same: which are nearest, and which pairs are near-duplicates. With an output folder
there is a page of queries with their nearest images, OUTPUT_DIR/retrieval/SET/KEY/index.html, with tables beside it.

Features come from all processes; the first one ranks.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.arguments import add_pooling, evaluation_parser, int_from
from evaluation.common.features import feature_dim
from evaluation.common.nearest import (
    check_files,
    check_sizes,
    extract_listed,
    image_sizes,
    nearest,
    retrieval_features,
    thumbnail_size,
    thumbnail_transform,
)
from evaluation.common.neighbours import (
    add_neighbour_flags,
    compare_folders,
    image_paths,
    retrieval_set,
    rows_of,
    source_of,
    write_neighbours,
)
from evaluation.common.protocol import read_vits, start_process
from evaluation.common.ranking import PRECISIONS, read_ground_truth, retrieval_scores
from evaluation.common.results import append_result, results_folder
from listing import name_of, places_of

SETS = ("roxford5k", "rparis6k")


def get_args_parser():
    parser = evaluation_parser("Retrieval by features of a frozen backbone", frozen=False, labelled=False, several=True)
    parser.set_defaults(data_path="data/revisited_paris_oxford", batch_size_per_gpu=32)
    features = parser.add_argument_group("features")
    features.add_argument("--imsize", type=int_from(1), default=224,
                          help="longer side of the images in pixels at most; smaller ones stay as they are")
    features.add_argument("--multiscale", type=engine.bool_flag, nargs="?", const=True, default=False,
                          help="mean over the scales 1, 1/sqrt(2) and 1/2")
    add_pooling(features)
    retrieval = parser.add_argument_group("retrieval")
    retrieval.add_argument("--dataset", choices=SETS, nargs="+", help="evaluated in turn; by default roxford5k")
    retrieval.add_argument("--crop_queries", type=engine.bool_flag, nargs="?", const=True, default=False,
                           help="cut queries to their boxes, as the official protocol does; not so the published numbers")
    retrieval.add_argument("--queries", metavar="FOLDER", **engine.SEVERAL,
                           help="look for these images among those of --data_path, not for a data set; both take a folder, "
                                "a list (.txt), tar shards, or several of these")
    add_neighbour_flags(retrieval)
    return parser


# ---------------------------------------------------------------- data

def read_benchmark(data_path, name, crop_queries):
    """The `RetrievalSet` of revisited Oxford or Paris. Raises InputError, naming the file, for what is missing."""
    folder = Path(data_path) / name
    truth = read_ground_truth(folder, name)
    images, queries = ([str(folder / "jpg" / f"{image}.jpg") for image in truth[key]] for key in ("imlist", "qimlist"))
    check_files(images + queries, name)
    boxes = [tuple(query["bbx"]) if crop_queries else None for query in truth["gnd"]]
    return retrieval_set(name, folder / "jpg", [(path, None) for path in images], list(zip(queries, boxes, strict=True)),
                         truth["gnd"])


def read_folders(data_path, queries):
    """The `RetrievalSet` of two folders (see `listing.list_images`), or of one against itself."""
    images, asked = map(image_paths, (data_path, queries))
    root = os.path.commonpath([os.path.dirname(path) for path in images + asked])
    return retrieval_set(name_of(queries), root, [(path, None) for path in images],
                         [(path, None) for path in asked], None)


def extract(args, backbone, data, sizes, process):
    """Features [number of items, F] of a `RetrievalSet` on rank 0, None elsewhere; sizes: of its images as they are fed."""
    model, patch_size = backbone.model.to(process.device), backbone.patch_size
    least = patch_size * (2 if args.multiscale else 1)
    check_sizes(data.items, sizes, least)

    def model_fn(images):
        return retrieval_features(model, images, patch_size, args.multiscale, args.n_last_blocks, args.avgpool_patchtokens)
    return extract_listed(model_fn, data.items, thumbnail_transform(args.imsize, backbone.normalize), sizes,
                          args.batch_size_per_gpu, args.num_workers, process, data.name)


# ---------------------------------------------------------------- results

def evaluate_benchmark(args, key, backbone, data, features, device):
    """Rank, print and record for one key. Returns (similarities, places) [Q, n] of the rankings."""
    values, order = nearest(features[data.queries], features[data.database], len(data.database), device)
    scores = retrieval_scores(order.numpy(), data.gnd)
    print(f"{key}, {data.name}, {'queries cut to their boxes' if args.crop_queries else 'whole queries'}:", flush=True)
    for protocol, found in scores.items():
        shown = [f"mAP {found['map']:.2f}", *(f"mP@{k} {found[f'p{k}']:.2f}" for k in PRECISIONS)] if found else []
        print(f"  {protocol}: {', '.join(shown) or 'no query has positives'}", flush=True)
    if results_folder(args):
        settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "weights_hash": backbone.weights_hash,
                    "n_last_blocks": args.n_last_blocks, "avgpool_patchtokens": args.avgpool_patchtokens,
                    "imsize": args.imsize, "multiscale": args.multiscale, "crop_queries": args.crop_queries,
                    "data_path": data.root, "database_images": len(data.database), "query_images": len(data.queries)}
        append_result(results_folder(args), f"retrieval_{data.name}", args.pretrained_weights, key, settings, scores)
    return values, order


def main():
    args = get_args_parser().parse_args()
    if args.queries and args.dataset:
        raise engine.InputError("--queries and --dataset: either folders or a data set")
    if args.queries and not args.output_dir:
        raise engine.InputError("--queries: --output_dir is needed, for the table and the page")
    if not args.queries and not isinstance(args.data_path, str):
        raise engine.InputError("--data_path: several folders are for --queries")
    process = start_process(args)
    backbones = read_vits(args)
    for backbone in backbones.values():
        feature_dim(backbone.model, args.n_last_blocks, args.avgpool_patchtokens)
    sets = [read_folders(args.data_path, args.queries)] if args.queries else [
        read_benchmark(args.data_path, name, args.crop_queries) for name in args.dataset or SETS[:1]]
    sizes = [[thumbnail_size(size, args.imsize) for size in image_sizes(data.items)] for data in sets]
    features = {}
    for key, backbone in backbones.items():  # all before the first is ranked: meanwhile the other processes would wait
        features[key] = [extract(args, backbone, *part, process) for part in zip(sets, sizes, strict=True)]
        backbone.model.cpu()
    if process.rank > 0:
        return
    for key, backbone in backbones.items():
        for data, found in zip(sets, features[key], strict=True):
            duplicates = None
            if args.queries:
                values, places, duplicates = compare_folders(key, data, found, args.topk, args.threshold, process.device)
            else:
                values, places = evaluate_benchmark(args, key, backbone, data, found, process.device)
            if args.output_dir:
                queries = f"{len(data.queries)}{' in ' + ' '.join(places_of(args.queries)) if args.queries else ''}"
                facts = [("weights", source_of(args.pretrained_weights, key)),
                         ("images", f"{len(data.database)} in {' '.join(places_of(args.data_path))}"), ("queries", queries)]
                write_neighbours(Path(args.output_dir) / "retrieval" / data.name / key, facts, data,
                                 rows_of(data, values, places, args.topk), args.page_queries, duplicates)


if __name__ == "__main__":
    engine.run(main)
