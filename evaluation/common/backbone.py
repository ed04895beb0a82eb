"""The frozen backbone that an evaluation looks at."""
import hashlib
from dataclasses import dataclass, field
from functools import partial

import torch

import engine
import models
import recipes
from images import IMAGENET, PixelStats, normalize, stored_pixel_stats
from models.pretrained import reference_names, registers_of, trained_grid

RANDOM_SEED = 0  # the untrained baseline is one fixed network, the same in every process


@dataclass(frozen=True)
class EvaluatedBackbone:
    """`model`: on the CPU, in evaluation mode, single precision, no gradients. Sizes in pixels (window: tokens).

    `key`: the checkpoint's entry that it came from. `weights_hash`: sha256 of its names and tensors (see `weights_hash`).
    `pixel_stats`: what its images are normalised with. `pretraining`: `recipes.as_settings` of the checkpoint.
    """
    model: torch.nn.Module
    key: str
    weights_hash: str
    arch: str
    patch_size: int
    window_size: int
    image_size: int
    pixel_stats: PixelStats = IMAGENET
    pretraining: dict = field(default_factory=dict)

    @property
    def normalize(self):
        """`images.normalize` with the statistics that the network was trained with."""
        return partial(normalize, stats=self.pixel_stats)


def read_weights(weights):
    """Content of the file `weights`; of the word `random`, an empty dictionary. Raises InputError where there is none."""
    if weights in ("", "download", "supervised"):
        raise engine.InputError(f"--pretrained_weights {weights!r}: nothing is downloaded; give a file, or random")
    return {} if weights == "random" else engine.load_checkpoint(weights)


def load_evaluated_backbone(weights, key, arch=None, patch_size=None, window_size=None, image_size=None, checkpoint=None):
    """Build the backbone of a checkpoint and load its entry `key`.

    Reads what this project and the reference write, DINO's checkpoints and backbones, extracted backbones and timm's
    ViT and Swin weights. Settings that are None are those of the checkpoint's own `args`, else vit_small, 16, 7 and 224;
    the statistics of pixels are always those of the file, else ImageNet's.
    The word `random` as `weights` gives an untrained network. `checkpoint`: content of the file, if it is read already.
    Raises InputError for a missing file or key and for weights that do not fit, with what is missing.
    """
    checkpoint = read_weights(weights) if checkpoint is None else checkpoint
    state = None if weights == "random" else reference_names(engine.backbone_state_dict(checkpoint, key, weights))

    stored = engine.stored_args(checkpoint, weights)
    arch = arch or stored.get("arch", "vit_small")
    if not isinstance(arch, str) or arch not in models.ARCHS:
        raise engine.InputError(f"checkpoint {weights}: its arch, {_shown(arch)}, is not one of {', '.join(models.ARCHS)}")

    def setting(given, name, default, largest):
        value = stored.get(name, default) if given is None else given
        if given is None and (type(value) is not int or not 1 <= value <= largest):
            raise engine.InputError(f"checkpoint {weights}: its {name}, {_shown(value)}, must be a number of 1..{largest}")
        return value

    # Bounds, as the sizes of a foreign file must not decide how much memory is taken; flags may exceed them.
    patch_size = setting(patch_size, "patch_size", 16, 256)
    window_size = setting(window_size, "window_size", 7, 32)
    image_size = setting(image_size, "global_crops_size", 224, 4096)
    is_swin = arch.startswith("swin")
    if is_swin:
        patch_size = 4
    if image_size % patch_size:
        raise engine.InputError(f"--image_size {image_size} does not divide into patches of {patch_size} pixels")

    sizes = f"window {window_size}" if is_swin else f"patch {patch_size}"
    if state is not None and registers_of(state):
        sizes += f", {registers_of(state)} registers"
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = models.build_backbone(arch, patch_size=patch_size, window_size=window_size)
        source = f"untrained, random weights (seed {RANDOM_SEED})"
    else:
        grid = None if is_swin else trained_grid(state, patch_size, weights)
        trained_size = grid[0] * patch_size if grid else patch_size  # loading will say what is missing
        model = models.build_backbone(arch, patch_size=patch_size, window_size=window_size, img_size=trained_size,
                                      registers=registers_of(state))
        try:
            engine.load_backbone(model, state, weights)
        except engine.InputError as error:
            raise engine.InputError(f"{error} (the network is {arch}, {sizes}; see --arch)") from error
        source = f"{key} of {weights}"
    stats = IMAGENET if weights == "random" else stored_pixel_stats(checkpoint, weights)
    if engine.is_main_process():
        print(f"backbone {arch}, {sizes}, images of {image_size} pixels, normalised with {stats}: {source}", flush=True)
    model = model.float().eval().requires_grad_(False)
    return EvaluatedBackbone(model, key, weights_hash(model), arch, patch_size, window_size, image_size, stats,
                             {} if state is None else recipes.as_settings(stored, checkpoint.get("epoch")))


def _shown(value):
    return engine.printable(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def weights_hash(model):
    """sha256 of the names, shapes and contents of a network's tensors: the same whichever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
