"""Tokenizer, special tokens, chat template and stop tokens of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kimi_vl_ref.chat import CHAT_TEMPLATE, Chat, Tokenizer, TokenizerError
from kimi_vl_ref.config import ConfigError, KimiVLConfig, read_json

from .findings import Report
from .settings import released_size

RANKS, RANKS_SHA256 = 163_584, "b6c497a7469b"  # of all three releases: how many, and how the file's sum begins
# Name -> how far behind the last rank, in every release. What the chat format uses is a failure where it is elsewhere.
NEEDED = {
    "[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "<|im_assistant|>": 4, "<|im_system|>": 10,
    "<|im_middle|>": 17, "<|media_start|>": 18, "<|media_content|>": 19, "<|media_end|>": 20, "<|media_pad|>": 21,
}  # fmt: skip
USUAL = {"<|start_header_id|>": 6, "<|end_header_id|>": 7, "[EOT]": 9, "[UNK]": 254, "[PAD]": 255}
SAMPLES = ["plain words", "a  b\n\n\tc", "12345 and 6,789.01", "深度学习 Ünïcödé 🙂", "<|im_end|>", "◁think▷hm◁/think▷yes"]
_PICTURE, _TEXT = {"type": "image", "image": "p.png"}, {"type": "text", "text": "what is it?"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [_PICTURE, _TEXT]}],
    [{"role": "user", "content": [_TEXT, _PICTURE, {"type": "image_url", "image_url": {"url": "q.png"}}, _TEXT]}],
    [
        {"role": "user", "content": [_PICTURE, _TEXT]},
        {"role": "assistant", "content": "◁think▷two◁/think▷Two."},
        {"role": "user", "content": "Sure?\n"},
    ],
]
# Runs apart, with little memory and time: a template is a program that came with the weights. The sandbox of jinja2 keeps
# it from files and modules, the limits from filling the machine.
RENDER = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
except ImportError:
    pass
from jinja2.sandbox import ImmutableSandboxedEnvironment
given = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
template = environment.from_string(given["template"])
both = [{"messages": m, "add_generation_prompt": g} for m in given["conversations"] for g in (True, False)]
json.dump([template.render(**values) for values in both], sys.stdout)
"""


def check_tokens(report: Report, folder: Path, config: KimiVLConfig) -> None:
    """A line each for ranks, special tokens, template and stop tokens."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except TokenizerError as error:
        report.add("tokenizer", "FAIL", str(error))
        return
    base = len(tokenizer.ranks)
    if tokenizer.vocab_size != config.text.vocab_size:
        says = f"{base:,} ranks and 256 special slots make {tokenizer.vocab_size:,} ids, config.json has vocab_size="
        report.add("tokenizer", "FAIL", f"{says}{config.text.vocab_size:,}; take both from the same release")
        return
    back = [text for text in SAMPLES if tokenizer.decode(tokenizer.encode(text)) != text]
    sha = hashlib.sha256((folder / "tiktoken.model").read_bytes()).hexdigest()
    if back:
        report.add("tokenizer", "FAIL", f"{back[0]!r} does not come back from its tokens; fetch tiktoken.model again")
    elif released_size(config) and not sha.startswith(RANKS_SHA256):
        says = f"{base:,} ranks, but tiktoken.model is not the released file (sha256 {sha[:12]}, released {RANKS_SHA256})"
        report.add("tokenizer", "warn", f"{says}; fetch it again")
    else:
        report.add("tokenizer", "ok", f"{base:,} ranks (sha256 {sha[:12]}); texts come back from their tokens")
    _check_special(report, tokenizer, config, base)
    _check_template(report, folder, tokenizer)
    _check_stops(report, folder)


def _check_special(report: Report, tokenizer: Tokenizer, config: KimiVLConfig, base: int) -> None:
    def where(name: str) -> str:
        return f"{name} has id {tokenizer.special[name]}" if name in tokenizer.special else f"{name} is missing"

    wrong = [
        f"{where(name)}, a release has it at {base + offset}; fetch tokenizer_config.json again"
        for name, offset in NEEDED.items()
        if tokenizer.special.get(name) != base + offset
    ]
    unusual = [
        f"{where(name)}, the family has it at {base + offset}"
        for name, offset in USUAL.items()
        if tokenizer.special.get(name) != base + offset
    ]
    pad = tokenizer.special.get("<|media_pad|>")
    if config.media_placeholder_token_id != pad:
        wrong.append(
            f"config.json has media_placeholder_token_id={config.media_placeholder_token_id}, <|media_pad|> is {pad}; "
            "take both from the same release"
        )
    for key, name in (("bos", "[BOS]"), ("eos", "[EOS]")):
        given = getattr(config.text, f"{key}_token_id")
        if given is not None and given != tokenizer.special.get(name):
            wrong.append(f"config.json has {key}_token_id={given}, {where(name)}; take both from the same release")
    report.add_first("special tokens", "FAIL", wrong)
    report.add_first("special tokens", "note", unusual)
    if not wrong:
        report.add("special tokens", "ok", f"{len(NEEDED)} that the chat format needs, by name and id; pictures at {pad}")


def _check_template(report: Report, folder: Path, tokenizer: Tokenizer) -> None:
    stored = read_json(folder / "tokenizer_config.json").get("chat_template")
    file = folder / "chat_template.jinja"
    if stored is None and file.is_file():
        stored = file.read_text(encoding="utf-8", errors="replace") if file.stat().st_size < 1_000_000 else ""
    if not isinstance(stored, str):
        report.add("chat template", "note", "none is stored here; ours is used, which is the released one")
        return
    ours, theirs = rendered(CHAT_TEMPLATE), rendered(stored) if stored != CHAT_TEMPLATE else None
    if theirs is None or theirs == ours:
        report.add("chat template", "ok", f"writes {len(ours)} conversations as ours does")
        return
    if isinstance(theirs, str):
        report.add("chat template", "FAIL", f"cannot be rendered ({theirs}); fetch tokenizer_config.json again")
        return
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    a, b = ours[at], theirs[at]
    differs = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    says = f"differs from the released one at {b[differs : differs + 30]!r}, expected {a[differs : differs + 30]!r}"
    report.add("chat template", "FAIL", f"{says}; `kimi-vl` writes the released format, other loaders follow this one")


def rendered(template: str) -> list[str] | str:
    """The conversations as a template writes them, with and without the generation prompt; or why it could not."""
    given = json.dumps({"template": template, "conversations": CONVERSATIONS})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", RENDER], input=given, capture_output=True, encoding="utf-8", timeout=60
        )
    except subprocess.TimeoutExpired:
        return "it does not end"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it does not end"])[-1][:120]
    return json.loads(done.stdout)


def _check_stops(report: Report, folder: Path) -> None:
    try:
        chat = Chat.from_folder(folder)
    except (TokenizerError, ConfigError) as error:
        report.add("stop tokens", "FAIL", str(error))
        return
    except ValueError:
        return  # the picture settings, which have a line of their own
    names = ", ".join(f"{tokenizer_name(chat, id)} {id}" for id in sorted(chat.stop_ids))
    stated = "" if (folder / "generation_config.json").exists() else "; no generation_config.json, so the format's own"
    report.add("stop tokens", "ok", f"{names}{stated}")


def tokenizer_name(chat: Chat, id: int) -> str:
    return chat.tokenizer.special_names.get(id, repr(chat.tokenizer.token_text(id)))


