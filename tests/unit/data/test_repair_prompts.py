"""Prompts of agentless repair: which files are shown, how they are found, and that answers in their form apply."""

from __future__ import annotations

import math

import pytest

from nemo_cascade.data.repair_prompts import changed_paths, is_test, repair_request, shown_files
from nemo_cascade.data.retrieval import ranked, scores, words_of
from nemo_cascade.reward.search_replace import apply_edits, parse_edits, unified_diff

FILES = {
    "core/cache.py": "class LruCache:\n    def evict(self):\n        return None\n",
    "core/clock.py": "def now():\n    return 0\n",
    "core/store.py": "def evict_all(cache):\n    cache.evict()\n",
    "core/paths.py": "SEP = '/'\n",
    "web/server.py": "def serve(port):\n    return port\n",
    "web/views.py": "def index():\n    return 'cache'\n",
    "tests/test_cache.py": "def test_evict(): LruCache evict cache\n" * 9,
    "conftest.py": "LruCache evict\n",
}
ISSUE = "LruCache.evict never drops the oldest entry of the cache"
GOLD = unified_diff(FILES, {**FILES, "core/clock.py": "def now():\n    return 1\n", "core/new.py": "x = 1\n"})


def test_words_are_identifiers_and_their_parts() -> None:
    assert words_of("readFile_v2(HTTPServer)") == [
        "readfile_v2", "read", "file", "v", "httpserver", "http", "server",
    ]  # fmt: skip
    assert words_of("a.b == 12") == ["a", "b"]


def test_scores_are_bm25_by_hand() -> None:
    """Two files of 4 and 2 words (paths included), worked out on paper: idf(w) for one of two files is ln 2."""
    files = {"p": "cat cat dog", "q": "dog"}
    found = scores(files, "cat")
    assert found["q"] == 0.0
    norm = 1.5 * (0.25 + 0.75 * 4 / 3)
    assert found["p"] == pytest.approx(math.log(2.0) * 2 * 2.5 / (2 + norm), rel=1e-12)
    assert scores(files, "cat cat")["p"] == pytest.approx(2 * found["p"], rel=1e-12)
    both = scores(files, "dog")
    assert both["q"] == pytest.approx(math.log(1.2) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / 3)), rel=1e-12)
    assert both["q"] > both["p"] > 0.0
    assert ranked({"b": "x", "a": "x", "c": "y"}, "zebra") == ["a", "b", "c"]
    assert ranked({}, "zebra") == []


def test_the_retriever_reads_the_issue() -> None:
    assert ranked(FILES, ISSUE)[:2] == ["tests/test_cache.py", "conftest.py"]
    shown = shown_files(FILES, ISSUE, GOLD, "retrieved", 3, 0)
    assert set(shown) == {"core/cache.py", "core/store.py", "web/views.py"}  # neither tests nor the file to repair


def test_golden_files_are_shown_among_those_that_a_retriever_would_take() -> None:
    assert changed_paths(GOLD) == ["core/clock.py"]
    for k, others in ((1, set()), (3, {"core/cache.py", "core/store.py"})):
        assert set(shown_files(FILES, ISSUE, GOLD, "golden", k, 0)) == {"core/clock.py"} | others
    every = shown_files(FILES, ISSUE, GOLD, "golden", 5, 0)
    assert len(every) == 5
    assert every == {path: FILES[path] for path in every}
    with pytest.raises(ValueError, match="it changes core/gone.py, which is no file of the repository"):
        shown_files(FILES, ISSUE, GOLD.replace("core/clock.py", "core/gone.py"), "golden", 5, 0)
    with pytest.raises(ValueError, match="no unified diff"):
        shown_files(FILES, ISSUE, "--- a/x\n+++ b/x\n@@ -1,9 +1,9 @@\n-x\n+y\n", "golden", 5, 0)


def test_the_place_of_the_golden_file_tells_nothing() -> None:
    places = [list(shown_files(FILES, ISSUE, GOLD, "golden", 5, seed)).index("core/clock.py") for seed in range(200)]
    assert all(20 <= places.count(place) <= 60 for place in range(5))  # 40 expected, standard deviation 5.7
    assert shown_files(FILES, ISSUE, GOLD, "golden", 5, 7) == shown_files(FILES, ISSUE, GOLD, "golden", 5, 7)


def test_deleted_and_renamed_files_are_golden_and_new_ones_are_not() -> None:
    gone = unified_diff({"a.py": "x\n", "b.py": "y\n"}, {"a.py": "z\n"})
    assert changed_paths(gone) == ["a.py", "b.py"]
    renamed = "diff --git a/old.py b/new.py\nsimilarity index 50%\nrename from old.py\nrename to new.py\n"
    assert changed_paths(f"{renamed}--- a/old.py\n+++ b/new.py\n@@ -1,1 +1,1 @@\n-x\n+y\n") == ["old.py"]
    comment = "--- a/q.sql\n+++ b/q.sql\n@@ -1,2 +1,1 @@\n--- a comment\n select 1\n"
    assert changed_paths(comment) == ["q.sql"]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("tests/x.py", True), ("a/test/x.py", True), ("a/test_x.py", True), ("a/x_test.go", True),
        ("conftest.py", True), ("contest.py", False),
        ("a/latest.py", False), ("testing.py", False), ("a/attest/x.py", False),
    ],
)  # fmt: skip
def test_tests_are_told_by_their_names(path: str, wanted: bool) -> None:
    assert is_test(path) is wanted


def test_the_example_of_the_request_is_the_form_that_is_read() -> None:
    shown = {"path/of/the/file.py": "before\nthe lines as they stand in the file\nafter\n"}
    request = repair_request(" the issue\n", shown)
    assert "\n<issue>\nthe issue\n</issue>\n" in request
    assert "[start of path/of/the/file.py]\nbefore\n" in request
    example = request[request.index("\n### ") : request.index("\nRules:")]
    for answer in (f"I think.\n<solution>{example}</solution>", f"<solution>\n```python{example}```\n</solution>"):
        assert apply_edits(shown, parse_edits(answer)) == {
            "path/of/the/file.py": "before\nthe lines that take their place\nafter\n"
        }
