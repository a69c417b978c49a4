"""The learning rate: it rises, halves on a plateau, falls, and goes on from its state."""

import pytest
import torch

from asteroid_tiny.schedule import Schedule, whole_epochs


def rates(schedule, n_steps, val_losses=None):
    found = []
    for step in range(n_steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
        if val_losses and (step + 1) % 2 == 0:
            schedule.observe(val_losses.pop(0))
    return found


def an_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_the_schedule_rises_halves_on_plateau_and_falls():
    schedule = Schedule(an_optimizer(), 20, warmup_steps=4, cooldown_steps=4, patience=1)
    found = rates(schedule, 20, val_losses=[-1, -2, -1, -1.5, -3, -2, -1, -1, -1, -1])
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:9] == [1.0] * 5 and found[9:15] == [0.5] * 6  # -1 and -1.5 are no better than -2
    assert found[15] == 0.25  # nor are -2 and -1 than -3
    assert found[16:] == pytest.approx([0.25, 0.1875, 0.125, 0.03125])  # falls, once more halved


def test_a_better_loss_is_the_end_of_a_plateau():
    schedule = Schedule(an_optimizer(), 20, patience=1)
    assert rates(schedule, 10, val_losses=[-2, -1, -3, -2.5])[-1] == 1.0


def test_a_loss_that_is_no_number_is_not_better():
    schedule = Schedule(an_optimizer(), 20, patience=1)
    assert rates(schedule, 8, val_losses=[-2, float("nan"), -1])[-1] == 0.5


def test_each_group_of_parameters_keeps_its_share_of_the_rate():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.01)]
    schedule = Schedule(torch.optim.SGD(groups), 10, warmup_steps=2)
    assert schedule.get_last_lr() == [0.05, 0.005]


def test_after_a_halving_a_loss_is_better_if_it_is_the_best_so_far():
    schedule = Schedule(an_optimizer(), 20, patience=0)
    assert rates(schedule, 8, val_losses=[-3, -1, -2])[-1] == 0.25


def test_the_schedule_goes_on_from_its_state():
    whole = Schedule(an_optimizer(), 10, 4, 4)
    expected = rates(whole, 10)
    first, second = (Schedule(an_optimizer(), 10, 4, 4) for _ in range(2))
    begun = rates(first, 6)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + rates(second, 4) == expected


def test_the_rate_is_not_halved_in_the_first_steps():
    def rate_after(hold_steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = Schedule(optimizer, 100, patience=0, hold_steps=hold_steps)
        for _ in range(10):
            optimizer.step(), schedule.step()
            schedule.observe(1.0)
        return schedule.get_lr()[0]

    assert rate_after(0) == 0.5**9 and rate_after(8) == 0.5**2 and rate_after(11) == 1


@pytest.mark.parametrize(
    "asked, steps, per_epoch", [(199, 200, 100), (240, 200, 100), (60, 60, 60)]
)
def test_a_training_has_the_number_of_whole_epochs_that_is_nearest(asked, steps, per_epoch):
    conf = dict(steps=asked, steps_per_epoch=100, warmup_steps=0, cooldown_steps=0)
    assert whole_epochs(conf) == {**conf, "steps": steps, "steps_per_epoch": per_epoch}


@pytest.mark.parametrize(
    "steps, ramps, expected", [(100, (5, 10), (5, 10)), (75, (100, 100), (37, 37))]
)
def test_ramps_are_shortened_where_they_do_not_fit_and_not_otherwise(steps, ramps, expected):
    names = "warmup_steps", "cooldown_steps"
    conf = dict(steps=steps, steps_per_epoch=steps, **dict(zip(names, ramps)))
    assert whole_epochs(conf) == {**conf, **dict(zip(names, expected))}


def test_after_its_end_the_rate_stays_zero():
    assert rates(Schedule(an_optimizer(), 4, cooldown_steps=2), 7)[3:] == [0.5, 0, 0, 0]
