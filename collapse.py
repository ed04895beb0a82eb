"""Signs that the targets of pre-training collapse, and what helps.

Letters: M masked patches of a batch, K outputs of the head.
"""
import math

import torch

import models
from engine import is_main_process

PATIENCE = 3  # epochs in a row with a sign before it is said: many runs begin with one
SIGNS = ("cls_entropy", "cls_kl", "cls_std", "patch_entropy", "patch_cross", "patch_share", "patch_used")
SPREAD = "--centering sinkhorn, --koleo 0.5 or both (benchmarks/quickstart.md)"  # what ended it on the digits


@torch.no_grad()
def signs(ibot_loss, teacher_cls, teacher_patch, mask_weight, losses, epoch):
    """What is to be watched of the batch that gave `losses` (arguments as in `iBOTLoss.forward`).

    Returns {name: 0-d tensor} with the names SIGNS: mean entropy of the [CLS] targets and their divergence
    KL(teacher, student); standard deviation of the teacher's [CLS] outputs over images; for patches the entropy and the
    cross-entropy, both to be divided by `patch_share`, which is 0 without masks; share of K' that masked patches use.
    """
    def entropy(logits, center, temp):
        log_p = ((models.at_least_float32(logits) - center) / temp).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)

    cls_entropy = entropy(teacher_cls, ibot_loss.center, ibot_loss.teacher_temps[epoch]).mean()
    rows = max(1, 2**22 // teacher_patch.shape[1])  # a few at a time, as the loss itself
    patch_entropy = torch.cat([entropy(part, ibot_loss.center2[0], ibot_loss.teacher_patch_temps[epoch])
                               for part in teacher_patch.split(rows)])
    used = teacher_patch.new_zeros(teacher_patch.shape[1], dtype=torch.float32)
    if len(teacher_patch):
        used.scatter_reduce_(0, teacher_patch.argmax(dim=-1), (mask_weight > 0).float(), "amax")
    return dict(zip(SIGNS, (
        cls_entropy, losses["cls"] - cls_entropy, models.at_least_float32(teacher_cls).std(dim=0, correction=0).mean(),
        (patch_entropy * mask_weight).sum(), losses["patch"], mask_weight.sum(), used.mean()), strict=True))


def finished(rows):
    """Rows of SIGNS, means over processes, with the patches' entropy and divergence instead of their parts."""
    for row in rows:
        share, cross = row.pop("patch_share"), row.pop("patch_cross")
        if share:  # some patch was masked
            row["patch_entropy"] /= share
            row["patch_kl"] = cross / share - row["patch_entropy"]
        else:
            del row["patch_entropy"], row["patch_used"]
    return rows


def warnings(stats, out_dim, patch_out_dim, teacher_temp):
    """{sign: sentence} for the signs of collapse in the means of an epoch (see `signs`)."""
    found = {}
    for what, name, K in (("cls", "[CLS]", out_dim), ("patch", "patch", patch_out_dim)):
        entropy, used = (stats.get(f"{what}_{sign}") for sign in ("entropy", "used"))
        patch = "patch_" * (what == "patch")
        if entropy is not None and entropy > 0.999 * math.log(K):
            found[f"{what}_entropy"] = (
                f"the {name} targets are all but uniform (entropy {entropy:.3f} of at most {math.log(K):.3f}): they teach "
                f"nothing; lower --teacher_{patch}temp and --warmup_teacher_{patch}temp, e.g. to 0.02, with {SPREAD}")
        if used is not None and used * K < 1.5:
            found[f"{what}_used"] = (f"the teacher puts everything into one of {K} {name} clusters; --centering sinkhorn "
                                     "uses all alike, a higher teacher temperature and a faster centre more of them")
    if stats.get("cls_std", math.inf) < 0.01 * teacher_temp:
        found["cls_std"] = ("the teacher's [CLS] outputs hardly differ between images (standard deviation "
                            f"{stats['cls_std']:.2g}); what drives them apart: {SPREAD}")
    return found


def say(stats, out_dim, patch_out_dim, teacher_temp, seen):
    """Print the `warnings` that the means of an epoch give for the third time in a row, on process 0.

    seen: what the epoch before returned, {sign: epochs in a row with it}.
    """
    found = warnings(stats, out_dim, patch_out_dim, teacher_temp)
    seen = {sign: seen.get(sign, 0) + 1 for sign in found}
    if is_main_process():
        for sign, text in found.items():
            if seen[sign] == PATIENCE:
                print(f"warning: {text}", flush=True)
    return seen
