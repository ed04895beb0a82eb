"""The adversarial background challenge (Xiao et al., 2021): can any background turn a foreground into another class?

    torchrun --nproc_per_node 8 analysis/backgrounds_challenge/challenge_eval.py --checkpoint classifier.pth \\
        --data-path data/imnet_bg/bg_challenge

Every foreground (`fg_mask`, `original`) is put before every background (`only_bg_t`), until one of these is classified
wrongly: up to 4,050 x 4,050 images. `--foregrounds N` takes N of them, evenly spread.

Letters: b backgrounds of a batch, S pixels.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from torchvision.transforms import v2

import engine
from analysis.backgrounds_challenge.in9 import WHERE, in9_parser, of_size, right, variant_images
from analysis.classifier import record, require, start, summed
from images import load_rgb, normalize


def foreground_files(data):
    """List of (mask, image, label) of DATA/fg_mask/val/CLASS/*.npy, sorted. Raises InputError for what is missing."""
    root = Path(data) / "fg_mask" / "val"
    require(root, f"{data}/fg_mask/val/CLASS/*.npy", WHERE)
    found = []
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    for label, folder in enumerate(classes):
        for mask in sorted(folder.glob("*.npy")):
            stem = Path(data) / "original" / "val" / folder.name / mask.stem
            images = (stem.with_name(stem.name + end) for end in (".JPEG", ".jpg", ".png"))
            image = next((path for path in images if path.is_file()), None)
            if image is None:
                raise engine.InputError(f"{mask}: no image {stem}.JPEG to this mask")
            found.append((mask, image, label))
    if len(classes) != 9 or not found:
        raise engine.InputError(f"data folder {root}: {len(found)} masks in {len(classes)} class folders, ImageNet-9 has 9")
    return found


def read_mask(path, size):
    """Mask 0 or 1 of a foreground: uint8 [1, S, S]."""
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise engine.InputError(f"{path}: cannot be read as a mask ({engine.one_line(error)})") from error
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biuf":
        raise engine.InputError(f"{path}: cannot be read as a mask (no array of numbers)")
    if mask.shape != size:
        raise engine.InputError(f"{path}: a mask of shape {mask.shape}, its image is {size}")
    return torch.from_numpy((mask > 0.5).astype(np.uint8))[None]


@torch.inference_mode()
def is_vulnerable(classifier, image, mask, label, backgrounds, batch_size, device, normalize=normalize):
    """Whether any of the backgrounds, uint8 [n, 3, S, S], behind the foreground makes the class wrong."""
    for batch in backgrounds.split(batch_size):
        images = normalize((batch * (1 - mask) + image * mask).to(device))
        if not right(classifier(images), label).all():
            return True
    return False


def main():
    args = in9_parser("Foregrounds that no background turns into another class").parse_args()
    process, classifier, backbone = start(args, 9 if args.in9 else 1000)
    files = foreground_files(args.data)
    if args.foregrounds:
        places = np.linspace(0, len(files) - 1, min(args.foregrounds, len(files))).round().astype(int)
        files = [files[i] for i in places]
    # Once, as bytes (0.6 GB): each is needed for every foreground.
    images = variant_images(args.data, "only_bg_t")
    backgrounds = torch.stack([images[i][0] for i in range(len(images))])
    vulnerable, mine = torch.zeros(1, dtype=torch.float64), files[process.rank::process.world_size]
    for number, (mask_file, image_file, label) in enumerate(mine, start=1):
        image = load_rgb(image_file)
        image = v2.functional.pil_to_tensor(of_size(image, backgrounds.shape[:1:-1], image_file.parent))
        mask = read_mask(mask_file, tuple(image.shape[1:]))
        vulnerable += is_vulnerable(classifier, image, mask, label, backgrounds, args.batch_size, process.device,
                                    backbone.normalize)
        if process.rank == 0 and number % 50 == 0:
            print(f"{number}/{len(mine)} foregrounds: {int(vulnerable)} vulnerable", flush=True)
    share = 100 * summed(vulnerable, process).item() / len(files)
    if process.rank == 0:
        print(f"vulnerable foregrounds: {share:.2f} % of {len(files)}; challenge accuracy {100 - share:.2f} %", flush=True)
        record(args, "backgrounds_challenge", backbone, {"foregrounds": len(files)},
               {"vulnerable": share, "challenge_accuracy": 100 - share})


if __name__ == "__main__":
    engine.run(main)
