"""One fit at a time in a run's directory."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest

from lightning_iwae.cli import commands, lock, main
from lightning_iwae.data import Digits

from .test_cli import ROOT
from .test_resume import CONFIG, refused

DIES = """
import os, sys
from pathlib import Path
from lightning_iwae.cli.lock import sole_fit
with sole_fit(Path(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return str(path)


def fit(config, run, *args):
    main(["fit", "-c", config, "--trainer.default_root_dir", str(run), "--trainer.max_epochs", "1", *args])


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("second", [[], ["--ckpt_path", "last"], ["--trainer.fast_dev_run", "true"]], ids=str)
def test_a_second_fit_is_refused_while_the_first_one_goes_on(second, config, tmp_path, monkeypatch, capsys):
    run, load, messages = tmp_path / "run", Digits.load, []

    def meanwhile(data):
        messages.append(refused(capsys, config, run, *second))
        assert names(run) == {".lock"}
        return load(data)

    monkeypatch.setattr(Digits, "load", meanwhile)
    fit(config, run)
    holder = f"process {os.getpid()} on {platform.node()}"
    assert messages == [f"error: trainer.default_root_dir: {run} is in use by another fit ({holder})."]
    assert names(run) == {"checkpoints", "config.yaml", "metrics.csv"}


def test_a_killed_fit_keeps_nobody_out(tmp_path):
    run = tmp_path / "deep/run"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", DIES, str(run)], cwd=ROOT).returncode == -9
        assert names(run) == {".lock"}
    with lock.sole_fit(run), pytest.raises(ValueError, match="is in use"), lock.sole_fit(run):
        raise AssertionError
    assert names(run) == set()


@pytest.mark.parametrize("there", [True, False])
def test_a_fit_that_writes_nothing_leaves_nothing(there, tmp_path):
    run = tmp_path / "run"
    if there:
        run.mkdir()
    with pytest.raises(ZeroDivisionError), lock.sole_fit(run):
        assert names(run) == {".lock"}
        raise ZeroDivisionError
    assert names(tmp_path) == ({"run"} if there else set())


def test_without_locks_a_fit_goes_on_with_a_warning(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    expected = r"run can't be locked, as its file system has no locks \(No locks available\). Start no second fit in it"
    with pytest.warns(UserWarning, match=expected), lock.sole_fit(tmp_path / "run"):
        pass


def test_a_lock_that_is_taken_away_while_it_is_taken_is_none(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(file, operation):
        (tmp_path / ".lock").unlink()  # by a fit that ends
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="was in use by another fit until now"), lock.sole_fit(tmp_path):
        raise AssertionError


def test_a_fit_does_not_start_afresh_over_one_that_ended_while_it_was_starting(config, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"

    @contextmanager
    def after_another(directory):
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("the other one's")
        yield

    monkeypatch.setattr(commands, "sole_fit", after_another)
    message = refused(capsys, config, tmp_path / "run", "--ckpt_path", "last")
    assert message.endswith(f"{tmp_path / 'run'} was in use by another fit until now. Start again.")
    assert checkpoint.read_text() == "the other one's" and not (tmp_path / "run/metrics.csv").exists()
