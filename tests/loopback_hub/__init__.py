"""A test double of the Hugging Face Hub on 127.0.0.1: what huggingface_hub 2.4.0 asks while it publishes and downloads.

No package implements the Hub's write API, so this is ours, kept a thin skin over what is not: each model repository is
a bare git repository (`<root>/<namespace>/<name>.git`: git's commit ids, git's compare-and-swap, `git check-attr` for
what is LFS), LFS bytes lie in its `lfs/objects/ab/cd/<sha256>` where git-lfs looks for them, every stored object is
hashed again, and a commit that names an object which is not stored is refused. All state is on disk and survives a
restart. What it does not know (datasets, Spaces, pull requests, discussions) it answers with 404.

It does not speak Xet, and the client does not negotiate: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported.

    with LoopbackHub(tmp_path, tokens={"hf_w": Account("alice", orgs=("acme",))}) as hub:
        hub.fault("POST /api/models/.*/commit/", "status", status=429, retry_after=1)
        HfApi(endpoint=hub.endpoint, token="hf_w").create_repo("acme/tiny")

As a process, which prints its address once it listens, takes faults at POST /_loopback/faults and tells what it was
asked at GET /_loopback/record:

    python -m tests.loopback_hub --root DIR --port 0 --token hf_w --user alice --org acme
"""

from tests.loopback_hub.accounts import Account
from tests.loopback_hub.faults import Fault, FaultKind
from tests.loopback_hub.hub import LoopbackHub
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import Entry, Repository
from tests.loopback_hub.server import Recorded, Upload

__all__ = [
    "Account",
    "Answer",
    "Call",
    "Entry",
    "Fault",
    "FaultKind",
    "LoopbackHub",
    "Recorded",
    "RefusedError",
    "Repository",
    "Upload",
]
