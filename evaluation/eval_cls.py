"""Transfer to other data sets by fine-tuning (iBOT, Table 7; the recipe of DeiT).

    python evaluation/eval_cls.py --pretrained_weights work_dirs/JOB/checkpoint.pth --dataset cifar100 --epochs 1000 \\
        --lr 7.5e-6 --output_dir work_dirs/JOB/cls/cifar
    torchrun --nproc_per_node 8 evaluation/eval_cls.py --pretrained_weights ... --dataset inat2019 --epochs 360 \\
        --lr 2.5e-5 --reprob 0.1 --output_dir ...
    python evaluation/eval_cls.py --device cpu --pretrained_weights random --arch vit_tiny --epochs 5 --output_dir ...

`--lr` is for a total batch of 512, scaled linearly. The published rates, 7.5e-6 (Cars: 7.5e-5; iNaturalist with ViT-S/16:
5e-5 in 2018, 2.5e-5 in 2019), are at 768 images close to the lowest rate 1e-5: after the warm-up they hardly change, as in
the reference.

Writes `log.txt`, TensorBoard's events, `checkpoint.pth` (last) and `checkpoint_KEY_cls.pth` (best) into the output folder,
with several keys or rates into a folder of each there.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.finetune import Protocol, finetune
from evaluation.common.finetune_flags import transfer_parser
from evaluation.common.reference_flags import our_words


def get_args_parser():
    parser = transfer_parser("transfer to other data sets by fine-tuning")
    parser.set_defaults(batch_size_per_gpu=96)
    return parser


def main():
    args = get_args_parser().parse_args(our_words(sys.argv[1:]))
    finetune(args, Protocol(f"transfer_{args.dataset}", "checkpoint_KEY_cls.pth", later_wins=True))


if __name__ == "__main__":
    engine.run(main)
