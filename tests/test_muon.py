"""Muon in float32 equals its formula, and torch's Muon up to the precision of bfloat16."""

import pytest
import torch

from nanoloop import muon
from nanoloop.muon import Muon, orthogonalise

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # published, kellerjordan.github.io/posts/muon
SHAPES = [(6, 6), (5, 8), (4, 12), (12, 4)]


@pytest.mark.parametrize('shape', SHAPES)
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalise(x, COEFFICIENTS, 5, 1e-7), u @ s.diag() @ v, rtol=0, atol=1e-12)


def test_many_steps_lose_little_in_float32():
    """Of a long matrix with singular values from 1 to 1e-5. The product of all steps would be off by 0.3."""
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(n, 16, dtype=torch.float64, generator=generator))[0] for n in (16, 64)
    )
    x = u @ torch.logspace(0, -5, 16, dtype=torch.float64).diag() @ v.T
    exact = orthogonalise(x, COEFFICIENTS, 8, 1e-7)
    assert (orthogonalise(x.float(), COEFFICIENTS, 8, 1e-7) - exact).norm() < 0.01 * exact.norm()


def trained(optimizer_class, steps):
    """Returns parameters after some steps with random gradients, and the optimizer."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    unused = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = optimizer_class([*params, unused], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize('native', [torch.float32, torch.float16, torch.bfloat16])
def test_a_step_is_that_of_torch_in_the_precision_that_the_device_is_fast_in(monkeypatch, native):
    monkeypatch.setattr(muon, 'choose_dtype', lambda dtype, kind: (native, ''))
    (ours, optimizer), (theirs, torchs) = trained(Muon, 4), trained(torch.optim.Muon, 4)
    tolerance = 0 if native == torch.bfloat16 else 0.02  # of 4 steps of about 0.1, in bfloat16: 8 bits
    difference = max((p - q).abs().max().item() for p, q in zip(ours, theirs, strict=True))
    assert difference <= tolerance and (difference > 0) == (native != torch.bfloat16)
    state, reference = optimizer.state_dict()['state'], torchs.state_dict()['state']
    assert state.keys() == reference.keys()
    for i, values in reference.items():  # no product is in the momentum
        assert torch.allclose(state[i]['momentum_buffer'], values['momentum_buffer'], rtol=0, atol=1e-6)
