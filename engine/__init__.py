"""The run engine: everything that surrounds a training step, once. A file a trade."""
from engine.bad_images import BAD_IMAGES, bad_files, check_images, gather_bad_images, write_bad_images
from engine.checkpoint import (
    SAFE_GLOBALS,
    backbone_state_dict,
    load_backbone,
    load_checkpoint,
    load_optimizer,
    load_scaler,
    load_strictly,
    locked,
    network_state_dict,
    printable,
    replacing,
    safetensors_metadata,
    save_atomically,
    stored_args,
    without_prefix,
)
from engine.device import (
    check_compiler,
    choose_amp_dtype,
    choose_device,
    collecting_by_hand,
    default_workers,
    peak_flops,
    peak_memory_mib,
    random_state,
    set_random_state,
    use_fast_products,
)
from engine.errors import EXIT_PREEMPTED, InputError, Preempted, one_line
from engine.files import CHECKPOINT, FREE_FLAGS, PREVIOUS, PROGRESS, Files, changed_flags, check_output, read_checkpoint
from engine.flags import (
    SEVERAL,
    SWITCH,
    add_bad_image_flags,
    add_compile_flags,
    add_device_flags,
    add_precision_flags,
    add_run_flags,
    bool_flag,
    check_numbers,
    need,
)
from engine.log import (
    MAX_DROPPED,
    DeviceMeters,
    add_row,
    append_log,
    close_writer,
    count_step,
    describe_run,
    eta_string,
    git_commit,
    log_scalars,
    mean_of,
    say_once,
    trim_log,
)
from engine.parts import Named, load_part, state_of
from engine.process import (
    Process,
    all_reduce_mean,
    data_parallel,
    gather_parts,
    get_rank,
    get_world_size,
    host_reduce,
    init_process,
    is_main_process,
)
from engine.stop import StopSignals, ignore_signals, run
from engine.training import Run
