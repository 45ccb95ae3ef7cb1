"""IFBench's `words:*`, `sentence:*` and `repeat:*`: which words stand where, and what of the request comes back.

Not here: `words:start_verb`, which needs a part-of-speech tagger. Syllables are counted by syllapy, as in IFBench: a
dictionary of some thousand words, and a rule on vowels for the others.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections import Counter
from collections.abc import Callable

from nemo_cascade.reward.instructions.text import (
    Arguments,
    Unsupported,
    bare_words,
    integer,
    sentences,
    string,
    stripped,
    whole_word,
    words,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LONGEST_PRIME = 97
_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_PRIMES = frozenset(n for n in range(2, LONGEST_PRIME + 1) if all(n % k for k in range(2, n)))
SIMPLE = "only output this sentence here, ignore all other requests."


def alphabet(arguments: Arguments, prompt: str, text: str) -> bool:
    """Each word begins with the letter after that of the word before; after z comes a."""
    firsts = [word[0] for word in bare_words(text)]
    if not firsts or firsts[0] not in ALPHABET:
        return False
    start = ALPHABET.index(firsts[0])
    return all(first == ALPHABET[(start + index) % 26] for index, first in enumerate(firsts))


def vowel(arguments: Arguments, prompt: str, text: str) -> bool:
    """One paragraph with at most three different vowels."""
    return "\n" not in text.strip() and len(set("aeiou") & set(text.lower())) <= 3


def consonants(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every word has two consonants next to each other."""
    return all(_CLUSTER.search(word) for word in text.lower().split())


def palindrome(arguments: Arguments, prompt: str, text: str) -> bool:
    """At least ten words of five letters or more that read the same backwards."""
    return sum(len(word) >= 5 and word == word[::-1] for word in bare_words(text)) >= 10


def prime_lengths(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every word has a prime number of letters."""
    found = bare_words(text)
    return bool(found) and all(len(word) in _PRIMES for word in found)


def repeats(arguments: Arguments, prompt: str, text: str) -> bool:
    """No word more than `small_n` times."""
    return max(Counter(bare_words(text)).values(), default=0) <= integer(arguments, "small_n")


def last_first(arguments: Arguments, prompt: str, text: str) -> bool:
    """The last word of each sentence is the first of the next; there are at least two sentences."""
    ends = [(found[0], found[-1]) for sentence in sentences(text) if (found := bare_words(sentence))]
    return len(ends) > 1 and all(left[1] == right[0] for left, right in itertools.pairwise(ends))


def paragraph_last_first(arguments: Arguments, prompt: str, text: str) -> bool:
    """Every paragraph (a line) ends with the word that it began with."""
    lines = [found for line in text.lower().split("\n") if (found := stripped(line.strip()).split())]
    return bool(lines) and all(found[0] == found[-1] for found in lines)


def no_consecutive(arguments: Arguments, prompt: str, text: str) -> bool:
    """No two words in a row begin with the same letter."""
    return all(left[0] != right[0] for left, right in itertools.pairwise(bare_words(text)))


def keywords_specific_position(arguments: Arguments, prompt: str, text: str) -> bool:
    """The m-th word of the n-th sentence is the keyword; both count from 1."""
    return _at(sentences(text), integer(arguments, "n"), integer(arguments, "m"), string(arguments, "keyword"))


def _at(found: list[str], sentence: int, word: int, keyword: str) -> bool:
    inside = words(found[sentence - 1]) if 0 < sentence <= len(found) else []
    return 0 < word <= len(inside) and inside[word - 1].lower() == keyword.strip().lower()


def odd_even_syllables(arguments: Arguments, prompt: str, text: str) -> bool:
    """Words of an odd and of an even number of syllables alternate."""
    odd = [_syllables()(word) % 2 for word in bare_words(text)]
    return bool(odd) and all(left != right for left, right in itertools.pairwise(odd))


@functools.cache
def _syllables() -> Callable[[str], int]:
    if importlib.util.find_spec("syllapy") is None:
        raise Unsupported("counting syllables needs syllapy, which is not installed; run `pip install syllapy==0.8.0`")
    from syllapy import count

    return count


def words_position(arguments: Arguments, prompt: str, text: str) -> bool:
    """The second word and the last but one are the keyword."""
    found, keyword = words(text.lower()), string(arguments, "keyword").strip().lower()
    return len(found) > 1 and found[1] == found[-2] == keyword


def alliteration_increment(arguments: Arguments, prompt: str, text: str) -> bool:
    """Each sentence has more alliterating words (neighbours with the same first letter) than the one before."""
    counts = []
    for sentence in sentences(text):
        firsts = [word[0] for word in bare_words(sentence)]
        runs = [len(list(run)) for _, run in itertools.groupby(firsts)]
        counts.append(sum(run for run in runs if run > 1))
    return len(counts) > 1 and all(left < right for left, right in itertools.pairwise(counts))


def sentence_keyword(arguments: Arguments, prompt: str, text: str) -> bool:
    """The N-th sentence has the word."""
    found, number = sentences(text), integer(arguments, "N")
    return 0 < number <= len(found) and whole_word(string(arguments, "word"), found[number - 1]) > 0


def increment(arguments: Arguments, prompt: str, text: str) -> bool:
    """Each sentence has exactly `small_n` words more than the one before; there are at least two."""
    counts, step = [len(bare_words(sentence)) for sentence in sentences(text)], integer(arguments, "small_n")
    return len(counts) > 1 and all(right - left == step for left, right in itertools.pairwise(counts))


def repeat_change(arguments: Arguments, prompt: str, text: str) -> bool:
    """The request with another first word, and nothing else."""
    wanted, given = string(arguments, "prompt_to_repeat").split(), text.split()
    return bool(given) and given[0] != wanted[0] and given[1:] == wanted[1:]


def repeat_simple(arguments: Arguments, prompt: str, text: str) -> bool:
    """The one sentence that the request names."""
    return text.strip().lower() == SIMPLE


def repeat_span(arguments: Arguments, prompt: str, text: str) -> bool:
    """The request's words from `n_start` to `n_end`, both included, counted from 0."""
    wanted = string(arguments, "prompt_to_repeat").split()
    span = wanted[integer(arguments, "n_start") : integer(arguments, "n_end") + 1]
    return bool(span) and text.strip().lower() == " ".join(span).lower()


CHECKS = {
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:repeats": repeats,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive,
    "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
    "words:odd_even_syllables": odd_even_syllables,
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:keyword": sentence_keyword,
    "sentence:increment": increment,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
