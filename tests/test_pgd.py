"""The one PGD loop: optimum of a linear objective, budget on whole levels, masks, zero steps, warnings."""

import warnings

import pytest
import torch

from szt_utils.errors import InputError
from szt_utils.images import from_pil, to_pil
from szt_utils.pgd import (
    pgd,
    project_box,
    project_l2,
    project_linf,
    random_start,
    rms,
    round_to_levels,
    warn_if_unmoved,
)


def images_of(count: int = 2, side: int = 8, seed: int = 0) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    levels[:, :, 0, 0], levels[:, :, 0, 1] = 0, 255  # the box must be felt
    return levels / 255


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def linear(weights: torch.Tensor):
    """The objective <weights, x>: its constrained optimum is x + eps * sign(weights), clipped to the box."""
    return lambda images: (weights.expand_as(images), (weights * images).sum((1, 2, 3)))


def levels_moved(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Difference in whole levels of what an 8-bit file holds."""
    return (from_pil(to_pil(after)) * 255).round().int() - (before * 255).round().int()


@pytest.fixture
def weights():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("ascend", [True, False])
@pytest.mark.parametrize("start", [False, True])
def test_reaches_the_optimum_of_a_linear_objective(weights, ascend, start):
    x = images_of()
    result = pgd(x, linear(weights), eps=5, step_size=1, steps=12, ascend=ascend,
                 generators=generators() if start else None)
    sign = weights.sign() if ascend else -weights.sign()
    assert torch.allclose(result, (x + 5 / 255 * sign).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("eps,step_size,steps", [(1, 0.3, 5), (4, 0.7, 3), (16, 2.5, 10), (0, 1, 3)])
def test_budget_holds_in_whole_levels(eps, step_size, steps):
    x, noise = images_of(), torch.Generator().manual_seed(3)
    seen = []

    def wandering(images):
        seen.append(images)
        return torch.randn(images.shape, generator=noise), torch.zeros(len(images))

    result = pgd(x, wandering, eps=eps, step_size=step_size, steps=steps, generators=generators())
    assert torch.allclose(result * 255, (result * 255).round(), atol=1e-4) and result.dtype == torch.float32
    assert levels_moved(result, x).abs().max() <= eps and 0 <= result.min() and result.max() <= 1
    assert len(seen) == steps
    assert all((images - x).abs().max() <= eps / 255 + 1e-6 and images.min() >= 0 and images.max() <= 1
               for images in seen)


@pytest.mark.parametrize("ascend", [True, False])
def test_reaches_the_optimum_of_a_linear_objective_in_l2(weights, ascend):
    x = torch.full((2, 3, 8, 8), 128 / 255)
    result = pgd(x, linear(weights), eps=9, step_size=2, steps=40, ascend=ascend, norm="l2",
                 generators=generators())
    best = 9 * weights / weights.square().mean().sqrt() * (1 if ascend else -1)
    assert (levels_moved(result, x) - best).abs().max() < 1  # rounding, and a little shrinking for the budget


@pytest.mark.parametrize("eps,step_size,steps", [(1, 0.3, 5), (2, 0.144, 30), (16, 2.5, 10), (0, 1, 3)])
def test_the_l2_budget_holds_in_whole_levels(eps, step_size, steps):
    x, noise = images_of(), torch.Generator().manual_seed(3)
    steady = torch.randn(x.shape, generator=noise)

    def unsteady(images):
        return steady + 0.1 * torch.randn(x.shape, generator=noise), torch.zeros(2)

    result = pgd(x, unsteady, eps=eps, step_size=step_size, steps=steps, norm="l2", generators=generators())
    moved = levels_moved(result, x)
    assert torch.allclose(result * 255, (result * 255).round(), atol=1e-4)
    assert (rms(moved) <= eps).all() and (rms(moved) >= 0.85 * eps).all()
    assert moved.abs().max() > eps or eps == 0  # not an L-inf budget


def test_l2_is_invariant_to_the_scale_of_the_gradient(weights):
    x = torch.full((1, 3, 8, 8), 100 / 255)
    results = [pgd(x, linear(weights * scale), eps=8, step_size=3, steps=2, norm="l2")
               for scale in (1e-12, 1, 1e12)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert rms(levels_moved(results[1], x)).item() == pytest.approx(6, abs=0.1)


def test_a_linear_schedule_falls_to_a_hundredth(weights):
    x = torch.full((1, 3, 8, 8), 100 / 255)
    result = pgd(x, linear(weights), eps=255, step_size=10, steps=4, schedule="linear")
    # 10 (1 + 0.7525 + 0.505 + 0.2575)
    assert (levels_moved(result, x) == 25 * weights.sign()).all()


def test_unknown_norms_and_schedules_list_the_choices(weights):
    with pytest.raises(InputError, match="norm 'l1'; choose from: linf, l2"):
        pgd(images_of(), linear(weights), eps=1, step_size=1, steps=1, norm="l1")
    with pytest.raises(InputError, match="schedule 'cosine'; choose from: constant, linear"):
        pgd(images_of(), linear(weights), eps=1, step_size=1, steps=1, schedule="cosine")


def test_one_step_has_the_length_of_the_step(weights):
    x = torch.full((1, 3, 8, 8), 100 / 255)
    assert (levels_moved(pgd(x, linear(weights), eps=16, step_size=3, steps=1), x)
            == 3 * weights.sign()).all()


def test_zero_steps_are_the_identity_even_with_generators():
    x = images_of()

    def never(images):
        raise AssertionError("no gradient is needed")

    assert torch.equal(pgd(x, never, eps=16, step_size=1, steps=0, generators=generators()), x)


def test_nothing_changes_outside_the_mask(weights):
    x, mask = images_of(), torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 2:5], mask[1, :, 4:, :] = 1, 1
    result = pgd(x, linear(weights), eps=6, step_size=1, steps=13, mask=mask, generators=generators())
    outside = (mask == 0).expand_as(x)
    assert torch.equal(result[outside], x[outside])
    inside = ~outside & (x > 6 / 255) & (x < 249 / 255)
    assert inside.any() and (levels_moved(result, x)[inside].abs() == 6).all()


def test_the_perturbation_stays_float32_under_a_bfloat16_gradient(weights):
    x = torch.full((1, 3, 8, 8), 250 / 255)
    coarse = linear(weights.bfloat16())
    result = pgd(x, lambda images: coarse(images.bfloat16()), eps=4, step_size=0.25, steps=8)
    assert result.dtype == torch.float32
    # Eight quarters of a level, none of them lost.
    assert (levels_moved(result, x) == 2 * weights.sign()).all()


def test_projections_and_rounding():
    x, delta = images_of(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert project_linf(delta, 3).abs().max() == torch.tensor(3 / 255)
    inside = project_box(delta, x)
    assert (x + inside).min() >= 0 and (x + inside).max() <= 1
    free = (x + delta > 0) & (x + delta < 1)
    assert torch.equal(inside[free], delta[free]) and free.any() and (~free).any()
    small = project_l2(delta / 255, 0.5)
    assert rms(small * 255).flatten().tolist() == pytest.approx([0.5, 0.5])
    # The nearest point is a scaled one.
    assert torch.allclose(small[0] / delta[0], (small[0] / delta[0]).mean())
    assert torch.equal(project_l2(small, 0.6), small)
    assert torch.equal(round_to_levels(torch.tensor([1.4, -2.6, 16.0]) / 255),
                       torch.tensor([1.0, -3.0, 16.0]) / 255)


def test_random_start_is_each_images_own_and_leaves_the_global_state():
    x, state = images_of(3), torch.get_rng_state()
    start = random_start(x, 8, generators(3))
    alone = random_start(x[2:], 8, generators(3)[2:])
    assert torch.equal(start[2:], alone) and not torch.equal(start[0], start[1])
    assert torch.equal(torch.get_rng_state(), state)
    levels = start * 255
    assert -8 <= levels.min() < -7 and 7 < levels.max() <= 8 and levels.mean().abs() < 1


def test_values_are_reported_at_every_step(weights):
    seen = []
    pgd(images_of(), linear(weights), eps=8, step_size=1, steps=4, on_step=seen.append)
    assert len(seen) == 4 and all((later > earlier).all()
                                  for earlier, later in zip(seen, seen[1:], strict=False))


def test_failures_are_reported(weights):
    x = images_of()
    # Only the second image has no gradient.
    partly = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    with pytest.warns(UserWarning, match="zero in 3 of 3 steps"):
        pgd(x, lambda images: (partly, torch.zeros(2)), eps=4, step_size=1, steps=3)
    with pytest.raises(InputError, match="not finite at step 1 of 3"):
        pgd(x, lambda images: (partly * float("nan"), torch.zeros(2)), eps=4, step_size=1, steps=3)
    with pytest.warns(UserWarning, match="did not rise"):
        warn_if_unmoved(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]))
    with pytest.warns(UserWarning, match="did not fall"):
        warn_if_unmoved(torch.tensor([1.0]), torch.tensor([2.0]), ascend=False)
    with pytest.warns(UserWarning, match="did not rise"):
        warn_if_unmoved(torch.tensor([1.0]), torch.tensor([float("nan")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(x, linear(weights), eps=4, step_size=1, steps=3)
        warn_if_unmoved(torch.tensor([1.0]), torch.tensor([2.0]))


@pytest.mark.parametrize("wrong,message", [
    (dict(eps=0.5), "whole number"), (dict(eps=-1), "whole number"), (dict(eps=256), "whole number"),
    (dict(step_size=0), "step size"), (dict(steps=-1), "steps"),
    (dict(generators=generators(1)), "own generator"),
])
def test_impossible_budgets_are_refused(weights, wrong, message):
    with pytest.raises(InputError, match=message):
        pgd(images_of(), linear(weights), **{**dict(eps=4, step_size=1, steps=3), **wrong})


def test_images_must_be_float32(weights):
    with pytest.raises(InputError, match="float32"):
        pgd(images_of().bfloat16(), linear(weights), eps=4, step_size=1, steps=3)
