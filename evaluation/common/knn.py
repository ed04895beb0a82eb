"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018; iBOT, Section 4.1)."""
import torch
import torch.nn.functional as F

import engine

MAX_BLOCK = 64_000_000  # floats of the largest intermediate: 256 MB
TESTS = 1024  # test images of a chunk: enough for efficient products of matrices


def usable_ks(ks, n_train):
    """Those of `ks` that are not above the number of training images; raises InputError when none is left."""
    usable = [k for k in ks if k <= n_train]
    if not usable:
        raise engine.InputError(f"--nb_knn {' '.join(map(str, ks))}: there are only {n_train} training images")
    if len(usable) < len(ks) and engine.is_main_process():
        left_out = ", ".join(str(k) for k in ks if k > n_train)
        print(f"k = {left_out} left out: there are only {n_train} training images", flush=True)
    return usable


@torch.inference_mode()
def knn_classify(train_features, train_labels, test_features, num_classes, ks=(10, 20, 100, 200), temperature=0.07,
                 device="cpu", max_block=MAX_BLOCK):
    """The five likeliest classes of every test image, for each k.

    The score of class c is the sum of exp(s / temperature) over those of the k most similar training images that have
    label c, s being the cosine similarity. Tests meet the training images in blocks of both, which keep every
    intermediate below `max_block` floats.

    Args:
        train_features [n, F], train_labels [n] (in 0..num_classes-1), test_features [m, F]: need no normalisation.
        ks: at most n each (see `usable_ks`).
        device: where to compute; the training features are copied there whole, the others chunk by chunk.

    Returns:
        {k: int64 [m, min(5, num_classes)]} on the CPU, best class first; -1 where the neighbours have fewer classes.
    """
    train = F.normalize(train_features.to(device, torch.float32), dim=1)
    train_labels = train_labels.to(device)
    predictions = {k: [] for k in ks}
    for chunk in test_features.split(max(1, min(TESTS, max_block // num_classes))):
        chunk = F.normalize(chunk.to(device, torch.float32), dim=1)
        similarity, neighbours = _nearest(chunk, train, max(ks), max(1, max_block // len(chunk)))
        # Relative to the nearest neighbour: the same order of classes, and no overflow at low temperatures.
        votes = torch.exp((similarity - similarity[:, :1]) / temperature)
        classes = train_labels[neighbours]
        for k in ks:
            scores = votes.new_zeros(len(chunk), num_classes).scatter_add_(1, classes[:, :k], votes[:, :k])
            top, ranked = scores.topk(min(5, num_classes), dim=1)
            predictions[k].append(ranked.masked_fill(top == 0, -1).cpu())
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def _nearest(tests, train, k, block):
    """Similarities [m, k], falling, and places of the k rows of `train` [n, F] most like each row of `tests` [m, F]."""
    best, places = tests.new_empty(len(tests), 0), torch.empty(len(tests), 0, dtype=torch.int64, device=tests.device)
    for start in range(0, len(train), block):
        similarity, found = (tests @ train[start:start + block].T).topk(min(k, len(train) - start, block), dim=1)
        best, places = torch.cat((best, similarity), dim=1), torch.cat((places, found + start), dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places


def topk_accuracy(predictions, labels, topk=(1, 5)):
    """Percent of rows of `predictions` [m, P] that hold their label [m] among the first k entries, for each k."""
    hits = predictions == labels[:, None]
    return [100.0 * hits[:, :k].any(dim=1).double().mean().item() for k in topk]
