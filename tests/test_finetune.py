"""Fine-tuning: groups, schedules, updates and images against plain definitions, processes, stops and bad input."""
import argparse
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import multiprocessing

import engine
import models
import utils
from benchmarks.faults import differences, everything
from evaluation import eval_cls
from evaluation.classification_layer_decay import run_class_finetuning
from evaluation.common import classifier, finetune
from evaluation.common.augment import AugmentedSet, UpdateBatches, drawing_from, train_transform, val_transform
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import epoch_order, eval_transform, image_sets
from evaluation.common.features import sharded_loader
from evaluation.common.reference_flags import our_words
from evaluation.semi_supervised import eval_cls as semi_cls
from images import IMAGENET_MEAN, IMAGENET_STD
from tests.conftest import ROOT, wait_for

CPU = engine.Process(0, 1, 0, torch.device("cpu"))
TINY = ["--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32", "--device", "cpu",
        "--batch_size", "16", "--epochs", "2", "--warmup_epochs", "1", "--num_workers", "0", "--print_freq", "3",
        "--use_fp16", "false", "--lr", "2e-3", "--layer_decay", "0.75", "--drop_path", "0.2"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop_path", "0"]


def parse(*words, script=run_class_finetuning):
    return script.get_args_parser().parse_args(our_words([*TINY, *map(str, words)]))


def train(*words, script=run_class_finetuning, protocol=None):
    return finetune.finetune(parse(*words, script=script), protocol or finetune.Protocol("finetune"))


def nano(num_classes=10, **changes):
    torch.manual_seed(0)
    args = parse("--init_scale", 1, "--drop_path", 0, *(word for name, value in changes.items() for word in (f"--{name}", value)))
    return finetune.build_network(args, "random", {}, num_classes)[0]


# ---------------------------------------------------------------- layers, rates, decay

def expected_layer(name, depths):
    """The rule of the protocols, section 7.4, by regular expressions."""
    L = sum(depths)
    if re.match(r"(cls_token|pos_embed|patch_embed\.)", name):
        return 0
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return [0, *np.cumsum(depths)][int(found[1])] + int(found[2]) + 1
    if found := re.match(r"layers\.(\d+)\.downsample\.", name):
        return int(np.cumsum(depths)[int(found[1])])  # that of the stage's last block
    assert re.match(r"(norm|fc_norm|head)\.", name), name
    return L + 1


@pytest.mark.parametrize("arch, depths, rho, pooling", [
    ("vit_small", [12], 0.75, False), ("vit_base", [12], 0.65, True), ("vit_large", [24], 0.75, False),
    ("swin_tiny", [2, 2, 6, 2], 0.8, False)])
def test_groups_of_every_parameter(arch, depths, rho, pooling, monkeypatch):
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # drop path rates, numbers in older timm too
    with torch.device("meta"):
        backbone = models.build_backbone(arch)
        model = classifier.Classifier(backbone, torch.nn.Linear(backbone.embed_dim, 1000), mean_pooling=pooling)
    L, found = sum(depths), {}
    groups = utils.get_params_groups(model, rho, decay_positions=False)
    for group in groups:
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr_scale"], group["decayed"])
    names = dict(model.named_parameters())
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    for name, parameter in names.items():
        name = name.removeprefix("backbone.")
        scale, decayed = found[id(parameter)]
        assert scale == pytest.approx(rho ** (L + 1 - expected_layer(name, depths)), rel=1e-12), name
        vector = parameter.ndim == 1 or name.endswith("bias") or name in ("pos_embed", "cls_token")
        assert decayed is not vector, name
    assert len(groups) == 2 * (L + 2) and groups[0]["lr_scale"] == pytest.approx(rho ** (L + 1))
    assert any("relative_position_bias_table" in name for name in names) == arch.startswith("swin")
    plain = utils.get_params_groups(model, 1.0)
    assert [group["lr_scale"] for group in plain] == [1.0, 1.0] and [group["decayed"] for group in plain] == [True, False]
    if not arch.startswith("swin"):
        in_decayed = {id(p) for p in plain[0]["params"]}
        assert {id(backbone.pos_embed), id(backbone.cls_token)} <= in_decayed  # transfer decays them
    table = classifier.layer_table(model, rho, False).splitlines()
    assert len(table) == L + 3 and f"{rho:.5f}" in table[-2] and "head.weight" in table[-1]


def test_factors_of_vit_base():
    """Section 18: 0.65^13 for the embeddings, 0.65^12 for block 0, 0.65 for block 11, 1 for norm and head."""
    ids = [utils.layer_id(name, [12]) for name in ("backbone.pos_embed", "backbone.blocks.0.norm1.weight",
                                                      "backbone.blocks.11.mlp.fc1.bias", "backbone.norm.weight", "head.weight")]
    assert [13 - i for i in ids] == [13, 12, 1, 0, 0]


def test_schedules():
    args = parse("--epochs", 10, "--warmup_epochs", 3, "--min_lr", 1e-5)
    schedules, notes = finetune.build_schedules(args, 2e-3, 4, 64)
    lr = schedules["lr"]
    assert len(lr) == 40 and not notes and (schedules["wd"] == 0.05).all()
    assert lr[0] == 0 and lr[11] == pytest.approx(2e-3) and lr[5] == pytest.approx(2e-3 * 5 / 11)  # not scaled by the batch
    for i in (12, 20, 39):
        assert lr[i] == pytest.approx(1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.cos(math.pi * (i - 12) / 28)))
    wd = finetune.build_schedules(parse("--weight_decay_end", 0.5), 1e-3, 4, 64)[0]["wd"]
    assert wd[0] == pytest.approx(0.05) and 0.05 < wd[4] < wd[-1] < 0.5

    # DeiT's: value(0) in epochs 0 and 1, then an epoch late; scaled by total batch / 512
    args = parse("--epochs", 10, "--lr", 7.5e-5, "--warmup_epochs", 5, "--schedule", "epoch", "--lr_for_batch", 512, "--min_lr", 1e-5)
    lr = finetune.build_schedules(args, 7.5e-5, 2, 768)[0]["lr"].reshape(10, 2)
    assert (lr[:, 0] == lr[:, 1]).all()
    peak = 7.5e-5 * 768 / 512
    curve = [1e-6 + t * (peak - 1e-6) / 5 if t < 5 else 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * t / 10))
             for t in range(10)]
    np.testing.assert_allclose(lr[:, 0], [curve[0], *curve[:9]], rtol=1e-12)
    # section 18: with the published rates it varies by at most 11 % after the warm-up
    flat = finetune.epoch_schedule(1.125e-5, 1e-5, 1000, 5, 1e-6)[6:]
    assert flat.max() / flat.min() < 1.13 and flat.min() == pytest.approx(1e-5, rel=1e-3)
    assert "shortened to 2" in finetune.build_schedules(parse("--warmup_epochs", 20), 1e-3, 4, 64)[1][0]


def test_published_defaults():
    """Sections 7.8, 8 and 9: what the scripts do when they are told nothing."""
    args = vars(run_class_finetuning.get_args_parser().parse_args(["--pretrained_weights", "x"]))
    assert {name: args[name] for name in (
        "epochs", "layer_decay", "warmup_epochs", "mixup", "cutmix", "reprob", "smoothing", "weight_decay", "min_lr", "init_scale",
        "schedule", "lr_for_batch", "decay_positions", "repeated_aug", "model_ema", "val_interpolation", "crop_pct", "clip_grad")} == {
        "epochs": 100, "layer_decay": 0.65, "warmup_epochs": 20, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "smoothing": 0.1,
        "weight_decay": 0.05, "min_lr": 1e-6, "init_scale": 0.001, "schedule": "step", "lr_for_batch": 0, "decay_positions": False,
        "repeated_aug": False, "model_ema": False, "val_interpolation": "bilinear", "crop_pct": None, "clip_grad": 0.0}
    for script, lr, batch in ((eval_cls, "0.0005", 96), (semi_cls, "0.001", 128)):
        args = vars(script.get_args_parser().parse_args(["--pretrained_weights", "x"]))
        assert {name: args[name] for name in ("epochs", "lr", "batch_size_per_gpu", "lr_for_batch", "schedule", "warmup_epochs", "warmup_lr",
                                              "min_lr", "layer_decay", "init_scale", "decay_positions", "repeated_aug", "model_ema",
                                              "model_ema_decay", "val_interpolation", "crop_pct")} == {
            "epochs": 300, "lr": lr, "batch_size_per_gpu": batch, "lr_for_batch": 512, "schedule": "epoch", "warmup_epochs": 5,
            "warmup_lr": 1e-6, "min_lr": 1e-5, "layer_decay": 1.0, "init_scale": 1.0, "decay_positions": True, "repeated_aug": True,
            "model_ema": True, "model_ema_decay": 0.99996, "val_interpolation": "bicubic", "crop_pct": 0.875}


def test_the_reference_s_spellings():
    args = parse("--batch-size", 8, "--data-set", "CIFAR", "--update_freq=2", "--input-size", 64, "--use_mean_pooling", "--model-ema",
                 "--resume", "auto", "--no-repeated-aug", "--imagenet_default_mean_and_std", "--drop-path", 0.3, "--dist-eval")
    assert (args.batch_size_per_gpu, args.dataset, args.accum_iter, args.image_size, args.avgpool_patchtokens, args.model_ema,
            args.load_from, args.repeated_aug, args.drop_path) == (8, "cifar100", 2, 64, 1, True, "auto", False, 0.3)
    assert parse("--data-set=Flwrs").dataset == "flowers"
    args = parse("--finetune", "x.pth", "--finetune=", "--resume", "")  # empty: the reference's defaults
    assert (args.pretrained_weights, args.load_from) == ("x.pth", None)


def test_the_reference_s_flags_that_change_nothing_are_taken():
    """All of its three scripts' with their defaults; in `args` only those stay that are checked or noted."""
    words = """--rel_pos_bias --disable_rel_pos_bias --abs_pos_emb --learned_abs_pos_emb --layer_scale_init_value 0.0 --opt adamw
        --opt_eps 1e-8 --opt_betas 0.9 0.999 --momentum 0.9 --warmup_steps -1 --resplit --model_ema_force_cpu --model_prefix= --no_auto_resume
        --save_ckpt --start_epoch 0 --dist_eval --pin_mem --no_pin_mem --world_size 8 --sched cosine --lr-noise-pct 0.67 --lr-noise-std 1.0
        --decay-epochs 30 --decay-rate 0.1 --cooldown-epochs 10 --patience-epochs=10 --teacher-model regnety_160 --teacher-path=
        --distillation-type none --distillation-alpha 0.5 --distillation-tau 1.0 --disable_weight_decay_on_bias_norm --inat-category name
        --distill_epochs 150 --disable_weight_decay_on_cls_pos --disable_weight_decay_on_rel_pos_bias --imagenet_default_mean_and_std""".split()
    assert vars(parse(*words[1:])) == vars(parse())
    assert parse("--nb_classes", 10, "--log_dir", "x", "--enable_deepspeed", "--out_dim", 64, "--momentum", 0.8).log_dir == "x"


@pytest.mark.parametrize("words, advice", [
    (["--opt", "sgd"], "--opt sgd: there is AdamW alone"), (["--opt-betas", "0.9", "0.95"], "--opt_betas 0.9 0.95: AdamW has"),
    (["--layer_scale_init_value=0.1"], "--layer_scale_init_value 0.1: these networks"), (["--rel_pos_bias"], "--rel_pos_bias: these"),
    (["--warmup_steps", "500"], "--warmup_steps 500: give --warmup_epochs"), (["--no_save_ckpt"], "--no_save_ckpt: checkpoint.pth"),
    (["--eval_data_path", "x"], "--eval_data_path x: put"), (["--sched", "step"], "--sched step: .*--schedule"),
    (["--start_epoch", "3"], "--start_epoch 3: --load_from"), (["--distillation-type", "hard"], "--distillation_type hard: "),
    (["--model_prefix", "encoder."], "--model_prefix encoder.: prefixes")])
def test_the_reference_s_flags_that_would_change_something_are_named(words, advice):
    with pytest.raises(engine.InputError, match=advice) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


def test_ignored_flags_get_a_note(digits, tmp_path, capsys):
    with pytest.raises(engine.InputError, match="nowhere"):
        train("--data_path", digits / "nowhere", "--output_dir", tmp_path, "--enable_deepspeed", "--log_dir", "mine")
    out = capsys.readouterr().out
    assert "note: --enable_deepspeed is ignored: precision is --amp_dtype's" in out and "note: --log_dir mine is ignored" in out


# ---------------------------------------------------------------- the network

@torch.no_grad()
def test_network_gives_what_a_plain_computation_gives():
    images = torch.randn(3, 3, 32, 32)
    for pooling in (0, 1):
        model = nano(avgpool_patchtokens=pooling).eval()
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        x = model.backbone.blocks(model.backbone.prepare_tokens(images))
        x, norm = (x[:, 1:].mean(1), model.fc_norm) if pooling else (x[:, 0], model.backbone.norm)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(model(images), x @ model.head.weight.T + model.head.bias)
        assert (model.fc_norm is None) == (pooling == 0) and isinstance(model.backbone.norm, torch.nn.Identity) == (pooling == 1)


def test_first_weights_of_the_head():
    small, large = nano(init_scale=0.001).head, nano(init_scale=1.0).head
    torch.testing.assert_close(small.weight * 1000, large.weight)
    assert 0.01 < large.weight.std() < 0.03 and not large.bias.any()


def test_drop_path_is_linear_over_depth():
    model = nano(drop_path=0.3)
    rates = [(block.drop_path1.drop_prob, block.drop_path2.drop_prob) for block in model.backbone.blocks]
    np.testing.assert_allclose(rates, [(0.3 * i / 3,) * 2 for i in range(4)])
    swin = models.swin_tiny()
    classifier.set_dropout(swin, 0.22, 0.1, 0.2)
    blocks = [block for stage in swin.layers for block in stage.blocks]
    np.testing.assert_allclose([block.drop_path2.drop_prob for block in blocks], 0.22 * np.arange(12) / 11)
    assert all(b.attn.attn_drop.p == 0.2 and b.attn.proj_drop.p == b.mlp.drop1.p == b.mlp.drop2.p == 0.1 for b in blocks)
    # Dropout on embedded tokens too, as in timm, in training alone.
    for network, image in ((swin, torch.randn(1, 3, 224, 224)), (nano(drop=0.1).backbone, torch.randn(1, 3, 32, 32))):
        whole = network.eval().prepare_tokens(image)
        dropped = network.train().prepare_tokens(image)
        lost = dropped == 0
        assert 0.05 < lost.float().mean() < 0.15
        torch.testing.assert_close(dropped[~lost], whole[~lost] / 0.9)
    own = models.swin_tiny(drop_path_rate=0.1)
    classifier.set_dropout(own, None, 0.0, 0.0)
    assert own.layers[3].blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    # It acts in training: whole branches of an image vanish.
    block, x = model.backbone.blocks[3], torch.randn(64, 5, 96)
    assert isinstance(block.drop_path1, DropPath)
    kept = (block.train().drop_path1(x) != 0).flatten(1).any(1)
    assert 0 < kept.sum() < 64 and torch.equal(block.eval().drop_path1(x), x)


def test_positions_for_other_sizes():
    torch.manual_seed(0)
    pos_embed = torch.randn(1, 1 + 4 * 4, 8)
    assert classifier.resize_positions(pos_embed, 4) is pos_embed
    grid = pos_embed[0, 1:].T.view(1, 8, 4, 4)
    for cells in (6, 12):
        resized = classifier.resize_positions(pos_embed, cells)
        assert torch.equal(resized[:, 0], pos_embed[:, 0])
        expected = F.interpolate(grid, (cells, cells), mode="bicubic", align_corners=False)[0].flatten(1).T
        torch.testing.assert_close(resized[0, 1:], expected)
    model = nano(image_size=48)  # the untrained network is made for it
    assert model.backbone.pos_embed.shape[1] == 37 and model(torch.randn(2, 3, 48, 48)).shape == (2, 10)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training checkpoint of 32-pixel images, with heads of three layers."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pth"
    networks = {key: models.MultiCropWrapper(models.vit_nano(patch_size=8, img_size=32), models.iBOTHead(
        96, 24, norm=None, act="gelu", shared_head=True, hidden_dim=40, bottleneck_dim=16)).state_dict() for key in ("teacher", "student")}
    torch.save({**networks, "args": argparse.Namespace(arch="vit_nano", patch_size=8, window_size=7, global_crops_size=32)}, path)
    return path


def test_larger_images_from_a_checkpoint(pretrained):
    args = parse("--pretrained_weights", pretrained, "--image_size", 64)
    content = engine.load_checkpoint(pretrained)
    model, source = finetune.build_network(args, "teacher", content, 10)
    torch.testing.assert_close(model.backbone.pos_embed.detach(), classifier.resize_positions(
        content["teacher"]["backbone.pos_embed"], 8))
    assert model.backbone.pos_embed.requires_grad and source.image_size == 64
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_of_the_projection_head(layers, pretrained):
    content = engine.load_checkpoint(pretrained)
    args = parse("--pretrained_weights", pretrained, "--finetune_head_layer", layers, "--init_scale", 0.5)
    model, source = finetune.build_network(args, "teacher", content, 7)
    images, state = torch.randn(3, 3, 32, 32), content["teacher"]
    x = load_evaluated_backbone(pretrained, "teacher", checkpoint=content).model(images)
    for i in (0, 2, 4)[:layers]:
        x = x @ state[f"head.mlp.{i}.weight"].T + state[f"head.mlp.{i}.bias"]
        x = F.gelu(x) if i < 4 else x
    if layers == 3:
        v = state["head.last_layer.weight_v"]
        x = F.normalize(x, dim=1) @ (state["head.last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T
    assert model.head.fc.in_features == {1: 40, 2: 40, 3: 24}[layers] and model.head.fc.weight.std() < 0.0125
    torch.testing.assert_close(model.eval()(images), x @ model.head.fc.weight.T + model.head.fc.bias, rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in model.parameters())
    ids = {utils.layer_id(name, [4]) for name, _ in model.named_parameters() if name.startswith("head")}
    assert ids == {5} and source.key == "teacher"


@pytest.mark.parametrize("words", [[], ["--avgpool_patchtokens", 1], ["--arch", "swin_tiny", "--image_size", 64]])
def test_every_parameter_learns(words):
    torch.manual_seed(0)
    model, _ = finetune.build_network(parse("--init_scale", 1, "--drop_path", 0, *words), "random", {}, 10)
    optimizer = torch.optim.AdamW(utils.get_params_groups(model, 0.75, decay_positions=False), lr=0.0)
    batch = (torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
    losses = [finetune.train_step(iter([batch]), finetune.Training(model, optimizer), 1e-3, 0.0)["loss"] for _ in range(3)]
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert losses[2] < losses[0]


# ---------------------------------------------------------------- updates

def test_first_updates_equal_plain_adamw():
    """Two updates with layer decay, weight decay, clipping, EMA and labels smoothed, written down from the definitions."""
    model = nano().double()  # Adam's first step is the sign of the gradient, however small
    average = nano().double().requires_grad_(False)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in theta.items()}
    square, ema = {name: torch.zeros_like(p) for name, p in theta.items()}, {name: p.clone() for name, p in theta.items()}
    optimizer = torch.optim.AdamW(utils.get_params_groups(model, 0.75, decay_positions=False), lr=0.0)
    torch.manual_seed(3)
    for t, (lr, wd) in enumerate(((1e-2, 0.05), (5e-3, 0.1)), start=1):
        batches = [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(2)]
        means = finetune.train_step(
            iter(batches), finetune.Training(model, optimizer, ema=finetune.ema_pairs(model, average)), lr, wd, smoothing=0.1,
            clip_grad=0.5, ema_decay=0.9, accum_iter=2)
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        logits = torch.func.functional_call(model.train(), leaves, (images,))
        target = F.one_hot(labels, 10) * 0.9 + 0.1 / 10
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        torch.testing.assert_close(means["loss"], loss.detach())
        torch.testing.assert_close(means["grad_norm"], norm)
        assert norm > 0.5 and means["class_acc"] == (logits.argmax(1) == labels).float().mean()
        for name, p in theta.items():
            g = gradients[name] * 0.5 / (norm + 1e-6)
            own = lr * 0.75 ** (5 - utils.layer_id(name, [4]))
            plain = p.ndim == 1 or name.endswith("bias") or name in ("backbone.pos_embed", "backbone.cls_token")
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g * g
            step = mean[name] / (1 - 0.9**t) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            theta[name] = p - own * (0 if plain else wd) * p - own * step
            ema[name] = 0.9 * ema[name] + 0.1 * theta[name]
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), theta[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for name, p in average.named_parameters():
        torch.testing.assert_close(p, ema[name], rtol=1e-6, atol=1e-6)


def test_update_with_numbers_that_are_not_finite_is_not_made():
    model = nano()
    optimizer = torch.optim.AdamW(utils.get_params_groups(model, 1.0, decay_positions=False), lr=0.0, fused=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(4, 3, 32, 32)
    training = finetune.Training(model, optimizer)
    means = finetune.train_step(iter([(images * math.inf, torch.zeros(4, dtype=torch.int64))]), training, 1e-2, 0.1)
    assert not means["loss"].isfinite() and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    finetune.train_step(iter([(images, torch.zeros(4, dtype=torch.int64))]), training, 1e-2, 0.1)
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    """Nearly the loss and the gradients of single precision; weights and loss stay in single precision."""
    batch, seen, found = (torch.randn(4, 3, 32, 32), torch.arange(4)), {}, {}
    for amp_dtype in (None, dtype):
        model = nano()
        model.head.register_forward_hook(lambda m, given, out: seen.update(logits=out.dtype))
        optimizer = torch.optim.AdamW(utils.get_params_groups(model, 0.75, decay_positions=False), lr=0.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if amp_dtype is torch.float16 else None
        found[amp_dtype] = finetune.train_step(
            iter([batch]), finetune.Training(model, optimizer, scaler, amp_dtype=amp_dtype), 1e-3, 0.0)
    assert seen["logits"] is dtype and found[dtype]["loss"].dtype is torch.float32 and model.head.weight.dtype is torch.float32
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(found[dtype][name], found[None][name], rtol=0.05, atol=0)


@pytest.mark.parametrize("alphas, kinds", [((0.8, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((0.8, 1.0), {"mixup", "cutmix"})])
def test_mixing_of_images_and_targets(alphas, kinds):
    """Images are blends with, or hold boxes of, the batch in reverse order, and the targets the same shares (section 1.8)."""
    mixing = finetune.build_mixing(parse("--mixup", alphas[0], "--cutmix", alphas[1], "--smoothing", 0.1), 10)
    np.random.seed(0)
    seen = set()
    for _ in range(12):
        images, labels = torch.rand(6, 3, 20, 20), torch.arange(6)
        mixed, targets = mixing(images.clone(), labels)
        assert mixed.shape == images.shape and targets.shape == (6, 10)
        one_hot = F.one_hot(labels, 10) * 0.9 + 0.01
        share = ((targets - one_hot.flip(0)) / (one_hot - one_hot.flip(0)))[0, 0].item()
        torch.testing.assert_close(targets, one_hot * share + one_hot.flip(0) * (1 - share))
        blend = images * share + images.flip(0) * (1 - share)
        if torch.allclose(mixed, blend, atol=1e-4):
            seen.add("mixup")
        else:
            own = (mixed == images).all(1)  # [6, 20, 20]
            assert torch.equal(own | (mixed == images.flip(0)).all(1), torch.ones_like(own))
            assert own[0].float().mean().item() == pytest.approx(share, abs=1e-6)
            seen.add("cutmix")
    assert seen == kinds
    assert finetune.build_mixing(parse("--mixup", 0, "--cutmix", 0), 10) is None


# ---------------------------------------------------------------- images

def test_augmentation_is_active_in_training_and_off_in_validation():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8))
    for size in (32, 48):
        transform = train_transform(size)
        kinds = [type(part).__name__ for part in transform.transforms]
        assert "RandAugment" in kinds and kinds[-1] == "RandomErasing" and isinstance(transform.transforms[-1], RandomErasing)
        erasing = transform.transforms[-1]
        assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.25, True, 1)
        torch.manual_seed(0)
        a, b = transform(picture), transform(picture)
        assert a.shape == (3, size, size) and a.dtype == torch.float32 and not torch.equal(a, b)
        once = val_transform(size)
        assert torch.equal(once(picture), once(picture))
    # Each part does something by itself: off, on.
    off = train_transform(48, auto_augment=None, color_jitter=0, erase_prob=0.0)
    for change in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"erase_prob": 1.0}, {"color_jitter": 0.4}):
        on = train_transform(48, **{"auto_augment": None, "color_jitter": 0, "erase_prob": 0.0, **change})
        with drawing_from(5):
            expected = off.transforms[0](picture)
        with drawing_from(5):
            assert np.array_equal(np.asarray(on.transforms[0](picture)), np.asarray(expected))
        differ = 0
        for seed in range(8):
            with drawing_from(seed):
                x = off(picture)
            with drawing_from(seed):
                differ += not torch.allclose(on(picture), x)
        assert differ >= 6, change


def test_small_images_are_moved_and_flipped_on_request():
    """By an eighth of their side: every result is a cut-out of the image with a border of that width."""
    for size in (16, 32):
        picture = Image.fromarray(np.random.default_rng(0).integers(1, 255, (size, size, 3), dtype=np.uint8))
        plain = val_transform(size)(picture)
        black = (0 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        border, m = black[:, None, None].expand(3, size + size // 4, size + size // 4).clone(), size // 8
        border[:, m:-m, m:-m] = plain
        cuts = border.unfold(1, size, 1).unfold(2, size, 1).flatten(1, 2).permute(1, 0, 2, 3)  # [(2m+1)^2, 3, size, size]
        for flip_prob, expected in ((0.0, {False}), (0.5, {False, True}), (1.0, {True})):
            transform, seen, places = train_transform(size, None, 0, erase_prob=0.0, flip_prob=flip_prob), set(), set()
            for seed in range(40):
                with drawing_from(seed):
                    x = transform(picture)
                found = {flipped: (cuts - (x.flip(2) if flipped else x)).abs().amax((1, 2, 3)) < 1e-5 for flipped in (False, True)}
                [flipped] = [flipped for flipped in found if found[flipped].any()]
                seen.add(flipped)
                places.add(int(found[flipped].nonzero()))
            assert seen == expected and len(places) > 10


def test_posterize_with_no_bits_left_is_black():
    """RandAugment asks for it now and then, and Pillow refuses."""
    transform = train_transform(48, auto_augment="rand-m10-n1-inc1")
    op = next(op for op in transform.transforms[2].ops if "Posterize" in op.name)
    op.prob, op.magnitude = 1.0, 10
    picture = Image.fromarray(np.full((9, 9, 3), 200, dtype=np.uint8))
    assert not np.asarray(op(picture)).any()
    op.magnitude = 5  # 2 bits
    assert set(np.unique(np.asarray(op(picture)))) == {192}


def test_validation_images():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    torch.testing.assert_close(val_transform(224)(picture), eval_transform(224)(picture))
    assert not torch.allclose(val_transform(224, interpolation="bilinear")(picture), eval_transform(224)(picture))
    assert val_transform(384).transforms[0].size == [384] and val_transform(384, 0.875).transforms[0].size == [438]
    assert val_transform(256).transforms[0].size == [292] and val_transform(32).transforms[0].size == [32]


def test_draws_leave_the_generators_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    draws = []
    for _ in range(2):
        with drawing_from(2**62 + 7):
            draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_training_images_depend_on_their_place_alone(digits):
    images, _ = image_sets("imagefolder", digits)
    sets = [AugmentedSet(images, train_transform(48), seed) for seed in (0, 0, 1)]
    random.random()
    a, b, c = (s[0, 7, 3][0] for s in sets)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, sets[0][0, 8, 3][0]) and not torch.equal(a, sets[0][1, 7, 3][0])
    assert sets[0][0, 7, 3][1] == images.targets[3]


def test_batches_of_an_epoch():
    """Two processes share the batch of one; a start in mid-epoch gives the rest; surplus images are left out."""
    def batches(world_size, rank, batch_size, accum_iter, n=50, start=0, **kwargs):
        sampler = UpdateBatches(n, batch_size, accum_iter, engine.Process(rank, world_size, rank, None), seed=3, **kwargs)
        sampler.epoch, sampler.start = 2, start
        found = list(sampler)
        assert len(sampler) == len(found)
        return found
    one = batches(1, 0, 8, 1)
    assert len(one) == 6 and [i for batch in one for _, _, i in batch] == epoch_order(50, 3, 2)[:48].tolist()
    assert [p for batch in one for _, p, _ in batch] == list(range(48)) and {e for batch in one for e, _, _ in batch} == {2}
    parts = [batches(2, rank, 4, 1) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in one]
    halves = batches(1, 0, 4, 2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == one
    assert batches(1, 0, 4, 2, start=4) == halves[8:]


def test_repeated_augmentation():
    """Section 18: n = 2040 and 8 processes give 224 entries each; processes 0, 1 and 2 see the same first image."""
    samplers = [UpdateBatches(2040, 8, 1, engine.Process(rank, 8, rank, None), seed=0, repeated=True) for rank in range(8)]
    parts = [list(sampler) for sampler in samplers]
    assert all(len(part) == 224 // 8 for part in parts)
    firsts = [part[0][0] for part in parts]
    assert len({index for _, _, index in firsts[:3]}) == 1 and len({place for _, place, _ in firsts}) == 8
    counts = np.bincount([index for part in parts for batch in part for _, _, index in batch])
    assert counts.max() == 3 and (counts > 0).sum() == math.ceil(8 * 224 / 3)
    assert UpdateBatches(200, 10, 1, CPU, 0, repeated=True).steps == 20  # fewer than 256 images
    assert UpdateBatches(700, 10, 1, CPU, 0, repeated=True).steps == 51  # 512 of 700


def test_bad_images_are_replaced(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    images, _ = image_sets("imagefolder", data)
    path, _ = images.samples[5]
    open(path, "wb").write(b"no image")
    dataset = AugmentedSet(images, val_transform(32))
    x, label = dataset[0, 0, 5]
    assert x.shape == (3, 32, 32) and engine.bad_files(dataset) == [path] and dataset.bad.sum() == 1
    with pytest.raises(engine.InputError, match=re.escape(path)):
        AugmentedSet(images, val_transform(32), on_bad_image="error")[0, 0, 5]


# ---------------------------------------------------------------- validation

def test_validation_counts_every_image_once(digits):
    """Shares of three processes, padded to equal length, add up to the plain accuracy over all images."""
    _, val = image_sets("imagefolder", digits)
    val = val.with_transform(val_transform(32))
    model = nano()
    with torch.no_grad():
        model.eval()
        logits = torch.stack([model(val[i][0][None])[0] for i in range(41)])
    labels = torch.from_numpy(val.targets)
    expected = {"loss": F.cross_entropy(logits, labels).item(), "acc1": 100 * (logits.argmax(1) == labels).float().mean().item(),
                "acc5": 100 * (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()}
    model.train()
    alone = finetune.validate(model, sharded_loader(val, 16, 0, CPU), 41, CPU)
    assert model.training and alone == pytest.approx(expected, rel=1e-5)
    sums = {}
    for rank in range(3):
        process = engine.Process(rank, 3, rank, torch.device("cpu"))
        share = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", lambda tensor: None)
            share = finetune.validate(model, sharded_loader(val, 6, 0, process), 41, process)
        sums = {name: sums.get(name, 0) + value for name, value in share.items()}
    assert sums == pytest.approx(expected, rel=1e-5)
    assert "acc5" not in finetune.validate(nano(num_classes=4), [(torch.randn(2, 3, 32, 32), torch.tensor([0, 3]), None)], 2, CPU)


# ---------------------------------------------------------------- processes

def three_steps(rank, world_size, accum_iter, folder):
    model = nano().double()
    network = engine.data_parallel(model, torch.device("cpu"), accum_iter) if world_size > 1 else model
    optimizer = torch.optim.AdamW(utils.get_params_groups(model, 0.75, decay_positions=False), lr=0.0, fused=True)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (8,), generator=generator)
        share = 8 // world_size // accum_iter
        parts = [slice(i * share, (i + 1) * share) for i in range(rank * accum_iter, (rank + 1) * accum_iter)]
        finetune.train_step(iter([(images[p], labels[p]) for p in parts]), finetune.Training(network, optimizer), 1e-2, 0.1,
                            clip_grad=1.0, accum_iter=accum_iter)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/{world_size}.{accum_iter}.pth")


def of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for accum_iter in (1, 2):
        three_steps(rank, 2, accum_iter, folder)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    three_steps(0, 1, 1, tmp_path)
    multiprocessing.start_processes(of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # nothing is imported again
    one, two, parts = (engine.load_checkpoint(tmp_path / name) for name in ("1.1.pth", "2.1.pth", "2.2.pth"))
    assert len(one) > 50
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(parts[name], one[name], rtol=1e-6, atol=1e-7)


def start(*words, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [sys.executable, *launcher, "evaluation/classification_layer_decay/run_class_finetuning.py",
             *our_words([*TINY, *map(str, words)])]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()) if processes == 1 else "1"})


def test_two_processes_train_and_validate_as_one(digits, tmp_path):
    """The whole script, with augmentations that depend on the image's place: the same log and weights, though the two are
    stopped once (`torchrun` passes the signal on)."""
    words = [*PLAIN, "--data_path", digits, "--epochs", 1, "--clip_grad", 1]
    train(*words, "--output_dir", tmp_path / "one")
    two = [*words, "--batch_size", 8, "--output_dir", tmp_path / "two", "--resume", "auto", "--print_freq", 1]
    process = start(*two, processes=2)
    while "[2/7]" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopped by a signal at epoch 0, step ") == 1
    process = start(*two, processes=2)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed from" in out, errors
    one, two = (json.loads((tmp_path / name / "log.txt").read_text()) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3) and one.keys() == two.keys()
    a, b = (engine.load_checkpoint(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3
    records = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [len(r) for r in records] == [1, 1] and records[0][0]["settings"]["total_batch"] == records[1][0]["settings"]["total_batch"] == 16


# ---------------------------------------------------------------- runs

FULL = ["--model_ema", "--model_ema_decay", "0.9", "--clip_grad", "1", "--accum_iter", "2", "--batch_size", "8"]


def assert_same_run(a, b):
    assert len(everything(a)) > 150
    assert not [name for name in differences(a, b) if ".param_groups." not in name]  # their rates are set before each update


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An uninterrupted run, with all augmentations, drop path, EMA and accumulation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train("--data_path", digits, "--output_dir", folder, *FULL)
    return folder


@pytest.fixture
def at_fetch(monkeypatch):
    """at_fetch(n): SIGTERM while the n-th batch of this run, of training or validation, is waited for. Returns an undo."""
    def install(count):
        original, fetched = engine.StopSignals.wait_for, 0

        def counting(self, fetch):
            nonlocal fetched
            fetched += 1
            return original(self, (lambda: os.kill(os.getpid(), signal.SIGTERM)) if fetched == count else fetch)
        monkeypatch.setattr(engine.StopSignals, "wait_for", counting)
        return lambda: monkeypatch.setattr(engine.StopSignals, "wait_for", original)
    return install


def test_a_run_leaves_its_files(whole):
    assert {path.name for path in whole.iterdir()} - {".results.json.lock"} == {
        "checkpoint.pth", "checkpoint_previous.pth", "checkpoint-best.pth", "checkpoint-1.pth", "log.txt", "results.json", "tf_logs"}
    lines = [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"train_loss", "train_lr", "train_min_lr", "train_weight_decay", "train_grad_norm", "test_loss", "test_acc1", "test_acc5",
            "epoch", "n_parameters"} == lines[0].keys()  # no training accuracy of mixed images
    assert lines[0]["train_min_lr"] == pytest.approx(lines[0]["train_lr"] * 0.75**5)
    checkpoint, (record,) = engine.load_checkpoint(whole / "checkpoint.pth"), json.loads((whole / "results.json").read_text())
    assert checkpoint["epoch"] == 2 and checkpoint["progress"]["step"] == 0 and "model_ema" in checkpoint
    assert record["protocol"] == "finetune" and record["metrics"]["last"]["epoch"] == 1 and record["settings"]["lr"] == 2e-3
    best = max(line["test_acc1"] for line in lines)
    assert record["metrics"]["best"]["top1"] == best == checkpoint["progress"]["best"]["top1"]
    # The fine-tuned backbone is one for the other evaluations, and for timm.
    backbone = load_evaluated_backbone(whole / "checkpoint-best.pth", "model")
    assert backbone.arch == "vit_nano" and backbone.image_size == 32
    VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10).load_state_dict(checkpoint["model"])


def test_records_hold_what_sets_results_apart(whole):
    """Of records with equal settings the report shows the last one only."""
    (record,) = json.loads((whole / "results.json").read_text())
    elsewhere = {"pretrained_weights", "checkpoint_key", "batch_size_per_gpu", "accum_iter"}  # weights_hash, key, total_batch
    neutral = engine.FREE_FLAGS | {"results_dir", "download", "eval", "save_ckpt_freq", "on_nonfinite", "use_fp16", "amp_dtype",
                                  "model_ema", "model_ema_decay", "enable_deepspeed", "log_dir", "nb_classes", "out_dim"}
    assert not vars(parse()).keys() - record["settings"].keys() - elsewhere - neutral


@pytest.mark.parametrize("fetch", [1, 6, 15, 16, 20, 35])
def test_stopped_run_goes_on_bit_for_bit(fetch, whole, digits, tmp_path, at_fetch):
    """An epoch takes 14 batches for 7 updates, validation 4 and a look for a fifth: stops at a start, amid an update, in validation."""
    undo, words = at_fetch(fetch), ["--data_path", digits, "--output_dir", tmp_path, *FULL, "--resume", "auto"]
    epoch, place = divmod(fetch - 1, 19)
    with pytest.raises(engine.Preempted, match=f"epoch {epoch}, step {min(place // 2, 7)}, and saved"):
        train(*words)
    undo()
    train(*words)
    assert_same_run(tmp_path, whole)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


def test_saves_in_mid_epoch_and_finished_runs(whole, digits, tmp_path, monkeypatch, capsys):
    saved = []
    original = engine.Run.save
    monkeypatch.setattr(engine.Run, "save", lambda run, *args: saved.append((run.epoch, run.step)) or original(run, *args))
    words = ["--data_path", digits, "--output_dir", tmp_path, *FULL]
    train(*words, "--save_every_steps", 3)
    assert saved == [(0, 3), (0, 6), (1, 2), (1, 5), (2, 0)] or saved == [(0, 3), (0, 6), (1, 0), (1, 2), (1, 5), (2, 0)]
    assert_same_run(tmp_path, whole)
    before = (tmp_path / "results.json").read_text()
    found = train(*words, "--load_from", "auto")
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "results.json").read_text() == before
    (tmp_path / "results.json").unlink()  # as if it had been killed before it could write the record
    train(*words, "--load_from", "auto")
    records = [json.loads(text)[0] for text in (before, (tmp_path / "results.json").read_text())]
    assert all(records[0][name] == records[1][name] for name in ("protocol", "key", "settings", "metrics"))
    assert found["random"][2e-3][0]["best"] == engine.load_checkpoint(whole / "checkpoint.pth")["progress"]["best"]


def test_damaged_checkpoint_falls_back(whole, digits, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint.pth").unlink()  # not the linked files too
    (folder / "checkpoint.pth").write_bytes(b"damaged")
    train("--data_path", digits, "--output_dir", folder, *FULL, "--load_from", "auto")
    out = capsys.readouterr()
    assert "cannot be read safely" in out.err and f"resumed from {folder / 'checkpoint_previous.pth'}" in out.out
    assert_same_run(folder, whole)


@pytest.mark.parametrize("change", [
    {"step": -1}, {"step": 1.5}, {"totals": {"loss": 1.0}}, {"counts": {"loss": 0}, "totals": {"loss": 0.0}}, {"total_batch": 0},
    {"bad": [1]}, {"best": {"top1": "x", "epoch": 0}}, {"last": {"epoch": 0}}, {"more": 1}])
def test_progress_that_cannot_be_is_refused(change, whole, tmp_path):
    checkpoint = engine.load_checkpoint(whole / "checkpoint.pth")
    checkpoint["progress"] |= change
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    with pytest.raises(engine.InputError, match=str(tmp_path / "checkpoint.pth")):
        finetune.read_checkpoint(tmp_path / "checkpoint.pth")
    finetune.read_checkpoint(whole / "checkpoint.pth")


def test_other_weights_are_not_mixed_up(whole, pretrained, digits, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = ["--data_path", digits, "--output_dir", folder, *FULL, "--pretrained_weights", pretrained, "--load_from", "auto", "--epochs", 1]
    with pytest.raises(engine.InputError, match="began with other weights"):
        train(*words)
    train(*words, "--overwrite", "true")
    assert "starting over" in capsys.readouterr().out and len((folder / "log.txt").read_text().splitlines()) == 1


def test_another_task_is_not_resumed(whole, digits, tmp_path, capsys):
    """What `--load_from auto` finds must be this task: otherwise its result would be taken for that of other flags."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = ["--data_path", digits, "--output_dir", folder, *FULL, "--load_from", "auto"]
    for change in (["--train_subset", 0.5], ["--epochs", 5, "--train_subset", 0.5], ["--lr", 1e-3], ["--layer_decay", 0.9]):
        with pytest.raises(engine.InputError, match=f"its run had {change[-2]} .*--output_dir"):
            train(*words, *change)
    before = (folder / "log.txt").read_text()
    train(*words, "--overwrite", "true")  # this task: it is finished
    assert (folder / "log.txt").read_text() == before
    capsys.readouterr()
    train(*words, "--epochs", 3, "--lr", 1e-3)
    out = capsys.readouterr().out
    assert "note: --lr is 0.001, the checkpoint's run had 0.002" in out and "starting at epoch 2 of 3" in out
    train(*words, "--train_subset", 0.5, "--epochs", 1, "--overwrite", "true")
    assert "starting over" in capsys.readouterr().out and len((folder / "log.txt").read_text().splitlines()) == 1


def test_a_result_is_not_taken_for_that_of_other_images(whole, digits, tmp_path, at_fetch):
    """Another folder, as of the 10 % instead of the 1 %, with the same flags otherwise."""
    data, moved, folder = tmp_path / "data", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(digits, data)
    shutil.copytree(whole, folder)
    words = [*FULL, "--load_from", "auto", "--output_dir", folder, "--data_path"]
    assert train(*words, data)  # the same images elsewhere
    pictures = sorted((data / "train").rglob("*.png"))
    count = len(pictures)
    pictures[0].rename(pictures[0].with_name("other.png"))
    with pytest.raises(engine.InputError, match=f"its run had other training images, {count}, than the {count} here"):
        train(*words, data)
    shutil.rmtree(folder)
    undo = at_fetch(5)
    with pytest.raises(engine.Preempted):
        train(*words, data)
    undo()
    shutil.copytree(data, moved)
    for path in sorted((moved / "train").rglob("*.png"))[::2]:
        path.unlink()
    with pytest.raises(engine.InputError, match=f"its run had other training images, {count}, than the {count // 2} here"):
        train(*words, moved)
    (data / "train").joinpath(pictures[1].parent.name, pictures[1].name).unlink()  # one less of a run that goes on
    train(*words, data)
    assert json.loads((folder / "log.txt").read_text().splitlines()[-1])["epoch"] == 1


def test_eval_of_the_best_weights(whole, digits, capsys):
    found = train("--data_path", digits, "--output_dir", whole, "--eval")
    best = engine.load_checkpoint(whole / "checkpoint-best.pth")["progress"]["best"]
    assert found["random"][2e-3][0]["best"]["top1"] == pytest.approx(best["top1"]) and "checkpoint-best.pth" in capsys.readouterr().out


def test_sweep_of_rates(digits, tmp_path, capsys):
    words = ["--data_path", digits, "--output_dir", tmp_path, "--epochs", 1, "--lr", "1e-6,3e-3", *PLAIN]
    found = train(*words)
    out = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} - {".results.json.lock"} == {"lr_1e-06", "lr_0.003", "results.json"}
    best = max(found["random"], key=lambda rate: found["random"][rate][0]["best"]["top1"])
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["settings"]["lr"] == best and record["settings"]["swept"] == [1e-6, 3e-3]
    assert re.search(rf"lr {best:<8g} best .*<- best", out) and out.count("<- best") == 1
    assert json.loads((tmp_path / "lr_0.003" / "results.json").read_text())[0]["settings"]["lr"] == 3e-3
    train(*words, "--load_from", "auto")  # all finished
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


def test_rate_that_diverges_is_left_out_of_a_sweep(digits, tmp_path, capsys):
    words = ["--data_path", digits, "--epochs", 1, *PLAIN]
    found = train(*words, "--output_dir", tmp_path / "one", "--lr", "1e30,2e-3")
    out = capsys.readouterr().out
    assert list(found["random"]) == [2e-3] and "lr 1e+30 diverged: not finite at step " in out and out.count("<- best") == 1
    (record,) = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (record["settings"]["swept"], record["settings"]["diverged"]) == ([1e30, 2e-3], [1e30])
    assert record["settings"]["lr"] == 2e-3 and not (tmp_path / "one" / "lr_1e+30" / "results.json").exists()
    with pytest.raises(FloatingPointError, match="all rates of --lr 1e30,2e30 diverged for random"):
        train(*words, "--output_dir", tmp_path / "none", "--lr", "1e30,2e30")
    assert "lr 2e+30 diverged" in capsys.readouterr().out and not (tmp_path / "none" / "results.json").exists()


def sweep_of_two(rank, data, folder):
    """Images of the second process alone are no numbers, at the second update and the first rate."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    step, calls = finetune.train_step, []

    def poisoned(batches, *args, **kwargs):
        calls.append(1)
        images, labels = next(batches)
        return step(iter([(images * (math.nan if len(calls) == 2 and rank else 1), labels)]), *args, **kwargs)
    finetune.train_step = poisoned
    found = train("--data_path", data, "--output_dir", f"{folder}/run", "--epochs", 1, *PLAIN, "--batch_size", 8, "--lr", "1e-3,2e-3",
                  "--dist_url", f"file://{folder}/rendezvous")
    rates = {rate: validations["last"] for rate, (validations, _) in found["random"].items()}
    (folder / f"{rank}.json").write_text(json.dumps(rates))
    dist.destroy_process_group()


def test_processes_agree_that_a_rate_diverged(digits, tmp_path):
    multiprocessing.start_processes(sweep_of_two, (digits, tmp_path), nprocs=2, start_method="fork")
    one, two = ((tmp_path / f"{rank}.json").read_text() for rank in (0, 1))
    assert one == two and list(json.loads(one)) == ["0.002"]
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["settings"]["diverged"] == [1e-3] and record["settings"]["lr"] == 2e-3


def test_transfer_and_few_labels(pretrained, digits, tmp_path):
    """Both keys of a checkpoint, each in its folder; subsets; the projection head's layers; best files with the key."""
    words = ["--data_path", digits, "--pretrained_weights", pretrained, "--epochs", 1, "--batch_size", 8, "--train_subset", "0.4"]
    protocol = finetune.Protocol("semi_supervised", "checkpoint_KEY_cls.pth", later_wins=True)
    for layer in (0, 1):
        train(*words, "--finetune_head_layer", layer, "--output_dir", tmp_path / str(layer), "--checkpoint_key", "teacher,student",
              script=semi_cls, protocol=protocol)
        for key in ("teacher", "student"):
            assert (tmp_path / str(layer) / key / f"checkpoint_{key}_cls.pth").exists()
    records = json.loads((tmp_path / "1" / "results.json").read_text())
    assert [r["key"] for r in records] == ["teacher", "student"] and records[0]["settings"]["finetune_head_layer"] == 1
    assert records[0]["settings"]["train_images"] < 60


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("words, message", [
    (["--nb_classes", "1000"], "--nb_classes 1000: imagefolder train has 10 classes"),
    (["--lr", "1e-3,x"], "--lr 1e-3,x: expected a number"),
    (["--lr", "1e-3,1e-3"], "--lr .*twice"),
    (["--lr", "0"], "--lr 0: rates must be above 0"),
    (["--batch_size", "7"], "--batch_size_per_gpu 7: mixup and CutMix need an even number"),
    (["--layer_decay", "0"], "--layer_decay"),
    (["--seed", str(2**70)], "--seed must be below"),
    (["--mixup_prob", "2"], "--mixup_prob must lie in 0..1"),
    (["--drop_path", "1"], "--drop_path must lie in 0..1"),
    (["--cutmix_minmax", "0.5", "0.2"], "--cutmix_minmax"),
    (["--weight_decay", "-1"], "--weight_decay must not be negative"),
    (["--aa", "randd-m9"], "--aa randd-m9: no policy of timm"),
    (["--aa", "rand-x9"], "--aa rand-x9: no policy of timm"),
    (["--batch_size", "128"], "120 images are fewer than one batch of 128"),
    (["--finetune_head_layer", "1"], "random"),
    (["--arch", "swin_tiny", "--use_mean_pooling"], "a Swin has mode 0 only"),
    (["--load_from", "checkpoint.pth"], "checkpoint.pth does not exist"),
    (["--load_from", "auto", "--lr", "1e-3,2e-3", "--data_path", "/nowhere"], "/nowhere"),
    (["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth: no such file")])
def test_bad_input_is_refused_in_one_line(words, message, digits, tmp_path):
    with pytest.raises(engine.InputError, match=message) as caught:
        train("--data_path", digits, "--output_dir", tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, message", [
    (["--checkpoint_key", "techer"], "key 'techer' is not in the file; keys: teacher, student"),
    (["--arch", "vit_small"], "checkpoint.pth.*vit_small"),
    (["--finetune_head_layer", "3", "--arch", "vit_tiny"], "checkpoint.pth"),
    (["--finetune_head_layer", "3", "--out_dim", "8192"], "--out_dim 8192: the projection head of teacher has "),
    (["--finetune_head_layer", "1", "--checkpoint_key", "bare"], "holds no projection head .*; --finetune_head_layer 0 needs none")])
def test_weights_that_do_not_fit_are_refused(words, message, pretrained, digits, tmp_path):
    content = engine.load_checkpoint(pretrained)
    bare = {name: value for name, value in content["teacher"].items() if not name.startswith("head.")}
    pretrained = tmp_path / "checkpoint.pth"
    torch.save(content | {"bare": bare}, pretrained)
    with pytest.raises(engine.InputError, match=message):
        train("--data_path", digits, "--output_dir", tmp_path / "run", "--pretrained_weights", pretrained, *words)


def test_mistyped_flags_are_refused(capsys):
    for words in (["--layer_deca", "0.5"], ["--arch", "vit_smal"], ["--epochs", "0"], ["--model_ema", "maybe"]):
        with pytest.raises(SystemExit):
            parse(*words)
        assert words[0] in capsys.readouterr().err


def test_tasks_of_run_sh_have_flags_that_there_are(tmp_path):
    """The words of all eight tasks, as run.sh prints them."""
    tasks = ["imagenet_cls", "imagenet_semi_cls", "cifar_cls", "cifar10_cls", "cars_cls", "flwrs_cls", "inat_cls", "inat19_cls"]
    for arch in ("vit_small", "vit_large", "swin_tiny"):
        lines = subprocess.run(["bash", ROOT / "run.sh", "+".join(tasks), "job", arch, "teacher", "1"], cwd=ROOT, check=True, text=True,
                               capture_output=True, env={**os.environ, "DRY_RUN": "1", "OUTPUT_DIR": str(tmp_path)}).stdout.splitlines()
        assert len(lines) == len(tasks)
        for line in lines:
            words = shlex.split(line)
            script = {"run_class_finetuning.py": run_class_finetuning}.get(os.path.basename(words[1]),
                                                                           semi_cls if "semi" in words[1] else eval_cls)
            args = script.get_args_parser().parse_args(our_words(words[2:]))
            assert finetune.check_args(args) and args.arch == arch and args.load_from == "auto"
            if script is run_class_finetuning:  # on 8 GPUs the published batch
                assert 8 * args.batch_size_per_gpu * args.accum_iter == 1024


def test_a_folder_with_a_run_is_not_overwritten(whole, digits):
    with pytest.raises(engine.InputError, match="already holds a run .*--load_from auto"):
        train("--data_path", digits, "--output_dir", whole)


def test_the_pretrained_weights_are_not_overwritten(pretrained, digits, tmp_path):
    weights = tmp_path / "checkpoint.pth"
    shutil.copy(pretrained, weights)
    for words in ([], ["--load_from", "auto"]):
        with pytest.raises(engine.InputError, match="--overwrite would delete .*checkpoint.pth, the pre-trained weights; choose another"):
            train("--data_path", digits, "--output_dir", tmp_path, "--pretrained_weights", weights, "--overwrite", "true", *words)
    assert weights.read_bytes() == pretrained.read_bytes()


def test_losses_that_are_not_finite_end_the_run(digits, tmp_path, monkeypatch):
    original = finetune.build_network

    def broken(*args):
        model, source = original(*args)
        with torch.no_grad():
            model.head.bias[0] = math.nan
        return model, source
    monkeypatch.setattr(finetune, "build_network", broken)
    with pytest.raises(FloatingPointError, match="not finite at step 0: loss nan"):
        train("--data_path", digits, "--output_dir", tmp_path)


def test_updates_that_are_not_finite_are_dropped_and_logged(digits, tmp_path, monkeypatch, capsys):
    step, calls = finetune.train_step, []

    def poisoned(batches, *args, **kwargs):
        calls.append(1)
        images, labels = next(batches)
        return step(iter([(images * (math.nan if len(calls) == 3 else 1), labels)]), *args, **kwargs)
    monkeypatch.setattr(finetune, "train_step", poisoned)
    train("--data_path", digits, "--output_dir", tmp_path, "--on_nonfinite", "skip", "--epochs", 1, *PLAIN)
    assert "warning: step 2 dropped, not finite: loss nan" in capsys.readouterr().out
    assert math.isfinite(json.loads((tmp_path / "log.txt").read_text())["train_loss"])


def test_too_many_bad_images_end_the_run(digits, tmp_path, at_fetch):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for path in sorted((data / "train").rglob("*.png"))[:20]:
        path.write_bytes(b"no image")
    with pytest.raises(engine.InputError, match="images cannot be read, more than --max_bad_images 0.01"):
        train("--data_path", data, "--output_dir", tmp_path / "run")
    words = ["--data_path", data, "--output_dir", tmp_path / "again", "--max_bad_images", 0.5, "--epochs", 1, "--resume", "auto"]
    undo = at_fetch(5)
    with pytest.raises(engine.Preempted):
        train(*words)
    undo()
    before = engine.load_checkpoint(tmp_path / "again/checkpoint.pth")["progress"]["bad"]
    train(*words)
    names = (tmp_path / "again/bad_images.txt").read_text().splitlines()
    assert 0 < len(before) < len(names) <= 20 and set(before) < set(names) and names == sorted(names)


def test_killed_and_stopped_script_ends_as_undisturbed(whole, digits, tmp_path):
    """kill -9 in the middle of a save, then a signal: saved, with the exit code that schedulers take as `go on later`."""
    words = ["--data_path", digits, "--output_dir", tmp_path, *FULL, "--resume", "auto", "--save_every_steps", 1, "--num_workers", 1]
    newest = tmp_path / "checkpoint.pth"
    process = start(*words)
    wait_for(lambda: (tmp_path / "checkpoint_previous.pth").exists(), process)
    wait_for(lambda: list(tmp_path.glob(".checkpoint*")), process)
    process.kill()
    process.communicate()
    assert engine.load_checkpoint(newest)["progress"]["step"] > 0
    before = newest.stat().st_mtime_ns
    process = start(*words)
    wait_for(lambda: newest.stat().st_mtime_ns > before, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == engine.EXIT_PREEMPTED == 75
    assert "and saved: the same command with --load_from auto goes on" in errors and errors.count("\n") == 1
    train(*words)
    assert not list(tmp_path.glob(".checkpoint*"))
    assert_same_run(tmp_path, whole)


def test_disk_full_while_saving(whole, digits, tmp_path, capsys, file_limit):
    words = ["--data_path", digits, "--output_dir", tmp_path, *FULL, "--resume", "auto"]
    good = (whole / "checkpoint_previous.pth").read_bytes()  # after epoch 0
    (tmp_path / "checkpoint.pth").write_bytes(good)
    file_limit(len(good) // 2)
    with pytest.raises(engine.InputError, match="checkpoint.pth could not be written .*; the checkpoints before it are intact"):
        train(*words, "--on_save_error", "stop")
    capsys.readouterr()
    train(*words)
    captured = capsys.readouterr()
    assert "could not be written" in captured.err and "epoch 1 done" in captured.out
    assert (tmp_path / "checkpoint.pth").read_bytes() == good and not list(tmp_path.glob(".checkpoint*"))
    file_limit(resource.RLIM_INFINITY)
    train(*words)
    assert not [name for name in differences(tmp_path, whole) if name.startswith("model")]
