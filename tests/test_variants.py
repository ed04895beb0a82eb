"""Sinkhorn-Knopp and KoLeo against their definitions in float64; two processes equal one."""
import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

import engine
import loader
import main_ibot
import models
import utils
import variants

LOGITS = 0.1 * torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TEMP = 0.03


def sinkhorn(logits, temp, iterations=3):
    """Targets as SwAV writes them, with K prototypes as rows."""
    q = np.exp(logits.numpy() / temp).T  # [K, n]
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return torch.from_numpy(q.T * q.shape[1])


def koleo(features):
    x = [row / row.norm() for row in features]
    return -sum(min((a - b).norm() for j, b in enumerate(x) if j != i).log() for i, a in enumerate(x)) / len(x)


def targets(logits, center):
    return ((logits - center) / TEMP).softmax(-1)


def test_sinkhorn_center_gives_its_targets():
    expected = sinkhorn(LOGITS, TEMP)
    torch.testing.assert_close(targets(LOGITS, variants.sinkhorn_center(LOGITS, TEMP)), expected, rtol=1e-10, atol=0)
    assert (targets(LOGITS, 0).sum(0) - expected.sum(0)).abs().max() > 1  # it does something
    many = targets(LOGITS, variants.sinkhorn_center(LOGITS, TEMP, iterations=200)).sum(0)
    torch.testing.assert_close(many, torch.full_like(many, 12 / 7))  # all outputs alike

    padded = torch.cat((LOGITS[:5], torch.randn(3, 7, dtype=torch.float64), LOGITS[5:]))
    rows = torch.tensor([True] * 5 + [False] * 3 + [True] * 7)
    torch.testing.assert_close(variants.sinkhorn_center(padded, TEMP, rows), variants.sinkhorn_center(LOGITS, TEMP))
    half = variants.sinkhorn_center(LOGITS.bfloat16(), TEMP)
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert variants.sinkhorn_center(1e4 * LOGITS.float(), TEMP).isfinite().all()


def test_koleo_equals_its_definition():
    x = FEATURES.clone().requires_grad_()
    expected, = torch.autograd.grad(koleo(x), x)
    value = variants.koleo(x)
    torch.testing.assert_close(value, koleo(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected, rtol=1e-6, atol=1e-9)
    assert variants.koleo(FEATURES[:2].repeat(3, 1)).isfinite()  # equal ones


def shares(rank, folder):
    """Process 0 saves the centre and the gradient for its features; process 1 has fewer logits, and the third call none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    logits, x = LOGITS.tensor_split([8])[rank], FEATURES.chunk(2)[rank].clone().requires_grad_()
    (variants.koleo(x) / 2).backward()  # the mean over processes, as data parallelism takes it
    centers = [variants.sinkhorn_center(part, TEMP) for part in (logits, LOGITS if rank else LOGITS[:0], LOGITS[:0])]
    if rank == 0:
        torch.save({"grad": x.grad, "centers": torch.stack(centers)}, f"{folder}/out.pth")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    multiprocessing.start_processes(shares, (str(tmp_path),), nprocs=2, start_method="fork")
    found, x = engine.load_checkpoint(tmp_path / "out.pth"), FEATURES.clone().requires_grad_()
    variants.koleo(x).backward()
    torch.testing.assert_close(found["grad"], x.grad[:6])
    for center in found["centers"][:2]:
        torch.testing.assert_close(center, variants.sinkhorn_center(LOGITS, TEMP))
    assert not found["centers"][2].isfinite().any()  # no row anywhere


def test_sinkhorn_in_the_loss():
    """Both targets are Sinkhorn's of this very batch; padding does not count; what is not finite leaves the centres."""
    module = main_ibot.iBOTLoss(7, 7, np.array([TEMP]), np.array([0.05])).double()
    module.sinkhorn = True
    student, weight = torch.randn(12, 7, dtype=torch.float64), torch.tensor([0.2] * 10 + [0.0] * 2, dtype=torch.float64)
    losses = module(student, student, LOGITS, LOGITS, None, weight, 2, 0)
    cls, patch = sinkhorn(LOGITS, TEMP), sinkhorn(LOGITS[:10], 0.05)
    log_p = (student / 0.1).log_softmax(-1)
    assert abs(losses["cls"] + (cls * log_p.roll(6, 0)).sum(-1).mean()) < 1e-10  # two crops of six images
    assert abs(losses["patch"] + 0.2 * (patch * log_p[:10]).sum()) < 1e-10
    before = module.center.clone(), module.center2.clone()
    assert module.update_centers(torch.tensor(True))
    module(student, student[:0], LOGITS * torch.nan, LOGITS[:0], None, weight[:0], 2, 0)
    assert not module.update_centers(torch.tensor(True))
    assert torch.equal(module.center, before[0]) and torch.equal(module.center2, before[1])


def test_koleo_enters_the_total():
    """Of the student's masked global crops, one crop after the other; local crops have no part in it."""
    torch.manual_seed(0)
    student, teacher = (models.MultiCropWrapper(models.vit_nano(patch_size=8, img_size=32, masked_im_modeling=own),
                                                models.iBOTHead(96, 32, hidden_dim=32, shared_head=True)) for own in (True, False))
    masks = torch.rand(2, 6, 4, 4) < 0.4
    weight = (1 / masks.sum((2, 3)).clamp(min=1) / 12)[:, :, None, None].expand_as(masks)[masks]
    batch = loader.Batch(torch.randn(2, 6, 3, 32, 32), torch.randn(1, 6, 3, 16, 16), torch.zeros(6), masks,
                         masks.flatten().nonzero().flatten(), weight)
    features = [student.backbone(crops, mask=mask).detach() for crops, mask in zip(batch.global_crops, masks, strict=True)]
    loss = main_ibot.iBOTLoss(32, 32, [TEMP], [TEMP])
    loss.koleo = 0.5
    optimizer = utils.build_optimizer("sgd", utils.get_params_groups(student), torch.device("cpu"))
    training = main_ibot.Training(student, teacher.requires_grad_(False), utils.ema_pairs(student, teacher), loss, optimizer)
    means, *_ = main_ibot.train_step(iter([batch]), training, 0, 0.1, 0.0, 0.9, 0.0, freeze_last_layer=False)
    torch.testing.assert_close(means["loss"] - means["cls"] - means["patch"], 0.5 * sum(koleo(x) for x in features), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- patches of the other view

UPRIGHT, FLIPPED = (False, False, 0), (True, False, 0)


def test_position_targets():
    boxes = [(0, 0, 80, 80), (36, 22, 60, 60)]
    centers = variants.cell_centers(boxes[1], FLIPPED, 2).reshape(-1, 2)
    assert centers.tolist() == [[81, 37], [51, 37], [81, 67], [51, 67]]
    assert variants.position_targets(boxes, [UPRIGHT, FLIPPED], 2).tolist() == [[[-1, -1], [-1, 3]], [[-1, 1], [-1, 3]]]
    same = variants.position_targets([(3, 4, 50, 70)] * 2, [UPRIGHT, UPRIGHT], 3)
    assert same.reshape(2, -1).tolist() == [list(range(9))] * 2
    mirrored = variants.position_targets([(3, 4, 50, 70)] * 2, [UPRIGHT, FLIPPED], 3)
    assert mirrored[0].tolist() == mirrored[1].tolist() == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
    assert (variants.position_targets([(0, 0, 10, 10), (10, 0, 10, 10)], [UPRIGHT] * 2, 2) == -1).all()


def test_cell_centers_turn_as_crops_do():
    """A cell holds the pixels that its centre lies in, whatever the turn."""
    pixels = torch.arange(36).view(6, 6).expand(3, 6, 6).permute(1, 2, 0).to(torch.uint8).numpy()
    transform = loader.MultiCropAugmentation(1, global_crops_size=6)
    for turn in [(flip, down, quarters) for flip in (False, True) for down in (False, True) for quarters in range(4)]:
        crop, = transform.cut(pixels, [(0, 0, 6, 6)], [turn])
        centers = variants.cell_centers((0, 0, 6, 6), turn, 6)
        assert (centers[..., 1] // 1 * 6 + centers[..., 0] // 1 == crop[0].numpy()).all()


def test_match_features():
    own = torch.tensor([[1., 0], [0, 1], [1, 1], [-1, 0]]), torch.tensor([[0., 2], [1, .2], [-1, -1], [3, 3]])
    for scale in (1, 7):
        student = torch.cat(own) * torch.linspace(1, scale, 8)[:, None]
        assert variants.match_features(student, torch.cat(own), 1).tolist() == [5, 4, 7, 6, 1, 0, 3, 2]


T_U, T_V = .1 * torch.tensor([[1., 0], [0, 1], [0, 0], [2, 0]]), .1 * torch.tensor([[0., 1], [1, 0], [0, 0], [0, 2]])
S_U, S_V = .1 * torch.tensor([[0., 0], [0, 0], [0, 0], [1, 0]]), .1 * torch.tensor([[0., 0], [1, 0], [0, 0], [0, 1]])


def test_position_loss():
    """The worked example of two patches of which one view has one and the other two in the overlap."""
    grids = variants.position_targets([(0, 0, 80, 80), (36, 22, 60, 60)], [UPRIGHT, FLIPPED], 2)
    batch = loader.collate([([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2, 0, list(grids))])
    module = main_ibot.iBOTLoss(2, 2, [0.1], [0.1]).double()
    module.match = "position"
    rows = variants.teacher_cells(batch.mask_index, batch, module)
    assert batch.mask_index.tolist() == [3, 5, 7] and rows.tolist() == [7, 1, 3]
    loss = main_ibot.patch_cross_entropy(torch.cat((S_U, S_V)).double()[batch.mask_index], torch.cat((T_U, T_V)).double()[rows],
                                         batch.mask_weight, 0, 0.1, 0.1)
    assert abs(loss - 1.156624) < 1e-6
