"""What the tests of the analyses share: a small checkpoint of a network, and running scripts, in this process or in two."""
import argparse
import json
import sys

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

import models
from models.head import iBOTHead


def nano(seed=0, **kwargs):
    """vit_nano for images of 32 pixels and patches of 8, whose tokens differ clearly."""
    torch.manual_seed(seed)
    model = models.build_backbone("vit_nano", patch_size=8, img_size=32, **kwargs).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def write_checkpoint(path, K=24, separate_heads=False):
    """A file as pre-training writes it, of `nano(0)` (teacher) and `nano(1)` (student). Returns the path."""
    networks = {}
    for seed, (name, prefix) in enumerate((("teacher", ""), ("student", "module."))):
        backbone = nano(seed)
        head = iBOTHead(96, K, K, shared_head=not separate_heads, hidden_dim=32, bottleneck_dim=16)
        for parameter in head.mlp.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        states = {"backbone": backbone.state_dict(), "head": head.state_dict()}
        networks[name] = {f"{prefix}{part}.{key}": value for part, state in states.items() for key, value in state.items()}
    args = argparse.Namespace(arch="vit_nano", patch_size=8, global_crops_size=32, seed=0)
    torch.save({**networks, "args": args, "epoch": 1}, path)
    return path


def write_images(folder, classes, per_class, size=(40, 36), seed=0):
    """FOLDER/CLASS/NN.png of bright random blobs; width, height. Returns the folder."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            coarse = rng.integers(60, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{number:02}.png")
    return folder


def run_main(monkeypatch, script, *words):
    """Call the `main` of a script's module with these flags, in this process, on the CPU and without loader workers."""
    flags = [str(word) for word in words]
    for name, value in (("--device", "cpu"), ("--num_workers", "0")):
        if name not in flags:
            flags += [name, value]
    monkeypatch.setattr(sys, "argv", [script.__name__, *flags])
    script.main()


TWO = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import engine
process = engine.init_process("cpu")
engine.init_process = lambda *_: process
for name, words in json.loads(open(sys.argv[2]).read()):
    sys.argv = [name, *words, "--device", "cpu", "--num_workers", "0"]
    importlib.import_module(name).main()
"""


def run_in_two_processes(call, folder, calls):
    """Call the `main` of several scripts, [(module, flags)], one after the other in two processes that are started once."""
    (folder / "two.py").write_text(TWO)
    (folder / "calls.json").write_text(json.dumps([(script.__name__, list(map(str, words))) for script, words in calls]))
    return call(folder / "two.py", ROOT, folder / "calls.json", processes=2)
