"""Four feature maps of a checkpoint for dense tasks, their training groups, and drawn scenes."""
import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engine
import models
from evaluation.common import classifier, dense, shapes
from models.swin_transformer import SwinTransformer
from models.vision_transformer import VisionTransformer


def vit(depth=12, patch_size=16, **kwargs):
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=24, depth=depth, num_heads=3, patch_size=patch_size, **kwargs)


def swin():
    torch.manual_seed(0)
    return SwinTransformer(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)


# ---------------------------------------------------------------- maps

def test_taps():
    assert dense.tap_indices(12) == [3, 5, 7, 11] and dense.tap_indices(24) == [7, 11, 15, 23]
    assert dense.tap_indices(4) == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        dense.tap_indices(3)


def test_pyramid():
    backbone = dense.DenseBackbone(vit(), final_norm=False)
    x = torch.randn(2, 3, 64, 96)
    maps = backbone(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 24), (24, 8, 12), (24, 4, 6), (24, 2, 3)]
    # plain: block by block
    tokens, taps = backbone.body.prepare_tokens(x), []
    for block in backbone.body.blocks:
        tokens = block(tokens)
        taps.append(tokens[:, 1:].transpose(1, 2).reshape(2, 24, 4, 6))
    torch.testing.assert_close(maps[2], taps[7])
    torch.testing.assert_close(maps[3], F.max_pool2d(taps[11], 2))
    up = backbone.pyramid[0]
    torch.testing.assert_close(maps[0], up[3](F.gelu(F.batch_norm(up[0](taps[3]), None, None, up[1].weight, up[1].bias,
                                                                  training=True))))
    torch.testing.assert_close(maps[1], backbone.pyramid[1][0](taps[5]))
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.any() for block in backbone.body.blocks for p in block.parameters())


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_strides_do_not_depend_on_the_patch(patch_size):
    maps = dense.DenseBackbone(vit(4, patch_size))(torch.randn(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    taps = dense.DenseBackbone(vit(4, patch_size), pyramid=False)(torch.randn(1, 3, 64, 96))
    assert {m.shape[-2:] for m in taps} == {(64 // patch_size, 96 // patch_size)}


def test_patches_without_a_pyramid():
    with pytest.raises(engine.InputError, match="patches of 14 pixels"):
        dense.DenseBackbone(vit(4, 14))


def test_positions_are_resized_twice():
    """Once to the grid by the target size, then for each image by the scale factors, rows first."""
    body = vit(4)
    first = body.pos_embed.detach().clone()
    backbone = dense.DenseBackbone(body, grid=(50, 63), final_norm=False)
    grid = F.interpolate(first[:, 1:].reshape(1, 14, 14, 24).permute(0, 3, 1, 2), size=(50, 63), mode="bicubic")
    torch.testing.assert_close(body.pos_embed[0, 1:], grid[0].flatten(1).T)
    assert body.pos_embed.requires_grad and isinstance(body.pos_embed, nn.Parameter)
    x = torch.randn(1, 3, 50 * 16, 76 * 16)
    sampled = F.interpolate(grid, scale_factor=(50.1 / 50, 76.1 / 63), mode="bicubic", recompute_scale_factor=False)
    patches = body.patch_embed.proj(x) + sampled
    torch.testing.assert_close(body.prepare_tokens(x)[0, 1:], patches[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    # At the grid's own size the positions are left alone.
    patches = body.patch_embed.proj(x[..., :63 * 16]) + grid
    torch.testing.assert_close(body.prepare_tokens(x[..., :63 * 16])[0, 1:], patches[0].flatten(1).T, atol=1e-5, rtol=1e-5)
    assert backbone.body.pos_grid == (50, 63)


def test_final_norm():
    """One norm for all taps, or none at all, whose weights then do not count."""
    x = torch.randn(1, 3, 64, 64)
    body = vit(4)
    nn.init.normal_(body.norm.weight)
    norm = nn.LayerNorm(24, eps=1e-6)
    norm.load_state_dict(body.norm.state_dict())
    normed = dense.DenseBackbone(body, pyramid=False).eval()(x)
    plain = dense.DenseBackbone(body, pyramid=False, final_norm=False).eval()(x)
    for one, other in zip(normed, plain, strict=True):
        torch.testing.assert_close(one, norm(other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert not any(name.startswith("body.norm") for name, _ in dense.DenseBackbone(body, final_norm=False).named_parameters())


def test_swin():
    backbone = dense.DenseBackbone(swin())
    x = torch.randn(1, 3, 70, 101)
    maps = backbone(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 18, 26), (48, 9, 13), (96, 5, 7), (192, 3, 4)]
    assert [block.shift_size for stage in backbone.body.layers for block in stage.blocks] == 4 * [(0, 0), (3, 3)]
    grids = []
    plain = swin()  # without a shift in the last stage
    plain.run_stages(F.pad(x, (0, 3, 0, 2)), taps=grids)
    for place, (norm, m) in enumerate(zip(backbone.norms, maps, strict=True)):
        expected = norm(grids[2 * place + 1]).permute(0, 3, 1, 2)
        assert torch.allclose(m, expected, atol=1e-5) == (place < 3)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_frozen():
    backbone = dense.DenseBackbone(vit(4), frozen=True).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.requires_grad for m in backbone(torch.randn(1, 3, 32, 32)))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for recompute in (False, True):
        body = vit(4)
        classifier.set_dropout(body, 0.5, 0.0, 0.0)
        backbone = dense.DenseBackbone(body, final_norm=False)
        body.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        for rescale in backbone.pyramid:
            for p in rescale.parameters():
                nn.init.constant_(p, 0.1)
        torch.manual_seed(2)
        sum(m.square().mean() for m in backbone(torch.randn(4, 3, 32, 32))).backward()
        gradients.append(body.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- loading

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pre-training checkpoint of nano networks."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("dense") / "checkpoint.pth"
    backbone = models.vit_nano(patch_size=8, img_size=32, masked_im_modeling=True)
    torch.save({"student": {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()},
                "args": argparse.Namespace(arch="vit_nano", patch_size=8, global_crops_size=32)}, path)
    return path, backbone.state_dict()


def test_loading_is_strict(checkpoint, tmp_path, capsys):
    path, state = checkpoint
    backbone, source = dense.load_dense_backbone(path, "student", drop_path=0.3, final_norm=False, grid=(4, 4))
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    assert backbone.body.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3) and source.arch == "vit_nano"
    assert "final norm of the checkpoint is not used" in capsys.readouterr().out
    own = backbone.body.state_dict()
    assert own.keys() == state.keys() - {"masked_embed", "norm.weight", "norm.bias"}
    assert all(torch.equal(own[name], state[name]) for name in own)
    content = torch.load(path, weights_only=False)
    del content["student"]["module.backbone.blocks.2.norm1.weight"]
    torch.save(content, tmp_path / "lacking.pth")
    with pytest.raises(engine.InputError, match="blocks.2.norm1.weight"):
        dense.load_dense_backbone(tmp_path / "lacking.pth", "student")
    with pytest.raises(engine.InputError, match="nowhere"):
        dense.load_dense_backbone("nowhere.pth")


def test_untrained_positions_are_as_before_pretraining():
    backbone, _ = dense.load_dense_backbone("random", arch="vit_nano", grid=(30, 40))
    assert backbone.body.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


# ---------------------------------------------------------------- training

class Network(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))


@pytest.mark.parametrize("rho, low, first, last", [(0.8, 0.05498, 0.06872, 0.8), (0.75, 0.02376, 0.03168, 0.75),
                                                   (0.65, 0.00370, 0.00569, 0.65), (0.9, 0.25419, 0.28243, 0.9)])
def test_groups_of_a_vit(rho, low, first, last):
    network = Network(dense.DenseBackbone(vit(), grid=(3, 5)))
    groups = dense.parameter_groups(network, rho)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    factors = {name: of[id(p)]["lr_scale"] for name, p in network.named_parameters()}
    assert factors["backbone.body.pos_embed"] == factors["backbone.body.patch_embed.proj.bias"] == pytest.approx(low, abs=5e-6)
    assert factors["backbone.body.blocks.0.attn.qkv.weight"] == pytest.approx(first, abs=5e-6)
    assert factors["backbone.body.blocks.11.norm1.bias"] == pytest.approx(last)
    assert {factors[name] for name in factors if not name.startswith(("backbone.body.blocks", "backbone.body.p", "backbone.body.c"))} == {1.0}
    plain = {name for name, p in network.named_parameters() if not of[id(p)]["decayed"]}
    assert plain == {name for name, p in network.named_parameters() if p.ndim == 1 or name.endswith(".bias")}
    assert {"backbone.body.cls_token", "backbone.body.pos_embed"}.isdisjoint(plain)


def test_groups_of_a_swin_go_by_name():
    network = Network(dense.DenseBackbone(swin()))
    decayed, plain = dense.parameter_groups(network, 0.5)
    assert decayed["decayed"] and decayed["lr_scale"] == plain["lr_scale"] == 1.0
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        name for name in names.values() if "norm" in name or "relative_position_bias_table" in name}
    assert {"head.1.weight", "head.0.bias", "backbone.body.layers.0.blocks.0.attn.qkv.bias"} <= {
        names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_frozen_parameters_are_in_no_group():
    groups = dense.parameter_groups(Network(dense.DenseBackbone(vit(), frozen=True)), 1.0)
    assert sum(len(group["params"]) for group in groups) == 4


def test_batch_note():
    assert dense.batch_note(16, 16, 1) == ""
    assert "a batch of 4 images, the recipe's rate is for 16; --accum_iter 4" in dense.batch_note(4, 16, 1)
    assert "--accum_iter 8 reaches it" in dense.batch_note(4, 16, 2)
    assert "accum_iter" not in dense.batch_note(6, 16, 1) and "accum_iter" not in dense.batch_note(32, 16, 1)


# ---------------------------------------------------------------- elsewhere

def test_no_picture_replaces_another():
    files = ["a/x.jpg", "b/x.png", "x_2.jpg", "c/x.jpg", "a/x.jpg"]
    paths = dense.picture_paths(files, "out", "detections")
    assert [str(file) for file, _ in paths] == files[:4]
    assert [path.as_posix() for _, path in paths] == [f"out/{name}_detections.png" for name in ("x", "x_2", "x_2_2", "x_3")]


def test_a_detector_of_torchvision(checkpoint):
    """The example of the documentation."""
    page = (Path(__file__).parent.parent / "docs" / "dense.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("work_dirs/J/checkpoint.pth", str(checkpoint[0])).replace(
        "load_dense_backbone(weights", "load_dense_backbone(weights, 'student'")
    names = {"torch": torch}
    exec(code, names)
    detector = names["detector"]
    detector.transform.min_size, detector.transform.max_size = (64,), 96
    losses = detector([torch.rand(3, 60, 90)], [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([3])}])
    sum(losses.values()).backward()
    assert detector.backbone.maps.body.blocks[0].attn.qkv.weight.grad.any()


def test_scenes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, polygons, labels, boxes, masks, classes = shapes.draw_scene(rng, 90, 70)
        assert image.size == (90, 70) and len(polygons) == len(labels) == len(boxes) == len(masks) >= 1
        assert not (masks.sum(axis=0) > 1).any()  # they do not touch
        for label, (left, top, right, bottom), mask in zip(labels, boxes, masks, strict=True):
            assert (classes[mask] == label + 1).all() and mask[int(top):int(bottom), int(left):int(right)].sum() == mask.sum()
            if shapes.NAMES[label] == "disc":
                assert mask.sum() == pytest.approx(np.pi / 4 * (right - left) * (bottom - top), rel=0.15)
        assert (classes > 0).sum() == masks.sum()
