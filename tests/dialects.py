# ruff: noqa: E501 (a template is one text)
"""Five chat templates with the habits of the families in the field, and a tokenizer of bytes that reads any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny

CHATML = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
"""ChatML with hermes calls: a conversation extends itself."""

QWEN3 = CHATML.replace(
    "{{ m.content or '' }}",
    "{% if m.role == 'assistant' and not loop.last and m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content or '' }}{% endif %}",
)
"""Drops the reasoning of earlier turns, as Qwen3 does."""

LLAMA = """\
{{- bos_token -}}
{%- if tools %}<|start_header_id|>system<|end_header_id|>

Functions: {% for tool in tools %}{{ tool | tojson }} {% endfor %}<|eot_id|>{% endif -%}
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>
{%- elif m.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ {'output': m.content} | tojson }}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
"""One call a turn, named parameters; answers as JSON in a role of their own."""

MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' -%}
{%- if not m.tool_call_id or m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls -%}
[TOOL_CALLS][{% for call in m.tool_calls %}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- else -%}
{{ m.content }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
"""
"""The end of the user's turn is the generation prompt; calls are a list with identifiers."""

GEMMA = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}<start_of_turn>user
{{ m.content }}<end_of_turn>
{% else -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}
{{ m.content | trim }}<end_of_turn>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif -%}
"""
"""Knows neither tools nor their answers, and renames the assistant."""

DIALECTS = {"chatml": CHATML, "qwen3": QWEN3, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA}

_CONTROLS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (
        "<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]", "</s>",
    ),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}  # fmt: skip
_ENDS = {"chatml": 1, "qwen3": 1, "llama": 3, "mistral": 8, "gemma": 2}


def speaker(dialect: str = "", *, controls: tuple[str, ...] = (), end: str = "", template: str = "") -> tuple[Any, int]:
    """Return a tokenizer with a dialect's template, or with a given one, and the token that ends a turn."""
    controls = controls or _CONTROLS[dialect]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
    end = end or controls[_ENDS[dialect]]
    bos = controls[0] if dialect in ("llama", "mistral", "gemma") else None
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end, bos_token=bos)
    made.chat_template = template or DIALECTS[dialect]
    return made, made.convert_tokens_to_ids(end)


def save_speaker(folder: Path) -> None:
    """Save a tiny model that speaks ChatML, with its tokenizer."""
    tokenizer, end = speaker("chatml")
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end, "max_position_embeddings": 2048}
    model = tiny.model(**sizes)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
