"""Extraction: the written files give timm's own models the features of our backbones; head, keys and bad input."""
import argparse
import runpy
import sys
from functools import partial

import pytest
import safetensors.torch
import timm
import torch

import engine
import extract_backbone_weights
import models
from models.head import iBOTHead
from tests.conftest import ROOT

TIMM_NAMES = {"vit_tiny": "vit_tiny_patch16_224", "swin_tiny": "swin_tiny_patch4_window7_224"}


def build(arch):
    """(student backbone, teacher backbone, checkpoint dictionary as pre-training writes it), all weights random."""
    torch.manual_seed(0)
    student = models.build_backbone(arch, drop_path_rate=0.0, masked_im_modeling=True).eval()
    teacher = models.build_backbone(arch, drop_path_rate=0.0).eval()
    for model in (student, teacher):
        for parameter in model.parameters():  # also biases, norms and masked_embed, so that none can be lost unseen
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    head = iBOTHead(student.embed_dim, 32, patch_out_dim=32, shared_head=True)
    heads = {f"head.{n}": v for n, v in head.state_dict().items()}
    whole = [{f"backbone.{n}": v for n, v in m.state_dict().items()} | heads for m in (student, teacher)]
    return student, teacher, {"student": {f"module.{n}": v for n, v in whole[0].items()}, "teacher": whole[1],
                              "ibot_loss": {"center": torch.zeros(1, 32)}, "args": argparse.Namespace(arch=arch)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{arch: (student, teacher, path of checkpoint.pth)}"""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for arch in TIMM_NAMES:
        student, teacher, checkpoint = build(arch)
        torch.save(checkpoint, folder / f"{arch}.pth")
        made[arch] = student, teacher, folder / f"{arch}.pth"
    return made


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["extract_backbone_weights.py", *map(str, arguments)])
    extract_backbone_weights.main()


def read(path):
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("key", ["student", "teacher"])
@pytest.mark.parametrize("arch", TIMM_NAMES)
def test_timm_model_gives_the_same_features(checkpoints, tmp_path, monkeypatch, arch, key, ending):
    student, teacher, path = checkpoints[arch]
    output = tmp_path / "new folder" / f"backbone.{ending}"
    run(monkeypatch, path, output, "--checkpoint_key", key, "--format", "timm")
    model = timm.create_model(TIMM_NAMES[arch], num_classes=0, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    model.load_state_dict(read(output), strict=True)
    plain = timm.create_model(TIMM_NAMES[arch], num_classes=0).eval()  # its Swin has eps 1e-5
    plain.load_state_dict(read(output), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = (student if key == "student" else teacher)(images)
        assert (model(images) - expected).abs().max() < 1e-5
        assert (plain(images) - expected).abs().max() < (1e-4 if arch == "swin_tiny" else 1e-5)
    assert [file.name for file in output.parent.iterdir()] == [output.name]  # no temporary file is left


@pytest.mark.parametrize("arch", TIMM_NAMES)
def test_ibot_format_has_bare_names_and_the_very_tensors(checkpoints, tmp_path, monkeypatch, arch):
    student, teacher, path = checkpoints[arch]
    for key, model in (("student", student), ("teacher", teacher)):
        run(monkeypatch, path, tmp_path / "a.pth", "--checkpoint_key", key)
        written = read(tmp_path / "a.pth")
        assert list(written) == ["state_dict"]
        assert written["state_dict"].keys() == model.state_dict().keys()
        assert all(torch.equal(written["state_dict"][name], value) for name, value in model.state_dict().items())
    # Bare names are copied: from the file just written (default key), and from a flat file.
    run(monkeypatch, tmp_path / "a.pth", tmp_path / "b.safetensors")
    run(monkeypatch, tmp_path / "b.safetensors", tmp_path / "c.pth")
    copied = read(tmp_path / "c.pth")["state_dict"]
    assert all(torch.equal(copied[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("key", ["student", "teacher"])
def test_head_is_kept_on_request(checkpoints, tmp_path, monkeypatch, key, ending):
    path = checkpoints["vit_tiny"][2]
    entry = torch.load(path, weights_only=False)[key]
    run(monkeypatch, path, tmp_path / f"a.{ending}", "--checkpoint_key", key, "--with_head", "true")
    written = read(tmp_path / f"a.{ending}")
    written = written["state_dict"] if ending == "pth" else written
    expected = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in entry.items()}
    assert "head.last_layer2.weight_v" in expected and "head.mlp.0.weight" in expected
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("arguments, words", [
    (("{checkpoint}", "{tmp}/a.pth"), ["state_dict", "student", "teacher"]),  # the default key is not there
    (("{checkpoint}", "{tmp}/a.pth", "--checkpoint_key", "ibot_loss"), ["ibot_loss", "no backbone"]),
    (("{checkpoint}", "{tmp}/a.bin", "--checkpoint_key", "teacher"), [".pth", ".safetensors"]),
    (("{checkpoint}", "{checkpoint}", "--checkpoint_key", "teacher"), ["itself"]),
    (("{checkpoint}", "{checkpoint}/a.pth", "--checkpoint_key", "teacher"), ["a.pth", "folder"]),
    (("{tmp}/none.pth", "{tmp}/a.pth"), ["none.pth"]),
    (("{checkpoint}", "{tmp}/a.pth", "--format", "timm", "--with_head", "true"), ["--with_head"]),
])
def test_bad_input_is_one_line(checkpoints, tmp_path, monkeypatch, arguments, words):
    filled = [text.format(checkpoint=checkpoints["vit_tiny"][2], tmp=tmp_path) for text in arguments]
    with pytest.raises(engine.InputError) as caught:
        run(monkeypatch, *filled)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "a.pth").exists()


def test_the_reference_s_script_for_fine_tuning(checkpoints, tmp_path, monkeypatch):
    """Its file name still works and writes names and tensors without a level above them."""
    student, _, path = checkpoints["vit_tiny"]
    script = ROOT / "evaluation/classification_layer_decay/extract_backbone_weights.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(path), str(tmp_path / "flat.pth"), "--checkpoint_key", "student"])
    runpy.run_path(str(script), run_name="__main__")
    state = read(tmp_path / "flat.pth")
    assert state.keys() == student.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())
    engine.load_backbone(student, engine.backbone_state_dict(state, "model|module", "flat.pth"), "flat.pth")  # fine-tuning reads it
