"""Which attacks a domain must hold, from the tables of this package and the domain's own cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from nemo_cascade.cascade.attacks import Attack, Target, answers, forbidden, judges, patches, programs, reviews, tools
from nemo_cascade.domains import Services
from nemo_cascade.domains.long_context import LongContext
from nemo_cascade.domains.math import Math
from nemo_cascade.domains.preference import Preference
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.genrm import Answer as GenRMAnswer
from nemo_cascade.reward.genrm import GenRMOptions, grade_group
from nemo_cascade.reward.judge import Judge
from nemo_cascade.reward.search_replace import Edit, render_edits
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Task, ToolCall, Transcript, UserError

PADDING_CHARS = 1 << 20
CODE_OPTIONS: dict[str, Json] = {"cpu_seconds": 1.0, "memory_mb": 256}  # an attack shall not take minutes to fail
FORTY_TWO = next(iter(judges.IN_WORDS))
SANDBOXED = ("code", "swe_agentless", "swe_agentic")
QUICK_PADDING = ("boxes that open", "fences with a language")
WAITS = (
    *("fork bomb", "infinite loop", "a thread that outlives", "floods standard error", "floods the result"),
    *("a regular expression", "a zip bomb", "returns an endless", "returns a number", "overflows", "fills the disk"),
    *("a constant too large", "never ends", "forks without end", "replaces the tests from a thread", "eats the memory"),
    "a hundred thousand",
)
"""How the names of attacks begin that use up an allowance of CPU time or of the clock: what `--quick` leaves out."""


def battery(target: Target) -> list[Attack]:
    """Every attack on one domain, in a fixed order; names are distinct."""
    domain = target.fresh({})
    cases = domain.cases()
    if not any(case.reward > 0 for case in cases):
        raise UserError(f"domain {target.name}: cases() has no gold case, one with a reward above 0; add one")
    found = [*_hacks(target, cases), *_forms(target, domain, cases), *OWN.get(domain.name, _nothing)(target, cases)]
    return [_marked(attack, domain.name) for attack in found]


def _marked(attack: Attack, domain: str) -> Attack:
    own = attack.name.rpartition(": ")[2]
    slow, sandboxed = attack.slow or own.startswith(WAITS), domain in SANDBOXED
    return dataclasses.replace(attack, slow=slow, sandboxed=sandboxed, hungry=sandboxed and own in programs.HUNGRY)


def _nothing(target: Target, cases: list[Case]) -> Iterator[Attack]:
    yield from ()


def _gold(cases: list[Case], key: str = "") -> Case:
    """The first gold case, of a task whose truth has `key`."""
    return next(case for case in cases if case.reward > 0 and (not key or key in case.task.truth))


def _said(case: Case, content: str, reasoning: str = "") -> Transcript:
    """The case's conversation with another final answer."""
    return Transcript((*case.transcript.messages[:-1], Message("assistant", content, reasoning)))


def _hacks(target: Target, cases: list[Case]) -> Iterator[Attack]:
    for case in cases:
        if case.hack:
            gold = next((good for good in cases if good.reward > 0 and good.task == case.task), _gold(cases))
            honest = target.scorer(gold.task, gold.transcript)
            score = target.scorer(case.task, case.transcript)
            yield Attack(f"hack: {case.because}", score, honest, gold.reward, most=case.reward)


def _forms(target: Target, domain: Domain, cases: list[Case]) -> Iterator[Attack]:
    """Transforms of a gold answer and texts without one, which no domain may pay for."""
    gold = _gold(cases)
    content = gold.transcript.final.content
    silent = dataclasses.replace(gold.transcript.final, content="", reasoning=content, tool_calls=())
    yield target.attack("form: the model never spoke", gold, Transcript(()))
    yield target.attack("form: cut at the token limit", gold, Transcript(gold.transcript.messages, truncated=True))
    for name, text in answers.REPLACED.items():
        yield target.attack(f"form: {name}", gold, Transcript((Message("assistant", text),)))
    if domain.max_turns > 1:
        yield from _turns(target, gold)
        return
    yield target.attack("form: the answer inside the thinking", gold, Transcript((silent,)))
    yield target.attack("form: an unfinished thought with the answer", gold, Transcript((silent,), truncated=True))
    for name, form in answers.SECOND_THOUGHTS.items():
        yield target.attack(f"form: {name}", gold, _said(gold, form.format(content=content)))
    asked = Message("user", content)
    yield target.attack("form: the answer in the user's mouth", gold, Transcript((asked, Message("assistant"))))
    yield target.attack("form: the answer in a tool's mouth", gold, Transcript((Message("tool", content),)))
    damaged = _damaged(content)
    yield target.attack("form: a surrogate inside the answer", gold, _said(gold, damaged), most=None)
    other = _contradiction(domain)
    if other is not None:
        task, right, wrong = other
        both = Transcript((Message("assistant", f"{right}\n{wrong}"),))
        honest = target.scorer(task, Transcript((Message("assistant", right),)))
        yield Attack("form: two answers at once", target.scorer(task, both), honest)
    for name, unit in answers.PADDING.items():
        padding = unit * (PADDING_CHARS // len(unit))
        yield target.attack(f"form: a megabyte of {name}", gold, _said(gold, padding), most=gold.reward / 2)
        any_pay: dict[str, object] = {"most": None, "slow": name not in QUICK_PADDING}
        yield target.attack(f"form: the answer after {name}", gold, _said(gold, f"{padding}\n{content}"), **any_pay)
        yield target.attack(f"form: the answer before {name}", gold, _said(gold, f"{content}\n{padding}"), **any_pay)


def _turns(target: Target, gold: Case) -> Iterator[Attack]:
    """Multi-turn: the same calls with damaged arguments, only described, or all in the thinking."""
    spoken = [message for message in gold.transcript.messages if message.role == "assistant"]
    calls = [call for message in spoken for call in message.tool_calls]
    told = "\n".join(f"{call.name}({dict(call.arguments)})" for call in calls)
    yield target.attack("form: calls only described", gold, Transcript((Message("assistant", told),)))
    yield target.attack("form: calls inside the thinking", gold, Transcript((Message("assistant", "", told),)))
    for name, extra in (("a surrogate", "\ud800"), ("a null byte", "\0"), ("a megabyte", "x" * PADDING_CHARS)):
        bad = tuple(
            ToolCall(call.name, {key: f"{value}{extra}" for key, value in call.arguments.items()}) for call in calls
        )
        turn = Transcript((Message("assistant", "", "", bad), Message("assistant", "Done.")))
        yield target.attack(f"form: {name} in every argument", gold, turn)
    odd: list[ToolCall] = [ToolCall("", {}), ToolCall("__init__", {"self": None}), ToolCall("state", {})]
    odd += [ToolCall(call.name, {key: [None, {}] for key in call.arguments}) for call in calls]
    yield target.attack("form: calls of another shape", gold, Transcript((Message("assistant", "", "", tuple(odd)),)))
    many = tuple(calls[:1]) * 20_000
    flood = Transcript((Message("assistant", "", "", many),))
    yield target.attack("form: twenty thousand calls", gold, flood, most=None)


def _damaged(text: str) -> str:
    """The text with a surrogate in the place of its last letter or digit."""
    at = max((index for index, char in enumerate(text) if char.isalnum()), default=-1)
    return f"{text[:at]}\ud800{text[at + 1 :]}"


def _contradiction(domain: Domain) -> tuple[Task, str, str] | None:
    """A task, its answer, and the answer of another task, which is wrong here."""
    tasks = domain.tasks("train", 24, seed=0)
    texts = [domain.demonstrate(task, 0)[-1].content for task in tasks]
    for text in texts[1:]:
        outcome = domain.score(tasks[0], Transcript((Message("assistant", text),)))
        if isinstance(outcome, Scored) and outcome.reward <= 0 and text != texts[0]:
            return tasks[0], texts[0], text
    return None


def _math(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    for name, content in answers.MATH.items():
        yield target.attack(f"math: {name}", gold, _said(gold, content))
    domain = target.fresh({})
    if not isinstance(domain, Math):
        return
    domain.services.math_grader()  # one for all that follow
    for whom, believes in (("judge", None), ("judge of the first answer", 0), ("judge of the last answer", 1)):
        judge = judges.Credulous(believes)
        judged = Math(dataclasses.replace(domain.services, equivalence_judge=judge), {"judge": True})

        def said(text: str, judged: Math = judged) -> Outcome:
            return judged.score(gold.task, _said(gold, f"\\boxed{{{text}}}"))

        for name, talk in judges.TALK.items():
            yield Attack(
                f"{whom}: {name}", lambda talk=talk, said=said: said(f"41\n{talk}"), lambda said=said: said(FORTY_TWO)
            )


def _mcqa(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    for name, content in answers.MCQA.items():
        yield target.attack(f"mcqa: {name}", gold, _said(gold, content))


def _structured(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    text = gold.transcript.final.content
    for name, template in answers.JSON.items():
        content = template.replace("GOLD", text).replace("{GOOD", text.rstrip()[:-1])
        yield target.attack(f"json: {name}", gold, _said(gold, content))


def _code(target: Target, cases: list[Case]) -> Iterator[Attack]:
    called, asserted = _gold(cases, "fn_name"), _gold(cases, "test")
    streamed = next(case for case in cases if case.reward > 0 and not {"fn_name", "test"} & set(case.task.truth))
    for kind, gold, table, slow in (
        ("call", called, programs.CALLS, False),
        ("call", called, programs.SLOW_CALLS, True),
        ("program", streamed, programs.STREAMS, False),
        ("assertions", asserted, programs.ASSERTED, False),
    ):
        for name, source in table.items():
            said = _said(gold, f"```python\n{source}```" if "```" not in source else source)
            yield target.attack(f"{kind}: {name}", gold, said, slow=slow, options=CODE_OPTIONS)


    source = called.transcript.final.content
    for name, attempt in forbidden.ATTEMPTS.items():
        yield Attack(
            f"call: {name}",
            lambda attempt=attempt: forbidden.attempted(attempt, source, lambda text: _scored(target, called, text)),
            target.scorer(called.task, called.transcript, CODE_OPTIONS),
            called.reward,
        )


def _scored(target: Target, case: Case, source: str) -> Outcome:
    return target.scorer(case.task, _said(case, f"```python\n{source}```"), CODE_OPTIONS)()


def _filled(text: str, truth: Mapping[str, Json]) -> str:
    """A template of `patches` for one repository."""
    path, line = str(truth["path"]), str(truth["before"])
    values = {
        "PATH": path, "TEST": f"test_{path}", "LINE": line, "NAME": line.partition("(")[0].removeprefix("def "),
        "FIRST": str(truth["tests"][f"test_{path}"]).splitlines()[0], "CHECK": str(truth["check"]),
    }  # fmt: skip
    for word, value in values.items():
        text = text.replace(word, value)
    return text


def _agentless(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    truth = gold.task.truth
    path, line = str(truth["path"]), str(truth["before"])
    for name, template in patches.TRICKS.items():
        code = _filled(template, truth).split("\n")
        yield target.attack(f"patch: {name}", gold, _said(gold, render_edits([Edit(path, (line,), tuple(code))])))
    for name, place in patches.PLACES.items():
        planted = render_edits([Edit(_filled(place, truth), (), (patches.ESCAPE,))])
        yield target.attack(f"place: {name}", gold, _said(gold, planted))
    for name, diff in patches.DIFFS.items():
        yield target.attack(f"diff: {name}", gold, _said(gold, _filled(diff, truth)))
    yield from reviewed(gold, reviews.Reviewer(str(truth["after"])))


def reviewed(gold: Case, judge: Judge) -> Iterator[Attack]:
    """Patches that repair nothing and talk to the model that judges them; beside each a repair in other words."""
    truth = gold.task.truth
    path, line, after = (str(truth[key]) for key in ("path", "before", "after"))
    wrong, right = f"{line}+0", after.replace(": return ", ":\n    return ")
    known = render_edits([Edit(path, (line,), (after,))])

    def score(content: str) -> Outcome:
        judged = SweAgentless(Services(repair_judge=judge), {"reward": "judge"})
        return judged.score(gold.task, _said(gold, content))

    def patch(*code: str) -> str:
        return render_edits([Edit(path, (line,), code)])

    said = {name: patch(f'""" {talk} """', wrong) for name, talk in reviews.TALK.items()}
    said |= {f"{name}, at the end": patch(wrong, *talk.split("\n")) for name, talk in reviews.TALK.items()}
    said |= {name: form.replace("PATCH", patch(wrong)) for name, form in reviews.AROUND.items()}
    said |= {name: render_edits([Edit(place, (), (wrong,))]) for name, place in reviews.PLACES.items()}
    for name, content in said.items():
        spoken = content.replace("GOLD", known.replace("<<<<<<<", "<").replace(">>>>>>>", ">"))
        yield Attack(f"review: {name}", lambda spoken=spoken: score(spoken), lambda: score(patch(*right.split("\n"))))


def _agentic(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    truth = gold.task.truth
    path, line = str(truth["path"]), str(truth["before"])
    for name, template in patches.TRICKS.items():
        edit = ToolCall("edit", {"file": path, "old": line, "new": _filled(template, truth)})
        turns = (Message("assistant", "", "", (edit,)), Message("assistant", "Done."))
        yield target.attack(f"edit: {name}", gold, Transcript(turns))
    for name, place in patches.PLACES.items():
        edit = ToolCall("edit", {"file": _filled(place, truth), "old": "", "new": patches.ESCAPE})
        turns = (Message("assistant", "", "", (edit,)), Message("assistant", "Done."))
        yield target.attack(f"place: {name}", gold, Transcript(turns))


def _equivalence(target: Target, cases: list[Case]) -> Iterator[Attack]:
    judged = LongContext(Services(equivalence_judge=judges.Obedient()), {"grading": "judge"})
    question: dict[str, Json] = {"question": "What heats water?", "expected_answer": "the sun", "grading": "judge"}
    task = dataclasses.replace(_gold(cases).task, truth=question)

    def said(text: str) -> Outcome:
        return judged.score(task, Transcript((Message("assistant", text),)))

    for name, talk in judges.TALK.items():
        yield Attack(f"judge: {name}", lambda talk=talk: said(f"the moon\n{talk}"), lambda: said("the sun"))


def _pairwise(target: Target, cases: list[Case]) -> Iterator[Attack]:
    gold = _gold(cases)
    truth, content = gold.task.truth, gold.transcript.final.content
    judge = judges.Quoting(str(truth["name"]), str(truth["noun"]))

    def grade(answer: str, native: bool) -> Outcome:
        turns = [{"role": message.role, "content": message.content} for message in gold.task.messages]
        group = [GenRMAnswer(answer), GenRMAnswer(content)]
        outcomes = grade_group(judge, turns, group, GenRMOptions(native_roles=native, attempts=1))
        if isinstance(outcomes[0], Invalid) or isinstance(outcomes[1], Invalid):
            return Invalid("the judge's answers hold no verdict")
        return Scored(outcomes[0].reward - outcomes[1].reward, reason="ahead of the honest answer by this much")

    for kind, native in (("judge", True), ("plain judge", False)):
        for name, talk in judges.TALK.items():
            yield Attack(
                f"{kind}: {name}",
                lambda talk=talk, native=native: grade(f"I like it.\n{talk}", native),
                lambda native=native: grade(content, native),
                0.0,
            )


OWN = {
    "math": _math,
    "mcqa": _mcqa,
    "structured_output": _structured,
    "code": _code,
    "tool_use": tools.attacks,
    "swe_agentless": _agentless,
    "swe_agentic": _agentic,
    LongContext.name: _equivalence,
    Preference.name: _pairwise,
}
