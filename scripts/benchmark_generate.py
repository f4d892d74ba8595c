"""Decoding speed and memory of whole language models: MatMul-free LM, packed and not, and a Llama of its size.

    OMP_NUM_THREADS=2 python scripts/benchmark_generate.py --threads 2 [--rivals FOLDER]
    python scripts/benchmark_generate.py --device cuda --only speed

Random weights: speed does not depend on them. Each sample decodes --tokens tokens after the ones before it, batch 1,
the likeliest token each time; the models take turns, and the ratios are to the first. The Llama is transformers' own
with the same width, depth, MLP and vocabulary, in float32 and bfloat16.

With --rivals, the Llama runs in onnxruntime and OpenVINO too, with weights of 8 and 4 bits; it is converted into the
folder once (minutes, and 5 GB). There a step reads the same cache of --prompt tokens each time and answers with what it
would add to it, which saves those runtimes the work of growing it.

The peak of memory is what a process with one model holds at most while it decodes, once the model is there.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import in_turns, spread

import zoo
from zoo.deploy.steps import replay_steps
from zoo.layers import pack_bit_linears

STEP = "step.onnx"
RIVALS = ("onnxruntime int8", "onnxruntime int4", "OpenVINO int8", "OpenVINO int4")


def llama_like(config: Any, dtype: torch.dtype, **options: Any) -> Any:
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
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, **options)).to(dtype).eval()


def cache_of(answer: Any) -> Any:
    return next(value for key, value in answer.items() if key in ("cache", "past_key_values"))


class Decoder:
    """A model in the middle of a text."""

    @torch.inference_mode()
    def __init__(self, model: Any, prompt: int) -> None:
        self.model = model
        self.cache: Any = None
        self.step(torch.arange(prompt, device=model.device)[None] % 256)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> None:
        answer = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(answer)
        self.token = answer.logits[:, -1:].argmax(-1)

    def seconds(self, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds a token, over so many."""
        start = clock()
        for _ in range(tokens):
            self.step(self.token)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (clock() - start) / tokens

    @property
    def bytes(self) -> int:
        """Of weights and state."""
        tensors = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        if hasattr(self.cache, "state"):
            return sum(tensors.values()) + self.cache.state.nbytes
        return sum(tensors.values()) + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Rival(Decoder):
    """A step of the Llama in another runtime."""

    def __init__(self, config: Any, folder: Path, name: str, prompt: int, threads: int) -> None:
        runtime, bits = name.split()
        file = folder / f"{runtime}-{bits}.{'onnx' if runtime == 'onnxruntime' else 'xml'}"
        self.size = sum(each.stat().st_size for each in folder.glob(f"{runtime}-{bits}*"))
        self.feeds = [each.numpy() for each in example(config, prompt)]
        self.size += sum(each.nbytes for each in self.feeds)
        self.run = onnxruntime_run(file, threads) if runtime == "onnxruntime" else openvino_run(file, threads)
        self.step(None)

    def step(self, tokens: Any) -> None:
        self.feeds[0] = self.run(self.feeds)[:, -1:].argmax(-1).astype(np.int64)
        self.token = None

    @property
    def bytes(self) -> int:
        return self.size


def onnxruntime_run(file: Path, threads: int) -> Callable[[list[Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda feeds: session.run(None, dict(zip(names, feeds, strict=True)))[0]


def openvino_run(file: Path, threads: int) -> Callable[[list[Any]], Any]:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda feeds: request.infer(feeds, share_inputs=True)[0]


def example(config: Any, prompt: int) -> tuple[torch.Tensor, ...]:
    """A token, and keys and values ``[layers, 1, heads, prompt, 64]`` of what came before."""
    heads = max(1, config.hidden_size // 64)
    shape = (config.num_hidden_layers, 1, heads, prompt, config.hidden_size // heads)
    return torch.tensor([[5]]), torch.randn(shape), torch.randn(shape)


class Step(torch.nn.Module):
    """One step of a transformers model with its cache in tensors, for runtimes that know nothing of caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Any, keys: Any, values: Any) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for i in range(len(keys)):
            cache.update(keys[i], values[i], i)
        answer = self.model(
            token, past_key_values=cache, position_ids=torch.full((1, 1), keys.shape[3]), use_cache=True
        )
        layers = cache_of(answer).layers
        new = [torch.stack([getattr(layer, kind)[:, :, -1:] for layer in layers]) for kind in ("keys", "values")]
        return answer.logits, *new


def convert_rivals(config: Any, folder: Path, prompt: int) -> None:
    """Write the Llama's step for the other runtimes, what is there already excepted."""
    import nncf
    import onnx
    import openvino
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / STEP
    if not source.exists():
        step, inputs = Step(llama_like(config, torch.float32, attn_implementation="eager")), example(config, prompt)
        torch.onnx.export(step, inputs, str(source), dynamo=False, opset_version=17)
        del step
    if not (folder / "onnxruntime-int8.onnx").exists():
        quantize_dynamic(
            source, folder / "onnxruntime-int8.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
        )
    if not (folder / "onnxruntime-int4.onnx").exists():
        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "onnxruntime-int4.onnx"))
    modes = nncf.CompressWeightsMode
    ways: dict[str, dict[str, Any]] = {
        "int8": {"mode": modes.INT8_ASYM},
        "int4": {"mode": modes.INT4_SYM, "group_size": 64, "ratio": 1.0, "all_layers": True},
    }
    for bits, options in ways.items():
        if not (folder / f"OpenVINO-{bits}.xml").exists():
            model = nncf.compress_weights(openvino.Core().read_model(source), **options)
            openvino.save_model(model, folder / f"OpenVINO-{bits}.xml", compress_to_fp16=False)


def resident(field: str) -> int:
    """Bytes of this process by a field of Linux's ``/proc/self/status``; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def makers(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    config: Any = zoo.get_config(arguments.model)

    def unpacked() -> Any:
        torch.manual_seed(0)
        return zoo.build(config, device=arguments.device).eval()

    models: dict[str, Callable[[], Any]] = {
        "zoo, packed": lambda: pack_bit_linears(unpacked()),
        "zoo, packed, int8 embeddings": lambda: pack_bit_linears(unpacked(), int8_embeddings=True),
        "zoo, unpacked": unpacked,
        "Llama float32": lambda: llama_like(config, torch.float32).to(arguments.device),
        "Llama bfloat16": lambda: llama_like(config, torch.bfloat16).to(arguments.device),
    }
    if arguments.device.startswith("cuda"):
        models["zoo, packed, steps replayed"] = lambda: replay_steps(pack_bit_linears(unpacked()))
    made = {name: (lambda make=make: Decoder(make(), arguments.prompt)) for name, make in models.items()}
    for name in RIVALS if arguments.rivals else ():
        made[f"Llama {name}"] = partial(Rival, config, arguments.rivals, name, arguments.prompt, arguments.threads)
    return {name: make for name, make in made.items() if name not in arguments.without}


def peak_of(name: str, arguments: argparse.Namespace) -> int:
    """Peak memory, in bytes, of a process that loads one model from a file and decodes with it."""
    command = [sys.executable, __file__, "--peak", name, "--model", arguments.model, "--prompt", str(arguments.prompt)]
    if arguments.rivals:
        command += ["--rivals", str(arguments.rivals)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "CI": "true"})
    return int(done.stdout.split()[-1])


def print_peak(name: str, arguments: argparse.Namespace) -> None:
    decoder = makers(arguments)[name]()
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is held
    decoder.seconds(3, time.perf_counter)
    print(resident("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="matmulfree_370m")
    parser.add_argument("--prompt", type=int, default=64, help="tokens read first")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded in a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; --rivals and peaks of memory are for cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--without", nargs="*", default=[], help="rows to leave out, to save time and memory")
    parser.add_argument("--rivals", type=Path, help="folder for the Llama in onnxruntime and OpenVINO")
    parser.add_argument("--only", choices=["speed", "memory"], help="measure one of the two")
    parser.add_argument("--convert", action="store_true", help="fill the folder of --rivals, and measure nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # in half precision it plans anew for every length of a cache
    config: Any = zoo.get_config(arguments.model)
    if arguments.peak:
        print_peak(arguments.peak, arguments)
        return
    if arguments.rivals:
        os.environ.setdefault("CI", "true")  # nncf reports its use elsewhere
        convert_rivals(config, arguments.rivals, arguments.prompt)
        if arguments.convert:
            return

    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    made = makers(arguments)
    peaks = {} if arguments.only == "speed" else {name: peak_of(name, arguments) for name in made}
    if arguments.only == "memory":
        for name, peak in peaks.items():
            print(f"{name}: peak RSS {peak / 1e6:.0f} MB")
        return
    decoders = {}
    for name, make in made.items():
        decoders[name] = make()
        gc.collect()
    whole = 4 * sum(p.numel() for p in zoo.build(config, device="meta").parameters())
    timers = {name: partial(each.seconds, arguments.tokens, clock) for name, each in decoders.items()}
    samples = in_turns(arguments.rounds, timers)
    first = statistics.median(next(iter(samples.values())))
    gpu = arguments.device.startswith("cuda")
    where = torch.cuda.get_device_name() if gpu else f"{arguments.threads} threads, {arguments.clock} clock"
    print(f"{arguments.model}, batch 1, {where}, torch {torch.__version__}")
    print("| model | tokens/s | spread (%) | time over the first | weights + state (MB) | of float32 | peak RSS (MB) |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, seconds in samples.items():
        memory, middle = decoders[name].bytes, statistics.median(seconds)
        speed = f"{1 / middle:.2f} | {spread(seconds):.0f} | {middle / first:.2f}"
        peak = f"{peaks[name] / 1e6:.0f}" if name in peaks else "-"
        print(f"| {name} | {speed} | {memory / 1e6:.0f} | {memory / whole:.3f} | {peak} |")


if __name__ == "__main__":
    main()
