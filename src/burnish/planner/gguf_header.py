"""Read the header of a GGUF file: its metadata and the names of its tensors, in milliseconds and without torch."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from burnish.errors import ModelError

__all__ = ["config_of_gguf"]

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_MODEL_TYPES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gpt2": "gpt2", "llama": "llama", "phi3": "phi3",
    "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "smollm3": "smollm3",
}  # fmt: skip
"""`general.architecture` -> `model_type` of transformers."""

_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def config_of_gguf(path: str | Path) -> dict[str, Any]:
    """Return the dimensions of a model in a GGUF file under the names of transformers.

    Raises:
        ModelError: the file is not one, is cut, or holds an architecture that is not known.
    """
    try:
        with open(path, "rb") as file:
            metadata, tensors = _header(file)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a GGUF file that can be read ({error}); download it again.") from error
    name = str(metadata.get("general.architecture"))
    if name not in _MODEL_TYPES:
        raise ModelError(
            f"{path}: general.architecture = {name!r}: its bytes are not known; known are {', '.join(_MODEL_TYPES)}. "
            "Plan with a model of the same size instead."
        )
    config = {ours: metadata[key] for theirs, ours in _FIELDS.items() if (key := f"{name}.{theirs}") in metadata}
    config.setdefault("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    config["model_type"] = _MODEL_TYPES[name]
    if name == "llama" and config.get("num_experts"):
        config |= {"model_type": "mixtral", "num_local_experts": config["num_experts"]}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    return config


def _header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Return the metadata, with arrays as their lengths, and the names of the tensors."""

    def read(code: str) -> Any:
        return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

    def text() -> str:
        return file.read(read("Q")).decode("utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return read(_FORMATS[kind])
        inner, length = read("I"), read("Q")
        if inner in (_STRING, _ARRAY):
            for _ in range(length):
                value(inner)
        else:
            file.seek(struct.calcsize("<" + _FORMATS[inner]) * length, 1)
        return length

    if file.read(4) != b"GGUF":
        raise ValueError("its first bytes are not GGUF")
    read("I")
    num_tensors, num_fields = read("Q"), read("Q")
    metadata = {text(): value(read("I")) for _ in range(num_fields)}
    tensors: set[str] = set()
    for _ in range(num_tensors):
        tensors.add(text())
        file.seek(8 * read("I") + 12, 1)
    return metadata, tensors
