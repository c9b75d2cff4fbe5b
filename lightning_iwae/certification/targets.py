"""What each row of the estimators' tables claims to estimate."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import bounds

OPTIONS: dict[str, Any] = {"beta": 0.3, "alpha": 0.4, "partition": 3, "gamma": 0.0}
Weights = Callable[..., Any]  # log_w (M, K, B) -> a, or (c, s)


class Target(NamedTuple):
    """An expected gradient: that of E[bound], plus `wake` times E[sum w~ grad log q], which only phi has."""

    text: str
    bound: Callable[..., Tensor] | None
    wake: float = 0.0


L_K = Target("gradient of L_K", bounds.miwae)
TARGETS: dict[str, Target] = {  # by the estimator's name
    "elbo": Target("gradient of the ELBO", bounds.elbo),
    "iwae": L_K,
    "ciwae": Target("gradient of beta ELBO + (1 - beta) L_K", bounds.ciwae),
    "vr-iwae": Target("gradient of L_K^(alpha)", bounds.vr_iwae),
    "jvi": Target("gradient of the first jackknife of L_K", bounds.jvi),
    "stl": Target("gradient of L_K, and wake's direction added", bounds.miwae, wake=1.0),
    "dreg": L_K,
    "wake": Target("E sum w~ grad log q, tends to -grad KL(posterior || q)", None, wake=1.0),
    "rws-dreg": Target("what wake estimates", None, wake=1.0),
    "score": L_K,
    "vimco": L_K,
    "vimco-arithmetic": L_K,
    "ovis": L_K,  # gamma = 0
    "gdreg": L_K,
    "tvo": Target("tends to the gradient of the Riemann sum", bounds.tvo),
    "sleep": Target("gradient of E_p(x,z) log q(z | x)", None),
}
TARGETS |= {"rloo": TARGETS["elbo"]} | {f"{name}-dreg": TARGETS[name] for name in ("ciwae", "vr-iwae", "jvi")}
CONSISTENT = {"tvo"}  # biased at finite K by nature: what it tends to is certified
OF_THE_MODEL = {"sleep"}  # not a function of the weights


def options_of(weights: Weights) -> dict[str, Any]:
    """The options of an estimator, as they are certified."""
    return {o: OPTIONS[o] for o in inspect.signature(weights).parameters if o in OPTIONS}


def applicable(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a bound takes."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
