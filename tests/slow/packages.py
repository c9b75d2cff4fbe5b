"""Programs that a slow test needs, from Debian's packages."""

import os
import shutil
import subprocess

import pytest


def need(program, *packages):
    """Skip the test, with the reason, unless `program` is there or can be installed."""
    if shutil.which(program):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{program} is not installed, and installing it needs apt-get and root")
    lock = ("-o", "DPkg::Lock::Timeout=300")  # another test may be installing something
    for words in (["update", "-qq"], [*lock, "install", "-y", "-qq", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{program} is not installed, and apt-get could not: {done.stderr[-300:]}")
