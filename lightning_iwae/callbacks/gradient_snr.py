"""Signal-to-noise ratio of both networks' gradients along a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ..diagnostics import SNR, signal_to_noise
from ..models import Batch, cut, split
from ..module import IWModule
from ..randomness import forked, seed_for
from ..sides import Side
from ..slices import phi_gradients


@dataclass(frozen=True)
class Measured:
    """An estimator of phi's gradient that is measured, not trained with. See `Side`, whose options it has.

    Args:
        estimator: a row of `PHI`, or `package.module.function`.
        particles: K; those that phi is trained with if not given.
        beta, alpha, gamma, partition: options, of the estimators that have them.
    """

    estimator: str
    particles: int | None = None
    beta: float | None = None
    alpha: float | None = None
    gamma: float | None = None
    partition: int | tuple[float, ...] | None = None

    def side(self, particles: int) -> Side:
        """At its own particles, else at these."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return Side(**given | {"particles": particles if self.particles is None else self.particles})


class GradientSNR(Callback):
    """Logs snr/phi, snr/theta, dsnr/phi, dsnr/theta: `draws` gradient estimates at the current parameters on a probe.

    The probe is the same `size` training data each time: `probe(size)` of the data module, or where it has none the
    first of the first batch. Of each network's per-parameter SNR the mean is logged, with the quartiles (`_q25`,
    `_q50`, `_q75`), the value that pure noise would give (`_floor`) and the number of draws (snr/draws). Training is
    untouched: parameters, buffers, .grad, modes and random state are as before.

    As training does, a measurement draws its samples in slices where the module has a `chunk` or `memory`.

    Other `estimators` of phi's gradient are measured on the very same draws, as snr/phi/NAME and dsnr/phi/NAME, whose
    floors are phi's. NAME is the estimator's; of one that is listed more than once its settings follow.

    Args:
        every_n_steps: interval in steps, from the state before the first on.
        draws: n, gradient estimates a measurement.
        size: B, data in the probe. SNR grows as sqrt(B): compare at one size only.
        estimators: of phi, by name or as {estimator, particles, options}.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        draws: int = 100,
        size: int = 20,
        estimators: Sequence[str | Measured | Side] = (),
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("draws", draws, 4), ("size", size, 1)):
            if value < least:
                raise ValueError(f"GradientSNR.{name} must be at least {least}. Got {value}.")
        self.every_n_steps, self.draws, self.size = every_n_steps, draws, size
        self.estimators = named([Measured(e) if isinstance(e, str) else e for e in estimators])
        self._probe: Batch | None = None
        self._measured_at = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit. ValueError for estimators that the run can't be measured with."""
        self._probe, self._measured_at = None, -1
        for _, objective in pl_module.schedule.stages if stage == "fit" else ():
            for i, side in enumerate(self._sides(objective.phi).values()):
                key = f"GradientSNR.estimators[{i}]"
                side.check(key, objective.samples)
                if pl_module.kl_warmup:
                    side.check_kl_weight(key)

    def _sides(self, phi: Side) -> dict[str, Side]:
        """The estimators measured, by name, where phi is trained by this one."""
        found = self.estimators.items()
        return {name: e if isinstance(e, Side) else e.side(phi.particles) for name, e in found}

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
            measured = measure(module, batch, self.draws, self._sides(module.objective.phi))
        metrics: dict[str, float] = {"snr/draws": self.draws}
        for name, result in measured.items():
            metrics |= {f"snr/{name}": result.snr.mean().item(), f"dsnr/{name}": result.dsnr}
            if "/" not in name:
                quartiles = result.quantiles((0.25, 0.5, 0.75))
                metrics |= {f"snr/{name}_q{p}": q for p, q in zip((25, 50, 75), quartiles, strict=True)}
                metrics |= {f"snr/{name}_floor": result.snr_floor, f"dsnr/{name}_floor": result.dsnr_floor}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)


def named(estimators: Sequence[Measured | Side]) -> dict[str, Measured | Side]:
    """Each by its estimator's name, with its settings where that is not enough. ValueError for one that is twice."""
    often, found = Counter(e.estimator for e in estimators), dict[str, Measured | Side]()
    for e in estimators:
        settings = [(f.name, getattr(e, f.name)) for f in fields(e) if f.name != "estimator"]
        told = "".join(f"_{name}_{value}" for name, value in settings if value is not None)
        name = e.estimator + (told if often[e.estimator] > 1 else "")
        if name in found:
            raise ValueError(f"GradientSNR.estimators must differ from each other. Got {name} twice.")
        found[name] = e
    return found


def measure(module: IWModule, batch: Batch, draws: int, estimators: Mapping[str, Side] | None = None) -> dict[str, SNR]:
    """SNR of the gradients that `module` trains phi and theta with, on a batch, from the same draws.

    The parameters are in the order of `parameters()`. A network that has none to train is left out. Those of phi by
    other `estimators` follow as "phi/NAME": from these draws too, which are the same whatever else is measured.
    """
    network: Any = module.network
    networks = {"phi": network.inference, "theta": network.generative}
    sides = {name: [p for p in net.parameters() if p.requires_grad] for name, net in networks.items()}
    sides = {name: side for name, side in sides.items() if side}
    parameters = [p for side in sides.values() for p in side]
    others = dict(estimators or {}) if "phi" in sides else {}
    draw = 0

    def gradients() -> dict[str, Tensor]:
        nonlocal draw
        draw += 1
        drawn = module.draw(batch)
        found: list[Any] = []
        if others:
            with forked(seed_for(module.seed, "snr", "dreams", module.global_step, draw), module.device):
                found = phi_gradients(drawn, list(others.values()), sides["phi"])
        also = {f"phi/{name}": torch.cat([g.flatten() for g in of]) for name, of in zip(others, found, strict=True)}
        grads = iter(torch.autograd.grad(module.loss(drawn), parameters, allow_unused=True, materialize_grads=True))
        return {name: torch.cat([next(grads).flatten() for _ in side]) for name, side in sides.items()} | also

    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]  # BatchNorm's run with each draw
    measured = signal_to_noise(gradients, draws)
    for buffer, before in buffers:
        buffer.copy_(before)
    return measured
