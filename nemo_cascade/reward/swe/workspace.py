"""The tools of a software agent on a repository in a container: view, search, edit, run.

Each answers in text, cut in the middle beyond `most_chars`; a wrong call is answered with an error and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from nemo_cascade.reward.runtimes import GRACE_S, Container
from nemo_cascade.types import Json, Tool, ToolCall

VIEW_LINES = 400
SEARCH_LINES = 100
EDIT_BYTES = 4 << 20  # the largest file that is edited


def _tool(name: str, description: str, required: Mapping[str, str], optional: Mapping[str, str] | None = None) -> Tool:
    """A tool whose parameters are texts but for `start` and `end`."""
    every = {**required, **(optional or {})}
    properties: dict[str, Json] = {
        key: {"type": "integer" if key in ("start", "end") else "string", "description": about}
        for key, about in every.items()
    }
    return Tool(name, description, {"type": "object", "properties": properties, "required": [*required]})


TOOLS = {
    tool.name: tool
    for tool in (
        _tool(
            "view",
            f"Show a file with line numbers (at most {VIEW_LINES} lines at once), or list a folder.",
            {"path": "relative to the repository"},
            {"start": "first line, from 1", "end": "last line"},
        ),
        _tool(
            "search",
            f"Lines that contain a text, as path:line:text (the first {SEARCH_LINES}).",
            {"text": "what to look for, letter by letter"},
            {"path": "file or folder to look in; without it the whole repository"},
        ),
        _tool(
            "edit",
            "Replace a text that occurs once in a file. An empty `old` creates a file that is not there yet.",
            {"path": "relative to the repository", "old": "the text to replace", "new": "the text to put there"},
        ),
        _tool(
            "run",
            "Run a shell command in the repository and show what it prints. No network; processes that it leaves "
            "behind may be ended.",
            {"command": "for bash"},
        ),
        _tool("finish", "End the work: the repository is as it should be.", {}),
    )
}

RUN = """out=$(mktemp) && ulimit -f 1048576
timeout -k 1 "$2" bash -c "$1" >"$out" 2>&1 </dev/null; code=$?
if [ "$(wc -c <"$out")" -gt "$3" ]; then
  head -c $(($3 / 2)) "$out"; printf '\\n[... the middle is left out ...]\\n'; tail -c $(($3 / 2)) "$out"
else cat "$out"; fi
rm -f "$out"; printf '\\n%s' "$code"
"""
"""Runs `$1` for `$2` seconds and shows at most `$3` bytes of its output, then its exit status on a line of its own."""


class Workspace:
    """The tools of one rollout. `seconds_left` of a call bounds what runs in the container."""

    def __init__(self, container: Container, command_seconds: float, most_chars: int) -> None:
        self.container = container
        self.command_seconds, self.most_chars = command_seconds, most_chars

    def call(self, call: ToolCall, seconds_left: float) -> str:
        """The answer to one call."""
        tool = TOOLS.get(call.name)
        if tool is None or call.name == "finish":
            return f"error: no tool {call.name}; there are {', '.join(TOOLS)}"
        problem = _problem(tool, call.arguments)
        if problem:
            return f"error: {problem}"
        seconds = max(1.0, min(self.command_seconds, seconds_left))
        try:
            answer = {"view": self._view, "search": self._search, "edit": self._edit, "run": self._run}[call.name](
                dict(call.arguments), seconds
            )
        except ValueError as error:
            return f"error: {error}"
        return self._cut(answer)

    def _cut(self, text: str) -> str:
        if len(text) <= self.most_chars:
            return text
        half = self.most_chars // 2
        return f"{text[:half]}\n[... {len(text) - 2 * half} characters are left out ...]\n{text[-half:]}"

    def _view(self, given: dict[str, Json], seconds: float) -> str:
        path = str(given["path"])
        listing = self.container.run(["ls", "-1Ap", "--", f"{path}/."], seconds)
        if listing.code == 0:
            return listing.stdout.decode("utf-8", "replace").rstrip("\n") or "an empty folder"
        lines = self.container.read(path).decode("utf-8", "replace").split("\n")
        first = max(1, int(given.get("start", 1)))
        last = min(len(lines), int(given.get("end", first + VIEW_LINES - 1)), first + VIEW_LINES - 1)
        shown = [f"{number}\t{lines[number - 1]}" for number in range(first, last + 1)]
        rest = len(lines) - last
        return "\n".join([*shown, *([f"[{rest} more lines]"] if rest > 0 and shown else [])]) or (
            f"error: the file has {len(lines)} lines"
        )

    def _search(self, given: dict[str, Json], seconds: float) -> str:
        command = ["grep", "-rnIF", "--exclude-dir=.git", "-e", str(given["text"]), "--", str(given.get("path", "."))]
        ran = self.container.run(command, seconds)
        if ran.code is None:
            return f"error: the search did not end within {seconds:g} s"
        lines = ran.stdout.decode("utf-8", "replace").splitlines()
        if not lines:
            return "nothing" if ran.code == 1 else f"error: {ran.stderr.decode('utf-8', 'replace').strip()[-200:]}"
        found = [line.removeprefix("./") for line in lines[:SEARCH_LINES]]
        left = len(lines) - len(found)
        return "\n".join([*found, *([f"[{left} more lines]"] if left else [])])

    def _edit(self, given: dict[str, Json], seconds: float) -> str:
        path, old, new = (str(given[key]) for key in ("path", "old", "new"))
        if not old:
            there = self.container.run(["test", "-e", path], seconds)
            if there.code == 0:
                return "error: the file is there; `old` must name the text to replace"
            self.container.write(path, new.encode())
            return "created"
        try:
            text = self.container.read(path, EDIT_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            return "error: not a text in UTF-8"
        count = text.count(old)
        if count != 1:
            return "error: old is not there" if count == 0 else f"error: old is there {count} times"
        self.container.write(path, text.replace(old, new).encode())
        return "ok"

    def _run(self, given: dict[str, Json], seconds: float) -> str:
        began = time.monotonic()
        command = ["bash", "-c", RUN, "bash", str(given["command"]), f"{seconds:g}", str(4 * self.most_chars)]
        ran = self.container.run(command, seconds + GRACE_S, b"", 5 * self.most_chars + 256)
        output, _, code = ran.stdout.decode("utf-8", "replace").rpartition("\n")
        late = ran.code is None or (code in ("124", "137") and time.monotonic() - began >= seconds)
        shown = self._cut(output.strip("\n"))
        if late:
            return f"{shown}\n[ended after {seconds:g} s]".lstrip("\n")
        if ran.code != 0:
            return "error: the command ended its shell"
        return shown if code == "0" and shown else f"{shown}\n[exit status {code}]".lstrip("\n")


def _problem(tool: Tool, given: Mapping[str, Json]) -> str:
    """Why a call's arguments cannot be used, "" when they can."""
    properties, required = tool.parameters["properties"], tool.parameters["required"]
    assert isinstance(properties, dict) and isinstance(required, list)
    unknown = [key for key in given if key not in properties]
    missing = [str(key) for key in required if key not in given]
    if unknown or missing:
        return f"{tool.name} needs {', '.join(map(str, required))}, and may have no other than {', '.join(properties)}"
    for key, value in given.items():
        kind = properties[key]["type"]
        if kind == "integer" and not (isinstance(value, int) and not isinstance(value, bool)):
            return f"{key} must be a whole number"
        if kind == "string" and not isinstance(value, str):
            return f"{key} must be a text"
        if isinstance(value, str) and ("\0" in value or not _encodes(value)):
            return f"{key} has characters that no file holds"
    if given.get("path") == "":
        return "path is empty"
    return ""


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
