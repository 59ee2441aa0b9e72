"""Attention over pages, in C and in torch, against the plain formula."""

import pytest
import torch

from outsize.block import ALIGNMENT
from outsize.kv import kernel, store
from outsize.kv.pages import PAGE_TOKENS, pages_for
from outsize.kv.store import LayerShape, PagedKV, Pass, Segment, page_bytes, unplanned_memory
from outsize.tier import HostArena

SHAPES = {
    "grouped": (LayerShape(8, 2, 64, 64, None), {}),
    "window": (LayerShape(4, 4, 16, 16, 7), {"sliding_window": 7}),
    "wide window": (LayerShape(4, 1, 24, 24, 40), {"sliding_window": 40}),
    "sinks": (LayerShape(4, 2, 16, 16, None), {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])}),
    "softcap": (LayerShape(4, 2, 16, 16, None), {"softcap": 2.0}),
    "unequal widths": (LayerShape(4, 4, 13, 7, None), {"scaling": 0.3}),
    "wide values": (LayerShape(6, 2, 24, 150, None), {}),
}


def plain(query, key, value, options):
    """`[T, H, V]` of the last T of S positions, `key [S, G, K]`, in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    num, seen, group = query.shape[0], key.shape[0], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("thk,shk->hts", query, key) * options.get("scaling", query.shape[-1] ** -0.5)
    if cap := options.get("softcap"):
        scores = torch.tanh(scores / cap) * cap
    at, keys = torch.arange(seen - num, seen)[:, None], torch.arange(seen)
    hidden = (keys > at) | (keys <= at - options.get("sliding_window", seen))
    scores = scores.masked_fill(hidden, -torch.inf).exp()
    total = scores.sum(-1, keepdim=True)
    if (sinks := options.get("s_aux")) is not None:
        total = total + sinks.double().exp()[:, None, None]
    return torch.einsum("hts,shv->thv", scores / total, value)


@pytest.fixture(params=["compiled", "torch", "fused"])
def way(request, monkeypatch):
    """In C, in torch where there is no compiler, and as on a device."""
    if request.param != "compiled":
        monkeypatch.setattr(store, "load", lambda dtype: None)
        monkeypatch.setattr(store, "is_fused", lambda device: request.param == "fused")
        monkeypatch.setattr(store, "TILE_SCORES", 500)
        monkeypatch.setattr(store, "TILE_MASK", 500)
    elif kernel.load(torch.float32) is None:
        pytest.skip("no compiler")


def filled(shape, dtype, requests, generator):
    """Pages in which `requests` (positions so far, new tokens) have their past, and what they come with now."""
    tables, page = [], 1
    for past, new in requests:
        count = pages_for(past + new)
        tables.append(list(range(page, page + count))[::-1])
        page += count
    layers = {0: shape}
    contents = unplanned_memory(page * page_bytes(layers, dtype), dtype, torch.device("cpu"))
    kv = PagedKV(
        layers, contents.fill_(torch.nan), page, most_positions=200
    )  # what nobody wrote must not be read
    pasts, news = [], []
    for (past, new), table in zip(requests, tables, strict=True):
        keys = torch.randn(past + new, shape.kv_heads, shape.key_width, generator=generator).to(dtype)
        values = torch.randn(past + new, shape.kv_heads, shape.value_width, generator=generator).to(dtype)
        for position in range(past):
            at = table[position // PAGE_TOKENS], position % PAGE_TOKENS
            kv.keys[0][at[0], :, :, at[1]] = keys[position]
            kv.values[0][at[0], :, at[1]] = values[position]
        pasts.append((keys, values))
        news.append(torch.randn(new, shape.heads, shape.key_width, generator=generator).to(dtype))
    return kv, tables, pasts, news


def attend(kv, requests, tables, pasts, news, options):
    start, segments = 0, []
    for (past, new), table in zip(requests, tables, strict=True):
        segments.append(Segment(start, start + new, past, table))
        start += new
    keys = torch.cat([keys[past:] for (past, _), (keys, _) in zip(requests, pasts, strict=True)])
    values = torch.cat([values[past:] for (past, _), (_, values) in zip(requests, pasts, strict=True)])
    packed = [part.transpose(0, 1).unsqueeze(0) for part in (torch.cat(news), keys, values)]
    output = Pass(kv, segments).attend(0, *packed, None, options)[0]
    return output.split([new for _, new in requests])


ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_the_formula(name, dtype, way):
    shape, options = SHAPES[name]
    requests = [(0, 1), (0, 45), (37, 1), (16, 16), (3, 30), (130, 1), (40, 1), (41, 1), (60, 1)]
    kv, tables, pasts, news = filled(shape, dtype, requests, torch.Generator().manual_seed(0))
    outputs = attend(kv, requests, tables, pasts, news, options)
    for output, query, (keys, values) in zip(outputs, news, pasts, strict=True):
        expected = plain(query, keys, values, options)
        assert output.dtype is dtype
        assert float((output.double() - expected).abs().max()) < ERRORS[dtype] * float(values.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_what_a_query_gets_depends_on_nothing_else_in_the_pass(name, dtype, monkeypatch):
    """To the bit: not on who shares its pass or its tile, not on how heads are dealt out to threads."""
    if kernel.load(torch.float32) is None:
        pytest.skip("no compiler")
    shape, options = SHAPES[name]
    requests = [(50, 9), (0, 70), (20, 1)]
    kv, tables, pasts, news = filled(shape, dtype, requests, torch.Generator().manual_seed(1))
    together = attend(kv, requests, tables, pasts, news, options)
    monkeypatch.setattr(kernel, "UNITS_PER_THREAD", 1000)
    for index, (past, new) in enumerate(requests):
        for row in range(new):
            keys, values = pasts[index]
            one = [(past + row, 1)]
            alone = attend(
                kv, one, [tables[index]], [(keys[: past + row + 1], values[: past + row + 1])],
                [news[index][row : row + 1]], options,
            )  # fmt: skip
            assert torch.equal(alone[0][0], together[index][row])


@pytest.mark.parametrize("name", ["grouped", "window"])
def test_what_a_query_does_not_see_does_not_reach_it(name):
    """Not even where it is infinite, and another query of the same tile sees it."""
    if kernel.load(torch.float32) is None:
        pytest.skip("no compiler")
    shape, options = SHAPES[name]
    kv, tables, pasts, news = filled(shape, torch.float32, [(0, 16)], torch.Generator().manual_seed(3))
    expected = attend(kv, [(0, 16)], tables, pasts, news, options)[0]
    pasts[0][1][3] = torch.inf
    output = attend(kv, [(0, 16)], tables, pasts, news, options)[0]
    seeing = slice(3, 3 + (shape.window or 16))
    assert not output[seeing].isfinite().any()
    output[seeing] = expected[seeing]
    assert torch.equal(output, expected)


def test_one_long_request_among_short_ones_is_dealt_out(monkeypatch):
    """By its heads, where there are not enough requests for all threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    alike = kernel.Units([(row, 1, 0, 1000) for row in range(64)])
    unlike = kernel.Units([*((row, 1, 0, 9) for row in range(1, 64)), (0, 1, 0, 16000)])
    assert alike.balance == 64 and unlike.balance < 1.1
    assert unlike.items[0].tolist() == [0, 1, 0, 16000]  # the longest begins first
    assert alike.heads_at_once(8, 4) == 8 and unlike.heads_at_once(8, 4) == 1
    assert kernel.Units([(row, 1, 0, 1000) for row in range(4)]).heads_at_once(8, 4) == 2
    many = kernel.Units([(32 * row, 32, 0, 1000) for row in range(1000)])
    assert many.heads_at_once(64, 4) == kernel.MOST_STATES // (32 * 4)  # what a stack holds

    if kernel.load(torch.float32) is None:
        pytest.skip("no compiler")
    calls = []
    monkeypatch.setattr(kernel, "on_all_threads", lambda function, call: calls.append(call.unit_heads))
    shape, options = LayerShape(8, 8, 16, 16, None), {}
    for requests in ([(100, 1)], [(100, 1)] * 64):
        attend(
            *(kv := filled(shape, torch.float32, requests, torch.Generator()))[:1], requests, *kv[1:], options
        )
    assert calls == [1, 8]


LAYERS = {
    0: LayerShape(8, 2, 16, 16, None),
    1: LayerShape(4, 1, 24, 8, None),
    5: LayerShape(4, 4, 16, 16, None),
}
"""Layers of unlike shapes in one page."""


def of_layers(num_pages, dtype):
    """Empty pages for `LAYERS` in an arena that holds nothing else, and the arena."""
    num_bytes = num_pages * page_bytes(LAYERS, dtype)
    arena = HostArena(num_bytes)
    region = arena.allocate(num_bytes, "pages")
    contents = region.tensor(dtype, num_bytes // dtype.itemsize)
    return PagedKV(LAYERS, contents, num_pages), region, arena


def attend_in_layer(kv, layer, table, position, generator):
    """One token of a request with `table` attends in `layer`, and leaves its key and value there."""
    shape = LAYERS[layer]
    query = torch.randn(1, shape.heads, 1, shape.key_width, generator=generator)
    key = torch.randn(1, shape.kv_heads, 1, shape.key_width, generator=generator)
    value = torch.randn(1, shape.kv_heads, 1, shape.value_width, generator=generator)
    return Pass(kv, [Segment(0, 1, position, table)]).attend(layer, query, key, value, None, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_page_are_one_range_that_disks_can_move(way, dtype):
    kv, region, arena = of_layers(4, dtype)
    size = page_bytes(LAYERS, dtype)
    assert arena.in_use_bytes == kv.num_bytes == 4 * size and size % ALIGNMENT == 0
    for index, layer in enumerate(LAYERS):
        attend_in_layer(kv, layer, [2], index, torch.Generator().manual_seed(index))
    written = torch.frombuffer(region.buffer, dtype=torch.uint8).view(4, size)
    assert [bool(page.any()) for page in written] == [False, False, True, False]
    for layer in LAYERS:
        assert kv.keys[layer][2].any() and kv.values[layer][2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_that_left_and_came_back_elsewhere_gives_the_same_bits(way, dtype):
    """Its bytes are all there is to a page: one copy moves it, to another memory and back into another place."""
    kv, region, _ = of_layers(6, dtype)
    size = page_bytes(LAYERS, dtype)
    for position in range(3 * PAGE_TOKENS):
        for layer in LAYERS:
            attend_in_layer(
                kv, layer, [1, 2, 3], position, torch.Generator().manual_seed(position * 8 + layer)
            )

    def attended(table):
        return [
            attend_in_layer(kv, layer, table, 3 * PAGE_TOKENS - 1, torch.Generator().manual_seed(layer))
            for layer in LAYERS
        ]

    expected = attended([1, 2, 3])
    elsewhere = bytes(region.buffer[2 * size : 3 * size])
    region.buffer[2 * size : 3 * size] = b"\xff" * size
    region.buffer[5 * size :] = elsewhere
    for before, after in zip(expected, attended([1, 5, 3]), strict=True):
        assert torch.equal(before, after) and after.isfinite().all()


def test_tokens_of_no_request_reach_nobody(way):
    shape, options = SHAPES["grouped"]
    kv, tables, pasts, news = filled(shape, torch.float32, [(0, 3)], torch.Generator().manual_seed(2))
    alone = attend(kv, [(0, 3)], tables, pasts, news, options)[0]
    query = torch.cat([news[0], torch.ones(2, 8, 64)])
    keys, values = (torch.cat([part, torch.ones(2, *part.shape[1:])]) for part in pasts[0])
    packed = [part.transpose(0, 1).unsqueeze(0) for part in (query, keys, values)]
    both = Pass(kv, [Segment(0, 3, 0, tables[0]), Segment(3, 5, 900, ())]).attend(0, *packed, None, options)
    assert torch.equal(both[0, :3], alone)
    assert torch.isfinite(both).all()
