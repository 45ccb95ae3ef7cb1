"""A git repository with one commit, written without running git.

Four git processes per repository cost more than a nano task's tests; the objects are a few hashes. The result is what
git itself would write: the commit of `repository.build_repository`, a clean status, and every git command works on it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping

from nemo_cascade.reward.sandbox import File

SIGNATURE = "nano <nano@example.com> 1767225600 +0000"
FILE_MODE, TREE_MODE = b"100644", b"40000"
CONFIG = b"[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n"


def git_folder(files: Mapping[str, str], message: str = "base") -> tuple[str, dict[str, File]]:
    """(commit, the files of `.git`) of a repository whose one commit on `main` holds `files`."""
    objects: dict[str, File] = {}
    blobs = {path: _store(objects, b"blob", text.encode()) for path, text in files.items()}
    tree = _tree(objects, blobs)
    body = f"tree {tree.hex()}\nauthor {SIGNATURE}\ncommitter {SIGNATURE}\n\n{message}\n"
    commit = _store(objects, b"commit", body.encode()).hex()
    head = {
        ".git/HEAD": File(b"ref: refs/heads/main\n"),
        ".git/config": File(CONFIG),
        ".git/refs/heads/main": File(f"{commit}\n".encode()),
        ".git/index": File(_index(files, blobs)),
    }
    return commit, {**head, **objects}


def _store(objects: dict[str, File], kind: bytes, body: bytes) -> bytes:
    """Add a loose object; returns its binary name."""
    data = kind + b" " + str(len(body)).encode() + b"\0" + body
    name = hashlib.sha1(data, usedforsecurity=False)
    hexadecimal = name.hexdigest()
    objects[f".git/objects/{hexadecimal[:2]}/{hexadecimal[2:]}"] = File(zlib.compress(data, 1), 0o444)
    return name.digest()


def _tree(objects: dict[str, File], blobs: Mapping[str, bytes]) -> bytes:
    """The tree object of a folder; git sorts folders as if their names ended in a slash."""
    entries: dict[str, tuple[bytes, bytes]] = {}
    folders: dict[str, dict[str, bytes]] = {}
    for path, name in blobs.items():
        head, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(head, {})[rest] = name
        else:
            entries[path] = (FILE_MODE, name)
    for folder, inside in folders.items():
        entries[f"{folder}/"] = (TREE_MODE, _tree(objects, inside))
    parts = [mode + b" " + path.rstrip("/").encode() + b"\0" + name for path, (mode, name) in _sorted(entries)]
    return _store(objects, b"tree", b"".join(parts))


def _sorted(entries: Mapping[str, tuple[bytes, bytes]]) -> list[tuple[str, tuple[bytes, bytes]]]:
    return sorted(entries.items(), key=lambda entry: entry[0].encode())


def _index(files: Mapping[str, str], blobs: Mapping[str, bytes]) -> bytes:
    """The index, version 2, with empty stat data: git compares content once and fills it in."""
    parts = [b"DIRC", struct.pack("!II", 2, len(files))]
    for path in sorted(files, key=str.encode):
        name = path.encode()
        stat = struct.pack("!10I", 0, 0, 0, 0, 0, 0, 0o100644, 0, 0, len(files[path].encode()))
        entry = stat + blobs[path] + struct.pack("!H", min(len(name), 0xFFF)) + name
        parts.append(entry + b"\0" * (8 - len(entry) % 8))
    body = b"".join(parts)
    return body + hashlib.sha1(body, usedforsecurity=False).digest()
