"""Data sets of published files: kept in a folder, checked before use, and fetched where the folder has none."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_info

from lightning_iwae.data import files
from lightning_iwae.data.base import ArrayData, Binarization, DataError

Fetch = Callable[[], dict[str, bytes]]  # gives all files asked for by their names, or raises DataError


class Published(ArrayData):
    """Base of data sets whose files someone else publishes.

    A subclass says which files (`names`), under which names each is taken (`forms`), how one is checked (`check`)
    and where they come from (`sources`). Downloads are checked and then written to the folder as they came. A wrong
    file in the folder is an error, and stays as it is.

    Args:
        folder: where the files are, or go. None is the title below the environment variable LIGHTNING_IWAE_DATA, or
            below `data` if that is not set.
        download: fetch what the folder lacks.
        batch_size: and all others: see `ArrayData`.
    """

    title: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        folder: str | None,
        download: bool,
        batch_size: int,
        validation: int,
        seed: int,
        binarization: Binarization,
        limit_train: int | None,
        labels: bool,
    ) -> None:
        super().__init__(batch_size, validation, seed, binarization, limit_train, labels)
        root = os.environ.get("LIGHTNING_IWAE_DATA", "data")
        self.folder = Path(folder) if folder is not None else Path(root) / self.title.lower()
        self.download = download

    def forms(self, name: str) -> list[str]:
        """Names under which a file is taken: that of the file as it is used first, that of the mirrors last."""
        return [name]

    def check(self, form: str, content: bytes, origin: str) -> bytes:
        """The file's content as it is used; DataError, naming `origin`, if it is not the published one."""
        raise NotImplementedError

    def sources(self, missing: list[str]) -> dict[str, Fetch]:
        """Where the missing files can be had, in the order in which it is tried."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Checks the folder's files and fetches those it lacks. Lightning runs it in one process a node."""
        files.remove_leftovers(self.folder)
        paths = {name: self.find(name) for name in self.names}
        for path in filter(None, paths.values()):
            self.check(path.name, files.read(path), str(path))
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            self._fetch(missing)

    def find(self, name: str) -> Path | None:
        """Where the file is: in the folder, or in torchvision's layout below it."""
        return files.find(
            self.folder, [f"{place}{f}" for place in ("", f"{self.title}/raw/") for f in self.forms(name)]
        )

    def read(self, name: str) -> tuple[bytes, str]:
        """A file's content as it is used, checked, and its path for messages."""
        path = self.find(name)
        if path is None:
            raise DataError(f"{self.title}: no {self.forms(name)[0]} in {self.folder}. Call prepare_data() first.")
        return self.check(path.name, files.read(path), str(path)), str(path)

    def lack(self, name: str) -> str:
        """What the folder has not."""
        return self.forms(name)[0]

    def _fetch(self, missing: list[str]) -> None:
        reasons = {f"folder {self.folder}": f"no {', '.join(map(self.lack, missing))}"}
        for source, fetch in self.sources(missing).items():
            if not self.download:
                reasons[source] = "not tried, since data.download is false"
                continue
            try:
                contents = fetch()
                for form, content in contents.items():
                    self.check(form, content, form)
            except DataError as error:
                reasons[source] = str(error)
                continue
            for form, content in contents.items():
                files.write_whole(self.folder / form, content)
            rank_zero_info(f"{self.title}: {len(contents)} files from {source}, checked, now in {self.folder}")
            return
        raise DataError(self._not_found(reasons))

    def _not_found(self, reasons: dict[str, str]) -> str:
        tried = "\n".join(f"  - {source}: {reason}" for source, reason in reasons.items())
        wanted = ", ".join(" or ".join(self.forms(name)) for name in self.names)
        return (
            f"{self.title} was not found. Tried in this order:\n{tried}\n"
            f"Put {wanted} into {self.folder}, or set data.folder to where they are. scikit-learn's 8x8 digits need no "
            f"download: conf/digits.yaml."
        )
