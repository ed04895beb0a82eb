"""Occlusion and shuffling (iBOT, Figures 9 and 10, Table 8): accuracy when patches are dropped or change places.

    python analysis/occlusion/eval.py --pretrained_weights classifier.pth --test_data data/imagenet/val --random_drop --dino
    python analysis/occlusion/eval.py --pretrained_weights classifier.pth --shuffle
    torchrun --nproc_per_node 8 analysis/occlusion/eval.py ...

`--random_drop` drops cells of a grid, chosen anew for each group of 1024 images. `--dino` drops by saliency: the patches
that hold the share lambda of the attention of [CLS] in the last block (salient), or all others (non-salient); attention of
the tested network itself, or of the checkpoint `--saliency_from` (the authors' code takes DINO's ViT-S/16). A dropped pixel
has the mean colour. `--shuffle` cuts images into cells and permutes these. Protocol of Naseer et al. (2021).

Letters: B images of a batch, N patches, S pixels, h x w cells.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from torchvision.transforms import v2

import engine
from analysis import common
from analysis.classifier import classifier_parser, own_batches, record, require, start, summed
from evaluation.common.arguments import int_from
from evaluation.common.charts import draw_curves

GROUP = 1024  # images that share a choice, the reference's batch
STEPS = 10
PAPER_GRIDS = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (14, 14), (16, 16))  # Figure 10


def get_args_parser():
    parser = classifier_parser("Accuracy under dropped and shuffled patches", "data/imagenet/val",
                               weights="--pretrained_weights", data_flag="--test_data")
    parser.add_argument("--scale_size", type=int_from(1), help="shorter side before the crop; by default 8/7 of it")
    parser.add_argument("--bicubic_resize", type=engine.bool_flag, default=False, help="by default bilinear")
    parser.add_argument("--random_drop", action="store_true", help="drop random cells")
    parser.add_argument("--dino", action="store_true", help="drop salient and non-salient patches")
    parser.add_argument("--shuffle", action="store_true", help="permute cells")
    parser.add_argument("--random_offset_drop", action="store_true", help="shift the dropped cells by half a patch")
    parser.add_argument("--shuffle_size", type=int_from(1), nargs="+", help="sides of the grids of --shuffle, by default "
                        "Figure 10's; without --shuffle side, or height and width, of the grid of --random_drop, by "
                        "default the patches")
    parser.add_argument("--shuffle_h", type=int_from(1), nargs="+", help="heights of grids of --shuffle, and")
    parser.add_argument("--shuffle_w", type=int_from(1), nargs="+", help="their widths")
    parser.add_argument("--saliency_from", default="self", metavar="FILE", help="checkpoint of the ViT whose attention "
                        "says what is salient; self: the tested one")
    parser.add_argument("--saliency_arch", help="arch of --saliency_from, if its file does not say")
    parser.add_argument("--saliency_patch_size", type=int_from(1), help="patch size of --saliency_from, if its file "
                        "does not say")
    parser.add_argument("--saliency_head", type=int, default=1, help="head that counts, from 0; -1: their mean")
    parser.add_argument("--exp_count", type=int_from(1), default=1, help="repetitions with other choices")
    parser.add_argument("--seed", type=int_from(0), default=1)
    return parser


# ---------------------------------------------------------------- degradation

def rng_of(*numbers):
    return np.random.default_rng(np.random.SeedSequence(numbers))


def cell_mask(cells, grid, size, offset=0):
    """What stays when `cells` (numbers) of a grid (h, w) are dropped: bool [S, S]; the pattern moved by `offset` pixels."""
    h, w = grid
    kept = np.ones(h * w, dtype=bool)
    kept[cells] = False
    pixels = kept.reshape(h, w).repeat(size // h, 0).repeat(size // w, 1)
    if offset:
        moved = np.ones_like(pixels)
        moved[offset:, offset:] = pixels[:-offset, :-offset]
        pixels = moved
    return torch.from_numpy(pixels)


def drop_counts(cells):
    """Numbers of dropped cells of the sweep: 0, 1/10, ..., 9/10 of `cells`, rounded down."""
    return [i * cells // STEPS for i in range(STEPS)]


def shuffled(images, grid, order):
    """Images [B, 3, S, S] whose cell number i of the grid (h, w) is the cell `order`[i] of the given ones."""
    (h, w), (B, C, H, W) = grid, images.shape
    cells = images.view(B, C, h, H // h, w, W // w).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # [h * w, B, 3, H/h, W/w]
    cells = cells[torch.as_tensor(order, device=images.device)].unflatten(0, (h, w))
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(B, C, H, W)


def enlarged(patches, size):
    """Square patches [B, N] to pixels [B, S, S]."""
    side = math.isqrt(patches.shape[1])
    return patches.view(-1, side, side).repeat_interleave(size // side, 1).repeat_interleave(size // side, 2)


def at_loss(points, loss):
    """Accuracy at an information loss, interpolated in the points (loss, accuracy); None outside of them."""
    points = sorted(points)
    if not points[0][0] <= loss <= points[-1][0]:
        return None
    return float(np.interp(loss, *zip(*points, strict=True)))


# ---------------------------------------------------------------- passes

class Degradations:
    """All degraded versions of a batch.

    Args:
        size: S. groups: image number i takes part in the random choices of group i % groups. seed: of these.
        drop: None, or ((h, w), offset) of the cells that are dropped at random.
        saliency: None, or a function from images to attention [B, N], by which patches are dropped.
        grids: list of (h, w) whose cells are permuted.

    Attribute `names`: (kind, setting) of each version.
    """

    def __init__(self, size, groups, seed, drop=None, saliency=None, grids=()):
        self.size, self.groups, self.seed, self.drop, self.saliency = size, groups, seed, drop, saliency
        self.names = [("random", i) for i in range(STEPS) if drop]
        self.names += [(kind, i) for kind in ("salient", "non-salient") for i in range(1, STEPS + 1) if saliency]
        self.names += [("shuffle", grid) for grid in grids]

    def __call__(self, images, indices):
        """Yields, for every one of `names`, the images [B, 3, S, S] and the share of each that is lost, [B]."""
        salience = self.saliency(images) if self.saliency else None  # [B, N]
        groups, places = (indices % self.groups).unique(return_inverse=True)
        for kind, setting in self.names:
            if kind == "shuffle":
                yield self._shuffled(images, setting, groups, places), torch.zeros(len(images))
                continue
            if kind == "random":
                kept = torch.stack([self._random_mask(setting, group) for group in groups.tolist()])[places]  # [B, S, S]
                kept = kept.to(images.device)
            else:
                kept = common.mass_mask(salience, setting / STEPS)
                kept = ~kept if kind == "salient" else kept
                kept = enlarged(kept, self.size)
            yield images * kept.unsqueeze(1), 1 - kept.flatten(1).float().mean(dim=1)

    def _random_mask(self, step, group):
        grid, offset = self.drop
        cells = rng_of(self.seed, step, group).permutation(grid[0] * grid[1])[:drop_counts(grid[0] * grid[1])[step]]
        return cell_mask(cells, grid, self.size, offset)

    def _shuffled(self, images, grid, groups, places):
        result = torch.empty_like(images)
        for number, group in enumerate(groups.tolist()):
            rows = (places == number).to(images.device)
            order = rng_of(self.seed, *grid, group).permutation(grid[0] * grid[1])
            result[rows] = shuffled(images[rows], grid, order)
        return result


@torch.inference_mode()
def measure(classifier, images, degradations, batch_size, num_workers, process):
    """{name: (accuracy as a share, mean information loss)} in one pass over the images."""
    sums = torch.zeros(len(degradations.names), 2, dtype=torch.float64)
    for step, (batch, labels, indices) in enumerate(own_batches(images, batch_size, num_workers, process)):
        batch, labels = batch.to(process.device), labels.to(process.device)
        for row, (degraded, lost) in zip(sums, degradations(batch, indices), strict=True):
            row[0] += (classifier(degraded).argmax(dim=1) == labels).sum().cpu()
            row[1] += lost.sum().cpu()
        if process.rank == 0 and (step + 1) % 50 == 0:
            print(f"{(step + 1) * batch_size * process.world_size}/{len(images)} images", flush=True)
    sums = summed(sums, process) / len(images)
    return {name: tuple(row) for name, row in zip(degradations.names, sums.tolist(), strict=True)}


def grids_of(args, size, patch_size):
    """(((h, w), offset) of --random_drop or None, list of (h, w) of --shuffle). Raises InputError for what does not fit."""
    if not (args.random_drop or args.dino or args.shuffle):
        raise engine.InputError("give --random_drop, --dino or --shuffle, or several of them")
    if len(args.shuffle_h or ()) != len(args.shuffle_w or ()):
        raise engine.InputError("--shuffle_h and --shuffle_w: give as many heights as widths")
    drop = None
    if args.random_drop:
        grid = args.shuffle_size if args.shuffle_size and not args.shuffle else [size // patch_size]
        if len(grid) > 2:
            raise engine.InputError("--shuffle_size: --random_drop takes one number, or height and width")
        drop = ((grid[0], grid[-1]), patch_size // 2 if args.random_offset_drop else 0)
    if args.shuffle_h:
        grids = list(zip(args.shuffle_h, args.shuffle_w, strict=True))
    elif args.shuffle_size:
        grids = [(side, side) for side in args.shuffle_size]
    else:
        grids = [(h, w) for h, w in PAPER_GRIDS if size % h == size % w == 0]
    grids = grids if args.shuffle else []
    for side in {side for grid in (*grids, *([drop[0]] if drop else [])) for side in grid}:
        if size % side:
            raise engine.InputError(f"a grid of {side} cells a side: images of {size} pixels do not divide into them")
    return drop, grids


def saliency_of(args, backbone, device):
    """A function from normalised images [B, 3, S, S] to the attention [B, N] that says what is salient."""
    if args.saliency_from != "self":
        tested = backbone
        backbone, _ = common.load_vit(args.saliency_from, None, args.saliency_arch, args.saliency_patch_size,
                                      backbone.image_size)
        common.check_same_pixels(tested, backbone, "--saliency_from")
    elif backbone.arch.startswith("swin"):
        raise engine.InputError("--dino: a Swin has no [CLS]; give a ViT's checkpoint as --saliency_from")
    model = backbone.model.to(device)
    heads = model.blocks[-1].attn.num_heads
    if not -1 <= args.saliency_head < heads:
        raise engine.InputError(f"--saliency_head {args.saliency_head}: there are {heads} heads, from 0")

    def attention(images):
        weights = common.cls_attention(model, images)
        return weights.mean(dim=1) if args.saliency_head == -1 else weights[:, args.saliency_head]
    return attention


def report_occlusion(found, folder):
    """Print and draw accuracy against loss; returns {kind: {step: [accuracy, loss] in percent}, "S.5", "NS.5"}."""
    metrics = {}
    for (kind, step), (right, lost) in found.items():
        metrics.setdefault(kind, {})[str(step)] = [100 * right, 100 * lost]
        what = f"{step}/10 of the cells" if kind == "random" else f"lambda {step / STEPS}"
        print(f"{kind}, {what}: accuracy {100 * right:.2f} %, information loss {100 * lost:.1f} %", flush=True)
    curves = {kind: sorted((loss, right) for right, loss in values.values()) for kind, values in metrics.items()}
    for kind, short in (("salient", "S.5"), ("non-salient", "NS.5")):
        if kind in metrics:
            between = at_loss(curves[kind], 50)
            metrics[short], metrics[f"{short} at loss 0.5"] = metrics[kind]["5"][0], between
            print(f"{short}: {metrics[short]:.2f} % (lambda 0.5, most likely Table 8's); at information loss 0.5 "
                  f"{'-' if between is None else f'{between:.2f} %'}", flush=True)
    if folder:
        names = {"random": "random cells dropped", "salient": "salient patches dropped",
                 "non-salient": "all but the salient dropped"}
        draw_curves({names[kind]: curve for kind, curve in curves.items()}, "Top-1 accuracy (%) on occluded images",
                    folder / "occlusion.png", "information loss: share of the pixels that are dropped (%)")
    return metrics


def report_shuffle(found, folder):
    """Print and draw accuracy against the number of cells; returns {"HxW": accuracy in percent}."""
    metrics = {f"{h}x{w}": 100 * right for (_, (h, w)), (right, _) in found.items()}
    for name, right in metrics.items():
        print(f"shuffle, {name} cells: accuracy {right:.2f} %", flush=True)
    if folder:
        points = sorted((h * w, 100 * right) for (_, (h, w)), (right, _) in found.items())
        draw_curves({"cells shuffled": points}, "Top-1 accuracy (%) on shuffled images", folder / "shuffle.png",
                    "number of cells", log_x=True)
    return metrics


def main():
    args = get_args_parser().parse_args()
    process, classifier, backbone = start(args)
    size = backbone.image_size
    drop, grids = grids_of(args, size, backbone.patch_size)
    saliency = saliency_of(args, backbone, process.device) if args.dino else None
    if args.scale_size and args.scale_size < size:
        raise engine.InputError(f"--scale_size {args.scale_size}: smaller than the crop of {size} pixels")
    crop = common.centre(size, args.scale_size, args.bicubic_resize)
    require(Path(args.data), f"{args.data}/WNID/*.JPEG, ImageNet's validation images in a folder for each class",
            "https://www.image-net.org")
    images = common.image_folder(args.data, v2.Compose([crop, v2.PILToTensor(), backbone.normalize]))
    if len(images.classes) != len(classifier.linear.bias):
        raise engine.InputError(f"--test_data {args.data}: {len(images.classes)} class folders, the classifier has "
                               f"{len(classifier.linear.bias)} classes")
    folder = Path(args.output_dir) if args.output_dir else None
    for run in range(args.exp_count):
        degradations = Degradations(size, math.ceil(len(images) / GROUP), args.seed + run, drop, saliency, grids)
        found = measure(classifier, images, degradations, args.batch_size, args.num_workers, process)
        if process.rank == 0:
            settings = {"images": len(images), "bicubic_resize": args.bicubic_resize, "seed": args.seed + run}
            shuffles = {name: values for name, values in found.items() if name[0] == "shuffle"}
            occlusions = {name: values for name, values in found.items() if name[0] != "shuffle"}
            if occlusions:
                record(args, "occlusion", backbone, settings | {"random_drop": drop, "dino": args.dino,
                       "saliency_from": args.saliency_from, "saliency_head": args.saliency_head},
                       report_occlusion(occlusions, folder))
            if shuffles:
                record(args, "shuffle", backbone, settings, report_shuffle(shuffles, folder))


if __name__ == "__main__":
    engine.run(main)
