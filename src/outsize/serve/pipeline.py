"""Texts in, texts out: an engine that lives as long as this process, and its tokenizer.

generate = outsize.pipeline("path/to/model", host="8GiB", disk="/nvme/scratch")
generate("The plan for today:", max_new_tokens=50)                          one text
generate(["One prompt", "another"], temperature=0.8, seed=1)                a list, computed together
generate([{"role": "user", "content": "Is it open?"}])                      the answer in a conversation
for piece in generate.stream("Once upon a time"): print(piece, end="")      as it comes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Unpack, cast, overload

from torch import nn

from outsize.engine.api import Options, load, settings_of, spells_out
from outsize.errors import ConfigError, RequestError, in_short
from outsize.model import load_tokenizer, messages_for_template
from outsize.plan.profile import Profile
from outsize.serve.engine import Serves, closing_of, open_engine
from outsize.serve.request import Request, Sampling, Stream, Token
from outsize.serve.runner import Concurrency

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or messages of a conversation, which are rendered by the tokenizer's template."""

_SAMPLING = frozenset(field.name for field in fields(Sampling))
_REQUEST = frozenset(field.name for field in fields(Request)) - {"prompt", "sampling"}
SETTINGS = _SAMPLING | _REQUEST
"""What can be said of a prompt, by name: the fields of `Sampling` and `Request`."""


@spells_out(settings_of)
def pipeline(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    kv: str | int | None = None,
    pass_tokens: int | None = None,
    deterministic: bool = False,
    draft: str | Path | nn.Module | None = None,
    weights: str | None = None,
    attention: str | None = None,
    profile: Profile | None = None,
    concurrency: Concurrency | None = None,
    **options: Unpack[Options],
) -> Pipeline:
    """Open a folder for generating text, within the budgets of `load`; or take a model that is open, and its tokenizer.

    `kv`: memory of the KV cache, such as "2GiB"; else a quarter of what is free. `pass_tokens`: tokens that go through
    the model at once, at most. `deterministic`: tokens and log-probabilities have the same bits whatever else runs, slower.
    `draft`: a smaller model of the same tokens (a folder, or open), which guesses ahead and changes nothing in the output.
    `concurrency`: the most sequences at once, and tokens of each, where known: memory is planned for them alone.
    `weights`: "int4" or "int8" for matrices in few bits, of the model and not of the draft.

    Raises what `load` raises, and DataError where the folder has no tokenizer.
    """
    if isinstance(model, nn.Module) and tokenizer is None:
        raise ConfigError("an open model comes without its tokenizer", hint="pass tokenizer=")
    if not isinstance(model, nn.Module):
        tokenizer = tokenizer or load_tokenizer(Path(model))

    def opened(what: str | Path | nn.Module, weights: str | None) -> nn.Module:
        if isinstance(what, nn.Module):
            return what
        module = load(what, weights=weights, attention=attention, profile=profile, **options)
        return module.requires_grad_(False)  # no memory for gradients

    engine = open_engine(
        opened(model, weights),
        tokenizer,
        kv=kv,
        pass_tokens=pass_tokens,
        deterministic=deterministic,
        draft=None if draft is None else opened(draft, None),
        concurrency=concurrency,
    )
    return Pipeline(engine, tokenizer)


class Pipeline:
    """An engine and a tokenizer."""

    def __init__(self, engine: Serves, tokenizer: Any) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    @overload
    def __call__(self, prompts: Prompt, **settings: Any) -> str: ...
    @overload
    def __call__(self, prompts: Sequence[Prompt], **settings: Any) -> list[str]: ...
    def __call__(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> str | list[str]:
        """The continuation of a text or conversation, or of each in a list (the first, of several samples).

        `settings` are those of `submit`, which also says what is raised.
        """
        is_one = _is_prompt(prompts)
        streams: list[Stream] = []
        try:
            for prompt in [prompts] if is_one else prompts:
                streams.append(self.submit(cast(Prompt, prompt), **settings))
            texts = [stream.wait()[0].text for stream in streams]
        finally:
            for stream in streams:
                if not stream.is_finished:
                    self.engine.cancel(stream)
        return texts[0] if is_one else texts

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """The continuation of one prompt, piece by piece; the request is cancelled where the iterator is dropped."""
        with closing_of(self.engine, self.submit(prompt, **settings)) as stream:
            num_given = 0
            for _ in stream:
                text = stream.completions[0].text
                if len(text) > num_given:
                    yield text[num_given:]
                    num_given = len(text)

    def submit(
        self, prompt: Prompt, *, watch: Callable[[Token], None] | None = None, **settings: Any
    ) -> Stream:
        """Queue one prompt. `settings`: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`,
        `max_new_tokens`, `num_samples`, `stop`, `logprobs`, `prompt_logprobs`.

        Raises ConfigError for a setting that cannot be, RequestError for a prompt that cannot be served.
        """
        return self.engine.submit(request_of(self.tokenizer, prompt, settings), watch)


def _is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is one prompt: a text, or the messages of one conversation. An empty list holds no prompt."""
    if isinstance(prompts, str | Mapping):
        return True
    return len(prompts) > 0 and all(isinstance(prompt, Mapping) for prompt in prompts)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """The tokens of a conversation, up to where the assistant answers. Raises RequestError."""
    hint = 'pass a text, or a list of messages such as [{"role": "user", "content": "..."}]'
    is_list = isinstance(messages, Sequence) and len(messages) > 0
    if not (is_list and all(isinstance(message, Mapping) for message in messages)):
        raise RequestError(
            f"the prompt is {repr(messages)[:60]}, expected a text or a list of messages", hint=hint
        )
    # As in training: a field that is null is not there.
    plain = [{name: value for name, value in one.items() if value is not None} for one in messages]
    try:
        conversation = messages_for_template(tokenizer, plain)
    except ValueError as error:
        raise RequestError(
            f"the messages cannot be rendered: {error}",
            hint='arguments are an object such as {"city": "Rome"}, or the JSON text of one',
        ) from error
    try:
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates raise errors of any kind
        raise RequestError(f"the messages cannot be rendered: {in_short(error)}", hint=hint) from error
    return cast(Sequence[int], encoded["input_ids"])


def request_of(tokenizer: Any, prompt: Prompt, settings: Mapping[str, Any]) -> Request:
    """The request for a prompt. Raises ConfigError naming a setting that is unknown or malformed, or RequestError."""
    if unknown := sorted(settings.keys() - SETTINGS):
        raise ConfigError(f"{unknown[0]}: no such setting", hint=f"known are {', '.join(sorted(SETTINGS))}")
    if isinstance(prompt, str):
        try:
            tokens = tokenizer(prompt)["input_ids"]
        except Exception as error:  # half a surrogate pair, for example
            raise RequestError(
                f"the prompt cannot be tokenized: {in_short(error)}", hint="pass text that UTF-8 can encode"
            ) from error
    else:
        tokens = _rendered(tokenizer, prompt)
    stop = settings.get("stop", ())
    given = {**settings, "stop": (stop,) if isinstance(stop, str) else stop}
    sampling = Sampling(**{name: given[name] for name in given.keys() & _SAMPLING})
    return Request(tuple(tokens), sampling, **{name: given[name] for name in given.keys() & _REQUEST})
