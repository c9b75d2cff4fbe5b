"""The `fit` command against a bare loop of the same step, and what a measurement of the SNR costs, in steps.

One fit, in which a callback takes turns with it: after every block of fit's steps as many of a bare loop, then one
measurement of gradients' signal-to-noise at the same batch. Fit reads data, binarises, logs and checks as it always
does; the loop has its batches ready.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_iwae.callbacks.gradient_snr import measure

from .plan import Plan
from .timing import Step, timed
from .ways import Work, adams, piwae_loss

ROOT = Path(__file__).parents[1]
FIT, INSIDE, LOOP, READING, SNR, EMPTY = "fit", "training_step", "bare loop", "reading", "SNR", "Lightning alone"


class TakingTurns(Callback):
    """Times blocks of the fit, of a bare loop, its data and SNR measurements, and writes them to `out` at the end.

    Args:
        out: a JSON file.
        block: steps of a block.
        batch: of the loop and of the measurement: that of the fit.
        samples: likewise.
        draws: of a measurement.
    """

    def __init__(self, out: str, block: int, batch: int, samples: int, draws: int) -> None:
        self.out, self.block, self.draws, self.work = Path(out), block, draws, Work(batch, samples)
        self.times: dict[str, list[float]] = {FIT: [], INSIDE: [], LOOP: [], READING: [], SNR: []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The loop starts from the fit's weights. Of a step of fit, what passes in the module's own is noted."""
        own, self._inside = pl_module.training_step, 0.0

        def training_step(*args: Any) -> None:
            self._inside += timed(lambda: own(*args), 1)

        pl_module.training_step = training_step
        self._loop = bare_loop(copy.deepcopy(pl_module.network), self.work)
        self._batches = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of a block the others' turn."""
        if trainer.global_step % self.block:
            return
        self.times[FIT].append((time.perf_counter() - self._start) / self.block)
        self.times[INSIDE].append(self._inside / self.block)
        self.times[LOOP].append(timed(self._loop, self.block))
        self.times[READING].append(timed(lambda: next(self._batches), self.block))
        self.times[SNR].append(timed(lambda: measure(pl_module, batch, self.draws), 1))
        self._inside, self._start = 0.0, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The first block is warm-up, of all."""
        self.out.write_text(json.dumps({name: found[1:] for name, found in self.times.items()}))


def bare_loop(model: Any, work: Work) -> Step:
    """The README's loop: a batch, the loss, one backward pass, two steps."""
    optimizers = adams(model)
    batches = cycle(torch.bernoulli(torch.rand(16, work.batch, 784)).unbind())

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        piwae_loss(model, next(batches), work).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


class Empty(LightningModule):
    """Two numbers with an optimiser each, both of which every step steps, by hand as `IWModule` does; nothing else.

    After every block of steps as many of the same without Lightning, whose time is taken off.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.numbers = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
        self.block, self.start, self.times = block, 0.0, list[float]()

    def configure_optimizers(self) -> Any:
        self.bare = [torch.optim.Adam([number], fused=True) for number in self.numbers]
        return self.bare

    def loss(self) -> Tensor:
        return torch.cat(list(self.numbers)).sum()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.block == 0:
            if batch_idx:
                self.times.append((time.perf_counter() - self.start) / self.block - timed(self.without, self.block))
            self.start = time.perf_counter()
        self.manual_backward(self.loss())
        theta, phi = cast(list[LightningOptimizer], self.optimizers())
        theta.step()
        phi.optimizer.step()

    def without(self) -> None:
        self.loss().backward()
        for optimizer in self.bare:
            optimizer.step()


def lightning_alone(blocks: int, block: int) -> list[float]:
    """Seconds that Lightning adds to a step of `Empty` on batches that lie ready, block by block, but for the first."""
    module = Empty(block)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.zeros(block * (blocks + 1) + 1), batch_size=None))  # type: ignore[arg-type]
    return module.times[1:]


def run(plan: Plan) -> dict:
    """Seconds a step of fit and loop, a batch and a measurement, block by block."""
    work, steps = Work(min(plan.batches), plan.samples), (1 + plan.blocks) * plan.block
    with tempfile.TemporaryDirectory() as folder:
        pixels, out = f"{folder}/pixels.npy", f"{folder}/times.json"
        items = np.random.default_rng(0).integers(256, size=(work.batch * steps + 200, 784), dtype=np.uint8)
        np.save(pixels, items)
        turns = {"out": out, "block": plan.block, "batch": work.batch, "samples": work.samples, "draws": plan.draws}
        callback = {"class_path": "benchmarks.fit.TakingTurns", "init_args": turns}
        data = {"train": pixels, "batch_size": work.batch, "binarization": "dynamic", "validation": 100}
        options = {
            "model.samples": work.samples,
            "model.theta.particles": work.samples,
            "model.phi.particles": work.phi,
            "data": json.dumps({"class_path": "lightning_iwae.data.Arrays", "init_args": data}),
            "trainer.callbacks": json.dumps([callback]),
            "trainer.max_epochs": 1,
            "trainer.max_steps": steps,
            "trainer.log_every_n_steps": plan.block,
            "trainer.default_root_dir": f"{folder}/run",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "lightning_iwae", "fit", "-c", "conf/mnist.yaml", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"fit ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        times = json.loads(Path(out).read_text())
    times[EMPTY] = lightning_alone(plan.blocks, plan.block)
    return {"batch": work.batch, "samples": work.samples, "block": plan.block, "draws": plan.draws, "times": times}
