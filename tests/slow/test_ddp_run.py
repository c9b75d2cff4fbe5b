"""The overlay for two processes, as its users run it: one directory, signals to either process, kills, resume."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..test_cli import ROOT
from ..test_resume import CONFIG, assert_same_run, load, rows
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    finish(command(folder, folder / "run", *DDP))
    return folder / "run"


def test_two_processes_train_as_one_does(two, tmp_path):
    finish(command(tmp_path, tmp_path / "one", "--model.whole_batch_noise", "true"))
    names = ("train/bound_phi", "val/elbo", "snr/theta")
    for name in names[:1]:  # logged by the first process, of its half of the batch
        ours, theirs = ([float(row[name]) for row in rows(r) if row[name]] for r in (two, tmp_path / "one"))
        assert len(ours) == len(theirs) == 150 and ours == pytest.approx(theirs, abs=12)
    a, b = load(two)["state_dict"], load(tmp_path / "one")["state_dict"]
    for key in a:
        assert a[key].tolist() == pytest.approx(b[key].tolist(), abs=1e-3) if a[key].ndim < 2 else True
        assert (a[key] - b[key]).abs().max() < 1e-3


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
    assert not Path(f"/proc/{other}").exists()
    assert 15 < load(run)["global_step"] < 150
    finish(command(tmp_path, run, *DDP, "--ckpt_path", "last"))
    assert_same_run(run, two)


def test_two_processes_killed_go_on_exactly_in_the_directory_that_they_chose_together(two, tmp_path):
    arguments = command(tmp_path, two, *DDP)[:-2]
    arguments[4] = str(tmp_path / "tiny.yaml")
    arguments[arguments.index("conf/hardware/ddp.yaml")] = str(ROOT / "conf/hardware/ddp.yaml")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    def metrics():
        return next(iter(tmp_path.glob("runs/*/metrics.csv")), tmp_path / "none")

    wait_for(process, lambda: lines(metrics()) > 30)
    os.kill(child(process), signal.SIGKILL)
    process.kill()
    process.communicate()
    (run,) = tmp_path.glob("runs/*")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv"}
    finish(command(tmp_path, run, *DDP, "--ckpt_path", "last"))
    assert_same_run(run, two)
