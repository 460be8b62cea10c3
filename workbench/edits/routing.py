"""Which experts a token gets: force, swap, pin, shift the bias, change top-k. Letters: B rows, T tokens, E experts, K chosen.

A layer's router runs in this order, whatever the order of the list; changes of one kind act in the order given.
1. *Choosing*, one change after another: shifts of the selection bias, pins, forces, routing around, top-k.
2. *Swapping*: the chosen experts change places. `router.chosen` is who serves the token from here on.
3. *Weighing*: each slot is weighed by the model's own rule, by the score of the expert that was chosen for it before any
   swap; then contributions are dropped (experts.py). The bias never enters a weight (arXiv 2412.19437, section 2.1.2).
Tokens that a change does not touch keep their choice bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.moe import Choice, MoE

from .change import Change, EditError, Now, Plan, Where, digest, indices, inside, layer_of, listed, mask

PINNED, FORCED = 1e12, 2e12  # priorities above every biased score; forced experts win over pinned ones


class Selection:
    """One choice in the making. Every step ranks experts anew; `chosen` is what the ranking gives so far."""

    def __init__(self, choice: Choice, scores: Tensor):
        self.choice, self.scores, self.k = choice, scores.detach(), choice.top_k
        self.bias = choice.bias
        self.biased = self._biased()
        self.ranks = torch.full_like(self.biased, torch.nan, dtype=torch.float64)  # where a step has set one: which K
        self.order = self.ranks.clone()  # and in which order the K stand, where that is not by biased score
        self.served: Tensor | None = None  # (E,) who serves for whom; None: everyone for himself

    def _biased(self) -> Tensor:
        biased = self.scores + self.bias
        if self.choice.topk_group < self.choice.n_group:  # as `Choice`: only the best groups compete
            groups = biased.unflatten(-1, (self.choice.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(self.choice.topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            biased = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return biased

    def shift(self, by: Tensor) -> None:
        """Adds (E,) to the selection bias."""
        self.bias = self.bias + by
        self.biased = self._biased()

    def rank(self, tokens: Tensor, experts: Tensor, rank: float) -> None:
        """Gives experts (N,) of tokens (B, T) a rank of their own in place of their biased score."""
        at = tokens[..., None] & member(torch.arange(self.biased.shape[-1], device=tokens.device), experts)
        self.ranks = self.ranks.masked_fill(at, rank)

    def pin(self, tokens: Tensor, experts: Tensor, ranks: Tensor) -> None:
        """Gives experts (B, T, K) of tokens (B, T) ranks (B, T, K), in the choice and in its order."""
        self.ranks = torch.where(tokens[..., None], self.ranks.scatter(-1, experts, ranks), self.ranks)
        self.order = torch.where(tokens[..., None], self.order.scatter(-1, experts, ranks), self.order)

    def chosen(self) -> Tensor:
        """(B, T, K) best first, before swaps."""
        plain = self.biased.topk(self.k, dim=-1).indices
        biased = self.biased.double()
        found = torch.where(self.ranks.isnan(), biased, self.ranks).topk(self.k, dim=-1).indices
        order = torch.where(self.order.isnan(), biased, self.order).gather(-1, found)
        found = found.gather(-1, order.argsort(dim=-1, descending=True, stable=True))
        return torch.where(self.ranks.isnan().all(-1, keepdim=True), plain, found)

    def refuse_too_few(self) -> None:
        lost = torch.where(self.ranks.isnan(), self.biased.double(), self.ranks).isneginf().sum(-1)
        if bool((lost > self.biased.shape[-1] - self.k).any()):
            raise EditError(f"routing around leaves fewer than {self.k} experts to choose from; avoid fewer")


Step = Callable[[Selection, Now], None]


class Selecting(nn.Module):
    """Stands in for `router.chosen`, (B, T, E) -> (B, T, K)."""

    def __init__(self, here: Callable[[], Now], steps: Sequence[Step], outer: Selecting | None = None):
        super().__init__()
        self.here, self.steps = here, sorted(steps, key=lambda step: isinstance(step, _Swap))  # swaps last
        self.others = [] if outer is None else [outer]  # in lists: not parts of this module, whose parts would be sites
        self.selection: Selection | None = None  # of this call
        self.before: Tensor | None = None  # (E,) for whom each expert serves by the swaps of this block

    def around(self, choice: nn.Module) -> Selecting:
        self.replaced = [choice]
        return self

    def forward(self, scores: Tensor) -> Tensor:
        chosen = self.replaced[0](scores)  # by the model, or by the block around this one
        outer, choice = self.others[0].selection if self.others else None, self.replaced[0]
        if not self.steps and outer is None:
            return chosen
        assert isinstance(choice, Choice)
        selection = self.selection = Selection(choice, scores) if outer is None else outer
        already, selection.served = selection.served, None
        for step in self.steps:
            step(selection, self.here())
        own, self.before = selection.served, None if selection.served is None else selection.served.argsort()
        selection.served = already if own is None else own if already is None else own[already]
        if not self.steps:
            return chosen
        selection.refuse_too_few()
        return selection.chosen() if selection.served is None else selection.served[selection.chosen()]


def member(ids: Tensor, experts: Tensor) -> Tensor:
    """Which entries of ids are among experts (N,)."""
    return (ids[..., None] == experts.to(ids.device)).any(-1)


def force_experts(layer: int, experts: Any, *, tokens: Any = None) -> Change:
    """These experts are always among the chosen, in place of those with the lowest biased score; weights follow from
    their own scores. Counts: tokens and slots that got an expert they had not chosen.

        applied(model, [force_experts(3, 7)])
    """
    experts, where = indices(experts, "expert"), Where(tokens)

    def prepare(model: KimiVL) -> Plan:
        moe_layer(model, layer, experts)
        ids, plan = torch.tensor(experts), Plan()

        def force(selection: Selection, now: Now) -> None:
            if len(experts) > selection.k:
                raise EditError(f"{len(experts)} experts are forced on layer {layer}, which chooses {selection.k}; force fewer")
            named = mask(where, now, selection.biased)
            missing = torch.where(named, len(experts) - member(selection.chosen(), ids).sum(-1), 0)
            plan.count(tokens=(missing > 0).sum(), slots=missing.sum())
            selection.rank(named, ids, FORCED)

        plan.choose[layer] = force
        return plan

    settings = {"layer": layer, "experts": experts, "tokens": where.json}
    return Change("force_experts", settings, f"force {listed(experts, 'expert')} of layer {layer}{where}", prepare)


def swap_experts(layer: int, a: int, b: int, *, tokens: Any = None) -> Change:
    """Tokens that chose expert a are served by b, and those of b by a, as if the two had exchanged their parameters: the
    choice is made and weighed as it was, so b works with the weight that the score of a gave. A token that chose both has
    them exchange weights. Counts: tokens and slots.

        applied(model, [swap_experts(3, 7, 12)])
    """
    a, b = indices([a], "expert")[0], indices([b], "expert")[0]
    where = Where(tokens)
    if a == b:
        raise EditError(f"expert {a} is to be swapped with itself; name two experts")
    if not where.every:
        raise EditError("swap_experts exchanges two experts for all tokens; leave tokens out")

    def prepare(model: KimiVL) -> Plan:
        moe_layer(model, layer, [a, b])
        plan = Plan()
        plan.choose[layer] = _Swap(plan, a, b)
        return plan

    return Change("swap_experts", {"layer": layer, "a": a, "b": b}, f"swap experts {a} and {b} of layer {layer}", prepare)


class _Swap:
    """The step of `swap_experts`; a class of its own, so that it can be told apart and put last."""

    def __init__(self, plan: Plan, a: int, b: int):
        self.plan, self.a, self.b = plan, a, b

    def __call__(self, selection: Selection, now: Now) -> None:
        everyone = torch.arange(selection.biased.shape[-1], device=selection.biased.device)
        before = everyone if selection.served is None else selection.served
        hit = member(before[selection.chosen()], torch.tensor([self.a, self.b])) & now.real[..., None]
        self.plan.count(tokens=hit.any(-1).sum(), slots=hit.sum())
        selection.served = torch.where(before == self.a, self.b, torch.where(before == self.b, self.a, before))


def pin_routing(routing: Mapping[int, Any]) -> Change:
    """The choice of another run: layer -> expert ids (T, K), or (B, T, K) for a batch, by position. Weights follow from
    the pinned experts' own scores now. Positions past T choose freely. `routing_of` takes them from a run or a tape.
    Counts: tokens that were pinned, slots that would have been others.

        applied(model, [pin_routing(routing_of(run))])
    """
    tables = {layer: torch.as_tensor(_numbers(ids)).long() for layer, ids in routing.items()}
    if not tables:
        raise EditError("there is no routing to pin; give layer -> expert ids (T, K)")
    tables = {layer: ids[None] if ids.ndim == 2 else ids for layer, ids in tables.items()}
    for layer, ids in tables.items():
        if ids.ndim != 3 or 0 in ids.shape or int(ids.min()) < 0:
            raise EditError(f"the routing of layer {layer} is of shape {tuple(ids.shape)}; give expert ids (T, K) or (B, T, K)")
        if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()):
            raise EditError(f"the routing of layer {layer} names an expert twice for one token; give K different ones")

    def prepare(model: KimiVL) -> Plan:
        plan = Plan()
        for layer, ids in tables.items():
            moe_layer(model, layer, [int(ids.max())])
            plan.choose[layer] = _pin(plan, layer, ids)
        return plan

    lengths = {ids.shape[1] for ids in tables.values()}
    line = f"pin the routing of {listed(list(tables), 'layer')}, {max(lengths)} tokens"
    return Change("pin_routing", {"layers": {str(layer): digest(ids) for layer, ids in tables.items()}}, line, prepare)


def _pin(plan: Plan, layer: int, ids: Tensor) -> Step:
    def pin(selection: Selection, now: Now) -> None:
        rows, top_k = len(now.positions), ids.shape[2]
        if len(ids) not in (1, rows):
            raise EditError(f"routing is pinned for {len(ids)} rows, but this call has {rows}; pin (T, K) or one a row")
        if top_k < selection.k:
            raise EditError(f"{top_k} experts a token are pinned on layer {layer}, which chooses {selection.k}; pin as many")
        named = (now.positions < ids.shape[1]) & now.real
        table = ids.to(now.positions.device).expand(rows, -1, -1)
        at = now.positions.clamp(max=ids.shape[1] - 1)[..., None].expand(-1, -1, top_k)
        wanted = table.gather(1, at)  # (B, T, K)
        fresh = (wanted[..., None] != selection.chosen()[..., None, :]).all(-1) & named[..., None]
        plan.count(tokens=named.sum(), slots=fresh.sum())
        first = PINNED - torch.arange(top_k, device=wanted.device, dtype=torch.float64)  # in the order of the other run
        selection.pin(named, wanted, first.expand(wanted.shape))

    return pin


def shift_bias(layer: int, experts: Any, by: float) -> Change:
    """Adds `by` to the selection bias of experts: it tips the choice and touches no weight but through the choice.
    Counts: tokens and slots whose choice came out otherwise.

        applied(model, [shift_bias(3, [7], 0.1)])
    """
    experts, by = indices(experts, "expert"), float(by)
    if not by or by != by or abs(by) == float("inf"):
        raise EditError(f"by={by} shifts nothing; give a finite number other than 0")

    def prepare(model: KimiVL) -> Plan:
        moe_layer(model, layer, experts)
        ids, plan = torch.tensor(experts), Plan()

        def shift(selection: Selection, now: Now) -> None:
            before = selection.chosen()
            added = torch.zeros(selection.biased.shape[-1], dtype=selection.biased.dtype, device=before.device)
            selection.shift(added.index_fill(0, ids.to(before.device), by))
            moved = (selection.chosen()[..., None] != before[..., None, :]).all(-1) & now.real[..., None]
            plan.count(tokens=moved.any(-1).sum(), slots=moved.sum())

        plan.choose[layer] = shift
        return plan

    line = f"shift the selection bias of {listed(experts, 'expert')} of layer {layer} by {by:+g}"
    return Change("shift_bias", {"layer": layer, "experts": experts, "by": by}, line, prepare)


def set_top_k(layer: Any, k: int) -> Change:
    """As many experts a token as `k`, on one layer, several, or (None) all that route; the weights are normalised over
    them as always. Counts: tokens whose number changed, slots won or lost.

        applied(model, [set_top_k(None, 1)])
    """
    layers = None if layer is None else indices(layer, "layer")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise EditError(f"top-k of {k!r} leaves no expert; give 1 or more")

    def prepare(model: KimiVL) -> Plan:
        plan = Plan()
        for one in moe_layers(model) if layers is None else layers:
            moe_layer(model, one, [k - 1])

            def cut(selection: Selection, now: Now) -> None:
                tokens = now.real.sum() * int(selection.k != k)
                plan.count(tokens=tokens, slots=tokens * abs(selection.k - k))
                selection.k = k

            plan.choose[one] = cut
        return plan

    name = "all layers" if layers is None else listed(layers, "layer")
    return Change("set_top_k", {"layers": layers, "k": k}, f"choose {k} experts a token on {name}", prepare)


def routing_of(source: Any, row: int | None = None) -> dict[int, Tensor]:
    """Expert ids by layer, (T, K), of a Run; of a tape that read `decoder.layers.*.ffn.router.chosen` (B, T, K), all its
    calls one after another, or (T, K) of one row. Raises EditError for a tape that read none.

        applied(model, [pin_routing(routing_of(run))])
    """
    if hasattr(source, "moe_layers"):
        return {layer: torch.as_tensor(_numbers(source.chosen[at])).long() for at, layer in enumerate(source.moe_layers)}
    names = [name for name in source.sites if name.endswith(".ffn.router.chosen")]
    if not names:
        raise EditError("the tape has no routing; read decoder.layers.*.ffn.router.chosen")
    joined = {int(name.split(".")[2]): torch.cat(source[name], dim=1) for name in names}
    return joined if row is None else {layer: ids[row] for layer, ids in joined.items()}


def moe_layers(model: KimiVL) -> list[int]:
    """The decoder layers that route."""
    return [at for at, layer in enumerate(model.decoder.layers) if isinstance(layer.ffn, MoE)]


def moe_layer(model: KimiVL, layer: int, experts: Sequence[int]) -> MoE:
    """The experts of a layer. Raises EditError for a layer without, or an expert that does not exist."""
    ffn = layer_of(model, layer).ffn
    if not isinstance(ffn, MoE):
        raise EditError(f"layer {layer} has no experts; the layers that route are {listed(moe_layers(model), 'layer')}")
    inside(experts, model.config.text.n_routed_experts, "expert")
    return ffn


def _numbers(ids: Any) -> Any:
    """uint16 arrays as torch takes them."""
    return ids.astype("int64") if hasattr(ids, "astype") else ids
