"""Where a study is kept: opened by its URL, waited for when it does not answer, its password never shown."""

import functools
import logging
import random
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..mistakes import Mistake

VARIABLE = "LIGHTNING_IWAE_STORAGE"  # the URL, where an argument would be seen by other users of the machine
NEEDS = {"postgresql": ("psycopg2", "psycopg2-binary"), "mysql": ("pymysql", "pymysql")}
HOPELESS = re.compile("authentication failed|no password supplied|(database|role) .* does not exist")
PAUSE = 2.0  # seconds before a storage is asked again; grows to ten times that
F = TypeVar("F", bound=Callable[..., Any])


def shown(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(//[^/:@]*):[^@]*@", r"\1:***@", url)


def without_password(text: str, url: str) -> str:
    """A text, such as a driver's message, without the URL's password."""
    found = re.search(r"//[^/:@]*:([^@]+)@", url)
    for secret in {found[1], unquote(found[1])} if found else ():
        text = text.replace(secret, "***")
    return text


def patient(method: F) -> F:
    """A method that asks the storage, asked again until it answers or `self.patience` seconds are over.

    What was asked may have been done although no answer came, so it must be harmless to do it twice.
    """

    @functools.wraps(method)
    def persist(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun, pause = time.monotonic(), PAUSE
        while True:
            try:
                answer = method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                if HOPELESS.search(told := brief(error, self.url)):
                    raise Mistake(f"storage: {shown(self.url)} refuses: {told}") from None
                waited = time.monotonic() - begun
                if waited > self.patience:
                    raise Mistake(f"storage: {shown(self.url)} has not answered for {waited:.0f} s: {told}") from None
                if pause == PAUSE:
                    self.say(f"The storage does not answer, and is asked again: {told}")
                time.sleep(pause)
                pause = min(1.5 * pause, 10 * PAUSE)
            else:
                if pause > PAUSE:
                    self.answering = time.monotonic()
                    self.say("The storage answers again.")
                return answer

    return persist  # type: ignore[return-value]


def brief(error: BaseException, url: str) -> str:
    """The first line of a driver's error."""
    source = error.__cause__ or error.__context__ or error if isinstance(error, StorageInternalError) else error
    lines = [line.strip() for line in str(source).splitlines() if line.strip()] or [type(source).__name__]
    return without_password(lines[0], url)[:200]


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """The storage at a URL: sqlite:///, postgresql://, mysql://, or journal:///FILE for a shared file.

    Raises:
        Mistake: if the URL is none, or its driver is missing.
        StorageInternalError, SQLAlchemyError: if nobody answers.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    scheme = url.partition(":")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "is experimental"
        if scheme == "journal":
            from optuna.storages.journal import JournalFileBackend

            return optuna.storages.JournalStorage(JournalFileBackend(re.sub(r"^journal:(//)?", "", url)))
        url = re.sub("^postgres(ql)?:", "postgresql+psycopg2:", url)  # SQLAlchemy's own choice depends on its version
        try:
            options: dict[str, Any] = (
                {"connect_args": {"timeout": 60}} if make_url(url).get_backend_name() == "sqlite" else {}
            )
            options["pool_pre_ping"] = True  # a connection that broke is made anew
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except ImportError as error:
            driver, package = NEEDS.get(scheme.partition("+")[0], (str(error.name), str(error.name)))
            raise Mistake(f"storage: {scheme} needs {driver}: pip install {package}.") from error
        except (ArgumentError, ValueError):
            raise Mistake(
                f"storage must be sqlite:///FILE, journal:///FILE or postgresql://USER@HOST/DATABASE. Got {shown(url)}."
            ) from None


def open_study(url: str, name: str, directions: list[Any], pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """The study, made if it is not there. Several may do so at once, in an empty database too."""
    for attempt in range(20):
        try:
            storage = open_storage(url)
            return optuna.create_study(
                storage=storage, study_name=name, directions=directions, load_if_exists=True, pruner=pruner
            )
        except (StorageInternalError, SQLAlchemyError, DuplicatedStudyError) as error:
            if not lost_a_race(error) or attempt == 19:
                raise
            time.sleep(random.uniform(0.1, 1.0))
    raise AssertionError


def lost_a_race(error: BaseException | None) -> bool:
    """Whether another worker made the same table, or the same study, in the same moment."""
    told = ""
    while error is not None:
        told, error = f"{told} {type(error).__name__} {error}", error.__cause__
    return re.search(r"IntegrityError|already exists|duplicate|Duplicated|UNIQUE", told) is not None
