"""What the protocols on fixed features have in common: from the flags to the features of every checkpoint key."""
import engine
from evaluation.common.arguments import checkpoint_keys
from evaluation.common.backbone import load_evaluated_backbone, read_weights
from evaluation.common.data import image_sets
from evaluation.common.features import feature_dim, frozen_features
from evaluation.common.results import read_results, results_folder


def start_process(args):
    """Join the other processes and print what is run; returns the `engine.Process`. On CUDA: `engine.use_fast_products`."""
    process = engine.init_process(args.device, args.dist_url)
    products = engine.use_fast_products(process.device)
    if process.rank == 0:
        print(f"{engine.describe_run(args, process)}\nproducts of float32: {products}", flush=True)
    return process


def read_sets(args):
    """(training, validation) `ImageSet` for the flags of `evaluation_parser`."""
    return image_sets(args.dataset, args.data_path, train_subset=args.train_subset, subset_seed=args.subset_seed,
                      download=args.download)


def read_backbones(args):
    """({key: EvaluatedBackbone}, content of the checkpoint) for the flags of `evaluation_parser`.

    The file is read once, and every key before the first is evaluated, so that a wrong one is not found hours later; nor
    is a damaged results.json.
    """
    if results_folder(args):
        read_results(results_folder(args))
    weights = args.pretrained_weights
    checkpoint = read_weights(weights)
    backbones = {key: load_evaluated_backbone(weights, key, args.arch, args.patch_size, args.window_size, args.image_size,
                                              checkpoint)
                 for key in checkpoint_keys(weights, args.checkpoint_key)}
    for backbone in backbones.values():
        feature_dim(backbone.model, args.n_last_blocks, args.avgpool_patchtokens)
    return backbones, checkpoint


def read_vits(args):
    """{key: EvaluatedBackbone} for the flags of `evaluation_parser(labelled=False)`, which have no image size.

    As `read_backbones`; raises InputError also for a Swin, which has no [CLS] token and no grid of one scale.
    """
    if results_folder(args):
        read_results(results_folder(args))
    weights = args.pretrained_weights
    checkpoint = read_weights(weights)
    backbones = {key: load_evaluated_backbone(weights, key, args.arch, args.patch_size, checkpoint=checkpoint)
                 for key in checkpoint_keys(weights, args.checkpoint_key)}
    for backbone in backbones.values():
        if backbone.arch.startswith("swin"):
            raise engine.InputError(f"{weights}: {backbone.arch} has no [CLS] token; this evaluation needs a ViT")
    return backbones


def extract_features_of_keys(args, backbones, sets, process):
    """{key: [(features, labels) of each `ImageSet` of `sets`]}, see `frozen_features`.

    All keys before the first is classified: meanwhile the other processes would wait, until their time is up.
    """
    features = {}
    for key, backbone in backbones.items():
        features[key] = [frozen_features(backbone, images, process, args.n_last_blocks, args.avgpool_patchtokens,
                                         args.batch_size_per_gpu, args.num_workers, args.dump_features,
                                         args.load_features) for images in sets]
        backbone.model.cpu()
    return features
