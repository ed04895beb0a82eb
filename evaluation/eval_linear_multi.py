"""Linear probe of a frozen backbone: heads of 45 learning rates trained in one pass over the data (iBOT, Section 4.1).

    python evaluation/eval_linear_multi.py --pretrained_weights work_dirs/JOB/checkpoint.pth --output_dir JOB
    torchrun --nproc_per_node 8 evaluation/eval_linear_multi.py --pretrained_weights ... --output_dir ...
    python evaluation/eval_linear_multi.py --device cpu --pretrained_weights ... --augment false  # on kept features

The paper takes `--n_last_blocks 4` for ViT-S and Swin, and `--n_last_blocks 1 --avgpool_patchtokens 2` for larger ViTs. The
best head is that of the highest accuracy on the validation images, as in the paper. Writes `log.txt`,
`checkpoint_KEY_linear.pth` (best) and `checkpoint_KEY_linear_last.pth` into the output folder, with several keys into a
folder of each there.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.heads import sweep_configs
from evaluation.common.linear import linear_parser, run_probe


def get_args_parser():
    parser = linear_parser("linear probe of a frozen backbone: many learning rates in one pass")
    parser.add_argument("--sweep_lr_only", type=engine.bool_flag, default=True,
                        help="45 rates with plain SGD; false: each also with decay 1e-6 and with LARS, 180 heads")
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)  # eval_linear.py's; ignored, as in the reference
    return parser


def main():
    args = get_args_parser().parse_args()
    run_probe(args, sweep_configs(args.sweep_lr_only), "linear")


if __name__ == "__main__":
    engine.run(main)
