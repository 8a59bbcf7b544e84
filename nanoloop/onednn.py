"""
Matrix products on a CPU: with oneDNN where that is faster than what torch would take, else without it.
"""

import contextlib

import torch

ONEDNN_MIN_TOKENS = 3


@contextlib.contextmanager
def onednn_for(n_tokens):
    """Switches oneDNN off for fewer than ONEDNN_MIN_TOKENS tokens, while the block runs.

    On a CPU matrix products of a single bfloat16 token are then 1.5 times as fast.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and n_tokens >= ONEDNN_MIN_TOKENS
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


ONEDNN_MIN_WEIGHTS = 2**17  # 384 x 384 gain, 384 x 128 lose


def onednn_linear_is_faster(weight):
    """Returns whether onednn_linear can multiply by a weight, and gains: on x86, in float32."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    x86 = weight.device.type == 'cpu' and torch.backends.cpu.get_cpu_capability().startswith('AVX')
    return exists and x86 and weight.dtype == torch.float32 and weight.numel() >= ONEDNN_MIN_WEIGHTS


def onednn_linear(x, weight, bias):
    """Returns F.linear(x, weight, bias) by oneDNN, up to rounding, without a gradient.

    In float32 torch takes MKL, which is slower for few rows (nanoloop/decode.py has a product for one row).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
