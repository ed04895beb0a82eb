"""Features of the images of any folder, as a file for numpy; with a page of neighbours and near-duplicates among them.

    python evaluation/embed.py --pretrained_weights JOB/checkpoint.pth --data_path photos --output features.npz
    torchrun --nproc_per_node 8 evaluation/embed.py --pretrained_weights ... --data_path photos --output features.npz

    with np.load("features.npz") as file:                    # nothing in it is pickled
        names, features = file["names"], file["features"]    # [n] paths below the folder, sorted; [n, F] float32
        settings = json.loads(str(file["settings"]))

Images are those of the folder and of all folders in it, of a list (.txt), of shards, or of several of these, cut as in the
evaluations (`eval_transform`); features are those of `pool_features`, not normalised. The page, features/index.html, and
its tables compare them by the cosine, as the retrieval among images of one's own does; that takes the square of the number
of images, `--page false` leaves it out.

Features come from all processes; the first one writes and compares.
"""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch.nn.functional as F

import engine
from evaluation.common.arguments import add_pooling, evaluation_parser, int_from
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import eval_transform
from evaluation.common.features import extract_features, feature_dim, pool_features, sharded_loader
from evaluation.common.nearest import ListedImages, note_short_files, relative
from evaluation.common.neighbours import (
    add_neighbour_flags,
    compare_folders,
    image_paths,
    retrieval_set,
    rows_of,
    source_of,
    write_neighbours,
)
from evaluation.common.protocol import start_process
from listing import name_of, places_of


def get_args_parser():
    parser = evaluation_parser("Features of the images of any folder", frozen=False, labelled=False, several=True,
                               recorded=False)
    parser.add_argument("--output", required=True, help="file to write, .npz; the page is in the folder of that name")
    parser.add_argument("--image_size", type=int_from(1),
                        help="side in pixels; by default that of the checkpoint's global crops, else 224")
    add_pooling(parser.add_argument_group("features"))
    page = parser.add_argument_group("page")
    page.add_argument("--page", type=engine.bool_flag, default=True, help="write the page of neighbours and duplicates")
    add_neighbour_flags(page)
    return parser


def settings_of(args, backbone):
    """What the features depend on, but for the images: plain values by name."""
    return {"checkpoint": args.pretrained_weights, "key": backbone.key, "weights_hash": backbone.weights_hash,
            "arch": backbone.arch, "patch_size": backbone.patch_size, "window_size": backbone.window_size,
            "image_size": backbone.image_size, "n_last_blocks": args.n_last_blocks,
            "avgpool_patchtokens": args.avgpool_patchtokens, "mean": list(backbone.pixel_stats.mean),
            "std": list(backbone.pixel_stats.std), "data_path": args.data_path}


def main():
    args = get_args_parser().parse_args()
    output = Path(args.output)
    if output.suffix != ".npz":
        raise engine.InputError(f"--output {output}: its name must end in .npz")
    if not args.data_path:
        raise engine.InputError("--data_path: which folder?")
    process = start_process(args)
    backbone = load_evaluated_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                                       args.window_size, args.image_size)
    feature_dim(backbone.model, args.n_last_blocks, args.avgpool_patchtokens)
    paths = image_paths(args.data_path)
    root = os.path.realpath(os.path.expanduser(args.data_path)) if isinstance(args.data_path, str) else ""
    if not os.path.isdir(root):  # a list, or several places
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.InputError(f"--output {output}: its folder cannot be made ({error.strerror})") from error

    name, model = name_of(args.data_path), backbone.model.to(process.device)
    images = ListedImages([(path, None) for path in paths], eval_transform(backbone.image_size, backbone.normalize))
    loader = sharded_loader(images, args.batch_size_per_gpu, args.num_workers, process)
    features, _ = extract_features(lambda batch: pool_features(model, batch, args.n_last_blocks, args.avgpool_patchtokens),
                                   loader, process, name)
    note_short_files(images, name, process)
    if process.rank > 0:
        return
    names = np.array([relative(path, root).replace(os.sep, "/") for path in paths])
    with engine.replacing(output, "--output") as path, open(path, "wb") as file:
        np.savez(file, names=names, features=features.numpy(), settings=np.array(json.dumps(settings_of(args, backbone))))
    print(f"{output}: names [{len(names)}], features [{len(names)}, {features.shape[1]}], settings", flush=True)
    if args.page:
        data = retrieval_set(name, root, images.items, images.items)
        values, places, duplicates = compare_folders(backbone.key, data, F.normalize(features), args.topk, args.threshold,
                                                     process.device)
        facts = [("weights", source_of(args.pretrained_weights, backbone.key)),
                 ("images", f"{len(names)} in {' '.join(places_of(args.data_path))}")]
        write_neighbours(output.with_suffix(""), facts, data, rows_of(data, values, places, args.topk), args.page_queries,
                         duplicates)


if __name__ == "__main__":
    engine.run(main)
