"""From a checkpoint to four feature maps: what detectors and segmentation networks stand on, and how they are trained.

Letters: B images, P side of a patch in pixels, L blocks, D width of a ViT, h x w cells of a map, C its channels.
"""
import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

import engine
import utils
from evaluation.common import classifier
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.backbone import load_evaluated_backbone

STRIDES = (4, 8, 16, 32)


# ---------------------------------------------------------------- the four maps

def tap_indices(depth):
    """The four blocks, from 0 on, whose outputs are taken: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    taps = [round(depth * share / 12) - 1 for share in (4, 6, 8, 12)]
    if len(set(taps)) < 4 or taps[0] < 0:
        raise ValueError(f"four maps cannot be taken from {depth} blocks")
    return taps


class Rescale(nn.Sequential):
    """A map of stride P to another stride, its channels kept: transposed convolutions, nothing, or a max pool."""

    def __init__(self, channels, patch_size, stride):
        def up():
            return nn.ConvTranspose2d(channels, channels, 2, stride=2)
        if patch_size == 4 * stride:
            parts = [up(), nn.BatchNorm2d(channels), nn.GELU(), up()]
        elif patch_size == 2 * stride:
            parts = [up()]
        else:
            parts = [nn.Identity() if patch_size == stride else nn.MaxPool2d(stride // patch_size)]
        super().__init__(*parts)


class DenseBackbone(nn.Module):
    """A backbone whose output is four maps [B, C, h, w], fine to coarse, for images [B, 3, H, W].

    A ViT's are its patch tokens after four blocks, brought to strides 4, 8, 16 and 32; H and W are multiples of P. A Swin's
    are the outputs of its stages before patch merging, each through a norm of its own, for any H and W.

    Args:
        body: a `VisionTransformer` or `SwinTransformer` with its weights; it is changed in place.
        grid: (rows, columns) to which a ViT's positions are resized once; these are trained, and sampled for images of
            other shapes. None: they stay.
        final_norm: whether a ViT's taps go through its final norm; else the norm is dropped.
        pyramid: False leaves a ViT's taps at stride P.
        frozen: evaluation mode and no gradients, whatever `train` says.

    Attributes: body; taps (a ViT's blocks); channels, strides: of the four maps.
    """

    def __init__(self, body, grid=None, final_norm=True, pyramid=True, frozen=False):
        super().__init__()
        self.body, self.frozen, self.final_norm = body, frozen, final_norm
        self.is_swin = hasattr(body, "layers")
        if self.is_swin:
            self.channels, self.strides = [stage.blocks[0].dim for stage in body.layers], list(STRIDES)
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in self.channels)
            body.norm = nn.Identity()
            for stage in body.layers:
                for block in stage.blocks[1::2]:  # at 224 pixels the last stage is one window and has no shift
                    block.shift_size = tuple(side // 2 for side in block.window_size)
        else:
            self.taps, self.channels = tap_indices(len(body.blocks)), [body.embed_dim] * 4
            self.strides = list(STRIDES) if pyramid else [body.patch_size] * 4
            if pyramid and body.patch_size not in (4, 8, 16):
                raise engine.InputError(f"patches of {body.patch_size} pixels: maps of strides 4 to 32 are made of patches "
                                        "of 4, 8 or 16")
            self.pyramid = nn.ModuleList(Rescale(body.embed_dim, body.patch_size, stride) for stride in self.strides)
            if grid is not None:
                body.pos_embed = nn.Parameter(classifier.resize_positions(body.pos_embed.detach(), *grid))
                body.pos_grid = tuple(grid)
            if not final_norm:
                body.norm = nn.Identity()
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.is_swin:
                return self._stages(images)
            B, _, H, W = images.shape
            P = self.body.patch_size
            taps = self.body.get_intermediate_layers(images, self.taps)  # [B, 1 + h * w, D] each
            maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, (H // P, W // P)) for tokens in taps]  # [B, D, h, w]
            return [rescale(x) for rescale, x in zip(self.pyramid, maps, strict=True)]

    def _stages(self, images):
        images = F.pad(images, (0, -images.shape[-1] % 4, 0, -images.shape[-2] % 4))
        grids, last, maps = [], -1, []  # after each block: [B, h, w, C]
        self.body.run_stages(images, taps=grids)
        for stage, norm in zip(self.body.layers, self.norms, strict=True):
            last += len(stage.blocks)
            maps.append(norm(grids[last]).permute(0, 3, 1, 2))
        return maps


def load_dense_backbone(weights, key="teacher", arch=None, patch_size=None, window_size=None, drop_path=0.0,
                        grad_checkpointing=False, checkpoint=None, **options):
    """(`DenseBackbone`, the `EvaluatedBackbone` it was made of) of a checkpoint's entry, to be trained, on the CPU.

    Every tensor of the backbone must be in the file, and of the file only the student's `masked_embed` may be left over;
    what the file has not is new: pyramid, norms of a Swin's stages.

    Args:
        weights, key, arch, patch_size, window_size, checkpoint: see `load_evaluated_backbone`.
        drop_path: stochastic depth of the last block, rising from 0 at the first.
        grad_checkpointing: keep only the blocks' inputs for the backward pass.
        options: grid, final_norm, pyramid, frozen of `DenseBackbone`.
    """
    source = load_evaluated_backbone(weights, key, arch, patch_size, window_size, checkpoint=checkpoint)
    backbone = DenseBackbone(source.model, **options)
    if weights == "random" and not backbone.is_swin:
        trunc_normal_(backbone.body.pos_embed, std=0.02)  # resizing would have made them smaller
    if not backbone.is_swin and not backbone.final_norm and engine.is_main_process():
        print("note: the final norm of the checkpoint is not used: the maps are taken without it", flush=True)
    classifier.set_dropout(backbone.body, drop_path, 0.0, 0.0)
    backbone.body.set_grad_checkpointing(grad_checkpointing)
    return backbone, source


# ---------------------------------------------------------------- training

class Training(NamedTuple):
    """What an update changes, and the type of mixed precision (None: float32)."""
    network: nn.Module  # for several processes wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    amp_dtype: torch.dtype | None = None


def build_training(model, args, process, amp_dtype):
    """The `Training` of a network on its device, with AdamW; rates are set at every update."""
    groups = [{**group, "weight_decay": args.weight_decay * group["decayed"]}
              for group in parameter_groups(model, args.layer_decay)]
    optimizer = utils.build_optimizer("adamw", groups, process.device)
    scaler = torch.amp.GradScaler(process.device.type) if amp_dtype == torch.float16 else None
    wrapped = engine.data_parallel(model, process.device, args.accum_iter) if process.world_size > 1 else model
    return Training(wrapped, optimizer, scaler, amp_dtype)


def settings_of(args, source, images, recorded, total_batch, amp_dtype):
    """What results.json says of a run. source: `EvaluatedBackbone`; images: how many for training, for validation;
    recorded: names of flags that set results apart."""
    return {
        "arch": source.arch, "patch_size": source.patch_size, "window_size": source.window_size,
        "weights_hash": source.weights_hash, "data_path": str(args.data_path), "train_images": images[0],
        "val_images": images[1], **{name: getattr(args, name) for name in recorded}, "total_batch": total_batch,
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."), **source.pixel_stats.as_settings()}


def resume(run, what, fixed, recorded, parts, total_batch, steps):
    """Go on from the checkpoint that `--load_from` means, if its run was this one. Returns notes.

    That is, `fixed` of `run.entries` ("settings", and "categories" where there are such) are the same, and in a finished
    run `recorded` and the number of training images too. Raises InputError for another run; with `--overwrite` that one is
    started over.
    """
    def compared(entries):
        return {**entries["settings"], "categories": entries.get("categories")}

    kinds = {"model": dict, "optimizer": dict, "settings": dict, "progress": dict}
    run.find(kinds | ({"categories": dict} if "categories" in run.entries else {}), what)
    now, notes = compared(run.entries), []
    then = compared(run.checkpoint) if run.path else now
    if run.path and run.checkpoint["epoch"] >= run.args.epochs:
        fixed = (*fixed, *recorded, "train_images")
    other = next((name for name in fixed if then.get(name) != now[name]), None)
    if other:
        problem = (f"checkpoint {run.path}: its run had {other} {engine.printable(then.get(other))}, this one "
                   f"{engine.printable(now[other])}")
        engine.need(run.args.overwrite, f"{problem}; choose another --output_dir, or start over with --overwrite true")
        run.forget()
        notes = [f"starting over: {problem}"]
    notes += run.changes({"results_dir", "pretrained_weights", "data_path", "arch", "patch_size", "window_size"})
    run.resume(parts, total_batch, steps)
    return notes


def finish_update(training, loss=None):
    """Step on the gradients that there are, without waiting for the device; not if they, or the `loss` of any process, are
    not finite. Returns the gradients' norm, a 0-d tensor."""
    network, optimizer, scaler, _ = training
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.stack(utils.clip_gradients(parameters, 0)).norm()
    if scaler is None:
        finite = grad_norm.isfinite()
        if loss is not None:  # gradients are the same in all processes, losses are not
            finite = finite & engine.all_reduce_mean(loss.clone()).isfinite()
        utils.step_if(finite, optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()
    share_statistics(network)
    return grad_norm


def parameter_groups(model, layer_decay):
    """AdamW's groups of a network with a `DenseBackbone` as `backbone`: see `utils.get_params_groups`; frozen: none.

    A Swin's network has one rate, and all is decayed but norms and tables of positions, by their names.
    """
    if not model.backbone.is_swin:
        return utils.get_params_groups(model, layer_decay)
    groups = {decayed: {"params": [], "lr_scale": 1.0, "decayed": decayed} for decayed in (True, False)}
    for name, parameter in model.named_parameters():
        groups["norm" not in name and "relative_position_bias_table" not in name]["params"].append(parameter)
    return list(groups.values())


def synchronized(model, process):
    """`model` with batch norms whose statistics are those of all processes, on CUDA; elsewhere torch has none: there
    `share_statistics` evens the running ones out."""
    if process.world_size > 1 and process.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


@torch.no_grad()
def share_statistics(model):
    """Make the running statistics of batch norms the means over all processes, if they are not already."""
    if engine.get_world_size() == 1:
        return
    buffers = [buffer for module in model.modules() if type(module) is nn.BatchNorm2d
               for buffer in (module.running_mean, module.running_var)]
    if buffers:
        mean = engine.all_reduce_mean(torch.cat(buffers))
        for buffer, part in zip(buffers, mean.split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(part)


# ---------------------------------------------------------------- flags

def dense_parser(description):
    """The flags that detection and segmentation share. Those of a recipe are None: the network's own, see `filled`."""
    parser = evaluation_parser(description, frozen=False, labelled=False)
    parser.set_defaults(batch_size_per_gpu=None, output_dir=".")
    optim = parser.add_argument_group("optimisation; by default the recipe of the network")
    optim.add_argument("--lr", type=float, help="peak rate of AdamW; it is not scaled with the batch")
    optim.add_argument("--weight_decay", type=float)
    optim.add_argument("--layer_decay", type=float, help="factor of a ViT's rate from each block to the one below it")
    optim.add_argument("--drop_path", type=float, help="of the last block, rising from 0 at the first")
    optim.add_argument("--accum_iter", type=int_from(1), default=1, help="batches per process to add up for each update")
    optim.add_argument("--grad_checkpointing", default=False, help="keep only the blocks' inputs for the backward pass",
                       **engine.SWITCH)
    engine.add_precision_flags(optim)
    engine.add_bad_image_flags(parser.add_argument_group("training images that cannot be read"))
    engine.add_run_flags(parser.add_argument_group("files"))
    return parser


def dense_test_parser(description, data):
    """The flags that both test.py share. data: name of the data set."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pth of train.py")
    parser.add_argument("--data_path", help=f"folder of {data}; by default that of the training")
    parser.add_argument("--output_dir", help="folder whose results.json gets a record, and of the pictures")
    parser.add_argument("--visualize", nargs="+", metavar="IMAGE", help="draw what is found in these images, no more")
    parser.add_argument("--num_workers", type=int_from(0), default=engine.default_workers())
    engine.add_precision_flags(parser)
    engine.add_device_flags(parser)
    return parser


def picture_paths(images, folder, ending):
    """A file in `folder` for the picture of each of the image files, NAME_ENDING.png; where several have one name, it is
    counted on from the second: NAME_2_ENDING.png. The same file given twice has one picture."""
    files = list(dict.fromkeys(Path(image) for image in images))
    taken, paths = set(), []
    for file in files:
        name, count = file.stem, 1
        while name in taken:
            count += 1
            name = f"{file.stem}_{count}"
        taken.add(name)
        paths.append((file, Path(folder) / f"{name}_{ending}.png"))
    return paths


def filled(values, recipe):
    """{flag: value}: `values`, those that are None as in `recipe`."""
    return {name: recipe.get(name) if value is None else value for name, value in values.items()}


def batch_note(total_batch, recipe_batch, accum_iter):
    """A warning that names the real batch where it is not the recipe's, whose rate is meant for that; else ""."""
    if total_batch == recipe_batch:
        return ""
    advice = ""
    if total_batch < recipe_batch and not recipe_batch % (total_batch // accum_iter):
        advice = f"; --accum_iter {recipe_batch * accum_iter // total_batch} reaches it"
    return f"warning: a batch of {total_batch} images, the recipe's rate is for {recipe_batch}{advice}"
