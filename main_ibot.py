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
import json
import math
import shutil
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

import loader
import models
import utils

CHECKPOINT = "checkpoint.pth"


def get_args_parser():
    """All flags with the reference's names and defaults; use it with `parents=[get_args_parser()]`."""
    parser = argparse.ArgumentParser("iBOT", add_help=False, allow_abbrev=False)
    flag = utils.bool_flag

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
    optim.add_argument("--use_fp16", default=True, type=flag, help="mixed precision")
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

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default=".", type=str)
    run.add_argument("--load_from", default=None, type=str,
                     help=f"resume from this file of the output folder, e.g. {CHECKPOINT}")
    run.add_argument("--overwrite", default=False, type=flag, help="start over in an output folder that holds a run")
    run.add_argument("--saveckp_freq", default=40, type=int,
                     help="also keep checkpointNNNN.pth every so many epochs; 0: never")
    run.add_argument("--print_freq", default=10, type=int, help="steps between log lines; the device is read only then")
    run.add_argument("--compile", default=None, type=flag,
                     help="compile blocks, head and loss (a minute or more at the start); default: on CUDA")
    run.add_argument("--grad_checkpointing", default=False, type=flag,
                     help="compute each block again in the backward pass instead of keeping its activations")
    run.add_argument("--seed", default=0, type=int)
    run.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    run.add_argument("--dist_url", default="env://", type=str, help="rendezvous of several processes")
    run.add_argument("--local_rank", "--local-rank", default=0, type=int, help=argparse.SUPPRESS)  # old launchers pass it
    return parser


def check_args(args):
    """Raise `utils.InputError` for values that cannot be trained with, before anything is touched."""
    def need(condition, message):
        if not condition:
            raise utils.InputError(message)

    need(args.data_path, "--data_path is missing: the image folder to train on, one sub-folder per class")
    for name in ("epochs", "batch_size_per_gpu", "out_dim", "patch_out_dim", "head_hidden_dim", "patch_size", "window_size",
                 "print_freq", "accum_iter", "global_crops_number", "global_crops_size", "local_crops_size"):
        need(getattr(args, name) >= 1, f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("local_crops_number", "warmup_epochs", "warmup_teacher_temp_epochs", "pred_start_epoch",
                 "freeze_last_layer", "saveckp_freq", "clip_grad", "lambda1", "lambda2", "lr", "min_lr", "seed"):
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
    need(args.global_crops_number > 1 or (args.local_crops_number and args.lambda1),
         "the [CLS] loss needs two crops: raise --global_crops_number or --local_crops_number")
    need(args.lambda1 + args.lambda2 > 0, "--lambda1 and --lambda2 are both 0: there is no loss")

    swin, cell = args.arch.startswith("swin"), models.mask_cell(args.arch, args.patch_size)
    need(not swin or args.patch_size in (4, 16), f"--patch_size {args.patch_size}: Swin's patch is 4")
    need(args.global_crops_size % cell == 0,
         f"--global_crops_size {args.global_crops_size} is not a multiple of {cell} "
         f"({'a token of Swin' if swin else '--patch_size'})")
    patch = 4 if swin else args.patch_size
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
    need(not output_dir.exists() or output_dir.is_dir(), f"--output_dir {output_dir} is a file")
    if args.load_from:
        need((output_dir / args.load_from).is_file(), f"--load_from: {output_dir / args.load_from} does not exist")
    else:
        held = run_files(output_dir)
        need(args.overwrite or not held,
             f"--output_dir {output_dir} already holds a run ({', '.join(p.name for p in held[:3])}): resume with "
             f"--load_from {CHECKPOINT}, start over with --overwrite true, or choose another folder")


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
    def update_centers(self):
        """Move the centres towards the teacher's mean outputs over all batches since the last call, and all processes."""
        cls_means, patch_means = zip(*self.teacher_means, strict=True)
        self.teacher_means = []
        patches = self.patch_centering and patch_means[0] is not None
        means = torch.stack(cls_means).mean(dim=0)
        if patches:
            means = torch.cat((means, torch.stack(patch_means).mean(dim=0)))
        means = utils.all_reduce_mean(means)
        self.center.lerp_(means[None, :self.center.shape[-1]], 1 - self.center_momentum)
        if patches:
            self.center2.lerp_(means[None, None, self.center.shape[-1]:], 1 - self.patch_center_momentum)


# ---------------------------------------------------------------- training

def build_networks(args):
    """(student, teacher): the teacher has no mask embedding, takes no gradient and starts from the student's weights."""
    drop_path = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    if args.drop_path is None and not args.arch.startswith("swin"):
        drop_path = {"drop_path_rate": 0.1}
    shape = {"patch_size": args.patch_size, "window_size": args.window_size, "img_size": args.global_crops_size}
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


def build_optimizer(name, parameter_groups, device):
    """AdamW, SGD (momentum 0.9) or LARS; rates are set at every step.

    With float16 the gradient scaler waits for the device before each step of SGD and LARS; fused AdamW needs no wait.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameter_groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":  # not fused: that fails on buffers of which some, a frozen layer's, do not exist yet
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=0.9, foreach=True)
    return utils.LARS(parameter_groups)


def choose_amp_dtype(use_fp16, amp_dtype, device):
    """The autocast type, or None for single precision."""
    if not use_fp16 or (amp_dtype == "auto" and device.type not in ("cuda", "cpu")):
        return None
    if amp_dtype == "auto" and device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None  # others only emulate it
    if amp_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, amp_dtype)


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
    """Pre-train as `args` (of `get_args_parser`) say; `args` is only read."""
    check_args(args)
    process = utils.init_process(args.device, args.dist_url)
    device, main_process = process.device, process.rank == 0
    output_dir = Path(args.output_dir)
    utils.fix_random_seeds(args.seed)  # the same weights on all processes

    # ============ data ============
    local_crops_number = args.local_crops_number if args.lambda1 else 0  # local crops enter the [CLS] loss only
    on_device = device.type != "cpu" if args.augment_on == "auto" else args.augment_on == "device"
    compiled = device.type == "cuda" if args.compile is None else args.compile
    workers = utils.default_workers() if args.num_workers is None else args.num_workers
    dataset = loader.ImageFolderMask(
        args.data_path,
        transform=loader.MultiCropAugmentation(
            args.global_crops_number, args.global_crops_scale, local_crops_number, args.local_crops_scale,
            args.global_crops_size, args.local_crops_size, photometry="device" if on_device else "cpu"),
        patch_size=models.mask_cell(args.arch, args.patch_size), pred_ratio=args.pred_ratio,
        pred_ratio_var=args.pred_ratio_var, pred_shape=args.pred_shape, pred_start_epoch=args.pred_start_epoch,
        seed=args.seed, on_bad_image=args.on_bad_image)
    sampler = DistributedSampler(dataset, process.world_size, process.rank, shuffle=True, seed=args.seed)
    data_loader = DataLoader(
        dataset, args.batch_size_per_gpu, sampler=sampler, num_workers=workers, drop_last=True,
        collate_fn=partial(loader.collate, pad_masks=64 if compiled else 1),
        pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    total_batch = args.batch_size_per_gpu * process.world_size * args.accum_iter
    steps_per_epoch = len(data_loader) // args.accum_iter
    if not steps_per_epoch:
        raise utils.InputError(f"--data_path {args.data_path}: {len(dataset)} images are fewer than one batch of "
                               f"{total_batch}; lower --batch_size_per_gpu{' or --accum_iter' * (args.accum_iter > 1)}")

    # ============ networks ============
    student, teacher = (network.to(device) for network in build_networks(args))
    ema = utils.ema_pairs(student, teacher)
    for network in (student, teacher):
        network.backbone.set_grad_checkpointing(args.grad_checkpointing)
        if compiled:
            network.compile_parts()
    ddp_student = utils.data_parallel(student, device, args.accum_iter) if process.world_size > 1 else student

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
    amp_dtype = choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None

    # ============ resume ============
    start_epoch = 0
    if args.load_from:
        start_epoch = restore(output_dir / args.load_from, student, teacher, optimizer, ibot_loss, scaler)

    writer = None
    if main_process:
        start_output(output_dir, keep=bool(args.load_from))
        writer = SummaryWriter(output_dir / "tf_logs")
        print(utils.describe_run(args, process))
        print(f"data: {len(dataset)} images in {len(dataset.classes)} folders, {steps_per_epoch} steps an epoch")
        print(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; "
              f"precision: {amp_dtype or torch.float32}; compiled: {compiled}; colours changed on: "
              f"{'device' if on_device else 'cpu'}; {workers} loader processes")
        print(f"total batch: {total_batch}; "
              f"peak learning rate: {schedules['lr'].max():.6g} (--lr {args.lr:g} x {total_batch} / 256)")
        print("\n".join(notes + [f"starting at epoch {start_epoch} of {args.epochs}"]), flush=True)

    # ============ training ============
    start_time = time.time()
    for epoch in range(start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        # Drop path differs by process; by epoch too, so that a resumed epoch draws what it would have drawn.
        utils.fix_random_seeds(int(np.random.SeedSequence((args.seed, epoch, process.rank)).generate_state(1)[0]))
        batches = loader.device_batches(data_loader, device, photometry)
        stats = train_one_epoch(ddp_student, teacher, ema, ibot_loss, optimizer, scaler, batches, steps_per_epoch,
                                schedules, epoch, amp_dtype, writer, args, device)
        if not torch.stack(torch._foreach_norm(list(student.parameters()))).isfinite().all():
            raise FloatingPointError(f"a weight became non-finite in epoch {epoch}; the last checkpoint is intact")
        bad = skipped_images(dataset, device)
        if main_process:
            save(output_dir, epoch, args, student, teacher, optimizer, ibot_loss, scaler)
            with open(output_dir / "log.txt", "a") as file:
                file.write(json.dumps({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch}) + "\n")
            for name, value in stats.items():
                writer.add_scalar(f"epoch/{name}", value, epoch)
            print(f"epoch {epoch} done: " + "  ".join(f"{k} {v:.4g}" for k, v in stats.items()))
            if bad:
                print(f"skipped {len(bad)} unreadable images so far; the first: {', '.join(map(str, bad[:10]))}")
            print(end="", flush=True)
    if main_process:
        writer.close()
        if start_epoch >= args.epochs:
            print(f"nothing to do: {output_dir / args.load_from} has finished {start_epoch} epochs")
        print(f"training time {utils.eta_string(time.time() - start_time)}; checkpoint: {output_dir / CHECKPOINT}")


def train_one_epoch(student, teacher, ema, ibot_loss, optimizer, scaler, batches, steps, schedules, epoch, amp_dtype,
                    writer, args, device):
    """`steps` updates with `batches`. Returns the epoch's means by meter name (on process 0 also the clustering scores)."""
    meters = utils.DeviceMeters(("loss", "cls", "patch", "acc"))
    totals, count, waited, since = {}, 0, 0.0, time.time()
    real, predicted = [], []  # labels of the folders, the teacher's clusters

    def next_batch():
        nonlocal waited
        wait_from = time.time()
        batch = next(batches)
        waited += time.time() - wait_from
        return batch

    for it in range(steps):
        step = epoch * steps + it
        means, labels, clusters = train_step(
            (next_batch() for _ in range(args.accum_iter)), student, teacher, ema, ibot_loss, optimizer, scaler, epoch,
            lr=schedules["lr"][step], weight_decay=schedules["wd"][step], momentum=schedules["momentum"][step],
            clip_grad=args.clip_grad, freeze_last_layer=epoch < args.freeze_last_layer, amp_dtype=amp_dtype,
            accum_iter=args.accum_iter)
        meters.add(*(means[name] for name in meters.names))
        real.append(labels)
        predicted.append(clusters)

        if (it + 1) % args.print_freq and it + 1 < steps:
            continue
        rows = meters.read()  # the one wait for the device
        elapsed, now = time.time() - since, time.time()
        for i, row in enumerate(rows, start=step + 1 - len(rows)):
            row |= {"lr": float(schedules["lr"][i]), "wd": float(schedules["wd"][i])}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"loss is {row['loss']} at step {i} (epoch {epoch}): cls {row['cls']}, patch {row['patch']}, "
                    f"learning rate {row['lr']:.3g}; the last checkpoint is intact. "
                    "With float16, try --amp_dtype bfloat16 or --use_fp16 false")
            for name, value in row.items():
                totals[name] = totals.get(name, 0.0) + value
                if writer:
                    writer.add_scalar(f"step/{name}", value, i)
            count += 1
        if writer:
            images_s = len(rows) * len(labels) * utils.get_world_size() / elapsed
            left = (args.epochs * steps - step - 1) * elapsed / len(rows)
            print(f"epoch {epoch}/{args.epochs} [{it + 1:>{len(str(steps))}}/{steps}]  "
                  + "  ".join(f"{name} {rows[-1][name]:.4f} ({totals[name] / count:.4f})" for name in meters.names)
                  + f"  lr {rows[-1]['lr']:.2e}  wd {rows[-1]['wd']:.3f}  {images_s:.1f} images/s"
                  f"  data {100 * waited / elapsed:.0f} %  memory {utils.peak_memory_mib(device):.0f} MiB"
                  f"  eta {utils.eta_string(left)}", flush=True)
            writer.add_scalar("step/images_per_second", images_s, step)
        waited, since = 0.0, now

    stats = {name: value / count for name, value in totals.items()}
    real, predicted = utils.gather_variable(torch.cat(real)), utils.gather_variable(torch.cat(predicted))
    return stats | (utils.clustering_scores(real.cpu().numpy(), predicted.cpu().numpy()) if writer else {})


def train_step(batches, student, teacher, ema, ibot_loss, optimizer, scaler, epoch, lr, weight_decay, momentum, clip_grad,
               freeze_last_layer, amp_dtype=None, accum_iter=1):
    """One update of student, teacher and centres, without waiting for the device.

    Args:
        batches: `accum_iter` batches (`loader.Batch`, normalised crops on the device), taken one by one. Gradients, losses
            and centres are those of one large batch of them all; batch norm in the head has each batch's own statistics.
        ema: `utils.ema_pairs(student, teacher)`.

    Returns:
        {"loss", "cls", "patch", "acc"}, 0-d tensors; labels [B] of all batches; the teacher's clusters [B], the largest
        output for the first global crop. `acc`: how often the student puts the second crop into the same.
    """
    # schedules; only the first group is decayed
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    optimizer.param_groups[0]["weight_decay"] = float(weight_decay)

    optimizer.zero_grad()
    rows, labels, clusters = [], [], []
    for i, batch in enumerate(batches):
        # forward: teacher on plain global crops, student on the same crops masked and on plain local crops
        G, B = batch.global_crops.shape[:2]
        global_crops, masks = batch.global_crops.flatten(0, 1), batch.masks.flatten(0, 1)  # [G*B, 3, S, S], [G*B, h, w]
        local_crops = None if batch.local_crops is None else batch.local_crops.flatten(0, 1)  # [L*B, 3, s, s]
        patch_loss = ibot_loss.lambda2 > 0  # without it no patch goes through the last layer
        index = batch.mask_index if patch_loss else batch.mask_index[:0]
        weight = batch.mask_weight if patch_loss else batch.mask_weight[:0]
        last = i + 1 == accum_iter
        with student.no_sync() if utils.get_world_size() > 1 and not last else nullcontext():
            with torch.autocast(global_crops.device.type, amp_dtype, enabled=amp_dtype is not None):
                with torch.no_grad():
                    teacher_cls, teacher_patch, teacher_mean = teacher(
                        global_crops, index, patch_mean=patch_loss and ibot_loss.patch_centering)
                student_cls, student_patch, _ = student(global_crops, index, masks=masks, local_crops=local_crops)
            losses = ibot_loss(student_cls, student_patch, teacher_cls, teacher_patch, teacher_mean, weight, G, epoch)

            # backward
            loss = losses["loss"] / accum_iter
            (loss if scaler is None else scaler.scale(loss)).backward()

        clusters.append(teacher_cls[:B].argmax(dim=-1))
        labels.append(batch.labels)
        agree = (clusters[-1] == student_cls[B:2 * B].argmax(dim=-1)).float().mean()
        rows.append(torch.stack([*(value.detach() for value in losses.values()), agree]))
    ibot_loss.update_centers()

    # clip each parameter by itself, hold the last layer, step
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if clip_grad:
        utils.clip_gradients(parameters, clip_grad)
    if freeze_last_layer:
        for name, p in student.named_parameters():
            if "last_layer" in name:
                p.grad = None
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()

    # the teacher follows
    utils.ema_update(*ema, momentum=float(momentum))
    means = torch.stack(rows).mean(dim=0).unbind()
    return dict(zip((*losses, "acc"), means, strict=True)), torch.cat(labels), torch.cat(clusters)


# ---------------------------------------------------------------- files

def run_files(output_dir):
    """What a run writes into its folder, as far as it is there."""
    found = [path for path in (output_dir / name for name in (CHECKPOINT, "log.txt", "tf_logs")) if path.exists()]
    return found + sorted(output_dir.glob("checkpoint[0-9]*.pth"))


def start_output(output_dir, keep):
    """Make the folder; unless `keep`, remove what an earlier run left in it (see `check_args`)."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.InputError(f"--output_dir {output_dir}: {error.strerror}") from error
    for path in [] if keep else run_files(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save(output_dir, epoch, args, student, teacher, optimizer, ibot_loss, scaler):
    """Write `checkpoint.pth` after `epoch`, and `checkpointNNNN.pth` every `--saveckp_freq` epochs.

    Names are the reference's: its student was always wrapped for data parallelism (`module.`), its teacher only when the
    head holds batch norms.
    """
    def wrapped(network):
        return {f"module.{name}": value for name, value in network.state_dict().items()}

    state = {
        "student": wrapped(student),
        "teacher": wrapped(teacher) if teacher.head.has_batch_norm else teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch + 1,
        "args": args,
        "ibot_loss": ibot_loss.state_dict(),
    }
    if scaler is not None:
        state["fp16_scaler"] = scaler.state_dict()
    utils.save_atomically(state, output_dir / CHECKPOINT)
    if args.saveckp_freq and epoch and epoch % args.saveckp_freq == 0:
        utils.save_atomically(state, output_dir / f"checkpoint{epoch:04}.pth")


def restore(path, student, teacher, optimizer, ibot_loss, scaler):
    """Load all of a checkpoint, of this project or of the reference; returns the epoch to run next."""
    checkpoint = utils.load_pretraining(path)
    for key, network in (("student", student), ("teacher", teacher)):
        utils.load_strictly(network, utils.network_state_dict(checkpoint, key, path), path)
    utils.load_strictly(ibot_loss, checkpoint["ibot_loss"], path)
    utils.load_optimizer(optimizer, checkpoint["optimizer"], path)
    if scaler is not None and "fp16_scaler" in checkpoint:
        utils.load_scaler(scaler, checkpoint["fp16_scaler"], path)
    return checkpoint["epoch"]


def skipped_images(dataset, device):
    """Paths of the unreadable images that any process has met so far."""
    if utils.get_world_size() > 1:
        bad = dataset.bad.to(device)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        dataset.bad.copy_(bad)
    return dataset.bad_files()


def main():
    parser = argparse.ArgumentParser("main_ibot.py", parents=[get_args_parser()], allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    train_ibot(parser.parse_args())


if __name__ == "__main__":
    utils.run(main)
