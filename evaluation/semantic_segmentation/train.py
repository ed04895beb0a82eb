"""Semantic segmentation of ADE20K (iBOT, Tables 6 and 14): UPerNet, or a linear head on the frozen network.

    python evaluation/semantic_segmentation/train.py --pretrained_weights work_dirs/J/checkpoint.pth --output_dir seg
    torchrun --nproc_per_node 8 evaluation/semantic_segmentation/train.py --pretrained_weights ... --batch_size_per_gpu 2
    python evaluation/semantic_segmentation/train.py --head linear --pretrained_weights ... --accum_iter 4

The recipe is that of the network, for batches of 16 images, which --accum_iter reaches on fewer GPUs:

                         --lr  --layer_decay  --weight_decay  --drop_path  --width  --inference
    UPerNet, ViT-S/16    3e-5            0.9            0.05          0.1      384        slide  (paper: layer decay 0.65)
    UPerNet, ViT-B/16    8e-5           0.65            0.05          0.1      768        slide  (file: lr 7e-4)
    UPerNet, Swin-T      6e-5              1            0.01          0.3      512        whole
    linear, ViT          8e-4              -            0.05            -        -        slide  (file: 7e-4, ViT-S 3e-5)

The paper takes the best of the rates 3e-5, 8e-5, 1e-4, 3e-4 and 8e-4. Data: images/ and annotations/, each with training/
and validation/. Writes `log.txt`, TensorBoard's events and `checkpoint.pth` into the output folder and, after the
evaluation at the end, `classes.tsv`, `segmentations.png` and a record in `results.json`. The mechanics are engine.Run's.
"""
import argparse
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from torch.utils.data import DataLoader

import engine
import utils
from evaluation.common.arguments import checkpoint_keys
from evaluation.common.backbone import read_weights
from evaluation.common.dense import batch_note, build_training, finish_update, resume, settings_of, synchronized
from evaluation.common.protocol import start_process
from evaluation.common.reference_flags import override_words
from evaluation.common.results import append_result, read_results, results_folder
from evaluation.semantic_segmentation.ade20k import RandomBatches, TrainingImages, class_names, read_pairs, scores
from evaluation.semantic_segmentation.heads import losses
from evaluation.semantic_segmentation.segmentation import (
    BATCH,
    FILES,
    OVERRIDES,
    PROGRESS,
    PROTOCOLS,
    class_table,
    described,
    evaluate,
    new_segmenter,
    test_images,
    training_parser,
    write_classes,
    write_pictures,
)

RECORDED = ("head", "iterations", "warmup_iterations", "lr", "weight_decay", "layer_decay", "drop_path", "width",
            "final_norm", "num_classes", "crop_size", "short_side", "long_side", "inference", "slide_stride", "seed")
PICTURES = 6  # validation images that are drawn at the end


def check_args(args, folders):
    """Raise `engine.InputError` for values that cannot be trained with, before anything is touched."""
    need = engine.need
    engine.check_numbers(args, count="batch_size_per_gpu print_freq", positive="lr", below_1="drop_path",
                         not_negative="weight_decay save_every_steps save_every_minutes max_bad_images seed")
    need(args.layer_decay is None or 0 < args.layer_decay <= 1,
         f"--layer_decay must be above 0 and at most 1: {args.layer_decay}")
    need(args.num_classes <= 254, f"--num_classes {args.num_classes}: annotations of 8 bits hold 254")
    need(args.long_side >= args.short_side, f"--long_side {args.long_side} is less than --short_side {args.short_side}")
    need(args.slide_stride <= args.crop_size, f"--slide_stride {args.slide_stride} leaves gaps between windows of "
                                              f"--crop_size {args.crop_size}")
    need(args.iterations % min(args.epoch_iterations, args.iterations) == 0,
         f"--iterations {args.iterations} is no multiple of --epoch_iterations {args.epoch_iterations}")
    for folder in folders:
        engine.check_output(folder, args.load_from, args.overwrite, FILES.held(folder))
    read_results(results_folder(args))


def schedule(lr, iterations, warmup):
    """Rate of every update, float64 [iterations]: linear to 0 ("poly", power 1), times a linear warm-up from 1e-6."""
    i = np.arange(iterations)
    ramp = 1 - (1 - np.minimum(i / max(warmup, 1), 1)) * (1 - 1e-6)
    return lr * (1 - i / iterations) * (ramp if warmup else 1)


def train(args):
    """Train and evaluate as `args` (of `training_parser`) say, for every key. Raises `engine.InputError`,
    FloatingPointError for numbers that are not finite, `engine.Preempted` when a signal came and the run is saved."""
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    folders = {key: Path(args.output_dir) / (key if len(keys) > 1 else "") for key in keys}
    check_args(args, folders.values())
    with engine.StopSignals() as signals:
        process = start_process(args)
        content = read_weights(args.pretrained_weights)
        sets = [read_pairs(args.data_path, split) for split in ("training", "validation")]
        for key in keys:
            new_segmenter(args, key, content)  # a wrong one is not found hours later
        if process.world_size > 1:
            torch.distributed.barrier()  # nobody may write before all have looked
        for key, folder in folders.items():
            # engine.Run counts epochs: here of as many updates as come between two saves.
            epochs = args.iterations // min(args.epoch_iterations, args.iterations)
            own = argparse.Namespace(**vars(args), epochs=epochs)
            with engine.Run(own, process, signals, folder, FILES, {"metrics": PROGRESS["metrics"]}) as run:
                train_segmenter(own, run, key, content, sets)


def build_loader(args, pairs, source, process):
    """The DataLoader of this process's batches, one after another to the end of the training."""
    dataset = TrainingImages(pairs, args.num_classes, args.seed, args.on_bad_image, side=args.crop_size,
                             bounds=(args.short_side, args.long_side), stats=source.pixel_stats)
    batches = RandomBatches(len(pairs), args.batch_size_per_gpu, process, args.seed, args.iterations * args.accum_iter)
    engine.need(batches.in_pass, f"--data_path {args.data_path}: {len(pairs)} training images are fewer than one batch of "
                                 f"{args.batch_size_per_gpu * process.world_size}; lower --batch_size_per_gpu")
    # UPerNet pools to one value a channel, of which batch norm needs two.
    engine.need(args.head == "linear" or args.batch_size_per_gpu > 1 or process.device.type == "cuda"
                and process.world_size > 1, "--batch_size_per_gpu 1: batch norm needs 2, or several GPUs")
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers, generator=torch.Generator(),
                      pin_memory=process.device.type == "cuda", worker_init_fn=engine.ignore_signals)


def train_segmenter(args, run, key, content, sets):
    process, device = run.process, run.process.device
    train_pairs, val_pairs = sets
    utils.fix_random_seeds(args.seed)  # the same new weights on all processes

    # ============ network, data ============
    args, model, source, network, note = new_segmenter(args, key, content)
    run.args = args
    model = synchronized(model.to(device), process)
    loader = build_loader(args, train_pairs, source, process)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    total_batch, steps = args.batch_size_per_gpu * process.world_size * args.accum_iter, args.iterations // args.epochs

    # ============ schedule, optimizer ============
    lr = schedule(args.lr, args.iterations, args.warmup_iterations)
    training = build_training(model, args, process, amp_dtype)

    # ============ resume ============
    settings = settings_of(args, source, (len(train_pairs), len(val_pairs)), RECORDED, total_batch, amp_dtype)
    run.entries = {"network": network, "settings": settings,
                   "source": {"checkpoint": str(args.pretrained_weights), "key": key}}
    notes = [text for text in (note, batch_note(total_batch, BATCH, args.accum_iter)) if text]
    parts = {"model": model, "optimizer": training.optimizer, "fp16_scaler": training.scaler}
    notes += resume(run, "segmentation", ("weights_hash", "head", "num_classes"), RECORDED, parts, total_batch, steps)
    if run.progress["metrics"]:
        if run.is_main:
            print(f"{run.where()}; {described(run.progress['metrics'])}", flush=True)
        return
    run.start(loader.dataset)
    run.schedules = {"lr": lr}
    if run.is_main:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"data: {len(train_pairs)} training and {len(val_pairs)} validation images, {args.num_classes} classes, "
              f"{args.num_workers} loader processes")
        whole = sum(p.numel() for p in model.parameters())
        print(f"network: {whole / 1e6:.1f} M parameters, {trained / 1e6:.2f} M of them trained; "
              f"precision: {amp_dtype or torch.float32}; total batch: {total_batch}; an epoch: {steps} updates")
        ended = f"{run.path} has finished {args.iterations} updates and is evaluated"
        print("\n".join([*notes, run.where() if run.epoch < args.epochs else ended]), flush=True)

    # ============ training, evaluation ============
    start_time = time.time()
    loader.batch_sampler.start = run.update * args.accum_iter
    train_all(run, iter(loader) if run.update < args.iterations else None, training, model, network, lr, val_pairs, args)
    if run.is_main:
        metrics = run.progress["metrics"]
        print(f"training and evaluation: {engine.eta_string(time.time() - start_time)}; {key}: {described(metrics)}; "
              f"{run.folder / 'classes.tsv'}, {run.folder / 'segmentations.png'}", flush=True)
        append_result(results_folder(args), PROTOCOLS[args.head], args.pretrained_weights, key, settings, metrics)
    run.save()


def train_all(run, batches, training, model, network, lr, val_pairs, args):
    """The epochs that are left, and the evaluation at their end. Raises `engine.Preempted` when a process wants to stop."""
    dataset, amp_dtype = test_images(val_pairs, network), training.amp_dtype
    fetch = partial(run.fetch, training=False)
    for epoch in range(run.epoch, args.epochs):
        train_one_epoch(run, batches, training, lr, args)
        stats = {f"train_{name}": value for name, value in run.means().items()}
        if args.val_freq and (epoch + 1) % args.val_freq == 0 and epoch + 1 < args.epochs:
            matrix = evaluate(model, dataset, network, run.process, amp_dtype, args.num_workers, fetch)
            stats |= {f"test_{name}": value for name, value in scores(matrix)[0].items()}
        run.end_epoch(stats, stats)
        run.next_epoch()
    matrix = evaluate(model, dataset, network, run.process, amp_dtype, args.num_workers, fetch)
    run.progress["metrics"] = scores(matrix)[0]
    if run.is_main:
        names = class_names(args.data_path, args.num_classes)
        write_classes(class_table(matrix, names), run.folder / "classes.tsv")
        write_pictures([(model, network)], val_pairs[:PICTURES], names, run.process.device, amp_dtype,
                       run.folder / "segmentations.png")


def train_one_epoch(run, batches, training, lr, args):
    """The updates that are left of an epoch."""
    training.network.train()
    device, rank = run.process.device, run.process.rank

    def fetched():
        images, labels = run.fetch(batches)
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    for it in run.updates():
        # All batches first: one that a signal keeps away must not find batch norm changed by those before it.
        taken = [fetched() for _ in range(args.accum_iter)]
        # What is dropped depends on the update alone, so that a resumed run drops the same.
        utils.fix_random_seeds(utils.seed_of(args.seed, run.update, rank))
        means = train_step(taken, training, lr[run.update])
        run.add(means)
        if run.is_log_step(it):
            run.log(means)


def train_step(batches, training, lr):
    """One update, without waiting for the device; none if the loss or a gradient of any process is not finite.

    Args:
        batches: list of (normalised images [B, 3, H, W], labels int64 [B, H, W]) on the device.
        lr: of groups with "lr_scale" 1.

    Returns {"loss", "acc", "grad_norm" and with an auxiliary head "aux"}, 0-d tensors; see `heads.losses`.
    """
    network, optimizer, scaler, amp_dtype = training
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
    optimizer.zero_grad()
    rows = []
    for i, batch in enumerate(batches):
        with network.no_sync() if engine.get_world_size() > 1 and i + 1 < len(batches) else nullcontext():
            with torch.autocast(batch[0].device.type, amp_dtype, enabled=amp_dtype is not None):
                values = losses(network, batch)
            loss = values["loss"] / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()
        rows.append({name: value.detach() for name, value in values.items()})
    means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
    grad_norm = finish_update(training, means["loss"])
    return {**means, "grad_norm": grad_norm}


def main():
    train(training_parser("Semantic segmentation on ADE20K").parse_args(override_words(sys.argv[1:], OVERRIDES)))


if __name__ == "__main__":
    engine.run(main)
