"""Signs that the targets of pre-training collapse, and what helps.

Letters: M masked patches of a batch, K outputs of the head.
"""
import math

import torch

import models
from engine import is_main_process

PATIENCE = 3  # epochs in a row with a sign before it is said: many runs begin with one
SIGNS = ("cls_entropy", "cls_kl", "cls_std", "patch_entropy", "patch_cross", "patch_share", "patch_used")
TOKEN_SIGNS = ("token_acc", "patch_share")  # with a tokenizer in place of the patches' signs
SPREAD = "--centering sinkhorn, --koleo 0.5 or both (benchmarks/quickstart.md)"  # what ended it on the digits


def names_of(ibot_loss):
    """Names of the signs that a run has: of [CLS] where there is a teacher for it, of patches or of tokens."""
    if ibot_loss.tokens_seen is None:
        return SIGNS
    return (*(SIGNS[:3] if ibot_loss.lambda1 else ()), *TOKEN_SIGNS)


@torch.no_grad()
def signs(ibot_loss, teacher_cls, teacher_patch, mask_weight, losses, epoch, student_patch):
    """What is to be watched of the batch that gave `losses` (arguments as in `iBOTLoss.forward`).

    Returns {name: 0-d tensor} with the names of `names_of`; SIGNS: mean entropy of the [CLS] targets and their divergence
    KL(teacher, student); standard deviation of the teacher's [CLS] outputs over images; for patches the entropy and the
    cross-entropy, both to be divided by `patch_share`, which is 0 without masks; share of K' that masked patches use. With
    a tokenizer: how often the student's largest output for a masked patch is its token.
    """
    def entropy(logits, center, temp):
        log_p = ((models.at_least_float32(logits) - center) / temp).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)

    cls_entropy = entropy(teacher_cls, ibot_loss.center, ibot_loss.teacher_temps[epoch]).mean()
    cls = (cls_entropy, losses["cls"] - cls_entropy, models.at_least_float32(teacher_cls).std(dim=0, correction=0).mean())
    if ibot_loss.tokens_seen is not None:
        right = (student_patch.argmax(dim=-1) == teacher_patch).float()
        found = dict(zip(SIGNS[:3], cls, strict=True)) | {"token_acc": (right * mask_weight).sum()}
        return {name: found.get(name, mask_weight.sum()) for name in names_of(ibot_loss)}
    K = ibot_loss.center2.shape[-1]
    patch_entropy, used = mask_weight.new_zeros(()), mask_weight.new_zeros(K)
    rows = max(1, 2**22 // K)  # a few at a time, as the loss itself
    for part, weight in zip(teacher_patch.split(rows), mask_weight.split(rows), strict=True):
        part = part if ibot_loss.teacher_logits is None else ibot_loss.teacher_logits(part)
        patch_entropy += (entropy(part, ibot_loss.center2[0], ibot_loss.teacher_patch_temps[epoch]) * weight).sum()
        if len(part):
            used.scatter_reduce_(0, part.argmax(dim=-1), (weight > 0).to(used.dtype), "amax")
    return dict(zip(SIGNS, (*cls, patch_entropy, losses["patch"], mask_weight.sum(), used.mean()), strict=True))


def finished(rows):
    """Rows of SIGNS, means over processes, with the patches' entropy and divergence instead of their parts."""
    for row in rows:
        share = row.pop("patch_share")
        if "token_acc" in row:
            row["token_acc"] = row["token_acc"] / share if share else 0.0
            continue
        cross = row.pop("patch_cross")
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
