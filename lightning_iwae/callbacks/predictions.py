"""What `predict` finds, to a file."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ..module import IWModule
from ..predictions import Rows, in_order, save


class Predictions(Callback):
    """Writes an .npz file with a row for each datum, in the data's order, of what `IWModule.predict_step` finds.

    `index` (N,): the datum's place in the data set. `mean`, `scale` (N, Z): of q(z | x), where it knows them; scale is
    its standard deviation. Of each datum (N,): `log_px`, `elbo`, `rate`, `distortion`, `iwae_64`, `kl_q_posterior`,
    `kl_is_64` (nats), `ess` (fraction of the particles), `k_hat` (Pareto, see `diagnostics.Tail`). And about them all:
    `particles`, `data`, `binarization`, `seed`, `version`, `device`, `checkpoint`.

    Args:
        path: of the file; by default predictions.npz in the run's directory.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: Rows | None = None  # what was written, on rank 0
        self.written: Path | None = None
        self._batches: list[Rows] = []

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget an earlier prediction."""
        self.rows, self.written, self._batches = None, None, []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch's rows; with their index, if Lightning knows what its sampler drew."""
        rows = {name: values.cpu() for name, values in outputs.items()}
        sampler = getattr(trainer.predict_dataloaders, "batch_sampler", None)
        if seen := getattr(sampler, "seen_batch_indices", None):
            rows["index"] = torch.tensor(seen[batch_idx])
        self._batches.append(rows)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather all processes' rows, and write them on rank 0."""
        processes: list[Any] = [self._batches]
        if trainer.world_size > 1:
            processes = [None] * trainer.world_size
            torch.distributed.all_gather_object(processes, self._batches)
        if trainer.is_global_zero:
            module: IWModule = pl_module
            self.rows = in_order(processes)
            self.written = self.path or Path(trainer.default_root_dir) / "predictions.npz"
            checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
            save(self.written, self.rows, module.about() | {"checkpoint": checkpoint})
