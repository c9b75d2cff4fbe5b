"""Two processes by the command line: their run is that of one process, and when one is lost the other says so."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_iwae.cli import main
from lightning_iwae.ddp import DDP, Launcher, is_lost, watch

from .slow.test_ddp_run import child, wait_until_gone
from .slow.test_kills import lines, start, wait_for
from .test_cli import ROOT
from .test_resume import CONFIG, load, rows

DDP_ON_CPU = ["-c", "conf/hardware/ddp.yaml", "--trainer.accelerator", "cpu"]
SECONDS = 60  # docs/clusters.md says 15, of an idle machine


def command(folder, run, *args):
    (folder / "tiny.yaml").write_text(CONFIG)
    fit = [sys.executable, "-m", "lightning_iwae", "fit", "-c", str(folder / "tiny.yaml"), *args]
    return [*fit, "--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", str(run)]


# ----------------------------------------------------------------------------------------------- equal to one process
def test_two_processes_are_one_after_twenty_steps(tmp_path):
    # the last batch of the 31 validated is of 11: 5 on one process, 6 on the other
    options = ["--trainer.precision", "64-true", "--model.whole_batch_noise", "true", "--trainer.max_steps", "20"]
    options += ["--data.init_args.validation", "31"]
    runs = [tmp_path / "one", tmp_path / "two"]
    both = [start(command(tmp_path, run, *ddp, *options)) for run, ddp in zip(runs, ([], DDP_ON_CPU), strict=True)]
    for process in both:
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
    one, two = map(load, runs)
    assert one["global_step"] == two["global_step"] == 20
    for name, weight in one["state_dict"].items():
        assert weight.dtype == torch.float64
        assert (weight - two["state_dict"][name]).abs().max() < 1e-10, name
    assert one["optimizer_states"][0]["state"][0]["exp_avg"].abs().max() > 1e-3  # there were gradients to be equal in
    assert_same_metrics(*map(rows, runs))


def assert_same_metrics(one, two):
    """Every cell to 1e-10; but validation's noise is each process's own, so its means are near only."""
    assert len(one) == len(two) > 20
    assert {"train/bound_theta", "train/bound_phi", "train/ess", "snr/phi", "snr/theta", "val/elbo"} <= set(one[0])
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert bool(a[name]) == bool(b[name]), name
            if a[name]:
                near = {"abs": 2.0} if name.startswith("val/") else {"rel": 1e-10, "abs": 1e-10}
                assert float(a[name]) == pytest.approx(float(b[name]), **near), name


def test_a_batch_that_cannot_be_shared_is_told_of_once_before_there_are_two(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr(Launcher, "launch", lambda *args, **kwargs: pytest.fail("the others are started"))
    with pytest.raises(SystemExit) as stop:
        main([*command(tmp_path, tmp_path / "run", *DDP_ON_CPU, "--data.batch_size", "25")[3:]])
    (message,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "divisible by the world size 2. Got 25; 24 or 26 would work." in message
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ a process is lost
def lose(run, rank, signum, *args):
    """Kill or stop one of two processes in training: (what was said, status of the first, seconds that the other took).

    If it was the second, it is gone too when the first has ended.
    """
    first = start(command(run.parent, run, *DDP_ON_CPU, "--trainer.max_epochs", "-1", *args))
    second = None
    try:
        wait_for(first, lambda: lines(run / "metrics.csv") > 10)
        second = child(first)
        began = time.monotonic()
        os.kill(second if rank else first.pid, signum)
        if rank:
            first.wait(SECONDS)
        wait_until_gone(second)
        seconds = time.monotonic() - began
    finally:
        first.kill()
        if second is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(second, signal.SIGKILL)
    return first.communicate()[1], first.returncode, seconds


def assert_one_message(errors, rank, run):
    (message,) = [line for line in errors.splitlines() if "error" in line]
    assert message.startswith(f"error: process {rank} of 2 lost another one after step ")
    assert message.endswith(f"Go on with --trainer.default_root_dir {run} --ckpt_path last")
    assert "Traceback" not in errors


def test_a_killed_process_ends_the_run_with_one_message(tmp_path):
    errors, status, seconds = lose(tmp_path / "run", 1, signal.SIGKILL)
    assert status == 1
    assert_one_message(errors, 0, tmp_path / "run")
    assert seconds < SECONDS


@pytest.mark.parametrize(("code", "calls"), [("pass", 0), ("raise SystemExit(3)", 1)])
def test_the_watch_ends_the_run_for_a_process_that_failed(code, calls):
    processes = [subprocess.Popen([sys.executable, "-c", c]) for c in ("import time; time.sleep(1)", code)]
    called = []
    watch(processes, lambda: called.append([process.poll() for process in processes]), pause=0.05)
    assert len(called) == calls
    if calls:
        assert called == [[None, 3]]  # at once, and not when the other is done
    processes[0].wait()


@pytest.mark.parametrize("ending", [True, False])
def test_the_watch_speaks_for_a_process_that_is_busy_but_not_for_one_that_ends(ending, monkeypatch, capsys):
    statuses = []
    monkeypatch.setattr("lightning_iwae.ddp.GRACE", 0)
    monkeypatch.setattr("lightning_iwae.ddp.os._exit", statuses.append)
    launcher = Launcher(None, 2, 1)
    state = SimpleNamespace(fn=TrainerFn.TESTING)
    launcher.trainer = SimpleNamespace(global_rank=0, world_size=2, global_step=7, state=state)
    launcher.ending = ending
    launcher._end()
    said = capsys.readouterr().err
    assert (statuses, bool(said)) == (([], False) if ending else ([1], True))
    assert ending or said.startswith("error: process 0 of 2 lost another one after step 7: ")


def test_only_what_torch_says_of_other_processes_is_a_loss():
    assert is_lost(torch.distributed.DistNetworkError("no answer"))
    assert is_lost(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("gloo/"))


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeout_must_be_positive(timeout):
    with pytest.raises(ValueError, match=r"DDP\.timeout must be positive\. Got"):
        DDP(timeout)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),  # torch 2.13, of one that hangs
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("gloo/"), False),
    ],
)
def test_what_torch_says_of_a_lost_process(error, lost):
    assert is_lost(error) is lost
