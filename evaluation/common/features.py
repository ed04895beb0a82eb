"""Features of images: what is taken from the backbone, and their extraction over all processes.

Letters: B images of a batch, N patch tokens, D width, F feature size, n images of the data set, W processes.
"""
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

import engine
from evaluation.common.data import eval_transform
from models.swin_transformer import SwinTransformer

FEATURES_VERSION = 1  # raise it when the same weights and images would give other features: kept ones are then not used


def feature_dim(model, n_last_blocks=1, avgpool_patchtokens=0):
    """F of `pool_features`. Raises InputError for a combination that the backbone does not have."""
    if isinstance(model, SwinTransformer):
        if avgpool_patchtokens:
            raise engine.InputError(f"--avgpool_patchtokens {avgpool_patchtokens}: a Swin has mode 0 only")
        widths = [block.dim for stage in model.layers for block in stage.blocks]
    else:
        widths = [model.embed_dim] * len(model.blocks)
    if n_last_blocks > len(widths):
        raise engine.InputError(f"--n_last_blocks {n_last_blocks}: the backbone has {len(widths)} blocks")
    taps = widths[-n_last_blocks:]
    return (sum(taps), widths[-1], sum(taps) + widths[-1])[avgpool_patchtokens]


def pool_features(model, images, n_last_blocks=1, avgpool_patchtokens=0):
    """Features [B, F] of images [B, 3, H, W]; `avgpool_patchtokens` is the pooling mode.

    0: the [CLS] tokens of the last blocks, after the final norm, shallow to deep (Swin: the mean tokens).
    1: the mean patch token of the last block alone, *before* the final norm; `n_last_blocks` has no effect.
    2: as 0, followed by the mean patch token of the last block after the norm.
    """
    if avgpool_patchtokens == 1:
        return model.get_intermediate_layers(images, 1, norm=False)[-1][:, 1:].mean(dim=1)
    taps = model.get_intermediate_layers(images, n_last_blocks)  # n tensors [B, 1 + N, D]
    parts = [tokens[:, 0] for tokens in taps]
    if avgpool_patchtokens == 2:
        parts.append(taps[-1][:, 1:].mean(dim=1))
    return torch.cat(parts, dim=-1)


def sharded_loader(dataset, batch_size, num_workers, process, **options):
    """Unshuffled batches of this process's share of `dataset`; shares are padded by repetition to equal length.

    `options` go to the DataLoader.
    """
    sampler = DistributedSampler(dataset, num_replicas=process.world_size, rank=process.rank, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers,
                      pin_memory=process.device.type == "cuda", **options)


def extract_features(model_fn, loader, process, name="images", quiet=False):
    """Features and labels of a whole data set, in its order, as CPU tensors on rank 0: ([n, F] float32, [n] int64).

    Args:
        model_fn: images [B, 3, H, W] on `process.device` to features [B, F].
        loader: `sharded_loader` of a data set whose items are (image, label, index), or another one whose batches are
            equally many, and at every step equally large, in all processes.
        name: what the progress lines and errors call the data. quiet: without these lines.

    Every batch is gathered and copied to the CPU at once, so that a device never holds more than W batches. Images that
    padding repeats overwrite their own row. Other ranks return (None, None). Raises InputError, on all ranks, for
    features that are not finite.
    """
    n, done = len(loader.dataset), 0
    features = labels = None
    broken = torch.zeros((), device=process.device)
    for step, (images, batch_labels, indices) in enumerate(loader):
        with torch.inference_mode():
            batch = model_fn(images.to(process.device, non_blocking=True)).float().contiguous()
            broken += ~torch.isfinite(batch).all()
            places = torch.stack((indices, batch_labels)).to(process.device)  # [2, B]
            parts = list(zip(_gather(batch, process), _gather(places, process), strict=True))
        if process.rank > 0:
            continue
        if features is None:  # made outside inference mode: heads may be trained on them
            features, labels = torch.empty(n, batch.shape[1]), torch.empty(n, dtype=torch.int64)
        for rows, place in parts:
            index, label = place.cpu()
            features[index], labels[index] = rows.cpu(), label
        done = min(done + len(batch) * process.world_size, n)
        if not quiet and ((step + 1) % 50 == 0 or step + 1 == len(loader)):
            print(f"features of {name}: {done}/{n}", flush=True)
    if process.world_size > 1:
        dist.all_reduce(broken)
    if broken:
        raise engine.InputError(f"features of {name} are not finite: the weights hold NaN or overflow")
    return features, labels


def frozen_features(backbone, images, process, n_last_blocks=1, avgpool_patchtokens=0, batch_size=128, num_workers=10,
                    dump_to=None, load_from=None):
    """Features and labels of the `ImageSet` `images` through `eval_transform`, whatever its own transform is.

    Args:
        backbone: an `EvaluatedBackbone`; its model is moved to `process.device` if images have to be looked at.
        dump_to, load_from: None, or folders (they may be the same one). Features kept in `load_from` are used if they
            were made with these weights, images and settings; if not, a line says what differs and they are made anew.
            Features made anew are kept in `dump_to`.

    Returns ([n, F] float32, [n] int64) on the CPU on rank 0, in the order of `images`; (None, None) elsewhere. All
    processes call it together. Raises InputError as `extract_features`, and for folders that cannot be used.
    """
    key = {"version": FEATURES_VERSION, "weights": backbone.weights_hash, "images": None, "count": len(images),
           "arch": backbone.arch, "patch size": backbone.patch_size, "window size": backbone.window_size,
           "image size": backbone.image_size, "pixel statistics": str(backbone.pixel_stats),
           "n_last_blocks": n_last_blocks, "avgpool_patchtokens": avgpool_patchtokens}
    main = process.rank == 0
    name = f"{images.name} {backbone.key} n{n_last_blocks} avgpool{avgpool_patchtokens}.pth"
    name = name.replace(os.sep, "-").replace(" ", "_")
    kept = None
    if main and (dump_to or load_from):
        key["images"] = images.fingerprint()
        if load_from:
            kept, reason = _load_features(Path(load_from) / name, key)
            print(f"features of {images.name}: {reason}", flush=True)
    found = torch.tensor(kept is not None, dtype=torch.uint8, device=process.device)
    if process.world_size > 1:
        dist.broadcast(found, 0)
    if found:
        return kept if main else (None, None)

    if main and dump_to:
        values = len(images) * feature_dim(backbone.model, n_last_blocks, avgpool_patchtokens)
        _say_size(4 * values + 8 * len(images), images.name, dump_to)
    model = backbone.model.to(process.device)
    cut = images.with_transform(eval_transform(backbone.image_size, backbone.normalize))
    loader = sharded_loader(cut, batch_size, num_workers, process)
    features, labels = extract_features(lambda batch: pool_features(model, batch, n_last_blocks, avgpool_patchtokens),
                                        loader, process, images.name)
    if main and dump_to:
        path = Path(dump_to) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            engine.save_atomically({"key": key, "features": features, "labels": labels}, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
            raise engine.InputError(f"--dump_features {path}: cannot be written ({error})") from error
    return features, labels


def everywhere(features, labels, shape, process):
    """Rank 0's features of `shape` and labels, in every process and on its device if they take half of its free memory."""
    tensors = [features, labels]
    if process.rank > 0:
        tensors = [torch.empty(shape), torch.empty(shape[0], dtype=torch.int64)]
    for rows in (rows for tensor in tensors for rows in tensor.split(2**16) if process.world_size > 1):
        buffer = rows.to(process.device)  # in chunks, by way of the devices
        dist.broadcast(buffer, 0)
        rows.copy_(buffer)
    room = torch.cuda.mem_get_info(process.device)[0] / 2 if process.device.type == "cuda" else 0
    return [tensor.to(process.device) if tensor.nbytes <= room else tensor for tensor in tensors]


def _say_size(size, name, folder):
    """Print how many bytes the features will take. Raises InputError when the disk has not as many."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    what = f"features of {name} take {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
    if size > free:
        raise engine.InputError(f"--dump_features {folder}: {what}")
    print(f"{what} in {folder}", flush=True)


def _load_features(path, key):
    """((features, labels), line to print) of a file of `frozen_features`; (None, line) if it was made with another key."""
    if not path.is_file():
        return None, f"none kept as {path}"
    content = engine.load_checkpoint(path)
    kept = content.get("key")
    if not isinstance(kept, dict) or not {"features", "labels"} <= content.keys():
        raise engine.InputError(f"--load_features: {path} holds no features of this project; move it away")
    differ = [name for name in key if kept.get(name) != key[name]]
    if differ:
        return None, f"those in {path} are not used, they were made with other {', '.join(differ)}"
    return (content["features"], content["labels"]), f"read from {path}"


def _gather(tensor, process):
    """The tensors of all processes, of one shape, in order of rank; an empty list on ranks above 0."""
    if process.world_size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(process.world_size)] if process.rank == 0 else []
    dist.gather(tensor, parts or None)
    return parts
