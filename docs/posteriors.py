"""The posterior of z under several models of the same data, one row a run: the picture in the README.

    python docs/posteriors.py runs/digits-iwae runs/digits-vae --out docs/posteriors.png

Each run is named by what follows the last "-" of its directory, and taken from its checkpoints/best.ckpt. The data are
the first of the validation data. With two latent dimensions the densities are computed on a grid, else from particles.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_iwae import figures, posteriors


def make(config: dict[str, Any]) -> Any:
    """What a config's class_path and init_args say."""
    module, _, name = config["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**config["init_args"])


def load(run: Path) -> tuple[Any, torch.Tensor, Any]:
    """The run's network, its first validation data, and the shape they declare."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    network, data = make(config["model"]["network"]), make(config["data"])
    state = torch.load(run / "checkpoints/best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    data.prepare_data()
    data.setup()
    return network.eval(), next(iter(data.val_dataloader())), getattr(data, "image_shape", None)


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
        network, batch, declared = load(run)
        x = batch[: args.data]
        torch.manual_seed(0)
        dimensions = posteriors.active_dimensions(network.posterior(batch).mean.detach())
        drawn = posteriors.draw(network, x, args.particles)
        rows[run.name.rpartition("-")[2]] = posteriors.views(network, x, drawn, dimensions)
    names = ("z[0]", "z[1]")[: len(dimensions)]
    picture = figures.posteriors(x, rows, figures.image_shape(batch, declared), names)
    args.out.write_bytes(figures.png(figures.render(picture)))


if __name__ == "__main__":
    main()
