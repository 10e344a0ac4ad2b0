"""Encoding: masks, boundaries, BOS and EOS, with small tokenizers and with a real one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from burnish.data import (
    DEFAULT_CHAT_TEMPLATE,
    EncodeStats,
    encode_rows,
    preference_group,
    prompt_group,
    resolve_chat_template,
    sft_group,
    sft_groups,
    split_turns,
    unpaired_group,
)
from burnish.data.chat import chat_spans
from burnish.data.tokens import split_ids, tokenize_chat, with_bos
from burnish.errors import ConfigError, DataError
from burnish.types import Completion, Group

SPECIALS = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim"
    " + '<|eot_id|>' %}{{ bos_token + c if loop.first else c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Reasoning of turns before the last user message is dropped; later turns always open a reasoning block.
STRIPPING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set answer = parts[-1].lstrip('\\n') %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 "
    "else '') + '\\n</think>\\n\\n' + answer }}{% else %}{{ answer }}{% endif %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# An end of text after the whole conversation, so that no prefix of a conversation is a prefix of its rendering.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + c.function.arguments | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def byte_level(*, bos: bool, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges; it adds BOS to plain text when asked to."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["It is 4. It is 6. assistant user\n\nthe answer\n4", "ab abc bc the  answer"] * 20, trainer
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]))
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level(bos=True)


def word_level() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate([*SPECIALS, "<unk>", "user", "assistant", "system", "yes", "no", "why", "?"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def metaspace() -> PreTrainedTokenizerFast:
    """The SentencePiece kind: a space in front of every text."""
    letters = {c: i for i, c in enumerate(["<bos>", "<eos>", "<unk>", "▁", "\n", *"abcdefgh", "▁b"])}
    core = Tokenizer(models.BPE(letters, [("▁", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(tokenizer: Any, completion: Completion) -> list[str]:
    """Text of each run of scored tokens."""
    mask = completion.loss_mask or [True] * len(completion.token_ids)
    out: list[list[int]] = []
    for place, (token, scored) in enumerate(zip(completion.token_ids, mask, strict=True)):
        if scored and (place == 0 or not mask[place - 1]):
            out.append([])
        if scored:
            out[-1].append(token)
    return [decode(tokenizer, ids) for ids in out]


def sequence(group: Group, which: int = 0) -> list[int]:
    return group.prompt_ids + group.completions[which].token_ids


TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "marked": (MARKED, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "stripping": (STRIPPING, "<|im_end|>"),
    "tools": (TOOLS, "<|im_end|>"),
    "default": ("chatml", "<eos>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_mask_is_what_the_assistant_wrote(name: str, trim_offsets: bool) -> None:
    tokenizer = byte_level(bos=True, trim_offsets=trim_offsets)
    template, end = TEMPLATES[name]
    group = sft_group({"messages": CHAT}, tokenizer, assistant_only_loss=True, chat_template=template)
    last = "<think>\n\n</think>\n\n6" if name == "stripping" else "6"
    assert group.prompt_ids == []
    assert runs(tokenizer, group.completions[0]) == ["It is 4." + end, last + end]
    source = resolve_chat_template(template, tokenizer)
    whole = tokenizer.apply_chat_template(CHAT, chat_template=source, tokenize=False)
    assert decode(tokenizer, sequence(group)) == whole


def test_marked_template_agrees_with_prefixes(bpe: Any) -> None:
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with_marks = sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=MARKED)
    without = sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=unmarked)
    assert with_marks.completions == without.completions
    reference = bpe.apply_chat_template(CHAT, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True)
    assert [int(m) for m in with_marks.completions[0].loss_mask or []] == reference["assistant_masks"]
    assert with_marks.completions[0].token_ids == reference["input_ids"]


def test_end_of_text_after_the_conversation_alters_no_turn(bpe: Any) -> None:
    spans = chat_spans(bpe, CHAT, template=PHI3)
    assert [spans.text[a:b] for a, b in spans.spans] == ["It is 4.<|end|>", "6<|end|>\n<eos>"]
    assert spans.rerendered == 0


REASONED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour."},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nadd again\n</think>\n\nSix."},
]


def test_stripped_reasoning_is_located_in_the_full_rendering(bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    stats = EncodeStats()
    row = {"messages": REASONED}
    with caplog.at_level(logging.WARNING):
        group = sft_group(
            row, bpe, assistant_only_loss=True, chat_template=STRIPPING + "{# own cache key #}", stats=stats
        )
    assert runs(bpe, group.completions[0]) == ["Four.<|im_end|>", "<think>\nadd again\n</think>\n\nSix.<|im_end|>"]
    assert stats.num_rerendered_turns == 1
    assert "split_turns" in caplog.text
    # One row a turn: each is trained on as it was served.
    served = [sft_group(part, bpe, chat_template=STRIPPING, stats=stats) for part in split_turns(row)]
    assert stats.num_rerendered_turns == 1
    assert [runs(bpe, g.completions[0]) for g in served] == [
        ["<think>\nadd\n</think>\n\nFour.<|im_end|>"],
        ["<think>\nadd again\n</think>\n\nSix.<|im_end|>"],
    ]
    for i, g in enumerate(served):
        asked = prompt_group({"prompt": REASONED[: 2 * i + 1]}, bpe, chat_template=STRIPPING)
        assert g.prompt_ids == asked.prompt_ids


def test_generation_prompt_with_a_closed_reasoning_block(bpe: Any) -> None:
    row = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    stats = EncodeStats()
    group = sft_group(row, bpe, assistant_only_loss=True, chat_template=STRIPPING, stats=stats)
    # The block belongs to the last turn's prompt; the earlier turn is shown without it.
    assert runs(bpe, group.completions[0]) == ["It is 4.<|im_end|>", "6<|im_end|>"]
    assert stats.num_rerendered_turns == 1


def test_turn_whose_own_prompt_is_rendered_differently_later(bpe: Any) -> None:
    # Until the next user message the first turn keeps its reasoning, so no prefix of the conversation is a prefix here.
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>a</think>one"},
        {"role": "tool", "content": "<|im_start|>assistant\n"},
        {"role": "assistant", "content": "<think>b</think>two"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "three"},
    ]
    spans = chat_spans(bpe, chat, template=STRIPPING)
    said = [spans.text[a:b] for a, b in spans.spans]
    assert said == ["one<|im_end|>", "two<|im_end|>", "<think>\n\n</think>\n\nthree<|im_end|>"]
    assert spans.rerendered == 2


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_space_before_the_edge_is_not_the_assistants(trim_offsets: bool) -> None:
    tokenizer = byte_level(bos=True, trim_offsets=trim_offsets)
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    assert any(decode(tokenizer, [i]) == " answer" for i in tokenizer("q answer")["input_ids"]), "the case must occur"
    group = sft_group({"messages": chat}, tokenizer, assistant_only_loss=True, chat_template=template)
    assert runs(tokenizer, group.completions[0]) == ["answer<|end|>"]
    assert decode(tokenizer, sequence(group)) == "user q<|end|>assistant answer<|end|>"


def test_first_token_of_a_conversation_is_never_scored(bpe: Any) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% endfor %}"
    chat = [{"role": "assistant", "content": "xyz"}]
    group = sft_group({"messages": chat}, bpe, assistant_only_loss=True, chat_template=template)
    assert group.completions[0].loss_mask == [False, True, True, True]


def test_a_repeated_answer_is_not_confused(bpe: Any) -> None:
    chat = [
        {"role": "user", "content": "<|im_start|>assistant\nyes<|im_end|>\n"},
        {"role": "assistant", "content": "<think>a</think>yes"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ]
    spans = chat_spans(bpe, chat, template=STRIPPING)
    first = spans.text.index("<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nyes")
    assert spans.spans[0][0] == first + len("<|im_start|>assistant\n")
    assert [spans.text[a:b] for a, b in spans.spans] == ["yes<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"]


def test_tool_calls_are_the_models_and_results_are_not(bpe: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    chat = [
        {"role": "user", "content": "1+2?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_calls": None},
        {"role": "assistant", "content": "3.", "tool_calls": None},
    ]
    tools = '[{"name": "add", "strict": null}]'
    row = {"prompt": chat[:1], "completion": chat[1:], "tools": tools}
    group = sft_group(row, bpe, chat_template=TOOLS)
    assert '[{"name": "add"}]' in decode(bpe, group.prompt_ids)
    assert runs(bpe, group.completions[0]) == ['<call>add{"a": 1}</call><|im_end|>', "3.<|im_end|>"]
    assert decode(bpe, group.completions[0].token_ids).endswith("3.<|im_end|>")


def test_template_that_hides_a_turn_is_refused(bpe: Any) -> None:
    last_only = "{{ '<|im_start|>' + messages[-1].role + '\\n' + messages[-1].content + '<|im_end|>' }}"
    with pytest.raises(DataError, match=r"row 3: .*message 2 cannot be located exactly.*drops the turn.*generation"):
        sft_group({"messages": CHAT}, bpe, index=3, assistant_only_loss=True, chat_template=last_only)
    marks = CHATML + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="mark nothing"):
        sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=marks)
    no_system = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match=r"row 0: the chat template rejects .*no system"):
        sft_group({"messages": CHAT}, bpe, chat_template=no_system)


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow gives no character offsets"):
        tokenize_chat(Slow(), "x", ())


def test_template_that_does_not_teach_to_stop_warns(bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    open_end = MARKED.replace(
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    with caplog.at_level(logging.WARNING):
        sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=open_end)
        plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        group = sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=plain)
    assert "leave the end-of-turn token out" in caplog.text
    assert "no special token" in caplog.text
    assert runs(bpe, group.completions[0]) == ["It is 4.\n", "6\n"]


def test_edge_inside_a_token_is_cut(bpe: Any) -> None:
    # "\n" + "\nabc": the merge "\n\n" crosses the edge between header and answer.
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\nabc"}]
    text = bpe.apply_chat_template(chat, chat_template=CHATML, tokenize=False)
    assert any("\n\n" in decode(bpe, [i]) for i in bpe(text)["input_ids"]), "the case must occur"
    group = sft_group({"messages": chat}, bpe, assistant_only_loss=True, chat_template=CHATML)
    assert runs(bpe, group.completions[0]) == ["\nabc<|im_end|>"]
    assert decode(bpe, sequence(group)) == text
    paired = sft_group({"prompt": chat[:1], "completion": chat[1:]}, bpe, chat_template=CHATML)
    assert paired.prompt_ids == prompt_group({"prompt": chat[:1]}, bpe, chat_template=CHATML).prompt_ids


@pytest.mark.parametrize(
    ("prompt", "completion"), [("ab", "c"), ("the ", " answer"), ("é", "\U0001f600 x"), ("the", " answer")]
)
def test_plain_boundary_is_the_prompts_own_tokens(bpe: Any, prompt: str, completion: str) -> None:
    group = sft_group({"prompt": prompt, "completion": completion}, bpe)
    assert group.prompt_ids == bpe(prompt)["input_ids"]
    assert decode(bpe, group.completions[0].token_ids) == completion + "<eos>"
    assert group.completions[0].loss_mask is None
    assert sequence(group).count(bpe.bos_token_id) == 1
    everything = sft_group({"prompt": prompt, "completion": completion}, bpe, completion_only_loss=False)
    assert everything.completions[0].token_ids == sequence(group)
    assert everything.completions[0].num_scored_tokens == len(sequence(group)) - 1


def test_sentencepiece_kind_is_cut_without_a_second_space() -> None:
    tokenizer = metaspace()
    head, rest = split_ids(tokenizer, "a ", "b")
    assert tokenizer.convert_ids_to_tokens(head) == ["▁", "a", "▁"]
    assert tokenizer.convert_ids_to_tokens(rest) == ["b"]
    group = sft_group({"prompt": "a ", "completion": "b"}, tokenizer)
    assert sequence(group)[0] == 0
    assert sequence(group).count(0) == 1


def test_boundary_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 5: one token spans the edge before 'es'.*word's start"):
        sft_group({"prompt": "why ? y", "completion": "es"}, word_level(), index=5)


def test_word_level_chat() -> None:
    tokenizer = word_level()
    chat = [{"role": "user", "content": "why ?"}, {"role": "assistant", "content": "yes no"}]
    group = sft_group({"messages": chat}, tokenizer, assistant_only_loss=True, chat_template=CHATML)
    assert runs(tokenizer, group.completions[0]) == ["yes no <|im_end|>"]


@pytest.mark.parametrize("template", [MARKED, LLAMA3, "chatml"])
def test_bos_once_in_conversations(bpe: Any, template: str) -> None:
    rows = [
        {"messages": CHAT},
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"prompt": CHAT[:2], "chosen": CHAT[2:3], "rejected": CHAT[4:5]},
        {"prompt": CHAT[:2]},
    ]
    encoders: list[Any] = [sft_group, sft_group, preference_group, prompt_group]
    for row, encoder in zip(rows, encoders, strict=True):
        group = encoder(row, bpe, chat_template=template)
        ids = sequence(group) if group.completions else group.prompt_ids
        assert ids[0] == bpe.bos_token_id
        assert ids.count(bpe.bos_token_id) == 1


def test_bos_once_in_plain_text(bpe: Any) -> None:
    for text in ("abc", "<bos>abc", "<bos><bos>abc"):
        for ids in (sequence(sft_group({"text": text}, bpe)), prompt_group({"prompt": text}, bpe).prompt_ids):
            assert ids[0] == bpe.bos_token_id
            assert ids.count(bpe.bos_token_id) == 1
    bare = byte_level(bos=False)
    assert bare.bos_token_id not in sequence(sft_group({"text": "abc"}, bare))
    assert with_bos(bare, [bare.bos_token_id, 9]) == [bare.bos_token_id, 9]
    doubled = "{{ bos_token + messages[0].content }}"
    chat = [{"role": "user", "content": "<bos>hi"}]
    assert decode(bpe, prompt_group({"prompt": chat}, bpe, chat_template=doubled).prompt_ids) == "<bos>hi"


def test_text_ends_with_one_eos_and_its_first_token_is_not_scored(bpe: Any) -> None:
    for text in ("abc", "abc<eos>"):
        completion = sft_group({"text": text}, bpe).completions[0]
        assert decode(bpe, completion.token_ids) == "<bos>abc<eos>"
        assert completion.loss_mask == [False] + [True] * (len(completion.token_ids) - 1)


def test_conversation_equals_the_plain_row_of_its_rendering(bpe: Any) -> None:
    chat = {"prompt": CHAT[:2], "completion": CHAT[2:3]}
    conversational = sft_group(chat, bpe, chat_template="chatml")
    rendered = bpe.apply_chat_template(
        CHAT[:2], chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    plain = sft_group({"prompt": rendered, "completion": "It is 4."}, bpe)
    assert conversational.prompt_ids == plain.prompt_ids
    assert conversational.completions == plain.completions
    whole = sft_group(chat, bpe, chat_template="chatml", completion_only_loss=False)
    assert decode(bpe, whole.completions[0].token_ids).endswith("It is 4.<eos>\n")


def test_preference_shares_one_prompt(bpe: Any) -> None:
    plain = preference_group({"prompt": "ab", "chosen": "c", "rejected": " the"}, bpe)
    assert plain.prompt_ids == bpe("ab")["input_ids"]
    assert [decode(bpe, c.token_ids) for c in plain.completions] == ["c<eos>", " the<eos>"]
    chat = preference_group({"prompt": CHAT[:2], "chosen": CHAT[2:3], "rejected": CHAT[4:5]}, bpe, chat_template=CHATML)
    implicit = preference_group(
        {"chosen": CHAT[:3], "rejected": [*CHAT[:2], CHAT[4]]}, bpe, chat_template=CHATML, index=7
    )
    assert (chat.prompt_ids, chat.completions) == (implicit.prompt_ids, implicit.completions)
    assert chat.prompt_ids == prompt_group({"prompt": CHAT[:2]}, bpe, chat_template=CHATML).prompt_ids
    assert [decode(bpe, c.token_ids) for c in chat.completions] == ["It is 4.<|im_end|>", "6<|im_end|>"]
    assert implicit.index == 7


def test_implicit_plain_prompt_is_the_common_tokens(bpe: Any) -> None:
    group = preference_group({"chosen": "why? It is 4.", "rejected": "why? It is 6."}, bpe)
    chosen, rejected = bpe("why? It is 4.<eos>")["input_ids"], bpe("why? It is 6.<eos>")["input_ids"]
    assert (sequence(group, 0), sequence(group, 1)) == (chosen, rejected)
    assert group.completions[0].token_ids[0] != group.completions[1].token_ids[0]
    bare = byte_level(bos=False)
    nothing = preference_group({"chosen": "yes", "rejected": "no"}, bare)
    assert nothing.prompt_ids == []
    assert [c.loss_mask[0] for c in nothing.completions if c.loss_mask] == [False, False]


def test_preference_errors(bpe: Any) -> None:
    with pytest.raises(DataError, match="row 2: chosen equals rejected"):
        preference_group({"prompt": "a", "chosen": "b", "rejected": "b"}, bpe, index=2)
    with pytest.raises(DataError, match="share no first message"):
        preference_group({"chosen": CHAT[1:2], "rejected": CHAT[2:3]}, bpe, chat_template=CHATML)
    with pytest.raises(DataError, match="is a prefix of the other"):
        preference_group({"chosen": CHAT[:2], "rejected": CHAT[:3]}, bpe, chat_template=CHATML)
    by_answer = "{{ messages[-1].content | length }}" + MARKED
    with pytest.raises(DataError, match="renders the prompt of chosen and of rejected differently"):
        preference_group({"prompt": CHAT[:2], "chosen": CHAT[2:3], "rejected": CHAT[4:5]}, bpe, chat_template=by_answer)


def test_completion_must_begin_with_the_assistant(bpe: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: a completion must begin with an assistant message.*'user'"):
        sft_group({"prompt": CHAT[:1], "completion": CHAT[1:3]}, bpe, chat_template=CHATML)
    with pytest.raises(DataError, match="prompt ends with an assistant message"):
        sft_group({"prompt": CHAT[:3], "completion": CHAT[4:]}, bpe, chat_template=CHATML)


def test_prompt(bpe: Any) -> None:
    ends = decode(bpe, prompt_group({"prompt": CHAT[:2], "answer": "4"}, bpe, chat_template=CHATML).prompt_ids)
    assert ends.endswith("two?<|im_end|>\n<|im_start|>assistant\n")
    begun = [CHAT[1], {"role": "assistant", "content": "It is"}]
    assert decode(bpe, prompt_group({"prompt": begun}, bpe, chat_template=CHATML).prompt_ids).endswith(
        "assistant\nIt is"
    )
    said = prompt_group({"prompt": "Why?", "x": 1}, bpe, system_prompt="Be kind.", chat_template=CHATML, index=4)
    assert decode(bpe, said.prompt_ids).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?")
    assert (said.row, said.index, said.completions) == ({"prompt": "Why?", "x": 1}, 4, [])
    shut = prompt_group(
        {"prompt": CHAT[1:2]}, bpe, chat_template=STRIPPING, chat_template_kwargs={"enable_thinking": False}
    )
    assert decode(bpe, shut.prompt_ids).endswith("</think>\n\n")
    with pytest.raises(DataError, match="row 9 has a system message and system_prompt is set"):
        prompt_group({"prompt": CHAT[:2]}, bpe, system_prompt="x", chat_template=CHATML, index=9)
    with pytest.raises(DataError, match=r"row 0: the prompt has \d+ tokens, max_prompt_length = 3"):
        prompt_group({"prompt": CHAT[:2]}, bpe, max_prompt_length=3, chat_template=CHATML)


def test_chat_template_choice(bpe: Any, tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r'row 1: the tokenizer has no chat template.*chat_template = "chatml"'):
        sft_group({"messages": CHAT}, bpe, index=1)
    with pytest.raises(ConfigError, match=r"chat_template = 'nope.jinja'"):
        resolve_chat_template("nope.jinja", bpe)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert resolve_chat_template(str(file), bpe) == CHATML
    no_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(DataError, match="no eos_token"):
        resolve_chat_template("chatml", no_eos)
    with pytest.raises(DataError, match="row 0: the tokenizer has no eos_token"):
        sft_group({"text": "a"}, no_eos)


def test_loss_options_that_a_row_cannot_honour(bpe: Any) -> None:
    with pytest.raises(ConfigError, match=r"assistant_only_loss = True, but row 0 is plain \(text\)"):
        sft_group({"text": "a"}, bpe, assistant_only_loss=True)
    with pytest.raises(ConfigError, match="completion_only_loss = True, but row 0 has no completion"):
        sft_group({"text": "a"}, bpe, completion_only_loss=True)
    with pytest.raises(ConfigError, match="max_length = 0"):
        sft_group({"text": "a"}, bpe, max_length=0)


def test_unpaired(bpe: Any) -> None:
    group = unpaired_group({"prompt": "ab", "completion": "c", "label": False}, bpe)
    assert decode(bpe, group.completions[0].token_ids) == "c<eos>"
    assert group.row["label"] is False


def test_truncation_is_counted(bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    stats = EncodeStats()
    rows = [
        {"prompt": "abcab" * 3, "completion": "x"},
        {"prompt": "a", "completion": "xyzxyz"},
        {"prompt": "a", "completion": "x"},
    ]
    whole = [sft_group(row, bpe).num_tokens for row in rows]
    with caplog.at_level(logging.WARNING):
        groups = encode_rows(sft_group, rows, bpe, stats=stats, max_length=4)
    assert [g.index for g in groups] == [1, 2]
    assert [g.num_tokens for g in groups] == [4, 4]
    assert (stats.num_rows, stats.num_kept, stats.num_cut_rows, stats.num_skipped_rows) == (3, 2, 2, 1)
    assert stats.num_cut_tokens == sum(max(0, n - 4) for n in whole)
    assert stats.formats == {"plain prompt_completion": 3}
    assert "2 of 3 rows are cut" in caplog.text
    assert "1 of 3 rows are skipped" in caplog.text
    with pytest.raises(DataError, match=r"none of 1 rows has a token to learn from under \{'max_length': 2\}"):
        encode_rows(sft_group, rows[:1], bpe, max_length=2)


TRUNCATED = [{"text": "abcdefg"}, {"text": "ab"}, {"prompt": "abcd", "completion": "xyz"}]


def test_keep_end_keeps_the_end_and_its_mask(bpe: Any) -> None:
    stats = EncodeStats()
    rows = [*TRUNCATED, {"prompt": "ab", "completion": "abcdefg"}]
    whole = [sft_group(row, bpe) for row in rows]
    groups = encode_rows(sft_groups, rows, bpe, stats=stats, max_length=5, truncation_mode="keep_end")
    assert [sequence(g) for g in groups] == [sequence(g)[-5:] for g in whole]
    assert stats.num_cut_rows == 3
    assert stats.num_cut_tokens == sum(max(0, g.num_tokens - 5) for g in whole)
    assert decode(bpe, groups[2].prompt_ids) == "d"
    assert runs(bpe, groups[2].completions[0]) == ["xyz<eos>"]
    # A completion longer than the limit: nothing predicts the first token that is left.
    assert groups[3].prompt_ids == []
    assert runs(bpe, groups[3].completions[0]) == ["efg<eos>"]
    assert decode(bpe, groups[3].completions[0].token_ids) == "defg<eos>"


def test_truncation_keeps_masks_aligned(bpe: Any) -> None:
    whole = sft_group({"messages": CHAT}, bpe, assistant_only_loss=True, chat_template=CHATML).completions[0]
    assert whole.loss_mask is not None
    options: dict[str, Any] = {"assistant_only_loss": True, "max_length": 16, "chat_template": CHATML}
    end = sft_groups({"messages": CHAT}, bpe, truncation_mode="keep_end", **options)[0].completions[0]
    assert end.token_ids == whole.token_ids[-16:]
    assert end.loss_mask == [False, *whole.loss_mask[-15:]]
    parts = [g.completions[0] for g in sft_groups({"messages": CHAT}, bpe, truncation_mode="split", **options)]
    assert [t for part in parts for t in part.token_ids] == whole.token_ids
    assert [m for part in parts for m in part.loss_mask or ()] == [
        m and place % 16 > 0 for place, m in enumerate(whole.loss_mask)
    ]
    assert any(m for part in parts[1:] for m in part.loss_mask or ())


def test_dropped_rows_are_counted(bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    stats = EncodeStats()
    whole = [sft_group(row, bpe).num_tokens for row in TRUNCATED]
    with caplog.at_level(logging.WARNING):
        groups = encode_rows(sft_groups, TRUNCATED, bpe, stats=stats, max_length=5, truncation_mode="drop")
    assert [(g.index, g.num_tokens) for g in groups] == [(1, whole[1])]
    assert (stats.num_dropped_rows, stats.num_dropped_tokens) == (2, whole[0] + whole[2])
    assert (stats.num_cut_rows, stats.num_skipped_rows) == (0, 0)
    assert f"2 of 3 rows are dropped ({whole[0] + whole[2]} tokens)" in caplog.text
    with pytest.raises(DataError, match="none of 1 rows"):
        encode_rows(sft_groups, TRUNCATED[:1], bpe, max_length=5, truncation_mode="drop")


def test_split_texts_lose_no_token(bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    stats = EncodeStats()
    first, second = (sequence(sft_group(row, bpe)) for row in TRUNCATED[:2])
    assert (len(first), len(second)) == (8, 3)
    with caplog.at_level(logging.WARNING):
        groups = encode_rows(sft_groups, TRUNCATED[:2], bpe, stats=stats, max_length=3, truncation_mode="split")
    assert [(g.index, sequence(g)) for g in groups] == [(0, first[:3]), (0, first[3:6]), (0, first[6:]), (1, second)]
    assert all(g.completions[0].loss_mask == [False] + [True] * (g.num_tokens - 1) for g in groups)
    assert (stats.num_rows, stats.num_kept, stats.num_split_rows, stats.num_split_tokens) == (2, 4, 1, 8)
    assert "1 of 2 rows are split (8 tokens)" in caplog.text
    # A last part of one token has nothing to score and is no sequence.
    assert len(encode_rows(sft_groups, TRUNCATED[:1], bpe, max_length=7, truncation_mode="split")) == 1
    with pytest.raises(ConfigError, match=r"truncation_mode = 'split', but row 2 .*use keep_start, keep_end or drop"):
        encode_rows(sft_groups, TRUNCATED, bpe, max_length=4, truncation_mode="split")


def test_long_prompts_are_skipped_not_cut(bpe: Any) -> None:
    stats = EncodeStats()
    groups = encode_rows(prompt_group, [{"prompt": "xyz" * 9}, {"prompt": "a"}], bpe, stats=stats, max_prompt_length=4)
    assert [g.row["prompt"] for g in groups] == ["a"]
    assert (stats.num_kept, stats.num_skipped_rows, stats.num_cut_rows) == (1, 1, 0)


def test_preference_truncation(bpe: Any) -> None:
    row = {"prompt": "a", "chosen": "xyzxyz", "rejected": "x"}
    stats = EncodeStats()
    group = preference_group(row, bpe, max_length=4, stats=stats)
    assert [len(sequence(group, k)) for k in (0, 1)] == [4, 4]
    assert stats.num_cut_tokens == preference_group(row, bpe).num_tokens - group.num_tokens


def test_real_tokenizer(smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    group = sft_group({"messages": CHAT}, tokenizer, assistant_only_loss=True)
    assert runs(tokenizer, group.completions[0]) == ["It is 4.<|im_end|>", "6<|im_end|>"]
    reference = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert sequence(group) == reference
    pair = sft_group({"prompt": CHAT[:2], "completion": CHAT[2:3]}, tokenizer)
    asked = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert pair.prompt_ids == asked == prompt_group({"prompt": CHAT[:2]}, tokenizer).prompt_ids
    assert decode(tokenizer, pair.completions[0].token_ids) == "It is 4.<|im_end|>"
    for prompt, completion in (("The sky", " is blue."), ("The sky ", "is blue."), ("12", "34"), ("a\n", "\nb")):
        plain = sft_group({"prompt": prompt, "completion": completion}, tokenizer)
        assert plain.prompt_ids == tokenizer(prompt)["input_ids"]
        assert decode(tokenizer, sequence(plain)) == prompt + completion + "<|im_end|>"
