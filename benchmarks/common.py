"""What the benchmarks share: the step of `main_ibot.py` on random batches, and a clock.

Letters in shape comments: B images, G global crops, L local crops.
"""
import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine
import loader
import main_ibot
import models
import patch_tokenizers
import utils
import variants

K = 8192
# The quickstart's flags, but iBOT's own centre.
TOY = ("--arch vit_nano --drop_path 0 --head_hidden_dim 512 --out_dim 1024 --patch_out_dim 1024 --shared_head true "
       "--momentum_teacher 0.95 --koleo 0.5 --warmup_teacher_temp 0.02 --teacher_temp 0.02 --teacher_patch_temp 0.04 "
       "--warmup_teacher_temp_epochs 0 --pred_ratio 0 0.3 --pred_ratio_var 0 0.2 --batch_size_per_gpu 64 --lr 0.004 "
       "--warmup_epochs 2 --weight_decay_end 0.04 --num_workers 0 --saveckp_freq 0 --print_freq 20 --use_fp16 false "
       "--patch_size 4 --global_crops_size 16 --local_crops_size 8 --global_crops_scale 0.5 1 --local_crops_number 0 "
       "--augment none --color_jitter 0.8 0.4 0.4 0 0 --pixel_stats auto --device cpu").split()


def step_parser(description):
    """The flags of benchmarks of a dense task's step."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp_dtype", choices=("bfloat16", "float16"))
    return parser


def training_args(args, more=(), **flags):
    """The flags of `main_ibot.py` for the network that is measured; `more` of them as words."""
    words = ["--arch", args.arch, "--shared_head", "true", "--norm_last_layer", "false", "--local_crops_number",
             str(args.local_crops_number), "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    return main_ibot.get_args_parser().parse_args([*words, *more])


def random_batches(args, device, count=8):
    """Batches of noise with masks drawn as in training, on the device, as the loader would give them."""
    rng = np.random.default_rng(0)
    cells = 224 // models.mask_cell(args.arch, 16)
    batches = []
    for _ in range(count):
        samples = [([torch.randint(256, (3, size, size), dtype=torch.uint8)
                     for size in [224] * 2 + [96] * args.local_crops_number], 0,
                    [loader.block_mask(cells, cells, loader.draw_ratio((0, 0.3), (0, 0.2), rng), rng) for _ in range(2)])
                   for _ in range(args.batch)]
        batch = loader.collate(samples, pad_masks=64 if args.compile else 1)
        batch = type(batch)(*(None if x is None else x.to(device) for x in batch))
        batches.append(loader.finish_batch(batch))
    return batches


class Step:
    """`main_ibot.train_step` with what `main_ibot.train_ibot` builds for it, of its flags `args`."""

    def __init__(self, args, device, compiled):
        self.args, self.device = args, device
        self.amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, device)
        self.tokenizer = patch_tokenizers.build(self.args, device, self.amp_dtype)
        networks = main_ibot.build_networks(self.args, self.tokenizer and self.tokenizer.tokens)
        self.student, self.teacher = (network.to(device) for network in networks)
        self.ema = utils.ema_pairs(self.student, self.teacher)
        temps = np.full(1, 0.04)
        self.loss = main_ibot.iBOTLoss(self.args.out_dim, self.args.out_dim, temps, temps, lambda1=self.args.lambda1,
                                       lambda2=self.args.lambda2).to(device)
        variants.choose(self.loss, self.args, self.tokenizer, main_ibot.patch_cross_entropy, self.student, self.teacher,
                        self.amp_dtype)
        groups = utils.get_params_groups(self.student, self.args.layer_decay, self.args.patch_embed_lr)
        self.optimizer = utils.build_optimizer("adamw", groups, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.amp_dtype == torch.float16 else None
        recompute = models.choose_recompute(self.args.recompute, self.args.grad_checkpointing, compiled)
        for network in (self.student, self.teacher):
            network.backbone.residual_dtype = self.amp_dtype if self.args.residual_dtype == "amp" else None
            network.backbone.set_grad_checkpointing(recompute == "blocks")
            if compiled:
                network.compile_parts(recompute)
        if compiled:
            self.loss.compile()

    def step(self, *batches):
        return main_ibot.train_step(
            batches,
            main_ibot.Training(self.student, self.teacher, self.ema, self.loss,
                               self.optimizer, self.scaler, self.amp_dtype),
            0, lr=5e-4, weight_decay=0.04, momentum=0.996, clip_grad=3.0, freeze_last_layer=False, accum_iter=len(batches))


class Ours(Step):
    """The step of `training_args`."""

    def __init__(self, args, device, more=(), **flags):
        amp = ["--use_fp16", "false"] if args.amp_dtype == "none" else ["--amp_dtype", args.amp_dtype]
        super().__init__(training_args(args, [*amp, *more], **flags), device, args.compile)


class Peak(threading.Thread):
    """Largest resident memory of this process while it runs, in MiB above that at the start (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.most = self._now()
        self.done = False

    @staticmethod
    def _now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def run(self):
        while not self.done:
            self.most = max(self.most, self._now())
            time.sleep(0.002)


def risen(call, device):
    """MiB by which the memory rises while `call()` runs: that of the process, on CUDA what the allocator gives."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    peak = Peak()
    peak.start()
    call()
    peak.done = True
    peak.join()
    return peak.most - peak.first


def timed(call, device):
    """Seconds of `call()`, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    since = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - since


def matrix_peak(device, dtype, size=8192):
    """FLOP/s of a large matrix product, the best of some."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        seconds = timed(lambda: a @ b, device)
        best = max(best, 2 * size**3 / seconds)
    return best
