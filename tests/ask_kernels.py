"""Ask the kernels of GPTQModel or AutoGPTQ what they take: `python ask_kernels.py PROGRAM PROBES QUESTIONS.json`.

A program of its own, run by the Python of that program's environment; PROBES is the folder of packager_isolated.py. A
question is [bits, group_size, desc_act, sym, in_features, out_features]. The answers, printed as JSON, are lists by
kernel, of a reason or "" for each question. No GPU is needed: what is asked are checks of parameters and shapes.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ask = Callable[[int, int, bool, bool, int, int], str]


def gptqmodel_kernels(isolated: Any) -> dict[str, Ask]:
    """Return what asks Marlin, as asked for and as chosen without being asked for, and the kernel of any machine."""
    isolated.prepare_gptqmodel("cpu")
    torch: Any = importlib.import_module("torch")
    isolated.provide_pcre()
    marlin: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.marlin")
    plain: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    backend: Any = importlib.import_module("gptqmodel.utils.backend").BACKEND
    marlin.marlin_import_exception = None  # "Marlin kernel requires CUDA": shapes are checked without

    def checked(kernel: Any) -> Ask:
        def ask(bits: int, group_size: int, desc_act: bool, sym: bool, rows: int, columns: int) -> str:
            _, error = kernel._validate(
                bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, in_features=rows, out_features=columns,
                pack_dtype=torch.int32, dtype=torch.float16,
            )  # fmt: skip
            return str(error or "")

        return ask

    def chosen(bits: int, group_size: int, desc_act: bool, sym: bool, rows: int, columns: int) -> str:
        try:
            marlin.MarlinLinear(
                bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, in_features=rows, out_features=columns,
                backend=backend.AUTO,
            )  # fmt: skip
        except NotImplementedError as error:
            return str(error)
        return ""

    return {"marlin": checked(marlin.MarlinLinear), "marlin-chosen": chosen, "torch": checked(plain.TorchLinear)}


def autogptq_kernels(_: Any) -> dict[str, Ask]:
    """Return what asks the kernel that AutoGPTQ takes on a CPU, by a product, and those it makes on CUDA only."""
    torch: Any = importlib.import_module("torch")
    choose: Any = importlib.import_module("auto_gptq.utils.import_utils").dynamically_import_QuantLinear

    def plain(bits: int, group_size: int, desc_act: bool, _sym: bool, rows: int, columns: int) -> str:
        kernel = choose(use_triton=False, desc_act=desc_act, group_size=group_size, bits=bits)
        try:
            linear = kernel(bits, group_size, rows, columns, False, weight_dtype=torch.float32)
            linear(torch.zeros(1, rows))
        except (NotImplementedError, RuntimeError) as error:
            return str(error)
        return ""

    def made(name: str) -> Ask:
        kernel: Any = importlib.import_module(f"auto_gptq.nn_modules.qlinear.qlinear_{name}").QuantLinear

        def by(bits: int, group_size: int, _desc_act: bool, _sym: bool, rows: int, columns: int) -> str:
            try:
                kernel(bits, group_size, rows, columns, False)
            except (NotImplementedError, ValueError, AssertionError) as error:
                return str(error) or "an assertion of the shape"
            return ""

        return by

    return {"plain": plain, **{name: made(name) for name in ("exllama", "exllamav2", "triton")}}


def main(program: str, probes: str, path: str) -> None:
    """Print the answers to the questions in a file."""
    sys.path.append(probes)
    isolated: Any = importlib.import_module("packager_isolated")
    questions = json.loads(Path(path).read_text(encoding="utf-8"))
    kernels = {"gptqmodel": gptqmodel_kernels, "autogptq": autogptq_kernels}[program](isolated)
    print(json.dumps({name: [ask(*question) for question in questions] for name, ask in kernels.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
