"""What holds of one forward pass holds in every use of the model: batches of unequal lengths, chunks of a prompt, steps on a
cache, streamed replies and several turns. And `tokens=` means the same token in all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_vl_ref import Reply, reply, stream_reply
from kimi_vl_ref.chat import Inputs, collate
from kimi_vl_ref.generate import Step, generate
from tiny import picture, question, talking_model, tiny_chat, tiny_inputs, tiny_model
from workbench.cost import RunSize, cost
from workbench.sites import SiteError, sites
from workbench.tape import Tape, attach, in_own_context

MODEL = tiny_model(dtype=torch.float64)
SITES = sites(MODEL)
LENGTHS = torch.tensor([19, 14])
SEEN = [name for name in SITES if name.startswith(("vision", "projector"))]
TALKER = talking_model()
STREAM = "decoder.layers.1"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    for module in (*MODEL.modules(), *TALKER.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


@torch.no_grad()
def answer() -> list[Tensor]:
    """Scores (2, W) after the last real token of two prompts of 19 and 14 tokens, and after each of two cached steps."""
    cache = MODEL.new_cache(2)
    ids, pixels, grids = tiny_inputs(dtype=torch.float64)
    stream = MODEL(ids, pixels, grids, lengths=LENGTHS, cache=cache)
    prompt = MODEL.logits(stream[torch.arange(2), LENGTHS - 1])
    return [prompt] + [MODEL.logits(MODEL(torch.full((2, 1), token), cache=cache))[:, 0] for token in (5, 6)]


UNTOUCHED = answer()


def nudge(tensor: Tensor, site: str) -> Tensor:
    if tensor.dtype == torch.int64:
        return (tensor + 1) % MODEL.config.text.n_routed_experts
    return tensor * 1.1 + 0.05 * torch.arange(tensor.shape[-1], dtype=tensor.dtype).cos()


def when_writing(tensor: Tensor, site: str) -> Tensor:
    """Changes single new tokens and leaves prompts alone."""
    return nudge(tensor, site) if tensor.shape[1] == 1 else tensor


@pytest.mark.parametrize("site", SITES)
def test_an_edit_of_any_site_reaches_every_row_of_the_prompt_and_every_step(site: str) -> None:
    with attach(MODEL, edit={site: nudge}):
        edited = answer()
    for before, after in zip(UNTOUCHED, edited, strict=True):
        assert before.ne(after).any(-1).all() and bool(after.isfinite().all())


@pytest.mark.parametrize("site", [name for name in SITES if name not in SEEN and name != "logits"])
def test_an_edit_of_single_steps_changes_them_and_not_the_prompt(site: str) -> None:
    with attach(MODEL, edit={site: when_writing}):
        prompt, *steps = answer()
    assert torch.equal(prompt, UNTOUCHED[0])
    for before, after in zip(UNTOUCHED[1:], steps, strict=True):
        assert before.ne(after).any(-1).all()


# --- generation, streams and turns ---------------------------------------------------------------------------------------

# fmt: off
FAMILIES = ["vision.positions", "vision.layers.1.attn.core", "projector.norm", "embedded", "decoder.layers.0.attn.k_rope",
            "decoder.layers.1.attn.latent", "decoder.layers.2.resid_mid", "decoder.layers.1.ffn.router.chosen",
            "decoder.layers.2.ffn.router.weights", "decoder.layers.2.ffn.shared", "decoder.norm", "logits"]
# fmt: on


def prompts() -> Inputs:
    """Two prompts of unequal length, one about two pictures and one about none."""
    asked = [question("How many red circles?", picture(28, 56), picture(56, 28, 1)), question("count")]
    return collate([tiny_chat().prompt(messages) for messages in asked], pad_id=0).to("cpu", torch.float32)


def written(chunk: int = 7, new: int = 4) -> list[Step]:
    return list(generate(TALKER, prompts(), max_new_tokens=new, prefill_chunk=chunk))


def test_reading_everything_leaves_generation_in_chunks_bit_identical() -> None:
    inputs = prompts()
    untouched = written()
    with attach(TALKER, read=["**", "**@in"]) as tape:
        assert written() == untouched
    chunks = -(-inputs.input_ids.shape[1] // 7)
    assert chunks > 3 and inputs.lengths[0] != inputs.lengths[1]
    assert len(tape["vision"]) == 1 and len(tape["embedded"]) == 1 + 3
    assert len(tape[STREAM]) == chunks + 3 and len(tape["logits"]) == 4


@pytest.mark.parametrize("site", FAMILIES)
def test_edits_act_in_a_streamed_reply(site: str) -> None:
    messages = question("count the circles", picture(28, 56))
    untouched = reply(TALKER, tiny_chat(), messages, max_new_tokens=3)
    with attach(TALKER, edit={site: nudge}):
        edited = reply(TALKER, tiny_chat(), messages, max_new_tokens=3)
    assert all(before != after for before, after in zip(untouched.entropies, edited.entropies, strict=False))


def test_a_streamed_reply_is_on_the_tape_as_it_grows() -> None:
    messages = question("count the circles", picture(28, 56))
    untouched = reply(TALKER, tiny_chat(), messages, max_new_tokens=4)
    with attach(TALKER, read=["**"]) as tape:
        stream = stream_reply(TALKER, tiny_chat(), messages, max_new_tokens=4)
        calls = [(len(tape["decoder"]), streamed) for streamed in stream]
    assert [count for count, _ in calls] == [1, 2, 3, 4, 4]
    assert (calls[-1][1].token_ids, calls[-1][1].logprobs) == (untouched.token_ids, untouched.logprobs)


def turns() -> list[Reply]:
    """Two turns; the second is asked with the first answer in view."""
    first = reply(TALKER, tiny_chat(), question("count", picture(28, 56)), max_new_tokens=3)
    again = [*question("count", picture(28, 56)), {"role": "assistant", "content": "two"}, *question("How many?")]
    return [first, reply(TALKER, tiny_chat(), again, max_new_tokens=2)]


def test_one_session_serves_several_turns() -> None:
    untouched = turns()
    with attach(TALKER, read=["**"]) as tape:
        read = turns()
    with attach(TALKER, edit={STREAM: nudge}):
        edited = turns()
    assert [one.logprobs for one in read] == [one.logprobs for one in untouched]
    assert [len(tape[name]) for name in ("vision", STREAM)] == [2, 3 + 2]
    lengths = [len(one.prompt.input_ids) for one in untouched]
    assert [entry.shape[1] for entry in tape[STREAM]] == [lengths[0], 1, 1, lengths[1], 1]
    assert all(a.entropies != b.entropies for a, b in zip(untouched, edited, strict=True))


# --- tokens= -------------------------------------------------------------------------------------------------------------


def whole(chunk: int) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Token ids by row, and sites read without tokens= as (row, position) tables, padding left out by hand."""
    inputs = prompts()
    with attach(TALKER, read=["embedded", STREAM]) as tape:
        steps = written(chunk)
    lengths, width = inputs.lengths.tolist(), inputs.input_ids.shape[1]
    ids = [inputs.input_ids[row, :length].tolist() for row, length in enumerate(lengths)]
    for step in steps[:-1]:  # the last token is not read any more
        for row, token in enumerate(step.tokens):
            assert token is not None
            ids[row].append(token)
    tables = {}
    for site in tape.sites:
        columns = torch.cat(tape[site], dim=1)
        rows = [torch.cat([columns[row, :length], columns[row, width:]]) for row, length in enumerate(lengths)]
        tables[site] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, tables


@pytest.mark.parametrize("chunk", [5, 4096])
@pytest.mark.parametrize("tokens", [[0, 3, 4, 52, 54, 73, 76], slice(8, 60, 3), slice(None), [[1, 30], slice(50, 59)]])
def test_tokens_are_the_same_whatever_call_they_come_in(tokens: Any, chunk: int) -> None:
    ids, tables = whole(chunk)
    with attach(TALKER, read=["embedded", STREAM], tokens=tokens) as tape:
        written(chunk)
    per_row = tokens if isinstance(tokens, list) and not isinstance(tokens[0], int) else [tokens, tokens]
    expected = set()
    for row, choice in enumerate(per_row):
        there = range(len(ids[row]))
        expected |= {(row, at) for at in (there[choice] if isinstance(choice, slice) else choice) if at in there}
    for site in (STREAM, "embedded"):
        values, where = tape.tokens(site)
        assert {(row, at) for _, row, at in where.tolist()} == expected and len(where) == len(expected)
        assert where[:, 0].diff().ge(0).all()  # in the order of the calls
        for value, (_, row, at) in zip(values, where.tolist(), strict=True):
            assert torch.equal(value, tables[site][row, at])
            if site == "embedded" and ids[row][at] != TALKER.config.media_placeholder_token_id:
                assert torch.equal(value, TALKER.embedded.weight[ids[row][at]])


def test_scores_stand_at_the_token_after_which_they_were_computed() -> None:
    inputs = prompts()
    last = (inputs.lengths - 1).tolist()
    with attach(TALKER, read=["logits"], tokens=[[last[0]], [last[1], last[1] + 2]]) as tape:
        steps = written(chunk=5)
    values, where = tape.tokens("logits")
    assert where[:, 1:].tolist() == [[0, last[0]], [1, last[1]], [1, last[1] + 2]]
    assert [int(value.argmax()) for value in values] == [steps[0].tokens[0], steps[0].tokens[1], steps[2].tokens[1]]


def test_keep_gets_the_tokens_that_were_chosen() -> None:
    with attach(TALKER, read=[STREAM], tokens=[2, 3], keep=lambda value, site: value.mean(-1, keepdim=True)) as kept:
        written()
    with attach(TALKER, read=[STREAM], tokens=[2, 3]) as tape:
        written()
    assert torch.equal(kept.tokens(STREAM)[0], tape.tokens(STREAM)[0].mean(-1, keepdim=True))


def test_two_visitors_read_their_own_tokens() -> None:
    def visitor(token: int) -> Generator[Tape, None, None]:
        with attach(TALKER, read=["embedded"], tokens=[token]) as tape:
            for _ in stream_reply(TALKER, tiny_chat(), question("count" * token), max_new_tokens=2):
                yield tape

    pairs = list(zip(in_own_context(visitor(1)), in_own_context(visitor(3)), strict=True))
    for tape, token in zip(pairs[-1], (1, 3), strict=True):
        values, where = tape.tokens("embedded")
        ids = tiny_chat().prompt(question("count" * token)).input_ids
        assert where.tolist() == [[0, 0, token]] and torch.equal(values[0], TALKER.embedded.weight[ids[token]])


def test_a_chosen_token_costs_the_same_however_long_the_run() -> None:
    spent = []
    for new in (2, 9):
        with attach(TALKER, read=["decoder.layers.*", "embedded"], tokens=[4, 6]) as tape:
            written(new=new)
        spent.append(tape.nbytes)
    assert spent == [2 * 2 * 4 * 52 * 4] * 2  # rows, tokens, sites, channels, bytes of a float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": [-1]}, "counts from the end"),
        ({"tokens": slice(-3, None)}, "counts from the end"),
        ({"tokens": []}, "names no position"),
        ({"tokens": slice(4, 4)}, "names no position"),
        ({"tokens": [1], "rows": [1]}, "give one of the two"),
        ({"tokens": [1], "read": ["projector"]}, "projector has no such axis"),
        ({"tokens": [1], "read": [f"{STREAM}@in"]}, "decoder.layers.1@in has no such axis"),
        ({"tokens": [[1], [2], [3]]}, "a choice for each of 3 rows, this call has 2"),
        ({"tokens": [900]}, "never at the positions tokens=\\[900\\]"),
        ({"tokens": [0], "read": ["logits"]}, "logits ran, but never at the positions"),
    ],
)
def test_positions_that_cannot_be_read_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SiteError, match=says):
        with attach(TALKER, **{"read": [STREAM], **arguments}):
            written()


def test_scores_of_rows_that_the_caller_chose_have_no_known_position() -> None:
    ids, pixels, grids = tiny_inputs(dtype=torch.float64)
    with pytest.raises(SiteError, match=r"logits was \(2, 3, 131\) in a call of 2 rows and 19 tokens"):
        with attach(MODEL, read=["logits"], tokens=[18]):
            MODEL.logits(MODEL(ids, pixels, grids)[:, -3:])


# --- bytes ---------------------------------------------------------------------------------------------------------------


def size(new: int = 4) -> RunSize:
    inputs = prompts()
    assert inputs.pixel_values is not None
    return RunSize(prompt=inputs.input_ids.shape[1], new=new, patches=len(inputs.pixel_values), batch=2)


@pytest.mark.parametrize("chosen", [{}, {"tokens": [0, 2, 9]}, {"tokens": slice(2, 12, 2)}, {"rows": slice(-1, None)}])
def test_the_bytes_of_a_run_are_known_before_it(chosen: dict[str, Any]) -> None:
    read = ["decoder.layers.1.attn.core", "decoder.layers.2.ffn.router.*", STREAM]
    read += [] if "tokens" in chosen else ["vision.layers.0.attn.k", "projector.linear_1"]
    with attach(TALKER, read=read, expect=size(new=4), **chosen) as tape:
        written(new=5, chunk=4096)  # the fifth token is never read
    assert tape.planned is not None and set(tape.planned.sites) == set(tape.sites)
    assert tape.nbytes == tape.planned.total > 0


def test_scores_cost_one_row_a_written_token() -> None:
    planned = cost(TALKER, ["logits"], prompt=50, new=4, batch=2)
    with attach(TALKER, read=["logits"]) as tape:
        written(new=4)
    assert tape.nbytes == planned.total == 2 * 4 * TALKER.config.text.vocab_size * 4


def test_every_site_costs_what_it_was_said_to_cost() -> None:
    ids, pixels, grids = tiny_inputs(dtype=torch.float64)
    for name in SITES:
        with attach(MODEL, read=[name], expect=RunSize(prompt=19, patches=28, batch=2)) as tape, torch.no_grad():
            MODEL.logits(MODEL(ids, pixels, grids))
        assert tape.planned is not None and tape.nbytes == tape.planned.total > 0, name


def test_memory_that_sites_share_counts_once_and_weights_not_at_all() -> None:
    layer = "decoder.layers.1.attn"
    with attach(TALKER, read=[f"{layer}.out", layer]) as tape:
        written()
    with attach(TALKER, read=[layer]) as alone:
        written()
    assert tape.nbytes == alone.nbytes
    with attach(TALKER, read={f"{layer}.core@in": lambda given, site: given[4]}) as tape:  # the up-projection
        written()
    assert tape.nbytes == 0


def test_what_would_pass_the_limit_is_refused_before_anything_runs() -> None:
    needed = cost(TALKER, ["decoder.layers.*"], prompt=1_000, new=24).total
    assert needed == 3 * 1_024 * 52 * 4
    says = (
        r"reading decoder.layers.\* \(3 sites\) would keep 639.0 kB, and limit= allows 639.0 kB; "
        "choose fewer tokens= or sites, keep= a part, or allow more"
    )
    expect = RunSize(prompt=1_000, new=24)
    with pytest.raises(SiteError, match=says):
        with attach(TALKER, read=["decoder.layers.*"], limit=needed - 1, expect=expect):
            pytest.fail("the block ran")
    with pytest.raises(SiteError, match="never ran"):
        with attach(TALKER, read=["decoder.layers.*"], limit=needed, expect=expect):
            pass
    with pytest.raises(SiteError, match="never ran"):
        with attach(TALKER, read=["decoder.layers.*"], limit=3 * 52 * 4, expect=expect, tokens=[7]):
            pass


@pytest.mark.parametrize("read", [[STREAM], [f"{STREAM}@in"], {STREAM: lambda value, site: value.numpy()}])
def test_growth_that_nobody_planned_is_refused_as_it_comes(read: Any) -> None:
    with pytest.raises(SiteError, match="decoder.layers.1.* comes to .* at call 3 of decoder.layers.1.*limit= allows"):
        with attach(MODEL, read=read, limit=10 * 52 * 8) as tape, torch.no_grad():
            for token in range(9):
                MODEL(torch.tensor([[token] * 3]))
    assert tape.nbytes == 4 * 3 * 52 * 8 and len(tape[tape.sites[0]]) == 3


def test_only_our_sizes_are_known_in_advance() -> None:
    with pytest.raises(SiteError, match="the sizes of Linear are not known"):
        cost(nn.Linear(2, 2), ["weight"], prompt=1)
    planned = cost(TALKER, {"decoder.layers.0": None, STREAM: len, "decoder@in": None}, prompt=2)
    assert planned.unknown == [STREAM, "decoder@in"] and planned.total == 2 * 52 * 4
    assert str(planned) == "1 sites keep at most 416 bytes (decoder.layers.0 416 bytes), and 2 that are counted as they run"
