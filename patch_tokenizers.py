"""What makes the patch targets in place of the online tokenizer (iBOT, Tables 9 and 20): main_ibot.py's `--tokenizer`.

Each gives hard tokens, has no gradient and stays as it is in training. `tokens`: how many there are; `of_crops`: (uint8
global crops [G, B, 3, S, S], cells [M] of the flattened [G*B*N]) -> int64 [M]; `of_image` where they lie in a file instead.

Letters: B images, G global crops, N cells of a crop, M cells that are asked for, K tokens, p the side of a cell in pixels.
"""
import hashlib
import os

import numpy as np
import torch

import engine
import models
from shards import Member

LEVELS = 8  # of each channel's mean: 3 bits


def add_flags(group):
    group.add_argument("--tokenizer", default="online", choices=("online", "dino", "mpp", "kmeans", "file"),
                       help="what makes the patch targets: the teacher (iBOT), a frozen network, mean colours, centroids "
                            "of patches, or a file")
    group.add_argument("--tokenizer_file", help="of dino a checkpoint with its head, of kmeans the centroids of "
                                                "analysis/patch_clusters.py, of file the tokens (docs/ablations.md)")
    group.add_argument("--tokenizer_key", default="teacher", help="of dino: the network in the checkpoint")


def check(args):
    """Raise `engine.InputError`, naming the flags, for a tokenizer that the other flags leave no use for."""
    need, name = engine.need, args.tokenizer
    need(not args.tokenizer_file or name in ("dino", "kmeans", "file"), f"--tokenizer {name} reads no --tokenizer_file")
    if name == "online":
        return
    need(args.tokenizer_file or name == "mpp", f"--tokenizer {name} needs --tokenizer_file")
    need(args.lambda2, f"--tokenizer {name} makes patch targets, and --lambda2 0 leaves them out")
    need(args.patch_match == "self", f"--tokenizer {name} has no --patch_match {args.patch_match}")
    need(args.mask_crops != "all", f"--tokenizer {name} has no --mask_crops all")


def build(args, device, amp_dtype):
    """The tokenizer of the flags, None for the teacher. Raises `engine.InputError`, naming a file that is none."""
    cell = models.mask_cell(args.arch, args.patch_size)
    if args.tokenizer == "mpp":
        return MeanColour(cell)
    if args.tokenizer == "kmeans":
        return Centroids(args.tokenizer_file, cell, device)
    if args.tokenizer == "dino":
        return FrozenNetwork(args.tokenizer_file, args.tokenizer_key, cell, device, amp_dtype)
    if args.tokenizer == "file":
        return StoredTokens(args.tokenizer_file, cell, args.global_crops_size, args.global_crops_number)
    return None


def of_run(args, run, amp_dtype):
    """`build`, noted in an `engine.Run`'s checkpoints. Raises `engine.InputError` if the run that goes on had another."""
    tokenizer = build(args, run.process.device, amp_dtype)
    run.entries |= record(args, tokenizer)
    check_same(run.checkpoint, run.path, run.entries)
    return tokenizer


def record(args, tokenizer):
    """What a checkpoint holds of its tokenizer: kind, number of tokens, side of a cell, sha256 of the file ("" without)."""
    if tokenizer is None:
        return {}
    digest = ""
    if args.tokenizer_file:
        with open(args.tokenizer_file, "rb") as file:
            sha256 = hashlib.sha256()
            while part := file.read(2**20):
                sha256.update(part)
        digest = sha256.hexdigest()
    return {"tokenizer": {"kind": args.tokenizer, "tokens": tokenizer.tokens, "cell": tokenizer.cell, "sha256": digest}}


def check_same(checkpoint, path, entry):
    """Raise `engine.InputError` if the run in a `checkpoint` (None: none) had another tokenizer than `record` says now."""
    before = None if checkpoint is None else checkpoint.get("tokenizer", {})
    if before is not None and before != entry.get("tokenizer", {}):
        raise engine.InputError(f"checkpoint {path}: another --tokenizer or --tokenizer_file made its patch targets; give "
                                "that one, or start over in another --output_dir")


def cells_of(crops, cell, index):
    """Pixels of cells: uint8 [G, B, 3, S, S] and int64 [M] -> uint8 [M, p, p, 3]."""
    size = crops.shape[-1] // cell
    x = crops.flatten(0, 1).unflatten(3, (size, cell)).unflatten(2, (size, cell))  # [G*B, 3, h, p, w, p]
    image, place = index // size**2, index % size**2
    return x[image, :, place // size, :, place % size].permute(0, 2, 3, 1)


class MeanColour:
    """Masked patch prediction: 3 bits of each channel's mean, 512 tokens (ViT, arXiv 2010.11929, B.1.2)."""
    tokens = LEVELS**3

    def __init__(self, cell):
        self.cell = cell

    def of_crops(self, crops, index):
        sums = cells_of(crops, self.cell, index).sum(dim=(1, 2), dtype=torch.int64)  # [M, 3]
        levels = (LEVELS * sums // (255 * self.cell**2)).clamp(max=LEVELS - 1)
        red, green, blue = levels.unbind(1)
        return red + LEVELS * green + LEVELS**2 * blue


class Centroids:
    """The nearest of k-means' centroids of patches' colours (iBOT, Appendix F), of `analysis/patch_clusters.py`."""

    def __init__(self, path, cell, device):
        centroids = engine.load_checkpoint(path).get("centroids")
        if centroids is None or centroids.ndim != 2 or not centroids.isfinite().all():
            raise engine.InputError(f"--tokenizer_file {path}: needs finite `centroids` [K, 3 * p * p]")
        if centroids.shape[1] != 3 * cell**2:
            raise engine.InputError(f"--tokenizer_file {path}: its centroids have {centroids.shape[1]} numbers, a patch of "
                                    f"{cell} pixels has {3 * cell**2}")
        self.cell, self.tokens, self.centroids = cell, len(centroids), centroids.float().to(device)

    def of_crops(self, crops, index):
        return nearest(cells_of(crops, self.cell, index).flatten(1).float() / 255, self.centroids)[0]


def nearest(patches, centroids):
    """([n] the nearest of centroids [K, F] to patches [n, F], [n] its squared distance less the patch's squared length)."""
    lengths, found = centroids.square().sum(dim=1), []
    with torch.autocast(patches.device.type, enabled=False):
        for part in patches.split(max(1, 2**24 // len(centroids))):
            found.append(torch.addmm(lengths, part, centroids.T, alpha=-2).min(dim=1))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


class FrozenNetwork:
    """The largest output of a pre-trained network's projection head for the unmasked patch, such as DINO's (Appendix F)."""

    def __init__(self, path, key, cell, device, amp_dtype):
        from evaluation.common.backbone import load_evaluated_backbone  # scikit-learn takes a second
        from evaluation.common.clustering import load_projection_head
        checkpoint = engine.load_checkpoint(path)
        backbone = load_evaluated_backbone(path, key, checkpoint=checkpoint)
        found = models.mask_cell(backbone.arch, backbone.patch_size)
        if found != cell:
            raise engine.InputError(f"--tokenizer_file {path}: its patches are of {found} pixels, the student's of {cell}")
        self.head = load_projection_head(checkpoint, key, path, patches=True).to(device)
        self.normalize = backbone.normalize
        self.cell, self.backbone, self.tokens = cell, backbone.model.to(device), len(self.head.last_layer.weight_v)
        self.amp_dtype = amp_dtype

    @torch.no_grad()
    def of_crops(self, crops, index):
        with torch.autocast(crops.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            tokens, _ = self.backbone.forward_crops([self.normalize(crops.flatten(0, 1))], wanted=index)
            z = self.head.bottleneck(tokens[len(tokens) - len(index):])
            rows = max(1, 2**24 // self.tokens)  # K is large: 65,536
            return torch.cat([self.head.last_layer(part).argmax(dim=-1) for part in z.split(rows)])


class StoredTokens:
    """Tokens of a `.safetensors` file, and the crops that they were made of (docs/ablations.md).

    tokens: uint16 or int32 [n, V, h, w]; boxes: int32 [n, V, 4], left, top, width, height in the image's pixels; flips:
    bool [n, V]; names: uint8, UTF-8, paths within the data folder, one a line. In its head: K, p, crop_size.
    """
    of_crops = None

    def __init__(self, path, cell, crop_size, global_crops_number):
        stored, head = engine.load_checkpoint(path), engine.safetensors_metadata(path)
        lacks = [name for name in ("tokens", "boxes", "flips", "names") if name not in stored]
        lacks += [name for name in ("K", "p", "crop_size") if not head.get(name, "").isdigit()]
        if lacks:
            raise engine.InputError(f"--tokenizer_file {path}: lacks {', '.join(lacks)}")
        self.path, self.cell, self.tokens, self.crops = path, cell, int(head["K"]), global_crops_number
        if (int(head["p"]), int(head["crop_size"])) != (cell, crop_size):
            raise engine.InputError(f"--tokenizer_file {path}: is of patches of {head['p']} and crops of "
                                    f"{head['crop_size']} pixels, the run of {cell} and {crop_size}")
        self.grids, self.boxes, self.flips = (stored[name].numpy() for name in ("tokens", "boxes", "flips"))
        self.names = bytes(stored["names"].numpy()).decode("utf-8", "replace").split("\n")
        n, side = len(self.names), crop_size // cell
        views = self.grids.shape[1] if self.grids.ndim == 4 else 0
        if (self.grids.shape, self.boxes.shape, self.flips.shape) != ((n, views, side, side), (n, views, 4), (n, views)):
            raise engine.InputError(f"--tokenizer_file {path}: {n} names, tokens {self.grids.shape}, boxes "
                                    f"{self.boxes.shape} and flips {self.flips.shape} do not go together")
        if views < global_crops_number:
            raise engine.InputError(f"--tokenizer_file {path}: has {views} crops an image, "
                                    f"--global_crops_number {global_crops_number} needs as many")
        largest = max((int(part.max()) for part in np.array_split(self.grids, max(1, n // 4096)) if part.size), default=0)
        if largest >= self.tokens or self.grids.dtype.kind == "i" and int(self.grids.min()) < 0:
            raise engine.InputError(f"--tokenizer_file {path}: has a token that is not in 0..{self.tokens - 1}")
        self.rows = None

    def find(self, dataset):
        """Find the images of a folder in the file. Raises `engine.InputError` for one that is not there."""
        rows = {name: row for row, name in enumerate(self.names)}
        sources = map(dataset.source, range(len(dataset)))
        names = [source.name if isinstance(source, Member) else source.removeprefix(dataset.root + os.sep)
                 for source in sources]
        absent = next((name for name in names if name not in rows), None)
        if absent is not None:
            raise engine.InputError(f"--tokenizer_file {self.path}: has no tokens of {absent}")
        self.rows, self.names = np.array([rows[name] for name in names]), None

    def of_image(self, index, size, boxes, turns, rng):
        """Crops (see `loader.MultiCropAugmentation`) of which the global ones are stored ones, and their tokens."""
        row, G = self.rows[index], self.crops
        views = rng.choice(self.boxes.shape[1], G, replace=False)
        stored = self.boxes[row, views]
        left, top, width, height = stored.T
        if (stored[:, :2] < 0).any() or (stored[:, 2:] < 1).any() or (left + width > size[0]).any() or (
                top + height > size[1]).any():
            raise engine.InputError(f"--tokenizer_file {self.path}: a box of row {row} is not within the image of "
                                    f"{size[0]} x {size[1]} pixels")
        turns = [(bool(flip), False, 0) for flip in self.flips[row, views]] + turns[G:]
        return [*map(tuple, stored.tolist()), *boxes[G:]], turns, self.grids[row, views].astype(np.int64)
