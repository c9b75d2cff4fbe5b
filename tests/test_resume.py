"""Resume: whatever a killed process leaves in its directory, the run that goes on from it ends as the unbroken one.

A kill -9 leaves the directory as it is at that moment. So the unbroken run is photographed (its directory copied) at
all kinds of moments, and each picture is resumed.
"""

import csv
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_iwae import resume, writing
from lightning_iwae.callbacks import Checkpoints
from lightning_iwae.cli import main
from lightning_iwae.data import Digits
from lightning_iwae.metrics_csv import MetricsCSV
from lightning_iwae.module import IWModule
from lightning_iwae.signals import Signals

from .test_cli import ROOT

# 5 steps an epoch, and every kind of thing that a resumed run could do otherwise
CONFIG = """
seed_everything: 0
model:
  samples: 6
  theta: {estimator: iwae, particles: 6}
  phi: {estimator: dreg, particles: 3}
  network: {class_path: lightning_iwae.models.MLP, init_args: {pixels: 64, latent: 2, hidden: [4]}}
  optimizer_theta: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
  optimizer_phi: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.9}}
  scheduler_theta: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
data:
  class_path: lightning_iwae.data.Digits
  init_args: {batch_size: 20, validation: 30, limit_train: 100}
trainer:
  max_epochs: 4
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning_iwae.callbacks.Evaluation
      init_args: {every_n_epochs: 2, particles: 10, size: 30}
    - class_path: lightning_iwae.callbacks.GradientSNR
      init_args: {every_n_steps: 3, draws: 4, size: 5}
    - class_path: lightning_iwae.callbacks.Checkpoints
      init_args: {every_n_steps: 4}
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """The directory of an unbroken run, by its variant; run once, and not to be written to."""
    runs = {}

    def run(variant="epochs"):
        if variant not in runs:
            runs[variant] = tmp_path_factory.mktemp("unbroken") / variant
            fit(config, runs[variant], *VARIANTS[variant])
        return runs[variant]

    return run


def fit(config, run, *args):
    main(["fit", "-c", config, "--trainer.default_root_dir", str(run), *args])


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(run, name="last"):
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def same(a, b):
    """Equal to the last bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(run, other):
    for name in ("last", "best"):
        a, b = load(run, name), load(other, name)
        for key in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
            assert same(a[key], b[key]), (name, key)
    assert rows(run) == rows(other)
    assert not list(run.glob("**/.*"))  # nothing half-written is left


class Camera:
    """Copies of a run's directory at the moments of a fit, each with a line of metrics.csv torn."""

    def __init__(self, monkeypatch, run, album):
        self.run, self.album, self.labels = run, album, []
        training_step, validation_step, replace = IWModule.training_step, IWModule.validation_step, os.replace

        def in_step(module, batch, batch_idx):
            training_step(module, batch, batch_idx)
            self.snap(f"step {module.global_step}")

        def in_validation(module, batch, batch_idx):
            self.snap(f"validation {module.global_step}")
            validation_step(module, batch, batch_idx)

        def in_write(source, target):
            name = Path(target).name
            if name.endswith(".ckpt"):
                self.snap(f"{name} half", lambda run: torn(run / Path(source).relative_to(self.run)))
            replace(source, target)
            self.snap(f"{name} whole")

        monkeypatch.setattr(IWModule, "training_step", in_step)
        monkeypatch.setattr(IWModule, "validation_step", in_validation)
        monkeypatch.setattr(writing.os, "replace", in_write)

    def snap(self, label, spoil=lambda run: None):
        label = f"{len(self.labels):03} {label}"
        copy = self.album / label
        shutil.copytree(self.run, copy)
        spoil(copy)
        if (copy / "metrics.csv").exists():
            with open(copy / "metrics.csv", "a") as file:
                file.write("17,0.2")
        self.labels.append(label)


def torn(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


VARIANTS = {
    "epochs": [],
    "steps": ["--trainer.max_steps", "18"],
    "windows": ["--model.accumulate", "2", "--trainer.val_check_interval", "2", "--model.scheduler_interval", "step"],
}


# the moments of which a picture is resumed, and photographed again: (label, which of those so labelled)
CHAINS = {
    "epochs": [
        ("metrics.csv whole", -1),  # in mid-validation, with nothing but the checkpoint of step 4
        ("best.ckpt half", 0),
        ("step 7", 0),
        ("last.ckpt half", 1),
        ("validation 10", 0),
        ("step 15", 0),  # an epoch's last
        ("best.ckpt whole", 0),  # before last.ckpt
    ],
    "steps": [("step 3", 0), ("last.ckpt half", 1), ("step 10", 0), ("validation 15", 0), ("step 16", 0)],
    "windows": [("best.ckpt whole", 0), ("validation 5", 0), ("step 6", 0), ("last.ckpt half", 0), ("step 9", 0)],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(variant, config, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for generation, (kind, which) in enumerate(CHAINS[variant]):
        album = tmp_path / f"album {generation}"
        with monkeypatch.context() as patched:
            labels = Camera(patched, run, album).labels
            fit(config, run, *VARIANTS[variant], "--ckpt_path", "last")
        run = album / [label for label in labels if kind in label][which]
    fit(config, run, *VARIANTS[variant], "--ckpt_path", "last")
    assert_same_run(run, unbroken(variant))


def test_a_longer_run_goes_on_from_the_shorter_ones_end_even_within_an_epoch(config, unbroken, tmp_path):
    for steps in ("7", "10", "18"):
        fit(config, tmp_path, "--trainer.max_steps", steps, "--ckpt_path", "last")
        assert load(tmp_path)["global_step"] == int(steps)
    assert_same_run(tmp_path, unbroken("steps"))


def test_a_saved_config_repeats_its_run_bit_for_bit(config, tmp_path):
    fit(config, tmp_path / "a", "--trainer.max_epochs", "2", "--model.phi.particles", "2")
    saved = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] is None and saved["ckpt_path"] is None
    fit(str(tmp_path / "a/config.yaml"), tmp_path / "b")
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "b/config.yaml").read_text() == (tmp_path / "a/config.yaml").read_text()


# --- what is in a run's directory ---------------------------------------------------------------------------


def test_best_is_the_largest_log_px_and_its_own_steps_state(unbroken):
    values = {int(row["step"]) + 1: float(row["val/log_px"]) for row in rows(unbroken()) if row["val/log_px"]}
    best, last = load(unbroken(), "best"), load(unbroken())
    assert set(values) == {5, 15} and best["global_step"] == max(values, key=values.get)
    assert best["callbacks"]["Checkpoints"]["best"] == max(values.values())
    assert last["global_step"] == 20


def test_a_checkpoint_holds_the_settings_and_the_rows_before_it(unbroken):
    checkpoint = load(unbroken())
    assert checkpoint["settings"] == yaml.safe_load((unbroken() / "config.yaml").read_text())
    assert checkpoint["metrics.csv"]["rows"] == len(rows(unbroken()))
    assert set(checkpoint["metrics.csv"]["columns"]) == set(rows(unbroken())[0])


def test_last_without_a_checkpoint_starts_afresh_and_says_so(config, unbroken, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed_everyth")  # a run killed before its first checkpoint
    (tmp_path / "metrics.csv").write_text("step,other\n0,1.0\n1,2.")
    fit(config, tmp_path, "--ckpt_path", "last")
    assert "starts afresh" in capsys.readouterr().out
    assert_same_run(tmp_path, unbroken())
    fit(config, tmp_path, "--ckpt_path", "last")  # there is nothing left to do
    assert "starts afresh" not in capsys.readouterr().out
    assert_same_run(tmp_path, unbroken())


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        fit(*args)
    assert stop.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return message


def test_a_run_goes_on_from_its_last_checkpoint_only(config, unbroken, tmp_path, capsys):
    run, branch = unbroken(), tmp_path / "branch"
    before = (run / "metrics.csv").read_text()
    assert "holds a run already" in refused(capsys, config, run)
    assert "holds a run already" in refused(capsys, config, run, "--ckpt_path", "best")
    assert (run / "metrics.csv").read_text() == before
    fit(config, branch, "--ckpt_path", str(run / "checkpoints/best.ckpt"))  # in another directory any will do
    assert same(load(branch)["state_dict"], load(run)["state_dict"])
    filled = [[{k: v for k, v in row.items() if v} for row in rows(r)] for r in (branch, run)]
    assert len(filled[0]) == 5 and filled[0] == filled[1][-5:]
    with pytest.raises(SystemExit):
        main(["fit", "-c", config, "--ckpt_path", "last"])
    assert "--trainer.default_root_dir RUN" in capsys.readouterr().err


# --- settings -----------------------------------------------------------------------------------------------

REFUSED = {
    "model.network.init_args.hidden": "[8]",
    "model.optimizer_theta.init_args.lr": "0.02",
    "model.optimizer_phi": "torch.optim.Adam",
    "model.scheduler_theta.init_args.gamma": "0.8",
    "model.scheduler_phi": "torch.optim.lr_scheduler.ConstantLR",
    "model.scheduler_interval": "step",
    "data.init_args.batch_size": "10",
    "seed_everything": "1",
}


@pytest.fixture(scope="module")
def short(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        patched.setattr(sys, "argv", ["lightning_iwae"])
        fit(config, run, "--trainer.max_epochs", "1")
    return run


def test_what_a_checkpoint_would_overrule_is_refused_by_name(config, short, capsys):
    before = {path: path.stat().st_mtime_ns for path in short.glob("**/*")}
    changes = [word for key, value in REFUSED.items() for word in (f"--{key}", value)]
    message = refused(capsys, config, short, *changes, "--model.samples", "12", "--ckpt_path", "last")
    for key, value in REFUSED.items():
        (reason,) = [part for part in message.split("; ") if part.startswith((key, f"error: {key}"))][:1]
        assert "must be" in reason and f"Got {value}" in reason
    assert "model.optimizer_theta.init_args.lr must be 0.01, as in the checkpoint. Got 0.02" in message
    assert str(short) in message and "samples" not in message
    assert {path: path.stat().st_mtime_ns for path in short.glob("**/*")} == before


def test_settings_that_say_where_or_how_long_are_not_compared_but_a_patience_that_is_restored_is():
    def settings(folder, batch_size, patience, every):
        data = {"class_path": "lightning_iwae.data.MNIST", "init_args": {"folder": folder, "batch_size": batch_size}}
        stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"patience": patience}}
        checkpoints = {"class_path": "lightning_iwae.callbacks.Checkpoints", "init_args": {"every_n_epochs": every}}
        return {"data": data, "trainer": {"max_epochs": every, "callbacks": [stopping, checkpoints]}}

    saved = settings("here", 20, 3, 1)
    resume.check_settings(Path("x"), saved, settings("there", 20, 3, 2))
    with pytest.raises(ValueError, match=r"data.init_args.batch_size must be 20, .* Got 10\. .*in another directory"):
        resume.check_settings(Path("x"), saved, settings("here", 10, 3, 1))
    with pytest.raises(ValueError, match=r"trainer.callbacks.EarlyStopping.patience must be 3.* Got 4"):
        resume.check_settings(Path("x"), saved, settings("here", 20, 4, 1))


def test_other_settings_on_the_command_line_win_over_the_checkpoint(config, short, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(short, run)
    args = ["--model.samples", "12", "--model.phi.particles", "4", "--model.theta.particles", "1"]
    args += ["--model.clip_phi", "1e-30", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    fit(config, run, *args, "--ckpt_path", "last")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["phi"]["particles"] == 4
    assert [row["step"] for row in rows(run) if row["train/ess"]] == ["1", "3", "5", "6", "7", "8", "9"]
    assert min(float(row["train/ess"]) for row in rows(run) if row["train/ess"]) > 1 / 12
    old, new = load(short)["state_dict"], load(run)["state_dict"]
    moved = {name for name in old if not torch.allclose(old[name], new[name], atol=1e-6)}
    assert any("generative" in name for name in moved)
    momentum = [state["momentum_buffer"] for state in load(run)["optimizer_states"][1]["state"].values()]
    assert max(m.abs().max() for m in momentum) <= 0.9**5 * max(
        s["momentum_buffer"].abs().max() for s in load(short)["optimizer_states"][1]["state"].values()
    ) * (1 + 1e-6)  # phi's gradient was clipped away


# --- bad checkpoints ----------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def spoil_truncated(path):
    torn(path)


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_payload(path):
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": Payload()}, path)


def spoil_pickle(path):
    path.write_bytes(pickle.dumps(Payload()))


def spoil_flipped(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"state_dict") - 40  # within the pickled part
    content[start : start + 200] = os.urandom(200)
    path.write_bytes(bytes(content))


def spoil_other_file(path):
    torch.save({"a": torch.ones(1)}, path)


def spoil_other_model(path):
    checkpoint = torch.load(path, weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = torch.ones(3, 3)
    torch.save(checkpoint, path)


SPOILT = {
    spoil_truncated: "cut short",
    spoil_empty: "cut short",
    spoil_payload: "plain values only",
    spoil_pickle: "is no checkpoint",
    spoil_flipped: "is damaged",
    spoil_other_file: "it has no state_dict",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_a_bad_checkpoint_is_named(spoil, short, tmp_path):
    path = tmp_path / "bad.ckpt"
    shutil.copy(short / "checkpoints/last.ckpt", path)
    spoil(path)
    with pytest.raises(ValueError, match=re.escape(SPOILT[spoil])) as error:
        resume.read(path)
    assert str(path) in str(error.value) and not Path("payload-ran").exists()


@pytest.mark.parametrize(("spoil", "command"), [(spoil_payload, "fit"), (spoil_other_model, "test")])
def test_nothing_is_touched_before_a_checkpoint_is_looked_at(spoil, command, config, short, tmp_path, capsys):
    path = tmp_path / "bad.ckpt"
    shutil.copy(short / "checkpoints/last.ckpt", path)
    spoil(path)
    with pytest.raises(SystemExit) as stop:
        main([command, "-c", config, "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", str(path)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and str(path) in message and "Traceback" not in message
    assert ("(3, 3)" in message) == (spoil is spoil_other_model)
    assert not (tmp_path / "run").exists() and not Path("payload-ran").exists()


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "status", "where", "at", "saved"),
    [
        (signal.SIGTERM, 143, "training_step", 7, 7),
        (signal.SIGUSR1, 138, "validation_step", 10, 11),
    ],
)
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(
    signum, status, where, at, saved, config, unbroken, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        step = getattr(IWModule, where)

        def announced(module, batch, batch_idx):
            if module.global_step == at - (where == "training_step"):
                os.kill(os.getpid(), signum)
            return step(module, batch, batch_idx)

        patched.setattr(IWModule, where, announced)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            fit(config, run)
    assert stop.value.code == status
    assert signal.getsignal(signal.SIGTERM) == before
    assert load(run)["global_step"] == saved
    message = capsys.readouterr().err
    assert f"{signal.Signals(signum).name}: stopped after step {saved}" in message
    assert str(run / "checkpoints/last.ckpt") in message and "--ckpt_path last" in message
    fit(config, run, "--ckpt_path", "last")
    assert_same_run(run, unbroken())


def test_a_signal_before_the_first_step_ends_the_run_at_once(config, tmp_path, monkeypatch, capsys):
    load_digits = Digits.load
    monkeypatch.setattr(Digits, "load", lambda data: os.kill(os.getpid(), signal.SIGTERM) or load_digits(data))
    with pytest.raises(SystemExit) as stop:
        fit(config, tmp_path / "run")
    assert stop.value.code == 143
    assert "SIGTERM: stopped before the first step" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.csv").exists()


def test_signals_wait_while_deferred_and_an_echo_of_sigterm_does_no_harm():
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster's own, and that which a parent hands on
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_sigterm_kills():
    code = """
import os, signal
from lightning_iwae import signals
signals.ECHO = 0.0
with signals.Signals() as s:
    s.deferred = True
    os.kill(os.getpid(), signal.SIGTERM)
    print("one", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("two", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "one\n"


def test_slurm_writes_no_checkpoints_of_its_own(config, tmp_path, monkeypatch):
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    step, called = IWModule.training_step, []
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", called.append)

    def announced(module, batch, batch_idx):
        if module.global_step == 2:
            assert not module.trainer._accelerator_connector.cluster_environment.auto_requeue
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(IWModule, "training_step", announced)
    with pytest.raises(SystemExit) as stop:
        fit(config, tmp_path)
    assert stop.value.code == 138 and called == []
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt"}


# --- metrics.csv --------------------------------------------------------------------------------------------


@pytest.fixture
def logger(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    yield logger
    logger.finalize("success")


def test_metrics_are_on_the_disk_as_soon_as_logged_and_columns_may_come_later(logger, tmp_path):
    logger.log_metrics({"a": 0.1, "b": torch.tensor(2)}, 5)
    assert rows(tmp_path) == [{"step": "5", "a": "0.1", "b": "2"}]
    logger.log_metrics({"c,d": 1e-30})
    logger.log_metrics({"b": 3, "a": 1 / 3}, 7)
    assert rows(tmp_path) == [
        {"step": "5", "a": "0.1", "b": "2", "c,d": ""},
        {"step": "1", "a": "", "b": "", "c,d": "1e-30"},
        {"step": "7", "a": repr(1 / 3), "b": "3", "c,d": ""},
    ]


@pytest.mark.parametrize("torn_line", ["", "3,0", '4,0.5,"'])
def test_metrics_are_cut_back_to_the_mark(torn_line, logger, tmp_path):
    for step in range(3):
        logger.log_metrics({"a": step / 7}, step)
    before, mark = (tmp_path / "metrics.csv").read_bytes(), logger.mark()
    for step in range(3, 6):
        logger.log_metrics({"a": step / 7, "later": 1.0, "too": 2.0}, step)
    logger.finalize("killed")
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(torn_line)
    resumed = MetricsCSV(str(tmp_path))
    resumed.cut(**mark)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    resumed.log_metrics({"later": 3.0}, 9)
    resumed.finalize("success")
    assert rows(tmp_path)[-1] == {"step": "9", "a": "", "later": "3.0"} and len(rows(tmp_path)) == 4


def test_metrics_begin_anew_without_a_mark_or_with_none_before_it(logger, tmp_path):
    mark = logger.mark()
    (tmp_path / "metrics.csv").write_text("step,x\n0,1\n1,")
    logger.cut(**mark)
    logger.log_metrics({"a": 1.0}, 0)
    assert rows(tmp_path) == [{"step": "0", "a": "1.0"}]


def test_metrics_of_another_run_are_not_cut(logger, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,x\n0,1\n")
    with pytest.raises(ValueError, match=r"metrics.csv must begin with the columns \['step', 'a'\]"):
        logger.cut(rows=1, columns=["step", "a"])
    assert (tmp_path / "metrics.csv").read_text() == "step,x\n0,1\n"


def test_metrics_are_appended_not_written_anew(logger, monkeypatch):
    written = []
    monkeypatch.setattr(MetricsCSV, "_write", lambda self, *a, f=MetricsCSV._write: written.append(1) or f(self, *a))
    for step in range(1000):
        logger.log_metrics({"a": step} | ({"b": step} if step % 10 == 9 else {}), step)
    assert len(written) == 2


# --- the callback and the overlays --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be positive, or null for never. Got 0"),
        ({"every_n_steps": -1}, "every_n_steps must be positive"),
        ({"every_n_minutes": 0.0}, "every_n_minutes must be positive"),
        ({"monitor": "train/bound_theta"}, "which grows with K. Got train/bound_theta"),
        ({"monitor": "val/iwae_64"}, "which grows with K. Got val/iwae_64"),
    ],
)
def test_checkpoints_say_what_they_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**options)


def test_minutes_are_an_interval_too(config, tmp_path, monkeypatch):
    saved = []
    save = Checkpoints._save
    monkeypatch.setattr(
        Checkpoints, "_save", lambda self, t, *a: saved.append((a[0], t.global_step)) or save(self, t, *a)
    )
    callbacks = yaml.safe_load(CONFIG)["trainer"]["callbacks"]
    callbacks[-1]["init_args"] = {"every_n_epochs": None, "every_n_minutes": 1e-9}
    fit(config, tmp_path, "--trainer.callbacks", yaml.safe_dump(callbacks), "--trainer.max_epochs", "1")
    assert [step for name, step in saved if name == "last"] == [1, 2, 3, 4, 5]


def test_bf16_is_an_overlay(config, unbroken, tmp_path):
    fit(config, tmp_path, "-c", "conf/hardware/bf16.yaml", "--trainer.max_steps", "4")
    single, half = (
        [float(row["train/ess"]) for row in rows(run) if row["train/ess"]] for run in (unbroken(), tmp_path)
    )
    assert len(half) == 2 and single[:2] != half and half == pytest.approx(single[:2], abs=0.05)
