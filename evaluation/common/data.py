"""Images of the evaluations: the test transform and the train and val folders."""
from pathlib import Path

from torchvision.transforms import v2

import utils
from loader import ImageFolderInstance, normalize


def eval_transform(size):
    """PIL image -> normalised float32 [3, size, size]: shorter side to 256/224 of `size` (bicubic), centre crop."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC),
                       v2.CenterCrop(size), v2.PILToTensor(), normalize])


def image_folders(data_path, size):
    """The data sets DATA/train and DATA/val of (image, label, index), both through `eval_transform(size)`.

    Labels follow train's sorted class folders: a class of val gets the number of train's folder of the same name, so
    that val may lack classes. Raises InputError for a missing or empty folder and for a class that train does not have.
    """
    transform = eval_transform(size)
    train, val = (ImageFolderInstance(Path(data_path) / part, transform) for part in ("train", "val"))
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise utils.InputError(f"data folder {val.root}: {len(unknown)} class folder(s) that {train.root} lacks: "
                               f"{', '.join(unknown[:5])}")
    number = [train.class_to_idx[name] for name in val.classes]
    val.samples = val.imgs = [(path, number[label]) for path, label in val.samples]
    val.targets = [label for _, label in val.samples]
    val.classes, val.class_to_idx = train.classes, train.class_to_idx
    return train, val
