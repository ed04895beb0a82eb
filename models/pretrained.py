"""Weights of other files as this project's networks have them, and the start of pre-training from them.

Letters: D width, N patch tokens of a ViT, K outputs of a head.
"""
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F

import engine
from images import stored_pixel_stats
from models.vision_transformer import resample_positions

MOST_CELLS = 512  # patches along a side of the images that a checkpoint was trained on
ENTRIES = ("teacher", "state_dict", "model")  # of a file, whichever comes first; a file may also be a state dictionary
MOST_REGISTERS = 4096
MAY_BE_NEW = ("masked_embed", "reg_token")  # of the backbone


def add_flags(group):
    group.add_argument("--init_from", metavar="FILE",
                       help="start student and teacher from a checkpoint of this project, of the reference or of DINO, an "
                            "extracted backbone, or weights of timm's ViT or Swin")
    group.add_argument("--init_key", help="its entry; default: teacher, else state_dict, else model, else the file itself")
    group.add_argument("--init_grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
                       help="patches of the images that its positions are for, where these were not square")
    group.add_argument("--freeze_backbone_epochs", default=0, type=int,
                       help="epochs without updates of the backbone, in which new heads warm")


# ---------------------------------------------------------------- files

def reference_names(state):
    """timm's names and shapes to this project's.

    A Swin's patch merging belongs here to the stage that it ends; a ViT with registers has a position for its class token.
    """
    positions = state.get("pos_embed")
    if "reg_token" in state and positions is not None and positions.ndim == 3:
        if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
            state = state | {"pos_embed": F.pad(positions, (0, 0, 1, 0))}
    merging = re.compile(r"^layers\.(\d+)\.downsample\.")
    if any(merging.match(name)[1] == "0" for name in state if merging.match(name)):
        return state
    return {merging.sub(lambda match: f"layers.{int(match[1]) - 1}.downsample.", name): value
            for name, value in state.items()}


def registers_of(state, prefix=""):
    """How many registers a ViT's state dictionary has; at most MOST_REGISTERS, loading will say if there are more."""
    token = state.get(f"{prefix}reg_token")
    return min(token.shape[1], MOST_REGISTERS) if torch.is_tensor(token) and token.ndim == 3 else 0


def trained_grid(state, patch_size, path, grid=None):
    """(rows, columns) of patches that a ViT's position embedding [1, 1 + N, D] was made for; None if `state` is no ViT's.

    grid: these two, where they are not as many. Raises InputError where patches or positions are others.
    """
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patches is None:
        return None  # loading will say what is missing
    if positions.ndim != 3 or patches.ndim != 4:
        raise engine.InputError(f"checkpoint {path} is no ViT: pos_embed or patch_embed.proj.weight has another shape")
    if patches.shape[-1] != patch_size:
        raise engine.InputError(f"checkpoint {path} has patches of {patches.shape[-1]} pixels, not {patch_size}; "
                               "see --patch_size")
    cells = positions.shape[1] - 1
    if grid is not None:
        engine.need(grid[0] * grid[1] == cells and min(grid) > 0,
                    f"--init_grid {grid[0]} {grid[1]}: {path} has {cells} patch positions")
        return tuple(grid)
    side = math.isqrt(max(cells, 0))
    if not 1 <= side <= MOST_CELLS or side ** 2 != cells:
        raise engine.InputError(f"checkpoint {path}: its {cells} patch positions are no square grid "
                               f"of at most {MOST_CELLS} x {MOST_CELLS}")
    return side, side


def describe(state):
    """Words for the architecture of a backbone's state dictionary in the reference's names, the same for the same one."""
    patches = state.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return "no backbone (no patch_embed.proj.weight)"
    matches = (re.match(r"(layers\.\d+\.)?blocks\.\d+\.", name) for name in state)
    blocks = {match[0]: match[1] or "" for match in matches if match}
    depths = "-".join(str(count) for _, count in sorted(Counter(blocks.values()).items()))
    words = (f"a {'Swin' if any(blocks.values()) else 'ViT'} of width {len(patches)} with {depths or 0} blocks and patches "
             f"of {patches.shape[-1]} pixels")
    biases = next((value for name, value in state.items() if name.endswith(".relative_position_bias_table")), None)
    words += "" if biases is None else f", windows of {(math.isqrt(len(biases)) + 1) // 2}"
    return words + f", {registers_of(state)} registers" * ("reg_token" in state)


# ---------------------------------------------------------------- the start of pre-training

def start(args, student, teacher, pixel_stats):
    """Load what fits of the file `args.init_from` into both networks, in place.

    All parameters of the backbone must be there, but for MAY_BE_NEW. A ViT's positions are resampled to the network's grid,
    that of 224 pixels. Parts of the head are taken where all names and shapes are the same.

    Returns:
        Lines that say what was taken and what is new. pixel_stats: of this run, for a line if the file's are others.

    Raises InputError for a file that cannot be read, has no such entry, or holds another architecture.
    """
    path = args.init_from
    checkpoint = engine.load_checkpoint(path)
    key = args.init_key or next((key for key in ENTRIES if key in checkpoint), ENTRIES[0])
    state = reference_names(engine.backbone_state_dict(checkpoint, key, path))
    own = {name: value for name, value in student.backbone.state_dict().items() if name in state or name not in MAY_BE_NEW}
    holds, wanted = describe(state), describe(own)
    engine.need(holds == wanted, f"--init_from {path}: it holds {holds}; the network is {wanted}: see --arch, "
                                 f"{'--window_size' if args.arch.startswith('swin') else '--patch_size, --registers'}")
    lines = [f"started from {path}" + f", its {key}" * (key in checkpoint) + f": {holds}",
             f"  backbone: {len(own.keys() & state.keys())} tensors taken"]

    grid = None if args.arch.startswith("swin") else trained_grid(state, args.patch_size, path, args.init_grid)
    if grid:
        rows = math.isqrt(own["pos_embed"].shape[1] - 1)
        state["pos_embed"] = resample_positions(state["pos_embed"].float(), rows, rows, grid)
        if grid != (rows, rows):
            lines[-1] += f", positions resampled from {grid[0]} x {grid[1]} to {rows} x {rows}"
    heads = engine.network_state_dict(checkpoint, key, path)
    for network in (teacher, student):
        new = {name: value for name, value in network.backbone.state_dict().items()
               if name in MAY_BE_NEW and name not in state}
        engine.load_backbone(network.backbone, state | new, path)
        parts = start_head(network.head, heads, path)
    lines[-1] += "".join(f"; {name} is new" for name in new)
    lines += [f"  head.{name}: {words}" for name, words in parts.items()]
    stats = stored_pixel_stats(checkpoint, path)
    if stats != pixel_stats:
        lines.append(f"note: its images were normalised with {stats}, here with {pixel_stats}: see --mean and --std")
    return lines


def start_head(head, state, path):
    """Load those parts of a head whose names and shapes are those of a network's state dictionary.

    Last layers are taken only with the MLP below them. Returns {part: what became of it}.
    """
    found = {}
    for name, part in sorted(head.named_children(), key=lambda part: part[0].startswith("last_layer")):
        prefix, own = f"head.{name}.", part.state_dict()
        stored = {word.removeprefix(prefix): value for word, value in state.items() if word.startswith(prefix)}
        other = [word for word in own if word in stored and stored[word].shape != own[word].shape]
        last = name.startswith("last_layer")
        below = [found.get(part) for part in ("mlp", "mlp_patch")[:2 if name == "last_layer2" else 1]]
        if not stored:
            found[name] = "new, the file has none"
        elif last and not set(below) <= {"taken", None}:
            found[name] = "new, as the MLP below it is"
        elif other:
            sizes = [len(shapes[other[0]]) if last else tuple(shapes[other[0]].shape) for shapes in (stored, own)]
            found[name] = f"new, because {'K' if last else other[0]} {sizes[0]} is not {sizes[1]}"
        elif stored.keys() != own.keys():
            found[name] = "new, because the file has other layers"
        else:
            engine.load_strictly(part, stored, path)
            found[name] = "taken"
    return found
