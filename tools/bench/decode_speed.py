"""How many tokens per second the local sampler's models read and decode on one core: `python
tools/bench/decode_speed.py`.

Random weights of the nano model, prompts of 15 to 60 tokens, medians over steps; processor time, so that a busy machine
disturbs less.
"""

from __future__ import annotations

import random
import statistics
import time

import torch

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import DecodeModel
from nemo_cascade.models.decode_native import AnyModel, NativeModel, library

BATCHES = (1, 16, 64, 128)
STEPS = 40


def random_weights(config: NemotronHConfig) -> dict[str, torch.Tensor]:
    """Small enough to stay finite."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in config.tensor_shapes().items()}


def measure(model: AnyModel, batch: int, noted: bool) -> tuple[float, float]:
    """Tokens per second of (reading prompts, decoding), `noted`: with the experts of every token."""
    experts: list[bytes] | None = [] if noted else None
    rng = random.Random(batch)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(15, 60))] for _ in range(batch)]
    model.prefill(prompts, STEPS)
    started = time.process_time()
    _, cache = model.prefill(prompts, STEPS, experts)
    read = sum(len(prompt) for prompt in prompts) / (time.process_time() - started)
    tokens_B = torch.randint(0, model.config.vocab_size, (batch,))
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        model.step(tokens_B, cache, experts)  # type: ignore[arg-type]
        seconds.append(time.process_time() - started)
    return read, batch / statistics.median(seconds)


def main() -> None:
    """Print one line per model and batch size."""
    torch.set_num_threads(1)
    config = NemotronHConfig.preset("nano")
    named = random_weights(config)
    loaded = library()
    models: dict[str, AnyModel] = {"plain": DecodeModel(config, named)}
    if loaded is not None:
        models["compiled"] = NativeModel(config, named, loaded)
    for name, model in models.items():
        for batch in BATCHES:
            for noted in (False, True):
                read, decoded = measure(model, batch, noted)
                what = ", experts noted" if noted else ""
                print(f"{name:9} batch {batch:4}: reads {read:8,.0f} tok/s, decodes {decoded:8,.0f} tok/s{what}")


if __name__ == "__main__":
    main()
