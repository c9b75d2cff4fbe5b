"""What `predict` writes: one row a datum in the data's order, whichever of several processes found it."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .writing import replacing

Rows = dict[str, Tensor]  # name -> (B, ...)


def in_order(processes: list[list[Rows]]) -> Rows:
    """The batches of each process joined and sorted by `index`, each datum once.

    A batch without an index is a process's slice of a global batch, as `data.Batches` cuts them: its data come after
    those of earlier batches, and of lower ranks in the same batch.
    """
    batches: list[Rows] = []
    seen = 0
    for of_ranks in zip_longest(*processes):
        for rows in of_ranks:
            if rows is not None:
                n = len(next(iter(rows.values())))
                batches.append({"index": torch.arange(seen, seen + n)} | rows)
                seen += n
    joined = {name: torch.cat([rows[name] for rows in batches]) for name in batches[0]}
    index, order = joined["index"].sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]  # a sampler that pads for several processes gives data twice
    return {name: values[order[first]] for name, values in joined.items()}


def save(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """One .npz file of `rows` and, beside them, of what is known about them all; whole or not there.

    npz, for that it holds (N, Z) arrays as they are and needs nothing but NumPy; Parquet would take a dependency and a
    column for each latent number. `numpy.load(path)` reads it, without pickle.
    """
    known = {name: np.asarray(value) for name, value in about.items() if value is not None}
    with replacing(path) as file:
        np.savez(file, **known, **{name: values.numpy() for name, values in rows.items()})  # type: ignore[arg-type]


def summary(rows: Rows) -> str:
    """What was found, in a few lines."""
    shapes = {name: f" {tuple(values.shape[1:])}" if values.ndim > 1 else "" for name, values in rows.items()}
    lines = [f"{len(rows['index'])} data: {', '.join(name + shape for name, shape in shapes.items())}"]
    if missing := [name for name in ("mean", "scale") if name not in rows]:
        lines.append(f"The posterior knows no {' and no '.join(missing)}, left out.")
    lines.append(f"log p(x) is unreliable (Pareto k-hat > 0.7) for {int((rows['k_hat'] > 0.7).sum())} of them.")
    return "\n".join(lines)
