"""Pictures of a model: data, means and posteriors in, matplotlib Figures out. Those of a run's metrics: `curves`.

Figures are made by matplotlib's object interface: no pyplot, no back end chosen, nothing global. They are 9 inches
wide, 900 pixels at the resolution of `render`; colours are Okabe and Ito's, which colour-blind readers tell apart, or
shades of one. matplotlib is imported by the first picture.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .posteriors import View
from .weights import normalised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito
POSTERIOR, Q = "black", COLOURS[4]
ENOUGH = 30  # effective particles for a posterior's ellipse: a standard deviation to about 13 %


# --- what every picture shares ------------------------------------------------------------------------------


def figure(height: float, width: float = 9) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def render(drawn: "Figure") -> np.ndarray:
    """Pixels (H, W, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(pixels: np.ndarray) -> bytes:
    """An image file of pixels (H, W, 3)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def image_shape(x: Tensor, declared: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """(height, width) or (height, width, 3) of each of data x (B, ...), or None if they are no images.

    What the data declare (`image_shape` of a data module); else the shape of a datum that has one, channels first;
    else the square root of its length, if that is whole and all values are in [0, 1].
    """
    shape = tuple(x.shape[1:])
    if declared is not None:
        if math.prod(declared) != math.prod(shape):
            raise ValueError(f"image_shape must have {math.prod(shape)} pixels, as the data. Got {tuple(declared)}.")
        return tuple(declared)
    if len(shape) == 3 and shape[0] in (1, 3):
        return (*shape[1:], 3) if shape[0] == 3 else shape[1:]
    if len(shape) == 2:
        return shape
    side = math.isqrt(math.prod(shape))
    pixels = len(shape) == 1 and side > 1 and side**2 == shape[0] and bool(((x >= 0) & (x <= 1)).all())
    return (side, side) if pixels else None


def mosaic(x: Tensor, shape: tuple[int, ...], columns: int) -> np.ndarray:
    """Data x (N, ...) as images, side by side in rows of `columns`, one pixel apart: (H, W) or (H, W, 3) in [0, 1]."""
    images = x.detach().float().cpu()
    images = images.movedim(1, -1) if images.ndim == 4 and len(shape) == 3 else images
    images = images.reshape(len(images), *shape)
    rows = -(-len(images) // columns)
    out = np.full((rows * (shape[0] + 1) - 1, columns * (shape[1] + 1) - 1, *shape[2:]), np.nan, np.float32)
    for i, image in enumerate(images.numpy()):
        top, left = i // columns * (shape[0] + 1), i % columns * (shape[1] + 1)
        out[top : top + shape[0], left : left + shape[1]] = image
    return out


# --- pictures -----------------------------------------------------------------------------------------------


def samples(means: Tensor, shape: tuple[int, ...] | None = None, columns: int = 16) -> "Figure":
    """Means of p(x | z) at z ~ p(z), (N, ...): a mosaic of images of `shape`, or lines over the index of x."""
    title = f"Means of p(x|z) at {len(means)} draws z ~ p(z)"
    if shape is None:
        drawn = figure(3.4)
        axis = drawn.add_subplot()
        axis.plot(means.detach().flatten(1).double().cpu().numpy().T, color=COLOURS[0], lw=0.8, alpha=0.5)
        axis.set(title=title, xlabel="index of x", ylabel="x")
        axis.locator_params("x", integer=True)
        return drawn
    array = mosaic(means, shape, min(columns, len(means)))
    drawn = figure(0.4 + 9 * array.shape[0] / array.shape[1])
    _image(drawn.add_subplot(), array)
    drawn.suptitle(title, fontsize=11)
    return drawn


def reconstructions(rows: Mapping[str, Tensor], shape: tuple[int, ...] | None = None) -> "Figure":
    """Data and what a model makes of them, each (N, ...) by its label: rows of images, or a panel of lines a datum."""
    if shape is None:
        return _reconstructed_lines(rows)
    height = 9 * shape[0] / (shape[1] + 1) / max(map(len, rows.values()))
    drawn = figure(0.1 + len(rows) * (height + 0.35))
    for axis, (label, x) in zip(_column(drawn, len(rows)), rows.items(), strict=True):
        _image(axis, mosaic(x, shape, len(x)))
        axis.set_title(label, loc="left", fontsize=11)
    return drawn


def _reconstructed_lines(rows: Mapping[str, Tensor], most: int = 6) -> "Figure":
    drawn = figure(4)
    axes = drawn.subplots(2, most // 2, sharex=True, sharey=True).flat
    for i, axis in enumerate(axes):
        for (label, x), colour in zip(rows.items(), COLOURS, strict=False):
            if i < len(x):
                values = x[i].detach().flatten().double().cpu().numpy()
                dots = {"ls": "", "marker": "o", "ms": 3, "color": "black"} if label == next(iter(rows)) else {}
                axis.plot(values, label=label, **{"color": colour, "lw": 1.2} | dots)
    for axis in axes.base[-1]:
        axis.set_xlabel("index of x")
    handles, labels = axes.base[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=len(rows), frameon=False)
    return drawn


def posteriors(
    x: Tensor, rows: Mapping[str, Sequence[View]], shape: tuple[int, ...] | None = None, names: Sequence[str] = ("z",)
) -> "Figure":
    """p(z | x) of each of data x (N, ...), one row a model, under the data themselves if they are images.

    Two dimensions: the density as shades, each panel's from 0 to its maximum, with ellipses of two standard deviations
    of p(z | x) (dashed, where the particles suffice) and of q(z | x) (solid). One dimension: both densities as lines.

    Args:
        x: the data.
        rows: label of a model -> a `View` of each datum.
        shape: of an image.
        names: of the dimensions shown.
    """
    count, images = len(x), shape is not None
    size = 8.7 / count
    drawn = figure(0.45 + (size * 0.55 if images else 0) + len(rows) * (size + 0.35))
    ratios = [0.55] * images + [1.0] * len(rows)
    axes = drawn.subplots(len(ratios), count, squeeze=False, gridspec_kw={"height_ratios": ratios})
    if shape is not None:
        for axis, datum in zip(axes[0], x, strict=True):
            _image(axis, mosaic(datum[None], shape, 1))
    for line, (label, views) in zip(axes[images:], rows.items(), strict=True):
        for axis, view in zip(line, views, strict=True):
            (_draw_density if len(view.axes) == 2 else _draw_line)(axis, view)
            if not math.isnan(view.ess):
                axis.set_title(f"ESS {view.ess:.0f}" + ", too few" * (view.ess < ENOUGH), fontsize=9)
        line[0].set_ylabel("\n".join(filter(None, [label, names[1] if len(names) > 1 else "density"])))
    for axis in axes[-1]:
        axis.set_xlabel(names[0])
    panels = [axis.get_legend_handles_labels() for axis in axes[images:].flat]
    legend = {label: handle for panel in panels for handle, label in zip(*panel, strict=True)}
    drawn.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=2, frameon=False)
    return drawn


def _draw_density(axis: "Axes", view: View) -> None:
    from matplotlib.patches import Ellipse

    left, right, bottom, top = (edge for axis in view.axes for edge in _ends(axis))
    axis.imshow(
        view.density.T.numpy(), origin="lower", extent=(left, right, bottom, top), cmap="Blues", vmin=0, aspect="equal"
    )
    for label, mean, cov, colour, dashes in (
        ("p(z|x): density, and two standard deviations", view.mean, view.cov, POSTERIOR, "--"),
        ("q(z|x): two standard deviations", view.q_mean, view.q_cov, Q, "-"),
    ):
        if view.ess < ENOUGH and colour == POSTERIOR:
            continue
        variances, directions = np.linalg.eigh(cov.numpy())
        angle = math.degrees(math.atan2(directions[1, 1], directions[0, 1]))
        width, height = 4 * np.sqrt(np.maximum(variances[::-1], 0))
        ellipse = Ellipse(tuple(mean.tolist()), width, height, angle=angle, fill=False, ec=colour, ls=dashes, lw=1.5)
        ellipse.set_label(label)
        axis.add_patch(ellipse)
    (x, y), half = _window(view)
    axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half), facecolor="#f7fbff")  # the shade of 0
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=3)


def _ends(centres: Tensor) -> tuple[float, float]:
    """Outer edges of the first and the last cell."""
    half = (centres[1] - centres[0]) / 2
    return (centres[0] - half).item(), (centres[-1] + half).item()


def _window(view: View) -> tuple[list[float], float]:
    """Middle and half width of a square round three standard deviations of p(z | x) and of q(z | x)."""
    reaches = [(m, 3 * c.diagonal().clamp(min=0).sqrt()) for m, c in ((view.mean, view.cov), (view.q_mean, view.q_cov))]
    low = torch.stack([m - r for m, r in reaches]).amin(0)
    high = torch.stack([m + r for m, r in reaches]).amax(0)
    return ((low + high) / 2).tolist(), ((high - low) / 2).max().item()


def _draw_line(axis: "Axes", view: View) -> None:
    z = view.axes[0].numpy()
    mean, std = view.q_mean.item(), view.q_cov.sqrt().item()
    axis.fill_between(z, view.density.numpy(), color=COLOURS[0], alpha=0.4, lw=0, label="p(z|x)")
    normal = np.exp(-(((z - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    axis.plot(z, normal, color=Q, lw=1.5, label="q(z|x), as a Normal of its moments")
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=3)


def weights(log_w: Tensor, bins: int = 40) -> "Figure":
    """Importance weights of a few data, log_w (K, B) in nats: how many particles, and how much of the total weight,
    lie where. Particles of less than 1e-4 of the mean weight are counted in the first bin.
    """
    if log_w.ndim != 2:
        raise ValueError(f"log_w must have shape (K, B). Got {tuple(log_w.shape)}.")
    K, B = log_w.shape
    w = normalised(log_w.detach().double().cpu(), 0)
    relative = (w * K).clamp(min=1e-4).log10().numpy()
    edges = np.linspace(-4, max(1.0, math.ceil(relative.max())), bins + 1)
    drawn = figure(2.9)
    axes = drawn.subplots(1, B, sharex=True, sharey=True, squeeze=False)[0]
    for axis, logs, part in zip(axes, relative.T, w.T.numpy(), strict=True):
        counts, mass = (np.histogram(logs, edges, weights=shares)[0] for shares in (np.full(K, 100 / K), 100 * part))
        axis.stairs(counts, edges, fill=True, color="0.65", label=f"of {K} particles")
        axis.stairs(mass, edges, color=COLOURS[4], lw=1.5, label="of their weight")
        axis.axvline(0, color="black", lw=0.8, ls=":")
        ess = 100 / (K * (part**2).sum())
        axis.set_title(f"ESS {ess:.{0 if ess >= 10 else 1 if ess >= 1 else 2}f} %", fontsize=10)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("per cent")
    drawn.supxlabel("log10 of a particle's weight over the mean weight", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return drawn


def _image(axis: "Axes", array: np.ndarray) -> None:
    low, high = min(0.0, float(np.nanmin(array))), max(1.0, float(np.nanmax(array)))
    axis.imshow(array, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
    axis.set_axis_off()


def _column(drawn: "Figure", count: int) -> list["Axes"]:
    return list(drawn.subplots(count, 1, squeeze=False)[:, 0])
