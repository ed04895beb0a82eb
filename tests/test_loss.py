"""The sparse step against a dense float64 oracle written from the definition, and the parts of the step against plain loops."""
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import engine
import loader
import main_ibot
import models
import utils

B, K = 3, 24
NANO = partial(models.vit_nano, patch_size=8, img_size=32)
TEMPS, PATCH_TEMPS = np.array([0.05, 0.06]), np.array([0.04, 0.07])


def build(G, L, shared=True, shared_teacher=True, norm=None, last_layer_free=True, patch_out_dim=K, seed=0, backbone=NANO, common_layers=3,
          **kwargs):
    """A tiny float64 student and teacher with unlike weights, and a loss with centres that are not zero."""
    torch.manual_seed(seed)

    def network(shared, **extra):
        trunk = backbone(**extra)
        head = models.iBOTHead(trunk.embed_dim, K, patch_out_dim=patch_out_dim, norm=norm, norm_last_layer=not last_layer_free,
                               shared_head=shared, hidden_dim=32, bottleneck_dim=8, common_layers=3 if shared else common_layers)
        network = models.MultiCropWrapper(trunk, head)
        for p in network.parameters():
            p.data += 0.05 * torch.randn_like(p)
        return network.double()
    student, teacher = network(shared, masked_im_modeling=True), network(shared_teacher).requires_grad_(False)
    k = K if shared else patch_out_dim
    ibot_loss = main_ibot.iBOTLoss(K, k, TEMPS, PATCH_TEMPS, **kwargs).double()
    ibot_loss.center.normal_(std=0.1)
    ibot_loss.center2.normal_(std=0.1)
    return student, teacher, ibot_loss


def make_batch(G, L, masks):
    """Random crops; `masks` bool [G, B, 4, 4]. The weights are written as a loop here, not taken from the loader."""
    index, weight = [], []
    for g, b in itertools.product(range(G), range(B)):
        cells = masks[g, b].flatten().nonzero().flatten().tolist()
        index += [(g * B + b) * 16 + i for i in cells]
        weight += [1 / (len(cells) * G * B) for _ in cells]
    return loader.Batch(global_crops=torch.randn(G, B, 3, 32, 32, dtype=torch.float64),
                        local_crops=torch.randn(L, B, 3, 16, 16, dtype=torch.float64) if L else None,
                        labels=torch.zeros(B, dtype=torch.int64), masks=masks,
                        mask_index=torch.tensor(index, dtype=torch.int64), mask_weight=torch.tensor(weight, dtype=torch.float64))


def some_masks(G):
    masks = torch.rand(G, B, 4, 4) < 0.4
    masks[:, 0] = False  # an image without a mask counts as 0 in the mean
    return masks


def oracle(batch, student, teacher, ibot_loss, epoch):
    """Section 3 of the paper, densely and pair by pair: every token of every crop through the whole head."""
    G, L = len(batch.global_crops), 0 if batch.local_crops is None else len(batch.local_crops)
    log_softmax = torch.log_softmax

    def split(logits):  # one pass over all crops of a size, as batch norm sees them
        return logits.unflatten(0, (-1, B))
    t_cls, t_patch = (split(x) for x in teacher.head(teacher.backbone(batch.global_crops.flatten(0, 1), return_all_tokens=True)))
    s_cls, s_patch = (split(x) for x in student.head(
        student.backbone(batch.global_crops.flatten(0, 1), mask=batch.masks.flatten(0, 1), return_all_tokens=True)))
    if L:
        s_cls = torch.cat((s_cls, split(student.head(student.backbone(batch.local_crops.flatten(0, 1), return_all_tokens=True))[0])))

    p_cls = torch.softmax((t_cls - ibot_loss.center) / TEMPS[epoch], -1).detach()
    p_patch = torch.softmax((t_patch - ibot_loss.center2) / PATCH_TEMPS[epoch], -1).detach()
    cls_terms = [-(p_cls[q] * log_softmax(s_cls[v] / 0.1, -1)).sum(-1).mean() for q in range(G) for v in range(G + L) if v != q]
    patch_terms = []
    for g in range(G):
        m = batch.masks[g].flatten(1).double()  # [B, N]
        ce = -(p_patch[g] * log_softmax(s_patch[g] / 0.1, -1)).sum(-1)
        patch_terms.append(((ce * m).sum(-1) / m.sum(-1).clamp(min=1)).mean())
    cls, patch = sum(cls_terms) / (G * (G + L - 1)), sum(patch_terms) / G
    center = 0.9 * ibot_loss.center + 0.1 * t_cls.mean((0, 1))
    center2 = 0.9 * ibot_loss.center2 + 0.1 * t_patch.mean((0, 1, 2))
    return cls, patch, center.detach(), center2.detach()


CASES = {
    "two crops and locals": dict(G=2, L=3),
    "no local crops": dict(G=2, L=0),
    "three global crops": dict(G=3, L=2),
    "one global crop": dict(G=1, L=2),
    "separate heads": dict(G=2, L=2, shared=False, shared_teacher=False, patch_out_dim=17),
    "semi-shared heads": dict(G=2, L=2, shared=False, shared_teacher=True),
    "third layers too": dict(G=2, L=2, shared=False, shared_teacher=False, patch_out_dim=17, common_layers=2),
    "third layers too, semi-shared": dict(G=2, L=2, shared=False, shared_teacher=True, common_layers=2),
    "third layers too, batch norm": dict(G=2, L=2, shared=False, shared_teacher=False, common_layers=2, norm="bn"),
    "nothing shared": dict(G=2, L=2, shared=False, shared_teacher=False, patch_out_dim=17, common_layers=0),
    "nothing shared, batch norm, no mask at all": dict(G=2, L=1, shared=False, shared_teacher=False, common_layers=0, norm="bn",
                                                       masks=lambda m: m.fill_(False)),
    "layer norm in the head": dict(G=2, L=2, norm="ln"),
    "batch norm in the head": dict(G=2, L=2, norm="bn"),
    "registers": dict(G=2, L=2, backbone=partial(NANO, registers=3)),
    "registers, batch norm": dict(G=2, L=2, backbone=partial(NANO, registers=3), norm="bn", shared=False, shared_teacher=False, common_layers=0),
    "no mask in one crop": dict(G=2, L=1, masks=lambda m: m[1].fill_(False)),
    "no mask at all": dict(G=2, L=1, masks=lambda m: m.fill_(False)),
    "all masked": dict(G=2, L=1, masks=lambda m: m.fill_(True)),
    "weights": dict(G=2, L=1, lambda1=0.7, lambda2=2.0),
}


@pytest.mark.parametrize("name", CASES)
def test_sparse_equals_dense(name):
    case = dict(CASES[name])
    edit, G, L = case.pop("masks", None), case["G"], case["L"]
    student, teacher, ibot_loss = build(**case)
    masks = some_masks(G)
    if edit:
        edit(masks)
    batch = make_batch(G, L, masks)
    lambdas = case.get("lambda1", 1.0), case.get("lambda2", 1.0)
    cls, patch, center, center2 = oracle(batch, student, teacher, ibot_loss, epoch=1)
    wanted = torch.autograd.grad(lambdas[0] * cls + lambdas[1] * patch, list(student.parameters()), allow_unused=True)

    groups = utils.get_params_groups(student)
    optimizer = torch.optim.SGD(groups, lr=0.0)
    losses, *_ = main_ibot.train_step(
        [batch], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer),
        epoch=1, lr=0.0, weight_decay=0.0, momentum=1.0, clip_grad=0, freeze_last_layer=False)
    assert abs(losses["cls"] - cls) < 1e-10 and abs(losses["patch"] - patch) < 1e-10
    assert abs(losses["loss"] - (lambdas[0] * cls + lambdas[1] * patch)) < 1e-10
    assert (ibot_loss.center - center).abs().max() < 1e-10 and (ibot_loss.center2 - center2).abs().max() < 1e-10
    for (parameter_name, p), grad in zip(student.named_parameters(), wanted, strict=True):
        assert p.grad is not None, parameter_name  # data parallelism needs every gradient, also without a mask
        assert (p.grad - (0 if grad is None else grad)).abs().max() < 1e-10, parameter_name
    if "no mask at all" in name:
        assert losses["patch"] == 0


def test_batch_norm_statistics_follow_the_dense_pass():
    """Running means and variances, and evaluation with them, as torch's own batch norm over all tokens."""
    norm, own = models.head.SyncBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    for _ in range(3):
        x = torch.randn(4, 7, 5, dtype=torch.float64)
        assert torch.allclose(norm(x), own(x.flatten(0, 1)).view_as(x), atol=1e-12)
    assert norm.state_dict().keys() == own.state_dict().keys()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(norm.state_dict().values(), own.state_dict().values(), strict=True))
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(norm.eval()(x), own.eval()(x), atol=1e-12)


def test_ablations_of_the_loss():
    logits = torch.randn(4, 6, K).unbind(0)
    s_cls, s_patch, t_cls, t_patch = (x.double() for x in logits)
    weight, mean = torch.rand(6, dtype=torch.float64), torch.randn(K, dtype=torch.float64)

    def loss(**kwargs):
        module = main_ibot.iBOTLoss(K, K, TEMPS, PATCH_TEMPS, **kwargs).double()
        losses = module(s_cls, s_patch, t_cls, t_patch, mean, weight, 2, 0)
        assert module.update_centers(torch.tensor(True))
        return losses, module
    hard, module = loss(patch_targets="hard")
    expected = (nn.functional.cross_entropy(s_patch / 0.1, t_patch.argmax(-1), reduction="none") * weight).sum()
    assert abs(hard["patch"] - expected) < 1e-10
    assert torch.allclose(module.center2.flatten(), 0.1 * mean)
    assert not loss(patch_centering=False)[1].center2.any()
    assert torch.allclose(loss(patch_center_momentum=0.99)[1].center2.flatten(), 0.01 * mean)
    assert torch.allclose(loss(center_momentum=0.8)[1].center.flatten(), 0.2 * t_cls.mean(0))


@pytest.mark.parametrize("common_layers", [3, 0])
def test_no_patch_loss_leaves_patches_out(common_layers):
    """With lambda2 0 no patch reaches the last layer, and the step still gives every gradient."""
    student, teacher, ibot_loss = build(2, 1, shared=False, shared_teacher=False, lambda2=0.0, common_layers=common_layers)
    seen = []
    student.head.last_layer2.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    before = ibot_loss.center2.clone()
    losses, *_ = main_ibot.train_step(
        [make_batch(2, 1, some_masks(2))], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, torch.optim.SGD(utils.get_params_groups(student), lr=0.0)),
        epoch=0, lr=0.1, weight_decay=0.0, momentum=1.0, clip_grad=3.0, freeze_last_layer=False)
    assert seen == [0] and losses["patch"] == 0 and torch.equal(ibot_loss.center2, before)
    assert all(p.grad is not None for p in student.parameters())


def test_only_wanted_tokens_reach_the_last_layer():
    student, teacher, ibot_loss = build(2, 3, shared=False, shared_teacher=False)
    batch = make_batch(2, 3, some_masks(2))
    rows = {}
    for who, network in (("student", student), ("teacher", teacher)):
        for layer in ("mlp", "last_layer", "last_layer2"):
            getattr(network.head, layer).register_forward_hook(
                lambda m, inputs, out, key=(who, layer): rows.setdefault(key, []).append(inputs[0].shape[:-1].numel()))
    main_ibot.train_step(
        [batch], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, torch.optim.SGD(utils.get_params_groups(student), lr=0.0)),
        epoch=0, lr=0.0, weight_decay=0.0, momentum=1.0, clip_grad=0, freeze_last_layer=False)
    M = len(batch.mask_index)
    assert rows["student", "mlp"] == [5 * B + M]
    assert rows["student", "last_layer"] == [5 * B] and rows["student", "last_layer2"] == [M]
    assert rows["teacher", "last_layer"] == [2 * B] and rows["teacher", "last_layer2"] == [1, M]


def test_temperatures():
    temps = utils.temperature_schedule(0.04, 0.07, 30, 100)
    assert len(temps) == 100 and np.allclose(temps[:30], np.linspace(0.04, 0.07, 30)) and (temps[30:] == 0.07).all()
    temps = utils.temperature_schedule(0.04, 0.07, 10, 40, start_epoch=20)
    assert (temps[:20] == 0.04).all() and np.allclose(temps[20:30], np.linspace(0.04, 0.07, 10)) and (temps[30:] == 0.07).all()


# ---------------------------------------------------------------- parts of the step

def test_clip_each_parameter_by_itself():
    parameters = [nn.Parameter(torch.randn(n, 2)) for n in (1, 3, 50)] + [nn.Parameter(torch.randn(2))]
    for p, scale in zip(parameters[:3], (0.1, 5.0, 1.0), strict=True):
        p.grad = scale * torch.randn_like(p)
    before = [p.grad.clone() for p in parameters[:3]]
    norms = utils.clip_gradients(parameters, 3.0)
    assert len(norms) == 3 and parameters[3].grad is None
    clipped = 0
    for p, grad, norm in zip(parameters, before, norms, strict=False):
        assert torch.allclose(norm, grad.norm())
        coefficient = 3.0 / (float(grad.norm()) + 1e-6)
        clipped += coefficient < 1
        assert torch.allclose(p.grad, grad * min(coefficient, 1.0), atol=1e-7)
    assert 0 < clipped < 3


def test_parameter_groups_follow_the_rule():
    student, _, _ = build(2, 0, last_layer_free=False)
    decayed, plain = (set(map(id, g["params"])) for g in utils.get_params_groups(student))
    for name, p in student.named_parameters():
        if "weight_g" in name:
            assert not p.requires_grad and id(p) not in decayed | plain
        elif name.endswith(".bias") or p.ndim == 1:
            assert id(p) in plain
        else:
            assert id(p) in decayed, name  # position, class and mask embeddings included


def plain_factor(name, depths, decay, patch_embed):
    """DINOv2's rule, for a parameter of a whole network: decay ** (blocks above it), embeddings below all, the rest 1."""
    depth = sum(depths)
    words = name.removeprefix("backbone.").split(".")
    if words[0] in ("cls_token", "pos_embed", "masked_embed"):
        return decay ** (depth + 1)
    if words[0] == "patch_embed":
        return patch_embed * decay ** (depth + 1)
    if words[0] == "blocks":
        return decay ** (depth - int(words[1]))
    if words[0] == "layers":  # of a Swin; merging goes with the block before it
        stage = int(words[1])
        return decay ** (depth - sum(depths[:stage]) - (depths[stage] - 1 if words[2] == "downsample" else int(words[3])))
    assert name.startswith(("head.", "backbone.norm."))
    return 1.0


@pytest.mark.parametrize("arch, depths", [("vit_small", [12]), ("swin_tiny", [2, 2, 6, 2])])
@pytest.mark.parametrize("decay, patch_embed", [(0.9, 0.2), (1.0, 0.2), (0.9, 1.0)])
def test_rates_by_layer(arch, depths, decay, patch_embed):
    """Factors of the rate by name, each parameter once; decayed ones as without them, the teacher's none."""
    args = main_ibot.get_args_parser().parse_args(["--data_path", ".", "--arch", arch, "--out_dim", "16", "--head_hidden_dim", "8"])
    student, teacher = main_ibot.build_networks(args)
    groups = utils.get_params_groups(student, decay, patch_embed)
    found = {id(p): (group["lr_scale"], group["decayed"]) for group in groups for p in group["params"]}
    names = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    assert len({(group["lr_scale"], group["decayed"]) for group in groups}) == len(groups)
    without = {id(p) for p in utils.get_params_groups(student)[0]["params"]}
    for name, p in names.items():
        scale, decayed = found[id(p)]
        assert scale == pytest.approx(plain_factor(name, depths, decay, patch_embed), rel=1e-12), name
        assert decayed == (id(p) in without), name
    assert [len(g["params"]) for g in utils.get_params_groups(teacher)] == []


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_has_the_ratio_of_the_rates(name):
    """Of AdamW and SGD a first update is proportional to the rate; of LARS too, by tensor."""
    moved = []
    for factors in ((), (0.5, 0.1)):
        student, teacher, ibot_loss = build(2, 1)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        torch.manual_seed(1)
        main_ibot.train_step(
            [make_batch(2, 1, some_masks(2))],
            main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, utils.build_optimizer(
                name, utils.get_params_groups(student, *factors), torch.device("cpu"))),
            epoch=0, lr=0.1, weight_decay=0.1, momentum=0.9, clip_grad=3.0, freeze_last_layer=False)
        moved.append({name: p.detach() - before[name] for name, p in student.named_parameters()})
    for parameter, step in moved[0].items():
        assert step.any() and torch.allclose(moved[1][parameter], plain_factor(parameter, [4], 0.5, 0.1) * step, atol=1e-12), parameter


def test_resumed_rates_are_those_of_the_flags():
    """A checkpoint's groups count their parameters; factors are the running command's."""
    student, _, _ = build(2, 1)
    old, new, plain = (utils.build_optimizer("adamw", utils.get_params_groups(student, decay), torch.device("cpu"))
                       for decay in (0.9, 0.8, 1.0))
    engine.load_optimizer(new, old.state_dict(), "a.pth")
    assert [group["lr_scale"] for group in new.param_groups[::2]] == pytest.approx([0.8 ** i for i in range(5, -1, -1)])
    with pytest.raises(engine.InputError, match=r"a.pth: its optimizer has groups of \[4, 1, .*\] parameters, this run \["):
        engine.load_optimizer(plain, old.state_dict(), "a.pth")


def test_freezing_holds_the_last_layer_only():
    for freeze in (True, False):
        student, teacher, ibot_loss = build(2, 1)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        optimizer = torch.optim.AdamW(utils.get_params_groups(student), lr=0.0, fused=True)
        main_ibot.train_step(
            [make_batch(2, 1, some_masks(2))], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer),
            epoch=0, lr=0.1, weight_decay=0.1, momentum=0.9, clip_grad=3.0, freeze_last_layer=freeze)
        for name, p in student.named_parameters():
            assert torch.equal(p, before[name]) == (freeze and "last_layer" in name), name


@pytest.mark.parametrize("shared, shared_teacher", list(itertools.product((True, False), repeat=2)))
def test_teacher_follows_by_name(shared, shared_teacher):
    args = main_ibot.get_args_parser().parse_args(
        ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--out_dim", "16", "--patch_out_dim", "16",
         "--shared_head", str(shared), "--shared_head_teacher", str(shared_teacher)])
    student, teacher = main_ibot.build_networks(args)
    students = dict(student.named_parameters(remove_duplicate=False))
    assert "backbone.masked_embed" in students and "backbone.masked_embed" not in teacher.state_dict()
    for name, p in teacher.named_parameters():
        assert torch.equal(p, students[name]) and not p.requires_grad, name
    with torch.no_grad():
        for p in student.parameters():
            p += torch.randn_like(p)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    utils.ema_update(*utils.ema_pairs(student, teacher), momentum=0.75)
    for name, p in teacher.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * students[name], atol=1e-6), name


def test_lars_against_the_formula():
    torch.manual_seed(0)
    weight, bias, zero = (nn.Parameter(x.double()) for x in (torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2)))
    optimizer = utils.LARS([{"params": [weight, zero]}, {"params": [bias], "weight_decay": 0.0}])
    expected, buffers = [p.detach().clone() for p in (weight, zero, bias)], [0.0, 0.0, 0.0]
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.param_groups[0]["weight_decay"] = 0.1
        for i, p in enumerate((weight, zero, bias)):
            p.grad = torch.randn_like(p)
            g = p.grad
            if p.ndim > 1:
                g = g + 0.1 * expected[i]
                if expected[i].norm() > 0 and g.norm() > 0:
                    g = g * 0.001 * expected[i].norm() / g.norm()
            buffers[i] = 0.9 * buffers[i] + g
            expected[i] = expected[i] - 0.5 * buffers[i]
        optimizer.step()
        for p, e in zip((weight, zero, bias), expected, strict=True):
            assert torch.allclose(p, e, atol=1e-12)


def test_clustering_scores():
    labels = np.repeat([0, 1, 2], 10)
    perfect = utils.clustering_scores(labels, np.array([7, 3, 9])[labels])
    assert all(abs(v - 1) < 1e-12 for v in perfect.values())
    clusters = np.array([7, 3, 9])[labels]
    clusters[:3] = 3
    assert abs(utils.clustering_scores(labels, clusters)["adjacc"] - 0.9) < 1e-12
