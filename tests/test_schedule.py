"""Objectives that change along a run, the KL weight, and conditional models: against autograd and by hand."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from lightning_iwae import iw_loss, routing
from lightning_iwae.callbacks import Evaluation, GradientSNR
from lightning_iwae.data import Digits
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.models import MLP, given
from lightning_iwae.module import IWModule
from lightning_iwae.schedule import Change, Objective, Schedule, kl_weight
from lightning_iwae.sides import Side

from .test_module import Record, SaveAt, fit, iw_module, mlp, quiet_trainer, same

WARM_START = [Change(1, 12, Side("iwae", 12), Side("iwae", 6)), Change(3, theta=Side("ciwae", 4, beta=0.25))]


# --------------------------------------------------------------------------------------------------- the schedule
def test_what_a_change_leaves_out_stays_as_it_was():
    schedule = Schedule(Objective(8, Side("elbo", 1), Side("elbo", 1)), WARM_START)
    assert [schedule.at(epoch) for epoch in range(5)] == [
        Objective(8, Side("elbo", 1), Side("elbo", 1)),
        Objective(12, Side("iwae", 12), Side("iwae", 6)),
        Objective(12, Side("iwae", 12), Side("iwae", 6)),
        Objective(12, Side("ciwae", 4, beta=0.25), Side("iwae", 6)),
        Objective(12, Side("ciwae", 4, beta=0.25), Side("iwae", 6)),
    ]


@pytest.mark.parametrize(("changes", "message"), [
    ([Change(0, 16)], r"model\.schedule: epochs must grow, from 1 on. Got 0"),
    ([Change(3, 16), Change(2, 8)], r"epochs must grow, from 1 on. Got 3, 2"),
    ([Change(2, 12)], r"model\.schedule\[0\]\.theta\.particles must divide samples \(12\): one of .* Got 8"),
    ([Change(1), Change(2, phi=Side("drag", 2))], r"model\.schedule\[1\]\.phi: unknown estimator 'drag'"),
    ([Change(1, theta=Side("dreg", 2))], r"model\.schedule\[0\]\.theta: estimator 'dreg' is for the other side"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        iw_module(schedule=changes)


def scheduled(seed=0, **options):
    adam = partial(torch.optim.Adam, lr=0.01)
    settings = {"theta": Side("elbo", 1), "phi": Side("elbo", 1), "schedule": WARM_START, "kl_warmup": 1.5}
    module, log = iw_module(mlp(seed), optimizer_theta=adam, optimizer_phi=adam, **settings), Record()
    return module, log, fit(module, max_epochs=4, logger=log, **options)


def test_a_run_follows_its_schedule_and_logs_it():
    _, log, trainer = scheduled()
    batches = trainer.num_training_batches
    epochs = [step // batches for step, _ in log.with_key("train/samples")]
    assert [v for _, v in log.with_key("train/samples")] == [8.0 if e == 0 else 12.0 for e in epochs]
    assert [v for _, v in log.with_key("train/theta_particles")] == [[1.0, 12.0, 12.0, 4.0][e] for e in epochs]
    assert [v for _, v in log.with_key("train/phi_particles")] == [[1.0, 6.0, 6.0, 6.0][e] for e in epochs]
    assert log.with_key("train/theta_beta") == [(step, 0.25) for step in range(3 * batches, 4 * batches)]
    weights = [v for _, v in log.with_key("train/kl_weight")]
    assert weights == pytest.approx([min(1.0, step / batches / 1.5) for step in range(4 * batches)])


def test_without_a_schedule_nothing_of_it_is_logged():
    log = Record()
    fit(iw_module(), max_steps=2, logger=log)
    assert not [key for _, row in log.rows for key in row if "samples" in key or "kl_weight" in key]


def test_after_a_change_a_run_is_that_of_the_new_objective(tmp_path):
    """The last epochs, begun from a checkpoint without any schedule, are the same to the last bit."""
    module, _, _ = scheduled(callbacks=[SaveAt(tmp_path, "on_train_epoch_end")])
    start = max(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem) if int(p.stem) < 4 * 5 else -1)
    adam = partial(torch.optim.Adam, lr=0.01)
    plain = iw_module(
        mlp(7), samples=12, theta=Side("ciwae", 4, beta=0.25), phi=Side("iwae", 6), optimizer_theta=adam,
        optimizer_phi=adam,
    )  # fmt: skip
    fit(plain, max_epochs=4, ckpt_path=start)
    assert same(plain.network.state_dict(), module.network.state_dict())


@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_schedule_is_resumed_exactly(tmp_path, moment):
    module, log, _ = scheduled(callbacks=[SaveAt(tmp_path, moment)])
    for checkpoint in tmp_path.glob("*.ckpt"):
        other, other_log, _ = scheduled(seed=5, ckpt_path=checkpoint)
        assert same(other.network.state_dict(), module.network.state_dict())
        for key in ("train/kl_weight", "train/samples", "train/bound_phi"):
            tail = [row for row in log.with_key(key) if row[0] >= int(checkpoint.stem)]
            assert other_log.with_key(key) == tail


# -------------------------------------------------------------------------------------------------- the KL weight
def test_the_kl_weight_grows_linearly():
    assert [kl_weight(e, 4.0) for e in (0, 1, 2.5, 4, 9)] == [0.0, 0.25, 0.625, 1.0, 1.0]
    assert kl_weight(0, 0.0) == 1.0


class LearntPrior(MLP):
    def __init__(self):
        super().__init__(pixels=6, latent=2, hidden=[5])
        self.generative = nn.ModuleDict({"net": self.generative, "prior": nn.ParameterDict({"m": torch.ones(2)})})

    def prior(self):
        m = self.generative["prior"]["m"]
        return Independent(Normal(m, torch.ones_like(m)), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative["net"](z)), 1)


def by_autograd(model, x, beta, side, network, seed):
    """Gradient of the bound of log p(x|z) + beta (log p(z) - log q), with nothing of routing in it."""
    torch.manual_seed(seed)
    q = model.posterior(x)
    z = q.rsample((8,))
    log_w = model.likelihood(z).log_prob(x) + beta * (model.prior().log_prob(z) - q.log_prob(z))
    w = log_w.unflatten(0, (-1, side.particles))
    bound = (w.logsumexp(1) - math.log(side.particles)).mean()
    if side.beta is not None:
        bound = side.beta * log_w.mean() + (1 - side.beta) * bound
    return torch.autograd.grad(bound, list(network.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("side", [Side("elbo", 1), Side("iwae", 4), Side("ciwae", 8, beta=0.2)], ids=str)
def test_gradients_of_the_weighted_bound_are_autograds(side, beta, method):
    torch.manual_seed(0)
    model, x = LearntPrior().double(), torch.bernoulli(torch.rand(5, 6, dtype=torch.float64))
    for _ in range(2):  # the second draw uses what the first one proved
        torch.manual_seed(3)
        model.zero_grad()
        iw_loss(model, x, samples=8, theta=Side("iwae", 2), phi=side, method=method, kl_weight=beta).backward()
        for network, expected in ((model.inference, side), (model.generative, Side("iwae", 2))):
            for p, g in zip(network.parameters(), by_autograd(model, x, beta, expected, network, 3), strict=True):
                torch.testing.assert_close(-p.grad, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dreg", "stl", "vimco", "wake"])
def test_estimators_that_are_no_total_derivative_are_refused_below_weight_1(name):
    message = rf"phi: estimator '{name}' can't be used with a KL weight below 1.*elbo, iwae, ciwae, vr-iwae or jvi"
    with pytest.raises(ValueError, match=message):
        iw_module(phi=Side(name, 4), kl_warmup=2.0)
    with pytest.raises(ValueError, match=message):
        iw_module(schedule=[Change(2, phi=Side(name, 4))], kl_warmup=2.0)
    x = torch.bernoulli(torch.rand(5, 6))
    with pytest.raises(ValueError, match=message):
        iw_loss(LearntPrior(), x, samples=8, theta=Side("iwae", 8), phi=Side(name, 4), kl_weight=0.5)


def test_dreg_under_a_kl_weight_would_have_been_wrong():
    """Why it is refused: with weight beta the identity gives c = (1 - beta) w~ + beta w~^2, not w~^2."""
    torch.manual_seed(0)
    x, beta, K, R = torch.zeros(1), 0.3, 2, 400_000
    m = torch.full((R, 1), 0.4, dtype=torch.float64, requires_grad=True)
    z = m + 0.8 * torch.randn(R, K, dtype=torch.float64)

    def log_w(mean):
        log_px_z = Normal(z, 1.0).log_prob(x.double())
        return log_px_z + beta * (Normal(0.0, 1.0).log_prob(z) - Normal(mean, 0.8).log_prob(z))

    w = log_w(m).softmax(1).detach()
    total = torch.autograd.grad(log_w(m).logsumexp(1).sum(), m, retain_graph=True)[0]

    def doubly(c):
        return torch.autograd.grad((c * log_w(m.detach())).sum(), m, retain_graph=True)[0]

    def z_score(other):
        difference = (total - other).flatten()
        return abs(difference.mean() / difference.std() * R**0.5).item()

    assert z_score(doubly((1 - beta) * w + beta * w**2)) < 4.5
    assert z_score(doubly(w**2)) > 20


@pytest.mark.parametrize("warmup", [-1.0, math.nan])
def test_a_warm_up_of_negative_length_is_refused(warmup):
    with pytest.raises(ValueError, match=r"model\.kl_warmup must be at least 0"):
        iw_module(kl_warmup=warmup)


# --------------------------------------------------------------------------------------------- conditional models
class Conditional(nn.Module):
    """p(z | y) p(x | z, y), whose every part depends on y."""

    def __init__(self, pixels=64, latent=2, labels=10):
        super().__init__()
        self.labels = labels
        self.inference = nn.Linear(pixels + labels, 2 * latent)
        self.generative = nn.ModuleDict({"net": nn.Linear(latent + labels, pixels), "prior": nn.Embedding(labels, 2)})

    def one_hot(self, y):
        return nn.functional.one_hot(y, self.labels).to(self.inference.weight.dtype)

    def prior(self, y):
        mean = self.generative["prior"](y)
        return Independent(Normal(mean, torch.ones_like(mean)), 1)

    def posterior(self, x, y):
        mean, log_scale = self.inference(torch.cat([x, self.one_hot(y)], -1)).float().chunk(2, -1)
        return Independent(Normal(mean, log_scale.exp()), 1)

    def likelihood(self, z, y):
        y = self.one_hot(y).expand(*z.shape[:-1], -1)
        logits = self.generative["net"](torch.cat([z, y], -1)).float()
        return Independent(Bernoulli(logits=logits, validate_args=False), 1)


def test_a_conditional_models_gradients_are_autograds_at_every_label():
    torch.manual_seed(0)
    network, x = Conditional(pixels=6, labels=3), torch.bernoulli(torch.rand(4, 6))
    y = torch.tensor([0, 2, 1, 2])
    sides = {"samples": 8, "theta": Side("iwae", 8), "phi": Side("iwae", 2)}
    torch.manual_seed(1)
    iw_loss(network, x, y, **sides).backward()
    for part, side in ((network.inference, sides["phi"]), (network.generative, sides["theta"])):
        expected = by_autograd(given(network, y), x, 1.0, side, part, 1)
        for p, g in zip(part.parameters(), expected, strict=True):
            torch.testing.assert_close(-p.grad, g, rtol=1e-4, atol=1e-6)
    theirs = importance_sample(given(network, y), x, 50).log_px
    assert theirs.shape == (4,)
    assert len(routing._PROOFS[network]) == 1  # one network, whatever the labels


def test_a_conditional_model_trains_validates_and_tests_on_labelled_batches():
    torch.manual_seed(0)
    module, log = IWModule(Conditional(), samples=8, theta=Side("iwae", 8), phi=Side("iwae", 2)), Record()
    callbacks = [Evaluation(particles=10, size=30), GradientSNR(every_n_steps=4, draws=5, size=10)]
    data = Digits(batch_size=20, limit_train=100, labels=True)
    fit(module, data, max_epochs=2, logger=log, callbacks=callbacks, limit_val_batches=2)
    for key in ("train/bound_theta", "val/iwae_64", "val/log_px", "snr/phi"):
        values = [v for _, v in log.with_key(key)]
        assert values and all(map(math.isfinite, map(float, values)))
    module.test_particles = 70
    quiet_trainer().test(module, data, verbose=False)
    assert math.isfinite(module.result["log_px"]["mean"])


def test_labels_and_networks_that_do_not_fit_are_refused():
    data = Digits(batch_size=20, limit_train=100, labels=True)
    with pytest.raises(TypeError, match=r"network MLP takes no labels: .*data\.init_args\.labels"):
        fit(iw_module(mlp()), data, max_steps=1)
    with pytest.raises(TypeError, match=r"network Conditional takes labels .*the data have none"):
        fit(iw_module(Conditional()), max_steps=1)


# ----------------------------------------------------------------------------------------- a user's wrong networks
class IdleEncoder(MLP):
    def __init__(self):
        super().__init__(pixels=64, latent=2, hidden=[4])
        self.inference.append(nn.Identity())
        self.inference.spare = nn.Linear(2, 2)

    def posterior(self, x):
        mean, log_scale = self.inference[:3](x).chunk(2, -1)
        return Independent(Normal(mean, log_scale.exp()), 1)


class Discrete(MLP):
    def posterior(self, x):
        return Independent(Bernoulli(logits=self.inference(x)[..., :2]), 1)


class Narrow(MLP):
    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative(z)[..., :50]), 1)


@pytest.mark.parametrize(("network", "message"), [
    (IdleEncoder(), r"does not depend on the inference parameter\(s\) spare\.weight, spare\.bias"),
    (Discrete(64, 2, [4]), r"needs a reparameterised posterior.*Got Independent\(Bernoulli\)"),
    (Narrow(64, 2, [4]), r"\(8, 20\).*event shape \(50,\).*shape \(20, 64\)"),
])  # fmt: skip
def test_a_wrong_network_is_refused_with_its_shapes(network, message):
    with pytest.raises(ValueError, match=message):
        fit(iw_module(network), max_steps=1)
