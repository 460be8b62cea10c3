"""Pieces small enough to be worked out on paper."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kimi_vl_ref.config import TINY, TextConfig
from kimi_vl_ref.moe import Router
from kimi_vl_ref.projector import Merge
from kimi_vl_ref.rope import rotate, rotation_1d, rotation_2d


def test_merge_of_a_2_by_4_grid() -> None:
    """Patches 0 1 2 3 over 4 5 6 7: the left cell is 0 1 4 5, the right one 2 3 6 7."""
    merged = Merge((2, 2))(torch.arange(8.0)[:, None], [(2, 4)])
    assert merged.squeeze(-1).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_right_angle_turns_each_pair_of_neighbours() -> None:
    quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert rotate(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), quarter).tolist() == [[[-2.0, 1.0, -4.0, 3.0]]]


def test_angles_in_one_dimension() -> None:
    """Four channels at theta 100: pair 0 turns by the position, pair 1 by a tenth of it."""
    cos, sin = rotation_1d(torch.tensor([[0, 3]]), 4, 100.0, torch.float64)
    torch.testing.assert_close(cos, torch.tensor([[[1.0, 1.0], [math.cos(3), math.cos(0.3)]]]).double())
    torch.testing.assert_close(sin, torch.tensor([[[0.0, 0.0], [math.sin(3), math.sin(0.3)]]]).double())


def test_angles_in_two_dimensions_begin_with_the_column() -> None:
    """Eight channels: pairs turn by column, row, column / 100, row / 100. Grid 2 by 3, row-major."""
    _, sin = rotation_2d([(2, 3)], 8, torch.float64, torch.device("cpu"))
    assert sin.shape == (6, 4)
    expected = [
        [0, 0, 0, 0],
        [1, 0, 0.01, 0],
        [2, 0, 0.02, 0],
        [0, 1, 0, 0.01],
        [1, 1, 0.01, 0.01],
        [2, 1, 0.02, 0.01],
    ]
    torch.testing.assert_close(sin, torch.tensor(expected, dtype=torch.float64).sin())


def router(config: TextConfig, bias: list[float]) -> Router:
    """Three or more experts that each read one channel of the stream."""
    router = Router(config)
    router.scores.weight.data = torch.eye(len(bias))
    router.chosen.bias.copy_(torch.tensor(bias))
    return router


def test_router_of_three_experts() -> None:
    """Scores 1/2, 3/4, 1/4; the bias lifts the last past the first, but does not enter its weight."""
    config = replace(
        TINY.text, hidden_size=3, n_routed_experts=3, num_experts_per_tok=2, routed_scaling_factor=2.0
    )
    x = torch.tensor([[[0.0, math.log(3), -math.log(3)]]])
    chosen, weights = router(config, [0, 0, 0])(x)
    assert chosen.tolist() == [[[1, 0]]]
    torch.testing.assert_close(weights, torch.tensor([[[2 * 0.75 / 1.25, 2 * 0.5 / 1.25]]]))
    chosen, weights = router(config, [0, 0, 0.3])(x)
    assert chosen.tolist() == [[[1, 2]]]
    torch.testing.assert_close(weights, torch.tensor([[[2 * 0.75, 2 * 0.25]]]))


def test_router_with_two_groups_of_three() -> None:
    """Group 0 has the best expert, group 1 the better pair: group 1 wins, even with a choice below zero."""
    config = replace(
        TINY.text,
        hidden_size=6,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
    )
    scores = torch.tensor([0.9, 0.1, 0.1, 0.6, 0.6, 0.2])
    chosen, weights = router(config, [0, 0, 0, 0, 0.1, -0.5])(scores.logit()[None, None])
    assert chosen.tolist() == [[[4, 3, 5]]]  # 5 stands at -0.3: groups that lost are out, not at zero
    torch.testing.assert_close(weights, TINY.text.routed_scaling_factor * torch.tensor([[[0.6, 0.6, 0.2]]]))
