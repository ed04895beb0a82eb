"""What --data_path takes beside class folders: flat and nested folders, lists of paths, several of these, tar shards."""
import os
import pickle
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import images
import listing
import loader
import main_ibot
import shards
from analysis import quickstart
from evaluation import eval_image_retrieval
from evaluation.common.data import ImageSet, image_sets

SMALL = {"local_crops_number": 1, "global_crops_size": 16, "local_crops_size": 8}


def write(root, *names, side=20):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(side, side + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name, format="PNG" if name.endswith("png") else "JPEG")
    return root


@pytest.fixture
def photos(tmp_path):
    """Two classes, one with a nested folder, and 26 images."""
    return write(tmp_path / "photos", *(f"{'cat' if i % 3 else 'dog/deep er'}/{i:02} ü.{'png' if i % 2 else 'jpg'}"
                                        for i in range(26)))


def found(source, labelled=False):
    """[(path, name of its class)]"""
    samples, classes, _ = listing.list_images(source, labelled)
    return [(path, classes[label]) for path, label in samples]


def message(call, *args, **options):
    with pytest.raises(engine.InputError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- folders

def test_flat_nested_and_mixed_folders(tmp_path):
    flat = write(tmp_path / "flat", "b.png", "a.jpg")
    assert found(flat) == [(f"{flat}/a.jpg", "."), (f"{flat}/b.png", ".")]
    mixed = write(tmp_path / "mixed", "b/1.png", "top.png", "a/x/y/2.png", "a/x/3.png")
    (mixed / "empty").mkdir()
    (mixed / "a/notes.pdf").touch()
    (mixed / ".DS_Store").touch()
    samples, classes, notes = listing.list_images(mixed, labelled=False)
    assert found(mixed) == [(f"{mixed}/top.png", "."), (f"{mixed}/a/x/3.png", "a"), (f"{mixed}/a/x/y/2.png", "a"),
                            (f"{mixed}/b/1.png", "b")]
    assert classes == [".", "a", "b"] and len(notes) == 3
    assert notes[0].endswith(" at its top are a class of their own: 1") and notes[1].endswith(" in empty")
    assert "files that do not end in .jpg" in notes[2] and notes[2].endswith(" are left out: 1")

    assert "no class folders in it; move the images" in message(listing.list_images, flat)
    assert "in class folder empty" in message(listing.list_images, mixed)
    (mixed / "empty").rmdir()
    assert found(mixed, labelled=True) == found(mixed)[1:]
    assert listing.list_images(mixed).notes[0].endswith(" at its top, which have no class, are left out: 1")


# ---------------------------------------------------------------- lists and several places

def test_a_list_of_paths(photos, tmp_path):
    """Relative to the list's folder; labels behind a tab or a space; comments and empty lines are none."""
    names = sorted(str(path.relative_to(tmp_path)) for path in photos.rglob("*.*g"))
    text = "\ufeff# mine\n\r\n" + "".join(f"{name}\t{i % 3} x\r\n" for i, name in enumerate(names))
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert found(tmp_path / "list.txt", labelled=True) == [(f"{tmp_path}/{name}", f"{i % 3} x") for i, name in enumerate(names)]

    write(tmp_path, "a b.png", "c.png")
    (tmp_path / "other.txt").write_text(f"a b.png\nc.png seven\n  {tmp_path}/c.png\n")
    expected = [(f"{tmp_path}/a b.png", "."), (f"{tmp_path}/c.png", "seven"), (f"{tmp_path}/c.png", ".")]
    assert found(tmp_path / "other.txt") == expected
    assert f"{tmp_path}/other.txt, line 1: no label" in message(listing.list_images, tmp_path / "other.txt")
    for text, words in (("c.png\n\ngone.png\nlost.png 1\n", f"line 3: no file {tmp_path}/gone.png (2 of 3 are missing)"),
                        ("c.png\nphotos\n", f"line 2: no file {tmp_path}/photos"), ("# none\n", "no path"), ("\0\x1b\n", "line 1: ")):
        (tmp_path / "bad.txt").write_text(text)
        said = message(listing.list_images, tmp_path / "bad.txt", labelled=False)
        assert said.startswith(f"list {tmp_path}/bad.txt") and words in said and "\x1b" not in said
    (tmp_path / "bad.csv").touch()
    assert "a list of images ends in .txt" in message(listing.list_images, tmp_path / "bad.csv")


def test_several_places(photos, tmp_path):
    """One after the other, in their order; classes of one name are one."""
    other = write(tmp_path / "other", "cat/1.png", "bird/2.png")
    flat = write(tmp_path / "flat", "1.png")
    (tmp_path / "list.txt").write_text("flat/1.png\tbird\n")
    loader.pack([flat, other], tmp_path / "tars", 0, 1.0)
    packed = tmp_path / "tars"
    places = [other, tmp_path / "list.txt", packed, photos]
    assert found(places) == [pair for place in places for pair in found(place)]
    samples, classes, _ = listing.list_images(map(str, places), labelled=False)
    assert classes == [".", "bird", "cat", "dog"] and len(samples) == 32
    assert images.load_rgb(samples[3][0]).size == (24, 20) and samples[3][0] == f"{packed}/00000.tar:flat/1.png"
    assert images.CheckedImageFolder(places, labelled=False).root == f"{other} {tmp_path}/list.txt {packed} {photos}"


def test_flags_take_one_place_or_several():
    parser = main_ibot.get_args_parser()
    assert parser.parse_args(["--data_path", "a"]).data_path == "a"
    assert parser.parse_args(["--data_path", "a", "b"]).data_path == ["a", "b"]


# ---------------------------------------------------------------- shards

def masked(source):
    return loader.ImageFolderMask(source, loader.MultiCropAugmentation(**SMALL), patch_size=4, pred_ratio=0.3)


def batches(dataset, workers=0):
    out = []
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    data = torch.utils.data.DataLoader(dataset, 6, sampler=order, collate_fn=loader.collate, num_workers=workers,
                                       persistent_workers=workers > 0)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        out += list(data)
    return out


def equal(one, two):
    return all(x is y is None or torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_shards_is_training_from_the_folder(photos, tmp_path, workers, monkeypatch):
    """Bit for bit, broken files included, from more tars than may be open at once; in the same order and classes."""
    (photos / "cat/99.jpg").write_bytes(b"no image")
    (photos / "cat/98.jpg").symlink_to("gone")
    os.mkfifo(photos / "dog/pipe.png")
    loader.pack([photos], tmp_path / "tars", 0, 5000 / 2**30)
    assert len(list((tmp_path / "tars").glob("*.tar"))) > 5
    monkeypatch.setattr(shards, "_opened", shards.lru_cache(2)(shards._Descriptor))
    folder, tars = masked(photos), masked(tmp_path / "tars")
    assert tars.classes == folder.classes and tars.targets == folder.targets
    expected = batches(folder)
    before = len(os.listdir("/proc/self/fd"))
    assert equal(batches(tars, workers), expected)
    assert workers or len(os.listdir("/proc/self/fd")) <= before + 2
    names = [path.partition(".tar:")[2] for path in engine.bad_files(tars)]
    assert names == [os.path.relpath(path, photos) for path in engine.bad_files(folder)] and len(names) == 3
    assert not equal(batches(masked(write(tmp_path / "others", *names))), expected[:1])


def test_shards_are_plain_tars(photos, tmp_path, capsys):
    """Their members have the files' names and bytes; with --max_side large images are made smaller, and only these."""
    large = write(tmp_path / "large", "a/1.png", "a/2.jpg", side=90)
    (large / "a/3.jpg").write_text("no image")
    loader.pack([photos, large], tmp_path / "all", 0, 1.0)
    subprocess.run(["tar", "-xf", tmp_path / "all/00000.tar", "-C", tmp_path / "all"], check=True)
    for path in [*photos.rglob("*.*g"), *large.rglob("*.*g")]:
        assert (tmp_path / "all" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()
    capsys.readouterr()
    loader.pack([tmp_path / "all"], tmp_path / "small", 30, 1.0)
    out = capsys.readouterr().out
    assert "\nmade smaller, JPEGs of quality 90 with a longer side of 30: 2\n" in out
    assert f"\nno images that can be read, packed as they are: 1 ({tmp_path}/all/00000.tar:large/a/3.jpg)\n" in out
    small, before = (listing.list_images(tmp_path / name, labelled=False).samples for name in ("small", "all"))
    assert [path.read() for path, _ in small[:26]] == [path.read() for path, _ in before[:26]] and len(small) == 29
    sizes = [images.load_rgb(path).size for path, _ in small[26:28]]
    assert sizes == [(30, 29)] * 2 and small[28][0].read() == b"no image"


def test_a_tar_stays_open_while_it_is_read(photos, tmp_path, monkeypatch):
    """Another thread may have it leave the cache meanwhile."""
    loader.pack([photos], tmp_path / "tars", 0, 1.0)
    path, _ = listing.list_images(tmp_path / "tars").samples[0]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *place: shards._opened.cache_clear() or pread(*place))
    before = len(os.listdir("/proc/self/fd"))
    assert path.read() == (photos / "cat/01 ü.png").read_bytes()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_members_are_like_paths(photos, tmp_path):
    loader.pack([photos], tmp_path / "tars", 0, 1.0)
    (tmp_path / "data/train").parent.mkdir()
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "tars", tmp_path / "data" / part)
    train, val = image_sets("imagefolder", tmp_path / "data")
    assert train.classes == ["cat", "dog"] and len(val) == 26
    print_ = train.fingerprint()
    os.utime(tmp_path / "data/train/00000.tar", (1, 1))
    assert train.fingerprint() != print_
    assert next(train.paths()) == "train/00000.tar:cat/01 ü.png"
    member = pickle.loads(pickle.dumps(train.samples[3][0]))
    assert (member, member.read()) == (train.samples[3][0], train.samples[3][0].read())
    folder = ImageSet("folder", photos, *(getattr(images.CheckedImageFolder(photos), name)
                                          for name in ("samples", "targets", "classes")))
    assert all(np.array_equal(one[0], two[0]) and one[1] == two[1] for one, two in zip(train, folder, strict=True))
    data = eval_image_retrieval.read_folders(str(tmp_path / "tars"), [str(tmp_path / "tars"), str(photos)])
    assert len(data.database) == 26 and len(data.queries) == 52 and data.name == "tars+photos" and data.root == str(tmp_path)


def test_tars_of_others(photos, tmp_path):
    """Are indexed once; compressed and cut ones are refused in one line."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for name, format in (("a.tar", tarfile.GNU_FORMAT), ("b.tar", tarfile.PAX_FORMAT)):
        with tarfile.open(tars / name, "w", format=format) as tar:
            tar.add(photos, arcname="./" if name == "a.tar" else "key " * 60)
            tar.add(__file__, arcname="0.json")
    assert f"python loader.py index {tars}" in message(masked, tars)
    assert shards.index_tars(tars) == (2, 52, 2)
    samples, classes, _ = listing.list_images(tars, labelled=False)
    assert classes == sorted(["cat", "dog", "key " * 60])
    for path, _ in samples:
        name = path.name.removeprefix("key " * 60 + "/")
        assert path.read() == (photos / name).read_bytes()
    assert shards.index_tars(tars, tmp_path / "index") == (2, 52, 2)
    assert found(tmp_path / "index") == found(tars)

    whole = (tars / "b.tar").read_bytes()
    (tars / "b.tar").write_bytes(whole[:len(whole) // 2])
    assert "b.tar: no plain tar, or cut short (" in message(shards.index_tars, tars)
    with tarfile.open(tars / "b.tar", "w:gz") as tar:
        tar.add(photos)
    assert "b.tar: no plain tar" in message(shards.index_tars, tars)


def test_damaged_shards_are_named(photos, tmp_path):
    tars = tmp_path / "tars"
    loader.pack([photos], tars, 0, 6000 / 2**30)
    tar, index = tars / "00001.tar", tars / shards.INDEX
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1])
    assert message(masked, tars).startswith(f"{tar}: {len(whole) - 1} bytes instead of {len(whole)}: it is cut short")
    tar.unlink()
    assert message(masked, tars).startswith(f"{tar}: No such file")
    tar.write_bytes(whole)
    dataset = masked(tars)
    place = next(i for i, (path, _) in enumerate(dataset.samples) if path.tar == str(tar))
    os.truncate(tar, 100)  # in mid-run
    assert f"{tar}:" in message(dataset.load, place) and "cut short" in message(dataset.load, place)
    tar.write_bytes(whole)

    arrays, raw = dict(np.load(index)), index.read_bytes()
    hostile = [{"labels": arrays["labels"] + 9}, {"offsets": -arrays["offsets"]}, {"sizes": arrays["sizes"] + 10**6},
               {"ends": arrays["ends"][::-1]}, {"counts": arrays["counts"] + 1}, {"names": arrays["names"][1:]},
               {"version": np.int64(2)}, {"classes": np.array(["a"], dtype=object)}, {"tars": arrays["tars"][:-3]}]
    for changed in [*hostile, raw[:len(raw) // 2], raw.replace(b"cat/", b"cow/", 1)]:
        if isinstance(changed, bytes):
            index.write_bytes(changed)
        else:
            np.savez(index, **arrays | changed)
        said = message(masked, tars)
        assert said.startswith(f"{index}: cannot be used (") or "00" in said and "tars" in changed, changed


def test_interrupted_packing(photos, tmp_path, capsys, monkeypatch, file_limit):
    tars, fails = tmp_path / "tars", [20]

    def killed(path, max_side):
        fails[0] -= 1
        if not fails[0]:
            raise KeyboardInterrupt
        return images.packed(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loader, "packed", killed)
        loader.pack([photos], tars, 0, 6000 / 2**30)
    assert "its packing into shards is not finished" in message(masked, tars)
    loader.pack([photos], tars, 0, 1.0)
    assert "an earlier packing was interrupted; it is started over" in capsys.readouterr().out
    assert found(tars) and sorted(os.listdir(tars)) == ["00000.tar", shards.INDEX]
    assert "holds shards already" in message(loader.pack, [photos], tars, 0, 1.0)
    assert "is not empty" in message(loader.pack, [tars], photos, 0, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("signal.SIGXFSZ", None, raising=False)
        file_limit(9000)
        assert "File too large" in message(loader.pack, [photos], tmp_path / "full", 0, 1.0)
    file_limit(-1)
    assert "not finished" in message(masked, tmp_path / "full")


def test_commands(photos, tmp_path, monkeypatch, capsys):
    """As they are typed; one training from shards."""
    def run_main(module, *words):
        monkeypatch.setattr("sys.argv", [module.__file__, *map(str, words)])
        module.main()
        return capsys.readouterr().out

    out = run_main(loader, "pack", photos, tmp_path / "tars", "--max_side", 512)
    assert f"packed 26 images of 2 classes; now: --data_path {tmp_path}/tars" in out
    run = [*"--arch vit_nano --patch_size 4 --global_crops_size 16 --out_dim 32 --head_hidden_dim 64 --shared_head true "
           "--device cpu --num_workers 0 --epochs 1 --batch_size_per_gpu 4".split(), "--data_path"]
    logs = []
    for name in ("photos", "tars"):
        text = run_main(main_ibot, *run, tmp_path / name, "--output_dir", tmp_path / f"of {name}")
        assert "data: 26 images of 2 classes, 6 steps" in text
        logs.append((tmp_path / f"of {name}/log.txt").read_text())
    assert logs[0] == logs[1]
    assert "26 images in 1 tars, 0 other files" in run_main(loader, "index", tmp_path / "tars")
    assert f"data folder {tmp_path}/gone: No such" in message(run_main, loader, "pack", tmp_path / "gone", tmp_path / "more")
    assert not (tmp_path / "more").exists()
    assert run_main(quickstart, "count", "--arch", "vit_nano", "--data_path", photos, tmp_path / "tars", "--lr", 1) == "52\n"
