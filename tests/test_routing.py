"""Gradients of `iw_loss` against plain autograd of each bound, for every kind of decoder: equal, or refused by name.

Each decoder of the zoo is drawn from several times: the first draw proves the fast way, the third relies on the proof.
"""

import copy
import gc
import math
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, Uniform
from torch.utils.checkpoint import checkpoint

from lightning_iwae import Side, iw_loss, routing
from lightning_iwae.models import MLP
from lightning_iwae.models.base import full_precision
from lightning_iwae.models.bernoulli import BernoulliPixels

S, B, Z, X = 8, 5, 3, 4


@pytest.fixture(autouse=True)
def double_precision_one_thread_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- the model ------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A Gaussian model of x (B, X) round any decoder, which may bring `log_scale` (of x) and `prior_mean`."""

    def __init__(self, decoder, z_shape=(Z,), x_shape=(X,)):
        super().__init__()
        self.z_shape, self.x_shape = z_shape, x_shape
        self.inference = nn.Linear(math.prod(x_shape), 2 * math.prod(z_shape))
        self.generative = decoder

    def prior(self):
        mean = getattr(self.generative, "prior_mean", torch.zeros(self.z_shape))
        return Independent(Normal(mean, torch.ones(self.z_shape)), len(self.z_shape))

    def posterior(self, x):
        mean, log_scale = full_precision(self.inference(x.flatten(1))).chunk(2, -1)
        mean, scale = mean.unflatten(1, self.z_shape), (0.3 * log_scale).exp().unflatten(1, self.z_shape)
        return Independent(Normal(mean, scale), len(self.z_shape))

    def likelihood(self, z):
        scale = torch.as_tensor(getattr(self.generative, "log_scale", 0.0)).exp()
        return Independent(Normal(full_precision(self.generative(z)), scale), len(self.x_shape))

    def batch(self, size=B):
        return torch.randn(size, *self.x_shape, generator=torch.Generator().manual_seed(7))


class Hierarchy(Distribution):
    """q(z1) q(z2 | z1), z = (z1, z2): its density at z depends on z1 through a network too."""

    def __init__(self, mean, network):
        super().__init__(mean.shape[:1], torch.Size([2 * mean.shape[1]]), validate_args=False)
        self.first, self.network = Independent(Normal(mean, 0.7), 1), network

    def second(self, z1):
        return Independent(Normal(self.network(z1).tanh(), 0.5), 1)

    def rsample(self, shape):
        z1 = self.first.rsample(shape)
        return torch.cat([z1, self.second(z1).rsample()], -1)

    def log_prob(self, z):
        z1, z2 = z.chunk(2, -1)
        return self.first.log_prob(z1) + self.second(z1).log_prob(z2)


class TwoLayer(Toy):
    def __init__(self, decoder):
        super().__init__(decoder, z_shape=(4,))
        self.inference = nn.ModuleDict({"mean": nn.Linear(X, 2), "network": nn.Linear(2, 2)})

    def posterior(self, x):
        return Hierarchy(self.inference["mean"](x), self.inference["network"])


class UniformPosterior(Toy):
    """log q(z | x) does not depend on z."""

    def posterior(self, x):
        mean, log_scale = self.inference(x).chunk(2, -1)
        width = (0.3 * log_scale).exp()
        return Independent(Uniform(mean - width, mean + width, validate_args=False), 1)


# --- the zoo --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Z -> 6 -> X, with `middle` applied to the hidden layer (S, B, 6)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(Z, 6), nn.Linear(6, X)

    def middle(self, h):
        return h.tanh()

    def forward(self, z):
        return self.last(self.middle(self.first(z)))


def mlp(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(Z, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, X))


class Images(nn.Module):
    """z (S, B, 2, 3, 3) -> x (S, B, 1, 6, 6), rows flattened for the convolutions."""

    def __init__(self, inplace=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2, stride=2),
            nn.ReLU(inplace),
            nn.Conv2d(3, 3, 3, padding="same", groups=3, bias=False),
            nn.ReLU(inplace),
            nn.Conv2d(3, 1, 3, padding=1, padding_mode="reflect"),
        )

    def forward(self, z):
        return self.layers(z.flatten(0, 1)).unflatten(0, z.shape[:2])


class Sequences(nn.Module):
    """One-dimensional convolutions up and down, between linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(Z, 8), nn.Linear(8, X)
        self.down, self.up = nn.Conv1d(2, 3, 2, stride=2), nn.ConvTranspose1d(3, 2, 2, stride=2)

    def forward(self, z):
        h = self.first(z).flatten(0, 1).unflatten(1, (2, 4))
        return self.last(self.up(self.down(h).tanh()).flatten(1)).unflatten(0, z.shape[:2])


class Normed(Decoder):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def middle(self, h):
        return self.norm(h).tanh()


class Elementwise(Decoder):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def middle(self, h):
        return (self.gain * h).tanh()


class Scaled(Decoder):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(X))


class Prior(Decoder):
    def __init__(self):
        super().__init__()
        self.prior_mean = nn.Parameter(torch.randn(Z))


class Product(Decoder):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def middle(self, h):
        return (h @ self.matrix).tanh()


class Attention(Decoder):
    """The hidden layer as three tokens of two."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def middle(self, h):
        tokens = h.flatten(0, 1).unflatten(1, (3, 2))
        return self.attention(tokens, tokens, tokens)[0].flatten(1).unflatten(0, h.shape[:2])


class Tokens(Decoder):
    """A linear layer on three tokens of each sample."""

    def __init__(self):
        super().__init__()
        self.each = nn.Linear(2, 2)

    def middle(self, h):
        return self.each(h.unflatten(-1, (3, 2))).flatten(-2).tanh()


class Tied(Decoder):
    """One matrix in a linear layer, in a product and, transposed, in a linear layer."""

    def middle(self, h):
        h = (h.tanh() @ self.first.weight).tanh()
        return F.linear(F.linear(h, self.first.weight).tanh() @ self.first.weight, self.first.weight)


class Twice(Decoder):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(6, 6)

    def middle(self, h):
        return self.again(self.again(h).tanh()).tanh()


class Checkpointed(Twice):
    reentrant = False

    def middle(self, h):
        return checkpoint(super().middle, h, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Flattened(Decoder):
    """Samples flattened to S * B rows, in order."""

    def forward(self, z):
        return super().forward(z.flatten(0, 1)).unflatten(0, z.shape[:2])


class Permuted(Decoder):
    """Samples flattened with data first: rows in the order (B, S)."""

    def forward(self, z):
        by_data = super().forward(z.transpose(0, 1).flatten(0, 1))
        return by_data.unflatten(0, (z.shape[1], z.shape[0])).transpose(0, 1)


class Backwards(Decoder):
    """The samples in reverse: the right shape, the wrong order."""

    def forward(self, z):
        return super().forward(z.flip(0)).flip(0)


class Chunked(Decoder):
    def forward(self, z):
        return torch.cat([super(Chunked, self).forward(part) for part in z.split(3)])


class Normalised(Decoder):
    """A parametrised weight: F.linear sees no parameter."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.first)


class ByKeyword(Decoder):
    def middle(self, h):
        return F.linear(input=h, weight=self.last.weight, bias=self.last.bias).tanh() @ torch.ones(X, 6)


class Recurrent(Decoder):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 6, batch_first=True)

    def middle(self, h):
        return self.cell(h.flatten(0, 1).unflatten(1, (3, 2)))[0][:, -1].unflatten(0, h.shape[:2])


class Mapped(Decoder):
    def middle(self, h):
        return torch.func.vmap(lambda row: F.linear(row, self.last.weight).tanh())(h) @ torch.ones(X, 6)


class Coordinates(Decoder):
    """A network on as many pixels as there are samples, whose rows are none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pixels", torch.randn(S * B, 2))
        self.pixel = nn.Linear(2, 6)

    def middle(self, h):
        return h.tanh() * self.pixel(self.pixels).tanh().mean(0)


class OneImage(Decoder):
    """A convolution of one image without a batch axis, with as many channels as there are samples."""

    def __init__(self):
        super().__init__()
        self.image, self.channels = nn.Parameter(torch.randn(S * B, 6)), nn.Conv1d(S * B, 1, 3, padding=1)

    def middle(self, h):
        return h.tanh() * self.channels(self.image)


class Activation(torch.autograd.Function):
    """tanh(h W^T), by hand."""

    @staticmethod
    def forward(ctx, h, weight):
        out = (h @ weight.T).tanh()
        ctx.save_for_backward(h, weight, out)
        return out

    @staticmethod
    def backward(ctx, delta):
        h, weight, out = ctx.saved_tensors
        inner = delta * (1 - out**2)
        return inner @ weight, inner.flatten(0, -2).T @ h.flatten(0, -2)


class Replay(torch.autograd.Function):
    """tanh(linear(h)), with a graph of its own inside, as in checkpointing by hand."""

    @staticmethod
    def forward(ctx, h, weight):
        with torch.enable_grad():
            ctx.inputs = h.detach().requires_grad_(), weight
            ctx.out = F.linear(ctx.inputs[0], weight, None).tanh()
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, delta):
        return torch.autograd.grad(ctx.out, ctx.inputs, delta, retain_graph=True)


class ByFunction(Decoder):
    function = Activation

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def middle(self, h):
        return self.function.apply(h, self.weight)


class ByReplay(ByFunction):
    function = Replay


class BatchNormed(Decoder):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean.normal_()

    def middle(self, h):
        return self.norm(h.flatten(0, 1)).tanh().unflatten(0, h.shape[:2])


class HomeMadeNorm(Decoder):
    """Batch normalisation without its class."""

    def middle(self, h):
        return ((h - h.mean((0, 1))) / h.std((0, 1))).tanh()


class Functional(Decoder):
    def middle(self, h):
        return F.batch_norm(h.flatten(0, 1), None, None, training=True).tanh().unflatten(0, h.shape[:2])


class Crowd(Decoder):
    """Samples that see the mean of their group, a little."""

    def middle(self, h):
        return (h + 0.01 * h.mean(0)).tanh()


class WithoutGradient(Twice):
    def middle(self, h):
        with torch.no_grad():
            return super().middle(h) + h


def evaluated():
    return BatchNormed().eval()


def dropout():
    return nn.Sequential(nn.Linear(Z, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, X))


def half_frozen():
    decoder = Twice()
    decoder.again.bias.requires_grad_(False)
    return decoder


def scripted():
    return torch.jit.script(mlp())


def traced():
    return torch.jit.trace(mlp(), torch.randn(S, B, Z))


def compiled():
    decoder = mlp()
    decoder.forward = torch.compile(decoder.forward, backend="aot_eager")
    return decoder


ALL = "all"
ZOO = {  # decoder: the parameters that are not weighed inside their layers
    mlp: set(),
    Images: set(),
    Sequences: set(),
    Normed: {"norm.weight", "norm.bias"},
    Elementwise: {"gain"},
    Scaled: {"log_scale"},
    Prior: {"prior_mean"},
    Product: {"matrix"},
    Attention: {f"attention.{p}" for p in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
    Tokens: set(),
    Tied: {"first.weight"},
    Twice: set(),
    Checkpointed: {"again.weight", "again.bias"},
    Flattened: set(),
    Permuted: ALL,
    Backwards: ALL,
    Chunked: ALL,
    Normalised: {
        f"first.{p}" for p in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
    },
    ByKeyword: {"last.weight", "last.bias"},
    Recurrent: {f"cell.{p}" for p in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")},
    Mapped: {"last.weight"},
    Coordinates: ALL,
    OneImage: {"image", "channels.weight", "channels.bias"},
    ByFunction: {"weight"},
    ByReplay: {"weight"},
    evaluated: {"norm.weight", "norm.bias"},
    dropout: set(),
    half_frozen: set(),
    scripted: ALL,
    traced: ALL,
    compiled: ALL,
}
MISTAKEN_ROWS = {Permuted, Backwards, Coordinates}  # found out by comparing, with a warning
every_decoder = pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
both_methods = pytest.mark.parametrize("method", ["auto", "separate"])


def zoo_model(make):
    return Toy(make(), (2, 3, 3), (1, 6, 6)) if make is Images else Toy(make())


# --- the oracle -----------------------------------------------------------------------------------------------

SIDES = [
    (Side("elbo", 1), Side("elbo", 1)),
    (Side("iwae", S), Side("iwae", S)),
    (Side("iwae", 4), Side("iwae", 4)),
    (Side("iwae", S), Side("iwae", 2)),
    (Side("ciwae", 4, beta=0.3), Side("ciwae", 4, beta=0.3)),
    (Side("ciwae", S, beta=0.5), Side("elbo", 2)),
    (Side("iwae", S), Side("stl", 4)),
    (Side("elbo", 4), Side("dreg", S)),
]
MIXED = SIDES[3]


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def surrogate(side, log_w, log_w_path):
    """What plain autograd differentiates for one side: its bound, or the loss that its paper gives (reference 4)."""
    view = log_w.reshape(-1, side.particles, log_w.shape[1])
    path = log_w_path.reshape(view.shape)
    w = torch.softmax(view, 1).detach()
    if side.estimator == "stl":
        return (w * path).sum(1).mean()
    if side.estimator == "dreg":
        return (w**2 * path).sum(1).mean()
    miwae = (torch.logsumexp(view, 1) - math.log(side.particles)).mean()
    beta = {"elbo": 1.0, "iwae": 0.0, "ciwae": side.beta}[side.estimator]
    return beta * view.mean() + (1 - beta) * miwae


def plain(model, x, samples, theta, phi, seed=1):
    """The loss and every gradient by two calls of autograd.grad on one graph from x to the bound."""
    held = copy.deepcopy(model.inference).requires_grad_(False)
    torch.manual_seed(seed)
    q = model.posterior(x)
    z = q.rsample((samples,))
    log_p = model.likelihood(z).log_prob(x) + model.prior().log_prob(z)
    live, model.inference = model.inference, held
    log_w, log_w_path = log_p - q.log_prob(z), log_p - model.posterior(x).log_prob(z)
    model.inference = live
    gradients = {}
    for side, network in ((theta, "generative."), (phi, "inference.")):
        of = {name: p for name, p in trainable(model).items() if name.startswith(network)}
        if of:
            found = torch.autograd.grad(-surrogate(side, log_w, log_w_path), list(of.values()), retain_graph=True)
            gradients |= dict(zip(of, found, strict=True))
    view = log_w.detach().reshape(-1, theta.particles, len(x))
    return -(torch.logsumexp(view, 1) - math.log(theta.particles)).mean(), gradients


def ours(model, x, samples, theta, phi, method="auto", seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = iw_loss(model, x, samples=samples, theta=theta, phi=phi, method=method)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable(model).items()}


def assert_equal(found, expected, tolerance=1e-10, what=""):
    """(loss, gradients) each within `tolerance` of the expected one, in norm."""
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0]), what + "the loss's value"
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error, size = (found[1][name] - gradient).norm(), gradient.norm()
        assert error <= tolerance * size + 1e-15, f"{what}{name} by {error / size:.1e}"


def check(model, x, samples, *pairs, method="auto", warned=False):
    """A draw for each (theta, phi), three at least, and every one right; exactly one warning if `warned`."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for seed, (theta, phi) in enumerate(pairs * (1 if len(pairs) > 2 else 3)):
            found = ours(model, x, samples, theta, phi, method, seed)
            assert_equal(found, plain(model, x, samples, theta, phi, seed), what=f"draw {seed}, {theta}, {phi}: ")
    ours_only = [str(w.message) for w in record if "jit" not in str(w.message)]
    assert len(ours_only) == warned and all("can't be weighed inside their layers" in message for message in ours_only)


def outside(model, x, samples=S, draws=1):
    """Names of the generative parameters that are not weighed inside their layers, at the last of so many draws."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*can't be weighed.*")
        for _ in range(draws):
            inside = routing.draw(model, x, samples).inside
    return {name for name, p in model.generative.named_parameters() if p.requires_grad and p not in inside}


# --- every decoder --------------------------------------------------------------------------------------------


@every_decoder
@both_methods
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning", "ignore:.*jit.*:FutureWarning")
def test_gradients_are_autograd_s(make, method):
    model = zoo_model(make)
    check(model, model.batch(), S, *SIDES, method=method, warned=method == "auto" and make in MISTAKEN_ROWS)


@every_decoder
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning", "ignore:.*jit.*:FutureWarning")
def test_the_fast_way_is_taken_where_it_is_right_and_only_there(make):
    model = zoo_model(make)
    everything = {name for name, p in model.generative.named_parameters() if p.requires_grad}
    expected = everything if ZOO[make] is ALL else ZOO[make]
    for draws in (1, 1, 1, 2):
        assert outside(model, model.batch(), draws=draws) == expected
    assert not routing.draw(model, model.batch(), S, method="separate").inside


@pytest.mark.parametrize("make", [mlp, Images, Sequences, Tied, Permuted, Scaled], ids=lambda make: make.__name__)
@both_methods
@pytest.mark.parametrize(("samples", "size"), [(1, 5), (8, 1), (1, 1), (4, 4), (2, 3), (6, 2)])
def test_any_number_of_samples_and_data(make, method, samples, size):
    model = zoo_model(make)
    sides = Side("iwae", samples), Side("iwae", 2 - samples % 2)
    in_order = samples == 1 or size == 1  # then (B, S) is (S, B)
    warned = make is Permuted and method == "auto" and not in_order
    check(model, model.batch(size), samples, sides, method=method, warned=warned)


@pytest.mark.parametrize("make", [mlp, Images, Sequences], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("samples", "size"), [(1, 5), (8, 1), (4, 4)])
def test_the_fast_way_at_any_size(make, samples, size):
    model = zoo_model(make)
    assert outside(model, model.batch(size), samples) == set()


@both_methods
def test_a_posterior_of_two_layers(method):
    """d log q(z2 | z1) / d z1 stays on the path, with phi held."""
    model = TwoLayer(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, X)))
    check(model, model.batch(), S, *SIDES, method=method)


@both_methods
def test_a_posterior_whose_density_is_flat(method):
    model = UniformPosterior(mlp())
    check(model, model.batch(), S, *SIDES, method=method)


@both_methods
def test_the_paper_s_network_against_torch_s_bernoulli(method):
    class Slow(MLP):
        def likelihood(self, z):
            return Independent(Bernoulli(logits=self.generative(z), validate_args=False), 1)

    model = MLP(pixels=7, latent=Z, hidden=[6, 5])
    twin = Slow(pixels=7, latent=Z, hidden=[6, 5])
    twin.load_state_dict(model.state_dict())
    x = torch.rand(B, 7)
    x[0] = x[0].round()
    for theta, phi in SIDES:
        assert_equal(ours(model, x, S, theta, phi, method), plain(twin, x, S, theta, phi))
    assert outside(model, x) == set()


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("x_shape", [(7,), (B, 7), (S, B, 7)])
def test_a_bernoulli_s_log_prob_and_its_gradients_are_torch_s(size, x_shape):
    logits = (size * torch.randn(S, B, 7)).requires_grad_()
    x, seed = torch.rand(x_shape).requires_grad_(), torch.randn(S, B)
    fast = BernoulliPixels(logits).log_prob(x)
    slow = Independent(Bernoulli(logits=logits, validate_args=False), 1).log_prob(x.expand(S, B, 7))
    torch.testing.assert_close(fast, slow, rtol=1e-13, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(v, (logits, x), seed) for v in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@both_methods
def test_a_decoder_without_parameters(method):
    model = Toy(nn.Tanh(), z_shape=(X,))
    check(model, model.batch(), S, (Side("iwae", S), Side("dreg", 2)), method=method)


@both_methods
@pytest.mark.parametrize("frozen", ["generative", "inference"])
def test_a_frozen_network_gets_no_gradient_and_the_other_its_own(method, frozen):
    model = Toy(mlp())
    getattr(model, frozen).requires_grad_(False)
    check(model, model.batch(), S, MIXED, method=method)
    assert all(p.grad is None for p in getattr(model, frozen).parameters())


@pytest.mark.parametrize("make", [lambda: mlp(lambda: nn.ReLU(inplace=True)), lambda: Images(inplace=True)])
def test_activations_in_place(make):
    decoder = make()
    model = Toy(decoder, (2, 3, 3), (1, 6, 6)) if isinstance(decoder, Images) else Toy(decoder)
    check(model, model.batch(), S, MIXED)
    assert outside(model, model.batch()) == set()


def test_a_lone_vector_is_not_taken_for_one_sample_s_data():
    """With S = 1 a row of B features has the shape (S, B)."""

    class Constant(Decoder):
        def __init__(self):
            super().__init__()
            self.constant, self.style = nn.Parameter(torch.randn(1, B)), nn.Linear(B, 6)

        def middle(self, h):
            return (h + self.style(self.constant)).tanh()

    model = Toy(Constant())
    check(model, model.batch(), 1, (Side("iwae", 1), Side("iwae", 1)))
    assert outside(model, model.batch(), 1) == {"constant", "style.weight", "style.bias"}


def test_an_outer_mode_does_not_matter():
    model = Toy(mlp())
    with torch.device("cpu"):
        check(model, model.batch(), S, MIXED)
        assert outside(model, model.batch()) == set()


def test_anomaly_detection_finds_none():
    model = Toy(Images(), (2, 3, 3), (1, 6, 6))
    with torch.autograd.set_detect_anomaly(True):
        check(model, model.batch(), S, MIXED)


# --- the oracle's own test: wrong gradients are noticed ---------------------------------------------------------


def test_wrong_gradients_do_not_pass_for_right_ones():
    model = Toy(mlp())
    x, theta, phi = model.batch(), Side("iwae", S), Side("iwae", 2)
    loss, right = plain(model, x, S, theta, phi)
    _, of_theta_s_bound = plain(model, x, S, theta, theta)
    wrong = {
        "both bounds' gradients in phi (pythae)": {
            name: g + of_theta_s_bound[name] * name.startswith("inference") for name, g in right.items()
        },
        "theta's bound for both": of_theta_s_bound,
        "5 % too long": {name: 1.05 * g for name, g in right.items()},
        "one parameter, by a millionth": right | {"generative.0.bias": right["generative.0.bias"] * (1 + 1e-6)},
        "descent for ascent": {name: -g for name, g in right.items()},
    }
    assert_equal((loss, right), plain(model, x, S, theta, phi))
    for gradients in wrong.values():
        with pytest.raises(AssertionError):
            assert_equal((loss, gradients), (loss, right))
    with pytest.raises(AssertionError, match="value"):
        assert_equal((loss * 1.001, right), (loss, right))


def test_stl_and_dreg_are_not_the_gradient_of_the_bound():
    model = Toy(mlp())
    x = model.batch()
    _, total = plain(model, x, S, Side("iwae", S), Side("iwae", S))
    for estimator in ("stl", "dreg"):
        _, path = ours(model, x, S, Side("iwae", S), Side(estimator, S))
        assert (path["inference.weight"] - total["inference.weight"]).norm() > 0.05 * total["inference.weight"].norm()


# --- independence, reuse, passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, Images, Normed, Scaled, Attention, Permuted], ids=lambda make: make.__name__)
@both_methods
@pytest.mark.filterwarnings("ignore:.*can't be weighed")
def test_one_side_s_estimator_does_not_touch_the_other_s_gradient(make, method):
    """Bit by bit."""
    model = zoo_model(make)
    gradients = {}
    routing.draw(model, model.batch(), S, method)
    for theta in (Side("iwae", S), Side("elbo", 1), Side("ciwae", 2, beta=0.2)):
        for phi in (Side("iwae", 2), Side("dreg", S), Side("elbo", 1)):
            _, gradients[theta, phi] = ours(model, model.batch(), S, theta, phi, method)
    for (theta, phi), found in gradients.items():
        for (theta_2, phi_2), other in gradients.items():
            for name in found:
                same = torch.equal(found[name], other[name])
                if (theta == theta_2) if name.startswith("generative") else (phi == phi_2):
                    assert same, f"{name} changed from {theta, phi} to {theta_2, phi_2}"
                elif name.endswith("weight"):
                    assert not same


@both_methods
def test_several_losses_on_one_draw(method):
    model = Toy(Normed())
    x = model.batch()
    for seed in range(2):
        torch.manual_seed(seed)
        drawn = routing.draw(model, x, S, method)
        losses = [routing.loss(drawn, theta, phi) for theta, phi in SIDES]
        for loss, (theta, phi) in zip(losses, SIDES, strict=True):
            model.zero_grad()
            loss.backward(retain_graph=True)
            found = loss.detach(), {name: p.grad for name, p in trainable(model).items()}
            assert_equal(found, plain(model, x, S, theta, phi, seed))


def test_the_value_is_theta_s_bound_whatever_is_differentiated():
    """Not the surrogate, and not phi's."""
    model = Toy(mlp())
    x = model.batch()
    torch.manual_seed(1)
    drawn = routing.draw(model, x, S)
    log_w = drawn.log_w.numpy().reshape(2, 4, B)
    expected = -float(torch.tensor(log_w).exp().mean(1).log().mean())
    for theta in ("iwae", "elbo"):
        for phi in (Side("elbo", 1), Side("dreg", S)):
            assert routing.loss(drawn, Side(theta, 4), phi).item() == pytest.approx(expected, rel=1e-14)
    assert not drawn.log_w.requires_grad and drawn.log_w.shape == (S, B)


def test_a_posterior_may_be_handed_over():
    model = Toy(mlp())
    x = model.batch()
    torch.manual_seed(1)
    drawn = routing.draw(model, x, S, q=model.posterior(x))
    model.zero_grad()
    loss = routing.loss(drawn, Side("iwae", S), Side("iwae", 2))
    loss.backward()
    found = loss.detach(), {name: p.grad for name, p in trainable(model).items()}
    assert_equal(found, plain(model, x, S, Side("iwae", S), Side("iwae", 2)))


def test_backward_fills_both_networks_alone_scales_and_adds_up():
    model = Toy(mlp())
    model.buffer = torch.ones(3, requires_grad=True)
    x = model.batch().requires_grad_()
    sides = {"samples": S, "theta": Side("iwae", S), "phi": Side("iwae", 2)}
    _, expected = plain(model, x.detach(), S, sides["theta"], sides["phi"])
    model.zero_grad()
    torch.manual_seed(1)
    loss = iw_loss(model, x, **sides)
    assert loss.shape == () and loss.requires_grad
    assert all(p.grad is None for p in model.parameters())
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    torch.manual_seed(1)
    (iw_loss(model, x, **sides) / 2).backward()
    assert model.buffer.grad is None
    for name, p in trainable(model).items():
        torch.testing.assert_close(p.grad, 4.5 * expected[name], rtol=1e-12, atol=1e-15)


def test_hooks_of_parameters_see_the_gradient_once_and_as_it_is():
    model = Toy(mlp())
    x, theta, phi = model.batch(), Side("iwae", S), Side("iwae", 2)
    _, expected = plain(model, x, S, theta, phi)
    seen = {name: [] for name in trainable(model)}
    for name, p in trainable(model).items():
        p.register_hook(lambda g, name=name: seen[name].append(g.clone()) or 2 * g)
    for seed in (1, 1, 1):
        _, found = ours(model, x, S, theta, phi, seed=seed)
    for name, g in expected.items():
        assert len(seen[name]) == 3
        torch.testing.assert_close(seen[name][-1], g)
        torch.testing.assert_close(found[name], 2 * g)


class Counter(torch.autograd.Function):
    """Identity that counts how often a gradient comes back through it."""

    @staticmethod
    def forward(ctx, h, counts):
        ctx.counts = counts
        counts["forward"] += 1
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        ctx.counts["backward"] += 1
        return delta, None


class Counted(Decoder):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def middle(self, h):
        return Counter.apply(h, self.counts).tanh()


@pytest.mark.parametrize(("method", "passes", "proof"), [("auto", 1, 3), ("separate", 2, 4)])
def test_one_pass_forward_and_one_backward_once_proven(method, passes, proof):
    counts = {"forward": 0, "backward": 0}
    model = Toy(Counted(counts))
    x = model.batch()
    for draw in range(1, 20):
        counts.update(forward=0, backward=0)
        iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("iwae", 2), method=method).backward()
        assert counts == {"forward": 1, "backward": passes + proof * (draw in (1, 2, 4, 8, 16))}


def test_a_learnt_scale_costs_no_second_pass_through_the_network():
    counts = {"forward": 0, "backward": 0}
    decoder = Counted(counts)
    decoder.log_scale = nn.Parameter(torch.zeros(X))
    model = Toy(decoder)
    for _ in range(3):
        counts.update(forward=0, backward=0)
        iw_loss(model, model.batch(), samples=S, theta=Side("iwae", S), phi=Side("iwae", 2))
    assert counts == {"forward": 1, "backward": 1}


def test_noise_does_not_depend_on_the_method_or_on_proofs():
    model, states = Toy(dropout()), []
    for method in ("auto", "auto", "auto", "separate", "separate", "separate"):
        torch.manual_seed(3)
        drawn = routing.draw(model, model.batch(), S, method)
        states.append((torch.get_rng_state(), drawn.z, drawn.log_w))
    for state, z, log_w in states:
        assert torch.equal(state, states[0][0]) and torch.equal(z, states[0][1])
        torch.testing.assert_close(log_w, states[0][2], rtol=1e-14, atol=0)


class Sentinel:
    """Something that dies with the graph it is kept in."""


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, alive):
        ctx.sentinel = Sentinel()
        alive.append(weakref.ref(ctx.sentinel))
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta, None


@pytest.mark.parametrize("make", [Sequences, Tied, Permuted], ids=lambda make: make.__name__)
@both_methods
@pytest.mark.filterwarnings("ignore:.*can't be weighed")
def test_the_decoder_s_graph_dies_at_once_without_the_garbage_collector(make, method):
    alive = []

    class Watched(make):
        def forward(self, z):
            return Kept.apply(super().forward(Kept.apply(z, alive)), alive)

    model = Toy(Watched())
    x = model.batch()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            loss = iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("iwae", 2), method=method)
            assert len(alive) % 2 == 0 and not any(ref() for ref in alive), "kept by the loss"
            loss.backward()
        encoder = weakref.ref(loss.grad_fn)
        del loss
        assert encoder() is None
    finally:
        gc.enable()


def test_models_are_not_kept_alive():
    model = Toy(mlp())
    routing.draw(model, model.batch(), S)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


# --- precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, Sequences, Tied, Permuted], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*can't be weighed")
def test_autocast_to_bfloat16(make):
    """log-weights stay in single precision; gradients are off by bfloat16's rounding (2^-9 an operation), no more."""
    torch.set_default_dtype(torch.float32)
    model = zoo_model(make)
    x, theta, phi = model.batch(), Side("iwae", S), Side("iwae", 2)
    exact = plain(model, x, S, theta, phi)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(1)
            drawn = routing.draw(model, x, S)
            found = ours(model, x, S, theta, phi)
            rounded = plain(model, x, S, theta, phi)
        assert drawn.log_w.dtype == torch.float32 and found[0].dtype == torch.float32
        assert_equal(found, rounded, tolerance=0.02)
        assert_equal(found, exact, tolerance=0.06)
        assert all(g.dtype == torch.float32 for g in found[1].values())
        expected = {name for name, _ in model.generative.named_parameters()} if ZOO[make] is ALL else ZOO[make]
        names = {p: name for name, p in model.generative.named_parameters()}
        assert names.keys() - drawn.inside == {p for p, name in names.items() if name in expected}


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    model = Toy(Sequences())
    x, theta, phi = model.batch(), Side("iwae", S), Side("dreg", 2)
    for seed in range(3):
        assert_equal(ours(model, x, S, theta, phi, seed=seed), plain(model, x, S, theta, phi, seed), tolerance=1e-5)
    assert outside(model, x) == set()


def test_log_weights_in_half_precision_are_refused():
    class Half(Toy):
        def likelihood(self, z):
            mean = self.generative(z)
            return SimpleNamespace(log_prob=lambda x: Normal(mean, 1.0).log_prob(x).sum(-1).bfloat16())

    refused(Half(mlp()), r"likelihood\(z\).log_prob\(x\) must be float32 or float64.*Got torch.bfloat16")


# --- networks that come to do what they did not ----------------------------------------------------------------


class Gated(Decoder):
    """A branch behind a gate that is closed at first."""

    def __init__(self, branch):
        super().__init__()
        self.gate, self.branch = nn.Parameter(torch.zeros(())), branch

    def middle(self, h):
        return h.tanh() + self.gate * self.branch(h)


class PermutedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h):
        return self.linear(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (h.shape[1], h.shape[0])).transpose(0, 1)


class Mean(nn.Module):
    def forward(self, h):
        return h.mean((0, 1)).expand(h.shape)


@pytest.mark.parametrize("closed", [1, 2, 3, 5])
def test_a_gradient_of_zero_proves_nothing(closed):
    """The gate opens between proofs; the branch's rows are in the wrong order from the start."""
    model = Toy(Gated(PermutedLinear()))
    x, warned = model.batch(), []
    for step in range(20):
        if step == closed:
            nn.init.constant_(model.generative.gate, 0.5)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            found = ours(model, x, S, Side("iwae", S), Side("iwae", 2), seed=step)
        warned += [step for _ in record]
        assert_equal(found, plain(model, x, S, Side("iwae", S), Side("iwae", 2), seed=step))
    assert len(warned) == 1 and warned[0] in (1, 3, 7)


def test_samples_that_come_to_depend_on_each_other_are_refused():
    model = Toy(Gated(Mean()))
    x, sides = model.batch(), {"samples": S, "theta": Side("iwae", S), "phi": Side("iwae", 2)}
    iw_loss(model, x, **sides)
    nn.init.constant_(model.generative.gate, 0.5)
    with pytest.raises(ValueError, match="depends on other samples"):
        iw_loss(model, x, **sides)


def test_what_is_not_a_number_proves_nothing():
    class Bad(Permuted):
        bad = True

        def middle(self, h):
            return h.tanh() * (math.inf if self.bad else 1.0)

    class Unchecked(Toy):
        def likelihood(self, z):
            return Independent(Normal(self.generative(z), 1.0, validate_args=False), 1, validate_args=False)

    model = Unchecked(Bad())
    assert not routing.draw(model, model.batch(), S).inside
    model.generative.bad = False
    check(model, model.batch(), S, MIXED, warned=True)


def test_a_layer_that_is_unfrozen_is_proven_anew():
    model = Toy(Gated(PermutedLinear()))
    nn.init.constant_(model.generative.gate, 0.5)
    model.generative.branch.requires_grad_(False)
    check(model, model.batch(), S, *SIDES[:4])
    model.generative.branch.requires_grad_(True)
    check(model, model.batch(), S, MIXED, warned=True)


def test_a_layer_that_is_unfrozen_is_weighed_at_once():
    model = Toy(Decoder())
    model.generative.last.requires_grad_(False)
    assert outside(model, model.batch(), draws=4) == set()
    model.generative.last.requires_grad_(True)
    assert outside(model, model.batch()) == set()


def test_two_models_round_one_decoder_are_proven_each():
    decoder = Decoder()

    class Reversed(Toy):
        def likelihood(self, z):
            return Independent(Normal(self.generative(z.flip(0)).flip(0), 1.0), 1)

    check(Toy(decoder), Toy(decoder).batch(), S, MIXED)
    check(Reversed(decoder), Toy(decoder).batch(), S, MIXED, warned=True)


def test_another_size_of_batch_is_proven_anew():
    """Pixels are as many as samples at one size only."""
    model = Toy(Coordinates())
    check(model, model.batch(B + 1), S, *SIDES[:4])
    check(model, model.batch(B), S, MIXED, warned=True)
    check(model, model.batch(B + 1), S, MIXED)


@both_methods
def test_a_posterior_whose_density_is_a_constant(method):
    """Uniform on a cube that nothing moves: log q has no graph, and d log q / dz is 0."""

    class Cube(Toy):
        def posterior(self, x):
            corner = torch.zeros(len(x), Z)
            return Independent(Uniform(corner, corner + 1, validate_args=False), 1)

    model = Cube(mlp())
    model.inference.requires_grad_(False)
    x = model.batch()
    for phi in ("wake", "iwae"):
        torch.manual_seed(1)
        iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side(phi, 2), method=method).backward()
        found = [p.grad.clone() for p in model.generative.parameters()]
        model.zero_grad()
        torch.manual_seed(1)
        z = model.posterior(x).rsample((S,))
        log_w = model.prior().log_prob(z) + model.likelihood(z).log_prob(x)
        expected = torch.autograd.grad(-log_w.logsumexp(0).mean(), list(model.generative.parameters()))
        for ours_, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-14)


def test_second_derivatives_through_a_loss_are_refused():
    model = Toy(mlp())
    loss = iw_loss(model, model.batch(), samples=S, theta=Side("iwae", S), phi=Side("iwae", 2))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_weights_that_vanish_are_zeros_and_not_subnormal():
    """Products with subnormal numbers take a CPU many times as long; what is dropped is below any rounding."""
    log_w = torch.linspace(0, -1000, 64, dtype=torch.float32)[:, None].expand(64, 3)
    found = routing.weights(log_w, Side("iwae", 64), Side("iwae", 8))
    exact = routing.weights(log_w.double(), Side("iwae", 64), Side("iwae", 8))
    for ours, theirs in zip((found.a, found.c, found.s), (exact.a, exact.c, exact.s), strict=True):
        size = ours.abs()
        assert ((size == 0) | (size > 1e-30)).all() and (size == 0).any()
        assert (ours.double() - theirs).abs().max() < 1e-7
        assert ((theirs != 0) & (theirs.abs() < 1e-40)).any()  # as subnormal numbers in float32


# --- refusals -------------------------------------------------------------------------------------------------


def refused(model, match, error=ValueError, method="auto", x=None):
    x = model.batch() if x is None else x
    with pytest.raises(error, match=match):
        iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("iwae", 2), method=method)


@both_methods
def test_batchnorm_in_training_mode(method):
    refused(Toy(BatchNormed()), r"BatchNorm in training mode in the generative network \(norm\)", method=method)
    without_statistics = BatchNormed()
    without_statistics.norm = nn.BatchNorm1d(6, track_running_stats=False)
    refused(Toy(without_statistics.eval()), r"BatchNorm.*\(norm\)", method=method)


def test_batchnorm_that_comes_later_is_refused_at_every_draw():
    model = Toy(BatchNormed().eval())
    for _ in range(4):  # past those that are compared
        routing.draw(model, model.batch(), S)
    model.generative.norm = nn.BatchNorm1d(6, track_running_stats=False).eval()  # the same modes, the same parameters
    for _ in range(5):
        refused(model, r"BatchNorm in training mode in the generative network \(norm\)")


@both_methods
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [HomeMadeNorm, Functional, Crowd], ids=lambda make: make.__name__)
def test_normalising_over_the_batch_in_any_other_way(make, autocast, method):
    torch.set_default_dtype(torch.float32 if autocast else torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        refused(Toy(make()), "depends on other samples.*no bound", method=method)


@both_methods
def test_normalising_over_the_batch_under_a_posterior_so_narrow_that_its_own_gradient_is_huge(method):
    class Narrow(Toy):
        def posterior(self, x):
            return Independent(Normal(self.inference(x)[:, :Z], 1e-10), 1)

    refused(Narrow(HomeMadeNorm()), "depends on other samples.*no bound", method=method)


def test_a_decoder_that_is_switched_to_training_mode_is_looked_at_again():
    class Switch(HomeMadeNorm):
        def middle(self, h):
            return super().middle(h) if self.training else h.tanh()

    model = Toy(nn.Sequential(Switch()))
    model.generative[0].eval()
    check(model, model.batch(), S, *SIDES[:4])
    model.generative[0].train()
    refused(model, "depends on other samples")


@both_methods
def test_reentrant_checkpointing(method):
    refused(Toy(Reentrant()), "use_reentrant=False", method=method)


@both_methods
def test_parameters_that_the_bound_does_not_reach(method):
    refused(Toy(WithoutGradient()), r"does not depend on.*first.weight, first.bias, again.weight", method=method)
    unused = Decoder()
    unused.spare = nn.Linear(2, 2)
    refused(Toy(unused), r"generative parameter\(s\) spare.weight, spare.bias.*requires_grad_\(False\)", method=method)
    unused.spare.requires_grad_(False)
    check(Toy(unused), Toy(unused).batch(), S, MIXED, method=method)


def test_drawing_without_gradients():
    with torch.no_grad():
        refused(Toy(mlp()), "look for no_grad")


@both_methods
def test_parameters_of_neither_and_of_both_networks(method):
    model = Toy(mlp())
    model.stray = nn.Parameter(torch.zeros(2))
    refused(model, "Toy: parameters in neither .inference nor .generative: stray", method=method)
    model = Toy(mlp())
    model.inference.shared = model.generative[0].weight
    refused(model, "Toy: parameters in both .inference and .generative: inference.shared", method=method)


@both_methods
def test_networks_that_use_each_other_s_parameters(method):
    """Each would get a gradient that is in neither side's estimator, or lose one that is in its own."""

    class PosteriorOfTheta(Toy):
        def posterior(self, x):
            q = super().posterior(x).base_dist
            return Independent(Normal(q.loc + self.generative.prior_mean, q.scale), 1)

    class DensityOfTheta(Toy):
        def posterior(self, x):
            return Hierarchy(self.inference(x)[:, :2], self.generative.layer)

    class WithLayer(nn.Linear):
        def __init__(self):
            super().__init__(4, X)
            self.layer = nn.Linear(2, 2)

    class LikelihoodOfPhi(Toy):
        def likelihood(self, z):
            return Independent(Normal(self.generative(z) + self.inference.bias[:X], 1.0), 1)

    class CachedFeatures(Toy):
        def posterior(self, x):
            self.features = self.inference(x)[:, :X]
            return super().posterior(x)

        def likelihood(self, z):
            return Independent(Normal(self.generative(z) + self.features, 1.0), 1)

    refused(PosteriorOfTheta(Prior()), r"posterior\(x\) depends on the generative.*prior_mean", method=method)
    refused(DensityOfTheta(WithLayer(), z_shape=(4,)), r"posterior\(x\) depends on.*layer.weight", method=method)
    refused(LikelihoodOfPhi(mlp()), r"likelihood\(z\) depends on the inference.*bias", method=method)
    refused(CachedFeatures(mlp()), r"likelihood\(z\) depends on the inference.*weight, bias", method=method)


def test_log_probs_of_another_shape():
    class NoEvent(Toy):
        def likelihood(self, z):
            return Normal(self.generative(z), 1.0)

    class Summed(Toy):
        def prior(self):
            return Independent(Normal(torch.zeros(B, Z), 1.0), 2)

    refused(NoEvent(mlp()), r"likelihood\(z\).log_prob\(x\) must have shape .* = \(8, 5\).*Got \(8, 5, 4\)")
    refused(Summed(mlp()), r"prior\(\).log_prob\(z\) must have shape.*Got \(8,\)")


def test_what_is_no_model():
    x = torch.zeros(B, X)
    refused(object(), "network must be a torch.nn.Module. Got object", TypeError, x=x)
    refused(nn.Linear(2, 2), "Linear lacks inference, generative, prior, posterior, likelihood", TypeError, x=x)


def test_sides_are_checked_before_anything_is_drawn():
    model = Toy(mlp())
    for theta, phi, message in (
        (Side("iwae", 3), Side("iwae", 2), r"theta.particles must divide samples \(8\): one of 1, 2, 4, 8. Got 3"),
        (Side("iwae", 8), Side("iwae", 16), r"phi.particles must divide samples \(8\): one of 1, 2, 4, 8. Got 16"),
        (Side("dreg", 8), Side("iwae", 2), "theta: estimator 'dreg' is for the other side"),
        (Side("iwae", 8), Side("ciwae", 2), "phi: estimator 'ciwae' needs the option 'beta'"),
    ):
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=message):
            iw_loss(model, model.batch(), samples=S, theta=theta, phi=phi)
        assert torch.equal(state, torch.get_rng_state())
