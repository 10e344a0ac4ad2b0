r"""Normalisation of mathematics as people and models write it: Markdown, Unicode, LaTeX layout, prose around it.

Everything here is textual and linear in the length of the text.
"""

# ruff: noqa: RUF001 - the table maps look-alikes to what they look like
from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["FUNCTIONS", "GREEK", "Token", "Unreadable", "clean", "is_prose", "plain_words", "tokenize"]

_MAX_CHARACTERS = 4_000
_MAX_TOKENS = 1_500

GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
    ]
)
FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "arcsin",
        "arccos",
        "arctan",
        "arccot",
        "asin",
        "acos",
        "atan",
        "log",
        "ln",
        "lg",
        "exp",
    ]
)

_UNICODE = {
    "−": "-", "–": "-", "﹣": "-", "-": "-", "×": r"\times ", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/",
    "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ",
    "∈": r"\in ", "∀": r"\forall ", "∃": r"\exists ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "′": "'",
    "’": "'", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "∠": r"\angle ", "∑": r"\sum ", "€": r"\text{euro}", "£": r"\text{pound}", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u200b": "", "\u2061": "", "\ufeff": "",
}  # fmt: skip
_CHARACTERS = str.maketrans(_UNICODE)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_LEVEL = {char: "0123456789+-n"[i % 13] for i, char in enumerate(_RAISED + _LOWERED)}

_LAYOUT = re.compile(
    r"\\(?:left|right)(?![a-z])\.?|(?<!\\)\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut|quad|qquad|"
    r"thinspace|hfill)(?![a-zA-Z])|(?<!\\)\\[,;:!>\s]|~"
)
_SYNONYMS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\geq": r"\ge",
    r"\leqslant": r"\le", r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\lbrack": "[",
    r"\rbrack": "]",
    r"\varnothing": r"\emptyset", r"\ast": "*",
    r"\backslash": r"\setminus", r"\div": "/", r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\lor": r"\text{or}",
    r"\land": r"\text{and}", r"\vee": r"\text{or}", r"\wedge": r"\text{and}", r"\degree": r"^\circ", r"\imath": "i",
    r"\colon": ":", r"\%": "%", r"\$": r"\text{dollar}", r"\euro": r"\text{euro}", r"\pounds": r"\text{pound}",
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+|[%$])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BOLD = re.compile(r"(?<![\w)}\]])(\*\*|__)(?=\S)((?:(?!\1).)+)(?<=\S)\1(?![\w({\[])")
_LEAD = re.compile(
    r"(?:(?:[A-Za-z][A-Za-z,']* +){0,12}(?:is|are|equals|be|get|have)|(?:the |final |my |correct )*(?:answer|result|"
    r"solution|value)s?|so|thus|hence|therefore)(?:\s*[:,]|\s+(?=\S))\s*",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:not|isn't|never|no|wrong|incorrect|except|unless|if|either|neither|cannot|false)\b", re.IGNORECASE
)


class Unreadable(ValueError):
    """A text that the grammar does not cover."""


class Token(NamedTuple):
    """Lexical unit.

    Args:
        kind: "number", "name" (a letter), "command" (LaTeX or a function), "text" (prose, units), "op".
        text: its spelling; commands without the backslash.
        spaced: white space precedes it.
    """

    kind: str
    text: str
    spaced: bool


def clean(text: str) -> str:
    """Normalise a text to one line of LaTeX without delimiters, layout, Markdown and prose before the mathematics.

    Raises:
        Unreadable: more than 4,000 characters.
    """
    if len(text) > _MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters")
    text = text.strip()
    # The digits under a root sign belong to it, unlike those after LaTeX's \sqrt.
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Zπ])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = re.sub(f"[{_RAISED}]+", lambda m: "^{" + "".join(_LEVEL[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda m: "_{" + "".join(_LEVEL[c] for c in m[0]) + "}", text)
    text = text.translate(_CHARACTERS)
    text = re.sub(r"`+(?:latex|math)?", " ", text).strip()
    text = re.sub(r"^#+\s+", "", text)
    for _ in range(3):
        text = _BOLD.sub(r"\2", text).strip()
        if len(text) > 2 and text[0] == text[-1] and text[0] in "*_" and text.count(text[0]) == 2:
            text = text[1:-1].strip()
    text = re.sub(r"\\[()\[\]]", " ", re.sub(r"\\\\(?=[()\[\]])", r"\\\\ ", text))
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars % 2:
        # One dollar sign more than delimiters need is a currency.
        text = re.sub(r"(?<!\\)\$(?=\s*\.?\d)", r"\\text{dollar}", text, count=1)
    text = re.sub(r"(?<!\\)\$", " ", text)
    text = _without_boxes(text)
    text = re.sub(r"(?<!\\)\\!", "", text.replace("{,}", ","))
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", ",", text)
    text = _LAYOUT.sub(" ", text)
    text = _COMMAND.sub(lambda m: _SYNONYMS.get(m[0], m[0]) + (" " if m[0] in _SYNONYMS else ""), text)
    text = " ".join(text.split())
    for _ in range(3):
        text = re.sub(r"(?<![\\.])[.,;:]$|^[:=]\s*", "", text).strip()
        lead = _LEAD.match(text)
        if lead and not _DOUBT.search(lead[0]) and lead.end() < len(text):
            text = text[lead.end() :].strip()
    return text


def _without_boxes(text: str) -> str:
    r"""Replace `\boxed{a} ... \boxed{b}` by `a, b`, whatever stands between the boxes being ignored."""
    contents: list[str] = []
    while box := _BOX.search(text):
        depth, end = 0, len(text)
        for i in range(box.end(), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                end = i
                break
        inner = text[box.end() + 1 : end]
        if _BOX.search(inner):
            text = inner
            continue
        contents.append(inner.strip())
        text = text[end + 1 :]
    return ", ".join(contents) if contents else text


_TEXT = re.compile(
    r"\\(text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm)\*?\s*\{([^{}]*)\}"
)
_TOKEN = re.compile(
    r"(?P<text>" + _TEXT.pattern + r")|(?P<command>\\(?:[a-zA-Z]+|[{}|\\]))"
    r"|(?P<number>\d+\.(?= ?\\(?:overline|bar)\b)|"
    r"\d{1,3}(?: \d{3})+(?![\d.])|\d+(?:\.\d+)?(?:[eE][+-]?\d{1,4}(?![\d.]))?|\.\d+)"
    r"|(?P<word>[A-Za-z]+)|(?P<op><=|>=|!=|==|\*\*|\S)"
)
_OPERATORS = {"<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", "**": "^"}
_WORDS = FUNCTIONS | {"sqrt", "pi", "infty", "theta", "alpha", "beta", "lambda", "binom", "floor", "ceil", "abs"}
_INFINITY = {"infinity", "oo", "inf"}
_UNIT_WORDS = frozenset(
    [
        "cm",
        "mm",
        "km",
        "kg",
        "mg",
        "ml",
        "mL",
        "ft",
        "yd",
        "mi",
        "hr",
        "hrs",
        "min",
        "sec",
        "mph",
        "kmh",
        "kph",
        "Hz",
        "kHz",
        "lbs",
        "lb",
        "oz",
        "USD",
        "deg",
        "sq",
        "cu",
    ]
)
_METRIC = frozenset(["cm", "mm", "km", "kg"])  # after a letter, others are products: hr
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def plain_words(text: str) -> str:
    """Return the words of a text in lower case, without LaTeX's text commands, articles and punctuation."""
    text = re.sub(r"[^\w\s+*/=<>^-]", " ", _TEXT.sub(r" \2 ", text).replace("\\", " "))
    return " ".join(word for word in text.lower().split() if word not in ("the", "a", "an"))


def is_prose(text: str) -> bool:
    """Return whether a text consists of words, at least one of which is too long for a product of letters."""
    words = re.findall(r"[A-Za-z]+", text)
    return (
        re.fullmatch(r"[A-Za-z' ,.-]+", text) is not None
        and any(len(word) > 3 for word in words)
        and not any(word in _WORDS or word.lower() in _INFINITY for word in words)
    )


def tokenize(text: str) -> list[Token]:
    """Split a cleaned text into tokens.

    Commas between groups of three digits separate thousands, but only outside brackets: (1,234) is a pair.

    Raises:
        Unreadable: more than 1,500 tokens.
    """
    text = _without_thousands(text)
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        spaced = match.start() > 0 and text[match.start() - 1] == " "
        if match["text"]:
            tokens += _text_tokens(match[2], match[3], spaced)
        elif match["command"]:
            tokens.append(Token("command", match["command"][1:], spaced))
        elif match["number"]:
            tokens.append(Token("number", match["number"].replace(" ", ""), spaced))
        elif match["word"]:
            _add_word(tokens, match["word"], spaced, text[match.end() :])
        else:
            op = _OPERATORS.get(match["op"], match["op"])
            tokens.append(
                Token("command", op[1:], spaced) if op[0] == "\\" and len(op) > 1 else Token("op", op, spaced)
            )
        if len(tokens) > _MAX_TOKENS:
            raise Unreadable("too many tokens")
    return tokens


def _without_thousands(text: str) -> str:
    parts: list[str] = []
    depth = start = 0
    # Depth of (), [] and \{\}, at which commas separate the elements of tuples and sets.
    for match in re.finditer(r"\\[{}]|[()\[\]]|" + _GROUPED.pattern, text):
        if match[0][0].isdigit():
            parts += [text[start : match.start()], match[0].replace(",", "") if depth <= 0 else match[0]]
            start = match.end()
        else:
            depth += 1 if match[0] in ("\\{", "(", "[") else -1
    return "".join([*parts, text[start:]])


def _text_tokens(command: str, content: str, spaced: bool) -> list[Token]:
    content = content.strip().strip(",.;")
    words = content.split()
    if not words:
        return []
    if content in ("and", "or"):
        return [Token("op", content, spaced)]
    if content in _WORDS:
        return [Token("command", content, spaced)]
    if command not in ("text", "textbf", "textrm", "mbox") and re.fullmatch(r"[a-zA-Z]|\d+", content):
        return [Token("number" if content.isdigit() else "name", content, spaced)]
    if re.fullmatch(r"\d+", content):
        return [Token("number", content, spaced)]
    return [Token("text", content, spaced)]


def _add_word(tokens: list[Token], word: str, spaced: bool, rest: str) -> None:
    before = tokens[-1] if tokens else None
    after_number = before is not None and before.kind == "number"
    if word in ("and", "or"):
        tokens.append(Token("op", word, spaced))
    elif word.lower() in _INFINITY:
        tokens.append(Token("command", "infty", spaced))
    elif word in _WORDS:
        tokens.append(Token("command", word, spaced))
    elif word == "U" and before is not None and before.text in (")", "]", "}"):
        tokens.append(Token("command", "cup", spaced))
    elif word in ("x", "X") and after_number and re.match(r"\s*10\s*\^", rest):
        tokens.append(Token("command", "times", spaced))
    elif before is not None and before.text == "/" and len(tokens) > 1 and tokens[-2].kind == "text":
        tokens[-2:] = [Token("text", f"{tokens[-2].text}/{word}", tokens[-2].spaced)]
    elif before is not None and before.kind == "text" and spaced and len(word) > 1:
        tokens[-1] = Token("text", f"{before.text} {word}", before.spaced)
    elif (
        word in _METRIC
        or (word in _UNIT_WORDS and after_number and spaced)
        or len(word) > 3
        or (
            word in ("m", "g", "s", "h", "L")
            and after_number
            and spaced
            and re.fullmatch(r"(?: ?/ ?[a-z]+)?(?:\^?[\d{}]+)?", rest)
        )
    ):
        tokens.append(Token("text", word, spaced))
    else:
        tokens += [Token("name", letter, spaced and i == 0) for i, letter in enumerate(word)]
