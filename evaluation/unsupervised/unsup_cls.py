"""Unsupervised classification (iBOT, Table 5): clusters of the validation images against their labels.

    python evaluation/unsupervised/unsup_cls.py --pretrained_weights work_dirs/JOB/checkpoint.pth
    torchrun --nproc_per_node 8 evaluation/unsupervised/unsup_cls.py --pretrained_weights ... --checkpoint_key teacher
    python evaluation/unsupervised/unsup_cls.py --device cpu --num_workers 2 --clusters kmeans --pretrained_weights ...

`head` takes the largest output of the projection head for the [CLS] token; the paper pre-trains with as many outputs as
there are classes (`--out_dim 1000`). `kmeans` clusters the frozen features. Features come from all processes; the first
one clusters.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import engine
import utils
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.clustering import head_clusters, kmeans, load_projection_head
from evaluation.common.protocol import extract_features_of_keys, read_backbones, read_sets, start_process
from evaluation.common.results import append_result, results_folder, shared_settings


def get_args_parser():
    parser = evaluation_parser("Clusters of the validation images, compared with their labels")
    clusters = parser.add_argument_group("clusters")
    clusters.add_argument("--clusters", choices=("head", "kmeans"), nargs="+", default=["head", "kmeans"])
    clusters.add_argument("--out_dim", type=int_from(1), help="outputs that the head must have; by default any number")
    clusters.add_argument("--num_clusters", type=int_from(1), help="of k-means; by default the number of classes")
    clusters.add_argument("--seed", type=int_from(0), default=0, help="of the start of k-means")
    clusters.add_argument("--kmeans_iter", type=int_from(1), default=100, help="limit of its rounds")
    return parser


def evaluate(args, key, backbone, head, sets, features, device):
    """Cluster, print and record for one checkpoint key. Returns {"head", "kmeans": metrics in percent}."""
    val_features, labels = features
    found = {}
    if head is not None:
        found["head"] = head_clusters(head, val_features, device)
    if "kmeans" in args.clusters:
        k = args.num_clusters or len(sets[1].classes)
        found["kmeans"] = kmeans(val_features, k, args.seed, args.kmeans_iter, device)[0]
    metrics = {}
    for name, clusters in found.items():
        scores = utils.clustering_scores(labels.numpy(), clusters.numpy())
        metrics[name] = {short: 100 * scores[long] for short, long
                         in (("acc", "adjacc"), ("ari", "ari"), ("nmi", "nmi"), ("fmi", "fscore"))}
        values = ", ".join(f"{short.upper()} {value:.2f} %" for short, value in metrics[name].items())
        metrics[name]["clusters"] = len(clusters.unique())
        print(f"{key}, {name}: {values} ({metrics[name]['clusters']} clusters of {len(labels)} images)", flush=True)
    if results_folder(args):
        settings = shared_settings(args, backbone, *sets) | {"seed": args.seed, "num_clusters": args.num_clusters}
        append_result(results_folder(args), "unsupervised", args.pretrained_weights, key, settings, metrics)
    return metrics


def main():
    args = get_args_parser().parse_args()
    if "head" in args.clusters and args.pretrained_weights == "random":
        raise engine.InputError("--clusters head: random weights have no projection head; use --clusters kmeans")
    if "head" in args.clusters and (args.n_last_blocks, args.avgpool_patchtokens) != (1, 0):
        raise engine.InputError("--clusters head: the head reads the last [CLS] token, "
                               "so --n_last_blocks must be 1 and --avgpool_patchtokens 0")
    process = start_process(args)
    backbones, checkpoint = read_backbones(args)
    heads = {key: load_projection_head(checkpoint, key, args.pretrained_weights, hint="; --clusters kmeans needs none")
             if "head" in args.clusters else None for key in backbones}
    for key, head in heads.items():
        outputs = head and len(head.last_layer.weight_v)
        if head and args.out_dim not in (None, outputs):
            raise engine.InputError(f"--out_dim {args.out_dim}: the head of {key} has {outputs} outputs")
    sets = read_sets(args)
    features = extract_features_of_keys(args, backbones, sets[1:], process)
    if process.rank == 0:
        device = "cpu" if process.device.type == "mps" else process.device  # MPS has no double precision
        for key, backbone in backbones.items():
            evaluate(args, key, backbone, heads[key], sets, features[key][0], device)


if __name__ == "__main__":
    engine.run(main)
