"""Time and memory of pattern layouts (`analysis/extract_pattern`) at ImageNet's size, on simulated outputs.

    python benchmarks/pattern_bank.py                 # 50,000 images x 196 patches, 8192 clusters, heads of ViT-S
    python benchmarks/pattern_bank.py --outputs 65536 --batches 2

Prints the reduction of patch tokens to (confidence, cluster), counting, the choice of members, and writing and reading the
bank, each with its time and how far the memory rose above that before it (peak of this process).
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import Peak

import engine
from analysis.extract_pattern import extract_topk_cluster as pattern
from models import iBOTHead


def measured(name, call, times=1):
    """Print the time and the peak memory of `call()`; returns (its result, seconds)."""
    peak = Peak()
    peak.start()
    since = time.perf_counter()
    for _ in range(times):
        result = call()
    seconds = (time.perf_counter() - since) / times
    peak.done = True
    peak.join()
    print(f"{name:66}{seconds:9.3f} s {peak.most - peak.first:8.0f} MiB", flush=True)
    return result, seconds


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4, help="batches of tokens that are reduced")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = engine.choose_device(args.device)
    n, N, K = args.images, args.patches, args.outputs
    print(f"{n} images x {N} patches, {K} clusters, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}")

    head = iBOTHead(384, K, shared_head=True).to(device).eval()
    tokens = torch.randn(args.batch_size * N, 384, device=device)
    pattern.strongest(head, tokens[:64])
    _, seconds = measured(f"(confidence, cluster) of {args.batch_size} images, mean of {args.batches}, no backbone",
                          lambda: pattern.strongest(head, tokens).cpu(), args.batches)
    print(f"hence of all images: {seconds * n / args.batch_size / 60:.1f} min")

    # Clusters of very different sizes, as real ones are.
    bank = torch.empty(n, N, 2)
    for rows in bank.split(1000):
        rows[..., 0].uniform_(-0.2, 1)
        rows[..., 1] = (torch.rand(rows.shape[:2]) ** 3 * K).floor().clamp(max=K - 1)
    print(f"the bank itself: {bank.nbytes / 2**20:.0f} MiB")
    counts, _ = measured("counting the members of all clusters", lambda: pattern.cluster_counts(bank, K))
    chosen = pattern.largest_clusters(counts, 20)
    measured("the 72 best members of each of 20 clusters",
             lambda: [pattern.best_members(bank, cluster, 72) for cluster in chosen])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory_patch.pth"
        measured("writing the bank", lambda: engine.save_atomically({"memory_bank": bank, "key": {}}, path))
        measured("reading it", lambda: pattern.kept_bank(path, {}))


if __name__ == "__main__":
    engine.run(main)
