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
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lightning_iwae.callbacks.gradient_snr import measure
from lightning_iwae.data import Arrays

from .plan import Plan
from .timing import Step, timed
from .ways import Work, adams, piwae_loss

ROOT = Path(__file__).parents[1]
FIT, INSIDE, LOOP, SNR = "fit", "training_step", "bare loop", "SNR"
LEAST, ITS_LOOP = "bare loop in Lightning", "bare loop beside it"


class TakingTurns(Callback):
    """Times blocks of the fit, of a bare loop and SNR measurements, and writes them to `out` at the end.

    Args:
        out: a JSON file.
        block: steps of a block.
        batch: of the loop and of the measurement: that of the fit.
        samples: likewise.
        draws: of a measurement.
    """

    def __init__(self, out: str, block: int, batch: int, samples: int, draws: int) -> None:
        self.out, self.block, self.draws, self.work = Path(out), block, draws, Work(batch, samples)
        self.times: dict[str, list[float]] = {FIT: [], INSIDE: [], LOOP: [], SNR: []}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The loop starts from the fit's weights. Of a step of fit, what passes in the module's own is noted."""
        own, self._inside = pl_module.training_step, 0.0

        def training_step(*args: Any) -> None:
            self._inside += timed(lambda: own(*args), 1)

        pl_module.training_step = training_step
        self._loop = bare_loop(copy.deepcopy(pl_module.network), self.work)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of a block the others' turn."""
        if trainer.global_step % self.block:
            return
        self.times[FIT].append((time.perf_counter() - self._start) / self.block)
        self.times[INSIDE].append(self._inside / self.block)
        self.times[LOOP].append(timed(self._loop, self.block))
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


class Bare(LightningModule):
    """The bare loop's step in a fit by Lightning and no more, in turns with the loop: what any such fit costs.

    Args:
        work: of a step.
        block: steps before it is the other's turn.
    """

    def __init__(self, work: Work, block: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.work, self.block, self.start = work, block, 0.0
        self.network, _ = work.start()
        self.loop = bare_loop(copy.deepcopy(self.network), work)
        self.times: dict[str, list[float]] = {LEAST: [], ITS_LOOP: []}

    def configure_optimizers(self) -> Any:
        return adams(self.network)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx % self.block == 0:
            if batch_idx:
                self.times[LEAST].append((time.perf_counter() - self.start) / self.block)
                self.times[ITS_LOOP].append(timed(self.loop, self.block))
            self.start = time.perf_counter()
        self.zero_grad()
        self.manual_backward(piwae_loss(self.network, batch, self.work))
        theta, phi = cast(list[LightningOptimizer], self.optimizers())
        theta.step()
        phi.optimizer.step()


def least(work: Work, data: LightningDataModule, blocks: int, block: int) -> dict[str, list[float]]:
    """Seconds a step of `Bare` on these data and of its loop, block by block, but for the first."""
    module = Bare(work, block)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=block * (blocks + 1) + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data.prepare_data()
    data.setup("fit")
    trainer.fit(module, data.train_dataloader())
    return {name: own[1:] for name, own in module.times.items()}


def run(plan: Plan) -> dict:
    """Seconds a step of fit and loop, and a measurement, block by block."""
    work, steps = Work(min(plan.batches), plan.samples), (1 + plan.blocks) * plan.block
    with tempfile.TemporaryDirectory() as folder:
        pixels, out = f"{folder}/pixels.npy", f"{folder}/times.json"
        items = np.random.default_rng(0).integers(256, size=(work.batch * steps + 200, 784), dtype=np.uint8)
        np.save(pixels, items)
        turns = {"out": out, "block": plan.block, "batch": work.batch, "samples": work.samples, "draws": plan.draws}
        callback = {"class_path": "benchmarks.fit.TakingTurns", "init_args": turns}
        data: dict[str, Any] = {"train": pixels, "batch_size": work.batch, "binarization": "dynamic", "validation": 100}
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
        times = json.loads(Path(out).read_text()) | least(work, Arrays(**data), plan.blocks, plan.block)
    return {"batch": work.batch, "samples": work.samples, "block": plan.block, "draws": plan.draws, "times": times}
