"""A blocked look is a score of -inf and nothing else changes, in one pass, in chunks and with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore, expand
from tiny import tiny_inputs, tiny_model
from workbench.blocks import BlockedCore, BlockedPackedCore, blocked, blocked_patches, query_positions
from workbench.tape import Tape, attach

CORES, EYES = "decoder.layers.*.attn.core", "vision.layers.*.attn.core"
PAIRS = [([9, 17, 18], [3, 4, 7]), (range(12, 16), [0, 12, 25]), ([20, 21, 23], [3, 20, 22])]


class MaskedCore(nn.Module):
    """The formula with a whole T x T mask: what a block means, written naively. For passes without a cache."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden  # (H, T, T)

    def forward(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: None) -> Tensor:
        q, k, v = expand(q_nope, q_rope, latent, k_rope, up)
        count = q.shape[1]
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        lost = self.hidden[:, :count, :count] | torch.ones(count, count, dtype=torch.bool).triu(1)
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(lost, float("-inf")).softmax(-1), v)


def mask(pairs: Any, heads: list[int] | None, size: int = 40) -> Tensor:
    hidden = torch.zeros(5, size, size, dtype=torch.bool)
    for head in range(5) if heads is None else heads:
        for queries, keys in pairs:
            for query in queries:
                for key in keys:
                    hidden[head, query, key] = True
    return hidden


@torch.no_grad()
def logits(model: KimiVL, ids: Tensor, core: Any = None, sites: str = CORES) -> Tensor:
    with attach(model, swap={sites: core} if core else {}):
        return model.logits(model(ids))


def read(model: KimiVL, swap: Any, *inputs: Tensor) -> Tape:
    with attach(model, read=[CORES, EYES], swap=swap) as tape, torch.no_grad():
        model(*inputs)
    return tape


@pytest.mark.parametrize("heads", [None, [0, 3], []], ids=str)
def test_blocked_pairs_are_scores_of_minus_infinity(heads: list[int] | None) -> None:
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(120, (2, 26), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids, lambda core: MaskedCore(mask(PAIRS, heads)), "decoder.layers.[12].attn.core")
    found = logits(model, ids, lambda core: blocked(core, PAIRS, heads), "decoder.layers.[12].attn.core")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    changed = (found - logits(model, ids)).abs().amax((0, 2)) > 1e-9
    assert changed.any() == (heads != [])
    assert not changed[:9].any()  # the first query that loses a key is at 9


@torch.no_grad()
def test_chunks_and_the_cache_block_as_one_pass_does() -> None:
    """Two rows of unequal lengths: positions count in each row, so one call blocks different columns of the two."""
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(120, (2, 27), generator=torch.Generator().manual_seed(1))
    naive = [logits(model, row[None], lambda core: MaskedCore(mask(PAIRS, [1, 4])))[0] for row in ids]
    at, cache = torch.tensor([0, 0]), model.new_cache(2)
    with attach(model, swap={CORES: lambda core: blocked(core, PAIRS, [1, 4])}):
        for width, lengths in ((12, (12, 8)), (6, (6, 4)), (1, (1, 1)), (4, (3, 4)), (1, (1, 1)), (1, (1, 1)), (1, (1, 1))):
            columns = torch.zeros(2, width, dtype=torch.long)
            for row, n in enumerate(lengths):
                columns[row, :n] = ids[row, at[row] : at[row] + n]
            found = model.logits(model(columns, lengths=torch.tensor(lengths), cache=cache))
            for row, n in enumerate(lengths):
                expected = naive[row][at[row] : at[row] + n]
                torch.testing.assert_close(found[row, :n], expected, rtol=0, atol=1e-12)
            at = at + torch.tensor(lengths)
    assert at.tolist() == [25, 20]


def test_blocking_nothing_and_blocking_the_future_keep_every_bit() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    plain = read(model, {}, *inputs)
    same = {CORES: lambda core: blocked(core, [([4, 5], [6, 18]), ([], [1])]), EYES: lambda core: blocked_patches(core, [])}
    for site, values in read(model, same, *inputs)._read.items():
        assert all(torch.equal(a, b) for a, b in zip(values, plain[site], strict=True))


def test_rows_and_heads_that_lose_nothing_keep_their_bits() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    site, eye = "decoder.layers.0.attn.core", "vision.layers.0.attn.core"
    plain = read(model, {}, *inputs)
    found = read(model, {site: lambda core: blocked(core, [([9, 11], [2, 10])], [3])}, *inputs)[site][0]
    same = (found == plain[site][0]).all(-1)  # (B, T, H)
    assert (~same).nonzero().tolist() == [[row, at, 3] for row in (0, 1) for at in (9, 11)]
    found = read(model, {eye: lambda core: blocked_patches(core, [([5], [0, 7])], [2, 6], picture=1)}, *inputs)[eye][0]
    assert (~(found == plain[eye][0]).all(-1)).nonzero().tolist() == [[8 + 5, 2], [8 + 5, 6]]


def test_a_token_that_nothing_sees_might_as_well_be_another() -> None:
    """Later positions are blocked from position 6 in every layer: what stands there cannot reach them. One layer is not
    enough, since the layers before and after still let it pass."""
    model, (ids, *_) = tiny_model(dtype=torch.float64), tiny_inputs()
    other = ids.clone()
    other[:, 6] = (ids[:, 6] + 1) % 100
    pairs = [(range(7, 19), [6])]
    for layers, leaks in (("decoder.layers.*.attn.core", False), ("decoder.layers.[02].attn.core", True)):
        a, b = (logits(model, some, lambda core: blocked(core, pairs), layers)[:, 7:] for some in (ids, other))
        assert bool((a != b).any()) == leaks


def test_blocks_on_one_core_add_up_and_count_what_they_took() -> None:
    model, (ids, *_) = tiny_model(dtype=torch.float64), tiny_inputs()
    cores: list[BlockedCore] = []

    def twice(core: nn.Module) -> nn.Module:
        cores.append(blocked(blocked(core, [([9], [3, 4]), ([9], [4, 12])]), [([9], [5]), ([16], [3])], [2]))
        return cores[-1]

    found = logits(model, ids, twice)
    both = mask([([9], [3, 4])], None) | mask([([9], [5]), ([16], [3])], [2])
    torch.testing.assert_close(found, logits(model, ids, lambda core: MaskedCore(both)), rtol=0, atol=1e-12)
    assert [core.touched for core in cores] == [2 * (2 * 5 + 2)] * 3  # rows x (two keys in five heads, two in one)


def test_rows_of_a_blocked_core_are_what_it_read() -> None:
    model, (ids, *_) = tiny_model(dtype=torch.float64), tiny_inputs()
    site, core = "decoder.layers.1.attn.core", blocked(ExplicitCore(), [([9, 18], [0, 4])], [1])
    with attach(model, read=[site, f"{site}@in"], swap={site: core}) as tape:
        model(ids)
    (inputs,), (heads,) = tape[f"{site}@in"], tape[site]
    rows = core.rows(inputs, [9, 12])
    assert rows[:, 1, 0, [0, 4]].max() == 0 and (rows[:, 1, 1, [0, 4]] > 0).all() and (rows[:, 2, 0, [0, 4]] > 0).all()
    values = torch.einsum("bsr,hvr->bhsv", inputs[2], inputs[4][:, 10:])
    torch.testing.assert_close((rows @ values).transpose(1, 2), heads[:, [9, 12]], rtol=0, atol=1e-12)


def test_patches_are_blocked_inside_their_picture() -> None:
    model, inputs = tiny_model(dtype=torch.float64), tiny_inputs(dtype=torch.float64)
    site, pairs = "vision.layers.1.attn.core", [([2, 11], [0, 2, 5]), ([3], [3])]
    core = blocked_patches(blocked_patches(model.vision.layers[1].attn.core, pairs, [4], 1), [([0], [1])])
    with attach(model, read=[site, f"{site}@in"], swap={site: core}) as tape:
        model(*inputs)
    (heads,), ((q, k, v, packing),) = tape[site], tape[f"{site}@in"]
    expected = []
    for picture, (q_i, k_i, v_i) in enumerate(zip(*(part.split(packing.counts) for part in (q, k, v)), strict=True)):
        scores = torch.einsum("phd,shd->hps", q_i, k_i) * 8**-0.5
        if picture == 0:
            scores[:, 0, 1] = float("-inf")
        if picture == 1:
            for query, keys in ((2, [0, 2, 5]), (11, [0, 2, 5]), (3, [3])):
                scores[4, query, keys] = float("-inf")
        expected.append(torch.einsum("hps,shd->phd", scores.softmax(-1), v_i))
    torch.testing.assert_close(heads, torch.cat(expected), rtol=0, atol=1e-12)
    assert core.touched == 7 + 7


def test_gradients_flow_through_a_blocked_core_and_not_along_the_block() -> None:
    model, (ids, *_) = tiny_model(dtype=torch.float64), tiny_inputs()
    x = torch.nn.functional.embedding(ids[:1], model.embedded.weight).requires_grad_()
    with attach(model, swap={CORES: lambda core: blocked(core, [(range(7, 19), [6])])}):
        model.decoder(x)[0, 18].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().amax(-1) > 0
    assert not reached[6] and reached[torch.arange(19) != 6].all()


def test_blocking_a_few_queries_of_a_long_prompt_needs_no_square() -> None:
    """100,000 queries against 100,000 keys would be a mask of 9 GiB, and 186 GiB of probabilities."""

    class Nothing(nn.Module):
        def forward(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: None) -> Tensor:
            return torch.zeros(1, q_nope.shape[1], 5, 2)

    long = 100_000
    inputs = (torch.zeros(1, 1, 1, 1).expand(1, long, 5, 4), torch.zeros(1, 1, 1, 1).expand(1, long, 5, 2))
    latent = torch.arange(long, dtype=torch.float32)[None, :, None].expand(1, long, 3)
    keys = (latent, torch.zeros(1, long, 2), torch.ones(5, 6, 3) / 3, None)
    read = blocked(Nothing(), [([long - 1], range(2, long)), ([3], [3])])(*inputs, *keys)
    assert read[0, long - 1].flatten().tolist() == pytest.approx([0.5] * 10)  # the mean of keys 0 and 1
    assert read[0, 3].flatten().tolist() == pytest.approx([1.0] * 10)  # of 0, 1 and 2
    assert torch.count_nonzero(read) == 20


def test_positions_follow_from_what_a_query_sees() -> None:
    visible = torch.arange(9) <= torch.tensor([[3, 4], [7, 8]])[..., None]
    assert query_positions((torch.ones(2, 2, 1, 1), None, None, None, None, visible)).tolist() == [[3, 4], [7, 8]]
    for keys, expected in ((3, [[0, 1, 2]]), (8, [[5, 6, 7]])):  # without a mask they are the last of the keys
        inputs = (torch.ones(1, 3, 1, 1), None, torch.ones(1, keys, 1), None, None, None)
        assert query_positions(inputs).tolist() == expected


def test_what_cannot_be_blocked_is_refused_in_a_sentence() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(ValueError, match="position 2 would see nothing, .* leave it one"):
        blocked(ExplicitCore(), [([2, 9], [0, 1, 2])])
    with pytest.raises(ValueError, match="position 2 would see nothing"):  # together, in head 3
        blocked(blocked(ExplicitCore(), [([2], [0, 1])]), [([2], [2])], [1, 3])
    assert isinstance(blocked(blocked(ExplicitCore(), [([2], [0, 1])], [0]), [([2], [2])], [1, 3]), BlockedCore)
    with pytest.raises(ValueError, match="position -1 cannot be blocked; count from 0"):
        blocked(ExplicitCore(), [([-1], [0])])
    with pytest.raises(ValueError, match="head 5 does not exist; this layer has heads 0 to 4"):
        read(model, {"decoder.layers.0.attn.core": lambda core: blocked(core, [([2], [0])], [5])}, *inputs)
    for pairs, picture, message in (
        ([([12], [0])], 1, r"patch 12 of picture 1 is blocked but does not exist: this call saw 3 pictures of \[8, 12, 8\]"),
        ([([0], [0])], 3, "patch 0 of picture 3 is blocked but does not exist"),
        ([([0], range(8))], 0, "patch 0 of picture 0 would see nothing"),
    ):
        core = blocked_patches(model.vision.layers[0].attn.core, pairs, picture=picture)
        assert isinstance(core, BlockedPackedCore)
        with pytest.raises(ValueError, match=message):
            read(model, {"vision.layers.0.attn.core": core}, *inputs)
