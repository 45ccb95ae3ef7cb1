"""What can be known to be wrong before anything runs. Each check raises one line that names file, key and remedy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_cascade import domains
from nemo_cascade.cascade.data_checks import check_evaluation_tables, check_training_tables
from nemo_cascade.cascade.graph import Graph, Source
from nemo_cascade.cascade.judges import KEYS, check_judges, without_their_keys
from nemo_cascade.config.load import Loaded
from nemo_cascade.config.paths import hf_folder, tokenizer_folder
from nemo_cascade.config.schema import HardwareConfig, MopdConfig, RolloutStage, SftConfig, StageBase
from nemo_cascade.config.strict import nearest, show
from nemo_cascade.models import layout_rules
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import profile_of
from nemo_cascade.observe.rollouts import recorded_steps
from nemo_cascade.reward.bubblewrap import INSTALL
from nemo_cascade.reward.runtimes import INSTALL as ENGINE_INSTALL
from nemo_cascade.rollout import trtllm
from nemo_cascade.types import NO_CHOICE, UserError

SANDBOXED = ("code", "swe_agentless", "swe_agentic")
"""Domains whose reward runs what the model wrote."""
CONTAINED = ("swe_agentless", "swe_agentic")
"""Domains whose rows may run in containers of an engine."""


def check_hardware(hardware: HardwareConfig, model: NemotronHConfig, origin: str) -> None:
    """The parallel layout divides the ranks and the model."""
    sizes = {
        "nodes": hardware.nodes,
        "ranks_per_node": hardware.ranks_per_node,
        "threads_per_rank": hardware.threads_per_rank,
        "tensor_parallel": hardware.tensor_parallel,
        "pipeline_parallel": hardware.pipeline_parallel,
        "context_parallel": hardware.context_parallel,
        "expert_parallel": hardware.expert_parallel,
    }
    for key, value in sizes.items():
        if value < 1:
            raise UserError(f"{origin}: key {key!r}: {value} is below 1")
    ranks = hardware.world_size
    layout = hardware.tensor_parallel * hardware.pipeline_parallel * hardware.context_parallel
    if ranks % layout:
        raise UserError(
            f"{origin}: {ranks} ranks are not a multiple of tensor x pipeline x context parallel = {layout}"
        )
    if (ranks // hardware.pipeline_parallel) % hardware.expert_parallel:
        raise UserError(
            f"{origin}: key 'expert_parallel': {hardware.expert_parallel} does not divide the "
            f"{ranks // hardware.pipeline_parallel} ranks of a pipeline stage"
        )
    cut = layout_rules.Cut(
        hardware.tensor_parallel, hardware.pipeline_parallel, hardware.context_parallel, hardware.expert_parallel,
        hardware.moe_dispatcher,
    )  # fmt: skip
    for key, reason in layout_rules.problems(model, cut):
        raise UserError(f"{origin}: key {key!r}: {reason}")
    if hardware.context_parallel > 1 and hardware.layer_spec != "local":
        raise UserError(
            f"{origin}: key 'context_parallel': {hardware.context_parallel} needs layer_spec local; Transformer "
            "Engine's attention cuts packed rows in another way"
        )
    profile = profile_of(hardware.precision)
    if profile.needs_te and hardware.layer_spec != "te":
        raise UserError(f"{origin}: key 'precision': {hardware.precision} needs layer_spec te (Transformer Engine)")
    if profile.emulated and hardware.layer_spec != "local":
        raise UserError(f"{origin}: key 'precision': {hardware.precision} needs layer_spec local")
    if problem := layout_rules.fp8_problem(model, hardware.tensor_parallel, hardware.precision):
        raise UserError(f"{origin}: key 'precision': {problem}")
    if hardware.layer_spec == "te" and hardware.precision == "fp32":
        raise UserError(f"{origin}: key 'layer_spec': te (Transformer Engine) has no fp32 attention for packed rows")
    if hardware.sampler != "local" and not hardware.sampler_url and hardware.sampler == "remote":
        raise UserError(f"{origin}: key 'sampler_url' is missing; sampler remote needs the address of a service")


def exemptions(hardware: HardwareConfig, model: NemotronHConfig) -> Iterator[str]:
    """The layers that stay bf16 under an FP8 precision, one line each with the reason.

    Its emulation rounds them, too; then the lines say where it shows more than the GPU would do.
    """
    profile = profile_of(hardware.precision)
    real = hardware.precision.removesuffix("_emulated")
    for module, reason in layout_rules.fp8_exempt(model, hardware.tensor_parallel, real).items():
        if profile.emulated:
            yield f"{hardware.precision}: {module} is rounded, {real} leaves it bf16: {reason}"
        else:
            yield f"{hardware.precision}: {module} stays bf16: {reason}"


def check_stage(name: str, loaded: Loaded, model: NemotronHConfig) -> None:
    """Mixture, lengths, batch and saved steps of one stage."""
    stage, origin = loaded.stages[name], show(loaded.files[name])
    _check_mixture(stage, origin)
    for step in stage.keep_steps:
        if not 1 <= step <= stage.num_steps:
            raise UserError(f"{origin}: key 'keep_steps': {step} is outside 1..{stage.num_steps}")
    replicas, longest = loaded.hardware.data_parallel, model.max_position_embeddings
    if isinstance(stage, SftConfig):
        if stage.max_sequence_tokens > min(longest, stage.micro_batch_tokens):
            raise UserError(
                f"{origin}: key 'max_sequence_tokens': {stage.max_sequence_tokens} is more than "
                f"the model's {longest} positions or micro_batch_tokens {stage.micro_batch_tokens}"
            )
        if stage.tokens_per_step < max(stage.max_sequence_tokens, replicas):
            raise UserError(
                f"{origin}: key 'tokens_per_step': {stage.tokens_per_step} cannot hold one conversation of "
                f"max_sequence_tokens {stage.max_sequence_tokens}"
            )
    if isinstance(stage, RolloutStage):
        if stage.prompts_per_step < 1 or stage.prompts_per_step % replicas:
            raise UserError(
                f"{origin}: key 'prompts_per_step': {stage.prompts_per_step} is not a multiple of "
                f"the {replicas} data-parallel replicas"
            )
        _check_lengths(stage, longest, origin)
        _check_replay(stage, loaded.hardware, model, origin)
    check_judges(stage, origin)


def _check_replay(stage: RolloutStage, hardware: HardwareConfig, model: NemotronHConfig, origin: str) -> None:
    """Routing replay travels with a row through one forward call, which pipeline and context parallelism cut apart."""
    replay, section = stage.routing_replay, "distill" if isinstance(stage, MopdConfig) else "loss"
    if replay == "none":
        return
    where = f"{origin}: key '{section}.routing_replay': {replay}"
    for key in ("pipeline_parallel", "context_parallel"):
        if getattr(hardware, key) > 1:
            raise UserError(f"{where} does not work with hardware {key} above 1; set it to none")
    if not model.layers("E"):
        raise UserError(f"{where} needs layers of experts, the model has none; set it to none")
    if model.n_routed_experts > NO_CHOICE:
        raise UserError(f"{where} keeps expert numbers in a byte, the model has {model.n_routed_experts} experts")
    if replay == "sampler" and hardware.sampler == "trtllm" and stage.mode != "train_only":
        raise UserError(
            f"{where} needs a sampler that reports the experts it used, which hardware.sampler trtllm does not; set it "
            "to learner"
        )


def _check_lengths(stage: RolloutStage, longest: int, origin: str) -> None:
    sampling = stage.sampling
    if sampling.max_total_tokens > longest:
        raise UserError(
            f"{origin}: key 'sampling.max_total_tokens': {sampling.max_total_tokens} is more than "
            f"the model's {longest} positions"
        )
    if sampling.max_new_tokens < 1 or sampling.max_new_tokens > sampling.max_total_tokens:
        raise UserError(
            f"{origin}: key 'sampling.max_new_tokens': {sampling.max_new_tokens} is outside 1..max_total_tokens"
        )
    if sampling.max_prompt_tokens >= sampling.max_total_tokens:
        raise UserError(
            f"{origin}: key 'sampling.max_prompt_tokens': {sampling.max_prompt_tokens} leaves no room for an answer in "
            f"max_total_tokens {sampling.max_total_tokens}"
        )
    if sampling.max_total_tokens > stage.micro_batch_tokens:
        raise UserError(
            f"{origin}: key 'micro_batch_tokens': {stage.micro_batch_tokens} cannot hold one conversation of "
            f"sampling.max_total_tokens {sampling.max_total_tokens}"
        )


def _check_mixture(stage: StageBase, origin: str) -> None:
    data = stage.data
    for domain, weight in data.domains.items():
        _check_domain(domain, f"{origin}: key 'data.domains'")
        if weight < 0:
            raise UserError(f"{origin}: key 'data.domains.{domain}': the weight {weight} is negative")
    elsewhere = isinstance(stage, SftConfig) and (data.conversations or data.corpus_share > 0 or data.judge_share > 0)
    if sum(data.domains.values()) <= 0 and not elsewhere:
        raise UserError(
            f"{origin}: key 'data.domains': the weights sum to 0; give at least one domain, for example {{math: 1}}"
        )
    check_training_tables(stage, origin)


def _check_domain(name: str, where: str) -> None:
    """A built-in domain by its file, `package.module:Class` by its module, `file.py:Class` by its path; nothing is
    imported.
    """
    if ":" not in name:
        if name not in domains.known():
            raise UserError(f"{where}: no domain {name!r}{nearest(name, domains.known())}")
        return
    if outside_file(name) is None:
        raise UserError(f"{where}: {name!r} cannot be found; write package.module:Class or path/to/file.py:Class")


def outside_file(name: str) -> Path | None:
    """The Python file of a domain of the user's own, None when there is none."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    try:
        spec = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def check_evaluation(loaded: Loaded, graph: Graph) -> None:
    """Gates and teacher choice have select scores to read."""
    check_evaluation_tables(loaded)
    for name, stage in loaded.stages.items():
        origin = show(loaded.files[name])
        assert stage.evaluation is not None
        for domain in stage.evaluation.domains:
            _check_domain(domain, f"{origin}: key 'evaluation.domains'")
        for gate in stage.gates:
            if stage.evaluation.select < 1 or gate.domain not in stage.evaluation.domains:
                raise UserError(
                    f"{origin}: key 'gates': {gate.domain!r} has no select tasks; add it to evaluation.domains "
                    f"and keep evaluation.select above 0{nearest(gate.domain, stage.evaluation.domains)}"
                )
        if isinstance(stage, MopdConfig):
            _check_teachers(stage, graph.teaching[name].candidates, loaded, origin)


def _check_teachers(stage: MopdConfig, candidates: tuple[Source, ...], loaded: Loaded, origin: str) -> None:
    for domain in stage.teachers.pin:
        if domain not in stage.data.domains:
            raise UserError(
                f"{origin}: key 'teachers.pin.{domain}': not in data.domains{nearest(domain, stage.data.domains)}"
            )
    for domain in stage.data.domains:
        if domain in stage.teachers.pin:
            continue
        for teacher in candidates:
            evaluation = loaded.stages[teacher.stage].evaluation
            assert evaluation is not None
            if evaluation.select < 1 or domain not in evaluation.domains:
                raise UserError(
                    f"{origin}: key 'teachers.candidates': {teacher.stage} has no select score of {domain!r}; "
                    f"add it to evaluation.domains, keep evaluation.select above 0, or pin a teacher"
                )


def missing_inputs(loaded: Loaded, graph: Graph) -> Iterator[str]:
    """Files and folders that the cascade names and this machine does not have, one line each."""
    for name, stage in loaded.stages.items():
        origin = show(loaded.files[name])
        for key, path in data_files(stage):
            if not path.is_file():
                yield f"{origin}: key {key!r}: no file {path}"
        source = graph.sources[name]
        if source.folder is not None and not (source.folder / "config.json").is_file():
            where = f"{show(loaded.path)}: key 'base'" if stage.init == "base" else f"{origin}: key 'init'"
            yield f"{where}: {source.folder} is no Hugging Face folder (config.json is missing)"
        if isinstance(stage, RolloutStage) and stage.mode == "train_only" and stage.rollouts:
            problem = _unrecorded(stage)
            if problem:
                yield f"{origin}: key 'rollouts': {problem}"
        for key in KEYS:
            judge = getattr(stage, key)
            folder = hf_folder(judge.serve) if judge is not None and judge.serve else None
            if folder is not None and not (folder / "config.json").is_file():
                yield f"{origin}: key '{key}.serve': {folder} is no Hugging Face folder (config.json is missing)"


def _unrecorded(stage: RolloutStage) -> str:
    """What is not there of the rollouts that `train_only` reads; empty when every step is."""
    folder, num_steps = Path(stage.rollouts or ""), stage.num_steps
    steps = recorded_steps(folder)
    if not steps:
        return f"{folder} holds no recorded rollouts (rollouts/step_*.jsonl); name the folder of a stage that sampled"
    gone = sorted(set(range(num_steps)) - set(steps))
    if gone:
        return (
            f"{folder} has no rollouts of step {gone[0]} and num_steps is {num_steps}; record every step "
            "(record_every: 1) or lower num_steps"
        )
    if stage.routing_replay == "sampler":
        bare = sorted(set(range(num_steps)) - set(recorded_steps(folder, experts=True)))
        if bare:
            return (
                f"{folder} does not say by which experts step {bare[0]} was sampled; set routing_replay to learner, or "
                "record it again with routing_replay: sampler"
            )
    return ""


def missing_sampler(stages: Iterable[StageBase], hardware: HardwareConfig, origin: str) -> Iterator[str]:
    """Why the hardware file's sampler cannot run here, if a stage samples."""
    if hardware.sampler == "trtllm" and any(samples(stage) for stage in stages):
        yield f"{origin}: key 'sampler': trtllm: {trtllm.refusal()}"


def samples(stage: StageBase) -> bool:
    """Whether a stage asks a sampler at all, for training or for its evaluation."""
    if isinstance(stage, RolloutStage) and stage.mode != "train_only":
        return True
    return stage.evaluation is not None and stage.evaluation.select + stage.evaluation.report > 0


def missing_programs(stages: Iterable[StageBase]) -> Iterator[str]:
    """Programs and API keys that these stages need and this machine does not have, one line each with the remedy."""
    isolated = shutil.which("bwrap") is not None
    for stage in stages:
        for key in without_their_keys(stage):
            yield f"key '{key}': the environment variable that it names is not set; export it"
        for domain in CONTAINED:
            engine = str(stage.data.options.get(domain, {}).get("runtime"))
            if engine in ENGINE_INSTALL and shutil.which(engine) is None:
                remedy = ENGINE_INSTALL[engine]
                yield f"key 'data.options.{domain}.runtime': {engine} is not installed; {remedy}"
        if isolated:
            continue
        scored = set(stage.data.domains) if isinstance(stage, RolloutStage) else set()
        if stage.evaluation is not None and stage.evaluation.select + stage.evaluation.report > 0:
            scored |= set(stage.evaluation.domains)
        for domain in SANDBOXED:
            if domain in scored:
                yield f"domain {domain!r} runs code in bubblewrap (bwrap), which is not installed; run `{INSTALL}`"


def data_files(stage: StageBase) -> Iterator[tuple[str, Path]]:
    """(key, path) of every data file a stage reads, relative to the working folder."""
    for domain, paths in stage.data.files.items():
        yield from ((f"data.files.{domain}", Path(path).expanduser()) for path in paths)
    yield from (("data.conversations", Path(path).expanduser()) for path in stage.data.conversations)
    if stage.evaluation is not None:
        for domain, paths in stage.evaluation.files.items():
            yield from ((f"evaluation.files.{domain}", Path(path).expanduser()) for path in paths)


def check_base(loaded: Loaded, graph: Graph, model: NemotronHConfig) -> None:
    """A Hugging Face folder that stages start from has the shape of the model file, and a tokenizer."""
    for name, source in graph.sources.items():
        path = (source.folder or Path()) / "config.json"
        if source.folder is None or not path.is_file():
            continue
        found = NemotronHConfig.from_hf_json(json.loads(path.read_text(encoding="utf-8")), show(path))
        if found.tensor_shapes() != model.tensor_shapes():
            raise UserError(
                f"{show(loaded.files[name])}: key 'init': {path} has not the shape of model {loaded.cascade.model!r}"
            )
        try:
            tokenizer_folder(source.folder, model.vocab_size)
        except UserError as error:
            raise UserError(f"{show(loaded.files[name])}: key 'init': {error}") from error
