"""Clusters of images: from the projection head, and by k-means on frozen features (iBOT, Table 5).

Letters: n images, F feature size, k clusters.
"""
import torch
import torch.nn.functional as F

import engine
from models import iBOTHead

MAX_BLOCK = 64_000_000  # floats of the largest intermediate: 256 MB


def load_projection_head(checkpoint, key, path, patches=False, hint=""):
    """The projection head of the network under `key` of a checkpoint that was read from `path`.

    It is the one for [CLS] tokens; with `patches` its layers are those for patch tokens, where these have their own.
    Sizes and norms follow from the weights, the activation from the checkpoint's `args` (GELU if it has none). Heads of
    iBOT and of DINO are read. Raises InputError if there is none, with the `hint` what to do, or if names are missing.
    """
    names = engine.without_prefix({name: value for name, value in engine.network_state_dict(checkpoint, key, path).items()
                                  if name.startswith("head.")}, "head.")
    own = "last_layer2." if patches and "last_layer2.weight_v" in names else "last_layer."
    state = {name.replace(own, "last_layer."): value for name, value in names.items()
             if name.startswith(own) or not name.startswith(("last_layer", "mlp_patch."))}
    if patches:
        own = {name.replace("mlp_patch.", "mlp."): value for name, value in names.items() if name.startswith("mlp_patch.")}
        layers = tuple(name.rpartition(".")[0] + "." for name in own)
        state = {name: value for name, value in state.items() if not name.startswith(layers)} | own
    missing = [name for name in ("mlp.0.weight", "last_layer.weight_v") if name not in state]
    if missing:
        raise engine.InputError(f"checkpoint {path}: key {key!r} holds no projection head (missing: head."
                               f"{', head.'.join(missing)}){hint}")
    norm = None if state.get("mlp.1.weight") is None else "bn" if "mlp.1.running_mean" in state else "ln"
    (hidden_dim, in_dim), (out_dim, bottleneck_dim) = state["mlp.0.weight"].shape, state["last_layer.weight_v"].shape
    head = iBOTHead(in_dim, out_dim, norm=norm, act=getattr(checkpoint.get("args"), "act_in_head", "gelu"),
                    shared_head=True, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
    state |= {name.replace("last_layer.", "last_layer2."): value for name, value in state.items() if "last_layer." in name}
    engine.load_strictly(head, state, path)
    return head.float().eval().requires_grad_(False)


@torch.inference_mode()
def head_clusters(head, features, device):
    """Clusters int64 [n], on the CPU: the largest output of `head` for each [CLS] token of `features` [n, F]."""
    head = head.to(device)
    return torch.cat([head(x.to(device)).argmax(dim=1).cpu() for x in features.split(4096)])


@torch.inference_mode()
def kmeans(features, k, seed=0, max_iter=100, device="cpu", max_block=MAX_BLOCK):
    """Lloyd's algorithm from a k-means++ start, on features [n, F] of length 1: (clusters int64 [n] on the CPU, inertia).

    A cluster that loses all its images is put at the image farthest from its centre. Ends when no image changes its
    cluster, or after `max_iter` rounds. Raises InputError for more clusters than images.
    """
    if k > len(features):
        raise engine.InputError(f"k-means: {k} clusters of {len(features)} images")
    x = F.normalize(features.to(device), dim=1)
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same draws on every device
    centres = x[spread_out(x, k, generator)]
    clusters = None
    for _ in range(max_iter):
        parts = [torch.cdist(block, centres).min(dim=1) for block in x.split(max(1, max_block // k))]
        distances, found = (torch.cat(values) for values in zip(*parts, strict=True))
        if clusters is not None and torch.equal(found, clusters):
            break
        clusters = found
        counts = clusters.bincount(minlength=k)
        centres = torch.zeros_like(centres).index_add_(0, clusters, x) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        centres[empty] = x[distances.topk(len(empty)).indices]
    return clusters.cpu(), distances.square().sum().item()


def spread_out(x, k, generator):
    """Places [k] of k-means++ (Arthur and Vassilvitskii, 2007): each drawn by the squared distance to the ones before."""
    places = [int(torch.randint(len(x), (), generator=generator))]
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (x - x[places[-1]]).square().sum(dim=1).double())
        cumulated = nearest.cumsum(0)
        if cumulated[-1] == 0:  # fewer different images than clusters
            cumulated = torch.arange(1.0, len(x) + 1, dtype=torch.float64, device=x.device)
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(x.device) * cumulated[-1]
        places.append(min(int(torch.searchsorted(cumulated, draw, right=True)), len(x) - 1))
    return torch.tensor(places, device=x.device)
