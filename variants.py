"""What later methods changed in iBOT's losses, each behind one flag of main_ibot.py, off by default.

Letters: n rows, K outputs of the head, D width of the backbone, W processes.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

import engine
from models.head import SumOverProcesses, at_least_float32


def add_flags(group):
    group.add_argument("--centering", default="mean", choices=("mean", "sinkhorn"),
                       help="of both targets: the running mean of outputs, or Sinkhorn-Knopp on each batch (DINOv2)")
    group.add_argument("--koleo", default=0.0, type=float, help="weight of the KoLeo regulariser; 0.1 in DINOv2")


@torch.no_grad()
def sinkhorn_center(logits, temp, rows=None, iterations=3):
    """The centre [K] with which softmax((logits - centre) / temp) are Sinkhorn-Knopp targets.

    SwAV (arXiv 2006.09882, Section 3.1), DINOv2 (arXiv 2304.07193, Section 4): exp(logits / temp) is scaled in turns so
    that all outputs are used equally, over the rows of all processes, and each row sums to 1. The softmax scales the rows;
    what remains is a factor for each output, a shift of its logits. The centre's mean is 0.

    Args:
        logits: [n, K] of the teacher; n may differ between processes. rows: bool [n], which of them count; None for all.

    Returns nothing finite where no row counts anywhere.
    """
    x = at_least_float32(logits) / temp  # [n, K]
    skipped = torch.zeros(len(x), dtype=torch.bool, device=x.device) if rows is None else ~rows
    row_scale = x.new_zeros(len(x))
    for _ in range(iterations):  # in logarithms
        row_scale = row_scale.masked_fill(skipped, -torch.inf)
        scale = -_logsumexp_of_processes((x + row_scale.unsqueeze(1)).logsumexp(dim=0))  # [K]
        row_scale = -(x + scale).logsumexp(dim=1)
    return temp * (scale.mean() - scale)


def move_to_sinkhorn(center, logits, temp, rows=None):
    """Overwrite the buffer `center` [..., K] with `sinkhorn_center`, unless that is not finite."""
    new = sinkhorn_center(logits, temp, rows).view_as(center)
    center.copy_(torch.where(new.isfinite().all(), new, center))


def _logsumexp_of_processes(x):
    if engine.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(engine.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts).logsumexp(dim=0)


def koleo(features):
    """KoLeo of the student's [CLS] features [n, D] of one global crop: mean of -log(distance to the nearest other one).

    Sablayrolles et al. (arXiv 1806.03198, Equation 3) on the unit sphere, as in DINOv2 (`--koleo`): drives apart what lies
    close together. Neighbours are sought among the features of all processes, of which each has n.
    """
    x = F.normalize(at_least_float32(features), dim=-1)
    n, world, rank = len(x), engine.get_world_size(), engine.get_rank()
    everything = x
    if world > 1:
        everything = SumOverProcesses.apply(torch.cat([x if i == rank else torch.zeros_like(x) for i in range(world)]))
    with torch.no_grad():
        near = x @ everything.T  # [n, W * n]
        near[torch.arange(n), torch.arange(n) + rank * n] = -torch.inf
        nearest = near.argmax(dim=1)
    return -((x - everything[nearest]).norm(dim=1) + 1e-8).log().mean()
