"""Schedules, parameter groups, clipping, EMA, LARS, seeds: what DINO readers expect here.

Letter in shape comments: T any number of values.
"""
import random

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint


def cosine_scheduler(base_value, final_value, epochs, steps_per_epoch, warmup_epochs=0, start_warmup_value=0.0):
    """Value of every step: linear warm-up (both ends included), then a half cosine to `final_value`.

    Returns float64 [epochs * steps_per_epoch]. `warmup_epochs` must not exceed `epochs`.
    """
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * steps_per_epoch)
    i = np.arange(epochs * steps_per_epoch - len(warmup))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * i / max(len(i), 1)))
    return np.concatenate((warmup, cosine))


def shortened(flag, length, room, notes):
    """`length` epochs of a warm-up, or `room` if it is more; `notes` then get a line about it."""
    if length > room:
        notes.append(f"warning: --{flag} {length} does not fit into {room} epochs; shortened to {room}")
    return min(length, room)


def temperature_schedule(warmup_value, value, warmup_epochs, epochs, start_epoch=0):
    """Teacher temperature of every epoch: constant for `start_epoch` epochs, linear, then constant. float64 [epochs]."""
    return np.concatenate((np.full(start_epoch, warmup_value), np.linspace(warmup_value, value, warmup_epochs),
                           np.full(epochs, value)))[:epochs]


def blocks_of(backbone):
    """The blocks of each stage, from the input on; a ViT is one stage."""
    backbone = getattr(backbone, "body", backbone)  # of a `dense.DenseBackbone`
    return [list(stage.blocks) for stage in backbone.layers] if hasattr(backbone, "layers") else [list(backbone.blocks)]


def backbone_name(name):
    """Name of a parameter of a network in its backbone alone; others as they are."""
    return name.removeprefix("backbone.").removeprefix("body.")


def layer_id(name, depths):
    """Place of a parameter in the network: 0 for the embeddings, i + 1 for block i, L + 1 for norms and heads.

    name: in a network with a `backbone`, which may be a `dense.DenseBackbone`. depths: blocks of each stage, L in all. The
    patch merging after a stage of a Swin counts as part of its last block.
    """
    name = backbone_name(name)
    words = name.split(".")
    if words[0] in ("cls_token", "reg_token", "pos_embed", "patch_embed", "masked_embed"):
        return 0
    if words[0] == "blocks":
        return int(words[1]) + 1
    if words[0] == "layers":
        stage = int(words[1])
        return sum(depths[:stage]) + (int(words[3]) + 1 if words[2] == "blocks" else depths[stage])
    return sum(depths) + 1


def is_decayed(name, parameter, decay_positions=True):
    """Whether weight decay applies: not to vectors, biases and, unless `decay_positions`, positions, [CLS], registers."""
    name = backbone_name(name)
    return not (parameter.ndim == 1 or name.endswith(".bias")
                or not decay_positions and name in ("pos_embed", "cls_token", "reg_token"))


def get_params_groups(model, layer_decay=1.0, patch_embed_lr=1.0, decay_positions=True):
    """An optimiser's groups for a network with a `backbone`: parameters with the same rate and decay, from the input on.

    Each has "lr_scale", layer_decay^(L + 1 - `layer_id`), and "decayed"; rate and decay are set at each step. Without layer
    decay there are two: weights, which are decayed, and biases and vectors, which are not. Frozen ones: none.

    patch_embed_lr: another factor for the patch embedding.
    """
    depths = [len(stage) for stage in blocks_of(model.backbone)]
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (sum(depths) + 1 - layer_id(name, depths))
        if backbone_name(name).startswith("patch_embed."):
            scale *= patch_embed_lr
        decayed = is_decayed(name, parameter, decay_positions)
        group = groups.setdefault((scale, decayed), {"params": [], "lr_scale": scale, "decayed": decayed})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale each gradient by itself to a norm of at most `max_norm` (DINO's clipping, not a global norm); 0: leave it.

    No host synchronisation. Returns the norms before clipping, one 0-d tensor per parameter that has a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm:
        scales = torch._foreach_add(norms, 1e-6)
        torch._foreach_reciprocal_(scales)
        torch._foreach_mul_(scales, max_norm)
        torch._foreach_clamp_max_(scales, 1.0)
        torch._foreach_mul_(gradients, scales)
    return norms


def drop_gradients(model, words):
    """No update, and no weight decay, of parameters with one of `words` in their names: their gradients go."""
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.grad = None


def step_if(finite, optimizer):
    """`optimizer.step()` if the 0-d tensor `finite` is true. Fused AdamW reads it on the device, others wait for it."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~finite).float()  # as a gradient scaler sets it
        optimizer.step()
        del optimizer.found_inf
    elif finite:
        optimizer.step()


def ema_pairs(student, teacher):
    """([teacher parameters], [student parameters of the same names]); aliases of shared student layers count too."""
    students = dict(student.named_parameters(remove_duplicate=False))
    pairs = [(p, students[name]) for name, p in teacher.named_parameters() if name in students]
    return [t for t, _ in pairs], [s for _, s in pairs]


@torch.no_grad()
def ema_update(teacher_parameters, student_parameters, momentum):
    """teacher <- m teacher + (1 - m) student, for all parameters at once."""
    torch._foreach_lerp_(teacher_parameters, [p.detach() for p in student_parameters], 1.0 - momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al., 2017).

    Weight decay and the trust ratio eta * |p| / |g + wd p| apply to tensors of two or more dimensions; the ratio is 1
    where either norm is 0.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise RuntimeError("LARS takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # Matrices first: only they are decayed and scaled.
            params.sort(key=lambda p: p.ndim < 2)
            updates, matrices = [p.grad for p in params], [p for p in params if p.ndim > 1]
            if matrices:
                scaled = torch._foreach_add(updates[:len(matrices)], matrices, alpha=group["weight_decay"])
                p_norms, u_norms = torch.stack(torch._foreach_norm(matrices)), torch.stack(torch._foreach_norm(scaled))
                ratios = torch.where((p_norms > 0) & (u_norms > 0), group["eta"] * p_norms / u_norms, 1.0)
                torch._foreach_mul_(scaled, list(ratios.unbind()))
                updates[:len(matrices)] = scaled
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            buffers = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def clustering_scores(labels, clusters):
    """Agreement of integer clusters [T] with labels [T]: {"nmi", "ari", "fscore", "adjacc"}.

    `fscore` is Fowlkes-Mallows; `adjacc` the accuracy after the best one-to-one assignment of clusters to labels.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    counts = metrics.cluster.contingency_matrix(labels, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return {"nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
            "ari": float(metrics.adjusted_rand_score(labels, clusters)),
            "fscore": float(metrics.fowlkes_mallows_score(labels, clusters)),
            "adjacc": float(counts[rows, columns].sum() / len(labels))}


def seed_of(*numbers):
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fix_random_seeds(seed):
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def build_optimizer(name, parameter_groups, device):
    """AdamW, SGD (momentum 0.9) or LARS; rates are set at every step.

    SGD and LARS wait for the device before each step, to learn whether it may be made; fused AdamW does not.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameter_groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":  # not fused: that fails on buffers of which some, a frozen layer's, do not exist yet
        return torch.optim.SGD(parameter_groups, lr=0.0, momentum=0.9, foreach=True)
    return LARS(parameter_groups)


def in_pieces(cross_entropy, size=2**22):
    """A `cross_entropy` over rows that takes some `size` logits at a time, and again in the backward pass: beside the
    logits themselves no [M, K'] is kept."""
    def summed(student, teacher, weight, *args, **kwargs):
        rows = max(1, size // student.shape[1])
        pieces = zip(student.split(rows), teacher.split(rows), weight.split(rows), strict=True)
        return sum(checkpoint(cross_entropy, *piece, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
                   for piece in pieces)
    return summed
