"""What a checkpoint is made of: networks, optimisers and scalers by name, each loaded strictly."""
import torch

from engine.checkpoint import load_optimizer, load_scaler, load_strictly, network_state_dict


class Named:
    """A network whose weights have other names in a file: without `drop` in front, or with `add`."""

    def __init__(self, network, add="", drop=""):
        self.network, self.add, self.drop = network, add, drop

    def state_dict(self):
        return {self.add + name.removeprefix(self.drop): value for name, value in self.network.state_dict().items()}


def state_of(part):
    """What a file holds of a part."""
    return part.state_dict()


def load_part(name, part, checkpoint, path):
    """Load a part from its entry of a checkpoint: a network, optimiser, scaler, or what has `load_state_dict(state, path)`.

    Raises InputError, naming file and entry, for what does not fit.
    """
    if isinstance(part, Named):
        own = {key.removeprefix(part.drop): key for key in part.network.state_dict()}
        stored = network_state_dict(checkpoint, name, path)
        load_strictly(part.network, {own.get(key, key): value for key, value in stored.items()}, path)
    elif isinstance(part, torch.nn.Module):
        load_strictly(part, checkpoint[name], path)
    elif isinstance(part, torch.optim.Optimizer):
        load_optimizer(part, checkpoint[name], path)
    elif isinstance(part, torch.amp.GradScaler):
        load_scaler(part, checkpoint[name], path)
    else:
        part.load_state_dict(checkpoint[name], path)
