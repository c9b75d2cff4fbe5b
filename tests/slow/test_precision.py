"""Training by bf16-mixed ends where that of float32 ends, within the spread of seeds."""

import statistics

import pytest
import torch

from lightning_iwae.evaluation import importance_sample
from lightning_iwae.models import MLP

from ..test_module import digits, fit, iw_module

pytestmark = pytest.mark.slow
SEEDS = range(4)


def validation_bound(seed, precision, epochs):
    """L_64 of the validation data after a fit, in float32."""
    torch.manual_seed(seed)
    data = digits(limit_train=None, batch_size=100, validation=300)
    module = iw_module(MLP(64, 10, [64, 64]), samples=16, seed=seed)
    fit(module, data, max_epochs=epochs, precision=precision)
    torch.manual_seed(0)
    x = torch.cat(list(data.val_dataloader()))
    return importance_sample(module.network.float(), x, 64).log_px.mean().item()


def test_bf16_ends_at_float32s_validation_bound_and_half_a_fit_does_not():
    full = [validation_bound(seed, "32-true", 12) for seed in SEEDS]
    spread = statistics.stdev(full)
    mixed = [validation_bound(seed, "bf16-mixed", 12) for seed in SEEDS]
    half = [validation_bound(seed, "32-true", 6) for seed in SEEDS]
    assert 0 < abs(statistics.mean(mixed) - statistics.mean(full)) < spread
    assert abs(statistics.mean(half) - statistics.mean(full)) > spread
