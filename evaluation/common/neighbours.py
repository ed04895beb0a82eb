"""The nearest images of images: near-duplicates in folders, tables, and the page to look at.

Letters: n images of the database, Q queries, F feature size.
"""
import csv
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

import engine
from evaluation.common.arguments import int_from
from evaluation.common.nearest import near_duplicates, nearest, relative
from evaluation.common.pages import Row, neighbour_page, neighbour_strip
from listing import list_images, places_of
from shards import Member

STRIPS, BEST = 3, 5  # pictures of single queries, and the nearest images on each
LISTED, SHOWN = 10_000, 30  # near-duplicates in the table and on the page


def add_neighbour_flags(parser):
    """Add the flags of what is shown to a parser or group."""
    parser.add_argument("--topk", type=int_from(1), default=10, help="nearest images in the table and on the page")
    parser.add_argument("--threshold", type=float, default=0.95,
                        help="similarity from which two images of folders count as near-duplicates")
    parser.add_argument("--page_queries", type=int_from(1), default=70, help="queries on the page, evenly spread")


@dataclass(frozen=True)
class RetrievalSet:
    """Images and who asks for what. `items`: each image once, (path, box or None); `database` int64 [n] and `queries`
    int64 [Q]: their places in `items`; `gnd`: as in `check_ground_truth`, None for folders; paths are below `root`."""
    name: str
    root: str
    items: list
    database: torch.Tensor
    queries: torch.Tensor
    gnd: list | None


def image_paths(source):
    """Whole paths of all images of what `listing.list_images` takes, sorted."""
    found = list_images(list(map(os.path.abspath, places_of(source))), labelled=False).samples
    return sorted(path if isinstance(path, Member) else os.path.realpath(path) for path, _ in found)


def retrieval_set(name, root, database, queries, gnd=None):
    """The `RetrievalSet` of two lists of (path, box or None); images that are in both are in it once."""
    places = {item: place for place, item in enumerate(dict.fromkeys(database + queries))}
    database, queries = (torch.tensor([places[item] for item in part]) for part in (database, queries))
    return RetrievalSet(name, str(root), list(places), database, queries, gnd)


def compare_folders(key, data, features, topk, threshold, device):
    """Find and print the neighbours and near-duplicates of a `RetrievalSet` by features [number of items, F] of length 1.

    Returns similarities [Q, k], places in the database [Q, k] and (a sentence, pairs), see `neighbour_page`.
    """
    queries, database = features[data.queries], features[data.database]
    same = data.queries, data.database
    values, places = nearest(queries, database, topk, device, same)
    count, pairs = near_duplicates(queries, database, threshold, LISTED, same, device)
    sentence = f"{count} pair(s) of images with a similarity from {threshold:g} on"
    sentence += f"; the {LISTED} nearest are listed" if count > LISTED else ""
    print(f"{key}, {data.name}: {len(data.queries)} queries among {len(data.database)} images; {sentence}", flush=True)
    pairs = [(data.items[data.queries[query]], data.items[data.database[place]], similarity)
             for similarity, query, place in pairs]
    for one, two, similarity in pairs[:10]:
        print(f"  {similarity:.4f}  {relative(one[0], data.root)}  {relative(two[0], data.root)}", flush=True)
    return values, places, (sentence, pairs)


def source_of(weights, key):
    """What a page says of where the network comes from."""
    return "random, untrained" if weights == "random" else f"{key} of {weights}"


def mark_of(truth, place):
    """What a place in the database is for a query's ground truth: a name of `pages.MARKS`."""
    if truth is None:
        return ""
    return "junk" if place in truth["junk"] else "right" if place in truth["easy"] + truth["hard"] else "wrong"


def rows_of(data, values, places, topk):
    """`Row`s of all queries with their nearest images."""
    truths = data.gnd or [None] * len(data.queries)
    rows = []
    best = values[:, :topk].tolist(), places[:, :topk].tolist()
    for query, truth, *found in zip(data.queries, truths, *best, strict=True):
        rows.append(Row(data.items[query], [(data.items[data.database[place]], similarity, mark_of(truth, place))
                                            for similarity, place in zip(*found, strict=True) if similarity > -math.inf]))
    return rows


def write_neighbours(folder, facts, data, rows, page_queries, duplicates=None):
    """Write the page of `page_queries` of the rows, its tables and `STRIPS` pictures into a folder.

    facts: [(what, value)] at the top of the page; duplicates: as `compare_folders` gives them. Raises InputError.
    """
    facts = [*facts, ("similarity", "cosine of the features")]
    if data.gnd is not None:
        facts.append(("frames", "green: positive, easy or hard; grey: junk; red: neither"))

    def name_of(path):
        return relative(path, data.root)

    def spread(count):
        return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]

    def table(name, header, lines):
        with open(folder / name, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([header, *lines])

    try:
        folder.mkdir(parents=True, exist_ok=True)
        table("neighbours.csv", ["query", "rank", "image", "similarity", "mark"], (
            [name_of(row.query[0]), rank, name_of(item[0]), f"{similarity:.4f}", mark]
            for row in rows for rank, (item, similarity, mark) in enumerate(row.nearest, 1)))
        if duplicates is not None:
            table("duplicates.csv", ["image", "other", "similarity"], (
                [name_of(one[0]), name_of(two[0]), f"{similarity:.4f}"] for one, two, similarity in duplicates[1]))
        for stale in folder.glob("query*.png"):
            stale.unlink()
        for number, row in enumerate(spread(STRIPS), 1):
            neighbour_strip(Row(row.query, row.nearest[:BEST])).save(folder / f"query{number}.png")
        text = neighbour_page(f"Nearest images: {data.name}", facts, spread(page_queries), name_of,
                              duplicates and (duplicates[0], duplicates[1][:SHOWN]))
        (folder / "index.html").write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise engine.InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    print(f"written: {folder / 'index.html'}, neighbours.csv, query1.png, ...", flush=True)
