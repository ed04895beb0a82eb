"""Self-attention maps and videos: the overlay's rule per pixel, and the scripts on tiny data."""
import sys

import numpy as np
import pytest
import torch
from analysis_data import nano, run_main, write_checkpoint, write_images
from PIL import Image

import engine
from analysis import common
from analysis.attention_map import video_generation, visualize_attention
from analysis.attention_map.visualize_attention import COLOURS, head_colours, overlay


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("attention")
    write_images(root / "val", "ab", 3)
    write_checkpoint(root / "checkpoint.pth")
    return root


def plain_overlay(image, attention, threshold):
    """The rule of the reference, a pixel and a head at a time."""
    H, h, w = attention.shape
    S, T = image.shape[1:]
    values = np.zeros((H, h * w))
    for head in range(H):
        a = attention[head].flatten().double().numpy()
        total, order = 0.0, np.argsort(a, kind="stable")
        for place in order:
            total += a[place] / a.sum()
            if total > 1 - threshold:
                values[head, place] = a[place]
    values = values.reshape(H, h, w)
    for r in range(h):
        for c in range(w):
            best = max(range(H), key=lambda i: (values[i, r, c], -i))
            for head in range(H):
                if head != best:
                    values[head, r, c] = 0
    x = image.numpy()
    grey = (192 + 64 * (x - x.min()) / (x.max() - x.min())).mean(0) * 0.1
    canvas = np.repeat(grey[..., None], 3, -1)
    for head in range(H):
        if values[head].max() == values[head].min():
            continue
        n = (values[head] - values[head].min()) / (values[head].max() - values[head].min())
        for y in range(S):
            for x in range(T):
                v = n[y * h // S, x * w // T]
                if v > 0.2:
                    canvas[y, x] = (1 - v ** 0.5) * canvas[y, x] + v ** 0.5 * np.array(head_colours(H)[head])
    return canvas


@pytest.mark.parametrize("heads", (1, 3, 6, 9))
def test_overlay_equals_the_rule(heads):
    generator = torch.Generator().manual_seed(heads)
    image, attention = torch.randn(3, 24, 32, generator=generator), torch.rand(heads, 3, 4, generator=generator) ** 2
    attention[0, 0, 0] = attention[-1, 0, 0] = 1.5  # a tie goes to the lower head
    assert abs(overlay(image, attention, 0.6) - plain_overlay(image, attention, 0.6)).max() <= 0.51


def test_overlay_by_hand():
    attention = torch.tensor([[[.7, .1], [.1, .1]], [[.3, .05], [.6, .05]], [[.2, .1], [.1, .01]]])
    pixels = overlay(torch.zeros(3, 4, 4), attention, 0.6)  # an image of one value: 19.2
    assert (pixels[:2, :2] == COLOURS[0]).all()  # .7 beats .3; head 2 wins nowhere and does no harm
    assert (pixels[2:, :2] == COLOURS[1]).all() and (pixels[:, 2:] == 19).all()


def test_colours_are_the_papers_then_others():
    colours = head_colours(16)
    assert colours[:6] == [(0, 160, 215), (220, 55, 60), (245, 180, 0), (10, 120, 190), (40, 150, 100), (135, 75, 145)]
    assert len(set(colours)) == 16 and head_colours(3) == colours[:3]
    assert all(0 <= part <= 255 for colour in colours for part in colour)


def test_folder_and_single_image(job, tmp_path, monkeypatch):
    flags = ["--pretrained_weights", job / "checkpoint.pth", "--data_path", job / "val", "--image_size", "32", "48"]
    run_main(monkeypatch, visualize_attention, *flags, "--output_dir", tmp_path / "new", "--show_pics", "5", "--batch_size", "2")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert len(names) == 5 and set(names) <= {f"idx{i}_attn.png" for i in range(6)}
    index = int(names[0].removeprefix("idx").removesuffix("_attn.png"))
    images = common.image_folder(job / "val", common.squared(32, 48))
    image = images[index][0]
    attention = nano().get_last_selfattention(image[None])[0, :, 0, 1:].view(3, 4, 6)
    pixels = np.asarray(Image.open(tmp_path / "new" / names[0]))
    assert pixels.shape == (160, 5 * 48 * 5, 3)  # enlarged fivefold: image, overlay, three heads
    pixels = pixels[::5, ::5]
    assert abs(pixels[:, :48].astype(int) - np.asarray(common.display(image))).max() == 0
    assert abs(pixels[:, 48:96].astype(int) - overlay(image, attention)).max() <= 1
    assert (pixels[::8, 192::8] == common.heat_map(attention[2].detach().numpy())).mean() > 0.95

    run_main(monkeypatch, visualize_attention, *flags, "--output_dir", tmp_path, "--image_path", images.samples[index][0], "--heads", "2", "0")
    pixels = np.asarray(Image.open(tmp_path / "attn.png"))[::5, ::5]
    assert pixels.shape == (32, 4 * 48, 3) and abs(pixels[:, 48:96].astype(int) - overlay(image, attention[[2, 0]])).max() <= 1


@pytest.mark.parametrize("words, message", [
    (("--image_size", "30"), "--image_size 30 30: does not divide into patches of 8"),
    (("--heads", "3"), "--heads 3: vit_nano has the heads 0..2"),
    (("--threshold", "0"), "--threshold 0.0: must be above 0"),
    (("--pretrained_weights", "/nowhere.pth"), "checkpoint /nowhere.pth: no such file"),
    (("--image_path", "/nowhere.png"), "/nowhere.png"),
])
def test_mistakes_are_named(job, tmp_path, monkeypatch, words, message):
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, visualize_attention, "--pretrained_weights", job / "checkpoint.pth", "--data_path", job / "val",
                 "--output_dir", tmp_path, *words)


# ---------------------------------------------------------------- video

def test_frames_to_gif_and_the_pictures_alone(job, tmp_path, monkeypatch):
    flags = ["--pretrained_weights", job / "checkpoint.pth", "--video_format", "gif", "--fps", "10"]
    run_main(monkeypatch, video_generation, *flags, "--input_path", job / "val/a", "--output_path", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out/attention").iterdir()) == [f"attn-{i:02}.jpg" for i in range(3)]
    with Image.open(tmp_path / "out/video.gif") as video:
        assert video.n_frames == 3 and video.size == (40, 32) and video.info["duration"] == 100  # 36 rows cut to 32
    picture = Image.open(job / "val/a/00.png")
    heat = np.asarray(video_generation.attention_frame(nano(), picture, 8))
    pixels = common.normalize(torch.from_numpy(np.asarray(picture)[:32].copy()).permute(2, 0, 1)[None])
    expected = nano().get_last_selfattention(pixels)[0, :, 0, 1:].mean(0).view(4, 5).detach().numpy()
    assert abs(heat[::8, ::8].astype(int) - common.heat_map(expected, "inferno")).max() <= 1
    assert (np.asarray(video_generation.attention_frame(nano(), picture, 8, 0.3)) != heat).any()

    run_main(monkeypatch, video_generation, "--video_only", "--video_format", "gif", "--input_path", tmp_path / "out/attention", "--output_path", tmp_path)
    with Image.open(tmp_path / "video.gif") as video:
        assert video.n_frames == 3


@pytest.mark.parametrize("extension", ("mp4", "avi"))
def test_video_in_and_out(job, tmp_path, monkeypatch, extension):
    pytest.importorskip("cv2")
    files = sorted((job / "val/a").iterdir())
    video_generation.join_video(files, tmp_path / f"in.{extension}", 12)
    run_main(monkeypatch, video_generation, "--pretrained_weights", job / "checkpoint.pth", "--video_format", extension, "--input_path", tmp_path / f"in.{extension}",
             "--output_path", tmp_path / "out")
    assert len(list((tmp_path / "out/frames").iterdir())) == 3
    files, fps = video_generation.split_video(tmp_path / f"out/video.{extension}", tmp_path)
    assert len(files) == 3 and fps == pytest.approx(12)


def test_a_video_that_does_not_say_its_speed(job, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    for found in (0.0, float("nan")):
        monkeypatch.setattr(video_generation, "split_video", lambda *_, found=found: (sorted((job / "val/a").iterdir()), found))
        run_main(monkeypatch, video_generation, "--pretrained_weights", job / "checkpoint.pth", "--video_format", "gif", "--fps", "20",
                 "--input_path", tmp_path / "a.mp4", "--output_path", tmp_path)
        with Image.open(tmp_path / "video.gif") as video:
            assert video.info["duration"] == 50


@pytest.mark.parametrize("words, message", [
    (("--input_path", "/nowhere"), "--input_path /nowhere: does not exist"),
    (("--input_path", "."), "no pictures"),
    (("--fps", "0"), "--fps 0: must be in 0.1..1000"),
    (("--fps", "nan"), "--fps nan: must be in 0.1..1000"),
    (("--video_format", "mp4"), "pip install opencv-python-headless"),
])
def test_mistakes_of_videos_are_named(job, tmp_path, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(engine.InputError, match=message):
        run_main(monkeypatch, video_generation, "--pretrained_weights", job / "checkpoint.pth", "--output_path", tmp_path / "out", "--input_path",
                 job / "val/a", "--video_format", "gif", *words)
