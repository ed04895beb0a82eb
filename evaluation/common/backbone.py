"""The frozen backbone that an evaluation looks at."""
import argparse
import math
from dataclasses import dataclass

import torch

import models
import utils

RANDOM_SEED = 0  # the untrained baseline is one fixed network, the same in every process
MOST_CELLS = 512  # patches along a side of the images that a checkpoint was trained on


@dataclass(frozen=True)
class EvaluatedBackbone:
    """`model`: on the CPU, in evaluation mode, single precision, no gradients. Sizes in pixels (window: tokens)."""
    model: torch.nn.Module
    arch: str
    patch_size: int
    window_size: int
    image_size: int


def load_evaluated_backbone(weights, key, arch=None, patch_size=None, window_size=None, image_size=None):
    """Build the backbone of a checkpoint and load its entry `key`.

    Settings that are None are those of the checkpoint's own `args`, else vit_small, 16, 7 and 224. The word `random` as
    `weights` gives an untrained network. Raises InputError for a missing file or key and for weights that do not fit.
    """
    if weights in ("", "download", "supervised"):
        raise utils.InputError(f"--pretrained_weights {weights!r}: nothing is downloaded; give a file, or random")
    checkpoint = {} if weights == "random" else utils.load_checkpoint(weights)
    state = None if weights == "random" else utils.backbone_state_dict(checkpoint, key, weights)

    stored = checkpoint.get("args", {})
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    if not isinstance(stored, dict):
        raise utils.InputError(f"checkpoint {weights}: its args are a {type(stored).__name__}")
    arch = arch or stored.get("arch", "vit_small")
    if not isinstance(arch, str) or arch not in models.ARCHS:
        raise utils.InputError(f"checkpoint {weights}: its arch, {_shown(arch)}, is not one of {', '.join(models.ARCHS)}")

    def setting(given, name, default, largest):
        value = stored.get(name, default) if given is None else given
        if given is None and (type(value) is not int or not 1 <= value <= largest):
            raise utils.InputError(f"checkpoint {weights}: its {name}, {_shown(value)}, must be a number of 1..{largest}")
        return value

    # Bounds, as the sizes of a foreign file must not decide how much memory is taken; flags may exceed them.
    patch_size = setting(patch_size, "patch_size", 16, 256)
    window_size = setting(window_size, "window_size", 7, 32)
    image_size = setting(image_size, "global_crops_size", 224, 4096)
    is_swin = arch.startswith("swin")
    if is_swin:
        patch_size = 4
    if image_size % patch_size:
        raise utils.InputError(f"--image_size {image_size} does not divide into patches of {patch_size} pixels")

    sizes = f"window {window_size}" if is_swin else f"patch {patch_size}"
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = models.build_backbone(arch, patch_size=patch_size, window_size=window_size, img_size=image_size)
        source = f"untrained, random weights (seed {RANDOM_SEED})"
    else:
        trained_size = 224 if is_swin else _trained_image_size(state, arch, patch_size, weights)
        model = models.build_backbone(arch, patch_size=patch_size, window_size=window_size, img_size=trained_size)
        utils.load_backbone(model, state, weights)
        source = f"{key} of {weights}"
    if utils.is_main_process():
        print(f"backbone {arch}, {sizes}, images of {image_size} pixels: {source}", flush=True)
    return EvaluatedBackbone(model.float().eval().requires_grad_(False), arch, patch_size, window_size, image_size)


def _shown(value):
    return utils.printable(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def _trained_image_size(state, arch, patch_size, weights):
    """Side in pixels of the images that a ViT's position embedding was made for."""
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or positions.ndim != 3 or patches is None or patches.ndim != 4:
        raise utils.InputError(f"checkpoint {weights} does not fit {arch}: it is no ViT (pos_embed); see --arch")
    if patches.shape[-1] != patch_size:
        raise utils.InputError(f"checkpoint {weights} has patches of {patches.shape[-1]} pixels, not {patch_size}; "
                               "see --patch_size")
    cells = math.isqrt(max(positions.shape[1] - 1, 0))
    if not 1 <= cells <= MOST_CELLS or cells ** 2 != positions.shape[1] - 1:
        raise utils.InputError(f"checkpoint {weights}: its {positions.shape[1] - 1} patch positions are no square grid "
                               f"of at most {MOST_CELLS} x {MOST_CELLS}")
    return cells * patch_size
