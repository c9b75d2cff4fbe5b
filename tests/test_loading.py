"""A loaded run against the linear-Gaussian model's closed forms, and what is said of files that are no run."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from torch import nn
from torch.distributions import ExpTransform, Independent, LogNormal, Normal, TransformedDistribution

import lightning_iwae
from lightning_iwae.data import Gaussian
from lightning_iwae.loading import Run, load
from lightning_iwae.models import MLP, LinearGaussian

ROOT = Path(__file__).parents[1]
TOY = {"class_path": "lightning_iwae.models.LinearGaussian", "init_args": {"dim": 3, "variance": 0.5}}


# --- runs to load -------------------------------------------------------------------------------------------
def toy(distance=0.0, variance=0.5):
    """A linear-Gaussian model whose q is the posterior, but for `distance` in its mean and its variance."""
    generator = torch.Generator().manual_seed(1)
    model = LinearGaussian(3, variance)
    with torch.no_grad():
        model.mu.copy_(torch.randn(3, generator=generator))
        model.inference.weight.copy_(torch.eye(3) / 2 + distance * torch.randn(3, 3, generator=generator))
        model.inference.bias.copy_(model.mu / 2)
    return model


def save(directory, network, settings, name="best"):
    """A run's files, as far as loading needs them."""
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "model": {"network": settings}}))
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    content = {"state_dict": weights, "loops": {}, "global_step": 70}
    torch.save(content, directory / f"checkpoints/{name}.ckpt")
    return directory


def saved(tmp_path, network, settings=TOY):
    return load(save(tmp_path / "run", network, settings))


def items(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) * math.sqrt(2)


def z_score(sample, expected):
    sample = np.asarray(sample)
    return (sample.mean() - expected) / (sample.std(ddof=1) / math.sqrt(sample.size))


# --- loading ------------------------------------------------------------------------------------------------
def test_a_fits_run_is_loaded_in_one_line(gaussian_run):
    before = torch.get_rng_state()
    run = lightning_iwae.load(str(gaussian_run), "last")
    assert torch.equal(torch.get_rng_state(), before)
    weights = torch.load(gaussian_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in run.network.state_dict()} == set(weights)
    assert all(torch.equal(value, weights[f"network.{name}"]) for name, value in run.network.state_dict().items())
    assert type(run.network) is LinearGaussian and not run.network.training
    assert run.config == yaml.safe_load((gaussian_run / "config.yaml").read_text())
    assert run.step == 4
    assert repr(run).startswith("Run(LinearGaussian, ") and "last.ckpt, step 4, cpu" in repr(run)


def test_the_runs_data_are_those_of_its_seed(gaussian_run):
    run = load(gaussian_run, "last")
    data, same = run.data(), Gaussian(dim=3, size=70, batch_size=32, seed=3)
    same.setup()
    assert torch.equal(data.test, same.test) and data.batch_size == 32
    assert run.log_px(data.test, 30).shape == (70,)


def test_a_checkpoint_outside_its_run_is_loaded_by_the_settings_in_it(gaussian_run, tmp_path):
    moved = tmp_path / "mine.ckpt"
    moved.write_bytes((gaussian_run / "checkpoints/last.ckpt").read_bytes())
    run, original = load(moved), load(gaussian_run / "checkpoints/last.ckpt")
    assert torch.equal(run.encode(items(4)).mean, original.encode(items(4)).mean)
    assert run.config["model"] == original.config["model"]


def test_loading_needs_no_lightning(gaussian_run):
    code = f"import lightning_iwae, torch, sys; run = lightning_iwae.load({str(gaussian_run)!r}, 'last'); "
    code += "run.sample(2); run.log_px(torch.zeros(2, 3), 30); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_weights_of_a_run_in_double_precision_stay_so(tmp_path):
    run = saved(tmp_path, toy(0.1).double())
    assert {p.dtype for p in run.network.parameters()} == {torch.float64}
    assert run.encode(items(2)).mean.dtype == run.sample(2).dtype == torch.float64


# --- what a run is for --------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600])
def test_data_of_any_number_are_encoded_and_reconstructed(n, tmp_path):
    model, x = toy(0.1, 2 / 3), items(n)
    run = saved(tmp_path, model, TOY | {"init_args": {"dim": 3, "variance": 2 / 3}})
    mean = x @ model.inference.weight.T + model.inference.bias
    for data in (x, x.numpy(), x.double(), x.numpy().astype(">f4"), x.numpy()[:, ::-1][:, ::-1]):
        code = run.encode(data)
        torch.testing.assert_close(code.mean, mean.detach())
        torch.testing.assert_close(code.scale, torch.full((n, 3), math.sqrt(2 / 3)))
        torch.testing.assert_close(run.reconstruct(data), mean.detach())  # p(x | z) has mean z
    assert run.evaluate(x, 30)["log_px"].shape == (n,)


def test_log_px_at_the_posterior_is_exact(tmp_path):
    model, x = toy(), items(300)
    run = saved(tmp_path, model)
    exact = scipy.stats.multivariate_normal(model.mu.detach(), 2 * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(run.log_px(x, 30), exact, atol=1e-5)
    figures = run.evaluate(x, 30)
    np.testing.assert_allclose(figures["elbo"], exact, atol=1e-5)
    np.testing.assert_allclose(figures["ess"], 1, atol=1e-5)
    names = ["iwae_64", "log_px", "elbo", "kl_q_posterior", "kl_is_64", "ess", "rate", "distortion", "k_hat"]
    assert list(figures) == names
    assert "k_hat" not in run.evaluate(x, 24)


def test_log_px_elsewhere_is_unbiased(tmp_path):
    model, x = toy(0.2), items(1).expand(4_000, 3)
    run = saved(tmp_path, model)
    ratio = torch.exp(run.log_px(x, 10) - model.exact_log_px(x).detach())
    assert abs(z_score(ratio, 1)) < 4
    assert z_score(run.evaluate(x, 10)["elbo"], model.exact_log_px(x[:1]).item()) < -8


def test_samples_are_the_models(tmp_path):
    model = toy()
    run = saved(tmp_path, model)
    x, means = run.sample(5_000), run.sample(5_000, mean=True)
    assert x.shape == means.shape == (5_000, 3)
    for i, mu in enumerate(model.mu.tolist()):  # x ~ N(mu, 2 I), and the means of p(x | z) ~ N(mu, I)
        assert abs(z_score(x[:, i], mu)) < 4 and abs(z_score((x[:, i] - mu) ** 2, 2)) < 4
        assert abs(z_score(means[:, i], mu)) < 4 and abs(z_score((means[:, i] - mu) ** 2, 1)) < 4
    assert len(x.unique(dim=0)) == 5_000  # chunks differ


def test_draws_are_a_function_of_the_seed_and_the_global_state_is_left_alone(tmp_path):
    run, x = saved(tmp_path, toy(0.2)), items(5)
    before = torch.get_rng_state()
    for draw in (lambda seed: run.log_px(x, 30, seed=seed), lambda seed: run.sample(4, seed=seed)):
        first = draw(0)
        torch.rand(1)
        assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)
        torch.set_rng_state(before)
        draw(0)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("shape", "largest"), [((700, 3), 256), ((3, 2**21), 2)])
def test_data_are_taken_in_chunks(shape, largest, tmp_path):
    network = nn.Module()
    network.inference, network.generative = nn.Linear(1, 1), nn.Linear(1, 1)
    sizes = []

    def posterior(x):
        sizes.append(len(x))
        return Independent(Normal(x[:, :1], 1.0), 1)

    network.posterior, network.prior = posterior, lambda: Independent(Normal(torch.zeros(1), 1.0), 1)
    network.likelihood = lambda z: Independent(Normal(z.expand(*z.shape[:-1], shape[1]), 1.0), 1)
    run = Run(network, {}, Path("none"), 0, torch.device("cpu"))
    assert run.encode(torch.zeros(1).expand(shape)).mean.shape == (shape[0], 1)
    assert sum(sizes) == shape[0] and max(sizes) == largest


def test_uint8_are_pixels(tmp_path):
    torch.manual_seed(0)
    network = MLP(pixels=9, latent=2, hidden=[4])
    settings = {"class_path": "lightning_iwae.models.MLP", "init_args": {"pixels": 9, "latent": 2, "hidden": [4]}}
    run = saved(tmp_path, network, settings)
    pixels = torch.randint(256, (5, 9), dtype=torch.uint8)
    expected = run.encode(pixels.float() / 255).mean
    for data in (pixels, pixels.numpy()):
        torch.testing.assert_close(run.encode(data).mean, expected)
    ones = pixels > 127
    assert torch.equal(run.encode(ones).mean, run.encode(ones.float()).mean)
    assert torch.equal(run.encode(ones.int().numpy()).mean, run.encode(ones.float()).mean)
    with pytest.raises(ValueError, match=r"floats if it is zeros and ones. Got uint8"):
        run.encode(ones.to(torch.uint8))


class Flow(LinearGaussian):
    """Whose posterior is a transformed distribution: it can be drawn from and weighed, but has no closed mean."""

    def posterior(self, x):
        return TransformedDistribution(super().posterior(x), [ExpTransform()])


class MeanOnly(LinearGaussian):
    """Whose posterior knows its mean, but not its standard deviation."""

    class Posterior(TransformedDistribution):
        mean = property(lambda self: self.base_dist.mean)

    def posterior(self, x):
        return self.Posterior(super().posterior(x), [])


def test_a_users_posterior_may_have_no_mean_and_no_scale(tmp_path):
    flow = saved(tmp_path / "a", Flow(3), {"class_path": "tests.test_loading.Flow", "init_args": {"dim": 3}})
    x = items(4)
    with pytest.raises(ValueError, match="posterior of Flow has no mean"):
        flow.encode(x)
    assert flow.log_px(x, 30).isfinite().all()
    drawn = flow.reconstruct(x)
    assert (drawn > 0).all() and torch.equal(drawn, flow.reconstruct(x))
    assert not torch.equal(drawn, flow.reconstruct(x, seed=1))
    known = saved(tmp_path / "b", MeanOnly(3), {"class_path": "tests.test_loading.MeanOnly", "init_args": {"dim": 3}})
    assert known.encode(x).scale is None and known.encode(x).mean.shape == (4, 3)


class Shifted(nn.Module):
    """z ~ N(y, I), x | z, y ~ N(z + 10 y, I), q the posterior: log p(x | y) is N(11 y, 2 I)'s."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = nn.Linear(1, 1), nn.Linear(1, 1)

    def prior(self, y):
        return Independent(Normal(y[:, None].expand(-1, 3).float(), 1.0), 1)

    def posterior(self, x, y):
        return Independent(Normal((x - 9 * y[:, None]) / 2, math.sqrt(0.5)), 1)

    def likelihood(self, z, y):
        return Independent(Normal(z + 10 * y[:, None], 1.0), 1)


def test_a_conditional_network_takes_labels(tmp_path):
    run = saved(tmp_path, Shifted(), {"class_path": "tests.test_loading.Shifted"})
    x, y = items(300), torch.arange(300) % 4
    exact = scipy.stats.multivariate_normal(np.zeros(3), 2 * np.eye(3)).logpdf(x - 11 * y[:, None])
    np.testing.assert_allclose(run.log_px(x, 30, y), exact, rtol=1e-5)
    np.testing.assert_allclose(run.log_px(x, 30, y.numpy()), exact, rtol=1e-5)
    torch.testing.assert_close(run.encode(x, y).mean, (x - 9 * y[:, None]) / 2)
    torch.testing.assert_close(run.reconstruct(x, y), (x - 9 * y[:, None]) / 2 + 10 * y[:, None])
    assert abs(z_score(run.sample(1_000, y=2)[:, 0], 22)) < 4
    labels = torch.tensor([0, 3]).repeat_interleave(300)
    means = run.sample(600, labels, mean=True)
    assert abs(z_score(means[300:, 1], 33)) < 4 and abs(z_score(means[:300, 1], 0)) < 4
    with pytest.raises(TypeError, match="takes labels"):
        run.log_px(x)
    with pytest.raises(ValueError, match=r"300 labels, one a datum. Got 299"):
        run.log_px(x, y=y[1:])
    with pytest.raises(ValueError, match=r"one label or 5. Got shape \(4,\)"):
        run.sample(5, y[:4])
    with pytest.raises(TypeError, match="takes no labels"):
        saved(tmp_path / "toy", toy()).encode(x, y)


# --- mistakes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(3), r"shape \(N, 3\). Got \(3,\)"),
    (torch.zeros(2, 4), r"shape \(N, 3\). Got \(2, 4\)"),
    (np.zeros((2, 3, 1)), r"shape \(N, 3\). Got \(2, 3, 1\)"),
    (np.float32(1), r"shape \(N, 3\). Got \(\)"),
    (torch.full((2, 3), math.nan), "finite. Got 6 numbers that are not"),
    (torch.zeros(2, 3, dtype=torch.complex64), "real numbers. Got torch.complex64"),
    (np.full((2, 3), "a"), "real numbers. Got <U1"),
])  # fmt: skip
def test_wrong_data_are_refused(x, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, toy()).encode(x)


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"n must be at least 1. Got 0"):
        saved(tmp_path, toy()).sample(0)


def cut_short(run):
    file = run / "checkpoints/best.ckpt"
    file.write_bytes(file.read_bytes()[:-200])


def of_pickle(run):
    torch.save({"state_dict": {}, "loops": {}, "x": LogNormal}, run / "checkpoints/best.ckpt")


def config(text):
    return lambda run: (run / "config.yaml").write_text(text)


def network(settings):
    return config(yaml.safe_dump({"model": {"network": settings}}))


TOY_PATH = TOY["class_path"]


@pytest.mark.parametrize(("spoil", "file", "message"), [
    (lambda run: (run / "checkpoints/best.ckpt").unlink(), "", "no checkpoints/best.ckpt; checkpoints there are: last"),
    (cut_short, "best.ckpt", "cut short"),
    (of_pickle, "best.ckpt", "LogNormal"),
    (lambda run: (run / "checkpoints/best.ckpt").write_text("hello"), "best.ckpt", "no checkpoint"),
    (lambda run: torch.save({"a": 1}, run / "checkpoints/best.ckpt"), "best.ckpt", "no state_dict"),
    (lambda run: (run / "config.yaml").unlink(), "best.ckpt", "config.yaml, and has no settings"),
    (config("a: ["), "config.yaml", "can't be read"),
    (config("hello"), "config.yaml", "no model.network"),
    (config("model: {samples: 3}"), "config.yaml", "no model.network"),
    (network({"class_path": TOY_PATH, "init_args": {"dim": 4}}), "best.ckpt",
     r"of another model. network.inference.weight must have shape \(4, 4\). Got \(3, 3\), and 2 more"),
    (network({"class_path": "lightning_iwae.models.MLP", "init_args": {"pixels": 3, "hidden": []}}), "best.ckpt",
     "of another model"),
    (network({"class_path": "nowhere.Net"}), "config.yaml", "model.network: no module 'nowhere'"),
    (network({"class_path": "lightning_iwae.models.MPL"}), "config.yaml", "Did you mean lightning_iwae.models.MLP"),
    (network({"class_path": TOY_PATH, "init_args": {"dims": 4}}), "config.yaml", "dims"),
    (network({"class_path": TOY_PATH, "init_args": {"variance": -1}}), "config.yaml", "must be positive. Got -1"),
    (network({"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}), "config.yaml",
     "Linear lacks inference"),
    (network({"init_args": {}}), "config.yaml", "class_path"),
    (network(3), "config.yaml", "class_path"),
])  # fmt: skip
def test_what_is_no_run_is_refused_naming_the_file(spoil, file, message, tmp_path):
    run = save(save(tmp_path / "run", toy(), TOY), toy(), TOY, "last")
    spoil(run)
    with pytest.raises(ValueError, match=message) as refused:
        load(run)
    assert str(run / ("checkpoints" if file.endswith("ckpt") else "") / file) in str(refused.value)


@pytest.mark.parametrize(("path", "message"), [
    ("nothing", "nothing is neither a run's directory nor a checkpoint"),
    ("", "has no checkpoints/best.ckpt; it holds notes.txt"),
])  # fmt: skip
def test_a_path_that_is_no_run_is_refused(path, message, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / path)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device, tmp_path):
    with pytest.raises(ValueError, match=f"device {device} can't be used"):
        load(save(tmp_path, toy(), TOY), device=device)


def test_a_run_without_data_says_so(tmp_path):
    with pytest.raises(ValueError, match="name no data"):
        saved(tmp_path, toy()).data()
