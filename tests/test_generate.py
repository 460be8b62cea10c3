"""Generation: the tokens are those of the plain forward pass, rows do not disturb each other, and every way to stop works."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kimi_vl_ref import Chat, checkpoint_folder, generate, load, reply, stream_reply
from kimi_vl_ref.chat import collate
from kimi_vl_ref.generate import ThoughtBudget, choose, prefill
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from workbench.study.evaluate import messages
from workbench.study.families import make


@pytest.fixture(scope="module")
def study():
    return load("study")


@pytest.fixture(scope="module")
def asked():
    return [make(family, seed, "choose", "third") for family, seed in (("count", 1), ("read", 2), ("point", 3), ("where", 4))]


@torch.inference_mode()
def greedy_by_hand(model, prompt, count):
    """No cache: the whole prompt through the model again for every token."""
    ids = list(prompt.input_ids)
    for _ in range(count):
        stream = model(torch.tensor([ids]), prompt.pixel_values, prompt.image_grid_hws)
        ids.append(int(model.logits(stream[0, -1]).argmax()))
    return ids[len(prompt.input_ids) :]


def test_greedy_tokens_are_those_of_the_forward_pass_without_a_cache(study, asked):
    model, chat = study
    for pair in asked:
        prompt = chat.prompt(messages(*pair))
        steps = list(generate(model, collate([prompt], 0), max_new_tokens=8))
        assert [step.tokens[0] for step in steps] == greedy_by_hand(model, prompt, 8)


def test_a_batch_writes_what_each_prompt_writes_alone(study, asked):
    model, chat = study
    prompts = [chat.prompt(messages(*pair)) for pair in asked]
    prompts.append(chat.prompt([{"role": "user", "content": "list everything."}]))  # a row without a picture
    together = list(generate(model, collate(prompts, 0), max_new_tokens=30, stop_ids=chat.stop_ids))
    for row, prompt in enumerate(prompts):
        alone = [s.tokens[0] for s in generate(model, collate([prompt], 0), max_new_tokens=30, stop_ids=chat.stop_ids)]
        written = [s.tokens[row] for s in together]
        assert written[: len(alone)] == alone
        assert all(token is None for token in written[len(alone) :])


def test_a_prompt_in_chunks_ends_in_the_same_stream(study, asked):
    model, chat = study
    inputs = collate([chat.prompt(messages(*pair)) for pair in asked], 0)
    with torch.inference_mode():
        whole = prefill(model, inputs, model.new_cache(len(asked)))
        parts = prefill(model, inputs, model.new_cache(len(asked)), chunk=17)
    assert (whole - parts).abs().max() < 2e-4 * whole.abs().max()


def test_both_end_tokens_stop(study, asked):
    model, chat = study
    names = {chat.tokenizer.special_names[i] for i in chat.stop_ids}
    assert names == {"<|im_end|>", "[EOS]"}
    whole = reply(model, chat, messages(*asked[3]))
    assert whole.finished and chat.tokenizer.special_names[whole.token_ids[-1]] == "<|im_end|>"
    cut = reply(model, chat, messages(*asked[3]), max_new_tokens=1)
    assert not cut.finished and len(cut.token_ids) == 1


def test_a_seed_repeats_and_another_differs(study, asked):
    model, chat = study
    inputs = collate([chat.prompt(messages(*asked[2]))], 0)

    def tokens(seed):
        return [s.tokens[0] for s in generate(model, inputs, max_new_tokens=25, temperature=3.0, seed=seed)]

    assert tokens(1) == tokens(1)
    assert any(tokens(1) != tokens(other) for other in (2, 3, 4))


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {top_p: {int(choose(logits, 1.0, top_p, generator)) for _ in range(400)} for top_p in (0.4, 0.7, 0.9, 1.0)}
    assert drawn == {0.4: {0}, 0.7: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_logprobs_and_entropies_are_those_of_the_distribution(study, asked):
    model, chat = study
    prompt = chat.prompt(messages(*asked[0]))
    step = next(iter(generate(model, collate([prompt], 0))))
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt.input_ids]), prompt.pixel_values, prompt.image_grid_hws)[0, -1])
    spread = torch.distributions.Categorical(logits=logits)
    assert step.logprobs[0] == pytest.approx(float(spread.log_prob(torch.tensor(step.tokens[0]))), abs=1e-4)
    assert step.entropies[0] == pytest.approx(float(spread.entropy()), abs=1e-4)


@pytest.mark.parametrize("budget", [0, 2, 5])
def test_a_thought_is_closed_when_its_budget_is_spent(study, asked, budget):
    model, chat = study
    free = reply(model, chat, messages(*asked[2]))
    assert len(chat.tokenizer.encode(" " + free.thought)) > 3  # this family thinks
    held = reply(model, chat, messages(*asked[2]), thought_budget=budget)
    assert len(chat.tokenizer.encode(" " + held.thought)) <= budget + 1 and held.finished
    if budget == 0:
        assert held.thought == ""
    assert held.answer.startswith("click(")
    assert reply(model, chat, messages(*asked[2]), thought_budget=500).token_ids == free.token_ids


def test_a_budget_leaves_rows_without_a_thought_alone(study):
    _, chat = study
    budget = ThoughtBudget(chat.tokenizer, 0)
    for token in chat.tokenizer.encode("red circle " + OPEN_THOUGHT):
        assert budget.forced() is None
        budget.feed(token)
    closed = ThoughtBudget(chat.tokenizer, 50)
    for token in chat.tokenizer.encode(f"{OPEN_THOUGHT} a thought{CLOSE_THOUGHT} an answer" + " red" * 80):
        assert closed.forced() is None
        closed.feed(token)


def test_streaming_adds_up_to_the_reply(study, asked):
    model, chat = study
    seen = [(r.thought, r.answer) for r in stream_reply(model, chat, messages(*asked[0]))]
    last = reply(model, chat, messages(*asked[0]))
    assert seen[-1] == (last.thought, last.answer)
    for (thought, answer), (later_thought, later_answer) in zip(seen, seen[1:-1], strict=False):
        assert later_thought.startswith(thought) and later_answer.startswith(answer)


def test_later_turns_see_earlier_pictures(study):
    model, chat = study
    drawn, question = make("where", 11, "choose", "third")
    turns = messages(drawn, question)
    first = reply(model, chat, turns)
    more = [{"role": "assistant", "content": first.answer}, {"role": "user", "content": question.text}]
    again = reply(model, chat, [*turns, *more])
    assert question.check(first.answer) and question.check(again.answer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"thought_budget": -1}, "thought budget -1"),
    ],
)
def test_unusable_settings_are_named(study, asked, options, sentence):
    model, chat = study
    with pytest.raises(ValueError, match=sentence):
        reply(model, chat, messages(*asked[0]), **options)


def test_a_prompt_longer_than_the_context_is_refused(study):
    model, chat = study
    with pytest.raises(ValueError, match="the context holds 4096"):
        reply(model, chat, [{"role": "user", "content": "red " * 5000}])


def test_writing_ends_where_the_context_does(study):
    model, chat = study
    prompt = chat.prompt([{"role": "user", "content": "red " * 3990}])
    room = model.config.text.max_position_embeddings - len(prompt.input_ids)
    assert 0 < room < 4096
    steps = list(generate(model, collate([prompt], 0), max_new_tokens=10_000))
    assert len(steps) == room


def test_placeholders_without_pictures_are_refused(study):
    model, chat = study
    inputs = collate([chat.prompt([{"role": "user", "content": "hello"}])], 0)
    inputs.input_ids[0, 3] = model.config.media_placeholder_token_id
    with pytest.raises(ValueError, match="no pictures"):
        next(iter(generate(model, inputs)))


def test_more_placeholders_than_visual_tokens_are_refused(study, asked):
    model, chat = study
    inputs = collate([chat.prompt(messages(*asked[0]))], 0)
    inputs.input_ids[0, 0] = model.config.media_placeholder_token_id
    with pytest.raises(ValueError, match="picture placeholders but the pictures make"):
        next(iter(generate(model, inputs)))


def test_generation_config_adds_end_tokens(tmp_path):
    for file in ("tiktoken.model", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(checkpoint_folder("study") / file, tmp_path)
    usual = Chat.from_folder(tmp_path).stop_ids
    for named, added in ((7, {7}), ([7, 9], {7, 9}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert Chat.from_folder(tmp_path).stop_ids == usual | added
    for damaged in ("x", [-1], [10**6], [True]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": damaged}))
        with pytest.raises(ValueError, match="eos_token_id"):
            Chat.from_folder(tmp_path)
