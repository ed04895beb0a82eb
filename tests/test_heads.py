"""Head sharing (Table 17): what [CLS] and patches have in common of the projection head, from `iBOTHead` to the flags."""
import itertools

import pytest
import torch

import engine
import main_ibot
import models
import utils
import variants
from evaluation.common.clustering import load_projection_head
from models.head import iBOTHead

SIZES = {"in_dim": 12, "out_dim": 20, "hidden_dim": 16, "bottleneck_dim": 8}


def build(sharing, norm=None, patch_out_dim=17):
    torch.manual_seed(0)
    head = iBOTHead(**SIZES, patch_out_dim=patch_out_dim, norm=norm, norm_last_layer=False, **variants.HEADS[sharing]).double()
    for p in head.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return head


def outcome(head, tokens, seed=1):
    """[CLS] and patch logits, and the gradients of a random function of both by name."""
    generator = torch.Generator().manual_seed(seed)
    head.zero_grad()
    cls, patches = head(tokens)
    sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (cls, patches)).backward()
    return {"cls": cls.detach(), "patches": patches.detach(), **{name: p.grad for name, p in head.named_parameters()}}


@pytest.mark.parametrize("norm", [None, "ln", "bn"])
def test_full_is_two_heads_built_apart(norm):
    """Outputs, gradients and running statistics."""
    head = build("full", norm)
    apart = [iBOTHead(**(SIZES | {"out_dim": K}), norm=norm, norm_last_layer=False, shared_head=True).double() for K in (20, 17)]
    for other, mlp, last in zip(apart, (head.mlp, head.mlp_patch), (head.last_layer, head.last_layer2), strict=True):
        other.mlp.load_state_dict(mlp.state_dict())
        other.last_layer.load_state_dict(last.state_dict())
    tokens = torch.randn(5, 7, 12, dtype=torch.float64)
    found = outcome(head, tokens)
    generator = torch.Generator().manual_seed(1)
    outs = apart[0](tokens[:, 0]), apart[1](tokens[:, 1:].flatten(0, 1)).unflatten(0, (5, 6))
    for name, out in zip(("cls", "patches"), outs, strict=True):
        torch.testing.assert_close(found.pop(name), out)
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    for name, grad in found.items():
        own = apart["_patch" in name or "layer2" in name]
        torch.testing.assert_close(grad, own.get_parameter(name.replace("mlp_patch", "mlp").replace("layer2", "layer")).grad)
    statistics = dict(head.named_buffers())
    assert bool(statistics) == (norm == "bn")
    for name, value in statistics.items():
        torch.testing.assert_close(value, apart["_patch" in name].get_buffer(name.replace("mlp_patch", "mlp")))


@pytest.mark.parametrize("norm", [None, "ln", "bn"])
def test_mlp2_with_equal_layers_is_the_shared_head(norm):
    """Its gradients are a part each of the shared layer's."""
    shared, head = build("shared", norm), build("mlp2", norm, patch_out_dim=20)
    third = f"{len(head.mlp) - 1}."
    assert {name.removeprefix("mlp_patch.") for name, _ in head.named_parameters() if "patch" in name} == {third + "weight", third + "bias"}
    head.mlp.load_state_dict(shared.mlp.state_dict())
    head.mlp_patch.load_state_dict({third + name: value for name, value in shared.mlp[-1].state_dict().items()})
    for layer in (head.last_layer, head.last_layer2):
        layer.load_state_dict(shared.last_layer.state_dict())
    tokens = torch.randn(5, 7, 12, dtype=torch.float64)
    found, expected = outcome(head, tokens), outcome(shared, tokens)
    for name, value in expected.items():
        own = found[name]
        for a, b in ((f"mlp.{third}", f"mlp_patch.{third}"), ("last_layer.", "last_layer2.")):
            own = own + found[name.replace(a, b)] if a in name else own
        torch.testing.assert_close(own, value)


def test_the_default_draws_the_same_weights():
    """The [CLS] side of every head is drawn as without the patches' own layers."""
    for sharing in ("mlp2", "full"):
        torch.manual_seed(0)
        plain = iBOTHead(**SIZES).state_dict()
        torch.manual_seed(0)
        head = iBOTHead(**SIZES, **variants.HEADS[sharing]).state_dict()
        assert all(torch.equal(head[name], value) for name, value in plain.items())
        own = {"mlp2": ["4"], "full": ["0", "2", "4"]}[sharing]
        assert head.keys() - plain.keys() == {f"mlp_patch.{i}.{part}" for i in own for part in ("weight", "bias")}


@pytest.mark.parametrize("student, teacher", [("full", "full"), ("full", "shared"), ("mlp2", "mlp2"), ("mlp2", "shared")])
def test_teacher_follows_by_name(student, teacher):
    """A common head of the teacher follows the student's [CLS] side."""
    args = main_ibot.get_args_parser().parse_args(
        ["--data_path", ".", "--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--out_dim", "16",
         "--patch_out_dim", "16", "--head_hidden_dim", "32", "--head_sharing", student, "--head_sharing_teacher", teacher])
    variants.check_heads(args)
    student, teacher = main_ibot.build_networks(args)
    students = dict(student.named_parameters())
    assert students["head.mlp_patch.4.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    for p in students.values():
        p.data += torch.randn_like(p)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    utils.ema_update(*utils.ema_pairs(student, teacher), momentum=0.75)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * students[name].detach(), msg=name)


def test_flags():
    def parse(*words):
        return main_ibot.get_args_parser().parse_args([*words])
    assert variants.head_sharing(parse()) == ("prototypes", "shared")
    assert variants.head_sharing(parse("--shared_head", "true", "--shared_head_teacher", "false")) == ("shared", "prototypes")
    assert variants.head_sharing(parse("--shared_head", "true", "--head_sharing", "full")) == ("full", "shared")
    good = {("full", "full"), ("mlp2", "mlp2"), ("prototypes", "prototypes"), ("shared", "prototypes"),
            *((student, "shared") for student in variants.HEADS)}
    for pair in itertools.product(variants.HEADS, repeat=2):
        args = parse("--head_sharing", pair[0], "--head_sharing_teacher", pair[1])
        if pair in good:
            variants.check_heads(args)
        else:
            with pytest.raises(engine.InputError, match=f"must be shared or {pair[0]}"):
                variants.check_heads(args)
    assert variants.head_sharing(parse("--tokenizer", "mpp")) == ("shared", "shared")
    with pytest.raises(engine.InputError, match="--head_sharing full: with --tokenizer mpp patches have no head"):
        variants.check_heads(parse("--tokenizer", "mpp", "--head_sharing", "full"))
    variants.check_heads(parse("--head_sharing", "full", "--head_sharing_teacher", "full", "--patch_out_dim", "4096"))
    with pytest.raises(engine.InputError, match="4096 and 8192 outputs: with heads full and shared.* must equal --out_dim"):
        variants.check_heads(parse("--head_sharing", "full", "--patch_out_dim", "4096"))


@pytest.mark.parametrize("sharing, norm", [("full", None), ("full", "bn"), ("mlp2", "ln"), ("mlp2", "bn")])
def test_both_sides_are_read_from_a_checkpoint(sharing, norm):
    """As clusters and patterns read them. A layer of the patches is never made up from the [CLS] side's."""
    head = build(sharing, norm).float().eval()
    tokens = torch.randn(3, 5, 12)
    state = {f"head.{name}": value for name, value in head.state_dict().items()}
    for patches, expected in zip((False, True), head(tokens), strict=True):
        found = load_projection_head({"teacher": state}, "teacher", "a.pth", patches)
        torch.testing.assert_close(found(tokens[:, 1:].flatten(0, 1) if patches else tokens[:, 0]), expected.flatten(0, -2))
    last = len(head.mlp) - 1
    del state[f"head.mlp_patch.{last}.bias"]
    load_projection_head({"teacher": state}, "teacher", "a.pth")
    with pytest.raises(engine.InputError, match=f"a.pth does not fit.*1 missing: mlp.{last}.bias"):
        load_projection_head({"teacher": state}, "teacher", "a.pth", patches=True)


def test_network_of_every_head_agrees_with_its_tokens():
    """The wrapper's rows for each kind: [CLS] rows through one MLP, wanted patches, and the mean, through the other."""
    for sharing, norm in itertools.product(variants.HEADS, (None, "bn")):
        head = build(sharing, norm, patch_out_dim=20)
        head.mlp[0] = torch.nn.Linear(96, 16).double()
        if sharing == "full":
            head.mlp_patch[0] = torch.nn.Linear(96, 16).double()
        network = models.MultiCropWrapper(models.vit_nano(patch_size=8, img_size=32).double().eval(), head)
        crops, index = torch.randn(4, 3, 32, 32).double(), torch.tensor([3, 17, 63, 20])
        cls, patches = head(network.backbone(crops, return_all_tokens=True))
        for patch_mean in (False, True):
            found_cls, found_patches, mean, _ = network(crops, index, patch_mean=patch_mean)
            torch.testing.assert_close(found_cls, cls)
            torch.testing.assert_close(found_patches, patches.flatten(0, 1)[index])
            assert (mean is None) != patch_mean
        torch.testing.assert_close(mean, patches.mean(dim=(0, 1)))
