"""Where a run's loggers write, what they are told, and what they need installed."""

import importlib.util
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from ..writing import replacing

NEEDS = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard"}  # class -> package, and our extra


def swept() -> str | None:
    """runs/SWEEP/RUN of a run that `wandb agent` started: its own, and found again if the agent starts it again."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return f"runs/{sweep}/{run}" if sweep and run else None


def placed(config: Any, directory: str, goes_on: bool) -> Any:
    """The config of trainer.logger (one, several, none) with a relative `save_dir` taken to be below `directory`.

    W&B's run of a fit that `goes_on` in the directory is the one that began there, unless its id is given, by
    `version`, `id` or WANDB_RUN_ID.

    Raises:
        ValueError: if the package that a logger needs is not installed.
    """
    if isinstance(config, list):
        return [placed(one, directory, goes_on) for one in config]
    if not hasattr(config, "class_path"):
        return config  # null, true, false
    name = config.class_path.rpartition(".")[2]
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        package = NEEDS[name]
        raise ValueError(f"trainer.logger: {name} needs {package}: pip install 'lightning-iwae[{package}]'.")
    config = deepcopy(config)
    if isinstance(said := config.init_args.get("save_dir"), str):
        config.init_args.save_dir = os.path.normpath(os.path.join(directory, said))
    if name == "WandbLogger":
        resumable(config.init_args, kept_id(directory) if goes_on else None)
    return config


def resumable(options: Any, kept: str | None) -> None:
    """Have W&B go on with the run that has the id, whether given or `kept`.

    The parser knows wandb.init's options too and sets them to None, by which Lightning's resume="allow" is lost: a
    run would be begun anew, and its history so far overwritten.
    """
    if not (options.get("version") or options.get("id")):
        options.version = kept
    if not any(options.get(name) for name in ("resume", "resume_from", "fork_from")):
        options.resume = "allow"


def id_file(directory: str) -> Path:
    """Keeps the id of the W&B run that is fed from a run's directory."""
    return Path(directory) / "wandb" / "id"


def kept_id(directory: str) -> str | None:
    """The id in it, if there is one and the environment, as under `wandb agent`, has none."""
    file = id_file(directory)
    return file.read_text().strip() if file.is_file() and "WANDB_RUN_ID" not in os.environ else None


def with_metrics(given: Any, metrics: Logger) -> list[Logger]:
    """`metrics`, the logger of metrics.csv, and what was `given` beside it; alone if that was none."""
    others = list(given) if isinstance(given, list | tuple) else [given] if isinstance(given, Logger) else []
    return [metrics, *(logger for logger in others if not isinstance(logger, CSVLogger))]


def start(loggers: list[Logger], config: Any, directory: str) -> None:
    """Tell all but metrics.csv's the run's config, and W&B to begin: for rank 0, before data are touched.

    The id of W&B's run is kept in the run's directory.

    Raises:
        ValueError: if W&B cannot begin, as without a key.
    """
    for logger in loggers[1:]:
        try:
            logger.log_hyperparams(config)
            if isinstance(logger, WandbLogger):
                with replacing(id_file(directory)) as file:
                    file.write(f"{logger.experiment.id}\n".encode())
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            told = " ".join(str(error).split()).rstrip(".")
            offline = "--trainer.logger.init_args.offline true"
            message = f"trainer.logger: W&B can't begin: {told}. Without a key or a network: {offline}."
            raise ValueError(message) from error


def catch_up(loggers: list[Logger], rows: list[dict[str, str]]) -> None:
    """Give W&B those rows of metrics.csv, up to the checkpoint that a run goes on from, which it never got.

    A killed process leaves unsent what it logged in the last 15 seconds. The last step that W&B has may have several
    rows, and is sent again.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            last = logger.experiment.summary.get("trainer/global_step", -1)
            for row in rows:
                if (step := int(row["step"])) >= last:
                    logger.log_metrics({k: float(v) for k, v in row.items() if v and k != "step"}, step)


def preempted() -> None:
    """Tell W&B that its run was stopped by the cluster, not by a fault or a user: a sweep gives it out again."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.mark_preempting()


def finish(loggers: list[Logger]) -> None:
    """Close W&B's run, so that a second fit of this process has one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
