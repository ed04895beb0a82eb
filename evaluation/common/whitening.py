"""PCA whitening of descriptors, as copy detection does it. Letters: n images, F descriptor size."""
import numpy as np
import torch

FLOOR = 1e-5  # of the largest eigenvalue


class Moments:
    """Sums over descriptors, from which their mean and second moment come: the descriptors need not be kept."""

    def __init__(self, dim):
        self.sums = torch.zeros(dim + 1, dim, dtype=torch.float64)  # the last row is that of the descriptors themselves

    def add(self, x):
        """Descriptors [B, F], on any device."""
        x = x.cpu().double()  # MPS has no double precision
        self.sums += torch.cat((x.T @ x, x.sum(dim=0)[None]))

    def whitening(self, n):
        """(mean [F], projection [F, F]), float32, of the n descriptors that were added; see `whitening_projection`."""
        sums = (self.sums / n).numpy()
        return torch.from_numpy(sums[-1]).float(), torch.from_numpy(whitening_projection(sums[:-1])).float()


def whitening_projection(second_moment):
    """P = diag(d^-1/2) V^T float64 [F, F] of a symmetric matrix V diag(d) V^T, directions in descending order of d.

    Eigenvalues below 1e-5 of the largest are raised to that. The matrix is X^T X / n of descriptors that are *not* centred,
    although what is whitened is: so the reference does it, and DINO before.
    """
    d, V = np.linalg.eigh(second_moment)
    d = np.maximum(d[::-1], FLOOR * d[-1])
    return d[:, None] ** -0.5 * V[:, ::-1].T


def whiten(x, mean, projection):
    """Descriptors [n, F] without the mean, projected."""
    return (x - mean) @ projection.T
