"""Trains a Llama of the same size by the same recipe as one of zoo's small language models, and prints its result.

    python scripts/compare_language_models.py tinyshakespeare/matmulfree_2m --out runs/llama_2m

Only the model of the recipe differs. Llama's width and depth are the other model's own, its MLP as wide as brings the
number of parameters nearest. A run that was stopped goes on.
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
from zoo.train.run_folder import RunFolder


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
    parser.add_argument("recipe", help="of a language model: its file, or its name")
    parser.add_argument("--out", type=Path, required=True, help="run folder for the Llama")
    arguments = parser.parse_args()
    zoo.register(FAMILY)

    recipe = load_recipe(arguments.recipe)
    config = zoo.get_config(recipe.model.name)
    assert isinstance(config, TextConfig)
    ours = params(zoo.build(config, device="meta"))
    fields = of_the_same_size(config, ours)
    result = train(
        recipe.replace(**{"model.name": "llama_baseline", "model.overrides": fields}), arguments.out, resume=True
    )
    figures = json.loads(RunFolder(result.folder).result.read_text())
    print(f"{recipe.model.name}: {ours:,} parameters")
    print(f"Llama: {params(zoo.create_model('llama_baseline', **fields)):,} parameters, {json.dumps(figures)}")


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
