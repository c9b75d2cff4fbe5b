"""Pictures along a run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from .. import curves, figures, posteriors
from ..models import Batch, cut, draw_posterior, given, split
from ..module import IWModule
from ..randomness import forked, seed_for
from ..writing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = dict[str, Callable[[], "Figure"]]
Shape = tuple[int, ...] | None
KEPT = 256  # data of the first batch, from which the active dimensions are found


class Figures(Callback):
    """Draws RUN/figures/NAME.png at an interval and at the end of a fit, and hands the pictures to TensorBoard and W&B.

    samples, reconstructions, posteriors, weights: of the same z and the same data, the first of the validation data
    (of the training data where there are none), along the whole run, so that pictures compare. training, snr: from the
    rows of metrics.csv, so that a resumed run's show all of it. NAME.png is the latest; the first four are kept as
    history/NAME-STEP.png too.

    Only the first process draws. Training is untouched: parameters, .grad, modes and random state are as before. A
    picture that fails is warned of once, and the run goes on.

    Args:
        every_n_epochs: interval; None draws at the end only.
        samples: draws of z ~ p(z).
        reconstructions: data reconstructed.
        posteriors: data whose posterior and importance weights are shown.
        particles: K of both.
        history: keep pictures of earlier steps.
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        samples: int = 64,
        reconstructions: int = 16,
        posteriors: int = 6,
        particles: int = 5000,
        history: bool = True,
    ) -> None:
        counts = {"samples": samples, "reconstructions": reconstructions, "posteriors": posteriors}
        for name, value, least in (
            ("every_n_epochs", 1 if every_n_epochs is None else every_n_epochs, 1),
            *((name, count, 1) for name, count in counts.items()),
            ("particles", particles, 2),
        ):
            if value < least:
                raise ValueError(f"Figures.{name} must be at least {least}. Got {value}.")
        self.every_n_epochs, self.particles, self.history = every_n_epochs, particles, history
        self.samples, self.reconstructions, self.posteriors = samples, reconstructions, posteriors
        self._batch: Batch | None = None
        self._drawn_at = -1
        self._failed: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget an earlier fit."""
        self._batch, self._drawn_at = None, -1

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the data."""
        self._keep(batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the data, if there are no validation data."""
        if not trainer.enable_validation:
            self._keep(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw if due; validation is over by now."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the last state, unless it was."""
        if trainer.global_step != self._drawn_at:
            self._draw(trainer, pl_module)

    def _keep(self, batch: Any) -> None:
        if self._batch is None:
            self._batch = cut(batch, KEPT)

    def _draw(self, trainer: Trainer, module: IWModule) -> None:
        self._drawn_at = step = trainer.global_step
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        with self._guard("pictures"), _untouched(module):
            for logger in trainer.loggers:
                logger.save()  # rows that it holds back
            of_model = self._of_model(trainer, module.network)
            for name, draw in (of_model | _of_metrics(run / "metrics.csv")).items():
                with self._guard(name), forked(seed_for(module.seed, "figures"), module.device):
                    pixels = figures.render(draw())
                    content = figures.png(pixels)
                    _write(run / "figures" / f"{name}.png", content)
                    if self.history and name in of_model:
                        _write(run / "figures/history" / f"{name}-{step:08d}.png", content)
                    _hand_over(trainer.loggers, f"figures/{name}", pixels, step)

    def _of_model(self, trainer: Trainer, network: Any) -> Pictures:
        if self._batch is None:
            return {}
        declared = getattr(trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        shape = figures.image_shape(split(self._batch)[0], declared)
        drawn_by = [self._samples, self._reconstructions, self._posteriors, self._weights]
        model, x = self._first(network, 1)
        with forked(0, x.device):
            if not draw_posterior(model.posterior(x), 1)[1]:  # a discrete z has no density to draw
                drawn_by.remove(self._posteriors)
        return {draw.__name__[1:]: partial(draw, network, shape) for draw in drawn_by}

    def _samples(self, network: Any, shape: Shape) -> "Figure":
        model, x = self._first(network, self.samples)
        prior = model.prior()
        z = prior.sample((1,) if prior.batch_shape else (1, self.samples if model is network else len(x)))
        return figures.samples(model.likelihood(z).mean[0], shape)

    def _reconstructions(self, network: Any, shape: Shape) -> "Figure":
        model, x = self._first(network, self.reconstructions)
        drawn = posteriors.draw(model, x, self.particles)
        rows = {
            "data x": x,
            "mean of p(x|z) at the mean of q(z|x)": model.likelihood(drawn.z.mean(0, keepdim=True)).mean[0],
            "mean of p(x|z) at a draw of p(z|x)": model.likelihood(posteriors.resample(drawn)).mean[0],
        }
        return figures.reconstructions(rows, shape)

    def _posteriors(self, network: Any, shape: Shape) -> "Figure":
        model, x = self._first(network, self.posteriors)
        drawn = posteriors.draw(model, x, self.particles)
        everything, data = self._first(network, KEPT)
        means = draw_posterior(everything.posterior(data), 100)[0].mean(0).reshape(len(data), -1)
        dimensions = posteriors.active_dimensions(means)
        views = posteriors.views(model, x, drawn, dimensions)
        return figures.posteriors(x, {"": views}, shape, [f"z[{i}]" for i in dimensions])

    def _weights(self, network: Any, shape: Shape) -> "Figure":
        model, x = self._first(network, self.posteriors)  # the same particles as there
        return figures.weights(posteriors.draw(model, x, self.particles).log_w)

    def _first(self, network: Any, count: int) -> tuple[Any, Tensor]:
        """The first data, and the model for them: of a conditional network the one given their labels."""
        assert self._batch is not None
        x, y = split(cut(self._batch, count))
        return given(network, y), x

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """A picture is not worth a run of days."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(f"Figures: {name} not drawn: {type(error).__name__}: {error}", stacklevel=2)


def _of_metrics(path: Path) -> Pictures:
    rows = curves.read(path)
    if not rows:
        return {}
    pictures: Pictures = {"training": lambda: curves.training(rows)}
    if any(row.get("snr/phi") or row.get("snr/theta") for row in rows):
        pictures["snr"] = lambda: curves.signal_to_noise({"": rows}, ("snr", "dsnr"))
    return pictures


@contextmanager
def _untouched(module: IWModule) -> Iterator[None]:
    """Evaluation mode and no gradients; all as before afterwards."""
    modes: list[tuple[nn.Module, bool]] = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _hand_over(loggers: list[Any], name: str, pixels: Any, step: int) -> None:
    """To W&B's and TensorBoard's loggers, each in its way."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [pixels], step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
