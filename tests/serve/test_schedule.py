"""The scheduler without a model: what is composed, admitted, shared and refused."""

import random

import pytest

from outsize.errors import RequestError
from outsize.kv import PagePool
from outsize.serve.request import Request, Stream
from outsize.serve.schedule import Limits, Scheduler


def scheduler(num_pages=33, tokens=32, rows=8, positions=256, long_after=None):
    return Scheduler(PagePool(num_pages), Limits(tokens, rows, positions, long_after))


def stream_of(prompt, **settings):
    return Stream(Request(tuple(prompt), **settings), lambda: None)


def nothing(sample, most):
    return []


def run_pass(subject, propose=nothing):
    """Admit, compose, and take every sample's next token to be 1."""
    subject.admit()
    chunks = subject.compose(propose)
    for chunk in chunks:
        subject.computed(chunk.sample, chunk.num_tokens)
        if not chunk.sample.num_remaining:
            chunk.sample.tokens.append(1)
            if len(chunk.sample.tokens) == chunk.sample.most_tokens:
                subject.remove(chunk.sample)
    subject.check()
    return chunks


def test_decodes_come_first_and_prompts_in_pieces():
    subject = scheduler()
    subject.add(stream_of([5] * 4, max_new_tokens=9))
    assert [c.num_tokens for c in run_pass(subject)] == [4]
    subject.add(stream_of(range(70), max_new_tokens=9))
    subject.add(stream_of(range(100, 110), max_new_tokens=9))
    assert [c.num_tokens for c in run_pass(subject)] == [1, 31]
    assert [c.num_tokens for c in run_pass(subject)] == [1, 31]
    chunks = run_pass(subject)
    assert [c.num_tokens for c in chunks] == [1, 8, 10]
    assert [c.num_rows for c in chunks] == [1, 1, 1]


def test_all_that_decode_get_their_turn():
    subject = scheduler(tokens=2)
    for first in range(5):
        subject.add(stream_of([first], max_new_tokens=8))
    served = []
    for _ in range(10):
        served += [chunk.sample.tokens[0] for chunk in run_pass(subject)]
    assert all(served.count(first) == 4 for first in range(5))


def test_a_request_waits_until_all_it_may_need_is_free():
    subject = scheduler(num_pages=5)
    subject.add(stream_of([1] * 20, max_new_tokens=28))
    subject.add(stream_of([2] * 20, max_new_tokens=28))
    while not subject.is_idle:
        assert len(run_pass(subject)) == 1
    assert subject.pool.num_free == 4


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        ([], {}, "no token"),
        ([1] * 256, {}, "256 tokens, the model 256 positions"),
        ([1] * 100, {"max_new_tokens": 60}, "10 pages of KV cache, there are 8"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(prompt, settings, words):
    subject = scheduler(num_pages=9)
    with pytest.raises(RequestError, match=words) as caught:
        subject.add(stream_of(prompt, **settings))
    assert caught.value.hint and subject.is_idle


def test_samples_share_the_pages_of_their_prompt():
    subject = scheduler()
    subject.add(stream_of(range(40), max_new_tokens=8, num_samples=3))
    assert [chunk.num_tokens for chunk in run_pass(subject)] == [32]
    run_pass(subject)
    assert [chunk.num_tokens for chunk in run_pass(subject)] == [1, 8]
    run_pass(subject)
    tables = [sample.table for sample in subject.running]
    assert len(tables) == 3 and tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({page for table in tables for page in table}) == 2 + 3
    assert subject.num_shared_tokens == 64


def test_a_later_prompt_finds_an_earlier_one_and_still_computes_its_last_token():
    subject = scheduler()
    for _ in range(2):
        subject.add(stream_of(range(32), max_new_tokens=2))
        while not subject.is_idle:
            run_pass(subject)
    assert subject.num_shared_tokens == 16  # not the page that holds the last token


def test_a_conversation_that_goes_on_finds_its_own_answer():
    subject = scheduler()
    subject.add(stream_of(range(20), max_new_tokens=20))
    while not subject.is_idle:
        run_pass(subject)
    subject.add(stream_of([*range(20), *[1] * 20, 7], max_new_tokens=2))
    while not subject.is_idle:
        run_pass(subject)
    assert subject.num_shared_tokens == 32


def test_what_may_be_rotated_in_another_way_is_not_shared():
    subject = scheduler(long_after=40)
    for prompt, num_shared in ((range(32), 0), (range(32), 0), (range(48), 0), (range(48), 32)):
        before = subject.num_shared_tokens
        subject.add(stream_of(prompt, max_new_tokens=16))
        while not subject.is_idle:
            run_pass(subject)
        assert subject.num_shared_tokens - before == num_shared


def test_logits_of_a_prompt_are_limited_by_rows():
    subject = scheduler()
    subject.add(stream_of(range(20), max_new_tokens=2, prompt_logprobs=True))
    subject.admit()
    (chunk,) = subject.compose(nothing)
    assert chunk.tells_prompt and chunk.num_tokens == chunk.num_rows == 8


def test_a_pass_holds_one_side_of_a_rotation_that_changes():
    subject = scheduler(long_after=20)
    subject.add(stream_of(range(10), max_new_tokens=4))
    subject.add(stream_of(range(100, 130), max_new_tokens=4))
    for _ in range(8):
        sides = {subject.is_long(chunk.sample) for chunk in run_pass(subject)}
        assert len(sides) <= 1
    assert subject.is_idle


def test_guesses_stay_within_what_was_reserved():
    subject = scheduler(tokens=8, rows=4, long_after=None)
    subject.add(stream_of(range(6), max_new_tokens=4))
    asked = []

    def propose(sample, most):
        asked.append(most)
        return list(range(most))

    subject.admit()
    (chunk,) = subject.compose(propose)
    assert chunk.guesses == () and not asked
    subject.computed(chunk.sample, 6)
    chunk.sample.tokens.append(1)
    (chunk,) = subject.compose(propose)
    assert asked == [2] and chunk.num_rows == 3  # one token is chosen beside them: ten at most
    assert not chunk.tells_prompt


@pytest.mark.parametrize(
    ("tokens", "rows", "long_after", "expected"),
    [(4, 9, None, 3), (9, 4, None, 3), (9, 9, 10, 3), (9, 9, None, 8), (2, 9, None, 1), (1, 9, None, None)],
)
def test_guesses_stay_within_what_a_pass_holds(tokens, rows, long_after, expected):
    subject = scheduler(tokens=tokens, rows=rows, long_after=long_after)
    subject.add(stream_of(range(6), max_new_tokens=40))
    asked = []
    while not subject.running or not subject.running[0].is_decoding:
        run_pass(subject)

    def propose(sample, most):
        asked.append(most)
        return list(range(most))

    (chunk,) = subject.compose(propose)
    assert asked == ([] if expected is None else [expected]) and len(chunk.guesses) == (expected or 0)


def test_a_pass_has_as_many_rows_as_its_limit():
    subject = scheduler(rows=5)
    for first in range(4):
        subject.add(stream_of([first], max_new_tokens=30))
    run_pass(subject)
    chunks = subject.compose(lambda sample, most: [7] * min(most, 2))
    assert [chunk.num_rows for chunk in chunks] == [3, 2]


def test_a_prompt_is_told_once():
    subject = scheduler()
    stream = stream_of(range(8), max_new_tokens=9, prompt_logprobs=True)
    subject.add(stream)
    assert [chunk.tells_prompt for chunk in run_pass(subject)] == [True]
    stream.prompt_logprobs += [None] * 7  # of all tokens but the first
    (sample,) = subject.running
    subject.turned(sample)
    assert [(chunk.num_tokens, chunk.tells_prompt) for chunk in subject.compose(nothing)] == [(9, False)]


def test_a_page_is_found_when_its_last_token_is_computed():
    subject = scheduler()
    subject.add(stream_of(range(40), max_new_tokens=9))
    subject.admit()
    (sample,) = subject.running
    for num_tokens, num_found in ((31, 1), (1, 2)):
        subject.computed(sample, num_tokens)
        found = subject.pool.match(sample.hashes)
        subject.pool.free(found)
        assert len(found) == num_found


def test_shared_pages_count_when_a_request_is_admitted():
    subject = scheduler(num_pages=6)
    for index in range(2):
        subject.add(stream_of([*range(33), index], max_new_tokens=14))  # three pages, the first two alike
    for _ in range(2):
        run_pass(subject)
    run_pass(subject)
    assert len(subject.running) == 2 and subject.pool.num_free == 1


def test_the_first_of_two_long_prompts_ends_first():
    subject = scheduler()
    for first in (100, 200):
        subject.add(stream_of(range(first, first + 70), max_new_tokens=9))
    served = [[(c.sample.tokens[0], c.num_tokens) for c in run_pass(subject)] for _ in range(3)]
    assert served == [[(100, 32)], [(100, 32)], [(100, 6), (200, 26)]]


def test_a_request_may_take_every_page():
    subject = scheduler(num_pages=5)
    subject.add(stream_of([1] * 20, max_new_tokens=44))
    assert [chunk.num_tokens for chunk in run_pass(subject)] == [20] and subject.pool.num_free == 0


def test_repair_admits_nothing_twice_and_frees_the_pages_of_an_interrupted_admission():
    subject = scheduler()
    subject.add(stream_of(range(20), max_new_tokens=4))
    subject.add(stream_of(range(50, 70), max_new_tokens=4))
    subject.running.append(subject.waiting[0])  # as an exception in `admit` leaves it
    subject.pool.allocate(2)
    subject.repair()
    subject.check()
    assert [sample.tokens[0] for sample in subject.running] == [0]
    assert [sample.tokens[0] for sample in subject.waiting] == [50]
    assert subject.pool.num_free == subject.pool.num_usable


def test_lost_pages_are_computed_again_and_no_prefix_is_found_in_them():
    subject = scheduler()
    subject.add(stream_of(range(40), max_new_tokens=9))
    for _ in range(3):
        run_pass(subject)
    (sample,) = subject.running
    subject.pages_lost()
    assert subject.pool.match(sample.hashes) == []
    assert [chunk.num_tokens for chunk in run_pass(subject)] == [32]
    found = subject.pool.match(sample.hashes)
    subject.pool.free(found)
    assert found == sample.table[:2], "what is computed again is found again"


def test_a_prompt_that_was_told_in_part_is_told_from_its_start_once_pages_are_lost():
    subject, stream = scheduler(), stream_of(range(20), max_new_tokens=2, prompt_logprobs=True)
    subject.add(stream)
    run_pass(subject)
    stream.prompt_logprobs += [None] * 8
    subject.pages_lost()
    assert stream.prompt_logprobs == []
    stream.prompt_logprobs += [None] * 19  # all of them
    subject.pages_lost()
    assert len(stream.prompt_logprobs) == 19


def test_a_request_that_waits_can_be_removed():
    subject = scheduler()
    subject.add(stream_of(range(20), max_new_tokens=2))
    subject.remove(subject.waiting[0])
    assert subject.is_idle


def test_books_are_right_whatever_comes():
    chance = random.Random(0)
    subject = scheduler(num_pages=20, tokens=16)
    for _ in range(300):
        if chance.random() < 0.4:
            prompt = [chance.randrange(2)] * chance.randrange(1, 60)
            samples = chance.randrange(1, 4)
            subject.add(stream_of(prompt, max_new_tokens=chance.randrange(1, 30), num_samples=samples))
        if subject.running and chance.random() < 0.1:
            subject.remove(chance.choice(subject.running))
        run_pass(subject)
    while not subject.is_idle:
        run_pass(subject)
    assert subject.pool.num_free == 19
