"""SEARCH/REPLACE blocks and unified diffs: what is read, what is refused, and what git makes of our diffs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.reward.repository import build_repository, git
from nemo_cascade.reward.search_replace import (
    BadEdit,
    Edit,
    apply_diff,
    apply_edits,
    parse_diff,
    parse_edits,
    render_edits,
    similarity,
    unified_diff,
)

FILES = {
    "calc.py": "def add(a, b):\n    return a - b\n\n\ndef sub(a, b):\n    return a - b\n",
    "pkg/names.py": "ONE = 1\nTEN = 10\n",
}

FENCED = """<think>let me see
### calc.py
</think>
<solution>
```python
### calc.py
<<<<<<< SEARCH
def add(a, b):
    return a - b
=======
def add(a, b):
    return a + b
>>>>>>> REPLACE
```
```python
### pkg/names.py
<<<<<<< SEARCH
TEN = 10
=======
>>>>>>> REPLACE
```
</solution>"""

BARE = """### calc.py
<<<<<<< SEARCH
def add(a, b):
    return a - b
=======
def add(a, b):
    return a + b
>>>>>>> REPLACE"""


def test_fenced_solution() -> None:
    edits = parse_edits(FENCED)
    assert edits == [
        Edit("calc.py", ("def add(a, b):", "    return a - b"), ("def add(a, b):", "    return a + b")),
        Edit("pkg/names.py", ("TEN = 10",), ()),
    ]
    patched = apply_edits(FILES, edits)
    assert patched["calc.py"] == FILES["calc.py"].replace("a - b", "a + b", 1)
    assert patched["pkg/names.py"] == "ONE = 1\n"
    assert FILES["pkg/names.py"] == "ONE = 1\nTEN = 10\n"


def test_bare_form_and_its_inverse() -> None:
    assert render_edits(parse_edits(BARE)) == BARE
    two = [*parse_edits(BARE), Edit("calc.py", ("x",), ("y",))]
    assert parse_edits(render_edits(two)) == two


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("just words", "no SEARCH/REPLACE block"),
        (BARE.replace("### calc.py\n", ""), "before any"),
        (BARE.removesuffix(">>>>>>> REPLACE"), "has no end"),
        (BARE.replace("=======\n", ""), "has no end"),
        (BARE.replace("=======\n", "<<<<<<< SEARCH\n"), "inside another"),
    ],
)
def test_unreadable_edits(text: str, why: str) -> None:
    with pytest.raises(BadEdit, match=why):
        parse_edits(text)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Edit("calc.py", ("    return a - b",), ("x",)), "occur 2 times"),
        (Edit("calc.py", ("return a - b",), ("x",)), "occur 0 times"),
        (Edit("calc.py", ("TEN = 1",), ("x",)), "occur 0 times"),
        (Edit("pkg/names.py", ("TEN = 1",), ("x",)), "occur 0 times"),
        (Edit("none.py", ("a",), ("b",)), "no such file"),
        (Edit("calc.py", (), ("b",)), "empty SEARCH"),
        (Edit("../calc.py", ("a",), ("b",)), "outside"),
        (Edit(".git/config", (), ("b",)), "outside"),
    ],
)
def test_edits_that_do_not_fit(edit: Edit, why: str) -> None:
    with pytest.raises(BadEdit, match=why):
        apply_edits(FILES, [edit])


def test_edits_see_each_other_and_may_create_files() -> None:
    edits = [Edit("new.py", (), ("A = 1",)), Edit("new.py", ("A = 1",), ("A = 2", "B = 3"))]
    assert apply_edits(FILES, edits)["new.py"] == "A = 2\nB = 3\n"


def test_our_diffs_are_what_git_applies(tmp_path: Path) -> None:
    base = {**FILES, "gone.txt": "old\n", "end.txt": "no newline"}
    patched = {
        "calc.py": FILES["calc.py"].replace("a - b", "a + b", 1),
        "pkg/names.py": FILES["pkg/names.py"],
        "new/file.txt": "fresh\nlines",
        "end.txt": "now\nwith one\n",
    }
    diff = unified_diff(base, patched)
    build_repository(base, tmp_path)
    git(tmp_path, "apply", "-", stdin=diff)
    found = {
        path.relative_to(tmp_path).as_posix(): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }
    assert found == patched
    assert apply_diff(base, parse_diff(diff))["calc.py"] == patched["calc.py"]


def test_git_diffs_apply_here(tmp_path: Path) -> None:
    build_repository(FILES, tmp_path)
    (tmp_path / "calc.py").write_text(FILES["calc.py"].replace("a - b", "a + b", 1))
    (tmp_path / "pkg/names.py").unlink()
    patch = parse_diff(f"```diff\n{git(tmp_path, 'diff')}```")
    assert apply_diff(FILES, patch) == {"calc.py": FILES["calc.py"].replace("a - b", "a + b", 1)}


def test_a_hunk_may_have_moved_but_must_be_unique() -> None:
    diff = unified_diff(FILES, {**FILES, "pkg/names.py": "ONE = 1\nTEN = 11\n"})
    moved = {**FILES, "pkg/names.py": "# first\n# second\nONE = 1\nTEN = 10\n"}
    assert apply_diff(moved, parse_diff(diff))["pkg/names.py"] == "# first\n# second\nONE = 1\nTEN = 11\n"
    with pytest.raises(BadEdit, match="occur 2 times"):
        apply_diff({"pkg/names.py": "#\nONE = 1\nTEN = 10\nONE = 1\nTEN = 10\n"}, parse_diff(diff))
    with pytest.raises(BadEdit, match="occur 0 times"):
        apply_diff({"pkg/names.py": "ONE = 2\n"}, parse_diff(diff))


def test_unreadable_diffs() -> None:
    for text in ("words", "", "--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n-a\n+b\n"):
        with pytest.raises(BadEdit):
            parse_diff(text)


def test_similarity() -> None:
    gold = {**FILES, "calc.py": FILES["calc.py"].replace("a - b", "a + b", 1)}
    near = {**FILES, "calc.py": FILES["calc.py"].replace("a - b", "a * b", 1)}
    far = {**FILES, "pkg/names.py": "NINE = 9\n"}
    assert similarity(FILES, gold, gold) == 1.0
    assert similarity(FILES, FILES, gold) == 0.0
    # 59 characters a side ("--- a/calc.py" ... with signs), one substituted: 2 of 118 indels
    size = len("--- a/calc.py\n+++ b/calc.py\n-    return a - b\n+    return a + b")
    assert similarity(FILES, near, gold) == pytest.approx(1 - 2 / (2 * size))
    assert 0 < similarity(FILES, far, gold) < similarity(FILES, near, gold)


ODD = "a = 1\n\x0c\nb = '\u2028\x85\x0b\x1c'\nc = 3\n"
CRLF = "a = 1\r\n\r\nb = 2\r\nc = 3\r\nlast"


def _swap(path: str, *lines: tuple[str, str]) -> str:
    old, new = zip(*lines, strict=True)
    return render_edits([Edit(path, old, new)])


def test_a_line_ends_at_a_line_feed_only() -> None:
    """Form feeds, U+2028 and their like are letters of a line: in blocks, in diffs, and in what patches are compared
    by."""
    line = "b = '\u2028\x85\x0b\x1c'"
    wanted = {"a.py": ODD.replace("c = 3", "c = 4")}
    said = _swap("a.py", ("\x0c", "\x0c"), (line, line), ("c = 3", "c = 4"))
    assert apply_edits({"a.py": ODD}, parse_edits(said)) == wanted
    assert apply_diff({"a.py": ODD}, parse_diff(unified_diff({"a.py": ODD}, wanted))) == wanted
    assert similarity({"a.py": ODD}, apply_edits({"a.py": ODD}, parse_edits(said)), wanted) == 1.0


@pytest.mark.parametrize(
    ("file", "block", "wanted"),
    [
        (CRLF, ("b = 2",), "a = 1\r\n\r\nnew\r\nmore\r\nc = 3\r\nlast"),
        (CRLF, ("", "b = 2"), "a = 1\r\nnew\r\nmore\r\nc = 3\r\nlast"),
        (CRLF, ("c = 3", "last"), "a = 1\r\n\r\nb = 2\r\nnew\r\nmore"),
        (CRLF, ("last",), "a = 1\r\n\r\nb = 2\r\nc = 3\r\nnew\r\nmore"),
        ("a\r\nb\nc\n", ("a",), "new\nmore\nb\nc\n"),
        ("a\nb\nc\n", ("a",), "new\nmore\nb\nc\n"),
    ],
)
def test_a_file_keeps_its_line_ends(file: str, block: tuple[str, ...], wanted: str) -> None:
    said = render_edits([Edit("a.py", block, ("new", "more"))])
    for answer in (said, said.replace("\n", "\r\n"), f"<solution>\r\n{said}\r\n</solution>".replace("\n", "\r\n")):
        assert apply_edits({"a.py": file}, parse_edits(answer)) == {"a.py": wanted}


def test_lines_that_stay_keep_their_own_ends() -> None:
    said = _swap("a.py", ("a", "a"), ("b", "B"), ("c", "c"))
    assert apply_edits({"a.py": "a\r\nb\r\nc\nd\r\n"}, parse_edits(said)) == {"a.py": "a\r\nB\r\nc\nd\r\n"}
    gone = parse_edits(render_edits([Edit("a.py", ("last",), ())]))
    assert apply_edits({"a.py": "a\r\nlast"}, gone) == {"a.py": "a"}
    with pytest.raises(BadEdit, match="occur 2 times"):
        apply_edits({"a.py": "a\r\nx\r\na\r\n"}, parse_edits(_swap("a.py", ("a", "b"))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CRLF, CRLF.replace("b = 2", "b = 4\r\nd = 5")),
        (CRLF, CRLF.replace("\r\n", "\n")),
        ("a\nb\n", "a\r\nb\r\n"),
        ("a\r\nb\nc\r\n", "a\r\nB\nc\r\nd\n"),
    ],
)
def test_our_diffs_of_such_files_read_back(old: str, new: str) -> None:
    base, patched = {"a.py": old}, {"a.py": new, "new.py": "x\r\ny\r\n"}
    diff = unified_diff(base, patched)
    assert apply_diff(base, parse_diff(diff)) == patched
    assert apply_diff(base, parse_diff(f"<solution>\n```diff\n{diff}```\n</solution>")) == patched
    assert similarity(base, apply_diff(base, parse_diff(diff)), patched) == 1.0


def test_a_diff_without_carriage_returns_fits_a_file_with_them() -> None:
    """As models write it; and one that has them everywhere, in transit, fits a file without."""
    plain, wanted = CRLF.replace("\r", ""), CRLF.replace("b = 2", "b = 4\r\nd = 5")
    diff = unified_diff({"a.py": plain}, {"a.py": wanted.replace("\r", "")})
    assert apply_diff({"a.py": CRLF}, parse_diff(diff)) == {"a.py": wanted}
    moved = f"# first\r\n{CRLF}"
    assert apply_diff({"a.py": moved}, parse_diff(diff)) == {"a.py": f"# first\r\n{wanted}"}
    sent = parse_diff(diff.replace("\n", "\r\n"))
    assert apply_diff({"a.py": plain}, sent) == {"a.py": wanted.replace("\r", "")}
    assert apply_diff({"a.py": CRLF}, sent) == {"a.py": wanted}
