"""Stands for lm-evaluation-harness in tests: each document has a score by its number and by what the model is.

The file is a script, run like `lm_eval_script.py`. It is not confined: a
file `defect.txt` in the folder of all work says what is wrong, and `asked.txt` there gets the models' names.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def documents(job: dict[str, Any], task: dict[str, Any]) -> list[float]:
    """Return the scores: the base model knows three of four documents, a checkpoint half of those."""
    count = sum(len(Path(path).read_text().splitlines()) for path in task["data"]["test"])
    known = [number for number in range(count if task["limit"] is None else task["limit"]) if number % 4]
    right = set(known[::2]) if job["is_quantized"] else set(known)
    return [float(number in right) for number in range(max(known) + 1)]


def main(path: Path) -> None:
    """Write result.json of one job."""
    job = json.loads(path.read_text())
    output, folder = Path(job["output_dir"]), Path(job["model_dir"])
    marks = output.parents[3]
    with (marks / "asked.txt").open("a") as stream:
        stream.write(f"{folder.name}\n")
    defect = (marks / "defect.txt").read_text() if (marks / "defect.txt").exists() else ""
    if defect == "dies":
        print("a line of its own", file=sys.stderr)
        sys.exit(3)
    tasks: dict[str, dict[str, Any]] = {}
    for task in job["tasks"]:
        values = documents(job, task)
        asked = json.dumps([task["definition"], task["num_fewshot"], defect == "asks otherwise" and folder.name])
        tasks[task["name"]] = {
            "values": [2.0, *values] if defect == "scores two" else values,
            "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
            "score": sum(values) / len(values) + (0.01 if defect == "another mean" else 0),
            "num_fewshot": task["num_fewshot"] or 0,
            "version": "1",
        }
    if defect == "scores two":
        for found in tasks.values():
            found["score"] = sum(found["values"]) / len(found["values"])
    if defect == "forgets":
        tasks.popitem()
    digests = {
        file.name: "" if defect == "reads otherwise" else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }
    result: dict[str, Any] = {
        "status": "ok", "tasks": tasks, "versions": {"lm-eval": "0.4.13", "torch": "2"}, "device": job["device"],
        "dtype": "float32", "kernel": "toy" if job["is_quantized"] else "", "weights_sha256": digests,
    }  # fmt: skip
    if defect == "fails":
        result = {"status": "error", "type": "ValueError", "message": "no such metric", "traceback": "a\nb"}
    (output / "result.json").write_text("{" if defect == "damaged" else json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
