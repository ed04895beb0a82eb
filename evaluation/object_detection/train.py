"""Detection and instance segmentation on COCO: Cascade Mask R-CNN on a pre-trained backbone (iBOT, Tables 6, 13 and 14).

    torchrun --nproc_per_node 8 evaluation/object_detection/train.py --pretrained_weights work_dirs/J/checkpoint.pth \\
        --data_path data/coco --output_dir work_dirs/J/det/teacher                              # or ./run.sh coco_det
    python evaluation/object_detection/train.py --batch_size_per_gpu 2 --accum_iter 16 ...      # one GPU, batches of 32

                total batch  --layer_decay  --drop_path        --grid    (12 epochs, --drops 8 11, --lr 1e-4)
    ViT-S/16             32            0.8          0.1         50 63
    ViT-B/16             16           0.75          0.2         42 68
    Swin-T               16              -          0.0             -

These are the published commands' values, taken by the network's name. The reference's files say 36 epochs, drops at 27 and
33 and a decay of 0.75 (S), 0.65 (B), a Swin's 36 epochs a drop path of 0.2; the paper tries decays of 0.65, 0.75, 0.8, 0.9.
Writes `log.txt`, TensorBoard's events, `checkpoint.pth` at each epoch and, at the end, AP of the validation set into
results.json, and `detections.png`: some of its images, above with their true objects, below with those found.
"""
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
from evaluation.common.backbone import read_weights
from evaluation.common.dense import batch_note, build_training, finish_update, resume, settings_of, synchronized
from evaluation.common.protocol import start_process
from evaluation.common.reference_flags import override_words
from evaluation.common.results import append_result, read_results, results_folder
from evaluation.object_detection.cascade import LOSSES
from evaluation.object_detection.coco import Augment, GroupedBatches, TrainingImages, ValidationImages, collate
from evaluation.object_detection.detection import (
    FILES,
    OVERRIDES,
    PROGRESS,
    described,
    drawn_examples,
    drawn_truth,
    evaluate,
    new_detector,
    recipe_of,
    to_device,
    training_parser,
)
from evaluation.object_detection.draw import write_picture

METERS = ("loss", *LOSSES, "grad_norm")
RECORDED = ("epochs", "drops", "warmup_iters", "lr", "weight_decay", "layer_decay", "drop_path", "grid", "final_norm",
            "flip", "short_sides", "long_side", "crop_sides", "crop_range", "test_side", "channels", "hidden", "sampled",
            "anchor_scale", "train_proposals", "test_proposals", "seed")  # flags that set results apart


SHOWN = 4  # validation images that are drawn at the end


def check_args(args):
    """Raise `engine.InputError` for values that cannot be trained with, before anything is touched."""
    need = engine.need
    need("," not in args.checkpoint_key, f"--checkpoint_key {args.checkpoint_key}: one key at a time")
    engine.check_numbers(args, count="batch_size_per_gpu print_freq", positive="lr", below_1="drop_path",
                         not_negative="weight_decay save_every_steps save_every_minutes max_bad_images seed")
    need(args.layer_decay is None or 0 < args.layer_decay <= 1,
         f"--layer_decay must be above 0 and at most 1: {args.layer_decay}")
    need(args.crop_range[0] <= args.crop_range[1], f"--crop_range takes the smaller number first, not {args.crop_range}")
    folder = Path(args.output_dir)
    engine.check_output(folder, args.load_from, args.overwrite, FILES.held(folder))
    read_results(results_folder(args))


def schedule(lr, epochs, steps, drops, warmup):
    """Rate of every update, float64 [epochs * steps]: a tenth from the start of each epoch of `drops`, times a linear
    warm-up of `warmup` updates from a thousandth (mmdetection's "step")."""
    update = np.arange(epochs * steps)
    falls = np.sum([update // steps >= drop for drop in set(drops)] or [0 * update], axis=0)
    ramp = 1 - (1 - np.minimum(update / max(warmup, 1), 1)) * (1 - 0.001)
    return lr * 0.1 ** falls * (ramp if warmup else 1)


def train(args):
    """Train and evaluate as `args` (of `training_parser`) say. Raises `engine.InputError`, FloatingPointError for numbers
    that are not finite, and `engine.Preempted` when a signal came and the run is saved."""
    check_args(args)
    with engine.StopSignals() as signals:
        process = start_process(args)
        torch.backends.cudnn.benchmark = False  # each batch has another size
        with engine.Run(args, process, signals, Path(args.output_dir), FILES, {"metrics": PROGRESS["metrics"]}) as run:
            train_detector(args, run)


def train_detector(args, run):
    process, device = run.process, run.process.device
    utils.fix_random_seeds(args.seed)  # the same new weights on all processes

    # ============ network, data ============
    content = read_weights(args.pretrained_weights)
    augment = Augment(args.flip, args.short_sides, args.long_side, args.crop_sides, args.crop_range)
    train_images = TrainingImages(args.data_path, augment, seed=args.seed, on_bad_image=args.on_bad_image)
    categories = train_images.categories
    args, detector, source, network = new_detector(args, content, len(categories.ids))
    run.args = args
    train_images.normalize = source.normalize
    test_images = ValidationImages(args.data_path, args.test_side, args.long_side, source.normalize)
    engine.need(test_images.categories == categories,
                f"--data_path {args.data_path}: the two splits have different categories")
    detector = synchronized(detector.to(device), process)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
    sampler = GroupedBatches(train_images.aspects, args.batch_size_per_gpu, args.accum_iter, process, args.seed)
    total_batch = args.batch_size_per_gpu * args.accum_iter * process.world_size

    # ============ schedule, optimizer ============
    lr = schedule(args.lr, args.epochs, sampler.steps, args.drops, args.warmup_iters)
    training = build_training(detector, args, process, amp_dtype)

    # ============ resume ============
    settings = settings_of(args, source, (len(train_images), len(test_images)), RECORDED, total_batch, amp_dtype)
    run.entries = {"network": network, "categories": categories._asdict(), "settings": settings,
                   "source": {"checkpoint": str(args.pretrained_weights), "key": args.checkpoint_key}}
    notes = [note for note in [batch_note(total_batch, recipe_of(source.arch)["batch"], args.accum_iter)] if note]
    parts = {"model": detector, "optimizer": training.optimizer, "fp16_scaler": training.scaler}
    notes += resume(run, "detection", ("weights_hash", "categories"), RECORDED, parts, total_batch, sampler.steps)
    finished = run.progress["metrics"]
    if finished:
        if run.is_main:
            print(f"nothing to do: {run.path} has finished {run.epoch} epochs; {described(finished)}", flush=True)
        return
    run.start(train_images)
    run.schedules = {"lr": lr}
    if run.is_main:
        print(engine.describe_run(args, process))
        print(f"data: {len(train_images)} training and {len(test_images)} validation images, {len(categories.ids)} "
              f"classes, {sampler.steps} steps an epoch, {args.num_workers} loader processes")
        print(f"detector: {sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M parameters; precision: "
              f"{amp_dtype or torch.float32}; total batch: {total_batch}")
        ended = f"{run.path} has finished {run.epoch} epochs and is evaluated"
        print("\n".join([*notes, run.where() if run.epoch < args.epochs else ended]), flush=True)

    # ============ training, evaluation ============
    loader = DataLoader(train_images, batch_sampler=sampler, num_workers=args.num_workers, collate_fn=collate,
                        pin_memory=device.type == "cuda", persistent_workers=args.num_workers > 0,
                        worker_init_fn=engine.ignore_signals, generator=torch.Generator())
    start_time = time.time()
    for epoch in range(run.epoch, args.epochs):
        sampler.epoch, sampler.start = epoch, run.step
        train_one_epoch(run, iter(loader), training, lr, args)
        run.end_epoch({f"train_{name}": value for name, value in run.means().items()}, run.means())
        run.next_epoch()
    metrics = evaluate(detector, test_images, process, amp_dtype, args.num_workers, partial(run.fetch, training=False))
    if run.is_main:
        print(f"training and evaluation: {engine.eta_string(time.time() - start_time)}; {described(metrics)}", flush=True)
        write_picture([drawn_truth(test_images, SHOWN), drawn_examples(detector, test_images, amp_dtype, SHOWN)],
                      run.folder / "detections.png")
        append_result(results_folder(args), "coco", args.pretrained_weights, args.checkpoint_key, settings, metrics)
    run.progress["metrics"] = metrics
    run.save()


def train_one_epoch(run, batches, training, lr, args):
    """The updates that are left of an epoch."""
    training.network.train()
    device = run.process.device

    def fetched():
        images, sizes, targets = run.fetch(batches)
        return images.to(device, non_blocking=True), sizes, [to_device(target, device) for target in targets]

    for it in run.updates():
        # What is sampled and dropped depends on the update alone, so that a resumed run draws the same.
        utils.fix_random_seeds(utils.seed_of(args.seed, run.epoch, it, run.process.rank))
        run.add(train_step((fetched() for _ in range(args.accum_iter)), training, lr[run.update], args.accum_iter))
        if run.is_log_step(it):
            run.log(METERS[:-1])


def train_step(batches, training, lr, accum_iter=1):
    """One update, without waiting for the device; none if a gradient of any process is not finite.

    Args:
        batches: `accum_iter` of (images [B, 3, H, W], sizes, targets) as `CascadeMaskRCNN` takes them, one by one.
        lr: of groups with "lr_scale" 1.

    Returns METERS by name, 0-d tensors.
    """
    network, optimizer, scaler, amp_dtype = training
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
    optimizer.zero_grad()
    rows = []
    for i, (images, sizes, targets) in enumerate(batches):
        with network.no_sync() if engine.get_world_size() > 1 and i + 1 < accum_iter else nullcontext():
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                losses = network(images, sizes, targets)
            loss = sum(losses.values())
            (loss if scaler is None else scaler.scale(loss)).div(accum_iter).backward()
        rows.append(torch.stack([loss, *losses.values()]).detach())
    grad_norm = finish_update(training)
    return dict(zip(METERS, (*torch.stack(rows).mean(dim=0), grad_norm), strict=True))


def main():
    train(training_parser("Cascade Mask R-CNN on COCO").parse_args(override_words(sys.argv[1:], OVERRIDES)))


if __name__ == "__main__":
    engine.run(main)
