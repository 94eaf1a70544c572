"""What is asked of a row of logits: the row itself, log-probabilities, or a token that is sampled."""

import numpy as np

from pagellm.kernels.activation import softcap
from pagellm.kernels.jit import kernel, plain
from pagellm.kernels.sampling import apply_mask, has_softmax, log_sum_exp, penalize, sample, top_tokens


@kernel
def answer_row(arch, outputs, row, logits, scratch, counts):
    """Does what `outputs` asks of one row of logits, [padded vocab_size], which it may overwrite.

    scratch: [3, padded vocab_size]; counts: [vocab_size], zeros.
    """
    size, wanted = arch.vocab_size, outputs.wanted[row]
    if arch.logits_scale != 1.0:
        for i in range(size):
            logits[i] *= np.float32(arch.logits_scale)
    if arch.logits_softcap > 0.0:
        softcap(logits, plain(0), size, np.float32(arch.logits_softcap))
    if wanted.logits_row >= 0:
        copied = outputs.logits[wanted.logits_row]
        for i in range(size):
            copied[i] = logits[i]
    num_logprobs, target = wanted.num_logprobs, wanted.target
    if target >= 0 and num_logprobs < 0:
        return
    raw_logits, normalizer = scratch[2], 0.0
    if num_logprobs >= 0:
        normalizer = log_sum_exp(logits, size, scratch[0])
        ids = outputs.top_ids[row, :num_logprobs]
        top_tokens(logits, size, ids)
        for i in range(ids.size):
            outputs.top_logprobs[row, i] = logits[ids[i]] - normalizer
    if target >= 0:
        outputs.logprobs[row] = logits[target] - normalizer
        return
    if not has_softmax(logits, size):
        outputs.tokens[row] = -1
        return
    if num_logprobs >= 0:
        for i in range(size):
            raw_logits[i] = logits[i]
    history = outputs.history[outputs.history_start[row] : outputs.history_start[row + 1]]
    if history.size > 0:
        penalize(
            logits, history, wanted.prompt_len, np.float32(wanted.repetition), np.float32(wanted.frequency),
            np.float32(wanted.presence), counts,
        )  # fmt: skip
    for i in range(outputs.bias_start[row], outputs.bias_start[row + 1]):
        logits[outputs.bias_ids[i]] += outputs.bias_values[i]
    if wanted.mask_row >= 0:
        apply_mask(logits, size, outputs.masks[wanted.mask_row])
    token = sample(
        logits, size, np.float32(wanted.temperature), wanted.top_k, wanted.top_p, np.float32(wanted.min_p),
        np.uint64(wanted.seed), np.uint64(wanted.position), scratch[0], scratch[1],
    )  # fmt: skip
    outputs.tokens[row] = token
    if num_logprobs >= 0 and token >= 0:
        outputs.logprobs[row] = raw_logits[token] - normalizer
