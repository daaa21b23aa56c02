"""A base model's weights in another folder, as links, for programs that read a folder of transformers."""

import json
from pathlib import Path

from packager.inputs.base_model import SourceModel
from packager.receipt import INDEX_SUFFIX


def link_weights(source: SourceModel, folder: Path) -> dict[Path, str]:
    """Link the weights files into a folder, and write the index that transformers looks for where there are several.

    Returns:
        The name of each weights file in the folder.
    """
    names = {path: path.name for path in sorted({stored.path for stored in source.tensors.values()})}
    if len(names) == 1:
        names = dict.fromkeys(names, "model.safetensors")
    else:
        weight_map = {name: names[stored.path] for name, stored in source.tensors.items()}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"model{INDEX_SUFFIX}").write_text(index, encoding="utf-8")
    for path, name in names.items():
        (folder / name).symlink_to(path.resolve())
    return names
