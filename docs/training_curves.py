"""A validation figure of several runs over steps, from their metrics.csv: pictures in docs/models.md.

    python docs/training_curves.py runs/discrete-vimco runs/discrete-rloo --out docs/discrete.png

Each run is named by what follows the last "-" of its directory.
"""

import argparse
from pathlib import Path

from lightning_iwae import curves, figures

PANELS = {"val/log_px": "log p(x), validation (nats)", "val/elbo": "ELBO, validation (nats)", "snr/phi": "SNR of phi"}


def main() -> None:
    """A panel for each figure, a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    drawn = figures.figure(3.4)
    axes = drawn.subplots(1, len(PANELS))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for run, colour in zip(args.runs, figures.COLOURS, strict=False):
            steps, values = curves.column(curves.read(run / "metrics.csv"), name)
            axis.plot(steps, values, ".-", color=colour, lw=1.5, label=run.name.rpartition("-")[2])
        axis.set(title=title, xlabel="step")
        axis.title.set_fontsize(11)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=9)
    args.out.write_bytes(figures.png(figures.render(drawn)))


if __name__ == "__main__":
    main()
