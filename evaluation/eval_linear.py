"""Linear probe of a frozen backbone at one learning rate (iBOT, Section 4.1).

    python evaluation/eval_linear.py --pretrained_weights work_dirs/JOB/checkpoint.pth --lr 0.003 --output_dir JOB
    torchrun --nproc_per_node 8 evaluation/eval_linear.py --pretrained_weights ... --lr 0.003 --output_dir ...
    python evaluation/eval_linear.py --device cpu --num_workers 2 --pretrained_weights random --arch vit_tiny --epochs 5

Writes `log.txt`, `checkpoint_KEY_linear.pth` (best) and `checkpoint_KEY_linear_last.pth` into the output folder, with
several keys into a folder of each there. `eval_linear_multi.py` finds the learning rate.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from evaluation.common.heads import HeadConfig
from evaluation.common.linear import linear_parser, run_probe


def get_args_parser():
    parser = linear_parser("linear probe of a frozen backbone at one learning rate")
    parser.add_argument("--lr", type=float, default=0.001, help="for a total batch of 256, scaled linearly")
    return parser


def main():
    args = get_args_parser().parse_args()
    if not 0 < args.lr < math.inf:
        raise engine.InputError(f"--lr {args.lr}: must be a number above 0")
    run_probe(args, [HeadConfig(args.lr)], "linear_solo")


if __name__ == "__main__":
    engine.run(main)
