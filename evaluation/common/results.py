"""The file of results that all evaluations of a run share."""
import json
import os
import time
import uuid
from pathlib import Path

import timm
import torch
import torchvision

import engine

RECORD = {"protocol": str, "checkpoint": str, "key": str, "settings": dict, "metrics": dict, "time": str, "versions": dict}


def shared_settings(args, backbone, train, val):
    """Settings that all protocols record: of the network, its features and the data (two `ImageSet`s)."""
    return {"arch": backbone.arch, "patch_size": backbone.patch_size, "window_size": backbone.window_size,
            "image_size": backbone.image_size, "weights_hash": backbone.weights_hash,
            "n_last_blocks": args.n_last_blocks, "avgpool_patchtokens": args.avgpool_patchtokens,
            "dataset": args.dataset, "data_path": train.root, "train_subset": args.train_subset,
            "subset_seed": args.subset_seed, "train_images": len(train), "val_images": len(val),
            **backbone.pixel_stats.as_settings(), **backbone.pretraining}


def read_results(output_dir):
    """The records in OUTPUT_DIR/results.json, oldest first: a list of dictionaries; empty if there is no such file.

    Raises InputError for a file that cannot be read or holds something else.
    """
    path = Path(output_dir) / "results.json"
    try:
        if not path.exists():
            return []
        records = json.loads(path.read_bytes())
        json.dumps(records, indent=1)  # nested too deep to be written again?
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        reason = engine.printable(str(error) or type(error).__name__, 100)
        raise engine.InputError(f"{path}: damaged, no JSON list of results ({reason}); move it away") from error
    if not isinstance(records, list):
        raise engine.InputError(f"{path}: damaged, it holds a {type(records).__name__}, no list of results; move it away")
    for number, record in enumerate(records, 1):
        record = record if isinstance(record, dict) else {}
        lacking = [name for name, kind in RECORD.items() if not isinstance(record.get(name), kind)]
        if lacking:
            raise engine.InputError(f"{path}: damaged, its entry {number} lacks {', '.join(lacking)}; move it away")
    return records


def results_folder(args):
    """Folder of results.json for the flags of `evaluation_parser`; None: nothing is recorded."""
    return args.results_dir or args.output_dir


def append_result(output_dir, protocol, checkpoint, key, settings, metrics):
    """Append a record to the JSON list OUTPUT_DIR/results.json, replacing the file at once. Call it on rank 0 only.

    Evaluations on several nodes may do so at the same time. `settings` and `metrics` are dictionaries of plain values;
    accuracies in percent. Raises InputError when the file there is no such list, or cannot be written.
    """
    path = Path(output_dir) / "results.json"
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with engine.locked(path.with_name(f".{path.name}.lock")) as no_locks:
            if no_locks:
                engine.say_once(f"warning: {path}: no locks here ({no_locks}); evaluations that end at the same moment may "
                               "lose a record")
            records = read_results(output_dir)
            records.append({"protocol": protocol, "checkpoint": str(checkpoint), "key": key, "settings": settings,
                            "metrics": metrics, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions})
            temporary = path.with_name(f".{path.name}.tmp{uuid.uuid4().hex[:8]}")
            try:
                temporary.write_text(json.dumps(records, indent=1) + "\n")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be written ({error.strerror})") from error
