"""Parity with the reference implementation: names, features, logits, losses, centres, gradients and updates.

Weights are a function of names and shapes (tests/data/detweights.py), so both implementations hold the same network.
The variable TEST_DEVICE names another device than the CPU (`benchmarks/gpu.sh golden`).
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import loader
import main_ibot
import models
import utils

DATA = Path(__file__).parent / "data"
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
sys.path.insert(0, str(DATA))
from detweights import fill, images, masks  # noqa: E402

CASES = {"vit": ("vit_tiny_shared", "vit_tiny", 4, 3, 14, 3), "swin": ("swin_tiny_w7", "swin_tiny", 2, 2, 7, 2)}


def networks(arch):
    def network(**kwargs):
        backbone = models.build_backbone(arch, drop_path_rate=0.0, **kwargs)
        return models.MultiCropWrapper(backbone, models.iBOTHead(backbone.embed_dim, 512, norm_last_layer=False, shared_head=True))
    student, teacher = network(masked_im_modeling=True), network().requires_grad_(False)
    student.load_state_dict(fill(student.state_dict()))
    teacher.load_state_dict({name: 0.9 * v + 0.01 if v.is_floating_point() else v
                             for name, v in fill(teacher.state_dict()).items()})
    return student.to(DEVICE), teacher.to(DEVICE)


def batch(B, L, cells, step):
    crops = torch.stack([images(B, 224, 100 * step + c) for c in range(2)])
    grids = torch.stack([masks(B, cells, 100 * step + c) for c in range(2)])  # [G, B, h, w]
    weight = (1.0 / grids.flatten(2).sum(-1).clamp(min=1) / (2 * B))[..., None, None].expand(grids.shape)[grids]
    values = dict(global_crops=crops, local_crops=torch.stack([images(B, 96, 100 * step + 10 + c) for c in range(L)]),
                  labels=torch.zeros(B, dtype=torch.int64), masks=grids,
                  mask_index=grids.flatten().nonzero().squeeze(1), mask_weight=weight.float())
    return loader.Batch(**{name: value.to(DEVICE) for name, value in values.items()})


def near(actual, expected, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(actual.cpu() if torch.is_tensor(actual) else actual), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("case", CASES)
def test_golden_step(case, monkeypatch):
    file, arch, B, L, cells, steps = CASES[case]
    golden = np.load(DATA / f"{file}.npz")
    student, teacher = networks(arch)
    assert sorted(student.state_dict()) == list(golden["student_keys"])
    assert sorted(teacher.state_dict()) == list(golden["teacher_keys"])
    # The order too: optimiser states in checkpoints go by it.
    assert [name for name, _ in student.named_parameters()] == list(golden["gradnames_0"])

    first = batch(B, L, cells, 0)
    crops, grids = first.global_crops.flatten(0, 1), first.masks.flatten(0, 1)
    with torch.no_grad():
        for key, mask in (("feat", None), ("featm", grids)):
            tokens = student.backbone(crops, mask=mask, return_all_tokens=True)
            near(tokens[:, 0], golden[f"{key}_cls"], 5e-5)
            near(tokens[:, 1::13], golden[f"{key}_patch"], 5e-5)
        near(student.head(tokens)[0], golden["student_cls"], 1e-5)
        cls, patches = teacher.head(teacher.backbone(crops, return_all_tokens=True))
        near(cls, golden["teacher_cls"], 1e-5)
        near(patches.mean(dim=(0, 1)), golden["teacher_patch_mean"], 1e-5)
        near(student.head(student.backbone(first.local_crops.flatten(0, 1))), golden["student_local_cls"], 1e-5)

    temps = utils.temperature_schedule(0.04, 0.07, 30, 100)
    ibot_loss = main_ibot.iBOTLoss(512, 512, temps, temps).to(DEVICE)
    groups = utils.get_params_groups(student)
    assert [len(g["params"]) for g in groups] == list(golden["n_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    ema = utils.ema_pairs(student, teacher)
    assert len(ema[0]) == golden["n_ema"]

    names = {p: name for name, p in student.named_parameters()}
    norms = {}
    clip = utils.clip_gradients

    def recording_clip(parameters, max_norm):
        before = clip(parameters, max_norm)
        norms.update({names[p]: float(n) for p, n in zip(parameters, before, strict=True)})
        return before
    monkeypatch.setattr(utils, "clip_gradients", recording_clip)

    for i in range(steps):
        losses, *_ = main_ibot.train_step(
            [batch(B, L, cells, i)], main_ibot.Training(student, teacher, ema, ibot_loss, optimizer),
            2, lr=1e-3, weight_decay=0.04, momentum=0.996, clip_grad=3.0, freeze_last_layer=False)
        for key in ("cls", "patch", "loss"):
            near(losses[key], golden[f"{key}_{i}"], 1e-5, 1e-4)
        near(ibot_loss.center.flatten(), golden[f"center_{i}"], 1e-5, 1e-4)
        near(ibot_loss.center2.flatten(), golden[f"center2_{i}"], 1e-5, 1e-4)
        near([norms[name] for name in golden[f"gradnames_{i}"]], golden[f"gradnorm_{i}"], 1e-6, 1e-3)

    for network, key in ((student, "student"), (teacher, "teacher")):
        sums = {name: float(p.detach().double().sum()) for name, p in network.named_parameters()}
        expected = dict(zip(golden[f"{key}_names"], golden[f"{key}_probe"], strict=True))
        assert sums.keys() == expected.keys()
        for name, value in expected.items():
            # Attention ignores the key bias, so its gradient is rounding noise, which Adam scales up to whole steps.
            noise = 0.01 if name.endswith("qkv.bias") else 1e-9
            assert abs(sums[name] - value) <= 1e-3 * abs(value) + noise, name


@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_stays_near(case, residual_dtype):
    """Mixed precision, and tokens in bfloat16 between blocks too (`--residual_dtype amp`): losses are off by its rounding.

    A Swin's tokens come out of a LayerNorm, which a CPU computes in bfloat16 either way.
    """
    file, arch, B, L, cells, _ = CASES[case]
    golden = np.load(DATA / f"{file}.npz")
    student, teacher = networks(arch)
    for network in (student, teacher):
        network.backbone.residual_dtype = residual_dtype
    temps = utils.temperature_schedule(0.04, 0.07, 30, 100)
    ibot_loss = main_ibot.iBOTLoss(512, 512, temps, temps).to(DEVICE)
    optimizer, ema = torch.optim.AdamW(utils.get_params_groups(student), lr=0.0, fused=True), utils.ema_pairs(student, teacher)
    for i in range(2):
        losses, *_ = main_ibot.train_step(
            [batch(B, L, cells, i)], main_ibot.Training(student, teacher, ema, ibot_loss, optimizer, None, torch.bfloat16),
            2, lr=1e-3, weight_decay=0.04, momentum=0.996, clip_grad=3.0, freeze_last_layer=False)
        for key in ("cls", "patch"):
            near(losses[key], golden[f"{key}_{i}"], 0.0, 1e-3 if i == 0 else 4e-3)


def test_golden_schedules():
    golden = np.load(DATA / "schedules.npz")
    near(utils.cosine_scheduler(0.002, 1e-6, 20, 7, warmup_epochs=3), golden["lr"], 1e-12)
    near(utils.cosine_scheduler(0.04, 0.4, 20, 7), golden["wd"], 1e-12)
    near(utils.cosine_scheduler(0.996, 1.0, 20, 7), golden["mom"], 1e-12)
