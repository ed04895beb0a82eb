"""One page about a checkpoint: its pattern layouts, features, attention, correspondence, part-wise probe and robustness.

    python analysis/report.py --pretrained_weights work_dirs/quickstart/checkpoint.pth
    python analysis/report.py --pretrained_weights work_dirs/JOB/checkpoint.pth --data_path data/imagenet --probe false

Runs the scripts of analysis/ one after the other and puts their pictures and figures into `index.html` in the output
folder, one file that needs no network. Images come from DATA/val (DATA itself where it has no val), by default of the
folder that the checkpoint was trained on. With DATA/train too, heads are trained on frozen features (`--probe`). Results of
robustness.sh are shown, if they are in the folder `robustness` beside the checkpoint, and videos of `viseg`.
"""
import base64
import html
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from analysis import common
from evaluation.common.arguments import int_from
from evaluation.common.charts import draw_curves, loss_curves, read_log
from evaluation.common.pages import page, section
from listing import name_of, places_of
from pictures import CROPS

ROOT = Path(__file__).resolve().parent.parent

# What the page says above each section.
TEXTS = {
    "Before and after training":
        "Validation images, and the training images whose [CLS] features are nearest, by the untrained network and by the "
        "trained teacher. Frames are green where the class is the query's. Below, the accuracy of the vote of ten.",
    "Clusters of patches":
        "The clusters with most patches, each by its clearest members: the patch in the middle is tinted, its "
        "neighbours are there for context. A good network has clusters with a meaning, such as an ear, a wheel or a "
        "texture. Below, images are explained by the patches that [CLS] attends to most, each with the cluster that "
        "it belongs to.",
    "Clusters of images":
        "The same for whole images, by their [CLS] token.",
    "Patch features":
        "The first three principal components of the features of patches as red, green and blue, one basis for all these "
        "images: patches of one colour are alike to the network, also in different images. A colour as such means nothing.",
    "Self-attention":
        "Where [CLS] looks in the last block. From left to right: the image; the patches that hold most of the "
        "attention, in a colour for each head; a heat map for each head.",
    "Nearest images":
        "Which images the features of [CLS] take for alike: an image on the left, the nearest others beside it, with the "
        "cosine of the features.",
    "Correspondence between two views":
        "Two random views of an image. Lines join patches that the network takes for the same, those with most "
        "attention. The accuracy is that of these pairs, over the patches that both views show.",
    "Correspondence between two images":
        "Two images of one class, matched in the same way.",
    "Parts of an image":
        "Accuracy of a linear classifier on the mean of the k patches that [CLS] attends to most. If few patches do "
        "as well as all, attention finds what matters.",
    "Linear classifier":
        "The best of 45 linear heads on the frozen features, and its file for the tests below.",
    "Occlusion":
        "Accuracy of that classifier when parts of the image are dropped: at random, those with most attention "
        "(salient), or all but these (non-salient). The higher a curve, the less is lost.",
    "Shuffling":
        "Its accuracy when the image is cut into cells that change places.",
    "Robustness":
        "Table 8 of the paper, as far as it was measured for this checkpoint, in percent: variants of ImageNet-9, half of "
        "the attention dropped, ImageNet-A, ImageNet-C (error), ImageNet.",
}


@dataclass
class Step:
    """A section of the page: its title, the commands that make it, and which files and printed lines are taken."""
    title: str
    commands: list  # of lists: a script below analysis/ and its flags
    pictures: list  # of (folder, pattern, how many, caption with {} for the number in a file's name)
    lines: str = "$^"  # regular expression of the lines of output that are shown


def get_args_parser():
    parser = common.analysis_parser("One HTML page about what a checkpoint has learned")
    parser.set_defaults(data_path=None, num_workers=1)
    parser.add_argument("--output_dir", help="folder of the page; by default `report` beside the checkpoint")
    parser.add_argument("--pictures", type=int_from(1), default=6, help="pictures of a kind on the page")
    parser.add_argument("--probe", type=engine.bool_flag, default=True, help="train heads where there are training images")
    parser.add_argument("--epochs", type=int_from(1), default=30, help="of these heads")
    return parser


def find_data(path):
    """(folder with train/ and val/ or None, images to look at) for DATA, DATA/train or others that can be listed."""
    if isinstance(path, list):
        return None, path
    path = Path(path)
    for root in (path, path.resolve().parent):
        if (root / "val").is_dir() and (root == path or path.name in ("train", "val")):
            return (root if (root / "train").is_dir() else None), root / "val"
    return None, path


def plan(args, backbone, root, images, out):
    """The sections of the page, in order."""
    size, cell, count = backbone.image_size, backbone.patch_size, args.pictures
    settings = ["--device", args.device, "--num_workers", args.num_workers, "--arch", backbone.arch, "--patch_size", cell]
    network = ["--pretrained_weights", args.pretrained_weights, "--checkpoint_key", backbone.key, *settings]
    places = places_of(images)
    patterns = ["extract_pattern/extract_topk_cluster.py", "--pretrained_path", *network[1:], "--data_path", *places,
                "--topk", 36, "--show_pics", 18, "--save_path", out / "patterns"]
    pairs = ["correspondence/visualize_correspondence.py", *network, "--data_path", *places, "--show_nums", count,
             "--topk", min(12, max(1, (size // cell) ** 2 // 3)), "--output_path", out / "correspondence"]
    sheet = "The largest clusters: rank, number of the cluster, how many {}, and the clearest ones"
    heads = f"heads 0 to {backbone.model.blocks[-1].attn.num_heads - 1}"
    larger = 480 if size == 224 and 480 % cell == 0 else size
    steps = [
        Step("Clusters of patches", [[*patterns, "--type", "patch"]],
             [(out / "patterns", "cpatch_overview.png", 1, sheet.format("patches")),
              (out / "patterns", "explained_idx*.png", count, "Image {}: where [CLS] looks most, and the clusters there")],
             "clusters of"),
        Step("Clusters of images", [[*patterns, "--type", "cls"]],
             [(out / "patterns", "ccls_overview.png", 1, sheet.format("images"))], "clusters of"),
        Step("Patch features", [["pca_map/visualize_pca.py", *network, "--data_path", *places, "--show_pics", 2 * count,
                                 "--output_dir", out / "pca"]],
             [(out / "pca", "pca.png", 1, "Images, each above its patches")], "of the variance"),
        Step("Self-attention", [["attention_map/visualize_attention.py", *network, "--data_path", *places, "--image_size",
                                 larger, "--show_pics", count, "--output_dir", out / "attention"]],
             [(out / "attention", "idx*_attn.png", count, f"Image {{}}: as it is; heads in colour; heat maps of {heads}")]),
        Step("Nearest images", [["../evaluation/eval_image_retrieval.py", *network, "--data_path", *places,
                                 "--queries", *places, "--imsize", size, "--output_dir", out]],
             [(out / "retrieval" / name_of(images) / backbone.key, "query*.png", 3, "Image {} and its nearest")],
             "similarity from"),
        Step("Correspondence between two views", [[*pairs, "--sample_type", "instance"]],
             [(out / "correspondence", "instance_corresp*.png", count, "Pair {}: two views of an image")],
             "matching accuracy"),
        Step("Correspondence between two images", [[*pairs, "--sample_type", "class"]],
             [(out / "correspondence", "class_corresp*.png", count, "Pair {}: two images of class {}")])]
    folder = Path(args.pretrained_weights).parent
    if Path(args.pretrained_weights).name == engine.CHECKPOINT and (folder / "log.txt").is_file():  # of a pre-training
        steps.insert(0, Step("Before and after training", [
            ["quickstart.py", "report", "--output_dir", folder, "--data_path", *([root] if root else places),
             "--device", args.device, "--num_workers", args.num_workers]],
            [(folder / "pictures", "neighbours.png", 1, "")], "^k-NN"))
    measured = folder / "robustness"
    tables = []
    if (measured / "results.json").is_file():
        tables.append(Step("Robustness", [["table8.py", "--output_dir", measured]], [], r"^ +O\.F\.|^(DINO|iBOT|here) "))
    if root is None or not args.probe:
        return steps + tables

    ks = sorted({max(1, round(share * (size // cell) ** 2)) for share in (1 / 196, 1 / 28, 1 / 14, 2 / 7, 4 / 7, 1)})
    linear, robust = out / "linear", out / "robustness"
    classifier = robust / "classifier.pth"
    probe = [*network, "--data_path", root, "--augment", "false", "--epochs", args.epochs, "--overwrite", "true"]
    occlusion = ["occlusion/eval.py", "--pretrained_weights", classifier, *settings, "--test_data", images,
                 "--output_dir", robust]
    return steps + [
        Step("Parts of an image", [["linear_part/eval.py", *probe, "--topk", *ks, "--output_dir", out / "linear_part"]],
             [(out / "linear_part", "accuracy.png", 1, "")], r"k = \d+, best: top-1"),
        Step("Linear classifier", [
            ["../evaluation/eval_linear_multi.py", *probe, "--n_last_blocks", min(4, len(backbone.model.blocks)),
             "--output_dir", linear],
            ["combine_ckpt.py", "--checkpoint_backbone", args.pretrained_weights, "--checkpoint_key", backbone.key,
             "--checkpoint_linear", linear / f"checkpoint_{backbone.key}_linear.pth", "--output_file", classifier]],
            [], ", best: top-1"),
        Step("Occlusion", [[*occlusion, "--random_drop", "--dino"]], [(robust, "occlusion.png", 1, "")], "^N?S.5"),
        Step("Shuffling", [[*occlusion, "--shuffle"]], [(robust, "shuffle.png", 1, "")]), *tables]


def number_of(path):
    """Pictures are shown in the order of the numbers in their names."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


def figures(pictures):
    """HTML of picture files, inside the page itself."""
    parts = []
    for folder, pattern, count, caption in pictures:
        for path in sorted(folder.glob(pattern), key=number_of)[:count]:
            data = base64.b64encode(path.read_bytes()).decode()
            kind = "jpeg" if path.suffix == ".jpg" else "png"
            text = html.escape(caption.format(*number_of(path)))
            parts.append(f'<figure><img alt="{text or path.stem}" src="data:image/{kind};base64,{data}">'
                         + (f"<figcaption>{text}</figcaption>" if text else "") + "</figure>")
    return "\n".join(parts)


def video_section(folder, key):
    """The section of three videos that `eval_video_segmentation.py` has segmented for this key; None if it was not run."""
    masks = folder / "viseg" / key
    pictures = [(masks, path.name, 1, f"{path.stem}: first, middle and last frame") for path in sorted(masks.glob("*.jpg"))]
    text = ("Objects that are marked in the first frame, on the left, are found again by the likeness of patches "
            "(evaluation/eval_video_segmentation.py).")
    return section("Objects in videos", f"<p>{text}</p>\n{figures(pictures[:3])}") if pictures else None


def run_step(step):
    """Run the commands of a section. Returns (HTML of the section, error or None)."""
    shown, commands, error = [], [], None
    for folder, pattern, *_ in step.pictures:
        for path in folder.glob(pattern):
            path.unlink()  # of an earlier page, about other weights or images
    for script, *flags in step.commands:
        flags = [str(flag) for flag in flags]
        commands.append(shlex.join(["python", os.path.normpath(f"analysis/{script}"), *flags]))
        done = subprocess.run([sys.executable, str(ROOT / "analysis" / script), *flags], capture_output=True, text=True)
        shown += [line for line in done.stdout.splitlines() if re.search(step.lines, line)]
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")
            break
    parts = [f"<p>{html.escape(TEXTS[step.title])}</p>"]
    parts.append(f'<pre class="error">{html.escape(error)}</pre>' if error else figures(step.pictures))
    if shown:
        parts.append(f"<pre>{html.escape(chr(10).join(shown))}</pre>")
    parts.append(f"<details><summary>command</summary><pre>{html.escape(chr(10).join(commands))}</pre></details>")
    return section(step.title, "\n".join(parts)), error


def training_section(folder, out):
    """The section of the losses and crops of training, from the files beside the checkpoint; None if there is no log."""
    log = folder / "log.txt"
    if not log.is_file():
        return None
    curves = {name: points for name, points in loss_curves(read_log(log)[0]).items() if points}
    if not curves:
        return None  # a log of something else
    draw_curves(curves, "Losses of pre-training", out / "loss.png")
    return section("Training", figures([
        (out, "loss.png", 1, ""), (folder, CROPS, 1, "What the student sees: masked patches are grey")]))


def main():
    args = get_args_parser().parse_args()
    if args.pretrained_weights == "random":
        raise engine.InputError("--pretrained_weights random: the page is about a checkpoint")
    backbone, checkpoint = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
    path = Path(args.pretrained_weights)
    stored = checkpoint.get("args")
    data = args.data_path or getattr(stored, "data_path", None)
    if not (isinstance(data, str) or isinstance(data, list) and all(isinstance(place, str) for place in data)):
        raise engine.InputError(f"--data_path: is needed, as {path} does not say what it was trained on")
    root, images = find_data(data)
    common.image_folder(images, labelled=False)  # its errors before the work
    out = common.output_folder(args.output_dir or path.parent / "report", "--output_dir")
    sections, failed = [training_section(path.parent, out), video_section(path.parent, backbone.key)], []
    for step in plan(args, backbone, root, images, out):
        start = time.time()
        content, error = run_step(step)
        sections.append(content)
        if error:
            failed.append(step.title)
        print(f"{step.title}: {error or 'done'} ({time.time() - start:.0f} s)", flush=True)
    facts = [("checkpoint", path), ("network", f"{backbone.key}, {backbone.arch}, patches of {backbone.patch_size} pixels"),
             ("trained for", f"{checkpoint['epoch']} epochs" if "epoch" in checkpoint else "unknown"),
             ("images", " ".join(map(str, places_of(images)))), ("made", time.strftime("%Y-%m-%d %H:%M"))]
    target = out / "index.html"
    text = page(f"What {path.parent.name or path} has learned", facts, [part for part in sections if part])
    target.write_text(text, encoding="utf-8", errors="replace")  # as it says itself, whatever the locale
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB; open it in a browser", flush=True)
    if failed:
        raise engine.InputError(f"{len(failed)} parts failed, the page says why: {', '.join(failed)}")


if __name__ == "__main__":
    engine.run(main)
