"""The LightningModule: two optimisers, one backward pass, one step of both networks."""

from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributions import Distribution

from . import __version__, bounds, routing
from .estimators import Side
from .evaluation import Totals, evaluate, importance_sample
from .models import check_model
from .randomness import seed_for
from .weights import ess


class IWModule(LightningModule):
    """Trains theta and phi of `network`, each by its own estimator and optimiser, from one set of samples.

    One step is one update of both networks: `max_steps`, checkpoint intervals and the logger's axis count those.

    Args:
        network: a model with .inference (phi) and .generative (theta), see `models.base.Model`.
        samples: S, drawn per datum and shared by both sides.
        theta: estimator and particles of the generative network.
        phi: estimator and particles of the inference network.
        optimizer_theta: any torch optimiser.
        optimizer_phi: any torch optimiser.
        scheduler_theta: any torch learning-rate scheduler.
        scheduler_phi: any torch learning-rate scheduler.
        scheduler_interval: what a step of the schedulers is.
        clip_theta: largest norm of theta's gradient; larger ones are scaled down to it.
        clip_phi: largest norm of phi's gradient.
        accumulate: batches whose gradients are averaged for one step of both networks.
        method: "auto" takes one backward pass where that is proven equal; "separate" always two.
        whole_batch_noise: draw the noise of the batch of all processes and take this rank's part, so that a run
            does not depend on the number of processes; costs their encoder passes.
        test_particles: K of log p(x) and ESS in `test`.
        seed: of the samples; the command line sets it to seed_everything.
    """

    def __init__(
        self,
        network: nn.Module,
        samples: int = 64,
        theta: Side = Side("iwae", 64),
        phi: Side = Side("iwae", 8),
        optimizer_theta: OptimizerCallable = torch.optim.Adam,
        optimizer_phi: OptimizerCallable = torch.optim.Adam,
        scheduler_theta: LRSchedulerCallable | None = None,
        scheduler_phi: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        clip_theta: float | None = None,
        clip_phi: float | None = None,
        accumulate: int = 1,
        method: routing.Method = "auto",
        whole_batch_noise: bool = False,
        test_particles: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_model(network)
        theta.check("model.theta", samples)
        phi.check("model.phi", samples)
        if accumulate < 1:
            raise ValueError(f"model.accumulate must be at least 1. Got {accumulate}.")
        for name, clip in (("theta", clip_theta), ("phi", clip_phi)):
            if clip is not None and clip <= 0:
                raise ValueError(f"model.clip_{name} must be positive, or null for none. Got {clip}.")
        self.automatic_optimization = False
        self.network = network
        self.samples, self.theta, self.phi = samples, theta, phi
        self.optimizer_theta, self.optimizer_phi = optimizer_theta, optimizer_phi
        self.scheduler_theta, self.scheduler_phi = scheduler_theta, scheduler_phi
        self.scheduler_interval = scheduler_interval
        self.clip_theta, self.clip_phi = clip_theta, clip_phi
        self.accumulate = accumulate
        self.method: routing.Method = method
        self.whole_batch_noise = whole_batch_noise
        self.test_particles = test_particles
        self.seed = seed
        self.result: dict[str, Any] = {}

    # -------------------------------------------------------------------------------------------- set-up
    def configure_optimizers(self) -> Any:
        """theta's, then phi's."""
        theta = self.optimizer_theta(self.network.generative.parameters())
        phi = self.optimizer_phi(self.network.inference.parameters())
        pairs = ((self.scheduler_theta, theta), (self.scheduler_phi, phi))
        return [theta, phi], [make(optimizer) for make, optimizer in pairs if make is not None]

    def setup(self, stage: str) -> None:
        """Give the network the training data's mean, if it asks for one."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(self.network, "set_data_mean") and hasattr(data, "train_mean"):
            self.network.set_data_mean(data.train_mean)

    def on_fit_start(self) -> None:
        """Refuse what would be wrong without a word."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("trainer.precision 16-mixed scales two optimisers' gradients apart: use bf16-mixed or 32.")

    # -------------------------------------------------------------------------------------------- training
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One batch: its gradients, and at the end of an accumulation window one step of both networks."""
        rank = 0 if self.whole_batch_noise else self.global_rank
        torch.manual_seed(seed_for(self.seed, "samples", rank, self.current_epoch, batch_idx))
        q = self._whole_batch_posterior(batch) if self.whole_batch_noise else None
        drawn = routing.draw(self.network, batch, self.samples, self.method, q)
        loss = routing.loss(drawn, self.theta, self.phi)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(batch, drawn))

        first = batch_idx - batch_idx % self.accumulate
        last = min(first + self.accumulate, int(self.trainer.num_training_batches)) - 1
        with nullcontext() if batch_idx == last else self._local_gradients():
            self.manual_backward(loss / (last - first + 1))
        if batch_idx == last:
            self._step()
        self._log_bounds(drawn.log_w)

    def _step(self) -> None:
        theta, phi = cast(list[LightningOptimizer], self.optimizers())
        for name, network, clip in (
            ("generative", self.network.generative, self.clip_theta),
            ("inference", self.network.inference, self.clip_phi),
        ):
            norm = nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf"))
            if not torch.isfinite(norm):
                raise FloatingPointError(f"Step {self.global_step}: the {name} network's gradient is not finite.")
        theta.step()
        phi.optimizer.step()  # past Lightning's wrapper, which would count a second step
        theta.optimizer.zero_grad()
        phi.optimizer.zero_grad()
        if self.scheduler_interval == "step":
            self._step_schedulers()

    def on_train_epoch_end(self) -> None:
        """Schedulers by epoch."""
        if self.scheduler_interval == "epoch":
            self._step_schedulers()

    def _step_schedulers(self) -> None:
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()

    def _whole_batch_posterior(self, x: Tensor) -> "Rows":
        everyone = self.all_gather(x).reshape(-1, *x.shape[1:])
        return Rows(self.network.posterior(everyone), len(x) * self.global_rank, len(x))

    def _local_gradients(self) -> Any:
        """No all-reduce: gradients add up on this rank until the window's last batch."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if block else nullcontext()

    def _log_bounds(self, log_w: Tensor) -> None:
        fraction = ess(log_w, 0).mean() / len(log_w)
        values = {
            "train/bound_theta": bounds.miwae(self.theta.view(log_w)).mean(),
            "train/bound_phi": bounds.miwae(self.phi.view(log_w)).mean(),
            "train/ess": fraction,
        }
        self.log_dict(values, batch_size=log_w.shape[1])
        self.log("bound", values["train/bound_theta"], prog_bar=True, logger=False)
        self.log("ess", fraction, prog_bar=True, logger=False)

    @torch.no_grad()
    def _not_finite(self, x: Tensor, drawn: routing.Draw) -> str:
        terms = {
            "the inference network's sample z": drawn.z,
            "the inference network's log q(z|x)": drawn.log_q,
            "the generative network's log p(z)": self.network.prior().log_prob(drawn.z_held),
            "the generative network's log p(x|z)": self.network.likelihood(drawn.z_held).log_prob(x),
        }
        bad = [f"{name} in {int((~v.isfinite()).sum())} of {v.numel()}" for name, v in terms.items() if not v.isfinite().all()]
        return f"Step {self.global_step}: the bound is not finite, by {'; '.join(bad) or 'its weights'}."

    # -------------------------------------------------------------------------------------------- validation
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """val/elbo and val/iwae_64 over the whole validation set."""
        self._seed_evaluation("validation", batch_idx)
        estimates = importance_sample(self.network, batch, 64)
        size = len(batch)
        values = {"val/elbo": estimates.elbo, "val/iwae_64": estimates.log_px}
        means = {name: v.sum() / max(size, 1) for name, v in values.items()}
        self.log_dict(means, batch_size=size, sync_dist=True, on_epoch=True)

    def on_test_start(self) -> None:
        """Forget earlier tests."""
        self._totals = Totals()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """All figures of one batch, per datum."""
        self._seed_evaluation("test", batch_idx)
        if len(batch):
            figures = evaluate(self.network, batch, self.test_particles)
            self._totals.add(figures, self.network.posterior(batch).mean)

    def on_test_epoch_end(self) -> None:
        """Means and standard errors: logged as test/*, kept in `result`, printed and saved by the command line."""
        result = self._totals.result(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self.log_dict({f"test/{k}": v["mean"] for k, v in result.items() if isinstance(v, dict)}, rank_zero_only=False)
        self.log("test/active_units", float(result["active_units"]))
        data = getattr(self.trainer, "datamodule", None)
        self.result = result | {
            "particles": self.test_particles,
            "data": type(data).__name__,
            "binarization": getattr(data, "binarization", None),
            "seed": self.seed,
            "version": __version__,
            "device": str(self.device),
        }

    def _seed_evaluation(self, stage: str, batch_idx: int) -> None:
        torch.manual_seed(seed_for(self.seed, stage, self.global_rank, batch_idx))


class Rows(Distribution):
    """The part of `q` (batch shape (B,)) that belongs to `size` data from `first` on; draws are those of the whole."""

    arg_constraints: dict = {}

    def __init__(self, q: Distribution, first: int, size: int) -> None:
        super().__init__(torch.Size([size]), q.event_shape, validate_args=False)
        self.q, self.rows = q, slice(first, first + size)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """z (S, size, ...) out of z (S, B, ...)."""
        return self.q.rsample(sample_shape)[:, self.rows]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z | x), shape (S, size)."""
        whole = value.new_zeros(value.shape[:1] + self.q.batch_shape + self.q.event_shape)
        return self.q.log_prob(torch.slice_scatter(whole, value, 1, self.rows.start, self.rows.stop))[:, self.rows]
