"""Signal-to-noise ratio of both networks' gradients along a run."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ..diagnostics import SNR, signal_to_noise
from ..models import Batch, cut, split
from ..module import IWModule
from ..randomness import forked, seed_for


class GradientSNR(Callback):
    """Logs snr/phi, snr/theta, dsnr/phi, dsnr/theta: `draws` gradient estimates at the current parameters on a probe.

    The probe is the same `size` training data each time: `probe(size)` of the data module, or where it has none the
    first of the first batch. Of each network's per-parameter SNR the mean is logged, with the quartiles (`_q25`,
    `_q50`, `_q75`), the value that pure noise would give (`_floor`) and the number of draws (snr/draws). Training is
    untouched: parameters, buffers, .grad, modes and random state are as before.

    Args:
        every_n_steps: interval in steps, from the state before the first on.
        draws: n, gradient estimates a measurement.
        size: B, data in the probe. SNR grows as sqrt(B): compare at one size only.
    """

    def __init__(self, every_n_steps: int = 500, draws: int = 100, size: int = 20) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("draws", draws, 4), ("size", size, 1)):
            if value < least:
                raise ValueError(f"GradientSNR.{name} must be at least {least}. Got {value}.")
        self.every_n_steps, self.draws, self.size = every_n_steps, draws, size
        self._probe: Batch | None = None
        self._measured_at = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit."""
        self._probe, self._measured_at = None, -1

    def state_dict(self) -> dict[str, Any]:
        """The probe, and the step last measured at: a resumed run goes on with both."""
        return {"probe": self._probe, "measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved; a probe of another size is chosen anew."""
        probe, self._measured_at = state_dict["probe"], state_dict["measured_at"]
        self._probe = probe if probe is not None and len(split(probe)[0]) == self.size else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Choose the probe, and measure before the first step."""
        if self._probe is None:
            self._probe = self._choose(trainer, pl_module, batch)
        self._probe = trainer.strategy.batch_to_device(self._probe)
        self._measure(trainer, pl_module, self._probe)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Measure if due."""
        assert self._probe is not None
        self._measure(trainer, pl_module, self._probe)

    def _choose(self, trainer: Trainer, module: IWModule, batch: Batch) -> Batch:
        probe = getattr(trainer.datamodule, "probe", None)  # type: ignore[attr-defined]
        if probe is not None:
            return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(probe(self.size)))
        if self.size > (got := len(split(batch)[0])):
            raise ValueError(
                f"GradientSNR.size must be at most the batch's {got}, as the data have no method probe(n). "
                f"Got {self.size}."
            )
        return cut(batch, self.size)

    def _measure(self, trainer: Trainer, module: IWModule, batch: Batch) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step == self._measured_at:
            return  # the window of an accumulated step has several batches
        self._measured_at = step
        with forked(seed_for(module.seed, "snr", step), module.device), trainer.precision_plugin.forward_context():
            measured = measure(module, batch, self.draws)
        metrics: dict[str, float] = {"snr/draws": self.draws}
        for side, result in measured.items():
            quartiles = result.quantiles((0.25, 0.5, 0.75))
            metrics |= {f"snr/{side}": result.snr.mean().item(), f"snr/{side}_floor": result.snr_floor}
            metrics |= {f"snr/{side}_q{p}": q for p, q in zip((25, 50, 75), quartiles, strict=True)}
            metrics |= {f"dsnr/{side}": result.dsnr, f"dsnr/{side}_floor": result.dsnr_floor}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def measure(module: IWModule, batch: Batch, draws: int) -> dict[str, SNR]:
    """SNR of the gradients that `module` trains phi and theta with, on a batch, from the same draws.

    The parameters are in the order of `parameters()`. A network that has none to train is left out.
    """
    network: Any = module.network
    networks = {"phi": network.inference, "theta": network.generative}
    sides = {name: [p for p in net.parameters() if p.requires_grad] for name, net in networks.items()}
    sides = {name: side for name, side in sides.items() if side}
    parameters = [p for side in sides.values() for p in side]

    def gradients() -> dict[str, Tensor]:
        grads = iter(
            torch.autograd.grad(module.loss(module.draw(batch)), parameters, allow_unused=True, materialize_grads=True)
        )
        return {name: torch.cat([next(grads).flatten() for _ in side]) for name, side in sides.items()}

    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]  # BatchNorm's run with each draw
    measured = signal_to_noise(gradients, draws)
    for buffer, before in buffers:
        buffer.copy_(before)
    return measured
