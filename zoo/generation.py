"""From a name or a run folder to a language model that goes on with a text, or with many."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.config import TextConfig
from zoo.data.tokens import Tokenizer, load_tokenizer
from zoo.errors import ConfigError, DataError, WeightsError, reason
from zoo.factory import create_model
from zoo.pretrained.source import find_weights, is_source


@dataclass(frozen=True)
class Written:
    """A prompt and what a model went on with.

    Attributes:
        prompt, text: Both as text.
        tokens: Of prompt and text, one after the other.
        depths: Recursions that each of them took, but for the last, which nothing had to follow; empty for a model
            whose tokens have no depth.
    """

    prompt: str
    text: str
    tokens: list[int]
    depths: list[int]


@dataclass(frozen=True)
class Writer:
    """A language model with its tokenizer.

    Attributes:
        model: A transformers model, in eval mode.
        tokenizer: Between its tokens and text.
    """

    model: Any
    tokenizer: Tokenizer

    def write(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """What the model goes on with after the prompt; an empty one begins a document.

        Args:
            prompt: Any text, also one longer than those that the model was trained on.
            max_new_tokens: It ends after so many, or with the document.
            temperature: Of the sampling; 0 always takes the likeliest token.
            top_k: Sample among the likeliest so many tokens; 0 for all.
            top_p: Sample among the likeliest tokens that have this probability together.
            seed: Of the sampling; None for another text every time. Numbers drawn elsewhere are not affected.
            on_text: Called with every piece of text as it comes.

        Raises:
            ConfigError: If a number is out of range.
        """
        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        inputs = torch.tensor([self._tokens_of(prompt)], device=self.model.device)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
        stream = _Stream(self.tokenizer, on_text)
        with torch.random.fork_rng(devices=[] if inputs.device.type == "cpu" else [inputs.device]):
            if seed is None:
                torch.seed()
            else:
                torch.manual_seed(seed)
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                eos_token_id=self.tokenizer.eos,
                pad_token_id=self.tokenizer.eos,
                streamer=stream,
                **sampling,
            )
        return stream.text

    def write_all(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_sequences: int = 32,
    ) -> list[Written]:
        """What the model goes on with after each of many prompts, worked on together by depth-wise batching.

        Every text is the one that :meth:`write` gives for its prompt alone, with ``seed`` + its number as the seed.

        Args:
            prompts: Any texts.
            max_new_tokens, temperature, top_k, top_p, seed: As for :meth:`write`.
            max_sequences: How many are worked on at once.

        Raises:
            ConfigError: If a number is out of range, or the model has no block that recursions share.
        """
        from zoo.serve import DepthBatcher

        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        batcher = DepthBatcher(
            self.model,
            max_sequences=max(1, min(max_sequences, len(prompts))),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=torch.seed() % (1 << 62) if seed is None else seed,
            eos_token_id=self.tokenizer.eos,
        )
        for prompt in prompts:
            batcher.submit(self._tokens_of(prompt), max_new_tokens=max_new_tokens)
        return [
            Written(
                prompt,
                self.tokenizer.decode([token for token in each.tokens if token != self.tokenizer.eos]),
                each.prompt + each.tokens,
                each.depths,
            )
            for prompt, each in zip(prompts, batcher.run(), strict=True)
        ]

    def _tokens_of(self, prompt: str) -> list[int]:
        return [*self.tokenizer.prefix, *self.tokenizer.encode([prompt])[0]] or [self.tokenizer.eos]


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    checks = {
        f"max_new_tokens is {max_new_tokens}; expected 1 or more.": max_new_tokens >= 1,
        f"temperature is {temperature:g}; expected 0 (the likeliest token) or more.": temperature >= 0,
        f"top_k is {top_k}; expected 0 (all tokens) or more.": top_k >= 0,
        f"top_p is {top_p:g}; expected more than 0, at most 1.": 0 < top_p <= 1,
    }
    for problem, holds in checks.items():
        if not holds:
            raise ConfigError(problem)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: its lines, empty ones apart; in JSONL, each object's ``prompt``.

    Raises:
        DataError: If it cannot be read, holds none, or a line of JSONL has none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"Cannot read prompts from {path}: {reason(error)}; expected a text file, one a line."
        ) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt: Any = line
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise DataError(
                    f'{path}, line {number}: expected an object with "prompt", such as {{"prompt": "To be"}}.'
                )
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one a line.")
    return prompts


class _Stream:
    """Takes tokens from ``generate`` as they come, the prompt first, and makes text of them."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.tokens: list[int] | None = None  # the prompt is not there yet
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += tokens.flatten().tolist()
        self._show(self.tokens, whole=False)

    def end(self) -> None:
        self._show(self.tokens or [], whole=True)

    def _show(self, tokens: Sequence[int], *, whole: bool) -> None:
        text = self.tokenizer.decode([token for token in tokens if token != self.tokenizer.eos])
        if not whole and text.endswith("\ufffd"):
            return  # in the middle of a character
        if self.on_text is not None and len(text) > len(self.text):
            self.on_text(text[len(self.text) :])
        self.text = text


def load_writer(
    model: str | Path,
    *,
    tokenizer: str = "",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Writer:
    """A language model from its name (its default weights, or ``name.tag``), a run folder, or anywhere.

    Args:
        model: What :func:`zoo.create_model` takes, or a run folder.
        tokenizer: What :func:`zoo.data.tokens.load_tokenizer` takes, in place of the one that the weights name.
        device, dtype: As for :func:`zoo.create_model`.

    Raises:
        UnknownModelError, WeightsError: If there is no such model, folder, or file, or no tokenizer is known.
        ConfigError: If it is no language model, or the two do not go together.
    """
    name = f"local-dir:{model}" if Path(model).is_dir() else str(model)
    if not is_source(name) and len(Path(name).parts) > 1:
        raise WeightsError(f"No run folder {str(model)!r}; expected one, or the name of a model (`zoo list`).")
    weights = find_weights(name)
    if not isinstance(weights.model_config, TextConfig):  # asked before weights are fetched
        raise ConfigError(f"{weights.name} writes no text; expected a language model: zoo list --task text-generation.")
    network: Any = create_model(name, pretrained=True, device=device, dtype=dtype).eval()
    tokenizer = tokenizer or weights.tokenizer
    if not tokenizer:
        raise WeightsError(f"{name} does not say which tokenizer it needs; name it: --tokenizer bytes, for example.")
    text = load_tokenizer(tokenizer)
    known = network.config.vocab_size
    if text.vocab_size > known:
        raise ConfigError(f"Tokenizer {tokenizer!r} has {text.vocab_size} tokens, {weights.name} knows {known}.")
    return Writer(network, text)
