"""An adapter to EleutherAI's lm-evaluation-harness (0.4.13, in the extra [hf]).

Import it inside a function: without the extra it cannot be imported.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flm_jax.errors import UserError
from flm_jax.inference.generation import Sampling, TextStream, generate
from flm_jax.inference.likelihood import Pair, batched, loglikelihoods
from flm_jax.interop.opening import OpenedModel


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template, as the adapter uses it.

    Attributes:
      write: writes messages with role and content as a prompt: its text and its tokens.
      stop_ids: the tokens that end an answer.
    """

    write: Callable[[Sequence[Mapping[str, str]]], tuple[str, list[int]]]
    stop_ids: tuple[int, ...]


class Adapter(TemplateLM):
    """Gives a model the harness's interface: log-likelihood, rolling log-likelihood, generation.

    Follows the harness's own model for Hugging Face files (`lm_eval.models.huggingface.HFLM`), so
    that both give the same figures: names of special tokens in a text are these tokens, and the
    vocabulary's padding takes part in the softmax. `OpenedModel.with_start` begins the context of
    each request. If it is longer than the model's context, its start is cut off.
    """

    def __init__(
        self,
        model: OpenedModel,
        context: int,
        batch_size: int = 8,
        seed: int = 0,
        chat: Chat | None = None,
    ):
        """Adapts a model.

        Args:
          model: the model with its tokenizer.
          context: the longest prompt with its continuation, in tokens.
          batch_size: number of requests in a batch.
          seed: seed of all draws, for generation with a temperature.
          chat: writes conversations; None: tasks are not put into a chat template.
        """
        super().__init__()
        self.model, self.max_length, self.batch_size = model, context, batch_size
        self._key = jax.random.key(seed)
        self._chat = chat
        self._chats: dict[str, list[int]] = {}  # a written conversation -> its tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one named as the beginning, else the end."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def chats(self) -> bool:
        """Whether tasks are put into a chat template."""
        return self._chat is not None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation in the model's own chat template.

        Args:
          chat_history: messages with role and content.
          add_generation_prompt: whether the assistant's next message begins; False: the last
            message is the beginning of its answer.

        Returns:
          A text; `tok_encode` gives it the tokens that fine-tuning and generation use.
        """
        assert self._chat is not None
        before = chat_history if add_generation_prompt else chat_history[:-1]
        text, ids = self._chat.write(before)
        if not add_generation_prompt:
            begun = chat_history[-1]["content"]
            text += begun
            ids = [*ids, *self.model.tokenizer.encode(begun, inside=True)]
        self._chats[text] = ids
        return text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the text of the model's chat template, for the harness's records."""
        template = self.model.template
        return template.jinja or repr(template)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache; it identifies the tokenizer."""
        return self.model.tokenizer.digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns a text's tokens, as the beginning of a document or without a start token.

        A text that begins with the name of the start token gets no second one.
        """
        if string in self._chats:
            return list(self._chats[string])
        ids = self.model.tokenizer.encode(string, special=True)
        if add_special_tokens is False or ids[:1] == [self.prefix_token_id]:
            return ids
        return self.model.with_start(ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes a pair; a context of white space alone belongs to the continuation."""
        if not context.strip():
            return [self.prefix_token_id], self.tok_encode(context + continuation, False)
        if context in self._chats:
            new = self.model.tokenizer.encode(continuation, special=True, inside=True)
            return self.tok_encode(context), new
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        for _, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, more than the context of "
                    f"{self.max_length}; set context to go beyond it",
                    argument="context",
                )
        # The model predicts the last token and never reads it, so one more token fits.
        kept = [(c[-(self.max_length + 1 - len(t)) :], t) for c, t in pairs]
        return loglikelihoods(self.model.params, self.model.config, kept, self.batch_size)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts in windows of the model's context; each token is predicted once.

        The tokens are those of the tokenizer's own library. As in the harness's own model, the
        prefix token precedes them, so a start token that the tokenizer adds is predicted too.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.model.tokenizer.encode(request.args[0], special=True)
            if tokens[:1] != [self.prefix_token_id]:
                tokens = self.model.tokenizer.with_special(tokens)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts; requests with equal settings share batches of similar lengths."""
        prompts = [
            (index, self.tok_encode(text), settings)
            for index, (text, settings) in enumerate(r.args for r in requests)
        ]
        prompts.sort(key=lambda item: (repr(sorted(item[2].items())), len(item[1])))
        texts = [""] * len(requests)
        for _, group in itertools.groupby(prompts, key=lambda item: item[2]):
            for chosen in batched(group, self.batch_size):
                new = self._continue([tokens for _, tokens, _ in chosen], chosen[0][2])
                for (index, _, _), text in zip(chosen, new, strict=True):
                    texts[index] = text
        return texts

    def _continue(self, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continues prompts with one request's settings, as the harness writes them."""
        options = normalize_gen_kwargs(
            settings, default_max_gen_toks=min(256, self.max_length // 2)
        )
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"max_gen_toks is {options['max_gen_toks']}, which leaves no room for a prompt in "
                f"the context of {self.max_length}; set context to go beyond it",
                argument="context",
            )
        sampling = Sampling(
            max_new_tokens=options["max_gen_toks"],
            temperature=options.get("temperature", 1.0 if options.get("do_sample") else 0.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            stop_tokens=(self._chat or self.model.tokenizer).stop_ids,
        )
        streams = [TextStream(self.model.tokenizer, options["until"]) for _ in prompts]
        rows = [prompt[-room:] for prompt in prompts]
        # A constant number of rows needs only one program. The added rows end after one token.
        rows += [[self.prefix_token_id]] * (self.batch_size - len(rows))
        self._key, key = jax.random.split(self._key)
        generate(
            self.model.params,
            self.model.token_config,
            rows,
            sampling,
            key,
            on_token=lambda row, token: row >= len(streams) or streams[row].add(token),
        )
        return [stream.end() for stream in streams]


def run(
    adapter: Adapter,
    tasks: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness.

    Args:
      adapter: the model.
      tasks: names of tasks.
      include_path: folder with YAML files of more tasks; None: only the harness's own tasks.
      num_fewshot: number of examples in each prompt; None: the task's own number.
      limit: number of samples of each task; None: all.

    Returns:
      Task -> the harness's metrics, and `samples`, the number of samples.

    Raises:
      UserError: there is no such task.
    """
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if any(task not in manager.all_tasks for task in tasks) and include_path is not None:
        # Reads the harness's own tasks too: thousands of files, so only if they are needed.
        manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"the harness has no task {unknown[0]!r}; give one of its own, or the folder of its "
            "YAML file as include_path",
            argument="tasks",
        )
    evaluation = lm_eval.simple_evaluate(
        adapter,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        apply_chat_template=adapter.chats,
    )
    assert evaluation is not None
    samples = evaluation["n-samples"]
    return {
        task: {"samples": samples.get(task, {}).get("effective"), **values}
        for task, values in evaluation["results"].items()
    }
