"""Seeds plausible bugs into scheduling, mixtures of experts and what reads quantizers' files, one at a time.

A bug is a change of the syntax tree: in a function, what reads like `before` becomes `after`. So it is found
whatever the layout, the comments and the rest of the file are. Runs the tests that should notice, and fails
if a bug goes unnoticed.

Run: python -m tests.mutation [--jobs 2] [WORDS OF A BUG'S NAME ...]
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The cases are quick, and most bugs do not get past them; what does, the laws must catch.
SUITE = (
    "tests/engine/test_block_manager.py",
    "tests/engine/test_block_window.py",
    "tests/engine/test_hierarchical_cache.py",
    "tests/engine/test_scheduler.py",
    "tests/engine/test_step_loop.py",
    "tests/engine/test_stride.py",
    "tests/engine/test_policies.py",
    "tests/properties/test_extension_points.py",
    "tests/properties/test_block_manager.py",
    "tests/properties/test_scheduler.py",
)
MANAGER, CACHE, WINDOW, SCHEDULER, BATCH, POLICIES, QUEUE, CHECKED, RANKED, USAGE, STRIDE = (
    f"engine/scheduling/{name}.py"
    for name in (
        "block_manager",
        "prefix_cache",
        "block_window",
        "scheduler",
        "batch",
        "policies/order",
        "waiting_queue",
        "policies/checked",
        "ranked_blocks",
        "block_usage",
        "stride",
    )
)
EXPERTS, MATMUL, PHASES, ARCHITECTURE = (
    f"kernels/{name}.py" for name in ("experts", "matmul", "phases", "architecture")
)
# What runs for a bug in a mixture of experts: its kernels are compiled anew each time.
ROUTING = ("tests/kernels/test_experts.py", "-k", "chosen or slot")
PRODUCTS = ("tests/kernels/test_experts.py", "-k", "bits")
STEP = ("tests/kernels/test_transformer.py", "-k", "every_feature and float32 and mixture")
# For one in latent attention: the step against its definition, or what files say of it.
LATENT = "kernels/latent.py"
LATENT_STEP = ("tests/kernels/test_transformer.py", "-k", "every_feature and float32 and latent")
LATENT_FILES = ("tests/engine/test_latent.py",)
LATENT_MODELS = ("tests/engine/test_architectures.py", "-k", "(minicpm3 or deepseek) and safetensors")
# And for one in what reads a quantizer's directory: its values, its refusals, and how it is kept.
NIBBLES, TABLES, BYTES, MODULES, GPTQ = (
    f"engine/checkpoints/quantized/{name}.py"
    for name in ("nibbles", "bitsandbytes", "bytes", "modules", "gptq")
)
VALUES = ("tests/engine/test_quantized.py", "-k", "own_library")
KEPT = ("tests/engine/test_quantized.py", "-k", "every_value and (order or awq)")
REFUSALS = ("tests/engine/test_quantized_refusals.py",)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Bug:
    """A change of one place.

    function: the name of a function, behind that of its class. before: statements, or an expression, that
    must occur in it once. after: what stands there then; nothing for statements, and for an operand of `and`
    and `or`, that are left out. suite: of pytest, the tests that should notice.
    """

    name: str
    file: str
    function: str
    before: str
    after: str = ""
    suite: tuple[str, ...] = SUITE

    def seeded(self, code: str) -> str:
        """The code with the bug. Raises `LookupError` if there is not one place for it."""
        tree = ast.parse(code)
        function = _function(tree, self.function.split("."))
        before, after = ast.parse(self.before).body, ast.parse(self.after).body
        places = _runs(function, before)
        if not places and len(before) == 1 and isinstance(before[0], ast.Expr):
            places = _operands(function, before[0].value)
            after = [node.value for node in after if isinstance(node, ast.Expr)]
        if len(places) != 1:
            raise LookupError(f"its place occurs {len(places)} times in {self.function}, expected once")
        [(holder, key)] = places
        if isinstance(holder, list):
            is_body = holder and isinstance(holder[0], ast.stmt)
            holder[key : key + len(before)] = after or ([ast.Pass()] if is_body else [])
        else:
            [new] = after
            setattr(holder, key, new)
        return ast.unparse(tree)


def _function(tree: ast.AST, names: list[str]) -> ast.AST:
    for name in names:
        tree = next(node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == name)
    return tree


def _equal(node: object, other: object) -> bool:
    return isinstance(node, ast.AST) and isinstance(other, ast.AST) and ast.dump(node) == ast.dump(other)


def _runs(function: ast.AST, wanted: list[ast.stmt]) -> list[tuple[Any, Any]]:
    """Where these statements follow each other: the list that they stand in, and the index of the first."""
    return [
        (body, index)
        for node in ast.walk(function)
        for _, body in ast.iter_fields(node)
        if isinstance(body, list)
        for index in range(len(body) - len(wanted) + 1)
        if all(map(_equal, body[index:], wanted))
    ]


def _operands(function: ast.AST, wanted: ast.expr) -> list[tuple[Any, Any]]:
    """Where this expression stands: a list and its index there, or a node and the name of its field."""
    places: list[tuple[Any, Any]] = []
    for node in ast.walk(function):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                places += [(value, index) for index, item in enumerate(value) if _equal(item, wanted)]
            elif _equal(value, wanted):
                places.append((node, name))
    return places


BUGS = (
    Bug(
        "a stride goes on where blocks run out",
        STRIDE,
        "advance",
        "len(growing) > manager.num_free_blocks",
    ),
    Bug(
        "a stride goes on where somebody who waits may be let in",
        STRIDE,
        "advance",
        "not scheduler.lets_nobody_in(len(sequences))",
    ),
    Bug(
        "a stride goes on behind an end",
        STRIDE,
        "_next_event",
        "if sequence.max_len <= full:\n    full = sequence.max_len - 1",
    ),
    Bug(
        "the last step of a stride is taken for one that ends nobody",
        STRIDE,
        "advance",
        "if len(sequence.token_ids) >= sequence.max_len:\n"
        "    scheduler.finish(sequence, FinishReason.LENGTH)\n"
        "    stride.finished.append(sequence)",
    ),
    Bug(
        "in a stride nobody looks whether one that waits still finds no room",
        SCHEDULER,
        "Scheduler.lets_nobody_in",
        "self._is_still_blocked(self.waiting.first(self.stats))",
        "True",
    ),
    Bug(
        "a stride does not ask a policy about each step that asks for it",
        STRIDE,
        "most_alike",
        "policies.counts_batches",
    ),
    Bug(
        "a reference count is not decremented for shared blocks",
        MANAGER,
        "BlockManager._release",
        "counts[block] - 1",
        "counts[block] - (counts[block] == 1)",
    ),
    Bug(
        "a fork does not count its references",
        MANAGER,
        "BlockManager.fork",
        "for block in held:\n    self._reference_counts[block] += 1",
    ),
    Bug(
        "a cached block that is hit stays in the free list",
        MANAGER,
        "BlockManager._reference",
        "self._free.remove(block)",
    ),
    Bug(
        "a block is registered before its last token is computed",
        MANAGER,
        "BlockManager.register",
        "sequence.num_computed_tokens",
        "sequence.num_computed_tokens + 1",
    ),
    Bug(
        "a hit is not confirmed against the tokens", CACHE, "PrefixCache.find", "self.tokens(block) == tokens"
    ),
    Bug("a hit may follow another block", CACHE, "PrefixCache.find", "self._before[block] == before"),
    Bug(
        "tenants with different salts share blocks",
        MANAGER,
        "BlockManager._block_hash",
        "self._root_hash(sequence.sampling_params.cache_salt)",
        "0",
    ),
    Bug(
        "the salt counts in the hash alone, so a collision tells a tenant what another one asked",
        CACHE,
        "PrefixCache.find",
        "before != ROOT or self._salts.get(block, '') == salt",
    ),
    Bug(
        "a block that is reused stays findable",
        MANAGER,
        "BlockManager._evict",
        "self._cache.remove((block,))",
    ),
    Bug(
        "blocks that are reused together stay findable",
        MANAGER,
        "BlockManager._take_many",
        "self.stats.evictions += self.block_size * self._cache.remove(blocks)",
    ),
    Bug(
        "a hash does not depend on the blocks before",
        MANAGER,
        "BlockManager._block_hash",
        "hashes[-1] if hashes else self._root_hash(sequence.sampling_params.cache_salt)",
        "self._root_hash(sequence.sampling_params.cache_salt)",
    ),
    Bug(
        "a parent is evicted before its child",
        MANAGER,
        "BlockManager._empty_table",
        "reversed(sequence.block_table[behind:])",
        "sequence.block_table[behind:]",
    ),
    Bug(
        "the most recently used block is evicted first",
        MANAGER,
        "BlockManager._release",
        "self._free.extend(self._cache.known(freed) if caches else ())",
        "for block in self._cache.known(freed) if caches else ():\n    self._free.prepend(block)",
    ),
    Bug(
        "cached blocks are evicted while others are free",
        MANAGER,
        "BlockManager._release",
        "self._free.prepend",
        "self._free.append",
    ),
    Bug(
        "a prompt that is cached whole computes nothing",
        MANAGER,
        "BlockManager._most_cached",
        "sequence.num_tokens - 1",
        "sequence.num_tokens",
    ),
    Bug(
        "one who wants the prompt's logits reads the cache",
        MANAGER,
        "BlockManager._most_cached",
        "not (sequence.reads_cache or sequence.swap_table)",
        "False",
    ),
    Bug(
        "a free cached prefix counts as room for the rest",
        MANAGER,
        "BlockManager.can_allocate",
        "self.blocks_for(num_tokens) - num_reused + reused",
        "self.blocks_for(num_tokens) - num_reused",
    ),
    Bug(
        "the copy of a shared block is skipped",
        MANAGER,
        "BlockManager.grow",
        "self.transfers.append(Transfer(TransferKind.COPY, shared, table[index], sequence))",
    ),
    Bug(
        "a copy goes the wrong way",
        MANAGER,
        "BlockManager.grow",
        "Transfer(TransferKind.COPY, shared, table[index], sequence)",
        "Transfer(TransferKind.COPY, table[index], shared, sequence)",
    ),
    Bug(
        "a shared block is written in place",
        MANAGER,
        "BlockManager.needs_copy",
        "self._reference_counts[table[index]] > 1 or self._knows(table[index])",
        "False",
    ),
    Bug(
        "a fork writes into a block that the cache knows",
        MANAGER,
        "BlockManager.needs_copy",
        "self._knows(table[index])",
    ),
    Bug(
        "a parent goes on in the block that its fork shares",
        MANAGER,
        "BlockManager.fork",
        "parent.num_slots = min(parent.num_slots, parent.num_computed_tokens)",
    ),
    Bug(
        "a fork counts its last token as computed",
        MANAGER,
        "BlockManager.fork",
        "child.num_computed_tokens = child.num_slots = num_tokens",
        "child.num_computed_tokens = child.num_slots = num_tokens + 1",
    ),
    Bug(
        "a block that was computed twice is kept twice",
        MANAGER,
        "BlockManager._offer_blocks",
        "known != block",
        "False",
    ),
    Bug(
        "swapping out forgets the last, partial block",
        MANAGER,
        "BlockManager.swap_out",
        "self.blocks_for(num_computed)",
        "num_computed // self.block_size",
    ),
    Bug(
        "swapped content comes back into the wrong blocks",
        MANAGER,
        "BlockManager.swap_in",
        "sequence.block_table",
        "reversed(sequence.block_table)",
    ),
    Bug(
        "swapping in leaks the second tier's blocks",
        MANAGER,
        "BlockManager.swap_in",
        "for slot in reversed(sequence.swap_table):\n    self._release_swap(slot)",
    ),
    Bug(
        "a swapped sequence that ends leaks the second tier's blocks",
        MANAGER,
        "BlockManager.free",
        "for slot in sequence.swap_table:\n    self._release_swap(slot)",
    ),
    Bug(
        "the second tier is used beyond its size",
        MANAGER,
        "BlockManager.can_swap_out",
        "self._free_swap.size",
        "self._free_swap.size + 1",
    ),
    Bug(
        "a reset leaves something in the cache",
        CACHE,
        "PrefixCache.clear",
        "list(self)",
        "list(self)[1:]",
    ),
    Bug(
        "who observes the cache is told that a block follows none",
        CACHE,
        "PrefixCache._note_added",
        "self._hashes[before]",
        "None",
    ),
    Bug(
        "who observes the cache does not hear of what is forgotten",
        CACHE,
        "PrefixCache._note_removed",
        "self.observer.removed(self._hashes[block], int(is_offloaded))",
        "pass",
    ),
    Bug(
        "after a reset, chains are continued behind blocks that nobody can find",
        MANAGER,
        "BlockManager._offer_blocks",
        "before != ROOT and before not in self._cache",
        "False",
    ),
    Bug(
        "a block is given back that the next token still sees",
        WINDOW,
        "BlockWindow.num_behind",
        "num_computed // self._block_size - self._num_kept",
        "num_computed // self._block_size - self._num_kept + 1",
    ),
    Bug(
        "a window counts the next token twice",
        WINDOW,
        "BlockWindow.__init__",
        "-(-(tokens - 1) // block_size)",
        "(tokens - 1) // block_size",
    ),
    Bug(
        "nothing is left for the prefix cache to follow",
        WINDOW,
        "BlockWindow.__init__",
        "max(1, -(-(tokens - 1) // block_size))",
        "-(-(tokens - 1) // block_size)",
    ),
    Bug(
        "a block behind the window is kept",
        WINDOW,
        "BlockWindow.num_behind",
        "num_computed // self._block_size - self._num_kept",
        "num_computed // self._block_size - self._num_kept - 1",
    ),
    Bug(
        "a chunk that begins within a block has no room",
        WINDOW,
        "BlockWindow.most_blocks",
        "self._num_kept + 1 + -(-max_chunk // self._block_size)",
        "self._num_kept + -(-max_chunk // self._block_size)",
    ),
    Bug(
        "a block that is given back stays referenced",
        MANAGER,
        "BlockManager._give_back",
        "self._release((table[index],))",
    ),
    Bug(
        "a block that is given back stays in the table",
        MANAGER,
        "BlockManager._give_back",
        "table[index] = GIVEN_BACK",
        "pass",
    ),
    Bug(
        "nobody is told that a block was given back",
        MANAGER,
        "BlockManager._give_back",
        "self._note_change(sequence, index)",
    ),
    Bug(
        "blocks behind the window are given back first to last",
        MANAGER,
        "BlockManager._begin_table",
        "reversed(prefix[:behind])",
        "prefix[:behind]",
    ),
    Bug(
        "a hit does not count as use of what lies behind the window",
        MANAGER,
        "BlockManager._begin_table",
        "free.append(number)",
        "free.prepend(number)",
    ),
    Bug(
        "what a hit holds behind the window counts as needed",
        MANAGER,
        "BlockManager.can_allocate",
        "prefix[behind:]",
        "prefix",
    ),
    Bug(
        "a fork counts references to blocks that were given back",
        MANAGER,
        "BlockManager.fork",
        "child.block_table[self.window.num_behind(num_tokens):]",
        "child.block_table",
    ),
    Bug(
        "a fork misses blocks that its parent has given back",
        MANAGER,
        "BlockManager.can_fork",
        "behind(num_tokens) == behind(parent.num_computed_tokens)",
        "True",
    ),
    Bug(
        "swapping out moves blocks that were given back",
        MANAGER,
        "BlockManager.swap_out",
        "self.window.num_behind(num_computed)",
        "0",
    ),
    Bug(
        "swapping in counts from the first block of the sequence",
        MANAGER,
        "BlockManager.swap_in",
        "sequence.block_table[behind:]",
        "sequence.block_table",
    ),
    Bug(
        "swapping in moves cached blocks as if none were behind the window",
        MANAGER,
        "BlockManager.swap_in",
        "max(0, len(prefix) - behind)",
        "len(prefix)",
    ),
    Bug(
        "what follows an evicted block is remembered",
        CACHE,
        "PrefixCache.forget",
        "rest.extend(self.followers(block))",
    ),
    Bug(
        "forgotten blocks are taken last",
        MANAGER,
        "BlockManager._forget",
        "free.prepend(number)",
        "free.append(number)",
    ),
    Bug(
        "what is evicted is not moved to the second tier",
        MANAGER,
        "BlockManager._evict",
        "self.transfers.append(Transfer(TransferKind.OFFLOAD, block, slot, None))",
    ),
    Bug(
        "what is hit in the second tier is not moved back",
        MANAGER,
        "BlockManager._load",
        "self.transfers.append(Transfer(TransferKind.LOAD, place - self.num_blocks, block, sequence))",
    ),
    Bug(
        "what is moved back is still found in the second tier",
        MANAGER,
        "BlockManager._load",
        "self._cache.move(place, block)",
        "pass",
    ),
    Bug(
        "loading leaks the second tier's blocks",
        MANAGER,
        "BlockManager._load",
        "for index in reversed(offloaded):\n    self._release_swap(prefix[index] - self.num_blocks)",
    ),
    Bug(
        "the most recently offloaded makes room in the second tier",
        MANAGER,
        "BlockManager._release_swap",
        "self._free_swap.append(slot)",
        "self._free_swap.prepend(slot)",
    ),
    Bug(
        "swapped sequences overwrite what the second tier has of the cache",
        MANAGER,
        "BlockManager._take_swap",
        "self.stats.evictions += self.block_size * self._forget(place)",
        "pass",
    ),
    Bug(
        "what is computed again is still found in the second tier",
        MANAGER,
        "BlockManager._offer_blocks",
        "self._free_swap.prepend(known - self.num_blocks)",
        "self._free_swap.append(known - self.num_blocks)",
    ),
    Bug(
        "blocks that follow one that moves lose it",
        CACHE,
        "PrefixCache.move",
        "self._before[block] = target",
        "pass",
    ),
    Bug(
        "a block that moves is not followed any more",
        CACHE,
        "PrefixCache.move",
        "lists.add(block, target)",
        "pass",
    ),
    Bug(
        "what could not be written to the second tier is read",
        MANAGER,
        "BlockManager.give_up_offloading",
        "b >= self.num_blocks",
        "False",
    ),
    Bug(
        "who shares what could not be loaded goes on",
        SCHEDULER,
        "Scheduler.transfer_failed",
        "self.block_manager.give_up_offloading(transfer)",
        "[] if self.block_manager.give_up_offloading(transfer) is None else []",
    ),
    Bug(
        "after a failure the second tier goes on to take what is evicted",
        MANAGER,
        "BlockManager.give_up_offloading",
        "self.offloads = False",
        "pass",
    ),
    Bug(
        "a chain is continued behind a block that was given back",
        MANAGER,
        "BlockManager._offer_blocks",
        "before == GIVEN_BACK or (before != ROOT and before not in self._cache)",
        "before != ROOT and before not in self._cache",
    ),
    Bug(
        "with a window a prompt takes all its blocks at once",
        SCHEDULER,
        "Scheduler._give_blocks",
        "num_tokens = min(num_tokens, most * manager.block_size)",
    ),
    Bug(
        "with a window a prompt grows by all its blocks at once",
        SCHEDULER,
        "Scheduler._make_room_for",
        "num_tokens = min(num_tokens, sequence.num_computed_tokens + self._max_chunk)",
        "pass",
    ),
    Bug(
        "more sequences are guaranteed their blocks than there are blocks",
        SCHEDULER,
        "Scheduler._can_guarantee",
        "needed <= self.block_manager.num_blocks",
        "True",
    ),
    Bug(
        "blocks are given back only where there is a prefix cache",
        MANAGER,
        "BlockManager.__init__",
        "enable_prefix_caching or window > 0",
        "enable_prefix_caching",
    ),
    Bug(
        "a swap is priced as if nothing had been given back",
        SCHEDULER,
        "Scheduler._preempt",
        "manager.held_blocks(computed)",
        "manager.blocks_for(computed)",
    ),
    Bug(
        "the budget counts chunks but no decodes",
        SCHEDULER,
        "Scheduler._schedule_prefills",
        "limits.max_num_batched_tokens - len(batch.sequences)",
        "limits.max_num_batched_tokens",
    ),
    Bug(
        "one chunk may take the whole budget",
        SCHEDULER,
        "Scheduler._schedule_chunk",
        "min(remaining, budget, limits.max_prefill_chunk, slots)",
        "min(remaining, budget, slots)",
    ),
    Bug(
        "more sequences run than the budget has tokens",
        SCHEDULER,
        "Scheduler.__init__",
        "min(config.max_num_seqs, config.max_num_batched_tokens)",
        "config.max_num_seqs",
    ),
    Bug(
        "blocks that were taken from one are given to a later one in the same step",
        SCHEDULER,
        "Scheduler.schedule",
        "not batch.preempted or all(preempted.needed_by is None for preempted in batch.preempted)",
        "True",
    ),
    Bug(
        "a new sequence is admitted past one that does not fit",
        SCHEDULER,
        "Scheduler._admit",
        "if prefix is None:\n    return",
        "if prefix is None:\n"
        "    self.waiting.remove(sequence)\n"
        "    self.waiting.push(sequence, self.stats)\n"
        "    others = [s for s in self.waiting if s is not sequence]\n"
        "    if not others or (prefix := self._give_blocks(others[0])) is None:\n"
        "        return\n"
        "    sequence, was = others[0], others[0].status",
    ),
    Bug(
        "the watermark is ignored",
        SCHEDULER,
        "Scheduler._give_blocks",
        "self._watermark if self.running else 0",
        "0",
    ),
    Bug(
        "the watermark holds when nothing runs",
        SCHEDULER,
        "Scheduler._give_blocks",
        "self._watermark if self.running else 0",
        "self._watermark",
    ),
    Bug(
        "one that did not fit is not looked at again when blocks become free",
        SCHEDULER,
        "Scheduler._is_still_blocked",
        "num_releases == manager.num_releases",
    ),
    Bug(
        "one that did not fit is not looked at again when its prefix becomes known",
        SCHEDULER,
        "Scheduler._is_still_blocked",
        "not manager.prefix_grew(sequence, prefix)",
    ),
    Bug(
        "preemptions are not bounded",
        SCHEDULER,
        "Scheduler._is_guaranteed",
        "sequence.num_preemptions >= self.max_preemptions",
        "False",
    ),
    Bug(
        "one that may not be preempted again is",
        SCHEDULER,
        "Scheduler._make_room_for",
        "[s for s in self.running if not self._is_guaranteed(s)]",
        "list(self.running)",
    ),
    Bug(
        "one that may not be preempted again gets blocks for its present tokens only",
        SCHEDULER,
        "Scheduler._give_blocks",
        "num_tokens = max(num_tokens, sequence.max_len - 1)",
    ),
    Bug(
        "a preempted sequence's computed tokens are kept without their blocks",
        MANAGER,
        "BlockManager.free",
        "sequence.num_computed_tokens = 0",
    ),
    Bug(
        "a preempted sequence stays in the batch",
        SCHEDULER,
        "Scheduler.schedule",
        "[s for s in decodes if s.block_table] if batch.preempted else decodes",
        "decodes",
    ),
    Bug("a sequence aborted while it was computed gets its token", SCHEDULER, "Scheduler.commit", "new = ()"),
    Bug(
        "the token of a sequence aborted while it was computed goes to the next",
        BATCH,
        "ScheduledBatch.by_sequence",
        "samples",
        "samples and sequence.block_table",
    ),
    Bug(
        "an aborted fork gets its parent's blocks",
        SCHEDULER,
        "Scheduler._commit_forks",
        "child.group is None or child.group is not parent.group",
        "False",
    ),
    Bug(
        "the forks of one that is given up are lost",
        SCHEDULER,
        "Scheduler.abort",
        "self.waiting.push(successor, self.stats)",
    ),
    Bug(
        "a fork whose beginning differs shares blocks",
        SCHEDULER,
        "Scheduler._share",
        "parent.token_ids[:num_shared] != child.token_ids[:num_shared]",
    ),
    Bug(
        "a fork shares blocks that are not computed",
        SCHEDULER,
        "Scheduler._share",
        "not 0 < num_shared <= parent.num_computed_tokens",
    ),
    Bug(
        "swap moves are lost when they follow a copy",
        MANAGER,
        "BlockManager.swap_out",
        "self.transfers.append",
        "self.transfers.appendleft",
    ),
    Bug(
        "auto takes the dearer way",
        SCHEDULER,
        "Scheduler._preempt",
        "swap_s < recompute_s",
        "swap_s > recompute_s",
    ),
    Bug(
        "swapping counts one way",
        SCHEDULER,
        "Scheduler._preempt",
        "2 * manager.held_blocks(computed)",
        "manager.held_blocks(computed)",
    ),
    Bug(
        "recompute swaps",
        SCHEDULER,
        "Scheduler._preempt",
        "self.preemption is Preemption.SWAP",
        "self.preemption is not Preemption.AUTO",
    ),
    Bug(
        "what could not be moved counts as computed",
        SCHEDULER,
        "Scheduler.transfer_failed",
        "self.block_manager.free(sequence)",
        "computed = sequence.num_computed_tokens\n"
        "self.block_manager.free(sequence)\n"
        "sequence.num_computed_tokens = computed",
    ),
    Bug(
        "what could not be moved is computed from garbage in this step",
        SCHEDULER,
        "Scheduler.transfer_failed",
        "batch.discard(sequence)",
    ),
    Bug(
        "an output may be one token too long",
        SCHEDULER,
        "Scheduler._finish_if_ended",
        "len(sequence.token_ids) >= sequence.max_len",
        "len(sequence.token_ids) > sequence.max_len",
    ),
    Bug(
        "a stop token counts before min_tokens",
        SCHEDULER,
        "Scheduler._finish_if_ended",
        "sequence.num_output_tokens > params.min_tokens",
    ),
    Bug(
        "swapped sequences wait behind new ones",
        QUEUE,
        "WaitingQueue.push",
        "_SWAPPED if swapped else _ORDINARY",
        "_ORDINARY",
    ),
    Bug(
        "equal keys go by the order of pushing instead of arrival",
        QUEUE,
        "WaitingQueue.push",
        "(*self._policy.order(sequence, stats), sequence.arrival_index)",
        "self._policy.order(sequence, stats)",
    ),
    Bug("the oldest makes way", POLICIES, "SchedulingPolicy.victim", "max", "min"),
    Bug("the oldest makes way where nobody is asked", CHECKED, "CheckedPolicies.victim", "max", "min"),
    Bug(
        "ageing makes the long wait longer",
        POLICIES,
        "ShortestJob.order",
        "sequence.max_len + self.AGEING_TOKENS * sequence.arrival_time",
        "sequence.max_len - self.AGEING_TOKENS * sequence.arrival_time",
    ),
    Bug(
        "an idle tenant saves up credit",
        POLICIES,
        "Fair.on_add",
        "self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)",
        "self.counters.setdefault(tenant, 0.0)",
    ),
    Bug(
        "a tenant pays for prompts alone",
        POLICIES,
        "Fair.on_commit",
        "count + self.DECODE_WEIGHT * num_sampled",
        "count",
    ),
    Bug(
        "a policy's mistake is raised in every step",
        CHECKED,
        "CheckedPolicies.raise_error",
        "self._errors.pop(0)",
        "self._errors[0]",
    ),
    Bug("not a number is taken for an order", CHECKED, "_as_key", "part == part"),
    Bug(
        "a block that others follow may be given up before them",
        RANKED,
        "RankedBlocks._may_go",
        "self._all_are_candidates or not self._cache.is_followed(block)",
        "True",
    ),
    Bug(
        "a block is not offered when the last one that followed it is forgotten",
        RANKED,
        "RankedBlocks.lost_follower",
        "self._offer(block)",
    ),
    Bug(
        "a policy sees the cached prefix as it was when it asked first",
        MANAGER,
        "BlockManager.num_cached_tokens",
        "while count < most:\n"
        "    following = self._find(sequence, count, block)\n"
        "    if following is None:\n"
        "        break\n"
        "    count, block = (count + 1, following)",
    ),
    Bug(
        "one that is shed goes on to wait",
        SCHEDULER,
        "Scheduler._let_in",
        "self.abort(one, FinishReason.SHED)",
    ),
    Bug(
        "those that are held back wait for ever where nothing else is to be done",
        SCHEDULER,
        "Scheduler._let_in",
        "self.waiting.push(self._held.pop(first), self.stats)",
    ),
    Bug(
        "a budget beyond the settings is kept to",
        CHECKED,
        "CheckedPolicies.budget",
        "min(parts[0], most[0])",
        "parts[0]",
    ),
    Bug(
        "a reference that is given back is still counted",
        MANAGER,
        "BlockManager._release",
        "num_references += 1",
    ),
    Bug(
        "a fork's shared blocks are not counted in the report",
        MANAGER,
        "BlockManager.fork",
        "self._num_references += len(held)",
    ),
    Bug(
        "a block that is partly shared counts as full in the report",
        MANAGER,
        "BlockManager.fork",
        "self._partly_shared.add(child.block_table[-1])",
    ),
    Bug(
        "slots that one sharer has written count as unwritten",
        USAGE,
        "_num_counted_too_often",
        "max",
        "min",
    ),
    Bug(
        "a swapped sequence that comes back still counts as swapped",
        MANAGER,
        "BlockManager.swap_in",
        "del self._swapped[sequence.seq_id]",
    ),
    Bug(
        "nobody is told that a block was exchanged for a copy",
        MANAGER,
        "BlockManager.grow",
        "self._note_change(sequence, index)",
    ),
    Bug(
        "nobody is told that a table grew",
        MANAGER,
        "BlockManager.grow",
        "self._note_change(sequence, len(table))",
    ),
    Bug(
        "the last change of a table hides an earlier one",
        MANAGER,
        "BlockManager._note_change",
        "changed.get(sequence, index) >= index",
        "changed.get(sequence, index) <= index",
    ),
    Bug(
        "several tokens get one slot",
        MANAGER,
        "BlockManager.grow",
        "num_tokens = num_tokens or len(sequence.token_ids)",
        "num_tokens = sequence.num_computed_tokens + 1",
    ),
    Bug(
        "a copy is not counted among the blocks that growing takes",
        MANAGER,
        "BlockManager.can_grow",
        "max(0, num_new) + self.needs_copy(sequence)",
        "max(0, num_new)",
    ),
    Bug(
        "a transfer that is done is done again in a step that begins anew",
        MANAGER,
        "BlockManager.transferred",
        "self.transfers.popleft()",
    ),
    Bug(
        "what is moved is given to the driver in no order",
        SCHEDULER,
        "Scheduler.schedule",
        "batch.transfers += self.block_manager.transfers",
        "batch.transfers += reversed(self.block_manager.transfers)",
    ),
    Bug("tokens behind one that ends a sequence are kept", SCHEDULER, "Scheduler.commit", "break"),
    Bug(
        "tokens behind an end count as given",
        SCHEDULER,
        "Scheduler.commit",
        "num_dropped += computed + len(new) - len(own)",
    ),
    Bug(
        "several tokens at once count as computed",
        SCHEDULER,
        "Scheduler.schedule",
        "self._make_room(prefills, batch)",
    ),
    Bug(
        "a fork with several tokens shares what nobody has computed",
        SCHEDULER,
        "Scheduler._commit_forks",
        "self._share(parent, child, num_shared)",
        "self._share(parent, child, child.num_tokens - 1)",
    ),
    Bug(
        "swapping goes on after a transfer has failed",
        SCHEDULER,
        "Scheduler.transfer_failed",
        "self.preemption = Preemption.RECOMPUTE",
    ),
    Bug(
        "a tenant pays for one token of several",
        POLICIES,
        "Fair.on_commit",
        "sum(map(len, islice(given, num_samples)))",
        "len(list(islice(given, num_samples)))",
    ),
    Bug(
        "the last of equal scores goes first",
        EXPERTS,
        "_take_best",
        "x[i] > x[best]",
        "x[i] >= x[best]",
        ROUTING,
    ),
    Bug("an expert is chosen twice", EXPERTS, "_take_best", "free[best] = 0.0", suite=ROUTING),
    Bug(
        "the bias that experts are chosen by weighs them, too",
        EXPERTS,
        "choose_experts",
        "weights[rank] = scores[chosen[rank]]",
        "weights[rank] = selection[chosen[rank]]",
        ROUTING,
    ),
    Bug(
        "weights are renormalised where they are not to be",
        EXPERTS,
        "choose_experts",
        "if features.renormalize:\n    divisor = np.float32(0.0)\n    for rank in range(k):\n"
        "        divisor += weights[rank]\n    divisor = max(divisor, np.float32(features.score_floor))",
        "divisor = np.float32(0.0)\nfor rank in range(k):\n    divisor += weights[rank]",
        ROUTING,
    ),
    Bug(
        "a sum of scores below the floor is divided by",
        EXPERTS,
        "choose_experts",
        "divisor = max(divisor, np.float32(features.score_floor))",
        suite=ROUTING,
    ),
    Bug(
        "weights are not scaled",
        EXPERTS,
        "choose_experts",
        "features.router_scale",
        "1.0",
        ROUTING,
    ),
    Bug(
        "the softmax of the chosen is left out",
        EXPERTS,
        "choose_experts",
        "features.router == TOP_SOFTMAX",
        "False",
        ROUTING,
    ),
    Bug(
        "experts of all groups are free",
        EXPERTS,
        "_free_best_groups",
        "1.0 - free[i // size]",
        "1.0",
        ROUTING,
    ),
    Bug(
        "as many groups stay as a token has experts",
        EXPERTS,
        "_free_best_groups",
        "features.groups_per_token",
        "min(features.experts_per_token, count)",
        ROUTING,
    ),
    Bug(
        "two experts share a group of packed rows",
        EXPERTS,
        "group_rows",
        "slot += padded_rows(rows)",
        "slot += rows",
        ROUTING,
    ),
    Bug("all rows of an expert get one slot", EXPERTS, "group_rows", "next_slot[expert] += 1", suite=ROUTING),
    Bug(
        "the last expert's rows count as the most",
        EXPERTS,
        "group_rows",
        "max(most, rows)",
        "rows",
        ROUTING,
    ),
    Bug(
        "all rows meet the first expert's matrix",
        MATMUL,
        "expert_matmul",
        "expert * num_panels + panel",
        "panel",
        PRODUCTS,
    ),
    Bug(
        "all experts have the first one's bias",
        MATMUL,
        "expert_matmul",
        "own_biases * expert * num_panels + panel",
        "panel",
        PRODUCTS,
    ),
    Bug(
        "rows beyond the first ones of an item are left out",
        MATMUL,
        "expert_matmul",
        "slot * row_words",
        "groups.first_slot[index] * row_words",
        PRODUCTS,
    ),
    Bug(
        "what a token's experts give is added up unweighted",
        PHASES,
        "_sum_of_experts",
        "groups.weights[i]",
        "np.float32(1.0)",
        STEP,
    ),
    Bug(
        "experts replace what the feed-forward beside them gave",
        PHASES,
        "_sum_of_experts",
        "if accumulate:\n    total = load(out, start + column) + total",
        suite=STEP,
    ),
    Bug(
        "router and experts read what the feed-forward beside them reads",
        ARCHITECTURE,
        "lay_out",
        "not arch.layers[index]['expert_norms']",
        "True",
        STEP,
    ),
    Bug(
        "what the feed-forward beside the experts gives is added as it is",
        PHASES,
        "combine_experts",
        "out[start + i] = member.scratch[i]",
        suite=STEP,
    ),
    Bug(
        "what an expert gives is multiplied by the number of its rank",
        PHASES,
        "route_rows",
        "groups.chosen[i]",
        "i - row * k",
        STEP,
    ),
    Bug(
        "the router's logits stay as they are",
        PHASES,
        "route_rows",
        "work.router[i] *= np.float32(features.logit_scale)",
        suite=STEP,
    ),
    Bug(
        "values stay as they are",
        PHASES,
        "rotate_and_store",
        "features.value_norm",
        "False",
        STEP,
    ),
    Bug(
        "a layer's number is for what it adds alone",
        PHASES,
        "add_branch",
        "sum_scale != 1.0",
        "False",
        STEP,
    ),
    Bug(
        "zero points of GPTQ's first version are one too small",
        GPTQ,
        "read_gptq",
        "1 if version == 'gptq' else 0",
        "0",
        VALUES,
    ),
    Bug(
        "AWQ's levels are taken in the order of their places",
        NIBBLES,
        "Words._of_outputs",
        "fields = fields[..., _AWQ_PLACES]",
        suite=VALUES,
    ),
    Bug(
        "zero points that a symmetric matrix must not have are passed over",
        NIBBLES,
        "Words.read",
        "(zeros != 8).any()",
        "False",
        suite=REFUSALS,
    ),
    Bug(
        "levels of four bits are taken lower half first",
        TABLES,
        "TableMatrix.read",
        "fields[::2], fields[1::2] = raw >> 4, raw & 15",
        "fields[::2], fields[1::2] = raw & 15, raw >> 4",
        VALUES,
    ),
    Bug(
        "what doubly quantized scales are short of is not added",
        TABLES,
        "TableMatrix._scales",
        "floats(self.nested_table)[levels] * nested + np.float32(self.state.nested_offset)",
        "floats(self.nested_table)[levels] * nested",
        VALUES,
    ),
    Bug(
        "rows read later have the scales of the first ones",
        BYTES,
        "ByteMatrix.read",
        "np.arange(start, stop) // rows",
        "np.arange(stop - start) // rows",
        VALUES,
    ),
    Bug(
        "inputs stay in the order of the file though their groups do not",
        "engine/execution/weights.py",
        "_kept_blocks",
        "levels = levels[:, order]",
        suite=KEPT,
    ),
    Bug(
        "matrices whose inputs are in different orders share their activations",
        "engine/execution/weights.py",
        "_in_order",
        "name in _ORDERED_PARTS and same",
        "name in _ORDERED_PARTS",
        REFUSALS,
    ),
    Bug(
        "zero points lie in the order of blocks, not of groups",
        "kernels/encoding.py",
        "_spread",
        "np.arange(count) * inputs // group_size",
        "np.arange(count)",
        KEPT,
    ),
    Bug(
        "a module that the configuration excludes must be quantized",
        MODULES,
        "Modules.check",
        "not excluded(module)",
        suite=REFUSALS,
    ),
    Bug(
        "the rotated key beside the latents is not rotated",
        LATENT,
        "keep_latents",
        "_rotate(weights, features, plan.positions[row], kept, work)",
        suite=LATENT_STEP,
    ),
    Bug(
        "latents are kept as they are, without their norm",
        LATENT,
        "keep_latents",
        "for i in range(latent):\n    work.wide[kept + rotary + i] = member.scratch[i]",
        suite=LATENT_STEP,
    ),
    Bug(
        "the part of a query that meets the latents is not scaled by its position",
        LATENT,
        "split_queries",
        "work.wide[query + i] * scale",
        "work.wide[query + i]",
        LATENT_STEP,
    ),
    Bug(
        "sums of latents are packed from the first head on, each over the next one's",
        LATENT,
        "merge_latents",
        "range(heads - 1, -1, -1)",
        "range(heads)",
        LATENT_STEP,
    ),
    Bug(
        "values of latent attention are the first part of its keys",
        "kernels/attention.py",
        "_attend_chunk",
        "heads.value_start // per_word",
        "0",
        LATENT_STEP,
    ),
    Bug(
        "the latent products of all heads read the first one's input",
        MATMUL,
        "stacked_matmul",
        "x_start += index * input_words",
        suite=("tests/kernels/test_matmul.py", "-k", "several_inputs and float32"),
    ),
    Bug(
        "latent keys are widened by the rows of values",
        "engine/models/latent.py",
        "sources",
        "(start, start + nope)",
        "(start + value, start + value + nope)",
        LATENT_MODELS,
    ),
    Bug(
        "scores of latent attention are multiplied by YaRN's magnitude once",
        "engine/models/hub_rope.py",
        "score_factor",
        "rope.yarn_magnitude(section.number('factor'), weight) ** 2",
        "rope.yarn_magnitude(section.number('factor'), weight)",
        LATENT_FILES,
    ),
    Bug(
        "a token of latent attention counts with values of its own",
        "kernels/architecture.py",
        "cached_value_dim",
        "0 if row['latent_dim'] > 0 else row['head_dim']",
        "row['head_dim']",
        LATENT_FILES,
    ),
    Bug(
        "latent layers that predict tokens further on must have a place",
        "engine/models/deepseek.py",
        "_without_prediction",
        "int(found[1]) in behind",
        "False",
        LATENT_FILES,
    ),
)


def unnoticed(bug: Bug) -> str | None:
    """Runs the suite on a copy with the bug; None if it fails, as it should."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for folder in ("pagellm", "engine", "kernels", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "fixtures")
            shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
        (copy / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")
        path = copy / bug.file
        try:
            path.write_text(bug.seeded(path.read_text("utf-8")), "utf-8")
        except LookupError as error:
            return str(error)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--assert=plain",  # that it fails is all; else half of a run is to prepare a better message
            "--hypothesis-profile=unshrunk",
        ]
        environment = os.environ | {"PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*command, *bug.suite],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return None  # it hangs: nobody would fail to notice
        if done.returncode == 1:
            return None
        return f"pytest ended with {done.returncode}\n{done.stdout[-500:]}{done.stderr[-500:]}"


def main() -> int:
    """Prints a line for each bug; the exit status is 1 if one went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only bugs whose name contains all of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if all(word in bug.name for word in options.words)]
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for bug, why in zip(bugs, pool.map(unnoticed, bugs), strict=True):
            survivors += why is not None
            print(f"caught: {bug.name}" if why is None else f"UNNOTICED: {bug.name}: {why}", flush=True)
    print(f"{len(bugs) - survivors} of {len(bugs)} bugs caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
