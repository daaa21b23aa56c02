"""Measure tasks of lm-evaluation-harness on one model, and write the score of every document to a file.

Stand-alone, run as `python lm_eval_script.py JOB.json` where lm-eval, transformers and GPTQModel are installed;
`packager_isolated.py` describes how a job's result is written. A job is a JSON object: model_dir, is_quantized, device
("cpu" or "cuda"), output_dir, and `tasks`, each with
  name: of the task; without a definition, one of lm-eval's own.
  definition: the checked content of a recipe's definition, or null.
  builder, data: the format of its files ("json", "csv" or "parquet"), and their paths by "test" and "fewshot".
  metric, filter: whose values are wanted; its aggregation must be the mean, and more must be better.
  num_fewshot: null for the definition's.
  limit: the first documents that are taken, or null.
  chat: whether prompts are rendered in the model's chat template.
"""

import hashlib
import importlib
import random
import sys
from pathlib import Path
from typing import Any

# At the end of the path, so that our folder hides no package.
sys.path.append(str(Path(__file__).parent))
isolated: Any = importlib.import_module("packager_isolated")

PACKAGES = ("lm-eval", "datasets", "transformers", "gptqmodel", "tokenizers", "safetensors", "numpy", "torch")
# Logits of a batch in float32 are its largest tensor: 8 rows of 2,048 tokens and 32,000 entries take 2 GB.
BATCH_SIZE = 8
SEED = 1234  # lm-eval's own, of the drawing of examples
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def measure(job: dict[str, Any], output: Path) -> dict[str, Any]:  # noqa: ARG001 - only result.json is written
    """Load the model and run every task.

    Returns:
        The fields of result.json for a job that succeeded.
    """
    isolated.prepare_gptqmodel(job["device"])
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    folder = Path(job["model_dir"])
    digests = isolated.weights_digests(folder)
    model, kernel = load(torch, transformers, folder, job)
    sandbox_templates()
    tasks = [build_task(task) for task in job["tasks"]]
    huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    found = {task["name"]: run_task(torch, lm, built, task) for task, built in zip(job["tasks"], tasks, strict=True)}
    return {
        "tasks": found,
        "versions": isolated.versions(PACKAGES),
        "device": job["device"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel": kernel,
        "weights_sha256": digests,
    }


def load(torch: Any, transformers: Any, folder: Path, job: dict[str, Any]) -> tuple[Any, str]:
    """Open a model in transformers: a checkpoint with the kernel of its probe, the base model as it is.

    On a CPU both compute in float32. On a GPU the checkpoint computes in float16, the base model in its own dtype.
    """
    device = job["device"]
    options: dict[str, Any] = {"device_map": "cpu" if device == "cpu" else "cuda:0", "dtype": torch.float32}
    if device != "cpu":
        options["dtype"] = torch.float16 if job["is_quantized"] else "auto"
    if job["is_quantized"]:
        isolated.provide_pcre()
        importlib.import_module("gptqmodel")
        quantization = isolated.quantization_config(folder)
        backend = isolated.gptqmodel_backend(quantization, device)
        options["quantization_config"] = transformers.GPTQConfig(bits=quantization["bits"], backend=backend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
    ).eval()
    return model, isolated.kernel_name(model, isolated.GPTQMODEL_KERNELS) if job["is_quantized"] else ""


def sandbox_templates() -> None:
    """Give lm-eval a sandbox for the templates of tasks: its own environment runs any method of any value."""
    utils: Any = importlib.import_module("lm_eval.utils")
    sandbox: Any = importlib.import_module("jinja2.sandbox")
    before = utils.env
    utils.env = sandbox.ImmutableSandboxedEnvironment(
        undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    utils.env.filters["regex_replace"] = before.filters["regex_replace"]


def build_task(task: dict[str, Any]) -> Any:
    """Return lm-eval's object of a task, which reads the job's files and nothing else.

    Raises:
        ValueError: lm-eval has no single task of this name, or the metric is not the mean of what documents score.
    """
    api: Any = importlib.import_module("lm_eval.api.task")
    config = dict(task["definition"] or own_definition(task["name"]))
    data = task["data"]
    config.update(dict.fromkeys(_SPLITS))
    config.update(
        task=task["name"], dataset_path=task["builder"], dataset_name=None, dataset_kwargs={"data_files": dict(data)},
        test_split="test",
    )  # fmt: skip
    examples = dict(config.get("fewshot_config") or {})
    if "fewshot" in data:
        config["fewshot_split"] = "fewshot"
        examples.pop("split", None)
    config["fewshot_config"] = examples or None
    built = api.ConfigurableTask(config=config)
    if task["num_fewshot"] is not None:
        built.set_config(key="num_fewshot", value=task["num_fewshot"])
    elif built.get_config("num_fewshot") is None:
        built.set_config(key="num_fewshot", value=0)
    has_examples = "fewshot" in data or bool(examples.get("samples"))
    if built.get_config("num_fewshot") and not has_examples:
        raise ValueError(
            f"{task['name']} shows {built.get_config('num_fewshot')} examples: give a file of them, fewshot"
        )
    built.set_fewshot_seed(seed=SEED)
    metric = task["metric"]
    # Public only as the result of a run: whether it is a mean must be known before hours of computing.
    aggregation, better = built.aggregation().get(metric), built.higher_is_better().get(metric)
    if aggregation is None:
        raise ValueError(f"{task['name']} has no metric {metric}; it has {', '.join(built.aggregation())}")
    if getattr(aggregation, "__name__", "") != "mean" or better is not True:
        raise ValueError(f"{metric} of {task['name']} is not a mean of which more is better: it has no recovery")
    return built


def own_definition(name: str) -> dict[str, Any]:
    """Return the definition of a task that comes with lm-eval; its functions are those of the pinned package."""
    tasks: Any = importlib.import_module("lm_eval.tasks")
    loader: Any = importlib.import_module("lm_eval.tasks._yaml_loader")
    entry = tasks.TaskManager().task_index.get(name)
    if entry is None or entry.kind.name != "TASK" or entry.yaml_path is None:
        raise ValueError(f"lm-eval has no single task {name} that is written in YAML: name one, or give a definition")
    found: dict[str, Any] = loader.load_yaml(entry.yaml_path, resolve_func=True)
    if found.get("custom_dataset") is not None or found.get("unsafe_code"):
        raise ValueError(f"{name} makes its data by a program, or runs what a model writes: it is not run")
    return {key: value for key, value in found.items() if key not in ("tag", "group", "task_list")}


def run_task(torch: Any, lm: Any, built: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Return what each document of a task scores, and lm-eval's own mean of it.

    Raises:
        ValueError: the task has no such filter.
    """
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    numpy: Any = importlib.import_module("numpy")
    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    results = evaluator.evaluate(
        lm=lm,
        task_dict={"tasks": {task["name"]: built}},
        limit=task["limit"],
        apply_chat_template=task["chat"],
        fewshot_as_multiturn=task["chat"],
        bootstrap_iters=0,
    )
    samples = results["samples"][task["name"]]
    wanted = [sample for sample in samples if sample["filter"] == task["filter"]]
    if not wanted:
        filters = ", ".join(sorted({sample["filter"] for sample in samples}))
        raise ValueError(f"{task['name']} has no filter {task['filter']}; it has {filters}")
    wanted.sort(key=lambda sample: sample["doc_id"])
    prompts = hashlib.sha256("".join(sample["prompt_hash"] + sample["target_hash"] for sample in wanted).encode())
    return {
        "values": [float(sample[task["metric"]]) for sample in wanted],
        "prompts_sha256": prompts.hexdigest(),
        "score": float(results["results"][task["name"]][f"{task['metric']},{task['filter']}"]),
        "num_fewshot": int(built.get_config("num_fewshot")),
        "version": str(built.VERSION or ""),
    }


if __name__ == "__main__":
    sys.exit(isolated.main(measure, sys.argv[1:]))
