"""The batch scripts with a stand-in for srun, which tells what it is to start. With SLURM: tests/slow/test_slurm.py."""

import os
import subprocess

import pytest

from lightning_iwae.cli import configs

from .test_cli import ROOT

SRUN = '#!/bin/bash\nprintf "%s\\n" "$LIGHTNING_IWAE_STORAGE" "$@"\n'
SAVED = "ckpt_path: null\ntrainer: {default_root_dir: null, num_nodes: 1, devices: auto}\n"


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """A job of a script in a folder of its own: (LIGHTNING_IWAE_STORAGE, words behind the command's name)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "saved.yaml").write_text(SAVED)
    job = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}

    def submit(command, *words, **more):
        env = job | {"SLURM_NTASKS": "4"} | more
        script = ["bash", str(ROOT / f"sweeps/slurm/{command}.sbatch"), *words]
        done = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
        storage, *started = done.stdout.splitlines()
        return storage, started[started.index(command) + 1 :]

    return submit


def place(words):
    """(directory, checkpoint) that a fit is given in the end."""
    tree = configs.read(words).tree
    assert (tree["trainer"]["num_nodes"], tree["trainer"]["devices"]) == ("2", "2")
    return tree["trainer"]["default_root_dir"], tree["ckpt_path"]


@pytest.mark.parametrize("config", ["conf/digits.yaml", "saved.yaml"])  # the nulls of a run's config.yaml do no harm
def test_a_run_is_where_it_was_told_to_be_else_in_the_jobs_own_directory(submit, config):
    assert place(submit("fit", "-c", config)[1]) == ("runs/slurm-77", "last")
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert place(submit("fit", "-c", config, **task)[1]) == ("runs/slurm-70_3", "last")
    for given in (["--trainer.default_root_dir", "runs/slurm-12"], ["--trainer.default_root_dir=runs/slurm-12"]):
        for words in (["-c", config, *given], [*given, "-c", config]):
            assert place(submit("fit", *words)[1]) == ("runs/slurm-12", "last")
            assert place(submit("fit", *words, SLURM_RESTART_COUNT="1")[1]) == ("runs/slurm-12", "last")


def test_a_branch_of_another_run_begins_there_and_goes_on_from_its_own_checkpoint(submit, tmp_path):
    words = ["-c", "conf/digits.yaml", "--ckpt_path", "runs/other/checkpoints/best.ckpt"]
    begins, goes_on = ("runs/slurm-77", words[-1]), ("runs/slurm-77", "last")
    assert place(submit("fit", *words)[1]) == begins
    assert place(submit("fit", *words, SLURM_RESTART_COUNT="1")[1]) == begins  # there was no time for a checkpoint
    (tmp_path / "runs/slurm-77/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/slurm-77/checkpoints/last.ckpt").touch()
    assert place(submit("fit", *words, SLURM_RESTART_COUNT="1")[1]) == goes_on
    assert place(submit("fit", *words)[1]) == begins  # a new job: `fit` refuses it


def test_workers_share_a_study_in_their_directory_unless_it_is_elsewhere(submit, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    for given, out in ([], "runs/sweep-70"), (["--out", "runs/sweep-12"], "runs/sweep-12"), (["--out=mine"], "mine"):
        storage, words = submit("sweep", "-c", "sweep.yaml", *given, **array)
        assert storage == f"journal://{out}/study.log" and (tmp_path / out).is_dir()
        assert words == ["-c", "sweep.yaml", *given, "--out", out]
    elsewhere = "postgresql://sweep@host/study"
    assert submit("sweep", "-c", "sweep.yaml", LIGHTNING_IWAE_STORAGE=elsewhere)[0] == elsewhere


def test_the_shared_study_is_one_that_optuna_opens(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from lightning_iwae.sweep.storage import open_storage

    monkeypatch.chdir(tmp_path)
    open_storage("journal://study.log").create_new_study([])
    assert (tmp_path / "study.log").stat().st_size > 0


@pytest.mark.parametrize("command", ["fit", "sweep"])
def test_a_script_that_is_started_by_hand_says_so(command, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    script = ["bash", str(ROOT / f"sweeps/slurm/{command}.sbatch"), "-c", "conf/digits.yaml"]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "SLURM_JOB_ID: start it by sbatch" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
