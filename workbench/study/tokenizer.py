"""Builds the study model's tokenizer: byte pairs learnt from its own small language, in the released layout."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import regex  # tiktoken depends on it; the standard library cannot express the pattern

from kimi_vl_ref.chat import DEFAULT_SYSTEM, SPLIT_PATTERN, Tokenizer
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT

# Offsets from the first special id, as in the released tokenizer; the other slots are reserved.
SPECIAL_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "<|media_start|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "[UNK]": 254,
    "[PAD]": 255,
}

# What stands around the texts in every conversation, and words that the families do not use yet: those come last and
# fill the ranks that are left, so that the vocabulary keeps its size when a family is added.
FRAME = ("system", "user", "assistant", "image", DEFAULT_SYSTEM, OPEN_THOUGHT, CLOSE_THOUGHT)
SPARE = (
    "more fewer frame first last moved up down sum plus carry bar chart largest smallest window button save open close "
    "yes no black white grey dot line word letter answer question between inside outside before after same different "
    "corner edge"
)

Pair = tuple[bytes, bytes]


def build(folder: str | Path, texts: Iterable[str], n_ranks: int = 512) -> Tokenizer:
    """Learns ranks from `texts`, writes `tiktoken.model` and `tokenizer_config.json` into `folder`, returns the result.

    The thought markers count as often as there are texts, so that their pieces are merged; they stay plain text. Raises
    ValueError if the texts hold too few pairs for `n_ranks`, since the size of the vocabulary is fixed elsewhere.
    """
    texts = list(texts)
    ranks = train_ranks([*texts, *FRAME * len(texts), *SPARE.split()], n_ranks)
    if len(ranks) < n_ranks:
        raise ValueError(f"the texts fill only {len(ranks)} of {n_ranks} ranks; give more texts or ask for fewer ranks")
    tokenizer = Tokenizer(ranks, {len(ranks) + offset: name for name, offset in SPECIAL_OFFSETS.items()})
    tokenizer.save(folder)
    return tokenizer


def train_ranks(texts: Iterable[str], n_ranks: int, pattern: str = SPLIT_PATTERN) -> dict[bytes, int]:
    """The 256 bytes, then the most frequent pair of neighbours, merged again and again: bytes -> rank.

    Pairs are counted inside the pieces that `pattern` cuts, numbers left out, so that every digit stays a token of its
    own. Ties go to the smaller bytes. Fewer than `n_ranks` come back if the texts hold no more pairs. ValueError below
    256.
    """
    if n_ranks < 256:
        raise ValueError(f"n_ranks={n_ranks} leaves no room for the 256 single bytes; use 256 or more")
    cut = regex.compile(pattern, regex.V1)
    pieces = Counter(piece for text, n in Counter(texts).items() for piece in cut.findall(text) * n)
    words = [[bytes([byte]) for byte in piece.encode()] for piece in pieces if not piece.isnumeric()]
    counts = [n for piece, n in pieces.items() if not piece.isnumeric()]

    pairs: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)
    for at, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += counts[at]
            holders[pair].add(at)

    ranks = {bytes([byte]): byte for byte in range(256)}
    queue = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(queue)
    while len(ranks) < n_ranks and queue:
        n, pair = heapq.heappop(queue)
        if -n != pairs[pair]:  # its count has changed since; the changed one is in the queue as well
            continue
        ranks.setdefault(b"".join(pair), len(ranks))
        changed: set[Pair] = set()
        for at in sorted(holders.pop(pair)):
            before, after = words[at], _merged(words[at], pair)
            for old in zip(before, before[1:], strict=False):
                pairs[old] -= counts[at]
                changed.add(old)
            for new in zip(after, after[1:], strict=False):
                pairs[new] += counts[at]
                holders[new].add(at)
                changed.add(new)
            words[at] = after
        for other in changed:
            if pairs[other] > 0:
                heapq.heappush(queue, (-pairs[other], other))
    return ranks


def _merged(word: list[bytes], pair: Pair) -> list[bytes]:
    merged: list[bytes] = []
    at = 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            merged.append(b"".join(pair))
            at += 2
        else:
            merged.append(word[at])
            at += 1
    return merged
