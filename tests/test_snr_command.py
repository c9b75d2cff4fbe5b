"""`snr`: what it writes and prints, the options, and one message for every mistake."""

import csv
import math

import pytest
import torch
import yaml

from lightning_iwae import curves
from lightning_iwae.cli import main
from lightning_iwae.data import Gaussian
from lightning_iwae.laboratory import Row, measure, slopes
from lightning_iwae.models import LinearGaussian
from lightning_iwae.sides import Side

from .test_cli import ROOT

COLUMNS = "estimator options side M K n snr snr_lo snr_hi snr_floor snr_plain dsnr dsnr_floor mean_norm std_norm theory"
TINY = ["--data.init_args.size", "30", "--data.init_args.dim", "3", "--model.network.init_args.dim", "3"]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)


@pytest.fixture
def snr(tmp_path):
    """Runs the command on a tiny toy; the rows of snr.csv."""

    def run(*options, config=("-c", "conf/gaussian.yaml", *TINY)):
        main(["snr", *config, "--out", str(tmp_path / "out"), "--draws", "8", *options])
        with open(tmp_path / "out/snr.csv", newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_writes_a_row_of_each_and_says_what_is_left_out(snr, tmp_path, capsys):
    rows = snr("--grid", "1x1,1x16,1x64,4x8,2x8", "--phi", "iwae,vimco,ciwae:beta=0.5,tvo", "--theta", "iwae,elbo")
    assert list(rows[0]) == COLUMNS.split()
    found = {(r["side"], r["estimator"], int(r["M"]), int(r["K"])) for r in rows}
    grid = [(1, 1), (1, 16), (1, 64), (4, 8), (2, 8)]
    names = [("phi", "iwae"), ("phi", "vimco"), ("phi", "ciwae"), ("phi", "tvo"), ("theta", "iwae"), ("theta", "elbo")]
    left_out = {("phi", "vimco", 1, 1), ("phi", "tvo", 1, 1)}
    assert found == {(*name, *point) for name in names for point in grid} - left_out and len(rows) == len(found)
    assert {(r["estimator"], r["options"]) for r in rows if r["options"]} == {
        ("ciwae", "beta=0.5"),
        ("tvo", "partition=5"),
    }
    for r in rows:
        assert all(math.isfinite(float(r[name])) for name in COLUMNS.split()[6:15] if name != "dsnr_floor")
        assert float(r["snr_lo"]) < float(r["snr"]) < float(r["snr_hi"])
        known = r["estimator"] in ("iwae", "elbo") or (r["estimator"] == "ciwae" and r["K"] == "1")
        assert bool(r["theory"]) == known
    with open(tmp_path / "out/slopes.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == ["side", "estimator", "options", "axis", "first", "last", "slope", "standard_error", "theory"]
    assert (tmp_path / "out/snr.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "left out at M = 1, K = 1: phi vimco, tvo" in printed
    assert "the optimum for the data + N(0, 0.01^2); 30 data" in printed and "samples: about" in printed


def test_rows_are_the_laboratorys_at_the_papers_point_of_the_seed(snr):
    (phi, theta) = snr("--grid", "2x4", "--phi", "iwae", "--seed", "7")
    again, other = (snr("--grid", "2x4", "--phi", "iwae", "--seed", seed) for seed in ("7", "8"))
    assert [phi, theta] == again and other[0]["theory"] != phi["theory"]
    assert 0.01 < float(phi["theory"]) < 1 and phi["n"] == "8"


def test_a_trained_model_is_measured_where_it_stands(snr, gaussian_run, capsys):
    last = gaussian_run / "checkpoints/last.ckpt"
    rows = snr("--grid", "1x4", "--phi", "dreg", "--data", "20", config=("--ckpt_path", str(last)))
    assert f"those of {last}; 20 data" in capsys.readouterr().out
    state = torch.load(last, weights_only=True)["state_dict"]
    config = yaml.safe_load((gaussian_run / "config.yaml").read_text())
    assert config["seed_everything"] == 3
    model = LinearGaussian(3)
    model.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    data = Gaussian(dim=3, size=70, seed=3)
    data.setup("fit")
    expected = list(measure(model, data.probe(20), [Side("dreg", 4)], [Side("iwae", 4)], [(1, 4)], 8, seed=3))
    for row, known in zip(rows, expected, strict=True):
        assert float(row["snr"]) == pytest.approx(known.snr, rel=1e-4)


MISTAKES = {
    "no config": ((), [], ["needs a config", "--ckpt_path"]),
    "no directory": ((), ["--out"], ["expected one argument"]),
    "estimator": (None, ["--phi", "iwae,derg"], ["--phi", "'derg'", "dreg?"]),
    "other side": (None, ["--theta", "dreg"], ["--theta", "'dreg'", "iwae"]),
    "option": (None, ["--phi", "ciwae:bete=1"], ["--phi", "'bete'", "beta"]),
    "value": (None, ["--phi", "ciwae:beta=much"], ["--phi", "ciwae:beta=much"]),
    "range": (None, ["--phi", "ciwae:beta=2"], ["beta", "[0, 1]", "2.0"]),
    "grid": (None, ["--grid", "1x4,16"], ["--grid", "1x4,16"]),
    "empty grid": (None, ["--grid", "0x4"], ["--grid", "0x4"]),
    "draws": (None, ["--draws", "3"], ["--draws", "at least 8", "3"]),
    "workers": (None, ["--workers", "0"], ["--workers", "at least 1", "0"]),
    "stray": (None, ["--particles", "3"], ["--particles"]),
    "file": (("-c", "conf/gausian.yaml"), [], ["conf/gausian.yaml", "gaussian.yaml?"]),
    "network": (None, ["--model.network.init_args.dimm", "3"], ["model.network", "dimm"]),
    "checkpoint": (("--ckpt_path", "conf"), [], ["conf", "best.ckpt"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(name, snr, capsys):
    config, options, words = MISTAKES[name]
    given = {} if config is None else {"config": config}
    with pytest.raises(SystemExit) as stop:
        snr("--grid", "1x4", *options, **given)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error:") == 1 and "Traceback" not in error, error
    assert all(word in error for word in words), error


# ------------------------------------------------------------------------------------------------ the picture
def grid_of_rows():
    rows = []
    for side, name, power in (("phi", "iwae", -0.5), ("phi", "dreg", 0.5), ("theta", "iwae", 0.5)):
        theory = (lambda snr: snr) if name == "iwae" else (lambda snr: None)
        for M, K in ((1, 8), (1, 16), (1, 64), (1, 256), (4, 8), (16, 8)):
            snr = K**power * M**0.5
            rows.append(Row(name, "", side, M, K, 99, snr, 0.9 * snr, 1.1 * snr, 0.08, *[1.0] * 5, theory(snr)))
    return rows


def test_picture_shows_every_row_and_its_slope():
    rows = grid_of_rows()
    axes = curves.snr_over_grid(rows, slopes(rows)).axes
    for axis, side, name in zip(axes, ("phi", "phi", "theta", "theta"), "KMKM", strict=True):
        own = [r for r in rows if r.side == side and (r.M == 1 if name == "K" else r.K == 8)]
        shown = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for estimator in dict.fromkeys(r.estimator for r in own):
            points = [[getattr(r, name), r.snr] for r in own if r.estimator == estimator]
            slope = -0.5 if (side, estimator, name) == ("phi", "iwae", "K") else 0.5
            assert shown[f"{estimator}  {slope:+.2f}"] == points
        assert shown["theory"] == [[getattr(r, name), r.snr] for r in own if r.estimator == "iwae"]
        assert axis.get_ylim()[0] < min(r.snr for r in own) and max(r.snr for r in own) < axis.get_ylim()[1]
    colours = {line.get_label().split()[0]: line.get_color() for axis in axes[:2] for line in axis.lines}
    assert len({colours["iwae"], colours["dreg"], colours["theory"]}) == 3


# ------------------------------------------------------------------------------------------------ the paper's toy
@pytest.mark.slow
def test_theory_and_slopes_at_the_papers_settings(tmp_path):
    """The default grid, data and draws, of two estimators: about three minutes on two cores."""
    out = tmp_path / "out"
    main(["snr", "-c", "conf/gaussian.yaml", "--out", str(out), "--phi", "iwae,dreg"])
    with open(out / "snr.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    checked = 0
    for r in rows:
        K = int(r["K"])
        if r["theory"] and r["estimator"] == "iwae" and (K >= 16 or K * int(r["M"]) == 1):
            error = (float(r["snr_hi"]) - float(r["snr_lo"])) / (2 * 1.96)
            assert abs(float(r["snr"]) - float(r["theory"])) < 4 * error, r
            checked += 1
    assert checked == 10
    with open(out / "slopes.csv", newline="") as file:
        found = {(s["side"], s["estimator"], s["axis"]): s for s in csv.DictReader(file)}
    for key, s in found.items():
        assert abs(float(s["slope"]) - (-0.5 if key == ("phi", "iwae", "K") else 0.5)) < 0.06, s
    assert len(found) == 6
