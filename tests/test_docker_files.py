"""What docker/ says, as far as it can be read without an engine; tests/slow/test_docker.py builds and runs it."""

import re
import subprocess
import sys

import pytest
import torch
import yaml

from .conftest import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = (ROOT / "docker/compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
STORAGE = "postgresql+psycopg2://optuna@database/optuna"


def test_every_package_is_pinned_by_the_constraints():
    installs = re.findall(r"pip install (?:[^&\n\\]|\\\n)*", DOCKERFILE)
    assert len(installs) == 3
    for install in installs:
        assert install.startswith("pip install --constraint constraints.txt "), install


def test_both_stages_have_one_base_so_that_the_environment_finds_its_python():
    first, second = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert first == second and re.search(r":3\.\d+-slim$", first)


def test_only_what_the_image_is_made_of_is_sent_to_the_engine():
    """An allow-list: everything is ignored first, and what is let in is what a COPY names."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    let_in = {line[1:] for line in ignored if line[0] == "!"}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    assert let_in == set(" ".join(copies).split())
    secret = {".env", "docker/.env", ".git", ".venv", "runs", "data", "docker"}
    assert not let_in & secret and ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_has_the_services_and_builds_the_image_by_arguments_that_it_has():
    assert set(SERVICES) == {"database", "worker", "dashboard"}
    for name in ("worker", "dashboard"):
        service = SERVICES[name]
        assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["depends_on"]["database"]["condition"] == "service_healthy"
    volumes = re.search(r"^VOLUME (.*)$", DOCKERFILE, re.M)
    assert volumes and {v.partition(":")[2] for v in SERVICES["worker"]["volumes"]} == set(yaml.safe_load(volumes[1]))
    assert SERVICES["database"]["healthcheck"]["test"][1] == "pg_isready"


def test_workers_and_dashboard_meet_in_one_storage():
    assert SERVICES["worker"]["environment"]["LIGHTNING_IWAE_STORAGE"] == STORAGE
    assert SERVICES["dashboard"]["entrypoint"][-1] == STORAGE
    database = SERVICES["database"]["environment"]
    assert STORAGE.endswith(f"//{database['POSTGRES_USER']}@database/{database['POSTGRES_DB']}")


def test_no_password_is_written_down_and_without_one_compose_stops():
    settings = [(k, v) for s in SERVICES.values() for k, v in s["environment"].items() if "PASSWORD" in k]
    assert len(settings) == 3
    for key, value in settings:  # ":?" ends the command if it is not set, or empty
        assert re.fullmatch(r"\$\{DATABASE_PASSWORD:\?[^}]+\}", value), key
    assert not re.search(r"://[^\s/@]*:[^\s/@]*@", COMPOSE)  # nor in a URL


def test_nothing_is_published_beyond_the_machine():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_overlay_for_gpus_asks_for_the_cuda_build_and_a_gpu():
    overlay = yaml.safe_load((ROOT / "docker/compose.gpu.yaml").read_text())["services"]
    for service in overlay.values():
        assert service["build"]["args"] == {"DEVICE": "cuda"} and "cuda" in service["image"]
    (device,) = overlay["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/docker.md")}


@pytest.mark.parametrize("page", PAGES)
def test_a_folder_that_is_mounted_is_there_and_its_owner_writes_to_it(page):
    """Docker would make it for root."""
    blocks = re.findall(r"(?:^(?: {4}.*|\n)\n)+|^```\n[^`]*", PAGES[page], re.M)
    mounting = [block for block in blocks if '-v "$PWD/runs:' in block]
    assert mounting
    for block in mounting:
        assert block.index("mkdir -p runs") < block.index("docker run")
        for command in re.findall(r"docker run (?:[^\n\\]|\\\n)*", block):
            assert '--user "$(id -u):$(id -g)"' in command, command


def test_the_runs_are_copied_into_the_folder_and_not_below_it():
    assert re.findall(r"compose.yaml cp (\S+ \S+)", PAGES["docs/docker.md"]) == ["worker:/app/runs/. ./runs"]


def check_torch(device: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docker/check_torch.py"), device]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_build_ends_where_torch_is_not_for_the_device(device):
    done = check_torch(device)
    if device == ("cpu" if torch.version.cuda is None else "cuda"):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and f"DEVICE={device}, but pip chose torch {torch.__version__} " in done.stderr


def test_another_device_is_refused():
    done = check_torch("gpu")
    assert done.returncode == 1 and done.stderr == "DEVICE must be cpu or cuda. Got 'gpu'.\n"
