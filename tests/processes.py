"""Several processes under torchrun, for tests; where one hangs, its stack is shown."""
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

LIMIT = 240  # seconds; the longest of these runs takes 40 on two busy cores


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def once(words, limit, **options):
    """(what subprocess.run returns, did it hang): after `limit` seconds workers tell their stack."""
    environ = options.pop("env", os.environ) | {"PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environ, **options)
    try:
        out, err, hung = *process.communicate(timeout=limit), False
    except subprocess.TimeoutExpired:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGABRT)  # faulthandler prints the stacks of all its threads
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        hung = True
    return subprocess.CompletedProcess(words, process.returncode, out, err), hung


def torchrun(*words, world=2, restarts=0, limit=LIMIT, **options):
    """Run words (a script, or a program after --no-python) as so many processes.

    Gloo on a loaded machine has been seen to wait for a message that never came, once in some
    hundred runs, and not again when it was looked for. A user stops such a run and starts it anew;
    so does this, once, and warns with the stacks.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(world), "--max-restarts", str(restarts), *map(str, words)]
    done, hung = once(start, limit, **options)
    if hung:
        warnings.warn(f"{world} processes hung for {limit} s, tried again:\n{done.stderr[-6000:]}")
        done, hung = once(start, limit, **options)
    assert not hung, f"{world} processes hung twice:\n{done.stderr[-6000:]}"
    return done
