"""The file of results that all evaluations of a run share."""
import json
import os
import time
from pathlib import Path

import timm
import torch
import torchvision

import utils


def shared_settings(args, backbone, train, val):
    """Settings that all protocols record: of the network, its features and the data (two `ImageSet`s)."""
    return {"arch": backbone.arch, "patch_size": backbone.patch_size, "window_size": backbone.window_size,
            "image_size": backbone.image_size, "weights_hash": backbone.weights_hash,
            "n_last_blocks": args.n_last_blocks, "avgpool_patchtokens": args.avgpool_patchtokens,
            "dataset": args.dataset, "data_path": train.root, "train_subset": args.train_subset,
            "subset_seed": args.subset_seed, "train_images": len(train), "val_images": len(val)}


def append_result(output_dir, protocol, checkpoint, key, settings, metrics):
    """Append a record to the JSON list OUTPUT_DIR/results.json, replacing the file at once. Call it on rank 0 only.

    `settings` and `metrics` are dictionaries of plain values; accuracies in percent. Raises InputError when the file
    there is no such list.
    """
    path = Path(output_dir) / "results.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records = json.loads(path.read_text()) if path.exists() else []
    except OSError as error:
        raise utils.InputError(f"--output_dir {output_dir}: {error.strerror}") from error
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise utils.InputError(f"{path}: not a JSON list of results; move it away")
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    records.append({"protocol": protocol, "checkpoint": str(checkpoint), "key": key, "settings": settings,
                    "metrics": metrics, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions})
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    os.replace(temporary, path)
