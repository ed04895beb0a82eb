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
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.utils.data import DataLoader

import engine
import models
import utils
from evaluation.common.arguments import checkpoint_keys
from evaluation.common.augment import AugmentedSet, UpdateBatches, train_transform, val_transform
from evaluation.common.backbone import read_weights
from evaluation.common.classifier import build_network, layer_table
from evaluation.common.features import sharded_loader
from evaluation.common.finetune_flags import check_args, is_mixing
from evaluation.common.protocol import read_sets, start_process
from evaluation.common.results import append_result, read_results, results_folder, shared_settings

RECORDED = ("epochs", "layer_decay", "finetune_head_layer", "init_scale", "drop", "attn_drop_rate", "lr_for_batch",
            "schedule", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "weight_decay_end", "decay_positions",
            "clip_grad", "aa", "color_jitter", "hflip", "train_interpolation", "reprob", "remode", "recount", "mixup",
            "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "smoothing", "repeated_aug",
            "crop_pct", "val_interpolation", "val_freq", "seed")  # flags that set results apart
# What a checkpoint holds, and of the run beside engine.PROGRESS: hashes of the pre-trained weights and of the training
# images' names, number of these, the best validation and the last one.
KINDS = {"model": dict, "optimizer": dict, "progress": dict}
PROGRESS = {"weights": "", "names": "", "images": 0, "best": {}, "last": {}}
# Flags that make another task of a run, and those that may change without a word.
TASK = {"dataset", "train_subset", "subset_seed", "finetune_head_layer", "avgpool_patchtokens"}
FREE = {"results_dir", "save_ckpt_freq", "on_nonfinite", "eval", "download", "arch", "patch_size", "window_size",
        "pretrained_weights", "data_path", "enable_deepspeed", "log_dir", "nb_classes", "out_dim"}


@dataclass(frozen=True)
class Protocol:
    """`name` of its records in results.json; file of the best weights, with KEY for the checkpoint's key; whether an
    accuracy that equals the best so far counts as the best."""
    name: str
    best_file: str = "checkpoint-best.pth"
    later_wins: bool = False

    def files(self, key):
        return engine.Files(numbered="checkpoint-[0-9]*.pth", best=self.best_file.replace("KEY", key))


class Training(NamedTuple):
    """What an update changes, and how; scaler, mixing (`build_mixing`), average (`ema_pairs`) and type of mixed precision
    may be None."""
    network: nn.Module  # a `Classifier`, for several processes wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    mixing: Mixup | None = None
    ema: tuple | None = None
    amp_dtype: torch.dtype | None = None


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


def train_step(batches, training, lr, weight_decay, smoothing=0.0, clip_grad=0.0, ema_decay=0.9999, accum_iter=1):
    """One update, without waiting for the device; none if the loss or a gradient of any process is not finite.

    Args:
        batches: `accum_iter` batches (normalised images [B, 3, H, W], labels [B]) on the device, taken one by one.
        training: a `Training`; its mixing changes the images in place.
        lr, weight_decay: of groups with "lr_scale" 1, and of decayed ones.
        smoothing: of labels that are not mixed.
        clip_grad: largest norm of all gradients together; 0: any.

    Returns {"loss", "class_acc", "grad_norm"}, 0-d tensors; `class_acc`, a share, is not there with mixing. The norm is
    that before clipping.
    """
    network, optimizer, scaler, mixing, ema, amp_dtype = training
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


def train_one_epoch(run, batches, training, schedules, args):
    """The updates that are left of an epoch. Raises `engine.Preempted` when any process wants to stop."""
    device = run.process.device
    training.network.train()
    for it in run.updates():
        seed_update(args.seed, run.epoch, it, run.process.rank)
        fetched = (run.fetch(batches) for _ in range(args.accum_iter))
        means = train_step(
            ([part.to(device, non_blocking=True) for part in batch] for batch in fetched), training,
            schedules["lr"][run.update], schedules["wd"][run.update], args.smoothing, args.clip_grad, args.model_ema_decay,
            args.accum_iter)
        run.add(means)
        if run.is_log_step(it):
            run.log(means)


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


def as_record(result, epoch):
    """A result of `validate` as it is recorded."""
    top5 = {"top5": result["acc5"]} if "acc5" in result else {}
    return {"top1": result["acc1"], **top5, "loss": result["loss"], "epoch": epoch}


def described(validation):
    top5 = f", top-5 {validation['top5']:.2f} %" if "top5" in validation else ""
    return f"top-1 {validation['top1']:.2f} %{top5} (epoch {validation['epoch']})"


# ---------------------------------------------------------------- going on

def read_checkpoint(path, kinds=KINDS, what="fine-tuning", blank=engine.PROGRESS | PROGRESS):
    """As `engine.read_checkpoint`, for a file of fine-tuning."""
    checkpoint = engine.read_checkpoint(path, kinds, what, blank)
    if any(checkpoint["progress"][name] and not checkpoint["progress"][name].keys() >= {"top1", "epoch"}
           for name in ("best", "last")):
        raise engine.InputError(f"checkpoint {path}: its entry 'progress' cannot be used")
    return checkpoint


class OtherTask(engine.InputError):
    """A checkpoint is of other weights or another task, or finished with other settings: its result must not pass for
    that of these."""


def notes_of_resume(run, task):
    """Lines that say what is resumed, and what is not as it was. task: the first three of PROGRESS. Raises `OtherTask`."""
    if not run.path:
        return []
    advice = "choose another --output_dir, or start over with --overwrite true"
    then, finished = run.checkpoint["progress"], run.checkpoint["epoch"] >= run.args.epochs
    if then["weights"] != task["weights"]:
        raise OtherTask(f"checkpoint {run.path}: its run began with other weights than {run.args.pretrained_weights}; "
                        f"{advice}")
    for name in engine.changed_flags(vars(run.args), run.checkpoint, engine.FREE_FLAGS | FREE):
        if name in TASK or finished:
            value = engine.printable(getattr(run.checkpoint["args"], name))
            raise OtherTask(f"checkpoint {run.path}: its run had --{name} {value}; {advice}")
    # Folders may move, and lose a few bad images in the course of a run.
    other_images = then["names"] != task["names"]
    if other_images and (finished or abs(then["images"] / task["images"] - 1) > 0.01):
        raise OtherTask(f"checkpoint {run.path}: its run had other training images, {then['images']}, than the "
                        f"{task['images']} here; {advice}")
    return run.changes(FREE) + [
        f"note: there are {task['images']} training images, the checkpoint's run had {then['images']}"] * other_images


def resume(run, task, parts, total_batch, steps):
    """Go on from the checkpoint that `--load_from` means, see `engine.Run.resume`. Returns notes about it."""
    run.find(KINDS, "fine-tuning", read_checkpoint)
    try:
        notes = notes_of_resume(run, task)
    except OtherTask as error:
        if not run.args.overwrite:
            raise
        run.forget()
        notes = [f"starting over: {error}"]
    if run.path:
        run.checkpoint.setdefault("model_ema", run.checkpoint["model"])  # of a run without an average
    run.resume(parts, total_batch, steps)
    run.progress |= task
    return notes


# ---------------------------------------------------------------- runs

def finetune(args, protocol):
    """Fine-tune, for every key and rate of `args` (of `finetune_parser`); `args` is only read.

    Returns {key: {rate: what `run_one` does}}, of several rates without those that diverge. Raises `engine.InputError`,
    FloatingPointError where no rate is left, and `engine.Preempted` when SIGTERM or SIGUSR1 came and the run is saved.
    """
    rates = check_args(args)
    with engine.StopSignals() as signals:
        process = start_process(args)
        keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
        folders = {(key, rate): Path(args.output_dir) / (key if len(keys) > 1 else "") / (
            f"lr_{rate:g}" if len(rates) > 1 else "") for key in keys for rate in rates}
        checkpoint, sets = look_at_input(args, protocol, folders, process)
        found, diverged = {key: {} for key in keys}, {key: {} for key in keys}
        for (key, rate), folder in folders.items():
            if process.rank == 0 and len(folders) > 1:
                print(f"\n==== {key}, lr {rate:g}: {folder}", flush=True)
            # A sweep's own record is that of its best rate.
            own = argparse.Namespace(**vars(args) | {"lr": rate} | ({"results_dir": str(folder)} if len(rates) > 1 else {}))
            try:
                with engine.Run(own, process, signals, folder, protocol.files(key), PROGRESS) as run:
                    found[key][rate] = run_one(run, own, protocol, key, checkpoint, sets)
            except FloatingPointError as error:  # of numbers that all processes share
                if len(rates) == 1:
                    raise
                diverged[key][rate] = str(error)
                if process.rank == 0:
                    print(f"lr {rate:g} diverged: {error}", flush=True)
        if process.rank == 0 and len(rates) > 1 and not args.eval:
            for key in keys:
                report_sweep(args, protocol, key, rates, found[key], diverged[key])
    if not all(found.values()):
        lost = ", ".join(key for key in keys if not found[key])
        raise FloatingPointError(f"all rates of --lr {args.lr} diverged for {lost}; give lower ones")
    return found


def look_at_input(args, protocol, folders, process):
    """What is wrong is not found hours later. Returns the weights' file and the sets; folders: {(key, rate): folder}."""
    main, keys = process.rank == 0, dict.fromkeys(key for key, _ in folders)
    if main and args.enable_deepspeed:
        print("note: --enable_deepspeed is ignored: precision is --amp_dtype's, and batches add up by --accum_iter")
    if main and args.log_dir:
        print(f"note: --log_dir {args.log_dir} is ignored: TensorBoard's events go to tf_logs/ in the output folder")
    if args.load_from not in (None, "auto") and (len(folders) > 1 or args.overwrite):
        raise engine.InputError(f"--load_from {args.load_from}: give one --checkpoint_key and one --lr, and no --overwrite")
    for (key, _), folder in folders.items():
        held = protocol.files(key).held(folder)
        if args.overwrite and not args.eval and any(
                path.is_file() and os.path.exists(args.pretrained_weights) and path.samefile(args.pretrained_weights)
                for path in held):
            raise engine.InputError(f"--overwrite would delete {args.pretrained_weights}, the pre-trained weights; choose "
                                   f"another --output_dir than {folder}")
        engine.check_output(folder, args.load_from, args.overwrite or args.eval, held)
    read_results(results_folder(args))  # a damaged one
    checkpoint, sets = read_weights(args.pretrained_weights), read_sets(args)
    if args.nb_classes not in (0, len(sets[0].classes)):
        raise engine.InputError(f"--nb_classes {args.nb_classes}: {sets[0].name} has {len(sets[0].classes)} classes; leave "
                               "the flag out")
    for key in keys:
        build_network(args, key, checkpoint, len(sets[0].classes))
    if process.world_size > 1:
        torch.distributed.barrier()  # nobody may write before all have looked
    return checkpoint, sets


def record(args, protocol, key, settings, validations):
    """`append_result`, unless it is there: a finished run may be started again, or have been killed as it ended."""
    metrics = {name: validations[name] for name in ("best", "last")}
    new = {"protocol": protocol.name, "key": key, "settings": settings, "metrics": metrics}
    folder = results_folder(args)
    if not any(all(old.get(name) == value for name, value in new.items()) for old in read_results(folder)):
        append_result(folder, protocol.name, args.pretrained_weights, key, settings, metrics)


def report_sweep(args, protocol, key, rates, found, diverged):
    """Print the best of several rates, and write it into results.json. diverged: {rate: what happened}."""
    best = max(found, key=lambda rate: found[rate][0]["best"]["top1"], default=None)
    print(f"\n{key}: best of {len(rates)} rates")
    for rate, (validations, _) in found.items():
        print(f"  lr {rate:<8g} best {described(validations['best'])}; last {described(validations['last'])}"
              + "  <- best" * (rate == best))
    print("".join(f"  lr {rate:<8g} diverged: {text}\n" for rate, text in diverged.items()), end="", flush=True)
    if found:
        validations, settings = found[best]
        settings = settings | {"swept": rates} | ({"diverged": list(diverged)} if diverged else {})
        record(args, protocol, key, settings, validations)


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


def run_one(run, args, protocol, key, content, sets):
    """Fine-tune one network at the rate `args.lr`. Returns the run's progress, with "best" and "last", and settings."""
    process, device = run.process, run.process.device

    # ============ network, data ============
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    utils.fix_random_seeds(args.seed)  # the same first weights of the head in all processes
    model, source = build_network(args, key, content, len(sets[0].classes))
    model = model.to(device)
    loaders = build_loaders(args, sets, source, process)
    if args.eval:
        path = run.folder / (args.load_from if args.load_from not in (None, "auto") else run.files.best)
        return evaluate_weights(path, model, loaders[1], process, amp_dtype), {}
    steps, total_batch = loaders[0].batch_sampler.steps, args.batch_size_per_gpu * process.world_size * args.accum_iter

    # ============ schedules, optimizer ============
    schedules, notes = build_schedules(args, args.lr, steps, total_batch)
    groups = utils.get_params_groups(model, args.layer_decay, decay_positions=args.decay_positions)
    optimizer = utils.build_optimizer("adamw", groups, device)
    scaler = torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None
    average = copy.deepcopy(model).requires_grad_(False).eval() if args.model_ema else None

    # ============ resume ============
    names = hashlib.sha256("\n".join(sets[0].paths()).encode(errors="surrogateescape")).hexdigest()
    # Weights in files have the names of the backbone alone, and `head.`: what timm's ViT reads too.
    parts = {"model": engine.Named(model, drop="backbone."), "optimizer": optimizer, "scaler": scaler,
             "model_ema": average and engine.Named(average, drop="backbone.")}
    task = {"weights": source.weights_hash, "names": names, "images": len(sets[0])}
    notes += resume(run, task, parts, total_batch, steps)
    finished = run.epoch >= args.epochs  # such a run stays what it was
    settings = shared_settings(args, source, *sets) | {
        "lr": args.lr, "total_batch": run.progress["total_batch"] if finished else total_batch} | {
        name: getattr(args, name) for name in RECORDED} | {
        "drop_path": getattr(utils.blocks_of(model.backbone)[-1][-1].drop_path1, "drop_prob", 0.0)}
    if finished:
        if run.is_main:
            print(f"{run.where()}; best {described(run.progress['best'])}", flush=True)
            record(args, protocol, key, settings, run.progress)
        return run.progress, settings

    run.start(loaders[0].dataset)
    run.schedules = {"lr": schedules["lr"], "weight_decay": schedules["wd"],
                     "min_lr": schedules["lr"] * optimizer.param_groups[0]["lr_scale"]}
    run.args = argparse.Namespace(**vars(args) | {  # with what the evaluations of frozen weights look for
        "arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
        "global_crops_size": source.image_size, **source.pixel_stats.as_settings()})
    if run.is_main:
        print(f"data: {len(sets[0])} training and {len(sets[1])} validation images of {len(sets[0].classes)} classes, "
              f"{steps} steps an epoch, {args.num_workers} loader processes")
        print(f"network: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; precision: "
              f"{amp_dtype or torch.float32}; total batch: {total_batch}; peak learning rate: {schedules['lr'].max():.6g}")
        if args.layer_decay < 1:
            print(layer_table(model, args.layer_decay, args.decay_positions))
        print("\n".join([*notes, run.where()]), flush=True)

    # ============ training ============
    start_time = time.time()
    network = engine.data_parallel(model, device, args.accum_iter) if process.world_size > 1 else model
    training = Training(network, optimizer, scaler, build_mixing(args, len(sets[0].classes)),
                        average and ema_pairs(model, average), amp_dtype)
    train_all_epochs(run, args, training, model, loaders, schedules, protocol.later_wins)
    if run.is_main:
        print(f"training time {engine.eta_string(time.time() - start_time)}; {key}, lr {args.lr:g}: best "
              f"{described(run.progress['best'])}, last {described(run.progress['last'])}; {run.folder / run.files.best}",
              flush=True)
        record(args, protocol, key, settings, run.progress)
    return run.progress, settings


def train_all_epochs(run, args, training, model, loaders, schedules, later_wins):
    """The epochs that are left, each with its validation. Raises `engine.Preempted` when any process wants to stop."""
    train_loader, val_loader = loaders
    for epoch in range(run.epoch, args.epochs):
        train_loader.batch_sampler.epoch, train_loader.batch_sampler.start = epoch, run.step
        train_one_epoch(run, iter(train_loader), training, schedules, args)
        stats = {f"train_{name}": value for name, value in run.means().items()}
        is_last, names, note = epoch + 1 == args.epochs, [], ""
        if is_last or epoch % args.val_freq == 0:
            batches = iter(partial(run.fetch, iter(val_loader), training=False), None)
            result = validate(model, batches, len(val_loader.dataset), run.process, training.amp_dtype)
            stats |= {f"test_{name}": value for name, value in result.items()}
            run.progress["last"] = as_record(result, epoch)
            before = run.progress["best"].get("top1", -1.0)
            if result["acc1"] > before or later_wins and result["acc1"] == before:
                run.progress["best"] = run.progress["last"]
                names.append(run.files.best)
            note = f"  best {described(run.progress['best'])}"
        if args.save_ckpt_freq and (is_last or (epoch + 1) % max(1, int(args.save_ckpt_freq * args.epochs / 100)) == 0):
            names.append(f"checkpoint-{epoch}.pth")
        size = sum(p.numel() for p in model.parameters())
        run.end_epoch({**stats, "epoch": epoch, "n_parameters": size}, stats, note)
        run.next_epoch(names)


def evaluate_weights(path, model, val_loader, process, amp_dtype):
    """`--eval`: print how good the weights in a file are. Returns them as {"best", "last"}."""
    engine.load_part("model", engine.Named(model, drop="backbone."), engine.load_checkpoint(path), path)
    result = validate(model, val_loader, len(val_loader.dataset), process, amp_dtype)
    if process.rank == 0:
        print(f"{path}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)
    return dict.fromkeys(("best", "last"), as_record(result, None))
