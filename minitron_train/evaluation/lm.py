"""lm-eval's model interface for a megatron-core model. Importing this module imports lm-eval."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron_train.data.tokenizers import check_text
from minitron_train.evaluation.journal import Journal, key_of
from minitron_train.evaluation.packing import Request
from minitron_train.evaluation.progress import RequestBar
from minitron_train.evaluation.scoring import Score, score
from minitron_train.model.build import LanguageModel
from minitron_train.model.generate import greedy
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.signals import Interrupted

Answer = TypeVar("Answer", Score, str)


class MegatronLM(TemplateLM):
    """lm-eval's model interface for a LanguageModel at any tensor- and data-parallel size.

    Every rank receives all requests and returns all answers. Each data-parallel rank computes its share.

    Args:
        max_length: tokens of the longest context; longer requests are truncated on the left and counted.
        batch_tokens: tokens of one forward pass, padding included.
        journal: saves answers on disk as they are computed; None saves nothing.
        end_tokens: tokens that end a generated text, in addition to the tokenizer's EOS.
        is_stopped: called after each batch; true ends the evaluation.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        max_length: int,
        groups: Groups,
        batch_tokens: int,
        journal: Journal | None = None,
        end_tokens: frozenset[int] = frozenset(),
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.groups, self.journal = model, tokenizer, groups, journal
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.is_stopped = is_stopped
        self.end_tokens = end_tokens | {tokenizer.eos_token_id}
        self.owners: list[str] = []  # task of each current request
        self.num_truncated: Counter[str] = Counter()  # by task
        self.bar = RequestBar(groups.is_first)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, else EOS (lm-eval's rule)."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(
            "the tokenizer has neither BOS nor EOS, which a task with an empty context needs; "
            "set eos_token in tokenizer_config.json"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids with the tokenizer's special tokens, but without a second BOS."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        check_text(self.tokenizer, ids)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """Return log-likelihood and is-greedy of each (context, continuation)."""
        self.owners = [request.task_name or "" for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Score]:
        """Return log-likelihood and is-greedy of each (context, continuation) in token ids."""
        cut = []
        for index, (_, context, continuation) in enumerate(requests):
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            if len(tokens) < len(context) + len(continuation):
                self.num_truncated[self.owners[index]] += 1
            cut.append(Request(index, tokens, len(continuation)))

        def compute(left: list[int], on_answers: Callable[[dict[int, Score]], None]) -> None:
            def checked(scores: dict[int, Score]) -> None:
                broken = [index for index, (value, _) in scores.items() if not math.isfinite(value)]
                if broken:
                    raise not_finite(self.owners[broken[0]], requests[broken[0]][0])
                on_answers(scores)

            score(self.model, [cut[index] for index in left], self.groups, self.batch_tokens, checked)

        answers = self.answer([key_of(request.tokens, request.num_targets) for request in cut], compute, tuple)
        return [(value, is_greedy) for value, is_greedy in answers]

    def answer(
        self,
        keys: list[str],
        compute: Callable[[list[int], Callable[[dict[int, Answer]], None]], None],
        kind: type[Answer],
    ) -> list[Answer]:
        """Return the answers to all requests, from the journal or computed by this or another rank; collective.

        Args:
            keys: journal key of each request.
            compute: takes the indices of unanswered requests and passes this rank's answers to a callback, batch by batch.
            kind: type of an answer, tuple or str.

        Raises:
            UserError: on every rank, if any rank raised it. All ranks finish their share first.
            Interrupted: on every rank, if `is_stopped` was true on any.
        """
        known = self.journal.known(kind) if self.journal else {}
        left = [index for index, key in enumerate(keys) if key not in known]
        self.bar.expect(len(keys))
        self.bar.advance(len(keys) - len(left))
        mine: dict[int, Answer] = {}

        def on_answers(new: dict[int, Answer]) -> None:
            mine.update(new)
            if self.journal:
                self.journal.add({keys[index]: answer for index, answer in new.items()})
            self.bar.advance(len(new) * self.groups.dp_size)
            if self.is_stopped():
                raise Interrupted

        refusal = None
        try:
            compute(left, on_answers)
        except (UserError, Interrupted) as error:  # this rank must still join the gather below
            refusal = error
        everyone: list[Any] = [(mine, refusal)]
        if self.groups.dp_size > 1:
            everyone = [None] * self.groups.dp_size
            dist.all_gather_object(everyone, (mine, refusal), group=self.groups.dp_group)
        if refused := next((error for _, error in everyone if error), None):
            raise refused
        computed = {index: answer for part, _ in everyone for index, answer in part.items()}
        return [computed[index] if index in computed else known[key] for index, key in enumerate(keys)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the context length that overlap by one token."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((request.args[0], *make_disjoint_window(window)))
                owners.append(index)
        self.owners = [requests[owner].task_name or "" for owner in owners]
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each text, up to a stop string of the task or an end token."""
        prompts, limits, stops = [], [], []
        for request in requests:
            context, settings = cast("tuple[str, dict[str, Any]]", request.args)
            wanted = cast("dict[str, Any]", normalize_gen_kwargs(settings))
            limits.append(wanted["max_gen_toks"])
            stops.append(wanted["until"])
            tokens = self.tok_encode(context)
            room = self.max_length - limits[-1]
            assert room > 0 and not wanted["do_sample"], "load_tasks skips such tasks"
            self.num_truncated[request.task_name or ""] += len(tokens) > room
            prompts.append(tokens[-room:] or [self.prefix_token_id])

        def compute(left: list[int], on_answers: Callable[[dict[int, str]], None]) -> None:
            for batch in self.generation_batches(left, prompts, limits):
                ended = {index: Stop(self.tokenizer, stops[index], self.end_tokens) for index in batch}
                try:
                    texts = greedy(
                        self.model,
                        [prompts[index] for index in batch],
                        limits[batch[0]],
                        [ended[index] for index in batch],
                        self.groups,
                    )
                except FloatingPointError:
                    raise not_finite(requests[batch[0]].task_name or "", requests[batch[0]].args[0]) from None
                on_answers({index: ended[index].text(text) for index, text in zip(batch, texts, strict=True)})

        keys = [key_of(*parts) for parts in zip(prompts, limits, stops, strict=True)]
        return self.answer(keys, compute, str)

    def generation_batches(self, left: list[int], prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Batch this rank's requests by equal limit and similar prompt length."""
        batches: list[list[int]] = []
        for index in sorted(left, key=lambda k: (limits[k], -len(prompts[k]))):
            first = batches[-1][0] if batches else index
            size = (len(batches[-1]) + 1) * (len(prompts[first]) + limits[first]) if batches else 0
            if batches and limits[first] == limits[index] and size <= self.batch_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches[self.groups.dp_rank :: self.groups.dp_size]


def not_finite(task: str, text: Any) -> UserError:
    """Return the error for a model whose logits are not finite."""
    return UserError(
        f"{task}: logits are not finite at {str(text)[:80]!r}; the weights are damaged, evaluate another checkpoint"
    )


class Stop:
    """Decides whether a generated text has ended: with an end token or a stop string."""

    def __init__(self, tokenizer: Any, strings: list[str], end_tokens: frozenset[int]) -> None:
        self.tokenizer, self.strings, self.end_tokens = tokenizer, strings, end_tokens
        self.window = max((len(tokenizer.encode(string)) for string in strings), default=0) + 2

    def __call__(self, tokens: list[int]) -> bool:
        """Check only the last few tokens."""
        if tokens[-1] in self.end_tokens:
            return True
        tail = self.tokenizer.decode(tokens[-self.window :])
        return any(string in tail for string in self.strings)

    def text(self, tokens: list[int]) -> str:
        """Return the text before the first stop string, cut as lm-eval does it."""
        eos = [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stop=[*self.strings, *eos], think_end_token=None)
