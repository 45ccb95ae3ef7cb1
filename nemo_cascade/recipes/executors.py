"""NeMo-Run executors from conf/executor/*.yaml: one file per place, strict like every other file."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from nemo_cascade.config.bounds import at_least, choose
from nemo_cascade.config.load import find
from nemo_cascade.config.schema import HardwareConfig
from nemo_cascade.config.strict import build, read_yaml, show
from nemo_cascade.types import UserError

if TYPE_CHECKING:
    import nemo_run

RUN_DIRECTORY = "/nemo_run"


@dataclass
class ExecutorConfig:
    """One place to run. How many nodes and ranks is the hardware file's matter, not this one's."""

    kind: str = "local"  # local | docker | slurm
    python: Optional[str] = None  # None: this interpreter; python3 inside a container
    folder: Optional[str] = None  # where jobs run, the same path on every node; None: the working folder
    env: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    jobs: int = (
        1  # jobs in a row per stage: each goes on from the last checkpoint where a time limit ended the one before
    )
    container_image: Optional[str] = None
    container_mounts: list[str] = field(default_factory=list)  # host:container; `folder` is mounted anyway
    gpus_per_node: Optional[int] = None
    shm_size: Optional[str] = None  # docker
    account: str = ""  # slurm, and what follows
    partition: Optional[str] = None
    time: str = "04:00:00"
    qos: Optional[str] = None
    mem: Optional[str] = None
    cpus_per_task: Optional[int] = None
    exclusive: bool = False
    setup_lines: Optional[str] = None  # shell lines before the job, such as `module load`
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other sbatch flag
    login_host: Optional[str] = None  # None: sbatch is on this machine
    login_user: Optional[str] = None

    def __post_init__(self) -> None:
        choose("kind", self.kind, ("local", "docker", "slurm"))
        at_least("jobs", self.jobs, 1)
        if self.kind == "docker" and not self.container_image:
            raise UserError("container_image is missing; docker runs stages inside an image")
        if self.kind == "slurm" and not self.account:
            raise UserError("account is missing; Slurm needs the account that pays")

    @property
    def interpreter(self) -> str:
        """The Python that runs a stage."""
        return self.python or ("python3" if self.container_image else sys.executable)

    def work_folder(self) -> Path:
        """Where jobs start; relative paths of the cascade are below it."""
        return Path(self.folder) if self.folder else Path.cwd()


def load_executor(path_or_name: str) -> ExecutorConfig:
    """Read `conf/executor/NAME.yaml` or a path."""
    path = find(path_or_name, "executor", Path.cwd())
    return build(ExecutorConfig, read_yaml(path), show(path))


def build_executor(config: ExecutorConfig, hardware: HardwareConfig, name: str) -> nemo_run.Executor:
    """The NeMo-Run executor of one stage."""
    builders = {"local": local, "docker": docker, "slurm": slurm}
    return builders[config.kind](config, hardware, name)


def local(config: ExecutorConfig, hardware: HardwareConfig, name: str) -> nemo_run.Executor:
    """A process on this machine; the stage starts its own ranks."""
    import nemo_run

    refuse_nodes(hardware, "local")
    return nemo_run.LocalExecutor(env_vars=dict(config.env), retries=config.retries)


def docker(config: ExecutorConfig, hardware: HardwareConfig, name: str) -> nemo_run.Executor:
    """A container on this machine, the work folder mounted under the same path; the stage starts its own ranks."""
    import nemo_run

    refuse_nodes(hardware, "docker")
    folder = config.work_folder()
    return nemo_run.DockerExecutor(
        container_image=str(config.container_image),
        num_gpus=config.gpus_per_node,
        shm_size=config.shm_size,
        volumes=[f"{folder}:{folder}", *config.container_mounts],
        env_vars=dict(config.env),
        retries=config.retries,
        packager=nemo_run.Packager(),
    )


def slurm(config: ExecutorConfig, hardware: HardwareConfig, name: str) -> nemo_run.Executor:
    """One sbatch job per stage. On several nodes every rank is a task; on one node the stage starts its own ranks.

    A job whose parent failed is cancelled, not left waiting for ever (`kill-on-invalid-dep`).
    """
    import nemo_run

    folder = config.work_folder()
    for path in (str(folder), os.environ.get("NEMORUN_HOME", "")):
        if RUN_DIRECTORY in path:
            # NeMo-Run replaces this text anywhere in a script by the job's folder when there is no container.
            raise UserError(f"{path}: NeMo-Run rewrites paths that contain {RUN_DIRECTORY!r}; use another folder")
    several = hardware.nodes > 1
    mounts = [f"{folder}:{folder}", *config.container_mounts] if config.container_image else []
    optional = {"partition": config.partition, "qos": config.qos, "mem": config.mem, "setup_lines": config.setup_lines}
    return nemo_run.SlurmExecutor(
        account=config.account,
        **{key: value for key, value in optional.items() if value is not None},
        time=config.time,
        nodes=hardware.nodes,
        ntasks_per_node=hardware.ranks_per_node if several else 1,
        cpus_per_task=config.cpus_per_task,
        gpus_per_node=config.gpus_per_node,
        exclusive=config.exclusive or None,
        container_image=config.container_image,
        container_mounts=mounts,
        job_name_prefix=f"{name}.",
        env_vars=dict(config.env),
        retries=config.retries,
        additional_parameters={"kill-on-invalid-dep": "yes", **config.sbatch},
        dependency_type="afterany" if config.jobs > 1 else "afterok",
        packager=nemo_run.Packager(),
        tunnel=tunnel(config),
        poll_estimated_start_time=False,
    )


def tunnel(config: ExecutorConfig) -> nemo_run.LocalTunnel | nemo_run.SSHTunnel:
    """sbatch here, or on a login node over ssh."""
    import nemo_run

    if config.login_host is None:
        return nemo_run.LocalTunnel(job_dir="")  # jobs start where NeMo-Run writes them: NEMORUN_HOME, on a shared disk
    if config.login_user is None:
        raise UserError("login_user is missing; it is needed with login_host")
    job_dir = str(config.work_folder() / ".nemo_run_jobs")
    return nemo_run.SSHTunnel(host=config.login_host, user=config.login_user, job_dir=job_dir)


def refuse_nodes(hardware: HardwareConfig, kind: str) -> None:
    """One machine is one machine."""
    if hardware.nodes > 1:
        raise UserError(
            f"executor {kind}: hardware {hardware.name} has {hardware.nodes} nodes; use an executor of kind slurm"
        )
