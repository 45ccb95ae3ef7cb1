"""IFBench's `count:*` and `ratio:*`: how many of something the answer has, and in what proportion."""

from __future__ import annotations

import re

from nemo_cascade.reward.instructions.text import (
    Arguments,
    bare_words,
    integer,
    sentences,
    string,
    stripped,
    whole_word,
    words,
)

CONJUNCTIONS = frozenset({"and", "but", "for", "nor", "or", "so", "yet"})
NAMES = (
    "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin "
    "Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria "
    "Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella "
    "Jonathan"
).split()
"""The fifty names that the prompt of `count:person_names` lists."""
PRONOUNS = frozenset(
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself they them their theirs themselves this that these those who whom whose which what whoever "
    "whomever whatever whichever anybody anyone anything everybody everyone everything nobody nothing somebody someone "
    "something each either neither both all some any none".split()
)
STOP_WORDS = frozenset(
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself "
    "it its itself they them their theirs themselves what which who whom this that these those am is are was were be "
    "been being have has had having do does did doing a an the and but if or because as until while of at by for with "
    "about against between into through during before after above below to from up down in out on off over under again "
    "further then once here there when where why how all any both each few more most other some such no nor not only "
    "own same so than too very s t can will just don should now d ll m o re ve y".split()
)
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_TOKEN = re.compile(r"\w+|[^\w\s]")
OVERLAP_SLACK = 2  # percent


def word_count_range(arguments: Arguments, prompt: str, text: str) -> bool:
    """Between `min_words` and `max_words` words, both included."""
    return integer(arguments, "min_words") <= len(words(text)) <= integer(arguments, "max_words")


def unique_word_count(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least N different words."""
    return len({stripped(word) for word in text.lower().split()} - {""}) >= integer(arguments, "N")


def conjunctions(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least `small_n` different coordinating conjunctions."""
    return len(CONJUNCTIONS & {stripped(word).lower() for word in text.split()}) >= integer(arguments, "small_n")


def person_names(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least N different names of the prompt's list, written as there."""
    return sum(re.search(rf"\b{name}\b", text) is not None for name in NAMES) >= integer(arguments, "N")


def numbers(arguments: Arguments, prompt: str, text: str) -> bool:
    """Exactly N numbers; points and commas inside a number do not divide it."""
    return len(re.findall(r"\d+", " ".join(bare_words(text)))) == integer(arguments, "N")


def pronouns(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least N pronouns."""
    return sum(word in PRONOUNS for word in words(text.lower())) >= integer(arguments, "N")


def punctuation(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every standard mark (. , ! ? ; :) once beside an interrobang, written as ?! or !? or as one sign."""
    if "\u203d" not in text and "?!" not in text and "!?" not in text:
        return False
    rest = text.replace("?!", "", 1) if "?!" in text else text.replace("!?", "", 1)
    return all(mark in rest for mark in ".,!?;:")


def words_japanese(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every N-th word has a Japanese sign; numbers may stand in its place."""
    step = integer(arguments, "N")
    wanted = [stripped(word) for word in text.split()[step - 1 :: step]] if step > 0 else []
    return bool(wanted) and all(not word or word.isdigit() or _JAPANESE.search(word) for word in wanted)


def keywords_multiple(arguments: Arguments, prompt: str, text: str) -> bool:
    """Five keywords, as words of their own: once, twice, three, five and seven times."""
    wanted = {"keyword1": 1, "keyword2": 2, "keyword3": 3, "keyword4": 5, "keyword5": 7}
    return all(whole_word(string(arguments, name), text) == count for name, count in wanted.items())


def stop_words(arguments: Arguments, prompt: str, text: str) -> bool:
    """At most `percentage` percent of the words are English function words."""
    found = words(text.lower())
    return bool(found) and sum(word in STOP_WORDS for word in found) * 100 <= integer(arguments, "percentage") * len(
        found
    )


def _endings(text: str) -> dict[str, int]:
    found = sentences(text)
    return {mark: sum(sentence.endswith(mark) for sentence in found) for mark in ".?!"}


def sentence_type(arguments: Arguments, prompt: str, text: str) -> bool:
    """Twice as many statements as questions, and a question at all."""
    ends = _endings(text)
    return ends["?"] > 0 and ends["."] == 2 * ends["?"]


def sentence_balance(arguments: Arguments, prompt: str, text: str) -> bool:
    """As many statements as questions as exclamations, and one of each at all."""
    ends = _endings(text)
    return ends["."] > 0 and len(set(ends.values())) == 1


def sentence_words(arguments: Arguments, prompt: str, text: str) -> bool:
    """Three sentences of the same number of characters, and no word twice."""
    found = sentences(text)
    used = bare_words(" ".join(found))
    return len(found) == 3 and len({len(sentence) for sentence in found}) == 1 and len(used) == len(set(used))


def overlap(arguments: Arguments, prompt: str, text: str) -> bool:
    """`percentage` percent, give or take two, of the answer's three-word runs stand in the reference text."""
    mine, theirs = _trigrams(text), _trigrams(string(arguments, "reference_text"))
    share = 100 * len(mine & theirs) / len(mine) if mine else 0.0
    return bool(mine) and abs(share - integer(arguments, "percentage")) <= OVERLAP_SLACK


def _trigrams(text: str) -> set[tuple[str, ...]]:
    found = _TOKEN.findall(text)
    return set(zip(found, found[1:], found[2:], strict=False))


CHECKS = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:pronouns": pronouns,
    "count:punctuation": punctuation,
    "count:words_japanese": words_japanese,
    "count:keywords_multiple": keywords_multiple,
    "ratio:stop_words": stop_words,
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "ratio:overlap": overlap,
}
