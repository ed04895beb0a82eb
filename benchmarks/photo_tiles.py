"""A small set of real photographs from what two packages ship: tiles of 64 pixels, the photograph as the class.

    pip install scikit-image
    python benchmarks/photo_tiles.py data/tiles
    ./run.sh quickstart --data_path data/tiles/train --output_dir work_dirs/tiles

Each photograph is divided into blocks of 96 pixels, every fourth of which, in random order, is for validation, so that no
pixel is in both parts. Tiles are grey, for colour alone would tell most photographs apart.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

SKLEARN = ("china.jpg", "flower.jpg")
SKIMAGE = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
           "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
BLOCK, SIZE, TILES = 96, 64, {"train": 250, "val": 50}


def write_tiles(photograph, folder, rng):
    """FOLDER/{train,val}/NAME/NNN.png: tiles of 64 to 96 pixels, resized to 64."""
    with Image.open(photograph) as file:
        image = file.convert("RGB").convert("L")
    blocks = rng.permutation([(x, y) for x in range(0, image.width - BLOCK + 1, BLOCK)
                              for y in range(0, image.height - BLOCK + 1, BLOCK)])
    held_out = max(1, len(blocks) // 4)
    for part, own in (("val", blocks[:held_out]), ("train", blocks[held_out:])):
        out = Path(folder) / part / Path(photograph).stem
        out.mkdir(parents=True, exist_ok=True)
        for number in range(TILES[part]):
            side = rng.integers(SIZE, BLOCK + 1)
            x, y = own[rng.integers(len(own))] + rng.integers(0, BLOCK - side + 1, 2)
            tile = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
            tile.save(out / f"{number:03}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    try:
        import skimage.data
    except ImportError:
        sys.exit("scikit-image is missing: pip install scikit-image")
    folders = (Path(sklearn.datasets.__file__).parent / "images", Path(skimage.data.__file__).parent)
    for place, names in zip(folders, (SKLEARN, SKIMAGE), strict=True):
        for name in names:
            write_tiles(place / name, folder, np.random.default_rng(len(name)))  # any seed that stays
    print(f"{folder}: tiles of {len(SKLEARN + SKIMAGE)} photographs")


if __name__ == "__main__":
    main()
