"""The git executable: found by GitPython, and recent enough.

GitPython is imported on first use, because its import fails on a machine without git.
"""

import shutil
from typing import TYPE_CHECKING

from packager.errors import MachineError

if TYPE_CHECKING:
    from git.cmd import Git

_versions: dict[str, tuple[int, ...]] = {}  # by path: every target asks, and a command has several

OLDEST_GIT = (2, 32)  # GIT_CONFIG_GLOBAL and GIT_CONFIG_COUNT
_INSTALL_HINT = "install git (apt-get install git, brew install git or https://git-scm.com/downloads) and run again"


def find_git() -> "Git":
    """Return what starts the git of this machine.

    Raises:
        MachineError: there is no git on the PATH, or it is older than `OLDEST_GIT`.
    """
    try:
        from git.cmd import Git
        from git.exc import GitCommandNotFound
    except ImportError as error:
        raise missing_git(error) from error
    git = Git()
    program = shutil.which(str(git.GIT_PYTHON_GIT_EXECUTABLE)) or ""
    try:
        version = _versions.get(program) or git.version_info
    except GitCommandNotFound as error:
        raise missing_git(error) from error
    if program:
        _versions[program] = version
    if version < OLDEST_GIT:
        raise MachineError(
            f"git {'.'.join(map(str, version))} is too old",
            why=f"git {'.'.join(map(str, OLDEST_GIT))} is the first that can ignore the user's settings",
            hint=_INSTALL_HINT,
        )
    return git


def missing_git(error: Exception) -> MachineError:
    """Return the error for a git that GitPython did not find."""
    return MachineError("git is not on the PATH", why=str(error).strip().split("\n", 1)[0], hint=_INSTALL_HINT)
