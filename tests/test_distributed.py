"""Two gloo processes with half the batch each, also in two parts, do what one process does with the whole batch."""
import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils.data import DistributedSampler

import engine
import loader
import main_ibot
import models
import utils
import variants
from models.head import SumOverProcesses


def steps(rank, world_size, accum_iter, norm, variant, folder):
    """Three steps on this process's share of fixed batches, taken in `accum_iter` parts; process 0 saves losses, centres and
    parameters."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{accum_iter}", rank=rank, world_size=world_size)
    torch.manual_seed(0)

    sharing = variants.HEADS["full" if variant[0] else "shared"]

    def network(**kwargs):
        backbone = models.vit_nano(patch_size=8, img_size=32, **kwargs)
        return models.MultiCropWrapper(backbone, models.iBOTHead(96, 32, 32, norm=norm, norm_last_layer=False, **sharing))
    student, teacher = network(masked_im_modeling=True), network().requires_grad_(False)
    ema = utils.ema_pairs(student, teacher)
    ddp = engine.data_parallel(student, torch.device("cpu"), accum_iter) if world_size > 1 else student
    temps = np.full(1, 0.05)
    ibot_loss = main_ibot.iBOTLoss(32, 32, temps, temps)
    ibot_loss.sinkhorn, ibot_loss.koleo = variant
    # SGD with momentum: Adam would scale the rounding noise of gradients that are zero up to whole steps.
    optimizer = utils.build_optimizer("sgd", utils.get_params_groups(student), torch.device("cpu"))
    B, share = 4, 4 // world_size // accum_iter
    meters = engine.DeviceMeters(main_ibot.METERS)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        crops = torch.randn(2, B, 3, 32, 32, generator=generator)
        local = torch.randn(3, B, 3, 16, 16, generator=generator)
        masks = torch.rand(2, B, 4, 4, generator=generator) < 0.4
        masks[0, 0] = False
        batches = []
        for part in range(rank * accum_iter, (rank + 1) * accum_iter):
            mine = slice(part * share, (part + 1) * share)
            m = masks[:, mine].flatten(2)
            weight = (1 / m.sum(-1, keepdim=True).clamp(min=1) / (2 * share)).expand(2, share, 16)[m]
            batches.append(loader.Batch(crops[:, mine], local[:, mine], torch.zeros(share), masks[:, mine],
                                        m.flatten().nonzero().flatten(), weight))
        losses, *_ = main_ibot.train_step(
            iter(batches), main_ibot.Training(ddp, teacher, ema, ibot_loss, optimizer),
            0, lr=0.1, weight_decay=0.1, momentum=0.9, clip_grad=3.0, freeze_last_layer=False, accum_iter=accum_iter)
        meters.add(*losses.values())
    rows = meters.read()
    if rank == 0:
        torch.save({"losses": torch.tensor([list(r.values()) for r in rows]), **ibot_loss.state_dict(),
                    **{f"student.{k}": v for k, v in student.state_dict().items()},
                    **{f"teacher.{k}": v for k, v in teacher.state_dict().items()}}, f"{folder}/{world_size}.{accum_iter}.pth")
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("norm, accum_iter, variant", [
    (None, 1, (False, 0)), (None, 2, (False, 0)), ("bn", 1, (False, 0)), (None, 1, (True, 0.5))])
def test_two_processes_equal_one(norm, accum_iter, variant, tmp_path):
    for world_size, parts in ((1, 1), (2, accum_iter)):
        multiprocessing.start_processes(steps, (world_size, parts, norm, variant, str(tmp_path)), nprocs=world_size,
                                        start_method="fork")
    one, two = (engine.load_checkpoint(tmp_path / name) for name in ("1.1.pth", f"2.{accum_iter}.pth"))
    assert one.keys() == two.keys() and len(one) > 100
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert (one["losses"][0] != one["losses"][2])[:3].all()


def sums(rank, world_size, folder):
    """Process 0 saves a sum over processes and its gradients, computed as it is and traced by torch.compile."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = []
    for compiled in (False, True):
        x = torch.tensor([1.0, 2.0], dtype=torch.float64).add(rank).requires_grad_()

        def cube(x):
            return SumOverProcesses.apply(x * x) ** 1.5
        (torch.compile(cube, backend="aot_eager") if compiled else cube)(x).sum().mul(rank + 1).backward()
        found.append(x.grad)
    if rank == 0:
        torch.save({"grad": torch.stack(found)}, f"{folder}/sums.pth")
    dist.destroy_process_group()


def test_gradient_of_a_sum_over_processes(tmp_path):
    """Every process's loss depends on it: 1 * s^1.5 + 2 * s^1.5 with s = x0^2 + x1^2."""
    multiprocessing.start_processes(sums, (2, str(tmp_path)), nprocs=2, start_method="fork")
    x = torch.tensor([[1.0, 2.0], [2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    (3 * x.square().sum(dim=0) ** 1.5).sum().backward()
    for grad in engine.load_checkpoint(tmp_path / "sums.pth")["grad"]:
        torch.testing.assert_close(grad, x.grad[0], rtol=1e-14, atol=0)


def test_processes_on_gpus_name_their_device(monkeypatch):
    calls = []
    monkeypatch.setattr(engine.process, "choose_device", lambda name, local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    device = torch.device("cuda", 1)
    assert engine.init_process().device == device
    assert calls == [device, ("nccl", {"init_method": "env://", "world_size": 4, "rank": 3, "device_id": device})]


@pytest.mark.parametrize("launcher", ["run", "launch"])
def test_launchers(launcher, digits, call, tmp_path):
    """torchrun and the old launcher, which passes --local-rank; both processes see a half of the data."""
    words = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--device", "cpu", "--out_dim", "32",
             "--patch_out_dim", "32", "--batch_size_per_gpu", "10", "--epochs", "1", "--num_workers", "1",
             "--data_path", digits / "train", "--output_dir", tmp_path]
    if launcher == "run":
        result = call("main_ibot.py", *words, processes=2)
    else:
        result = call("-m", f"torch.distributed.{launcher}", "--nproc_per_node=2", "--master_port=29517", "main_ibot.py", *words,
                      env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    assert "2 process(es)" in result.stdout and "6 steps an epoch" in result.stdout
    assert result.stdout.count("epoch 0 done") == 1  # only process 0 speaks
    assert "total batch: 20" in result.stdout
    assert engine.load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1


def test_slurm_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODELIST": "node7",
                        "SLURM_JOB_ID": "123456"}.items():
        monkeypatch.setenv(name, value)
    assert engine.process._launch_environment() == (0, 1, 0)  # a batch script outside srun is alone
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert engine.process._launch_environment() == (0, 8, 0)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert engine.process._launch_environment() == (5, 8, 1)
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: calls.append((backend, kwargs)))
    process = engine.init_process("cpu")
    assert process == engine.Process(5, 8, 1, torch.device("cpu"))
    assert calls == [("gloo", {"init_method": "env://", "world_size": 8, "rank": 5})]
    assert os.environ["MASTER_ADDR"] == "node7" and os.environ["MASTER_PORT"] == str(20000 + 123456 % 20000)


def test_error_of_one_process_alone_is_said(digits, call, tmp_path):
    """The broken file is in the share of process 1: its name must be in the output, and the run must end."""
    data = tmp_path / "data"
    shutil.copytree(digits / "train", data)
    files = sorted(data.rglob("*.png"))
    order = DistributedSampler(files, 2, 1, shuffle=True, seed=0)  # of epoch 0
    broken = files[list(order)[0]]
    broken.write_bytes(b"no image")
    result = call("main_ibot.py", "--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "32", "--device", "cpu",
                  "--out_dim", "32", "--patch_out_dim", "32", "--batch_size_per_gpu", "10", "--epochs", "1", "--num_workers", "0",
                  "--on_bad_image", "error", "--data_path", data, "--output_dir", tmp_path / "out", processes=2, check=False)
    assert result.returncode != 0
    assert f"error (process 1): {broken}" in result.stderr


def test_one_failing_process_names_itself(digits, call, tmp_path):
    result = call("main_ibot.py", "--data_path", tmp_path / "missing", "--device", "cpu", processes=2, check=False)
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: data folder {tmp_path / 'missing'}: No such file or directory"]


