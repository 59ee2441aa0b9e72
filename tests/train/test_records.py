"""Files as records and tokens: every kind, and everything that can be wrong with one, named with its line."""

import json
import shlex
from pathlib import Path

import pytest

from outsize.errors import ConfigError, DataError, ModelError, StorageError
from outsize.train.data import DataFile, DataOptions, Packing, TooLong, open_dataset, records, tokens
from outsize.train.data.records import read_records
from tests.train.families import FAMILIES, chat_tokenizer
from tests.train.standin import WORDS, word_tokenizer, write_model

GOOD = '{"text": "w1 w2 w3 w4 w5"}\n'
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("chat"), vocab_size=500, tokenizer=False, positions=256)
    chat_tokenizer(FAMILIES["chatml"][0]).save_pretrained(folder)
    return folder


def opened(model, path, **options):
    return open_dataset(model, [DataFile(path)], DataOptions(**({"seq_len": 8} | options)))


def all_ids(dataset):
    return [source.tokens.read(0, source.tokens.num_tokens)[0].tolist() for source in dataset.sources]


def test_plain_text_is_one_document_whatever_its_parts(model, tmp_path, monkeypatch):
    text = "\n".join(" ".join(WORDS[start : start + 5]) for start in range(0, 60, 5))
    for number, part_bytes in enumerate([1 << 20, 40]):
        monkeypatch.setattr(records, "PART_BYTES", part_bytes)
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        dataset = opened(model, path)
        assert all_ids(dataset) == [[*range(2, 62), 0]]
        assert dataset.sources[0].tokens.num_examples == 1


def test_a_character_cut_by_a_part_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 1)
    path = tmp_path / "text.txt"
    path.write_text("zwölf Boxkämpfer 🥊", encoding="utf-8")
    got = list(read_records(path))
    assert "".join(record.fields["text"] for record in got) == "zwölf Boxkämpfer 🥊"
    assert [record.continues for record in got] == [True] * (len(got) - 1) + [False]


def rows():
    return [{"text": "w1 w2"}, {"text": "w3"}, {"text": "w4 w5 w6"}]


def as_json_lines(path):
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path.with_suffix(".jsonl")


def as_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist(rows()), path.with_suffix(".parquet")
    )
    return path.with_suffix(".parquet")


def as_datasets(path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows()).save_to_disk(path)
    return path


@pytest.mark.parametrize("write", [as_json_lines, as_parquet, as_datasets])
def test_every_kind_of_file_gives_the_same_tokens(model, tmp_path, write):
    dataset = opened(model, write(tmp_path / "data"))
    assert all_ids(dataset) == [[3, 4, 0, 5, 0, 6, 7, 8, 0]]
    assert dataset.sources[0].tokens.starts.tolist() == [0, 3, 5, 9]


@pytest.mark.parametrize("write", [as_parquet, as_datasets])
def test_conversations_in_tables_have_no_nulls(tmp_path, write, monkeypatch):
    """A table fills fields that only some messages have."""
    messages = [
        {"role": "user", "content": "a", "name": "x"},
        {"role": "assistant", "content": "b", "tool_calls": [{"id": "1"}]},
    ]
    monkeypatch.setitem(globals(), "rows", lambda: [{"messages": messages}])
    assert [dict(record.fields) for record in read_records(write(tmp_path / "data"))] == [
        {"messages": messages}
    ]


def test_lines_that_were_a_table_have_no_nulls(model, tmp_path):
    """Whatever wrote a table as lines gave each a field for every column."""
    lines = [{"text": "w1 w2", "messages": None, "prompt": None}, {"text": "w3", "completion": None}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all_ids(opened(model, tmp_path / "data.jsonl")) == [[3, 4, 0, 5, 0]]


def test_nulls_in_messages_are_left_out_and_nulls_in_arguments_are_values(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": None}}}
    messages = [
        {"role": "user", "content": "what", "name": None, "tool_calls": None, "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    folder = write_model(tmp_path / "model", vocab_size=500, tokenizer=False, positions=256)
    chat_tokenizer(template).save_pretrained(folder)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    dataset = opened(folder, path, seq_len=256)
    text = chat_tokenizer(template).decode(all_ids(dataset)[0])
    expected = [{"role": "user", "content": "what"}, {"role": "assistant", "tool_calls": [call]}]
    assert text == "".join(json.dumps(message) for message in expected)


@pytest.mark.parametrize("text", ["w1 w2", "\r\nw1 w2"])
def test_a_byte_order_mark_is_not_part_of_a_text(model, tmp_path, monkeypatch, text):
    for number, part_bytes in enumerate([1 << 20, 1]):
        monkeypatch.setattr(records, "PART_BYTES", part_bytes)
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8-sig", newline="")
        assert "".join(record.fields["text"] for record in read_records(path)) == text


@pytest.mark.parametrize("name", ["it's.csv", "t.TSV", "t.csv.gz", "t.zip", "t.jsonl.zst"])
def test_tables_of_text_and_archives_are_refused_by_name(model, tmp_path, name):
    (tmp_path / name).write_text("text\nw1\n")
    with pytest.raises(DataError, match="files are not read") as caught:
        opened(model, tmp_path / name)
    assert str(tmp_path / name) in caught.value.message and name in caught.value.hint.replace("'\"'\"'", "'")


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_the_hint_for_a_table_of_text_works(model, tmp_path, delimiter, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"a b's{'.csv' if delimiter == ',' else '.tsv'}"
    path.write_text(f'prompt{delimiter}completion\n"w1\nw2 "{delimiter}w3\n')
    with pytest.raises(DataError) as caught:
        opened(model, path)
    python, option, program = shlex.split(caught.value.hint.partition(": ")[2])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    assert all_ids(opened(model, Path(f"{path}.jsonl"))) == [[3, 4, 5, 0]]


def test_a_document_begins_as_the_tokenizer_begins_texts(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 1)]
    )
    folder = write_model(tmp_path / "model", tokenizer=False)
    tokenizer.save_pretrained(folder)
    (tmp_path / "t.jsonl").write_text(GOOD + '{"text": "w9"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "w1 ", "completion": "w2"}\n')
    assert all_ids(opened(folder, tmp_path / "t.jsonl")) == [[1, 3, 4, 5, 6, 7, 0, 1, 11, 0]]
    dataset = opened(folder, tmp_path / "c.jsonl")
    ids, learned = dataset.sources[0].tokens.read(0, 4)
    assert ids.tolist() == [1, 3, 4, 0] and learned.tolist() == [False, False, True, True]


BAD_LINES = {
    "not json": (GOOD + "\n" + "{oops}\n", ":3: not JSON"),
    "cut off": (GOOD + '{"text": "w1', ":2: not JSON"),
    "cut off before a name": ('{"text": "w1",\n' + GOOD, ":1: not JSON"),
    "a key that is there twice": (
        GOOD + '{"text": "w1", "id": {"a": 1, "b": 2, "a": 1}}\n',
        ':2: "a" is there 2 times in one object',
    ),
    "all fields null": (GOOD + '{"text": null}\n', ":2: none of the fields that are needed; there are: none"),
    "not an object": (GOOD + "[1, 2]\n", ":2: expected a JSON object, found list"),
    "no field": (GOOD + '{"body": "a"}\n', ":2: none of the fields that are needed; there are: body"),
    "another layout": (
        GOOD + '{"prompt": "a", "completion": "b"}\n',
        ":2: has prompt and completion, the lines before it text",
    ),
    "text no string": (GOOD + '{"text": 5}\n', ':2: "text" is int, expected a string'),
    "surrogate": (GOOD + '{"text": "\\ud800"}\n', ':2: "text" holds half a surrogate pair'),
    "only empty texts": ('{"text": ""}\n\n', "holds no text"),
    "a number too long": (
        GOOD + '{"text": "w1", "id": ' + "9" * 5000 + "}\n",
        ":2: not JSON that can be read",
    ),
    "nested too deep": (GOOD + "[" * 200_000 + "\n", ":2: not JSON"),
    "empty completion": ('{"prompt": "w1", "completion": ""}\n', ':1: the "completion" is empty'),
    "completion no string": ('{"prompt": "w1", "completion": 3}\n', ':1: "completion" is int'),
    "no template": (
        json.dumps({"messages": CHAT}) + "\n",
        ":1: the record is a conversation, and the tokenizer has no",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named(model, tmp_path, name, own_token_cache):
    text, message = BAD_LINES[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        opened(model, path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert caught.value.hint
    assert not list(own_token_cache.iterdir()), "something half-written was left"


def test_a_line_cut_short_is_named_with_the_column_where_it_ends(model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD + '{"text": "w1",\n' + GOOD)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON \(.*, column 1[45]\)"):
        opened(model, path)


@pytest.mark.parametrize(
    "text", ['[\n{"text": "a"}\n]\n', '{\n"text": "a"\n}\n', '[{"text": "a"},\n{"text": "b"}]']
)
def test_one_value_over_many_lines_is_told_how_to_become_lines(model, tmp_path, text):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"list\.json:1: not JSON") as caught:
        opened(model, path)
    assert "jq -c '.[]'" in caught.value.hint


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bytes_that_are_no_text_are_named_with_their_line(model, tmp_path, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes((GOOD * 2).encode() + b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=rf"bad{suffix}:3: not UTF-8"):
        opened(model, path)


def test_text_cut_inside_a_character(model, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"w1\nw2\n\xf0\x9f")
    with pytest.raises(DataError, match=r"bad\.txt:3: not UTF-8"):
        opened(model, path)


def test_a_parquet_file_that_is_cut_off(model, tmp_path):
    path = as_parquet(tmp_path / "data")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"data\.parquet: row 1"):
        opened(model, path)


def test_missing_empty_and_folders(model, tmp_path):
    with pytest.raises(DataError, match=r"no such file: .*none\.txt"):
        opened(model, tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder, but not one that datasets saved"):
        opened(model, tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        opened(model, tmp_path / "empty.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        opened(model, tmp_path / "blank.txt")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="holds several splits") as caught:
        opened(model, tmp_path)
    assert "train" in caught.value.hint


def test_a_sequence_longer_than_the_model_allows(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 " * 100)
    with pytest.raises(ConfigError, match="positions end at 32, got 33") as caught:
        opened(model, path, seq_len=33)
    assert "--seq-len 32" in caught.value.hint
    with pytest.raises(ConfigError, match="leaves nothing to predict"):
        opened(model, path, seq_len=1)


def test_a_conversation_longer_than_a_sequence(chat_model, tmp_path):
    path = tmp_path / "chat.jsonl"
    long = [CHAT[0], {"role": "assistant", "content": "one two three " * 20}]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (CHAT, long, CHAT)))
    with pytest.raises(
        DataError, match=r"chat\.jsonl:2: \d+ tokens do not fit into a sequence of 64; 1 of 3"
    ) as caught:
        opened(chat_model, path, seq_len=64)
    needed = int(caught.value.hint.split("--seq-len ")[1].split(",")[0])
    assert opened(chat_model, path, seq_len=needed).sources[0].packed.stops.max() > 0
    skipped = opened(chat_model, path, seq_len=64, too_long=TooLong.SKIP).sources[0].packed
    cut = opened(chat_model, path, seq_len=64, too_long=TooLong.CUT).sources[0].packed
    assert len(skipped.starts) == 2 and len(cut.starts) == 3
    assert (cut.stops - cut.starts).max() == 64


def test_what_is_cut_off_must_leave_something_to_learn(chat_model, tmp_path):
    path = tmp_path / "chat.jsonl"
    late = [{"role": "user", "content": "one two three " * 20}, CHAT[1]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (CHAT, late)))
    assert len(opened(chat_model, path, seq_len=64, too_long=TooLong.CUT).sources[0].packed.starts) == 1


def test_a_model_folder_without_what_is_needed(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 " * 100)
    with pytest.raises(ModelError, match="nowhere"):
        opened(tmp_path / "nowhere", path)
    with pytest.raises(DataError, match="no tokenizer in") as caught:
        opened(write_model(tmp_path / "bare", tokenizer=False), path)
    assert "tokenizer.json" in caught.value.hint
    broken = write_model(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be opened"):
        opened(broken, path)
    with pytest.raises(DataError, match="no end-of-text token"):
        opened(write_model(tmp_path / "endless", eos=None), path)
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError):
        opened(broken, path)


def test_a_tokenizer_of_another_model(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w59")
    with pytest.raises(DataError, match="yields token 61, the model knows 40"):
        opened(write_model(tmp_path / "small", vocab_size=40), path)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_again_when_the_file_changes(model, tmp_path, monkeypatch):
    made = []
    real = tokens._write
    monkeypatch.setattr(tokens, "_write", lambda *args: (made.append(1), real(*args)))
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3")
    assert all_ids(opened(model, path)) == all_ids(opened(model, path, seq_len=4)) == [[3, 4, 5, 0]]
    assert len(made) == 1
    path.write_text("w1 w2 w4 w4")
    assert all_ids(opened(model, path)) == [[3, 4, 6, 6, 0]]
    assert len(made) == 2


def test_tokens_are_made_again_for_another_tokenizer(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w1")
    folder = write_model(tmp_path / "model")
    assert all_ids(opened(folder, path)) == [[3, 0]]
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w1": 3', '"w1": 4').replace('"w2": 4', '"w2": 3'))
    assert all_ids(opened(folder, path)) == [[4, 0]]


def test_what_was_not_used_for_long_is_forgotten(model, tmp_path, own_token_cache):
    import os

    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for path in paths:
        path.write_text("w1")
    opened(model, paths[0])
    [first] = own_token_cache.iterdir()
    os.utime(first, (0, 0))
    opened(model, paths[1])
    assert not first.exists() and len(list(own_token_cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "file")
    (tmp_path / "t.txt").write_text("w1")
    with pytest.raises(StorageError) as caught:
        opened(model, tmp_path / "t.txt")
    assert "OUTSIZE_CACHE" in caught.value.hint


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_file_that_may_not_be_read_is_named_and_not_the_cache(model, tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text(GOOD)
    plain_open = Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return plain_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"{name}: Permission denied") as caught:
        opened(model, path)
    assert caught.value.hint == "pass a file that you may read"


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a.jsonl", "a.jsonl", None), ("a.jsonl@0.5", "a.jsonl", 0.5), ("me@home.txt", "me@home.txt", None)],
)
def test_a_file_and_its_weight(text, path, weight):
    assert DataFile.parse(text) == DataFile(Path(path), weight)
    assert str(DataFile.parse(text)) == text


@pytest.mark.parametrize("text", ["a@0", "a@-1", "a@inf"])
def test_a_weight_that_cannot_be(text):
    with pytest.raises(ConfigError, match="is not positive"):
        DataFile.parse(text)


def test_packing_is_refused_where_documents_would_mix(tmp_path):
    from transformers import MptConfig

    folder = tmp_path / "mpt"
    MptConfig(
        vocab_size=64, d_model=16, n_layers=2, n_heads=2, max_seq_len=32, architectures=["MptForCausalLM"]
    ).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (tmp_path / "t.txt").write_text("w1 w2 w3")
    assert opened(folder, tmp_path / "t.txt").packing is Packing.PADDED
    with pytest.raises(ConfigError, match="does not keep packed documents apart"):
        opened(folder, tmp_path / "t.txt", packing=Packing.PACKED)
