"""Rooms: how sound dies away in them, what stays as it was, and mixtures that are heard there."""

import numpy as np
import pytest
import torch
from sounds import level

from asteroid_tiny.data import (
    DynamicMixtures,
    InRooms,
    MixtureList,
    draw_list,
    write_list,
)
from asteroid_tiny.data.rooms import DECAY, DIRECT, FIRST, in_a_room

RATE = 8000


def responses(seed, n_src=2):
    """What two clicks become in a room, the direct sound at 1."""
    clicks = torch.zeros(n_src, RATE)
    clicks[:, 0] = 1
    heard = in_a_room(clicks, np.random.default_rng(seed), RATE).numpy().astype(np.float64)
    return heard / heard[:, :1]


def decay(response):
    """Reverberation time in s by M. R. Schroeder's backward integration, from -5 to -25 dB."""
    left = 10 * np.log10((response[1:] ** 2)[::-1].cumsum()[::-1] + 1e-20)
    first, last = (np.argmax(left < left[0] - fall) for fall in (5, 25))
    return 3 * (last - first) / RATE


def test_sound_dies_away_as_in_a_room_alike_for_all_who_are_there():
    times, direct = [], []
    for seed in range(40):
        heard = responses(seed)
        assert np.abs(heard[:, 1 : int(FIRST * RATE)]).max() < 1e-6, "nothing comes back at once"
        one, other = (decay(response) for response in heard)
        assert one == pytest.approx(other, rel=0.2)
        assert not np.allclose(*heard), "everyone has a place of his own"
        times.append((one + other) / 2)
        direct += list(-10 * np.log10((heard[:, 1:] ** 2).sum(1)))
    (shortest, longest), (far, close) = DECAY, DIRECT
    assert 0.85 * shortest < min(times) < 0.2 and 0.5 < max(times) < 1.15 * longest
    assert far - 0.01 < min(direct) < far + 2 and close - 2 < max(direct) < close + 0.01


def test_levels_silence_and_length_stay(clips):
    first, second, *_ = (torch.from_numpy(clip[:9000] / 32768).float() for clip in clips.values())
    sources = torch.stack([first, second, torch.zeros(9000)])
    heard = in_a_room(sources, np.random.default_rng(0), RATE)
    assert heard.shape == sources.shape and heard.dtype == torch.float32
    for old, new in zip(sources[:2], heard):
        assert level(new) == pytest.approx(level(old), abs=0.01) and not torch.equal(old, new)
    assert not heard[2].any()
    assert in_a_room(sources[:, :50], np.random.default_rng(0), RATE).shape == (3, 50)
    assert torch.equal(heard, in_a_room(sources, np.random.default_rng(0), RATE))


def test_a_share_of_the_training_mixtures_is_heard_in_rooms(valid_speech):
    args = dict(n_src=2, length=8000, seed=0, size=60, silent_sources=0.3)
    dry, wet = (DynamicMixtures(valid_speech, reverb=share, **args) for share in (0.0, 0.5))
    changed = 0
    for i in range(60):
        mixture, sources = wet[i]
        torch.testing.assert_close(mixture, sources.sum(0))
        assert torch.equal(sources.any(-1), dry[i][1].any(-1)), "the same speakers"
        changed += not torch.equal(mixture, dry[i][0])
    assert 18 <= changed <= 42
    assert torch.equal(dry[3][0], DynamicMixtures(valid_speech, **args)[3][0])


def test_each_mixture_of_a_list_has_a_room_of_its_own(valid_speech, tmp_path):
    write_list(tmp_path / "list.csv", draw_list(valid_speech, 3, 2, 8000, seed=1), RATE)
    listed = MixtureList(valid_speech, tmp_path / "list.csv")
    rooms, others = InRooms(listed, seed=1), InRooms(listed, seed=2)
    assert len(rooms) == 3 and rooms.sample_rate == RATE
    assert rooms.describe(1) == listed.describe(1)
    for i in range(3):
        mixture, sources = rooms[i]
        torch.testing.assert_close(mixture, sources.sum(0))
        assert not torch.allclose(mixture, listed[i][0], atol=1e-3)
        assert torch.equal(mixture, rooms[i][0]) and not torch.equal(mixture, others[i][0])
