"""Effective ranks of features, which tell without labels whether a network is any good: RankMe and LiDAR.

Letters: n images, q views of an image, D feature size.
"""
import torch

EPSILON = 1e-7  # of both papers
RIDGE = 1e-4  # LiDAR's delta, which keeps the covariance within images invertible


def effective_rank(values):
    """exp of the entropy of `values` [k], none negative, divided by their sum: from 1, one is all, to k, all are equal."""
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def rankme(features):
    """Effective rank of the singular values of features [n, D], in float64 (Garrido et al., ICML 2023, Equation 1).

    At most min(n, D); features are taken as they are, not centred.
    """
    return effective_rank(torch.linalg.svdvals(features.double()))


def lidar(features):
    """Effective rank of the LDA matrix of features [n, q, D] of q views of n images, in float64 (Thilak et al., ICLR 2024).

    That is W^-1/2 B W^-1/2, B the covariance of the images' means, W that of the views around the mean of their image.
    Directions in which the views of an image differ as much as images do count little. At most min(n - 1, D).
    """
    features = features.double()
    n, q, D = features.shape
    means = features.mean(dim=1)  # [n, D]
    between = means - means.mean(dim=0)
    within = (features - means[:, None]).reshape(n * q, D)
    W = within.T @ within / (n * q) + RIDGE * torch.eye(D, dtype=features.dtype, device=features.device)
    # With W = L L^T the matrix L^-1 B L^-T has the same eigenvalues.
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(W), between.T, upper=False)  # [D, n]
    return effective_rank(torch.linalg.eigvalsh(rows @ rows.T / n).clamp(min=0))
