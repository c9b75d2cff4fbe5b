"""LightningCLI with every mistake refused before data or a run's directory are touched, and with a help to read."""

import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from ..mistakes import Mistake, did_you_mean, nearest, raised_here, shown
from ..module import check_precision
from . import configs, explain
from .help import command_help

LIBRARIES = ("torch", "lightning", "lightning_iwae")


class Refused(Exception):
    """The parser's message, still without its reason."""


class Parser(LightningArgumentParser):
    """A parser that takes no abbreviations, raises where it would exit, and prints its own options first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        self.linked: dict[str, str] = {}  # key -> the key that it follows
        super().__init__(*args, **kwargs)

    def link_arguments(self, source: Any, target: str, *args: Any, **kwargs: Any) -> None:
        """As in jsonargparse, and remembered."""
        super().link_arguments(source, target, *args, **kwargs)
        self.linked[target] = source if isinstance(source, str) else ", ".join(source)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `Refused`, from a parser that would print its usage and exit."""
        if self.exit_on_error:
            raise Refused(message) from ex
        super().error(message, ex)

    def format_help(self, *args: Any) -> str:
        """A sub-command's options, or jsonargparse's own text for a class's."""
        name = getattr(self, "subcommand", None)
        return command_help(self, name) if name else super().format_help(*args)


class CheckedCLI(LightningCLI):
    """LightningCLI that answers what is wrong with one `Mistake`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self.words: list[str] = list(sys.argv[1:] if given is None else given)
        known = self.subcommands()
        if self.words and self.words[0] in known:  # a parser takes a tenth of a second to build: only the one needed
            self.subcommands = lambda: {self.words[0]: known[self.words[0]]}  # type: ignore[method-assign]
        kwargs["parser_class"] = Parser
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; on failure, find the reason."""
        command, words = self.words[0], self.words[1:]
        helping = any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in words)
        self.request = configs.Request([]) if helping else configs.read(words)
        try:
            self.config = parser.parse_args([command, *(absolute(word, command) for word in words)])
        except (Refused, OmegaConfBaseException) as error:
            reason = explain.reason(self._subcommand_parsers[command], self.request)
            raise Mistake(reason or explain.brief(str(error))) from error
        explain.check_accepted(self._subcommand_parsers[command], self.request)
        check_config(self.config[command], command)

    def instantiate_classes(self) -> None:
        """Make everything; a failure is laid to the key that asked for what failed."""
        try:
            super().instantiate_classes()
        except Mistake:
            raise
        except Exception as error:
            if isinstance(error, TypeError) and (reason := explain.reason(self._parser(self.subcommand), self.request)):
                raise Mistake(reason) from error  # null, which the parser takes for anything
            blame(error, self.config[self.subcommand])
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Try the optimisers, then make the trainer; what it does not like is a mistake in `trainer`."""
        if self.subcommand == "fit":
            rehearse(self.model)
        try:
            with held_back():
                return super().instantiate_trainer(**kwargs)
        except Exception as error:
            if not is_about_arguments(error, Trainer):
                raise
            raise Mistake(trainer_problem(error, self.config[self.subcommand].trainer)) from error


def absolute(word: str, command: str) -> str:
    """An argument whose ${model.samples} is found below the sub-command, as those of files are."""
    return re.sub(r"\$\{([A-Za-z][\w.]*)\}", rf"${{{command}.\1}}", word)


def check_config(config: Namespace, command: str) -> None:
    """Mistake for what Lightning would refuse late, at length, or not at all."""
    seed, trainer = config.seed_everything, config.trainer
    if not 0 <= seed < 2**32:
        raise Mistake(f"seed_everything must lie between 0 and 2^32 - 1. Got {seed}.")
    for name, registry in (
        ("accelerator", AcceleratorRegistry.available_accelerators()),
        ("strategy", StrategyRegistry.available_strategies()),
    ):
        value, known = trainer[name], ("auto", *registry, *(["gpu"] if name == "accelerator" else []))
        if isinstance(value, str) and value not in known:
            listed = ", ".join(dict.fromkeys(known)) if len(known) < 12 else "auto, ddp or another of Lightning's"
            raise Mistake(f"trainer.{name} must be {listed}. Got {value!r}.{did_you_mean(nearest(value, known))}")
    if command == "fit":
        full = {"None": "32-true", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
        check_precision(full.get(str(trainer.precision), str(trainer.precision)))


@contextmanager
def held_back() -> Iterator[None]:
    """Keep back what Lightning logs until all is well, so that a mistake is answered alone."""
    logger, records = logging.getLogger("lightning.pytorch.utilities.rank_zero"), list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in records:
        logger.handle(record)


# ------------------------------------------------------------------------------------------------ blame
def blame(error: BaseException, config: Namespace) -> None:
    """Raise a Mistake if `error`, or what it comes from, is about the arguments of a class that `config` asks for."""
    source: BaseException | None = error
    while source is not None:
        for frame, _ in traceback.walk_tb(source.__traceback__):
            if frame.f_code.co_name != "__init__":
                continue
            cls = type(frame.f_locals.get("self"))
            key = asked(cls, frame.f_locals, config)
            if key is not None and is_about_arguments(source, cls):
                raise Mistake(worded(key, cls, source)) from error
        source = source.__cause__ or source.__context__


def asked(cls: type, arguments: dict[str, Any], config: Namespace) -> str | None:
    """The key at which a config asks for a `cls` with these arguments, or with others if it was changed since."""
    if issubclass(cls, LightningModule | LightningDataModule):
        return "model" if issubclass(cls, LightningModule) else "data"
    specs = [(key, spec) for key, spec in specs_of(config) if spec.class_path.rpartition(".")[2] == cls.__name__]
    for key, spec in specs:
        if all(arguments.get(name) == value for name, value in vars(spec.get("init_args") or Namespace()).items()):
            return key
    return specs[0][0] if specs else None


def specs_of(config: Namespace, prefix: str = "") -> Iterator[tuple[str, Namespace]]:
    """(key, {class_path, init_args}) of every class that a config names."""
    for name, value in vars(config).items():
        for i, element in enumerate(value if isinstance(value, list) else [value]):
            key = f"{prefix}{name}" + (f"[{i}]" if isinstance(value, list) else "")
            if isinstance(element, Namespace):
                if isinstance(element.get("class_path"), str):
                    yield key, element
                yield from specs_of(element, f"{key}.")


def is_about_arguments(error: BaseException, cls: type) -> bool:
    """Whether an error in making a `cls` lies with what the config gave it.

    A class of a library fails for nothing else. One of the user's says so by a ValueError; anything else is a bug.
    """
    library = cls.__module__.partition(".")[0] in LIBRARIES
    return library or isinstance(error, ValueError | MisconfigurationException) or raised_here(error)


def worded(key: str, cls: type, error: BaseException) -> str:
    """An error's text, with the key that it is about as the user writes it."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | TypeError | ImportError | MisconfigurationException):
        text = f"{type(error).__name__}: {text}"
    last = key.rpartition(".")[2]
    option = re.match(rf"({last}|{cls.__name__})\.", text)
    if text.startswith((f"{key}.", f"{key}:")):
        return text
    if option:
        return f"{key}.init_args.{text[option.end() :]}"
    if re.split(r"\W", text)[0] in inspect.signature(cls).parameters:
        return f"{key}.{text}"
    return f"{key}: {text}"


def trainer_problem(error: Exception, config: Namespace) -> str:
    """What Lightning's Trainer raised, with the option that it names first, or whose value it names."""
    text = str(error)
    found = {name: at.start() for name in vars(config) if (at := re.search(rf"\b{name}\b", text))}
    values = [name for name, value in vars(config).items() if isinstance(value, str) and f" {value} " in text]
    name = min(found, key=lambda n: found[n]) if found else next(iter(values), None)
    if name is None:
        return worded("trainer", Trainer, error)
    return f"{worded(f'trainer.{name}', Trainer, error)} Got {shown(config[name])}."


def rehearse(model: Any) -> None:
    """Make each optimiser and scheduler once, to throw away. Mistake if one can't be made, or stepped as we do."""
    for side, network in (("theta", model.network.generative), ("phi", model.network.inference)):
        key, make_scheduler = f"model.optimizer_{side}", getattr(model, f"scheduler_{side}")
        with blamed(key):
            optimizer = getattr(model, f"optimizer_{side}")(network.parameters())
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise Mistake(f"{key}: {type(optimizer).__name__} steps by a closure only. Use another.")
        if make_scheduler is not None:
            with blamed(f"model.scheduler_{side}"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "step() before optimizer.step()"
                scheduler = make_scheduler(optimizer)
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    raise Mistake(f"model.scheduler_{side}: ReduceLROnPlateau waits for a metric; use another.")
                scheduler.step()


@contextmanager
def blamed(key: str) -> Iterator[None]:
    """Turn what an optimiser or scheduler raises about its arguments into a Mistake in `key`."""
    try:
        yield
    except Exception as error:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        library = innermost.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES
        if not library and not isinstance(error, ValueError):
            raise
        raise Mistake(worded(key, torch.optim.Optimizer, error)) from error
