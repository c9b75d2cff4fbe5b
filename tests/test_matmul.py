"""The products of linear layers by oneDNN: as exact as torch's own, and taken only where they are meant to be."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_iwae import Side, iw_loss, matmul
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.matmul import Fast, by_torch, linear, parameter_gradients
from lightning_iwae.memory import Peak
from lightning_iwae.models import MLP
from lightning_iwae.models.layers import Layers, is_tanh_mlp, tanh_layers
from lightning_iwae.weighing import Weighing

N, IN, OUT = 512, 60, 90
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what oneDNN is given, on any processor and at any size."""
    made, layer, product = [], matmul._layer, matmul._product

    def noted_layer(h, weight, *others):
        made.append((tuple(h.shape), tuple(weight.shape)))
        return layer(h, weight, *others)

    def noted_product(left, right):
        before = len(made)
        out = product(left, right)
        made[before:] = [(tuple(left.shape), tuple(right.T.shape))]  # one, if by way of a layer too
        return out

    monkeypatch.setattr(matmul, "mkl_lags", lambda: True)
    monkeypatch.setattr(matmul, "LEAST", 1)
    monkeypatch.setattr(matmul, "ROWS", 1)
    monkeypatch.setattr(matmul, "_layer", noted_layer)
    monkeypatch.setattr(matmul, "_product", noted_product)
    return made


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    h, weight, *others = (torch.randn(*s, dtype=dtype) for s in ((N, IN), (OUT, IN), (OUT,), (N, OUT), (N, 1)))
    return [h, weight / IN**0.5, *others]


def layers(tanh=True):
    return Layers(nn.Linear(IN, OUT), *([nn.Tanh(), nn.Linear(OUT, OUT)] if tanh else []))


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


# ------------------------------------------------------------------------------------------------ they are exact
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "three axes", "strided", "transposed weight"])
def test_a_layers_output_is_torchs_in_float32(calls, layout, bias, tanh):
    h, weight, b, *_ = tensors()
    b = b if bias else None
    if layout == "three axes":
        h = h.view(8, -1, IN)
    elif layout == "strided":
        h = torch.randn(N, 2 * IN)[:, ::2]
    elif layout == "transposed weight":
        weight = weight.T.contiguous().T
    found = linear(h, weight, b, tanh)
    exact = F.linear(h.double(), weight.double(), None if b is None else b.double())
    exact = exact.tanh() if tanh else exact
    assert calls and found.shape == exact.shape and found.dtype == torch.float32
    assert error(found, exact) < 1e-6


def test_tanh_keeps_its_digits_near_zero_and_far_from_it(calls):
    """Beside it what a float32 less precise by two bits would give."""
    for x in (torch.logspace(-10, 1, 100_001), -torch.logspace(-10, 1, 100_001)):
        found, exact = linear(x[:, None], torch.ones(1, 1), None, tanh=True)[:, 0], x.double().tanh()
        assert ((found.double() - exact) / exact).abs().max() < 2**-23
    by_exponential = 1 - 2 / ((2 * x).exp() + 1)
    assert ((by_exponential.double() - exact) / exact).abs().max() > 2**-23
    assert calls


@pytest.mark.skipif(not matmul.has_bf16(), reason="no products of bfloat16 by oneDNN here")
@pytest.mark.parametrize("tanh", [True, False])
def test_under_autocast_a_layer_is_rounded_to_bfloat16_once(calls, tanh):
    h, weight, b, *_ = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(h, weight, b, tanh)
    h, weight, b = (t.bfloat16().double() for t in (h, weight, b))
    exact = F.linear(h, weight, b)
    exact = exact.tanh() if tanh else exact
    assert calls and found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weigh", [True, False])
def test_parameters_gradients_are_autograds_of_the_weighed_sum(calls, monkeypatch, weigh, full):
    if not full:
        monkeypatch.setattr(matmul, "lower_is_full", lambda: False)
    h, weight, b, delta, a = tensors()
    seed = delta * a if weigh else delta
    weight, b = (t.double().requires_grad_() for t in (weight, b))
    exact = torch.autograd.grad(F.linear(h.double(), weight, b), (weight, b), seed.double())
    found = parameter_gradients(delta, h, a if weigh else None)
    assert calls == [((IN + 1, N), (OUT, N))]
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs) < 2e-6


@pytest.mark.skipif(not matmul.has_bf16(), reason="no products of bfloat16 by oneDNN here")
@pytest.mark.parametrize("weigh", [True, False])
def test_parameters_gradients_of_bfloat16_are_summed_in_float32(calls, weigh):
    """What is rounded: a factor weighed and, once, the sum; beside it what sums in bfloat16 give."""
    h, _, _, delta, a = tensors(torch.bfloat16)
    a = a if weigh else torch.ones_like(a)
    exact = delta.double().T @ (h * a).double(), (delta.double() * a).sum(0)
    found = parameter_gradients(delta, h, a if weigh else None)
    assert calls == [((IN + 1, N), (OUT, N))]
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-4)
    in_turn = delta.new_zeros(OUT)
    for row in delta * a:
        in_turn = in_turn + row
    assert error(in_turn, exact[1]) > 2**-8


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="older torch has no setting of oneDNN alone")
def test_leave_to_round_is_found_out_where_it_is_used_and_is_taken_back(monkeypatch):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), matmul.lower():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    monkeypatch.setattr(matmul, "lower", nullcontext)
    assert matmul.lower_is_full.__wrapped__()
    monkeypatch.setattr(matmul, "lower", lambda: torch.autocast("cpu", torch.bfloat16))
    assert not matmul.lower_is_full.__wrapped__()


def test_numbers_of_16_bits_inside_would_be_found(calls):
    """What oneDNN does to float32 where it may: on some processors at float32_matmul_precision "medium"."""
    h, weight, b, *_ = tensors()
    rounded = linear(h.bfloat16().float(), weight.bfloat16().float(), b)
    assert error(rounded, F.linear(h.double(), weight.double(), b.double())) > 1e-4


# ------------------------------------------------------------------------------------------------ where they are taken
def test_a_step_and_log_px_are_the_same_by_either_library(calls, monkeypatch):
    found = {}
    for onednn in (True, False):
        torch.manual_seed(0)
        model, x = MLP(64, 5, [20, 20]), torch.bernoulli(torch.rand(6, 8, 64))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
        for step in range(50):
            optimizer.zero_grad()
            for chunk in (None, 4):  # the second's gradients are added to the first's
                sides = {"theta": Side("iwae", 8), "phi": Side("iwae", 4)}
                iw_loss(model, x[step % 6], samples=8, chunk=chunk, **sides).backward()
            optimizer.step()
        before = len(calls)
        log_px = importance_sample(model, x[0], 16).log_px.float()
        assert (len(calls) > before) == onednn
        found[onednn] = torch.cat([log_px, *(p.detach().flatten() for p in model.parameters())])
    assert 0 < (found[True] - found[False]).norm() < 1e-5 * found[False].norm()


def test_other_products_stay_torchs(calls, monkeypatch):
    h, weight, b, delta, a = tensors()
    with by_torch():
        torch.testing.assert_close(linear(h, weight, b), F.linear(h, weight, b), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(h, weight, b).dtype == torch.bfloat16
            assert linear(*(t.double() for t in (h, weight, b))).dtype == torch.float64
        for dtype in (torch.float32, torch.bfloat16):
            parameter_gradients(*(t.to(dtype) for t in (delta, h, a)))
    linear(*(t.double() for t in (h, weight, b)))
    parameter_gradients(*(t.double() for t in (delta, h, a)))
    linear(*(t.to("meta") for t in (h, weight, b)))
    monkeypatch.setattr(matmul, "LEAST", N * IN * OUT + 1)
    linear(h, weight, b)
    parameter_gradients(delta, h, a)
    monkeypatch.setattr(matmul, "LEAST", N * IN * OUT)
    monkeypatch.setattr(matmul, "ROWS", N + 1)
    linear(h, weight, b)
    linear(h.view(8, -1, IN), weight, b)
    parameter_gradients(delta, h, a)
    monkeypatch.setattr(matmul, "ROWS", N)
    assert not calls
    linear(h, weight, b)
    assert len(calls) == 1


@pytest.mark.parametrize("tanh", [False, True])
def test_fast_is_for_what_leaves_no_graph(calls, tanh):
    layer, h = layers(tanh), tensors()[0].requires_grad_()
    expected = layer(h).detach()
    with Fast():
        assert layer(h).requires_grad and not calls
        assert torch.func.vmap(layer)(h.detach()).shape == (N, OUT) and not calls
        with torch.no_grad():
            torch.func.vmap(layer)(h)
            assert not calls
            torch.testing.assert_close(layer(h), expected)
    assert calls == [((N, IN), (OUT, IN)), ((N, OUT), (OUT, OUT))][: 1 + tanh]


@pytest.mark.parametrize("tanh", [False, True])
def test_weighed_layers_go_by_it_forward_and_back(calls, tanh):
    layer, h = layers(tanh), tensors()[0].requires_grad_()
    with Weighing(layer.parameters(), (8, N // 8)) as mode:
        out = layer(h)
    a = torch.rand(8, N // 8)
    with mode.backward(layer.parameters(), a):
        found = torch.autograd.grad(out.sum(), [h, *layer.parameters()])
    layer.double()
    exact = torch.autograd.grad(layer(h.double()).sum(), h, retain_graph=True)
    exact += torch.autograd.grad(layer(h.double()), list(layer.parameters()), a.double().view(N, 1).expand(N, OUT))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs.double()) < 2e-6
    first = [((N, IN), (OUT, IN))], [((IN + 1, N), (OUT, N)), ((N, OUT), (IN, OUT))]
    last = [((N, OUT), (OUT, OUT))], [((OUT + 1, N), (OUT, N)), ((N, OUT), (OUT, OUT))]
    assert calls == (first[0] + last[0] + last[1] + first[1] if tanh else first[0] + first[1])


@pytest.mark.parametrize(
    ("capability", "vendor", "lags"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", None, False),
    ],
)
def test_the_rule(monkeypatch, tmp_path, capability, vendor, lags):
    info = tmp_path / "cpuinfo"
    if vendor:
        info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: some\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(matmul, "CPU", info)
    assert matmul.mkl_lags.__wrapped__() is lags


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "bias",
    [torch.randn(2 * OUT)[::2], torch.randn(1).expand(OUT), torch.randn(()), torch.randn(1), torch.randn(1, OUT)],
    ids=["strided", "expanded", "a number", "one", "a row"],
)
def test_any_bias_that_torch_takes_is_right(calls, bias, dtype):
    h, weight, *_ = (t.to(dtype) for t in tensors())
    bias = bias.to(dtype)
    torch.testing.assert_close(linear(h, weight, bias), F.linear(h, weight, bias), rtol=2**-7, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward_ad's own
def test_what_is_no_layer_is_left_to_torch(calls):
    h, weight, *_ = tensors()
    torch.testing.assert_close(linear(h, weight[0]), F.linear(h, weight[0]))
    torch.testing.assert_close(linear(h, weight.to_sparse()), F.linear(h, weight))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        linear(h, weight[:, 1:])
    assert not calls
    with Fast(), torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, torch.ones_like(h))
        assert torch.autograd.forward_ad.unpack_dual(F.linear(dual, weight)).tangent is not None


def test_layers_with_hooks_and_others_than_torchs_are_called_one_by_one(calls):
    called, model = [], layers()
    assert is_tanh_mlp(model.numbered)
    for layer in model:
        handle = layer.register_forward_hook(lambda *_: called.append(1))
        assert not is_tanh_mlp(model.numbered)
        model(tensors()[0])
        handle.remove()
    assert len(called) == 3 and is_tanh_mlp(model.numbered)
    model[0].forward = lambda h: h
    assert not is_tanh_mlp(model.numbered)
    changed = layers()
    torch.nn.utils.parametrizations.weight_norm(changed[0])
    assert not is_tanh_mlp(changed.numbered) and not is_tanh_mlp(changed.numbered[1:])


def test_a_layer_that_stands_twice_is_called_twice():
    """nn.Module.named_children, for one, names it once."""
    tanh, h = nn.Tanh(), tensors()[0]
    first, second, last = nn.Linear(IN, OUT), nn.Linear(OUT, OUT), nn.Linear(OUT, 1)
    once = Layers(first, tanh, second, tanh, last)
    torch.testing.assert_close(once(h), last(tanh(second(tanh(first(h))))))
    torch.testing.assert_close(Layers(first, second, second)(h), second(second(first(h))))


def test_a_deep_evaluation_keeps_one_layers_output_at_a_time():
    network, h = tanh_layers([IN] * 9), tensors()[0]
    size = 4 * N * IN
    with torch.no_grad(), Fast(), Peak() as peak:
        network(h)
    assert 2 * size <= peak.bytes <= 3 * size
    with torch.no_grad(), Peak() as peak:
        kept = [network[:i](h) for i in range(1, 17, 2)]
    assert len(kept) == 8 and peak.bytes >= 8 * size


def test_layers_are_compiled_whole():
    network, h = layers(), tensors()[0]
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(h), network(h))


@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize("frozen", [None, 0, 2])
def test_chunks_in_bf16_round_alike_both_times(calls, method, frozen):
    """Weights so large that another order of rounding and tanh is told from the first pass."""
    torch.manual_seed(0)
    model, x = MLP(64, 5, [20, 20]), torch.bernoulli(torch.rand(8, 64))
    with torch.no_grad():
        for p in model.generative.parameters():
            p.mul_(6)
    if frozen is not None:
        model.generative[frozen].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        sides = {"theta": Side("iwae", 16), "phi": Side("iwae", 4)}
        iw_loss(model, x, samples=16, chunk=4, method=method, **sides).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
