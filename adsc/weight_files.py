"""What a checkpoint's folder holds instead of safetensors that transformers loads, in a sentence.

Looked at before anything is loaded: the loaders' own errors come late, and name neither the file
nor what to do. Nothing is unpickled, converted or fetched here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs.github.com/spec/"
_ORIGINALS = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava_mpt": "llava-hf/llava-1.5-7b-hf",
}
"""`model_type` in the layout of LLaVA's own code -> a checkpoint in transformers' layout."""
_CLASS = re.compile(r"Llava(Llama|Mistral|Qwen|M[Pp][Tt])ForCausalLM")
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
_HEADER = 8  # bytes of a safetensors file that say how long its header is


def original_layout(config: Mapping[str, Any]) -> str | None:
    """What to use instead of a checkpoint of LLaVA's own code; None where it is none."""
    kind = str(config.get("model_type"))
    classes = [found for name in config.get("architectures") or () if (found := _CLASS.match(name))]
    if kind not in _ORIGINALS and not classes:
        return None
    if kind not in _ORIGINALS:
        kind = f"llava_{classes[0][1].lower()}"
    return _sentence(kind, _ORIGINALS[kind])


def original_name(name: str) -> str | None:
    """The same, of a hub id whose layout is known by its owner."""
    if not name.startswith("liuhaotian/llava"):
        return None
    larger = "llava-hf/llava-1.5-13b-hf" if "13b" in name else "llava-hf/llava-1.5-7b-hf"
    return _sentence("llava_llama", larger)


def problem(folder: Path) -> str | None:
    """Why a folder can't be loaded as it is, and what to do; None where nothing is seen."""
    if not folder.is_dir():
        return original_name(str(folder))
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        if path.suffix in (".safetensors", ".json", ".model") and _head(path).startswith(_LFS):
            return (
                f"{path} is a git-LFS pointer, not the file itself: run `git lfs pull` "
                "there, or fetch the checkpoint again"
            )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        return _no_weights(folder)
    if other := _config_problem(folder / "config.json"):
        return other
    weights = [path for path in files if path.suffix == ".safetensors"]
    for path in weights:
        if why := _cut_off(path):
            return f"{path} is not a whole safetensors file ({why}): fetch it again"
    if not weights:
        return _no_weights(folder)
    return None


def _sentence(kind: str, use: str) -> str:
    return (
        f"it is a checkpoint of LLaVA's own code ({kind}), which transformers does not load: use "
        f"one in transformers' layout, such as {use}, or convert yours with transformers' "
        "convert_llava_weights_to_hf.py"
    )


def _config_problem(path: Path) -> str | None:
    if not path.is_file():
        return f"there is no {path}"
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is not JSON ({error}): fetch it again"
    return original_layout(config) if isinstance(config, dict) else f"{path} holds no object"


def _no_weights(folder: Path) -> str | None:
    others = sorted({path.name for pattern in _OTHERS for path in folder.glob(pattern)})
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a model: load its base and put the adapter on it"
    if not others:
        return f"{folder} holds no weights: there is no .safetensors file"
    return (
        f"{folder} holds its weights as {', '.join(others[:3])}: only safetensors are loaded, for "
        "pickles run code; where you trust it, save it again with `save_pretrained`"
    )


def _cut_off(path: Path) -> str | None:
    size, head = path.stat().st_size, _head(path)
    if size < _HEADER:
        return f"{size} bytes"
    length = int.from_bytes(head[:_HEADER], "little")
    if _HEADER + length > size or head[_HEADER : _HEADER + 1] != b"{":
        return f"a header of {length} bytes in {size}, or none"
    with path.open("rb") as file:
        file.seek(_HEADER)
        try:
            tensors = json.loads(file.read(length))
            end = max(
                (it["data_offsets"][1] for n, it in tensors.items() if n[:2] != "__"), default=0
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "its header can't be read"
    if _HEADER + length + end != size:
        return f"{size} bytes, its header says {_HEADER + length + end}"
    return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)
