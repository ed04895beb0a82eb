"""Features that are kept and used again, the same from one process and from two; weights of other projects and libraries."""
import argparse
import dataclasses
import json
import os
import sys
from shutil import copytree

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from analysis_data import nano
from torch import multiprocessing

import engine
import extract_backbone_weights
from evaluation import eval_knn, eval_logistic_regression
from evaluation.common import features as module
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import eval_transform, image_sets
from evaluation.common.features import frozen_features, pool_features
from evaluation.unsupervised import unsup_cls
from models.head import iBOTHead

ALONE = engine.Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file as pre-training writes it; the backbones of teacher and student differ."""
    path = tmp_path_factory.mktemp("job") / "checkpoint.pth"
    backbones, head = (nano(0).state_dict(), nano(1, masked_im_modeling=True).state_dict()), iBOTHead(96, 12, shared_head=True)
    teacher, student = ({f"backbone.{name}": value for name, value in backbone.items()} |
                        {f"head.{name}": value for name, value in head.state_dict().items()} for backbone in backbones)
    torch.save({"teacher": teacher, "student": {f"module.{name}": value for name, value in student.items()}, "args": argparse.Namespace(arch="vit_nano", patch_size=8, global_crops_size=32), "epoch": 1}, path)
    return path


@pytest.fixture
def backbone(checkpoint):
    return load_evaluated_backbone(checkpoint, "teacher")


# ---------------------------------------------------------------- extraction

def share(rank, world_size, checkpoint, digits, folder):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    process = engine.Process(rank, world_size, rank, torch.device("cpu"))
    backbone = load_evaluated_backbone(checkpoint, "teacher")
    train, val = image_sets("imagefolder", digits, train_subset=f"{digits}/list.txt")
    found = {}
    for part in (train, val):
        # The second time no process looks at the images, although only the first one reads the file.
        for number in (1, 2):
            features, labels = frozen_features(backbone, part, process, 2, 2, 7, 0, f"{folder}/kept", f"{folder}/kept")
            assert (features is None) == (labels is None) == (rank > 0)
            found[f"{part.name} {number}"] = features
    if world_size > 1:
        dist.destroy_process_group()
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    for number, (script, *words) in enumerate(((eval_knn, "--nb_knn", "1", "9"), (eval_logistic_regression,), (unsup_cls,))):
        sys.argv = ["", "--pretrained_weights", str(checkpoint), "--checkpoint_key", "student,teacher", "--data_path", str(digits),
                    "--train_subset", f"{digits}/list.txt", "--batch_size_per_gpu", "7", "--num_workers", "0", "--device", "cpu",
                    "--output_dir", folder, "--dump_features", f"{folder}/joined", "--load_features", f"{folder}/joined", "--dist_url", f"file://{folder}/rendezvous{number}", *words]
        engine.run(script.main)
    if rank == 0:
        torch.save(found, f"{folder}/{world_size}.pth")


def test_two_processes_equal_one_and_a_plain_loop(checkpoint, backbone, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    copytree(digits, tmp_path / "data")
    digits = tmp_path / "data"
    sets = image_sets("imagefolder", digits)
    (digits / "list.txt").write_text("\n".join(list(sets[0].paths())[:118:2]))
    for world_size in "12":
        (tmp_path / world_size).mkdir()
    share(0, 1, checkpoint, digits, str(tmp_path / "1"))
    multiprocessing.spawn(share, (2, str(checkpoint), str(digits), str(tmp_path / "2")), nprocs=2)
    one, two = (torch.load(tmp_path / str(n) / f"{n}.pth") for n in (1, 2))
    plain = eval_transform(32)
    sets = image_sets("imagefolder", digits, train_transform=plain, val_transform=plain, train_subset=f"{digits}/list.txt")
    assert [len(part) % 2 for part in sets] == [1, 1]
    for part in sets:
        plain = torch.cat([pool_features(backbone.model, part[i][0][None], 2, 2) for i in range(len(part))])
        for found in (one, two):
            assert torch.equal(found[f"{part.name} 1"], found[f"{part.name} 2"])
            torch.testing.assert_close(found[f"{part.name} 1"], plain, atol=1e-5, rtol=1e-5)
    records = [json.loads((tmp_path / n / "results.json").read_text()) for n in "12"]
    assert [(record["protocol"], record["key"]) for record in records[0]] == [
        (protocol, key) for protocol in ("knn", "logistic", "unsupervised") for key in ("student", "teacher")]
    for one, two in zip(*records, strict=True):
        for name, values in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(values, rel=1e-6, abs=1e-9)
        assert one["settings"] == two["settings"] and one["settings"]["train_images"] == 59
    assert records[0][0]["settings"]["weights_hash"] != records[0][1]["settings"]["weights_hash"]


def test_own_transform_of_the_images_has_no_say(backbone, digits):
    val = image_sets("imagefolder", digits, val_transform=lambda image: torch.zeros(3, 32, 32))[1]
    features, labels = frozen_features(backbone, val, ALONE, num_workers=0)
    assert labels.tolist() == val.targets.tolist() and features.std(dim=0).min() > 1e-3


# ---------------------------------------------------------------- kept features

@pytest.fixture
def small(digits, tmp_path):
    """Images that a test may change."""
    copytree(digits, tmp_path / "data")
    return tmp_path / "data"


def extracted(monkeypatch):
    """A list that grows whenever images go through a backbone."""
    looks, plain = [], module.pool_features
    monkeypatch.setattr(module, "pool_features", lambda *words: looks.append(1) or plain(*words))
    return looks


def test_kept_features_are_used_while_everything_fits(backbone, checkpoint, small, tmp_path, monkeypatch, capsys):
    folder, looks = tmp_path / "new" / "kept", extracted(monkeypatch)

    def features(backbone=backbone, subset=None, dump=True, **settings):
        """(features, how they were had, what was printed)"""
        looks.clear()
        train, _ = image_sets("imagefolder", small, train_subset=subset)
        found, labels = frozen_features(backbone, train, ALONE, num_workers=0, dump_to=folder if dump else None,
                                        load_from=folder, **settings)
        assert labels.tolist() == train.targets.tolist()
        return found, "made" if looks else "kept", capsys.readouterr().out

    first, how, text = features()
    assert how == "made" and "none kept" in text
    again, how, text = features()
    assert how == "kept" and torch.equal(first, again) and "read from" in text and len(text.splitlines()) == 1

    # Other options and subsets have files of their own.
    assert features(n_last_blocks=2)[1] == features(avgpool_patchtokens=1)[1] == features(subset="0.5")[1] == "made"
    assert features()[1] == features(n_last_blocks=2)[1] == features(subset="0.5")[1] == "kept"
    # Another key of the checkpoint, too.
    student = load_evaluated_backbone(checkpoint, "student")
    other, how, _ = features(student)
    assert how == "made" and not torch.allclose(first, other) and features()[1] == "kept"

    # The same key of another checkpoint has not: each says what differs, and is right.
    stranger = dataclasses.replace(student, key="teacher")
    found, how, text = features(stranger, dump=False)
    assert how == "made" and torch.equal(found, other) and "other weights" in text
    assert features()[1] == "kept"  # nothing was overwritten without --dump_features
    larger = load_evaluated_backbone(checkpoint, "teacher", image_size=48)
    found, how, text = features(larger, dump=False)
    assert how == "made" and "other image size" in text and "weights" not in text

    path = next((small / "train").glob("*/*.png"))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    found, how, text = features()
    assert how == "made" and "other images" in text
    assert features()[1] == "kept"  # the new ones
    monkeypatch.setattr(module, "FEATURES_VERSION", 2)
    assert "other version" in features(dump=False)[2]


def test_a_dump_alone_reads_nothing_and_writes_whole_files(backbone, small, tmp_path, monkeypatch):
    looks = extracted(monkeypatch)
    _, val = image_sets("imagefolder", small)
    for _ in range(2):
        looks.clear()
        features, labels = frozen_features(backbone, val, ALONE, num_workers=0, dump_to=tmp_path / "kept")
        assert looks
    file, = (tmp_path / "kept").iterdir()  # no temporary one
    content = engine.load_checkpoint(file)
    assert torch.equal(content["features"], features) and torch.equal(content["labels"], labels)
    assert content["features"].dtype == torch.float32 and len(content["features"]) == len(val)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {"features": 1}, {"key": {}, "features": torch.zeros(1)}])
def test_files_that_are_no_features(content, backbone, small, tmp_path):
    _, val = image_sets("imagefolder", small)
    frozen_features(backbone, val, ALONE, num_workers=0, dump_to=tmp_path / "kept")
    file, = (tmp_path / "kept").iterdir()
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(engine.InputError, match=str(file)) as caught:
        frozen_features(backbone, val, ALONE, num_workers=0, load_from=tmp_path / "kept")
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(backbone, small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(engine.InputError, match="--dump_features .*file"):
        frozen_features(backbone, image_sets("imagefolder", small)[1], ALONE, num_workers=0, dump_to=tmp_path / "file")


def test_size_on_disk_is_said_before_the_work(backbone, small, tmp_path, monkeypatch, capsys):
    """Four blocks of 96 values and the mean patch, and a label, for each image."""
    val = image_sets("imagefolder", small)[1]
    settings = {"num_workers": 0, "n_last_blocks": 4, "avgpool_patchtokens": 2, "dump_to": tmp_path / "new" / "kept"}
    frozen_features(backbone, val, ALONE, **settings)
    size = len(val) * (5 * 96 * 4 + 8)
    assert f"features of imagefolder val take {size / 1e6:.1f} MB, " in capsys.readouterr().out
    [file] = settings["dump_to"].iterdir()
    assert size < file.stat().st_size < size + 10_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: argparse.Namespace(free=size - 1))
    with pytest.raises(engine.InputError, match="--dump_features .*kept: features of imagefolder val take .* MB are free"):
        frozen_features(backbone, val, ALONE, **settings | {"num_workers": None})  # no loader is made


# ---------------------------------------------------------------- whose weights

def dino(model, head):
    """DINO's full checkpoint: a network of backbone and head with one last layer, the student in a wrapper."""
    whole = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    whole |= {f"head.{name}": value for name, value in head.state_dict().items() if not name.startswith("last_layer2")}
    return {"student": {f"module.{name}": value for name, value in whole.items()}, "teacher": whole, "epoch": 100,
            "optimizer": {"state": {}, "param_groups": []}, "dino_loss": {"center": torch.zeros(1, 32)},
            "args": argparse.Namespace(arch="vit_nano", patch_size=8, out_dim=32, use_bn_in_head=False)}


def test_dino(tmp_path):
    model, images = nano(), torch.randn(2, 3, 32, 32)
    torch.save(dino(model, iBOTHead(96, 32, shared_head=True)), tmp_path / "full.pth")
    torch.save(model.state_dict(), tmp_path / "backbone.pth")  # as DINO publishes backbones
    for backbone in (load_evaluated_backbone(tmp_path / "full.pth", "teacher", image_size=32),
                     load_evaluated_backbone(tmp_path / "full.pth", "student", image_size=32),
                     load_evaluated_backbone(tmp_path / "backbone.pth", "teacher", "vit_nano", 8, image_size=32)):
        assert torch.equal(backbone.model(images), model(images))
        assert backbone.weights_hash == module_hash(model)


def module_hash(model):
    """Of the same weights by another way."""
    from evaluation.common.backbone import weights_hash
    other = nano(7)
    before = weights_hash(other)
    other.load_state_dict(model.state_dict())
    assert weights_hash(other) != before
    return weights_hash(other)


@torch.no_grad()
@pytest.mark.parametrize("arch, timm_name, window", [("vit_tiny", "vit_tiny_patch16_224", 7),
                                                     ("swin_tiny", "swin_tiny_patch4_window7_224", 7)])
def test_timm_weights(arch, timm_name, window, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(timm_name, num_classes=10).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(1, 3, 224, 224)
    expected = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    torch.save({"model": network.state_dict()}, tmp_path / "b.pth")
    safetensors.torch.save_file({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "c.safetensors")
    hashes = set()
    for name, key in (("a.pth", "teacher"), ("b.pth", "model"), ("c.safetensors", "teacher")):
        backbone = load_evaluated_backbone(tmp_path / name, key, arch, window_size=window)
        hashes.add(backbone.weights_hash)
    # A Swin of timm has another epsilon in its norms.
    torch.testing.assert_close(backbone.model(images), expected, atol=1e-5 if arch == "vit_tiny" else 1e-3, rtol=0)
    assert len(hashes) == 1


def test_extracted_backbones(checkpoint, backbone, monkeypatch, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    for name, words in (("a.pth", []), ("b.safetensors", []), ("c.pth", ["--format", "timm"]), ("d.pth", ["--with_head", "true"])):
        monkeypatch.setattr(sys, "argv", ["", str(checkpoint), str(tmp_path / name), "--checkpoint_key", "teacher", *words])
        extract_backbone_weights.main()
        extracted = load_evaluated_backbone(tmp_path / name, "state_dict", "vit_nano", 8, image_size=32)
        assert torch.equal(extracted.model(images), backbone.model(images))
        assert extracted.weights_hash == backbone.weights_hash


@pytest.mark.parametrize("key, arch, words", [
    ("nobody", None, "nobody.*keys: teacher, student, args, epoch"),
    ("teacher", "vit_tiny", "of another shape: .*pos_embed|missing: blocks.10"),
    ("teacher", "swin_tiny", "missing: layers.0.*vit|missing: layers.0.*swin_tiny"),
])
def test_what_does_not_fit_is_listed(key, arch, words, checkpoint):
    with pytest.raises(engine.InputError, match=f"checkpoint.pth.*({words})") as caught:
        load_evaluated_backbone(checkpoint, key, arch)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_listed(checkpoint, tmp_path):
    state = nano().state_dict()
    for removed, words in (("norm.weight", "1 missing: norm.weight"), ("pos_embed", "1 missing: pos_embed")):
        torch.save({"teacher": {name: value for name, value in state.items() if name != removed}}, tmp_path / "a.pth")
        with pytest.raises(engine.InputError, match=f"a.pth.*{words}.*vit_nano"):
            load_evaluated_backbone(tmp_path / "a.pth", "teacher", "vit_nano", 8, image_size=32)
    torch.save({"teacher": state | {"dist_token": torch.zeros(1, 1, 96)}}, tmp_path / "a.pth")
    with pytest.raises(engine.InputError, match="1 unexpected: dist_token"):
        load_evaluated_backbone(tmp_path / "a.pth", "teacher", "vit_nano", 8, image_size=32)
