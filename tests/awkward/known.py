"""Troubles that still end wrong, each with the reason."""

from collections.abc import Mapping

KNOWN: Mapping[str, str] = {
    "a_configuration_that_is_not_there": "the refusal names no way out",
    "a_dataset_of_a_script": "a RuntimeError of datasets is not translated",
    "a_file_as_a_folder": "the refusal names no way out",
    "a_licence_that_is_not_there": "the refusal names no way out",
    "a_transposed_tensor": "the refusal names no way out",
    "an_infinite_norm": "the refusal names no file",
    "attention_of_a_gpu": "the branch asks for flash attention as its base does",
    "dtype_that_is_automatic": "the refusal names no way out",
    "dtype_with_its_module": "the refusal names no way out",
    "ids_that_are_text": "the refusal names no way out",
    "named_templates_without_a_default": "the refusal names no way out",
    "no_template_for_prompts": "the refusal names no file",
    "rope_of_an_unknown_type": "the refusal names no way out",
    "rows_longer_than_positions": "the refusal names no way out",
    "template_that_always_raises": "the refusal names no file",
    "templates_beside": "templates in a folder are not copied",
    "text_that_is_measured_too": "the refusal names no file",
    "vocabulary_that_is_too_small": "the refusal names no way out",
}
