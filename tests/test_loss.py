"""The losses against the original's plain formula, values worked by hand, and the ends of the number range."""

import doctest
import math

import pytest
import torch
from torch.nn import functional as F

from retina_seg import loss
from retina_seg.loss import LOSSES, DiceBCELoss, DiceLoss, dice_bce_loss, dice_loss, distillation_loss


def original_dice(logits, targets, smooth=1.0):
    """The original notebook's formula: sigmoid, flatten the batch, plain sums."""
    p, t = torch.sigmoid(logits).reshape(-1), targets.reshape(-1)
    return 1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth)


def original_dice_bce(logits, targets, smooth=1.0):
    return original_dice(logits, targets, smooth) + F.binary_cross_entropy(torch.sigmoid(logits), targets)


def random_case(seed, fractions=False):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(3, 1, 7, 11, generator=generator)
    return 3 * torch.randn(3, 1, 7, 11, generator=generator), targets if fractions else (targets < 0.2).float()


PAIRS = [(DiceLoss(), original_dice), (DiceBCELoss(), original_dice_bce)]


@pytest.mark.parametrize("smooth", [0.5, 1, 10])
@pytest.mark.parametrize(("module", "formula"), PAIRS)
def test_equals_the_original_formula_and_its_gradient(module, formula, smooth):
    for seed in range(5):
        logits, targets = random_case(seed, fractions=seed % 2 == 1)
        expected = formula(logits.double(), targets.double(), smooth).item()
        assert module(logits, targets, smooth).item() == pytest.approx(expected, abs=1e-6)
        assert (module(logits, targets).item() == module(logits, targets, smooth=smooth).item()) == (smooth == 1)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        module(ours, targets, smooth).backward()
        formula(theirs, targets, smooth).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_four_pixels_by_hand():
    # p = 1/2, 1/2, 3/4, 1/4 and t = 1, 0, 1, 0: overlap 5/4, sums 2 and 2; sigmoid(log 3) = 3/4
    logits, targets = torch.tensor([0.0, 0.0, math.log(3), -math.log(3)]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    dice, bce = 1 - (2 * 1.25 + 1) / (2 + 2 + 1), (2 * math.log(2) + 2 * math.log(4 / 3)) / 4
    assert dice_loss(logits, targets).item() == pytest.approx(dice, abs=1e-6)
    assert dice_bce_loss(logits, targets).item() == pytest.approx(dice + bce, abs=1e-6)


def test_perfect_overlap_costs_nothing_and_none_costs_nearly_one_and_the_logit():
    targets = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    logits = torch.where(targets > 0, 50.0, -50.0)
    assert dice_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert dice_bce_loss(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(-logits, targets).item() == pytest.approx(1 - 1 / (3 + 3 + 1), abs=1e-6)
    assert dice_bce_loss(-logits, targets).item() == pytest.approx(6 / 7 + 50, abs=1e-4)


@pytest.mark.parametrize("wrong", [-100.0, 100.0])
def test_gradients_at_extreme_wrong_logits_are_finite_and_point_back(wrong):
    targets = torch.full((6,), float(wrong < 0))
    logits, dead = (torch.full((6,), wrong, requires_grad=True) for _ in range(2))
    dice_bce_loss(logits, targets).backward()
    # the cross-entropy's gradient, (p - t) / n; the original's is 0 here
    torch.testing.assert_close(logits.grad, torch.full((6,), math.copysign(1 / 6, wrong)))
    original_dice_bce(dead, targets).backward()
    assert not (dead.grad != 0).any()
    empty = torch.zeros(4, requires_grad=True)  # p sums to 2, the mask to 0
    cost = dice_bce_loss(empty, torch.zeros(4))
    cost.backward()
    assert cost.item() == pytest.approx(1 - 1 / 3 + math.log(2), abs=1e-6) and (empty.grad > 0).all()


@pytest.mark.parametrize("function", [dice_loss, dice_bce_loss])
def test_works_under_bfloat16_autocast_with_a_float32_result(function):
    logits, targets = random_case(6)
    rounded = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cost = function(rounded, targets)
    cost.backward()
    assert cost.dtype == torch.float32 and torch.isfinite(rounded.grad).all() and rounded.grad.abs().sum() > 0
    assert cost.item() == pytest.approx(function(rounded.detach().float(), targets).item(), abs=1e-6)
    # 70,000 vessel pixels: a bfloat16 sum stops counting at 256
    ones = torch.ones(70_000, dtype=torch.bfloat16)
    assert dice_loss(0 * ones, ones).item() == pytest.approx(1 - 70_001 / 105_001, abs=1e-5)


@pytest.mark.parametrize("function", [dice_loss, dice_bce_loss])
def test_another_shape_is_refused_even_where_it_would_broadcast(function):
    for other in ((2, 1, 4), (2, 4, 4), (1, 1, 4, 4), (32,)):
        with pytest.raises(ValueError, match=r"\[2, 1, 4, 4\].*differ in shape"):
            function(torch.zeros(2, 1, 4, 4), torch.zeros(other))


def test_the_examples_in_the_docstrings_hold_and_the_registry_names_the_functions():
    assert doctest.testmod(loss) == (0, 4)
    assert (LOSSES["dice"], LOSSES["dice_bce"]) == (dice_loss, dice_bce_loss)


def test_distillation_is_the_mean_over_styles_of_the_loss_against_the_teachers_probabilities():
    logits, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0.0, 0.0]], [[math.log(3), -math.log(3)]]]])
    # p = 1/2; targets 1/2, 1/2, and 3/4, 1/4: sums of targets and of products are 1 and 1/2 in both styles
    expected = 1 - (2 * 0.5 + 1) / (1 + 1 + 1) + math.log(2)
    assert distillation_loss(logits, teacher).item() == pytest.approx(expected)
    logits.requires_grad_()
    distillation_loss(logits, teacher).backward()
    assert logits.grad[0, 1, 0, 0] < 0 < logits.grad[0, 1, 0, 1]  # towards the teacher
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(logits[:, :1], teacher)
