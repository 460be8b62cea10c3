"""From a prompt to text, one token at a time: prefill, then steps on the latent cache.

Letters: B rows (prompts answered together), T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cache import LatentCache
from .chat import Chat, Inputs, Prompt, StreamDecoder, Tokenizer, collate
from .model import KimiVL
from .thought import CLOSE_THOUGHT, OPEN_THOUGHT, ThoughtSplitter


@dataclass(frozen=True)
class Step:
    """One new token for each row; None where the row has ended. Entropies in nats, at temperature 1."""

    tokens: list[int | None]
    logprobs: list[float]
    entropies: list[float]


class ThoughtBudget:
    """Closes a thought that has run for `tokens` tokens, by writing the closing marker in the model's place.

    The markers are plain text, so the watch is on the decoded text; a row that opens no thought is left alone. One
    object watches one row: feed it every token, ask `forced()` before the next.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int):
        if tokens < 0:
            raise ValueError(f"thought budget {tokens} is negative; use 0 for no thought or leave it out for no limit")
        self.tokens = tokens
        self.closing = tokenizer.encode(CLOSE_THOUGHT)
        self.decoder = StreamDecoder(tokenizer)
        self.text = ""  # until the thought opens: all of it; then the last few characters
        self.spent: int | None = None  # tokens of thought so far; None while no thought is open
        self.over = False

    def feed(self, token: int) -> None:
        self.text += self.decoder.feed(token)
        if self.over:
            return
        if self.spent is None:
            start = self.text.lstrip()
            if start.startswith(OPEN_THOUGHT):
                self.spent = 0
            self.over = not OPEN_THOUGHT.startswith(start[: len(OPEN_THOUGHT)])
        else:
            self.spent += 1
            self.over = CLOSE_THOUGHT in self.text
            self.text = self.text[-len(CLOSE_THOUGHT) :]

    def forced(self) -> int | None:
        """The token that must come next, or None when the model is free."""
        if self.over or self.spent is None or self.spent < self.tokens:
            return None
        return self.closing[min(self.spent - self.tokens, len(self.closing) - 1)]


@torch.inference_mode()
def generate(
    model: KimiVL,
    inputs: Inputs,
    *,
    max_new_tokens: int = 512,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    budgets: list[ThoughtBudget] | None = None,
    prefill_chunk: int = 4096,
) -> Iterator[Step]:
    """Yields a Step a token until every row has produced a stop token (yielded too) or `max_new_tokens` are written.

    temperature 0 is greedy; `seed` makes sampling repeatable; `budgets` holds one ThoughtBudget a row. Raises
    ValueError for a prompt that does not fit the context.
    """
    _check(model, inputs, max_new_tokens, temperature, top_p)
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    batch = len(inputs.lengths)
    cache = model.new_cache(batch)
    stream = prefill(model, inputs, cache, prefill_chunk)  # (B, D)
    room = model.config.text.max_position_embeddings - int(inputs.lengths.max())
    ended = [False] * batch
    for step in range(min(max_new_tokens, room)):
        logits = model.logits(stream).to(torch.promote_types(stream.dtype, torch.float32)).cpu()  # (B, vocabulary)
        logprobs = logits.log_softmax(-1)
        sampled = choose(logits, temperature, top_p, generator).tolist()
        forced = [budget.forced() for budget in budgets] if budgets else [None] * batch
        tokens = [sampled[row] if token is None else token for row, token in enumerate(forced)]
        entropies = -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1)
        yield Step(
            tokens=[None if ended[row] else token for row, token in enumerate(tokens)],
            logprobs=[float(logprobs[row, token]) for row, token in enumerate(tokens)],
            entropies=entropies.tolist(),
        )
        for row, token in enumerate(tokens):
            if budgets:
                budgets[row].feed(token)
            ended[row] = ended[row] or token in stop_ids
        if all(ended) or step + 1 == min(max_new_tokens, room):
            return
        column = torch.tensor(tokens, device=inputs.input_ids.device)[:, None]
        stream = model(column, cache=cache)[:, -1]


def prefill(model: KimiVL, inputs: Inputs, cache: LatentCache, chunk: int = 4096) -> Tensor:
    """Runs the prompts through the model into `cache`; the normed stream (B, D) at the last token of each row.

    In chunks of tokens, so that a long prompt needs memory for its cache and one chunk only.
    """
    visual = None
    if inputs.pixel_values is not None and inputs.image_grid_hws is not None:
        visual = model.see(inputs.pixel_values, inputs.image_grid_hws)
    x = model.embedded(inputs.input_ids, visual)
    last: Tensor | None = None
    for start in range(0, x.shape[1], chunk):
        part = x[:, start : start + chunk]
        real = (inputs.lengths - start).clamp(0, part.shape[1])
        stream = model.decoder(part, real, cache)
        ends_here = (real > 0)[:, None]  # the last chunk with a real token wins
        reached = stream.gather(1, (real - 1).clamp(min=0)[:, None, None].expand(-1, 1, stream.shape[-1])).squeeze(1)
        last = reached if last is None else torch.where(ends_here, reached, last)
    assert last is not None
    return last


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, vocabulary) -> token ids (B,). Top-p keeps the smallest set of tokens with at least that much
    probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)  # the most likely token always stays
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


def _check(model: KimiVL, inputs: Inputs, max_new_tokens: int, temperature: float, top_p: float) -> None:
    context = model.config.text.max_position_embeddings
    longest = int(inputs.lengths.max())
    if longest >= context:
        raise ValueError(
            f"the prompt has {longest} tokens but the context holds {context}; "
            "shorten the text, or use fewer or smaller pictures"
        )
    if inputs.pixel_values is None and bool((inputs.input_ids == model.config.media_placeholder_token_id).any()):
        raise ValueError("the prompt has picture placeholders but no pictures; build it with Chat.prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to write; use 1 or more")
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"temperature={temperature} is not usable; 0 is greedy, 0.2 to 1 is usual")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; 1 keeps every token")


@dataclass
class Reply:
    """An answer as it grows: text split into thought and answer, and the tokens it was made of."""

    prompt: Prompt
    thought: str = ""
    answer: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finished: bool = False  # a stop token came; False: cut off by max_new_tokens, the context or the caller


def stream_reply(
    model: KimiVL,
    chat: Chat,
    messages: list[dict[str, Any]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    thought_budget: int | None = None,
    begin: Sequence[int] = (),
) -> Iterator[Reply]:
    """Answers one conversation; yields the same growing Reply after every token. Text never shows half a character.

    begin: token ids written in the model's place first, such as a thought to go on from. They are part of the reply and
    count for the budget, but not as new tokens; their log-probability and entropy are nan.
    """
    prompt = chat.prompt(messages)
    weight = model.logits.weight
    begun = replace(prompt, input_ids=[*prompt.input_ids, *begin])
    inputs = collate([begun], pad_id=0).to(weight.device, weight.dtype)
    reply, decoder, splitter = Reply(prompt), StreamDecoder(chat.tokenizer), ThoughtSplitter()
    budgets = None if thought_budget is None else [ThoughtBudget(chat.tokenizer, thought_budget)]
    for token in begin:
        reply.token_ids.append(token)
        reply.logprobs.append(float("nan"))
        reply.entropies.append(float("nan"))
        splitter.feed(decoder.feed(token))
        if budgets:
            budgets[0].feed(token)
            # a thought that is longer than the budget already is closed at once, from the marker's first token on
            budgets[0].tokens = max(budgets[0].tokens, budgets[0].spent or 0)

    steps = generate(
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        stop_ids=chat.stop_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        budgets=budgets,
    )
    for step in steps:
        token = step.tokens[0]
        assert token is not None
        reply.token_ids.append(token)
        reply.logprobs.append(step.logprobs[0])
        reply.entropies.append(step.entropies[0])
        if token in chat.stop_ids:
            reply.finished = True
        else:
            splitter.feed(decoder.feed(token))
            reply.thought, reply.answer = splitter.thought, splitter.answer
            yield reply
    splitter.feed(decoder.finish())
    splitter.finish()
    reply.thought, reply.answer = splitter.thought.strip(), splitter.answer.strip()
    yield reply


def reply(model: KimiVL, chat: Chat, messages: list[dict[str, Any]], **options: Any) -> Reply:
    """The finished answer to one conversation; options as in `stream_reply`."""
    *_, last = stream_reply(model, chat, messages, **options)
    return last
