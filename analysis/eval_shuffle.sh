#!/usr/bin/env bash
# Accuracy on images whose cells change places (Figure 10).
# Flags go to the script.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/occlusion/eval.py" --test_data data/imagenet/val --shuffle "$@"
