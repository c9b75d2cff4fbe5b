"""log p(x) by importance sampling at 5000 particles, against pythae's get_nll on the same weights.

Every round estimates log p(x) of the same images anew, so that the rounds give each way's standard error too.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_iwae.evaluation import cached, drawn_at_once, importance_sample
from lightning_iwae.models import MLP
from lightning_iwae.models.likelihoods import compile_likelihoods

from . import peers, ways
from .by_hand import log_px
from .plan import Plan
from .products import Limit, of_decoding
from .timing import Step, made, measure

OURS = "importance_sample"
COMPILED = "importance_sample, compiled"
BY_HAND = "by hand"
PYTHAE = "pythae get_nll"
PYTHAE_WHOLE = "pythae get_nll, one batch"
EACH = "matrix products alone"
BEST = "matrix products at the best rate"


def run(plan: Plan) -> dict:
    """Times of all images, and estimates of their mean log p(x)."""
    K, digits = plan.log_px_particles, enlarged_digits()
    model, x = pretrained(digits[plan.images :], plan.pretraining), digits[: plan.images]
    values: dict[str, list[float]] = {}
    steps, skipped = made(
        {
            OURS: partial(ours, model, x, K, values.setdefault(OURS, [])),
            COMPILED: partial(compiled, model, x, K, values.setdefault(COMPILED, [])),
            BY_HAND: partial(by_hand, model, x, K, values.setdefault(BY_HAND, [])),
            PYTHAE: partial(pythae, model, x, K, 100, values.setdefault(PYTHAE, [])),
            PYTHAE_WHOLE: partial(pythae, model, x, K, K, values.setdefault(PYTHAE_WHOLE, [])),
        }
    )
    held = drawn_at_once(x)
    limit = Limit(of_decoding(held * len(x)))
    times = measure(steps | {EACH: limit.each, BEST: limit.best}, plan.seconds, plan.rounds)
    times[EACH] = [K / held * seconds for seconds in times[EACH]]
    times[BEST] = [K / held * limit.scale * seconds for seconds in times[BEST]]
    return {
        "images": len(x),
        "particles": K,
        "flop": limit.flop * K / held,
        "times": times,
        "values": {name: found for name, found in values.items() if found},
        "skipped": skipped,
    }


def ours(model: MLP, x: Tensor, particles: int, values: list[float]) -> Step:
    """As `test` does it."""
    return lambda: values.append(importance_sample(model, x, particles).log_px.mean().item())


def by_hand(model: MLP, x: Tensor, particles: int, values: list[float]) -> Step:
    """In the slices that importance_sample takes."""
    held = drawn_at_once(x)
    slices = math.ceil(held * x.numel() / cached(x.device))
    return lambda: values.append(log_px(model, x, particles, held, slices).mean().item())


def compiled(model: MLP, x: Tensor, particles: int, values: list[float]) -> Step:
    """The same with `compile: true`."""
    own = copy.deepcopy(model)
    with ways.told_if_not_compiled():
        compile_likelihoods(own)
        importance_sample(own, x, 64)
    return ours(own, x, particles, values)


def pythae(model: MLP, x: Tensor, particles: int, batch_size: int, values: list[float]) -> Step:
    """get_nll gives the mean over images of +log p(x), whatever its name says. Its own batch_size is 100."""
    theirs = peers.pythae_model(model, samples=1, groups=1).eval()

    @torch.no_grad()
    def step() -> None:
        values.append(float(theirs.get_nll(x, n_samples=particles, batch_size=batch_size)))

    return step


def enlarged_digits() -> Tensor:
    """scikit-learn's 1797 digits, 28 x 28 by interpolation, zeros and ones, in an order of their own (1797, 784)."""
    small = torch.from_numpy(load_digits().images).float()[:, None] / 16
    pixels = F.interpolate(small, (28, 28), mode="bilinear").flatten(1) > 0.5
    return pixels.float()[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def pretrained(data: Tensor, steps: int) -> MLP:
    """The papers' network after so many steps at batch 100 and 8 samples."""
    torch.manual_seed(0)
    model, work = MLP(), ways.Work(100, 8)
    model.set_data_mean(data.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        ways.piwae_loss(model, data[torch.randint(len(data), (work.batch,))], work).backward()
        optimizer.step()
    return model
