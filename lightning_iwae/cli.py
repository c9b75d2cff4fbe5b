"""The command line: `python -m lightning_iwae {fit,validate,test} -c conf/mnist.yaml [-c overlay.yaml] [--key value]`."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from .data import DataError
from .evaluation import table
from .module import IWModule

RUN_DIRECTORY = "LIGHTNING_IWAE_RUN_DIRECTORY"  # tells the processes that DDP starts where the run is


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's directory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On rank 0, before anything else is written; a test leaves the fit's own config alone."""
        if trainer.is_global_zero and stage == "fit":
            directory = Path(trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config, directory / "config.yaml", skip_none=False, overwrite=True, multifile=False
            )


class CLI(LightningCLI):
    """LightningCLI with one run directory, and short keys."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Everything that a run writes goes below trainer.default_root_dir, which is made here if not given."""
        config = self._get(self.config_init, "trainer")
        directory = config.get("default_root_dir") or os.environ.get(RUN_DIRECTORY) or fresh_directory()
        os.environ[RUN_DIRECTORY] = directory
        kwargs["default_root_dir"] = directory
        if config.get("logger") is None:
            kwargs["logger"] = CSVLogger(directory, name="", version="")
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(directory, "checkpoints")
        return trainer

    def before_fit(self) -> None:
        """Say where the run is."""
        announce(self.trainer, "Run directory")

    def after_fit(self) -> None:
        """Say where the run's files are."""
        announce(self.trainer, "The run's files are in")

    def after_test(self) -> None:
        """Print the table and save evaluation.json."""
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "evaluation.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.model.result, indent=2) + "\n")
            print(f"\n{table(self.model.result)}\n\nSaved as {path}")


def announce(trainer: Trainer, what: str) -> None:
    """On rank 0, `what` and the run's directory."""
    if trainer.is_global_zero:
        print(f"{what}: {trainer.default_root_dir}", flush=True)


def fresh_directory() -> str:
    """runs/<date>-<time>, with a number behind it if that is taken."""
    stamp = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    path, number = stamp, 1
    while path.exists():
        path, number = stamp.with_name(f"{stamp.name}-{number}"), number + 1
    return str(path)


def main(args: list[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message for a mistake in config or data."""
    try:
        CLI(
            IWModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"parser_mode": "omegaconf+"},
            args=args,
        )
    except (ValueError, DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
