"""BitLinear in PyTorch operators: for any device, and the form that is exported; and the gradients, for all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.bit_linear.reference import quantise_activations, quantise_weight, rms_norm

SLICE = 256  # packed rows that are unpacked at a time


def forward(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """``[..., Cin] -> [..., Cout]``."""
    codes, step = quantise_activations(rms_norm(x, norm_weight, eps))
    ternary, scale = quantise_weight(weight)
    return F.linear(codes, ternary) * (step * scale)


def packed_forward(
    x: Tensor, packed: Tensor, scale: Tensor, norm_weight: Tensor, out_features: int, eps: float
) -> Tensor:
    """The same with packed weights, of which a slice at a time is unpacked."""
    codes, step = quantise_activations(rms_norm(x, norm_weight, eps))
    total = codes.sum(-1, keepdim=True)
    quarters: list[list[Tensor]] = [[], [], [], []]  # the four matrix rows of each packed row are R apart
    for rows in packed.split(SLICE):
        left, codes_of = rows.to(x.dtype), []
        for _ in quarters:  # in floating point, which every runtime that a model is exported to can do
            higher = torch.floor(left / 4)
            codes_of.append(left - 4 * higher)
            left = higher
        products = F.linear(codes, torch.cat(codes_of)).chunk(4, -1)
        for quarter, product in zip(quarters, products, strict=True):
            quarter.append(product)
    product = torch.cat([part for quarter in quarters for part in quarter], -1)[..., :out_features]
    return (product - total) * (step * scale.to(x.dtype))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, *, weight_too: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, weight (if asked) and norm_weight; what was quantised is quantised again."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * inverse
    grad_weight = None
    if weight_too:
        codes, step = quantise_activations(normed * norm_weight)
        grad_weight = grad.flatten(0, -2).T @ codes.mul_(step).flatten(0, -2)
        del codes
    ternary, scale = quantise_weight(weight)
    grad_y = (grad @ ternary).mul_(scale)
    del ternary
    grad_norm = (grad_y * normed).flatten(0, -2).sum(0)
    grad_normed = grad_y.mul_(norm_weight)
    inner = (grad_normed * normed).mean(-1, keepdim=True)
    return grad_normed.sub_(normed.mul_(inner)).mul_(inverse), grad_weight, grad_norm
