"""Trains the study model: the eye by itself, then everything together. One command, resumable, seeded.

    kimi-vl study train --out runs/study

What was taken from the report and what was not is said in README.md beside this file. Every `save_every` steps the
whole state (weights, optimiser, step) is written, each file whole or not at all; the same command goes on from the
last one. Two worker processes of one thread each share a batch (`ranks=2`): on two cores that is nearly twice as fast
as two threads.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kimi_vl_ref import checkpoint_folder, load
from kimi_vl_ref.chat import Chat
from kimi_vl_ref.config import VisionConfig
from kimi_vl_ref.group import in_processes
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.told import cause
from kimi_vl_ref.weights import save_checkpoint
from kimi_vl_ref.whole import whole_folder, write_json

from . import families, forest, tokenizer
from .batches import Forest, draw_samples, plant
from .eye import EyeHeads, eye_labels
from .optim import Balancer, MuonAdamW, quick_dtype
from .recipe import CONFIG, N_RANKS, PREPROCESSOR, STAGES, THEN, Stage

SEEN_ALSO = 1 << 62  # seeds of pictures for the eye alone begin here, beyond those of every stage


@dataclass
class Progress:
    """Where a run stands; written beside its tensors."""

    stage: int = 0
    step: int = 0  # inside the stage
    seconds: float = 0.0
    scenes: int = 0


def new_model(seed: int) -> KimiVL:
    """Random weights; the position table starts as low sines and cosines, so that place can be read from the first
    step.
    """
    torch.manual_seed(seed)
    model = KimiVL(CONFIG)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 and "embedded" not in name and "logits" not in name and "router" not in name:
                value.normal_(std=value.shape[1] ** -0.5)
            elif value.ndim == 3 and ".experts." in name:
                value.normal_(std=value.shape[2] ** -0.5)
        model.vision.positions.weight.copy_(_sine_table(CONFIG.vision))
        model.embedded.weight.normal_(std=0.5)
    return model


def _sine_table(config: VisionConfig) -> Tensor:
    rows, columns, width = config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size
    waves = torch.arange(1, width // 4 + 1) * math.pi / 2
    down, across = torch.linspace(0, 1, rows)[:, None] * waves / 4, torch.linspace(0, 1, columns)[:, None] * waves / 4
    y = torch.cat([down.sin(), down.cos()], 1)[:, None].expand(rows, columns, width // 2)
    x = torch.cat([across.sin(), across.cos()], 1)[None].expand(rows, columns, width // 2)
    return 0.3 * torch.cat([y, x], dim=-1)


class Run:
    """A training run in one process of a group; `rank` 0 writes files and shows progress.

    `parameters` are the float32 weights that are stepped; `model` computes with a copy of them in the dtype of the stage.
    """

    def __init__(
        self,
        out: Path,
        seed: int,
        rank: int,
        ranks: int,
        stages: tuple[Stage, ...] = STAGES,
        start: KimiVL | None = None,
        chat: Chat | None = None,
    ):
        self.out, self.seed, self.rank, self.ranks, self.stages = out, seed, rank, ranks, stages
        self.model = new_model(seed)
        if start is not None:
            self.model.load_state_dict({n: t.float() for n, t in start.state_dict().items()})
        self.heads = EyeHeads(CONFIG)
        self.chat = chat or Chat.from_folder(out / "release")
        self.parameters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.parameters |= {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        self.optimiser = MuonAdamW(self.parameters, rank=rank, ranks=ranks)
        self.balancer = Balancer(self.model)
        self.core = forest.TreeCore()
        for layer in self.model.decoder.layers:
            layer.attn.core = self.core  # type: ignore[union-attr]
        self.progress = Progress()
        self.resume()

    def resume(self) -> None:
        path = self.out / "state.json"
        if not path.exists():
            return
        self.progress = Progress(**json.loads(path.read_text()))
        tensors = load_file(self.out / f"state-{self.progress.stage}-{self.progress.step}.safetensors")
        self.model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
        self.heads.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("heads.")})
        for name, value in self.model.named_parameters():
            self.parameters[name].copy_(value.detach())
        self.optimiser.load_state({n[6:]: t for n, t in tensors.items() if n.startswith("optim.")})

    def weights(self) -> dict[str, Tensor]:
        """The model's state in float32: stepped weights, and the selection biases."""
        return {n: (self.parameters[n] if n in self.parameters else t).detach() for n, t in self.model.state_dict().items()}

    def save(self) -> None:
        """State, then the pointer to it, then the old state goes: a kill at any moment leaves a state to go on from."""
        if self.rank:
            return
        name = f"state-{self.progress.stage}-{self.progress.step}.safetensors"
        tensors = {f"model.{n}": t for n, t in self.weights().items()}
        tensors |= {f"heads.{n}": t for n, t in self.heads.state_dict().items()}
        tensors |= {f"optim.{n}": t for n, t in self.optimiser.state().items()}
        part = self.out / f"{name}.part"
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, part)
            os.replace(part, self.out / name)
            write_json(self.out / "state.json", vars(self.progress))
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ValueError(
                f"the state of training could not be written to {self.out} ({cause(error)}); make room and run "
                "the same command, which goes on from the last state that was"
            ) from error
        for old in self.out.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()
        released = KimiVL(CONFIG)
        released.load_state_dict(self.weights())
        save_checkpoint(released, self.out / "release")

    def train(self, save_every: int = 100) -> None:
        for index in range(self.progress.stage, len(self.stages)):
            stage = self.stages[index]
            self.compute_in(stage.dtype)
            bar = tqdm(total=stage.steps, initial=self.progress.step, desc=stage.name, disable=self.rank > 0, mininterval=5)
            while self.progress.step < stage.steps:
                began = time.monotonic()
                log = self.step(stage, index)
                self.progress.step += 1
                self.progress.scenes += stage.batch
                self.progress.seconds += time.monotonic() - began
                bar.update()
                if self.progress.step % 20 == 0 and self.rank == 0:
                    bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in log.items()))
                    self.record({**vars(self.progress), "stage": stage.name, **log})
                if self.progress.step % save_every == 0:
                    self.save()
            bar.close()
            self.progress = replace(self.progress, stage=index + 1, step=0)
            self.save()

    def record(self, line: dict[str, object]) -> None:
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def compute_in(self, dtype: str) -> None:
        """Puts the model that computes into this dtype ("" for the quick one), with weights rounded from the stepped ones."""
        self.model.to(getattr(torch, dtype) if dtype else quick_dtype())
        self.hand_over()

    @torch.no_grad()
    def hand_over(self) -> None:
        """The stepped weights, to the model that computes."""
        for name, value in self.model.named_parameters():
            value.copy_(self.parameters[name])

    def step(self, stage: Stage, index: int) -> dict[str, float]:
        """One update; the loss and its parts, averaged over the ranks' last batch."""
        step = self.progress.step
        samples = draw_samples(stage.mix, self.seeds(index, stage.batch), step / stage.steps)
        log: dict[str, float] = {}
        planted = plant(self.chat, stage.mix, samples)
        patches, tokens = self.see(planted)
        loss = torch.zeros(())
        if stage.dense:
            loss = loss + stage.dense * self.dense_loss(planted, patches, tokens, stage, log)
        if stage.also:
            samples = draw_samples(stage.beside, self.seeds(index, stage.also, SEEN_ALSO), 0.0)
            printed = plant(self.chat, stage.beside, samples)
            loss = loss + stage.dense * self.dense_loss(printed, *self.see(printed), stage, log)
        if len(planted.input_ids):
            self.core.plant(planted)
            stream = forest.run(self.model, planted, tokens)  # (N, D)
            learnt = planted.targets >= 0
            each = F.cross_entropy(self.model.logits(stream[learnt]).float(), planted.targets[learnt], reduction="none")
            weights = planted.weights[learnt]
            words = (weights * each).sum() / weights.sum()
            log["words"] = float(words.detach())
            loss = loss + words
        loss.backward()
        log["loss"] = float(loss.detach())
        for name, value in self.model.named_parameters():
            self.parameters[name].grad, value.grad = None if value.grad is None else value.grad.float(), None
        self.share_gradients()
        log["norm"] = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0))
        rate = stage.rate_at(step)
        self.optimiser.step(rate, rate * stage.adamw_share)
        self.hand_over()
        for value in self.parameters.values():
            value.grad = None
        if len(planted.input_ids):
            if self.ranks > 1:
                dist.all_reduce(self.balancer.loads)
            # the bias rests while the rate falls to nothing, as in Moonlight's last stage
            violation = self.balancer.update(stage.bias_rate * min(1.0, rate / stage.rate))
            log["max_violation"] = float(violation.mean())
        return log

    def seeds(self, index: int, batch: int, beyond: int = 0) -> list[int]:
        """This rank's share of the seeds of a step; no two steps of a run share one."""
        own = batch // self.ranks
        first = beyond + (self.seed << 48) + (index << 40) + self.progress.step * batch + self.rank * own
        return list(range(first, first + own))

    def see(self, planted: Forest) -> tuple[Tensor, Tensor]:
        """MoonViT's output (P, V) and the projector's (M, D)."""
        # the fused kernel's backward pass is slow for short pictures, above all in bfloat16
        with sdpa_kernel(SDPBackend.MATH):
            patches = self.model.vision(planted.pixel_values, planted.grids)
        return patches, self.model.projector(patches, planted.grids)

    def dense_loss(self, planted: Forest, patches: Tensor, tokens: Tensor, stage: Stage, log: dict[str, float]) -> Tensor:
        """What the eye's readers say of these pictures, summed over their tasks.

        Every 20 steps `log` gets how often they are right; in a stage that has `also`, on those pictures, which come last.
        """
        labels, seen = eye_labels(planted.views, planted.grids), (patches.float(), tokens.float())
        apart = self.progress.step < stage.readers_only
        parts = self.heads(*(part.detach() if apart else part for part in seen), labels)
        if self.progress.step % 20 == 19:
            log |= {f"{n}_acc": v for n, v in self.heads.accuracies(*seen, labels).items()}
        return torch.stack(list(parts.values())).sum()

    def share_gradients(self) -> None:
        if self.ranks == 1:
            return
        values = list(self.parameters.values())
        flat = torch.cat([(v.grad if v.grad is not None else torch.zeros_like(v)).flatten() for v in values])
        dist.all_reduce(flat)
        flat /= self.ranks
        for value, grad in zip(values, flat.split([v.numel() for v in values]), strict=True):
            if value.grad is not None:
                value.grad.copy_(grad.view_as(value))


def continue_briefly(model: KimiVL, chat: Chat, steps: int, seed: int, update: bool) -> list[float]:
    """Goes on training a copy of a model from biases of zero, with the bias update or without; MaxVio after each step."""
    stage = replace(STAGES[-1], name="briefly", steps=steps, batch=8, rate=1e-3, final_rate=1e-3, warm=5, dense=0.0, also=0)
    stage = replace(stage, bias_rate=stage.bias_rate if update else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), seed, 0, 1, (stage,), model, chat)
    run.compute_in(stage.dtype)
    for choice in run.balancer.choices:
        choice.bias.zero_()
    violations = []
    for _ in tqdm(range(steps), desc=f"bias update {'on' if update else 'off'}", leave=False):
        violations.append(run.step(stage, 0)["max_violation"])
        run.progress.step += 1
    return violations


def prepare(out: Path) -> None:
    """The tokenizer and processor files of a new run."""
    release = out / "release"
    release.mkdir(parents=True, exist_ok=True)
    if not all((release / name).exists() for name in ("tiktoken.model", "tokenizer_config.json")):
        tokenizer.build(release, families.corpus(4000), N_RANKS)
    generation = {"eos_token_id": [CONFIG.text.eos_token_id, N_RANKS + 2], "temperature": 0.0}
    for name, value in (("preprocessor_config.json", PREPROCESSOR), ("generation_config.json", generation)):
        if not (release / name).exists():  # a kill may have come between them
            write_json(release / name, value)


def _work(rank: int, _device: str, ranks: int, out: Path, seed: int, save_every: int, start: str | None) -> None:
    torch.set_num_threads(1)
    given = None if start is None else load(start)[0]
    Run(out, seed, rank, ranks, STAGES if start is None else THEN, given).train(save_every)


def main(
    out: str | Path = "runs/study", seed: int = 0, ranks: int = 2, save_every: int = 100, start: str | None = None
) -> None:
    """Trains, or goes on training, into `out`; the checkpoint in released layout is `out/release`.

    start: weights and tokenizer of another checkpoint, which has had the first three stages; the others follow.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    if start is not None and not checkpoint_folder(start).is_dir():
        raise ValueError(f"{start} is not a folder; name a checkpoint folder, or 'study', with --start")
    out.mkdir(parents=True, exist_ok=True)
    if start is None:
        prepare(out)
    elif not (out / "release").exists():
        with whole_folder(out / "release") as part:
            shutil.copytree(checkpoint_folder(start), part)
    if ranks == 1:
        _work(0, "cpu", 1, out, seed, save_every, start)
    else:
        in_processes(ranks, _work, ranks, out, seed, save_every, start, on_gpus=False)
