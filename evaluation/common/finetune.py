"""Fine-tuning a pre-trained backbone end to end: the one engine of all protocols, which differ in their flags' defaults.

Sections 7 to 9 of the protocols: ImageNet with layer-wise rates (iBOT, Tables 2, 3 and 11; the recipe of BEiT), transfer
(Table 7; the recipe of DeiT) and training on few labels (Tables 4 and 12).

Letters: B images per process and batch, C classes, D width of the backbone, L blocks, N patch tokens, W processes.
"""
import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import loader
import models
import utils
from evaluation.common.arguments import checkpoint_keys, evaluation_parser, int_from
from evaluation.common.augment import AugmentedSet, UpdateBatches, train_transform, val_transform
from evaluation.common.backbone import load_evaluated_backbone, read_weights
from evaluation.common.clustering import load_projection_head
from evaluation.common.data import image_sets
from evaluation.common.features import sharded_loader
from evaluation.common.results import append_result, read_results, results_folder, shared_settings

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
RECORDED = ("epochs", "layer_decay", "finetune_head_layer", "warmup_epochs", "min_lr", "weight_decay", "clip_grad", "aa",
            "reprob", "mixup", "cutmix", "smoothing", "repeated_aug", "seed")  # flags that tell results from others
SAVE, STOP = 1, 2  # what a process wants to happen before the next batch


@dataclass(frozen=True)
class Protocol:
    """`name` of its records in results.json; file of the best weights, with KEY for the checkpoint's key; whether an
    accuracy that equals the best so far counts as the best."""
    name: str
    best_file: str = "checkpoint-best.pth"
    later_wins: bool = False


# ---------------------------------------------------------------- flags

# The reference's names of flags (hyphens count as underscores), and words for what is always so or set otherwise here.
RENAMED = {"batch_size": "batch_size_per_gpu", "data_set": "dataset", "finetune": "pretrained_weights",
           "input_size": "image_size", "model": "arch", "model_key": "checkpoint_key", "resume": "load_from",
           "update_freq": "accum_iter"}
SWITCHES = {"auto_resume": ["--load_from", "auto"], "no_auto_resume": [], "no_model_ema": ["--model_ema", "false"],
            "no_repeated_aug": ["--repeated_aug", "false"], "use_cls": ["--avgpool_patchtokens", "0"],
            "use_mean_pooling": ["--avgpool_patchtokens", "1"], "abs_pos_emb": [], "disable_rel_pos_bias": [],
            "dist_eval": [], "imagenet_default_mean_and_std": [], "pin_mem": []}
DATA_WORDS = {"CIFAR": "cifar100", "CIFAR10": "cifar10", "Cars": "cars", "Flwrs": "flowers", "IMNET": "imagefolder",
              "INAT": "inat2018", "INAT19": "inat2019", "image_folder": "imagefolder"}


def our_words(words):
    """A command line with the reference's names of flags and data sets -> the same with those of `finetune_parser`."""
    out = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            out += SWITCHES.get(name, [f"--{RENAMED.get(name, name)}{equals}{value}"])
        else:
            out.append(DATA_WORDS.get(word, word) if out and out[-1] == "--dataset" else word)
    return out


def finetune_parser(description):
    """All flags, with the defaults of fine-tuning on ImageNet; see `our_words` for other spellings."""
    parser = evaluation_parser(description, frozen=False)
    parser.set_defaults(output_dir=".", n_last_blocks=1)  # a constant, recorded beside the pooling
    switch = {"type": utils.bool_flag, "nargs": "?", "const": True}

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
                            f"({utils.MAX_DROPPED} in a row end it too)")
    optim.add_argument("--use_fp16", default=True, help="mixed precision", **switch)
    optim.add_argument("--amp_dtype", default="auto", choices=("auto", "bfloat16", "float16"),
                       help="auto: bfloat16 where the hardware has it, else float16 with a gradient scaler on CUDA")
    optim.add_argument("--enable_deepspeed", action="store_true", help="refused: batches add up by --accum_iter, and "
                                                                       "bfloat16 needs no loss scale")

    augment = parser.add_argument_group("augmentation of training images")
    augment.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of a policy, or none",
                         type=lambda text: None if text.lower() == "none" else text)
    augment.add_argument("--color_jitter", type=float, default=0.4, help="only without --aa")
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
    files.add_argument("--load_from", help=f"resume from this file of the output folder, e.g. {CHECKPOINT}; auto: from the "
                                           "newest good one, or a fresh start where there is none")
    files.add_argument("--overwrite", default=False, **switch,
                       help="start over in a folder that holds a run; with --load_from auto only if that was another one")
    files.add_argument("--save_ckpt_freq", type=float, default=0,
                       help="also keep checkpoint-EPOCH.pth every so many percent of the epochs; 0: never")
    files.add_argument("--save_every_steps", type=int_from(0), default=0,
                       help=f"also save {CHECKPOINT} every so many updates; 0: never")
    files.add_argument("--save_every_minutes", type=float, default=0.0, help="the same by the clock")
    files.add_argument("--on_save_error", default="continue", choices=("continue", "stop"),
                       help="when a checkpoint cannot be written, e.g. on a full disk; the one before it stays")
    files.add_argument("--print_freq", type=int_from(1), default=10, help="steps between log lines")
    files.add_argument("--seed", type=int_from(0), default=0)
    return parser


def transfer_parser(description):
    """The flags with the defaults of transfer and of few labels (DeiT's recipe)."""
    parser = finetune_parser(description)
    parser.set_defaults(epochs=300, lr="0.0005", lr_for_batch=512, schedule="epoch", warmup_epochs=5, min_lr=1e-5,
                        init_scale=1.0, decay_positions=True, repeated_aug=True, model_ema=True, model_ema_decay=0.99996,
                        crop_pct=224 / 256)
    return parser


def check_args(args):
    """The learning rates of `args`, a list. Raises `utils.InputError` for values that cannot be trained with."""
    def need(condition, message):
        if not condition:
            raise utils.InputError(message)

    need(not args.enable_deepspeed, "--enable_deepspeed: DeepSpeed is not used here, batches add up by --accum_iter and "
                                    "--amp_dtype bfloat16 needs no loss scale; leave the flag out")
    try:
        rates = [float(part) for part in args.lr.split(",")]
    except ValueError:
        raise utils.InputError(f"--lr {args.lr}: expected a number or a comma list of numbers") from None
    need(all(0 < rate < math.inf for rate in rates), f"--lr {args.lr}: rates must be above 0")
    need(len(set(rates)) == len(rates), f"--lr {args.lr}: a rate is there twice")
    for name in ("min_lr", "warmup_lr", "weight_decay", "weight_decay_end", "clip_grad", "mixup", "cutmix", "init_scale",
                 "color_jitter", "save_ckpt_freq", "save_every_minutes", "max_bad_images"):
        value = getattr(args, name)
        need(value is None or 0 <= value < math.inf, f"--{name} must not be negative: {value}")
    for name in ("reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay"):
        need(0 <= getattr(args, name) <= 1, f"--{name} must lie in 0..1: {getattr(args, name)}")
    for name in ("drop_path", "drop", "attn_drop_rate", "smoothing"):
        value = getattr(args, name)
        need(value is None or 0 <= value < 1, f"--{name} must lie in 0..1: {value}")
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


# ---------------------------------------------------------------- network

class Classifier(nn.Module):
    """A backbone and a head on its [CLS] token (Swin: mean token), or with `mean_pooling` on its mean patch token."""

    def __init__(self, backbone, head, mean_pooling=False):
        super().__init__()
        self.backbone, self.head, self.fc_norm = backbone, head, None
        if mean_pooling:
            self.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=1e-6)
            backbone.norm = nn.Identity()

    def forward(self, images):
        """Images [B, 3, H, W] to logits [B, C]."""
        if self.fc_norm is None:
            return self.head(self.backbone(images))
        return self.head(self.fc_norm(self.backbone(images, return_all_tokens=True)[:, 1:].mean(dim=1)))


class ProjectionClassifier(nn.Module):
    """The first `layers` layers of a pre-trained projection head (3: all of it) below a new classifier (iBOT, Table 12)."""

    def __init__(self, projection, layers, num_classes):
        super().__init__()
        linear = [i for i, part in enumerate(projection.mlp) if isinstance(part, nn.Linear)]
        kept = list(projection.mlp)[:linear[layers] if layers < len(linear) else None]
        width = projection.mlp[linear[layers - 1]].out_features
        self.mlp, self.last_layer = nn.Sequential(*kept), None
        if layers == len(linear):
            self.last_layer = projection.last_layer
            width = len(projection.last_layer.weight_v)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        """[B, D] to logits [B, C]."""
        x = self.mlp(x)
        if self.last_layer is not None:
            x = self.last_layer(F.normalize(models.at_least_float32(x), dim=-1))
        return self.fc(x)


def build_network(args, key, checkpoint, num_classes):
    """(`Classifier`, the `EvaluatedBackbone` it was made of), on the CPU, for the entry `key` of a checkpoint's content.

    The position embedding is resampled for `--image_size` once, to its number of cells. Raises `utils.InputError` as
    `load_evaluated_backbone`, and for heads and poolings that the network does not have.
    """
    source = load_evaluated_backbone(args.pretrained_weights, key, args.arch, args.patch_size, args.window_size,
                                     args.image_size, checkpoint)
    backbone = source.model.train().requires_grad_(True)
    is_swin = source.arch.startswith("swin")
    if is_swin and args.avgpool_patchtokens:
        raise utils.InputError(f"--avgpool_patchtokens {args.avgpool_patchtokens}: a Swin has mode 0 only")
    if not is_swin:
        cells = source.image_size // source.patch_size
        backbone.pos_embed = nn.Parameter(resize_positions(backbone.pos_embed.detach(), cells))
    set_dropout(backbone, args.drop_path if args.drop_path is not None or is_swin else 0.1, args.drop, args.attn_drop_rate)

    if args.finetune_head_layer:
        projection = load_projection_head(checkpoint, key, args.pretrained_weights).train().requires_grad_(True)
        head = ProjectionClassifier(projection, args.finetune_head_layer, num_classes)
        new = head.fc
    else:
        head = new = nn.Linear(backbone.embed_dim, num_classes)
    nn.init.trunc_normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)
    with torch.no_grad():
        new.weight.mul_(args.init_scale)
    return Classifier(backbone, head, mean_pooling=args.avgpool_patchtokens == 1), source


def resize_positions(pos_embed, cells):
    """Position embedding [1, 1 + n*n, D] for `cells` x `cells` patches: bicubic to that size, the [CLS] entry as it is.

    Unlike `models.vision_transformer.resample_positions`, which evaluations of frozen weights need, by the target size.
    """
    n = math.isqrt(pos_embed.shape[1] - 1)
    if n == cells:
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, size=(cells, cells), mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def blocks_of(backbone):
    """The blocks of each stage, from the input on; a ViT is one stage."""
    return [list(stage.blocks) for stage in backbone.layers] if hasattr(backbone, "layers") else [list(backbone.blocks)]


def set_dropout(backbone, drop_path, drop, attn_drop):
    """Stochastic depth rising linearly from 0 at the first block to `drop_path` (None: as it is), and dropout."""
    blocks = [block for stage in blocks_of(backbone) for block in stage]
    for i, block in enumerate(blocks):
        if drop_path is not None:
            rate = drop_path * (i / max(len(blocks) - 1, 1))
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        block.attn.attn_drop.p = attn_drop
        block.attn.proj_drop.p = block.mlp.drop1.p = block.mlp.drop2.p = drop


# ---------------------------------------------------------------- parameter groups and schedules

def layer_id(name, depths):
    """Place of a parameter in the network: 0 for the embeddings, i + 1 for block i, L + 1 for norms and heads.

    `name` is that in `Classifier`; depths: blocks of each stage. The patch merging after a stage of a Swin counts as part
    of its last block.
    """
    name = name.removeprefix("backbone.")
    words = name.split(".")
    if words[0] in ("cls_token", "pos_embed", "patch_embed", "masked_embed"):
        return 0
    if words[0] == "blocks":
        return int(words[1]) + 1
    if words[0] == "layers":
        stage = int(words[1])
        return sum(depths[:stage]) + (int(words[3]) + 1 if words[2] == "blocks" else depths[stage])
    return sum(depths) + 1


def is_decayed(name, parameter, decay_positions):
    """Whether weight decay applies: not to vectors, biases and, unless `decay_positions`, to positions and [CLS] token."""
    name = name.removeprefix("backbone.")
    return not (parameter.ndim == 1 or name.endswith(".bias")
                or not decay_positions and name in ("pos_embed", "cls_token"))


def parameter_groups(model, layer_decay, decay_positions):
    """AdamW's groups of a `Classifier`: parameters whose rate and decay are the same, from the input on.

    Each has "lr_scale", layer_decay^(L + 1 - layer id), and "decayed"; the rate and the decay are set at each step.
    """
    depths = [len(stage) for stage in blocks_of(model.backbone)]
    groups = {}
    for name, parameter in model.named_parameters():
        scale = layer_decay ** (sum(depths) + 1 - layer_id(name, depths))
        decayed = is_decayed(name, parameter, decay_positions)
        group = groups.setdefault((scale, decayed), {"params": [], "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def layer_table(model, layer_decay, decay_positions):
    """Text that shows of each layer id the factor of its rate, and its decayed and other parameters."""
    depths = [len(stage) for stage in blocks_of(model.backbone)]
    top = sum(depths) + 1
    rows = {i: ([], []) for i in range(top + 1)}
    for name, parameter in model.named_parameters():
        plain = not is_decayed(name, parameter, decay_positions)
        rows[layer_id(name, depths)][plain].append(name.removeprefix("backbone."))
    lines = ["layer  rate x   decayed  not  parameters"]
    for i, (decayed, plain) in rows.items():
        shown = sorted({".".join(name.split(".")[:4 if name.startswith("layers") else 2]) for name in decayed + plain})
        lines.append(f"{i:>5}  {layer_decay ** (top - i):<8.5f} {len(decayed):>6} {len(plain):>4}  "
                     + ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else ""))
    return "\n".join(lines)


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
        with network.no_sync() if utils.get_world_size() > 1 and i + 1 < accum_iter else nullcontext():
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
        utils.step_if(grad_norm.isfinite() & utils.all_reduce_mean(means["loss"].clone()).isfinite(), optimizer)
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
    sums, seen = torch.zeros(3, dtype=torch.float64, device=process.device), 0
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
        sums += torch.where(places < n, values, 0).sum(dim=1, dtype=torch.float64)
        seen += len(labels)
    network.train(was_training)
    if process.world_size > 1:
        torch.distributed.all_reduce(sums)
    loss, top1, top5 = (sums / n).tolist()
    result = {"loss": loss, "acc1": 100 * top1}
    return result | {"acc5": 100 * top5} if logits.shape[1] >= 5 else result


# ---------------------------------------------------------------- files

def network_state(model):
    """The weights of a `Classifier` with the names of the backbone alone, and `head.`: what timm's ViT reads too."""
    return utils.without_prefix(model.state_dict(), "backbone.")


def load_network(model, state, path):
    """Load weights that `network_state` or the reference named."""
    own = {name.removeprefix("backbone."): name for name in model.state_dict()}
    state = state if isinstance(state, dict) else {}
    utils.load_strictly(model, {own.get(name.removeprefix("module."), name): value for name, value in state.items()}, path)


def checkpoint_files(folder, best_file):
    """Checkpoints of a run, newest first; the best one last."""
    numbered = sorted(folder.glob("checkpoint-[0-9]*.pth"), key=lambda path: (len(path.name), path.name), reverse=True)
    found = [folder / CHECKPOINT, folder / PREVIOUS, *numbered, folder / best_file]
    return [path for path in found if path.exists()]


def run_files(folder, best_file):
    """What a run writes into its folder, as far as it is there."""
    others = (folder / name for name in ("log.txt", "tf_logs", loader.BAD_IMAGES))
    return checkpoint_files(folder, best_file) + [path for path in others if path.exists()]


def check_folder(folder, args, best_file):
    """Raise `utils.InputError` when `folder` cannot take this run, or its checkpoint is not there."""
    if folder.exists() and not folder.is_dir():
        raise utils.InputError(f"--output_dir {folder} is a file")
    if args.load_from and args.load_from != "auto":
        if args.overwrite:
            raise utils.InputError("--load_from resumes and --overwrite true starts over: give one of them")
        if not (folder / args.load_from).is_file():
            raise utils.InputError(f"--load_from: {folder / args.load_from} does not exist")
    held = run_files(folder, best_file)
    if held and not args.load_from and not args.overwrite:
        raise utils.InputError(f"--output_dir {folder} already holds a run ({', '.join(p.name for p in held[:3])}): resume "
                               "with --load_from auto, start over with --overwrite true, or choose another folder")


def start_folder(folder, best_file, epoch):
    """Make the folder and remove what a killed run left half written; without `epoch` all of an earlier run, with it what
    `log.txt` says of that epoch and later ones."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.InputError(f"--output_dir {folder}: {error.strerror}") from error
    for path in [*folder.glob(".checkpoint*.tmp*"), *([] if epoch is not None else run_files(folder, best_file))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = folder / "log.txt"
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["epoch"] < epoch))


def read_checkpoint(path):
    """Content of a file to resume from. Raises `utils.InputError` when an entry is missing or of another kind."""
    checkpoint = utils.load_checkpoint(path)
    kinds = {"model": dict, "optimizer": dict, "epoch": int, "progress": dict}
    lacking = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise utils.InputError(f"checkpoint {path} is none of fine-tuning: it lacks {', '.join(lacking)}")
    progress, blank = checkpoint["progress"], new_progress()

    def numbers(name, least=-math.inf):
        return all(type(value) in (int, float) and not value < least for value in progress[name].values())
    good = progress.keys() == blank.keys() and all(type(progress[name]) is type(blank[name]) for name in blank) and all((
        numbers("totals"), numbers("counts", 1), progress["totals"].keys() == progress["counts"].keys(),
        all(numbers(name) and progress[name].keys() >= {"top1", "epoch"} for name in ("best", "last") if progress[name]),
        all(isinstance(name, str) for name in progress["bad"]), progress["dropped"] >= 0))
    if not good:
        raise utils.InputError(f"checkpoint {path}: its entry 'progress' cannot be used")
    if not (0 <= checkpoint["epoch"] < 2**31 and 0 <= progress["step"] < 2**31 and 1 <= progress["total_batch"] < 2**31):
        raise utils.InputError(f"checkpoint {path}: its epoch or step is no such number")
    return checkpoint


def new_progress():
    """What a checkpoint holds of the running epoch: updates made, sums and counts of the meters, updates dropped in a row;
    and of the run: names of bad images, images of an update, hash of the pre-trained weights, the best validation and the
    last one."""
    return {"step": 0, "totals": {}, "counts": {}, "dropped": 0, "bad": [], "total_batch": 0, "weights": "", "best": {},
            "last": {}}


def save(folder, epoch, args, source, model, average, optimizer, scaler, progress, names):
    """Write `checkpoint.pth`, from which `epoch` is to run (on), and the same as `names`. Returns whether that worked."""
    if not torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all():
        raise FloatingPointError(f"a weight became non-finite in epoch {epoch}; the last checkpoint is intact")
    # With what the evaluations of frozen weights look for.
    known = {"arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
             "global_crops_size": source.image_size}
    state = {"model": network_state(model), "optimizer": optimizer.state_dict(), "epoch": epoch,
             "args": argparse.Namespace(**vars(args) | known), "progress": progress}
    if average is not None:
        state["model_ema"] = network_state(average)
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    path = folder / CHECKPOINT
    try:
        utils.save_atomically(state, path, previous=folder / PREVIOUS)
        for name in names:
            path = folder / name
            copy_file(folder / CHECKPOINT, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        message = f"{path} could not be written ({utils.one_line(error)}); the checkpoints before it are intact"
        if args.on_save_error == "stop":
            raise utils.InputError(message) from error
        print(f"warning: {message}", file=sys.stderr, flush=True)
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


def restore(path, checkpoint, model, average, optimizer, scaler):
    """Load network, moving average, optimiser and scaler from a `read_checkpoint`."""
    load_network(model, checkpoint["model"], path)
    if average is not None:
        load_network(average, checkpoint.get("model_ema", checkpoint["model"]), path)
    utils.load_optimizer(optimizer, checkpoint["optimizer"], path)
    if scaler is not None and "scaler" in checkpoint:
        utils.load_scaler(scaler, checkpoint["scaler"], path)


def write_log(folder, line):
    """Add a line to `log.txt`. A full disk is a warning."""
    line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
    try:
        with open(folder / "log.txt", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        utils.say_once(f"warning: {folder / 'log.txt'} cannot be written ({error.strerror})")


class OtherTask(utils.InputError):
    """A checkpoint is of other weights or another task, or finished with other settings: its result must not pass for
    that of these."""


def notes_of_resume(path, checkpoint, args, rate, weights_hash):
    """Lines that say what is resumed, and what is not as it was. Raises `OtherTask`."""
    advice = "choose another --output_dir, or start over with --overwrite true"
    if checkpoint["progress"]["weights"] != weights_hash:
        raise OtherTask(f"checkpoint {path}: its run began with other weights than {args.pretrained_weights}; {advice}")
    task = {"dataset", "train_subset", "subset_seed", "finetune_head_layer", "avgpool_patchtokens"}
    free = {"output_dir", "results_dir", "load_from", "overwrite", "num_workers", "print_freq", "device", "dist_url",
            "local_rank", "save_ckpt_freq", "save_every_steps", "save_every_minutes", "on_save_error", "on_bad_image",
            "max_bad_images", "on_nonfinite", "eval", "download", "arch", "patch_size", "window_size", "pretrained_weights",
            "data_path"}
    then = vars(checkpoint["args"]) if isinstance(checkpoint.get("args"), argparse.Namespace) else {}
    differ = [name for name, value in (vars(args) | {"lr": rate}).items()
              if name not in free and name in then and repr(then[name]) != repr(value)]
    for name in differ:
        if name in task or checkpoint["epoch"] >= args.epochs:
            raise OtherTask(f"checkpoint {path}: its run had --{name} {utils.printable(then[name])}; {advice}")
    return [f"resumed from {path}"] + [
        f"note: --{name} is {rate if name == 'lr' else getattr(args, name)}, the checkpoint's run had "
        f"{utils.printable(then[name])}" for name in differ]


# ---------------------------------------------------------------- runs

def finetune(args, protocol):
    """Fine-tune, for every key and rate of `args` (of `finetune_parser`); `args` is only read.

    Returns {key: {rate: {"best", "last"}}}, records of validations. Raises `utils.InputError`, FloatingPointError for
    numbers that are not finite, and `utils.Preempted` when SIGTERM or SIGUSR1 came and the run is saved.
    """
    rates = check_args(args)
    with ExitStack() as at_end:
        signals = utils.StopSignals()
        at_end.callback(signals.restore)
        return run_all(args, protocol, rates, signals, at_end)


def run_all(args, protocol, rates, signals, at_end):
    process = utils.init_process(args.device, args.dist_url)
    main = process.rank == 0
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    runs = {(key, rate): Path(args.output_dir) / (key if len(keys) > 1 else "") / (
        f"lr_{rate:g}" if len(rates) > 1 else "") for key in keys for rate in rates}
    if args.load_from not in (None, "auto") and len(runs) > 1:
        raise utils.InputError(f"--load_from {args.load_from}: give one --checkpoint_key and one --lr, not {len(runs)} "
                               "runs")
    for (key, _), folder in runs.items():
        if args.eval:
            break
        check_folder(folder, args, protocol.best_file.replace("KEY", key))
    if main:
        print(utils.describe_run(args, process), flush=True)
    read_results(results_folder(args))  # a damaged one, or a wrong key, is not found hours later
    checkpoint = read_weights(args.pretrained_weights)
    sets = image_sets(args.dataset, args.data_path, train_subset=args.train_subset, subset_seed=args.subset_seed,
                      download=args.download)
    for key in keys:
        build_network(args, key, checkpoint, len(sets[0].classes))
    if process.world_size > 1:
        torch.distributed.barrier()  # nobody may write before all have looked

    found, trained = {key: {} for key in keys}, set()
    for (key, rate), folder in runs.items():
        if main and len(runs) > 1:
            print(f"\n==== {key}, lr {rate:g}: {folder}", flush=True)
        found[key][rate], is_new = run_one(args, protocol, key, rate, folder, checkpoint, sets, process, signals,
                                          at_end)
        trained |= {key} if is_new else set()
    for key in keys if main and not args.eval else ():
        if len(rates) > 1:
            report_sweep(args, protocol, key, found[key], key in trained)
    return found


def report_sweep(args, protocol, key, found, record):
    """Print the best of several rates, and write it into results.json if `record`."""
    best = max(found, key=lambda rate: found[rate][0]["best"]["top1"])
    print(f"\n{key}: best of {len(found)} rates")
    for rate, (records, _) in found.items():
        print(f"  lr {rate:<8g} best {described(records['best'])}; last {described(records['last'])}"
              + "  <- best" * (rate == best))
    print(end="", flush=True)
    if record:
        records, settings = found[best]
        append_result(results_folder(args), protocol.name, args.pretrained_weights, key,
                      settings | {"swept": list(found)}, records)


def described(record):
    top5 = f", top-5 {record['top5']:.2f} %" if "top5" in record else ""
    return f"top-1 {record['top1']:.2f} %{top5} (epoch {record['epoch']})"


def run_one(args, protocol, key, rate, folder, content, sets, process, signals, at_end):
    """Fine-tune one network. Returns (({"best", "last"} validations, settings of the record), whether it trained)."""
    device, main = process.device, process.rank == 0
    train, val = sets
    num_classes = len(train.classes)
    best_file = protocol.best_file.replace("KEY", key)
    utils.fix_random_seeds(args.seed)  # the same first weights of the head in all processes

    # ============ network ============
    model, source = build_network(args, key, content, num_classes)
    model = model.to(device)
    amp_dtype = utils.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    val_loader = sharded_loader(val.with_transform(val_transform(source.image_size, args.crop_pct, args.val_interpolation)),
                                max(1, args.batch_size_per_gpu * 3 // 2), args.num_workers, process,
                                persistent_workers=args.num_workers > 0, worker_init_fn=utils.ignore_signals)
    if args.eval:
        path = folder / (args.load_from if args.load_from not in (None, "auto") else best_file)
        load_network(model, utils.load_checkpoint(path).get("model"), path)
        result = validate(model, val_loader, len(val), process, amp_dtype)
        if main:
            print(f"{path}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
        return ({"best": as_record(result, None), "last": as_record(result, None)}, {}), False
    average = copy.deepcopy(model).requires_grad_(False).eval() if args.model_ema else None
    ema = None if average is None else ema_pairs(model, average)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.layer_decay, args.decay_positions), lr=0.0,
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    network = utils.data_parallel(model, device, args.accum_iter) if process.world_size > 1 else model

    # ============ data and schedules ============
    dataset = AugmentedSet(train, train_transform(
        source.image_size, args.aa, args.color_jitter, args.train_interpolation, args.reprob, args.remode, args.recount),
        args.seed, args.on_bad_image)
    batch_sampler = UpdateBatches(len(train), args.batch_size_per_gpu, args.accum_iter, process, args.seed,
                                  args.repeated_aug)
    steps, total_batch = batch_sampler.steps, args.batch_size_per_gpu * process.world_size * args.accum_iter
    if not steps:
        raise utils.InputError(f"{train.name}: {len(train)} images are fewer than one batch of {total_batch}; lower "
                               f"--batch_size_per_gpu{' or --accum_iter' * (args.accum_iter > 1)}")
    data_loader = DataLoader(dataset, batch_sampler=batch_sampler, num_workers=args.num_workers,
                             pin_memory=device.type == "cuda", persistent_workers=args.num_workers > 0,
                             worker_init_fn=utils.ignore_signals, generator=torch.Generator())
    schedules, notes = build_schedules(args, rate, steps, total_batch)
    mixing = build_mixing(args, num_classes)

    # ============ resume ============
    first_epoch, progress = 0, new_progress() | {"weights": source.weights_hash}
    path, checkpoint = find_checkpoint(folder, args.load_from, best_file) if args.load_from else (None, None)
    if path:
        try:
            notes += notes_of_resume(path, checkpoint, args, rate, source.weights_hash)
        except OtherTask as error:
            if not args.overwrite:
                raise
            notes.append(f"starting over: {error}")
            path = None
    if path:
        restore(path, checkpoint, model, average, optimizer, scaler)
        first_epoch, progress = checkpoint["epoch"], checkpoint["progress"]
        images = progress["step"] * progress["total_batch"]  # of the running epoch
        progress["step"] = min(images // total_batch, steps)
    del checkpoint
    progress["total_batch"] = total_batch
    started = first_epoch * steps + progress["step"]
    if utils.host_reduce(started) != -utils.host_reduce(-started):
        raise utils.InputError(f"--load_from {args.load_from}: the processes found different checkpoints; all nodes must "
                               f"see the same {folder}")
    settings = shared_settings(args, source, train, val) | {"lr": rate, "total_batch": total_batch} | {
        name: getattr(args, name) for name in RECORDED} | {
        "drop_path": getattr(blocks_of(model.backbone)[-1][-1].drop_path1, "drop_prob", 0.0)}
    if first_epoch >= args.epochs:
        if main:
            print(f"nothing to do: {path} has finished {first_epoch} epochs; best {described(progress['best'])}",
                  flush=True)
        return ({"best": progress["best"], "last": progress["last"]}, settings), False

    writer = None
    if main:
        start_folder(folder, best_file, first_epoch if path else None)
        writer = SummaryWriter(folder / "tf_logs", purge_step=started or None)
        at_end.callback(utils.close_writer, writer)
        print(f"data: {len(train)} training and {len(val)} validation images of {num_classes} classes, {steps} steps an "
              f"epoch, {args.num_workers} loader processes")
        print(f"network: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; precision: "
              f"{amp_dtype or torch.float32}; total batch: {total_batch}; peak learning rate: {schedules['lr'].max():.6g}")
        if args.layer_decay < 1:
            print(layer_table(model, args.layer_decay, args.decay_positions))
        where = f"starting at epoch {first_epoch} of {args.epochs}" + f", step {progress['step']}" * (progress["step"] > 0)
        print("\n".join(notes + [where]), flush=True)

    # ============ training ============
    start_time, saved_at, bad_before = time.time(), time.monotonic(), set(progress["bad"])
    check_images = partial(loader.check_images, dataset, bad_before, args.max_bad_images, folder, device)

    def wanted():
        due = main and args.save_every_minutes and time.monotonic() - saved_at > 60 * args.save_every_minutes
        return STOP if signals.received else SAVE if due else 0

    def save_now(epoch, names=()):
        """Save the run as it is before update `progress["step"]` of `epoch`; all processes call it. False if that fails."""
        nonlocal saved_at
        progress["bad"] = loader.bad_images(dataset, bad_before, device)
        saved = not main or save(folder, epoch, argparse.Namespace(**vars(args) | {"lr": rate}), source, model, average,
                                 optimizer, scaler, progress, names)
        saved_at = time.monotonic()
        return saved

    def next_batch(batches):
        """(the next batch or None at the end, whether to save). Raises `utils.Preempted` when any process got a signal:
        the hosts agree before each batch."""
        batch = signals.wait_for(partial(next, batches, None))
        want = utils.host_reduce(wanted())
        if want == STOP:
            raise utils.Preempted
        return batch, want == SAVE

    def val_batches():
        batches = iter(val_loader)
        while (batch := next_batch(batches)[0]) is not None:
            yield batch

    for epoch in range(first_epoch, args.epochs):
        batch_sampler.epoch, batch_sampler.start = epoch, progress["step"]
        is_last = epoch + 1 == args.epochs
        result = None
        try:
            train_epoch(iter(data_loader), next_batch, save_now, check_images, network, optimizer, scaler, schedules,
                        mixing, ema, epoch, steps, progress, amp_dtype, writer, args, process)
            if is_last or epoch % args.val_freq == 0:
                result = validate(model, val_batches(), len(val), process, amp_dtype)
        except utils.Preempted:
            failed = not save_now(epoch)
            if utils.host_reduce(int(failed)):
                raise utils.InputError("a signal asked to stop, but the run could not be saved") from None
            raise utils.Preempted(f"stopped by a signal at epoch {epoch}, step {progress['step']}, and saved: the same "
                                  "command with --load_from auto goes on from there") from None
        stats = {f"train_{name}": utils.mean_of(progress, name) for name in progress["totals"]}
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
        bad = loader.bad_images(dataset, bad_before, device)
        if main:
            write_log(folder, stats | {"epoch": epoch, "n_parameters": sum(p.numel() for p in model.parameters())})
            utils.log_scalars(writer, "epoch", stats, epoch)
            print(f"epoch {epoch} done: " + "  ".join(f"{k} {v:.4g}" for k, v in stats.items())
                  + (f"  best {described(progress['best'])}" if result else ""), flush=True)
            if bad:
                (folder / loader.BAD_IMAGES).write_text("\n".join(bad) + "\n")
                print(f"skipped {len(bad)} unreadable images so far; all: {folder / loader.BAD_IMAGES}", flush=True)
            if is_last:
                print(f"training time {utils.eta_string(time.time() - start_time)}; {key}, lr {rate:g}: best "
                      f"{described(progress['best'])}, last {described(progress['last'])}; {folder / best_file}",
                      flush=True)
                # A sweep's own record is that of its best rate.
                append_result(folder if "," in args.lr else results_folder(args), protocol.name,
                              args.pretrained_weights, key, settings, {k: progress[k] for k in ("best", "last")})
        progress |= {"step": 0, "totals": {}, "counts": {}}
        save_now(epoch + 1, names)
    return ({"best": progress["best"], "last": progress["last"]}, settings), True


def as_record(result, epoch):
    """A result of `validate` as it is recorded."""
    top5 = {"top5": result["acc5"]} if "acc5" in result else {}
    return {"top1": result["acc1"], **top5, "loss": result["loss"], "epoch": epoch}


def find_checkpoint(folder, load_from, best_file):
    """(path, content) of the checkpoint `load_from`, or for "auto" of the newest good one; (None, None) without any."""
    if load_from == "auto":
        return utils.find_checkpoint(checkpoint_files(folder, best_file), read_checkpoint, "--overwrite true starts over")
    return folder / load_from, read_checkpoint(folder / load_from)


def train_epoch(batches, next_batch, save_now, check_images, network, optimizer, scaler, schedules, mixing, ema, epoch,
                steps, progress, amp_dtype, writer, args, process):
    """Updates `progress["step"]` to `steps` of an epoch; `progress` is kept up to date (see `new_progress`).

    next_batch, save_now: see `run_one`; check_images is called with each log line. When `next_batch` raises
    `utils.Preempted`, the update whose batches were being fetched has not been made.
    """
    device = process.device
    names = ("loss", "grad_norm") if mixing else ("loss", "class_acc", "grad_norm")
    meters = utils.DeviceMeters(names)
    waited, since, since_step = 0.0, time.time(), progress["step"]
    network.train()

    def read_meters():
        rows = meters.read()
        for step, row in enumerate(rows, start=epoch * steps + progress["step"] - len(rows)):
            row |= {"lr": float(schedules["lr"][step]), "weight_decay": float(schedules["wd"][step])}
            row["min_lr"] = row["lr"] * optimizer.param_groups[0]["lr_scale"]
            if scaler is not None:
                row["loss_scale"] = scaler.get_scale()
            utils.count_step(progress, step, row, scaler is not None, args.on_nonfinite, quiet=not writer)
            utils.log_scalars(writer, "step", row, step)
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
        for it in range(progress["step"], steps):
            step = epoch * steps + it
            if args.save_every_steps and it and step % args.save_every_steps == 0:
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
                      + "  ".join(f"{name} {last[name]:.4f} ({utils.mean_of(progress, name):.4f})" for name in names)
                      + f"  lr {last['lr']:.2e}  {images_s:.1f} images/s  data {100 * waited / elapsed:.0f} %"
                      f"  memory {utils.peak_memory_mib(device):.0f} MiB  eta {utils.eta_string(left)}", flush=True)
                utils.log_scalars(writer, "step", {"images_per_second": images_s}, step)
            waited, since, since_step = 0.0, now, it + 1
            check_images()
    except utils.Preempted:
        read_meters()
        raise
