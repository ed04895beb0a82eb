"""The detector's parts against plain definitions and numbers worked out by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, generalized_box_iou_loss

from evaluation.object_detection import cascade
from evaluation.object_detection.cascade import (
    Anchors,
    BoxCoder,
    CascadeMaskRCNN,
    assign_anchors,
    box_levels,
    mask_targets,
    paste_mask,
    pool_boxes,
    sample_boxes,
)


class Maps(nn.Module):
    """A backbone of one convolution a map."""

    def __init__(self, channels=16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, channels, stride, stride) for stride in (4, 8, 16, 32))

    def forward(self, images):
        return [layer(images) for layer in self.layers]


def small_detector(num_classes=3, **options):
    torch.manual_seed(0)
    return CascadeMaskRCNN(Maps(), [16] * 4, num_classes, **{"channels": 16, "hidden": 32, "sampled": 32,
                                                             "proposals": (100, 50), **options})


def random_boxes(n, size=128, generator=None):
    corner = torch.rand(n, 2, generator=generator) * size * 0.7
    return torch.cat((corner, corner + 4 + torch.rand(n, 2, generator=generator) * size * 0.3), dim=1)


# ---------------------------------------------------------------- boxes

def test_coder():
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    proposal, truth = torch.tensor([[10.0, 20, 50, 100]]), torch.tensor([[20.0, 30, 60, 90]])
    code = coder.encode_single(truth, proposal)
    assert torch.allclose(code, torch.tensor([[2.5, 0, 0, -1.43841]]), atol=1e-5)
    assert torch.allclose(coder.decode_single(code, proposal), truth, atol=1e-4)
    most = math.log(1000 / 16)  # 4.135: sizes of 62.5 times, and of 1 / 62.5
    for way in (1, -1):
        box = coder.decode_single(torch.tensor([[0, 0, way * 1e3, way * 1e3]]), proposal)[0]
        assert torch.allclose(box[2:] - box[:2], torch.tensor([40.0, 80]) * math.exp(way * most), rtol=1e-4)


def test_anchors():
    maps = [torch.zeros(1, 1, math.ceil(800 / stride), math.ceil(96 / stride)) for stride in cascade.STRIDES]
    found = Anchors()(ImageList(torch.zeros(1, 3, 800, 96), [(800, 96)]), maps)[0]
    assert torch.allclose(found[:3, 2:], torch.tensor([[22.6274, 11.3137], [16, 16], [11.3137, 22.6274]]), atol=1e-3)
    expected = []
    for stride, features in zip(cascade.STRIDES, maps, strict=True):
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                for ratio in (0.5, 1, 2):
                    height, width = 8 * stride * math.sqrt(ratio), 8 * stride / math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert torch.allclose(found, torch.tensor(expected), atol=1e-3)
    assert maps[-1].shape[2] == 13 and found[-1, 1] + found[-1, 3] == pytest.approx(2 * 12 * 64, abs=1e-3)


def plain_assignment(anchors, truth, size):
    """The rule in words, one anchor and one box at a time."""
    overlap = box_iou(truth, anchors) if len(truth) else torch.zeros(0, len(anchors))
    labels, matched = torch.full((len(anchors),), -1.0), torch.zeros(len(anchors), dtype=torch.int64)
    usable = [a for a, (x1, y1, x2, y2) in enumerate(anchors.tolist()) if x1 >= 0 and y1 >= 0 and x2 < size[1] and y2 < size[0]]
    for a in usable:
        best = max(overlap[:, a].tolist(), default=0)
        labels[a] = 1 if best >= 0.7 else 0 if best < 0.3 else -1
        if len(truth):
            matched[a] = overlap[:, a].tolist().index(best)
    for g in range(len(truth)):
        best = max((overlap[g, a].item() for a in usable), default=0)
        for a in usable:
            if best >= 0.3 and overlap[g, a] == best:
                labels[a], matched[a] = 1, g
    return labels, matched


def test_assignment_of_anchors_by_its_rule():
    generator = torch.Generator().manual_seed(1)
    for count in (0, 1, 4, 4, 4):
        anchors, truth = random_boxes(300, generator=generator), random_boxes(count, generator=generator)
        if count == 4:
            truth[1] = truth[0]  # ties between boxes; and between anchors:
            anchors[7] = anchors[8]
            truth[2] = anchors[7]
        labels, matched = assign_anchors(anchors, truth, (120, 110))
        expected, number = plain_assignment(anchors, truth, (120, 110))
        assert torch.equal(labels, expected)
        assert torch.equal(matched[labels == 1], number[labels == 1])


def test_least_overlap_and_border_of_anchors():
    truth = torch.tensor([[0.0, 0, 40, 40]])
    for overlap, label in ((0.25, 0), (0.35, 1)):  # nothing overlaps the box more
        assert assign_anchors(torch.tensor([[0, 0, 40, 40 * overlap]]), truth, (64, 64))[0] == label
    for right, label in ((63.9, 1), (64, -1)):  # up to the border is out
        box = torch.tensor([[24, 0, right, 40]])
        assert assign_anchors(box, box, (64, 64))[0] == label
    assert (assign_anchors(torch.tensor([[-9.0, 0, 80, 80]]), truth, (64, 64))[0] == -1).all()


def test_sampling():
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    sampler = BalancedPositiveNegativeSampler(512, 0.25)
    near, far = torch.tensor([[0.0, 0, 10, 9]]), torch.tensor([[50.0, 50, 60, 60]])
    boxes, labels, _, is_truth = sample_boxes(torch.cat((near.expand(200, 4), far.expand(800, 4))), truth, 0.5, 3, sampler)
    assert len(boxes) == 512 and (labels == 2).sum() == 128 and is_truth.sum() <= 1
    boxes, labels, _, is_truth = sample_boxes(torch.cat((near.expand(9, 4), far.expand(30, 4))), truth, 0.5, 3, sampler)
    assert len(boxes) == 40 and (labels == 2).sum() == 10 and is_truth.sum() == 1  # too few: all are taken
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert (sample_boxes(far.expand(600, 4), nothing, 0.5, 3, sampler)[1] == 3).sum() == 512
    drawn = torch.zeros(200)
    for seed in range(200):  # each positive is as likely
        torch.manual_seed(seed)
        drawn += BalancedPositiveNegativeSampler(32, 0.25)([torch.ones(200, dtype=torch.int64)])[0][0]
    assert 8 - 0.01 < drawn.mean() < 8.01 and drawn.max() < 24


@pytest.mark.parametrize("overlap, stages", [(0.45, 0), (0.55, 1), (0.65, 2), (0.75, 3)])
def test_a_box_is_positive_in_the_stages_that_its_overlap_allows(overlap, stages):
    truth = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([1])}
    proposal = torch.tensor([[0, 0, 100, 100 * overlap]])
    found = [sample_boxes(proposal, truth, threshold, 3, BalancedPositiveNegativeSampler(512, 0.25))[1]
             for threshold in cascade.IOU_OF_STAGE]
    assert [labels.tolist() for labels in found] == [[1, 1 if stage < stages else 3] for stage in range(3)]


# ---------------------------------------------------------------- pooling and masks

def test_levels():
    sides = torch.tensor([10, 111.9, 112, 223.9, 224, 447, 448, 2000])
    assert box_levels(torch.stack((0 * sides, 0 * sides, sides, sides), dim=1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pooling_of_a_ramp():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)  # stride 4: value = column
    maps = [ramp, *(torch.full((1, 1, side, side), float("nan")) for side in (16, 8, 4))]
    pooled = pool_boxes(maps, [torch.tensor([[16.0, 16, 72, 72]])], 7)
    assert torch.allclose(pooled[0, 0, 3], torch.arange(7) * 2 + 4.5)
    assert torch.allclose(pooled[0, 0, :, 3], torch.full((7,), 10.5))


def test_pooling_takes_each_box_from_its_own_image_and_map():
    maps = [torch.full((2, 1, 64 // 2**i, 64 // 2**i), float(i)) + 10 * torch.arange(2.0)[:, None, None, None] for i in range(4)]
    boxes = [torch.tensor([[0, 0, 120.0, 120], [0, 0, 20, 20]]), torch.tensor([[0, 0, 250.0, 250]])]
    assert pool_boxes(maps, boxes, 7).mean(dim=(1, 2, 3)).tolist() == [1, 0, 12]


def test_target_of_a_box_that_is_its_own_mask():
    masks = torch.zeros(2, 100, 120, dtype=torch.bool)
    masks[1, 20:70, 30:95] = True
    box = torch.tensor([[30.0, 20, 95, 70]])
    assert mask_targets(masks, box, torch.tensor([1])).all()
    half = mask_targets(masks, torch.tensor([[30.0, 20, 160, 70]]), torch.tensor([1]))[0]  # the right half is beside it
    assert half[:, :13].all() and not half[:, 15:].any()


@pytest.mark.parametrize("radius, least", [(10, 0.99), (25, 0.96), (50, 0.97)])
def test_target_of_a_disc_pasted_back(radius, least):
    y, x = torch.meshgrid(torch.arange(140), torch.arange(140), indexing="ij")
    disc = (x + 0.5 - 70) ** 2 + (y + 0.5 - 65) ** 2 <= radius ** 2
    box = torch.tensor([70.0 - radius, 65 - radius, 70 + radius, 65 + radius])
    target = mask_targets(disc[None], box[None], torch.tensor([0]))[0]
    pasted = paste_mask(target.float(), box, 140, 140)
    assert (pasted & disc).sum() / (pasted | disc).sum() >= least
    assert pasted.sum() == pytest.approx(math.pi * radius ** 2, rel=0.05)


def test_pasting_beyond_the_image():
    full = torch.ones(28, 28)
    mask = paste_mask(full, torch.tensor([-20.0, 10, 30, 50]), 40, 60)
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[10:, :30] = True
    assert torch.equal(mask, expected)
    assert not paste_mask(full, torch.tensor([5.0, 5, 5, 9]), 40, 60).any()  # without area


# ---------------------------------------------------------------- losses

def test_giou_by_hand():
    def loss(one, two):
        return float(generalized_box_iou_loss(torch.tensor([one]), torch.tensor([two]), reduction="sum"))
    assert loss([0.0, 0, 10, 10], [5.0, 0, 15, 10]) == pytest.approx(2 / 3, abs=1e-5)
    assert loss([0.0, 0, 10, 10], [20.0, 20, 30, 30]) == pytest.approx(1.7778, abs=1e-4)
    assert loss([0.0, 0, 10, 10], [0.0, 0, 10, 10]) == pytest.approx(0, abs=1e-6)
    assert loss([3.0, 3, 3, 9], [0.0, 0, 10, 10]) <= 2  # without area


def test_losses_of_a_stage(monkeypatch):
    """Normalisers: all sampled boxes for classes and boxes, positives and their cells for masks."""
    detector = small_detector()
    truth = torch.tensor([[8.0, 8, 72, 72]])
    targets = [{"boxes": truth, "labels": torch.tensor([1]), "masks": torch.ones(1, 96, 96, dtype=torch.bool), "size": (96, 96)}]
    proposals = [torch.tensor([[8.0, 8, 72, 60], [70, 70, 90, 90]])]  # IoU 0.81, 0
    K, S = 3, 3
    logits, deltas = torch.randn(S, K + 1), 0.1 * torch.randn(S, K, 4)
    monkeypatch.setattr(detector.box_heads[0], "forward", lambda pooled: (logits, deltas))
    maps = [torch.randn(1, 16, 24 // 2**i, 24 // 2**i) for i in range(4)]
    (cls, box, mask), passed = detector.learn(0, maps, proposals, targets)
    labels = [1, 1, K]
    assert cls == pytest.approx(float(sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels, strict=True)) / S))
    boxes, coder = torch.cat((truth, proposals[0])), BoxCoder((0.1, 0.1, 0.2, 0.2))
    decoded = torch.cat([coder.decode_single(deltas[i, 1][None], boxes[i][None]) for i in range(2)])
    assert box == pytest.approx(float(10 * generalized_box_iou_loss(decoded, truth.expand(2, 4), reduction="sum") / S), rel=1e-5)
    with torch.no_grad():
        pooled = pool_boxes(maps, [boxes[:2]], 14)
        maps28 = detector.mask_heads[0](pooled)[:, 1]
    assert float(mask.detach()) == pytest.approx(float(F.softplus(-maps28).mean()), rel=1e-5)  # all cells are object

    # Passed on: no true box; the positive moved by its class, the negative by its best class but the background.
    best = int(logits[2, :K].argmax())
    expected = [coder.decode_single(deltas[i, c][None], boxes[i][None])[0].clamp(0, 96) for i, c in ((1, 1), (2, best))]
    assert torch.allclose(passed[0], torch.stack(expected), atol=1e-4) and not passed[0].requires_grad


def test_rpn_losses():
    rpn = small_detector().rpn
    labels = [torch.tensor([1.0, 0, 0, -1]), torch.tensor([0.0, 0, -1, -1])]
    scores, deltas, wanted = torch.randn(8, 1), torch.randn(8, 4), torch.randn(8, 4)
    score_loss, box_loss = rpn.compute_loss(scores, deltas, labels, list(wanted.split(4)))
    count = (1 + 2) + (1 + 2)  # an image without a positive counts as if it had one
    s = scores.flatten()
    assert float(score_loss) == pytest.approx(float((F.softplus(-s[0]) + F.softplus(s[[1, 2, 4, 5]]).sum()) / count), rel=1e-5)
    difference = (deltas[0] - wanted[0]).abs()
    smooth = torch.where(difference < 1 / 9, 4.5 * difference ** 2, difference - 1 / 18)
    assert float(box_loss) == pytest.approx(float(smooth.sum() / count), rel=1e-5)


def make_batch(count=2):
    images, sizes = torch.randn(2, 3, 128, 96), [(120, 96), (128, 90)]
    targets = []
    for height, width in sizes:
        boxes = torch.tensor([[10.0, 10, 60, 60], [30, 40, 80, 100]])[:count]
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 2])[:count],
                        "masks": torch.ones(count, height, width, dtype=torch.bool)})
    return images, sizes, targets


@pytest.mark.parametrize("count", [0, 2])
def test_every_parameter_gets_a_gradient_and_without_boxes_too(count):
    detector = small_detector()
    losses = detector(*make_batch(count))
    assert list(losses) == list(cascade.LOSSES)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    if not count:
        assert losses["rpn_box"] == losses["box"] == losses["mask"] == 0
        assert all(p.grad.abs().sum() == 0 for p in detector.mask_heads.parameters())


def test_boxes_and_losses_stay_float32_in_mixed_precision():
    detector = small_detector()
    images, sizes, targets = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, sizes, targets)
        with torch.no_grad():
            found = detector.eval()(images, sizes, originals=sizes)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(value.dtype == torch.float32 for own in found for name, value in own.items() if name != "labels")
    assert (found[0]["boxes"] % 1 != 0).any()  # bfloat16 has whole pixels at most here


# ---------------------------------------------------------------- tests

class Fixed(nn.Module):
    """A head that says what it is told, whatever it sees."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self, pooled):
        return self.values if len(self.values) > 1 else self.values[0]


def fixed_detector(logits, masks=(0.0, 0.0, 0.0)):
    """K = 2; three logits [n, 3], no offsets; masks: logits of all cells, by stage."""
    detector = small_detector(2).eval()
    n = len(logits[0])
    detector.box_heads = nn.ModuleList(Fixed(torch.tensor(own), torch.zeros(n, 2, 4)) for own in logits)
    detector.mask_heads = nn.ModuleList(Fixed(torch.full((200, 2, 28, 28), value)) for value in masks)

    def detect(boxes, size=(96, 96), original=(96, 96)):
        maps = [torch.zeros(1, 16, 24 // 2**i, 24 // 2**i) for i in range(4)]
        for head in detector.mask_heads:  # as many as there are detections
            head.forward = lambda pooled, head=head: head.values[0][:len(pooled)]
        return detector.detect(maps, [torch.tensor(boxes)], [size], [original])[0]
    return detect


def test_logits_are_averaged_before_the_softmax():
    rows = [[[6.0, 0, 0]], [[0.0, 0, 2]], [[0.0, 0, 2]]]
    found = fixed_detector(rows)([[10.0, 10, 50, 50]])
    wanted = torch.tensor(rows).mean(dim=0).softmax(dim=1)[0, :2]
    other = torch.tensor(rows).softmax(dim=2).mean(dim=0)[0, :2]
    assert torch.allclose(found["scores"], wanted.sort(descending=True).values) and (wanted - other).abs().max() > 0.05


def test_masks_are_averaged_after_the_sigmoid():
    masks = (-4.0, 1.0, 2.0)
    found = fixed_detector([[[4.0, -9, 0]]] * 3, masks)([[10.0, 10, 50, 50]])
    assert found["maps"].shape == (1, 28, 28)
    assert torch.allclose(found["maps"], torch.tensor(masks).sigmoid().mean().expand(1, 28, 28))


def test_threshold_is_strict_and_boxes_come_back_by_both_ratios():
    low = math.log(0.05 / 0.95 * 2)  # against two others of 0: slightly above 0.05 or below
    detect = fixed_detector([[[low + 0.01, 0.0, 0.0]]] * 3)
    found = detect([[10.0, 20, 50, 60]], (96, 90), (48, 180))
    assert found["labels"].tolist() == [1, 0]
    assert torch.allclose(found["boxes"], torch.tensor([20.0, 10, 100, 30]).expand(2, 4))
    assert fixed_detector([[[low - 0.01, 0.0, 0.0]]] * 3)([[10.0, 20, 50, 60]])["labels"].tolist() == [1]


def test_suppression_is_by_class_and_the_best_hundred_stay():
    detect = fixed_detector([[[3.0, 2.9, 0.0], [2.0, 0.0, 0.0]]] * 3)  # one place, another score
    found = detect([[10.0, 10, 50, 50], [11, 10, 50, 50]])
    assert found["labels"].tolist() == [0, 1]
    boxes = [[float(x), float(y), x + 4.0, y + 4.0] for x in range(0, 90, 6) for y in range(0, 90, 6)][:150]
    assert len(fixed_detector([[[3.0, -9.0, 0.0]] * 150] * 3)(boxes)["scores"]) == 100


def test_widths_and_numbers_of_parameters():
    with torch.device("meta"):
        detector = CascadeMaskRCNN(nn.Identity(), [384] * 4, 80)
    assert sum(p.numel() for p in detector.box_heads[0].parameters()) == 15618449  # 15.62 M
    assert sum(p.numel() for p in detector.mask_heads[0].parameters()) == 2643280  # 2.64 M
    assert detector.rpn.head.cls_logits.weight.shape[0] == 3 and detector.rpn.head.bbox_pred.weight.shape[0] == 12


def test_first_weights():
    torch.manual_seed(0)
    detector = CascadeMaskRCNN(nn.Identity(), [64] * 4, 80)
    head = detector.box_heads[0]
    for weight, std in ((head.cls_score.weight, 0.01), (head.bbox_pred.weight, 0.001),
                        (head.layers[-2].weight, math.sqrt(2 / (256 * 49 + 1024))),
                        (head.layers[0][0].weight, math.sqrt(2 / (256 * 9))),
                        (detector.rpn.head.cls_logits.weight, 0.01),
                        (detector.fpn.layer_blocks[0][0].weight, math.sqrt(2 / (2 * 256 * 9))),
                        (detector.mask_heads[0][0][0][0].weight, math.sqrt(2 / (256 * 9)))):
        assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert all(not p.any() for name, p in detector.named_parameters() if name.endswith("bias"))
