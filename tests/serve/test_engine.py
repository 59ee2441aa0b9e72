"""The engine over a real model: seeds, sharing, samples, guesses, cancelling, log-probabilities, refusals."""

import gc
import weakref

import pytest
import torch

import outsize
from outsize import Pins
from outsize.engine.call_tracker import CallTracker
from outsize.errors import BudgetError, ConfigError, ModelError, RequestError
from outsize.serve import Engine, Finish, Request, Sampling, Stream, open_engine
from outsize.serve.schedule import Sample
from outsize.serve.speculate import LONG_MATCH, Guesser, _Record
from tests.running import opened
from tests.seams import blocks_expected, weights_in_slots
from tests.serve.families import FAMILIES, lively, prompts_of
from tests.zoo import plain_stack

DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def model():
    return lively("llama")


@pytest.fixture(scope="module", params=["paged", "single"])
def any_model(request):
    return lively("llama" if request.param == "paged" else "gptj")


def tokens_of(engine, request):
    return [completion.tokens for completion in engine.submit(request).wait()]


def test_a_seed_does_not_depend_on_the_batch(model):
    prompts = prompts_of((9, 30, 2, 17))
    alone = [tokens_of(Engine(model), Request(prompt, DRAWN, 12)) for prompt in prompts]
    engine = Engine(model, pass_tokens=7)
    streams = [engine.submit(Request(prompt, DRAWN, 12)) for prompt in prompts]
    assert [[completion.tokens for completion in stream.wait()] for stream in streams] == alone
    other = Request(prompts[0], Sampling(temperature=1.0, top_p=0.95, seed=4), 12)
    assert tokens_of(engine, other) != alone[0]


def test_samples_differ_share_their_prompt_and_begin_like_fewer(any_model):
    engine, (prompt,) = open_engine(any_model), prompts_of((33,))
    four = tokens_of(engine, Request(prompt, DRAWN, 8, num_samples=4))
    assert len({tuple(tokens) for tokens in four}) == 4
    assert tokens_of(engine, Request(prompt, DRAWN, 8, num_samples=2)) == four[:2]
    if isinstance(engine, Engine):
        assert engine.scheduler.num_shared_tokens == 32 * 5
        engine.scheduler.check()


def passes_of(engine):
    """A list that grows with each pass of the model."""
    passes, run = [], engine.runner.run
    engine.runner.run = lambda parts, **options: passes.append(1) or run(parts, **options)
    return passes


def test_copied_guesses_change_nothing_and_save_passes(monkeypatch):
    model = FAMILIES["llama_tied"].build()  # it says the same again and again
    model.generation_config.eos_token_id = None
    results = []
    for pays in (True, False):
        monkeypatch.setattr(Guesser, "_pays", lambda self, trust, pays=pays: pays)
        engine = Engine(model)
        passes = passes_of(engine)
        (completion,) = engine.submit(Request((5, 6, 7), max_new_tokens=40)).wait()
        results.append((completion.tokens, len(passes), engine.guesser.num_held))
        engine.scheduler.check()
    (guessed, fewer, held), (plain, more, _) = results
    assert guessed == plain
    assert fewer == more - held and held > 10


def guessing(prompt):
    """A guesser, a sample that decodes after `prompt`, what is guessed for it, and a way to let it say something."""
    guesser, request = Guesser(), Request(tuple(prompt), max_new_tokens=100_000)
    sample = Sample(Stream(request, lambda: None), 0, list(prompt), 100_000, num_computed=len(prompt) - 1)

    def guesses(most=30):
        guesser.prepare([sample])
        return guesser.propose(sample, most)

    def say(*tokens):
        sample.tokens += tokens
        sample.num_computed += len(tokens)

    return guesser, sample, guesses, say


TEXT = list(range(1, 61))


def test_guesses_are_what_followed_the_last_time():
    guesser, sample, guesses, say = guessing([*TEXT, *TEXT[: LONG_MATCH - 1]])
    assert guesses() == []  # what is alike may be so by chance
    say(16)
    assert guesses() == [17]  # one, to begin with
    guesser.learn(sample, 1, 1)
    say(17, 18)
    assert guesses() == [19, 20]  # more, after it held
    assert guesses(1) == [19]
    guesser.learn(sample, 2, 2)
    say(19, 20, 21)
    assert guesses() == [22, 23, 24, 25]
    guesser.learn(sample, 4, 0)
    assert guesses() == []  # a longer match is wanted, after none did
    guesser._records[sample].long_match = LONG_MATCH
    assert guesses() == [22]  # and fewer are guessed


def test_a_text_that_is_copied_goes_on_after_what_was_changed():
    guesser, sample, guesses, say = guessing([*TEXT, *TEXT[:20]])
    for _ in range(4):
        held = guesses()
        guesser.learn(sample, len(held), len(held))
        say(*held)
    assert sample.tokens[-1] == 35 and guesses() == TEXT[35:51]
    guesser.learn(sample, 16, 2)
    say(36, 37, 100)
    assert guesses() == []
    say(101)
    assert guesses() == []  # still changed
    say(40)  # for 38 and 39 there is something else
    assert guesses() == [41, 42, 43]
    guesser.learn(sample, 3, 3)
    say(41, 42, 43, 44)
    assert guesses() == TEXT[44:50]

    guesser.forget(sample)
    request = Request((7, 8, 9, 10, 7, 8, 9))
    other = Sample(Stream(request, lambda: None), 0, list(request.prompt), 50, num_computed=6)
    guesser.prepare([other])
    assert guesser.propose(other, 30) == [10, 7, 8, 9], "the next text is believed to be of the kind"


def test_what_repeats_itself_is_guessed_over_again():
    guesser, sample, guesses, _ = guessing([5] * 20)
    for count in (1, 2, 4, 8, 16, 16):
        assert guesses() == [5] * count
        guesser.learn(sample, count, count)


def test_elsewhere_few_guesses_fail():
    """Of a text in which what was said before is said again, and goes on otherwise each time."""
    guesser, sample, guesses, say = guessing([1])
    num_wasted = 0
    for turn in range(200):
        for token in (*range(2, LONG_MATCH + 2), 1000 + turn):
            if found := guesses():
                held = int(found[0] == token)
                guesser.learn(sample, len(found), held)
                num_wasted += len(found) - held
            say(token)
    assert 0 < num_wasted < 3


def test_guesses_are_made_where_they_pay():
    """A pass takes 0.6 s, and 0.4 s more for each token: two in five guesses must hold."""
    guesser, sample, _, _ = guessing(TEXT[:20] * 2)
    for num_tokens in (1, 3, 1, 3, 10):
        guesser._cost.add(num_tokens, 0.6 + 0.4 * num_tokens)
    assert guesser._cost.line() == pytest.approx((0.6, 0.4))
    guesser._records[sample] = record = _Record()
    record.copied.share_held = 0.35
    guesser.prepare([sample])
    assert guesser.propose(sample, 4) == []  # a third holds, and saves less than it costs
    for _ in range(5):
        record.copied.learn(1, 1)
    guesser.prepare([sample])
    assert guesser.propose(sample, 4)
    for _ in range(6):
        record.copied.learn(4, 0)
    offered = []
    for _ in range(200):
        guesser.prepare([sample])
        offered.append(bool(guesser.propose(sample, 4)))
    assert not offered[0] and offered[-1]  # not now, and in a while again


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_changes_nothing_and_one_that_agrees_saves_passes(model, sampling, seed, monkeypatch):
    monkeypatch.setattr(Guesser, "_pays", lambda self, trust, guess_s=None: guess_s is not None)
    requests = [Request(prompt, sampling, 20, num_samples=2) for prompt in prompts_of((30, 5, 18))]
    expected = [tokens_of(Engine(model), request) for request in requests]
    engine = Engine(model, draft=lively("llama", seed), pass_tokens=24)
    passes = passes_of(engine)
    for _ in range(2):
        streams = [engine.submit(request) for request in requests]
        while not engine.is_idle:
            engine.step()
            engine.scheduler.check()
            engine.guesser.draft.check()
        assert [[completion.tokens for completion in stream.completions] for stream in streams] == expected
    held = engine.guesser.num_held / engine.guesser.num_guessed
    assert held == 1 and len(passes) < 40 if seed == 0 else held < 0.5
    assert engine.guesser.draft.pool.num_free == engine.guesser.draft.pool.num_usable


def test_drafts_that_cannot_be_used(model):
    with pytest.raises(ConfigError, match="the draft knows 64 tokens, the model 199"):
        Engine(model, draft=FAMILIES["llama"].build(vocab_size=64))
    with pytest.raises(ConfigError, match="BloomForCausalLM cannot guess"):
        Engine(model, draft=lively("bloom"))
    with pytest.raises(ConfigError, match="rotates long texts"):
        Engine(model, draft=lively("phi3"))


def test_guesses_that_are_drawn_change_nothing(model, monkeypatch):
    (prompt,) = prompts_of((12,))
    expected = tokens_of(Engine(model), Request(prompt, DRAWN, 30))
    for guess in (
        lambda s, most: expected[0][len(s.tokens) - 12 :][:most],
        lambda s, most: [7] * min(most, 3),
    ):
        engine = Engine(model)
        monkeypatch.setattr(engine.guesser, "propose", guess)
        monkeypatch.setattr(engine.guesser, "learn", lambda *_: None)
        assert tokens_of(engine, Request(prompt, DRAWN, 30)) == expected
        engine.scheduler.check()


def test_cancelling_frees_pages_at_any_point(model):
    engine, (prompt,) = Engine(model, pass_tokens=8), prompts_of((30,))
    room = engine.scheduler.pool.num_free
    for num_steps in (0, 1, 3, 6, 9):
        stream = engine.submit(Request(prompt, DRAWN, 20, num_samples=3))
        for _ in range(num_steps):
            engine.step()
        engine.cancel(stream)
        assert stream.is_finished and engine.is_idle
        assert engine.scheduler.pool.num_free == room
        engine.scheduler.check()
    assert {completion.finish for completion in stream.completions} == {Finish.CANCELLED}


def test_a_request_is_cancelled_while_it_is_generated(any_model):
    engine, (prompt,) = open_engine(any_model), prompts_of((5,))
    seen = []

    def watch(token):
        seen.append(token)
        if len(seen) == 3:
            engine.cancel(stream)

    stream = engine.submit(Request(prompt, max_new_tokens=20), watch)
    while not engine.is_idle:
        engine.step()
    assert len(seen) == 3 and stream.completions[0].finish is Finish.CANCELLED


@pytest.mark.parametrize("num_seen", range(1, 10))
def test_whoever_watches_may_cancel_all_samples_at_any_token(model, num_seen):
    engine, (prompt,) = Engine(model), prompts_of((33,))
    seen = []

    def watch(token):
        seen.append(token)
        if len(seen) == num_seen:
            engine.cancel(stream)

    stream = engine.submit(Request(prompt, DRAWN, 3, num_samples=3), watch)
    stream.wait()
    assert len(seen) == num_seen and engine.is_idle
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_logprobs_are_those_of_the_model(any_model):
    engine, (prompt,) = open_engine(any_model, pass_tokens=7), prompts_of((20,))
    stream = engine.submit(Request(prompt, DRAWN, 5, logprobs=2, prompt_logprobs=True))
    (completion,) = stream.wait()
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        logprobs = any_model(ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None]).flatten()
    told = torch.tensor([*stream.prompt_logprobs, *completion.logprobs])
    assert torch.allclose(told, expected, atol=1e-4)
    best = logprobs[19:-1].topk(2)
    assert [[token for token, _ in pairs] for pairs in completion.likeliest] == best.indices.tolist()


def test_the_end_token_ends_it(any_model):
    engine, (prompt,) = open_engine(any_model), prompts_of((6,))
    (tokens,) = tokens_of(engine, Request(prompt, max_new_tokens=10))
    any_model.generation_config.eos_token_id = [tokens[4], 3]
    try:
        (completion,) = open_engine(any_model).submit(Request(prompt, max_new_tokens=10)).wait()
    finally:
        any_model.generation_config.eos_token_id = None
    assert completion.finish is Finish.STOP
    assert completion.tokens == tokens[: tokens.index(tokens[4]) + 1]


def test_a_stream_is_read_token_by_token(model):
    engine, (prompt,) = Engine(model), prompts_of((6,))
    stream = engine.submit(Request(prompt, max_new_tokens=4))
    first = next(iter(stream))
    assert first.id == stream.completions[0].tokens[0] and not stream.is_finished
    assert [first.id, *(token.id for token in stream)] == stream.completions[0].tokens
    assert stream.completions[0].finish is Finish.LENGTH


def test_the_last_position_ends_it(any_model):
    engine, (prompt,) = open_engine(any_model), prompts_of((60,))
    (completion,) = engine.submit(Request(prompt, max_new_tokens=50)).wait()
    assert len(completion.tokens) == 4 and completion.finish is Finish.LENGTH
    with pytest.raises(RequestError, match="64 tokens, the model 64 positions"):
        engine.submit(Request(prompt + (1,) * 4))


def test_bad_requests(any_model):
    engine = open_engine(any_model)
    with pytest.raises(RequestError, match="no token"):
        engine.submit(Request(()))
    for token in (199, 2**40, -1):
        with pytest.raises(
            RequestError, match=f"token 2 of the prompt is {token:,}, the model has tokens 0 to 198"
        ):
            engine.submit(Request((5, token)))
    with pytest.raises(ConfigError, match="need a tokenizer"):
        engine.submit(Request((1,), stop=("x",)))
    assert engine.is_idle


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_what_is_no_causal_model_is_refused(name):
    with pytest.raises(ModelError, match="no causal language model"):
        open_engine(FAMILIES[name].build())
    with pytest.raises(ModelError, match="no causal language model"):
        open_engine(plain_stack())


def test_a_pass_without_tokens_is_refused(model):
    with pytest.raises(ConfigError, match="less than 1"):
        Engine(model, pass_tokens=0)


def test_a_cache_that_is_too_small_is_refused_with_the_numbers(model):
    with pytest.raises(BudgetError, match="hold no page of 16 tokens"):
        Engine(model, kv=1000)
    engine = Engine(model, kv="20KiB")
    with pytest.raises(RequestError, match="4 pages of KV cache, there are"):
        engine.submit(Request((5,) * 40, max_new_tokens=24))


def test_a_cache_that_nobody_asked_for_gives_way_to_the_model(tmp_path, monkeypatch):
    tried, settle = [], CallTracker.settle_for

    def refuse(calls, arguments):
        tried.append(weakref.ref(arguments["paged"].kv))
        if len(tried) < 3:
            monkeypatch.setattr(calls._budget, "place", _too_large)
        else:
            monkeypatch.undo()
        return settle(calls, arguments)

    def pages(**options):
        model = opened(lively("llama"), disk=tmp_path, home="disk").requires_grad_(False)
        return Engine(model, pass_tokens=8, **options).runner.kv.num_pages - 1

    most = pages()
    monkeypatch.setattr(CallTracker, "settle_for", refuse)
    gc.disable()  # what was tried goes at once, not when the collector comes by
    try:
        assert pages() == most // 4
        assert tried[0]() is None and tried[1]() is None
    finally:
        gc.enable()
    monkeypatch.setattr(CallTracker, "settle_for", refuse)
    tried.clear()
    with pytest.raises(BudgetError, match="too large"):
        pages(kv="64KiB")


def _too_large(*_):
    raise BudgetError("too large")


def test_a_model_that_was_called_before_is_served_if_pages_fit(tmp_path):
    model = opened(lively("llama"), disk=tmp_path, home="disk", host="4GiB")
    model.requires_grad_(False)
    with torch.no_grad():
        model(torch.ones(1, 40, dtype=torch.long))
    assert tokens_of(Engine(model, pass_tokens=8), Request((5, 6, 7), max_new_tokens=3))
    with pytest.raises(BudgetError, match="was called before"):
        Engine(model, kv="5GiB")
    assert outsize.report(model).host_peak_bytes < 4 << 30


def of_prompt(engine, prompt):
    """A running request that also asks for the log-probabilities of its prompt."""
    return engine.submit(Request(prompt, max_new_tokens=12, prompt_logprobs=True))


@pytest.mark.parametrize("home", ["host", "disk"])
def test_pages_that_another_call_took_are_computed_again(home, tmp_path):
    """A call of the model, another engine on it: wherever in a request they come, it says the same."""
    model = opened(lively("llama"), disk=tmp_path, home=home).requires_grad_(False)
    engine, other = (Engine(model, pass_tokens=8, kv="256KiB", deterministic=True) for _ in range(2))
    prompts = prompts_of((37, 3))
    undisturbed = [of_prompt(engine, prompt).wait()[0].tokens for prompt in prompts]
    logprobs = [of_prompt(engine, prompt) for prompt in prompts]
    expected = [(stream.wait()[0].tokens, stream.prompt_logprobs) for stream in logprobs]
    assert [tokens for tokens, _ in expected] == undisturbed
    streams = [of_prompt(engine, prompt) for prompt in prompts]
    for disturb in range(12):
        engine.step()
        with torch.no_grad():
            model(torch.ones(1, 40, dtype=torch.long))
        if disturb % 3 == 0:
            other.submit(Request((5, 6, 7), max_new_tokens=2))
            other.step()
    assert [(stream.wait()[0].tokens, stream.prompt_logprobs) for stream in streams] == expected
    for each in (engine, other):
        each.check()


def test_what_the_next_pass_needs_first_is_read_beside_choosing_tokens(model, tmp_path):
    streamed = opened(model, disk=tmp_path, home="disk", pins=Pins(weight_slots=2)).requires_grad_(False)
    engine = Engine(streamed)
    engine.submit(Request(prompts_of((20,))[0], DRAWN, 4))
    engine.step()
    assert blocks_expected(streamed)[0] in weights_in_slots(streamed)
    assert not outsize.report(streamed).off_plan
