"""Sections of a card: hand-written words between markers, kept in the recipe's files, never lost and never run."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.card import CardTexts, own_template_problems, render_card
from packager.card.own_templates import OwnTemplates
from packager.card.sections import (
    SECTION_FILES,
    SECTIONS,
    has_section_marker,
    section_block,
    section_problems,
    section_text,
    split_page,
)
from packager.cli.main import app
from packager.errors import CardError, PlanError, PublishError, RecipeError, StateError
from packager.pipeline import flow
from packager.pipeline.keep_sections import KeptSections, keep_sections
from packager.pipeline.plan import make_plan
from packager.pipeline.preview import preview_card
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.card_page import assert_well_formed
from tests.publish_fixtures import git
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, Builds, hub_folder, options

WORDS = "## How I use it\n\nWith `{{ 7 * 7 }}` and {temperature}, as **Ann** says.\n\n```jinja\n{% include 'x' %}\n```"
QUIET = Terminal(quiet=True)


def page(words: Mapping[str, str] | None = None, *, style: str = "plain", **texts: str) -> str:
    recipe = fixtures.llama_recipe(style=style)
    own = OwnTemplates(folder="card", texts={}, sections=words or {})
    return render_card(recipe, CardTexts(**texts), fixtures.llama_receipts(recipe), "llama", "main", own=own)


def with_words(text: str, words: str, section: str = "introduction") -> str:
    """Return a page as somebody edits it: words between two markers."""
    begin = f"<!-- begin: {section} -->\n"
    assert text.count(begin) == 1
    before, _, after = text.partition(begin)
    return f"{before}{begin}{words}\n{after[after.index('<!-- end:') :]}"


@pytest.mark.parametrize("style", ["plain", "late-2023"])
def test_words_stand_in_their_places_and_change_nothing_else(style: str) -> None:
    words = {name: f"Words of {name}." for name in SECTIONS}
    text = page(words, style=style)
    assert_well_formed(text)
    split, usual = split_page(text, "page"), split_page(page(style=style), "page")
    assert split.sections == words
    assert usual.sections == dict.fromkeys(SECTIONS, "")
    assert split.outside == usual.outside
    places = [text.index(f"Words of {name}.") for name in SECTIONS]
    assert places == sorted(places)
    above = "## Which branch to take" if style == "plain" else "## Description"
    assert text.index(above) < places[0] < text.index("## Prompt template")
    assert places[1] < text.index("## Provided files") < text.index("## Licence") < places[2]


def test_jinja_in_words_is_text() -> None:
    assert split_page(page({"files": WORDS}), "page").sections["files"] == WORDS
    own = OwnTemplates(
        folder="card", texts={"_license.md.j2": "{% include 'section-files.md' %}"}, sections={"files": "{{ 7 * 7 }}"}
    )
    recipe = fixtures.llama_recipe()
    with pytest.raises(CardError, match="a template includes a file that is not a template of the card"):
        render_card(recipe, CardTexts(), fixtures.llama_receipts(recipe), "llama", "main", own=own)


def test_a_text_or_a_template_of_the_card_with_a_marker_is_refused(recipe: Path) -> None:
    markers = "<!-- begin: introduction -->\n<!-- end: introduction -->\n"
    with pytest.raises(CardError, match=r"card\.header, line 3: <!-- begin: introduction --> marks a section"):
        page(header=f"a\n\n{markers}\nb")
    assert "<!-- begin: other -->" in page(header="<!-- begin: other -->\n")
    own = OwnTemplates(folder="card", texts={"_license.md.j2": markers}, sections={})
    of = fixtures.llama_recipe()
    with pytest.raises(CardError, match="introduction begins twice"):
        render_card(of, CardTexts(), fixtures.llama_receipts(of), "llama", "main", own=own)
    content = json.loads(recipe.read_text())
    content["card"]["original_card"] = "base.md"
    recipe.write_text(json.dumps(content))
    (recipe.parent / "base.md").write_text(f"---\nlicense: mit\n---\n\n# Base\n\n{markers}")
    with pytest.raises(PlanError, match=r"base\.md:7: card\.original_card: <!-- begin: introduction --> marks"):
        make_plan(RecipeFile.load(recipe))


BLOCKS = [section_block(name, "") for name in SECTIONS]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("\n".join(BLOCKS[1:]), "the markers of a card's sections are missing.*begin: introduction"),
        ("\n".join([*BLOCKS, BLOCKS[1]]), "files begins twice"),
        ("\n".join(BLOCKS).replace("<!-- end: files -->", ""), "closing begins inside files"),
        ("\n".join(BLOCKS).replace("<!-- end: closing -->", "words"), "missing.*end: closing"),
        ("\n".join(BLOCKS).replace("<!-- begin: closing -->", ""), "closing ends, and no section is open"),
        ("\n".join(BLOCKS).replace("<!-- end: files -->", "<!-- end: closing -->"), "closing ends, and files is open"),
        ("\n".join(BLOCKS).replace("<!-- end: files -->", "x <!-- end: files -->"), "not alone on its line"),
        ("", "missing"),
        ("\n".join(BLOCKS).replace("<!-- end: files -->", "x" * 20_001 + "\n<!-- end: files -->"), "files is too long"),
        ("a\n" * 20_001, "more than 20,000 lines"),
    ],
)
def test_damaged_markers_are_named(lines: str, problem: str) -> None:
    with pytest.raises(CardError, match=f"(?s){problem}"):
        split_page(f"# Card\n{lines}\n", "README.md")


def test_a_page_of_another_editor_is_the_same_page() -> None:
    words = {"introduction": "One  \ntwo\n\n    code"}
    text = page(words)
    assert split_page(text.replace("\n", "\r\n"), "page") == split_page(text, "page")
    changed = with_words(text, "\n\n\nOne  \r\ntwo\n\n    code   \n\n")
    assert split_page(changed, "page") == split_page(text, "page")
    assert split_page(re.sub("<!-- (begin: .*) -->", r"  <!--\1-->", text), "page") == split_page(text, "page")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-be"])
def test_a_marker_is_seen_in_every_encoding(encoding: str) -> None:
    assert has_section_marker("\u00e9\n<!--begin: files-->\n".encode(encoding))
    assert not has_section_marker("\u00e9\n<!-- begin: others -->\n".encode(encoding))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x" * 20_001, "too many for a section"),
        ("a\n\n<!-- begin: files -->\n\nb", "means something else"),
        ("a <!--end:\nfiles --> b", "means something else"),
        ("<!-- run: shell -->\n```shell\nrm -rf ~\n```", "means something else"),
        ("---\nlicense: mit\n---\n\na", "front matter"),
        ("a\x1b[2Jb", "invisible character U\\+001B"),
        ("a\u202eb", "invisible character U\\+202E"),
        ("<script>alert(1)</script>", "<script> is refused"),
        ("[a](javascript:alert(1))", "scheme"),
        ("<details>\nmore", "leaves <details> open"),
        ("```\nnever closed", "leaves a code fence open"),
        ("<!-- never closed", "leaves an HTML comment open"),
    ],
)
def test_hostile_words_are_refused_in_the_recipe_and_on_a_page(text: str, problem: str) -> None:
    (found, *_) = section_problems(text)
    assert re.search(problem, found.message)
    own = OwnTemplates(folder="card", texts={}, sections={"closing": text})
    assert SECTION_FILES["closing"] in {each.name for each in own_template_problems(own)}


@pytest.mark.parametrize("text", ["# One\r\n\r\ntwo\r\n", "---\r\n\r\nbelow a rule\r\n", "one\rtwo"])
def test_words_with_the_line_ends_of_another_system_are_words(text: str) -> None:
    assert not list(section_problems(text))
    assert split_page(page({"closing": text}), "page").sections["closing"] == section_text(text)


def test_a_file_of_no_section_is_named(tmp_path: Path, builds: Builds) -> None:
    recipe = builds.copy(tmp_path)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "section-intro.md").write_text("words")
    named(recipe)
    with pytest.raises(PlanError, match=r"section-intro\.md.*they are section-introduction\.md"):
        make_plan(RecipeFile.load(recipe))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("one\n\nof {{ 7 * 7 }}", r":3: .*a template expression was not rendered"),
        ("huggingface-cli download", r":1: .*huggingface-cli is gone"),
    ],
)
def test_words_that_the_audit_of_a_card_refuses_are_refused_before_a_build(
    recipe: Path, readme: Path, words: str, problem: str
) -> None:
    edit(readme, words)
    with pytest.raises(CardError, match="a section cannot be part of a card"):
        kept(recipe, readme)
    named(recipe)
    (recipe.parent / "card").mkdir()
    file = recipe.parent / "card" / "section-closing.md"
    file.write_text(words)
    with pytest.raises(PlanError, match=rf"section-closing\.md{problem}"):
        make_plan(RecipeFile.load(recipe))
    file.write_text("of `{{ 7 * 7 }}`")
    make_plan(RecipeFile.load(recipe))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_no_file_of_a_section(recipe: Path) -> None:
    named(recipe)
    (recipe.parent / "card").mkdir()
    os.mkfifo(recipe.parent / "card" / "section-closing.md")
    with pytest.raises(CardError, match="a text of the card cannot be read"):
        make_plan(RecipeFile.load(recipe))


def named(recipe: Path, folder: str = "card") -> None:
    """Name the templates folder in the recipe."""
    content = json.loads(recipe.read_text())
    content["card"]["templates"] = folder
    recipe.write_text(json.dumps(content))


def kept(recipe: Path, source: Path | str, branch: str = MAIN, **more: Any) -> KeptSections:
    return keep_sections(
        RecipeFile.load(recipe), options(recipe.parent / "dist"), QUIET, source=str(source), branch=branch, **more
    )


def edit(readme: Path, words: str, section: str = "introduction") -> None:
    readme.write_text(with_words(readme.read_text(), words, section))


@pytest.fixture
def recipe(builds: Builds, tmp_path: Path) -> Path:
    return builds.copy(tmp_path)


@pytest.fixture
def readme(recipe: Path) -> Path:
    return tiny_recipe.workspace(recipe.parent / "dist").folder(MAIN) / "README.md"


def card(recipe: Path) -> str:
    return flow.render(RecipeFile.load(recipe), options(recipe.parent / "dist"), QUIET, branch=MAIN)


@pytest.mark.slow
def test_words_on_a_built_card_come_back_on_every_card(recipe: Path, readme: Path) -> None:
    edit(readme, f"\n\n{WORDS}\n")
    command = f"packager card {recipe} --keep {readme} --branch main --dist {recipe.parent / 'dist'}"
    for act in (card, lambda _: tiny_recipe.publish(recipe, recipe.parent / "dist")):
        with pytest.raises(StateError, match=r"README\.md was edited by hand") as caught:
            act(recipe)
        assert command in caught.value.hint
    found = kept(recipe, readme, dry_run=True)
    assert (found.folder, found.is_new, found.texts) == ("recipe-card", True, {"introduction": WORDS})
    assert not (recipe.parent / "recipe-card").exists()
    assert kept(recipe, readme) == found
    assert (recipe.parent / "recipe-card" / "section-introduction.md").read_text() == f"{WORDS}\n"
    named(recipe, "recipe-card")
    again = kept(recipe, readme)
    assert (again.texts, again.unchanged, again.is_new) == ({}, ("introduction",), False)
    assert split_page(card(recipe), "card").sections["introduction"] == WORDS, "other blank lines are no other words"
    assert split_page(preview_card(RecipeFile.load(recipe), MAIN), "card").sections["introduction"] == WORDS
    for branch in BRANCHES:
        text = readme.parent.with_name(branch).joinpath("README.md").read_text()
        assert split_page(text, branch).sections["introduction"] == WORDS
    tiny_recipe.publish(recipe, recipe.parent / "dist")


def test_a_line_outside_of_the_sections_is_named_and_nothing_is_kept(recipe: Path, readme: Path) -> None:
    edit(readme, "Mine.")
    readme.write_text(readme.read_text().replace("## Licence\n", "## Licence\n\nAsk me first.\x1b[2J\n"))
    with pytest.raises(CardError, match="differs outside of its sections") as caught:
        kept(recipe, readme)
    assert "+Ask me first.\\x1b[2J" in caught.value.why or "+Ask me first.\\u001b[2J" in caught.value.why
    assert not (recipe.parent / "recipe-card").exists()
    with pytest.raises(StateError) as edited:
        card(recipe)
    assert "--keep" not in edited.value.hint


def test_the_card_of_another_branch_is_named(recipe: Path, readme: Path) -> None:
    other = readme.parent.with_name(ACT_ORDER) / "README.md"
    edit(other, "Mine.")
    with pytest.raises(CardError, match=f"the card of {ACT_ORDER}, not of {MAIN}") as caught:
        kept(recipe, other)
    assert caught.value.hint == f"give --branch {ACT_ORDER}"
    assert kept(recipe, other, ACT_ORDER).texts == {"introduction": "Mine."}


@pytest.mark.slow
def test_two_edits_do_not_replace_each_other(recipe: Path, readme: Path) -> None:
    other = readme.parent.with_name(ACT_ORDER) / "README.md"
    edit(readme, "Of main.")
    edit(other, "Of the other.")
    edit(other, "The end.", "closing")
    named(recipe)
    (recipe.parent / "card").mkdir()
    kept(recipe, readme)
    with pytest.raises(StateError, match="introduction were changed in the recipe's files and on the page"):
        kept(recipe, other, ACT_ORDER)
    edit(other, "Of main.\n\nOf the other.")
    (recipe.parent / "card" / "section-introduction.md").write_text("Of main.\n\nOf the other.\n")
    assert kept(recipe, other, ACT_ORDER).texts == {"closing": "The end."}
    edit(readme, "Of main.\n\nOf the other.")
    edit(readme, "The end.", "closing")
    assert split_page(card(recipe), "card").sections["introduction"] == "Of main.\n\nOf the other."
    edit(readme, "", "closing")
    assert kept(recipe, readme).texts == {"closing": ""}
    assert not (recipe.parent / "card" / "section-closing.md").exists()


def test_what_was_kept_before_the_recipe_names_the_folder_is_not_replaced(recipe: Path, readme: Path) -> None:
    edit(readme, "Mine.")
    kept(recipe, readme)
    again = kept(recipe, readme)
    assert (again.texts, again.unchanged, again.is_new) == ({}, ("introduction",), True)
    file = recipe.parent / "recipe-card" / "section-introduction.md"
    file.write_text("Mine, and more.\n")
    for dry_run in (True, False):
        with pytest.raises(StateError, match="introduction were changed in the recipe's files") as caught:
            kept(recipe, readme, dry_run=dry_run)
        assert "recipe-card/section-introduction.md: its words are neither" in caught.value.why
        assert "if the page is right, delete the file first" in caught.value.hint
        assert file.read_text() == "Mine, and more.\n"
    edit(readme, "The end.", "closing")
    with pytest.raises(StateError):
        kept(recipe, readme)
    assert not file.with_name("section-closing.md").exists(), "all or nothing"
    file.unlink()
    assert kept(recipe, readme).texts == {"introduction": "Mine.", "closing": "The end."}


@pytest.mark.parametrize("link", [True, False])
def test_the_words_stay_in_the_recipes_folder(recipe: Path, readme: Path, tmp_path: Path, link: bool) -> None:
    edit(readme, "Mine.")
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    if link:
        (recipe.parent / "recipe-card").symlink_to(outside)
        with pytest.raises(RecipeError):
            kept(recipe, readme)
    else:
        (recipe.parent / "recipe-card").mkdir()
        (outside / "secret").write_text("secret")
        (recipe.parent / "recipe-card" / "section-introduction.md").symlink_to(outside / "secret")
        with pytest.raises(RecipeError):
            kept(recipe, readme)
        assert (outside / "secret").read_text() == "secret"
    assert not list(outside.glob("section*"))
    shutil.rmtree(outside)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x" * 1_000_001, "too large"),
        (b"\xff", "not UTF-8"),
        (b"# a page", "markers of a card's sections are missing"),
    ],
)
def test_a_page_that_is_none_is_refused(recipe: Path, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "page.md").write_bytes(data)
    with pytest.raises(CardError, match=message):
        kept(recipe, tmp_path / "page.md")
    with pytest.raises(CardError, match="the card cannot be read"):
        kept(recipe, tmp_path / "nowhere.md")


def commit(recipe: Path, branch: str, text: str) -> None:
    """Commit a README.md as a person does on the host."""
    clone = recipe.parent / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    repository = hub_folder(recipe.parent / "dist")
    git("-c", "filter.lfs.smudge=cat", "clone", "-q", "--branch", branch, str(repository), str(clone))
    (clone / "README.md").write_text(text)
    git("commit", "-qam", "words", cwd=clone)
    head = git("rev-parse", "HEAD", cwd=clone).strip()
    git("fetch", "-q", str(clone), branch, cwd=repository)
    git("update-ref", f"refs/heads/{branch}", head, cwd=repository)
    if branch == MAIN:
        git("reset", "-q", "--hard", cwd=repository)


@pytest.mark.slow
def test_words_in_the_repository_hold_a_publish_until_they_are_kept(builds: Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path, published=True)
    dist = recipe.parent / "dist"
    published = (tiny_recipe.workspace(dist).folder(MAIN) / "README.md").read_text()
    commit(recipe, MAIN, with_words(published, "From the Hub."))
    commit(recipe, MAIN, with_words(published, "From the Hub, twice."))
    for dry_run in (True, False):
        with pytest.raises(PublishError, match="its words would be lost") as caught:
            flow.publish(RecipeFile.load(recipe), options(dist), QUIET, dry_run=dry_run)
        assert "A Person" in caught.value.why
        assert f"packager card {recipe} --keep published --branch main --dist {dist}" in caught.value.hint
    runner = CliRunner()
    arguments = ["card", str(recipe), "--keep", "published", "--dist", str(dist)]
    told = json.loads(runner.invoke(app, [*arguments, "--dry-run", "--format", "json"]).stdout)
    assert (told["written"], told["set_card_templates"]) == (False, "recipe-card")
    assert told["sections"] == [
        {"name": "introduction", "file": "recipe-card/section-introduction.md", "text": "From the Hub, twice."}
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "introduction: recipe-card/section-introduction.md, 1 line\n" in done.stdout
    assert "below card:  templates: recipe-card\n" in done.stdout
    named(recipe, "recipe-card")
    card(recipe)
    report = tiny_recipe.publish(recipe, dist)
    assert {entry.branch: entry.action for entry in report.plan.branches} == dict.fromkeys(BRANCHES, "update")
    text = git("show", f"{MAIN}:README.md", cwd=hub_folder(dist))
    assert split_page(text, "card").sections["introduction"] == "From the Hub, twice."
    commit(recipe, MAIN, text.replace("<!-- end: introduction -->", "Lost its end."))
    with pytest.raises(PublishError, match=r"its words would be lost.*\n.*begins inside introduction"):
        tiny_recipe.publish(recipe, dist)
    commit(recipe, MAIN, with_words(text, "From the Hub.") + "long\n" * 200_000)
    with pytest.raises(PublishError, match=r"(?s)its words would be lost.*too large"):
        tiny_recipe.publish(recipe, dist)
    commit(recipe, MAIN, text)
    (recipe.parent / "recipe-card" / "section-introduction.md").write_text("Ours again.\n")
    same = kept(recipe, "published")
    assert (same.texts, same.unchanged) == ({}, ()), "the recipe's words are newer than those of the page"
    card(recipe)
    tiny_recipe.publish(recipe, dist)  # the page is as its record lists it: nobody wrote into it


def test_a_line_outside_in_the_repository_is_no_word_of_a_section(builds: Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path, published=True)
    dist = recipe.parent / "dist"
    published = (tiny_recipe.workspace(dist).folder(ACT_ORDER) / "README.md").read_text()
    commit(recipe, ACT_ORDER, published + "My own line.\n")
    with pytest.raises(CardError, match=r"(?s)differs outside of its sections.*My own line"):
        kept(recipe, "published", ACT_ORDER)
    commit(recipe, ACT_ORDER, with_words(published, "<script>alert(1)</script>"))
    with pytest.raises(CardError, match="a section cannot be part of a card"):
        kept(recipe, "published", ACT_ORDER)
    with pytest.raises(RecipeError, match="no branch 'nowhere'"):
        kept(recipe, "published", "nowhere")


@pytest.mark.parametrize(
    "arguments", [["--keep", "published", "--preview"], ["--keep", "published", "--set", "a=b"], ["--dry-run"]]
)
def test_options_that_do_not_fit_are_refused(recipe: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["card", str(recipe), *arguments])
    assert done.exit_code == 2


def test_the_help_names_what_the_exit_codes_mean(recipe: Path, readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 is more than an edited card; see `test_two_edits_do_not_replace_each_other` for a section's file."""
    runner, arguments = CliRunner(), ["card", str(recipe), "--dist", str(recipe.parent / "dist")]
    helped = " ".join(runner.invoke(app, ["card", "--help"], prog_name="packager").stdout.split())
    receipt = tiny_recipe.workspace(recipe.parent / "dist").receipt_path(MAIN)
    monkeypatch.setattr("packager.pipeline.workspace.LOCK_WAIT_S", 0)
    with tiny_recipe.workspace(recipe.parent / "dist").locked():
        running = runner.invoke(app, arguments)
    unpublished = runner.invoke(app, [*arguments, "--keep", "published"])
    edit(readme, "{{ no }}")
    refused = runner.invoke(app, [*arguments, "--keep", str(readme)])
    kept_receipt = receipt.read_text()
    receipt.write_text("{}")
    damaged = runner.invoke(app, arguments)
    receipt.write_text(kept_receipt)
    receipt.unlink()
    lacking = runner.invoke(app, arguments)
    for done, code, words in (
        (running, StateError.exit_code, "another build of the recipe is running"),
        (damaged, StateError.exit_code, "a receipt cannot be read"),
        (lacking, PublishError.exit_code, "a variant is not built and verified"),
        (unpublished, PublishError.exit_code, "no card is published"),
        (refused, CardError.exit_code, "a section cannot be part of a card"),
    ):
        assert (done.exit_code, words in helped) == (code, True), (words, done.stderr)
