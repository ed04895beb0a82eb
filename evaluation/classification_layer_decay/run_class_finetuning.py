"""Fine-tuning on ImageNet with layer-wise learning rates (iBOT, Tables 2, 3 and 11; the recipe of BEiT).

    python evaluation/classification_layer_decay/run_class_finetuning.py --data_path data/imagenet --layer_decay 0.75 \\
        --pretrained_weights work_dirs/JOB/checkpoint.pth --output_dir work_dirs/JOB/cls/imnet --epochs 200 --lr 1e-3
    torchrun --nproc_per_node 8 evaluation/classification_layer_decay/run_class_finetuning.py ... --lr 8e-4,9e-4,1e-3,2e-3
    python evaluation/classification_layer_decay/run_class_finetuning.py --device cpu --pretrained_weights random ...

The paper's settings, for a total batch of 1024 and the best of the rates 8e-4, 9e-4, 1e-3 and 2e-3:

                epochs  --layer_decay  --drop_path  --warmup_epochs
    ViT-S/16       200           0.75          0.1               20
    ViT-B/16       100           0.65          0.2               20
    ViT-L/16        50           0.75          0.4                5

Writes `log.txt`, TensorBoard's events, `checkpoint.pth` (last) and `checkpoint-best.pth` into the output folder, with
several keys or rates into a folder of each there. Validation images are resized bilinearly, as in the reference.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import engine
from evaluation.common.finetune import Protocol, finetune
from evaluation.common.finetune_flags import finetune_parser
from evaluation.common.reference_flags import our_words


def get_args_parser():
    parser = finetune_parser("fine-tuning on ImageNet with layer-wise learning rates")
    parser.set_defaults(layer_decay=0.65, val_interpolation="bilinear", save_ckpt_freq=100.0)
    return parser


def main():
    finetune(get_args_parser().parse_args(our_words(sys.argv[1:])), Protocol("finetune"))


if __name__ == "__main__":
    engine.run(main)
