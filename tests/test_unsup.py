"""Unsupervised classification: heads of several layouts, k-means against plain definitions, scores, and the script."""
import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, fowlkes_mallows_score, normalized_mutual_info_score

import engine
import models
import utils
from evaluation.common.backbone import load_evaluated_backbone
from evaluation.common.clustering import head_clusters, kmeans, load_projection_head
from evaluation.common.data import eval_transform, image_sets
from evaluation.unsupervised import unsup_cls
from models.head import iBOTHead

# ---------------------------------------------------------------- heads


def wrapped(head, prefix, separate=True):
    """Names as in a checkpoint; DINO's heads have no second last layer."""
    return {f"{prefix}head.{name}": value for name, value in head.state_dict().items()
            if separate or not name.startswith("last_layer2")}


@pytest.mark.parametrize("settings", [{}, {"shared_head": True}, {"norm": "bn"}, {"norm": "ln"}, {"act": "relu"},
                                      {"hidden_dim": 24, "bottleneck_dim": 10}])
def test_heads_are_rebuilt_from_their_weights(settings):
    torch.manual_seed(0)
    head = iBOTHead(16, 30, patch_out_dim=20, **{"hidden_dim": 64, **settings}).eval()
    for value in head.state_dict().values():
        if value.is_floating_point():  # norms, running statistics and weight_g too
            value.add_(0.3 * torch.rand_like(value))
    args = argparse.Namespace(act_in_head=settings.get("act", "gelu"))
    x = torch.randn(50, 16)
    for key, state in (("teacher", wrapped(head, "")), ("student", wrapped(head, "module.")), ("teacher", wrapped(head, "", False))):
        found = load_projection_head({key: state | {"backbone.norm.weight": torch.ones(1)}, "args": args}, key, "a.pth")
        torch.testing.assert_close(found(x), head(x), rtol=0, atol=0)
        assert not found.training and not any(p.requires_grad for p in found.parameters())
    clusters = head_clusters(found, x, "cpu")
    assert clusters.dtype == torch.int64 and clusters.tolist() == [int(head(row[None]).argmax()) for row in x]


@pytest.mark.parametrize("removed, words", [
    ("", "holds no projection head .*head.mlp.0.weight, head.last_layer.weight_v.*--clusters kmeans"),
    ("last_layer.weight_v", "holds no projection head .*missing: head.last_layer.weight_v"),
    ("mlp.2.bias", "1 missing: mlp.2.bias"),
])
def test_heads_that_are_not_whole(removed, words):
    head = iBOTHead(16, 30, hidden_dim=24)
    state = {name: value for name, value in wrapped(head, "").items() if removed and not name.endswith(removed)}
    with pytest.raises(engine.InputError, match=f"a.pth.*{words}"):
        load_projection_head({"teacher": state | {"backbone.norm.weight": torch.ones(1)}}, "teacher", "a.pth", hint="; --clusters kmeans needs none")


# ---------------------------------------------------------------- k-means

def clouds(k, each, spread, seed=0):
    """k groups of points of length 1, shuffled: (points [k * each, 12], group of each)."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(k).repeat(each)[torch.randperm(k * each, generator=generator)]
    points = torch.randn(k, 12, generator=generator)[groups] + spread * torch.randn(k * each, 12, generator=generator)
    return F.normalize(points, dim=1), groups


def test_kmeans_finds_clouds_and_ignores_lengths():
    x, groups = clouds(8, 30, 0.1)
    clusters, inertia = kmeans(x, 8)
    assert normalized_mutual_info_score(groups, clusters) == pytest.approx(1)
    # k-means in plain words: every point is with the mean that it is nearest to.
    means = torch.stack([x[clusters == c].mean(dim=0) for c in range(8)]).double()
    distances = (x.double()[:, None] - means).square().sum(dim=2)
    assert distances.argmin(dim=1).tolist() == clusters.tolist()
    assert inertia == pytest.approx(distances.min(dim=1).values.sum().item(), rel=1e-4)
    scaled, _ = kmeans(x * torch.linspace(0.1, 9, len(x))[:, None], 8, max_block=100)
    assert torch.equal(scaled, clusters)
    assert torch.equal(kmeans(x, 8)[0], clusters)


def test_kmeans_is_as_good_as_scikit_learns():
    x, _ = clouds(20, 30, 0.8)
    other = [KMeans(20, n_init=1, random_state=seed).fit(x.numpy()).inertia_ for seed in range(8)]
    own = [kmeans(x, 20, seed)[1] for seed in range(8)]
    assert len(set(own)) > 1  # the seed counts
    assert np.mean(own) < 1.05 * np.mean(other)
    clusters, _ = kmeans(x, 20, seed=3)
    means = torch.stack([x[clusters == c].mean(dim=0) for c in range(20)])
    assert torch.cdist(x, means).argmin(dim=1).tolist() == clusters.tolist()  # it has come to rest


def test_kmeans_of_hard_cases():
    x, _ = clouds(3, 4, 0.5)
    assert sorted(kmeans(x, 12)[0].tolist()) == list(range(12))  # a cluster each
    clusters, inertia = kmeans(x[:1].repeat(9, 1), 4)  # one point, nine times
    assert inertia < 1e-6 and len(clusters) == 9
    assert kmeans(x, 1)[0].tolist() == 12 * [0]
    with pytest.raises(engine.InputError, match="13 clusters of 12 images"):
        kmeans(x, 13)


def test_a_cluster_without_images_gets_some(monkeypatch):
    x, groups = clouds(4, 20, 0.05)
    first = int((groups == 0).nonzero()[0])
    monkeypatch.setattr("evaluation.common.clustering.spread_out", lambda x, k, generator: torch.full((k,), first))
    clusters, _ = kmeans(x, 4)  # all centres begin at one image
    assert len(clusters.unique()) == 4


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "checkpoint.pth"
    torch.manual_seed(0)
    networks = {}
    for key in ("teacher", "student"):
        model = models.build_backbone("vit_nano", patch_size=8, img_size=32)
        head = iBOTHead(96, 25, shared_head=True, hidden_dim=64)
        networks[key] = {f"backbone.{name}": value for name, value in model.state_dict().items()} | wrapped(head, "")
    torch.save(networks | {"args": argparse.Namespace(arch="vit_nano", patch_size=8, global_crops_size=32)}, path)
    return path


def run(monkeypatch, checkpoint, digits, *words):
    monkeypatch.setattr(sys, "argv", ["unsup_cls.py", "--pretrained_weights", str(checkpoint), "--data_path", str(digits),
                                      "--num_workers", "0", "--device", "cpu", *map(str, words)])
    engine.run(unsup_cls.main)


def test_script_equals_a_plain_computation(checkpoint, digits, tmp_path, monkeypatch, capsys):
    run(monkeypatch, checkpoint, digits, "--output_dir", tmp_path, "--checkpoint_key", "teacher,student", "--out_dim", "25")
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["key"] for record in records] == ["teacher", "student"]
    printed = capsys.readouterr().out
    val = image_sets("imagefolder", digits, val_transform=eval_transform(32))[1]
    images, labels = torch.stack([val[i][0] for i in range(len(val))]), val.targets
    for record in records:
        backbone = load_evaluated_backbone(checkpoint, record["key"]).model
        network = models.MultiCropWrapper(backbone, load_projection_head(torch.load(checkpoint, weights_only=False), record["key"], ""))
        clusters = {"head": network.head(backbone(images)).argmax(dim=1).numpy(), "kmeans": kmeans(backbone(images), 10)[0].numpy()}
        assert record["metrics"].keys() == clusters.keys()
        for name, found in clusters.items():
            counts = np.array([[np.sum((labels == i) & (found == j)) for j in range(25)] for i in range(10)])
            expected = {"acc": best_assignment(counts) / len(labels), "ari": adjusted_rand_score(labels, found),
                        "nmi": normalized_mutual_info_score(labels, found), "fmi": fowlkes_mallows_score(labels, found)}
            for metric, value in expected.items():
                assert record["metrics"][name][metric] == pytest.approx(100 * value)
            assert record["metrics"][name]["clusters"] == len(set(found))
            assert f"{record['key']}, {name}: ACC {100 * expected['acc']:.2f} %" in printed


def best_assignment(counts):
    """Images on the best one-to-one assignment of columns to rows, by dynamic programming over sets of rows."""
    best = {0: 0}
    for column in counts.T:
        new = dict(best)
        for rows, value in best.items():
            for i, count in enumerate(column):
                if not rows >> i & 1:
                    new[rows | 1 << i] = max(new.get(rows | 1 << i, 0), value + count)
        best = new
    return max(best.values())


def test_scores_of_permuted_and_of_unused_clusters():
    labels = np.repeat(np.arange(6), [3, 4, 5, 6, 7, 8])
    for shift in (0, 1):  # with 1, cluster 0 is never used
        scores = utils.clustering_scores(labels, (labels * 5 + 2) % 6 + shift)
        assert list(scores.values()) == pytest.approx([1, 1, 1, 1])


def test_other_numbers_of_clusters_and_k_means_alone(checkpoint, digits, tmp_path, monkeypatch):
    state = engine.backbone_state_dict(engine.load_checkpoint(checkpoint), "teacher", checkpoint)
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    words = ("--checkpoint_key", "state_dict", "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32", "--output_dir", tmp_path)
    run(monkeypatch, tmp_path / "backbone.pth", digits, *words, "--clusters", "kmeans", "--num_clusters", "15")
    run(monkeypatch, tmp_path / "backbone.pth", digits, *words, "--clusters", "kmeans", "--avgpool_patchtokens", "2")
    records = json.loads((tmp_path / "results.json").read_text())
    assert [list(record["metrics"]) for record in records] == [["kmeans"], ["kmeans"]]
    assert records[0]["metrics"]["kmeans"]["clusters"] == 15


@pytest.mark.parametrize("words, message", [
    (["--out_dim", "1000"], "--out_dim 1000: .*25 outputs"),
    (["--n_last_blocks", "4"], "--n_last_blocks must be 1"),
    (["--num_clusters", "42"], "42 clusters of 41 images"),
    (["--checkpoint_key", "nobody"], "nobody.*teacher, student"),
    (["--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "8"], "--clusters head: random weights have no projection head"),
])
def test_bad_input_ends_with_one_line(words, message, checkpoint, digits, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, checkpoint, digits, *words)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1 and re.search(message, error), error
