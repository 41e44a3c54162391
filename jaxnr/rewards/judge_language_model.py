"""A Flax language model as the judge: P(yes) of all lists × criteria in one compiled, sharded program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxnr.errors import InputError
from jaxnr.hosts import gather_rows, place_same
from jaxnr.mesh import batch_sharding, batch_ways, replicated, traced_on
from jaxnr.models.decoder import Decoder, head_VD
from jaxnr.prompting.prompt import pad_prompts, special_names
from jaxnr.rewards.criteria import Criterion
from jaxnr.rewards.judge import WRITTEN_TOKENS, context, request
from jaxnr.sampling.sampler import SamplingSettings, make_sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "@the message@"


class LanguageModelJudge:
    """P(yes) is the softmax of the logits of yes and no after the whole chat: instructions, list, question.

    The list is the prompt and its criteria are the completions of ``Decoder.shared``, so that what they have in common
    runs through the model once. Lists of like length go together, padded to few shapes: the list to a power of two of
    tokens, questions to a multiple of 32, their number to a multiple of four; each shape compiles once.

    Where the mesh has devices of several processes, all of them ask the same.

    Args:
        model: a decoder with its params, wherever they lie on ``mesh``, and its tokenizer with a chat template.
        lists_per_step: lists scored at once, rounded up to a multiple of the devices that share a batch.
    """

    def __init__(
        self,
        model: Decoder,
        params: dict,
        tokenizer: PreTrainedTokenizerBase,
        mesh: Mesh,
        *,
        lists_per_step: int,
    ):
        ways = batch_ways(mesh)
        self._model, self._params, self._tokenizer, self._mesh = model, params, tokenizer, mesh
        self._lists_per_step = _multiple(ways, lists_per_step)
        self._before, self._after = _around_message(tokenizer)
        self._special = special_names(tokenizer)
        yes_ids, no_ids = answer_ids(tokenizer, "yes"), answer_ids(tokenizer, "no")
        if set(yes_ids) & set(no_ids):
            raise InputError("The judge's tokenizer begins yes and no with the same token; use another model.")
        self._score = make_scorer(model, yes_ids, no_ids, mesh)

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """See ``Judge``."""
        prompts = [self.prompt_ids(queries) for queries in lists]
        ids_of = {criterion: self.question_ids(criterion) for asked in criteria for criterion in asked}
        questions = [[ids_of[criterion] for criterion in asked] for asked in criteria]
        yes_NC = np.full((len(lists), max(map(len, criteria), default=0)), np.nan, np.float32)
        for rows, filled in self._batches(prompts):
            yes_BG = self._yes([prompts[row] for row in filled], [questions[row] for row in filled])
            for row, yes_G in zip(rows, yes_BG, strict=False):
                yes_NC[row, : len(criteria[row])] = yes_G[: len(criteria[row])]
        return yes_NC

    def write(self, messages: Sequence[str]) -> list[str]:
        """See ``Writer``: the likeliest token each time, as many messages at once as lists are scored."""
        write = make_sampler(
            self._model,  # pyright: ignore[reportArgumentType]  # flax modules are hashable by their fields
            max_new_tokens=WRITTEN_TOKENS,
            vocabulary_size=len(self._tokenizer),
            pad_id=self._pad_id,
            mesh=self._mesh,
        )
        prompts = [self._ids(self._before + self._defused(message) + self._after) for message in messages]
        replies = [""] * len(messages)
        number, stop_ids = np.int32(0), np.array([self._tokenizer.eos_token_id, self._pad_id], np.int32)
        for rows, filled in self._batches(prompts):
            prompt_BS, mask_BS = self._padded([prompts[row] for row in filled])
            names_B = np.zeros(len(filled), np.int32)  # nothing is drawn
            batch = place_same((prompt_BS, mask_BS, names_B), self._mesh)
            settings = SamplingSettings(temperature=0.0)
            written = write(self._params, *batch, np.zeros(1, np.int32), number, number, settings, stop_ids)
            tokens_BGT, mask_BGT = gather_rows((written.tokens_BGT, written.mask_BGT), self._mesh)
            tokens_BT, mask_BT = tokens_BGT[:, 0], mask_BGT[:, 0]
            mask_BT = mask_BT & ~np.isin(tokens_BT, stop_ids)
            for row, tokens_T, mask_T in zip(rows, tokens_BT, mask_BT, strict=False):
                replies[row] = cast(str, self._tokenizer.decode(tokens_T[mask_T], clean_up_tokenization_spaces=False))
        return replies

    def prompt_ids(self, queries: Sequence[str]) -> list[int]:
        """The beginning of the chat, up to and including the list."""
        return self._ids(self._before + self._defused(context(queries)))

    def question_ids(self, criterion: Criterion) -> list[int]:
        """The rest of the chat, up to where the answer begins."""
        return self._ids(self._defused(request(criterion)) + self._after)

    def _yes(self, prompts: Sequence[Sequence[int]], questions: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """yes_BG of one padded batch; anything where there is no question."""
        prompt_BS, mask_BS = self._padded(prompts)
        length_BG = np.zeros((len(questions), _multiple(4, max(map(len, questions)))), np.int32)
        T = _multiple(32, 1 + max((len(ids) for asked in questions for ids in asked), default=0))
        question_BGT = np.full((*length_BG.shape, T), self._pad_id, np.int32)
        for row, asked in enumerate(questions):
            for column, ids in enumerate(asked):
                question_BGT[row, column, : len(ids)] = ids
                length_BG[row, column] = len(ids)
        batch = place_same((prompt_BS, mask_BS, question_BGT, length_BG), self._mesh)
        return np.asarray(self._score(self._params, *batch))

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int]]]:
        """Rows of prompts of like length, and the same filled up to a batch with copies of the last."""
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(prompts), self._lists_per_step):
            rows = by_length[start : start + self._lists_per_step]
            yield rows, rows + rows[-1:] * (self._lists_per_step - len(rows))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        return pad_prompts(prompts, (max(32, 1 << (max(map(len, prompts)) - 1).bit_length()),), self._pad_id)

    @property
    def _pad_id(self) -> int:
        return cast(int, self._tokenizer.pad_token_id)

    def _defused(self, text: str) -> str:
        """Names of special tokens broken up: neither queries nor signals can end the turn and answer themselves."""
        return self._special.sub(r"\1 ", text)

    def _ids(self, text: str) -> list[int]:
        return cast(list[int], self._tokenizer(text, add_special_tokens=False)["input_ids"])


def make_scorer(model: Decoder, yes_ids: Sequence[int], no_ids: Sequence[int], mesh: Mesh) -> Callable:
    """The jitted ``score(params, prompt_BS, mask_BS, question_BGT, length_BG) -> yes_BG``.

    Prompts are left-padded, questions right-padded with one token of padding at least. Of the head only the rows of
    the answers are read.
    """

    def score(
        params: dict, prompt_BS: jax.Array, mask_BS: jax.Array, question_BGT: jax.Array, length_BG: jax.Array
    ) -> jax.Array:
        hidden_BGTD = cast(
            jax.Array, model.apply({"params": params}, prompt_BS, mask_BS, question_BGT, method="shared")
        )
        # The state that predicts the token at `length` is that after the question's last token.
        last_BGD = jnp.take_along_axis(hidden_BGTD, length_BG[..., None, None], axis=2)[:, :, 0]

        def evidence(ids: Sequence[int]) -> jax.Array:
            head = head_VD(params)[np.array(ids)].astype(last_BGD.dtype)
            logits = jnp.einsum("bgd,vd->bgv", last_BGD, head, preferred_element_type=jnp.float32)
            return jax.nn.logsumexp(logits, axis=-1)

        return jax.nn.sigmoid(evidence(yes_ids) - evidence(no_ids))

    spread = batch_sharding(mesh)
    return jax.jit(
        traced_on(mesh, score), in_shardings=(None, spread, spread, spread, spread), out_shardings=replicated(mesh)
    )


def answer_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> tuple[int, ...]:
    """The tokens that count as the answer ``word``: it, with and without a capital, where that is a single token.

    The first token of the capitalised word where neither is.
    """
    spellings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word.capitalize(), word)]
    whole = dict.fromkeys(ids[0] for ids in cast(list[list[int]], spellings) if len(ids) == 1)
    return tuple(whole) or (cast(list[list[int]], spellings)[0][0],)


def _around_message(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after the one message of a user, the header of the answer included."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, mark, after = cast(str, chat).partition(_MARK)
    if not mark:
        raise InputError(
            "The judge's chat template leaves the user's message out; expected an instruction-tuned model."
        )
    return before, after


def _multiple(of: int, least: int) -> int:
    """The first multiple, above 0, that is ``least`` or more."""
    return max(1, -(-least // of)) * of
