"""What is trained and how: the sizes of the study model, its processor's settings, and the stages with what each shows.

README.md beside this file says what of it is the report's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kimi_vl_ref.config import KimiVLConfig, TextConfig, VisionConfig

from .batches import Mix

N_RANKS = 512  # byte-pair ranks of the study tokenizer; 256 special slots follow
CONFIG = KimiVLConfig(
    vision=VisionConfig(
        patch_size=14,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        init_pos_emb_height=16,
        init_pos_emb_width=16,
    ),
    text=TextConfig(
        vocab_size=N_RANKS + 256,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=96,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        max_position_embeddings=4096,
        bos_token_id=N_RANKS,
        eos_token_id=N_RANKS + 1,
        pad_token_id=N_RANKS + 255,
    ),
    media_placeholder_token_id=N_RANKS + 21,
    torch_dtype="float32",
)
PREPROCESSOR = {
    "image_processor_type": "KimiVLImageProcessor",
    "in_token_limit": 4096,
    "patch_size": 14,
    "num_pooled_tokens": 1024,
    "merge_kernel_size": [2, 2],
    "pad_input": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

# pictures of print that teach the eye alone
ALSO = Mix({"words": 0.35, "read": 0.22, "sums": 0.15, "window": 0.18, "chart": 0.10}, {}, ("full",), 0)
SMALL = Mix({"sheet": 0.5, "sums": 0.2, "words": 0.12, "read": 0.08, "window": 0.1}, {}, ("full",), 0)


@dataclass(frozen=True)
class Stage:
    """One leg of the curriculum. Rates are for Muon; AdamW gets `adamw_share` of it."""

    name: str
    steps: int
    mix: Mix
    batch: int  # scenes a step, over all ranks
    rate: float
    final_rate: float = 0.0
    warm: int = 50
    decay_from: float = 0.6  # share of the stage after which the rate falls linearly
    adamw_share: float = 0.5
    dense: float = 0.0  # weight of the eye's dense losses; the eye stage has nothing else
    also: int = 0  # pictures of print a step, over all ranks, that teach the eye alone: its dense losses and no words
    beside: Mix = ALSO  # what those pictures are
    readers_only: int = 0  # first steps in which the dense losses teach their readers alone, where those are new
    bias_rate: float = 3e-3
    dtype: str = ""  # of the forward and backward passes, "" for the quick one; the weights that are stepped are float32

    def rate_at(self, step: int) -> float:
        if step < self.warm:
            return self.rate * (step + 1) / self.warm
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return self.final_rate + (self.rate - self.final_rate) * min(1.0, left)


# What is shown in the first three stages, and in those that follow.
SCENES = {"any": 0.2, "objects": 0.15, "distractors": 0.25, "count": 0.15, "read": 0.25}
EASY = {"describe": 3, "name": 2, "where": 2, "read": 2, "relation": 0.5, "count": 0.5, "point": 0.5}
ALL = {"describe": 1.5, "name": 1, "where": 1, "read": 2, "relation": 1, "count": 1, "point": 1}
PRINT = {"words": 0.30, "window": 0.20, "sums": 0.12, "read": 0.12, "distractors": 0.08, "any": 0.05, "chart": 0.05}
PRINT |= {"tiny": 0.04, "frames": 0.04}
EVERY = {"any": 0.06, "distractors": 0.11, "objects": 0.08, "count": 0.05, "read": 0.08, "chart": 0.08, "sums": 0.10}
EVERY |= {"words": 0.06, "window": 0.08, "compare": 0.08, "frames": 0.06, "tiny": 0.05, "needle": 0.05, "wide": 0.06}
ASKED = {"describe": 1, "name": 0.4, "where": 0.4, "read": 2, "relation": 2, "count": 1.5, "point": 2}
_MANY = Stage("many", 200, Mix(EVERY, ASKED), batch=32, rate=2.5e-3, final_rate=2.5e-3, warm=1, dense=0.1)
# the same, with more of what was found to lag
LATER = {"any": 0.05, "distractors": 0.10, "objects": 0.07, "count": 0.06, "read": 0.09, "chart": 0.08, "sums": 0.11}
LATER |= {"words": 0.07, "window": 0.09, "compare": 0.08, "frames": 0.06, "tiny": 0.04, "needle": 0.04, "wide": 0.06}
LATER_ASKED = {"describe": 0.8, "name": 0.3, "where": 0.3, "read": 2.5, "relation": 2, "count": 2.5, "point": 2}
_JOINT = replace(_MANY, name="joint", mix=Mix(LATER, LATER_ASKED), warm=30, dense=0.3)
# once more from the end of a cooldown, with what lagged then: numbers to read and to add, several pictures, long contexts
MORE = {"any": 0.04, "distractors": 0.07, "objects": 0.06, "count": 0.07, "read": 0.12, "chart": 0.04, "sums": 0.13}
MORE |= {"words": 0.09, "window": 0.07, "compare": 0.09, "frames": 0.09, "tiny": 0.03, "needle": 0.12, "wide": 0.08}
MORE_ASKED = {"describe": 0.5, "name": 0.25, "where": 0.25, "read": 2.5, "relation": 2.5, "count": 3, "point": 1.5}
_AGAIN = replace(_JOINT, name="again", mix=Mix(MORE, MORE_ASKED), warm=40)
# and again: looking things up in short lines beside everything else, then longer ones; print for the eye in every step
LOOK = {"lines": 0.44, "needle": 0.05, "any": 0.03, "distractors": 0.05, "objects": 0.06, "count": 0.05, "read": 0.06}
LOOK |= {"chart": 0.03, "sums": 0.07, "words": 0.06, "window": 0.05, "compare": 0.04, "frames": 0.05, "tiny": 0.02}
LOOK |= {"wide": 0.06}
FOUND = {"lines": 0.05, "needle": 0.12, "any": 0.03, "distractors": 0.06, "objects": 0.08, "count": 0.08, "read": 0.09}
FOUND |= {"chart": 0.03, "sums": 0.09, "words": 0.09, "window": 0.06, "compare": 0.05, "frames": 0.06, "tiny": 0.03}
FOUND |= {"wide": 0.09}
FOUND_ASKED = {"describe": 0.6, "name": 0.2, "where": 0.2, "read": 2.5, "relation": 4, "count": 3, "point": 1}
_LOOK = replace(
    _JOINT, name="lookup", steps=380, batch=24, mix=Mix(LOOK, FOUND_ASKED), rate=2e-3, final_rate=2e-3, readers_only=60, also=16
)
_FOUND = replace(_LOOK, batch=32, final_rate=0.0, warm=1, decay_from=0.0, readers_only=0)
# and what the two had pushed back: counting, neighbours, sums
AFTER = {"lines": 0.02, "needle": 0.09, "any": 0.04, "distractors": 0.08, "objects": 0.12, "count": 0.13, "read": 0.09}
AFTER |= {"chart": 0.03, "sums": 0.15, "words": 0.10, "window": 0.06, "compare": 0.03, "frames": 0.02, "tiny": 0.03}
AFTER |= {"wide": 0.07}
AFTER_ASKED = {"describe": 1, "name": 0.2, "where": 0.2, "read": 2.5, "relation": 4, "count": 4, "point": 1}
# and what was still missed: the smallest print, hays of pictures, neighbours, what stands next to what in a strip
STILL = {"lines": 0.02, "pictures": 0.12, "needle": 0.06, "any": 0.03, "distractors": 0.07, "objects": 0.12, "count": 0.11}
STILL |= {"read": 0.08, "chart": 0.03, "sums": 0.12, "words": 0.07, "window": 0.08, "compare": 0.03, "frames": 0.03}
STILL |= {"tiny": 0.03, "wide": 0.08}
STILL_ASKED = {"describe": 1, "name": 0.2, "where": 0.2, "read": 2.5, "relation": 5, "count": 4, "point": 1}
_STILL = replace(
    _FOUND, name="still", steps=600, mix=Mix(STILL, STILL_ASKED), warm=30, decay_from=0.3, also=32, beside=SMALL
)
# and once more from the average of the two sets of weights before, with thoughts that number what is alike and say where
# things stand, hays of pictures of any length, twice the print for the eye, and every question on large pictures too
BEYOND = {"large": 0.05, "lines": 0.02, "pictures": 0.13, "needle": 0.06, "any": 0.03, "distractors": 0.06, "objects": 0.12}
BEYOND |= {"count": 0.11, "read": 0.09, "chart": 0.03, "sums": 0.10, "words": 0.05, "window": 0.06, "compare": 0.04}
BEYOND |= {"frames": 0.02, "tiny": 0.02, "wide": 0.09}
BEYOND_ASKED = {"describe": 1, "name": 0.5, "where": 0.5, "read": 2.5, "relation": 5, "count": 4, "point": 1}
_BEYOND = replace(_STILL, name="beyond", steps=500, mix=Mix(BEYOND, BEYOND_ASKED), also=64)
# and mostly what was below its target; thoughts of counts and strips say where each thing stands, and the eye learns which
# character of its text a cell begins with and where the text ends, and in which order things are read
LACK = {"objects": 0.18, "count": 0.16, "sums": 0.13, "wide": 0.12, "read": 0.10, "words": 0.06, "window": 0.05}
LACK |= {"distractors": 0.04, "pictures": 0.03, "needle": 0.03, "large": 0.02, "chart": 0.02, "compare": 0.02}
LACK |= {"frames": 0.02, "tiny": 0.02}
LACK_ASKED = {"describe": 0.7, "name": 0.5, "where": 0.5, "read": 2, "relation": 6, "count": 4, "point": 0.8}
_LACK = replace(
    _BEYOND, name="lack", steps=200, mix=Mix(LACK, LACK_ASKED, again=True), also=48, readers_only=40, decay_from=0.72,
    final_rate=1.67e-3,
)  # fmt: skip
# thoughts of relations in their first form again; in the first of the two the eye was asked about neighbours, in vain
BOTH = Mix({"sheet": 0.35, "objects": 0.3, "sums": 0.15, "words": 0.1, "read": 0.05, "window": 0.05}, {}, ("full",), 0)
_BESIDE = replace(
    _LACK, name="beside", steps=120, rate=1.65e-3, final_rate=1e-3, warm=1, decay_from=0.0, readers_only=0, beside=BOTH
)
_CLOSE = replace(_BESIDE, name="close", steps=205, rate=1e-3, final_rate=0.0, beside=SMALL)
# and from the average of before and after: twelve questions about each scene of objects, most about neighbours and counts, and
# more windows
MISSED = {"objects": 0.16, "count": 0.12, "read": 0.09, "distractors": 0.04, "large": 0.02, "sums": 0.12, "wide": 0.12}
MISSED |= {"window": 0.12, "words": 0.05, "pictures": 0.04, "needle": 0.03, "chart": 0.02, "compare": 0.03}
MISSED |= {"frames": 0.02, "tiny": 0.02}
MISSED_ASKED = {"describe": 0.5, "name": 0.3, "where": 0.3, "read": 1.5, "relation": 7, "count": 4, "point": 0.5}
_MISSED = replace(
    _CLOSE, name="missed", steps=480, mix=Mix(MISSED, MISSED_ASKED, questions=12, again=True), rate=1.5e-3, warm=20,
    decay_from=0.3,
)  # fmt: skip
# and from that average: thoughts about neighbours and the eye's labels say where things stand in one unit for both
# directions, and which character stands at which place of its text
SPOT = {"objects": 0.17, "count": 0.10, "read": 0.14, "distractors": 0.04, "large": 0.03, "sums": 0.12, "wide": 0.10}
SPOT |= {"window": 0.10, "words": 0.05, "pictures": 0.04, "needle": 0.02, "chart": 0.03, "compare": 0.02}
SPOT |= {"frames": 0.02, "tiny": 0.02}
SPOT_ASKED = {"describe": 0.5, "name": 0.3, "where": 0.3, "read": 3, "relation": 8, "count": 4, "point": 0.5}
_SPOT = replace(
    _MISSED, name="spot", steps=920, mix=Mix(SPOT, SPOT_ASKED, questions=12, again=True), rate=1.8e-3, warm=20,
    readers_only=50,
)  # fmt: skip
# and from that average: last figures of coordinates count a tenth, and the words that they had drowned are heard; those that
# name a neighbour count four times (from step 400), and the scenes of objects with the hardest neighbours are shown (from 720)
HEARD = {"objects": 0.25, "count": 0.10, "read": 0.12, "distractors": 0.04, "large": 0.05, "sums": 0.09, "wide": 0.08}
HEARD |= {"window": 0.07, "words": 0.05, "pictures": 0.035, "needle": 0.025, "chart": 0.03, "compare": 0.02}
HEARD |= {"frames": 0.02, "tiny": 0.02}
HEARD_ASKED = {"describe": 0.7, "name": 0.4, "where": 0.4, "read": 2.5, "relation": 9, "count": 4, "point": 0.8}
_HEARD = replace(_SPOT, name="heard", steps=1440, mix=Mix(HEARD, HEARD_ASKED, questions=12, again=True, hardest=8), also=32)

# The first three stages teach scenes of objects and numbers; `start` goes on from weights that had them.
FIRST = (
    Stage("eye", 1100, Mix(SCENES, {}, ("first", "second", "third", "full", "full"), 0), 48, 4e-3, 8e-4, dense=1.0),
    Stage("words", 500, Mix(SCENES, EASY, ("first", "second", "third")), 32, 3e-3, 3e-3, dense=0.3),
    Stage("all", 1100, Mix(SCENES, ALL, ("third", "full", "full", "full")), 32, 3e-3, decay_from=0.5, dense=0.3),
)
THEN = (
    replace(_MANY, name="many-first", steps=150, mix=Mix(EVERY, ASKED, ("first", "second")), warm=50, readers_only=100),
    replace(_MANY, name="many-third", steps=150, mix=Mix(EVERY, ASKED, ("third",))),
    _MANY,
    Stage("print", 420, Mix(PRINT, {}, ("third", "full", "full"), 0), 64, 4e-3, 1.5e-3, warm=30, decay_from=0.5, dense=1.0),
    replace(_JOINT, steps=700),
    replace(_JOINT, name="cooldown", steps=850, final_rate=0.0, warm=1, decay_from=0.0),
    replace(_AGAIN, steps=900),
    replace(_AGAIN, name="last", steps=950, final_rate=0.0, warm=1, decay_from=0.0),
    _LOOK,
    replace(_FOUND, name="found", steps=460, mix=Mix(FOUND, FOUND_ASKED)),
    replace(_FOUND, name="after", steps=190, rate=1.2e-3, warm=15, mix=Mix(AFTER, AFTER_ASKED)),
    _STILL,
    _BEYOND,
    _LACK,
    _BESIDE,
    _CLOSE,
    _MISSED,
    _SPOT,
    _HEARD,
)
STAGES = FIRST + THEN
