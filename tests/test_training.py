"""A whole training, step after step, against the plain definition in `oracle.py`."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import plain_drops, side_by_side

import loader
import main_ibot

FLAGS = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--out_dim", "64", "--shared_head", "true",
         "--head_hidden_dim", "64", "--batch_size_per_gpu", "8", "--epochs", "3", "--warmup_epochs", "1", "--lr", "0.03",
         "--warmup_teacher_temp_epochs", "2", "--momentum_teacher", "0.9"]
STEPS = 10  # an epoch


def double_batches(count, local_crops):
    """Batches of smooth noise with masks as in training, in float64."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        crops = F.interpolate(torch.randn(8 * (2 + local_crops), 3, 4, 4), size=(32, 32), mode="bicubic").mul(60).add(120)
        crops = crops.clamp(0, 255).to(torch.uint8).unflatten(0, (8, -1))
        batch = loader.finish_batch(loader.collate([
            ([crop[:, :16, :16] if c > 1 else crop for c, crop in enumerate(image)], 0,
             [loader.block_mask(4, 4, loader.draw_ratio((0, 0.3), (0, 0.2), rng), rng) for _ in range(2)])
            for image in crops]))
        batches.append(batch._replace(
            global_crops=batch.global_crops.double(), local_crops=batch.local_crops.double() if local_crops else None,
            mask_weight=1 / (1 / batch.mask_weight.double()).round()))
    return batches


@pytest.mark.parametrize("flags, local_crops", [
    (["--drop_path", "0.3", "--norm_last_layer", "false"], 2), (["--drop_path", "0"], 0)])
def test_training_follows_the_plain_definition(flags, local_crops):
    """Three epochs: drop path, the last layer frozen and then not, clipping, AdamW, schedules, centres and averages."""
    args = main_ibot.get_args_parser().parse_args([*FLAGS, *flags])
    torch.manual_seed(0)
    student, teacher = (network.double() for network in main_ibot.build_networks(args))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    schedules, _ = main_ibot.build_schedules(args, STEPS, 8)
    losses = np.array(list(side_by_side(student, teacher, double_batches(3 * STEPS, local_crops), schedules, STEPS,
                                        clip_grad=0.1)))  # [steps, 2, 3]
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-6, atol=1e-12)
    assert np.ptp(losses[:, 0, :2], axis=0).min() > 0.5  # much happened
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in teacher.named_parameters() if "weight_g" not in name)


def test_plain_drop_path_has_the_rates_of_ours():
    """What `side_by_side` cannot see, for it gives both the same draws."""
    torch.manual_seed(0)
    dropped = (plain_drops(0.3, 4, 20000) == 0).float().mean(dim=2)
    assert (dropped - torch.tensor([0, 0.1, 0.2, 0.3])[:, None]).abs().max() < 0.015
