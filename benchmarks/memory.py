"""Peak memory of a training step, each in a process of its own: `python -m benchmarks.memory WAY BATCH K`."""

import json
import subprocess
import sys
from pathlib import Path

from .plan import Plan
from .step import AGAINST_K, MAKERS, roomy
from .timing import Unavailable
from .ways import Work


def run(plan: Plan) -> list[dict]:
    """Of each way at each K."""
    work = [Work(min(plan.batches), K) for K in plan.memory]
    return [of_process(way, each) for way in AGAINST_K for each in work]


def of_process(way: str, work: Work) -> dict:
    """Bytes at the peak, and before the first step; or why there are none."""
    words = [sys.executable, "-m", "benchmarks.memory", way, str(work.batch), str(work.samples)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    what = {"way": way, "batch": work.batch, "samples": work.samples}
    if done.returncode:
        return what | {"skipped": f"the process ended with status {done.returncode}"}
    return what | json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """Of this process so far, in bytes."""
    if sys.platform == "linux":  # whose getrusage tells of the process that started this one too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(way: str, batch: str, samples: str) -> None:
    """Four steps, the first of which may do more than the others."""
    from lightning_iwae.cli import keep_freed_memory

    keep_freed_memory()
    try:
        step = roomy(MAKERS[way], Work(int(batch), int(samples)))
    except Unavailable as reason:
        print(json.dumps({"skipped": str(reason)}))
        return
    idle = peak()
    for _ in range(4):
        step()
    print(json.dumps({"idle": idle, "peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
