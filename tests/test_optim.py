"""Muon against its definition by singular values and torch's AdamW; the EMA weights and the schedule by hand."""

import copy

import pytest
import torch
from torch import nn

from retina_seg.config import TrainConfig
from retina_seg.model import build_model
from retina_seg.optim import EMA, Muon, learning_rate_factor, make_optimizer, orthogonalized


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_with(optimizer, model, *gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


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
    assert not orthogonalized(torch.zeros(4, 7)).any()


def test_a_step_is_that_of_the_formula():
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.grad, bias = drawn(6, 4, 3, 3), layer.bias.detach().clone()
    before, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    Muon(layer.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9).step()
    momentum = 0.1 * gradient
    matrix = (0.1 * gradient + 0.9 * momentum).reshape(6, 36)
    expected = 0.95 * before - 0.1 * 0.2 * 6 * orthogonalized(matrix).reshape(6, 4, 3, 3)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.bias, bias)  # a parameter without a gradient stays
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
        step_with(ours, model, *gradients)
        step_with(theirs, other, *gradients)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


def test_what_is_taken_as_a_matrix_in_the_fast_network():
    model = build_model("fast_attention_unet", width=8, deepest=8, fine=8)
    matrices, others = (set(map(id, group["params"])) for group in Muon(model.parameters()).param_groups)
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and parameter.dim() == 4 and name != "fine.1.weight"
        assert (id(parameter) in matrices, id(parameter) in others) == (is_matrix, not is_matrix), name


def test_the_optimizer_is_the_configs():
    model = nn.Conv2d(3, 4, 3)
    adam, adamw = torch.optim.Adam, torch.optim.AdamW
    for changes, kind in (({"optimizer": "muon"}, Muon), ({"weight_decay": 0.0}, adam), ({"weight_decay": 0.3}, adamw)):
        optimizer = make_optimizer(model, TrainConfig(**{"learning_rate": 0.07, "weight_decay": 0.3, **changes}))
        assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == 0.07
        assert optimizer.param_groups[0]["weight_decay"] == changes.get("weight_decay", 0.3)


def test_ema_weights_follow_the_formula_and_copy_counters():
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3)
        model.num_batches_tracked.fill_(7)
    ema.update(model, step=1)  # decay min(0.5, 2/11): 9/11 of the new weight, which was 1
    assert ema.model.weight.item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    ema.update(model, step=1000)  # decay 0.5
    assert ema.model.weight.item() == pytest.approx((1 * 2 / 11 + 3 * 9 / 11 + 3) / 2)
    assert ema.model.num_batches_tracked.item() == 7 and not ema.model.training and not ema.model.weight.requires_grad


def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[:11] == pytest.approx([*(k / 10 for k in range(1, 11)), 1])
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(7, 10, None) == 1
