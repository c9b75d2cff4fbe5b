"""The README is true: its code runs, its commands run (a few steps, on stand-in data), its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_iwae import claims
from lightning_iwae.cli import main

from .test_cli import ROOT, SMALL, stand_in

README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
COMMANDS = [c for block in BLOCKS for c in block.splitlines() if c.startswith("python -m lightning_iwae")]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    """A folder with the README's own modules in it, and conf/ beside them."""
    for code in PYTHON:
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    np.save(tmp_path / "pixels.npy", np.arange(200 * 64, dtype=np.uint8).reshape(200, 64))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr("lightning_iwae.callbacks.Figures._draw", lambda *_: None)  # seconds; see test_figures.py
    yield
    for name in ("my_models", "my_estimators", "my_conditional"):
        sys.modules.pop(name, None)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 3 and len(COMMANDS) >= 8


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python(code):
    if "runs/digits" in code:
        a_run()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def a_run():
    main(["fit", "-c", "conf/digits.yaml", "--trainer.default_root_dir", "runs/digits", *SMALL])


LABORATORY = {
    "snr": ["--draws", "8", "--data", "5", "--grid", "1x2,1x4"],
    "claims": ["--draws", "8", "--workers", "1", "--data.init_args.size", "20"],
}
ENDS = {
    "fit": "The run's files are in",
    "test": "L_64",
    "predict": "Saved as",
    "report": "report.html",
    "snr": "snr.png",
    "claims": "2 of 2 claims hold",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, capsys, monkeypatch):
    quick = [claim for claim in claims.CLAIMS if claim.name in ("extended", "erratum")]
    monkeypatch.setattr(claims, "CLAIMS", quick)
    name, *args = shlex.split(command)[3:]
    if "runs" in command:
        a_run()
    if "--print_config" in args:
        with pytest.raises(SystemExit) as stop:
            main([name, *args])
        assert stop.value.code == 0
        return
    local = next((options for a in args if a.endswith(".yaml") and (options := stand_in(a))), [])
    few = {"fit": SMALL, "report": [], **LABORATORY}.get(name, ["--model.test_particles", "70"])
    main([name, *args, *few, *local])
    assert ENDS[name] in capsys.readouterr().out


@pytest.mark.parametrize("config", [c for page in PAGES for c in re.findall(r"```yaml\n(.*?)```", page, re.S)])
def test_yaml(config, tmp_path):
    (tmp_path / "options.yaml").write_text(config)
    if "callbacks" in config or ("class_path" in config and "MLP" in config):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", "conf/digits.yaml", "-c", "options.yaml", "--print_config"])
        assert stop.value.code == 0
        return
    main(["fit", "-c", "conf/digits.yaml", "-c", "options.yaml", *SMALL])
    (saved,) = tmp_path.glob("runs/*/config.yaml")
    saved_model = yaml.safe_load(saved.read_text())["model"]
    for key, value in yaml.safe_load(config)["model"].items():
        if key in ("accumulate", "kl_warmup", "clip_phi"):
            assert saved_model[key] == value


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
    assert {line.split()[0] for line in listed.splitlines()} == {
        *("help", "setup", "run", "test", "test-slow", "certify", "bench", "check")
    }
    assert Path(ROOT / ".ci/run").stat().st_mode & 0o111
