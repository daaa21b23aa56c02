"""Compare a card's prompt template with the model's chat template: the 2023 cards showed formats of other models."""

import json
from collections.abc import Iterator

from packager.model.lock import Lock, LockedPrompt
from packager.recipe.parsed_recipe import Loc, ParsedRecipe
from packager.recipe.yaml import LocatedProblem

_MOST_SHOWN = 3000  # characters of a template
COPY_PROMPT = (
    "write the rendered text into card.prompt_template.template; {date} stands for today's date where the template "
    "asks for it"
)


def prompt_difference(given: str, prompt: LockedPrompt) -> str:
    """Return why a card's prompt template is not the model's; "" if it is.

    The template may leave out the token that the tokenizer puts before every text: a reader who tokenizes the prompt
    gets it. No other token may be left out, and blanks at both ends are not compared.

    Args:
        given: the recipe's `card.prompt_template.template`.
        prompt: what the chat template renders.
    """
    without = prompt.text.removeprefix(prompt.added).strip()
    if given.strip() in (without, prompt.text.strip()):
        return ""
    return f"the card has {_quoted(given.strip())}, the tokenizer renders {_quoted(without)}"


def prompt_problems(parsed: ParsedRecipe, lock: Lock) -> Iterator[LocatedProblem]:
    """Yield how the card differs from the prompt that its lock holds.

    A lock made of config.json alone has none: the build compares the card with the tokenizer.
    """
    if lock.prompt is None or parsed.keys("card") is None:
        return
    template: Loc = ("card", "prompt_template", "template")
    given, system_prompt = parsed.text(*template), parsed.text("card", "system_prompt")
    if system_prompt != lock.prompt.system_prompt:
        message = "the lock's prompt was rendered with another card.system_prompt"
        hint = "make the lock anew, with the command: packager lock, and the recipe"
        yield LocatedProblem(parsed.at("card", "system_prompt"), message, hint)
    elif given is not None and (why := prompt_difference(given, lock.prompt)):
        message = f"card.prompt_template.template is not the model's chat template: {why}"
        yield LocatedProblem(parsed.at(*template), message, COPY_PROMPT)


def _quoted(text: str) -> str:
    """Return a text as YAML takes it in double quotes."""
    return json.dumps(text[:_MOST_SHOWN], ensure_ascii=False) + (" and more" if len(text) > _MOST_SHOWN else "")
