"""Going on from weights against starting over, with other images: digits turned by 90 degrees, dark on white.

    ./run.sh quickstart                                             # the weights: pre-trained on upright digits
    python benchmarks/adapt.py --init_from work_dirs/quickstart/checkpoint.pth --output_dir work_dirs/adapt

Both have the same flags and epochs. A toy. Runs that are in the folder already are not made again.
"""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine
from benchmarks.common import TOY
from evaluation.common.results import read_results

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"over": [], "from weights": ["--init_from", "{weights}"],
        "from weights, frozen for an epoch, a quarter of the rate":
            ["--init_from", "{weights}", "--freeze_backbone_epochs", "1", "--lr", "0.001"]}


def turn(source, folder):
    """Each image of SOURCE/{train,val}/CLASS, turned and inverted, in FOLDER: training and validation images stay apart."""
    for path in sorted(source.glob("*/*/*.png")):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path).transpose(Image.Transpose.ROTATE_90)).save(target)


def call(*words):
    run = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise engine.InputError(f"{' '.join(map(str, words))}: {(run.stdout + run.stderr).strip().splitlines()[-1]}")


def accuracy(weights, data, folder, *words):
    """10-NN accuracy in percent of the teacher's [CLS] tokens; results.json in `folder` keeps it."""
    if not read_results(folder):
        call("evaluation/eval_knn.py", "--pretrained_weights", weights, "--checkpoint_key", "teacher", "--data_path", data,
             "--nb_knn", "10", "--output_dir", folder, "--num_workers", "0", "--device", "cpu", *words)
    return read_results(folder)[-1]["metrics"]["10"]["top1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--data_path", default="data/digits", help="./run.sh quickstart writes it")
    parser.add_argument("--output_dir", default="work_dirs/adapt")
    parser.add_argument("--epochs", nargs="+", default=["6"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    args = parser.parse_args()
    weights, out, data = (Path(path).resolve() for path in (args.init_from, args.output_dir, args.data_path))
    turned = out / "turned"
    turn(data, turned)

    print("10-NN accuracy on the turned digits in percent: each seed, then mean ± standard deviation\n")
    print(f"| start | epochs | seeds {' '.join(args.seeds)} | mean |\n|---|---|---|---|")
    print(f"| the weights as they are | 0 | {accuracy(weights, turned, out / 'as_it_is'):.1f} | |")
    for epochs in args.epochs:
        for way, (name, words) in enumerate(WAYS.items()):
            found, words = [], [word.format(weights=weights) for word in words]
            for seed in args.seeds:
                folder = out / f"way{way}_{epochs}_{seed}"
                if not read_results(folder):
                    call("main_ibot.py", *TOY, "--centering", "sinkhorn", "--data_path", turned / "train", "--output_dir",
                         folder, "--overwrite", "true", "--epochs", epochs, "--seed", seed, *words)
                found.append(accuracy(folder / "checkpoint.pth", turned, folder))
            print(f"| {name} | {epochs} | {' '.join(f'{value:.1f}' for value in found)} | {statistics.mean(found):.1f} ± "
                  f"{statistics.stdev(found):.1f} |", flush=True)


if __name__ == "__main__":
    engine.run(main)
