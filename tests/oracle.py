"""The plain definition of a whole training, for ViTs without batch norm: what every faster path has to agree with.

Dense networks, one crop at a time, one tensor at a time, plain torch. Only `side_by_side` calls the code that it checks.

Letters in shape comments: B images, G global crops, L local crops, N patch tokens of a crop, D width, K outputs of the head.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import main_ibot
import utils


class PlainViT(nn.Module):
    """Pre-norm ViT with the reference's names; a crop of any size to normed tokens [B, 1 + N, D]."""

    def __init__(self, patch_size, cells, width, depth, heads, masked_embed=False):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cells**2, width))
        self.masked_embed = nn.Parameter(torch.zeros(1, width)) if masked_embed else None
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width, eps=1e-6),
            "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
            "norm2": nn.LayerNorm(width, eps=1e-6),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})})
            for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, h, w):
        n = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (n, n):
            return self.pos_embed
        grid = self.pos_embed[0, 1:].T.reshape(1, -1, n, n)
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")  # not antialiased
        return torch.cat((self.pos_embed[:, :1], grid[0].flatten(1).T[None]), dim=1)

    def attention(self, layers, x):
        B, T, D = x.shape
        q, k, v = layers["qkv"](x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        weights = (q @ k.transpose(-2, -1) / math.sqrt(D // self.heads)).softmax(dim=-1)
        return layers["proj"]((weights @ v).transpose(1, 2).reshape(B, T, D))

    def forward(self, x, mask=None, drop=None):
        """x: [B, 3, S, S]. mask: bool [B, h, w]. drop: [depth, 2, B], what each branch of each block is multiplied by."""
        x = self.patch_embed["proj"](x)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        if mask is not None:
            x = torch.where(mask.flatten(1)[..., None], self.masked_embed, x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(h, w)
        for i, block in enumerate(self.blocks):
            first, second = (1.0, 1.0) if drop is None else drop[i][..., None, None]
            x = x + first * self.attention(block["attn"], block["norm1"](x))
            x = x + second * block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


class PlainHead(nn.Module):
    """One MLP, l2 normalisation and one weight-normalised last layer, shared by [CLS] and patches: tokens to logits."""

    def __init__(self, width, K, hidden, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.last_layer = nn.ParameterDict({"weight_g": torch.ones(K, 1), "weight_v": torch.zeros(K, bottleneck)})

    def forward(self, x):
        g, v = self.last_layer["weight_g"], self.last_layer["weight_v"]
        return F.normalize(self.mlp(x), dim=-1) @ (g * v / v.norm(dim=1, keepdim=True)).T


class PlainNetwork(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x, **kwargs):
        return self.head(self.backbone(x, **kwargs))  # [B, 1 + N, K]


def plain_drops(rate, depth, B):
    """Stochastic depth: [depth, 2, B], 0 with a probability that rises linearly to `rate`, else 1 / (1 - it)."""
    keep = torch.tensor([1 - rate * i / max(depth - 1, 1) for i in range(depth)])[:, None, None]
    return torch.floor(keep + torch.rand(depth, 2, B)) / keep


class PlainTraining:
    """Student, teacher, centres and AdamW; `step` is one update as the reference makes it.

    Args:
        student, teacher: `PlainNetwork`s; the last layer's `weight_g` of both is held if `norm_last_layer`.
        temps, patch_temps: teacher temperature of each epoch.
    """

    def __init__(self, student, teacher, temps, patch_temps, norm_last_layer=True):
        self.student, self.teacher, self.temps, self.patch_temps = student, teacher, temps, patch_temps
        student.head.last_layer["weight_g"].requires_grad_(not norm_last_layer)
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        plain = [p for name, p in trained if name.endswith(".bias") or p.ndim == 1]
        decayed = [p for name, p in trained if not (name.endswith(".bias") or p.ndim == 1)]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.0,
                                           betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
        self.center = self.center2 = 0.0

    def step(self, global_crops, local_crops, masks, epoch, lr, weight_decay, momentum, clip_grad=3.0, freeze=False,
             drops=None):
        """One update of everything.

        Args:
            global_crops: G tensors [B, 3, S, S]; local_crops: L of [B, 3, s, s]; masks: G of bool [B, h, w].
            drops: [depth, 2, B] (see `PlainViT`) for each of the G + L crops of the student, or None.

        Returns (cls, patch, agreement of teacher and student), floats.
        """
        G, crops = len(global_crops), [*global_crops, *local_crops]
        drops = [None] * len(crops) if drops is None else drops
        with torch.no_grad():
            teacher = [self.teacher(x) for x in global_crops]
        student = [self.student(x, mask=masks[v] if v < G else None, drop=drops[v]) for v, x in enumerate(crops)]
        cls_terms, patch_terms = [], []
        for q in range(G):
            target = ((teacher[q][:, 0] - self.center) / self.temps[epoch]).softmax(dim=-1)
            patch_target = ((teacher[q][:, 1:] - self.center2) / self.patch_temps[epoch]).softmax(dim=-1)
            for v in range(len(crops)):
                if v != q:
                    cls_terms.append(-(target * (student[v][:, 0] / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean())
            cross = -(patch_target * (student[q][:, 1:] / 0.1).log_softmax(dim=-1)).sum(dim=-1)  # [B, N]
            masked = masks[q].flatten(1)
            patch_terms.append(((cross * masked).sum(dim=1) / masked.sum(dim=1).clamp(min=1)).mean())
        cls, patch = sum(cls_terms) / len(cls_terms), sum(patch_terms) / len(patch_terms)

        self.center = 0.9 * self.center + 0.1 * torch.cat([t[:, 0] for t in teacher]).mean(dim=0)
        self.center2 = 0.9 * self.center2 + 0.1 * torch.cat([t[:, 1:] for t in teacher]).mean(dim=(0, 1))

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay
        self.optimizer.zero_grad()
        (cls + patch).backward()
        for name, p in self.student.named_parameters():
            if p.grad is not None:
                coefficient = clip_grad / (float(p.grad.norm()) + 1e-6)
                if clip_grad and coefficient < 1:
                    p.grad.mul_(coefficient)
                if freeze and "last_layer" in name:
                    p.grad = None
        self.optimizer.step()
        own = dict(self.student.named_parameters())
        with torch.no_grad():
            for name, p in self.teacher.named_parameters():
                p.mul_(momentum).add_(own[name], alpha=1 - momentum)
        agreement = (teacher[0][:, 0].argmax(dim=-1) == student[1][:, 0].argmax(dim=-1)).float().mean()
        return float(cls.detach()), float(patch.detach()), float(agreement)


def plain_copy(network):
    """`PlainNetwork` with the weights of a `models.MultiCropWrapper` of a ViT with a shared head, and with its sizes; but
    positions are always those of 224 pixels, as in the reference."""
    backbone, weights = network.backbone, network.state_dict()
    K, bottleneck = weights["head.last_layer.weight_v"].shape
    copy = PlainNetwork(
        PlainViT(backbone.patch_size, 224 // backbone.patch_size, backbone.embed_dim, len(backbone.blocks),
                 backbone.blocks[0].attn.num_heads, masked_embed="backbone.masked_embed" in weights),
        PlainHead(backbone.embed_dim, K, network.head.mlp[0].out_features, bottleneck))
    copy.load_state_dict({name: value for name, value in weights.items() if "last_layer2" not in name})
    return copy.to(weights["backbone.cls_token"].dtype)


def side_by_side(student, teacher, batches, schedules, steps_per_epoch, clip_grad=3.0, freeze_last_layer=1):
    """Train by our step and, copies, by the plain one, with the same drop path; yields (cls, patch, agreement) of each
    after every step.

    Args:
        student, teacher: of `main_ibot.build_networks`, in the batches' type.
        batches: of `loader.finish_batch`, one a step. schedules: of `main_ibot.build_schedules`.
    """
    plain = PlainTraining(plain_copy(student), plain_copy(teacher), schedules["temp"], schedules["patch_temp"],
                          norm_last_layer=not student.head.last_layer.weight_g.requires_grad)
    K = student.head.last_layer.weight_g.shape[0]
    ibot_loss = main_ibot.iBOTLoss(K, K, schedules["temp"], schedules["patch_temp"]).to(student.backbone.cls_token)
    optimizer = utils.build_optimizer("adamw", utils.get_params_groups(student), torch.device("cpu"))
    ema, draw, drawn = utils.ema_pairs(student, teacher), student.backbone._drop_scales, []

    def recorded(shapes, device):
        scales = draw(shapes, device)
        if scales is not None:  # `depth` of [2, T, 1] -> [depth, 2, crops]: the factor of each crop's first token
            parts = torch.stack(scales).squeeze(-1).split([n * length for n, length in shapes], dim=2)
            drawn.append(torch.cat([part[..., ::length] for part, (_, length) in zip(parts, shapes, strict=True)], dim=2))
        return scales
    student.backbone._drop_scales = recorded

    for i, batch in enumerate(batches):
        epoch, B = i // steps_per_epoch, len(batch.labels)
        values = {"lr": schedules["lr"][i], "weight_decay": schedules["wd"][i], "momentum": schedules["momentum"][i],
                  "clip_grad": clip_grad}
        means, *_ = main_ibot.train_step(
            [batch], main_ibot.Training(student, teacher, ema, ibot_loss, optimizer),
            epoch, freeze_last_layer=epoch < freeze_last_layer, **values)
        yield [float(means[name]) for name in ("cls", "patch", "acc")], plain.step(
            batch.global_crops, () if batch.local_crops is None else batch.local_crops, batch.masks, epoch,
            freeze=epoch < freeze_last_layer, drops=drawn.pop().to(batch.global_crops.dtype).split(B, dim=2) if drawn else None,
            **values)
