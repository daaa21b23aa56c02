"""Python's own warnings, switched off while foreign text is parsed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_FILTERS = Lock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore warnings, in one thread at a time: the process has one list of filters, and audits run in parallel."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
