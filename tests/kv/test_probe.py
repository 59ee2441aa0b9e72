"""Why a model cannot run over pages, found by a look at one call."""

from unittest import mock

import pytest
import torch

from outsize.kv import NotPageableError, probe, switched
from outsize.kv.probe import _Watcher, _window_of
from tests.serve.families import FAMILIES


def look(name, **changes):
    model = FAMILIES[name].build(**changes)
    return probe(model, lambda arguments: model(**arguments))


def test_what_is_learned_of_a_model():
    seen = look("gpt_oss")
    assert [seen.layers[index].window for index in range(3)] == [6, None, 6]
    assert (seen.layers[0].heads, seen.layers[0].kv_heads) == (4, 2)
    assert (seen.most_positions, seen.long_after) == (64, None)
    unlike = look("deepseek_v3").layers[0]
    assert (unlike.key_width, unlike.value_width) == (12, 6)
    assert look("phi3").long_after == 24


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gptj", "does not declare"),
        ("bloom", "does not declare"),
        ("falcon", "does not declare"),
        ("t5", "no decoder"),
        ("llama4", "masks in chunks"),
        ("nemotron", "do not hand the arguments"),
    ],
)
def test_why_a_model_is_refused(name, why):
    with pytest.raises(NotPageableError, match=why):
        look(name)


def looked(model, change):
    """What the probe says of `model`, the keys and values of whose last layer are changed on their way."""
    attend = _Watcher.attend

    def changed(watcher, layer, query, key, value, mask, options):
        if layer == 2:
            query, key, value = change(query, key, value)
        return attend(watcher, layer, query, key, value, mask, options)

    with mock.patch.object(_Watcher, "attend", changed):
        return probe(model, lambda arguments: model(**arguments))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda q, k, v: (q, k.to(torch.float8_e4m3fn), v),
            "layer 2 has keys or values of type torch.float8",
        ),
        (lambda q, k, v: (q, k, v.to(torch.complex64)), "layer 2 has keys or values of type torch.complex64"),
        (lambda q, k, v: (q, k.to("meta"), v.to("meta")), "its layers are on 2 devices"),
        (
            lambda q, k, v: (q, *(x.repeat(1, 2, 1, 1)[:, :3] for x in (k, v))),
            "layer 2 has queries, keys and",
        ),
        (lambda q, k, v: (q, k[..., 1:], v), "layer 2 has queries, keys and values of shapes"),
    ],
)
def test_keys_and_values_that_pages_cannot_hold_refuse(change, why):
    with pytest.raises(NotPageableError, match=why):
        looked(FAMILIES["llama"].build(), change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_pages_have_the_type_of_keys_and_values(dtype):
    model = FAMILIES["llama"].build().to(dtype)
    assert looked(model, lambda *parts: parts).dtype is dtype
    wider = looked(model, lambda query, key, value: (query, key.double(), value))
    assert wider.dtype is torch.float64


def test_an_argument_that_is_not_known_refuses(monkeypatch):
    model = FAMILIES["llama"].build()
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.ones(1))
    with pytest.raises(NotPageableError, match="layer 1 passes position_bias"):
        probe(model, lambda arguments: model(**arguments))


def test_a_layer_that_does_not_come_by_refuses():
    model = FAMILIES["llama"].build()
    attention = model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(NotPageableError, match="2 of 3 layers"):
        probe(model, lambda arguments: model(**arguments))


def test_a_window_that_layers_do_not_tell_of_refuses():
    model = FAMILIES["mistral"].build()
    for layer in model.model.layers:
        layer.self_attn.config = FAMILIES["mistral"].config(sliding_window=None)
        layer.self_attn.config._attn_implementation = "outsize_paged"
    with pytest.raises(NotPageableError, match="a window of 5, and its layers say"):
        probe(model, lambda arguments: model(**arguments))


def test_windows_of_masks():
    assert _window_of(lambda b, h, q, k: k <= q, 100) is None
    assert _window_of(lambda b, h, q, k: (k <= q) & (k > q - 9), 100) == 9
    for odd in (
        lambda b, h, q, k: (k <= q) & (k // 32 == q // 32),
        lambda b, h, q, k: (k <= q) & (k % 2 == q % 2),
        lambda b, h, q, k: (k <= q) & (k != 3),
    ):
        with pytest.raises(NotPageableError):
            _window_of(odd, 100)


def test_switching_is_undone_also_after_an_error():
    model = FAMILIES["gemma2"].build()
    with pytest.raises(ZeroDivisionError), switched(model):
        assert model.config._attn_implementation == "outsize_paged"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager"
