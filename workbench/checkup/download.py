"""Fetching a checkpoint from the hub: the files that are needed, and no others; whatever goes wrong is one sentence.

The transfer itself, with its progress, its resuming and its cache, is huggingface_hub's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_vl_ref.weights import CheckpointError

from .files import HUB_ID

# no code and no pickles, whatever a repository holds
NEEDED = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tiktoken.model",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "LICENSE*",
    "README.md",
]
ESSENTIAL = ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tiktoken.model")


def fetch(hub_id: str, to: Path | None = None, *, revision: str = "main", endpoint: str | None = None) -> Path:
    """The folder of a checkpoint after its needed files were fetched; files that are there already are not fetched again.

    to: a folder, else the cache of the hub. endpoint: another address of the hub, else HF_ENDPOINT or the public one.
    Raises ValueError for an id that is none, CheckpointError for a repository that cannot be had or is no checkpoint.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise ValueError(f"{hub_id!r} is not a hub id; write it as owner/name, such as moonshotai/Kimi-VL-A3B-Instruct")
    import huggingface_hub as hub

    where = f"{hub_id} at {endpoint or hub.constants.ENDPOINT}"
    options: dict[str, Any] = {"revision": revision, "endpoint": endpoint, "allow_patterns": NEEDED}
    options["ignore_patterns"] = ["*/*", "*\\*"]  # a star matches slashes too, and every needed file lies at the top
    try:
        folder = Path(hub.snapshot_download(hub_id, local_dir=to, **options))
    except Exception as error:
        raise CheckpointError(_sentence(error, where, revision)) from error
    missing = [name for name in ESSENTIAL if not (folder / name).is_file()]
    if missing or not any(folder.glob("model*.safetensors")):
        what = missing[0] if missing else "weights in safetensors"
        raise CheckpointError(f"{where} has no {what}, so it is no checkpoint in the released layout; check the id")
    return folder


def _sentence(error: Exception, where: str, revision: str) -> str:
    """What went wrong, and what to do. An error that is not of the transfer is raised again as it is."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    seen: BaseException | None = error
    while (seen := seen.__cause__ or seen.__context__) is not None:
        chain.append(seen)
    status = next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)
    kinds = tuple(type(e) for e in chain)
    again = "start the same command again, and it goes on where it stopped"

    def is_a(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if is_a(errors.GatedRepoError):
        return f"{where} asks for its conditions to be accepted first; do so on its page, then log in with `hf auth login`"
    if status in (401, 403):
        return f"{where} refuses you (HTTP {status}); check the id, and log in with `hf auth login` if it is private"
    if is_a(errors.RevisionNotFoundError):
        return f"{where} has no revision {revision!r}; leave --revision out for the newest"
    if is_a(errors.RepositoryNotFoundError) or status == 404:
        return f"{where} does not exist (HTTP 404); check the id"
    if status is not None:
        return f"{where} answers with HTTP {status}; try later: {again}"
    if is_a(errors.OfflineModeIsEnabled):
        return f"{where} is not asked, since HF_HUB_OFFLINE is set; unset it to fetch files"
    full = next((e for e in chain if isinstance(e, OSError) and e.errno == 28), None)
    if full is not None:
        return f"the disk is full while {where} is fetched; a checkpoint takes 33 GB: free space, or name a folder with --to"
    text = " ".join(str(chain[0]).split())
    if "onsistency check" in text:
        return f"a file of {where} came in another size than was announced; {again}, or try another network"
    if isinstance(error, OSError) or is_a(ConnectionError) or any(kind.__module__.startswith("http") for kind in kinds):
        return f"{where} cannot be reached or was cut off ({text[:160]}); {again}"
    raise error
