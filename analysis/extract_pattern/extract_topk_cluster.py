"""Pattern layouts (iBOT, Figures 4 and 13 to 17): what the clusters, the outputs of the projection head, stand for.

    python3 -m torch.distributed.launch --nproc_per_node=8 --master_port=${MASTER_PORT:-29500} \\
        analysis/extract_pattern/extract_topk_cluster.py --pretrained_path work_dirs/JOB/checkpoint.pth \\
        --checkpoint teacher --type patch --topk 36 --patch_window 5 --show_pics 20 --arch vit_small \\
        --save_path memory_bank_patch.pth --data_path data/imagenet/val
    torchrun --nproc_per_node 8 analysis/extract_pattern/extract_topk_cluster.py --pretrained_path ... --type cls
    python analysis/extract_pattern/extract_topk_cluster.py --device cpu --pretrained_path ... --save_path patterns

Every patch (`--type patch`) or image (`cls`) belongs to the cluster of its largest output. The clusters with most members
are drawn, each by the members of largest output, at most one patch of an image; patches are tinted amid their neighbours,
and dark places are passed over. Writes into the folder `--save_path`: `memory_TYPE.pth` with what is known of every image,
one picture a cluster, a sheet of all of them, and for `patch` some images explained by their four patches of highest
attention that are of different clusters (Figure 15). If `--save_path` ends in .pth, it is the file of what is known, and
the pictures go to the folder of that name without .pth.

Letters: n images, B of a batch, N patches of an image, D width, T tokens, K clusters.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import engine
from analysis import common
from evaluation.common.arguments import int_from
from evaluation.common.backbone import weights_hash
from evaluation.common.clustering import load_projection_head
from evaluation.common.features import extract_features, sharded_loader
from evaluation.common.protocol import start_process
from pictures import fit, font

BANK_VERSION = 1
BLOCK = 2**26  # most logits at a time: 256 MB
DARK = 40  # mean of HSV's V, of 255, up to which a tile is passed over
TINT = (200, 100, 0, 127)


def get_args_parser():
    parser = common.analysis_parser("Pictures of the clusters that a projection head has learned", "--pretrained_path")
    parser.add_argument("--save_path", required=True, help="folder of the results; or FILE.pth of the memory bank, "
                        "with the pictures in the folder FILE")
    parser.add_argument("--img_size", type=int_from(1), help="side of the crop in pixels; by default that of the "
                        "checkpoint's global crops, else 224")
    parser.add_argument("--patch_window", type=int_from(1), default=5, help="side of a tile in patches; odd")
    parser.add_argument("--out_dim", type=int_from(1), help="number of clusters that the head must have; by default any")
    parser.add_argument("--type", choices=("patch", "cls"), default="patch")
    parser.add_argument("--topk", type=int_from(1), default=196, help="tiles of a picture")
    parser.add_argument("--show_pics", type=int_from(1), default=100, help="clusters to draw")
    parser.add_argument("--confidence", choices=("logit", "probability"), default="logit",
                        help="what members are ranked by; probability: softmax of all outputs")
    parser.add_argument("--temperature", type=float, default=0.1, help="of --confidence probability")
    parser.add_argument("--explain", type=int_from(0), default=4, help="images to explain as in Figure 15 (--type patch)")
    parser.add_argument("--chunks", type=int_from(1), help="no effect: counting takes no memory here")
    return parser


# ---------------------------------------------------------------- memory bank

def strongest(head, tokens, temperature=None, block=BLOCK):
    """Confidence in the cluster of each token, and the cluster: tokens [T, D] to float32 [T, 2].

    The confidence is the largest output of `head`, a cosine as long as its prototypes have length 1, or with a temperature
    the largest probability. Logits exist for `block` numbers at a time.
    """
    z, found = head.bottleneck(tokens), []
    for part in z.split(max(1, block // len(head.last_layer.weight_v))):
        logits = head.last_layer(part)  # [t, K]
        confidence, cluster = logits.max(dim=1)
        if temperature is not None:
            confidence = (confidence / temperature - (logits / temperature).logsumexp(dim=1)).exp()
        found.append(torch.stack((confidence, cluster.float()), dim=1))
    return torch.cat(found)


def fill_bank(model, head, images, kind, temperature, batch_size, num_workers, process):
    """Confidence and cluster of every patch, float32 [n, N, 2], or of every [CLS], [n, 2]; on rank 0, None elsewhere."""
    model, head = model.to(process.device), head.to(process.device)

    def of_batch(batch):
        tokens = model(batch, return_all_tokens=True)
        tokens = tokens[:, 1:] if kind == "patch" else tokens[:, :1]
        return strongest(head, tokens.flatten(0, 1), temperature).view(len(batch), -1)  # [B, N * 2]

    bank, _ = extract_features(of_batch, sharded_loader(images, batch_size, num_workers, process), process, images.name)
    return bank if bank is None or kind == "cls" else bank.unflatten(1, (-1, 2))


def cluster_counts(bank, K):
    """Members of each of the K clusters, images or patches: float32 [K]."""
    return torch.bincount(bank[..., 1].flatten().long(), minlength=K).float()


def kept_bank(path, key):
    """The bank of a file that was made with `key`, else None and why."""
    if not path.is_file():
        return None, f"none kept as {path}"
    content = engine.load_checkpoint(path)
    kept, bank = content.get("key"), content.get("memory_bank")
    if not isinstance(kept, dict) or not torch.is_tensor(bank):
        raise engine.InputError(f"{path}: no memory bank of this project; move it away")
    differ = [name for name in key if kept.get(name) != key[name]]
    if differ:
        return None, f"the one in {path} was made with other {', '.join(differ)}"
    return bank, f"read from {path}"


# ---------------------------------------------------------------- choice

def largest_clusters(counts, amount):
    """Up to `amount` clusters with most members, of equals the first: list of their numbers; empty ones are left out."""
    order = counts.argsort(descending=True, stable=True)[:amount]
    return order[counts[order] > 0].tolist()


def best_members(bank, cluster, amount):
    """Up to `amount` members of a cluster by falling confidence: list of (image, patch); patch is 0 in a [CLS] bank.

    Of the patches of an image only the best one counts.
    """
    confidence, clusters = (bank[..., i].view(len(bank), -1) for i in (0, 1))  # [n, N]
    best, patch = confidence.masked_fill(clusters != cluster, -torch.inf).max(dim=1)
    order = best.argsort(descending=True, stable=True)[:amount]
    order = order[best[order] > -torch.inf]
    return list(zip(order.tolist(), patch[order].tolist(), strict=True))


def distinct_patches(attention, clusters, amount=4):
    """The `amount` patches of highest attention [N] that are of different clusters [N]: list of numbers."""
    chosen, seen = [], set()
    for patch in attention.argsort(descending=True, stable=True).tolist():
        if clusters[patch].item() not in seen and len(chosen) < amount:
            chosen.append(patch)
            seen.add(clusters[patch].item())
    return chosen


# ---------------------------------------------------------------- drawing

def patch_tile(image, patch, patch_size, window):
    """The patch number `patch` of a PIL image amid its neighbours, black beyond the edges, before the tint."""
    row, column = divmod(patch, image.width // patch_size)
    half = window // 2
    box = [patch_size * cell for cell in (column - half, row - half, column + half + 1, row + half + 1)]
    return image.crop(box)


def is_dark(tile):
    """Whether a tile shows nothing: the mean of V in HSV is at most DARK."""
    return bool(np.asarray(tile.convert("HSV"))[..., 2].mean() <= DARK)


def tinted(tile, patch_size, window):
    """The tile with its central patch tinted, and a row and a column of pixels beyond it; all as it is in a window of 1."""
    if window == 1:
        return tile
    start = window // 2 * patch_size
    layer = Image.new("RGBA", tile.size)
    ImageDraw.Draw(layer).rectangle((start, start, start + patch_size, start + patch_size), fill=TINT)
    return Image.alpha_composite(tile.convert("RGBA"), layer).convert("RGB")


def layout(tiles, topk, side):
    """Tiles in rows on a black square with room for `topk` of them."""
    columns = math.isqrt(topk - 1) + 1
    canvas = Image.new("RGB", (columns * side, columns * side))
    for number, tile in enumerate(tiles):
        canvas.paste(tile, (number % columns * side, number // columns * side))
    return canvas


def cluster_tiles(bank, cluster, images, kind, topk, patch_size, window):
    """Up to `topk` tiles of a cluster, best first. `images`: `ImageSet` of PIL crops. Dark tiles make room for reserves."""
    if kind == "cls":
        return [images[index][0] for index, _ in best_members(bank, cluster, topk)]
    tiles = []
    for index, patch in best_members(bank, cluster, 2 * topk):
        if len(tiles) == topk:
            break
        tile = patch_tile(images[index][0], patch, patch_size, window)
        if not is_dark(tile):
            tiles.append(tinted(tile, patch_size, window))
    return tiles


def contact_sheet(tiles, columns, side):
    """Tiles in rows on white, each fitted to `side` pixels less a gap of 2; as high as they need."""
    canvas = Image.new("RGB", (columns * side, max(1, math.ceil(len(tiles) / columns)) * side), "white")
    for number, tile in enumerate(tiles):
        canvas.paste(fit(tile, side - 2), (number % columns * side, number // columns * side))
    return canvas


def overview(shown, captions, columns=4, side=48):
    """One sheet of all clusters: of each the caption and its first columns x columns tiles."""
    gap, head = 12, 18
    across = math.ceil(math.sqrt(1.5 * len(shown)))
    sheets = [contact_sheet(tiles[:columns**2], columns, side) for tiles in shown]
    rows = [range(first, min(first + across, len(shown))) for first in range(0, len(shown), across)]
    heights = [head + gap + max(sheets[i].height for i in row) for row in rows]
    canvas = Image.new("RGB", (gap + across * (columns * side + gap), gap + sum(heights)), "white")
    draw, letters, y = ImageDraw.Draw(canvas), font(12), gap
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            x = gap + place * (columns * side + gap)
            draw.text((x, y), captions[i], fill="black", font=letters)
            canvas.paste(sheets[i], (x, y + head))
        y += height
    return canvas


def explanation(image, patches, clusters, tiles, patch_size, side=360):
    """Figure 15: an image with its chosen patches numbered, and beside it the first tiles of the cluster of each."""
    scale = side / image.width
    picture = fit(image, side)
    draw, letters = ImageDraw.Draw(picture), font(max(12, round(0.3 * scale * patch_size)))
    for number, patch in enumerate(patches):
        row, column = divmod(patch, image.width // patch_size)
        box = [scale * patch_size * cell for cell in (column, row, column + 1, row + 1)]
        draw.rectangle(box, outline=TINT[:3], width=3)
        draw.text((box[0] + 5, box[1] + 3), str(number), fill="white", font=letters, stroke_width=2, stroke_fill="black")
    panels = []
    for number, (cluster, members) in enumerate(zip(clusters, tiles, strict=True)):
        columns = min(6, math.isqrt(max(1, len(members)) - 1) + 1)
        panels.append(common.tag(contact_sheet(members[:36], columns, side // columns), f"{number}: cluster {cluster}"))
    return common.beside([picture, *panels], gap=6)


# ---------------------------------------------------------------- the script

def draw_all(args, backbone, bank, counts, images, folder, process):
    """Write the pictures of the largest clusters, their sheet and the explained images."""
    side = args.patch_window * backbone.patch_size if args.type == "patch" else backbone.image_size
    chosen = largest_clusters(counts, args.show_pics)

    def tiles_of(cluster, topk):
        return cluster_tiles(bank, cluster, images, args.type, topk, backbone.patch_size, args.patch_window)

    shown = []
    for rank, cluster in enumerate(chosen):
        tiles = tiles_of(cluster, args.topk)
        layout(tiles, args.topk, side).save(folder / f"c{args.type}_crank{rank}_cid{cluster}_top{args.topk}.jpg")
        shown.append(tiles[:16])
    what = "patches" if args.type == "patch" else "images"
    captions = [f"{rank}: cluster {c}, {int(counts[c])} {what}" for rank, c in enumerate(chosen)]
    overview(shown, captions).save(folder / f"c{args.type}_overview.png")
    print(f"{folder}: {len(chosen)} clusters of {int((counts > 0).sum())} that have members, of {len(counts)}", flush=True)
    if args.type == "cls":
        return
    model = backbone.model.to(process.device)
    for index in np.linspace(0, len(images) - 1, min(args.explain, len(images))).round().astype(int).tolist():
        image = images[index][0]
        with torch.inference_mode():
            pixels = v2.functional.pil_to_tensor(image)[None].to(process.device)
            attention = common.cls_attention(model, backbone.normalize(pixels))
        patches = distinct_patches(attention[0].mean(dim=0).cpu(), bank[index, :, 1])
        clusters = [int(bank[index, patch, 1]) for patch in patches]
        members = [tiles_of(cluster, 36) for cluster in clusters]
        explanation(image, patches, clusters, members, backbone.patch_size).save(folder / f"explained_idx{index}.png")


def main():
    args = get_args_parser().parse_args()
    if args.patch_window % 2 == 0:
        raise engine.InputError(f"--patch_window {args.patch_window}: must be odd, so that a patch is in the middle")
    if not 0 < args.temperature < math.inf:
        raise engine.InputError(f"--temperature {args.temperature}: must be above 0")
    if args.pretrained_weights == "random":
        raise engine.InputError("--pretrained_path random: clusters need the projection head of a checkpoint")
    process = start_process(args)
    path = Path(args.save_path)
    is_file = path.suffix == ".pth" and not path.is_dir()  # for the reference, FILE.pth must be a folder
    folder = common.output_folder(path.with_suffix("") if is_file else path, "--save_path")
    bank_file = path if is_file else folder / f"memory_{args.type}.pth"

    backbone, checkpoint = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size,
                                           args.img_size)
    head = load_projection_head(checkpoint, backbone.key, args.pretrained_weights, patches=args.type == "patch")
    K, size = len(head.last_layer.weight_v), backbone.image_size
    if args.out_dim not in (None, K):
        raise engine.InputError(f"--out_dim {args.out_dim}: the head of {backbone.key} has {K} outputs")
    crop = common.centre(size)
    images = common.image_folder(args.data_path, v2.Compose([crop, v2.PILToTensor(), backbone.normalize]), labelled=False)

    # ============ memory bank ============
    temperature = args.temperature if args.confidence == "probability" else None
    bank = None
    if process.rank == 0:
        key = {"version": BANK_VERSION, "type": args.type, "weights": backbone.weights_hash, "head": weights_hash(head),
               "images": images.fingerprint(), "count": len(images), "arch": backbone.arch,
               "patch size": backbone.patch_size, "image size": size, "temperature": temperature,
               **backbone.pixel_stats.as_settings()}
        bank, reason = kept_bank(bank_file, key)
        print(f"memory bank: {reason}", flush=True)
    if not engine.host_reduce(int(bank is not None)):
        bank = fill_bank(backbone.model, head, images, args.type, temperature, args.batch_size, args.num_workers, process)
        if process.rank == 0:
            try:
                engine.save_atomically({"memory_bank": bank, "num_per_cluster": cluster_counts(bank, K), "key": key},
                                      bank_file)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
                raise engine.InputError(f"--save_path {bank_file}: cannot be written ({error})") from error
    if process.rank == 0:
        draw_all(args, backbone, bank, cluster_counts(bank, K), images.with_transform(crop), folder, process)


if __name__ == "__main__":
    engine.run(main)
