"""Sparse correspondence (iBOT, Figure 19): patches of two views that a network takes for the same.

    python analysis/correspondence/visualize_correspondence.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --data_path data/imagenet/val --sample_type instance --output_path pictures
    python analysis/correspondence/visualize_correspondence.py --pretrained_weights ... --sample_type class
    python analysis/correspondence/visualize_correspondence.py --pretrained_weights ... --sample_type instance \\
        --show_pics false  # the accuracy over all images, no pictures

Each patch of the first view is matched to the patch of the second that its token has the largest product with. Those
matches are drawn whose patches [CLS] attends to most: that of the network itself, as in the paper, or of another one
(`--attention_from`; the authors' code takes DINO's ViT-B/8). `instance` pairs two random views of an image, for which the
right matches are known; `class` pairs images of one class.

Letters: N = n x n patches, D width, S side of a view in pixels.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import RandomResizedCrop, v2

import engine
from analysis import common
from evaluation.common.arguments import int_from, probability
from evaluation.common.protocol import start_process
from images import normalize

COLOUR = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2)])


def get_args_parser():
    parser = common.analysis_parser("Matches between the patches of two views")
    parser.set_defaults(batch_size=2)
    parser.add_argument("--img_size", type=int_from(1), help="side of a view in pixels; by default that of the "
                        "checkpoint's global crops, else 224")
    parser.add_argument("--output_path", default="pics", help="folder of the pictures")
    parser.add_argument("--topk", type=int_from(1), default=12, help="matches to draw")
    parser.add_argument("--show_pics", type=engine.bool_flag, default=True, help="draw, and stop after --show_nums; false: "
                        "go through all images for the accuracy alone")
    parser.add_argument("--show_with_attn", type=engine.bool_flag, default=False, help="draw the attention on the left")
    parser.add_argument("--show_nums", type=int_from(1), default=100, help="pictures")
    parser.add_argument("--sample_type", choices=("class", "instance"), default="class")
    parser.add_argument("--eval_radius", type=int_from(0), default=0, help="patches that a match may be off")
    parser.add_argument("--attention_from", default="self", metavar="FILE", help="checkpoint of the ViT whose attention "
                        "ranks the matches; self: the network itself")
    parser.add_argument("--attention_arch", help="arch of --attention_from, if its file does not say")
    parser.add_argument("--attention_patch_size", type=int_from(1), help="patch size of --attention_from, if its file does "
                        "not say")
    parser.add_argument("--hflip", type=probability, default=0.5, metavar="P",
                        help="probability that a view of --sample_type instance is flipped")
    parser.add_argument("--seed", type=int_from(0), default=1)
    return parser


# ---------------------------------------------------------------- pairs

class TwoViews(Dataset):
    """Two random views of each image: (view [3, S, S], centres [2, n]) twice, label, index.

    Views are random crops of 0.4 to 1 of the area, flipped and coloured at random. Centres are those of the rows and of the
    columns of patches, as shares of the image's height and width; those of a flipped view fall. The draws are a function of
    (seed, index).
    """

    def __init__(self, images, size, patch_size, seed, hflip=0.5, normalize=normalize):
        self.images, self.size, self.cells, self.seed = images.with_transform(v2.Identity()), size, size // patch_size, seed
        self.hflip, self.normalize = hflip, normalize

    def __len__(self):
        return len(self.images)

    def view(self, image):
        box = RandomResizedCrop.get_params(image, (0.4, 1), (3 / 4, 4 / 3))  # top, left, height, width
        flip = bool(torch.rand(()) < self.hflip)
        crop = v2.functional.resized_crop(image, *box, [self.size] * 2, v2.InterpolationMode.BICUBIC)
        crop = v2.functional.horizontal_flip(crop) if flip else crop
        return self.normalize(v2.functional.pil_to_tensor(COLOUR(crop))), patch_centres(image.size, box, flip, self.cells)

    def __getitem__(self, index):
        image, label, _ = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0]))
            return *self.view(image), *self.view(image), label, index


def patch_centres(size, box, flip, cells):
    """Centres of the rows and columns of patches of a crop, as shares of the image: float64 [2, cells].

    `size`: width and height of the image; `box`: top, left, height and width of the crop, in pixels.
    """
    (width, height), (top, left, h, w) = size, box
    steps = (2 * torch.arange(cells, dtype=torch.float64) + 1) / (2 * cells)
    return torch.stack(((top + steps * h) / height, (left + (steps.flip(0) if flip else steps) * w) / width))


def class_pairs(labels, batch_size, seed):
    """Pairs of places of images of one class: list of (first, second).

    In a class each `batch_size` images in turn form a batch, incomplete ones are left out, and each image is paired with
    the one before it in its batch, as in the reference; the batches are shuffled.
    """
    batches = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        batches += [places[i:i + batch_size].tolist() for i in range(0, len(places) - batch_size + 1, batch_size)]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(batches[i][k], batches[i][k - 1]) for i in order for k in range(batch_size)]


# ---------------------------------------------------------------- matches

def match(x1, x2):
    """The patch of the second view for each of the first: tokens [N, D] twice to int64 [N]. Tokens are not normalised."""
    return (x1 @ x2.T).argmax(dim=1)


def overlapping(centres1, centres2, margin):
    """Patches of the first view inside the range of the second view's centres, widened by `margin`: bool [N]."""
    inside = [(one + margin > two.min()) & (one - margin < two.max()) for one, two in zip(centres1, centres2, strict=True)]
    return (inside[0][:, None] & inside[1][None]).flatten()


def true_matches(centres1, centres2):
    """The patch of the second view whose centre is nearest to that of each patch of the first: int64 [N]."""
    row, column = ((one[:, None] - two[None]).abs().argmin(dim=1) for one, two in zip(centres1, centres2, strict=True))
    return (row[:, None] * centres2.shape[1] + column[None]).flatten()


def matching_accuracy(found, true, overlap, cells, radius=0):
    """(right, all) of the overlapping patches: right if row and column are at most `radius` off."""
    off = torch.maximum((found // cells - true // cells).abs(), (found % cells - true % cells).abs())
    return int(((off <= radius) & overlap).sum()), int(overlap.sum())


def saliency(attention, cells):
    """Mean attention of the heads [H, N'] on a grid of cells x cells: [N]; a finer grid gives every so many-th value."""
    grid = attention.mean(dim=0)
    side = round(len(grid) ** 0.5)
    return F.interpolate(grid.view(1, 1, side, side), size=(cells, cells), mode="nearest").flatten()


def drawn_matches(salience, allowed, topk):
    """Up to `topk` allowed patches [N] of largest salience, best first: list of numbers."""
    order = salience.masked_fill(~allowed, -1).argsort(descending=True, stable=True)[:topk]
    return order[allowed[order]].tolist()


def draw_pair(views, pairs, patch_size, salience=None):
    """Two views side by side, a red line with yellow ends for each pair of patches; on the left the salience, if given."""
    size = views[0].shape[-1]
    factor = -(-224 // size)  # small views are enlarged
    canvas = common.divided(common.enlarge(common.beside([common.display(view) for view in views]), 224), 2)
    draw, cells, lines = ImageDraw.Draw(canvas), size // patch_size, []
    for one, two in pairs:
        ends = [((patch % cells + 0.5) * patch_size + shift, (patch // cells + 0.5) * patch_size)
                for patch, shift in ((one, 0), (two, size))]
        lines.append([(factor * x, factor * y) for x, y in ends])
    for x, y in {end for line in lines for end in line}:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 220, 0))
    for line in lines:
        draw.line(line, fill=(255, 0, 0), width=max(1, canvas.height // 224))
    if salience is None:
        return canvas
    heat = Image.fromarray(common.heat_map(salience.view(cells, cells).cpu().numpy()))
    return common.beside([heat.resize((canvas.height,) * 2, Image.Resampling.NEAREST), canvas])


# ---------------------------------------------------------------- the script

def pairs_of(args, images, backbone):
    """Batches of pairs: views [B, 3, S, S] twice, centres [B, 2, n] twice (None for images of a class), labels [B]."""
    if args.sample_type == "instance":
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed)).tolist()
        views = TwoViews(images, backbone.image_size, backbone.patch_size, args.seed, args.hflip, backbone.normalize)
        views = DataLoader(Subset(views, order), args.batch_size, num_workers=args.num_workers)
        for first, centres1, second, centres2, labels, _ in views:
            yield first, second, centres1, centres2, labels
        return
    pairs = class_pairs(images.targets, max(args.batch_size, 2), args.seed)
    if not pairs:
        raise engine.InputError(f"--data_path {args.data_path}: no class has {max(args.batch_size, 2)} images")
    for one, two in pairs:
        yield images[one][0][None], images[two][0][None], None, None, torch.from_numpy(images.targets[[one]])


def main():
    args = get_args_parser().parse_args()
    process, instance = start_process(args), args.sample_type == "instance"
    if process.world_size > 1:
        raise engine.InputError("visualize_correspondence.py runs in one process")
    if not instance and not args.show_pics:
        raise engine.InputError("--show_pics false: there is no accuracy of --sample_type class")
    backbone, _ = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.img_size)
    model, size, cell = backbone.model.to(process.device), backbone.image_size, backbone.patch_size
    cells, judge = size // cell, model
    if args.attention_from != "self":
        judge = common.load_vit(args.attention_from, None, args.attention_arch, args.attention_patch_size, size)[0]
        common.check_same_pixels(backbone, judge, "--attention_from")
        judge = judge.model.to(process.device)
    images = common.image_folder(args.data_path, common.squared(size, size, backbone.normalize), labelled=False)
    folder = common.output_folder(args.output_path, "--output_path") if args.show_pics else None

    drawn, counts = 0, []  # of each batch: right matches, overlapping patches
    for first, second, centres1, centres2, labels in pairs_of(args, images, backbone):
        with torch.inference_mode():
            tokens = [model(view.to(process.device), return_all_tokens=True)[:, 1:] for view in (first, second)]
            attention = common.cls_attention(judge, first.to(process.device)).cpu()
        counts.append([0, 0])
        for k, label in enumerate(labels.tolist()):
            found, allowed = match(tokens[0][k], tokens[1][k]).cpu(), torch.ones(cells**2, dtype=torch.bool)
            if instance:
                # In shares of the image, although it is half a patch of the view: the reference's rule.
                allowed = overlapping(centres1[k], centres2[k], cell // 2 / size)
                true = true_matches(centres1[k], centres2[k])
                hits = matching_accuracy(found, true, allowed, cells, args.eval_radius)
                counts[-1] = [before + more for before, more in zip(counts[-1], hits, strict=True)]
            if args.show_pics and drawn < args.show_nums:
                salience = saliency(attention[k], cells)
                lines = [(patch, int(found[patch])) for patch in drawn_matches(salience, allowed, args.topk)]
                picture = draw_pair((first[k], second[k]), lines, cell, salience if args.show_with_attn else None)
                picture.save(folder / f"{args.sample_type}_corresp{drawn}_cls{label}_nh0.png")
                drawn += 1
        if args.show_pics and drawn == args.show_nums:
            break
    if folder:
        print(f"{folder}: {drawn} pictures", flush=True)
    if instance:
        print(accuracy_text(counts, args.eval_radius), flush=True)


def accuracy_text(counts, radius):
    """A line with the matching accuracy, from (right, all) of each batch; batches without overlap do not count."""
    ratios = [right / total for right, total in counts if total]
    if not ratios:
        return "matching accuracy: none, no two views overlap"
    right, total = (sum(column) for column in zip(*counts, strict=True))
    return (f"matching accuracy {sum(ratios) / len(ratios):.4f} (mean over {len(ratios)} batches; over patches "
            f"{right / total:.4f} of {total}; radius {radius})")


if __name__ == "__main__":
    engine.run(main)
