"""Scores of rankings, and the ground truth of revisited Oxford and Paris (Radenovic et al., 2018), read without running it.

    python -m evaluation.common.ranking gnd_roxford5k.pkl gnd_roxford5k.json   # the pickle to JSON, once

Letters: n images of the database, Q queries.
"""
import argparse
import io
import json
import math
import pickle
import pickletools
from pathlib import Path

import numpy as np

import engine

PRECISIONS = (1, 5, 10)
# What counts as right, and what is passed over as if it were not in the database.
PROTOCOLS = {"easy": (("easy",), ("junk", "hard")), "medium": (("easy", "hard"), ("junk",)),
             "hard": (("hard",), ("junk", "easy"))}


# ---------------------------------------------------------------- scores

def average_precision(ranks, count):
    """Area under precision and recall by trapezia, for rising 0-based ranks of the positives found; `count` there are."""
    ranks, found = np.asarray(ranks, dtype=np.float64), np.arange(len(ranks))
    left = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((found + 1) / (ranks + 1) + left).sum() / (2 * count))


def adjusted_ranks(order, positives, junk):
    """Rising 0-based ranks of the positives in `order`, a permutation of range(n), as if the junk were not in it."""
    kind = np.zeros(len(order), dtype=np.int8)
    kind[junk], kind[positives] = 2, 1
    found = kind[order]
    ranks = np.flatnonzero(found == 1)
    return ranks - np.cumsum(found == 2)[ranks]


def precision_at(ranks, k):
    """Share of positives among the first k of a ranking; fewer are looked at if the last positive is before."""
    k = min(int(ranks[-1]) + 1, k)
    return float((ranks < k).sum() / k)


def retrieval_scores(order, gnd):
    """{"easy", "medium", "hard": {"map", "p1", "p5", "p10"}} in percent, over the queries that have positives.

    order: [Q, n] places in the database, best first. gnd: for each query the lists "easy", "hard" and "junk". A protocol
    for which no query has positives has no numbers.
    """
    scores = {}
    for protocol, (right, passed_over) in PROTOCOLS.items():
        rows = []
        for ranking, truth in zip(order, gnd, strict=True):
            positives, junk = ([place for name in names for place in truth[name]] for names in (right, passed_over))
            if positives:
                ranks = adjusted_ranks(ranking, positives, junk)
                rows.append([average_precision(ranks, len(positives)), *(precision_at(ranks, k) for k in PRECISIONS)])
        names = ["map", *(f"p{k}" for k in PRECISIONS)]
        scores[protocol] = dict(zip(names, (100 * np.mean(rows, axis=0)).tolist(), strict=True)) if rows else {}
    return scores


# ---------------------------------------------------------------- ground truth

MOST_BYTES, MOST_PLACES = 2**26, 10**7  # about a hundred times those of Oxford and Paris


def read_ground_truth(folder, name):
    """Ground truth of the data set `name` from FOLDER/gnd_NAME.json, or else from gnd_NAME.pkl: see `check_ground_truth`.

    Nothing in the pickle is run. Raises InputError, naming the file, for one that is missing or holds anything else.
    """
    path = Path(folder) / f"gnd_{name}.json"
    return read_file(path if path.exists() else path.with_suffix(".pkl"))


def read_file(path):
    """The same of a file that ends in .json or .pkl."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
        return check_ground_truth(json.loads(data) if path.suffix == ".json" else unpickled(data))
    except Exception as error:  # a damaged file can make the readers raise anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise engine.InputError(f"ground truth {path}: {engine.printable(reason, 160)}") from error


def check_ground_truth(content):
    """Plain {"imlist": [n names], "qimlist": [Q names], "gnd": [{"bbx", "easy", "hard", "junk"} of each query]}.

    `content` is decoded by this shape, so that references in a pickle to one list many times cannot expand without bound.
    Raises ValueError.
    """
    def entry(mapping, key, *default):
        if not isinstance(mapping, dict) or key not in mapping and not default:
            raise ValueError(f"it is no ground truth of revisited Oxford and Paris: no {key}")
        return mapping.get(key, *default)

    names = {key: [_name(name) for name in _flat(entry(content, key), key)] for key in ("imlist", "qimlist")}
    gnd, n = _flat(entry(content, "gnd"), "gnd"), len(names["imlist"])
    if len(gnd) != len(names["qimlist"]):
        raise ValueError(f"{len(gnd)} entries for {len(names['qimlist'])} queries")
    for key, found in names.items():
        if not found or len(set(found)) != len(found):
            raise ValueError(f"{key} is empty or holds a name twice")
    queries, total = [], 0
    for query, truth in zip(names["qimlist"], gnd, strict=True):
        places = {key: _flat(entry(truth, key, *([[]] if key == "junk" else [])), key) for key in ("easy", "hard", "junk")}
        everything = [place for part in places.values() for place in part]
        total += len(everything)
        if len(everything) > n or total > MOST_PLACES:
            raise ValueError(f"query {query}: more places than there are images")
        if not all(type(place) is int and 0 <= place < n for place in everything):
            raise ValueError(f"query {query}: a place that is none of the {n} images")
        if len(set(everything)) != len(everything):
            raise ValueError(f"query {query}: an image is named twice in easy, hard and junk")
        box = _flat(entry(truth, "bbx"), "bbx")
        if len(box) != 4 or not all(type(side) in (int, float) and math.isfinite(side) for side in box):
            raise ValueError(f"query {query}: its bbx is not four numbers")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"query {query}: its bbx is empty")
        queries.append({"bbx": box, **places})
    return {**names, "gnd": queries}


def _name(text):
    if not isinstance(text, str) or not text or text.startswith(".") or any(c in "/\\\0" for c in text):
        shown = engine.printable(text) if isinstance(text, str) else f"a {type(text).__name__}"
        raise ValueError(f"{shown} is no plain name of a file")
    return text


def _flat(value, key):
    """A list out of JSON, or a list, tuple, array or list of numbers out of the stand-ins of a pickle."""
    if isinstance(value, _StandIn):
        value = _array(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{key} is no list")
    return [_array(item) if isinstance(item, _StandIn) else item for item in value]


# ---------------------------------------------------------------- the pickle

# What lists, numpy arrays and numpy numbers need, at any protocol of pickles.
_NAMES = {f"numpy.{core}.{name}" for core in ("core", "_core") for name in (
    "multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")}
_NAMES |= {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.bytes", "__builtin__.bytes"}


class _StandIn:
    """What a pickle would have called, and with what; nothing is called."""

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state):
        self.state = state


class _Callable:
    """A name in a pickle."""

    def __init__(self, name):
        self.name = name

    def __call__(self, *arguments):
        return _StandIn(self.name, arguments)

    def __setstate__(self, state):
        raise ValueError(f"it changes {self.name}")


class _Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in _NAMES:
            raise ValueError(f"it holds {module}.{name}, which no ground truth needs")
        return _Callable(f"{module}.{name}")

    def persistent_load(self, pid):
        raise ValueError("it refers to something outside")


def unpickled(data):
    """Content of a pickle with `_StandIn`s for whatever is no plain container, text or number. Raises if it holds more."""
    for count, (code, value, _) in enumerate(pickletools.genops(data)):
        # The reader makes room for as many remembered values as the largest number says, before it looks at anything.
        if count > MOST_PLACES or code.name in ("PUT", "LONG_BINPUT") and value > len(data):
            raise ValueError("its pickle is too long or damaged")
    return _Reader(io.BytesIO(data), encoding="latin1").load()


def _array(part):
    """List (of an array) or number (of a numpy number) that a stand-in is for; raises ValueError for all others."""
    kind, arguments = part.name.rpartition(".")[2], part.arguments
    match kind, arguments, part.state:
        case "_reconstruct", _, (1, tuple() as shape, _StandIn() as dtype, bool() | int(), raw):
            pass
        case "_frombuffer", (raw, _StandIn() as dtype, tuple() as shape, str()), None:
            pass
        case "scalar", (_StandIn() as dtype, raw), None:
            shape = ()
        case _:
            raise ValueError(f"it calls {part.name} in a way that numpy does not")
    if len(shape) > 1 or not all(type(side) is int for side in shape):
        raise ValueError("it holds an array that is no list")
    match dtype.name, dtype.arguments, dtype.state:
        case "numpy.dtype", (str(code), *_), (int(), "<" | ">" | "|" | "=" as order, *_):
            pass
        case _:
            raise ValueError("it holds a numpy type that is damaged")
    if code in ("O", "O8") and isinstance(raw, list):
        return raw
    if code[:1] not in ("i", "u", "f") or code[1:] not in ("1", "2", "4", "8"):
        raise ValueError(f"it holds an array of type {engine.printable(code)}")
    values = np.frombuffer(_raw(raw), dtype=np.dtype(order + code))
    if values.shape != (shape or (1,)):
        raise ValueError("it holds an array of another size than its data")
    return values.tolist() if shape else values[0].item()


def _raw(raw):
    """Bytes of an array: as they are, as the text of old pickles, or as `_codecs.encode(text, "latin1")`."""
    match raw:
        case bytes() | bytearray() | memoryview():
            return raw
        case str():
            return raw.encode("latin1")
        case _StandIn(name="_codecs.encode", arguments=(str(text), "latin1"), state=None):
            return text.encode("latin1")
        case _StandIn(name="builtins.bytes" | "__builtin__.bytes", arguments=(), state=None):
            return b""
    raise ValueError("it holds an array whose data are no bytes")


def main():
    parser = argparse.ArgumentParser(description="Ground truth of revisited Oxford or Paris: from its pickle to JSON")
    parser.add_argument("pickle", type=Path)
    parser.add_argument("json", type=Path)
    args = parser.parse_args()
    content = read_file(args.pickle)
    try:
        args.json.write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise engine.InputError(f"{args.json}: cannot be written ({error.strerror})") from error
    print(f"{args.json}: {len(content['imlist'])} images, {len(content['qimlist'])} queries")


if __name__ == "__main__":
    engine.run(main)
