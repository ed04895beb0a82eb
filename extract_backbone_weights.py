"""Write the backbone of a checkpoint to a file of its own.

    python extract_backbone_weights.py work_dirs/JOB/checkpoint.pth backbone.pth --checkpoint_key teacher
    python extract_backbone_weights.py checkpoint.pth vit.safetensors --checkpoint_key teacher --format timm
    python extract_backbone_weights.py checkpoint.pth FOLDER --checkpoint_key teacher --format hf
    python extract_backbone_weights.py checkpoint.pth vit.onnx --checkpoint_key teacher --format onnx

`--format ibot` keeps this project's names: {"state_dict": {name: tensor}} in a .pth file, {name: tensor} in a
.safetensors file. `--format flat` is {name: tensor} in both, as the reference's fine-tuning reads them. `--format timm` is
{name: tensor} in both, which models of timm load strictly, see below. Where images were not normalised with ImageNet's
statistics, a .pth file of `ibot` has "args" with "mean" and "std" too; .safetensors files have them in their metadata.

    timm.create_model("vit_small_patch16_224", num_classes=0)
    timm.create_model("vit_small_patch16_224", num_classes=0, reg_tokens=4, no_embed_class=True)     # --registers 4
    timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))

(timm's Swin has eps 1e-5 by default, with which its features differ by about 2e-5 from those here).

`--format hf` writes a folder for `transformers.AutoModel.from_pretrained(FOLDER)` and `AutoImageProcessor`, `--format onnx`
a graph for any number of images; see `models/export.py`.
"""
import argparse
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save

import engine
import models
from evaluation.common.arguments import int_from
from evaluation.common.backbone import load_evaluated_backbone
from images import IMAGENET, stored_pixel_stats
from models.export import hf_model, hf_preprocessor, timm_state_dict, write_onnx


def get_args_parser():
    parser = argparse.ArgumentParser(description="Extract the backbone of a checkpoint", allow_abbrev=False)
    parser.add_argument("checkpoint", help="file to read (.pth or .safetensors)")
    parser.add_argument("output", help="file to write, .pth or .safetensors (--format onnx: .onnx), or a new folder (hf)")
    parser.add_argument("--checkpoint_key", default="state_dict", help="entry of the checkpoint: student, teacher, ...")
    parser.add_argument("--with_head", type=engine.bool_flag, default=False, help="keep the projection head too")
    parser.add_argument("--format", choices=("ibot", "flat", "timm", "hf", "onnx"), default="ibot",
                        help="ibot, flat, timm: weights; hf: a folder for transformers; onnx: a graph")
    network = parser.add_argument_group("hf and onnx", "by default the checkpoint's own, else as in evaluations")
    network.add_argument("--arch", choices=models.ARCHS)
    network.add_argument("--patch_size", type=int_from(1), help="of a ViT")
    network.add_argument("--window_size", type=int_from(1), help="of a Swin")
    network.add_argument("--image_size", type=int_from(1), help="side of the images in pixels")
    return parser


def extract(checkpoint, key, path, with_head=False, timm_format=False):
    """Names and tensors of the backbone under `key` of a checkpoint dictionary that was read from `path`.

    Raises InputError when there is no such entry, no backbone in it, or a value that is not finite.
    """
    state = engine.backbone_state_dict(checkpoint, key, path)
    if "patch_embed.proj.weight" not in state:
        raise engine.InputError(f"checkpoint {path}: key {key!r} holds no backbone (no patch_embed.proj.weight)")
    if timm_format:
        state = timm_state_dict(state)
    elif with_head:
        whole = engine.without_prefix(engine.network_state_dict(checkpoint, key, path), "backbone.")
        state |= {name: value for name, value in whole.items() if name not in state}
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if broken:
        raise engine.InputError(f"checkpoint {path}: {len(broken)} tensors of {key!r} are not finite, the first: "
                               f"{engine.printable(broken[0])}")
    return state


def save_tensors(tensors, path, stats):
    """Write a .safetensors file, with the pixel statistics, if they are not ImageNet's, in its head."""
    if "__metadata__" in tensors:
        raise engine.InputError(f"output {path}: a safetensors file cannot hold a tensor called __metadata__")
    # Clones: safetensors refuses tensors that share storage, as a shared head's two names do.
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    texts = {name: " ".join(map(str, values)) for name, values in stats.as_settings().items()}
    try:
        path.write_bytes(save(tensors, {"format": "pt"} | texts))  # save_file would let nobody else read the file
    except SafetensorError as error:
        raise engine.InputError(f"output {path}: {engine.printable(error, 160)}") from error


def save_hf(backbone, folder):
    """Make a folder of an `EvaluatedBackbone` for `transformers`."""
    config, tensors = hf_model(backbone.model, backbone.arch, backbone.image_size)
    folder.mkdir()
    save_tensors(tensors, folder / "model.safetensors", backbone.pixel_stats)
    for name, content in (("config.json", config),
                          ("preprocessor_config.json", hf_preprocessor(backbone.image_size, backbone.pixel_stats))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def check_arguments(args, output):
    """Raise InputError for an output that cannot be one of this format, and for what the format does not have."""
    endings = {"hf": (), "onnx": (".onnx",)}.get(args.format, (".pth", ".safetensors"))
    if endings and output.suffix not in endings:
        raise engine.InputError(f"output {output}: its name must end in {' or '.join(endings)}")
    if args.with_head and args.format not in ("ibot", "flat"):
        raise engine.InputError(f"--with_head true: --format {args.format} has no such head; use --format ibot")
    if args.format == "hf" and output.exists():
        raise engine.InputError(f"output {output}: is there already; --format hf makes a new folder")


def main():
    args = get_args_parser().parse_args()
    output = Path(args.output)
    check_arguments(args, output)
    checkpoint = engine.load_checkpoint(args.checkpoint)
    state = extract(checkpoint, args.checkpoint_key, args.checkpoint, args.with_head, args.format == "timm")
    stats = stored_pixel_stats(checkpoint, args.checkpoint)
    if output.exists() and output.samefile(args.checkpoint):
        raise engine.InputError(f"output {output}: is the checkpoint itself")
    if args.format in ("hf", "onnx"):
        backbone = load_evaluated_backbone(args.checkpoint, args.checkpoint_key, args.arch, args.patch_size,
                                           args.window_size, args.image_size, checkpoint)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.InputError(f"output {output}: its folder cannot be made ({error.strerror})") from error
    if output.suffix == ".pth" and args.format != "hf":
        known = {"args": stats.as_settings()} if stats != IMAGENET else {}
        engine.save_atomically({"state_dict": state, **known} if args.format == "ibot" else state, output)
    else:
        with engine.replacing(output, "output") as path:
            if args.format == "hf":
                save_hf(backbone, path)
            elif args.format == "onnx":
                write_onnx(backbone.model, backbone.image_size, stats, path)
            else:
                save_tensors(state, path, stats)
    kind = {"timm": "timm names", "hf": "for transformers' AutoModel", "onnx": "a graph"}.get(args.format, "ibot names")
    print(f"{output}: {len(state)} tensors, {sum(value.numel() for value in state.values()) / 1e6:.2f} M values, "
          f"{kind}; images are normalised with {stats}")


if __name__ == "__main__":
    engine.run(main)
