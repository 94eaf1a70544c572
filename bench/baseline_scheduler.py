"""A baseline to measure the scheduler against: the algorithm that nano-vllm publishes, written afresh.

Two phases (prompts first, then decodes), no chunks, a block object for each block, a free list that a cached
block leaves by a search from its front, and a hit that compares lists of tokens.
"""

from array import array
from collections import deque

import xxhash


class Block:
    """A block and what it holds."""

    def __init__(self, block_id):
        self.block_id = block_id
        self.ref_count = 0
        self.hash = -1
        self.token_ids = []


class BaselineSequence:
    """A request's tokens and blocks."""

    def __init__(self, token_ids, max_tokens, block_size):
        self.token_ids = list(token_ids)
        self.last_token = self.token_ids[-1]
        self.num_tokens = self.num_prompt_tokens = len(self.token_ids)
        self.max_tokens = max_tokens
        self.block_size = block_size
        self.ignore_eos = False
        self.block_table = []
        self.num_cached_tokens = 0

    def __len__(self):
        return self.num_tokens

    @property
    def num_completion_tokens(self):
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_blocks(self):
        """Blocks that its tokens take."""
        return (self.num_tokens + self.block_size - 1) // self.block_size

    def block(self, index):
        """The tokens of a block."""
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def append_token(self, token_id):
        """Takes a sampled token."""
        self.token_ids.append(token_id)
        self.last_token = token_id
        self.num_tokens += 1


class BaselineBlockManager:
    """Blocks by reference count, found again by the hash of their prefix."""

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.blocks = [Block(number) for number in range(num_blocks)]
        self.hash_to_block_id = {}
        self.free_block_ids = deque(range(num_blocks))
        self.used_block_ids = set()

    def can_allocate(self, sequence):
        """Whether a sequence's blocks are free."""
        return len(self.free_block_ids) >= sequence.num_blocks

    def allocate(self, sequence):
        """Gives a sequence its blocks, cached ones where the whole prefix is."""
        prefix_hash, missed = -1, False
        for index in range(sequence.num_blocks):
            token_ids = sequence.block(index)
            prefix_hash = self._hash(token_ids, prefix_hash) if len(token_ids) == self.block_size else -1
            block_id = self.hash_to_block_id.get(prefix_hash, -1)
            if block_id == -1 or self.blocks[block_id].token_ids != token_ids:
                missed = True
            if missed:
                block = self._take(self.free_block_ids[0])
            else:
                sequence.num_cached_tokens += self.block_size
                block = self.blocks[block_id]
                if block_id in self.used_block_ids:
                    block.ref_count += 1
                else:
                    block = self._take(block_id)
            if prefix_hash != -1:
                self._know(block, prefix_hash, token_ids)
            sequence.block_table.append(block.block_id)

    def deallocate(self, sequence):
        """Takes a sequence's blocks."""
        for block_id in reversed(sequence.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.used_block_ids.remove(block_id)
                self.free_block_ids.append(block_id)
        sequence.block_table.clear()
        sequence.num_cached_tokens = 0

    def can_append(self, sequence):
        """Whether there is a slot for one more token."""
        return len(self.free_block_ids) >= (len(sequence) % self.block_size == 1)

    def append(self, sequence):
        """Gives a sequence a slot for its last token, or enters the block that it filled."""
        table, rest = sequence.block_table, len(sequence) % self.block_size
        if rest == 1:
            table.append(self._take(self.free_block_ids[0]).block_id)
        elif rest == 0:
            token_ids = sequence.block(sequence.num_blocks - 1)
            before = self.blocks[table[-2]].hash if len(table) > 1 else -1
            self._know(self.blocks[table[-1]], self._hash(token_ids, before), token_ids)

    def _take(self, block_id):
        block = self.blocks[block_id]
        block.ref_count, block.hash, block.token_ids = 1, -1, []
        self.free_block_ids.remove(block_id)
        self.used_block_ids.add(block_id)
        return block

    def _know(self, block, prefix_hash, token_ids):
        block.hash, block.token_ids = prefix_hash, token_ids
        self.hash_to_block_id[prefix_hash] = block.block_id

    def _hash(self, token_ids, prefix):
        state = xxhash.xxh64()
        if prefix != -1:
            state.update(prefix.to_bytes(8, "little"))
        state.update(array("q", token_ids).tobytes())
        return state.intdigest()


class BaselineScheduler:
    """Prompts as long as they fit, else a token of every running sequence."""

    def __init__(self, num_blocks, block_size, max_num_seqs, max_num_batched_tokens):
        self.block_manager = BaselineBlockManager(num_blocks, block_size)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos = -1
        self.waiting = deque()
        self.running = deque()

    def add(self, sequence):
        """Takes a sequence in."""
        self.waiting.append(sequence)

    def schedule(self):
        """The sequences of the next step, and whether they are prompts."""
        scheduled, num_tokens = [], 0
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            too_many = num_tokens + len(sequence) > self.max_num_batched_tokens
            if too_many or not self.block_manager.can_allocate(sequence):
                break
            self.block_manager.allocate(sequence)
            num_tokens += len(sequence) - sequence.num_cached_tokens
            self.waiting.popleft()
            self.running.append(sequence)
            scheduled.append(sequence)
        if scheduled:
            return scheduled, True
        while self.running and len(scheduled) < self.max_num_seqs:
            sequence = self.running.popleft()
            while not self.block_manager.can_append(sequence):
                if self.running:
                    self._preempt(self.running.pop())
                else:
                    self._preempt(sequence)
                    break
            else:
                self.block_manager.append(sequence)
                scheduled.append(sequence)
        self.running.extendleft(reversed(scheduled))
        return scheduled, False

    def commit(self, sequences, token_ids):
        """Appends the sampled tokens and lets finished sequences go."""
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.append_token(token_id)
            ended = not sequence.ignore_eos and token_id == self.eos
            if ended or sequence.num_completion_tokens == sequence.max_tokens:
                self.block_manager.deallocate(sequence)
                self.running.remove(sequence)

    def _preempt(self, sequence):
        self.block_manager.deallocate(sequence)
        self.waiting.appendleft(sequence)
