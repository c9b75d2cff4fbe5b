"""Two processes over gloo: a step with its all-reduce against the same compute without; and an estimate for more."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_iwae.ddp import BUCKET
from lightning_iwae.models import MLP

from .plan import Plan
from .timing import Step, timed
from .ways import Work, adams, piwae_loss

PROCESSES = 2
SYNCHRONISED, MEETING, ALONE = "with all-reduce", "with one of a single number", "without"
PARAMETERS = 425_284  # of the papers' network


# ------------------------------------------------------------------------------------------------ measured
def run(plan: Plan) -> list[dict]:
    """At batch sizes of both processes together."""
    found = []
    for batch in plan.batches:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(partial(process, folder=folder, work=Work(batch // PROCESSES, plan.samples), plan=plan), nprocs=2)
            times = json.loads(Path(folder, "times.json").read_text())
        found.append({"batch": batch, "samples": plan.samples, **times})
    return found


def process(rank: int, folder: str, work: Work, plan: Plan) -> None:
    """One of the two, on its share of the cores; the first writes what both took, from barrier to barrier."""
    from lightning_iwae.cli import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    steps = ways_of(work)
    calls, rounds = calls_and_rounds(steps[SYNCHRONISED], plan)
    times: dict[str, list[float]] = {name: [] for name in steps}
    sent = 0
    for i in range(rounds):
        for name in rotated(list(steps), i):
            before = loopback()
            dist.barrier()
            times[name].append(timed(partial(together, steps[name], calls), 1) / calls)
            sent += loopback() - before if name == SYNCHRONISED else 0
    if rank == 0:
        result = {"times": times, "traffic": sent / rounds / calls / PROCESSES, "threads": torch.get_num_threads()}
        Path(folder, "times.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def ways_of(work: Work) -> dict[str, Step]:
    """DDP's step, whose gradients are averaged over processes, or of these one number, or none."""
    synchronised, alone = wrapped(work)
    meeting, _ = wrapped(work, one_number)
    return {SYNCHRONISED: synchronised, MEETING: meeting, ALONE: alone}


def wrapped(work: Work, hook: Callable | None = None) -> tuple[Step, Step]:
    """A step with DDP's all-reduce, or what `hook` puts in its place, and one without."""
    model, x = work.start()
    ddp, optimizers = DistributedDataParallel(Loss(model, work), bucket_cap_mb=BUCKET), adams(model)
    if hook is not None:
        ddp.register_comm_hook(None, hook)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        ddp(x).backward()
        for optimizer in optimizers:
            optimizer.step()

    def alone() -> None:
        with ddp.no_sync():
            step()

    return step, alone


def one_number(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Processes wait for each other as they do in an all-reduce, and gradients stay as they are."""
    gradients = bucket.buffer()
    met = dist.all_reduce(gradients[:1].clone(), async_op=True).get_future()
    return met.then(lambda _: gradients)


def rotated(names: list[str], by: int) -> list[str]:
    """Another one first."""
    by %= len(names)
    return names[by:] + names[:by]


class Loss(nn.Module):
    """What DDP wants: a module whose forward gives the loss."""

    def __init__(self, model: MLP, work: Work) -> None:
        super().__init__()
        self.model, self.work = model, work

    def forward(self, x: Tensor) -> Tensor:
        """Scalar."""
        return piwae_loss(self.model, x, self.work)


def calls_and_rounds(step: Step, plan: Plan) -> tuple[int, int]:
    """Steps a block of about a quarter of a second, and as many rounds of three as fill the time; alike in both."""
    for _ in range(5):
        step()
    seconds = torch.tensor(timed(step, 3), dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    calls = max(1, round(0.25 / seconds.item()))
    return calls, max(plan.rounds, round(plan.seconds / (3 * calls * seconds.item())))


def together(step: Step, calls: int) -> None:
    """So many steps, until all processes have done them."""
    for _ in range(calls):
        step()
    dist.barrier()


def loopback() -> int:
    """Bytes sent so far over the machine's network to itself, by anybody; 0 where that is not told."""
    if sys.platform != "linux":
        return 0
    lines = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()]
    return sum(int(line[9]) for line in lines if line and line[0] == "lo:")


# ------------------------------------------------------------------------------------------------ estimated
def traffic(processes: int, parameters: int = PARAMETERS) -> float:
    """Bytes that each process sends a step: a ring all-reduce of its fp32 gradients."""
    return 2 * (processes - 1) / processes * 4 * parameters


def all_reduce_seconds(processes: int, latency: float, bandwidth: float) -> float:
    """A ring's 2 (n - 1) hops of `latency` seconds each, and the bytes that a process sends at `bandwidth` a second."""
    return 2 * (processes - 1) * latency + traffic(processes) / bandwidth
