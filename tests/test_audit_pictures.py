"""The audit of a card's picture: what we draw passes, and nothing else of these names."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from packager.card.plot import draw_picture, plot_of
from packager.prove.audit.files import list_folder
from packager.prove.audit.finding import Findings
from packager.prove.audit.pictures import check_pictures
from packager.receipt import PICTURE_FILES
from tests import card_fixtures as fixtures

PNG, SVG = "quality-light.png", "quality-dark.svg"


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    plot = plot_of(fixtures.llama_receipts(fixtures.llama_recipe()))
    assert plot is not None
    return dict(draw_picture(plot))


def problems(folder: Path, files: dict[str, bytes]) -> list[str]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    findings = Findings()
    check_pictures(list_folder(folder, findings), findings)
    return [f"{where}: {each.message}" for each in findings.collected() for where in (each.where, *each.also)]


def test_what_the_card_draws_has_no_finding(tmp_path: Path, drawn: dict[str, bytes]) -> None:
    assert problems(tmp_path, drawn) == []


def test_each_file_of_the_picture_is_there_or_none(tmp_path: Path, drawn: dict[str, bytes]) -> None:
    found = problems(tmp_path, {name: data for name, data in drawn.items() if name != SVG})
    assert found == [f"{SVG}: there is {PICTURE_FILES[0]}, and not this file"]


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def with_text(data: bytes) -> bytes:
    return data[:-12] + chunk(b"tEXt", b"Author\0somebody") + data[-12:]


def inside(text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b"</svg>", text + b"</svg>")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (PNG, lambda data: b"GIF89a" + data, "it is not a PNG file"),
        (PNG, lambda data: data[:-20], "a part of it is cut off or damaged"),
        (PNG, lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:], "a part of it is cut off or damaged"),
        (PNG, lambda data: data[:-12], "its end is missing"),
        (PNG, lambda data: data + b"secret", "it goes on after the picture's end"),
        (PNG, with_text, "it holds more than a picture: b'tEXt'"),
        (PNG, lambda data: data + b" " * 2_000_000, "bytes are too many for a picture"),
        (SVG, inside(b"<script>alert(1)</script>"), "the element 'script' is no part of a drawing"),
        (SVG, inside(b"<foreignObject/>"), "the element 'foreignObject' is no part of a drawing"),
        (SVG, inside(b"<svg/>"), "the element 'svg' is no part of a drawing"),
        (SVG, inside(b'<g onload="alert(1)"/>'), "the attribute 'onload' runs or loads something"),
        (SVG, inside(b'<use href="https://e.org/x"/>'), "the attribute 'href' runs or loads something"),
        (SVG, inside(b'<g style="fill: url( https://e.org)"/>'), "the attribute 'style' runs or loads something"),
        (SVG, inside(b"<style>@import 'https://e.org';</style>"), "its style loads something"),
        (SVG, inside(b"<style>*{fill: ur\\6c(https://e.org)}</style>"), "its style loads something"),
        (SVG, inside(b"<?xml-stylesheet href='x'?>"), "it declares an entity or asks for a program"),
        (SVG, lambda _: b"<!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>", "it declares an entity or asks for a program"),
        (SVG, lambda _: b"<html/>", "the element 'html' is no part of a drawing"),
        (SVG, lambda data: data[:-9], "it is not an SVG drawing"),
    ],
)
def test_more_than_a_picture_is_a_finding(
    tmp_path: Path, drawn: dict[str, bytes], name: str, change: Callable[[bytes], bytes], words: str
) -> None:
    (found,) = problems(tmp_path, {**drawn, name: change(drawn[name])})
    assert found.startswith(f"{name}: ")
    assert words in found
