"""Linear classifiers of the same features, and their optimisers, computed as one.

Letters: H heads, h of them computed at once, C classes, F feature size, B images of a batch, b of them, n of a data set.
"""
from dataclasses import dataclass

import torch

MOMENTUM, LARS_ETA = 0.9, 0.001


@dataclass(frozen=True)
class HeadConfig:
    """`lr` is for a batch of 256 images; `optimizer` is "sgd" or "lars"."""
    lr: float
    weight_decay: float = 0.0
    optimizer: str = "sgd"

    @property
    def is_plain(self):
        """SGD without decay, as in the sweep of rates alone."""
        return self.optimizer == "sgd" and not self.weight_decay


def sweep_configs(sweep_lr_only=True):
    """The reference's grid: 45 rates 1e-4, 2e-4, ... 9 with plain SGD; in full each with two decays and two optimisers.

    The rate is outermost, then the decay, then the optimiser: plain SGD without decay has every fourth index of 180.
    """
    rates = [float(f"{n}e{k}") for k in range(-4, 1) for n in range(1, 10)]
    if sweep_lr_only:
        return [HeadConfig(rate) for rate in rates]
    return [HeadConfig(rate, decay, optimizer) for rate in rates for decay in (0.0, 1e-6) for optimizer in ("sgd", "lars")]


class LinearHeads:
    """H linear classifiers of the same features and their optimisers, computed as one.

    The weights of all heads form one matrix [H * C, F]: a product gives all logits, another all gradients, which are
    written down (softmax minus one-hot) rather than traced. Optimisers are SGD with momentum 0.9 (decay of weights and
    biases, as torch's) and LARS (You et al., 2017; decay and trust ratio of weights alone).

    All heads start from the same weights, normal(0, 0.01) drawn with `seed`, and biases 0: they differ by their
    configuration alone, and a head of a sweep is the one that the same rate gives alone.

    `block` is the most logits computed at a time; by default what a CPU's cache holds, or 256 MB on other devices.
    """

    def __init__(self, configs, dim, num_classes, seed=0, device="cpu", block=None):
        H, C = len(configs), num_classes
        self.block = block or (2**20 if torch.device(device).type == "cpu" else 2**26)
        first = torch.empty(C, dim).normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        self.weight = first.to(device).repeat(H, 1, 1)  # [H, C, F]
        self.bias = torch.zeros(H, C, device=device)
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rate = torch.tensor([c.lr for c in configs], device=device)  # [H]
        self.decay = torch.tensor([c.weight_decay for c in configs], device=device)
        self.lars = torch.tensor([c.optimizer == "lars" for c in configs], dtype=torch.bool, device=device)
        self.plain = all(c.is_plain for c in configs)

    def _parts(self, batch):
        """Slices of the heads whose logits for `batch` rows are a block each; one empty slice when there are no heads."""
        H, C, _ = self.weight.shape
        step = max(1, self.block // (C * batch))
        return [slice(first, min(first + step, H)) for first in range(0, max(H, 1), step)]

    def _log_probabilities(self, part, features):
        """[B, F] -> [h, C, B] of the h heads in `part`: with the images innermost all is vectorised however few classes."""
        h, C, F = self.weight[part].shape
        logits = torch.addmm(self.bias[part].view(h * C, 1), self.weight[part].view(h * C, F), features.T)
        return torch.log_softmax(logits.view(h, C, len(features)), dim=1)

    @torch.no_grad()
    def step(self, features, labels, rate_scale):
        """One update of all heads by the mean cross-entropy of a batch; rates are `rate_scale` times their own.

        features [B, F], labels int64 [B]. Returns the losses [H] before the update.
        """
        return torch.cat([self._step(part, features, labels, rate_scale) for part in self._parts(len(features))])

    def _step(self, part, features, labels, rate_scale):
        weight, bias, weight_momentum, bias_momentum = (
            x[part] for x in (self.weight, self.bias, self.weight_momentum, self.bias_momentum))
        h, C, F = weight.shape
        B = len(features)
        gradient = self._log_probabilities(part, features)  # becomes that of the sum over the batch by the logits
        target = labels.expand(h, 1, B)
        losses = -gradient.gather(1, target).mean(dim=(1, 2))
        # Probabilities below 1e-26 move no weight, but those below 1e-38 are denormal numbers, on which CPUs are slow.
        gradient.clamp_(min=-60).exp_().scatter_add_(1, target, gradient.new_full((), -1.0).expand(h, 1, B))
        bias_gradient = gradient.sum(dim=2) / B
        gradient = gradient.view(h * C, B)
        if self.plain:
            weight_momentum.view(h * C, F).addmm_(gradient, features, beta=MOMENTUM, alpha=1 / B)
        else:
            decay, lars = self.decay[part], self.lars[part]
            weight_gradient = (gradient @ features).view(h, C, F).div_(B).addcmul_(weight, decay[:, None, None])
            bias_gradient.addcmul_(bias, torch.where(lars, 0, decay)[:, None])
            norm, gradient_norm = (x.flatten(1).norm(dim=1) for x in (weight, weight_gradient))
            trust = torch.where(lars & (norm > 0) & (gradient_norm > 0), LARS_ETA * norm / gradient_norm, 1.0)
            weight_momentum.mul_(MOMENTUM).addcmul_(weight_gradient, trust[:, None, None])
        bias_momentum.mul_(MOMENTUM).add_(bias_gradient)
        rate = (-rate_scale * self.rate[part])[:, None]
        weight.addcmul_(weight_momentum, rate[..., None])
        bias.addcmul_(bias_momentum, rate)
        return losses

    @torch.no_grad()
    def evaluate(self, features, labels, rows=1024):
        """Mean cross-entropy, top-1 and top-5 accuracy in percent of every head: float64 [H, 3] on the CPU.

        features [n, F], labels int64 [n], on any device, taken `rows` at a time. A class that ties with the right one, or
        whose output is not a number, counts as above it.
        """
        device, sums = self.weight.device, 0
        for x, y in zip(features.split(rows), labels.split(rows), strict=True):
            x, y = x.to(device), y.to(device)
            found = []
            for part in self._parts(len(x)):
                log_p = self._log_probabilities(part, x)
                own = log_p.gather(1, y.expand(len(log_p), 1, -1))  # [h, 1, b]
                place = (~(log_p < own)).sum(dim=1)  # [h, b], 1 for the likeliest class
                found.append(torch.stack((-own[:, 0].sum(dim=1), (place <= 1).sum(dim=1), (place <= 5).sum(dim=1)), dim=1))
            sums += torch.cat(found).cpu().double()
        return sums / len(labels) * torch.tensor([1.0, 100.0, 100.0])
