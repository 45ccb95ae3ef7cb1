"""What a person sees of a running cascade: a bar on a terminal (a real one, by pty), plain lines without one."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.flow.small_cascade import write_cascade

ROOT = Path(__file__).resolve().parents[2]
HEAVY_LINE = "\u2501"  # what rich draws bars with
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def command(folder: Path) -> tuple[list[str], dict[str, str]]:
    cascade = str(write_cascade(folder))
    words = ["run", cascade, "--module", "tests.flow.standin_stage", "--until", "if_rl"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "STANDIN_PACE": "0.2", "TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        variables.pop(name, None)
    return [sys.executable, "-m", "nemo_cascade.cli", *words], variables


def on_a_terminal(words: list[str], variables: dict[str, str], columns: int) -> str:
    """Everything that a terminal of this width was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        words, cwd=ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            new = os.read(ours, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that nobody writes there any more
                raise
            new = b""
        if not new:
            break
        shown += new
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


def test_the_runner_shows_a_bar_on_its_terminal(tmp_path: Path) -> None:
    shown = on_a_terminal(*command(tmp_path), 100)
    assert "\x1b[?25l" in shown and "\x1b[?25h" in shown  # the cursor is hidden while the bar moves, and back after
    drawn = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", shown)]
    bars = [line for line in drawn if HEAVY_LINE in line]
    assert all(len(line) <= 100 for line in bars)
    texts = [re.fullmatch(r"(\w+) +[\u2501\u2578\u257a ]+ +(\d+)/(\d+)  (.*)", line.rstrip()) for line in bars]
    seen = {(found[1], int(found[2]), int(found[3])) for found in texts if found}
    assert all(texts), bars
    # drawn while the stage runs, step after step, and not once at its end
    assert {("sft", 0, 4), ("sft", 4, 4), ("if_rl", 0, 6), ("if_rl", 6, 6)} <= seen
    assert len({step for stage, step, _ in seen if stage == "if_rl"}) >= 3, seen
    told = [found[4] for found in texts if found and found[1] == "if_rl" and 0 < int(found[2]) < 6]
    numbers = [re.fullmatch(r"reward 0\.\d{3}  (\d+) tok/s  \S+ left", text) for text in told]
    assert numbers and all(numbers), told
    assert all(1 <= int(found[1]) <= 320 for found in numbers if found)  # 64 tokens in 0.2 s, longer on a busy machine
    assert not [line for line in drawn if "left" in line and HEAVY_LINE not in line]  # no plain line beside the bar
    assert any(line.startswith("[2/2] if_rl: finished in") for line in drawn)


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    words, variables = command(tmp_path)
    done = subprocess.run(
        words, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and HEAVY_LINE not in done.stdout
    plain = [line for line in done.stdout.splitlines() if line.endswith("left")]
    assert [re.sub(r"\d+(\.\d+)?( tok/s|s left)|0\.\d+", "N", line) for line in plain if " 6/6 " in line] == [
        "if_rl                   6/6  reward N  N  N"
    ]
    assert {line.split()[0] for line in plain} == {"sft", "if_rl"}
