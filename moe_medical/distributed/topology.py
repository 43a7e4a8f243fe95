"""Which process this is, on which device, and the process group that joins it with the others.

A launcher's variables count only if they are complete: a lone RANK left in the environment does not
make a distributed run. Ranks of one machine share it fairly: one CPU thread each unless
OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import atexit
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from moe_medical.config.schema import ParallelSection
from moe_medical.distributed.roll_call import attended_roll_call
from moe_medical.errors import ConfigError, PeerLostError, PreemptedError, Problem
from moe_medical.ports import free_port

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Topology:
    """This process among its peers. Alone it needs no process group."""

    rank: int
    world_size: int
    device: torch.device
    source: str
    """What decided it: a launcher's environment, or a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over all ranks. Collective: every rank must call."""
        # A copy: the sum must not be written into the caller's array.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def from_main(self, values: np.ndarray) -> np.ndarray:
        """The main rank's values, on every rank. Collective: every rank must call."""
        return self.sum(values if self.is_main else np.zeros_like(values))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Concatenate equally shaped `rows` of all ranks in rank order. Collective: every rank must call."""
        if self.world_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        """Collective: wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def start_alone(section: ParallelSection) -> Topology:
    """This process by itself, on its device and without a process group."""
    return Topology(0, 1, _device(section, 0), "single process")


def start_distributed(section: ParallelSection) -> Topology:
    """Join (or, alone, make) the process group that DeepSpeed will use.

    Raises:
        PeerLostError: not every rank has joined in time.
    """
    env, source = _environment(os.environ)
    os.environ.update(env)
    device = _device(section, int(env["LOCAL_RANK"]))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _quiet_deepspeed()
    import deepspeed

    if dist.is_initialized():
        return Topology(dist.get_rank(), dist.get_world_size(), device, source)
    backend = "gloo" if device.type == "cpu" else "nccl"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=_limit(section), verbose=False)
    except RuntimeError as e:
        if not _is_of_transport(e):
            raise
        reason = str(e).splitlines()[0]
        raise PeerLostError(f"not all {env['WORLD_SIZE']} ranks have joined the run ({reason})") from None
    return Topology(dist.get_rank(), dist.get_world_size(), device, source)


def limit_waiting(section: ParallelSection) -> None:
    """Let no collective wait longer than the run file allows; call it once all groups are made."""
    # A new group has torch's default, 10 minutes for NCCL and 30 for gloo, not the first group's limit.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(_limit(section), group)


def _limit(section: ParallelSection) -> timedelta:
    return timedelta(seconds=section.timeout_seconds)


def stop_distributed() -> None:
    """Leave the process group, for good: DeepSpeed keeps groups of its own that end with it.

    Without it some runs end with a bad exit code.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_memory_gib(device: torch.device) -> float:
    """Most that this process has held so far: of the GPU's memory, or of the machine's without one."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def end_rank(code: int) -> NoReturn:
    """End the process of a rank with an exit code, without the interpreter's own teardown.

    gloo's threads give back Python's tensors, and one that does so during the teardown aborts the process.
    Its groups cannot be relied on to be gone by then: parameters that DeepSpeed has marked keep them.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_launched() -> bool:
    """Whether a launcher has made this process a rank."""
    return all(name in os.environ for name in _LAUNCHER_VARIABLES)


def launched_ranks() -> int:
    """World size that a launcher has set, 1 without a launcher."""
    return int(_environment(os.environ)[0]["WORLD_SIZE"])


def _environment(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    if all(name in env for name in _LAUNCHER_VARIABLES):
        return {name: env[name] for name in _LAUNCHER_VARIABLES}, "launcher environment"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return alone | {"MASTER_PORT": str(free_port())}, "single process"


def _device(section: ParallelSection, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if section.device == "cpu" or (section.device == "auto" and count < _ranks_here()):
        return torch.device("cpu")
    if local_rank >= count:
        rule = f"asks for GPU {local_rank} of this machine, which has {count}"
        problem = Problem("parallel.device", rule, section.device, "Use device=cpu or fewer ranks.")
        raise ConfigError("parallel", [problem])
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _ranks_here() -> int:
    """Ranks on this machine, as torchrun or the deepspeed launcher tells it."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn the transport's complaint about a peer into an error that says which ranks are missing.

    Collective: every rank must enter, and the ranks tell each other how they leave.

    Raises:
        PeerLostError: in place of what gloo or NCCL raised.
    """
    with attended_roll_call() as roll_call:
        try:
            yield
        except PreemptedError:  # all ranks stop together
            raise
        except Exception as e:
            if not _is_of_transport(e):
                if roll_call is not None:
                    roll_call.report_failure(type(e).__name__)
                raise
            lost = "another rank of this run has ended or cannot be reached"
            raise PeerLostError(lost if roll_call is None else roll_call.find_missing()) from None


def _is_of_transport(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is a complaint of the transport."""
    # gloo has no exception type of its own; its messages name its source file.
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo/" in str(error)):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_of_transport(cause)


def _quiet_deepspeed() -> None:
    """Only warnings of DeepSpeed, and no build of its shared-memory op, which training does not use."""
    import logging

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed.ops
    from deepspeed.utils import set_log_level_from_string

    set_log_level_from_string("error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # NOTE(deepspeed): on CPU init_distributed would compile this op and leak 66 MiB of /dev/shm per rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
