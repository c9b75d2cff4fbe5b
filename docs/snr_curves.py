"""Signal-to-noise of both networks' gradients along runs, from their metrics.csv: the picture in the README.

    python docs/snr_curves.py runs/digits-vae runs/digits-piwae runs/digits-iwae --out docs/snr.png

Each run is named by what follows the last "-" of its directory. The band is the quartiles over parameters, the dotted
line what pure noise would show.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito


def curves(run: Path, side: str) -> dict[str, list[float]]:
    """Columns of the rows that hold an SNR measurement."""
    with open(run / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get(f"snr/{side}")]
    names = {"step": "step", "mean": f"snr/{side}", "low": f"snr/{side}_q25", "high": f"snr/{side}_q75"}
    return {name: [float(row[key]) for row in rows] for name, key in (names | {"floor": f"snr/{side}_floor"}).items()}


def main() -> None:
    """Two panels, inference network left, generative network right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True, layout="constrained")
    for axis, side, title in zip(
        axes, ("phi", "theta"), ("inference network (phi)", "generative network (theta)"), strict=True
    ):
        for run, colour in zip(args.runs, COLOURS, strict=False):
            c = curves(run, side)
            axis.plot(c["step"], c["mean"], color=colour, lw=1.8, label=run.name.rpartition("-")[2])
            axis.fill_between(c["step"], c["low"], c["high"], color=colour, alpha=0.12, lw=0)
        axis.axhline(c["floor"][0], color="grey", ls=":", lw=1.2)
        axis.annotate(
            "pure noise",
            (0.99, c["floor"][0]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="grey",
        )
        axis.set(yscale="log", xlabel="step", title=title)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("SNR of one gradient estimate")
    axes[0].legend(ncols=2, fontsize=9)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
