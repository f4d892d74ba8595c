"""File formats of other runtimes: how each is written, and how it is run again."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.deploy.program import capture, to_onnx
from zoo.errors import ConfigError, ExportError, nearest, reason, require
from zoo.ops.selective_scan import onnx_decompositions

MAX_BATCH = 1024


class Format:
    """One file format. ``packages`` are what it needs, besides torch."""

    name = ""
    file = ""
    packages: tuple[str, ...] = ()
    extra = "export"
    free_batch = True  # whether one file takes any batch size
    free_size = True  # whether one file can take any height and width, where the model lets it

    def require(self) -> None:
        """Raise MissingExtraError without the packages."""
        for package in self.packages:
            require(package, extra=self.extra, why=f"Export to {self.name}")

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        """Write a model in eval mode as a file, with ``notes`` in its metadata where the format has a place for them.

        Raises:
            ExportError: If it cannot be converted.
        """
        raise NotImplementedError

    def load(self, path: Path) -> Callable[[Tensor], Tensor] | None:
        """The file in its own runtime; None where that does not exist on this machine."""
        raise NotImplementedError

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        """Lines of Python that run the file, x being a float32 array or tensor."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Of what wrote the file."""
        return {package: metadata.version(package) for package in self.packages}

    def program(self, model: nn.Module, example: Tensor, *, free_size: bool = False) -> torch.export.ExportedProgram:
        """The model as a program of standard operators alone, so that the file needs no zoo."""
        program = _program(model, example, free_batch=self.free_batch, free_size=free_size)
        own = any("zoo." in str(node.target) for node in program.graph.nodes)
        return program.run_decompositions(onnx_decompositions()) if own else program


def _program(model: nn.Module, example: Tensor, *, free_batch: bool, free_size: bool) -> torch.export.ExportedProgram:
    axes: dict[int, Any] = {}
    if free_batch:
        axes[0] = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        if example.shape[0] < 2:  # torch.export takes a size of 1 for a constant
            example = example.expand(2, -1, -1, -1).contiguous()
    if free_size:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    return capture(model, (example,), dynamic_shapes=(axes,) if axes else None)


class Onnx(Format):
    """ONNX, run by onnxruntime."""

    name = "onnx"
    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        import onnx

        proto = to_onnx(_program(model, example, free_batch=True, free_size=free_size), metadata=notes)
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString())

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f"import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{path}")\n'
            f'logits = session.run(None, {{"input": x}})[0]     # x: float32 array {list(shape)}'
        )


class OpenVino(Format):
    """OpenVINO's IR, made from ONNX."""

    name = "openvino"
    file = "model.xml"
    packages = ("onnx", "onnxscript", "openvino")

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        import openvino

        proto = to_onnx(_program(model, example, free_batch=True, free_size=free_size))
        converted = openvino.Core().read_model(proto.SerializeToString())
        for key, value in notes.items():
            converted.set_rt_info(value, ["zoo", key])
        openvino.save_model(converted, path, compress_to_fp16=False)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f"import openvino\n"
            f'model = openvino.Core().compile_model("{path}", "CPU")\n'
            f"logits = model(x)[0]     # x: float32 array {list(shape)}"
        )


class TorchExport(Format):
    """A program of ``torch.export``."""

    name = "torch-export"
    file = "model.pt2"

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        torch.export.save(self.program(model, example, free_size=free_size), path, extra_files=dict(notes))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        module = torch.export.load(path).module()
        return lambda x: module(x)

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f"import torch\n"
            f'model = torch.export.load("{path}").module()\n'
            f"logits = model(x)     # x: float32 tensor {list(shape)}"
        )


class TorchScript(Format):
    """TorchScript, by scripting; deprecated by torch, and still what many services load."""

    name = "torchscript"
    file = "model.pt"

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scripted = torch.jit.script(model)
            except Exception as error:
                raise ExportError(f"torch.jit.script cannot take the model: {reason(error)}.") from error
            if "zoo::" in str(scripted.inlined_graph):
                raise ExportError(
                    "The model has an operator of zoo's that no other process knows; expected --format torch-export, "
                    "onnx or openvino, which express it in standard ones."
                )
            torch.jit.save(torch.jit.freeze(scripted), path, _extra_files=dict(notes))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(path)
        return lambda x: module(x)

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f'import torch\nmodel = torch.jit.load("{path}")\nlogits = model(x)     # x: float32 tensor {list(shape)}'
        )


class ExecuTorch(Format):
    """ExecuTorch with XNNPACK, for phones; the file has the example's batch and size."""

    name = "executorch"
    file = "model.pte"
    packages = ("executorch",)
    extra = "executorch"
    free_batch = False
    free_size = False

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # all that XNNPACK's passes take
        program = self.program(contiguous, example)
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot take the program: {reason(error)}.") from error
        path.write_bytes(lowered.buffer)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        return lambda x: method.execute([x])[0].clone()

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f"from executorch.runtime import Runtime\n"
            f'method = Runtime.get().load_program("{path}").load_method("forward")\n'
            f"logits = method.execute([x])[0]     # x: float32 tensor {list(shape)}"
        )


class CoreMl(Format):
    """Core ML's ML program in float32, for Apple's devices. It is written anywhere and runs on macOS alone."""

    name = "coreml"
    file = "model.mlpackage"
    packages = ("coremltools",)
    extra = "coreml"
    free_batch = False
    free_size = False

    def write(
        self, model: nn.Module, example: Tensor, path: Path, *, free_size: bool, notes: Mapping[str, str]
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools

            # To core operators, less a view of everything, for which coremltools has no translation.
            program = self.program(model, example).run_decompositions({torch.ops.aten.alias.default: lambda x: x})
            try:
                converted = coremltools.convert(
                    program,
                    inputs=[coremltools.TensorType(name="input", shape=tuple(example.shape))],
                    outputs=[coremltools.TensorType(name="logits")],
                    convert_to="mlprogram",
                    compute_precision=coremltools.precision.FLOAT32,
                    minimum_deployment_target=coremltools.target.iOS17,
                    skip_model_load=True,
                )
            except Exception as error:
                raise ExportError(f"coremltools cannot convert the program: {reason(error)}.") from error
        for key, value in notes.items():
            converted.user_defined_metadata[f"zoo.{key}"] = value
        converted.save(str(path))

    def load(self, path: Path) -> Callable[[Tensor], Tensor] | None:
        import platform

        if platform.system() != "Darwin":
            return None
        import coremltools

        model = coremltools.models.MLModel(str(path))
        return lambda x: torch.from_numpy(next(iter(model.predict({"input": x.numpy()}).values())))

    def snippet(self, path: Path, shape: Sequence[int]) -> str:
        return (
            f"import coremltools     # on macOS\n"
            f'model = coremltools.models.MLModel("{path}")\n'
            f'logits = model.predict({{"input": x}})["logits"]     # x: float32 array {list(shape)}'
        )


_FORMATS: dict[str, Format] = {
    each.name: each for each in (Onnx(), OpenVino(), TorchExport(), TorchScript(), ExecuTorch(), CoreMl())
}


def get_format(name: str) -> Format:
    """The format of this name."""
    if name not in _FORMATS:
        raise ConfigError(f"There is no format {name!r}; there are {', '.join(_FORMATS)}.{nearest(name, _FORMATS)}")
    return _FORMATS[name]


def notes_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What of a manifest goes into the file itself: strings by key."""
    keys = ("zoo_version", "model", "weights_sha256", "preprocessing", "labels", "random_weights")
    return {key: value if isinstance(value := manifest[key], str) else json.dumps(value) for key in keys}
