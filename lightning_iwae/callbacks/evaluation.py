"""log p(x), both KLs and ESS along a run."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ..evaluation import Totals, evaluate
from ..models import Batch, cut, given, split
from ..module import IWModule
from ..randomness import forked, seed_for


class Evaluation(Callback):
    """Logs val/log_px, val/kl_q_posterior, val/kl_is_64 and val/ess of a fit, on the first of the validation data.

    On a model that knows them (`exact_log_px`, `exact_kl`) the exact values are logged beside the estimates, as
    val/exact_log_px and val/exact_kl_q_posterior. Training is untouched: the random state is as before.

    Args:
        every_n_epochs: interval; the first validation of a fit is always evaluated.
        particles: K of log p(x) and ESS.
        size: validation data taken, or all if they are fewer; every process takes its share.
    """

    def __init__(self, every_n_epochs: int = 1, particles: int = 1000, size: int = 500) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("particles", particles), ("size", size)):
            if value < 1:
                raise ValueError(f"Evaluation.{name} must be at least 1. Got {value}.")
        self.every_n_epochs, self.particles, self.size = every_n_epochs, particles, size
        self._left = 0  # data that this process has still to take in this validation
        self._totals: Totals | None = None
        self._evaluated = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit."""
        self._evaluated = False

    def state_dict(self) -> dict[str, bool]:
        """Whether there has been an evaluation: a resumed run makes no extra one."""
        return {"evaluated": self._evaluated}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        """As saved."""
        self._evaluated = state_dict["evaluated"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Is an evaluation due? It is before there is a val/log_px, by which checkpoints may be kept."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        due = trainer.current_epoch % self.every_n_epochs == 0 or not self._evaluated
        self._totals = Totals() if fitting and due else None
        self._left = -(-self.size // trainer.world_size)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate the batch, or what is wanted of it."""
        if self._totals is None or not self._left:
            return
        x, y = split(cut(batch, self._left))
        self._left -= len(x)
        module: IWModule = pl_module
        network: Any = module.network
        with forked(seed_for(module.seed, "evaluation", trainer.global_rank, batch_idx), module.device):
            values = evaluate(given(network, y), x, self.particles)
        values = {name: values[name] for name in ("log_px", "kl_q_posterior", "kl_is_64", "ess")}
        if hasattr(network, "exact_log_px"):
            values["exact_log_px"] = network.exact_log_px(x)
            values["exact_kl_q_posterior"] = network.exact_kl(x)
        self._totals.add(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the means over all processes."""
        if self._totals is None:
            return
        self._evaluated = True
        # not by Lightning's own mean, which rounds the number of data a process down
        result = self._totals.result(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))
        means = {f"val/{name}": result[name]["mean"] for name in self._totals.names}
        pl_module.log_dict(means, sync_dist=True)
