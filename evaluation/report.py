"""The results of a job as a table beside the paper's, and report.md with curves from its logs.

    python evaluation/report.py --output_dir work_dirs/JOB_NAME   # or ./run.sh report JOB_NAME
    python evaluation/report.py --output_dir work_dirs/{JOB1,JOB2}  # each, and their NMI and losses in one picture

Of an evaluation that was repeated with the same settings, the last result counts. Reads results.json and the `log.txt` of
pre-training, linear probes and fine-tuning; writes `report.md` and `pictures/*.png` beside them.
"""
import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.charts import draw_curves, loss_curves, numbers, quality_curves, read_log
from evaluation.common.results import read_results
from recipes import RECIPES, flags_of

PROTOCOLS = {"knn": "k-NN", "linear": "linear, sweep", "linear_solo": "linear, one rate", "logistic": "logistic regression",
             "unsupervised": "clusters", "linear_part": "part-wise linear", "finetune": "fine-tuning",
             "semi_supervised": "few labels", "imagenet9": "ImageNet-9", "backgrounds_challenge": "adversarial backgrounds",
             "imagenet_a": "ImageNet-A", "imagenet_c": "ImageNet-C", "occlusion": "occlusion", "shuffle": "shuffled cells",
             "video_segmentation": "objects in videos"}
TRANSFER = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "inat2018": "iNaturalist 2018", "inat2019": "iNaturalist 2019",
            "flowers": "Flowers", "cars": "Cars"}
PROTOCOLS |= {f"transfer_{name}": f"transfer, {title}" for name, title in TRANSFER.items()}
PROTOCOLS |= {"retrieval_roxford5k": "Oxford retrieval", "retrieval_rparis6k": "Paris retrieval",
              "copy_detection": "Copydays", "coco": "detection on COCO",
              "ade20k_upernet": "ADE20K, UPerNet", "ade20k_linear": "ADE20K, linear"}
TRAINED = ("linear", "linear_solo", "linear_part", "finetune", "semi_supervised",
           *(f"transfer_{name}" for name in TRANSFER))

# Recipes whose numbers are shown for their network. The result of one whose pre-training names no recipe stands beside the
# first row.
SHOWN = ("vit_s16_800ep", "vit_s16_300ep", "vit_s16_800ep_2crops", "vit_s16_300ep_2crops", "table9_ibot",
         "in22k_vit_s16_160ep", "dino_vit_s16_800ep", "swin_t7_300ep", "swin_t14_300ep", "vit_b16_400ep",
         "vit_b16_400ep_rand", "vit_b16_400ep_2crops", "in22k_vit_b16_80ep", "dino_vit_b16_400ep", "vit_l16_250ep",
         "vit_l16_250ep_rand", "in22k_vit_l16_50ep")
# Objects in the videos of DAVIS 2017: network, patch, method, J&F, J, F in percent. ViT-S/16 as in Table 16, the others are
# of DINO's paper (Caron et al., 2021).
PUBLISHED_VIDEO = (
    ("vit_small", 16, "iBOT, 800 epochs", 61.8, 60.4, 63.2),
    ("vit_small", 16, "DINO", 61.8, 60.2, 63.4),
    ("vit_base", 16, "DINO", 62.3, 60.7, 63.9),
    ("vit_small", 8, "DINO", 69.9, 66.6, 73.1),
    ("vit_base", 8, "DINO", 71.4, 67.9, 74.9),
    ("vit_small", 8, "supervised", 66.0, 63.9, 68.1),
)
VIDEO = {"sequences": 30, "frames": 1999, "objects": 61}  # of the validation set, for which these numbers are
TRAIN_IMAGES, VAL_IMAGES = 1281167, 50000
# ViT-S/16 with 1 % and 10 % of the labels (Table 12); its clusters with 1000 outputs (Table 5).
SUBSET_IMAGES = (12811, 128116)
PUBLISHED_SUBSETS = {"knn": (62.3, 70.1), "linear": (62.5, 72.2), "linear_solo": (62.5, 72.2), "logistic": (65.9, 73.4)}
PUBLISHED_FEW_LABELS = {0: (55.0, 74.0), 1: (61.9, 75.1)}  # fine-tuned (Table 4), by --finetune_head_layer
PUBLISHED_TRANSFER = {  # Table 7
    ("vit_small", 16): dict(zip(TRANSFER, (99.1, 90.7, 73.7, 78.5, 98.6, 94.0), strict=True)),
    ("vit_base", 16): dict(zip(TRANSFER, (99.2, 92.2, 74.6, 79.6, 98.9, 94.3), strict=True))}
# mAP of retrieval and copy detection, percent: Oxford medium, hard, Paris medium, hard, Copydays strong. The first row is
# Table 16's; the others are of DINO (Caron et al., 2021), Copydays whitened and with 10,000 distractors.
PUBLISHED_RETRIEVAL = (
    ("iBOT ViT-S/16, 800 epochs", 36.6, 13.0, 61.5, 34.1, None),
    ("DINO ViT-S/16, in iBOT's table", 37.2, 13.9, 63.1, 34.4, None),
    ("DINO ViT-S/16, in DINO's paper", 41.8, 13.7, 63.1, 34.4, None),
    ("DINO ViT-S/16, trained on Google Landmarks v2", 51.5, 24.3, 75.3, 51.6, None),
    ("supervised ViT-S/16", 33.5, 8.9, 63.0, 37.2, None),
    ("DINO ViT-B/16, 224 pixels", None, None, None, None, 81.7),
    ("DINO ViT-B/8, 320 pixels", None, None, None, None, 85.5),
    ("supervised ViT-B/16, 224 pixels", None, None, None, None, 76.4),
)
RETRIEVAL = {"retrieval_roxford5k": (1, 4993), "retrieval_rparis6k": (3, 6322)}  # column of medium there; images
# Cascade Mask R-CNN on COCO, percent: network, patch (Swin: window), pre-training, AP, AP50, AP75 of boxes, the same of
# masks (Tables 6, 13). The Swin's rows are of its and MoBY's authors; the paper has no Swin.
PUBLISHED_COCO = (
    ("vit_small", 16, "iBOT, 800 epochs", 49.4, 68.7, 53.3, 42.6, 65.6, 45.8),
    ("vit_small", 16, "supervised", 46.2, 65.9, 49.6, 40.1, 62.9, 42.8),
    ("vit_base", 16, "iBOT, 400 epochs", 51.2, 70.8, 55.5, 44.2, 67.8, 47.7),
    ("vit_base", 16, "supervised", 49.8, 69.6, 53.8, 43.2, 66.6, 46.5),
    ("vit_base", 16, "BEiT", 50.1, 68.5, 54.6, 43.5, 66.2, 47.1),
    ("vit_base", 16, "DINO", 50.1, 69.5, 54.3, 43.4, 66.8, 47.0),
    ("swin_tiny", 7, "supervised", 48.1, 67.1, 52.5, 41.7, 64.4, 45.0),
    ("swin_tiny", 7, "MoBY", 48.1, 67.1, 52.1, 41.5, 64.0, 44.7),
)
COCO_METRICS = ("bbox_AP", "bbox_AP50", "bbox_AP75", "segm_AP", "segm_AP50", "segm_AP75")
COCO_IMAGES = (117266, 5000)  # for training, for validation
# Segmentation of ADE20K, percent: network, pre-training, mIoU and mAcc of UPerNet, the same of the linear head (Tables 6,
# 14). The Swin's rows are of its and MoBY's authors.
PUBLISHED_ADE = (
    ("vit_small", 16, "iBOT, 800 epochs", 45.4, 56.2, None, None),
    ("vit_small", 16, "supervised", 44.5, 55.5, None, None),
    ("vit_base", 16, "iBOT, 400 epochs", 50.0, 60.3, 38.3, 48.0),
    ("vit_base", 16, "supervised", 46.6, 57.0, 35.4, 44.6),
    ("vit_base", 16, "BEiT", 45.8, 55.9, 27.4, 35.5),
    ("vit_base", 16, "DINO", 46.8, 57.1, 34.5, 43.7),
    ("swin_tiny", 7, "supervised", 44.5, None, None, None),
    ("swin_tiny", 7, "MoBY", 44.1, None, None, None),
)
ADE_COLUMNS, ADE_IMAGES = {"ade20k_upernet": 3, "ade20k_linear": 5}, (20210, 2000)
PUBLISHED_CLUSTERS = {"acc": 43.4, "ari": 32.8, "nmi": 78.6, "fmi": 35.6}


# ---------------------------------------------------------------- records

def asked_for(record):
    """What tells an evaluation from others: checkpoint and settings, not the weights and images that were found there."""
    settings = {name: value for name, value in record["settings"].items()
                if name not in ("weights_hash", "train_images", "val_images")}
    return {"checkpoint": os.path.realpath(record["checkpoint"]), **settings}


def latest(records):
    """Of records that answer the same question the last one, sorted by protocol within keys: ([record], [is it outdated?]).

    Outdated is a record of other weights than the last evaluation of the same checkpoint and key.
    """
    found, weights = {}, {}
    for record in records:
        key, protocol = record["key"], record["protocol"]
        found[json.dumps([key, protocol, asked_for(record)], sort_keys=True)] = record
        weights[key, record["checkpoint"]] = record["settings"].get("weights_hash")
    keys, protocols = [key for key, _ in weights], [*PROTOCOLS, *(record["protocol"] for record in records)]
    records = sorted(found.values(), key=lambda record: (keys.index(record["key"]), protocols.index(record["protocol"])))
    return records, [record["settings"].get("weights_hash") != weights[record["key"], record["checkpoint"]]
                     for record in records]


def network(record):
    """(architecture, patch or window size) as in the tables of published numbers."""
    settings = record["settings"]
    arch = str(settings.get("arch")).replace("deit_", "vit_")
    size = settings.get("window_size" if arch.startswith("swin") else "patch_size")
    return arch, size if isinstance(size, int) else None


def recipe_network(name):
    """`network` of a recipe."""
    (arch,), flags = flags_of(name)["arch"], flags_of(name)
    return arch, int(flags["window_size" if arch.startswith("swin") else "patch_size"][0])


def recipe_of(record):
    """Name of the recipe that a record's network was pre-trained by, None where it names none."""
    name = record["settings"].get("recipe")
    return name if isinstance(name, str) and name in RECIPES else None


def variants(record):
    """[(text, {metric: number}, is it the one that the paper reports?)] of a record: each k, lambda, epoch, ..."""
    metrics, protocol = record["metrics"], record["protocol"]
    parts = {name: values for name, values in metrics.items() if isinstance(values, dict) and numbers(values)}
    parts = ({"": metrics} if numbers(metrics) or not parts else {}) | parts
    best = max(parts, key=lambda name: numbers(parts[name]).get("top1", -math.inf), default=None)
    if protocol in TRAINED:
        best = "best"
    elif protocol == "unsupervised":
        best = "head"
    elif protocol in RETRIEVAL:
        best = None  # `paper` names the parts
    result = []
    for name, values in parts.items():
        text = {"knn": f"k = {name}", "logistic": f"lambda {name}"}.get(protocol, name.replace("_", " "))
        if protocol in TRAINED:
            values = values if "lr" in values else values | {"lr": record["settings"].get("lr")}
            text += "".join(f", {what} {value:g}" for what, value in numbers(values).items() if what in ("epoch", "lr"))
            if values.get("optimizer", "sgd") != "sgd" or values.get("weight_decay"):
                text += f", {values.get('optimizer')}, decay {values.get('weight_decay')}"
        result.append((text, numbers(values), name == best))
    return result


def paper(record):
    """({metric: the paper's number} for what a record measures, does it compare?); no numbers where the paper has none.

    Of retrieval {part of the record: its number}.
    """
    protocol, settings, which = record["protocol"], record["settings"], network(record)
    if protocol in RETRIEVAL:
        column, images = RETRIEVAL[protocol]
        found = dict(zip(("medium", "hard"), PUBLISHED_RETRIEVAL[0][column:column + 2], strict=True))
        compares = settings.get("database_images") == images and not settings.get("crop_queries")
        return (found if which == ("vit_small", 16) else {}), compares
    if protocol.startswith("transfer_"):
        found = PUBLISHED_TRANSFER.get(which, {}).get(protocol.removeprefix("transfer_"))
        return ({} if found is None or settings.get("train_subset") else {"top1": found}), True
    if protocol == "video_segmentation":
        whole = VIDEO.items() <= record["metrics"].items() and settings.get("scale_size") == 480
        found = PUBLISHED_VIDEO[0][3:] if whole and which == PUBLISHED_VIDEO[0][:2] else ()
        return dict(zip(("J&F-Mean", "J-Mean", "F-Mean"), found, strict=False)), True
    if protocol == "coco":
        row = next((row for row in PUBLISHED_COCO if row[:2] == which and row[2].startswith("iBOT")), ())
        compares = (settings.get("train_images"), settings.get("val_images")) == COCO_IMAGES
        return dict(zip(COCO_METRICS, row[3:], strict=False)), compares
    if protocol in ADE_COLUMNS:
        row = next((row for row in PUBLISHED_ADE if row[:2] == which and row[2].startswith("iBOT")), None)
        values = row[ADE_COLUMNS[protocol]:][:2] if row else ()
        compares = (settings.get("train_images"), settings.get("val_images")) == ADE_IMAGES
        return {name: value for name, value in zip(("mIoU", "mAcc"), values, strict=False) if value}, compares
    if settings.get("dataset", "imagefolder") != "imagefolder":
        return {}, False
    train, compares = settings.get("train_images"), settings.get("val_images") == VAL_IMAGES
    if protocol == "unsupervised":
        return (PUBLISHED_CLUSTERS if which == ("vit_small", 16) else {}), compares
    if settings.get("train_subset") or protocol == "semi_supervised":
        places = [i for i, images in enumerate(SUBSET_IMAGES) if isinstance(train, int) and abs(train / images - 1) < 0.02]
        found = (PUBLISHED_FEW_LABELS.get(settings.get("finetune_head_layer")) if protocol == "semi_supervised"
                 else PUBLISHED_SUBSETS.get(protocol))
        return ({"top1": found[places[0]]} if places and found and which == ("vit_small", 16) else {}), compares
    column = {"knn": "knn", "linear": "linear", "linear_solo": "linear", "finetune": "finetuned"}.get(protocol)
    if protocol == "finetune" and settings.get("image_size", 224) != 224:
        return {}, False
    name = recipe_of(record) or next((name for name in SHOWN if recipe_network(name) == which), None)
    value = getattr(RECIPES[name], column) if name and column else None
    return ({} if value is None else {"top1": value}), compares and train == TRAIN_IMAGES


# ---------------------------------------------------------------- tables

def differing(records):
    """For each record a text of the settings in which results of the same protocol and key differ."""
    def shown(value):
        text = engine.printable(value, 1000)
        return text if len(text) <= 40 else f"...{text[-37:]}"  # paths differ at their ends

    texts = []
    for record in records:
        own = asked_for(record)
        others = [asked_for(other) for other in records
                  if (other["protocol"], other["key"]) == (record["protocol"], record["key"])]
        texts.append(", ".join(f"{engine.printable(name)} {shown(value)}" for name, value in own.items()
                               if any(other.get(name) != value for other in others)))
    return texts


def result_tables(records, outdated):
    """([header, rows...] of accuracies, the same of other metrics, notes), cells are text, for what `latest` gives."""
    accuracies = [["network", "weights", "evaluation", "", "top-1", "top-5", "paper", "time"]]
    others = [["network", "weights", "evaluation", "", "result", "paper", "time"]]
    notes = {}
    for record, special, old in zip(records, differing(records), outdated, strict=True):
        known, compares = paper(record)
        otherwise = record["settings"].get("recipe_otherwise") if recipe_of(record) else None
        digest = str(record["settings"].get("weights_hash", "-"))[:10]
        if old:
            digest += "*"
            notes["*"] = "* of other weights than the last evaluation of this network: repeat the evaluation"
        title = PROTOCOLS.get(record["protocol"], record["protocol"]) + (f" ({special})" if special else "")
        start = [engine.printable(text) for text in (record["key"], digest)] + [engine.printable(title, 160)]
        when = engine.printable(record["time"][:16].replace("T", " "))
        for text, metrics, reported in variants(record):
            own = {text: known[text]} if text in known else known if reported else {}
            shown = [f"{name if len(own) > 1 else ''} {value:.1f}".strip() for name, value in own.items()]
            beside = ", ".join(shown) or "-"
            if shown and otherwise:
                notes[otherwise] = (f"( ) the paper's number is for the recipe {recipe_of(record)}, this network was "
                                    f"pre-trained otherwise: {engine.printable(otherwise, 300)}")
            beside = f"({beside})" if shown and (otherwise or not compares) else beside
            if shown and not compares:
                what = ("the whole data set and whole queries" if record["protocol"] in RETRIEVAL else
                        "all of COCO" if record["protocol"] == "coco" else
                        "all of ADE20K" if record["protocol"] in ADE_COLUMNS else "ImageNet-1K")
                notes[what] = f"( ) the paper's number is for {what}, this result for other images: they do not compare"
            text = engine.printable(text)
            if "top1" in metrics:
                top5 = f"{metrics['top5']:.2f}" if "top5" in metrics else "-"
                accuracies.append([*start, text, f"{metrics['top1']:.2f}", top5, beside, when])
            else:
                result = ", ".join(f"{engine.printable(name)} {value if isinstance(value, int) else f'{value:.2f}'}"
                                   for name, value in metrics.items())
                others.append([*start, text, result or "-", beside, when])
    return accuracies, others, list(notes.values())


def video_table(records):
    """[header, rows...] of published numbers for DAVIS 2017 if there is a result of `records` for it, else []."""
    if not any(record["protocol"] == "video_segmentation" for record in records):
        return []
    return [["network", "method", "J&F", "J", "F"]] + [
        [f"{arch}/{patch}", method, *(f"{value:.1f}" for value in values)]
        for arch, patch, method, *values in PUBLISHED_VIDEO]


def published_table(records):
    """[header, rows...] of the paper's numbers for the networks of `records`, and of the ablations with their recipes."""
    networks, named = list(dict.fromkeys(map(network, records))), {recipe_of(record) for record in records} - {None}
    ablations = {name.split("_")[0] for name in named - set(SHOWN)}
    names = [name for which in networks for name in SHOWN if recipe_network(name) == which]
    names += [name for name in RECIPES
              if "arch" in flags_of(name) and (name in named or name.split("_")[0] in ablations)]
    found = [(name, RECIPES[name].what, *RECIPES[name][3:6]) for name in dict.fromkeys(names)]
    if ("vit_small", 16) in networks:
        for share, knn, linear, logistic in zip(("1 %", "10 %"), *(PUBLISHED_SUBSETS[name] for name in (
                "knn", "linear", "logistic")), strict=True):
            found.append(("vit_s16_800ep", f"{share} of the labels (logistic regression {logistic})", knn, linear,
                          PUBLISHED_FEW_LABELS[1][share == "10 %"]))
    return [["network", "epochs", "recipe", "", "k-NN", "linear", "fine-tuned"]] + [
        ["{}/{}".format(*recipe_network(name)), flags_of(name)["epochs"][0], name, what,
         *(f"{value:.1f}" if value else "-" for value in accuracies)] for name, what, *accuracies in found]


def retrieval_table(records):
    """[header, rows...] of published numbers of retrieval and copy detection, if there are results of these; else [].

    Those of DINO too, as the paper has few.
    """
    if not any(record["protocol"] in (*RETRIEVAL, "copy_detection") for record in records):
        return []
    return [["network", "Oxford M", "Oxford H", "Paris M", "Paris H", "Copydays strong"]] + [
        [what, *(f"{value:.1f}" if value else "-" for value in values)] for what, *values in PUBLISHED_RETRIEVAL]


def coco_table(records):
    """[header, rows...] of published numbers of detection on COCO, if there is a result of `records` for it, else []."""
    if not any(record["protocol"] == "coco" for record in records):
        return []
    return [["network", "pre-training", *(name.replace("bbox_", "boxes ").replace("segm_", "masks ")
                                          for name in COCO_METRICS)]] + [
        [f"{arch}/{size}", what, *(f"{value:.1f}" for value in values)] for arch, size, what, *values in PUBLISHED_COCO]


def ade_table(records):
    """[header, rows...] of published numbers of ADE20K, if there is a result of `records` for it, else []."""
    if not any(record["protocol"] in ADE_COLUMNS for record in records):
        return []
    return [["network", "pre-training", "UPerNet mIoU", "mAcc", "linear mIoU", "mAcc"]] + [
        [f"{arch}/{size}", what, *(f"{value:.1f}" if value else "-" for value in values)]
        for arch, size, what, *values in PUBLISHED_ADE]


def as_text(table):
    """A table for terminals. Cells of the first three columns that repeat those above are left empty."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines, above = [], None
    for row in table:
        cells = ["" if above and row[:i + 1] == above[:i + 1] and i < 3 else cell for i, cell in enumerate(row)]
        lines.append("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
        above = row
    return "\n".join(lines)


def as_markdown(table):
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in table]
    return "\n".join(f"| {row} |" for row in [rows[0], " | ".join(["---"] * len(table[0])), *rows[1:]])


# ---------------------------------------------------------------- curves

NMI = "NMI of the teacher's [CLS] clusters and the labels (Figure 8)"


def nmi_curve(epochs):
    return [(epoch, values["train_nmi"]) for epoch, values in epochs.items() if "train_nmi" in values]


def curves(folder):
    """({name of a picture: (title, {name of a curve: [(epoch, value)]})}, notes) from the logs of the job in `folder`."""
    pictures, notes = {}, []

    def read(path):
        epochs, broken = read_log(path)
        if broken:
            notes.append(f"{path}: {broken} line(s) that cannot be read are left out")
        return epochs

    if (folder / "log.txt").exists():
        epochs = read(folder / "log.txt")
        pictures["losses"] = "Losses of pre-training", loss_curves(epochs)
        pictures["nmi"] = NMI, {"": nmi_curve(epochs)}
        pictures |= quality_curves(epochs)
    for picture, title, kinds in (  # sub-folders of run.sh, with one per key
            ("linear", "Top-1 accuracy of linear probes in percent (of a sweep: the epoch's best head)",
             {kind: f", {PROTOCOLS[kind]}" for kind in ("linear", "linear_solo")}),
            ("linear_part", "Top-1 accuracy of part-wise linear probes in percent", {"linear_part": ""}),
            ("finetuning", "Top-1 accuracy of fine-tuned networks in percent", {"cls": "", "semi_cls": ", few labels"})):
        series = {}
        for kind, what in kinds.items():
            for path in sorted((folder / kind).glob("**/log.txt")):
                key = path.parent.relative_to(folder / kind).as_posix()
                top1 = {epoch: [value for name, value in values.items() if re.fullmatch(r"test_acc(1|\d+@1)", name)]
                        for epoch, values in read(path).items()}
                series[f"{key}{what}"] = [(epoch, max(found)) for epoch, found in top1.items() if found]
        pictures[picture] = title, series
    pictures = {name: (title, {what: points for what, points in series.items() if points})
                for name, (title, series) in pictures.items()}
    return {name: picture for name, picture in pictures.items() if picture[1]}, notes


# ---------------------------------------------------------------- the report

def report(output_dir):
    """Print the tables of the job in `output_dir`; write its report.md and pictures. Raises InputError without results."""
    folder = Path(output_dir)
    everything = read_results(folder)
    if not everything:
        raise engine.InputError(f"{folder / 'results.json'}: no results; evaluations of the job write them, as "
                               f"./run.sh imagenet_knn JOB_NAME ARCH KEY GPUS")
    records, outdated = latest(everything)
    accuracies, others, notes = result_tables(records, outdated)
    tables = [table for table in (accuracies, others) if len(table) > 1]
    published, retrieval = published_table(records), retrieval_table(records)
    pictures, more = curves(folder)
    notes += more
    if len(records) < len(everything):
        notes.append(f"{len(everything) - len(records)} older result(s) of evaluations that were repeated are left out")
    names = engine.printable(", ".join(dict.fromkeys(f"{arch}/{size}" for arch, size in map(network, records))), 200)
    source = ("The paper's top-1 accuracies (iBOT, Zhou et al., 2022), ImageNet-1K" if len(published) > 1
              else f"The paper has no numbers for {names}.")

    text = [f"# {folder.resolve().name}", f"{len(records)} result(s) of {names}, in percent.", *map(as_markdown, tables)]
    text += ["\n".join(f"- {note}" for note in notes)] if notes else []
    text += ["## Published", source, *([as_markdown(published)] if len(published) > 1 else [])]
    text += ["Retrieval and copy detection, mAP:", as_markdown(retrieval)] if retrieval else []
    video = video_table(records)
    text += ["Objects in the videos of DAVIS 2017:", as_markdown(video)] if video else []
    coco = coco_table(records)
    text += ["Detection on COCO, Cascade Mask R-CNN, single scale:", as_markdown(coco)] if coco else []
    ade = ade_table(records)
    text += ["Segmentation of ADE20K, single scale:", as_markdown(ade)] if ade else []
    for title, pattern in (("Detections", "det/*/detections.png"),
                           ("Segmentations: images, truth, prediction", "seg*/*/segmentations.png")):
        found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
        text += [f"## {title}", *(f"![{name}]({name})" for name in found)] if found else []
    text += ["## Curves"] + ([f"![{title}](pictures/{name}.png)" for name, (title, _) in pictures.items()] or ["No logs."])
    text += ["## Settings", *(settings_text(record) for record in records)]
    try:
        if pictures:
            (folder / "pictures").mkdir(exist_ok=True)
        for name, (title, series) in pictures.items():
            draw_curves(series, title, folder / "pictures" / f"{name}.png")
        (folder / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    except OSError as error:
        raise engine.InputError(f"{folder}: the report cannot be written ({error.strerror or error})") from error

    parts = [f"{folder}: {len(records)} result(s) of {names}, in percent", *map(as_text, tables)]
    parts += ["\n".join(notes)] if notes else []
    parts += [source + (f"\n{as_text(published)}" if len(published) > 1 else "")]
    parts += [f"Published mAP of retrieval and copy detection\n{as_text(retrieval)}"] if retrieval else []
    parts += [f"Published numbers of DAVIS 2017\n{as_text(video)}"] if video else []
    parts += [f"Published numbers of detection on COCO\n{as_text(coco)}"] if coco else []
    parts += [f"Published numbers of segmentation of ADE20K\n{as_text(ade)}"] if ade else []
    parts += [f"written: {folder / 'report.md'}" + "".join(f", {folder / 'pictures' / name}.png" for name in pictures)]
    print("\n\n".join(parts), flush=True)


def compare(folders):
    """Reports of several jobs, and their NMI and losses in one picture each, in the first one's folder.

    Raises InputError for a folder with neither results nor a log.
    """
    folders = list(dict.fromkeys(map(Path, folders)))
    for folder in folders:
        engine.need((folder / "results.json").exists() or (folder / "log.txt").exists(),
                    f"{folder}: there is neither a results.json nor a log.txt of a job")
    names = [folder.resolve().name for folder in folders]
    nmi, losses = {}, {}
    for folder, name in zip(folders, names, strict=True):
        if read_results(folder):
            report(folder)
        else:
            print(f"{folder}: no results of evaluations", flush=True)
        print()
        epochs = read_log(folder / "log.txt")[0] if (folder / "log.txt").exists() else {}
        name = name if names.count(name) == 1 else str(folder)
        nmi[name], losses[name] = nmi_curve(epochs), loss_curves(epochs)["total"]
    for picture, title, series in (("jobs_nmi", NMI, nmi), ("jobs_loss", "Total loss of pre-training", losses)):
        path = folders[0] / "pictures" / f"{picture}.png"
        series = {name: points for name, points in series.items() if points}
        if series:
            path.parent.mkdir(exist_ok=True)
            draw_curves(series, title, path)
            print(f"written: {path}, of {engine.printable(', '.join(series), 200)}", flush=True)


def settings_text(record):
    """Everything that a record says of how it came about, as a paragraph of Markdown."""
    def listed(values):
        return ", ".join(f"{name} {value}" for name, value in values.items())
    title = f"{record['key']}, {PROTOCOLS.get(record['protocol'], record['protocol'])}, {record['time']}"
    lines = [title, f"checkpoint {record['checkpoint']}", listed(record["settings"]), listed(record["versions"])]
    title, *lines = (engine.printable(line, 2000).replace("`", "'") for line in lines)
    return f"**{title}**\n" + "\n".join(f"- `{line}`" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--output_dir", required=True, nargs="+", help="folder of the job, or of several")
    folders = parser.parse_args().output_dir
    if len(folders) == 1:
        report(folders[0])
    else:
        compare(folders)


if __name__ == "__main__":
    engine.run(main)
