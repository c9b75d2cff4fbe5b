"""A real sweep of the digits by two workers on PostgreSQL, with everything going wrong that clusters have on offer.

Of 20 trials none is lost and none counted twice although a worker is killed -9 twice, with the fit that it has in
hand, and the database is gone for a while.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from lightning_iwae.sweep import storage, study

from ..test_cli import ROOT
from .postgres import PASSWORD, Postgres

pytestmark = pytest.mark.slow
TRIALS = 20
SWEEP = {
    "study": "faults",
    "configs": ["conf/digits.yaml"],
    "options": {
        "trainer.check_val_every_n_epoch": 2,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": [
            {"class_path": "lightning_iwae.callbacks.Evaluation", "init_args": {"particles": 100, "size": 50}},
            {"class_path": "lightning_iwae.callbacks.Checkpoints", "init_args": {"every_n_steps": 10}},
        ],
    },
    "space": {
        "model.phi.estimator": ["iwae", "dreg", "stl", "ciwae"],
        "model.phi.particles": {"divisors_of": "model.samples"},
        "model.phi.beta": {"low": 0.0, "high": 0.5, "when": {"model.phi.estimator": "ciwae"}},
    },
    "trials": TRIALS,
    "budget": {"steps": 60},
    "heartbeat": 1,
    "grace": 10,
}


@pytest.fixture(scope="module")
def postgres():
    with Postgres() as server:
        yield server


@pytest.fixture
def workers(tmp_path):
    made = Workers(tmp_path)
    yield made
    made.stop()


class Workers:
    """Two workers with a log; one that is killed is started again."""

    url: str

    def __init__(self, folder):
        self.folder, self.running = folder, {}

    def start(self, name):
        command = [sys.executable, "-m", "lightning_iwae", "sweep", "-c", str(self.folder / "sweep.yaml")]
        with open(self.folder / f"{name}.log", "a") as log:
            self.running[name] = subprocess.Popen(
                [*command, "--out", str(self.folder / "out")],
                cwd=ROOT,
                env=os.environ | {storage.VARIABLE: self.url, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, name):
        """kill -9 while it has a trial in hand, and start another."""
        worker = self.running[name]
        deadline = time.monotonic() + 120
        while not (fits := children(worker.pid)):
            assert time.monotonic() < deadline and worker.poll() is None, self.logs()
            time.sleep(0.1)
        run = Path(f"/proc/{fits[0]}/cmdline").read_text().partition("default_root_dir=")[2].partition("\0")[0]
        while not (Path(run) / "checkpoints/last.ckpt").exists():  # in the middle of it
            assert time.monotonic() < deadline and worker.poll() is None, self.logs()
            time.sleep(0.01)
        worker.kill()
        worker.wait()
        deadline = time.monotonic() + 20  # a dying process has its memory to give back
        while any(map(is_alive, fits)):
            assert time.monotonic() < deadline, fits
            time.sleep(0.1)
        self.start(name)
        return run

    def stop(self):
        for worker in self.running.values():
            worker.kill()
            worker.wait()

    def logs(self):
        return {path.name: path.read_text()[-3000:] for path in self.folder.glob("*.log")}


def children(pid):
    """Its fits; not those processes by which it tries the settings."""
    with suppress(OSError):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if b"default_root_dir" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return []


def is_alive(pid):
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_twenty_trials_survive_two_kills_and_a_restart_of_the_database(postgres, workers, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    workers.url = url = postgres.url(quote(PASSWORD, safe=""))
    for name in ("a", "b"):  # at once, into an empty database
        workers.start(name)
    workers.kill("a")
    postgres.restart(seconds=5)
    workers.kill("a")
    for name, worker in workers.running.items():
        assert worker.wait(timeout=900) == 0, (name, workers.logs())

    loaded = optuna.load_study(study_name="faults", storage=storage.open_storage(url))
    tried = study.attempts(loaded.trials)
    finished = [t for t in loaded.trials if t.state == TrialState.COMPLETE]
    assert sorted(t.user_attrs["slot"] for t in finished) == list(range(TRIALS))
    assert all(t.state in (TrialState.COMPLETE, TrialState.FAIL) for t in loaded.trials)
    counted = [t for attempts in tried.values() for t in attempts]
    assert Counter(t.user_attrs["outcome"] for t in counted if t.state == TrialState.FAIL) == {"lost": 2}
    rest = {t.number for t in loaded.trials} - {t.number for t in counted}  # both laid out the empty study at once
    assert {loaded.trials[number].user_attrs["outcome"] for number in rest} <= {"surplus"}
    again = [slot for slot, attempts in tried.items() if len(attempts) > 1]
    for slot in again:  # with the same settings, in the same directory, which was not begun anew
        assert len({str(t.user_attrs["point"]) for t in tried[slot]}) == 1
    runs = sorted(path.name for path in (tmp_path / "out/runs").iterdir() if path.is_dir())
    assert runs == [f"{slot:03}" for slot in range(TRIALS)]

    page = (tmp_path / "out/sweep.md").read_text()
    assert f"{TRIALS} trials: {TRIALS} finished; 2 begun again" in page
    assert page.count("its worker gave no sign of life") == 2
    html = (tmp_path / "out/sweep.html").read_text()
    assert all(part in html for part in ("Parallel coordinates", "Importances", "History"))
    told = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "The storage does not answer, and is asked again" in told and "The storage answers again." in told

    secrets = [PASSWORD.encode(), quote(PASSWORD, safe="").encode()]
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert not any(secret in path.read_bytes() for secret in secrets), path


def test_a_wrong_password_is_refused_at_once_and_not_repeated(postgres, workers, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | {"patience": 3}, sort_keys=False))
    workers.url = postgres.url("wrong-word")
    workers.start("a")
    assert workers.running["a"].wait(timeout=120) == 2
    told = (tmp_path / "a.log").read_text()
    assert "password authentication failed" in told and "wrong-word" not in told and "Traceback" not in told


def test_a_signal_to_the_batch_scripts_worker_gives_its_trial_back(postgres, workers, tmp_path):
    text = SWEEP | {"study": "stopped", "trials": 1, "budget": {"steps": 400}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    workers.url = postgres.url(quote(PASSWORD, safe=""))
    workers.start("a")
    metrics = tmp_path / "out/runs/000/metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline, workers.logs()
        time.sleep(0.2)
    workers.running["a"].send_signal(signal.SIGUSR1)
    assert workers.running["a"].wait(timeout=120) == 138, workers.logs()
    before = metrics.read_text().splitlines()
    workers.start("a")
    assert workers.running["a"].wait(timeout=300) == 0, workers.logs()
    rows = metrics.read_text().splitlines()
    assert [row.split(",")[0] for row in rows[: len(before)]] == [row.split(",")[0] for row in before]
    assert "1 finished; 1 begun again" in (tmp_path / "out/sweep.md").read_text()


def test_pruning_reaches_every_process_of_a_trial(workers, tmp_path):
    ddp = {
        "study": "pruned",
        "configs": ["conf/digits.yaml", "conf/hardware/ddp.yaml"],
        "options": SWEEP["options"] | {"trainer.accelerator": "cpu"},
        "space": {"model.phi.particles": [8]},
        "pruner": {"class_path": "ThresholdPruner", "init_args": {"lower": 0.0}},  # log p(x) is below it
        "trials": 1,
        "budget": {"steps": 3000},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | ddp, sort_keys=False))
    workers.url = f"sqlite:///{tmp_path / 'study.db'}"
    workers.start("a")
    seen = set()
    while workers.running["a"].poll() is None:
        seen |= {child for fit in children(workers.running["a"].pid) for child in descendants(fit)}
        time.sleep(0.1)
    assert workers.running["a"].returncode == 0, workers.logs()
    (trial,) = optuna.load_study(study_name="pruned", storage=workers.url).trials
    assert trial.state == TrialState.PRUNED and max(trial.intermediate_values) < 2000
    assert len(seen) >= 1 and not any(map(is_alive, seen))
    log = (tmp_path / "out/runs/000/log.txt").read_text()
    assert "SIGTERM: stopped after step" in log and "Traceback" not in log


def descendants(pid):
    """Processes that a process has started, by any of its threads."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found
