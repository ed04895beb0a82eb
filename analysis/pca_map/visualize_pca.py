"""Maps of patch features: their first three principal components as red, green and blue, one basis for all images.

    python analysis/pca_map/visualize_pca.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --data_path data/imagenet/val --show_pics 12 --output_dir pictures

Writes one picture, OUTPUT_DIR/pca.png: each image above its map. Patches of one colour have features alike, also in
different images; a colour as such means nothing.

Letters: n images, h x w cells, D width, T tokens of all images, C components.
"""
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
from images import denormalize

COLUMNS, TILE, GAP = 6, 192, 8  # images in a row; pixels, a tile at most
CLIPPED = 0.01  # share of the tokens that a colour is saturated by, at either end


def get_args_parser():
    parser = common.analysis_parser("Principal components of patch features as colours")
    parser.add_argument("--image_size", type=int_from(1), help="side in pixels that images are resized to; by default "
                        "twice that of the checkpoint's global crops, for maps of more cells")
    parser.add_argument("--output_dir", default=".", help="folder of the picture")
    parser.add_argument("--show_pics", type=int_from(1), default=12, help="images to draw, a random choice")
    return parser


def principal_components(tokens, count=3):
    """PCA of tokens [T, D] in float64 on the CPU: their mean [D], a basis [D, C] and its shares of the variance [C].

    The largest variance comes first. Of either sign, a component has the one with which its largest entry is positive, so
    that the same features always have the same colours.
    """
    tokens = tokens.double().cpu()
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred)  # rising
    basis, variances = vectors[:, -count:].flip(1), variances.flip(0).clamp(min=0)
    signs = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()  # [1, C]
    return mean, basis * signs, variances[:count] / variances.sum()


def colours(values, clipped=CLIPPED):
    """Components [T, 3] as uint8 [T, 3], each stretched over what it takes between two quantiles of all T tokens."""
    low, high = values.quantile(torch.tensor([clipped, 1 - clipped], dtype=values.dtype), dim=0)
    values = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return (255 * values.clamp(0, 1)).round().to(torch.uint8)


def sheet(images, maps):
    """PIL picture of images uint8 [n, 3, S, S] above their maps uint8 [n, h, h, 3], in rows of COLUMNS."""
    cells = maps.shape[1]
    side = cells * max(1, TILE // cells)  # all cells of one size
    step, rows = side + GAP, -(-len(images) // COLUMNS)
    canvas = Image.new("RGB", (step * min(len(images), COLUMNS) - GAP, rows * (2 * step + GAP) - 2 * GAP), "white")
    for i, (image, colour) in enumerate(zip(images, maps, strict=True)):
        x, y = step * (i % COLUMNS), (2 * step + GAP) * (i // COLUMNS)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        canvas.paste(Image.fromarray(colour.numpy()).resize((side, side), Image.Resampling.NEAREST), (x, y + step))
    return canvas


def main():
    args = get_args_parser().parse_args()
    process = start_process(args)
    if process.world_size > 1:
        raise engine.InputError("visualize_pca.py runs in one process")
    backbone, _ = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size)
    model, side = backbone.model.to(process.device), args.image_size or 2 * backbone.image_size
    folder = common.output_folder(args.output_dir, "--output_dir")
    images = common.image_folder(args.data_path, common.squared(side, side, backbone.normalize))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.show_pics].tolist()
    shown, tokens = [], []
    for batch, *_ in DataLoader(Subset(images, order), args.batch_size, num_workers=args.num_workers):
        with torch.inference_mode():
            shown.append(denormalize(batch, backbone.pixel_stats))
            tokens.append(model.get_intermediate_layers(batch.to(process.device))[0][:, 1:].cpu())  # [B, N, D]
    shown, tokens = torch.cat(shown), torch.cat(tokens)
    flat = tokens.flatten(0, 1)  # [T, D]
    mean, basis, shares = principal_components(flat)
    cells = side // backbone.patch_size
    maps = colours((flat.double() - mean) @ basis).view(len(shown), cells, cells, 3)
    sheet(shown, maps).save(folder / "pca.png")
    percent = ", ".join(f"{100 * share:.1f}" for share in shares.tolist())
    print(f"the components hold {percent} % of the variance of {len(flat)} patches", flush=True)
    print(f"{folder / 'pca.png'}: {len(shown)} images", flush=True)


if __name__ == "__main__":
    engine.run(main)
