"""A sweep's worker whose fits take no time: `python -m tests.sweep_worker OPTIONS` is `lightning_iwae sweep OPTIONS`.

Without `--page` it leaves the report out.

As a launcher, `python -m tests.sweep_worker --fit`, it stands in for each fit. What it does is chosen by the key `kind`
of the space; `value` is its objective. It goes on from the rows that it finds, as a fit with --ckpt_path last does.
"""

import os
import signal
import sys
import time
from pathlib import Path

import yaml

SETTINGS = {"seed_everything": 0, "kind": "good", "value": 0, "model": {"samples": 8}}
STEPS, PAUSE = 5, 0.05


def fit(words):
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
    run = Path(given["trainer.default_root_dir"])
    run.mkdir(parents=True, exist_ok=True)
    kind = given.get("kind", "good")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(run / "starts.txt", "a") as file:
        print(os.getpid(), file=file)
    first_time = len((run / "starts.txt").read_text().split()) == 1
    pause = 30 if kind == "slow" and first_time else PAUSE
    if kind == "blind":
        (run / "metrics.csv").write_text("step,train/loss,val/ess,val/log_pz\n0,1.0,,\n3,,0.5,-2.0\n")
        return
    if kind == "short":
        (run / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
        return
    if kind == "mistake":
        sys.exit(print("error: model.phi.particles must divide samples. Got 3.", file=sys.stderr) or 2)
    if kind == "full" or (kind == "full once" and first_time):
        raise OSError(28, "No space left on device")
    metrics = run / "metrics.csv"
    if not metrics.exists():
        metrics.write_text("step,val/log_px,val/ess\n")
    for step in range(len(metrics.read_text().splitlines()) - 1, STEPS):
        value = float(given.get("value", 0)) + int(given.get("seed_everything", 0)) - (step - 3) ** 2
        with open(metrics, "a") as file:
            print(f"{step},{value},{step / 10}", file=file)
        if step == 1 and kind == "diverges":
            sys.exit(print("error: Step 1: the bound is not finite, by log p(x|z) in 3 of 9.", file=sys.stderr) or 1)
        if step == 2 and kind == "killed once" and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)


if __name__ == "__main__":
    if sys.argv[1] == "--fit":
        fit(sys.argv[2:])
    else:
        from lightning_iwae import cli
        from lightning_iwae.sweep import page, storage, worker

        worker.printed = lambda words: yaml.safe_dump(SETTINGS)
        worker.refused = lambda fits: None
        storage.PAUSE = 0.2
        if "--page" not in sys.argv:  # takes as long as all the rest
            page.write = lambda study, out: print(page.subtitle(page.table(study), study))
        cli.main(["sweep", *(word for word in sys.argv[1:] if word != "--page")])
