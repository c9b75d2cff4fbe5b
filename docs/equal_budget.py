"""phi's particles and estimator at an equal budget: the table and the picture of docs/equal_budget.md.

python -m lightning_iwae sweep -c sweeps/equal_budget.yaml
python docs/equal_budget.py runs/equal-budget/runs --out docs/equal_budget.png
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml

from lightning_iwae import curves, figures

SHOWN = {
    "log_px": "log p(x), test (nats)",
    "iwae_64": "L_64, test (nats)",
    "kl_q_posterior": "KL(q ‖ posterior), test (nats)",
    "kl_is_64": "log p(x) - L_64, test (nats)",
    "ess": "ESS / 5000, test",
    "snr/phi": "SNR of phi's gradient, end of training",
}
AGAINST = "log p(x) against iwae 64, within seeds"
PANELS = (AGAINST, "kl_q_posterior", "ess", "snr/phi")


def read(run: Path) -> tuple[str, int, int, dict[str, float]]:
    """phi's estimator and particles, the seed, and the figures of one run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    found = json.loads((run / "evaluation.json").read_text())
    values = {name: found[name]["mean"] for name in SHOWN if name in found}
    _, snr = curves.column(curves.read(run / "metrics.csv"), "snr/phi")
    phi = config["model"]["phi"]
    return phi["estimator"], phi["particles"], config["seed_everything"], values | {"snr/phi": float(snr[-1])}


def main() -> None:
    """Print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the directory of the runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    by_seed: dict[tuple[str, int], dict[int, dict[str, float]]] = defaultdict(dict)
    for run in sorted(path for path in args.runs.iterdir() if (path / "evaluation.json").exists()):
        estimator, particles, seed, values = read(run)
        by_seed[estimator, particles][seed] = values
    estimators = [name for name in ("iwae", "dreg", "stl") if any(e == name for e, _ in by_seed)]

    def summary(key: tuple[str, int], name: str) -> tuple[float, float]:
        values = np.array([found[name] for found in by_seed[key].values()])
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))

    def against_iwae(key: tuple[str, int]) -> tuple[float, float]:
        theirs = by_seed["iwae", 64]
        found = np.array([mine["log_px"] - theirs[seed]["log_px"] for seed, mine in by_seed[key].items()])
        return float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found)))

    def cell(key: tuple[str, int], name: str) -> str:
        mean, error = summary(key, name) if name in SHOWN else against_iwae(key)
        return f"{mean:+.3f} ± {error:.3f}" if name == AGAINST else f"{mean:.3f} ± {error:.3f}"

    columns = {**SHOWN, AGAINST: AGAINST}
    print(f"| phi | particles | seeds | {' | '.join(columns.values())} |\n{'|---' * (len(columns) + 3)}|")
    for estimator in estimators:
        for particles in sorted(k for e, k in by_seed if e == estimator):
            key = estimator, particles
            print(f"| {estimator} | {particles} | {len(by_seed[key])} | {' | '.join(cell(key, n) for n in columns)} |")

    drawn = figures.figure(6.4)
    for axis, name in zip(drawn.subplots(2, 2).flat, PANELS, strict=True):
        for i, (estimator, colour) in enumerate(zip(estimators, figures.COLOURS, strict=False)):
            keys = sorted(key for key in by_seed if key[0] == estimator)
            means, errors = zip(*(summary(k, name) if name in SHOWN else against_iwae(k) for k in keys), strict=True)
            at = [k * 1.04 ** (i - 1) for _, k in keys]
            axis.errorbar(at, means, errors, fmt="o-", color=colour, ms=4, lw=1.5, capsize=3, label=estimator)
        axis.set(title=columns[name], xlabel="phi's particles, of 64 samples", xscale="log")
        axis.set_xticks([1, 4, 8, 16, 64], ["1", "4", "8", "16", "64"], minor=False)
        axis.minorticks_off()
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
        if name == "snr/phi":
            axis.set_yscale("log")
    drawn.axes[0].legend(fontsize=9)
    args.out.write_bytes(figures.png(figures.render(drawn)))


if __name__ == "__main__":
    main()
