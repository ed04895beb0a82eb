"""Flags of fine-tuning, in all its protocols, and their checks."""
import math

import engine
from evaluation.common.arguments import evaluation_parser, int_from


def finetune_parser(description):
    """All flags, with the defaults of fine-tuning on ImageNet; see `reference_flags.our_words` for other spellings."""
    parser = evaluation_parser(description, frozen=False)
    parser.set_defaults(output_dir=".", n_last_blocks=1)  # a constant, recorded beside the pooling

    network = parser.add_argument_group("network")
    network.add_argument("--avgpool_patchtokens", type=int, choices=(0, 1), default=0,
                         help="what the head gets: 0, the [CLS] token; 1, the mean patch token through a norm of its own")
    network.add_argument("--finetune_head_layer", type=int, choices=(0, 1, 2, 3), default=0,
                         help="layers of the pre-trained projection head to keep below the classifier")
    network.add_argument("--init_scale", type=float, default=0.001, help="factor of the classifier's first weights")
    network.add_argument("--drop_path", type=float, help="of the last block, rising from 0 at the first; by default 0.1, "
                                                         "for Swin-S, -B and -L 0.2")
    network.add_argument("--drop", type=float, default=0.0, help="dropout behind attention and in the MLPs")
    network.add_argument("--attn_drop_rate", type=float, default=0.0, help="dropout of attention weights")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", type=int_from(1), default=100)
    optim.add_argument("--lr", default="0.001", help="peak rate; of a comma list all are run in turn, in sub-folders, and "
                                                     "the best is reported")
    optim.add_argument("--lr_for_batch", type=int_from(0), default=0,
                       help="images of the total batch that --lr is meant for, scaled linearly; 0: it is taken as it is")
    optim.add_argument("--schedule", choices=("step", "epoch"), default="step",
                       help="step: linear from 0, then cosine, anew at each step (BEiT); epoch: linear from --warmup_lr, "
                            "then cosine, constant in an epoch and an epoch late (DeiT)")
    optim.add_argument("--warmup_epochs", type=int_from(0), default=20)
    optim.add_argument("--warmup_lr", type=float, default=1e-6, help="first rate of --schedule epoch")
    optim.add_argument("--min_lr", type=float, default=1e-6, help="last rate")
    optim.add_argument("--layer_decay", type=float, default=1.0,
                       help="factor of the rate from each block to the one below it; 1: all have the same rate")
    optim.add_argument("--weight_decay", type=float, default=0.05)
    optim.add_argument("--weight_decay_end", type=float, help="value at the end of a cosine; by default it stays")
    optim.add_argument("--decay_positions", default=False, help="decay position embedding and [CLS] token too",
                       **engine.SWITCH)
    optim.add_argument("--clip_grad", type=float, default=0.0, help="largest norm of all gradients together; 0: any")
    optim.add_argument("--accum_iter", type=int_from(1), default=1, help="batches per process to add up for each update")
    optim.add_argument("--model_ema", default=False, help="also keep a moving average of the weights", **engine.SWITCH)
    optim.add_argument("--model_ema_decay", type=float, default=0.9999)
    engine.add_precision_flags(optim)

    augment = parser.add_argument_group("augmentation of training images")
    augment.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of a policy, or none",
                         type=lambda text: None if text.lower() == "none" else text)
    augment.add_argument("--color_jitter", type=float, default=0.4, help="only without --aa")
    augment.add_argument("--hflip", type=float, default=0.5, help="probability of a flip; 0 for digits and the like")
    augment.add_argument("--train_interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    augment.add_argument("--reprob", type=float, default=0.25, help="probability of random erasing")
    augment.add_argument("--remode", choices=("pixel", "rand", "const"), default="pixel")
    augment.add_argument("--recount", type=int_from(1), default=1, help="most boxes erased from an image")
    augment.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup; 0: off")
    augment.add_argument("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0: off")
    augment.add_argument("--cutmix_minmax", type=float, nargs=2, help="sides of the box as shares; replaces --cutmix")
    augment.add_argument("--mixup_prob", type=float, default=1.0, help="of mixing at all")
    augment.add_argument("--mixup_switch_prob", type=float, default=0.5, help="of CutMix where both are on")
    augment.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch")
    augment.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    augment.add_argument("--repeated_aug", default=False, help="each image three times in an epoch of a third of them",
                         **engine.SWITCH)
    engine.add_bad_image_flags(augment)

    validation = parser.add_argument_group("validation")
    validation.add_argument("--crop_pct", type=float, help="share of the resized image's side that is looked at; by "
                                                           "default 224/256, from 384 pixels on (and up to 32) 1")
    validation.add_argument("--val_interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    validation.add_argument("--val_freq", type=int_from(1), default=1, help="epochs between validations; the last has one")
    validation.add_argument("--eval", default=False, help="only validate the best weights, or those of --load_from",
                            **engine.SWITCH)

    files = parser.add_argument_group("files")
    engine.add_run_flags(files, overwrite="; with --load_from auto only if that was another one")
    files.add_argument("--save_ckpt_freq", type=float, default=0,
                       help="also keep checkpoint-EPOCH.pth every so many percent of the epochs; 0: never")

    old = parser.add_argument_group("for command lines of the reference")
    old.add_argument("--enable_deepspeed", action="store_true",
                     help="ignored: batches add up by --accum_iter, and bfloat16 needs no loss scale")
    old.add_argument("--log_dir", help="ignored: TensorBoard's events go to tf_logs/ in the output folder")
    old.add_argument("--nb_classes", type=int_from(0), default=0, help="number of classes that there must be; 0: any")
    old.add_argument("--out_dim", type=int_from(1),
                     help="outputs that the projection head must have with --finetune_head_layer 3")
    return parser


def transfer_parser(description):
    """The flags with the defaults of transfer and of few labels (DeiT's recipe)."""
    parser = finetune_parser(description)
    parser.set_defaults(epochs=300, lr="0.0005", lr_for_batch=512, schedule="epoch", warmup_epochs=5, min_lr=1e-5,
                        init_scale=1.0, decay_positions=True, repeated_aug=True, model_ema=True, model_ema_decay=0.99996,
                        crop_pct=224 / 256)
    return parser


def check_args(args):
    """The learning rates of `args`, a list. Raises `engine.InputError` for values that cannot be trained with."""
    need = engine.need
    try:
        rates = [float(part) for part in args.lr.split(",")]
    except ValueError:
        raise engine.InputError(f"--lr {args.lr}: expected a number or a comma list of numbers") from None
    need(all(0 < rate < math.inf for rate in rates), f"--lr {args.lr}: rates must be above 0")
    need(len(set(rates)) == len(rates), f"--lr {args.lr}: a rate is there twice")
    engine.check_numbers(
        args, count="print_freq",
        not_negative="min_lr warmup_lr weight_decay weight_decay_end clip_grad mixup cutmix init_scale color_jitter "
                     "save_ckpt_freq save_every_steps save_every_minutes max_bad_images seed",
        share="hflip reprob mixup_prob mixup_switch_prob model_ema_decay",
        below_1="drop_path drop attn_drop_rate smoothing")
    need(args.seed < 2**63, f"--seed must be below 2^63: {args.seed}")
    need(0 < args.layer_decay <= 1, f"--layer_decay must be above 0 and at most 1: {args.layer_decay}")
    need(args.crop_pct is None or 0 < args.crop_pct <= 1, f"--crop_pct must be above 0 and at most 1: {args.crop_pct}")
    if args.cutmix_minmax:
        low, high = args.cutmix_minmax
        need(0 <= low < high <= 1, f"--cutmix_minmax takes two shares 0 <= low < high <= 1, not {low} {high}")
    need(not is_mixing(args) or args.batch_size_per_gpu % 2 == 0,
         f"--batch_size_per_gpu {args.batch_size_per_gpu}: mixup and CutMix need an even number")
    return rates


def is_mixing(args):
    return bool((args.mixup or args.cutmix or args.cutmix_minmax) and args.mixup_prob)
