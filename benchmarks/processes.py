"""Run a command in its own process; measure its time and peak memory."""

import json
import os
import subprocess
import sys
from pathlib import Path


# A process inherits the peak memory of its parent, so a small process launches the command.
LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss * 1024, status]), file=sys.stderr)
"""


def measure(*command: str | os.PathLike[str] | int) -> tuple[float, int]:
    """
    Return the seconds and the peak resident memory in bytes of a command.

    Raises:
        RuntimeError: The command failed.
    """
    launch = [sys.executable, "-S", "-c", LAUNCHER, *(str(part) for part in command)]
    done = subprocess.run(launch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, peak, status = json.loads(done.stderr.splitlines()[-1])
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr}")
    return seconds, peak


def idle_bytes() -> int:
    """Return the peak resident memory in bytes of an idle Python interpreter."""
    return measure(sys.executable, "-c", "pass")[1]


SAILVIT: list[str | Path] = [sys.executable, "-m", "sailvit_cli"]
