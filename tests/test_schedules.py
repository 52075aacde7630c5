"""The noise of schedulers against what they do to latents."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)

from szt_utils.errors import InputError
from szt_utils.models import load_model
from szt_utils.schedules import Schedule


@pytest.mark.parametrize("make, scale", [
    (DDPMScheduler, 1.0), (EulerDiscreteScheduler, 1.0), (EDMEulerScheduler, 0.5),
    (FlowMatchEulerDiscreteScheduler, 1.0)])
def test_the_signal_to_noise_ratio_is_that_of_noised_latents(make, scale):
    """Measured: the variance that `add_noise`, or the flow's mixture, leaves of signal and of noise."""
    scheduler = make()
    schedule = Schedule(scheduler)
    for t in (100, 500, 900):
        index = (schedule.t == t).nonzero().item()
        timestep = schedule.timesteps[index:index + 1]
        one, nothing = torch.full((1, 1, 1, 1), scale), torch.zeros(1, 1, 1, 1)
        noised = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else (
            lambda x, t, noise, add=scheduler.add_noise: add(x, noise, t))
        signal, noise = noised(one, timestep, nothing), noised(nothing, timestep, torch.ones(1, 1, 1, 1))
        expected = 2 * (signal.double() / noise.double()).log().item()
        assert schedule.log_snr(torch.tensor([t])).item() == pytest.approx(expected, abs=2e-3), t


def test_t_counts_the_noise():
    for make in (DDPMScheduler, EulerDiscreteScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler):
        schedule = Schedule(make())
        assert schedule.num_timesteps == len(schedule.timesteps) == 1000
        assert torch.equal(schedule.t, torch.arange(999.0, -1, -1, dtype=torch.float64))
        assert (schedule.log_snr(torch.arange(999)).diff() < 0).all()
    shifted = Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert shifted.t[0] == 999 and shifted.t[500] == pytest.approx(749, abs=1)
    assert torch.allclose(shifted.timesteps, (shifted.t + 1).float(), atol=2e-3)


@pytest.mark.parametrize("make", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_whole_timesteps_do_not_depend_on_the_steps_of_sampling(make):
    scheduler = make()
    scheduler.set_timesteps(1000 if make is HeunDiscreteScheduler else 20)  # Heun lists each step twice
    schedule = Schedule(scheduler)
    assert schedule.discrete and len(schedule.timesteps) == 1000


@pytest.mark.parametrize("make", [EulerDiscreteScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_that_samples_in_few_steps_is_refused(make):
    """Its list would leave a training ten timesteps."""
    scheduler = make()
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match="set to 10 sampling steps; train with a copy of its own, of all"):
        Schedule(scheduler)


def test_the_schedule_of_a_scheduler_is_that_of_its_model(tiny_model, tiny_flux):
    for path in (tiny_model, tiny_flux):
        model = load_model(str(path))
        schedule, timesteps = Schedule(model.scheduler), torch.tensor([3, 400, 900])
        assert torch.allclose(schedule.log_snr(timesteps), model.log_snr(timesteps).double(), atol=1e-4)


def test_other_schedulers_are_refused():
    for scheduler in (ScoreSdeVeScheduler(), DDPMWuerstchenScheduler(),
                      DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(InputError, match=f"this {type(scheduler).__name__} is not known"):
            Schedule(scheduler)
