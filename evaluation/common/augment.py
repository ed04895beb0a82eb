"""Training images of evaluations: crops and augmentations as a pure function of the image's place, and which is used when.

Letters: n images of the data set, B images per process and batch, W processes, K batches of an update.
"""
import contextlib
import math
import random

import numpy as np
import torch
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch.utils.data import Dataset
from torchvision.transforms import v2

from engine import InputError
from evaluation.common.data import epoch_order
from images import IMAGENET, load_or_replace, normalize

REPEATS = 3  # of an image in an epoch of repeated augmentation
SMALL = 32  # pixels: up to this size images are padded and cut, not scaled


@contextlib.contextmanager
def drawing_from(seed):
    """Within it Python, numpy and torch's CPU generator draw from `seed`; afterwards they go on as if nothing had been."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _posterize(image, bits, **kwargs):
    """timm's, which also asks for 0 bits; Pillow gave a black image for that, and from version 13 on an error."""
    return posterize(image, bits, **kwargs) if bits else image.point([0] * 256 * len(image.getbands()))


def train_transform(size, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, interpolation="bicubic", erase_prob=0.25,
                    erase_mode="pixel", erase_count=1, flip_prob=0.5, stats=IMAGENET):
    """PIL RGB image -> normalised float32 [3, size, size], by timm's recipe (section 1.8 of the protocols).

    A random crop, a flip, `auto_augment` (None: the colour jitter, which timm leaves out otherwise), random erasing. Images
    of up to 32 pixels are moved by up to an eighth of their side instead of being scaled: 4 of 32, as usual for CIFAR.
    Raises InputError for a policy that timm does not know.
    """
    try:
        transform = create_transform(
            size, is_training=True, auto_augment=auto_augment, color_jitter=color_jitter, interpolation=interpolation,
            re_prob=erase_prob, re_mode=erase_mode, re_count=erase_count, hflip=flip_prob, mean=stats.mean,
            std=stats.std)
    except (AssertionError, ValueError) as error:  # how timm refuses the name of a policy
        raise InputError(f"--aa {auto_augment}: no policy of timm ({error})") from error
    for part in transform.transforms:
        for op in [*getattr(part, "ops", []), *(op for policy in getattr(part, "policy", []) for op in policy)]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
    if size <= SMALL:
        transform.transforms[0] = v2.Compose([v2.Resize(size, v2.InterpolationMode(interpolation)),
                                              v2.RandomCrop(size, padding=size // 8)])
    return transform


def val_transform(size, crop_pct=None, interpolation="bicubic", normalize=normalize):
    """PIL RGB image -> normalised float32 [3, size, size]: shorter side to size / crop_pct, centre crop.

    `crop_pct` is by default 224/256; from 384 pixels on, and up to 32, it is 1.
    """
    if crop_pct is None:
        crop_pct = 224 / 256 if SMALL < size < 384 else 1.0
    return v2.Compose([v2.Resize(int(size / crop_pct), v2.InterpolationMode(interpolation)), v2.CenterCrop(size),
                       v2.PILToTensor(), normalize])


class AugmentedSet(Dataset):
    """(transform(image), label) of an `ImageSet`, indexed by (epoch, place in its order, index of the image).

    What is drawn depends on (seed, epoch, place) alone, whatever the number of workers and processes: `transform` may use
    all of Python's, numpy's and torch's generators. `on_bad_image`, `bad` (shared with the workers): see `load_or_replace`.
    """

    def __init__(self, images, transform, seed=0, on_bad_image="skip"):
        self.images, self.transform = images.with_transform(None), transform
        self.seed, self.on_bad_image = seed, on_bad_image
        self.bad = torch.zeros(len(images), dtype=torch.uint8).share_memory_()

    def __len__(self):
        return len(self.images)

    def source(self, index):
        """Path of an image, as `ImageSet.source`."""
        return self.images.source(index)

    def load(self, index):
        """(PIL image, label, index), untransformed. Raises `BadImage`."""
        return self.images[index]

    def __getitem__(self, item):
        epoch, place, index = item
        rng = np.random.default_rng((self.seed, epoch, place))
        seed = int(rng.integers(2**63))
        image, label, _ = load_or_replace(self, index, rng)
        with drawing_from(seed):
            return self.transform(image), label


class UpdateBatches:
    """Batch sampler: this process's batches of an epoch, as lists of items for `AugmentedSet`.

    `steps` updates of K B W images each, in `epoch_order`, dealt out to the processes one by one; surplus images are left
    out. With `repeated` each image comes three times in a row (Hoffer et al., 2020) and an epoch is as long as without, in
    multiples of 256 images (as in DeiT), so that it sees a third of them. Set `epoch`, and `start`: the updates made.
    """

    def __init__(self, n, batch_size, accum_iter, process, seed, repeated=False):
        self.n, self.batch_size, self.accum_iter, self.process, self.seed = n, batch_size, accum_iter, process, seed
        self.repeated, self.epoch, self.start = repeated, 0, 0
        own = (n // 256 * 256 or n) // process.world_size if repeated else n // process.world_size
        self.steps = own // (batch_size * accum_iter)

    def __len__(self):
        return (self.steps - self.start) * self.accum_iter

    def __iter__(self):
        order = epoch_order(self.n, self.seed, self.epoch)
        if self.repeated:
            order = order.repeat_interleave(REPEATS)
        W = self.process.world_size
        for first in range(self.start * self.accum_iter, self.steps * self.accum_iter):
            places = range(first * self.batch_size * W + self.process.rank, (first + 1) * self.batch_size * W, W)
            yield [(self.epoch, place, int(order[place])) for place in places]


# ---------------------------------------------------------------- linear probes

class AugmentedImages(Dataset):
    """Random resized crops, uint8 [3, size, size], of an `ImageSet`; indexed by (epoch, index).

    A crop is a pure function of (seed, epoch, index), whatever the number of workers and processes.
    """

    def __init__(self, images, size, seed, hflip=0.5):
        self.seed = seed
        self.images = images.with_transform(v2.Compose([
            v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BILINEAR), v2.RandomHorizontalFlip(hflip),
            v2.PILToTensor()]))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would seed the GPUs too
            return self.images[index]


class ShareOfBatches:
    """Batch sampler: this process's share of every batch of `epoch` from number `first` on, as (epoch, index).

    Batches hold `batch_size` images of all processes, the last one what is left; nothing is repeated to fill it up. A
    share that would be empty is one image, which `gather_shares` drops.
    """

    def __init__(self, n, batch_size, process, seed):
        self.n, self.batch_size, self.process, self.seed = n, batch_size, process, seed
        self.epoch = self.first = 0

    def __len__(self):
        return math.ceil(self.n / self.batch_size)

    def __iter__(self):
        for batch in epoch_order(self.n, self.seed, self.epoch).split(self.batch_size)[self.first:]:
            share = batch[self.process.rank::self.process.world_size]
            yield [(self.epoch, index) for index in (share if len(share) else batch[:1]).tolist()]
