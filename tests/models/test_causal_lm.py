"""What every language model must do as a model of transformers. A new family is tested by an entry in ``SMALL``."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import zoo
from zoo.errors import ShapeError
from zoo.models import _causal_lm

# A variant of each family, and what makes it small.
SMALL = {
    "matmulfree_2m": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    "mor_2m_r3": {"hidden_size": 48, "num_hidden_layers": 5, "intermediate_size": 64},
}
NEW = {"max_new_tokens": 8, "pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(name: str, **changes: Any) -> Any:
    """A small model whose layers matter, and in eval mode."""
    torch.manual_seed(0)
    model: Any = zoo.create_model(name, **SMALL[name], **changes)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "bounds" in key else parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None  # texts of the same length
    return model.eval()


def prompts(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 256, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(SMALL))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return make(name)


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 50, "temperature": 0.9},
        {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
        {"do_sample": False, "prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_the_cache_changes_no_text(model: Any, mode: dict[str, Any]) -> None:
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = mode if use_cache else {key: value for key, value in mode.items() if key != "prefill_chunk_size"}
        texts.append(model.generate(prompts(), use_cache=use_cache, **options, **NEW))
    assert torch.equal(*texts)


def test_left_padding_changes_no_text(model: Any) -> None:
    rows = [prompts(1, length) for length in (3, 7, 5)]
    width = max(row.shape[1] for row in rows)
    batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row, 1
    together = model.generate(batch, attention_mask=mask, do_sample=False, **NEW)
    for i, row in enumerate(rows):
        alone = model.generate(row, do_sample=False, **NEW)
        assert torch.equal(together[i, width:], alone[0, row.shape[1] :])


def test_going_on_from_a_cache(model: Any) -> None:
    whole = model.generate(prompts(), do_sample=False, **NEW)
    first = model.generate(prompts(), do_sample=False, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    cache = next(value for key, value in first.items() if key in ("cache", "past_key_values"))
    again = copy.deepcopy(cache)
    for kept in (cache, again):
        rest = model.generate(first.sequences, past_key_values=kept, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert torch.equal(rest, whole)


def test_copies_while_gradients_are_tracked(model: Any) -> None:
    """What was computed under autograd can be copied, cache and model."""
    cache = model.make_cache()
    model(prompts(), past_key_values=cache, use_cache=True)
    again = copy.deepcopy(cache)
    assert again.state is not cache.state
    assert again.get_seq_length() == cache.get_seq_length()
    step = prompts()[:, :1]
    with torch.no_grad():
        expected = model(step, past_key_values=cache, use_cache=True).logits
        assert torch.equal(model(step, past_key_values=again, use_cache=True).logits, expected)
        assert torch.equal(copy.deepcopy(model)(step).logits, model(step).logits)


def test_streaming(model: Any) -> None:
    class Collect:
        tokens: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens.append(value.flatten())

        def end(self) -> None:
            self.tokens.append(torch.tensor([]))

    stream = Collect()
    text = model.generate(prompts(1), do_sample=False, streamer=stream, **NEW)
    assert len(stream.tokens) == 1 + NEW["max_new_tokens"] + 1
    assert torch.equal(torch.cat(stream.tokens).long(), text[0])


def test_save_and_load(model: Any, name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).arch() == model.config.arch()
    ours = zoo.create_model(f"local-dir:{tmp_path}").eval()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(prompts()).logits, model(prompts()).logits)
        assert torch.equal(ours(prompts()).logits, model(prompts()).logits)
        assert half(prompts()).logits.isfinite().all()
    assert getattr(_causal_lm, type(model).__name__) is type(model)  # where a spawned process looks for it


def test_weights_that_are_no_numbers(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).flatten()[0] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(zoo.WeightsError, match="NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(zoo.WeightsError, match="NaN or infinite"):
        zoo.create_model(f"local-dir:{tmp_path}")


def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for enable in (False, True):
        model = make(name).train()
        if enable:
            model.gradient_checkpointing_enable()
        model(prompts(), labels=prompts()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(grad is not None and grad.any() for grad in gradients[-1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


def test_resizing_embeddings(name: str) -> None:
    model = make(name)
    old = model(prompts()).logits
    head = type(model.lm_head)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert type(model.lm_head) is head
    assert model.lm_head.out_features == model.config.vocab_size == 300
    assert model(torch.full((1, 2), 299)).logits.shape == (1, 2, 300)
    assert model(prompts()).logits.shape[-1] == 300
    assert old.shape[-1] == 257
    assert model.generate(prompts(), do_sample=False, **NEW).shape == (2, 15)


def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make(name, tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)
    ours: Any = zoo.create_model(f"local-dir:{tmp_path}")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_hidden_states_tuples_and_kept_logits(model: Any) -> None:
    answer = model(prompts(), output_hidden_states=True, labels=prompts())
    assert len(answer.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model(prompts(), return_dict=False)[0], answer.logits)
    assert torch.equal(model(prompts(), logits_to_keep=2).logits, answer.logits[:, -2:])
    embedded = model(inputs_embeds=model.get_input_embeddings()(prompts()))
    assert torch.equal(embedded.logits, answer.logits)
    logits, targets = answer.logits[:, :-1].flatten(0, 1), prompts()[:, 1:].flatten()
    assert_close(answer.loss, torch.nn.functional.cross_entropy(logits, targets))


def test_what_cannot_be_read(model: Any, name: str) -> None:
    with pytest.raises(ShapeError, match=r"Token 257 is not in the vocabulary; expected 0 to 256"):
        model(torch.tensor([[1, 257]]))
    with pytest.raises(ShapeError, match=r"Token -1 is not in the vocabulary"):
        model(torch.tensor([[-1]]))
    with pytest.raises(ShapeError, match=r"\[1, 0\]; expected \[batch, tokens\] with at least one token"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ShapeError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ShapeError, match=r"The prompt is \[1, 0\]; expected at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), **NEW)
    with pytest.raises(ShapeError, match=r"attention_mask is \[2, 5\]; expected \[2, 7\]"):
        model(prompts(), attention_mask=torch.ones(2, 5))
    with pytest.raises(zoo.ConfigError, match="padding on the left"):
        model.generate(prompts(), attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]), **NEW)
    with pytest.raises(zoo.ConfigError, match="has a cache of its own"):
        model.generate(prompts(), cache_implementation="static", **NEW)


def test_a_cache_of_another_model(model: Any, name: str) -> None:
    from transformers import DynamicCache

    with pytest.raises(zoo.ConfigError, match=r"The cache is of another config \(num_hidden_layers.* differ"):
        model(prompts(), past_key_values=make_deeper(name).make_cache())
    with pytest.raises(zoo.ConfigError, match="The cache is a DynamicCache"):
        model(prompts(), past_key_values=DynamicCache())
    cache = model.make_cache()
    model(prompts(), past_key_values=cache)
    with pytest.raises(ShapeError, match="The cache holds 2 sequences, the input 1"):
        model(prompts(1), past_key_values=cache)


def make_deeper(name: str) -> Any:
    return zoo.create_model(name, **{**SMALL[name], "num_hidden_layers": SMALL[name]["num_hidden_layers"] + 3})


@pytest.mark.parametrize("order", ["zoo, transformers", "transformers, zoo"])
def test_auto_classes_know_zoo_whichever_is_imported_first(model: Any, tmp_path: Path, order: str) -> None:
    model.save_pretrained(tmp_path)
    code = (
        f"import {order}; from transformers import AutoModelForCausalLM as Auto; "
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split()[-1:] == [type(model).__name__], run.stderr
