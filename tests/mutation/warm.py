"""Runs pytest in forks of a process that has imported what takes longest to import, and nothing that may hold a fault.

A line of JSON in, from ``run.py``: the arguments of pytest, the environment, folder and file of its output, and how
many seconds it has. A line out: its exit status, minus the signal that ended it, or null where it took too long.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import hypothesis.strategies  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401


def run_tests(request: dict[str, Any]) -> None:
    """The rest of a fork's life."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = request["environment"]["PYTHONPATH"].split(os.pathsep)
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in os.environ
    try:
        status = int(pytest.main(request["arguments"]))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status if "status" in locals() else 3)


def wait(process: int, seconds: float) -> int | None:
    """Exit status of a fork, minus a signal; None where it had to be ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            run_tests(request)
        print(json.dumps(wait(process, request["seconds"])), flush=True)


if __name__ == "__main__":
    main()
