"""Processes of tasks without the 5 s in which each imports torch: forked from one that has imported everything.

`python fork_server.py SOCKET` serves; `python fork_server.py SOCKET CALL` is the command that an executor starts: it
hands over its arguments, variables, working folder and streams, and ends as the forked process does.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def serve(path: str) -> None:
    """Fork a process for each connection, until standard input ends."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import packager.fleet.worker
    import packager.prove.evaluate
    import packager.prove.verify
    import packager.quantize.engines.native  # noqa: F401
    from packager.cli import task_process

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([sys.stdin, listener], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _be_the_child(connection, task_process.run_one_task)
            connection.close()


def _be_the_child(connection: socket.socket, work: Callable[[], None]) -> None:
    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    asked = json.loads(text)
    for target, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, target)
    os.environ.clear()
    os.environ.update(asked["environ"])
    os.chdir(asked["folder"])
    sys.argv = ["task_process", asked["call"]]
    if (watcher := os.fork()) == 0:  # ends this process with the command, and tells its number first
        connection.sendall(f"{os.getppid()}\n".encode())
        worker = os.getppid()
        connection.recv(1)
        os.kill(worker, signal.SIGKILL)
        os._exit(0)
    status = 1
    try:
        work()
        sys.stdout.flush()
        status = 0
    finally:
        sys.stderr.flush()
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
        connection.sendall(f"{status}\n".encode())
        os._exit(status)


def ask(path: str, call: str) -> int:
    """Run a call in a forked process, and end as it does."""
    asked = json.dumps({"call": call, "environ": dict(os.environ), "folder": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [asked], [1, 2])
        said = connection.makefile("r").read().split()
    if len(said) < 2:  # it was killed
        os.kill(os.getpid(), signal.SIGKILL)
    return int(said[1])


def main(arguments: Sequence[str]) -> int:
    """Serve, or ask."""
    if len(arguments) == 1:
        serve(arguments[0])
        return 0
    return ask(*arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
