"""Completions without a readable answer: counted by source, and told what to change."""

from __future__ import annotations

from burnish.rewards import Criterion, Rubric, count_answers, exact_answer, format_tags, math_answer, numeric_answer
from burnish.types import Completion, Group

NUMBERS = ["so it is 42"] * 41 + ["I do not know"] * 23


def message(texts: list[str], **options: object) -> str | None:
    [counts] = count_answers(Rubric([Criterion("numeric", numeric_answer(**options))]), texts)  # type: ignore[arg-type]
    return counts.message()


def test_numbers_without_tags_are_counted_and_the_fix_is_named() -> None:
    rubric = Rubric([Criterion("format", format_tags()), Criterion("numeric", numeric_answer())])
    [counts] = count_answers(rubric, NUMBERS)  # the format criterion extracts nothing
    assert (counts.criterion, counts.num_completions, counts.num_read, counts.num_unclosed) == ("numeric", 64, 0, 0)
    assert counts.by_source == {"tag": 0, "boxed": 0, "last_number": 41, "block": 0, "text": 64}
    assert counts.message() == (
        "criterion 'numeric': no <answer> tag in any of 64 completions, so all score 0; 41 of 64 hold a number: "
        'set sources = ["tag", "last_number"].'
    )


def test_the_message_fits_what_the_completions_hold() -> None:
    assert message([*NUMBERS, "<answer>1</answer>"]) is None
    assert message([]) is None
    assert message(["none", "at all"]) == (
        "criterion 'numeric': no <answer> tag in any of 2 completions, so all score 0: ask for one in the "
        "prompt, show it in SFT first, or change `sources`."
    )
    assert 'sources = ["tag", "boxed"]' in str(message([r"\boxed{x}", "none"]))
    assert 'sources = ["boxed", "tag"]' in str(message(["<answer>x</answer>"], sources=["boxed"]))
    unclosed = str(message(["<final>42", "<final>1</final"], tag="final"))
    assert "2 of 2 open <final> and never close it" in unclosed
    assert "remove '</final>' from stop" in unclosed


def test_the_suggested_sources_read_the_answers() -> None:
    fixed = numeric_answer(sources=["tag", "last_number"])
    assert sum(fixed(prompts=NUMBERS, completions=NUMBERS, answer=["42"] * 64)) == 41


def test_scores_hold_the_extracted_answers() -> None:
    criteria = [
        Criterion("exact", exact_answer()),
        Criterion("boxed", math_answer(sources=["boxed"])),
        Criterion("format", format_tags()),
    ]
    group = Group([1], [Completion([1], text=r"<answer>5</answer>\boxed{6}"), Completion([1])], {"prompt": "p"})
    group.row["answer"] = "5"
    [[both, neither]] = Rubric(criteria).score([group])
    assert both.answers == {"exact": "5", "boxed": "6"}
    assert neither.answers == {}
