"""Certificates: every row has one that holds, broken estimators get none, and the page says what is so.

The exact checks are whole; z-scores and slopes have fewer replicates here than in `make certify`.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch

from lightning_iwae.certification import certificates as c
from lightning_iwae.certification.broken import BROKEN
from lightning_iwae.certification.exact import Enumeration, Quadrature
from lightning_iwae.certification.page import table
from lightning_iwae.certification.replicates import Replicas, Slopes, Z, limit
from lightning_iwae.certification.targets import TARGETS, options_of
from lightning_iwae.cli import main
from lightning_iwae.estimators import PHI, THETA

ROOT = Path(__file__).parent.parent
ROWS = [("theta", name) for name in THETA] + [("phi", name) for name in PHI]
every_row = pytest.mark.parametrize(("side", "name"), ROWS, ids=[f"{side}-{name}" for side, name in ROWS])


@pytest.fixture(autouse=True)
def double_precision_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def rules():
    torch.set_default_dtype(torch.float64)
    found = [Quadrature(2), Quadrature(3, 30), Enumeration(2), Enumeration(3)]
    torch.set_default_dtype(torch.float32)
    return found


# --- the rules themselves, against SciPy ------------------------------------------------------------------------


def test_quadrature_s_elbo_has_its_closed_form(rules):
    """E[log w] = log p(x) - KL, and its gradient, per datum."""
    rule = rules[0]
    b, s2, mu = rule.b.detach(), (2 * rule.log_s.detach()).exp(), rule.mu.detach()
    m = (rule.x + mu) / 2
    log_px = torch.from_numpy(scipy.stats.norm(mu, math.sqrt(2)).logpdf(rule.x))
    kl = s2 - 0.5 - 0.5 * (2 * s2).log() + (b - m).square()
    expected = rule.mean(torch.full_like(rule.log_w, 1 / rule.K), rule.log_w.detach())
    torch.testing.assert_close(expected, log_px - kl, rtol=1e-12, atol=1e-12)
    by_b, by_log_s, by_mu = rule.expected_gradient(TARGETS["elbo"].bound)
    torch.testing.assert_close(by_b, -2 * (b - m), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(by_log_s, 1 - 2 * s2, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(by_mu, b - mu, rtol=1e-11, atol=1e-12)


def test_enumeration_s_probabilities_are_q_s(rules):
    rule = rules[3]
    q = rule.phi.detach().softmax(0)
    assert len(rule.z) == 4**3
    torch.testing.assert_close(rule.probability.detach(), q[rule.z].prod(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(rule.probability.sum(), torch.tensor(1.0), rtol=1e-12, atol=0)


def test_limits_are_closed_forms_of_their_own():
    """wake's is -grad KL(posterior || q) by autograd of the KL; TVO's tends to grad log p(x) = 0 as intervals grow."""
    model = Replicas(1, 1)
    b, log_s = (p.detach()[0].requires_grad_() for p in model.inference.values())
    posterior = torch.distributions.Normal((model.x[0] + model.generative["mu"].detach()[0]) / 2, math.sqrt(0.5))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(b, log_s.exp()))
    expected = -torch.cat(torch.autograd.grad(kl.sum(), [b, log_s]))
    torch.testing.assert_close(limit("wake", {}, model), expected, rtol=1e-10, atol=1e-12)
    coarse, fine = (limit("tvo", {"partition": n}, model).norm() for n in (10, 1000))
    assert fine < coarse / 50  # the integral does not depend on q
    elbo = limit("tvo", {"partition": 1}, model)
    assert elbo[0].item() == pytest.approx(-2 * (b - posterior.loc).item(), rel=1e-10)


# --- rows -------------------------------------------------------------------------------------------------------


@every_row
def test_every_row_has_its_claim_and_passes_exactly(side, name, rules):
    found = c.Certificate(side, name, options_of(c.weights_of(side, name)), "", [], 0.0)
    found.needs = c.needs(side, name, found.options)
    if name not in c.OF_THE_MODEL:
        c.check_exactly(found, rules, name, c.weights_of(side, name))
        assert found.errors or name in c.CONSISTENT
    if (error := c.per_draw(c.Side(name, 4, **found.options), side)) is not None:
        found.errors["draw"] = error
    if name in c.OF_THE_MODEL:
        found.z = c.Z(0.0, 9.0, 1.0)  # by z-scores alone: below
    assert found.errors or found.z
    assert found.problems == []


def test_z_scores_hold_through_routing_and_twins_fail():
    """40,000 replicates at one point; power enough for the quieter rows."""
    found = c.z_scores(2, 3, 2, 40_000, c.sides_at("phi", 3), c.sides_at("theta", 3))
    assert set(found) >= {"phi-dreg", "phi-vimco", "phi-score", "phi-sleep", "theta-gdreg", "phi-rws-dreg"}
    assert max(z.worst for z in found.values()) < c.Z_LIMIT
    for name in ("phi-dreg", "phi-stl", "phi-ciwae-dreg", "phi-vr-iwae-dreg", "phi-sleep", "theta-gdreg", "phi-rloo"):
        assert found[name].twin > c.Z_LIMIT, name
        assert found[name].snr >= c.LEAST_SNR, name


def test_what_is_biased_comes_to_its_limit_as_one_over_k():
    for name, distances in c.biases(400_000).items():
        assert c.fall_as_one_over_k(distances), (name, distances)


@pytest.mark.parametrize(("what", "by", "broken", "ours", "most"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_others_got_wrong_is_caught(what, by, broken, ours, most):
    assert ours() <= most < broken()


# --- what a certificate says ------------------------------------------------------------------------------------

GOOD = c.Certificate("phi", "dreg", {}, "L_K", [], 3.0, {"quadrature": 1e-9}, {"quadrature": 0.05}, Z(1.0, 9.0, 0.2))


@pytest.mark.parametrize("change", [
    {"errors": {"quadrature": 1e-3}},
    {"errors": {"quadrature": math.nan}},
    {"errors": {"quadrature": 1e-9, "draw": 1e-8}},
    {"twins": {"quadrature": 1e-9}},
    {"z": Z(4.6, 9.0, 0.2)},
    {"z": Z(math.nan, 9.0, 0.2)},
    {"z": Z(1.0, 4.0, 0.2)},
    {"z": Z(1.0, 9.0, 0.01)},
    {"limits": [0.2, 0.19, 0.18]},
    {"slopes": Slopes(0.3, 0.5), "theory": (0.5, 0.5)},
    {"slopes": Slopes(0.5, 0.2), "theory": (0.5, 0.5)},
    {"errors": {}, "z": None},
], ids=str)  # fmt: skip
def test_a_certificate_is_refused_for_any_one_failure(change):
    assert GOOD.problems == []
    bad = replace(GOOD, **change)
    assert len(bad.problems) == 1 and "FAILS" in str(bad) and "FAILS" in table([bad])


def test_requirements_are_found_by_asking():
    assert c.needs("phi", "vimco", {}) == ["K >= 2"]
    assert c.needs("phi", "dreg", {}) == ["reparameterised q"]
    assert c.needs("phi", "sleep", {}) == ["draws of the model"]
    assert c.needs("theta", "gdreg", {}) == ["learnt, reparameterisable prior"]
    assert c.needs("theta", "iwae", {}) == []


def test_cost_is_three_decoder_passes_and_more_where_more_is_done():
    torch.set_default_dtype(torch.float32)
    assert c.cost("phi", "iwae", {}) == pytest.approx(3.0, abs=0.1)
    assert c.cost("phi", "vimco", {}) <= c.cost("phi", "iwae", {})
    assert c.cost("theta", "gdreg", {}) > 4


# --- the page, and the command ----------------------------------------------------------------------------------


def test_the_page_has_every_row_and_all_of_them_are_certified():
    text = (ROOT / "docs/estimators.md").read_text()
    theta, phi = text.split("## For phi")
    assert "FAILS" not in text and "NOT CAUGHT" not in text
    for part, known, side in ((theta, THETA, "theta"), (phi, PHI, "phi")):
        rows = {m[1]: m[0] for m in re.finditer(r"^\| `([\w-]+)`.*certified \|$", part, re.M)}
        assert list(rows) == list(known)
        for name, row in rows.items():
            expected = c.needs(side, name, options_of(known[name]))
            assert row.split(" | ")[2] == (", ".join(expected)), name
    assert text.count("| caught |") == len(BROKEN)


def test_an_estimator_of_one_s_own_is_certified_for_what_it_estimates_and_for_nothing_else(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "certified_estimators.py").write_text(
        "import torch\n"
        "from lightning_iwae.weights import normalised\n\n\n"
        "def half_dreg(log_w):\n"
        "    w = normalised(log_w, 1) / len(log_w)\n"
        "    return 0.5 * (w + w**2), torch.zeros_like(w)\n\n\n"
        "def same_as_dreg(log_w):\n"
        "    w = normalised(log_w, 1)\n"
        "    return w**2 / len(log_w), torch.zeros_like(w)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_default_dtype(torch.float32)
    with pytest.raises(SystemExit) as stop:
        main(["certify", "--estimator", "certified_estimators.half_dreg", "--replicates", "20000"])
    assert stop.value.code == 1 and "FAILS" in capsys.readouterr().out
    main(["certify", "--estimator", "certified_estimators.same_as_dreg", "--replicates", "40000"])
    assert "certified" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "fragment"), [
    (["--estimator", "own.nothing"], "unknown estimator 'own.nothing'"),
    (["--estimator", "lightning_iwae.estimators.dreg", "--of", "sleep"], "--of must be one of elbo, iwae"),
    (["--replicates", "many"], "invalid int value"),
])  # fmt: skip
def test_mistakes_are_answered_by_one_message(words, fragment, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["certify", *words])
    assert stop.value.code == 2 and fragment in capsys.readouterr().err


@pytest.mark.slow
def test_certify_as_make_runs_it_certifies_every_row_and_writes_the_page_that_is_in_docs(tmp_path):
    """Four minutes. Figures are the machine's in their last digits; rows, requirements and verdicts are not."""
    torch.set_default_dtype(torch.float32)
    main(["certify", "--out", str(tmp_path / "estimators.md")])  # exits with 1 if a row fails

    def fixed(text):
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
        return [(row[0], row[1], row[2], row[-1]) for row in rows]

    assert fixed((tmp_path / "estimators.md").read_text()) == fixed((ROOT / "docs/estimators.md").read_text())
