"""Checkpoints from which a run goes on as if it had never stopped."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from ..signals import Interrupted, Signals
from ..writing import part, replacing


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """To the disk under another name, then renamed."""
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


class Checkpoints(Checkpoint):
    """Keeps checkpoints/last.ckpt and checkpoints/best.ckpt in the run's directory.

    `last` is written between two steps, when the one before is over with all that belongs to it: its row in the
    log, the validation that was due, the end of its epoch. It is written at the end too. `best` is written after
    the validation with the largest `monitor` so far. A file is replaced in one move: whenever the process is
    killed, both are whole.

    A callback that logs, or draws from a random state, has to be a function of the step or keep a `state_dict`.

    Args:
        every_n_epochs: `last` is written after so many epochs, or null.
        every_n_steps: and after so many steps, or null.
        every_n_minutes: and when the last time is so long ago, or null.
        monitor: validation's value that `best` is chosen by, largest first. No bound that grows with K will do.
    """

    def __init__(
        self,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        monitor: str = "val/log_px",
    ) -> None:
        intervals = {
            "every_n_epochs": every_n_epochs,
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
        }
        for name, value in intervals.items():
            if value is not None and not value > 0:
                raise ValueError(f"Checkpoints.{name} must be positive, or null for never. Got {value}.")
        if not monitor.startswith("val/") or monitor.startswith("val/iwae"):
            raise ValueError(
                "Checkpoints.monitor must be a value of validation, such as val/log_px, and no bound, which grows "
                f"with K. Got {monitor}."
            )
        self.every_n_epochs, self.every_n_steps, self.every_n_minutes = every_n_epochs, every_n_steps, every_n_minutes
        self.monitor = monitor
        self.signals: Signals | None = None  # the command line's
        self.best: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._point: dict[str, Any] | None = None  # the loops' state as of the last step, if it is wanted
        self._loops: dict[str, Any] | None = None  # the one being saved
        self._due, self._signal = False, 0
        self._saved_at = time.monotonic()

    @property
    def best_model_path(self) -> str:
        """best.ckpt, or nothing if there is none yet."""
        return str(self._folder / "best.ckpt") if self.best is not None else ""

    # -------------------------------------------------------------------------------------------- state
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forget an earlier fit, and clear away what a killed one left half-written."""
        if stage != "fit":
            return
        self._folder = Path(trainer.default_root_dir) / "checkpoints"
        self.best = None
        self._forget()
        trainer.strategy.checkpoint_io = WholeFiles()
        # Lightning's handler of SIGTERM calls a collective wherever it is, SLURM's saves in the middle of a step
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if trainer.is_global_zero:
            for name in ("last", "best"):
                part(self._folder / f"{name}.ckpt").unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"monitor": self.monitor, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best value so far, unless it was of something else."""
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put in where the loops were after the step; by now they have begun the next."""
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    # -------------------------------------------------------------------------------------------- moments
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on there is something to lose."""
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.ready == epochs.processed:  # between two epochs: with max_steps Lightning would redo the first's end
            trainer.fit_loop.epoch_loop.restarting = False
        if self.signals is not None:
            self.signals.deferred = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep where the loops are, if a step has been completed after which to save or to stop."""
        self._point = None
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # half a step: its gradients so far are in no checkpoint
        self._agree(trainer)
        if self._due or self._signal or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._point = trainer.fit_loop.state_dict()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if self.monitor not in trainer.callback_metrics and self.best is None:
            known = ", ".join(sorted(trainer.callback_metrics))
            rank_zero_warn(f"No best.ckpt is kept: Checkpoints.monitor is {self.monitor}, but there are only {known}.")
        elif value > (-math.inf if self.best is None else self.best):
            self.best = value
            self._save(trainer, "best")
        if trainer.should_stop and self._point is None and not trainer.fit_loop._should_accumulate():
            self._point = trainer.fit_loop.state_dict()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep where the loops are: at the start of the next epoch, unless the run stops within this one."""
        if trainer.is_last_batch:
            self._point = trainer.fit_loop.state_dict()
            for progress in self._point["epoch_progress"].values():
                progress["completed"] = progress["processed"]
            self._due |= self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save if that is due, and stop if a signal has come."""
        if self._point is not None and (self._due or self._signal):
            self._save(trainer, "last", self._point)
            if self._signal:
                raise Interrupted(self._signal, self._farewell(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the final state."""
        self._save(trainer, "last", self._point)
        if self.signals is not None:
            self.signals.deferred = False

    # -------------------------------------------------------------------------------------------- saving
    def _agree(self, trainer: Trainer) -> None:
        """Is it time to save, and has a signal come? What one process says goes for all."""
        late = self.every_n_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        now = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        signum, due = self.signals.received if self.signals is not None else 0, int(self._due or late or now)
        if trainer.world_size > 1:
            wanted = torch.tensor([signum, due], device=trainer.strategy.root_device)
            signum, due = trainer.strategy.reduce(wanted, reduce_op="max").tolist()
        self._signal, self._due = signum, bool(due)

    def _save(self, trainer: Trainer, name: str, loops: dict[str, Any] | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._loops = loops
        trainer.save_checkpoint(self._folder / f"{name}.ckpt", weights_only=False)
        self._loops = None
        if name == "last":
            self._due, self._saved_at = False, time.monotonic()

    def _farewell(self, trainer: Trainer) -> str:
        resume = f"--trainer.default_root_dir {trainer.default_root_dir} --ckpt_path last"
        return f"stopped after step {trainer.global_step}, saved as {self._folder / 'last.ckpt'}. Go on with {resume}"
