"""A file of prompts into a file of answers: broken lines, kills, resuming, and what a line may say."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

import outsize
from outsize.errors import BudgetError, ConfigError, DataError, RequestError
from outsize.model import load_tokenizer
from outsize.serve import run_job
from outsize.serve.pipeline import pipeline
from tests.train.families import QWEN3, chat_tokenizer
from tests.train.standin import PlainApi, write_model
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def generate(folder):
    return pipeline(PlainApi().load(folder), tokenizer=load_tokenizer(folder))


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_come_back_alone_in_lists_and_piece_by_piece(generate):
    alone = [generate(prompt, max_new_tokens=6) for prompt in ("w1 w2", "w3")]
    assert generate(["w1 w2", "w3"], max_new_tokens=6) == alone
    assert "".join(generate.stream("w1 w2", max_new_tokens=6)) == alone[0]
    reader = generate.stream("w1 w2", max_new_tokens=6)
    next(reader)
    reader.close()
    assert generate.engine.is_idle
    stop = alone[0].split()[2]
    assert generate("w1 w2", max_new_tokens=6, stop=stop) == alone[0][: alone[0].index(stop)]


def test_a_conversation_is_rendered_by_its_template():
    tokenizer, model = chat_tokenizer(QWEN3), ZOO["qwen3"].build(vocab_size=512, max_position_embeddings=256)
    generate = pipeline(model, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "Is the library open?"}]
    stream = generate.submit(messages, max_new_tokens=3)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(stream.request.prompt) == rendered
    assert generate.submit(rendered, max_new_tokens=3).wait()[0].tokens == stream.wait()[0].tokens


def test_conversations_are_answered_as_texts_are():
    tokenizer, model = chat_tokenizer(QWEN3), ZOO["qwen3"].build(vocab_size=512, max_position_embeddings=256)
    generate = pipeline(model, tokenizer=tokenizer)
    first, second = ([{"role": "user", "content": text}] for text in ("Is it open?", "Hi"))
    rendered = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in (first, second)
    ]
    answers = generate(rendered, max_new_tokens=4)
    assert (
        generate(first, max_new_tokens=4) == answers[0] == "".join(generate.stream(first, max_new_tokens=4))
    )
    assert generate([first, rendered[1]], max_new_tokens=4) == answers
    assert generate((second[0],), max_new_tokens=4) == answers[1]
    assert generate([]) == []
    for wrong in (first[0], [first[0], "Hi"], [[]], [5], [[first[0], 5]]):
        with pytest.raises(RequestError, match="expected a text or a list of messages") as caught:
            generate(wrong)
        assert "[{" in caught.value.hint


def test_tool_calls_are_rendered_alike_in_both_formats():
    tokenizer, model = chat_tokenizer(QWEN3), ZOO["qwen3"].build(vocab_size=512, max_position_embeddings=512)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}{{ m.content or '' }}{% for t in m.tool_calls or [] %}"
        "{{ t.function.name + ' ' + (t.function.arguments | tojson) }}{% endfor %}\n{% endfor %}"
    )
    generate = pipeline(model, tokenizer=tokenizer)

    def prompt(arguments):
        call = {"type": "function", "function": {"name": "hours", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "open?", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return tokenizer.decode(generate.submit(messages, max_new_tokens=1).request.prompt)

    assert prompt('{"day": "Sunday"}') == prompt({"day": "Sunday"})
    assert 'hours {"day": "Sunday"}' in prompt('{"day": "Sunday"}')
    with pytest.raises(RequestError, match="message 2: the arguments of tool call 1 are not JSON"):
        prompt("{day")


def test_one_prompt_that_cannot_be_served_leaves_nothing_behind(generate):
    with pytest.raises(RequestError, match="32 positions"):
        generate(["w1", "w1 " * 40])
    assert generate.engine.is_idle


def test_settings_that_are_none(generate, folder):
    with pytest.raises(ConfigError, match="top_x: no such setting"):
        generate("w1", top_x=1)
    with pytest.raises(ConfigError, match="wrong type"):
        generate("w1", temperature="hot")
    with pytest.raises(RequestError, match="cannot be rendered"):
        generate.submit([{"role": "user", "content": "hello"}])
    with pytest.raises(ConfigError, match="without its tokenizer"):
        outsize.pipeline(PlainApi().load(folder))


def test_a_folder_is_opened_within_budgets(folder, tmp_path, generate):
    streamed = outsize.pipeline(
        folder, disk=tmp_path, home="disk", host="4GiB", dtype="float32", kv="64KiB", pass_tokens=16
    )
    assert streamed("w1 w2 w3", max_new_tokens=4, logprobs=1) == generate("w1 w2 w3", max_new_tokens=4)
    report = outsize.report(streamed.engine.runner.model)
    assert report.host_budget_bytes == 4 << 30 and report.bytes_read > 0
    assert any(row.tier == "disk" and row.num_bytes for row in report.rows)
    assert streamed.engine.runner.kv.num_bytes <= 80 << 10 and streamed.engine.runner.pass_tokens == 16
    with pytest.raises(BudgetError, match="does not fit"):
        outsize.pipeline(folder, disk=tmp_path, host="300MiB", dtype="float32")
    with pytest.raises(DataError, match="no tokenizer"):
        outsize.pipeline(write_model(tmp_path / "bare", tokenizer=False))


def test_each_line_is_answered_by_its_own_settings(generate, tmp_path):
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "w1 w2", "id": "a"},
        "",
        {"prompt": "w1 w2", "max_new_tokens": 2, "num_samples": 2, "temperature": 1.0, "logprobs": 1},
        {"prompt": "w1 " * 40},
        {"prompt": "w1", "top_p": 7},
        {"prompt": "w1", "stop": 5},
    )
    told = []
    progress = run_job(generate, prompts, tmp_path / "out.jsonl", {"max_new_tokens": 5}, told.append)
    by_line = {answer["line"]: answer for answer in answers(tmp_path / "out.jsonl")}
    assert sorted(by_line) == [1, 3, 4, 5, 6]
    assert by_line[1]["id"] == "a" and by_line[1]["samples"][0]["text"] == generate("w1 w2", max_new_tokens=5)
    assert [len(sample["tokens"]) for sample in by_line[3]["samples"]] == [2, 2]
    assert len(by_line[3]["samples"][0]["logprobs"]) == 2
    assert "40 tokens, the model 32 positions" in by_line[4]["error"]
    assert "top_p: 7" in by_line[5]["error"] and "wrong type" in by_line[6]["error"]
    assert (progress.num_done, progress.num_failed, progress.num_prompts) == (5, 3, 5)
    assert [one.num_done for one in told] == [1, 2, 3, 4, 5, 5] and told[-1].num_tokens == 9


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "prompts.jsonl:2: no JSON"),
        ("[1]", "prompts.jsonl:2: a list, not an object"),
        ({"text": "w1"}, "prompts.jsonl:2: neither"),
        ({"prompt": 3}, "prompts.jsonl:2: neither"),
        ({"prompt": "w1", "messages": []}, "prompts.jsonl:2: neither"),
        ("\udcff".encode(errors="surrogateescape").decode("latin1"), "prompts.jsonl:2: no JSON"),
    ],
)
def test_a_broken_line_is_named_before_anything_is_computed(generate, tmp_path, line, words):
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "w1"}, line)
    with pytest.raises(DataError, match=words):
        run_job(generate, prompts, tmp_path / "out.jsonl", {})
    assert not (tmp_path / "out.jsonl").exists()


class Breaks:
    """A pipeline whose engine fails in pass `at`, once."""

    def __init__(self, generate, at):
        self.generate, self.at, self.engine = generate, at, generate.engine

    def __enter__(self):
        self.handle = self.engine.runner.model.register_forward_pre_hook(self.hook)
        return self.generate

    def hook(self, *_):
        self.at -= 1
        if self.at == 0:
            raise OSError(5, "Input/output error")

    def __exit__(self, *_):
        self.handle.remove()


def test_errors_are_tried_again(generate, tmp_path):
    """A prompt that was too long, one beyond the model's tokens, and those of a pass that failed."""
    lines = [{"prompt": f"w{i}"} for i in range(4)] + [
        {"prompt": "w1 " * 40},
        {"prompt": "w1 w2", "id": "\ud800"},
    ]
    prompts, out = write(tmp_path / "p.jsonl", *lines), tmp_path / "out.jsonl"
    settings = {"max_new_tokens": 3}
    with Breaks(generate, 2) as broken:
        progress = run_job(broken, prompts, out, settings)
    failed = {answer["line"]: answer["error"] for answer in answers(out) if "error" in answer}
    assert progress.num_done == 6 and progress.num_failed == len(failed) == 6
    assert "positions" in failed.pop(5) and all("Input/output error" in text for text in failed.values())
    generate.engine.check()
    out.chmod(0o600)
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    progress = run_job(generate, prompts, link, settings)
    assert (progress.num_before, progress.num_done, progress.num_failed) == (0, 6, 1)
    assert sorted(answer["line"] for answer in answers(out)) == [1, 2, 3, 4, 5, 6]
    assert [answer["line"] for answer in answers(out) if "error" in answer] == [5]
    assert link.is_symlink() and out.stat().st_mode & 0o777 == 0o600
    progress = run_job(generate, prompts, out, settings)
    assert (progress.num_before, progress.num_failed) == (5, 1)  # the file has an error still
    lines[4] = {"prompt": "w1"}  # mended, which is no other prompt than the one that was answered
    progress = run_job(generate, write(prompts, *lines), out, settings)
    assert (progress.num_before, progress.num_done, progress.num_failed) == (5, 6, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl", "p.jsonl"]


def test_what_is_answered_is_not_answered_again(generate, tmp_path):
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"w{i}"} for i in range(5)))
    out = tmp_path / "out.jsonl"
    run_job(generate, prompts, out, {"max_new_tokens": 3})
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n", 200) - 7])  # cut inside a line
    num_kept = out.read_bytes().count(b"\n")
    progress = run_job(generate, prompts, out, {"max_new_tokens": 3})
    assert progress.num_before == num_kept < 5
    assert sorted(answer["line"] for answer in answers(out)) == [1, 2, 3, 4, 5]
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_answers_that_cannot_be_written_are_named(generate, tmp_path, monkeypatch):
    """A full disk; the next run goes on where this one stopped."""
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "w1"}, {"prompt": "w2"})
    out = tmp_path / "out.jsonl"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"No space left on device: .*out\.jsonl"),
    ):
        patch.setattr(os, "fsync", full)
        run_job(generate, prompts, out, {"max_new_tokens": 2})
    assert run_job(generate, prompts, out, {"max_new_tokens": 2}).num_failed == 0
    assert sorted(answer["line"] for answer in answers(out)) == [1, 2]


def test_answers_to_other_prompts_are_left_alone(generate, tmp_path):
    out = tmp_path / "out.jsonl"
    run_job(generate, write(tmp_path / "p.jsonl", {"prompt": "w1"}), out, {})
    before = out.read_bytes()
    with pytest.raises(DataError, match="answers a line 1"):
        run_job(generate, write(tmp_path / "q.jsonl", {"prompt": "w2"}), out, {})
    with pytest.raises(DataError, match="no answer of a job"):
        run_job(generate, tmp_path / "q.jsonl", write(tmp_path / "notes.txt", "hello"), {})
    assert out.read_bytes() == before


def test_a_job_that_is_killed_goes_on_and_answers_each_prompt_once(folder, tmp_path, generate):
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"w{i % 30} w2"} for i in range(40)))
    out = tmp_path / "out.jsonl"
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from outsize.model import load_tokenizer
        from outsize.serve import job
        from outsize.serve.pipeline import pipeline
        from tests.train.standin import PlainApi

        def tell(progress):
            if progress.num_done == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        folder = Path({str(folder)!r})
        generate = pipeline(PlainApi().load(folder), tokenizer=load_tokenizer(folder))
        job.MOST_UNDER_WAY = 4
        job.run_job(generate, Path({str(prompts)!r}), Path({str(out)!r}), {{"max_new_tokens": 8}}, tell)
    """)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert len(answers(out)) == 7
    progress = run_job(generate, prompts, out, {"max_new_tokens": 8})
    assert (progress.num_before, progress.num_done) == (7, 40)
    assert sorted(answer["line"] for answer in answers(out)) == list(range(1, 41))
