"""Signal-to-noise of both networks' gradients along runs, from their metrics.csv: the picture in the README.

    python docs/snr_curves.py runs/digits-vae runs/digits-piwae runs/digits-iwae --out docs/snr.png

Each run is named by what follows the last "-" of its directory. The band is the quartiles over parameters, the dotted
line what pure noise would show.
"""

import argparse
from pathlib import Path

from lightning_iwae import curves, figures


def main() -> None:
    """Two panels, inference network left, generative network right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {run.name.rpartition("-")[2]: curves.read(run / "metrics.csv") for run in args.runs}
    args.out.write_bytes(figures.png(figures.render(curves.signal_to_noise(rows))))


if __name__ == "__main__":
    main()
