"""CPU time of the data loader for an image, against the reference's pipeline of PIL operations.

    python benchmarks/data_loader.py                   # 2 x 224 + 10 x 96 from JPEGs of about 500 x 375
    python benchmarks/data_loader.py --images 200 --batches 60 --shards             # also from tar shards
    python benchmarks/data_loader.py --write FOLDER --images 2000   # only the JPEGs
    python benchmarks/data_loader.py --moments 2500 --sizes 64 32   # whether both paths give the same crops

One process, one thread; the paths alternate batch by batch, so that all meet the same noise, and the ratios are
those of the medians. Time is CPU time from the file to the collated batch, as a worker of a DataLoader spends it.
The JPEGs are crops of scikit-learn's two photographs, resized and mirrored, quality 90.
"""
import argparse
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch.utils.data import Dataset, default_collate
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augmentation
import engine
import loader
from images import IMAGENET_MEAN, IMAGENET_STD, load_rgb

PRED_RATIO, PRED_RATIO_VAR = (0, 0.3), (0, 0.2)


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=64, type=int, help="different JPEGs")
    parser.add_argument("--batch", default=16, type=int, help="images a batch")
    parser.add_argument("--batches", default=24, type=int, help="timed batches of each path")
    parser.add_argument("--local_crops_number", default=10, type=int)
    parser.add_argument("--device_batch", default=64, type=int, help="images a batch of the photometry on the device")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="of that photometry")
    parser.add_argument("--write", default=None, type=Path, metavar="FOLDER", help="write the JPEGs there and end")
    parser.add_argument("--moments", default=0, type=int, metavar="SAMPLES", help="only compare the moments of crops, four "
                        "of each sample, between the two paths, for each preset of the augmentation")
    parser.add_argument("--sizes", default=[224, 96], type=int, nargs=2, help="of global and local crops of --moments")
    parser.add_argument("--shards", action="store_true", help="also read the images from tar shards (loader.py pack)")
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


def write_photographs(folder, count, seed):
    """`count` JPEGs of 500 x 375 or 375 x 500 pixels in one class folder."""
    rng = random.Random(seed)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]  # 640 x 427
    (folder / "photographs").mkdir(parents=True)
    for index in range(count):
        photograph = photographs[index % 2]
        size = (500, 375) if rng.random() < 0.75 else (375, 500)
        scale = rng.uniform(0.6, 1) * min(photograph.width / size[0], photograph.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        image = photograph.resize(size, Image.BICUBIC, box=(left, top, left + width, top + height))
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        image.save(folder / "photographs" / f"{index:04}.jpg", quality=90)


# ---------------------------------------------------------------- the reference's pipeline, plainly

class Blur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image


def plain_crop(size, scale, blur_p, solarize_p):
    """One crop's chain of PIL operations."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        Blur(blur_p),
        Solarize(solarize_p),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])


def plain_ratio():
    return random.choice([r + v * random.uniform(-1, 1) for r, v in zip(PRED_RATIO, PRED_RATIO_VAR, strict=True)])


def plain_mask(height, width, ratio, rng=random, aspect=(0.3, 1 / 0.3)):
    """The words of BEiT's algorithm for block-wise masks, with the interpreter's generator."""
    mask, count, target = np.zeros((height, width), dtype=bool), 0, ratio * height * width
    while count < target:
        for _ in range(10):
            area = rng.uniform((min(height, width) // 3) ** 2, target - count)
            a = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * a)), round(math.sqrt(area / a))
            if h >= height or w >= width:
                continue
            y, x = rng.randint(0, height - h), rng.randint(0, width - w)
            new = h * w - np.count_nonzero(mask[y:y + h, x:x + w])
            if 0 < new <= target - count:
                mask[y:y + h, x:x + w] = True
                count += new
                break
        else:
            break
    return mask


class PlainFolder(Dataset):
    """(crops, label, masks) of an image: a list of float tensors and a mask for every crop, local ones included."""

    def __init__(self, root, local_crops_number):
        self.folder = torchvision.datasets.ImageFolder(root)
        self.crops = [plain_crop(224, (0.14, 1.0), 1.0, 0.0), plain_crop(224, (0.14, 1.0), 0.1, 0.2)]
        self.crops += [plain_crop(96, (0.05, 0.4), 0.5, 0.0)] * local_crops_number

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        image, label = self.folder[index]
        crops = [crop(image) for crop in self.crops]
        return crops, label, [plain_mask(crop.shape[1] // 16, crop.shape[2] // 16, plain_ratio()) for crop in crops]


# ---------------------------------------------------------------- moments of both paths

def crop_moments(preset, images, count, sizes=(224, 96), seed=0):
    """Moments of single crops of both paths with a preset of the augmentation.

    `count` samples of 2 global and 2 local crops of `sizes` pixels are made of PIL `images` in turn, by each path from
    draws of its own. Returns {kind of crop: (device, worker)}, float32 [count, 14] each: mean and spread of the channels,
    mean difference of neighbours to the right and downwards, whether grey, whether dark throughout, red and green of the
    left half less the right one, of the top less the bottom.
    """
    def moments(crops):
        x = crops.float()  # [n, 3, S, S]
        half = x.shape[-1] // 2
        return torch.cat([
            x.mean((2, 3)), x.std((2, 3)), x.diff(dim=3).abs().mean((1, 2, 3), keepdim=True)[:, 0, 0],
            x.diff(dim=2).abs().mean((1, 2, 3), keepdim=True)[:, 0, 0],
            ((x.amax(1) - x.amin(1)).amax((1, 2)) <= 1).float()[:, None], (x.amax((1, 2, 3)) < 128).float()[:, None],
            x[..., :half].mean((2, 3))[:, :2] - x[..., half:].mean((2, 3))[:, :2],
            x[:, :2, :half].mean((2, 3)) - x[:, :2, half:].mean((2, 3))], dim=1)

    worker, device = (loader.MultiCropAugmentation(
        local_crops_number=2, global_crops_size=sizes[0], local_crops_size=sizes[1], photometry=where,
        augment=augmentation.AUGMENT_PRESETS[preset]) for where in ("cpu", "device"))
    torch.manual_seed(seed)
    found = {name: ([], []) for name in ("first global", "other global", "local", "second local")}
    for first in range(0, count, 100):
        batch = [images[i % len(images)] for i in range(first, min(first + 100, count))]
        crops, rows = zip(*map(device, batch), strict=True)
        ours = [loader.apply_photometry(torch.stack(x), torch.stack(r))
                for x, r in zip(zip(*crops, strict=True), zip(*rows, strict=True), strict=True)]
        theirs = [torch.stack(x) for x in zip(*map(worker, batch), strict=True)]
        for parts, *pair in zip(found.values(), ours, theirs, strict=True):
            for part, x in zip(parts, pair, strict=True):
                part.append(moments(x))
    return {name: tuple(map(torch.cat, parts)) for name, parts in found.items()}


def print_moments(images, samples, sizes, seed):
    """The largest difference between the paths for each preset, in standard errors and as a share of the spread."""
    print(f"\nmoments of {4 * samples} crops by each path, {sizes[0]} and {sizes[1]} pixels: largest difference of means")
    print(f"{'':24}{'standard errors':>18}{'standard deviations':>22}")
    for preset in augmentation.AUGMENT_PRESETS:
        worst = [0.0, 0.0]
        for ours, theirs in crop_moments(preset, images, samples, sizes, seed).values():
            spread = ((ours.var(0) + theirs.var(0)) / 2).sqrt()
            difference = torch.where(spread > 0, (ours.mean(0) - theirs.mean(0)).abs() / spread, 0).max().item()
            worst = [max(worst[0], difference * (samples / 2) ** 0.5), max(worst[1], difference)]
        print(f"{preset:24}{worst[0]:18.2f}{worst[1]:22.4f}", flush=True)


# ---------------------------------------------------------------- measurements

def processor_name():
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def our_folder(root, local_crops_number, photometry, seed):
    return loader.ImageFolderMask(
        root, loader.MultiCropAugmentation(local_crops_number=local_crops_number, photometry=photometry), patch_size=16,
        pred_ratio=PRED_RATIO, pred_ratio_var=PRED_RATIO_VAR, seed=seed)


def compare(paths, batch, batches):
    """{name: (dataset, collate)} -> {name: CPU milliseconds an image, of each timed batch}."""
    times = {name: [] for name in paths}
    for step in range(batches + 2):
        for name, (dataset, collate) in paths.items():
            start = time.process_time()
            collate([dataset[index % len(dataset)] for index in range(step * batch, (step + 1) * batch)])
            if step >= 2:  # warm-up
                times[name].append(1000 * (time.process_time() - start) / batch)
    return times


def stages(dataset, batch, batches):
    """Median CPU milliseconds an image of the parts of our pipeline, each called by itself: {name: milliseconds}."""
    augmentation, times = dataset.transform, {}
    rng = np.random.default_rng(0)

    def timed(name, function, *values, images=1):
        start = time.process_time()
        result = function(*values)
        times.setdefault(name, []).append(1000 * (time.process_time() - start) / images)
        return result

    for step in range(batches):
        samples = []
        for index in range(step * batch, (step + 1) * batch):
            path, label = dataset.samples[index % len(dataset)]
            image = timed("decode", load_rgb, path)
            pixels = timed("to an array", np.asarray, image)
            boxes, turns, rows = timed("draws", augmentation.draw, *image.size)
            crops = timed("crops", augmentation.cut, pixels, boxes, [(False, False, 0)] * len(boxes))
            turned = [crop for crop, (flip, _, _) in zip(crops, turns, strict=True) if flip]
            timed("flips", lambda crops: [crop.flip(2) for crop in crops], turned)
            masks = timed("masks", dataset._draw_masks, crops, rng)
            timed("photometry in the worker", lambda pairs: [loader.photometry_of_crop(*pair) for pair in pairs],
                  list(zip(crops, rows, strict=True)))
            samples.append((crops, label, masks, rows))
        timed("collate", loader.collate, samples, images=batch)
    return {name: statistics.median(values) for name, values in times.items()}


def device_photometry(dataset, batch, device, compiled, rounds=20):
    """Median milliseconds of `finish_batch` for a batch on `device`."""
    wait = getattr(torch, device.type).synchronize
    samples = loader.collate([dataset[index % len(dataset)] for index in range(batch)])
    samples = loader.Batch(*(None if x is None else x.to(device) for x in samples))
    photometry = loader.apply_photometry
    if compiled:
        photometry = torch.compile(photometry, fullgraph=True, dynamic=False)
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        loader.finish_batch(samples, photometry)
        wait()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main():
    args = get_args()
    if args.write:
        write_photographs(args.write, args.images, args.seed)
        return
    device = engine.choose_device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    print(f"versions: python {platform.python_version()}, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, pillow {PIL.__version__}, numpy {np.__version__}\n"
          f"processor: {processor_name()}, one thread")
    if args.moments:
        return print_moments([Image.fromarray(image) for image in load_sample_images().images], args.moments, args.sizes,
                             args.seed)
    print(f"crops: 2 x 224 + {args.local_crops_number} x 96; batches of {args.batch}, {args.batches} of each path")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary  # the index of a folder that is soon gone
        folder = Path(temporary, "images")
        write_photographs(folder, args.images, args.seed)
        in_workers, on_device = (our_folder(folder, args.local_crops_number, where, args.seed)
                                 for where in ("cpu", "device"))
        plain = PlainFolder(folder, args.local_crops_number)
        paths = {"reference, PIL": (plain, default_collate), "ours, photometry in workers": (in_workers, loader.collate),
                 "ours, photometry on the device": (on_device, loader.collate)}
        if args.shards:
            loader.pack([folder], folder.with_name("shards"), max_side=0, shard_size=1)
            packed = our_folder(folder.with_name("shards"), args.local_crops_number, "device", args.seed)
            paths["the same, from tar shards"] = (packed, loader.collate)
        times = compare(paths, args.batch, args.batches)
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{'':32}{'CPU ms / image':>16}{'10 % .. 90 %':>16}{'images/s / core':>18}{'reference / it':>16}")
        for name, median in medians.items():
            low, high = np.quantile(times[name], (0.1, 0.9))
            print(f"{name:32}{median:16.2f}{f'{low:.2f} .. {high:.2f}':>16}{1000 / median:18.0f}"
                  f"{medians['reference, PIL'] / median:16.2f}")
        print("\nstages of ours, CPU ms / image")
        for name, median in stages(on_device, args.batch, max(args.batches // 4, 1)).items():
            print(f"{name:32}{median:16.3f}")
        if device.type != "cpu":
            for compiled in (False, True):
                print(f"photometry on {device.type}{', compiled' if compiled else ''}: "
                      f"{device_photometry(on_device, args.device_batch, device, compiled):.2f} ms a batch of "
                      f"{args.device_batch}")


if __name__ == "__main__":
    engine.run(main)
