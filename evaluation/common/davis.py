"""DAVIS 2017, semi-supervised (Pont-Tuset et al., 2017): its folders, masks as palette PNGs, the official scores J and F.

Letters: H, W pixels of a frame, n scored frames.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

import engine

VOID = 255  # of an annotation: counts as background
BOUND = 0.008  # of the distance between boundaries, as a share of the image's diagonal
MEASURES = ("J", "F")
EXPECTED = "ImageSets/2017/val.txt, JPEGImages/480p/NAME/*.jpg and Annotations/480p/NAME/*.png"


# ---------------------------------------------------------------- data

@dataclass(frozen=True)
class Sequence:
    """A video: paths of its frames and annotations, of all frames or of the first alone; size (W, H); number of objects."""
    name: str
    frames: tuple
    annotations: tuple
    size: tuple
    objects: int

    @property
    def is_scored(self):
        return len(self.annotations) == len(self.frames)

    @property
    def scored(self):
        """Numbers of the frames that count: all but the first and the last."""
        return range(1, len(self.frames) - 1)


def find_sequences(data_path, names=None):
    """The `Sequence`s called `names`, by default those that the list of the validation set names; and their folder.

    DATA/DAVIS serves where DATA is no such folder itself. Raises InputError for what is missing, naming it.
    """
    root = Path(data_path)
    if not (root / "Annotations").is_dir() and (root / "DAVIS" / "Annotations").is_dir():
        root = root / "DAVIS"
    if names is None:
        path = root / "ImageSets/2017/val.txt"
        try:
            names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise engine.InputError(f"{path}: no list of sequences can be read ({type(error).__name__}); expected in DATA: "
                                   f"{EXPECTED}") from error
        if not names:
            raise engine.InputError(f"{path}: the list is empty")
    return [_find_sequence(root, name) for name in dict.fromkeys(names)], root


def _find_sequence(root, name):
    if Path(name).name != name or name == "..":  # its masks go to a folder of this name
        raise engine.InputError(f"sequence {engine.printable(name)}: is not the name of a folder")
    frames, annotations = (sorted((root / kind / "480p" / name).glob(pattern))
                           for kind, pattern in (("JPEGImages", "*.jpg"), ("Annotations", "*.png")))
    for found, kind, what in ((frames, "JPEGImages", "frames *.jpg"), (annotations, "Annotations", "annotations *.png")):
        if not found:
            raise engine.InputError(f"sequence {name}: no {what} in {root / kind / '480p' / name}; expected in DATA: "
                                   f"{EXPECTED}")
    stems, known = [path.stem for path in frames], {path.stem for path in annotations}
    for path in annotations:
        if path.stem not in stems:
            raise engine.InputError(f"sequence {name}: the frame of {path} is missing")
    lacking = [stem for stem in stems if stem not in known]
    if lacking and (len(annotations) > 1 or stems[0] in lacking):
        raise engine.InputError(f"sequence {name}: the annotation {annotations[0].with_stem(lacking[0])} is missing")
    if len(frames) < 3:
        raise engine.InputError(f"sequence {name}: {len(frames)} frames are too few: the first and the last do not count")
    labels, _ = read_labels(annotations[0])
    objects = int(without_void(labels).max())
    if not objects:
        raise engine.InputError(f"{annotations[0]}: no object in it (the value {VOID} counts as background)")
    return Sequence(name, tuple(frames), tuple(annotations), labels.shape[::-1], objects)


def share_of(sequences, process):
    """The sequences that this process does: each goes, longest first, to the process with fewest frames so far."""
    loads, own = [0] * process.world_size, []
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence.frames)):
        rank = loads.index(min(loads))
        loads[rank] += len(sequence.frames)
        if rank == process.rank:
            own.append(sequence)
    return own


# ---------------------------------------------------------------- masks

def read_labels(path, size=None):
    """(labels uint8 [H, W], palette or None) of a PNG whose values are numbers of objects.

    Raises InputError, naming the file, if it cannot be read, holds colours instead, or has another `size` (W, H).
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"mode {image.mode}; values must be numbers of objects: mode P or L")
            if size and image.size != size:
                raise ValueError(f"{image.width} x {image.height} pixels instead of {size[0]} x {size[1]}")
            return np.array(image), image.getpalette() if image.mode == "P" else None
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise engine.InputError(f"{path}: cannot be read as a mask ({' '.join(reason.split())})") from error


def read_annotation(path, size):
    """Labels uint8 [H, W] of an annotation, void as background."""
    return without_void(read_labels(path, size)[0])


def without_void(labels):
    """Labels with void as background."""
    return np.where(labels == VOID, 0, labels)


def write_labels(labels, path, palette=None):
    """Write labels uint8 [H, W] as a PNG with `palette` (a flat list of RGB), by default the usual colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette or pascal_palette())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise engine.InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def pascal_palette():
    """Colours of 256 labels as a flat list: three bits of the label at a time give the next bits of red, green and blue."""
    label, palette = np.arange(256), np.zeros((256, 3), dtype=int)
    for place in range(8):
        for colour in range(3):
            palette[:, colour] |= (label >> (3 * place + colour) & 1) << (7 - place)
    return palette.flatten().tolist()


def draw_objects(image, labels, palette=None):
    """A PIL RGB image with its objects, labels uint8 [H, W], tinted and outlined: a PIL image."""
    colours = np.zeros((256, 3))
    palette = np.array(palette or pascal_palette()).reshape(-1, 3)
    colours[:len(palette)] = palette
    pixels = np.array(image, dtype=float)
    tinted = labels > 0
    pixels[tinted] = (pixels[tinted] + colours[labels[tinted]]) / 2
    pixels[boundary(labels)] = 255
    return Image.fromarray(pixels.astype(np.uint8))


# ---------------------------------------------------------------- scores of an object in a frame

def region_similarity(predicted, true):
    """J of two masks, bool [H, W]: intersection over union, 1 where both are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def boundary(mask):
    """Pixels of a mask [H, W] that differ from their right, lower or lower right neighbour: bool [H, W].

    The last row is compared to the right only, the last column downwards only. So boundaries lie half a pixel up and left,
    and where an object touches the border of the image it has none.
    """
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def boundary_accuracy(predicted, true):
    """F of two masks, bool [H, W]: harmonic mean of the shares of boundary pixels that are near the other's boundary."""
    radius = np.ceil(BOUND * np.hypot(*true.shape))
    points = [np.column_stack(np.divmod(np.flatnonzero(boundary(mask)), mask.shape[1])) for mask in (predicted, true)]
    if not len(points[0]) or not len(points[1]):
        return float(len(points[0]) == len(points[1]))
    trees = [cKDTree(part) for part in points]
    precision, recall = (np.mean(tree.query(part, distance_upper_bound=radius + 0.5)[0] <= radius)
                         for tree, part in ((trees[1], points[0]), (trees[0], points[1])))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def object_scores(predicted, true, objects):
    """(J, F) of each object from labels uint8 [H, W]: float64 [objects, 2]."""
    scores = np.empty((objects, 2))
    for number in range(1, objects + 1):
        masks = predicted == number, true == number
        scores[number - 1] = region_similarity(*masks), boundary_accuracy(*masks)
    return scores


# ---------------------------------------------------------------- statistics

def statistics(values):
    """(mean, recall, decay) of an object's scores over its frames, [n].

    Recall is the share above 0.5; decay how much the mean of the first quarter is above that of the last, where quarters
    share the frame between them.
    """
    values = np.asarray(values)
    bounds = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = (values[bounds[i]:bounds[i + 1] + 1].mean() for i in (0, 3))
    return values.mean(), np.mean(values > 0.5), first - last


def global_scores(scores):
    """{official name: value} from {object: its scores [n, 2]}: means over the objects, as fractions."""
    table = np.array([[statistics(column) for column in values.T] for values in scores.values()])  # [objects, 2, 3]
    means = {f"{measure}-{name}": float(value) for measure, row in zip(MEASURES, table.mean(axis=0), strict=True)
             for name, value in zip(("Mean", "Recall", "Decay"), row, strict=True)}
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2} | means


def write_scores(scores, folder):
    """Write the two tables of the official evaluator into `folder`, over any that are there."""
    overall = global_scores(scores)
    tables = {"global_results-val.csv": [list(overall), [f"{value:.3f}" for value in overall.values()]],
              "per-sequence_results-val.csv": [["Sequence", "J-Mean", "F-Mean"]] + [
                  [name, *(f"{value:.3f}" for value in values.mean(axis=0))] for name, values in scores.items()]}
    for name, rows in tables.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(",".join(row) + "\n" for row in rows))
        except OSError as error:
            raise engine.InputError(f"{folder / name}: cannot be written ({error.strerror})") from error
