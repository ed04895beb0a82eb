"""What the analyses share, and pattern layouts: choice of clusters and members, tiles to the pixel, the memory bank."""
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analysis_data import nano, run_main, write_checkpoint, write_images
from PIL import Image

import engine
from analysis import common
from analysis.extract_pattern import extract_topk_cluster as pattern
from evaluation.common.clustering import load_projection_head

# ---------------------------------------------------------------- shared parts


def test_mass_mask_by_hand():
    weights = torch.tensor([0.50, 0.20, 0.10, 0.15, 0.05])
    assert common.mass_mask(weights, 0.6).tolist() == [True, True, False, False, False]
    assert common.mass_mask(weights, 1.0).all()
    assert common.mass_mask(torch.stack((weights, weights.flip(0))), 0.3).nonzero().tolist() == [[0, 0], [1, 4]]


@pytest.mark.parametrize("mass", (0.1, 0.35, 0.6, 0.95))
def test_mass_mask_keeps_the_fewest_weights_that_hold_the_mass(mass):
    weights = torch.rand(7, 50, generator=torch.Generator().manual_seed(0)) ** 3
    for row, kept in zip(weights.double(), common.mass_mask(weights, mass), strict=True):
        held, ordered = row[kept].sum() / row.sum(), row.sort(descending=True).values / row.sum()
        assert held >= mass and row[kept].min() >= row[~kept].max()
        assert ordered[:kept.sum() - 1].sum() < mass  # one fewer would not do


def test_last_block_is_the_models_own_and_runs_once():
    model, images, runs = nano(), torch.randn(2, 3, 32, 40), []
    model.blocks[-1].register_forward_hook(lambda *_: runs.append(1))
    attention, tokens = common.last_block(model, images)
    assert len(runs) == 1
    torch.testing.assert_close(attention, model.get_last_selfattention(images)[:, :, 0, 1:])
    torch.testing.assert_close(tokens, model.get_intermediate_layers(images, 1, norm=False)[0])
    assert attention.shape == (2, 3, 20)


def test_heat_map_is_close_to_matplotlibs():
    colours = common.heat_map(np.arange(256).reshape(16, 16)).reshape(-1, 3).astype(int)
    for place, expected in ((0, (68, 1, 84)), (255, (253, 231, 37)), (128, (33, 145, 140)), (64, (59, 82, 139))):
        assert abs(colours[place] - expected).max() <= 3
    assert (common.heat_map(np.full((2, 2), 3.0)) == (68, 1, 84)).all()  # no range: no division by zero
    assert (common.heat_map(np.array([[0, 1]]), "inferno")[0] == ((0, 0, 4), (252, 255, 164))).all()


def test_swin_is_refused(tmp_path):
    with pytest.raises(engine.InputError, match="swin_tiny has no .CLS. token"):
        common.load_vit("random", arch="swin_tiny")


# ---------------------------------------------------------------- choice

def bank_of(clusters, confidences):
    return torch.stack((torch.tensor(confidences), torch.tensor(clusters).float()), dim=-1)


def test_clusters_and_members_by_hand():
    bank = bank_of([[0, 2, 2], [2, 1, 2], [1, 1, 1], [3, 0, 2]], [[.9, .2, .4], [.7, .5, .1], [-.1, -.3, -.2], [.1, .2, .7]])
    counts = pattern.cluster_counts(bank, 6)
    assert counts.tolist() == [2, 4, 5, 1, 0, 0]
    assert pattern.largest_clusters(counts, 3) == [2, 1, 0] and pattern.largest_clusters(counts, 9) == [2, 1, 0, 3]
    assert pattern.best_members(bank, 2, 10) == [(1, 0), (3, 2), (0, 2)]  # one patch an image; of equals the first
    assert pattern.best_members(bank, 1, 10) == [(1, 1), (2, 0)]  # members below 0, no strangers
    assert pattern.best_members(bank, 2, 2) == [(1, 0), (3, 2)] and pattern.best_members(bank, 5, 2) == []
    assert pattern.best_members(bank_of([1, 0, 1], [.1, .9, .3]), 1, 2) == [(2, 0), (0, 0)]


def test_distinct_patches_by_hand():
    attention, clusters = torch.tensor([.1, .5, .4, .3, .2, .05]), torch.tensor([7., 8, 8, 9, 9, 4])
    assert pattern.distinct_patches(attention, clusters, 3) == [1, 3, 0]
    assert pattern.distinct_patches(attention, clusters, 9) == [1, 3, 0, 5]


@pytest.mark.parametrize("temperature", (None, 0.1))
def test_strongest_equals_the_plain_logits(tmp_path, temperature):
    checkpoint = engine.load_checkpoint(write_checkpoint(tmp_path / "c.pth"))
    head = load_projection_head(checkpoint, "teacher", "c.pth")
    tokens = torch.randn(50, 96)
    logits = head(tokens)
    expected = logits if temperature is None else (logits / temperature).softmax(-1)
    for block in (1, 100, 2**26):  # one token at a time, some, all
        found = pattern.strongest(head, tokens, temperature, block)
        torch.testing.assert_close(found[:, 0], expected.max(-1).values)
        assert torch.equal(found[:, 1].long(), logits.argmax(-1))


def test_patches_have_the_last_layer_of_their_own(tmp_path):
    checkpoint = engine.load_checkpoint(write_checkpoint(tmp_path / "c.pth", separate_heads=True))
    for patches, name in ((False, "last_layer"), (True, "last_layer2")):
        head = load_projection_head(checkpoint, "student", "c.pth", patches)
        assert torch.equal(head.last_layer.weight_v, checkpoint["student"][f"module.head.{name}.weight_v"])


# ---------------------------------------------------------------- tiles

def test_tile_at_the_corner_to_the_pixel():
    image = Image.new("RGB", (224, 224), "white")
    plain = pattern.patch_tile(image, 0, 16, 5)  # crop box (-32, -32, 48, 48)
    pixels = np.asarray(plain)
    assert plain.size == (80, 80) and (pixels[:32] == 0).all() and (pixels[:, :32] == 0).all() and (pixels[32:, 32:] == 255).all()
    tinted = np.asarray(pattern.tinted(plain, 16, 5))
    assert (tinted[32:49, 32:49] == (228, 178, 128)).all()  # the far corner is inside: 17 x 17
    untouched = np.ones((80, 80), dtype=bool)
    untouched[32:49, 32:49] = False
    assert (tinted[untouched] == pixels[untouched]).all()
    assert pattern.tinted(plain, 16, 1) is plain


def test_tile_comes_from_its_row_and_column():
    cells = np.arange(14 * 14, dtype=np.uint8).reshape(14, 14)
    image = Image.fromarray(np.kron(cells, np.ones((16, 16), dtype=np.uint8))).convert("RGB")
    assert (np.asarray(pattern.patch_tile(image, 45, 16, 1)) == 45).all()
    around = np.asarray(pattern.patch_tile(image, 3 * 14 + 13, 16, 3))[8::16, 8::16, 0]
    assert around.tolist() == [[2 * 14 + 12, 2 * 14 + 13, 0], [3 * 14 + 12, 3 * 14 + 13, 0], [4 * 14 + 12, 4 * 14 + 13, 0]]


def test_dark_tiles_make_room_for_the_next():
    for grey, dark in ((40, True), (41, False)):
        assert pattern.is_dark(Image.new("RGB", (8, 8), (grey, 0, 10))) is dark
    images = [(Image.new("RGB", (16, 16), (value,) * 3), 0, 0) for value in (200, 10, 20, 90, 150)]
    bank = bank_of([[0] * 4] * 5, [[.1 * (9 - i)] * 4 for i in range(5)])
    tiles = pattern.cluster_tiles(bank, 0, images, "patch", 2, 8, 1)
    assert [tile.getpixel((0, 0))[0] for tile in tiles] == [200, 90]  # two candidates for every place
    assert len(pattern.cluster_tiles(bank, 0, images[:1], "patch", 1, 8, 1)) == 1  # reserves are not opened without need
    assert len(pattern.cluster_tiles(bank[:, 0], 0, images, "cls", 3, 8, 1)) == 3  # images are not passed over


def test_layout_places():
    tiles = [Image.new("RGB", (80, 80), (n, 0, 0)) for n in range(1, 37)]
    canvas = np.asarray(pattern.layout(tiles, 36, 80))
    assert canvas.shape == (480, 480, 3) and canvas[80, 80, 0] == 8 and canvas[79, 80, 0] == 2  # tile 7 at (80, 80)
    canvas = np.asarray(pattern.layout(tiles[:5], 10, 80))
    assert canvas.shape == (320, 320, 3) and (canvas[80:, 80:] == 0).all()


# ---------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("pattern")
    write_images(root / "val", "ab", 4, seed=1)
    write_images(root / "val", "c", 3, seed=2)
    write_checkpoint(root / "checkpoint.pth")
    return root


def flags(job, save, *more):
    return ["--pretrained_path", job / "checkpoint.pth", "--data_path", job / "val", "--save_path", save, "--topk", "4",
            "--show_pics", "3", "--batch_size", "4", *more]


def test_bank_is_that_of_a_plain_loop_and_keyed(job, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, pattern, *flags(job, tmp_path))
    kept = torch.load(tmp_path / "memory_patch.pth")
    bank, counts = kept["memory_bank"], kept["num_per_cluster"]
    assert bank.shape == (11, 16, 2) and bank.dtype == torch.float32
    backbone, checkpoint = common.load_vit(job / "checkpoint.pth")
    head = load_projection_head(checkpoint, "teacher", "")
    images = common.image_folder(job / "val", lambda image: common.normalize(pattern.v2.functional.pil_to_tensor(common.centre(32)(image))))
    for index in range(11):
        tokens = backbone.model(images[index][0][None], return_all_tokens=True)[0, 1:]
        logits = F.linear(head.bottleneck(tokens), F.normalize(head.last_layer.weight_v))
        torch.testing.assert_close(bank[index, :, 0], logits.max(-1).values, atol=1e-5, rtol=1e-5)
        assert torch.equal(bank[index, :, 1].long(), logits.argmax(-1))
    assert torch.equal(counts, torch.bincount(bank[..., 1].flatten().long(), minlength=24).float())
    chosen = sorted(range(24), key=lambda c: (-counts[c], c))[:3]
    names = {f"cpatch_crank{rank}_cid{c}_top4.jpg" for rank, c in enumerate(chosen)}
    names |= {"cpatch_overview.png", "memory_patch.pth"} | {f"explained_idx{i}.png" for i in (0, 3, 7, 10)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Image.open(tmp_path / f"cpatch_crank0_cid{chosen[0]}_top4.jpg").size == (80, 80)  # 2 x 2 tiles of 5 patches of 8

    capsys.readouterr()
    run_main(monkeypatch, pattern, *flags(job, tmp_path))
    assert "memory bank: read from" in capsys.readouterr().out
    for more, what in ((("--checkpoint", "student"), "weights, head"), (("--confidence", "probability"), "temperature")):
        run_main(monkeypatch, pattern, *flags(job, tmp_path, *more))
        text = capsys.readouterr().out
        assert f"was made with other {what}" in text and "features of val: 11/11" in text
        run_main(monkeypatch, pattern, *flags(job, tmp_path))
    write_images(job / "val", "c", 3, seed=3)
    run_main(monkeypatch, pattern, *flags(job, tmp_path))
    assert "was made with other images" in capsys.readouterr().out


def test_two_processes_with_the_papers_command_equal_one(job, call, tmp_path, monkeypatch):
    """As the reference's instructions have it: torch.distributed.launch, --checkpoint, and a file name as --save_path."""
    words = ["--arch", "vit_nano", "--type", "patch", "--patch_window", "3", "--checkpoint", "teacher"]
    run_main(monkeypatch, pattern, *flags(job, tmp_path / "one", *words))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    call("-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={port}",
         "analysis/extract_pattern/extract_topk_cluster.py", *flags(job, tmp_path / "two" / "memory_patch.pth", *words),
         "--device", "cpu", "--num_workers", "0", env={"OMP_NUM_THREADS": "1"})
    one, two = (torch.load(tmp_path / n / "memory_patch.pth") for n in ("one", "two"))
    assert torch.equal(one["memory_bank"][..., 1], two["memory_bank"][..., 1]) and one["key"] == two["key"]
    torch.testing.assert_close(one["memory_bank"], two["memory_bank"])
    pictures = sorted(path.name for path in (tmp_path / "two/memory_patch").iterdir())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted([*pictures, "memory_patch.pth"])
    assert len(pictures) == 3 + 1 + 4
    for name in pictures:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two/memory_patch" / name).read_bytes()


def test_a_folder_that_is_called_pth(job, tmp_path, monkeypatch):
    """The reference's code worked with such a one alone."""
    (tmp_path / "memory_bank.pth").mkdir()
    run_main(monkeypatch, pattern, *flags(job, tmp_path / "memory_bank.pth", "--type", "cls"))
    assert [path.name for path in tmp_path.iterdir()] == ["memory_bank.pth"]
    assert {"memory_cls.pth", "ccls_overview.png"} < {path.name for path in (tmp_path / "memory_bank.pth").iterdir()}


def test_cls_pictures_are_the_images_themselves(job, tmp_path, monkeypatch):
    run_main(monkeypatch, pattern, *flags(job, tmp_path, "--type", "cls"))
    bank = torch.load(tmp_path / "memory_cls.pth")["memory_bank"]
    assert bank.shape == (11, 2)
    counts = pattern.cluster_counts(bank, 24)
    first = int(counts.argmax())
    (picture,) = tmp_path.glob(f"ccls_crank0_cid{first}_top4.jpg")
    best = max(range(11), key=lambda i: bank[i, 0] if bank[i, 1] == first else -9)
    image = common.image_folder(job / "val", common.centre(32))[best][0]
    assert abs(np.asarray(Image.open(picture))[:32, :32].astype(int) - np.asarray(image)).mean() < 6  # JPEG


@pytest.mark.parametrize("words, message", [
    (("--patch_window", "4"), "--patch_window 4: must be odd"),
    (("--temperature", "nan"), "--temperature nan: must be above 0"),
    (("--out_dim", "8192"), "--out_dim 8192: the head of teacher has 24 outputs"),
    (("--checkpoint_key", "nobody"), "key 'nobody' is not in the file"),
    (("--data_path", "/nowhere"), "/nowhere"),
    (("--pretrained_path", "random"), "clusters need the projection head"),
])
def test_mistakes_are_named(job, tmp_path, monkeypatch, words, message):
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, pattern, *flags(job, tmp_path / "x", *words))
