"""Open a folder as a base model, without its lock."""

import json
from pathlib import Path

from packager.inputs.base_model import SourceModel, read_source
from packager.model.architecture import architecture_of
from packager.model.describe import describe
from packager.model.safetensors_file import stored_tensors
from tests.known_models import FAMILIES, known_architecture


def open_folder(folder: Path, base_id: str = "test/model") -> SourceModel:
    config = json.loads((folder / "config.json").read_bytes())
    if config["model_type"] in FAMILIES:  # without transformers
        return read_source(folder, known_architecture(config, "config.json"), base_id=base_id)
    files = [stored_tensors(path) for path in folder.glob("*.safetensors")]
    stored = {name: tensor.info for tensors in files for name, tensor in tensors.items()}
    return read_source(folder, architecture_of(describe(folder, stored), "config.json"), base_id=base_id)
