"""Mixture-of-Recursions: equal to the released code in training, causal in decoding, as cheap as its routers say."""

import dataclasses
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import zoo
from zoo.families.mixture_of_recursions import MixtureOfRecursionsConfig
from zoo.pretrained.convert import adapt_layout, to_authors
from zoo.registry import get_family
from zoo.serve import DepthBatcher

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "num_recursions": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,  # so that routers and layers count
}
VARIANTS: dict[str, dict[str, Any]] = {
    "expert": {},
    "cycle": {"sharing": "cycle", "num_hidden_layers": 6},
    "first": {"capacities": (0.8, 0.5, 0.5), "thresholds": (0.3, 0.4, 0.5), "alpha": 0.5},
    "aux_router": {"aux_router": True, "router_form": "mlp"},
    "ungated": {"gating": "none", "num_hidden_layers": 5, "share_norms": False},
    "share": {"kv_mode": "share"},
    "update": {"kv_mode": "update"},
    "token": {"router": "token", "alpha": 1.0},
    "loss_free": {"router": "token", "alpha": 1.0, "balancing": "loss_free", "kv_mode": "share"},
    "none": {"router": "none"},
    "relaxed": {"router": "none", "lora_rank": 2, "sharing": "middle_sequence"},
    "multi_query": {"num_key_value_heads": 1, "num_recursions": 2, "num_hidden_layers": 6, "router_temperature": 2.0},
}


def make(variant: str = "expert", *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = zoo.build(MixtureOfRecursionsConfig(**{**SMALL, **VARIANTS[variant], **changes}), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora.up" in name:
                parameter.normal_(0, 0.2)
    return model


def tokens(batch: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- the released code


def golden_model(golden: ModuleType, case: dict, **fields: Any) -> Any:
    given = case["config"]
    names = {spec.name for spec in dataclasses.fields(MixtureOfRecursionsConfig)} & set(given)
    config = MixtureOfRecursionsConfig(
        **{name: given[name] for name in names},
        num_recursions=given["recursive"]["num_recursion"],
        sharing=given["recursive"]["sharing"],
        **fields,
    )
    model = zoo.build(config)
    state = golden.make_state(case["state"])
    for copy, first in case["tied"].items():  # as a released checkpoint has it: every tensor under all its names
        state |= {copy + key.removeprefix(first): value for key, value in state.items() if key.startswith(f"{first}.")}
    model.load_state_dict(adapt_layout(state, get_family("mixture_of_recursions"), model))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]
    return model


def our_name(key: str, model: Any) -> str:
    """Of a released parameter."""
    shape = torch.empty(1)
    return next(iter(adapt_layout({key: shape}, get_family("mixture_of_recursions"), model)))


@pytest.fixture(scope="module")
def released(golden: ModuleType, shared: Path) -> Any:
    def load(name: str, **fields: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        path = shared / "golden" / f"{name}.json"
        case = golden.load_case(path)
        return golden_model(golden, case, **fields), golden.make_input(case["input"]), golden.load_outputs(path)

    return load


@pytest.mark.parametrize("name", ["mor_135m_r2_expert", "mor_135m_r2_token", "recursive_135m_r2"])
def test_released_names_come_and_go(name: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "num_hidden_layers": 6}
    model: Any = zoo.build(zoo.get_config(name).override(**small))
    state = model.state_dict()
    theirs = to_authors(state, name, **small)
    names = {"expert": "model.layers.2.block.1.", "token": "model.layers.1.block_list.1.1.", "none": "model.layers.4."}
    shared = f"{names[model.model.config.router]}mlp.up_proj.weight"
    assert torch.equal(theirs[shared], state["model.layers.2.mlp.up_proj.weight"])
    back = zoo.convert_state_dict(theirs, name, **small)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    theirs[shared] = theirs[shared] + 1
    with pytest.raises(zoo.WeightsError, match=r"differs from .* was the sharing lost"):
        zoo.convert_state_dict(theirs, name, **small)


CASES = {"mor_recursive_r2": {"router": "none"}, "mor_expert_r3": {"router": "expert"}}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_the_released_codes(released: Any, name: str) -> None:
    model, ids, expected = released(name, **CASES[name])
    with model.routing("topk"), torch.no_grad():
        assert_close(model.eval()(ids).logits, expected["logits"], atol=1e-4, rtol=0)
    out = model.train()(ids, labels=ids)
    cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(cross_entropy, expected["loss"][0], atol=1e-5, rtol=0)
    out.loss.backward()
    gradients = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert len(gradients) >= 2
    for key in gradients:
        gradient = model.get_parameter(our_name(key, model)).grad
        assert_close(gradient, expected[f"grad.{key}"], atol=1e-6, rtol=0)


def test_selection_and_router_losses_are_the_released_codes(released: Any) -> None:
    model, ids, expected = released("mor_expert_r3", **CASES["mor_expert_r3"])
    record = model.train()(ids, labels=ids).routing
    for recursion in range(3):
        assert torch.equal(record.selected[recursion], expected[f"selected_{recursion}"])
        assert_close(record.logits[recursion], expected[f"router_logits_{recursion}"], atol=1e-5, rtol=0)
    assert_close(record.aux_loss, expected["sampling_loss"][0], atol=1e-5, rtol=0)
    assert_close(record.accuracy.float(), expected["sampling_acc"][0], atol=1e-5, rtol=0)
    assert_close(record.z_loss, expected["router_z_loss"][0], atol=1e-5, rtol=0)


def test_decoding_with_every_recursion_is_the_released_codes(released: Any) -> None:
    model, ids, expected = released("mor_expert_r3", **CASES["mor_expert_r3"])
    cache = model.eval().make_cache()
    with model.routing("topk"), torch.no_grad():
        model(ids[:, :24], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(24, 32)]
    assert_close(torch.cat(steps, 1), expected["logits_cached_decode"], atol=1e-4, rtol=0)


# ---- causal inference and caches


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_with_a_cache_are_one_causal_pass(variant: str) -> None:
    model, ids = make(variant), tokens(3)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        cache = model.make_cache()
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 17)]
    assert_close(torch.cat(parts, 1), whole.logits, atol=1e-10, rtol=0)
    assert torch.equal(cache.state.depths.long(), whole.routing.depths)
    if VARIANTS[variant].get("router") != "none":
        assert len(set(whole.routing.depths.flatten().tolist())) > 1, "every token took the same depth: tests nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_later_token_changes_an_earlier_logit(variant: str) -> None:
    model, ids = make(variant), tokens()
    other = torch.cat([ids[:, :9], tokens(seed=1)[:, 9:]], 1)
    with torch.no_grad():
        assert_close(model(other).logits[:, :9], model(ids).logits[:, :9], atol=1e-12, rtol=0)


def random_config(seed: int) -> dict[str, Any]:
    """Any config that holds together, small."""
    draw = random.Random(seed)
    repeats = draw.choice([1, 2, 3, 4])
    router = draw.choice(["expert", "expert", "token", "none"])
    kinds = ["cycle", "middle_cycle"] + ["sequence", "middle_sequence"] * (router == "none")
    sharing = draw.choice(kinds)
    changes: dict[str, Any] = {
        "num_recursions": repeats,
        "router": router,
        "sharing": sharing,
        "num_hidden_layers": repeats * draw.choice([1, 2]) + 2 * sharing.startswith("middle"),
        "num_key_value_heads": draw.choice([1, 2, 4]),
        "share_norms": draw.random() < 0.7,
        "lora_rank": draw.choice([0, 0, 2]),
        "router_form": draw.choice(["linear", "mlp"]),
        "router_temperature": draw.choice([1.0, 2.0]),
        "gating": draw.choice(["weighted", "none"]),
        "alpha": draw.choice([0.1, 1.0]),
        "kv_mode": draw.choice(["recursion", "share", "update"]) if sharing.endswith("cycle") else "recursion",
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if router == "expert":
        first = 1.0 if changes["kv_mode"] != "recursion" else draw.choice([1.0, 0.9])
        later = sorted((draw.uniform(0.3, 0.9) for _ in range(repeats - 1)), reverse=True)
        changes["capacities"] = (first, *later)
        changes["aux_router"] = draw.random() < 0.3
    if router == "token":
        changes["balancing"] = draw.choice(["loss", "loss_free"])
    return changes


@pytest.mark.parametrize("seed", range(16))
def test_random_configs_are_causal_cached_and_batched_exactly(seed: int) -> None:
    changes, draw = random_config(seed), random.Random(seed)
    model, length = make("expert", **changes), draw.randint(9, 20)
    ids = tokens(3, length, seed)
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : draw.randint(0, 4)] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False)
        cut = draw.randint(5, length - 1)  # no later token changes an earlier logit
        other = torch.cat([ids[:, :cut], tokens(3, length, seed + 99)[:, cut:]], 1)
        real = mask[:, :cut].bool()
        changed = model(other, attention_mask=mask, use_cache=False).logits
        assert_close(changed[:, :cut][real], whole.logits[:, :cut][real], atol=1e-10, rtol=0)
        assert not torch.allclose(changed[:, cut:], whole.logits[:, cut:])
        cache, at = model.make_cache(), 0  # in pieces of any length
        while at < length:
            end = min(length, at + draw.choice([1, 1, 1, 2, 5]))
            piece = model(ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            real = mask[:, at:end].bool()
            assert_close(piece[real], whole.logits[:, at:end][real], atol=1e-10, rtol=0)
            at = end
        assert torch.equal(cache.state.depths.long(), whole.routing.depths)
        first, second = ids[:1, :cut], ids[:1, cut:]  # packed documents
        positions = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
        packed = model(ids[:1], position_ids=positions).logits
        assert_close(packed[:, :cut], model(first).logits, atol=1e-10, rtol=0)
        assert_close(packed[:, cut:], model(second).logits, atol=1e-10, rtol=0)
    if changes["sharing"].endswith("cycle"):
        check_batcher(model, places=draw.randint(1, 4))


def test_topk_is_not_causal() -> None:
    """Which is why evaluation does not use it."""
    model, ids = make(), tokens()
    other = torch.cat([ids[:, :9], tokens(seed=1)[:, 9:]], 1)
    with torch.no_grad(), model.routing("topk"):
        assert (model(other).logits[:, :9] - model(ids).logits[:, :9]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_padding_changes_nothing(variant: str, mode: str) -> None:
    """Left or right, in training too: its tokens count for no capacity and are seen by nobody."""
    model = make(variant).train(mode == "train")
    first, second = tokens(1, 17), tokens(1, 11, seed=1)
    for left in (True, False):
        ids, mask = torch.zeros(2, 17, dtype=torch.int64), torch.zeros(2, 17, dtype=torch.int64)
        part = slice(6, 17) if left else slice(0, 11)
        ids[0], ids[1, part], mask[0], mask[1, part] = first[0], second[0], 1, 1
        with torch.no_grad():
            both = model(ids, attention_mask=mask).logits
            assert_close(both[:1], model(first).logits, atol=1e-10, rtol=0)
            assert_close(both[1:, part], model(second).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_are_separate(variant: str) -> None:
    model = make(variant)
    first, second = tokens(1, 7), tokens(1, 10, seed=1)
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions).logits
        assert_close(packed[:, :7], model(first).logits, atol=1e-10, rtol=0)
        assert_close(packed[:, 7:], model(second).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["expert", "share", "token"])
def test_packed_documents_do_not_see_each_other_in_training(variant: str) -> None:
    model = make(variant).train()
    ids, positions = tokens(2, 16), torch.cat([torch.arange(7), torch.arange(9)])[None].expand(2, -1)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, position_ids=positions).logits[:, 7:].sum().backward()
    assert not embedded.grad[:, :7].any()
    assert embedded.grad[:, 7:].any()


@pytest.mark.parametrize("variant", ["expert", "cycle", "share", "update", "token", "none"])
def test_cache_holds_what_the_formula_says(variant: str) -> None:
    model, ids = make(variant, dtype=torch.float32), tokens(1, 33)
    cache = model.make_cache()
    with torch.no_grad():
        out = model(ids, past_key_values=cache)
    expected = model.model.config.kv_bytes_per_token(out.routing.mean_depth, itemsize=4) * 33
    assert cache.state.nbytes == round(expected)
    assert cache.state.nbytes_allocated == cache.state.nbytes
    with torch.no_grad():  # padding is not stored
        padded = model.make_cache()
        mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 33)], 1)
        model(torch.cat([tokens(1, 9, seed=3), ids], 1), attention_mask=mask, past_key_values=padded)
    assert padded.state.nbytes == cache.state.nbytes


def test_cache_memory_falls_with_the_capacities() -> None:
    config = MixtureOfRecursionsConfig()
    vanilla = config.override(router="none")
    assert config.kv_bytes_per_token() / vanilla.kv_bytes_per_token() == pytest.approx((2 + 10 * 2) / 32)
    assert config.override(kv_mode="share").kv_bytes_per_token() / vanilla.kv_bytes_per_token() == 12 / 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_cropped_and_reordered_caches_continue(variant: str) -> None:
    model, ids = make(variant), tokens(3, 12)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model.make_cache()
        model(ids, past_key_values=cache)
        with pytest.raises(zoo.errors.ShapeError, match="holds 12 tokens; expected at most so many to be removed"):
            cache.crop(-13)
        cache.crop(-5)
        cache.reorder_cache(order)
        assert cache.get_seq_length() == 7
        continued = torch.cat([ids[order, :7], tokens(3, 4, seed=5)], 1)
        after = model(continued[:, 7:], past_key_values=cache).logits
        assert_close(after, model(continued).logits[:, 7:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["expert", "share", "token"])
def test_generates_alike_with_and_without_cache(variant: str) -> None:
    model = make(variant)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    alone = model.generate(ids[1:, 4:], **options)
    assert torch.equal(cached[1:, 9:], alone[:, 5:])
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **options)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **options))


def test_all_tokens_may_exit_at_once() -> None:
    model = make("expert", thresholds=(0.0, 1.0, 1.0))
    with torch.no_grad():
        out = model(tokens())
    assert out.routing.mean_depth == 1.0
    none = make("expert", capacities=(0.5, 0.5, 0.5), thresholds=(1.0, 1.0, 1.0))
    with torch.no_grad():
        assert none(tokens()).routing.mean_depth == 0.0
        ids = tokens(1, 5)
        assert none.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_an_empty_row_leaves_the_others_alone() -> None:
    model = make()
    ids = tokens(4, 6)
    with torch.no_grad():
        together = model(ids)
        assert 1 in together.routing.depths.unique()
        for row in range(4):
            assert_close(model(ids[row : row + 1]).logits[0], together.logits[row], atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token(variant: str) -> None:
    model = make(variant)
    ids = tokens(2, 1)
    loss = model.train()(torch.cat([ids, ids], 1), labels=torch.cat([ids, ids], 1)).loss
    assert loss.isfinite()
    assert model(ids).logits.shape == (2, 1, SMALL["vocab_size"])


# ---- depth-wise batching

MIXED = [name for name, fields in VARIANTS.items() if not fields.get("sharing", "").endswith("sequence")]
LENGTHS = ((3, 6), (9, 2), (1, 7), (5, 1), (7, 5), (2, 4))  # of prompts, and of what is to be written


def alone(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    ids = prompt[None]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :]


def check_batcher(model: Any, places: int, **options: Any) -> None:
    """More sequences than places, of different lengths, that come and go at different times: each as if alone."""
    batcher = DepthBatcher(model, max_sequences=places, **options)
    prompts = [tokens(1, length, seed=i)[0] for i, (length, _) in enumerate(LENGTHS)]
    for prompt, (_, count) in zip(prompts, LENGTHS, strict=True):
        batcher.submit(prompt, max_new_tokens=count)
    results = batcher.run()
    for prompt, (_, count), result in zip(prompts, LENGTHS, results, strict=True):
        assert result.tokens == alone(model, prompt, count).tolist()
        with torch.no_grad():
            whole = model(torch.tensor([result.prompt + result.tokens[:-1]]), use_cache=False)
        assert result.depths == whole.routing.depths[0].tolist()


@pytest.mark.parametrize("variant", MIXED)
def test_results_are_those_of_each_sequence_alone(variant: str) -> None:
    check_batcher(make(variant), places=3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="weights are packed by oneDNN")
@pytest.mark.parametrize("variant", ["expert", "ungated", "update", "token", "none"])
def test_results_on_packed_weights_are_the_same(variant: str) -> None:
    model = make(variant, dtype=torch.float32)
    check_batcher(model, places=3, pack=True)
    plain, packed = (DepthBatcher(model, pack=pack).blocks[0] for pack in (False, True))
    assert type(packed) is not type(plain)


def test_sequences_at_different_depths_share_passes() -> None:
    model = make("expert", thresholds=(0.0, 0.5, 0.5))
    batcher = DepthBatcher(model, max_sequences=4)
    for i in range(4):
        batcher.submit(tokens(1, 5, seed=i)[0], max_new_tokens=8)
    results = batcher.run()
    depths = [result.depths[5:] for result in results]
    assert len({tuple(each) for each in depths}) > 1
    assert batcher.tokens_passed == sum(map(sum, depths))
    assert batcher.passes == max(map(sum, depths))  # as many as the sequence that takes the most needs alone


def test_end_of_text_frees_the_place() -> None:
    model = make()
    prompt = tokens(1, 5)[0]
    written = alone(model, prompt, 6).tolist()
    batcher = DepthBatcher(model, max_sequences=1, eos_token_id=written[2])
    for _ in range(2):
        batcher.submit(prompt, max_new_tokens=6)
    stop = written.index(written[2]) + 1
    assert [result.tokens for result in batcher.run()] == [written[:stop]] * 2


def test_sampling_depends_on_the_seed_alone() -> None:
    model = make()
    runs = []
    for places, seed in ((1, 5), (4, 5), (4, 6)):
        batcher = DepthBatcher(model, max_sequences=places, temperature=1.0, top_k=20, seed=seed)
        for i in range(4):
            batcher.submit(tokens(1, 4, seed=i)[0], max_new_tokens=6)
        runs.append([result.tokens for result in batcher.run()])
    assert runs[0] == runs[1] != runs[2]


def test_bad_input_of_the_batcher() -> None:
    model = make()
    with pytest.raises(zoo.ConfigError, match="expected 'cycle' or 'middle_cycle'"):
        DepthBatcher(make("relaxed"))
    with pytest.raises(zoo.ConfigError, match="expected a Mixture-of-Recursions model"):
        DepthBatcher(torch.nn.Linear(2, 2))
    with pytest.raises(zoo.ConfigError, match="expected at least 1, 0 and 0"):
        DepthBatcher(model, max_sequences=0)
    for prompt in ([], [97], [-1]):
        with pytest.raises(zoo.errors.ShapeError, match="expected at least one token, each from 0 to 96"):
            DepthBatcher(model).submit(prompt)
    with pytest.raises(zoo.errors.ShapeError, match="max_new_tokens is 0"):
        DepthBatcher(model).submit([1], max_new_tokens=0)
    with pytest.raises(zoo.ConfigError, match="temperature nan"):
        DepthBatcher(model, temperature=math.nan)
    assert DepthBatcher(model).run() == []


def test_the_batcher_takes_tokens_that_were_added() -> None:
    model = make()
    model.resize_token_embeddings(100)
    batcher = DepthBatcher(model)
    batcher.submit([99, 98], max_new_tokens=2)
    ids = torch.tensor([[99, 98]])
    expected = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert batcher.run()[0].tokens == expected[0, 2:].tolist()


def test_the_batcher_warns_once_of_positions(caplog: pytest.LogCaptureFixture) -> None:
    model = make(max_position_embeddings=8)
    batcher = DepthBatcher(model)
    batcher.submit([1, 2], max_new_tokens=6)
    assert not caplog.messages
    for _ in range(2):
        batcher.submit([1, 2], max_new_tokens=7)
    assert caplog.messages == ["A text may pass the model's 8 positions, beyond which it was not trained."]


# ---- sharing


def storages(model: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}


def check_sharing(model: Any, config: MixtureOfRecursionsConfig) -> None:
    """The exact number of unique parameters, in as many storages as there are tensors."""
    dim, hidden, width = config.hidden_size, config.intermediate_size, config.head_dim
    block = 2 * dim + 2 * dim * config.num_attention_heads * width + 2 * dim * config.num_key_value_heads * width
    block += 3 * dim * hidden
    routers = {"none": 0, "expert": config.num_recursions * dim, "token": config.num_recursions * dim}[config.router]
    expected = config.vocab_size * dim + (config.own_layers + config.base_depth) * block + routers + dim
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert len(storages(model)) == len(list(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("variant", ["expert", "token", "none", "cycle"])
def test_shared_tensors_have_one_storage_whatever_happens(variant: str, tmp_path: Path) -> None:
    model = make(variant, dtype=torch.float32)
    config = model.model.config
    check_sharing(model, config)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    check_sharing(loaded, config)
    check_sharing(model.to(torch.bfloat16), config)
    again = zoo.build(config, device="meta")
    again.load_state_dict(loaded.state_dict(), assign=True)
    check_sharing(again, config)
    assert "lm_head.weight" not in again.state_dict()
    ids = tokens()
    with torch.no_grad():
        expected = loaded.eval()(ids).logits
        assert torch.equal(again.eval()(ids).logits, expected)
    compiled = torch.compile(loaded, backend="eager")
    check_sharing(compiled._orig_mod, config)


def test_sharing_survives_fsdp2(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = make("expert", dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        expected = model(tokens()).logits
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        with torch.no_grad():
            assert_close(model(tokens()).logits, expected)
        model.train()(tokens(), labels=tokens()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


# ---- training


def test_capacities_warm_up() -> None:
    model = make("expert", capacity_warmup_steps=4).train()
    config = model.model.config
    seen = []
    for step in range(6):
        model.set_step(step)
        seen.append(model.model.current_shares()[2])
    share = config.shares[2]
    expected = [
        share + (1 - share) * (1 + torch.tensor(torch.pi * min(1, (i + 1) / 4)).cos().item()) / 2 for i in range(6)
    ]
    assert seen == pytest.approx(expected, abs=1e-6)
    assert seen[3:] == [pytest.approx(share)] * 3
    assert model.eval().model.current_shares() == config.shares


def test_loss_free_balancing_moves_the_bias_only_in_training() -> None:
    model = make("loss_free")
    model(tokens())
    assert not model.model.router_bias.any()
    model.train()(tokens())
    depths = model.model.last.depths.flatten()
    for recursion in range(3):
        share = (depths == recursion + 1).double().mean()
        assert model.model.router_bias[recursion] == pytest.approx(0.001 * float((1 / 3 - share).sign()))


@pytest.mark.parametrize("variant", ["expert", "token", "aux_router"])
def test_every_parameter_learns(variant: str) -> None:
    model = make(variant, z_loss_coef=1e-3).train()
    model(tokens(4, 24), labels=tokens(4, 24)).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


# ---- compute budgets


@pytest.mark.parametrize("variant", ["expert", "share", "none"])
def test_activations_that_cannot_be_checkpointed_are_warned_of_once(
    variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(variant).train()
    model.gradient_checkpointing_enable()
    for _ in range(2):
        model(tokens(), labels=tokens()).loss.backward()
    expected = "activations are not checkpointed: with a router and kv_mode='share' no block can run twice; expected "
    assert [each.startswith(expected) for each in caplog.messages] == [True] * (variant == "share")


def test_calibration_meets_the_capacities_and_budgets(tmp_path: Path) -> None:
    model = make("expert", dtype=torch.float32)
    text = tokens(8, 64, seed=7)
    assert model.calibrate(text) == pytest.approx(2.0, abs=0.02)
    depths = []
    for budget in (0.45, 0.6, 0.9):
        model.set_compute_budget(budget)
        model.reset_mean_depth()
        with torch.no_grad():
            model(text)
        depths.append(model.mean_depth)
    assert depths == sorted(depths)
    assert depths[1] == pytest.approx(1.8, abs=0.25)  # by quantiles: what a threshold changes, later routers see
    model.set_compute_budget(0.6, text)
    model.reset_mean_depth()
    with torch.no_grad():
        model(text)
    assert model.mean_depth == pytest.approx(1.8, abs=0.02)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).model.config.thresholds == model.model.config.thresholds


def test_token_choice_takes_a_budget() -> None:
    model = make("token")
    assert model.calibrate(tokens(8, 64, seed=7), 0.5) == pytest.approx(1.5, abs=0.1)
    with pytest.raises(zoo.ConfigError, match="Token choice is calibrated for one budget at a time; expected tokens"):
        model.set_compute_budget(0.6)


def test_routers_that_are_sure_can_be_told_apart() -> None:
    """In float32 all their probabilities are 1, or close to it."""
    model = make("expert")
    trunk = model.model
    logits = torch.linspace(20.0, 30.0, 11)
    assert (logits.float().sigmoid() == 1).sum() > 5
    trunk.arch = trunk.arch.override(thresholds=(0.0, 1 - math.exp(-24.5), 1.0))
    assert trunk.goes_on(logits, 0) is None
    assert trunk.goes_on(logits, 1).tolist() == (logits > 24.5).tolist()
    assert not trunk.goes_on(logits, 2).any()


def test_budgets_that_cannot_be_had() -> None:
    model = make("expert")
    with pytest.raises(zoo.ConfigError, match="was not calibrated; expected tokens"):
        model.set_compute_budget(0.6)
    with pytest.raises(zoo.ConfigError, match=r"expected more than 0.333, as 1 of 3 recursions take every token"):
        model.set_compute_budget(0.2, tokens())
    with pytest.raises(zoo.ConfigError, match="without a router"):
        make("none").set_compute_budget(0.5)
    for budget in (1.5, math.nan, "x", None):
        with pytest.raises(zoo.ConfigError, match="expected a share of the recursions"):
            model.set_compute_budget(budget)


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacities": (0.5, 0.8, 1.0)}, r"which increase; .* expected for example \(1.0, 0.8, 0.5\)"),
        ({"capacities": (0.0, 0.0, 0.0)}, "expected shares of the tokens, more than 0, at most 1"),
        ({"capacities": (1.5, 1.0, 0.5)}, "expected shares of the tokens, more than 0, at most 1"),
        ({"capacities": (1.0, 0.5)}, "expected one for each of 3 recursions"),
        ({"num_recursions": 4}, "the nearest are 6 and 10"),
        ({"sharing": "middle_circle"}, "Did you mean: middle_cycle"),
        ({"sharing": "sequence", "num_hidden_layers": 6}, "a router needs recursions over whole stacks"),
        ({"router": "none", "capacities": (1.0, 0.5, 0.2)}, "capacities belong to expert choice"),
        ({"router": "token", "aux_router": True}, "aux_router belongs to expert choice"),
        ({"kv_mode": "share", "capacities": (0.9, 0.5, 0.2)}, "needs 1.0 first"),
        ({"thresholds": (0.0, 2.0, 0.0)}, "expected probabilities, 0 to 1"),
        ({"num_key_value_heads": 3}, "expected a divisor of the 4 heads"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "heads of an even width"),
    ],
)
def test_configs_that_make_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        MixtureOfRecursionsConfig(**{**SMALL, **changes})


def test_inputs_that_cannot_be() -> None:
    model, other = make(), make("share")
    with pytest.raises(zoo.ConfigError, match="cache is of another config"):
        model(tokens(), past_key_values=other.make_cache())
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0, -1] = 0
    with pytest.raises(zoo.ConfigError, match="padding on the left"):
        model.generate(tokens(), attention_mask=mask, max_new_tokens=2)
    with pytest.raises(zoo.ConfigError, match="routing is 'top'; expected 'topk' or 'threshold'"), model.routing("top"):
        model(tokens())
    with pytest.raises(zoo.errors.ShapeError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.int64))
