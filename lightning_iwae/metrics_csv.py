"""metrics.csv: a row as soon as it is logged, and after a resume the rows of the unbroken run."""

import csv
import io
import os
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from .writing import part, replacing


class MetricsCSV(Logger):
    """Writes metrics.csv, for `csv.DictReader`: the columns `step` and, as they come, whatever is logged.

    A row is handed to the system at once, so that a killed process loses none. A new column makes the file be
    written anew (whole or not at all), with empty cells in the rows so far; other rows are appended.

    `mark` and `cut` are for checkpoints: what is on the disk now, and back to that.

    Args:
        directory: of the run; the command line sets it.
    """

    def __init__(self, directory: str | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.rows = 0
        self.columns: list[str] = []
        self._file: TextIO | None = None

    @property
    def path(self) -> Path:
        """metrics.csv in the run's directory."""
        return Path(self.directory or ".") / "metrics.csv"

    @property
    def name(self) -> str:
        """None: the directory says it all."""
        return ""

    @property
    def version(self) -> str:
        """None."""
        return ""

    @property
    def save_dir(self) -> str | None:
        """The run's directory."""
        return self.directory

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append one row."""
        row = {"step": self.rows if step is None else step}
        row |= {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        new = [name for name in row if name not in self.columns]
        if new:
            self._add_columns(new)
        if self._file is None:
            self._file = open(self.path, "a", newline="")  # noqa: SIM115 (finalize closes it)
        csv.DictWriter(self._file, self.columns, lineterminator="\n").writerow(row)
        self._file.flush()
        self.rows += 1

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later row opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def mark(self) -> dict[str, Any]:
        """How far the file is, for `cut`. All of it is on the disk afterwards, safe from a power cut too."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"rows": self.rows, "columns": list(self.columns)}

    def cut(self, rows: int, columns: list[str]) -> None:
        """Bring the file back to what it was at `mark`: no later rows or columns, no line that was torn.

        A file that is not there, as in a fresh directory, stays so and begins anew.
        """
        self.finalize("cut")
        part(self.path).unlink(missing_ok=True)
        if not rows or not self.path.exists():
            return
        with open(self.path, newline="") as file:
            header = next(csv.reader([file.readline()]), [])
            if header[: len(columns)] != columns:
                raise ValueError(f"{self.path} must begin with the columns {columns} of the checkpoint. Got {header}.")
            later = len(header) - len(columns)  # empty in all rows that are kept
            kept = (line.rstrip("\r\n")[: -later or None] for line in islice(file, rows))
            self.rows = self._write(columns, kept)
        self.columns = list(columns)

    def read(self) -> list[dict[str, str]]:
        """The rows so far, as they are written."""
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _add_columns(self, names: list[str]) -> None:
        self.finalize("new columns")
        columns = self.columns + names
        if self.columns:
            with open(self.path, newline="") as file:
                file.readline()
                self._write(columns, (line.rstrip("\n") + "," * len(names) for line in file))
        else:
            self._write(columns, ())
        self.columns = columns

    def _write(self, columns: list[str], lines: Iterable[str]) -> int:
        header = io.StringIO()
        csv.writer(header, lineterminator="").writerow(columns)
        rows = -1
        with replacing(self.path) as file:
            for line in chain([header.getvalue()], lines):
                file.write(f"{line}\n".encode())
                rows += 1
        return rows
