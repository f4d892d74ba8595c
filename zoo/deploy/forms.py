"""Ways of running the module itself, without another runtime: as it is, fused, channels-last, packed, as CUDA graphs.

A form makes a module out of a copy of the model. Another package adds its own with :func:`register_form`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.deploy.cuda_graph import CudaGraph
from zoo.deploy.engines import refuses_precision
from zoo.deploy.program import DTYPES, InDtype, copy_for_inference, fused
from zoo.errors import ConfigError, nearest
from zoo.layers.bit_linear import BitLinear, PackedBitLinear


@dataclass(frozen=True)
class Form:
    """One way of running a module.

    Attributes:
        name: What it is called.
        make: From the model to a module of its own in eval mode; the model must stay as it is.
        unsuited: Why it makes no sense for a model on a target; empty when it does.
    """

    name: str
    make: Callable[[nn.Module], nn.Module]
    unsuited: Callable[[nn.Module, str], str] = lambda model, target: ""


class ChannelsLast(nn.Module):
    """A model whose weights and inputs are channels-last in memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs))


def _packed(model: nn.Module) -> nn.Module:
    """A copy with ternary weights at two bits each; the full-precision ones are not copied first."""
    packed = {id(layer): PackedBitLinear.of(layer) for layer in model.modules() if type(layer) is BitLinear}
    return copy.deepcopy(model, {**packed}).eval().requires_grad_(False)


def _packed_and_replayed(model: nn.Module) -> nn.Module:
    from zoo.deploy.steps import replay_steps  # language models are no part of the others

    return replay_steps(_packed(model))


def _without_bit_linears(model: nn.Module, target: str) -> str:
    return "" if any(type(layer) is BitLinear for layer in model.modules()) else "the model has no ternary weights"


def _without_convolutions(model: nn.Module, target: str) -> str:
    has = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return "" if has else "the model has no convolutions"


def _without_fuse(model: nn.Module, target: str) -> str:
    return "" if hasattr(model, "fuse") else "the model offers no fuse()"


def _off_cuda(model: nn.Module, target: str) -> str:
    return "" if target.startswith("cuda") else "needs a CUDA GPU"


def _without_steps(model: nn.Module, target: str) -> str:
    recurrent = getattr(getattr(model, "model", None), "attributes", {}).get("_is_stateful")
    return _without_bit_linears(model, target) or ("" if recurrent else "its cache grows") or _off_cuda(model, target)


_FORMS = {
    form.name: form
    for form in (
        Form("eager", copy_for_inference),
        Form("fused", fused, _without_fuse),
        Form("channels-last", lambda model: ChannelsLast(fused(model)), _without_convolutions),
        Form("packed", _packed, _without_bit_linears),
        Form("packed-cuda-graph", _packed_and_replayed, _without_steps),
        Form("cuda-graph", lambda model: CudaGraph(fused(model)), _off_cuda),
        Form(
            "channels-last-cuda-graph",
            lambda model: CudaGraph(ChannelsLast(fused(model))),
            lambda model, target: _without_convolutions(model, target) or _off_cuda(model, target),
        ),
    )
}


def register_form(form: Form) -> None:
    """Offer another form to :func:`zoo.optimize`."""
    _FORMS[form.name] = form


def form_names() -> list[str]:
    """Every form, in the order in which they are tried."""
    return list(_FORMS)


def get_form(name: str) -> Form:
    """The form of this name."""
    if name not in _FORMS:
        raise ConfigError(f"There is no form {name!r}.{nearest(name, _FORMS)}")
    return _FORMS[name]


def make(name: str, model: nn.Module, precision: str) -> nn.Module:
    """A model in a form and a precision, between inputs and outputs of float32."""
    form = get_form(name)
    made = form.make(model)
    return made if precision == "fp32" else InDtype(made, DTYPES[precision])


def refuses(name: str, model: nn.Module, precision: str, target: str) -> str:
    """Why a form cannot be used so; empty when it can."""
    return get_form(name).unsuited(model, target) or refuses_precision(precision, target)
