"""Seeds plausible bugs into the block manager, the scheduler and the policies, one at a time.

Runs the tests that should notice, and fails if a bug goes unnoticed.

Run: python -m tests.mutation [--jobs 2] [WORDS OF A BUG'S NAME ...]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The cases are quick, and most bugs do not get past them; what does, the laws must catch.
SUITE = (
    "tests/engine/test_block_manager.py",
    "tests/engine/test_scheduler.py",
    "tests/engine/test_policies.py",
    "tests/properties/test_block_manager.py",
    "tests/properties/test_scheduler.py",
)
MANAGER, CACHE, SCHEDULER, POLICIES = (
    f"engine/scheduling/{name}.py" for name in ("block_manager", "prefix_cache", "scheduler", "policies")
)
TIMEOUT_S = 300


@dataclass(frozen=True)
class Bug:
    """A change of one place; the code must read `before` there, and nowhere else in the file."""

    name: str
    file: str
    before: str
    after: str


BUGS = (
    Bug(
        "a reference count is not decremented for shared blocks",
        MANAGER,
        "        self._reference_counts[block] -= 1\n",
        "        self._reference_counts[block] -= self._reference_counts[block] == 1\n",
    ),
    Bug(
        "a fork does not count its references",
        MANAGER,
        "        for block in child.block_table:\n            self._reference_counts[block] += 1\n",
        "",
    ),
    Bug(
        "a cached block that is hit stays in the free list",
        MANAGER,
        "            self._free.remove(block)\n        self._reference_counts[block] += 1\n",
        "            pass\n        self._reference_counts[block] += 1\n",
    ),
    Bug(
        "a block is registered before its last token is computed",
        MANAGER,
        "        full = sequence.num_computed_tokens // self.block_size\n        for",
        "        full = (sequence.num_computed_tokens + 1) // self.block_size\n        for",
    ),
    Bug(
        "a hit is not confirmed against the tokens",
        CACHE,
        "                and self.tokens(block) == tokens\n",
        "",
    ),
    Bug(
        "a hit may follow another block",
        CACHE,
        "                and self._before[block] == before\n",
        "",
    ),
    Bug(
        "tenants with different salts share blocks",
        MANAGER,
        "self._root_hash(sequence.sampling_params.cache_salt)",
        "0",
    ),
    Bug(
        "the salt counts in the hash alone, so a collision tells a tenant what another one asked",
        CACHE,
        '                and (before != ROOT or self._salts.get(block, "") == salt)\n',
        "",
    ),
    Bug(
        "a block that is reused stays findable",
        MANAGER,
        "            self._cache.remove(block)\n            self.stats.evictions",
        "            self.stats.evictions",
    ),
    Bug(
        "a hash does not depend on the blocks before",
        MANAGER,
        "            previous = hashes[-1] if hashes else self",
        "            previous = self",
    ),
    Bug(
        "a parent is evicted before its child",
        MANAGER,
        "        for block in reversed(sequence.block_table):\n",
        "        for block in sequence.block_table:\n",
    ),
    Bug(
        "the most recently used block is evicted first",
        MANAGER,
        "                self._free.append(block)\n",
        "                self._free.prepend(block)\n",
    ),
    Bug(
        "cached blocks are evicted while others are free",
        MANAGER,
        "                self._free.prepend(block)\n",
        "                self._free.append(block)\n",
    ),
    Bug(
        "a prompt that is cached whole computes nothing",
        MANAGER,
        "else sequence.num_tokens - 1\n",
        "else sequence.num_tokens\n",
    ),
    Bug(
        "one who wants the prompt's logits reads the cache",
        MANAGER,
        "not (sequence.reads_cache or sequence.swap_table)",
        "False",
    ),
    Bug(
        "a free cached prefix counts as room for the rest",
        MANAGER,
        "- len(prefix) + reused + spare <=",
        "- len(prefix) + spare <=",
    ),
    Bug(
        "the copy of a shared block is skipped",
        MANAGER,
        "                transfer = Transfer(TransferKind.COPY, shared, table[index], sequence)\n",
        "",
    ),
    Bug(
        "a copy goes the wrong way",
        MANAGER,
        "Transfer(TransferKind.COPY, shared, table[index], sequence)",
        "Transfer(TransferKind.COPY, table[index], shared, sequence)",
    ),
    Bug(
        "a shared block is written in place",
        MANAGER,
        "        return self._reference_counts[table[index]] > 1 or self._knows(table[index])\n",
        "        return False\n",
    ),
    Bug(
        "a fork writes into a block that the cache knows",
        MANAGER,
        "        return self._reference_counts[table[index]] > 1 or self._knows(table[index])\n",
        "        return self._reference_counts[table[index]] > 1\n",
    ),
    Bug(
        "a parent goes on in the block that its fork shares",
        MANAGER,
        "        parent.num_slots = min(parent.num_slots, parent.num_computed_tokens)\n",
        "",
    ),
    Bug(
        "a fork counts its last token as computed",
        MANAGER,
        "        num_tokens = child.num_tokens - 1\n        full",
        "        num_tokens = child.num_tokens\n        full",
    ),
    Bug(
        "a block that was computed twice is kept twice",
        MANAGER,
        "            elif known != block:\n",
        "            elif False:\n",
    ),
    Bug(
        "swapping out forgets the last, partial block",
        MANAGER,
        "        for block in sequence.block_table[: self.blocks_for(sequence.num_computed_tokens)]:\n",
        "        for block in sequence.block_table[: sequence.num_computed_tokens // self.block_size]:\n",
    ),
    Bug(
        "swapped content comes back into the wrong blocks",
        MANAGER,
        "zip(sequence.swap_table, sequence.block_table, strict=False)\n",
        "zip(sequence.swap_table, reversed(sequence.block_table), strict=False)\n",
    ),
    Bug(
        "swapping in leaks the second tier's blocks",
        MANAGER,
        "        self._free_swap.extend(reversed(sequence.swap_table))\n",
        "",
    ),
    Bug(
        "a swapped sequence that ends leaks the second tier's blocks",
        MANAGER,
        "        self._free_swap.extend(sequence.swap_table)\n",
        "",
    ),
    Bug(
        "the second tier is used beyond its size",
        MANAGER,
        "<= len(self._free_swap)\n",
        "<= len(self._free_swap) + 1\n",
    ),
    Bug(
        "a reset leaves something in the cache",
        MANAGER,
        "        for block in list(self._cache):\n            self._cache.remove(block)\n",
        "        for block in list(self._cache)[1:]:\n            self._cache.remove(block)\n",
    ),
    Bug(
        "after a reset, chains are continued behind blocks that nobody can find",
        MANAGER,
        "            if before != ROOT and before not in self._cache:\n                break",
        "            if False:\n                break",
    ),
    Bug(
        "the budget counts chunks but no decodes",
        SCHEDULER,
        "        budget = self.max_num_batched_tokens - len(batch.sequences)\n",
        "        budget = self.max_num_batched_tokens\n",
    ),
    Bug(
        "one chunk may take the whole budget",
        SCHEDULER,
        "        count = min(remaining, budget, self.max_prefill_chunk)\n",
        "        count = min(remaining, budget)\n",
    ),
    Bug(
        "more sequences run than the budget has tokens",
        SCHEDULER,
        "min(config.max_num_seqs, config.max_num_batched_tokens)",
        "config.max_num_seqs",
    ),
    Bug(
        "blocks that were taken from one are given to a later one in the same step",
        SCHEDULER,
        "        if not batch.preempted:\n            self._admit(batch, budget)\n",
        "        self._admit(batch, budget)\n",
    ),
    Bug(
        "a new sequence is admitted past one that does not fit",
        SCHEDULER,
        "            if prefix is None:\n                return\n            self.waiting.remove(sequence)\n",
        "            if prefix is None:\n                self.waiting.remove(sequence)\n"
        "                self.waiting.push(sequence, self.stats)\n"
        "                others = [s for s in self.waiting if s is not sequence]\n"
        "                if not others or (prefix := self._give_blocks(others[0])) is None:\n"
        "                    return\n"
        "                sequence, was = others[0], others[0].status\n"
        "            self.waiting.remove(sequence)\n",
    ),
    Bug(
        "the watermark is ignored",
        SCHEDULER,
        "        spare = self._watermark if self.running else 0\n",
        "        spare = 0\n",
    ),
    Bug(
        "the watermark holds when nothing runs",
        SCHEDULER,
        "        spare = self._watermark if self.running else 0\n",
        "        spare = self._watermark\n",
    ),
    Bug(
        "one that did not fit is not looked at again when blocks become free",
        SCHEDULER,
        "        return num_releases == manager.num_releases and not manager.prefix_grew(sequence, prefix)\n",
        "        return not manager.prefix_grew(sequence, prefix)\n",
    ),
    Bug(
        "one that did not fit is not looked at again when its prefix becomes known",
        SCHEDULER,
        "        return num_releases == manager.num_releases and not manager.prefix_grew(sequence, prefix)\n",
        "        return num_releases == manager.num_releases\n",
    ),
    Bug(
        "preemptions are not bounded",
        SCHEDULER,
        "        return sequence.num_preemptions >= self.max_preemptions\n",
        "        return False\n",
    ),
    Bug(
        "one that may not be preempted again is",
        SCHEDULER,
        "            candidates = [s for s in self.running if not self._is_guaranteed(s)]\n",
        "            candidates = list(self.running)\n",
    ),
    Bug(
        "one that may not be preempted again gets blocks for its present tokens only",
        SCHEDULER,
        "            num_tokens = max(num_tokens, sequence.max_len - 1)  # the last token needs no slot\n",
        "            pass\n",
    ),
    Bug(
        "a preempted sequence's computed tokens are kept without their blocks",
        MANAGER,
        "        sequence.swap_table.clear()\n        sequence.num_computed_tokens = 0\n",
        "        sequence.swap_table.clear()\n",
    ),
    Bug(
        "a preempted sequence stays in the batch",
        SCHEDULER,
        "            decodes = [s for s in decodes if s.status is running]\n",
        "            pass\n",
    ),
    Bug(
        "a sequence aborted while it was computed gets its token",
        SCHEDULER,
        "            if token_id is not None and sequence.status is running:\n",
        "            if token_id is not None:\n",
    ),
    Bug(
        "the token of a sequence aborted while it was computed goes to the next",
        SCHEDULER,
        "            token_id = next(tokens) if samples else None\n",
        "            token_id = next(tokens) if samples and sequence.status is running else None\n",
    ),
    Bug(
        "an aborted fork gets its parent's blocks",
        SCHEDULER,
        "            if self._unborn.get(child.seq_id) is not parent:\n",
        "            if False:\n",
    ),
    Bug(
        "the forks of one that is given up are lost",
        SCHEDULER,
        "        self._finish(sequence, reason)\n        self._pass_on_forks(sequence)\n",
        "        self._finish(sequence, reason)\n",
    ),
    Bug(
        "a fork whose beginning differs shares blocks",
        SCHEDULER,
        "            or parent.token_ids[:num_shared] != child.token_ids[:num_shared]\n",
        "",
    ),
    Bug(
        "a fork shares blocks that are not computed",
        SCHEDULER,
        "            or not 0 < num_shared <= parent.num_computed_tokens\n",
        "",
    ),
    Bug(
        "swap moves are lost when they follow a copy",
        SCHEDULER,
        "            self._transfers.append(copy)\n",
        "            self._transfers.appendleft(copy)\n",
    ),
    Bug(
        "auto takes the dearer way",
        SCHEDULER,
        "swap_s < recompute_s",
        "swap_s > recompute_s",
    ),
    Bug(
        "swapping counts one way",
        SCHEDULER,
        "        swap_s = 2 * manager",
        "        swap_s = manager",
    ),
    Bug(
        "recompute swaps",
        SCHEDULER,
        "        swaps = self.preemption is Preemption.SWAP or (\n",
        "        swaps = self.preemption is not Preemption.AUTO or (\n",
    ),
    Bug(
        "what could not be moved counts as computed",
        SCHEDULER,
        "        self.block_manager.free(sequence)\n"
        "        self._wait(sequence, SequenceStatus.WAITING)\n\n    def check",
        "        computed = sequence.num_computed_tokens\n        self.block_manager.free(sequence)\n"
        "        sequence.num_computed_tokens = computed\n"
        "        self._wait(sequence, SequenceStatus.WAITING)\n\n    def check",
    ),
    Bug(
        "what could not be moved is computed from garbage in this step",
        SCHEDULER,
        "            self.running.remove(sequence)\n            batch.discard(sequence)\n",
        "            self.running.remove(sequence)\n",
    ),
    Bug(
        "an output may be one token too long",
        SCHEDULER,
        "        elif len(sequence.token_ids) >= sequence.max_len:\n",
        "        elif len(sequence.token_ids) > sequence.max_len:\n",
    ),
    Bug(
        "a stop token counts before min_tokens",
        SCHEDULER,
        "        if stops and sequence.num_output_tokens > params.min_tokens:\n",
        "        if stops:\n",
    ),
    Bug(
        "swapped sequences wait behind new ones",
        POLICIES,
        "_GUARANTEED if guaranteed else _SWAPPED if swapped else _ORDINARY\n",
        "_GUARANTEED if guaranteed else _ORDINARY\n",
    ),
    Bug(
        "equal keys go by the order of pushing instead of arrival",
        POLICIES,
        "        key = (*self._policy.order(sequence, stats), sequence.arrival_index)\n",
        "        key = self._policy.order(sequence, stats)\n",
    ),
    Bug(
        "the oldest makes way",
        POLICIES,
        "        return max(candidates, key=lambda s: (self.order(s, stats), s.arrival_index))\n",
        "        return min(candidates, key=lambda s: (self.order(s, stats), s.arrival_index))\n",
    ),
    Bug(
        "ageing makes the long wait longer",
        POLICIES,
        "        return sequence.max_len + self.AGEING_TOKENS * sequence.arrival_time\n",
        "        return sequence.max_len - self.AGEING_TOKENS * sequence.arrival_time\n",
    ),
    Bug(
        "an idle tenant saves up credit",
        POLICIES,
        "            self.counters[tenant] = max(self.counters.get(tenant, 0.0), least)\n",
        "            self.counters.setdefault(tenant, 0.0)\n",
    ),
    Bug(
        "a tenant pays for prompts alone",
        POLICIES,
        "+= count + self.DECODE_WEIGHT * num_sampled\n",
        "+= count\n",
    ),
    Bug(
        "a policy's mistake is raised in every step",
        POLICIES,
        "        error, self._error = self._error, None\n",
        "        error = self._error\n",
    ),
    Bug(
        "not a number is taken for an order",
        POLICIES,
        "isinstance(part, int | float) and part == part for part",
        "isinstance(part, int | float) for part",
    ),
)


def unnoticed(bug: Bug) -> str | None:
    """Runs the suite on a copy with the bug; None if it fails, as it should."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for folder in ("pagellm", "engine", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "fixtures")
            shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
        path = copy / bug.file
        code = path.read_text("utf-8")
        if code.count(bug.before) != 1:
            return f"its place occurs {code.count(bug.before)} times in {bug.file}, expected once"
        path.write_text(code.replace(bug.before, bug.after), "utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--hypothesis-profile=unshrunk",
        ]
        environment = os.environ | {"PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [*command, *SUITE],
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
