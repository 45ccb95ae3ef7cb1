"""A small office of our own, in the form of the released workplace tables, and requests on it.

The CSV files below `office_tables/` ship with the package; `python -m nemo_cascade.reward.workplace_office FOLDER`
writes them, or larger ones (`--rows`). Released rows need the released tables: their requests speak of other people.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from nemo_cascade.reward.workplace import BOARDS, LISTS, NOW, PRODUCTS, STATUSES
from nemo_cascade.reward.workplace_tables import DIRECTORY, FILES, Row, Tables
from nemo_cascade.types import Tool, ToolCall

FOLDER = Path(__file__).with_name("office_tables")
SYSTEM = f"Today is Thursday, {NOW[:10]}, {NOW[11:]}. Use the tools; say Done. when the work is done."
FIRST = ("ada", "ben", "cleo", "dina", "emil", "fatou", "goran", "hana", "ivo", "jana")
LAST = ("moss", "reyes", "okoye", "lind", "sato", "weber", "novak", "haddad", "brandt", "costa")
CUSTOMERS = tuple(
    f"{first} {last}"
    for first in ("Alva", "Bruno", "Cora", "Dario", "Elsa")
    for last in ("Hill", "Ito", "Kaya", "Lopez")
)
SUBJECTS = ("Budget", "Hiring plan", "Server move", "Offsite", "Invoice", "Roadmap")
MEETINGS = ("Design review", "Sales sync", "Retro", "Interview", "Standup")
WORK = ("Fix login page", "Write release notes", "Speed up search", "Draw new icons", "Test backups", "Clean up logs")
SOURCES = ("direct", "referral", "search engine", "social media")
END = datetime.fromisoformat(NOW)


def generate(seed: int, rows: int) -> dict[str, list[dict[str, str]]]:
    """The tables: `rows` of each, people in the directory. Numbers are those of the place in the table, shuffled."""
    rng = random.Random(f"office/{seed}")
    people = [f"{first}.{last}@office.example" for first, last in zip(FIRST, LAST, strict=True)]

    def numbers(width: int) -> list[str]:
        return [str(number).zfill(width) for number in rng.sample(range(rows), rows)]

    def before(days: int) -> str:
        return str(END - timedelta(days=rng.randrange(1, days), minutes=rng.randrange(60 * 12)))[:19]

    emails = [
        {"email_id": number, "inbox/outbox": rng.choice(("inbox", "inbox", "outbox")),
         "sender/recipient": rng.choice(people), "subject": rng.choice(SUBJECTS), "sent_datetime": before(40),
         "body": f"About {rng.choice(SUBJECTS).lower()}."}
        for number in numbers(8)
    ]  # fmt: skip
    events = [
        {"event_id": number, "event_name": rng.choice(MEETINGS), "participant_email": rng.choice(people),
         "event_start": f"{(END + timedelta(days=rng.randrange(1, 20))).date()} {rng.randrange(9, 17):02}:00:00",
         "duration": rng.choice(("30", "60", "90"))}
        for number in numbers(8)
    ]  # fmt: skip
    visits = [
        {"date_of_visit": before(30)[:10], "visitor_id": number, "page_views": str(rng.randrange(1, 20)),
         "session_duration_seconds": str(rng.randrange(1, 60)), "traffic_source": rng.choice(SOURCES),
         "user_engaged": rng.choice(("True", "False"))}
        for number in numbers(4)
    ]  # fmt: skip
    tasks = [
        {"task_id": number, "task_name": f"{rng.choice(WORK)} {at}", "assigned_to_email": people[at % len(people)],
         "list_name": rng.choice(LISTS), "due_date": str((END + timedelta(days=rng.randrange(20))).date()),
         "board": rng.choice(BOARDS)}
        for at, number in enumerate(numbers(8))
    ]  # fmt: skip
    names = [CUSTOMERS[at] if at < len(CUSTOMERS) else f"{CUSTOMERS[at % len(CUSTOMERS)]} {at}" for at in range(rows)]
    customers = [
        {"customer_id": number, "assigned_to_email": rng.choice(people), "customer_name": name,
         "customer_email": f"{name.lower().replace(' ', '.')}@customer.example", "customer_phone": "",
         "last_contact_date": before(30), "product_interest": rng.choice(PRODUCTS), "status": rng.choice(STATUSES),
         "follow_up_by": str(END + timedelta(days=rng.randrange(1, 30)))[:19], "notes": ""}
        for name, number in zip(names, numbers(8), strict=True)
    ]  # fmt: skip
    tables = {"email": emails, "event": events, "visit": visits, "task": tasks, "customer": customers}
    return {**tables, "people": [{"address": address} for address in people]}


def write(folder: Path, seed: int = 0, rows: int = 20) -> None:
    """The six CSV files of an office."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = generate(seed, rows)
    (folder / DIRECTORY).write_text("".join(f"{row['address']}\n" for row in tables["people"]), encoding="utf-8")
    for name, (file, _) in FILES.items():
        with (folder / file).open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, list(tables[name][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(tables[name])


@dataclass(frozen=True)
class Request:
    """What somebody wants done, what to look up for it, and the calls that do it."""

    text: str
    lookups: tuple[ToolCall, ...]
    calls: tuple[ToolCall, ...]


def _who(address: str) -> str:
    return address.partition(".")[0].capitalize()


def _latest(tables: Tables, address: str) -> Row | None:
    found = [
        row for row in tables.tables["email"] if row["sender/recipient"] == address and row["inbox/outbox"] == "inbox"
    ]
    return max(found, key=lambda row: row["sent_datetime"] or "", default=None)


def _email(rng: random.Random, tables: Tables) -> Request | None:
    address = rng.choice(tables.people)
    row = _latest(tables, address)
    if row is None:
        return None
    look, number = ToolCall("email_search_emails", {"query": address, "page_size": 20}), row["email_id"]
    kind = rng.choice(("delete", "reply", "forward"))
    if kind == "delete":
        act = ToolCall("email_delete_email", {"email_id": number})
        return Request(f"Delete the last email I got from {_who(address)}.", (look,), (act,))
    if kind == "reply":
        act = ToolCall("email_reply_email", {"email_id": number, "body": "Thank you."})
        return Request(f"Reply to the last email I got from {_who(address)} with 'Thank you.'", (look,), (act,))
    other = rng.choice([one for one in tables.people if one != address])
    act = ToolCall("email_forward_email", {"email_id": number, "recipient": other})
    find = ToolCall("company_directory_find_email_address", {"name": _who(other).lower()})
    return Request(f"Forward the last email I got from {_who(address)} to {_who(other)}.", (look, find), (act,))


def _calendar(rng: random.Random, tables: Tables) -> Request | None:
    address = rng.choice(tables.people)
    if rng.random() < 0.5:
        name, hour = rng.choice(MEETINGS), rng.randrange(9, 17)
        start = f"{(END + timedelta(days=rng.randrange(1, 10))).date()} {hour:02}:00:00"
        arguments = {"event_name": name, "participant_email": address, "event_start": start, "duration": "30"}
        text = f"Book a {name} of 30 minutes with {_who(address)} on {start[:10]} at {hour}:00."
        find = ToolCall("company_directory_find_email_address", {"name": _who(address).lower()})
        return Request(text, (find,), (ToolCall("calendar_create_event", {**arguments}),))
    row = min(
        (row for row in tables.tables["event"] if row["participant_email"] == address),
        key=lambda row: row["event_start"] or "",
        default=None,
    )
    if row is None:
        return None
    look = ToolCall("calendar_search_events", {"query": address, "page_size": 20})
    act = ToolCall("calendar_delete_event", {"event_id": row["event_id"]})
    return Request(f"Cancel my next meeting with {_who(address)}.", (look,), (act,))


def _project(rng: random.Random, tables: Tables) -> Request | None:
    address, target = rng.choice(tables.people), rng.choice(LISTS)
    moved = [row for row in tables.tables["task"] if row["assigned_to_email"] == address and row["list_name"] != target]
    if not moved:
        return None
    look = ToolCall("project_management_search_tasks", {"assigned_to_email": address})
    acts = [
        ToolCall(
            "project_management_update_task", {"task_id": row["task_id"], "field": "list_name", "new_value": target}
        )
        for row in moved
    ]
    return Request(f"Move all tasks of {_who(address)} to {target}.", (look,), tuple(acts))


def _customer(rng: random.Random, tables: Tables) -> Request | None:
    row = rng.choice(tables.tables["customer"])
    status = rng.choice([one for one in STATUSES if one != row["status"]])
    name, number = row["customer_name"], row["customer_id"]
    look = ToolCall("customer_relationship_manager_search_customers", {"customer_name": name})
    if rng.random() < 0.3:
        act = ToolCall("customer_relationship_manager_delete_customer", {"customer_id": number})
        return Request(f"Delete {name} from the CRM.", (look,), (act,))
    change = {"customer_id": number, "field": "status", "new_value": status}
    act = ToolCall("customer_relationship_manager_update_customer", {**change})
    return Request(f"Set the status of {name} in the CRM to {status}.", (look,), (act,))


def _plot(rng: random.Random, tables: Tables) -> Request | None:
    start = str((END - timedelta(days=rng.randrange(1, 30))).date())
    kind = rng.choice(("bar", "line", "scatter", "histogram"))
    arguments = {"time_min": start, "time_max": NOW[:10], "value_to_plot": "total_visits", "plot_type": kind}
    act = ToolCall("analytics_create_plot", {**arguments})
    return Request(f"Make a {kind} plot of total visits from {start} to today.", (), (act,))


KINDS: tuple[Callable[[random.Random, Tables], Request | None], ...] = (_email, _calendar, _project, _customer, _plot)


def make_request(rng: random.Random, tables: Tables) -> Request:
    """One request, of two parts half of the time. People are told apart by their first names."""
    parts: list[Request] = []
    kinds = rng.sample(KINDS, 1 + (rng.random() < 0.5))
    for kind in kinds:
        found = next(filter(None, (kind(rng, tables) for _ in itertools.repeat(None))))
        parts.append(found)
    text = " Then: ".join(part.text for part in parts)
    lookups = tuple(call for part in parts for call in part.lookups)
    return Request(text, lookups, tuple(call for part in parts for call in part.calls))


def main(argv: Sequence[str] | None = None) -> int:
    """Write an office."""
    parser = argparse.ArgumentParser(description="Write the workplace tables of a generated office.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20, help="of each table (default 20)")
    options = parser.parse_args(argv)
    write(options.folder, options.seed, options.rows)
    return 0


def tool(name: str, function: Callable[..., object]) -> Tool:
    """A workplace tool as the prompt offers it: its name says what it does, its parameters are texts."""
    code = function.__code__
    names = [parameter for parameter in code.co_varnames[1 : code.co_argcount]]
    kinds = {"page": "integer", "page_size": "integer"}
    properties = {parameter: {"type": kinds.get(parameter, "string")} for parameter in [*names, *EXTRA.get(name, ())]}
    return Tool(name, name.replace("_", " "), {"type": "object", "properties": properties})  # type: ignore[dict-item]


EXTRA = {
    "customer_relationship_manager_search_customers": (
        "customer_name", "customer_email", "product_interest", "status", "assigned_to_email", "last_contact_date_min",
        "last_contact_date_max", "follow_up_by_min", "follow_up_by_max",
    ),
    "customer_relationship_manager_add_customer": (
        "customer_email", "customer_phone", "last_contact_date", "product_interest", "notes", "follow_up_by",
    ),
}  # fmt: skip
"""Parameters that the two functions take by name."""

if __name__ == "__main__":
    sys.exit(main())
