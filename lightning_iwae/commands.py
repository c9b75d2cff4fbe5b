"""The sub-commands that Lightning runs: fit, validate, test. Where a run's files go, and what is said at its end."""

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from . import loggers
from .evaluation import table
from .module import IWModule

RUN_DIRECTORY = "LIGHTNING_IWAE_RUN_DIRECTORY"  # tells processes that DDP starts where the run of the first one is


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's directory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On rank 0, before anything else is written; a test leaves the fit's own config alone."""
        if trainer.is_global_zero and stage == "fit":
            directory = Path(trainer.default_root_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, directory / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class CLI(LightningCLI):
    """LightningCLI with one run directory, one seed and short keys."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Find the run directory and, for `best` and `last`, the checkpoint in it."""
        config = self.config[self.subcommand]
        child = "LOCAL_RANK" in os.environ
        directory = config.trainer.default_root_dir or (os.environ.get(RUN_DIRECTORY) if child else None)
        path = Path(directory or of_checkpoint(config.ckpt_path) or fresh_directory())
        os.environ[RUN_DIRECTORY] = self.run_directory = str(path)
        if self.subcommand == "fit":
            if config.ckpt_path is None and not child and (path / "metrics.csv").exists():
                raise ValueError(f"trainer.default_root_dir: {path} holds a run already. Give another directory.")
        else:
            config.verbose = False  # Lightning's table; ours follows
            if config.ckpt_path in ("best", "last"):
                config.ckpt_path = str(path / "checkpoints" / f"{config.ckpt_path}.ckpt")
        if config.ckpt_path not in (None, "best", "last", "hpc", "registry") and not Path(config.ckpt_path).is_file():
            raise ValueError(f"ckpt_path: no file {config.ckpt_path}.")

    def instantiate_classes(self) -> None:
        """Loggers write below the run's directory; the config that is saved keeps what was said."""
        trainer = self.config[self.subcommand].trainer
        said = trainer.logger
        trainer.logger = loggers.placed(said, self.run_directory) if self.subcommand == "fit" else None
        super().instantiate_classes()
        trainer.logger = said

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Everything that a run writes goes below its directory; only a fit logs, and always to metrics.csv."""
        kwargs["default_root_dir"] = self.run_directory
        metrics = CSVLogger(self.run_directory, name="", version="")
        given = self.config_init[self.subcommand].trainer.logger
        kwargs["logger"] = loggers.with_metrics(given, metrics) if self.subcommand == "fit" else False
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(self.run_directory, "checkpoints")
        return trainer

    def before_fit(self) -> None:
        """Say where the run is."""
        announce(self.trainer, "Run directory")
        if self.trainer.is_global_zero:
            loggers.start(self.trainer.loggers, self.config[self.subcommand].as_dict())

    def after_fit(self) -> None:
        """Say where the run's files are."""
        loggers.finish(self.trainer.loggers)
        announce(self.trainer, "The run's files are in")

    def after_validate(self) -> None:
        """Print the table of the validation set."""
        if self.trainer.is_global_zero:
            print(f"\nValidation set\n{table(self.model.result)}", flush=True)

    def after_test(self) -> None:
        """Print the table of the test set and save evaluation.json."""
        if self.trainer.is_global_zero:
            path = Path(self.run_directory) / "evaluation.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.model.result, indent=2) + "\n")
            print(f"\nTest set\n{table(self.model.result)}\n\nSaved as {path}", flush=True)


def announce(trainer: Trainer, what: str) -> None:
    """On rank 0, `what` and the run's directory."""
    if trainer.is_global_zero:
        print(f"{what}: {trainer.default_root_dir}", flush=True)


def of_checkpoint(path: str | None) -> Path | None:
    """The run that a checkpoint RUN/checkpoints/NAME.ckpt belongs to."""
    folder = Path(path).parent if path else None
    return folder.parent if folder is not None and folder.name == "checkpoints" else None


def fresh_directory() -> Path:
    """runs/<date>-<time>, with a number behind it if that is taken."""
    stamp = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    path, number = stamp, 1
    while path.exists():
        path, number = stamp.with_name(f"{stamp.name}-{number}"), number + 1
    return path


def quieten() -> None:
    """Leave out what Lightning says that is no user's business here: an advertisement, a deprecation of its own."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    warnings.filterwarnings("ignore", ".*LeafSpec")
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")


def run(args: list[str] | None) -> None:
    """Parse the arguments of a sub-command and run it."""
    quieten()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${model.samples} under a sub-command
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
