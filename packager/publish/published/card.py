"""Compare main's card with the branches: its table must list all of them, with the figures of their records."""

import re
from collections.abc import Mapping, Sequence

from packager.errors import PublishError
from packager.publish.published.finding import Collector
from packager.publish.targets import BranchState, Target
from packager.receipt import PROVENANCE, README, Provenance
from packager.system.text import BYTE_UNITS, shown
from packager.variant import MAIN

_MAX_CARD_BYTES = 2_000_000
_MAX_ROWS = 1000
BRANCH, VARIANT = "Branch", "Variant"
BITS, GROUP_SIZE, ACT_ORDER = "Bits", "Group Size", "Act Order (desc_act)"
DAMP, SEQ_LEN, SIZE = "Damp %", "Seq Len", "File Size"
_COLUMNS = frozenset({BRANCH, BITS, GROUP_SIZE, ACT_ORDER, DAMP, SEQ_LEN, SIZE})
_CELL_END = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([^`]{1,200})`")
_SIZE = re.compile(rf"(\d{{1,9}})(?:\.(\d{{1,6}}))? ({'|'.join(BYTE_UNITS)})\Z")

Row = Mapping[str, str]


def compare_card(
    target: Target, states: Mapping[str, BranchState], provenances: Mapping[str, Provenance], found: Collector
) -> int:
    """Compare the table of main's card with the repository.

    Args:
        target: the repository.
        states: every branch.
        provenances: the records of the branches that were read.
        found: gets the findings.

    Returns:
        The number of rows that were compared with a record.
    """
    if MAIN not in states:
        found.add("main-missing", "", "there is no branch main")
        return 0
    # A repository with one variant has it on main; the table's other rows link to other repositories.
    own_record = provenances[MAIN] if MAIN in provenances and provenances[MAIN].layout == "repos" else None
    rows = _read_rows(target, states[MAIN], VARIANT if own_record else BRANCH, found)
    if not rows:
        return 0
    records = {own_record.branch: own_record} if own_record else provenances
    expected = set(records) if own_record else {branch for branch, state in states.items() if PROVENANCE in state.files}
    listed: dict[str, Row] = {}
    for row in rows:
        code = _CODE.search(row[BRANCH])
        name = code[1] if code else row[BRANCH]
        if name in listed:
            found.add("card-table", README, f"the table has two rows for {name}")
        elif name not in states and not own_record:
            found.add("card-branch-missing", README, f"the table lists {name}, which is not a branch here")
        listed.setdefault(name, row)
    for branch in sorted(expected - listed.keys()):
        found.add("card-branch-unlisted", README, f"the table does not list {branch}")
    compared = sorted(listed.keys() & records.keys())
    for branch in compared:
        for column, cell, recorded in _differences(listed[branch], records[branch]):
            found.add("card-figure", README, f"{branch}: {column} is {shown(cell)}, its record has {shown(recorded)}")
    return len(compared)


def _read_rows(target: Target, main: BranchState, heading: str, found: Collector) -> Sequence[Row]:
    """Return the rows of main's card; report why there are none."""
    size_bytes = main.files[README].size_bytes if README in main.files else 0
    if not 0 < size_bytes <= _MAX_CARD_BYTES:
        found.add("card-table", README, f"there is no {README}, or it is empty or too large")
        return ()
    try:
        data = target.read_bytes(main.commit, README, size=_MAX_CARD_BYTES)
    except PublishError as error:
        found.add("branch-unreadable", README, error.brief)
        return ()
    rows = table_rows(data.decode("utf-8", "replace"), heading)
    if not rows:
        found.add("card-table", README, "there is no table of the provided files")
    return rows


def table_rows(text: str, heading: str = BRANCH) -> Sequence[Row]:
    """Return the rows of a card's table of provided files, as cells by heading; none if the card has no such table.

    The table is the first one with all compared columns. Its column of names has the heading `heading`; the returned
    rows have it under `BRANCH`.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines):
        headings = [BRANCH if cell == heading else cell for cell in _cells(line)]
        if len(headings) > 40 or not _COLUMNS.issubset(headings):
            continue
        rows = []
        for body in lines[number + 2 : number + 2 + _MAX_ROWS]:
            cells = _cells(body)
            if len(cells) != len(headings):
                break
            rows.append(dict(zip(headings, cells, strict=True)))
        return rows
    return ()


def _cells(line: str) -> list[str]:
    """Return the cells of a table row; none if the line is no table row."""
    if not line.startswith("|") or not line.rstrip().endswith("|"):
        return []
    return [cell.strip() for cell in _CELL_END.split(line.rstrip())[1:-1]]


def _differences(row: Row, provenance: Provenance) -> list[tuple[str, str, object]]:
    """Return column, cell and recorded value of every figure that differs from the record."""
    used = provenance.parameters
    recorded: dict[str, object] = {
        BITS: used.get("bits"),
        GROUP_SIZE: used.get("group_size"),
        DAMP: used.get("damp_percent"),
        SEQ_LEN: provenance.calibration.seq_len,
    }
    # A cell may be "-1 (whole row)", and that of the act order "False (static)".
    wrong = [
        (column, row[column], value) for column, value in recorded.items() if row[column].split(" ")[0] != f"{value}"
    ]
    act_order = act_order_cell(used)
    if row[ACT_ORDER] != act_order:
        wrong.append((ACT_ORDER, row[ACT_ORDER], act_order))
    if not is_rounded(row[SIZE], provenance.weights_bytes):
        wrong.append((SIZE, row[SIZE], provenance.weights_bytes))
    return wrong


def act_order_cell(parameters: Mapping[str, object]) -> str:
    """Return the cell of a record's act order: desc_act, and the order where desc_act does not say it."""
    order = parameters.get("act_order")
    return f"{parameters.get('desc_act')}" + (f" ({order})" if order in ("group", "static") else "")


def is_rounded(cell: str, size_bytes: int) -> bool:
    """Return whether a size such as `7.26 GB` is `size_bytes`, rounded to the displayed digits."""
    match = _SIZE.match(cell)
    if match is None:
        return False
    whole, fraction, factor = match[1], match[2] or "", BYTE_UNITS[match[3]]
    # Integers have no rounding error at any size.
    difference = abs(int(whole + fraction) * factor - size_bytes * int(10 ** len(fraction)))
    return 2 * difference <= factor
