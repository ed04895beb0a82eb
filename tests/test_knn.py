"""k-NN evaluation: against plain definitions written here, and on bad input."""
import argparse
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import models
from evaluation import eval_knn
from evaluation.common import knn
from evaluation.common.arguments import checkpoint_keys
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.data import eval_transform, image_folders
from evaluation.common.features import extract_features, feature_dim, pool_features, sharded_loader
from evaluation.common.knn import knn_classify, topk_accuracy, usable_ks
from evaluation.common.results import append_result

TRAIN, VAL = 121, 41  # odd: two processes do not share them evenly
ALONE = engine.Process(0, 1, 0, torch.device("cpu"))


# ---------------------------------------------------------------- votes

def knn_oracle(train, labels, tests, num_classes, k, temperature):
    """Scores [m, num_classes] by the definition, in float64."""
    train, tests = train.double().numpy(), tests.double().numpy()
    scores = np.zeros((len(tests), num_classes))
    for i, x in enumerate(tests):
        similarity = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for y in train]
        for j in sorted(range(len(train)), key=lambda j: -similarity[j])[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return scores


@pytest.mark.parametrize("num_classes", [2, 3, 12])
def test_knn_equals_the_definition(num_classes):
    torch.manual_seed(0)
    train, tests = torch.randn(53, 6), torch.randn(17, 6)
    labels = torch.randint(num_classes, (53,))
    ks = (1, 7, 53)
    predictions = knn_classify(train, labels, tests, num_classes, ks, temperature=0.3)
    chunked = knn_classify(3 * train, labels, 0.1 * tests, num_classes, ks, temperature=0.3, max_block=2 * 53 + 1)
    for k in ks:
        scores = knn_oracle(train, labels.tolist(), tests, num_classes, k, 0.3)
        expected = np.argsort(-scores, axis=1)[:, :5]
        expected[np.take_along_axis(scores, expected, axis=1) == 0] = -1  # classes that no neighbour has
        assert predictions[k].tolist() == expected.tolist()
        assert torch.equal(predictions[k], chunked[k])  # neither chunks nor the features' scale matter


class LargestTensor(TorchDispatchMode):
    """Keeps the number of values of the largest tensor that an operation makes."""
    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor) and not tensor._is_view():
                self.values = max(self.values, tensor.numel())
        return made


@pytest.mark.parametrize("max_block", [9, 40, 1000, 10**6])
def test_blocks_bound_the_memory_and_change_nothing(max_block, monkeypatch):
    torch.manual_seed(0)
    train, tests, labels = torch.randn(700, 6), torch.randn(90, 6), torch.randint(3, (700,))
    expected = {k: knn_oracle(train, labels.tolist(), tests, 3, k, 0.07).argmax(axis=1) for k in (1, 20)}
    monkeypatch.setattr(knn, "TESTS", 30)
    with LargestTensor() as largest:
        predictions = knn_classify(train, labels, tests, 3, (1, 20), max_block=max_block)
    for k, ranked in predictions.items():
        assert ranked[:, 0].tolist() == expected[k].tolist()
    # Beside the training features, a block of similarities, or neighbours of a chunk of tests twice over.
    assert largest.values <= max(train.numel(), max_block, 2 * 20 * min(30, max(1, max_block // 3)))


def test_two_neighbours_outvote_a_nearer_one_by_temperature():
    s = np.cos([0.2, 0.3, 0.31])  # similarities to the test image
    train, labels = torch.tensor(np.stack((s, np.sin([0.2, 0.3, 0.31])), axis=1)), torch.tensor([1, 0, 0])
    winners = []
    for temperature in (0.001, 0.02, 0.07, 1.0):  # at the lowest, exp(s / T) itself overflows
        winners.append(knn_classify(train, labels, torch.tensor([[1.0, 0.0]]), 2, (3,), temperature)[3][0, 0].item())
        assert winners[-1] == int(np.exp((s[1] - s[0]) / temperature) + np.exp((s[2] - s[0]) / temperature) < 1)
    assert winners[0] == 1 and winners[-1] == 0


def test_accuracy_and_usable_ks(capsys):
    predictions = torch.tensor([[0, 1, 2], [1, 0, -1], [2, -1, -1], [0, 2, 1]])
    assert topk_accuracy(predictions, torch.tensor([0, 0, 0, 1])) == [25.0, 75.0]
    assert usable_ks([10, 20, 100], 20) == [10, 20]
    assert "100" in capsys.readouterr().out
    with pytest.raises(engine.InputError, match="--nb_knn 10 20.* 9 "):
        usable_ks([10, 20], 9)


# ---------------------------------------------------------------- features

@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = models.build_backbone("vit_nano", patch_size=8, img_size=32).eval()
    for parameter in model.parameters():  # a norm that is not the identity
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_pooling_modes_equal_a_plain_computation(vit):
    images = torch.randn(3, 3, 32, 32)
    x, raw = vit.prepare_tokens(images), []
    for block in vit.blocks:
        x = block(x)
        raw.append(x)
    normed = [vit.norm(x) for x in raw]
    expected = {
        (1, 0): normed[-1][:, 0],
        (3, 0): torch.cat([tokens[:, 0] for tokens in normed[-3:]], dim=1),
        (1, 1): raw[-1][:, 1:].sum(dim=1) / 16,
        (4, 1): raw[-1][:, 1:].sum(dim=1) / 16,
        (1, 2): torch.cat((normed[-1][:, 0], normed[-1][:, 1:].sum(dim=1) / 16), dim=1),
        (2, 2): torch.cat((normed[-2][:, 0], normed[-1][:, 0], normed[-1][:, 1:].sum(dim=1) / 16), dim=1),
    }
    for (n, mode), features in expected.items():
        assert feature_dim(vit, n, mode) == features.shape[1]
        torch.testing.assert_close(pool_features(vit, images, n, mode), features, rtol=0, atol=1e-5)
    with pytest.raises(engine.InputError, match="--n_last_blocks 5.* 4 "):
        feature_dim(vit, 5)


@torch.no_grad()
def test_swin_features():
    torch.manual_seed(0)
    swin = models.swin_tiny(drop_path_rate=0.0).eval()
    images = torch.randn(1, 3, 224, 224)
    features = pool_features(swin, images, 4, 0)
    assert features.shape[1] == feature_dim(swin, 4) == 384 + 384 + 768 + 768
    torch.testing.assert_close(features[:, -768:], swin(images), rtol=0, atol=1e-5)
    assert feature_dim(swin, 1) == 768
    for mode in (1, 2):
        with pytest.raises(engine.InputError, match="--avgpool_patchtokens"):
            feature_dim(swin, 1, mode)


# ---------------------------------------------------------------- data

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """DATA/{train,val}/CLASS/*.png of 32 x 32 pixels: handwritten digits."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(images[:TRAIN + VAL], labels, strict=False)):
        folder = root / ("train" if i < TRAIN else "val") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((pixels.reshape(8, 8) * 255 / 16).astype(np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(vit, tmp_path_factory):
    """A file as pre-training writes it."""
    path = tmp_path_factory.mktemp("job") / "checkpoint.pth"
    network = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    network["head.mlp.0.weight"] = torch.ones(2, 2)
    student = {f"module.{name}": value + 0.1 for name, value in network.items()}
    student["module.backbone.masked_embed"] = torch.zeros(1, vit.embed_dim)
    args = argparse.Namespace(arch="vit_nano", patch_size=8, window_size=7, global_crops_size=32)
    torch.save({"teacher": network, "student": student, "args": args, "epoch": 1}, path)
    return path


def grey(folder, *classes, value=128):
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (20, 14), (value, value, value)).save(folder / name / "a.png")


def test_val_labels_follow_the_names_of_train(tmp_path):
    grey(tmp_path / "train", "ant", "bee", "cat", "dog")
    grey(tmp_path / "val", "bee", "dog")  # on their own they would count as 0 and 1
    train, val = image_folders(tmp_path, 16)
    assert train.targets == [0, 1, 2, 3]
    assert val.targets == [1, 3] and [val[i][1:] for i in (0, 1)] == [(1, 0), (3, 1)]
    grey(tmp_path / "val", "eel")
    with pytest.raises(engine.InputError, match="val.*train.*eel"):
        image_folders(tmp_path, 16)


def test_eval_transform_equals_pil_and_the_formula():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(300, 410, 3), dtype=np.uint8))
    resized = image.resize((int(256 * 410 / 300), 256), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), (256 - 224) // 2
    pixels = np.asarray(resized)[top:top + 224, left:left + 224] / 255
    expected = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    assert np.abs(eval_transform(224)(image).permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert eval_transform(32)(Image.new("RGB", (5, 3))).shape == (3, 32, 32)


def test_extracted_rows_are_in_the_order_of_the_data(digits):
    train, _ = image_folders(digits, 32)
    features, labels = extract_features(lambda images: images.flatten(1), sharded_loader(train, 7, 0, ALONE), ALONE)
    assert labels.tolist() == train.targets
    for i in (0, 50, TRAIN - 1):
        assert torch.equal(features[i], eval_transform(32)(train.loader(train.samples[i][0])).flatten())
    torch.nn.Linear(features.shape[1], 2)(features).sum().backward()  # heads can be trained on them
    with pytest.raises(engine.InputError, match="train.*not finite"):
        extract_features(lambda images: images.flatten(1) / 0, sharded_loader(train, 7, 0, ALONE), ALONE, "train")


# ---------------------------------------------------------------- backbones

def test_prefixes_give_the_same_features(vit, checkpoint, tmp_path):
    images, state = torch.randn(2, 3, 32, 32), vit.state_dict()
    wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
    for content, key in ((state, "teacher"), ({"state_dict": state}, "state_dict"), ({"student": wrapped}, "student")):
        torch.save(content, tmp_path / "a.pth")
        backbone = load_evaluated_backbone(tmp_path / "a.pth", key, "vit_nano", 8, None, 32)
        assert torch.equal(backbone.model(images), vit(images))
        assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    stored = load_evaluated_backbone(checkpoint, "teacher")  # settings from the file
    assert (stored.arch, stored.patch_size, stored.image_size) == ("vit_nano", 8, 32)
    assert torch.equal(stored.model(images), vit(images))
    larger = load_evaluated_backbone(checkpoint, "teacher", image_size=48)  # the model resamples its positions
    assert larger.image_size == 48 and larger.model.pos_embed.shape == vit.pos_embed.shape
    assert larger.model(torch.randn(1, 3, 48, 48)).shape == (1, 96)


def test_random_weights_are_reproducible_and_leave_the_generator_alone(capsys):
    torch.manual_seed(5)
    first = load_evaluated_backbone("random", "random", "vit_nano", 8, None, 32).model
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    second = load_evaluated_backbone("random", "random", "vit_nano", 8, None, 32).model
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert "random weights" in capsys.readouterr().out
    assert checkpoint_keys("random", "teacher,student") == ["random"]
    assert checkpoint_keys("a.pth", "teacher, student") == ["teacher", "student"]


@pytest.mark.parametrize("settings, words", [
    ({"key": "nobody"}, "nobody.*student"),
    ({"arch": "vit_tiny"}, "checkpoint.pth"),
    ({"arch": "swin_tiny"}, "checkpoint.pth"),
    ({"patch_size": 16}, "--patch_size"),
    ({"image_size": 33}, "--image_size 33"),
    ({"weights": "download"}, "nothing is downloaded"),
    ({"weights": "supervised"}, "nothing is downloaded"),
])
def test_weights_that_do_not_fit(checkpoint, settings, words):
    with pytest.raises(engine.InputError, match=words) as caught:
        load_evaluated_backbone(**({"weights": checkpoint, "key": "teacher"} | settings))
    assert "\n" not in str(caught.value)


def test_other_weights_that_do_not_fit(checkpoint, vit, tmp_path):
    foreign = torch.load(checkpoint, weights_only=False)
    foreign["args"].arch = "resnet50"
    torch.save(foreign, tmp_path / "foreign.pth")
    with pytest.raises(engine.InputError, match="foreign.pth.*resnet50"):
        load_evaluated_backbone(tmp_path / "foreign.pth", "teacher")
    swin = models.swin_tiny().state_dict()
    torch.save(swin, tmp_path / "swin.pth")
    for settings in ({"arch": "vit_small"}, {"arch": "swin_tiny", "window_size": 14}):
        with pytest.raises(engine.InputError, match="swin.pth"):
            load_evaluated_backbone(tmp_path / "swin.pth", "teacher", **settings)


# ---------------------------------------------------------------- results

def test_results_are_appended(tmp_path):
    for k in ("10", "20"):
        append_result(tmp_path / "new", "knn", "a.pth", "teacher", {"arch": "vit_nano"}, {k: {"top1": 1.0}})
    records = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [record["metrics"] for record in records] == [{"10": {"top1": 1.0}}, {"20": {"top1": 1.0}}]
    assert records[0]["versions"]["torch"] == torch.__version__
    assert not list((tmp_path / "new").glob("*.tmp*"))
    (tmp_path / "new" / "results.json").write_text("[{")
    with pytest.raises(engine.InputError, match="results.json"):
        append_result(tmp_path / "new", "knn", "a.pth", "teacher", {}, {})
    assert (tmp_path / "new" / "results.json").read_text() == "[{"


# ---------------------------------------------------------------- the script

def test_script_equals_the_definition(digits, checkpoint, vit, tmp_path, monkeypatch, capfd):
    """Two processes: test_features.py."""
    arguments = ("--pretrained_weights", checkpoint, "--data_path", digits, "--batch_size_per_gpu", 9,
                 "--nb_knn", 1, 5, 20, 200, "--checkpoint_key", "teacher,student", "--device", "cpu", "--num_workers", 0,
                 "--output_dir", tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, arguments)])
    eval_knn.main()
    printed = capfd.readouterr().out
    assert sum("-NN" in line for line in printed.splitlines()) == 6  # two keys, three usable k
    assert printed.count("k = 200 left out") == 1

    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["key"] for record in records] == ["teacher", "student"]
    train, val = image_folders(digits, 32)
    with torch.no_grad():
        features = [vit(torch.stack([image for image, _, _ in data])) for data in (train, val)]
    scores = knn_oracle(features[0], train.targets, features[1], 10, 5, 0.07)
    top1 = 100 * np.mean(scores.argmax(axis=1) == np.array(val.targets))
    assert records[0]["metrics"]["5"]["top1"] == pytest.approx(top1)
    assert f"teacher, 5-NN: top-1 {top1:.2f} %" in printed


@pytest.mark.parametrize("changed, words", [
    (["--pretrained_weights", "nowhere.pth"], ["nowhere.pth"]),
    (["--checkpoint_key", "nobody"], ["nobody", "student", "teacher"]),
    (["--arch", "vit_tiny"], ["checkpoint.pth"]),
    (["--data_path", "{tmp}"], ["val"]),
    (["--nb_knn", "500"], ["--nb_knn 500"]),
    (["--data_path", "{tmp}/bad", "--nb_knn", "1", "--num_workers", "1"], ["broken.png"]),
])
def test_bad_input_ends_with_one_line(digits, checkpoint, tmp_path, monkeypatch, capfd, changed, words):
    grey(tmp_path / "train", "a")  # no val
    for part in ("train", "val"):
        grey(tmp_path / "bad" / part, "a")
    (tmp_path / "bad" / "val" / "a" / "broken.png").write_text("no image")
    given = ["--pretrained_weights", str(checkpoint), "--data_path", str(digits), "--device=cpu", "--num_workers=0"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *given, *(text.format(tmp=tmp_path) for text in changed)])
    with pytest.raises(SystemExit) as end:
        engine.run(eval_knn.main)
    message = capfd.readouterr().err
    assert end.value.code == 1
    assert len(message.splitlines()) == 1 and message.startswith("error: "), message
    assert all(word in message for word in words), message

