"""Git objects written by hand are what git writes."""

from nemo_cascade.reward.git_objects import git_folder
from nemo_cascade.reward.repository import build_repository, git
from nemo_cascade.reward.sandbox import File

FILES = {"a.py": "x = 1\n", "pkg/b.py": "y = 2\n", "pkg.txt": "", "pkg/sub/c.py": "z = 3\n", "test_a.py": "import a\n"}


def test_the_commit_is_the_one_git_makes_and_git_accepts_the_folder(tmp_path):
    commit, folder = git_folder(FILES)
    (tmp_path / "theirs").mkdir()
    assert build_repository(FILES, tmp_path / "theirs") == commit
    ours = tmp_path / "ours"
    for path, file in {**{path: File(text.encode()) for path, text in FILES.items()}, **folder}.items():
        (ours / path).parent.mkdir(parents=True, exist_ok=True)
        (ours / path).write_bytes(file.content)
    git(ours, "fsck", "--strict")
    assert git(ours, "rev-parse", "HEAD").strip() == commit
    assert git(ours, "status", "--porcelain") == ""
    (ours / "a.py").write_text("x = 2\n")
    assert git(ours, "diff", "--stat").splitlines()[-1].strip() == "1 file changed, 1 insertion(+), 1 deletion(-)"


def test_other_files_another_commit():
    assert git_folder(FILES)[0] != git_folder({**FILES, "a.py": "x = 3\n"})[0]
    assert git_folder(FILES)[0] == git_folder(dict(reversed(FILES.items())))[0]
