"""The report: read, grouped, counted and drawn from runs that are written here, checked by scipy and by hand."""

import copy
import csv
import html.parser
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats

from lightning_iwae.cli import main
from lightning_iwae.report import curves, markdown, pictures, runs
from lightning_iwae.report.checkpoints import step_of
from lightning_iwae.report.groups import find_reference, group, objective
from lightning_iwae.report.results import results, warnings
from lightning_iwae.report.statistics import holm, paired, summarise, welch

from .test_cli import ROOT

OVERLAYS = {name: ROOT / f"conf/objective/{name}.yaml" for name in ("vae", "iwae", "piwae")}
ESTIMATORS = {name: yaml.safe_load(path.read_text())["model"] for name, path in OVERLAYS.items()}
MINUS = "\N{MINUS SIGN}"


def config(seed=0, objective="iwae", **changed):
    """A config.yaml's content; `changed` are dotted keys with __ for the dots."""
    content = yaml.safe_load((ROOT / "conf/digits.yaml").read_text())
    content["seed_everything"] = seed
    content["model"] |= copy.deepcopy(ESTIMATORS[objective])
    content["trainer"]["default_root_dir"] = f"somewhere/{objective}-{seed}"
    for key, value in changed.items():
        *path, last = key.split("__")
        node = content
        for name in path:
            node = node[name]
        node[last] = value
    return content


def evaluation(seed=0, log_px=-22.0, **changed):
    """An evaluation.json's content around one log p(x)."""
    noise = np.random.default_rng(round(-1e6 * log_px)).normal(0, 0.05, 3)
    means = {"iwae_64": log_px - 0.05, "log_px": log_px, "elbo": log_px - 2.5 + noise[0]}
    means |= {"kl_q_posterior": 2.5 - noise[0], "kl_is_64": 0.05, "ess": 0.1 + noise[1] / 50}
    about = {"particles": 5000, "data": "Digits", "binarization": "dynamic", "version": "0.1.0", "device": "cpu"}
    estimates = {name: {"mean": mean, "se": 0.2} for name, mean in means.items()}
    return estimates | {"active_units": 10, "seed": seed} | about | changed


def metrics(path, steps=300, every=30, seed=0, level=-22.0):
    """A sparse metrics.csv as a fit writes it."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(0, steps, 1):
        row = {"step": step, "train/bound_theta": level - 20 * math.exp(-step / 40) + rng.normal(0, 0.3)}
        rows.append(row | {"train/bound_phi": row["train/bound_theta"] - 1, "epoch": step // 10, "train/ess": 0.2})
        if step % every == 0:
            bound = level - 18 * math.exp(-step / 40) + rng.normal(0, 0.1)
            val = {"val/log_px": bound, "val/iwae_64": bound - 0.1, "val/elbo": bound - 2.5, "val/ess": rng.uniform()}
            rows.append({"step": step, "epoch": step // 10, "val/kl_q_posterior": 2.4, "val/kl_is_64": 0.1} | val)
            snr = {f"{s}/{n}": rng.uniform(0.1, 1) for s in ("snr", "dsnr") for n in ("phi", "theta")}
            rows.append({"step": step, "snr/draws": 100, "snr/phi_floor": 0.08, "snr/theta_floor": 0.08} | snr)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


def write(path, seed=0, objective="iwae", log_px=-22.0, about=None, steps=300, every=30, picture=None, **changed):
    """A run's directory with everything in it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config(seed, objective, **changed), sort_keys=False))
    (path / "evaluation.json").write_text(json.dumps(evaluation(seed, log_px, **(about or {}))))
    metrics(path / "metrics.csv", steps, every, seed, log_px)
    if picture is not None:
        (path / "figures").mkdir()
        Image.new("RGB", picture, (200, 100, 40)).save(path / "figures/samples.png")
    return path


LOG_PX = {"iwae": (-22.1, -22.3, -22.0), "piwae": (-21.5, -21.9, -21.8, -21.6), "vae": (-24.0, -24.6, -24.4)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three objectives with three or four seeds."""
    root = tmp_path_factory.mktemp("study")
    for name, values in LOG_PX.items():
        for seed, value in enumerate(values):
            write(root / f"digits-{name}-{seed}", seed, name, value, picture=(1500, 700))
    return root


@pytest.fixture(scope="module")
def read_study(study):
    found = [runs.read(path) for path in runs.find([study])]
    return found, group(found)


# --- reading --------------------------------------------------------------------------------------------------


def test_metrics_are_read_where_they_are(tmp_path):
    text = "epoch,step,train/bound_theta,val/elbo\n,0,-3.5\n0,1,-3.0,\n0,1,,-5\n1,2,-2.5,\n1,2,,-4\n1,3,-2"
    run = runs.Run(tmp_path)
    (tmp_path / "metrics.csv").write_text(text)
    runs._read_metrics(run, tmp_path / "metrics.csv")  # the first row is from before val/elbo, the last is torn
    assert run.curves["train/bound_theta"].steps.tolist() == [0, 1, 2]
    assert run.curves["train/bound_theta"].values.tolist() == [-3.5, -3.0, -2.5]
    assert run.curves["val/elbo"].steps.tolist() == [1, 2] and run.curves["val/elbo"].values.tolist() == [-5, -4]
    assert "val/log_px" not in run.curves and run.problems == []


def test_of_a_step_that_was_logged_twice_the_later_value_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/elbo\n1,-5\n3,-3\n2,-4\n3,-2\n")
    runs._read_metrics(run := runs.Run(tmp_path), tmp_path / "metrics.csv")
    assert run.curves["val/elbo"].steps.tolist() == [1, 2, 3] and run.curves["val/elbo"].values.tolist() == [-5, -4, -2]


def test_values_that_are_not_finite_are_left_out_and_told(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/elbo\n1,-5\n2,nan\n3,-inf\n4,-2\n")
    runs._read_metrics(run := runs.Run(tmp_path), tmp_path / "metrics.csv")
    assert run.curves["val/elbo"].steps.tolist() == [1, 4]
    assert run.problems == ["metrics.csv: 2 of 4 values of val/elbo are not finite; left out"]


def test_settings_are_flat_and_classes_go_by_name():
    content = {
        "a": {"class_path": "x.Y", "init_args": {"b": [1, 2]}},
        "c": [{"class_path": "p.Q", "init_args": {"d": 1}}],
    }
    assert dict(runs.flatten(content)) == {"a": "x.Y", "a.b": [1, 2], "c.Q": "p.Q", "c.Q.d": 1}


def test_a_directory_of_runs_stands_for_its_runs_each_once_in_natural_order(tmp_path):
    for name in ("r-10", "r-2", "r-1"):
        write(tmp_path / name, steps=31)
    (tmp_path / "notes").mkdir()
    found = runs.find([tmp_path, tmp_path / "r-2", tmp_path / "notes/../r-1"])
    assert [path.name for path in found] == ["r-1", "r-2", "r-10"]


# --- groups ---------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seeds_alone_are_a_group_with_the_directories_name(read_study):
    _, groups = read_study
    assert [g.name for g in groups] == ["iwae", "piwae", "vae"]
    assert [[run.seed for run in g.runs] for g in groups] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2]]
    differing = {"model.theta.estimator", "model.theta.particles", "model.phi.estimator", "model.phi.particles"}
    assert set(groups[0].settings) == differing


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([("a", {}), ("b", {"objective": "vae"}), ("c", {"objective": "piwae"})], ["IWAE", "VAE", "PIWAE(8, 8)"]),
        ([("1", {"data__init_args__batch_size": 20}), ("2", {})], ["batch_size=20", "batch_size=100"]),
        (
            [
                ("1", {"model__optimizer_phi__init_args__lr": 1e-4}),
                ("2", {}),
                ("3", {"objective": "vae", "model__optimizer_phi__init_args__lr": 1e-4}),
                ("4", {"objective": "vae"}),
            ],
            ["IWAE, lr=0.0001", "IWAE, lr=0.001", "VAE, lr=0.0001", "VAE, lr=0.001"],
        ),
        # two keys that go together: one is enough to name by
        (
            [("1", {}), ("2", {f"model__optimizer_{s}__init_args__lr": 0.01 for s in ("theta", "phi")})],
            ["optimizer_theta.lr=0.001", "optimizer_theta.lr=0.01"],
        ),
        ([("1", {"model__phi__particles": 3}), ("2", {})], ["phi.particles=3", "phi.particles=64"]),
        ([("big-0", {}), ("small-0", {"model__network__init_args__latent": 2})], ["big", "small"]),
        ([("run-iwae-s0", {}), ("run-iwae-s0b", {"objective": "vae"})], ["iwae", "iwae-s0b"]),
        ([("20260101-1", {}), ("20260101-2", {"objective": "vae"})], ["IWAE", "VAE"]),
        ([("mine_seed0", {})], ["mine"]),
        ([("trial-0", {}), ("trial-1", {"objective": "vae"})], ["IWAE", "VAE"]),
        (
            [("1", {"model__phi": {"estimator": "ciwae", "particles": 8, "beta": 0.5}}), ("2", {})],
            ["theta iwae(64), phi ciwae(8, beta=0.5)", "IWAE"],
        ),
    ],
)
def test_names(made, expected, tmp_path):
    found = []
    for name, changed in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config(**changed), sort_keys=False))
        found.append(runs.read(tmp_path / name))
    if expected[0].startswith("phi.particles"):  # 3 does not divide 64: no name in the literature
        found[0].settings["model.samples"] = found[1].settings["model.samples"] = None
    assert [g.name for g in group(found)] == expected


@pytest.mark.parametrize(
    ("theta", "phi", "name"),
    [
        (("elbo", 1), ("elbo", 1), "VAE"),
        (("iwae", 64), ("iwae", 64), "IWAE"),
        (("iwae", 8), ("iwae", 8), "MIWAE(8, 8)"),
        (("iwae", 64), ("iwae", 4), "PIWAE(16, 4)"),
        (("iwae", 64), ("dreg", 64), "IWAE-DReG"),
        (("iwae", 64), ("vimco", 64), "VIMCO"),
        (("iwae", 64), ("wake", 64), "RWS"),
        (("iwae", 64), ("wake", 32), None),
        (("iwae", 8), ("iwae", 64), None),
        (("iwae", {0: 1, 10: 64}), ("iwae", 8), None),
    ],
)
def test_objectives_that_have_a_name(theta, phi, name):
    settings = {"model.samples": 64, "model.theta.estimator": theta[0], "model.theta.particles": theta[1]}
    settings |= {"model.phi.estimator": phi[0], "model.phi.particles": phi[1], "model.phi.beta": None}
    assert objective(settings) == name


def test_a_seed_that_was_run_twice_counts_once(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed, steps=31)
    (tmp_path / "a/evaluation.json").unlink()  # the finished one is kept
    found = [runs.read(path) for path in runs.find([tmp_path])]
    (only,) = group(found)
    assert [run.path.name for run in only.runs] == ["b", "c"] and [run.path.name for run in only.repeats] == ["a"]
    assert any("Same settings and same seed" in w and "a (seed 0" in w for w in warnings([only], found))


def test_annealing_by_other_settings_does_not_compare(tmp_path):
    for name, temperatures in (("a", 500), ("b", 100)):
        about = {"ais": {"chains": 16, "temperatures": temperatures}, "log_px_ais": {"mean": -22.0, "se": 0.1}}
        write(tmp_path / name, len(name), about=about, steps=31)
    write(tmp_path / "without", 2, steps=31)
    found = [runs.read(path) for path in runs.find([tmp_path])]
    (told,) = [w for w in warnings(group(found), found) if "annealed" in w]
    assert told.startswith("Not comparable, by the settings of annealed importance sampling: ")
    assert "500" in told and "100" in told and found[0].figures["log_px_ais"].mean == -22


def best_checkpoint(run, step):
    (run / "checkpoints").mkdir(exist_ok=True)
    module = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(module.parameters())
    content = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": step}
    torch.save(content | {"loops": {}, "dtype": torch.float32}, run / "checkpoints/best.ckpt")


def test_an_evaluation_of_another_checkpoint_than_the_best_is_told(tmp_path):
    best = {"checkpoint": "best.ckpt", "step": 300}
    for name, about in (("fresh", best), ("gone-on", best), ("of-last", {"checkpoint": "last.ckpt", "step": 400})):
        best_checkpoint(write(tmp_path / name, len(name), about=about, steps=31), 450 if name == "gone-on" else 300)
    best_checkpoint(write(tmp_path / "untrained", 1, about={"checkpoint": None, "step": None}, steps=31), 300)
    write(tmp_path / "without", 2, about=best, steps=31)
    best_checkpoint(write(tmp_path / "of-before-steps", 3, steps=31), 300)
    found = [runs.read(path) for path in runs.find([tmp_path])]
    (told,) = [w for w in warnings(group(found), found) if "checkpoint" in w]
    assert told == (
        "Not of the best checkpoint, test again: "
        "gone-on, whose evaluation.json is of best.ckpt at step 300 and best.ckpt of step 450; "
        "of-last, whose evaluation.json is of last.ckpt at step 400 and best.ckpt of step 300; "
        "untrained, whose evaluation.json is of no checkpoint and best.ckpt of step 300."
    )


def test_a_step_is_read_without_weights_and_without_running_anything(tmp_path, gaussian_run):
    best_checkpoint(tmp_path, 7)
    assert step_of(tmp_path / "checkpoints/best.ckpt") == 7
    last = gaussian_run / "checkpoints/last.ckpt"
    assert step_of(last) == torch.load(last, weights_only=True)["global_step"] > 0
    hostile = tmp_path / "hostile.ckpt"
    torch.save({"global_step": 5, "payload": Payload(tmp_path / "ran")}, hostile)
    assert step_of(hostile) == 5 and not (tmp_path / "ran").exists()
    for content in (b"", b"PK\x03\x04", hostile.read_bytes()[:200]):
        hostile.write_bytes(content)
        assert step_of(hostile) is None
    torch.save([1, 2], hostile)
    assert step_of(hostile) is None and step_of(tmp_path) is None and step_of(tmp_path / "none.ckpt") is None


class Payload:
    """Which makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_reference_by_name_or_by_a_run_of_it(study, read_study):
    _, groups = read_study
    assert find_reference(groups, None) is groups[0]
    assert find_reference(groups, "digits-vae-2") is groups[2]
    assert find_reference(groups, "VAE") is find_reference(groups, str(study / "digits-vae-1")) is groups[2]
    with pytest.raises(ValueError, match=r"one of iwae, piwae, vae. Got piwa\. Did you mean piwae\?"):
        find_reference(groups, "piwa")


# --- statistics -----------------------------------------------------------------------------------------------


def test_welch_is_scipys():
    rng = np.random.default_rng(1)
    for n, m, scale in ((2, 2, 1.0), (3, 7, 5.0), (4, 4, 1e-3)):
        a, b = rng.normal(-90, 0.2, n), rng.normal(-90.1, 0.2 * scale, m)
        ours, theirs = welch(list(a), list(b)), stats.ttest_ind(a, b, equal_var=False)
        assert ours.t == pytest.approx(theirs.statistic) and ours.p == pytest.approx(theirs.pvalue)
        assert ours.df == pytest.approx(theirs.df) and ours.difference == pytest.approx(a.mean() - b.mean())
        interval = theirs.confidence_interval(0.95)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))


def test_welch_by_hand():
    # means 2 and 5; s^2 = 1 and 2; v = 1/3 + 2/2; t = -3 / sqrt(4/3); df = (4/3)^2 / ((1/9)/2 + 1/1)
    test = welch([1, 2, 3], [4, 6])
    assert test.t == pytest.approx(-3 / math.sqrt(4 / 3)) and test.df == pytest.approx((16 / 9) / (1 / 18 + 1))


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([], [1.0, 2.0]), ([10, 10], [9, 9])])
def test_there_is_no_test_of_one_seed_nor_of_values_that_do_not_vary(a, b):
    assert welch(a, b) is None


def test_pairs_are_scipys():
    a, b = [1.0, 2.5, 3.0, 5.0], [0.9, 2.2, 3.1, 4.0]
    assert paired(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired([1.0], [2.0]) is None and paired([1.0, 2.0], [0.5, 1.5]) is None


def test_summary():
    assert summarise([1.0, 2.0, 6.0]) == (3.0, pytest.approx(stats.tstd([1, 2, 6])), 3, None)
    assert summarise([1.5], [0.2]) == (1.5, None, 1, 0.2) and summarise([]) is None


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04 times 4 3 2 1: 0.04 0.06 0.06 0.04, made increasing
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_holm_keeps_the_family_error():
    """Under the null hypothesis at most 5 % of families have any rejection; unadjusted it would be 34 %."""
    p = np.random.default_rng(0).uniform(size=(2000, 8))
    rejected = np.mean([min(holm(row)) < 0.05 for row in p])
    assert abs(rejected - (1 - (1 - 0.05 / 8) ** 8)) < 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_results_are_means_over_seeds_tested_against_the_reference(read_study):
    _, groups = read_study
    table = results(groups, groups[2])
    for i, name in enumerate(("iwae", "piwae", "vae")):
        cell = table.cells[i]["log_px"]
        assert cell.mean == pytest.approx(np.mean(LOG_PX[name])) and cell.sd == pytest.approx(
            np.std(LOG_PX[name], ddof=1)
        )
        assert cell.n == len(LOG_PX[name])
    assert table.best["log_px"] == 1 and "active_units" not in table.best
    # kl_is_64 and active_units do not vary: five figures, two groups
    assert len(table.tests) == 10 and {i for i, _ in table.tests} == {0, 1}
    theirs = stats.ttest_ind(LOG_PX["piwae"], LOG_PX["vae"], equal_var=False)
    assert table.tests[1, "log_px"].welch.p == pytest.approx(theirs.pvalue)
    pairs = table.tests[1, "log_px"]  # piwae has one seed more
    assert pairs.pairs == 3
    assert pairs.paired == pytest.approx(stats.ttest_rel(LOG_PX["piwae"][:3], LOG_PX["vae"]).pvalue)
    p = [test.welch.p for test in table.tests.values()]
    assert [t.adjusted for t in table.tests.values()] == pytest.approx(holm(p))


def test_the_better_side_of_a_figure(tmp_path):
    groups = []
    for name, mean in (("low", 1.0), ("high", 2.0)):
        write(tmp_path / name, 0, steps=31, log_px=-mean, about={"kl_q_posterior": {"mean": mean, "se": 0.1}})
        groups += group([runs.read(tmp_path / name)])
    assert results(groups, groups[0]).best["kl_q_posterior"] == results(groups, groups[0]).best["log_px"] == 0


@pytest.mark.parametrize(
    ("about", "changed", "word"),
    [
        ({"binarization": "static"}, {}, "binarisation"),
        ({"data": "MNIST"}, {}, "by the data"),
        ({"particles": 100}, {}, "number of test particles"),
        ({"version": "9.9"}, {}, "version"),
        ({}, {"data__init_args__limit_train": 10}, "data.limit_train"),
        ({}, {"trainer__callbacks": []}, None),
    ],
)
def test_what_does_not_compare_is_warned_of(about, changed, word, tmp_path):
    write(tmp_path / "a", 0, steps=31)
    write(tmp_path / "b", 1, "vae", steps=31, about=about, **changed)
    found = [runs.read(tmp_path / "a"), runs.read(tmp_path / "b")]
    told = [w for w in warnings(group(found), found) if w.startswith("Not comparable")]
    assert len(told) == (word is not None) and (word is None or word in told[0])


def test_different_probes_are_warned_of(tmp_path):
    callbacks = config()["trainer"]["callbacks"]
    callbacks[1]["init_args"]["size"] = 5
    write(tmp_path / "a", 0, steps=31)
    write(tmp_path / "b", 0, steps=31, trainer__callbacks=callbacks)
    found = [runs.read(tmp_path / "a"), runs.read(tmp_path / "b")]
    told = "Not comparable, by the data in the probe of the SNR: 20 in a; 5 in b."
    assert warnings(group(found), found) == [told]


# --- curves ---------------------------------------------------------------------------------------------------


def curve(steps, values):
    return runs.Curve(np.array(steps, float), np.array(values, float))


def test_a_band_is_over_the_steps_that_all_seeds_have():
    band = curves.band([curve([0, 10, 20, 30], [1, 2, 3, 4]), curve([0, 10, 20], [3, 2, 1])], 100)
    assert band.steps.tolist() == [0, 10, 20] and band.mean.tolist() == [2, 2, 2]
    assert band.low.tolist() == [1, 2, 1] and band.high.tolist() == [3, 2, 3]
    assert not band.interpolated and band.averaged == 1


def test_seeds_that_logged_at_other_steps_are_interpolated_and_that_is_told():
    band = curves.band([curve([0, 10, 20, 30], [0, 1, 2, 3]), curve([5, 15, 25, 50], [10, 10, 10, 10])], 100)
    assert band.steps.tolist() == [10, 20, 30] or band.steps.tolist() == [5, 15, 25]
    assert band.low == pytest.approx(band.steps / 10) and band.high == pytest.approx([10, 10, 10])
    assert band.interpolated


def test_seeds_with_no_step_in_common_have_no_band():
    assert curves.band([curve([0, 10], [0, 1]), curve([20, 30], [0, 1])], 100) is None


def test_many_values_are_averaged_not_dropped():
    steps, values = np.arange(1000), np.random.default_rng(0).normal(size=1000)
    band = curves.band([curve(steps, values)], 100)
    assert band.averaged == 10 and band.mean == pytest.approx(values.reshape(100, 10).mean(1))
    assert band.steps == pytest.approx(steps.reshape(100, 10).mean(1))


def test_unfinished_runs_do_not_shorten_the_curves_of_finished_ones(read_study):
    _, groups = read_study
    short = runs.Run(groups[0].runs[0].path, curves={"val/elbo": curve([0, 1], [0, 1])})
    mixed = type(groups[0])("g", {}, [*groups[0].runs, short])
    assert curves.of_group(mixed, "val/elbo", 100).n == 3
    assert curves.of_group(type(mixed)("g", {}, [short]), "val/elbo", 100).n == 1


@pytest.mark.parametrize(("low", "high"), [(-24.31, -21.7), (0.0, 1.0), (1e-5, 3e-5), (-1e5, 1e5), (5.0, 5.001)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_inside(low, high, log):
    if log and low <= 0:
        low, high = 0.03, 2.0
    scale = curves.Scale(low, high, 0, 100, log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 11 and all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)
    assert scale(np.array([low, high])) == pytest.approx([0, 100])


# --- pictures -------------------------------------------------------------------------------------------------


def test_large_pictures_are_made_smaller_and_small_ones_kept(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (600, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.new("L", (40, 20)).save(tmp_path / "small.png")
    media, data, size = pictures.shrunk(tmp_path / "large.png")
    assert media == "image/webp" and size == (720, 288) and len(data) < (tmp_path / "large.png").stat().st_size / 4
    assert pictures.shrunk(tmp_path / "small.png") == ("image/png", (tmp_path / "small.png").read_bytes(), (40, 20))


@pytest.mark.parametrize("name", ["samples-000300", "samples_step=300", "samples", "samples-epoch-3-step-300"])
def test_kinds_of_pictures(name, tmp_path):
    assert pictures.kind(tmp_path / f"{name}.png") == "samples"


# --- the whole ------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "line", "circle", "rect", "path", "polygon", "polyline", "input", "hr", "link"}


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and whether all that were opened were closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def report(out, *args):
    main(["report", *map(str, args), "--out", str(out)])
    return (out / "report.html").read_text(), (out / "report.md").read_text()


@pytest.fixture(scope="module")
def pages(study, tmp_path_factory):
    return report(tmp_path_factory.mktemp("out"), study, "--reference", "vae", "--title", "Three objectives")


def test_the_page_needs_nothing_from_outside(pages):
    page = Page(pages[0])
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            address = attributes.get(name, "data:image/")
            assert not re.match(r"(?i)\s*(\w+:)?//|https?:|javascript:", address), (tag, address[:80])
            assert name != "src" or address.startswith("data:image/")
    assert not page.all("link") and not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|https?://|//cdn", pages[0])
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]


def test_the_page_can_be_read_without_seeing_it(pages):
    page = Page(pages[0])
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img")) and len(page.all("img")) == 3
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("svg")) == 7 + len(curves_of(page)) and all("scope" in th for th in page.all("th"))


def curves_of(page):
    return [a for a in page.all("figure") if a.get("class") == "panel"]


def test_the_page_has_each_curve_with_a_band_for_each_group(pages):
    page = Page(pages[0])
    assert len(curves_of(page)) == len(runs.CURVES)
    lines = [a for a in page.all("polyline") if a.get("class") == "l"]
    assert len(lines) == len(page.all("polygon")) == 3 * len(runs.CURVES)


def test_links_lead_to_the_files(pages, study, tmp_path):
    report(tmp_path, study)
    links = [a["href"] for a in Page((tmp_path / "report.html").read_text()).all("a")]
    assert len(links) == 23 and all((tmp_path / link).exists() for link in links)


def test_the_markdown_table_has_means_spreads_and_p_values(pages):
    text = pages[1]
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in text.split("##")[0].splitlines()
        if line.startswith("| ")
    }
    assert rows["group"][3] == "log p(x) (nats)" and rows["vae (reference)"][1] == "3"
    mean, sd = np.mean(LOG_PX["piwae"]), np.std(LOG_PX["piwae"], ddof=1)
    shown = f"**{mean:.2f} ± {sd:.2f}**; p ".replace("-", MINUS)
    assert rows["piwae"][3].startswith(shown) and rows["piwae"][3].endswith(r" \*")
    assert "; p" not in " ".join(rows["vae (reference)"])
    assert "Welch" in text and "all 10 tests" in text and "against that of vae" in text
    assert "`model.phi.particles`" in text


def test_the_markdown_is_one_table_to_each_heading(pages):
    for block in pages[1].split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_one_seed_shows_the_evaluations_own_error_and_no_p(tmp_path):
    for name in ("iwae", "vae"):
        write(tmp_path / name, 0, name, steps=31, log_px=-22.0 if name == "iwae" else -24.0)
    page, text = report(tmp_path, tmp_path)
    assert f"{MINUS}22.00 (± 0.20)" in text and f"{MINUS}22.00 (± 0.20)" in page
    assert "; p" not in text and ", p " not in re.sub(r"<script.*", "", page, flags=re.S).split("notes")[0]
    assert "standard error of the evaluation" in text and "they need two seeds" in text


DAMAGE = {
    "no config": ("config.yaml", None, "config.yaml is missing"),
    "broken yaml": ("config.yaml", b"a: [1,", "config.yaml is damaged"),
    "yaml that is no mapping": ("config.yaml", b"- 1\n", "expected keys and values"),
    "empty config": ("config.yaml", b"", "expected keys and values"),
    "yaml without end": ("config.yaml", b"a: &x [*x]\n", "config.yaml is damaged"),
    "binary config": ("config.yaml", b"\x00\xff\xfe", "config.yaml is damaged"),
    "a class without its arguments": ("config.yaml", b"a: {class_path: b, init_args: [1]}", "config.yaml is damaged"),
    "no metrics": ("metrics.csv", None, "metrics.csv is missing"),
    "empty metrics": ("metrics.csv", b"", "no column 'step'"),
    "head only": ("metrics.csv", b"step,val/elbo\n", "no rows"),
    "words for numbers": ("metrics.csv", b"step,val/elbo\n1,abc\n", "column val/elbo: could not convert"),
    "more fields than names": ("metrics.csv", b"step,val/elbo\n1,-3,5\n", "a line has more fields than the first"),
    "no step": ("metrics.csv", b"step,val/elbo\n,-3\n", "column val/elbo: could not convert"),
    "nul bytes": ("metrics.csv", b"step,val/elbo\n1,-3\n\x00\x00\x00\x00", None),
    "torn evaluation": ("evaluation.json", b'{"log_px": {"mean": -2', "evaluation.json is damaged"),
    "evaluation of one figure": ("evaluation.json", b'{"log_px": {"mean": -22.5, "se": 1}}', "iwae_64 is missing"),
    "figures that are none": ("evaluation.json", b'{"log_px": {"mean": "x"}, "ess": NaN}', "log_px is not finite: "),
    "evaluation as a list": ("evaluation.json", b"[]", "expected an object"),
    "a directory in its place": ("evaluation.json", "directory", "evaluation.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_listed_with_what_is_wrong(damage, tmp_path):
    name, content, told = DAMAGE[damage]
    for seed in (0, 1):
        write(tmp_path / f"good-{seed}", seed, steps=31, log_px=-22 - seed)
    bad = write(tmp_path / "good-2", 2, steps=31)
    (bad / name).unlink()
    if content == "directory":
        (bad / name).mkdir()
    elif content is not None:
        (bad / name).write_bytes(content)
    page, text = report(tmp_path / "out", tmp_path)
    Page(page)
    if told:
        assert told in page.replace("&#39;", "'") and "Unfinished or damaged" in text and "good-2" in text
    assert f"{MINUS}22.50 ± 0." in text or f"{MINUS}22.33 ± 0.58" in text


def test_runs_that_were_only_not_tested_are_counted_apart(tmp_path, capsys):
    for seed in range(3):
        write(tmp_path / f"good-{seed}", seed, steps=31)
    for seed in (1, 2):
        (tmp_path / f"good-{seed}/evaluation.json").unlink()
    (tmp_path / "good-2/metrics.csv").unlink()
    page, text = report(tmp_path / "out", tmp_path)
    told = capsys.readouterr().out
    assert "1 unfinished or damaged." in told and "\n1 not tested (no evaluation.json): run `test`, or" in told
    assert "1 unfinished or damaged run" in page and "1 not tested (no evaluation.json)" in page
    assert text.index("Unfinished or damaged") < text.index("good-2`:") < text.index("## 1 not tested")
    assert text.index("good-1`", text.index("## 1 not tested")) > 0


def test_no_damage_raises(tmp_path):
    """Files cut short, with bytes changed, or swapped: read and drawn all the same."""
    rng = np.random.default_rng(0)
    whole = write(tmp_path / "runs/whole", 0, steps=31)
    for i in range(60):
        path = write(tmp_path / f"runs/damaged-{i}", i, steps=31)
        target = path / runs.FILES[i % 3]
        content = bytearray((whole / runs.FILES[rng.integers(3)]).read_bytes() if i % 5 == 0 else target.read_bytes())
        for _ in range(rng.integers(6)):
            content[rng.integers(len(content))] = rng.integers(256)
        target.write_bytes(content[: rng.integers(len(content))] if i % 2 else content)
    page, _ = report(tmp_path, tmp_path / "runs")
    Page(page)


def test_a_damaged_picture_is_told_and_the_others_are_shown(tmp_path):
    run = write(tmp_path / "a", steps=31, picture=(50, 50))
    (run / "figures/torn.png").write_bytes((run / "figures/samples.png").read_bytes()[:60])
    page, _ = report(tmp_path, tmp_path)
    assert "torn.png is damaged" in page and len(Page(page).all("img")) == 1


def test_what_comes_from_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&|`x`"
    run = write(
        tmp_path / 'a<b>"&', 0, steps=31, about={"data": evil, evil: {"mean": 1.0, "se": 0.1}}, picture=(50, 50)
    )
    write(tmp_path / "c", 0, steps=31, model__network__init_args__note=evil)
    (run / "figures/samples.png").rename(run / "figures/<img src=x onerror=alert(1)>.png")
    page, text = report(tmp_path, tmp_path, "--title", evil)
    parsed = Page(page)
    assert len(parsed.all("script")) == 1 and len(parsed.all("img")) == 1 and "alert(1)" in "".join(parsed.texts[:10])
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert "<script>" not in text.replace(markdown.code(evil), "")


def test_a_figure_that_only_some_seeds_have_says_of_how_many(tmp_path):
    for seed in range(3):
        write(tmp_path / f"a-{seed}", seed, steps=31, log_px=-20 - seed)
    content = json.loads((tmp_path / "a-2/evaluation.json").read_text())
    (tmp_path / "a-2/evaluation.json").write_text(json.dumps(content | {"log_px": {"mean": -math.inf, "se": 1.0}}))
    page, text = report(tmp_path, tmp_path)
    assert (
        f"{MINUS}20.50 ± 0.71 (n=2)" in text and f"{MINUS}20.50 ± 0.71 (n=2)" in page and "log_px is not finite" in page
    )


def test_no_run_is_evaluated_yet(tmp_path):
    run = write(tmp_path / "a", steps=31)
    (run / "evaluation.json").unlink()
    page, _ = report(tmp_path, tmp_path)
    assert "None of the runs has been evaluated" in page and len(curves_of(Page(page))) == len(runs.CURVES)


def test_out_may_be_a_file(tmp_path, capsys):
    write(tmp_path / "a", steps=31)
    main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "deep/er/mine.html")])
    assert (tmp_path / "deep/er/mine.html").exists() and (tmp_path / "deep/er/mine.md").exists()
    assert "mine.html and" in capsys.readouterr().out


MISTAKES = {
    "nothing": ([], "RUN"),
    "no such run": (["{}/none"], "no such directory"),
    "no run in it": (["{}/empty"], "must hold config.yaml"),
    "a file": (["{}/a/config.yaml"], "no such directory"),
    "unknown reference": (["{}/a", "--reference", "b"], "--reference must be one of IWAE. Got b."),
    "abbreviated option": (["{}/a", "--ref", "a"], "--ref"),
    "unknown option": (["{}/a", "--colour", "red"], "--colour"),
    "out without value": (["{}/a", "--out"], "--out"),
    "out is a file": (["{}/a", "--out", "{}/a/config.yaml"], "--out must be"),
    "out below a file": (["{}/a", "--out", "{}/a/config.yaml/x"], "Not a directory"),
    "nothing readable": (["{}/broken"], "config.yaml is missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, tmp_path, capsys):
    args, message = MISTAKES[mistake]
    write(tmp_path / "a", steps=31)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "broken/x", steps=31)
    (tmp_path / "broken/x/config.yaml").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["report", *(arg.format(tmp_path) for arg in args)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_help_and_the_report_do_without_lightning(tmp_path):
    write(tmp_path / "a", steps=31)
    code = "import sys; from lightning_iwae.cli import main; main(sys.argv[1:]); print('lightning' in sys.modules)"
    command = [sys.executable, "-c", code, "report", str(tmp_path / "a"), "--out", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.endswith("False\n")
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("seeds", "steps"),
    [(6, 60), pytest.param(6, 10_000, marks=pytest.mark.slow), pytest.param(1, 10_000, marks=pytest.mark.slow)],
)
def test_three_hundred_runs(seeds, steps, tmp_path):
    """One or six seeds of each setting: a page of a few megabytes in seconds, with at most eight groups in colour."""
    first = write(tmp_path / "runs/trial-0", 0, picture=(900, 500), steps=steps)
    template = (first / "config.yaml").read_text()
    for i in range(300):
        path = tmp_path / f"runs/trial-{i}"
        (path / "figures").mkdir(parents=True, exist_ok=True)
        content = template.replace("seed_everything: 0", f"seed_everything: {i % seeds}")
        (path / "config.yaml").write_text(content.replace("batch_size: 100", f"batch_size: {1 + i // seeds}"))
        (path / "evaluation.json").write_text(json.dumps(evaluation(i % seeds, -22 - (i * 37 % 300) / 100)))
        for name in ("metrics.csv", "figures/samples.png") if i else ():
            (path / name).hardlink_to(first / name)
    start = time.process_time()
    page, text = report(tmp_path, tmp_path / "runs")
    assert time.process_time() - start < 20 and len(page) < 15e6
    parsed = Page(page)
    assert len(parsed.all("polyline")) == 300 // seeds * len(runs.CURVES)
    assert len(parsed.all("img")) == 8 and len([b for b in parsed.all("button") if "data-show" in b]) == 9
    assert len(re.findall(r"(?m)^\| batch", text)) == 2 * 300 // seeds
