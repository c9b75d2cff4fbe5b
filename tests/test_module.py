"""The LightningModule: a step is one update of both networks, can be repeated exactly, and is never silently wrong."""

import copy
import json
import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributions import ExpTransform, Independent, LogNormal, Normal, TransformedDistribution
from torch.optim.lr_scheduler import LambdaLR, StepLR

import lightning_iwae
from lightning_iwae.callbacks import GradientSNR
from lightning_iwae.data import Digits
from lightning_iwae.diagnostics import pareto_k
from lightning_iwae.models import MLP
from lightning_iwae.module import IWModule, Rows
from lightning_iwae.randomness import seed_for
from lightning_iwae.schedule import Change, Objective, Schedule
from lightning_iwae.sides import Side

SGD = partial(torch.optim.SGD, lr=0.05)
BATCHES = 5  # of an epoch of `digits`


@pytest.fixture(autouse=True)
def one_thread(torch_as_it_was):
    """Five times as fast on networks this small."""
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ small runs
def digits(**options):
    """100 training items in 5 batches, 30 validation items in 2, 50 test items in 3."""
    return Digits(**{"batch_size": 20, "limit_train": 100, "validation": 30, "test": 50} | options)


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP(pixels=64, latent=3, hidden=[8])


def iw_module(network=None, **options):
    defaults = {"samples": 8, "theta": Side("iwae", 8), "phi": Side("iwae", 4), "test_particles": 100}
    return IWModule(mlp() if network is None else network, **defaults | options)


def quiet_trainer(**options):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**defaults | options)


def fit(module, data=None, ckpt_path=None, **options):
    trainer = quiet_trainer(**options)
    trainer.fit(module, digits() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def snapshot(module):
    return copy.deepcopy(module.network.state_dict())


def same(left, right):
    """Bit by bit, also of nested states."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def assert_close(left, right, tolerance=1e-12):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


class Record(Logger):
    """A logger that keeps (step, metrics)."""

    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def with_key(self, key):
        return [(step, row[key]) for step, row in self.rows if key in row]


class Watch(Callback):
    """What a run was before each batch, and after it."""

    def __init__(self):
        self.before, self.after, self.batches, self.rates, self.steps = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(snapshot(pl_module))
        self.batches.append((trainer.current_epoch, batch_idx, batch.clone()))
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(snapshot(pl_module))
        self.steps.append(trainer.global_step)

    def updates(self):
        """Per batch: whether the generative, and whether the inference network changed."""
        changed = [[k for k in a if not torch.equal(a[k], b[k])] for a, b in zip(self.before, self.after, strict=True)]
        return [(any("generative" in k for k in c), any("inference" in k for k in c)) for c in changed]


# ------------------------------------------------------------------------------- the same in plain torch, slowly
def log_weights(network, x, samples, *seed):
    """log w (S, B), the posterior held in its log_prob, and z: drawn as the module draws them."""
    torch.manual_seed(seed_for(*seed))
    q = network.posterior(x)
    z = q.rsample((samples,))
    return network.prior().log_prob(z) + network.likelihood(z).log_prob(x) - q.log_prob(z), q, z


def miwae(log_w, particles):
    groups = [log_w[i : i + particles] for i in range(0, len(log_w), particles)]
    return torch.stack([(g.logsumexp(0) - math.log(particles)).mean() for g in groups]).mean()


def objective(network, side, log_w, q, z, x):
    """What `side` is an ascent direction of, as something to differentiate."""
    if side.estimator == "dreg":
        mean, scale = q.base_dist.loc.detach(), q.base_dist.scale.detach()
        held = Independent(Normal(mean, scale), 1)
        w = network.prior().log_prob(z) + network.likelihood(z).log_prob(x) - held.log_prob(z)
        normalised = torch.cat([torch.softmax(g, 0) for g in log_w.detach().split(side.particles)])
        return (normalised.square() * w).sum(0).mean() * side.particles / len(log_w)
    bound = miwae(log_w, side.particles)
    return bound if side.beta is None else side.beta * log_w.mean() + (1 - side.beta) * bound


def gradients(module, network, epoch, batch_idx, x):
    """Of both networks' parameters, to be ascended."""
    now = module.schedule.at(epoch)
    drawn = log_weights(network, x, now.samples, module.seed, "samples", 0, epoch, batch_idx)
    found = {}
    for side, part in ((now.theta, network.generative), (now.phi, network.inference)):
        parameters = list(part.parameters())
        value = objective(network, side, *drawn, x)
        found |= dict(zip(parameters, torch.autograd.grad(value, parameters, retain_graph=True), strict=True))
    return found


def mean_gradients(module, network, window):
    each = [gradients(module, network, *batch) for batch in window]
    return {p: sum(g[p] for g in each) / len(each) for p in each[0]}


# ------------------------------------------------------------------------------------------- a step is a step
@pytest.mark.parametrize(("accumulate", "ends"), [(1, {0, 1, 2, 3, 4}), (2, {1, 3, 4}), (7, {4})])
def test_a_step_updates_both_networks_once(accumulate, ends):
    watch = Watch()
    trainer = fit(iw_module(accumulate=accumulate), max_epochs=3, callbacks=[watch])
    assert watch.updates() == [(batch_idx in ends,) * 2 for _, batch_idx, _ in watch.batches]
    assert len(watch.batches) == 3 * BATCHES
    assert trainer.global_step == 3 * len(ends)
    assert all(int(s["step"]) == 3 * len(ends) for o in trainer.optimizers for s in o.state.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_max_steps_and_checkpoint_intervals_count_steps(tmp_path, accumulate):
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    watch = Watch()
    options = {"max_steps": 7, "max_epochs": -1, "enable_checkpointing": True, "callbacks": [saved, watch]}
    trainer = fit(iw_module(accumulate=accumulate), **options)
    assert trainer.global_step == 7
    assert len(watch.batches) == {1: 7, 2: 12}[accumulate]  # 2: windows of 2, 2, 1; 2, 2, 1; 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for step in (2, 4, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        states = [s["step"] for o in checkpoint["optimizer_states"] for s in o["state"].values()]
        assert {int(s) for s in states} == {checkpoint["global_step"]} == {step}


@pytest.mark.parametrize(("accumulate", "every", "train", "val"), [
    (1, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 9]),
    (2, 1, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5], [2, 5]),  # windows of 2, 2 and 1 batches
    (2, 2, [1, 1, 3, 3, 5], [2, 5]),
])  # fmt: skip
def test_the_loggers_axis_counts_steps(accumulate, every, train, val):
    log = Record()
    fit(iw_module(accumulate=accumulate), max_epochs=2, logger=log, log_every_n_steps=every, limit_val_batches=1.0)
    assert [step for step, _ in log.with_key("train/bound_theta")] == train
    assert [step for step, _ in log.with_key("val/elbo")] == val


def test_the_trainer_is_left_as_it_was():
    module, data = iw_module(accumulate=2), digits()
    trainer = fit(module, data, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)  # Lightning refuses trainers whose own accumulation is set
    assert trainer.global_step == 6


def test_each_network_has_its_own_optimizer():
    module = iw_module(
        optimizer_theta=partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.9)),
        optimizer_phi=partial(torch.optim.SGD, lr=0.1, momentum=0.7),
    )
    theta, phi = fit(module, max_steps=1).optimizers
    assert type(theta) is torch.optim.Adam
    assert theta.param_groups[0]["lr"] == 0.01
    assert theta.param_groups[0]["betas"] == (0.8, 0.9)
    assert type(phi) is torch.optim.SGD
    assert phi.param_groups[0]["lr"] == 0.1
    assert phi.param_groups[0]["momentum"] == 0.7
    for optimizer, network in ((theta, module.network.generative), (phi, module.network.inference)):
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in network.parameters()}


# ----------------------------------------------------------------------------------------------- what is trained
OBJECTIVES = {
    "vae": (Side("elbo", 1), Side("elbo", 1)),
    "piwae": (Side("iwae", 8), Side("iwae", 2)),
    "ciwae": (Side("ciwae", 4, beta=0.3), Side("ciwae", 8, beta=0.6)),
    "dreg": (Side("iwae", 8), Side("dreg", 4)),
    "miwae-elbo": (Side("iwae", 4), Side("elbo", 8)),
}


def elbo_side(side):
    """`elbo` is the bound with K = 1 whatever its particles."""
    return Side("iwae", 1) if side.estimator == "elbo" else side


@pytest.mark.parametrize("whole_batch_noise", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_equal_a_hand_written_loop(name, whole_batch_noise):
    theta, phi = OBJECTIVES[name]
    watch = Watch()
    module = iw_module(
        theta=theta,
        phi=phi,
        seed=3,
        whole_batch_noise=whole_batch_noise,
        optimizer_theta=partial(torch.optim.Adam, lr=0.01),
        optimizer_phi=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )
    fit(module, max_steps=3, precision="64-true", callbacks=[watch])

    network = mlp().double()
    network.load_state_dict(watch.before[0])
    module.schedule = Schedule(Objective(module.objective.samples, elbo_side(theta), elbo_side(phi)))
    moments = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in network.parameters()}
    phi_parameters = set(network.inference.parameters())
    for step, batch in enumerate(watch.batches, 1):
        for p, ascent in gradients(module, network, *batch).items():
            first, second = moments[p]
            if p in phi_parameters:
                first.mul_(0.9).sub_(ascent)
                p.data -= 0.05 * first
            else:
                first.mul_(0.9).add_(-ascent, alpha=0.1)
                second.mul_(0.999).addcmul_(ascent, ascent, value=0.001)
                p.data -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert len(watch.batches) == 3
    assert_close(module.network.state_dict(), network.state_dict(), 1e-11)


# -------------------------------------------------------------------------------------------------- accumulation
def windows_of(watch, accumulate):
    """The watched batches, by the step that they were part of."""
    windows = {}
    for batch in watch.batches:
        windows.setdefault((batch[0], batch[1] // accumulate), []).append(batch)
    return list(windows.values())


def descend(module, network, windows, lr):
    """Plain gradient ascent with the mean gradient of each window."""
    for window in windows:
        for p, ascent in mean_gradients(module, network, window).items():
            p.data += lr * ascent
    return network.state_dict()


class Unsized:
    """Batches of unknown number, as an iterable data set's are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Sized(Unsized):
    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
@pytest.mark.parametrize("options", [
    {},
    {"limit_train_batches": 4},
    {"limit_val_batches": 1.0, "val_check_interval": 1},
    {"limit_val_batches": 1.0, "val_check_interval": 3},
], ids=str)  # fmt: skip
def test_a_step_takes_the_mean_gradient_of_its_window(accumulate, options):
    module, watch = iw_module(accumulate=accumulate, optimizer_theta=SGD, optimizer_phi=SGD), Watch()
    trainer = fit(module, max_epochs=2, precision="64-true", callbacks=[watch], **options)
    network = mlp().double()
    network.load_state_dict(watch.before[0])
    windows = windows_of(watch, accumulate)
    assert trainer.global_step == len(windows) == 2 * math.ceil(options.get("limit_train_batches", 5) / accumulate)
    assert_close(module.network.state_dict(), descend(module, network, windows, 0.05))


def test_batches_of_unknown_number_are_accumulated_alike():
    x = torch.rand(5, 20, 64).round()
    ends = []
    for loader in (Sized(x), Unsized(x)):
        module = iw_module(accumulate=2, optimizer_theta=SGD, optimizer_phi=SGD)
        trainer = quiet_trainer(max_epochs=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
            trainer.fit(module, loader)
        assert trainer.global_step == 6
        ends.append(snapshot(module))
    assert same(*ends)
    assert not same(ends[0], mlp().state_dict())


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx + 1 == self.batches


def test_an_interrupted_window_leaves_nothing_behind():
    ends = []
    for interrupted in (False, True):
        module = iw_module(accumulate=2, optimizer_theta=SGD, optimizer_phi=SGD)
        if interrupted:
            trainer = fit(module, max_epochs=1, callbacks=[StopAfter(1)])
            assert trainer.global_step == 0
            assert any(p.grad is not None for p in module.parameters())
        fit(module, max_epochs=1)
        ends.append(snapshot(module))
    assert same(*ends)


# ------------------------------------------------------------------------------------------------------- clipping
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("clip_theta", "clip_phi"), [(0.01, None), (None, 0.01), (0.02, 0.01), (1e6, 1e6)])
def test_clipping_is_per_network(clip_theta, clip_phi, accumulate):
    options = {"optimizer_theta": SGD, "optimizer_phi": SGD, "accumulate": accumulate}
    module, watch = iw_module(clip_theta=clip_theta, clip_phi=clip_phi, **options), Watch()
    fit(module, max_steps=1, precision="64-true", callbacks=[watch])
    network = mlp().double()
    network.load_state_dict(watch.before[0])
    found = mean_gradients(module, network, watch.batches)
    for part, clip in ((network.generative, clip_theta), (network.inference, clip_phi)):
        norm = torch.cat([found[p].flatten() for p in part.parameters()]).norm()
        assert norm > 0.1
        scale = 1.0 if clip is None or clip > 1 else clip / (norm + 1e-6)
        for p in part.parameters():
            p.data += 0.05 * scale * found[p]
    assert_close(module.network.state_dict(), network.state_dict())
    for part, clip in ((module.network.generative, clip_theta), (module.network.inference, clip_phi)):
        if clip is not None:
            assert torch.cat([p.grad.flatten() for p in part.parameters()]).norm() <= clip


# ----------------------------------------------------------------------------------------------------- schedulers
HALVED = partial(StepLR, step_size=1, gamma=0.5)
HARMONIC = partial(LambdaLR, lr_lambda=lambda n: 1 / (1 + n))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(("theta", "phi"), [(HALVED, None), (None, HALVED), (HALVED, HARMONIC), (None, None)])
def test_learning_rates_follow_their_schedules(theta, phi, interval, accumulate):
    module = iw_module(
        optimizer_theta=partial(torch.optim.SGD, lr=0.4),
        optimizer_phi=partial(torch.optim.SGD, lr=0.1),
        scheduler_theta=theta,
        scheduler_phi=phi,
        scheduler_interval=interval,
        accumulate=accumulate,
    )
    watch = Watch()
    trainer = fit(module, max_epochs=3, callbacks=[watch])
    shapes = {None: lambda n: 1.0, HALVED: lambda n: 0.5**n, HARMONIC: lambda n: 1 / (1 + n)}
    steps = math.ceil(BATCHES / accumulate)
    for (epoch, batch_idx, _), rates in zip(watch.batches, watch.rates, strict=True):
        n = epoch if interval == "epoch" else epoch * steps + batch_idx // accumulate
        assert rates == pytest.approx([0.4 * shapes[theta](n), 0.1 * shapes[phi](n)], rel=1e-12)
    end = 3 if interval == "epoch" else 3 * steps
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([0.4 * shapes[theta](end), 0.1 * shapes[phi](end)], rel=1e-12)


@pytest.mark.parametrize("plateau", [
    torch.optim.lr_scheduler.ReduceLROnPlateau,
    partial(ReduceLROnPlateau, monitor="val/elbo"),
])  # fmt: skip
def test_a_scheduler_that_waits_for_a_metric_is_refused(plateau):
    with pytest.raises(ValueError, match=r"scheduler_phi.*ReduceLROnPlateau"):
        fit(iw_module(scheduler_phi=plateau), max_epochs=1)


# ------------------------------------------------------------------------------------------ checkpoints and resume
def long_run(accumulate, interval, seed=0, chunk=None, **options):
    module = iw_module(
        mlp(seed),
        chunk=chunk,
        optimizer_theta=partial(torch.optim.Adam, lr=0.01),
        optimizer_phi=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        scheduler_theta=HARMONIC,
        scheduler_phi=HALVED,
        scheduler_interval=interval,
        accumulate=accumulate,
    )
    log = Record()
    return module, log, fit(module, max_epochs=3, logger=log, limit_val_batches=1.0, **options)


class SaveAt(Callback):
    """Saves at one kind of moment, the first time it comes after a step."""

    def __init__(self, folder, moment):
        self.folder, self.moment = folder, moment
        setattr(self, moment, self.save)

    def save(self, trainer, pl_module, *_):
        path = self.folder / f"{trainer.global_step}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(tmp_path, moment, interval, accumulate):
    module, log, trainer = long_run(accumulate, interval, callbacks=[SaveAt(tmp_path, moment)])
    per_epoch = math.ceil(BATCHES / accumulate)
    starts = {1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch}
    if moment != "on_train_batch_end":
        starts = {per_epoch, 2 * per_epoch}
    for start in starts:
        other, other_log, other_trainer = long_run(accumulate, interval, seed=9, ckpt_path=tmp_path / f"{start}.ckpt")
        assert other_trainer.global_step == trainer.global_step == 3 * per_epoch
        assert same(other.network.state_dict(), module.network.state_dict())
        for mine, theirs in zip(other_trainer.optimizers, trainer.optimizers, strict=True):
            assert same(mine.state_dict(), theirs.state_dict())
        for key in ("train/bound_theta", "train/bound_phi"):
            assert other_log.with_key(key) == [row for row in log.with_key(key) if row[0] >= start]
        assert other_log.with_key("val/elbo")[-1] == log.with_key("val/elbo")[-1]


def test_a_run_in_slices_is_resumed_to_the_last_bit(tmp_path):
    module, log, _ = long_run(2, "step", chunk=3, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    other, other_log, _ = long_run(2, "step", seed=9, chunk=3, ckpt_path=tmp_path / "4.ckpt")
    assert same(other.network.state_dict(), module.network.state_dict())
    assert other_log.with_key("train/bound_phi") == [row for row in log.with_key("train/bound_phi") if row[0] >= 4]


def test_a_window_resumed_in_its_middle_averages_the_batches_that_are_left(tmp_path):
    options = {"accumulate": 3, "optimizer_theta": SGD, "optimizer_phi": SGD}
    fit(iw_module(**options), max_epochs=1, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])  # 0.ckpt: after batch 0
    module, watch = iw_module(mlp(9), **options), Watch()
    fit(module, max_epochs=1, callbacks=[watch], ckpt_path=tmp_path / "0.ckpt")
    windows = windows_of(watch, 3)
    assert [[batch_idx for _, batch_idx, _ in window] for window in windows] == [[1, 2], [3, 4]]
    network = mlp()
    network.load_state_dict(watch.before[0])
    assert_close(module.network.state_dict(), descend(module, network, windows, 0.05), 1e-6)


def test_checkpoints_hold_both_optimizers_states(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    module, *_ = long_run(1, "step", enable_checkpointing=True, callbacks=[saved])
    theta, phi = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["optimizer_states"]
    for state, network, keys in (
        (theta, module.network.generative, {"step", "exp_avg", "exp_avg_sq"}),
        (phi, module.network.inference, {"momentum_buffer"}),
    ):
        shapes = [p.shape for p in network.parameters()]
        assert [set(s) for s in state["state"].values()] == [keys] * len(shapes)
        assert [s[max(keys - {"step"})].shape for s in state["state"].values()] == shapes


def test_resuming_may_change_the_objective(tmp_path):
    fit(iw_module(), max_steps=2, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    other = iw_module(mlp(9), samples=12, theta=Side("iwae", 12), phi=Side("dreg", 6))
    log = Record()
    fit(other, max_steps=3, ckpt_path=tmp_path / "2.ckpt", logger=log)
    assert [step for step, _ in log.with_key("train/bound_phi")] == [2]


# ------------------------------------------------------------------------------------- the training data's mean
def bias(module):
    return module.network.generative.last.bias.detach().clone()


def test_the_output_bias_starts_at_the_datas_log_odds():
    module, data = iw_module(), digits()
    fit(module, data, max_epochs=0)
    torch.testing.assert_close(bias(module), torch.logit(data.train_mean.clamp(0.001, 0.999)))
    assert bias(module).std() > 1


def test_a_trained_output_bias_is_kept_when_training_goes_on(tmp_path):
    module = iw_module()
    trainer = fit(module, max_epochs=1)
    trained = bias(module)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    fit(module, max_epochs=0)
    assert torch.equal(bias(module), trained)
    loaded = IWModule.load_from_checkpoint(tmp_path / "trained.ckpt", network=mlp(9))
    fit(loaded, max_epochs=0)
    assert torch.equal(bias(loaded), trained)


# ----------------------------------------------------------------------------------------------------- not finite
class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Fragile(MLP):
    """Breaks in the way that `fault` names."""

    fault = ""

    def prior(self):
        origin = torch.zeros(3)
        mean = origin * math.nan if self.fault == "prior" else origin
        return Independent(Normal(mean, 1.0, validate_args=False), 1)

    def posterior(self, x):
        mean, log_scale = self.inference(x).chunk(2, -1)
        if self.fault == "infinite mean":
            mean = mean + math.inf
        if self.fault == "nan gradient of phi":
            mean = NaNGradient.apply(mean)
        scale = log_scale.exp() * (0.0 if self.fault == "no scale" else 1.0)
        return Independent(Normal(mean, scale, validate_args=False), 1)

    def likelihood(self, z):
        p = super().likelihood(z)
        if self.fault == "nan logits":
            return type(p)(p.logits * math.nan)
        if self.fault == "-inf":
            p.log_prob = lambda x: (p.logits - x).sum(-1) - math.inf
        if self.fault == "+inf":
            p.log_prob = lambda x: (p.logits - x).sum(-1) + math.inf
        if self.fault == "nan gradient of theta":
            return type(p)(NaNGradient.apply(p.logits))
        return p


class BreakAt(Callback):
    """Sets the fault before the batch `at`, and keeps what was there before."""

    def __init__(self, fault, at):
        self.fault, self.at = fault, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            pl_module.network.fault = self.fault
            self.weights = snapshot(pl_module)
            self.states = copy.deepcopy([o.state_dict() for o in trainer.optimizers])


def broken_run(fault, tmp_path, accumulate=1, at=3, **options):
    torch.manual_seed(0)
    module = iw_module(Fragile(pixels=64, latent=3, hidden=[8]), accumulate=accumulate, **options)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    broken = BreakAt(fault, at)
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[broken, saved])
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit(module, digits())
    # no weight and no optimiser's state has changed, and the last checkpoint is there
    steps = at // accumulate
    last = torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True)
    assert len(list(tmp_path.iterdir())) == steps
    assert same(module.network.state_dict(), broken.weights)
    assert same({k.removeprefix("network."): v for k, v in last["state_dict"].items()}, broken.weights)
    assert same([o.state_dict() for o in trainer.optimizers], broken.states)
    assert all(w.isfinite().all() for w in broken.weights.values())
    assert str(caught.value).startswith(f"Step {steps}: ")
    return str(caught.value)


LOG_P = "the generative network's log p(x|z)"
PRIOR = "the generative network's log p(z)"
LOG_Q = "the inference network's log q(z|x)"
Z = "the inference network's sample z"


@pytest.mark.parametrize(("fault", "named", "not_named"), [
    ("nan logits", [f"{LOG_P} in 160 of 160"], [PRIOR, LOG_Q, Z]),
    ("-inf", [f"{LOG_P} in 160 of 160"], [PRIOR, LOG_Q, Z]),
    ("+inf", [f"{LOG_P} in 160 of 160"], [PRIOR, LOG_Q, Z]),
    ("prior", [f"{PRIOR} in 160 of 160"], [LOG_P, LOG_Q, Z]),
    ("no scale", [f"{LOG_Q} in 160 of 160"], [LOG_P, PRIOR, Z]),
    ("infinite mean", [f"{Z} in 480 of 480"], []),
])  # fmt: skip
def test_a_bound_that_is_not_finite_ends_the_run_and_names_the_term(fault, named, not_named, tmp_path):
    message = broken_run(fault, tmp_path)
    assert "the bound is not finite" in message
    assert all(term in message for term in named)
    assert not any(term in message for term in not_named)


@pytest.mark.parametrize(("fault", "named"), [("nan logits", LOG_P), ("prior", PRIOR), ("no scale", LOG_Q)])
def test_a_bound_that_is_not_finite_in_slices_is_told_of_one(fault, named, tmp_path):
    assert f"the bound is not finite, by {named} in 60 of 60." in broken_run(fault, tmp_path, chunk=3)


def test_a_bound_that_is_not_finite_ends_its_accumulation_window(tmp_path):
    assert LOG_P in broken_run("nan logits", tmp_path, accumulate=2, at=2)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("fault", "network"), [("theta", "generative"), ("phi", "inference")])
def test_a_gradient_that_is_not_finite_ends_the_run_before_any_weight_changes(fault, network, accumulate, tmp_path):
    message = broken_run(f"nan gradient of {fault}", tmp_path, accumulate, at=2)
    assert f"the {network} network's gradient is not finite" in message


def test_training_may_go_on_after_a_repair(tmp_path):
    torch.manual_seed(0)
    module = iw_module(Fragile(pixels=64, latent=3, hidden=[8]))
    with pytest.raises(FloatingPointError):
        fit(module, max_epochs=1, callbacks=[BreakAt("nan logits", 1)])
    module.network.fault = ""
    assert fit(module, max_epochs=1).global_step == BATCHES


# ------------------------------------------------------------------------------------------------------ precision
def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"bf16-mixed.*16-mixed"):
        fit(iw_module(), max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu")])
    for precision in ("16-true", "bf16-true"):
        with pytest.raises(ValueError, match=f"precision.*Got {precision}"):
            fit(iw_module(), max_epochs=1, precision=precision)


def test_bf16_mixed_computes_bounds_in_float32(monkeypatch):
    module, log, hidden, weights = iw_module(), Record(), [], []
    module.network.generative.register_forward_hook(lambda *args: hidden.append(args[-1].dtype))
    monkeypatch.setattr(module, "_log_bounds", lambda w, report=module._log_bounds: (weights.append(w), report(w)))
    fit(module, max_epochs=1, precision="bf16-mixed", logger=log)
    assert set(hidden) == {torch.bfloat16}
    assert {w.dtype for w in weights} == {torch.float32}
    for (_, theta), (_, phi), w in zip(
        log.with_key("train/bound_theta"), log.with_key("train/bound_phi"), weights, strict=True
    ):
        assert theta == pytest.approx(miwae(w, 8).item(), abs=1e-4)
        assert phi == pytest.approx(miwae(w, 4).item(), abs=1e-4)
    assert all(p.dtype == torch.float32 for p in module.parameters())


# ----------------------------------------------------------------------------------------------------- randomness
class Disturb(Callback):
    """Takes and sets random numbers wherever it can."""

    def draw(self, *_):
        torch.rand(7)
        torch.manual_seed(5)

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = draw
    on_validation_start = on_validation_batch_end = on_validation_end = on_train_epoch_end = draw


def run_end(**options):
    seed = options.pop("seed", 1)
    torch.manual_seed(options.pop("global_seed", 0))
    torch.rand(3)
    module = iw_module(seed=seed, accumulate=2)
    torch.manual_seed(options.pop("global_seed", 0))
    fit(module, max_epochs=2, **options)
    return snapshot(module)


def test_a_seed_is_a_run():
    assert same(run_end(seed=1), run_end(seed=1))
    assert not same(run_end(seed=1), run_end(seed=2))


@pytest.mark.parametrize("options", [
    {"global_seed": 99},
    {"callbacks": [Disturb()]},
    {"limit_val_batches": 1.0},
    {"limit_val_batches": 1.0, "num_sanity_val_steps": 2},
    {"limit_val_batches": 1.0, "val_check_interval": 1, "callbacks": [Disturb()]},
    {"logger": Record(), "log_every_n_steps": 3},
], ids=lambda options: ", ".join(options))  # fmt: skip
def test_nothing_but_the_seed_changes_a_run(options):
    assert same(run_end(**options), run_end())


def test_no_two_batches_share_their_noise():
    module, noise = iw_module(), []
    zero = nn.Linear(64, 6)  # q(z | x) = N(0, 1) whatever x
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    module.network.inference = zero
    module.network.generative.register_forward_pre_hook(lambda _, args: noise.append(args[0].detach().clone()))
    still = partial(torch.optim.SGD, lr=0.0)
    module.optimizer_theta = module.optimizer_phi = still
    fit(module, max_epochs=3)
    values = torch.cat([z.flatten() for z in noise])
    assert len(noise) == 3 * BATCHES
    assert len(values.unique()) > 0.999 * len(values)
    assert abs(values.mean()) * len(values) ** 0.5 < 4


# --------------------------------------------------------------------------------------------------------- logged
@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_bounds_are_those_of_each_sides_view(accumulate):
    module = iw_module(theta=Side("ciwae", 8, beta=0.5), phi=Side("dreg", 2), seed=4, accumulate=accumulate)
    watch, log = Watch(), Record()
    fit(module, max_epochs=1, precision="64-true", callbacks=[watch], logger=log)
    network = mlp().double()
    expected = []
    for weights, (epoch, batch_idx, x) in zip(watch.before, watch.batches, strict=True):
        network.load_state_dict(weights)
        log_w, *_ = log_weights(network, x, 8, 4, "samples", 0, epoch, batch_idx)
        w = torch.softmax(log_w, 0)
        expected.append((miwae(log_w, 8).item(), miwae(log_w, 2).item(), (1 / (8 * w.square().sum(0))).mean().item()))
    rows = zip(*(log.with_key(f"train/{key}") for key in ("bound_theta", "bound_phi", "ess")), strict=True)
    for (theta, phi, ess), row in zip(expected, rows, strict=True):
        assert [value for _, value in row] == pytest.approx([theta, phi, ess], rel=1e-6)
        assert theta - phi > 0.1


def test_validation_takes_the_mean_over_data():
    module, log, data = iw_module(seed=6), Record(), digits()
    trainer = fit(module, data, max_epochs=1, logger=log, limit_val_batches=1.0)
    elbo, at_64 = [], []
    for i, x in enumerate(data.val_dataloader()):
        with torch.no_grad():
            log_w, *_ = log_weights(module.network, x, 64, 6, "validation", 0, i)
        elbo.append(log_w.mean(0))
        at_64.append(log_w.logsumexp(0) - math.log(64))
    assert [len(v) for v in elbo] == [20, 10]
    for name, values in (("val/elbo", elbo), ("val/iwae_64", at_64)):
        mean = torch.cat(values).mean().item()
        assert trainer.callback_metrics[name].item() == pytest.approx(mean, rel=1e-5)
        assert log.with_key(name) == [(4, pytest.approx(mean, rel=1e-5))]
        assert abs(mean - sum(v.mean().item() for v in values) / 2) > 1e-3  # the mean of batches' means is another


def test_test_reports_means_and_standard_errors():
    module, data = iw_module(seed=7, test_particles=100), digits()
    fit(module, data, max_epochs=2, precision="64-true")
    with torch.no_grad():  # one unit that says nothing
        module.network.inference[-1].weight[1] = 0
    trainer = quiet_trainer(precision="64-true")
    trainer.test(module, data, verbose=False)
    first = copy.deepcopy(module.result)
    trainer.test(module, data, verbose=False)
    assert module.result == first  # a second test forgets the first

    figures, means = [], []
    for i, x in enumerate(data.test_dataloader()):
        x = x.double()
        with torch.no_grad():
            at_64, *_ = log_weights(module.network, x, 64, 7, "test", 0, i)
            q = module.network.posterior(x)  # drawn next, from the same stream
            z = q.rsample((100,))
            rate = (q.log_prob(z) - module.network.prior().log_prob(z)).double()
            distortion = -module.network.likelihood(z).log_prob(x).double()
        at_64, log_w = at_64.double(), -(rate + distortion)
        iwae_64, log_px, elbo = at_64.logsumexp(0) - math.log(64), log_w.logsumexp(0) - math.log(100), log_w.mean(0)
        ess = 1 / (100 * torch.softmax(log_w, 0).square().sum(0))
        unreliable = (pareto_k(log_w) > 0.7).double()
        parts = [rate.mean(0), distortion.mean(0)]
        figures.append(torch.stack([iwae_64, log_px, elbo, log_px - elbo, log_px - iwae_64, ess, *parts, unreliable]))
        means.append(q.mean)
    figures, means = torch.cat(figures, 1), torch.cat(means)
    names = ["iwae_64", "log_px", "elbo", "kl_q_posterior", "kl_is_64", "ess", "rate", "distortion", "k_hat_above_0.7"]
    for name, values in zip(names, figures, strict=True):
        expected = {"mean": values.mean().item(), "se": values.std().item() / math.sqrt(50)}
        assert first[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert trainer.callback_metrics[f"test/{name}"].item() == pytest.approx(expected["mean"], rel=1e-5, abs=1e-6)
    assert first["active_units"] == int((means.var(0) > 0.01).sum()) == 2
    assert trainer.callback_metrics["test/active_units"] == 2
    rest = {k: v for k, v in first.items() if k not in names}
    with torch.no_grad():
        of_training_data = module.network.posterior(data.probe(100).double()).mean.var(0)
    assert rest == {
        "active_units": 2,
        "active_units_train": int((of_training_data > 0.01).sum()),
        "particles": 100,
        "data": "Digits",
        "binarization": "dynamic",
        "seed": 7,
        "version": lightning_iwae.__version__,
        "device": "cpu",
    }
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_validate_reports_what_test_does():
    module, data = iw_module(seed=7), digits()
    data.setup()
    quiet_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    validated = module.result
    data.test = data.val
    trainer = quiet_trainer()
    trainer.test(module, data, verbose=False)
    assert module.result == validated
    assert trainer.callback_metrics["test/log_px"] < trainer.callback_metrics["test/kl_is_64"]


class FlowPosterior(MLP):
    """Whose q(z | x) has no closed mean, as normalising flows have none."""

    def posterior(self, x):
        return TransformedDistribution(super().posterior(x), [ExpTransform()])


def test_without_posterior_means_active_units_are_left_out():
    torch.manual_seed(0)
    module, trainer = iw_module(FlowPosterior(pixels=64, latent=3, hidden=[8])), quiet_trainer()
    trainer.test(module, digits(), verbose=False)
    assert "active_units" not in module.result and "test/active_units" not in trainer.callback_metrics
    assert math.isfinite(module.result["log_px"]["mean"]) and module.result["ess"]["se"] > 0


# ------------------------------------------------------------------------------------------------- a user's network
class Own(nn.Module):
    """Gaussian pixels of a learnt scale, a learnt prior, torch's own checks of arguments left on."""

    def __init__(self):
        super().__init__()
        self.inference = nn.ModuleDict({"mean": nn.Linear(64, 2), "scale": nn.Linear(64, 2)})
        self.generative = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 64))})
        self.generative.register_parameter("prior_mean", nn.Parameter(torch.zeros(2)))
        self.generative.register_parameter("log_scale", nn.Parameter(torch.zeros(64)))

    def prior(self):
        return Independent(Normal(self.generative.prior_mean, torch.ones(2)), 1)

    def posterior(self, x):
        return Independent(Normal(self.inference["mean"](x), self.inference["scale"](x).exp()), 1)

    def likelihood(self, z):
        return Independent(Normal(self.generative["net"](z), self.generative.log_scale.exp()), 1)


def test_a_users_own_network_trains():
    network = Own()
    adam = partial(torch.optim.Adam, lr=0.02)
    module, watch, log = iw_module(network, optimizer_theta=adam, optimizer_phi=adam), Watch(), Record()
    fit(module, max_epochs=10, callbacks=[watch], logger=log, limit_val_batches=1.0)
    assert all(not torch.equal(watch.before[0][name], w) for name, w in network.state_dict().items())
    (_, first), *_, (_, last) = log.with_key("val/iwae_64")
    assert last > first + 10
    quiet_trainer().test(module, digits(), verbose=False)
    assert module.result["log_px"]["mean"] == pytest.approx(last, abs=5)


def without(name):
    network = Own()
    if name in ("inference", "generative"):
        delattr(network, name)
        return network
    return type("Lacking", (nn.Module,), {k: v for k, v in vars(Own).items() if k not in (name, "__init__")})()


class Shared(Own):
    def __init__(self):
        super().__init__()
        self.inference["shared"] = self.generative["net"][0]


class Neither(Own):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(("network", "error", "message"), [
    (without("inference"), TypeError, "Own lacks inference"),
    (without("generative"), TypeError, "Own lacks generative"),
    (without("likelihood"), TypeError, "lacks .*likelihood"),
    (without("posterior"), TypeError, "lacks .*posterior"),
    (without("prior"), TypeError, "lacks .*prior"),
    (Shared(), ValueError, r"both .*shared\.weight|both .*net\.0\.weight"),
    (Neither(), ValueError, "neither .*temperature"),
    (lambda x: x, TypeError, "must be a torch.nn.Module. Got function"),
])  # fmt: skip
def test_a_wrong_network_is_refused_when_built(network, error, message):
    with pytest.raises(error, match=message):
        iw_module(network)


class PixelsApart(Own):
    def likelihood(self, z):
        return super().likelihood(z).base_dist


class Half(Own):
    def posterior(self, x):
        q = super().posterior(x).base_dist
        return Independent(Normal(q.loc.half(), q.scale.half()), 1)


class Idle(Own):
    def __init__(self):
        super().__init__()
        self.generative["idle"] = nn.Linear(2, 2)


class Batchwise(Own):
    def __init__(self):
        super().__init__()
        self.generative["net"].append(nn.BatchNorm1d(64))


@pytest.mark.parametrize(("network", "message"), [
    (PixelsApart(), r"likelihood\(z\)\.log_prob\(x\) must have shape .*\(8, 20\).*Got \(8, 20, 64\)"),
    (Half(), r"posterior\(x\)\.log_prob\(z\) must be float32 or float64.*Got torch\.float16"),
    (Idle(), r"does not depend on .*idle\.weight"),
    (Batchwise(), r"BatchNorm in training mode.*net\.3"),
    (MLP(pixels=10, latent=2, hidden=[4]), r"pixels is 10, but data have shape \(64,\)"),
])  # fmt: skip
def test_a_wrong_network_is_refused_at_the_first_batch(network, message):
    module = iw_module(network)
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fit(module, max_epochs=1)
    assert same(module.network.state_dict(), before)


# --------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(("options", "message"), [
    ({"samples": 0}, "samples must be at least 1. Got 0"),
    ({"samples": 12}, r"model\.theta\.particles must divide samples \(12\): one of 1, 2, 3, 4, 6, 12. Got 8"),
    ({"phi": Side("iwae", 3)}, r"model\.phi\.particles must divide samples \(8\)"),
    ({"theta": Side("dreg", 8)}, r"model\.theta: estimator 'dreg' is for the other side"),
    ({"phi": Side("drag", 8)}, r"model\.phi: unknown estimator 'drag'"),
    ({"phi": Side("ciwae", 8, beta=1.5)}, "beta must lie in .*1.5"),
    ({"phi": Side("ciwae", 8)}, r"model\.phi: .*needs the option 'beta'"),
    ({"phi": Side("iwae", 8, beta=0.5)}, r"model\.phi: .*no option 'beta'"),
    ({"accumulate": 0}, r"model\.accumulate must be at least 1. Got 0"),
    ({"test_particles": 0}, r"model\.test_particles must be at least 1. Got 0"),
    ({"clip_theta": 0.0}, r"model\.clip_theta must be positive, .*Got 0.0"),
    ({"clip_phi": -1.0}, r"model\.clip_phi must be positive, .*Got -1.0"),
    ({"clip_phi": math.nan}, r"model\.clip_phi must be positive, .*Got nan"),
    ({"scheduler_interval": "batch"}, r"model\.scheduler_interval must be epoch or step. Got batch"),
    ({"chunk": 0}, r"model\.chunk must be at least 1, or null .*Got 0"),
    ({"memory": 0.0}, r"model\.memory must be positive, .*Got 0.0"),
    ({"memory": math.nan}, r"model\.memory must be positive, .*Got nan"),
    ({"memory": 1.0, "chunk": 2}, r"model\.chunk must be null with model\.memory.*Got 2"),
    ({"memory": 1.0, "whole_batch_noise": True}, r"model\.memory must be null with model\.whole_batch_noise"),
    ({"method": "together"}, r"model\.method must be auto or separate. Got together"),
], ids=str)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        iw_module(**options)


# ---------------------------------------------------------------------------------------------------------- memory
def trained(epochs=2, **options):
    module = iw_module(**options)
    fit(module, max_epochs=epochs)
    return snapshot(module)


def test_a_chunk_is_a_run_of_its_own_and_one_of_all_samples_is_none():
    assert same(trained(chunk=3), trained(chunk=3))
    assert not same(trained(chunk=3), trained(chunk=4))
    assert same(trained(chunk=8), trained())


def told_of(monkeypatch):
    told = []
    monkeypatch.setattr("lightning_iwae.module.rank_zero_info", told.append)
    return told


def test_a_limit_of_memory_chooses_a_chunk_and_says_so_once(monkeypatch):
    told = told_of(monkeypatch)
    schedule = [Change(1, samples=16)]
    module = iw_module(memory=1e-4, schedule=schedule)
    fit(module, max_epochs=2)
    said = [message for message in told if "model.memory" in message]
    (first, chunk), (second, later) = module._fitting.items()
    assert (first, second) == ((8, 20, 64), (16, 20, 64)) and chunk == later < 8
    assert len(said) == 2
    assert said[0].startswith(
        f"model.memory of 0.0001 GiB: {chunk} of 8 samples at a time for a batch of 20, which take"
    )
    assert same(snapshot(module), trained(chunk=chunk, schedule=schedule))


def test_a_limit_that_is_not_reached_changes_nothing(monkeypatch):
    told = told_of(monkeypatch)
    assert same(trained(memory=1.0), trained())
    assert any("8 of 8 samples at a time" in message for message in told)


def test_gradient_snr_is_measured_in_slices_too():
    log, module = Record(), iw_module(chunk=3)
    snr = GradientSNR(every_n_steps=5, draws=4, size=10, estimators=["dreg", "vimco"])
    fit(module, max_epochs=1, logger=log, callbacks=[snr])
    for name in ("snr/phi", "snr/theta", "snr/phi/dreg", "snr/phi/vimco"):
        assert [step for step, _ in log.with_key(name)] == [0, 5]
        assert all(math.isfinite(value) for _, value in log.with_key(name))
    assert same(snapshot(module), trained(epochs=1, chunk=3))


# ------------------------------------------------------------------------------- a rank's part of the whole batch
@pytest.mark.parametrize("family", [Normal, LogNormal])
def test_rows_of_a_posterior_are_its_part(family):
    loc = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, 3, dtype=torch.float64).add(0.1).requires_grad_()
    q = Independent(family(loc, scale), 1)
    torch.manual_seed(0)
    whole = q.rsample((4,))
    torch.manual_seed(0)
    rows = Rows(q, 2, 3)
    z = rows.rsample((4,))
    assert torch.equal(z, whole[:, 2:5])
    held = z.detach().requires_grad_()
    mine = torch.autograd.grad(rows.log_prob(held).sum(), [held, loc, scale])
    direct = torch.autograd.grad(Independent(family(loc[2:5], scale[2:5]), 1).log_prob(held).sum(), [held, loc, scale])
    for gradient, expected in zip(mine, direct, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(mine[1][[0, 1, 5]], torch.zeros(3, 3))
