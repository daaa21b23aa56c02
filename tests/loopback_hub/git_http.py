"""`git clone` over HTTP: git's own server behind the Hub's accounts; lfs.py serves git-lfs."""

from typing import TYPE_CHECKING

from tests.git_backend import ask_git
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.models import require_ungated

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def serve_git(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer git's client, which may read and not push."""
    try:
        repository = hub.readable(call)
        require_ungated(repository, call)
    except RefusedError as refused:
        if refused.answer.status == 401:  # git asks for a name and a password, the token, only then
            refused.answer.headers["WWW-Authenticate"] = 'Basic realm="Authentication required"'
        raise
    address = f"/{repository.id}.git/{call.args['service']}?{call.query_text}"
    answer = ask_git(hub.root, call.method, address, dict(call.headers), b"".join(call.body.blocks()), user="")
    return Answer(answer.status, answer.body, answer.headers)
