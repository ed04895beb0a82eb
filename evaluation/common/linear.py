"""Linear probing of frozen features (iBOT, Section 4.1): one head, or a sweep of many trained in one pass over the data.

Letters: H heads, C classes, F feature size, B images of a batch (all processes together), n images of a data set,
W processes.

Every process computes the features of its share of a batch and gets the others', then trains its share of the heads on
the whole batch: features are far smaller than the gradients of many heads, and each head meets the same numbers however
many processes there are.
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import engine
from evaluation.common.arguments import checkpoint_keys, evaluation_parser, int_from, probability
from evaluation.common.data import epoch_order
from evaluation.common.features import feature_dim, frozen_features, pool_features
from evaluation.common.protocol import read_backbones, read_sets, start_process
from evaluation.common.results import append_result, results_folder, shared_settings

MOMENTUM, LARS_ETA = 0.9, 0.001


# ---------------------------------------------------------------- heads

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


# ---------------------------------------------------------------- batches of features

class AugmentedImages(Dataset):
    """Random resized crops, uint8 [3, size, size], of an `ImageSet`; indexed by (epoch, index).

    A crop is a pure function of (seed, epoch, index), whatever the number of workers and processes.
    """

    def __init__(self, images, size, seed, hflip=0.5):
        self.seed = seed
        self.images = images.with_transform(v2.Compose([
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR), v2.RandomHorizontalFlip(hflip),
            v2.PILToTensor()]))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would seed the GPUs too
            return self.images[index]


class ShareOfBatches:
    """Batch sampler: this process's share of every batch of an epoch, as (epoch, index) for `AugmentedImages`.

    Batches hold `batch_size` images of all processes, the last one what is left; nothing is repeated to fill it up. A
    share that would be empty is one image, which `gather_shares` drops.
    """

    def __init__(self, n, batch_size, process, seed):
        self.n, self.batch_size, self.process, self.seed, self.epoch = n, batch_size, process, seed, 0

    def __len__(self):
        return math.ceil(self.n / self.batch_size)

    def __iter__(self):
        for batch in epoch_order(self.n, self.seed, self.epoch).split(self.batch_size):
            share = batch[self.process.rank::self.process.world_size]
            yield [(self.epoch, index) for index in (share if len(share) else batch[:1]).tolist()]


def gather_shares(tensor, total, process):
    """The shares [b, ...] that `ShareOfBatches` dealt of a batch of `total` rows, as [total, ...] in the batch's order."""
    W = process.world_size
    if W == 1:
        return tensor
    sizes = [len(range(rank, total, W)) for rank in range(W)]
    padded = tensor.new_zeros(sizes[0], *tensor.shape[1:])
    padded[:sizes[process.rank]] = tensor[:sizes[process.rank]]
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]  # row i is row i // W of share i % W


def image_batches(loader, targets, model_fn, normalize, process):
    """Batches (features [B, F], labels [B]) on the device, from a loader of `AugmentedImages` with `ShareOfBatches`."""
    shares = loader.batch_sampler
    batches = epoch_order(shares.n, shares.seed, shares.epoch).split(shares.batch_size)
    for (images, _, _), places in zip(loader, batches, strict=True):
        with torch.no_grad():
            features = model_fn(normalize(images.to(process.device, non_blocking=True))).float()
        yield gather_shares(features, len(places), process), targets[places].to(process.device, non_blocking=True)


def kept_batches(features, labels, order, batch_size, device):
    """Batches (features [B, F], labels [B]) on the device, in the given order of the rows."""
    order = order.to(features.device)
    for places in order.split(batch_size):
        yield features[places].to(device), labels[places].to(device)


def share_with_all(tensor, shape, dtype, process, chunk=2**16):
    """Rank 0's CPU tensor on the CPU of every process; rows travel in chunks, by way of the devices."""
    if process.world_size == 1:
        return tensor
    if process.rank > 0:
        tensor = torch.empty(shape, dtype=dtype)
    for rows in tensor.split(chunk):
        buffer = rows.to(process.device)
        dist.broadcast(buffer, 0)
        rows.copy_(buffer)
    return tensor


def near(tensor, device):
    """`tensor` on the GPU if that leaves half of its free memory, else where it is."""
    if device.type != "cuda" or tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return tensor
    return tensor.to(device)


# ---------------------------------------------------------------- files

def gather_heads(tensor, process):
    """Join the heads [h, ...] of all processes in order: [H, ...] on the CPU."""
    if process.world_size == 1:
        return tensor.cpu()
    tensor = tensor.to(process.device)
    return torch.cat(engine.gather_parts(tensor.flatten())).view(-1, *tensor.shape[1:]).cpu()


def checkpoint_state(heads, configs, scale, epoch, epochs, best, settings, sweep, process):
    """What is saved after `epoch` epochs, with the reference's names and torch's forms; all processes call it together.

    `scale` turns rates for 256 images into those of this run. The tensors of a sweep are views of a common one. `best` and
    `settings`, as in results.json, come on top.
    """
    weight, bias, weight_momentum, bias_momentum = (
        gather_heads(x, process) for x in (heads.weight, heads.bias, heads.weight_momentum, heads.bias_momentum))
    state_dict, optimizers, schedulers = {}, [], []
    for i, config in enumerate(configs):
        name = f"{i}.module.linear" if sweep else "module.linear"
        state_dict |= {f"{name}.weight": weight[i], f"{name}.bias": bias[i]}
        rate = scale * config.lr
        now = rate * cosine(epoch, epochs)
        slot, own = (("momentum_buffer", {"dampening": 0, "nesterov": False}) if config.optimizer == "sgd"
                     else ("mu", {"eta": LARS_ETA}))
        optimizers.append({
            "state": {0: {slot: weight_momentum[i]}, 1: {slot: bias_momentum[i]}},
            "param_groups": [{"lr": now, "initial_lr": rate, "momentum": MOMENTUM, "weight_decay": config.weight_decay,
                              **own, "params": [0, 1]}]})
        schedulers.append({"T_max": epochs, "eta_min": 0, "base_lrs": [rate], "last_epoch": epoch,
                           "_step_count": epoch + 1, "_last_lr": [now]})
    state = {"epoch": epoch, "state_dict": state_dict, "best_acc": best["best"]["top1"], "best": best,
             "settings": settings}
    if not sweep:
        return state | {"optimizer": optimizers[0], "scheduler": schedulers[0]}
    return state | {"optimizers": optimizers, "schedulers": schedulers, "best_acc_hidx": best["best"]["head"],
                    "best_acc_sweep_lr_only": best["best_sweep_lr_only"]["top1"]}


class OtherWeights(engine.InputError):
    """The heads in a file are of another backbone."""


def restore(path, heads, mine, configs, scale, epochs, settings, sweep):
    """Load the heads `mine` (a slice) from a file of `checkpoint_state` or of the reference: (next epoch, best so far).

    Raises InputError for a file that is none, and for one of other rates, settings, classes or features; `OtherWeights`
    if those of the backbone were others.
    """
    checkpoint = engine.load_checkpoint(path)
    stored = checkpoint.get("settings", {})
    if stored.get("weights_hash", settings["weights_hash"]) != settings["weights_hash"]:
        raise OtherWeights(f"checkpoint {path}: trained on features of other weights; --overwrite true starts over")
    plural = "s" if sweep else ""
    kinds = {"epoch": int, "state_dict": dict, f"optimizer{plural}": list if sweep else dict,
             f"scheduler{plural}": list if sweep else dict, "best_acc": (float, int)}
    lacking = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise engine.InputError(f"checkpoint {path}: no checkpoint of {'a sweep' if sweep else 'one head'}, "
                               f"it lacks {', '.join(lacking)}")
    optimizers, schedulers = (checkpoint[f"{name}{plural}"] for name in ("optimizer", "scheduler"))
    if not sweep:
        optimizers, schedulers = [optimizers], [schedulers]
    if len(optimizers) != len(configs) or len(schedulers) != len(configs):
        raise engine.InputError(f"checkpoint {path}: it has {len(optimizers)} heads, this run {len(configs)}")
    for config, scheduler in zip(configs, schedulers, strict=True):
        rates, length = scheduler.get("base_lrs"), scheduler.get("T_max")
        if length != epochs or not rates or not math.isclose(rates[0], scale * config.lr, rel_tol=1e-6):
            raise engine.InputError(f"checkpoint {path}: trained at rate {rates} for {length} epochs, this run is set to "
                                   f"[{scale * config.lr}] and {epochs}; rates grow with the total batch")
    differ = [name for name, value in stored.items() if name != "data_path" and settings.get(name) != value]
    if differ:
        raise engine.InputError(f"checkpoint {path}: trained with other {', '.join(differ)}")
    names = [f"{i}.module.linear" if sweep else "module.linear" for i in range(len(configs))]
    try:
        slots = ["momentum_buffer" if config.optimizer == "sgd" else "mu" for config in configs]
        found = {"weight": [checkpoint["state_dict"][f"{name}.weight"] for name in names],
                 "bias": [checkpoint["state_dict"][f"{name}.bias"] for name in names],
                 "weight_momentum": [o["state"][0][slot] for o, slot in zip(optimizers, slots, strict=True)],
                 "bias_momentum": [o["state"][1][slot] for o, slot in zip(optimizers, slots, strict=True)]}
    except (KeyError, TypeError) as error:
        raise engine.InputError(f"checkpoint {path}: incomplete, it lacks {error}") from error
    for name, tensors in found.items():
        own = getattr(heads, name)
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if shapes != {tuple(own.shape[1:])}:
            raise engine.InputError(f"checkpoint {path}: its heads' {name} has shape {', '.join(map(str, shapes))}, "
                                   f"this run's {tuple(own.shape[1:])} (classes, features)")
        for row, tensor in zip(own, tensors[mine], strict=True):
            row.copy_(tensor)
    # The reference saves at its best alone.
    here = {"top1": float(checkpoint["best_acc"]), "epoch": checkpoint["epoch"] - 1,
            "head": int(checkpoint.get("best_acc_hidx", 0))}
    return checkpoint["epoch"], checkpoint.get("best", {"best": here, "best_sweep_lr_only": here})


# ---------------------------------------------------------------- the protocol

def linear_parser(description):
    """The flags that one head and the sweep share."""
    parser = evaluation_parser(description)
    parser.set_defaults(n_last_blocks=4, output_dir=".")
    linear = add_probe_flags(parser)
    linear.add_argument("--num_labels", type=int_from(1), help="outputs of a head; by default the number of classes")
    return parser


def add_probe_flags(parser):
    """Flags of every training of heads, on features of whatever kind; returns their group."""
    linear = parser.add_argument_group("linear probe")
    linear.add_argument("--epochs", type=int_from(1), default=100)
    linear.add_argument("--augment", type=engine.bool_flag, default=True,
                        help="train on random crops; false: on centre crops, whose features are extracted once")
    linear.add_argument("--hflip", type=probability, default=0.5, metavar="P",
                        help="probability of a flip of these random crops; 0 for digits and the like")
    linear.add_argument("--val_freq", type=int_from(1), default=1,
                        help="epochs between validations and checkpoints; the last epoch always has one")
    linear.add_argument("--seed", type=int_from(0), default=0, help="of first weights, order of images and crops")
    linear.add_argument("--load_from", metavar="FILE",
                        help="resume from this file of the output folder: checkpoint_KEY_linear_last.pth, or the best one; "
                             "auto: from the former if it is there; with --overwrite true, if it is of these weights too")
    linear.add_argument("--overwrite", type=engine.bool_flag, default=False,
                        help="start over in an output folder that holds a linear probe")
    return linear


def cosine(epoch, epochs):
    """Factor of the rates in an epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def check_output(folder, key, args):
    """Raise InputError when `folder` cannot take this probe, or its checkpoint is not there."""
    if folder.exists() and not folder.is_dir():
        raise engine.InputError(f"--output_dir {folder} is a file")
    last = folder / f"checkpoint_{key}_linear_last.pth"
    if args.load_from and args.load_from != "auto":
        if not (folder / args.load_from).is_file():
            raise engine.InputError(f"--load_from: {folder / args.load_from} does not exist")
        return
    held = [path.name for path in (last, folder / "log.txt") if path.exists() and path.stat().st_size]
    if not held or (args.overwrite or args.load_from) and last.exists():
        return
    advice = (f"resume with --load_from {last.name}, start over with --overwrite true, or choose" if last.exists()
              else "which is not of this probe; choose")
    raise engine.InputError(f"--output_dir {folder} already holds {held[0]}; {advice} another folder")


def prepare_folder(folder, log_file, start):
    """Make the folder, with the log of the first `start` epochs alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.InputError(f"--output_dir {folder}: {error.strerror}") from error
    engine.trim_log(log_file, start)


def log_line(epoch, configs, rate_scale, losses, sweep):
    """What `log.txt` says of an epoch's training; a loss that is no number is null."""
    line = {}
    for i, (config, loss) in enumerate(zip(configs, losses, strict=True)):
        number = i if sweep else ""
        line |= {f"train_loss{number}": loss if math.isfinite(loss) else None, f"train_lr{number}": rate_scale * config.lr}
    return line | {"epoch": epoch}


def validation_line(scores, sweep):
    """What `log.txt` says of a validation with `scores`, rows (loss, top-1, top-5) of each head; top-5 may be None."""
    line = {}
    for i, (loss, top1, top5) in enumerate(scores):
        names = (f"test_loss{i}", f"test_acc{i}@1", f"test_acc{i}@5") if sweep else ("test_loss", "test_acc1", "test_acc5")
        line |= {names[0]: loss if math.isfinite(loss) else None, names[1]: top1}
        if top5 is not None:
            line[names[2]] = top5
    return line


def best_head(scores, heads, configs, epoch):
    """Record of the best by top-1 of the `heads` (indices); of several the last, as in the reference."""
    head = max(heads, key=lambda i: (scores[i][1], i))
    _, top1, top5 = scores[head]
    record = {"top1": top1} if top5 is None else {"top1": top1, "top5": top5}
    return record | {"epoch": epoch, "head": head, **asdict(configs[head])}


def describe(record, configs):
    """A record of `best_head` in words."""
    config, accuracy = configs[record["head"]], f"top-1 {record['top1']:.2f} %"
    if "top5" in record:
        accuracy += f", top-5 {record['top5']:.2f} %"
    settings = f"epoch {record['epoch']}, lr {config.lr:g}"
    if len(configs) > 1:
        settings += f", head {record['head']}"
    if not all(c.is_plain for c in configs):
        settings += f", {config.optimizer}, decay {config.weight_decay:g}"
    return f"{accuracy} ({settings})"


def run_probe(args, configs, protocol):
    """Train and validate heads of `configs` for every checkpoint key of `args` (flags of `linear_parser`).

    `protocol` names the records in results.json; it is "linear" for a sweep, whose files have a sweep's form.
    """
    process = start_process(args)
    keys = checkpoint_keys(args.pretrained_weights, args.checkpoint_key)
    if args.load_from not in (None, "auto") and len(keys) > 1:
        raise engine.InputError(f"--load_from {args.load_from}: give one --checkpoint_key, not {len(keys)}")
    folders = {key: Path(args.output_dir) / (key if len(keys) > 1 else "") for key in keys}
    for key, folder in folders.items():
        check_output(folder, key, args)
    backbones, _ = read_backbones(args)
    train, val = read_sets(args)
    if args.num_labels and args.num_labels < len(train.classes):
        raise engine.InputError(f"--num_labels {args.num_labels}: {train.name} has {len(train.classes)} classes")
    if process.world_size > 1:
        dist.barrier()  # nobody may write before all have looked
    for key, backbone in backbones.items():
        probe(args, configs, protocol, key, folders[key], backbone, train, val, process)


def train_epoch(heads, batches, rate_scale, report):
    """Step through the batches; mean losses [H] over the images. Each step calls `report(images so far, summed losses)`."""
    sums, count = 0, 0
    for features, labels in batches:
        sums += heads.step(features, labels, rate_scale) * len(labels)
        count += len(labels)
        report(count, sums)
    return sums / count


class Progress:
    """Prints, every ten seconds of an epoch, how far it is and when all `epochs` of `n` images will be done."""

    def __init__(self, n, epochs, start):
        self.n, self.epochs, self.start = n, epochs, start
        self.since = self.said = time.time()

    def speed(self, epoch, count):
        """Text of images/s and time left after `count` images of `epoch`."""
        done, seconds = (epoch - self.start) * self.n + count, time.time() - self.since
        left = ((self.epochs - self.start) * self.n - done) * seconds / done
        return f"{done / seconds:.1f} images/s  eta {engine.eta_string(left)}"

    def report(self, epoch, count, sums):
        if time.time() - self.said > 10:
            self.said = time.time()
            loss = f"  loss {sums.min().item() / count:.4f}" if len(sums) else ""  # this process may have no head
            print(f"epoch {epoch}/{self.epochs} [{count}/{self.n}]{loss}  {self.speed(epoch, count)}", flush=True)


class ProbeRun:
    """Heads in training on features of one kind: their files in `folder`, and how well they do.

    `settings` are those of results.json; of them `epochs`, `total_batch`, `seed`, `train_images` and `val_images` count
    here. `title` begins the lines that are printed, by default `key`. All processes call the methods together.
    """

    def __init__(self, key, folder, configs, dim, num_classes, settings, sweep, process, title=None):
        self.key, self.folder, self.configs, self.dim, self.num_classes = key, folder, configs, dim, num_classes
        self.settings, self.sweep, self.process, self.title = settings, sweep, process, title or key
        self.epochs, self.scale = settings["epochs"], settings["total_batch"] / 256
        self.mine = slice(*(len(configs) * r // process.world_size for r in (process.rank, process.rank + 1)))
        self.heads = LinearHeads(configs[self.mine], dim, num_classes, settings["seed"], process.device)
        self.last_file, self.best_file = (folder / f"checkpoint_{key}_linear{suffix}.pth" for suffix in ("_last", ""))
        self.start, self.best, self.now, self.lines = 0, None, None, []

    @property
    def is_main(self):
        return self.process.rank == 0

    def prepare(self, load_from, overwrite):
        """Make the folder; go on from the checkpoint that `--load_from` names, if it is there."""
        path = self.folder / load_from if load_from and load_from != "auto" else self.last_file
        if load_from and path.exists():
            try:
                self.start, self.best = restore(path, self.heads, self.mine, self.configs, self.scale, self.epochs,
                                                self.settings, self.sweep)
            except OtherWeights:
                if load_from != "auto" or not overwrite:
                    raise
                if self.is_main:
                    print(f"{path} is of other weights: starting over", flush=True)
        if not self.is_main:
            return
        print(f"{self.title}: {len(self.configs)} head(s), {self.dim} features to {self.num_classes} classes; "
              f"{self.settings['train_images']} training and {self.settings['val_images']} validation images; total batch "
              f"{self.settings['total_batch']}, rates x {self.scale:g}; starting at epoch {self.start} of {self.epochs}",
              flush=True)
        prepare_folder(self.folder, self.folder / "log.txt", self.start)
        if self.start >= self.epochs:
            print(f"nothing to do: {path} has finished {self.start} epochs; "
                  f"best: {describe(self.best['best'], self.configs)}", flush=True)

    def end_epoch(self, epoch, losses):
        """Note the mean losses of this process's heads in an epoch. Raises FloatingPointError if no head's is finite."""
        losses = gather_heads(losses, self.process).tolist()
        if not any(map(math.isfinite, losses)):
            raise FloatingPointError(f"{self.title}: no head has a finite loss in epoch {epoch}; lower the learning rate")
        self.lines.append(log_line(epoch, self.configs, self.scale * cosine(epoch, self.epochs), losses, self.sweep))

    def validate(self, epoch, features, labels, speed):
        """Validate on features [n, F], then write log and checkpoints; `speed` ends the line that is printed."""
        configs = self.configs
        scores = gather_heads(self.heads.evaluate(features, labels), self.process).tolist()  # H of [loss, top-1, top-5]
        if self.num_classes < 5:
            scores = [(loss, top1, None) for loss, top1, _ in scores]
        self.lines[-1] |= validation_line(scores, self.sweep)
        now = {"best": best_head(scores, range(len(configs)), configs, epoch),
               "best_sweep_lr_only": best_head(scores, [i for i, c in enumerate(configs) if c.is_plain], configs, epoch)}
        best, self.now = self.best, now["best"]
        is_best = best is None or now["best"]["top1"] >= best["best"]["top1"]
        self.best = {name: new if best is None or new["top1"] >= best[name]["top1"] else best[name]
                     for name, new in now.items()}
        state = checkpoint_state(self.heads, configs, self.scale, epoch + 1, self.epochs, self.best, self.settings,
                                 self.sweep, self.process)
        if self.is_main:
            engine.save_atomically(state, self.last_file)
            if is_best:
                engine.save_atomically(state, self.best_file)
            with open(self.folder / "log.txt", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
            print(f"{self.title}, epoch {epoch}/{self.epochs}: {describe(self.now, configs)}; best so far "
                  f"{describe(self.best['best'], configs)}; {speed}", flush=True)
        self.lines = []

    def finish(self, protocol, weights, results_dir):
        """Print and record the results, once all epochs are done."""
        if not self.is_main:
            return
        metrics = {"best": self.best["best"]} | ({"last": self.now} if self.now else {})
        if not all(config.is_plain for config in self.configs):
            metrics["best_sweep_lr_only"] = self.best["best_sweep_lr_only"]
        for name, record in metrics.items():
            print(f"{self.title}, {name.replace('_', ' ')}: {describe(record, self.configs)}")
        print(f"checkpoints: {self.best_file} (best), {self.last_file}", flush=True)
        append_result(results_dir, protocol, weights, self.key, self.settings, metrics)


class HeadsSideBySide:
    """The heads of several runs, each on its columns of the features [B, sum of F], with one `step` as of `LinearHeads`."""

    def __init__(self, runs, epoch):
        self.runs, self.epoch = runs, epoch

    def step(self, features, labels, rate_scale):
        columns = features.split([run.dim for run in self.runs], dim=1)
        return torch.cat([run.heads.step(own, labels, rate_scale) for run, own in zip(self.runs, columns, strict=True)
                          if run.start <= self.epoch])


def train_runs(runs, batches_of, val_features, val_labels, args, protocol):
    """Train and validate runs of as many heads each in one pass over the data, to their ends.

    batches_of: a function from the epoch to batches (features [B, sum of F], labels [B]); val_features [n, sum of F]. A run
    that was stopped after more epochs than others joins when they have caught up.
    """
    dims, n, first = [run.dim for run in runs], runs[0].settings["train_images"], min(run.start for run in runs)
    progress = Progress(n, args.epochs, first)
    for epoch in range(first, args.epochs):
        report = partial(progress.report, epoch) if runs[0].is_main else lambda *_: None
        going = [run for run in runs if run.start <= epoch]
        rate_scale = runs[0].scale * cosine(epoch, args.epochs)
        losses = train_epoch(HeadsSideBySide(runs, epoch), batches_of(epoch), rate_scale, report)
        for run, own in zip(going, losses.split([len(run.heads.rate) for run in going]), strict=True):
            run.end_epoch(epoch, own)
        if epoch % args.val_freq and epoch + 1 < args.epochs:
            continue
        for run, own in zip(runs, val_features.split(dims, dim=1), strict=True):
            if run.start <= epoch:
                run.validate(epoch, own, val_labels, progress.speed(epoch, n))
    for run in runs:
        run.finish(protocol, args.pretrained_weights, results_folder(args))


def probe(args, configs, protocol, key, folder, backbone, train, val, process):
    """The heads of `configs` on one backbone: training, validations, `log.txt`, checkpoints, a record in results.json."""
    dim = feature_dim(backbone.model, args.n_last_blocks, args.avgpool_patchtokens)
    total_batch = args.batch_size_per_gpu * process.world_size
    settings = shared_settings(args, backbone, train, val) | probe_settings(args, configs, total_batch)
    num_classes = args.num_labels or len(train.classes)
    run = ProbeRun(key, folder, configs, dim, num_classes, settings, protocol == "linear", process)
    run.prepare(args.load_from, args.overwrite)
    if run.start >= args.epochs:
        return
    val_features, val_labels = kept_features(args, backbone, val, dim, process)
    if args.augment:
        batches_of = augmented_epochs(args, backbone, train, total_batch, process)
    else:
        batches_of = kept_epochs(args, *kept_features(args, backbone, train, dim, process), total_batch, process)
    train_runs([run], batches_of, val_features, val_labels, args, protocol)


def probe_settings(args, configs, total_batch):
    """What results.json records of how heads were trained."""
    return {"heads": len(configs), "epochs": args.epochs, "total_batch": total_batch, "augment": args.augment,
            "hflip": args.hflip, "seed": args.seed}


def kept_features(args, backbone, images, dim, process):
    """Features [n, dim] and labels [n] of centre crops, in every process and on its device if they fit."""
    features, labels = frozen_features(backbone, images, process, args.n_last_blocks, args.avgpool_patchtokens,
                                       args.batch_size_per_gpu, args.num_workers, args.dump_features, args.load_features)
    return everywhere(features, labels, (len(images), dim), process)


def everywhere(features, labels, shape, process):
    """Rank 0's features of `shape` and labels, in every process and on its device if they fit."""
    features = share_with_all(features, shape, torch.float32, process)
    labels = share_with_all(labels, shape[:1], torch.int64, process)
    return near(features, process.device), near(labels, process.device)


def kept_epochs(args, features, labels, total_batch, process):
    """A function from the epoch to its batches of the kept features [n, F] and labels [n]."""
    def batches_of(epoch):
        return kept_batches(features, labels, epoch_order(len(features), args.seed, epoch), total_batch, process.device)
    return batches_of


def augmented_epochs(args, backbone, train, total_batch, process, model_fn=None):
    """A function from the epoch to its batches of features of random crops (see `image_batches`).

    model_fn: images [B, 3, S, S] to features [B, F]; by default those that the flags say.
    """
    model, targets = backbone.model.to(process.device), torch.from_numpy(train.targets)
    model_fn = model_fn or (lambda images: pool_features(model, images, args.n_last_blocks, args.avgpool_patchtokens))
    shares = ShareOfBatches(len(train), total_batch, process, args.seed)
    loader = DataLoader(AugmentedImages(train, backbone.image_size, args.seed, args.hflip), batch_sampler=shares,
                        num_workers=args.num_workers, pin_memory=process.device.type == "cuda",
                        persistent_workers=args.num_workers > 0)

    def batches_of(epoch):
        shares.epoch = epoch
        return image_batches(loader, targets, model_fn, backbone.normalize, process)
    return batches_of
