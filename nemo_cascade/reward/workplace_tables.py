"""The tables of released workplace-assistant rows, and what every table can do: read, change, remove, number, page.

The tables are CSV files (emails, calendar events, visits, project tasks, customers, a company directory) that the user
supplies; a released row names only the calls to make on them.
"""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from nemo_cascade.types import Json, UserError

FOLDER_VARIABLE = "NEMO_CASCADE_WORKPLACE"
FILES = {
    "email": ("emails.csv", "email_id"),
    "event": ("calendar_events.csv", "event_id"),
    "visit": ("analytics_data.csv", "visitor_id"),
    "task": ("project_tasks.csv", "task_id"),
    "customer": ("customer_relationship_manager_data.csv", "customer_id"),
}
SMALL_OFFICE = "small-office"
DIRECTORY = "email_addresses.csv"
CHANGEABLE = ("email", "event", "task", "customer")
CASE_MATTERS = ("status", "list_name", "board")
EMAIL_FIELDS = ("participant_email", "assigned_to_email", "customer_email")
Row = dict[str, str | None]


def tables_folder(option: str = "") -> Path:
    """The folder of the CSV tables: the option, else the environment, `small-office` for the one that ships; UserError
    says what is missing.
    """
    place = option or os.environ.get(FOLDER_VARIABLE, "")
    if place == SMALL_OFFICE:
        return Path(__file__).with_name("office_tables")
    if not place:
        raise UserError(
            "tool_use: this row needs the workplace tables; set data.options.tool_use.workplace_tables "
            f"or {FOLDER_VARIABLE} to their folder ({SMALL_OFFICE}: the generated ones that ship with the package)"
        )
    folder = Path(place)
    missing = [name for name in (*(file for file, _ in FILES.values()), DIRECTORY) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"workplace tables {place}: no {missing[0]} there; the folder must hold the six CSV files")
    return folder


@functools.cache
def _load(folder: Path) -> tuple[dict[str, list[Row]], list[str]]:
    tables: dict[str, list[Row]] = {}
    for name, (file, _) in FILES.items():
        with (folder / file).open(newline="", encoding="utf-8") as lines:
            tables[name] = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
    people = (folder / DIRECTORY).read_text(encoding="utf-8").split()
    return tables, people


class Tables:
    """One rollout's copy of the databases. Rows are shared with the loaded tables until a call changes them."""

    def __init__(self, folder: Path) -> None:
        tables, self.people = _load(folder)
        self.tables: dict[str, list[Row]] = {name: list(rows) for name, rows in tables.items()}
        self.fields = {name: list(rows[0]) if rows else [] for name, rows in tables.items()}  # calls may empty a table
        self.plots: list[str] = []

    def state(self) -> Json:
        """Everything a call can change. Case counts only in status, list and board names, as in the released reward."""
        rows = {
            name: [
                {key: value if key in CASE_MATTERS or value is None else value.lower() for key, value in row.items()}
                for row in self.tables[name]
            ]
            for name in CHANGEABLE
        }
        return {**rows, "plots": [plot.lower() for plot in self.plots]}

    def row(self, table: str, number: str) -> Row | None:
        """The row with this number."""
        key = FILES[table][1]
        return next((row for row in self.tables[table] if row[key] == number), None)

    def read(self, table: str, number: str, field: str) -> Json:
        """One field of a row."""
        row = self.row(table, number)
        if row is None:
            return f"{table.capitalize()} not found."
        return {field: row[field]} if field in row else "Field not found."

    def change(self, table: str, number: str, field: str, value: str) -> str:
        """Give one field another value; addresses are kept in lower case."""
        found = self.row(table, number)
        if found is None:
            return f"{table.capitalize()} not found."
        if field not in found:
            return "Field not valid."
        changed = {**found, field: value.lower() if field in EMAIL_FIELDS else value}
        self.tables[table] = [changed if row is found else row for row in self.tables[table]]
        return f"{table.capitalize()} updated successfully."

    def remove(self, table: str, number: str) -> str:
        """Delete a row."""
        found = self.row(table, number)
        if found is None:
            return f"{table.capitalize()} not found."
        self.tables[table] = [row for row in self.tables[table] if row is not found]
        return f"{table.capitalize()} deleted successfully."

    def number(self, table: str, width: int = 8) -> str:
        """The number of the next new row, filled with zeros to `width`."""
        key = FILES[table][1]
        return str(int(max((row[key] or "0" for row in self.tables[table]), default="0")) + 1).zfill(width)


def contains(row: Row, wanted: Mapping[str, str]) -> bool:
    """Whether every wanted text stands in its field, whatever the case."""
    return all(value.lower() in (row[key] or "").lower() for key, value in wanted.items() if value)


def parse_time(text: str | None) -> datetime | None:
    """A point in time, None for anything else."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def pages_of(name: str, found: list[Row], page: int, page_size: int) -> Json:
    """One page of a search with its totals; a page beyond the last is the last."""
    if not found:
        return f"No {name} found."
    total_pages = (len(found) + page_size - 1) // page_size
    page = max(1, min(page, total_pages))
    counts: dict[str, Json] = {f"total_{name}": len(found), "page": page, "page_size": page_size}
    counts["total_pages"] = total_pages
    shown: list[Json] = [dict(row) for row in found[(page - 1) * page_size : page * page_size]]
    return {name: shown, "pagination": counts}
