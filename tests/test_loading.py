"""Loading: names to folders, the dtype policy, GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from burnish.errors import ModelError
from burnish.model.loading import load_model, load_processing_class


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_bf16_rounds_parameters_keeps_buffers_and_hands_out_the_exact_values(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, exact = load_model(folder, bf16=True)
    assert model.config.dtype == torch.bfloat16
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(exact[parameter], reference)
        assert torch.equal(parameter, reference.bfloat16())
    # Rotary frequencies rounded to bf16 would move every position.
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_fp32_and_explicit_dtypes_are_left_alone(folder: Path) -> None:
    model, exact = load_model(folder, bf16=False)
    assert next(model.parameters()).dtype == torch.float32
    assert not exact
    model, exact = load_model(folder, bf16=True, init_kwargs={"dtype": "float32"})
    assert next(model.parameters()).dtype == torch.float32
    assert not exact


def test_a_model_in_memory_is_used_as_it_is() -> None:
    model = tiny.model()
    assert load_model(model, bf16=True) == (model, {})
    with pytest.raises(ModelError, match="with a model in memory"):
        load_model(model, bf16=True, init_kwargs={"revision": "main"})


def test_the_tokenizer_has_a_pad_token(folder: Path) -> None:
    tokenizer = load_processing_class(folder)
    assert tokenizer.pad_token_id is not None
