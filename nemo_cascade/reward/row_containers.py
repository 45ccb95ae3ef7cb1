"""Where the repositories of `swerl_gen` rows run: a clone in bubblewrap, or the row's image in a container engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from nemo_cascade.reward import row_scripts
from nemo_cascade.reward.runtimes import ENGINES, NAMES, Choice, Container, ContainerLost, Machine, Place, Runtime
from nemo_cascade.reward.swe import instance
from nemo_cascade.reward.swe.checkout import checkout, folder_of
from nemo_cascade.types import Invalid, Json, Outcome, UserError

RUNTIMES = NAMES
"""Choices of `runtime` beside `none` and `auto`."""
GIT_S = 120.0


class Runtimes(Protocol):
    """Whoever keeps the runtimes of a stage: `Services`."""

    def runtime(self, name: str, machine: Machine, packages: str = "") -> Runtime:
        """The runtime of that name, one for all who ask for the same."""


class RowContainers:
    """Containers for rows by the options `runtime`, `repositories`, `images`, `packages`, limits; thread-safe.

    `auto`: bubblewrap for a row whose repository lies in `repositories`, else the first container engine that works.
    """

    def __init__(self, options: Mapping[str, Json], runtimes: Runtimes) -> None:
        self._options, self._runtimes = options, runtimes
        self._seconds = float(options["tests_timeout_s"])
        self._machine = Machine(
            int(options["memory_mb"]), float(options["cpus"]), start_seconds=float(options["start_timeout_s"])
        )
        for key in ("tests_timeout_s", "start_timeout_s", "memory_mb", "cpus"):
            if float(options[key]) <= 0:
                raise UserError(f"data.options.swe_agentless.{key}: {options[key]} is not above 0")
        self._choice = Choice(str(options["runtime"]), self._machine)
        self._found: dict[bool, str] = {}  # for rows with a clone or without: why none can be used, "" when one can

    @property
    def deadline_s(self) -> float:
        """The longest that one verdict takes: the tests, the control run, what may come between, and git."""
        return 3 * (self._machine.start_seconds + self._seconds + GIT_S)

    def missing(self, truth: Mapping[str, Json]) -> str:
        """Why a row cannot run here, with the remedy; "" when it can."""
        chosen = str(self._options["runtime"])
        own = "this row's repository lives in a container image"
        if chosen == "none":
            return (
                f"{own}, which cannot run here: set data.options.swe_agentless.runtime (docker, podman, apptainer, or "
                "bubblewrap with clones in repositories), or let without_image: judge or similarity score its patches"
            )
        has_clone = self._folder(truth) is not None
        if chosen == "bubblewrap" and not has_clone:
            return (
                f"{own}, which bubblewrap cannot start: put a clone into the folder of data.options.swe_agentless."
                f"repositories, or set runtime to one of {', '.join(ENGINES)}"
            )
        if has_clone not in self._found:
            try:
                self._runtime(has_clone).check()
                self._found[has_clone] = ""
            except UserError as error:
                self._found[has_clone] = f"{own}, and {error}"
        return self._found[has_clone]

    def grade_repair(
        self, truth: Mapping[str, Json], files: Mapping[str, str], patched: Mapping[str, str]
    ) -> Outcome:
        """The verdict of the row's tests on a patch; Invalid where they could not be asked."""
        return self._graded(truth, lambda start: row_scripts.grade_repair(start, truth, files, patched, self._seconds))

    def grade_reproduction(self, truth: Mapping[str, Json], content: str) -> Outcome:
        """The verdict on a script that shows the fault."""
        return self._graded(truth, lambda start: row_scripts.grade_reproduction(start, truth, content, self._seconds))

    def _graded(self, truth: Mapping[str, Json], grade: Callable[[row_scripts.Start], Outcome]) -> Outcome:
        try:
            return grade(lambda: self._start(truth))
        except (ContainerLost, UserError, ValueError) as error:
            return Invalid(f"{truth['instance_id']}: {error}")

    def _folder(self, truth: Mapping[str, Json]) -> Path | None:
        return folder_of(truth, str(self._options["repositories"]))

    def _runtime(self, has_clone: bool) -> Runtime:
        return self._runtimes.runtime(self._choice.of(has_clone), self._machine, str(self._options["packages"]))

    def _start(self, truth: Mapping[str, Json]) -> Container:
        folder = self._folder(truth)
        files = checkout(folder, str(truth["base_commit"])) if folder is not None else None
        runtime = self._runtime(files is not None)
        image = "" if runtime.name == "bubblewrap" else self.image_of(truth, runtime.name == "apptainer")
        return runtime.start(Place(image, files))

    def image_of(self, truth: Mapping[str, Json], sif: bool) -> str:
        """The row's image: a SIF file of its name in `images` or where the row says, else its name in a registry."""
        given = str(truth.get("image", ""))
        places = [Path(str(self._options["images"]), Path(given).name), Path(given)]
        found = next((str(place) for place in places if sif and place.suffix == ".sif" and os.path.isfile(place)), "")
        return found or (given if given and not given.endswith(".sif") else instance.image_of(truth))
