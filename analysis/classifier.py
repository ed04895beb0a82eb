"""The classifier that the robustness analyses test, a backbone and a linear layer, and their passes over images.

Letters: B images of a batch, F feature size, C classes, S pixels.
"""
import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset

import engine
import models
from analysis.common import add_run_flags, output_folder
from evaluation.common.arguments import int_from
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.features import feature_dim, pool_features
from evaluation.common.protocol import start_process
from evaluation.common.results import append_result, read_results


class Classifier(nn.Module):
    """Normalised images [B, 3, S, S] to logits [B, C]; see `pool_features` for the two settings."""

    def __init__(self, backbone, linear, n_last_blocks, avgpool_patchtokens):
        super().__init__()
        self.backbone, self.linear = backbone, linear
        self.n_last_blocks, self.avgpool_patchtokens = n_last_blocks, avgpool_patchtokens

    def forward(self, images):
        return self.linear(pool_features(self.backbone, images, self.n_last_blocks, self.avgpool_patchtokens))


def feature_settings(stored, arch):
    """{"n_last_blocks", "avgpool_patchtokens"}: the stored ones, else those of the paper's linear probe for `arch`."""
    large = arch in ("vit_base", "vit_large")
    return {"n_last_blocks": stored.get("n_last_blocks", 1 if large else 4),
            "avgpool_patchtokens": stored.get("avgpool_patchtokens", 2 if large else 0)}


def classifier_parser(description, data, weights="--checkpoint", data_flag="--data"):
    """An `ArgumentParser` with the flags that the tests of a classifier share; `data` is the default folder."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(weights, dest="checkpoint", required=True,
                        help="classifier of combine_ckpt.py, or a fine-tuned ViT with a `head`")
    parser.add_argument(data_flag, "--data_path", dest="data", default=data, help="folder of the data")
    parser.add_argument("--arch", choices=models.ARCHS, help="by default what the file says, else vit_small")
    parser.add_argument("--patch_size", type=int_from(1), help="by default what the file says, else 16")
    parser.add_argument("--output_dir", help="folder whose results.json gets a record; pictures go there too")
    add_run_flags(parser)
    return parser


def load_classifier(path, arch=None, patch_size=None, num_classes=None):
    """(Classifier on the CPU, EvaluatedBackbone) from a file of combine_ckpt.py, of the reference's, or a fine-tuned one.

    Raises InputError when it holds no linear layer, when anything does not fit, and, if `num_classes` is given, for a
    layer of another number of outputs.
    """
    content = engine.load_checkpoint(path)
    key = "model" if isinstance(content.get("model"), dict) else "state_dict"
    advice = "analysis/combine_ckpt.py makes one"
    if key not in content:
        raise engine.InputError(f"checkpoint {path}: no classifier (no state_dict in it); {advice}")
    state = engine.network_state_dict(content, key, path)
    stored = content.get("settings", {})
    if not isinstance(stored, dict):
        raise engine.InputError(f"checkpoint {path}: its settings are a {type(stored).__name__}")
    name = "linear" if "linear.weight" in state else "head"
    parts = [state.get(f"{name}.{part}") for part in ("weight", "bias")]
    if any(part is None for part in parts) or parts[0].ndim != 2:
        raise engine.InputError(f"checkpoint {path}: no classifier under {key!r} (no linear.weight, linear.bias); {advice}")
    rest = {other: value for other, value in state.items() if not other.startswith(("linear.", "head."))}
    if "fc_norm.weight" in rest:
        raise engine.InputError(f"checkpoint {path}: fine-tuned on the mean patch token; these tests take [CLS] tokens")
    known = stored or content.get("args", {})  # the latter of fine-tuning
    backbone = load_evaluated_backbone(path, key, arch, patch_size, checkpoint={key: rest, "args": known})
    if name == "head":  # fine-tuned: on the last [CLS] token
        stored = {"n_last_blocks": 1, "avgpool_patchtokens": 0}
    settings = feature_settings(stored, backbone.arch)
    C, F = parts[0].shape
    dim = feature_dim(backbone.model, *settings.values())
    if dim != F:
        raise engine.InputError(f"checkpoint {path}: its linear layer takes {F} features, {backbone.arch} gives {dim}")
    if num_classes is not None and C != num_classes:
        raise engine.InputError(f"checkpoint {path}: it has {C} classes; this needs {num_classes}")
    linear = nn.Linear(F, C)
    engine.load_strictly(linear, {"weight": parts[0], "bias": parts[1]}, path)
    return Classifier(backbone.model, linear, **settings).eval().requires_grad_(False), backbone


def start(args, num_classes=None):
    """(Process, Classifier on its device, EvaluatedBackbone) for flags of `classifier_parser`; see `load_classifier`."""
    process = start_process(args)
    if args.output_dir:  # what is wrong with it is found before the work
        output_folder(args.output_dir, "--output_dir")
        read_results(args.output_dir)
    classifier, backbone = load_classifier(args.checkpoint, args.arch, args.patch_size, num_classes)
    return process, classifier.to(process.device), backbone


def record(args, protocol, backbone, settings, metrics):
    """Add a result to OUTPUT_DIR/results.json, if there is an `--output_dir`. Call it on rank 0 only."""
    if args.output_dir:
        settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "image_size": backbone.image_size,
                    "weights_hash": backbone.weights_hash, "data": args.data} | settings
        append_result(args.output_dir, protocol, args.checkpoint, backbone.key, settings, metrics)


def own_batches(dataset, batch_size, num_workers, process):
    """Batches of every W-th item of `dataset`, in order: this process's share, without repetition."""
    share = Subset(dataset, range(process.rank, len(dataset), process.world_size))
    return DataLoader(share, batch_size, num_workers=num_workers, pin_memory=process.device.type == "cuda")


def summed(values, process):
    """Sum over the processes of a float64 tensor, on the CPU."""
    if process.world_size > 1:
        values = values.to(process.device)
        dist.all_reduce(values)
    return values.cpu()


@torch.inference_mode()
def accuracy(classifier, images, batch_size, num_workers, process, right=None):
    """Share of the images (`ImageSet` of normalised tensors) that are classified rightly, over all processes.

    right: function of logits [B, C] and labels [B] to bool [B]; by default the largest logit is the label's.
    """
    hits = torch.zeros(1, dtype=torch.int64, device=process.device)
    for batch, labels, _ in own_batches(images, batch_size, num_workers, process):
        logits = classifier(batch.to(process.device, non_blocking=True)).float()
        labels = labels.to(process.device)
        hits += (logits.argmax(dim=1) == labels if right is None else right(logits, labels)).sum()
    return summed(hits.cpu().double(), process).item() / len(images)


def require(folder, expected, where):
    """Raise InputError unless the folder exists: what is expected there and where it is described."""
    if not folder.is_dir():
        raise engine.InputError(f"no folder {folder}; expected: {expected} (described at {where})")
