"""The host memory that is available: tables of Linux and limits of containers, written by hand."""

from pathlib import Path

import pytest

from packager.system.host_memory import available_bytes

MEMINFO = "MemTotal:       131072 kB\nMemFree:        1024 kB\nMemAvailable:   65536 kB\n"
MIB = 2**20


def files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, 64 * MIB),
        ({"memory_max": "max\n", "memory_current": f"{MIB}\n"}, 64 * MIB),
        ({"memory_max": f"{40 * MIB}\n", "memory_current": f"{30 * MIB}\n"}, 10 * MIB),
        (
            {
                "memory_max": f"{40 * MIB}", "memory_current": f"{30 * MIB}",
                "memory_stat": f"anon 1\ninactive_file {5 * MIB}\n",
            },
            15 * MIB,
        ),
        ({"memory_max": f"{40 * MIB}", "memory_current": f"{50 * MIB}"}, 0),
        ({"memory_max": f"{400 * MIB}", "memory_current": f"{50 * MIB}"}, 64 * MIB),
        ({"memory_max": "?", "memory_current": "?"}, 64 * MIB),
    ],
    ids=["no group", "no limit", "limit", "cache can be had", "over the limit", "more than there is", "not numbers"],
)  # fmt: skip
def test_the_smaller_of_machine_and_container_counts(tmp_path: Path, group: dict[str, str], expected: int) -> None:
    files(tmp_path, meminfo=MEMINFO, **group)
    assert available_bytes(tmp_path / "meminfo", tmp_path) == expected


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "MemAvailable: many kB\n", "MemAvailable:\n"])
def test_a_table_of_another_form_is_no_answer(tmp_path: Path, text: str) -> None:
    files(tmp_path, meminfo=text)
    assert available_bytes(tmp_path / "meminfo", tmp_path) is None
    assert available_bytes(tmp_path / "absent", tmp_path) is None


def test_this_machine_has_some() -> None:
    found = available_bytes()
    assert found is None or found > 0
