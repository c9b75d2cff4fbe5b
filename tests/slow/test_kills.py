"""kill -9: twenty times at random moments of one run, and once in the middle of writing a checkpoint."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..test_cli import ROOT
from ..test_resume import CONFIG, assert_same_run, load, rows

KILLS, MOST_STEPS = 20, 40
# a validation after every 5th step, checkpoints after every 7th, a row a step
OPTIONS = ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(KILLS * (MOST_STEPS + 5) + 50)]
OPTIONS += ["--trainer.log_every_n_steps", "1"]


def command(folder: Path, run: Path, *args: str) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.replace("every_n_steps: 4", "every_n_steps: 7"))
    fit = [sys.executable, "-m", "lightning_iwae", "fit", "-c", str(config), *args]
    return [*fit, "--trainer.default_root_dir", str(run)]


def start(arguments: list[str], cwd: Path = ROOT) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(arguments: list[str]) -> None:
    process = start(arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def lines(path: Path) -> int:
    """Whole lines of a file."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], pause: float = 0.002) -> None:
    """Until `condition()`, in a process that is still running."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(pause)


def kill_in_training(arguments: list[str], run: Path, steps: int, delay: float | None) -> tuple[int, int]:
    """Kill once `steps` more rows than the restored ones are written: (restored, rows then).

    And after `delay`, or in the next write of a checkpoint if that is None.
    """
    metrics = run / "metrics.csv"
    restored = load(run)["metrics.csv"]["rows"] if (run / "checkpoints/last.ckpt").exists() else 0
    with open(metrics) if metrics.exists() else contextlib.nullcontext() as old:  # held, so that its number stays its
        before = os.fstat(old.fileno()).st_ino if old else None
        process = start(arguments)
        wait_for(process, lambda: metrics.exists() and metrics.stat().st_ino != before)  # the run has its own file
        wait_for(process, lambda: lines(metrics) > 1 + restored + steps)
        if delay is None:
            wait_for(process, (run / "checkpoints/.last.ckpt.part").exists, pause=0)
        else:
            time.sleep(delay)
        process.kill()
        process.communicate()
    assert process.returncode == -9, "the run was over before it was killed"
    return restored, lines(metrics) - 1


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_trace(tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(command(tmp_path, whole, *OPTIONS))
    draw, resume = random.Random(0), command(tmp_path, run, *OPTIONS, "--ckpt_path", "last")
    in_write = 0
    for kill in range(KILLS):
        delay = None if kill % 4 == 3 else draw.uniform(0, 0.05)
        restored, reached = kill_in_training(resume, run, draw.randint(1, MOST_STEPS), delay)
        assert reached > restored  # it landed in training, not in start-up
        assert len(rows(whole)) > reached
        in_write += bool(list(run.glob("checkpoints/.*")))
    assert in_write >= 1
    finish(resume)
    assert_same_run(run, whole)
    with capsys.disabled():
        print(f"\n{KILLS} kills in training, {in_write} of them in the middle of writing a checkpoint: no difference")


DIES_IN_A_WRITE = """
import os, sys, torch
from lightning_iwae.cli import main
save, calls = torch.save, []
def half(value, file):
    calls.append(1)
    if len(calls) == 4:
        save(value, "whole.tmp")
        content = open("whole.tmp", "rb").read()
        file.write(content[: len(content) // 2])
        file.flush()
        os.kill(os.getpid(), 9)
    save(value, file)
torch.save = half
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing_a_checkpoint_leaves_the_one_before(tmp_path):
    options = ["--trainer.max_epochs", "8"]
    finish(command(tmp_path, tmp_path / "whole", *options))
    run = tmp_path / "run"
    script = tmp_path / "dies.py"
    script.write_text(DIES_IN_A_WRITE)
    _, _, _, *fit = command(tmp_path, run, *options)
    process = start([sys.executable, str(script), *fit], cwd=tmp_path)
    process.communicate()
    assert process.returncode == -9
    (part,) = run.glob("checkpoints/.*")
    assert 0 < part.stat().st_size < (run / "checkpoints/last.ckpt").stat().st_size
    finish(command(tmp_path, run, *options, "--ckpt_path", "last"))
    assert_same_run(run, tmp_path / "whole")
