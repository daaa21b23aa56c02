"""Troubles that still end wrong, each with the reason."""

from collections.abc import Mapping

KNOWN: Mapping[str, str] = {
    "a_configuration_that_is_not_there": "the refusal names no way out",
    "a_dataset_of_a_script": "a RuntimeError of datasets is not translated",
    "named_templates_without_a_default": "the refusal names no way out",
    "no_template_for_prompts": "the refusal names no file",
    "template_that_always_raises": "the refusal names no file",
    "templates_beside": "templates in a folder are not copied",
    "text_that_is_measured_too": "the refusal names no file",
}
