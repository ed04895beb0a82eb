"""Pre-training from the command line: it runs, resumes, writes what it should, and refuses what it cannot use."""
import argparse
import copy
import gc
import json
import shutil
import sysconfig
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import engine
import loader
import main_ibot
import models
import utils

TINY = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_size", "16", "--device", "cpu",
        "--local_crops_number", "2", "--out_dim", "64", "--patch_out_dim", "64", "--batch_size_per_gpu", "16", "--epochs", "2",
        "--num_workers", "0", "--print_freq", "3", "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2", "--lr", "0.01"]


def parse(*words):
    return main_ibot.get_args_parser().parse_args([*TINY, *map(str, words)])


def train(*words):
    main_ibot.train_ibot(parse(*words))


def log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def tensors(checkpoint):
    return {f"{key}.{name}": v for key in ("student", "teacher", "ibot_loss") for name, v in checkpoint[key].items()}


def test_defaults_are_the_references():
    args = vars(main_ibot.get_args_parser().parse_args([]))
    expected = dict(
        arch="vit_small", patch_size=16, window_size=7, out_dim=8192, patch_out_dim=8192, shared_head=False,
        shared_head_teacher=True, norm_last_layer=True, momentum_teacher=0.996, norm_in_head=None, act_in_head="gelu",
        use_masked_im_modeling=True, pred_ratio=[0.3], pred_ratio_var=[0], pred_shape="block", pred_start_epoch=0, lambda1=1,
        lambda2=1, warmup_teacher_temp=0.04, teacher_temp=0.04, warmup_teacher_patch_temp=0.04, teacher_patch_temp=0.07,
        warmup_teacher_temp_epochs=30, use_fp16=True, weight_decay=0.04, weight_decay_end=0.4, clip_grad=3.0,
        batch_size_per_gpu=128, epochs=100, freeze_last_layer=1, lr=0.0005, warmup_epochs=10, min_lr=1e-6, optimizer="adamw",
        load_from=None, global_crops_number=2, global_crops_scale=[0.14, 1.0], local_crops_number=0,
        local_crops_scale=[0.05, 0.4], output_dir=".", saveckp_freq=40, seed=0, dist_url="env://", local_rank=0)
    assert {name: args[name] for name in expected} == expected


def test_run_from_the_command_line(digits, call, tmp_path):
    """Two epochs by `python main_ibot.py`: log, events and checkpoint parse; the reference's layout; then resume."""
    out = tmp_path / "run"
    result = call("main_ibot.py", *TINY, "--data_path", digits / "train", "--output_dir", out, "--num_workers", "2",
                  "--warmup_epochs", "30", "--saveckp_freq", "1", "--shared_head", "true")
    assert "warning: --warmup_epochs 30 does not fit into 2 epochs; shortened to 2" in result.stdout
    for word in ("commit:", "versions:", "device: cpu", "peak learning rate", "images/s", "eta", "MiB"):
        assert word in result.stdout
    lines = log(out)
    assert [line["epoch"] for line in lines] == [0, 1]
    meters = ("loss", "cls", "patch", "lr", "wd", "acc", "nmi", "ari", "fscore", "adjacc")
    assert all(np.isfinite(line[f"train_{name}"]) for line in lines for name in meters)

    events = EventAccumulator(str(out / "tf_logs"))
    events.Reload()
    assert len(events.Scalars("step/loss")) == 14 and len(events.Scalars("epoch/loss")) == 2  # 120 // 16 steps an epoch
    assert abs(np.mean([e.value for e in events.Scalars("step/loss")[:7]]) - lines[0]["train_loss"]) < 1e-4

    checkpoint = engine.load_checkpoint(out / "checkpoint.pth")
    assert checkpoint.keys() == {"student", "teacher", "optimizer", "epoch", "args", "ibot_loss", "progress"}
    assert checkpoint["epoch"] == 2 and isinstance(checkpoint["args"], argparse.Namespace) and checkpoint["args"].arch == "vit_nano"
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in checkpoint["student"])
    assert all(name.startswith(("backbone.", "head.")) for name in checkpoint["teacher"])
    assert "module.backbone.masked_embed" in checkpoint["student"] and "backbone.masked_embed" not in checkpoint["teacher"]
    assert checkpoint["ibot_loss"].keys() == {"center", "center2"}
    assert sorted(p.name for p in out.glob("*.pth")) == ["checkpoint.pth", "checkpoint0001.pth", "checkpoint_previous.pth"]
    assert not list(out.glob(".*"))  # no temporary file stays

    again = call("main_ibot.py", *TINY, "--data_path", digits / "train", "--output_dir", out, check=False)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "already holds a run" in again.stderr and "--load_from auto" in again.stderr and "--overwrite true" in again.stderr


def test_resume_equals_uninterrupted(digits, tmp_path):
    """Stop after one epoch of three and resume: the same losses and weights as without the stop."""
    flags = ["--data_path", digits / "train", "--epochs", 3, "--shared_head", "true", "--drop_path", "0.2"]
    train(*flags, "--output_dir", tmp_path / "whole", "--saveckp_freq", 1)
    part = tmp_path / "part"
    part.mkdir()
    (part / "checkpoint.pth").write_bytes((tmp_path / "whole/checkpoint0001.pth").read_bytes())
    train(*flags, "--output_dir", part, "--load_from", "checkpoint.pth")
    assert [line["epoch"] for line in log(part)] == [2]
    assert log(part)[0]["train_loss"] == log(tmp_path / "whole")[2]["train_loss"]
    whole, resumed = (tensors(engine.load_checkpoint(f / "checkpoint.pth")) for f in (tmp_path / "whole", part))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_runs_are_reproducible_and_seeds_differ(digits, tmp_path):
    flags = ["--data_path", digits / "train", "--epochs", 1, "--shared_head", "true"]
    for name, extra in (("a", []), ("b", ["--num_workers", 2]), ("c", ["--seed", 1])):
        train(*flags, "--output_dir", tmp_path / name, *extra)
    loss = {name: log(tmp_path / name)[0]["train_loss"] for name in "abc"}
    assert loss["a"] == loss["b"] != loss["c"]


def test_reference_checkpoint_resumes(digits, tmp_path):
    """A file as the reference writes it: no fused flag, integer steps, numpy rates, a Namespace, the teacher unwrapped."""
    flags = ["--data_path", digits / "train", "--shared_head", "true", "--output_dir", tmp_path]
    train(*flags, "--epochs", 1)
    path = tmp_path / "checkpoint.pth"
    checkpoint = engine.load_checkpoint(path)
    assert "module.head.last_layer2.weight_v" in checkpoint["student"]
    for group in checkpoint["optimizer"]["param_groups"]:
        for key in ("fused", "foreach", "capturable", "differentiable", "maximize", "decoupled_weight_decay"):
            group.pop(key, None)
        group["lr"] = np.float64(group["lr"])  # out of its numpy schedules
    checkpoint["optimizer"]["param_groups"][0]["weight_decay"] = np.float64(0.04)
    for state in checkpoint["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    checkpoint["args"] = argparse.Namespace(arch="vit_nano", gpu=0, dist_backend="nccl")
    checkpoint["fp16_scaler"] = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
    torch.save(checkpoint, path)
    # numpy 1, with which the reference ran, pickled its scalars under an older module name.
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "old.pth", "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert content.count(new) + content.count(old) >= 1
                content = content.replace(new, old)
            target.writestr(item, content)
    for name in ("checkpoint.pth", "old.pth"):
        train(*flags, "--epochs", 2, "--load_from", name)
        assert engine.load_checkpoint(path)["epoch"] == 2
    allowed = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert allowed == {"argparse.Namespace"}  # our own files need no more


def test_finished_run_says_so(digits, tmp_path, capsys):
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    train("--data_path", digits / "train", "--output_dir", tmp_path, "--epochs", 1, "--load_from", "checkpoint.pth")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


VARIANTS = [
    ["--shared_head", "true", "--norm_last_layer", "false"],
    ["--shared_head", "false", "--shared_head_teacher", "false", "--patch_out_dim", "32"],
    ["--shared_head", "false", "--shared_head_teacher", "true"],
    ["--shared_head", "true", "--shared_head_teacher", "false", "--pred_shape", "rand"],
    ["--norm_in_head", "bn", "--act_in_head", "relu", "--head_sharing", "full"],
    ["--norm_in_head", "syncbn", "--optimizer", "sgd", "--layer_decay", "0.9", "--patch_embed_lr", "0.2"],
    ["--norm_in_head", "ln", "--optimizer", "lars", "--head_sharing", "mlp2", "--head_sharing_teacher", "mlp2"],
    ["--use_masked_im_modeling", "false", "--clip_grad", "0"],
    ["--lambda1", "0", "--registers", "4"],
    ["--lambda2", "0"],
    ["--global_crops_number", "3", "--local_crops_number", "0"],
    ["--amp_dtype", "bfloat16", "--patch_targets", "hard"],
    ["--amp_dtype", "float16", "--patch_centering", "false"],
    ["--pred_start_epoch", "1", "--pred_ratio", "0.3", "--pred_ratio_var", "0.1"],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_variants_run(flags, digits, tmp_path):
    """Every head variant, optimiser, mask shape, precision and ablation trains, saves and loads."""
    run = ["--data_path", digits / "train", "--output_dir", tmp_path, "--batch_size_per_gpu", 40, *flags]
    train(*run, "--epochs", 1)
    checkpoint = engine.load_checkpoint(tmp_path / "checkpoint.pth")
    assert ("fp16_scaler" in checkpoint) == ("float16" in flags)
    assert any(name.startswith("module.") for name in checkpoint["teacher"]) == ("bn" in " ".join(flags))
    line = log(tmp_path)[0]
    assert (line["train_patch"] == 0) == (flags[:2] == ["--lambda2", "0"] or flags[0] == "--pred_start_epoch")
    train(*run, "--epochs", 2, "--load_from", "checkpoint.pth")
    last = engine.load_checkpoint(tmp_path / "checkpoint.pth")
    assert all(v.isfinite().all() for v in tensors(last).values())
    assert any(not torch.equal(v, last["teacher"][name]) for name, v in checkpoint["teacher"].items())


@pytest.mark.parametrize("arch", models.ARCHS)
def test_every_arch_takes_a_step(arch):
    """Steps on random crops with masks and local crops, through the whole of the step."""
    swin, large = arch.startswith("swin"), arch.endswith(("base", "large"))
    args = parse("--arch", arch, "--patch_size", 16, "--global_crops_size", 64, "--out_dim", 32, "--shared_head", "true")
    student, teacher = main_ibot.build_networks(args)
    assert any(m.drop_prob > 0 for m in student.modules() if hasattr(m, "drop_prob"))
    assert not any(m.drop_prob > 0 for m in teacher.modules() if hasattr(m, "drop_prob"))
    cells = 64 // models.mask_cell(arch, 16)
    masks = torch.zeros(2, 2, cells, cells, dtype=torch.bool)
    masks[:, 0, 0] = True
    index = masks.flatten().nonzero().flatten()
    batch = loader.Batch(torch.randn(2, 2, 3, 64, 64), torch.randn(1, 2, 3, 32, 32), torch.zeros(2), masks, index,
                         torch.full((len(index),), 1 / (4 * cells)))
    temps = np.full(1, 0.05)
    ibot_loss = main_ibot.iBOTLoss(32, 32, temps, temps)
    optimizer = utils.build_optimizer("sgd" if large else "adamw", utils.get_params_groups(student), torch.device("cpu"))
    embed = student.backbone.masked_embed
    for _ in range(1 if large else 2):
        losses, *_ = main_ibot.train_step(
            [batch], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer),
            0, lr=0.1, weight_decay=0.1, momentum=0.9, clip_grad=3.0, freeze_last_layer=True)
    assert all(torch.isfinite(v) and v > 0 for name, v in losses.items() if name != "acc")
    assert embed.any() and embed.shape == (1, {"t": 96, "s": 96, "b": 128, "l": 192}[arch[5]] if swin else student.backbone.embed_dim)


@pytest.mark.parametrize("patch", [4, 8, 14, 16])
def test_patch_and_crop_sizes(patch):
    """Any size the patch divides, rectangles too; others are refused by name."""
    model = models.vit_nano(patch_size=patch, img_size=4 * patch).eval()
    for h, w in ((4, 4), (2, 2), (7, 7), (3, 5), (9, 2)):
        assert model(torch.randn(1, 3, h * patch, w * patch), return_all_tokens=True).shape == (1, 1 + h * w, 96)
    with pytest.raises(ValueError, match="do not divide"):
        model(torch.randn(1, 3, 4 * patch + 1, 4 * patch))


def test_attention_and_intermediate_layers():
    torch.manual_seed(0)
    model = models.vit_nano(patch_size=8, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = {}
        model.blocks[-1].attn.qkv.register_forward_hook(lambda m, i, out: seen.update(qkv=out))
        model.blocks[-1].attn.proj.register_forward_hook(lambda m, i, out: seen.update(value=i[0]))
        tokens = model(x, return_all_tokens=True)
        attention = model.get_last_selfattention(x)
        assert attention.shape == (2, 3, 17, 17) and torch.allclose(attention.sum(-1), torch.ones(2, 3, 17))
        value = seen["qkv"].view(2, 17, 3, 3, 32)[:, :, 2].transpose(1, 2)  # [B, heads, T, d]
        model(x)
        assert torch.allclose((attention @ value).transpose(1, 2).reshape(2, 17, 96), seen["value"], atol=1e-5)
        layers = model.get_intermediate_layers(x, 3)
        assert len(layers) == 3 and torch.allclose(layers[-1], tokens) and torch.equal(model(x), tokens[:, 0])
        x1 = model.blocks[:3](model.prepare_tokens(x))
        assert torch.allclose(layers[1], model.norm(x1))
        assert torch.allclose(model.get_intermediate_layers(x, 2, norm=False)[0], x1)


def test_swin_taps_and_mean_token():
    torch.manual_seed(0)
    model = models.swin_tiny().eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        tokens = model(x, return_all_tokens=True)
        assert tokens.shape == (1, 1 + 9, 768) and model.embed_dim == model.num_features == 768
        assert torch.allclose(tokens[:, 0], tokens[:, 1:].mean(1), atol=1e-6) and torch.allclose(model(x), tokens[:, 0], atol=1e-6)
        taps = model.get_intermediate_layers(x, 4)
        assert [t.shape[1:] for t in taps] == [(37, 384), (37, 384), (10, 768), (10, 768)]
        assert torch.allclose(taps[-1], tokens, atol=1e-6)


def test_masks_replace_patch_embeddings():
    """A masked cell's output does not depend on its pixels, and without `mask` nothing is masked."""
    torch.manual_seed(0)
    for model, size, cells in ((models.vit_nano(patch_size=8, img_size=32, masked_im_modeling=True), 32, 4),
                               (models.swin_tiny(masked_im_modeling=True), 64, 2)):
        model.eval()
        model.masked_embed.data.normal_()
        x, mask = torch.randn(1, 3, size, size), torch.zeros(1, cells, cells, dtype=torch.bool)
        mask[0, 0, 1] = True
        other = x.clone()
        other[:, :, :size // cells, size // cells:2 * size // cells] = 0
        with torch.no_grad():
            assert torch.equal(model(x, mask), model(other, mask)) and not torch.equal(model(x), model(other))
            assert not torch.equal(model(x, mask), model(x))
            assert torch.equal(model(x, torch.zeros_like(mask)), model(x))


# ---------------------------------------------------------------- bad input

BAD = {
    "no data path": ([], "--data_path is missing"),
    "missing folder": (["--data_path", "nowhere"], "nowhere"),
    "patch does not divide": (["--patch_size", "7"], "--global_crops_size 32 is not a multiple of 7"),
    "local patch does not divide": (["--local_crops_size", "20"], "--local_crops_size 20"),
    "ratio below variance": (["--pred_ratio", "0.1", "--pred_ratio_var", "0.2"], "--pred_ratio 0.1 is below its --pred_ratio_var 0.2"),
    "lists of different lengths": (["--pred_ratio", "0", "0.3", "0.4", "--pred_ratio_var", "0", "0.2"], "--pred_ratio has 3 values"),
    "missing checkpoint": (["--load_from", "none.pth"], "none.pth does not exist"),
    "one crop": (["--global_crops_number", "1", "--local_crops_number", "0"], "two crops"),
    "heads that do not match": (["--patch_out_dim", "7"], "--patch_out_dim"),
    "batch larger than the data": (["--batch_size_per_gpu", "4096"], "fewer than one batch of 4096"),
    "zero epochs": (["--epochs", "0"], "--epochs"),
    "crop scale": (["--local_crops_scale", "0.5", "0.2"], "--local_crops_scale"),
    "no loss": (["--lambda1", "0", "--lambda2", "0"], "no loss"),
    "one crop for want of local ones": (["--global_crops_number", "1", "--local_crops_number", "0"], "two crops"),
    "cuda without a GPU": (["--device", "cuda"], "no CUDA"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, digits, tmp_path):
    flags, words = BAD[name]
    if name == "cuda without a GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    data = [] if name == "no data path" else ["--data_path", digits / "train"]
    with pytest.raises(engine.InputError) as error:
        train(*data, "--output_dir", tmp_path / "out", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, word", [(["--arch", "vit_smal"], "--arch"), (["--epoch", "3"], "--epoch"), (["--use_fp16", "maybe"], "true or false")])
def test_mistyped_flags(flags, word, call):
    result = call("main_ibot.py", *flags, check=False)
    assert result.returncode == 2 and word in result.stderr


def test_foreign_checkpoints_are_refused(digits, tmp_path):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path]
    train(*flags, "--epochs", 1)
    good = engine.load_checkpoint(tmp_path / "checkpoint.pth")

    def refused(name, content, words, *extra):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(engine.InputError) as error:
            train(*flags, "--load_from", name, *extra)
        assert words in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    refused("text.pth", b"hello", "cannot be read safely")
    refused("half.pth", (tmp_path / "checkpoint.pth").read_bytes()[:5000], "cannot be read safely")
    refused("code.pth", {"student": print}, "cannot be read safely (it holds ")
    refused("kinds.pth", {**good, "optimizer": [1], "epoch": "2"}, "it lacks optimizer, epoch")
    refused("list.pth", [1, 2], "holds a list")
    refused("backbone.pth", {"state_dict": {}}, "lacks student, teacher")
    refused("arch.pth", good, "missing", "--arch", "swin_tiny", "--patch_size", "4", "--local_crops_size", "32")
    refused("out.pth", good, "of another shape", "--out_dim", "32", "--patch_out_dim", "32")
    less = copy.deepcopy(good)
    del less["student"]["module.backbone.norm.weight"]
    refused("less.pth", less, "backbone.norm.weight")
    refused("sgd.pth", good, "is not that of SGD", "--optimizer", "sgd")


def test_unreadable_images(digits, tmp_path, capsys, call):
    import shutil
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data)
    broken = sorted(data.rglob("*.png"))[5]
    broken.write_bytes(b"no image")
    train("--data_path", data, "--output_dir", tmp_path / "out", "--epochs", 1)
    assert f"skipped 1 unreadable images so far; the first: {broken}" in capsys.readouterr().out
    result = call("main_ibot.py", *TINY, "--data_path", data, "--output_dir", tmp_path / "strict", "--on_bad_image", "error",
                  "--num_workers", 2, check=False)
    assert result.returncode == 1 and str(broken) in result.stderr.splitlines()[-1] and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_odd_images_train(tmp_path):
    folder = tmp_path / "data/all"
    folder.mkdir(parents=True)
    for i, mode in enumerate(("L", "P", "CMYK", "RGBA", "LA", "1", "I;16", "RGB")):
        size = (1, 1) if i == 7 else (20 + i, 30)
        image = Image.new(mode, size, 1) if mode in ("P", "1", "I;16", "L") else Image.new(mode, size)
        image.save(folder / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    train("--data_path", folder.parent, "--output_dir", tmp_path / "out", "--epochs", 1, "--batch_size_per_gpu", 4)
    assert len(log(tmp_path / "out")) == 1


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    engine.save_atomically({"a": 1}, path)

    def fails(obj, file):
        file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        engine.save_atomically({"a": 2}, path)
    monkeypatch.undo()
    assert engine.load_checkpoint(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_mixed_precision_is_on_where_asked(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for has_it, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_it=has_it: has_it)
        assert engine.choose_amp_dtype(True, "auto", cpu) is expected
    assert engine.choose_amp_dtype(True, "auto", torch.device("mps")) is None
    assert engine.choose_amp_dtype(True, "bfloat16", cpu) is torch.bfloat16
    assert engine.choose_amp_dtype(False, "bfloat16", cuda) is None
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert engine.choose_amp_dtype(True, "auto", cuda) is expected
        assert engine.choose_amp_dtype(True, "float16", cuda) is torch.float16
    student, teacher = main_ibot.build_networks(parse("--shared_head", "true"))
    seen = {}
    student.head.last_layer.register_forward_hook(lambda m, i, out: seen.update(logits=out.dtype))
    ibot_loss = main_ibot.iBOTLoss(64, 64, [0.04], [0.04])
    batch = loader.Batch(torch.randn(2, 2, 3, 32, 32), None, torch.zeros(2), torch.ones(2, 2, 4, 4, dtype=torch.bool),
                         torch.arange(64), torch.full((64,), 1 / 64))
    losses, *_ = main_ibot.train_step(
        [batch], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, utils.build_optimizer("adamw", utils.get_params_groups(student), cpu), None, torch.bfloat16),
        0, lr=0.1, weight_decay=0.0, momentum=0.9, clip_grad=3.0, freeze_last_layer=False)
    assert seen["logits"] is torch.bfloat16 and losses["loss"].dtype == ibot_loss.center.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in student.parameters())


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint0040.pth", "log.txt"])
def test_nothing_of_an_earlier_run_is_lost(name, digits, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(engine.InputError, match=f"already holds a run .{name}"):
        train("--data_path", digits / "train", "--output_dir", tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_overwrite_starts_over(digits, tmp_path):
    flags = ["--data_path", digits / "train", "--output_dir", tmp_path]
    train(*flags, "--epochs", 2, "--saveckp_freq", 1)
    (tmp_path / "notes.md").write_text("keep me")
    (tmp_path / "checkpoint_teacher.pth").write_text("keep me")
    train(*flags, "--epochs", 1, "--overwrite", "true")
    assert len(log(tmp_path)) == 1 and not (tmp_path / "checkpoint0001.pth").exists()
    assert all((tmp_path / name).read_text() == "keep me" for name in ("notes.md", "checkpoint_teacher.pth"))


# ---------------------------------------------------------------- speed and the machine

@pytest.mark.parametrize("flags", [
    [], ["--patch_centering", "false", "--local_crops_number", "0"], ["--head_sharing", "full", "--head_sharing_teacher", "full", "--registers", "2"], ["--lambda2", "0", "--norm_in_head", "bn"],
    ["--arch", "swin_tiny", "--global_crops_size", "64", "--local_crops_size", "32", "--local_crops_number", "1"]])
def test_operations_are_those_of_a_step(flags):
    """Against a real step on the CPU; attention is counted in products, as fused kernels are not by every torch."""
    args = parse("--pred_ratio", "0.25", "--batch_size_per_gpu", "4", "--drop_path", "0", *flags)
    student, teacher = main_ibot.build_networks(args)
    G, B, size, L = 2, 2, args.global_crops_size, args.local_crops_number
    cells = size // models.mask_cell(args.arch, args.patch_size)
    masks = torch.arange(cells ** 2).view(cells, cells) < cells ** 2 // 4
    local = torch.randn(L, B, 3, args.local_crops_size, args.local_crops_size) if L else None
    masked = G * B * cells ** 2 // 4
    batch = loader.Batch(torch.randn(G, B, 3, size, size), local, torch.zeros(B), masks.expand(G, B, -1, -1),
                         torch.arange(masked), torch.full((masked,), 1 / masked))
    ibot_loss = main_ibot.iBOTLoss(64, 64, [0.04], [0.04], lambda2=args.lambda2, patch_centering=args.patch_centering)
    optimizer = utils.build_optimizer("adamw", utils.get_params_groups(student), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        main_ibot.train_step(
            [batch], main_ibot.Training(student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer),
            0, lr=0.1, weight_decay=0.0, momentum=0.9, clip_grad=3.0, freeze_last_layer=False)
    assert main_ibot.flops_per_image(args) == pytest.approx(counter.get_total_flops() / B, rel=0.001)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("Tesla T4", 65), ("NVIDIA B200", 2250), ("NVIDIA A10G", None), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Graphics Device", None)])
def test_peaks_by_the_device_s_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert engine.peak_flops(torch.device("cuda"), torch.bfloat16) == (peak and peak * 1e12)
    assert engine.peak_flops(torch.device("cuda"), None) is engine.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_run_says_how_much_of_the_device_it_uses_and_collects_by_hand(digits, tmp_path, capsys, monkeypatch):
    seen, device_batches, before = [], loader.device_batches, gc.get_freeze_count()

    def watched(*args):
        for batch in device_batches(*args):
            seen.append((gc.isenabled(), gc.get_freeze_count() > before))
            yield batch
    monkeypatch.setattr(loader, "device_batches", watched)
    monkeypatch.setattr(engine, "peak_flops", lambda device, dtype: 1e12)
    flags = ["--data_path", digits / "train", "--epochs", 1]
    train(*flags, "--output_dir", tmp_path / "a")
    assert "images/s  mfu " in capsys.readouterr().out and seen == [(False, True)] * 7
    events = EventAccumulator(str(tmp_path / "a/tf_logs"))
    events.Reload()
    speeds, shares = ([event.value for event in events.Scalars(f"step/{name}")] for name in ("images_per_second", "mfu"))
    per_image = main_ibot.flops_per_image(parse())
    assert len(shares) == 3 and shares == pytest.approx([speed * per_image / 1e12 for speed in speeds], rel=1e-5)
    monkeypatch.setattr(main_ibot, "train_one_epoch", lambda *args: {}["stop"])
    monkeypatch.setattr(engine, "peak_flops", lambda device, dtype: None)
    with pytest.raises(KeyError):
        train(*flags, "--output_dir", tmp_path / "b")
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_loader_processes_collect_by_themselves():
    class Asked:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return gc.isenabled()
    with engine.collecting_by_hand():
        assert list(DataLoader(Asked(), batch_size=None, num_workers=1, worker_init_fn=engine.ignore_signals)) == [True, True]


def test_a_swin_masked_from_the_start_gets_a_note(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_ibot, "train_one_epoch", lambda *args: {}["stop"])
    for epoch, noted in ((0, True), (1, False)):
        with pytest.raises(KeyError):
            train("--data_path", digits / "train", "--output_dir", tmp_path, "--overwrite", "true", "--arch", "swin_tiny",
                  "--patch_size", 4, "--pred_start_epoch", epoch)
        assert ("--pred_start_epoch 50" in capsys.readouterr().out) == noted


def test_what_compiling_needs_is_checked_before_the_run(digits, tmp_path, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(sysconfig, "get_path", lambda *words: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").touch()
    found = ["g++", "clang++"]
    engine.check_compiler(cpu)
    with pytest.raises(engine.InputError, match="7.0 or newer, Tesla P100 has 6.0; --compile false"):
        engine.check_compiler(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(engine.InputError, match="a C compiler, and there is no gcc or clang here .CC names"):
        engine.check_compiler(cuda)
    monkeypatch.setenv("CC", "ccache mine")
    found = ["ccache"]
    engine.check_compiler(cuda)
    with pytest.raises(engine.InputError, match="--compile needs a C.. compiler.*; --compile false does without"):
        train("--data_path", digits / "train", "--output_dir", tmp_path / "out", "--compile", "true")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(engine.InputError, match="Python's headers.*Python.h"):
        engine.check_compiler(cuda)
    assert not (tmp_path / "out").exists()


def test_products_are_quick_on_a_gpu_alone():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        assert engine.use_fast_products(torch.device("cpu")) == "float32" and torch.get_float32_matmul_precision() == before[0]
        assert engine.use_fast_products(torch.device("cuda")) == "TF32" and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]
