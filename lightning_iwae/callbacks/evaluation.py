"""log p(x), both KLs and ESS along a run."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ..evaluation import evaluate
from ..module import IWModule
from ..randomness import seed_for


class Evaluation(Callback):
    """Logs val/log_px, val/kl_q_posterior, val/kl_is_64 and val/ess on part of the validation set.

    On a model that knows them (`exact_log_px`, `exact_kl`) the exact values are logged beside the estimates, as
    val/exact_log_px and val/exact_kl_q_posterior.

    Args:
        every_n_epochs: interval; the first validation is always evaluated.
        particles: K of log p(x) and ESS.
        size: validation data taken.
    """

    def __init__(self, every_n_epochs: int = 1, particles: int = 1000, size: int = 500) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("particles", particles), ("size", size)):
            if value < 1:
                raise ValueError(f"Evaluation.{name} must be at least 1. Got {value}.")
        self.every_n_epochs, self.particles, self.size = every_n_epochs, particles, size

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate if due. Every rank takes its share of the data."""
        due = trainer.current_epoch % self.every_n_epochs == 0 or "val/log_px" not in trainer.callback_metrics
        if trainer.sanity_checking or (trainer.training and not due):
            return
        module: IWModule = pl_module
        x = trainer.datamodule.probe(self.size, "val")  # type: ignore[attr-defined]
        mine = x.tensor_split(trainer.world_size)[trainer.global_rank].to(module.device, module.dtype)
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_for(module.seed, "evaluation", trainer.global_rank))
            values = evaluate(module.network, mine, self.particles)
        values = {name: values[name] for name in ("log_px", "kl_q_posterior", "kl_is_64", "ess")}
        if hasattr(module.network, "exact_log_px"):
            with torch.no_grad():
                values["exact_log_px"] = module.network.exact_log_px(mine)
                values["exact_kl_q_posterior"] = module.network.exact_kl(mine)
        for name, value in values.items():
            total = trainer.strategy.reduce(value.sum(), reduce_op="sum")
            pl_module.log(f"val/{name}", total / len(x), rank_zero_only=False)
