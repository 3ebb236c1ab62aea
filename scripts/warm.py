"""Python programs that start warm: in forks of one process that has imported what they need.

Started cold, each notebook spends six seconds of a core on imports before its first line runs. A
fork has the modules in a few hundredths of a second, and nothing else: the process that forks runs
no code of the project, draws no random number and starts no thread. That is for Linux alone, where
forking is safe after these imports; elsewhere every program starts cold, as it always did.
"""
from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

COLD = 2  # so many programs start cold: for few of them all those imports do not pay
SERVER = "import sys; sys.path[0] = sys.argv[1]; import warm; del sys.path[0]; warm.serve()"
spare: Spare | None = None  # in a forked program: a process that may become its kernel


class Starter:
    """Runs `python -c CODE ARGS` for several threads at a time, warm from the third one on."""

    def __init__(self, *modules: str, env: dict[str, str]) -> None:
        self.modules, self.env, self.started = modules, env, 0
        self.door, self.lock = None, threading.Lock()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *error: object) -> None:
        if self.door:
            self.door.close()
            self.server.wait()

    def __call__(self, code: str, *args: object) -> subprocess.CompletedProcess:
        """What it printed, errors too, is in `stdout`; a `returncode` below 0 is a signal."""
        argv, mine = [code, *map(str, args)], None
        with self.lock:
            self.started += 1
            if self.started > COLD and sys.platform == "linux":
                with contextlib.suppress(OSError):  # if the process that forks is gone: cold
                    mine = self.fork(argv)
        if mine is None:
            return self.cold(*argv)
        with mine, mine.makefile("rb") as lines:
            said, end, ended = lines.read().decode(errors="replace").rpartition("\0")
        return subprocess.CompletedProcess(argv, int(ended) if end else -signal.SIGKILL,
                                           said if end else ended)

    def cold(self, code: str, *args: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=self.env,
                              text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)

    def fork(self, argv: list[str]) -> socket.socket:
        """Have it forked; its output comes from the socket, and last a zero and how it ended."""
        if self.door is None:
            self.door, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with its:
                self.server = subprocess.Popen(
                    [sys.executable, "-c", SERVER, Path(__file__).parent, str(its.fileno()),
                     *self.modules],
                    env=self.env, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()])
        mine, its = socket.socketpair()
        with its:
            socket.send_fds(self.door, [json.dumps(argv).encode()], [its.fileno()])
        return mine


# ---------------------------------------------------------------- in the process that forks

def serve() -> None:
    """Import, then fork for each message; a fork returns from here only at its end."""
    door = socket.socket(fileno=int(sys.argv[2]))
    for module in sys.argv[3:]:
        try:
            importlib.import_module(module)
        except ImportError:  # who needs it will say so
            pass
    gc.freeze()  # what every fork shares is neither walked by its collector nor copied for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the watchers ended
    while True:
        message, fds, *_ = socket.recv_fds(door, 1 << 20, 1)
        if not message:  # whoever started this has ended
            return
        if not os.fork():
            door.close()
            watch(json.loads(message), fds[0])
            return
        os.close(fds[0])


def watch(argv: list[str], out: int) -> None:
    """Run a program in a fork of its own and say in `out` how it ended."""
    global spare
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(out, b"\0%d" % code)
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    if "ipykernel.kernelapp" in sys.modules:
        spare = Spare()
    code, *args = argv
    sys.argv, sys.path[:0] = ["-c", *args], [""]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Spare:
    """A fork that waits until it is to be a kernel: for jupyter_client it is a process."""

    stdin = stdout = stderr = returncode = None

    def __init__(self) -> None:
        read, self.pipe = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            sys.exit(be_kernel(read))
        os.close(read)
        os.setpgid(self.pid, self.pid)  # a group of its own: signals to it reach nobody else

    def launch(self, cmd: list[str], env: dict, cwd: str, stderr: int, **unused: object) -> Spare:
        """In the place of `jupyter_client.launcher.launch_kernel`."""
        with open(self.pipe, "w") as pipe:
            json.dump([cmd, env, cwd, stderr], pipe)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def be_kernel(read: int) -> None:
    """Wait for the word, then be what `python -m ipykernel_launcher` would be."""
    with open(read) as pipe:
        word = pipe.read()
    if not word:  # the program ended without one
        return
    cmd, env, cwd, stderr = json.loads(word)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    if stderr == subprocess.DEVNULL:
        os.dup2(nothing, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [*cmd[cmd.index("ipykernel_launcher"):],  # it ends with the program, as always
                f"--IPKernelApp.parent_handle={os.getppid()}"]
    if "pandas" in sys.modules:  # it asked too early whether a kernel will show its tables
        sys.modules["pandas"].set_option("display.max_columns", 20)
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
