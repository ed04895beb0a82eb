#!/usr/bin/env bash
# ImageNet-A (Table 8).
# Flags go to the script; the environment variable CHECKPOINT may name the classifier.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/natural_adv_examples/eval.py" --data data/imnet_a/imagenet-a ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} "$@"
