"""Where a study is kept: opened by its URL, waited for when it does not answer, its password never shown."""

import functools
import logging
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..mistakes import Mistake
from ..signals import Interrupted
from . import STORAGES

VARIABLE = "LIGHTNING_IWAE_STORAGE"  # the URL, where an argument would be seen by other users of the machine
NEEDS = {"postgresql": ("psycopg2", "psycopg2-binary"), "mysql": ("pymysql", "pymysql")}
HOPELESS = re.compile(
    "authentication failed|no password supplied|(database|role) .* does not exist"
    "|unable to open database file|file is not a database|readonly database"
)
CONNECT = {"sqlite": {"timeout": 60, "isolation_level": None}, "postgresql": {"connect_timeout": 10}}
PAUSE = 2.0  # seconds before a storage is asked again; grows to ten times that
F = TypeVar("F", bound=Callable[..., Any])


def shown(url: str) -> str:
    """The URL without whatever may be a password in it, if it is badly written too."""
    url = re.sub(r"^([\w+]+:)/*[^/].*@", r"\1//***@", url)
    return re.sub(r"(?i)(password=)[^&]*", r"\1***", url)


def without_password(text: str, url: str) -> str:
    """A text, such as a driver's message, without the URL's passwords."""
    found = re.findall(r"(?i)password=([^&]*)", url)
    if before := re.search(r"^[\w+]+:/*[^/:@]*:(.*)@", url):
        found += [before[1], *before[1].split("@")]  # one that should have been quoted is read as a host
    for secret in sorted({*found, *map(unquote, found)} - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class Unanswered(Exception):
    """The storage does not answer; its text is what the driver says."""


@contextmanager
def heard(url: str) -> Iterator[None]:
    """Turn a storage's silence into Unanswered, and its refusal into a Mistake."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        told = brief(error, url)
        if HOPELESS.search(told):
            raise Mistake(f"storage: {shown(url)} refuses: {told}") from None
        raise Unanswered(told) from None


def patient(method: F) -> F:
    """A method that asks the storage, again and again until it answers, a signal comes, or `self.patience` is over.

    What was asked may have been done although no answer came, so it must be harmless to do it twice.
    """

    @functools.wraps(method)
    def persist(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun, pause = time.monotonic(), PAUSE
        while True:
            try:
                with heard(self.url):
                    answer = method(self, *args, **kwargs)
                self.answered(True)
                return answer
            except Unanswered as error:
                self.answered(False, str(error))
                waited = time.monotonic() - begun
                if self.signals.received:
                    raise Interrupted(self.signals.received, "stopped while the storage did not answer.") from None
                if waited > self.patience:
                    raise Mistake(f"storage: {shown(self.url)} has not answered for {waited:.0f} s: {error}") from None
                time.sleep(pause)
                pause = min(1.5 * pause, 10 * PAUSE)

    return persist  # type: ignore[return-value]


def brief(error: BaseException, url: str) -> str:
    """The first line of a driver's error."""
    source = error.__cause__ or error.__context__ or error if isinstance(error, StorageInternalError) else error
    lines = [line.strip() for line in str(source).splitlines() if line.strip()] or [type(source).__name__]
    return without_password(lines[0], url)[:200]


def file_of(url: str) -> Path | None:
    """The file that a URL leads to, if that is one. Mistake for one in memory, or in the file system's root."""
    sqlite = re.fullmatch(r"sqlite(?:\+\w+)?:(?://)?/?([^?]*)(\?.*)?", url)
    if sqlite and sqlite[1] in ("", ":memory:"):
        raise Mistake(f"storage: {url} would be in memory, and lost. Expected sqlite:///FILE.")
    if not url.startswith("journal:"):
        return Path(sqlite[1]) if sqlite else None
    file = Path(re.sub("^journal:(//)?", "", url))
    if file.parent == Path("/"):
        raise Mistake(f"storage: {url} is a file in the root directory, /. For one in this directory: journal:/{file}.")
    return file


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage at a URL: sqlite:///FILE, postgresql://, mysql://, or journal://FILE for a shared file.

    Raises:
        Mistake: if the URL is none, or its driver is missing.
        StorageInternalError, SQLAlchemyError: if nobody answers.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    scheme, file = url.partition(":")[0], file_of(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "is experimental"
        if scheme == "journal":
            from optuna.storages.journal import JournalFileBackend

            try:
                return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
            except (OSError, ValueError) as error:  # ValueError: a file that is none of Optuna's
                raise Mistake(f"storage: {url} can't be used: {error}.") from error
        url = re.sub("^postgres(ql)?:", "postgresql+psycopg2:", url)  # SQLAlchemy's own choice depends on its version
        try:
            backend = make_url(url).get_backend_name()
            options: dict[str, Any] = {"pool_pre_ping": True}  # a connection that broke is made anew
            options["connect_args"] = CONNECT.get(backend, {})
            made = optuna.storages.RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            driver, package = NEEDS.get(scheme.partition("+")[0], (str(error.name), str(error.name)))
            raise Mistake(f"storage: {scheme} needs {driver}: pip install {package}.") from error
        except (ArgumentError, ValueError):
            raise Mistake(f"storage must be {STORAGES}. Got {shown(url)}.") from None
    if backend == "sqlite":  # else two workers may both read that a trial is free, and both take it
        event.listen(made.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return made


def open_study(
    url: str, name: str, directions: list[Any], pruner: optuna.pruners.BasePruner, begin: Callable[[], None]
) -> optuna.Study:
    """The study, made if it is not there. Several may do so at once, in an empty database too.

    `begin` is called first where it has no trials; where there is no file for it, before that is made.
    """
    file = file_of(url)
    if begun := file is not None and not file.exists():
        begin()
    for attempt in range(20):
        try:
            storage = open_storage(url)
            if not begun and not has_trials(storage, name):
                begin()
            begun = True
            return optuna.create_study(
                storage=storage, study_name=name, directions=directions, load_if_exists=True, pruner=pruner
            )
        except (StorageInternalError, SQLAlchemyError, DuplicatedStudyError) as error:
            if not lost_a_race(error) or attempt == 19:
                raise
            time.sleep(random.uniform(0.1, 1.0))
    raise AssertionError


def has_trials(storage: optuna.storages.BaseStorage, name: str) -> bool:
    """Whether there is such a study, and any trial in it."""
    try:
        return storage.get_n_trials(storage.get_study_id_from_name(name)) > 0
    except KeyError:
        return False


def lost_a_race(error: BaseException | None) -> bool:
    """Whether another worker made the same table, or the same study, in the same moment."""
    told = ""
    while error is not None:
        told, error = f"{told} {type(error).__name__} {error}", error.__cause__
    return re.search(r"IntegrityError|already exists|duplicate|Duplicated|UNIQUE", told) is not None
