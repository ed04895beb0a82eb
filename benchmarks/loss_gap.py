"""Our training against the plain definition of it (`tests/oracle.py`): on the same draws, and on draws of their own.

    python benchmarks/loss_gap.py --same 300                     # of both from the same weights, batches and drop path
    python benchmarks/loss_gap.py --same 300 --dtype float64
    python benchmarks/loss_gap.py --switch none augment masks step augment+masks+step fitted bfloat16 --seeds 0 1 2 3 4

The first trains both side by side and prints how far their losses differ. The third trains by each of `--switch` and prints
losses and agreement (`acc`) of every epoch, and at the end means and standard deviations over the seeds. Switches, joined
by `+`: `augment` and `masks` (Pillow's pipeline and BEiT's words instead of ours), `step` (the plain networks, drop path,
loss and optimiser instead of ours), `fitted` (positions made for the crop size, not for 224 pixels), `bfloat16` (mixed
precision); `none` is ours. Without `--data_path` the images are grey tiles of 64 pixels, cut at random from scikit-learn's
two photographs and, if scikit-image is installed, from eight of its own: 400 of each.
"""
import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from data_loader import plain_crop, plain_mask
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle

import loader
import main_ibot
import utils

FLAGS = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size", "16",
         "--local_crops_number", "2", "--out_dim", "512", "--shared_head", "true", "--head_hidden_dim", "256",
         "--batch_size_per_gpu", "64", "--lr", "0.001", "--warmup_epochs", "1", "--warmup_teacher_temp", "0.03",
         "--warmup_teacher_patch_temp", "0.03", "--teacher_patch_temp", "0.04", "--warmup_teacher_temp_epochs", "5",
         "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2"]
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "motorcycle_left.png", "rocket.jpg",
               "hubble_deep_field.jpg")  # of scikit-image's wheel
SWITCHES = {"none", "augment", "masks", "step", "fitted", "bfloat16"}


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default=None, help="image folder, one sub-folder per class")
    parser.add_argument("--same", default=0, type=int, metavar="STEPS", help="so many steps of both on the same draws")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="of --same")
    parser.add_argument("--switch", default=["none", "fitted"], nargs="+", help="trainings on draws of their own")
    parser.add_argument("--seeds", default=[0], type=int, nargs="+")
    parser.add_argument("--epochs", default=5, type=int)
    parser.add_argument("--flags", default="", help="more flags of main_ibot.py, in one word")
    args = parser.parse_args()
    for switch in args.switch:
        if not set(switch.split("+")) <= SWITCHES:
            parser.error(f"--switch {switch}: unknown; there are {', '.join(sorted(SWITCHES))}")
    return args


def write_tiles(folder, count=400, size=64, seed=0):
    """`count` tiles of each photograph, a class each: squares of 72 to 160 pixels, made grey and resized."""
    spec = importlib.util.find_spec("skimage")
    found = [Path(importlib.util.find_spec("sklearn").origin).parent / "datasets/images" / name
             for name in ("china.jpg", "flower.jpg")]
    found += [Path(spec.origin).parent / "data" / name for name in PHOTOGRAPHS] if spec else []
    rng = np.random.default_rng(seed)
    for path in found:
        image = Image.open(path).convert("RGB").convert("L")
        (folder / path.stem).mkdir()
        for i in range(count):
            side = int(rng.uniform(72, 160))
            left, top = int(rng.integers(image.width - side + 1)), int(rng.integers(image.height - side + 1))
            image.resize((size, size), Image.BICUBIC, box=(left, top, left + side, top + side)).save(
                folder / path.stem / f"{i:04}.png")
    return folder


class Folder(loader.ImageFolderMask):
    """Our masked folder, with Pillow's pipeline or BEiT's words for the masks in place of ours."""

    def __init__(self, transform, switched, **kwargs):
        self.plain_masks = "masks" in switched
        if "augment" in switched:
            chains = [transforms.Compose([*plain_crop(*parts).transforms[:-2], transforms.PILToTensor()]) for parts in zip(
                transform.sizes, transform.scales, transform.blur_p, transform.solarize_p, strict=True)]
            number = transform.global_crops_number

            def transform(image):
                return [chain(image) for chain in chains]
            transform.global_crops_number = number
        super().__init__(transform=transform, **kwargs)

    def __getitem__(self, index):
        random.seed(hash((self.seed, int(self.epoch), index)))  # what the plain parts draw from
        return super().__getitem__(index)

    def _draw_mask(self, crop, rng):
        if not self.plain_masks:
            return super()._draw_mask(crop, rng)
        ratio = random.choice([r + v * random.uniform(-1, 1)
                               for r, v in zip(self.pred_ratio, self.pred_ratio_var, strict=True)])
        return plain_mask(*(side // self.patch_size for side in crop.shape[1:]), ratio)


def epochs_of(args, switched):
    """Batches of each epoch, [epochs][steps], as the loader gives them."""
    dataset = Folder(
        loader.MultiCropAugmentation(
            args.global_crops_number, args.global_crops_scale, args.local_crops_number, args.local_crops_scale,
            args.global_crops_size, args.local_crops_size),
        switched, root=args.data_path, patch_size=args.patch_size, pred_ratio=args.pred_ratio,
        pred_ratio_var=args.pred_ratio_var, pred_shape=args.pred_shape, seed=args.seed)
    sampler = loader.ResumableSampler(dataset, 1, 0, shuffle=True, seed=args.seed)
    data_loader = DataLoader(dataset, args.batch_size_per_gpu, sampler=sampler, drop_last=True, collate_fn=loader.collate,
                             generator=torch.Generator())
    epochs = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        epochs.append(list(data_loader))
    return epochs


def same_draws(args, steps, dtype):
    """Train both for `steps` steps; prints losses and how far they differ."""
    epochs = epochs_of(args, set())
    student, teacher = (network.to(dtype) for network in main_ibot.build_networks(args))
    schedules, _ = main_ibot.build_schedules(args, len(epochs[0]), args.batch_size_per_gpu)

    def batches():
        for batch in [batch for epoch in epochs for batch in epoch][:steps]:
            batch = loader.finish_batch(batch)
            yield batch._replace(**{name: None if (x := getattr(batch, name)) is None else x.to(dtype)
                                    for name in ("global_crops", "local_crops", "mask_weight")})
    pairs = []
    for step, pair in enumerate(oracle.side_by_side(student, teacher, batches(), schedules, len(epochs[0]),
                                                    args.clip_grad, args.freeze_last_layer), start=1):
        pairs.append(pair)
        if step % 25 == 0 or step == steps:
            ours, plain = np.array(pairs).transpose(1, 0, 2)[..., :2]
            apart = np.abs(ours / plain - 1)
            print(f"step {step}: [CLS] {ours[-1, 0]:.6f} and {plain[-1, 0]:.6f}, patches {ours[-1, 1]:.6f} and "
                  f"{plain[-1, 1]:.6f}; so far relative differences up to {apart[:, 0].max():.1e} and "
                  f"{apart[:, 1].max():.1e}", flush=True)


def own_draws(args, switched, epochs):
    """Means of [CLS] loss, patch loss and agreement in each epoch: [epochs, 3]."""
    utils.fix_random_seeds(args.seed)
    student, teacher = main_ibot.build_networks(args)
    if "fitted" in switched:  # all other weights as in the other trainings
        for network in (student, teacher):
            positions = torch.empty(1, 1 + (args.global_crops_size // args.patch_size) ** 2, network.backbone.embed_dim)
            torch.manual_seed(args.seed)  # the same for both
            network.backbone.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02), network is student)
    steps = len(epochs[0])
    schedules, _ = main_ibot.build_schedules(args, steps, args.batch_size_per_gpu)
    temps = schedules["temp"], schedules["patch_temp"]
    if "step" in switched:
        plain = oracle.PlainTraining(oracle.plain_copy(student), oracle.plain_copy(teacher), *temps, args.norm_last_layer)
    else:
        ibot_loss = main_ibot.iBOTLoss(args.out_dim, args.out_dim, *temps)
        optimizer = utils.build_optimizer("adamw", utils.get_params_groups(student), torch.device("cpu"))
        ema = utils.ema_pairs(student, teacher)
    means = []
    for epoch, batches in enumerate(epochs):
        utils.fix_random_seeds(args.seed * 1000 + epoch)  # drop path
        rows = []
        for i, batch in enumerate(map(loader.finish_batch, batches), start=epoch * steps):
            values = {"lr": schedules["lr"][i], "weight_decay": schedules["wd"][i], "momentum": schedules["momentum"][i],
                      "clip_grad": args.clip_grad}
            frozen = epoch < args.freeze_last_layer
            if "step" in switched:
                local_crops = () if batch.local_crops is None else batch.local_crops
                drops = [oracle.plain_drops(args.drop_path, len(student.backbone.blocks), len(batch.labels))
                         for _ in range(len(batch.global_crops) + len(local_crops))]
                rows.append(plain.step(batch.global_crops, local_crops, batch.masks, epoch, freeze=frozen, drops=drops,
                                       **values))
            else:
                losses, *_ = main_ibot.train_step(
                    [batch],
                    main_ibot.Training(student, teacher, ema, ibot_loss,
                                       optimizer, None, torch.bfloat16 if "bfloat16" in switched else None),
                    epoch, freeze_last_layer=frozen, **values)
                rows.append([float(losses[name]) for name in ("cls", "patch", "acc")])
        means.append(np.mean(rows, axis=0))
    return np.array(means)


def main():
    options = get_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_path = options.data_path or write_tiles(Path(folder))
        results = {switch: [] for switch in options.switch}
        for seed in options.seeds:
            args = main_ibot.get_args_parser().parse_args(
                [*FLAGS, "--drop_path", "0.1", "--epochs", str(options.epochs), *options.flags.split(), "--seed", str(seed),
                 "--data_path", str(data_path)])
            utils.fix_random_seeds(seed)
            if options.same:
                print(f"seed {seed}, drop path {args.drop_path}, {options.dtype}")
                same_draws(args, options.same, getattr(torch, options.dtype))
                continue
            drawn = {}
            for switch in options.switch:
                switched, since = set(switch.split("+")), time.time()
                key = frozenset(switched & {"augment", "masks"})
                if key not in drawn:
                    drawn[key] = epochs_of(args, switched)
                results[switch].append(own_draws(args, switched, drawn[key]))
                print(f"{switch}, seed {seed} ({time.time() - since:.0f} s): " + "; ".join(
                    "[CLS] {:.3f} patches {:.3f} acc {:.3f}".format(*row) for row in results[switch][-1]), flush=True)
        for switch, runs in results.items():
            for epoch, rows in enumerate(zip(*runs, strict=True)):
                print(f"{switch}, epoch {epoch}: " + ", ".join(
                    f"{name} {statistics.mean(values):.3f} ± {statistics.stdev(values) if len(runs) > 1 else 0:.3f}"
                    for name, values in zip(("[CLS]", "patches", "acc"), zip(*rows, strict=True), strict=True)))


if __name__ == "__main__":
    main()
