"""Linear CKA against its definition by centred Gram matrices, and what leaves it unchanged."""

import math

import pytest
import torch

from apical.diagnostics.similarity import cka_matrix, linear_cka


@pytest.mark.parametrize(("n", "d", "e"), [(30, 4, 6), (8, 50, 3)])
def test_cka_is_that_of_the_centred_gram_matrices(n: int, d: int, e: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(n, d).double(), torch.randn(n, e).double()
    centring = torch.eye(n).double() - 1 / n
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-10)


def test_rotations_scales_and_shifts_do_not_matter_and_constants_have_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5).double()
    turned = x @ torch.linalg.qr(torch.randn(5, 5).double())[0] * 3 + 7
    assert linear_cka(x, turned) == pytest.approx(1.0, rel=1e-12)
    assert math.isnan(linear_cka(x, torch.ones(20, 2)))
    assert cka_matrix([x, turned], [x]).flatten().tolist() == pytest.approx([1.0, 1.0])
