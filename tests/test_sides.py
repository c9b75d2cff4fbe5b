"""A side's options: who takes which, what they may be, and their way through YAML and the command line."""

import csv
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from lightning_iwae import Side
from lightning_iwae.cli import main
from lightning_iwae.estimators import PHI, THETA
from lightning_iwae.sides import CHECKS, made_up
from tests.test_estimators import required

ROOT = Path(__file__).parents[1]
SMALL = ["--data.init_args.size", "40", "--data.init_args.batch_size", "20", "--data.init_args.dim", "2"]
SMALL += ["--model.network.init_args.dim", "2", "--trainer.max_epochs", "1", "--trainer.callbacks", "null"]
SMALL += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--model.samples", "8"]


@pytest.mark.parametrize(("side", "name"), [("theta", n) for n in THETA] + [("phi", n) for n in PHI])
def test_a_side_gives_its_estimator_the_options_it_takes_and_no_others(side, name):
    options = required((THETA if side == "theta" else PHI)[name])
    one = Side(name, 4, **options)
    one.check(side, 8)
    assert one.options == options and str(one).startswith(f"{name} (4 particles")
    for option, value in {"beta": 0.3, "alpha": 0.3, "gamma": 0.3, "partition": 3}.items():
        if option not in options:
            with pytest.raises(ValueError, match=rf"^{side}: estimator '{name}' has no option '{option}'; it takes "):
                Side(name, 4, **options, **{option: value}).check(side, 8)
    for option in options:
        with pytest.raises(ValueError, match=rf"^{side}: estimator '{name}' needs the option '{option}'"):
            Side(name, 4).check(side, 8)


def test_every_option_has_its_check_and_every_check_its_option():
    assert [f.name for f in fields(Side)] == ["estimator", "particles", *CHECKS]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (Side("ciwae", 4, beta=-0.1), r"model\.phi\.beta must lie in \[0, 1\]\. Got -0\.1"),
        (Side("vr-iwae", 4, alpha=1.0), r"model\.phi\.alpha must lie in \[0, 1\)\. Got 1\.0"),
        (Side("vr-iwae-dreg", 4, alpha=float("nan")), r"model\.phi\.alpha must lie in \[0, 1\)\. Got nan"),
        (Side("ovis", 4, gamma=1.5), r"model\.phi\.gamma must lie in \[0, 1\]\. Got 1\.5"),
        (Side("tvo", 4, partition=0), r"model\.phi\.partition must have at least 1 interval\. Got 0"),
        (
            Side("tvo", 4, partition=(0.0, 0.5)),
            r"model\.phi\.partition must be .* grow from 0 to 1\. Got \(0\.0, 0\.5\)",
        ),
        (Side("tvo", 1, partition=3), r"model\.phi\.particles: estimator 'tvo' needs at least 2 particles.* Got 1"),
        (Side("ovis", 1, gamma=0.0), r"model\.phi\.particles: estimator 'ovis' needs at least 2 particles.* Got 1"),
    ],
)
def test_an_option_that_can_t_be_is_named_by_its_key(side, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        side.check("model.phi", 8)


def test_what_was_checked_once_does_not_pass_for_what_only_equals_it(tmp_path, monkeypatch):
    Side("tvo", 2, partition=1).check("phi", 4)
    with pytest.raises(ValueError, match=r"phi\.partition"):
        Side("tvo", 2, partition=1.0).check("phi", 4)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewritten.py").write_text("def mine(log_w):\n    return log_w, log_w\n")
    side = Side("rewritten.mine", 2)
    side.check("phi", 4)
    import rewritten

    def mine(log_w):
        raise ValueError("needs more particles")

    monkeypatch.setattr(rewritten, "mine", mine)
    with pytest.raises(ValueError, match="needs more particles"):
        side.check("phi", 4)


def test_a_partition_given_as_a_list_makes_the_same_side_as_a_tuple():
    listed = Side("tvo", 4, partition=[0.0, 0.5, 1.0])
    assert listed == Side("tvo", 4, partition=(0.0, 0.5, 1.0)) and hash(listed) is not None
    assert not listed.needs_path
    torch.testing.assert_close(
        listed.phi(made_up(4)[0].repeat(2, 1)), Side("tvo", 4, partition=2).phi(made_up(4)[0].repeat(2, 1))
    )


def fit(run: Path, *args: str) -> tuple[list, list[str]]:
    """The partitions of the config that the run saved, and the bounds that it logged."""
    main(["fit", "-c", *args, *SMALL, "--trainer.default_root_dir", str(run)])
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    with open(run / "metrics.csv") as file:
        return [saved[side]["partition"] for side in ("theta", "phi")], [
            r["train/bound_phi"] for r in csv.DictReader(file)
        ]


@pytest.mark.parametrize("partition", [3, [0.0, 0.05, 0.4, 1.0]], ids=["int", "list"])
def test_a_partition_goes_through_yaml_and_command_line(partition, tmp_path, monkeypatch):
    """The same run from an overlay, from flags, and from the config that the first one saved."""
    monkeypatch.setattr(sys, "argv", ["lightning_iwae"])
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    toy, overlay = str(ROOT / "conf/gaussian.yaml"), tmp_path / "tvo.yaml"
    side = {"estimator": "tvo", "particles": 4, "partition": partition}
    overlay.write_text(yaml.safe_dump({"model": {"theta": side, "phi": side}}))
    flags = [word for s in ("theta", "phi") for key in side for word in (f"--model.{s}.{key}", str(side[key]))]
    saved, bounds = fit(tmp_path / "overlay", toy, "-c", str(overlay))
    assert saved == [partition, partition] and all(map(float, filter(None, bounds))) and any(bounds)
    assert fit(tmp_path / "flags", toy, *flags) == (saved, bounds)
    assert fit(tmp_path / "again", str(tmp_path / "overlay/config.yaml")) == (saved, bounds)
