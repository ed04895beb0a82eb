"""Part-wise linear probing (iBOT, Figure 5): how much of an image's class its most attended patches hold.

    torchrun --nproc_per_node 8 analysis/linear_part/eval.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --data_path data/imagenet --topk 1 7 14 56 112 196 --output_dir work_dirs/JOB/linear_part
    python analysis/linear_part/eval.py --device cpu --pretrained_weights ... --augment false  # on kept features

The feature of an image is the mean of the k patch tokens that [CLS] attends to most in the last block (mean of the heads),
taken before the final norm; `--reverse_top true` takes the k least attended ones. All k are trained in one pass, each with
heads of 45 learning rates. Writes into OUTPUT/KEY_topK `log.txt`, `checkpoint_KEY_linear.pth` (best) and
`checkpoint_KEY_linear_last.pth`, and into OUTPUT `results.json` and the curve `accuracy.png`.

Letters: B images of a batch, N patches, D width, n images, Q numbers of patches.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import utils
from analysis import common
from evaluation.common.arguments import checkpoint_keys, int_from
from evaluation.common.data import eval_transform, image_sets
from evaluation.common.features import extract_features, sharded_loader
from evaluation.common.linear import (
    AugmentedImages,
    LinearHeads,
    Progress,
    ShareOfBatches,
    best_head,
    checkpoint_state,
    cosine,
    describe,
    epoch_order,
    gather_heads,
    image_batches,
    kept_batches,
    log_line,
    near,
    prepare_folder,
    restore,
    share_with_all,
    sweep_configs,
    validation_line,
)
from evaluation.common.results import append_result


def get_args_parser():
    parser = common.analysis_parser("Linear probe of the most attended patches", data="data/imagenet")
    parser.set_defaults(checkpoint_key="teacher", num_workers=10)
    parser.add_argument("--batch_size_per_gpu", dest="batch_size", type=int_from(1), default=128,
                        help="images per process and batch")
    parser.add_argument("--topk", type=int_from(1), nargs="+", default=[1, 7, 14, 56, 112, 196], help="numbers of patches")
    parser.add_argument("--reverse_top", type=utils.bool_flag, default=False, help="the least attended patches")
    parser.add_argument("--image_size", type=int_from(1), help="side in pixels; by default that of the checkpoint's global "
                        "crops, else 224")
    parser.add_argument("--epochs", type=int_from(1), default=100)
    parser.add_argument("--val_freq", type=int_from(1), default=1, help="epochs between validations and checkpoints")
    parser.add_argument("--augment", type=utils.bool_flag, default=True,
                        help="train on random crops; false: on centre crops, whose features are computed once")
    parser.add_argument("--seed", type=int_from(0), default=0)
    parser.add_argument("--output_dir", default=".", help="folder of the results")
    parser.add_argument("--resume", type=utils.bool_flag, default=False, help="go on from the last checkpoints there")
    parser.add_argument("--overwrite", type=utils.bool_flag, default=False, help="start over in a folder that holds some")
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


class PartHeads:
    """The sweep of heads of one k: what they are trained to, their files and how well they do."""

    def __init__(self, k, key, args, configs, mine, dim, num_classes, device):
        self.k, self.folder = k, Path(args.output_dir) / f"{key}_top{k}{'_reverse' if args.reverse_top else ''}"
        self.heads, self.best, self.now = LinearHeads(configs[mine], dim, num_classes, args.seed, device), None, None
        self.last_file, self.best_file = (self.folder / f"checkpoint_{key}_linear{end}.pth" for end in ("_last", ""))
        self.lines = []


def all_features(fn, images, size, args, shape, process):
    """Features [n, Q * D] and labels [n] of centre crops in every process, on its device if they fit."""
    loader = sharded_loader(images.with_transform(eval_transform(size)), args.batch_size, args.num_workers, process)
    features, labels = extract_features(fn, loader, process, images.name)
    features = share_with_all(features, shape, torch.float32, process)
    labels = share_with_all(labels, shape[:1], torch.int64, process)
    return near(features, process.device), near(labels, process.device)


def probe(args, key, backbone, train, val, process):
    """Train and validate the heads of every k on one backbone; returns the best records {k: record}."""
    model, D = backbone.model.to(process.device), backbone.model.embed_dim
    cells = (backbone.image_size // backbone.patch_size) ** 2
    if max(args.topk) > cells:
        raise utils.InputError(f"--topk {max(args.topk)}: images of {backbone.image_size} pixels have {cells} patches")
    fn, configs, main = feature_fn(model, args.topk, args.reverse_top), sweep_configs(), process.rank == 0
    total_batch, num_classes = args.batch_size * process.world_size, len(train.classes)
    scale = total_batch / 256
    mine = slice(*(len(configs) * r // process.world_size for r in (process.rank, process.rank + 1)))
    parts = [PartHeads(k, key, args, configs, mine, D, num_classes, process.device) for k in args.topk]
    settings = {part.k: {"arch": backbone.arch, "patch_size": backbone.patch_size, "image_size": backbone.image_size,
                         "weights_hash": backbone.weights_hash, "data_path": train.root, "train_images": len(train),
                         "val_images": len(val), "topk": part.k, "reverse_top": args.reverse_top, "heads": len(configs),
                         "epochs": args.epochs, "total_batch": total_batch, "augment": args.augment, "seed": args.seed}
                for part in parts}
    start = set()
    for part in parts:
        if args.resume:
            epoch, part.best = restore(part.last_file, part.heads, mine, configs, scale, args.epochs, settings[part.k],
                                       True)
            start.add(epoch)
    start = start or {0}
    if len(start) > 1:
        raise utils.InputError(f"--resume: the checkpoints in {args.output_dir} are of the epochs {sorted(start)}")
    start = start.pop()
    if main:
        for part in parts:
            prepare_folder(part.folder, part.folder / "log.txt", start)

    # ============ features ============
    val_features, val_labels = all_features(fn, val, backbone.image_size, args, (len(val), len(parts) * D), process)
    if args.augment:
        targets = torch.from_numpy(train.targets)
        shares = ShareOfBatches(len(train), total_batch, process, args.seed)
        loader = DataLoader(AugmentedImages(train, backbone.image_size, args.seed), batch_sampler=shares,
                            num_workers=args.num_workers, pin_memory=process.device.type == "cuda",
                            persistent_workers=args.num_workers > 0)
    else:
        kept = all_features(fn, train, backbone.image_size, args, (len(train), len(parts) * D), process)

    # ============ training ============
    progress = Progress(len(train), args.epochs, start)
    for epoch in range(start, args.epochs):
        rate_scale, sums, count = scale * cosine(epoch, args.epochs), [0] * len(parts), 0
        if args.augment:
            shares.epoch = epoch
            batches = image_batches(loader, targets, fn, process)
        else:
            batches = kept_batches(*kept, epoch_order(len(train), args.seed, epoch), total_batch, process.device)
        for features, labels in batches:
            for i, (part, own) in enumerate(zip(parts, features.split(D, dim=1), strict=True)):
                sums[i] += part.heads.step(own.contiguous(), labels, rate_scale) * len(labels)
            count += len(labels)
            if main:
                progress.report(epoch, count, sums[0])
        validate = (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs
        for part, total, own in zip(parts, sums, val_features.split(D, dim=1), strict=True):
            losses = gather_heads(total / count, process).tolist()
            part.lines.append(log_line(epoch, configs, rate_scale, losses, True))
            if validate:
                save_validation(part, key, configs, scale, epoch, args.epochs, own, val_labels, num_classes,
                                settings[part.k], process)
    best = {part.k: part.best["best"] for part in parts}
    if main:
        for part in parts:
            print(f"{key}, k = {part.k}: {describe(part.best['best'], configs)}", flush=True)
            append_result(args.output_dir, "linear_part", args.pretrained_weights, key, settings[part.k],
                          {"best": part.best["best"]} | ({"last": part.now} if part.now else {}))
    return best


def save_validation(part, key, configs, scale, epoch, epochs, features, labels, num_classes, settings, process):
    """Validate the heads of one k and write their log and checkpoints; all processes call it together."""
    scores = gather_heads(part.heads.evaluate(features, labels), process).tolist()
    if num_classes < 5:
        scores = [(loss, top1, None) for loss, top1, _ in scores]
    part.lines[-1] |= validation_line(scores, True)
    part.now = best_head(scores, range(len(configs)), configs, epoch)
    is_best = part.best is None or part.now["top1"] >= part.best["best"]["top1"]
    if is_best:
        part.best = {"best": part.now, "best_sweep_lr_only": part.now}  # the sweep is of rates alone
    state = checkpoint_state(part.heads, configs, scale, epoch + 1, epochs, part.best, settings, True, process)
    if process.rank == 0:
        utils.save_atomically(state, part.last_file)
        if is_best:
            utils.save_atomically(state, part.best_file)
        with open(part.folder / "log.txt", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in part.lines)
        print(f"{key}, k = {part.k}, epoch {epoch}/{epochs}: {describe(part.now, configs)}", flush=True)
    part.lines = []


def main():
    args = get_args_parser().parse_args()
    if len(set(args.topk)) < len(args.topk):
        raise utils.InputError(f"--topk {' '.join(map(str, args.topk))}: a number is there twice")
    if args.resume and args.overwrite:
        raise utils.InputError("--resume and --overwrite exclude each other")
    process = utils.init_process(args.device, args.dist_url)
    if process.rank == 0:
        print(utils.describe_run(args, process), flush=True)
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    backbones = {key: common.load_vit(args.pretrained_weights, key, args.arch, args.patch_size, args.image_size)[0]
                 for key in keys}
    train, val = image_sets("imagefolder", args.data_path)
    for key in keys:
        for k in args.topk:
            folder = Path(args.output_dir) / f"{key}_top{k}{'_reverse' if args.reverse_top else ''}"
            last = folder / f"checkpoint_{key}_linear_last.pth"
            if args.resume and not last.is_file():
                raise utils.InputError(f"--resume: {last} does not exist")
            if not args.resume and not args.overwrite and last.exists():
                raise utils.InputError(f"--output_dir {args.output_dir} already holds {last}; go on with --resume true, "
                                       "start over with --overwrite true, or choose another folder")
    if process.world_size > 1:
        dist.barrier()  # nobody may write before all have looked
    curves = {}
    for key in keys:
        best = probe(args, key, backbones[key], train, val, process)
        curves[key] = sorted((k, record["top1"]) for k, record in best.items())
    if process.rank == 0:
        path = Path(args.output_dir) / "accuracy.png"
        what = "least" if args.reverse_top else "most"
        common.line_chart(curves, path, f"patches, {what} attended first", "top-1 accuracy (%)", log_x=True)
        print(f"{path}: the curve", flush=True)


if __name__ == "__main__":
    utils.run(main)
