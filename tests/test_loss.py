"""The loss: SI-SDR in the best order, silent sources, levels."""

import pytest
import torch

from asteroid_tiny.data.mixing import SILENT
from asteroid_tiny.training import SeparationSystem, separation_loss


def test_the_loss_is_negative_si_sdr_of_the_best_order():
    sources = torch.randn(2, 3, 800)
    estimates = sources + 0.1 * torch.randn_like(sources)  # 20 dB
    loss = separation_loss(estimates, sources)
    assert loss.item() == pytest.approx(-20, abs=1)
    assert separation_loss(estimates[:, [2, 0, 1]], sources).item() == pytest.approx(loss.item())
    assert separation_loss(3 * estimates.bfloat16(), sources).item() == pytest.approx(-20, abs=1)


@pytest.mark.parametrize(
    "setting, costs",
    [
        ({"silent_sources": 0.0, "turns": 0.0}, False),
        ({"silent_sources": 0.2}, True),
        ({"turns": 0.2}, True),
    ],
)
def test_an_output_that_is_always_soft_costs_where_sources_may_be_silent(setting, costs):
    sources = torch.randn(2, 3, 800)
    soft = torch.tensor([[1.0], [1.0], [0.03]])

    class Soft(torch.nn.Linear):
        def forward(self, mixture):
            return soft * (sources + 0.1 * sources.roll(1, dims=-1))

    model = Soft(1, 1)
    system = SeparationSystem(
        model, torch.optim.SGD(model.parameters()), separation_loss, [], config=setting
    )
    batch = sources.sum(1), sources
    assert (system.common_step(batch, 0).item() > -15) == costs
    assert system.common_step(batch, 0, train=False).item() == pytest.approx(-20, abs=0.5)
    soft[2] = 1  # as loud as the others
    assert system.common_step(batch, 0).item() == pytest.approx(-20, abs=0.5)


def test_the_loss_is_not_rounded_under_bf16_autocast():
    sources = torch.randn(4, 2, 800)
    estimates = sources + 0.2 * torch.randn_like(sources)
    with torch.autocast("cpu", torch.bfloat16):
        loss = separation_loss(estimates, sources)
    assert loss.item() == separation_loss(estimates, sources).item()


def test_items_beyond_30_db_teach_nothing():
    sources = torch.randn(1, 2, 800)
    estimates = (sources + 0.003 * torch.randn_like(sources)).requires_grad_()
    separation_loss(estimates, sources).backward()
    assert not estimates.grad.any()


def test_silent_sources_cost_what_their_estimates_hold():
    sources = torch.randn(2, 3, 800)
    sources[:, 1:] = 0
    estimates = sources[:, [1, 0, 2]].clone()
    assert separation_loss(estimates, sources).item() == pytest.approx(-30)
    estimates[:, 0] = 0.1 * sources[:, 0]  # a hundredth of the energy: 20 dB below the rest
    wanted = (-30 - 20 - 30) / 3
    assert separation_loss(estimates, sources).item() == pytest.approx(wanted, abs=0.2)
    assert separation_loss(7 * estimates, sources).item() == pytest.approx(wanted, abs=0.2)
    estimates.requires_grad_()
    separation_loss(estimates, sources).backward()
    moved = estimates - 0.01 * estimates.grad
    assert moved[:, 0].norm() < estimates[:, 0].norm()
    assert estimates.grad.isfinite().all()


def test_a_source_of_rounding_noise_is_silent():
    sources = torch.randn(2, 2, 800)
    sources[:, 1] *= 0.5 * SILENT
    estimates = torch.stack([sources[:, 0], torch.zeros(2, 800)], 1)
    assert separation_loss(estimates, sources).item() == pytest.approx(-30)


def test_levels_that_are_kept_are_those_beside_each_other():
    sources = torch.randn(2, 3, 800)
    estimates = sources + 0.1 * torch.randn_like(sources)
    gains = torch.tensor([7.0, 0.2])[:, None, None]  # of each mixture its own
    loss = separation_loss(gains * estimates, sources, keep_levels=True)
    assert loss.item() == pytest.approx(-20, abs=0.5)
    others = separation_loss(gains * estimates[:, [2, 0, 1]], sources, keep_levels=True)
    assert others.item() == pytest.approx(loss.item())
