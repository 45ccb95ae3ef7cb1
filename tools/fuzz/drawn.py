"""Texts that hypothesis draws: any characters, any bytes, the marks of a grammar in any order and number."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tools.fuzz.engines import Tally, Trial, timed
from tools.fuzz.inputs import ERRORS
from tools.fuzz.parsers import Parser


def texts(parser: Parser) -> st.SearchStrategy[str]:
    """What may be given to a parser."""
    words = st.sampled_from(parser.grammar.words)
    data = st.tuples(st.binary(max_size=400), st.sampled_from(ERRORS))
    cut = st.tuples(st.sampled_from(parser.grammar.examples), st.integers(0, 200), st.text(st.characters(), max_size=9))
    return st.one_of(
        st.text(st.characters(), max_size=400),
        data.map(lambda pair: pair[0].decode("utf-8", pair[1])),
        st.lists(words, max_size=60).map("".join),
        st.tuples(words, st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
        cut.map(lambda part: part[0][: part[1]] + part[2] + part[0][part[1] :]),
    )


def drawn(parser: Parser, inputs: int, start: int) -> Tally:
    """The tally of so many drawn texts."""
    tally = Tally(parser.name, "hypothesis", start, parser.seconds)
    trial = Trial(parser, tally)

    @seed(start)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(texts(parser))
    def tried(text: str) -> None:
        trial(text)

    with timed(tally):
        tried()
    return tally
