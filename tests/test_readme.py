"""The README is true: its code runs, its commands run (a few steps, on stand-in data), its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_iwae.cli import main

from .test_cli import ROOT, SMALL, STAND_IN

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [c for block in re.findall(r"```bash\n(.*?)```", README, re.S) for c in block.splitlines() if c]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A folder with the README's own modules in it, and conf/ beside them."""
    for code in PYTHON:
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)  # seconds; see test_figures.py
    yield
    for name in ("my_models", "my_estimators"):
        sys.modules.pop(name, None)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 3 and len(COMMANDS) >= 8


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, capsys):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "lightning_iwae"]
    args = words[3:]
    if args[0] == "test":
        main(["fit", "-c", "conf/digits.yaml", "--trainer.default_root_dir", "runs/digits", *SMALL])
    stand_in = STAND_IN if any("mnist" in a for a in args) else []
    if "--print_config" in args:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 0
        return
    main([*args, *SMALL, *stand_in])
    assert "The run's files are in" in capsys.readouterr().out or args[0] == "test"


@pytest.mark.parametrize("config", re.findall(r"```yaml\n(.*?)```", README, re.S), ids=["model"])
def test_yaml(config, tmp_path):
    (tmp_path / "options.yaml").write_text(config)
    main(["fit", "-c", "conf/digits.yaml", "-c", "options.yaml", *SMALL])
    (saved,) = tmp_path.glob("runs/*/config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["accumulate"] == yaml.safe_load(config)["model"]["accumulate"]


def test_files_and_configs_that_it_names_exist():
    named = re.findall(r"`((?:conf|docs|benchmarks|lightning_iwae|tests)/[\w./]*\w)`", README)
    named += re.findall(r"\]\((\w[\w./]*\.\w+)\)", README)
    assert len(named) > 6
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_objective_and_run_is_in_the_tables():
    for overlay in (ROOT / "conf/objective").iterdir():
        assert f"| `{overlay.stem}` |" in README
    for config in (ROOT / "conf").glob("*.yaml"):
        assert f"| `conf/{config.name}` |" in README


def test_make_lists_its_targets():
    make = ["make", "--no-print-directory", "help"]  # also where `make test` runs this
    listed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {"help", "setup", "run", "test", "test-slow", "check"}
    assert Path(ROOT / ".ci/run").stat().st_mode & 0o111
