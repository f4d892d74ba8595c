"""Three real clients of language models, unmodified: peft's LoRA, transformers' Trainer, and lm-eval."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import zoo
from zoo.data.tokens import Bytes

SMALL = {
    "matmulfree_2m": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    "mor_2m_r3": {"hidden_size": 48, "num_hidden_layers": 5, "intermediate_size": 96, "bos_token_id": 256},
}
BLOCKS = {"matmulfree_2m": 2, "mor_2m_r3": 3}  # a shared one is adapted once
PROJECTIONS = {
    "matmulfree_2m": ["i_proj", "f_proj", "g_proj", "o_proj", "gate_proj", "down_proj"],
    "mor_2m_r3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

pytestmark = pytest.mark.parametrize("name", list(SMALL))


def make(name: str) -> Any:
    torch.manual_seed(0)
    return zoo.create_model(name, **SMALL[name])


class Rows(Dataset):
    """Pieces of a rhyme, which a small model learns in a few steps."""

    def __init__(self, length: int = 24) -> None:
        tokens = torch.tensor(Bytes().encode(["tyger tyger burning bright in the forests of the night " * 8])[0])
        self.rows = tokens.unfold(0, length, 5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def test_lora_trains_and_merges(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = make(name)
    tokens = Rows()[0]["input_ids"][None]
    before = model.eval()(tokens).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=PROJECTIONS[name], task_type="CAUSAL_LM", lora_alpha=8)
    )
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * BLOCKS[name] * len(PROJECTIONS[name])
    assert all("lora_" in key for key in trained)
    assert torch.equal(adapted(tokens).logits, before)  # LoRA starts at nothing
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    written = adapted.eval().generate(input_ids=tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape[1] <= tokens.shape[1] + 4


def test_trainer(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=make(name), args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0] < 5.6  # ln 257 is what a model that knows nothing has
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = Rows()[0]["input_ids"][None]
    assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)


def test_lm_eval_on_wikitext(name: str, shared: Path, tmp_path: Path) -> None:
    """Byte perplexity of lm-eval's rolling windows equals what the model's own loss says."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    text = (shared / "data" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")[:600].strip()
    import json

    (tmp_path / "text.jsonl").write_text(json.dumps({"page": text}) + "\n")
    (tmp_path / "local.yaml").write_text(
        f"""task: local_wikitext
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/text.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: byte_perplexity
"""
    )
    model = make(name).eval()
    tokenizer = Bytes().to_transformers()
    answers = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2),
        tasks=["local_wikitext"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    found = answers["results"]["local_wikitext"]["byte_perplexity,none"]
    tokens = Bytes().encode([text])[0]
    length = model.config.max_position_embeddings
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), length):  # as lm-eval cuts it: each token once, with what came before
            stop = min(start + length, len(tokens))
            given = ([model.config.bos_token_id, *tokens])[max(0, stop - length) : stop]
            logits = model(torch.tensor([given])).logits[0, -(stop - start) :]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[start:stop]), reduction="sum").item()
    assert found == pytest.approx(torch.tensor(total / len(text.encode())).exp().item(), rel=1e-4)


def test_tokenizer_for_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "Süße Bytes: \n\t\x00 \U0001f40c end"
    Bytes().to_transformers().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == list(text.encode())
    assert again.decode(list(text.encode())) == text
    assert (again.eos_token_id, again.padding_side, len(again)) == (256, "left", 257)
