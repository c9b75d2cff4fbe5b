"""CONTRIBUTING's new estimator, as written: its edits applied to a copy of the package, its commands run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EDITS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", TEXT, re.S)
CONTRACT, CERTIFY = re.search(r"```bash\n(.*?)```", TEXT, re.S)[1].splitlines()
FEW = ["--replicates", "20000"]


def edited(text: str, hunks: str) -> str:
    """`text` with the lines marked + added where the others of their hunk are, which must be in one place alone."""
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +\n" for line in lines)
        before, after = "".join(v[1:] for v in lines if v[0] == " "), "".join(v[1:] or "\n" for v in lines)
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("lightning_iwae", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "slow"))
    for name in ("pyproject.toml", "conf"):
        (copy / name).symlink_to(ROOT / name)
    for name, hunks in EDITS:
        (copy / name).write_text(edited((copy / name).read_text(), hunks))
    return copy


def run(copy: Path, command: str, *more: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *shlex.split(command)[1:], *more]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def test_it_shows_a_function_a_row_a_twin_and_a_claim():
    assert [name.rpartition("/")[2] for name, _ in EDITS] == ["estimators.py", "test_estimators_rows.py", "targets.py"]
    for command in (CONTRACT, CERTIFY):
        assert command.startswith("python -m ")


def test_the_contract_the_twin_and_the_certificate_hold(copy):
    found = run(copy, CONTRACT, "-q", "-p", "no:cacheprovider")
    assert found.returncode == 0, found.stdout
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) > 40 and "failed" not in found.stdout
    found = run(copy, CERTIFY, *FEW)
    assert found.returncode == 0 and "certified: gradient of 2 log (1/K) sum sqrt w" in found.stdout, found.stderr


def test_a_slip_in_its_formula_is_certified_by_nobody(copy):
    """The second weights forgotten, as they are for L_K: both the twin and the certificate say so."""
    file = copy / "lightning_iwae/estimators.py"
    right = file.read_text()
    file.write_text(right.replace("return path_only((w + w.square()) / 2)", "return path_only(w.square())"))
    assert file.read_text() != right
    found = run(copy, CERTIFY, *FEW)
    twin = run(
        copy, "python -m pytest tests/test_estimators_rows.py -q -p no:cacheprovider -k 'renyi-half and decimals'"
    )
    file.write_text(right)
    assert found.returncode == 1 and "FAILS (quadrature" in found.stdout
    assert twin.returncode == 1 and "renyi-half" in twin.stdout
