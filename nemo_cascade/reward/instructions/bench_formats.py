"""IFBench's `format:*`: brackets, quotes, lists, indents, emoji."""

from __future__ import annotations

import itertools
import re
import string as string_module

from nemo_cascade.reward.instructions.text import Arguments, bare_words, sentences, string, stripped, tokens

DEPTH = 5  # of brackets
QUOTES = 3  # levels
_PAIRS = {")": "(", "]": "[", "}": "{"}
_EMOJI = re.compile(
    "[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u2190-\u21ff\u231a-\u23ff\u25aa-\u25fe\u3030\u303d\u3297\u3299]"
)
_LETTERS = re.compile(r"\W*[aA]\W*[bB]\W*[cC]\W*")
TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")


def parentheses(arguments: Arguments, prompt: str, text: str) -> bool:
    """Brackets of any of the three kinds, properly closed, at least five deep."""
    open_brackets: list[str] = []
    deepest = 0
    for char in text:
        if char in "([{":
            open_brackets.append(char)
            deepest = max(deepest, len(open_brackets))
        elif char in _PAIRS:
            if not open_brackets or open_brackets.pop() != _PAIRS[char]:
                open_brackets, deepest = [], 0
            elif deepest >= DEPTH:
                return True
    return False


def quotes(arguments: Arguments, prompt: str, text: str) -> bool:
    """Quotes inside quotes inside quotes, double and single ones in turn."""
    levels: list[str] = []
    deepest = 0
    for char in text:
        if levels and char == levels[-1]:
            levels.pop()
            if deepest - len(levels) >= QUOTES:
                return True
        elif char in "\"'":
            levels.append(char)
            deepest = max(deepest, len(levels))
    return False


def options(arguments: Arguments, prompt: str, text: str) -> bool:
    """One of the options and nothing else; letters as they are written, words whatever case and marks."""
    offered = string(arguments, "options")
    divider = "/" if "/" in offered else r"\bor\b" if re.search(r"\bor\b", offered) else ","
    choices = [choice.strip() for choice in re.split(divider, offered)]
    if _LETTERS.match(offered):
        return text.strip() in choices
    return stripped(text.strip()).lower() in [stripped(choice).lower() for choice in choices]


def newline(arguments: Arguments, prompt: str, text: str) -> bool:
    """Each word on a line of its own."""
    lines = [found for line in text.split("\n") if (found := bare_words(line))]
    return bool(lines) and all(len(line) == 1 for line in lines)


def emoji(arguments: Arguments, prompt: str, text: str) -> bool:
    """An emoji at the end of every sentence, before or after its mark."""
    found = [_bare(sentence) for sentence in sentences(text)]
    return bool(found) and all(
        sentence != "" and (_EMOJI.search(sentence[-2:]) or (index + 1 < len(found) and _EMOJI.match(found[index + 1])))
        for index, sentence in enumerate(found)
    )


def _bare(sentence: str) -> str:
    return sentence.translate(str.maketrans("", "", string_module.punctuation)).strip()


def line_indent(arguments: Arguments, prompt: str, text: str) -> bool:
    """Each line is indented further than the one before; there are at least two."""
    indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
    return len(indents) > 1 and all(left < right for left, right in itertools.pairwise(indents))


def quote_unquote(arguments: Arguments, prompt: str, text: str) -> bool:
    """No two quotations in a row, and none at the end: an explanation follows each."""
    packed = "".join(text.replace("\u201c", '"').replace("\u201d", '"').replace("'\"'", "").split())
    marks = string_module.digits + string_module.punctuation.replace('"', "")
    return '""' not in packed and not packed.strip(marks).endswith('"')


def listed(arguments: Arguments, prompt: str, text: str) -> bool:
    """The separator marks at least two items."""
    return text.count(string(arguments, "sep").strip()) >= 2


def thesis(arguments: Arguments, prompt: str, text: str) -> bool:
    """A stretch in HTML italics with text after it."""
    for opening, closing in (("<i>", "</i>"), ("<em>", "</em>")):
        _, opened, rest = text.partition(opening)
        inside, closed, after = rest.partition(closing)
        if opened and closed and inside.strip() and after.strip():
            return True
    return False


def sub_bullets(arguments: Arguments, prompt: str, text: str) -> bool:
    """Bullets marked by `*`, each with a `-` below it."""
    parts = text.split("*")[1:]
    return bool(parts) and all("-" in part for part in parts)


def no_bullets_bullets(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least two sentences, then nothing but at least two bullets marked by `*`."""
    lines = [line.strip() for line in text.strip().split("\n")]
    first = next((index for index, line in enumerate(lines) if line.startswith("*")), len(lines))
    bullets = lines[first:]
    before = sum(len(sentences(line)) for line in lines[:first])
    return before >= 2 and len(bullets) >= 2 and all(line.startswith("*") for line in bullets)


def title_case(arguments: Arguments, prompt: str, text: str) -> bool:
    """No word begins with a small letter."""
    found = [word for word in tokens(text) if word[0].isalpha()]
    return bool(found) and not any(word[0].islower() for word in found)


def output_template(arguments: Arguments, prompt: str, text: str) -> bool:
    """The three headings of the template."""
    return all(heading in text for heading in TEMPLATE)


def no_whitespace(arguments: Arguments, prompt: str, text: str) -> bool:
    """No white space inside the answer."""
    return len(text.split()) == 1


CHECKS = {
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": listed,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
}
