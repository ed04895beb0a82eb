"""Every faster or leaner path of the step against the plain one: padded, accumulated, checkpointed, compiled, in pieces."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from test_loss import NANO, B, build, make_batch, some_masks
from timm.layers import DropPath
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch.nn import functional as F

import engine
import loader
import main_ibot
import models
import utils


def run(batches, networks, steps=1, **kwargs):
    """SGD steps; returns losses, gradients, centres and the moved parameters by name."""
    student, teacher, ibot_loss = networks
    optimizer = torch.optim.SGD(utils.get_params_groups(student), lr=0.0)
    for step in range(steps):
        torch.manual_seed(step)
        losses, *_ = main_ibot.train_step(
            batches, main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer),
            epoch=1, lr=0.01, weight_decay=0.1, momentum=0.9, clip_grad=3.0, freeze_last_layer=False, **kwargs)
    return {**losses, **dict(ibot_loss.named_buffers()), **{f"grad of {n}": p.grad for n, p in student.named_parameters()},
            **{f"student {n}": p.detach() for n, p in student.named_parameters()},
            **{f"teacher {n}": p for n, p in teacher.named_parameters()}}


def assert_same(actual, expected, tolerance=1e-10, skip=()):
    assert actual.keys() == expected.keys()
    for name in actual.keys() - set(skip):
        assert (actual[name] - expected[name]).abs().max() < tolerance, name


def pad(batch, multiple):
    """As `loader.collate` pads: more cells of index 0, without weight."""
    more = -len(batch.mask_index) % multiple
    return batch._replace(mask_index=torch.cat((batch.mask_index, batch.mask_index.new_zeros(more))),
                          mask_weight=torch.cat((batch.mask_weight, batch.mask_weight.new_zeros(more))))


def test_padding_changes_nothing():
    networks = build(2, 3)
    batch = make_batch(2, 3, some_masks(2))
    expected = run([batch], copy.deepcopy(networks))
    padded = pad(batch, 64)
    assert len(padded.mask_index) == 64 > len(batch.mask_index)
    assert_same(run([padded], networks), expected)


def test_accumulated_batches_equal_one_large_batch():
    networks = build(2, 3)
    parts = [make_batch(2, 3, some_masks(2)) for _ in range(3)]
    assert len({len(part.mask_index) for part in parts}) > 1  # unlike numbers of patches must not weigh
    # The large batch: images side by side, each mask with its own weight.
    masks = torch.cat([part.masks for part in parts], dim=1)
    cells = torch.zeros(2, 3 * B, 16, dtype=torch.float64)
    for i, part in enumerate(parts):
        own = torch.zeros(2 * B * 16, dtype=torch.float64)
        own[part.mask_index] = part.mask_weight / 3
        cells[:, i * B:(i + 1) * B] = own.view(2, B, 16)
    index = masks.flatten().nonzero().flatten()
    large = loader.Batch(torch.cat([part.global_crops for part in parts], dim=1), torch.cat([part.local_crops for part in parts], dim=1),
                         torch.zeros(3 * B), masks, index, cells.flatten()[index])
    expected = run([large], copy.deepcopy(networks))
    assert_same(run(iter(parts), networks, accum_iter=3), expected)


@pytest.mark.parametrize("arch", ["vit_nano", "swin_tiny"])
def test_checkpointed_gradients_are_the_same(arch):
    """With drop path, whose draws must come again in the backward pass."""
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        backbone = models.build_backbone(arch, patch_size=16, img_size=64, drop_path_rate=0.5).train().double()
        backbone.set_grad_checkpointing(on)
        torch.manual_seed(1)
        x = backbone.forward_crops([torch.randn(3, 3, 64, 64).double(), torch.randn(4, 3, 32, 32).double()], wanted=torch.arange(3))[0]
        x.square().sum().backward()
        results.append({"out": x.detach(), **{n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}})
    assert len(results[0]) > 20
    assert_same(*results)


def test_packed_drop_path_follows_the_rule():
    """Drawn per crop, block and branch with timm's rates; kept branches are scaled up, and all tokens of a crop agree."""
    model = models.vit_nano(patch_size=16, img_size=64, drop_path_rate=0.6)
    torch.manual_seed(0)
    shapes = ((2000, 3), (1000, 2))
    scales = model._drop_scales(shapes, torch.device("cpu"))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert len(scales) == len(rates) == 4 and rates[-1] == pytest.approx(0.6)
    for scale, rate in zip(scales, rates, strict=True):
        assert scale.shape == (2, 8000, 1)
        first, second = scale[:, :6000, 0].unflatten(1, (2000, 3)), scale[:, 6000:, 0].unflatten(1, (1000, 2))
        assert (first == first[..., :1]).all() and (second == second[..., :1]).all()
        drawn = torch.cat((first[..., 0], second[..., 0]), dim=1)  # [2, 3000]
        assert ((drawn == 0) | torch.isclose(drawn, torch.tensor(1 / (1 - rate)))).all()
        assert abs((drawn == 0).float().mean() - rate) < 4 * np.sqrt(0.25 / 6000)
    assert not torch.equal(scales[-1][0], scales[-1][1])
    assert model.eval()._drop_scales(shapes, torch.device("cpu")) is None


@pytest.mark.parametrize("hard", [False, True])
def test_pieces_of_the_patch_loss(hard):
    args = [torch.randn(10, 7, dtype=torch.float64) for _ in range(2)] + [torch.rand(10, dtype=torch.float64), torch.randn(7).double(), 0.1, 0.05]
    gradients, values = [], []
    for loss in (main_ibot.patch_cross_entropy, utils.in_pieces(main_ibot.patch_cross_entropy, size=21)):
        student = args[0].clone().requires_grad_()
        values.append(loss(student, *args[1:], hard=hard))
        values[-1].backward()
        gradients.append(student.grad)
    assert abs(values[0] - values[1]) < 1e-12 and torch.allclose(*gradients, atol=1e-14)


# Two shifted blocks in each of two stages; 64 pixels are 16 x 16 tokens, which do not divide into windows of 7.
SWIN = partial(models.swin_transformer.SwinTransformer, embed_dim=12, depths=(2, 2, 1, 1), num_heads=(1, 1, 2, 2), drop_path_rate=0.3)
HEADS = {"shared": {}, "separate": {"shared": False, "shared_teacher": False, "patch_out_dim": 17, "common_layers": 2}, "bn": {"norm": "bn"}, "ln": {"norm": "ln"}}


def swin_batch(local):
    """Global crops, and where `local` is true local ones."""
    masks = torch.rand(2, B, 2, 2) < 0.5
    masks[0, 0], masks[1, 0] = True, False
    index = masks.flatten().nonzero().flatten()
    local_crops = torch.randn(1, B, 3, 32, 32).double() if local else None
    return loader.Batch(torch.randn(2, B, 3, 64, 64).double(), local_crops, torch.zeros(B), masks, index, torch.rand(len(index)).double())


@pytest.mark.parametrize("arch", ["vit", "swin"])
@pytest.mark.parametrize("head, recompute", list(zip(HEADS, models.RECOMPUTE, strict=True)))
def test_compiled_networks_are_the_same(arch, head, recompute):
    """Two steps with drop path and masks: every kind of head, every choice of what is computed again."""
    torch.manual_seed(4)
    batches = [make_batch(2, 1, some_masks(2)) if arch == "vit" else swin_batch(local=head == "shared") for _ in range(2)]
    backbone = SWIN if arch == "swin" else partial(NANO, registers=2) if head == "separate" else NANO
    networks = build(2, 1, **HEADS[head], backbone=backbone)
    plain = copy.deepcopy(networks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for network in networks[:2]:
        network.backbone.set_grad_checkpointing(recompute == "blocks")
        network.compile_parts(recompute, backend="aot_eager_decomp_partition")
    for batch in batches:
        assert_same(run([batch], networks), run([batch], plain), tolerance=1e-9)
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["recompile_limit"]
    # A Swin has six kinds of block, three merges and an embedding, on two sizes of crops, and on one in the teacher; the
    # rest are the head's.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (4 if arch == "vit" else 30) + 8


def test_inductor_compiles_shifted_blocks_once():
    torch.manual_seed(5)
    blocks = SWIN(depths=(4, 1, 1, 1)).double().layers[0].blocks
    compiled = models.multi_crop.compiled(models.swin_transformer.PadThenShiftBlock.forward, "elementwise", dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    grids = [torch.randn(2, 8, 8, 12).double().requires_grad_() for _ in range(2)]
    for x, call in zip(grids, (compiled, models.swin_transformer.PadThenShiftBlock.forward), strict=True):
        x.data, y = grids[0].data, x
        for block in blocks[1::2]:
            y = call(block, y, block.shift_mask(8, 8, x.device))
        y.square().sum().backward()
    assert torch.allclose(grids[0].grad, grids[1].grad, atol=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("size", [(14, 14), (9, 16)])
def test_swin_attention_is_timms(size):
    """One bias for all images against timm's plain attention, which writes the mask out for each window of the batch."""
    torch.manual_seed(6)
    for block in SWIN().double().layers[1].blocks:
        block.attn.relative_position_bias_table.data.normal_()
        x = torch.randn(3, *size, 24, dtype=torch.float64)
        mask = block.shift_mask(*size, x.device)
        assert (mask is None) == (not any(block.shift_size))
        padded = F.pad(x, (0, 0, 0, -size[1] % 7, 0, -size[0] % 7))
        H, W = padded.shape[1:3]
        if mask is not None:
            padded = padded.roll((-3, -3), dims=(1, 2))
        block.attn.fused_attn = False
        windows = WindowAttention.forward(block.attn, window_partition(padded, (7, 7)).flatten(1, 2), mask)
        expected = window_reverse(windows.unflatten(1, (7, 7)), (7, 7), H, W)
        if mask is not None:
            expected = expected.roll((3, 3), dims=(1, 2))
        assert torch.allclose(block.attend(x, mask), expected[:, :size[0], :size[1]], atol=1e-12)


def test_swin_drops_what_fine_tuning_sets():
    """`forward` follows the rate in the blocks' own DropPath and the attention's dropout, in training alone."""
    torch.manual_seed(7)
    model, x = SWIN(drop_path_rate=0.0), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        plain = model.eval()(x)
        assert torch.equal(model.train()(x), plain)
        last = model.layers[-1].blocks[-1]
        last.attn.attn_drop.p = 0.5
        assert not torch.equal(model(x), plain) and torch.equal(model.eval()(x), plain)
        last.attn.attn_drop.p, last.drop_path1 = 0.0, DropPath(0.5)
        assert not torch.equal(model.train()(x), plain) and torch.equal(model.eval()(x), plain)


def test_compiled_step_is_the_same_and_compiles_once():
    """Inductor on CPU; the number of masked patches changes from step to step, the compiled programs do not."""
    torch.manual_seed(3)
    batches = [pad(make_batch(2, 3, torch.rand(2, B, 4, 4) < share), 16) for share in (0.2, 0.5, 0.8, 0.4, 0.9, 0.0)]
    batches[-1] = batches[-1]._replace(mask_index=torch.zeros(16, dtype=torch.int64), mask_weight=torch.zeros(16).double())
    assert len({len(batch.mask_index) for batch in batches}) > 2
    networks = build(2, 3)
    plain = copy.deepcopy(networks)
    for network in networks[:2]:
        network.compile_parts("elementwise")
    networks[2].compile()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for batch in batches:
        expected = run([batch], plain)
        assert_same(run([batch], networks), expected, tolerance=1e-9)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] <= 14, graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_recompute_flags():
    def choose(*words, compiled=True):
        args = main_ibot.get_args_parser().parse_args(words)
        return models.choose_recompute(args.recompute, args.grad_checkpointing, compiled)
    assert choose() == "elementwise" and choose(compiled=False) == "none"
    assert choose("--grad_checkpointing", "true") == choose("--recompute", "blocks", compiled=False) == "blocks"
    with pytest.raises(engine.InputError, match="--recompute half is left to the compiler"):
        choose("--recompute", "half", compiled=False)
    with pytest.raises(engine.InputError, match="give one of them"):
        choose("--recompute", "none", "--grad_checkpointing", "true")
