"""Numbers of the step on this device: compiled against eager, half precision against float32.

    python benchmarks/precision.py                                        # on a GPU or the CPU, ViT-S/16 and Swin-T
    python benchmarks/precision.py --parts half --arch vit_nano --steps 20

    compiled  losses of the same steps from the same weights, compiled and eager, in float32 (no TF32) and in half precision
    half      the teacher's [CLS] logits in half precision against float32, and losses over `--steps` steps

Crops of photographs (those of scikit-learn) come from the real loader; every path sees the same ones. Drop path is off:
compiled code draws other numbers.
"""
import argparse
import os
import tempfile
from pathlib import Path

import common
import numpy as np
import torch
from common import Ours
from data_loader import our_folder, write_photographs
from torch.utils.data import DataLoader

import engine
import loader
import models


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["compiled", "half"], choices=("compiled", "half"))
    parser.add_argument("--arch", nargs="+", default=["vit_small", "swin_tiny"], choices=models.ARCHS)
    parser.add_argument("--steps", default=200, type=int, help="of half; compiled takes a tenth")
    parser.add_argument("--batch", default=None, type=int, help="images; default 32 on a GPU, 4 elsewhere")
    parser.add_argument("--local_crops_number", default=4, type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="the half precision")
    args = parser.parse_args()
    device = engine.choose_device(args.device)
    args.batch = args.batch or (32 if device.type == "cuda" else 4)
    args.compile = True  # of batches: the number of masked patches is padded
    return args, device


def photographs(args, arch, device, count):
    """Batches of crops of photographs on the device."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # a listing of a folder that is soon gone
        write_photographs(Path(folder, "images"), args.batch * count, seed=0)
        dataset = our_folder(Path(folder, "images"), args.local_crops_number, "cpu", seed=0)
        dataset.patch_size = models.mask_cell(arch, 16)
        samples = DataLoader(dataset, args.batch, drop_last=True, num_workers=engine.default_workers(),
                             collate_fn=lambda samples: loader.collate(samples, pad_masks=64))
        return list(loader.device_batches(samples, device, loader.apply_photometry))


def path(args, arch, device, amp_dtype, compile):
    """Our step, from the same weights each time."""
    torch.manual_seed(0)
    flags = argparse.Namespace(**{**vars(args), "arch": arch, "amp_dtype": amp_dtype, "compile": compile})
    return Ours(flags, device, drop_path=0)


def losses(ours, batches, steps):
    """[steps, 3]: loss, [CLS] and patch loss of each step."""
    rows = []
    for i in range(steps):
        means = ours.step(batches[i % len(batches)])[0]
        rows.append(torch.stack([means[name] for name in ("loss", "cls", "patch")]))
    return torch.stack(rows).double().cpu().numpy()


def apart(a, b):
    return f"{np.abs(a / b - 1).max():.1e} at most, {np.abs(a.mean(axis=0) / b.mean(axis=0) - 1).max():.1e} in their mean"


def measure_compiled(args, arch, device, batches):
    steps = max(args.steps // 10, 2)
    for amp_dtype in ("none", args.dtype):
        eager, compiled = (losses(path(args, arch, device, amp_dtype, on), batches, steps) for on in (False, True))
        print(f"{arch}, {'float32' if amp_dtype == 'none' else amp_dtype}, {steps} steps: losses compiled / eager - 1: "
              f"{apart(compiled, eager)}", flush=True)


def measure_half(args, arch, device, batches):
    full, half = (path(args, arch, device, amp_dtype, False) for amp_dtype in ("none", args.dtype))

    def logits(ours):
        crops = batches[0].global_crops.flatten(0, 1)
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        with torch.no_grad(), torch.autocast(device.type, ours.amp_dtype, enabled=ours.amp_dtype is not None):
            return ours.teacher(crops, nothing)[0].double().cpu()

    def compare(when):
        half.teacher.load_state_dict(full.teacher.state_dict())
        exact, rounded = logits(full), logits(half)
        p, q = ((x - exact.mean(dim=0)).div(0.04).log_softmax(dim=-1) for x in (exact, rounded))
        rounding, spread = (exact - rounded).square().mean().sqrt(), exact.std(dim=0).mean()
        divergence, entropy = (p.exp() * (p - q)).sum(dim=-1).mean(), -(p.exp() * p).sum(dim=-1).mean()
        print(f"{arch}, {args.dtype}, teacher's [CLS] logits {when}: rounding {rounding:.1e}, spread between images "
              f"{spread:.1e}; targets at 0.04: KL {divergence:.1e}, entropy {entropy:.2f}", flush=True)

    compare("at the start")
    a, b = (losses(ours, batches, args.steps) for ours in (half, full))
    tail = slice(args.steps * 3 // 4, None)
    print(f"{arch}, {args.dtype} / float32 - 1 over {args.steps} steps: losses {apart(a, b)}; over the last quarter "
          + ", ".join(f"{name} {x:.4f} and {y:.4f}" for name, x, y in zip(
              ("loss", "[CLS]", "patch"), a[tail].mean(axis=0), b[tail].mean(axis=0), strict=True)), flush=True)
    compare("at the end")


def main():
    args, device = get_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device: {name}; torch {torch.__version__}; batches of {args.batch}, 2 x 224 + {args.local_crops_number} x 96, "
          f"K {common.K}", flush=True)
    for arch in args.arch:
        batches = photographs(args, arch, device, count=min(args.steps, 8))
        for part, measure in (("compiled", measure_compiled), ("half", measure_half)):
            if part in args.parts:
                measure(args, arch, device, batches)


if __name__ == "__main__":
    engine.run(main)
