"""Sequences and batches, against slow implementations written row by row."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BltConfig

from outsize.errors import ConfigError, DataError
from outsize.train.data import Dataset, Packing, Position, Source, TooLong, shuffled
from outsize.train.data.apart import keeps_apart
from outsize.train.data.pack import pack
from tests.zoo import ZOO, seeded


@dataclass(frozen=True)
class Held:
    """Tokens in memory, with the interface of those on disk."""

    examples: tuple[tuple[tuple[int, bool], ...], ...]
    may_be_cut: bool
    source: Path = Path("held")

    @property
    def starts(self):
        return np.cumsum([0, *map(len, self.examples)]).astype(np.int64)

    @property
    def numbers(self):
        return np.arange(1, len(self.examples) + 1)

    @property
    def num_tokens(self):
        return int(self.starts[-1])

    @property
    def num_examples(self):
        return len(self.examples)

    num_learned = 0

    def read(self, start, stop):
        flat = [token for example in self.examples for token in example][start:stop]
        return (
            np.array([token for token, _ in flat], dtype=np.uint32),
            np.array([learned for _, learned in flat], dtype=np.bool_),
        )

    def place(self, example):
        return f"held:{example + 1}"


@st.composite
def held(draw, may_be_cut):
    """Every token of all examples is different, so that a batch tells where each came from."""
    lengths = draw(st.lists(st.integers(2, 14), min_size=1, max_size=15))
    examples, at = [], 1
    for length in lengths:
        learned = (
            [True] * length if may_be_cut else draw(st.lists(st.booleans(), min_size=length, max_size=length))
        )
        learned[-1] = True
        examples.append(tuple(zip(range(at, at + length), learned, strict=True)))
        at += length
    return Held(tuple(examples), may_be_cut)


def dataset_of(tokens, seq_len, packing, **options):
    packed = pack(tokens, seq_len, packing, TooLong.CUT)
    return Dataset([Source(tokens, packed)], seq_len, packing, pad_id=0, **options)


def slow_sequences(tokens, seq_len, packing):
    """The pieces of every sequence, as lists of (token, learned): documents are cut, conversations whole."""
    if packing is Packing.PADDED and tokens.may_be_cut:
        return [
            [list(e[i : i + seq_len])]
            for e in tokens.examples
            for i in range(0, len(e), seq_len)
            if len(e) - i > 1
        ]
    sequences, room = [[]], seq_len
    for example in tokens.examples:
        rest = list(example)
        while rest:
            sequences[-1].append(rest[:room])
            rest, room = rest[room:], room - len(rest[:room])
            if room == 0:
                sequences.append([])
                room = seq_len
    return [s for s in sequences if any(len(piece) > 1 for piece in s)]


def slow_rows(pieces, seq_len, packing):
    """One row of a batch from its pieces, position by position."""
    ids, labels, positions = [], [], []
    for piece in pieces:
        for place, (token, learned) in enumerate(piece):
            ids.append(token)
            labels.append(token if learned and place > 0 else -100)
            positions.append(place)
    mask = [1] * len(ids)
    rest = seq_len - len(ids)
    ids, labels, mask = ids + [0] * rest, labels + [-100] * rest, mask + [0] * rest
    row = {"input_ids": ids, "labels": labels}
    return (
        {**row, "position_ids": positions + list(range(rest))}
        if packing is Packing.PACKED
        else {**row, "attention_mask": mask}
    )


def epoch_rows(dataset, batch_size=3):
    """All rows of the first epoch, read in batches."""
    rows, position = [], Position()
    while len(rows) < dataset.num_sequences:
        batch = dataset.batch(position, batch_size)
        rows += [{key: value[row].tolist() for key, value in batch.items()} for row in range(batch_size)]
        position = dataset.advance(position, batch_size)
    return rows[: dataset.num_sequences]


@given(tokens=held(may_be_cut=True), seq_len=st.integers(2, 9), packing=st.sampled_from(list(Packing)))
@settings(max_examples=150, deadline=None)
def test_documents_fill_sequences_in_order(tokens, seq_len, packing):
    expected = slow_sequences(tokens, seq_len, packing)
    if not expected:
        with pytest.raises(DataError, match="nothing is left"):
            dataset_of(tokens, seq_len, packing, is_shuffled=False)
        return
    dataset = dataset_of(tokens, seq_len, packing, is_shuffled=False)
    assert epoch_rows(dataset) == [slow_rows(pieces, seq_len, packing) for pieces in expected]


@given(tokens=held(may_be_cut=False), seq_len=st.integers(4, 16), packing=st.sampled_from(list(Packing)))
@settings(max_examples=150, deadline=None)
def test_conversations_stay_whole_and_each_comes_once(tokens, seq_len, packing):
    kept = [list(e[:seq_len]) for e in tokens.examples if any(learned for _, learned in e[1:seq_len])]
    if not kept:
        with pytest.raises(DataError, match="nothing is left"):
            dataset_of(tokens, seq_len, packing)
        return
    dataset = dataset_of(tokens, seq_len, packing, is_shuffled=False)
    by_first = {example[0][0]: example for example in kept}
    rows, seen = epoch_rows(dataset), Counter()
    for row in rows:
        pieces, at = [], 0
        while at < seq_len and row["input_ids"][at] != 0:
            piece = by_first[row["input_ids"][at]]
            seen[piece[0][0]] += 1
            pieces.append(piece)
            at += len(piece)
        assert row == slow_rows(pieces, seq_len, packing)
        assert len(pieces) == 1 or packing is Packing.PACKED
    assert seen == Counter(by_first.keys())
    if packing is Packing.PACKED:
        # Best fit leaves no two sequences that would fit into one, but for a last token that holds nothing.
        used = sorted(sum(token != 0 for token in row["input_ids"]) for row in rows)
        assert len(used) < 2 or used[0] + used[1] > seq_len - 2


@given(tokens=held(may_be_cut=True), batch_size=st.integers(1, 5), seed=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_every_sequence_once_in_the_order_of_its_seed(tokens, batch_size, seed):
    dataset = dataset_of(tokens, 4, Packing.PACKED, seed=seed)
    plain = epoch_rows(dataset_of(tokens, 4, Packing.PACKED, is_shuffled=False))
    stream, position = [], Position()
    while len(stream) < 2 * len(plain):
        stream += dataset.batch(position, batch_size)["input_ids"].tolist()
        position = dataset.advance(position, batch_size)
    for epoch in range(2):
        order = np.random.default_rng([seed, epoch]).permutation(len(plain))
        got = stream[epoch * len(plain) : (epoch + 1) * len(plain)]
        assert got == [plain[index]["input_ids"] for index in order]
    assert position.epoch * len(plain) + position.index == len(stream)


def documents(count, length=4, at=1):
    return Held(tuple(tuple((at + n * length + i, True) for i in range(length)) for n in range(count)), True)


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert shuffled(50, 7, 2).tolist() == shuffled(50, 7, 2).tolist()
    assert sorted(shuffled(50, 7, 2)) == list(range(50))
    assert len({tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_batch_depends_on_its_position_alone():
    straight, jumped = (dataset_of(documents(9), 4, Packing.PACKED) for _ in range(2))
    for index in range(8):
        straight.batch(Position(0, index), 3)
    assert straight.batch(Position(5, 2), 3)["input_ids"].equal(jumped.batch(Position(5, 2), 3)["input_ids"])


def mixture(weights, sizes=(12, 4), **options):
    starts = [1, 1000]
    sources = []
    for weight, size, start in zip(weights, sizes, starts, strict=True):
        tokens = documents(size, at=start)
        sources.append(Source(tokens, pack(tokens, 4, Packing.PACKED, TooLong.ERROR), weight))
    return Dataset(sources, 4, Packing.PACKED, 0, **options)


def test_files_without_weights_come_as_they_are():
    counts = Counter(row["input_ids"][0] >= 1000 for row in epoch_rows(mixture((None, None))))
    assert counts == {False: 12, True: 4}


def test_weights_are_the_shares_of_an_epoch_and_no_sequence_is_forgotten():
    dataset = mixture((0.25, 0.75))
    rows, position = [], Position()
    for _ in range(3):
        rows.append(dataset.batch(position, 16)["input_ids"][:, 0].tolist())
        position = dataset.advance(position, 16)
    for epoch in rows:
        small = Counter(first for first in epoch if first >= 1000)
        assert sum(small.values()) == 12 and set(small.values()) == {3}
    large = Counter(first for epoch in rows for first in epoch if first < 1000)
    assert len(large) == 12 and set(large.values()) == {1}, "4 of 12 in each of 3 epochs"


def test_a_part_of_a_file_holds_short_conversations_and_long_ones():
    """Packed, conversations lie by length: the first quarter of the sequences would hold none that is short."""
    chats = Held(tuple(((n, True),) * (8 if n % 2 else 14) for n in range(1, 201)), may_be_cut=False)
    texts = documents(300, length=16, at=1000)
    sources = [
        Source(tokens, pack(tokens, 16, Packing.PACKED, TooLong.ERROR), weight)
        for tokens, weight in ((chats, 0.1), (texts, 0.9))
    ]
    rows = epoch_rows(Dataset(sources, 16, Packing.PACKED, pad_id=0), 50)
    firsts = [row["input_ids"][0] for row in rows if row["input_ids"][0] < 1000]
    assert len(firsts) == 45 and sources[0].packed.num_sequences == 150
    assert len(set(firsts)) == 45 and 5 < sum(n % 2 for n in firsts) < 25


def test_a_weight_that_gives_a_file_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"held: weight 0\.001 gives it none of the 16 sequences") as caught:
        mixture((0.001, 1.0))
    assert caught.value.hint


def test_a_split_takes_its_part_of_every_file():
    training, held_out = mixture((None, None)).split(0.25)
    first = [{row["input_ids"][0] for row in epoch_rows(part)} for part in (training, held_out)]
    assert not first[0] & first[1] and len(first[0] | first[1]) == 16
    assert sum(token >= 1000 for token in first[1]) == 1 and len(first[1]) == 4
    with pytest.raises(DataError, match="too few sequences"):
        mixture((None, None), sizes=(3, 1)).split(0.25)


def test_places_name_the_first_example_of_each_sequence():
    dataset = dataset_of(documents(4), 8, Packing.PACKED, is_shuffled=False)
    assert dataset.places(Position(), 2) == ["held:1", "held:3"]


def test_nothing_fits():
    tokens = Held((tuple((n, True) for n in range(1, 9)),), False)
    with pytest.raises(DataError, match="held:1: 8 tokens do not fit into a sequence of 4"):
        pack(tokens, 4, Packing.PACKED, TooLong.ERROR)
    with pytest.raises(DataError, match="nothing is left"):
        pack(tokens, 4, Packing.PACKED, TooLong.SKIP)


# -- documents in one sequence do not see each other ------------------------------------------------------------------

TEXT = sorted(
    name for name, one in ZOO.items() if set(one.batch()) <= {"input_ids", "labels", "attention_mask"}
)


def logits(model, ids, positions):
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def test_embeddings_of_several_tokens_do_not_keep_documents_apart():
    """BLT hashes each byte with those before it, also over the border of two documents."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BltConfig())
    assert not keeps_apart(model)


@pytest.mark.parametrize("name", TEXT)
def test_where_documents_are_said_to_be_kept_apart_they_are(name):
    with seeded(0):
        model = ZOO[name].build().eval()
    if not keeps_apart(model):
        return
    ids = ZOO[name].batch(rows=2, length=12)["input_ids"]
    ids[1, 5:] = ids[0, 5:]
    assert not ids[0, :5].equal(ids[1, :5])
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    packed = logits(model, ids, positions)[:, 5:]
    alone = logits(model, ids[:1, 5:], torch.arange(7)[None])
    torch.testing.assert_close(packed[0], packed[1])
    torch.testing.assert_close(packed[:1], alone, rtol=1e-4, atol=1e-5)


def test_the_usual_models_keep_documents_apart_and_some_do_not():
    apart = {name for name in TEXT if keeps_apart(ZOO[name].build())}
    assert {"llama", "qwen3", "gemma2", "gemma3", "mistral", "mixtral", "phi", "gpt_neox"} <= apart, apart
    assert not apart & {"bloom", "mpt", "mamba", "t5"}, apart


def test_json_lines_are_what_they_say(tmp_path):
    """The slow path and the real one meet: words as tokens, through files."""
    from outsize.train.data import DataFile, DataOptions, open_dataset
    from tests.train.standin import write_model

    folder = write_model(tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    pairs = [("w1 w2 ", "w3"), ("w4 ", "w5 w6 w7"), ("w8 ", "w9")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    dataset = open_dataset(folder, [DataFile(path)], DataOptions(seq_len=6))
    batch = dataset.batch(Position(), dataset.num_sequences)
    got = sorted(tuple(t for t in row if t != -100) for row in batch["labels"].tolist())
    learned = {5: (5, 0), 7: (7, 8, 9, 0), 11: (11, 0)}
    assert sorted(t for row in got for t in row) == sorted(t for tokens in learned.values() for t in tokens)
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert all(label in (-100, token) for token, label in zip(row, labels, strict=True))


def test_weights_of_files_are_those_of_the_mixture(tmp_path):
    from outsize.train.data import DataFile, DataOptions, open_dataset
    from tests.train.standin import write_model

    folder = write_model(tmp_path / "model")
    for name, words in (("a.txt", 30), ("b.txt", 10)):
        (tmp_path / name).write_text("w1 " * (words * 4 - 1))
    files = [DataFile(tmp_path / "a.txt", 1.0), DataFile(tmp_path / "b.txt", 3.0)]
    assert open_dataset(folder, files, DataOptions(seq_len=4)).shares == [10, 30]
