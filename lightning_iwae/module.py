"""The LightningModule: two optimisers, one backward pass, one step of both networks."""

import math
import warnings
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from . import __version__, bounds, routing, slices
from .diagnostics import LEAST_PARTICLES, active_units
from .evaluation import Totals, evaluate, evaluate_for_means, importance_sample, mean_variances, moment
from .models import Batch, check_model, data_shape, given, split, takes_labels
from .models.likelihoods import compile_likelihoods
from .randomness import forked, reseed, seed_for
from .schedule import Change, Objective, Schedule, kl_weight
from .sides import Side
from .weights import ess


class IWModule(LightningModule):
    """Trains theta and phi of `network`, each by its own estimator and optimiser, from one set of samples.

    One step is one update of both networks: `max_steps`, checkpoint intervals and the logger's axis count those.

    Args:
        network: a model with .inference (phi) and .generative (theta), see `models.base.Model`.
        samples: S, drawn per datum and shared by both sides.
        theta: estimator and particles of the generative network.
        phi: estimator and particles of the inference network.
        optimizer_theta: any torch optimiser that steps without a closure (LBFGS needs one).
        optimizer_phi: likewise.
        scheduler_theta: any torch learning-rate scheduler but ReduceLROnPlateau.
        scheduler_phi: likewise.
        scheduler_interval: what a step of the schedulers is.
        clip_theta: largest norm of theta's gradient; larger ones are scaled down to it.
        clip_phi: largest norm of phi's gradient.
        schedule: changes of samples, theta and phi at given epochs.
        kl_warmup: epochs over which the KL weight grows from 0 to 1, see `routing.draw`; 0 for none.
        accumulate: batches whose gradients are averaged for one step of both networks.
        method: "auto" takes one backward pass where that is proven equal; "separate" always two.
        whole_batch_noise: draw the noise of the batch of all processes and take this rank's part, so that a run
            does not depend on the number of processes; costs their encoder passes.
        compile: have torch.compile make one loop of each likelihood's value and gradient; Bernoulli's only.
        chunk: samples per datum in memory at a time, see `slices`; null for all. Gradients are those of all samples
            at once; a step takes one more forward pass.
        memory: GiB that a step's samples may take at once, in place of `chunk`: where they would take more, a chunk is
            chosen that fits. Null, the default, for no limit: a run then draws the same noise wherever it runs.
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
        schedule: list[Change] | None = None,
        kl_warmup: float = 0.0,
        accumulate: int = 1,
        method: routing.Method = "auto",
        whole_batch_noise: bool = False,
        compile: bool = False,
        chunk: int | None = None,
        memory: float | None = None,
        test_particles: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_model(network)
        self.schedule = Schedule(Objective(samples, theta, phi), schedule or ())
        if not kl_warmup >= 0:
            raise ValueError(f"model.kl_warmup must be at least 0. Got {kl_warmup}.")
        if whole_batch_noise and any(objective.phi.dreams for _, objective in self.schedule.stages):
            raise ValueError(
                "model.whole_batch_noise must be false with the estimator sleep, whose dreams are each rank's."
            )
        if any(objective.theta.of_prior for _, objective in self.schedule.stages) and not takes_labels(network):
            p = cast(Any, network).prior()
            routing.reparameterised(p, torch.zeros(p.event_shape))
        for _, objective in self.schedule.stages if kl_warmup else ():
            objective.theta.check_kl_weight("model.theta")
            objective.phi.check_kl_weight("model.phi")
        for name, count in (("accumulate", accumulate), ("test_particles", test_particles)):
            if count < 1:
                raise ValueError(f"model.{name} must be at least 1. Got {count}.")
        for name, clip in (("theta", clip_theta), ("phi", clip_phi)):
            if clip is not None and not clip > 0:
                raise ValueError(f"model.clip_{name} must be positive, or null for none. Got {clip}.")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"model.scheduler_interval must be epoch or step. Got {scheduler_interval}.")
        if method not in get_args(routing.Method):
            raise ValueError(f"model.method must be {' or '.join(get_args(routing.Method))}. Got {method}.")
        if compile and not compile_likelihoods(network):
            warnings.warn(
                f"model.compile does nothing for {type(network).__name__}, which has no Bernoulli likelihood of "
                "models.likelihoods.",
                stacklevel=2,
            )
        check_memory(chunk, memory, whole_batch_noise)
        self.automatic_optimization = False
        self.network: Any = network
        self.kl_warmup = kl_warmup
        self.optimizer_theta, self.optimizer_phi = optimizer_theta, optimizer_phi
        self.scheduler_theta, self.scheduler_phi = scheduler_theta, scheduler_phi
        self.scheduler_interval = scheduler_interval
        self.clip_theta, self.clip_phi = clip_theta, clip_phi
        self.accumulate = accumulate
        self.method: routing.Method = method
        self.whole_batch_noise = whole_batch_noise
        self.chunk, self.memory = chunk, memory
        self._fitting: dict[tuple, int] = {}  # chunks within `memory`, by samples and shape of the batch
        self.test_particles = test_particles
        self.seed = seed
        self.result: dict[str, Any] = {}
        self._sums = torch.zeros(3)  # of a validation: count, ELBO, L_64
        self._untrained = True
        self._batches = 0  # of the accumulation window so far
        self._failure = ""
        self._finite: Tensor | bool = True  # every gradient of this fit

    # -------------------------------------------------------------------------------------------- set-up
    def configure_optimizers(self) -> Any:
        """theta's, then phi's; each as one kernel, where torch has that and the config does not say otherwise."""
        theta = fused(self.optimizer_theta(self.network.generative.parameters()))
        phi = fused(self.optimizer_phi(self.network.inference.parameters()))
        pairs = ((self.scheduler_theta, theta), (self.scheduler_phi, phi))
        schedulers = [make(optimizer) for make, optimizer in pairs if make is not None]
        if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
            raise ValueError(
                "model.scheduler_theta, model.scheduler_phi: ReduceLROnPlateau waits for a metric; use another."
            )
        return [theta, phi], schedulers

    def setup(self, stage: str) -> None:
        """Give the network the training data's mean, if it asks for one, before it is first trained."""
        data: Any = getattr(self.trainer, "datamodule", None)
        wanted = hasattr(self.network, "set_data_mean") and hasattr(data, "train_mean")
        if stage == "fit" and wanted and self._untrained:
            self.network.set_data_mean(data.train_mean)
            self._untrained = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Its weights are trained ones."""
        self._untrained = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the last good checkpoint: after a gradient that was not finite there is nothing to save."""
        if not self._finite:
            raise FloatingPointError(f"Step {self.global_step}: a gradient was not finite.{self._when()}")

    def on_fit_start(self) -> None:
        """Refuse what would be wrong without a word, and let Lightning count steps instead of batches."""
        check_precision(self.trainer.precision)
        self._finite = True
        self.trainer.accumulate_grad_batches = self.accumulate

    def on_fit_end(self) -> None:
        """Leave the trainer as it was."""
        self.trainer.accumulate_grad_batches = 1

    # -------------------------------------------------------------------------------------------- training
    @property
    def objective(self) -> Objective:
        """What is trained on in the current epoch."""
        return self.schedule.at(self.current_epoch)

    @property
    def kl_weight(self) -> float:
        """That of the current batch."""
        if not self.kl_warmup or self._trainer is None:
            return 1.0
        batches = self.trainer.num_training_batches
        into_epoch = max(0, self.trainer.fit_loop.batch_idx) / batches  # 0 where batches are without number
        return kl_weight(self.current_epoch + into_epoch, self.kl_warmup)

    def draw(self, batch: Batch, q: Distribution | None = None) -> routing.Draw | slices.Slices:
        """Samples of a batch under the current objective, with what the gradients need; in slices by `chunk`."""
        x, y = split(batch)
        S, chunk = self.objective.samples, self.chunk
        if self.memory is not None:
            q = given(self.network, y).posterior(x) if q is None else q
            chunk = self._chunk_within(self.memory, x, q, y)
        return slices.draw(self.network, x, S, self.method, q, y, self.kl_weight, chunk)

    def _chunk_within(self, memory: float, x: Tensor, q: Distribution, y: Tensor | None) -> int:
        """Measured once for each number of samples and shape of the batch, and told."""
        S, key = self.objective.samples, (self.objective.samples, *x.shape)
        if key not in self._fitting:
            chunk, taken = slices.fitting(self.network, x, S, self.method, q, y, memory=memory * 2**30)
            self._fitting[key] = chunk
            rank_zero_info(
                f"model.memory of {memory} GiB: {chunk} of {S} samples at a time for a batch of {len(x)}, "
                f"which take {taken / 2**30:.3g} GiB."
            )
        return self._fitting[key]

    def loss(self, drawn: routing.Draw | slices.Slices) -> Tensor:
        """The scalar whose gradient is both networks' own, see `slices.loss`."""
        return slices.loss(drawn, self.objective.theta, self.objective.phi)

    def on_train_epoch_start(self) -> None:
        """Say which objective begins."""
        if len(self.schedule.stages) > 1 and self.current_epoch in dict(self.schedule.stages):
            rank_zero_info(f"Epoch {self.current_epoch}: {self.objective}")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One batch: its gradients, and at the end of an accumulation window one step of both networks."""
        if batch_idx % self.accumulate == 0:
            self.zero_grad()
            self._batches, self._failure = 0, ""
        self._batches += 1
        rank = 0 if self.whole_batch_noise else self.global_rank
        reseed(seed_for(self.seed, "samples", rank, self.current_epoch, batch_idx), self.device)
        q = self._whole_batch_posterior(batch) if self.whole_batch_noise else None
        drawn = self.draw(batch, q)
        loss = self.loss(drawn)
        logged = self._is_logged
        looked_at = logged or self.device.type == "cpu"  # elsewhere a look makes the device wait
        if looked_at and not math.isfinite(loss.item()):
            self._failure = self._not_finite(batch, drawn)
            loss = loss * math.nan  # through the all-reduce it stops every process, and none waits for another

        last = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        with nullcontext() if last else self._local_gradients():
            self.manual_backward(loss)
        if last:
            self._step(looked_at)
        if logged:
            self._log_bounds(drawn.log_w)

    @property
    def _is_logged(self) -> bool:
        """Whether the step that this batch belongs to is one of every `trainer.log_every_n_steps`."""
        every = self._logged_every
        return every > 0 and (self.global_step + 1) % every == 0

    @property
    def _logged_every(self) -> int:
        return self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _step(self, looked_at: bool) -> None:
        theta, phi = cast(list[LightningOptimizer], self.optimizers())
        sides = {"generative": self.clip_theta, "inference": self.clip_phi}
        gradients = {name: _gradients(getattr(self.network, name)) for name in sides}
        everything = [g for of_side in gradients.values() for g in of_side]
        if self._batches > 1 and everything:
            torch._foreach_div_(everything, self._batches)
        self._finite = self._finite & _all_finite(everything)
        if looked_at and not self._finite:
            names = [name for name, of_side in gradients.items() if not _all_finite(of_side)]
            failure = f"Step {self.global_step}: the {(names or ['generative'])[0]} network's gradient is not finite."
            raise FloatingPointError((self._failure or failure) + self._when())
        for name, clip in sides.items():
            if clip is not None:
                nn.utils.clip_grad_norm_(getattr(self.network, name).parameters(), clip)
        theta.step()
        phi.optimizer.step()  # past Lightning's wrapper, which would count a second step
        # An epoch's schedulers too step here: later than this, and a checkpoint of its last batch would lack it.
        if self.scheduler_interval == "step" or self.trainer.is_last_batch:
            schedulers = self.lr_schedulers() or []
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                cast(LRScheduler, scheduler).step()

    def _when(self) -> str:
        every = self._logged_every
        if self.device.type == "cpu" or every == 1:
            return ""
        return (
            f" It may have been so for up to {every - 1} steps: on {self.device.type} the steps that are logged are "
            "looked at. trainer.log_every_n_steps=1 names the step and the term."
        )

    def _whole_batch_posterior(self, batch: Batch) -> "Rows":
        x, y = (t if t is None else cast(Tensor, self.all_gather(t)).reshape(-1, *t.shape[1:]) for t in split(batch))
        size = len(split(batch)[0])
        return Rows(given(self.network, y).posterior(x), size * self.global_rank, size)

    def _local_gradients(self) -> Any:
        """No all-reduce: gradients add up on this rank until the window's last batch."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if block else nullcontext()

    def _log_bounds(self, log_w: Tensor) -> None:
        theta = bounds.miwae(self.objective.theta.view(log_w)).mean()
        phi = bounds.miwae(self.objective.phi.view(log_w)).mean()
        fraction = ess(log_w, 0).mean() / len(log_w)
        values = torch.stack([theta, phi, fraction]).detach()
        theta, phi, fraction = self.trainer.strategy.reduce(values, reduce_op="mean")  # of all processes' data, once
        logged: dict[str, Any] = {"train/bound_theta": theta, "train/bound_phi": phi, "train/ess": fraction}
        self.log_dict(logged | self._scheduled(), batch_size=log_w.shape[1])
        self.log("bound", theta, prog_bar=True, logger=False)
        self.log("ess", fraction, prog_bar=True, logger=False)

    def _scheduled(self) -> dict[str, float]:
        """What changes along the run."""
        values = {"train/kl_weight": self.kl_weight} if self.kl_warmup else {}
        if len(self.schedule.stages) > 1:
            objective = self.objective
            values["train/samples"] = float(objective.samples)
            for name, side in (("theta", objective.theta), ("phi", objective.phi)):
                values[f"train/{name}_particles"] = float(side.particles)
                numbers = {o: float(v) for o, v in side.options.items() if not isinstance(v, tuple)}
                values |= {f"train/{name}_{option}": value for option, value in numbers.items()}
        return values

    @torch.no_grad()
    def _not_finite(self, batch: Batch, drawn: routing.Draw | slices.Slices) -> str:
        x, y = split(batch)
        if isinstance(drawn, slices.Slices):
            drawn = drawn.again(drawn.worst())
        model = given(self.network, y)
        terms = {
            "the inference network's sample z": drawn.z,
            "the inference network's log q(z|x)": drawn.log_q,
            "the generative network's log p(z)": model.prior().log_prob(drawn.z_held),
            "the generative network's log p(x|z)": model.likelihood(drawn.z_held).log_prob(x),
        }
        counts = {name: int((~v.isfinite()).sum()) for name, v in terms.items()}
        bad = [f"{name} in {count} of {terms[name].numel()}" for name, count in counts.items() if count]
        return f"Step {self.global_step}: the bound is not finite, by {'; '.join(bad) or 'its weights'}."

    # -------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        """In a fit val/elbo and val/iwae_64, over the whole validation set; in `validate` what `test` gives."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self.test_step(batch, batch_idx)
        self._seed_evaluation("validation", batch_idx)
        x, y = split(batch)
        found = importance_sample(given(self.network, y), x, 64)
        sums = torch.stack([torch.ones_like(found.elbo), found.elbo, found.log_px]).sum(1)
        self._sums = self._sums + sums if batch_idx else sums
        return None

    def on_validation_epoch_end(self) -> None:
        """Means over data. (Lightning's own, with sync_dist, rounds the number of data per process down.)"""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self.on_test_epoch_end()
        n, elbo, at_64 = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log_dict({"val/elbo": elbo / n, "val/iwae_64": at_64 / n}, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """All figures of one batch, per datum: given to callbacks too."""
        self._seed_evaluation("test", batch_idx)
        if batch_idx == 0:
            self._totals = Totals()
        x, y = split(batch)
        model = given(self.network, y)
        figures = evaluate_for_means(model, x, self.test_particles)
        self._totals.add(figures, moment(model.posterior(x), "mean"))
        return figures

    def on_test_epoch_end(self) -> None:
        """Means and standard errors: logged as test/* (val/*), kept in `result`, printed by the command line."""
        result = self._totals.result(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        result |= self._active_units_train()
        stage = "test" if self.trainer.testing else "val"
        means = {f"{stage}/{k}": v["mean"] if isinstance(v, dict) else float(v) for k, v in result.items()}
        self.log_dict(means, sync_dist=True)
        self.result = result | self.about()

    def _active_units_train(self) -> dict[str, int]:
        """Burda et al.'s figure, where the data have a `probe`: over the first 500 training data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "probe") or not isinstance(data.train, Tensor):
            return {}
        probe = self.trainer.precision_plugin.convert_input(data.probe(min(500, len(data.train))))
        x, y = split(self.trainer.strategy.batch_to_device(probe))
        with forked(seed_for(self.seed, "active units"), self.device):
            return {"active_units_train": active_units(mean_variances(given(self.network, y), x))}

    def about(self) -> dict[str, Any]:
        """What figures depend on beside the weights."""
        data = getattr(self.trainer, "datamodule", None)
        return {
            "particles": self.test_particles,
            "data": type(data).__name__,
            "binarization": getattr(data, "binarization", None),
            "seed": self.seed,
            "version": __version__,
            "device": str(self.device),
        }

    def on_predict_start(self) -> None:
        """Refuse particles too few for a Pareto k-hat."""
        if self.test_particles < LEAST_PARTICLES:
            raise ValueError(
                f"model.test_particles must be at least {LEAST_PARTICLES} in a prediction, for its Pareto k-hat. "
                f"Got {self.test_particles}."
            )

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Mean and scale of q(z | x), where it knows them, and figures: of the same draws as `test`'s, per datum."""
        x, y = split(batch)
        model = given(self.network, y)
        if batch_idx == 0 and (shape := data_shape(model)) and x.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"data must have shape (N, {expected}), as the network has. Got {tuple(x.shape)}.")
        self._seed_evaluation("test", batch_idx)
        figures = evaluate(model, x, self.test_particles, k_hat=True)
        q = model.posterior(x)
        moments = {"mean": moment(q, "mean"), "scale": moment(q, "stddev")}
        return {name: value for name, value in moments.items() if value is not None} | figures

    def _seed_evaluation(self, stage: str, batch_idx: int) -> None:
        reseed(seed_for(self.seed, stage, self.global_rank, batch_idx), self.device)


def _gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def _all_finite(gradients: list[Tensor]) -> bool | Tensor:
    """Whether gradients are, by their norms; on a GPU a tensor, as a look at it would make the host wait."""
    if all(g.device.type == "cpu" for g in gradients):
        return all(math.isfinite(torch.linalg.vector_norm(g)) for g in gradients)
    return nn.utils.get_total_norm(gradients).isfinite()


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, as one kernel over all its parameters if torch has that for them and nothing else was asked for.

    Its steps are the same but for rounding.
    """
    choices = [optimizer.defaults.get(name) for name in ("foreach", "capturable", "differentiable")]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    can = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
    if can and optimizer.defaults.get("fused", False) is None and not any(choices):
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def check_precision(precision: str) -> None:
    """ValueError for a precision in which training would be wrong."""
    if precision not in ("32-true", "64-true", "bf16-mixed"):
        raise ValueError(
            "trainer.precision must be 32-true, 64-true or bf16-mixed (16-mixed scales two optimisers' gradients "
            f"apart, and log-weights need 32 bits). Got {precision}."
        )


def check_memory(chunk: int | None, memory: float | None, whole_batch_noise: bool) -> None:
    """ValueError, naming the key, for a chunk or a limit of memory that can't be."""
    slices.check_chunk(chunk, "model.chunk")
    if memory is None:
        return
    if not memory > 0:
        raise ValueError(f"model.memory must be positive, in GiB, or null for no limit. Got {memory}.")
    if chunk is not None:
        raise ValueError(f"model.chunk must be null with model.memory, which chooses it. Got {chunk}.")
    if whole_batch_noise:
        raise ValueError(
            "model.memory must be null with model.whole_batch_noise, as what fits depends on the number of processes: "
            f"give model.chunk. Got {memory}."
        )


class Rows(Distribution):
    """The part of `q` (batch shape (B,)) that belongs to `size` data from `first` on; draws are those of the whole."""

    arg_constraints: ClassVar[dict] = {}  # type: ignore[misc]

    def __init__(self, q: Distribution, first: int, size: int) -> None:
        super().__init__(torch.Size([size]), q.event_shape, validate_args=False)
        self.q, self.first, self.last = q, first, first + size

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """z (S, size, ...) out of z (S, B, ...)."""
        return self._part(self.q.rsample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The same of a q that is not reparameterised."""
        return self._part(self.q.sample(sample_shape))

    def _part(self, z: Tensor) -> Tensor:
        self.others = z.detach()
        return z[:, self.first : self.last]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z | x), shape (S, size), of as many samples as were drawn; the other rows keep theirs."""
        whole = torch.slice_scatter(self.others, value, 1, self.first, self.last)
        return self.q.log_prob(whole)[:, self.first : self.last]
