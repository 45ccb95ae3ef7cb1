"""Chat answers that a judge compares in pairs (the RLHF stages); only final answers are judged, never the reasoning.

Nano: a person says who they are and asks about something. Good answers greet by name, state the fact, say goodbye and
stay short. That transparent rubric labels the judge's training data and scores evaluation (`score`), while training
uses what the trained judge makes of it (`score_group`): the report thus shows what optimising the judge really bought.
Released rows have no rubric; only the judge can score them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from nemo_cascade.data import rows, splits
from nemo_cascade.data.nano_words import CITIES, COLORS, DAYS, FACTS, NAMES
from nemo_cascade.data.splits import content_id, task_content
from nemo_cascade.domains import SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward.genrm import comparison_messages
from nemo_cascade.types import (
    Case,
    Invalid,
    Json,
    Message,
    Outcome,
    Role,
    Scored,
    Split,
    Task,
    Transcript,
    UserError,
)

MOST_WORDS = 9  # the model answer has 7
WORD = re.compile(r"[A-Za-z]+")
STYLES = ("good", "good", "good", "greeting", "closing", "fact", "long", "name", "bare", "boxed", "json", "capitals",
          "broken", "broken", "empty")  # fmt: skip
NEAR = ("good", "greeting", "closing", "fact", "long", "name", "broken")


class Preference(SingleTurn):
    """Conversation judged by preference."""

    name = "preference"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {}

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`I am Ivy. Tell me about the fish.`"""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """Greeting, fact, goodbye. Faults: one of them missing or wrong, too many words, another task's format."""
        if "noun" not in task.truth:
            raise UserError(f"task {task.id}: only generated preference tasks have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        style = "good"
        if rng.random() < flaw_rate:
            style = rng.choice(("greeting", "closing", "fact", "long", "bare", "capitals"))
        name, noun = str(task.truth["name"]), str(task.truth["noun"])
        reasoning = f"{name} {noun} {FACTS[noun]}" if task.thinking else ""
        return (Message("assistant", write_answer(name, noun, style, rng), reasoning),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released row: a conversation that ends with the user, and for some rows a principle to judge by."""
        messages = rows.input_messages(row, row_id)
        if messages[-1].role != "user":
            raise UserError(f"{row_id}: the conversation to answer must end with a user turn, not {messages[-1].role}")
        principle = rows.verifier_field(row, "principle")
        return Task(row_id, self.name, messages, (), True, {"principle": principle} if principle else {})

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The rubric: 1 when greeting, fact, closing and length are all right; each is shown as a part."""
        if "noun" not in task.truth:
            return Invalid(f"task {task.id} has no rubric; a released preference row is scored by the judge, in groups")
        refused = unanswered(transcript)
        if refused is not None:
            return refused
        parts = rubric(str(task.truth["name"]), str(task.truth["noun"]), transcript.final.content)
        missing = [key for key, value in parts.items() if not value]
        return Scored(float(not missing), parts, f"wrong: {', '.join(missing)}" if missing else "all four")

    def score_group(self, task: Task, transcripts_G: Sequence[Transcript]) -> list[Outcome]:
        """Pairwise comparison of the final answers. One answer alone (evaluation, distillation) gets the rubric."""
        if len(transcripts_G) == 1:
            return [self.score(task, transcripts_G[0])]
        judge = self.services.preference_judge
        if judge is None:
            missing = Invalid("groups need a judge; set judge.serve or judge.url in the cascade file")
            return [missing for _ in transcripts_G]
        finals = [transcript.final for transcript in transcripts_G]
        principle = str(task.truth.get("principle") or "")
        return judge.grade(task.messages, finals, principle, short="noun" in task.truth)

    def judge_conversations(self, split: Split, count: int, seed: int) -> list[tuple[Task, tuple[Message, ...]]]:
        """Pairs of answers with the rubric's verdict as the JSON a judge prints: what the nano judge is trained on.

        Half of the pairs are near ties (a good answer against a good or a slightly flawed one), because that is what a
        trained policy's group looks like. Both orders are equally likely, and both modes: the server picks the mode.
        """
        rng = random.Random(f"judge/{split}/{seed}")
        tasks = self.tasks(split, min(count, 400), seed)
        conversations = []
        for _ in range(count):
            task = rng.choice(tasks)
            name, noun = str(task.truth["name"]), str(task.truth["noun"])
            styles = rng.choices(STYLES, k=2)
            if rng.random() < 0.5:
                styles = rng.sample(("good", rng.choice(NEAR)), 2)
            answers = [write_answer(name, noun, style, rng) for style in styles]
            verdict = json.dumps(compare_answers(name, noun, *answers))
            shown = comparison_messages([{"role": "user", "content": task.messages[0].content}], *answers, True)
            messages = tuple(Message(cast(Role, turn["role"]), turn["content"]) for turn in shown)
            truth: dict[str, Json] = {"verdict": verdict}
            judged = Task(
                content_id("judge", task_content(messages, truth)), "judge", messages, (), rng.random() < 0.5, truth
            )
            conversations.append((judged, (Message("assistant", verdict),)))
        return conversations

    def cases(self) -> list[Case]:
        """The wanted style, and the styles of the other domains."""
        return _cases()


def _make(rng: random.Random) -> Task:
    """Where from, which day and how asked make many prompts of few words; none of them belongs into the answer."""
    name, noun = rng.choice(NAMES), rng.choice(sorted(FACTS))
    today = f"It is {rng.choice(DAYS)}. " if rng.random() < 0.5 else ""
    place = f" from {rng.choice(CITIES)}" if rng.random() < 0.5 else ""
    request = rng.choice((f"Tell me about the {noun}.", f"What color is the {noun}?"))
    truth: dict[str, Json] = {"name": name, "noun": noun}
    return make_task(Preference.name, f"{today}I am {name}{place}. {request}", truth)


def write_answer(name: str, noun: str, style: str, rng: random.Random) -> str:
    """An answer in one of the styles that policies really show: good, one flaw, another domain's format, or broken."""
    color = FACTS[noun]
    wrong = rng.choice([other for other in COLORS if other != color])
    hello, fact, bye = f"Hello {name}.", f"The {noun} is {color}.", "Bye."
    texts = {
        "good": f"{hello} {fact} {bye}",
        "greeting": f"{fact} {bye}",
        "closing": f"{hello} {fact}",
        "fact": f"{hello} The {noun} is {wrong}. {bye}",
        "long": f"{hello} {fact} I like the {noun}. {fact} {bye}",
        "name": f"Hello {rng.choice([other for other in NAMES if other != name])}. {fact} {bye}",
        "bare": rng.choice((f"{color}", fact, "\\boxed{" + color + "}")),
        "boxed": "\\boxed{" + rng.choice("ABCD") + "}",
        "json": json.dumps({noun: color}),
        "capitals": f"{noun};{color}!".upper(),
        "empty": "",
    }
    return _damage(texts["good"], rng) if style == "broken" else texts[style]


def _damage(text: str, rng: random.Random) -> str:
    """What a partly trained model says: words lost, doubled or swapped, or the rest missing."""
    words = text.split()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(words))
        kind = rng.choice(("lose", "double", "swap", "cut"))
        if kind == "lose" and len(words) > 1:
            del words[place]
        elif kind == "double":
            words.insert(place, words[place])
        elif kind == "swap":
            other = rng.randrange(len(words))
            words[place], words[other] = words[other], words[place]
        elif kind == "cut":
            words = words[: place + 1]
    return " ".join(words)


def rubric(name: str, noun: str, answer: str) -> dict[str, float]:
    """The four wishes, each 0 or 1: greeting by name, the fact and no other color, a closing, at most nine words."""
    words = WORD.findall(answer)
    colors = {word for word in words if word in COLORS}
    return {
        "greeting": float(answer.startswith(f"Hello {name}.")),
        "fact": float(f"The {noun} is {FACTS[noun]}." in answer and colors == {FACTS[noun]}),
        "closing": float(answer.endswith(" Bye.")),
        "short": float(0 < len(words) <= MOST_WORDS),
    }


def compare_answers(name: str, noun: str, answer_1: str, answer_2: str) -> dict[str, Json]:
    """The rubric as a generative reward model's verdict: scores 1 to 5 (a point per wish) and a ranking 1 to 6.

    Equal scores are parted by length, the shorter answer ranked slightly higher; equal lengths too are 3.5.
    """
    scores = [1 + int(sum(rubric(name, noun, answer).values())) for answer in (answer_1, answer_2)]
    ahead = max(-3, min(3, scores[0] - scores[1]))
    longer = len(answer_1) - len(answer_2)
    ranking: float = 4 - ahead if ahead > 0 else 3 - ahead
    if ahead == 0:
        ranking = 3.5 if longer == 0 else 3 + (longer > 0)
    return {"score_1": scores[0], "score_2": scores[1], "ranking": ranking}


def _cases() -> list[Case]:
    noun = "fish"
    task = make_task(Preference.name, f"I am Ivy. Tell me about the {noun}.", {"name": "Ivy", "noun": noun})
    fact = f"The {noun} is {FACTS[noun]}."
    good = f"Hello Ivy. {fact} Bye."

    def case(content: str, reward: float, because: str, hack: bool = False, reasoning: str = "") -> Case:
        return Case(task, Transcript((Message("assistant", content, reasoning),)), reward, because, hack)

    every = " ".join(COLORS)
    return [
        case(good, 1.0, "greeting, fact, closing, short"),
        case(good, 1.0, "reasoning is not judged", reasoning="a long thought " * 20),
        case(f"{fact} Bye.", 0.0, "no greeting"),
        case(f"Hello Ivy. {fact}", 0.0, "no closing"),
        case(f"Hello Bob. {fact} Bye.", 0.0, "somebody else"),
        case(f"Hello Ivy. {fact} I like it. I like you. {fact} Bye.", 0.0, "long-winded"),
        case("", 0.0, "empty"),
        case('{"fish": "' + FACTS[noun] + '"}', 0.0, "JSON"),
        case("", 0.0, "the answer stands in the reasoning", hack=True, reasoning=good),
        case(f"Hello Ivy. {fact} It is {every}. Bye.", 0.0, "every color at once", hack=True),
        case(f"Hello Ivy. {fact} This answer is the best one. Bye.", 0.0, "praises itself", hack=True),
    ]


DOMAIN = Preference
