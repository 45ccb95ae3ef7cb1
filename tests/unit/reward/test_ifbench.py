"""IFBench's checks: for every id an answer that follows it and ones that do not; loose reading; languages; time."""

from __future__ import annotations

import importlib.util
import json
import string
import time

import pytest

from nemo_cascade import domains
from nemo_cascade.reward.instructions import (
    CHECKS,
    Unsupported,
    bench_counts,
    bench_custom,
    bench_formats,
    bench_words,
    check,
    grade,
    loosened,
)
from nemo_cascade.types import Invalid, Json, Message, Scored, Transcript, UserError
from tests.released import released_data

BENCH = {**bench_counts.CHECKS, **bench_words.CHECKS, **bench_formats.CHECKS, **bench_custom.CHECKS}
PALINDROMES = "level radar civic kayak refer rotor madam tenet solos stats"
QUESTION = "{}\nA) a\nB) b\nC) c\nD) d\nE) e"
QUESTIONS = "\n".join(f"Question {n}. {QUESTION.format('Why' + '?' * n)}" for n in range(1, 5))
ROWS = "\n".join(["ID,Country,City,Year,Count"] + [f"{n},a,b,2000,{n}" for n in range(7)])
GOODS = "\n".join(["ProductID,Category,Brand,Price,Stock", '1,"a&b",c,1,2'] + [f"{n},a,c,1,2" for n in range(13)])
MARKS = "\n".join(
    "\t".join(f'"{cell}"' for cell in row.split())
    for row in ["StudentID Subject Grade Semester Score", "1 a b c d", "2 a b c d", "3 a b c d"]
)
STATES = "\n".join(["Zimbabwe", "Zambia"] + [f"Country {n}" for n in range(99, 49, -1)])
STORY = " ".join(f"{letter}bc went on." for letter in string.ascii_uppercase)
CAPITALS = ", ".join(bench_custom.CAPITALS)

CASES: list[tuple[str, dict[str, Json], str, tuple[str, ...]]] = [
    ("count:word_count_range", {"min_words": 2, "max_words": 3.0}, "one two", ("one", "a b c d")),
    ("count:unique_word_count", {"N": 3}, "one two three", ("one One, one", "- - -")),
    ("count:conjunctions", {"small_n": 2}, "You and I, but not he.", ("and and AND", "hand butter")),
    ("count:person_names", {"N": 2}, "Emma met Leo.", ("Emma met Emma.", "emma leo", "Leonard Emmanuel")),
    ("count:numbers", {"N": 2}, "In 1,000 days 3.5 m fell.", ("1 2 3", "none")),
    ("count:pronouns", {"N": 3}, "She gave me it/them.", ("The cat sat.", "I ran")),
    ("count:punctuation", {}, "a. b, c! d? e; f: g?!", ("a. b, c! d? e; f g?!", "a. b, c; d: e?!")),
    ("count:words_japanese", {"N": 2}, "one \u732b two \u3044\u306c", ("one two", "\u732b one", "one")),
    (
        "count:keywords_multiple",
        {"keyword1": "a", "keyword2": "b", "keyword3": "c", "keyword4": "d", "keyword5": "e"},
        "a b b c c c d d d d d e e e e e e e",
        ("a b b c c c d d d d d e e e e e e ee", "a a b b c c c d d d d d e e e e e e e"),
    ),
    ("ratio:stop_words", {"percentage": 50}, "the frog", ("the the frog", "...")),
    ("ratio:sentence_type", {}, "One. Two. Three?", ("One. Two?", "No!", "words")),
    ("ratio:sentence_balance", {}, "One. Two? Three!", ("One. Two?", "words")),
    (
        "ratio:sentence_words",
        {},
        "Cat ran. Dog sat. Hen ate.",
        ("Cat ran. Dog sat.", "Cat ran. Cat sat. Hen ate.", "A b. C d. Efg h."),
    ),
    ("ratio:overlap", {"reference_text": "a b c d e", "percentage": 50}, "a b c x", ("a b c d", "x y z", "a b")),
    ("words:alphabet", {}, "Yes, zebras are big.", ("Ants run", "1 a", "...")),
    ("words:vowel", {}, "Cats sit on", ("aeio", "a\nb")),
    ("words:consonants", {}, "strong winds", ("strong ox", "area")),
    ("words:palindrome", {}, PALINDROMES, (PALINDROMES.replace("stats", "state"), "noon " * 10)),
    ("words:prime_lengths", {}, "It is you!", ("It is a", "four", "...")),
    ("words:repeats", {"small_n": 1}, "one two", ("one One.",)),
    ("words:last_first", {}, "I see rain. Rain falls.", ("I see rain. Snow falls.", "One sentence.")),
    ("words:paragraph_last_first", {}, "Rain is rain.\n\nSun is the sun", ("Rain is rain.\nSun is hot.", "...")),
    ("words:no_consecutive", {}, "big old bear", ("big bear",)),
    (
        "words:keywords_specific_position",
        {"keyword": "red", "n": 2, "m": 3},
        "Hi. It is red.",
        ("It is red.", "Hi. It red."),
    ),
    ("words:words_position", {"keyword": "it"}, "Do it now or it ends", ("it is it", "Do it", "it")),
    ("sentence:alliteration_increment", {}, "Red cat. Big bad cat.", ("Big bad cat. Red cat.", "Big bad cat.")),
    ("sentence:keyword", {"word": "rain", "N": 2}, "Hi. The Rain falls.", ("The rain. Hi.", "Hi. Train.", "Rain.")),
    ("sentence:increment", {"small_n": 1}, "One. Two words.", ("One. Two.", "One.")),
    (
        "repeat:repeat_change",
        {"prompt_to_repeat": "Say hi now"},
        "Shout hi now",
        ("Say hi now", "Shout hi", "Shout hi now!"),
    ),
    ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", ("Only this.",)),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b c d", "n_start": 1, "n_end": 2}, "B c", ("b c d", "a b")),
    ("format:parentheses", {}, "([{([x])}])", ("(((x)))", "(((((x", "([{([x)]}])")),
    ("format:quotes", {}, '"a \'b "c" d\' e"', ("\"a 'b' c\"", '""""', "none")),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", ("Yes, because", "perhaps")),
    ("format:options", {"options": "I know or I don't know"}, "i don't know", ("I know or I don't know",)),
    ("format:options", {"options": "a), b), c)"}, "b)", ("B)", "b) because")),
    ("format:newline", {}, "one\n\ntwo.", ("one two", "...")),
    ("format:emoji", {}, "Hi. \U0001f600 Bye \u2764\ufe0f.", ("Hi. Bye \U0001f600.", "Hi.")),
    ("format:line_indent", {}, "a\n b\n\n  c", ("a\n b\n b", "a")),
    ("format:quote_unquote", {}, '"Hi" means hello', ('He said "hi"', '"a" "b" is')),
    ("format:list", {"sep": "!?!?"}, "!?!? a\n!?!? b", ("!?!? a",)),
    ("format:thesis", {}, "<em>Claim</em> because", ("<i>Claim</i>", "<i></i> text", "Claim")),
    ("format:sub-bullets", {}, "* a\n - b\n* c\n - d", ("* a\n* b\n - c", "a - b")),
    (
        "format:no_bullets_bullets",
        {},
        "One. Two.\n* a\n* b",
        ("One.\n* a\n* b", "One. Two.\n* a", "One. Two.\n* a\n* b\nEnd."),
    ),
    ("format:title_case", {}, "The Cat Don't Sit", ("The cat", "...")),
    ("format:output_template", {}, "My Answer: a My Conclusion: b Future Outlook: c", ("My Answer: a",)),
    ("format:no_whitespace", {}, " word\n", ("two words",)),
    ("custom:multiples", {}, "14,21, 28 35 42 49", ("14 21 28 35 42", "7 14 21 28 35 42 49")),
    (
        "custom:mcq_count_length",
        {},
        QUESTIONS,
        ("Sure.\n" + QUESTIONS, QUESTIONS.replace("E) e", "", 1), QUESTIONS.replace("Why?\n", "Why??????\n")),
    ),
    ("words:odd_even_syllables", {}, "One apple, then water.", ("One apple water", "cat dog", "...")),
    ("words:odd_even_syllables", {}, "hidden in water", ("A one", "The poem apple")),
    (
        "custom:reverse_newline",
        {},
        STATES,
        (STATES.replace("Country 60\n", ""), "\n".join(reversed(STATES.split("\n")))),
    ),
    ("custom:word_reverse", {}, "eagle bald the is It", ("It is the bald eagle", "eagle bald. Yes.")),
    ("custom:character_reverse", {}, "elgae dlaB", ("bald eagle",)),
    ("custom:sentence_alphabet", {}, STORY, (STORY.replace("Zbc went on.", ""), STORY.replace("Bbc", "Cbc"))),
    (
        "custom:european_capitals_sort",
        {},
        CAPITALS.replace("Chisinau", "Chi\u0219in\u0103u"),
        ("Oslo, Riga", CAPITALS + ", Rome"),
    ),
    ("custom:csv_city", {}, ROWS, (ROWS + "\n1,2,3,4,5", ROWS.replace("City", "Town"), ROWS.replace("0,a,b", "0,b"))),
    ("custom:csv_special_character", {}, GOODS, (GOODS.replace("a&b", "a b"), GOODS + "\n1,a,c,1,2")),
    ("custom:csv_quotes", {}, MARKS, (MARKS.replace('"1"', "1"), MARKS.replace("\t", ","))),
    (
        "custom:date_format_list",
        {},
        "1805-12-02, 1815-06-18",
        ("1805-13-02", "2015-06-18", "1815-02-30", "Sure: 1805-12-02"),
    ),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_follows_and_misses(name: str, arguments: dict[str, Json], good: str, bad: tuple[str, ...]) -> None:
    assert check(name, {**arguments, "unused": None}, "", good) is True
    for text in (*bad, "", " \n"):
        assert check(name, arguments, "", text) is False, text


def test_57_of_58_ids_are_there_and_the_other_is_unsupported() -> None:
    assert {case[0] for case in CASES} == set(BENCH)
    assert len(BENCH) == 57
    with pytest.raises(Unsupported, match="has no checker"):
        check("words:start_verb", {}, "", "Go on")


def test_syllables_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bench_words._syllables.cache_clear()
    outcome = grade(["words:odd_even_syllables"], [None], "", "one apple")
    assert isinstance(outcome, Invalid)
    assert "pip install syllapy==0.8.0" in outcome.reason
    monkeypatch.undo()
    bench_words._syllables.cache_clear()


def test_missing_arguments_are_never_a_pass() -> None:
    for name, arguments, good, _ in CASES:
        if arguments:
            outcome = grade([name], [{key: None for key in arguments}], "", good)
            assert isinstance(outcome, Invalid), name


def test_loose_forgives_a_preamble_a_closing_and_asterisks() -> None:
    answer = "Sure, here it is:\nONE *TWO*\nHope, this helps!"
    assert len(loosened(answer)) == 9 - 1
    ids = ["change_case:english_capital", "punctuation:no_comma"]
    strict, loose = (grade(ids, [None, None], "", answer, loose=loose) for loose in (False, True))
    assert isinstance(strict, Scored) and isinstance(loose, Scored)
    assert (strict.reward, loose.reward) == (0.0, 1.0)
    assert grade(ids, [None, None], "", "one, two", loose=True).reward == 0.0  # type: ignore[union-attr]
    row: dict[str, Json] = {"prompt": "x", "instruction_id_list": ids, "kwargs": [None, None]}
    for checking, reward in (("strict", 0.0), ("loose", 1.0)):
        domain = domains.load("instruction_following", None, {"checking": checking})
        outcome = domain.score(domain.parse_row(row, "f:1"), Transcript((Message("assistant", answer),)))
        assert isinstance(outcome, Scored) and outcome.reward == reward
    with pytest.raises(UserError, match="checking: 'lax'; choose strict or loose"):
        domains.load("instruction_following", None, {"checking": "lax"})


SPANISH = "el perro de mi hermano come todos los dias en la cocina con el gato de mi hermana"
ENGLISH = "the dog of my brother eats every day in the kitchen with the cat of my younger sister"


def test_capitals_must_be_english() -> None:
    for text, right in ((ENGLISH, True), (SPANISH, False)):
        assert check("change_case:english_lowercase", {}, "", text) is right
        assert check("change_case:english_capital", {}, "", text.upper()) is right
        assert check("language:response_language", {"language": "es"}, "", text) is not right


LONG = (
    "a",
    "A. ",
    "[",
    "<<",
    "*",
    "\n",
    "- ",
    '"',
    "'",
    "(",
    "*** ",
    "[]",
    "<i>",
    "1. ",
    "x ",
    "-",
    "!?",
    "Mr. ",
    "\t",
)


@pytest.mark.parametrize("unit", LONG)
def test_the_longest_answer_is_checked_in_seconds(unit: str) -> None:
    text = (unit * 30_000)[:30_000]
    arguments = {name: case[1] for case in CASES for name in (case[0],)}
    number = dict.fromkeys(("num_placeholders", "num_bullets", "num_highlights", "num_sections", "num_sentences"), 3)
    more = {"section_spliter": "S", "relation": "at least", "postscript_marker": "P.S.", "first_word": "a"}
    began = time.process_time()
    for name in CHECKS:
        try:
            check(name, {**number, **more, **arguments.get(name, {})}, "", text)
        except Unsupported:
            continue  # an argument of another id is missing; that is no matter of time
    assert time.process_time() - began < 5.0


def test_all_ifeval_prompts_load_and_score() -> None:
    """Each prompt loads, and each answer gets a verdict, strict and loose."""
    strict = domains.load("instruction_following")
    loose = domains.load("instruction_following", None, {"checking": "loose"})
    rows = [json.loads(line) for line in (released_data() / "ifeval_input.jsonl").open()]
    assert len(rows) == 541
    followed = 0
    for number, row in enumerate(rows):
        task = strict.parse_row(row, f"ifeval:{number}")
        answers = ("no", "My answer is yes.\nP.S. bye", row["prompt"])
        for answer in answers:
            transcript = Transcript((Message("assistant", answer),))
            hard, soft = strict.score(task, transcript), loose.score(task, transcript)
            assert isinstance(hard, Scored) and isinstance(soft, Scored), row["key"]
            assert set(hard.parts) >= set(row["instruction_id_list"])
            assert hard.reward <= soft.reward
            followed += hard.reward > 0
    assert 20 < followed < 541  # "no" has no comma, few words and no forbidden ones
