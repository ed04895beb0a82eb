"""A video of the self-attention of [CLS] in the last block, the mean of all heads.

    python analysis/attention_map/video_generation.py --pretrained_weights work_dirs/JOB/checkpoint.pth \\
        --input_path dog.mp4 --output_path video_of_dog
    python analysis/attention_map/video_generation.py --pretrained_weights ... --input_path FRAMES --video_format gif
    python analysis/attention_map/video_generation.py --video_only --input_path video_of_dog/attention --output_path again

Frames of a video go to OUTPUT/frames, their attention to OUTPUT/attention, and both are then joined to OUTPUT/video.FORMAT.
mp4 and avi, and videos as input, need OpenCV (`pip install opencv-python-headless`); frames and gif do not.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import engine
from analysis import common
from evaluation.common.arguments import int_from
from evaluation.common.protocol import start_process
from images import load_rgb, normalize

CODES = {"mp4": "mp4v", "avi": "XVID"}


def get_args_parser():
    parser = common.analysis_parser("Video of the self-attention of [CLS]")
    for action in parser._actions:
        if action.dest == "pretrained_weights":
            action.required = False  # --video_only needs no network
    parser.add_argument("--input_path", required=True, help="video, folder of frames, or with --video_only of pictures")
    parser.add_argument("--output_path", default=".", help="folder of the results")
    parser.add_argument("--resize", type=int_from(1), nargs="+", help="height and width of the frames in pixels, or one "
                        "number for the shorter side; by default as they are")
    parser.add_argument("--threshold", type=float, help="draw only the patches that hold this share of the attention")
    parser.add_argument("--video_only", action="store_true", help="join the pictures of --input_path")
    parser.add_argument("--fps", type=float, default=30.0, help="frames per second, unless the input is a video")
    parser.add_argument("--video_format", choices=("mp4", "avi", "gif"), default="mp4")
    return parser


def opencv():
    try:
        import cv2
    except ImportError as error:
        raise engine.InputError("videos need OpenCV: pip install opencv-python-headless; without it give a folder of "
                               "frames and --video_format gif") from error
    return cv2


def pictures_in(folder, pattern="*"):
    """Image files of a folder, by name. Raises InputError if there is none."""
    files = sorted(path for path in Path(folder).glob(pattern) if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise engine.InputError(f"--input_path {folder}: no pictures {pattern} ({', '.join(IMG_EXTENSIONS)}) in it")
    return files


def split_video(path, folder):
    """Write the frames of a video as FOLDER/frame-NNNN.jpg. Returns (files, frames per second)."""
    cv2 = opencv()
    video = cv2.VideoCapture(str(path))
    fps, files = video.get(cv2.CAP_PROP_FPS), []
    while (found := video.read())[0]:
        files.append(folder / f"frame-{len(files):04}.jpg")
        Image.fromarray(found[1][..., ::-1]).save(files[-1], quality=95)  # OpenCV has blue first
    if not files:
        raise engine.InputError(f"--input_path {path}: cannot be read as a video")
    return files, fps


def join_video(files, path, fps):
    """Pictures one after the other as a video, in the size of the first."""
    first = load_rgb(files[0])
    frames = (load_rgb(file).resize(first.size) for file in files)
    if path.suffix == ".gif":
        next(frames)
        first.save(path, save_all=True, append_images=frames, duration=round(1000 / fps), loop=0)
        return
    cv2 = opencv()
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODES[path.suffix[1:]]), fps, first.size)
    if not video.isOpened():
        raise engine.InputError(f"--video_format {path.suffix[1:]}: OpenCV cannot write {path} here")
    for frame in frames:
        video.write(np.ascontiguousarray(np.asarray(frame)[..., ::-1]))
    video.release()


@torch.inference_mode()
def attention_frame(model, image, patch_size, threshold=None, normalize=normalize):
    """Mean attention of the heads to a PIL image as a heat map of its size, cut to whole patches on the right and below."""
    pixels = v2.functional.pil_to_tensor(image)
    height, width = (side // patch_size for side in pixels.shape[1:])
    if not height or not width:
        raise engine.InputError(f"--input_path: a frame of {image.width} x {image.height} pixels is smaller than a patch")
    pixels = pixels[:, :height * patch_size, :width * patch_size]
    device = next(model.parameters()).device
    weights = common.cls_attention(model, normalize(pixels[None].to(device)))[0].mean(dim=0)  # [N]
    if threshold is not None:
        weights = weights * common.mass_mask(weights, threshold)
    heat = Image.fromarray(common.heat_map(weights.view(height, width).cpu().numpy(), "inferno"))
    return heat.resize((width * patch_size, height * patch_size), Image.Resampling.NEAREST)


def main():
    args = get_args_parser().parse_args()
    source, folder = Path(args.input_path), common.output_folder(args.output_path, "--output_path")
    if not source.exists():
        raise engine.InputError(f"--input_path {source}: does not exist")
    if args.resize and len(args.resize) > 2:
        raise engine.InputError("--resize: give height and width, or one number")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise engine.InputError(f"--threshold {args.threshold}: must be above 0 and at most 1")
    if not 0.1 <= args.fps <= 1000:
        raise engine.InputError(f"--fps {args.fps:g}: must be in 0.1..1000")
    if args.video_format != "gif":
        opencv()  # before the work, not after it
    fps = args.fps
    if args.video_only:
        pictures = pictures_in(source, "attn-*") if source.is_dir() else []
        if not pictures:
            raise engine.InputError(f"--input_path {source}: --video_only needs a folder")
    else:
        if args.pretrained_weights is None:
            raise engine.InputError("--pretrained_weights: is needed unless --video_only is given")
        process = start_process(args)
        if process.world_size > 1:
            raise engine.InputError("video_generation.py runs in one process")
        backbone, _ = common.load_vit(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
        model, pictures = backbone.model.to(process.device), []
        if source.is_dir():
            frames = pictures_in(source)
        else:
            frames, found = split_video(source, common.output_folder(folder / "frames", "--output_path"))
            fps = found if 0.1 <= found <= 1000 else args.fps  # some files do not say, or say 0
        attention = common.output_folder(folder / "attention", "--output_path")
        resize = v2.Resize(args.resize) if args.resize else None
        for frame in frames:
            image = load_rgb(frame)
            heat = attention_frame(model, resize(image) if resize else image, backbone.patch_size, args.threshold,
                                   backbone.normalize)
            pictures.append(attention / f"attn-{frame.stem}.jpg")
            heat.save(pictures[-1], quality=95)
    video = folder / f"video.{args.video_format}"
    join_video(pictures, video, fps)
    print(f"{video}: {len(pictures)} frames, {fps:g} a second", flush=True)


if __name__ == "__main__":
    engine.run(main)
