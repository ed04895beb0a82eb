#!/usr/bin/env bash
# All robustness tests of a classifier, ending in Table 8 of the paper:
#
#   analysis/robustness.sh CLASSIFIER OUTPUT_DIR [flags for every test, as --num_workers 8]
#
# CLASSIFIER is a file of analysis/combine_ckpt.py. Tests whose data are missing say what they need and are left out; the
# exit code is then 1. Environment variables: GPUS (processes per test, 1), PYTHON (python3), CHALLENGE=1 (also the adversarial
# backgrounds, up to 16 million images), and the folders of the data: IMNET_BG (data/imnet_bg/bg_challenge),
# IMNET_A (data/imnet_a/imagenet-a), IMNET_C (data/imnet_c), IMAGENET_VAL (data/imagenet/val).
set -u
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
classifier=$1 output=$2 python=${PYTHON:-python3} failed=""
shift 2

run() {
    local script=$1 start=("$python")
    shift
    [ "${GPUS:-1}" = 1 ] || start+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
    echo "== $script"
    "${start[@]}" "$here/$script" "$@" || failed="$failed $script"
}

run backgrounds_challenge/in9_eval.py --checkpoint "$classifier" --output_dir "$output" \
    --data-path "${IMNET_BG:-data/imnet_bg/bg_challenge}" "$@"
[ -z "${CHALLENGE:-}" ] || run backgrounds_challenge/challenge_eval.py --checkpoint "$classifier" --output_dir "$output" \
    --data-path "${IMNET_BG:-data/imnet_bg/bg_challenge}" "$@"
run natural_adv_examples/eval.py --checkpoint "$classifier" --output_dir "$output" \
    --data "${IMNET_A:-data/imnet_a/imagenet-a}" "$@"
run corruptions_surf_variations/eval.py --checkpoint "$classifier" --output_dir "$output" --data "${IMNET_C:-data/imnet_c}" "$@"
run occlusion/eval.py --pretrained_weights "$classifier" --output_dir "$output" --random_drop --dino --shuffle \
    --test_data "${IMAGENET_VAL:-data/imagenet/val}" "$@"
"$python" "$here/table8.py" --output_dir "$output" || failed="$failed table8.py"
[ -z "$failed" ] || { echo "robustness.sh: failed:$failed" >&2; exit 1; }
