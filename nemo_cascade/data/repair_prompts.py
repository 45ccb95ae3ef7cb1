"""Prompts of agentless repair from a repository, an issue and the known repair (section 4.8.1, after Cascade 1).

Two variants of each instance: `golden` shows the files that the known repair changes and, up to `k`, the files that a
retriever would confuse with them; `retrieved` shows the retriever's first `k`, whether the right ones are among them or
not, as an agent without an oracle would see it. The order of the files is shuffled by a seed, so that the place of a
file tells nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Literal

from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

from nemo_cascade.data.retrieval import ranked

Variant = Literal["golden", "retrieved"]
VARIANTS: tuple[Variant, ...] = ("golden", "retrieved")
_TEST = re.compile(r"(?:^|/)(?:tests?|testing)/|(?:^|/)(?:test_[^/]*|[^/]*_test|conftest)\.[^/.]+$")

PROMPT = """Below are an issue that was reported for a program and {some} of the files of its repository. Repair the \
program so that the issue is resolved: find out which code is responsible, then change it. Files that have nothing to \
do with the issue may be among those shown.

<issue>
{issue}
</issue>

<files>
{files}
</files>

Write the repair as SEARCH/REPLACE blocks. Name a file on a line of its own that begins with ###; each block below it \
replaces some of its lines:

### path/of/the/file.py
<<<<<<< SEARCH
the lines as they stand in the file
=======
the lines that take their place
>>>>>>> REPLACE

Rules:
- The lines of SEARCH are whole lines of the file, with their indentation, and occur in it exactly once: take \
neighbouring lines along where they would not.
- The lines of REPLACE are indented as they must stand in the file.
- Several blocks may follow one ### line; changes at different places are different blocks.
- An empty SEARCH makes a new file.

Put all blocks, and nothing else, between <solution> and </solution>."""


def changed_paths(diff: str) -> list[str]:
    """The files that a diff changes, deletes or renames, by their names before it; new files are not among them.

    ValueError for a text that is no unified diff.
    """
    try:
        patch = PatchSet(diff.strip("\n") + "\n")
    except UnidiffParseError as error:
        raise ValueError(f"no unified diff: {error}") from error
    return list(dict.fromkeys(file.source_file.removeprefix("a/") for file in patch if not file.is_added_file))


def is_test(path: str) -> bool:
    """Whether a path names a test, which no repair is looked for in."""
    return _TEST.search(path) is not None


def shown_files(
    files: Mapping[str, str], issue: str, gold: str, variant: Variant, k: int, seed: int | str
) -> dict[str, str]:
    """Path -> text of the files that a variant's prompt shows, in their shuffled order.

    ValueError for a diff that cannot be read, or that changes a file which is not there.
    """
    golden = changed_paths(gold)
    gone = [path for path in golden if path not in files]
    if gone:
        raise ValueError(f"it changes {gone[0]}, which is no file of the repository")
    chosen = golden if variant == "golden" else []
    left = {path: text for path, text in files.items() if path not in chosen and not is_test(path)}
    room = max(k - len(chosen), 0)
    paths = [*chosen, *(ranked(left, issue)[:room] if room else [])]
    random.Random(f"repair/{seed}/{variant}").shuffle(paths)
    return {path: files[path] for path in paths}


def repair_request(issue: str, shown: Mapping[str, str]) -> str:
    """The request: issue, files, and the form of the answer, which `reward.search_replace` reads."""
    files = "\n".join(f"[start of {path}]\n{text.rstrip()}\n[end of {path}]" for path, text in shown.items())
    return PROMPT.format(some="one" if len(shown) == 1 else len(shown), issue=issue.strip(), files=files)
