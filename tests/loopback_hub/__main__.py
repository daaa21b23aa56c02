"""The Hub as a process; see the package's docstring."""

import argparse
import threading
from pathlib import Path

from tests.loopback_hub import Account, LoopbackHub


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description="A loopback Hugging Face Hub for tests.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", required=True, help="a token that may write")
    parser.add_argument("--read-token", help="one that may not")
    parser.add_argument("--user", default="loopback-user")
    parser.add_argument("--org", action="append", default=[])
    for option in ("page-size", "lfs-threshold", "multipart-threshold", "part-bytes", "commit-cap"):
        parser.add_argument(f"--{option}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--xet", action="store_true", help="store large files by chunks, too")
    options = vars(parser.parse_args())
    user, orgs = options.pop("user"), tuple(options.pop("org"))
    tokens = {options.pop("token"): Account(user, "write", orgs)}
    if read_token := options.pop("read_token"):
        tokens[read_token] = Account(user, "read", orgs)
    with LoopbackHub(options.pop("root"), tokens=tokens, **options) as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
