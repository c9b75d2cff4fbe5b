"""The overlay for two processes, as its users run it: one directory, signals to either process, kills, resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..test_cli import ROOT
from ..test_resume import CONFIG, assert_same_run, load
from .test_kills import finish, lines, start, wait_for

pytestmark = pytest.mark.slow
DDP = ["-c", "conf/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--model.whole_batch_noise", "true"]
OPTIONS = ["--trainer.max_epochs", "30", "--trainer.log_every_n_steps", "1"]


def command(folder: Path, run: Path, *args: str) -> list[str]:
    (folder / "tiny.yaml").write_text(CONFIG)
    fit = [sys.executable, "-m", "lightning_iwae", "fit", "-c", str(folder / "tiny.yaml"), *args, *OPTIONS]
    return [*fit, "--trainer.default_root_dir", str(run)]


def child(process: subprocess.Popen) -> int:
    """The process that Lightning has started: rank 1."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def wait_until_gone(pid: int) -> None:
    """A process that has ended may be left as a zombie, state Z, by whoever inherits it."""
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    finish(command(folder, folder / "run", *DDP))
    return folder / "run"


def test_two_processes_train_as_one_does(two, tmp_path):
    finish(command(tmp_path, tmp_path / "one", "--model.whole_batch_noise", "true"))
    a, b = load(two)["state_dict"], load(tmp_path / "one")["state_dict"]
    for key in a:  # Adam and momentum have taken 150 steps of up to 0.01
        assert (a[key] - b[key]).abs().max() < 1e-3, key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_process_stops_both_and_they_go_on_exactly(rank, two, tmp_path):
    run = tmp_path / "run"
    process = start(command(tmp_path, run, *DDP))
    wait_for(process, lambda: lines(run / "metrics.csv") > 20)
    other = child(process)
    os.kill(other if rank else process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 138, errors
    assert errors.count("SIGUSR1: stopped after step") == 1 and "Traceback" not in errors
    wait_until_gone(other)
    assert 5 < load(run)["global_step"] < 150
    finish(command(tmp_path, run, *DDP, "--ckpt_path", "last"))
    assert_same_run(run, two)


def test_two_processes_killed_go_on_exactly_in_the_directory_that_they_chose_together(two, tmp_path):
    ddp = [str(ROOT / word) if word.endswith(".yaml") else word for word in DDP]
    process = start(command(tmp_path, two, *ddp)[:-2], cwd=tmp_path)  # without --trainer.default_root_dir

    def metrics():
        return next(iter(tmp_path.glob("runs/*/metrics.csv")), tmp_path / "none")

    wait_for(process, lambda: lines(metrics()) > 30)
    os.kill(child(process), signal.SIGKILL)
    process.kill()
    process.communicate()
    (run,) = tmp_path.glob("runs/*")
    assert {path.name for path in run.iterdir()} == {".lock", "checkpoints", "config.yaml", "metrics.csv"}
    finish(command(tmp_path, run, *DDP, "--ckpt_path", "last"))
    assert_same_run(run, two)
