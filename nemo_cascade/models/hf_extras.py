"""What a Hugging Face folder holds beside its weights: config, generation config, tokenizer and code files."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.hf_writer import write_json
from nemo_cascade.types import Json, UserError

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "generation_config.json", "configuration_nemotron_h.py",
    "modeling_nemotron_h.py",
)  # fmt: skip
AUTO_MAP: dict[str, Json] = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModel": "modeling_nemotron_h.NemotronHForCausalLM",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}
_WHY = '"""So that `auto_map` of config.json leads somewhere: transformers 5 ships NemotronH itself."""\n\n'
CODE = {
    "configuration_nemotron_h.py": f"""{_WHY}from transformers.models import nemotron_h


class NemotronHConfig(nemotron_h.NemotronHConfig):
    pass
""",
    "modeling_nemotron_h.py": f"""{_WHY}from transformers.models import nemotron_h

from .configuration_nemotron_h import NemotronHConfig


class NemotronHForCausalLM(nemotron_h.NemotronHForCausalLM):
    config_class = NemotronHConfig
""",
}
"""Written where the source has no code files of its own. An engine on transformers 4 needs the published files: keep
them beside the tokenizer and every export carries them."""


def carried(source: Path) -> list[Path]:
    """The files of a folder that go where its weights go: tokenizer, chat template, generation config, code."""
    parsers = sorted(source.glob("*reasoning_parser*.py"))
    return [file for file in (*(source / name for name in CARRIED), *parsers) if file.is_file()]


def write_extras(config: NemotronHConfig, folder: Path, dtype: str, source: Path | None) -> None:
    """config.json, generation_config.json, and what `source` has to carry.

    `dtype` is torch's name of the weights' dtype (float32, bfloat16).
    """
    if source is not None:
        if not source.is_dir():
            raise UserError(f"tokenizer {source}: no such folder")
        for file in carried(source):
            shutil.copyfile(file, folder / file.name)
    if any(not (folder / name).is_file() for name in CODE):
        for name, text in CODE.items():
            (folder / name).write_text(text, encoding="utf-8")
    content = {**config.to_hf_json(), "dtype": dtype, "torch_dtype": dtype, "auto_map": AUTO_MAP}
    write_json(folder / "config.json", content)
    if not (folder / "generation_config.json").is_file():
        generation: dict[str, Json] = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 0.95,
        }
        write_json(folder / "generation_config.json", generation)
