"""Samples in slices: gradients of the very same samples at once, in the memory of a slice."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from lightning_iwae import Side, bounds, iw_loss, routing, slices
from lightning_iwae.estimators import PHI, THETA
from lightning_iwae.memory import Peak
from lightning_iwae.models import MLP
from lightning_iwae.randomness import noted, repeated

from . import test_channels as channels
from . import test_networks as networks
from . import test_routing as zoo

S, B = 12, 4
CHUNKS = [1, 5, 6, 11]  # groups of 4 and 12 straddle them, and 5 and 11 leave a shorter slice
every_chunk = pytest.mark.parametrize("chunk", CHUNKS)
MIXED = Side("iwae", S), Side("dreg", 4)


@pytest.fixture(autouse=True)
def double_precision_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


class Joined(Distribution):
    """q whose samples are those of slices, joined."""

    def __init__(self, q, chunk):
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)
        self.q, self.chunk = q, chunk

    def sizes(self, samples):
        return [(min(self.chunk, samples - start),) for start in range(0, samples, self.chunk)]

    def rsample(self, shape):
        return torch.cat([self.q.rsample(size) for size in self.sizes(shape[0])])

    def sample(self, shape):
        return torch.cat([self.q.sample(size) for size in self.sizes(shape[0])])

    def log_prob(self, z):
        return self.q.log_prob(z)


def joined(model, x, chunk, y=None, seed=1, **options):
    """The samples that slices would have, drawn at once."""
    torch.manual_seed(seed)
    q = model.posterior(x) if y is None else model.posterior(x, y)
    return routing.draw(model, x, S, q=Joined(q, chunk), y=y, **options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def at_once(model, x, chunk, theta, phi, **options):
    return gradients(model, routing.loss(joined(model, x, chunk, **options), theta, phi))


def in_slices(model, x, chunk, theta, phi, seed=1, **options):
    torch.manual_seed(seed)
    return gradients(model, iw_loss(model, x, samples=S, theta=theta, phi=phi, chunk=chunk, **options))


# --- gradients --------------------------------------------------------------------------------------------------
@every_chunk
@pytest.mark.parametrize("particles", [4, S])
def test_every_estimator(chunk, particles):
    model, x = channels.LearntPrior(), channels.batch()
    pairs = [(Side("iwae", S), channels.side(PHI, name, particles)) for name in PHI if name != "sleep"]
    pairs += [(channels.side(THETA, name, particles), Side("iwae", S)) for name in THETA]
    for theta, phi in pairs:
        expected = at_once(model, x, chunk, theta, phi)
        zoo.assert_equal(in_slices(model, x, chunk, theta, phi), expected, what=f"{theta}, {phi}: ")


@every_chunk
@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize(
    "make",
    [zoo.mlp, zoo.Images, zoo.Scaled, zoo.Tied, zoo.Checkpointed, zoo.Permuted, zoo.Recurrent, zoo.half_frozen],
    ids=lambda make: make.__name__,
)
def test_every_kind_of_decoder(make, method, chunk):
    model = zoo.zoo_model(make)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*can't be weighed.*")
        for seed in range(3):  # the third relies on proofs
            expected = at_once(model, model.batch(), chunk, *MIXED, seed=seed, method=method)
            zoo.assert_equal(in_slices(model, model.batch(), chunk, *MIXED, seed=seed, method=method), expected)


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(("kind", "settings", "theta", "phi"), [
    ("two", {}, Side("gdreg", S), Side("dreg", 4)),
    ("two", {"likelihood": "gaussian"}, Side("iwae", 4), Side("stl", S)),
    ("discrete", {}, Side("iwae", S), Side("vimco", 4)),
    ("conv", {"posterior": "full", "prior": "mixture"}, *MIXED),
    ("mlp", {"posterior": "flow"}, *MIXED),
    ("mlp", {"prior": "vamp", "likelihood": "discretised-logistic"}, *MIXED),
], ids=str)  # fmt: skip
def test_every_kind_of_network(kind, settings, theta, phi, chunk):
    model, x = networks.moved(networks.small(kind, **settings)), networks.data()
    zoo.assert_equal(in_slices(model, x, chunk, theta, phi), at_once(model, x, chunk, theta, phi))


@pytest.mark.parametrize("chunk", [3, 5])
def test_sleep_s_dreams(chunk):
    model, x = channels.LearntPrior(), channels.batch()
    sides = Side("iwae", S), Side("sleep", 4)  # three dreams a datum, as many as fit a chunk
    zoo.assert_equal(in_slices(model, x, chunk, *sides), at_once(model, x, chunk, *sides))


def test_dreams_in_slices_too():
    """With q(z | x) constant in x the gradient depends on the dreamt z alone, which are (M, B, Z) noise in order."""
    model, x = channels.LearntPrior(), channels.batch()
    model.inference[0].weight.data.zero_()
    sides, dreamt = (Side("iwae", S), Side("sleep", 1)), []
    model.generative["net"].register_forward_pre_hook(lambda _, args: dreamt.append(args[0]))
    _, found = in_slices(model, x, 5, *sides)
    z = torch.cat(dreamt[-3:])
    assert z.shape[:2] == (S, B)
    bias = model.inference.last.bias
    (expected,) = torch.autograd.grad(-model.posterior(x).log_prob(z).mean(), bias)
    assert len(found) == len(list(model.parameters()))
    torch.testing.assert_close(bias.grad, expected, rtol=1e-10, atol=1e-12)


@every_chunk
def test_a_kl_weight(chunk):
    model, x = channels.LearntPrior(), channels.batch()
    sides = Side("ciwae", 4, beta=0.3), Side("iwae", S)
    expected = at_once(model, x, chunk, *sides, kl_weight=0.3)
    zoo.assert_equal(in_slices(model, x, chunk, *sides, kl_weight=0.3), expected)


class Conditional(nn.Module):
    """Two labels; all three distributions depend on them."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = nn.Linear(channels.X + 1, 2), nn.Linear(3, channels.X)

    def prior(self, y):
        return Independent(Normal(y[:, None].double().expand(-1, 2), 1.0), 1)

    def posterior(self, x, y):
        return Independent(Normal(self.inference(torch.cat([x, y[:, None]], -1)), 0.5), 1)

    def likelihood(self, z, y):
        h = torch.cat([z, y[:, None].expand(*z.shape[:-1], 1)], -1)
        return Independent(Bernoulli(logits=self.generative(h)), 1)


def test_labels():
    model, x, y = Conditional(), channels.batch(), torch.tensor([0, 1, 1, 0])
    zoo.assert_equal(in_slices(model, x, 5, *MIXED, y=y), at_once(model, x, 5, *MIXED, y=y))


def test_phi_gradients_of_several_estimators():
    model, x = channels.LearntPrior(), channels.batch()
    sides = [channels.side(PHI, name) for name in ("iwae", "dreg", "vimco", "rws-dreg", "sleep")]
    parameters = list(model.inference.parameters())
    expected = routing.phi_gradients(joined(model, x, 5), sides, parameters)
    torch.manual_seed(1)
    found = slices.phi_gradients(slices.draw(model, x, S, chunk=5), sides, parameters)
    for one, other in zip(found, expected, strict=True):
        for g, h in zip(one, other, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


def test_weights_of_each_slice_alone_would_be_found_out():
    model, x = channels.LearntPrior(), channels.batch()
    _, expected = at_once(model, x, 6, *MIXED)
    torch.manual_seed(1)
    drawn = slices.draw(model, x, S, chunk=6)
    whole, narrow = Side("iwae", 6), Side("dreg", 6)
    parts = [routing.loss(drawn.again(i), whole, narrow) for i in range(len(drawn))]
    _, wrong = gradients(model, torch.stack(parts).mean())
    assert all((wrong[name] - g).norm() > 1e-3 * g.norm() for name, g in expected.items())


@pytest.mark.parametrize("chunk", [None, S, S + 1])
def test_a_chunk_of_all_samples_is_none(chunk):
    model, x = channels.LearntPrior(), channels.batch()
    assert isinstance(slices.draw(model, x, S, chunk=chunk), routing.Draw)
    zoo.assert_equal(in_slices(model, x, chunk, *MIXED), at_once(model, x, S, *MIXED), tolerance=0)


@pytest.mark.parametrize("frozen", [["inference"], ["generative"], ["inference", "generative"]], ids=str)
def test_frozen_networks(frozen):
    model, x = zoo.Toy(zoo.mlp()), zoo.Toy(zoo.mlp()).batch()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    if len(frozen) == 2:
        assert not iw_loss(model, x, samples=S, theta=MIXED[0], phi=MIXED[1], chunk=5).requires_grad
    else:
        expected = at_once(model, x, 5, *MIXED)
        assert expected[1] and all(name.split(".")[0] not in frozen for name in expected[1])
        zoo.assert_equal(in_slices(model, x, 5, *MIXED), expected)


def test_several_losses_on_one_draw():
    model, x = channels.LearntPrior(), channels.batch()
    torch.manual_seed(1)
    drawn = slices.draw(model, x, S, chunk=5)
    for phi in ("stl", "iwae", "dreg"):
        found = gradients(model, slices.loss(drawn, Side("iwae", S), Side(phi, 4)))
        zoo.assert_equal(found, at_once(model, x, 5, Side("iwae", S), Side(phi, 4)))


def test_the_loss_scales_adds_up_and_fills_gradients_in_its_backward_alone():
    model, x = channels.LearntPrior(), channels.batch()
    _, expected = in_slices(model, x, 5, *MIXED)
    model.zero_grad()
    torch.manual_seed(1)
    loss = iw_loss(model, x, samples=S, theta=MIXED[0], phi=MIXED[1], chunk=5)
    assert all(p.grad is None for p in model.parameters())
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3 * expected[name], rtol=1e-12, atol=0)


def test_hooks_of_parameters_see_the_gradient_once():
    model, seen = zoo.Toy(zoo.Scaled()), {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: seen.setdefault(name, []).append(g))
    _, found = in_slices(model, model.batch(), 5, *MIXED)
    assert seen.keys() == found.keys()
    assert all(len(g) == 1 and torch.equal(g[0], found[name]) for name, g in seen.items())


def test_autocast_to_bfloat16():
    model, x = MLP(channels.X, 3, [6]).float(), channels.batch().float()
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            expected = at_once(model, x, 5, *MIXED, seed=seed)
            found = in_slices(model, x, 5, *MIXED, seed=seed)
        zoo.assert_equal(found, expected, 0.03)


# --- randomness -------------------------------------------------------------------------------------------------
class Dropout(zoo.Toy):
    def __init__(self, encoder=0.0, decoder=0.0):
        super().__init__(nn.Sequential(nn.Linear(zoo.Z, 6), nn.Tanh(), nn.Dropout(decoder), nn.Linear(6, zoo.X)))
        self.inference = nn.Sequential(nn.Linear(zoo.X, 20), nn.Dropout(encoder), nn.Linear(20, 2 * zoo.Z))


def test_the_encoder_runs_once():
    model, calls = Dropout(encoder=0.5), []
    model.inference.register_forward_hook(lambda *_: calls.append(1))
    found = in_slices(model, model.batch(), 5, *MIXED)
    assert len(calls) == 1
    zoo.assert_equal(found, at_once(model, model.batch(), 5, *MIXED))


def test_a_decoder_s_dropout_repeats_itself():
    model, (theta, phi) = Dropout(decoder=0.5), (Side("iwae", S), Side("wake", 4))
    torch.manual_seed(1)
    drawn = slices.draw(model, model.batch(), S, "separate", chunk=5)  # whose layers are plain ones
    parts = [drawn.again(i) for i in range(len(drawn))]
    log_p, log_q = (torch.cat([getattr(part, name) for part in parts]) for name in ("log_p", "log_q"))
    assert torch.equal((log_p - log_q).detach(), drawn.log_w)
    (_, s), a = phi.phi(drawn.log_w), theta.theta(drawn.log_w)
    surrogate = (a * log_p).sum() + (s * log_q).sum()
    ascent = torch.autograd.grad(surrogate / zoo.B, list(model.parameters()))
    value = -bounds.miwae(theta.view(drawn.log_w)).mean()
    expected = value, {name: -g for (name, _), g in zip(model.named_parameters(), ascent, strict=True)}
    zoo.assert_equal(in_slices(model, model.batch(), 5, theta, phi), expected)


def test_random_states_after_it_are_those_after_drawing_once():
    model, x = channels.LearntPrior(), channels.batch()
    joined(model, x, 5)
    expected = torch.get_rng_state()
    in_slices(model, x, 5, *MIXED)
    assert torch.equal(torch.get_rng_state(), expected)


def test_noted_streams_are_repeated():
    device = torch.device("cpu")
    states = noted(device)
    first, after = torch.rand(3), noted(device)
    with repeated(states, device):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after[0])


class Stateful(zoo.Decoder):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def middle(self, h):
        self.calls += 1
        return (h * (1 + 0.01 * self.calls)).tanh()


def spectral():
    decoder = zoo.Decoder()
    nn.utils.parametrizations.spectral_norm(decoder.first)
    decoder.first.parametrizations.weight.original.data.normal_()  # an optimiser's step away from where it settled
    return decoder


@pytest.mark.parametrize("make", [Stateful, spectral])
def test_a_network_that_does_not_repeat_itself_is_refused(make):
    model = zoo.Toy(make())
    with pytest.raises(ValueError, match=r"chunk must be null for this network.* in \d of 3 slices"):
        in_slices(model, model.batch(), 5, *MIXED)


# --- what is refused --------------------------------------------------------------------------------------------
class Untouched(zoo.Toy):
    def posterior(self, x):
        raise AssertionError("work has begun")


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_of_no_samples_is_refused_before_any_work(chunk):
    model = Untouched(zoo.mlp())
    with pytest.raises(ValueError, match=f"chunk must be at least 1, or null .*Got {chunk}"):
        in_slices(model, model.batch(), chunk, *MIXED)


def test_what_is_refused_at_once_is_refused_in_slices():
    with pytest.raises(ValueError, match="needs a reparameterised posterior"):
        in_slices(channels.Discrete(channels.X, channels.Z, [6]), channels.batch(), 5, *MIXED)
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        in_slices(zoo.Toy(zoo.BatchNormed()), zoo.Toy(zoo.mlp()).batch(), 5, *MIXED)
    with pytest.raises(ValueError, match="depends on other samples"):
        in_slices(zoo.Toy(zoo.Crowd()), zoo.Toy(zoo.mlp()).batch(), 5, *MIXED)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        slices.draw(object(), zoo.Toy(zoo.mlp()).batch(), S, chunk=5)


# --- memory -----------------------------------------------------------------------------------------------------
def test_peak_counts_what_is_alive():
    p, x = torch.zeros(1000, requires_grad=True), torch.zeros(1000)
    with Peak() as peak:
        y = (p * x).exp()  # the product goes, its exponential stays for the way back
        z = y.view(10, 100)[1:].sum()
        assert (peak.now, peak.bytes) == (8008, 16000)
        z.backward()
        assert peak.bytes > 2 * 8000
        del y, z
        assert peak.now == 8000  # p's gradient
        p.grad = None
        assert peak.now == 0


def peak_of(model, x, samples, chunk):
    with Peak() as peak:
        iw_loss(model, x, samples=samples, theta=Side("iwae", samples), phi=Side("dreg", samples), chunk=chunk)
    return peak.bytes


def test_memory_does_not_grow_with_samples():
    model, x = MLP(784, 5, [100]), torch.rand(2, 784)
    few, many, whole = (peak_of(model, x, K, chunk) for K, chunk in ((64, None), (4096, 64), (4096, None)))
    assert many < 1.5 * few
    assert whole > 20 * few


@pytest.mark.parametrize("mib", [0.1, 0.5, 3, 10])
@pytest.mark.parametrize("kind", ["mlp", "conv", "two", "discrete"])
def test_the_chunk_that_fits(kind, mib):
    model, x = networks.small(kind), networks.data()
    before, states = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chunk, taken = slices.fitting(model, x, 1000, memory=mib * 2**20)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert chunk & (chunk - 1) == 0 or chunk == 1000
    phi = "vimco" if kind == "discrete" else "dreg"
    with Peak() as peak:
        slices.loss(slices.draw(model, x, 1000, chunk=chunk), Side("iwae", 1000), Side(phi, 1000))
    extra = sum(p.nbytes for p in model.parameters()) + 40 * 1000 * len(x) * 8  # gradients; weights of all samples
    extra += -(-1000 // chunk) * len(states)
    assert peak.bytes - extra <= taken <= mib * 2**20 or chunk == 1
    assert chunk == 1000 or 2.5 * taken > mib * 2**20


def test_the_chunk_that_fits_is_at_least_one_and_at_most_all():
    model, x = networks.small("mlp"), networks.data()
    chunk, taken = slices.fitting(model, x, 48, memory=1)
    assert chunk == 1 and taken > 1
    assert slices.fitting(model, x, 48, memory=2**40)[0] == 48


RSS = """
import resource, sys, torch
from lightning_iwae import Side, iw_loss
from lightning_iwae.models import MLP

torch.set_num_threads(1)
model, x = MLP(), torch.rand(20, 784).round()

def peak(samples, chunk):
    sides = {"theta": Side("iwae", samples), "phi": Side("dreg", samples)}
    for _ in range(2):
        iw_loss(model, x, samples=samples, **sides, chunk=chunk).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

peak(1, None)
print(peak(2, 1), peak(64, None), peak(4096, 64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is the system's own")
def test_a_process_trains_4096_samples_in_the_memory_of_64():
    out = subprocess.run([sys.executable, "-c", RSS], capture_output=True, text=True, timeout=600, check=True).stdout
    idle, few, many = map(int, out.split())
    assert many - idle <= 1.5 * (few - idle), out
