"""Rows to tokens: sources, formats, chat templates and encoding. All tokenization happens here, without torch."""

from burnish.data.chat import DEFAULT_CHAT_TEMPLATE, resolve_chat_template
from burnish.data.encode import (
    EncodeStats,
    encode_lazily,
    encode_rows,
    errors_of,
    preference_group,
    prompt_group,
    report_encoding,
    sft_group,
    sft_groups,
    unpaired_group,
)
from burnish.data.formats import Format, Kind, as_row, detect_format, split_turns, unpair
from burnish.data.held_out import DisjointCounts, disjoint
from burnish.data.reward_modelling import RewardKind, answer_group, read_last, reward_group, reward_kind
from burnish.data.sources import as_rows, check_source, finite_rows, load_rows

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "DisjointCounts",
    "EncodeStats",
    "Format",
    "Kind",
    "RewardKind",
    "answer_group",
    "as_row",
    "as_rows",
    "check_source",
    "detect_format",
    "disjoint",
    "encode_lazily",
    "encode_rows",
    "errors_of",
    "finite_rows",
    "load_rows",
    "preference_group",
    "prompt_group",
    "read_last",
    "report_encoding",
    "resolve_chat_template",
    "reward_group",
    "reward_kind",
    "sft_group",
    "sft_groups",
    "split_turns",
    "unpair",
    "unpaired_group",
]
