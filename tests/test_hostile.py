"""Hostile and damaged checkpoints: every script refuses each with one line, runs nothing of it and takes no memory for it."""
import argparse
import collections
import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT

import engine
import extract_backbone_weights
import images
import listing
import main_ibot
import models
from evaluation import eval_knn

TINY = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "16", "--out_dim", "8", "--patch_out_dim", "8",
        "--head_hidden_dim", "8", "--batch_size_per_gpu", "60", "--epochs", "2", "--num_workers", "0", "--device", "cpu",
        "--shared_head", "true"]


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Output folder of a short run: checkpoint.pth is good."""
    folder = tmp_path_factory.mktemp("run")
    main_ibot.train_ibot(main_ibot.get_args_parser().parse_args(
        [*TINY, "--epochs", "1", "--data_path", str(digits / "train"), "--output_dir", str(folder)]))
    return folder


@pytest.fixture
def good(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=False)


@pytest.fixture
def refused(folder, digits, tmp_path, monkeypatch, capfd):
    """refused(path, words, *scripts): the scripts (default: all) end with code 1 and one line with `words` and the name."""
    commands = {
        "resume": (main_ibot, [*TINY, "--data_path", digits / "train", "--output_dir", folder, "--load_from"]),
        "extract": (extract_backbone_weights, [tmp_path / "out.pth", "--checkpoint_key", "teacher"]),
        "evaluate": (eval_knn, ["--data_path", digits, "--device", "cpu", "--num_workers", 0, "--pretrained_weights"])}

    def check(path, words, *scripts):
        path = folder / path
        for script in scripts or commands:
            module, flags = commands[script]
            words_of_script = [path, *flags] if script == "extract" else [*flags, path]
            monkeypatch.setattr(sys, "argv", [script, *map(str, words_of_script)])
            capfd.readouterr()
            with pytest.raises(SystemExit) as end:
                engine.run(module.main)
            message = capfd.readouterr().err
            assert end.value.code == 1 and message.startswith("error: "), (script, message)
            assert len(message.splitlines()) == 1 and len(message) < 700
            assert message[:-1].isprintable(), message
            assert str(path) in message, (script, message)
            if not (script == "resume" and "does not exist" in message):  # seen before anything is opened
                assert words in message, (script, message)
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out.pth").exists()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield check
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # KiB


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, folder, call=os.system):
        self.reduced = call, (f"touch {folder / 'ran'}" if call is os.system else f"open({str(folder / 'ran')!r}, 'w')",)

    def __reduce__(self):
        return self.reduced


# ---------------------------------------------------------------- pickles that run code

@pytest.mark.parametrize("zipped, place", [*((True, place) for place in (
    "top", "args", "namespace", "optimizer", "student", "key", "eval")), (False, "top"), (False, "args")])
def test_code_in_a_pickle(refused, folder, tmp_path, good, zipped, place):
    evil = Evil(tmp_path)
    if place == "namespace":
        good["args"].data_path = [{"x": evil}]
    elif place == "optimizer":
        good["optimizer"]["state"][0]["exp_avg"] = evil
    elif place == "student":
        good["student"]["module.backbone.cls_token"] = evil
    good = {"top": evil, "args": {**good, "args": evil}, "key": {**good, "more": evil}}.get(place, good)
    good = {**good, "epoch": Evil(tmp_path, eval)} if place == "eval" else good
    torch.save(good, folder / "code.pth", _use_new_zipfile_serialization=zipped)
    refused("code.pth", ("it holds __builtin__.eval" if place == "eval" else "it holds posix.system") if zipped else
            "format of PyTorch before 1.6")
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "ran").exists()  # it would have run


def test_index_of_a_data_folder(digits, tmp_path, monkeypatch, capsys):
    """An index that would run code, or that does not fit together or leads out of the folder, is said to be and not used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = str(digits / "train")
    name = hashlib.sha256(os.fsencode(os.path.realpath(data))).hexdigest()[:32]
    path = tmp_path / "ibot" / f"{name}.index"
    path.parent.mkdir()
    index, _ = listing._walk(data)
    torch.save(index, path)
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_walk", None)
        expected = images.CheckedImageFolder(data).samples  # as it is, it is used
    hostile = [{"names": Evil(tmp_path)}, {"version": Evil(tmp_path)}, {"folders": "x"}, {"modified": [1]}, {"modified": ...},
               {"counts": torch.tensor([1])}, {"counts": -index["counts"]}, {"ends": index["ends"].float()},
               {"ends": index["ends"] + 5}, {"ends": index["ends"].flip(0)}, {"names": index["names"][:-4]},
               {"names": index["names"].clone().fill_(ord("/"))}, {"others": "many"},
               {"folders": listing._bytes(index["folders"].numpy().tobytes().replace(b"\0" + b"0", b"\0" + b"../0", 1))},
               {"folders": listing._bytes(index["folders"].numpy().tobytes().replace(b"\0" + b"0", b"\0" + b"/0", 1))}]
    for changed in hostile:
        torch.save({key: value for key, value in {**index, **changed}.items() if value is not ...}, path)
        engine.say_once.cache_clear()
        assert list(images.CheckedImageFolder(data).samples) == list(expected), changed
        note = capsys.readouterr().err
        assert note.startswith("note: ") and note.count("\n") == 1 and str(path) in note, (changed, note)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- pickles that claim too much

def op(value):
    """Opcodes, protocol 2, that push `value`; bytes are opcodes already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(op, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(op, value)) + b"e"
    return b"}(" + b"".join(op(x) for pair in value.items() for x in pair) + b"u"


def name(text):
    return b"c" + text.replace(" ", "\n").encode() + b"\n"


def call(function, *arguments):
    return name(function) + op(arguments) + b"R"


def tensor(elements=4, offset=0, shape=(4,), stride=(1,), key="0", kind="torch FloatStorage", hooks=None):
    storage = op(("storage", name(kind), key, "cpu", elements)) + b"Q"
    return call("torch._utils _rebuild_tensor_v2", storage, offset, shape, stride, False,
                hooks or call("collections OrderedDict"))


def archive(path, content, compression=zipfile.ZIP_STORED, data=bytes(16), **more):
    """A file like those of torch.save: `content` are the pickle's opcodes without begin and end."""
    with zipfile.ZipFile(path, "w", compression) as file:
        records = {"data.pkl": b"\x80\x02" + op(content) + b".", "version": b"3\n", "byteorder": b"little", "data/0": data, **more}
        for record, value in records.items():
            file.writestr(f"x/{record}", value)


LAUGHS = op(("x",) * 2) + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))  # 2**61 values
CLAIMS = {
    "terabytes in a record of 16 bytes": (tensor(elements=2**40), "cannot be read safely"),
    "one element more than the record": (tensor(elements=5, shape=(5,)), "cannot be read safely"),
    "no such record": (tensor(key="7"), "cannot be read safely"),
    "another type": (tensor(kind="torch DoubleStorage"), "cannot be read safely"),
    "stride 0": (tensor(shape=(2**40,), stride=(0,)), "the file has 4 values for a tensor"),
    "stride 0 in one of two dimensions": (tensor(shape=(4, 4), stride=(1, 0)), "the file has 4 values for a tensor"),
    "beyond the end": (tensor(offset=1), "cannot be read safely"),
    "a stride too long": (tensor(shape=(2,), stride=(4,)), "cannot be read safely"),
    "negative offset": (tensor(offset=-1), "cannot be read safely"),
    "negative stride": (tensor(offset=3, stride=(-1,)), "cannot be read safely"),
    "negative size": (tensor(shape=(-4,)), "cannot be read safely"),
    "overflow": (tensor(shape=(2**62, 4), stride=(4, 1)), "cannot be read safely"),
    "empty with a long side": (tensor(shape=(0, 2**60), stride=(1, 1)), "holds no backbone"),
    "size and stride differ": (tensor(shape=(2, 2)), "cannot be read safely"),
    "shape of text": (tensor(shape=("4",)), "cannot be read safely"),
    "hooks": (tensor(hooks={"a": 1}), "holds no backbone"),
    "no storage": (call("torch._utils _rebuild_tensor_v2", 1, 0, (1,), (1,), False, {}), "cannot be read safely"),
    "bytes": (call("__builtin__ bytearray", 2**37), "it holds __builtin__.bytearray"),
    "tensor by size": (call("torch FloatTensor", 2**37), "it holds torch.FloatTensor"),
    "storage by size": (call("torch.storage UntypedStorage", 2**37), "it holds torch.storage.UntypedStorage"),
    "meta": (call("torch._utils _rebuild_meta_tensor_no_storage", 1, (2**40,), (1,), False), "_rebuild_meta"),
    "sparse": (call("torch._utils _rebuild_sparse_tensor", 1, ()), "it holds torch._utils._rebuild_sparse_tensor"),
    "type": (call("torch QUInt8Storage", 4), "it holds torch.QUInt8Storage"),
    "codec": (call("_codecs encode", "x" * 99, "idna"), "cannot be read safely"),
    "objects of numpy": (call("numpy.core.multiarray scalar", call("numpy dtype", "O8", 0, 1), "x"), "other than float64"),
    "type of numpy": (call("numpy dtype", "f8", 0, 1) + op((3, "<", None, None, None, 2**40, 1, 0)) + b"b", "float64"),
    "pointer of numpy": (call("numpy.core.multiarray scalar", call("numpy dtype", "f8", 0, 1) + op(
        (3, "<", None, None, None, -1, -1, 4)) + b"b", call("_codecs encode", "A" * 8, "latin1")), "float64"),  # shows an address
    "number of numpy": (call("numpy.core.multiarray scalar", call("numpy dtype", "f8", 0, 1), "x"), "cannot be read safely"),
    "class as a value": (name("argparse Namespace"), "holds no network"),
    "namespace of no dictionary": (name("argparse Namespace") + b")\x81" + op((None, {"a": 1})) + b"b", "holds no network"),
    "nested lists": (b"]" * 10**5 + b"a" * (10**5 - 1), "holds no network"),
    "nested tuples": (b")" + b"\x85" * 10**5, "holds no network"),
    "nested dictionaries": ((b"}" + op("a")) * 10**4 + b"N" + b"s" * 10**4, "holds no network"),
    "2**61 values": (LAUGHS, "holds no network"),
    "tuple as a key": (b"})Ns", "holds no network"),
    "list in itself": (b"]q\1h\1a", "holds no network"),
    "dictionary in itself": (b"}q\1" + op("a") + b"h\1s", "holds no network"),
    "odd dictionary": (b"}(NNNu", "damaged"),
    "list set as a dictionary": (b"]" + op("a") + b"Ns", "cannot be read safely"),
    "empty stack": (b"0aaa", "cannot be read safely"),
    "too few": (b"a", "damaged"),
    "no mark": (b"t", "cannot be read safely"),
    "unknown place": (b"h\7", "damaged"),
    "text that is cut": (b"X\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
    "unknown operation": (b"\xff", "opcode"),
    "function by its number": (b"\x82\1", "cannot be read safely"),
    "old instance": (b"(" + op("touch ran") + b"ios\nsystem\n", "cannot be read safely"),
    "newer global": (op("os") + op("system") + b"\x93", "cannot be read safely"),
    "newer protocol": (b"\x80\4", "has protocol 4"),
    "newer bytes": (b"\x96" + struct.pack("<Q", 2**37), "expected 137438953472 bytes"),
    "persistent module": (op(("module", name("argparse Namespace"), "a", "b")) + b"Q", "cannot be read safely"),
    "persistent text": (op("storage") + b"Q", "cannot be read safely"),
    "escapes": (b"cposix\nsystem\x1b[2J\n", "it holds posix.system\\x1b[2J"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_claims_of_a_pickle(refused, folder, case):
    content, words = CLAIMS[case]
    archive(folder / "claims.pth", {"teacher": {"a": content}})
    refused("claims.pth", words, *([] if case == "terabytes in a record of 16 bytes" else ["extract"]))


def test_the_same_without_a_claim_loads(tmp_path):
    """So the refusals above have the reasons that they name."""
    archive(tmp_path / "a.pth", {"a": tensor(), "b": tensor(offset=1, shape=(2,), stride=(2,)), "c": [1, (None, True)]})
    loaded = engine.load_checkpoint(tmp_path / "a.pth")
    assert torch.equal(loaded["a"], torch.zeros(4)) and loaded["b"].shape == (2,) and loaded["c"] == [1, (None, True)]


def test_what_training_writes_loads(tmp_path):
    shared = torch.randn(6)
    content = {"state": collections.OrderedDict(a=shared[1:4], b=shared.view(2, 3).t(), c=torch.tensor(3), d=torch.empty(0, 3)),
               "args": argparse.Namespace(a=[1, 2.5], b=None, c="ü\n", d=-2**70), 7: (True, b"\xff\0"),
               "rate": np.float64(0.1), "kinds": [torch.ones(3, dtype=t) for t in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16)],
               "parameter": torch.nn.Parameter(torch.randn(2)), "network": torch.nn.BatchNorm1d(2).state_dict()}
    torch.save(content, tmp_path / "a.pth")
    loaded = engine.load_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(v, loaded["state"][k]) for k, v in content["state"].items())
    assert loaded["state"]["a"].data_ptr() == loaded["state"]["b"].data_ptr() + 4
    assert loaded["args"] == content["args"] and loaded["rate"] == 0.1 and loaded[7] == content[7] and "running_var" in loaded["network"]
    assert [t.dtype for t in loaded["kinds"]] == [t.dtype for t in content["kinds"]]


# ---------------------------------------------------------------- files that are none

@pytest.mark.parametrize("top", [[1], None, "text", torch.zeros(3), ({},), 7, argparse.Namespace(student={})], ids=str)
def test_other_things_than_a_dictionary(refused, folder, top):
    torch.save(top, folder / "top.pth")
    refused("top.pth", "not a dictionary")


def safetensors_file(header, length=None, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


FILES = {
    "empty.pth": (b"", "empty"),
    "text.pth": (b"no checkpoint\n" * 99, "not written by torch.save"),
    "pickle.pth": (pickle.dumps({"epoch": 1}), "not written by torch.save"),
    "zeros.pth": (bytes(10**6), "not written by torch.save"),
    "empty.safetensors": (b"", ""),
    "long header.safetensors": (safetensors_file(b"{}", 2**62), ""),
    "header beyond the end.safetensors": (safetensors_file(b"{}", 10**7), ""),
    "no json.safetensors": (safetensors_file(b"{" * 10**5), ""),
    "beyond the end.safetensors": (safetensors_file({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}), ""),
    "other size.safetensors": (safetensors_file({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 4]}}, data=bytes(4)), ""),
    "overlap.safetensors": (safetensors_file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, data=bytes(4)), ""),
    "unknown type.safetensors": (safetensors_file({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4)), ""),
    "odd type.safetensors": (safetensors_file({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, data=bytes(4)), ""),
    "pickle.safetensors": (pickle.dumps([1]), ""),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_other_kinds(refused, folder, file):
    content, words = FILES[file]
    (folder / file).write_bytes(content)
    refused(file, words, *(["extract"] if file.endswith("safetensors") else []))


def test_what_cannot_be_opened(refused, folder):
    (folder / "folder.pth").mkdir()
    (folder / "loop.pth").symlink_to("loop.pth")
    (folder / "nowhere.pth").symlink_to("gone")
    os.mkfifo(folder / "pipe.pth")
    refused("folder.pth", "is no file")
    refused("pipe.pth", "is no file")
    refused("loop.pth", "symbolic links")
    refused("nowhere.pth", "no such file")
    refused("checkpoint.pth/a.pth", "Not a directory", "extract", "evaluate")
    refused("a" * 300, "name too long", "extract", "evaluate")
    if os.geteuid():
        (folder / "locked.pth").write_bytes(b"x")
        (folder / "locked.pth").chmod(0)
        refused("locked.pth", "Permission denied")


def test_damaged_files(refused, folder, good):
    """Cut anywhere, or with one bit flipped anywhere, a file is never read as if it were whole."""
    whole = (folder / "checkpoint.pth").read_bytes()
    for length in (1, 7, 50, 5000, len(whole) // 2, len(whole) - 98, len(whole) - 1):
        (folder / "cut.pth").write_bytes(whole[:length])
        refused("cut.pth", "", "extract")
    refused("cut.pth", "cut short or damaged")
    for content in (b"\0" + whole, whole + b"\0", b"PK\3\4" + whole, whole[:-2] + b"\1\0" + b"x", whole[:-98] + bytes(98),
                    whole + whole[100:], whole[:len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096:]):
        (folder / "bytes.pth").write_bytes(content)
        refused("bytes.pth", "", "extract")
    teacher = engine.load_checkpoint(folder / "checkpoint.pth")["teacher"]
    state = torch.Generator().manual_seed(0)
    for position in torch.randint(len(whole), (60,), generator=state).tolist():
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        (folder / "bit.pth").write_bytes(content)
        try:
            loaded = engine.load_checkpoint(folder / "bit.pth")["teacher"]
        except engine.InputError as error:
            assert "\n" not in str(error)
        else:  # between the records
            assert all(torch.equal(value, loaded[key]) for key, value in teacher.items())


def test_archives(refused, folder):
    with zipfile.ZipFile(folder / "zip.pth", "w") as file:
        file.writestr("a.txt", "hello")
    refused("zip.pth", "not one of torch.save")
    with zipfile.ZipFile(folder / "none.pth", "w"):
        pass
    refused("none.pth", "not written by torch.save", "extract")

    archive(folder / "bomb.pth", {"a": tensor(elements=2**24)}, zipfile.ZIP_DEFLATED, data=bytes(2**26))
    assert (folder / "bomb.pth").stat().st_size < 2**17
    refused("bomb.pth", "compressed records")
    archive(folder / "pickle.pth", b"}" * 10**6, zipfile.ZIP_DEFLATED)
    refused("pickle.pth", "compressed records", "extract")

    archive(folder / "claim.pth", {"a": tensor()}, data=b"claimclaimclaim!")
    content = (folder / "claim.pth").read_bytes()
    place = content.rindex(b"x/data/0") - 46  # in the directory: two sizes
    for stored, real in ((2**31, 2**31), (16, 2**31), (2**31, 16), (10**4, 10**4)):
        (folder / "claim.pth").write_bytes(content[:place + 20] + struct.pack("<LL", stored, real) + content[place + 28:])
        refused("claim.pth", "more bytes than" if stored == real else "compressed records", "extract")
    for flag in (1, 0x40, 0x2000):  # encrypted, in two ways
        (folder / "claim.pth").write_bytes(content[:place + 8] + struct.pack("<H", flag) + content[place + 10:])
        if flag == 1:
            refused("claim.pth", "encrypted", "extract")
    (folder / "claim.pth").write_bytes(content.replace(b"claimclaimclaim!", b"claimclaimclaim?"))
    refused("claim.pth", "damaged")

    for other in ("DATA.PKL", "../y/data/0"):
        archive(folder / "names.pth", {"a": tensor()}, **{other: b"\x80\x02N."})
        refused("names.pth", "", "extract")
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(folder / "names.pth", "w") as file:
            for content in (b"\x80\x02}.", b"\x80\x02N."):
                file.writestr("x/data.pkl", content)
    refused("names.pth", "ambiguous names", "extract")
    archive(folder / "script.pth", {"a": tensor()}, **{"constants.pkl": b"\x80\x02)."})
    refused("script.pth", "TorchScript", "extract")
    archive(folder / "order.pth", {"a": tensor()}, byteorder=b"middle")
    refused("order.pth", "cannot be read safely", "extract")


# ---------------------------------------------------------------- dictionaries that do not hold what they should

def changed(good, path, value):
    """`good` with the entry at `path`, keys joined with >, replaced (or removed: value `...`)."""
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(">")]
    place = good
    for key in outer:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value(place[last]) if callable(value) else value


def with_value(number):
    def change(tensor):
        tensor.view(-1)[0] = number
        return tensor
    return change


RESUMED = [
    ("student", ..., "it lacks student"),
    ("teacher", ["a"], "it lacks teacher"),
    ("student", torch.zeros(3), "it lacks student"),
    ("student", {}, "'student' holds no network"),
    ("student>module.backbone.cls_token", "text", "'student' holds no network"),
    ("student", lambda s: {**s, 3: torch.zeros(1)}, "'student' holds no network"),
    ("student>module.backbone.cls_token", ..., "1 missing: backbone.cls_token"),
    ("student", lambda s: {**s, "a\n\x1b[2J": torch.zeros(1)}, "1 unexpected: a\\n\\x1b[2J"),
    ("student>module.backbone.cls_token", lambda t: t[..., 1:], "(1, 1, 95) instead of (1, 1, 96)"),
    ("teacher>backbone.cls_token", lambda t: t.long(), "1 of another type: backbone.cls_token torch.int64"),
    ("teacher>backbone.cls_token", with_value(float("nan")), "1 not finite: backbone.cls_token"),
    ("teacher>backbone.cls_token", lambda t: t.double() + 1e300, "1 not finite: backbone.cls_token"),
    ("epoch", ..., "it lacks epoch"),
    ("epoch", "3", "it lacks epoch"),
    ("epoch", 1.5, "it lacks epoch"),
    ("epoch", torch.tensor(1), "it lacks epoch"),
    ("epoch", True, "its epoch is True"),
    ("epoch", -1, "its epoch is -1"),
    ("epoch", 10**300, "its epoch is 1000"),
    ("args", ["--arch"], "its args are a list"),
    ("ibot_loss", [1], "it lacks ibot_loss"),
    ("ibot_loss", {}, "no tensors for iBOTLoss"),
    ("ibot_loss>center", 3.5, "no tensors for iBOTLoss"),
    ("ibot_loss>center2", ..., "1 missing: center2"),
    ("ibot_loss>center", torch.zeros(8), "center (8,) instead of (1, 8)"),
    ("ibot_loss>center", torch.full((1, 8), float("inf")), "1 not finite: center"),
    ("optimizer", "text", "it lacks optimizer"),
    ("optimizer", {}, "its optimizer has no groups"),
    ("optimizer>param_groups", {"a": 1}, "its optimizer has no groups"),
    ("optimizer>param_groups", [], "its optimizer has groups of [] parameters"),
    ("optimizer>param_groups", lambda g: [3, *g[1:]], "its optimizer has no groups"),
    ("optimizer>param_groups>0", {"lr": 1.0}, "its optimizer has no groups"),
    ("optimizer>param_groups>0>params", lambda p: p[1:], "its optimizer has groups of"),
    ("optimizer>param_groups>0>params", lambda p: [p[0], p[0], *p[2:]], "does not number its parameters"),
    ("optimizer>param_groups>0>params", lambda p: [[], *p[1:]], "does not number its parameters"),
    ("optimizer>state", ["a"], "its optimizer has no state"),
    ("optimizer>state>0", [1], "a state for no parameter"),
    ("optimizer>state", lambda s: {**s, 10**6: s[0]}, "a state for no parameter"),
    ("optimizer>state", lambda s: {**s, "a": s[0]}, "a state for no parameter"),
    ("optimizer>state>0", {}, "is not that of AdamW"),
    ("optimizer>state>0", lambda s: {**s, "mu": s["exp_avg"]}, "is not that of AdamW"),
    ("optimizer>state>0>exp_avg", "text", "no valid exp_avg for parameter 0"),
    ("optimizer>state>0>exp_avg", 1.0, "no valid exp_avg for parameter 0"),
    ("optimizer>state>0>exp_avg", torch.zeros(7), "no valid exp_avg for parameter 0"),
    ("optimizer>state>0>exp_avg", with_value(float("inf")), "no valid exp_avg for parameter 0"),
    ("optimizer>state>0>exp_avg_sq", with_value(-1), "no valid exp_avg_sq for parameter 0"),
    ("optimizer>state>0>step", -3, "no valid step for parameter 0"),
    ("optimizer>state>0>step", "3", "no valid step for parameter 0"),
    ("optimizer>state>0>step", torch.zeros(2), "no valid step for parameter 0"),
]


@pytest.mark.parametrize("path, value, words", RESUMED, ids=[f"{i}-{path}" for i, (path, *_) in enumerate(RESUMED)])
def test_entries_of_a_run(refused, folder, good, path, value, words):
    changed(good, path, value)
    torch.save(good, folder / "changed.pth")
    refused("changed.pth", words, "resume")


@pytest.mark.parametrize("state", [3, {}, {"scale": "x", "_growth_tracker": 0}, {"scale": float("nan"), "_growth_tracker": 0},
                                   {"scale": -1.0, "_growth_tracker": 0}, {"scale": 2.0, "_growth_tracker": None}], ids=str)
def test_state_of_a_scaler(state):
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(engine.InputError, match="a.pth: its fp16_scaler"):
        engine.load_scaler(scaler, state, "a.pth")
    engine.load_scaler(scaler, {"scale": 8.0, "_growth_tracker": 3, "growth_factor": 1e9}, "a.pth")
    assert scaler.state_dict() == {**torch.amp.GradScaler("cpu").state_dict(), "scale": 8.0, "_growth_tracker": 3}


def test_only_the_state_of_the_optimizer_is_taken(good):
    """What a file says about rates, signs and implementation changes nothing."""
    weights = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(3))]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], lr=0.5)
    before = optimizer.state_dict()
    hostile = {"state": {n: {"step": 2, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones(1).expand(p.shape)}
                         for n, p in zip((5, 9), weights, strict=True)},
               "param_groups": [{"params": [n], "maximize": True, "lr": "x", "amsgrad": True} for n in (5, 9)]}
    engine.load_optimizer(optimizer, hostile, "a.pth")
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert all(optimizer.state[p]["step"] == 2 and optimizer.state[p]["exp_avg_sq"].is_contiguous() for p in weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()


EVALUATED = [
    ("args", [1], "its args are a list"),
    ("args", {"arch": ["vit_nano"]}, "its arch, a list, is not one of"),
    ("args", {"arch": "vit\n\x1b[2J"}, "its arch, vit\\n\\x1b[2J, is not one of"),
    ("args", {"arch": "x" * 10**5}, "its arch, xxx"),
    ("args", {}, "patches of 8 pixels, not 16"),
    ("args", {"arch": "vit_tiny", "patch_size": 8}, "of another shape"),
    ("args", {"arch": "swin_tiny"}, "missing"),
    ("args", {"arch": "vit_nano", "patch_size": "8"}, "its patch_size, 8, must be"),
    ("args", {"arch": "vit_nano", "patch_size": -8}, "its patch_size, -8, must be"),
    ("args", {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 10**9}, "its global_crops_size, 1000000000, must be"),
    ("args", {"arch": "vit_nano", "patch_size": 8, "global_crops_size": [32]}, "its global_crops_size, a list, must be"),
    ("args", {"arch": "swin_tiny", "window_size": 10**6}, "its window_size, 1000000, must be"),
    ("teacher", [1], "'teacher' holds no network"),
    ("teacher", {"a\nb": 3}, "'teacher' holds no network"),
    ("teacher", ..., "'teacher' is not in the file; keys: student"),
    ("teacher>backbone.pos_embed", torch.zeros(3), "is no ViT"),
    ("teacher>backbone.pos_embed", torch.zeros(1, 1, 96), "no square grid"),
    ("teacher>backbone.pos_embed", torch.zeros(1, 0, 96), "no square grid"),
    ("teacher>backbone.pos_embed", torch.zeros(1, 600**2 + 1, 1), "no square grid of at most 512 x 512"),
    ("teacher>backbone.patch_embed.proj.weight", torch.zeros(96, 3, 8, 0), "patches of 0 pixels, not 8"),
    ("teacher>backbone.norm.weight", with_value(float("nan")), "not finite"),
]


@pytest.mark.parametrize("path, value, words", EVALUATED, ids=[f"{i}-{path}" for i, (path, *_) in enumerate(EVALUATED)])
def test_entries_of_an_evaluation(refused, folder, good, path, value, words):
    changed(good, path, value)
    torch.save(good, folder / "evaluated.pth")
    refused("evaluated.pth", words, "evaluate")
    if path == "teacher" or "finite" in words:
        refused("evaluated.pth", words, "extract")


def test_names_of_an_extraction(refused, folder, good, tmp_path, monkeypatch, capfd):
    """Names go into the new file as they are; none breaks the line or the program."""
    many = {f"{i}\n": torch.zeros(1) for i in range(99)}
    torch.save(many | {"teacher": 3}, folder / "names.pth")
    refused("names.pth", "0\\n, 1\\n", "extract")
    good["teacher"] |= {f"backbone.layers.{'9' * 5000}.downsample.x": torch.zeros(1), "backbone.\ud800": torch.zeros(1)}
    torch.save(good, folder / "digits.pth")
    monkeypatch.setattr(sys, "argv", ["x", str(folder / "digits.pth"), str(tmp_path / "a.pth"), "--checkpoint_key", "teacher",
                                      "--format", "timm"])
    extract_backbone_weights.main()
    assert "tensors" in capfd.readouterr().out
    del good["teacher"]["backbone.\ud800"]
    good["teacher"]["backbone.__metadata__"] = torch.zeros(1)
    torch.save(good, folder / "metadata.pth")
    monkeypatch.setattr(sys, "argv", ["x", str(folder / "metadata.pth"), str(tmp_path / "a.safetensors"), "--checkpoint_key", "teacher"])
    try:
        extract_backbone_weights.main()
    except engine.InputError as error:
        assert "a.safetensors" in str(error) and "\n" not in str(error)
    else:
        assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == len(good["teacher"])
    assert not list(tmp_path.glob(".*"))


def test_a_window_of_swin_is_bounded(refused, folder):
    torch.save({"teacher": models.swin_tiny().state_dict(), "args": {"arch": "swin_tiny", "window_size": 32}}, folder / "swin.pth")
    refused("swin.pth", "of another shape", "evaluate")


# ---------------------------------------------------------------- as users meet them

def test_scripts_end_with_one_line(folder, digits, tmp_path, good):
    torch.save({**good, "args": Evil(tmp_path)}, folder / "code.pth")
    words = {"main_ibot.py": [*TINY, "--data_path", digits / "train", "--output_dir", folder, "--load_from", "code.pth"],
             "extract_backbone_weights.py": [folder / "code.pth", tmp_path / "out.pth"],
             "evaluation/eval_knn.py": ["--device", "cpu", "--data_path", digits, "--pretrained_weights", folder / "code.pth"]}
    started = [subprocess.Popen([sys.executable, script, *map(str, flags)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for script, flags in words.items()]
    for process in started:
        message = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert message == f"error: checkpoint {folder / 'code.pth'}: cannot be read safely (it holds posix.system)\n"
    assert not (tmp_path / "ran").exists()
