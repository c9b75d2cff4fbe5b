"""A run in one line, without Lightning's trainer: its network with the weights of a checkpoint, and what it is for."""

from argparse import ArgumentError
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.distributions import Distribution

from . import evaluation, resume
from .class_paths import find_class
from .diagnostics import LEAST_PARTICLES
from .evaluation import moment
from .mistakes import Mistake, shown
from .models import check_model, data_shape, draw_prior, given
from .randomness import forked, seed_for

Array = Tensor | np.ndarray
DATA_AT_ONCE, NUMBERS_AT_ONCE = 256, 2**22


class Code(NamedTuple):
    """What q(z | x) says of each datum."""

    mean: Tensor  # (N, ...)
    scale: Tensor | None  # standard deviation, (N, ...); None where the posterior knows none


@dataclass(frozen=True, repr=False)
class Run:
    """A trained network and what it is for; made by `load`.

    Data x are tensors or NumPy arrays (N, ...) of any N, and have the likelihood's shape behind N. uint8 are pixels and
    divided by 255, as the data sets do; all else is taken as it is. y are labels (N,), for a conditional network. Data
    go to the device in chunks, results come back to the CPU. Draws are a function of `seed`, and torch's global random
    state is left alone.
    """

    network: Any  # a models.base.Model, in eval mode on `device`: posterior(x), prior(), likelihood(z)
    config: dict[str, Any]  # the run's settings, as in its config.yaml
    checkpoint: Path
    step: int  # steps of training that are in the checkpoint
    device: torch.device

    def __repr__(self) -> str:
        name = type(self.network).__name__
        return f"Run({name}, {self.checkpoint}, step {self.step}, {self.device})"

    def encode(self, x: Array, y: Array | None = None) -> Code:
        """Mean and scale of q(z | x). The distribution itself is `run.network.posterior(x)`."""

        def moments(model: Any, part: Tensor) -> dict[str, Tensor]:
            q = model.posterior(part)
            scale = moment(q, "stddev")
            return {"mean": self._mean(q, "posterior")} | ({} if scale is None else {"scale": scale})

        found = self._each(moments, x, y)
        return Code(found["mean"], found.get("scale"))

    def reconstruct(self, x: Array, y: Array | None = None, seed: int = 0) -> Tensor:
        """Mean of p(x | z) at the posterior's mean, or at one draw of z if it has none. As x, but float."""

        def decoded(model: Any, part: Tensor) -> dict[str, Tensor]:
            q = model.posterior(part)
            z = moment(q, "mean")
            return {"x": self._mean(model.likelihood((q.sample() if z is None else z)[None]), "likelihood")[0]}

        return self._each(decoded, x, y, seed)["x"]

    def sample(self, n: int, y: Array | int | None = None, mean: bool = False, seed: int = 0) -> Tensor:
        """n draws x ~ p(x), (n, ...); with `mean` the smoother means of p(x | z). A single label y is that of all."""
        if n < 1:
            raise ValueError(f"n must be at least 1. Got {n}.")
        labels = None if y is None else torch.as_tensor(y)
        if labels is not None and labels.shape not in ((), (n,)):
            raise ValueError(f"y must be one label or {n}. Got shape {tuple(labels.shape)}.")
        labels = labels if labels is None else labels.expand(n)
        found = []
        with torch.no_grad(), forked(seed_for(seed, "run"), self.device):
            for start in range(0, n, DATA_AT_ONCE):
                model = self._given(labels, start, start + DATA_AT_ONCE)
                p = model.likelihood(draw_prior(model, min(DATA_AT_ONCE, n - start)))
                found.append((self._mean(p, "likelihood") if mean else p.sample())[0].cpu())
        return torch.cat(found)

    def log_px(self, x: Array, particles: int = 5000, y: Array | None = None, seed: int = 0) -> Tensor:
        """log p(x) of each datum by importance sampling: (N,), nats. How far to trust it is in `evaluate`."""
        return self.evaluate(x, particles, y, seed)["log_px"]

    def evaluate(self, x: Array, particles: int = 5000, y: Array | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Of each datum, (N,): log_px, elbo, rate, distortion, iwae_64, both KLs (nats), ess (fraction) and k_hat.

        As `evaluation.evaluate` names them; memory grows neither with N nor with particles. k_hat is left out below 25
        particles.
        """

        def figures(model: Any, part: Tensor) -> dict[str, Tensor]:
            return evaluation.evaluate(model, part, particles, k_hat=particles >= LEAST_PARTICLES)

        return self._each(figures, x, y, seed)

    def data(self, stage: str = "test") -> Any:
        """The run's data module, after `prepare_data()` and `setup(stage)`. Imports Lightning."""
        from lightning.pytorch import LightningDataModule

        if "data" not in self.config:
            raise ValueError(f"the settings of {self.checkpoint} name no data.")
        data = build(LightningDataModule, self.config["data"], self.config.get("seed_everything"))
        data.prepare_data()
        data.setup(stage)
        return data

    # ---------------------------------------------------------------------------------------------- data in chunks
    def _each(
        self, f: Callable[[Any, Tensor], dict[str, Tensor]], x: Array, y: Array | None, seed: int = 0
    ) -> dict[str, Tensor]:
        """What f(model, chunk of x) gives, joined."""
        with torch.no_grad(), forked(seed_for(seed, "run"), self.device):
            parts = [{k: v.cpu() for k, v in f(*chunk).items()} for chunk in self._chunks(x, y)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chunks(self, x: Array, y: Array | None) -> Iterator[tuple[Any, Tensor]]:
        x = x if isinstance(x, Tensor) else np.asarray(x)
        self._check(x, y)
        size = max(1, min(DATA_AT_ONCE, NUMBERS_AT_ONCE // max(1, int(np.prod(x.shape[1:])))))
        for start in range(0, max(1, len(x)), size):  # one empty chunk if there are no data
            yield self._given(y, start, start + size), self._tensor(x[start : start + size])

    def _given(self, y: Array | None, start: int, stop: int) -> Any:
        """The model at labels y[start:stop], if there are labels."""
        return given(self.network, None if y is None else torch.as_tensor(y[start:stop]).to(self.device))

    def _check(self, x: Array, y: Array | None) -> None:
        model = self._given(y, 0, 1)
        with forked(0, self.device):
            shape = data_shape(model)
        if not x.ndim or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, shape))}). Got {tuple(x.shape)}.")
        if y is not None and len(y) != len(x):
            raise ValueError(f"y must have {len(x)} labels, one a datum. Got {len(y)}.")
        if x.dtype in (torch.uint8, np.uint8) and len(x) and x.max() == 1:
            raise ValueError("x must be floats if it is zeros and ones. Got uint8, which are divided by 255.")

    def _tensor(self, part: Array) -> Tensor:
        """A chunk in the network's type, on its device."""
        if not isinstance(part, Tensor):
            if part.dtype.kind not in "biuf":
                raise ValueError(f"x must be real numbers. Got {part.dtype}.")
            part = torch.from_numpy(np.require(part, part.dtype.newbyteorder("="), ["C", "W"]))
        elif part.is_complex():
            raise ValueError(f"x must be real numbers. Got {part.dtype}.")
        pixels = part.dtype == torch.uint8
        part = part.to(self.device, next(self.network.parameters()).dtype)
        if bad := int((~part.isfinite()).sum()):
            raise ValueError(f"x must be finite. Got {bad} numbers that are not.")
        return part / 255 if pixels else part

    def _mean(self, p: Distribution, what: str) -> Tensor:
        mean = moment(p, "mean")
        if mean is None:
            raise ValueError(f"the {what} of {type(self.network).__name__} has no mean: draw from it, by run.network.")
        return mean


# --------------------------------------------------------------------------------------------------- from its files
def load(path: str | Path, checkpoint: str = "best", device: str | torch.device = "cpu") -> Run:
    """A finished run, ready to encode, reconstruct, sample and evaluate.

    The network is made from config.yaml (its class must be importable), or without one from the settings that the
    checkpoint holds. Checkpoints are read without running code of theirs.

    Args:
        path: the run's directory, or a checkpoint file.
        checkpoint: which of the directory's, `best`, `last` or another name in checkpoints/.
        device: where the network goes.

    Raises:
        ValueError: naming the file that is missing, damaged, or of another network.

    Example:
        run = lightning_iwae.load("runs/digits")
        x = run.data().test
        run.log_px(x).mean(), run.encode(x).mean, run.reconstruct(x[:8]), run.sample(16)
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} can't be used: {str(error).splitlines()[0]}") from error
    file = Path(path) if Path(path).is_file() else checkpoint_of(Path(path), checkpoint)
    content = resume.read(file)
    config, source = settings_of(file, content)
    try:
        network = build(nn.Module, config["model"]["network"])
        check_model(network)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: model.network: {error}") from error
    whole = nn.ModuleDict({"network": network})  # the names of IWModule
    resume.check_weights(file, content, whole)
    weights = content["state_dict"]
    whole.to(next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32))
    whole.load_state_dict(weights)
    network.to(device).eval()
    return Run(network, config, file, content["global_step"], device)


def checkpoint_of(directory: Path, name: str) -> Path:
    """The file of a run's checkpoint; ValueError saying what there is instead."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is neither a run's directory nor a checkpoint: there is no such file.")
    file = directory / "checkpoints" / f"{name}.ckpt"
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in file.parent.glob("*.ckpt")))
        files = ", ".join(sorted(p.name for p in directory.iterdir())[:8])
        held = f"checkpoints there are: {there}" if there else f"it holds {files or 'nothing'}"
        raise ValueError(f"{directory} has no checkpoints/{name}.ckpt; {held}.")
    return file


def settings_of(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The settings that a checkpoint belongs to, and the file that they are in."""
    path = file.parent.parent / "config.yaml"
    if file.parent.name == "checkpoints" and path.is_file():
        try:
            config = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    else:
        path, config = file, content.get("settings")
        if config is None:
            raise ValueError(f"{file} is not in the checkpoints/ of a run with a config.yaml, and has no settings.")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or "network" not in model:
        raise ValueError(f"{path} is no run's config: it has no model.network.")
    return config, path


def build(base: type, settings: Any, seed: int | None = None) -> Any:
    """The `base` that {class_path, init_args} asks for; `seed` is its seed, if it takes one. ValueError if it can't be.

    torch's global random state is left alone.
    """
    settings = {"class_path": settings} if isinstance(settings, str) else settings
    if not isinstance(settings, dict) or not isinstance(settings.get("class_path"), str):
        raise ValueError(f"must be a class_path and init_args. Got {shown(settings)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it", required=True)
    if seed is not None:
        parser.add_argument("--seed", type=int)
        parser.link_arguments("seed", "it.init_args.seed")
    try:
        find_class(settings["class_path"], [base])
        parsed = parser.parse_object({"it": settings} | ({} if seed is None else {"seed": seed}))
    except (Mistake, ArgumentError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    with forked(0, torch.device("cpu")):
        # named `instantiate` from jsonargparse 4.49 on
        return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed).it
