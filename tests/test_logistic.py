"""Logistic regression on frozen features: the optimum against scikit-learn's, gradients, bounds, and the script."""
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import engine
from evaluation import eval_logistic_regression
from evaluation.common.data import image_sets
from evaluation.common.logistic import fit_logistic, loss_and_gradient, predict


@pytest.fixture(scope="module")
def data():
    """300 digits as points of length 1, float64: (features [300, 64], labels [300])."""
    digits, labels = load_digits(return_X_y=True)
    return F.normalize(torch.tensor(digits[:300]), dim=1), torch.tensor(labels[:300])


def objective(weights, features, labels, penalty):
    return F.cross_entropy(features @ weights, labels) + penalty / 2 * weights.square().sum()


def test_gradient_is_that_of_the_formula(data):
    torch.manual_seed(0)
    weights = torch.randn(64, 10, dtype=torch.float64, requires_grad=True)
    expected = objective(weights, *data, 0.3)
    gradient, = torch.autograd.grad(expected, weights)
    for max_block in (10**6, 70, 1):  # 300 rows, 7 and 1 at a time
        found = loss_and_gradient(weights.detach(), *data, 0.3, None, max_block)
        torch.testing.assert_close(found, (expected.detach(), gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [1e-4, 0.01, 1.0])
def test_optimum_is_scikit_learns(data, penalty):
    features, labels = data
    other = LogisticRegression(C=1 / (penalty * len(features)), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(features.numpy(), labels.numpy())
    expected = torch.tensor(other.coef_.T)
    weights, fit = fit_logistic(features, labels, 10, penalty, tolerance=1e-10)
    assert fit["excess"] <= 1e-10
    assert fit["objective"] == pytest.approx(objective(expected, *data, penalty).item(), rel=1e-9)
    torch.testing.assert_close(weights, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert (features @ weights).argmax(dim=1).tolist() == other.predict(features.numpy()).tolist()
    single, fit = fit_logistic(features.float(), labels, 10, penalty, tolerance=1e-8)  # as features come
    assert fit["excess"] <= 1e-8  # also where products in single precision are not enough
    assert objective(single, *data, penalty).item() == pytest.approx(objective(expected, *data, penalty).item(), rel=1e-7)


def test_bound_holds_along_the_way(data):
    """Whatever the number of iterations, the objective is above its minimum by no more than `excess` says."""
    best = fit_logistic(*data, 10, 1e-5, tolerance=1e-12)[1]["objective"]
    seen = []
    for limit in (0, 20, 40, 60, 80):
        weights, fit = fit_logistic(*data, 10, 1e-5, tolerance=1e-12, max_iter=limit)
        assert fit["iterations"] == limit
        assert fit["objective"] == pytest.approx(objective(weights, *data, 1e-5).item(), rel=1e-9)
        assert -1e-9 <= fit["objective"] - best <= fit["excess"] * fit["objective"]
        assert limit == 0 or fit["objective"] - best <= fit["excess"] * (np.log(10) - fit["objective"])
        seen.append(fit["objective"])
    assert seen == sorted(seen, reverse=True) and seen[0] == pytest.approx(np.log(10))  # from zero weights


def test_start_and_blocks_do_not_matter(data):
    plain, _ = fit_logistic(*data, 10, 1e-3, tolerance=1e-12)
    torch.manual_seed(0)
    for settings in ({"start": torch.randn(64, 10, dtype=torch.float64)}, {"max_block": 170}):
        other, _ = fit_logistic(*data, 10, 1e-3, tolerance=1e-12, **settings)
        torch.testing.assert_close(other, plain, atol=1e-5, rtol=0)
    at_optimum, fit = fit_logistic(*data, 10, 1e-3, start=plain, tolerance=1e-9)
    assert fit["iterations"] == 0
    torch.testing.assert_close(at_optimum, plain, atol=1e-9, rtol=0)


def test_search_ends_where_rounding_does(data):
    for features in (data[0], data[0].float()):
        _, fit = fit_logistic(features, data[1], 10, 1e-4, tolerance=0, max_iter=10**6)
        assert fit["iterations"] < 2000 and fit["excess"] < 1e-12


def test_features_that_span_little(data):
    features = data[0].clone()
    features[:, 10:] = features[:, :1]  # many columns alike
    weights, fit = fit_logistic(features, data[1], 10, 1e-4, tolerance=1e-8)
    assert fit["excess"] <= 1e-8 and torch.isfinite(weights).all()


def test_large_lambda_is_the_rule_of_class_means(data):
    """At the raw lambdas of the reference: W -> (1 / lambda) (n_c / n mean_c - mean / K), Q25 of its description."""
    features, labels = data
    weights, _ = fit_logistic(features, labels, 10, 100.0, tolerance=1e-14)
    sums = torch.stack([features[labels == c].sum(dim=0) for c in range(10)], dim=1)
    expected = (sums / len(labels) - features.mean(dim=0)[:, None] / 10) / 100
    torch.testing.assert_close(weights, expected, atol=1e-2 * expected.abs().max().item(), rtol=0)


    # At the default tolerance the weights are tiny, but not zero: they classify like that rule.
    weights, fit = fit_logistic(features.float(), labels, 10, 100.0)
    assert fit["iterations"] > 0 and (features @ weights).argmax(dim=1).tolist() == (features @ expected).argmax(dim=1).tolist()


def test_one_class(data):
    weights, fit = fit_logistic(data[0], torch.zeros(300, dtype=torch.int64), 1, 0.1)
    assert weights.tolist() == 64 * [[0.0]] and fit == {"objective": 0, "excess": 0, "iterations": 0}


def test_predictions(data):
    weights = torch.randn(64, 4, dtype=torch.float64)
    for rows in (7, 1000):
        found = predict(weights, 3 * data[0].float(), "cpu", rows)
        assert found.tolist() == (data[0] @ weights).argsort(dim=1, descending=True).tolist()


# ---------------------------------------------------------------- the script

def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval_logistic_regression.py", "--pretrained_weights", "random", "--arch", "vit_nano",
                                      "--patch_size", "8", "--image_size", "32", "--num_workers", "0", "--device", "cpu",
                                      *map(str, words)])
    engine.run(eval_logistic_regression.main)


def kept(folder):
    train, val = (engine.load_checkpoint(next(folder.glob(f"*{part}*"))) for part in ("train", "val"))
    return F.normalize(train["features"].double(), dim=1), train["labels"], F.normalize(val["features"].double(), dim=1), val["labels"]


@pytest.mark.parametrize("raw", [False, True])
def test_script_equals_scikit_learn(raw, digits, tmp_path, monkeypatch, capsys):
    # Of classes 0..9 the list leaves out two.
    names = [name for name in image_sets("imagefolder", digits)[0].paths() if name.split("/")[1] not in "29"]
    (tmp_path / "list.txt").write_text("\n".join(names[:-1]))
    run(monkeypatch, "--data_path", digits, "--train_subset", tmp_path / "list.txt", "--output_dir", tmp_path, "--raw_lambda", raw,
        "--dump_features", tmp_path / "kept", "--lr_lambd", "0.01", "1", "0.1", "--tolerance", "1e-6", "--epochs", "5000")
    x, y, val, val_labels = kept(tmp_path / "kept")
    assert len(x) == len(names) - 1 and len(y.unique()) == 8
    record, = json.loads((tmp_path / "results.json").read_text())
    assert list(record["metrics"]) == ["0.01", "1", "0.1"]
    assert record["settings"]["raw_lambda"] is raw and record["settings"]["train_subset"] == str(tmp_path / "list.txt")
    printed = capsys.readouterr().out
    for lambd, fit in record["metrics"].items():
        penalty = float(lambd) if raw else float(lambd) / len(x)
        other = LogisticRegression(C=1 / (penalty * len(x)), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
        W = torch.tensor(other.coef_.T)
        expected = F.cross_entropy(x @ W, torch.tensor(np.searchsorted(other.classes_, y.numpy()))) + penalty / 2 * W.square().sum()
        assert fit["objective"] == pytest.approx(expected.item(), rel=1e-5) and fit["excess"] <= 1e-6
        assert fit["top1"] == pytest.approx(100 * np.mean(other.predict(val.numpy()) == val_labels.numpy()), abs=100 / 41 + 1e-9)
        assert fit["top1"] <= fit["top5"]
        assert f"random, lambda {lambd}: top-1 {fit['top1']:.2f} %" in printed
    assert "not converged" not in printed


def test_a_fit_cut_short_says_so(digits, monkeypatch, capsys):
    run(monkeypatch, "--data_path", digits, "--lr_lambd", "1e-4", "--epochs", "20")
    assert "after 20 iterations; not converged" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["--lr_lambd", "0.1", "0"], "--lr_lambd"), (["--tolerance", "-1"], "--tolerance"),
    (["--data_path", "nowhere"], "nowhere"), (["--train_subset", "2"], "--train_subset 2"),
    (["--dataset", "cifar10", "--data_path", "nowhere"], "--dataset cifar10.*nowhere.*cifar-10-batches-py"),
])
def test_bad_input_ends_with_one_line(words, message, digits, monkeypatch, capsys):

    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--data_path", digits, *words)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1 and re.search(message, error), error
