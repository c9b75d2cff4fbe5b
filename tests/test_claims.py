"""Every claim holds on a small toy, and fails where what it is about is broken."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lightning_iwae import bounds, claims, estimators, laboratory
from lightning_iwae.claims import CLAIMS, Bench, Claim, Finding
from lightning_iwae.cli import main
from lightning_iwae.laboratory import Row
from lightning_iwae.models import LinearGaussian
from lightning_iwae.sides import Side

from .test_cli import ROOT

EFFORT = 0.1
GRID = [(1, 1), (1, 4), (1, 16), (1, 64), (1, 256), (1, 8), (4, 8), (16, 8), (64, 8)]
LAWS = {"iwae": (-1, -0.5), "vimco": (-1, -0.5), "dreg": (-1, -1.5), "stl": (0, -0.5), "wake": (0, -0.5)}  # mean, std
CLAIM = {claim.name: claim for claim in CLAIMS}
OF_ROWS = ["phi", "theta's SNR", "groups", "theorem 1", "estimators"]
OF_DRAWS = ["elbo", "weights", "bounds", "extended", "erratum", "wider", "no encoder", "theta"]


def toy(spread=0.08):
    """A model of 4 dimensions near its optimum, and 256 data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = LinearGaussian(4), math.sqrt(2) * torch.randn(256, 4)
        model.near_optimum(x, spread)
    return model, x


def by_law(model, x, laws=LAWS):
    """The rows that a laboratory without noise would find: phi's by power laws, theta's and their theory exact."""
    rows = {}
    for M, K in GRID:
        known = {s: model.exact_snr(x, s, "iwae", M, K).mean().item() for s in ("phi", "theta")}
        for name, (mean, std) in laws.items():
            snr = K ** (mean - std) * math.sqrt(M)
            if name == "iwae":  # at K >= 16 as its law has it, from the theory's at K = 16 on
                at_16 = model.exact_snr(x, "phi", "iwae", 1, 16).mean().item()
                snr = at_16 * (K / 16) ** (mean - std) if K >= 16 else known["phi"]
            rows["phi", name, M, K] = made_up("phi", name, M, K, K**mean, snr, known["phi"] if name == "iwae" else None)
        rows["theta", "iwae", M, K] = made_up("theta", "iwae", M, K, 1, known["theta"], known["theta"])
    return rows


def made_up(side, name, M, K, mean, snr, theory):
    """Of a gradient of 100 parameters of equal SNR, n = 300."""
    std = mean / snr
    mean = math.sqrt(mean**2 + std**2 / 300)
    return Row(name, "", side, M, K, 300, snr, 0.98 * snr, 1.02 * snr, 0.05, snr, 1.0, 0.2, mean, std, theory)


def measured(estimators, draws):
    """The same toy's rows, measured."""
    model, x = toy()
    phi = [Side(name, 2) for name in estimators]
    rows = laboratory.measure(model, x, phi, [Side("iwae", 2)], GRID, draws)
    return Bench(model, x, {(r.side, r.estimator, r.M, r.K): r for r in rows}, 0, EFFORT)


@pytest.fixture(scope="module")
def bench():
    model, x = toy()
    return Bench(model, x, by_law(model, x), 0, EFFORT)


def finding(name, bench):
    ((claim, found),) = claims.check([CLAIM[name]], bench)
    assert claim.name == name and found.measured
    return found


def test_every_claim_is_tested():
    assert sorted(CLAIM) == sorted([*OF_ROWS, *OF_DRAWS, "training"])


@pytest.mark.parametrize("name", OF_DRAWS + OF_ROWS)
def test_claim_holds(name, bench):
    found = finding(name, replace(bench, effort=0.3) if name == "wider" else bench)
    assert found.holds, found.measured
    json.dumps(found.values)


def test_training_is_repeatable_and_learns():
    assert list(claims.TRAINED) == [
        *("IWAE(1, 64)", "MIWAE(8, 8)", "PIWAE(8, 8)", "VAE(64, 1)", "DReG(1, 64)", "STL(1, 64)")
    ]
    runs = [claims.train(*claims.TRAINED["VAE(64, 1)"], steps, 0) for steps in (0, 40, 40)]
    assert runs[1] == runs[2] and runs[1][0] < runs[0][0] and runs[1][1] < runs[0][1]


@pytest.mark.slow
def test_claims_hold_of_measured_rows():
    bench = measured(["iwae"], 200)
    for name in OF_ROWS[:-1]:
        found = finding(name, bench)
        assert found.holds, found.measured


@pytest.mark.slow
def test_estimators_claim_holds_at_the_papers_settings():
    """DReG's rise sets in where no datum's weights vary much, as there."""
    torch.manual_seed(0)
    model, x = LinearGaussian(20), math.sqrt(2) * torch.randn(1024, 20)
    model.near_optimum(x)
    phi = [Side(name, 2) for name in LAWS if name != "iwae"]
    rows = laboratory.measure(model, x, phi, [], [(1, 64), (1, 256)], 60)
    bench = Bench(model, x, {(r.side, r.estimator, r.M, r.K): r for r in rows}, 0)
    found = finding("estimators", bench)
    assert found.holds, found.measured


@pytest.mark.slow
def test_training_claim_holds():
    ((_, found),) = claims.check([CLAIM["training"]], Bench(LinearGaussian(), torch.zeros(1, 20), {}, 0, workers=2))
    assert found.holds, found.measured


# ------------------------------------------------------------------------------------------------ broken twins
@pytest.mark.slow
def test_phi_by_dreg_in_iwaes_name_is_found_by_measuring(monkeypatch):
    monkeypatch.setitem(estimators.PHI, "iwae", estimators.dreg)
    broken = measured(["iwae"], 30)
    for name in ("phi", "theorem 1"):
        assert not finding(name, broken).holds


@pytest.mark.slow
def test_M_and_K_swapped_are_found_by_measuring(monkeypatch):
    monkeypatch.setattr(Side, "view", lambda side, log_w: log_w.unflatten(0, (side.particles, -1)))
    broken = measured(["iwae"], 30)
    for name in ("phi", "theorem 1"):
        assert not finding(name, broken).holds


def test_phi_by_dreg_in_iwaes_name_is_found(bench):
    broken = replace(bench, rows=by_law(bench.model, bench.x, LAWS | {"iwae": LAWS["dreg"]}))
    for name in ("phi", "theorem 1"):
        assert not finding(name, broken).holds


def test_M_and_K_swapped_are_found(bench):
    """Groups of one particle, as many as there were to be particles: both means stay, SNR rises as M^1/2."""
    rows = {key: replace(row, std_norm=row.K**-0.5, mean_norm=1.0) for key, row in bench.rows.items()}
    for key, row in rows.items():
        snr = math.sqrt(row.K) * bench.rows[key[0], key[1] if key[1] != "vimco" else "iwae", 1, 1].snr
        rows[key] = replace(row, snr=snr, snr_lo=0.98 * snr, snr_hi=1.02 * snr)
    for name in ("phi", "groups", "theorem 1", "estimators"):
        assert not finding(name, replace(bench, rows=rows)).holds


@pytest.mark.parametrize("name", ["stl", "dreg", "wake", "vimco"])
def test_estimator_with_the_others_law_is_found(name, bench):
    law = LAWS["iwae" if name != "vimco" else "dreg"]
    assert not finding("estimators", replace(bench, rows=by_law(bench.model, bench.x, LAWS | {name: law}))).holds


def test_training_of_which_iwae_is_the_best_is_found(bench, monkeypatch):
    monkeypatch.setattr(claims, "train", lambda theta, phi, steps, seed: (0.01 if phi.particles == 64 else 0.3, 0.1))
    assert not finding("training", bench).holds
    monkeypatch.setattr(claims, "train", lambda theta, phi, steps, seed: (0.3 if phi.particles == 64 else 0.01, 0.1))
    assert not finding("training", bench).holds  # DReG no better


def test_theta_by_the_elbos_weights_is_found(bench, monkeypatch):
    monkeypatch.setitem(estimators.THETA, "iwae", estimators.elbo_weights)
    assert not finding("theta", bench).holds


@pytest.mark.parametrize("name", ["bounds", "no encoder", "extended"])
def test_elbo_in_place_of_the_bound_is_found(name, bench, monkeypatch):
    monkeypatch.setattr(bounds, "miwae", bounds.elbo)
    monkeypatch.setattr(torch, "logaddexp", lambda a, b: (a + b) / 2 + math.log(2))
    assert not finding(name, bench).holds


def test_wrong_p_of_x_is_found(bench, monkeypatch):
    exact = LinearGaussian.exact_log_px
    monkeypatch.setattr(LinearGaussian, "exact_log_px", lambda model, x: exact(model, x) + 0.02)
    for name in ("elbo", "weights", "extended"):
        assert not finding(name, bench).holds


def test_width_of_the_elbos_q_at_every_K_is_found(bench, monkeypatch):
    monkeypatch.setattr(claims, "best_width", lambda posterior, grid, K, n: 0.19)
    assert not finding("wider", bench).holds


def test_width_that_maximises_the_elbo_is_the_closed_form():
    """KL(N(0, v I) || N(0, C)) is least at v = D / tr C^-1 = 1 - r^2."""
    torch.manual_seed(0)
    for r in (0.5, 0.9):
        posterior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, r], [r, 1.0]]))
        grid = torch.logspace(math.log10(0.1), math.log10(3.0), 60)
        found = [claims.best_width(posterior, grid, 1, 4000) for _ in range(20)]
        z = (sum(found) / 20 - (1 - r**2)) / (torch.tensor(found).std().item() / math.sqrt(20))
        assert abs(z) < 4.5


def test_eq_11_without_its_factor_is_no_erratum(bench, monkeypatch):
    at = claims.two_particles()
    monkeypatch.setattr(claims, "two_particles", lambda: replace(at, log_q_is=at.log_q_is + math.log(2)))
    assert not finding("erratum", bench).holds


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lightning_iwae.cli.keep_freed_memory", lambda: None)
    small = ["--data.init_args.size", "20", "--data.init_args.dim", "2", "--model.network.init_args.dim", "2"]

    def run(*options):
        words = ["claims", "-c", "conf/gaussian.yaml", "--out", str(tmp_path / "out"), "--draws", "8", "--workers", "1"]
        main([*words, *small, *options])

    return run


def test_command_prints_and_writes_what_was_found(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(claims, "CLAIMS", [CLAIM["extended"], CLAIM["erratum"]])
    command("--seed", "5")
    printed = capsys.readouterr().out
    assert "holds  erratum: q_IS of eq. 11 is a density" in printed and "2 of 2 claims hold" in printed
    assert "not run, as they need MNIST" in printed
    saved = json.loads((tmp_path / "out/claims.json").read_text())
    assert saved["failed"] == [] and saved["seed"] == 5
    assert [claim["claim"] for claim in saved["claims"]] == ["extended", "erratum"]
    for claim in saved["claims"]:
        assert set(claim) == {"claim", "says", "expected", "measured", "verdict", "values"}
        assert claim["verdict"] == "holds"


def test_command_exits_with_1_if_a_claim_fails(command, monkeypatch, capsys, tmp_path):
    false = Claim("flat", "the earth is flat", "flat", lambda bench: Finding("round", False, {}))
    monkeypatch.setattr(claims, "CLAIMS", [CLAIM["erratum"], false])
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 1
    assert "FAILS  flat" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/claims.json").read_text())["failed"] == ["flat"]


def test_command_needs_the_toy(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("-c", "conf/digits.yaml", "--data.init_args.dim", "2")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("error:") == 1
