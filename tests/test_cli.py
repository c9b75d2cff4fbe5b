"""The command line as its users call it: every config, every sub-command, and what a mistake is answered with."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar

from lightning_iwae.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "conf").glob("**/*.yaml"))
OVERLAYS = [p for p in CONFIGS if p.parent.name == "objective"]
RUNS = [p for p in CONFIGS if p.parent.name in ("conf", "paper")]
# a few steps on data that are always there
SMALL = [
    *("--trainer.max_steps", "3", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "1"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.limit_train_batches", "3", "--model.test_particles", "70"),
]
STAND_IN = ["--data", "lightning_iwae.data.Digits", "--data.init_args.batch_size", "20"]
STAND_IN += ["--data.init_args.validation", "100", "--model.network.init_args.pixels", "64"]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)  # seconds; see test_figures.py


def fit(directory: Path, *args: str) -> list[dict[str, str]]:
    """Fit, and return the rows of metrics.csv."""
    main(["fit", *args, *SMALL, "--trainer.default_root_dir", str(directory)])
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def stand_in(config: Path | str) -> list[str]:
    """Options that put data which are always there in the place of those that a config would fetch."""
    fetched = re.search(r"class_path: lightning_iwae\.data\.(\w*MNIST|Omniglot)", (ROOT / config).read_text())
    return STAND_IN if fetched else []


@pytest.mark.parametrize("config", RUNS, ids=str)
def test_every_run_config_trains_and_logs_what_it_promises(config, tmp_path):
    rows = fit(tmp_path / "run", "-c", str(config), *stand_in(config))
    promised = "train/bound_theta train/bound_phi val/elbo val/iwae_64 val/log_px snr/phi dsnr/theta"
    for name in promised.split():
        values = column(rows, name)
        assert values and all(map(math.isfinite, values)), name
    assert column(rows, "val/kl_q_posterior")[0] == pytest.approx(
        column(rows, "val/log_px")[0] - column(rows, "val/elbo")[0], abs=10.0
    )
    checkpoints = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "last.ckpt"}
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "config.yaml", "metrics.csv"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_every_objective_is_an_overlay(overlay, tmp_path):
    rows = fit(tmp_path / "run", "-c", "conf/digits.yaml", "-c", str(overlay))
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    asked = yaml.safe_load(overlay.read_text())["model"]
    for side in ("theta", "phi"):
        assert {key: value for key, value in saved[side].items() if key in asked[side] or value is not None} == asked[
            side
        ]
    assert saved["samples"] == 64
    assert all(map(math.isfinite, column(rows, "train/bound_phi")))


def test_overlays_name_the_estimators_of_the_papers():
    def sides(name):
        model = yaml.safe_load((ROOT / f"conf/objective/{name}.yaml").read_text())["model"]
        return tuple((model[s]["estimator"], model[s]["particles"]) for s in ("theta", "phi"))

    assert sides("vae") == (("elbo", 1), ("elbo", 1))
    assert sides("iwae") == (("iwae", 64), ("iwae", 64))
    assert sides("miwae") == (("iwae", 8), ("iwae", 8))
    assert sides("piwae") == (("iwae", 64), ("iwae", 8))
    assert sides("piwae_1") == (("iwae", 64), ("iwae", 1))
    assert sides("ciwae") == (("ciwae", 64), ("ciwae", 64))
    assert sides("stl") == (("iwae", 64), ("stl", 64))
    for name, phi in (("dreg", "dreg"), ("vimco", "vimco"), ("rws", "wake"), ("ovis", "ovis")):
        assert sides(name) == (("iwae", 64), (phi, 64))
    assert sides("tvo") == (("tvo", 64), ("tvo", 64))
    assert sides("vr_iwae") == (("vr-iwae", 64), ("vr-iwae", 64))


def test_short_keys_win_over_overlays_and_the_seed_reaches_model_and_data(tmp_path):
    args = ["-c", "conf/digits.yaml", "-c", "conf/objective/iwae.yaml", "--model.phi.particles", "4"]
    args += ["--model.phi.estimator", "dreg", "--model.theta.particles", "16", "--model.samples", "32"]
    first = fit(tmp_path / "a", *args, "--seed_everything", "3")
    again = fit(tmp_path / "b", *args, "--seed_everything", "3")
    other = fit(tmp_path / "c", *args, "--seed_everything", "4")
    saved = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert saved["seed_everything"] == 3
    assert saved["model"]["phi"] == dict.fromkeys(("beta", "alpha", "gamma", "partition")) | {
        "estimator": "dreg",
        "particles": 4,
    }
    assert saved["model"]["samples"] == 32
    assert column(first, "train/bound_theta") == column(again, "train/bound_theta")
    assert column(first, "train/bound_theta")[0] != column(other, "train/bound_theta")[0]
    assert column(first, "val/iwae_64") == column(again, "val/iwae_64")


def test_a_config_that_a_run_saved_repeats_it(tmp_path):
    fit(tmp_path / "a", "-c", "conf/digits.yaml")
    fit(tmp_path / "b", "-c", str(tmp_path / "a/config.yaml"))
    a, b = (torch.load(tmp_path / d / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for d in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_test_prints_a_table_and_writes_evaluation_json(tmp_path, capsys):
    run = tmp_path / "run"
    fit(run, "-c", "conf/digits.yaml")
    metrics = (run / "metrics.csv").read_text()
    checkpoint = str(run / "checkpoints/best.ckpt")
    main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint, *SMALL])
    printed = capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    names = "iwae_64 log_px elbo kl_q_posterior kl_is_64 ess rate distortion k_hat_above_0.7"
    for name in names.split():
        assert set(result[name]) == {"mean", "se"}
        assert f"{result[name]['mean']:.4f} +- {result[name]['se']:.4f}" in printed
    assert result["kl_is_64"]["mean"] == pytest.approx(result["log_px"]["mean"] - result["iwae_64"]["mean"])
    assert result["particles"] == 70 and result["data"] == "Digits" and result["binarization"] == "dynamic"
    assert result["seed"] == 0 and isinstance(result["active_units"], int)
    assert (run / "metrics.csv").read_text() == metrics  # a test leaves the fit's files alone
    main(["test", "-c", "conf/digits.yaml", "--trainer.default_root_dir", str(run), "--ckpt_path", "best", *SMALL])
    assert json.loads((run / "evaluation.json").read_text()) == result
    main(["validate", "-c", str(run / "config.yaml"), "--ckpt_path", checkpoint, *SMALL])
    assert "Validation set" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text()) == result


def test_the_gaussian_run_logs_exact_values_beside_the_estimates(tmp_path):
    rows = fit(tmp_path / "run", "-c", "conf/gaussian.yaml")
    exact, estimate = column(rows, "val/exact_log_px")[-1], column(rows, "val/log_px")[-1]
    assert estimate < exact + 0.5  # a lower bound in expectation
    exact_kl, kl = column(rows, "val/exact_kl_q_posterior")[-1], column(rows, "val/kl_q_posterior")[-1]
    assert kl < exact_kl + 0.5


def test_print_config_round_trips(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "conf/digits.yaml", "--model.phi.particles", "2", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(tmp_path / "again.yaml"), "--print_config"])
    assert capsys.readouterr().out == printed
    assert yaml.safe_load(printed)["model"]["phi"]["particles"] == 2


def test_references_in_a_config_follow_overrides(tmp_path):
    overlay = tmp_path / "tied.yaml"
    overlay.write_text("model: {theta: {particles: '${model.samples}'}, phi: {particles: '${model.samples}'}}\n")
    fit(tmp_path / "run", "-c", "conf/digits.yaml", "-c", str(overlay), "--model.samples", "16")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert saved["theta"]["particles"] == saved["phi"]["particles"] == 16


def test_runs_without_a_directory_get_a_fresh_one_each(tmp_path, monkeypatch, capsys):
    config = str(ROOT / "conf/digits.yaml")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["fit", "-c", config, *SMALL])
    printed = capsys.readouterr().out
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all((run / "metrics.csv").exists() for run in runs)
    assert all(f"The run's files are in: runs/{run.name}" in printed for run in runs)
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


MISTAKES = {
    "particles": (["--model.phi.particles", "7"], "model.phi.particles must divide samples (64): one of 1, 2, 4, 8"),
    "estimator": (["--model.phi.estimator", "dregs"], "unknown estimator 'dregs'"),
    "wrong side": (["--model.theta.estimator", "dreg"], "for the other side only"),
    "option": (["--model.phi.beta", "0.1"], "has no option 'beta'"),
    "missing option": (["--model.phi.estimator", "ciwae"], "needs the option 'beta'"),
    "accumulate": (["--model.accumulate", "0"], "model.accumulate must be at least 1. Got 0."),
    "clip": (["--model.clip_phi", "-1"], "model.clip_phi must be positive"),
    "checkpoint": (["--ckpt_path", "nowhere.ckpt"], "no file nowhere.ckpt"),
    "batch": (["--data.init_args.batch_size", "0"], "data.batch_size must be at least 1. Got 0."),
    "pixels": (["--model.network.init_args.pixels", "49"], "pixels is 49"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_one_message_and_status_2(mistake, tmp_path, capsys):
    args, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "conf/digits.yaml", *args, "--trainer.default_root_dir", str(tmp_path / "run"), *SMALL])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_fit_does_not_write_over_another_run(tmp_path, capsys):
    fit(tmp_path / "run", "-c", "conf/digits.yaml")
    before = (tmp_path / "run/metrics.csv").read_text()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", "-c", "conf/digits.yaml")
    assert stop.value.code == 2 and "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.csv").read_text() == before


def test_the_module_is_runnable(tmp_path):
    command = [sys.executable, "-m", "lightning_iwae", "fit", "-c", "conf/digits.yaml", *SMALL]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert f"The run's files are in: {tmp_path / 'run'}" in done.stdout
    for noise in ("litlogger", "LeafSpec", "Traceback"):
        assert noise not in done.stderr + done.stdout


@pytest.mark.parametrize(("words", "kinds"), [
    ([], ["Progress"]),
    (["--trainer.enable_progress_bar", "false"], []),
    (["--trainer.callbacks", "lightning.pytorch.callbacks.TQDMProgressBar"], ["TQDMProgressBar"]),
])  # fmt: skip
def test_a_run_has_the_quick_progress_bar_unless_another_or_none_is_wanted(words, kinds, monkeypatch, tmp_path):
    def before_fit(cli):
        found.extend(type(c).__name__ for c in cli.trainer.callbacks if isinstance(c, ProgressBar))
        raise ValueError("far enough")

    found = []
    monkeypatch.setattr("lightning_iwae.cli.commands.CLI.before_fit", before_fit)
    config = ["-c", str(ROOT / "conf/digits.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises((SystemExit, ValueError)):
        main(["fit", *config, "--trainer.callbacks", "null", *words])
    assert found == kinds
