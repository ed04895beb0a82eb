"""Processes: how they find each other, and what they tell each other."""
import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.device import choose_device
from engine.errors import InputError


def environment_rank():
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


@dataclass(frozen=True)
class Process:
    """Where this process stands: its rank among `world_size`, its place on the node and its device."""
    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def _launch_environment():
    """(rank, world_size, local_rank) as torchrun, torch.distributed.launch or Slurm announce them; alone otherwise."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env:
        # Outside srun, in a batch script, SLURM_NTASKS is set but the other tasks do not run; the step's count is not set.
        in_step = env["SLURM_PROCID"] != "0" or "MASTER_ADDR" in env
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1") if in_step else "1")
        return int(env["SLURM_PROCID"]), int(tasks), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def _set_slurm_rendezvous():
    """`env://` needs MASTER_ADDR and MASTER_PORT, which srun does not set: first host of the step, port by job id."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
        if "[" in nodes or "," in nodes:
            listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            nodes = listing.stdout.split()[0]
        os.environ["MASTER_ADDR"] = nodes
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))


def init_process(device="auto", dist_url="env://"):
    """Join the process group of the launcher, if there is one: NCCL on GPUs, gloo elsewhere. Returns a `Process`.

    A run of one process makes no group. `print` is left alone; use `is_main_process()`.
    """
    rank, world_size, local_rank = _launch_environment()
    device = choose_device(device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        if device.type == "mps":
            raise InputError("several processes on --device mps are not supported; use one process or --device cpu")
        if dist_url == "env://" and "RANK" not in os.environ:
            _set_slurm_rendezvous()
        place = {"init_method": dist_url}
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":  # several nodes may count differently
            # After a restart torchrun's store may still hold the addresses of the processes before: gloo waits for them.
            place = {"store": dist.PrefixStore(f"attempt {attempt}", next(rendezvous(dist_url, rank, world_size))[0])}
        if device.type == "cuda":
            place["device_id"] = device  # NCCL connects now, and need not guess the device of a barrier
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", world_size=world_size, rank=rank, **place)
    return Process(rank, world_size, local_rank, device)


def data_parallel(network, device, accum_iter=1):
    """`network` for several processes, each with its share of the batch."""
    # Every step uses the same parameters; but torch cannot skip the synchronisation of some batches in a static graph.
    # Buffers are constants, or statistics that batch norm takes over all processes itself.
    return torch.nn.parallel.DistributedDataParallel(
        network, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
        broadcast_buffers=False, static_graph=accum_iter == 1)


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    return get_rank() == 0


def all_reduce_mean(tensor):
    """Mean of `tensor` over the processes (in place where there are several)."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


@lru_cache
def _host_group():
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None


def host_reduce(value, op="max"):
    """Largest ("max") or total ("sum") of an integer over the processes, by way of the hosts: no device is waited for."""
    if get_world_size() == 1:
        return value
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[op], group=_host_group())
    return int(tensor)


def gather_parts(tensor):
    """List of the 1-D tensors of all processes, of differing lengths, by rank."""
    if get_world_size() == 1:
        return [tensor]
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(n) for n in lengths)
    padded = tensor.new_zeros(longest)
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [part[:int(n)] for part, n in zip(parts, lengths, strict=True)]
