"""A model as a program that other runtimes take: torch.export, and ONNX from it."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ExportError, reason, require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InDtype(nn.Module):
    """A model that computes in another dtype, between inputs and outputs of float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Any:
        """As the model, in and out of float32; of a language model's answer, the logits."""
        cast = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        output = self.model(*cast)
        return _map_tensors(getattr(output, "logits", output), lambda x: x.float() if x.is_floating_point() else x)


def _map_tensors(output: Any, change: Any) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    return type(output)(_map_tensors(each, change) for each in output)


def copy_for_inference(model: nn.Module) -> Any:
    """A copy in eval mode whose parameters want no gradients; the model itself stays as it is."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def fused(model: nn.Module) -> Any:
    """The same, folded and merged where the model offers ``fuse()``."""
    own: Any = copy_for_inference(model)
    return own.fuse() if hasattr(own, "fuse") else own


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a model answers with: a tensor, a tuple or list of them, or what has ``logits``.

    Raises:
        ExportError: For anything else.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list) and output and all(isinstance(each, Tensor) for each in output):
        return list(output)
    raise ExportError(f"The model returns {type(output).__name__}; expected a tensor, or a tuple or list of tensors.")


def capture(
    model: nn.Module, example: tuple[Tensor, ...], *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """``torch.export`` of a model that is in eval mode.

    Args:
        model: What to export.
        example: Its inputs.
        dynamic_shapes: As ``torch.export.export`` takes it; None for the shapes of the example alone.

    Raises:
        ExportError: If it cannot be exported, for example since its control flow depends on values.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, example, dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise ExportError(f"torch.export cannot take the model: {_why(error)}.") from error


def _why(error: Exception) -> str:
    """What is at the bottom of one of torch.export's messages, in a line."""
    text = str(error)
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__ or "GuardOnDataDependent" in text:
        return f"its control flow depends on the values of tensors ({reason(error)})"
    return reason(error)


def save_program(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    onnx: bool,
    input_names: Sequence[str] = ("input",),
    output_names: Sequence[str] = ("logits",),
) -> Path:
    """Write what an engine starts from: an ONNX model, or the program itself.

    Raises:
        ExportError: If it cannot be converted to ONNX.
    """
    if onnx:
        path.write_bytes(to_onnx(program, input_names=input_names, output_names=output_names).SerializeToString())
    else:
        torch.export.save(program, path)
    return path


def to_onnx(
    program: torch.export.ExportedProgram,
    *,
    input_names: Sequence[str] = ("input",),
    output_names: Sequence[str] = ("logits",),
    metadata: Mapping[str, str] | None = None,
) -> Any:
    """An exported program as an ONNX model (an ``onnx.ModelProto``), its weights inside.

    Raises:
        ExportError: If the exporter cannot convert it.
        MissingExtraError: Without the packages.
    """
    for package in ("onnx", "onnxscript"):
        require(package, extra="export", why="ONNX export")
    from zoo.ops.selective_scan import onnx_decompositions

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if any("zoo.selective_scan" in str(node.target) for node in program.graph.nodes):
                program = program.run_decompositions(onnx_decompositions())
            onnx_program = torch.onnx.export(
                program,
                verbose=False,
                optimize=True,
                external_data=False,
                input_names=list(input_names),
                output_names=list(output_names),
            )
    except Exception as error:
        raise ExportError(f"The program cannot be converted to ONNX: {reason(error)}.") from error
    assert onnx_program is not None
    proto: Any = onnx_program.model_proto
    for key, value in (metadata or {}).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto
