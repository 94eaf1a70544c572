"""Turns a `ScheduledBatch` into flat arrays, runs one compiled call, and gives the sampled tokens back.

Knows arrays and their layout; does not know which sequences should run, or text.
"""

import time
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.config import CompleteConfig
from pagellm.engine.errors import EngineError
from pagellm.engine.execution.swap_space import FileSwapSpace, MemorySwapSpace, SwapSpace
from pagellm.engine.requests.outputs import TokenLogprob
from pagellm.engine.requests.sampling_params import NO_BIAS, LogitBias
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.engine.scheduling.sequence import Sequence, SequenceError
from pagellm.kernels.architecture import Architecture, Weights
from pagellm.kernels.attention import KEY_CHUNK
from pagellm.kernels.buffers import (
    WANTED,
    Batch,
    Cache,
    Outputs,
    WantedRow,
    new_cache,
    new_plan,
    new_workspace,
)
from pagellm.kernels.threads import ThreadTeam
from pagellm.kernels.transformer import step


@dataclass
class RunnerOutput:
    """What a step gave, by sequence of the batch that asked for it."""

    # Sampled, of each of batch.sampled in order; none where the logits name no token.
    token_ids: list[list[int]] = field(default_factory=list)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # of the sampled tokens, by seq_id
    # Of prompt tokens, by seq_id: (index of the token in the prompt, its log-probabilities).
    prompt_logprobs: dict[int, list[tuple[int, TokenLogprob]]] = field(default_factory=dict)
    # By seq_id: (position, logits [vocab_size]) of each token computed for a sequence that wants its logits.
    logits: dict[int, list[tuple[int, NDArray[np.float32]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wishes:
    """What a sequence wants of its logits beside what its sampling parameters say.

    logits: those of each token that is computed. mask: whether each token may be sampled, as bit t % 32 of
    word t // 32 for token t, [(vocab_size + 31) // 32].
    forced: the token that it gets in the place of a sampled one. forbidden: tokens that are not sampled.
    """

    logits: bool = False
    mask: NDArray[np.uint32] | None = None
    forced: int | None = None
    forbidden: Items[int] = ()


_NO_WISHES = Wishes()


@dataclass(frozen=True)
class _Row:
    """One wanted row of logits: which token's, and what for."""

    sequence: Sequence
    token_row: int  # in the flat batch
    position: int  # of the token whose logits these are
    target: int = -1  # the next token where that is given, or -1 to sample it
    num_logprobs: int = -1  # beside the target's own or the sampled token's; -1 for none at all
    logits: bool = False  # whether they are given out themselves
    mask: NDArray[np.uint32] | None = None  # as in `Wishes`
    forbidden: Items[int] = ()
    is_output: bool = False  # whether the next token belongs to the output, not to the prompt


class ModelRunner:
    """Owns the weights, the KV cache and its second tier, the workspace and the threads that compute.

    cache_format: FLOAT32 or BFLOAT16. Raises `ConfigError` if there is no room for the second tier.
    """

    def __init__(
        self, arch: Architecture, weights: Weights, cache_format: int, config: CompleteConfig
    ) -> None:
        self.arch = arch
        self.weights = weights
        self.cache = new_cache(arch, cache_format, config.num_blocks, config.block_size)
        self._blocks = _block_views(self.cache)
        self._swap_space: SwapSpace | None = None
        if config.num_swap_blocks:
            block_words = sum(part[0].size for part in self._blocks)
            self._swap_space = (
                MemorySwapSpace(config.num_swap_blocks, block_words)
                if config.swap_dir is None
                else FileSwapSpace(config.num_swap_blocks, block_words, config.swap_dir)
            )
        max_tokens = min(config.max_num_batched_tokens, config.capacity_tokens)
        self.workspace = new_workspace(arch, max_tokens, config.num_threads)
        self.team = ThreadTeam(config.num_threads)
        self._batch_limits = (max_tokens, min(max_tokens, config.max_num_seqs))
        self._planned_chunks = 1
        # A bias may have an entry for every token: those of the step before are used again where they fit.
        self._biases = _Biases.laid_out([], [])
        self._plan = new_plan(arch, *self._batch_limits, self._planned_chunks)

    def run(self, batch: ScheduledBatch, wishes: Mapping[int, Wishes] | None = None) -> RunnerOutput:
        """Computes a batch: fills its KV slots, samples, and collects what its sequences ask for.

        wishes: by seq_id, of those that have any. Raises `SequenceError`, and changes nothing that counts, if
        one of its sequences cannot be dealt with, and `EngineError` if the threads cannot be started.
        """
        inputs = self._inputs(batch)
        self._grow_plan(batch)
        rows = _wanted_rows(batch, wishes or {}, self.arch.vocab_size)
        outputs, self._biases = _outputs(rows, self.arch.vocab_size, self._biases)
        try:
            self.team.run(
                step, self.arch, self.weights, self.cache, inputs, self._plan, outputs, self.workspace
            )
        except OSError as error:  # the system starts no more threads
            raise EngineError(error.strerror) from error
        return _collect(rows, outputs)

    def transfer(self, transfer: Transfer) -> None:
        """Moves a block's content. Raises `OSError` if the second tier cannot be read or written."""
        kind, source, target, _ = transfer
        if kind is TransferKind.COPY:
            for part in self._blocks:
                part[target] = part[source]
            return
        assert self._swap_space is not None
        if kind in (TransferKind.SWAP_OUT, TransferKind.OFFLOAD):
            content = np.concatenate([part[source] for part in self._blocks])
            self._swap_space.write(target, content)
        else:
            content = self._swap_space.read(source)
            for part in self._blocks:
                size = part[target].size
                part[target], content = content[:size], content[size:]

    def measure_swap_s(self) -> float:
        """Seconds that moving a block to the second tier takes, or back; 0 if there is none."""
        if self._swap_space is None:
            return 0.0
        content = np.concatenate([part[0] for part in self._blocks])
        self._swap_space.write(0, content)  # the first write pays for the memory
        start = time.perf_counter()
        self._swap_space.write(0, content)
        self._swap_space.read(0)
        return (time.perf_counter() - start) / 2

    def close(self) -> None:
        """Ends the threads and gives the second tier back."""
        self.team.close()
        if self._swap_space is not None:
            self._swap_space.close()

    def _inputs(self, batch: ScheduledBatch) -> Batch:
        sequences, counts = batch.sequences, batch.num_new_tokens
        token_ids, num_computed = array("i"), array("i")
        num_blocks = max([len(sequence.block_table) for sequence in sequences])
        block_tables = array("i", bytes(4 * num_blocks * len(sequences)))
        at = 0
        work = zip(sequences, counts, strict=True)
        try:
            for sequence, count in work:
                start, table = sequence.num_computed_tokens, sequence.block_table
                token_ids += sequence.token_ids[start : start + count]
                num_computed.append(start)
                block_tables[at : at + len(table)] = array("i", table)
                at += num_blocks
        except Exception as error:
            raise SequenceError(sequence) from error
        return Batch(
            token_ids=np.frombuffer(token_ids, np.int32),
            num_computed=np.frombuffer(num_computed, np.int32),
            query_start_loc=np.frombuffer(array("i", accumulate(counts, initial=0)), np.int32),
            block_tables=np.frombuffer(block_tables, np.int32).reshape(len(sequences), num_blocks),
        )

    def _grow_plan(self, batch: ScheduledBatch) -> None:
        """Makes room for contexts that are longer than any before."""
        longest = max(
            s.num_computed_tokens + n for s, n in zip(batch.sequences, batch.num_new_tokens, strict=True)
        )
        if longest > self._planned_chunks * KEY_CHUNK:
            chunks = chunks_to_plan(longest)
            self._plan = new_plan(self.arch, *self._batch_limits, chunks)
            self._planned_chunks = chunks  # after the plan: an interrupt must not leave one that is too small


def chunks_to_plan(longest: int) -> int:
    """The chunks of keys for which there is room once a context of so many tokens has come."""
    return 2 * longest // KEY_CHUNK + 1


def _block_views(cache: Cache) -> list[NDArray[np.float32]]:
    """Each layer's keys and each layer's values, if it keeps any, as [num_blocks, words of a block]."""
    return [
        words[first:end].reshape(cache.num_blocks, -1)
        for words, starts in ((cache.keys, cache.key_start), (cache.values, cache.value_start))
        for first, end in pairwise(starts)
        if end > first
    ]


def _wanted_rows(batch: ScheduledBatch, wishes: Mapping[int, Wishes], vocab_size: int) -> list[_Row]:
    """The rows of logits that are wanted: of the prompt's tokens, and of those that are to be sampled."""
    rows = []
    first = 0
    work = zip(batch.sequences, batch.num_new_tokens, batch.samples, strict=True)
    try:
        for sequence, count, samples in work:
            start, params = sequence.num_computed_tokens, sequence.sampling_params
            logits = wishes.get(sequence.seq_id, _NO_WISHES).logits
            if (logits or params.prompt_logprobs is not None) and start < sequence.num_prompt_tokens:
                num_logprobs = _num_logprobs(sequence, False, vocab_size)
                for p in range(start, min(start + count, sequence.num_prompt_tokens - 1)):
                    target = sequence.token_ids[p + 1]
                    rows.append(_Row(sequence, first + p - start, p, target, num_logprobs, logits))
            for sampled in (sequence, *batch.forks.get(sequence, ())) if samples else ():
                own = wishes.get(sampled.seq_id, _NO_WISHES)
                rows.append(
                    _Row(
                        sampled,
                        first + count - 1,
                        start + count - 1,
                        target=-1 if own.forced is None else own.forced,
                        is_output=True,
                        num_logprobs=_num_logprobs(sampled, True, vocab_size),
                        logits=logits and sampled is sequence,
                        mask=own.mask,
                        forbidden=own.forbidden,
                    )
                )
            first += count
    except Exception as error:
        raise SequenceError(sequence) from error
    return rows


def _num_logprobs(sequence: Sequence, samples: bool, vocab_size: int) -> int:
    params = sequence.sampling_params
    wanted = params.logprobs if samples else params.prompt_logprobs
    return -1 if wanted is None else min(wanted, vocab_size)


class _Biases(NamedTuple):
    """What is added to the logits of a step's rows, one row after the other.

    of_rows: of each row the bias that was asked for, and tokens that are forbidden.
    """

    of_rows: list[tuple[LogitBias, list[int]]]
    ids: NDArray[np.int32]
    values: NDArray[np.float32]
    start: NDArray[np.int32]  # [rows + 1]

    @classmethod
    def laid_out(cls, rows: list[_Row], of_rows: list[tuple[LogitBias, list[int]]]) -> "_Biases":
        """The biases of these rows."""
        ids, values = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        work = zip(rows, of_rows, strict=True)
        try:
            for row, (bias, forbidden) in work:  # noqa: B007
                if bias:
                    ids.append(np.frombuffer(bias.ids, np.int32))
                    values.append(np.frombuffer(bias.values_f32, np.float32))
                if forbidden:  # minus infinity, whatever else is added
                    ids.append(np.array(forbidden, np.int32))
                    values.append(np.full(len(forbidden), -np.inf, np.float32))
        except Exception as error:
            raise SequenceError(row.sequence) from error
        counts = (len(bias) + len(forbidden) for bias, forbidden in of_rows)
        start = np.frombuffer(array("i", accumulate(counts, initial=0)), np.int32)
        return cls(of_rows, np.concatenate(ids), np.concatenate(values), start)

    def are_of(self, of_rows: list[tuple[LogitBias, list[int]]]) -> bool:
        """Whether they are those of these rows, too."""
        return len(of_rows) == len(self.of_rows) and all(
            bias is old and forbidden == was
            for (bias, forbidden), (old, was) in zip(of_rows, self.of_rows, strict=True)
        )


def _outputs(rows: list[_Row], vocab_size: int, biases: _Biases) -> tuple[Outputs, _Biases]:
    """What a step is to give for each row. biases: of the step before, to be used again where they fit."""
    wanted: list[WantedRow] = []
    history, history_start = array("i"), array("i", [0])
    biases_of_rows: list[tuple[LogitBias, list[int]]] = []
    masks: list[NDArray[np.uint32]] = []
    num_wanted, most_logprobs = 0, 0
    try:
        for row in rows:
            sequence, p = row.sequence, row.sequence.sampling_params
            samples = row.target < 0
            most_logprobs = max(most_logprobs, row.num_logprobs)
            wanted.append(
                WantedRow(
                    token_row=row.token_row,
                    target=row.target,
                    num_logprobs=row.num_logprobs,
                    logits_row=num_wanted if row.logits else -1,
                    mask_row=-1 if row.mask is None else len(masks),
                    top_k=min(max(p.top_k, 0), vocab_size),
                    seed=_as_int64(p.seed or 0),
                    position=row.position + 1,
                    prompt_len=sequence.num_prompt_tokens,
                    temperature=p.temperature,
                    top_p=p.top_p,
                    min_p=p.min_p,
                    repetition=p.repetition_penalty,
                    frequency=p.frequency_penalty,
                    presence=p.presence_penalty,
                )
            )
            num_wanted += row.logits
            if samples and p.has_penalties:
                history += sequence.token_ids
            history_start.append(len(history))
            forbidden: list[int] = [*row.forbidden] if samples else []
            if samples and sequence.num_output_tokens < p.min_tokens:
                forbidden += [t for t in sequence.stop_token_ids if t < vocab_size]
            if row.mask is not None:
                masks.append(row.mask)
            biases_of_rows.append((p.bias if samples else NO_BIAS, forbidden))
    except Exception as error:
        raise SequenceError(row.sequence) from error
    if not biases.are_of(biases_of_rows):
        biases = _Biases.laid_out(rows, biases_of_rows)
    outputs = Outputs(
        wanted=np.array(wanted, WANTED),
        history=np.frombuffer(history, np.int32),
        history_start=np.frombuffer(history_start, np.int32),
        bias_ids=biases.ids,
        bias_values=biases.values,
        bias_start=biases.start,
        masks=np.array(masks, np.uint32).reshape(len(masks), (vocab_size + 31) // 32),
        tokens=np.zeros(len(rows), np.int32),
        logprobs=np.zeros(len(rows), np.float32),
        top_ids=np.zeros((len(rows), most_logprobs), np.int32),
        top_logprobs=np.zeros((len(rows), most_logprobs), np.float32),
        logits=np.zeros((num_wanted, vocab_size), np.float32),
    )
    return outputs, biases


def _as_int64(seed: int) -> int:
    """The lower 64 bits of a seed, as the int64 that has them."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _collect(rows: list[_Row], outputs: Outputs) -> RunnerOutput:
    result = RunnerOutput()
    tokens, num_wanted = outputs.tokens.tolist(), 0
    numbered = enumerate(rows)
    try:
        for i, row in numbered:
            seq_id = row.sequence.seq_id
            token = tokens[i] if row.target < 0 else row.target
            if row.is_output:
                result.token_ids.append([token] if token >= 0 else [])
            if row.num_logprobs >= 0:
                logprob = _logprob(row, token, outputs, i)
                if row.is_output:
                    result.logprobs.setdefault(seq_id, []).append(logprob)
                else:
                    result.prompt_logprobs.setdefault(seq_id, []).append((row.position + 1, logprob))
            if row.logits:
                logits = outputs.logits[num_wanted]
                num_wanted += 1
                result.logits.setdefault(seq_id, []).append((row.position, logits))
    except Exception as error:
        raise SequenceError(row.sequence) from error
    return result


def _logprob(row: _Row, token: int, outputs: Outputs, i: int) -> TokenLogprob:
    count = row.num_logprobs
    top_ids, top_logprobs = outputs.top_ids[i, :count].tolist(), outputs.top_logprobs[i, :count].tolist()
    return TokenLogprob(token, float(outputs.logprobs[i]), tuple(zip(top_ids, top_logprobs, strict=True)))
