"""Fine-tuning a pre-trained backbone end to end: the one engine of all protocols, which differ in their flags' defaults.

Sections 7 to 9 of the protocols: ImageNet with layer-wise rates (iBOT, Tables 2, 3 and 11; the recipe of BEiT), transfer
(Table 7; the recipe of DeiT) and training on few labels (Tables 4 and 12).

Letters: B images per process and batch, C classes, D width of the backbone, L blocks, N patch tokens, W processes.
"""
import argparse
import copy
import hashlib
import math
import os
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import engine
import models
import utils
from evaluation.common.arguments import checkpoint_keys, evaluation_parser, int_from
from evaluation.common.augment import AugmentedSet, UpdateBatches, train_transform, val_transform
from evaluation.common.backbone import EvaluatedBackbone, read_weights
from evaluation.common.classifier import blocks_of, build_network, layer_table, parameter_groups
from evaluation.common.features import sharded_loader
from evaluation.common.protocol import read_sets, start_process
from evaluation.common.results import append_result, read_results, results_folder, shared_settings

RECORDED = ("epochs", "layer_decay", "finetune_head_layer", "init_scale", "drop", "attn_drop_rate", "lr_for_batch",
            "schedule", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "weight_decay_end", "decay_positions",
            "clip_grad", "aa", "color_jitter", "hflip", "train_interpolation", "reprob", "remode", "recount", "mixup",
            "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "smoothing", "repeated_aug",
            "crop_pct", "val_interpolation", "val_freq", "seed")  # flags that set results apart


@dataclass(frozen=True)
class Protocol:
    """`name` of its records in results.json; file of the best weights, with KEY for the checkpoint's key; whether an
    accuracy that equals the best so far counts as the best."""
    name: str
    best_file: str = "checkpoint-best.pth"
    later_wins: bool = False


# ---------------------------------------------------------------- flags

def finetune_parser(description):
    """All flags, with the defaults of fine-tuning on ImageNet; see `reference_flags.our_words` for other spellings."""
    parser = evaluation_parser(description, frozen=False)
    parser.set_defaults(output_dir=".", n_last_blocks=1)  # a constant, recorded beside the pooling
    switch = {"type": engine.bool_flag, "nargs": "?", "const": True}

    network = parser.add_argument_group("network")
    network.add_argument("--avgpool_patchtokens", type=int, choices=(0, 1), default=0,
                         help="what the head gets: 0, the [CLS] token; 1, the mean patch token through a norm of its own")
    network.add_argument("--finetune_head_layer", type=int, choices=(0, 1, 2, 3), default=0,
                         help="layers of the pre-trained projection head to keep below the classifier")
    network.add_argument("--init_scale", type=float, default=0.001, help="factor of the classifier's first weights")
    network.add_argument("--drop_path", type=float, help="of the last block, rising from 0 at the first; by default 0.1, "
                                                         "for Swin-S, -B and -L 0.2")
    network.add_argument("--drop", type=float, default=0.0, help="dropout behind attention and in the MLPs")
    network.add_argument("--attn_drop_rate", type=float, default=0.0, help="dropout of attention weights")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int_from(1), default=100)
    optim.add_argument("--lr", default="0.001", help="peak rate; of a comma list all are run in turn, in sub-folders, and "
                                                     "the best is reported")
    optim.add_argument("--lr_for_batch", type=int_from(0), default=0,
                       help="images of the total batch that --lr is meant for, scaled linearly; 0: it is taken as it is")
    optim.add_argument("--schedule", choices=("step", "epoch"), default="step",
                       help="step: linear from 0, then cosine, anew at each step (BEiT); epoch: linear from --warmup_lr, "
                            "then cosine, constant in an epoch and an epoch late (DeiT)")
    optim.add_argument("--warmup_epochs", type=int_from(0), default=20)
    optim.add_argument("--warmup_lr", type=float, default=1e-6, help="first rate of --schedule epoch")
    optim.add_argument("--min_lr", type=float, default=1e-6, help="last rate")
    optim.add_argument("--layer_decay", type=float, default=1.0,
                       help="factor of the rate from each block to the one below it; 1: all have the same rate")
    optim.add_argument("--weight_decay", type=float, default=0.05)
    optim.add_argument("--weight_decay_end", type=float, help="value at the end of a cosine; by default it stays")
    optim.add_argument("--decay_positions", default=False, help="decay position embedding and [CLS] token too", **switch)
    optim.add_argument("--clip_grad", type=float, default=0.0, help="largest norm of all gradients together; 0: any")
    optim.add_argument("--accum_iter", type=int_from(1), default=1, help="batches per process to add up for each update")
    optim.add_argument("--model_ema", default=False, help="also keep a moving average of the weights", **switch)
    optim.add_argument("--model_ema_decay", type=float, default=0.9999)
    optim.add_argument("--on_nonfinite", default="stop", choices=("stop", "skip"),
                       help="losses or gradients that are not finite: end the run, or go on without that update "
                            f"({engine.MAX_DROPPED} in a row end it too)")
    optim.add_argument("--use_fp16", default=True, help="mixed precision", **switch)
    optim.add_argument("--amp_dtype", default="auto", choices=("auto", "bfloat16", "float16"),
                       help="auto: bfloat16 where the hardware has it, else float16 with a gradient scaler on CUDA")

    augment = parser.add_argument_group("augmentation of training images")
    augment.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of a policy, or none",
                         type=lambda text: None if text.lower() == "none" else text)
    augment.add_argument("--color_jitter", type=float, default=0.4, help="only without --aa")
    augment.add_argument("--hflip", type=float, default=0.5, help="probability of a flip; 0 for digits and the like")
    augment.add_argument("--train_interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    augment.add_argument("--reprob", type=float, default=0.25, help="probability of random erasing")
    augment.add_argument("--remode", choices=("pixel", "rand", "const"), default="pixel")
    augment.add_argument("--recount", type=int_from(1), default=1, help="most boxes erased from an image")
    augment.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup; 0: off")
    augment.add_argument("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0: off")
    augment.add_argument("--cutmix_minmax", type=float, nargs=2, help="sides of the box as shares; replaces --cutmix")
    augment.add_argument("--mixup_prob", type=float, default=1.0, help="of mixing at all")
    augment.add_argument("--mixup_switch_prob", type=float, default=0.5, help="of CutMix where both are on")
    augment.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch")
    augment.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    augment.add_argument("--repeated_aug", default=False, help="each image three times in an epoch of a third of them",
                         **switch)
    augment.add_argument("--on_bad_image", default="skip", choices=("error", "skip"),
                         help="skip: another image takes the place of a training image that cannot be read")
    augment.add_argument("--max_bad_images", default=0.01, type=float,
                         help="end the run when more images cannot be read: a share of all below 1, else a number")

    validation = parser.add_argument_group("validation")
    validation.add_argument("--crop_pct", type=float, help="share of the resized image's side that is looked at; by "
                                                           "default 224/256, from 384 pixels on (and up to 32) 1")
    validation.add_argument("--val_interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    validation.add_argument("--val_freq", type=int_from(1), default=1, help="epochs between validations; the last has one")
    validation.add_argument("--eval", default=False, help="only validate the best weights, or those of --load_from",
                            **switch)

    files = parser.add_argument_group("files")
    files.add_argument("--load_from", help=f"resume from this file of the output folder, e.g. {engine.CHECKPOINT}; auto: "
                                           "from the newest good one, or a fresh start where there is none")
    files.add_argument("--overwrite", default=False, **switch,
                       help="start over in a folder that holds a run; with --load_from auto only if that was another one")
    files.add_argument("--save_ckpt_freq", type=float, default=0,
                       help="also keep checkpoint-EPOCH.pth every so many percent of the epochs; 0: never")
    files.add_argument("--save_every_steps", type=int_from(0), default=0,
                       help=f"also save {engine.CHECKPOINT} every so many updates; 0: never")
    files.add_argument("--save_every_minutes", type=float, default=0.0, help="the same by the clock")
    files.add_argument("--on_save_error", default="continue", choices=("continue", "stop"),
                       help="when a checkpoint cannot be written, e.g. on a full disk; the one before it stays")
    files.add_argument("--print_freq", type=int_from(1), default=10, help="steps between log lines")
    files.add_argument("--seed", type=int_from(0), default=0)

    old = parser.add_argument_group("for command lines of the reference")
    old.add_argument("--enable_deepspeed", action="store_true",
                     help="ignored: batches add up by --accum_iter, and bfloat16 needs no loss scale")
    old.add_argument("--log_dir", help="ignored: TensorBoard's events go to tf_logs/ in the output folder")
    old.add_argument("--nb_classes", type=int_from(0), default=0, help="number of classes that there must be; 0: any")
    old.add_argument("--out_dim", type=int_from(1),
                     help="outputs that the projection head must have with --finetune_head_layer 3")
    return parser


def transfer_parser(description):
    """The flags with the defaults of transfer and of few labels (DeiT's recipe)."""
    parser = finetune_parser(description)
    parser.set_defaults(epochs=300, lr="0.0005", lr_for_batch=512, schedule="epoch", warmup_epochs=5, min_lr=1e-5,
                        init_scale=1.0, decay_positions=True, repeated_aug=True, model_ema=True, model_ema_decay=0.99996,
                        crop_pct=224 / 256)
    return parser


def check_args(args):
    """The learning rates of `args`, a list. Raises `engine.InputError` for values that cannot be trained with."""
    def need(condition, message):
        if not condition:
            raise engine.InputError(message)

    try:
        rates = [float(part) for part in args.lr.split(",")]
    except ValueError:
        raise engine.InputError(f"--lr {args.lr}: expected a number or a comma list of numbers") from None
    need(all(0 < rate < math.inf for rate in rates), f"--lr {args.lr}: rates must be above 0")
    need(len(set(rates)) == len(rates), f"--lr {args.lr}: a rate is there twice")
    for name in ("min_lr", "warmup_lr", "weight_decay", "weight_decay_end", "clip_grad", "mixup", "cutmix", "init_scale",
                 "color_jitter", "save_ckpt_freq", "save_every_minutes", "max_bad_images"):
        value = getattr(args, name)
        need(value is None or 0 <= value < math.inf, f"--{name} must not be negative: {value}")
    for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
        need(0 <= getattr(args, name) <= 1, f"--{name} must lie in 0..1: {getattr(args, name)}")
    for name in ("drop_path", "drop", "attn_drop_rate", "smoothing"):
        value = getattr(args, name)
        need(value is None or 0 <= value < 1, f"--{name} must lie in 0..1: {value}")
    need(args.seed < 2**63, f"--seed must be below 2^63: {args.seed}")
    need(0 < args.layer_decay <= 1, f"--layer_decay must be above 0 and at most 1: {args.layer_decay}")
    need(args.crop_pct is None or 0 < args.crop_pct <= 1, f"--crop_pct must be above 0 and at most 1: {args.crop_pct}")
    if args.cutmix_minmax:
        low, high = args.cutmix_minmax
        need(0 <= low < high <= 1, f"--cutmix_minmax takes two shares 0 <= low < high <= 1, not {low} {high}")
    need(not is_mixing(args) or args.batch_size_per_gpu % 2 == 0,
         f"--batch_size_per_gpu {args.batch_size_per_gpu}: mixup and CutMix need an even number")
    return rates


def is_mixing(args):
    return bool((args.mixup or args.cutmix or args.cutmix_minmax) and args.mixup_prob)


# ---------------------------------------------------------------- schedules

def epoch_schedule(lr, min_lr, epochs, warmup_epochs, warmup_lr):
    """Rate of every epoch as DeiT had it, float64 [epochs]: an epoch late, and a cosine that begins under the warm-up."""
    def value(t):
        if t < warmup_epochs:
            return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * t / epochs))
    return np.array([value(max(epoch - 1, 0)) for epoch in range(epochs)])


def build_schedules(args, rate, steps, total_batch):
    """{"lr", "wd"} of every update, float64 [epochs * steps]; lines about what was shortened."""
    notes, warmup = [], min(args.warmup_epochs, args.epochs)
    if warmup < args.warmup_epochs:
        notes.append(f"warning: --warmup_epochs {args.warmup_epochs} does not fit into {args.epochs} epochs; shortened to "
                     f"{warmup}")
    peak = rate * total_batch / args.lr_for_batch if args.lr_for_batch else rate
    if args.schedule == "step":
        lr = utils.cosine_scheduler(peak, args.min_lr, args.epochs, steps, warmup)
    else:
        lr = epoch_schedule(peak, args.min_lr, args.epochs, warmup, args.warmup_lr).repeat(steps)
    wd = np.full(len(lr), args.weight_decay)
    if args.weight_decay_end is not None:
        wd = utils.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps)
    return {"lr": lr, "wd": wd}, notes


# ---------------------------------------------------------------- training

def build_mixing(args, num_classes):
    """timm's `Mixup`, which also smooths the labels, or None."""
    if not is_mixing(args):
        return None
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                 label_smoothing=args.smoothing, num_classes=num_classes)


def ema_pairs(model, average):
    """([tensors of the average], [those of the model]): parameters, and running statistics of batch norms."""
    pairs = [*zip(average.parameters(), model.parameters(), strict=True),
             *(pair for pair in zip(average.buffers(), model.buffers(), strict=True) if pair[0].is_floating_point())]
    return [a for a, _ in pairs], [m for _, m in pairs]


def seed_update(seed, epoch, step, rank):
    """What drop path and mixing draw depends on the update alone, so that a resumed run draws what it would have drawn."""
    utils.fix_random_seeds(int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1)[0]))


def train_step(batches, network, optimizer, scaler, lr, weight_decay, mixing=None, smoothing=0.0, clip_grad=0.0, ema=None,
               ema_decay=0.9999, amp_dtype=None, accum_iter=1):
    """One update, without waiting for the device; none if the loss or a gradient of any process is not finite.

    Args:
        batches: `accum_iter` batches (normalised images [B, 3, H, W], labels [B]) on the device, taken one by one.
        network: a `Classifier`, for several processes wrapped.
        lr, weight_decay: of groups with "lr_scale" 1, and of decayed ones.
        mixing: see `build_mixing`; it changes the images in place. smoothing: of labels that are not mixed.
        clip_grad: largest norm of all gradients together; 0: any.
        ema: `ema_pairs`, or None.

    Returns {"loss", "class_acc", "grad_norm"}, 0-d tensors; `class_acc`, a share, is not there with mixing. The norm is
    that before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
        group["weight_decay"] = float(weight_decay) * group["decayed"]
    optimizer.zero_grad()
    criterion = SoftTargetCrossEntropy() if mixing else nn.CrossEntropyLoss(label_smoothing=smoothing)
    names, rows = ("loss",) if mixing else ("loss", "class_acc"), []
    for i, (images, labels) in enumerate(batches):
        if mixing:
            images, labels = mixing(images, labels)
        with network.no_sync() if engine.get_world_size() > 1 and i + 1 < accum_iter else nullcontext():
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = network(images)
            loss = criterion(models.at_least_float32(logits), labels)
            (loss if scaler is None else scaler.scale(loss)).div(accum_iter).backward()
        rows.append([loss.detach()] if mixing else [loss.detach(), (logits.argmax(dim=1) == labels).float().mean()])
    means = {name: torch.stack(values).mean() for name, values in zip(names, zip(*rows, strict=True), strict=True)}

    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if clip_grad:
        torch._foreach_mul_(gradients, (clip_grad / (grad_norm + 1e-6)).clamp(max=1.0))
    if scaler is None:
        # Gradients are the same in all processes, losses are not.
        utils.step_if(grad_norm.isfinite() & engine.all_reduce_mean(means["loss"].clone()).isfinite(), optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()
    if ema is not None:
        utils.ema_update(*ema, momentum=ema_decay)
    return {**means, "grad_norm": grad_norm}


@torch.no_grad()
def validate(network, batches, n, process, amp_dtype=None):
    """Mean cross-entropy, top-1 and top-5 accuracy in percent over a data set of n images: {"loss", "acc1", "acc5"}.

    `batches`: those of this process's `sharded_loader`; images that padding repeats do not count. With fewer than 5 classes
    there is no "acc5". A class that ties with the right one, or whose output is not a number, counts as above it.
    """
    was_training = network.training
    network.eval()
    wide = torch.float32 if process.device.type == "mps" else torch.float64  # which MPS lacks
    sums, seen = torch.zeros(3, dtype=wide, device=process.device), 0
    for images, labels, _ in batches:
        images, labels = images.to(process.device, non_blocking=True), labels.to(process.device, non_blocking=True)
        with torch.autocast(process.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = network(images)
        logits = models.at_least_float32(logits)
        own = logits.gather(1, labels[:, None])
        place = (~(logits < own)).sum(dim=1)  # 1 for the likeliest class
        places = (seen + torch.arange(len(labels), device=labels.device)) * process.world_size + process.rank
        losses = F.cross_entropy(logits, labels, reduction="none")
        values = torch.stack((losses, (place <= 1).to(losses.dtype), (place <= 5).to(losses.dtype)))  # [3, B]
        sums += torch.where(places < n, values, 0).sum(dim=1, dtype=wide)
        seen += len(labels)
    network.train(was_training)
    if process.world_size > 1:
        torch.distributed.all_reduce(sums)
    loss, top1, top5 = (sums / n).tolist()
    result = {"loss": loss, "acc1": 100 * top1}
    return result | {"acc5": 100 * top5} if logits.shape[1] >= 5 else result


# ---------------------------------------------------------------- files

@dataclass
class Training:
    """What a checkpoint holds. `source`: what the model was made of; `average`: its moving average, or None."""
    source: EvaluatedBackbone
    model: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    progress: dict = field(default_factory=lambda: new_progress())


def new_progress():
    """What a checkpoint holds of the running epoch: updates made, sums and counts of the meters, updates dropped in a row;
    and of the run: names of bad images, images of an update, hashes of the pre-trained weights and of the training images'
    names, number of these, the best validation and the last one."""
    return {"step": 0, "totals": {}, "counts": {}, "dropped": 0, "bad": [], "total_batch": 0, "weights": "", "names": "",
            "images": 0, "best": {}, "last": {}}


def network_state(model):
    """The weights of a `Classifier` with the names of the backbone alone, and `head.`: what timm's ViT reads too."""
    return engine.without_prefix(model.state_dict(), "backbone.")


def load_network(model, state, path):
    """Load weights that `network_state` or the reference named."""
    own = {name.removeprefix("backbone."): name for name in model.state_dict()}
    state = state if isinstance(state, dict) else {}
    engine.load_strictly(model, {own.get(name.removeprefix("module."), name): value for name, value in state.items()}, path)


def checkpoint_files(folder, best_file):
    """Checkpoints of a run, newest first; the best one last."""
    numbered = sorted(folder.glob("checkpoint-[0-9]*.pth"), key=lambda path: (len(path.name), path.name), reverse=True)
    found = [folder / engine.CHECKPOINT, folder / engine.PREVIOUS, *numbered, folder / best_file]
    return [path for path in found if path.exists()]


def run_files(folder, best_file):
    """What a run writes into its folder, as far as it is there."""
    others = (folder / name for name in ("log.txt", "tf_logs", engine.BAD_IMAGES))
    return checkpoint_files(folder, best_file) + [path for path in others if path.exists()]


def read_checkpoint(path):
    """Content of a file to resume from. Raises `engine.InputError` when an entry is missing or of another kind."""
    checkpoint = engine.load_checkpoint(path)
    kinds = {"model": dict, "optimizer": dict, "epoch": int, "progress": dict}
    lacking = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise engine.InputError(f"checkpoint {path} is none of fine-tuning: it lacks {', '.join(lacking)}")
    progress, blank = checkpoint["progress"], new_progress()

    def numbers(name, least=-math.inf):
        return all(type(value) in (int, float) and not value < least for value in progress[name].values())
    good = progress.keys() == blank.keys() and all(type(progress[name]) is type(blank[name]) for name in blank) and all((
        numbers("totals"), numbers("counts", 1), progress["totals"].keys() == progress["counts"].keys(),
        all(numbers(name) and progress[name].keys() >= {"top1", "epoch"} for name in ("best", "last") if progress[name]),
        all(isinstance(name, str) for name in progress["bad"]), progress["dropped"] >= 0))
    if not good:
        raise engine.InputError(f"checkpoint {path}: its entry 'progress' cannot be used")
    if not (0 <= checkpoint["epoch"] < 2**31 and 0 <= progress["step"] < 2**31 and 1 <= progress["total_batch"] < 2**31):
        raise engine.InputError(f"checkpoint {path}: its epoch or step is no such number")
    return checkpoint


class OtherTask(engine.InputError):
    """A checkpoint is of other weights or another task, or finished with other settings: its result must not pass for
    that of these."""


def notes_of_resume(path, checkpoint, args, now):
    """Lines that say what is resumed, and what is not as it was. `now`: `new_progress` of this task. Raises `OtherTask`."""
    advice = "choose another --output_dir, or start over with --overwrite true"
    then = checkpoint["progress"]
    if then["weights"] != now["weights"]:
        raise OtherTask(f"checkpoint {path}: its run began with other weights than {args.pretrained_weights}; {advice}")
    task = {"dataset", "train_subset", "subset_seed", "finetune_head_layer", "avgpool_patchtokens"}
    free = engine.FREE_FLAGS | {"results_dir", "save_ckpt_freq", "on_nonfinite", "eval", "download", "arch", "patch_size",
                               "window_size", "pretrained_weights", "data_path", "enable_deepspeed", "log_dir",
                               "nb_classes", "out_dim"}
    changed = engine.changed_flags(vars(args), checkpoint, free)
    for name in changed:
        if name in task or checkpoint["epoch"] >= args.epochs:
            value = engine.printable(getattr(checkpoint["args"], name))
            raise OtherTask(f"checkpoint {path}: its run had --{name} {value}; {advice}")
    # Folders may move, and lose a few bad images in the course of a run.
    other_images = then["names"] != now["names"]
    if other_images and (checkpoint["epoch"] >= args.epochs or abs(then["images"] / now["images"] - 1) > 0.01):
        raise OtherTask(f"checkpoint {path}: its run had other training images, {then['images']}, than the {now['images']} "
                        f"here; {advice}")
    notes = [f"note: there are {now['images']} training images, the checkpoint's run had {then['images']}"] * other_images
    return [f"resumed from {path}", *changed.values(), *notes]


def resume(args, folder, best_file, training):
    """Go on from the checkpoint that `--load_from` means. Returns (its path or None, the epoch to run (on), notes)."""
    path, checkpoint = None, None
    if args.load_from == "auto":
        path, checkpoint = engine.find_checkpoint(checkpoint_files(folder, best_file), read_checkpoint)
    elif args.load_from:
        path = folder / args.load_from
        checkpoint = read_checkpoint(path)
    if path is None:
        return None, 0, []
    try:
        notes = notes_of_resume(path, checkpoint, args, training.progress)
    except OtherTask as error:
        if not args.overwrite:
            raise
        return None, 0, [f"starting over: {error}"]
    load_network(training.model, checkpoint["model"], path)
    if training.average is not None:
        load_network(training.average, checkpoint.get("model_ema", checkpoint["model"]), path)
    engine.load_optimizer(training.optimizer, checkpoint["optimizer"], path)
    if training.scaler is not None and "scaler" in checkpoint:
        engine.load_scaler(training.scaler, checkpoint["scaler"], path)
    training.progress = checkpoint["progress"] | {name: training.progress[name] for name in ("names", "images")}
    return path, checkpoint["epoch"], notes


def save(folder, epoch, args, training, names=()):
    """Write `checkpoint.pth`, from which `epoch` is to run (on), and the same as `names`. Returns whether that worked."""
    average, source = training.average, training.source
    engine.check_finite([training.model] + [average] * (average is not None), epoch)
    # With what the evaluations of frozen weights look for.
    known = {"arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
             "global_crops_size": source.image_size, **source.pixel_stats.as_settings()}
    state = {"model": network_state(training.model), "optimizer": training.optimizer.state_dict(), "epoch": epoch,
             "args": argparse.Namespace(**vars(args) | known), "progress": training.progress}
    if average is not None:
        state["model_ema"] = network_state(average)
    if training.scaler is not None:
        state["scaler"] = training.scaler.state_dict()
    path = folder / engine.CHECKPOINT
    try:
        engine.save_atomically(state, path, previous=folder / engine.PREVIOUS)
        for name in names:
            path = folder / name
            copy_file(folder / engine.CHECKPOINT, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        engine.not_saved(path, error, args.on_save_error)
        return False
    return True


def copy_file(path, other):
    """Another name for a file that is only ever replaced, not changed; a copy where there are no hard links."""
    temporary = other.with_name(f".{other.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, other)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- runs

def finetune(args, protocol):
    """Fine-tune, for every key and rate of `args` (of `finetune_parser`); `args` is only read.

    Returns {key: {rate: ({"best", "last"}, settings)}}: validations and what they are recorded with. Raises
    `engine.InputError`, FloatingPointError for numbers that are not finite, and `engine.Preempted` when SIGTERM or SIGUSR1
    came and the run is saved.
    """
    rates = check_args(args)
    with ExitStack() as at_end:
        signals = engine.StopSignals()
        at_end.callback(signals.restore)
        return run_all(args, protocol, rates, signals, at_end)


def run_all(args, protocol, rates, signals, at_end):
    process = start_process(args)
    main = process.rank == 0
    if main and args.enable_deepspeed:
        print("note: --enable_deepspeed is ignored: precision is --amp_dtype's, and batches add up by --accum_iter")
    if main and args.log_dir:
        print(f"note: --log_dir {args.log_dir} is ignored: TensorBoard's events go to tf_logs/ in the output folder")
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    runs = {(key, rate): Path(args.output_dir) / (key if len(keys) > 1 else "") / (
        f"lr_{rate:g}" if len(rates) > 1 else "") for key in keys for rate in rates}
    if args.load_from not in (None, "auto") and (len(runs) > 1 or args.overwrite):
        raise engine.InputError(f"--load_from {args.load_from}: give one --checkpoint_key and one --lr, and no --overwrite")
    for (key, _), folder in runs.items():
        held = run_files(folder, protocol.best_file.replace("KEY", key))
        if args.overwrite and not args.eval and any(
                path.is_file() and os.path.exists(args.pretrained_weights) and path.samefile(args.pretrained_weights)
                for path in held):
            raise engine.InputError(f"--overwrite would delete {args.pretrained_weights}, the pre-trained weights; choose "
                                   f"another --output_dir than {folder}")
        engine.check_output(folder, args.load_from, args.overwrite or args.eval, held)
    read_results(results_folder(args))  # a damaged one, or a wrong key, is not found hours later
    checkpoint = read_weights(args.pretrained_weights)
    sets = read_sets(args)
    if args.nb_classes not in (0, len(sets[0].classes)):
        raise engine.InputError(f"--nb_classes {args.nb_classes}: {sets[0].name} has {len(sets[0].classes)} classes; leave "
                               "the flag out")
    for key in keys:
        build_network(args, key, checkpoint, len(sets[0].classes))
    if process.world_size > 1:
        torch.distributed.barrier()  # nobody may write before all have looked

    found = {key: {} for key in keys}
    for (key, rate), folder in runs.items():
        if main and len(runs) > 1:
            print(f"\n==== {key}, lr {rate:g}: {folder}", flush=True)
        # A sweep's own record is that of its best rate.
        own = argparse.Namespace(**vars(args) | {"lr": rate, "results_dir": str(folder)} if len(rates) > 1 else
                                 vars(args) | {"lr": rate})
        found[key][rate] = run_one(own, protocol, key, folder, checkpoint, sets, process, signals, at_end)
    for key in keys if main and len(rates) > 1 and not args.eval else ():
        report_sweep(args, protocol, key, found[key])
    return found


def record(args, protocol, key, settings, metrics):
    """`append_result`, unless it is there: a finished run may be started again, or have been killed as it ended."""
    new = {"protocol": protocol.name, "key": key, "settings": settings, "metrics": metrics}
    folder = results_folder(args)
    if not any(all(old.get(name) == value for name, value in new.items()) for old in read_results(folder)):
        append_result(folder, protocol.name, args.pretrained_weights, key, settings, metrics)


def report_sweep(args, protocol, key, found):
    """Print the best of several rates, and write it into results.json."""
    best = max(found, key=lambda rate: found[rate][0]["best"]["top1"])
    print(f"\n{key}: best of {len(found)} rates")
    for rate, (validations, _) in found.items():
        print(f"  lr {rate:<8g} best {described(validations['best'])}; last {described(validations['last'])}"
              + "  <- best" * (rate == best))
    print(end="", flush=True)
    validations, settings = found[best]
    record(args, protocol, key, settings | {"swept": list(found)}, validations)


def as_record(result, epoch):
    """A result of `validate` as it is recorded."""
    top5 = {"top5": result["acc5"]} if "acc5" in result else {}
    return {"top1": result["acc1"], **top5, "loss": result["loss"], "epoch": epoch}


def described(validation):
    top5 = f", top-5 {validation['top5']:.2f} %" if "top5" in validation else ""
    return f"top-1 {validation['top1']:.2f} %{top5} (epoch {validation['epoch']})"


def build_training(args, key, content, train, amp_dtype, device):
    """The `Training` of a checkpoint's entry on the `ImageSet` train, at its beginning."""
    utils.fix_random_seeds(args.seed)  # the same first weights of the head in all processes
    model, source = build_network(args, key, content, len(train.classes))
    model = model.to(device)
    names = hashlib.sha256("\n".join(train.paths()).encode(errors="surrogateescape")).hexdigest()
    return Training(
        source, model, copy.deepcopy(model).requires_grad_(False).eval() if args.model_ema else None,
        torch.optim.AdamW(parameter_groups(model, args.layer_decay, args.decay_positions), lr=0.0,
                          fused=device.type in ("cuda", "cpu")),
        torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None,
        new_progress() | {"weights": source.weights_hash, "names": names, "images": len(train)})


def build_loaders(args, sets, source, process):
    """DataLoaders of the training images, by updates (`AugmentedSet`, `UpdateBatches`), and of the validation images."""
    train, val = sets
    common = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0,
              "worker_init_fn": engine.ignore_signals}
    dataset = AugmentedSet(train, train_transform(
        source.image_size, args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount,
        args.hflip, source.pixel_stats), args.seed, args.on_bad_image)
    batches = UpdateBatches(len(train), args.batch_size_per_gpu, args.accum_iter, process, args.seed, args.repeated_aug)
    if not batches.steps and not args.eval:
        total_batch = args.batch_size_per_gpu * process.world_size * args.accum_iter
        raise engine.InputError(f"{train.name}: {len(train)} images are fewer than one batch of {total_batch}; lower "
                               f"--batch_size_per_gpu{' or --accum_iter' * (args.accum_iter > 1)}")
    transform = val_transform(source.image_size, args.crop_pct, args.val_interpolation, source.normalize)
    return (DataLoader(dataset, batch_sampler=batches, pin_memory=process.device.type == "cuda",
                       generator=torch.Generator(), **common),
            sharded_loader(val.with_transform(transform), max(1, args.batch_size_per_gpu * 3 // 2), process=process,
                           **common))


def run_one(args, protocol, key, folder, content, sets, process, signals, at_end):
    """Fine-tune one network at the rate `args.lr`. Returns {"best", "last"}, its validations, and their settings."""
    device, main = process.device, process.rank == 0
    best_file = protocol.best_file.replace("KEY", key)

    # ============ network, data, schedules ============
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    training = build_training(args, key, content, sets[0], amp_dtype, device)
    model = training.model
    train_loader, val_loader = build_loaders(args, sets, training.source, process)
    if args.eval:
        path = folder / (args.load_from if args.load_from not in (None, "auto") else best_file)
        load_network(model, engine.load_checkpoint(path).get("model"), path)
        result = validate(model, val_loader, len(sets[1]), process, amp_dtype)
        if main:
            print(f"{path}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
        return {"best": as_record(result, None), "last": as_record(result, None)}, {}
    steps, total_batch = train_loader.batch_sampler.steps, args.batch_size_per_gpu * process.world_size * args.accum_iter
    schedules, notes = build_schedules(args, args.lr, steps, total_batch)

    # ============ resume ============
    path, first_epoch, more = resume(args, folder, best_file, training)
    notes += more
    progress = training.progress
    progress["step"] = min(progress["step"] * progress["total_batch"] // total_batch, steps)
    if first_epoch < args.epochs:  # a finished run stays what it was
        progress["total_batch"] = total_batch
    started = first_epoch * steps + progress["step"]
    engine.check_same_start(started, args.load_from, folder)
    settings = shared_settings(args, training.source, *sets) | {"lr": args.lr, "total_batch": progress["total_batch"]} | {
        name: getattr(args, name) for name in RECORDED} | {
        "drop_path": getattr(blocks_of(model.backbone)[-1][-1].drop_path1, "drop_prob", 0.0)}
    if first_epoch >= args.epochs:
        validations = {name: progress[name] for name in ("best", "last")}
        if main:
            print(f"nothing to do: {path} has finished {first_epoch} epochs; best {described(progress['best'])}",
                  flush=True)
            record(args, protocol, key, settings, validations)
        return validations, settings

    writer = None
    if main:
        if args.load_from == "auto" and path == folder / engine.PREVIOUS:
            path = path.replace(folder / engine.CHECKPOINT)  # which is damaged: the next save is not to keep that one
        engine.start_output(folder, first_epoch if path else None, run_files(folder, best_file))
        writer = SummaryWriter(folder / "tf_logs", purge_step=started or None)
        at_end.callback(engine.close_writer, writer)
        print(f"data: {len(sets[0])} training and {len(sets[1])} validation images of {len(sets[0].classes)} classes, "
              f"{steps} steps an epoch, {args.num_workers} loader processes")
        print(f"network: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; precision: "
              f"{amp_dtype or torch.float32}; total batch: {total_batch}; peak learning rate: {schedules['lr'].max():.6g}")
        if args.layer_decay < 1:
            print(layer_table(model, args.layer_decay, args.decay_positions))
        where = f"starting at epoch {first_epoch} of {args.epochs}" + f", step {progress['step']}" * (progress["step"] > 0)
        print("\n".join(notes + [where]), flush=True)

    # ============ training ============
    start_time = time.time()
    train_all(args, protocol, folder, best_file, training, first_epoch, train_loader, val_loader, schedules, signals,
              writer, amp_dtype, process)
    validations = {name: progress[name] for name in ("best", "last")}
    if main:
        print(f"training time {engine.eta_string(time.time() - start_time)}; {key}, lr {args.lr:g}: best "
              f"{described(progress['best'])}, last {described(progress['last'])}; {folder / best_file}", flush=True)
        record(args, protocol, key, settings, validations)
    return validations, settings


def train_all(args, protocol, folder, best_file, training, first_epoch, train_loader, val_loader, schedules, signals,
              writer, amp_dtype, process):
    """The epochs from `first_epoch` on, each with its validation, its line of `log.txt` and its checkpoint."""
    device, main, model, progress = process.device, process.rank == 0, training.model, training.progress
    dataset, sampler = train_loader.dataset, train_loader.batch_sampler
    network = engine.data_parallel(model, device, args.accum_iter) if process.world_size > 1 else model
    mixing = build_mixing(args, len(dataset.images.classes))
    ema = None if training.average is None else ema_pairs(model, training.average)
    saved_at, bad_before = time.monotonic(), set(progress["bad"])
    check_images = partial(engine.check_images, dataset, bad_before, args.max_bad_images, folder, device)

    def save_now(epoch, names=()):
        """Save the run as it is before update `progress["step"]` of `epoch`; all processes call it. False if that fails."""
        nonlocal saved_at
        progress["bad"] = engine.gather_bad_images(dataset, bad_before, device)
        saved = not main or save(folder, epoch, args, training, names)
        saved_at = time.monotonic()
        return saved

    def next_batch(batches):
        """(the next batch or None at the end, whether to save). Raises `engine.Preempted` when any process got a signal:
        the hosts agree before each batch."""
        batch = signals.wait_for(partial(next, batches, None))
        due = main and args.save_every_minutes and time.monotonic() - saved_at > 60 * args.save_every_minutes
        want = engine.host_reduce(engine.STOP if signals.received else engine.SAVE if due else 0)
        if want == engine.STOP:
            raise engine.Preempted
        return batch, want == engine.SAVE

    def val_batches():
        batches = iter(val_loader)
        while (batch := next_batch(batches)[0]) is not None:
            yield batch

    for epoch in range(first_epoch, args.epochs):
        sampler.epoch, sampler.start = epoch, progress["step"]
        is_last = epoch + 1 == args.epochs
        result = None
        try:
            train_epoch(iter(train_loader), next_batch, save_now, check_images, network, training, schedules, mixing, ema,
                        epoch, sampler.steps, amp_dtype, writer, args, process)
            if is_last or epoch % args.val_freq == 0:
                result = validate(model, val_batches(), len(val_loader.dataset), process, amp_dtype)
        except engine.Preempted:
            raise engine.stopped(save_now(epoch), epoch, progress["step"]) from None
        stats = {f"train_{name}": engine.mean_of(progress, name) for name in progress["totals"]}
        names = []
        if result:
            stats |= {f"test_{name}": value for name, value in result.items()}
            progress["last"] = as_record(result, epoch)
            before = progress["best"].get("top1", -1.0)
            if result["acc1"] > before or protocol.later_wins and result["acc1"] == before:
                progress["best"] = progress["last"]
                names.append(best_file)
        if args.save_ckpt_freq and (is_last or (epoch + 1) % max(1, int(args.save_ckpt_freq * args.epochs / 100)) == 0):
            names.append(f"checkpoint-{epoch}.pth")
        bad = engine.gather_bad_images(dataset, bad_before, device)
        if main:
            engine.append_log(folder / "log.txt", stats | {
                "epoch": epoch, "n_parameters": sum(p.numel() for p in model.parameters())})
            engine.log_scalars(writer, "epoch", stats, epoch)
            print(f"epoch {epoch} done: " + "  ".join(f"{k} {v:.4g}" for k, v in stats.items())
                  + (f"  best {described(progress['best'])}" if result else ""), flush=True)
            if bad:
                engine.write_bad_images(folder, bad)
                print(f"skipped {len(bad)} unreadable images so far; all: {folder / engine.BAD_IMAGES}", flush=True)
        progress |= {"step": 0, "totals": {}, "counts": {}}
        save_now(epoch + 1, names)


def train_epoch(batches, next_batch, save_now, check_images, network, training, schedules, mixing, ema, epoch, steps,
                amp_dtype, writer, args, process):
    """Updates `progress["step"]` to `steps` of an epoch; `training.progress` is kept up to date.

    next_batch, save_now: see `train_all`; check_images is called with each log line. When `next_batch` raises
    `engine.Preempted`, the update whose batches were being fetched has not been made.
    """
    device, optimizer, scaler, progress = process.device, training.optimizer, training.scaler, training.progress
    names = ("loss", "grad_norm") if mixing else ("loss", "class_acc", "grad_norm")
    meters = engine.DeviceMeters(names)
    waited, since, since_step = 0.0, time.time(), progress["step"]
    network.train()

    def read_meters():
        rows = meters.read()
        for step, row in enumerate(rows, start=epoch * steps + progress["step"] - len(rows)):
            row |= {"lr": float(schedules["lr"][step]), "weight_decay": float(schedules["wd"][step])}
            row["min_lr"] = row["lr"] * optimizer.param_groups[0]["lr_scale"]
            if scaler is not None:
                row["loss_scale"] = scaler.get_scale()
            engine.count_step(progress, step, row, scaler is not None, args.on_nonfinite, quiet=not writer)
            engine.log_scalars(writer, "step", row, step)
        return rows

    def save_here():
        read_meters()
        save_now(epoch)

    def fetched(first):
        nonlocal waited
        wait_from = time.time()
        (images, labels), save = next_batch(batches)
        waited += time.time() - wait_from
        if save and first:
            save_here()
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    try:
        first_step = progress["step"]
        for it in range(first_step, steps):
            step = epoch * steps + it
            if args.save_every_steps and it > first_step and step % args.save_every_steps == 0:
                save_here()
            seed_update(args.seed, epoch, it, process.rank)
            means = train_step((fetched(first=i == 0) for i in range(args.accum_iter)), network, optimizer, scaler,
                               schedules["lr"][step], schedules["wd"][step], mixing, args.smoothing, args.clip_grad, ema,
                               args.model_ema_decay, amp_dtype, args.accum_iter)
            progress["step"] = it + 1
            meters.add(*(means[name] for name in names))
            if (it + 1) % args.print_freq and it + 1 < steps:
                continue
            last = read_meters()[-1]
            elapsed, now = time.time() - since, time.time()
            if writer:
                images_s = (it + 1 - since_step) * progress["total_batch"] / elapsed
                left = (args.epochs * steps - step - 1) * elapsed / (it + 1 - since_step)
                print(f"epoch {epoch}/{args.epochs} [{it + 1:>{len(str(steps))}}/{steps}]  "
                      + "  ".join(f"{name} {last[name]:.4f} ({engine.mean_of(progress, name):.4f})" for name in names)
                      + f"  lr {last['lr']:.2e}  {images_s:.1f} images/s  data {100 * waited / elapsed:.0f} %"
                      f"  memory {engine.peak_memory_mib(device):.0f} MiB  eta {engine.eta_string(left)}", flush=True)
                engine.log_scalars(writer, "step", {"images_per_second": images_s}, step)
            waited, since, since_step = 0.0, now, it + 1
            check_images()
    except engine.Preempted:
        read_meters()
        raise
