"""What runs a program: existing libraries behind one small interface each.

An engine builds files in a folder and loads them again. Building happens in a process of its own (``worker.py``), so
that a crash there costs nothing; an engine that is not installed says so. Another package adds its own with
:func:`register_engine`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, nearest

Run = Callable[..., list[Any]]  # tensors to tensors

CALIBRATION = "calibration.npy"  # [N, ...] float32: what int8 is calibrated with, in the folder of the sources
BUILT_HERE = "files"  # the folder in which a worker builds
SOURCES = {"onnx": "model.onnx", "program": "program.pt2"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to build: plain values, since another process reads them."""

    engine: str
    precision: str = "fp32"
    target: str = "cpu"
    threads: int = 1
    batch: int = 1  # samples in an input

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    """One way of running a program. ``sources`` says what :meth:`build` starts from."""

    name = ""
    package = ""  # that must be installed
    source = "onnx"  # or "program"
    native = False  # whether what is built is machine code
    patience = 0.0  # seconds that a search must have before it is tried unasked

    def unavailable(self, target: str) -> str:
        """Why it cannot be used here; empty when it can."""
        if util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""

    def refuses(self, precision: str, target: str) -> str:
        """Why it cannot compute so; empty when it can."""
        return "" if precision == "fp32" else f"{self.name} is not asked for {precision}"

    def build(self, source: Path, folder: Path, job: Job) -> None:
        """Write into ``folder`` what :meth:`load` reads; ``source`` has the program, and the calibration beside it."""
        raise NotImplementedError

    def load(self, folder: Path, job: Job) -> Run:
        """A function from tensors to tensors, both of torch, on the target."""
        raise NotImplementedError

    def version(self) -> str:
        """The installed package's."""
        return metadata.version(self.package.replace("_", "-"))


# What onnxruntime quantises: products, and what stays in int8 between two of them. Gates and norms would lose more than
# they save, and some models do not load with norms in int8.
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = ("Add", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Split", "Transpose")


def _as_arrays(inputs: tuple[Any, ...]) -> list[Any]:
    """Tensors as contiguous arrays, brought there by NumPy, on this thread alone.

    PyTorch would take several, and those wait for more work for milliseconds afterwards, on the cores that the engine's
    own threads need: for a picture in channels-last a call of 7 ms would take 10.
    """
    import numpy as np

    return [np.ascontiguousarray(x.cpu().numpy()) for x in inputs]


class OnnxRuntime(Engine):
    """onnxruntime: static quantisation for int8."""

    name = "onnxruntime"
    package = "onnxruntime"

    def unavailable(self, target: str) -> str:
        missing = super().unavailable(target)
        if missing or target == "cpu":
            return missing
        import onnxruntime

        provider = "CUDAExecutionProvider"
        has = provider in onnxruntime.get_available_providers()
        return "" if has else f"the installed onnxruntime has no {provider}"

    def refuses(self, precision: str, target: str) -> str:
        if precision in ("fp32", "int8"):
            return "" if target == "cpu" or precision == "fp32" else "int8 is for CPUs here"
        return f"onnxruntime has no {precision} kernels for {target} that this uses"

    def build(self, source: Path, folder: Path, job: Job) -> None:
        if job.precision == "fp32":
            shutil.copyfile(source, folder / "model.onnx")
            return
        import numpy as np
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                pictures = np.load(source.parent / CALIBRATION, allow_pickle=False)
                whole = len(pictures) // job.batch * job.batch
                batches = pictures[:whole].reshape(-1, job.batch, *pictures.shape[1:])
                self.feeds = iter([{"input": batch} for batch in batches])

            def get_next(self) -> Any:
                return next(self.feeds, None)

        prepared = folder / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(folder / "model.onnx"),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_PRODUCTS, *_BETWEEN],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not _has_vnni(),  # without VNNI, products of 8 bits saturate in 16
        )
        prepared.unlink()

    def load(self, folder: Path, job: Job) -> Run:
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        device = torch.device(job.target)
        gpu = ("CUDAExecutionProvider", {"device_id": device.index or 0})
        providers = [gpu if device.type == "cuda" else "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
        names = [each.name for each in session.get_inputs()]

        def run(*inputs: Any) -> list[Any]:
            feeds = dict(zip(names, _as_arrays(inputs), strict=True))
            device = inputs[0].device
            return [torch.from_numpy(each).to(device) for each in session.run(None, feeds)]

        return run


class OpenVino(Engine):
    """OpenVINO: NNCF's post-training quantisation for int8."""

    name = "openvino"
    package = "openvino"

    def unavailable(self, target: str) -> str:
        return super().unavailable(target) if target == "cpu" else "zoo uses it for CPUs only"

    def refuses(self, precision: str, target: str) -> str:
        if precision == "fp32":
            return ""
        if precision == "int8":
            return "" if util.find_spec("nncf") else "nncf is not installed"
        return "" if self._computes_in(precision) else f"this CPU does not compute in {precision}"

    @staticmethod
    def _computes_in(precision: str) -> bool:
        import openvino

        return precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def build(self, source: Path, folder: Path, job: Job) -> None:
        import openvino

        model = openvino.Core().read_model(source)
        if job.precision == "int8":
            import nncf
            import numpy as np

            pictures = np.load(source.parent / CALIBRATION, allow_pickle=False)
            whole = len(pictures) // job.batch * job.batch
            batches = list(pictures[:whole].reshape(-1, job.batch, *pictures.shape[1:]))
            model = _quantised(model, nncf.Dataset(batches), len(batches))
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    def load(self, folder: Path, job: Job) -> Run:
        import openvino
        import torch

        hint = {"bf16": "bf16", "fp16": "f16"}.get(job.precision, "f32")
        if job.precision == "int8" and self._computes_in("bf16"):
            hint = "bf16"  # what is not quantised
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": hint,
            "CPU_DENORMALS_OPTIMIZATION": True,
            "ENABLE_MMAP": False,  # a mapped file that somebody cuts short ends the process
        }
        request = openvino.Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()

        def run(*inputs: Any) -> list[Any]:
            results = request.infer(_as_arrays(inputs), share_inputs=True, share_outputs=False)
            return [torch.from_numpy(results[i]) for i in range(len(results))]

        return run


def _quantised(model: Any, data: Any, size: int) -> Any:
    """NNCF's quantisation of what multiplies by weights, but for the last layer; all else computes in what is left.

    Additions, pooling and depthwise convolutions in int8 cost more in conversions than they save. A classifier in int8
    is a large part of the whole error and next to nothing of the time.
    """
    import nncf

    products = [op for op in model.get_ordered_ops() if _multiplies_by_weights(op)]
    kept = {op.get_friendly_name() for op in products[:-1] or products}
    kinds = {op.get_type_name() for op in products}
    others = [op for op in model.get_ordered_ops() if op.get_friendly_name() not in kept]
    scope = nncf.IgnoredScope(
        names=[op.get_friendly_name() for op in others if op.get_type_name() in kinds],
        types=sorted({op.get_type_name() for op in others} - kinds - {"Parameter", "Constant", "Result"}),
        validate=False,
    )
    # OpenVINO's convolutions take activations with a zero point; before a linear layer it is subtracted in a pass.
    convolutions = sum(op.get_type_name() == "Convolution" for op in products)
    presets = nncf.QuantizationPreset
    preset = presets.MIXED if 2 * convolutions >= len(products) else presets.PERFORMANCE
    return nncf.quantize(model, data, preset=preset, subset_size=size, ignored_scope=scope)


def _multiplies_by_weights(op: Any) -> bool:
    """Whether an operator of OpenVINO's is a convolution that is not grouped, or a product with a constant."""
    if op.get_type_name() == "Convolution":
        return True
    constant = (value.get_node().get_type_name() == "Constant" for value in op.input_values())
    return op.get_type_name() == "MatMul" and any(constant)


class Inductor(Engine):
    """torch.compile's code, made ahead of time (AOTInductor): frozen weights on a CPU, a CUDA graph on a GPU."""

    name = "inductor"
    package = "torch"
    source = "program"
    native = True
    patience = 300.0  # compiling takes minutes

    def unavailable(self, target: str) -> str:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError, RuntimeError):
            return "there is no C++ compiler"
        return ""

    def refuses(self, precision: str, target: str) -> str:
        return refuses_precision(precision, target)

    def build(self, source: Path, folder: Path, job: Job) -> None:
        import torch

        program = torch.export.load(source)
        # What torch 2.11 builds with frozen weights for a GPU crashes when it is loaded.
        frozen = torch.device(job.target).type == "cpu"
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / "model.pt2"), inductor_configs={"freezing": frozen}
            )

    def load(self, folder: Path, job: Job) -> Run:
        import torch

        from zoo.deploy.cuda_graph import CudaGraph

        device = torch.device(job.target)
        compiled: Any = torch._inductor.aoti_load_package(
            str(folder / "model.pt2"),
            run_single_threaded=device.type == "cuda",  # as recording needs it
            device_index=-1 if device.index is None else device.index,
        )
        if device.type == "cuda":
            compiled = CudaGraph(compiled)

        def run(*inputs: Any) -> list[Any]:
            output = compiled(*inputs)
            return [output] if isinstance(output, torch.Tensor) else list(output)

        return run


def refuses_precision(precision: str, target: str) -> str:
    """Why torch's own operators do not compute so on this machine; empty when they do."""
    import torch

    if precision == "fp32":
        return ""
    if precision == "int8":
        return "int8 is left to onnxruntime and OpenVINO"
    if target == "cpu":
        native = {
            "bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "fp16": torch.cpu._is_amx_fp16_supported(),
        }
        return "" if native[precision] else f"this CPU does not compute in {precision}"
    return "" if precision == "fp16" or torch.cuda.is_bf16_supported() else f"this GPU does not compute in {precision}"


def _has_vnni() -> bool:
    import torch

    return bool(torch.cpu._is_vnni_supported())


_ENGINES = {
    "onnxruntime": "zoo.deploy.engines:OnnxRuntime",
    "openvino": "zoo.deploy.engines:OpenVino",
    "inductor": "zoo.deploy.engines:Inductor",
}


def register_engine(name: str, place: str) -> None:
    """Offer another engine to :func:`zoo.optimize`.

    Args:
        name: What it is called.
        place: ``"module:class"`` of an :class:`Engine`, importable in another process too.
    """
    _ENGINES[name] = place


def engine_names() -> list[str]:
    """Every engine, installed or not, in the order in which they are tried."""
    return list(_ENGINES)


def get_engine(name: str, place: str = "") -> Engine:
    """The engine of this name, or the one that lies at ``place``."""
    if not place and name not in _ENGINES:
        raise ConfigError(f"There is no engine {name!r}.{nearest(name, _ENGINES)}")
    module, _, attribute = (place or _ENGINES[name]).partition(":")
    engine = getattr(import_module(module), attribute)()
    assert isinstance(engine, Engine)
    return engine


def place_of(name: str) -> str:
    """Where an engine's class lies, for a process that has not registered it."""
    return _ENGINES[name]


def silence_telemetry() -> None:
    """Keep OpenVINO's tools from reporting their use: they do not where they think that a CI runs them."""
    os.environ["CI"] = "true"
