"""How people's folders lie: what stands beside a model, and what the Hub's programs make of it."""

import json

from tests.awkward.scene import PRIVATE, Case, ClashError, trouble


@trouble("either", "link", "snapshots")
def a_snapshot_of_the_cache(case: Case) -> None:
    """https://github.com/huggingface/huggingface_hub/issues/1388: every file is a link to ../../blobs."""
    home = case.folder / "models--tester--tiny"
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(case.model.iterdir())):
        if path.is_symlink() or not path.is_file():
            raise ClashError(path.name)
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    case.model.rmdir()
    case.recipe["base_model"]["path"] = snapshot.relative_to(case.folder).as_posix()


@trouble("refused", "config.json", "model.safetensors", "tokenizer.json")
def a_link_to_nowhere(case: Case) -> None:
    """https://github.com/debpalash/VoiceStudio/pull/1056: the link is there, the file is not."""
    path = case.model / "config.json"
    path.unlink()
    path.symlink_to("blobs/nothing")


@trouble("builds")
def a_link_inside(case: Case) -> None:
    """https://github.com/Layr-Labs/d-inference/issues/260: a link that stays in the folder."""
    path = case.model / "tokenizer.json"
    if path.is_symlink() or not path.exists():
        raise ClashError(path.name)
    path.rename(case.model / "tokenizer-v2.json")
    path.symlink_to("tokenizer-v2.json")


@trouble("builds")
def the_makers_original(case: Case) -> None:
    """https://github.com/karpathy/llama2.c/issues/266: Meta's own files in a folder."""
    case.write("original/consolidated.00.pth", b"\x80\x02}q\x00.")
    case.write("original/params.json", "{}")


@trouble("builds")
def models_of_other_runtimes(case: Case) -> None:
    """https://github.com/microsoft/onnxruntime/issues/27353: ONNX, GGUF and Core ML beside."""
    case.write("onnx/model_quantized.onnx", b"\x08\x07")
    case.write("model-q4_k_m.gguf", b"GGUF\x03\x00\x00\x00")
    case.write("coreml/text-generation/float32_model.mlpackage/Manifest.json", "{}")


@trouble("builds")
def what_a_download_left(case: Case) -> None:
    """https://github.com/huggingface/huggingface_hub/issues/2284: the files of `hf download --local-dir`."""
    case.write(".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    case.write(".cache/huggingface/download/config.json.metadata", "0123\n")
    case.write(".cache/huggingface/.gitignore", "*")


@trouble("builds")
def what_a_training_left(case: Case) -> None:
    """https://github.com/huggingface/peft/issues/309: states, logs and checkpoints, with the trainer's paths."""
    case.write("trainer_state.json", json.dumps({"best_model_checkpoint": f"{PRIVATE}/checkpoint-500"}))
    case.write("checkpoint-500/model.safetensors", b"\0" * 64)
    case.write("runs/events.out.tfevents.1700000000.node-7", b"\0")


@trouble("builds")
def what_a_finetuning_left(case: Case) -> None:
    """https://github.com/huggingface/peft/issues/1381: an adapter and the optimizer beside the merged weights."""
    case.write("adapter_config.json", json.dumps({"base_model_name_or_path": f"{PRIVATE}/base", "peft_type": "LORA"}))
    case.write("adapter_model.safetensors", b"\0" * 64)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        case.write(name, b"\x80\x02}q\x00.")


@trouble("refused", "adapter")
def an_adapter_as_a_base(case: Case) -> None:
    """https://github.com/arcee-ai/mergekit/issues/197: a LoRA's repository is named as the model."""
    for path in list(case.model.glob("*.safetensors")):
        path.unlink()
    if any(path.suffix in (".bin", ".pt", ".pth") for path in case.model.iterdir()):
        raise ClashError("weights")
    case.write("adapter_config.json", json.dumps({"base_model_name_or_path": "tester/base", "peft_type": "LORA"}))
    case.write("adapter_model.safetensors", b"\0" * 64)


@trouble("builds")
def a_readme_with_paths(case: Case) -> None:
    """https://github.com/nliaudat/esphome_ai_component/pull/156: a report names the machine."""
    case.write("README.md", f"---\nbase_model: {PRIVATE}/base\n---\nTrained in {PRIVATE}.\n")


@trouble("builds")
def names_of_other_scripts(case: Case) -> None:
    """https://github.com/baserun-ai/baserun-py/pull/101: names with spaces and letters beyond ASCII."""
    case.write("Notes für später (2).txt", "nichts")
    case.write("模型说明.md", "说明")


@trouble("builds")
def a_config_of_a_processor(case: Case) -> None:
    """https://github.com/modelscope/ms-swift/issues/8186: preprocessor_config.json of a model without images."""
    case.write("preprocessor_config.json", json.dumps({"processor_class": "MineProcessor"}))


@trouble("refused", "tokenizer")
def another_spelling_of_a_name(case: Case) -> None:
    """https://github.com/huggingface/transformers/pull/22228: a copy from a file system that knows no case."""
    path = case.model / "tokenizer.json"
    if not path.exists():
        raise ClashError(path.name)
    path.rename(case.model / "Tokenizer.json")


@trouble("refused", "base_model.path", "folder", "path")
def a_file_as_a_folder(case: Case) -> None:
    """https://github.com/huggingface/diffusers/issues/10863: the weights file is named as the model."""
    case.recipe["base_model"]["path"] = "model/model.safetensors"


@trouble("refused", "LICENSE")
def a_licence_that_is_not_there(case: Case) -> None:
    """https://github.com/huggingface/course/pull/833: the recipe names a file that the model does not have."""
    case.recipe["card"]["license"] = {"id": "apache-2.0", "base_files": ["LICENSE"]}


@trouble("builds")
def files_that_cannot_be_written(case: Case) -> None:
    """https://github.com/Fannovel16/comfyui_controlnet_aux/issues/113: a model folder that several share."""
    for path in case.model.iterdir():
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
            path.chmod(0o444)
