"""Models of real shapes with random weights, a tokenizer and rows for them: nothing is read from a file or the hub."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.quantizers.auto import AutoHfQuantizer

__all__ = ["completion_ids", "prompt_rows", "random_model", "word_tokenizer"]

SPREAD = 0.02
"""Standard deviation of the weights: predictions are close to uniform, as a fresh model's are."""
FIRST_WORD = 2
"""Tokens 0 and 1 are the end of a sequence and the unknown word."""
NUM_PROMPTS = 256


def random_model(
    config: Mapping[str, Any], *, quantized: bool, device: str, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Build a model on the meta device and draw its weights where they will stay, one after another.

    Args:
        config: fields of config.json.
        quantized: hold the linear layers but the head in NF4 with double quantisation, as from_pretrained would.
        device: "cuda" or "cpu".
        dtype: of the other weights, and of products with quantised ones.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    quantizer: Any = None
    if quantized:
        quantizer = AutoHfQuantizer.from_config(
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
            pre_quantized=False,
        )
        quantizer.preprocess_model(model=model, device_map=None)
    generator = torch.Generator(device).manual_seed(0)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:  # tied weights stay tied
                made[parameter] = _drawn(module, name, parameter, dtype, generator)
            setattr(module, name, made[parameter])
    _fill_buffers(model, device)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        model.hf_device_map = {"": 0 if device == "cuda" else device}
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model.eval()


def _drawn(module: Any, name: str, parameter: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """Draw a weight; a quantised layer's is quantised at once, so that only one is ever held whole."""
    quantized = type(parameter).__name__ == "Params4bit"
    shape = (module.out_features, module.in_features) if quantized else parameter.shape
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    if len(shape) == 1:
        values.fill_(0.0 if name == "bias" else 1.0)
    else:
        values.normal_(std=SPREAD, generator=generator)
    if not quantized:
        return nn.Parameter(values)
    kept = {k: v for k, v in vars(parameter).items() if k not in ("data", "module")}
    weight = type(parameter)(values, requires_grad=False, **kept).to(generator.device)
    weight.module = module
    module.quant_state = weight.quant_state
    return weight


def _fill_buffers(model: Any, device: str) -> None:
    """Make the rotary frequencies again, which the meta device left without values."""
    for path, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if not type(module).__name__.endswith("RotaryEmbedding"):
            raise RuntimeError(f"{path} has buffers, and nothing here knows how to make them again")
        kind: Any = type(module)
        with torch.device(device):
            model.set_submodule(path, kind(model.config))


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer in which each word `w2`, `w3`, ... is one token, so that lengths are exact."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(FIRST_WORD, vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>", padding_side="left"
    )


def prompt_rows(vocab_size: int, length: int) -> list[dict[str, str]]:
    """Make a data set of prompts of `length` tokens each."""
    rng = random.Random(0)
    words = range(FIRST_WORD, vocab_size)
    return [{"prompt": " ".join(f"w{i}" for i in rng.choices(words, k=length))} for _ in range(NUM_PROMPTS)]


def completion_ids(vocab_size: int, length: int, *, call: int, count: int) -> list[list[int]]:
    """Make the completions of one rollout: the same on both sides, without an end of sequence."""
    words = range(FIRST_WORD, vocab_size)
    return [random.Random(f"{call} {number}").choices(words, k=length) for number in range(count)]
