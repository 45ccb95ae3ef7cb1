"""`nemo-cascade`: check, plan, run and read a cascade; audit its rewards; try its checkpoints.

Commands that train or sample import torch when they are called; the others answer at once on a login node.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_cascade import __version__
from nemo_cascade.config.load import Loaded, diff, load_cascade
from nemo_cascade.observe.quiet import quiet_libraries
from nemo_cascade.types import UserError

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2, a failed stage 1."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    try:
        return options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILURE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere on the line; argparse alone takes them only right after the cascade."""
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and "overrides" not in options):
        commands.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def parser() -> argparse.ArgumentParser:
    """The command line. Every command's --help ends with an example that works in a fresh checkout, after what the
    line before it asks for: a report needs a run.
    """
    top = argparse.ArgumentParser(
        prog="nemo-cascade", description="Nemotron-Cascade 2, end to end.", formatter_class=_Format
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, (add, command, about, example) in COMMANDS.items():
        epilog = f"{FIRST[name]}\nexample: {example}" if name in FIRST else f"example: {example}"
        sub = commands.add_parser(name, help=about, description=about, epilog=epilog, formatter_class=_Format)
        add(sub)
        sub.set_defaults(command=command)
    return top


class _Format(argparse.RawDescriptionHelpFormatter):
    """Keeps examples on their line."""


def _cascade(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("cascade", help="name below conf/cascade, or a path to a cascade file")
    _overrides(sub)


def _overrides(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="for example seed=3 stages.if_rl.optimizer.lr=1e-4",
    )
    sub.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="sets", help="the same, as an option"
    )


def _loaded(options: argparse.Namespace) -> Loaded:
    return load_cascade(options.cascade, [*options.overrides, *options.sets])


def _add_check(sub: argparse.ArgumentParser) -> None:
    _cascade(sub)
    sub.add_argument("--diff", metavar="CASCADE", help="also list what differs in this other cascade")


def check(options: argparse.Namespace) -> int:
    """Read every file strictly and check what can be known before a run."""
    from nemo_cascade.cascade.checks import exemptions, missing_programs, missing_sampler
    from nemo_cascade.cascade.plan import make_plan

    loaded = _loaded(options)
    plan = make_plan(loaded)
    if options.diff:
        for line in diff(loaded, load_cascade(options.diff)):
            print(line)
    stages, hardware = plan.stages.values(), loaded.hardware
    sampler = missing_sampler(stages, hardware, f"hardware {loaded.cascade.hardware}")
    for line in dict.fromkeys((*plan.missing, *sampler, *missing_programs(stages))):
        print(f"not on this machine: {line}")
    for line in exemptions(loaded.hardware, plan.model):
        print(line)
    print(f"{loaded.cascade.name}: {len(plan.stages)} stages in order: {', '.join(plan.graph.order)}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """What each stage will take."""
    from nemo_cascade.cascade import plan as planning

    print(planning.table(planning.make_plan(_loaded(options))))
    return 0


def _add_run(sub: argparse.ArgumentParser) -> None:
    _cascade(sub)
    sub.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and those after it")
    sub.add_argument("--until", metavar="STAGE", help="run this stage and those it needs")
    sub.add_argument("--dry-run", action="store_true", help="say what would run")
    sub.add_argument("--module", default="nemo_cascade.launch", help="the program that runs one stage folder")


def run(options: argparse.Namespace) -> int:
    """Run what is not done yet, then print the ledger and write the report."""
    from nemo_cascade.cascade.runner import Options, StageFailed
    from nemo_cascade.cascade.runner import run as run_cascade

    loaded = _loaded(options)
    chosen = Options(options.start, options.until, options.dry_run, options.module, terminal=sys.stdout)
    try:
        folder = run_cascade(loaded, chosen, _say)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.dry_run:
        return 0
    _print_status(folder)
    print(f"report: {_write_report(folder)}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _write_report(folder: Path) -> Path:
    from nemo_cascade.cascade.report import write_report

    return write_report(folder)


def _print_status(where: Any) -> None:
    from nemo_cascade.cascade import status as standing

    print(standing.table(standing.status(where)))


def _add_status(sub: argparse.ArgumentParser) -> None:
    _cascade(sub)
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for programs")
    form.add_argument("--markdown", action="store_true", help="the scores as a table for a page")


def status(options: argparse.Namespace) -> int:
    """Where a cascade stands."""
    from nemo_cascade.cascade import status as standing

    where = _where(options)
    if options.json:
        print(json.dumps(standing.status(where), indent=1))
    elif options.markdown:
        print(standing.markdown(where))
    else:
        _print_status(where)
    return 0


def _where(options: argparse.Namespace) -> Any:
    """The folder of a run, or the manifest that the named cascade would run under."""
    from nemo_cascade.cascade.fingerprint import keys
    from nemo_cascade.cascade.manifest import MANIFEST, from_plan
    from nemo_cascade.cascade.plan import make_plan

    if (Path(options.cascade) / MANIFEST).is_file():
        return Path(options.cascade)
    plan = make_plan(_loaded(options))
    return from_plan(plan, {} if plan.missing else keys(plan))


def report(options: argparse.Namespace) -> int:
    """Write the HTML report of a cascade that was run."""
    where = _where(options)
    print(_write_report(where if isinstance(where, Path) else where.path))
    return 0


def _add_audit(sub: argparse.ArgumentParser) -> None:
    what = "built-in names, package.module:Class or file.py:Class; all built-in ones by default"
    sub.add_argument("domains", nargs="*", metavar="DOMAIN", help=what)
    sub.add_argument("--rows", type=Path, metavar="FILE", help="also read this .jsonl file and score its gold")
    sub.add_argument("--quick", action="store_true", help="leave out the attacks that use up a time limit")
    sub.add_argument("--json", action="store_true", help="everything, for programs")


def audit(options: argparse.Namespace) -> int:
    """Score every domain's gold and anti-gold cases, then attack it."""
    from nemo_cascade.cascade import audit as auditing

    audits = auditing.audit(options.domains, options.rows, options.quick, lambda line: print(line, file=sys.stderr))
    print(json.dumps(auditing.to_json(audits), indent=1) if options.json else auditing.table(audits))
    return FAILURE if any(row.failed for row in audits) else 0


def _serving(name: str) -> Callable[[Any], Any]:
    """A function of cascade/serving.py, imported when it is called."""
    return lambda given: getattr(importlib.import_module("nemo_cascade.cascade.serving"), name)(given)


def _weights() -> ModuleType:
    """What needs torch, by module name, so that nothing here depends on it."""
    return importlib.import_module("nemo_cascade.evaluation.checkpoint")


def _add_eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="hf:nano, or a Hugging Face folder such as runs/nano/sft-1234abcd/hf")
    sub.add_argument("--cascade", default="nano", help="whose evaluation settings hold (default nano)")
    sub.add_argument("--domains", default="", help="comma-separated; the cascade's by default")
    sub.add_argument("--tasks", type=int, default=64, help="report tasks per domain (default 64)")
    sub.add_argument("--other-mode", type=int, default=0, help="of these, also in the other mode (default 0)")
    sub.add_argument("--max-new-tokens", type=int, help="default: the cascade's")
    sub.add_argument("--temperature", type=float, help="default: the cascade's")
    sub.add_argument("--top-p", type=float, help="default: the cascade's")
    sub.add_argument("--json", action="store_true")


def evaluate(options: argparse.Namespace) -> int:
    """Score one checkpoint on the report tasks, as a cascade would."""
    import dataclasses

    from nemo_cascade.cascade import judges

    given = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
    names = [name for name in options.domains.split(",") if name]
    cascade = load_cascade(options.cascade).cascade
    config = dataclasses.replace(
        cascade.evaluation,
        select=0,
        report=options.tasks,
        other_mode=options.other_mode,
        **{name: value for name, value in given.items() if value is not None},
        **({"domains": names} if names else {}),
    )
    cells = _weights().evaluate_folder(options.checkpoint, config, **judges.for_evaluation(config, cascade))
    rows = [
        {"domain": domain, "mode": mode, "score": cell.value, "ci_low": cell.low, "ci_high": cell.high, "n": cell.n}
        for (domain, _, mode), cell in cells.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        score = f"{row['score']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        print(f"{row['domain']:24} {row['mode']:9} {score} over {row['n']}")
    return 0


def _add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", type=Path, help="a Hugging Face folder or a .nemo file")
    sub.add_argument("target", type=Path, help="a new folder or a new .nemo file")
    sub.add_argument(
        "--dtype",
        choices=("keep", "fp32", "bf16"),
        default="keep",
        help="of the written folder (default keep, as in the source; bf16 leaves router, A_log, D, dt_bias in fp32)",
    )
    sub.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest file of the written folder (default 5GB)"
    )
    sub.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="whose tokenizer the folder carries (source's)")
    sub.add_argument(
        "--average", type=Path, nargs="+", default=[], metavar="FOLDER", help="write the mean of the source and these"
    )


def convert(options: argparse.Namespace) -> int:
    """Bring a checkpoint into published Hugging Face form, or into a .nemo file and back."""
    from nemo_cascade.config.paths import hf_folder

    conversion = importlib.import_module("nemo_cascade.evaluation.conversion")
    shard_bytes = conversion.size_in_bytes(options.shard_size)
    source = hf_folder(str(options.source))
    if options.average:
        if options.dtype != "keep":
            raise UserError("--average: keeps the dtype of its sources; leave --dtype out, or convert the mean")
        others = [hf_folder(str(folder)) for folder in options.average]
        print(conversion.average([source, *others], options.target, shard_bytes, options.tokenizer))
        return 0
    print(conversion.convert(source, options.target, options.dtype, shard_bytes, options.tokenizer))
    return 0


def _add_parity(sub: argparse.ArgumentParser) -> None:
    what = "hf:nano, a Hugging Face folder, a .nemo file or the folder of a finished stage"
    sub.add_argument("a", metavar="A", help=what)
    sub.add_argument("b", metavar="B", help="the same; where it is A, B runs in transformers")
    for side in "ab":
        sub.add_argument(f"--engine-{side}", choices=("megatron", "transformers"), help=f"what runs {side.upper()}")
    sub.add_argument("--text", type=Path, metavar="FILE", help="read its paragraphs instead of nano conversations")
    sub.add_argument("--prompts", type=int, default=16, help="sequences (default 16)")
    sub.add_argument("--max-tokens", type=int, default=256, help="tokens kept of each (default 256)")
    sub.add_argument("--seed", type=int, default=0, help="of the conversations (default 0)")
    sub.add_argument("--tolerance", type=float, default=1e-4, help="of a log-probability, in nat (default 1e-4)")
    sub.add_argument("--json", action="store_true", help="everything, for programs")


def parity(options: argparse.Namespace) -> int:
    """Find the layer where two checkpoints, or two engines on one, begin to differ."""
    module = importlib.import_module("nemo_cascade.evaluation.parity")
    prompts = module.Prompts(options.prompts, options.max_tokens, options.seed, options.text)
    engines = (options.engine_a, options.engine_b)
    found = module.compare(options.a, options.b, engines, prompts, options.tolerance)
    print(json.dumps(found.to_json(), indent=1) if options.json else found.table())
    return 0 if found.parity.agrees else FAILURE


def _add_chat(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="hf:nano, or a Hugging Face folder")
    sub.add_argument("--message", help="one message; without it a conversation on the terminal")
    sub.add_argument("--system", default="", help="the system prompt")
    sub.add_argument("--no-thinking", action="store_true", help="answer without reasoning")
    sub.add_argument("--max-new-tokens", type=int, default=128)
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)


def chat(options: argparse.Namespace) -> int:
    """Talk to a checkpoint."""
    from nemo_cascade.types import SamplingParams

    params = SamplingParams(options.max_new_tokens, options.temperature, options.top_p)
    talk = _weights().Conversation(options.checkpoint, params, not options.no_thinking, options.seed, options.system)
    if options.message is not None:
        _print_answer(talk.say(options.message))
        return 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if text.strip():
            _print_answer(talk.say(text))


def _print_answer(message: Any) -> None:
    if message.reasoning.strip():
        print(f"[thinks] {message.reasoning.strip()}")
    print(message.content)
    for call in message.tool_calls:
        print(f"[calls] {call.name}({json.dumps(dict(call.arguments))})")


SERVE_EXAMPLE = "nemo-cascade serve-domain mcqa --write-rows rows.jsonl --count 8"
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Command, str, str]] = {
    "check": (_add_check, check, "Read and check a cascade.", "nemo-cascade check nano seed=3"),
    "plan": (_cascade, plan, "Tokens, hours and memory per stage.", "nemo-cascade plan nemotron_cascade_2"),
    "run": (_add_run, run, "Run what is not done yet.", "nemo-cascade run nano --until sft --dry-run"),
    "status": (_add_status, status, "Where a cascade stands.", "nemo-cascade status nano --json"),
    "report": (_cascade, report, "Write the HTML report of a run.", "nemo-cascade report nano"),
    "eval": (_add_eval, evaluate, "Score one checkpoint.", "nemo-cascade eval hf:nano --domains math,mcqa --tasks 16"),
    "convert": (_add_convert, convert, "Convert a checkpoint.", "nemo-cascade convert hf:nano nano.nemo"),
    "parity": (_add_parity, parity, "Compare two checkpoints layer by layer.", "nemo-cascade parity hf:nano hf:nano"),
    "chat": (_add_chat, chat, "Talk to a checkpoint.", 'nemo-cascade chat hf:nano --message "What color is the fish?"'),
    "serve-domain": (_serving("add_arguments"), _serving("serve_domain"), "Serve a domain to NeMo-Gym.", SERVE_EXAMPLE),
    "audit": (_add_audit, audit, "Attack every domain's reward.", "nemo-cascade audit mcqa --quick"),
}
FIRST = {"report": "first: nemo-cascade run nano --until if_rl"}
"""What must have run before a command's example, as its --help says."""

if __name__ == "__main__":
    sys.exit(main())
