"""Muon in float32: it does what torch's does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket.training import muon


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 9))
def test_singular_values_come_near_1(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    found = torch.linalg.svdvals(muon.orthogonal(torch.randn(rows, columns)))
    assert found.max() < 1.4
    assert found.median() > 0.5


def test_steps_are_those_of_torch_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(48, 16), torch.randn(5, 48, 16)
    ends = []
    for kind in (muon.Muon, torch.optim.Muon):
        matrix = torch.nn.Parameter(start.clone())
        optimizer = kind([matrix], lr=0.1, weight_decay=0.01, momentum=0.95)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[1].norm()
    assert ends[1].norm() > 1


def test_a_matrix_without_a_gradient_stays_and_a_state_is_kept() -> None:
    one, other = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 3))
    optimizer = muon.Muon([one, other], 0.1)
    one.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(other, torch.ones(3, 3))
    again = muon.Muon([one, other], 0.1)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[one]["momentum_buffer"], optimizer.state[one]["momentum_buffer"])
