"""MatMul-free LM: equal to the authors' code, and what is special to a recurrence."""

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from threads import torch_threads
from torch import nn
from torch.testing import assert_close
from wrapper import Wrapper

import zoo
from zoo.families.matmulfree import FAMILY, MatMulFreeConfig
from zoo.layers import BitLinear, PackedBitLinear, pack_bit_linears
from zoo.models.matmulfree import MatMulFreeBlock
from zoo.ops.bit_linear import choose, cpu
from zoo.pretrained.convert import convert_state_dict, to_authors

TINY = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def case(shared: Path, golden: ModuleType) -> dict[str, Any]:
    """The golden case: its model under zoo's names, its input, the authors' state dict and their outputs."""
    path = shared / "golden" / "matmulfree_tiny.json"
    described = golden.load_case(path)
    authors = golden.make_state(described["state"])
    model = zoo.create_model("matmulfree_370m", **TINY)
    model.load_state_dict(convert_state_dict(authors, "matmulfree_370m", **TINY))
    return {
        "model": model.eval(),
        "tokens": golden.make_input(described["input"]),
        "authors": authors,
        "outputs": golden.load_outputs(path),
        "params": described["params"],
        "config": described["config"],
    }


@torch.no_grad()
def test_logits_and_state(case: dict[str, Any]) -> None:
    """Within 1e-4. The case's seed keeps every int8 code away from a tie: one that fell the other way would move logits
    by 0.03 and more, in correct code too."""
    model, outputs = case["model"], case["outputs"]
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    answer = model(case["tokens"])
    assert_close(answer.logits, outputs["logits"], atol=1e-4, rtol=0)
    states = model.make_cache()
    model(case["tokens"], past_key_values=states)
    found = torch.stack([states.state.tensors[layer] for layer in range(3)])
    assert_close(found, outputs["final_state"].flatten(2), atol=1e-4, rtol=0)


@torch.no_grad()
def test_step_by_step(case: dict[str, Any]) -> None:
    model, tokens = case["model"], case["tokens"]
    cache, logits = model.make_cache(), []
    for column in tokens.split(1, dim=1):
        logits.append(model(column, past_key_values=cache).logits)
    assert_close(logits[-1][:, 0], case["outputs"]["logits_step_last"].view(2, -1), atol=1e-4, rtol=0)
    assert_close(torch.cat(logits, 1), case["outputs"]["logits"], atol=1e-4, rtol=0)


def test_loss_and_gradients(case: dict[str, Any]) -> None:
    model, outputs = case["model"], case["outputs"]
    model.zero_grad()
    answer = model(case["tokens"], labels=case["tokens"])
    assert_close(answer.loss, outputs["loss"][0], atol=1e-4, rtol=0)
    answer.loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = outputs.get("grad." + name.replace("embed_tokens", "embeddings"))
        if expected is not None:
            assert_close(parameter.grad, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
            compared += 1
    assert compared == sum(name.startswith("grad.") for name in outputs)


def test_released_layout(case: dict[str, Any], tmp_path: Path) -> None:
    """A folder as the authors' code saves it loads through zoo and through the Auto class, and goes back."""
    from transformers import AutoModelForCausalLM

    values = {"model_type": "hgrn_bit", "architectures": ["HGRNBitForCausalLM"], **case["config"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(case["authors"], tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = zoo.create_model(f"local-dir:{tmp_path}").eval()
    with torch.no_grad():
        for model in (loaded, ours):
            assert_close(model(case["tokens"]).logits, case["outputs"]["logits"], atol=1e-4, rtol=0)
    back = to_authors(ours.state_dict(), "matmulfree_370m", **TINY)
    assert back.keys() == case["authors"].keys()
    assert all(torch.equal(tensor, case["authors"][name]) for name, tensor in back.items())


def test_a_released_config_that_the_original_does_not_run(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hgrn_bit", "use_short_conv": True}))
    with pytest.raises(zoo.ConfigError, match="use_short_conv is True in this hgrn_bit config; expected False"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, params", [("370m", 374_108_160), ("1_3b", 1_364_779_008), ("2_7b", 2_702_357_504)])
def test_released_sizes(name: str, params: int) -> None:
    model = zoo.build(zoo.get_config(f"matmulfree_{name}"), device="meta")
    assert sum(p.numel() for p in model.parameters()) == params


def test_initialisation() -> None:
    """The deviations measured in the authors' code."""
    torch.manual_seed(0)
    config = zoo.get_config("matmulfree_14m")
    model: Any = zoo.build(config)
    block, width = model.model.layers[3], config.hidden_size
    xavier = 2**-2.5 * math.sqrt(2 / (2 * width))
    for projection in (block.attn.i_proj, block.attn.f_proj, block.attn.g_proj, block.attn.o_proj):
        assert projection.weight.std().item() == pytest.approx(xavier, rel=0.02)
        assert projection.weight.abs().max() <= xavier * math.sqrt(3) * 1.0001  # uniform
    for weight in (block.mlp.gate_proj.weight, model.model.embed_tokens.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert not model.model.lower_bounds.any()
    assert all(norm.weight.eq(1).all() for norm in (block.attn_norm, block.attn.g_norm, model.lm_head.norm))


@torch.no_grad()
def test_padding_keeps_the_state_on_either_side(case: dict[str, Any]) -> None:
    model, tokens = case["model"], case["tokens"][:1, :9]
    alone = model.make_cache()
    expected = model(tokens, past_key_values=alone).logits
    for left in (True, False):
        mask = torch.ones(1, 14, dtype=torch.long)
        padded = torch.randint(0, 1000, (1, 14))
        real = slice(5, None) if left else slice(0, 9)
        mask[:, slice(0, 5) if left else slice(9, None)] = 0
        padded[:, real] = tokens
        cache = model.make_cache()
        logits = model(padded, attention_mask=mask, past_key_values=cache).logits
        assert_close(logits[:, real], expected, atol=1e-5, rtol=0)
        for layer, state in alone.state.tensors.items():
            assert_close(cache.state.tensors[layer], state, atol=1e-6, rtol=0)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case: dict[str, Any]) -> None:
    model, tokens = case["model"], case["tokens"][:1, :12]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    packed = model(tokens, position_ids=positions).logits
    apart = torch.cat([model(part).logits for part in (tokens[:, :4], tokens[:, 4:])], 1)
    assert_close(packed, apart, atol=1e-5, rtol=0)
    assert not torch.allclose(packed, model(tokens).logits, atol=1e-3)


@torch.no_grad()
def test_longer_than_it_was_trained(case: dict[str, Any]) -> None:
    """A recurrence has no last position: past ``max_position_embeddings`` the whole still equals its parts."""
    short: Any = FAMILY.model(MatMulFreeConfig(**{**TINY, "max_position_embeddings": 16})).eval()
    short.load_state_dict(case["model"].state_dict())
    cache = short.make_cache()
    parts = [short(part, past_key_values=cache).logits for part in case["tokens"].split(10, dim=1)]
    assert_close(torch.cat(parts, 1), case["outputs"]["logits"], atol=1e-4, rtol=0)


def packed_model(**sizes: int) -> Any:
    """Three packed blocks of random weights."""
    if not cpu.EXTENSION.ready:
        choose(torch.device("cpu"))  # builds it
    if not cpu.EXTENSION.ready:
        pytest.skip("no C++ kernel here")
    torch.manual_seed(0)
    model: Any = zoo.create_model("matmulfree_2m", num_hidden_layers=3, **sizes).eval()
    with torch.no_grad():
        model.model.lower_bounds.normal_()
        for norm in (module for module in model.modules() if isinstance(module, nn.RMSNorm)):
            norm.weight.uniform_(0.5, 1.5)
    return pack_bit_linears(model)


def spied_steps(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Gets the arguments of each call of C++ that runs a token from now on."""
    called: list[Any] = []
    one_call = cpu.matmulfree_step

    def spy(*args: Any) -> Any:
        done = one_call(*args, **options)
        if done is not None:
            called.append(args)
        return done

    monkeypatch.setattr(cpu, "matmulfree_step", spy)
    return called


def last_logits(model: Any, tokens: torch.Tensor, *, step: int = 1) -> torch.Tensor:
    """Of the last token, after all before it, so many at a time."""
    cache = model.make_cache()
    return [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(step, 1)][-1][:, -1]


@torch.no_grad()
@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize(
    ("width", "mlp", "rows", "threads"), [(200, 250, 3, 1), (6, 5, 2, 1), (512, 1536, 1, 3), (512, 1501, 24, 3)]
)
def test_packed_steps_are_those_of_the_operators(
    width: int, mlp: int, rows: int, threads: int, operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of C++ for all blocks and a token, and the same token through each operator, bit by bit."""
    model = packed_model(hidden_size=width, intermediate_size=mlp)
    called = spied_steps(monkeypatch, operators=operators)
    tokens = torch.randint(256, (rows, 30))

    def steps() -> tuple[torch.Tensor, Any]:
        cache, logits = model.make_cache(), []
        with torch_threads(threads):
            for t in range(tokens.shape[1]):
                logits.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, 1), cache.state.tensors

    fast, states = steps()
    assert len(called) == 29, "all but the first, before which there is no state"
    seen: list[Any] = []
    hook = model.model.layers[1].attn.o_proj.register_forward_hook(lambda *args: seen.append(args))
    called.clear()
    watched, watched_states = steps()
    hook.remove()
    assert len(seen) == 30
    assert not called, "blocks that somebody looks into run their operators"
    assert torch.equal(watched, fast)
    assert all(torch.equal(states[key], watched_states[key]) for key in states)
    monkeypatch.setenv("ZOO_BIT_LINEAR", "cpu")
    called.clear()
    assert torch.equal(steps()[0], fast)
    assert not called, "what the environment forces is what runs"


class OwnBlock(MatMulFreeBlock):
    def forward(self, *args: Any) -> Any:
        x, state = super().forward(*args)
        return 2 * x, state


def wrap(model: Any) -> None:
    model.model.layers[1] = Wrapper(model.model.layers[1])


def subclass(model: Any) -> None:
    model.model.layers[1].__class__ = OwnBlock


def replace_forward(model: Any) -> None:
    layer = model.model.layers[2].mlp.down_proj
    layer.forward = partial(type(layer).forward, layer)


def replace_norm(model: Any) -> None:
    model.model.layers[0].mlp_norm = nn.LayerNorm(model.config.hidden_size)


def change_eps(model: Any) -> None:
    model.model.layers[0].attn.g_norm.eps = 1e-3


def no_eps(model: Any) -> None:
    for norm in (each for each in model.model.layers.modules() if type(each) is nn.RMSNorm):
        norm.eps = None


def weight_as_attribute(model: Any) -> None:
    for norm in (model.model.layers[0].attn_norm, model.model.layers[1].mlp.down_proj.norm):
        weight = norm.weight.detach()
        del norm.weight
        norm.weight = weight


def no_weight(model: Any) -> None:
    model.model.layers[1].attn_norm = nn.RMSNorm(model.config.hidden_size, elementwise_affine=False, eps=1e-6)


def hook_everything(model: Any) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model.remove_hooks = handle.remove


def new_hooks(model: Any) -> None:
    norm = model.model.layers[1].mlp_norm
    norm._forward_hooks = OrderedDict()  # as some take off all hooks
    norm.register_forward_hook(lambda *_: None)


def half_a_norm(model: Any) -> None:
    model.model.layers[1].mlp_norm.bfloat16()


def columns_first(model: Any) -> None:
    layer = model.model.layers[1].attn.o_proj
    layer.packed.data = layer.packed.t().contiguous().t()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        wrap,
        subclass,
        replace_forward,
        replace_norm,
        change_eps,
        no_eps,
        weight_as_attribute,
        no_weight,
        hook_everything,
        new_hooks,
        half_a_norm,
        columns_first,
    ],
)
def test_what_takes_the_place_of_a_part_runs(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(hidden_size=64)
    called = spied_steps(monkeypatch)
    tokens = torch.randint(256, (1, 3))

    before = last_logits(model, tokens)
    assert len(called) == 2
    change(model)
    try:
        changed, whole = last_logits(model, tokens), last_logits(model, tokens, step=3)
    finally:
        getattr(model, "remove_hooks", lambda: None)()
    assert len(called) == 2
    assert_close(changed, whole, atol=1e-4, rtol=0)
    assert torch.equal(changed, before) == (
        change in (wrap, replace_forward, hook_everything, new_hooks, weight_as_attribute, columns_first)
    )


def new_floors(model: Any) -> None:
    model.model.lower_bounds.normal_()


def new_floors_unseen(model: Any) -> None:
    model.model.lower_bounds.data.normal_()  # raises no version


def other_floors(model: Any) -> None:
    model.model.lower_bounds = nn.Parameter(torch.randn_like(model.model.lower_bounds))


def other_data(model: Any) -> None:
    model.model.lower_bounds.data = torch.randn_like(model.model.lower_bounds)


def new_layer(model: Any) -> None:
    layer = model.model.layers[1].attn.g_proj
    model.model.layers[1].attn.g_proj = PackedBitLinear.of(BitLinear(layer.in_features, layer.out_features))


def new_weights(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.packed.fill_(0b10_00_01_10)


def other_weights(model: Any) -> None:
    layer = model.model.layers[2].mlp.gate_proj
    layer.packed = torch.full_like(layer.packed, 0b10_00_01_10)


def one_block_less(model: Any) -> None:
    model.model.layers = model.model.layers[:2]
    model.model.lower_bounds = nn.Parameter(model.model.lower_bounds[:2].clone())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        new_floors,
        new_floors_unseen,
        other_floors,
        other_data,
        new_layer,
        new_weights,
        other_weights,
        one_block_less,
    ],
)
def test_steps_follow_what_changes(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors are kept from token to token, but not past a change, nor by a copy."""
    model = packed_model(hidden_size=64)
    called = spied_steps(monkeypatch)
    floors, made = type(model.model).floors, []
    monkeypatch.setattr(type(model.model), "floors", lambda trunk: made.append(trunk) or floors(trunk))
    tokens = torch.randint(256, (1, 3))

    before = last_logits(model, tokens)
    assert len(made) == 2, "for the first token, which has no state to go on from, and for the steps"
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    change(twin)
    after = last_logits(twin, tokens)
    assert len(called) == 4
    assert not torch.equal(after, before)
    assert_close(after, last_logits(twin, tokens, step=3), atol=1e-4, rtol=0)
    assert torch.equal(last_logits(model, tokens), before)
    torch.manual_seed(1)
    change(model)
    assert torch.equal(last_logits(model, tokens), after)


@torch.no_grad()
@pytest.mark.parametrize("change", ["dtype", "width", "rows", "floors", "mlp", "inner norm"])
def test_a_step_refuses_what_does_not_fit(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(hidden_size=64)
    called = spied_steps(monkeypatch)
    cache = model.make_cache()
    for token in ([[1]], [[2]]):
        model(torch.tensor(token), past_key_values=cache, use_cache=True)
    x, states, floors, layers, norms, *epsilons = called[0]
    assert cpu.matmulfree_step(x, states, floors, layers, norms, *epsilons) is not None
    out, after = cpu.matmulfree_step(x[:0], [state[:0] for state in states], floors, layers, norms, *epsilons)
    assert out.shape == (0, 64)
    assert len(after) == 3
    states, layers = list(states), list(layers)
    if change == "dtype":
        states[1] = states[1].double()
    elif change == "width":
        states[1] = states[1][:, :32]
    elif change == "rows":
        states[1] = states[1].expand(2, -1)
    elif change == "floors":
        floors = floors[:2]
    elif change == "mlp":  # another width than the first block's
        layers[18 + 15] = layers[18 + 15][:, :32].contiguous()
    else:
        layers[2] = layers[2].bfloat16()
    assert cpu.matmulfree_step(x, states, floors, layers, norms, *epsilons) is None


@torch.no_grad()
def test_padding_in_the_cache_does_not_slow_the_next_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(hidden_size=64)
    called = spied_steps(monkeypatch)

    def last_two(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of the last two tokens, one at a time after all others."""
        cache, start, answers = model.make_cache(), 0, []
        for end in range(tokens.shape[1] - 2, tokens.shape[1] + 1):
            out = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            answers.append(out.logits[:, -1])
            start = end
        return torch.stack(answers[1:], 1)

    tokens, mask = torch.randint(256, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    together = last_two(tokens, mask)
    assert len(called) == 2
    assert_close(together[1:], last_two(tokens[1:, 3:], mask[1:, 3:]), atol=1e-4, rtol=0)
    called.clear()
    mask[1, 6] = 0
    last_two(tokens, mask)
    assert len(called) == 1, "a token that is padding goes through the operators, which keep the state"


@torch.no_grad()
def test_a_cache_that_lacks_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interrupt leaves it: that block begins anew."""
    model = packed_model(hidden_size=64)
    called = spied_steps(monkeypatch)
    cache = model.make_cache()
    model(torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True)
    del cache.state.tensors[1]
    assert model(torch.tensor([[3]]), past_key_values=cache, use_cache=True).logits.isfinite().all()
    assert not called
