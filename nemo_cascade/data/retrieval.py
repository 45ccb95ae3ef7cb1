"""Which files of a repository an issue is about, by the words they share: BM25 over identifiers, offline.

score(file) = sum over the issue's words w, as often as they stand there, of
idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length)), idf(w) = ln(1 + (N - n_w + 0.5) / (n_w + 0.5)),
with tf the occurrences in the file's text and path, n_w the files that have the word, N all files, k1 = 1.5 and
b = 0.75 (Robertson and Zaragoza 2009).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

K1, B = 1.5, 0.75
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def words_of(text: str) -> list[str]:
    """Identifiers in lower case, and the parts of compound ones: `readFile_v2` gives readfile_v2, read, file, v."""
    found = []
    for word in _WORD.findall(text):
        parts = _PART.findall(word)
        found.append(word.lower())
        found += [part.lower() for part in parts] if len(parts) > 1 else []
    return found


def scores(files: Mapping[str, str], query: str) -> dict[str, float]:
    """Path -> BM25 score of the file for a query."""
    wanted = Counter(words_of(query))
    counts = {path: Counter(words_of(f"{path}\n{text}")) for path, text in files.items()}
    lengths = {path: count.total() for path, count in counts.items()}
    mean = sum(lengths.values()) / max(len(files), 1) or 1.0
    having = Counter(word for count in counts.values() for word in wanted.keys() & count.keys())
    idf = {word: math.log(1.0 + (len(files) - n + 0.5) / (n + 0.5)) for word, n in having.items()}

    def score(path: str) -> float:
        count, norm = counts[path], K1 * (1.0 - B + B * lengths[path] / mean)
        found = [(times, idf[word], count[word]) for word, times in wanted.items() if word in count]
        return sum(times * weight * tf * (K1 + 1.0) / (tf + norm) for times, weight, tf in found)

    return {path: score(path) for path in files}


def ranked(files: Mapping[str, str], query: str) -> list[str]:
    """All paths, the best match first; equal scores in the order of their names."""
    found = scores(files, query)
    return sorted(files, key=lambda path: (-found[path], path))
