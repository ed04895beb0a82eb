"""Accuracy of logistic regression on frozen features (iBOT, Table 12: 1 % and 10 % of the labels).

    python evaluation/eval_logistic_regression.py --pretrained_weights JOB/checkpoint.pth --train_subset 1percent.txt
    torchrun --nproc_per_node 8 evaluation/eval_logistic_regression.py --pretrained_weights ... --checkpoint_key teacher
    python evaluation/eval_logistic_regression.py --device cpu --num_workers 2 --train_subset 0.1 --pretrained_weights ...

Minimises over W, by L-BFGS over all training images at once: the mean cross-entropy of W^T x, plus
lambda / (2 n) |W|^2, for features x of length 1 and n training images. `--raw_lambda true` leaves out the 1 / n.
Features come from all processes; the first one fits.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import engine
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.knn import topk_accuracy
from evaluation.common.logistic import fit_logistic, predict
from evaluation.common.protocol import extract_features_of_keys, read_backbones, read_sets, start_process
from evaluation.common.results import append_result, results_folder, shared_settings


def get_args_parser():
    parser = evaluation_parser("Logistic regression on features of a frozen backbone")
    regression = parser.add_argument_group("logistic regression")
    regression.add_argument("--lr_lambd", type=float, nargs="+", default=[0.01, 0.1, 1.0],
                            help="values of lambda, a fit each")
    regression.add_argument("--raw_lambda", type=engine.bool_flag, default=False,
                            help="do not divide lambda by the number of training images")
    regression.add_argument("--epochs", type=int_from(1), default=1000, help="limit of L-BFGS iterations of a fit")
    regression.add_argument("--tolerance", type=float, default=1e-4,
                            help="stop when the objective is surely within this share of its minimum")
    regression.add_argument("--use_cuda", type=engine.bool_flag, default=True,
                            help="fit on the backbone's device; false: on the CPU, for feature matrices that do not fit")
    regression.add_argument("--it0", type=int, help=argparse.SUPPRESS)  # the reference's: how often its solver looks
    return parser


def evaluate(args, key, backbone, sets, features, device):
    """Fit, print and record for one checkpoint key. Returns {lambda: metrics}, accuracies in percent."""
    (train_features, train_labels), (val_features, val_labels) = features
    x = F.normalize(train_features, dim=1).to(device)
    classes, y = train_labels.to(device).unique(return_inverse=True)  # a subset may lack some
    metrics, weights = {}, None
    for lambd in sorted(args.lr_lambd, reverse=True):  # each fit starts from the last one, which is smoother
        weights, fit = fit_logistic(x, y, len(classes), lambd if args.raw_lambda else lambd / len(x), weights,
                                    args.tolerance, args.epochs)
        top1, top5 = topk_accuracy(classes[predict(weights, val_features, device)].cpu(), val_labels)
        metrics[lambd] = {"top1": top1, "top5": top5} | fit
    for lambd in args.lr_lambd:
        fit = metrics[lambd]
        late = "" if fit["excess"] <= args.tolerance else f"; not converged, {fit['excess']:.1e} of it may be left"
        print(f"{key}, lambda {lambd:g}: top-1 {fit['top1']:.2f} %, top-5 {fit['top5']:.2f} %, objective "
              f"{fit['objective']:.5f} after {fit['iterations']} iterations{late}", flush=True)
    if results_folder(args):
        settings = shared_settings(args, backbone, *sets) | {"raw_lambda": args.raw_lambda, "tolerance": args.tolerance}
        append_result(results_folder(args), "logistic", args.pretrained_weights, key, settings,
                      {f"{lambd:g}": metrics[lambd] for lambd in args.lr_lambd})
    return metrics


def main():
    args = get_args_parser().parse_args()
    for name in ("lr_lambd", "tolerance"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) <= 0:
            raise engine.InputError(f"--{name} {values}: must be above 0")
    process = start_process(args)
    backbones, _ = read_backbones(args)
    sets = read_sets(args)
    features = extract_features_of_keys(args, backbones, sets, process)
    torch.set_float32_matmul_precision("highest")  # the bound that ends a fit is finer than TF32
    if process.rank == 0:
        # MPS has no double precision, which sums over the images are kept in.
        device = process.device if args.use_cuda and process.device.type != "mps" else "cpu"
        for key, backbone in backbones.items():
            evaluate(args, key, backbone, sets, features[key], device)


if __name__ == "__main__":
    engine.run(main)
