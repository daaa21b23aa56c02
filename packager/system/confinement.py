"""Confined processes: no network, no other process, and only those files that they need.

A confined process sees the system's programs and libraries, what a `View` names, and a private home. The kernel's
namespaces do that, for all that the process starts as well. Two programs set them up: bubblewrap (bwrap), or else
util-linux (unshare, mount, pivot_root, setpriv). A machine may allow neither: then a process is not confined.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packager.receipt import Confinement
from packager.system.scratch import ScratchFolder

# Not /etc, /home, /opt, /run, /srv, /tmp or /var: they hold tokens, sockets of agents and of Docker, users' files.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store", "/sys")
_SETTINGS = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "alternatives",
    "passwd",
    "group",
    "nsswitch.conf",
    "localtime",
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
# nvidia0, nvidiactl, nvidia-uvm and the like; dxg is the GPU of WSL.
_GPU_DEVICES = ("nvidia*", "dxg")
_STREAMS = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}  # in /proc/self
_LOCALE = frozenset(("LANG", "LC_ALL", "LC_CTYPE", "TZ"))
_TRIAL_TIMEOUT_S = 20.0

# Arguments: the new root, an empty folder; then three for each mount (how, source, target); "--"; the command.
_NAMESPACES_SCRIPT = """
set -eu
path=$PATH
PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=$1; shift
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root"
while [ "$1" != -- ]; do
  target=$root$3
  case $1 in
    link) mkdir -p "${target%/*}"; ln -s "$2" "$target" ;;
    proc) mkdir -p "$target"; mount -t proc proc "$target" ;;
    folder) mkdir -p "$target" ;;
    *)
      if [ -d "$2" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; [ -e "$target" ] || : > "$target"; fi
      mount --rbind "$2" "$target"
      if [ "$1" = read ]; then mount -o remount,bind,ro "$target"; fi ;;
  esac
  shift 3
done
shift
cd "$root"
pivot_root . .
umount -l .
cd "$1"; shift
setpriv=$(command -v setpriv)
PATH=$path
exec "$setpriv" --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all -- "$@"
"""


@dataclass(frozen=True, kw_only=True)
class View:
    """The files that a confined process sees beside the system's programs and libraries.

    Attributes:
        folder: from `private_folder`; its home is the process's home and folder for temporary files.
        readable: files and folders, seen under the same paths; those that do not exist are left out.
        writable: likewise.
        working: the working directory, one of the above.
        gpu: whether the process sees NVIDIA's devices.
    """

    folder: Path
    readable: Collection[Path] = ()
    writable: Collection[Path] = ()
    working: Path | None = None
    gpu: bool = False


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new folder for one process, with an empty `home`, and remove it afterwards.

    It is made in the system's folder for temporary files: the paths of sockets in it may have 107 bytes.
    """
    with ScratchFolder("private") as scratch:
        folder = scratch.path
        for part in ("home", "root"):
            (folder / part).mkdir()
        yield folder


def child_environ(environ: Mapping[str, str], allowed: Collection[str], folder: Path) -> dict[str, str]:
    """Return the environment of a child process: its locale, what is allowed, and an empty home.

    Of LD_LIBRARY_PATH that is the interpreter's own folder: GitHub's builds of Python start only with it.

    Args:
        environ: of this process.
        allowed: names of variables; nothing else of `environ` is passed on.
        folder: from `private_folder`.
    """
    kept = {name: text for name, text in environ.items() if name in _LOCALE or name in allowed}
    home = str(folder / "home")
    libraries = [path for path in library_folders(environ) if path.is_relative_to(sys.base_prefix)]
    found = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))} if libraries else {}
    return {"PATH": os.defpath, **found, **kept, "HOME": home, "TMPDIR": home}


def library_folders(environ: Mapping[str, str]) -> list[Path]:
    """Return the folders that LD_LIBRARY_PATH names."""
    paths = [Path(name) for name in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if name]
    return [path for path in paths if path.is_absolute() and path.is_dir()]


def confinement() -> Confinement:
    """Return the strongest confinement that this machine allows; the first call tries them, which takes 0.1 s."""
    if not refusal("bubblewrap"):
        return "bubblewrap"
    return "none" if refusal("namespaces") else "namespaces"


def refusal(how: Confinement) -> str:
    """Return why this machine does not allow a confinement, or ""."""
    if how == "none" or not _trial(how, fresh_proc=True):
        return ""
    return _trial(how, fresh_proc=False)


def confined_command(command: Sequence[str], view: View, how: Confinement) -> list[str]:
    """Return the command that runs `command` confined.

    Args:
        command: the program, by its path, and its arguments.
        view: the files that it sees.
        how: the confinement; with "none" the command is returned as it is.
    """
    # Docker and others cover parts of /proc; the kernel then refuses a new one and lets the present one be seen.
    return _command(command, view, how, fresh_proc=how != "none" and not _trial(how, fresh_proc=True))


@cache
def _trial(how: Confinement, *, fresh_proc: bool) -> str:
    """Run a program that does nothing, confined; return the last line of what went wrong, or ""."""
    if not sys.platform.startswith("linux"):
        return "only Linux has namespaces"
    program = "bwrap" if how == "bubblewrap" else "unshare"
    if shutil.which(program) is None:
        return f"{program} is not on the PATH"
    with private_folder() as folder:
        command = _command(["/bin/true"], View(folder=folder), how, fresh_proc=fresh_proc)
        try:
            done = subprocess.run(
                command, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=_TRIAL_TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"


def _command(command: Sequence[str], view: View, how: Confinement, *, fresh_proc: bool) -> list[str]:
    if how == "none":
        return list(command)
    mounts = _mounts(view, fresh_proc=fresh_proc)
    working = str((view.working or view.folder / "home").absolute())
    return (_bubblewrap if how == "bubblewrap" else _namespaces)(command, mounts, view, working)


def _bubblewrap(command: Sequence[str], mounts: Sequence[tuple[str, str, str]], _: View, working: str) -> list[str]:
    options = {"read": "--ro-bind", "write": "--bind", "device": "--dev-bind", "link": "--symlink"}
    arguments = [shutil.which("bwrap") or "bwrap"]
    arguments += [f"--unshare-{each}" for each in ("user", "ipc", "pid", "net", "uts", "cgroup-try")]
    arguments += ["--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev"]
    for how, source, target in mounts:
        match how:
            case "proc":
                arguments += ["--proc", target]
            case "folder":
                arguments += ["--dir", target]
            case _:
                arguments += [options[how], source, target]
    return [*arguments, "--chdir", working, "--", *command]


def _namespaces(command: Sequence[str], mounts: Sequence[tuple[str, str, str]], view: View, working: str) -> list[str]:
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts"]
    # What bubblewrap's --dev makes.
    devices = [("device", f"/dev/{name}", f"/dev/{name}") for name in _DEVICES]
    devices += [("link", f"/proc/self/{part}", f"/dev/{name}") for name, part in _STREAMS.items()]
    devices += [("folder", "", "/dev/shm")]  # noqa: S108
    arguments = [part for mount in [*devices, *mounts] for part in mount]
    script = ["--pid", "--fork", "--kill-child=KILL", "--", "/bin/sh", "-c", _NAMESPACES_SCRIPT, "confine"]
    return [*unshare, *script, str(view.folder / "root"), *arguments, "--", working, *command]


def _mounts(view: View, *, fresh_proc: bool) -> list[tuple[str, str, str]]:
    """Return what a confined process sees as (how, source, target), parents first."""
    mounts: list[tuple[str, str, str]] = []
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            mounts.append(("link", str(path.readlink()), str(path)))
        elif path.exists():
            mounts.append(("read", str(path), str(path)))
    settings = [Path("/etc") / name for name in _SETTINGS]
    mounts += [("read", str(path), str(path)) for path in settings if path.exists()]
    if view.gpu:
        devices = [str(device) for pattern in _GPU_DEVICES for device in Path("/dev").glob(pattern)]
        mounts += [("device", device, device) for device in devices]
    mounts += [("proc" if fresh_proc else "read", "/proc", "/proc")]
    mounts += [("folder", "", "/tmp")]  # noqa: S108 - one of its own, for programs that ignore TMPDIR
    written: set[Path] = set()
    for how, paths in (("write", [view.folder / "home", *view.writable]), ("read", view.readable)):
        shown = {Path(system) for system in _SYSTEM}
        # Parents first: what is in a folder that is shown the same way needs no mount of its own.
        for path in sorted({each for given in paths for each in (given.absolute(), given.resolve())} - written):
            if path.exists() and shown.isdisjoint((path, *path.parents)):
                shown.add(path)
                mounts.append((how, str(path), str(path)))
        written = shown
    return sorted(mounts, key=lambda mount: Path(mount[2]).parts)
