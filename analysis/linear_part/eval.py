"""Part-wise linear probing (iBOT, Figure 5): how much of an image's class its most attended patches hold.

    torchrun --nproc_per_node 8 analysis/linear_part/eval.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --data_path data/imagenet --topk 1 7 14 56 112 196 --output_dir work_dirs/JOB/linear_part
    python analysis/linear_part/eval.py --device cpu --pretrained_weights ... --augment false  # on kept features

The feature of an image is the mean of the k patch tokens that [CLS] attends to most in the last block (mean of the heads),
taken before the final norm; `--reverse_top true` takes the k least attended ones. All k are trained in one pass, each with
heads of 45 learning rates. Writes `log.txt`, `checkpoint_KEY_linear.pth` (best) and `checkpoint_KEY_linear_last.pth` into
the folder topK of each k, with several keys in a folder of each key, and into the output folder `results.json` and the
curve `accuracy.png`.

Letters: B images of a batch, N patches, D width, n images, Q numbers of patches.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

import engine
from analysis import common
from evaluation.common.arguments import checkpoint_keys, int_from
from evaluation.common.charts import draw_curves
from evaluation.common.data import eval_transform, image_sets
from evaluation.common.features import extract_features, sharded_loader
from evaluation.common.heads import sweep_configs
from evaluation.common.linear import ProbeRun, add_probe_flags, check_probe, probe_settings, run_probes
from evaluation.common.protocol import start_process
from evaluation.common.results import read_results, results_folder


def get_args_parser():
    parser = common.analysis_parser("Linear probe of the most attended patches", data="data/imagenet")
    parser.set_defaults(checkpoint_key="teacher", batch_size=128)
    add_probe_flags(parser)
    parser.add_argument("--topk", type=int_from(1), nargs="+", default=[1, 7, 14, 56, 112, 196], help="numbers of patches")
    parser.add_argument("--reverse_top", type=engine.bool_flag, default=False, help="the least attended patches")
    parser.add_argument("--image_size", type=int_from(1), help="side in pixels; by default that of the checkpoint's global "
                        "crops, else 224")
    parser.add_argument("--output_dir", default=".", help="folder of the results")
    parser.add_argument("--results_dir", help="another folder for results.json")
    return parser


def part_features(tokens, scores, counts, reverse=False):
    """Means of the k tokens of largest score (`reverse`: smallest), for each k of `counts`.

    tokens [B, N, D], scores [B, N] to [B, Q, D]. Of equal scores the first patch counts.
    """
    order = scores.argsort(dim=1, descending=not reverse, stable=True).unsqueeze(-1)  # [B, N, 1]
    ordered = tokens.gather(1, order.expand_as(tokens))
    parts, total, start = [], 0, 0
    for k in sorted(counts):  # each sum goes on from the one before
        total = total + ordered[:, start:k].sum(dim=1)
        parts.append(total / k)
        start = k
    places = [sorted(counts).index(k) for k in counts]
    return torch.stack(parts, dim=1)[:, places]


def feature_fn(model, counts, reverse):
    """A function from images [B, 3, S, S] to the features of all k, [B, Q * D]."""
    def features(images):
        attention, tokens = common.last_block(model, images)
        return part_features(tokens[:, 1:], attention.mean(dim=1), counts, reverse).flatten(1)
    return features


def folder_of(args, keys, key, k):
    """Folder of the heads of one key and k."""
    return Path(args.output_dir) / (key if len(keys) > 1 else "") / f"top{k}{'_reverse' if args.reverse_top else ''}"


def probe(args, keys, backbone, train, val, process):
    """Train and validate the heads of every k on one backbone; returns the curve [(k, best top-1)]."""
    model, D, configs = backbone.model.to(process.device), backbone.model.embed_dim, sweep_configs()
    total_batch = args.batch_size * process.world_size
    settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "image_size": backbone.image_size,
                "weights_hash": backbone.weights_hash, "data_path": train.root, "train_images": len(train),
                "val_images": len(val), "reverse_top": args.reverse_top, **probe_settings(args, configs, total_batch),
                **backbone.pixel_stats.as_settings()}
    probes = [ProbeRun(backbone.key, folder_of(args, keys, backbone.key, k), configs, D, len(train.classes),
                       settings | {"topk": k}, True, process, f"{backbone.key}, k = {k}") for k in args.topk]
    fn = feature_fn(model, args.topk, args.reverse_top)

    def of_centre_crops(images):
        cut = images.with_transform(eval_transform(backbone.image_size, backbone.normalize))
        return extract_features(fn, sharded_loader(cut, args.batch_size, args.num_workers, process), process, images.name)

    run_probes(args, probes, "linear_part", backbone, train, val, of_centre_crops, fn)
    return sorted((probe.settings["topk"], probe.best["best"]["top1"]) for probe in probes)


def main():
    args = get_args_parser().parse_args()
    if len(set(args.topk)) < len(args.topk):
        raise engine.InputError(f"--topk {' '.join(map(str, args.topk))}: a number is there twice")
    process = start_process(args)
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    read_results(results_folder(args))  # a damaged file is found before the work
    for key in keys:
        for k in args.topk:
            check_probe(folder_of(args, keys, key, k), key, args)
    backbones = [common.load_vit(args.pretrained_weights, key, args.arch, args.patch_size, args.image_size)[0]
                 for key in keys]
    for backbone in backbones:
        cells = (backbone.image_size // backbone.patch_size) ** 2
        if max(args.topk) > cells:
            raise engine.InputError(f"--topk {max(args.topk)}: images of {backbone.image_size} pixels have {cells} patches")
    train, val = image_sets("imagefolder", args.data_path)
    if process.world_size > 1:
        dist.barrier()  # nobody may write before all have looked
    curves = {backbone.key: probe(args, keys, backbone, train, val, process) for backbone in backbones}
    if process.rank == 0:
        path = Path(args.output_dir) / "accuracy.png"
        which = "least" if args.reverse_top else "most"
        draw_curves(curves, "Top-1 accuracy (%) from the mean of k patches", path, f"k, the {which} attended patches",
                    log_x=True)
        print(f"{path}: the curve", flush=True)


if __name__ == "__main__":
    engine.run(main)
