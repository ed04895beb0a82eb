"""The pre-trainings of iBOT's paper (Zhou et al., ICLR 2022) by name, for `main_ibot.py --recipe NAME`.

    python main_ibot.py --recipe list                                        # the table
    python main_ibot.py --recipe vit_s16_800ep --epochs 100 --data_path ...  # flags that are given count more

None of them was run here: the numbers are the paper's. What it leaves open is chosen, and said in `note`. The number of
processes and --batch_size_per_gpu are the user's; a run says so if its total batch is not the recipe's. `adapt` is not the
paper's but ours.
"""
import argparse
import difflib
from typing import NamedTuple

from engine import InputError, printable


class Recipe(NamedTuple):
    """flags: words of the command line, of a flag that stands twice the last; source: where the paper has the numbers.

    Top-1 accuracies on ImageNet-1K in percent, None where the paper has none. what: how it differs from its neighbours.
    note: what the paper leaves open. batch: images of an update, of all processes.
    """
    flags: str
    source: str
    what: str
    knn: float | None = None
    linear: float | None = None
    finetuned: float | None = None
    note: str = ""
    batch: int = 1024


# Section 3.2 and the authors' commands.
COMMON = "--shared_head true --norm_last_layer false --out_dim 8192 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30"
RANDOM_MIM = "--pred_ratio 0 0.3 --pred_ratio_var 0 0.2"
LOCAL = "--local_crops_number 10 --global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25"
MULTI_CROP = f"{COMMON} {RANDOM_MIM} {LOCAL}"
SMALL = "--arch vit_small --patch_size 16"
SWIN = f"--arch swin_tiny --patch_size 4 --epochs 300 {MULTI_CROP} --pred_start_epoch 50"
# Section 4.4 and Appendix E: no local crops, mask ratio 0.3, 300 epochs.
TWO_CROPS = f"{COMMON} --pred_ratio 0.3 --pred_ratio_var 0 --local_crops_number 0 --global_crops_scale 0.14 1"
ABLATION = f"{SMALL} --epochs 300 {TWO_CROPS}"
VARIED = "--pred_ratio_var 0.2"
# DINO hides nothing, and has outputs of its own number.
DINO = "--lambda2 0 --use_masked_im_modeling false --out_dim 65536"
# Fixed tokens, with neither [CLS] loss nor second crop (Appendix F).
TOKENS = "--lambda1 0 --global_crops_number 1"
BEIT = f"{TOKENS} --tokenizer file --augment beit --global_crops_scale 0.08 1 --pred_ratio 0.3827"  # of 196 patches 75
SEPARATE = "--shared_head false --shared_head_teacher false"
TWO_HEADS = "--shared_head false --head_sharing"
FIGURE_8 = (f"{SMALL} --epochs 100 {COMMON} --pred_ratio 0.3 --pred_ratio_var 0 --local_crops_number 10 "
            "--global_crops_scale 0.4 1 --local_crops_scale 0.05 0.4")

# What is open, and in brackets what is taken.
AS_SMALL = "open: crops, temperatures, last layer (as ViT-S/16)"
IN_22K = f"{AS_SMALL}. --data_path names ImageNet-22K; the authors' files hold the student"
CROPS = "open: areas of crops (0.14 to 1), [CLS] temperature (to 0.07), last layer (free)"
DINO_K = "open: K (DINO's 65,536), optimiser (iBOT's)"
MARKS = "the table's marks: inferred from the text"
BEIT_OPEN = "open: all settings (ViT-S and optimiser as iBOT's, one crop, 75 masked patches). --tokenizer_file: of DALL-E"
ONE_CROP = "open: crops (one), masks and augmentation (iBOT's)"
FED = "open: which head of the student's the teacher follows ([CLS]'s)"
DENSE = "open: head (shared), weights (1:1), temperatures and K (as iBOT)"
FIG_8 = "open: areas of crops (global from 0.4), local crops (10), mask ratio (0.3)"

RECIPES = {
    # ---- the paper's networks
    "vit_s16_800ep": Recipe(f"{SMALL} --epochs 800 {MULTI_CROP}", "Tables 1, 2, 19", "iBOT", 75.2, 77.9, 82.3,
                            "the text splits areas of crops at 0.32, the authors' command at 0.25"),
    "swin_t7_300ep": Recipe(f"{SWIN} --window_size 7", "Table 1", "iBOT", 75.3, 78.6, batch=1040),
    "swin_t14_300ep": Recipe(f"{SWIN} --window_size 14", "Table 1", "iBOT", 76.2, 79.3, batch=1040),
    "vit_b16_400ep": Recipe(f"--arch vit_base --patch_size 16 --epochs 400 {MULTI_CROP}", "Tables 1, 2", "iBOT",
                            77.1, 79.5, 84.0, f"{AS_SMALL}. Table 10: 76.8, 79.4"),
    "vit_b16_400ep_rand": Recipe(f"--arch vit_base --patch_size 16 --epochs 400 {MULTI_CROP} --pred_shape rand",
                                 "the authors' repository", "iBOT, random masks", 77.3, 79.8, 84.1,
                                 f"{AS_SMALL}; mask ratio (the same)"),
    "vit_l16_250ep": Recipe(f"--arch vit_large --patch_size 16 --epochs 250 {MULTI_CROP}", "Tables 1, 2", "iBOT",
                            78.0, 81.0, 84.8, f"{AS_SMALL}. Tables 1, 15: 300 epochs"),
    "vit_l16_250ep_rand": Recipe(f"--arch vit_large --patch_size 16 --epochs 250 {MULTI_CROP} --pred_shape rand",
                                 "the authors' repository", "iBOT, random masks", 77.7, 81.3, 85.0,
                                 f"{AS_SMALL}; mask ratio (the same)"),
    "in22k_vit_s16_160ep": Recipe(f"{SMALL} --epochs 160 {MULTI_CROP}", "Table 15", "iBOT, ImageNet-22K",
                                  69.3, 76.5, note=IN_22K),
    "in22k_vit_b16_80ep": Recipe(f"--arch vit_base --patch_size 16 --epochs 80 {MULTI_CROP}", "Tables 3, 15",
                                 "iBOT, ImageNet-22K", 71.1, 79.0, 84.4, IN_22K),
    "in22k_vit_l16_50ep": Recipe(f"--arch vit_large --patch_size 16 --epochs 50 {MULTI_CROP}", "Tables 1, 3, 15",
                                 "iBOT, ImageNet-22K", 72.9, 82.3, 86.6, IN_22K),
    "table5_k1000": Recipe(f"{SMALL} --epochs 800 {MULTI_CROP} --out_dim 1000", "Table 5",
                           "iBOT, 1000 outputs for unsupervised classification", note="open: all but K (as vit_s16_800ep)"),
    "dino_vit_s16_800ep": Recipe(f"{SMALL} --epochs 800 {MULTI_CROP} {DINO}", "Tables 1, 2, 19", "DINO",
                                 74.5, 77.0, 82.0, f"{DINO_K}, crops (iBOT's)"),
    "dino_vit_b16_400ep": Recipe(f"--arch vit_base --patch_size 16 --epochs 400 {MULTI_CROP} {DINO}", "Tables 1, 2",
                                 "DINO", 76.1, 78.2, 83.6, f"{DINO_K}, crops (iBOT's)"),
    # ---- Tables 10 and 19: crops and epochs
    "vit_s16_300ep": Recipe(f"{SMALL} --epochs 300 {MULTI_CROP}", "Table 19", "iBOT, ten local crops", linear=77.4),
    "vit_s16_300ep_2crops": Recipe(f"{ABLATION} {VARIED}", "Tables 19, 20", "iBOT, two crops", 70.3, 74.8, 81.5,
                                   f"{CROPS}, mask ratio (0.3 ± 0.2)"),
    "vit_s16_800ep_2crops": Recipe(f"{ABLATION} {VARIED} --epochs 800", "Tables 10, 19", "iBOT, two crops", 72.4, 76.2,
                                   82.0, f"{CROPS}, mask ratio (0.3 ± 0.2)"),
    "vit_b16_400ep_2crops": Recipe(f"--arch vit_base --patch_size 16 --epochs 400 {TWO_CROPS} {VARIED}", "Table 10",
                                   "iBOT, two crops", 71.2, 76.0, note=f"{CROPS}, mask ratio (0.3 ± 0.2)"),
    "dino_vit_s16_300ep": Recipe(f"{SMALL} --epochs 300 {MULTI_CROP} {DINO}", "Table 19", "DINO, ten local crops",
                                 linear=76.2, note=f"{DINO_K}, crops (iBOT's)"),
    "dino_vit_s16_800ep_2crops": Recipe(f"{ABLATION} {DINO} --epochs 800", "Tables 10, 19", "DINO, two crops",
                                        70.0, 73.7, 81.6, DINO_K),
    "dino_vit_b16_400ep_2crops": Recipe(f"--arch vit_base --patch_size 16 --epochs 400 {TWO_CROPS} {DINO}", "Table 10",
                                        "DINO, two crops", 68.9, 72.8, note=DINO_K),
    "table19_beit_300ep": Recipe(f"{ABLATION} {BEIT}", "Table 19", "BEiT", linear=20.7,
                                 note=f"{BEIT_OPEN}. Other tables: 23.5, 24.2"),
    "table19_beit_800ep": Recipe(f"{ABLATION} {BEIT} --epochs 800", "Table 19", "BEiT", linear=24.2, finetuned=81.4,
                                 note=BEIT_OPEN),
    # ---- Table 9: what the patches predict, with and without [CLS] loss
    "table9_ibot": Recipe(ABLATION, "Tables 9, 17, 18, Appendix E", "iBOT, to which the ablations refer",
                          69.1, 74.2, 81.5, CROPS),
    "table9_separate_heads": Recipe(f"{ABLATION} {SEPARATE}", "Table 9", "heads not shared", 69.0, 73.8, 81.5,
                                    "open: which layers (the last, as in the code)"),
    "table9_no_cls": Recipe(f"{ABLATION} --lambda1 0", "Table 9", "no [CLS] loss", 9.5, 29.8, 79.4),
    "table9_dino_tokens": Recipe(f"{ABLATION} {TOKENS} --tokenizer dino", "Tables 9, 20", "tokens of a trained DINO",
                                 44.3, 60.0, 81.7, f"{ONE_CROP}, centring (none). --tokenizer_file: of table9_dino"),
    "table9_beit": Recipe(f"{ABLATION} {BEIT}", "Table 9", "BEiT", 6.9, 23.5, 81.4, BEIT_OPEN),
    "table9_dino": Recipe(f"{ABLATION} {DINO}", "Tables 9, 18, 19, Appendix E", "DINO: no masks, no patch loss",
                          67.9, 72.5, 80.6, DINO_K),
    "table9_beit_dino": Recipe(f"{ABLATION} --tokenizer file", "Table 9", "BEiT and DINO", 48.0, 62.7, 81.2,
                               "open: weights (1:1), augmentation and masks (iBOT's). --tokenizer_file: of DALL-E"),
    # ---- Table 17: head sharing; table9_ibot is its last column
    "table17_vanilla": Recipe(f"{ABLATION} {TWO_HEADS} full --head_sharing_teacher full", "Table 17",
                              "two whole heads", 68.9, 73.9),
    "table17_shared_2layers": Recipe(f"{ABLATION} {TWO_HEADS} mlp2 --head_sharing_teacher mlp2",
                                     "Table 17", "first two layers common", 68.0, 73.7, note=MARKS),
    "table17_semi_2layers": Recipe(f"{ABLATION} {TWO_HEADS} mlp2 --head_sharing_teacher shared", "Table 17",
                                   "student: first two layers common; teacher: one head", 68.4, 73.7,
                                   note=f"{MARKS}; {FED}"),
    "table17_semi": Recipe(f"{ABLATION} {TWO_HEADS} full --head_sharing_teacher shared", "Table 17",
                           "student: two heads; teacher: one", 68.4, 73.8,
                           note=FED),
    # ---- Table 18: targets of patches; table9_ibot and table9_dino are its last rows
    **{f"table18_{name}": Recipe(f"{ABLATION} {flags}", "Table 18", what, knn, linear, note=MARKS + sharp)
       for name, flags, what, knn, linear, sharp in (
           ("soft", "--patch_centering false --warmup_teacher_patch_temp 0.1 --teacher_patch_temp 0.1",
            "softmax, neither centred nor sharpened", 49.8, 63.5, "; open: temperature (the student's, 0.1)"),
           ("hard", "--patch_centering false --patch_targets hard", "arg-max, not centred", 64.8, 71.9, ""),
           ("sharp", "--patch_centering false", "softmax, sharpened, not centred", 69.4, 73.9, ""),
           ("centred_soft", "--warmup_teacher_patch_temp 0.1 --teacher_patch_temp 0.1", "softmax, centred, not sharpened",
            67.8, 72.9, "; open: temperature (the student's, 0.1)"),
           ("centred_hard", "--patch_targets hard", "arg-max, centred", 68.1, 73.3, ""))},
    # ---- Table 20: what tokenizes a patch; vit_s16_300ep_2crops and table9_dino_tokens are its last rows
    "table20_mpp": Recipe(f"{ABLATION} {TOKENS} --tokenizer mpp", "Table 20", "mean colours, 3 bits",
                          16.4, 37.2, 80.8, ONE_CROP),
    "table20_kmeans": Recipe(f"{ABLATION} {TOKENS} --tokenizer kmeans", "Table 20", "4096 clusters of patches", 19.2, 40.1,
                             81.3, f"{ONE_CROP}, details of k-means. --tokenizer_file: of analysis/patch_clusters.py"),
    "table20_beit": Recipe(f"{ABLATION} {BEIT}", "Table 20", "BEiT", 6.9, 24.2, 81.4, f"{BEIT_OPEN}. As table9_beit"),
    # ---- Appendix E
    "dense_position": Recipe(f"{ABLATION} --use_masked_im_modeling false --patch_match position", "Appendix E, dense",
                             "DINO and patches at the same place", 67.1, 72.5,
                             note=DENSE),
    "dense_feature": Recipe(f"{ABLATION} --use_masked_im_modeling false --patch_match feature", "Appendix E, dense",
                            "DINO and patches with similar features", 68.5, 73.4,
                            note=DENSE),
    **{f"center_{m}": Recipe(f"{ABLATION} --patch_center_momentum {m}", "Appendix E, centre and temperature",
                             f"momentum of the patch centre {m}", knn, linear)
       for m, knn, linear in ((0.8, 68.7, 74.0), (0.99, 68.8, 73.8), (0.999, 68.9, 73.8))},
    **{f"temp_{first}_{last}": Recipe(
        f"{ABLATION} --warmup_teacher_patch_temp {first} --teacher_patch_temp {last}", "Appendix E, centre and temperature",
        f"temperature of patch targets {first} to {last}", knn, linear)
       for first, last, knn, linear in ((0.04, 0.06, 68.5, 73.5), (0.05, 0.08, 68.7, 73.9))},
    **{f"ratio_{ratio}": Recipe(f"{ABLATION} --lambda1 1 --lambda2 {1 / ratio:g}", "Appendix E, loss ratio",
                                f"[CLS] loss : patch loss = {ratio}", knn, linear,
                                note="open: which loss is scaled (the quotient in the table's head)")
       for ratio, knn, linear in ((0.5, 68.7, 73.8), (2, 69.4, 74.1))},
    **{f"k_{K}": Recipe(f"{ABLATION} --out_dim {K}", "Appendix E, output dimension", f"K = {K}", knn, linear)
       for K, knn, linear in ((4096, 68.3, 74.5), (16384, 68.8, 74.0))},
    # ---- Appendix B: multi-crop
    "fig8_a": Recipe(f"{FIGURE_8} --local_crops_number 0", "Figure 8", "no local crops", 62.1, note=FIG_8),
    "fig8_b": Recipe(FIGURE_8, "Figure 8", "global crops masked", 62.0, note=FIG_8),
    "fig8_c": Recipe(f"{FIGURE_8} --mask_crops all", "Figure 8", "all crops masked", 31.9,
                     note=f"{FIG_8}, local targets (the teacher's), weights (alike)"),
    "fig8_d": Recipe(f"{FIGURE_8} --mask_crops one", "Figure 8", "one global crop masked", 69.8,
                     note=f"{FIG_8}, which crop (the first)"),
    "fig8_e": Recipe(f"{FIGURE_8} --mask_crops all --local_crops_scale 0.2 0.4", "Figure 8",
                     "all crops masked, local ones larger", 56.6, note=f"{FIG_8}, local targets and weights (as in c)"),
    "fig8_random": Recipe(f"{FIGURE_8} {RANDOM_MIM} --pred_ratio_per image", "Figure 8",
                          "global crops masked, of half the images", 71.5,
                          note=f"{FIG_8[:-1]} ± 0.2). The authors' code draws for each crop"),
    **{f"area_{name}{s}": Recipe(f"{network} {MULTI_CROP} --global_crops_scale {s} 1 --local_crops_scale 0.05 {s}",
                                 "Appendix B, areas", f"{what}: local crops up to an area of {s}, global ones from it", knn)
       for name, network, what, numbers in (
           ("", f"{SMALL} --epochs 300", "ViT-S/16, 300 epochs", (74.0, 74.3, 74.6)),
           ("b16_", "--arch vit_base --patch_size 16 --epochs 50", "ViT-B/16, 50 epochs", (70.0, 70.1, 70.4)))
       for s, knn in zip((0.25, 0.4, 0.32), numbers, strict=True)},
    # ---- not the paper's
    "adapt": Recipe(
        f"--epochs 100 {COMMON} {RANDOM_MIM} {LOCAL} --warmup_teacher_temp_epochs 10 --lr 0.0001 --layer_decay 0.9 "
        "--warmup_epochs 5 --freeze_backbone_epochs 1", "ours", "going on from weights (--init_from) with other images",
        note="chosen, not searched for; the network is that of --arch", batch=256),
}


def flags_of(name):
    """{flag: words of its value} of the recipe `name`, as main_ibot.py takes them."""
    parts = (part.split() for part in RECIPES[name].flags.split("--")[1:])
    return {flag: words for flag, *words in parts}


def expand(words):
    """The command line `words` with the flags of its `--recipe` in front, so that those that are given count.

    `--recipe list` prints the table and exits. Raises InputError for a name that is not in it.
    """
    finder = argparse.ArgumentParser("main_ibot.py", add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(words)[0].recipe
    if name is None:
        return words
    if name == "list":
        print(table())
        raise SystemExit
    if name not in RECIPES:
        near = ", ".join(difflib.get_close_matches(name, RECIPES, 5, 0.4))
        raise InputError(f"--recipe {name}: there is none of that name; " + (f"close: {near}; " if near else "")
                         + "all: --recipe list")
    return [word for flag, values in flags_of(name).items() for word in (f"--{flag}", *values)] + list(words)


def shown(value):
    """The words of a flag's value as a recipe has them."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"{v:g}" if isinstance(v, (int, float)) and not isinstance(v, bool) else str(v).lower() for v in values]


def differing(args, name):
    """{flag: words} of what `args` (values by name, as a checkpoint has them) have otherwise than the recipe `name`."""
    return {flag: shown(args.get(flag)) for flag, words in flags_of(name).items() if shown(args.get(flag)) != words}


def listed(flags):
    """What `flags_of` and `differing` give as words of a command line."""
    return " ".join(f"--{flag} {' '.join(words)}" for flag, words in flags.items())


def as_settings(stored, epoch):
    """{"recipe", "recipe_otherwise"} for results.json, from what a checkpoint says: its args by name, and its epoch.

    The second is empty if the run was the recipe's and is finished. Empty if it names none.
    """
    name = stored.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        return {}
    otherwise = [listed(differing(stored, name))]
    if epoch != stored.get("epochs"):
        otherwise.append(f"after {epoch} epochs")
    return {"recipe": name, "recipe_otherwise": printable(", ".join(filter(None, otherwise)), 300)}


def notes(args, total_batch):
    """Lines about the recipe of a run's `args`, if there is one: flags, those that are otherwise here, what is open."""
    if args.recipe is None:
        return []
    recipe, otherwise = RECIPES[args.recipe], differing(vars(args), args.recipe)
    kept = {flag: words for flag, words in flags_of(args.recipe).items() if flag not in otherwise}
    lines = [f"recipe {args.recipe} ({recipe.source}; {recipe.what}): {listed(kept)}"
             + (f"; otherwise here: {listed(otherwise)}" if otherwise else "")]
    if recipe.note:
        lines.append(f"note on the recipe: {recipe.note}")
    if total_batch != recipe.batch:
        lines.append(f"warning: the recipe's total batch is {recipe.batch}, here it is {total_batch}: see "
                     "--batch_size_per_gpu and --accum_iter")
    return lines


def table():
    """All recipes as text."""
    rows = [("recipe", "k-NN", "linear", "fine-tuned", "batch", "source", "what", "")]
    rows += [(name, *(f"{value:.1f}" if value else "-" for value in (row.knn, row.linear, row.finetuned)), str(row.batch),
              row.source, row.what, row.note) for name, row in RECIPES.items()]
    widths = [max(map(len, column)) for column in zip(*(row[:6] for row in rows), strict=True)]
    return "\n".join(["The paper's top-1 accuracies on ImageNet-1K; none was run here.",
                      *("  ".join([*map(str.ljust, row[:6], widths), " | ".join(filter(None, row[6:]))]) for row in rows)])
