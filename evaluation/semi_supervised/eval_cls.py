"""Fine-tuning on few labels, from a layer of the projection head (iBOT, Tables 4 and 12; Chen et al., 2020).

    python evaluation/semi_supervised/eval_cls.py --pretrained_weights work_dirs/JOB/checkpoint.pth --epochs 1000 \\
        --train_subset 1percent.txt --finetune_head_layer 1 --lr 5e-6 --output_dir work_dirs/JOB/semi_cls
    torchrun --nproc_per_node 8 evaluation/semi_supervised/eval_cls.py --pretrained_weights ... --train_subset 0.1 ...
    python evaluation/semi_supervised/eval_cls.py --device cpu --train_subset 0.1 --pretrained_weights ... --epochs 5

`--train_subset` is a list of file names (the published 1 % and 10 % of ImageNet) or the share of each class to draw;
without it all of `--data_path`'s train/ is used, which may hold the subset itself. `--finetune_head_layer 0` puts the
classifier on the backbone, 1 (the paper's) on the first layer of the projection head. The recipe is that of eval_cls.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import engine
from evaluation.common.finetune import Protocol, finetune
from evaluation.common.finetune_flags import transfer_parser
from evaluation.common.reference_flags import our_words


def get_args_parser():
    parser = transfer_parser("fine-tuning on few labels")
    parser.set_defaults(lr="0.001")
    return parser


def main():
    finetune(get_args_parser().parse_args(our_words(sys.argv[1:])),
             Protocol("semi_supervised", "checkpoint_KEY_cls.pth", later_wins=True))


if __name__ == "__main__":
    engine.run(main)
