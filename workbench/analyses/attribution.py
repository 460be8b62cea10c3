"""What an answer is made of: gradients on the visual tokens or pixels (T1), and the logit as a sum of what each part of the
decoder wrote (T2). Occlusion and the comparison of maps (T3) are in `occlusion.py`.

Letters: M visual tokens, N patches, T tokens, D stream, L layers, H heads, E experts, K chosen, n steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.decoder import Layer
from kimi_vl_ref.moe import MoE
from workbench.edits.experts import stacked
from workbench.tape import Edit, Tape, attach

from .result import Result
from .trials import Trial, about_trials, read, see, token_logprobs


def integrated_gradients(
    model: KimiVL,
    trial: Trial,
    *,
    model_name: str,
    on: str = "tokens",
    baseline: Tensor | None = None,
    steps: int = 32,
    batch: int = 16,
) -> Result:
    """Integrated gradients and gradient x input of the scored reply's log-probability (paper T1; arXiv 1703.01365).

        result = integrated_gradients(model, trial, model_name="study", on="pixels")
        result["routing pinned"]      # one value a visual token; they add up to F(x) - F(baseline), up to the gap

    on         "tokens": the visual tokens (M, D); "pixels": the picture (N, 3, 14, 14), summed over each token's cell.
    baseline   of the same shape; default the mid-grey picture, or the visual tokens that it makes.
    Which experts are chosen is piecewise constant in x, and gradients do not see it change. So everything is computed twice:
    with the experts pinned to those of the true input (the sum is complete as steps grow), and with routing free (the gap is
    what jumps of the routing add). Values in nats. Raises ValueError for a trial without exactly one picture.
    """
    ig_class = _captum()
    x, reference = _start(model, trial, on, baseline)
    chosen = _choices(model, trial)
    values: dict[str, np.ndarray] = {}
    gaps: dict[str, float] = {}
    ends: dict[str, list[float]] = {}
    for name, pin in (("routing pinned", chosen), ("routing free", None)):

        def forward(inputs: Tensor, pin: dict[str, Tensor] | None = pin) -> Tensor:
            with pinned(model, pin):
                return _logprob(model, trial, inputs, on)

        found = ig_class(forward).attribute(x, reference, n_steps=steps, internal_batch_size=max(batch, 2))
        with torch.no_grad():
            top, bottom = float(forward(x)), float(forward(reference))
        values[name] = _per_token(trial, found.detach(), on)
        gaps[name], ends[name] = float(values[name].sum()) - (top - bottom), [bottom, top]
    values["gradient x input"] = gradient_input(model, trial, on=on)
    labels = [("visual token", range(len(values["routing free"])))]
    return Result(
        "integrated-gradients",
        f"What each visual token brings to the reply's log-probability, nats; gradients on the {on}",
        values,
        dict.fromkeys(values, labels),
        about=about_trials(
            model,
            [trial],
            model_name,
            on=on,
            steps=steps,
            baseline="mid-grey picture" if baseline is None else "given",
            completeness_gap=gaps,
            log_probability_of_baseline_and_input=ends,
            token_grid=trial.pictures[0].grid.token_grid,
            beware="a gradient says what a small change would do; it is near 0 where the model is already sure",
        ),
    )


def gradient_input(model: KimiVL, trial: Trial, *, on: str = "tokens") -> np.ndarray:
    """Gradient of the scored reply's log-probability times the input, (M,) summed as for `integrated_gradients`.

        gradient_input(model, trial).argmax()       # the visual token whose growth would help most
    """
    x, _ = _start(model, trial, on, None)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(_logprob(model, trial, leaf, on).sum(), leaf)
    return _per_token(trial, (gradient * x).detach(), on)


@torch.no_grad()
def logit_attribution(
    model: KimiVL,
    trial: Trial,
    *,
    model_name: str,
    position: int | None = None,
    target: int | None = None,
    against: int | None = None,
) -> Result:
    """The logit of one token as a sum of what each part of the decoder wrote at that row (paper T2; Elhage+ 2021).

        result = logit_attribution(model, trial, model_name="study")
        sum(result[name].sum() for name in ("embedding", "heads", "dense", "shared", "experts"))     # the logit

    position   the row that predicts; default the one before the first scored token.
    target     token id; default the token that comes there.  against: explain the logit's lead over this token instead.
    A part's term is its output times the token's row of the unembedding, after the final norm with its scale held as it was.
    Terms: embedding (1,), heads (L, H), dense FFNs (layers,), shared and routed experts (MoE layers,) and (MoE layers, E);
    an expert that was not chosen is 0. Raises ValueError for a position without a row or a token that does not exist.
    """
    rows, vocabulary = len(trial.ids) - 1, model.config.text.vocab_size
    position = trial.scored[0] - 1 if position is None else position
    if not 0 <= position < rows:
        raise ValueError(f"position {position} predicts no token of the trial; give one from 0 to {rows - 1}")
    target = int(trial.ids[position + 1]) if target is None else target
    for token in (target, against):
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(f"token {token} does not exist; the vocabulary has ids 0 to {vocabulary - 1}")
    layers = model.decoder.layers
    moe, dense = [i for i, one in enumerate(layers) if _routes(one)], [i for i, one in enumerate(layers) if not _routes(one)]
    with attach(model, read=_COMPONENTS, keep=lambda value, _: value[0, position].double()) as tape:
        stream = read(model, trial)
    wanted = model.logits.weight[target].double()
    if against is not None:
        wanted = wanted - model.logits.weight[against].double()
    last = tape.last(f"decoder.layers.{len(layers) - 1}")
    scale = torch.rsqrt(last.square().mean() + model.decoder.norm.eps)
    direction: Tensor = wanted * model.decoder.norm.weight.double() * scale  # (D,) a term is an output times this

    heads = []
    for i, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        per_head = layer.attn.out.weight.double().T.unflatten(0, (layer.attn.heads, -1)) @ direction  # (H, v)
        heads.append((tape.last(f"decoder.layers.{i}.attn.core") * per_head).sum(-1))
    terms = {
        "embedding": (tape.last("embedded") @ direction)[None],
        "heads": torch.stack(heads),
        "dense": torch.stack([tape.last(f"decoder.layers.{i}.ffn") @ direction for i in dense] or [direction.new_zeros(0)]),
        "shared": torch.stack([tape.last(f"decoder.layers.{i}.ffn.shared") @ direction for i in moe]),
        "experts": torch.stack([_expert_terms(model, tape, i, direction) for i in moe]),
    }
    values = {name: term.cpu().numpy() for name, term in terms.items()}
    logit = float(stream[0, position].double() @ wanted)
    heads_axis, experts_axis = range(values["heads"].shape[1]), range(values["experts"].shape[1])
    what = repr(trial.texts[position + 1]) if target == int(trial.ids[position + 1]) else f"token {target}"
    return Result(
        "logit-attribution",
        f"What each part of the decoder adds to the logit of {what}" + ("" if against is None else f", over token {against}"),
        values,
        {
            "embedding": [("part", ["embedding"])],
            "heads": [("layer", range(len(layers))), ("head", heads_axis)],
            "dense": [("layer", dense)],
            "shared": [("layer", moe)],
            "experts": [("layer", moe), ("expert", experts_axis)],
        },
        about=about_trials(
            model,
            [trial],
            model_name,
            position=position,
            target=target,
            against=against,
            logit=logit,
            gap=float(sum(value.sum() for value in values.values())) - logit,
            beware="what a part writes straight into the logit; what later parts make of it counts as theirs",
        ),
    )


_COMPONENTS = (
    "embedded",
    "decoder.layers.*",
    "decoder.layers.*.attn.core",
    "decoder.layers.*.ffn",
    "decoder.layers.*.ffn_norm",
    "decoder.layers.*.ffn.shared",
    "decoder.layers.*.ffn.router.chosen",
    "decoder.layers.*.ffn.router.weights",
)


def _expert_terms(model: KimiVL, tape: Tape, layer: int, direction: Tensor) -> Tensor:
    """What each routed expert of a layer adds, (E,): weight x output, for the chosen ones."""
    site = f"decoder.layers.{layer}.ffn"
    x, weights = tape.last(f"decoder.layers.{layer}.ffn_norm"), tape.last(f"{site}.router.weights")
    chosen = tape.last(f"{site}.router.chosen").long()
    worker = stacked(model.get_submodule(f"{site}.experts"))
    gate, up = torch.einsum("d,kid->ki", x, worker.gate_up[chosen].double()).chunk(2, dim=-1)  # (K, F) each
    written = torch.einsum("kf,kdf->kd", F.silu(gate) * up, worker.down[chosen].double())
    terms = direction.new_zeros(model.config.text.n_routed_experts)
    return terms.index_add(0, chosen, weights * (written @ direction))


def pinned(model: KimiVL, chosen: dict[str, Tensor] | None) -> AbstractContextManager[Any]:
    """Routes every row like `chosen`, by site, each (1, T, K); None leaves routing free."""
    if chosen is None:
        return nullcontext()
    return attach(model, edit={site: _pin(ids) for site, ids in chosen.items()})


def _pin(ids: Tensor) -> Edit:
    return lambda value, _site: ids.expand_as(value).clone()


def _captum() -> Any:
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError(
            "integrated gradients need captum, which is not installed; pip install 'kimi-vl-workbench[notebooks]'"
        ) from error
    return IntegratedGradients


def _start(model: KimiVL, trial: Trial, on: str, baseline: Tensor | None) -> tuple[Tensor, Tensor]:
    """Input and baseline of the integral, (1, ...) each."""
    if on not in ("tokens", "pixels"):
        raise ValueError(f"on is {on!r}; use 'tokens' or 'pixels'")
    if len(trial.pictures) != 1 or trial.pixel_values is None or trial.grids is None:
        raise ValueError(f"the trial {trial.question!r} has {len(trial.pictures)} pictures; attribution needs exactly one")
    weight = model.logits.weight
    pixels = trial.pixel_values.to(weight.device, weight.dtype)
    grey = torch.zeros_like(pixels)  # the mean colour of the processor, mid-grey in every Kimi-VL checkpoint
    with torch.no_grad():
        x, default = (pixels, grey) if on == "pixels" else (see(model, trial), model.see(grey, trial.grids))
    reference = default if baseline is None else baseline.to(x)
    if reference.shape != x.shape:
        raise ValueError(f"the baseline has the shape {tuple(reference.shape)}, but the {on} {tuple(x.shape)}; make them equal")
    return x[None], reference[None]


def _choices(model: KimiVL, trial: Trial) -> dict[str, Tensor]:
    """Which experts each token of the trial chose, by site, (1, T, K)."""
    names = [f"decoder.layers.{i}.ffn.router.chosen" for i, layer in enumerate(model.decoder.layers) if _routes(layer)]
    with torch.no_grad(), attach(model, read=names) as tape:
        read(model, trial)
    return {name: tape.last(name) for name in names}


def _routes(layer: Any) -> bool:
    return isinstance(layer.ffn, MoE)


def _logprob(model: KimiVL, trial: Trial, inputs: Tensor, on: str) -> Tensor:
    """Log-probability of the scored reply for visual tokens (n, M, D) or pixels (n, N, 3, 14, 14) -> (n,)."""
    assert trial.grids is not None
    if on == "pixels":
        seen = model.see(inputs.flatten(0, 1), trial.grids.repeat(len(inputs), 1))
        inputs = seen.unflatten(0, (len(inputs), -1))
    logprobs, _ = token_logprobs(model, trial, read(model, trial, inputs))
    return logprobs.sum(-1)


def _per_token(trial: Trial, found: Tensor, on: str) -> np.ndarray:
    """(1, M, D) or (1, N, 3, 14, 14) -> (M,): the sum over channels, or over the pixels of the cell."""
    if on == "tokens":
        return found[0].sum(-1).double().cpu().numpy()
    grid = trial.pictures[0].grid
    patches = found[0].flatten(1).sum(1).double().cpu().numpy()
    return np.array([patches[grid.patches_of_token(token)].sum() for token in range(grid.token_count)])
