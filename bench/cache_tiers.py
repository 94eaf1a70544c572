"""What a second tier of the prefix cache gains: the time to the first token of prompts that come again.

Prompts that do not fit into the cache together are served one after the other, in rounds: computed each time,
loaded from a second tier in memory or in a file, or found in one large cache. The answers must be the same.

Run: python bench/cache_tiers.py [--model MODEL] [--prompts N] [--tokens N] [--dir DIR] [--json].
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagellm import LLM, SamplingParams

BLOCK_SIZE, ROUNDS = 16, 4
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=640, help="of each prompt")
    parser.add_argument("--dir", default="/var/tmp", help="where the file of the second tier is")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    of_one = -(-(options.tokens + 4) // BLOCK_SIZE)
    all_blocks = options.prompts * of_one
    tier = {"enable_hierarchical_cache": True, "num_swap_blocks": all_blocks, "preemption": "recompute"}
    ways: dict[str, dict[str, Any]] = {
        "computed each time": {},
        "second tier in memory": tier,
        "second tier in a file": tier | {"swap_dir": options.dir},
        "all in the first tier": {"num_blocks": all_blocks + of_one},
    }
    served = {way: serve(options, {"num_blocks": of_one + of_one // 2} | ways[way]) for way in ways}
    answers = {json.dumps(one["token_ids"]) for one in served.values()}
    assert len(answers) == 1, "the answers differ"
    rows = [{"way": way, "ttft_s": one["ttft_s"], "host": one["host"]} for way, one in served.items()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['way']:<24}{1e3 * row['ttft_s']:>8.1f} ms to the first token, {row['host']:.0%} host hits"
        )


def serve(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The median of all rounds but the first, the share of tokens from the second tier, and the answers."""
    llm = LLM(
        options.model,
        block_size=BLOCK_SIZE,
        max_model_len=options.tokens + 4,
        show_progress=False,
        **settings,
    )
    prompts = [[(37 * i + 11 * j) % 900 + 5 for j in range(options.tokens)] for i in range(options.prompts)]
    outputs = [[llm.generate(prompt, PARAMS)[0] for prompt in prompts] for _ in range(ROUNDS)]
    llm.close()
    metrics = [output.metrics for outputs_of_round in outputs[1:] for output in outputs_of_round]
    return {
        "ttft_s": median(one.first_token_s or 0.0 for one in metrics),
        "host": sum(one.num_host_tokens for one in metrics) / (len(metrics) * options.tokens),
        "token_ids": [output.token_ids for outputs_of_round in outputs for output in outputs_of_round],
    }


if __name__ == "__main__":
    main()
