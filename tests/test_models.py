"""The papers' network: its size, its start, and its Bernoulli against torch's own."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent

from lightning_iwae.models import MLP, LinearGaussian
from lightning_iwae.models.bernoulli import BernoulliPixels


def test_the_papers_network_has_425284_parameters():
    assert sum(p.numel() for p in MLP(784, 50, [200, 200]).parameters()) == 425_284


def test_weights_start_glorot_uniform_and_biases_at_0():
    torch.manual_seed(0)
    for layer in (m for m in MLP().modules() if isinstance(m, torch.nn.Linear)):
        limit = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * limit < layer.weight.abs().max() <= limit
        z = (layer.weight.square().mean() / (limit**2 / 3) - 1) / math.sqrt(0.8 / layer.weight.numel())
        assert abs(z) < 4.5  # the variance of a uniform's square is 4/45 of limit^4
        assert not layer.bias.any()


def test_the_output_bias_is_the_log_odds_of_the_data():
    model = MLP(3, 2, [4])
    model.set_data_mean(torch.tensor([0.0, 0.25, 1.0]))
    expected = torch.tensor([-math.log(999), -math.log(3), math.log(999)])
    torch.testing.assert_close(model.generative.last.bias.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"network.pixels is 3, but data have shape \(4,\)"):
        model.set_data_mean(torch.zeros(4))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_bernoulli_pixels_are_torchs_bernoulli(scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(5, 4, 7, dtype=torch.float64)).requires_grad_()
    x = torch.rand(4, 7, dtype=torch.float64).requires_grad_()  # anywhere in [0, 1]
    reference = Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)
    seed = torch.randn(5, 4, dtype=torch.float64)
    ours, theirs = BernoulliPixels(logits).log_prob(x), reference.log_prob(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, its in zip(
        torch.autograd.grad(ours, (logits, x), seed), torch.autograd.grad(theirs, (logits, x), seed), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", [MLP(pixels=20, latent=3, hidden=[5]), LinearGaussian(20)], ids=["mlp", "gaussian"])
def test_log_weights_keep_their_precision_under_autocast(model):
    x = torch.bernoulli(torch.rand(4, 20))
    with torch.autocast("cpu", torch.bfloat16):
        q = model.posterior(x)
        z = q.rsample((2,))
        log_probs = [q.log_prob(z), model.prior().log_prob(z), model.likelihood(z).log_prob(x)]
    assert {v.dtype for v in log_probs} == {torch.float32}
