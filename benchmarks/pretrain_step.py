"""Time, memory and FLOP utilisation of the pre-training step, against a plain baseline that computes as the reference does.

    python benchmarks/pretrain_step.py                                  # ViT-S/16, 2 x 224 + 10 x 96, on a GPU or the CPU
    python benchmarks/pretrain_step.py --arch vit_base --batch 32 --local_crops_number 0
    python benchmarks/pretrain_step.py --table                          # all networks and crops of benchmarks/README.md
    python benchmarks/pretrain_step.py --data_path data/imagenet/train  # also: training from the real loader
    python benchmarks/pretrain_step.py --variants --compile true        # each --recompute against the default
    python benchmarks/pretrain_step.py --float32                        # eager and compiled against the baseline, in turn
    python benchmarks/pretrain_step.py --watch --compile true           # compilations and waits in 200 steps

The two steps alternate within one process, so that both meet the same noise; the ratio is that of the medians. Each
path's peak memory is taken in a process of its own. K is 8192, the head shared.

Letters in shape comments: B images, G global crops, L local crops, N patch tokens of a global crop, K outputs.
"""
import argparse
import json
import statistics
import subprocess
import sys
from functools import partial

import common
import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import K, Ours, matrix_peak, random_batches, timed
from timm.models.swin_transformer import window_partition, window_reverse
from torch import nn
from torch.utils.data import DataLoader

import engine
import loader
import main_ibot
import models
import utils

TABLE = [(arch, local) for arch in ("vit_small", "vit_base", "swin_tiny") for local in (0, 10)]


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small", choices=models.ARCHS)
    parser.add_argument("--local_crops_number", default=10, type=int)
    parser.add_argument("--batch", default=None, type=int, help="images; default 64 on a GPU, 4 elsewhere")
    parser.add_argument("--steps", default=None, type=int, help="timed steps of each; default 30 on a GPU, 7 elsewhere")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--amp_dtype", default="auto", choices=("auto", "none", "bfloat16", "float16"), help="of our step")
    parser.add_argument("--compile", default=None, type=engine.bool_flag, help="of our step; default: on a GPU")
    parser.add_argument("--table", action="store_true", help="all networks and crops")
    parser.add_argument("--variants", action="store_true",
                        help="instead of the baseline: our step against itself: crop sizes apart, each --recompute")
    parser.add_argument("--float32", action="store_true",
                        help="instead: the baseline, our eager and our compiled step in float32, in turn")
    parser.add_argument("--watch", action="store_true",
                        help="instead: count the compilations in 200 of our steps; on a GPU, fail if a step waits for it")
    parser.add_argument("--data_path", default=None, help="image folder: also train from it with the real loader")
    parser.add_argument("--num_workers", default=None, type=int, help="of that loader; default: the cores less one")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)  # the path whose peak memory a child process takes
    args = parser.parse_args()
    device = engine.choose_device(args.device)
    gpu = device.type == "cuda"
    args.batch = args.batch or (64 if gpu else 4)
    args.steps = args.steps or (30 if gpu else 7)
    args.compile = gpu if args.compile is None else args.compile
    return args, device


# ---------------------------------------------------------------- the reference's computation, plainly

class PlainAttention(nn.Module):
    """Softmax attention with its weights in memory; takes the layers of a timm attention."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scale

    def forward(self, x, **_):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)  # [B, heads, T, T]
        return self.proj((attention @ v).transpose(1, 2).reshape(B, T, D))


def plain_windows(block, x, mask):
    """Attention of a Swin's block by timm, which writes the mask out for each window of the batch; padded before it."""
    B, H, W, C = x.shape
    shifts = block.shift_size if mask is not None else (0, 0)
    x = F.pad(x, (0, 0, 0, -W % block.window_size[1], 0, -H % block.window_size[0]))
    height, width = x.shape[1:3]
    windows = window_partition(x.roll([-shift for shift in shifts], dims=(1, 2)), block.window_size).flatten(1, 2)
    windows = block.attn(windows, mask).unflatten(1, block.window_size)
    return window_reverse(windows, block.window_size, height, width).roll(shifts, dims=(1, 2))[:, :H, :W]


class Baseline:
    """Student, teacher, loss and step as the reference has them: every token of every crop through the K-wide layer, the
    teacher's too, losses over dense logits, one call per parameter, and the host waiting for each of them."""

    def __init__(self, args, device):
        networks = main_ibot.build_networks(common.training_args(args))
        self.student, self.teacher = (network.to(device) for network in networks)
        for network in (self.student, self.teacher):
            if args.arch.startswith("swin"):
                for stage in network.backbone.layers:
                    for block in stage.blocks:
                        block.attn.fused_attn = False
                        block.attend = partial(plain_windows, block)
            else:
                for block in network.backbone.blocks:
                    block.attn = PlainAttention(block.attn)
        self.centers = [torch.zeros(1, K, device=device), torch.zeros(1, 1, K, device=device)]
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student), lr=5e-4)
        self.fp16 = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.fp16)

    def network(self, network, crops, masks=None):
        return network.head(network.backbone(crops, mask=masks, return_all_tokens=True))

    def loss(self, student_cls, student_patch, local_cls, teacher_cls, teacher_patch, masks, temp=0.04, patch_temp=0.04):
        """Pairs of chunks; the patch loss over all patches, weighted by the masks."""
        G = 2
        s_cls = torch.cat((student_cls, local_cls)) if local_cls is not None else student_cls
        s_cls, s_patch = (s_cls / 0.1).chunk(len(s_cls) // (len(student_cls) // G)), (student_patch / 0.1).chunk(G)
        t_cls = F.softmax((teacher_cls - self.centers[0]) / temp, dim=-1).detach().chunk(G)
        t_patch = F.softmax((teacher_patch - self.centers[1]) / patch_temp, dim=-1).detach().chunk(G)
        cls_loss, patch_loss, pairs = 0, 0, 0
        for q in range(G):
            for v in range(len(s_cls)):
                if v == q:
                    loss = torch.sum(-t_patch[q] * F.log_softmax(s_patch[v], dim=-1), dim=-1)  # [B, N]
                    mask = masks[v].flatten(1).float()
                    patch_loss += (torch.sum(loss * mask, dim=-1) / mask.sum(dim=-1).clamp(min=1.0)).mean() / G
                else:
                    cls_loss += torch.sum(-t_cls[q] * F.log_softmax(s_cls[v], dim=-1), dim=-1).mean()
                    pairs += 1
        with torch.no_grad():
            self.centers[0] = self.centers[0] * 0.9 + teacher_cls.float().mean(dim=0, keepdim=True) * 0.1
            self.centers[1] = self.centers[1] * 0.9 + teacher_patch.float().mean(dim=(0, 1), keepdim=True) * 0.1
        return cls_loss / pairs + patch_loss

    def step(self, batch):
        with torch.autocast(batch.global_crops.device.type, torch.float16, enabled=self.fp16):
            crops = batch.global_crops.flatten(0, 1)
            with torch.no_grad():
                teacher_cls, teacher_patch = self.network(self.teacher, crops)
            student_cls, student_patch = self.network(self.student, crops, batch.masks.flatten(0, 1))
            local_cls = None
            if batch.local_crops is not None:
                local_cls = self.network(self.student, batch.local_crops.flatten(0, 1))[0]
            loss = self.loss(student_cls, student_patch, local_cls, teacher_cls, teacher_patch, batch.masks)
        if not np.isfinite(loss.item()):
            raise FloatingPointError("the baseline's loss is not finite")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = 3.0 / (p.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for s, t in zip(*reversed(utils.ema_pairs(self.student, self.teacher)), strict=True):
                t.mul_(0.996).add_((1 - 0.996) * s)
        return loss.item()


# ---------------------------------------------------------------- measuring

def forward_flops(args, batch):
    """FLOPs of the matrix products in a step, as our step needs them: {"student", "teacher"} forward, per step.

    Counted by torch for one forward pass of each; the backward pass of the student costs twice its forward pass.
    """
    from torch.utils.flop_counter import FlopCounterMode
    cpu = torch.device("cpu")
    small = argparse.Namespace(**{**vars(args), "compile": False, "amp_dtype": "none"})
    ours = Ours(small, cpu)
    G, B = batch.global_crops.shape[:2]
    one = random_batches(argparse.Namespace(**{**vars(small), "batch": 1}), cpu, count=1)[0]
    crops = one.global_crops.flatten(0, 1)
    local = None if one.local_crops is None else one.local_crops.flatten(0, 1)
    masked = int(0.15 * one.masks.numel())  # the mean of --pred_ratio 0 0.3
    index, masks = torch.arange(masked), one.masks.flatten(0, 1)
    counts = {}
    with torch.no_grad():
        for name, call in (("student", lambda: ours.student(crops, index, masks=masks, local_crops=local)),
                           ("teacher", lambda: ours.teacher(crops, index, patch_mean=True))):
            with FlopCounterMode(display=False) as counter:
                call()
            counts[name] = counter.get_total_flops() * B
    return counts


def alternate(paths, batches, steps, device, warm_up=2):
    """{name: seconds of each step} for {name: step}, one step of each in turn on the same batch."""
    seconds = {name: [] for name in paths}
    for i in range(warm_up + steps):
        batch = batches[i % len(batches)]
        for name, step in paths.items():
            elapsed = timed(partial(step, batch), device)
            if i >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def build(name, args, device):
    return (Baseline if name == "baseline" else Ours)(args, device)


def peak_memory(name, args, device):
    """MiB at the peak of three steps of a path, in this process: allocated on a GPU; elsewhere the resident set above
    what it was before the networks were built."""
    batches = random_batches(args, device, count=3)
    before = 0.0 if device.type == "cuda" else engine.peak_memory_mib(device)
    path = build(name, args, device)
    for batch in batches:
        path.step(batch)
    return engine.peak_memory_mib(device) - before


def memory_in_child(name, args):
    words = [f"--{key}={value}" for key, value in vars(args).items()
             if key not in ("table", "variants", "float32", "watch", "one", "data_path", "num_workers")]
    result = subprocess.run([sys.executable, __file__, *words, "--one", name], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the memory of {name} was not measured:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(args, device):
    """Print one row: time, memory and utilisation of both paths and their ratios."""
    memory = {name: memory_in_child(name, args) for name in ("ours", "baseline")}  # first: a child's peak starts at ours
    batches = random_batches(args, device)
    ours, baseline = (build(name, args, device) for name in ("ours", "baseline"))
    seconds = alternate({"ours": ours.step, "baseline": baseline.step}, batches, args.steps, device,
                        warm_up=10 if args.compile else 2)
    flops = forward_flops(args, batches[0])
    flops = 3 * flops["student"] + flops["teacher"]
    peak = matrix_peak(device, ours.amp_dtype or torch.float32, 8192 if device.type == "cuda" else 2048)
    amp = ours.amp_dtype or torch.float32
    t = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: f"{1e3 * min(v):.0f}..{1e3 * max(v):.0f}" for name, v in seconds.items()}
    print(f"{args.arch}, 2 x 224 + {args.local_crops_number} x 96, batch {args.batch}, K {K}, "
          f"ours in {str(amp).removeprefix('torch.')}{', compiled' if args.compile else ''}")
    for name in ("baseline", "ours"):
        print(f"  {name:<9} {args.batch / t[name]:8.2f} images/s  {1e3 * t[name]:8.1f} ms a step ({spread[name]})  "
              f"{memory[name]:8.0f} MiB at the peak")
    print(f"  ours / baseline: images/s {t['baseline'] / t['ours']:.2f}, memory {memory['ours'] / memory['baseline']:.2f}; "
          f"{flops / 1e12:.2f} TFLOP a step, {100 * flops / t['ours'] / peak:.0f} % of the measured matrix peak "
          f"({peak / 1e12:.2f} TFLOP/s)", flush=True)
    return t["ours"]


def measure_variants(args, device):
    """Our step against variants of itself."""
    batches = random_batches(args, device)
    ours = Ours(args, device)
    apart = Ours(args, device)
    for network in (apart.student, apart.teacher):
        forward = type(network.backbone).forward_crops

        def separately(crops, masks=None, wanted=None, backbone=network.backbone, forward=forward):
            """A pass for each crop size, every token through the last block."""
            parts = [forward(backbone, [x], masks and [mask]) for x, mask in zip(crops, masks or crops, strict=True)]
            shapes = tuple(shape for _, (shape,) in parts)
            x = torch.cat([x for x, _ in parts])
            return x if wanted is None else x.index_select(0, models.multi_crop.wanted_rows(shapes, wanted)), shapes
        network.backbone.forward_crops = separately
    variants = {"ours": ours.step, "crop sizes apart": apart.step,
                **{f"recompute {name}": Ours(args, device, recompute=name).step for name in models.RECOMPUTE
                   if args.compile or name not in ("elementwise", "half")}}
    if ours.amp_dtype is not None:
        variants["residuals in amp"] = Ours(args, device, residual_dtype="amp").step
    seconds = alternate(variants, batches, args.steps, device, warm_up=10 if args.compile else 2)
    t = {name: statistics.median(values) for name, values in seconds.items()}
    for name in variants:
        print(f"  {name:<21} {1e3 * t[name]:8.1f} ms a step, {t[name] / t['ours']:.3f} of ours")


def measure_float32(args, device):
    """Our eager and compiled step in float32 against the baseline; batches are padded as the compiled one needs them."""
    args = argparse.Namespace(**{**vars(args), "amp_dtype": "none", "compile": True})
    batches = random_batches(args, device)
    eager = argparse.Namespace(**{**vars(args), "compile": False})
    paths = {"baseline": Baseline(args, device), "ours, eager": Ours(eager, device), "ours, compiled": Ours(args, device)}
    seconds = alternate({name: path.step for name, path in paths.items()}, batches, args.steps, device, warm_up=10)
    t = {name: statistics.median(values) for name, values in seconds.items()}
    for name in paths:
        print(f"  {name:<15} {1e3 * t[name]:8.1f} ms a step, {t['baseline'] / t[name]:.2f} times the baseline's images/s")


def watch(args, device, steps=200):
    """Print how many programs our step has been compiled into after some steps, each with other masks."""
    stats = torch._dynamo.utils.counters["stats"]
    ours, counts = Ours(args, device), {}
    batches = random_batches(args, device, count=steps)
    for i, batch in enumerate(batches, 1):
        if device.type == "cuda" and i > 10:  # the first allocate, compile and tune
            torch.cuda.set_sync_debug_mode("error")
        ours.step(batch)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        if i in (1, 2, 10, 50, 100, steps):
            counts[i] = stats["unique_graphs"]
    masked = {len(batch.mask_index) for batch in batches}
    print(f"{args.arch}, batch {args.batch}, {len(masked)} different numbers of masked patches: compiled programs after "
          + ", ".join(f"{n} in step {i}" for i, n in counts.items())
          + ("; no step after the tenth waited for the GPU" if device.type == "cuda" else ""))


def measure_loader(args, device, step_seconds):
    """Print images/s of training from the real loader, against the step's alone."""
    on_device = device.type != "cpu"
    workers = engine.default_workers() if args.num_workers is None else args.num_workers
    dataset = loader.ImageFolderMask(
        args.data_path, loader.MultiCropAugmentation(2, (0.25, 1.0), args.local_crops_number, (0.05, 0.25),
                                                     photometry="device" if on_device else "cpu"),
        patch_size=models.mask_cell(args.arch, 16), pred_ratio=[0, 0.3], pred_ratio_var=[0, 0.2])
    data_loader = DataLoader(dataset, args.batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=on_device,
                             collate_fn=lambda samples: loader.collate(samples, pad_masks=64 if args.compile else 1))
    if len(data_loader) < 2 * 10:
        raise engine.InputError(f"--data_path {args.data_path}: {len(dataset)} images are fewer than 20 batches")
    ours = Ours(args, device)
    photometry = torch.compile(loader.apply_photometry, dynamic=False) if args.compile else loader.apply_photometry
    batches = loader.device_batches(data_loader, device, photometry)
    for _ in range(10):
        ours.step(next(batches))
    steps = len(data_loader) - 10
    seconds = timed(lambda: [ours.step(next(batches)) for _ in range(steps)], device)
    print(f"  from {args.data_path} with {workers} loader processes: {args.batch * steps / seconds:.1f} images/s over "
          f"{steps} steps, {step_seconds * steps / seconds:.2f} of the step's alone")


def main():
    args, device = get_args()
    if args.table:  # a process for each row: memory of the rows before it would count as a child's
        rest = [word for word in sys.argv[1:] if word != "--table"]
        for arch, local in TABLE:
            words = [*rest, "--arch", arch, "--local_crops_number", str(local)]
            subprocess.run([sys.executable, __file__, *words], check=True)
        return
    if args.one:
        print(json.dumps(peak_memory(args.one, args, device)))
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {name}; torch {torch.__version__}, timm {timm.__version__}; "
          f"medians of {args.steps} steps, the paths in turn", flush=True)
    torch.manual_seed(0)
    if args.variants:
        measure_variants(args, device)
    elif args.float32:
        measure_float32(args, device)
    elif args.watch:
        watch(args, device)
    else:
        step_seconds = measure(args, device)
        if args.data_path:
            measure_loader(args, device, step_seconds)


if __name__ == "__main__":
    engine.run(main)
