"""Multinomial logistic regression on frozen features, by L-BFGS over all images at once.

Letters: n images, F feature size, K classes.
"""
import math

import torch

MAX_BLOCK = 64_000_000  # values of the largest intermediate: 256 MB in single precision
LOOK = 10  # iterations between two looks at the bound


def loss_and_gradient(weights, features, labels, penalty, dtype=None, max_block=MAX_BLOCK):
    """Value and gradient [F, K] of: mean cross-entropy of features @ weights, plus penalty / 2 |weights|^2.

    features [n, F], labels int64 [n] and weights [F, K] are on one device. Products are taken in `dtype`, by default that
    of the features, on blocks of rows that keep the logits below `max_block` values; sums in that of the weights.
    """
    n, K = len(features), weights.shape[1]
    dtype = dtype or features.dtype
    W = weights.to(dtype)
    loss, gradient = weights.new_zeros(()), penalty * weights
    rows = max(1, max_block // K)
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        x = x.to(dtype)
        log_p = torch.log_softmax(x @ W, dim=1)  # [rows, K]
        loss -= log_p.gather(1, y[:, None]).sum(dtype=weights.dtype)
        residual = log_p.exp_().scatter_add_(1, y[:, None], log_p.new_full((len(y), 1), -1.0))
        gradient += (x.T @ residual) / n
    return loss / n + penalty / 2 * weights.square().sum(), gradient


@torch.no_grad()
def fit_logistic(features, labels, num_classes, penalty, start=None, tolerance=1e-4, max_iter=1000, max_block=MAX_BLOCK):
    """Minimise `loss_and_gradient` over the weights, from `start` [F, K] (zeros by default); there is no intercept.

    The objective is `penalty`-strongly convex, hence at most |gradient|^2 / (2 penalty) above its minimum. The search
    ends when that bound is below `tolerance` times the objective and times its fall from zero weights (which is all there
    is to see where a large penalty keeps the weights small), after `max_iter` iterations, or when double precision shows
    no further fall; it begins in the precision of the features.

    Returns (weights float64 [F, K], {"objective", "excess": the bound as a share of the smaller of the two,
    "iterations"}).
    """
    n = len(features)
    covariance = sum(x.T.double() @ x.double() for x in features.split(max(1, max_block // features.shape[1]))) / n
    values, vectors = torch.linalg.eigh(covariance)
    # The search is in V, W = A V, where the Hessian at V = 0 is close to a multiple of the identity.
    scale = values.clamp(min=0) / num_classes + penalty
    A = vectors * scale.rsqrt() @ vectors.T
    V = covariance.new_zeros(len(A), num_classes) if start is None else vectors * scale.sqrt() @ (vectors.T @ start)
    dtype, optimizer, last, before, iterations = features.dtype, None, {}, math.inf, 0

    def closure():
        if not last or not torch.equal(V, last["V"]):
            loss, gradient = loss_and_gradient(A @ V, features, labels, penalty, dtype, max_block)
            last.update(V=V.clone(), loss=loss, gradient=gradient)
        # LBFGS ignores curvatures below an absolute threshold, so it gets sums over the images, not means.
        V.grad = n * (A @ last["gradient"])
        return n * last["loss"]

    while True:
        closure()
        objective = last["loss"].item()
        bound = last["gradient"].square().sum().item() / (2 * penalty)
        smaller = min(objective, math.log(num_classes) - objective)
        excess = bound / smaller if smaller > 0 else math.inf if bound else 0.0
        stalled = before - objective <= 4 * torch.finfo(dtype).eps * objective
        if excess <= tolerance or iterations >= max_iter or stalled and dtype == torch.float64:
            return A @ V, {"objective": objective, "excess": excess, "iterations": iterations}
        if stalled:  # in the rounding of the products
            dtype, before, optimizer = torch.float64, math.inf, None
            last.clear()
            continue
        if optimizer is None:
            optimizer = torch.optim.LBFGS([V], max_iter=LOOK, tolerance_grad=0, tolerance_change=0, history_size=20,
                                          line_search_fn="strong_wolfe")
        before = objective
        optimizer.step(closure)
        iterations += LOOK


@torch.no_grad()
def predict(weights, features, device, rows=65_536):
    """The five likeliest classes [m, min(5, K)] of features [m, F], best first, on `device`; needs no normalisation."""
    weights = weights.to(device, features.dtype)
    return torch.cat([(x.to(device) @ weights).topk(min(5, weights.shape[1]), dim=1).indices for x in features.split(rows)])
