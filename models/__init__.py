"""Backbones by the reference's names: `models.vit_small(patch_size=16)`, `models.swin_tiny(window_size=7)`, and so on."""
from engine import need
from models.head import ACTIVATIONS, NORMS, at_least_float32, iBOTHead
from models.multi_crop import RECOMPUTE, MultiCropWrapper, choose_compilation, choose_recompute, flops_per_step
from models.swin_transformer import swin_base, swin_large, swin_small, swin_tiny  # noqa: F401
from models.vision_transformer import vit_base, vit_large, vit_nano, vit_small, vit_tiny  # noqa: F401

deit_tiny, deit_small = vit_tiny, vit_small

ARCHS = ("vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "deit_tiny", "deit_small",
         "swin_tiny", "swin_small", "swin_base", "swin_large")

__all__ = [*ARCHS, "ACTIVATIONS", "ARCHS", "NORMS", "RECOMPUTE", "MultiCropWrapper", "at_least_float32", "build_backbone",
           "check_sizes", "choose_compilation", "choose_recompute", "flops_per_step", "iBOTHead", "mask_cell"]


def build_backbone(arch, patch_size=16, window_size=7, img_size=224, registers=0, **kwargs):
    """The backbone called `arch`. ViTs take `patch_size`, `img_size` and `registers`; Swins take `window_size`, their patch
    is 4."""
    if arch.startswith("swin"):
        return globals()[arch](window_size=window_size, **kwargs)
    return globals()[arch](patch_size=patch_size, img_size=img_size, registers=registers, **kwargs)


def mask_cell(arch, patch_size):
    """Side in pixels of one cell of the mask grid: a ViT's patch, or a token of Swin's last stage."""
    return 32 if arch.startswith("swin") else patch_size


def check_sizes(arch, patch_size, global_crops_size, local_crops_size):
    """Raise `InputError`, naming the flag, unless crops of these sides (0: there are none) can be cut into patches."""
    swin, cell = arch.startswith("swin"), mask_cell(arch, patch_size)
    need(not swin or patch_size in (4, 16), f"--patch_size {patch_size}: Swin's patch is 4")
    need(global_crops_size % cell == 0, f"--global_crops_size {global_crops_size} is not a multiple of {cell} "
                                        f"({'a token of Swin' if swin else '--patch_size'})")
    patch = 4 if swin else patch_size
    need(patch <= 224, f"--patch_size {patch}: position embeddings are those of 224 pixels")
    need(local_crops_size % patch == 0, f"--local_crops_size {local_crops_size} is no multiple of the patch size {patch}")
