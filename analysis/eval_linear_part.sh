#!/usr/bin/env bash
# Part-wise linear probing in GPUS processes (8). Flags go to the script.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc_per_node "${GPUS:-8}" "$here/linear_part/eval.py" \
    --data_path data/imagenet --output_dir .linear_part "$@"
