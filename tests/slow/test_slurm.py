"""The batch scripts under real SLURM: two virtual nodes on this machine, installed and started here."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_iwae.cli import COMMANDS

from ..test_cli import ROOT
from ..test_resume import CONFIG, assert_same_run, load
from .test_kills import lines

pytestmark = pytest.mark.slow
PACKAGES = ["slurm-wlm", "slurmctld", "slurmd", "munge", "slurm-client"]
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
LaunchParameters=disable_send_gids
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=kept Nodes=n1,n2 PriorityTier=1 PreemptMode=OFF
PartitionName=urgent Nodes=n1,n2 PriorityTier=9
"""


# ------------------------------------------------------------------------------------------------------- the cluster
def install():
    """By apt, where that can be; else skip."""
    if all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch", "srun"))):
        if os.getuid() == 0:
            return
        pytest.skip("SLURM's daemons need root")
    if os.getuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("SLURM is not installed, and installing it needs apt-get and root")
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"SLURM is not installed, and apt-get could not: {done.stderr[-300:]}")


def munged():
    """Start it unless it runs; its process id if it was started here."""
    pid = Path("/run/munge/munged.pid")
    if pid.exists() and Path(f"/proc/{pid.read_text().strip()}").exists():
        return None
    for folder in map(Path, ("/run/munge", "/var/log/munge", "/var/lib/munge")):
        folder.mkdir(exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
    return pid


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Where its jobs are submitted from, and what is asked of it."""

    def __init__(self, folder):
        self.folder = folder / "work"
        self.folder.mkdir()
        (self.folder / "conf").symlink_to(ROOT / "conf")
        (self.folder / "tiny.yaml").write_text(CONFIG)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # no .venv here: python is the one on PATH
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PYTHONPATH": str(ROOT)}
        self.env |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # virtual nodes have no address

    def __call__(self, *words):
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def fit(self, *args, options=()):
        """A job of fit.sbatch on one core a task: its number."""
        script = str(ROOT / "sweeps/slurm/fit.sbatch")
        fit = ["-c", "tiny.yaml", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
        return self("sbatch", "--parsable", "--cpus-per-task=1", *options, script, *fit, *args)

    def run(self, job):
        return self.folder / f"runs/slurm-{job}"

    def output(self, job):
        file = self.folder / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def about(self, job):
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait(self, job, reached, seconds=400):
        """Until `reached()`, or until the job is in the state that is named."""
        deadline = time.monotonic() + seconds
        while not (self.about(job)["JobState"] == reached if isinstance(reached, str) else reached()):
            assert time.monotonic() < deadline, f"{reached}\n{self.about(job)}\n{self.output(job)}"
            time.sleep(0.1)

    def training(self, job, more=20):
        """Until so many rows more are in metrics.csv."""
        metrics = self.run(job) / "metrics.csv"
        before = lines(metrics)
        self.wait(job, lambda: lines(metrics) > before + more)

    def restart(self, job, restarts):
        """Once it is queued again, start it at once, and not after SLURM's two minutes."""
        self.wait(job, "PENDING")
        assert self.about(job)["Restarts"] == str(restarts)
        self("scontrol", "update", f"jobid={job}", "StartTime=now")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    install()
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool/n1", "spool/n2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(3)))
    made, started = Cluster(folder), munged()
    try:
        made("/usr/sbin/slurmctld", "-c")
        for node in ("n1", "n2"):
            made("/usr/sbin/slurmd", "-N", node)
        deadline = time.monotonic() + 60
        while made("sinfo", "-N", "-h", "-p", "main", "-o", "%t") != "idle\nidle":
            assert time.monotonic() < deadline, made("sinfo", "-N", "-l")
            time.sleep(0.5)
        yield made
        subprocess.run(["scancel", "-u", "root"], env=made.env)
    finally:
        for file in [*folder.glob("*.pid"), *([started] if started else [])]:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(int(file.read_text()), signal.SIGTERM)


# --------------------------------------------------------------------------------------------------------------- fit
def test_a_preempted_job_on_two_nodes_ends_as_the_unbroken_one(cluster):
    epochs = ["--trainer.max_epochs", "40"]
    unbroken = cluster.fit(*epochs, options=["--partition=kept"])
    job = cluster.fit(*epochs)  # at the same time
    cluster.training(job)
    urgent = cluster("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--wrap", "true")
    cluster.wait(job, lambda: "SIGTERM: stopped after step" in cluster.output(job))
    cluster.wait(urgent, "COMPLETED")
    cluster.restart(job, 1)
    cluster.training(job)
    cluster("scancel", "--signal=USR1", job)  # what --signal sends ahead of the time limit
    cluster.wait(job, lambda: "SIGUSR1: stopped after step" in cluster.output(job))
    cluster.restart(job, 2)
    for each, restarts in ((unbroken, "0"), (job, "2")):
        cluster.wait(each, "COMPLETED")
        about, said = cluster.about(each), cluster.output(each)
        assert (about["NumNodes"], about["Restarts"], about["ExitCode"]) == ("2", restarts, "0:0")
        assert "Starting with 2 processes" in said
        assert said.count(f"the run starts afresh, in: runs/slurm-{each}\n") == 1  # neither goes on from the other
    term, usr1 = (int(step) for step in re.findall(r"stopped after step (\d+)", cluster.output(job))[::2])
    assert 0 < term < usr1 < 200 == load(cluster.run(job))["global_step"]
    assert_same_run(cluster.run(job), cluster.run(unbroken))


def test_a_mistake_fails_once_and_what_is_cancelled_stays_so_until_a_new_job_goes_on_with_it(cluster):
    one = ["--nodes=1"]
    wrong = cluster.fit("--model.phi.particles", "5", options=one)
    cancelled = cluster.fit("--trainer.max_epochs", "-1", options=one)
    cluster.training(cancelled)
    cluster("scancel", cancelled)
    cluster.wait(cancelled, lambda: "SIGTERM: stopped after step" in cluster.output(cancelled))
    cluster.wait(wrong, "FAILED")
    cluster.wait(cancelled, "CANCELLED")
    assert "error: " in cluster.output(wrong) and "Traceback" not in cluster.output(wrong)
    time.sleep(5)  # in which they could have been queued again
    for job, state, code in ((wrong, "FAILED", "2:0"), (cancelled, "CANCELLED", "143:0")):
        about = cluster.about(job)
        assert (about["JobState"], about["Restarts"]) == (state, "0"), about
        assert about["ExitCode"] == code
    run = cluster.run(cancelled)
    steps = load(run)["global_step"] + 5
    more = ["--trainer.max_steps", str(steps), "--trainer.default_root_dir", f"runs/{run.name}"]
    job = cluster.fit("--trainer.max_epochs", "-1", *more, options=one)
    cluster.wait(job, "COMPLETED")
    assert "afresh" not in cluster.output(job) and load(run)["global_step"] == steps


# ------------------------------------------------------------------------------------------------------------- sweep
SWEEP = """
study: tiny
configs: [tiny.yaml]
space: {model.optimizer_phi.init_args.lr: {low: 1.0e-3, high: 1.0e-2, log: true}}
trials: 3
budget: {steps: 60}
"""


@pytest.mark.skipif("sweep" not in COMMANDS, reason="there is no command sweep yet")
def test_two_tasks_of_an_array_work_on_one_study(cluster):
    optuna = pytest.importorskip("optuna")
    from lightning_iwae.sweep.storage import open_storage

    (cluster.folder / "sweep.yaml").write_text(SWEEP)
    script = str(ROOT / "sweeps/slurm/sweep.sbatch")
    array = cluster("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", script, "-c", "sweep.yaml")
    tasks, runs = [f"{array}_0", f"{array}_1"], cluster.folder / f"runs/sweep-{array}"
    cluster.wait(tasks[0], lambda: len(list(runs.glob("**/metrics.csv"))) == 2)  # both are in a trial
    cluster("scontrol", "requeue", tasks[0])
    cluster.restart(tasks[0], 1)
    for task in tasks:
        cluster.wait(task, "COMPLETED")
    assert [cluster.about(task)["Restarts"] for task in tasks] == ["1", "0"]
    storage = open_storage(f"journal:///{runs}/study.log")  # the script's default
    (study,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=study, storage=storage).trials
    done = [trial.params for trial in trials if trial.state.is_finished() and trial.value is not None]
    assert len(done) == 3
    assert len(list(runs.glob("**/last.ckpt"))) == 3
