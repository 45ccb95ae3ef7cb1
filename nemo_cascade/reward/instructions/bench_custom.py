"""IFBench's `custom:*`: one fixed request each, without arguments."""

from __future__ import annotations

import csv
import io
import itertools
import re
import unicodedata
from datetime import date

from nemo_cascade.reward.instructions.text import Arguments, bare_words, sentences, stripped

AFRICA = 52  # lines at least, from Zimbabwe on
CAPITALS = (
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw "
    "London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
).split()
"""European capitals north of 45 degrees, from north to south, as the released check has them."""
NAPOLEON = (1769, 1821)
_QUESTION = re.compile(r"\n*Question \d+[.|):;]?\s*")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w+")
_SPECIAL = re.compile(r"[^\w\s]")


def multiples(arguments: Arguments, prompt: str, text: str) -> bool:
    """The multiples of 7 from 10 to 50, in order, and no other number."""
    return re.findall(r"\d+", text) == [str(number) for number in range(14, 51, 7)]


def mcq_count_length(arguments: Arguments, prompt: str, text: str) -> bool:
    """Four questions with five options each, every question longer than the one before, nothing around them."""
    if not text.strip().startswith("Question"):
        return False
    lengths = []
    for question in filter(None, (part.strip() for part in _QUESTION.split(text.strip()))):
        lines = [line.strip() for line in question.split("\n")]
        options = [_OPTION.match(line) is not None for line in lines]
        if sum(options) != 5:
            return False
        lengths.append(len(" ".join(lines[: options.index(True)])))
    return len(lengths) == 4 and all(left < right for left, right in itertools.pairwise(lengths))


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def reverse_newline(arguments: Arguments, prompt: str, text: str) -> bool:
    """From Zimbabwe on, at least 52 lines in reverse alphabetical order."""
    lines = [found for line in text.split("\n") if (found := stripped(line))]
    start = next((index for index, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    listed = [_ascii(line) for line in lines[start:]]
    return len(listed) >= AFRICA and listed == sorted(listed, reverse=True)


def word_reverse(arguments: Arguments, prompt: str, text: str) -> bool:
    """One sentence on the bald eagle, word by word from its end."""
    return "bald eagle" in " ".join(reversed(bare_words(text))) and len(sentences(text)) == 1


def character_reverse(arguments: Arguments, prompt: str, text: str) -> bool:
    """The bald eagle, letter by letter from its end."""
    return "elgae dlab" in text.lower()


def sentence_alphabet(arguments: Arguments, prompt: str, text: str) -> bool:
    """26 sentences that begin with the letters of the alphabet in order."""
    firsts = [found[0][0] for sentence in sentences(text) if (found := bare_words(sentence))]
    return "".join(firsts) == "abcdefghijklmnopqrstuvwxyz"


def european_capitals_sort(arguments: Arguments, prompt: str, text: str) -> bool:
    """The capitals north of 45 degrees between commas, from north to south."""
    return [city.strip() for city in _ascii(text).split(",") if city.strip()] == CAPITALS


def _table(text: str, delimiter: str = ",", quoting: bool = False) -> list[list[str]]:
    """Rows of cells; with `quoting` each cell keeps the quotation marks it was written in."""
    given = text.strip().replace('"', '"""') if quoting else text.strip()
    try:
        return list(csv.reader(io.StringIO(given), delimiter=delimiter))
    except csv.Error:
        return []


def _is_table(rows: list[list[str]], header: str, count: int) -> bool:
    names = [name.strip().strip('"') for name in rows[0]] if rows else []
    return names == header.split() and len(rows) == count + 1 and all(len(row) == len(names) for row in rows)


def csv_city(arguments: Arguments, prompt: str, text: str) -> bool:
    """Seven rows under ID, Country, City, Year, Count."""
    return _is_table(_table(text), "ID Country City Year Count", 7)


def csv_special_character(arguments: Arguments, prompt: str, text: str) -> bool:
    """Fourteen rows under ProductID, Category, Brand, Price, Stock; a quoted cell has a special character."""
    rows = _table(text, quoting=True)
    special = any(_has_special(cell.strip()) for row in rows[1:] for cell in row)
    return _is_table(rows, "ProductID Category Brand Price Stock", 14) and special


def _has_special(cell: str) -> bool:
    """A cell in quotation marks with a sign between them that is no letter, digit or space."""
    inside = cell[1 : cell.rfind('"')] if cell.startswith('"') else ""
    return _SPECIAL.search(inside) is not None


def csv_quotes(arguments: Arguments, prompt: str, text: str) -> bool:
    """Three rows under StudentID, Subject, Grade, Semester, Score, tabs between them, every cell in quotes."""
    rows = _table(text, "\t", quoting=True)
    cells = [cell.strip() for row in rows for cell in row]
    quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)
    return _is_table(rows, "StudentID Subject Grade Semester Score", 3) and quoted


def date_format_list(arguments: Arguments, prompt: str, text: str) -> bool:
    """Dates of Napoleon's lifetime as YYYY-MM-DD between commas, and nothing else."""
    return all(_in_lifetime(part.strip()) for part in text.split(","))


def _in_lifetime(text: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        return False
    try:
        return NAPOLEON[0] <= date.fromisoformat(text).year <= NAPOLEON[1]
    except ValueError:
        return False


CHECKS = {
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
}
