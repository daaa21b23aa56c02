"""Open a folder as a base model of one of the known families, without its lock."""

import json
from pathlib import Path

from packager.inputs.base_model import SourceModel, read_source
from packager.prove.audit.known_models import known_architecture


def open_folder(folder: Path, base_id: str = "test/model") -> SourceModel:
    config = json.loads((folder / "config.json").read_bytes())
    return read_source(folder, known_architecture(config, "config.json"), base_id=base_id)
