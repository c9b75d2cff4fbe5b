"""One run in several processes: what ends it when one of them is lost."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import DistError

OF_GLOO = "gloo/|caused pair closure|Connection (closed|reset) by peer"
BUCKET = 25  # MB that go round at once: torch's default too, but for its first bucket of 1 MB, a second round for us
GRACE = 10  # seconds that the first process has to end in good order, once one that it started has failed


class LostProcess(RuntimeError):
    """The run ended because another of its processes is gone. Its text is all that the user is told."""


def is_lost(error: BaseException) -> bool:
    """Whether an error is torch's way of saying that another process no longer answers."""
    told = isinstance(error, RuntimeError) and re.search(OF_GLOO, str(error)) is not None
    return told or isinstance(error, DistError)


def message(trainer: Trainer) -> str:
    """What the user is told on a process that is left."""
    rank = f"process {trainer.global_rank} of {trainer.world_size}"
    lost = f"{rank} lost another one after step {trainer.global_step}: it failed, was killed, hangs or is cut off."
    if trainer.state.fn != TrainerFn.FITTING:
        return lost
    return f"{lost} Go on with --trainer.default_root_dir {trainer.default_root_dir} --ckpt_path last"


class DDP(DDPStrategy):
    """Lightning's DDP, in which no process waits long for one that is lost, and none stays behind.

    One that was killed is noticed by the next all-reduce, as its connections are closed. One that hangs, or whose
    machine is cut off, is waited for as long as `timeout` says, which must be more than a figure or a checkpoint takes,
    as one process makes them alone. Downloads are waited for in any case.

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float = 300) -> None:
        if not timeout > 0:
            raise ValueError(f"DDP.timeout must be positive. Got {timeout}.")
        super().__init__(timeout=timedelta(seconds=timeout), bucket_cap_mb=BUCKET)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def on_exception(self, exception: BaseException) -> None:
        """Leave none behind of those that this process started, which may hang."""
        super().on_exception(exception)
        if isinstance(self.launcher, Launcher):
            self.launcher.ending = True
            if is_lost(exception):
                self.launcher.kill(signal.SIGKILL)


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, whose observer kills the first process without a word; this one lets it speak."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.children: list[subprocess.Popen] = []
        self.ending = False  # this process is on its way out, and will say why

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes of this machine, unless srun or torchrun has, and call `function`."""
        self.trainer = trainer
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # Lightning's observer is left with none
        threading.Thread(target=watch, args=(self.children, self._end), daemon=True).start()

    def kill(self, signum: Any) -> None:
        """Send a signal to the processes that this one has started."""
        for child in self.children:
            child.send_signal(signum)

    def _end(self) -> None:
        time.sleep(GRACE)  # in a daemon thread: not if the process ends meanwhile
        if self.ending:
            return
        print(f"error: {message(self.trainer)}", file=sys.stderr, flush=True)
        self.kill(signal.SIGKILL)
        os._exit(1)


def watch(children: list[subprocess.Popen], end: Callable[[], None], pause: float = 0.5) -> None:
    """Call `end` once one of the processes has failed; return when all are done."""
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            return end()
        time.sleep(pause)
    if any(child.poll() for child in children):
        end()
