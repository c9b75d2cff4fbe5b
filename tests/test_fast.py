"""What was made fast gives what the plain way gives, keeps its precision, and makes no device wait."""

import contextlib
import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from lightning_iwae import Side, iw_loss, routing
from lightning_iwae.derivatives import asked
from lightning_iwae.estimators import PHI, THETA
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.models import MLP, bernoulli
from lightning_iwae.models.bernoulli import BernoulliPixels, Compiled, eager, formula
from lightning_iwae.models.likelihoods import compile_likelihoods
from lightning_iwae.models.normal import DiagonalNormal, standard_normal
from lightning_iwae.module import IWModule, fused

from .test_module import BATCHES, BreakAt, Fragile, fit, iw_module, mlp

S, B, X = 5, 4, 7
OPTIONS = {"ciwae": {"beta": 0.5}, "vr-iwae": {"alpha": 0.5}, "tvo": {"partition": 2}, "ovis": {"gamma": 0.5}}
OPTIONS |= {f"{name}-dreg": OPTIONS[name] for name in ("ciwae", "vr-iwae")}


# ------------------------------------------------------------------------------------------------ the same run
class Plain(MLP):
    """The paper's network in torch's own distributions."""

    def prior(self):
        return Independent(Normal(torch.zeros(self.latent, dtype=self.dtype), 1.0), 1)

    def posterior(self, x):
        mean, log_scale = self.inference(x).chunk(2, -1)
        return Independent(Normal(mean, log_scale.exp()), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative(z), validate_args=False), 1)

    latent = 5
    dtype = torch.float32


def trajectory(make, dtype, steps, method="auto", quick=True):
    """Bounds and weights along `steps` steps of PIWAE(4, 2)."""
    torch.manual_seed(0)
    model = make(64, 5, [20, 20]).to(dtype)
    model.dtype = dtype
    x = torch.bernoulli(torch.rand(6, 8, 64)).to(dtype)
    model.set_data_mean(x.mean((0, 1)).float().to(dtype))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = fused(optimizer) if quick else optimizer
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = iw_loss(model, x[step % 6], samples=8, theta=Side("iwae", 8), phi=Side("iwae", 4), method=method)
        loss.backward()
        optimizer.step()
        found.append(torch.cat([loss.detach()[None], *(p.detach().flatten() for p in model.parameters())]))
    return torch.stack(found)


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 200, 1e-9), (torch.float32, 50, 1e-5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_is_that_of_torchs_own_distributions_and_optimiser(dtype, steps, tolerance, compiled):
    def make(*sizes):
        model = MLP(*sizes)
        assert not compiled or compile_likelihoods(model)
        return model

    ours = trajectory(make, dtype, steps)
    plain = trajectory(Plain, dtype, steps, "separate", quick=False)
    assert (ours[-1] - ours[0]).norm() > 0.1  # it moves
    distance = (ours - plain).norm(dim=1) / plain.norm(dim=1)
    assert distance.max() < tolerance
    assert ((ours - plain)[:, 0].abs() / plain[:, 0].abs()).max() < tolerance
    assert distance.max() > 0  # other sums than theirs


def test_an_optimiser_is_fused_unless_told_otherwise():
    parameters = list(mlp().parameters())
    assert fused(torch.optim.Adam(parameters)).param_groups[0]["fused"] is True
    assert fused(torch.optim.SGD(parameters, lr=0.1)).param_groups[0]["fused"] is True
    assert fused(torch.optim.Adam(parameters, fused=False)).param_groups[0]["fused"] is False
    assert fused(torch.optim.Adam(parameters, foreach=True)).param_groups[0]["fused"] is None
    assert "fused" not in fused(torch.optim.Rprop(parameters)).param_groups[0]


# ------------------------------------------------------------------------------------------------ the kernels
@pytest.mark.parametrize("kernel", [eager, formula, Compiled()], ids=["eager", "formula", "compiled"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("leading", [(), (B,), (S, B)])
@pytest.mark.parametrize("X", [7, 10, 12])  # of which the eager kernel takes 1, 2 and 4 to a logarithm
@pytest.mark.parametrize("block", [1, 2 * B * 12, 2**19])
def test_value_and_gradient_are_those_of_torchs_bernoulli(kernel, size, leading, X, block, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bernoulli, "BLOCK", block)
    logits = (size * torch.randn(S, B, X, dtype=torch.float64)).requires_grad_()
    x, seed = torch.rand(*leading, X, dtype=torch.float64).requires_grad_(), torch.randn(S, B, dtype=torch.float64)
    ours = BernoulliPixels(logits, kernel).log_prob(x)
    theirs = Independent(Bernoulli(logits=logits, validate_args=False), 1).log_prob(x.expand(S, B, X))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    for weights in (seed, torch.ones_like(seed)):  # ones: not multiplied by
        for a, b in zip(
            *(torch.autograd.grad(v, (logits, x), weights, retain_graph=True) for v in (ours, theirs)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(BernoulliPixels(logits, kernel).log_prob(x), theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", [eager, formula], ids=["eager", "formula"])
def test_gradients_of_single_pixels_keep_their_digits_in_both_tails(kernel):
    """A pixel that is always off has a gradient of sigmoid(l), of which Adam sees the size alone."""
    logits = torch.linspace(-30, 30, 61).reshape(1, 1, -1)
    for x in (0.0, 1.0):
        value = torch.full((1, 61), x)
        _, ours = kernel(logits, value, True)
        exact = value.double() - torch.sigmoid(logits.double()) if x == 0 else torch.sigmoid(-logits.double())
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("pixels", [131, 192, 784])  # at a logit of 0 each is a factor 2, of which 128 overflow
def test_many_pixels_of_even_odds_do_not_overflow(pixels):
    log_prob, _ = formula(torch.zeros(S, B, pixels), torch.ones(B, pixels), False)
    torch.testing.assert_close(log_prob.double(), torch.full((S, B), -pixels * math.log(2)).double(), rtol=1e-6, atol=0)


def test_values_of_single_pixels_keep_their_digits_in_both_tails():
    """The compiled kernel's logarithm is a polynomial of its own: against NumPy's, from one end to the other."""
    logits = torch.linspace(-30, 30, 60_001)
    for x in (0.0, 1.0):
        log_prob, _ = formula(logits.unsqueeze(-1), torch.full((60_001, 1), x), False)
        exact = -np.logaddexp(0.0, (1 - 2 * x) * logits.double().numpy())
        np.testing.assert_allclose(log_prob.numpy(), exact, rtol=3e-7)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(log_prob.numpy(), exact * (1 + 1e-6), rtol=3e-7)


def test_logits_of_low_precision_are_summed_in_float32():
    torch.manual_seed(0)
    logits, x = (4 * torch.randn(S, B, 300)).bfloat16().requires_grad_(), torch.bernoulli(torch.rand(B, 300))
    log_prob = BernoulliPixels(logits).log_prob(x)
    exact = Independent(Bernoulli(logits=logits.double(), validate_args=False), 1).log_prob(x.double())
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=1e-4)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert gradient.dtype == torch.bfloat16
    with torch.no_grad():
        assert BernoulliPixels(logits).log_prob(x.double()).dtype == torch.float32
    assert BernoulliPixels(logits).log_prob(x.double()).dtype == torch.float32
    exact = x.double() - torch.sigmoid(logits.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-6)


def test_pixels_have_the_moments_and_samples_of_a_bernoulli():
    torch.manual_seed(0)
    p = BernoulliPixels(torch.tensor([[-2.0, 0.0, 3.0]]))
    reference = Independent(Bernoulli(logits=p.logits), 1)
    torch.testing.assert_close(p.mean, reference.mean)
    torch.testing.assert_close(p.variance, reference.variance)
    draws = p.sample((20_000,))
    assert draws.shape == (20_000, 1, 3) and set(draws.unique().tolist()) == {0.0, 1.0}
    z = (draws.mean(0) - p.mean) / (p.variance / 20_000).sqrt()
    assert z.abs().max() < 4.5
    assert ((draws.mean(0) - 1.05 * p.mean) / (p.variance / 20_000).sqrt()).abs().max() > 4.5  # a biased twin


def test_a_diagonal_normal_is_torchs():
    torch.manual_seed(0)
    loc, log_scale = torch.randn(2, B, X, dtype=torch.float64).unbind()
    z = torch.randn(S, B, X, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (loc, log_scale, z)]
    ours = DiagonalNormal(loc, log_scale.exp())
    theirs = Independent(Normal(loc, log_scale.exp()), 1)
    seed = torch.randn(S, B, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z), rtol=1e-13, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(p.log_prob(z), inputs, seed) for p in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    wide = ours.expand((S, B))
    assert wide.batch_shape == (S, B)
    torch.testing.assert_close(wide.log_prob(z), theirs.log_prob(z), rtol=1e-13, atol=1e-12)
    standard = Independent(Normal(torch.zeros(X, dtype=torch.float64), 1.0), 1)
    torch.testing.assert_close(kl_divergence(ours, standard), kl_divergence(theirs, standard))


def test_a_diagonal_normal_draws_what_torchs_does():
    torch.manual_seed(0)
    inputs = [torch.randn(B, X, dtype=torch.float64, requires_grad=True), torch.rand(X, dtype=torch.float64) + 0.5]
    inputs[1].requires_grad_()
    seed, found = torch.randn(S, B, X, dtype=torch.float64), []
    for p in (DiagonalNormal(*inputs), Independent(Normal(*inputs), 1)):
        torch.manual_seed(1)
        z = p.rsample((S,))
        found.append((z, *torch.autograd.grad(z, inputs, seed)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_standard_normal_is_torchs():
    torch.manual_seed(0)
    z = torch.randn(S, B, X, dtype=torch.float64, requires_grad=True)
    ours, theirs = standard_normal(X, z), Independent(Normal(torch.zeros_like(z[0, 0]), 1.0), 1)
    assert (ours.batch_shape, ours.event_shape, ours.mean.dtype) == ((), (X,), torch.float64)
    seed = torch.randn(S, B, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z), rtol=1e-13, atol=1e-12)
    for order in (1, 2):
        found = []
        for p in (ours, theirs):
            (g,) = torch.autograd.grad(p.log_prob(z), z, seed, create_graph=True)
            found.append(g if order == 1 else torch.autograd.grad((g**2).sum(), z)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(ours.log_prob))(z[:, 0]), -z[:, 0])
    with pytest.raises(RuntimeError):
        ours.log_prob(z[..., 1:])
    low = standard_normal(X, z.bfloat16())
    assert low.mean.dtype == torch.float32 and low.log_prob(z.bfloat16()).dtype == torch.float32


def test_the_standard_normal_is_made_once_and_can_be_trained_with_after_an_evaluation():
    like = torch.zeros(1)
    with torch.inference_mode():
        p = standard_normal(23, like)
    assert standard_normal(23, like) is p and standard_normal(23, like.double()) is not p
    seen = []
    for q in (p, Independent(Normal(torch.zeros(23), torch.ones(23)), 1)):
        scale = torch.ones(23, requires_grad=True)
        kl_divergence(DiagonalNormal(torch.zeros(23), 2 * scale), q).sum().backward()  # keeps the prior's tensors
        seen.append(scale.grad)
    torch.testing.assert_close(*seen)


def test_a_backward_is_told_what_is_asked_for():
    told = []

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            return sum(tensors)

        @staticmethod
        def backward(ctx, seed):
            told.append(asked(ctx))
            return seed, seed, seed, seed

    leaf, constant = torch.ones(1, requires_grad=True), torch.ones(1)
    a, b = 2 * leaf, 3 * leaf
    out = Sum.apply(a, b, leaf, constant)
    for inputs in (a, b, (a, b), leaf):
        torch.autograd.grad(out, inputs, retain_graph=True)
    out.backward()
    assert told == [
        [True, False, True, False],  # of a leaf autograd does not tell
        [False, True, True, False],
        [True, True, True, False],
        [True, True, True, False],
        [True, True, True, False],
    ]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_loss_can_be_differentiated_again_and_in_parts(scale):
    """Its gradients are handed on as they are where nothing scales them: not to be added to in place."""
    torch.manual_seed(0)
    model, x = MLP(5, 3, [4]).double(), torch.rand(4, 5).round().double()
    parameters = list(model.parameters())
    loss = scale * iw_loss(model, x, samples=6, theta=Side("iwae", 6), phi=Side("iwae", 3))
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for p, g in zip(parameters, first, strict=True):
        torch.testing.assert_close(p.grad, 3 * g, rtol=1e-13, atol=1e-13)
    seed = torch.tensor(0.25, dtype=torch.float64)
    for g, h in zip(first, torch.autograd.grad(loss, parameters, seed), strict=True):
        torch.testing.assert_close(h, 0.25 * g, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [4.0, 12.0])
def test_a_bright_image_keeps_its_digits(size):
    """Of each pixel x * l and log(1 + exp l) are large and nearly alike: sums of each would lose what is between."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((100, 784), 0.8))
    logits = size * (0.5 + torch.rand(100, 784)) * (2 * x - 1)
    exact = Independent(Bernoulli(logits=logits.double()), 1).log_prob(x.double())
    for kernel in (eager, formula):
        assert (kernel(logits, x, False)[0] - exact).abs().max() < 1e-4
    apart = (logits * x).sum(-1) - torch.nn.functional.softplus(logits).sum(-1)
    assert (apart - exact).abs().max() > 2e-4


def test_no_rows_and_one_row_are_rows():
    for shape in ((0, 5, 12), (3, 0, 12), (0, 12), (12,)):
        logits = torch.randn(shape, requires_grad=True)
        log_prob = BernoulliPixels(logits).log_prob(torch.ones(12))
        assert log_prob.shape == shape[:-1]
        assert torch.autograd.grad(log_prob.sum(), logits)[0].shape == shape


SHAPES = [(X,), (B, X), (S, B, X), (S, 1, X), (1,)]


@pytest.mark.parametrize("of_value", SHAPES)
@pytest.mark.parametrize("of_loc", SHAPES)
@pytest.mark.parametrize("of_scale", SHAPES)
def test_a_diagonal_normals_gradients_are_torchs_in_any_shape_and_a_second_time(of_value, of_loc, of_scale):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (of_value, of_loc, of_scale)]
    wide = torch.broadcast_shapes((X,), of_value, of_loc, of_scale)
    weights = torch.randn(wide[:-1], dtype=torch.float64)

    def ours(value, loc, log_scale):
        return (weights * DiagonalNormal(loc, log_scale.exp()).log_prob(value.expand(*value.shape[:-1], X))).sum()

    def theirs(value, loc, log_scale):
        value, loc, log_scale = torch.broadcast_tensors(value.expand(*value.shape[:-1], X), loc, log_scale)
        return (weights * Independent(Normal(loc, log_scale.exp()), 1).log_prob(value)).sum()

    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-12, atol=1e-12)
    for i in range(3):  # of each alone, and of all
        for wanted in ([inputs[i]], inputs):
            found, expected = (torch.autograd.grad(f(*inputs), wanted) for f in (ours, theirs))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    second = (torch.autograd.functional.hessian(f, tuple(inputs)) for f in (ours, theirs))
    for rows in zip(*second, strict=True):
        for a, b in zip(*rows, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_diagonal_normal_goes_through_torch_func():
    torch.manual_seed(0)
    loc, scale, z = torch.randn(X), torch.rand(X) + 0.5, torch.randn(S, X)
    found = torch.func.vmap(torch.func.grad(lambda row: DiagonalNormal(loc, scale).log_prob(row)))(z)
    torch.testing.assert_close(found, (loc - z) / scale**2)


@pytest.mark.parametrize("make", [lambda a, b: BernoulliPixels(a), lambda a, b: DiagonalNormal(a, b)])
def test_log_prob_can_be_compiled_as_part_of_a_model(make):
    torch.manual_seed(0)
    a, b, value = torch.randn(S, B, X, requires_grad=True), torch.rand(B, X) + 0.5, torch.rand(B, X)

    def log_prob(a):
        return make(a, b).log_prob(value).sum()

    whole = torch.compile(log_prob, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(a), a)[0] for f in (whole, log_prob))
    torch.testing.assert_close(found, expected)


def test_second_derivatives_of_a_bernoulli_are_refused():
    logits = torch.randn(B, X, requires_grad=True)
    log_prob = BernoulliPixels(logits).log_prob(torch.ones(B, X))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(log_prob.sum(), logits, create_graph=True)


# ------------------------------------------------------------------------------------------------ compiling
def test_what_cannot_be_compiled_is_told_once_and_done_without(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nand more")

    kernel, logits, x = Compiled(), torch.randn(S, B, X), torch.rand(B, X)
    monkeypatch.setattr(kernel, "kernel", broken)
    with pytest.warns(UserWarning, match="model.compile does nothing, as torch.compile failed: no compiler$"):
        log_prob, _ = kernel(logits, x, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(kernel(logits, x, True)[0], log_prob)
    assert torch.equal(log_prob, eager(logits, x, True)[0])


def test_compile_is_an_option_of_the_module_and_survives_copies():
    module = iw_module(compile=True)
    (likelihood,) = (m for m in module.network.modules() if hasattr(m, "kernel"))
    assert isinstance(likelihood.kernel, Compiled)
    for copied in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert isinstance(copied.kernel, Compiled)
    with pytest.warns(UserWarning, match="model.compile does nothing for MLP, which has no Bernoulli likelihood"):
        IWModule(MLP(64, 3, [8], likelihood="gaussian"), compile=True)


def test_a_compiled_fit_takes_one_backward_pass_and_ends_as_an_eager_one():
    ends = []
    for compile in (False, True):
        module = iw_module(compile=compile)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*can't be weighed")
            fit(module, max_epochs=1, precision="64-true")
        ends.append(torch.cat([p.detach().flatten() for p in module.network.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------ mixed precision
def test_bounds_of_bf16_lie_near_those_of_float32():
    torch.manual_seed(0)
    model = MLP(784, 10, [100, 100])
    x = torch.bernoulli(torch.rand(50, 784))
    bounds = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bounds.append(importance_sample(model, x, 64).log_px)
    full, mixed = bounds
    assert 0 < (mixed - full).abs().max() < 2e-3 * full.abs().mean()  # logits have 8 bits, their sum 24
    assert (mixed - full).mean().abs() < 2e-4 * full.abs().mean()


# ------------------------------------------------------------------------------------------------ nothing waits
@pytest.fixture
def device(monkeypatch):
    """One on which a look at a value is an error, as it makes a GPU wait: meta, whose tensors have none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(routing._Proof, "due", False)  # the proofs of the 1st, 2nd, 4th, .. draw look
    return torch.device("meta")


def step_on(device, theta, phi, method="auto"):
    model, x = mlp().to(device), torch.zeros(B, 64, device=device)
    for _ in range(2):
        loss = iw_loss(model, x, samples=8, theta=theta, phi=phi, method=method)
        for proof in routing._PROOFS[model].values():
            proof.proven = set(model.generative.parameters())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.Adam(model.parameters()).step()
    return loss


@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize("name", PHI)
def test_a_step_never_looks_at_a_value(device, name, method):
    theta = Side(name, 8, **OPTIONS.get(name, {})) if name in THETA else Side("iwae", 8)
    assert step_on(device, theta, Side(name, 4, **OPTIONS.get(name, {})), method).device == device


def test_a_look_would_be_found(device, monkeypatch):
    value = routing.bounds.miwae
    monkeypatch.setattr(routing.bounds, "miwae", lambda log_w: value(log_w) * (1 if log_w.isfinite().all() else 0))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step_on(device, Side("iwae", 8), Side("iwae", 4))


def test_where_a_look_costs_it_is_taken_when_a_step_is_logged_or_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(IWModule, "device", torch.device("cuda"))
    for saving, step in ((False, 3), (True, 2)):
        torch.manual_seed(0)
        module = iw_module(Fragile(pixels=64, latent=3, hidden=[8]))
        options = {}
        if saving:
            from lightning.pytorch.callbacks import ModelCheckpoint

            options["enable_checkpointing"] = True
            options["callbacks"] = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
        options["callbacks"] = [BreakAt("nan logits", 1), *options.get("callbacks", [])]
        with pytest.raises(FloatingPointError, match=f"^Step {step}: .*up to 3 steps: on cuda .* that are logged"):
            fit(module, max_epochs=1, log_every_n_steps=4, **options)
    (saved,) = tmp_path.iterdir()
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize(("every", "times"), [(1, BATCHES), (2, BATCHES // 2), (0, 0)])
def test_what_is_logged_is_made_when_it_is_logged(monkeypatch, every, times):
    made = []
    monkeypatch.setattr(IWModule, "_log_bounds", lambda self, log_w: made.append(self.global_step))
    fit(iw_module(), max_epochs=1, log_every_n_steps=every)
    assert len(made) == times and all(step % every == 0 for step in made)
    assert math.isfinite(sum(made))
