"""One request at a time, by the model's own `generate`: for models that cannot run over pages.

Tokens are chosen by the same function as in the engine, as a processor of `generate`'s scores, so seeds, filters, stop
texts and log-probabilities mean the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from outsize.engine.runtime import find_runtime
from outsize.errors import UsageError
from outsize.serve.answer import Answer, end_tokens, num_tokens
from outsize.serve.request import Finish, Request, Stream, Token


class SingleEngine:
    """Serves requests in the order of their coming."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        runtime = find_runtime(model)
        self._model: Any = model
        self._device = next(model.parameters()).device if runtime is None else runtime.model.torch_device
        self._tokenizer = tokenizer
        self._ends = end_tokens(model)
        config = cast(Any, model).config.get_text_config(decoder=True)
        self._most_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary = num_tokens(model)
        self._waiting: deque[tuple[Stream, Answer]] = deque()
        self._lock = threading.RLock()
        self._is_serving = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting

    def submit(self, request: Request, watch: Callable[[Token], None] | None = None) -> Stream:
        """Queue a request; `watch` is called with each of its tokens. Raises RequestError where it can never be served."""
        request.check_prompt(self._most_positions, self._vocabulary)
        stream = Stream(request, self.step, watch)
        self._waiting.append((stream, Answer(stream, self._ends, self._tokenizer)))
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a request now, also while `step` works on it. Any thread may call it, and any callback."""
        stream.end(Finish.CANCELLED)

    def step(self) -> None:
        """Serve the next request to its end; one that fails ends with the error, in its stream. Raises interrupts alone."""
        with self._lock:
            if self._is_serving:
                raise UsageError(
                    f"{type(self._model).__name__} is served one request at a time, and a callback of one asks for another",
                    hint="submit it, and read it after the one under way",
                )
            if not self._waiting:
                return
            stream, answer = self._waiting.popleft()
            try:
                self._is_serving = True
                self._serve(stream, answer)
            except BaseException as error:
                stream.fail(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._is_serving = False

    @torch.no_grad()
    def _serve(self, stream: Stream, answer: Answer) -> None:
        request = stream.request
        prompt = torch.tensor([request.prompt], device=self._device)
        if request.prompt_logprobs and not stream.is_finished:
            stream.prompt_logprobs += answer.prompt_logprobs(0, self._model(input_ids=prompt).logits[0])
        most_tokens = len(request.prompt) + request.max_new_tokens
        if self._most_positions is not None:
            most_tokens = min(most_tokens, self._most_positions)
        for index, completion in enumerate(stream.completions):
            if completion.finish is None:
                finish = self._generate(stream, answer, index, prompt, most_tokens)
                completion.text += answer.rest(index)
                completion.finish = completion.finish or finish

    def _generate(
        self, stream: Stream, answer: Answer, index: int, prompt: torch.Tensor, most_tokens: int
    ) -> Finish:
        chooser = _Chooser(stream, answer, index, most_tokens)
        end = min(self._ends, default=0)
        self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=most_tokens - prompt.shape[1],
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=end,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([_Finished(chooser)]),
        )
        return chooser.finish or Finish.LENGTH


class _Chooser(LogitsProcessor):  # type: ignore[misc]
    """Leaves `generate` no token but the one that is chosen."""

    def __init__(self, stream: Stream, answer: Answer, index: int, most_tokens: int) -> None:
        self.finish: Finish | None = None
        self._stream = stream
        self._answer = answer
        self._index = index
        self._most_tokens = most_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = input_ids[0].tolist()
        completion = self._stream.completions[self._index]
        token, self.finish = self._answer.choose(self._index, scores[0], tokens, self._most_tokens)
        if completion.finish is None:  # another thread may have cancelled it
            self._stream.put(token)
        self.finish = completion.finish or self.finish
        return torch.full_like(scores, -torch.inf).index_fill_(
            1, torch.tensor([token.id], device=scores.device), 0.0
        )


class _Finished(StoppingCriteria):  # type: ignore[misc]
    """Ends `generate` when the sample has."""

    def __init__(self, chooser: _Chooser) -> None:
        self._chooser = chooser

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([self._chooser.finish is not None], device=input_ids.device)
