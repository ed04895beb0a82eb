"""Projection head of iBOT (Section 3 of the paper; DINO's head with a second output for patch tokens).

Letters: T any number of tokens, K outputs.
"""
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def at_least_float32(x):
    """`x` in float32, unless it is wider: for what half precision would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WeightNormLinear(nn.Module):
    """Bias-free linear layer with rows g * v / |v|; `weight_g` [K, 1] starts at 1, `weight_v` [K, in]."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward


class SyncBatchNorm(nn.BatchNorm1d):
    """Batch norm over all tokens [..., C] of all processes. torch's own needs CUDA and channels in dimension 1."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x.flatten(0, -2), self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps).view_as(x)
        tokens = at_least_float32(x).flatten(0, -2)  # [T, C]
        count, total = len(tokens), tokens.sum(dim=0)
        if dist.is_initialized():
            count *= dist.get_world_size()  # every process has as many tokens
            total = SumOverProcesses.apply(total)
        mean = total / count
        squares = (tokens - mean).square().sum(dim=0)
        if dist.is_initialized():
            squares = SumOverProcesses.apply(squares)
        variance = squares / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            for running, value in ((self.running_mean, mean), (self.running_var, squares / max(count - 1, 1))):
                running.lerp_(torch.where(value.isfinite(), value, running), self.momentum)  # a dropped step leaves no NaN
        tokens = (tokens - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return tokens.view_as(x).to(x.dtype)


# `bn` is synchronised too: the reference converts every batch norm before training.
NORMS = {"bn": SyncBatchNorm, "syncbn": SyncBatchNorm, "ln": nn.LayerNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


def build_mlp(in_dim, hidden_dim, out_dim, norm, act):
    """Three linear layers, `norm` and `act` (of NORMS and ACTIVATIONS) after each but the last."""
    layers = []
    for width in (in_dim, hidden_dim):
        layers += [nn.Linear(width, hidden_dim), *([NORMS[norm](hidden_dim)] if norm else []), ACTIVATIONS[act]()]
    mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return mlp


class iBOTHead(nn.Module):  # noqa: N801 - the reference's name
    """MLP of three linear layers, l2 normalisation, and one or two weight-normalised last layers.

    With batch norm, what [CLS] and patches have in common takes its statistics over both, a layer of their own over theirs.

    Args:
        in_dim: width of the backbone's tokens.
        out_dim, patch_out_dim: K of the [CLS] output and, unless the head is shared, of the patch output.
        norm: None, "bn", "syncbn" or "ln" after the two hidden layers.
        act: "gelu" or "relu".
        norm_last_layer: keep `weight_g` at 1 (Section 4.1: steadier training).
        shared_head: one last layer for [CLS] and patches; `last_layer2` is then an alias of `last_layer`.
        common_layers: of the MLP's three layers, how many [CLS] and patches have in common: 3, 2 or 0 (Table 17). Those of
            the patches alone are `mlp_patch`, each with the name that it has in `mlp`; without any it is None.
    """

    def __init__(self, in_dim, out_dim, patch_out_dim=8192, norm=None, act="gelu", norm_last_layer=True,
                 shared_head=False, hidden_dim=2048, bottleneck_dim=256, common_layers=3):
        super().__init__()
        self.mlp, self.mlp_patch = build_mlp(in_dim, hidden_dim, bottleneck_dim, norm, act), None
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer2 = self.last_layer if shared_head else WeightNormLinear(bottleneck_dim, patch_out_dim)
        if norm_last_layer:
            self.last_layer.weight_g.requires_grad_(False)
            self.last_layer2.weight_g.requires_grad_(False)
        if common_layers < 3:
            mlp = build_mlp(in_dim, hidden_dim, bottleneck_dim, norm, act)
            own = {name: layer for name, layer in mlp.named_children() if common_layers == 0 or layer is mlp[-1]}
            self.mlp_patch = nn.Sequential(OrderedDict(own))
        self.has_batch_norm = norm in ("bn", "syncbn")
        self.token = None

    def add_token_layer(self, tokens):
        """One linear layer from patches to that many tokens, of which a tokenizer gives the targets, as in BEiT."""
        self.token = nn.Linear(self.mlp[0].in_features, tokens)
        nn.init.trunc_normal_(self.token.weight, std=0.02)
        nn.init.zeros_(self.token.bias)

    def bottleneck(self, x, cls_rows=None):
        """Tokens [..., T, D] to points of the unit sphere [..., T, 256], in float32 whatever the mixed precision.

        cls_rows: how many of the T are [CLS] tokens, the first ones; the others are patches. None: all are [CLS] tokens.
        """
        if self.mlp_patch is None or cls_rows is None:
            return F.normalize(at_least_float32(self.mlp(x)), dim=-1)
        layers, common = list(self.mlp), len(self.mlp) - len(self.mlp_patch)
        for layer in layers[:common]:
            x = layer(x)
        cls, patches = x[..., :cls_rows, :], x[..., cls_rows:, :]
        for own, layer in zip(layers[common:], self.mlp_patch, strict=True):
            cls, patches = own(cls), layer(patches)
        return F.normalize(at_least_float32(torch.cat((cls, patches), dim=-2)), dim=-1)

    def last_layers(self, cls, patches):
        """Bottlenecks [T, 256] and [T', 256] to [CLS] logits [T, K] and patch logits [T', K']."""
        if self.last_layer2 is self.last_layer:
            return self.last_layer(torch.cat((cls, patches))).split((len(cls), len(patches)))
        return self.last_layer(cls), self.last_layer2(patches)

    def forward(self, x):
        """[B, D] to logits [B, K]; [B, 1 + N, D] to ([CLS] logits [B, K], patch logits [B, N, K'])."""
        z = self.bottleneck(x, None if x.ndim == 2 else 1)
        if x.ndim == 2:
            return self.last_layer(z)
        return self.last_layer(z[:, 0]), self.last_layer2(z[:, 1:])
