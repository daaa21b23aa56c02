"""Take back a commit whose files were stored wrongly: a reader finds the earlier files, or no branch at all."""

from packager.errors import PackagerError
from packager.publish.targets import Target, same_files


def take_back(target: Target, branch: str, commit: str, before: str | None) -> str:
    """Give a branch the files that it had, or remove a branch that was just made; return what was done.

    Args:
        target: the repository.
        branch: the branch's name.
        commit: the branch's head, whose files are wrong.
        before: the head before it, None if the branch did not exist.

    Returns:
        What was done, or why it failed: the caller reports it with the wrong files.
    """
    try:
        if before is None:
            return target.remove(branch, head=commit)
        # The trailers of a rollback: the new commit counts as the one whose files it has.
        trailers = f"Rollback-of: {commit}\nRollback-to: {before}"
        message = f"{branch}: back to {before[:12]}, the files of {commit[:12]} were stored wrongly\n\n{trailers}"
        head = target.restore(branch, before, parent=commit, message=message)
        if same_files(target.read_back(head), target.read_back(before)):
            return f"the branch has the files of {before[:12]} again, in {head[:12]}"
        return f"putting back the files of {before[:12]} failed, too: {head[:12]} holds other files"
    except PackagerError as error:
        why = f" ({error.why})" if error.why else ""
        return f"taking it back failed: {error.what}{why}"
