"""Which files of an agent's patch reach the tests, as git itself decides it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nemo_cascade.reward.repository import git, repository_files
from nemo_cascade.reward.runtimes import ContainerLost, Machine, Place, load
from nemo_cascade.reward.sandbox import File
from nemo_cascade.reward.swe.patch import changes, head, model_patch_command, sources_of

REACH = ("a.py", "src/a.py", "pkg/testing.py", "contest.py", "docs/pytest.ini.md", "latest/a.py", "we?rd.py")
STAY = (
    "conftest.py", "pkg/conftest.py", "sitecustomize.py", "src/sitecustomize.py", "sitecustomize/__init__.py",
    "src/usercustomize/__init__.py", "x.pth", "pkg/x.pth", "pytest.ini", ".pytest.ini", "tox.ini", "setup.cfg",
    "pyproject.toml", "tests/a.py", "pkg/tests/data/x.json", "pkg/test/x.py", "test_a.py", "pkg/test_a.py",
    "pkg/a_test.py", ".venv/lib/x.py", "r2e_tests/x.py", "run_tests.sh", "checks/ours.py", "we*rd.py",
)  # fmt: skip
NAMED = ("checks/ours.py", "we*rd.py")  # test files of the row, wherever they are; a star in a name is a star


def applied(folder: Path, command: list[str], patch: bytes) -> set[str]:
    """The files of a folder once the patch is applied."""
    subprocess.run(command, cwd=folder, input=patch, check=True)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if path != "base" and not path.startswith(".git/")}


def test_what_reaches_the_tests_and_what_stays(tmp_path: Path) -> None:
    patches = {}
    for name in ("plain", "known"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base").touch()
        for path in (*REACH, *STAY):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("x\n")
        git(folder, "init", "--quiet", "--initial-branch=main")
        git(folder, "add", "--force", "base")
        git(folder, "commit", "--quiet", "--message=base")
        git(folder, "add", "--force", "--all")
        patches[name] = git(folder, "diff", "--cached", "--binary").encode()
        git(folder, "reset", "--quiet", "--hard")
    assert applied(tmp_path / "plain", model_patch_command(NAMED), patches["plain"]) == set(REACH)
    gold = b"+++ b/setup.cfg\n+++ b/pkg/test_a.py\n+++ b/pkg/conftest.py\n+++ b/checks/ours.py\n"
    sources = sources_of(gold)
    assert sources == ["checks/ours.py", "pkg/test_a.py", "setup.cfg"]
    known = applied(tmp_path / "known", model_patch_command(NAMED, sources), patches["known"])
    assert known == {*REACH, "setup.cfg", "pkg/test_a.py"}


def test_git_that_fails_for_us_is_no_patch_and_no_verdict() -> None:
    """No repository to start from, or no end in time: the container is lost. What the agent breaks is its own fault."""
    runtime = load("bubblewrap", Machine(memory_mb=1024, scratch_mb=64))
    bare = runtime.start(Place(files={"a.txt": File(b"one\n")}))
    try:
        with pytest.raises(ContainerLost, match=r"git finds no commit to start from: fatal: .*not a git repository"):
            head(bare, 20.0)
    finally:
        bare.stop()
    container = runtime.start(Place(files=repository_files({"a.txt": "one\n", "b.txt": "two\n"})))
    try:
        base = head(container, 20.0)
        container.write("a.txt", b"three\n")
        patch = changes(container, base, 20.0)
        assert isinstance(patch, bytes) and patch.endswith(b"-one\n+three\n")
        container.write(".gitattributes", b"a.txt filter=slow\n")
        container.run(["git", "config", "filter.slow.clean", "sleep 30"], 20.0)
        container.run(["touch", "a.txt"], 20.0)
        with pytest.raises(ContainerLost, match="git add did not end within 1 s"):
            changes(container, base, 1.0)
        container.run(["rm", "-rf", ".git"], 20.0)
        refused = changes(container, base, 20.0)
        assert isinstance(refused, str) and refused.startswith("git finds no patch: fatal: ")
    finally:
        runtime.close()
