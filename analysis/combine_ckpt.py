"""Join a backbone and the head of a linear probe to the classifier that the robustness analyses test.

    JOB=work_dirs/JOB_NAME
    python analysis/combine_ckpt.py --checkpoint_backbone $JOB/checkpoint.pth \\
        --checkpoint_linear $JOB/linear/teacher/checkpoint_teacher_linear.pth --output_file $JOB/classifier.pth

Of a sweep the best head is taken. The file holds `state_dict` (the backbone's names, `linear.weight`, `linear.bias`) and
`settings`, which say how the features are made; no states of optimisers.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import engine
import models
from analysis import common
from analysis.classifier import feature_settings
from evaluation.common.arguments import int_from
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.features import feature_dim


def get_args_parser():
    parser = argparse.ArgumentParser(description="Join a backbone and a linear head", allow_abbrev=False)
    parser.add_argument("--checkpoint_backbone", required=True, help="pre-training checkpoint or extracted backbone")
    parser.add_argument("--checkpoint_linear", required=True, help="checkpoint of a linear probe, of many heads or of one")
    parser.add_argument("--output_file", required=True, help="file to write, .pth")
    parser.add_argument("--checkpoint_key", help="entry of the backbone's file; by default teacher, or state_dict in a "
                        "file without")
    parser.add_argument("--arch", choices=models.ARCHS, help="by default what the files say, else vit_small")
    parser.add_argument("--patch_size", type=int_from(1), help="by default what the files say, else 16")
    return parser


def best_linear(checkpoint, path):
    """(weight [C, F], bias [C], number of the head) of the best head in the checkpoint of a linear probe."""
    state = checkpoint.get("state_dict")
    head = checkpoint.get("best_acc_hidx", 0)
    for prefix in (f"{head}.module.linear.", "module.linear.", "linear."):
        names = [f"{prefix}{part}" for part in ("weight", "bias")]
        if isinstance(state, dict) and all(torch.is_tensor(state.get(name)) for name in names):
            weight, bias = (state[name] for name in names)
            if weight.ndim != 2 or bias.shape != weight.shape[:1]:
                raise engine.InputError(f"checkpoint {path}: its linear layer has shapes {tuple(weight.shape)} and "
                                       f"{tuple(bias.shape)}")
            return weight.float().clone(), bias.float().clone(), head
    raise engine.InputError(f"checkpoint {path}: no linear probe (no state_dict with {head}.module.linear.weight or "
                           "module.linear.weight)")


def main():
    args = get_args_parser().parse_args()
    linear = engine.load_checkpoint(args.checkpoint_linear)
    weight, bias, head = best_linear(linear, args.checkpoint_linear)
    stored = linear.get("settings", {})
    if not isinstance(stored, dict):
        raise engine.InputError(f"checkpoint {args.checkpoint_linear}: its settings are a {type(stored).__name__}")
    content = engine.load_checkpoint(args.checkpoint_backbone)
    backbone = load_evaluated_backbone(args.checkpoint_backbone, common.checkpoint_key(content, args.checkpoint_key),
                                       args.arch or stored.get("arch"), args.patch_size or stored.get("patch_size"),
                                       image_size=stored.get("image_size"), checkpoint=content)
    if stored.get("weights_hash", backbone.weights_hash) != backbone.weights_hash:
        raise engine.InputError(f"checkpoint {args.checkpoint_linear}: this probe was trained on another backbone than "
                               f"{backbone.key} of {args.checkpoint_backbone}")
    settings = feature_settings(stored, backbone.arch) | {
        "arch": backbone.arch, "patch_size": backbone.patch_size, "window_size": backbone.window_size,
        "global_crops_size": backbone.image_size, **backbone.pixel_stats.as_settings()}
    dim = feature_dim(backbone.model, settings["n_last_blocks"], settings["avgpool_patchtokens"])
    if weight.shape[1] != dim:
        raise engine.InputError(f"checkpoint {args.checkpoint_linear}: its head takes {weight.shape[1]} features, "
                               f"{backbone.arch} gives {dim} (n_last_blocks {settings['n_last_blocks']}, "
                               f"avgpool_patchtokens {settings['avgpool_patchtokens']})")
    state = backbone.model.state_dict() | {"linear.weight": weight, "linear.bias": bias}
    common.output_folder(Path(args.output_file).resolve().parent, "--output_file")
    engine.save_atomically({"state_dict": state, "settings": settings, "epoch": linear.get("epoch", 0),
                           "best_acc": linear.get("best_acc"), "best_acc_hidx": head}, args.output_file)
    print(f"{args.output_file}: {backbone.arch} with head {head} of {len(weight)} classes, accuracy "
          f"{linear.get('best_acc', 'unknown')}", flush=True)


if __name__ == "__main__":
    engine.run(main)
