"""What the analyses share: flags, the network looked at, attention of [CLS], image folders and drawing.

Letters: B images, N patch tokens (h x w cells), D width.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

import engine
import models
from evaluation.common.arguments import int_from
from evaluation.common.backbone import load_evaluated_backbone, read_weights
from evaluation.common.data import ImageSet
from images import CheckedImageFolder, normalize
from listing import name_of
from pictures import font

# ---------------------------------------------------------------- flags and the network

def analysis_parser(description, weights="--pretrained_weights", data="data/imagenet/val"):
    """An `ArgumentParser` with the flags that the analyses of a pre-trained network share.

    `weights` is what the reference calls the flag of the checkpoint, `data` the default folder.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(weights, dest="pretrained_weights", required=True,
                        help="checkpoint (.pth, .safetensors), or the word `random` for an untrained network")
    parser.add_argument("--checkpoint_key", "--checkpoint", help="entry of the checkpoint; by default teacher, or "
                        "state_dict in a file that has no teacher")
    parser.add_argument("--arch", choices=models.ARCHS, help="by default the checkpoint's own, else vit_small")
    parser.add_argument("--patch_size", type=int_from(1), help="by default the checkpoint's own, else 16")
    parser.add_argument("--data_path", default=data, **engine.SEVERAL,
                        help="folder of images, a list of them (.txt), tar shards, or several of these")
    add_run_flags(parser)
    return parser


def add_run_flags(parser, batch_size=32):
    """Flags that say how a script runs, not what it does."""
    parser.add_argument("--batch_size", "--batch_size_per_gpu", type=int_from(1), default=batch_size,
                        help="images per process and batch")
    parser.add_argument("--num_workers", type=int_from(0), default=engine.default_workers(),
                        help="loader workers per process; by default its share of the cores less one, at most 10")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--dist_url", default="env://", help="where the processes meet")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def checkpoint_key(checkpoint, key):
    """The entry to read: `key`, or if it is None teacher, or state_dict where an extracted backbone has only that."""
    return key or ("state_dict" if "state_dict" in checkpoint and "teacher" not in checkpoint else "teacher")


def load_vit(weights, key=None, arch=None, patch_size=None, image_size=None):
    """(EvaluatedBackbone, content of the checkpoint) of a ViT; see `load_evaluated_backbone`.

    Raises InputError also for a Swin, which has no [CLS] token to look at.
    """
    checkpoint = read_weights(weights)
    backbone = load_evaluated_backbone(weights, checkpoint_key(checkpoint, key), arch, patch_size, image_size=image_size,
                                       checkpoint=checkpoint)
    if backbone.arch.startswith("swin"):
        raise engine.InputError(f"checkpoint {weights}: {backbone.arch} has no [CLS] token; this analysis needs a ViT")
    return backbone, checkpoint


def last_block(model, images):
    """Attention of [CLS] to the patches in the last block, [B, heads, N], and the block's output [B, 1 + N, D], not normed.

    The attention is row 0 of `get_last_selfattention` without its first column, so that it sums to less than 1; the other
    rows are not computed. The last block runs once.
    """
    x = model.blocks[:-1](model.prepare_tokens(images))
    block = model.blocks[-1]
    attention, (B, T, _) = block.attn, x.shape
    q, k, _ = attention.qkv(block.norm1(x)).reshape(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)  # [B, heads, 1, T]
    prefix = model.num_prefix_tokens  # [CLS] and registers
    return weights[:, :, 0, prefix:], model.without_registers(block(x))


def cls_attention(model, images):
    """Attention of [CLS] to the patches in the last block: [B, heads, N], see `last_block`."""
    return last_block(model, images)[0]


def mass_mask(weights, mass):
    """The largest of the weights [..., N], all >= 0, that together hold the share `mass` of their sum: bool [..., N].

    Sorted upwards, normalised and cumulated, those beyond 1 - mass are kept: the one that crosses the bound is among them.
    """
    wide = weights if weights.device.type == "mps" else weights.double()  # MPS has no float64
    values, order = wide.sort(dim=-1, stable=True)
    kept = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def check_same_pixels(backbone, other, flag):
    """Raise InputError, naming `flag`, unless two networks take the same images."""
    if backbone.pixel_stats != other.pixel_stats:
        raise engine.InputError(f"{flag}: its images are normalised with {other.pixel_stats}, the others with "
                               f"{backbone.pixel_stats}")


# ---------------------------------------------------------------- images

def image_folder(path, transform=None, labelled=True):
    """The images at `path` as an `ImageSet` of (transform(PIL RGB image), label, index), see `CheckedImageFolder`."""
    folder = CheckedImageFolder(path, labelled=labelled)
    return ImageSet(name_of(path), folder.root, folder.samples, folder.targets, folder.classes, transform)


def squared(height, width, normalize=normalize):
    """PIL image -> normalised float32 [3, height, width]; the aspect is not kept, as in the reference."""
    return v2.Compose([v2.Resize((height, width)), v2.PILToTensor(), normalize])


def centre(size, resize=None, bicubic=False):
    """Shorter side to `resize` pixels (256/224 of `size`), then the centre crop of `size`: PIL image -> PIL image."""
    resize = round(size * 256 / 224) if resize is None else resize
    how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    return v2.Compose([v2.Resize(resize, interpolation=how), v2.CenterCrop(size)])


def output_folder(path, flag):
    """Make the folder `path` and return it as a Path. Raises InputError, naming `flag`, if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise engine.InputError(f"{flag} {path}: cannot be made ({error.strerror})") from error
    return Path(path)


# ---------------------------------------------------------------- drawing

# Every 17th of the 256 colours of matplotlib's maps of these names (CC0); in between they are interpolated.
COLOUR_MAPS = {
    "viridis": "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e "
               "1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725",
    "inferno": "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c "
               "c73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4"}


def heat_map(values, name="viridis"):
    """Values [h, w] to colours uint8 [h, w, 3], from the smallest to the largest of these values."""
    values = np.asarray(values, dtype=np.float64)
    values = (values - values.min()) / max(np.ptp(values), np.finfo(np.float64).tiny)
    anchors = np.array([list(bytes.fromhex(colour)) for colour in COLOUR_MAPS[name].split()])  # [16, 3]
    places = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, places, channel) for channel in anchors.T], axis=-1).round().astype(np.uint8)


def min_max(image):
    """A float image tensor to the range 0..1 by its own smallest and largest value; all 0 if it has one value only."""
    image = image.float() - image.min()
    return image / image.max().clamp(min=torch.finfo(torch.float32).tiny)


def display(image):
    """Normalised image [3, H, W] to a PIL image, its values stretched over the whole range."""
    return Image.fromarray((255 * min_max(image)).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def enlarge(picture, least):
    """A PIL image by a whole factor, with visible pixels, so that its height is at least `least`, or as it is."""
    factor = math.ceil(least / picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def beside(pictures, gap=0, background="white"):
    """PIL images in a row, tops aligned."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas, x = Image.new("RGB", (width, max(p.height for p in pictures)), background), 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    return canvas


def divided(picture, parts):
    """Draw white lines between that many parts of a PIL image of one width, at the right ends of these; returns it."""
    width = picture.width // parts
    for x in range(width, picture.width, width):
        ImageDraw.Draw(picture).rectangle((x - 3, 0, x - 1, picture.height), fill="white")
    return picture


def tag(picture, text):
    """Write `text` into the top left corner of a PIL image, on a dark field; changes and returns it."""
    draw, letters = ImageDraw.Draw(picture), font(max(11, picture.width // 22))
    left, top, right, bottom = draw.textbbox((4, 3), text, font=letters)
    draw.rectangle((0, 0, right + 4, bottom + 4), fill=(20, 20, 20))
    draw.text((4, 3), text, fill="white", font=letters)
    return picture
