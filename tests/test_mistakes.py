"""Mistakes in configs and on the command line: one message, status 2, nothing touched. And what is no mistake."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_iwae
from lightning_iwae.cli import COMMANDS, main
from lightning_iwae.data import MNIST, ArrayData, DataError, Digits
from lightning_iwae.mistakes import nearest, raised_here

ROOT = Path(__file__).parents[1]
DIGITS = ["-c", str(ROOT / "conf/digits.yaml")]

# the least that is a run: each case parses it anew
BASE = """
model:
  network: {class_path: lightning_iwae.models.MLP, init_args: {pixels: 64}}
  optimizer_phi: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}
data: {class_path: lightning_iwae.data.Digits}
trainer: {callbacks: [{class_path: lightning_iwae.callbacks.Evaluation}]}
"""
MODULE = """
from collections.abc import Iterable
import torch
from torch import nn
from lightning.pytorch import Callback
from lightning_iwae.models import MLP

class NoPosterior(nn.Module):
    def __init__(self):
        super().__init__()
        self.inference = self.generative = nn.Linear(1, 1)
    def prior(self): ...
    def likelihood(self, z): ...

class Shared(NoPosterior):
    def posterior(self, x): ...

class Picky(MLP):
    def __init__(self, depth: int):
        if depth > 3:
            raise ValueError(f"depth must be at most 3. Got {depth}.")
        super().__init__(64)

class Forgetful(MLP):
    def __init__(self):
        super().__init__(64)
        {}["nothing"]

class BadShape(MLP):
    def posterior(self, x):
        q = super().posterior(x)
        return torch.distributions.Normal(q.mean, 1.0)

class BadLikelihood(MLP):
    def likelihood(self, z):
        return torch.distributions.Bernoulli(logits=self.generative(z), validate_args=False)

class Buggy(MLP):
    def posterior(self, x):
        return {}["posterior"]

class Typo(MLP):
    def posterior(self, x):
        raise TypeError("a bug in the user's own code")

class NotFinite(MLP):
    def posterior(self, x):
        q = super().posterior(x)
        return torch.distributions.Independent(torch.distributions.Normal(q.mean * float("inf"), 1.0, False), 1)

class Fussy(Callback):
    def __init__(self, often: int = 1):
        if often < 1:
            raise ValueError("often must be at least 1.")

class PressedControlC(Callback):
    def on_train_batch_start(self, *args):
        raise KeyboardInterrupt

constant = 3
def function(): ...
"""


@pytest.fixture(autouse=True)
def touched(tmp_path, monkeypatch):
    """An empty working directory with a user's module in it, and a list of what was done to data."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "broken_module.py").write_text("import not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    calls: list[str] = []
    for cls in (ArrayData, MNIST):
        for name in ("prepare_data", "setup"):
            monkeypatch.setattr(cls, name, lambda *_, what=f"{cls.__name__}.{name}", **__: calls.append(what))
    yield calls
    for name in ("my_module", "broken_module"):
        sys.modules.pop(name, None)


def refused(capsys, *args: str) -> str:
    """The message that a command line is answered with."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    printed = capsys.readouterr()
    assert stop.value.code == 2, printed.err
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.endswith("\n")
    return printed.err


# id: (arguments after `fit -c base.yaml`, or the text of an overlay; what the message must hold)
VALUES = {
    # keys that there are not
    "top level": ("modle: {samples: 32}", "modle (bad.yaml, line 1)", "Did you mean model?"),
    "top level, option": (["--modle.samples", "32"], "modle (command line)", "Did you mean model?"),
    "model": ("model:\n  sampels: 32", "model.sampels (bad.yaml, line 2)", "model.samples?"),
    "model, option": (["--model.sampels", "32"], "model.sampels (command line)", "model.samples?"),
    "model, =": (["--model.sampels=32"], "model.sampels", "model.samples?"),
    "side": ("model: {phi: {particle: 8}}", "model.phi.particle (bad", "model.phi.particles?"),
    "side, option": (["--model.phi.particle", "8"], "model.phi.particle (com", "model.phi.particles?"),
    "one level up": (["--model.particles", "8"], "model.particles", "model.theta.particles?"),
    "nothing near": (["--model.phi.zzz", "8"], "model.phi.zzz", "Known there: estimator, particles"),
    "trainer": ("trainer: {max_epoch: 3}", "trainer.max_epoch (bad", "trainer.max_epochs?"),
    "abbreviated": (["--trainer.max_epoch", "3"], "trainer.max_epoch (com", "trainer.max_epochs?"),
    "abbreviated top": (["--seed_every", "3"], "seed_every ", "seed_everything?"),
    "abbreviated config": (["--conf", "x.yaml"], "conf ", "config?"),
    "network": ("model: {network: {init_args: {latnet: 3}}}", "model.network.init_args.latnet (bad", "latent?"),
    "network, option": (["--model.network.init_args.latnet", "3"], "network.init_args.latnet (com", ".latent?"),
    "network, short": (["--model.network.latnet", "3"], "model.network.latnet (com", "init_args.latent?"),
    "beside class_path": ("model: {network: {init_arg: {latent: 3}}}", "model.network.init_arg", "init_args?"),
    "data": ("data: {init_args: {batchsize: 3}}", "data.init_args.batchsize (bad", "batch_size?"),
    "optimiser": ("model: {optimizer_phi: {init_args: {learning_rate: 1}}}", "optimizer_phi.init_args.learning_rate"),
    "callback": (
        "trainer:\n  callbacks:\n  - class_path: lightning_iwae.callbacks.Evaluation\n    init_args: {particle: 9}",
        "trainer.callbacks[0].init_args.particle (bad.yaml, line 4)",
        "particles?",
    ),
    "linked": (["--model.seed", "3"], "model.seed", "follows seed_everything"),
    "linked below": ("data: {init_args: {seed: 3}}", "data.init_args.seed", "follows seed_everything"),
    # values of another type
    "text for a number": ("model:\n  samples: many", "model.samples (bad.yaml, line 2)", "a whole number", "'many'"),
    "text, option": (["--model.samples", "many"], "model.samples (command line)", "a whole number", "'many'"),
    "fraction": (["--model.accumulate", "1.5"], "model.accumulate", "a whole number", "1.5"),
    "list for a number": ("model: {samples: [1, 2]}", "model.samples", "a whole number", "a list"),
    "null for a number": ("model: {samples: null}", "model.samples", "a whole number", "null"),
    "number or null": (["--model.phi.beta", "big"], "model.phi.beta", "a number or null", "'big'"),
    "boolean": (["--model.whole_batch_noise", "maybe"], "model.whole_batch_noise", "true or false", "'maybe'"),
    "choice": (["--model.method", "seperate"], "model.method", "auto, separate", "Did you mean separate?"),
    "interval": ("model: {scheduler_interval: epochs}", "model.scheduler_interval", "Did you mean epoch?"),
    "binarization": ("data: {init_args: {binarization: dynamc}}", "data.init_args.binarization", "dynamic?"),
    "null below": ("model: {network: {init_args: {latent: null}}}", "network.init_args.latent", "a whole", "null"),
    "widths": ("model: {network: {init_args: {hidden: [3, x]}}}", "network.init_args.hidden[1]", "a whole", "'x'"),
    "learning rate": ("model: {optimizer_phi: {init_args: {lr: fast}}}", "optimizer_phi.init_args.lr", "'fast'"),
    "precision": (["--trainer.precision", "bf61-mixed"], "trainer.precision", "Did you mean bf16-mixed?"),
    "epochs": (["--trainer.max_epochs", "1.5"], "trainer.max_epochs", "a whole number or null", "1.5"),
    "seed": (["--seed_everything", "abc"], "seed_everything", "a whole number", "'abc'"),
    "mapping, got null": ("model:", "model (bad.yaml, line 1)", "a mapping", "null"),
    "mapping, got number": ("trainer: 3", "trainer", "a mapping", "Got 3"),
    "mapping, got list": ("trainer: [3]", "trainer", "a mapping", "a list"),
    "side, got list": ("model: {theta: [iwae]}", "model.theta", "a mapping", "a list"),
    "init_args, got list": ("model: {network: {init_args: [3]}}", "model.network.init_args", "a mapping", "a list"),
    # values out of range
    "particles": (["--model.phi.particles", "7"], "model.phi.particles", "divide samples (64)", "8", "Got 7"),
    "particles 0": (["--model.theta.particles", "0"], "model.theta.particles", "divide", "Got 0"),
    "samples": (["--model.samples", "-64"], "model.samples", "at least 1", "Got -64"),
    "beta": (["--model.phi", "{estimator: ciwae, beta: 1.5}"], "model.phi.beta", "[0, 1]", "Got 1.5"),
    "clip": (["--model.clip_phi", "-1"], "model.clip_phi", "positive", "Got -1"),
    "test_particles": (["--model.test_particles", "0"], "model.test_particles", "at least 1", "Got 0"),
    "latent": (["--model.network.latent", "-3"], "model.network.init_args.latent", "at least 1", "Got -3"),
    "width": (["--model.network.hidden", "[100, 0]"], "model.network.init_args.hidden", "at least 1", "Got 0"),
    "batch_size": (["--data.batch_size", "0"], "data.batch_size", "at least 1", "Got 0"),
    "rate": (["--model.optimizer_phi.lr", "-1"], "model.optimizer_phi", "learning rate", "-1"),
    "step_size": (
        "model: {scheduler_phi: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 0}}}",
        "model.scheduler_phi",
        "zero",
    ),
    "evaluation": (["--trainer.callbacks+", "{class_path: lightning_iwae.callbacks.Evaluation, init_args: {size: 0}}"],
        "trainer.callbacks[1].init_args.size", "at least 1", "Got 0"),
    "seed -3": (["--seed_everything", "-3"], "seed_everything", "between 0 and", "Got -3"),
    "16 bits": (["--trainer.precision", "16-mixed"], "trainer.precision", "bf16-mixed", "Got 16-mixed"),
    "accelerator": (["--trainer.accelerator", "gpuu"], "trainer.accelerator", "auto", "Did you mean gpu?"),
    "strategy": (["--trainer.strategy", "dpp"], "trainer.strategy", "Did you mean ddp?"),
    "devices": (["--trainer.accelerator", "cpu", "--trainer.devices", "0"], "trainer.devices", "Got '0'"),
    "limit": (["--trainer.limit_val_batches", "-3"], "trainer.limit_val_batches", "[0.0, 1.0]", "-3"),
    # estimators
    "estimator": (["--model.phi.estimator", "dregs"], "model.phi", "'dregs'", "Did you mean dreg?"),
    "other side's": (["--model.theta.estimator", "dreg"], "model.theta", "'dreg'", "other side", "elbo, iwae"),
    "schedule's key": (["--model.schedule", "[{epochs: 3}]"], "model.schedule[0].epochs", "model.schedule[0].epoch?"),
    "schedule's type": (["--model.schedule", "[{epoch: two}]"], "model.schedule[0].epoch", "whole number", "'two'"),
    "schedule's shape": (["--model.schedule", "{epoch: 3}"], "model.schedule", "a list of (a mapping of epoch"),
    "schedule's order": (["--model.schedule", "[{epoch: 0}]"], "model.schedule", "must grow, from 1 on", "Got 0"),
    "schedule's side": (
        ["--model.schedule", "[{epoch: 2, phi: {estimator: iwae, particels: 3}}]"],
        "model.schedule[0].phi.particels",
        "model.schedule[0].phi.particles?",
    ),
    "warm-up of dreg": (["--model.kl_warmup", "2", "--model.phi.estimator", "dreg"], "model.phi", "elbo, iwae, ciwae"),
    "labels": (["--data.init_args.labels", "true"], "takes no labels", "data.init_args.labels to false"),
    "option it has not": (["--model.phi.beta", "0.1"], "model.phi", "'iwae' has no option 'beta'"),
    "option it needs": (["--model.phi.estimator", "ciwae"], "model.phi", "'ciwae' needs the option 'beta'"),
    "order": (["--model.phi.estimator", "vr-iwae", "--model.phi.alpha", "1"], "model.phi.alpha", "[0, 1)", "Got 1.0"),
    "no particle to compare": (
        ["--model.phi.estimator", "vimco", "--model.phi.particles", "1"],
        "model.phi.particles",
        "'vimco' needs at least 2 particles",
    ),
    "partition": (
        ["--model.phi.estimator", "tvo", "--model.phi.partition", "[0.1, 1]"],
        "model.phi.partition",
        "points that grow from 0 to 1",
        "Got (0.1, 1.0)",
    ),
    "fixed prior": (
        ["--model.theta.estimator", "gdreg", "--trainer.max_steps", "1"],
        "theta: estimator 'gdreg'",
        "needs a learnt prior",
    ),
    "dreams of the whole batch": (
        ["--model.phi.estimator", "sleep", "--model.whole_batch_noise", "true"],
        "model.whole_batch_noise",
        "sleep",
    ),
    # classes
    "class": (["--model.network", "lightning_iwae.models.MPL"], "model.network", "'MPL'", "lightning_iwae.models.MLP?"),
    "class in a file": ("model: {network: {class_path: lightning_iwae.models.MPL}}", "(bad.yaml, line 1)", ".MLP?"),
    "module": (["--model.network", "lightning_iwae.model.MLP"], "model.network", "lightning_iwae.models.MLP?"),
    "package": (["--model.network", "nowhere.MLP"], "model.network", "no module 'nowhere'"),
    "bare name": (["--trainer.callbacks+", "EarlyStoping"], "trainer.callbacks[1]", "callbacks.EarlyStopping?"),
    "data class": ("data: {class_path: lightning_iwae.data.Digit}", "data.class_path (bad", "data.Digits?"),
    "other base": (["--model.network", "torch.optim.Adam"], "model.network", "a torch.nn.Module", "torch.optim.Adam"),
    "data's base": (["--data", "lightning_iwae.models.MLP"], "data.class_path", "LightningDataModule", "models.MLP"),
    "function": (["--model.network", "my_module.function"], "model.network", "a torch.nn.Module", "my_module.function"),
    "constant": (["--model.network", "my_module.constant"], "model.network", "a torch.nn.Module", "my_module.constant"),
    "import fails": (["--model.network", "broken_module.MLP"], "broken_module can't be imported", "not_installed"),
    "class_path 3": ("model: {network: {class_path: 3}}", "model.network", "class_path", "Got 3"),
    "optimiser class": (["--model.optimizer_phi", "torch.optim.Adamm"], "model.optimizer_phi", "torch.optim.Adam?"),
    "optimiser's base": (["--model.optimizer_phi", "torch.nn.Linear"], "model.optimizer_phi", "torch.optim.Optimizer"),
    "LBFGS": (["--model.optimizer_theta", "torch.optim.LBFGS"], "model.optimizer_theta", "LBFGS", "closure"),
    "scheduler": (["--model.scheduler_phi", "torch.optim.lr_scheduler.StepLLR"], "model.scheduler_phi", "StepLR?"),
    "scheduler's argument": (
        "model: {scheduler_phi: {class_path: torch.optim.lr_scheduler.StepLR}}",
        "model.scheduler_phi.init_args.step_size is missing",
        "a whole number",
    ),
    "plateau": (
        ["--model.scheduler_phi", "torch.optim.lr_scheduler.ReduceLROnPlateau"], "model.scheduler_phi", "metric"),
    "callback class": (
        "trainer: {callbacks: [{class_path: lightning_iwae.callbacks.Evalution}]}",
        "trainer.callbacks[0].class_path (bad.yaml, line 1)",
        "lightning_iwae.callbacks.Evaluation?",
    ),
    "no network": ("model: {network: null}", "model.network", "the class_path of a torch.nn.Module"),
    "no data": ("data: null", "data", "the class_path of a lightning.LightningDataModule"),
    # a user's classes
    "no posterior": (["--model.network", "my_module.NoPosterior"], "model.network", "NoPosterior", "posterior"),
    "shared parameters": (["--model.network", "my_module.Shared"], "model.network", "both .inference and .generative"),
    "their own check": (["--model.network", "my_module.Picky", "--model.network.depth", "4"],
        "model.network.depth must be at most 3", "Got 4"),
    "their argument": (["--model.network", "my_module.Picky"], "model.network.init_args.depth is missing"),
    "their callback": (["--trainer.callbacks+", "{class_path: my_module.Fussy, init_args: {often: 0}}"],
        "trainer.callbacks[1]", "often must be at least 1"),
    # references
    "reference": ("model: {theta: {particles: '${model.sample}'}}", "model.theta.particles (bad.yaml, line 1)",
        "${model.sample}", "Did you mean model.samples?"),
    "reference, option": (["--model.theta.particles", "${model.sample}"], "model.theta.particles (com", "samples?"),
    "reference to text": ("model: {theta: {particles: '${model.method}'}}", "model.theta.particles", "whole number"),
    "circle": ("model: {theta: {particles: '${model.phi.particles}'}, phi: {particles: '${model.theta.particles}'}}",
        "particles", "refers to itself"),
    "self": ("model: {samples: '${model.samples}'}", "model.samples", "refers to itself"),
    "unclosed": ("model: {samples: '${model.samples'}", "model.samples", "can't be resolved"),
    "environment": ("model: {samples: '${oc.env:NOT_SET_HERE}'}", "model.samples", "NOT_SET_HERE"),
    # files
    "broken": ("model:\n  samples: [1\n", "bad.yaml, line 3", "not valid YAML"),
    "colon": ("model: samples: 3\n", "bad.yaml, line 1", "not valid YAML", "mapping values"),
    "tab": ("model:\n\tsamples: 3\n", "bad.yaml, line 2", "spaces, not tabs"),
    "tag": ("model: !!python/object:os.system {}\n", "bad.yaml, line 1", "not valid YAML"),
    "two documents": ("model: {}\n---\nmodel: {}\n", "bad.yaml, line 2", "document"),
    "list": ("- model\n- data\n", "bad.yaml", "a mapping of keys", "a list"),
    "text": ("model\n", "bad.yaml", "a mapping of keys", "text"),
    "empty": ("", "bad.yaml is empty", "a mapping of keys"),
    "comments only": ("# nothing\n", "bad.yaml is empty", "a mapping of keys"),
    "twice": ("model:\n  samples: 8\n  method: auto\n  samples: 16\n", "bad.yaml, line 4: model.samples", "line 2"),
    "twice at the top": ("trainer: {}\nmodel: {}\ntrainer: {}\n", "bad.yaml, line 3: trainer", "line 1"),
    "itself": ("model: &m {theta: *m}\n", "bad.yaml", "contains itself"),
    "missing": (["-c", "conf/digist.yaml"], "conf/digist.yaml", "no such file"),
    "missing, near": (["-c", str(ROOT / "conf/digist.yaml")], "no such file", "conf/digits.yaml?"),
    "missing, =": (["--config=nowhere.yaml"], "nowhere.yaml", "no such file"),
    "directory": (["-c", "."], "config . is a directory", "a YAML file"),
    "YAML as an argument": (["-c", "{model: {samples: 3}}"], "{model: {samples: 3}}", "no such file"),
    # the command line itself
    "-c alone": (["-c"], "-c needs a file"),
    "-c and an option": (["-c", "--model.samples", "3"], "-c needs a file", "--model.samples"),
    "no value": (["--model.samples"], "model.samples needs a value"),
    "no value, then another": (["--model.samples", "--model.clip_phi", "3"], "model.samples needs a value"),
    "positional": (["fast"], "'fast'", "--key value"),
    "positional later": (["--model.samples", "8", "16"], "'16'", "--key value"),
    "one dash": (["-model.samples", "8"], "-model.samples", "--key value"),
    "single letter": (["-x"], "unknown option -x"),
    "checkpoint": (["--ckpt_path", "nowhere.ckpt"], "ckpt_path", "nowhere.ckpt"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_mistake_is_answered_with_one_message_before_anything_is_touched(case, touched, tmp_path, capsys):
    given, *fragments = VALUES[case]
    if isinstance(given, str):
        Path("bad.yaml").write_text(given)
        given = ["-c", "bad.yaml"]
    before = sorted(tmp_path.rglob("*"))
    message = refused(capsys, "fit", "-c", "base.yaml", *given)
    for fragment in fragments:
        assert fragment in message
    for noise in ("Traceback", "usage:", "Union", "<class", "typing.", "error: error", "Parser key"):
        assert noise not in message
    assert message.count("error:") == 1 and message.count("\n") <= 6 and len(message) < 500
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts] == before
    assert touched == []


def test_the_table_covers_what_it_promises():
    assert len(VALUES) >= 70


def test_a_file_without_permission(monkeypatch, capsys):
    def read_text(self, **_):
        raise PermissionError(13, os.strerror(13))  # root may read everything

    Path("bad.yaml").write_text("model: {}")
    monkeypatch.setattr(Path, "read_text", read_text)
    assert "config bad.yaml can't be read: Permission denied." in refused(capsys, "fit", "-c", "bad.yaml")


def test_a_file_that_is_not_text(capsys):
    Path("bad.yaml").write_bytes(b"model: {samples: 3} # \xff\xfe")
    assert "bad.yaml is not UTF-8" in refused(capsys, "fit", *DIGITS, "-c", "bad.yaml")
    Path("bad.yaml").write_bytes(b"model: \x00")
    assert "bad.yaml" in refused(capsys, "fit", *DIGITS, "-c", "bad.yaml")


def test_a_config_alone_that_lacks_its_parts(capsys):
    Path("bad.yaml").write_text("model: {samples: 8}")
    message = refused(capsys, "fit", "-c", "bad.yaml")
    assert "is missing" in message and ("model.network" in message or "data" in message)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_other_commands_have_the_same_manners(command, touched, tmp_path, capsys):
    assert "model.phi.particles?" in refused(capsys, command, *DIGITS, "--model.phi.particle", "3")
    assert "no file nowhere.ckpt" in refused(capsys, command, *DIGITS, "--ckpt_path", "nowhere.ckpt")
    assert touched == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["fitt"], ["'fitt'", "fit, validate, test", "Did you mean fit?"]),
        (["Test"], ["Did you mean test?"]),
        (["zzz"], ["fit, validate, test"]),
        (["-c", "conf/digits.yaml", "fit"], ["command comes first"]),
        (["--model.samples", "3"], ["command comes first", "--model.samples"]),
    ],
)
def test_the_command_itself(args, fragments, capsys):
    message = refused(capsys, *args)
    assert all(fragment in message for fragment in fragments)


# --------------------------------------------------------------------------- what shows only once the run is running
@pytest.fixture
def real_data(monkeypatch):
    """The digits as they are, and a fit of few steps."""
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    small = ["--trainer.max_steps", "2", "--trainer.callbacks", "[]", "--trainer.enable_progress_bar", "false"]
    small += ["--trainer.limit_val_batches", "0", "--model.samples", "4", "--model.theta.particles", "4"]
    return [*small, "--model.phi.particles", "2", "--trainer.default_root_dir"]


@pytest.fixture
def run(real_data, tmp_path, monkeypatch):
    """The arguments of a fit of a class of `my_module`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    return lambda name: ["fit", *DIGITS, *real_data, f"run-{name}", "--model.network", f"my_module.{name}"]


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("BadShape", ["posterior(x).log_prob(z)", "(4, 100)", "(4, 100, 10)"]),
        ("BadLikelihood", ["likelihood(z).log_prob(x)", "(4, 100)", "(4, 100, 64)"]),
    ],
)
def test_wrong_shapes_are_shown(name, fragments, run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(run(name))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("error:") == 1 and "Traceback" not in message
    assert all(fragment in message for fragment in fragments)


def test_a_bug_in_a_users_class_keeps_its_traceback(run):
    with pytest.raises(KeyError, match="posterior"):
        main(run("Buggy"))
    with pytest.raises(TypeError, match="a bug in the user's own code"):
        main(run("Typo"))
    with pytest.raises(KeyError, match="nothing"):
        main(run("Forgetful"))


def test_a_run_that_breaks_exits_with_1(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(run("NotFinite"))
    assert stop.value.code == 1
    assert "error: Step 0: the bound is not finite" in capsys.readouterr().err


def test_control_c_exits_with_130(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*run("MLP"), "--trainer.callbacks", "my_module.PressedControlC"])
    assert stop.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_data_that_cannot_be_had_exit_with_2(run, monkeypatch, capsys):
    def load(self):
        raise DataError("digits.csv must have 65 columns. Got 3.")

    monkeypatch.setattr(Digits, "load", load)
    with pytest.raises(SystemExit) as stop:
        main(run("MLP"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: digits.csv must have 65 columns. Got 3.\n")


# --------------------------------------------------------------------------- valid configs stay valid
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.theta.particles", "${model.samples}", "--model.samples", "32"], "particles: 32"),
        (["--model.network.latent", "3"], "latent: 3"),
        (["--model.theta", "{particles: 16}"], "particles: 16"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/elbo"], "monitor: val/elbo"),
        (["--model.clip_phi", "-0.5"], "clip_phi: -0.5"),  # a number, not an option
        (["--data", "lightning_iwae.data.MNIST", "--data.batch_size=7"], "batch_size: 7"),
        (["--config", str(ROOT / "conf/objective/dreg.yaml")], "estimator: dreg"),
    ],
)
def test_what_is_right_is_taken(args, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DIGITS, *args, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0 and printed.err == "" and expected in printed.out


# --------------------------------------------------------------------------- help and start-up
def test_help_and_version_import_nothing_heavy():
    code = textwrap.dedent("""
        import sys
        from lightning_iwae.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as stop:
            heavy = {"torch", "lightning", "numpy", "jsonargparse", "yaml", "sklearn"} & set(sys.modules)
            print("heavy:", sorted(heavy), "status:", stop.code)
    """)

    def ask(*words):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert "heavy: []" in done.stdout, done
        return done.stdout + done.stderr

    help_text = ask("--help")
    assert "status: 0" in help_text and help_text.count("python -m lightning_iwae fit -c") == 2
    for command, what in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(what)}$", help_text, re.M)
    nothing = ask()
    assert "status: 2" in nothing and "commands:" in nothing
    assert f"lightning_iwae {lightning_iwae.__version__}\n" in ask("--version")
    assert "status: 2" in ask("fitt")


def test_the_packages_names_are_lazy_and_complete():
    assert set(lightning_iwae.__all__) <= set(dir(lightning_iwae))
    for name in lightning_iwae.__all__:
        assert getattr(lightning_iwae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'iw_los'"):
        _ = lightning_iwae.iw_los


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_commands_help_has_its_own_options_first(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith(f"usage: python -m lightning_iwae {command} -c CONFIG")
    order = ["run:", "--config", "--seed_everything", "--ckpt_path", "\nmodel:", "--model.samples", "\ndata:", "--data"]
    positions = [text.index(words) for words in [*order, "\ntrainer:", "--trainer.max_epochs"]]
    assert positions == sorted(positions)
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) < 200
    assert "S, drawn per datum and shared by both sides (64)" in text  # our docstrings
    for noise in ("==SUPPRESS==", "known subclasses", ".help CLASS", "typing."):
        assert noise not in text


def test_a_classs_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data.help", "lightning_iwae.data.Digits"])
    assert stop.value.code == 0
    assert "number of test items" in capsys.readouterr().out


# --------------------------------------------------------------------------- the parts
def test_nearest():
    assert nearest("particle", ["estimator", "particles", "beta"]) == "particles"
    assert nearest("ADAM", ["Adam", "SGD"]) == "Adam"
    assert nearest("zzz", ["Adam", "SGD"]) is None


def test_only_what_this_package_raises_itself_counts_as_its_check():
    from lightning_iwae.sides import Side

    def error_of(call):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        return caught.value

    assert raised_here(error_of(lambda: Side(particles=3).check("phi", 8)))
    assert not raised_here(error_of(lambda: int("x")))  # here is not there
    assert not raised_here(error_of(lambda: Side("iwae", "8").check("phi", 8)))  # Python's, in our code
