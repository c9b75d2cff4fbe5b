"""Who imports whom, and what every file owes its reader: read from the source, so that no lazy import escapes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_iwae

ROOT = Path(lightning_iwae.__file__).parent
PACKAGE = ROOT.name

# A part is a module or a folder of the package; "models.base" is one module of a folder. A part's own modules may
# import each other. Whatever is not here is a new part: put it in, and say what it may know.
MAY_IMPORT = {
    "_version": set(),
    "weights": set(),
    "derivatives": set(),
    "matmul": {"derivatives"},
    "weighing": {"derivatives", "matmul"},
    "randomness": set(),
    "models": {"derivatives", "matmul"},
    "bounds": {"weights"},
    "estimators": {"bounds", "weights", "mistakes"},
    "sides": {"bounds", "estimators"},
    "routing": {"bounds", "derivatives", "sides", "weighing", "models.base", "models.labels"},
    "memory": set(),
    "slices": {"bounds", "memory", "models.labels", "randomness", "routing", "sides", "weighing"},
    "diagnostics": {"weights"},
    "evaluation": {"diagnostics", "matmul", "weights", "models.base"},
    "hmc": set(),
    "annealing": {"hmc", "weights", "models.base"},
    "implicit": {"weights", "models.base"},
    "schedule": {"sides"},
    "data": {"randomness"},
    "parallel": set(),
    "laboratory": {"parallel", "routing", "diagnostics", "models", "randomness", "sides"},
    "certification": {
        "bounds",
        "matmul",
        "routing",
        "estimators",
        "laboratory",
        "models",
        "randomness",
        "sides",
        "weights",
    },
    "claims": {
        "bounds",
        "slices",
        "estimators",
        "evaluation",
        "laboratory",
        "models",
        "parallel",
        "randomness",
        "sides",
        "weights",
    },
    "module": {
        "routing",
        "slices",
        "sides",
        "bounds",
        "weights",
        "evaluation",
        "diagnostics",
        "models",
        "randomness",
        "schedule",
        "_version",
    },
    "writing": set(),
    "predictions": {"writing"},
    "signals": set(),
    "resume": set(),
    "metrics_csv": {"writing"},
    "ddp": set(),
    "posteriors": {"models.base", "weights"},
    "figures": {"posteriors", "weights"},
    "curves": {"figures", "laboratory"},
    "callbacks": {
        "module",
        "slices",
        "sides",
        "annealing",
        "models",
        "evaluation",
        "diagnostics",
        "randomness",
        "signals",
        "writing",
        "figures",
        "curves",
        "posteriors",
        "predictions",
    },
    "mistakes": set(),
    "class_paths": {"mistakes"},
    "loading": {"resume", "class_paths", "mistakes", "models", "evaluation", "diagnostics", "randomness"},
    "report": set(),
    "__init__": {"_version", "sides", "slices", "loading"},
    "__main__": {"cli"},
}
# Beyond Python's own library. Parts not named here know torch at most.
OUTSIDE = {
    "certification": {"torch", "numpy"},
    "models": {"torch", "zuko"},
    "_version": set(),
    "__init__": set(),
    "__main__": set(),
    "writing": set(),
    "predictions": {"torch", "numpy"},
    "laboratory": {"torch", "numpy"},
    "claims": {"torch", "numpy"},
    "signals": set(),
    "metrics_csv": {"lightning"},
    "ddp": {"torch", "lightning"},
    "figures": {"torch", "numpy", "matplotlib", "PIL"},
    "curves": {"numpy", "matplotlib"},
    "data": {"torch", "lightning", "numpy", "scipy", "sklearn"},
    "mistakes": set(),
    "class_paths": set(),
    "module": {"torch", "lightning"},
    "loading": {"torch", "numpy", "yaml", "jsonargparse", "lightning"},
    "callbacks": {"torch", "lightning", "matplotlib", "tqdm"},
    "report": {"numpy", "scipy", "yaml", "jinja2", "markupsafe", "PIL"},
}
ANYTHING = {"cli", "sweep"}  # the edge of the package


def source_files(root=ROOT):
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


FILES = source_files()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def part(module):
    """The row of MAY_IMPORT that a module belongs to: its first name."""
    return module.partition(".")[0]


def resolve(module, names):
    """Modules meant by `from module import names`; a name that an __init__ passes on leads to where it comes from."""
    for name in names:
        inner = f"{module}.{name}".lstrip(".")
        package = f"{module}.__init__".lstrip(".")
        if inner in FILES:
            yield inner
        elif f"{inner}.__init__" in FILES:
            yield f"{inner}.__init__"
        elif package in FILES:
            yield dict(passed_on(package)).get(name, package)
        else:
            yield module


def passed_on(package):
    """(name, module it comes from) of what an __init__ imports."""
    for node in ast.walk(TREES[package]):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                for target in imported_by(package, node, [alias.name]):
                    if not target.startswith("outside "):
                        yield alias.asname or alias.name, target


def imported_by(importer, node, names=None):
    """Modules that one import statement of `importer` means; those outside the package as "outside torch"."""
    if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
    elif node.level:
        above = importer.split(".")[: -node.level]
        targets = [".".join([PACKAGE, *above, *filter(None, [node.module])])]
    else:
        targets = [node.module]
    for target in targets:
        top, _, inside = target.partition(".")
        if top != PACKAGE:
            yield f"outside {top}"
        elif isinstance(node, ast.Import):
            yield inside or "__init__"
        else:
            yield from resolve(inside, names or [alias.name for alias in node.names])


def edges(importer, tree):
    """Every module that `importer` imports, wherever in its source it does."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {target for node in nodes for target in imported_by(importer, node)}


def forbidden(importer, tree):
    """The edges that are not in the picture."""
    mine = part(importer)
    if mine in ANYTHING:
        return set()
    if mine not in MAY_IMPORT:
        return {f"{importer} is not in the picture"}
    known, allowed = OUTSIDE.get(mine, {"torch"}) | set(sys.stdlib_module_names), MAY_IMPORT[mine]
    wrong = set()
    for target in edges(importer, tree):
        place, _, name = target.rpartition(" ")
        inside = part(name) == mine or part(name) in allowed or name in allowed
        if name not in known if place else not inside:
            wrong.add(f"{importer} -> {name}")
    return wrong


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_picture(module):
    assert not forbidden(module, TREES[module])


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("weights", "from . import bounds"),
        ("weights", "def f():\n    import numpy"),
        ("bounds", "from .estimators import Side"),
        ("routing", "from .models import MLP"),
        ("routing", "from .models.mlp import MLP"),
        ("routing", "from lightning_iwae.module import IWModule"),
        ("routing", "import lightning_iwae.module"),
        ("evaluation", "from . import routing"),
        ("sides", "from . import iw_loss"),  # the package passes slices' on
        ("models.mlp", "from ..weights import ess"),
        ("models.mlp", "from lightning.pytorch import LightningModule"),
        ("data.digits", "from ..module import IWModule"),
        ("callbacks.evaluation", "from .. import cli"),
        ("callbacks.evaluation", "from .. import bounds"),
        ("module", "if True:\n    from .callbacks import Evaluation"),
        ("diagnostics", "import pytorch_lightning"),
        ("surprise", "import torch"),
    ],
)
def test_an_edge_outside_the_picture_would_be_found(importer, source):
    assert len(forbidden(importer, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("routing", "from .models.base import check_model"),
        ("routing", "from .models import check_model"),  # passed on by models/__init__
        ("models.mlp", "from .base import full_precision"),
        ("data.mnist", "from lightning_iwae.data.base import ArrayData\nimport gzip"),
        ("module", "from . import __version__, bounds, routing"),
        ("callbacks.evaluation", "from ..evaluation import evaluate\nfrom lightning.pytorch import Callback"),
    ],
)
def test_an_edge_inside_the_picture_is_let_through(importer, source):
    assert not forbidden(importer, ast.parse(source))


def test_picture_has_no_part_that_is_gone():
    assert set(MAY_IMPORT) <= {part(module) for module in FILES}


def test_all_below_the_module_works_without_lightning():
    with_it = {name for name, libraries in OUTSIDE.items() if "lightning" in libraries} | {"__main__"}
    parts = sorted({part(module) for module in FILES} - with_it - ANYTHING)
    assert {"__init__", "routing", "models", "evaluation"} <= set(parts)
    imports = ", ".join(f"{PACKAGE}.{name}".removesuffix(".__init__") for name in parts)
    code = f"import {imports}, sys; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, timeout=120).returncode == 0


# --- what every file owes its reader ------------------------------------------------------------------------


def test_no_file_is_called_utils():
    names = {path.stem for path in FILES.values()} | {path.parent.name for path in FILES.values()}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def undocumented(tree, module):
    """Public definitions without a docstring; a file of at most three lines needs none."""
    if not ast.get_docstring(tree) and len(tree.body) > 2:
        yield module
    yield from (f"{module}.{name}" for name, node in public(tree) if not ast.get_docstring(node))


def public(node, prefix=""):
    """(qualified name, node) of public functions, classes and their methods; what is inside a function is private."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("module", FILES)
def test_everything_public_has_a_docstring(module):
    assert list(undocumented(TREES[module], module)) == []


def test_a_missing_docstring_would_be_found():
    source = "import a\nimport b\nclass C:\n    'c'\n    def f(self): pass\n    def _g(self): pass\ndef h(): pass\n"
    assert list(undocumented(ast.parse(source), "m")) == ["m", "m.C.f", "m.h"]
