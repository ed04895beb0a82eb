#!/usr/bin/env bash
# Starts everything: a first run on digits, the tests, and pre-training and evaluations on one or many nodes.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: ./run.sh quickstart [flags]   pre-train a small ViT on handwritten digits (minutes on a CPU) and evaluate it
       ./run.sh dense_demo [flags]   train detection and segmentation of digits in scenes from quickstart's network, or that
                                     of PRETRAINED, and from random weights; the flags go to all the trainings
       ./run.sh plan [flags]         how long pre-training with these flags would take here, what limits it and what batch
                                     fits; ten updates are tried, nothing is written; --devices N: of so many GPUs
       ./run.sh test [flags]         run the tests; the flags go to pytest
       ./run.sh TYPE JOB_NAME ARCH KEY GPUS [flags]
       ./run.sh report JOB_NAME...   print the results of a job beside the paper's; write report.md with curves there; of
                                     several jobs, draw their NMI and losses in one picture too

TYPE      tasks joined with +, e.g. imagenet_pretrain+imagenet_knn+imagenet_linear:
            imagenet_pretrain      pre-train on data/imagenet/train
          and evaluations on data/imagenet/{train,val}, whose results go to results.json in the job's folder:
            imagenet_knn           k-NN
            imagenet_reg           logistic regression
            imagenet_linear        linear probes at 45 learning rates, in the sub-folder linear/KEY
            imagenet_linear_solo   a linear probe at the rate --lr, in the sub-folder linear_solo/KEY; after pre-training in
                                   the same command: imagenet_linear
            imagenet_unsup_cls     unsupervised classification
            imagenet_part_linear   linear probes of the most attended patches, in the sub-folder linear_part/KEY
            imagenet_cls           fine-tuning with the paper's settings for ARCH, in the sub-folder cls/imnet/KEY; --lr A,B,...
                                   tries several rates
            imagenet_semi_cls      fine-tuning on few labels, in semi_cls/SUBSET/KEY: data/imagenet_split, or the part of
                                   data/imagenet that --train_subset names
          objects in videos, in data/davis/DAVIS; masks in viseg/KEY, or in the folder that --output_dir names:
            davis_viseg
          fine-tuning on other data, in data/{cifar,cars,flwrs,inat/2018,inat/2019}; results in cls/DATA/KEY:
            cifar_cls, cifar10_cls, cars_cls, flwrs_cls, inat_cls, inat19_cls
          retrieval on data/revisited_paris_oxford: paris_oxford_reid, with pages of neighbours in retrieval/SET/KEY
          copy detection on data/copydays: copydays_copydet (or copydays_copydey)
          detection on data/coco, in det/KEY; key=value words of mmdetection's, as lr_config.step=8,11, count as flags:
            coco_det
          segmentation on data/ade/ADEChallengeData2016, with such words too: ade20k_seg, UPerNet, in seg/KEY;
            ade20k_dense_linear, a linear head on the frozen network, in seg_linear/KEY
JOB_NAME  results go to work_dirs/JOB_NAME
ARCH      vit_{nano,tiny,small,base,large}, swin_{tiny,small,base,large}, ...
KEY       networks to evaluate: teacher, student, or both with a comma
GPUS      number of processes
flags     go to pre-training, or to all the evaluations when TYPE holds no pre-training; --data_path replaces the default folder

Pre-training, linear probes and fine-tuning that were interrupted go on when the same command is given again, and finished
ones say so: they get --load_from auto unless the flags hold --load_from, --resume or --overwrite. Several evaluations of
frozen features in one command share what they extract: it is kept in OUTPUT_DIR/features, unless the flags hold
--dump_features or --load_features. SIGTERM, SIGINT and SIGUSR1 reach what runs. The exit code is that of the task that
failed; 75: training was stopped by a signal and has saved what it needs to go on.

Environment variables:
  DATA_PATH    folder with train/ and val/ (data/imagenet)         OUTPUT_DIR   folder of the results (work_dirs/JOB_NAME)
  PRETRAINED   checkpoint to evaluate (OUTPUT_DIR/checkpoint.pth)
  AVGPOOL      pooling of the features of k-NN, regression and retrieval: 0, 1 or 2 (0); of few labels 0 or 1
  LINEAR_AVGPOOL, LINEAR_N_LAST_BLOCKS   of linear probes: pooling and number of blocks (ARCH with `small` or `swin`: 0, 4;
               others: 2, 1)
  MAX_GPUS     limit of processes per node (8)                     GPUS_PER_NODE  processes per node (GPUS, at most MAX_GPUS)
  TOTAL_NODES, NODE_ID (1, 0)   nodes; all share pre-training, imagenet_cls, coco_det and ade20k_*; else node i takes keys i,
               i + TOTAL_NODES, ...
  MASTER_ADDR, MASTER_PORT (127.0.0.1, 29500)   where several nodes meet: the address of node 0
  PYTHON       interpreter (python3)
  VENV         environment that quickstart and test use or create (the active one if it has the packages, else .venv)
  DRY_RUN=1    print the commands, run nothing
EOF
}

TASKS="imagenet_pretrain imagenet_knn imagenet_reg imagenet_linear imagenet_linear_solo imagenet_unsup_cls \
imagenet_part_linear imagenet_cls imagenet_semi_cls cifar_cls cifar10_cls cars_cls flwrs_cls inat_cls inat19_cls \
davis_viseg paris_oxford_reid copydays_copydet coco_det \
ade20k_seg ade20k_dense_linear"

# The table of tasks; TASKS and the usage list them too.
#   script; runs: `together` on all nodes, or once `per_key` on one of them; data and the folders that must be in it; sub:
#   sub-folder of the results, in it one per key (results.json stays in the job's folder); features: of frozen networks,
#   those `shared` with other tasks, its `own`, or none in fine-tuning; fixed: flags of this task alone.
task() {
    runs=per_key data=$imagenet folders="train val" sub='' features=shared fixed=()
    case $1 in
        imagenet_pretrain)    script=main_ibot.py runs=together data=$imagenet/train folders='' ;;
        imagenet_knn)         script=evaluation/eval_knn.py fixed=(--avgpool_patchtokens "${AVGPOOL:-0}") ;;
        imagenet_reg)         script=evaluation/eval_logistic_regression.py fixed=(--avgpool_patchtokens "${AVGPOOL:-0}") ;;
        imagenet_linear)      script=evaluation/eval_linear_multi.py sub=linear fixed=(${linear[@]+"${linear[@]}"}) ;;
        imagenet_linear_solo) script=evaluation/eval_linear.py sub=linear_solo fixed=(${linear[@]+"${linear[@]}"}) ;;
        imagenet_unsup_cls)   script=evaluation/unsupervised/unsup_cls.py ;;
        imagenet_part_linear) script=analysis/linear_part/eval.py sub=linear_part features=own fixed=(--topk 1 7 14 56 112 196) ;;
        imagenet_cls)
            script=evaluation/classification_layer_decay/run_class_finetuning.py runs=together sub=cls/imnet features=''
            case $arch in  # Tables 2 and 11, for 8 GPUs; the paper has no Swin: the reference's fixed settings
                swin*) fixed=(--epochs 100 --warmup_epochs 20 --layer_decay 0.65) ;;
                *large) fixed=(--epochs 50 --warmup_epochs 5 --layer_decay 0.75 --drop_path 0.4
                               --batch_size_per_gpu 64 --accum_iter 2) ;;
                *base) fixed=(--epochs 100 --warmup_epochs 20 --layer_decay 0.65 --drop_path 0.2) ;;
                *) fixed=(--epochs 200 --warmup_epochs 20 --layer_decay 0.75 --drop_path 0.1) ;;
            esac
            fixed+=(--lr 1e-3) ;;
        imagenet_semi_cls)
            script=evaluation/semi_supervised/eval_cls.py sub=semi_cls${subset:+/${subset##*/}} features=''
            [ -n "$subset" ] || data=${at}data/imagenet_split
            fixed=(--avgpool_patchtokens "${AVGPOOL:-0}" --finetune_head_layer 1 --epochs 1000 --lr 5e-6) ;;
        coco_det)  # the recipe is the network's, see its help
            script=evaluation/object_detection/train.py runs=together data=${at}data/coco sub=det features=''
            folders="train2017 val2017 annotations" ;;
        ade20k_seg) segmentation seg ;;
        ade20k_dense_linear) segmentation seg_linear --head linear ;;
        davis_viseg)
            script=evaluation/eval_video_segmentation.py data=${at}data/davis/DAVIS folders='' features=own
            fixed=(--results_dir "${output-}") ;;
        cifar_cls)   transfer cifar cifar cifar100 7.5e-6 1000 ;;
        cifar10_cls) transfer cifar10 cifar cifar10 7.5e-6 1000 ;;
        cars_cls)    transfer cars cars cars 7.5e-5 1000 ;;
        flwrs_cls)   transfer flwrs flwrs flowers 7.5e-6 1000 ;;
        inat_cls)    transfer inat inat/2018 inat2018 "$(small 5e-5 7.5e-6)" 360 --reprob 0.1 ;;
        inat19_cls)  transfer inat19 inat/2019 inat2019 "$(small 2.5e-5 7.5e-6)" 360 --reprob 0.1 ;;
        paris_oxford_reid)  # the reference's settings
            script=evaluation/eval_image_retrieval.py data=${at}data/revisited_paris_oxford folders="rparis6k roxford5k"
            features=own fixed=(--dataset rparis6k roxford5k --imsize 512 --multiscale true
                                --avgpool_patchtokens "${AVGPOOL:-0}") ;;
        copydays_copydet | copydays_copydey)
            script=evaluation/eval_copy_detection.py data=${at}data/copydays folders="original strong" features=own ;;
        *) return 1 ;;
    esac
}

# transfer SUB FOLDER DATASET LR EPOCHS [flags]: the rest of a row of the table (Table 7, batches of 96).
transfer() {
    script=evaluation/eval_cls.py data=${at}data/$2 folders='' sub=cls/$1 features=''
    fixed=(--dataset "$3" --lr "$4" --epochs "$5" "${@:6}")
}

# segmentation SUB [flags]: the rest of a row of the table; the recipe is the network's, see its help.
segmentation() {
    script=evaluation/semantic_segmentation/train.py runs=together data=${at}data/ade/ADEChallengeData2016
    folders="images annotations" sub=$1 features='' fixed=("${@:2}")
}

# The first of two values if ARCH is a small network, else the second.
small() {
    case $arch in *small) echo "$1" ;; *) echo "$2" ;; esac
}

die() {
    echo "run.sh: $*" >&2
    exit 2
}

quoted() {
    local line
    line=$(printf '%q ' "$@")
    printf '%s\n' "${line% }"
}

# Prints the command, quoted for a shell, and runs it unless DRY_RUN is set; returns its exit code.
#
# Schedulers signal this shell alone, and bash would wait for the command to end before it looked at that. So the command
# runs in the background, signals are passed on to it, and it is waited for until it has ended. `usr1` is the signal that
# it gets for SIGUSR1, `signalled` the last one that came.
run() {
    quoted "$@"
    [ "${DRY_RUN:-0}" != 0 ] || supervised "$@"
}

supervised() {
    local code=127 status again child=""
    signalled=""
    trap 'pass_on HUP HUP' HUP
    trap 'pass_on INT INT' INT
    trap 'pass_on TERM TERM' TERM
    trap 'pass_on USR1 "${usr1:-USR1}"' USR1
    set -m  # a process group of its own: without, bash lets background commands ignore SIGINT, and Ctrl-C would come twice
    "$@" &
    child=$!
    set +m
    [ -z "$signalled" ] || pass_on "$signalled" TERM  # it came before there was a child
    while :; do
        again="" status=0
        wait "$child" || status=$?
        [ "$status" = 127 ] || code=$status  # 127: it had been waited for already, when the last signal came
        [ -n "$again" ] || break
    done
    trap - HUP INT TERM USR1
    [ -z "$signalled" ] || [ "$code" != 0 ] || code=$((128 + $(kill -l "$signalled")))  # nothing more is to be started
    return "$code"
}

# stopped NAME CODE COMMAND: ends after the pre-training NAME has failed or was stopped, in which case COMMAND goes on.
stopped() {
    if [ "$2" = 75 ] || [ -n "$signalled" ]; then
        echo "run.sh: $1 was stopped (code $2); to go on: $3" >&2
    else
        echo "run.sh: $1 failed with code $2; nothing after it was run" >&2
    fi
    exit "$2"
}

pass_on() {
    signalled=$1 again=yes
    local target=$child name=$2
    [ -z "${group-}" ] || target=-$child name=TERM  # to all of its group; background commands of a shell ignore SIGINT
    [ -z "$child" ] || kill -s "$name" -- "$target" 2>/dev/null || true
}

# Value of the flag $1 among the other arguments (the last one counts); empty when it is not there.
flag_value() {
    local flag=$1 value=""
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# check_integer NAME VALUE MINIMUM
check_integer() {
    case $2 in
        '' | *[!0-9]* | 0?*) die "$1 must be an integer from $3 on, not '$2'" ;;
    esac
    [ "$2" -ge "$3" ] || die "$1 must be an integer from $3 on, not '$2'"
}

# ---------------------------------------------------------------- environment of quickstart and test

# Fails, with what is wrong as its output, unless the Python $1 imports all of requirements.txt in sufficient versions.
has_packages() {
    "$1" - "$root/requirements.txt" 2>/dev/null <<'EOF'
import importlib
import re
import sys
from importlib import metadata


def numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


def lack(what):
    print(what)
    sys.exit(1)


for line in open(sys.argv[1]):
    name, least = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
    try:
        module = importlib.import_module({"pillow": "PIL", "scikit-learn": "sklearn", "pytest-xdist": "xdist"}.get(name, name))
    except Exception:  # a half-finished install can fail in any way
        lack(f"no {name}")
    version = getattr(module, "__version__", None) or metadata.version(name)  # pycocotools has none
    if numbers(version) < numbers(least):
        lack(f"{name} {version}, older than {least}")
EOF
}

# Sets `python` to an interpreter with the packages; installs them where there is none yet.
set_up() {
    local venv=${VENV:-$root/.venv} lack
    command -v "$python" >/dev/null || die "no $python here: Python 3.10 or newer is needed (PYTHON names another one)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed; $python is $("$python" --version 2>&1) (PYTHON names another one)"
    if [ -z "${VENV:-}" ]; then
        lack=$(has_packages "$python") && return
        echo "$python has $lack; looking in $venv"
    fi
    if ! [ -x "$venv/bin/python" ] || ! lack=$(has_packages "$venv/bin/python"); then
        echo "Installing requirements.txt into $venv: a few GB, this once."
        "$python" -m venv "$venv" || die "$python -m venv $venv failed (Debian and Ubuntu: apt install python3-venv)"
        "$venv/bin/python" -m pip install -r "$root/requirements.txt" || die "the packages could not be installed; see above"
        lack=$(has_packages "$venv/bin/python") || die "$venv still has $lack: remove that folder and start again"
    fi
    python=$venv/bin/python
}

# ---------------------------------------------------------------- quickstart and test

quickstart() {
    # One core is left for the loader: torch's threads wait for one another, and would wait for it too.
    local cores
    cores=$("$python" -c 'import os; print(os.cpu_count())')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores - 1 : 1))}
    # Found by trial for 2 cores (benchmarks/quickstart.md). So few updates collapse unless the teacher is fast and targets
    # and features are kept apart: by Sinkhorn-Knopp centres and KoLeo, which are DINOv2's and not iBOT's.
    local settings=(
        --arch vit_nano --drop_path 0 --head_hidden_dim 512 --out_dim 1024 --shared_head true --momentum_teacher 0.95
        --centering sinkhorn --koleo 0.5 --warmup_teacher_temp 0.02 --teacher_temp 0.02 --teacher_patch_temp 0.04
        --warmup_teacher_temp_epochs 0 --pred_ratio 0 0.3 --pred_ratio_var 0 0.2
        --batch_size_per_gpu 64 --lr 0.004 --warmup_epochs 2 --weight_decay_end 0.04  # peak 0.004 * 64 / 256
        --num_workers 1 --saveckp_freq 0 --print_freq 20 --use_fp16 false  # the same figures on every CPU
    )
    local data output files
    data=$(flag_value --data_path "$@")
    output=$(flag_value --output_dir "$@")
    if [ -z "$data" ]; then  # drawings of 8 x 8 pixels, hence 16 x 16 and patches of 4
        run "$python" "${at}analysis/quickstart.py" data --output_dir "${at}data/digits"
        settings+=(--data_path "${at}data/digits/train" --patch_size 4 --global_crops_size 16 --global_crops_scale 0.5 1
                   --augment none --color_jitter 0.8 0.4 0.4 0 0 --pixel_stats auto --epochs 60)
    else  # photographs, each taken as often as a quarter of an hour allows
        files=$("$python" "${at}analysis/quickstart.py" count "$@" 2>/dev/null) || files=0  # training says what is wrong
        settings+=(--patch_size 8 --global_crops_size 64 --global_crops_scale 0.3 1 --epochs $((60000 / (files + 1) + 2)))
    fi
    if [ -z "$output" ]; then
        output=${at}work_dirs/quickstart
        settings+=(--output_dir "$output")
        # Only the toy is overwritten, and not when it is resumed.
        [ -n "$(flag_value --load_from "$@")$(flag_value --data_path "$@")" ] || settings+=(--overwrite true)
    fi
    run "$python" "${at}main_ibot.py" "${settings[@]}" "$@" ||
        stopped quickstart $? "$(quoted bash "$0" quickstart "$@"), with --load_from auto"
    run "$python" "${at}analysis/quickstart.py" report --output_dir "$output"
}

# Scenes of digits, detected and segmented from pre-trained and from random weights with the same flags and budget.
dense_demo() {
    local output=${OUTPUT_DIR:-${at}work_dirs/dense_demo} scenes=${at}data/scenes digits=${at}data/digits
    local trained=${PRETRAINED:-${at}work_dirs/quickstart/checkpoint.pth}
    [ "${DRY_RUN:-0}" != 0 ] || [ -f "$trained" ] ||
        die "dense_demo: no checkpoint $trained; ./run.sh quickstart makes one, PRETRAINED names another"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    [ -d "$digits/val" ] || run "$python" "${at}analysis/quickstart.py" data --output_dir "$digits"
    run "$python" "${at}analysis/dense_demo.py" data --digits "$digits" --output_dir "$scenes"
    local common=(--arch vit_nano --patch_size 4 --drop_path 0 --num_workers 0 --use_fp16 false --overwrite true)
    both_starts det "${at}evaluation/object_detection/train.py" "${common[@]}" --data_path "$scenes/coco" \
        --grid 8 16 --short_sides 32 --long_side 64 --crop_sides 32 40 --crop_range 24 32 --test_side 32 --flip 0 \
        --channels 32 --hidden 64 --anchor_scale 4 --sampled 32 --train_proposals 200 --test_proposals 100 \
        --lr 2e-3 --layer_decay 0.6 --epochs 18 --drops 15 --warmup_iters 20 --batch_size_per_gpu 4 --print_freq 25 "$@"
    common+=(--num_classes 6 --crop_size 32 --short_side 32 --long_side 96 --slide_stride 21 --batch_size_per_gpu 8
             --warmup_iterations 20 --print_freq 100)
    both_starts seg "${at}evaluation/semantic_segmentation/train.py" "${common[@]}" --data_path "$scenes/ade" \
        --width 32 --lr 3e-3 --layer_decay 0.4 --iterations 600 --epoch_iterations 300 "$@"
    both_starts seg_linear "${at}evaluation/semantic_segmentation/train.py" "${common[@]}" --data_path "$scenes/ade" \
        --head linear --lr 3e-2 --iterations 400 --epoch_iterations 400 "$@"
    run "$python" "${at}analysis/dense_demo.py" report --output_dir "$output"
}

# both_starts NAME SCRIPT [flags]: the training from the checkpoint `trained` and from random weights at once, on a core each,
# into `output`/NAME; what the second prints goes into a file.
both_starts() {
    local group=yes log=$output/$1/random.txt
    local first=("$python" "$2" --pretrained_weights "$trained" --output_dir "$output/$1/pretrained" "${@:3}")
    local second=("$python" "$2" --pretrained_weights random --output_dir "$output/$1/random" "${@:3}")
    quoted "${first[@]}"
    quoted "${second[@]}"
    [ "${DRY_RUN:-0}" = 0 ] || return 0
    mkdir -p "$output/$1"
    supervised both || stopped "dense_demo" $? "the same command, which starts over; see also $log"
}

# Runs the commands in the arrays `first` and `second`; fails with the code of one that failed.
both() {
    local child status code=0 children=()
    trap : HUP INT TERM USR1  # the commands get them too, and are waited for
    "${first[@]}" &
    children+=($!)
    "${second[@]}" >"$log" 2>&1 &
    children+=($!)
    for child in "${children[@]}"; do
        while :; do
            status=0
            wait "$child" || status=$?
            kill -0 "$child" 2>/dev/null || break  # else a signal ended the waiting
        done
        [ "$status" = 0 ] || code=$status
    done
    return "$code"
}

# ---------------------------------------------------------------- tasks

# Starts the script $1 with the other arguments: on all nodes if the task runs so, else on this one. A single process needs
# no launcher, which would turn every exit code into 1 and end at SIGUSR1 without its processes.
launch() {
    local start=("$python") usr1=USR1 code=0
    if [ "$runs" = together ] && [ "$nodes" -gt 1 ]; then
        start+=(-m torch.distributed.run --nnodes "$nodes" --node_rank "$node" --master_addr "${MASTER_ADDR:-127.0.0.1}"
                --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$per_node")
        usr1=TERM
    elif [ "$per_node" -gt 1 ]; then
        start+=(-m torch.distributed.run --standalone --nproc_per_node "$per_node")
        usr1=TERM
    elif [ -n "${SLURM_PROCID:-}${RANK:-}" ]; then
        start=(env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 "$python")  # alone, whatever step of a job this is
    fi
    run "${start[@]}" "$@" || code=$?
    [ "$code" != 0 ] || return 0
    [ "$name" != imagenet_pretrain ] && { [ -n "$features" ] || [ "$code" != 75 ]; } || stopped "$name" "$code" "$again_with"
    echo "run.sh: $name failed with code $code; nothing after it was run" >&2
    exit "$code"
}

# run_tasks TYPE JOB_NAME ARCH KEY GPUS [flags]
run_tasks() {
    local names=() keys=() extra=() flags=() given=() place=() linear=() kept=() part name i first step own
    local script runs data folders sub features fixed
    local imagenet=${DATA_PATH:-${at}data/imagenet}

    # The table needs these two; the rest is checked below.
    local arch=${3-} subset=""
    if [ $# -gt 5 ]; then
        subset=$(flag_value --train_subset "${@:6}")
        [ -n "$subset" ] || [ "${1#*pretrain}" != "$1" ] || subset=$(flag_value --data_path "${@:6}")
    fi
    subset=${subset:-${DATA_PATH:-}}
    subset=${subset%/}

    local rest=$1+ pretrains=""
    while [ -n "$rest" ]; do
        part=${rest%%+*}
        rest=${rest#*+}
        task "$part" || die "unknown TYPE '$part'; known: ${TASKS// /, } (joined with +), quickstart, dense_demo, report, test"
        if [ "$part" = imagenet_pretrain ]; then pretrains=yes; else names+=("$part"); fi
    done
    if [ -n "$pretrains" ]; then  # one rate has no flag to come from then: the sweep is run in its place, as in the reference
        rest=" imagenet_pretrain "
        for part in ${names[@]+"${names[@]}"}; do
            [ "$part" != imagenet_linear_solo ] || part=imagenet_linear
            case $rest in *" $part "*) ;; *) rest="$rest$part " ;; esac
        done
        read -r -a names <<<"$rest"
    fi

    local missing=JOB_NAME,ARCH,KEY,GPUS
    for i in 2 3 4 5; do
        [ $# -ge $i ] || die "missing after TYPE: ${missing//,/ }; usage: ./run.sh TYPE JOB_NAME ARCH KEY GPUS [flags]"
        missing=${missing#*,}
    done
    local job=$2 gpus=$5
    IFS=, read -r -a keys <<<"${4// /}"
    extra=("${@:6}")
    if [ -z "$job" ] || [ -z "$arch" ] || [ ${#keys[@]} = 0 ]; then die "JOB_NAME, ARCH and KEY must not be empty"; fi
    check_integer GPUS "$gpus" 1

    local nodes=${TOTAL_NODES:-1} node=${NODE_ID:-0} most=${MAX_GPUS:-8}
    check_integer TOTAL_NODES "$nodes" 1
    check_integer NODE_ID "$node" 0
    check_integer MAX_GPUS "$most" 1
    [ "$node" -lt "$nodes" ] || die "NODE_ID $node must be below TOTAL_NODES $nodes"
    local per_node=${GPUS_PER_NODE:-$((gpus < most ? gpus : most))}
    check_integer GPUS_PER_NODE "$per_node" 1

    case $arch in
        *small* | *swin*) linear=("${LINEAR_N_LAST_BLOCKS:-4}" "${LINEAR_AVGPOOL:-0}") ;;
        *) linear=("${LINEAR_N_LAST_BLOCKS:-1}" "${LINEAR_AVGPOOL:-2}") ;;
    esac
    check_integer LINEAR_N_LAST_BLOCKS "${linear[0]}" 1
    check_integer LINEAR_AVGPOOL "${linear[1]}" 0
    check_integer AVGPOOL "${AVGPOOL:-0}" 0
    linear=(--n_last_blocks "${linear[0]}" --avgpool_patchtokens "${linear[1]}")

    local output=${OUTPUT_DIR:-${at}work_dirs/$job}
    local checkpoint=${PRETRAINED:-$output/checkpoint.pth}
    if [ -n "$pretrains" ] && [ "$checkpoint" != "$output/checkpoint.pth" ]; then
        die "PRETRAINED is $checkpoint, but this command evaluates what it pre-trains: unset it"
    fi
    for name in --arch --output_dir --results_dir --pretrained_weights --checkpoint_key; do
        [ "$name ${names[*]}" != "--output_dir davis_viseg" ] || continue  # of the masks; results.json stays
        [ -z "$(flag_value $name ${extra[@]+"${extra[@]}"})" ] ||
            die "$name cannot be passed on: ARCH, KEY and the variables OUTPUT_DIR and PRETRAINED set it"
    done

    # Other data sets have other folders, which the evaluations look into.
    local dataset=""
    [ -n "$pretrains" ] || dataset=$(flag_value --dataset ${extra[@]+"${extra[@]}"})
    [ "$dataset" != imagefolder ] || dataset=""
    local download=""
    for part in ${extra[@]+"${extra[@]}"}; do
        case $part in --download | --download=*) download=--download ;; esac
    done

    # What is missing shows before the first task starts, not days later.
    if [ "${DRY_RUN:-0}" = 0 ]; then
        for name in "${names[@]}"; do
            task "$name"
            [ -z "$dataset" ] || break
            [ "$features$download" != --download ] || continue  # it makes its folder
            own=""
            [ -n "$pretrains" ] && [ "$name" != imagenet_pretrain ] || own=$(flag_value --data_path ${extra[@]+"${extra[@]}"})
            for part in "" $folders; do
                part=${own:-$data}${part:+/$part}
                [ -e "$part" ] || die "$name: no folder $part; put the data there, or set DATA_PATH or --data_path"
            done
        done
        [ -n "$pretrains" ] || [ "$checkpoint" = random ] || [ -f "$checkpoint" ] ||
            die "no checkpoint $checkpoint to evaluate; PRETRAINED names another one"
    fi

    # A run that is there already goes on, or says that it is finished.
    local resume=() again_with
    again_with=$(quoted bash "$0" "$@")
    if [ -n "$(flag_value --overwrite ${extra[@]+"${extra[@]}"})" ]; then
        again_with="$again_with, without --overwrite"
    elif [ -z "$(flag_value --load_from ${extra[@]+"${extra[@]}"})$(flag_value --resume ${extra[@]+"${extra[@]}"})" ]; then
        resume=(--load_from auto)
    fi

    # Each evaluation of frozen features keeps what it extracts, for the others.
    i=0
    for name in "${names[@]}"; do
        task "$name"
        if [ "$name" != imagenet_pretrain ] && [ "$features" = shared ]; then i=$((i + 1)); fi
    done
    if [ "$i" -gt 1 ] && { [ -n "$pretrains" ] ||
        [ -z "$(flag_value --dump_features ${extra[@]+"${extra[@]}"})$(flag_value --load_features ${extra[@]+"${extra[@]}"})" ]; }; then
        kept=(--dump_features "$output/features" --load_features "$output/features")
    fi

    for name in "${names[@]}"; do
        task "$name"
        own="" given=() place=()
        if [ -z "$pretrains" ] || [ "$name" = imagenet_pretrain ]; then
            own=$(flag_value --data_path ${extra[@]+"${extra[@]}"})
            given=(${extra[@]+"${extra[@]}"})
            [ -z "$sub" ] && [ "$name" != imagenet_pretrain ] || given+=(${resume[@]+"${resume[@]}"})
        elif [ -n "$sub" ]; then
            given=(--load_from auto --overwrite true)  # what began with the network before it was trained on is done again
        fi
        if [ -z "$own" ] && [ -z "$dataset" ]; then
            place=(--data_path "$data")
        elif [ -z "$own" ] && [ -n "${DATA_PATH:-}" ]; then
            place=(--data_path "$DATA_PATH")
        fi
        if [ "$name" = imagenet_pretrain ]; then
            launch "$at$script" ${place[@]+"${place[@]}"} --arch "$arch" --output_dir "$output" ${given[@]+"${given[@]}"}
            continue
        fi
        first=$node step=$nodes
        [ "$runs" != together ] || first=0 step=1
        for ((i = first; i < ${#keys[@]}; i += step)); do
            flags=(--output_dir "$output")
            [ -z "$sub" ] || flags=(--output_dir "$output/$sub/${keys[$i]}" --results_dir "$output")
            flags+=(${fixed[@]+"${fixed[@]}"})
            [ "$features" != shared ] || flags+=(${kept[@]+"${kept[@]}"})
            flags+=(${given[@]+"${given[@]}"})
            launch "$at$script" --pretrained_weights "$checkpoint" --checkpoint_key "${keys[$i]}" \
                ${place[@]+"${place[@]}"} --arch "$arch" "${flags[@]}"
        done
    done
}

# report JOB_NAME [JOB_NAME...]
report() {
    [ $# -gt 0 ] || die "usage: ./run.sh report JOB_NAME [JOB_NAME...]"
    [ $# = 1 ] || [ -z "${OUTPUT_DIR:-}" ] || die "OUTPUT_DIR names one folder: unset it for a report of $# jobs"
    local job output=()
    for job in "$@"; do output+=("${OUTPUT_DIR:-${at}work_dirs/$job}"); done
    for job in "${output[@]}"; do
        [ "${DRY_RUN:-0}" != 0 ] || [ -d "$job" ] || die "no folder $job with results; OUTPUT_DIR names another one"
    done
    run "$python" "${at}evaluation/report.py" --output_dir "${output[@]}"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Prefix of this repository's files: none where it is the current folder, so that commands and paths stay short.
if [ "$PWD" -ef "$root" ]; then at=""; else at=$root/; fi
python=${PYTHON:-python3}

case ${1-} in
    "") usage >&2; exit 2 ;;
    -h | --help) usage ;;
    quickstart)
        shift
        for flag in "$@"; do
            case $flag in -h | --help) usage; exit ;; esac
        done
        [ "${DRY_RUN:-0}" != 0 ] || set_up
        quickstart "$@"
        ;;
    dense_demo)
        shift
        [ "${DRY_RUN:-0}" != 0 ] || set_up
        dense_demo "$@"
        ;;
    test)
        shift
        [ "${DRY_RUN:-0}" != 0 ] || set_up
        cd "$root"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        set -- -q -n 2 tests "$@"  # two at a time; -n 0 for debuggers
        quoted "$python" -m pytest "$@"
        [ "${DRY_RUN:-0}" != 0 ] || exec "$python" -m pytest "$@"
        ;;
    plan)
        shift
        run "$python" "${at}benchmarks/plan.py" "$@"
        ;;
    report)
        shift
        case ${1-} in -h | --help) usage; exit ;; esac
        report "$@"
        ;;
    *) run_tasks "$@" ;;
esac
