"""A fake Hugging Face Hub on 127.0.0.1: the requests of huggingface_hub 2.4.0 for publishing and downloading.

No package implements the Hub's write API, so this is a thin layer over existing programs: each repository is
a bare git repository (`<root>/<namespace>/<name>.git`: git's commit ids, git's compare-and-swap, `git check-attr` for
what is LFS), LFS bytes lie in its `lfs/objects/ab/cd/<sha256>` where git-lfs looks for them, every stored object is
hashed again, and a commit that names an object which is not stored is refused. All state is on disk and survives a
restart. `git clone` and git-lfs read it through git's own HTTP backend. A dataset's id is
`datasets/<namespace>/<name>` here, as in addresses. What it does not know (Spaces, pull requests, discussions) it
answers with 404.

The client does not ask whether a server has Xet: with `xet=True`, give each Hub a client with an HF_HOME of its own,
which remembers what was sent; without it, set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported.

    with LoopbackHub(tmp_path, tokens={"hf_w": Account("alice", orgs=("acme",))}) as hub:
        hub.fault("POST /api/models/.*/commit/", "status", status=429, retry_after=1)
        HfApi(endpoint=hub.endpoint, token="hf_w").create_repo("acme/tiny")

As a process, which prints its address once it listens, takes faults at POST /_loopback/faults and returns the
recorded requests at GET /_loopback/record:

    python -m tests.loopback_hub --root DIR --port 0 --token hf_w --user alice --org acme

Other servers speak the Hub's protocol with differences; `Dialect` has them, one by one.

Known differences from the Hub, about which a test here proves nothing:

- Addresses of the storage are not signed, do not expire, and are this server under the name `localhost`: they refuse a
  token as a storage elsewhere would, but lie on no other machine, and there is no CDN that could lag behind.
- Every reader sees a write at once.
- A rate limit is a fault that a test arms; of its own accord only commits are counted, per repository and hour.
- A 401 has the code RepoNotFound: over http the client does not recognise a 401 without it, over https it does.
- A branch whose name could be an abbreviated commit is found as a branch, and names with a `/` are.
- Tokens may write everywhere in their namespaces or nowhere; there are no fine-grained ones, no OIDC and no expiry.
- Files are refused for their size only as regular files of `lfs_threshold` bytes (413), never as large ones, and small
  binary files may be regular ones. There is no scan of what they hold, and no quota of the storage.
- `git push` is refused.
- Xet answers the older half of its protocols (shards and reconstructions of version 1, xorbs without a grant), has no
  chunks of other users, and does not check the hash of a xorb; the files made of it are hashed.
"""

from tests.loopback_hub.accounts import Account
from tests.loopback_hub.dialect import Dialect
from tests.loopback_hub.faults import Fault, FaultKind
from tests.loopback_hub.hub import LoopbackHub
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import Entry, Repository
from tests.loopback_hub.server import Recorded, Upload

__all__ = [
    "Account",
    "Answer",
    "Call",
    "Dialect",
    "Entry",
    "Fault",
    "FaultKind",
    "LoopbackHub",
    "Recorded",
    "RefusedError",
    "Repository",
    "Upload",
]
