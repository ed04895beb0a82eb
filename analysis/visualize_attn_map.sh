#!/usr/bin/env bash
# Self-attention maps of the last block (Figures 6 and 18).
# Flags go to the script.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/attention_map/visualize_attention.py" --data_path data/imagenet/val "$@"
