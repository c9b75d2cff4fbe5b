"""A process of two is lost, in every way that one machine can show: the other ends the run in time, with a message."""

import signal

import pytest

from ..test_ddp_command import SECONDS, assert_one_message, lose

pytestmark = pytest.mark.slow
TIMEOUT = 30


def test_the_first_is_killed(tmp_path):
    errors, _, seconds = lose(tmp_path / "run", 0, signal.SIGKILL)
    assert_one_message(errors, 1, tmp_path / "run")
    assert seconds < SECONDS


@pytest.mark.parametrize("rank", [0, 1])
def test_one_hangs(rank, tmp_path):
    errors, status, seconds = lose(tmp_path / "run", rank, signal.SIGSTOP, "--trainer.strategy.timeout", str(TIMEOUT))
    assert_one_message(errors, 1 - rank, tmp_path / "run")
    assert TIMEOUT / 2 < seconds < TIMEOUT + SECONDS
    assert status == (1 if rank else -signal.SIGKILL)  # the test's own
