"""docs/metrics.md names everything that a run logs."""

import csv
import re
import sys
from fnmatch import fnmatch

import pytest

from lightning_iwae.cli import main

from .test_cli import ROOT, SMALL

PAGE = (ROOT / "docs/metrics.md").read_text()
NAMED = set(re.findall(r"`((?:train|val|snr|dsnr|test)/[\w./*]+)`", PAGE))
NAMED |= {f"snr/{side}{end}" for side in ("phi", "theta") for end in re.findall(r"`(_q\d\d)`", PAGE)}
OWN = {"step", "epoch"}  # the logger's axis, and Lightning's
ESTIMATORS = """
trainer:
  callbacks:
    - {class_path: lightning_iwae.callbacks.Evaluation, init_args: {particles: 50, size: 10}}
    - class_path: lightning_iwae.callbacks.GradientSNR
      init_args: {draws: 4, size: 4, estimators: [iwae, {estimator: elbo, particles: 1}]}
"""


@pytest.mark.parametrize("config", ["digits", "gaussian"])
def test_every_logged_name_is_on_the_page(config, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)
    changes = "[{epoch: 1, theta: {estimator: ciwae, particles: 8, beta: 0.5}}]"
    run = ["--trainer.default_root_dir", str(tmp_path / "run"), "--model.schedule", changes]
    small = [*SMALL, "--trainer.max_steps", "6", "--trainer.max_epochs", "2", "--model.kl_warmup", "1.0"]
    snr = tmp_path / "snr.yaml"
    snr.write_text(ESTIMATORS)
    main(["fit", "-c", f"conf/{config}.yaml", "-c", str(snr), *small, *run])
    with open(tmp_path / "run/metrics.csv") as file:
        logged = set(next(csv.reader(file)))
    assert {"train/bound_theta", "train/kl_weight", "train/theta_beta", "val/log_px", "snr/phi_q25"} <= logged
    assert {"snr/phi/iwae", "dsnr/phi/elbo"} <= logged
    assert {name for name in logged - OWN if not any(fnmatch(name, known) for known in NAMED)} == set()
