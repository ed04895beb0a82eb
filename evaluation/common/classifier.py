"""The network of fine-tuning, a pre-trained backbone and a classifier, and the layer-wise groups of its parameters.

Letters: B images of a batch, C classes, D width of the backbone, L blocks, n cells of the position embedding a side.
"""
import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

import engine
import models
import utils
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.clustering import load_projection_head


class Classifier(nn.Module):
    """A backbone and a head on its [CLS] token (Swin: mean token), or with `mean_pooling` on its mean patch token."""

    def __init__(self, backbone, head, mean_pooling=False):
        super().__init__()
        self.backbone, self.head, self.fc_norm = backbone, head, None
        if mean_pooling:
            self.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=1e-6)
            backbone.norm = nn.Identity()

    def forward(self, images):
        """Images [B, 3, H, W] to logits [B, C]."""
        if self.fc_norm is None:
            return self.head(self.backbone(images))
        return self.head(self.fc_norm(self.backbone(images, return_all_tokens=True)[:, 1:].mean(dim=1)))


class ProjectionClassifier(nn.Module):
    """The first `layers` layers of a pre-trained projection head (3: all of it) below a new classifier (iBOT, Table 12)."""

    def __init__(self, projection, layers, num_classes):
        super().__init__()
        linear = [i for i, part in enumerate(projection.mlp) if isinstance(part, nn.Linear)]
        kept = list(projection.mlp)[:linear[layers] if layers < len(linear) else None]
        width = projection.mlp[linear[layers - 1]].out_features
        self.mlp, self.last_layer = nn.Sequential(*kept), None
        if layers == len(linear):
            self.last_layer = projection.last_layer
            width = len(projection.last_layer.weight_v)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        """[B, D] to logits [B, C]."""
        x = self.mlp(x)
        if self.last_layer is not None:
            x = self.last_layer(F.normalize(models.at_least_float32(x), dim=-1))
        return self.fc(x)


def build_network(args, key, checkpoint, num_classes):
    """(`Classifier`, the `EvaluatedBackbone` it was made of), on the CPU, for the entry `key` of a checkpoint's content.

    The position embedding is resampled for `--image_size` once, to its number of cells. Raises `engine.InputError` as
    `load_evaluated_backbone`, and for heads and poolings that the network does not have.
    """
    source = load_evaluated_backbone(args.pretrained_weights, key, args.arch, args.patch_size, args.window_size,
                                     args.image_size, checkpoint)
    backbone = source.model.train().requires_grad_(True)
    is_swin = source.arch.startswith("swin")
    if is_swin and args.avgpool_patchtokens:
        raise engine.InputError(f"--avgpool_patchtokens {args.avgpool_patchtokens}: a Swin has mode 0 only")
    if not is_swin:
        cells = source.image_size // source.patch_size
        backbone.pos_embed = nn.Parameter(resize_positions(backbone.pos_embed.detach(), cells))
    set_dropout(backbone, args.drop_path if args.drop_path is not None or is_swin else 0.1, args.drop, args.attn_drop_rate)

    if args.finetune_head_layer:
        projection = load_projection_head(checkpoint, key, args.pretrained_weights,
                                          hint="; --finetune_head_layer 0 needs none").train().requires_grad_(True)
        outputs = len(projection.last_layer.weight_v)
        if args.finetune_head_layer == 3 and args.out_dim not in (None, outputs):
            raise engine.InputError(f"--out_dim {args.out_dim}: the projection head of {key} has {outputs} outputs; leave "
                                   "the flag out")
        head = ProjectionClassifier(projection, args.finetune_head_layer, num_classes)
        new = head.fc
    else:
        head = new = nn.Linear(backbone.embed_dim, num_classes)
    nn.init.trunc_normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)
    with torch.no_grad():
        new.weight.mul_(args.init_scale)
    return Classifier(backbone, head, mean_pooling=args.avgpool_patchtokens == 1), source


def resize_positions(pos_embed, rows, columns=None):
    """Position embedding [1, 1 + n*n, D] for rows x columns patches (default: rows x rows), the [CLS] entry as it is.

    Bicubic; unlike `models.vision_transformer.resample_positions`, which evaluations of frozen weights need, by the target
    size.
    """
    columns = columns or rows
    n = math.isqrt(pos_embed.shape[1] - 1)
    if (rows, columns) == (n, n):
        return pos_embed
    grid = pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)  # [1, D, n, n]
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


def set_dropout(backbone, drop_path, drop, attn_drop):
    """Stochastic depth rising linearly from 0 at the first block to `drop_path` (None: as it is), and dropout."""
    blocks = [block for stage in utils.blocks_of(backbone) for block in stage]
    for i, block in enumerate(blocks):
        if drop_path is not None:
            rate = drop_path * (i / max(len(blocks) - 1, 1))
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        block.attn.attn_drop.p = attn_drop
        block.attn.proj_drop.p = block.mlp.drop1.p = block.mlp.drop2.p = drop
    backbone.pos_drop.p = drop


def layer_table(model, layer_decay, decay_positions):
    """Text that shows of each layer id the factor of its rate, and its decayed and other parameters."""
    depths = [len(stage) for stage in utils.blocks_of(model.backbone)]
    top = sum(depths) + 1
    rows = {i: ([], []) for i in range(top + 1)}
    for name, parameter in model.named_parameters():
        plain = not utils.is_decayed(name, parameter, decay_positions)
        rows[utils.layer_id(name, depths)][plain].append(utils.backbone_name(name))
    lines = ["layer  rate x   decayed  not  parameters"]
    for i, (decayed, plain) in rows.items():
        shown = sorted({".".join(name.split(".")[:4 if name.startswith("layers") else 2]) for name in decayed + plain})
        lines.append(f"{i:>5}  {layer_decay ** (top - i):<8.5f} {len(decayed):>6} {len(plain):>4}  "
                     + ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else ""))
    return "\n".join(lines)
