"""Vision transformers for iBOT: timm's `VisionTransformer` plus a mask embedding, token outputs and packed crops.

Letters: B images, N patch tokens (h x w cells), n registers, D width, T tokens of all crops, R wanted ones among them,
d width of an attention head.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.multi_crop import compiled, draw_drop_scales, wanted_rows


def resample_positions(pos_embed, height, width, grid=None):
    """Position embedding [1, 1 + n*n, D] for a grid of height x width cells: [1, 1 + height*width, D].

    Bicubic without antialiasing, by the scale factors (height + 0.1)/n and (width + 0.1)/n: the extra 0.1 stays in the
    sampling coordinates. It looks odd, but published weights were trained so (1e-2 in the output).
    grid: (rows, columns) of `pos_embed`, where it is not square.
    """
    rows, columns = grid or 2 * (math.isqrt(pos_embed.shape[1] - 1),)
    if (height, width) == (rows, columns):
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    grid = F.interpolate(grid, scale_factor=((height + 0.1) / rows, (width + 0.1) / columns), mode="bicubic",
                         align_corners=False, recompute_scale_factor=False)
    if grid.shape[-2:] != (height, width):
        raise ValueError(f"positions of {rows} x {columns} cells cannot be resampled to {height} x {width}")
    return torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


class PackedBlock(Block):
    """timm's block, which can also take the tokens of crops of several sizes at once."""

    def packed(self, x, shapes, drop_scales=None, rows=None):
        """Norms, qkv and MLP run over all tokens together, attention for each crop size by itself.

        Args:
            x: [T, D], the tokens of all crops end to end.
            shapes: (crops, tokens of each) for every crop size.
            drop_scales: [2, T, 1], what drop path multiplies the two branches by; None for no drop path.
            rows: int64 [R], tokens wanted from this block; attention still sees all. None for all.

        Returns:
            [T, D], or [R, D] in the order of `rows`.
        """
        parts = []
        qkv = self.attn.qkv(self.norm1(x))
        for tokens, (B, N) in zip(qkv.split([B * N for B, N in shapes]), shapes, strict=True):
            q, k, v = tokens.view(B, N, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))  # [B * N, D]
        if rows is None:  # projected apart: their concatenation would be kept for the backward pass beside the parts
            attended = torch.cat([self.attn.proj(part) for part in parts])
        else:
            x, attended = x.index_select(0, rows), self.attn.proj(torch.cat(parts).index_select(0, rows))
            drop_scales = None if drop_scales is None else drop_scales.index_select(1, rows)
        first, second = (1.0, 1.0) if drop_scales is None else drop_scales
        x = (x + first * attended).to(x.dtype)
        return (x + second * self.mlp(self.norm2(x))).to(x.dtype)


class VisionTransformer(TimmVisionTransformer):
    """ViT whose output is the class token or all tokens, and whose input patches can be masked.

    With registers (Darcet et al., arXiv 2309.16588), n learned tokens without a position stand behind the class token in
    all blocks, are never masked and never given out.

    Args:
        img_size: side, in pixels, of the images that the position embedding is made for; others are resampled.
        patch_size: side of a patch in pixels.
        return_all_tokens: what `forward` returns unless told otherwise.
        masked_im_modeling: own a `masked_embed` [1, D] that stands in for masked patches (the student).
        registers: n, of `reg_token` [1, n, D].
    """

    def __init__(self, img_size=224, patch_size=16, drop_path_rate=0.0, return_all_tokens=False,
                 masked_im_modeling=False, registers=0, **kwargs):
        kwargs["num_classes"] = 0  # scripts of the original pass it too
        super().__init__(img_size=img_size, patch_size=patch_size, drop_path_rate=drop_path_rate, reg_tokens=registers,
                         norm_layer=partial(nn.LayerNorm, eps=1e-6), block_fn=PackedBlock, **kwargs)
        if registers:  # timm gives them positions, or takes the class token's away
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, registers:].clone())
        self.patch_size = patch_size
        self.drop_path_rate = drop_path_rate
        self.run_block = PackedBlock.packed  # a compiled one takes its place with `compile_blocks`
        self.residual_dtype = None  # what `forward_crops` holds tokens in between blocks; None: as they come
        self.pos_grid = None  # (rows, columns) of `pos_embed`; None: it is square
        self.return_all_tokens = return_all_tokens
        self.masked_embed = nn.Parameter(torch.zeros(1, self.embed_dim)) if masked_im_modeling else None
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm starts it at 1e-6

    def prepare_tokens(self, x, mask=None):
        """Images [B, 3, H, W] and masks (bool [B, h, w] or None) to embedded tokens [B, 1 + n + N, D]."""
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} pixels do not divide into patches of {self.patch_size}")
        x = self.patch_embed.proj(x)  # [B, D, h, w]
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if mask is not None and self.masked_embed is not None:
            x = torch.where(mask.flatten(1).unsqueeze(-1), self.masked_embed.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # not len(x): exported, B is free
        x = x + resample_positions(self.pos_embed, height, width, self.pos_grid)
        if self.reg_token is not None:
            x = torch.cat((x[:, :1], self.reg_token.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)
        return self.pos_drop(x)

    def without_registers(self, x, dim=1):
        """Tokens 1 + n + N along `dim` to 1 + N."""
        if self.reg_token is None:
            return x
        cls, _, patches = x.tensor_split((1, self.num_prefix_tokens), dim=dim)
        return torch.cat((cls, patches), dim=dim)

    def forward(self, x, mask=None, return_all_tokens=None):
        """Normed tokens [B, 1 + N, D], or the class token [B, D]. Without `mask` nothing is masked."""
        x = self.norm(self.without_registers(self.blocks(self.prepare_tokens(x, mask))))
        return x if (self.return_all_tokens if return_all_tokens is None else return_all_tokens) else x[:, 0]

    def compile_blocks(self, recompute="none", backend="inductor"):
        """Compile what `forward_crops` does in a block, once for all blocks."""
        self.run_block = compiled(PackedBlock.packed, recompute, dynamic=False, backend=backend)

    def forward_crops(self, crops, masks=None, wanted=None):
        """Normed tokens of crops of several sizes in one pass; equal to `forward` on each size by itself.

        Args:
            crops: list of [B, 3, H, W], one of each size. masks: list of bool [B, h, w] or None for each size; None: none.
            wanted: int64 [M], patches that are needed beside all class tokens, see `wanted_rows`; None for all tokens. The
                last block then spends its MLP on these alone.

        Returns:
            [T, D], crop by crop, each with its class token first; with `wanted` [R, D], class tokens and then patches. And
            the shapes, (crops, tokens of each) for every size.
        """
        tokens = list(map(self.prepare_tokens, crops, masks or [None] * len(crops)))
        shapes = tuple((len(x), x.shape[1]) for x in tokens)
        x = torch.cat([x.flatten(0, 1) for x in tokens])  # [T, D]
        x = x.to(self.residual_dtype or x.dtype)
        rows = self._rows(shapes, wanted, x.device)
        if rows is not None:
            torch._dynamo.maybe_mark_dynamic(rows, 0)  # the one size that changes from step to step
        scales = self._drop_scales(shapes, x.device)
        for i, block in enumerate(self.blocks):
            inputs = (block, x, shapes, scales and scales[i], rows if i + 1 == len(self.blocks) else None)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.run_block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.run_block(*inputs)
        return self.norm(x), tuple((B, length - self.num_reg_tokens) for B, length in shapes)

    def _rows(self, shapes, wanted, device):
        """Rows of the tokens that `forward_crops` gives out; None where these are all."""
        if wanted is not None:
            return wanted_rows(shapes, wanted, self.num_prefix_tokens)
        if self.reg_token is None:
            return None
        rows = torch.arange(sum(B * length for B, length in shapes), device=device)
        parts = rows.split([B * length for B, length in shapes])
        return torch.cat([self.without_registers(part.view(shape)).flatten()
                          for part, shape in zip(parts, shapes, strict=True)])

    def _drop_scales(self, shapes, device):
        """Factors of drop path for the tokens of all crops: `depth` tensors [2, T, 1], or None without it."""
        if not self.training or not self.drop_path_rate:
            return None
        scales = draw_drop_scales(self.drop_path_rate, len(self.blocks), sum(B for B, _ in shapes), device)
        scales = [part.repeat_interleave(N, dim=2)
                  for part, (_, N) in zip(scales.split([B for B, _ in shapes], dim=2), shapes, strict=True)]
        return torch.cat(scales, dim=2).unsqueeze(-1).unbind()

    def get_intermediate_layers(self, x, n=1, norm=True):
        """Tokens after each of the last n blocks, shallow to deep: n tensors [B, 1 + N, D], through the final norm.

        n: a number of blocks, or the indices of those that are wanted, from 0 on.
        """
        x, taps = self.prepare_tokens(x), []
        wanted = range(len(self.blocks))[-n:] if isinstance(n, int) else n
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # with the random state, for drop path
            else:
                x = block(x)
            if i in wanted:
                tokens = self.without_registers(x)
                taps.append(self.norm(tokens) if norm else tokens)
        return taps

    def get_last_selfattention(self, x):
        """Attention of the last block, [B, heads, 1 + N, 1 + N]; rows sum to 1, less what they give to registers."""
        x = self.blocks[:-1](self.prepare_tokens(x))
        attention, x = self.blocks[-1].attn, self.blocks[-1].norm1(x)
        B, T, _ = x.shape
        q, k, _ = attention.qkv(x).reshape(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        weights = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)
        return self.without_registers(self.without_registers(weights, dim=2), dim=3)


def vit_nano(**kwargs):
    """0.5 M parameters: for demonstrations on a CPU and for tests."""
    return VisionTransformer(embed_dim=96, depth=4, num_heads=3, **kwargs)


def vit_tiny(**kwargs):
    return VisionTransformer(embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(**kwargs):
    return VisionTransformer(embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(**kwargs):
    return VisionTransformer(embed_dim=768, depth=12, num_heads=12, **kwargs)


def vit_large(**kwargs):
    return VisionTransformer(embed_dim=1024, depth=24, num_heads=16, **kwargs)
