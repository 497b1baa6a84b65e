"""The config: the presets, the file it is written to, and one clear message for every value that cannot be."""

import argparse
import json
import re
from dataclasses import asdict, fields, replace

import pytest

from retina_seg import cli
from retina_seg.config import PRESETS, TrainConfig
from retina_seg.utils import UserError


def train_parser() -> argparse.ArgumentParser:
    """The parser of `retina-seg train`."""
    return next(iter(cli.build_parser()._subparsers._group_actions)).choices["train"]


def check_options_exist(message: str) -> None:
    """Whoever follows `message` types options that the command has."""
    known = {option for action in train_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]*", message)) <= known, message


def test_the_notebook_preset_is_the_originals_training():
    config = TrainConfig.notebook()
    assert (config.seed, config.batch_size, config.learning_rate, config.epochs) == (42, 2, 1e-4, 10)
    assert (config.model, config.frame, config.size, config.loss) == ("attention_unet", "resize", 512, "dice_bce")
    assert (config.validation, config.keep, config.optimizer) == ("test", "best", "adam")
    assert config.warmup is None and config.weight_decay == config.ema == config.clip == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_that_survives_its_file(name, tmp_path):
    config = TrainConfig.from_preset(name, data=["a", {"images": "b/*.png", "masks": "c/*.png"}], output="out", seed=5)
    config.check()
    assert (config.preset, config.seed) == (name, 5)
    assert PRESETS[name].values.keys() <= {item.name for item in fields(TrainConfig)}
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(config)}))
    assert TrainConfig.from_json(tmp_path / "config.json") == config


def test_configs_share_no_mutable_value():
    for name in ("augmentation", "model_arguments"):
        getattr(TrainConfig.fast(), name)["scale"] = getattr(TrainConfig(), name)["scale"] = 9.0
        assert getattr(TrainConfig(), name) == {} and getattr(TrainConfig.fast(), name).get("scale") != 9


REFUSED = [
    ({"epochs": 0}, "--epochs 0: must be a number from 1 on"),
    ({"epochs": 2.5}, "--epochs '2.5': must be of the type int"),
    ({"epochs": True}, "--epochs 'True'"),
    ({"seed": 2**63}, "--seed 9223372036854775808"),
    ({"learning_rate": float("nan")}, "--learning-rate nan"),
    ({"fov_diameter": 31.0}, "--fov-diameter 31"),
    ({"model_arguments": [1]}, "--model-arguments '\\[1\\]': must be of the type dict"),
    ({"warmup": 1.0}, "--warmup 1.0: must be below 1"),
    ({"frame": "oval"}, "--frame oval: choose one of resize, fov"),
    ({"keep": "best", "validation": "none"}, "--keep best needs .*; add --validation photos"),
    ({"threshold": "validation", "validation": "test"}, "--threshold validation needs .*; add --validation photos"),
    ({"threshold": "1.5"}, "--threshold 1.5: must lie between 0 and 1"),
    ({"model_arguments": {"styles": 2}}, "--model-arguments styles: is set by --styles datasets"),
    ({"styles": "datasets"}, "--styles datasets: needs --frame fov"),
    ({"data": []}, "data \\[\\]"),
    ({"data": {"images": "a", "masks": None}}, "must be paths"),
    ({"output": None}, "output None"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_a_value_that_cannot_be_is_refused_by_its_option(changes, said, tmp_path):
    config = replace(TrainConfig(), **changes)
    with pytest.raises(UserError, match=said) as error:
        config.check()
    check_options_exist(str(error.value))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": asdict(config)}))
    with pytest.raises(UserError, match=f"config.json: .*{said}"):  # and named with its file
        TrainConfig.from_json(path)


def test_a_name_or_a_file_that_is_no_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="--preset slow: choose one of notebook, fast"):
        TrainConfig.from_preset("slow")
    unknown = {"config": {"save_every": 2, "x": 1}}
    for value, said in (({}, "holds no config"), (unknown, "unknown entries: save_every, x")):
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=f"config.json: .*{said}"):
            TrainConfig.from_json(tmp_path / "config.json")
