"""Swin transformers for iBOT: timm's `SwinTransformer` in the original's layout, with masks and token outputs.

Letters: B images, N tokens of the last stage, D width of the last stage, C width of a stage.
"""
from functools import cache, partial

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.multi_crop import compiled, draw_drop_scales, wanted_rows


@cache
def shift_mask(height, width, window_size, shift_size, device):
    """What keeps the parts of a rolled grid apart: [windows, wh * ww, wh * ww], 0 within a part and -100 between two.

    `height` x `width` is the padded grid; windows that hold the seam mix tokens from both of its sides.
    """
    with torch.inference_mode(False):
        parts = torch.zeros(1, height, width, 1, device=device)
        for dim, (window, shift) in enumerate(zip(window_size, shift_size, strict=True), start=1):
            parts.narrow(dim, parts.shape[dim] - window, window).add_(3 ** dim)
            parts.narrow(dim, parts.shape[dim] - shift, shift).add_(3 ** dim)
        parts = window_partition(parts, window_size).flatten(1)  # [windows, wh * ww]
        return torch.where(parts.unsqueeze(1) == parts.unsqueeze(2), 0.0, -100.0)


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's block with the original's order: pad to whole windows first, shift after (timm does the reverse)."""

    def shift_mask(self, height, width, device):
        """`shift_mask` for a grid of height x width tokens, or None where this block does not shift."""
        (wh, ww), shifts = self.window_size, any(self.shift_size)
        return shift_mask(height + -height % wh, width + -width % ww, (wh, ww), self.shift_size, device) if shifts else None

    def attend(self, x, mask):
        """Attention within (shifted) windows of a grid [B, H, W, C]; `mask` as `shift_mask` gives it.

        The windows of an image go beside the heads, so that one bias serves all images: [windows * heads, area, area].
        """
        B, H, W, _ = x.shape
        (wh, ww), (sh, sw), attn = self.window_size, self.shift_size, self.attn
        # Padding is 0 where the projection begins, hence its bias behind it: the products are those of real tokens alone.
        x = F.pad(F.linear(x, attn.qkv.weight), (0, 0, 0, -W % ww, 0, -H % wh))  # [B, Hp, Wp, 3 C]
        _, Hp, Wp, _ = x.shape
        if mask is not None:
            x = torch.roll(x, (-sh, -sw), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(B, -1, wh * ww, x.shape[-1])  # [B, windows, area, 3 C]
        windows = windows + attn.qkv.bias.to(x.dtype)
        q, k, v = windows.unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = attn._get_rel_pos_bias()  # [1, heads, area, area]
        bias = bias.expand(windows.shape[1], -1, -1, -1) if mask is None else bias + mask.unsqueeze(1)
        bias = bias.flatten(0, 1).to(q.dtype)  # [windows * heads, area, area]
        dropout = attn.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=attn.scale)  # [B, windows * heads, area, d]
        x = x.unflatten(1, (-1, attn.num_heads)).transpose(2, 3).flatten(0, 1).reshape(-1, wh, ww, windows.shape[-1] // 3)
        x = window_reverse(x, self.window_size, Hp, Wp)
        if mask is not None:
            x = torch.roll(x, (sh, sw), dims=(1, 2))
        return attn.proj_drop(attn.proj(x[:, :H, :W]))

    def forward(self, x, mask=None, drop_scales=None):
        """Token grid [B, H, W, C] to the same. drop_scales: [2, B, 1, 1, 1], what drop path multiplies the branches by."""
        first, second = (1.0, 1.0) if drop_scales is None else drop_scales
        x = (x + first * self.attend(self.norm1(x), mask)).to(x.dtype)
        return (x + second * self.mlp(self.norm2(x))).to(x.dtype)


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
        self.residual_dtype = None  # what tokens are held in between blocks; None: as they come
        self.return_all_tokens = return_all_tokens
        self.masked_embed = nn.Parameter(torch.zeros(1, self.embed_dim)) if masked_im_modeling else None
        self.head = nn.Identity()
        self.pos_drop = nn.Dropout(0.0)  # as a ViT's: fine-tuning sets its rate
        # compiled ones take their place with `compile_blocks`
        self.run_embed, self.run_merge = SwinTransformer.prepare_tokens, PatchMerging.forward
        self.run_block = PadThenShiftBlock.__call__
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
                block.attn.register_buffer("relative_position_index", block.attn.relative_position_index, persistent=True)

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

    def run_stages(self, x, mask=None, taps=None):
        """Images to the normed grid [B, h, w, D]. The list `taps` gets the grid [B, h, w, C] after each block."""
        x, scales = self.run_embed(self, x, mask), None
        x = x.to(self.residual_dtype or x.dtype)
        depth = sum(len(stage.blocks) for stage in self.layers)
        rate = getattr(self.layers[-1].blocks[-1].drop_path1, "drop_prob", 0.0)  # which fine-tuning may have set
        if self.training and rate:
            scales = iter(draw_drop_scales(rate, depth, len(x), x.device).view(depth, 2, -1, 1, 1, 1))
        for stage in self.layers:
            for block in stage.blocks:
                inputs = (block, x, block.shift_mask(*x.shape[1:3], x.device), scales and next(scales))
                if stage.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(self.run_block, *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = self.run_block(*inputs)
                if taps is not None:
                    taps.append(x)
            if stage is not self.layers[-1]:
                x = self.run_merge(stage.downsample, x)
        return self.norm(x)

    def forward(self, x, mask=None, return_all_tokens=None):
        """Mean token and normed tokens [B, 1 + N, D], or the mean alone [B, D]. Without `mask` nothing is masked."""
        x = self.run_stages(x, mask)
        if self.return_all_tokens if return_all_tokens is None else return_all_tokens:
            return self._with_mean(x)
        return x.mean(dim=(1, 2))

    def compile_blocks(self, recompute="none", backend="inductor"):
        """Compile what a block does, once for all blocks of a stage and crops of a size; embedding and merging too."""
        self.run_embed, self.run_block, self.run_merge = (
            compiled(function, recompute, dynamic=False, backend=backend)
            for function in (SwinTransformer.prepare_tokens, PadThenShiftBlock.forward, PatchMerging.forward))

    def forward_crops(self, crops, masks=None, wanted=None):
        """Tokens of crops of several sizes, as `VisionTransformer.forward_crops`, but in a pass for each size: windows
        leave little to pack."""
        tokens = [self(x, mask, return_all_tokens=True)
                  for x, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        shapes = tuple((len(x), x.shape[1]) for x in tokens)
        x = torch.cat([x.flatten(0, 1) for x in tokens])
        return x if wanted is None else x.index_select(0, wanted_rows(shapes, wanted)), shapes

    def get_intermediate_layers(self, x, n=1, norm=True):
        """Tokens after each of the last n blocks, before patch merging, shallow to deep: n tensors [B, 1 + N_i, C_i].

        Only blocks of the last stage pass through the final norm, which has their width; the mean is taken after it.
        """
        grids = []
        self.run_stages(x, taps=grids)
        last = len(grids) - len(self.layers[-1].blocks)
        taps = [self.norm(grid) if norm and i >= last else grid for i, grid in enumerate(grids)]
        return [self._with_mean(grid) for grid in taps[-n:]]

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
