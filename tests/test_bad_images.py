"""Image files that are broken, huge or no images at all: each is named, none takes memory or hangs, training goes round them."""
import io
import os
import resource
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import images
import loader

SMALL = {"local_crops_number": 1, "global_crops_size": 16, "local_crops_size": 8}


def encoded(format, seed=0, side=48, **options):
    """Bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data, *more):
    """A PNG file of RGB pixels, of which `data` are the compressed rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count):
    """`count` bytes of zero, compressed a piece at a time."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count // 2**20)) + packer.flush()


def replaced(content, position, new):
    return content[:position] + new + content[position + len(new):]


JPEG, PNG, GIF, BMP = (encoded(kind) for kind in ("JPEG", "PNG", "GIF", "BMP"))
LINK, PIPE = object(), object()

# What can be wrong with a file: its name and its bytes.
BROKEN = {
    "truncated JPEG": ("jpg", JPEG[:len(JPEG) // 2]),
    "empty": ("jpg", b""),
    "text": ("jpg", b"404 Not Found\n" * 9),
    "wrong magic": ("png", b"\0\0\0\0" + PNG[4:]),
    "dangling link": ("jpg", LINK),
    "60,000 x 60,000 pixels in a few bytes": ("png", png(60000, 60000, zlib.compress(b""))),
    "truncated PNG": ("png", PNG[:len(PNG) // 2]),
    "damaged zlib stream": ("png", replaced(PNG, len(PNG) // 2, bytes(40))),
    "damaged GIF, called PNG": ("png", GIF[:len(GIF) // 3]),
    "TIFF of garbage": ("tif", b"II*\0" + np.random.default_rng(0).bytes(3000)),
    # beyond ten
    "zeros": ("jpg", bytes(5000)),
    "no end of the header": ("png", PNG[:20]),
    "400 million pixels of nothing": ("png", png(20000, 20000, zeros(2**24))),
    "65,500 x 65,500 pixels of JPEG": ("jpg", replaced(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500))),
    "65,500 x 65,500 pixels of GIF": ("png", replaced(GIF, 6, struct.pack("<HH", 65500, 65500))),
    "60,000 x 60,000 pixels of BMP": ("bmp", replaced(BMP, 18, struct.pack("<ii", 60000, 60000))),
    "128 MiB of comment": ("png", png(8, 8, zeros(0), chunk(b"zTXt", b"a\0\0" + zeros(2**27)))),
    "128 MiB of colour profile": ("png", png(8, 8, zeros(0), chunk(b"iCCP", b"a\0\0" + zeros(2**27)))),
    "TIFF whose directory is itself": ("tif", b"II*\0\x08\0\0\0" + b"\0\0\x08\0\0\0"),
    "truncated PPM": ("ppm", b"P6 9 9 255\nabc"),
    "truncated WebP": ("webp", encoded("WEBP")[:500]),
    "program in PostScript": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (w) file\n"),
    "pipe": ("jpg", PIPE),
}
if os.geteuid():  # root may read everything
    BROKEN["no permission"] = ("jpg", None)


def write(path, content):
    if content is LINK:
        path.symlink_to("gone")
    elif content is PIPE:
        os.mkfifo(path)
    elif content is None:
        path.write_bytes(JPEG)
        path.chmod(0)
    else:
        path.write_bytes(content)


def make_folder(root, kinds, good):
    """Image folder of two classes: `good` sound images, and one broken file of each of `kinds`; returns the broken ones."""
    for i in range(good):
        path = root / f"class{i % 2}" / f"{i:04}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("JPEG" if i % 3 else "PNG", i, 20))
    broken = []
    for i, kind in enumerate(kinds):
        ending, content = BROKEN[kind]
        broken.append(root / f"class{i % 2}" / f"{i:04}b.{ending}")  # among the others
        write(broken[-1], content)
    return broken


def epoch(dataset, workers, **options):
    """All batches of an epoch."""
    options |= {"collate_fn": loader.collate, "num_workers": workers}
    return list(torch.utils.data.DataLoader(dataset, 19, shuffle=True, **options))


def masked_folder(root, **options):
    return loader.ImageFolderMask(str(root), loader.MultiCropAugmentation(**SMALL), patch_size=4, pred_ratio=0.3, **options)


def test_one_in_twenty_broken_in_ten_ways(tmp_path):
    """An epoch with two workers is complete and names exactly those files."""
    broken = make_folder(tmp_path, list(BROKEN)[:10], good=190)
    (tmp_path / "class0/folder.jpg").mkdir()  # no file, and so none to report
    dataset = masked_folder(tmp_path, on_bad_image="skip")
    assert len(dataset) == 200
    batches = epoch(dataset, workers=2)
    assert sum(len(batch.labels) for batch in batches) == 200
    assert all(batch.global_crops.shape[2:] == (3, 16, 16) for batch in batches)
    assert sorted(engine.bad_files(dataset)) == sorted(map(str, broken))

    again = masked_folder(tmp_path, on_bad_image="skip")
    epoch(again, workers=0)
    assert engine.bad_files(again) == engine.bad_files(dataset)


def test_every_way_under_error(tmp_path):
    for i, kind in enumerate(BROKEN):
        path, = make_folder(tmp_path / str(i), [kind], good=2)
        with pytest.raises(images.BadImage) as caught:
            for index in range(3):
                masked_folder(tmp_path / str(i), on_bad_image="error")[index]
        assert str(path) in str(caught.value), kind


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file(tmp_path, kind):
    """`BadImage` of one line that names the file; no warning, no memory, no wait."""
    path, = make_folder(tmp_path, [kind], good=1)
    before, caught = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

    def load():
        try:
            images.load_rgb(path)
        except images.BadImage as error:
            caught.append(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        thread.join(20)
    assert caught and str(path) in caught[0] and "\n" not in caught[0] and len(caught[0]) < 400, caught
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB
    reason = {"dangling link": "No such file", "pipe": "no file", "no permission": "Permission", "text": "no JPEG, PNG,",
              "program in PostScript": "no JPEG, PNG,", "400 million pixels of nothing": "20000 x 20000 pixels in",
              "60,000 x 60,000 pixels in a few bytes": "pixels"}
    assert reason.get(kind, "") in caught[0]


def test_limits_of_size(tmp_path, monkeypatch):
    """20,000 x 20,000 pixels are within the limits; where they lie is tried with small images."""
    assert 20000**2 < images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    (tmp_path / "full.jpg").write_bytes(encoded("JPEG", side=120))
    (tmp_path / "flat.png").write_bytes(png(120, 120, zlib.compress(bytes(361 * 120), 9)))
    size = (tmp_path / "flat.png").stat().st_size
    assert size * 100 < 120**2 < (tmp_path / "full.jpg").stat().st_size * 100
    for most, doubtful, refused in ((120**2, 120**2, ()), (120**2, 120**2 - 1, ("flat.png",)), (120**2 - 1, 0, ("flat.png", "full.jpg"))):
        monkeypatch.setattr(images, "MAX_PIXELS", most)
        monkeypatch.setattr(images, "DOUBTFUL_PIXELS", doubtful)
        for name in ("flat.png", "full.jpg"):
            if name in refused:
                with pytest.raises(images.BadImage, match=rf"{name}: .*120 x 120 pixels in \d+ bytes; up to {most}"):
                    images.load_rgb(tmp_path / name)
            else:
                assert images.load_rgb(tmp_path / name).size == (120, 120)


@pytest.mark.parametrize("format, ending", [("GIF", "png"), ("PNG", "jpg"), ("JPEG2000", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_other_formats_than_the_name_says_are_read(tmp_path, format, ending):
    """ImageNet has a PNG file that is called .JPEG."""
    (tmp_path / f"a.{ending}").write_bytes(encoded(format))
    assert images.load_rgb(tmp_path / f"a.{ending}").size == (48, 48)


@pytest.mark.parametrize("format", ["BMP", "PPM", "PNG", "TIFF"])
def test_an_image_stays_when_its_file_is_cut(tmp_path, format):
    """Pixels are in memory, not in a mapped file, whose end would kill the process."""
    path = tmp_path / "a"
    path.write_bytes(encoded(format))
    image = images.load_rgb(path)
    before = np.asarray(image).copy()
    path.write_bytes(b"")
    assert np.array_equal(np.asarray(image), before)


def test_files_that_break_or_vanish_in_mid_run(tmp_path):
    make_folder(tmp_path, [], good=60)
    dataset = masked_folder(tmp_path, on_bad_image="skip")
    data_loader = torch.utils.data.DataLoader(dataset, 10, num_workers=2, persistent_workers=True, collate_fn=loader.collate)
    assert sum(len(batch.labels) for batch in data_loader) == 60 and not engine.bad_files(dataset)
    paths = [path for path, _ in dataset.samples]
    os.remove(paths[3])
    os.truncate(paths[40], 100)
    dataset.set_epoch(1)
    assert sum(len(batch.labels) for batch in data_loader) == 60
    assert engine.bad_files(dataset) == [paths[3], paths[40]]
