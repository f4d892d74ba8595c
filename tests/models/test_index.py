"""The generated files that describe every built-in variant are true; ``--update-golden`` rewrites them."""

import hashlib
import json
from pathlib import Path

import zoo
from zoo.analysis.counts import INDEX, index_text
from zoo.registry import index

GOLDEN = Path(__file__).parents[1] / "golden" / "models.json"


def test_index(update_golden: bool) -> None:
    text = index_text()
    if update_golden:
        INDEX.write_text(text)
        index.cache_clear()
    assert text == INDEX.read_text(), "models/index.json is out of date: run with --update-golden"
    assert list(index()) == zoo.list_models(list(index()))


def test_state_dicts(update_golden: bool) -> None:
    """Parameter names and shapes are a promise to every saved checkpoint: a new hash here breaks them."""
    hashes = {name: _layout_hash(name) for name in index()}
    if update_golden:
        GOLDEN.write_text(json.dumps(hashes, indent=2) + "\n")
    assert hashes == json.loads(GOLDEN.read_text())


def _layout_hash(name: str) -> str:
    state = zoo.build(zoo.get_config(name), device="meta").state_dict()
    layout = sorted((key, list(tensor.shape), str(tensor.dtype)) for key, tensor in state.items())
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()
