"""What an agent finds in the image of its row, and which engine the image runs on; the engines are stand-ins."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentic import SweAgentic
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.reward.repository import git
from nemo_cascade.reward.row_containers import RowContainers
from nemo_cascade.reward.swe.patch import HIDE
from nemo_cascade.types import Invalid, Scored
from tests.unit.domains.swe_rows import DONE, FAULT, REPAIR, edit, play, row, turn
from tests.unit.reward.swe.test_runtimes import IMAGE, calls, engines, left_behind

__all__ = ["engines"]


def with_a_remote(image: Path) -> None:
    """Names for the later commit, as a clone leaves them, and another one that no name leads to."""
    base = git(image, "rev-parse", "HEAD").strip()
    git(image, "reset", "--quiet", "--hard", "ORIG_HEAD")
    git(image, "tag", "v2")
    git(image, "remote", "add", "origin", "https://example.com/shop")
    git(image, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(image, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    git(image, "repack", "-a", "-d", "--quiet")
    git(image, "commit", "--quiet", "--allow-empty", "--message=secret and loose")
    git(image, "reset", "--quiet", "--hard", base)


ALL_OBJECTS = "git cat-file --batch-all-objects"


@pytest.mark.parametrize(("name", "cloned"), [("docker", False), ("docker", True), ("apptainer", False)])
def test_an_agent_finds_no_commit_after_its_own(name: str, cloned: bool, engines: Path, tmp_path: Path) -> None:
    """Named, unnamed, packed or loose; in a clone that is put over the image's repository, too."""
    image = engines / IMAGE / "testbed"
    base = git(image, "rev-parse", "HEAD").strip()
    clone = tmp_path / "clones" / "acme__shop"
    shutil.copytree(image, clone)
    with_a_remote(image)
    services = Services()
    options = {"runtime": name, "memory_mb": 2048, "start_timeout_s": 30.0, "image": IMAGE}
    domain = SweAgentic(services, {**options, "repositories": str(clone.parent) if cloned else ""})
    task = domain.parse_row(row(base), "rows:1")
    looks = (
        f"{ALL_OBJECTS} --batch-check | cut -d ' ' -f 2 | sort | uniq -c",
        f"{ALL_OBJECTS} --batch | grep -a -c -w -e '{REPAIR}' -e secret",
        "git log --format=%s --all --reflog; git for-each-ref; git remote; git status --short",
        "git fsck --strict 2>&1; git rev-parse HEAD",
    )
    try:
        outcome, answers = play(domain, task, [*(turn("run", command=look) for look in looks), DONE])
        assert answers[0].split() == ["5", "blob", "1", "commit", "3", "tree"]
        assert answers[1] == "0\n[exit status 1]"
        assert answers[2] == "base"
        assert answers[3] == base or cloned  # a clone's files are a repository of their own
        assert outcome == Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 1.0}, "nothing changed")
    finally:
        services.close()


def test_the_images_user_clears_the_work_folder_or_there_is_no_container(engines: Path) -> None:
    services = Services()
    domain = SweAgentic(services, {"runtime": "docker", "memory_mb": 2048, "start_timeout_s": 30.0, "image": IMAGE})
    task = domain.parse_row(row("HEAD"), "rows:1")
    try:
        outcome, _ = play(domain, task, [DONE])
        assert outcome == Scored(0.0, {"fail_to_pass": 0.0, "pass_to_pass": 1.0}, "nothing changed")
        users = {"HIDE" if HIDE in call else call[-1]: "--user" in call for call in calls(engines) if call[0] == "exec"}
        assert users["HIDE"] is False and users["HEAD"] is True
        (engines / IMAGE / "testbed" / ".git" / "HEAD.lock").touch()
        other = dataclasses.replace(task, id="other")
        outcome, answers = play(domain, other, [edit(FAULT, REPAIR), DONE])
        assert isinstance(outcome, Invalid) and "docker: the work folder cannot be cleared: " in outcome.reason
        assert "EAD.lock': File exists" in outcome.reason and answers == []
    finally:
        services.close()
    assert left_behind(engines) == []


def test_an_engine_is_looked_for_once(engines: Path) -> None:
    """Two rows and two verdicts: one `docker version` for the choice and one for the runtime itself."""
    services = Services()
    options = {**SweAgentless.DEFAULTS, "runtime": "auto", "memory_mb": 2048, "start_timeout_s": 30.0}
    containers = RowContainers(options, services)
    truth = {"instance_id": "a__b-1", "repo": "a/b", "base_commit": "x", "image": IMAGE}
    try:
        assert [containers.missing(truth) for _ in range(3)] == [""] * 3
        for _ in range(2):
            containers._start(truth).stop()
        assert [call for call in calls(engines) if call[0] == "version"] == [calls(engines)[0]] * 2
        assert sum(call[0] == "run" for call in calls(engines)) == 2
    finally:
        services.close()
