"""The posterior of z under several models of the same data, one row a run: the picture in the README.

    python docs/posteriors.py runs/digits-iwae runs/digits-vae --out docs/posteriors.png

Each run is named by what follows the last "-" of its directory, and taken from its checkpoints/best.ckpt. The data are
the first of the validation data. With two latent dimensions the densities are computed on a grid, else from particles.
"""

import argparse
from pathlib import Path

import torch

import lightning_iwae
from lightning_iwae import figures, posteriors


def main() -> None:
    """One panel a run and datum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=int, default=6, help="how many")
    parser.add_argument("--particles", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {}
    for run in args.runs:
        trained = lightning_iwae.load(run)
        network, data = trained.network, trained.data("fit")
        batch = next(iter(data.val_dataloader()))
        x = batch[: args.data]
        torch.manual_seed(0)
        dimensions = posteriors.active_dimensions(network.posterior(batch).mean.detach())
        drawn = posteriors.draw(network, x, args.particles)
        rows[run.name.rpartition("-")[2]] = posteriors.views(network, x, drawn, dimensions)
    names = ("z[0]", "z[1]")[: len(dimensions)]
    picture = figures.posteriors(x, rows, figures.image_shape(batch, getattr(data, "image_shape", None)), names)
    args.out.write_bytes(figures.png(figures.render(picture)))


if __name__ == "__main__":
    main()
