"""The digest that a recipe had before recipes had keys that it does not use."""

from packager.receipt import digest_of
from packager.recipe import Recipe

LATER_KEYS = {
    "card": ("templates", "style", "speed", "banner"),
    "repository": ("plugin",),
    "evaluation": ("tasks",),
}
LATER_PARAMETERS = ("refine", "target_correction", "effort")


def earlier_digest(recipe: Recipe) -> str:
    """Return the digest by the content of the first recipes; of a recipe that uses none of the later keys."""
    content = recipe.model_dump(mode="json")
    del content["quality"]
    for section, keys in LATER_KEYS.items():
        for key in keys:
            del content[section][key]
    for parameters in (content["defaults"], *content["variants"]):
        for key in LATER_PARAMETERS:
            del parameters[key]
    for variant in content["variants"]:
        del variant["publish_below_floor"], variant["mix"]
    return digest_of(content)
