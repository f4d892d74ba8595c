"""Decoding speed and memory of whole language models: MatMul-free LM, packed and not, and a Llama of its size.

    OMP_NUM_THREADS=2 python scripts/benchmark_generate.py --threads 2

Random weights: speed does not depend on them. Each sample decodes --tokens tokens after the ones before it, batch 1,
the likeliest token each time; the models take turns, and the ratios are to the first. The Llama is transformers' own
with the same width, depth, MLP and vocabulary, in float32 and bfloat16; other runtimes of it are not measured.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import in_turns, spread

import zoo
from zoo.layers import pack_bit_linears


def llama_like(config: Any, dtype: torch.dtype) -> Any:
    """A Llama with the numbers of a MatMul-free LM."""
    import transformers

    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": max(1, config.hidden_size // 64),
        "max_position_embeddings": config.max_position_embeddings,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype).eval()


class Decoder:
    """A model in the middle of a text."""

    @torch.inference_mode()
    def __init__(self, model: Any, prompt: int) -> None:
        self.model = model
        self.cache: Any = None
        self.step(torch.arange(prompt)[None] % 256)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> None:
        answer = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = next(value for key, value in answer.items() if key in ("cache", "past_key_values"))
        self.token = answer.logits[:, -1:].argmax(-1)

    def seconds(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds a token, over so many."""
        start = clock()
        for _ in range(tokens):
            self.step(self.token)
        return (clock() - start) / tokens

    @property
    def weight_bytes(self) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        return sum(tensors.values())

    @property
    def state_bytes(self) -> int:
        if hasattr(self.cache, "state"):
            return self.cache.state.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="matmulfree_370m")
    parser.add_argument("--prompt", type=int, default=64, help="tokens read first")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded in a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--without", nargs="*", default=[], help="rows to leave out, to save time and memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    config: Any = zoo.get_config(arguments.model)

    def unpacked() -> Any:
        torch.manual_seed(0)
        return zoo.build(config).eval()

    makers: dict[str, Callable[[], Any]] = {
        "zoo, packed": lambda: pack_bit_linears(unpacked()),
        "zoo, unpacked": unpacked,
        "Llama float32": lambda: llama_like(config, torch.float32),
        "Llama bfloat16": lambda: llama_like(config, torch.bfloat16),
    }
    decoders = {}
    for name, make in makers.items():
        if name not in arguments.without:
            decoders[name] = Decoder(make(), arguments.prompt)
            gc.collect()
    whole = 4 * sum(p.numel() for p in zoo.build(config, device="meta").parameters())
    timers = {name: (lambda each=each: each.seconds(arguments.tokens, clock)) for name, each in decoders.items()}
    samples = in_turns(arguments.rounds, timers)
    first = statistics.median(next(iter(samples.values())))
    print(
        f"{arguments.model}, batch 1, {arguments.threads} threads, {arguments.clock} clock, torch {torch.__version__}"
    )
    print("| model | tokens/s | spread (%) | time over the first | weights (MB) | state (MB) | of float32 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, seconds in samples.items():
        each, middle = decoders[name], statistics.median(seconds)
        memory = each.weight_bytes + each.state_bytes
        speed = f"{1 / middle:.2f} | {spread(seconds):.0f} | {middle / first:.2f}"
        sizes = f"{each.weight_bytes / 1e6:.0f} | {each.state_bytes / 1e6:.2f} | {memory / whole:.3f}"
        print(f"| {name} | {speed} | {sizes} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"Peak memory of the process, with all of these models: {peak:.0f} MB")


if __name__ == "__main__":
    main()
