import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outsize.errors import ConfigError, DataError, ModelError
from outsize.train import data as data_module
from outsize.train.data import Dataset, Position, open_dataset, shuffled, tokenise
from tests.train.standin import WORDS, word_tokenizer, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def open_file(model, path, *, seq_len=4, seed=0):
    return open_dataset(model, path, seq_len=seq_len, seed=seed, spill=path.with_suffix(".bin"))


documents = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=1, max_size=20)


def slow_tokens(documents):
    """Token by token, by hand: word number n is id n + 2, every document ends with id 0."""
    ids = []
    for words in documents:
        for word in words:
            ids.append(int(word[1:]) + 2)
        ids.append(0)
    return ids


@given(
    documents=documents,
    seq_len=st.integers(2, 7),
    batch_size=st.integers(1, 5),
    in_ram=st.sampled_from([5, 1000]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_epoch_holds_every_packed_sequence_once(
    tmp_path, monkeypatch, documents, seq_len, batch_size, in_ram
):
    monkeypatch.setattr(data_module, "TOKENS_IN_RAM", in_ram)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for words in documents))
    tokens, num_tokens = tokenise(path, word_tokenizer(), tmp_path / "spill.bin", vocab_size=64)
    expected = slow_tokens(documents)
    assert num_tokens == len(expected)
    assert isinstance(tokens, Path) == (num_tokens > in_ram)
    if num_tokens < seq_len:
        return
    dataset = Dataset(tokens, num_tokens, seq_len, seed=3)
    sequences = [
        tuple(expected[start : start + seq_len]) for start in range(0, num_tokens - seq_len + 1, seq_len)
    ]
    assert dataset.num_sequences == len(sequences)

    stream, position = [], Position()
    while len(stream) < 2 * len(sequences):
        batch = dataset.batch(position, batch_size)
        assert batch["input_ids"].shape == (batch_size, seq_len)
        assert batch["labels"].equal(batch["input_ids"])
        stream.extend(tuple(row) for row in batch["input_ids"].tolist())
        position = dataset.advance(position, batch_size)
    for epoch in range(2):
        got = stream[epoch * len(sequences) : (epoch + 1) * len(sequences)]
        order = np.random.default_rng([3, epoch]).permutation(len(sequences))
        assert got == [sequences[index] for index in order]
    assert position.epoch * len(sequences) + position.index == len(stream)


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert shuffled(50, 7, 2).tolist() == shuffled(50, 7, 2).tolist()
    assert sorted(shuffled(50, 7, 2)) == list(range(50))
    assert len({tuple(shuffled(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_batch_depends_on_the_position_alone(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS))
    straight, jumped = open_file(model, path), open_file(model, path)
    for index in range(8):
        straight.batch(Position(0, index), 3)
    assert straight.batch(Position(5, 2), 3)["input_ids"].equal(jumped.batch(Position(5, 2), 3)["input_ids"])


def test_plain_text_is_one_document_whatever_its_parts(model, tmp_path, monkeypatch):
    text = "\n".join(" ".join(WORDS[start : start + 5]) for start in range(0, 60, 5))
    path = tmp_path / "text.txt"
    path.write_text(text)
    whole = open_file(model, path).tokens
    monkeypatch.setattr(data_module, "PART_BYTES", 40)
    assert open_file(model, path).tokens.tolist() == whole.tolist() == [*range(2, 62), 0]


def test_character_cut_by_a_part_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "PART_BYTES", 1)
    path = tmp_path / "text.txt"
    path.write_text("zwölf Boxkämpfer 🥊", encoding="utf-8")
    assert "".join(text for text, _ in data_module.read_documents(path)) == "zwölf Boxkämpfer 🥊"


def test_batches_of_the_last_sequences_run_into_the_next_epoch(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[:11]))  # 12 tokens with the last: 3 sequences
    dataset = open_file(model, path)
    assert dataset.num_sequences == 3
    assert dataset.advance(Position(0, 2), 2) == Position(1, 1)
    assert dataset.num_steps(epochs=2, batch_size=2) == 3
    assert dataset.num_steps(epochs=1, batch_size=100) == 1
    assert dataset.batch(Position(0, 1), 100)["input_ids"].shape == (100, 4)


GOOD = '{"text": "w1 w2 w3 w4 w5"}\n'
BAD_LINES = {
    "not json": (GOOD + "\n" + "{oops}\n", ":3: not JSON"),
    "cut off": (GOOD + '{"text": "w1', ":2: not JSON"),
    "not an object": (GOOD + "[1, 2]\n", ":2: expected a JSON object, found list"),
    "no text": (
        GOOD + '{"prompt": "a", "completion": "b"}\n',
        ':2: no field "text"; fields: completion, prompt',
    ),
    "text no string": (GOOD + '{"text": 5}\n', ':2: "text" is int, expected a string'),
    "surrogate": (GOOD + '{"text": "\\ud800"}\n', ":2:"),
    "only empty texts": ('{"text": ""}\n\n', "holds no text"),
    "nested too deep": (GOOD + "[" * 200_000 + "\n", ":2: not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_malformed_line_is_named(model, tmp_path, name):
    text, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        open_file(model, path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_no_text_are_named_with_their_line(model, tmp_path, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes((GOOD * 2).encode() + b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=rf"bad{suffix}:3: not UTF-8"):
        open_file(model, path)


def test_text_cut_inside_a_character(model, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"w1\nw2\n\xf0\x9f")
    with pytest.raises(DataError, match=r"bad\.txt:3: not UTF-8"):
        open_file(model, path)


def test_missing_empty_and_folder(model, tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*none\.txt"):
        open_file(model, tmp_path / "none.txt")
    with pytest.raises(DataError, match="is not a file"):
        open_file(model, tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        open_file(model, tmp_path / "empty.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        open_file(model, tmp_path / "blank.txt")


def test_text_shorter_than_a_sequence(model, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w1 w2")
    with pytest.raises(DataError, match="3 tokens do not fill one sequence of 4") as caught:
        open_file(model, path)
    assert "--seq-len 3" in caught.value.hint
    assert open_file(model, path, seq_len=3).num_sequences == 1


def test_sequence_longer_than_the_model_allows(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 " * 100)
    with pytest.raises(ConfigError, match="positions end at 32, got 33") as caught:
        open_file(model, path, seq_len=33)
    assert "--seq-len 32" in caught.value.hint
    with pytest.raises(ConfigError, match="leaves nothing to predict"):
        open_file(model, path, seq_len=1)


def test_model_folder_without_what_is_needed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 " * 100)
    with pytest.raises(ModelError, match=r"no config\.json in"):
        open_file(tmp_path / "nowhere", path)
    with pytest.raises(DataError, match="no tokenizer in") as caught:
        open_file(write_model(tmp_path / "bare", tokenizer=False), path)
    assert "tokenizer.json" in caught.value.hint
    broken = write_model(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be opened"):
        open_file(broken, path)
    with pytest.raises(DataError, match="no end-of-text token"):
        open_file(write_model(tmp_path / "endless", eos=None), path)
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_file(broken, path)


def test_tokenizer_of_another_model(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w59")
    with pytest.raises(DataError, match="yields token 61, the model knows 40"):
        open_file(write_model(tmp_path / "small", vocab_size=40), path)
