"""The file of results that all evaluations of a run share."""
import json
import os
import time
from pathlib import Path

import timm
import torch
import torchvision

import utils


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
