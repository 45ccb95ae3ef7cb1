"""Does every parallel layout train like one process? `python tools/bench/layouts.py [--json] [LAYOUT ...]`

Five steps of SFT and five of GRPO through the Learner in each layout, in fp32 on gloo, from the same weights and on the
same sequences. Printed against one process, the largest over both runs, all steps and all ranks: difference of the
loss, relative difference of the gradient norm, difference of any weight of the export after the last step, difference
of any entry of the first gradient relative to the largest of its tensor, and difference of any log-probability at the
end. Exit status 1 where one is out of TOLERANCE. With `--json`: {layout: {"loss_difference", "grad_norm_difference",
"weight_difference"}}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cascade.algorithms.loss import cross_entropy, policy_gradient
from nemo_cascade.config.schema import HardwareConfig, LossConfig, OptimizerConfig
from nemo_cascade.learner import parallel
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Sequence

if TYPE_CHECKING:
    import torch

    from nemo_cascade.learner.megatron import MegatronLearner

TOLERANCE = 1e-5
STEPS = 5
COLUMNS = ("loss_difference", "grad_norm_difference", "weight_difference")
PACKED, UNPACKED = 4096, 1  # tokens of a micro-batch: everything in one row, or each sequence in a row of its own
# Four Mamba groups and two KV groups, so that TP4 cuts the first and replicates the second. Heads of 16, so
# that the mixer is the one in C, except with context parallelism.
MODEL = NemotronHConfig(
    vocab_size=64, hidden_size=32, hybrid_override_pattern="ME*MEM", num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=8, n_groups=4, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, chunk_size=16,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Ranks, the keys of the hardware file that cut the policy over them, and how sequences are packed."""

    name: str
    ranks: int
    keys: dict[str, int | bool] = field(default_factory=dict)
    micro_batch_tokens: int = 64

    @property
    def hardware(self) -> HardwareConfig:
        """The hardware file of this layout."""
        return HardwareConfig(ranks_per_node=self.ranks, **self.keys)  # type: ignore[arg-type]


ONE = Layout("one", 1)
DISTRIBUTED = {"distributed_optimizer": True}
LAYOUTS = (
    Layout("dp2", 2),
    Layout("dp2_distributed_optimizer", 2, DISTRIBUTED),
    Layout("tp2", 2, {"tensor_parallel": 2}),
    Layout("ep2", 2, {"expert_parallel": 2}),
    Layout("ep2_distributed_optimizer", 2, {"expert_parallel": 2} | DISTRIBUTED),
    Layout("tp2_ep2", 2, {"tensor_parallel": 2, "expert_parallel": 2}),
    Layout("pp2", 2, {"pipeline_parallel": 2}),
    Layout("cp2_packed", 2, {"context_parallel": 2}, PACKED),
    Layout("cp2_unpacked", 2, {"context_parallel": 2}, UNPACKED),
    Layout("dp2_ep2", 4, {"expert_parallel": 2}),
    Layout("tp2_cp2_packed", 4, {"tensor_parallel": 2, "context_parallel": 2}, PACKED),
    Layout("tp2_cp2_unpacked", 4, {"tensor_parallel": 2, "context_parallel": 2}, UNPACKED),
    Layout("pp2_cp2_ep2", 4, {"pipeline_parallel": 2, "context_parallel": 2, "expert_parallel": 2}),
    Layout("tp2_pp2_distributed_optimizer", 4, {"tensor_parallel": 2, "pipeline_parallel": 2} | DISTRIBUTED),
    Layout("tp4_replicated_kv", 4, {"tensor_parallel": 4}),
)


def sequences(step: int, rank: int, replicas: int) -> list[Sequence]:
    """This replica's whole groups of four, two answers each; one replica gets all of step 2."""
    draw = random.Random(step)
    made = []
    for index in range(4):
        prompt = tuple(draw.randrange(64) for _ in range(draw.randint(3, 50)))
        for _ in range(2):
            answer = tuple(draw.randrange(64) for _ in range(draw.randint(1, 12)))
            mask = (0,) * len(prompt) + (1,) * len(answer)
            advantage = draw.uniform(-1, 1)
            logprobs = tuple(-4.16 * trained for trained in mask)
            if replicas == 1 or rank == (0 if step == 2 else index % replicas):
                sequence = Sequence(prompt + answer, mask, tuple(advantage * m for m in mask), logprobs, logprobs)
                made.append(dataclasses.replace(sequence, group=index))
    return made


def train(folder: Path, layout: Layout) -> None:
    """Both runs from the weights in FOLDER/start; every rank leaves steps, log-probabilities and weights in FOLDER."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    runs = {
        "sft": (cross_entropy("token"), OptimizerConfig(lr=5e-4, weight_decay=0.1, expert_bias_rate=1e-3)),
        "grpo": (policy_gradient(LossConfig(kl=0.03, importance="tis")), OptimizerConfig(lr=5e-4, clip_grad=0.1)),
    }
    steps, gradients, weights, scores = {}, {}, {}, {}
    for name, (objective, optimizer) in runs.items():
        settings = LearnerSettings(optimizer, STEPS, layout.micro_batch_tokens, hardware=layout.hardware)
        learner = MegatronLearner(MODEL, settings, init_folder=str(folder / "start"))
        first: dict[str, torch.Tensor] = {}
        watched = dataclasses.replace(objective, check=lambda _, seen=first, of=learner: seen or seen.update(read(of)))
        steps[name] = [learner.update(sequences(step, rank, replicas), watched) for step in range(STEPS)]
        gradients |= {f"{name} {key}": tensor for key, tensor in first.items()}
        weights |= {f"{name} {key}": tensor.clone() for key, tensor in learner.weights()}
        scores[name] = learner.logprobs(sequences(0, 0, 1))
    kept = {"steps": steps, "gradients": gradients, "weights": weights, "scores": scores}
    torch.save(kept, folder / f"{layout.name}-{dist.get_rank()}.pt")


def read(learner: MegatronLearner) -> dict[str, torch.Tensor]:
    """The summed gradients, put together over the ranks under the names of their weights. Collective.

    Empty with the distributed optimizer, where no rank has them all.
    """
    if learner.settings.hardware.distributed_optimizer:
        return {}
    own = [(parameter, parameter.detach().clone()) for parameter in learner.model.parameters()]
    try:
        for parameter, _ in own:
            parameter.data.copy_(parameter.main_grad)
        return {name: tensor.clone() for name, tensor in learner.weights() if not name.endswith("correction_bias")}
    finally:
        for parameter, weight in own:
            parameter.data.copy_(weight)


def worker(folder: Path, names: list[str]) -> None:
    """One rank: the named layouts one after the other."""
    known = {layout.name: layout for layout in (ONE, *LAYOUTS)}
    for name in names:
        layout = known[name]
        cut = parallel.ParallelLayout.from_hardware(layout.hardware)
        parallel.start(cut, seed=3, rendezvous=folder / f"{name}.rendezvous", timeout_s=900.0)
        if name == ONE.name:
            from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner

            settings = LearnerSettings(OptimizerConfig(lr=1e-3), STEPS)
            MegatronLearner(MODEL, settings, seed=3).export(str(folder / "start"))
        train(folder, layout)
        parallel.stop()


def run_ranks(folder: Path, layouts: list[Layout], timeout_s: float = 3600.0) -> None:
    """The layouts, which have the same number of ranks, in that many processes. CalledProcessError when one fails."""
    ranks = layouts[0].ranks
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench.layouts", "--worker", str(folder)]
    processes, logs = [], [folder / f"{layouts[0].name}-{rank}.log" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        }  # fmt: skip
        with log.open("w") as output:
            processes.append(
                subprocess.Popen([*command, *(layout.name for layout in layouts)], env=environment, stdout=output,
                                 stderr=subprocess.STDOUT)
            )  # fmt: skip
    try:
        for process, log in zip(processes, logs, strict=True):
            if process.wait(timeout=timeout_s):
                raise subprocess.CalledProcessError(process.returncode, command, output=log.read_text()[-3000:])
    finally:
        for process in processes:
            process.kill()


def compare(folder: Path, layout: Layout) -> dict[str, float]:
    """The layout's row of the table: the worst of its ranks."""
    rows = [compare_rank(folder / f"{ONE.name}-0.pt", folder / f"{layout.name}-{rank}.pt")
            for rank in range(layout.ranks)]  # fmt: skip
    return {key: max(row[key] for row in rows) for key in rows[0]}


def compare_rank(one_file: Path, other_file: Path) -> dict[str, float]:
    """What one rank of a layout reports and holds against one process."""
    import torch

    one, other = torch.load(one_file), torch.load(other_file)
    pairs = [
        (expected, found)
        for run in one["steps"]
        for expected, found in zip(one["steps"][run], other["steps"][run], strict=True)
    ]
    gradients = [0.0]
    for name, value in one["gradients"].items():
        if name in other["gradients"]:
            gradients.append(float((other["gradients"][name] - value).abs().max() / value.abs().max()))
    weights = [float((other["weights"][name] - value).abs().max()) for name, value in one["weights"].items()]
    scores = [
        abs(x - y)
        for run in one["scores"]
        for a, b in zip(one["scores"][run], other["scores"][run], strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    return {
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "grad_norm_difference": max(abs(a["grad_norm"] / b["grad_norm"] - 1.0) for a, b in pairs),
        "weight_difference": max(weights),
        "gradient_difference": max(gradients),
        "logprob_difference": max(scores),
    }


def measure(names: list[str]) -> dict[str, dict[str, float]]:
    """The table of the named layouts (all of them when none is named)."""
    chosen = [layout for layout in LAYOUTS if not names or layout.name in names]
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_ranks(folder, [ONE])
        for ranks in sorted({layout.ranks for layout in chosen}):
            run_ranks(folder, [layout for layout in chosen if layout.ranks == ranks])
        for layout in chosen:
            table[layout.name] = compare(folder, layout)
    return table


def within(row: dict[str, float]) -> bool:
    """Whether a row is within tolerance; no comparison with nan is."""
    return all(value <= TOLERANCE for value in row.values())


def main() -> int:
    """Print the table; 1 where a layout is out of tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", help=", ".join(layout.name for layout in LAYOUTS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(asked.worker, asked.layouts)
        return 0
    if unknown := set(asked.layouts) - {layout.name for layout in LAYOUTS}:
        parser.error(f"no layout {', '.join(sorted(unknown))}")
    table = measure(asked.layouts)
    if asked.json:
        shown = {name: {key: row[key] for key in COLUMNS} for name, row in table.items()}
        print(json.dumps(shown, indent=1))
    else:
        print(f"{'layout':30} {'loss':>9} {'grad norm':>9} {'weights':>9} {'gradients':>9} {'logprobs':>9}")
        for name, row in table.items():
            cells = " ".join(f"{value:9.1e}" for value in row.values())
            print(f"{name:30} {cells}{'' if within(row) else f'  above {TOLERANCE:.0e}'}")
    return 0 if all(within(row) for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
