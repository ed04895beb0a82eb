"""Backbone and head together, computing only the logits that the loss uses.

Letters: B images, G global crops, L local crops, N patch tokens of a global crop, M masked patches, D width, K outputs.
"""
import functools

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine import InputError, check_compiler

# What compiled code computes again in the backward pass, in settings of torch's partitioner. By default it keeps whatever
# a matrix product of the backward pass reads, normed tokens and GELU's outputs too.
RECOMPUTE = {
    "none": {},
    "elementwise": {"ban_recompute_materialized_backward": False},
    "half": {"ban_recompute_materialized_backward": False, "activation_memory_budget": 0.5},
    "blocks": {},  # `set_grad_checkpointing`, compiled or not
}


def compiled(function, recompute="none", **kwargs):
    """`torch.compile(function, **kwargs)` that computes again in the backward pass what `recompute`, of RECOMPUTE, says."""
    function = torch.compile(function, **kwargs)

    @functools.wraps(function)
    def run(*args, **kwargs):
        # A Swin has a program for each stage, with shift and without, for each crop size, and for student and teacher.
        with torch._functorch.config.patch(RECOMPUTE[recompute]), torch._dynamo.config.patch(recompile_limit=64):
            return function(*args, **kwargs)
    return run


def draw_drop_scales(rate, depth, crops, device):
    """Factors of drop path for the branches of `depth` blocks, [depth, 2, crops]: 0, or what makes up for the zeros.

    One draw per crop, block and branch; rates rise linearly over the blocks, from 0 to `rate`.
    """
    keep = 1 - torch.linspace(0, rate, depth, device=device).view(depth, 1, 1)
    return (torch.rand(depth, 2, crops, device=device) < keep) / keep


def wanted_rows(shapes, wanted, prefix=1):
    """Rows, among the tokens of all crops end to end, of their class tokens and of wanted patches of the first size.

    Args:
        shapes: (crops, tokens of each) for every crop size.
        wanted: int64 [M], cells of the flattened [crops * N] of the first size, or behind these those of the others.
        prefix: tokens before the N patches of a crop, the class token first.

    Returns:
        int64 [all crops + M], class tokens first.
    """
    rows, start, cells = [], 0, 0
    patches = wanted + prefix * (wanted // (shapes[0][1] - prefix) + 1)
    for crops, length in shapes:
        rows.append(start + length * torch.arange(crops, device=wanted.device))
        if start:
            beyond = wanted - cells
            patches = torch.where(beyond < 0, patches, start + beyond + prefix * (beyond // (length - prefix) + 1))
        start, cells = start + crops * length, cells + crops * (length - prefix)
    return torch.cat((*rows, patches))


class MultiCropWrapper(nn.Module):
    """A network of the reference's names, `backbone.*` and `head.*`, for student and teacher alike.

    Through the K-wide last layer go the [CLS] tokens and the masked patches of the global crops, nothing else. With batch
    norm in the head the MLP before it sees every token, for its statistics are over all of them in the reference.
    """

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def compile_parts(self, recompute="none", backend="inductor"):
        """Compile the backbone's blocks and the head, in place: names of parameters stay. `recompute`: see `compiled`."""
        self.backbone.compile_blocks(recompute, backend)
        self.head.bottleneck = compiled(self.head.bottleneck, recompute, backend=backend)
        self.head.last_layers = compiled(self.head.last_layers, recompute, backend=backend)

    def forward(self, global_crops, mask_index, masks=None, local_crops=None, patch_mean=False, local_masks=None,
                bottlenecks=False):
        """Logits of the given crops.

        Args:
            global_crops: [G*B, 3, S, S].
            mask_index: int64 [M], the cells of the flattened [G*B*N] whose patch logits are wanted, and behind these of the
                local crops.
            masks: bool [G*B, h, w] of the cells hidden from the network, or None. local_masks: the same of local crops.
            local_crops: [L*B, 3, s, s] or None.
            patch_mean: also give the mean over all patches of their logits, for the centre. The last layer is linear, so
                this is the last layer of the mean bottleneck, in float32.
            bottlenecks: of the patches give these instead of the logits.

        Returns:
            cls [(G+L)*B, K], patches [M, K'], patch mean [K'] or None, and the tokens before the head: of [CLS] and of the
            wanted patches, [(G+L)*B + M, D].
        """
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        masks = [masks, local_masks][:len(crops)]
        mean_logits = None
        if self.head.has_batch_norm or patch_mean:
            tokens, shapes = self.backbone.forward_crops(crops, masks)  # [T, D]
            # Each crop size by itself: batch norm takes its statistics so in the reference.
            parts = zip(tokens.split([n * length for n, length in shapes]), shapes, strict=True)
            z = torch.cat([self.head.bottleneck(part.unflatten(0, shape), 1).flatten(0, 1) for part, shape in parts])
            if patch_mean:
                with torch.autocast(z.device.type, enabled=False):
                    patches = [n * (length - 1) for n, length in shapes]
                    parts = z.split([n * length for n, length in shapes])
                    mean_z = sum(part.unflatten(0, shape)[:, 1:].mean(dim=(0, 1)) * (count / sum(patches))
                                 for part, shape, count in zip(parts, shapes, patches, strict=True))
                    mean_logits = self.head.last_layer2(mean_z)
            rows = wanted_rows(shapes, mask_index)
            z, tokens = z.index_select(0, rows), tokens.index_select(0, rows)
        else:
            tokens, _ = self.backbone.forward_crops(crops, masks, mask_index)
            classes = len(tokens) - len(mask_index)
            z = self.head.bottleneck(tokens if self.head.token is None else tokens[:classes], classes)
        classes = len(tokens) - len(mask_index)
        if self.head.token is not None:
            return self.head.last_layer(z[:classes]), self.head.token(tokens[classes:]), mean_logits, tokens
        cls, patches = z.split((classes, len(mask_index)))
        if bottlenecks:
            return self.head.last_layer(cls), patches, mean_logits, tokens
        return *self.head.last_layers(cls, patches), mean_logits, tokens


def flops_per_step(student, teacher, global_crops, cells, masked, local_crops, patch_mean):
    """Operations of matrix products (a product and a sum are two) of teacher, student and backward pass, each once, also
    where it is computed again.

    Args:
        student, teacher: `MultiCropWrapper`s on the meta device.
        global_crops, local_crops: (how many, their side in pixels).
        cells: of the mask along a side. masked: share of them that is.
        patch_mean: whether the teacher's backbone computes all patches for their mean.
    """
    student, teacher = student.eval(), teacher.eval()
    with torch.device("meta"):
        crops, others = (torch.empty(n, 3, side, side) if n else None for n, side in (global_crops, local_crops))
        masks = torch.empty(global_crops[0], cells, cells, dtype=torch.bool)
        index = torch.empty(round(masks.numel() * masked), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():  # the wrapper's forward, but for the mean of the patches: autocast knows no meta device
            wanted = None if teacher.head.has_batch_norm or patch_mean else index
            z = teacher.head.bottleneck(teacher.backbone.forward_crops([crops], wanted=wanted)[0], global_crops[0])
            teacher.head.last_layers(z[:global_crops[0]], z[:len(index)])
        student_cls, student_patch, *_ = student(crops, index, masks=masks, local_crops=others)
        (student_cls.sum() + student_patch.sum()).backward()
    return counter.get_total_flops()


def choose_compilation(compiled, recompute, grad_checkpointing, device):
    """Whether to compile, by default on CUDA, and the key of RECOMPUTE that the flags mean.

    Raises `InputError` where there is no compiler, and for a way to recompute that needs it.
    """
    compiled = device.type == "cuda" if compiled is None else compiled
    recompute = choose_recompute(recompute, grad_checkpointing, compiled)
    if compiled:
        check_compiler(device)
    return compiled, recompute


def choose_recompute(recompute, grad_checkpointing, compiled):
    """The key of RECOMPUTE that the flags mean. Raises `InputError` for one that needs the compiler."""
    if grad_checkpointing and recompute not in (None, "blocks"):
        raise InputError(f"--grad_checkpointing true is --recompute blocks, not {recompute}: give one of them")
    if recompute in ("elementwise", "half") and not compiled:
        raise InputError(f"--recompute {recompute} is left to the compiler: add --compile true, or take blocks")
    return recompute or ("blocks" if grad_checkpointing else "elementwise" if compiled else "none")
