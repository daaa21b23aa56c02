"""The HTTP library of the installed Hub client: httpx2 from client 2.0 on, httpx before."""

from typing import TYPE_CHECKING

import huggingface_hub

if TYPE_CHECKING or int(huggingface_hub.__version__.split(".")[0]) >= 2:
    import httpx2 as httpx
else:
    import httpx

__all__ = ["httpx"]
