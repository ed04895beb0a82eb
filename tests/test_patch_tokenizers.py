"""Tokenizers of patches: worked examples, tokens of a file with their crops, mistakes in one line."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import engine
import loader
import main_ibot
import patch_tokenizers
import utils
from analysis import patch_clusters
from evaluation.common.clustering import load_projection_head

FLAGS = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--local_crops_number", "0", "--device", "cpu",
         "--out_dim", "48", "--patch_out_dim", "48", "--batch_size_per_gpu", "16", "--num_workers", "0", "--pred_ratio", "0.3",
         "--shared_head", "true", "--head_hidden_dim", "64", "--use_fp16", "false", "--warmup_epochs", "0", "--drop_path", "0.2"]


def parsed(*words):
    return main_ibot.get_args_parser().parse_args([*FLAGS, "--data_path", "data", *map(str, words)])


def flat(colours, cell=16):
    """A crop whose cells, one a row, have these mean colours: uint8 [1, 1, 3, S, S]."""
    cells = torch.zeros(1, 1, 3, len(colours) * cell, len(colours) * cell, dtype=torch.uint8)
    for i, colour in enumerate(colours):
        for channel, share in enumerate(colour):
            total = round(share * 255 * cell**2)
            level, more = divmod(total, cell**2)
            values = torch.full((cell**2,), level, dtype=torch.int64)
            values[:more] += 1
            cells[0, 0, channel, i * cell:(i + 1) * cell, :cell] = values.view(cell, cell).to(torch.uint8)
    return cells


def test_mean_colours():
    colours = [(0, 0, 0), (1, 1, 1), (.5, .25, .124), (.124, .25, .5), (.999, .125, .1249)]
    index = torch.arange(5) * 5
    assert patch_tokenizers.MeanColour(16).of_crops(flat(colours), index).tolist() == [0, 511, 20, 272, 15]
    at_the_edge = [(sum_ / (255 * 256),) * 3 for sum_ in (8159, 8160, 65280)]
    assert patch_tokenizers.MeanColour(16).of_crops(flat(at_the_edge), torch.arange(3) * 3).tolist() == [0, 73, 511]


def test_nearest_centroid():
    patches, centroids = torch.tensor([[.4, .1], [.6, .9], [.1, 1.2]]), torch.tensor([[0., 0.], [1., 0.], [0., 2.]])
    found, distances = patch_tokenizers.nearest(patches, centroids)
    assert found.tolist() == [0, 1, 2]
    torch.testing.assert_close(distances, torch.tensor([0, -.2, -.8]))
    assert patch_tokenizers.nearest(torch.zeros(1, 2), torch.tensor([[1., 0.], [0., 1.]]))[0].tolist() == [0]  # the lower of two


def test_centroids_of_a_file(tmp_path):
    """Cells are read as rows of pixels of three colours, in 0..1."""
    torch.manual_seed(0)
    crops = torch.randint(256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    patches = torch.stack([crop[:, y:y + 8, x:x + 8].permute(1, 2, 0).flatten() for crop in crops.flatten(0, 1)
                           for y in (0, 8) for x in (0, 8)])  # every cell is a centroid
    save_file({"centroids": patches.float() / 255}, tmp_path / "c.safetensors")
    tokenizer = patch_tokenizers.Centroids(tmp_path / "c.safetensors", 8, torch.device("cpu"))
    index = torch.tensor([23, 0, 7, 7])
    assert tokenizer.tokens == 24 and torch.equal(tokenizer.of_crops(crops, index), index)


def test_cross_entropy_of_tokens():
    logits = torch.tensor([[2., 0., 1.], [0., 0., 0.], [1., 3., 0.]], dtype=torch.float64)
    tokens, weight = torch.tensor([0, 2, 1]), torch.tensor([1 / 6, 1 / 6, 1 / 3], dtype=torch.float64)
    loss = utils.in_pieces(main_ibot.patch_cross_entropy, size=6)
    assert abs(loss(logits, tokens, torch.full((3,), 1 / 3), None, 1.0, None) - 0.558688) < 1e-6
    assert abs(loss(logits, tokens, weight, None, 1.0, None) - 0.307652) < 1e-6


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A DINO of one epoch, with other outputs for patches."""
    folder = tmp_path_factory.mktemp("dino")
    args = parsed("--data_path", digits / "train", "--output_dir", folder, "--epochs", 1, "--lambda2", 0, "--shared_head", "false",
                  "--shared_head_teacher", "false", "--patch_out_dim", 40)
    main_ibot.train_ibot(args)
    return folder / "checkpoint.pth"


def test_frozen_network(checkpoint):
    """The arg-max of the head on the teacher's normed patches, without masks and drop path."""
    tokenizer = patch_tokenizers.build(parsed("--tokenizer", "dino", "--tokenizer_file", checkpoint), torch.device("cpu"), None)
    crops, index = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8), torch.tensor([5, 95, 0, 50])
    head = load_projection_head(engine.load_checkpoint(checkpoint), "teacher", checkpoint, patches=True)
    tokens = tokenizer.backbone(loader.normalize(crops.flatten(0, 1)), return_all_tokens=True)[:, 1:].flatten(0, 1)
    assert tokenizer.tokens == 40
    assert torch.equal(tokenizer.of_crops(crops, index), head(tokens[index]).argmax(dim=-1))


@pytest.fixture(scope="module")
def stored(digits, tmp_path_factory):
    """Tokens of three crops of each training digit: where the cell lies in the image."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    names = sorted(file.relative_to(digits / "train").as_posix() for file in (digits / "train").glob("*/*"))[::-1]
    rng = np.random.default_rng(0)
    boxes = np.array([[(i % 5, 3 * v, 16 + v, 20 - v) for v in range(3)] for i in range(len(names))], dtype=np.int32)
    flips = rng.random((len(names), 3)) < 0.5
    tokens = rng.integers(50, size=(len(names), 3, 4, 4), dtype=np.int32)
    content = {"tokens": tokens.astype(np.uint16), "boxes": boxes, "flips": flips,
               "names": np.frombuffer("\n".join(names).encode(), dtype=np.uint8).copy()}
    content = {name: torch.from_numpy(value) for name, value in content.items()}
    save_file(content, path, {"K": "50", "p": "8", "crop_size": "32"})
    return path, names, content


def test_stored_tokens_and_their_crops(stored, digits, tmp_path):
    path, names, content = stored
    args = parsed("--tokenizer", "file", "--tokenizer_file", path, "--augment", "none", "--data_path", digits / "train",
                  "--global_crops_number", 2)
    tokenizer = patch_tokenizers.build(args, torch.device("cpu"), None)
    dataset = main_ibot.build_data(args, engine.init_process("cpu"), "cpu", 1, tokenizer).dataset
    views = set()
    for i in (0, 70, 119):
        dataset.set_epoch(i)
        crops, _, grids = dataset[i]
        row = names.index("/".join(dataset.source(i).split("/")[-2:]))
        image, _ = dataset.load(i)
        expected = []
        for (left, top, width, height), flip in zip(content["boxes"][row].tolist(), content["flips"][row], strict=True):
            box = torch.from_numpy(np.asarray(image)[top:top + height, left:left + width].copy()).permute(2, 0, 1)
            crop = F.interpolate(box[None], (32, 32), mode="bicubic", antialias=True)[0]
            expected.append(crop.flip(2) if flip else crop)
        found = [next(v for v in range(3) if torch.equal(crop, expected[v])) for crop in crops]
        assert len(set(found)) == 2
        views |= set(found)
        for grid, view in zip(grids, found, strict=True):
            tokens = content["tokens"][row, view].numpy()
            assert ((grid == -1) | (grid == tokens)).all() and 0 < (grid >= 0).sum() < 16
    assert views == {0, 1, 2}
    loader.pack([digits / "train"], tmp_path / "tars", 0, 1.0)
    args.data_path = str(tmp_path / "tars")
    again = patch_tokenizers.build(args, torch.device("cpu"), None)
    main_ibot.build_data(args, engine.init_process("cpu"), "cpu", 1, again)
    assert np.array_equal(again.rows, tokenizer.rows)

    batch = loader.collate([dataset[i] for i in range(4)], pad_masks=32)
    grids = np.stack([np.stack(dataset[i][2]) for i in range(4)], axis=1).reshape(-1)
    assert batch.targets.dtype == torch.int64 and len(batch.targets) % 32 == 0
    count = int((grids >= 0).sum())
    assert batch.targets[:count].tolist() == grids[grids >= 0].tolist() and batch.masks.sum() == count


def test_tokens_of_the_image_that_was_taken(stored, digits, tmp_path):
    """A bad image is replaced, its tokens too."""
    path, names, content = stored
    args = parsed("--tokenizer", "file", "--tokenizer_file", path, "--data_path", digits / "train")
    dataset = main_ibot.build_data(args, engine.init_process("cpu"), "cpu", 1,
                                   patch_tokenizers.build(args, torch.device("cpu"), None)).dataset
    dataset.bad[3] = 1
    _, _, grids = dataset[3]
    row = names.index("/".join(dataset.source(dataset.loaded).split("/")[-2:]))
    assert dataset.loaded != 3
    assert any(((grids[0] == -1) | (grids[0] == tokens.numpy())).all() for tokens in content["tokens"][row])


@pytest.mark.parametrize("change, message", [
    ({"K": "49"}, "has a token that is not in 0..48"),
    ({"p": "16"}, "is of patches of 16 and crops of 32 pixels, the run of 8 and 32"),
    ({"K": "many"}, "lacks K"),
    ({"names": None}, "lacks names"),
    ({"flips": torch.zeros(120, 2, dtype=torch.bool)}, "do not go together"),
    ({"one": True}, "has 1 crops an image, --global_crops_number 2 needs as many"),
    ({"name": True}, "has no tokens of"),
    ({"boxes": torch.full((120, 3, 4), 40, dtype=torch.int32)}, "is not within the image of 32 x 32 pixels")])
def test_mistakes_in_a_file_of_tokens(change, message, stored, digits, tmp_path):
    content, head = dict(stored[2]), {"K": "50", "p": "8", "crop_size": "32"}
    if "one" in change:
        content |= {name: content[name][:, :1].contiguous() for name in ("tokens", "boxes", "flips")}
    if "name" in change:
        content["names"] = content["names"].clone()
        content["names"][0] = ord("x")
    for name, value in change.items():
        if name in content:
            content[name] = value
        elif name in head:
            head[name] = value
    save_file({name: value for name, value in content.items() if value is not None}, tmp_path / "t.safetensors", head)
    args = parsed("--tokenizer", "file", "--tokenizer_file", tmp_path / "t.safetensors", "--data_path", digits / "train")
    with pytest.raises(engine.InputError, match=message) as error:
        tokenizer = patch_tokenizers.build(args, torch.device("cpu"), None)
        main_ibot.build_data(args, engine.init_process("cpu"), "cpu", 1, tokenizer).dataset[0]
    assert "t.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words, message", [
    (["--tokenizer", "kmeans"], "--tokenizer kmeans needs --tokenizer_file"),
    (["--tokenizer_file", "x"], "--tokenizer online reads no --tokenizer_file"),
    (["--tokenizer", "mpp", "--lambda2", "0"], "--lambda2 0 leaves them out"),
    (["--tokenizer", "mpp", "--mask_crops", "all"], "has no --mask_crops all"),
    (["--patch_match", "feature"], "give --use_masked_im_modeling false too"),
    (["--patch_match", "position", "--use_masked_im_modeling", "false", "--global_crops_number", "3"], "needs --global_crops_number 2"),
    (["--mask_crops", "all", "--local_crops_number", "1", "--local_crops_size", "20", "--patch_size", "4"], None),
    (["--arch", "swin_tiny", "--mask_crops", "all", "--local_crops_size", "36"], "not a multiple of 32")])
def test_flags_that_do_not_go_together(words, message):
    if message is None:
        return main_ibot.check_args(parsed(*words))
    with pytest.raises(engine.InputError, match=message):
        main_ibot.check_args(parsed(*words))


def test_files_that_are_no_tokenizer(checkpoint, tmp_path):
    def build(kind, path):
        return patch_tokenizers.build(parsed("--tokenizer", kind, "--tokenizer_file", path), torch.device("cpu"), None)
    for name, content, message in (("a", torch.zeros(4, 10), "a patch of 8 pixels has 192"),
                                   ("b", torch.full((4, 192), torch.nan), "needs finite `centroids`")):
        save_file({"centroids": content}, tmp_path / f"{name}.safetensors")
        with pytest.raises(engine.InputError, match=message):
            build("kmeans", tmp_path / f"{name}.safetensors")
    with pytest.raises(engine.InputError, match="no such file"):
        build("kmeans", tmp_path / "absent.safetensors")
    with pytest.raises(engine.InputError, match="its patches are of 8 pixels, the student's of 16"):
        patch_tokenizers.build(parsed("--patch_size", 16, "--tokenizer", "dino", "--tokenizer_file", checkpoint), torch.device("cpu"), None)


def test_lloyd_equals_scikit_learn():
    from sklearn.cluster import KMeans
    rows = np.random.default_rng(0).integers(256, size=(500, 12), dtype=np.uint8)
    start = torch.from_numpy(rows[:9]).float() / 255
    found, inertia = patch_clusters.lloyd(rows, start, 30, torch.device("cpu"))
    expected = KMeans(9, init=start.numpy(), n_init=1, max_iter=30, tol=0, algorithm="lloyd").fit(rows / np.float32(255))
    np.testing.assert_allclose(found, expected.cluster_centers_, atol=1e-5)
    assert abs(inertia * 500 - expected.inertia_) < 1e-2
    start[3] = 9  # far from everything: it gets the row that is farthest from its own
    moved, _ = patch_clusters.lloyd(rows, start, 1, torch.device("cpu"))
    x = torch.from_numpy(rows).float() / 255
    others = torch.cat((start[:3], start[4:]))
    torch.testing.assert_close(moved[3], x[torch.cdist(x, others).amin(dim=1).argmax()])


def test_patch_clusters(digits, tmp_path, monkeypatch):
    """Of the same patches again the same centroids, which a run reads; a draw of patches takes those of the middle crops."""
    def run(name, *words):
        monkeypatch.setattr("sys.argv", ["patch_clusters.py", "--data_path", str(digits / "train"), "--patch_size", "8",
                                         "--image_size", "32", "--clusters", "20", "--num_workers", "0", "--device", "cpu",
                                         "--rounds", "3", "--out", str(tmp_path / name), *words])
        patch_clusters.main()
        return patch_tokenizers.Centroids(tmp_path / name, 8, torch.device("cpu")).centroids
    whole = run("a.safetensors", "--subset", "1")
    assert torch.equal(whole, run("b.safetensors", "--subset", "1", "--patches", str(16 * 120)))
    assert whole.shape == (20, 192) and 0 <= whole.min() and whole.max() <= 1
    assert engine.safetensors_metadata(tmp_path / "a.safetensors")["rows"] == "1920"
    assert engine.safetensors_metadata(tmp_path / "a.safetensors").keys() >= {"p", "K", "seed", "inertia"}
    assert not list(tmp_path.glob("*.rows"))
    with pytest.raises(engine.InputError, match="--clusters 20 of 10 patches"):
        run("c.safetensors", "--patches", "10")
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    expected = torch.stack([image[:, y:y + 2, x:x + 2].permute(1, 2, 0).flatten() for y in (0, 2) for x in (0, 2)])
    assert torch.equal(patch_clusters.patches_of(image, 2), expected)
    assert torch.equal(patch_tokenizers.cells_of(image[None, None], 2, torch.arange(4)).flatten(1), expected)
