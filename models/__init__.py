"""Backbones by the reference's names: `models.vit_small(patch_size=16)`, `models.swin_tiny(window_size=7)`, and so on."""
from models.head import ACTIVATIONS, NORMS, at_least_float32, iBOTHead
from models.multi_crop import RECOMPUTE, MultiCropWrapper
from models.swin_transformer import swin_base, swin_large, swin_small, swin_tiny  # noqa: F401
from models.vision_transformer import vit_base, vit_large, vit_nano, vit_small, vit_tiny  # noqa: F401

deit_tiny, deit_small = vit_tiny, vit_small

ARCHS = ("vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "deit_tiny", "deit_small",
         "swin_tiny", "swin_small", "swin_base", "swin_large")

__all__ = [*ARCHS, "ACTIVATIONS", "ARCHS", "NORMS", "RECOMPUTE", "MultiCropWrapper", "at_least_float32", "build_backbone",
           "iBOTHead", "mask_cell"]


def build_backbone(arch, patch_size=16, window_size=7, img_size=224, **kwargs):
    """The backbone called `arch`. ViTs take `patch_size` and `img_size`; Swins take `window_size`, their patch is 4."""
    if arch.startswith("swin"):
        return globals()[arch](window_size=window_size, **kwargs)
    return globals()[arch](patch_size=patch_size, img_size=img_size, **kwargs)


def mask_cell(arch, patch_size):
    """Side in pixels of one cell of the mask grid: a ViT's patch, or a token of Swin's last stage."""
    return 32 if arch.startswith("swin") else patch_size
