"""k-NN accuracy of a frozen backbone (iBOT, Section 4.1; Wu et al., 2018).

    python evaluation/eval_knn.py --pretrained_weights work_dirs/JOB/checkpoint.pth --data_path data/imagenet
    torchrun --nproc_per_node 8 evaluation/eval_knn.py --pretrained_weights ... --checkpoint_key teacher,student
    python evaluation/eval_knn.py --device cpu --num_workers 2 --pretrained_weights random --arch vit_tiny

`random` evaluates an untrained network.

Reads DATA/train/CLASS/IMAGE and DATA/val/CLASS/IMAGE. Features come from all processes; the first one classifies.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from evaluation.common.arguments import checkpoint_keys, evaluation_parser, int_from
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import image_folders
from evaluation.common.features import extract_features, feature_dim, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy, usable_ks
from evaluation.common.results import append_result


def get_args_parser():
    parser = evaluation_parser("k-NN evaluation of a frozen backbone")
    knn = parser.add_argument_group("k-NN")
    knn.add_argument("--nb_knn", type=int_from(1), nargs="+", default=[10, 20, 100, 200], help="values of k")
    knn.add_argument("--temperature", type=float, default=0.07, help="of the votes exp(similarity / temperature)")
    knn.add_argument("--use_cuda", type=utils.bool_flag, default=True,
                     help="classify on the backbone's device; false: on the CPU, for feature matrices that do not fit")
    return parser


def evaluate(args, key, backbone, train, val, process):
    """Extract, classify, print and record for one checkpoint key. Returns {k: (top-1, top-5)} in percent on rank 0."""
    ks = usable_ks(args.nb_knn, len(train))
    model = backbone.model.to(process.device)

    def model_fn(images):
        return pool_features(model, images, args.n_last_blocks, args.avgpool_patchtokens)

    loaders = [sharded_loader(data, args.batch_size_per_gpu, args.num_workers, process) for data in (train, val)]
    train_features, train_labels = extract_features(model_fn, loaders[0], process, "train")
    test_features, test_labels = extract_features(model_fn, loaders[1], process, "val")
    if process.rank > 0:
        return None
    predictions = knn_classify(train_features, train_labels, test_features, len(train.classes), ks, args.temperature,
                               process.device if args.use_cuda else "cpu")
    accuracy = {k: topk_accuracy(predictions[k], test_labels) for k in ks}
    for k, (top1, top5) in accuracy.items():
        print(f"{key}, {k}-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
    if args.output_dir:
        settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "window_size": backbone.window_size,
                    "image_size": backbone.image_size, "n_last_blocks": args.n_last_blocks,
                    "avgpool_patchtokens": args.avgpool_patchtokens, "temperature": args.temperature,
                    "data_path": args.data_path, "train_images": len(train), "val_images": len(val)}
        append_result(args.output_dir, "knn", args.pretrained_weights, key, settings,
                      {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in accuracy.items()})
    return accuracy


def main():
    args = get_args_parser().parse_args()
    if args.temperature <= 0:
        raise utils.InputError(f"--temperature {args.temperature}: must be above 0")
    process = utils.init_process(args.device, args.dist_url)
    if process.rank == 0:
        print(utils.describe_run(args, process), flush=True)
    # Every key is read before the first is evaluated, so that a wrong one is not found hours later.
    backbones = {key: load_evaluated_backbone(args.pretrained_weights, key, args.arch, args.patch_size,
                                              args.window_size, args.image_size)
                 for key in checkpoint_keys(args.pretrained_weights, args.checkpoint_key)}
    for backbone in backbones.values():
        feature_dim(backbone.model, args.n_last_blocks, args.avgpool_patchtokens)
    train, val = image_folders(args.data_path, next(iter(backbones.values())).image_size)
    for key, backbone in backbones.items():
        evaluate(args, key, backbone, train, val, process)


if __name__ == "__main__":
    utils.run(main)
