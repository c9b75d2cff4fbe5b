"""W&B without its server: an offline run, what it holds, where it is, and which run it is. With one: tests/slow."""

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from lightning_iwae import curves
from lightning_iwae.cli import commands, loggers, main
from lightning_iwae.sides import Side

from .test_cli import ROOT, SMALL
from .test_figures import OF_MODEL

pytest.importorskip("wandb", reason="wandb is not installed: pip install 'lightning-iwae[wandb]'")
CHECKPOINTS = "{class_path: lightning_iwae.callbacks.Checkpoints, init_args: {monitor: val/elbo}}"
NO_OTHERS = ["--trainer.callbacks", f"[{CHECKPOINTS}]"]
OFFLINE = ["-c", "conf/logger/wandb.yaml", "--trainer.logger.init_args.offline", "true"]
FEW = """\
model: {samples: 8, theta: {particles: 8}}
trainer:
  max_epochs: 2
  check_val_every_n_epoch: 1
  log_every_n_steps: 5
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_iwae.callbacks.Evaluation
      init_args: {particles: 50, size: 50}
    - class_path: lightning_iwae.callbacks.GradientSNR
      init_args: {every_n_steps: 10, draws: 8, size: 10, estimators: [dreg]}
    - class_path: lightning_iwae.callbacks.Figures
      init_args: {samples: 4, reconstructions: 2, posteriors: 1, particles: 50}
    - class_path: lightning_iwae.callbacks.Checkpoints
"""
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """The command line on digits for three steps; returns metrics.csv."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "online")  # put back after the test: the logger sets it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    few = tmp_path / "few.yaml"
    few.write_text(FEW)

    def run(directory, *args):
        to = ["--trainer.default_root_dir", str(directory)]
        main(["fit", "-c", "conf/digits.yaml", "-c", str(few), *OFFLINE, *SMALL, *args, *to])
        return curves.read(directory / "metrics.csv")

    return run


def inspect(folder, *options):
    """What `wandb leet inspect` finds in the folder of an offline run: JSON, a line each."""
    wandb = Path(sys.executable).with_name("wandb")
    command = [wandb, "leet", "inspect", *options, "--json", folder]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, text=True).stdout


def steps(folder, name):
    """The steps of training of the rows that hold a metric."""
    rows = [json.loads(line) for line in inspect(folder).splitlines() if '"type":"history"' in line]
    return [row for row in rows if name in json.dumps(row)]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_offline_without_a_key_has_metrics_config_and_pictures_and_no_secret(cli, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)  # not used, not told
    rows = cli(tmp_path / "run")
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    read = json.loads(inspect(folder, "--summary"))
    assert read["config"]["model"]["network"]["init_args"]["latent"] == 10
    for name in ("val/log_px", "snr/phi", "snr/theta", "dsnr/phi", "train/bound_phi", "train/bound_theta"):
        assert read["summary"][name] == pytest.approx(curves.column(rows, name)[1][-1])
    for name in OF_MODEL | {"training", "snr"}:
        picture = read["summary"][f"figures/{name}"]
        assert picture["width"] == 900 and (folder / "files" / picture["filenames"][0]).is_file()
    assert read["state"] == "finished"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_is_the_same_one_and_a_second_is_another(cli, tmp_path):
    cli(tmp_path / "run", *NO_OTHERS, "--ckpt_path", "last")
    (first,) = (tmp_path / "run/wandb").glob("offline-run-*")
    time.sleep(1.1)  # W&B's folders go by the second
    more = ["--trainer.max_steps", "5", "--trainer.max_epochs", "2"]
    cli(tmp_path / "run", *NO_OTHERS, *more, "--ckpt_path", "last")
    (second,) = {*(tmp_path / "run/wandb").glob("offline-run-*")} - {first}
    assert first.name[-8:] == second.name[-8:] == (tmp_path / "run/wandb/id").read_text().strip()
    assert len(steps(first, "train/bound_theta")) == 3
    assert len(steps(second, "train/bound_theta")) == 5  # it alone can be synced: all rows, none twice
    cli(tmp_path / "other", *NO_OTHERS)
    (other,) = (tmp_path / "other/wandb").glob("offline-run-*")
    assert other.name[-8:] != first.name[-8:]


@pytest.mark.slow
def test_without_a_key_is_one_message(tmp_path):
    command = [sys.executable, "-m", "lightning_iwae", "fit", "-c", "conf/digits.yaml", "-c", "conf/logger/wandb.yaml"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path / "home")}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "error: trainer.logger: W&B can't begin" in done.stderr and "Traceback" not in done.stderr
    assert "--trainer.logger.init_args.offline true" in done.stderr


def test_what_a_driver_says_of_the_network_is_one_line_and_the_directory_is_there(cli, tmp_path, monkeypatch, capsys):
    from wandb.errors import CommError

    def unheard(logger, config):
        assert (tmp_path / "run").is_dir()  # else W&B warns of it
        raise CommError("Post https://api: no such host\n")

    monkeypatch.setattr(loggers.WandbLogger, "log_hyperparams", unheard)
    with pytest.raises(SystemExit):
        cli(tmp_path / "run", *NO_OTHERS)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message.endswith(
        "W&B can't begin: Post https://api: no such host. Without a key or a network: "
        "--trainer.logger.init_args.offline true."
    )
    assert not (tmp_path / "run").exists()


def placed(run, goes_on=True, **options):
    """(id, resume) that the logger would be made with."""
    config = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(save_dir=".", **options))
    made = loggers.placed(config, str(run), goes_on).init_args
    return made.get("version") or made.get("id"), made.resume


def test_an_id_is_the_users_or_the_environments_or_the_one_that_was_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    assert placed(tmp_path, resume=None) == (None, "allow")
    loggers.id_file(str(tmp_path)).parent.mkdir()
    loggers.id_file(str(tmp_path)).write_text("kept\n")
    assert placed(tmp_path, resume=None) == ("kept", "allow")
    assert placed(tmp_path, goes_on=False) == (None, "allow")
    assert placed(tmp_path, version="mine", resume="must") == ("mine", "must")
    assert placed(tmp_path, version=None, id="mine") == ("mine", "allow")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    assert placed(tmp_path) == (None, "allow")


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands.time, "strftime", lambda form: "20260101-000000")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: commands.fresh_directory(), range(16)))
    assert len({*found}) == 16 and Path("runs/20260101-000000") in found
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match=r"trainer\.default_root_dir must be given"):
        commands.fresh_directory()


def test_a_run_that_an_agent_started_has_the_same_directory_when_it_is_started_again(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    command = ["fit", "-c", "conf/digits.yaml", *NO_OTHERS, *SMALL, "--ckpt_path", "last"]
    main(command)
    main([*command, "--trainer.max_steps", "4", "--trainer.max_epochs", "2"])
    assert len(curves.read(Path("runs/sweep/one/metrics.csv"))) > 0
    assert [path.name for path in Path("runs").rglob("last.ckpt")] == ["last.ckpt"]


def test_a_mistake_leaves_no_directory_behind(cli, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    with pytest.raises(SystemExit):
        main(["fit", "-c", "conf/digits.yaml", "--model.phi.particles", "7"])
    assert "particles" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_the_sweep_asks_for_what_the_command_line_takes(cli, capsys):
    sweep = yaml.safe_load((ROOT / "sweeps/wandb.yaml").read_text())
    runs = yaml.safe_load((ROOT / "conf/logger/wandb.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert sweep["project"] == runs["project"]  # W&B ignores that of the runs
    assert sweep["metric"] == {"name": "val/log_px", "goal": "maximize"}
    at = sweep["command"].index("fit")
    parameters = sweep["parameters"]
    values = {name: of.get("values", [of.get("min"), of.get("max")]) for name, of in parameters.items()}
    for some in itertools.zip_longest(*values.values()):
        given = [(n, values[n][0] if value is None else value) for n, value in zip(values, some, strict=True)]
        with pytest.raises(SystemExit) as stop:
            main([*sweep["command"][at:-1], *(f"--{name}={value}" for name, value in given), "--print_config"])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for name, value in given:
            found = config
            for key in name.split("."):
                found = found[key]
            assert found == value
    for estimator, particles in itertools.product(values["model.phi.estimator"], values["model.phi.particles"]):
        Side(estimator, particles).check("model.phi", config["model"]["samples"])
