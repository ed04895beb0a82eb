"""The cached listing of an image folder (listing.folder_index) against torchvision's walk."""
import contextlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

import images
import listing
from engine import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ibot"


@pytest.fixture
def folder(tmp_path):
    """Class folders with nested, hidden, linked, empty and oddly named ones in them; only names count here."""
    root = tmp_path / "images"
    for name in ("b/1.png", "b/10.png", "b/2.PNG", "b/notes.txt", "b/deep/er/3.jpg", "b/deep-er/4.jpg", "b/deep/5.jpeg",
                 "b-c/6.webp", "a/.hidden/7.png", "a/.8.bmp", "a/ü é.tif", "Z/9.png", "stray.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "a/empty").mkdir()
    (root / "a" / os.fsdecode(b"\xff\xfe.png")).touch()  # no valid text
    (root / "a/a folder.png").mkdir()
    (root / "a/a folder.png/11.png").touch()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner/12.png").touch()
    (root / "linked class").symlink_to(elsewhere)
    (root / "a/linked").symlink_to(elsewhere / "inner")
    (root / "a/linked.png").symlink_to(elsewhere / "inner/12.png")
    (root / "a/broken.png").symlink_to(elsewhere / "nowhere")
    return aged(root)


def aged(*roots, seconds=60):
    """The folders below, as if last changed a minute ago; younger ones are not kept."""
    then = time.time() - seconds
    for root in roots:
        for path, _, _ in os.walk(root, followlinks=True):
            os.utime(path, (then, then))
    return roots[0]


def open_folder(root):
    return images.CheckedImageFolder(root)


def check(dataset, root):
    """The same as torchvision's."""
    expected = ImageFolder(str(root), allow_empty=True)
    assert list(dataset.samples) == expected.samples and dataset.imgs is dataset.samples
    assert dataset.targets == expected.targets
    assert dataset.classes == expected.classes and dataset.class_to_idx == expected.class_to_idx
    assert len(dataset) == len(expected) > 0


def no_walk(monkeypatch):
    def fail(*_):
        raise AssertionError("walked")
    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "walk", fail)
    monkeypatch.setattr(os, "listdir", fail)


@pytest.mark.parametrize("form", [str, Path, lambda root: f"{root}/", lambda root: os.path.relpath(root)])
def test_samples_are_torchvisions_walked_and_read(folder, form, cache, monkeypatch):
    check(open_folder(form(folder)), form(folder))
    assert len(list(cache.glob("*.index"))) == 1
    expected = ImageFolder(str(form(folder)), allow_empty=True)
    with monkeypatch.context() as patch:
        no_walk(patch)
        dataset = open_folder(form(folder))
        again = open_folder(folder)  # another name of the same folder
    assert list(dataset.samples) == expected.samples
    assert dataset.targets == expected.targets and again.targets == expected.targets
    check(again, folder)


def test_samples_behave_as_a_list_and_targets_too(folder):
    dataset, expected = open_folder(folder), ImageFolder(str(folder), allow_empty=True)
    samples, n = dataset.samples, len(expected.samples)
    assert [samples[i] for i in range(-n, n)] == expected.samples * 2
    assert samples[2:-1:3] == expected.samples[2:-1:3] and list(reversed(samples)) == expected.samples[::-1]
    assert samples[np.int64(3)] == expected.samples[3] and isinstance(samples[3][1], int)
    for index in (n, -n - 1):
        with pytest.raises(IndexError):
            samples[index]
    assert set(dataset.targets) == set(expected.targets) and dataset.targets[-1] == expected.targets[-1]
    assert np.asarray(dataset.targets).tolist() == expected.targets
    assert list(pickle.loads(pickle.dumps(samples))) == expected.samples


def test_files_of_a_class_share_the_object_of_its_number(tmp_path):
    """A million numbers would be copied into every worker by reference counting. (The first 257 are always shared.)"""
    for name in range(300):
        (tmp_path / f"images/{name:03}").mkdir(parents=True)
        (tmp_path / f"images/{name:03}/1.png").touch()
        (tmp_path / f"images/{name:03}/2.png").touch()
    targets = open_folder(tmp_path / "images").targets
    assert targets[::2] == list(range(300)) and all(a is b for a, b in zip(targets[::2], targets[1::2], strict=True))


def add(root):
    (root / "b/99.png").touch()


def remove(root):
    (root / "b/10.png").unlink()


def rename(root):
    (root / "b/deep/er/3.jpg").rename(root / "b/deep/er/33.jpg")


def move(root):
    (root / "b/1.png").rename(root / "Z/1.png")


def nest(root):
    (root / "Z/new").mkdir()
    (root / "Z/new/1.png").touch()


def new_class(root):
    (root / "0").mkdir()
    (root / "0/1.png").touch()


def rename_class(root):
    (root / "Z").rename(root / "A")


def remove_folder(root):
    (root / "b/deep/er/3.jpg").unlink()
    (root / "b/deep/er").rmdir()


def behind_a_link(root):
    (root.parent / "elsewhere/inner/13.png").touch()


def exchange(root):
    """Another folder of the same age takes a class's place."""
    (root.parent / "other").mkdir()
    (root.parent / "other/other.png").touch()
    os.utime(root.parent / "other", ns=(os.stat(root / "Z").st_mtime_ns,) * 2)
    (root / "Z").rename(root.parent / "away")
    (root.parent / "other").rename(root / "Z")


@pytest.mark.parametrize("change", [add, remove, rename, move, nest, new_class, rename_class, remove_folder, behind_a_link,
                                    exchange])
def test_changes_are_seen(folder, change):
    before = list(open_folder(folder).samples)
    change(folder)
    dataset = open_folder(folder)
    assert list(dataset.samples) != before
    check(dataset, folder)
    check(open_folder(aged(folder)), folder)


def test_a_folder_that_goes_away_or_loses_its_images_is_an_error(folder):
    open_folder(folder)
    (folder / "Z/9.png").unlink()
    with pytest.raises(InputError, match="class folder Z"):
        open_folder(folder)
    folder.rename(folder.parent / "gone")
    with pytest.raises(InputError, match="No such file"):
        open_folder(folder)


def test_links_in_a_circle_are_an_error(folder):
    (folder / "b/self.png").symlink_to("self.png")
    assert str(folder / "b/self.png") in [path for path, _ in open_folder(folder).samples]  # a bad image only
    (folder / "Z/round").symlink_to(folder / "Z")
    with pytest.raises(InputError, match="Z/round.*symbolic links"):
        open_folder(folder)


def test_young_folders_are_not_kept(folder, cache, monkeypatch):
    for seconds in (0, -3600):  # just changed; the clock of a file server ahead of ours
        os.utime(folder / "b/deep", (time.time() - seconds,) * 2)
        check(open_folder(folder), folder)
        assert not list(cache.glob("*.index"))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: os.stat(folder / "b/deep").st_mtime_ns + 10**9)
        open_folder(folder)
    assert not list(cache.glob("*.index"))
    aged(folder)
    open_folder(folder)
    assert list(cache.glob("*.index"))


def test_a_change_during_the_walk_shows_later(folder, monkeypatch):
    """Files that come while their folder is listed may be missed then, but not for good."""
    scan = os.scandir

    @contextlib.contextmanager
    def late(path):
        with scan(path) as entries:
            listed = list(entries)
        if path.endswith("Z"):
            (folder / "Z/late.png").touch()
        yield listed

    later = time.time_ns() + 10**10  # or the folder would count as too young
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", late)
        patch.setattr(time, "time_ns", lambda: later)
        assert not any("late" in path for path, _ in open_folder(folder).samples)
    check(open_folder(folder), folder)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "other", "old", "extensions"])
def test_a_broken_or_foreign_index_is_built_anew(folder, cache, damage, monkeypatch):
    open_folder(folder)
    path, = cache.glob("*.index")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif damage in ("old", "extensions"):
        index = torch.load(path, weights_only=True)
        index["names"].fill_(ord("x"))
        index |= {"version": 0} if damage == "old" else {"extensions": [".gif"]}
        torch.save(index, path)
    else:
        path.write_bytes({"text": b"not an index", "empty": b"", "other": pickle.dumps({"version": 1}, protocol=2)}[damage])
    check(open_folder(folder), folder)
    with monkeypatch.context() as patch:
        no_walk(patch)
        open_folder(folder)


def test_without_a_place_for_it_the_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # permissions would not stop root
    for _ in range(2):
        check(open_folder(folder), folder)
    assert capsys.readouterr().err.count("note: no index") == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(listing, "save_atomically", full)
    check(open_folder(folder), folder)
    assert "No space left on device" in capsys.readouterr().err


def test_the_default_place_is_in_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_folder(folder)
    assert len(list((tmp_path / "home/.cache/ibot").glob("*.index"))) == 1


def test_a_file_system_without_locks(folder, cache, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    check(open_folder(folder), folder)
    assert list(cache.glob("*.index"))


def test_one_of_several_processes_walks(folder, tmp_path):
    """The one that walks is slow; the other starts meanwhile, waits and reads what the first has found."""
    code = """
import os, sys, time
import images
scan, walked = os.scandir, []
def slow(path):
    walked.append(path)
    open(sys.argv[2], "w").close()
    time.sleep(0.1)
    return scan(path)
os.scandir = slow
dataset = images.CheckedImageFolder(sys.argv[1])
print(len(walked), len(dataset), dataset.samples[5])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [tmp_path / "first", tmp_path / "second"]
    processes = [subprocess.Popen([sys.executable, "-c", code, folder, path], env=env, stdout=subprocess.PIPE, text=True)
                 for path in started]
    outputs = [process.communicate(timeout=60)[0].split(maxsplit=1) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    folders = sum(1 for _ in os.walk(folder, followlinks=True))
    assert sorted(int(walked) for walked, _ in outputs) == [0, folders]
    assert outputs[0][1] == outputs[1][1] and outputs[0][1].startswith(str(len(open_folder(folder))))


def test_workers_read_the_samples(folder):
    """Files of this folder hold no image; the path that a worker names is the right one."""
    dataset = open_folder(folder)
    data_loader = torch.utils.data.DataLoader(dataset, 1, num_workers=1, sampler=[4])
    with pytest.raises(InputError) as caught:
        next(iter(data_loader))
    assert dataset.samples[4][0] in str(caught.value)
