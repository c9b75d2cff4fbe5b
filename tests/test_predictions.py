"""What `predict` writes of each datum: the closed forms' values, in the data's order, and `test`'s own draws."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.distributions import ExpTransform, TransformedDistribution
from torch.utils.data import DataLoader

from lightning_iwae.callbacks import Predictions
from lightning_iwae.cli import main
from lightning_iwae.data import Batches, Gaussian
from lightning_iwae.loading import load
from lightning_iwae.models import LinearGaussian
from lightning_iwae.module import IWModule
from lightning_iwae.predictions import in_order, save, summary
from lightning_iwae.sides import Side

from .test_cli import ROOT, SMALL

FIGURES = ["iwae_64", "log_px", "elbo", "kl_q_posterior", "kl_is_64", "ess", "rate", "distortion", "k_hat"]
ABOUT = {"particles", "data", "binarization", "seed", "version", "device", "checkpoint"}
QUICK = ["--model.test_particles", "30", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)


# --- order --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "batch_size", "ranks"), [(26, 8, 1), (26, 8, 2), (9, 4, 2), (10, 4, 3), (5, 5, 4)])
def test_slices_of_batches_are_joined_in_the_datas_order(n, batch_size, ranks):
    items = torch.arange(float(n))[:, None]
    loaders = [Batches(items, batch_size, shuffle=False, rank=r, world_size=ranks) for r in range(ranks)]
    rows = in_order([[{"x": x, "twice": 2 * x[:, 0]} for x in loader] for loader in loaders])
    assert list(rows) == ["index", "x", "twice"]
    assert torch.equal(rows["index"], torch.arange(n))
    assert torch.equal(rows["x"], items) and torch.equal(rows["twice"], 2 * items[:, 0])


def test_an_index_orders_data_and_leaves_one_of_each():
    processes = [[{"index": torch.tensor([4, 0]), "x": torch.tensor([40, 0])}, {"index": [], "x": []}], []]
    processes[0][1] = {"index": torch.tensor([2]), "x": torch.tensor([20])}
    processes[1].append({"index": torch.tensor([1, 0]), "x": torch.tensor([10, 99])})  # a padded sampler's 0
    rows = in_order(processes)
    assert rows["index"].tolist() == [0, 1, 2, 4] and rows["x"].tolist() == [0, 10, 20, 40]


# --- the file -----------------------------------------------------------------------------------------------
def test_the_file_is_replaced_as_a_whole(tmp_path):
    path, rows = tmp_path / "a/p.npz", {"index": torch.arange(3), "mean": torch.ones(3, 2)}
    save(path, rows, {"particles": 5, "binarization": None, "data": "Digits"})
    with np.load(path) as file:
        assert set(file) == {"index", "mean", "particles", "data"}
        assert file["mean"].shape == (3, 2) and file["particles"] == 5 and file["data"] == "Digits"
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save(path, {"index": None}, {})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["p.npz"]


def test_the_summary_names_what_there_is_and_what_is_left_out():
    k_hat = torch.tensor([0.1, 0.8, math.inf, -math.inf])
    rows = {"index": torch.arange(4), "mean": torch.zeros(4, 2), "log_px": torch.zeros(4), "k_hat": k_hat}
    text = summary(rows)
    assert "4 data: index, mean (2,), log_px, k_hat" in text
    assert "knows no scale" in text and "for 2 of them" in text
    assert "no mean and no scale" in summary({"index": torch.arange(4), "k_hat": k_hat})


# --- through the trainer ------------------------------------------------------------------------------------
def exact_module(network=LinearGaussian, **options):
    """Whose q is the posterior where mu is 1: every estimate is exact."""
    model = network(dim=3, variance=0.5)
    with torch.no_grad():
        model.mu.fill_(1.0)
        model.inference.weight.copy_(torch.eye(3) / 2)
        model.inference.bias.fill_(0.5)
    options = {"samples": 2, "theta": Side("iwae", 2), "phi": Side("iwae", 2), "test_particles": 30} | options
    return IWModule(model, **options)


class Loaded(LightningDataModule):
    """A plain DataLoader over 11 data of 3 numbers."""

    def __init__(self, shuffle):
        super().__init__()
        self.x, self.shuffle = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)), shuffle

    def predict_dataloader(self):
        return DataLoader(self.x, batch_size=4, shuffle=self.shuffle)


def predicted(module, data, path):
    callback = Predictions(str(path))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.predict(module, data)
    with np.load(path) as file:
        return dict(file)


def check_exact(rows, module, x):
    posterior = module.network.exact_posterior(x)
    np.testing.assert_array_equal(rows["index"], np.arange(len(x)))
    np.testing.assert_allclose(rows["mean"], posterior.mean.detach(), rtol=1e-6)
    np.testing.assert_allclose(rows["scale"], posterior.stddev.detach(), rtol=1e-6)
    for name in ("log_px", "elbo", "iwae_64"):
        np.testing.assert_allclose(rows[name], module.network.exact_log_px(x).detach(), atol=1e-5)
    np.testing.assert_allclose(rows["ess"], 1, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*shuffling enabled")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_users_data_module_is_predicted_in_its_order(shuffle, tmp_path):
    module, data = exact_module(), Loaded(shuffle)
    check_exact(predicted(module, data, tmp_path / "p.npz"), module, data.x)


def test_a_file_says_what_its_figures_depend_on(tmp_path):
    module, data = exact_module(seed=7), Gaussian(dim=3, size=20, batch_size=8)
    rows = predicted(module, data, tmp_path / "p.npz")
    check_exact(rows, module, data.test)
    assert set(rows) == {"index", "mean", "scale", *FIGURES} | ABOUT - {"checkpoint"}
    assert (rows["particles"], rows["seed"], rows["data"], rows["device"]) == (30, 7, "Gaussian", "cpu")


class Flow(LinearGaussian):
    def posterior(self, x):
        return TransformedDistribution(super().posterior(x), [ExpTransform()])


def test_a_posterior_without_moments_has_figures_alone(tmp_path):
    rows = predicted(exact_module(Flow), Gaussian(dim=3, size=20, batch_size=8), tmp_path / "p.npz")
    assert set(rows) == {"index", *FIGURES} | ABOUT - {"checkpoint"}
    assert np.isfinite(rows["log_px"]).all() and (rows["ess"] < 1).all()


def test_too_few_particles_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"model.test_particles must be at least 25 .* Got 24"):
        predicted(exact_module(test_particles=24), Gaussian(dim=3, size=20, batch_size=8), tmp_path / "p.npz")


# --- the command --------------------------------------------------------------------------------------------
@pytest.fixture
def run(gaussian_run, tmp_path):
    """A copy of a run, whose last checkpoint is the best too."""
    shutil.copytree(gaussian_run, tmp_path / "run")
    shutil.copy(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run/checkpoints/best.ckpt")
    return tmp_path / "run"


def test_predict_writes_what_test_averages(run, capsys):
    config = ["-c", str(run / "config.yaml"), "--ckpt_path", "best", "--trainer.default_root_dir", str(run)]
    main(["predict", *config, *QUICK])
    assert f"Saved as {run}/predictions.npz" in capsys.readouterr().out
    main(["test", str(run), *QUICK])
    result = json.loads((run / "evaluation.json").read_text())
    with np.load(run / "predictions.npz") as file:
        rows = dict(file)
    assert set(rows) == {"index", "mean", "scale", *FIGURES} | ABOUT
    for name in FIGURES[:-1]:
        assert result[name]["mean"] == pytest.approx(rows[name].mean(), rel=1e-9, abs=1e-9)
    assert result["k_hat_above_0.7"]["mean"] == pytest.approx((rows["k_hat"] > 0.7).mean(), abs=1e-9)
    loaded = load(run)
    code = loaded.encode(loaded.data().test)
    np.testing.assert_array_equal(rows["index"], np.arange(70))
    np.testing.assert_allclose(rows["mean"], code.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows["scale"], code.scale, rtol=1e-6)
    assert str(rows["checkpoint"]).endswith("best.ckpt") and rows["seed"] == 3


@pytest.mark.parametrize("n", [1, 45])
def test_a_file_of_ones_own_is_predicted(n, run, tmp_path, capsys):
    x = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float32)
    np.save(tmp_path / "mine.npy", x)
    main(["predict", str(run), str(tmp_path / "mine.npy"), *QUICK])
    assert f"{n} data: index, mean (3,), scale (3,)" in capsys.readouterr().out
    with np.load(run / "predictions.npz") as file:
        np.testing.assert_allclose(file["mean"], load(run).encode(x).mean, rtol=1e-5, atol=1e-6)
        assert file["data"] == "Arrays" and file["binarization"] == "none"
    main(["predict", str(run), str(tmp_path / "mine.npy"), "--ckpt_path", "last", "--seed_everything", "9", *QUICK])
    with np.load(run / "predictions.npz") as file:
        assert str(file["checkpoint"]).endswith("last.ckpt") and file["seed"] == 9


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_short_form_is_in_the_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"python -m lightning_iwae {command} RUN [FILE]" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["predict", "nothing"], "predict nothing: must be a run's directory. There is no nothing/config.yaml."),
    (["predict", "RUN", "nothing.npy"], "no file nothing.npy"),
    (["test", "RUN", "--model.phi.particels", "3"], "particles"),
])  # fmt: skip
def test_mistakes_are_answered_with_one_message(words, message, run, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(run) if word == "RUN" else word for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert not (run / "predictions.npz").exists()


def test_data_of_another_width_are_one_message(tmp_path, capsys):
    run = tmp_path / "run"
    main(["fit", "-c", "conf/digits.yaml", *SMALL, "--trainer.default_root_dir", str(run)])
    np.save(tmp_path / "narrow.npy", np.zeros((30, 63), np.uint8))
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(run), str(tmp_path / "narrow.npy"), *QUICK])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: data must have shape (N, 64), as the network has. Got (30, 63)." in said and "Traceback" not in said
    assert not (run / "predictions.npz").exists()


def test_an_evaluation_says_of_which_checkpoint_it_is(tmp_path):
    run = tmp_path / "run"
    main(["fit", "-c", "conf/digits.yaml", *SMALL, "--trainer.default_root_dir", str(run)])
    main(["test", str(run), *QUICK, "--ckpt_path", "last"])
    result = json.loads((run / "evaluation.json").read_text())
    assert (result["checkpoint"], result["step"]) == ("last.ckpt", 3)


def test_a_run_without_a_best_checkpoint_points_to_its_last(tmp_path, capsys):
    run = tmp_path / "run"
    main(["fit", "-c", "conf/digits.yaml", *SMALL, "--trainer.default_root_dir", str(run)])
    (run / "checkpoints/best.ckpt").unlink()
    with pytest.raises(SystemExit):
        main(["test", str(run), *QUICK])
    assert "The run has a last.ckpt: --ckpt_path last." in capsys.readouterr().err
