"""Every variant of masks and losses: a step is what its definition says, two processes equal one, runs go on exactly."""
import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import multiprocessing

import engine
import loader
import main_ibot
import patch_tokenizers
import utils
import variants
from tests.test_faults import after_batches, assert_same_run, train  # noqa: F401 - a fixture

B, G, L, K = 4, 2, 3, 24
UNMASKED = ["--use_masked_im_modeling", "false"]
VARIANTS = {
    "default": [], "all": ["--mask_crops", "all"], "one": ["--mask_crops", "one", "--pred_ratio_per", "image"],
    "position": ["--patch_match", "position", *UNMASKED],
    "feature": ["--patch_match", "feature", *UNMASKED, "--shared_head", "false", "--shared_head_teacher", "false"],
    "full": ["--head_sharing", "full", "--head_sharing_teacher", "full", "--registers", "2", "--mask_crops", "all"],
    "mlp2": ["--head_sharing", "mlp2", "--head_sharing_teacher", "mlp2", "--layer_decay", "0.9", "--patch_embed_lr", "0.2"],
    "mpp": ["--tokenizer", "mpp"],
    "tokens_alone": ["--tokenizer", "mpp", "--lambda1", "0", "--local_crops_number", "0", "--global_crops_number", "1"],
}


def parsed(name, *words):
    return main_ibot.get_args_parser().parse_args([
        "--arch", "vit_nano", "--patch_size", "8", "--out_dim", str(K), "--patch_out_dim", str(K), "--head_hidden_dim", "32",
        "--drop_path", "0", "--shared_head", "true", "--global_crops_size", "32", "--local_crops_size", "16", "--device", "cpu",
        "--local_crops_number", str(L), "--pred_ratio", "0.4", "--warmup_teacher_temp_epochs", "0", "--epochs", "1",
        "--teacher_temp", "0.05", "--batch_size_per_gpu", str(B), *VARIANTS[name], *words])


def images(folder, count=B):
    """Noise of 40 x 48 pixels, smooth enough for crops to differ."""
    from PIL import Image
    rng = np.random.default_rng(0)
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(256, size=(6, 5, 3), dtype=np.uint8))
        small.resize((40, 48), Image.Resampling.BICUBIC).save(folder / "all" / f"{i}.png")


def dataset_of(args, folder, tokenizer=None):
    args.data_path = str(folder)
    return main_ibot.build_data(args, engine.Process(0, 1, 0, torch.device("cpu")), "cpu", 1, tokenizer).dataset


def setup(args, folder):
    """(student, teacher, loss, tokenizer, the samples of the folder): all double but the samples."""
    tokenizer = patch_tokenizers.build(args, torch.device("cpu"), None)
    dataset = dataset_of(args, folder, tokenizer)
    torch.manual_seed(0)
    student, teacher = (network.double() for network in main_ibot.build_networks(args, tokenizer and tokenizer.tokens))
    for p in (*student.parameters(), *teacher.parameters()):
        p.data += 0.05 * torch.randn_like(p)
    ibot_loss = main_ibot.iBOTLoss(K, K, [0.05], [0.06], lambda1=args.lambda1).double()
    variants.choose(ibot_loss, args, tokenizer, main_ibot.patch_cross_entropy, student, teacher, None)
    return student, teacher, ibot_loss, tokenizer, [dataset[i] for i in range(len(dataset))]


def batch_of(samples, args, tokenizer):
    batch = loader.collate(samples, 8, args.global_crops_number, 1 if args.mask_crops == "one" else None)
    batch = loader.finish_batch(batch, dtype=torch.float64, tokenizer=getattr(tokenizer, "of_crops", None))
    return batch._replace(mask_weight=1 / (1 / batch.mask_weight.double()).round())


def step(student, teacher, ibot_loss, batch, wrapped=None):
    optimizer = utils.build_optimizer("sgd", utils.get_params_groups(student), torch.device("cpu"))
    training = main_ibot.Training(wrapped or student, teacher, utils.ema_pairs(student, teacher), ibot_loss, optimizer)
    return main_ibot.train_step(iter([batch]), training, 0, lr=0.1, weight_decay=0.1, momentum=0.9, clip_grad=0.0,
                                freeze_last_layer=False, watch=True)


def plain_patch_loss(name, student, teacher, samples):
    """Crop by crop and patch by patch."""
    def tokens(network, crop, mask=None):
        return network.backbone(loader.normalize(crop)[None].double(), mask=mask, return_all_tokens=True)[0, 1:]

    def cross(logits, target):
        return -(target * (logits / 0.1).log_softmax(-1)).sum()

    total = 0
    for crops, _, grids in samples:
        masks = [torch.from_numpy(grid if grid.dtype == bool else grid >= 0) for grid in grids]
        for g, mask in enumerate(masks):
            own = tokens(student, crops[g], mask[None])
            if name in ("mpp", "tokens_alone"):
                found = patch_tokenizers.MeanColour(8).of_crops(crops[g][None, None], torch.arange(16))
                losses = [F.cross_entropy(student.head.token(own[i]), found[i]) for i in range(16)]
            else:
                other = tokens(teacher, crops[1 - g if name in ("position", "feature") else g])
                match = list(range(len(own)))
                if name == "position":
                    match = grids[g].flatten().tolist()
                if name == "feature":
                    match = [max(range(16), key=lambda j: F.cosine_similarity(own[i], other[j], dim=0)) for i in range(16)]  # noqa: B023
                s, t = (network.head(torch.cat((x[:1], x))[None])[1][0] for network, x in ((student, own), (teacher, other)))
                losses = [cross(s[i], (t[match[i]] / 0.06).softmax(-1)) for i in range(len(own))]
            masked = mask.flatten().nonzero().flatten().tolist()
            total += sum(losses[i] for i in masked) / max(len(masked), 1) / (1 if name == "one" else len(grids)) / len(samples)
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    images(folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_step_follows_the_plain_definition(name, folder):
    args = parsed(name)
    student, teacher, ibot_loss, tokenizer, samples = setup(args, folder)
    with torch.no_grad():
        expected = plain_patch_loss(name, student, teacher, samples)
        seen = [torch.stack(position) for position in zip(*(crops for crops, *_ in samples), strict=True)]
        seen = [teacher.backbone(loader.normalize(crops).double(), return_all_tokens=True)
                for crops in seen[:G + L if args.mask_crops == "all" else G]]
        center = torch.cat([teacher.head(x)[1].flatten(0, 1) for x in seen]).mean(dim=0)
    means, signs, *_ = step(student, teacher, ibot_loss, batch_of(samples, args, tokenizer))
    torch.testing.assert_close(means["patch"], expected, rtol=1e-6, atol=0)
    assert expected > 0.5
    if tokenizer:
        assert ibot_loss.tokens_seen.any() and 0 <= signs["token_acc"] <= signs["patch_share"] + 1e-9
        assert (ibot_loss.center2 == 0).all() and student.head.token.weight.grad.abs().sum() > 0
        assert ("cls_entropy" in signs) == (args.lambda1 > 0)
    else:
        torch.testing.assert_close(ibot_loss.center2[0, 0], 0.1 * center, rtol=1e-6, atol=1e-9)


def test_masks_of_one_crop_and_one_ratio(folder):
    """By default ratios differ between the crops of an image; the second crop of `one` has no mask."""
    for words, alike in ([], False), (["--pred_ratio_per", "image"], True), (["--mask_crops", "one"], None):
        dataset = dataset_of(parsed("default", "--pred_ratio", "0", "0.5", *words), folder)
        masked = []
        for epoch in range(8):
            dataset.set_epoch(epoch)
            masked += [[grid.any() for grid in grids] for _, _, grids in map(dataset.__getitem__, range(B))]
        first, second = zip(*masked, strict=True)
        assert any(first) and not all(first)
        assert (first == second) == alike if alike is not None else not any(second)


def share(rank, folder, images_folder):
    """Process 0 saves what a step of half the batch leaves of every variant."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for name in VARIANTS:
        args = parsed(name)
        student, teacher, ibot_loss, tokenizer, samples = setup(args, images_folder)
        batch = batch_of(samples[2 * rank:2 * rank + 2], args, tokenizer)
        found[name] = result(student, ibot_loss, step(student, teacher, ibot_loss, batch,
                                                      engine.data_parallel(student, torch.device("cpu"), 1)))
    if rank == 0:
        torch.save(found, f"{folder}/out.pth")
    dist.destroy_process_group()


def result(student, ibot_loss, outputs):
    return {**student.state_dict(), **ibot_loss.state_dict(), "grad_norm": outputs[0]["grad_norm"]}


def test_two_processes_equal_one(folder, tmp_path):
    multiprocessing.start_processes(share, (str(tmp_path), folder), nprocs=2, start_method="fork")
    two = engine.load_checkpoint(tmp_path / "out.pth")
    for name in VARIANTS:
        args = parsed(name)
        student, teacher, ibot_loss, tokenizer, samples = setup(args, folder)
        one = result(student, ibot_loss, step(student, teacher, ibot_loss, batch_of(samples, args, tokenizer)))
        assert one.keys() == two[name].keys()
        for key, value in one.items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def centroids(tmp_path_factory):
    path = tmp_path_factory.mktemp("centroids") / "c.safetensors"
    save_file({"centroids": torch.rand(30, 192, generator=torch.Generator().manual_seed(0))}, path)
    return path


@pytest.mark.parametrize("name", [*list(VARIANTS)[1:], "kmeans", "sinkhorn_koleo"])
def test_two_epochs_and_a_stop(name, centroids, digits, tmp_path, after_batches, capsys):  # noqa: F811
    """The patch loss falls, of a teacher that stays; a run that is stopped amid the second epoch goes on bit for bit."""
    extra = {"kmeans": ["--tokenizer", "kmeans", "--tokenizer_file", centroids],
             "sinkhorn_koleo": ["--centering", "sinkhorn", "--koleo", 0.1]}
    flags = ["--data_path", digits / "train", "--warmup_epochs", 0, "--lr", 0.01, "--momentum_teacher", 1,
             "--warmup_teacher_temp_epochs", 0, "--center_momentum", 0, "--patch_center_momentum", 0, "--freeze_last_layer", 0,
             "--pred_ratio", 0.3, "--pred_ratio_var", 0,
             *(extra.get(name) or VARIANTS[name])]
    train(*flags, "--output_dir", tmp_path / "whole")
    log = [line for line in capsys.readouterr().out.splitlines() if " done: " in line]
    patch = [float(line.split("  patch ")[1].split()[0]) for line in log]
    assert patch[1] < patch[0] - 0.01, patch
    assert ("tokens_used" in log[0]) == (name in ("mpp", "tokens_alone", "kmeans"))
    undo = after_batches(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(engine.Preempted, match="epoch 1, step 2, and saved"):
        train(*flags, "--output_dir", tmp_path / "part")
    undo()
    train(*flags, "--output_dir", tmp_path / "part", "--load_from", "auto")
    assert_same_run(tmp_path / "part", tmp_path / "whole")
    if name == "kmeans":
        save_file({"centroids": torch.rand(30, 192)}, tmp_path / "other.safetensors")
        with pytest.raises(engine.InputError, match="another --tokenizer or --tokenizer_file made its patch targets"):
            train(*flags, "--output_dir", tmp_path / "part", "--load_from", "auto", "--tokenizer_file",
                  tmp_path / "other.safetensors")
