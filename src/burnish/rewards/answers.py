"""Extraction of answers from completions, and parsing of numbers as exact fractions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from burnish.errors import ConfigError

__all__ = [
    "SOURCES",
    "UNREADABLE_GOLD",
    "answer_text",
    "boxed_answers",
    "extract_answer",
    "first_answer",
    "parse_number",
    "render_answer",
]

UNREADABLE_GOLD = "cannot be read as mathematics"
"""End of the error message for a gold answer that math-verify cannot parse."""

SOURCES = ("tag", "boxed", "last_number", "block", "text")
"""Sources of an answer, see :func:`extract_answer`."""

_MINUS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{SMALL HYPHEN-MINUS}": "-", "\N{FULLWIDTH HYPHEN-MINUS}": "-"})
_SPACES = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " "})
_COMMAS = r"\d{1,3}(?:,\d{3})+"
_DIGITS = rf"(?:{_COMMAS}|\d{{1,3}}(?: \d{{3}})+|\d+)(?:\.\d+)?|\.\d+"
_LAST_NUMBER = re.compile(rf"(?<![\w.])-?(?:(?:{_COMMAS}|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")
_NUMBER = re.compile(
    rf"(?P<sign>[+-]? ?[$€£]?|[$€£]-)(?P<body>{_DIGITS})"
    r"(?:(?:[eE]|(?: ?\\(?:times|cdot) ?| ?[x\u00d7*] ?)10\^?\{?)(?P<exponent>[+-]?\d{1,3})\}?"
    r"|(?P<over>/\d+)|(?P<mixed> \d+/\d+))?"
    r"(?P<unit> ?.*?)\.?"
)
# Words of letters with at most a small power each: "5 cm^2" and "3 red apples", but neither "12 or 13" nor "1e9999".
_UNIT_WORD = r"(?!(?:and|or|to)\b)[A-Za-zµΩ°]+(?:\^?[23²³])?"
_UNIT = re.compile(rf" ?(?:%|{_UNIT_WORD}(?:[ /·]{_UNIT_WORD}){{0,3}})?")
_LATEX_FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>\d*) ?\\[dt]?frac ?(?:\{ ?(?P<top>-?\d+) ?\}|(?P<top1>\d)) ?"
    r"(?:\{ ?(?P<bottom>\d+) ?\}|(?P<bottom1>\d))"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[+-]?)10\^(?:\{ ?(?P<braced>[+-]?\d{1,3}) ?\}|(?P<plain>[+-]?\d{1,3}))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}")
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_NUMBER_CHARACTERS = 200


def extract_answer(text: str, *, tag: str = "answer", sources: Sequence[str] = ("tag",)) -> str | None:
    r"""Extract the answer of a completion from the first of `sources` that yields one.

    Args:
        text: the completion.
        tag: name of the tag for the source "tag".
        sources: in order of preference, out of
            "tag": content of the last well-formed `<tag>...</tag>` (closed, with no tag of that name inside);
            "boxed": content of the last `\boxed{...}` with balanced braces;
            "last_number": the last number in the text;
            "block": the last closed block of code, from a line that begins with three backticks to one that is three;
            "text": the whole text.

    Returns:
        The answer without surrounding white space, or None if no source yields a non-empty one.

    Raises:
        ConfigError: an unknown source.
    """
    for source in sources:
        if source == "tag":
            tags = _tags(text, tag)
            found = text[slice(*tags[-1])] if tags else None
        elif source == "boxed":
            boxes = _boxes(text)
            found = text[slice(*boxes[-1])] if boxes else None
        elif source == "last_number":
            numbers = _LAST_NUMBER.findall(text.translate(_MINUS))
            found = numbers[-1] if numbers else None
        elif source == "block":
            blocks = _BLOCK.findall(text)
            found = blocks[-1] if blocks else None
        elif source == "text":
            found = text
        else:
            raise ConfigError(f"sources holds {source!r}: use names out of {', '.join(SOURCES)}.")
        if found is not None and found.strip():
            return found.strip()
    return None


def first_answer(text: str, *, tag: str, sources: Sequence[str]) -> str | None:
    """Extract the non-empty answer that is closed first, out of the sources "tag" and "boxed"; None if there is none.

    Text that follows never changes it.
    """
    spans = [span for source in sources for span in (_tags(text, tag) if source == "tag" else _boxes(text))]
    closed = [(end, start) for start, end in spans if text[start:end].strip()]
    if not closed:
        return None
    end, start = min(closed)
    return text[start:end].strip()


def render_answer(answer: str, *, tag: str, sources: Sequence[str]) -> str:
    """Write a completion from which :func:`extract_answer`, with the same options, extracts `answer`."""
    if sources[0] == "tag":
        return f"<{tag}>{answer}</{tag}>"
    if sources[0] == "block":
        return f"```\n{answer}\n```"
    return rf"\boxed{{{answer}}}" if sources[0] == "boxed" else answer


def answer_text(value: object) -> str:
    """Convert a gold answer to text; integral floats lose their fraction."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _tags(text: str, tag: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start: int | None = None
    for match in re.finditer(rf"<(/?){re.escape(tag)}>", text):
        if not match[1]:
            start = match.end()
        elif start is not None:
            found.append((start, match.start()))
            start = None
    return found


def boxed_answers(text: str) -> list[str]:
    r"""Return the stripped contents of every `\boxed{...}` with balanced braces, in order of their start.

    Of nested boxes only the innermost counts; empty ones are ignored.
    """
    boxes = _boxes(text)
    inner = [span for i, span in enumerate(boxes) if i + 1 == len(boxes) or boxes[i + 1][0] > span[1]]
    return [content for span in inner if (content := text[slice(*span)].strip())]


def _boxes(text: str) -> list[tuple[int, int]]:
    # One linear pass, since models may repeat an unclosed `\boxed{` thousands of times.
    open_braces: list[int | None] = []
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if match[0] != "}":
            open_braces.append(match.end() if len(match[0]) > 1 else None)
        elif open_braces and (start := open_braces.pop()) is not None:
            found.append((start, match.start()))
    return sorted(found)


def parse_number(text: str, *, units: bool = True) -> Fraction | None:
    r"""Parse one number exactly; None if the text is not one number.

    Supported: signs (also U+2212), thousands separators (1,234 or 1 234), decimals, fractions (3/4, 1 1/2,
    `\frac{3}{4}`, `\frac34`, `1\frac{1}{2}`), powers of ten (1e3, 2 x 10^3, `10^{-3}`), `$...$` or `\boxed{...}`
    around it, a currency sign before it and a unit after it. Units are dropped, not converted: "50%" is 50.

    Args:
        text: at most 200 characters; anything longer is not a number.
        units: allow a unit; if False, "5 cm" (and "5 pi") is not a number.

    Returns:
        The exact value, or None.
    """
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = _strip_latex(text.translate(_MINUS).translate(_SPACES).strip())
    if latex := _LATEX_FRACTION.fullmatch(text):
        sign = -1 if latex["sign"] == "-" else 1
        top, bottom = int(latex["top"] or latex["top1"]), int(latex["bottom"] or latex["bottom1"])
        if not bottom or (latex["whole"] and top < 0):
            return None
        return sign * (int(latex["whole"] or 0) + Fraction(top, bottom))
    if power := _POWER_OF_TEN.fullmatch(text):
        value = Fraction(10) ** int(power["braced"] or power["plain"])
        return -value if power["sign"] == "-" else value
    match = _NUMBER.fullmatch(text)
    if match is None or not _UNIT.fullmatch(match["unit"]) or (match["unit"].strip() and not units):
        return None
    value = Fraction(re.sub(r"[, ]", "", match["body"]))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    elif match["over"] or match["mixed"]:
        numerator, _, denominator = (match["over"] or match["mixed"]).strip().partition("/")
        if int(denominator) == 0:
            return None
        value = value / int(denominator) if match["over"] else value + Fraction(int(numerator), int(denominator))
    return -value if "-" in match["sign"] else value


def _strip_latex(text: str) -> str:
    boxed = re.fullmatch(r"\\boxed\s*\{(.*)\}", text, flags=re.DOTALL)
    text = boxed[1].strip() if boxed else text
    if len(text) > 2 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$").strip()
    text = _LATEX_TEXT.sub(r" \1", text)
    text = re.sub(r"\\[,;:! ]|\\%|\\\$", lambda m: {"\\%": "%", "\\$": "$"}.get(m[0], " "), text)
    return re.sub(r" +", " ", text.replace("{,}", ",")).strip()
