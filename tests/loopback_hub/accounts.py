"""The accounts and permissions of tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tests.loopback_hub.messages import Answer, Call, RefusedError

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


@dataclass(frozen=True)
class Account:
    """A token's account and permissions: it writes to the user's namespace and `orgs`, or to the repository `only`."""

    user: str
    role: Literal["write", "read"] = "write"
    orgs: tuple[str, ...] = ()
    only: str = ""


def namespace(name: str) -> str:
    """Return the owner's part of an id."""
    return name.removeprefix("datasets/").partition("/")[0]


def is_member(account: Account | None, repo_id: str) -> bool:
    """Whether an account belongs to a repository's namespace."""
    return account is not None and namespace(repo_id) in {account.user, *account.orgs}


def require_write(account: Account | None, repo_id: str) -> Account:
    """Return the account, if it may write to a repository; 401 or 403 if not."""
    if account is None:
        raise RefusedError(401, "Invalid username or password.")
    if account.role != "write":
        raise RefusedError(403, "Forbidden: you must use a write token to write to a repository.")
    if not is_member(account, repo_id) or account.only not in {"", repo_id}:
        raise RefusedError(403, f"You don't have the rights to write to the namespace {namespace(repo_id)}")
    return account


def whoami(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer with the token's account and role."""
    if call.account is None:
        raise RefusedError(401, "Invalid username or password.")
    account = call.account
    if account.only:  # the Hub's answer for such a token was never measured
        raise RefusedError(403, "This token is for one repository")
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": account.role} for org in account.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": account.role}}
    user = {"type": "user", "id": account.user, "name": account.user, "fullname": account.user}
    return Answer.of_json({**user, "orgs": orgs, "auth": auth})
