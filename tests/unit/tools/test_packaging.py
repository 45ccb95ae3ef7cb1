"""What leaves the repository: the wheel and its extras, and what `make` asks of a machine before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] not in ("tests", "docs"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_a_plain_install_brings_configuration_and_the_nano_models(wheel, tmp_path):
    names = set(wheel.namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"nemo_cascade/{name}" for name in wanted} <= names
    for name in ("base/model.safetensors", "judge/model.safetensors", "tokenizer/tokenizer.json"):
        assert f"nemo_cascade/models/nano/{name}" in names
    sources = ("models/decode_step.c", "models/mixer.c", "models/attention.c", "models/lanes.h", "models/tiles.h")
    for name in (*sources, "cascade/report.html", "reward/office_tables/emails.csv"):
        assert f"nemo_cascade/{name}" in names
    wheel.extractall(tmp_path)
    script = (
        "import nemo_cascade, sys; from nemo_cascade.cli import main; print(nemo_cascade.__file__); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "check", "nano"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)), "not the unpacked wheel"


def test_apex_is_in_no_extra(wheel):
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    fields = Parser().parsestr(wheel.read(metadata).decode())
    assert {"gpu", "trtllm", "dev"} <= set(fields.get_all("Provides-Extra"))
    requirements = fields.get_all("Requires-Dist")
    assert not [line for line in requirements if line.lower().startswith(("apex", "nvidia-apex"))]
    assert [line for line in requirements if line.startswith("megatron-core==0.16.1")]
    assert "github.com/NVIDIA/apex" in (ROOT / "Dockerfile").read_text()


def make(target: str, folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run a target of the Makefile with a PATH that holds these programs (name -> shell line) and a few real ones."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in ("bash", "make", "grep", "git"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (bin_folder / name).symlink_to(found.stdout.strip())
    for name, line in programs.items():
        (bin_folder / name).write_text(f"#!{bin_folder}/bash\n{line}\n")
        (bin_folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-C", str(ROOT), target, f"PYTHON={sys.executable}"], env={**environment, "PATH": str(bin_folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_root_the_exact_line_for_bubblewrap_is_printed(tmp_path):
    done = make("bwrap", tmp_path, id="echo 1000")
    assert done.returncode != 0
    assert "    sudo apt-get install bubblewrap\n" in done.stderr


def test_root_updates_the_package_lists_first_and_a_failure_prints_the_line(tmp_path):
    calls = tmp_path / "calls"
    done = make("bwrap", tmp_path, id="echo 0", **{"apt-get": f'echo "$1" >> {calls}; [ "$1" = update ]'})
    assert calls.read_text().split() == ["update", "install"]
    assert done.returncode != 0
    assert "    sudo apt-get install bubblewrap\n" in done.stderr


def test_a_machine_without_a_c_compiler_is_told_so(tmp_path):
    done = make("tools-present", tmp_path)
    assert done.returncode != 0
    assert "no C compiler on PATH" in done.stderr
    assert "apt-get install gcc" in done.stderr


@pytest.mark.parametrize(
    ("configured", "index"), [("", "https://download.pytorch.org/whl/cpu"), ("global.find-links='/somewhere'", "")]
)
def test_torch_comes_from_the_cpu_index_unless_pip_has_one_of_its_own(tmp_path, configured, index):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$*" = \'-m pip config list\' ] && echo "{configured}"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--eval", "show: ; @echo index=$(TORCH_INDEX)", "show", f"PYTHON={python}"],
        capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
    )  # fmt: skip
    assert f"index={index}\n" in done.stdout, done.stdout + done.stderr
