"""Where scalars go beside metrics.jsonl: TensorBoard always, Weights & Biases and MLflow when the cascade names them.

TensorBoard's own writer is used, not torch's: this package stays free of torch. The other two are imported when named.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_cascade.config.schema import TrackersConfig
from nemo_cascade.types import UserError


class Tracker(Protocol):
    """Takes the finite scalars of one step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the scalars of `step`."""

    def close(self) -> None:
        """Flush and end the run."""


class TensorBoard:
    """Event files in `folder`. Steps from `start` on that an earlier, killed run wrote are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        self.writer = EventFileWriter(str(folder), flush_secs=10)
        if start:
            # TensorBoard drops points at or after this step when it reads the session's start.
            session = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=start, session_log=session))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event with all scalars of the step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is queued and close the file."""
        self.writer.flush()
        self.writer.close()


class WeightsAndBiases:
    """One run per stage folder; a resumed stage continues its run (the id is a hash of the folder's name)."""

    def __init__(self, folder: Path, stage: str, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            remedy = "pip install wandb, or remove the key"
            raise UserError(f"trackers.wandb_project: wandb is not installed; {remedy}") from error
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(project=project, name=stage, id=identity, dir=str(folder), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars at wandb's own step counter."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait for the upload."""
        self.run.finish()


class Mlflow:
    """One run per stage folder; its id is kept beside the metrics so that a resumed stage continues it."""

    def __init__(self, folder: Path, stage: str, uri: str) -> None:
        try:
            import mlflow
        except ImportError as error:
            remedy = "pip install mlflow-skinny, or remove the key"
            raise UserError(f"trackers.mlflow_uri: mlflow is not installed; {remedy}") from error
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self.run_id = self._find_run(folder, stage)
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"trackers.mlflow_uri: {uri}: {str(error).splitlines()[0]}") from error
        self.metric_type = mlflow.entities.Metric

    def _find_run(self, folder: Path, stage: str) -> str:
        """The run that this stage folder already has, or a new one."""
        memory = folder / "mlflow_run.json"
        if memory.exists():
            return str(json.loads(memory.read_text())["run_id"])
        experiment = self.client.get_experiment_by_name("nemo_cascade")
        known = experiment.experiment_id if experiment else self.client.create_experiment("nemo_cascade")
        run_id: str = self.client.create_run(known, run_name=stage).info.run_id
        memory.write_text(json.dumps({"run_id": run_id}))
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One batch per step: one request whatever the number of scalars."""
        now = int(time.time() * 1000)
        batch = [self.metric_type(name, value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.run_id, metrics=batch)

    def close(self) -> None:
        """Mark the run finished."""
        self.client.set_terminated(self.run_id)


def open_trackers(folder: Path, stage: str, start: int, config: TrackersConfig) -> list[Tracker]:
    """TensorBoard in `folder`/tensorboard and the trackers the config names."""
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", start)]
    if config.wandb_project:
        trackers.append(WeightsAndBiases(folder, stage, config.wandb_project))
    if config.mlflow_uri:
        trackers.append(Mlflow(folder, stage, config.mlflow_uri))
    return trackers
