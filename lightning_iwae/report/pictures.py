"""The runs' own figures/*.png, small enough to go into one page."""

import base64
import io
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from .groups import Group
from .runs import Run

WIDTH = 720  # pixels
KEPT = 120_000  # bytes: a picture up to this size, and not wider, is taken as it is
BUDGET = 8_000_000  # bytes of all pictures in a page


class Picture(NamedTuple):
    """A picture of one run, as the page shows it."""

    group: int
    run: Run
    path: Path
    uri: str  # data:...
    width: int
    height: int


def representative(group: Group) -> Run | None:
    """Of the runs with pictures the one with the middle log p(x), or the first if that is not known."""
    runs = [run for run in group.runs if run.pictures]
    rated = sorted((run for run in runs if "log_px" in run.figures), key=lambda run: run.figures["log_px"].mean)
    return rated[(len(rated) - 1) // 2] if rated else next(iter(runs), None)


def gallery(groups: list[Group], chosen: list[int]) -> tuple[dict[str, list[Picture]], list[str]]:
    """Pictures by kind, one representative run for each of the chosen groups, and sentences on those left out."""
    wanted: dict[str, list[tuple[int, Run, Path]]] = defaultdict(list)
    for i in chosen:
        if (run := representative(groups[i])) is not None:
            for name, path in {kind(path): path for path in run.pictures}.items():  # the last of each kind
                wanted[name].append((i, run, path))
    out: dict[str, list[Picture]] = defaultdict(list)
    problems, left = [], BUDGET
    for name, row in wanted.items():
        for i, run, path in row:
            try:
                media, data, size = shrunk(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                problems.append(f"{path} is damaged: {str(error)[:100]}")
                continue
            if len(data) * 4 / 3 > left:
                problems.append(f"{path} is left out: the page is full")
                continue
            left -= len(data) * 4 // 3
            uri = f"data:{media};base64,{base64.b64encode(data).decode()}"
            out[name].append(Picture(i, run, path, uri, *size))
    return dict(out), problems


def kind(path: Path) -> str:
    """samples-000300.png, samples_step=300.png and samples.png are all `samples`."""
    return re.sub(r"([-_.]?(step|epoch)?[-_=]?\d+)+$", "", path.stem) or path.stem


def shrunk(path: Path) -> tuple[str, bytes, tuple[int, int]]:
    """(media type, bytes, (width, height)) of a picture, made smaller if it is large."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # a torn file shows here
        if image.format == "PNG" and len(data) <= KEPT and image.width <= WIDTH:
            return "image/png", data, image.size
        small = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    small.thumbnail((WIDTH, 2 * WIDTH))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82)
    return "image/webp", buffer.getvalue(), small.size


def link(path: Path, page: Path) -> str:
    """A relative address of a file, as seen from the page."""
    return quote(os.path.relpath(path.absolute(), page.parent.absolute()).replace(os.sep, "/"))
