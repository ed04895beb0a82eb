"""Pre-train a vision transformer with iBOT (Zhou et al., ICLR 2022) on a folder of images.

    python main_ibot.py --arch vit_small --data_path data/imagenet/train --output_dir work_dirs/small     # one GPU or CPU
    torchrun --nproc_per_node=8 main_ibot.py --arch vit_small --data_path ... --output_dir ...            # one node, 8 GPUs
    python main_ibot.py --device cpu --arch vit_nano --data_path ... --batch_size_per_gpu 32 ...          # anywhere

The student sees masked global crops and plain local crops; the teacher, its moving average, sees the unmasked global
crops. Section numbers are the paper's (arXiv 2111.07832).

Letters in shape comments: B images of a batch, G global crops, L local crops, N patch tokens of a global crop,
M masked patches of the batch, K outputs of the head, W processes.
"""
import argparse
import gc
import math
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import engine
import loader
import models
import pictures
import utils
from images import IMAGENET, PixelStats, check_pixel_stats, folder_stats, stored_pixel_stats

METERS = ("loss", "cls", "patch", "acc", "grad_norm")
SIGNS = ("cls_entropy", "cls_kl", "cls_std", "patch_entropy", "patch_cross", "patch_share", "patch_used")


def get_args_parser():
    """All flags with the reference's names and defaults; use it with `parents=[get_args_parser()]`."""
    parser = argparse.ArgumentParser("iBOT", add_help=False, allow_abbrev=False)
    flag = engine.bool_flag

    network = parser.add_argument_group("network")
    network.add_argument("--arch", default="vit_small", choices=models.ARCHS)
    network.add_argument("--patch_size", default=16, type=int, help="side of a ViT's patch in pixels (Swin: always 4)")
    network.add_argument("--window_size", default=7, type=int, help="Swin's window, 7 or 14 in the paper")
    network.add_argument("--drop_path", default=None, type=float,
                         help="stochastic depth of the student; default 0.1, but 0.2 for Swin-S, -B and -L")
    network.add_argument("--out_dim", default=8192, type=int, help="K of the [CLS] output")
    network.add_argument("--patch_out_dim", default=8192, type=int, help="K of the patch output where heads are separate")
    network.add_argument("--shared_head", default=False, type=flag,
                         help="student: one last layer for [CLS] and patches (every published recipe says true)")
    network.add_argument("--shared_head_teacher", default=True, type=flag, help="the same for the teacher")
    network.add_argument("--norm_last_layer", default=True, type=flag, help="keep the last layer's weight_g at 1 (student)")
    network.add_argument("--norm_in_head", default=None, choices=(None, *models.NORMS), help="norm inside the head's MLP",
                         type=lambda text: None if text.lower() == "none" else text)
    network.add_argument("--act_in_head", default="gelu", choices=tuple(models.ACTIVATIONS))
    network.add_argument("--head_hidden_dim", default=2048, type=int,
                         help="width of the head's hidden layers (a tiny backbone spends its time there)")

    masks = parser.add_argument_group("masks (Section 3.1)")
    masks.add_argument("--use_masked_im_modeling", default=True, type=flag, help="mask the student's global crops")
    masks.add_argument("--pred_ratio", default=[0.3], type=float, nargs="+",
                       help="share of patches to mask; of a list, one is drawn per crop")
    masks.add_argument("--pred_ratio_var", default=[0.0], type=float, nargs="+",
                       help="half-width of the uniform draw around each ratio; one value, or one per ratio")
    masks.add_argument("--pred_shape", default="block", choices=("block", "rand"))
    masks.add_argument("--pred_start_epoch", default=0, type=int, help="nothing is masked before this epoch (50 for Swin)")

    loss = parser.add_argument_group("loss (Section 3.2)")
    loss.add_argument("--lambda1", default=1.0, type=float, help="weight of the [CLS] loss")
    loss.add_argument("--lambda2", default=1.0, type=float, help="weight of the patch loss")
    loss.add_argument("--warmup_teacher_temp", default=0.04, type=float, help="[CLS] teacher temperature at the start")
    loss.add_argument("--teacher_temp", default=0.04, type=float, help="... after the warm-up; 0.07 in the recipes")
    loss.add_argument("--warmup_teacher_patch_temp", default=0.04, type=float, help="the same for patches")
    loss.add_argument("--teacher_patch_temp", default=0.07, type=float)
    loss.add_argument("--warmup_teacher_temp_epochs", default=30, type=int, help="length of both temperature warm-ups")
    loss.add_argument("--center_momentum", default=0.9, type=float, help="momentum of the [CLS] centre")
    loss.add_argument("--patch_center_momentum", default=0.9, type=float, help="momentum of the patch centre (Appendix E)")
    loss.add_argument("--patch_centering", default=True, type=flag, help="centre the patch targets (Table 18)")
    loss.add_argument("--patch_targets", default="soft", choices=("soft", "hard"), help="softmax or arg-max (Table 18)")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", default=100, type=int)
    optim.add_argument("--batch_size_per_gpu", default=128, type=int, help="images per process that are computed at once")
    optim.add_argument("--accum_iter", default=1, type=int,
                       help="batches per process to add up for each update: the same update as one large batch")
    optim.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd", "lars"))
    optim.add_argument("--lr", default=0.0005, type=float, help="peak rate for a total batch of 256, scaled linearly")
    optim.add_argument("--warmup_epochs", default=10, type=int, help="epochs of linear warm-up of the rate")
    optim.add_argument("--min_lr", default=1e-6, type=float)
    optim.add_argument("--weight_decay", default=0.04, type=float)
    optim.add_argument("--weight_decay_end", default=0.4, type=float)
    optim.add_argument("--clip_grad", default=3.0, type=float,
                       help="largest gradient norm of each parameter tensor by itself; 0 turns it off")
    optim.add_argument("--freeze_last_layer", default=1, type=int, help="epochs without updates of the last layer")
    optim.add_argument("--momentum_teacher", default=0.996, type=float, help="EMA momentum at the start; rises to 1")
    optim.add_argument("--on_nonfinite", default="stop", choices=("stop", "skip"),
                       help="losses or gradients that are not finite: end the run, or go on without that update "
                            f"({engine.MAX_DROPPED} in a row end it too)")
    optim.add_argument("--use_fp16", default=True, type=flag, help="mixed precision")
    optim.add_argument("--residual_dtype", default="float32", choices=("float32", "amp"),
                       help="amp: tokens between blocks in half precision too, as --amp_dtype says; LayerNorm in float32")
    optim.add_argument("--amp_dtype", default="auto", choices=("auto", "bfloat16", "float16"),
                       help="auto: bfloat16 on GPUs that have it and CPUs with matrix units for it (AMX), float16 with "
                            "a gradient scaler on other CUDA devices, off elsewhere")

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default=None, type=str, help="folder with one sub-folder of images per class or more")
    data.add_argument("--global_crops_number", default=2, type=int)
    data.add_argument("--global_crops_scale", default=[0.14, 1.0], type=float, nargs=2, help="range of their area")
    data.add_argument("--global_crops_size", default=224, type=int, help="their side in pixels")
    data.add_argument("--local_crops_number", default=0, type=int, help="10 in the multi-crop recipes")
    data.add_argument("--local_crops_scale", default=[0.05, 0.4], type=float, nargs=2)
    data.add_argument("--local_crops_size", default=96, type=int)
    data.add_argument("--num_workers", default=None, type=int,
                      help="loader processes per training process; default: the cores there are, less one, at most 10")
    data.add_argument("--augment_on", default="auto", choices=("auto", "cpu", "device"),
                      help="where colours are changed: in the loader's processes or on the training device; auto: on a GPU")
    data.add_argument("--on_bad_image", default="skip", choices=("error", "skip"),
                      help="skip: another image takes the place of one that cannot be read; counted and named")
    data.add_argument("--max_bad_images", default=0.01, type=float,
                      help="end the run when more images cannot be read: a share of all below 1, else a number")

    augment = parser.add_argument_group("augmentation (docs/augmentation.md)")
    numbers = {"type": float, "nargs": "+"}
    augment.add_argument("--augment", default="photos", choices=tuple(loader.AUGMENT_PRESETS),
                         help="sets the flags below that are not given; photos: the reference's values")
    augment.add_argument("--hflip", type=float, metavar="P", help="probability of a flip left to right; photos: 0.5")
    augment.add_argument("--vflip", type=float, metavar="P", help="the same top to bottom; photos: 0")
    augment.add_argument("--rotate90", type=float, metavar="P",
                         help="probability of a turn by 0, 90, 180 or 270 degrees, each as likely; photos: 0")
    augment.add_argument("--color_jitter", metavar=("P", "B C S H"), help="probability, then the largest change of "
                         "brightness, contrast, saturation and hue (in turns); photos: 0.8 0.4 0.4 0.2 0.1", **numbers)
    augment.add_argument("--grayscale", type=float, metavar="P", help="probability of no colours; photos: 0.2")
    augment.add_argument("--blur", metavar=("P1", "P2 PL"), help="probability of a Gaussian blur of 0.1..2 pixels for the "
                         "first global crop, other global crops, local crops; photos: 1 0.1 0.5", **numbers)
    augment.add_argument("--solarize", metavar=("P1", "P2 PL"),
                         help="the same for inverting what is brighter than the middle; photos: 0 0.2 0", **numbers)
    augment.add_argument("--pixel_stats", default="imagenet", choices=("imagenet", "auto"),
                         help="what pixels are normalised with; auto: mean and standard deviation of a thousand images")
    augment.add_argument("--mean", help="of red, green and blue, in 0..1, instead", **numbers)
    augment.add_argument("--std", help="their standard deviations", **numbers)

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default=".", type=str)
    run.add_argument("--load_from", default=None, type=str,
                     help=f"resume from this file of the output folder, e.g. {engine.CHECKPOINT}; auto: from the newest "
                          "good one, or a fresh start where there is none")
    run.add_argument("--overwrite", default=False, type=flag, help="start over in an output folder that holds a run")
    run.add_argument("--saveckp_freq", default=40, type=int,
                     help="also keep checkpointNNNN.pth every so many epochs; 0: never")
    run.add_argument("--save_every_steps", default=0, type=int,
                     help=f"also save {engine.CHECKPOINT} every so many updates; 0: never")
    run.add_argument("--save_every_minutes", default=0.0, type=float, help="the same by the clock")
    run.add_argument("--on_save_error", default="continue", choices=("continue", "stop"),
                     help="when a checkpoint cannot be written, e.g. on a full disk; the one before it stays")
    run.add_argument("--print_freq", default=10, type=int, help="steps between log lines; the device is read only then")
    run.add_argument("--compile", default=None, type=flag,
                     help="compile blocks, head and loss, at the first steps; default: on CUDA")
    run.add_argument("--recompute", default=None, choices=tuple(models.RECOMPUTE),
                     help="what the backward pass computes again instead of keeping it: elementwise operations, or as much "
                          "as halves what is kept (both need --compile); blocks: all but each block's input; "
                          "default: elementwise where compiled, else none")
    run.add_argument("--grad_checkpointing", default=False, type=flag, help="the same as --recompute blocks")
    run.add_argument("--seed", default=0, type=int)
    run.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    run.add_argument("--dist_url", default="env://", type=str, help="rendezvous of several processes")
    run.add_argument("--local_rank", "--local-rank", default=0, type=int, help=argparse.SUPPRESS)  # old launchers pass it
    return parser


def augment_of(args):
    """The `loader.Augment` of the preset and the flags that are given."""
    preset = loader.AUGMENT_PRESETS[args.augment]
    return preset._replace(**{name: getattr(args, name) for name in preset._fields if getattr(args, name) is not None})


def pixel_stats_of(args, path, checkpoint, dataset, device):
    """The `images.PixelStats` of a run; all processes call it. `auto` takes those of a `checkpoint` that is resumed."""
    if args.mean is not None:
        return PixelStats(tuple(args.mean), tuple(args.std))
    if args.pixel_stats == "imagenet":
        return IMAGENET
    if checkpoint is not None:
        return stored_pixel_stats(checkpoint, path)
    return folder_stats(dataset, device)


def with_resolved(args, augment, stats):
    """A copy of `args` in which the flags of the augmentation and of the pixels have the values that are used."""
    values = {name: list(value) if isinstance(value, tuple) else value
              for name, value in {**augment._asdict(), **stats._asdict()}.items()}
    return argparse.Namespace(**{**vars(args), **values})


def check_args(args):
    """Raise `engine.InputError` for values that cannot be trained with, before anything is touched."""
    def need(condition, message):
        if not condition:
            raise engine.InputError(message)

    need(args.data_path, "--data_path is missing: the image folder to train on, one sub-folder per class")
    for name in ("epochs", "batch_size_per_gpu", "out_dim", "patch_out_dim", "head_hidden_dim", "patch_size", "window_size",
                 "print_freq", "accum_iter", "global_crops_number", "global_crops_size", "local_crops_size"):
        need(getattr(args, name) >= 1, f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("local_crops_number", "warmup_epochs", "warmup_teacher_temp_epochs", "pred_start_epoch",
                 "freeze_last_layer", "saveckp_freq", "save_every_steps", "save_every_minutes", "max_bad_images",
                 "clip_grad", "lambda1", "lambda2", "lr", "min_lr", "seed"):
        need(getattr(args, name) >= 0, f"--{name} must not be negative: {getattr(args, name)}")
    need(args.num_workers is None or args.num_workers >= 0, f"--num_workers must not be negative: {args.num_workers}")
    for name in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp"):
        need(getattr(args, name) > 0, f"--{name} must be positive: {getattr(args, name)}")
    for name in ("momentum_teacher", "center_momentum", "patch_center_momentum"):
        need(0 <= getattr(args, name) <= 1, f"--{name} must lie in 0..1: {getattr(args, name)}")
    need(args.drop_path is None or 0 <= args.drop_path < 1, f"--drop_path must lie in 0..1: {args.drop_path}")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        need(0 < low <= high <= 1, f"--{name} takes two areas 0 < low <= high <= 1, not {low} {high}")
    loader.check_augment(augment_of(args))
    need((args.mean is None) == (args.std is None), "--mean and --std go together: give both or none")
    need(args.mean is None or args.pixel_stats != "auto", "--pixel_stats auto and --mean: give one of them")
    if args.mean is not None:
        check_pixel_stats(PixelStats(args.mean, args.std))
    need(args.global_crops_number > 1 or (args.local_crops_number and args.lambda1),
         "the [CLS] loss needs two crops: raise --global_crops_number or --local_crops_number")
    need(args.lambda1 + args.lambda2 > 0, "--lambda1 and --lambda2 are both 0: there is no loss")

    swin, cell = args.arch.startswith("swin"), models.mask_cell(args.arch, args.patch_size)
    need(not swin or args.patch_size in (4, 16), f"--patch_size {args.patch_size}: Swin's patch is 4")
    need(args.global_crops_size % cell == 0,
         f"--global_crops_size {args.global_crops_size} is not a multiple of {cell} "
         f"({'a token of Swin' if swin else '--patch_size'})")
    patch = 4 if swin else args.patch_size
    need(patch <= 224, f"--patch_size {patch}: position embeddings are those of 224 pixels")
    need(not args.local_crops_number or args.local_crops_size % patch == 0,
         f"--local_crops_size {args.local_crops_size} is not a multiple of the patch size {patch}")

    variances = args.pred_ratio_var * len(args.pred_ratio) if len(args.pred_ratio_var) == 1 else args.pred_ratio_var
    need(len(variances) == len(args.pred_ratio),
         f"--pred_ratio has {len(args.pred_ratio)} values and --pred_ratio_var {len(args.pred_ratio_var)}: "
         "give one variance or one per ratio")
    for ratio, variance in zip(args.pred_ratio, variances, strict=True):
        need(0 <= variance and 0 <= ratio <= 1, f"--pred_ratio {ratio} --pred_ratio_var {variance}: ratios lie in 0..1")
        need(ratio >= variance, f"--pred_ratio {ratio} is below its --pred_ratio_var {variance}")
    student_k = args.out_dim if args.shared_head else args.patch_out_dim
    teacher_k = args.out_dim if args.shared_head_teacher else args.patch_out_dim
    need(student_k == teacher_k,
         f"student and teacher patches have {student_k} and {teacher_k} outputs: with --shared_head {args.shared_head} and "
         f"--shared_head_teacher {args.shared_head_teacher}, --patch_out_dim must equal --out_dim")

    output_dir = Path(args.output_dir)
    need(not (args.load_from and args.overwrite), "--load_from resumes and --overwrite true starts over: give one of them")
    engine.check_output(output_dir, args.load_from, args.overwrite, run_files(output_dir))


# ---------------------------------------------------------------- the loss

def in_pieces(cross_entropy, size=2**22):
    """A `cross_entropy` over rows that takes some `size` logits at a time, and again in the backward pass: beside the
    logits themselves no [M, K'] is kept."""
    def summed(student, teacher, weight, *args, **kwargs):
        rows = max(1, size // student.shape[1])
        pieces = zip(student.split(rows), teacher.split(rows), weight.split(rows), strict=True)
        return sum(checkpoint(cross_entropy, *piece, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
                   for piece in pieces)
    return summed


def cls_cross_entropy(student, teacher, center, student_temp, teacher_temp):
    """Mean of H(teacher crop q, student crop v) over images and all pairs v != q (Equation 2's first part).

    student: [G+L, B, K] logits, global crops first; teacher: [G, B, K]. In float32 at least.
    """
    student, teacher = (models.at_least_float32(x) for x in (student, teacher))
    G, s = len(teacher), student / student_temp
    t = ((teacher - center) / teacher_temp).softmax(dim=-1)
    # Targets sum to 1, so the cross-entropy of a pair (q, v) is logsumexp(s_v) - t_q . s_v; its sum over v != q needs
    # only the sum over v of s_v.
    lse = s.logsumexp(dim=-1)  # [G+L, B]
    pairs = lse.sum(dim=0) - lse[:G] - (t * (s.sum(dim=0) - s[:G])).sum(dim=-1)  # [G, B]
    return pairs.sum() / (pairs.numel() * (len(s) - 1))


def patch_cross_entropy(student, teacher, weight, center, student_temp, teacher_temp, hard=False):
    """Sum of weight * H(teacher patch, student patch), Equation 1: logits [M, K'], weights [M]. In float32 at least.

    hard: the teacher's arg-max as the target.
    """
    s = models.at_least_float32(student) / student_temp
    t = (models.at_least_float32(teacher) - center) / teacher_temp
    target = s.gather(1, t.argmax(dim=-1, keepdim=True)).squeeze(1) if hard else (t.softmax(dim=-1) * s).sum(dim=-1)
    return ((s.logsumexp(dim=-1) - target) * weight).sum()


class iBOTLoss(nn.Module):  # noqa: N801 - the reference's name
    """Cross-entropy of [CLS] tokens across views and of masked patches within a view (Equations 1 and 2), with centres.

    Args:
        out_dim, patch_out_dim: K of the two outputs.
        teacher_temps, teacher_patch_temps: teacher temperature of every epoch.
        student_temp: 0.1 for both.
        center_momentum, patch_center_momentum: share that the centres keep at each step.
        lambda1, lambda2: weights of the [CLS] and the patch term.
        patch_centering: whether the patch centre moves from 0. patch_targets: "soft", or "hard" for the teacher's arg-max.
    """

    def __init__(self, out_dim, patch_out_dim, teacher_temps, teacher_patch_temps, student_temp=0.1, center_momentum=0.9,
                 patch_center_momentum=0.9, lambda1=1.0, lambda2=1.0, patch_centering=True, patch_targets="soft"):
        super().__init__()
        self.teacher_temps, self.teacher_patch_temps = teacher_temps, teacher_patch_temps
        self.student_temp = student_temp
        self.center_momentum, self.patch_center_momentum = center_momentum, patch_center_momentum
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.patch_centering, self.patch_targets = patch_centering, patch_targets
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self.teacher_means = []  # of the batches since the centres last moved
        self.cls_cross_entropy, self.patch_cross_entropy = cls_cross_entropy, in_pieces(patch_cross_entropy)

    def compile(self):
        """Compile the two cross-entropies; no copy of the logits then reaches memory."""
        self.cls_cross_entropy = torch.compile(cls_cross_entropy)
        self.patch_cross_entropy = torch.compile(patch_cross_entropy)

    def forward(self, student_cls, student_patch, teacher_cls, teacher_patch, teacher_patch_mean, mask_weight,
                global_crops_number, epoch):
        """The losses of a batch; its teacher outputs are noted for `update_centers`.

        Args:
            student_cls: [(G+L)*B, K], global crops first, crop by crop. teacher_cls: [G*B, K].
            student_patch, teacher_patch: [M, K'] logits of the masked patches.
            teacher_patch_mean: [K'], mean teacher logits over all G*B*N patches, or None to leave that centre alone.
            mask_weight: [M], 1 / (G * B * masked patches in the same crop).

        Returns:
            {"loss", "cls", "patch"}, 0-d tensors; loss = lambda1 cls + lambda2 patch.
        """
        B = len(teacher_cls) // global_crops_number
        # As tensors: compiled code takes a new number for a new program.
        temp, patch_temp = (torch.tensor(temps[epoch]) for temps in (self.teacher_temps, self.teacher_patch_temps))
        cls_loss = self.cls_cross_entropy(student_cls.unflatten(0, (-1, B)), teacher_cls.unflatten(0, (-1, B)), self.center,
                                          self.student_temp, temp)
        patch_loss = self.patch_cross_entropy(student_patch, teacher_patch, mask_weight, self.center2[0], self.student_temp,
                                              patch_temp, hard=self.patch_targets == "hard")
        self.teacher_means.append((models.at_least_float32(teacher_cls).mean(dim=0), teacher_patch_mean))
        return {"loss": self.lambda1 * cls_loss + self.lambda2 * patch_loss, "cls": cls_loss, "patch": patch_loss}

    @torch.no_grad()
    def update_centers(self, finite):
        """Move the centres towards the teacher's mean outputs over all batches since the last call, and all processes.

        finite: 0-d bool tensor, whether this process's step may count. Returns whether that of all may, the teacher's
        outputs included; if not, the centres stay.
        """
        cls_means, patch_means = zip(*self.teacher_means, strict=True)
        self.teacher_means = []
        patches = self.patch_centering and patch_means[0] is not None
        means = [torch.where(finite, 0.0, math.nan).view(1), torch.stack(cls_means).mean(dim=0)]
        if patches:
            means.append(torch.stack(patch_means).mean(dim=0))
        means = engine.all_reduce_mean(torch.cat(means))
        finite, means = means.isfinite().all(), means[1:]
        K = self.center.shape[-1]
        moved = self.center.lerp(means[None, :K], 1 - self.center_momentum)
        self.center.copy_(torch.where(finite, moved, self.center))
        if patches:
            moved = self.center2.lerp(means[None, None, K:], 1 - self.patch_center_momentum)
            self.center2.copy_(torch.where(finite, moved, self.center2))
        return finite

    @torch.no_grad()
    def collapse_signs(self, teacher_cls, teacher_patch, mask_weight, losses, epoch):
        """What shows that the targets collapse, of the batch that gave `losses` (arguments as in `forward`).

        Returns {name: 0-d tensor} with the names `SIGNS`: mean entropy of the [CLS] targets and their divergence
        KL(teacher, student); standard deviation of the teacher's [CLS] outputs over images; for patches the entropy and the
        cross-entropy, both to be divided by `patch_share`, which is 0 without masks; share of K' that masked patches use.
        """
        def entropy(logits, center, temp):
            log_p = ((models.at_least_float32(logits) - center) / temp).log_softmax(dim=-1)
            return -(log_p.exp() * log_p).sum(dim=-1)

        cls_entropy = entropy(teacher_cls, self.center, self.teacher_temps[epoch]).mean()
        rows = max(1, 2**22 // teacher_patch.shape[1])  # a few at a time, as in `in_pieces`
        patch_entropy = torch.cat([entropy(part, self.center2[0], self.teacher_patch_temps[epoch])
                                   for part in teacher_patch.split(rows)])
        used = teacher_patch.new_zeros(teacher_patch.shape[1], dtype=torch.float32)
        if len(teacher_patch):
            used.scatter_reduce_(0, teacher_patch.argmax(dim=-1), (mask_weight > 0).float(), "amax")
        return dict(zip(SIGNS, (
            cls_entropy, losses["cls"] - cls_entropy, models.at_least_float32(teacher_cls).std(dim=0, correction=0).mean(),
            (patch_entropy * mask_weight).sum(), losses["patch"], mask_weight.sum(), used.mean()), strict=True))


# ---------------------------------------------------------------- training

def build_networks(args):
    """(student, teacher): the teacher has no mask embedding, takes no gradient and starts from the student's weights."""
    drop_path = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    if args.drop_path is None and not args.arch.startswith("swin"):
        drop_path = {"drop_path_rate": 0.1}
    # Positions are those of 224-pixel images whatever the crop size, as in the reference: crops of other sizes sample them.
    shape = {"patch_size": args.patch_size, "window_size": args.window_size}
    head = {"patch_out_dim": args.patch_out_dim, "norm": args.norm_in_head, "act": args.act_in_head,
            "hidden_dim": args.head_hidden_dim}

    backbone = models.build_backbone(args.arch, masked_im_modeling=args.use_masked_im_modeling, **shape, **drop_path)
    student = models.MultiCropWrapper(backbone, models.iBOTHead(
        backbone.embed_dim, args.out_dim, norm_last_layer=args.norm_last_layer, shared_head=args.shared_head, **head))
    backbone = models.build_backbone(args.arch, drop_path_rate=0.0, **shape)
    teacher = models.MultiCropWrapper(backbone, models.iBOTHead(
        backbone.embed_dim, args.out_dim, shared_head=args.shared_head_teacher, **head)).requires_grad_(False)
    utils.ema_update(*utils.ema_pairs(student, teacher), momentum=0.0)
    return student, teacher


def flops_per_image(args):
    """Operations of matrix products (a product and a sum are two) for an image in a step: of teacher, student and backward
    pass, each once, also where it is computed again. Counted on networks of shapes alone, with masks of the mean ratio."""
    with torch.device("meta"):
        student, teacher = (network.eval() for network in build_networks(args))
        B, G, L = args.batch_size_per_gpu, args.global_crops_number, args.local_crops_number if args.lambda1 else 0
        cells = args.global_crops_size // models.mask_cell(args.arch, args.patch_size)
        crops = torch.empty(G * B, 3, *[args.global_crops_size] * 2)
        masks = torch.empty(G * B, cells, cells, dtype=torch.bool)
        local_crops = torch.empty(L * B, 3, *[args.local_crops_size] * 2) if L else None
        masked = round(masks.numel() * float(np.mean(args.pred_ratio))) if args.lambda2 else 0
        index = torch.empty(masked, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():  # the wrapper's forward, but for the mean of the patches: autocast knows no meta device
            all_tokens = teacher.head.has_batch_norm or args.lambda2 and args.patch_centering
            z = teacher.head.bottleneck(teacher.backbone.forward_crops([crops], wanted=None if all_tokens else index)[0])
            teacher.head.last_layers(z[:G * B], z[:masked])
        student_cls, student_patch, _ = student(crops, index, masks=masks, local_crops=local_crops)
        (student_cls.sum() + student_patch.sum()).backward()
    return counter.get_total_flops() / B


def choose_recompute(args, compiled):
    """The key of `models.RECOMPUTE` that the flags mean. Raises `engine.InputError` for one that needs the compiler."""
    if args.grad_checkpointing and args.recompute not in (None, "blocks"):
        raise engine.InputError(f"--grad_checkpointing true is --recompute blocks, not {args.recompute}: give one of them")
    if args.recompute in ("elementwise", "half") and not compiled:
        raise engine.InputError(f"--recompute {args.recompute} is left to the compiler: add --compile true, or take blocks")
    return args.recompute or ("blocks" if args.grad_checkpointing else "elementwise" if compiled else "none")


def build_optimizer(name, parameter_groups, device):
    """AdamW, SGD (momentum 0.9) or LARS; rates are set at every step.

    SGD and LARS wait for the device before each step, to learn whether it may be made; fused AdamW does not.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameter_groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":  # not fused: that fails on buffers of which some, a frozen layer's, do not exist yet
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=0.9, foreach=True)
    return utils.LARS(parameter_groups)


def build_schedules(args, steps_per_epoch, total_batch):
    """{"lr", "wd", "momentum"} of every step and {"temp", "patch_temp"} of every epoch; lines about what was shortened."""
    notes = []

    def shortened(flag, length, room):
        if length > room:
            notes.append(f"warning: --{flag} {length} does not fit into {args.epochs} epochs; shortened to {room}")
        return min(length, room)

    warmup = shortened("warmup_epochs", args.warmup_epochs, args.epochs)
    temp_warmup = shortened("warmup_teacher_temp_epochs", args.warmup_teacher_temp_epochs, args.epochs)
    patch_temp_warmup = min(temp_warmup, max(args.epochs - args.pred_start_epoch, 0))
    if patch_temp_warmup < temp_warmup:
        notes.append(f"warning: the patch temperature's warm-up after --pred_start_epoch {args.pred_start_epoch} does not "
                     f"fit into {args.epochs} epochs; shortened to {patch_temp_warmup}")
    peak = args.lr * total_batch / 256
    return {
        "lr": utils.cosine_scheduler(peak, args.min_lr, args.epochs, steps_per_epoch, warmup),
        "wd": utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps_per_epoch),
        "momentum": utils.cosine_scheduler(args.momentum_teacher, 1.0, args.epochs, steps_per_epoch),
        "temp": utils.temperature_schedule(args.warmup_teacher_temp, args.teacher_temp, temp_warmup, args.epochs),
        "patch_temp": utils.temperature_schedule(args.warmup_teacher_patch_temp, args.teacher_patch_temp, patch_temp_warmup,
                                                 args.epochs, args.pred_start_epoch),
    }, notes


def train_ibot(args):
    """Pre-train as `args` (of `get_args_parser`) say; `args` is only read.

    Raises `engine.InputError`, FloatingPointError for numbers that are not finite, and `engine.Preempted` when SIGTERM or
    SIGUSR1 came and the run is saved.
    """
    check_args(args)
    with ExitStack() as at_end:
        signals = engine.StopSignals()
        at_end.callback(signals.restore)
        pretrain(args, signals, at_end)


def pretrain(args, signals, at_end):
    process = engine.init_process(args.device, args.dist_url)
    device, main_process = process.device, process.rank == 0
    output_dir = Path(args.output_dir)
    utils.fix_random_seeds(args.seed)  # the same weights on all processes

    path, checkpoint = find_checkpoint(output_dir, args.load_from) if args.load_from else (None, None)

    # ============ data ============
    local_crops_number = args.local_crops_number if args.lambda1 else 0  # local crops enter the [CLS] loss only
    on_device = device.type != "cpu" if args.augment_on == "auto" else args.augment_on == "device"
    compiled = device.type == "cuda" if args.compile is None else args.compile
    recompute = choose_recompute(args, compiled)
    if compiled:
        engine.check_compiler(device)
    torch.backends.cudnn.benchmark = True  # crops have one size or two
    workers = engine.default_workers() if args.num_workers is None else args.num_workers
    dataset = loader.ImageFolderMask(
        args.data_path,
        transform=loader.MultiCropAugmentation(
            args.global_crops_number, args.global_crops_scale, local_crops_number, args.local_crops_scale,
            args.global_crops_size, args.local_crops_size, photometry="device" if on_device else "cpu",
            augment=augment_of(args)),
        patch_size=models.mask_cell(args.arch, args.patch_size), pred_ratio=args.pred_ratio,
        pred_ratio_var=args.pred_ratio_var, pred_shape=args.pred_shape, pred_start_epoch=args.pred_start_epoch,
        seed=args.seed, on_bad_image=args.on_bad_image)
    pixel_stats = pixel_stats_of(args, path, checkpoint, dataset, device)
    args = with_resolved(args, augment_of(args), pixel_stats)
    sampler = loader.ResumableSampler(dataset, process.world_size, process.rank, shuffle=True, seed=args.seed)
    data_loader = DataLoader(
        dataset, args.batch_size_per_gpu, sampler=sampler, num_workers=workers, drop_last=True,
        collate_fn=partial(loader.collate, pad_masks=64 if compiled else 1),
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=engine.ignore_signals,
        generator=torch.Generator())  # its own, or starting workers in mid-epoch would draw from the run's
    total_batch = args.batch_size_per_gpu * process.world_size * args.accum_iter
    steps_per_epoch = len(data_loader) // args.accum_iter
    if not steps_per_epoch:
        raise engine.InputError(f"--data_path {args.data_path}: {len(dataset)} images are fewer than one batch of "
                               f"{total_batch}; lower --batch_size_per_gpu{' or --accum_iter' * (args.accum_iter > 1)}")

    # ============ networks ============
    student, teacher = (network.to(device) for network in build_networks(args))
    ema = utils.ema_pairs(student, teacher)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    for network in (student, teacher):
        network.backbone.residual_dtype = amp_dtype if args.residual_dtype == "amp" else None
        network.backbone.set_grad_checkpointing(recompute == "blocks")
        if compiled:
            network.compile_parts(recompute)
    ddp_student = engine.data_parallel(student, device, args.accum_iter) if process.world_size > 1 else student

    # ============ schedules, loss, optimizer ============
    schedules, notes = build_schedules(args, steps_per_epoch, total_batch)
    ibot_loss = iBOTLoss(
        args.out_dim, args.out_dim if args.shared_head else args.patch_out_dim, schedules["temp"], schedules["patch_temp"],
        center_momentum=args.center_momentum, patch_center_momentum=args.patch_center_momentum, lambda1=args.lambda1,
        lambda2=args.lambda2, patch_centering=args.patch_centering, patch_targets=args.patch_targets).to(device)
    photometry = loader.apply_photometry
    if compiled:
        ibot_loss.compile()
        photometry = torch.compile(photometry, dynamic=False)
    optimizer = build_optimizer(args.optimizer, utils.get_params_groups(student), device)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    peak = engine.peak_flops(device, amp_dtype)
    load = flops_per_image(args) / peak if peak else None  # seconds that the device needs at least
    if args.arch.startswith("swin") and args.use_masked_im_modeling and any(args.pred_ratio) and not args.pred_start_epoch:
        notes.append("note: a Swin masked from the first epoch on: watch its gradient norms (step/grad_norm); the recipe "
                     "begins with --pred_start_epoch 50")

    # ============ resume ============
    start_epoch, progress = 0, new_progress()
    if path:
        restore(path, checkpoint, student, teacher, optimizer, ibot_loss, scaler)
        start_epoch, progress = checkpoint["epoch"], new_progress() | checkpoint.get("progress", {})
        images = progress["step"] * progress["total_batch"]  # of the running epoch
        progress["step"] = images // total_batch
        if progress["step"] > steps_per_epoch:
            raise engine.InputError(f"checkpoint {path}: {images} images of its epoch were used, the folder has "
                                   f"{len(dataset)}")
        notes += notes_of_resume(path, checkpoint, args, process, len(dataset), images, progress["step"] * total_batch)
        del checkpoint
    started = start_epoch * steps_per_epoch + progress["step"]
    engine.check_same_start(started, args.load_from, output_dir)

    writer = None
    if main_process:
        if args.load_from == "auto" and path == output_dir / engine.PREVIOUS:
            path = path.replace(output_dir / engine.CHECKPOINT)  # which is damaged: the next save is not to keep that one
        engine.start_output(output_dir, start_epoch if path else None, run_files(output_dir))
        if not path:
            pictures.write_crops(dataset, islice(sampler, 6), args.use_masked_im_modeling, output_dir)
        writer = SummaryWriter(output_dir / "tf_logs", purge_step=started or None)
        at_end.callback(engine.close_writer, writer)
        print(engine.describe_run(args, process))
        print(f"data: {len(dataset)} images in {len(dataset.classes)} folders, {steps_per_epoch} steps an epoch")
        print(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; "
              f"precision: {amp_dtype or torch.float32}; compiled: {compiled}; recomputed: {recompute}; "
              f"colours changed on: {'device' if on_device else 'cpu'}; {workers} loader processes")
        print(f"crops of the first batch: {output_dir / pictures.CROPS}; pixels normalised with {pixel_stats}")
        print(f"total batch: {total_batch}; "
              f"peak learning rate: {schedules['lr'].max():.6g} (--lr {args.lr:g} x {total_batch} / 256)")
        where = f"starting at epoch {start_epoch} of {args.epochs}" + f", step {progress['step']}" * (progress["step"] > 0)
        print("\n".join(notes + [where]), flush=True)

    # ============ training ============
    at_end.enter_context(engine.collecting_by_hand())
    start_time, saved_at = time.time(), time.monotonic()
    bad_before, warned = set(progress["bad"]), set()

    def wanted():
        """What this process wants before the next batch: to STOP, to SAVE or nothing."""
        due = main_process and args.save_every_minutes and time.monotonic() - saved_at > 60 * args.save_every_minutes
        return engine.STOP if signals.received else engine.SAVE if due else 0

    def save_now(epoch, progress):
        """Save the run as it is before update `progress["step"]` of `epoch`; all processes call it. False if that fails."""
        nonlocal saved_at
        own = {"total_batch": total_batch, "folder": len(dataset),
               "bad": engine.gather_bad_images(dataset, bad_before, device),
               "random": [part.cpu() for part in engine.gather_parts(engine.random_state(device).to(device))]}
        if main_process:
            saved = save(output_dir, epoch, args, student, teacher, optimizer, ibot_loss, scaler, progress | own)
        saved_at = time.monotonic()
        return not main_process or saved

    for epoch in range(start_epoch, args.epochs):
        sampler.set_epoch(epoch, start=progress["step"] * args.accum_iter * args.batch_size_per_gpu)
        dataset.set_epoch(epoch)
        # Drop path differs by process; by epoch too, so that a resumed epoch draws what it would have drawn.
        seed = (args.seed, epoch, process.rank) + (progress["step"],) * (progress["step"] > 0)
        utils.fix_random_seeds(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        if progress["step"] and len(progress["random"]) == process.world_size:
            try:
                engine.set_random_state(progress["random"][process.rank], device)
            except (RuntimeError, ValueError, IndexError, OverflowError) as error:
                raise engine.InputError(f"checkpoint {path}: its random state cannot be used ({error})") from error
        batches = loader.device_batches(data_loader, device, photometry, pixel_stats, amp_dtype or torch.float32)
        check = partial(engine.check_images, dataset, bad_before, args.max_bad_images, output_dir, device)
        stats = train_one_epoch(
            ddp_student, teacher, ema, ibot_loss, optimizer, scaler, partial(signals.wait_for, partial(next, batches)),
            steps_per_epoch, schedules, epoch, progress, wanted, save_now, check, amp_dtype, load, writer, args, device)
        gc.collect()
        bad = engine.gather_bad_images(dataset, bad_before, device)
        if main_process:
            write_logs(output_dir, epoch, stats, writer, bad)
            print(f"epoch {epoch} done: " + "  ".join(f"{k} {v:.4g}" for k, v in stats.items()))
            signs = collapse_warnings(stats, args.out_dim, ibot_loss.center2.shape[-1], schedules["temp"][epoch])
            print("".join(f"warning: {text}\n" for name, text in signs.items() if name not in warned), end="")
            warned = signs.keys()
            if bad:
                print(f"skipped {len(bad)} unreadable images so far; the first: {', '.join(bad[:10])}; all: "
                      f"{output_dir / engine.BAD_IMAGES}")
            print(end="", flush=True)
        progress = new_progress() | {"dropped": progress["dropped"]}
        save_now(epoch + 1, progress)
    if main_process:
        if start_epoch >= args.epochs:
            print(f"nothing to do: {path} has finished {start_epoch} epochs")
        print(f"training time {engine.eta_string(time.time() - start_time)}; checkpoint: {output_dir / engine.CHECKPOINT}")


def train_one_epoch(student, teacher, ema, ibot_loss, optimizer, scaler, fetch, steps, schedules, epoch, progress, wanted,
                    save_now, check_images, amp_dtype, load, writer, args, device):
    """Updates `progress["step"]` to `steps` of an epoch. Returns its means by name (on process 0 also clustering scores).

    Args:
        fetch: gives the next batch, or None when a signal ended the wait.
        progress: `new_progress()`, or as a checkpoint had it; kept up to date.
        wanted, save_now, check_images: see `pretrain`; `check_images` is called with each log line.
        load: seconds that a device needs at least for an image; None: not known.

    Raises `engine.Preempted` at the first batch at which any process wants to stop, after saving.
    """
    meters, signs = engine.DeviceMeters(METERS), engine.DeviceMeters(SIGNS)
    waited, since, since_step = 0.0, time.time(), progress["step"]
    # What a checkpoint held is of all processes; one of them goes on with it.
    real, predicted = ([progress[name][:None if writer else 0].to(device)] for name in ("labels", "clusters"))

    def next_batch(first):
        nonlocal waited
        wait_from = time.time()
        batch = fetch()
        waited += time.time() - wait_from
        # The hosts agree before each batch, so that all stop at the same one, whichever of them a signal or a stall met.
        want = engine.host_reduce(wanted())
        if want == engine.STOP:
            raise engine.Preempted
        if want == engine.SAVE and first:
            save_here()
        return batch

    def read_meters():
        """Bring what the device still holds into `progress` and the log; the one wait for the device."""
        rows = meters.read()
        for step, row in enumerate(rows, start=epoch * steps + progress["step"] - len(rows)):
            row |= {"lr": float(schedules["lr"][step]), "wd": float(schedules["wd"][step])}
            engine.count_step(progress, step, row, scaler is not None, args.on_nonfinite, quiet=not writer)
            engine.log_scalars(writer, "step", row, step)
        for row in signs.read():
            share = row.pop("patch_share")
            cross = row.pop("patch_cross")
            if share:  # some patch was masked
                row["patch_entropy"] /= share
                row["patch_kl"] = cross / share - row["patch_entropy"]
            else:
                del row["patch_entropy"], row["patch_used"]
            if "nonfinite" not in row:
                engine.add_row(progress, row)
                engine.log_scalars(writer, "step", row, epoch * steps + progress["step"] - 1)
        return rows

    def save_here():
        read_meters()
        labels, clusters = (torch.cat(engine.gather_parts(torch.cat(parts))).cpu() for parts in (real, predicted))
        return save_now(epoch, progress | {"labels": labels, "clusters": clusters})

    first = progress["step"]
    for it in range(first, steps):
        step = epoch * steps + it
        log_step = (it + 1) % args.print_freq == 0 or it + 1 == steps
        before = engine.random_state(device) if args.accum_iter > 1 else None
        if args.save_every_steps and it > first and step % args.save_every_steps == 0:
            save_here()
        try:
            means, watched, labels, clusters = train_step(
                (next_batch(first=i == 0) for i in range(args.accum_iter)), student, teacher, ema, ibot_loss, optimizer,
                scaler, epoch, lr=schedules["lr"][step], weight_decay=schedules["wd"][step],
                momentum=schedules["momentum"][step], clip_grad=args.clip_grad,
                freeze_last_layer=epoch < args.freeze_last_layer, amp_dtype=amp_dtype, accum_iter=args.accum_iter,
                watch=log_step)
        except engine.Preempted:
            ibot_loss.teacher_means.clear()  # of batches of this update, which a resumed run computes again
            if before is not None:  # with one batch an update nothing was drawn before the stop
                engine.set_random_state(before, device)
            raise engine.stopped(save_here(), epoch, it) from None
        progress["step"] = it + 1
        meters.add(*(means[name] for name in METERS))
        if log_step:
            signs.add(*(watched[name] for name in SIGNS))
        real.append(labels)
        predicted.append(clusters)

        if not log_step:
            continue
        last = read_meters()[-1]
        elapsed, now = time.time() - since, time.time()
        if writer:
            images_s = (it + 1 - since_step) * len(labels) * engine.get_world_size() / elapsed
            speed = {"images_per_second": images_s}
            if load:  # model FLOPs utilisation, of all devices
                speed["mfu"] = images_s * load / engine.get_world_size()
            left = (args.epochs * steps - step - 1) * elapsed / (it + 1 - since_step)
            print(f"epoch {epoch}/{args.epochs} [{it + 1:>{len(str(steps))}}/{steps}]  "
                  + "  ".join(f"{name} {last[name]:.4f} ({engine.mean_of(progress, name):.4f})" for name in METERS[:4])
                  + f"  lr {last['lr']:.2e}  wd {last['wd']:.3f}  {images_s:.1f} images/s"
                  + (f"  mfu {100 * speed['mfu']:.1f} %" if load else "") +
                  f"  data {100 * waited / elapsed:.0f} %  memory {engine.peak_memory_mib(device):.0f} MiB"
                  f"  eta {engine.eta_string(left)}", flush=True)
            engine.log_scalars(writer, "step", speed, step)
        waited, since, since_step = 0.0, now, it + 1
        check_images()
        gc.collect(1)  # young objects: the others wait for the end of the epoch

    stats = {name: engine.mean_of(progress, name) for name in progress["totals"]}
    labels, clusters = (torch.cat(engine.gather_parts(torch.cat(parts))).cpu().numpy() for parts in (real, predicted))
    if writer:
        stats |= utils.clustering_scores(labels, clusters)
        stats["cls_used"] = len(np.unique(clusters)) / args.out_dim
    return stats


def train_step(batches, student, teacher, ema, ibot_loss, optimizer, scaler, epoch, lr, weight_decay, momentum, clip_grad,
               freeze_last_layer, amp_dtype=None, accum_iter=1, watch=False):
    """One update of student, teacher and centres, without waiting for the device.

    If a loss, a gradient or the teacher's outputs are not finite on any process, student, optimiser and centres stay.

    Args:
        batches: `accum_iter` batches (`loader.Batch`, normalised crops on the device), taken one by one. Gradients, losses
            and centres are those of one large batch of them all; batch norm in the head has each batch's own statistics.
        ema: `utils.ema_pairs(student, teacher)`.
        watch: also compute `iBOTLoss.collapse_signs` of the last batch.

    Returns:
        {"loss", "cls", "patch", "acc", "grad_norm"}, 0-d tensors; the signs (empty unless `watch`); labels [B] of all
        batches; the teacher's clusters [B], the largest output for the first global crop. `acc`: how often the student puts
        the second crop into the same; `grad_norm`: before clipping.
    """
    # schedules; only the first group is decayed
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    optimizer.param_groups[0]["weight_decay"] = float(weight_decay)

    optimizer.zero_grad()
    rows, labels, clusters, signs = [], [], [], {}
    for i, batch in enumerate(batches):
        # forward: teacher on plain global crops, student on the same crops masked and on plain local crops
        G, B = batch.global_crops.shape[:2]
        global_crops, masks = batch.global_crops.flatten(0, 1), batch.masks.flatten(0, 1)  # [G*B, 3, S, S], [G*B, h, w]
        local_crops = None if batch.local_crops is None else batch.local_crops.flatten(0, 1)  # [L*B, 3, s, s]
        patch_loss = ibot_loss.lambda2 > 0  # without it no patch goes through the last layer
        index = batch.mask_index if patch_loss else batch.mask_index[:0]
        weight = batch.mask_weight if patch_loss else batch.mask_weight[:0]
        last = i + 1 == accum_iter
        with student.no_sync() if engine.get_world_size() > 1 and not last else nullcontext():
            with torch.autocast(global_crops.device.type, amp_dtype, enabled=amp_dtype is not None):
                with torch.no_grad():
                    teacher_cls, teacher_patch, teacher_mean = teacher(
                        global_crops, index, patch_mean=patch_loss and ibot_loss.patch_centering)
                student_cls, student_patch, _ = student(global_crops, index, masks=masks, local_crops=local_crops)
            losses = ibot_loss(student_cls, student_patch, teacher_cls, teacher_patch, teacher_mean, weight, G, epoch)

            clusters.append(teacher_cls[:B].argmax(dim=-1))
            labels.append(batch.labels)
            agree = (clusters[-1] == student_cls[B:2 * B].argmax(dim=-1)).float().mean()
            rows.append(torch.stack([*(value.detach() for value in losses.values()), agree]))
            if watch and last:
                signs = ibot_loss.collapse_signs(teacher_cls, teacher_patch, weight, losses, epoch)

            # backward; what it does not read makes room
            del batch, global_crops, local_crops, teacher_cls, teacher_patch, student_cls, student_patch
            loss = losses["loss"] / accum_iter
            (loss if scaler is None else scaler.scale(loss)).backward()
    means = torch.stack(rows).mean(dim=0)

    # clip each parameter by itself, move the centres, hold the last layer, step
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.stack(utils.clip_gradients(parameters, clip_grad)).norm()
    # A scaler looks at the gradients itself: while it seeks its scale they overflow, and nothing is wrong.
    finite = ibot_loss.update_centers((means.sum() + (grad_norm if scaler is None else 0)).isfinite())
    if freeze_last_layer:
        for name, p in student.named_parameters():
            if "last_layer" in name:
                p.grad = None
    if scaler is None:
        utils.step_if(finite, optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()

    # the teacher follows
    utils.ema_update(*ema, momentum=float(momentum))
    means = dict(zip(METERS, (*means, grad_norm), strict=True))
    return means, signs, torch.cat(labels), torch.cat(clusters)


# ---------------------------------------------------------------- progress and logs

def new_progress():
    """What a checkpoint holds of the running epoch: updates made, sums and counts of the meters, labels and clusters of all
    processes, updates dropped in a row; and of the run: names of bad images, images of an update and of the folder, random
    state of each process."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return {"step": 0, "totals": {}, "counts": {}, "labels": nothing, "clusters": nothing, "dropped": 0, "bad": [],
            "total_batch": 0, "folder": 0, "random": []}


def write_logs(output_dir, epoch, stats, writer, bad):
    """Add an epoch to `log.txt` and TensorBoard, list bad images. A full disk is a warning."""
    engine.log_scalars(writer, "epoch", stats, epoch)
    engine.append_log(output_dir / "log.txt", {**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch})
    if bad:
        engine.write_bad_images(output_dir, bad)


def collapse_warnings(stats, out_dim, patch_out_dim, teacher_temp):
    """{sign: sentence} for the signs of collapse in the means of an epoch (see `iBOTLoss.collapse_signs`)."""
    found = {}
    for what, name, K in (("cls", "[CLS]", out_dim), ("patch", "patch", patch_out_dim)):
        entropy, used = (stats.get(f"{what}_{sign}") for sign in ("entropy", "used"))
        if entropy is not None and entropy > 0.999 * math.log(K):
            patch = "patch_" * (what == "patch")
            found[f"{what}_entropy"] = (
                f"the {name} targets are all but uniform (entropy {entropy:.3f} of at most {math.log(K):.3f}): they teach "
                f"nothing; a lower --teacher_{patch}temp and --warmup_teacher_{patch}temp sharpen them, with a lower "
                f"--{patch}center_momentum lest all fall into one cluster (benchmarks/quickstart.md)")
        if used is not None and used * K < 1.5:
            found[f"{what}_used"] = (f"the teacher puts everything into one of {K} {name} clusters; a faster centre or a "
                                     "higher teacher temperature spreads them")
    if stats.get("cls_std", math.inf) < 0.01 * teacher_temp:
        found["cls_std"] = ("the teacher's [CLS] outputs hardly differ between images (standard deviation "
                            f"{stats['cls_std']:.2g})")
    return found


# ---------------------------------------------------------------- files

def checkpoint_files(output_dir):
    """Checkpoints of a run, newest first."""
    found = [path for path in (output_dir / engine.CHECKPOINT, output_dir / engine.PREVIOUS) if path.exists()]
    return found + sorted(output_dir.glob("checkpoint[0-9]*.pth"), reverse=True)


def run_files(output_dir):
    """What a run writes into its folder, as far as it is there."""
    others = (output_dir / name for name in ("log.txt", "tf_logs", pictures.CROPS, engine.BAD_IMAGES))
    return checkpoint_files(output_dir) + [path for path in others if path.exists()]


def save(output_dir, epoch, args, student, teacher, optimizer, ibot_loss, scaler, progress):
    """Write `checkpoint.pth`, from which `epoch` is to run (on); between epochs also `checkpointNNNN.pth`, by
    `--saveckp_freq`. Returns whether it could be written.

    Names are the reference's: its student was always wrapped for data parallelism (`module.`), its teacher only when the
    head holds batch norms.
    """
    def wrapped(network):
        return {f"module.{name}": value for name, value in network.state_dict().items()}

    engine.check_finite((student, teacher, ibot_loss), epoch)
    state = {
        "student": wrapped(student),
        "teacher": wrapped(teacher) if teacher.head.has_batch_norm else teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "args": args,
        "ibot_loss": ibot_loss.state_dict(),
        "progress": progress,
    }
    if scaler is not None:
        state["fp16_scaler"] = scaler.state_dict()
    path = output_dir / engine.CHECKPOINT
    try:
        engine.save_atomically(state, path, previous=output_dir / engine.PREVIOUS)
        finished = epoch - 1  # the reference counts its files so
        if args.saveckp_freq and not progress["step"] and finished > 0 and finished % args.saveckp_freq == 0:
            path = output_dir / f"checkpoint{finished:04}.pth"
            engine.save_atomically(state, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        engine.not_saved(path, error, args.on_save_error)
        return False
    return True


def find_checkpoint(output_dir, load_from):
    """(path, content) of the checkpoint `load_from`, or for "auto" of the newest good one, (None, None) if there is none.

    Raises `engine.InputError` when that file is no good, or none of those that there are.
    """
    if load_from == "auto":
        return engine.find_checkpoint(checkpoint_files(output_dir), read_checkpoint)
    return output_dir / load_from, read_checkpoint(output_dir / load_from)


def read_checkpoint(path):
    """`engine.load_pretraining`; raises `engine.InputError` too when what it says of the running epoch cannot be."""
    checkpoint = engine.load_pretraining(path)
    progress = checkpoint.get("progress", {})

    def whole(name):
        return type(progress.get(name)) is int and 0 <= progress[name] < 2**40

    def numbers(name):
        values = progress.get(name)
        return isinstance(values, dict) and all(type(value) in (int, float) for value in values.values())

    def vector(value, dtype):
        return torch.is_tensor(value) and value.dtype is dtype and value.ndim == 1
    good = "progress" not in checkpoint or isinstance(progress, dict) and all((
        all(map(whole, ("step", "dropped", "folder", "total_batch"))),
        all(map(numbers, ("totals", "counts"))) and progress["totals"].keys() == progress["counts"].keys(),
        all(vector(progress.get(name), torch.int64) for name in ("labels", "clusters")),
        isinstance(progress.get("bad"), list) and all(isinstance(name, str) for name in progress["bad"]),
        isinstance(progress.get("random"), list) and all(vector(state, torch.uint8) for state in progress["random"])))
    if not good:
        raise engine.InputError(f"checkpoint {path}: its entry 'progress' cannot be used")
    return checkpoint


def restore(path, checkpoint, student, teacher, optimizer, ibot_loss, scaler):
    """Load networks, optimiser, centres and scaler from a `read_checkpoint`."""
    for key, network in (("student", student), ("teacher", teacher)):
        engine.load_strictly(network, engine.network_state_dict(checkpoint, key, path), path)
    engine.load_strictly(ibot_loss, checkpoint["ibot_loss"], path)
    engine.load_optimizer(optimizer, checkpoint["optimizer"], path)
    if scaler is not None and "fp16_scaler" in checkpoint:
        engine.load_scaler(scaler, checkpoint["fp16_scaler"], path)


def notes_of_resume(path, checkpoint, args, process, folder, images, used):
    """Lines that say what is resumed, and what is not as it was.

    folder: images in the folder; images: those of the running epoch that were used before; used: whole batches of them.
    """
    free = engine.FREE_FLAGS | {"saveckp_freq"}
    notes = [f"resumed from {path}", *engine.changed_flags(vars(args), checkpoint, free).values()]
    progress = checkpoint.get("progress", {})
    if not images:
        return notes
    if len(progress["random"]) != process.world_size:
        notes.append(f"note: {process.world_size} processes instead of {len(progress['random'])}: in this epoch images are "
                     "shared out, and drop path is drawn, otherwise than without the stop")
    if used != images:
        notes.append(f"note: other batches than before: the last {images - used} images that were used come again")
    if progress["folder"] != folder:
        notes.append(f"note: the folder holds {folder} images instead of {progress['folder']}: the rest of this epoch is "
                     "drawn from another order")
    return notes


def main():
    parser = argparse.ArgumentParser("main_ibot.py", parents=[get_args_parser()], allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    train_ibot(parser.parse_args())


if __name__ == "__main__":
    engine.run(main)
