"""Stage 9, card: receipts to README.md.

Reads only the templates. Every figure comes from receipts; the page states what was not measured or not run. The texts
of recipes and receipts are values, never templates: they cannot run anything or change the page around them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplateSyntaxError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from packager.card import facts, markdown, mixed_bits, numbers, opening, task_scores
from packager.card.choice import CachedContext
from packager.card.metadata import metadata
from packager.card.own_templates import (
    CompiledTemplates,
    OwnTemplates,
    TemplateProblem,
    assigned_names,
    names_read,
    partials,
    place_of_problem,
    template_problems,
    with_own,
)
from packager.card.plot import Plot, in_words
from packager.card.raw_text import TextProblem, text_problems
from packager.card.sections import SECTIONS, marker_problems, section_block, section_text, split_page
from packager.card.speed import speed_rows
from packager.errors import CardError
from packager.model.compatibility import Verdict
from packager.model.front_matter import split_front_matter
from packager.model.runtimes import title_of
from packager.receipt import AUTOGPTQ_PINS, PICTURE_FILES, LoaderRunRecord, Provenance
from packager.recipe import CardStyle, Recipe
from packager.system.text import format_bytes, quoted
from packager.variant import MAIN

TEMPLATE = "model_card.md.j2"
# The page of each of the recipe's styles: its parts are the same, but for the order, the opening and the marks.
PAGES: Mapping[CardStyle, str] = {"plain": TEMPLATE, "late-2023": "model_card_late_2023.md.j2"}
HUB = "https://huggingface.co"
# Errors of a recipe's templates, which the plan looks for.
CANNOT_FILL_IN = "the card's template cannot be filled in"
MALFORMED = "a template is malformed"
NOT_INCLUDED = "a template includes a file that is not a template of the card"
NOT_PUBLISHABLE = "the recipe's templates make a page that cannot be published"


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """What a branch's tokenizer does with a prompt.

    Attributes:
        has_template: it has a chat template.
        before: the special tokens that it puts before every text by itself, as a text.
    """

    has_template: bool = True
    before: str = ""


@dataclass(frozen=True, kw_only=True)
class CardTexts:
    """The texts of the markdown files that a recipe's card names; "" where it names none."""

    header: str = ""
    footer: str = ""
    original_card: str = ""


def render_card(
    recipe: Recipe,
    texts: CardTexts,
    receipts: Sequence[Provenance],
    model_type: str,
    branch: str,
    *,
    expectations: Mapping[str, Sequence[Verdict]] | None = None,
    prompting: Prompting = Prompting(),
    contexts: Sequence[CachedContext] = (),
    plot: Plot | None = None,
    own: OwnTemplates | None = None,
    runs: Mapping[str, Sequence[LoaderRunRecord]] = MappingProxyType({}),
    is_preview: bool = False,
) -> str:
    """Return the README.md of one branch.

    Args:
        recipe: the repository, the variants and the card's texts.
        texts: header, footer and original card, included as they are.
        receipts: one per variant, in the recipe's order.
        model_type: from the base model's config.json, e.g. "llama".
        branch: the branch of this README; the commands name it.
        expectations: the predictions of `compatibility.verdicts` by branch; shown apart from the runs.
        prompting: of the branch's tokenizer; the examples follow it.
        contexts: for which the page says how much memory a branch takes; see `cached_contexts`.
        plot: what the picture shows that lies beside the page; None where there is none.
        own: the recipe's templates, which replace parts of the page, and the words of its sections.
        runs: time and memory of the loaders by branch; shown where the recipe asks for it.
        is_preview: nothing is built: the receipts have what a plan knows, and the page says so.

    Raises:
        CardError: the receipts are not this recipe's, a text cannot be part of a page, or the templates have a mistake.
    """
    _check_receipts(recipe, receipts, branch)
    _check_texts(texts)
    expectations = expectations or {}
    own_receipt = next(receipt for receipt in receipts if receipt.branch == branch)
    front = markdown.front_matter(
        metadata(recipe, receipts, model_type, expectations.get(branch, ())),
        {"model-index": index} if (index := task_scores.model_index(recipe, own_receipt)) else {},
    )
    template = recipe.card.prompt_template.template
    context = {
        **_context(recipe, texts, receipts, branch, expectations, contexts),
        "is_preview": is_preview,
        "speed": speed_rows(receipts, runs) if recipe.card.speed and not is_preview else (),
        "prompting": prompting,
        "picture": PICTURE_FILES if plot is not None else (),
        "picture_in_words": in_words(plot) if plot is not None else "",
        "writes_start": bool(prompting.before) and template.lstrip().startswith(prompting.before),
    }
    name, written = PAGES[recipe.card.style], own.sections if own is not None else {}
    body = _rendered(name, context | {"sections": _sections(written)}, own)
    if own is not None:
        none = {"header": "", "footer": "", "original_card": "", "sections": _sections({})}
        _check_own_page(_rendered(name, {**context, **none}, own), own)
    page = front + "\n" + markdown.tidy(body)
    split_page(page, f"the card of {branch}")  # raises: a template has a marker
    return page


def _sections(written: Mapping[str, str]) -> dict[str, str]:
    return {name: section_block(name, section_text(written.get(name, ""))) for name in SECTIONS}


def _rendered(page: str, context: Mapping[str, object], own: OwnTemplates | None) -> str:
    folder = templates_dir()
    environment = _environment(folder)
    try:
        template = (with_own(environment, own) if own is not None else environment).get_template(page)
        return template.render(context)
    except CardError as error:
        raise CardError(error.what, where=_lines_of(error)[-1], why=error.why, hint=error.hint) from error
    except (
        TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        raise _translated(error, folder, own) from error


def _check_own_page(page: str, own: OwnTemplates) -> None:
    """Raise CardError if the recipe's templates made a page that changes itself or the reader's browser."""
    if found := text_problems(page):
        (where, why), *others = (place_of_problem(own, problem, page) for problem in found)
        why = "\n       ".join((why, *(f"{place}: {message}" for place, message in others)))
        raise CardError(NOT_PUBLISHABLE, where=where, why=why, hint=found[0].hint)


def own_template_problems(own: OwnTemplates) -> tuple[TemplateProblem, ...]:
    """Return what is wrong with a recipe's templates as far as it is seen before a page is rendered."""
    folder = templates_dir()
    return tuple(template_problems(_environment(folder), own, partials(folder)))


def given_names(own: OwnTemplates) -> frozenset[str]:
    """Return the names to which a recipe's templates or ours give a value somewhere."""
    folder = templates_dir()
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.j2"))]
    return assigned_names(_environment(folder), (*texts, *own.texts.values()))


def own_names(own: OwnTemplates) -> frozenset[str]:
    """Return the names to which a recipe's templates give a value somewhere."""
    return assigned_names(_environment(templates_dir()), own.texts.values())


def names_read_at(own: OwnTemplates, where: str) -> frozenset[str] | None:
    """Return the names that a line of a recipe's templates reads, None if `where`, `file:line`, is none of them."""
    path, _, line = where.rpartition(":")
    for name, text in own.texts.items():
        if path == own.path(name):
            return names_read(_environment(templates_dir()), text, int(line))
    return None


def templates_dir() -> Path:
    """Return the templates' folder: beside the package in a checkout, inside it when installed.

    Raises:
        CardError: there is none.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / TEMPLATE).is_file():
            return folder
    raise CardError(
        "the card's templates are missing",
        where=str(package / "templates" / TEMPLATE),
        hint="install the package again",
    )


def _check_receipts(recipe: Recipe, receipts: Sequence[Provenance], branch: str) -> None:
    expected = [variant.branch for variant in recipe.expanded_variants()]
    given = [provenance.branch for provenance in receipts]
    if given != expected:
        raise CardError(
            "the receipts are not the recipe's variants",
            where=recipe.repository.id,
            why=f"expected {', '.join(expected)}; got {', '.join(given) or 'none'}",
            hint="build every variant of the recipe first",
        )
    strangers = {provenance.repository for provenance in receipts} - {recipe.repository.id}
    strangers |= {provenance.layout for provenance in receipts} - {recipe.repository.layout}
    if strangers:
        raise CardError("the receipts are another repository's", where=recipe.repository.id, why=", ".join(strangers))
    if branch not in expected:
        raise CardError("there is no such branch", where=branch, why=f"the recipe has {', '.join(expected)}")


def texts_problems(texts: CardTexts) -> Iterator[tuple[str, TextProblem]]:
    """Yield why a text cannot be part of a card: the text's name and the problem, with the line of the file."""
    for name, body, above in texts_of_page(texts):
        for problem in (*text_problems(body), *marker_problems(body)):
            yield name, replace(problem, line=problem.line + above)


def texts_of_page(texts: CardTexts) -> Iterator[tuple[str, str, int]]:
    """Yield the name of each text, what of it the page has, and the lines above that: front matter of a base model."""
    for name, text in asdict(texts).items():
        body = split_front_matter(text)[1] if name == "original_card" else text
        yield name, body, text.count("\n") - body.count("\n")


def _check_texts(texts: CardTexts) -> None:
    if found := list(texts_problems(texts)):
        raise CardError(
            "a text cannot be part of a card",
            why="\n       ".join(f"card.{name}, line {problem.line}: {problem.message}" for name, problem in found),
            hint=found[0][1].hint,
        )


def _context(
    recipe: Recipe,
    texts: CardTexts,
    receipts: Sequence[Provenance],
    branch: str,
    expectations: Mapping[str, Sequence[Verdict]],
    contexts: Sequence[CachedContext],
) -> dict[str, object]:
    branches = facts.branch_facts(recipe, receipts, contexts)
    loaders = facts.loader_names(recipe, receipts)
    here = next(facts for facts in branches if facts.branch == branch)
    others = [facts for facts in branches if facts.branch != MAIN]
    separate = recipe.repository.layout == "repos"
    offers = facts.offers(branches, expectations)
    return {
        "recipe": recipe,
        "card": recipe.card,
        "branches": branches,
        "here": here,
        "separate": separate,
        "noun": "variant" if separate else "branch",
        "main": MAIN,
        # On main, the examples of how to fetch a branch name one that is not taken by default anyway.
        "example": (others or [here])[0] if branch == MAIN and not separate else here,
        "repository": recipe.repository.id,
        "repository_name": recipe.repository.id.split("/")[1],
        "hub": HUB,
        "autogptq_pins": AUTOGPTQ_PINS,
        # The page links to these itself: a recipe that names them too would have them twice.
        "own_links": {
            f"{HUB}/{recipe.repository.id}",
            *((f"{HUB}/{recipe.base_model.id}",) if recipe.base_model.revision is not None else ()),
        },
        "loaders": loaders,
        "loader_titles": {name: title_of(name) for name in loaders},
        "expectations": facts.expectation_rows(branches, expectations),
        "offers": offers,
        "contexts": contexts,
        "unit": numbers.size_unit(
            max(size for each in branches for size in (each.provenance.weights_bytes, *each.contexts))
        ),
        **opening.choice_values(branches, offers, expectations, contexts),
        "examples": facts.examples(here, offers),
        "license_files": tuple(
            Path(name).name for name in (*recipe.card.license.files, *recipe.card.license.base_files)
        ),
        "header": texts.header.strip("\n"),
        "footer": texts.footer.strip("\n"),
        "original_card": split_front_matter(texts.original_card)[1].strip("\n"),
    }


@cache  # compiling the templates takes longer than rendering a card; an edited template is still read again
def _environment(folder: Path) -> ImmutableSandboxedEnvironment:
    # Markdown is not HTML: values go through the filters below, HTML escaping would corrupt code blocks.
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        bytecode_cache=CompiledTemplates(),
    )
    environment.filters.update(
        inline=markdown.inline,
        code=markdown.code_span,
        fence=markdown.fence,
        link=markdown.link,
        link_target=markdown.link_target,
        python_string=markdown.python_string,
        shell_word=markdown.shell_word,
        size=format_bytes,
        short_size=numbers.short_size,
        in_unit=numbers.in_unit,
        attribute=markdown.attribute,
        html_text=markdown.html_text,
        percent=numbers.percent,
        digits=numbers.digits,
        figure=facts.figure,
        bits_in_words=mixed_bits.bits_in_words,
        chosen_bits=mixed_bits.chosen_bits,
        runtimes=opening.runtimes_of,
        by_parameter=facts.by_parameter,
        by_base=facts.by_base,
        pinned=facts.pinned,
        by_field=facts.by_field,
        by_experts=facts.by_experts,
        task_figure=task_scores.task_figure,
        by_task_setting=task_scores.by_task_setting,
        loader_rows=facts.loader_rows,
        loader_runs=facts.loader_runs,
    )
    return environment


def _lines_of(error: BaseException) -> list[str]:
    """Return `template:line` of the lines an error passed through, the innermost last: of a recipe's, else of ours."""
    own: list[str] = []
    built_in: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            (built_in if Path(file).is_absolute() else own).append(f"{_shown(file)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return own or built_in or [""]


def _shown(file: str) -> str:
    # Built-in templates have absolute paths; those of a recipe are named as the recipe names them.
    return Path(file).name if Path(file).is_absolute() else file


def _translated(error: Exception, folder: Path, own: OwnTemplates | None) -> CardError:
    hint, lines = "this is a mistake in the template, not in a text or a figure", _lines_of(error)
    if isinstance(error, TemplateSyntaxError):
        file = _shown(error.filename or str(error.name))
        return CardError(MALFORMED, where=f"{file}:{error.lineno}", why=str(error.message), hint=hint)
    if isinstance(error, TemplateNotFound):
        if own is not None and lines[-1].rpartition(":")[0] in {own.path(name) for name in own.texts}:
            hint = "include only the card's templates and those of the folder that card.templates names"
            return CardError(NOT_INCLUDED, where=lines[-1], why=quoted(str(error.message)), hint=hint)
        return CardError("a template is missing", where=str(folder / str(error.name)), hint="install the package again")
    if isinstance(error, RecursionError):
        # The innermost line is where the stack happens to end.
        why = "it includes or calls itself without end, or its parts are nested too deeply"
        return CardError(MALFORMED, where=lines[0] or (own.folder if own is not None else ""), why=why, hint=hint)
    if isinstance(error, SyntaxError):  # of the Python that a template is compiled to
        where = _shown(error.filename or "")
        return CardError(MALFORMED, where=where, why=f"its parts are nested too deeply: {error.msg}", hint=hint)
    why = str(error) or "it takes more memory than there is"  # the text of a MemoryError is empty
    return CardError(CANNOT_FILL_IN, where=lines[-1], why=why, hint=hint)
