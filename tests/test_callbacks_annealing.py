"""AIS and BDMC in `test`: closed forms, every datum once, and nothing else disturbed."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

from lightning_iwae.annealing import Annealing
from lightning_iwae.callbacks import AIS, BDMC, annealing
from lightning_iwae.cli import main
from lightning_iwae.data import Gaussian
from lightning_iwae.evaluation import table
from lightning_iwae.loading import load
from lightning_iwae.models import LinearGaussian
from lightning_iwae.module import IWModule
from lightning_iwae.sides import Side

from .test_cli import ROOT

SMALL = Annealing(3, 4, 2, start="posterior", pilot=2)


def module_of(network):
    return IWModule(network, samples=2, theta=Side("iwae", 2), phi=Side("iwae", 2), test_particles=30)


def exact_module(network=LinearGaussian):
    """Whose q is the posterior: every estimate is log p(x) itself."""
    model = network(dim=3, variance=0.5)
    with torch.no_grad():
        model.mu.fill_(1.0)
        model.inference.weight.copy_(torch.eye(3) / 2)
        model.inference.bias.fill_(0.5)
    return module_of(model)


def figures_of(module, data, *callbacks):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet)
    trainer.test(module, data, verbose=False)
    return module.result, trainer


# --- through the trainer ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "at_once"), [(1, 2**22), (3, 1), (9, 40), (500, 2**22)])
def test_the_first_data_are_taken_once_each(size, at_once, monkeypatch):
    monkeypatch.setattr(annealing, "NUMBERS_AT_ONCE", at_once)  # 40: four data of three chains and three numbers
    data, module = Gaussian(batch_size=8, dim=3, size=26), exact_module()
    result, trainer = figures_of(module, data, AIS(size, SMALL), BDMC(size, SMALL))
    taken = min(size, 26)
    exact = module.network.exact_log_px(data.test[:taken]).detach()
    assert result["log_px_ais"]["mean"] == pytest.approx(exact.mean().item(), abs=1e-5)
    if taken > 1:
        assert result["log_px_ais"]["se"] == pytest.approx(exact.std().item() / math.sqrt(taken), abs=1e-5)
    assert result["ais_minus_is"]["mean"] == pytest.approx(0, abs=1e-5)
    assert result["ais_ess"]["mean"] == pytest.approx(1, abs=1e-5)
    assert result["bdmc_gap"]["mean"] == pytest.approx(0, abs=1e-5)
    assert result["bdmc_lower"]["mean"] == pytest.approx(result["bdmc_upper"]["mean"], abs=1e-5)
    assert 0 < result["ais_acceptance"]["mean"] <= 1 and 0 < result["bdmc_acceptance"]["mean"] <= 1
    about = {"data": taken, "chains": 3, "temperatures": 4, "leapfrog": 2, "schedule": "sigmoid"}
    about |= {"start": "posterior", "pilot": 2}
    assert result["ais"] == about | {"decoder_passes": SMALL.passes()}
    assert result["bdmc"] == about | {"decoder_passes": SMALL.passes(2)}
    for name in ("log_px_ais", "ais_minus_is", "bdmc_gap"):
        assert trainer.callback_metrics[f"test/{name}"].item() == pytest.approx(result[name]["mean"], abs=1e-6)


def test_all_other_figures_are_as_without_it_and_it_repeats_itself():
    data = Gaussian(batch_size=8, dim=3, size=26)
    network = LinearGaussian(3)
    plain, _ = figures_of(module_of(network), data)
    both, _ = figures_of(module_of(network), data, AIS(10, SMALL), BDMC(10, SMALL))
    again, _ = figures_of(module_of(network), data, BDMC(10, SMALL), AIS(10, SMALL))
    assert {name: both[name] for name in plain} == plain and again == both
    assert len(both) == len(plain) + 10
    assert both["ais_minus_is"]["mean"] != 0


def test_without_moves_there_is_no_acceptance():
    data = Gaussian(batch_size=8, dim=3, size=10)
    result, _ = figures_of(module_of(LinearGaussian(3)), data, AIS(10, Annealing(3, 1)))
    assert "ais_acceptance" not in result and "ais" in result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "AIS: 10 test data, 3 chains from the prior, 1 temperatures" in table(result)


class Conditional(nn.Module):
    """z ~ N(10 y, 1), x | z ~ N(z, 1), q the posterior: p(x | y) = N(10 y, 2)."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = nn.Linear(1, 1), nn.Linear(1, 1)

    def prior(self, y):
        return Independent(Normal(10.0 * y[:, None], 1.0), 1)

    def posterior(self, x, y):
        return Independent(Normal((x + 10 * y[:, None]) / 2, math.sqrt(0.5)), 1)

    def likelihood(self, z, y):
        return Independent(Normal(z, 1.0), 1)


class Labelled(LightningDataModule):
    labels = True

    def __init__(self):
        super().__init__()
        self.y = torch.arange(11) % 4
        self.x = 10.0 * self.y[:, None] + torch.linspace(-2, 2, 11)[:, None]

    def test_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), batch_size=4)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_labels_go_with_their_data(monkeypatch):
    monkeypatch.setattr(annealing, "NUMBERS_AT_ONCE", 9)  # three data of three chains
    data = Labelled()
    result, _ = figures_of(module_of(Conditional()), data, AIS(7, SMALL), BDMC(7, SMALL))
    exact = Normal(10.0 * data.y[:, None], math.sqrt(2)).log_prob(data.x)[:7].mean().item()
    assert result["log_px_ais"]["mean"] == pytest.approx(exact, abs=1e-4)
    assert result["bdmc_gap"]["mean"] == pytest.approx(0, abs=1e-4)
    assert result["bdmc_lower"]["mean"] > -5  # of x simulated at the labels that it is weighed at


class Discrete(LinearGaussian):
    """A layer of coins."""

    decoded = 0

    def prior(self):
        return Independent(Bernoulli(torch.full((3,), 0.5)), 1)

    def posterior(self, x):
        return Independent(Bernoulli(torch.full((len(x), 3), 0.5)), 1)

    def likelihood(self, z):
        Discrete.decoded += 1
        return super().likelihood(z)


@pytest.mark.parametrize("callback", [AIS, BDMC])
def test_a_discrete_latent_is_refused_before_any_work(callback):
    data = Gaussian(batch_size=8, dim=3, size=26)
    with pytest.raises(ValueError, match=r"continuous and unbounded. Got a discrete one: the prior's support is Bool"):
        figures_of(module_of(Discrete(3)), data, callback(10, SMALL))
    assert not Discrete.decoded


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"BDMC.size must be at least 1. Got 0."):
        BDMC(0)


# --- the command line -------------------------------------------------------------------------------------------
@pytest.fixture
def _as_a_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)


@pytest.mark.usefixtures("_as_a_command")
def test_the_overlays_add_to_the_table_and_to_evaluation_json(gaussian_run, capfd, monkeypatch):
    told = []
    monkeypatch.setattr(annealing, "rank_zero_info", told.append)
    test = ["test", str(gaussian_run), "--ckpt_path", "last", "--model.test_particles", "200"]
    main(test)
    plain = json.loads((gaussian_run / "evaluation.json").read_text())
    capfd.readouterr()
    for name in ("ais", "bdmc"):
        options = ["--trainer.callbacks.size", "40", "--trainer.callbacks.annealing.temperatures", "30"]
        main([*test, "-c", f"conf/evaluation/{name}.yaml", *options])
        printed = capfd.readouterr()
        result = json.loads((gaussian_run / "evaluation.json").read_text())
        assert {key: result[key] for key in plain} == plain
        assert result[name]["data"] == 40 and result[name]["temperatures"] == 30 and result[name]["chains"] == 16
        assert f"{result[name]['decoder_passes']} decoder passes a datum" in printed.out
        assert f"{result[name]['decoder_passes'] * 40:,} in all" in told[-1]
        figures = [key for key in result if key not in plain and key != name]
        assert len(figures) == 4
        for key in figures:
            assert f"{result[key]['mean']:.4f} +- {result[key]['se']:.4f}" in printed.out
        if name == "ais":
            run = load(gaussian_run, "last")
            exact = run.network.exact_log_px(run.data().test[:40]).mean().item()
            np.testing.assert_allclose(result["log_px_ais"]["mean"], exact, atol=0.1)
        else:
            assert -0.1 < result["bdmc_gap"]["mean"] < 0.3


@pytest.mark.usefixtures("_as_a_command")
def test_a_bad_setting_is_one_message(gaussian_run, capfd):
    options = ["--trainer.callbacks.annealing.chains", "0"]
    with pytest.raises(SystemExit) as stop:
        main(["test", str(gaussian_run), "--ckpt_path", "last", "-c", "conf/evaluation/ais.yaml", *options])
    assert stop.value.code == 2
    message = capfd.readouterr().err
    assert "trainer.callbacks[0].init_args.annealing.chains must be at least 1. Got 0." in message
