"""What is known of the model in a folder: from its base model's lock, its record, or transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from packager.errors import PlanError, SourceError
from packager.model.architecture import Architecture, architecture_of
from packager.model.config_values import DTYPES
from packager.model.lock import LockedModel
from packager.model.rope import misread
from packager.prove.audit.files import JsonObject, as_object
from packager.prove.audit.finding import Findings
from packager.receipt import CONFIG, PROVENANCE
from packager.system.text import shown

# Describes the model of a config.json, given with the file's name. Raises PlanError for values that no model has, and
# SourceError for a model that it does not know.
Describe = Callable[[JsonObject, str], LockedModel]


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """What is known of a model; None or empty where it is not.

    Attributes:
        architecture: of the base model.
        dtype: of most weights that are not quantized, safetensors spelling.
        is_recorded: the architecture is that of the base model's files, with their dtypes.
    """

    architecture: Architecture | None = None
    dtype: str | None = None
    is_recorded: bool = False

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """The dtypes of the base model's tensors, by name."""
        recorded = self.architecture if self.is_recorded else None
        return {} if recorded is None else {tensor.name: tensor.dtype for tensor in recorded.tensors}


def read_model(
    documents: Mapping[str, object], findings: Findings, architecture: Architecture | None, describe: Describe | None
) -> KnownModel:
    """Return what is known of the model of a folder.

    Args:
        documents: the folder's JSON files.
        findings: what is wrong with config.json is added.
        architecture: from the base model's lock; None takes the description in provenance.json.
        describe: describes the model of a config.json, given with the file's name, where there is no description.
    """
    config = as_object(documents.get(CONFIG))
    if config is None:
        return KnownModel()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    exact = architecture or _recorded(as_object(documents.get(PROVENANCE)), plain, findings)
    if exact is not None:
        _check_rope(plain, findings)
        return KnownModel(architecture=exact, dtype=exact.dtype, is_recorded=True)
    why = f"provenance.json does not describe {shown(config.get('model_type'))}, and transformers is not installed"
    if describe is not None:
        try:
            found = architecture_of(describe(plain, CONFIG), CONFIG)
        except PlanError as error:
            findings.add("config-value", CONFIG, error.why)
            return KnownModel(dtype=_dtype(config))
        except RecursionError:
            findings.add("config-value", CONFIG, "a value is nested too deeply")
            return KnownModel(dtype=_dtype(config))
        except SourceError as error:
            why = ": ".join(filter(None, (error.what, error.why)))
        else:
            _check_rope(plain, findings)
            return KnownModel(architecture=found, dtype=found.dtype)
    findings.add("architecture-unknown", f"{CONFIG}: model_type", why)
    dtype = _dtype(config)
    if dtype is None:
        findings.add("config-value", CONFIG, f"torch_dtype or dtype must be one of {', '.join(DTYPES)}")
    return KnownModel(dtype=dtype)


def _recorded(provenance: JsonObject | None, config: JsonObject, findings: Findings) -> Architecture | None:
    """Return the architecture that provenance.json describes; None if it has none, or one that cannot be."""
    described = as_object(provenance.get("model")) if provenance is not None else None
    if not described:
        return None
    try:
        return architecture_of(LockedModel.model_validate({**described, "config": config}), PROVENANCE)
    except ValidationError as error:
        problem = error.errors()[0]
        findings.add("provenance-invalid", f"{PROVENANCE}: model", f"{problem['loc']}: {problem['msg']}")
    except PlanError as error:
        findings.add("provenance-invalid", f"{PROVENANCE}: model", error.why)
    return None


def _check_rope(config: JsonObject, findings: Findings) -> None:
    if misread(config):
        why = "runtimes before transformers 5 do not read the rotary embedding that transformers 5 reads"
        findings.add("rope-spelling", f"{CONFIG}: rope_parameters", why)


def _dtype(config: JsonObject) -> str | None:
    """Return the dtype, which transformers 4 calls torch_dtype and transformers 5 dtype."""
    for value in (config.get("torch_dtype"), config.get("dtype")):
        if isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
    return None
