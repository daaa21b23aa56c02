"""What other servers with the Hub's protocol do differently, seen in their sources and answers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The answers of a server; the Hub's by default.

    Attributes:
        error_codes: whether a refusal has X-Error-Code (hfd and csghub send none).
        collections: whether there are collections; KohakuHub answers 501.
        descriptions: whether the description of a commit is kept (KohakuHub drops it).
        compares_parents: whether a commit is refused if the branch's head is not the parent it names (KohakuHub
            accepts it).
        paths_info: whether files can be described by name (matrixhub and csghub's models cannot).
        copy_needs_size: whether a large file without its size in a commit becomes one of 0 bytes (matrixhub).
        stores_equal_files: whether a commit gets a file whose path had the same content in the last commit with that
            path, on any branch (KohakuHub skips it).
        null_lists: whether an empty list is null (servers written in Go).
        wide_ids: whether commit ids have 64 digits (KohakuHub).
    """

    error_codes: bool = True
    collections: bool = True
    descriptions: bool = True
    compares_parents: bool = True
    paths_info: bool = True
    copy_needs_size: bool = False
    stores_equal_files: bool = True
    null_lists: bool = False
    wide_ids: bool = False
