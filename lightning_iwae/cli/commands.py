"""The sub-commands that Lightning runs. Where a run's files go, and what is said at its end."""

import copy
import json
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import ExitStack, suppress
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from .. import resume
from ..callbacks import Checkpoints, Predictions
from ..callbacks.progress import Progress
from ..data import ArrayData
from ..data.batches import check_shares
from ..ddp import LostProcess, is_lost, message
from ..evaluation import table
from ..metrics_csv import MetricsCSV
from ..mistakes import Mistake
from ..models import check_labels
from ..module import IWModule
from ..predictions import summary
from ..signals import Interrupted, Signals
from ..writing import replacing
from . import loggers
from .checked import CheckedCLI, rehearse
from .lock import just_left, sole_fit

RUN_DIRECTORY = "LIGHTNING_IWAE_RUN_DIRECTORY"  # tells processes that DDP starts where the run of the first one is


class RunFiles(SaveConfigCallback):
    """Writes config.yaml into the run's directory, and keeps metrics.csv in step with the checkpoints."""

    _resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On rank 0, before anything else is written; a test leaves the fit's own config alone."""
        if trainer.is_global_zero and stage == "fit":
            with replacing(Path(trainer.default_root_dir) / "config.yaml") as file:
                file.write(self._settings.encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the settings, and how far metrics.csv is."""
        checkpoint["settings"] = copy.deepcopy(self._parsed)
        for logger in of_metrics(trainer):
            checkpoint["metrics.csv"] = logger.mark()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Drop from metrics.csv what came after the checkpoint."""
        for logger in of_metrics(trainer):
            if "metrics.csv" in checkpoint:
                logger.cut(**checkpoint["metrics.csv"])
                self._resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring W&B up to where metrics.csv is."""
        for logger in of_metrics(trainer) if self._resumed else ():
            loggers.catch_up(trainer.loggers, logger.read())
        self._resumed = False

    @cached_property
    def _parsed(self) -> dict[str, Any]:  # 40 ms
        return yaml.safe_load(self._settings)

    @cached_property
    def _settings(self) -> str:
        return settings(self.parser, self.config)


def of_metrics(trainer: Trainer) -> list[MetricsCSV]:
    """The loggers that write metrics.csv, on the process that writes."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV) and trainer.is_global_zero]


def settings(parser: LightningArgumentParser, config: Namespace) -> str:
    """The YAML of a run that can be run again: all settings but the directory, and the checkpoint it went on from."""
    config = config.clone()
    config.trainer.default_root_dir = None
    for key in ("ckpt_path", "weights_only"):
        if key in config:
            config[key] = None
    return parser.dump(config, skip_none=False)


class CLI(CheckedCLI):
    """The checked command line with one run directory, one seed and short keys."""

    def __init__(self, *args: Any, signals: Signals, **kwargs: Any) -> None:
        self.signals = signals
        self.checkpoint: dict[str, Any] | None = None
        self.evaluated: dict[str, Any] = {"checkpoint": None, "step": None}
        self.made: Path | None = None  # a fresh directory
        self.held = ExitStack()  # the directory's lock
        try:
            super().__init__(*args, **kwargs)
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise LostProcess(message(self.trainer)) from error
        finally:
            self.held.close()
            if self.made is not None:
                with suppress(OSError):  # not empty, unless a mistake came before the first file
                    self.made.rmdir()
                    self.made.parent.rmdir()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint has no say in the settings (Lightning would take hyperparameters from it)."""

    def before_instantiate_classes(self) -> None:
        """Find the run directory, and the checkpoint: read and compared with the settings before anything is run."""
        config = self.config[self.subcommand]
        directory = config.trainer.default_root_dir or (os.environ[RUN_DIRECTORY] if launched() else None)
        if directory is None and self.subcommand == "fit":
            directory = loggers.swept()
        if config.ckpt_path in ("best", "last") and directory is None:
            raise ValueError(
                f"ckpt_path: {config.ckpt_path} is looked for in a run's directory. Give that: "
                f"--trainer.default_root_dir RUN."
            )
        directory = directory or of_checkpoint(config.ckpt_path)
        if directory is None:
            directory = self.made = fresh_directory()
        self.run_directory = str(directory)
        os.environ[RUN_DIRECTORY] = self.run_directory
        self.asked = config.ckpt_path
        config.ckpt_path = self._checkpoint_path(self.asked)
        if "weights_only" in config:
            config.weights_only = True
        if "verbose" in config:  # of validate and test
            config.verbose = False  # Lightning's table; ours follows
        if config.ckpt_path is not None:
            self.checkpoint = resume.read(Path(config.ckpt_path))
            if self.subcommand == "fit" and "settings" in self.checkpoint:
                given = yaml.safe_load(settings(self._parser("fit"), config))
                resume.check_settings(Path(config.ckpt_path), self.checkpoint["settings"], given)

    def _checkpoint_path(self, given: str | None) -> str | None:
        """The file that `best`, `last` or a path means; None for `last` of a fit that has none yet."""
        run = Path(self.run_directory)
        last = run / "checkpoints" / "last.ckpt"
        path = str(run / "checkpoints" / f"{given}.ckpt") if given in ("best", "last") else given
        if self.subcommand != "fit":
            return path
        self.afresh = given == "last" and not last.exists()
        self.goes_on = self.afresh or (path is not None and Path(path).resolve() == last.resolve())
        if not self.goes_on and not launched() and (last.exists() or (run / "metrics.csv").exists()):
            raise ValueError(
                f"trainer.default_root_dir: {run} holds a run already. Go on with it by --ckpt_path last, or give "
                f"another directory."
            )
        return None if self.afresh else path

    def after_instantiate_classes(self) -> None:
        """Compare the data's labels, and the checkpoint's weights, with what the model takes."""
        labels = getattr(self.datamodule, "labels", None)
        if isinstance(labels, bool):
            check_labels(self.model.network, labels)
        if self.checkpoint is not None:
            path = Path(self.config[self.subcommand].ckpt_path)
            resume.check_weights(path, self.checkpoint, self.model)
            self.evaluated = {"checkpoint": path.name, "step": self.checkpoint.get("global_step")}
            self.checkpoint = None

    def instantiate_classes(self) -> None:
        """Loggers write below the run's directory; the config that is saved keeps what was said."""
        trainer = self.config[self.subcommand].trainer
        said = trainer.logger
        fit = self.subcommand == "fit"
        trainer.logger = loggers.placed(said, self.run_directory, self.goes_on) if fit else None
        super().instantiate_classes()
        trainer.logger = said

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Everything that a run writes goes below its directory; only a fit logs, and to metrics.csv in any case."""
        given = self.config_init[self.subcommand].trainer
        kwargs["default_root_dir"] = self.run_directory
        kwargs["logger"] = loggers.with_metrics(given.logger, MetricsCSV()) if self.subcommand == "fit" else False
        callbacks = as_list(given.callbacks)
        if given.enable_checkpointing is not False and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(Checkpoints())
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Progress())
        if self.subcommand == "predict" and not any(isinstance(c, Predictions) for c in callbacks):
            callbacks.append(Predictions())
        for callback in callbacks:
            if isinstance(callback, Checkpoints):
                callback.signals = self.signals
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(self.run_directory, "checkpoints")
        kwargs["callbacks"] = callbacks
        if SLURMEnvironment.detect():
            kwargs["plugins"] = [*as_list(given.plugins), SLURMEnvironment(auto_requeue=False)]
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and logger.directory is None:
                logger.directory = self.run_directory
        return trainer

    def before_fit(self) -> None:
        """Take the run's directory for this fit alone, and say where it is."""
        if isinstance(self.datamodule, ArrayData):
            check_shares(self.datamodule.batch_size, self.trainer.world_size)  # before DDP starts the other processes
        if self.trainer.is_global_zero:
            self._take_directory()
        announce(self.trainer, "Run directory")
        if self.afresh:
            announce(self.trainer, "There is no checkpoint, and the run starts afresh, in")
        if self.trainer.is_global_zero:
            loggers.start(self.trainer.loggers, self.config[self.subcommand].as_dict(), self.run_directory)

    def _take_directory(self) -> None:
        """Lock it, and see that no other fit has left a checkpoint since it was looked for."""
        directory = Path(self.run_directory)
        self.held.enter_context(sole_fit(directory))
        if self._checkpoint_path(self.asked) != self.config[self.subcommand].ckpt_path:
            raise just_left(directory)

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
            with replacing(path) as file:
                file.write((json.dumps(self.model.result | self.evaluated, indent=2) + "\n").encode())
            print(f"\nTest set\n{table(self.model.result)}\n\nSaved as {path}", flush=True)

    def after_predict(self) -> None:
        """Say what was found, and where it is."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Predictions) and callback.rows is not None:
                print(f"\n{summary(callback.rows)}\n\nSaved as {callback.written}", flush=True)


class Rehearsal(CLI):
    """A fit up to the point where it would need its device and data: all is parsed and made but the trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None; the optimisers are tried."""
        rehearse(self.model)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def launched() -> bool:
    """Whether this process was started by the first process of the run, under DDP."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and RUN_DIRECTORY in os.environ


def as_list(value: Any) -> list[Any]:
    """Of a setting that may be a list, one of its kind, or nothing."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def announce(trainer: Trainer, what: str) -> None:
    """On rank 0, `what` and the run's directory."""
    if trainer.is_global_zero:
        print(f"{what}: {trainer.default_root_dir}", flush=True)


def of_checkpoint(path: str | None) -> Path | None:
    """The run that a checkpoint RUN/checkpoints/NAME.ckpt belongs to."""
    folder = Path(path).parent if path else None
    return folder.parent if folder is not None and folder.name == "checkpoints" else None


def fresh_directory() -> Path:
    """runs/<date>-<time>, with a number behind it if that is taken. Made at once, so that no other run takes it."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "trainer.default_root_dir must be given to a run of several processes that srun or torchrun starts: each "
            "would take a fresh one of its own."
        )
    stamp = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    for number in count():
        path = stamp if number == 0 else stamp.with_name(f"{stamp.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return path


def of_run(args: list[str]) -> list[str]:
    """`test RUN`, `predict RUN` and `predict RUN FILE` written out: a run's config, its best checkpoint, FILE as data.

    FILE is taken as it is, uint8 divided by 255. Options behind it win, as ever.
    """
    command, *words = args
    if command == "fit" or not words or words[0].startswith("-"):
        return args
    run, *words = words
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise Mistake(f"{command} {run}: must be a run's directory. There is no {config}.")
    data = []
    if words and not words[0].startswith("-"):
        file, *words = words
        data = ["--data", "lightning_iwae.data.Arrays"]
        settings = {"train": file, "val": file, "test": file, "validation": "null", "binarization": "none"}
        data += [word for key, value in settings.items() for word in (f"--data.init_args.{key}", value)]
    return [command, "-c", str(config), "--trainer.default_root_dir", run, "--ckpt_path", "best", *data, *words]


def quieten() -> None:
    """Leave out what Lightning says that is no user's business here: an advertisement, a deprecation of its own.

    The seed is in config.yaml, and a line about it would come before what a mistake is answered with.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec")
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # on a login node all is well without


def make_ready(args: list[str]) -> None:
    """All of a fit that needs neither device nor data; raises what `run` would if its arguments are wrong."""
    start(Rehearsal, args, Signals())


def start(cli: type[CLI], args: list[str], signals: Signals) -> None:
    """Have a command line of this package's settings parse the arguments, and do what they ask for."""
    quieten()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${model.samples} under a sub-command
    cli(
        IWModule,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_callback=RunFiles,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # no hyper-parameters in checkpoints: config.yaml has them
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=args,
        signals=signals,
    )


def run(args: list[str] | None) -> None:
    """Parse the arguments of a sub-command and run it; `Interrupted` if a signal stops it."""
    args = of_run(sys.argv[1:] if args is None else args)
    started_by_another = launched()
    try:
        with Signals() as signals:
            start(CLI, args, signals)
    except Interrupted as stop:
        if stop.signal == signal.SIGUSR1:  # SIGTERM may be from W&B's own stop button
            loggers.preempted()
        if not started_by_another:  # it speaks for both, and would be killed if this one failed
            raise
