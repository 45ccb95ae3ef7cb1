"""`keywords:*` and `count:*`: which words appear, how often and where."""

from __future__ import annotations

import itertools
import re

from nemo_cascade.reward.instructions.text import (
    Arguments,
    compares,
    divided_paragraphs,
    integer,
    sentences,
    string,
    strings,
    words,
)


def occurrences(keyword: str, text: str) -> int:
    """Case-insensitive occurrences, inside longer words too, as IFEval counts them."""
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def existence(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every keyword appears."""
    return all(occurrences(keyword, text) for keyword in strings(arguments, "keywords"))


def frequency(arguments: Arguments, prompt: str, text: str) -> bool:
    """The keyword appears at least, or less than, so many times."""
    return compares(occurrences(string(arguments, "keyword"), text), arguments, "frequency", "relation")


def forbidden_words(arguments: Arguments, prompt: str, text: str) -> bool:
    """None of the words appears as a whole word."""
    pattern = "|".join(re.escape(word.strip()) for word in strings(arguments, "forbidden_words"))
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE) is None


def letter_frequency(arguments: Arguments, prompt: str, text: str) -> bool:
    """A letter appears at least, or less than, so many times, upper and lower case alike."""
    return compares(
        text.lower().count(string(arguments, "letter").strip().lower()), arguments, "let_frequency", "let_relation"
    )


def word_once(arguments: Arguments, prompt: str, text: str) -> bool:
    """The keyword appears exactly once."""
    return occurrences(string(arguments, "keyword"), text) == 1


def exclude_word_harder(arguments: Arguments, prompt: str, text: str) -> bool:
    """The keyword does not stand between two spaces (the released rule, which lets it end a sentence)."""
    return f" {string(arguments, 'keyword').strip()} " not in text


def no_adjacent_consecutive(arguments: Arguments, prompt: str, text: str) -> bool:
    """No word starts with the letter that follows the previous word's first letter in the alphabet."""
    firsts = [word.lower()[0] for word in text.split()]  # not word[0].lower(): \u0130 becomes two
    return bool(firsts) and all(ord(right) - ord(left) != 1 for left, right in itertools.pairwise(firsts))


def palindrome(arguments: Arguments, prompt: str, text: str) -> bool:
    """Some word of two letters or more reads the same backwards."""
    return any(len(word) > 1 and word.lower() == word.lower()[::-1] for word in words(text))


def keyword_specific_position(arguments: Arguments, prompt: str, text: str) -> bool:
    """The m-th word of the n-th sentence is the keyword; both count from 1."""
    sentence, word = integer(arguments, "n"), integer(arguments, "m")
    found = sentences(text)
    inside = words(found[sentence - 1]) if 0 < sentence <= len(found) else []
    return 0 < word <= len(inside) and inside[word - 1].lower() == string(arguments, "keyword").strip().lower()


def start_end(arguments: Arguments, prompt: str, text: str) -> bool:
    """The answer starts and ends with the same word."""
    found = words(text)
    return len(found) > 1 and found[0].lower() == found[-1].lower()


def count_increment_word(arguments: Arguments, prompt: str, text: str) -> bool:
    """The first keyword once, the second twice."""
    return (
        occurrences(string(arguments, "keyword1"), text) == 1 and occurrences(string(arguments, "keyword2"), text) == 2
    )


def lowercase_counting(arguments: Arguments, prompt: str, text: str) -> bool:
    """At most N words are entirely lower case."""
    return len(re.findall(r"\b[a-z]+\b", text)) <= integer(arguments, "N")


def count_unique(arguments: Arguments, prompt: str, text: str) -> bool:
    """No word is used twice."""
    found = words(text)
    return bool(found) and len(found) == len(set(found))


def counting_composition(arguments: Arguments, prompt: str, text: str) -> bool:
    """Three paragraphs between `***`, each of `n_sent` sentences of `n_words` words."""
    paragraphs = divided_paragraphs(text) or []
    shapes = [[len(words(sentence)) for sentence in sentences(paragraph)] for paragraph in paragraphs]
    return shapes == [[integer(arguments, "n_words")] * integer(arguments, "n_sent")] * 3


CHECKS = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "letters:letter_counting2": letter_frequency,
    "keywords:word_once": word_once,
    "keywords:word_count_different_numbers": frequency,
    "keywords:exclude_word_harder": exclude_word_harder,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive,
    "keywords:palindrome": palindrome,
    "keywords:keyword_specific_position": keyword_specific_position,
    "keywords:start_end": start_end,
    "count:count_increment_word": count_increment_word,
    "count:lowercase_counting": lowercase_counting,
    "count:count_unique": count_unique,
    "count:counting_composition": counting_composition,
}
