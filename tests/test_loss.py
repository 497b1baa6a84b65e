"""The losses against the original's plain formula, values worked by hand, and the ends of the number range."""

import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from retina_seg import loss
from retina_seg.loss import DiceBCELoss, DiceLoss, dice_bce_loss, dice_loss


def original_dice(logits, targets, smooth=1.0):
    """The original notebook's formula: sigmoid, flatten the batch, plain sums."""
    p, t = torch.sigmoid(logits).reshape(-1), targets.reshape(-1)
    return 1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth)


def original_dice_bce(logits, targets, smooth=1.0):
    plain = F.binary_cross_entropy(torch.sigmoid(logits).reshape(-1), targets.reshape(-1), reduction="mean")
    return original_dice(logits, targets, smooth) + plain


def random_case(seed, shape=(3, 1, 7, 11), fractions=False):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(shape, generator=generator)
    return 3 * torch.randn(shape, generator=generator), targets if fractions else (targets < 0.2).float()


PAIRS = [(DiceLoss(), original_dice), (DiceBCELoss(), original_dice_bce)]


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize(("module", "formula"), PAIRS)
def test_equals_the_original_formula(module, formula, fractions):
    for seed in range(5):
        logits, targets = random_case(seed, fractions=fractions)
        expected = formula(logits.double(), targets.double()).item()
        assert module(logits, targets).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("module", "formula"), PAIRS)
def test_has_the_gradient_of_the_original_formula(module, formula):
    logits, targets = random_case(1)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    module(ours, targets).backward()
    formula(theirs, targets).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("smooth", [0.5, 1, 10])
@pytest.mark.parametrize(("module", "formula"), PAIRS)
def test_smooth_is_the_third_argument_as_in_the_original(module, formula, smooth):
    logits, targets = random_case(2)
    expected = formula(logits.double(), targets.double(), smooth).item()
    assert module(logits, targets, smooth).item() == pytest.approx(expected, abs=1e-6)
    assert module(logits, targets, smooth=smooth).item() == module(logits, targets, smooth).item()


def test_smooth_is_one_unless_told():
    logits, targets = random_case(3)
    for module, _ in PAIRS:
        assert module(logits, targets).item() == module(logits, targets, smooth=1).item()
        assert module(logits, targets).item() != module(logits, targets, smooth=2).item()


def test_four_pixels_by_hand():
    # p = 1/2, 1/2, 3/4, 1/4 and t = 1, 0, 1, 0: overlap 5/4, sums 2 and 2
    third = math.log(3)  # sigmoid(log 3) = 3/4
    logits, targets = torch.tensor([0.0, 0.0, third, -third]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    dice = 1 - (2 * 1.25 + 1) / (2 + 2 + 1)
    bce = (2 * math.log(2) + 2 * math.log(4 / 3)) / 4
    assert dice_loss(logits, targets).item() == pytest.approx(dice, abs=1e-6)
    assert dice_bce_loss(logits, targets).item() == pytest.approx(dice + bce, abs=1e-6)


def test_the_batch_is_one_heap_of_pixels_not_a_mean_over_photos():
    logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    together = dice_loss(logits, targets).item()
    assert together == pytest.approx(dice_loss(logits.flatten(), targets.flatten()).item(), abs=1e-7)
    one_by_one = sum(dice_loss(a, b).item() for a, b in zip(logits, targets, strict=True)) / 2
    assert abs(together - one_by_one) > 0.01


def test_perfect_overlap_costs_nothing():
    _, targets = random_case(4)
    logits = torch.where(targets > 0, 50.0, -50.0)
    assert dice_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert dice_bce_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)


def test_no_overlap_costs_nearly_one_in_dice_and_the_logit_in_cross_entropy():
    targets = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    logits = torch.where(targets > 0, -50.0, 50.0)
    assert dice_loss(logits, targets).item() == pytest.approx(1 - 1 / (3 + 3 + 1), abs=1e-6)
    assert dice_bce_loss(logits, targets).item() == pytest.approx(6 / 7 + 50, abs=1e-4)


def test_dice_lies_between_nought_and_one_and_the_sum_above_it():
    for seed in range(20):
        logits, targets = random_case(seed)
        dice, both = dice_loss(10 * logits, targets).item(), dice_bce_loss(10 * logits, targets).item()
        assert 0 <= dice < 1
        assert both > dice


def test_a_better_prediction_costs_less():
    _, targets = random_case(5)
    sign = 2 * targets - 1
    for function in (dice_loss, dice_bce_loss):
        costs = [function(sure * sign, targets).item() for sure in (-4.0, -1.0, 0.0, 1.0, 4.0)]
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == len(costs)


def test_an_empty_label_is_finite_and_pulls_down():
    logits = torch.zeros(4, requires_grad=True)
    cost = dice_bce_loss(logits, torch.zeros(4))
    assert cost.item() == pytest.approx(1 - 1 / 3 + math.log(2), abs=1e-6)  # p sums to 2
    cost.backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("wrong", [-100.0, 100.0])
def test_gradients_at_extreme_wrong_logits_are_finite_and_point_back(wrong):
    targets = torch.full((6,), float(wrong < 0))
    logits = torch.full((6,), wrong, requires_grad=True)
    dice_bce_loss(logits, targets).backward()
    assert torch.isfinite(logits.grad).all()
    # the cross-entropy's gradient, (p - t) / n; the original's has died here
    torch.testing.assert_close(logits.grad, torch.full((6,), math.copysign(1 / 6, wrong)))
    dead = torch.full((6,), wrong, requires_grad=True)
    original_dice_bce(dead, targets).backward()
    assert not (dead.grad != 0).any()


@pytest.mark.parametrize("function", [dice_loss, dice_bce_loss])
def test_works_under_bfloat16_autocast_with_a_float32_result(function):
    logits, targets = random_case(6)
    rounded = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cost = function(rounded, targets)
    cost.backward()
    assert cost.dtype == torch.float32
    assert cost.item() == pytest.approx(function(rounded.detach().float(), targets).item(), abs=1e-6)
    assert torch.isfinite(rounded.grad).all()
    assert rounded.grad.abs().sum() > 0


def test_half_precision_sums_do_not_overflow_or_stall():
    # 70,000 vessel pixels: a float16 sum is inf, a bfloat16 sum stops counting at 256
    targets = torch.ones(70_000)
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.zeros(70_000, dtype=dtype)
        assert dice_loss(logits, targets.to(dtype)).item() == pytest.approx(1 - 70_001 / 105_001, abs=1e-5)


@pytest.mark.parametrize("other", [(2, 1, 4), (2, 4, 4), (2, 1, 4, 5), (1, 1, 4, 4), (32,)])
@pytest.mark.parametrize("function", [dice_loss, dice_bce_loss])
def test_another_shape_is_refused_even_where_it_would_broadcast(function, other):
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*differ in shape"):
        function(torch.zeros(2, 1, 4, 4), torch.zeros(other))


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(loss)
    assert result.attempted >= 2
    assert result.failed == 0
