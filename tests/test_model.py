"""The original network against a plain re-implementation, the fast one by its invariants, checkpoints in and out."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retina_seg import model as rooms
from retina_seg.model import (
    ARCHITECTURES,
    AttentionGate,
    AttentionUNet,
    FastAttentionUNet,
    attention_unet,
    build_model,
    count_arithmetic,
    count_parameters,
    load_checkpoint,
    load_model,
    save_model,
)
from retina_seg.utils import UserError

PARAMETERS, NUMBERS = 664_071, 665_943


def shaken(model, seed=0):
    """The model in evaluation mode, its batch normalisation far from the identity, so that no term can be left out."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def photo(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return shaken(AttentionUNet())


@pytest.fixture(scope="module")
def fast():
    torch.manual_seed(0)
    return shaken(FastAttentionUNet())


# --------------------------------------------------------------------------------- the oracle: the same from the weights


class Plain:
    """The original's forward pass in functional operations on a state dict's tensors, written from its description."""

    def __init__(self, weights):
        self.w = weights

    def convolve(self, x, key, padding):
        return F.conv2d(x, self.w[f"{key}.weight"], self.w[f"{key}.bias"], padding=padding)

    def normalise(self, x, key):
        mean, var, weight, bias = (
            self.w[f"{key}.{name}"].reshape(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def block(self, x, key):
        for first in (0, 3):
            x = self.convolve(x, f"{key}.conv.{first}", 1)
            x = self.normalise(x, f"{key}.conv.{first + 1}").clamp(min=0)
        return x

    def gate(self, gate, skip, key):
        q, k, v = (
            self.normalise(self.convolve(x, f"{key}.{name}.0", 1), f"{key}.{name}.1")
            for name, x in (("Wg", gate), ("Ws", skip), ("Wv", torch.cat([gate, skip], 1)))
        )
        a = 1 / (1 + torch.exp(-self.convolve((k * q).clamp(min=0), f"{key}.output.0", 0)))
        return v * a + v

    def decode(self, x, skip, key):
        return self.block(self.gate(twice_as_large(x), skip, f"{key}.ag"), f"{key}.c1")

    def __call__(self, x):
        s1 = self.block(x, "e1.conv")
        s2 = self.block(halved(s1), "e2.conv")
        d1 = self.decode(self.block(halved(s2), "b1"), s2, "d1")
        d2 = self.decode(d1, s1, "d2")
        return self.convolve(self.convolve(d2, "output1", 1), "finaloutput", 0)


def halved(x):
    """Max-pooling by 2, as a maximum of the four corners."""
    corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(corners).amax(0)


def twice_as_large(x):
    """Bilinear up-sampling with aligned corners, as two products with a matrix of weights."""

    def weights(n):
        at = np.linspace(0, n - 1, 2 * n)
        return torch.tensor(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))), dtype=x.dtype)

    return torch.einsum("ab,ncbd,ed->ncae", weights(x.shape[2]), x, weights(x.shape[3]))


@pytest.mark.parametrize(("height", "width", "batch"), [(20, 28, 1), (4, 12, 2), (36, 8, 1)])
def test_the_original_computes_what_its_description_says(original, height, width, batch):
    x = photo(batch, 3, height, width)
    with torch.no_grad():
        expected, found = Plain(original.state_dict())(x), original(x)
    assert found.shape == (batch, 1, height, width)
    assert found.std() > 1e-3  # not two constants
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_original_has_the_published_parameters_and_keys():
    model = AttentionUNet()
    state = model.state_dict()
    assert count_parameters(model) == PARAMETERS
    assert len(state) == 120
    assert sum(value.numel() for value in state.values()) == NUMBERS


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("e1.conv.conv.0.weight", (32, 3, 3, 3)),
        ("e1.conv.conv.0.bias", (32,)),
        ("e1.conv.conv.4.num_batches_tracked", ()),
        ("e2.conv.conv.3.weight", (64, 64, 3, 3)),
        ("b1.conv.0.weight", (128, 64, 3, 3)),
        ("b1.conv.3.weight", (128, 128, 3, 3)),
        ("d1.ag.Wg.0.weight", (64, 128, 3, 3)),
        ("d1.ag.Wg.1.running_mean", (64,)),
        ("d1.ag.Ws.0.weight", (64, 64, 3, 3)),
        ("d1.ag.Wv.0.weight", (64, 192, 3, 3)),
        ("d1.c1.conv.0.weight", (64, 64, 3, 3)),
        ("d2.ag.Wg.0.weight", (32, 64, 3, 3)),
        ("d2.ag.Wv.0.weight", (32, 96, 3, 3)),
        ("d2.ag.output.0.weight", (32, 32, 1, 1)),
        ("d2.c1.conv.4.running_var", (32,)),
        ("output1.weight", (3, 32, 3, 3)),
        ("output1.bias", (3,)),
        ("finaloutput.weight", (1, 3, 1, 1)),
        ("finaloutput.bias", (1,)),
    ],
)
def test_the_original_keeps_its_checkpoint_keys(original, key, shape):
    assert tuple(original.state_dict()[key].shape) == shape


def test_the_lower_case_names_are_the_same_objects():
    for lower, upper in (
        ("conv_block", "ConvBlock"),
        ("encoder_block", "EncoderBlock"),
        ("attention_gate", "AttentionGate"),
        ("decoder_block", "DecoderBlock"),
        ("attention_unet", "AttentionUNet"),
    ):
        assert getattr(rooms, lower) is getattr(rooms, upper)


def test_the_encoder_gives_the_skip_and_its_halved_copy():
    block = shaken(rooms.EncoderBlock(2, 5))
    with torch.no_grad():
        skip, pooled = block(photo(1, 2, 6, 10))
    assert skip.shape == (1, 5, 6, 10)
    torch.testing.assert_close(pooled, halved(skip), atol=0, rtol=0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gate_adds_the_weighted_values_to_themselves(kernel):
    gate = shaken(AttentionGate([3, 2], 4, query_kernel=kernel))
    g, s = photo(2, 3, 5, 7), photo(2, 2, 5, 7, seed=1)
    with torch.no_grad():
        a, v = gate.attention(g, s), gate.Wv(torch.cat([g, s], 1))
        torch.testing.assert_close(gate(g, s), v * a + v)
        torch.testing.assert_close(a, torch.sigmoid(gate.output[0](torch.relu(gate.Ws(s) * gate.Wg(g)))))
    assert ((a > 0) & (a < 1)).all()


# -------------------------------------------------------------------------------------------------------- both networks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_pass_prints_nothing(name, capfd):
    model = build_model(name).eval()
    with torch.no_grad():
        model(photo(1, 3, 16, 16))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("height", "width"), [(33, 32), (32, 33), (34, 30), (1, 8)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_size_off_the_stride_is_refused_by_name(name, height, width):
    model = build_model(name)
    with pytest.raises(ValueError, match=f"multiples of {model.stride}, got {height}x{width}"):
        model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_multiple_of_the_stride_keeps_its_size(name):
    model = build_model(name).eval()
    for rows, columns, batch in ((1, 1, 1), (1, 3, 2), (5, 2, 1), (3, 7, 2)):
        x = photo(batch, 3, rows * model.stride, columns * model.stride)
        with torch.no_grad():
            assert model(x).shape == (batch, 1, *x.shape[2:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_reaches_every_parameter_and_the_photo(name):
    model = shaken(build_model(name))  # in training, normalisation takes back what a bias adds: no gradient to see
    x = photo(2, 3, 32, 48).requires_grad_()
    model(x).square().mean().backward()
    starved = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert starved == []
    assert (x.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_normalises_by_the_batch_and_evaluation_by_what_was_learnt(name):
    torch.manual_seed(1)
    model = build_model(name)
    x = photo(2, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_mean" in key}
    with torch.no_grad():
        trained = model.train()(x)
        evaluated = model.eval()(x)
        assert torch.equal(evaluated, model(x))  # neither dropout nor updates any more
        alone = torch.cat([model(one[None]) for one in x])
    assert not torch.allclose(trained, evaluated, atol=1e-4)
    torch.testing.assert_close(alone, evaluated, atol=1e-5, rtol=1e-4)
    assert all((model.state_dict()[key] != value).any() for key, value in before.items())


def test_the_fast_network_is_no_larger_than_the_original():
    assert count_parameters(FastAttentionUNet()) <= PARAMETERS


def test_the_fast_network_goes_without_its_fine_path_and_at_other_widths():
    for arguments in ({"fine": 0}, {"width": 8, "deepest": 24, "fine": 4}, {"dropout": 0.0}):
        model = build_model("fast_attention_unet", **arguments).eval()
        with torch.no_grad():
            assert model(photo(1, 3, 24, 40)).shape == (1, 1, 24, 40)


def test_the_fast_network_sees_single_pixels(fast):
    # half the resolution inside, but no pixel is thrown away: each of four neighbours moves the answer in its own way
    x = torch.full((1, 3, 16, 16), 0.5)
    moved = []
    with torch.no_grad():
        for row, column in ((8, 8), (8, 9), (9, 8), (9, 9)):
            spot = x.clone()
            spot[..., row, column] = 1
            moved.append(fast(spot) - fast(x))
    for i, one in enumerate(moved):
        assert one.abs().max() > 1e-5
        assert all(not torch.allclose(one, other, atol=1e-6) for other in moved[:i])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_under_bfloat16_autocast(name):
    torch.manual_seed(0)
    model = shaken(build_model(name))
    x = photo(1, 3, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x).float()
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_build_model_names_what_it_does_not_know():
    with pytest.raises(UserError, match="'unet' is unknown.*attention_unet, fast_attention_unet"):
        build_model("unet")
    with pytest.raises(UserError, match="attention_unet.*depth"):
        build_model("attention_unet", depth=5)
    with pytest.raises(UserError, match="fast_attention_unet.*cannot be built"):
        build_model("fast_attention_unet", width=-1)


# ---------------------------------------------------------------------------------------------------------- checkpoints

SMALL = {"width": 8, "deepest": 8, "fine": 2}


def tiny(seed=0):
    torch.manual_seed(seed)
    return shaken(build_model("fast_attention_unet", **SMALL), seed)


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint's path, and what is in it to be spoilt."""
    path = tmp_path / "checkpoint.pth"
    save_model(path, tiny(), "fast_attention_unet", SMALL, threshold=0.5)
    return path


def respoilt(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_save_and_load_is_bit_equal_and_the_notes_travel(tmp_path):
    path, model = tmp_path / "a b.pth", tiny()
    notes = {"threshold": 0.42, "frame": {"kind": "squeeze", "size": [512, 512]}, "note": None}
    save_model(path, model, "fast_attention_unet", SMALL, **notes)
    loaded, told = load_model(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert told["model"] == "fast_attention_unet"
    assert told["arguments"] == SMALL
    assert {key: told[key] for key in notes} == notes
    assert "state_dict" not in told
    x = photo(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_plain_state_dict_of_the_original_loads(tmp_path, original):
    path = tmp_path / "checkpoint.pth"
    torch.save(original.state_dict(), path)  # as the original's notebook does
    loaded, told = load_model(path)
    assert isinstance(loaded, AttentionUNet)
    assert told["model"] == "attention_unet"
    x = photo(1, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x), original(x))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(UserError, match=f"{path.name}.*no such checkpoint"):
            load_model(path)


def test_what_is_no_checkpoint_is_refused(tmp_path, saved):
    path = tmp_path / "spoilt.pth"
    whole = saved.read_bytes()
    for content in (
        b"",
        b"garbage",
        os.urandom(5000),
        whole[: len(whole) // 2],
        pickle.dumps([1, 2]),
        b"PK\x03\x04" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="spoilt.pth"):
            load_checkpoint(path)


class Bomb:
    """Unpickled, it makes a folder: the harmless stand-in for any code."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"format": rooms.CHECKPOINT_FORMAT, "model": bomb}])
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path, wrap, writer):
    target = tmp_path / "went off"
    assert pickle.loads(pickle.dumps(Bomb(str(target)))) is None  # the bomb is live: plain unpickling sets it off
    target.rmdir()
    path = tmp_path / "bomb.pth"
    writer(wrap(Bomb(str(target))), path)
    with pytest.raises(UserError, match="bomb.pth.*safely"):
        load_model(path)
    assert not target.exists()


def test_weights_of_another_architecture_are_refused(tmp_path):
    other, wider = tmp_path / "other.pth", tmp_path / "wider.pth"
    torch.save(tiny().state_dict(), other)  # plain weights are taken for the original's
    save_model(wider, tiny(), "fast_attention_unet", {**SMALL, "deepest": 16})
    for path, name in ((other, "attention_unet"), (wider, "fast_attention_unet")):
        with pytest.raises(UserError, match=f"{path.name}.*another architecture than {name}"):
            load_model(path)


@pytest.mark.parametrize("key", ["e1.conv1.weight", "fine.0.1.running_var"])
def test_a_missing_or_an_unknown_weight_is_refused(saved, key):
    respoilt(saved, lambda checkpoint: checkpoint["state_dict"].update(extra=torch.zeros(1)))
    with pytest.raises(UserError, match="another architecture"):
        load_model(saved)
    respoilt(saved, lambda checkpoint: (checkpoint["state_dict"].pop("extra"), checkpoint["state_dict"].pop(key)))
    with pytest.raises(UserError, match=re.escape(key)):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("state_dict"), "incomplete"),
        (lambda c: c.pop("model"), "incomplete"),
        (lambda c: c.update(arguments=None), "incomplete"),
        (lambda c: c.update(state_dict=[1]), "incomplete"),
        (lambda c: c.update(format="retina_seg checkpoint 99"), "not a checkpoint of this package"),
        (lambda c: c.pop("format"), "not a checkpoint of this package"),
        (lambda c: c.clear(), "not a checkpoint of this package"),
        (lambda c: c.update(model="unet"), "unknown"),
        (lambda c: c.update(arguments={"depth": 3}), "depth"),
    ],
)
def test_an_incomplete_or_unknown_checkpoint_is_refused_by_what_it_lacks(saved, change, message):
    respoilt(saved, change)
    with pytest.raises(UserError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.update({"e1.conv1.weight": [1.0]}),
        lambda weights: weights.update({"e1.conv1.weight": "x"}),
        lambda weights: weights.update({3: torch.zeros(1)}),
    ],
)
def test_weights_that_are_no_tensors_are_refused(saved, change):
    respoilt(saved, lambda checkpoint: change(checkpoint["state_dict"]))
    with pytest.raises(UserError, match="checkpoint.pth"):
        load_model(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["head.weight", "stem.1.running_var"])
def test_weights_that_are_not_finite_are_refused(saved, key, value):
    respoilt(saved, lambda checkpoint: checkpoint["state_dict"][key].flatten()[:1].fill_(value))
    with pytest.raises(UserError, match="not finite"):
        load_model(saved)


def test_saving_where_no_folder_is_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("missing", "file"):
        with pytest.raises(UserError, match="a.pth"):
            save_model(tmp_path / folder / "a.pth", tiny(), "fast_attention_unet", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_checkpoint(saved, monkeypatch):
    before, real = saved.read_bytes(), Path.write_bytes

    def fail(path, content):
        real(path, bytes(content)[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match="No space left"):
        save_model(saved, tiny(1), "fast_attention_unet", SMALL)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_arithmetic_is_counted_and_grows_with_the_pixels():
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert count_arithmetic(convolution, 10, 12) == 3 * 8 * 9 * 10 * 12
    original = attention_unet()
    assert count_arithmetic(original, 64, 128) == 8 * count_arithmetic(original, 32, 32)
