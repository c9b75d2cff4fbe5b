"""Pictures: what is drawn is read back from the figures and compared with closed forms, quadrature and hand counts."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from matplotlib.image import imread
from matplotlib.patches import Ellipse
from scipy.integrate import quad
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from lightning_iwae import curves, figures, posteriors
from lightning_iwae.callbacks import Figures
from lightning_iwae.cli import loggers, main
from lightning_iwae.models import LinearGaussian
from lightning_iwae.module import IWModule
from lightning_iwae.posteriors import Particles, View
from lightning_iwae.sides import Side

from .test_callbacks import fit, iw_module
from .test_callbacks import toy as toy_data
from .test_cli import ROOT, SMALL


def toy(dim):
    """A linear-Gaussian model away from its optimum, in float64, and data."""
    torch.manual_seed(0)
    model = LinearGaussian(dim).double()
    with torch.no_grad():
        model.mu.copy_(torch.linspace(-1, 2, dim))
    return model, 1.5 * torch.randn(3, dim, dtype=torch.float64)


class Squared(nn.Module):
    """x | z ~ N(z^2, 0.2^2) under z ~ N(0, 1), whose posterior has two modes; q sits on one of them."""

    def prior(self):
        return Independent(Normal(torch.zeros(1), 1.0), 1)

    def posterior(self, x):
        return Independent(Normal(x.sqrt(), 0.1), 1)

    def likelihood(self, z):
        return Independent(Normal(z.square(), 0.2), 1)


# --- posteriors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_a_grid_has_the_exact_posterior(dim):
    model, x = toy(dim)
    exact = model.exact_posterior(x)
    views = posteriors.views(model, x, posteriors.draw(model, x, 5000), list(range(dim)))
    for b, view in enumerate(views):
        torch.testing.assert_close(view.mean, exact.mean[b].detach(), atol=1e-3, rtol=0)
        torch.testing.assert_close(view.cov, torch.eye(dim).double() / 2, atol=2e-3, rtol=0)
        z = torch.stack(torch.meshgrid(*view.axes, indexing="ij"), -1)
        density = model.exact_posterior(x[b]).log_prob(z).exp().detach()
        torch.testing.assert_close(view.density, density, atol=2e-3, rtol=0)
        assert math.isnan(view.ess)


def test_a_grid_finds_a_mode_that_q_does_not_know():
    model, x = Squared(), torch.tensor([[2.0], [0.5]])
    views = posteriors.on_grid(model, x, posteriors.draw(model, x, 2000), points=201)
    for view, datum in zip(views, x.flatten().tolist(), strict=True):

        def joint(z, datum=datum):
            return math.exp(-(z**2) / 2 - (datum - z**2) ** 2 / (2 * 0.04))

        total, second = (quad(lambda z, p=p: z**p * joint(z), -4, 4, points=[-1, 1])[0] for p in (0, 2))
        assert view.mean.item() == pytest.approx(0, abs=1e-3)
        assert view.cov.item() == pytest.approx(second / total, rel=2e-3)
        assert view.q_mean.item() == pytest.approx(math.sqrt(datum), abs=0.01)


def test_particles_approach_the_exact_posterior():
    model, x = toy(4)
    drawn = posteriors.draw(model, x, 40_000, chunk=7001)
    exact = model.exact_posterior(x).mean.detach()
    for b, view in enumerate(posteriors.views(model, x, drawn, [1, 3])):
        assert ((view.mean - exact[b, [1, 3]]).abs() < 4 * math.sqrt(0.5 / view.ess)).all()
        assert (view.cov - torch.eye(2) / 2).abs().max() < 4 / math.sqrt(view.ess)
        q = model.posterior(x).mean[b, [1, 3]].detach()
        assert ((view.q_mean - q).abs() < 4 * math.sqrt(2 / 3 / 40_000)).all()
        width = view.axes[0][1] - view.axes[0][0]
        assert view.density.sum() * width**2 == pytest.approx(1, abs=0.02)


def test_a_histogram_of_three_particles_by_hand():
    z = torch.tensor([[[0.0, 9.0, 0.0]], [[4.0, 9.0, 2.0]], [[4.0, 9.0, 2.0]]])
    (view,) = posteriors.from_particles(Particles(z, torch.tensor([[0.5], [0.2], [0.3]]).double().log()), [0, 2], 24)
    torch.testing.assert_close(view.mean, torch.tensor([2.0, 1.0]).double())
    torch.testing.assert_close(view.cov, torch.tensor([[4.0, 2.0], [2.0, 1.0]]).double())
    torch.testing.assert_close(view.q_mean, torch.tensor([8 / 3, 4 / 3]).double())
    assert view.ess == pytest.approx(1 / (0.25 + 0.04 + 0.09))
    mass = view.density * (view.axes[0][1] - view.axes[0][0]) * (view.axes[1][1] - view.axes[1][0])
    filled = mass.nonzero()
    assert len(filled) == 2
    assert mass[mass > 0].tolist() == pytest.approx([0.5, 0.5])
    for (i, j), point in zip(filled.tolist(), [(0, 0), (4, 2)], strict=True):
        at = torch.stack([view.axes[0][i], view.axes[1][j]])
        assert (at - torch.tensor(point)).abs().max() <= (view.axes[0][1] - view.axes[0][0]) / 2 + 1e-9


def test_weights_of_drawn_particles_are_the_models():
    model, x = toy(2)
    drawn = posteriors.draw(model, x, 10, chunk=3)
    joint = Normal(model.mu, 1.0).log_prob(drawn.z) + Normal(drawn.z, 1.0).log_prob(x)
    log_w = (joint - Normal(model.inference(x), math.sqrt(2 / 3)).log_prob(drawn.z)).sum(-1)
    torch.testing.assert_close(drawn.log_w, log_w.detach())


def test_active_dimensions_and_resampling():
    means = torch.tensor([[0.0, 5.0, 1.0, 0.0], [0.1, -5.0, 1.0, 2.0], [0.0, 0.0, 1.0, -2.0]])
    assert posteriors.active_dimensions(means) == [1, 3]
    assert posteriors.active_dimensions(means[:, :1]) == [0]
    z = torch.arange(6.0).view(3, 2, 1)
    log_w = torch.full((3, 2), -math.inf)
    log_w[1, 0] = log_w[2, 1] = 0.0
    assert posteriors.resample(Particles(z, log_w)).flatten().tolist() == [2.0, 5.0]


# --- pictures of a model ------------------------------------------------------------------------------------


def test_what_is_an_image():
    bits = torch.ones(5, 16)
    assert figures.image_shape(bits) == (4, 4)
    assert figures.image_shape(bits, (2, 8)) == (2, 8)
    assert figures.image_shape(bits - 2) is None  # not intensities
    assert figures.image_shape(torch.ones(5, 20)) is None
    assert figures.image_shape(torch.ones(5, 1, 6, 7)) == (6, 7)
    assert figures.image_shape(torch.ones(5, 3, 6, 7)) == (6, 7, 3)
    with pytest.raises(ValueError, match=r"image_shape must have 16 pixels, as the data. Got \(3, 5\)"):
        figures.image_shape(bits, (3, 5))


def test_samples_are_a_mosaic_of_their_means():
    x = torch.arange(18.0).view(3, 6) / 18
    drawn = figures.samples(x, (2, 3), columns=2)
    array = drawn.axes[0].images[0].get_array()
    assert array.shape == (5, 7)
    np.testing.assert_allclose(array[:2, :3], [[0, 1 / 18, 2 / 18], [3 / 18, 4 / 18, 5 / 18]], rtol=1e-6)
    np.testing.assert_allclose(array[3:, :3].flatten(), np.arange(12, 18) / 18, rtol=1e-6)
    assert np.ma.getmaskarray(np.ma.masked_invalid(array))[2].all()  # between rows
    colours = torch.rand(2, 3, 4, 5)
    np.testing.assert_allclose(figures.mosaic(colours, (4, 5, 3), 2)[:4, 6:], colours[1].movedim(0, -1))


def test_data_that_are_no_images_are_lines():
    x = torch.randn(4, 20)
    drawn = figures.samples(x)
    np.testing.assert_allclose([line.get_ydata() for line in drawn.axes[0].lines], x.double())
    drawn = figures.reconstructions({"data": x, "mean": x + 1})
    panel = drawn.axes[2]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), x[2].double())
    np.testing.assert_allclose(panel.lines[1].get_ydata(), x[2].double() + 1)
    assert figures.render(drawn).shape[1] == 900


def test_reconstructions_are_rows_with_their_labels():
    x = torch.rand(5, 9)
    drawn = figures.reconstructions({"data": x, "mean": 1 - x}, (3, 3))
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["data", "mean"]
    above, below = (axis.images[0].get_array().filled(9) for axis in drawn.axes)
    assert above.shape == (3, 19)
    inside = above <= 1
    np.testing.assert_allclose(above[inside] + below[inside], 1, rtol=1e-6)


def test_a_posterior_is_drawn_where_it_is():
    axes = torch.linspace(-1, 1, 3).double(), torch.linspace(4, 8, 5).double()
    density = torch.arange(15.0).view(3, 5).double()
    turn = torch.tensor([[math.sqrt(3) / 2, -0.5], [0.5, math.sqrt(3) / 2]]).double()  # by 30 degrees
    cov = turn @ torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double() @ turn.T
    view = View(axes, density, torch.tensor([1.0, 2.0]), cov, torch.tensor([-1.0, 0.0]), torch.eye(2) / 4, ess=72.2)
    drawn = figures.posteriors(torch.rand(1, 4), {"IWAE": [view]}, (2, 2), ("a", "b"))
    panel = drawn.axes[1]
    image = panel.images[0]
    np.testing.assert_allclose(image.get_array(), density.T)  # rows are the second dimension, from below
    assert image.origin == "lower" and image.get_extent() == [-1.5, 1.5, 3.5, 8.5]
    p, q = (patch for patch in panel.patches if isinstance(patch, Ellipse))
    assert p.center == (1.0, 2.0) and p.angle % 180 == pytest.approx(30)
    assert (p.width, p.height) == pytest.approx((8, 4))  # two standard deviations each way
    assert q.center == (-1.0, 0.0) and (q.width, q.height) == pytest.approx((2, 2))
    assert panel.get_title() == "ESS 72" and panel.get_xlabel() == "a" and panel.get_ylabel() == "IWAE\nb"
    left, right = panel.get_xlim()
    assert left <= 1 - 3 * math.sqrt(cov[0, 0]) + 1e-9 and right >= 1 + 3 * math.sqrt(cov[0, 0]) - 1e-9


def test_a_posterior_known_by_few_particles_has_no_ellipse():
    axes = torch.linspace(-1, 1, 3).double(), torch.linspace(-1, 1, 3).double()
    views = [View(axes, torch.ones(3, 3) / 4, *[torch.zeros(2), torch.eye(2)] * 2, ess=ess) for ess in (2.4, 500.0)]
    drawn = figures.posteriors(torch.rand(2, 4), {"": views})
    assert [len(panel.patches) for panel in drawn.axes] == [1, 2]
    assert [panel.get_title() for panel in drawn.axes] == ["ESS 2, too few", "ESS 500"]
    assert len(drawn.legends[0].get_texts()) == 2


def test_a_posterior_of_one_dimension_is_two_lines():
    model, x = toy(1)
    views = posteriors.views(model, x, posteriors.draw(model, x, 20_000), [0])
    drawn = figures.posteriors(x, {"": views}, None, ("z",))
    z, density = drawn.axes[1].lines[0].get_data()
    q = model.posterior(x[1]).log_prob(torch.from_numpy(z).unsqueeze(1)).exp().detach()
    np.testing.assert_allclose(density, q, atol=0.02)
    band = drawn.axes[1].collections[0].get_paths()[0].vertices
    exact = model.exact_posterior(x[1]).log_prob(x.new_tensor(z).unsqueeze(1)).exp().max()
    assert band[:, 1].max() == pytest.approx(exact.item(), rel=0.01)
    assert figures.render(drawn).shape[1] == 900


def test_weights_by_hand():
    log_w = torch.log(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 998.0]]).double())
    drawn = figures.weights(log_w, bins=10)
    assert [axis.get_title() for axis in drawn.axes] == ["ESS 100 %", "ESS 25 %"]
    counts, mass = (patch.get_data() for patch in drawn.axes[1].patches)
    np.testing.assert_allclose(counts.edges, np.linspace(-4, 1, 11))
    # 4 w = 0.004, 0.004, 0, 3.992: logarithms -2.4, -2.4, -4 (the least that is shown), 0.6
    assert counts.values.tolist() == [25, 0, 0, 50, 0, 0, 0, 0, 0, 25]
    np.testing.assert_allclose(mass.values, [0, 0, 0, 0.2, 0, 0, 0, 0, 0, 99.8], rtol=1e-9)


def test_a_picture_is_900_pixels_wide_and_a_png():
    pixels = figures.render(figures.samples(torch.rand(64, 784), (28, 28)))
    assert pixels.shape[1:] == (900, 3) and pixels.dtype == np.uint8
    assert figures.png(pixels)[:8] == b"\x89PNG\r\n\x1a\n"


# --- pictures of metrics.csv --------------------------------------------------------------------------------


def rows(**columns):
    """Rows of steps 0, 10, ..; None is an empty cell."""
    cells = {name.replace("_", "/", 1): ["" if v is None else repr(v) for v in c] for name, c in columns.items()}
    count = max(map(len, cells.values()))
    return [{"step": str(10 * i)} | {k: v[i] for k, v in cells.items() if i < len(v)} for i in range(count)]


def test_columns_and_blocks(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1.5,\n5,,2\n10,nan,3\n15,4.5,\n")
    read = curves.read(tmp_path / "metrics.csv")
    steps, values = curves.column(read, "a")
    assert steps.tolist() == [0, 15] and values.tolist() == [1.5, 4.5]
    assert curves.column(read, "c")[0].tolist() == [] and curves.read(tmp_path / "none.csv") == []
    steps, values = curves.blocks(np.arange(5.0), np.array([1.0, 3, 5, 5, 9]), most=3)
    assert steps.tolist() == [0.5, 2.5, 4] and values.tolist() == [2, 5, 9]


def test_training_shows_bounds_gaps_and_ess():
    values = [-900.0, -90.0, -88.0, -86.0, -84.0, -83.0, -82.0, -81.5, -81.0, -80.5, -80.0, -79.0]
    drawn = curves.training(rows(train_bound_theta=values, val_kl_q_posterior=[None, 3.0, 4.0], train_ess=[0.25, 0.5]))
    bounds, gaps, ess = drawn.axes
    assert bounds.lines[0].get_ydata().tolist() == values
    assert bounds.get_ylim()[0] > -100 and bounds.get_ylim()[1] > -79  # the start is cut off
    assert gaps.lines[0].get_xdata().tolist() == [10, 20] and gaps.lines[0].get_ydata().tolist() == [3, 4]
    assert ess.lines[0].get_ydata().tolist() == [25, 50]
    assert "nats" in bounds.get_title() and "%" in ess.get_title()
    assert curves.training([]) is not None  # before the first row


def test_signal_to_noise_has_band_and_floor():
    def run(scale):
        mean, low, high = [1.0 * scale, 0.5 * scale], [0.4 * scale, 0.2 * scale], [2.0 * scale, 1.5 * scale]
        return rows(snr_phi=mean, snr_phi_q25=low, snr_phi_q75=high, snr_phi_floor=[0.06, 0.06], dsnr_phi=mean)

    drawn = curves.signal_to_noise({"vae": run(1), "iwae": run(0.1)}, ("snr", "dsnr"))
    panel = drawn.axes[0]
    assert panel.lines[0].get_ydata().tolist() == [1.0, 0.5] and panel.lines[0].get_label() == "vae"
    (floor,) = (line for line in panel.lines if line.get_linestyle() == ":")
    assert set(floor.get_ydata()) == {0.06}
    band = {tuple(map(float, v)) for v in panel.collections[1].get_paths()[0].vertices}
    assert {(0, 0.04), (10, 0.02), (0, 0.2)} <= {(x, round(y, 6)) for x, y in band}
    assert panel.get_yscale() == "log" and len({line.get_color() for line in panel.lines[:3]}) == 3
    assert drawn.axes[2].lines[0].get_ydata().tolist() == [1.0, 0.5] and drawn.axes[2].get_ylabel()[:4] == "DSNR"


# --- the callback -------------------------------------------------------------------------------------------

OF_MODEL = {"samples", "reconstructions", "posteriors", "weights"}
CHEAP = {"samples": 4, "reconstructions": 3, "posteriors": 2, "particles": 50}


def pictures(run):
    return {path.stem for path in (run / "figures").glob("*.png")}


def test_pictures_are_drawn_at_an_interval_and_at_the_end_and_training_does_not_notice(tmp_path):
    plain, drawn = iw_module(), iw_module()
    options = {"max_epochs": 3, "default_root_dir": tmp_path}
    fit(plain, toy_data(), max_epochs=3)
    after = torch.get_rng_state()
    fit(drawn, toy_data(), Figures(every_n_epochs=2, **CHEAP), **options)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, plain.state_dict().values(), drawn.state_dict().values()))
    assert pictures(tmp_path) == OF_MODEL  # this logger keeps no metrics.csv
    history = {path.stem for path in (tmp_path / "figures/history").iterdir()}
    assert history == {f"{name}-{step:08d}" for name in OF_MODEL for step in (8, 12)}
    for name in OF_MODEL:
        latest = (tmp_path / f"figures/{name}.png").read_bytes()
        assert latest == (tmp_path / f"figures/history/{name}-00000012.png").read_bytes()
        assert imread(tmp_path / f"figures/{name}.png").shape[1] == 900
    assert not list(tmp_path.rglob(".*"))  # nothing temporary


class Moody(nn.Module):
    """A conditional model for labelled data, with layers that behave otherwise in training; notes what it is given."""

    def __init__(self):
        super().__init__()
        self.inference = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.generative = nn.Linear(3, 4)
        self.labels, self.shapes, self.modes = [], [], []

    def prior(self, y):
        return Independent(Normal(torch.zeros(3), 1.0), 1)

    def posterior(self, x, y):
        self.labels.append(y.tolist())
        self.modes.append(self.inference.training)
        return Independent(Normal(self.inference(x), 1.0), 1)

    def likelihood(self, z, y):
        self.shapes.append((z.shape[1], len(y)))
        return Independent(Bernoulli(logits=self.generative(z), validate_args=False), 1)


def test_labels_go_to_the_model_and_modes_and_statistics_are_as_before(tmp_path):
    network = Moody()
    module = IWModule(network, samples=4, theta=Side("iwae", 4), phi=Side("iwae", 4))
    module.network.inference[2].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = Figures(**CHEAP)
    callback._keep((torch.rand(10, 4).round(), torch.arange(10)))

    class Stub:
        global_step, is_global_zero, default_root_dir, loggers, datamodule = 7, True, tmp_path, [], None

    callback.on_train_end(Stub(), module)
    assert pictures(tmp_path) == OF_MODEL
    assert list(range(10)) in network.labels and network.labels[-1] == [0, 1]
    assert network.shapes[0] == (4, 4)  # as many samples as labels
    assert not any(network.modes)
    assert network.inference[1].training and not network.inference[2].training and module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_picture_that_fails_is_warned_of_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "figures").write_text("in the way")
    with pytest.warns(UserWarning, match="Figures: .* not drawn: (FileExists|NotADirectory)Error") as caught:
        trainer, _ = fit(
            iw_module(), toy_data(), Figures(every_n_epochs=1, **CHEAP), max_epochs=3, default_root_dir=tmp_path
        )
    said = [str(warning.message).split()[1] for warning in caught if "Figures:" in str(warning.message)]
    assert trainer.current_epoch == 3 and sorted(said) == sorted(OF_MODEL)


def test_without_validation_data_training_data_are_shown(tmp_path):
    fit(iw_module(), toy_data(), Figures(**CHEAP), default_root_dir=tmp_path, limit_val_batches=0)
    assert pictures(tmp_path) == OF_MODEL


@pytest.mark.parametrize(
    ("option", "message"),
    [({"every_n_epochs": 0}, "every_n_epochs must be at least 1"), ({"particles": 1}, "particles must be at least 2")],
)
def test_options_are_checked(option, message):
    with pytest.raises(ValueError, match=f"Figures.{message}. Got"):
        Figures(**option)


def test_matplotlib_waits_for_the_first_picture():
    code = "import sys, lightning_iwae.curves; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


# --- loggers ------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch):
    """The command line on digits for three steps; the run's metrics.csv must be there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def run(directory, *args):
        main(["fit", "-c", "conf/digits.yaml", *args, *SMALL, "--trainer.default_root_dir", str(directory)])
        return curves.read(directory / "metrics.csv")

    return run


def test_tensorboard_has_metrics_config_and_pictures(cli, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    monkeypatch.setattr(curves, "training", lambda rows: seen.append(rows) or curves.figure(2))
    rows = cli(tmp_path / "run", "-c", "conf/logger/tensorboard.yaml")
    assert [dict(row) for row in seen[0]] == [dict(row) for row in rows]  # all that were logged until then
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    steps, values = curves.column(rows, "train/bound_theta")
    logged = events.Scalars("train/bound_theta")
    assert [event.step for event in logged] == steps.tolist()
    assert [event.value for event in logged] == pytest.approx(values.tolist())
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in OF_MODEL | {"training", "snr"}}
    (image,) = events.Images("figures/samples")
    assert (image.width, image.step) == (900, 3)
    assert "latent: 10" in (tmp_path / "run/tensorboard/hparams.yaml").read_text()
    assert "save_dir: .\n" in (tmp_path / "run/config.yaml").read_text()  # for a repetition elsewhere


def test_overlays_laid_over_each_other(cli, tmp_path, capsys):
    def logger(*names):
        with pytest.raises(SystemExit):
            cli(
                tmp_path / "run",
                *(arg for name in names for arg in ("-c", f"conf/logger/{name}.yaml")),
                "--print_config",
            )
        return yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]

    assert logger("tensorboard", "csv") is None
    options = logger("tensorboard", "wandb")["init_args"]
    assert (options["name"], options["version"], options["project"]) == (None, None, "lightning-iwae")


def test_a_logger_that_is_not_installed_is_named_with_what_installs_it(cli, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli(tmp_path / "run", "-c", "conf/logger/wandb.yaml")
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    message = "trainer.logger: WandbLogger needs wandb: pip install 'lightning-iwae[wandb]'."
    assert message in capsys.readouterr().err
