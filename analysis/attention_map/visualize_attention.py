"""Self-attention maps (iBOT, Figures 6 and 18): where [CLS] looks in the last block, each head in a colour of its own.

    python analysis/attention_map/visualize_attention.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --data_path data/imagenet/val --show_pics 300 --output_dir pictures
    python analysis/attention_map/visualize_attention.py --pretrained_weights ... --image_path dog.jpg

A picture holds, from left to right, the image, the heads in colour and a heat map of each head. A head colours the patches
that hold most of its attention (`--threshold`), and of several heads at one place the strongest one counts.

Letters: H heads, h x w cells, S x S' pixels.
"""
import colorsys
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

import engine
from analysis import common
from evaluation.common.arguments import int_from
from evaluation.common.protocol import start_process
from images import load_rgb

COLOURS = ((0, 160, 215), (220, 55, 60), (245, 180, 0), (10, 120, 190), (40, 150, 100), (135, 75, 145))
CUT = 0.2  # share of a head's largest attention below which it colours nothing


def get_args_parser():
    parser = common.analysis_parser("Pictures of the self-attention of [CLS] in the last block")
    parser.add_argument("--image_path", help="an image to draw instead of those of --data_path")
    parser.add_argument("--image_size", type=int_from(1), nargs="+", default=[480, 480], help="height and width in pixels "
                        "that images are resized to, or one number for both")
    parser.add_argument("--output_dir", default=".", help="folder of the pictures")
    parser.add_argument("--show_pics", type=int_from(1), default=100, help="images to draw, a random choice")
    parser.add_argument("--threshold", type=float, default=0.6, help="share of a head's attention that is coloured")
    parser.add_argument("--heads", type=int_from(0), nargs="+", help="heads to draw, from 0; by default all")
    return parser


def head_colours(count):
    """`count` colours (R, G, B): the six of the paper's figures, then others of evenly wandering hue."""
    extra = [colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.95) for i in range(count - len(COLOURS))]
    return [*COLOURS, *(tuple(round(255 * part) for part in colour) for colour in extra)][:count]


def overlay(image, attention, threshold=0.6):
    """The heads of one image in colour, on a near black picture of it: uint8 [S, S', 3].

    Args:
        image: float [3, S, S'], of any range. attention: [H, h, w] >= 0, on the same device.

    A head keeps the patches that hold `threshold` of its attention (`mass_mask`). At each place only the head of largest
    attention stays, of equals the first. What stays of a head is stretched to 0..1 and blended with weight sqrt(n) where n
    is above CUT. A head that stays nowhere, or is the same everywhere, colours nothing.
    """
    H, h, w = attention.shape
    values = attention * common.mass_mask(attention.flatten(1), threshold).view(H, h, w)
    winner = values.argmax(dim=0)  # of equals the first
    canvas = (192 + 64 * common.min_max(image)).mean(dim=0) * 0.1  # grey, [S, S']
    canvas = canvas.unsqueeze(-1).repeat(1, 1, 3)
    for head, colour in enumerate(head_colours(H)):
        own = torch.where(winner == head, values[head], 0.0)
        span = own.max() - own.min()
        if span == 0:
            continue
        n = (own - own.min()) / span
        weight = torch.where(n > CUT, n.sqrt(), 0.0)
        weight = weight.repeat_interleave(image.shape[1] // h, 0).repeat_interleave(image.shape[2] // w, 1).unsqueeze(-1)
        canvas = (1 - weight) * canvas + weight * torch.tensor(colour, device=canvas.device)
    return canvas.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def strip(image, attention, threshold=0.6, least=160):
    """Image, coloured heads and heat maps side by side as a PIL image; small images are enlarged to `least` pixels."""
    heats = [Image.fromarray(common.heat_map(weights.cpu().numpy())).resize(image.shape[:0:-1], Image.Resampling.NEAREST)
             for weights in attention]
    panels = [common.display(image), Image.fromarray(overlay(image, attention, threshold)), *heats]
    return common.divided(common.enlarge(common.beside(panels), least), len(panels))


def main():
    args = get_args_parser().parse_args()
    if len(args.image_size) > 2:
        raise engine.InputError(f"--image_size {' '.join(map(str, args.image_size))}: give height and width")
    if not 0 < args.threshold <= 1:
        raise engine.InputError(f"--threshold {args.threshold}: must be above 0 and at most 1")
    process = start_process(args)
    if process.world_size > 1:
        raise engine.InputError("visualize_attention.py runs in one process")
    backbone, _ = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
    model, cell = backbone.model.to(process.device), backbone.patch_size
    height, width = args.image_size[0], args.image_size[-1]
    if height % cell or width % cell:
        raise engine.InputError(f"--image_size {height} {width}: does not divide into patches of {cell} pixels")
    count = model.blocks[-1].attn.num_heads
    heads = args.heads or list(range(count))
    if max(heads) >= count:
        raise engine.InputError(f"--heads {max(heads)}: {backbone.arch} has the heads 0..{count - 1}")
    transform = common.squared(height, width, backbone.normalize)
    folder = common.output_folder(args.output_dir, "--output_dir")

    if args.image_path:
        batches = [(transform(load_rgb(args.image_path))[None], None, None)]
    else:
        images = common.image_folder(args.data_path, transform, labelled=False)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.show_pics].tolist()
        batches = DataLoader(Subset(images, order), args.batch_size, num_workers=args.num_workers)
    written = 0
    for batch, _, indices in batches:
        with torch.inference_mode():
            batch = batch.to(process.device)
            attention = common.cls_attention(model, batch)[:, heads].unflatten(2, (height // cell, width // cell))
        names = ["attn.png"] if indices is None else [f"idx{index}_attn.png" for index in indices.tolist()]
        for name, image, weights in zip(names, batch, attention, strict=True):
            strip(image, weights, args.threshold).save(folder / name)
            written += 1
    print(f"{folder}: {written} pictures; image, {len(heads)} heads in colour, heat maps", flush=True)


if __name__ == "__main__":
    engine.run(main)
