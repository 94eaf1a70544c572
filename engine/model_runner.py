"""Turns a `ScheduledBatch` into flat arrays, runs one compiled call, and gives the sampled tokens back.

Knows arrays and their layout; does not know which sequences should run, or text.
"""

from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.outputs import TokenLogprob
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from kernels.attention import tokens_per_query_tile
from kernels.threads import ThreadTeam
from kernels.transformer import Architecture, Batch, Outputs, Weights, new_cache, new_workspace, step

_SEED_MASK = (1 << 64) - 1


@dataclass
class RunnerOutput:
    """What a step gave, by sequence of the batch that asked for it."""

    # Sampled, in the order of batch.samples; -1 where the logits name no token.
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # of the sampled token, by seq_id
    # Of prompt tokens, by seq_id: (index of the token in the prompt, its log-probabilities).
    prompt_logprobs: dict[int, list[tuple[int, TokenLogprob]]] = field(default_factory=dict)
    # By seq_id: (position, logits [vocab_size]) of each token computed for a sequence that wants its logits.
    logits: dict[int, list[tuple[int, NDArray[np.float32]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """One wanted row of logits: which token's, and what for."""

    sequence: Sequence
    token_row: int  # in the flat batch
    position: int  # of the token whose logits these are
    target: int  # the next token of the prompt, or -1 to sample it
    wants_logits: bool


class ModelRunner:
    """Owns the weights, the KV cache, the workspace and the threads that compute on them."""

    def __init__(self, arch: Architecture, weights: Weights, config: EngineConfig, num_threads: int) -> None:
        assert config.num_blocks is not None
        self.arch = arch
        self.weights = weights
        self.block_size = config.block_size
        self.cache = new_cache(arch, config.num_blocks, config.block_size)
        max_tokens = min(config.max_num_batched_tokens, config.capacity_tokens)
        self.workspace = new_workspace(arch, max_tokens, num_threads)
        self.team = ThreadTeam(num_threads)
        self._tile_tokens = tokens_per_query_tile(arch.num_heads // arch.num_kv_heads)

    def run(self, batch: ScheduledBatch, logits_of: frozenset[int] = frozenset()) -> RunnerOutput:
        """Computes a batch: fills its KV slots, samples, and collects what its sequences ask for.

        logits_of: the seq_ids whose logits are wanted for every token that is computed.
        """
        inputs = self._inputs(batch)
        rows = _wanted_rows(batch, inputs.query_start_loc, logits_of)
        outputs = _outputs(rows, self.arch.vocab_size)
        self.team.run(step, self.arch, self.weights, self.cache, inputs, outputs, self.workspace)
        return _collect(rows, outputs)

    def close(self) -> None:
        """Ends the threads."""
        self.team.close()

    def _inputs(self, batch: ScheduledBatch) -> Batch:
        sequences, counts = batch.sequences, np.array(batch.num_new_tokens, np.int32)
        starts = np.array([s.num_computed_tokens for s in sequences], np.int32)
        query_start_loc = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        token_ids = np.fromiter(
            chain.from_iterable(
                s.token_ids[s.num_computed_tokens : s.num_computed_tokens + n]
                for s, n in zip(sequences, batch.num_new_tokens, strict=True)
            ),
            np.int32,
            count=int(query_start_loc[-1]),
        )
        sequence_of_row = np.repeat(np.arange(len(sequences), dtype=np.int32), counts)
        positions = np.arange(token_ids.size, dtype=np.int32)
        positions += (starts - query_start_loc[:-1])[sequence_of_row]

        block_tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int32)
        for row, sequence in zip(block_tables, sequences, strict=True):
            row[: len(sequence.block_table)] = sequence.block_table
        blocks = block_tables[sequence_of_row, positions // self.block_size].astype(np.int64)

        tiles = -(-counts // self._tile_tokens)
        tile_sequence = np.repeat(np.arange(len(sequences), dtype=np.int32), tiles)
        first_tile = np.cumsum(tiles) - tiles
        tile_index = np.arange(tile_sequence.size, dtype=np.int32) - first_tile[tile_sequence]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            query_start_loc=query_start_loc,
            seq_lens=starts + counts,
            block_tables=block_tables,
            tile_sequence=tile_sequence,
            tile_start=(query_start_loc[tile_sequence] + tile_index * self._tile_tokens).astype(np.int32),
        )


def _wanted_rows(
    batch: ScheduledBatch, query_start_loc: NDArray[np.int32], logits_of: frozenset[int]
) -> list[_Row]:
    rows = []
    for index, (sequence, count) in enumerate(zip(batch.sequences, batch.num_new_tokens, strict=True)):
        first, start = int(query_start_loc[index]), sequence.num_computed_tokens
        wants_logits = sequence.seq_id in logits_of
        wants_prompt = wants_logits or sequence.sampling_params.prompt_logprobs is not None
        if wants_prompt and start < sequence.num_prompt_tokens:
            end = min(start + count, sequence.num_prompt_tokens - 1)
            rows += [
                _Row(sequence, first + p - start, p, sequence.token_ids[p + 1], wants_logits)
                for p in range(start, end)
            ]
        if batch.samples[index]:
            rows.append(_Row(sequence, first + count - 1, start + count - 1, -1, wants_logits))
    return rows


def _outputs(rows: list[_Row], vocab_size: int) -> Outputs:
    params = [row.sequence.sampling_params for row in rows]
    num_logprobs = [_num_logprobs(row) for row in rows]
    most_logprobs = min(max([*num_logprobs, 0]), vocab_size)
    history: list[list[int]] = []
    bias: list[dict[int, float]] = []
    for row, p in zip(rows, params, strict=True):
        samples = row.target < 0
        history.append(row.sequence.token_ids if samples and p.has_penalties else [])
        row_bias = dict(p.logit_bias) if samples else {}
        if samples and row.sequence.num_output_tokens < p.min_tokens:
            row_bias |= {t: -np.inf for t in row.sequence.stop_token_ids if t < vocab_size}
        bias.append(row_bias)
    logits_rows = np.cumsum([row.wants_logits for row in rows], dtype=np.int32) - 1
    return Outputs(
        rows=np.array([row.token_row for row in rows], np.int64),
        targets=np.array([row.target for row in rows], np.int32),
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([min(max(p.top_k, 0), vocab_size) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([(p.seed or 0) & _SEED_MASK for p in params], np.uint64),
        positions=np.array([row.position + 1 for row in rows], np.uint64),
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        history=np.array([t for tokens in history for t in tokens], np.int32),
        history_start=np.cumsum([0, *map(len, history)], dtype=np.int32),
        prompt_lens=np.array([row.sequence.num_prompt_tokens for row in rows], np.int32),
        bias_ids=np.array([t for b in bias for t in b], np.int32),
        bias_values=np.array([v for b in bias for v in b.values()], np.float32),
        bias_start=np.cumsum([0, *map(len, bias)], dtype=np.int32),
        num_logprobs=np.minimum(np.array(num_logprobs, np.int32), vocab_size),
        tokens=np.zeros(len(rows), np.int32),
        logprobs=np.zeros(len(rows), np.float32),
        top_ids=np.zeros((len(rows), most_logprobs), np.int32),
        top_logprobs=np.zeros((len(rows), most_logprobs), np.float32),
        logits=np.zeros((sum(row.wants_logits for row in rows), vocab_size), np.float32),
        logits_rows=np.where([row.wants_logits for row in rows], logits_rows, -1).astype(np.int32),
    )


def _num_logprobs(row: _Row) -> int:
    params = row.sequence.sampling_params
    wanted = params.logprobs if row.target < 0 else params.prompt_logprobs
    return -1 if wanted is None else wanted


def _collect(rows: list[_Row], outputs: Outputs) -> RunnerOutput:
    result = RunnerOutput()
    for i, row in enumerate(rows):
        seq_id = row.sequence.seq_id
        token = int(outputs.tokens[i]) if row.target < 0 else row.target
        if row.target < 0:
            result.token_ids.append(token)
        count = int(outputs.num_logprobs[i])
        if count >= 0:
            top = zip(
                outputs.top_ids[i, :count].tolist(), outputs.top_logprobs[i, :count].tolist(), strict=True
            )
            logprob = TokenLogprob(token, float(outputs.logprobs[i]), tuple(top))
            if row.target < 0:
                result.logprobs[seq_id] = logprob
            else:
                result.prompt_logprobs.setdefault(seq_id, []).append((row.position + 1, logprob))
        if row.wants_logits:
            logits = outputs.logits[outputs.logits_rows[i]]
            result.logits.setdefault(seq_id, []).append((row.position, logits))
    return result
