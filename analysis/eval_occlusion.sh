#!/usr/bin/env bash
# Accuracy on images with dropped patches (Figure 9, Table 8).
# Flags go to the script.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/occlusion/eval.py" --test_data data/imagenet/val --random_drop --dino "$@"
