"""Trains a Llama of the same size by the same recipe as one of zoo's small language models, and prints both.

    python scripts/compare_language_models.py runs/matmulfree_2m --out runs/llama_2m

The first folder is a finished run, whose recipe is taken; only the model differs. Llama's width and depth are the
model's own, its MLP as wide as brings the number of parameters nearest.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import zoo
from zoo.config import TextConfig
from zoo.train.engine import train
from zoo.train.recipe import load_recipe
from zoo.train.run_folder import ModelRecord, RunFolder


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TextConfig):
    """A Llama's numbers, by transformers' names."""

    intermediate_size: int = 512
    num_attention_heads: int = 4


class Llama(nn.Module):
    """transformers' Llama with zoo's config beside it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        import transformers

        self.config = config
        self.llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict()))

    def forward(self, input_ids: Any, position_ids: Any = None) -> Any:
        return self.llama(input_ids, position_ids=position_ids, use_cache=False).logits


FAMILY = zoo.Family(
    "llama_baseline",
    config=LlamaConfig,
    model=Llama,
    title="Llama",
    paper="arXiv:2302.13971",
    code="github.com/huggingface/transformers",
    licence="Apache-2.0",
    task="text-generation",
)


@FAMILY.variant
def llama_baseline() -> LlamaConfig:
    return LlamaConfig()


def of_the_same_size(config: TextConfig, params: int) -> dict[str, Any]:
    """The fields of a Llama of this width and depth whose MLP brings it nearest to ``params`` parameters."""
    width, depth = config.hidden_size, config.num_hidden_layers
    others = 2 * config.vocab_size * width + width + depth * (4 * width * width + 2 * width)
    shared = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    return {
        **{name: getattr(config, name) for name in shared},
        "num_attention_heads": max(1, width // 48),
        "intermediate_size": round((params - others) / (depth * 3 * width)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of a language model")
    parser.add_argument("--out", type=Path, required=True, help="run folder for the Llama")
    arguments = parser.parse_args()
    zoo.register(FAMILY)

    run = RunFolder(arguments.run)
    config = ModelRecord.read(run).config
    assert isinstance(config, TextConfig)
    ours = sum(p.numel() for p in zoo.build(config, device="meta").parameters())
    fields = of_the_same_size(config, ours)
    recipe = load_recipe(run.recipe)
    result = train(
        recipe.replace(**{"model.name": "llama_baseline", "model.overrides": fields}), arguments.out, resume=True
    )
    theirs = sum(p.numel() for p in zoo.create_model("llama_baseline", **fields).parameters())
    for name, params, folder in ((str(run.path), ours, run), ("Llama", theirs, RunFolder(result.folder))):
        figures = json.loads(folder.result.read_text())
        print(f"{name}: {params:,} parameters, {json.dumps(figures)}")


if __name__ == "__main__":
    main()
