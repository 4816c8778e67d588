"""Multiply-adds against counting by hand."""

import torch
import torch.nn.functional as F
from torch import nn

import apical
from apical.diagnostics.cost import multiply_adds

BATCH, SIZES = 16, (12, 9, 7, 5)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5))


def step(rule: apical.CreditRule) -> None:
    rule(torch.randn(BATCH, 12), torch.randint(5, (BATCH,))).backward()


def test_backpropagation_is_three_forward_passes_less_an_error_for_the_input() -> None:
    forward = 12 * 9 + 9 * 7 + 7 * 5
    rule = apical.Backprop(network())
    assert multiply_adds(lambda: step(rule)) == BATCH * (3 * forward - 12 * 9)


def test_direct_feedback_sends_outputs_to_every_hidden_unit() -> None:
    rule = apical.DirectFeedbackAlignment(network())
    step(rule)
    forward = 12 * 9 + 9 * 7 + 7 * 5
    assert multiply_adds(lambda: step(rule)) == BATCH * (2 * forward + 5 * (9 + 7))


def test_the_explicit_product_costs_what_its_two_matrices_cost() -> None:
    rule = apical.ProductFeedbackAlignment(network(), expansion=3, form="literal")
    step(rule)
    forward, transport = 12 * 9 + 9 * 7 + 7 * 5, 3 * (7 * 7 + 7 * 9) + 3 * (5 * 5 + 5 * 7)
    plastic = 3 * 7 * 9 + 3 * 5 * 7  # gradients of R, outer products over the batch
    assert multiply_adds(lambda: step(rule)) == BATCH * (2 * forward + transport + plastic)


def test_convolutions() -> None:
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6)
    assert multiply_adds(lambda: layer(x)) == 2 * 36 * 8 * 3 * 9


def test_vectors_and_other_forms() -> None:
    matrix, vector = torch.ones(4, 6), torch.ones(6)
    assert multiply_adds(lambda: matrix @ vector) == 24
    assert multiply_adds(lambda: F.linear(torch.ones(5, 6), matrix)) == 120
    assert multiply_adds(lambda: torch.einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5))) == 120
    assert multiply_adds(lambda: torch.ones(9) * torch.ones(9)) == 0
