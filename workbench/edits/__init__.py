"""Changes to a running model: ablate, patch, steer, reroute, block. Each is a plain object, and any list of them composes.

    with applied(model, [ablate_heads(2, [0, 3]), block_attention(queries=slice(40, None), keys=range(4, 40))]) as done:
        model(input_ids)
    done.report()     # what each change touched, in counts

`parts` changes what is written into the stream, `routing` which experts are chosen, `experts` takes experts away, `attention`
says who may look where. `change` holds what they share. The model is left as it was: everything goes through
`workbench.tape.attach`.
"""

from .attention import block_attention, block_patches
from .change import Applied, Change, EditError, applied, in_force
from .experts import ablate_experts, ablate_shared, expert_output
from .parts import (
    ablate_heads,
    ablate_layer,
    ablate_patches,
    ablate_visual_tokens,
    match_by_role,
    patch,
    steer,
    values_at,
)
from .routing import force_experts, pin_routing, routing_of, set_top_k, shift_bias, swap_experts

__all__ = [
    "Applied",
    "Change",
    "EditError",
    "ablate_experts",
    "ablate_heads",
    "ablate_layer",
    "ablate_patches",
    "ablate_shared",
    "ablate_visual_tokens",
    "applied",
    "block_attention",
    "block_patches",
    "expert_output",
    "force_experts",
    "in_force",
    "match_by_role",
    "patch",
    "pin_routing",
    "routing_of",
    "set_top_k",
    "shift_bias",
    "steer",
    "swap_experts",
    "values_at",
]
