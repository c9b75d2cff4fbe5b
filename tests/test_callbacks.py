"""Callbacks: the figures are the theory's and the closed forms', when they are due, and training does not notice."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.stats
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.distributions import Independent, Normal
from torch.utils.data import DataLoader

from lightning_iwae import callbacks
from lightning_iwae.callbacks import Evaluation, GradientSNR
from lightning_iwae.callbacks.progress import Progress
from lightning_iwae.data import Batches, Digits, Gaussian
from lightning_iwae.models import MLP, LinearGaussian
from lightning_iwae.module import IWModule
from lightning_iwae.sides import Side


@pytest.fixture(autouse=True)
def one_thread(torch_as_it_was):
    """Five times as fast on networks this small."""
    torch.set_num_threads(1)


class Memory(Logger):
    """Keeps what is logged: (step, metrics) in order."""

    name = version = None

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def of(self, name):
        """{step: value} of one metric."""
        return {step: metrics[name] for step, metrics in self.rows if name in metrics}


def gaussian(dim=3, variance=2 / 3, distance=0.1, mu=None, seed=0):
    """A linear-Gaussian model at its optimum for `mu`, but for noise of size `distance` on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.zeros(dim) if mu is None else mu
    model = LinearGaussian(dim, variance)
    with torch.no_grad():
        optimum = (mu, torch.eye(dim) / 2, mu / 2)
        for p, best in zip((model.mu, model.inference.weight, model.inference.bias), optimum, strict=True):
            p.copy_(best + distance * torch.randn(p.shape, generator=generator))
    return model


def iw_module(network=None, **options):
    defaults = {"samples": 8, "theta": Side("iwae", 8), "phi": Side("iwae", 4)}
    return IWModule(gaussian() if network is None else network, **defaults | options)


def toy(**options):
    """96 training items in 4 batches, 96 validation items in 4."""
    return Gaussian(**{"dim": 3, "size": 96, "batch_size": 24} | options)


def fit(module, data, *callbacks, ckpt_path=None, **options):
    """A trainer that has fitted, and its logger."""
    logger = Memory()
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": logger,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **defaults | options)
    loaders = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else dict(data)
    trainer.fit(module, **loaders, ckpt_path=ckpt_path)
    return trainer, logger


class Recorded:
    """Every result, and the draws behind it, of the callback's `signal_to_noise`."""

    def __init__(self, monkeypatch):
        self.draws, self.results = [], []
        self.function = callbacks.gradient_snr.signal_to_noise
        monkeypatch.setattr(callbacks.gradient_snr, "signal_to_noise", self)

    def __call__(self, gradients, n):
        def recorded():
            self.draws.append(gradients())
            return self.draws[-1]

        self.results.append(self.function(recorded, n))
        return self.results[-1]

    def of(self, side):
        return torch.stack([draw[side] for draw in self.draws]).numpy()


# --- SNR: the theory ----------------------------------------------------------------------------------------


def theory(model, x, K):
    """SNR of phi = (A, b) and of theta = mu for the mean over data x of the gradient of L_K, at large K.

    Per datum E[grad] and Var[grad] to leading order in 1/K, from the moments of one weight; means are averaged over
    data, and summed variances divided by N^2.
    """
    A, b, mu = (p.detach().double().numpy() for p in (model.inference.weight, model.inference.bias, model.mu))
    x, s2, D = x.double().numpy(), model.variance, model.dim
    delta = x @ A.T + b - (x + mu) / 2
    curvature = 4 * s2 - 1
    second_moment = (2 * s2) ** D * curvature ** (-D / 2) * np.exp(2 * (delta**2).sum(1, keepdims=True) / curvature)
    spread = second_moment * (s2 / curvature + (delta / curvature) ** 2)
    pull = 2 / curvature * second_moment * delta
    phi_mean, phi_variance = -pull / K, 4 * spread / K
    theta_mean, theta_variance = (x - mu) / 2 + pull / (2 * K), spread / K
    inputs = np.concatenate([x, np.ones((len(x), 1))], 1)  # d (A x + b) / d (A, b)
    phi_mean, phi_variance = phi_mean[:, :, None] * inputs[:, None], phi_variance[:, :, None] * inputs[:, None] ** 2

    def ratio(mean, variance):
        return np.abs(mean.mean(0)) / np.sqrt(variance.sum(0) / len(x) ** 2)

    phi = ratio(phi_mean, phi_variance)
    return {"phi": np.concatenate([phi[:, :-1].ravel(), phi[:, -1]]), "theta": ratio(theta_mean, theta_variance)}


def check_against_theory(monkeypatch, dim, size, K, draws, distance):
    data = Gaussian(batch_size=size, dim=dim, size=size)
    data.setup()
    x = data.probe(size)
    model = gaussian(dim, distance=distance, mu=x.mean(0))
    expected, twin = theory(model, x, K), theory(model, x, 2 * K)
    module = iw_module(model, samples=K, theta=Side("iwae", K), phi=Side("iwae", K))
    recorded = Recorded(monkeypatch)
    snr = GradientSNR(every_n_steps=1000, draws=draws, size=size)
    _, logger = fit(module, data, snr, precision="64-true", limit_val_batches=0, limit_train_batches=1)
    metrics = logger.rows[0][1]
    (measured,) = recorded.results
    generator = np.random.default_rng(0)
    samples = [generator.integers(draws, size=draws) for _ in range(100)]
    for side, result in measured.items():
        values = recorded.of(side)
        bootstrap = np.array([np.abs(v.mean(0)) / v.std(0, ddof=1) for v in (values[rows] for rows in samples)])
        z = (result.snr.numpy() - expected[side]) / bootstrap.std(0, ddof=1)
        assert np.abs(z).max() < (4 if z.size < 50 else 4.5)
        assert np.abs((result.snr.numpy() - twin[side]) / bootstrap.std(0, ddof=1)).max() > 6
        z = (metrics[f"snr/{side}"] - expected[side].mean()) / bootstrap.mean(1).std(ddof=1)
        assert abs(z) < 4
        assert abs((metrics[f"snr/{side}"] - twin[side].mean()) / bootstrap.mean(1).std(ddof=1)) > 8


def test_snr_on_the_linear_gaussian_is_the_theorys(monkeypatch):
    check_against_theory(monkeypatch, dim=5, size=256, K=16, draws=1_200, distance=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_snr_at_the_papers_setting_is_the_theorys(monkeypatch):
    torch.set_num_threads(2)
    check_against_theory(monkeypatch, dim=20, size=1024, K=16, draws=500, distance=0.01)


# --- SNR: what is logged, and when --------------------------------------------------------------------------

FIGURES = ["snr/{}", "snr/{}_floor", "snr/{}_q25", "snr/{}_q50", "snr/{}_q75", "dsnr/{}", "dsnr/{}_floor"]


def snr_rows(logger):
    return {step: metrics for step, metrics in logger.rows if "snr/draws" in metrics}


def test_snr_logs_these_names_and_what_they_say(monkeypatch):
    recorded = Recorded(monkeypatch)
    _, logger = fit(iw_module(), toy(), GradientSNR(every_n_steps=1000, draws=10, size=20), limit_val_batches=0)
    ((step, metrics),) = snr_rows(logger).items()
    assert step == 0
    assert set(metrics) == {"snr/draws", *(figure.format(side) for side in ("phi", "theta") for figure in FIGURES)}
    assert metrics["snr/draws"] == 10
    for side, P in (("phi", 12), ("theta", 3)):
        values = recorded.of(side).astype(np.float64)
        snr = np.abs(values.mean(0)) / values.std(0, ddof=1)
        assert values.shape == (10, P)
        assert metrics[f"snr/{side}"] == pytest.approx(snr.mean(), rel=1e-9)
        assert metrics[f"snr/{side}_floor"] == pytest.approx(math.sqrt(2 / (math.pi * 10)))
        quartiles = [metrics[f"snr/{side}_q{p}"] for p in (25, 50, 75)]
        assert quartiles == pytest.approx(np.quantile(snr, [0.25, 0.5, 0.75]), rel=1e-9)
        assert metrics[f"dsnr/{side}"] == recorded.results[0][side].dsnr
        assert metrics[f"dsnr/{side}_floor"] == recorded.results[0][side].dsnr_floor


@pytest.mark.parametrize(("accumulate", "every", "steps"), [(1, 3, [0, 3, 6]), (3, 1, [0, 1, 2, 3, 4]), (4, 2, [0, 2])])
def test_snr_is_measured_once_at_its_interval_in_steps(accumulate, every, steps):
    # 4 batches an epoch, 2 epochs: accumulating 3 makes windows of 3 and 1
    snr = GradientSNR(every_n_steps=every, draws=4, size=4)
    _, logger = fit(iw_module(accumulate=accumulate), toy(), snr, max_epochs=2, limit_val_batches=0)
    assert [step for step, metrics in logger.rows if "snr/draws" in metrics] == steps


def test_snr_uses_the_same_probe_each_time_and_new_noise(monkeypatch):
    seen, measure = [], callbacks.gradient_snr.measure
    monkeypatch.setattr(callbacks.gradient_snr, "measure", lambda m, x, *a: seen.append(x) or measure(m, x, *a))
    data = toy()
    still = iw_module(optimizer_theta=partial(torch.optim.SGD, lr=0.0), optimizer_phi=partial(torch.optim.SGD, lr=0.0))
    _, logger = fit(still, data, GradientSNR(1, 4, size=20), limit_val_batches=0)
    assert len(seen) == 5 and all(torch.equal(x, data.probe(20)) for x in seen)
    assert len({metrics["snr/phi"] for metrics in snr_rows(logger).values()}) == 5


def test_snr_is_the_same_in_a_second_fit_and_in_a_resumed_one(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def run(*callbacks, ckpt_path=None):
        return snr_rows(fit(iw_module(), toy(), *callbacks, ckpt_path=ckpt_path, limit_val_batches=0, max_epochs=2)[1])

    snr = GradientSNR(every_n_steps=2, draws=4, size=4)
    whole = run(snr, Save())
    assert list(whole) == [0, 2, 4, 6, 8]
    assert run(snr) == whole
    for step, rest in ((3, (4, 6, 8)), (4, (6, 8)), (5, (6, 8))):
        assert run(GradientSNR(2, 4, 4), ckpt_path=tmp_path / f"{step}.ckpt") == {s: whole[s] for s in rest}


def test_snr_callback_forgets_an_earlier_fit():
    snr, seen = GradientSNR(every_n_steps=1000, draws=4, size=4), []
    for seed in (0, 1):
        data = toy(seed=seed)
        _, logger = fit(iw_module(), data, snr, limit_val_batches=0)
        seen += snr_rows(logger).values()
        assert torch.equal(snr._probe, data.probe(4))
    assert len(seen) == 2 and seen[0] != seen[1]


def test_snr_is_measured_in_the_precision_of_training():
    seen = []
    for precision in ("32-true", "bf16-mixed"):
        network = restless()
        _, logger = fit(
            iw_module(network), digits(), GradientSNR(1000, 4, 10), precision=precision, limit_val_batches=0
        )
        seen += snr_rows(logger).values()
    for name in ("snr/theta_q50", "dsnr/theta"):  # the mean goes by parameters that hardly vary, where rounding shows
        single, half = (metrics[name] for metrics in seen)
        assert single != half and single == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_both_callbacks_run_in_every_precision(precision):
    data = Digits(batch_size=20, limit_train=40, validation=20, test=20)
    module = iw_module(MLP(64, 3, [8]))
    snr, evaluation = GradientSNR(1, 4, 10), Evaluation(particles=10, size=10)
    trainer, logger = fit(module, data, snr, evaluation, precision=precision)
    assert all(math.isfinite(value) for metrics in snr_rows(logger).values() for value in metrics.values())
    assert len(snr_rows(logger)) == 3
    assert trainer.callback_metrics["val/log_px"].isfinite()


@pytest.mark.parametrize(("name", "least"), [("every_n_steps", 1), ("draws", 4), ("size", 1)])
def test_snr_refuses_too_small_arguments(name, least):
    with pytest.raises(ValueError, match=f"GradientSNR.{name} must be at least {least}. Got {least - 1}"):
        GradientSNR(**{name: least - 1})
    GradientSNR(**{name: least})


# --- SNR: data without a probe ------------------------------------------------------------------------------


def plain_loader(shuffle):
    return DataLoader(torch.randn(96, 3, generator=torch.Generator().manual_seed(0)), 24, shuffle=shuffle)


def loaders():
    return {"train_dataloaders": plain_loader(True), "val_dataloaders": plain_loader(False)}


class Plain(pl.LightningDataModule):
    """A user's own data module: loaders and nothing else."""

    def train_dataloader(self):
        return plain_loader(True)

    def val_dataloader(self):
        return plain_loader(False)


NO_WORKERS = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@NO_WORKERS
@pytest.mark.parametrize("data", [loaders, Plain])
def test_without_a_probe_the_first_batch_serves(monkeypatch, data):
    class First(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.setdefault("batch", batch)

    seen, measure = {"probes": []}, callbacks.gradient_snr.measure
    monkeypatch.setattr(
        callbacks.gradient_snr, "measure", lambda m, x, *a: seen["probes"].append(x) or measure(m, x, *a)
    )
    trainer, logger = fit(iw_module(), data(), First(), GradientSNR(2, 4, size=20), Evaluation(particles=10))
    assert list(snr_rows(logger)) == [0, 2, 4]
    assert set(trainer.callback_metrics) > ESTIMATES
    assert all(torch.equal(x, seen["batch"][:20]) for x in seen["probes"])


@NO_WORKERS
def test_without_a_probe_the_first_batch_must_be_large_enough():
    with pytest.raises(ValueError, match=r"GradientSNR.size must be at most the batch's 24, .* probe\(n\). Got 25"):
        fit(iw_module(), Plain(), GradientSNR(size=25))


def test_probe_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="a probe of train must have 1 to 96 items"):
        fit(iw_module(), toy(), GradientSNR(size=97))


# --- SNR: networks of all sorts -----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["inference", "generative"])
def test_snr_of_a_frozen_network_is_left_out(frozen):
    network = gaussian()
    getattr(network, frozen).requires_grad_(False)
    (side,) = callbacks.gradient_snr.measure(iw_module(network), torch.zeros(4, 3), 4)
    assert side == {"inference": "theta", "generative": "phi"}[frozen]


class Odd(LinearGaussian):
    """Encoder and prior mean with something wrong."""

    def __init__(self, still=False, nan=None):
        super().__init__(3)
        self.still, self.nan = still, nan
        self.generative["zero"] = torch.zeros(())

    def posterior(self, x):
        mean = self.inference(0 * x if self.still else x)
        mean = mean * 0 if self.still else mean
        if self.nan == "phi":
            mean = mean + 0 * (self.inference.bias - self.inference.bias.detach()).abs().sqrt()  # finite, d = 0 * inf
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def prior(self):
        mean = self.mu + self.generative["zero"]
        if self.nan == "theta":
            mean = mean + 0 * self.generative["zero"].sqrt()
        return Independent(Normal(mean, torch.ones_like(mean)), 1)


def test_gradient_that_never_varies_does_not_stop_training():
    _, logger = fit(iw_module(Odd(still=True)), toy(), GradientSNR(1000, 4, 4), limit_val_batches=0)
    ((_, metrics),) = snr_rows(logger).items()
    assert all(math.isnan(metrics[name]) for name in ("snr/phi", "snr/phi_q50", "dsnr/phi", "dsnr/phi_floor"))
    assert math.isfinite(metrics["snr/theta"])


@pytest.mark.parametrize("side", ["phi", "theta"])
def test_gradient_that_is_nan_is_an_error_naming_the_side(side):
    with pytest.raises(FloatingPointError, match=f"gradient of {side} is not finite"):
        fit(iw_module(Odd(nan=side), method="separate"), toy(), GradientSNR(1000, 4, 4), limit_val_batches=0)


def test_measure_leaves_gradients_that_are_there():
    module = iw_module()
    for i, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, float(i))
    module.network.mu.grad = None
    callbacks.gradient_snr.measure(module, torch.zeros(4, 3), 4)
    assert module.network.mu.grad is None
    assert all((p.grad == i).all() for i, p in enumerate(module.parameters()) if p.grad is not None)


# --- training does not notice -------------------------------------------------------------------------------


def restless():
    """A network whose forward pass draws and leaves traces: BatchNorm's averages, spectral norm's vector, dropout."""
    torch.manual_seed(0)
    network = MLP(64, 3, [8])
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
    network.inference = nn.Sequential(spectral, nn.BatchNorm1d(64), nn.Dropout(0.2), *network.inference)
    return network


def digits(**options):
    return Digits(**{"batch_size": 20, "limit_train": 100, "validation": 30, "test": 50} | options)


def snapshot(module):
    network = module.network
    return copy.deepcopy(
        {
            "random": torch.get_rng_state(),
            "gradients": [p.grad for p in network.parameters()],
            "modes": [m.training for m in module.modules()],
            "requires_grad": [p.requires_grad for p in network.parameters()],
            "state": [*network.state_dict().values(), *network.buffers()],
        }
    )


def same(left, right):
    """Bit by bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class Watch(pl.Callback):
    """What training consists of, at every hook."""

    def __init__(self):
        self.seen = []

    def look(self, trainer, module, *_):
        self.seen.append(snapshot(module))

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = look
    on_validation_epoch_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = look


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_with_and_without_the_callbacks(accumulate):
    runs = []
    for watched in ([], [GradientSNR(1, 4, 10), Evaluation(particles=10, size=25)]):
        before, after = Watch(), Watch()
        module = iw_module(restless(), accumulate=accumulate)
        fit(module, digits(), before, *watched, after, max_epochs=2, val_check_interval=2)
        assert len(before.seen) > 20 and same(before.seen, after.seen)
        runs.append(after.seen)
    without, with_callbacks = runs
    assert same(without, with_callbacks)
    assert not same(without[0]["state"], without[-1]["state"])


def test_a_callback_that_draws_would_be_found():
    class Draws(pl.Callback):
        def on_train_batch_end(self, *_):
            torch.rand(1)

    before, after = Watch(), Watch()
    fit(iw_module(restless()), digits(), before, Draws(), after)
    assert not same(before.seen, after.seen)


# --- evaluation: when and what ------------------------------------------------------------------------------

ESTIMATES = {"val/log_px", "val/kl_q_posterior", "val/kl_is_64", "val/ess"}
EXACT = {"val/exact_log_px", "val/exact_kl_q_posterior"}
MODULES_OWN = {"val/elbo", "val/iwae_64"}


def val_rows(logger):
    return [
        (metrics["epoch"], {k for k in metrics if k.startswith("val/")})
        for _, metrics in logger.rows
        if "val/elbo" in metrics
    ]


@pytest.mark.parametrize(
    ("every", "check", "due"),
    [
        (1, 1, [0, 1, 2, 3, 4]),
        (2, 1, [0, 2, 4]),
        (3, 1, [0, 3]),
        (100, 1, [0]),
        (2, 2, [1]),  # validations at 1 and 3: the first anyway
        (3, 2, [1, 3]),
    ],
)
def test_evaluation_is_logged_at_its_interval_and_first(every, check, due):
    options = {"max_epochs": 5, "check_val_every_n_epoch": check}
    _, logger = fit(iw_module(), toy(), Evaluation(every, particles=4, size=4), **options)
    rows = val_rows(logger)
    assert [epoch for epoch, _ in rows] == [epoch for epoch in range(5) if (epoch + 1) % check == 0]
    for epoch, names in rows:
        assert names == MODULES_OWN | (ESTIMATES | EXACT if epoch in due else set())


def test_models_without_closed_forms_have_no_exact_values():
    module = iw_module(MLP(64, 3, [8]))
    _, logger = fit(module, digits(), Evaluation(particles=4, size=4))
    assert val_rows(logger) == [(0, MODULES_OWN | ESTIMATES)]


def test_evaluation_rests_in_the_sanity_check():
    class After(pl.Callback):
        def on_sanity_check_end(self, trainer, module):
            seen.append(set(trainer.callback_metrics))

    seen = []
    fit(iw_module(), toy(), Evaluation(particles=4, size=4), After())
    assert seen == [MODULES_OWN]


def test_validate_gives_the_modules_own_figures():
    module, data, logger = iw_module(), toy(), Memory()
    figures = []
    for extra in ([], [Evaluation(particles=4, size=4)]):
        options = {"accelerator": "cpu", "logger": logger, "enable_progress_bar": False}
        figures += pl.Trainer(callbacks=extra, **options).validate(module, data, verbose=False)
    assert figures[0] == figures[1]


def on_first_validation_data(model, size):
    """scipy's log p(x) and torch's KL of the first `size` validation data of `toy()`, averaged."""
    data = toy()
    data.setup()
    x = torch.cat(list(data.val_dataloader()))[:size].double()
    model = copy.deepcopy(model).double()
    log_px = scipy.stats.multivariate_normal(model.mu.detach(), 2 * np.eye(3)).logpdf(x)
    q = model.posterior(x)
    posterior = Independent(Normal((x + model.mu) / 2, math.sqrt(0.5)), 1)
    return log_px.mean(), torch.distributions.kl_divergence(q, posterior).mean().item()


@pytest.mark.parametrize("size", [1, 24, 50, 96, 500])
def test_exact_values_are_those_of_the_first_of_the_validation_data(size):
    model = gaussian(distance=0.3)
    trainer, _ = fit(iw_module(model), toy(), Evaluation(particles=2, size=size))
    log_px, kl = on_first_validation_data(model, min(size, 96))
    assert trainer.callback_metrics["val/exact_log_px"].item() == pytest.approx(log_px, rel=1e-6)
    assert trainer.callback_metrics["val/exact_kl_q_posterior"].item() == pytest.approx(kl, rel=1e-5)


def test_estimates_are_near_the_exact_values():
    still = {f"optimizer_{side}": partial(torch.optim.SGD, lr=0.0) for side in ("theta", "phi")}
    model = gaussian(distance=0.15)
    trainer, _ = fit(iw_module(model, **still), toy(), Evaluation(particles=2_000, size=96))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    log_px, kl = on_first_validation_data(model, 96)
    # weights of relative variance near 1/2 have standard errors of 0.002 over 96 * 2000 samples, 0.01 over 96 * 64
    assert metrics["val/log_px"] == pytest.approx(log_px, abs=0.01)
    assert metrics["val/kl_q_posterior"] == pytest.approx(kl, abs=0.01)
    assert metrics["val/kl_is_64"] == pytest.approx(0, abs=0.05)
    assert log_px < -1 and kl > 0.1 and 0.5 < metrics["val/ess"] < 0.9


def test_estimates_are_exact_where_q_is_the_posterior():
    still = {f"optimizer_{side}": partial(torch.optim.SGD, lr=0.0) for side in ("theta", "phi")}
    model = gaussian(variance=0.5, distance=0.0, mu=torch.tensor([1.0, -2.0, 0.5]))
    trainer, _ = fit(iw_module(model, **still), toy(), Evaluation(particles=10, size=50), precision="64-true")
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    log_px, _ = on_first_validation_data(model, 50)
    assert metrics["val/log_px"] == pytest.approx(log_px, rel=1e-6)
    assert metrics["val/ess"] == pytest.approx(1, rel=1e-6)
    for name in ("val/kl_q_posterior", "val/kl_is_64", "val/exact_kl_q_posterior"):
        assert metrics[name] == pytest.approx(0, abs=1e-12)


def test_evaluation_takes_the_same_data_and_noise_each_time(monkeypatch):
    seen, evaluate = [], callbacks.evaluation.evaluate
    monkeypatch.setattr(callbacks.evaluation, "evaluate", lambda m, x, K: seen.append(x) or evaluate(m, x, K))
    still = {f"optimizer_{side}": partial(torch.optim.SGD, lr=0.0) for side in ("theta", "phi")}
    _, logger = fit(iw_module(**still), toy(), Evaluation(particles=10, size=40), max_epochs=3)
    assert [len(x) for x in seen] == [24, 16] * 3
    assert all(torch.equal(seen[i], seen[i % 2]) for i in range(6))
    assert len(set(logger.of("val/log_px").values())) == 1 and len(logger.of("val/log_px")) == 3


@pytest.mark.parametrize(("maximize", "best"), [(False, 2), (True, 0)])
def test_checkpoint_by_log_px_is_the_best(tmp_path, maximize, best):
    # an optimiser that maximises the loss makes the model worse
    adam = partial(torch.optim.Adam, lr=0.03, maximize=maximize)
    module = iw_module(gaussian(distance=1.0), optimizer_theta=adam, optimizer_phi=adam)
    saver = ModelCheckpoint(tmp_path, monitor="val/log_px", mode="max", filename="{epoch}", save_top_k=1)
    _, logger = fit(module, toy(), Evaluation(particles=100, size=96), saver, max_epochs=3)
    values = list(logger.of("val/log_px").values())
    assert len(values) == 3 and np.argmax(values) == best
    assert saver.best_model_score.item() == pytest.approx(values[best], rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [f"epoch={best}.ckpt"]


def test_checkpoint_by_log_px_works_at_a_wider_interval(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/log_px", mode="max", filename="{epoch}")
    evaluation = Evaluation(every_n_epochs=2, particles=100, size=96)
    adam = partial(torch.optim.Adam, lr=0.05)
    module = iw_module(gaussian(distance=0.5), optimizer_theta=adam, optimizer_phi=adam)
    fit(module, toy(), evaluation, saver, max_epochs=4)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=2.ckpt"]  # the last that was evaluated


@pytest.mark.parametrize("name", ["every_n_epochs", "particles", "size"])
def test_evaluation_refuses_too_small_arguments(name):
    with pytest.raises(ValueError, match=f"Evaluation.{name} must be at least 1. Got 0"):
        Evaluation(**{name: 0})


# --- evaluation: shares of processes ------------------------------------------------------------------------


def evaluate_on_ranks(model, items, size, world_size, batch_size):
    """What each of the ranks logs in one validation, and its own running sums."""
    ranks, logged = [], []
    for rank in range(world_size):
        module = SimpleNamespace(
            network=model,
            seed=0,
            device=torch.device("cpu"),
            log_dict=lambda means, sync_dist: logged.append(means),
        )
        trainer = SimpleNamespace(
            state=SimpleNamespace(fn="fit"),
            sanity_checking=False,
            current_epoch=0,
            callback_metrics={},
            world_size=world_size,
            global_rank=rank,
            strategy=SimpleNamespace(reduce=lambda sums, reduce_op: {"sum": sum}[reduce_op](everyones)),
        )
        callback = Evaluation(particles=4, size=size)
        callback.on_validation_epoch_start(trainer, module)
        batches = Batches(items, batch_size, shuffle=False, rank=rank, world_size=world_size)
        with torch.no_grad():
            for i, batch in enumerate(batches):
                callback.on_validation_batch_end(trainer, module, None, batch, i)
        ranks.append((callback, trainer, module))
    everyones = [callback._totals.sums for callback, *_ in ranks]
    for callback, trainer, module in ranks:
        callback.on_validation_epoch_end(trainer, module)
    return logged, everyones


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("n", "size", "batch_size"), [(13, 100, 6), (12, 12, 6), (12, 6, 6), (1, 100, 6), (24, 12, 6)])
def test_shares_of_processes_add_up(n, size, batch_size, world_size):
    # 13 in batches of 6 on 2 ranks: shares of 3 + 3 + 0 and of 3 + 3 + 1
    model = gaussian(distance=0.3).double()
    items = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logged, sums = evaluate_on_ranks(model, items, size, world_size, batch_size)
    taken = min(n, size)
    assert sum(s[0, 0] for s in sums) == taken
    assert len(logged) == world_size and all(means == logged[0] for means in logged)
    assert set(logged[0]) == ESTIMATES | EXACT and all(map(math.isfinite, logged[0].values()))
    for name, exact in (("exact_log_px", model.exact_log_px), ("exact_kl_q_posterior", model.exact_kl)):
        assert logged[0][f"val/{name}"] == pytest.approx(exact(items[:taken]).mean().item(), rel=1e-12)


def test_every_process_takes_at_least_one_datum():
    logged, sums = evaluate_on_ranks(gaussian().double(), torch.zeros(6, 3, dtype=torch.float64), 1, 3, 6)
    assert [s[0, 0] for s in sums] == [1, 1, 1]
    assert math.isfinite(logged[0]["val/log_px"])


def test_processes_draw_different_noise():
    items = torch.zeros(4, 3, dtype=torch.float64)  # the same datum four times
    _, sums = evaluate_on_ranks(gaussian().double(), items, 4, 2, 4)
    assert sums[0][1, 0] != sums[1][1, 0]
    assert sums[0][1, 4] == sums[1][1, 4]  # exact_log_px


# --- progress -----------------------------------------------------------------------------------------------
def test_the_bar_is_drawn_twice_a_second_and_at_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_iwae.callbacks.progress.time.monotonic", lambda: now[0])
    bar, drawn = Progress(), []
    for step in range(1, 5001):  # of a millisecond each
        now[0] += 1e-3
        drawn += [step] if bar._should_update(step, 5000) else []
    assert 10 <= len(drawn) <= 12 and drawn[-1] == 5000
    bar.disable()
    assert not bar._should_update(5000, 5000)
