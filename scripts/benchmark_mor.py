"""What Mixture-of-Recursions costs beside a vanilla Llama of the same unrolled depth and a recursive transformer.

    python scripts/benchmark_mor.py

Shapes of 360M with random weights; the routers' thresholds are calibrated on what the model writes, and for prefill on
what it reads, so that tokens take the recursions that the recipe's capacities say. float32. Everything is measured in
turns; tokens a second count what was written. The cache's bytes are those of the stores, beside the formula.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import in_turns

import zoo
from zoo.serve import DepthBatcher
from zoo.serve.depth_batcher import _Sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mor_360m_r3_expert")
    parser.add_argument("--against", nargs="+", default=["vanilla", "recursive"], help="vanilla, recursive or both")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the first that is written")
    parser.add_argument("--steps", type=int, default=4, help="tokens of each sequence in a sample; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--train", type=int, default=256, help="tokens of a training step; 0: none")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # in half precision it plans anew for every length of a cache
    config: Any = zoo.get_config(options.model)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    ours: Any = zoo.build(config).eval().to(**place)
    models: dict[str, Any] = {}
    if "vanilla" in options.against:
        models["vanilla"] = make_vanilla(config).to(**place)
    if "recursive" in options.against:
        models["recursive"] = zoo.build(config.override(router="none", capacities=())).eval().to(**place)
    models["mor"] = ours
    text = torch.randint(0, config.vocab_size, (options.sequences, 64)).to(options.device)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{options.threads} threads"
    print(f"{options.model}, {where}, {options.dtype}")
    if options.steps:
        prompts = text[:, : options.prompt]
        depth = calibrate_on_own_text(ours, prompts[:8])
        print(f"{options.sequences} sequences after {options.prompt} tokens")
        print(f"calibrated to {depth:.2f} of {config.num_recursions} recursions (capacities: {sum(config.shares):.2f})")
        decode(options, prompts, models)
    if options.prefill:
        ours.calibrate(text[:8])  # on text like that which is read: its tokens are drawn at random
    for length in options.prefill:
        rounds = options.rounds if length <= 512 else 1
        prefill(rounds, length, models, config)
    if options.train:
        training(options.train, models, config)


def make_vanilla(config: Any) -> Any:
    """transformers' Llama of the same unrolled depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    fields = {name: getattr(config, name) for name in names}
    return LlamaForCausalLM(LlamaConfig(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()


def calibrate_on_own_text(model: Any, prompts: torch.Tensor, written: int = 16) -> float:
    """Calibrate twice on the tokens that the model writes, which the thresholds change; returns the mean depth."""
    depth = model.calibrate(prompts)
    for _ in range(2):
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(prompts, max_new_tokens=written, **options)
        depth = model.calibrate(text[:, -written:])
    return depth


def decode(options: argparse.Namespace, prompts: torch.Tensor, models: dict[str, Any]) -> None:
    """Tokens a second of decoding, every sequence taking its likeliest token."""
    timers: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        timers[f"{name}, in step"] = in_step(model, prompts, options.steps)
    batchers = {}
    for name, pack in (("mor", False), ("mor", True), ("recursive", True), ("recursive", False)):
        on_gpu = prompts.is_cuda  # where nothing is packed
        if name not in models or (pack if on_gpu else (name, pack) == ("recursive", False)):
            continue
        label = f"{name}, depth-wise{', packed' if pack else ''}"
        batcher = batchers[label] = DepthBatcher(models[name], max_sequences=len(prompts), pack=pack)
        batcher.eos = None
        for prompt in prompts:
            batcher.submit(prompt, max_new_tokens=1 << 20)
        batcher.step()
        timers[label] = depth_wise(batcher, options.steps)
    samples = in_turns(options.rounds, timers)
    base = statistics.median(next(iter(samples.values())))
    print("\ndecoding                              tokens/s   lowest to highest   first = 1")
    for name, speeds in samples.items():
        middle = statistics.median(speeds)
        print(f"{name:36}{middle:10.1f}   {min(speeds):7.1f} {max(speeds):7.1f}   {middle / base:11.2f}")
    for name, batcher in batchers.items():
        written = [place for place in batcher.places if isinstance(place, _Sequence)]
        depths = [depth for place in written for depth in place.result.depths[len(place.result.prompt) :]]
        size = batcher.tokens_passed / batcher.passes
        print(f"{name}: mean depth {statistics.mean(depths):.2f}, {size:.1f} tokens a pass")


def now() -> float:
    """Now, when a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_step(model: Any, prompts: torch.Tensor, steps: int) -> Callable[[], float]:
    """Tokens a second of all sequences together, a token of each at a time, as ``generate`` does."""
    with torch.inference_mode():
        out = model(prompts, use_cache=True, logits_to_keep=1)
    state = {"cache": cache_of(out), "ids": out.logits[:, -1:].argmax(-1)}
    keyword = "cache" if "cache" in out else "past_key_values"

    @torch.inference_mode()
    def run() -> float:
        start = now()
        for _ in range(steps):
            out = model(state["ids"], **{keyword: state["cache"]}, use_cache=True)
            state["ids"] = out.logits[:, -1:].argmax(-1)
        return steps * len(prompts) / (now() - start)

    return run


def cache_of(out: Any) -> Any:
    """A model's cache, under either of transformers' names for it."""
    return out["cache"] if "cache" in out else out["past_key_values"]


def depth_wise(batcher: DepthBatcher, steps: int) -> Callable[[], float]:
    """Tokens a second of the batcher, in so many passes that each sequence writes ``steps`` tokens, or more."""
    passes = steps * batcher.trunk.config.num_recursions

    def count() -> int:
        return sum(len(place.result.tokens) for place in batcher.places if place is not None)

    def run() -> float:
        before, start = count(), now()
        for _ in range(passes):
            batcher.step()
        return (count() - before) / (now() - start)

    return run


def prefill(rounds: int, length: int, models: dict[str, Any], config: Any) -> None:
    """Seconds to read a prompt, and bytes of the cache that it leaves for each token."""
    ids = torch.randint(0, config.vocab_size, (1, length)).to(models["mor"].device)
    left: dict[str, int] = {}

    def timer(name: str, model: Any) -> Callable[[], float]:
        @torch.inference_mode()
        def run() -> float:
            start = now()
            out = model(ids, use_cache=True, logits_to_keep=1)
            seconds = now() - start
            cache = cache_of(out)
            if hasattr(cache, "state"):
                left[name] = cache.state.nbytes
            else:
                left[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            return seconds

        return run

    timers = {name: timer(name, model) for name, model in models.items()}
    samples = in_turns(rounds, timers) if rounds > 1 else {name: [run()] for name, run in timers.items()}
    base = statistics.median(next(iter(samples.values())))
    itemsize = models["mor"].dtype.itemsize
    print(f"\nprefill, T = {length:4}       seconds   first = 1   cache bytes/token   formula")
    for name, seconds in samples.items():
        middle = statistics.median(seconds)
        formula = config.override(router="none", capacities=()).kv_bytes_per_token(itemsize=itemsize)
        if name == "mor":
            formula = config.kv_bytes_per_token(models[name].model.last.mean_depth, itemsize=itemsize)
        print(f"{name:20}{middle:13.2f}{middle / base:14.2f}{left[name] / length:20.0f}{formula:10.0f}")


def training(length: int, models: dict[str, Any], config: Any) -> None:
    """Seconds of a forward and a backward pass, and what is kept between them."""
    ids = torch.randint(0, config.vocab_size, (1, length)).to(models["mor"].device)
    print(f"\ntraining step, 1 x {length}   seconds   first = 1   MB saved for backward   MB of weights")
    base = 0.0
    for name, model in models.items():
        model.train()
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        if ids.is_cuda:
            model(ids, labels=ids).loss.backward()  # libraries choose their kernels
        start = now()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        loss.backward()
        seconds = now() - start
        base = base or seconds
        size = sum(parameter.nbytes for parameter in model.parameters())
        print(f"{name:20}{seconds:13.2f}{seconds / base:14.2f}{sum(kept.values()) / 1e6:24.0f}{size / 1e6:16.0f}")
        model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
