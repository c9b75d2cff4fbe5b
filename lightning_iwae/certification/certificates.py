"""A certificate for each row of the tables: every check that applies to it, and what it needs and costs."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import routing
from ..estimators import PHI, PRIOR, THETA, find
from ..matmul import by_torch
from ..models import MLP
from ..models.layers import tanh_layers
from ..randomness import forked, seed_for
from ..sides import Side
from .draws import per_draw
from .exact import Enumeration, Quadrature
from .replicates import Slopes, Z, biases, paired, snr_slopes, z_scores
from .targets import CONSISTENT, OF_THE_MODEL, TARGETS, Target, options_of

EXACT = 1e-6  # of a quadrature, relative
PER_DRAW = 1e-10
Z_LIMIT = 4.5
LEAST_SNR = 0.05  # of every coordinate at the points of z-scores
SLOPE = 0.1
REPLICATES = 1_000_000
POINTS = ((1, 1, 2), (2, 2, 3), (4, 1, 5))  # D, M, K
SLOPES_IN_K = dict.fromkeys(("iwae", "vimco", "vimco-arithmetic"), -0.5)
NO_SLOPE = {"jvi", "jvi-dreg", "score", "sleep", "tvo"}  # the theory says nothing, or nothing can be seen


@dataclass
class Certificate:
    """What is known of one row."""

    side: str
    name: str
    options: dict[str, Any]
    estimates: str
    needs: list[str]
    cost: float  # decoder units
    errors: dict[str, float] = field(default_factory=dict)  # of exact checks, relative
    twins: dict[str, float] = field(default_factory=dict)  # the same of the row, 5 % too long
    z: Z | None = None
    bias: float = 0.0  # relative to the gradient of L_K (or of the row's own bound), K = 3
    limits: list[float] = field(default_factory=list)  # relative distances from what it tends to, K = 4, 16, 64
    slopes: Slopes | None = None
    theory: tuple[float | None, float | None] = (None, None)
    papers: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        checks = {k: f"{e:.0e}" for k, e in self.errors.items()} | ({"z": f"{self.z.worst:.1f}"} if self.z else {})
        told = ", ".join(f"{k} {v}" for k, v in checks.items())
        verdict = f"FAILS ({'; '.join(self.problems)})" if self.problems else "certified"
        return f"{self.side:5} {self.name:17} {verdict}: {self.estimates} ({told})"

    @property
    def problems(self) -> list[str]:
        """What does not hold; empty for a row that is certified."""
        limit = {"draw": PER_DRAW}
        found = [f"{k}: {e:.1e}" for k, e in self.errors.items() if not e <= limit.get(k, EXACT)]
        found += [f"{k} does not refuse a bias of 5 %" for k, e in self.twins.items() if e <= limit.get(k, EXACT)]
        if self.z is not None:
            found += [f"z = {self.z.worst:.1f}"] if not self.z.worst <= Z_LIMIT else []
            found += [f"z of the twin = {self.z.twin:.1f}"] if not self.z.twin > Z_LIMIT else []
            found += [f"SNR of a coordinate = {self.z.snr:.3f}"] if not self.z.snr >= LEAST_SNR else []
        if self.limits and not fall_as_one_over_k(self.limits):
            found.append(f"distances from the limit: {self.limits}")
        if self.slopes is not None:
            for axis, slope, known in zip("KM", self.slopes, self.theory, strict=True):
                if known is not None and abs(slope - known) > SLOPE:  # nan: lost in noise, and said so
                    found.append(f"slope in {axis}: {slope:+.2f}")
        if not self.errors and self.z is None:
            found.append("no check applies")
        return found


def fall_as_one_over_k(distances: list[float]) -> bool:
    """Whether distances at K = 4, 16, 64 fall 16-fold, within a factor of 2.5: early ones are not asymptotic."""
    return 16 / 2.5 < distances[0] / distances[-1] < 16 * 2.5


def weights_of(side: str, name: str) -> Callable[..., Any]:
    """The function of a row."""
    return (THETA if side == "theta" else PHI)[name]


def certificates(replicates: int = REPLICATES, seed: int = 0) -> Iterator[Certificate]:
    """One for each row of THETA and of PHI, in their order."""
    rows = [("theta", name) for name in THETA] + [("phi", name) for name in PHI]
    with forked(seed_for(seed, "certificates"), torch.device("cpu")), double_precision():
        exact = [Quadrature(2), Quadrature(3, 36), Enumeration(2), Enumeration(3)]
        z = worst_z(replicates)
        distances = biases(replicates * 4)
        slopes = snr_slopes(sides_at("phi", 8), sides_at("theta", 8), max(1000, replicates // 10))
        for side, name in rows:
            found = bare(side, name)
            if name not in OF_THE_MODEL:
                check_exactly(found, exact, name, weights_of(side, name))
            if (error := per_draw(Side(name, 4, **found.options), side)) is not None:
                found.errors["draw"] = error
            found.z = z.get(f"{side}-{name}")
            found.limits = distances.get(name, []) if side == "phi" else []
            found.slopes = slopes[f"{side}-{name}"]
            yield found


def of_own(function: str, claimed: str, replicates: int = REPLICATES, seed: int = 0) -> Certificate:
    """A certificate of a phi estimator by its import path, as one of what the row `claimed` of PHI estimates.

    Raises:
        ValueError: if there is no such function, or no such row.
    """
    if claimed not in PHI or claimed in OF_THE_MODEL | CONSISTENT:
        known = ", ".join(name for name in PHI if name not in OF_THE_MODEL | CONSISTENT)
        raise ValueError(f"--of must be one of {known}. Got {claimed}.")
    weights = find("phi", function, {})
    with forked(seed_for(seed, "certificates"), torch.device("cpu")), double_precision():
        found = Certificate("phi", function, {}, TARGETS[claimed].text, needs("phi", function, {}), math.nan)
        check_exactly(found, [Quadrature(2), Quadrature(3, 36), Enumeration(2), Enumeration(3)], claimed, weights)
        pairs = [(Side(function, K), Side(claimed, K, **options_of(PHI[claimed]))) for _, _, K in POINTS]
        points = zip(POINTS, pairs, strict=True)
        found.z = joined([paired(M, K, dim, replicates, *pair) for (dim, M, K), pair in points])
    return found


def bare(side: str, name: str) -> Certificate:
    """What is read off a row: options, requirements, cost, papers."""
    weights = weights_of(side, name)
    options = options_of(weights)
    known = None if name in NO_SLOPE else SLOPES_IN_K.get(name, 0.5) if side == "phi" else 0.5
    doc = (inspect.getdoc(weights) or "") + (inspect.getdoc(PRIOR[name]) or "" if name in PRIOR else "")
    return Certificate(
        side,
        name,
        options,
        TARGETS[name].text,
        needs(side, name, options),
        cost(side, name, options),
        theory=(known, None if name in ("score", "sleep") else 0.5),
        papers=list(dict.fromkeys(re.findall(r"\d{4}\.\d{4,5}", doc))),
    )


def needs(side: str, name: str, options: dict[str, Any]) -> list[str]:
    """What an estimator asks of particles and model, found out by asking it."""
    found = []
    try:
        Side(name, 1, **options).check(side, 1)
    except ValueError:
        found.append("K >= 2")
    at_two = Side(name, 2, **options)
    if side == "phi" and at_two.needs_path:
        found.append("reparameterised q")
    if side == "phi" and at_two.dreams:
        found.append("draws of the model")
    if side == "theta" and at_two.of_prior:
        found.append("learnt, reparameterisable prior")
    return found


def check_exactly(found: Certificate, exact: list[Any], claimed: str, weights: Callable[..., Any]) -> None:
    """Expected gradients by quadrature and enumeration against the row `claimed`; of a biased row, its bias."""
    target = TARGETS[claimed]
    for rule in exact:
        enumerated = isinstance(rule, Enumeration)
        if enumerated and "reparameterised q" in found.needs:
            continue
        error, twin = relative_errors(rule, found, target, weights)
        if claimed in CONSISTENT:
            found.bias = error if not enumerated else found.bias
            continue
        kind = "enumeration" if enumerated else "quadrature"
        found.errors[kind] = max(error, found.errors.get(kind, 0.0))
        found.twins[kind] = min(twin, found.twins.get(kind, math.inf))
    if target.wake:
        three = next(rule for rule in exact if isinstance(rule, Quadrature) and rule.K == 3)
        of = three.target(target._replace(wake=0.0), "phi", {}) if target.bound else posterior_direction(three)
        found.bias = float((three.found("phi", weights, found.options) - of).norm() / of.norm())


def relative_errors(rule: Any, found: Certificate, target: Target, weights: Callable[..., Any]) -> tuple[float, float]:
    """Of a row and of the same 5 % too long."""
    expected = rule.target(target, found.side, found.options)
    if found.name in PRIOR and isinstance(rule, Quadrature):
        value = rule.of_prior(*(v * len(rule.log_w) for v in PRIOR[found.name](rule.log_w.detach())))
    else:
        value = rule.found(found.side, weights, found.options)
    return tuple(float((v - expected).norm() / expected.norm()) for v in (value, 1.05 * value))  # type: ignore[return-value]


def posterior_direction(rule: Quadrature) -> torch.Tensor:
    """-grad KL(posterior || q) in b and log s, (2, B), in closed form."""
    b, s2, c = rule.b.detach(), (2 * rule.log_s.detach()).exp(), (rule.x + rule.mu.detach()) / 2
    return torch.stack([(c - b) / s2, (0.5 + (c - b).square()) / s2 - 1])


def sides_at(side: str, K: int) -> dict[str, Side]:
    """Every row of a side's table, as it is certified."""
    table = THETA if side == "theta" else PHI
    return {name: Side(name, K, **options_of(weights)) for name, weights in table.items()}


def worst_z(replicates: int) -> dict[str, Z]:
    """Of each row, over the points at which none of its coordinates is lost in noise."""
    found: dict[str, list[Z]] = {}
    for dim, M, K in POINTS:
        for name, z in z_scores(M, K, dim, replicates, sides_at("phi", K), sides_at("theta", K)).items():
            found.setdefault(name, []).append(z)
    return {name: joined(points) for name, points in found.items()}


def joined(points: list[Z]) -> Z:
    """The worst of several points with an SNR to speak of; a twin is refused if it is at one of them."""
    points = [z for z in points if z.snr >= LEAST_SNR] or points
    return Z(max(z.worst for z in points), max(z.twin for z in points), min(z.snr for z in points))


def cost(side: str, name: str, options: dict[str, Any]) -> float:
    """Floating-point operations of a step in units of the decoder's forward pass, 784-200-200-50 with 64 samples.

    The encoder's single pass is in them, and is about 1/64 of one.
    """
    torch.manual_seed(0)
    model = LearntPrior()
    x = torch.rand(2, 784)
    own, other = Side(name, 8, **options), Side("iwae", 8)
    theta, phi = (own, other) if side == "theta" else (other, own)
    for _ in range(2):
        drawn = routing.draw(model, x, 64)  # proves the fast way
    with Flops() as forward:
        model.likelihood(drawn.z_held)
    with Flops() as step, by_torch():
        routing.loss(routing.draw(model, x, 64), theta, phi).backward()
    return step.total / forward.total


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, by torch's own table."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


class LearntPrior(MLP):
    """The papers' network with a learnt prior mean, and an encoder too small to count."""

    def __init__(self) -> None:
        super().__init__()
        self.inference = tanh_layers([784, 100])
        self.generative.register_parameter("mean", torch.nn.Parameter(torch.zeros(50)))

    def prior(self) -> torch.distributions.Distribution:
        """N(mean, I)."""
        mean = self.generative.get_parameter("mean")
        return torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones_like(mean)), 1)


class double_precision:
    """torch's default type is float64 inside."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
