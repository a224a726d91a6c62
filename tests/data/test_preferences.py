"""Rows of preferences: every form of them, what of it is compared, what is counted and refused."""

import json

import numpy as np
import pytest

from fsdp_qlora import config
from fsdp_qlora.data import prepare, prompts, tokenizer
from fsdp_qlora.data.batches import PackedBatches, sampler_config
from fsdp_qlora.errors import UserError
from tests import small_tokenizers, tiny

ASK, GOOD, BAD = "What is 3?", "Some number.", "A fish, I think, or maybe two of them."
USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", ASK), ("assistant", GOOD), ("assistant", BAD))
)
GPT = [{"from": "gpt", "value": text} for text in (GOOD, BAD)]
HH = f"\n\nHuman: {ASK}\n\nAssistant: "
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]
PAIRS = {
    "plain": {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    "implicit plain": {"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"},
    "question": {"question": ASK, "chosen": GOOD, "rejected": BAD, "system": "Be short."},
    "alpaca": {"instruction": "Say", "input": ASK, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "messages and text": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "talk": {"chosen": [*TALK, YES], "rejected": [*TALK, NO]},
    "ultrafeedback": {
        "prompt": ASK,
        "messages": [USER, YES],
        **{"chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8.0},
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASK}],
        **{"chosen": GPT[0], "rejected": GPT[1]},
    },
    "hh": {"chosen": HH + GOOD, "rejected": HH + BAD},
    "argilla": {"prompt": ASK, "chosen_response": GOOD, "rejected_response": BAD},
}
LABELLED = {
    "plain": {"prompt": ASK, "completion": GOOD, "label": True},
    "messages": {"prompt": [USER], "completion": [YES], "label": True},
    "llama-factory": {"messages": [*TALK, YES], "kto_tag": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_tokenizers.save(tmp_path_factory.mktemp("model"), "chatml")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(place, path, *flags, rows=None):
    if rows is not None:
        write(path, rows)
    cfg = config.parse([f"--dataset={path}", "--token_cache=off", "--eval_split=none", *flags])
    ready = prepare.prepare(cfg, tokenizer.read(place), 600)
    return cfg, ready, prepare.audit(cfg, ready, 2, 8)


def texts(place, sample):
    """All of a row, and what is learned of it."""
    decode, ids = tokenizer.read(place).core.decode, sample.input_ids
    return decode(ids.tolist(), False), decode(ids[sample.is_trained].tolist(), False)


@pytest.mark.parametrize("name", PAIRS)
def test_both_answers_of_a_pair_are_the_rows_that_sft_would_learn(place, tmp_path, name):
    _, ready, found = run(place, tmp_path / "x.jsonl", "--objective=dpo", rows=[PAIRS[name]])
    ready.check()
    (sample,) = ready.train
    whole, learned = zip(*(texts(place, row) for row in sample.rows()), strict=True)
    assert [text.strip().removesuffix("<|im_end|>").strip() for text in learned] == [GOOD, BAD]
    assert all("<|im_end|>" in text for text in learned)
    assert all(ASK in text for text in whole) and not any(f"{GOOD}{BAD}" in text for text in whole)
    rest = {n: v for n, v in PAIRS[name].items() if n not in ("chosen", "rejected")}
    for text, answer in zip(whole, (GOOD, BAD), strict=True):  # the row as SFT has it
        prompt = TALK if name == "talk" else [USER]
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        if name in ("plain", "argilla"):
            row = {"prompt": ASK, "completion": answer}
        elif name == "implicit plain":
            row = {"prompt": ASK, "completion": f" {answer}"}
        elif name == "question":
            row = {"question": ASK, "answer": answer, "system": rest["system"]}
        elif name == "alpaca":
            row = {"instruction": "Say", "input": ASK, "output": answer}
        _, alone, _ = run(place, tmp_path / "y.jsonl", rows=[row])
        assert texts(place, alone.train[0])[0] == text
    assert 0 < sample.prompt <= min(len(row.input_ids) for row in sample.rows())
    assert found.facts["unused"] == ({"score_chosen": 1} if name == "ultrafeedback" else {})
    assert found.facts["answers"]["chosen_longer"] == 0
    assert any(
        "chosen answers are longer in 0% of the pairs" in note for note in found.facts["notes"]
    )


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_answers_of_every_form_are_learned_with_their_label(place, tmp_path, name):
    bad = {n: (not v if v is True else v) for n, v in LABELLED[name].items()}
    table = [LABELLED[name], bad, PAIRS["plain"]]
    _, ready, found = run(place, tmp_path / "x.jsonl", "--objective=kto", rows=table)
    ready.check()
    assert [sample.label for sample in ready.train] == [1, -1, 1, -1]
    learned = [texts(place, sample)[1].strip().removesuffix("<|im_end|>") for sample in ready.train]
    assert learned == [GOOD, GOOD, GOOD, BAD]
    assert all(int(s.is_trained.argmax()) == s.prompt for s in ready.train)
    assert found.facts["answers"] == {"desirable": 2, "not": 2}
    assert "labels    2 answers are desirable, 2 are not" in found.lines()


def test_what_is_lost_is_counted_and_what_cannot_be_compared_is_refused(place, tmp_path):
    long, path = "z " * 200, tmp_path / "x.jsonl"
    table = [
        {"prompt": ASK, "chosen": GOOD, "rejected": GOOD},
        {"prompt": ASK, "chosen": GOOD, "rejected": long},
        {"prompt": long, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": GOOD, "rejected": " "},
        PAIRS["plain"],
        PAIRS["plain"],
    ]
    _, ready, found = run(place, path, "--objective=dpo", "--context_length=64", rows=table)
    numbers = {n: found.facts[f"num_{n}"] for n in ("same", "cut", "beyond", "empty", "repeated")}
    assert numbers == {"same": 1, "cut": 1, "beyond": 1, "empty": 1, "repeated": 1}
    assert (
        f"same      1 pairs have two equal answers, which teach nothing: {path}:1" in found.lines()
    )
    assert ready.train.lengths.max() == 64
    wrong = {
        "[USER], no answer": {"chosen": [USER], "rejected": [USER]},
        "nothing in common": {"chosen": [YES], "rejected": [NO]},
        "no pair": {"prompt": ASK, "completion": GOOD},
        "text": {"prompt": ASK, "chosen": 3, "rejected": BAD},
    }
    write(path, wrong.values())
    _, ready, _ = run(place, path, "--objective=dpo")
    assert ready.facts["num_bad"] == len(wrong)
    _, ready, _ = run(
        place, path, "--objective=kto", rows=[{"prompt": "a", "completion": "b", "label": 3}]
    )
    assert ready.facts["bad"] == [(f"{path}:1", 'field "label" is a number (want true or false)')]
    with pytest.raises(UserError, match="knows no prompt"):
        run(place, path, "--objective=dpo", "--template={prompt} {chosen}")


def test_held_out_prompts_are_asked_as_the_user_wrote_them(place, tmp_path):
    path = write(tmp_path / "x.jsonl", [PAIRS["messages"]] * 4)
    cfg = config.parse([f"--dataset={path}", "--objective=dpo", "--eval_split=1"])
    ready = prepare.prepare(cfg, light := tokenizer.read(place), 600)
    (asked,) = prompts.choose_prompts(cfg, ready, light)
    assert (asked.shown, asked.expected) == (ASK, GOOD)
    assert light.core.decode(list(asked.ids), False).endswith("<|im_start|>assistant\n")


def test_sft_says_what_happens_to_rows_of_preferences(place, tmp_path):
    _, _, found = run(place, tmp_path / "x.jsonl", rows=[PAIRS["ultrafeedback"]])
    assert any("--objective dpo learns from both" in note for note in found.facts["notes"])
    _, _, found = run(place, tmp_path / "x.jsonl", rows=[LABELLED["plain"]])
    assert any("--objective kto tells them apart" in note for note in found.facts["notes"])
    _, ready, _ = run(place, tmp_path / "x.jsonl", rows=[PAIRS["plain"]])
    assert "--objective dpo learns pairs" in ready.facts["bad"][0][1]


def test_tokens_are_kept_with_the_objective_and_both_sides_are_shown(place, tmp_path):
    path, flags = (
        write(tmp_path / "x.jsonl", [*PAIRS.values()]),
        [f"--token_cache={tmp_path / 'c'}"],
    )
    kept = [
        run(place, path, *flags, f"--objective={name}")[1:]
        for name in ("dpo", "dpo", "orpo", "kto")
    ]
    notes = [found.facts["kept"] for _, found in kept]
    assert ["made before" in note for note in notes] == [False, True, True, False]
    for one, other in zip(kept[0][0].train, kept[1][0].train, strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert all(
            np.array_equal(a, b)
            for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
        )
    cfg, ready, _ = run(place, path, "--objective=dpo")
    shown = "".join(prepare._shown(cfg, ready, tokenizer.read(place), 1))
    assert f"⟦{GOOD}<|im_end|>⟧" in shown.replace("⟦ ", "⟦") and ": rejected, " in shown


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_batches_hold_every_answer_once_with_its_targets(place, tmp_path, objective):
    table = [
        {"prompt": f"{ASK} {i}", "chosen": GOOD * (1 + i % 4), "rejected": BAD, "n": i}
        for i in range(23)
    ]
    flags = (f"--objective={objective}", "--batch_size=2", "--gradient_accumulation_steps=2")
    cfg, ready, _ = run(place, tmp_path / "x.jsonl", *flags, rows=table)
    samples = ready.train
    padded = [
        batch for rank in range(3) for batch in tiny.held_out(samples, 2, 3, rank, 8, objective)
    ]
    packed = [
        batch
        for rank in range(3)
        for made in [PackedBatches(samples, 96, sampler_config(cfg, 3, rank, 8))]
        for step in range(made.steps_per_epoch)
        for batch in made.step(step)
    ]
    for batches in (padded, packed):
        hashes = np.concatenate([batch.sides.hashes for batch in batches])
        assert sorted(hashes) == sorted(samples.hashes)
        for batch in batches:
            sides = batch.sides
            assert len(sides.counts) == len(sides.hashes) * samples.num_sides
            assert (
                sum(sides.counts) == batch.num_trained_tokens == (batch.labels[:, 1:] != -100).sum()
            )
            assert (objective == "orpo") == (sides.is_answer is not None or not sides.counts)
            if objective == "kto":
                assert len(sides.signs) == len(sides.counts)
    assert all(batch.num_tokens <= 2 * 96 * samples.num_sides for batch in packed)
    if objective == "kto":
        step = [tiny.held_out(samples, 2, 3, rank, 8, "kto")[0] for rank in range(3)]
        core = tokenizer.read(place).core
        for own, other in ((batch, batch.mismatched) for batch in step):
            for a, b in zip(own.input_ids, other.input_ids, strict=False):
                one, two = (core.decode(ids.tolist(), False) for ids in (a, b))
                at = one.index("number" if "number" in one else "fish") - 2
                assert one[: at - 3] == two[: at - 3]
        mine, others = (
            sorted(
                core.decode(ids[labels >= 0].tolist())
                for b in batches
                for ids, labels in zip(b.input_ids, b.labels, strict=True)
            )
            for batches in (step, [batch.mismatched for batch in step])
        )
        assert mine == others  # the same answers, each behind another prompt
