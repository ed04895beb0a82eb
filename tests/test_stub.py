"""The CUDA code path on a stub runtime (tests/fakecuda), skipped unless pytest gets --stub: `./run.sh test --stub`.

Devices, dtypes, NCCL calls, compilation down to ptxas, waits and the allocator are real there; numbers and speed are not.
What needs an index or a count from the device is out of its reach: k-NN, clustering, logistic regression.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.stub
STUB = Path(__file__).parent / "fakecuda"
CACHES = os.environ.copy()  # before the session's own cache folder: the built stub and compiled kernels are used again

SMALL = ["--device", "cuda", "--batch_size_per_gpu", "4", "--num_workers", "1", "--epochs", "1", "--warmup_epochs", "0"]
PRETRAIN = [*SMALL, "--local_crops_number", "2", "--out_dim", "512", "--patch_out_dim", "512", "--print_freq", "2",
            "--pred_ratio", "0", "0.3", "--pred_ratio_var", "0", "0.2", "--shared_head", "true"]
EAGER = ["--compile", "false"]


def on_stub(script, *words, processes=1, sync_error=False):
    """Run a script of the repository on stub GPUs; returns its output, or fails with it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = ["bash", STUB / "run", "--devices", processes, *["--sync-error"] * sync_error, sys.executable, *launcher, script, *words]
    result = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, env={**CACHES, "OMP_NUM_THREADS": "1"})
    output = result.stdout + result.stderr
    if result.returncode and re.search("^error: .* finite", output, re.M):
        pytest.xfail("the stub's numbers are not finite, and were refused")
    assert result.returncode == 0, output[-5000:]
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 pictures of noise in two classes as train/, the first 16 as val/."""
    from PIL import Image
    root = tmp_path_factory.mktemp("noise")
    for part, count in (("train", 48), ("val", 16)):
        for i in range(count):
            path = root / part / str(i % 2) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((256, 256), 80).convert("RGB").save(path)
    return root


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    """Of vit_nano, for the evaluations."""
    out = tmp_path_factory.mktemp("pretrained")
    on_stub("main_ibot.py", *PRETRAIN, *EAGER, "--arch", "vit_nano", "--data_path", images / "train", "--output_dir", out)
    return out / "checkpoint.pth"


ROWS = {
    "vit": [],
    "vit, eager": EAGER,
    "vit, two processes": [2],
    "vit, eager, two processes": [2, *EAGER],
    "heads apart": ["--shared_head", "false", "--shared_head_teacher", "false"],
    "nothing shared, registers": ["--head_sharing", "full", "--head_sharing_teacher", "full", "--registers", "4", "--layer_decay", "0.9"],
    "layer norm in the head": ["--norm_in_head", "ln"],
    "batch norm in the head": ["--norm_in_head", "syncbn"],
    "batch norm in the head, two processes": [2, *EAGER, "--norm_in_head", "syncbn"],
    "float16": ["--amp_dtype", "float16"],
    "float32": ["--use_fp16", "false"],
    "accumulation": ["--accum_iter", "2", *EAGER],
    "accumulation, two processes": [2, "--accum_iter", "2", *EAGER],
    "no local crops": ["--local_crops_number", "0", *EAGER],
    "no masks": ["--use_masked_im_modeling", "false", "--lambda2", "0", *EAGER],
    "recompute none": ["--recompute", "none"],
    "recompute elementwise": ["--recompute", "elementwise"],
    "recompute half": ["--recompute", "half"],
    "recompute blocks": ["--recompute", "blocks"],
    "sgd": ["--optimizer", "sgd", *EAGER],
    "lars": ["--optimizer", "lars", *EAGER],
    "masks on all crops": ["--mask_crops", "all"],
    "mean colours": ["--tokenizer", "mpp", *EAGER],
    "mean colours alone": ["--tokenizer", "mpp", "--lambda1", "0"],
    "dense by position": ["--patch_match", "position", "--use_masked_im_modeling", "false"],
    "dense by feature, two processes": [2, "--patch_match", "feature", "--use_masked_im_modeling", "false", *EAGER],
    "Sinkhorn and KoLeo": ["--centering", "sinkhorn", "--koleo", "0.1", *EAGER],
    "swin": ["--arch", "swin_tiny"],
    "swin, eager": ["--arch", "swin_tiny", *EAGER],
    "swin, eager, two processes": [2, "--arch", "swin_tiny", *EAGER],
}
WAITS = {"float16", "sgd", "lars"}  # these wait for the device at each step, and say so


@pytest.mark.parametrize("row", ROWS)
def test_pretraining(row, images, tmp_path):
    """One epoch, and without a wait that comes at every step."""
    flags, processes = list(ROWS[row]), 1
    if 2 in flags:
        processes = flags.pop(0)
    out = on_stub("main_ibot.py", "--arch", "vit_nano", *PRETRAIN, *flags, "--data_path", images / "train", "--output_dir", tmp_path,
                  processes=processes, sync_error=row not in WAITS)
    assert "epoch 0 done" in out and (tmp_path / "checkpoint.pth").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming(processes, images, tmp_path):
    flags = ["--arch", "vit_nano", *PRETRAIN, *EAGER, "--data_path", images / "train", "--output_dir", tmp_path]
    on_stub("main_ibot.py", *flags, processes=processes)
    out = on_stub("main_ibot.py", *flags, "--epochs", "2", "--load_from", "auto", processes=processes)
    assert "resumed from" in out and "epoch 1 done" in out


@pytest.mark.parametrize("script, processes", [  # several heads drop out by their losses, on which stub processes disagree
    ("evaluation/eval_linear.py", 1), ("evaluation/eval_linear.py", 2), ("evaluation/eval_linear_multi.py", 1),
    ("analysis/linear_part/eval.py", 1)])
def test_linear_probes(script, processes, images, checkpoint, tmp_path):
    batch = ["--batch_size", "8"] if "part" in script else ["--batch_size_per_gpu", "8"]
    on_stub(script, "--device", "cuda", "--epochs", "1", *batch, "--num_workers", "1", "--pretrained_weights", checkpoint, "--arch",
            "vit_nano", "--data_path", images, "--output_dir", tmp_path, processes=processes)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["evaluation/eval_cls.py", "evaluation/semi_supervised/eval_cls.py",
                                    "evaluation/classification_layer_decay/run_class_finetuning.py"])
def test_finetuning(script, processes, images, checkpoint, tmp_path):
    on_stub(script, *SMALL, "--pretrained_weights", checkpoint, "--arch", "vit_nano", "--data_path", images, "--output_dir", tmp_path,
            processes=processes)


def test_analyses(images, checkpoint, tmp_path):
    on_stub("analysis/attention_map/visualize_attention.py", "--device", "cuda", "--pretrained_weights", checkpoint, "--arch",
            "vit_nano", "--image_path", images / "val/0/0.jpg", "--output_dir", tmp_path)
