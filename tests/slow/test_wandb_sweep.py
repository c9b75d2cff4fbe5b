"""The real `wandb sweep` and `wandb agent`, and runs that are killed or have two processes, against a stand-in."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ..test_cli import ROOT
from ..test_figures import OF_MODEL
from ..test_wandb import FEW, KEY, NO_OTHERS
from .test_kills import wait_for
from .wandb_server import SWEEP, Server

pytest.importorskip("wandb", reason="wandb is not installed: pip install 'lightning-iwae[wandb]'")

PICTURES = {f"figures/{name}" for name in OF_MODEL | {"training", "snr"}}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in, and a working directory whose processes know of no other."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "small.yaml").write_text(FEW)
    monkeypatch.chdir(tmp_path)
    with Server() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
        env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield server


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen) -> str:
    """Of a process that must succeed."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def run(*command: str) -> str:
    return output(start(*command))


RUN = ["--trainer.default_root_dir", "run"]


def fit(*args: str) -> list[str]:
    configs = ["-c", "conf/digits.yaml", "-c", "conf/logger/wandb.yaml", "-c", "small.yaml"]
    return ["python", "-m", "lightning_iwae", "fit", *configs, *args]


def metrics(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def logged(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows if row.get(name)]


@pytest.mark.slow
def test_an_agent_runs_a_grid_of_k_and_estimator(server):
    sweep = yaml.safe_load((ROOT / "sweeps/wandb.yaml").read_text())
    at = sweep["command"].index("conf/digits.yaml")
    sweep["command"][at + 1 : at + 1] = ["-c", "small.yaml"]
    grid = {"model.phi.particles": {"values": [2, 4]}, "model.phi.estimator": {"values": ["iwae", "dreg"]}}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep | {"method": "grid", "parameters": grid}))
    said = run("wandb", "sweep", "sweep.yaml")
    agents = [start("wandb", "agent", f"me/lightning-iwae/{SWEEP}") for _ in range(2)]  # at once
    said += "".join(output(agent) for agent in agents)

    assert server.sweep["metric"] == {"name": "val/log_px", "goal": "maximize"}
    assert server.agents == 2 and len(server.runs) == 4
    assert {path.name for path in Path("runs", SWEEP).iterdir()} == set(server.runs)
    points = set()
    for name, sent in server.runs.items():
        directory = Path("runs", SWEEP, name)
        rows = metrics(directory)
        for metric in ("train/bound_theta", "train/bound_phi", "snr/phi", "snr/theta", "snr/phi/dreg", "val/log_px"):
            assert sent.rows(metric) == logged(rows, metric) != [], metric
        for picture in PICTURES:
            ((_, value),) = sent.rows(picture)
            assert set(value["filenames"]) <= sent.files
        assert sent.exit == 0 and sent.sweep == SWEEP
        phi, saved = sent.config["model"]["phi"], yaml.safe_load((directory / "config.yaml").read_text())
        assert phi == saved["model"]["phi"] and sent.config["model"]["network"]["init_args"]["latent"] == 10
        points.add((sent.config["model.phi.particles"], sent.config["model.phi.estimator"]))
        assert (phi["particles"], phi["estimator"]) in points
    assert points == {(2, "iwae"), (2, "dreg"), (4, "iwae"), (4, "dreg")}

    assert server.keys == {KEY} and KEY not in said and "locked" not in said
    files = [path for folder in ("runs", "wandb", "home") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 40 and not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_in_its_own_with_every_row(server):
    command = fit(*NO_OTHERS, *RUN, "--ckpt_path", "last")
    process = start(*command, "--trainer.max_epochs", "-1")
    try:
        wait_for(process, lambda: Path("run/checkpoints/last.ckpt").exists() and len(metrics(Path("run"))) > 15)
    finally:
        process.kill()
        process.communicate()
    kept = Path("run/wandb/id").read_text().strip()
    epochs = int(metrics(Path("run"))[-1]["step"]) // 12 + 2
    run(*command, "--trainer.max_epochs", str(epochs))
    assert set(server.runs) == {kept} and server.received.count("RunResumeStatus") == 2
    (sent,) = server.runs.values()
    assert [sent.history[line]["_step"] for line in range(len(sent.history))] == list(range(len(sent.history)))
    for metric in ("train/bound_theta", "val/elbo"):
        assert dict(sent.rows(metric)) == dict(logged(metrics(Path("run")), metric))


@pytest.mark.slow
def test_a_sweeps_run_that_the_cluster_stops_says_so_and_is_found_again(server, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", SWEEP)
    monkeypatch.setenv("WANDB_RUN_ID", "run7")  # as the agent sets them, each time that it is given the run
    command = fit(*NO_OTHERS, "--ckpt_path", "last")  # no directory is given
    directory = Path("runs", SWEEP, "run7")
    process = start(*command, "--trainer.max_epochs", "-1")
    wait_for(process, lambda: (directory / "metrics.csv").exists() and len(metrics(directory)) > 10)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    sent = server.runs["run7"]
    assert (process.returncode, sent.exit, sent.preempted) == (138, 138, True)
    assert sent.rows("train/bound_phi") == logged(metrics(directory), "train/bound_phi") != []  # all is sent
    said = run(*command, "--trainer.max_epochs", str(int(metrics(directory)[-1]["step"]) // 12 + 2))
    assert set(server.runs) == {"run7"} and sent.exit == 0 and "afresh" not in said
    steps = [step for step, _ in sent.rows("train/bound_phi")]
    assert steps == sorted(steps) and len(steps) - len(set(steps)) <= 1
    assert dict(sent.rows("train/bound_phi")) == dict(logged(metrics(directory), "train/bound_phi"))


@pytest.mark.slow
def test_one_of_two_processes_talks_to_wandb(server):
    run(*fit(*NO_OTHERS, *RUN, "--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"))
    assert len(server.runs) == 1 and server.received.count("Viewer") == 1
    (sent,) = server.runs.values()
    for metric in ("train/bound_theta", "val/elbo"):
        assert sent.rows(metric) == logged(metrics(Path("run")), metric) != []
    assert len(list(Path("run/wandb").glob("run-*"))) == 1
