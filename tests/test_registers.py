"""Registers (Darcet et al.): tokens that stand beside [CLS] in every block and come out nowhere."""
from functools import partial

import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer

import engine
import extract_backbone_weights
import main_ibot
import models
import utils
from analysis import common
from evaluation.common import dense
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.features import pool_features
from evaluation.object_detection import detection
from evaluation.semantic_segmentation import segmentation

NANO = partial(models.build_backbone, "vit_nano", patch_size=8, img_size=32)


def nano(registers=3, **kwargs):
    torch.manual_seed(0)
    model = NANO(registers=registers, **kwargs).double().eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def plain(model, x, mask=None):
    """Tokens after every block, [B, 1 + n + N, D] each, from the definition; images of the size of the positions."""
    patches = model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    if mask is not None:
        patches = torch.where(mask.flatten(1)[..., None], model.masked_embed, patches)
    B, n = len(x), model.reg_token.shape[1]
    positions = torch.cat((model.pos_embed[:, :1], torch.zeros(1, n, 96).double(), model.pos_embed[:, 1:]), dim=1)
    x = torch.cat((model.cls_token.expand(B, -1, -1), model.reg_token.expand(B, -1, -1), patches), dim=1) + positions
    outputs = []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def shown(x):
    return torch.cat((x[:, :1], x[:, 4:]), dim=1)


def test_outputs_follow_the_definition():
    """All tokens, taps, attention: without registers, which have no position and are not masked."""
    model = nano(masked_im_modeling=True)
    x, mask = torch.randn(2, 3, 32, 32).double(), torch.rand(2, 4, 4) < 0.5
    with torch.no_grad():
        tokens = plain(model, x, mask)
        torch.testing.assert_close(model(x, mask, return_all_tokens=True), model.norm(shown(tokens[-1])))
        tokens = plain(model, x)
        torch.testing.assert_close(model(x), model.norm(tokens[-1][:, 0]))
        for norm in (model.norm, None):
            taps = model.get_intermediate_layers(x, 2, norm=norm is not None)
            for tap, expected in zip(taps, tokens[-2:], strict=True):
                torch.testing.assert_close(tap, (norm or torch.nn.Identity())(shown(expected)))
        last = model.blocks[-1]
        q, k, _ = last.attn.qkv(last.norm1(tokens[-2])).view(2, 20, 3, 3, 32).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 32 ** 0.5).softmax(-1)
        kept = [0, *range(4, 20)]
        attention = model.get_last_selfattention(x)
        torch.testing.assert_close(attention, weights[:, :, kept][..., kept])
        torch.testing.assert_close(attention.sum(-1), 1 - weights[:, :, kept, 1:4].sum(-1))
        found, output = common.last_block(model, x)
        torch.testing.assert_close(found, attention[:, :, 0, 1:])
        torch.testing.assert_close(output, shown(tokens[-1]))
        model.reg_token[:, 1].normal_()
        assert not torch.allclose(model(x), model.norm(tokens[-1][:, 0]), atol=1e-3)


@pytest.mark.parametrize("wanted", [None, torch.tensor([0, 15, 16, 40]), torch.tensor([3, 47, 48, 51, 52, 55])])
def test_packed_crops_equal_each_size_by_itself(wanted):
    model = nano(masked_im_modeling=True)
    crops, mask = [torch.randn(3, 3, 32, 32).double(), torch.randn(2, 3, 16, 16).double()], torch.rand(3, 4, 4) < 0.5
    one, two = (model(x, m, return_all_tokens=True) for x, m in zip(crops, (mask, None), strict=True))
    expected = torch.cat((one.flatten(0, 1), two.flatten(0, 1)))
    if wanted is not None:  # of the second size behind the 48 of the first
        expected = torch.cat((one[:, 0], two[:, 0], torch.cat((one[:, 1:].flatten(0, 1), two[:, 1:].flatten(0, 1)))[wanted]))
    found, shapes = model.forward_crops(crops, [mask, None], wanted)
    assert shapes == ((3, 17), (2, 5))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert model.reg_token.grad.abs().amax(dim=-1).min() > 0


def test_without_registers_nothing_is_drawn():
    torch.manual_seed(0)
    expected = models.vit_nano().state_dict()
    torch.manual_seed(0)
    found = models.build_backbone("vit_nano", registers=0).state_dict()
    assert found.keys() == expected.keys() and "reg_token" not in found
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert models.vit_nano(registers=4).state_dict()["pos_embed"].shape == (1, 197, 96)


def networks(*words):
    args = main_ibot.get_args_parser().parse_args(
        ["--data_path", ".", "--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--out_dim", "16",
         "--head_hidden_dim", "16", "--shared_head", "true", *map(str, words)])
    return args, *main_ibot.build_networks(args)


@pytest.fixture
def checkpoint(tmp_path):
    """(teacher, file) with three registers that are far from 0, as pre-training writes it."""
    args, student, teacher = networks("--registers", 3)
    for network in (student, teacher):
        network.backbone.reg_token.data.normal_()
    torch.save({"student": engine.Named(student, add="module.").state_dict(), "teacher": teacher.state_dict(), "args": args},
               tmp_path / "c.pth")
    return teacher.backbone.eval(), tmp_path / "c.pth"


def test_teacher_has_the_students_registers():
    _, student, teacher = networks("--registers", 3)
    assert torch.equal(student.backbone.reg_token, teacher.backbone.reg_token) and student.backbone.reg_token.requires_grad
    student.backbone.reg_token.data += 1
    before = teacher.backbone.reg_token.clone()
    utils.ema_update(*utils.ema_pairs(student, teacher), momentum=0.75)
    torch.testing.assert_close(teacher.backbone.reg_token, before + 0.25)
    assert utils.layer_id("backbone.reg_token", [4]) == 0
    assert not utils.is_decayed("backbone.reg_token", before, decay_positions=False) and utils.is_decayed("backbone.reg_token", before)
    with pytest.raises(engine.InputError, match="--registers 2: for a ViT"):
        main_ibot.check_args(main_ibot.get_args_parser().parse_args(["--data_path", ".", "--arch", "swin_tiny", "--registers", "2"]))


@pytest.mark.parametrize("registers, words", [
    (0, "1 unexpected: backbone.reg_token"), (2, r"1 of another shape: backbone.reg_token \(1, 3, 96\) instead of \(1, 2, 96\)")])
def test_other_numbers_do_not_load(checkpoint, registers, words):
    _, _, teacher = networks("--registers", registers)
    with pytest.raises(engine.InputError, match=f"^checkpoint a.pth does not fit this network: {words}$"):
        engine.load_strictly(teacher, engine.load_checkpoint(checkpoint[1])["teacher"], "a.pth")
    with pytest.raises(engine.InputError, match="1 missing: backbone.reg_token$"):
        engine.load_strictly(networks("--registers", 3)[2], networks()[2].state_dict(), "a.pth")


def test_evaluations_find_them_in_the_file(checkpoint, capsys):
    """Features, the four maps of dense tasks, and one line for what does not fit."""
    teacher, path = checkpoint
    found = load_evaluated_backbone(path, "teacher")
    assert "patch 8, 3 registers" in capsys.readouterr().out
    x = torch.randn(2, 3, 32, 32)
    for mode in range(3):
        assert torch.equal(pool_features(found.model, x, 2, mode), pool_features(teacher, x, 2, mode))
    assert torch.equal(pool_features(found.model, x), teacher(x))

    maps = dense.DenseBackbone(found.model, pyramid=False).eval()(x)
    expected = teacher.get_intermediate_layers(x, range(4))
    for own, tokens in zip(maps, expected, strict=True):
        torch.testing.assert_close(own.flatten(2).transpose(1, 2), tokens[:, 1:])

    content = engine.load_checkpoint(path)
    for token, words in ((torch.zeros(1, 3, 95), r"reg_token \(1, 3, 95\) instead of \(1, 3, 96\)"), (torch.zeros(3), "unexpected: reg_token"),
                         (torch.zeros(1, 10**6, 1), r"reg_token \(1, 1000000, 1\) instead of \(1, 4096, 96\)")):
        content["teacher"]["backbone.reg_token"] = token
        with pytest.raises(engine.InputError, match=words):
            load_evaluated_backbone(path, "teacher", checkpoint=content)


def test_extracted_weights_are_timms(checkpoint, tmp_path):
    """timm adds no position to [CLS] there; its file is read again, and extracted again, as what it is."""
    teacher, path = checkpoint
    state = extract_backbone_weights.extract(engine.load_checkpoint(path), "teacher", path, timm_format=True)
    model = VisionTransformer(img_size=224, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=0, reg_tokens=3,
                              no_embed_class=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(x)  # [B, 1 + n + N, D]
        torch.testing.assert_close(shown(tokens), teacher(x, return_all_tokens=True), atol=1e-5, rtol=1e-5)
        safetensors.torch.save_file(state, tmp_path / "timm.safetensors")
        again = load_evaluated_backbone(tmp_path / "timm.safetensors", "teacher", "vit_nano", 8).model
        torch.testing.assert_close(again(x), teacher(x), atol=1e-5, rtol=1e-5)
        larger = torch.randn(2, 3, 48, 40)
        torch.testing.assert_close(again(larger), teacher(larger), atol=1e-5, rtol=1e-5)
    twice = extract_backbone_weights.extract(engine.load_checkpoint(tmp_path / "timm.safetensors"), "teacher", path, timm_format=True)
    assert all(torch.equal(twice[name], value) for name, value in state.items())


def test_dense_networks_are_built_again_with_them(checkpoint, tmp_path):
    """Detectors and segmentation networks from their own checkpoints."""
    content, path = engine.load_checkpoint(checkpoint[1]), ["--pretrained_weights", str(checkpoint[1]), "--data_path", "."]
    args = detection.training_parser("").parse_args([*path, "--grid", "4", "4", "--channels", "16", "--hidden", "16"])
    args, detector, _, network = detection.new_detector(args, content, 3)
    entries = {"settings": {}, "source": {"checkpoint": "a", "key": "teacher"}, "epoch": 1, "args": args}
    torch.save({"model": detector.state_dict(), "network": network, "categories": {"ids": [1, 3, 90], "names": ["a", "b", "c"]}, **entries},
               tmp_path / "detector.pth")
    args = segmentation.training_parser("").parse_args([*path, "--num_classes", "3", "--crop_size", "32", "--width", "16"])
    _, segmenter, _, network, _ = segmentation.new_segmenter(args, "teacher", content)
    torch.save({"model": segmenter.state_dict(), "network": network, **entries}, tmp_path / "segmenter.pth")
    x = torch.randn(1, 3, 32, 32)
    for own, again in ((detector, detection.load_detector(tmp_path / "detector.pth")[0]),
                       (segmenter, segmentation.load_segmenter(tmp_path / "segmenter.pth")[0])):
        with torch.no_grad():
            maps = own.backbone.eval()(x), again.backbone(x)
        assert again.backbone.body.num_reg_tokens == 3 and all(torch.equal(*pair) for pair in zip(*maps, strict=True))
