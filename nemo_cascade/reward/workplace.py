"""The 27 tools of released workplace-assistant rows: email, calendar, visits, project tasks, customers.

Names, arguments, defaults, texts and the order of rows follow NeMo-Gym's workplace_assistant server, so that the state
after a row's reference calls is the state that its reward compares with. Searches match substrings (the server: regular
expressions); they never change state.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from datetime import datetime

from nemo_cascade.reward.workplace_tables import Row, Tables, contains, pages_of, parse_time
from nemo_cascade.types import Json

NOW = "2023-11-30 23:59:00"
LISTS = ("Backlog", "In Progress", "In Review", "Completed")
BOARDS = ("Back end", "Front end", "Design")
STATUSES = ("Qualified", "Won", "Lost", "Lead", "Proposal")
PRODUCTS = ("Software", "Hardware", "Services", "Consulting", "Training")
EVENT_FIELDS = ("event_name", "participant_email", "event_start", "duration")
SOURCES = ("visits_direct", "visits_referral", "visits_search_engine", "visits_social_media")
VALUES = ("total_visits", "session_duration_seconds", "user_engaged", *SOURCES)
PLOTS = ("bar", "line", "scatter", "histogram")


class Workplace(Tables):
    """The tools over one rollout's tables; each method below `call` is the tool of its name."""

    def call(self, name: str, arguments: Mapping[str, Json]) -> str:
        """The tool's answer as the server's JSON body; wrong names and arguments are answered with an error."""
        tool = TOOLS.get(name)
        if tool is None:
            return _body(f"Error executing tool '{name}': no such tool")
        given = {key: value for key, value in arguments.items() if value is not None}
        try:
            inspect.signature(tool).bind(self, **given)
            texts = {key: _argument(key, value) for key, value in given.items()}
            return _body(tool(self, **texts))
        except (TypeError, ValueError) as error:  # also a time zone where there must be none, or a number that is none
            return _body(f"Error executing tool '{name}': {error}")

    def company_directory_find_email_address(self, name: str = "") -> Json:
        return [person for person in self.people if name.lower() in person] if name else "Name not provided."

    def email_get_email_information_by_id(self, email_id: str = "", field: str = "") -> Json:
        return self.read("email", email_id, field)

    def email_search_emails(
        self, query: str = "", date_min: str = "", date_max: str = "", page: int = 1, page_size: int = 5
    ) -> Json:
        words = query.lower().split()

        def matches(row: Row) -> bool:
            text = f"{row['subject']} {row['body']} {row['sender/recipient']}".lower()
            sent = (row["sent_datetime"] or "")[:10]
            return all(word in text for word in words) and (date_min or sent)[:10] <= sent <= (date_max or sent)[:10]

        found = sorted(filter(matches, self.tables["email"]), key=lambda row: row["sent_datetime"] or "", reverse=True)
        return pages_of("emails", found, page, page_size)

    def email_send_email(self, recipient: str = "", subject: str = "", body: str = "") -> Json:
        if not recipient or not subject or not body:
            return "Recipient, subject, or body not provided."
        if "@" not in recipient or "." not in recipient:
            return "Invalid recipient email address."
        values = (self.number("email", width=0), "outbox", recipient.lower(), subject, NOW, body)
        keys = ("email_id", "inbox/outbox", "sender/recipient", "subject", "sent_datetime", "body")
        self.tables["email"].append(dict(zip(keys, values, strict=True)))
        return "Email sent successfully."

    def email_delete_email(self, email_id: str = "") -> Json:
        return self.remove("email", email_id)

    def email_forward_email(self, email_id: str = "", recipient: str = "") -> Json:
        row = self.row("email", email_id)
        if row is None:
            return "Email not found."
        answer = self.email_send_email(recipient, f"FW: {row['subject']}", row["body"] or "")
        return "Email forwarded successfully." if answer == "Email sent successfully." else answer

    def email_reply_email(self, email_id: str = "", body: str = "") -> Json:
        row = self.row("email", email_id)
        if row is None:
            return "Email not found."
        answer = self.email_send_email(row["sender/recipient"] or "", f"RE: {row['subject']}", body)
        return "Email replied successfully." if answer == "Email sent successfully." else answer

    def calendar_get_event_information_by_id(self, event_id: str = "", field: str = "") -> Json:
        return self.read("event", event_id, field)

    def calendar_search_events(
        self, query: str = "", time_min: str = "", time_max: str = "", page: int = 1, page_size: int = 5
    ) -> Json:
        for name, value in (("time_min", time_min), ("time_max", time_max)):
            if value and parse_time(value) is None:
                return f"Invalid {name} format. Expected YYYY-MM-DD HH:MM:SS."
        low, high = parse_time(time_min) or datetime.min, parse_time(time_max) or datetime.max

        def matches(row: Row) -> bool:
            text = f"{row['event_name']} {row['participant_email']}".lower()
            return query.lower() in text and low <= (parse_time(row["event_start"]) or datetime.min) <= high

        found = sorted(filter(matches, self.tables["event"]), key=lambda row: row["event_start"] or "", reverse=True)
        return pages_of("events", found, page, page_size)

    def calendar_create_event(
        self, event_name: str = "", participant_email: str = "", event_start: str = "", duration: str = ""
    ) -> Json:
        values = (event_name, participant_email.lower(), event_start, duration)
        for field, value in zip(EVENT_FIELDS, values, strict=True):
            problem = _event_problem(field, value)
            if problem:
                return problem
        number = self.number("event")
        self.tables["event"].append({"event_id": number, **dict(zip(EVENT_FIELDS, values, strict=True))})
        return number

    def calendar_delete_event(self, event_id: str = "") -> Json:
        return self.remove("event", event_id)

    def calendar_update_event(self, event_id: str = "", field: str = "", new_value: str = "") -> Json:
        if field not in EVENT_FIELDS:
            return f"Invalid field. Available fields are: {', '.join(EVENT_FIELDS)}"
        return _event_problem(field, new_value) or self.change("event", event_id, field, new_value)

    def analytics_get_visitor_information_by_id(self, visitor_id: str = "") -> Json:
        return [dict(row) for row in self.tables["visit"] if row["visitor_id"] == visitor_id] or "Visitor not found."

    def analytics_create_plot(
        self, time_min: str = "", time_max: str = "", value_to_plot: str = "", plot_type: str = ""
    ) -> Json:
        if not time_min or not time_max:
            return "Start date not provided." if not time_min else "End date not provided."
        if value_to_plot not in VALUES:
            return f"Value to plot must be one of {', '.join(VALUES)}"
        if plot_type not in PLOTS:
            return f"Plot type must be one of {', '.join(PLOTS)}"
        self.plots.append(f"plots/{time_min}_{time_max}_{value_to_plot}_{plot_type}.png")
        return self.plots[-1]

    def _days(self, time_min: str, time_max: str) -> dict[str, list[Row]]:
        days: dict[str, list[Row]] = {}
        for row in sorted(self.tables["visit"], key=lambda row: row["date_of_visit"] or ""):
            day = row["date_of_visit"] or ""
            if (time_min or day) <= day <= (time_max or day):
                days.setdefault(day, []).append(row)
        return days

    def analytics_total_visits_count(self, time_min: str = "", time_max: str = "") -> Json:
        return {day: len(rows) for day, rows in self._days(time_min, time_max).items()}

    def analytics_engaged_users_count(self, time_min: str = "", time_max: str = "") -> Json:
        days = self._days(time_min, time_max)
        return {day: sum(row["user_engaged"] == "True" for row in rows) for day, rows in days.items()}

    def analytics_traffic_source_count(self, time_min: str = "", time_max: str = "", traffic_source: str = "") -> Json:
        days = self._days(time_min, time_max)
        return {day: sum(traffic_source in ("", row["traffic_source"]) for row in rows) for day, rows in days.items()}

    def analytics_get_average_session_duration(self, time_min: str = "", time_max: str = "") -> Json:
        days = self._days(time_min, time_max)
        return {
            day: sum(float(row["session_duration_seconds"] or 0) for row in rows) / len(rows)
            for day, rows in days.items()
        }

    def project_management_get_task_information_by_id(self, task_id: str = "", field: str = "") -> Json:
        return self.read("task", task_id, field)

    def project_management_search_tasks(
        self, task_name: str = "", assigned_to_email: str = "", list_name: str = "", due_date: str = "", board: str = ""
    ) -> Json:
        wanted = {"task_name": task_name, "list_name": list_name, "due_date": due_date, "board": board}
        if not assigned_to_email and not any(wanted.values()):
            return "No search parameters provided."
        person = assigned_to_email.lower()
        return [
            dict(row)
            for row in self.tables["task"]
            if contains(row, wanted) and person in ("", (row["assigned_to_email"] or "").lower())
        ]

    def project_management_create_task(
        self, task_name: str = "", assigned_to_email: str = "", list_name: str = "", due_date: str = "", board: str = ""
    ) -> Json:
        if not all((task_name, assigned_to_email, list_name, due_date, board)):
            return "Missing task details."
        values = {"assigned_to_email": assigned_to_email.lower(), "list_name": list_name, "board": board}
        for field, value in values.items():
            problem = self._task_problem(field, value)
            if problem:
                return problem
        number = self.number("task")
        self.tables["task"].append({"task_id": number, "task_name": task_name, **values, "due_date": due_date})
        return number

    def _task_problem(self, field: str, value: str) -> str:
        if field == "assigned_to_email" and all(row[field] != value.lower() for row in self.tables["task"]):
            return "Assignee email not valid. Please choose from the list of team members."
        if field == "list_name" and value not in LISTS:
            return f"List not valid. Please choose from: {_quoted(LISTS)}."
        if field == "board" and value not in BOARDS:
            return f"Board not valid. Please choose from: {_quoted(BOARDS)}."
        return ""

    def project_management_delete_task(self, task_id: str = "") -> Json:
        return self.remove("task", task_id)

    def project_management_update_task(self, task_id: str = "", field: str = "", new_value: str = "") -> Json:
        if not task_id or not field or not new_value:
            return "Task ID, field, or new value not provided."
        return self._task_problem(field, new_value) or self.change("task", task_id, field, new_value)

    def customer_relationship_manager_search_customers(self, page: int = 1, page_size: int = 5, **wanted: str) -> Json:
        bounds = ("last_contact_date_min", "last_contact_date_max", "follow_up_by_min", "follow_up_by_max")
        texts = ("customer_name", "customer_email", "product_interest", "status", "assigned_to_email")
        unknown = sorted(set(wanted) - set(bounds) - set(texts))
        if unknown:
            return f"Error: unexpected argument '{unknown[0]}'"
        if not any(wanted.values()):
            return "No search parameters provided. Please provide at least one parameter."

        def matches(row: Row) -> bool:
            return contains(row, {key: wanted.get(key, "") for key in texts}) and all(
                (row[key[:-4]] or "") >= value if key.endswith("min") else (row[key[:-4]] or "~") <= value
                for key, value in wanted.items()
                if key in bounds and value
            )

        return pages_of("customers", list(filter(matches, self.tables["customer"])), page, page_size)

    def customer_relationship_manager_update_customer(
        self, customer_id: str = "", field: str = "", new_value: str = ""
    ) -> Json:
        if not customer_id or not field or not new_value:
            return "Customer ID, field, or new value not provided."
        if field == "status" and new_value not in STATUSES:
            return f"Status not valid. Please choose from: {_quoted(STATUSES)}"
        if field == "product_interest" and new_value not in PRODUCTS:
            return f"Product interest not valid. Please choose from: {_quoted(PRODUCTS)}"
        return self.change("customer", customer_id, field, new_value)

    def customer_relationship_manager_add_customer(
        self, customer_name: str = "", assigned_to_email: str = "", status: str = "", **others: str
    ) -> Json:
        if not all((customer_name, assigned_to_email, status)):
            return "Please provide all required fields: customer_name, assigned_to_email, status."
        keys = self.fields["customer"]
        unknown = sorted(set(others) - set(keys))
        if unknown:
            return f"Error: unexpected argument '{unknown[0]}'"
        row: Row = {key: others.get(key) or None for key in keys}
        row["notes"] = others.get("notes", "")
        row["customer_email"] = (others.get("customer_email") or "").lower() or None
        row |= {"customer_name": customer_name, "assigned_to_email": assigned_to_email.lower(), "status": status}
        row["customer_id"] = self.number("customer")
        self.tables["customer"].append(row)
        return row["customer_id"]

    def customer_relationship_manager_delete_customer(self, customer_id: str = "") -> Json:
        return self.remove("customer", customer_id)


PREFIXES = ("company_directory_", "email_", "calendar_", "analytics_", "project_management_", "customer_relationship_")
TOOLS: dict[str, Callable[..., Json]] = {
    name: function for name, function in vars(Workplace).items() if name.startswith(PREFIXES)
}


def _body(output: Json) -> str:
    return json.dumps({"output": output}, separators=(",", ":"))


def _quoted(words: tuple[str, ...]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _argument(key: str, value: Json) -> str | int:
    if key not in ("page", "page_size"):
        return str(value)
    if isinstance(value, (int, str)) and str(value).isdigit() and int(value) > 0:
        return int(value)
    raise ValueError(f"{key} must be a positive integer")


def _event_problem(field: str, value: str) -> str:
    if not value:
        return f"{field} not provided."
    if field == "event_start" and parse_time(value) is None:
        return "Invalid event_start format. Expected YYYY-MM-DD HH:MM:SS."
    if field == "duration" and not (value.isdecimal() and int(value) > 0):
        return "Duration must be a positive number of minutes."
    return ""
