"""Where a run's loggers write, what they are told, and what they need installed."""

import importlib.util
import os
from copy import deepcopy
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

NEEDS = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard"}  # class -> package, and our extra


def placed(config: Any, directory: str) -> Any:
    """The config of trainer.logger (one, several, none) with a relative `save_dir` taken to be below `directory`.

    Raises:
        ValueError: if the package that a logger needs is not installed.
    """
    if isinstance(config, list):
        return [placed(one, directory) for one in config]
    if not hasattr(config, "class_path"):
        return config  # null, true, false
    name = config.class_path.rpartition(".")[2]
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        package = NEEDS[name]
        raise ValueError(f"trainer.logger: {name} needs {package}: pip install 'lightning-iwae[{package}]'.")
    config = deepcopy(config)
    if isinstance(said := config.init_args.get("save_dir"), str):
        config.init_args.save_dir = os.path.normpath(os.path.join(directory, said))
    return config


def with_metrics(given: Any, metrics: Logger) -> list[Logger]:
    """`metrics`, the logger of metrics.csv, and what was `given` beside it; alone if that was none."""
    others = list(given) if isinstance(given, list | tuple) else [given] if isinstance(given, Logger) else []
    return [metrics, *(logger for logger in others if not isinstance(logger, CSVLogger))]


def start(loggers: list[Logger], config: Any) -> None:
    """Tell all but metrics.csv's the run's config, and W&B to begin: for rank 0, before data are touched.

    Raises:
        ValueError: if W&B cannot begin, as without a key.
    """
    for logger in loggers[1:]:
        try:
            logger.log_hyperparams(config)
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            offline = "--trainer.logger.init_args.offline true"
            raise ValueError(f"trainer.logger: W&B can't begin: {error} Without a key: {offline}.") from error


def finish(loggers: list[Logger]) -> None:
    """Close W&B's run, so that a second fit of this process has one of its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
