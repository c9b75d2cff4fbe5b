"""The sub-commands `snr`, `claims` and `certify`: what they are asked, run on, write and print."""

import argparse
import csv
import inspect
import io
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from tqdm import tqdm

from .. import claims as post
from .. import laboratory, loading
from ..curves import snr_over_grid
from ..estimators import PHI, THETA
from ..figures import png, render
from ..laboratory import Row, Slope
from ..mistakes import Mistake, did_you_mean, nearest
from ..models import Batch, LinearGaussian, cut, split
from ..randomness import forked, seed_for
from ..sides import Side
from ..writing import replacing
from . import configs

DRAWS = 200
PHI_DEFAULT = "iwae,dreg,stl,vimco,wake,ciwae"
GRID = "1x1,1x4,1x16,1x64,1x256,1x1024,1x8,4x8,16x8,64x8"
OPTIONS: dict[str, Any] = {"beta": 0.05, "alpha": 0.5, "gamma": 0.0, "partition": 5}  # where none are given
ALL_OF_IT = 1024  # data sets up to this size are measured whole, of others 20 data


class Parser(argparse.ArgumentParser):
    """Mistakes become a `Mistake` instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """The command line says it, in one line."""
        raise Mistake(f"{self.prog.split()[-1]}: {message}")


def parser(command: str, description: str, out: str) -> Parser:
    """What both sub-commands take."""
    p = Parser(prog=f"lightning_iwae {command}", description=description, allow_abbrev=False)
    p.add_argument("-c", "--config", metavar="FILE", action="append", default=[], help="a run's YAML; more lie over it")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help=out)
    p.add_argument("--seed", type=int, help="of data, parameters and draws (default: the config's seed_everything)")
    p.add_argument(
        "--workers", metavar="N", type=int, help="processes; results do not depend on them (default: torch's threads)"
    )
    return p


def read(p: Parser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those with a dot in their name, which go to the config."""
    own, dotted, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name.startswith("--") and "." in name:
            dotted.append(word)
            if not equals and rest:
                dotted.append(rest.pop(0))
        else:
            own.append(word)
    given = p.parse_args(own)
    for name, least in (("draws", 8), ("workers", 1), ("data", 1)):
        if (value := getattr(given, name, None)) is not None and value < least:
            raise Mistake(f"--{name} must be at least {least}. Got {value}.")
    return given, [word for file in given.config for word in ("-c", file)] + dotted


# ------------------------------------------------------------------------------------------------ what is measured
def settings(words: list[str]) -> dict[str, Any]:
    """The merged config. Mistake for what can't be read, and for references that lead nowhere."""
    tree = configs.read(words).tree
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise Mistake(f"config: {' '.join(str(error).split())}") from error


def made(base: type, config: dict[str, Any], key: str, seed: int | None = None) -> Any:
    """The object that a config asks for at `key`."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise Mistake(f"{key} is missing: expected a class_path, as in conf/gaussian.yaml.")
    try:
        return loading.build(base, value, seed)
    except ValueError as error:
        raise Mistake(f"{key}: {error}") from error


def of_data(config: dict[str, Any], size: int | None, seed: int) -> Batch:
    """The first training data: all if they are few, else 20, or as many as asked for."""
    from lightning.pytorch import LightningDataModule

    data = made(LightningDataModule, config, "data", seed)
    data.prepare_data()
    data.setup("fit")
    if hasattr(data, "probe"):
        count = len(data.train)
        return data.probe(size or (count if count <= ALL_OF_IT else 20))
    return cut(next(iter(data.train_dataloader())), size or 20)


def subject(config: dict[str, Any], run: loading.Run | None, size: int | None, seed: int) -> tuple[Any, Batch, str]:
    """A model, its data, and which parameters it has: a run's, on the toy the paper's, else the initial ones."""
    if run is not None:
        return run.network, of_data(config, size, seed), f"those of {run.checkpoint}"
    model = made(nn.Module, config, "model.network")
    batch = of_data(config, size, seed)
    if isinstance(model, LinearGaussian):
        with forked(seed_for(seed, "near optimum"), torch.device("cpu")):
            model.near_optimum(split(batch)[0])
        return model, batch, "the optimum for the data + N(0, 0.01^2)"
    return model, batch, "untrained"


def sides(text: str, table: dict[str, Any], name: str) -> list[Side]:
    """`iwae,ciwae:beta=0.1` as estimators, with the option's default where one is needed and not given."""
    found = []
    for word in filter(None, text.split(",")):
        estimator, *given = word.split(":")
        options = dict(option.partition("=")[::2] for option in given)
        if unknown := set(options) - set(OPTIONS):
            raise Mistake(f"--{name}: unknown option {min(unknown)!r} of {estimator}: one of {', '.join(OPTIONS)}.")
        try:
            values = {o: type(OPTIONS[o])(v) for o, v in options.items()}
        except ValueError as error:
            raise Mistake(f"--{name}: {word} must be as ciwae:beta=0.05. {error}.") from error
        if estimator in table:
            wanted = [o for o in inspect.signature(table[estimator]).parameters if o in OPTIONS]
            values = {o: OPTIONS[o] for o in wanted} | values
        elif "." not in estimator:
            known = ", ".join(table)
            raise Mistake(
                f"--{name}: unknown estimator {estimator!r}: one of {known}.{did_you_mean(nearest(estimator, table))}"
            )
        side = Side(estimator, 2, **values)
        side.check(name, 2)
        found.append(side)
    return found


def grid(text: str) -> list[tuple[int, int]]:
    """`1x64,8x8` as (M, K)."""
    try:
        found = [tuple(map(int, word.split("x"))) for word in text.split(",")]
    except ValueError as error:
        raise Mistake(f"--grid must be MxK,MxK,... Got {text}.") from error
    if any(len(point) != 2 or min(point) < 1 for point in found):
        raise Mistake(f"--grid must be MxK,MxK,... of whole numbers from 1 on. Got {text}.")
    return found  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ measuring
LONG = 60  # seconds of one process, above which several are worth their start


def measured(
    model: Any, batch: Batch, sides: tuple[list[Side], list[Side]], points: list[tuple[int, int]], args: Any, seed: int
) -> list[Row]:
    """The laboratory's rows, with the cost said before and a progress bar; one thread a process."""
    size, threads = len(split(batch)[0]), torch.get_num_threads()
    samples = sum(M * K for M, K in points) * size * args.draws
    torch.set_num_threads(1)
    try:
        seconds = samples * seconds_a_sample(model, batch, sides, points)
        workers = args.workers or (threads if seconds > LONG else 1)
        processes = f"{workers} process{'es' * (workers > 1)}"
        print(f"{samples:.2e} samples: about {seconds / workers / 60:.1f} minutes with {processes}", flush=True)
        with tqdm(total=samples, unit="sample", unit_scale=True, mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
            drawn = laboratory.measure(
                model, batch, *sides, points, args.draws, seed, watch=bar.update, workers=workers
            )
            return list(drawn)
    finally:
        torch.set_num_threads(threads)


def seconds_a_sample(
    model: Any, batch: Batch, sides: tuple[list[Side], list[Side]], points: list[tuple[int, int]]
) -> float:
    """By one draw at the costliest (M, K), to throw away."""
    M, K = max(points, key=lambda point: point[0] * point[1])
    phi, theta = (laboratory.fitting(side, name, M, K) for side, name in zip(sides, ("phi", "theta"), strict=True))
    start = time.perf_counter()
    laboratory.draw_gradients(model, batch, phi, theta, M * K, ("cost",))
    return (time.perf_counter() - start) / (len(split(batch)[0]) * M * K)


# ------------------------------------------------------------------------------------------------ snr
def snr(words: Sequence[str]) -> None:
    """Measure, print, and write snr.csv, slopes.csv and snr.png."""
    p = parser(
        "snr", "Signal-to-noise of estimators' gradients at fixed parameters.", "gets snr.csv, slopes.csv, snr.png"
    )
    p.add_argument(
        "--ckpt_path", metavar="PATH", type=Path, help="a run's directory or checkpoint; its config and data"
    )
    p.add_argument(
        "--phi", default=PHI_DEFAULT, help=f"estimators of phi, as {PHI_DEFAULT}; options as ciwae:beta=0.05"
    )
    p.add_argument("--theta", default="iwae", help="estimators of theta (default: iwae)")
    p.add_argument("--grid", default=GRID, help=f"groups M and particles K (default: {GRID})")
    p.add_argument("--draws", type=int, default=DRAWS, help=f"gradients drawn at each (M, K) (default: {DRAWS})")
    p.add_argument("--data", type=int, metavar="N", help="training data taken (default: all up to 1024, else 20)")
    given, rest = read(p, words)
    if not given.config and given.ckpt_path is None:
        raise Mistake("snr needs a config, -c FILE, or a trained model, --ckpt_path PATH.")
    phi, theta, points = sides(given.phi, PHI, "phi"), sides(given.theta, THETA, "theta"), grid(given.grid)
    run = None if given.ckpt_path is None else loading.load(given.ckpt_path)
    config = settings(rest) if rest or run is None else run.config
    seed = given.seed if given.seed is not None else int(config.get("seed_everything") or 0)
    model, batch, parameters = subject(config, run, given.data, seed)
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{type(model).__name__} with parameters: {parameters}; {len(split(batch)[0])} data")
    for M, K in points:
        for side, wanted in (("phi", phi), ("theta", theta)):
            fit = [s.estimator for s in laboratory.fitting(wanted, side, M, K)]
            if left := [s.estimator for s in wanted if s.estimator not in fit]:
                print(f"left out at M = {M}, K = {K}: {side} {', '.join(left)}")
    rows = measured(model, batch, (phi, theta), points, given, seed)
    slopes = laboratory.slopes(rows)
    write(given.out / "snr.csv", Row, rows)
    write(given.out / "slopes.csv", Slope, slopes)
    with replacing(given.out / "snr.png") as file:
        file.write(png(render(snr_over_grid(rows, slopes))))
    print(table(rows), "\n", "\n".join(map(str, slopes)), sep="\n")
    print(f"\nSaved in {given.out}: snr.csv, slopes.csv, snr.png")


def write(path: Path, kind: type[Row | Slope], rows: Sequence[Row | Slope]) -> None:
    """A CSV of these rows, empty where a value is unknown."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in map(asdict, rows):
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def table(rows: Iterable[Row]) -> str:
    """SNR of each row, with its error, floor and theory."""
    head = f"{'side':6} {'estimator':18} {'M':>4} {'K':>5} {'SNR':>9} {'+-':>8} {'theory':>8} {'floor':>7} {'DSNR':>8}"
    lines = [
        f"{r.side:6} {r.estimator:18} {r.M:4} {r.K:5} {r.snr:9.4f} {r.standard_error:8.4f} "
        f"{'' if r.theory is None else f'{r.theory:.4f}':>8} {r.snr_floor:7.4f} {r.dsnr:8.3f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


# ------------------------------------------------------------------------------------------------ claims
CLAIMS_GRID = "1x1,1x4,1x16,1x64,1x256,1x8,4x8,16x8,64x8"


def claims(words: Sequence[str]) -> None:
    """Check every claim, print the table, write claims.json; exit status 1 if one fails."""
    p = parser("claims", "The post's claims, measured on the linear-Gaussian toy.", "gets claims.json")
    p.add_argument("--draws", type=int, default=DRAWS, help=f"gradients drawn at each (M, K) (default: {DRAWS})")
    given, rest = read(p, words)
    if not given.config:
        raise Mistake("claims needs a config of the linear-Gaussian toy: -c conf/gaussian.yaml.")
    config = settings(rest)
    seed = given.seed if given.seed is not None else int(config.get("seed_everything") or 0)
    model, batch, _ = subject(config, None, None, seed)
    if not isinstance(model, LinearGaussian):
        raise Mistake(
            f"claims: model.network must be a LinearGaussian, of which everything is known. Got {type(model).__name__}."
        )
    x = split(batch)[0]
    points = grid(CLAIMS_GRID)
    phi = sides("iwae,dreg,stl,vimco,wake", PHI, "phi")
    given.out.mkdir(parents=True, exist_ok=True)
    rows = measured(model, x, (phi, [Side("iwae")]), points, given, seed)
    by_setting = {(r.side, r.estimator, r.M, r.K): r for r in rows}
    bench = post.Bench(model, x, by_setting, seed, given.draws / DRAWS, given.workers or torch.get_num_threads())
    found = []
    for claim, finding in post.check(post.CLAIMS, bench):
        verdict = "holds" if finding.holds else "FAILS"
        told = {"claim": claim.name, "says": claim.says, "expected": claim.expected, "measured": finding.measured}
        found.append(told | {"verdict": verdict, "values": finding.values})
        print(f"{verdict}  {claim.name}: {claim.says}", f"expected: {claim.expected}", sep="\n       ")
        print(f"       measured: {finding.measured}", flush=True)
    print("not run, as they need MNIST: " + "; ".join(post.NEED_MNIST))
    failed = [f["claim"] for f in found if f["verdict"] == "FAILS"]
    with replacing(given.out / "claims.json") as file:
        file.write((json.dumps({"claims": found, "failed": failed, "seed": seed}, indent=2) + "\n").encode())
    print(f"\n{len(found) - len(failed)} of {len(found)} claims hold. Saved as {given.out / 'claims.json'}")
    if failed:
        sys.exit(1)


# ------------------------------------------------------------------------------------------------ certify
def certify(words: Sequence[str]) -> None:
    """Certify every estimator and write the page; or one of the user's own, and say what it passes."""
    from ..certification.certificates import REPLICATES, certificates, of_own
    from ..certification.page import page

    p = Parser(prog="lightning_iwae certify", description="Check every estimator's expectation.", allow_abbrev=False)
    p.add_argument("--out", metavar="FILE", type=Path, help="gets the page, as docs/estimators.md")
    p.add_argument("--replicates", type=int, default=REPLICATES, help=f"of the z-scores (default: {REPLICATES:,})")
    p.add_argument("--estimator", metavar="MODULE.FUNCTION", help="phi estimator of your own, in place of all")
    p.add_argument("--of", metavar="NAME", default="iwae", help="row whose expectation it claims (default: iwae)")
    given = p.parse_args(list(words))
    if given.estimator is None:
        checked = certificates(given.replicates)
    else:
        checked = iter([of_own(given.estimator, given.of, given.replicates)])
    found = []
    for certificate in checked:
        found.append(certificate)
        print(certificate, flush=True)
    if given.out is not None:
        with replacing(given.out) as file:
            file.write(page(found, given.replicates).encode())
        print(f"Saved as {given.out}")
    if any(certificate.problems for certificate in found):
        sys.exit(1)
