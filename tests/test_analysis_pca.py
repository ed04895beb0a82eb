"""Maps of patch features: the basis is scikit-learn's with a fixed sign, and one for all images."""
import numpy as np
import pytest
import torch
from analysis_data import nano, run_main, write_checkpoint, write_images
from PIL import Image
from sklearn.decomposition import PCA

import engine
from analysis import common
from analysis.pca_map import visualize_pca as module
from images import load_rgb


def test_components_equal_scikit_learn():
    torch.manual_seed(0)
    tokens = torch.randn(200, 12) @ torch.randn(12, 12) + 5
    mean, basis, shares = module.principal_components(tokens)
    expected = PCA(3, svd_solver="full").fit(tokens.double().numpy())
    np.testing.assert_allclose(mean, expected.mean_)
    np.testing.assert_allclose(shares, expected.explained_variance_ratio_)
    np.testing.assert_allclose(basis.abs(), np.abs(expected.components_.T), atol=1e-10)
    assert basis.dtype == torch.float64
    for order in (torch.arange(200).flip(0), torch.arange(200).roll(7)):  # whatever sign the solver finds
        torch.testing.assert_close(module.principal_components(tokens[order])[1], basis)
    torch.testing.assert_close(module.principal_components(-tokens)[1], basis)
    assert (basis.max(dim=0).values == basis.abs().max(dim=0).values).all()


def test_colours_have_one_scale_for_all_tokens():
    values = torch.arange(101, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2, 0]) + 3
    found = module.colours(values, clipped=0.1)
    assert found[:11, 0].tolist() == [0] * 11 and found[90:, 0].tolist() == [255] * 11 and found[50, 0] == 128
    assert torch.equal(found[:, 1].flip(0), found[:, 0]) and not found[:, 2].any()  # a component without a spread


def test_the_picture_equals_a_plain_computation(tmp_path, monkeypatch, capsys):
    """Seven images in two rows; the colour of each cell, and images as they are."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth")
    write_images(tmp_path / "images", "ab", 4)
    words = ["--pretrained_weights", checkpoint, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out"]
    run_main(monkeypatch, module, *words, "--show_pics", 7, "--batch_size", 3)
    printed = capsys.readouterr().out
    assert "of the variance of 448 patches" in printed and "7 images" in printed  # 64 pixels, cells of 8

    paths = sorted((tmp_path / "images").rglob("*.png"))
    paths = [paths[i] for i in torch.randperm(8, generator=torch.Generator().manual_seed(0))[:7]]
    images = torch.stack([common.squared(64, 64)(load_rgb(path)) for path in paths])
    with torch.no_grad():
        tokens = nano(0)(images, return_all_tokens=True)[:, 1:].flatten(0, 1).double().numpy()
    pca = PCA(3, svd_solver="full").fit(tokens)
    values = pca.transform(tokens) * np.sign([row[np.abs(row).argmax()] for row in pca.components_])
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    expected = (255 * ((values - low) / (high - low)).clip(0, 1)).reshape(7, 8, 8, 3)
    picture = np.asarray(Image.open(tmp_path / "out/pca.png")).astype(int)
    assert picture.shape == (4 * 192 + 4 * 8, 6 * 192 + 5 * 8, 3)
    for i in range(7):
        x, y = i % 6 * 200, i // 6 * 408
        cells = picture[y + 200:y + 392, x:x + 192][12::24, 12::24]
        np.testing.assert_allclose(cells, expected[i], atol=1)
        shown = np.asarray(load_rgb(paths[i]).resize((192, 192), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(picture[y:y + 192, x:x + 192] - shown).mean() < 3
    assert (picture[408:, 200:] == 255).all()


@pytest.mark.parametrize("words, message", [
    (["--pretrained_weights", "random", "--arch", "swin_tiny"], r"swin_tiny has no \[CLS\] token"),
    (["--image_size", "60"], r"--image_size 60 does not divide into patches of 8"),
    (["--data_path", "{tmp}/nowhere"], r"nowhere: No such file"),
    (["--output_dir", "{tmp}/checkpoint.pth"], r"--output_dir .*cannot be made"),
])
def test_mistakes_are_named(tmp_path, monkeypatch, words, message):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, module, "--pretrained_weights", checkpoint, "--data_path", tmp_path,
                 *(word.format(tmp=tmp_path) for word in words))
