"""k-NN accuracy of a frozen backbone (iBOT, Section 4.1; Wu et al., 2018).

    python evaluation/eval_knn.py --pretrained_weights work_dirs/JOB/checkpoint.pth --data_path data/imagenet
    torchrun --nproc_per_node 8 evaluation/eval_knn.py --pretrained_weights ... --checkpoint_key teacher,student
    python evaluation/eval_knn.py --device cpu --num_workers 2 --pretrained_weights random --arch vit_tiny

`random` evaluates an untrained network.

Features come from all processes; the first one classifies.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.knn import knn_classify, topk_accuracy, usable_ks
from evaluation.common.protocol import extract_features_of_keys, read_backbones, read_sets, start_process
from evaluation.common.results import append_result, results_folder, shared_settings


def get_args_parser():
    parser = evaluation_parser("k-NN evaluation of a frozen backbone")
    knn = parser.add_argument_group("k-NN")
    knn.add_argument("--nb_knn", type=int_from(1), nargs="+", default=[10, 20, 100, 200], help="values of k")
    knn.add_argument("--temperature", type=float, default=0.07, help="of the votes exp(similarity / temperature)")
    knn.add_argument("--use_cuda", type=engine.bool_flag, default=True,
                     help="classify on the backbone's device; false: on the CPU, for feature matrices that do not fit")
    return parser


def evaluate(args, key, backbone, sets, features, ks, device):
    """Classify, print and record for one checkpoint key. Returns {k: (top-1, top-5)} in percent."""
    train, val = sets
    (train_features, train_labels), (val_features, val_labels) = features
    predictions = knn_classify(train_features, train_labels, val_features, len(train.classes), ks, args.temperature, device)
    accuracy = {k: topk_accuracy(ranked, val_labels) for k, ranked in predictions.items()}
    for k, (top1, top5) in accuracy.items():
        print(f"{key}, {k}-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
    if results_folder(args):
        settings = shared_settings(args, backbone, train, val) | {"temperature": args.temperature}
        append_result(results_folder(args), "knn", args.pretrained_weights, key, settings,
                      {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracy.items()})
    return accuracy


def main():
    args = get_args_parser().parse_args()
    if args.temperature <= 0:
        raise engine.InputError(f"--temperature {args.temperature}: must be above 0")
    process = start_process(args)
    backbones, _ = read_backbones(args)
    sets = read_sets(args)
    ks = usable_ks(args.nb_knn, len(sets[0]))
    features = extract_features_of_keys(args, backbones, sets, process)
    if process.rank == 0:
        for key, backbone in backbones.items():
            evaluate(args, key, backbone, sets, features[key], ks, process.device if args.use_cuda else "cpu")


if __name__ == "__main__":
    engine.run(main)
