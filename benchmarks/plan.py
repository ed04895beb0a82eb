"""What a pre-training would take here, before it is paid for: `./run.sh plan [--recipe NAME] --data_path FOLDER [flags]`.

    ./run.sh plan --recipe vit_s16_800ep --data_path data/imagenet/train
    ./run.sh plan --recipe vit_b16_400ep --data_path data/imagenet/train --devices 32

Takes the flags of main_ibot.py, makes ten batches with its loader and ten of its updates, and says how fast each is, which
of them limits, how many images fit at once, with what --accum_iter they make up the recipe's batch, and when it would end.
One process measures; --devices says how many there will be, each taken to be as fast. Nothing is written.
"""
import argparse
import math
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augmentation
import engine
import loader
import main_ibot
import models
import recipes
import variants
from benchmarks.common import Step, matrix_peak, timed

UPDATES, PATIENCE = 10, 60  # PATIENCE: seconds that ten updates may take before smaller batches are measured


def memory_of(device):
    """MiB that this process can have in all, nan where it is not known."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**20
    if not Path("/proc/meminfo").exists():
        return math.nan
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(free.split()[1]) / 2**10 + int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def loader_speed(batches, batch_size, workers):
    """Images a second of an iterator of batches; those made ahead while nobody looked are not counted."""
    for _ in islice(batches, 2 * max(workers, 1) + 1):
        pass
    since = time.perf_counter()
    count = sum(1 for _ in islice(batches, UPDATES))
    return count * batch_size / (time.perf_counter() - since)


def endless(data_loader, *rest):
    """Epoch after epoch of `loader.device_batches`."""
    for epoch in range(10**6):
        data_loader.sampler.set_epoch(epoch)
        data_loader.dataset.set_epoch(epoch)
        yield from loader.device_batches(data_loader, *rest)


def cut(batch, images):
    """The first images of a `loader.Batch`, with what is masked in them."""
    samples = slice(images)
    count = batch.masks.shape[1]
    cells = batch.masks[0, 0].numel()
    keep = batch.mask_index // cells % count < images
    index = batch.mask_index[keep]
    crop, place = index // (cells * count), index % (cells * count)
    return batch._replace(
        global_crops=batch.global_crops[:, samples], masks=batch.masks[:, samples], labels=batch.labels[samples],
        local_crops=None if batch.local_crops is None else batch.local_crops[:, samples],
        mask_index=crop * cells * images + place, mask_weight=batch.mask_weight[keep] * count / images,
        targets=None if batch.targets is None else batch.targets[keep])


def plan(args, devices, folder):
    """Measure and print. args: of main_ibot.py; folder: an empty one in which nothing stays."""
    args = argparse.Namespace(**{**vars(args), "output_dir": str(folder), "load_from": None})
    main_ibot.check_args(args)
    engine.need(args.mask_crops != "all" and args.batch_size_per_gpu > 1,
                "a plan needs --batch_size_per_gpu 2 or more, and no --mask_crops all")
    process = engine.init_process(args.device, args.dist_url)
    device = process.device
    compiled, _ = models.choose_compilation(args.compile, args.recompute, args.grad_checkpointing, device)
    wanted = recipes.RECIPES[args.recipe].batch if args.recipe else None
    on_device = device.type != "cpu" if args.augment_on == "auto" else args.augment_on == "device"
    step = Step(args, device, compiled)
    photometry = torch.compile(loader.apply_photometry, dynamic=False) if compiled else loader.apply_photometry

    data = main_ibot.build_data(args, process, "device" if on_device else "cpu", 64 if compiled else 1, step.tokenizer)
    stats = augmentation.pixel_stats_of(args, None, None, data.dataset, device)
    images, B = len(data.dataset), args.batch_size_per_gpu
    batches = endless(data, device, photometry, stats, step.amp_dtype or torch.float32,
                      getattr(step.tokenizer, "of_crops", None))
    print(f"{args.arch}, {args.global_crops_number} x {args.global_crops_size} + {args.local_crops_number} x "
          f"{args.local_crops_size} pixels, {args.epochs} epochs of {images} images"
          + (f", recipe {args.recipe}, batch {wanted}" if wanted else ""))
    loads = loader_speed(batches, B, data.num_workers)
    print(f"loader   {loads:8.1f} images/s with {data.num_workers} processes", flush=True)

    batch = next(batches)
    one = cut(batch, 1)
    step.step(one)  # and what happens once
    seconds = timed(lambda: step.step(one), device)
    first = engine.peak_memory_mib(device)
    size = B if device.type == "cuda" else max(2, min(B, int(PATIENCE / UPDATES / seconds)))
    batch = cut(batch, size)
    step.step(batch)
    each = (engine.peak_memory_mib(device) - first) / (size - 1)  # a peak only rises: a line through two sizes
    seconds = sorted(timed(lambda: step.step(batch), device) for _ in range(UPDATES))[UPDATES // 2]
    rate, dtype = size / seconds, step.amp_dtype or torch.float32
    peak = engine.peak_flops(device, dtype) or matrix_peak(device, dtype, 2048)
    share = f", {100 * rate * main_ibot.flops_per_image(args) / peak:.0f} % of the device's {peak / 1e12:.2f} TFLOP/s"
    print(f"step     {rate:8.1f} images/s, {size} at once in {str(dtype).removeprefix('torch.')}"
          + share * variants.is_plain(args) + f" (not {B}, which would take long)" * (size < B), flush=True)

    whole = memory_of(device)
    most = max(1, int((0.9 * whole - first) / each) + 1) if each > 0 and not math.isnan(whole) else None
    print(f"memory   {first:8.0f} MiB with one image, {each:.0f} more for each other"
          + (f"; about {most} fit into nine tenths of {whole:.0f} MiB" if most else ""))
    total = wanted or B * args.accum_iter * devices
    at_once = min(most or B, math.ceil(total / devices))
    accum = math.ceil(total / devices / at_once)
    each = math.ceil(total / devices / accum)
    print(f"batch    {total} = {devices} x --batch_size_per_gpu {each} x --accum_iter {accum}")
    both = min(loads, rate) * devices
    hours = args.epochs * images / both / 3600
    slow, fast = ("loader", "step") if loads < rate else ("step", "loader")
    print(f"limit    the {slow}, {max(loads, rate) / min(loads, rate):.1f} times slower than the {fast}"
          + "; more --num_workers, smaller stored images or --augment_on device help" * (slow == "loader"))
    print(f"time     {hours:8.1f} hours ({hours / 24:.1f} days) with {devices} such device{'s' * (devices > 1)}")


def main():
    parser = argparse.ArgumentParser("plan.py", parents=[main_ibot.get_args_parser()], allow_abbrev=False,
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=max(1, torch.cuda.device_count()),
                        help="GPUs, or processes on CPUs, of the run; by default those that are seen here")
    args = parser.parse_args(recipes.expand(sys.argv[1:]))
    engine.need(args.devices > 0, f"--devices {args.devices}: must be positive")
    with tempfile.TemporaryDirectory() as folder:
        plan(args, args.devices, folder)


if __name__ == "__main__":
    engine.run(main)
