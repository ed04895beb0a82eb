#!/usr/bin/env bash
# ImageNet-C (Table 8).
# Flags go to the script; the environment variable CHECKPOINT may name the classifier.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/corruptions_surf_variations/eval.py" --data data/imnet_c ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} "$@"
