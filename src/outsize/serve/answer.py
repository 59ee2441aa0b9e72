"""What becomes of logits: tokens, texts, log-probabilities, and the end of a sample. Both engines answer through it.

Nothing here changes a stream: an engine first brings its own state up to date, then hands tokens out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from outsize.errors import ConfigError
from outsize.serve.request import Finish, Stream, Token
from outsize.serve.sample import check_finite, choose, logprobs_of
from outsize.serve.text import Detokenizer


def end_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def num_tokens(model: Any) -> int:
    """How many tokens the model has: the rows of its embedding, where it is a plain one."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        return embedding.num_embeddings
    return int(model.config.get_text_config(decoder=True).vocab_size)


class Answer:
    """Chooses the tokens of one request, and turns them into text."""

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
    ) -> tuple[Token, Finish | None]:
        """The token that sample `index` has after `tokens`, and whether the sample ends with it.

        Raises ModelError where the logits are not finite.
        """
        request = self._stream.request
        token = choose(logits_V, tokens, request.sampling, index)
        logprob, likeliest = logprobs_of(logits_V, token, request.logprobs)
        text, finish = self._text_after(index, token, len(tokens) + 1 >= most_tokens)
        return Token(index, token, text, logprob, likeliest), finish

    def _text_after(self, index: int, token: int, is_longest: bool) -> tuple[str, Finish | None]:
        """What a token settles, and whether the sample ends with it; with the end all is settled."""
        detokenizer, is_end = self._texts[index], token in self._ends
        text = detokenizer.add(token) if detokenizer is not None and not is_end else ""
        is_stopped = is_end or (detokenizer is not None and detokenizer.is_stopped)
        finish = Finish.STOP if is_stopped else Finish.LENGTH if is_longest else None
        if detokenizer is not None and finish is not None:
            text += detokenizer.finish()
        return text, finish

    def prompt_logprobs(self, position: int, logits_NV: torch.Tensor) -> list[float]:
        """Log-probabilities of the prompt's tokens that follow `position` and later ones, given their logits.

        Raises ModelError where the logits are not finite.
        """
        logprobs = []
        following = self._stream.request.prompt[position + 1 :]
        for place, (logits_V, token) in enumerate(zip(logits_NV, following, strict=False), position + 1):
            check_finite(logits_V, place)
            logprobs.append(logprobs_of(logits_V, token, 0)[0])
        return logprobs

    def rest(self, index: int) -> str:
        """The text of sample `index` that was held back, when no token follows."""
        detokenizer = self._texts[index]
        return "" if detokenizer is None else detokenizer.finish()
