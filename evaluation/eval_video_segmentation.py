"""Objects in the videos of DAVIS 2017, followed by the likeness of frozen patch features (iBOT, Table 16).

    python evaluation/eval_video_segmentation.py --pretrained_weights work_dirs/J/checkpoint.pth --output_dir work_dirs/J
    torchrun --nproc_per_node 8 evaluation/eval_video_segmentation.py --pretrained_weights ... --output_dir ...
    python evaluation/eval_video_segmentation.py --score_only masks    # masks/NAME/NNNNN.png, of whatever made them

Writes the masks as OUTPUT_DIR/viseg/KEY/NAME/NNNNN.png, beside them a picture of each video and the two tables of the
official evaluator, and prints J, F and J&F. Several processes share the videos.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import engine
from evaluation.common import davis
from evaluation.common.arguments import evaluation_parser, int_from
from evaluation.common.propagation import cell_mask, follow, frame_size, full_labels, resize_frame
from evaluation.common.protocol import read_vits, start_process
from evaluation.common.results import append_result, results_folder
from images import IMAGENET, PixelStats, load_rgb, normalize

PUBLISHED = PixelStats(std=(0.228, 0.224, 0.225))  # 0.228, as the published numbers were made; else ImageNet's
PICTURE = 320  # pixels, width of a frame in the picture of a video


def get_args_parser():
    parser = evaluation_parser("Video object segmentation with a frozen backbone", frozen=False, labelled=False)
    for action in parser._actions:
        if action.dest == "pretrained_weights":
            action.required = False  # --score_only needs no network
    parser.set_defaults(data_path="data/davis/DAVIS", batch_size_per_gpu=6)
    video = parser.add_argument_group("video segmentation")
    video.add_argument("--n_last_frames", type=int_from(0), default=7, help="frames to follow from, beside the first one")
    video.add_argument("--size_mask_neighborhood", type=int_from(0), default=12,
                       help="rows and columns of patches that an object may move between frames; 0: any number")
    video.add_argument("--topk", type=int_from(1), default=5, help="patches that a patch takes its mask from")
    video.add_argument("--bs", type=int_from(1), dest="batch_size_per_gpu", default=6,
                       help="the same as --batch_size_per_gpu")
    video.add_argument("--scale_size", type=int_from(64), default=480, help="shorter side of the frames in pixels")
    video.add_argument("--sequences", nargs="+", metavar="NAME", help="videos; by default those of ImageSets/2017/val.txt")
    video.add_argument("--write_masks", type=engine.bool_flag, default=True, help="write the masks, not only the scores")
    video.add_argument("--score_only", metavar="DIR", help="score the masks DIR/NAME/NNNNN.png, and write the tables there")
    return parser


# ---------------------------------------------------------------- from frames to labels

class Frames(Dataset):
    """Frames of several sequences, indexed by (sequence, number of the frame): uint8 [3, H, W]."""

    def __init__(self, sequences, side):
        self.sequences, self.side = sequences, side

    def __getitem__(self, item):
        place, number = item
        sequence = self.sequences[place]
        image = load_rgb(sequence.frames[number])
        if image.size != sequence.size:
            raise engine.InputError(f"{sequence.frames[number]}: {image.width} x {image.height} pixels, but the annotation "
                                   f"has {sequence.size[0]} x {sequence.size[1]}")
        return resize_frame(image, frame_size(*sequence.size, self.side))


def check_patches(sequences, side, patch_size):
    """Raise InputError if the resized frames do not divide into patches."""
    for sequence in sequences:
        width, height = frame_size(*sequence.size, side)
        if width % patch_size or height % patch_size:
            raise engine.InputError(f"sequence {sequence.name}: frames of {width} x {height} pixels do not divide into "
                                   f"patches of {patch_size}; see --scale_size")


def frame_features(model, pixels, stats=PUBLISHED):
    """Frames uint8 [B, 3, H, W] to the unit features of their patches: [B, h, w, D]."""
    tokens = model.get_intermediate_layers(normalize(pixels, stats), 1)[0][:, 1:]  # [B, N, D]
    height, width = (side // model.patch_size for side in pixels.shape[2:])
    return F.normalize(tokens, dim=-1).unflatten(1, (height, width))


def segment(model, sequences, args, device, stats=PUBLISHED):
    """Yield (sequence, number of a frame, its labels uint8 [H, W]), frame by frame; of the first frame they are given."""
    batches = [[(place, number) for number in range(start, min(start + args.batch_size_per_gpu, len(sequence.frames)))]
               for place, sequence in enumerate(sequences)
               for start in range(0, len(sequence.frames), args.batch_size_per_gpu)]
    loader = iter(DataLoader(Frames(sequences, args.scale_size), batch_sampler=batches, num_workers=args.num_workers,
                             pin_memory=device.type == "cuda"))

    def features(sequence):
        for _ in range(0, len(sequence.frames), args.batch_size_per_gpu):
            yield from frame_features(model, next(loader).to(device, non_blocking=True), stats)

    for sequence in sequences:
        labels, _ = davis.read_labels(sequence.annotations[0])
        yield sequence, 0, labels
        width, height = (side // model.patch_size for side in frame_size(*sequence.size, args.scale_size))
        mask, channels = cell_mask(davis.without_void(labels), width, height)
        masks = follow(features(sequence), mask.to(device), args.n_last_frames, args.size_mask_neighborhood, args.topk)
        for number, mask in enumerate(masks, 1):
            yield sequence, number, full_labels(mask, channels, model.patch_size, sequence.size)


def read_masks(sequences, folder):
    """As `segment`, from the files FOLDER/NAME/NNNNN.png, of the frames that are scored."""
    for sequence in sequences:
        for number in sequence.scored:
            labels, _ = davis.read_labels(mask_path(folder, sequence, number), sequence.size)
            if labels.max() > sequence.objects:
                raise engine.InputError(f"{mask_path(folder, sequence, number)}: label {labels.max()}, but the sequence "
                                        f"has {sequence.objects} object(s)")
            yield sequence, number, labels


def mask_path(folder, sequence, number):
    return Path(folder) / sequence.name / f"{sequence.frames[number].stem}.png"


# ---------------------------------------------------------------- from labels to scores

def write_video(folder, predictions):
    """Pass on what `segment` yields; write the masks, and three frames of each video as the picture FOLDER/NAME.jpg."""
    shown = []
    for sequence, number, labels in predictions:
        last = len(sequence.frames) - 1
        if number == 0:
            _, palette = davis.read_labels(sequence.annotations[0])
        davis.write_labels(labels, mask_path(folder, sequence, number), palette)
        if number in (0, last // 2, last):
            picture = davis.draw_objects(load_rgb(sequence.frames[number]), davis.without_void(labels), palette)
            shown.append(picture.resize((PICTURE, round(PICTURE * picture.height / picture.width))))
        if number == last:
            strip = Image.new("RGB", (PICTURE * len(shown), shown[0].height))
            for place, picture in enumerate(shown):
                strip.paste(picture, (PICTURE * place, 0))
            strip.save(Path(folder) / f"{sequence.name}.jpg", quality=90)
            shown = []
        yield sequence, number, labels


def score(predictions):
    """{(name of the sequence, object): [[J, F] of each scored frame]} of what `segment` or `read_masks` yields."""
    scores, since = {}, time.time()
    for sequence, number, labels in predictions:
        if sequence.is_scored and number in sequence.scored:
            true = davis.read_annotation(sequence.annotations[number], sequence.size)
            for place, pair in enumerate(davis.object_scores(labels, true, sequence.objects), 1):
                scores.setdefault((sequence.name, place), []).append(pair)
        if number == sequence.scored[-1]:
            found = "no annotations to score by"
            if sequence.is_scored:
                own = [scores[sequence.name, place] for place in range(1, sequence.objects + 1)]
                found = "J {:.1f}, F {:.1f}".format(*100 * np.mean(own, axis=(0, 1)))
            print(f"{sequence.name}: {len(sequence.frames)} frames, {sequence.objects} object(s), {found} "
                  f"({time.time() - since:.0f} s)", flush=True)
            since = time.time()
    return scores


def finish(scores, sequences, name, folder, process):
    """Gather the scores of all processes; rank 0 prints, writes and returns them, as metrics in percent."""
    parts = [scores]
    if process.world_size > 1:
        parts = [None] * process.world_size
        dist.all_gather_object(parts, scores)
    if process.rank:
        return None
    found = {key: values for part in parts for key, values in part.items()}
    scored = [sequence for sequence in sequences if sequence.is_scored]
    if not scored:
        print(f"{name}: masks only, in {folder}; there are no annotations beyond the first frames", flush=True)
        return None
    table = {f"{sequence.name}_{place}": np.array(found[sequence.name, place])
             for sequence in scored for place in range(1, sequence.objects + 1)}
    davis.write_scores(table, Path(folder))
    metrics = {what: 100 * value for what, value in davis.global_scores(table).items()}
    print(f"{name}: " + ", ".join(f"{what} {value:.1f}" for what, value in metrics.items()) + " %", flush=True)
    print(f"{name}: of {len(table)} objects of {len(scored)} sequences; tables in {folder}", flush=True)
    return metrics | {"sequences": len(scored), "frames": sum(len(sequence.frames) for sequence in scored),
                      "objects": len(table)}


def evaluate(args, key, backbone, sequences, root, process):
    """Segment and score the sequences with one checkpoint key, in all processes; record the result."""
    folder = Path(args.output_dir) / "viseg" / key
    model = backbone.model.to(process.device)
    with torch.inference_mode():
        stats = PUBLISHED if backbone.pixel_stats == IMAGENET else backbone.pixel_stats
        predictions = segment(model, davis.share_of(sequences, process), args, process.device, stats)
        scores = score(write_video(folder, predictions) if args.write_masks else predictions)
    model.cpu()
    metrics = finish(scores, sequences, key, folder, process)
    if metrics:
        settings = {"arch": backbone.arch, "patch_size": backbone.patch_size, "weights_hash": backbone.weights_hash,
                    "data_path": str(root)}
        settings |= {name: getattr(args, name) for name in ("sequences", "scale_size", "n_last_frames",
                                                            "size_mask_neighborhood", "topk")}
        append_result(results_folder(args), "video_segmentation", args.pretrained_weights, key, settings, metrics)


def main():
    args = get_args_parser().parse_args()
    for name in ("pretrained_weights", "output_dir"):
        if getattr(args, name) is None and not args.score_only:
            raise engine.InputError(f"--{name}: is needed unless --score_only is given")
    process = start_process(args)
    backbones = {} if args.score_only else read_vits(args)
    sequences, root = davis.find_sequences(args.data_path, args.sequences)
    if process.rank == 0:
        print(f"{root}: {len(sequences)} sequences, {sum(len(sequence.frames) for sequence in sequences)} frames, "
              f"{sum(sequence.objects for sequence in sequences)} objects", flush=True)
    for backbone in backbones.values():
        check_patches(sequences, args.scale_size, backbone.patch_size)
    if args.score_only:
        lacking = [sequence.name for sequence in sequences if not sequence.is_scored]
        if lacking:
            raise engine.InputError(f"--score_only: sequence {lacking[0]} has no annotations beyond the first frame")
        scores = score(read_masks(davis.share_of(sequences, process), args.score_only))
        finish(scores, sequences, args.score_only, args.score_only, process)
    for key, backbone in backbones.items():
        evaluate(args, key, backbone, sequences, root, process)


if __name__ == "__main__":
    engine.run(main)
