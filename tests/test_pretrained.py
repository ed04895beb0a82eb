"""--init_from: every kind of file gives the features it holds, positions are resampled, heads are taken where they fit."""
import argparse
import os
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from test_main import parse, train
from torch import multiprocessing

import engine
import main_ibot
import models
from extract_backbone_weights import timm_state_dict
from images import IMAGENET
from models import pretrained
from models.head import iBOTHead
from models.vision_transformer import resample_positions

HEAD = {"out_dim": 64, "patch_out_dim": 64, "hidden_dim": 48}
FLAGS = ["--patch_size", 16, "--head_hidden_dim", 48]


def shaken(module, seed=0):
    """Every parameter moved, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def source():
    """(backbone of patches of 16 pixels, head with a last layer for each output)"""
    return shaken(models.vit_nano(masked_im_modeling=True)), shaken(iBOTHead(96, **HEAD), seed=1)


def named(module, prefix):
    return {prefix + name: value for name, value in module.state_dict().items()}


def write(kind, folder, backbone, head):
    """A file of that kind; its path."""
    bare = {name: value for name, value in backbone.state_dict().items() if name != "masked_embed"}
    plain = {f"backbone.{name}": value for name, value in bare.items()}
    whole = plain | named(head, "head.")
    other = {name: value + 1 for name, value in whole.items()}  # what must not be taken
    ours = {"teacher": whole, "student": {f"module.{n}": v for n, v in other.items()}, "optimizer": {}, "epoch": 3,
            "args": argparse.Namespace(arch="vit_nano", lr=0.1)}
    dino = {name: value for name, value in whole.items() if "last_layer2" not in name}
    content = {
        "ours": ours,
        "reference": {**ours, "teacher": {f"module.{name}": value for name, value in whole.items()}},
        "student": {**ours, "student": named(backbone, "module.backbone.") | named(head, "module.head."), "teacher": other},
        "dino": {"teacher": dino, "student": {f"module.{n}": v + 1 for n, v in dino.items()},
                 "dino_loss": {"center": torch.ones(1, 64)}, "args": argparse.Namespace(arch="vit_small")},
        "backbone": bare,
        "extracted": {"state_dict": bare}, "safetensors": bare}[kind]
    path = folder / f"{kind}.{'safetensors' if kind == 'safetensors' else 'pth'}"
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(content, path)
    return path


def start(path, *words):
    """(student, teacher, lines) of `pretrained.start`."""
    args = parse(*FLAGS, "--init_from", path, *words)
    torch.manual_seed(5)
    student, teacher = main_ibot.build_networks(args)
    lines = pretrained.start(args, student, teacher, IMAGENET)
    students = dict(student.named_parameters(remove_duplicate=False))
    assert all(torch.equal(p, students[name]) for name, p in teacher.named_parameters())
    return student.eval(), teacher.eval(), lines


@pytest.mark.parametrize("kind", ["ours", "reference", "student", "dino", "backbone", "extracted", "safetensors"])
def test_features_are_those_of_the_file(source, tmp_path, kind):
    backbone, head = source
    words = ["--init_key", "student"] if kind == "student" else []
    student, teacher, lines = start(write(kind, tmp_path, *source), *words)
    for size in (224, 96):
        x = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            expected = backbone(x, return_all_tokens=True)
            assert torch.equal(teacher.backbone(x, return_all_tokens=True), expected)
            assert torch.equal(student.backbone(x, return_all_tokens=True), expected)
    assert torch.equal(student.backbone.masked_embed, backbone.masked_embed) == (kind == "student")
    assert (lines[1] == "  backbone: 54 tensors taken; masked_embed is new") == (kind != "student")
    own, taken = head.state_dict(), {"dino": ("mlp.", "last_layer.")}.get(kind, ("mlp.", "last_layer.", "last_layer2."))
    if kind in ("backbone", "extracted", "safetensors"):
        taken = ()
    for name, value in student.head.state_dict().items():
        assert torch.equal(value, own[name]) == name.startswith(taken), name
    assert sum(line.endswith(": taken") for line in lines) == len(taken)
    assert sum("new, the file has none" in line for line in lines) == 3 - len(taken)


def timm_vit(**kwargs):
    return timm.models.VisionTransformer(patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=10, **kwargs)


@pytest.mark.parametrize("arch", ["vit_nano", "swin_tiny"])
def test_timm_s_features(tmp_path, arch):
    torch.manual_seed(1)
    model = timm_vit().eval() if arch == "vit_nano" else timm.create_model(
        "swin_tiny_patch4_window7_224", norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    _, teacher, lines = start(tmp_path / "timm.pth", "--arch", arch)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features = model.forward_features(x).flatten(1, -2)
        assert (teacher.backbone(x, return_all_tokens=True)[:, -features.shape[1]:] - features).abs().max() < 1e-5
    taken = timm_state_dict(teacher.backbone.state_dict())  # the very tensors
    assert all(torch.equal(taken.pop(name), v) for name, v in model.state_dict().items() if not name.startswith("head."))
    assert not taken
    assert "new, the file has none" in lines[2]  # a classifier is no projection head


@pytest.mark.parametrize("grid", [(24, 24), (10, 20)])
def test_positions_of_another_grid_are_resampled(tmp_path, grid):
    model = shaken(timm_vit(img_size=(16 * grid[0], 16 * grid[1])))
    torch.save({"model": model.state_dict()}, tmp_path / "timm.pth")
    words = ["--init_grid", *grid] if grid[0] != grid[1] else []
    _, teacher, lines = start(tmp_path / "timm.pth", *words)
    assert f"positions resampled from {grid[0]} x {grid[1]} to 14 x 14" in lines[1]
    expected = resample_positions(model.pos_embed, 14, 14, grid)
    assert torch.equal(teacher.backbone.pos_embed, expected) and expected.shape == (1, 197, 96)
    plain = models.vit_nano().eval()
    plain.load_state_dict({**{n: v for n, v in model.state_dict().items() if not n.startswith("head")}, "pos_embed": expected})
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(teacher.backbone(x, return_all_tokens=True), plain(x, return_all_tokens=True))


def test_registers(source, tmp_path):
    """They may be new; those of timm come with a position for the class token."""
    student, _, lines = start(write("extracted", tmp_path, *source), "--registers", 2)
    assert "reg_token is new" in lines[1] and student.backbone.reg_token.any()
    model = shaken(timm_vit(reg_tokens=2, no_embed_class=True))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    _, teacher, lines = start(tmp_path / "timm.pth", "--registers", 2)
    assert ", 2 registers" in lines[0] and "reg_token" not in lines[1]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        difference = teacher.backbone(x, return_all_tokens=True)[:, 1:] - model.forward_features(x)[:, 3:]
    assert difference.abs().max() < 1e-4
    with pytest.raises(engine.InputError, match="2 registers; the network is .* of 16 pixels: see .*--registers"):
        start(tmp_path / "timm.pth")


@pytest.mark.parametrize("words, expected", [
    ([], {"mlp": "taken", "last_layer": "taken", "last_layer2": "taken"}),
    (["--shared_head", "true"], {"mlp": "taken", "last_layer": "taken"}),
    (["--out_dim", 32, "--shared_head", "true"], {"mlp": "taken", "last_layer": "new, because K 64 is not 32"}),
    (["--head_hidden_dim", 32, "--shared_head", "true"],
     {"mlp": "new, because 0.weight (48, 96) is not (32, 96)", "last_layer": "new, as the MLP below it is"}),
    (["--head_sharing", "mlp2"],
     {"mlp": "taken", "mlp_patch": "new, the file has none", "last_layer": "taken", "last_layer2": "new, as the MLP below it is"}),
    (["--norm_in_head", "bn", "--shared_head", "true"],
     {"mlp": "new, because 4.weight (256, 48) is not (48,)", "last_layer": "new, as the MLP below it is"}),
])
def test_heads_are_taken_where_they_fit(source, tmp_path, words, expected):
    student, teacher, lines = start(write("ours", tmp_path, *source), *words)
    assert lines[2:] == [f"  head.{name}: {what}" for name, what in expected.items()]
    if set(expected.values()) == {"taken"}:
        z = torch.randn(3, 96)
        assert torch.equal(teacher.head(z), source[1](z)) and torch.equal(student.head(z), source[1](z))


@pytest.mark.parametrize("kind, words, expected", [
    (None, [], ["none.pth", "no such file"]),
    ("ours", ["--init_key", "momentum"], ["ours.pth", "'momentum'", "teacher"]),
    ("ours", ["--arch", "vit_tiny"], ["ours.pth", "a ViT of width 96 with 4 blocks", "a ViT of width 192 with 12", "--arch"]),
    ("ours", ["--patch_size", 8], ["ours.pth", "patches of 16 pixels", "patches of 8 pixels", "--patch_size"]),
    ("ours", ["--arch", "swin_tiny", "--global_crops_size", 64], ["a ViT of width 96", "a Swin of width 96", "windows of 7"]),
    ("backbone", ["--init_grid", 7, 7], ["--init_grid 7 7", "backbone.pth", "196"]),
    ("head", [], ["head.pth", "no backbone"]),
    ("lacking", [], ["lacking.pth", "1 missing: norm.weight", "1 unexpected: gamma"]),
])
def test_mistakes_end_in_one_line(source, digits, tmp_path, kind, words, expected):
    """Through the whole of main_ibot.py: nothing is written."""
    path = tmp_path / f"{kind or 'none'}.pth"
    if kind == "head":
        torch.save({"teacher": named(source[1], "head.")}, path)
    elif kind == "lacking":
        torch.save({name: value for name, value in source[0].state_dict().items() if name != "norm.weight"}
                   | {"gamma": torch.zeros(1)}, path)
    elif kind:
        path = write(kind, tmp_path, *source)
    with pytest.raises(engine.InputError) as caught:
        train(*FLAGS, "--data_path", digits / "train", "--output_dir", tmp_path / "run", "--init_from", path, *words)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in expected), message
    assert not (tmp_path / "run").exists()


def test_a_frozen_backbone_stays_and_a_resumed_run_does_not_read_the_file(source, digits, tmp_path, capsys):
    path = write("extracted", tmp_path, *source)
    flags = [*FLAGS, "--data_path", digits / "train", "--epochs", 3, "--shared_head", "true", "--freeze_backbone_epochs", 2,
             "--init_from", path, "--batch_size_per_gpu", 40, "--freeze_last_layer", 0, "--load_from", "auto"]
    train(*flags, "--output_dir", tmp_path / "whole", "--saveckp_freq", 1)
    assert f"started from {path}, its state_dict: a ViT of width 96" in capsys.readouterr().out
    then, last = (engine.load_checkpoint(tmp_path / "whole" / f"checkpoint{n}.pth") for n in ("0001", ""))
    for key, prefix in (("student", "module."), ("teacher", "")):
        same = {name: torch.equal(then[key][f"{prefix}backbone.{name}"], value)
                for name, value in source[0].state_dict().items() if name != "masked_embed"}
        assert all(same.values()) and len(same) == 54
        assert not torch.equal(last[key][f"{prefix}backbone.norm.weight"], source[0].norm.weight)
    assert not then["student"]["module.backbone.masked_embed"].any() and last["student"]["module.backbone.masked_embed"].any()
    for name in ("head.mlp.0.weight", "head.last_layer.weight_v"):  # these warm meanwhile
        assert not torch.equal(then["student"][f"module.{name}"], last["student"][f"module.{name}"])
        assert not torch.equal(then["student"][f"module.{name}"], then["teacher"][name])

    path.unlink()
    (tmp_path / "part").mkdir()
    (tmp_path / "part/checkpoint.pth").write_bytes((tmp_path / "whole/checkpoint0001.pth").read_bytes())
    train(*flags, "--output_dir", tmp_path / "part")
    said = capsys.readouterr().out
    assert "resumed from" in said and "started from" not in said
    part = engine.load_checkpoint(tmp_path / "part/checkpoint.pth")
    assert all(torch.equal(part[key][name], value) for key in ("student", "teacher") for name, value in last[key].items())


def of_two(rank, words):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    train(*words)


def test_two_processes_start_alike(source, digits, tmp_path):
    """A backbone without updates is no unused parameter of data parallelism."""
    path = write("dino", tmp_path, *source)
    words = [*FLAGS, "--data_path", digits / "train", "--epochs", 1, "--init_from", path, "--freeze_backbone_epochs", 1,
             "--output_dir", tmp_path / "run", "--dist_url", f"file://{tmp_path}/rendezvous"]
    multiprocessing.start_processes(of_two, (words,), nprocs=2, start_method="fork")  # nothing is imported again
    last = engine.load_checkpoint(tmp_path / "run/checkpoint.pth")
    assert all(torch.equal(last["student"][f"module.backbone.{name}"], value)
               for name, value in source[0].state_dict().items() if name != "masked_embed")
    assert not torch.equal(last["student"]["module.head.mlp.0.weight"], source[1].mlp[0].weight)
