"""Variants of iBOT's masks and losses, each behind one flag of main_ibot.py, off by default: ablations of the paper (Figure
8, Appendix E; what makes tokens is in `patch_tokenizers`), and what DINOv2 changed.

Letters: n rows, B images, G = 2 global crops, N cells of a global crop (h x w), M of them that the loss is of, K outputs of
the head, D width of the backbone, W processes.
"""
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import engine
import models
import utils
from models.head import SumOverProcesses, at_least_float32

# What [CLS] and patches have in common of the projection head (Table 17), as arguments of `iBOTHead`.
HEADS = {"prototypes": {"shared_head": False, "common_layers": 3}, "shared": {"shared_head": True, "common_layers": 3},
         "mlp2": {"shared_head": False, "common_layers": 2}, "full": {"shared_head": False, "common_layers": 0}}


def add_mask_flags(group):
    group.add_argument("--mask_crops", default="global", choices=("global", "all", "one"),
                       help="crops that get masks: all global ones, local ones too, or the first one alone (Figure 8)")
    group.add_argument("--pred_ratio_per", default="crop", choices=("crop", "image"),
                       help="image: one ratio is drawn for all crops of an image (Appendix B)")


def add_flags(group):
    group.add_argument("--patch_match", default="self", choices=("self", "position", "feature"),
                       help="a patch's target: the same patch, masked; or, unmasked, that of the other global crop which "
                            "is nearest in the image or in its features (Appendix E)")
    group.add_argument("--head_sharing", choices=tuple(HEADS),
                       help="what [CLS] and patches have in common of the head: the MLP (prototypes), all of it (shared), "
                            "two layers of the MLP (mlp2), nothing (full); default: as --shared_head says (Table 17)")
    group.add_argument("--head_sharing_teacher", choices=tuple(HEADS),
                       help="the same for the teacher; default: as --shared_head_teacher says")
    group.add_argument("--centering", default="mean", choices=("mean", "sinkhorn"),
                       help="of both targets: the running mean of outputs, or Sinkhorn-Knopp on each batch (DINOv2)")
    group.add_argument("--koleo", default=0.0, type=float, help="weight of the KoLeo regulariser; 0.1 in DINOv2")


def head_sharing(args):
    """Keys of HEADS that the flags mean, of student and teacher; a tokenizer's tokens have a layer of their own."""
    shared = args.shared_head or args.tokenizer != "online"
    return (args.head_sharing or ("shared" if shared else "prototypes"),
            args.head_sharing_teacher or ("shared" if args.shared_head_teacher else "prototypes"))


def check_heads(args):
    """Raise `engine.InputError` for heads of student and teacher that do not go together."""
    student, teacher = head_sharing(args)
    engine.need(args.tokenizer == "online" or student == "shared",
                f"--head_sharing {student}: with --tokenizer {args.tokenizer} patches have no head but a linear layer")
    engine.need(teacher in (student, "shared") or {student, teacher} == {"shared", "prototypes"},
                f"a teacher head {teacher} cannot follow the student's, {student}: --head_sharing_teacher must be shared "
                f"or {student}")
    student_k, teacher_k = (args.out_dim if HEADS[sharing]["shared_head"] else args.patch_out_dim
                            for sharing in (student, teacher))
    engine.need(student_k == teacher_k, f"student and teacher patches have {student_k} and {teacher_k} outputs: with heads "
                                        f"{student} and {teacher} (--head_sharing, --head_sharing_teacher), "
                                        "--patch_out_dim must equal --out_dim")


@torch.no_grad()
def sinkhorn_center(logits, temp, rows=None, iterations=3):
    """The centre [K] with which softmax((logits - centre) / temp) are Sinkhorn-Knopp targets.

    SwAV (arXiv 2006.09882, Section 3.1), DINOv2 (arXiv 2304.07193, Section 4): exp(logits / temp) is scaled in turns so
    that all outputs are used equally, over the rows of all processes, and each row sums to 1. The softmax scales the rows;
    what remains is a factor for each output, a shift of its logits. The centre's mean is 0.

    Args:
        logits: [n, K] of the teacher; n may differ between processes. rows: bool [n], which of them count; None for all.

    Returns nothing finite where no row counts anywhere.
    """
    x = at_least_float32(logits) / temp  # [n, K]
    skipped = torch.zeros(len(x), dtype=torch.bool, device=x.device) if rows is None else ~rows
    row_scale = x.new_zeros(len(x))
    for _ in range(iterations):  # in logarithms
        row_scale = row_scale.masked_fill(skipped, -torch.inf)
        scale = -_logsumexp_of_processes((x + row_scale.unsqueeze(1)).logsumexp(dim=0))  # [K]
        row_scale = -(x + scale).logsumexp(dim=1)
    return temp * (scale.mean() - scale)


def move_to_sinkhorn(center, logits, temp, rows=None):
    """Overwrite the buffer `center` [..., K] with `sinkhorn_center`, unless that is not finite."""
    new = sinkhorn_center(logits, temp, rows).view_as(center)
    center.copy_(torch.where(new.isfinite().all(), new, center))


def _logsumexp_of_processes(x):
    if engine.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(engine.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts).logsumexp(dim=0)


def koleo(features):
    """KoLeo of the student's [CLS] features [n, D] of one global crop: mean of -log(distance to the nearest other one).

    Sablayrolles et al. (arXiv 1806.03198, Equation 3) on the unit sphere, as in DINOv2 (`--koleo`): drives apart what lies
    close together. Neighbours are sought among the features of all processes, of which each has n.
    """
    x = F.normalize(at_least_float32(features), dim=-1)
    n, world, rank = len(x), engine.get_world_size(), engine.get_rank()
    everything = x
    if world > 1:
        everything = SumOverProcesses.apply(torch.cat([x if i == rank else torch.zeros_like(x) for i in range(world)]))
    with torch.no_grad():
        near = x @ everything.T  # [n, W * n]
        near.diagonal(rank * n).fill_(-torch.inf)  # itself
        nearest = near.argmax(dim=1)
    return -((x - everything[nearest]).norm(dim=1) + 1e-8).log().mean()


# ---------------------------------------------------------------- which patches, and what their targets are

def check(args):
    """Raise `engine.InputError`, naming the flags, for variants that do not go together."""
    need, match = engine.need, args.patch_match != "self"
    need(not match or not args.use_masked_im_modeling,
         f"--patch_match {args.patch_match} compares crops that are not masked: give --use_masked_im_modeling false too")
    need(not match or args.global_crops_number == 2, f"--patch_match {args.patch_match} needs --global_crops_number 2")
    need(not match or args.centering == "mean", f"--patch_match {args.patch_match} has no --centering {args.centering}")
    need(not match or args.mask_crops == "global",
         f"--patch_match {args.patch_match} has no --mask_crops {args.mask_crops}")
    cell = models.mask_cell(args.arch, args.patch_size)
    need(args.mask_crops != "all" or args.local_crops_size % cell == 0,
         f"--mask_crops all: --local_crops_size {args.local_crops_size} is not a multiple of {cell}, a cell of the mask")
    check_heads(args)


def is_plain(args):
    """Whether the step computes what iBOT's does, as `main_ibot.flops_per_image` counts it."""
    return (args.tokenizer, args.patch_match, args.mask_crops) == ("online", "self", "global")


def choose_cells(dataset, args, tokenizer):
    """Let a `loader.ImageFolderMask` choose cells and their targets as the flags say."""
    dataset.mask_crops, dataset.one_ratio = args.mask_crops, args.pred_ratio_per == "image"
    if args.patch_match != "self":
        dataset.mask_crops = "none"
    if args.patch_match == "position":
        side = args.global_crops_size // models.mask_cell(args.arch, args.patch_size)
        dataset.cells = partial(cells_by_position, side=side)
    elif args.tokenizer == "file":
        tokenizer.find(dataset)
        dataset.cells = tokenizer.of_image


def cells_by_position(index, size, boxes, turns, rng, side):
    """`position_targets` of the two global crops, as `loader.ImageFolderMask.cells` is called."""
    return boxes, turns, position_targets(boxes[:2], turns[:2], side)


def cell_centers(box, turn, side):
    """Where the centres of the side x side cells of a turned crop lie in the image: pixels (x, y), [side, side, 2].

    box, turn: see `loader.MultiCropAugmentation`.
    """
    left, top, width, height = box
    flip, down, quarters = turn
    steps = (np.arange(side) + 0.5) / side
    centers = np.stack(np.meshgrid(left + steps * width, top + steps * height), axis=-1)
    centers = centers[::-1 if down else 1, ::-1 if flip else 1]
    return np.rot90(centers, quarters)


def position_targets(boxes, turns, side):
    """For each cell of two crops the nearest cell of the other, by the centres' distance in the image: int64 [2, h, w].

    -1 outside the overlap: where a centre is not in the half-open box of the other crop. Of equals the first counts.
    """
    centers = [cell_centers(box, turn, side).reshape(-1, 2) for box, turn in zip(boxes, turns, strict=True)]
    targets = []
    for own, other, (left, top, width, height) in zip(centers, centers[::-1], boxes[::-1], strict=True):
        distances = np.square(own[:, None] - other[None]).sum(axis=-1)  # [N, N]
        inside = (own >= (left, top)).all(axis=1) & (own < (left + width, top + height)).all(axis=1)
        targets.append(np.where(inside, distances.argmin(axis=1), -1).reshape(side, side))
    return np.stack(targets)


def match_features(student, teacher, images):
    """For each patch of the student's two crops the most similar one, by cosine, of the teacher's other crop.

    student, teacher: backbone features [2 * B * N, D], crop by crop; images: B. Returns rows of `teacher`, int64
    [2 * B * N].
    """
    own, other = (F.normalize(at_least_float32(x.detach()), dim=-1).view(2, images, -1, x.shape[-1])
                  for x in (student, teacher))
    nearest = (own @ other.flip(0).transpose(-1, -2)).argmax(dim=-1)  # [2, B, N]
    first = torch.arange(2 * images, device=student.device).view(2, images, 1).flip(0) * nearest.shape[-1]
    return (first + nearest).flatten()


def needs_teacher(ibot_loss):
    """Tokens that are given, without the [CLS] loss, need no teacher: a quarter of the step."""
    return ibot_loss.tokens_seen is None or ibot_loss.lambda1 > 0


def teacher_cells(index, batch, ibot_loss):
    """Cells whose teacher outputs are the targets of the student's cells `index`, int64 [M] like it; none with tokens."""
    if ibot_loss.tokens_seen is not None:
        return index[:0]
    if ibot_loss.match == "position":
        _, B, h, w = batch.masks.shape
        return (index // (h * w) + B) % (2 * B) * (h * w) + batch.targets[:len(index)]  # in the other crop
    return index


def targets(teacher_outputs, student_outputs, batch, weight, ibot_loss):
    """([CLS] outputs of the teacher [G*B, K], targets of the student's patches, mean patch outputs or None).

    teacher_outputs, student_outputs: of `models.MultiCropWrapper`. Without a teacher the student stands in for it, whose
    [CLS] loss has no weight then.
    """
    rows = batch.masks.shape[0] * batch.masks.shape[1]
    if not needs_teacher(ibot_loss):
        teacher_outputs = (student_outputs[0].detach(), None, None, None)
    cls, patches, mean, features = teacher_outputs
    if ibot_loss.tokens_seen is not None:
        patches = batch.targets[:len(weight)]
        mean = weight.new_zeros(len(ibot_loss.tokens_seen)).index_add_(0, patches, (weight > 0).to(weight.dtype))
    elif ibot_loss.match == "feature" and len(weight):
        own = student_outputs[3][len(student_outputs[0]):]
        patches = patches[match_features(own, features[len(cls):], batch.masks.shape[1])]
    return cls[:rows], patches, mean


def choose(ibot_loss, args, tokenizer, patch_cross_entropy, student, teacher, amp_dtype):
    """Set up an `iBOTLoss` as the flags say; before it is compiled. patch_cross_entropy: of the logits of its rows."""
    ibot_loss.sinkhorn, ibot_loss.koleo = args.centering == "sinkhorn", args.koleo
    if tokenizer is not None:
        ibot_loss.use_tokens(tokenizer.tokens)
    if args.patch_match == "self":
        return
    student_layer, teacher_layer = student.head.last_layer2, teacher.head.last_layer2

    def of_bottlenecks(student, teacher, *args, **kwargs):
        with torch.autocast(student.device.type, amp_dtype, enabled=amp_dtype is not None):
            student, teacher = student_layer(student), teacher_layer(teacher).detach()
        return patch_cross_entropy(student, teacher, *args, **kwargs)

    # Not through the wrapper: all patches have a target, and their logits exist for a few at a time.
    ibot_loss.match, ibot_loss.teacher_logits = args.patch_match, teacher_layer.forward
    ibot_loss.patch_cross_entropy = utils.in_pieces(of_bottlenecks, size=512 * 256)
