"""The search space and a sweep's YAML: what they mean, and what is refused."""

import itertools
import re

import optuna
import pytest
import yaml

from lightning_iwae.mistakes import Mistake
from lightning_iwae.sweep import settings, space

from .test_cli import ROOT

BASE = {"model.samples": 64, "model.phi.estimator": "iwae", "model.network": "x"}
CONDITIONAL = {
    "model.samples": [4, 6],
    "model.phi.particles": {"divisors_of": "model.samples"},
    "model.phi.estimator": ["iwae", "ciwae"],
    "model.phi.beta": {"low": 0.0, "high": 1.0, "step": 0.5, "when": {"model.phi.estimator": "ciwae"}},
}


def by_hand():
    """The grid of CONDITIONAL, written out."""
    for samples, estimator in itertools.product([4, 6], ["iwae", "ciwae"]):
        for particles in {4: [1, 2, 4], 6: [1, 2, 3, 6]}[samples]:
            for beta in [0.0, 0.5, 1.0] if estimator == "ciwae" else [None]:
                yield samples, particles, estimator, beta


def key(point):
    return tuple(point.get(name) for name in CONDITIONAL)


def test_a_grid_has_every_point_once():
    points = [point for point, _ in space.read(CONDITIONAL, BASE).points(BASE)]
    assert sorted(map(key, points), key=str) == sorted(by_hand(), key=str)
    assert all(("model.phi.beta" in point) == (point["model.phi.estimator"] == "ciwae") for point in points)


def test_the_studys_parameters_of_a_grids_point_lead_back_to_it():
    study = optuna.create_study()
    read = space.read(CONDITIONAL, BASE)
    for point, names in read.points(BASE):
        study.enqueue_trial(names)
        trial = study.ask()
        assert read.suggest(trial, BASE) == point
        study.tell(trial, 0.0)


def test_a_sampler_stays_in_the_space_and_reaches_all_of_it():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    read, seen = space.read(CONDITIONAL, BASE), set()
    for _ in range(400):
        trial = study.ask()
        seen.add(key(read.suggest(trial, BASE)))
        study.tell(trial, 0.0)
    assert seen == set(by_hand())


def test_ranges():
    read = space.read({"a": {"low": 1, "high": 9, "step": 4}, "b": {"low": 1e-4, "high": 1.0, "log": True}}, BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [read.suggest(study.ask(), BASE) for _ in range(300)]
    assert {p["a"] for p in points} == {1, 5, 9} and all(type(p["a"]) is int for p in points)
    below = sum(p["b"] < 1e-2 for p in points)
    assert 110 < below < 190  # half of them, on a logarithmic scale


def test_divisors_of_a_setting_of_the_config_keep_the_keys_name():
    (p,) = space.read({"model.phi.particles": {"divisors_of": "model.samples"}}, BASE).parameters
    assert p.name(BASE) == "model.phi.particles" and p.finite(BASE) == [1, 2, 4, 8, 16, 32, 64]


def test_lists_and_mappings_may_be_chosen():
    read = space.read({"model.network.init_args.hidden": [[10], [20, 20]]}, BASE)
    points = list(read.points(BASE))
    assert [p["model.network.init_args.hidden"] for p, _ in points] == [[10], [20, 20]]
    study = optuna.create_study()
    study.enqueue_trial(points[1][1])
    assert read.suggest(study.ask(), BASE) == points[1][0]


def test_a_range_with_a_fractional_step():
    read = space.read({"a": {"low": 0, "high": 1, "step": 0.25}}, {})
    assert [point["a"] for point, _ in read.points({})] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_condition_on_a_conditional_key_is_tried_too():
    spec = {"a": ["x", "y"], "b": {"choices": [1, 2], "when": {"a": "y"}}, "c": {"choices": [7], "when": {"b": 2}}}
    read = space.read(spec, {})
    assert read.first({}, read.parameters[2]) == {"a": "y", "b": 2, "c": 7}
    assert space.read({"a": {"low": 0, "high": 2**62}}, {}).first({}) == {"a": 0}


def test_the_points_that_are_tried_first_set_every_key():
    read = space.read(CONDITIONAL, BASE)
    for p in read.parameters:
        assert p.key in read.first(BASE, p)


@pytest.mark.parametrize(
    "when",
    [
        {"model.phi.estimator": ["ciwae", "iwae"]},  # of the config
        {"n": 12},
        {"k": 0.75},
        {"d": 3},
        {"e": 3},
        {"m": 7},
        {"beta": None},  # not chosen with iwae
    ],
)
def test_a_condition_that_may_hold_is_accepted(when):
    spec = {
        "n": {"low": 8, "high": 16, "step": 4},
        "k": {"low": 0.0, "high": 1.0, "step": 0.25},
        "d": {"divisors_of": "n"},
        "e": {"divisors_of": "d"},
        "range": {"low": 10, "high": 15},
        "m": {"divisors_of": "range"},
        "beta": {"choices": [0.5], "when": {"n": 8}},
    }
    space.read(spec | {"b": {"choices": [1], "when": when}}, BASE | {"beta": None})


def test_every_choice_of_every_list_is_rehearsed_in_few_points():
    spec = CONDITIONAL | {"rate": {"low": 1.0e-4, "high": 1.0e-2, "log": True}, "config": ["x", "y", None]}
    points = space.read(spec, BASE).rehearsal(BASE)
    taken = {key: [p[key] for p in points if key in p] for key in spec}
    assert set(taken["model.samples"]) == {4, 6} and set(taken["model.phi.estimator"]) == {"iwae", "ciwae"}
    assert set(taken["model.phi.beta"]) == {0.0, 1.0} and set(taken["rate"]) == {1.0e-4, 1.0e-2}
    assert set(taken["config"]) == {"x", "y", None} and set(taken["model.phi.particles"]) == {4, 6}
    assert len(points) <= 4


def test_no_point_is_rehearsed_that_is_not_in_the_space():
    spec = {"n": [16, 12], "k": {"divisors_of": "n"}, "beta": {"choices": [1.0], "when": {"k": 3}}}
    points = space.read(spec, {}).rehearsal({})
    assert {p["n"] for p in points} == {12, 16} and all(p["n"] % p["k"] == 0 for p in points)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({}, "space must map dotted keys"),
        ({"a": 3}, "space.a must be a list of choices, {low, high} or {divisors_of}. Got 3"),
        ({"a": []}, "space.a.choices must be a list of numbers, words, null"),
        ({"a": [float("nan")]}, "space.a.choices must be a list of numbers, words, null"),
        ({"a": [{1: 2}]}, "space.a.choices must be a list of numbers, words, null"),
        ({"seed_everything": [1, 2]}, "space.seed_everything: seeds are not chosen"),
        ({"config": [5]}, "space.config must be a list of config files, or null for none"),
        (
            {"a": [1, "x"], "b": {"divisors_of": "a"}},
            "b.divisors_of: a must be a whole number from 1 on. Got 'x'",
        ),
        (
            {"a": {"low": 0, "high": 4}, "b": {"divisors_of": "a"}},
            "must be a whole number from 1 on. Got a range from 0",
        ),
        ({"a": [1], "b": {"choices": [1], "when": {"a": 2}}}, "space.b.when: a must be one of its choices. Got 2"),
        ({"a": [1], "b": {"choices": [1], "when": {"a": []}}}, "space.b.when must be {key: value}"),
        (
            {"b": {"choices": [1], "when": {"model.phi.estimator": ["ciwae", "x"]}}},
            "space.b.when: model.phi.estimator is 'iwae' in the config, and is not chosen. Got 'ciwae', 'x'.",
        ),
        (
            {"a": {"low": 8, "high": 16}, "b": {"choices": [1], "when": {"a": 64}}},
            "space.b.when: a must be from 8 to 16. Got 64.",
        ),
        (
            {"a": {"low": 8, "high": 16, "step": 4}, "b": {"choices": [1], "when": {"a": 10}}},
            "space.b.when: a must be from 8 to 16 in steps of 4. Got 10.",
        ),
        (
            {"a": {"low": 0.0, "high": 1.0}, "b": {"choices": [1], "when": {"a": 0.5}}},
            "space.b.when: a must be a list, or have a step, to be compared with a value. Got 0.5.",
        ),
        (
            {"a": {"divisors_of": 64}, "b": {"choices": [1], "when": {"a": 7}}},
            "space.b.when: a must be a divisor of 64. Got 7.",
        ),
        (
            {"s": [12, 64], "a": {"divisors_of": "s"}, "b": {"choices": [1], "when": {"a": 7}}},
            "space.b.when: a must be a divisor of s. Got 7.",
        ),
        (
            {"s": {"low": 8, "high": 13}, "a": {"divisors_of": "s"}, "b": {"choices": [1], "when": {"a": 7}}},
            "space.b.when: a must be a divisor of s. Got 7.",
        ),
        (
            {
                "model.phi.beta": {"low": 0.0, "high": 1.0, "when": {"model.phi.estimator": "ciwae"}},
                "model.phi.estimator": ["iwae", "ciwae"],
            },
            "space.model.phi.beta.when: model.phi.estimator must stand above it in the space.",
        ),
        (
            {"a": {"divisors_of": "model.samples"}, "model.samples": [12, 64]},
            "space.a.divisors_of: model.samples must stand above it in the space.",
        ),
        (
            {"k": [0, 1], "a": {"choices": [4], "when": {"k": 1}}, "b": {"divisors_of": "a"}},
            "space.b must have the `when` of a, of which it is a divisor",
        ),
        ({"a": {"low": 1}}, "space.a must have choices, low and high (and log or step), or divisors_of. Got low"),
        ({"a": {"low": 1, "high": 2, "logg": True}}, "space.a: unknown key 'logg'. Did you mean log?"),
        ({"a": {"low": "1e-4", "high": 1.0}}, "space.a.low must be a number. Got '1e-4'. Write 0.0001"),
        ({"a": {"low": 2, "high": 1}}, "space.a: low must be less than high. Got 2 and 1"),
        ({"a": {"low": 0.0, "high": 1.0, "log": True}}, "space.a: low must be positive with log. Got 0.0"),
        ({"a": {"low": 0.0, "high": 1.0, "log": 1}}, "space.a.log must be true or false. Got 1"),
        ({"a": {"low": 0, "high": 1, "step": 0}}, "space.a.step must be a positive number. Got 0"),
        ({"a": {"divisors_of": "model.sample"}}, "space.a.divisors_of: 'model.sample' must be a key of the space"),
        ({"a": {"divisors_of": "model.sample"}}, "Did you mean model.samples?"),
        ({"a": {"divisors_of": "model.network"}}, "model.network must be a whole number from 1 on. Got 'x'"),
        (
            {"a": {"choices": [1], "when": {"b": 1}}, "b": [1]},
            "space.a.when: b must stand above it in the space.",
        ),
        ({"a": {"choices": [1], "when": {"b": 1}}}, "space.a.when: 'b' must be a key of the space"),
        ({"a": {"choices": [1], "when": 1}}, "space.a.when must be {key: value} or {key: [values]}. Got 1"),
    ],
)
def test_a_wrong_space_is_refused_by_name(spec, told):
    with pytest.raises(Mistake) as caught:
        space.read(spec, BASE)
    assert told in str(caught.value)


def test_a_grid_over_a_range_without_steps_is_refused():
    with pytest.raises(Mistake, match=r"space\.a must be a list, or have a step, for sampler: grid"):
        list(space.read({"a": {"low": 0.0, "high": 1.0}}, BASE).points(BASE))


# ------------------------------------------------------------------------------------------------ the YAML
GOOD = {"study": "s", "configs": ["conf/digits.yaml"], "space": {"a": [1, 2]}, "trials": 3}


def test_defaults():
    sweep = settings.parsed(dict(GOOD))
    assert sweep.objectives == {"val/log_px": "maximize"} and not sweep.grid
    assert isinstance(sweep.make_sampler(3), optuna.samplers.TPESampler)
    assert isinstance(sweep.make_pruner(), optuna.pruners.NopPruner)


def test_samplers_are_seeded_trial_by_trial():
    sweep = settings.parsed(GOOD | {"sampler": "RandomSampler"})
    draws = []
    for seed in (1, 1, 2):
        study = optuna.create_study(sampler=sweep.make_sampler(seed))
        draws.append(study.ask().suggest_float("x", 0, 1))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trails": 3}, "unknown key 'trails'. Did you mean trials?"),
        ({"study": "a b"}, "study must be a name of letters, digits, . _ - that does not begin with a dot. Got 'a b'"),
        ({"study": ".."}, "study must be a name of letters"),
        ({"options": {"a": float("nan")}}, "options must be a mapping of dotted keys to plain values"),
        ({"trials": 0}, "trials must be a whole number from 1 on. Got 0"),
        ({"trials": True}, "trials must be a whole number from 1 on. Got true"),
        ({"configs": "conf/digits.yaml"}, "configs must be a list of config files"),
        (
            {"objective": "train/bound_theta"},
            "'train/bound_theta' must be a validation metric. A",
        ),
        ({"objective": {"val/ess": "up"}}, "objective.val/ess must be maximize or minimize. Got 'up'"),
        ({"sampler": "TPE"}, "sampler.class_path: no class 'TPE' is known"),
        ({"sampler": {"class_path": "TPESampler", "init_args": {"n_start": 1}}}, "sampler: TPESampler: "),
        ({"sampler": {"class": "TPESampler"}}, "sampler must be a class_path, or {class_path, init_args}"),
        ({"sampler": "MedianPruner"}, "sampler.class_path: "),
        ({"sampler": "grid"}, "trials must be left out with sampler: grid"),
        ({"pruner": "MedianPrunner"}, "pruner.class_path: no class 'MedianPrunner' is known. Did you mean"),
        (
            {"pruner": "MedianPruner", "objective": {"val/log_px": "maximize", "val/ess": "maximize"}},
            "pruner must be null with several objectives",
        ),
        ({"budget": {"step": 3}}, "budget must be {steps: N} or {seconds: S}"),
        ({"budget": {"steps": 3.5}}, "budget must be {steps: N} or {seconds: S}"),
        ({"grace": 5}, "grace must be at least twice the heartbeat (10.0 s). Got 5"),
        ({"retries": -1}, "retries must be a whole number from 0 on. Got -1"),
        ({"evaluate": "yes"}, "evaluate must be true or false. Got 'yes'"),
        ({"launcher": ["nice", 1.5]}, "launcher must be a list of words. Got a list (['nice', 1.5])"),
        ({"sampler": "tpee"}, "no class 'tpee' is known. Did you mean optuna.samplers.TPESampler?"),
    ],
)
def test_a_wrong_yaml_is_refused_by_file_and_key(change, told, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(Mistake) as caught:
        settings.read(str(path))
    assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)


@pytest.mark.parametrize("key", ["study", "configs", "space", "trials"])
def test_what_is_missing_is_named(key):
    with pytest.raises(Mistake, match=f"{key} is missing: expected "):
        settings.parsed({k: v for k, v in GOOD.items() if k != key})


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    (tmp_path / "twice.yaml").write_text("study: a\nspace:\n  a: [1]\n  a: [2]\n")
    (tmp_path / "empty.yaml").write_text("")
    for name, told in (
        ("none.yaml", "no such file"),
        ("bad.yaml", "line 2: not valid YAML"),
        ("twice.yaml", r"twice\.yaml, line 4: space\.a is given twice, first on line 3"),
        ("empty.yaml", r"is empty: expected a mapping of keys \(study, configs, space, \.\.\.\)"),
    ):
        with pytest.raises(Mistake, match=told):
            settings.read(str(tmp_path / name))


def test_the_configs_of_other_commands_are_told_from_a_sweeps(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Mistake, match=r"conf/digits\.yaml is a fit's config \(it has data\), not a sweep's"):
        settings.read("conf/digits.yaml")
    with pytest.raises(Mistake, match=r"sweeps/wandb\.yaml is a W&B sweep, not one by Optuna: `wandb sweep "):
        settings.read("sweeps/wandb.yaml")


def test_a_launcher_may_have_numbers_as_the_docs_say():
    (shown,) = re.findall(r"words before the command of each fit: `(\[.*?\])`", (ROOT / "docs/sweeps.md").read_text())
    assert settings.parsed(GOOD | {"launcher": yaml.safe_load(shown)}).launcher == ("nice", "-n", "10")


def test_the_sweep_that_the_docs_show_is_one_and_every_key_is_explained():
    page = (ROOT / "docs/sweeps.md").read_text()
    (block,) = re.findall(r"```\n(study:.*?)```", page, re.S)
    sweep = settings.parsed(yaml.safe_load(block))
    read = sweep.space_over({"model.samples": 64})
    assert [p.form for p in read.parameters].count("divisors") == 2 and len(read.parameters) == 8
    for key in set(settings.CHECKS) - {"study", "configs", "options", "space"}:
        assert f"`{key}`" in page, key


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_the_search_spaces_of_the_repository_are_read(path):
    if path.name != "wandb.yaml":
        sweep = settings.read(str(path))
        assert all((ROOT / file).is_file() for file in sweep.configs)
        assert sweep.space_over({"model.samples": 64}).parameters
