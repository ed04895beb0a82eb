"""Swin transformers for iBOT: timm's `SwinTransformer` in the original's layout, with masks and token outputs.

Letters: B images, N tokens of the last stage, D width of the last stage, C width of a stage.
"""
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.multi_crop import wanted_rows

_shift_masks = {}


@torch.compiler.assume_constant_result
def shift_mask(height, width, window_size, shift_size, device):
    """What keeps the parts of a rolled grid apart: [windows, wh * ww, wh * ww], 0 within a part and -100 between two.

    `height` x `width` is the padded grid; windows that hold the seam mix tokens from both of its sides.
    """
    key = (height, width, window_size, shift_size, device)
    if key not in _shift_masks:
        with torch.inference_mode(False):
            parts = torch.zeros(1, height, width, 1, device=device)
            for dim, (window, shift) in enumerate(zip(window_size, shift_size, strict=True), start=1):
                parts.narrow(dim, parts.shape[dim] - window, window).add_(3 ** dim)
                parts.narrow(dim, parts.shape[dim] - shift, shift).add_(3 ** dim)
            parts = window_partition(parts, window_size).flatten(1)  # [windows, wh * ww]
            _shift_masks[key] = torch.where(parts.unsqueeze(1) == parts.unsqueeze(2), 0.0, -100.0)
    return _shift_masks[key]


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's block with the original's order: pad to whole windows first, shift after (timm does the reverse)."""

    def _attn(self, x):
        B, H, W, C = x.shape
        (wh, ww), (sh, sw) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -W % ww, 0, -H % wh))
        _, Hp, Wp, _ = x.shape
        if sh or sw:
            x = torch.roll(x, (-sh, -sw), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_area, C)  # [B * windows, wh * ww, C]
        mask = shift_mask(Hp, Wp, self.window_size, self.shift_size, x.device) if sh or sw else None
        windows = self.attn(windows, mask=mask)
        x = window_reverse(windows.view(-1, wh, ww, C), self.window_size, Hp, Wp)
        if sh or sw:
            x = torch.roll(x, (sh, sw), dims=(1, 2))
        return x[:, :H, :W]


class SwinTransformer(TimmSwinTransformer):
    """Swin whose output is the mean of the last tokens (standing in for [CLS]), alone or followed by those tokens.

    As in the reference, windows and shifts are those of 224-pixel inputs whatever the crop size, and LayerNorm's eps is
    1e-6 (timm's own Swin has 1e-5). State dictionaries use the original's names. Arguments as for `VisionTransformer`;
    `masked_embed` is [1, width of the first stage].
    """
    mask_cell = 32  # pixels: one cell of the last stage, patch 4 times 8

    def __init__(self, window_size=7, patch_size=4, drop_path_rate=0.1, return_all_tokens=False,
                 masked_im_modeling=False, **kwargs):
        kwargs["num_classes"] = 0  # scripts of the original pass it too
        super().__init__(img_size=224, patch_size=patch_size, window_size=window_size, drop_path_rate=drop_path_rate,
                         strict_img_size=False, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs)
        self.patch_size = patch_size
        self.return_all_tokens = return_all_tokens
        self.masked_embed = nn.Parameter(torch.zeros(1, self.embed_dim)) if masked_im_modeling else None
        self.head = nn.Identity()
        self.pos_drop = nn.Dropout(0.0)  # as a ViT's: fine-tuning sets its rate
        self.run = SwinTransformer.forward  # a compiled one takes its place with `compile_blocks`
        self.embed_dim = self.num_features
        # The original merges patches at the end of a stage and timm at the start of the next. Modules are re-added in
        # the original's order, on which the optimiser's state in a checkpoint depends.
        merges = [stage.downsample for stage in self.layers[1:]] + [nn.Identity()]
        for stage, merge in zip(self.layers, merges, strict=True):
            del stage.downsample
            stage.downsample = merge
            if hasattr(merge, "norm"):
                norm = merge.norm
                del merge.norm
                merge.norm = norm
            for block in stage.blocks:
                block.__class__ = PadThenShiftBlock  # timm offers no way to pass a block class
                attention = block.attn
                attention.fused_attn = True
                attention.register_buffer("relative_position_index", attention.relative_position_index, persistent=True)

    def prepare_tokens(self, x, mask=None):
        """Images [B, 3, H, W] and masks (bool [B, h, w], 32-pixel cells, or None) to a token grid [B, H/4, W/4, C]."""
        x = self.patch_embed(x)
        if mask is not None and self.masked_embed is not None:
            repeat = self.mask_cell // self.patch_size
            mask = mask.repeat_interleave(repeat, dim=1).repeat_interleave(repeat, dim=2)
            x = torch.where(mask.unsqueeze(-1), self.masked_embed.to(x.dtype), x)
        return self.pos_drop(x)

    @staticmethod
    def _with_mean(x):
        """Token grid [B, h, w, C] to its mean followed by its tokens, [B, 1 + h * w, C]."""
        x = x.flatten(1, 2)
        return torch.cat((x.mean(dim=1, keepdim=True), x), dim=1)

    def forward(self, x, mask=None, return_all_tokens=None):
        """Mean token and normed tokens [B, 1 + N, D], or the mean alone [B, D]. Without `mask` nothing is masked."""
        x = self.prepare_tokens(x, mask)
        for stage in self.layers:
            for block in stage.blocks:
                recompute = stage.grad_checkpointing and torch.is_grad_enabled()
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            x = stage.downsample(x)
        x = self.norm(x)  # [B, h, w, D]
        if self.return_all_tokens if return_all_tokens is None else return_all_tokens:
            return self._with_mean(x)
        return x.mean(dim=(1, 2))

    def compile_blocks(self):
        """Compile what `forward_crops` does with the crops of a size."""
        self.run = torch.compile(SwinTransformer.forward, dynamic=False)

    def forward_crops(self, crops, masks=None, wanted=None):
        """Tokens of crops of several sizes, as `VisionTransformer.forward_crops`, but in a pass for each size: windows
        leave little to pack."""
        tokens = [self.run(self, x, masks if i == 0 else None, return_all_tokens=True) for i, x in enumerate(crops)]
        shapes = tuple((len(x), x.shape[1]) for x in tokens)
        x = torch.cat([x.flatten(0, 1) for x in tokens])
        return x if wanted is None else x.index_select(0, wanted_rows(shapes, wanted)), shapes

    def get_intermediate_layers(self, x, n=1, norm=True):
        """Tokens after each of the last n blocks, before patch merging, shallow to deep: n tensors [B, 1 + N_i, C_i].

        Only blocks of the last stage pass through the final norm, which has their width; the mean is taken after it.
        """
        x, taps = self.prepare_tokens(x), []
        first = sum(len(stage.blocks) for stage in self.layers) - n
        i = 0
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
                if i >= first:
                    taps.append(self._with_mean(self.norm(x) if norm and stage is self.layers[-1] else x))
                i += 1
            x = stage.downsample(x)
        return taps

    def get_last_selfattention(self, x):
        raise NotImplementedError("Swin attends within windows and has no [CLS] token: use a ViT for attention maps")


def swin_tiny(**kwargs):
    return SwinTransformer(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), **kwargs)


def swin_small(drop_path_rate=0.2, **kwargs):
    return SwinTransformer(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24),
                           drop_path_rate=drop_path_rate, **kwargs)


def swin_base(drop_path_rate=0.2, **kwargs):
    return SwinTransformer(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32),
                           drop_path_rate=drop_path_rate, **kwargs)


def swin_large(drop_path_rate=0.2, **kwargs):
    return SwinTransformer(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48),
                           drop_path_rate=drop_path_rate, **kwargs)
