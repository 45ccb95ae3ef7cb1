"""A repository of this machine at one commit, as files for a container: the checkout, and a `.git` with no history.

The history would hold the repair: the commit after the base, or a branch of it. So the files become the one commit of a
repository of their own.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nemo_cascade.reward.repository import git
from nemo_cascade.reward.runtimes import ContainerLost
from nemo_cascade.reward.sandbox import File, read_tree
from nemo_cascade.types import Json

KEPT = 4  # checkouts held in memory: the rollouts of a group share theirs


def folder_of(truth: Mapping[str, Json], repositories: str) -> Path | None:
    """The folder of a row's repository: its field `repo_path`, or in the folder of option `repositories` one with the
    name of the instance or of the repository (`owner__name`); None where the row lives in an image.
    """
    if truth.get("repo_path"):
        return Path(str(truth["repo_path"]))
    names = [str(truth[key]).replace("/", "__") for key in ("instance_id", "repo")]
    found = [Path(repositories, name) for name in names if repositories and name not in ("", ".", "..")]
    return next((folder for folder in found if folder.is_dir()), None)


def checkout(folder: Path, commit: str) -> Mapping[str, File]:
    """The files at a commit; ContainerLost when folder or commit are not there, or git does not do it in time: the row
    or the machine is at fault, and other rows go on.
    """
    if not folder.is_dir():
        raise ContainerLost(f"repo_path: no folder {folder}; clone the repository there, or drop the row")
    return _checkout(str(folder.absolute()), commit)


@functools.lru_cache(maxsize=KEPT)
def _checkout(folder: str, commit: str) -> Mapping[str, File]:
    with tempfile.TemporaryDirectory(prefix="nemo-cascade-checkout-") as name:
        place = Path(name, "repository")
        try:
            found = git(Path(folder), "rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}").strip()
            git(Path(name), "clone", "--quiet", "--no-checkout", "--shared", "--", folder, str(place))
            git(place, "checkout", "--quiet", "--detach", found)
            shutil.rmtree(place / ".git")
            git(place, "init", "--quiet", "--template=", "--initial-branch=main")
            git(place, "add", "--all", "--force")
            git(place, "commit", "--quiet", "--message=base", "--allow-empty")
        except ValueError as error:
            raise ContainerLost(f"repository {folder}, base_commit {commit}: {error}") from error
        return read_tree(place)
