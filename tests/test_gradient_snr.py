"""GradientSNR's further estimators of phi's gradient: on the draws of the one trained with, which do not notice."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent

from lightning_iwae import curves
from lightning_iwae.callbacks import GradientSNR
from lightning_iwae.callbacks.gradient_snr import Measured, measure, named
from lightning_iwae.cli import main
from lightning_iwae.schedule import Change
from lightning_iwae.sides import Side

from .test_callbacks import Recorded, Watch, digits, fit, gaussian, iw_module, restless, same, snr_rows, toy
from .test_cli import ROOT, SMALL


@pytest.fixture(autouse=True)
def one_thread(torch_as_it_was):
    torch.set_num_threads(1)


def logged(*estimators, module=None, **options):
    """What is logged at the first step, in double precision."""
    callback = GradientSNR(1000, **{"draws": 6, "size": 10} | options, estimators=estimators)
    _, logger = fit(module or iw_module(), toy(), callback, precision="64-true", limit_val_batches=0)
    ((_, metrics),) = snr_rows(logger).items()
    return metrics


# ------------------------------------------------------------------------------------------------ what is measured
def test_the_one_that_is_trained_with_is_found_again():
    metrics = logged("iwae", "dreg", Side("iwae", 8))
    assert metrics["snr/phi/iwae_particles_8"] != pytest.approx(metrics["snr/phi"], rel=0.01)
    metrics = logged("iwae")
    for ratio in ("snr", "dsnr"):
        assert metrics[f"{ratio}/phi/iwae"] == pytest.approx(metrics[f"{ratio}/phi"], rel=1e-9)


def test_others_leave_the_figures_of_the_run_as_they_are():
    alone = logged()
    several = logged("dreg", "vimco", "sleep", Measured("ciwae", beta=0.5), Measured("elbo", particles=1))
    assert alone == {name: several[name] for name in alone}
    assert set(several) - set(alone) == {
        f"{ratio}/phi/{name}" for ratio in ("snr", "dsnr") for name in ("dreg", "vimco", "sleep", "ciwae", "elbo")
    }
    assert len(set(several.values())) == len(several) - 1  # floors of the SNR are equal
    assert several == logged("dreg", "vimco", "sleep", Measured("ciwae", beta=0.5), Measured("elbo", particles=1))


def test_snr_of_another_estimator_is_the_closed_form_of_that_estimator(monkeypatch):
    data = toy(size=64, batch_size=64)
    data.setup()
    model = gaussian(3, distance=0.3, mu=data.probe(64).mean(0))
    expected = {name: model.exact_snr(data.probe(64), "phi", name, 4, 1).numpy() for name in ("elbo", "stl")}
    module = iw_module(model, samples=4, theta=Side("elbo", 1), phi=Side("elbo", 1))
    recorded = Recorded(monkeypatch)
    callback = GradientSNR(1000, draws=300, size=64, estimators=["stl"])
    _, logger = fit(module, data, callback, precision="64-true", limit_val_batches=0, limit_train_batches=1)
    ((_, metrics),) = snr_rows(logger).items()
    draws, resampled = recorded.of("phi/stl"), []
    for rows in np.random.default_rng(0).integers(300, size=(200, 300)):
        resampled.append((np.abs(draws[rows].mean(0)) / draws[rows].std(0, ddof=1)).mean())
    error = np.std(resampled, ddof=1)
    assert abs(metrics["snr/phi/stl"] - expected["stl"].mean()) < 4.5 * error
    assert abs(metrics["snr/phi/stl"] - expected["elbo"].mean()) > 8 * error  # of the one trained with


def test_particles_are_those_of_phi_at_the_epoch():
    changes = [Change(1, samples=16, phi=Side("iwae", 16))]
    callback = GradientSNR(every_n_steps=4, draws=6, size=10, estimators=["iwae", Measured("elbo", 1)])
    module = iw_module(schedule=changes)
    _, logger = fit(module, toy(), callback, precision="64-true", limit_val_batches=0, max_epochs=2)
    for step, metrics in snr_rows(logger).items():  # 4 steps an epoch; the measurement at 4 ends the first
        assert metrics["snr/phi/iwae"] == pytest.approx(metrics["snr/phi"], rel=1e-9), step
    assert list(snr_rows(logger)) == [0, 4, 8]


def test_frozen_inference_network_has_nothing_to_measure():
    network = gaussian()
    network.inference.requires_grad_(False)
    assert set(measure(iw_module(network), torch.zeros(4, 3), 4, {"dreg": Side("dreg", 4)})) == {"theta"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_does_not_notice(accumulate):
    runs = []
    for estimators in (None, ["dreg", "sleep", "vimco"]):
        watch = Watch()
        watched = [] if estimators is None else [GradientSNR(1, 4, 10, estimators)]
        fit(iw_module(restless(), accumulate=accumulate), digits(), *watched, watch, max_epochs=2)
        runs.append(watch.seen)
    assert same(*runs)


# ------------------------------------------------------------------------------------------------ names
def test_names_tell_estimators_apart():
    listed = [Measured("dreg"), Measured("ciwae", beta=0.5), Measured("ciwae", 4, beta=0.1), Side("stl", 2)]
    assert list(named(listed)) == ["dreg", "ciwae_beta_0.5", "ciwae_particles_4_beta_0.1", "stl"]


def test_one_that_is_listed_twice_is_refused():
    with pytest.raises(ValueError, match=r"GradientSNR.estimators must differ from each other. Got dreg twice"):
        GradientSNR(estimators=["dreg", "stl", "dreg"])


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("estimators", "options", "message"),
    [
        (["iwae", "derg"], {}, r"GradientSNR.estimators\[1\]: unknown estimator 'derg'.* Did you mean dreg"),
        (["ciwae"], {}, r"estimators\[0\]: estimator 'ciwae' needs the option 'beta'"),
        ([Measured("ciwae", beta=2.0)], {}, r"estimators\[0\].beta must lie in \[0, 1\]. Got 2.0"),
        ([Measured("dreg", 3)], {}, r"estimators\[0\].particles must divide samples \(8\): one of 1, 2, 4, 8. Got 3"),
        (["vimco"], {"phi": Side("elbo", 1)}, r"estimators\[0\].particles: estimator 'vimco' needs at least 2"),
        (["dreg"], {"kl_warmup": 1.0}, r"estimators\[0\]: estimator 'dreg' can't be used with a KL weight below 1"),
        ([Measured("dreg", 8)], {"schedule": [Change(1, 4, Side("iwae", 4))]}, r"divide samples \(4\)"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(estimators, options, message):
    callback, seen = GradientSNR(estimators=estimators), Watch()
    with pytest.raises(ValueError, match=message):
        fit(iw_module(**options), toy(), callback, seen, limit_val_batches=0)
    assert seen.seen == []


class Binary(nn.Module):
    """z in {0, 1}^4 of 64 pixels."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = nn.Linear(64, 4), nn.Linear(4, 64)

    def prior(self):
        return Independent(Bernoulli(logits=torch.zeros(4)), 1)

    def posterior(self, x):
        return Independent(Bernoulli(logits=self.inference(x)), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative(z), validate_args=False), 1)


def test_discrete_z_is_measured_by_scores_and_refuses_paths():
    def run(*estimators):
        callback = GradientSNR(1000, 4, 4, estimators)
        module = iw_module(Binary(), phi=Side("vimco", 4))
        return snr_rows(fit(module, digits(), callback, limit_val_batches=0)[1])

    assert math.isfinite(run("rloo")[0]["snr/phi/rloo"])
    with pytest.raises(ValueError, match=r"estimator 'dreg' needs a reparameterised posterior"):
        run("rloo", "dreg")


# ------------------------------------------------------------------------------------------------ by a config
CONFIG = """
trainer:
  callbacks:
    - {class_path: lightning_iwae.callbacks.Evaluation, init_args: {particles: 50, size: 10}}
    - class_path: lightning_iwae.callbacks.GradientSNR
      init_args: {draws: 4, size: 4, estimators: ESTIMATORS}
"""


@pytest.fixture
def overlay(tmp_path, monkeypatch):
    """Fits conf/gaussian.yaml for 3 steps with these estimators, and reads metrics.csv."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)

    def run(estimators):
        (tmp_path / "snr.yaml").write_text(CONFIG.replace("ESTIMATORS", estimators))
        out = ["--trainer.default_root_dir", str(tmp_path / "run")]
        main(["fit", "-c", "conf/gaussian.yaml", "-c", str(tmp_path / "snr.yaml"), *SMALL, *out])
        with open(tmp_path / "run/metrics.csv") as file:
            return list(csv.DictReader(file))

    return run


def test_config_lists_names_and_settings(overlay):
    rows = overlay("[dreg, {estimator: ciwae, beta: 0.05}, {estimator: tvo, partition: [0, 0.5, 1]}]")
    measured = [row for row in rows if row["snr/draws"]]
    assert len(measured) == 1
    for name in ("dreg", "ciwae", "tvo"):
        assert float(measured[0][f"snr/phi/{name}"]) > 0 and float(measured[0][f"dsnr/phi/{name}"]) > 0


@pytest.mark.parametrize(
    ("estimators", "words"),
    [
        ("[{estimator: dreg, particels: 4}]", ["estimators[0].particels", "particles?"]),
        ("[{estimator: dreg, particles: few}]", ["estimators[0].particles", "'few'"]),
        ("[derg]", ["GradientSNR.estimators[0]", "'derg'", "dreg"]),
    ],
)
def test_mistakes_in_a_config_are_one_message(estimators, words, overlay, capsys):
    with pytest.raises(SystemExit) as stop:
        overlay(estimators)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert all(word in error for word in words), error


# ------------------------------------------------------------------------------------------------ pictures
def test_picture_has_a_line_for_each():
    rows = [
        {"step": str(step), "snr/phi": "0.5", "snr/phi/dreg": "0.7", "snr/phi/stl": "0.9", "snr/theta": "0.4"}
        for step in (0, 100)
    ]
    phi, theta = curves.signal_to_noise({"": rows}).axes
    assert [line.get_label() for line in phi.lines] == ["trained with", "dreg", "stl"]
    assert [list(line.get_ydata()) for line in phi.lines] == [[0.5] * 2, [0.7] * 2, [0.9] * 2]
    assert len({line.get_color() for line in phi.lines}) == 3
    assert [text.get_text() for text in phi.get_legend().get_texts()] == ["trained with", "dreg", "stl"]
    assert len(theta.lines) == 1 and theta.get_legend() is None
