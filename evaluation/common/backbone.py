"""The frozen backbone that an evaluation looks at."""
import hashlib
import math
from dataclasses import dataclass

import torch

import models
import utils

RANDOM_SEED = 0  # the untrained baseline is one fixed network, the same in every process


@dataclass(frozen=True)
class EvaluatedBackbone:
    """`model`: on the CPU, in evaluation mode, single precision, no gradients. Sizes in pixels (window: tokens).

    `key`: the checkpoint's entry that it came from. `weights_hash`: sha256 of its names and tensors (see `weights_hash`).
    """
    model: torch.nn.Module
    key: str
    weights_hash: str
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

    stored = checkpoint.get("args")
    stored = stored if isinstance(stored, dict) else vars(stored) if hasattr(stored, "__dict__") else {}
    arch = arch or stored.get("arch", "vit_small")
    patch_size = patch_size or stored.get("patch_size", 16)
    window_size = window_size or stored.get("window_size", 7)
    image_size = image_size or stored.get("global_crops_size", 224)
    if arch not in models.ARCHS:
        raise utils.InputError(f"checkpoint {weights}: its arch {arch!r} is not one of {', '.join(models.ARCHS)}")
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
    model = model.float().eval().requires_grad_(False)
    return EvaluatedBackbone(model, key, weights_hash(model), arch, patch_size, window_size, image_size)


def weights_hash(model):
    """sha256 of the names, shapes and contents of a network's tensors: the same whichever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _trained_image_size(state, arch, patch_size, weights):
    """Side in pixels of the images that a ViT's position embedding was made for."""
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or positions.ndim != 3 or patches is None or patches.ndim != 4:
        raise utils.InputError(f"checkpoint {weights} does not fit {arch}: it is no ViT (pos_embed); see --arch")
    if patches.shape[-1] != patch_size:
        raise utils.InputError(f"checkpoint {weights} has patches of {patches.shape[-1]} pixels, not {patch_size}; "
                               "see --patch_size")
    cells = math.isqrt(positions.shape[1] - 1)
    if cells ** 2 != positions.shape[1] - 1:
        raise utils.InputError(f"checkpoint {weights}: its {positions.shape[1] - 1} patch positions are no square grid")
    return cells * patch_size
