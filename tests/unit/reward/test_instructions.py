"""Every instruction id: one answer that follows it and one that does not."""

from __future__ import annotations

import json

import pytest

from nemo_cascade.reward.instructions import (
    CHECKS,
    Unsupported,
    bench_counts,
    bench_custom,
    bench_formats,
    bench_words,
    check,
    grade,
)
from nemo_cascade.reward.instructions.text import sentences
from nemo_cascade.types import Invalid, Json, Scored
from tests.released import released_data

CASES: list[tuple[str, dict[str, Json], str, str]] = [
    ("keywords:existence", {"keywords": ["frog", "Road"]}, "A frog on the road.", "A frog on a path."),
    ("keywords:frequency", {"keyword": "up", "frequency": 2, "relation": "at least"}, "Up and up.", "Up and away."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "A Cat!"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "less than"}, "Aa b", "banana"),
    ("letters:letter_counting2", {"letter": "b", "let_frequency": 1, "let_relation": "at least"}, "Bee", "see"),
    ("keywords:word_once", {"keyword": "fish"}, "One fish.", "Fish eat fish."),
    ("keywords:word_count_different_numbers", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a b a", "a b"),
    ("keywords:exclude_word_harder", {"keyword": "the"}, "then the.", "in the sun"),
    ("keywords:no_adjacent_consecutive", {}, "a dog can", "a big cat"),
    ("keywords:palindrome", {}, "See a racecar.", "I see a car."),
    ("keywords:keyword_specific_position", {"keyword": "red", "n": 2, "m": 3}, "Hi Bo. It is red.", "It is red. Hi."),
    ("keywords:start_end", {}, "Rain, then more rain.", "Rain, then sun."),
    ("count:count_increment_word", {"keyword1": "sun", "keyword2": "moon"}, "sun moon moon", "sun moon"),
    ("count:lowercase_counting", {"N": 2}, "ONE two three", "one two three"),
    ("count:count_unique", {}, "one two", "one one"),
    (
        "count:counting_composition",
        {"n_sent": 1, "n_words": 2},
        "A b.\n***\nC d.\n***\nE f.",
        "A b.\n***\nC d.\n***\nE.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Hi. Ho!", "Hi, Dr. Ho."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "crash"},
        "One.\n\n'Crash! went it.",
        "Crash.\n\nOne.",
    ),
    ("letters:letter_counting", {"N": 4, "relation": "less than"}, "abc 123", "abcd"),
    ("paragraphs:paragraphs", {}, "a *** b", "a *** b *** c"),
    ("paragraphs:paragraphs2", {}, "a\n\nb", "a\nb"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. hi", "Bye. PS hi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 x Day 2 y",
        "Day 1 x Day y",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A poem>>\nText", "<A poem>"),
    ("detectable_format:sentence_hyphens", {}, "One two.-Three four.", "One two. - Three four."),
    ("detectable_format:square_brackets", {}, "[one] [two]", "[one] two"),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> <<at home>>", "<<I am>> at home"),
    ("startend:end_checker", {"end_phrase": "The end!"}, "So. the END!", "The end! Bye"),
    ("startend:quotation", {}, '"all"', '"all" of it'),
    ("first_word:first_word_answer", {"first_word": "yes"}, "Yes it is", "It is, yes"),
    ("first_word:first_word_sent", {"first_word": "we"}, "We go. We come!", "We go. They come."),
    ("last_word:last_word_answer", {"last_word": "bye"}, "Good Bye!", "Bye now"),
    ("last_word:last_word_sent", {"last_word": "so"}, "Is it so? It is so.", "Is it so? It is."),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! say hi."),
    ("copy:copy", {"prompt_to_repeat": "Say hi."}, " say hi. ", "say hi. Hi!"),
    ("copy:copying_simple", {"prompt_to_repeat": "Say hi."}, "Say hi.", "Hi"),
    ("copy:copying_multiple", {"prompt_to_repeat": "hi", "N": 2}, "hi ****** hi", "hi ****** ho"),
    ("new:copy_span_idx", {"prompt_to_repeat": "abcdef", "n_start": 1, "n_end": 4}, "bcd", "abcd"),
    ("copy:copy_span_idx", {"prompt_to_repeat": "abcdef", "n_start": 1, "n_end": 4}, "bcd", "bcde"),
    (
        "copy:repeat_phrase",
        {"phrase": "we all go home", "small_n": 2},
        "we now go home. we all run home.",
        "we all go home. we now go home.",
    ),
    ("change_case:english_capital", {}, "ALL; OF IT!", "ALL of IT"),
    ("change_case:english_lowercase", {}, "all; of it!", "All of it"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "A-B go",
        "A B go",
    ),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("punctuation:punctuation_dot", {}, "a!", "a."),
    ("punctuation:punctuation_exclamation", {}, "a.", "a!"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein sehr kurzer deutscher Satz.",
        "This is an English sentence.",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_follows_and_misses(name: str, arguments: dict[str, Json], good: str, bad: str) -> None:
    if name == "language:response_language":
        pytest.importorskip("py3langid")
    assert check(name, arguments, "", good) is True
    assert check(name, arguments, "", bad) is False
    assert check(name, {**arguments, "unused": None}, "", "") is False, "an empty answer follows nothing"


def test_every_id_is_covered() -> None:
    bench = {**bench_counts.CHECKS, **bench_words.CHECKS, **bench_formats.CHECKS, **bench_custom.CHECKS}
    assert {case[0] for case in CASES} == set(CHECKS) - set(bench)  # test_ifbench.py has those


def test_unknown_ids_and_arguments_are_never_passed() -> None:
    with pytest.raises(Unsupported, match="'nonsense:id' has no checker"):
        check("nonsense:id", {}, "", "anything")
    with pytest.raises(Unsupported, match="keywords:existence: argument 'keywords'"):
        check("keywords:existence", {"keywords": None}, "", "anything")
    with pytest.raises(Unsupported, match="relation"):
        check("length_constraints:number_words", {"num_words": 1, "relation": "around"}, "", "anything")
    outcome = grade(["punctuation:no_comma", "nonsense:id"], [None, None], "", "fine")
    assert isinstance(outcome, Invalid)


def test_modes() -> None:
    ids = ["punctuation:no_comma", "startend:quotation", "punctuation:no_comma"]
    outcome = grade(ids, [None, {}, {"x": None}], "", "no quotes", "fraction")
    assert isinstance(outcome, Scored)
    assert outcome.reward == pytest.approx(2 / 3)
    assert outcome.parts == {"punctuation:no_comma": 1.0, "startend:quotation": 0.0, "punctuation:no_comma#2": 1.0}
    binary = grade(ids, [None, {}, None], "", "no quotes")
    assert isinstance(binary, Scored)
    assert (binary.reward, binary.reason) == (0.0, "missed startend:quotation")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Mr. Lee met Dr. Wu at 3.5 p.m. today.", 1),
        ('He said "Go." Then he left.', 2),
        ("1. First thing.\n2. Second thing.", 2),
        ("No end", 1),
        ("So did I. Then you.", 2),
        ("", 0),
        ("Wait... what?! Yes.", 3),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def _rows(name: str) -> list[dict[str, Json]]:
    return [json.loads(line) for line in (released_data() / name).open()]


def test_every_released_row_is_supported() -> None:
    for row in [*_rows("ifeval_input.jsonl"), *_rows("gym/instruction_following.example.jsonl")]:
        outcome = grade(row["instruction_id_list"], row["kwargs"], row["prompt"], "Some answer.")  # type: ignore[arg-type]
        assert isinstance(outcome, Scored), outcome


def test_recorded_rewards() -> None:
    for row in _rows("gym/instruction_following.example_rollouts.jsonl"):
        text = row["response"]["output"][-1]["content"][0]["text"]  # type: ignore[index,call-overload]
        outcome = grade(row["instruction_id_list"], row["kwargs"], row["prompt"], text)  # type: ignore[arg-type]
        assert isinstance(outcome, Scored)
        assert [bool(value) for value in outcome.parts.values()] == row["follow_instruction_list"]
        assert outcome.reward == row["reward"]
