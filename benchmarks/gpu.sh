#!/usr/bin/env bash
# benchmarks/gpu.sh [PART ...]: what to run on the first day on a GPU; meant for ten minutes on one H100.
#
# Logs and table.md, one Markdown table to paste, go to the folder OUT (work_dirs/gpu). A part that fails is a row like any
# other, and the exit code is then 1. PYTHON names the interpreter (python3), DEVICE another device (cuda): with DEVICE=cpu and
# STEPS=2 the parts can be tried without a GPU. DATA, a folder of images, takes the place of generated ones in `loader`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-work_dirs/gpu} steps=${STEPS:-20}

PARTS="golden compiled half step recompute sync colours loader resume evaluations processes"
parts=${*:-$PARTS}
for part in $parts; do
    case " $PARTS " in *" $part "*) ;; *) echo "gpu.sh: no part '$part'; known: $PARTS" >&2; exit 2 ;; esac
done
about=$("$python" - "$device" <<'PY'
import sys
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no GPU here (DEVICE=cpu tries the parts without one)")
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if sys.argv[1] == "cuda" else []
print(f"{len(gpus)} {', '.join(sorted(set(gpus))) or 'CPU'}; torch {torch.__version__}, CUDA {torch.version.cuda if gpus else '-'}")
PY
) || exit 2
gpus=0
[ "$device" != cuda ] || gpus=${about%% *}
mkdir -p "$out"
failed=0

# row PART SECONDS CODE PATTERN: a line of the table for each line of the log that matches.
row() {
    local line first="$1 | $2 s"
    if [ "$3" != 0 ]; then
        echo "| $first | **failed with code $3**: $(grep -v '^ *$' "$out/$1.log" | tail -n 1 | tr '|' '/' | cut -c 1-150) |"
        return
    fi
    grep -E -- "$4" "$out/$1.log" | tr -s ' ' | tr '|' '/' | while read -r line; do
        echo "| $first | $line |"
        first=" | "
    done
}

# part NAME PATTERN COMMAND ...: runs it if it is wanted; its output goes to NAME.log.
part() {
    local name=$1 pattern=$2 code=0 since=$SECONDS
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    echo "$name: $*" >&2
    "$@" >"$out/$name.log" 2>&1 || code=$?
    row "$name" $((SECONDS - since)) "$code" "$pattern" | tee -a "$out/table.md"
    [ "$code" = 0 ] || failed=1
}

images=${DATA:-$out/images}
case " $parts " in
    *" loader "* | *" processes "*)
        [ -d "$images" ] || "$python" benchmarks/data_loader.py --write "$images" --images $((steps * 80)) || exit 2 ;;
esac

printf '%s\n\n| part | time | result |\n|---|---|---|\n' "$about" | tee "$out/table.md"

part golden 'passed|failed' env TEST_DEVICE="$device" "$python" -m pytest -q -n 0 tests/test_golden.py
part compiled 'losses' "$python" benchmarks/precision.py --parts compiled --device "$device" --steps $((steps * 10))
part half 'losses|logits' "$python" benchmarks/precision.py --parts half --device "$device" --steps $((steps * 10))
part step 'batch|ours' "$python" benchmarks/pretrain_step.py --table --device "$device" --steps "$steps"
part recompute ' ms a step' "$python" benchmarks/pretrain_step.py --variants --device "$device" --steps "$steps"
part sync 'compiled programs' "$python" benchmarks/pretrain_step.py --watch --device "$device"
part colours 'photometry on' "$python" benchmarks/data_loader.py --batches 4 --device "$device"
part loader 'from ' "$python" benchmarks/pretrain_step.py --data_path "$images" --device "$device" --steps "$steps"
part resume 'trials,' "$python" benchmarks/faults.py --trials 3 --fault kill term --device "$device"
part evaluations ' of ' "$python" benchmarks/evaluation.py --parts heads knn logistic --rounds 3 --device "$device"
case " $parts " in
    *" processes "*)
        if [ "$gpus" -gt 1 ] || [ "$device" = cpu ]; then
            part processes 'training time' "$python" -m torch.distributed.run --standalone --nproc_per_node 2 main_ibot.py \
                --device "$device" --arch vit_tiny --data_path "$images" --output_dir "$out/processes" --overwrite true --epochs 2 \
                --batch_size_per_gpu 16 --local_crops_number 2 --out_dim 1024 --shared_head true --warmup_epochs 0
        else
            echo '| processes | | not run: there is one GPU |' | tee -a "$out/table.md"
        fi ;;
esac
echo "table: $out/table.md" >&2
exit "$failed"
