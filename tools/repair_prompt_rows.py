"""Prompts of agentless repair, made once: rows with a repository in, `swerl_gen` rows with their prompts out.

    python -m tools.repair_prompt_rows repositories.jsonl prompts.jsonl --prompts both --shown-files 5 --seed 1

A stage can make them itself (`prompts: both`), at every start anew; ranking the files of a large repository takes a
second or two, so a hundred thousand instances are better split over machines and written down.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_cascade.data.rows import read_jsonl
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.types import Json, UserError

NOT_THE_INSTANCE = ("shown_files", "image", "variant", "mode", "dataset_name")


def prompt_rows(domain: SweAgentless, row: Mapping[str, Json], where: str) -> Iterator[dict[str, Json]]:
    """The released form of each prompt that the domain's options make of a row."""
    for task in domain.parse_rows(row, where):
        truth = task.truth
        kept: dict[str, Json] = {key: truth[key] for key in ("dataset_name",) if key in truth}
        yield {
            "responses_create_params": {"input": [{"role": "user", "content": task.messages[0].content}]},
            "metadata": {
                "relevant_file_contents": json.dumps(truth["shown_files"]),
                "image": truth["image"],
                "variant": truth["variant"],
            },
            "instance": {key: value for key, value in truth.items() if key not in NOT_THE_INSTANCE},
            "mode": truth["mode"],
            "agent_ref": {"name": "swerl_gen_simple_agent"},
            **kept,
        }


def main(arguments: list[str]) -> int:
    """Read, make, write; the number of rows and prompts is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", type=Path, help="JSONL with repository_files, problem_statement and patch")
    parser.add_argument("out", type=Path, help="JSONL to write")
    parser.add_argument("--prompts", choices=("golden", "retrieved", "both"), default="both")
    parser.add_argument("--shown-files", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    options: dict[str, Json] = {
        "reward": "similarity", "prompts": given.prompts, "shown_files": given.shown_files, "prompt_seed": given.seed,
    }  # fmt: skip
    read = written = 0
    try:
        domain = SweAgentless(None, options)
        with given.out.open("w", encoding="utf-8") as out:
            for where, row in read_jsonl(given.rows):
                read += 1
                for made in prompt_rows(domain, row, where):
                    written += 1
                    out.write(json.dumps(made) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{written} prompts of {read} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
