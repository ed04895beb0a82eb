"""Extraction: the written files give models of timm, of transformers and of ONNX the features of ours; head, bad input."""
import argparse
import json
import runpy
import sys
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from analysis_data import nano
from PIL import Image

import engine
import extract_backbone_weights
import models
from evaluation.common.data import eval_transform
from images import IMAGENET, PixelStats
from models import export
from models.head import iBOTHead
from models.swin_transformer import SwinTransformer
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
    (("{checkpoint}", "{tmp}/a.pth", "--format", "onnx"), ["a.pth", ".onnx"]),
    (("{checkpoint}", "{tmp}", "--format", "hf"), ["there already", "new folder"]),
    (("{checkpoint}", "{checkpoint}/a", "--checkpoint_key", "teacher", "--format", "hf"), ["/a", "folder"]),
    (("{checkpoint}", "{tmp}/a", "--checkpoint_key", "teacher", "--format", "hf", "--image_size", "40"), ["--image_size 40"]),
    (("{swin}", "{tmp}/a", "--checkpoint_key", "teacher", "--format", "hf", "--image_size", "256"), ["256", "not supported"]),
])
def test_bad_input_is_one_line(checkpoints, tmp_path, monkeypatch, arguments, words):
    names = {"checkpoint": checkpoints["vit_tiny"][2], "swin": checkpoints["swin_tiny"][2], "tmp": tmp_path}
    filled = [text.format_map(names) for text in arguments]
    with pytest.raises(engine.InputError) as caught:
        run(monkeypatch, *filled)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


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


# ---------------------------------------------------------------- transformers

def plain_vit(state, config, images):
    """A ViT written out, with the names of transformers: normed tokens [B, 1 + N, D]."""
    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], config["layer_norm_eps"])

    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(images, state[f"{patches}.weight"], state[f"{patches}.bias"], stride=config["patch_size"])
    x = torch.cat((state["embeddings.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT), dim=1)
    x = x + state["embeddings.position_embeddings"]
    heads, (B, T, D) = config["num_attention_heads"], x.shape
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        z = norm(f"{layer}.layernorm_before", x)
        q, k, v = (linear(f"{layer}.attention.attention.{name}", z).view(B, T, heads, -1).transpose(1, 2)
                   for name in ("query", "key", "value"))
        z = (q @ k.mT / (D // heads) ** 0.5).softmax(dim=-1) @ v
        x = x + linear(f"{layer}.attention.output.dense", z.transpose(1, 2).flatten(2))
        z = F.gelu(linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x)))
        x = x + linear(f"{layer}.output.dense", z)
    return norm("layernorm", x)


@torch.inference_mode()
def test_the_folder_for_transformers_holds_a_plain_vit(tmp_path, monkeypatch):
    """Trained on crops of 48 pixels with positions for 32, and with pixel statistics of its own."""
    settings = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 48, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]}
    model = nano()
    torch.save({"teacher": model.state_dict(), "args": argparse.Namespace(**settings)}, tmp_path / "c.pth")
    run(monkeypatch, tmp_path / "c.pth", tmp_path / "new/hf", "--checkpoint_key", "teacher", "--format", "hf")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hf"]  # no temporary folder is left
    config, preprocessor = (json.loads((tmp_path / "new/hf" / name).read_text())
                            for name in ("config.json", "preprocessor_config.json"))
    images = torch.randn(3, 3, 48, 48)
    found = plain_vit(read(tmp_path / "new/hf/model.safetensors"), config, images)
    torch.testing.assert_close(found, model(images, return_all_tokens=True), atol=1e-5, rtol=0)
    assert config["image_size"] == preprocessor["crop_size"]["width"] == 48
    assert [preprocessor[f"image_{name}"] for name in ("mean", "std")] == [settings["mean"], settings["std"]]


@pytest.mark.parametrize("arch", TIMM_NAMES)
def test_transformers_loads_the_folder(checkpoints, tmp_path, monkeypatch, arch):
    transformers = pytest.importorskip("transformers")
    teacher, path = checkpoints[arch][1:]
    run(monkeypatch, path, tmp_path / "hf", "--checkpoint_key", "teacher", "--format", "hf")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        found, expected = model.eval()(images), teacher(images, return_all_tokens=True)
    tokens = expected if arch == "vit_tiny" else expected[:, 1:]
    assert (found.last_hidden_state - tokens).abs().max() < 1e-5
    assert (found.pooler_output - expected[:, 0]).abs().max() < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    image = Image.effect_noise((340, 272), 60).convert("RGB")
    off = processor(image, return_tensors="pt")["pixel_values"][0] - eval_transform(224)(image)
    assert off.abs().max() < 1.1 / 255 / 0.224  # a grey level: both resize in whole ones


@torch.inference_mode()
def test_transformers_gives_the_tokens_of_a_network_with_registers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = nano()
    model.reg_token = torch.nn.Parameter(torch.randn(1, 3, 96))
    config, state = export.hf_model(model, "vit_nano", 32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors",
                                metadata={"format": "pt"})
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info
    images = torch.randn(2, 3, 32, 32)
    x = torch.cat((model.cls_token.expand(2, -1, -1), model.patch_embed.proj(images).flatten(2).mT), dim=1) + model.pos_embed
    x = torch.cat((x[:, :1], model.reg_token.expand(2, -1, -1), x[:, 1:]), dim=1)  # registers have no position
    expected, found = model.norm(model.blocks(x)), loaded.eval()(images)
    assert (found.last_hidden_state - expected).abs().max() < 1e-5
    assert (found.pooler_output - expected[:, 0]).abs().max() < 1e-5


# ---------------------------------------------------------------- ONNX

NETWORKS = {"vit": (nano, 32), "swin": (lambda: SwinTransformer(embed_dim=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2)), 64)}


def test_any_number_of_images_can_be_exported():
    """What `write_onnx` needs of a ViT, without ONNX."""
    model, images = export.TokenOutputs(nano()).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("kind", NETWORKS)
def test_onnx_gives_the_same_tokens(tmp_path, kind):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    build, size = NETWORKS[kind]
    torch.manual_seed(0)
    model = build().eval()
    export.write_onnx(model, size, PixelStats(std=(0.5, 0.25, 0.125)), tmp_path / "a.onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    meta = session.get_modelmeta().custom_metadata_map
    assert meta == {"mean": "0.485 0.456 0.406", "std": "0.5 0.25 0.125", "image_size": str(size)}
    for B in (1, 5):
        images = torch.randn(B, 3, size, size)
        found = session.run(["cls", "patches"], {"images": images.numpy()})
        with torch.inference_mode():
            tokens = model(images, return_all_tokens=True)
        for part, expected in zip(found, (tokens[:, 0], tokens[:, 1:]), strict=True):
            assert (torch.from_numpy(part) - expected).abs().max() < 1e-4


def test_onnx_is_asked_for_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(engine.InputError, match="pip install onnx onnxscript"):
        export.write_onnx(nano(), 32, IMAGENET, tmp_path / "a.onnx")


def test_a_full_disk_leaves_nothing(checkpoints, tmp_path, monkeypatch, file_limit):
    file_limit(10_000)
    for output in ("hf", "a.safetensors"):
        with pytest.raises(engine.InputError, match="cannot be written"):
            run(monkeypatch, checkpoints["vit_tiny"][2], tmp_path / output, "--checkpoint_key", "teacher", "--format",
                "hf" if output == "hf" else "ibot")
    assert not list(tmp_path.iterdir())
