"""PCA whitening of descriptors, as copy detection does it. Letters: n images, F descriptor size."""
import numpy as np
import torch

FLOOR = 1e-5  # of the largest eigenvalue
ROWS = 1024  # descriptors that are waited for: each product goes once through all sums


class Moments:
    """Sums over descriptors, from which their mean and second moment come: the descriptors need not be kept."""

    def __init__(self, dim):
        self._sums = torch.zeros(dim + 1, dim, dtype=torch.float64)  # the last row is that of the descriptors themselves
        self._waiting = []

    def add(self, x):
        """Descriptors [B, F], on any device."""
        self._waiting.append(x.cpu().double())  # MPS has no double precision
        if sum(map(len, self._waiting)) >= ROWS:
            self.sums()

    def sums(self):
        """[F + 1, F] float64: X^T X, and the sum of the rows of X, of all descriptors so far."""
        if self._waiting:
            x = torch.cat(self._waiting)
            self._sums[:-1].addmm_(x.T, x)
            self._sums[-1] += x.sum(dim=0)
            self._waiting = []
        return self._sums


def whitening(sums, n):
    """(mean [F], projection [F, F]), float32, out of the sums of n descriptors; see `whitening_projection`."""
    means = (sums / n).numpy()
    return torch.from_numpy(means[-1]).float(), torch.from_numpy(whitening_projection(means[:-1])).float()


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
