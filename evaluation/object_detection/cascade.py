"""Cascade Mask R-CNN (Cai and Vasconcelos, 2019), as the paper's Tables 6, 13 and 14 were made with it.

Built on torchvision's parts where they are equal to the recipe; where they are not (places of anchors, their assignment,
the pooling of boxes, the cascade, targets and pasting of masks) on what is here. Boxes are x1, y1, x2, y2 in pixels of the
image as the network sees it; boxes, scores and losses are float32 under mixed precision too.

Letters: B images, C channels, K classes (the background is class K, the last), G true boxes of an image, A anchors of an
image, n boxes of an image, P positive ones among them, S boxes of all images.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    roi_align,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height / width
IOU_OF_STAGE, WEIGHT_OF_STAGE = (0.5, 0.6, 0.7), (1.0, 0.5, 0.25)
DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
BOX_SIDE, MASK_SIDE = 7, 14  # cells of a pooled box; masks have twice as many
LOSSES = ("rpn_cls", "rpn_box", "cls", "box", "mask")
SCORE, OVERLAP, MOST = 0.05, 0.5, 100  # least score, overlap for suppression, detections of an image


# ---------------------------------------------------------------- boxes

class BoxCoder(TorchvisionBoxCoder):
    """Boxes as offsets in units of `deviations`; torchvision's, but with log sizes clamped on both sides."""

    def __init__(self, deviations=(1.0, 1.0, 1.0, 1.0)):
        super().__init__(tuple(1 / deviation for deviation in deviations))

    def decode_single(self, rel_codes, boxes):
        """Offsets [n, 4 m] and boxes [n, 4] to boxes [n, 4 m]."""
        most = rel_codes.new_tensor(self.weights[2:]) * self.bbox_xform_clip
        codes = rel_codes.unflatten(1, (-1, 4))
        sizes = torch.maximum(torch.minimum(codes[..., 2:], most), -most)
        return super().decode_single(torch.cat((codes[..., :2], sizes), dim=-1).flatten(1), boxes)


class Anchors(AnchorGenerator):
    """Three anchors of `scale` strides' side for each cell, centred at cell index x stride; torchvision's are rounded, and
    have the stride that the padded image's size divided by the map's gives."""

    def __init__(self, scale=8):
        super().__init__(tuple((scale * stride,) for stride in STRIDES), (RATIOS,) * len(STRIDES))

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=torch.device("cpu")):  # noqa: B008
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt() * scales[0]
        widths = scales[0] ** 2 / heights
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list, feature_maps):
        """The anchors [A, 4] of each image, all the same."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in STRIDES]))
        return [anchors] * len(image_list.image_sizes)


def assign_anchors(anchors, truth, size, high=0.7, low=0.3):
    """What each anchor is to find: labels float32 [A], 1 an object, 0 none, -1 not to be used; number of its true box [A].

    An anchor is positive from an overlap of `high` on, negative below `low`. Each true box that is overlapped by `low` at
    least also claims all anchors that overlap it most, whatever they were; a later box claims before an earlier one.
    Anchors that do not lie within the image of `size` (height, width) are not used.
    """
    height, width = size
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    labels = torch.where(inside, 0.0, -1.0)
    matched = torch.zeros_like(labels, dtype=torch.int64)
    if not len(truth) or not inside.any():
        return labels, matched
    overlap = box_iou(truth, anchors[inside])  # [G, A inside]
    best, index = overlap.max(dim=0)
    found = torch.where(best >= high, 1.0, torch.where(best < low, 0.0, -1.0))
    top = overlap.max(dim=1, keepdim=True).values
    claims = (overlap == top) & (top >= low)
    number = torch.arange(1, len(truth) + 1, dtype=torch.int32, device=truth.device)
    last = (claims * number[:, None]).max(dim=0).values  # 0: none claims it
    labels[inside] = torch.where(last > 0, 1.0, found)
    matched[inside] = torch.where(last > 0, last.long() - 1, index)
    return labels, matched


def sample_boxes(proposals, target, threshold, num_classes, sampler):
    """Boxes of an image for a stage to learn from, drawn from its true boxes and the proposals [n, 4].

    Positive from an overlap of `threshold` on, else negative. Returns boxes, labels (K for the background), numbers of
    their true boxes, and which of them are true boxes themselves.
    """
    truth = target["boxes"]
    candidates = torch.cat((truth, proposals))
    labels = torch.full((len(candidates),), num_classes, dtype=torch.int64, device=truth.device)
    matched = torch.zeros_like(labels)
    if len(truth):
        best, matched = box_iou(truth, candidates).max(dim=0)
        labels = torch.where(best >= threshold, target["labels"][matched], labels)
    positive, negative = sampler([(labels < num_classes).int()])
    chosen = (positive[0] | negative[0]).bool()
    is_truth = torch.arange(len(candidates), device=truth.device) < len(truth)
    return candidates[chosen], labels[chosen], matched[chosen], is_truth[chosen]


def box_levels(boxes):
    """Of four maps the one that each box [n, 4] is cut from: those of 112 pixels from the second, 224 the third, ..."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (side / 56 + 1e-6).log2().floor().clamp(0, 3)


def pool_boxes(maps, boxes, side):
    """Cut boxes, a list of [n, 4], out of the maps of the first four strides: [S, C, side, side], image by image.

    RoIAlign with its half-cell shift and as many samples as a bin needs; torchvision's `MultiScaleRoIAlign` has neither.
    """
    rois = torch.cat([F.pad(own, (1, 0), value=image) for image, own in enumerate(boxes)])
    level = box_levels(rois[:, 1:])
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side)
    for i, features in enumerate(maps[:4]):
        chosen = (level == i).nonzero().flatten()
        pooled[chosen] = roi_align(features, rois[chosen], side, 1 / STRIDES[i], sampling_ratio=0, aligned=True)
    return pooled


# ---------------------------------------------------------------- masks

def mask_targets(masks, boxes, index, side=2 * MASK_SIDE):
    """What the mask head is to say of boxes [P, 4]: the parts of the true masks `index` [P] of `masks` (bool [G, H, W]) in
    them, bool [P, s, s]."""
    used, index = index.unique(return_inverse=True)
    rois = torch.cat((index[:, None].to(boxes.dtype), boxes), dim=1)
    return roi_align(masks[used][:, None].to(boxes.dtype), rois, side, sampling_ratio=0, aligned=True)[:, 0] >= 0.5


def paste_mask(probability, box, height, width):
    """A box's map [s, s] as a mask of the image: bool [height, width]. Box in the image's pixels; outside it is nothing."""
    x1, y1, x2, y2 = box.tolist()
    mask = torch.zeros(height, width, dtype=torch.bool, device=probability.device)
    if x2 <= x1 or y2 <= y1:
        return mask
    left, top, right, bottom = max(int(x1) - 1, 0), max(int(y1) - 1, 0), min(int(x2) + 2, width), min(int(y2) + 2, height)
    x = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    mask[top:bottom, left:right] = F.grid_sample(probability[None, None], grid, align_corners=False)[0, 0] >= 0.5
    return mask


# ---------------------------------------------------------------- networks

class FloatRPNHead(RPNHead):
    """torchvision's; scores and offsets in float32 under mixed precision too."""

    def forward(self, x):
        return tuple([part.float() for part in parts] for parts in super().forward(x))


class RPN(RegionProposalNetwork):
    """torchvision's region proposals, with the recipe's anchors, assignment and normaliser of losses.

    Targets also hold "size", height and width of the image without padding.
    """

    def __init__(self, channels, anchor_scale, sampled, before_nms, after_nms):
        super().__init__(Anchors(anchor_scale), FloatRPNHead(channels, len(RATIOS)), 0.7, 0.3, sampled, 0.5, before_nms,
                         after_nms, 0.7)
        self.box_coder, self.min_size = BoxCoder(), 0.0

    def assign_targets_to_anchors(self, anchors, targets):
        labels, boxes = [], []
        for own, target in zip(anchors, targets, strict=True):
            label, matched = assign_anchors(own, target["boxes"], target["size"])
            labels.append(label)
            boxes.append(target["boxes"][matched] if len(target["boxes"]) else torch.zeros_like(own))
        return labels, boxes

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Sums over the sampled anchors, divided by their number, in which an image counts as one of each kind at least."""
        positive, negative = self.fg_bg_sampler(labels)
        count = sum(part.sum().clamp(min=1) for part in (*positive, *negative))
        positive, negative = torch.cat(positive).bool(), torch.cat(negative).bool()
        used = positive | negative
        score_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[used], torch.cat(labels)[used],
                                                        reduction="sum") / count
        box_loss = F.smooth_l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], beta=1 / 9,
                                    reduction="sum") / count
        return score_loss, box_loss


class BoxHead(nn.Module):
    """Four convolutions with batch norm, a hidden layer, scores of K + 1 classes and offsets of K boxes."""

    def __init__(self, channels, hidden, num_classes):
        super().__init__()
        self.layers = FastRCNNConvFCHead((channels, BOX_SIDE, BOX_SIDE), [channels] * 4, [hidden], nn.BatchNorm2d)
        self.cls_score, self.bbox_pred = nn.Linear(hidden, num_classes + 1), nn.Linear(hidden, 4 * num_classes)
        nn.init.xavier_uniform_(self.layers[-2].weight)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.layers[-2], self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled):
        """[S, C, 7, 7] to logits [S, K + 1] and offsets [S, K, 4], float32."""
        x = self.layers(pooled)
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


def mask_head(channels, num_classes):
    """[S, C, 14, 14] to logits [S, K, 28, 28]."""
    head = nn.Sequential(MaskRCNNHeads(channels, [channels] * 4, dilation=1),
                         MaskRCNNPredictor(channels, channels, num_classes))
    for name, parameter in head[1].named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return head


class CascadeMaskRCNN(nn.Module):
    """Backbone, feature pyramid, region proposals and three stages of a box and a mask head each.

    Args:
        backbone: images [B, 3, H, W] to four maps of strides 4, 8, 16, 32. in_channels: their channels.
        num_classes: K. channels, hidden: width of pyramid and heads, and of their hidden layer.
        sampled: boxes of an image that each stage learns from, and half as many anchors.
        proposals: (in training, in tests) the most of a level before suppression, and of an image behind it.
        anchor_scale: side of the anchors in strides.
    """

    def __init__(self, backbone, in_channels, num_classes, channels=256, hidden=1024, sampled=512, proposals=(2000, 1000),
                 anchor_scale=8):
        super().__init__()
        self.backbone, self.num_classes = backbone, num_classes
        self.fpn = FeaturePyramidNetwork(in_channels, channels, LastLevelMaxPool())
        for layer in self.fpn.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        most = dict(zip(("training", "testing"), proposals, strict=True))
        self.rpn = RPN(channels, anchor_scale, sampled // 2, most, most)
        self.box_heads = nn.ModuleList(BoxHead(channels, hidden, num_classes) for _ in IOU_OF_STAGE)
        self.mask_heads = nn.ModuleList(mask_head(channels, num_classes) for _ in IOU_OF_STAGE)
        self.coders = [BoxCoder(deviations) for deviations in DEVIATIONS]
        self.sampler = BalancedPositiveNegativeSampler(sampled, 0.25)

    def forward(self, images, sizes, targets=None, originals=None):
        """Losses in training mode, else detections.

        Args:
            images: [B, 3, H, W], normalised and padded on the right and at the bottom. sizes: (height, width) without.
            targets: in training of each image {"boxes": [G, 4], "labels": int64 [G], "masks": bool [G, height, width]}.
            originals: in tests (height, width) of each image's file.

        Returns:
            The LOSSES by name, weighted, 0-d tensors of which the sum is to be minimised; or what `detect` finds.
        """
        maps = self.fpn(dict(enumerate(self.backbone(images))))
        if not self.training:
            proposals, _ = self.rpn(ImageList(images, sizes), maps)
            return self.detect(list(maps.values()), proposals, sizes, originals)
        targets = [{**target, "size": size} for target, size in zip(targets, sizes, strict=True)]
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        losses = dict(zip(LOSSES, (losses["loss_objectness"], losses["loss_rpn_box_reg"], 0.0, 0.0, 0.0), strict=True))
        maps = list(maps.values())
        for stage, weight in enumerate(WEIGHT_OF_STAGE):
            parts, proposals = self.learn(stage, maps, proposals, targets)
            for name, loss in zip(LOSSES[2:], parts, strict=True):
                losses[name] = losses[name] + weight * loss
        return losses

    def learn(self, stage, maps, proposals, targets):
        """A stage in training: its losses of classes, boxes and masks, and the proposals for the next stage."""
        with torch.no_grad():
            drawn = [sample_boxes(own, target, IOU_OF_STAGE[stage], self.num_classes, self.sampler)
                     for own, target in zip(proposals, targets, strict=True)]
        boxes, labels = [part[0] for part in drawn], torch.cat([part[1] for part in drawn])
        logits, deltas = self.box_heads[stage](pool_boxes(maps, boxes, BOX_SIDE))
        cls_loss = F.cross_entropy(logits, labels)

        positive = labels < self.num_classes
        classes = labels[positive]
        found = [(own[label < self.num_classes], matched[label < self.num_classes]) for own, label, matched, _ in drawn]
        truth = torch.cat([target["boxes"][matched] for (_, matched), target in zip(found, targets, strict=True)])
        decoded = self.coders[stage].decode_single(deltas[positive, classes], torch.cat(boxes)[positive])
        box_loss = 10 * generalized_box_iou_loss(decoded, truth, reduction="sum") / len(labels)

        masks = self.mask_heads[stage](pool_boxes(maps, [own for own, _ in found], MASK_SIDE)).float()
        masks = masks[torch.arange(len(classes), device=masks.device), classes]  # [P of all images, 28, 28]
        wanted = torch.cat([mask_targets(target["masks"], *own) for own, target in zip(found, targets, strict=True)])
        mask_loss = F.binary_cross_entropy_with_logits(masks, wanted.float(), reduction="sum") / max(masks.numel(), 1)

        labels = torch.where(positive, labels, logits[:, :-1].argmax(dim=1))
        moved = self.refine(stage, boxes, labels, deltas, [target["size"] for target in targets])
        return (cls_loss, box_loss, mask_loss), [own[~part[3]] for own, part in zip(moved, drawn, strict=True)]

    @torch.no_grad()
    def refine(self, stage, boxes, labels, deltas, sizes):
        """Boxes [n, 4] of each image moved by their offsets [S, K, 4] for the classes `labels` [S], clipped to `sizes`."""
        chosen = deltas[torch.arange(len(labels), device=labels.device), labels]
        moved = self.coders[stage].decode_single(chosen, torch.cat(boxes)).split([len(own) for own in boxes])
        return [clip_boxes_to_image(own, size) for own, size in zip(moved, sizes, strict=True)]

    def detect(self, maps, boxes, sizes, originals):
        """Of each image the detections of its proposals `boxes`, best first, in pixels of its file.

        Returns:
            A list of {"boxes": [n, 4], "scores": [n], "labels": int64 [n], "maps": [n, 28, 28]}; maps: the probability of
            the object in each cell of its box, see `paste_mask`.
        """
        total = 0.0
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(pool_boxes(maps, boxes, BOX_SIDE))
            total = total + logits
            if stage + 1 < len(self.box_heads):
                boxes = self.refine(stage, boxes, logits[:, :-1].argmax(dim=1), deltas, sizes)
        scores = (total / len(self.box_heads)).softmax(dim=1)[:, :-1]
        decoded = self.coders[-1].decode_single(deltas.flatten(1), torch.cat(boxes)).unflatten(1, (-1, 4))

        scales = [boxes[0].new_tensor((width / w, height / h)).repeat(2)
                  for (height, width), (h, w) in zip(sizes, originals, strict=True)]
        counts, found = [len(own) for own in boxes], []
        for score, own, size, scale in zip(scores.split(counts), decoded.split(counts), sizes, scales, strict=True):
            own = clip_boxes_to_image(own, size) / scale
            box, label = (score > SCORE).nonzero(as_tuple=True)
            score, own = score[box, label], own[box, label]
            best = batched_nms(own, score, label, OVERLAP)[:MOST]
            found.append({"boxes": own[best], "scores": score[best], "labels": label[best]})
        pooled = pool_boxes(maps, [own["boxes"] * scale for own, scale in zip(found, scales, strict=True)], MASK_SIDE)
        labels = torch.cat([own["labels"] for own in found])
        masks = torch.stack([head(pooled).float().sigmoid()[torch.arange(len(labels), device=labels.device), labels]
                             for head in self.mask_heads]).mean(dim=0)
        for own, part in zip(found, masks.split([len(own["labels"]) for own in found]), strict=True):
            own["maps"] = part
        return found
