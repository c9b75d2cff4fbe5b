"""Sweeps: every trial ends, and counts once, whatever happens to fits, workers and the storage."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from lightning_iwae.cli import main
from lightning_iwae.mistakes import Mistake
from lightning_iwae.signals import Interrupted, Signals
from lightning_iwae.sweep import page, rehearsal, settings, storage, study, trial, worker

from .test_cli import ROOT

SWEEP = {
    "study": "s",
    "configs": ["conf/digits.yaml"],
    "space": {"kind": ["good"], "value": {"low": 0, "high": 99}},
    "trials": 4,
    "heartbeat": 0.2,
    "grace": 1.5,
    "launcher": [sys.executable, "-m", "tests.sweep_worker", "--fit"],
}


def write(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
    return path


STARTED = []


@pytest.fixture(autouse=True)
def none_left():
    """No worker outlives its test."""
    yield
    while STARTED:
        STARTED[-1].kill()
        STARTED.pop().communicate()


def start(folder, *args):
    """A worker, as the command line starts it."""
    command = [
        sys.executable,
        "-m",
        "tests.sweep_worker",
        "-c",
        str(folder / "sweep.yaml"),
        "--out",
        str(folder / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *args], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(worker, status=0):
    out, _ = worker.communicate(timeout=250)
    assert worker.returncode == status, out
    return out


def wait_for(condition, worker, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and worker.poll() is None, worker.communicate(timeout=5)
        time.sleep(0.02)


def load(folder, url=None, name="s"):
    return optuna.load_study(study_name=name, storage=url or f"sqlite:///{folder / 'out' / 'study.db'}")


def slots(loaded):
    """slot -> the states of its attempts, in order."""
    return {slot: [t.state.name for t in tried] for slot, tried in study.attempts(loaded.trials).items()}


def starts(folder, slot):
    return (folder / f"out/runs/{slot:03}/starts.txt").read_text().split()


# ------------------------------------------------------------------------------------------------ one worker
@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A sweep over a grid of everything that can happen to a fit."""
    folder = tmp_path_factory.mktemp("faults")
    kinds = ["good", "killed once", "full once", "full", "diverges", "mistake"]
    write(folder, sampler="grid", trials=None, retries=2, space={"kind": kinds})
    text = yaml.safe_load((folder / "sweep.yaml").read_text())
    del text["trials"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(text))
    return folder, finish(start(folder, "--page"))


def test_a_fit_that_breaks_is_begun_again_and_one_that_cannot_succeed_is_marked(faults):
    folder, _ = faults
    assert slots(load(folder)) == {
        0: ["COMPLETE"],
        1: ["FAIL", "COMPLETE"],
        2: ["FAIL", "COMPLETE"],
        3: ["FAIL", "FAIL", "FAIL"],  # two retries
        4: ["FAIL"],
        5: ["FAIL"],
    }


def test_the_reason_is_the_fits_own_and_its_log_is_kept(faults):
    folder, out = faults
    last = {slot: tried[-1].user_attrs for slot, tried in study.attempts(load(folder).trials).items()}
    assert last[3]["reason"] == "exit status 1: OSError: [Errno 28] No space left on device"
    assert last[4]["reason"] == "exit status 1: Step 1: the bound is not finite, by log p(x|z) in 3 of 9."
    assert last[5]["reason"] == "exit status 2: model.phi.particles must divide samples. Got 3."
    first = study.attempts(load(folder).trials)[1][0].user_attrs
    assert first["reason"] == "killed by SIGKILL; out of memory?"
    for slot in last:
        assert (folder / f"out/runs/{slot:03}/log.txt").read_text().startswith("$ ")
    assert "6 trials: 3 finished, 3 failed; 4 begun again" in out


def test_a_broken_fit_goes_on_where_it_was(faults):
    folder, _ = faults
    with open(folder / "out/runs/001/metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]
    assert len(starts(folder, 1)) == 2


def test_the_objective_is_the_best_validations(faults):
    folder, _ = faults
    (good, *_) = study.attempts(load(folder).trials)[0]
    assert good.values == [0.0] and good.user_attrs["point"] == {"kind": "good"}  # 0 - (3 - 3)^2, not the last


def test_the_report_has_every_trial_its_reason_and_its_log(faults):
    folder, _ = faults
    text = (folder / "out/sweep.md").read_text()
    assert text.count("| finished |") == 3 and text.count("| failed |") == 3
    assert "trial 3, attempt 3: exit status 1: OSError: [Errno 28] No space left on device" in text
    html = (folder / "out/sweep.html").read_text()
    assert "runs/003/log.txt" in html and html.count("data:image/png;base64") >= 1
    assert 'src="http' not in html and 'href="http' not in html


def test_started_again_it_has_nothing_to_do_and_more_trials_may_be_asked_for(tmp_path):
    write(tmp_path)
    finish(start(tmp_path))
    before = [t.number for t in load(tmp_path).trials]
    finish(start(tmp_path))
    assert [t.number for t in load(tmp_path).trials] == before == [0, 1, 2, 3]
    finish(start(tmp_path, "--trials", "6"))
    assert slots(load(tmp_path)) == {i: ["COMPLETE"] for i in range(6)}


def test_one_worker_repeats_a_sweep_exactly(tmp_path):
    params = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, trials=12)
        finish(start(tmp_path / name))
        params.append([t.params for t in load(tmp_path / name).trials])
    assert params[0] == params[1] and len({p["value"] for p in params[0]}) > 5


def test_seeds_of_a_trial_are_averaged(tmp_path):
    write(tmp_path, seeds=3, trials=1, space={"value": [10]})
    finish(start(tmp_path, "--page"))
    (t,) = load(tmp_path).trials
    assert t.user_attrs["of_seeds"] == [[10.0], [11.0], [12.0]] and t.values == [11.0]
    assert sorted(p.name for p in (tmp_path / "out/runs").iterdir() if p.is_dir()) == [
        f"000-seed-{i}" for i in range(3)
    ]
    assert "11.0000 ± 0.5774" in (tmp_path / "out/sweep.md").read_text()  # 1 / sqrt(3)


def test_two_objectives_are_read_from_one_validation_and_give_a_pareto_front(tmp_path):
    write(tmp_path, objective={"val/log_px": "maximize", "val/ess": "minimize"}, trials=5)
    finish(start(tmp_path, "--page"))
    values = [t.values for t in load(tmp_path).trials]
    assert [ess for _, ess in values] == [0.3] * 5  # at step 3, where log_px is best
    assert "Pareto front" in (tmp_path / "out/sweep.html").read_text()


def test_pruning_stops_the_fit_and_counts_as_an_end(tmp_path):
    pruner = {"class_path": "ThresholdPruner", "init_args": {"lower": 50.0}}
    space = {"value": [0, 90]}
    text = SWEEP | {"sampler": "grid", "pruner": pruner, "space": space}
    del text["trials"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text))
    finish(start(tmp_path))
    assert slots(load(tmp_path)) == {0: ["PRUNED"], 1: ["COMPLETE"]}


def test_a_signal_gives_the_trial_back_and_the_next_worker_goes_on_with_it(tmp_path):
    write(tmp_path, space={"kind": ["slow"]}, trials=1)
    worker = start(tmp_path)
    wait_for(lambda: (tmp_path / "out/runs/000/metrics.csv").exists(), worker)
    worker.send_signal(signal.SIGTERM)
    out = finish(worker, 143)
    assert "SIGTERM: stopped. The same command goes on with study s." in out and "Traceback" not in out
    finish(start(tmp_path))
    assert slots(load(tmp_path)) == {0: ["FAIL", "COMPLETE"]}
    assert study.attempts(load(tmp_path).trials)[0][0].user_attrs["outcome"] == "returned"


def test_a_disk_that_cannot_be_written_to_breaks_a_trial_not_the_worker(tmp_path):
    write(tmp_path, trials=2, retries=1, space={"value": [7]})
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/runs/000").write_text("in the way")
    out = finish(start(tmp_path))
    assert slots(load(tmp_path)) == {0: ["FAIL", "FAIL"], 1: ["COMPLETE"]}
    assert "000: [Errno 17] File exists" in out


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("blind", r"objective: no val/log_px in .*000/metrics\.csv, which has val/ess, val/log_pz\. Did you mean"),
        ("short", r"objective: .*000/metrics\.csv has no validation\. Let the fits be longer \(budget\)"),
    ],
)
def test_a_sweep_whose_first_trial_never_had_the_objective_stops(tmp_path, kind, told):
    write(tmp_path, space={"kind": [kind]}, evaluate=True)
    out = finish(start(tmp_path), 2)
    assert re.search(rf"error: .*sweep\.yaml: {told}", out) and "the sweep stops" in out
    assert slots(load(tmp_path)) == {0: ["FAIL"], **{i: ["WAITING"] for i in (1, 2, 3)}}


def test_but_goes_on_if_another_trial_has_one(tmp_path):
    path = write(tmp_path, sampler="grid", space={"kind": ["good", "blind", "good"]})
    path.write_text(path.read_text().replace("trials: 4\n", ""))
    finish(start(tmp_path))
    assert slots(load(tmp_path)) == {0: ["COMPLETE"], 1: ["FAIL"], 2: ["COMPLETE"]}


def test_an_interrupted_trial_comes_before_those_that_wait(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    one = study.Study(settings.parsed(SWEEP), url, print)
    broken, returned = one.claim(), one.claim()
    one.finish(broken.trial, study.Ended("broken"))  # likely to break again just now
    one.finish(returned.trial, study.Ended("returned"))
    assert [one.claim().slot for _ in range(4)] == [1, 2, 3, 0]


def test_a_mistake_leaves_no_directory_and_no_study(tmp_path):
    write(tmp_path, space={"kind": {"low": 0.0, "high": 1.0}}, sampler="grid")
    text = (tmp_path / "sweep.yaml").read_text().replace("trials: 4\n", "")
    (tmp_path / "sweep.yaml").write_text(text)
    out = finish(start(tmp_path), 2)
    assert "sweep.yaml: space.kind must be a list, or have a step" in out and not (tmp_path / "out").exists()


def test_what_the_rehearsal_refuses_leaves_none_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    monkeypatch.setattr(worker, "printed", lambda words: "{seed_everything: 0}")
    monkeypatch.setattr(worker, "refused", lambda fits: (1, "kind (command line) is not a known key."))
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()) as told:
        main(["sweep", "-c", "sweep.yaml"])
    assert stop.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]
    assert told.getvalue() == "error: sweep.yaml: space: kind is not a known key. Tried with kind: 'good', value: 99.\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-c", "b.yaml"], "sweep: -c takes one file, the sweep's YAML. Got sweep.yaml, b.yaml."),
        (["--trails", "3"], "sweep: unknown option --trails. Did you mean --trials?"),
        (
            ["--model.samples=4"],
            "sweep: unknown option --model.samples: settings of the fits go below options: in sweep.yaml.",
        ),
        (["more"], "sweep: unexpected argument 'more'"),
        (["--trials", "many"], "--trials must be a whole number from 1 on. Got 'many'."),
        (["--trials", "0"], "--trials must be a whole number from 1 on. Got 0."),
        (["--study", "a b"], "--study must be a name of letters"),
        (["--storage", ""], "--storage must be sqlite:///FILE, journal://FILE or postgresql://"),
        (["--storage", "sqlite://"], "storage: sqlite:// would be in memory, and lost. Expected sqlite:///FILE."),
        (
            ["--storage", "journal:///x.log"],
            "is a file in the root directory, /. For one in this directory: journal://x.log",
        ),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "printed", lambda words: "{seed_everything: 0}")
    write(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "-c", "sweep.yaml", *words])
    assert stop.value.code == 2 and told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_ctrl_c_gives_the_trial_back(tmp_path):
    write(tmp_path, space={"kind": ["slow"]}, trials=1)
    worker = start(tmp_path)
    wait_for(lambda: (tmp_path / "out/runs/000/metrics.csv").exists(), worker)
    worker.send_signal(signal.SIGINT)
    assert "Traceback" not in finish(worker, 130)
    (t,) = load(tmp_path).trials
    assert t.state == TrialState.FAIL and t.user_attrs["outcome"] == "returned"


def test_if_no_trial_can_finish_the_status_says_so(tmp_path):
    write(tmp_path, trials=2, space={"kind": ["mistake"]})
    assert "error: no trial has finished." in finish(start(tmp_path), 1)


# ------------------------------------------------------------------------------------------------ several workers
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_workers_racing_for_a_fresh_study_share_it(tmp_path, kind):
    write(tmp_path, trials=7)
    url = f"{kind}:///{tmp_path / 'shared'}"
    workers = [start(tmp_path, "--storage", url) for _ in range(3)]
    outs = [finish(worker) for worker in workers]
    loaded = optuna.load_study(study_name="s", storage=storage.open_storage(url))
    assert slots(loaded) == {i: ["COMPLETE"] for i in range(7)}
    assert [len(starts(tmp_path, i)) for i in range(7)] == [1] * 7
    assert sum(t.state == TrialState.COMPLETE for t in loaded.trials) == 7
    assert all("7 trials: 7 finished; none begun again" in out for out in outs)
    assert len({t.user_attrs["worker"] for t in study_trials(loaded)}) > 1


def study_trials(loaded):
    return [t for t in loaded.trials if t.state == TrialState.COMPLETE]


def test_a_worker_that_is_killed_takes_its_fit_along_and_another_goes_on(tmp_path):
    write(tmp_path, space={"kind": ["slow"]}, trials=1)
    worker = start(tmp_path)
    wait_for(lambda: (tmp_path / "out/runs/000/metrics.csv").exists(), worker)
    worker.kill()
    worker.communicate()
    (pid,) = starts(tmp_path, 0)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    out = finish(start(tmp_path))
    assert slots(load(tmp_path)) == {0: ["FAIL", "COMPLETE"]}
    assert "its worker gave no sign of life for 2 s: killed, or cut off" in out


def test_a_worker_that_was_cut_off_loses_its_trial_and_its_fit_never_runs_beside_the_new_one(tmp_path):
    write(tmp_path, space={"kind": ["slow"]}, trials=1)
    silent = start(tmp_path)
    wait_for(lambda: (tmp_path / "out/runs/000/metrics.csv").exists(), silent)
    silent.send_signal(signal.SIGSTOP)  # its fit lives, and holds the run's lock
    other = start(tmp_path)
    wait_for(lambda: slots(load(tmp_path)) == {0: ["FAIL", "RUNNING"]}, other)
    time.sleep(1)
    assert len(starts(tmp_path, 0)) == 1
    silent.send_signal(signal.SIGCONT)
    out = finish(silent)
    assert "A trial of this worker has been given to another" in out
    finish(other)
    assert slots(load(tmp_path)) == {0: ["FAIL", "COMPLETE"]} and len(starts(tmp_path, 0)) == 2


# ------------------------------------------------------------------------------------------------ the plan
def test_what_is_missing_can_be_put_in_twice_and_counts_once(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 3, "grace": 60})
    url = f"sqlite:///{tmp_path / 'a.db'}"
    one, two = (study.Study(sweep, url, print) for _ in range(2))
    before = one.trials()
    one._fill()
    two.trials = lambda: before  # it looked before the other wrote
    two._fill()
    del two.trials
    assert len(one.trials()) == 6 and not study.missing(one.trials(), 3, 0)
    taken = [who.claim() for who in (one, two, one, two, one)]
    assert [claim and claim.trial.number for claim in taken] == [0, 1, 2, None, None]
    assert Counter(t.state for t in one.trials()) == {TrialState.RUNNING: 3, TrialState.FAIL: 3}
    assert [t.user_attrs["outcome"] for t in one.trials() if t.state == TrialState.FAIL] == ["surplus"] * 3
    for who, claim in zip((one, two, one), taken, strict=False):
        who.finish(claim.trial, study.Ended("finished", (1.0,)))
    assert one.is_over() and two.is_over()


def test_who_was_too_slow_cannot_finish_the_trial(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 1, "heartbeat": 0.01, "grace": 0.05})
    url = f"sqlite:///{tmp_path / 'a.db'}"
    slow, other = (study.Study(sweep, url, print) for _ in range(2))
    mine = slow.claim().trial
    slow.note(mine, "sign", "here")
    deadline = time.monotonic() + 10
    while (theirs := other.claim()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for act in (slow.beat, lambda t: slow.report(t, 0.0, 1), lambda t: slow.finish(t, study.Ended("finished", (9.0,)))):
        with pytest.raises(study.Taken):
            act(mine)
    other.finish(theirs.trial, study.Ended("finished", (1.0,)))
    assert [t.values for t in other.trials() if t.state == TrialState.COMPLETE] == [[1.0]]


def test_a_sign_of_life_keeps_a_trial_for_as_long_as_it_takes(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 1, "heartbeat": 0.01, "grace": 0.3})
    url = f"sqlite:///{tmp_path / 'a.db'}"
    slow, other = (study.Study(sweep, url, print) for _ in range(2))
    mine, end = slow.claim().trial, time.monotonic() + 1.5
    while time.monotonic() < end:
        slow.note(mine, "sign", time.monotonic())
        assert other.claim() is None
        time.sleep(0.05)
    slow.finish(mine, study.Ended("finished", (1.0,)))
    assert other.is_over()


def test_a_joiner_with_other_settings_is_refused_by_key(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    study.Study(settings.parsed(SWEEP), url, print).join({"model.samples": 8})
    study.Study(settings.parsed(SWEEP | {"trials": 9, "retries": 0}), url, print).join({"model.samples": 8})
    with pytest.raises(Mistake, match=r"config: model\.samples must be 8, as when study s was begun\. Got 16"):
        study.Study(settings.parsed(SWEEP), url, print).join({"model.samples": 16})
    with pytest.raises(Mistake, match=r"sweep: seeds must be 1, .* Got 2"):
        study.Study(settings.parsed(SWEEP | {"seeds": 2}), url, print).join({"model.samples": 8})
    space = {"kind": ["good"], "value": {"low": 0, "high": 98}}
    with pytest.raises(Mistake, match=r"space\.value\.high must be 99, as when study s was begun\. Got 98\."):
        study.Study(settings.parsed(SWEEP | {"space": space}), url, print).join({"model.samples": 8})
    changed = SWEEP | {"objective": {"val/log_px": "minimize"}}
    with pytest.raises(Mistake, match=r"objective: its direction must be maximize, as when .* Got minimize\."):
        study.Study(settings.parsed(changed), url, print).join({"model.samples": 8})


def test_settings_that_differ_late_are_told_in_full():
    a, b = ([*range(40), last] for last in (1, 2))
    assert study.distinct(a, b) == (str(a), str(b))
    assert list(study.differing({"a": {"b": 1}}, {"a": {}})) == [("a.b", 1, study.ABSENT)]


def test_two_workers_never_take_the_same_attempt(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 20})
    url, taken = f"sqlite:///{tmp_path / 'a.db'}", []
    workers = [study.Study(sweep, url, print) for _ in range(4)]
    workers[0]._fill()
    meet = threading.Barrier(4)

    def take(worker):
        for _ in range(5):
            meet.wait()
            claim = worker._take()
            taken.append(claim and claim.trial.number)

    threads = [threading.Thread(target=take, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for number in taken if number is not None]
    assert len(numbers) == len(set(numbers)) >= 5


def test_a_trial_that_was_never_begun_costs_no_retry(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 1, "heartbeat": 0.01, "grace": 0.05, "retries": 0})
    url = f"sqlite:///{tmp_path / 'a.db'}"
    study.Study(sweep, url, print).claim()  # and dies
    other, deadline = study.Study(sweep, url, print), time.monotonic() + 10
    while (claim := other.claim()) is None:
        assert time.monotonic() < deadline and not other.is_over()
        time.sleep(0.02)
    assert claim.slot == 0 and len(claim.token) == 32


def test_a_worker_that_comes_back_while_it_chooses_leaves_the_trial_alone(tmp_path):
    sweep = settings.parsed(SWEEP | {"trials": 1})
    one = study.Study(sweep, f"sqlite:///{tmp_path / 'a.db'}", print)
    claim = one.claim()
    one.finish(claim.trial, study.Ended("lost"))
    with pytest.raises(study.Taken):
        one.choose(claim.trial, sweep.space_over({}), {})


def test_runs_of_another_study_are_not_taken_for_its_own(tmp_path):
    write(tmp_path, trials=1, space={"value": [1]})
    finish(start(tmp_path))
    before = (tmp_path / "out/runs/000/metrics.csv").read_text()
    out = finish(start(tmp_path, "--study", "other"), 2)
    assert "error: --out: " in out and "runs/000 holds a run that is not of this study" in out
    assert (tmp_path / "out/runs/000/metrics.csv").read_text() == before
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path / 'out/study.db'}") == ["s"]


# ------------------------------------------------------------------------------------------------ the storage
class Flaky(study.Study):
    """A worker whose storage does not answer for a while."""

    def __init__(self, failures, patience=5.0):
        self.failures, self.patience, self.signals = failures, patience, Signals()
        self.url, self.answering, self.said = "postgresql://me:s%40cret@host/db", 0.0, []
        self.say = self.said.append

    @storage.patient
    def ask(self):
        self.failures -= 1
        if self.failures >= 0:
            raise StorageInternalError("no") from ConnectionError("host is down for me:s@cret, s%40cret")
        return "answer"


def test_a_storage_that_does_not_answer_is_waited_for(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    flaky = Flaky(3)
    assert flaky.ask() == "answer" and flaky.answering > 0
    assert flaky.said == [
        "The storage does not answer, and is asked again: host is down for me:***, ***",
        "The storage answers again.",
    ]


def test_but_not_for_ever_and_the_password_is_not_told(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    with pytest.raises(Mistake) as caught:
        Flaky(10**6, patience=0.1).ask()
    told = str(caught.value)
    assert "storage: postgresql://***@host/db has not answered for" in told and "cret" not in told


def test_nor_when_a_signal_comes(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    flaky = Flaky(10**6, patience=600)
    flaky.signals.received = signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped while the storage did not answer"):
        flaky.ask()


def test_a_fit_goes_on_while_the_storage_does_not_answer():
    flaky = Flaky(0)
    flaky.sweep, flaky.worker, flaky._beaten = settings.parsed(SWEEP), "w", -99.0

    class Deaf:
        def set_user_attr(self, *_):
            raise StorageInternalError("no")

        report = set_user_attr

    flaky.beat(Deaf())
    assert flaky.report(Deaf(), 1.0, 1) is False and flaky.answering is None
    assert len(flaky.said) == 1


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@h/db",
        "postgresql+psycopg2://u:hun@ter2@h/db",
        "postgresql:u:hunter2@h/db",
        "postgresql://h/db?user=u&password=hunter2&x=1",
        "postgresql://u:hun%40ter2@h/db",
        "mysql:/u:hunter2@h",
    ],
)
def test_no_form_of_a_url_shows_its_password(url):
    driver = "could not connect as u with hunter2, hun@ter2, hun%40ter2 to ter2@h"
    for text in (storage.shown(url), storage.without_password(f"{driver} {url}", url)):
        assert not set(re.findall("hunter2|hun@ter2|hun%40ter2", text)) & set(
            re.findall(r"hunter2|hun@ter2|hun%40ter2", url + url.replace("%40", "@"))
        )
    assert storage.shown("sqlite:///runs/a/study.db") == "sqlite:///runs/a/study.db"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "nonsense",
            "storage must be sqlite:///FILE, journal://FILE or postgresql://USER@HOST/DATABASE. Got nonsense",
        ),
        ("mysql://me:secret@host/db", "storage: mysql needs pymysql: pip install pymysql"),
        ("oracle+none://me:secret@host/db", "Got oracle+none://***@host/db"),
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url, told):
    with pytest.raises(Mistake) as caught:
        storage.open_storage(url)
    assert told in str(caught.value) and "secret" not in str(caught.value)


def test_no_secret_is_in_anything_that_a_sweep_writes(tmp_path, monkeypatch):
    for name in (storage.VARIABLE, "PGPASSWORD", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path / 'hunter2.db'}" if name == storage.VARIABLE else "hunter2")
    write(tmp_path, trials=4, space={"kind": ["good", "mistake"]}, retries=0)
    out = finish(start(tmp_path))
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(written) > 4
    assert not [p for p in written if b"hunter2" in p.read_bytes().replace(b"hunter2.db", b"")]
    assert "hunter2" not in out.replace("hunter2.db", "")


# ------------------------------------------------------------------------------------------------ small parts
def test_seconds_are_written_as_lightning_wants_them():
    assert [trial.days(s) for s in (1, 59.5, 3600, 90061)] == [
        "00:00:00:01",
        "00:00:01:00",
        "00:01:00:00",
        "01:01:01:01",
    ]


def test_metrics_are_read_as_they_grow(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = trial.Metrics(path, ["val/log_px"], [1.0])
    assert list(metrics.new()) == []
    path.write_text("step,train/x,val/log_px\n0,1,\n1,,-5.0\n2,,-4")
    metrics.rest = 0
    assert list(metrics.new()) == [(1, (-5.0,))]  # the last line may be half of -4.75
    path.write_text("step,train/x,val/log_px\n0,1,\n1,,-5.0\n2,,-4.75\n3,,nan\n")
    metrics.rest = 0
    assert [step for step, _ in metrics.new()] == [2, 3]
    assert metrics.best() == (-4.75,)


def test_the_front_is_what_no_other_beats_in_all():
    sweep = settings.parsed(SWEEP | {"objective": {"val/log_px": "maximize", "val/kl_q_posterior": "minimize"}})
    values = [(1.0, 1.0), (2.0, 2.0), (0.5, 2.0), (2.0, 3.0), (3.0, 9.0)]
    rows = [page.Row(i, "finished", v, (), {}, 1.0, 1, [], "", "") for i, v in enumerate(values)]
    assert [row.slot for row in page.best(rows, sweep)] == [0, 1, 4]


def test_the_bar_says_what_runs(tmp_path):
    one = study.Study(settings.parsed(SWEEP | {"trials": 2}), f"sqlite:///{tmp_path / 'a.db'}", print)
    one.claim(), one.claim()
    with redirect_stderr(Terminal()) as terminal:
        progress = worker.Progress(one.sweep)
        progress.update(one)
        progress.close()
    assert re.search(r"0 of 2 trials \[00:0\d\]; trial 0 begun; trial 1 begun", terminal.getvalue())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_gives_the_best_trial_and_its_value_or_nothing(tmp_path):
    one = study.Study(settings.parsed(SWEEP | {"trials": 1}), f"sqlite:///{tmp_path / 'a.db'}", print)
    page.write(one, tmp_path)
    assert "Best" not in (tmp_path / "sweep.md").read_text()
    one.finish(one.claim().trial, study.Ended("finished", (-2.5,)))
    page.write(one, tmp_path)
    assert re.search(r"## Best\n\nTrial 0: val/log_px .2\.5000\n\n    python -m", (tmp_path / "sweep.md").read_text())


@contextmanager
def without(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    yield


def test_without_optuna_the_extra_is_named(monkeypatch):
    from lightning_iwae import sweep

    with without("optuna", monkeypatch), pytest.raises(Mistake, match=r"pip install 'lightning-iwae\[sweep\]'"):
        sweep.main(["-c", "x.yaml"])


# ------------------------------------------------------------------------------------------------ real fits
def printed(words):
    """`worker.printed` without a process of its own."""
    with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
        main([*words, "--print_config"])
    return out.getvalue()


def test_a_sweep_of_real_fits(tmp_path, monkeypatch, capsys):
    evaluation = {"class_path": "lightning_iwae.callbacks.Evaluation", "init_args": {"particles": 20, "size": 20}}
    real = SWEEP | {
        "space": {"model.phi.estimator": ["dreg"], "model.phi.particles": {"divisors_of": "model.samples"}},
        "options": {
            "trainer.callbacks": [evaluation],
            "trainer.enable_progress_bar": False,
            "model.test_particles": 20,
            "model.samples": 4,
            "model.theta.particles": 4,
            "model.phi.particles": 4,
            "trainer.check_val_every_n_epoch": 1,
        },
        "budget": {"steps": 24},
        "trials": 1,
        "evaluate": True,
        "launcher": [],
        "heartbeat": 5,
        "grace": 60,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(real, sort_keys=False))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(worker, "printed", printed)
    main(["sweep", "-c", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")])
    assert "1 trials: 1 finished; none begun again" in capsys.readouterr().out
    (t,) = load(tmp_path).trials
    run = tmp_path / "out/runs/000"
    phi = yaml.safe_load((run / "config.yaml").read_text())["model"]["phi"]
    assert phi["estimator"] == "dreg" and phi["particles"] == t.params["model.phi.particles"]
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    with open(run / "metrics.csv") as file:
        seen = [(float(row["val/log_px"]), int(row["step"])) for row in csv.DictReader(file) if row["val/log_px"]]
    assert len(seen) == 2 and t.values == [max(seen)[0]] and best["global_step"] == max(seen)[1] + 1
    assert len(t.intermediate_values) == 2 and (run / "evaluation.json").exists()


@pytest.fixture
def _here(monkeypatch):
    """What is rehearsed, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(worker, "printed", printed)
    monkeypatch.setattr(worker, "refused", rehearsal.refused)


@pytest.mark.parametrize("name", ["sweeps/optuna.yaml", "sweeps/equal_budget.yaml", "docs/sweeps.md"])
@pytest.mark.usefixtures("_here")
def test_the_repositorys_sweeps_are_accepted_by_the_command_line(name, tmp_path):
    text = (ROOT / name).read_text()
    (tmp_path / "sweep.yaml").write_text(re.search(r"```\n(study:.*?)```|\Z", text, re.S)[1] or text)
    sweep = settings.read(str(tmp_path / "sweep.yaml"))
    base = worker.base_settings(sweep)
    worker.rehearse(sweep, sweep.space_over(base), base)


@pytest.mark.usefixtures("_here")
def test_trials_of_the_docs_example_can_begin():
    (block,) = re.findall(r"```\n(study:.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.S)
    sweep = settings.parsed(yaml.safe_load(block))
    base = worker.base_settings(sweep)
    space = sweep.space_over(base)
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space.suggest(drawn.ask(), base) for _ in range(8)]
    assert {bool(point["config"]) for point in points} == {True, False}
    assert rehearsal.refused([trial.fit_words(sweep, point, 0) for point in points]) is None


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"model.phi.particle": [1]}, r"space: .*model\.phi\.particle .* Did you mean model\.phi\.particles\?"),
        (
            {"model.phi.estimator": ["iwae", "dregg"]},
            r"space: model\.phi: unknown estimator 'dregg'.* Tried with .*'dregg'",
        ),
        ({"model.phi.particles": [8, 7]}, r"space: model\.phi\.particles must divide samples \(64\).* Got 7\."),
        ({"model.clip_phi": {"low": -1.0, "high": 1.0}}, r"space: model\.clip_phi must be positive"),
        ({"model.optimizer_phi.init_args.lr": [-1.0]}, r"space: model\.optimizer_phi.* -1\.0"),
        ({"config": [None, "conf/none.yaml"]}, r"space: config conf/none\.yaml: no such file"),
    ],
)
@pytest.mark.usefixtures("_here")
def test_a_choice_that_cannot_be_is_refused_before_the_first_trial(space, told):
    sweep = settings.parsed(SWEEP | {"space": space})
    base = worker.base_settings(sweep)
    with pytest.raises(Mistake, match=told) as caught:
        worker.rehearse(sweep, sweep.space_over(base), base)
    assert "command line" not in str(caught.value)


def test_a_mistake_in_the_options_is_not_of_the_command_line(monkeypatch):
    def refuse(words):
        raise Mistake("model.sample (command line) is not a known key.")

    monkeypatch.setattr(worker, "printed", refuse)
    with pytest.raises(Mistake, match=r"^options: model\.sample is not a known key\.$"):
        worker.base_settings(settings.parsed(SWEEP))


def test_the_rehearsal_has_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    fit = ["fit", "-c", "conf/digits.yaml", "--trainer.default_root_dir=runs/none"]
    index, told = worker.refused([fit, [*fit, "--model.phi.particles=7"]])
    assert index == 1 and "model.phi.particles must divide samples" in told
