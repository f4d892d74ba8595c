"""Dense models made recursive: what is kept, exactly."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import zoo

transformers = pytest.importorskip("transformers")


def llama(layers: int = 8, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ROUNDING = 1e-5  # transformers' norms and rotations compute in float32 in every dtype; logits are of the order of 1
IDS = torch.arange(20).view(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("init", ["average", "lower", "upper"])
@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_a_dense_model_that_repeats_itself_stays_the_same(init: str, sharing: str) -> None:
    layers = 8 if sharing.startswith("middle") else 6
    model = llama(layers, tie_word_embeddings=init == "lower")
    twin: Any = zoo.convert_to_recursive(model, 3, sharing, init)
    first = {}
    for layer, block in enumerate(twin.model.config.block_of):
        model.model.layers[layer].load_state_dict(model.model.layers[first.setdefault(block, layer)].state_dict())
    twin = zoo.convert_to_recursive(model, 3, sharing, init)
    assert_close(logits(twin), logits(model), atol=ROUNDING, rtol=0)
    assert len(twin.model.layers) == 2 + 2 * sharing.startswith("middle")


def test_full_rank_relaxation_is_the_dense_model() -> None:
    model = llama()
    twin = zoo.convert_to_recursive(model, 3, lora_rank=32, share_norms=False)
    assert_close(logits(twin), logits(model), atol=ROUNDING, rtol=0)
    errors = [
        float((logits(zoo.convert_to_recursive(model, 3, lora_rank=rank, share_norms=False)) - logits(model)).norm())
        for rank in (4, 24)
    ]
    assert errors[1] < errors[0]


def test_stepwise_takes_layers_through_the_whole_depth() -> None:
    model = llama()
    twin: Any = zoo.convert_to_recursive(model, 3, init="stepwise")
    for block, layer in ((0, 0), (1, 1), (2, 6), (3, 7)):
        ours, theirs = twin.model.layers[block].mlp["up_proj"].weight, model.model.layers[layer].mlp.up_proj.weight
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("router", ["expert", "token"])
def test_routers_are_put_between(router: str) -> None:
    twin: Any = zoo.convert_to_recursive(llama(), 3, router=router, init="random")
    assert twin.training
    twin(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_models_that_cannot_be_converted() -> None:
    with pytest.raises(zoo.ConfigError, match="the nearest are 6 and 10"):
        zoo.convert_to_recursive(llama(), 4)
    with pytest.raises(zoo.ConfigError, match="Did you mean: average"):
        zoo.convert_to_recursive(llama(), init="averge")
    with pytest.raises(zoo.ConfigError, match=r"self_attn.q_proj.bias.*expected Llama's blocks"):
        zoo.convert_to_recursive(llama(attention_bias=True))
    with pytest.raises(zoo.ConfigError, match="no Llama-like layers"):
        zoo.convert_to_recursive(torch.nn.Linear(2, 2))
    with pytest.raises(zoo.ConfigError, match="is recursive already"):
        zoo.convert_to_recursive(zoo.create_model("mor_2m_r3"))


def test_how_the_dense_model_writes_is_kept() -> None:
    model = llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = [1, 2]
    model.generation_config.temperature = 0.5
    twin: Any = zoo.convert_to_recursive(model, 3)
    assert twin.config.eos_token_id == 1
    assert twin.generation_config.eos_token_id == [1, 2]
    assert twin.generation_config.temperature == 0.5
