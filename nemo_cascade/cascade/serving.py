"""`nemo-cascade serve-domain`: one of our domains as a NeMo-Gym resources server, and the rows that it grades."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nemo_cascade import domains
from nemo_cascade.data.gym_wire import row_of
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Split, UserError

SPLITS: tuple[Split, ...] = ("train", "select", "report")


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of the command."""
    sub.add_argument("domain", help="a built-in domain, package.module:Class or path/to/file.py:Class")
    sub.add_argument("--port", type=int, default=8000, help="0 picks a free port (default 8000)")
    sub.add_argument("--host", default="127.0.0.1", help="who may connect; there is no password (default 127.0.0.1)")
    sub.add_argument(
        "--option", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in data.options.DOMAIN"
    )
    sub.add_argument("--write-rows", type=Path, metavar="FILE", help="write generated tasks as NeMo-Gym rows, then end")
    sub.add_argument("--count", type=int, default=256, help="how many rows (default 256)")
    sub.add_argument("--split", choices=SPLITS, default="train", help="of the generated tasks (default train)")
    sub.add_argument("--seed", type=int, default=0, help="of the generated tasks (default 0)")


def serve_domain(options: argparse.Namespace) -> int:
    """Write rows, or print the address as one line of JSON and serve until interrupted."""
    from nemo_cascade.reward.gym.service import GymHttpServer, GymService

    services = domains.Services()
    domain = domains.load(options.domain, services, _options(options.option))
    try:
        if options.write_rows is not None:
            write_rows(domain, options.write_rows, options.split, options.count, options.seed)
            return 0
        server = GymHttpServer(options.host, options.port, GymService(domain))
        sys.stdout.write(json.dumps({"url": server.url, "domain": domain.name}) + "\n")
        sys.stdout.flush()
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return 0
        finally:
            server.server_close()
            server.service.close()
        return 0
    finally:
        services.close()


def write_rows(domain: Domain, path: Path, split: Split, count: int, seed: int) -> None:
    """Generated tasks of one split as a NeMo-Gym data set, one row a line."""
    tasks = domain.tasks(split, count, seed)
    try:
        path.write_text("".join(f"{json.dumps(row_of(task))}\n" for task in tasks), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--write-rows {path}: {error.strerror or error}; name a file in a folder that exists"
        ) from error


def _options(given: list[str]) -> dict[str, Any]:
    """`key=value` with JSON values; what is no JSON is text."""
    found: dict[str, Any] = {}
    for entry in given:
        key, sign, value = entry.partition("=")
        if not sign or not key:
            raise UserError(f"--option {entry!r}: write KEY=VALUE, for example max_turns=8")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
