"""Evaluate a network that evaluation/semantic_segmentation/train.py has trained, or draw what it sees in any image.

    python evaluation/semantic_segmentation/test.py --checkpoint work_dirs/J/seg/teacher/checkpoint.pth
    torchrun --nproc_per_node 8 evaluation/semantic_segmentation/test.py --checkpoint ... --output_dir work_dirs/J
    python evaluation/semantic_segmentation/test.py --checkpoint ... --visualize photo.jpg --output_dir pictures

Prints IoU and accuracy of every class, and their means; the numbers do not depend on the number of processes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import engine
from evaluation.common.dense import dense_test_parser, picture_paths
from evaluation.common.protocol import start_process
from evaluation.common.results import append_result, read_results
from evaluation.semantic_segmentation.ade20k import class_names, read_pairs, scores
from evaluation.semantic_segmentation.segmentation import (
    PROTOCOLS,
    class_table,
    described,
    evaluate,
    load_segmenter,
    test_images,
    write_classes,
    write_pictures,
)


def get_args_parser():
    parser = dense_test_parser("Evaluate semantic segmentation", "ADE20K")
    parser.add_argument("--inference", choices=("slide", "whole"), help="by default as in the training")
    return parser


def test(args):
    """What the flags ask for. Raises `engine.InputError`."""
    process = start_process(args)
    model, network, content = load_segmenter(args.checkpoint)
    network |= {"inference": args.inference or network["inference"]}
    model.to(process.device)
    amp_dtype = engine.choose_amp_dtype(args.use_fp16, args.amp_dtype, process.device)
    settings, source = content["settings"], content["source"]
    root = args.data_path or str(settings.get("data_path", "data/ade/ADEChallengeData2016"))
    names = class_names(root, network["num_classes"])
    folder = Path(args.output_dir or ".")
    if args.visualize:
        for path, target in picture_paths(args.visualize if process.rank == 0 else (), folder, "segmentation"):
            write_pictures([(model, network)], [(path, None)], names, process.device, amp_dtype, target)
            print(f"{target} of {path}", flush=True)
        return
    if args.output_dir:
        read_results(args.output_dir)
    pairs = read_pairs(root, "validation")
    matrix = evaluate(model, test_images(pairs, network), network, process, amp_dtype, args.num_workers,
                      lambda items: next(items, None))
    if process.rank != 0:
        return
    metrics, rows = scores(matrix)[0], class_table(matrix, names)
    print("\n".join(f"{name:<32}{iou:>8}{accuracy:>10}{pixels:>14}" for name, iou, accuracy, pixels in rows))
    print(f"{args.checkpoint}, {len(pairs)} images: {described(metrics)}", flush=True)
    if args.output_dir:
        append_result(args.output_dir, PROTOCOLS[network["head"]], source["checkpoint"], source["key"],
                      {**settings, "data_path": root, "val_images": len(pairs), "inference": network["inference"]}, metrics)
        write_classes(rows, folder / "classes.tsv")
        write_pictures([(model, network)], pairs[:6], names, process.device, amp_dtype, folder / "segmentations.png")


if __name__ == "__main__":
    engine.run(lambda: test(get_args_parser().parse_args()))
