"""Trusted publishers: a CI job proves its identity and gets a temporary token for one repository."""

from typing import TYPE_CHECKING
from uuid import uuid4

from tests.loopback_hub.accounts import Account, namespace
from tests.loopback_hub.messages import Answer, Call, RefusedError

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def id_token(hub: "LoopbackHub", call: Call) -> Answer:
    """Return a job's identity for an audience to a client with the job's secret, as GitHub does."""
    if call.headers.get("Authorization", "") != f"Bearer {hub.ci_secret}" or not hub.ci_secret:
        raise RefusedError(401, "no such job")
    token = f"jwt.{call.query['audience'][0]}.{uuid4().hex}"
    hub.identities.add(token)
    return Answer.of_json({"value": token})


def exchange(hub: "LoopbackHub", call: Call) -> Answer:
    """Return a token for a repository that trusts the job (RFC 8693)."""
    wish = call.json()
    if wish["subject_token"] not in hub.identities or f".{hub.endpoint}." not in wish["subject_token"]:
        raise RefusedError(401, "Invalid subject token")
    if wish["resource"] != hub.trusting:
        raise RefusedError(403, "No trusted publisher matches this job")
    token = f"hf_jwt_{uuid4().hex}"
    hub.tokens[token] = Account(namespace(wish["resource"]), only=wish["resource"])
    return Answer.of_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})
