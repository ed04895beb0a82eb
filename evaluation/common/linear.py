"""Linear probing of frozen features (iBOT, Section 4.1): one head, or a sweep of many trained in one pass over the data.

Letters: H heads, C classes, F feature size, B images of a batch (all processes together), n images of a data set,
W processes.

Every process computes the features of its share of a batch and gets the others', then trains its share of the heads on
the whole batch: features are far smaller than the gradients of many heads, and each head meets the same numbers however
many processes there are.
"""
import math
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import engine
from evaluation.common.arguments import checkpoint_keys, evaluation_parser, int_from, probability
from evaluation.common.augment import AugmentedImages, ShareOfBatches
from evaluation.common.data import epoch_order
from evaluation.common.features import everywhere, feature_dim, frozen_features, pool_features
from evaluation.common.heads import LARS_ETA, MOMENTUM, LinearHeads
from evaluation.common.protocol import read_backbones, read_sets, start_process
from evaluation.common.results import append_result, results_folder, shared_settings

# Flags that a resumed probe may have otherwise without a word; the settings, which it may not, are compared apart.
FREE_FLAGS = {"pretrained_weights", "checkpoint_key", "dump_features", "load_features", "results_dir", "download"}


# ---------------------------------------------------------------- batches of features

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


class FeaturesOfCrops:
    """Batches of features of random crops of an `ImageSet`; model_fn: images [B, 3, S, S] to features [B, F]."""

    def __init__(self, args, backbone, train, total_batch, process, model_fn):
        self.model_fn, self.normalize, self.process = model_fn, backbone.normalize, process
        self.targets = torch.from_numpy(train.targets)
        self.shares = ShareOfBatches(len(train), total_batch, process, args.seed)
        self.loader = DataLoader(AugmentedImages(train, backbone.image_size, args.seed, args.hflip),
                                 batch_sampler=self.shares, num_workers=args.num_workers,
                                 pin_memory=process.device.type == "cuda", persistent_workers=args.num_workers > 0,
                                 worker_init_fn=engine.ignore_signals)

    def batches(self, epoch, first=0):
        """(this process's share of the crops, places of the whole batch) of an epoch, from batch `first` on."""
        self.shares.epoch, self.shares.first = epoch, first
        order = epoch_order(self.shares.n, self.shares.seed, epoch).split(self.shares.batch_size)[first:]
        return ((images, places) for (images, _, _), places in zip(self.loader, order, strict=True))

    def load(self, batch):
        """Features [B, F] and labels [B] of a batch, on the device; all processes call it together."""
        (images, places), device = batch, self.process.device
        with torch.no_grad():
            features = self.model_fn(self.normalize(images.to(device, non_blocking=True))).float()
        return gather_shares(features, len(places), self.process), self.targets[places].to(device, non_blocking=True)


class KeptFeatures:
    """The same of features [n, F] and labels [n] that were extracted once."""

    def __init__(self, features, labels, total_batch, seed, device):
        self.features, self.labels, self.total_batch, self.seed, self.device = features, labels, total_batch, seed, device

    def batches(self, epoch, first=0):
        order = epoch_order(len(self.features), self.seed, epoch).to(self.features.device)
        return iter(order.split(self.total_batch)[first:])

    def load(self, places):
        return self.features[places].to(self.device), self.labels[places].to(self.device)


def gather_heads(tensor, process):
    """Join the heads [h, ...] of all processes in order: [H, ...] on the CPU."""
    if process.world_size == 1:
        return tensor.cpu()
    tensor = tensor.to(process.device)
    return torch.cat(engine.gather_parts(tensor.flatten())).view(-1, *tensor.shape[1:]).cpu()


# ---------------------------------------------------------------- a probe

def log_line(epoch, configs, rate_scale, losses, scores, sweep):
    """What `log.txt` says of an epoch; scores: after a validation, rows (loss, top-1, top-5 or None) of each head."""
    line = {}
    for i, (config, loss) in enumerate(zip(configs, losses, strict=True)):
        number = i if sweep else ""
        line |= {f"train_loss{number}": loss, f"train_lr{number}": rate_scale * config.lr}
    line["epoch"] = epoch
    for i, (loss, top1, top5) in enumerate(scores):
        names = (f"test_loss{i}", f"test_acc{i}@1", f"test_acc{i}@5") if sweep else ("test_loss", "test_acc1", "test_acc5")
        line |= {names[0]: loss, names[1]: top1} | ({} if top5 is None else {names[2]: top5})
    return line


def best_head(scores, heads, configs, epoch):
    """Record of the best by top-1 of the `heads` (indices); of several the last, as in the reference."""
    head = max(heads, key=lambda i: (scores[i][1], i))
    _, top1, top5 = scores[head]
    top5 = {} if top5 is None else {"top5": top5}
    return {"top1": top1, **top5, "epoch": epoch, "head": head, **asdict(configs[head])}


def describe(record, configs):
    """A record of `best_head` in words."""
    config, plain = configs[record["head"]], all(config.is_plain for config in configs)
    return (f"top-1 {record['top1']:.2f} %" + (f", top-5 {record['top5']:.2f} %" if "top5" in record else "")
            + f" (epoch {record['epoch']}, lr {config.lr:g}" + f", head {record['head']}" * (len(configs) > 1)
            + ("" if plain else f", {config.optimizer}, decay {config.weight_decay:g}") + ")")


def files_of(key):
    """Names of a probe's files."""
    return engine.Files(newest=f"checkpoint_{key}_linear_last.pth", previous=None, numbered="",
                        best=f"checkpoint_{key}_linear.pth", events=None)


class ProbeRun:
    """Heads in training on features of one kind: an `engine.Run` in `folder`, and how well they do.

    `settings` are those of results.json; of them `epochs`, `total_batch`, `seed`, `train_images` and `val_images` count
    here. `title` begins the lines that are printed, by default `key`. All processes call the methods together.

    Checkpoints have the reference's names and torch's forms. The tensors of a sweep are views of a common one.
    """

    def __init__(self, key, folder, configs, dim, num_classes, settings, sweep, process, title=None):
        self.key, self.folder, self.configs, self.dim, self.num_classes = key, folder, configs, dim, num_classes
        self.settings, self.sweep, self.process, self.title = settings, sweep, process, title or key
        self.epochs, self.scale = settings["epochs"], settings["total_batch"] / 256  # rates are for 256 images
        self.mine = range(*(len(configs) * r // process.world_size for r in (process.rank, process.rank + 1)))
        self.heads = LinearHeads([configs[i] for i in self.mine], dim, num_classes, settings["seed"], process.device)
        self.losses = torch.zeros_like(self.heads.rate)  # [h], sums over this epoch's images
        self.names = [f"{i}.module.linear" if sweep else "module.linear" for i in range(len(configs))]
        self.slots = ["momentum_buffer" if config.optimizer == "sgd" else "mu" for config in configs]
        self.run = self.best = self.now = None

    def cosine(self):
        """Factor of the rates in this epoch."""
        return 0.5 * (1 + math.cos(math.pi * self.run.epoch / self.epochs))

    def _state_dict(self):
        weight, bias = (gather_heads(x, self.process) for x in (self.heads.weight, self.heads.bias))
        return {f"{name}.{kind}": x[i] for i, name in enumerate(self.names)
                for kind, x in (("weight", weight), ("bias", bias))}

    def _load_state_dict(self, state, path):
        self._load(path, lambda i: {kind: state[f"{self.names[i]}.{kind}"] for kind in ("weight", "bias")})

    def _optimizers(self):
        weight, bias = (gather_heads(x, self.process) for x in (self.heads.weight_momentum, self.heads.bias_momentum))
        states = []
        for i, (config, slot) in enumerate(zip(self.configs, self.slots, strict=True)):
            own = {"dampening": 0, "nesterov": False} if slot == "momentum_buffer" else {"eta": LARS_ETA}
            rate = self.scale * config.lr
            states.append({"state": {0: {slot: weight[i]}, 1: {slot: bias[i]}}, "param_groups": [
                {"lr": rate * self.cosine(), "initial_lr": rate, "momentum": MOMENTUM, "weight_decay": config.weight_decay,
                 **own, "params": [0, 1]}]})
        return states if self.sweep else states[0]

    def _load_optimizers(self, state, path):
        states = state if self.sweep else [state]
        self._load(path, lambda i: {f"{kind}_momentum": states[i]["state"][n][self.slots[i]]
                                    for n, kind in enumerate(("weight", "bias"))})

    def _load(self, path, tensors_of):  # of head i: {attribute of LinearHeads: tensor}
        for i in range(len(self.configs)):
            try:
                tensors = tensors_of(i)
            except (KeyError, IndexError, TypeError) as error:
                raise engine.InputError(f"checkpoint {path}: incomplete, it lacks {error}") from error
            for name, tensor in tensors.items():
                own, shape = getattr(self.heads, name), getattr(tensor, "shape", ())
                if shape != own.shape[1:]:
                    raise engine.InputError(f"checkpoint {path}: its heads' {name} has shape {tuple(shape)}, this run's "
                                            f"{tuple(own.shape[1:])} (classes, features)")
                if i in self.mine:
                    own[self.mine.index(i)].copy_(tensor)

    def _schedulers(self):
        states = [{"T_max": self.epochs, "eta_min": 0, "base_lrs": [self.scale * config.lr], "last_epoch": self.run.epoch,
                   "_step_count": self.run.epoch + 1, "_last_lr": [self.scale * config.lr * self.cosine()]}
                  for config in self.configs]
        return states if self.sweep else states[0]

    def _check_schedulers(self, state, path):
        schedulers = state if self.sweep else [state]
        if len(schedulers) != len(self.configs):
            raise engine.InputError(f"checkpoint {path}: it has {len(schedulers)} heads, this run {len(self.configs)}")
        for config, scheduler in zip(self.configs, schedulers, strict=True):
            rates, length, rate = scheduler.get("base_lrs"), scheduler.get("T_max"), self.scale * config.lr
            if length != self.epochs or not rates or not math.isclose(rates[0], rate, rel_tol=1e-6):
                raise engine.InputError(f"checkpoint {path}: trained at rate {rates} for {length} epochs, this run is set "
                                        f"to [{rate}] and {self.epochs}; rates grow with the total batch")

    def _load_losses(self, state, path):
        if getattr(state, "shape", None) != (len(self.configs),):
            raise engine.InputError(f"checkpoint {path}: its entry 'losses' cannot be used")
        self.losses.copy_(state[self.mine.start:self.mine.stop])

    def prepare(self, args):
        """Go on from the checkpoint that `--load_from` means, if it is there, and prepare the folder; returns the run."""
        run = self.run = engine.Run(args, self.process, None, self.folder, files_of(self.key))
        s, kind = ("s", list) if self.sweep else ("", dict)
        run.find({"state_dict": dict, f"optimizer{s}": kind, f"scheduler{s}": kind, "best_acc": (float, int)},
                 "a sweep" if self.sweep else "one head")
        notes, hashed = [], self.settings["weights_hash"]
        if run.path and run.checkpoint.get("settings", {}).get("weights_hash", hashed) != hashed:
            if args.load_from != "auto" or not args.overwrite:
                raise engine.InputError(f"checkpoint {run.path}: trained on features of other weights; --overwrite true "
                                        "starts over")
            notes = [f"{run.path} is of other weights: starting over"]
            run.forget()
        notes += run.changes(FREE_FLAGS)
        found = run.checkpoint or {}
        parts = {f"scheduler{s}": (self._schedulers, self._check_schedulers),
                 "state_dict": (self._state_dict, self._load_state_dict),
                 f"optimizer{s}": (self._optimizers, self._load_optimizers),
                 "losses": (lambda: gather_heads(self.losses, self.process), self._load_losses)}
        run.resume({name: SimpleNamespace(state_dict=write, load_state_dict=read) for name, (write, read) in parts.items()},
                   self.settings["total_batch"], math.ceil(self.settings["train_images"] / self.settings["total_batch"]),
                   may_lack=("losses",))
        differ = [name for name, value in found.get("settings", {}).items()
                  if name != "data_path" and self.settings.get(name) != value]
        if differ:
            raise engine.InputError(f"checkpoint {run.path}: trained with other {', '.join(differ)}")
        # The reference saves at its best alone.
        here = {"top1": float(found.get("best_acc", 0)), "epoch": run.epoch - 1, "head": int(found.get("best_acc_hidx", 0))}
        self._note(found.get("best", {"best": here, "best_sweep_lr_only": here}))
        run.start()
        if run.is_main:
            print(f"{self.title}: {len(self.configs)} head(s), {self.dim} features to {self.num_classes} classes; "
                  f"{self.settings['train_images']} training and {self.settings['val_images']} validation images; total "
                  f"batch {self.settings['total_batch']}, rates x {self.scale:g}", *notes,
                  run.where() + f"; best: {describe(self.best['best'], self.configs)}" * (run.epoch >= self.epochs),
                  sep="\n", flush=True)
        return run

    def _note(self, best):
        self.best = best
        self.run.entries = {"args": vars(self.run.args),  # a dictionary: torch reads the file with weights_only=True
                            "best_acc": best["best"]["top1"], "best": best, "settings": self.settings}
        if self.sweep:
            self.run.entries |= {"best_acc_hidx": best["best"]["head"],
                                 "best_acc_sweep_lr_only": best["best_sweep_lr_only"]["top1"]}

    def step(self, features, labels):
        """An update of the heads by a batch of features [B, F], labels [B]."""
        self.losses += self.heads.step(features, labels, self.scale * self.cosine()) * len(labels)
        self.run.add({})

    def lowest_loss(self):
        """What a log line amid an epoch says of this process's heads, if it has any."""
        return f"  loss {self.losses.min() / (self.run.step * self.run.total_batch):.4f}" if len(self.losses) else ""

    def end_epoch(self, features, labels, said):
        """Write down an epoch, and what a validation on features [n, F], None for none, gives. `said` ends the line.

        Raises FloatingPointError if no head has a finite loss.
        """
        run, configs = self.run, self.configs
        losses = gather_heads(self.losses / self.settings["train_images"], self.process).tolist()
        if not any(map(math.isfinite, losses)):
            raise FloatingPointError(f"{self.title}: no head has a finite loss in epoch {run.epoch}; lower the learning "
                                     "rate")
        self.scores = ()
        if features is not None:
            self.validate(run.epoch, features, labels)
            said = f"{describe(self.now, configs)}; best so far {describe(self.best['best'], configs)}; {said}"
        run.end_epoch(log_line(run.epoch, configs, self.scale * self.cosine(), losses, self.scores, self.sweep), {},
                      f"{self.title}: {said}")
        self.losses.zero_()
        run.next_epoch([run.files.best] if self.best["best"] is self.now else [], save=bool(self.scores))

    def validate(self, epoch, features, labels):
        """Note how well the heads do on features [n, F]: `scores`, and the best of now and of all epochs."""
        scores = gather_heads(self.heads.evaluate(features, labels), self.process).tolist()
        self.scores = [(loss, top1, top5 if self.num_classes >= 5 else None) for loss, top1, top5 in scores]
        plain = [i for i, config in enumerate(self.configs) if config.is_plain]
        now = {name: best_head(self.scores, heads, self.configs, epoch)
               for name, heads in (("best", range(len(self.configs))), ("best_sweep_lr_only", plain))}
        self.now = now["best"]
        self._note({name: new if new["top1"] >= self.best[name]["top1"] else self.best[name] for name, new in now.items()})

    def finish(self, protocol, weights, results_dir):
        """Print and record the results, once all epochs are done."""
        if not self.run.is_main:
            return
        metrics = {"best": self.best["best"]} | ({"last": self.now} if self.now else {})
        if not all(config.is_plain for config in self.configs):
            metrics["best_sweep_lr_only"] = self.best["best_sweep_lr_only"]
        for name, record in metrics.items():
            print(f"{self.title}, {name.replace('_', ' ')}: {describe(record, self.configs)}")
        print(f"checkpoints: {self.folder / self.run.files.best} (best), {self.folder / self.run.files.newest}", flush=True)
        append_result(results_dir, protocol, weights, self.key, self.settings, metrics)


def run_probes(args, probes, protocol, backbone, train, val, of_centre_crops, model_fn):
    """Train probes on features of one backbone side by side to their ends, and record them; nothing if they are there.

    of_centre_crops: an `ImageSet` to features [n, sum of F], of all probes side by side, and labels [n], on rank 0.
    model_fn: images [B, 3, S, S] on the device to features [B, sum of F].
    """
    process, total_batch, dims = probes[0].process, probes[0].settings["total_batch"], [probe.dim for probe in probes]
    with ExitStack() as stack:
        runs = [stack.enter_context(probe.prepare(args)) for probe in probes]
        if all(run.epoch >= args.epochs for run in runs):
            return
        backbone.model.to(process.device)
        val_features, val_labels = everywhere(*of_centre_crops(val), (len(val), sum(dims)), process)
        if args.augment:
            data = FeaturesOfCrops(args, backbone, train, total_batch, process, model_fn)
        else:
            kept = everywhere(*of_centre_crops(train), (len(train), sum(dims)), process)
            data = KeptFeatures(*kept, total_batch, args.seed, process.device)
        train_probes(probes, data, val_features.split(dims, dim=1), val_labels, args)
        for probe in probes:
            probe.finish(protocol, args.pretrained_weights, results_folder(args))


def train_probes(probes, data, val_features, val_labels, args):
    """Train and validate probes in one pass over the data. data: `KeptFeatures` or `FeaturesOfCrops`.

    val_features: of each probe, [n, F]. One that was stopped after more updates than others joins when they are there.
    """
    lead = min(probes, key=lambda probe: probe.run.update)
    run, dims = lead.run, [probe.dim for probe in probes]
    with engine.StopSignals() as signals:
        for probe in probes:
            probe.run.signals, probe.run.beside = signals, [other.run for other in probes if other is not probe]
        for epoch in range(run.epoch, args.epochs):
            batches = data.batches(epoch, run.step)
            for it in run.updates():
                features, labels = data.load(run.fetch(batches))
                update = run.update
                for probe, own in zip(probes, features.split(dims, dim=1), strict=True):
                    if probe.run.update == update:
                        probe.step(own, labels)
                if run.is_log_step(it) and it + 1 < run.steps:
                    run.log(note=lead.lowest_loss())
            rate, left = run.speed()
            said = f"{rate:.1f} images/s  eta {engine.eta_string(left)}"
            validated = epoch % args.val_freq == 0 or epoch + 1 == args.epochs
            for probe, own in zip(probes, val_features, strict=True):
                if probe.run.epoch == epoch:
                    probe.end_epoch(own if validated else None, val_labels, said)


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
    engine.add_run_flags(linear)
    parser.set_defaults(print_freq=100)  # steps on kept features are quick, and there is a line at each epoch's end
    return linear


def check_probe(folder, key, args):
    """Raise InputError when `folder` cannot take this probe, or its checkpoint is not there, or for flags of the run."""
    engine.check_numbers(args, count="print_freq", not_negative="seed save_every_steps save_every_minutes")
    last, log = folder / files_of(key).newest, folder / "log.txt"
    engine.check_output(folder, args.load_from, args.overwrite, [last] if last.exists() else [])
    if args.load_from in (None, "auto") and not last.exists() and log.exists() and log.stat().st_size:
        raise engine.InputError(f"--output_dir {folder} already holds {log.name}; which is not of this probe; choose "
                                "another folder")


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
        check_probe(folder, key, args)
    backbones, _ = read_backbones(args)
    train, val = read_sets(args)
    if args.num_labels and args.num_labels < len(train.classes):
        raise engine.InputError(f"--num_labels {args.num_labels}: {train.name} has {len(train.classes)} classes")
    if process.world_size > 1:
        dist.barrier()  # nobody may write before all have looked
    for key, backbone in backbones.items():
        settings = shared_settings(args, backbone, train, val)
        settings |= probe_settings(args, configs, args.batch_size_per_gpu * process.world_size)
        pooling = {"n_last_blocks": args.n_last_blocks, "avgpool_patchtokens": args.avgpool_patchtokens}
        probe = ProbeRun(key, folders[key], configs, feature_dim(backbone.model, **pooling),
                         args.num_labels or len(train.classes), settings, protocol == "linear", process)
        of_centre_crops = partial(frozen_features, backbone, process=process, **pooling, batch_size=args.batch_size_per_gpu,
                                  num_workers=args.num_workers, dump_to=args.dump_features, load_from=args.load_features)
        run_probes(args, [probe], protocol, backbone, train, val, of_centre_crops,
                   partial(pool_features, backbone.model, **pooling))


def probe_settings(args, configs, total_batch):
    """What results.json records of how heads were trained."""
    return {"heads": len(configs), "epochs": args.epochs, "total_batch": total_batch, "augment": args.augment,
            "hflip": args.hflip, "seed": args.seed}
