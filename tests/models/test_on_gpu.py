"""Models on a CUDA GPU: they answer as on the CPU, and train in half precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from variants import lightest_of_each_family

import zoo

IMAGES = zoo.list_models(task="image-classification")
SHIPPED = ["matmulfree_2m", "mor_2m_r3"]
PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def _in_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds to ten bits by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", IMAGES)
def test_answers_as_on_the_cpu(name: str, fuse: bool, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name))
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        found = (model.fuse() if fuse else model).cuda()(x.cuda()).cpu()
    assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, expected.std().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", lightest_of_each_family(IMAGES))
def test_trains_in_half_precision(name: str, dtype: torch.dtype, randomise: Callable) -> None:
    model = randomise(zoo.create_model(name, num_classes=7)).cuda().to(memory_format=torch.channels_last).train()
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=dtype == torch.float16)
    x = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        loss = torch.nn.functional.cross_entropy(model(x), torch.arange(8, device="cuda") % 7)
    scaler.scale(loss).backward()
    assert loss.isfinite()
    spoiled = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not spoiled


@pytest.mark.parametrize("name", SHIPPED)
def test_language_models_know_as_much(name: str) -> None:
    """The loss on a text; logits differ where an activation lies between two codes of eight bits."""
    pytest.importorskip("transformers")
    model: Any = zoo.create_model(name, pretrained=True).eval()
    tokens = torch.tensor([list(PROMPT.encode())])
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss
        found = model.cuda()(input_ids=tokens.cuda(), labels=tokens.cuda()).loss.cpu()
        assert_close(found, expected, rtol=0, atol=5e-3)
        written = model.generate(tokens.cuda(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert written.shape == (1, tokens.shape[1] + 20)


@pytest.mark.parametrize("name", SHIPPED)
def test_language_models_train_in_half_precision(name: str) -> None:
    pytest.importorskip("transformers")
    model: Any = zoo.create_model(name).cuda().train()
    tokens = torch.randint(256, (2, 64), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
