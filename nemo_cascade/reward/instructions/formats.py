"""`detectable_format:*`, `detectable_content:*`: titles, bullets, sections, brackets, JSON."""

from __future__ import annotations

import json
import re

from nemo_cascade.reward.instructions.text import Arguments, integer, sentences, string

_FENCE = re.compile(r"\A```(?:json)?\s*\n?(.*?)\n?\s*```\Z", re.DOTALL | re.IGNORECASE)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def number_placeholders(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least so many placeholders in square brackets."""
    closed = (line[: line.rfind("]") + 1] for line in text.split("\n"))  # what has no end would be searched for ever
    return sum(len(re.findall(r"\[.*?\]", line)) for line in closed) >= integer(arguments, "num_placeholders")


def postscript(arguments: Arguments, prompt: str, text: str) -> bool:
    """A postscript with the given marker; P.S. and P.P.S may hold spaces."""
    marker = string(arguments, "postscript_marker").strip().lower()
    known = {"p.p.s": r"p\.\s?p\.\s?s", "p.p.s.": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\.", "p.s": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker)), text.lower()) is not None


def number_bullet_lists(arguments: Arguments, prompt: str, text: str) -> bool:
    """Exactly so many markdown bullets, `*` or `-`."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == integer(arguments, "num_bullets")


def constrained_response(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer holds one of the three fixed sentences."""
    return any(option in text for option in _CONSTRAINED)


def number_highlighted_sections(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least so many `*highlighted*` or `**highlighted**` stretches."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part.strip("*").strip()]
    return len(single) + len(double) >= integer(arguments, "num_highlights")


def multiple_sections(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least so many sections marked by the splitter and a number."""
    splitter = re.escape(string(arguments, "section_spliter").strip())
    return len(re.findall(rf"{splitter}\s?\d+", text)) >= integer(arguments, "num_sections")


def json_format(arguments: Arguments, prompt: str, text: str) -> bool:
    """The whole answer is JSON, perhaps in a code fence."""
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        json.loads(fenced.group(1) if fenced else stripped)
    except (ValueError, RecursionError):
        return False
    return True


def title(arguments: Arguments, prompt: str, text: str) -> bool:
    """A title in double angular brackets."""
    lines = (line[line.find("<<") : line.rfind(">>") + 2] for line in text.split("\n") if "<<" in line and ">>" in line)
    return any(found.endswith(">>") and found.lstrip("<").rstrip(">").strip() for found in lines)


def sentence_hyphens(arguments: Arguments, prompt: str, text: str) -> bool:
    """Sentences are joined by hyphens without spaces."""
    parts = text.split("-")
    wanted = sentences(" ".join(parts))
    return bool(text.strip()) and all(part == sentence for part, sentence in zip(parts, wanted, strict=False))


def square_brackets(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every word stands in square brackets."""
    parts = text.split()
    return bool(parts) and all(part.startswith("[") and part.endswith("]") for part in parts)


def bigram_wrapping(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every pair of words stands in double angular brackets; a single last word may stand alone."""
    parts = text.split()
    pairs = zip(parts[::2], parts[1::2], strict=False)
    return len(parts) > 1 and all(left.startswith("<<") and right.endswith(">>") for left, right in pairs)


CHECKS = {
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "detectable_format:sentence_hyphens": sentence_hyphens,
    "detectable_format:square_brackets": square_brackets,
    "detectable_format:bigram_wrapping": bigram_wrapping,
}
