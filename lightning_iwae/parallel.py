"""A function applied to many tasks by several processes, in the order of the tasks."""

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any

import torch


class Workers:
    """`f(*shared, *task)` for tasks, by `count` processes of one thread each; with one, by this process.

    Random numbers are f's to seed by its task, so that results do not depend on the count. Processes are started anew
    rather than forked, as autograd's threads do not survive a fork: f and what it is given must be picklable.

    Args:
        f: a function of a module.
        shared: what all calls have in common; handed over once.
        count: of processes.

    Raises:
        ValueError: for fewer than one, or if `shared` can't be handed over.
    """

    def __init__(self, f: Callable[..., Any], shared: tuple[Any, ...], count: int) -> None:
        if count < 1:
            raise ValueError(f"workers must be at least 1. Got {count}.")
        self.f, self.shared, self.count = f, shared, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.count > 1:
            try:
                state = pickle.dumps((self.f, self.shared))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"workers must be 1, as the model or the data can't be given to another process: {error}. "
                    f"Got {self.count}."
                ) from error
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, _start, (state,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results, in order. The first is this process's own, so that a mistake is raised where it is caught."""
        rest = iter(tasks)
        for task in rest if self._pool is None else islice(rest, 1):
            yield self.f(*self.shared, *task)
        if self._pool is None:
            return
        pending: deque[Future[Any]] = deque()
        for task in rest:
            pending.append(self._pool.submit(_call, task))
            if len(pending) > 2 * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_state: tuple[Callable[..., Any], tuple[Any, ...]]  # of a worker


def _start(state: bytes) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard interrupts the process that waits for us
    torch.set_num_threads(1)
    _state = pickle.loads(state)


def _call(task: tuple[Any, ...]) -> Any:
    f, shared = _state
    return f(*shared, *task)
