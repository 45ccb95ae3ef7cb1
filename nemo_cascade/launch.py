"""Runs ONE stage: `python -m nemo_cascade.launch STAGE_FOLDER`. The only place that picks backends.

The folder's config.yaml says everything. On one machine this process starts the Learner's ranks itself; under torchrun
or Slurm (RANK is set) it is a rank. A stage that was killed goes on from its newest checkpoint; a stage that is done
does nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cascade.cascade.artifacts import StageFolder, read_lines
from nemo_cascade.cascade.local_ranks import RENDEZVOUS, die_with_parent, start_ranks
from nemo_cascade.cascade.lock import locked
from nemo_cascade.config.paths import NO_ROOM, explain_os_error
from nemo_cascade.config.schema import JudgeConfig, MopdConfig, RolloutStage, SftConfig, StageBase, StageRun
from nemo_cascade.config.schema_data import JudgeAddress
from nemo_cascade.config.stage_run import read_stage_run
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.observe.quiet import quiet_libraries
from nemo_cascade.types import StageResult, UserError

if TYPE_CHECKING:
    from nemo_cascade.algorithms.kept import Distribution
    from nemo_cascade.data.chat import ChatTokenizer
    from nemo_cascade.learner.ranks import Place
    from nemo_cascade.protocols import Domain
    from nemo_cascade.reward.judge import Judge

LOG = logging.getLogger("nemo_cascade")
EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the stage of a folder; the exit status is 0 only when the stage is done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m nemo_cascade.launch STAGE_FOLDER\n")
        return EXIT_USER_ERROR
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    die_with_parent()
    try:
        folder = StageFolder(Path(arguments[0]))
        run = read_stage_run(folder.path)
        # read by Transformer Engine when it is imported, which the ranks do below
        os.environ.update(profile_of(run.hardware.precision).environment or {})
        if folder.is_done(run.key):
            return 0
        if "RANK" in os.environ:  # one of several ranks: whoever started them holds the lock
            run_stage(folder, run)
            return 0
        with locked(folder.lock):
            if run.hardware.world_size > 1:
                return start_ranks(folder.path, run.hardware)
            run_stage(folder, run)
    except UserError as error:
        return tell(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return tell(str(explain_os_error(error, Path(error.filename or folder.metrics))))
    return 0


def tell(problem: str) -> int:
    """Say a mistake in one line, even where standard error is a file on the full disk that the line is about."""
    with suppress(OSError):
        sys.stderr.write(f"error: {problem}\n")
    return EXIT_USER_ERROR


def run_stage(folder: StageFolder, run: StageRun) -> None:
    """Build the parts, run the loop, export, evaluate, and last of all write the done marker."""
    from nemo_cascade.data.chat import ChatTokenizer
    from nemo_cascade.learner import parallel, ranks
    from nemo_cascade.observe.record import timed

    started = time.monotonic()
    hardware = run.hardware
    rendezvous = os.environ.get(RENDEZVOUS)
    parallel.start(
        parallel.ParallelLayout.from_hardware(hardware), seed=run.seed,
        rendezvous=Path(rendezvous) if rendezvous else None, threads=hardware.threads_per_rank,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(parallel.stop)
        place = ranks.where()
        chat = ChatTokenizer(run.tokenizer)
        learner = build_learner(run, chat)
        stack.callback(learner.finish_saving)  # of a stage that fails, while the ranks' groups still stand
        domains = stack.enter_context(build_domains(run, place))
        earlier = seconds_before(folder)
        train(folder, run, place, learner, domains, chat)
        sha256 = learner.export(str(folder.hf))
        with timed(folder.path, "evaluation") if place.rank == 0 else nullcontext():
            evaluate(folder, run, place, learner, domains.measured, chat)
        seconds = earlier + time.monotonic() - started
        result = StageResult(run.stage, run.kind, run.key, "hf", sha256, run.config.num_steps, round(seconds, 1))
        ranks.gathered(True, everyone=True)  # every rank's part of the evaluation is on disk
        if place.rank == 0:
            folder.finish(result)
        ranks.gathered(True, everyone=True)


def seconds_before(folder: StageFolder) -> float:
    """Wall clock of the steps that earlier processes of a killed stage have finished."""
    resumed = folder.newest_checkpoint() or 0
    return sum(line.get("seconds/total", 0.0) for line in read_lines(folder.metrics) if line["step"] < resumed)


def build_learner(run: StageRun, chat: ChatTokenizer):
    """The policy from the folder the stage starts from, or from random weights."""
    from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
    from nemo_cascade.models.config import NemotronHConfig

    config = run.config
    settings = LearnerSettings(
        optimizer=config.optimizer, num_steps=config.num_steps, micro_batch_tokens=config.micro_batch_tokens,
        distribution=trained_distribution(config), hardware=run.hardware, tokenizer=chat.folder,
        precision_export=config.precision_export if isinstance(config, SftConfig) else "fp32",
    )  # fmt: skip
    return MegatronLearner(NemotronHConfig(**run.model), settings, run.init_folder, seed=run.seed)


def trained_distribution(config: StageBase) -> Distribution:
    """Whose log-probabilities the Learner computes: those of the distribution that sampled, unless the stage says `raw`
    (or trains without sampling).
    """
    from nemo_cascade.algorithms.kept import RAW, Distribution

    if not isinstance(config, RolloutStage) or config.sampling.logprobs == "raw":
        return RAW
    return Distribution(config.sampling.temperature, config.sampling.top_p, config.sampling.top_k)


def build_sampler(run: StageRun):
    """The Sampler that the hardware file names."""
    from nemo_cascade.models.config import NemotronHConfig

    hardware = run.hardware
    if hardware.sampler == "local":
        from nemo_cascade.rollout.local import LocalSampler

        return LocalSampler(NemotronHConfig(**run.model))
    if hardware.sampler == "remote":
        from nemo_cascade.rollout.remote import RemoteSampler

        if hardware.sampler_url is None:
            raise UserError(f"hardware {hardware.name}: sampler remote needs sampler_url, a running server's address")
        return RemoteSampler(hardware.sampler_url)
    from nemo_cascade.rollout.trtllm import TrtLlmSampler

    return TrtLlmSampler(run.model)


def build_refit(run: StageRun, folder: StageFolder):
    """How weights reach the Sampler."""
    if run.hardware.refit == "memory":
        from nemo_cascade.refit.memory import MemoryRefit

        return MemoryRefit()
    from nemo_cascade.refit.files import FileRefit

    return FileRefit(folder.path / "refit")


@dataclass(frozen=True)
class StageDomains:
    """What a stage trains on and what it is measured on; the latter has the options of `evaluation`, alike for all.

    `take_counts`: metrics that the services counted since the last call.
    """

    trained: Mapping[str, Domain]
    measured: Mapping[str, Domain]
    take_counts: Callable[[], Mapping[str, float]] = dict


@contextmanager
def build_domains(run: StageRun, place: Place) -> Iterator[StageDomains]:
    """The domains with the services they share; services end with the stage."""
    from nemo_cascade.cascade import judges
    from nemo_cascade.domains import Services, load
    from nemo_cascade.reward.preference_judge import PreferenceJudge

    judges.check_judges(run.config, f"stage {run.stage}")  # of a folder that no check has seen
    with ExitStack() as stack:
        judged = ["preference"] if run.config.data.judge_share else []
        trained, measure = [*run.config.data.domains, *judged], run.config.evaluation
        services = Services()
        stack.callback(services.close)
        asked = [*judges.asked_in_training(run.config), *judges.asked_in_evaluation(measure)]
        for key, config in judges.configured(run.config, asked).items():
            judge = stack.enter_context(open_judge(config, place))
            if isinstance(config, JudgeConfig):
                services.preference_judge = PreferenceJudge(judge, config)
            elif key == judges.EQUIVALENCE:
                services.equivalence_judge = judge
            else:
                assert key == judges.REPAIR
                services.repair_judge = judge
        training = {name: load(name, services, run.config.data.options.get(name)) for name in trained}
        measured = {name: load(name, services, measure.options.get(name)) for name in measure.domains}
        yield StageDomains(by_both_names(training), by_both_names(measured), services.take_counts)


def by_both_names(domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Domains under the name in the stage file and under their own; they differ for one named by its path."""
    return {domain.name: domain for domain in domains.values()} | dict(domains)


@contextmanager
def open_judge(config: JudgeAddress, place: Place) -> Iterator[Judge]:
    """A judge behind its address; a checkpoint named by `serve` is served by the first rank while the stage runs."""
    from nemo_cascade.config.paths import hf_folder
    from nemo_cascade.learner import ranks
    from nemo_cascade.reward.judge import judge_at

    with ExitStack() as stack:
        url = config.url
        if config.serve is not None:
            if place.rank == 0:
                from nemo_cascade.rollout.server import start_server

                server = start_server(hf_folder(config.serve))
                stack.callback(server.close)
                url = f"{server.url}/v1"
            url = ranks.gathered(url, everyone=True)[0]
        assert url is not None, "only judges that have a checkpoint or an address are opened"
        judge = judge_at(url, config)
        stack.callback(judge.close)
        yield judge


def train(
    folder: StageFolder,
    run: StageRun,
    place: Place,
    learner,
    domains: StageDomains,
    chat: ChatTokenizer,
) -> None:
    """The loop of the stage's kind, with everything it needs."""
    from nemo_cascade.learner import ranks
    from nemo_cascade.observe.record import Ranks, RunRecord
    from nemo_cascade.stages.checkpoints import Checkpoints

    config = run.config
    own = Ranks(place.rank, place.replica if place.leads else None, lambda value: ranks.gathered(value, everyone=True))
    record = RunRecord(folder.path, run.stage, config.num_steps, run.trackers, own)
    checkpoints = Checkpoints(
        folder.checkpoints, folder.path / "weights", config.save_every, frozenset(config.keep_steps), config.num_steps,
        first_rank=place.rank == 0,
    )  # fmt: skip
    if isinstance(config, SftConfig):
        from nemo_cascade.data.conversations import conversation_stream
        from nemo_cascade.stages import sft

        conversations = conversation_stream(config, domains.trained, chat, run.seed, place.replica, place.replicas)
        sft.train(config, conversations, learner, record, checkpoints)
    else:
        record.service_counts = domains.take_counts
        train_on_rollouts(folder, run, place, learner, domains.trained, chat, record, checkpoints)


def train_on_rollouts(  # noqa: PLR0913 - what train has built
    folder: StageFolder,
    run: StageRun,
    place: Place,
    learner,
    domains,
    chat: ChatTokenizer,
    record,
    checkpoints,
) -> None:
    """Build the task stream, the sampler and the refit, and run grpo or mopd. Recorded rollouts need neither of the
    latter.
    """
    from nemo_cascade.data.tasks import PromptLimit, least_tokens, task_stream
    from nemo_cascade.learner import ranks
    from nemo_cascade.observe.first_step import FirstStep
    from nemo_cascade.refit.nowhere import NoRefit
    from nemo_cascade.rollout.collect import Collector
    from nemo_cascade.rollout.source import RecordedRollouts, SampledRollouts
    from nemo_cascade.stages import grpo, mopd

    config = run.config
    limit = PromptLimit(chat.prompt_ids, config.sampling.max_prompt_tokens, least_tokens(domains))
    record.task_counts = limit.metrics
    record.first_step = FirstStep.of(config, run.hardware)
    record.rollouts_every = 1 if config.mode == "sample_only" else config.record_every
    replays = config.routing_replay == "sampler"
    tasks = task_stream(config.data, domains, run.seed, limit, place.replica, place.replicas)
    with ExitStack() as stack:
        if config.mode == "train_only":
            sampler, refit = None, NoRefit()
            source = RecordedRollouts(Path(config.rollouts), place.replica, place.replicas, replays)
        else:
            sampler, refit = build_sampler(run), build_refit(run, folder)
            stack.callback(sampler.close)
            collector = None
            if place.leads:
                collector = Collector(
                    domains, sampler, chat, config.sampling, config.filters, run.hardware.reward_workers
                )
                collector.timer, collector.routed_experts = record.timer, replays
                stack.callback(collector.close)
            share = None if place.replicas == run.hardware.world_size else ranks.share_in_replica
            source = SampledRollouts(
                collector, config.prompts_per_step // place.replicas, config.group_size, run.seed, share
            )
        if isinstance(config, MopdConfig):
            teachers = {domains[name].name: folder for name, folder in run.teacher_folders.items()}
            names = {domains[name].name: stage for name, stage in run.teacher_stages.items()}
            weights = {domains[name].name: weight for name, weight in config.distill.domain_weights.items()}
            config.distill = replace(config.distill, domain_weights=weights)  # by their own names, as everywhere below
            for teacher in teachers.values():
                chat.refuse_other_tokens(teacher)
            mopd.train(config, tasks, source, learner, sampler, refit, record, checkpoints, teachers, names)
        else:
            reference = run.init_folder if config.loss.kl > 0.0 else None
            grpo.train(config, tasks, source, learner, sampler, refit, record, checkpoints, reference)
    for line in limit.said():
        LOG.info("%s: %s", run.stage, line)


def evaluate(
    folder: StageFolder,
    run: StageRun,
    place: Place,
    learner,
    domains,
    chat: ChatTokenizer,
) -> None:
    """Score the final checkpoint, those at `evaluation.steps`, and weights no stage made, if that is not done yet."""
    from nemo_cascade.evaluation.benchmark import Benchmark
    from nemo_cascade.learner import ranks

    config = run.config.evaluation
    if config.select + config.report == 0:
        return
    sampler, refit = build_sampler(run), build_refit(run, folder)
    with ExitStack() as stack:
        stack.callback(sampler.close)
        benchmark = stack.enter_context(Benchmark(config, domains, sampler, chat, run.hardware.reward_workers))
        labels: dict[str, str | None] = {"final": None}
        labels |= {f"step_{step:06d}": str(folder.weights(step)) for step in config.steps}
        if run.init_folder is not None and folder.path.parent.resolve() not in Path(run.init_folder).resolve().parents:
            labels["init"] = run.init_folder  # no stage of this cascade made these weights, so none has scored them
        for label, weights in labels.items():
            path = folder.evaluation(label)
            if ranks.gathered(path.exists(), everyone=True)[0]:
                continue
            with learner.using(weights) if weights is not None else nullcontext():
                refit.refit(learner, sampler, version=0)
            scores = benchmark.run(place.replica, place.replicas) if place.leads else []
            everyone = ranks.gathered(scores, everyone=True)
            if place.rank == 0:
                benchmark.write(path, [row for part in everyone for row in part])


if __name__ == "__main__":
    sys.exit(main())
