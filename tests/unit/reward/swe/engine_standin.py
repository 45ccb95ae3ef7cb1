#!/usr/bin/env python3
"""Stands for `docker`, `podman` or `apptainer`: reads their command lines and really runs what they ask for.

A process of its own, written as a file of the engine's name and put on the path. An image is a folder below $STANDIN
that stands for its root; a container is a copy of it. Commands run in bubblewrap with namespaces of their own and the
copy as root, never directly. It refuses every option that it does not know, so that a misspelt one is seen, and writes
each command line to $STANDIN/log.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(os.environ.get("STANDIN", "."))
KNOWN = {
    "run": (
        {"--interactive", "--rm", "--init"},
        {"--name", "--label", "--network", "--memory", "--memory-swap", "--cpus", "--pids-limit", "--cap-drop"}
        | {"--security-opt", "--workdir", "--entrypoint"},
    ),
    "docker exec": ({"--interactive"}, {"--user", "--workdir", "--env"}),
    "apptainer exec": (
        {"--containall", "--cleanenv", "--no-home", "--writable-tmpfs", "--net"},
        {"--network", "--memory", "--cpus", "--pids-limit", "--env", "--bind", "--pwd"},
    ),
}


def parsed(kind, words):
    """(options, what follows them) of a command line; ends the process at an option nobody knows."""
    flags, valued = KNOWN[kind]
    options = {}
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word not in flags | valued:
            sys.exit(f"unknown flag: {word}")
        options.setdefault(word, []).append(words.pop(0) if word in valued else "")
    return options, words


def copied(image, root):
    """The image as the root of a container."""
    shutil.copytree(HOME / image, root, symlinks=True, dirs_exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        os.symlink(f"usr/{name}", Path(root, name))


def inside(root, argv, place, variables, binds=()):
    """The bubblewrap command line of one command in a container."""
    command = ["bwrap", "--die-with-parent", "--new-session", "--unshare-all", "--clearenv", "--bind", str(root), "/"]
    for path in ("/usr", *os.environ["STANDIN_PACKAGES"].split(":")):
        command += ["--ro-bind", path, path]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for source, target in binds:
        command += ["--bind", source, target]
    for text in [*variables, *json.loads(os.environ.get("STANDIN_ENV", "[]"))]:
        name, _, value = text.partition("=")
        command += ["--setenv", name, value]
    return [*command, "--chdir", place, *argv]


def docker(words):
    """`version`, `info`, `run`, `exec`, `inspect` and `rm`."""
    verb = words.pop(0)
    if verb in ("version", "info"):
        if (HOME / "down").exists():
            sys.exit("Cannot connect to the daemon. Is the daemon running?")
        sys.stdout.write("99.0\n")
    elif verb == "run":
        options, (image, *argv) = parsed("run", words)
        if not (HOME / image).is_dir():
            sys.exit(f"Unable to find image '{image}': pull access denied")
        folder = HOME / "containers" / options["--name"][0]
        copied(image, folder)
        entry = subprocess.Popen([options["--entrypoint"][0], *argv])  # echo and cat of ours, nothing of the image's
        code = entry.wait()
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(code)
    elif verb == "exec":
        options, (name, *argv) = parsed("docker exec", words)
        folder = HOME / "containers" / name
        if not folder.is_dir():
            sys.exit(f"No such container: {name}")
        if "--user" in options and (HOME / "owned_by_root").exists() and argv[-3:] == ["test", "-w", "."]:
            sys.exit(1)
        os.execvp("bwrap", inside(folder, argv, options["--workdir"][0], options.get("--env", [])))
    elif verb == "inspect":
        sys.stdout.write("true\n" if (HOME / "oom").exists() else "false\n")
    elif verb == "rm":
        name = words[-1]
        shutil.rmtree(HOME / "containers" / name, ignore_errors=True)
    else:
        sys.exit(f"unknown command {verb}")


def apptainer(words):
    """`--version` and `exec`."""
    if words == ["--version"]:
        sys.stdout.write("apptainer version 99.0\n")
        return
    if words.pop(0) != "exec":
        sys.exit("unknown command")
    options, (image, *argv) = parsed("apptainer exec", words)
    if (HOME / "no_cgroups").exists() and "--memory" in options:
        sys.exit("FATAL: container creation failed: while applying cgroups config: rootless cgroups require systemd")
    source = HOME / Path(image.removeprefix("docker://")).name
    if not source.is_dir():
        sys.exit(f"FATAL: could not open image {image}")
    with tempfile.TemporaryDirectory(dir=HOME) as root:  # what a command changes in the image is lost with it
        copied(source.name, root)
        binds = [bind.split(":")[:2] for bind in options["--bind"]]
        sys.exit(
            subprocess.run(inside(root, argv, options["--pwd"][0], options["--env"], binds), check=False).returncode
        )


if __name__ == "__main__":
    with open(HOME / "log", "a", encoding="utf-8") as log:
        log.write(json.dumps([time.time(), *sys.argv]) + "\n")
    given = sys.argv[1:]
    if Path(sys.argv[0]).name == "apptainer":
        apptainer(given)
    else:
        docker(given)
