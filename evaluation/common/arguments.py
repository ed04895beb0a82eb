"""Flags that all evaluations share."""
import argparse

import engine
import models
from evaluation.common.data import DATASETS


def int_from(minimum):
    """argparse type for integers from `minimum` on."""
    def parse(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, not {text}")
        return int(text)
    parse.__name__ = "int"  # argparse says `invalid int value`
    return parse


def probability(text):
    """argparse type for numbers of 0..1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number of 0..1, not {text}")
    return float(text)


def evaluation_parser(description, frozen=True, labelled=True, several=False, recorded=True):
    """An `ArgumentParser` with the shared flags; a protocol adds its own and overrides defaults with `set_defaults`.

    frozen: with the flags of features that are extracted once. labelled: with those of training and validation images;
    without, several: --data_path may name several places. recorded: with the folders of results.json.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--pretrained_weights", required=True,
                          help="checkpoint (.pth, .safetensors), or the word `random` for an untrained network")
    backbone.add_argument("--checkpoint_key", default="teacher",
                          help="entry of the checkpoint; a comma list is evaluated in turn")
    backbone.add_argument("--arch", choices=models.ARCHS, help="by default the checkpoint's own, else vit_small")
    backbone.add_argument("--patch_size", type=int_from(1), help="of a ViT; by default the checkpoint's own, else 16")
    backbone.add_argument("--window_size", type=int_from(1), help="of a Swin; by default the checkpoint's own, else 7")

    if frozen:
        features = parser.add_argument_group("features")
        add_pooling(features)
        _add_kept_features(features)

    data = parser.add_argument_group("data")
    if labelled:
        _add_labelled(data)
    else:
        data.add_argument("--data_path", help="folder of the data", **(engine.SEVERAL if several else {}))
    data.add_argument("--batch_size_per_gpu", type=int_from(1), default=128, help="images per process and batch")
    data.add_argument("--num_workers", type=int_from(0), default=engine.default_workers(),
                      help="loader workers per process; by default its share of the cores less one, at most 10")

    run = parser.add_argument_group("run")
    if recorded:
        run.add_argument("--output_dir", help="folder whose results.json gets a record of this evaluation")
        run.add_argument("--results_dir", help="another folder for results.json")
    engine.add_device_flags(run)
    return parser


def _add_labelled(data):
    data.add_argument("--dataset", choices=DATASETS, default="imagefolder",
                      help="imagefolder: DATA/{train,val}/CLASS/IMAGE; the others as torchvision keeps them")
    data.add_argument("--data_path", help="folder of the data; by default "
                      + ", ".join(f"{folder} ({name})" for name, (folder, _) in DATASETS.items()))
    data.add_argument("--download", type=engine.bool_flag, nargs="?", const=True, default=False,
                      help="let torchvision fetch the data set if it is missing")
    data.add_argument("--train_subset", metavar="FILE|FRACTION",
                      help="train on part of the images: a list of file names, one a line, or a share of each class")
    data.add_argument("--subset_seed", type=int_from(0), default=0, help="of the draw of a fraction")
    data.add_argument("--image_size", type=int_from(1),
                      help="side in pixels; by default that of the checkpoint's global crops, else 224")


def add_pooling(features):
    """Add the flags of `pool_features` to a parser or group."""
    features.add_argument("--n_last_blocks", type=int_from(1), default=1,
                          help="blocks whose [CLS] tokens are concatenated")
    features.add_argument("--avgpool_patchtokens", type=int, choices=(0, 1, 2), default=0,
                          help="0: [CLS] tokens; 1: mean patch token of the last block, not normed; 2: both, normed")


def _add_kept_features(features):
    features.add_argument("--dump_features", metavar="DIR", help="folder to keep the extracted features in")
    features.add_argument("--load_features", metavar="DIR",
                          help="use the features kept there if they fit weights, images and settings, else say why not")


def checkpoint_keys(weights, text):
    """Keys to evaluate in turn from the comma list `text`; random weights have none, hence the one name `random`."""
    if weights == "random":
        return ["random"]
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if not keys:
        raise engine.InputError("--checkpoint_key is empty")
    return keys
