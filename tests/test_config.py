"""Configs: checked, frozen, hashable, and the same after a trip through JSON."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

import zoo
from zoo.config import Axis, ImageConfig, ModelConfig, axis


@dataclass(frozen=True, kw_only=True)
class Example(ImageConfig):
    depths: tuple[int, ...] = axis("depth", (2, 2))
    widths: tuple[int, ...] = axis("width", (16, 32), multiple_of=8)
    ratio: float = 4.0
    name: str | None = None
    pairs: tuple[tuple[int, int], ...] = ()

    def validate(self) -> None:
        super().validate()
        self.check_same_length("depths", "widths")
        self.check_positive("depths", "widths", "ratio")


def test_lists_become_tuples_and_ints_become_floats() -> None:
    config = Example(depths=[1, 2], widths=[8, 16], ratio=3, pairs=[[1, 2], [3, 4]])
    assert config.depths == (1, 2)
    assert config.pairs == ((1, 2), (3, 4))
    assert repr(config.ratio) == "3.0"
    assert {config: 1}[Example(depths=(1, 2), widths=(8, 16), ratio=3.0, pairs=((1, 2), (3, 4)))] == 1


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().depths = (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": 2}, r"Example.depths is 2; expected tuple\[int, ...\]"),
        ({"depths": (2, "2")}, "Example.depths"),
        ({"depths": (2, True)}, "Example.depths"),
        ({"pairs": ((1, 2, 3),)}, "Example.pairs"),
        ({"ratio": "4"}, "Example.ratio is '4'; expected float"),
        ({"ratio": True}, "Example.ratio"),
        ({"num_classes": 10.0}, "Example.num_classes is 10.0; expected int"),
        ({"name": 3}, "Example.name"),
        ({"img_size": (224, 224, 3)}, "Example.img_size"),
        ({"depths": (1, 2, 3)}, "depths has 3, widths has 2; expected one entry per stage"),
        ({"widths": (16, 0)}, "positive"),
        ({"num_classes": -1}, r"expected 0 \(no classifier\) or more"),
        ({"in_chans": 0}, "at least 1"),
        ({"img_size": (31, 224)}, "at least 32 pixels on each side"),
        ({"global_pool": "mean"}, "expected 'avg', 'max' or ''"),
        ({"global_pool": ""}, "needs pooled features"),
        ({"drop_rate": 1.0}, "Example.drop_rate is 1.0; expected 0 <= rate < 1"),
        ({"drop_path_rate": -0.1}, "Example.drop_path_rate"),
    ],
)
def test_bad_values(changes: dict, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        Example(**changes)
    with pytest.raises(zoo.ConfigError, match=message):
        Example().override(**changes)


def test_override() -> None:
    config = Example()
    changed = config.override(num_classes=10, img_size=(64, 96))
    assert (changed.num_classes, changed.input_hw) == (10, (64, 96))
    assert (config.num_classes, config.input_hw) == (1000, (224, 224))
    assert config.override() == config
    with pytest.raises(zoo.ConfigError, match=r"Example has no field 'num_clases'\. Did you mean: num_classes"):
        config.override(num_clases=10)


def test_axes_are_described() -> None:
    described = {spec.name: spec.metadata["axis"] for spec in dataclasses.fields(Example) if "axis" in spec.metadata}
    assert described == {
        "depths": Axis("depth"),
        "widths": Axis("width", multiple_of=8),
        "img_size": Axis("resolution"),
    }


def test_dict_round_trip() -> None:
    config = Example(pairs=((1, 2),), name="a", img_size=(64, 96))
    assert Example.from_dict(config.to_dict()) == config
    assert Example.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(zoo.ConfigError, match="Did you mean: depths"):
        Example.from_dict({"depth": (1, 2)})


def test_json_needs_a_registered_family() -> None:
    with pytest.raises(zoo.ConfigError, match="belongs to no registered family"):
        Example().to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON at line 1"),
        ("[1]", "expected a JSON object, got list"),
        ('{"depths": [1, 2, 3]}', 'needs its "family"'),
        ('{"family": "efficientvit", "dephts": [1, 2, 3]}', "Did you mean: depths"),
        ('{"family": "efficientvit", "depths": "123"}', "EfficientViTConfig.depths"),
    ],
)
def test_json_that_is_no_config(text: str, message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.config_from_json(text)


def test_json_of_an_unknown_family() -> None:
    with pytest.raises(zoo.UnknownModelError, match=r"Unknown family 'eficientvit'\. Did you mean: efficientvit"):
        zoo.config_from_json('{"family": "eficientvit"}')


def test_json_is_the_same_in_another_process() -> None:
    text = zoo.get_config("efficientvit_m5").override(img_size=(224, 320), drop_path_rate=0.1).to_json()
    code = "import sys, zoo; print(zoo.config_from_json(sys.stdin.read()).to_json(), end='')"
    run = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True)
    assert run.stdout == text


def test_errors_are_value_errors() -> None:
    assert issubclass(zoo.ConfigError, zoo.ZooError)
    assert issubclass(zoo.ZooError, ValueError)
    assert ModelConfig() == ModelConfig()
