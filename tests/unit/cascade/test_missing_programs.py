"""Programs that a stage needs and this machine lacks are named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_cascade.cascade.checks import missing_programs
from nemo_cascade.config.schema import DataConfig, EvaluationConfig, GrpoConfig


def test_a_container_engine_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(runtime: str) -> list[str]:
        data = DataConfig(domains={"swe_agentic": 1.0}, options={"swe_agentic": {"runtime": runtime}})
        none = EvaluationConfig(select=0, report=0)
        stage = GrpoConfig(init="base", num_steps=1, group_size=2, prompts_per_step=1, data=data, evaluation=none)
        return [*missing_programs([stage])]

    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox = "domain 'swe_agentic' runs code in bubblewrap (bwrap), which is not installed; run "
    assert missing("auto") == [f"{sandbox}`apt-get install -y bubblewrap`"]
    assert missing("podman")[0] == (
        "key 'data.options.swe_agentic.runtime': podman is not installed; run `apt-get install -y podman`"
    )
    for name in ("podman", "bwrap"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert missing("podman") == []
