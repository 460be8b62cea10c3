"""Messages to tokens and tokens to messages: tokenizer, chat format, picture placeholders, thought and answer.

What a user writes never becomes a special token, whatever it looks like: special ids come from the chat format alone.
(The released wrapper reads them out of any text.) Nothing is added at the start or the end of a text either.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from .config import KimiVLConfig, read_json
from .images import ImageProcessor, Picture
from .thought import CLOSE_THOUGHT, OPEN_THOUGHT
from .told import cause, short, shown
from .whole import write_whole

DEFAULT_SYSTEM = "You are a helpful assistant"  # without a full stop, as in the released template
ROLES = {"system": "<|im_system|>", "user": "<|im_user|>", "assistant": "<|im_assistant|>"}
SPECIAL_SLOTS = 256  # ids kept for special tokens after the ranks

_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How a text is cut before byte pairs are merged; alternatives in order of preference.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]*[\p{{Ll}}{_LETTERS}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]+[\p{{Ll}}{_LETTERS}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_CHUNK = 400_000  # characters encoded at once
_RUN = 25_000  # characters of one run of blanks or non-blanks; longer ones are cut, or merging takes forever

# The chat format for other loaders, as `tokenizer_config.json` carries it; `Chat.prompt` builds the same ids from
# pieces.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    f"<|im_system|>system<|im_middle|>{DEFAULT_SYSTEM}<|im_end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if 'image' in part or 'image_url' in part or part['type'] == 'image' -%}"
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


class TokenizerError(ValueError):
    """Tokenizer files, or token ids, that cannot be used."""


class Tokenizer:
    """Byte pairs on tiktoken. Ids below the number of ranks are bytes of text; the 256 after them are special."""

    def __init__(self, ranks: Mapping[bytes, int], names: Mapping[int, str], chat_template: str = CHAT_TEMPLATE):
        """ranks: bytes -> id, gapless from 0; names: id -> name of a special token (other slots get a reserved name).
        """
        self.ranks = dict(ranks)
        self.chat_template = chat_template
        self._bytes = _by_rank(self.ranks)
        base = len(self._bytes)
        outside = [id for id in names if not base <= id < base + SPECIAL_SLOTS]
        if outside:
            raise TokenizerError(
                f"special token {shown(names[outside[0]])} has id {outside[0]}, but special ids are {base} to "
                f"{base + SPECIAL_SLOTS - 1} after {base} ranks; take both tokenizer files from the same release"
            )
        self.named = dict(sorted(names.items()))
        slots = range(base, base + SPECIAL_SLOTS)
        self.special_names = {id: names.get(id, f"<|reserved_token_{id}|>") for id in slots}
        self.special = {name: id for id, name in self.special_names.items()}
        if len(self.special) < SPECIAL_SLOTS:
            seen: set[str] = set()
            twice = next(name for name in self.special_names.values() if name in seen or seen.add(name))
            raise TokenizerError(f"special token {shown(twice)} is named for two ids; give every special token its own name")
        self.vocab_size = base + SPECIAL_SLOTS
        self._encoding = tiktoken.Encoding(
            "kimi-vl", pat_str=SPLIT_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `tiktoken.model` and `tokenizer_config.json`. Raises TokenizerError naming the file and the line or
        key.
        """
        folder = Path(path)
        ranks = read_ranks(folder / "tiktoken.model")
        names, template = _read_tokenizer_config(folder / "tokenizer_config.json", len(ranks))
        return cls(ranks, names, template)

    def save(self, path: str | Path) -> None:
        """Writes the two files of `from_folder`, in the released layout, into a folder (made if need be).

        Neither is put in place before both are written. Raises TokenizerError for a folder that cannot be written, or a full
        disk.
        """
        folder = Path(path)
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        config: dict[str, Any] = {
            "added_tokens_decoder": {str(id): {"content": name, **flags} for id, name in self.named.items()},
            "tokenizer_class": "TikTokenTokenizer",
            "clean_up_tokenization_spaces": False,
        }
        for key, name in {"bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]", "pad": "[PAD]"}.items():
            if name in self.special:
                config[f"{key}_token"] = name
        config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole({folder / "tiktoken.model": rank_file(self.ranks), folder / "tokenizer_config.json": text.encode()})
        except OSError as error:
            raise TokenizerError(
                f"cannot write the tokenizer to {folder} ({cause(error)}); make room or choose another folder, "
                "what was there is unchanged"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Text -> ids below the number of ranks. Half a surrogate pair, which no file can hold, becomes U+FFFD."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [id for chunk in _chunks(text) for id in self._encoding.encode_ordinary(chunk)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, special tokens as their names; bytes that are not UTF-8 (a character cut in two) as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; a special token's name."""
        if 0 <= id < len(self._bytes):
            return self._bytes[id]
        if id in self.special_names:
            return self.special_names[id].encode()
        raise TokenizerError(f"token id {id} does not exist; the vocabulary has ids 0 to {self.vocab_size - 1}")

    def token_text(self, id: int) -> str:
        """One token for the eye: text where its bytes are whole characters, else like `<0xE2 0x97>`."""
        data = self.token_bytes(id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "<" + " ".join(f"0x{byte:02X}" for byte in data) + ">"


class StreamDecoder:
    """Tokens in, text out, never half a character: bytes wait until the character they begin is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The characters that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What was still waiting when the tokens ended: U+FFFD if a character was cut off, else nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Prompt:
    """One conversation as the model reads it: T token ids and, for each, who it is from.

    roles: "special" (the chat format itself), "system", "user", "image 0", "image 1", ... (visual tokens of
    `pictures[k]`), and for earlier replies "thought" and "answer" (the thought markers are "special").
    """

    input_ids: list[int]
    roles: list[str]
    pictures: list[Picture]
    pixel_values: Tensor | None  # (N, 3, patch, patch) float32
    image_grid_hws: Tensor | None  # (n, 2) int64


@dataclass(frozen=True)
class Inputs:
    """Prompts of one batch, ready for the model; pictures of all rows one after another, in reading order."""

    input_ids: Tensor  # (B, T) int64, padded on the right
    lengths: Tensor  # (B,) int64
    pixel_values: Tensor | None  # (N, 3, patch, patch)
    image_grid_hws: Tensor | None  # (n, 2) int64; stays on the CPU, where it is read
    prompts: list[Prompt]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inputs:
        """The same on another device; `dtype` is for the pixels, ids and grids stay integers."""
        pixels = self.pixel_values
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            lengths=self.lengths.to(device),
            pixel_values=None if pixels is None else pixels.to(device=device, dtype=dtype),
        )


def collate(prompts: Sequence[Prompt], pad_id: int) -> Inputs:
    """Pads prompts on the right to one (B, T) batch; `lengths` says where each ends."""
    if not prompts:
        raise ValueError("there are no prompts to collate; give at least one")
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
    input_ids = torch.full((len(prompts), int(lengths.max())), pad_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt.input_ids)] = torch.tensor(prompt.input_ids)
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.image_grid_hws for prompt in prompts if prompt.image_grid_hws is not None]
    return Inputs(
        input_ids, lengths, torch.cat(pixels) if pixels else None, torch.cat(grids) if grids else None, list(prompts)
    )


class Chat:
    """The chat format of one checkpoint: its tokenizer, its picture processor, and how a conversation is written."""

    def __init__(self, tokenizer: Tokenizer, processor: ImageProcessor):
        self.tokenizer = tokenizer
        self.processor = processor
        media = [f"<|media_{part}|>" for part in ("start", "content", "pad", "end")]
        for name in [*ROLES.values(), "<|im_middle|>", "<|im_end|>", *media, "[EOS]"]:
            if name not in tokenizer.special:
                raise TokenizerError(
                    f"the tokenizer has no special token {name}, which the chat format needs; "
                    "use the tokenizer_config.json of a Kimi-VL release (later models rename some tokens)"
                )
        # config.json names [EOS] alone, but turns end with <|im_end|>.
        self.stop_ids = frozenset({tokenizer.special["<|im_end|>"], tokenizer.special["[EOS]"]})
        self.pad_id = tokenizer.special.get("[PAD]", tokenizer.vocab_size - 1)

    @classmethod
    def from_folder(cls, path: str | Path, config: KimiVLConfig | None = None) -> Chat:
        """Reads the tokenizer and processor files of a checkpoint; with `config`, also checks that they belong to it.
        """
        folder = Path(path)
        tokenizer = Tokenizer.from_folder(folder)
        chat = cls(tokenizer, ImageProcessor.from_json(folder / "preprocessor_config.json"))
        if (folder / "generation_config.json").exists():
            chat.stop_ids |= _end_tokens(folder / "generation_config.json", tokenizer.vocab_size)
        if config is None:
            return chat
        pad, processor = tokenizer.special["<|media_pad|>"], chat.processor
        for key, ours, theirs in [
            ("media_placeholder_token_id", pad, config.media_placeholder_token_id),
            ("vocab_size", tokenizer.vocab_size, config.text.vocab_size),
            ("patch_size", processor.patch_size, config.vision.patch_size),
            ("merge_kernel_size", tuple(processor.merge_kernel_size), tuple(config.vision.merge_kernel_size)),
        ]:
            if ours != theirs:
                raise ValueError(
                    f"{folder}: config.json has {key}={theirs}, the tokenizer and processor files have {ours}; "
                    "take all files from the same release"
                )
        return chat

    def prompt(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> Prompt:
        """A conversation -> ids, a role for each id, and its pictures, ready to see. Raises ValueError or ImageError.

        messages: `{"role": "system" | "user" | "assistant", "content": ...}` with a text, or a list of
        `{"type": "text", "text": ...}` and `{"type": "image", "image": <path, bytes or Pillow image>}` in any order.
        """
        turns = [(role, _parts(message, role, at)) for at, (role, message) in enumerate(_turns(messages))]
        sources = [source for _, parts in turns for kind, source in parts if kind == "image"]
        pixel_values, grids, pictures = self.processor(sources)
        writer = _Writer(self.tokenizer)
        if turns[0][0] != "system":
            self._turn(writer, "system", [("text", DEFAULT_SYSTEM)], iter(()))
        numbered = iter(enumerate(pictures))
        for role, parts in turns:
            self._turn(writer, role, parts, numbered)
        if add_generation_prompt:
            self._open(writer, "assistant")
        if not sources:
            return Prompt(writer.ids, writer.roles, [], None, None)
        return Prompt(writer.ids, writer.roles, pictures, pixel_values, grids)

    def _open(self, writer: _Writer, role: str) -> None:
        writer.special(ROLES[role])
        writer.text(role, "special")
        writer.special("<|im_middle|>")

    def _turn(
        self, writer: _Writer, role: str, parts: list[tuple[str, Any]], numbered: Iterator[tuple[int, Picture]]
    ) -> None:
        self._open(writer, role)
        for kind, value in parts:
            if kind == "image":
                at, picture = next(numbered)
                writer.special("<|media_start|>")
                writer.text("image", "special")
                writer.special("<|media_content|>")
                writer.special("<|media_pad|>", picture.grid.token_count, f"image {at}")
                writer.special("<|media_end|>")
            elif role == "assistant":
                writer.reply(value)
            else:
                writer.text(value, role)
        writer.special("<|im_end|>")


class _Writer:
    """Ids and roles, growing together."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.roles: list[str] = []

    def special(self, name: str, count: int = 1, role: str = "special") -> None:
        self.ids += [self.tokenizer.special[name]] * count
        self.roles += [role] * count

    def text(self, text: str, role: str) -> None:
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.roles += [role] * len(ids)

    def reply(self, text: str) -> None:
        ids = self.tokenizer.encode(text)
        self.ids += ids
        self.roles += reply_roles(self.tokenizer, ids)


def reply_roles(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """For each token of an assistant's reply: "thought", "answer", or "special" for the markers and special tokens.

    A token that holds the end of a marker and the start of a word counts as the word.
    """
    pieces = [b"" if id in tokenizer.special_names else tokenizer.token_bytes(id) for id in ids]
    text = b"".join(pieces)
    opened, closed = text.find(OPEN_THOUGHT.encode()), text.find(CLOSE_THOUGHT.encode())
    # As `ThoughtSplitter` reads it: the opening marker counts at the very start, a closing one always.
    opens = opened >= 0 and not text[:opened].decode("utf-8", "replace").strip()
    thought = opened + len(OPEN_THOUGHT.encode()) if opens else 0
    if closed < 0:
        closed = len(text) if opens else 0
        answer = closed
    else:
        answer = closed + len(CLOSE_THOUGHT.encode())
    roles, end = [], 0
    for id, piece in zip(ids, pieces, strict=True):
        end += len(piece)
        if id in tokenizer.special_names or end <= thought or closed < end <= answer:
            roles.append("special")
        else:
            roles.append("thought" if end <= closed else "answer")
    return roles


def read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken rank file: base64 bytes, a space and a rank a line. Raises TokenizerError naming file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {path} ({error.strerror or error}); a checkpoint folder needs this file"
        ) from error
    try:  # all at once, which is several times as fast as line by line
        fields = b" ".join(lines).split()
        pairs = zip(fields[::2], fields[1::2], strict=True)
        ranks = {binascii.a2b_base64(token, strict_mode=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        ranks = {}
    whole = all(line.count(b" ") == 1 for line in lines if line)
    if not whole or not (2 * len(ranks) == len(fields) == 2 * len(set(ranks.values()))) or b"" in ranks:
        raise TokenizerError(f"{path}, {_first_damage(lines)}; the file is damaged, fetch it again")
    try:
        _by_rank(ranks)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    return ranks


def _first_damage(lines: Sequence[bytes]) -> str:
    """Which line of a rank file is wrong, and what about it."""
    tokens: set[bytes] = set()
    ranks: set[int] = set()
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split(b" ")
            token, rank = binascii.a2b_base64(encoded, strict_mode=True), int(rank_text)
        except (ValueError, binascii.Error):
            return f"line {number}: not a base64 token, a space and a rank"
        if not token or token in tokens or rank in ranks:
            again = f"token {token!r} again" if token in tokens else f"rank {rank} again"
            return f"line {number}: {again if token else 'an empty token'}"
        tokens.add(token)
        ranks.add(rank)
    raise AssertionError("called for a file without damage")


def rank_file(ranks: Mapping[bytes, int]) -> bytes:
    """What `read_ranks` reads, in the order of the ranks."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_by_rank(ranks)))


def _by_rank(ranks: Mapping[bytes, int]) -> list[bytes]:
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        gap = next(at for at, token in enumerate(tokens) if ranks[token] != at)
        raise TokenizerError(f"rank {gap} is missing (the file is cut off or damaged); fetch it again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise TokenizerError(
            f"the single byte 0x{missing:02X} has no rank (the file is cut off or damaged); fetch it again"
        )
    return tokens


def _read_tokenizer_config(path: Path, base: int) -> tuple[dict[int, str], str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise TokenizerError(f"cannot read {path} ({reason}); a checkpoint folder needs this file") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({short(error)}); fetch the file again") from error
    entries = data.get("added_tokens_decoder") if isinstance(data, dict) else None
    if not isinstance(entries, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder, the names of special tokens, is missing; fetch it again")
    names: dict[int, str] = {}
    for key, entry in entries.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or len(key) > 9 or not isinstance(name, str) or not name:
            raise TokenizerError(
                f'{path}: added_tokens_decoder entry {shown(key)} is not an id with a "content"; fetch the file again'
            )
        # The released wrapper declares two slots past the end of the embedding; nothing can ever produce them.
        if int(key) not in (base + SPECIAL_SLOTS, base + SPECIAL_SLOTS + 1):
            names[int(key)] = name
    template = data.get("chat_template")
    return names, template if isinstance(template, str) else CHAT_TEMPLATE


def _chunks(text: str) -> Iterator[str]:
    """Cuts as the released wrapper does, which is visible in the ids of very long texts and in nothing else."""
    for start in range(0, len(text), _CHUNK):
        chunk, done = text[start : start + _CHUNK], 0
        for run in re.finditer(r"\s+|\S+", chunk) if _may_have_long_run(chunk) else ():
            for cut in range(run.start() + _RUN, run.end(), _RUN):
                yield chunk[done:cut]
                done = cut
        yield chunk[done:]


def _may_have_long_run(chunk: str) -> bool:
    """False where no run can be longer than _RUN: such a run holds one of these pieces whole."""
    half = _RUN // 2
    pieces = (chunk[at : at + half] for at in range(0, len(chunk) - half + 1, half))
    return any(piece.isspace() or (len(piece.split(maxsplit=1)) == 1 and piece == piece.strip()) for piece in pieces)


def _turns(messages: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(messages, list | tuple):
        raise ValueError(f"a conversation is a list of messages, not {type(messages).__name__}; put messages in a list")
    if not messages:
        raise ValueError("the conversation is empty; give at least one message with a question")
    turns = []
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f'message {at} is not a dictionary with "role" and "content"; write it as such')
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise ValueError(f"message {at} has the unknown role {shown(message['role'])}; use one of {', '.join(ROLES)}")
        turns.append((message["role"], message))
    return turns


def _parts(message: Mapping[str, Any], role: str, at: int) -> list[tuple[str, Any]]:
    """("text", str) and ("image", source) in order; texts that touch are joined, since they are encoded as one."""
    content = message["content"]
    elements = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(elements, list | tuple):
        raise ValueError(f"message {at} has content of type {type(content).__name__}; give a text or a list of parts")
    parts: list[tuple[str, Any]] = []
    for element in elements:
        kind, value = _element(element, at)
        if kind == "text" and parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + value)
        else:
            parts.append((kind, value))
    texts = [value for kind, value in parts if kind == "text"]
    # A picture alone may be sent first and asked about in the next message; a question left blank is a mistake.
    if role == "user" and (not parts or texts and not "".join(texts).strip()):
        raise ValueError(f"message {at} asks nothing: its text is empty; write a question")
    return parts


def _element(element: Any, at: int) -> tuple[str, Any]:
    if not isinstance(element, Mapping):
        raise ValueError(f'message {at} has an element that is not a dictionary; write {{"type": "text", "text": ...}}')
    kind = element.get("type", next((key for key in ("image", "image_url", "text") if key in element), None))
    if kind == "text":
        if not isinstance(element.get("text"), str):
            raise ValueError(f'message {at} has a text element without a text; give it as "text"')
        return "text", element["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f'message {at} has an element of unknown type {shown(kind)}; use "text" or "image"')
    source = element.get("image", element.get("image_url"))
    if isinstance(source, Mapping):  # {"image_url": {"url": "data:..."}}
        source = source.get("url")
    if source is None:
        raise ValueError(f'message {at} has an image element without a picture; give it as "image"')
    return "image", source


def _end_tokens(path: Path, vocab_size: int) -> frozenset[int]:
    """The end tokens that `generation_config.json` names, one id or a list of them."""
    named = read_json(path).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    for id in ids:
        if type(id) is not int or not 0 <= id < vocab_size:
            wanted = f"token ids from 0 to {vocab_size - 1}"
            raise TokenizerError(f"{path}: eos_token_id={shown(named)} should be {wanted}; fetch it again")
    return frozenset(ids)
