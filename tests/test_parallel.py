"""Workers: results in order, whatever their number; none is left behind by a parent that is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_iwae.parallel import Workers

ROOT = Path(__file__).parents[1]


def with_pid(offset, value):
    return offset + value, os.getpid()


@pytest.mark.parametrize("count", [1, 3])
def test_results_are_in_the_order_of_the_tasks_and_the_first_is_ones_own(count):
    with Workers(with_pid, (100,), count) as pool:
        for _ in range(2):
            values, pids = zip(*pool.map((i,) for i in range(20)), strict=True)
            assert values == tuple(range(100, 120)) and pids[0] == os.getpid()
            assert (os.getpid() in pids[1:]) == (count == 1)


PARENT = """
import os, signal
from lightning_iwae.parallel import Workers
if __name__ == "__main__":
    with Workers(os.getppid, (), 2) as pool:
        list(pool.map([()] * 20))
        print(*pool._pool._processes)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    out = tmp_path / "out"
    with open(out, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        killed = subprocess.run([sys.executable, tmp_path / "parent.py"], stdout=file, env=environment, timeout=120)
    assert killed.returncode == -9
    pids = [int(word) for word in out.read_text().split()]
    assert len(pids) == 2
    for _ in range(100):
        if not any(map(alive, pids)):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {list(filter(alive, pids))}")


def alive(pid):
    """Running, and not a zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
