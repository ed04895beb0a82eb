"""Time and memory of a training step against batch, local crops, K and number of processes (gloo on CPUs, NCCL on GPUs).

    python benchmarks/scaling.py                      # prints the figures and draws benchmarks/scaling.png
    python benchmarks/scaling.py --arch vit_base --batch 32 64 128 --processes 1 2 4 8

Each point is measured in fresh processes. The others stay at the first value of each flag's list. On a CPU all processes
together have the machine's cores, which are shared out, so that more processes do not mean more computing power.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import common
import torch
import torch.distributed as dist

import engine
import models

AXES = ("batch", "local_crops_number", "out_dim", "processes")


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small", choices=models.ARCHS)
    parser.add_argument("--batch", default=[4, 1, 2, 8], type=int, nargs="+", help="images per process")
    parser.add_argument("--local_crops_number", default=[10, 0, 2, 6], type=int, nargs="+")
    parser.add_argument("--out_dim", default=[8192, 4096, 16384, 65536], type=int, nargs="+", help="K")
    parser.add_argument("--processes", default=[1, 2], type=int, nargs="+")
    parser.add_argument("--steps", default=5, type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--amp_dtype", default="auto", choices=("auto", "none", "bfloat16", "float16"))
    parser.add_argument("--compile", default=None, type=engine.bool_flag, help="default: on a GPU")
    parser.add_argument("--picture", default=Path(__file__).with_name("scaling.png"), type=Path)
    parser.add_argument("--point", default=None, type=json.loads, help=argparse.SUPPRESS)  # what a child process measures
    return parser.parse_args()


def measure_point(args):
    """In a process of the launcher's: median seconds of a step and MiB at the peak, printed by process 0."""
    process = engine.init_process(args.device)
    point = argparse.Namespace(**{**args.point, "arch": args.arch, "amp_dtype": args.amp_dtype,
                                  "compile": process.device.type == "cuda" if args.compile is None else args.compile})
    torch.manual_seed(0)
    ours = common.Ours(point, process.device, out_dim=point.out_dim)
    if process.world_size > 1:
        ours.student = engine.data_parallel(ours.student, process.device)
    batches = common.random_batches(point, process.device, count=2)
    warm_up, seconds = 10 if point.compile else 2, []
    for i in range(warm_up + args.steps):
        seconds.append(common.timed(lambda i=i: ours.step(batches[i % 2]), process.device))
    if process.rank == 0:
        print(json.dumps([statistics.median(seconds[warm_up:]), engine.peak_memory_mib(process.device)]), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_point(args, point):
    """Start the processes of a point and read what the first says."""
    words = [__file__, f"--point={json.dumps(point)}"]
    words += [f"--{name}={getattr(args, name)}" for name in ("arch", "steps", "device", "amp_dtype")]
    words += [] if args.compile is None else [f"--compile={args.compile}"]
    env, n = dict(os.environ), point["processes"]
    if not torch.cuda.is_available() or args.device == "cpu":
        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // n))
    launcher = []
    if n > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
    result = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, env=env)
    if result.returncode:
        raise RuntimeError(f"{point} was not measured:\n{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def draw(figures, path, title):
    """A column for each axis: seconds of a step above, memory below."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(AXES), figsize=(3 * len(AXES), 5), sharex="col", layout="constrained")
    labels = {"batch": "images per process", "local_crops_number": "local crops", "out_dim": "K", "processes": "processes"}
    for column, axis in zip(axes.T, AXES, strict=True):
        points = sorted((point[axis], *figure_of) for point, figure_of in figures[axis])
        for row, which, name in zip(column, (1, 2), ("ms a step", "MiB a process"), strict=True):
            row.plot([p[0] for p in points], [1e3 * p[1] if which == 1 else p[2] for p in points], "o-")
            row.set_ylim(bottom=0)
            row.grid(alpha=0.3)
            row.set_ylabel(name)
        column[1].set_xlabel(labels[axis])
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    args = get_args()
    if args.point:
        return measure_point(args)
    device = engine.choose_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads in all"
    title = f"{args.arch}, 2 x 224 + 96-pixel crops; {name}; torch {torch.__version__}; medians of {args.steps} steps"
    print(title, flush=True)
    base, known, figures = {axis: getattr(args, axis)[0] for axis in AXES}, {}, {}
    for axis in AXES:
        figures[axis] = []
        for value in sorted(getattr(args, axis)):
            point = {**base, axis: value}
            key = json.dumps(point)
            if key not in known:
                known[key] = run_point(args, point)
                seconds, memory = known[key]
                images = point["batch"] * point["processes"] / seconds
                print(f"batch {point['batch']:>3} x {point['processes']} processes, {point['local_crops_number']:>2} local "
                      f"crops, K {point['out_dim']:>5}: {1e3 * seconds:8.0f} ms a step, {images:7.2f} images/s, "
                      f"{memory:7.0f} MiB a process", flush=True)
            figures[axis].append((point, known[key]))
    draw(figures, args.picture, title)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    engine.run(main)
