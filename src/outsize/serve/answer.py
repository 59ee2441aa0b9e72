"""What becomes of logits: tokens, texts, log-probabilities, and the end of a sample. Both engines answer through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from outsize.errors import ConfigError
from outsize.serve.request import Finish, Stream, Token
from outsize.serve.sample import choose, logprobs_of
from outsize.serve.text import Detokenizer


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or [])


class Answer:
    """Fills the stream of one request."""

    def __init__(self, stream: Stream, ends: frozenset[int], tokenizer: Any) -> None:
        request = stream.request
        if request.stop and tokenizer is None:
            raise ConfigError("stop texts need a tokenizer", hint="open the engine with one")
        self._stream = stream
        self._ends = ends
        self._texts = [
            Detokenizer(tokenizer, request.prompt, request.stop) if tokenizer is not None else None
            for _ in range(request.num_samples)
        ]

    def choose(
        self, index: int, logits_V: torch.Tensor, tokens: Sequence[int], most_tokens: int
    ) -> tuple[int, Finish | None]:
        """The token that sample `index` has after `tokens`, told to the stream, and whether the sample ends with it."""
        request = self._stream.request
        token = choose(logits_V, tokens, request.sampling, index)
        logprob, likeliest = logprobs_of(logits_V, token, request.logprobs)
        text, finish = self._text_after(index, token, len(tokens) + 1 >= most_tokens)
        self._stream.completions[index].text += text
        self._stream.put(Token(index, token, text, logprob, likeliest))
        return token, finish

    def _text_after(self, index: int, token: int, is_longest: bool) -> tuple[str, Finish | None]:
        """What a token settles, and whether the sample ends with it; with the end all is settled."""
        detokenizer, is_end = self._texts[index], token in self._ends
        text = detokenizer.add(token) if detokenizer is not None and not is_end else ""
        is_stopped = is_end or (detokenizer is not None and detokenizer.is_stopped)
        finish = Finish.STOP if is_stopped else Finish.LENGTH if is_longest else None
        if detokenizer is not None and finish is not None:
            text += detokenizer.finish()
        return text, finish

    def tell_prompt(self, position: int, logits_NV: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow `position` and later ones, given their logits."""
        prompt = self._stream.request.prompt
        for logits_V, token in zip(logits_NV, prompt[position + 1 :], strict=False):
            self._stream.prompt_logprobs.append(logprobs_of(logits_V, token, 0)[0])

    def finish(self, index: int, finish: Finish) -> None:
        """Sample `index` ended."""
        completion = self._stream.completions[index]
        if (detokenizer := self._texts[index]) is not None:
            completion.text += detokenizer.finish()
        completion.finish = finish
