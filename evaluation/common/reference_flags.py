"""Command lines of the reference's fine-tuning scripts, turned into those of ours."""
import re

import engine

# Names of flags (hyphens count as underscores) and words for what has other ones here.
RENAMED = {"batch_size": "batch_size_per_gpu", "data_set": "dataset", "finetune": "pretrained_weights",
           "input_size": "image_size", "model": "arch", "model_key": "checkpoint_key", "resume": "load_from",
           "update_freq": "accum_iter"}
SWITCHES = {"auto_resume": ["--load_from", "auto"], "no_model_ema": ["--model_ema", "false"],
            "no_repeated_aug": ["--repeated_aug", "false"], "use_cls": ["--avgpool_patchtokens", "0"],
            "use_mean_pooling": ["--avgpool_patchtokens", "1"]}
DATA_WORDS = {"CIFAR": "cifar100", "CIFAR10": "cifar10", "Cars": "cars", "Flwrs": "flowers", "IMNET": "imagefolder",
              "INAT": "inat2018", "INAT19": "inat2019", "image_folder": "imagefolder"}
# Flags that change nothing: they say what is so here, did nothing there either, or belong to what is off.
NEUTRAL = {"abs_pos_emb", "cooldown_epochs", "decay_epochs", "decay_rate", "disable_rel_pos_bias",
           "disable_weight_decay_on_bias_norm", "disable_weight_decay_on_cls_pos", "disable_weight_decay_on_rel_pos_bias",
           "dist_eval", "distill_epochs", "distillation_alpha", "distillation_tau", "imagenet_default_mean_and_std",
           "learned_abs_pos_emb", "lr_noise_pct", "lr_noise_std", "model_ema_force_cpu", "momentum", "no_auto_resume",
           "no_pin_mem", "patience_epochs", "pin_mem", "resplit", "save_ckpt", "teacher_model", "teacher_path",
           "world_size"}
# Those that change nothing with one value (None: with none), and what to do instead of another.
ONE_VALUE = {
    "disable_eval_during_finetuning": (None, "give --val_freq N; the last epoch is always validated"),
    "disable_learned_abs_pos_emb": (None, "the checkpoint's position embedding is trained on; leave the flag out"),
    "dist_on_itp": (None, "start the processes with torchrun, run.sh or srun; leave the flag out"),
    "distillation_type": ("none", "there is no distillation; leave the flag out"),
    "eval_data_path": (None, "put the validation images into val/ beside train/ in --data_path"),
    "inat_category": ("name", "classes are the species; leave the flag out"),
    "layer_scale_init_value": ("0", "these networks have no layer scale; leave the flag out"),
    "lr_noise": (None, "there is no noise on the rate; leave the flag out"),
    "model_prefix": ("", "prefixes module. and backbone. are known; rename others in the file"),
    "no_save_ckpt": (None, "checkpoint.pth, from which a stopped run goes on, is always written; leave the flag out"),
    "opt": ("adamw", "there is AdamW alone; leave the flag out"),
    "opt_betas": ("0.9 0.999", "AdamW has these betas: 0.9 0.999; leave the flag out"),
    "opt_eps": ("1e-08", "AdamW has this epsilon: 1e-8; leave the flag out"),
    "rel_pos_bias": (None, "these networks have positions of their own, absolute ones; leave the flag out"),
    "sched": ("cosine", "there are cosines alone, see --schedule; leave the flag out"),
    "start_epoch": ("0", "--load_from goes on with the checkpoint's epoch; leave the flag out"),
    "warmup_steps": ("-1", "give --warmup_epochs"),
}


def our_words(words):
    """A command line with the reference's flags and data sets -> the same with those of `finetune_parser`.

    Flags of the reference that change nothing are left out. Raises InputError for values of them that would.
    """
    groups, out = [], []  # of a flag and the words after it
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for flag, *values in groups:
        if not flag.startswith("--"):
            out += [flag, *values]
            continue
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        given = [value] * bool(equals) + values
        if name in ONE_VALUE:
            neutral, advice = ONE_VALUE[name]
            if " ".join(map(_plain, given)) != neutral:
                raise engine.InputError(f"{' '.join([f'--{name}', *given])}: {advice}")
        elif name not in NEUTRAL and not (name in ("finetune", "resume") and given == [""]):
            renamed = RENAMED.get(name, name)
            if renamed == "dataset":
                value, values = DATA_WORDS.get(value, value), [DATA_WORDS.get(part, part) for part in values]
            out += [*SWITCHES.get(name, [f"--{renamed}{equals}{value}"]), *values]
    return out


def _plain(text):
    """A number as Python writes it; other words as they are."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def override_words(words, names):
    """A command line with mmdetection's and mmsegmentation's `key=value` words -> the same with our flags.

    names: {key: our flag, or None where it changes nothing}. Raises InputError for other keys.
    """
    out = []
    for word in words:
        key, equals, value = word.partition("=")
        if word in ("--cfg-options", "--options"):  # what introduces such words there
            continue
        if word.startswith("-") or not equals or not re.fullmatch(r"[a-z_]+(\.\w+)*", key):
            out.append(word)
        elif key not in names:
            raise engine.InputError(f"{word}: not known here; of these words there are {', '.join(names)}, see --help for "
                                    "what else can be set")
        elif names[key]:
            out += [f"--{names[key]}", *value.strip("[]() ").replace(" ", "").split(",")]
    return out
