"""Pre-train a vision transformer with iBOT (Zhou et al., ICLR 2022) on a folder of images.

    python main_ibot.py --arch vit_small --data_path data/imagenet/train --output_dir work_dirs/small     # one GPU or CPU
    torchrun --nproc_per_node=8 main_ibot.py --arch vit_small --data_path ... --output_dir ...            # one node, 8 GPUs
    python main_ibot.py --device cpu --arch vit_nano --data_path ... --batch_size_per_gpu 32 ...          # anywhere

The student sees masked global crops and plain local crops; the teacher, its moving average, sees the unmasked global
crops. Section numbers are the paper's (arXiv 2111.07832). What surrounds a step (files, signals, logs) is `engine.Run`'s.

Letters in shape comments: B images of a batch, G global crops, L local crops, N patch tokens of a global crop,
M masked patches of the batch, K outputs of the head, W processes.
"""
import argparse
import math
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import augmentation
import collapse
import engine
import loader
import models
import patch_tokenizers
import pictures
import recipes
import utils
import variants
from models import pretrained

METERS = ("loss", "cls", "patch", "acc", "grad_norm")
FILES = engine.Files(best="checkpoint_best.pth", others=(pictures.CROPS,))
# What a checkpoint holds beside engine.PROGRESS: labels and clusters of the epoch, images of the folder, random states.
PROGRESS = {"labels": torch.zeros(0, dtype=torch.int64), "clusters": torch.zeros(0, dtype=torch.int64), "folder": 0,
            "random": []}


def get_args_parser():
    """All flags with the reference's names and defaults; use it with `parents=[get_args_parser()]`.

    --recipe has its effect by `recipes.expand`, of the words that are then parsed.
    """
    parser = argparse.ArgumentParser("iBOT", add_help=False, allow_abbrev=False)
    flag = engine.bool_flag

    network = parser.add_argument_group("network")
    network.add_argument("--arch", default="vit_small", choices=models.ARCHS)
    network.add_argument("--patch_size", default=16, type=int, help="side of a ViT's patch in pixels (Swin: always 4)")
    network.add_argument("--window_size", default=7, type=int, help="Swin's window, 7 or 14 in the paper")
    network.add_argument("--registers", default=0, type=int, help="learned tokens of a ViT beside [CLS]; 4 in DINOv2")
    network.add_argument("--drop_path", type=float, help="stochastic depth of the student; default 0.1, Swin-S, -B, -L 0.2")
    network.add_argument("--out_dim", default=8192, type=int, help="K of the [CLS] output")
    network.add_argument("--patch_out_dim", default=8192, type=int, help="K of the patch output where heads are separate")
    network.add_argument("--shared_head", default=False, type=flag, help="one last layer for both losses (recipes: true)")
    network.add_argument("--shared_head_teacher", default=True, type=flag, help="the same for the teacher")
    network.add_argument("--norm_last_layer", default=True, type=flag, help="keep the last layer's weight_g at 1 (student)")
    network.add_argument("--norm_in_head", default=None, choices=(None, *models.NORMS), help="norm inside the head's MLP",
                         type=lambda text: None if text.lower() == "none" else text)
    network.add_argument("--act_in_head", default="gelu", choices=tuple(models.ACTIVATIONS))
    network.add_argument("--head_hidden_dim", default=2048, type=int, help="width of its hidden layers; less for tiny ViTs")

    pretrained.add_flags(parser.add_argument_group("start from weights (docs/your_images.md)"))
    masks = parser.add_argument_group("masks (Section 3.1)")
    masks.add_argument("--use_masked_im_modeling", default=True, type=flag, help="mask the student's global crops")
    masks.add_argument("--pred_ratio", default=[0.3], type=float, nargs="+", help="share to mask; of several one is drawn")
    masks.add_argument("--pred_ratio_var", default=[0.0], type=float, nargs="+", help="half-width of the draw around each")
    masks.add_argument("--pred_shape", default="block", choices=("block", "rand"))
    masks.add_argument("--pred_start_epoch", default=0, type=int, help="nothing is masked before this epoch (50 for Swin)")
    variants.add_mask_flags(masks)

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
    variants.add_flags(loss)
    patch_tokenizers.add_flags(loss)

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", default=100, type=int)
    optim.add_argument("--batch_size_per_gpu", default=128, type=int, help="images per process that are computed at once")
    optim.add_argument("--accum_iter", default=1, type=int, help="batches to add up: the same update as one large batch")
    optim.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd", "lars"))
    optim.add_argument("--lr", default=0.0005, type=float, help="peak rate for a total batch of 256, scaled linearly")
    optim.add_argument("--warmup_epochs", default=10, type=int, help="epochs of linear warm-up of the rate")
    optim.add_argument("--min_lr", default=1e-6, type=float)
    optim.add_argument("--layer_decay", default=1.0, type=float, help="factor of the rate from each block to the one below")
    optim.add_argument("--patch_embed_lr", default=1.0, type=float, help="another factor, of the patch embedding's rate")
    optim.add_argument("--weight_decay", default=0.04, type=float)
    optim.add_argument("--weight_decay_end", default=0.4, type=float)
    optim.add_argument("--clip_grad", default=3.0, type=float, help="largest norm of each tensor's gradient; 0: any")
    optim.add_argument("--freeze_last_layer", default=1, type=int, help="epochs without updates of the last layer")
    optim.add_argument("--momentum_teacher", default=0.996, type=float, help="EMA momentum at the start; rises to 1")
    optim.add_argument("--residual_dtype", default="float32", choices=("float32", "amp"),
                       help="amp: tokens between blocks in half precision too, as --amp_dtype says; LayerNorm in float32")
    engine.add_precision_flags(optim)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", help="folder of images, flat or nested; a list of them (.txt); tar shards; or several "
                      "of these", **engine.SEVERAL)
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
    engine.add_bad_image_flags(data)
    augmentation.add_augment_flags(parser.add_argument_group("augmentation (docs/augmentation.md)"))

    run = parser.add_argument_group("run")
    run.add_argument("--recipe", choices=recipes.RECIPES, metavar="NAME",
                     help="the paper's run of that name: its flags, where others are not given; list: print all")
    run.add_argument("--output_dir", default=".", type=str)
    engine.add_run_flags(run)
    engine.add_device_flags(run)
    run.add_argument("--eval_every", default=0, type=int, help="judge the teacher every so many epochs; 0: never")
    run.add_argument("--eval_data", help="... on these images; a folder with train/ and val/ also by k-NN")
    run.add_argument("--saveckp_freq", default=40, type=int, help="keep checkpointNNNN.pth every so many epochs; 0: never")
    engine.add_compile_flags(run, tuple(models.RECOMPUTE))
    return parser


def check_args(args):
    """Raise `engine.InputError` for values that cannot be trained with, before anything is touched."""
    need = engine.need
    need(args.data_path, "--data_path is missing: the folder of images to train on")
    engine.check_numbers(
        args, count="epochs batch_size_per_gpu out_dim patch_out_dim head_hidden_dim patch_size window_size print_freq "
                    "accum_iter global_crops_number global_crops_size local_crops_size",
        not_negative="local_crops_number warmup_epochs warmup_teacher_temp_epochs pred_start_epoch freeze_last_layer "
                     "freeze_backbone_epochs saveckp_freq save_every_steps save_every_minutes max_bad_images clip_grad "
                     "koleo lambda1 lambda2 lr min_lr patch_embed_lr registers seed num_workers eval_every",
        positive="warmup_teacher_temp teacher_temp warmup_teacher_patch_temp teacher_patch_temp layer_decay",
        share="layer_decay momentum_teacher center_momentum patch_center_momentum", below_1="drop_path")
    augmentation.check_augment_flags(args)
    need(not args.lambda1 or args.global_crops_number > 1 or args.local_crops_number,
         "the [CLS] loss needs two crops: raise --global_crops_number or --local_crops_number")
    need(args.eval_every or not args.eval_data, "--eval_data is read every --eval_every epochs: give that too")
    variants.check(args)
    patch_tokenizers.check(args)
    need(args.lambda1 + args.lambda2 > 0, "--lambda1 and --lambda2 are both 0: there is no loss")

    models.check_sizes(args.arch, args.patch_size, args.global_crops_size,
                       args.local_crops_size if args.local_crops_number else 0)
    need(not args.registers or not args.arch.startswith("swin"), f"--registers {args.registers}: for a ViT, not for a Swin")
    loader.check_ratios(args.pred_ratio, args.pred_ratio_var)

    folder = Path(args.output_dir)
    need(not (args.load_from and args.overwrite), "--load_from resumes and --overwrite true starts over: give one of them")
    engine.check_output(folder, args.load_from, args.overwrite, FILES.held(folder))


# ---------------------------------------------------------------- the loss

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
    return pairs.sum() / (pairs.numel() * max(len(s) - 1, 1))  # a single crop has no pair: 0


def patch_cross_entropy(student, teacher, weight, center, student_temp, teacher_temp, hard=False):
    """Sum of weight * H(teacher patch, student patch), Equation 1: logits [M, K'], weights [M]. In float32 at least.

    hard: the teacher's arg-max as the target. Instead of the teacher's logits, int64 [M] are a tokenizer's tokens.
    """
    s = models.at_least_float32(student) / student_temp
    if teacher.ndim == 1:
        return ((s.logsumexp(dim=-1) - s.gather(1, teacher.unsqueeze(1)).squeeze(1)) * weight).sum()
    t = (models.at_least_float32(teacher) - center) / teacher_temp
    target = s.gather(1, t.argmax(dim=-1, keepdim=True)).squeeze(1) if hard else (t.softmax(dim=-1) * s).sum(dim=-1)
    return ((s.logsumexp(dim=-1) - target) * weight).sum()


class iBOTLoss(nn.Module):  # noqa: N801 - the reference's name
    """Cross-entropy of [CLS] tokens across views and of masked patches within a view (Equations 1 and 2), with centres.

    Args:
        out_dim, patch_out_dim: K of the two outputs.
        teacher_temps, teacher_patch_temps: teacher temperature of every epoch.
        center_momentum, patch_center_momentum: share that the centres keep at each step.
        lambda1, lambda2: weights of the [CLS] and the patch term.
        patch_centering: whether the patch centre moves from 0. patch_targets: "soft", or "hard" for the teacher's arg-max.
    Attributes to set: sinkhorn, for centres of each batch by itself; koleo, the weight of that regulariser; match, what
        finds a patch's target where it is not the same patch (`variants`). `use_tokens`: a tokenizer gives the targets.
    """

    def __init__(self, out_dim, patch_out_dim, teacher_temps, teacher_patch_temps, center_momentum=0.9,
                 patch_center_momentum=0.9, lambda1=1.0, lambda2=1.0, patch_centering=True, patch_targets="soft"):
        super().__init__()
        self.teacher_temps, self.teacher_patch_temps = teacher_temps, teacher_patch_temps
        self.student_temp = self.student_patch_temp = 0.1
        self.center_momentum, self.patch_center_momentum = center_momentum, patch_center_momentum
        self.sinkhorn, self.koleo, self.match, self.teacher_logits = False, 0.0, None, None
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.patch_centering, self.patch_targets = patch_centering, patch_targets
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self.register_buffer("tokens_seen", None)
        self.teacher_means = []  # of the batches since the centres last moved
        self.cls_cross_entropy, self.patch_cross_entropy = cls_cross_entropy, utils.in_pieces(patch_cross_entropy)

    def use_tokens(self, tokens):
        """The patch targets are so many tokens; `tokens_seen` notes which of them an epoch has had."""
        self.tokens_seen = torch.zeros(tokens, dtype=torch.bool, device=self.center.device)
        self.student_patch_temp, self.patch_centering = 1.0, False

    def compile(self):
        """Compile the two cross-entropies; no copy of the logits then reaches memory (`match` has few at a time)."""
        self.cls_cross_entropy = torch.compile(cls_cross_entropy)
        if not self.match:
            self.patch_cross_entropy = torch.compile(patch_cross_entropy)

    def forward(self, student_cls, student_patch, teacher_cls, teacher_patch, teacher_patch_mean, mask_weight,
                global_crops_number, epoch):
        """The losses of a batch; its teacher outputs are noted for `update_centers`.

        Args:
            student_cls: [(G+L)*B, K], global crops first, crop by crop. teacher_cls: [G*B, K].
            student_patch, teacher_patch: [M, K'] logits of the masked patches.
            teacher_patch_mean: [K'], mean teacher logits over all G*B*N patches, or None to leave that centre alone. With
                a tokenizer `teacher_patch` is int64 [M] and this the share of each token.
            mask_weight: [M], 1 / (G * B * masked patches in the same crop).

        Returns:
            {"loss", "cls", "patch"}, 0-d tensors; loss = lambda1 cls + lambda2 patch.
        """
        B = len(teacher_cls) // global_crops_number
        # As tensors: compiled code takes a new number for a new program.
        temp, patch_temp = (torch.tensor(temps[epoch]) for temps in (self.teacher_temps, self.teacher_patch_temps))
        if self.sinkhorn:
            variants.move_to_sinkhorn(self.center, teacher_cls, temp)
            if self.patch_centering:
                variants.move_to_sinkhorn(self.center2, teacher_patch, patch_temp, mask_weight > 0)  # 0: padding
        cls_loss = self.cls_cross_entropy(student_cls.unflatten(0, (-1, B)), teacher_cls.unflatten(0, (-1, B)), self.center,
                                          self.student_temp, temp)
        patch_loss = self.patch_cross_entropy(student_patch, teacher_patch, mask_weight, self.center2[0],
                                              self.student_patch_temp, patch_temp, hard=self.patch_targets == "hard")
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
        patches = patch_means[0] is not None and (self.patch_centering or self.tokens_seen is not None)
        means = [torch.where(finite, 0.0, math.nan).view(1), torch.stack(cls_means).mean(dim=0)]
        if patches:
            means.append(torch.stack(patch_means).mean(dim=0))
        means = engine.all_reduce_mean(torch.cat(means))
        finite, means = means.isfinite().all(), means[1:]
        K = self.center.shape[-1]
        moved = self.center if self.sinkhorn else self.center.lerp(means[None, :K], 1 - self.center_momentum)
        self.center.copy_(torch.where(finite, moved, self.center))
        if self.tokens_seen is not None:
            self.tokens_seen |= means[K:] > 0
        elif patches:
            moved = self.center2.lerp(means[None, None, K:], 1 - self.patch_center_momentum)
            self.center2.copy_(torch.where(finite, moved, self.center2))
        return finite


# ---------------------------------------------------------------- training

def build_networks(args, tokens=None):
    """(student, teacher): the teacher has no mask embedding, takes no gradient and starts from the student's weights.

    tokens: how many a tokenizer has; the student then predicts these instead of the teacher's patches.
    """
    drop_path = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    if args.drop_path is None and not args.arch.startswith("swin"):
        drop_path = {"drop_path_rate": 0.1}
    # Positions are those of 224-pixel images whatever the crop size, as in the reference: crops of other sizes sample them.
    shape = {"patch_size": args.patch_size, "window_size": args.window_size, "registers": args.registers}
    head = {"patch_out_dim": args.patch_out_dim, "norm": args.norm_in_head, "act": args.act_in_head,
            "hidden_dim": args.head_hidden_dim}
    student_head, teacher_head = (variants.HEADS[sharing] for sharing in variants.head_sharing(args))

    backbone = models.build_backbone(args.arch, masked_im_modeling=args.use_masked_im_modeling, **shape, **drop_path)
    student = models.MultiCropWrapper(backbone, models.iBOTHead(
        backbone.embed_dim, args.out_dim, norm_last_layer=args.norm_last_layer, **student_head, **head))
    if tokens:
        student.head.add_token_layer(tokens)
    backbone = models.build_backbone(args.arch, drop_path_rate=0.0, **shape)
    teacher = models.MultiCropWrapper(backbone, models.iBOTHead(
        backbone.embed_dim, args.out_dim, **teacher_head, **head)).requires_grad_(False)
    utils.ema_update(*utils.ema_pairs(student, teacher), momentum=0.0)
    return student, teacher


def flops_per_image(args):
    """`models.flops_per_step` for an image of the flags' crops and masks; no memory is taken."""
    with torch.device("meta"):
        networks = build_networks(args)
    cells, B = args.global_crops_size // models.mask_cell(args.arch, args.patch_size), args.batch_size_per_gpu
    masked = float(np.mean(args.pred_ratio)) * bool(args.lambda2)
    local_crops = args.local_crops_number * bool(args.lambda1)
    patch_mean = args.lambda2 > 0 and args.patch_centering and args.centering == "mean"
    return models.flops_per_step(*networks, (args.global_crops_number * B, args.global_crops_size), cells, masked,
                                 (local_crops * B, args.local_crops_size), patch_mean) / B


def seconds_per_image(args, device, amp_dtype):
    """What the device needs at least for an image; None where its speed is not known or the step is not iBOT's own."""
    peak = engine.peak_flops(device, amp_dtype)
    return flops_per_image(args) / peak if peak and variants.is_plain(args) else None


def build_loss(args, patch_out_dim, schedules):
    """The `iBOTLoss` of the flags; patch_out_dim: K of the head's patch output."""
    return iBOTLoss(
        args.out_dim, patch_out_dim, schedules["temp"], schedules["patch_temp"], center_momentum=args.center_momentum,
        patch_center_momentum=args.patch_center_momentum, lambda1=args.lambda1, lambda2=args.lambda2,
        patch_centering=args.patch_centering, patch_targets=args.patch_targets)


def build_schedules(args, steps_per_epoch, total_batch):
    """{"lr", "wd", "momentum"} of every step and {"temp", "patch_temp"} of every epoch; lines about what to watch."""
    notes = []
    warmup = utils.shortened("warmup_epochs", args.warmup_epochs, args.epochs, notes)
    temp_warmup = utils.shortened("warmup_teacher_temp_epochs", args.warmup_teacher_temp_epochs, args.epochs, notes)
    patch_temp_warmup = min(temp_warmup, max(args.epochs - args.pred_start_epoch, 0))
    if patch_temp_warmup < temp_warmup:
        notes.append(f"warning: the patch temperature's warm-up after --pred_start_epoch {args.pred_start_epoch} does not "
                     f"fit into {args.epochs} epochs; shortened to {patch_temp_warmup}")
    if args.arch.startswith("swin") and args.use_masked_im_modeling and any(args.pred_ratio) and not args.pred_start_epoch:
        notes.append("note: a Swin masked from the first epoch on: watch its gradient norms (step/grad_norm); the recipe "
                     "begins with --pred_start_epoch 50")
    peak = args.lr * total_batch / 256
    return {
        "lr": utils.cosine_scheduler(peak, args.min_lr, args.epochs, steps_per_epoch, warmup),
        "wd": utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps_per_epoch),
        "momentum": utils.cosine_scheduler(args.momentum_teacher, 1.0, args.epochs, steps_per_epoch),
        "temp": utils.temperature_schedule(args.warmup_teacher_temp, args.teacher_temp, temp_warmup, args.epochs),
        "patch_temp": utils.temperature_schedule(args.warmup_teacher_patch_temp, args.teacher_patch_temp, patch_temp_warmup,
                                                 args.epochs, args.pred_start_epoch),
    }, notes


class Training(NamedTuple):
    """What an update changes, and the type of mixed precision (None: float32)."""
    student: nn.Module  # for several processes wrapped
    teacher: nn.Module
    ema: tuple  # utils.ema_pairs(student, teacher)
    ibot_loss: iBOTLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    amp_dtype: torch.dtype | None = None
    freeze_backbone_epochs: int = 0


def build_data(args, process, photometry, pad_masks, tokenizer=None):
    """The DataLoader of `loader.Batch`es, of which each process has its share. photometry: "device" or "cpu"."""
    dataset = loader.ImageFolderMask(
        args.data_path,
        transform=loader.MultiCropAugmentation(
            args.global_crops_number, args.global_crops_scale,
            # local crops enter the [CLS] loss only, unless they are masked
            args.local_crops_number if args.lambda1 or args.mask_crops == "all" else 0,
            args.local_crops_scale, args.global_crops_size, args.local_crops_size, photometry,
            augmentation.augment_of(args)),
        patch_size=models.mask_cell(args.arch, args.patch_size), pred_ratio=args.pred_ratio,
        pred_ratio_var=args.pred_ratio_var, pred_shape=args.pred_shape, pred_start_epoch=args.pred_start_epoch,
        seed=args.seed, on_bad_image=args.on_bad_image)
    variants.choose_cells(dataset, args, tokenizer)
    return loader.data_loader(dataset, args.batch_size_per_gpu, args.accum_iter, process, args.num_workers, pad_masks,
                              args.seed)


def train_ibot(args):
    """Pre-train as `args` (of `get_args_parser`) say; `args` is only read.

    Raises `engine.InputError`, FloatingPointError, and `engine.Preempted` when a signal came and the run is saved.
    """
    check_args(args)
    with engine.StopSignals() as signals:
        process = engine.init_process(args.device, args.dist_url)
        with engine.Run(args, process, signals, Path(args.output_dir), FILES, PROGRESS) as run:
            pretrain(args, run)


def pretrain(args, run):
    process, device = run.process, run.process.device
    utils.fix_random_seeds(args.seed)  # the same weights on all processes
    run.find({"student": dict, "teacher": dict, "optimizer": dict, "ibot_loss": dict}, "pre-training")
    compiled, recompute = models.choose_compilation(args.compile, args.recompute, args.grad_checkpointing, device)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    tokenizer = patch_tokenizers.of_run(args, run, amp_dtype)
    torch.backends.cudnn.benchmark = True  # crops have one size or two

    # ============ data ============
    on_device = device.type != "cpu" if args.augment_on == "auto" else args.augment_on == "device"
    data_loader = build_data(args, process, "device" if on_device else "cpu", 64 if compiled else 1, tokenizer)
    dataset, sampler, steps = data_loader.dataset, data_loader.sampler, len(data_loader) // args.accum_iter
    pixel_stats = augmentation.pixel_stats_of(args, run.path, run.checkpoint, dataset, device)
    args = run.args = augmentation.with_resolved(args, pixel_stats)
    total_batch = args.batch_size_per_gpu * process.world_size * args.accum_iter

    # ============ networks ============
    student, teacher = (network.to(device) for network in build_networks(args, tokenizer and tokenizer.tokens))
    judge = build_judge(args, run, data_loader, teacher.backbone, pixel_stats)
    for network in (student, teacher):
        network.backbone.residual_dtype = amp_dtype if args.residual_dtype == "amp" else None
        network.backbone.set_grad_checkpointing(recompute == "blocks")
        if compiled:
            network.compile_parts(recompute)
    ddp_student = engine.data_parallel(student, device, args.accum_iter) if process.world_size > 1 else student

    # ============ schedules, loss, optimizer ============
    schedules, notes = build_schedules(args, steps, total_batch)
    ibot_loss = build_loss(args, len(student.head.last_layer2.weight_v), schedules).to(device)
    variants.choose(ibot_loss, args, tokenizer, patch_cross_entropy, student, teacher, amp_dtype)
    if compiled:
        ibot_loss.compile()
    photometry = torch.compile(loader.apply_photometry, dynamic=False) if compiled else loader.apply_photometry
    groups = utils.get_params_groups(student, args.layer_decay, args.patch_embed_lr)
    optimizer = utils.build_optimizer(args.optimizer, groups, device)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    training = Training(ddp_student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer, scaler, amp_dtype,
                        args.freeze_backbone_epochs)

    # ============ start from weights, or resume ============
    if args.init_from and not run.path:
        notes += pretrained.start(args, student, teacher, pixel_stats)
    # Names in the file are the reference's: its student was always wrapped for data parallelism, its teacher only when the
    # head holds batch norms.
    parts = {"student": engine.Named(student, add="module."),
             "teacher": engine.Named(teacher, add="module." if teacher.head.has_batch_norm else ""),
             "optimizer": optimizer, "ibot_loss": ibot_loss, "fp16_scaler": scaler}
    notes += run.changes({"saveckp_freq", "eval_every"}) + run.resume(parts, total_batch, steps, images=len(dataset))
    run.start(dataset)
    run.schedules = {"lr": schedules["lr"], "wd": schedules["wd"]}
    run.seconds_per_image = seconds_per_image(args, device, amp_dtype)
    if run.is_main:
        introduce(args, run, data_loader, [
            f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; "
            f"precision: {amp_dtype or torch.float32}; compiled: {compiled}; recomputed: {recompute}; "
            f"colours changed on: {'device' if on_device else 'cpu'}; {data_loader.num_workers} loader processes",
            f"crops of the first batch: {run.folder / pictures.CROPS}; pixels normalised with {pixel_stats}",
            f"total batch: {total_batch}; "
            f"peak learning rate: {schedules['lr'].max():.6g} (--lr {args.lr:g} x {total_batch} / 256)",
            *dataset.notes, *recipes.notes(args, total_batch), *notes, run.where()])

    # ============ training ============
    start_time, seen = time.time(), {}
    for epoch in range(run.epoch, args.epochs):
        sampler.set_epoch(epoch, start=run.step * args.accum_iter * args.batch_size_per_gpu)
        dataset.set_epoch(epoch)
        # Drop path differs by process; by epoch too, so that a resumed epoch draws what it would have drawn.
        utils.fix_random_seeds(utils.seed_of(args.seed, epoch, process.rank, *[run.step] * (run.step > 0)))
        run.draw_on()
        batches = loader.device_batches(data_loader, device, photometry, pixel_stats, amp_dtype or torch.float32,
                                        getattr(tokenizer, "of_crops", None))
        stats = train_one_epoch(run, batches, training, schedules, epoch, args)
        figures, names = judge(teacher.backbone) if judge and judge.is_due(epoch) else ({}, [])
        run.end_epoch({f"train_{name}": value for name, value in stats.items()} | figures, stats | figures)
        seen = collapse.say(stats, args.out_dim, ibot_loss.center2.shape[-1], schedules["temp"][epoch], seen)
        keep = args.saveckp_freq and epoch and epoch % args.saveckp_freq == 0  # the reference counts its files so
        run.next_epoch(names + [f"checkpoint{epoch:04}.pth"] * bool(keep))
    if run.is_main:
        print(f"training time {engine.eta_string(time.time() - start_time)}; checkpoint: {run.folder / engine.CHECKPOINT}")


def build_judge(args, run, data_loader, backbone, pixel_stats):
    """What looks at the teacher after every `--eval_every`th epoch, or None."""
    if not args.eval_every:
        return None
    from quality import Judge  # of the evaluations, which others need not wait for
    return Judge(args, run, data_loader, backbone, pixel_stats)


def introduce(args, run, data_loader, lines):
    """Draw the crops of the first images and print what is run."""
    dataset, classes = data_loader.dataset, len(data_loader.dataset.classes)
    if not run.path:
        pictures.write_crops(dataset, islice(data_loader.sampler, 6), args.use_masked_im_modeling, run.folder)
    print(engine.describe_run(args, run.process))
    print(f"data: {len(dataset)} images of {classes} class{'es' * (classes > 1)}, {run.steps} steps an epoch")
    print("\n".join(lines), flush=True)


def train_one_epoch(run, batches, training, schedules, epoch, args):
    """The updates that are left of an epoch. Returns its means by name (on process 0 also clustering scores)."""
    tokens_seen = training.ibot_loss.tokens_seen
    if tokens_seen is not None and not run.step:
        tokens_seen.zero_()
    names = collapse.names_of(training.ibot_loss)
    signs = engine.DeviceMeters(names)
    for it in run.updates():
        step, watch = run.update, run.is_log_step(it)
        means, watched, labels, clusters = train_step(
            (run.fetch(batches) for _ in range(args.accum_iter)), training, epoch, schedules["lr"][step],
            schedules["wd"][step], schedules["momentum"][step], args.clip_grad,
            freeze_last_layer=epoch < args.freeze_last_layer, accum_iter=args.accum_iter, watch=watch)
        run.add(means, labels=labels, clusters=clusters)
        if watch:
            run.log(METERS[:4])
            signs.add(*(watched[name] for name in names))
            run.add_rows(collapse.finished(signs.read()))
    stats = run.means()
    if tokens_seen is not None:
        stats["tokens_used"] = tokens_seen.float().mean().item()
    labels, clusters = (run.gathered(name).numpy() for name in ("labels", "clusters"))
    if run.is_main:
        stats |= utils.clustering_scores(labels, clusters)
        stats["cls_used"] = len(np.unique(clusters)) / args.out_dim
    return stats


def train_step(batches, training, epoch, lr, weight_decay, momentum, clip_grad, freeze_last_layer, accum_iter=1,
               watch=False):
    """One update of student, teacher and centres, without waiting for the device.

    If a loss, a gradient or the teacher's outputs are not finite on any process, student, optimiser and centres stay.

    Args:
        batches: `accum_iter` batches (`loader.Batch`, normalised crops on the device), taken one by one. Gradients, losses
            and centres are those of one large batch of them all; batch norm in the head has each batch's own statistics.
        training: a `Training`. watch: also compute `collapse.signs` of the last batch.

    Returns:
        {"loss", "cls", "patch", "acc", "grad_norm"}, 0-d tensors; the signs (empty unless `watch`); labels [B] of all
        batches; the teacher's clusters [B], the largest output for the first global crop. `acc`: how often the student puts
        the second crop into the same; `grad_norm`: before clipping.
    """
    student, teacher, ema, ibot_loss, optimizer, scaler, amp_dtype, freeze_backbone_epochs = training
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
        group["weight_decay"] = float(weight_decay) * group["decayed"]

    optimizer.zero_grad()
    rows, labels, clusters, signs = [], [], [], {}
    for i, batch in enumerate(batches):
        # forward: teacher on plain global crops, student on the same crops masked and on plain local crops
        G, B = batch.global_crops.shape[:2]
        global_crops, masks = batch.global_crops.flatten(0, 1), batch.masks.flatten(0, 1)  # [G*B, 3, S, S], [G*B, h, w]
        local_crops = None if batch.local_crops is None else batch.local_crops.flatten(0, 1)  # [L*B, 3, s, s]
        patch_loss = ibot_loss.lambda2 > 0  # without it no patch goes through the last layer
        index, weight = (x if patch_loss else x[:0] for x in (batch.mask_index, batch.mask_weight))
        local_masks = None if batch.local_masks is None else batch.local_masks.flatten(0, 1)
        match, last = ibot_loss.match is not None, i + 1 == accum_iter
        with student.no_sync() if engine.get_world_size() > 1 and not last else nullcontext():
            with torch.autocast(global_crops.device.type, amp_dtype, enabled=amp_dtype is not None):
                with torch.no_grad():
                    teacher_outputs = variants.needs_teacher(ibot_loss) and teacher(
                        global_crops, variants.teacher_cells(index, batch, ibot_loss),
                        local_crops=None if local_masks is None else local_crops,  # if masked, they have targets too
                        patch_mean=patch_loss and ibot_loss.patch_centering and not ibot_loss.sinkhorn, bottlenecks=match)
                student_outputs = student(global_crops, index, masks=masks, local_crops=local_crops,
                                          local_masks=local_masks, bottlenecks=match)
            student_cls, student_patch, _, features = student_outputs
            teacher_cls, teacher_patch, teacher_mean = variants.targets(
                teacher_outputs, student_outputs, batch, weight, ibot_loss)
            losses = ibot_loss(student_cls, student_patch, teacher_cls, teacher_patch, teacher_mean, weight, G, epoch)
            if ibot_loss.koleo:
                losses["loss"] = losses["loss"] + ibot_loss.koleo * sum(map(variants.koleo, features[:G * B].split(B)))

            clusters.append(teacher_cls[:B].argmax(dim=-1))
            labels.append(batch.labels)
            agree = (clusters[-1] == student_cls[B * (len(student_cls) > B):][:B].argmax(dim=-1)).float().mean()
            rows.append(torch.stack([*(value.detach() for value in losses.values()), agree]))
            if watch and last:
                signs = collapse.signs(ibot_loss, teacher_cls, teacher_patch, weight, losses, epoch, student_patch)

            # backward; what it does not read makes room
            del batch, global_crops, local_crops, teacher_cls, teacher_patch, student_cls, student_patch, features, \
                teacher_outputs, student_outputs
            loss = losses["loss"] / accum_iter
            (loss if scaler is None else scaler.scale(loss)).backward()
    means = torch.stack(rows).mean(dim=0)

    # clip each parameter by itself, move the centres, hold what is frozen, step
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.stack(utils.clip_gradients(parameters, clip_grad)).norm()
    # A scaler looks at the gradients itself: while it seeks its scale they overflow, and nothing is wrong.
    finite = ibot_loss.update_centers((means.sum() + (grad_norm if scaler is None else 0)).isfinite())
    utils.drop_gradients(student, ["last_layer"] * freeze_last_layer + ["backbone."] * (epoch < freeze_backbone_epochs))
    if scaler is None:
        utils.step_if(finite, optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()

    # the teacher follows
    utils.ema_update(*ema, momentum=float(momentum))
    means = dict(zip(METERS, (*means, grad_norm), strict=True))
    return means, signs, torch.cat(labels), torch.cat(clusters)


def main():
    parser = argparse.ArgumentParser("main_ibot.py", parents=[get_args_parser()], allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    train_ibot(parser.parse_args(recipes.expand(sys.argv[1:])))


if __name__ == "__main__":
    engine.run(main)
