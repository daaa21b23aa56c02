"""Write a recipe as YAML with comments, for a person to read and change, and the whole recipe that a branch holds."""

import io
from collections.abc import Mapping
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from packager.recipe import Recipe

_COMMENTS: Final[Mapping[str, str]] = {
    "repository": "Where the variants go: target local is a git repository in dist/; hub is the Hugging Face Hub.",
    "base_model": "The model that is quantized. The lock beside this file holds what it says of itself.",
    "calibration": "The text that the quantizer is calibrated on: the nearer to the model's later use, the better.",
    "evaluation": "Held-out text, on which the figures of the card are measured.",
    "defaults": "Parameters of every variant that does not give its own.",
    "variants": "One branch each, named by its parameters unless it gives `branch`; `packager plan` shows the names.",
    "loaders": "The runtimes that must open every variant, and those that are tried where a machine can run them.",
    "card": "The words of the model card; every figure on it is measured.",
}

_HEADER: Final = (
    "# The recipe of these files, as packager read it: defaults and inherited keys are written out, comments are not\n"
    "# kept. Files that it names lie in the maintainer's folder; recipe.lock.json is its lock.\n"
)


def draft_text(recipe: Mapping[str, Any], *, schema: str = "") -> str:
    """Return a recipe file.

    Args:
        recipe: the file's keys and values: texts, numbers, lists and mappings.
        schema: the path or address of the JSON schema, for editors; "" for no such line.
    """
    document = _node(recipe)
    for key, comment in _COMMENTS.items():
        if key in document:
            document.yaml_set_comment_before_after_key(key, before=f"\n{comment}")
    for entry in document.get("variants", ()):
        entry.fa.set_flow_style()
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(document, stream)
    # ruamel.yaml writes `# ` on an empty line of a comment.
    lines = ["" if line.strip() == "#" else line for line in stream.getvalue().splitlines()]
    editors = [f"# yaml-language-server: $schema={schema}"] if schema else []
    return "\n".join([*editors, *lines, ""])


def branch_recipe(recipe: Recipe) -> str:
    """Return the recipe file of a branch: the whole recipe, with what it inherits and with defaults.

    Its canonical JSON has the digest that provenance.json states. What is one machine's is left out: a base model's
    folder elsewhere, and the address of a remote in the file system.
    """
    content = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.base_model.path is not None:
        content["base_model"]["path"] = recipe.base_model.public_path
    if (recipe.repository.url or "").startswith("file:"):
        del content["repository"]["url"]
    for key in ("evaluation", "quality"):
        content[key] = {name: value for name, value in content[key].items() if value != []}
        if not content[key]:
            del content[key]
    return _HEADER + draft_text(content)


def _node(value: Any) -> Any:
    if isinstance(value, Mapping):
        node = CommentedMap()
        for key, item in value.items():
            node[key] = _node(item)
        return node
    if isinstance(value, list | tuple):
        sequence = CommentedSeq([_node(item) for item in value])
        if all(not isinstance(item, Mapping) and len(str(item)) < 40 for item in value):
            sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    return value
