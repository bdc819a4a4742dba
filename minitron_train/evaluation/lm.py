"""The trained model as lm-eval sees it. Importing this module imports lm-eval."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from minitron_train.arch.build import LanguageModel
from minitron_train.errors import UserError
from minitron_train.evaluation.packing import Request
from minitron_train.evaluation.scoring import Score, score
from minitron_train.parallel.groups import Groups


class MegatronLM(TemplateLM):
    """lm-eval's model interface over a LanguageModel at any tensor- and data-parallel size.

    Every rank is given every request and returns every answer; in between, each data-parallel rank does its share.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Any, max_length: int, groups: Groups, batch_tokens: int
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.groups = model, tokenizer, groups
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.num_truncated = 0
        self.bar = tqdm(desc="evaluate", total=0, unit="request", disable=not groups.is_first)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, else EOS (lm-eval's rule)."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(
            "the tokenizer has neither BOS nor EOS, which a task with an empty context needs; "
            "set eos_token in tokenizer_config.json"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but no second BOS."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Log-likelihood and greediness of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        """Score token lists; what is too long loses its beginning (lm-eval's rule) and is counted."""
        cut = []
        for index, (_, context, continuation) in enumerate(requests):
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            self.num_truncated += len(tokens) < len(context) + len(continuation)
            cut.append(Request(index, tokens, len(continuation)))
        scores: dict[int, Score] = {}
        self.bar.total += len(requests)
        self.bar.refresh()

        def keep(new: dict[int, Score]) -> None:
            scores.update(new)
            self.bar.update(len(new) * self.groups.dp_size)

        score(self.model, cut, self.groups, self.batch_tokens, keep)
        merged = self.merge(scores)
        broken = [index for index, (value, _) in merged.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"logits are not finite at {str(requests[min(broken)][0])[:80]!r}: the model's weights are broken"
            )
        return [merged[index] for index in range(len(requests))]

    def merge(self, mine: dict[int, Any]) -> dict[int, Any]:
        """All data-parallel ranks' answers."""
        if self.groups.dp_size == 1:
            return mine
        everyone: list[Any] = [None] * self.groups.dp_size
        dist.all_gather_object(everyone, mine, group=self.groups.dp_group)
        return {index: answer for part in everyone for index, answer in part.items()}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context length with one token of overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((request.args[0], *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Iterable[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation of each text."""
        raise NotImplementedError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from minitron_train.data import tokenizer

    return tokenizer.load(folder)
