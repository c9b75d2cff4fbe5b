"""docs/estimators.md: the certificates as a page."""

import math
from collections.abc import Sequence

from ..estimators import PRIOR
from .broken import BROKEN
from .certificates import EXACT, LEAST_SNR, PER_DRAW, POINTS, SLOPE, Z_LIMIT, Certificate

HEAD = """# Estimators and their certificates

Written by `make certify`; a test holds the rows to the tables in `lightning_iwae/estimators.py`.

The weights of every estimator are functions of the log-weights alone. What each is certified for:

- **exact**: the expected gradient, by Gauss-Hermite quadrature (one latent dimension, K = 2 and 3 particles, a
  learnt location and scale of q and mean of the prior) and, where no path is needed, by enumeration of a latent of
  four states, against autograd of the expected bound. Relative error at most {exact:.0e}; printed is the power of
  ten that it stays below.
- **draw**: the gradient of one draw through `routing.loss` against plain autograd of what the estimator
  differentiates, where it does differentiate something. At most {per_draw:.0e}.
- **z**: through the whole path of `routing`, {replicates:,} replicates of linear-Gaussian models with (D, M, K) =
  {points}: the largest |z| over all coordinates, against other rows on the same draws or a closed form. At most
  {z:.1f}. Points at which a coordinate's SNR in a single draw is below {snr} do not count for the row.
- **bias**: distance of the expected gradient at K = 3 from the gradient of L_K, or for `wake` and `rws-dreg` from
  -grad KL(posterior || q), for `tvo` from that of `bounds.tvo`: relative, exact. What falls with K was followed
  down to K = 64.
- **SNR slopes** of log SNR in log K (K = 16 .. 256; 64 .. 256 where it rises) and in log M (M = 1 .. 16), measured
  / theory (Rainforth et al., arXiv 1802.04537; Daudel et al., arXiv 2210.06226), within {slope}.

The same estimator 5 % too long fails every exact check of its row and its z. Cost is in decoder units:
floating-point operations of a step in forward passes of the decoder; three is what a plain IWAE costs.
"""


def page(certificates: Sequence[Certificate], replicates: int) -> str:
    """The Markdown."""
    points = ", ".join(f"({D}, {M}, {K})" for D, M, K in POINTS)
    parts = [
        HEAD.format(
            exact=EXACT,
            per_draw=PER_DRAW,
            replicates=replicates,
            points=points,
            z=Z_LIMIT,
            snr=LEAST_SNR,
            slope=SLOPE,
        )
    ]
    for side, title in (("theta", "theta, the generative network"), ("phi", "phi, the inference network")):
        parts.append(f"## For {title}\n\n" + table([c for c in certificates if c.side == side]))
    parts.append("## Broken ones, and what caught them\n\n" + broken())
    return "\n".join(parts)


def table(certificates: Sequence[Certificate]) -> str:
    """A row a certificate."""
    names = "estimator", "estimates", "needs", "cost", "exact", "draw", "z", "bias", "SNR in K", "SNR in M", "paper", ""
    lines = [_row(names), _row(["---"] * len(names))]
    return "\n".join([*lines, *(_row(cells(c)) for c in certificates)]) + "\n"


def cells(c: Certificate) -> list[str]:
    """What is said of a row."""
    options = "".join(f", {name} {value}" for name, value in c.options.items())
    exact = max((e for k, e in c.errors.items() if k != "draw"), default=None)
    slopes = c.slopes or (math.nan, math.nan)
    verdict = "certified" if not c.problems else "FAILS: " + "; ".join(c.problems)
    also = " (p(z) by its own path)" if c.name in PRIOR else ""
    return [
        f"`{c.name}`{options}",
        c.estimates.replace("|", "\\|") + also,
        ", ".join(c.needs) or "",
        f"{c.cost:.1f}",
        below(exact),
        below(c.errors.get("draw")),
        f"{c.z.worst:.1f}" if c.z else "",
        bias(c),
        *(slope(s, t) for s, t in zip(slopes, c.theory, strict=True)),
        " ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in c.papers),
        verdict,
    ]


def below(error: float | None) -> str:
    """An error as the power of ten that it stays below; digits beyond are the machine's."""
    return "" if error is None else f"< 1e{max(-12, math.floor(math.log10(max(error, 1e-300))) + 1)}"


def bias(c: Certificate) -> str:
    """0, or per cent, and whether it falls with K."""
    return (
        "0" if c.bias < EXACT else f"{100 * c.bias:.0f} %" + (", falls as 1/K" if c.limits and c.name != "stl" else "")
    )


def slope(measured: float, theory: float | None) -> str:
    """+0.49 / +0.5."""
    if math.isnan(measured):
        return "lost in noise"
    return f"{measured:+.2f}" + ("" if theory is None else f" / {theory:+.1f}")


def broken() -> str:
    """What was broken on purpose, and the check that refuses it."""
    lines = [_row(["broken", "caught by", "its figure", "ours", "limit", ""]), _row(["---"] * 6)]
    for what, check, theirs, ours, limit in BROKEN:
        figures = theirs(), ours()
        verdict = "caught" if figures[0] > limit >= figures[1] else "NOT CAUGHT"
        lines.append(_row([what, check, f"{figures[0]:.2g}", below(figures[1]), f"{limit:.0e}", verdict]))
    return "\n".join(lines) + "\n"


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
