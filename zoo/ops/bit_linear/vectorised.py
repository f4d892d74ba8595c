"""BitLinear in PyTorch operators: for any device, and the form that is exported; and the gradients, for all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.bit_linear.reference import quantise_activations, quantise_weight, rms_norm

SLICE = 256  # packed rows that are unpacked at a time
TOKENS = 512  # of which there are temporary tensors in the backward pass


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
    """Gradients of x, weight (if asked) and norm_weight; what was quantised is quantised again, in parts of tokens."""
    tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    ternary, scale = quantise_weight(weight)
    ternary = ternary.mul_(scale)
    grad_x, grad_norm = torch.empty_like(tokens), torch.zeros_like(norm_weight)
    grad_weight = torch.zeros_like(weight) if weight_too else None
    for x_, grad_, out in zip(tokens.split(TOKENS), grads.split(TOKENS), grad_x.split(TOKENS), strict=True):
        inverse = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
        normed = x_ * inverse
        if grad_weight is not None:
            codes, step = quantise_activations(normed * norm_weight)
            grad_weight.addmm_(grad_.T, codes.mul_(step))
        grad_y = grad_ @ ternary
        grad_norm += (grad_y * normed).sum(0)
        grad_normed = grad_y.mul_(norm_weight)
        inner = (grad_normed * normed).mean(-1, keepdim=True)
        torch.mul(grad_normed.sub_(normed.mul_(inner)), inverse, out=out)
    return grad_x.view(x.shape), grad_weight, grad_norm
