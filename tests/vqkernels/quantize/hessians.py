"""Hessians of correlated inputs, and the output's relative error, for the tests of methods."""

import torch


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(k, tokens=None, seed=0):
    """X^T X over tokens whose inputs share directions, as activations do."""
    tokens = tokens or 4 * k
    mix = torch.linalg.qr(normal(k, k, seed=seed).double()).Q
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
    inputs = (normal(tokens, k, seed=seed + 1) * spectrum) @ mix
    inputs = inputs * normal(k, seed=seed + 2).mul(0.5).exp()
    return (inputs.T @ inputs / tokens).float()


def output_error(weight, decoded, hessian):
    """`sum_r e_r H e_r^T / sum_r w_r H w_r^T` in float64."""
    weight, hessian = weight.double(), hessian.double()
    error = weight - decoded
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())
