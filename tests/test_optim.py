"""Muon against its definition by singular values, and its other half against torch's AdamW."""

import copy
import doctest

import pytest
import torch
from torch import nn

from retina_seg import optim
from retina_seg.model import build_model
from retina_seg.optim import Muon, orthogonalized


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(model, *gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    return model


@pytest.mark.parametrize("shape", [(8, 8), (8, 72), (72, 8), (1, 5), (5, 1)])
def test_directions_stay_and_their_lengths_become_one(shape):
    matrix = drawn(*shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    lengths = u.T @ orthogonalized(matrix) @ vh.T
    inside = lengths.diagonal()
    torch.testing.assert_close(lengths - inside.diag(), torch.zeros_like(lengths), atol=1e-4, rtol=0)
    assert inside.min() > 0.6 and inside.max() < 1.25


@pytest.mark.parametrize("smallest", [1, 1e-2, 1e-4, 1e-6, 0])
def test_faint_directions_end_where_the_iteration_on_the_matrix_itself_has_them(smallest):
    u, v = (torch.linalg.qr(drawn(side, 16, seed=side)).Q for side in (16, 144))
    matrix = u @ torch.linspace(smallest, 1, 16).pow(3).diag() @ v.T
    x = (matrix / matrix.norm()).double()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    torch.testing.assert_close(orthogonalized(matrix).double(), x, atol=5e-4, rtol=0)


def test_the_size_of_a_gradient_does_not_matter_and_zeros_stay():
    matrix = drawn(6, 20)
    torch.testing.assert_close(orthogonalized(matrix * 1e4), orthogonalized(matrix), atol=1e-4, rtol=1e-4)
    assert torch.equal(orthogonalized(torch.zeros(4, 7)), torch.zeros(4, 7))


def test_a_step_is_that_of_the_formula():
    layer = with_gradients(nn.Conv2d(4, 6, 3, bias=False), drawn(6, 4, 3, 3))
    before, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    Muon(layer.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9).step()
    momentum = 0.1 * gradient
    matrix = (0.1 * gradient + 0.9 * momentum).reshape(6, 36)
    expected = 0.95 * before - 0.1 * 0.2 * 6 * orthogonalized(matrix).reshape(6, 4, 3, 3)
    torch.testing.assert_close(layer.weight.detach(), expected)
    # as large as a step of AdamW's usually is: about 0.2 times the learning rate for each weight
    step = (layer.weight.detach() - 0.95 * before) / 0.1
    assert 0.1 < step.square().mean().sqrt() < 0.3


def test_the_other_parameters_take_the_steps_of_adamw():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3))  # a convolution with one output is no matrix
    other = copy.deepcopy(model)
    ours = Muon(model.parameters(), lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    assert [group["muon"] for group in ours.param_groups] == [False]
    for step in range(5):
        gradients = [drawn(*parameter.shape, seed=step) for parameter in model.parameters()]
        with_gradients(model, *gradients), with_gradients(other, *gradients)
        ours.step(), theirs.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


def test_what_is_taken_as_a_matrix_in_the_fast_network():
    model = build_model("fast_attention_unet", width=8, deepest=8, fine=8)
    matrices, others = (set(map(id, group["params"])) for group in Muon(model.parameters()).param_groups)
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and parameter.dim() == 4 and name != "fine.1.weight"
        assert (id(parameter) in matrices, id(parameter) in others) == (is_matrix, not is_matrix), name


def test_a_parameter_without_a_gradient_stays():
    layer = nn.Linear(3, 2)
    layer.weight.grad = drawn(2, 3)
    bias = layer.bias.detach().clone()
    Muon(layer.parameters(), weight_decay=0.1).step()
    assert torch.equal(layer.bias, bias)


def test_its_state_goes_on_where_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    first = Muon(model.parameters(), lr=0.01)
    gradients = [[drawn(*p.shape, seed=seed) for p in model.parameters()] for seed in range(3)]
    with_gradients(model, *gradients[0])
    first.step()
    other = copy.deepcopy(model)
    second = Muon(other.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in gradients[1:]:
        for network, optimizer in ((model, first), (other, second)):
            with_gradients(network, *step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_it_goes_downhill_in_turned_and_uneven_valleys():
    inputs = drawn(256, 16) * torch.logspace(0, -1, 16) @ torch.linalg.qr(drawn(16, 16, seed=2)).Q
    target = inputs @ drawn(16, 8, seed=1)
    layer = nn.Linear(16, 8, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.1)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        loss = (layer(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1000


def test_examples():
    result = doctest.testmod(optim, extraglobs={"torch": torch})
    assert result.attempted and not result.failed
