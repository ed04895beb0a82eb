"""Write the backbone of a checkpoint to a file of its own.

    python extract_backbone_weights.py work_dirs/JOB/checkpoint.pth backbone.pth --checkpoint_key teacher
    python extract_backbone_weights.py checkpoint.pth vit.safetensors --checkpoint_key teacher --format timm

`--format ibot` keeps this project's names: {"state_dict": {name: tensor}} in a .pth file, {name: tensor} in a
.safetensors file. `--format flat` is {name: tensor} in both, as the reference's fine-tuning reads them. `--format timm` is
{name: tensor} in both, which models of timm load strictly, see below. Where images were not normalised with ImageNet's
statistics, a .pth file of `ibot` has "args" with "mean" and "std" too; .safetensors files have them in their metadata.

    timm.create_model("vit_small_patch16_224", num_classes=0)
    timm.create_model("vit_small_patch16_224", num_classes=0, reg_tokens=4, no_embed_class=True)     # --registers 4
    timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))

(timm's Swin has eps 1e-5 by default, with which its features differ by about 2e-5 from those here).
"""
import argparse
import math
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

import engine
from images import IMAGENET, stored_pixel_stats


def get_args_parser():
    parser = argparse.ArgumentParser(description="Extract the backbone of a checkpoint", allow_abbrev=False)
    parser.add_argument("checkpoint", help="file to read (.pth or .safetensors)")
    parser.add_argument("output", help="file to write; its ending, .pth or .safetensors, says the kind")
    parser.add_argument("--checkpoint_key", default="state_dict", help="entry of the checkpoint: student, teacher, ...")
    parser.add_argument("--with_head", type=engine.bool_flag, default=False, help="keep the projection head too")
    parser.add_argument("--format", choices=("ibot", "flat", "timm"), default="ibot")
    return parser


def timm_state_dict(state):
    """Backbone names of this project to timm's: Swin's patch merging belongs to the stage that it begins, not ends.

    Beside registers timm has no position for the class token: it goes into that token, unless it is there already.
    """
    state = {name: value for name, value in state.items()
             if name != "masked_embed" and not name.endswith(("relative_position_index", "attn_mask"))}
    positions = state.get("pos_embed") if {"reg_token", "cls_token"} <= state.keys() else None
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:].clone()}  # of 1 + N
    return {re.sub(r"^layers\.(\d{1,4})\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name): value
            for name, value in state.items()}


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


def main():
    args = get_args_parser().parse_args()
    output = Path(args.output)
    if output.suffix not in (".pth", ".safetensors"):
        raise engine.InputError(f"output {output}: its name must end in .pth or .safetensors")
    if args.with_head and args.format == "timm":
        raise engine.InputError("--with_head true: timm's models have no such head; use --format ibot")
    checkpoint = engine.load_checkpoint(args.checkpoint)
    state = extract(checkpoint, args.checkpoint_key, args.checkpoint, args.with_head, args.format == "timm")
    stats = stored_pixel_stats(checkpoint, args.checkpoint)
    if output.exists() and output.samefile(args.checkpoint):
        raise engine.InputError(f"output {output}: is the checkpoint itself")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.InputError(f"output {output}: its folder cannot be made ({error.strerror})") from error
    if output.suffix == ".pth":
        known = {"args": stats.as_settings()} if stats != IMAGENET else {}
        engine.save_atomically({"state_dict": state, **known} if args.format == "ibot" else state, output)
    else:
        if "__metadata__" in state:
            raise engine.InputError(f"output {output}: a safetensors file cannot hold a tensor called __metadata__")
        temporary = output.with_name(f".{output.name}.tmp{os.getpid()}")
        # Clones: safetensors refuses tensors that share storage, as a shared head's two names do.
        tensors = {name: value.clone().contiguous() for name, value in state.items()}
        try:
            save_file(tensors, temporary, metadata={"format": "pt"} | {
                name: " ".join(map(str, values)) for name, values in stats.as_settings().items()})
            os.replace(temporary, output)
        except SafetensorError as error:
            raise engine.InputError(f"output {output}: {engine.printable(error, 160)}") from error
        finally:
            temporary.unlink(missing_ok=True)
    print(f"{output}: {len(state)} tensors, {sum(value.numel() for value in state.values()) / 1e6:.2f} M values, "
          f"{'timm' if args.format == 'timm' else 'ibot'} names; images are normalised with {stats}")


if __name__ == "__main__":
    engine.run(main)
