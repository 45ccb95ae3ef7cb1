"""The 512-entry byte-level BPE of the nano models.

At a million parameters tokens are the budget, so the fixed parts of the chat template are whole tokens, frequent words
are entries of their own (`ignore_merges`: a word that is an entry needs no chain of merges), and the rest is merges
over bytes. Any text can be encoded; digits stay single.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nemo_cascade.data import template
from nemo_cascade.data.nano_corpus import document
from nemo_cascade.protocols import Domain
from nemo_cascade.types import UserError

VOCAB = 512
MERGES = 24  # entries made by merging; the words that remain are whole entries
SAMPLE = 200  # tasks per domain
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = (PAD, BOS, EOS, template.IM_START, template.IM_END)
TAGS = tuple(text for text in template.CONTROL if text not in SPECIAL)
CHUNKS = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
    "<|im_start|>system\n" + template.TOOLS_BEGIN,
    template.TOOLS_END + "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "<|im_end|>\n<|im_start|>assistant\n<think></think>",
    "<|im_end|>\n<|im_start|>response_1\n",
    "<|im_end|>\n<|im_start|>response_2\n",
    "\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response>",
    "\n</think>\n",
    "<tool_call>\n<function=",
    ">\n<parameter=",
    ">\n",
    "\n</parameter>\n<parameter=",
    "\n</parameter>\n</function>\n</tool_call>",
    ">\n</function>\n</tool_call>",
    "run_tests",
    "\\boxed{",
    "(x): return x",
    ".py",
    "<<<<<<< SEARCH\n",
    "\n=======\n",
    "\n>>>>>>> REPLACE",
    '{"score_1": ',
    ', "score_2": ',
    ', "ranking": ',
)
"""Texts that are one token each. Those of the template begin or end where a sampled turn does, so that encoding a
rendered conversation and appending ids turn by turn agree."""


def sample_texts(domains: Mapping[str, Domain]) -> Iterator[str]:
    """The rendered demonstrations of every domain, and as many corpus documents as one domain has tasks."""
    for name in sorted(domains):
        domain = domains[name]
        for index, task in enumerate(domain.tasks("train", SAMPLE, seed=0)):
            yield "".join(piece.text for piece in template.prompt_pieces(task.messages, task.tools, task.thinking))
            messages = domain.demonstrate(task, index, flaw_rate=0.2)
            for message in messages:
                answer = message.role == "assistant"
                pieces = (
                    template.completion_pieces(message, task.thinking)
                    if answer
                    else template.turn_pieces([message], -1)
                )
                yield "".join(piece.text for piece in pieces)
    rng = random.Random("corpus")
    for _ in range(SAMPLE):
        yield document(rng)


def tool_chunks(domains: Mapping[str, Domain]) -> list[str]:
    """The declaration of each tool of the nano tasks, as the template writes it: one token each, to save tokens."""
    found: set[str] = set()
    for name in sorted(domains):
        for task in domains[name].tasks("train", SAMPLE, seed=0):
            found.update("".join(piece.text for piece in template.tool_pieces(tool)) for tool in task.tools)
    return sorted(found)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _word_counts(texts: Iterator[str], added: Sequence[str]) -> Counter[str]:
    """How often each pre-token (in the byte alphabet) stands outside the added tokens."""
    whole = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)))
    splitter = _pre_tokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        for part in whole.split(text):
            counts.update(word for word, _ in splitter.pre_tokenize_str(part))
    return counts


def _vocabulary(counts: Counter[str], added: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(entry -> id, merges): added tokens first (pad 0, bos 1, eos 2), bytes, frequent words, merges for the rest."""
    entries = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word] * (len(word) - 1), word))
    kept = words[: VOCAB - len(entries) - MERGES]
    entries += kept
    rest = {word: list(word) for word in words[len(kept) :]}
    merges: list[tuple[str, str]] = []
    while len(entries) < VOCAB:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in rest.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in entries:
            entries.append("".join(best))
        rest = {word: _merge(parts, best) for word, parts in rest.items()}
    entries += [f"<unused_{index}>" for index in range(VOCAB - len(entries))]  # the sample ran out of pairs
    return {entry: index for index, entry in enumerate(entries)}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of `pair`, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_tokenizer(out_dir: str | Path, domains: Mapping[str, Domain]) -> Path:
    """Train on a seeded sample of `domains` and write a folder that transformers loads; same domains, same files."""
    added = (*SPECIAL, *TAGS, *CHUNKS, *tool_chunks(domains))
    vocab, merges = _vocabulary(_word_counts(sample_texts(domains), added), added)
    if len(vocab) != VOCAB:
        raise UserError(f"nano tokenizer: {len(vocab)} entries instead of {VOCAB}; the sample has too few words")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added[len(SPECIAL) :]])
    return _write(tokenizer, Path(out_dir))


def _write(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    shutil.copyfile(template.TEMPLATE_FILE, folder / template.TEMPLATE_FILE.name)
    return folder
