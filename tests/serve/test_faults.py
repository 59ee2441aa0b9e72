"""What fails ends its own request with the error, and changes no bit of another's: callbacks, passes, threads."""

import gc
import threading
from functools import cache

import pytest
import torch

from outsize.errors import ModelError, UsageError
from outsize.serve import Engine, Finish, Request, Sampling, open_engine
from outsize.serve import engine as engine_module
from tests.serve.families import lively, prompts_of

DRAWN = Sampling(temperature=1.0, seed=3)
REQUESTS = [Request(prompt, DRAWN, 6, logprobs=1) for prompt in prompts_of((9, 33, 5))]


@pytest.fixture(scope="module", params=["paged", "single"])
def any_model(request):
    return lively("llama" if request.param == "paged" else "gptj")


@pytest.fixture(scope="module")
def model():
    return lively("llama")


def engine_of(model):
    """An engine whose numbers do not depend on what else runs."""
    return (
        Engine(model, pass_tokens=48, deterministic=True)
        if model.config.model_type == "llama"
        else open_engine(model)
    )


def answer(stream):
    return [(completion.tokens, completion.logprobs) for completion in stream.wait()]


@cache
def alone(model):
    """What each of REQUESTS is answered by itself."""
    return [answer(engine_of(model).submit(request)) for request in REQUESTS]


def assert_clean(engine):
    """Nothing is left of any request, and the engine serves as it did."""
    while not engine.is_idle:
        engine.step()
    if isinstance(engine, Engine):
        engine.check()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
        assert not engine._answers and not engine._chosen and not engine._cancelled
    model = engine.runner.model if isinstance(engine, Engine) else engine._model
    assert answer(engine.submit(REQUESTS[2])) == alone(model)[2]


def guessing(engine, expected, monkeypatch):
    """Let the engine guess right, so that a pass gives several tokens."""
    if isinstance(engine, Engine):
        texts = {request.prompt: answer[0][0] for request, answer in zip(REQUESTS, expected, strict=True)}
        monkeypatch.setattr(engine.guesser, "learn", lambda *_: None)
        monkeypatch.setattr(
            engine.guesser,
            "propose",
            lambda sample, most: texts[sample.stream.request.prompt][
                len(sample.tokens) - len(sample.stream.request.prompt) :
            ][: min(most, 2)],
        )


@pytest.mark.parametrize(("count", "guesses"), [(1, False), (3, False), (6, True), (2, True)])
def test_a_callback_that_raises_ends_its_own_request(any_model, count, guesses, monkeypatch):
    expected, engine, seen = alone(any_model), engine_of(any_model), []
    if guesses:
        guessing(engine, expected, monkeypatch)

    def watch(token):
        seen.append(token.id)
        if len(seen) == count:
            raise ZeroDivisionError(count)

    streams = [
        engine.submit(request, watch if index == 1 else None) for index, request in enumerate(REQUESTS)
    ]
    with pytest.raises(ZeroDivisionError):
        streams[1].wait()
    with pytest.raises(ZeroDivisionError):
        list(streams[1])
    assert streams[1].completions[0].finish is Finish.ERROR
    assert seen == expected[1][0][0][:count] == streams[1].completions[0].tokens
    assert [answer(stream) for stream in (streams[0], streams[2])] == [expected[0], expected[2]]
    assert_clean(engine)


def test_a_callback_may_do_anything_to_the_engine(model, monkeypatch):
    """It cancels another request and a sibling of its own, submits, steps, reads another to its end, and then raises."""
    expected, engine = alone(model), engine_of(model)
    guessing(engine, expected, monkeypatch)
    streams, late = [], []

    def watch(token):
        if not late:
            late.append(engine.submit(REQUESTS[2]))
            engine.cancel(streams[0])
            engine.step()
            assert answer(streams[2]) == expected[2]
            raise ZeroDivisionError

    streams += [
        engine.submit(request, watch if index == 1 else None) for index, request in enumerate(REQUESTS)
    ]
    with pytest.raises(ZeroDivisionError):
        streams[1].wait()
    assert streams[0].completions[0].finish is Finish.CANCELLED
    assert answer(late[0]) == expected[2]
    assert_clean(engine)


def test_streams_that_are_abandoned_end_without_a_reader(model):
    expected, engine = alone(model), engine_of(model)
    streams = [engine.submit(request) for request in REQUESTS]
    next(iter(streams[0]))
    del streams[0]
    gc.collect()
    assert [answer(stream) for stream in streams] == expected[1:]
    assert_clean(engine)


def failing(model, error, at):
    """A hook on the model that raises at pass number `at`, once."""
    count = [0]

    def hook(*_):
        count[0] += 1
        if count[0] == at:
            raise error

    return model.model.layers[1].register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("error", "at"), [(RuntimeError("out of luck"), 1), (MemoryError("no more"), 2), (OSError(5, "disk"), 4)]
)
def test_a_pass_that_fails_ends_its_requests_and_no_other(model, error, at):
    expected, engine = alone(model), engine_of(model)
    hook = failing(model, error, at)
    try:
        streams = [engine.submit(request) for request in REQUESTS]
        for _ in range(at - 1):
            engine.step()
        members = {sample.stream for sample in engine.scheduler.running}
        late = engine.submit(REQUESTS[0])
        engine.step()  # it raises nothing: another reader may drive the engine
        engine.check()
        for stream in streams:
            if stream.error is not None:
                assert stream.completions[0].finish is Finish.ERROR
                with pytest.raises(type(error)) as caught:
                    stream.wait()
                assert caught.value is error
        assert members <= {stream for stream in streams if stream.error is not None}
        others = [
            (s, e) for s, e in zip([*streams, late], [*expected, expected[0]], strict=True) if s.error is None
        ]
        assert all(answer(stream) == wanted for stream, wanted in others)
        assert_clean(engine)
    finally:
        hook.remove()


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_of_a_pass_is_raised_and_loses_nothing(model, at):
    expected, engine = alone(model), engine_of(model)
    hook = failing(model, KeyboardInterrupt(), at)
    try:
        streams = [engine.submit(request) for request in REQUESTS]
        with pytest.raises(KeyboardInterrupt):
            streams[0].wait()
        engine.check()
        assert [answer(stream) for stream in streams] == expected
        assert_clean(engine)
    finally:
        hook.remove()


@pytest.mark.parametrize("place", ["choose", "watch"])
def test_an_interrupt_between_a_pass_and_its_tokens_costs_one_request(model, place, monkeypatch):
    expected, engine, calls = alone(model), engine_of(model), []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return choose(*arguments)

    choose = engine_module.Answer.choose if place == "choose" else lambda token: None
    if place == "choose":
        monkeypatch.setattr(engine_module.Answer, "choose", interrupt)
    streams = [engine.submit(request, interrupt if place == "watch" else None) for request in REQUESTS]
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.step()
    ended = [stream for stream in streams if stream.error is not None]
    assert len(ended) == 1 and "KeyboardInterrupt ended the request" in str(ended[0].error)
    for stream, wanted in zip(streams, expected, strict=True):
        assert stream is ended[0] or answer(stream) == wanted
    assert_clean(engine)


def test_a_model_without_a_next_token_is_named(any_model):
    expected, engine = alone(any_model), engine_of(any_model)
    num_calls = [0]

    def spoil(module, args, output):
        num_calls[0] += 1
        if num_calls[0] == 2:
            output.view(-1, output.shape[-1])[0, 7] = torch.nan
        return output

    hook = any_model.get_output_embeddings().register_forward_hook(spoil)
    try:
        streams = [engine.submit(request) for request in REQUESTS]
        while not engine.is_idle:
            engine.step()
    finally:
        hook.remove()
    failed = [stream for stream in streams if stream.error is not None]
    assert len(failed) == 1 and isinstance(failed[0].error, ModelError)
    assert "not finite" in str(failed[0].error) and failed[0].completions[0].finish is Finish.ERROR
    for stream, wanted in zip(streams, expected, strict=True):
        assert stream in failed or answer(stream) == wanted
    assert_clean(engine)


def test_a_draft_that_fails_is_left_out(model, caplog, monkeypatch):
    expected = alone(model)
    engine = Engine(model, pass_tokens=48, deterministic=True, draft=lively("llama", 1))
    monkeypatch.setattr(engine.guesser, "_pays", lambda trust, guess_s=None: guess_s is not None)
    hook = failing(engine.guesser.draft.runner.model, RuntimeError("out of luck"), 2)
    streams = [engine.submit(request) for request in REQUESTS]
    assert [answer(stream) for stream in streams] == expected
    hook.remove()
    assert engine.guesser.draft is None and "the draft failed" in caplog.text


def test_the_engine_is_not_entered_from_its_own_pass(model):
    """A collector may close a reader inside a pass, which cancels; a hook that submits is refused."""
    expected, engine, refused = alone(model), engine_of(model), []

    def hook(*_):
        engine.cancel(streams[0])
        for call in (engine.step, lambda: engine.submit(REQUESTS[0])):
            with pytest.raises(UsageError, match="from within one of its own passes"):
                call()
            refused.append(call)

    handle = model.register_forward_pre_hook(hook)
    streams = [engine.submit(request) for request in REQUESTS]
    engine.step()
    handle.remove()
    assert len(refused) == 2 and streams[0].completions[0].finish is Finish.CANCELLED
    assert not any(sample.stream is streams[0] for sample in engine.scheduler.running)
    engine.check()
    assert [answer(stream) for stream in streams[1:]] == expected[1:]
    assert_clean(engine)


def test_threads_read_submit_and_cancel_at_once(any_model):
    expected, engine = alone(any_model), engine_of(any_model)
    results, failures = {}, []

    def read(number):
        try:
            for turn in range(3):
                index = (number + turn) % len(REQUESTS)
                stream = engine.submit(REQUESTS[index])
                tokens = [token.id for token in stream]
                results[number, turn] = tokens == expected[index][0][0] and answer(stream) == expected[index]
                doomed = engine.submit(REQUESTS[1])
                canceller = threading.Thread(target=engine.cancel, args=(doomed,))
                canceller.start()
                doomed.wait()
                canceller.join()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(results) == 9 and all(results.values())
    assert_clean(engine)


@pytest.mark.parametrize("any_model", ["single"], indirect=True)
def test_a_callback_of_a_request_served_alone_cannot_wait_for_another(any_model):
    engine, other = open_engine(any_model), []

    def watch(token):
        other.append(engine.submit(REQUESTS[2]))
        other[0].wait()

    stream = engine.submit(REQUESTS[0], watch)
    with pytest.raises(UsageError, match="one request at a time"):
        stream.wait()
    assert answer(other[0]) == alone(any_model)[2]
