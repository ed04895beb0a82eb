#!/usr/bin/env bash
# The eight variants of ImageNet-9 (Table 8), then the adversarial background challenge.
# Flags go to both scripts; the environment variable CHECKPOINT may name the classifier.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/backgrounds_challenge
for script in in9_eval.py challenge_eval.py; do
    "${PYTHON:-python3}" "$here/$script" --data-path data/imnet_bg/bg_challenge ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} "$@" ||
        exit
done
