"""Searches for the scales with which blocks of weights lose least when they are rounded to few bits.

What a block loses is the sum of w * (x - x')^2 over its values x, what they become and how much each counts.
A value becomes `step * level - offset`, the level a whole number between bounds. Steps and offsets of a block
are whole numbers times two floats that it shares with the other blocks of its span, or are those floats.
The searches are those of llama.cpp's quantizers and beyond: the first tries stretched steps and fits each by
least squares; the second tries the neighbours of what that becomes in whole numbers.
"""

import numpy as np

from pagellm.kernels.jit import entry_point, kernel
from pagellm.kernels.simd import LANES, broadcast, load, maximum, nearest, reduce_add, where_at_least

# How far the number of levels is stretched on either side, and in how many steps.
_REACH = np.float32(1.0)
_STEPS = 10
# The second pass starts from the offset that the one before found.
_PASSES = 2


@kernel
def _levels(x, offset, inverse, lowest, highest):
    """The nearest levels of a vector of values, within the bounds."""
    level = maximum(nearest((x + offset) * inverse), lowest)
    return where_at_least(level, highest, highest, level)


@kernel
def _fit(values, weights, start, size, offset, inverse, lowest, highest):
    """Sums over a block of w * level, w * level^2 and w * level * x, for levels of a trial."""
    zero = broadcast(np.float32(0.0))
    sum_l, sum_ll, sum_lx = zero, zero, zero
    low, high = broadcast(np.float32(lowest)), broadcast(np.float32(highest))
    shift, factor = broadcast(np.float32(offset)), broadcast(np.float32(inverse))
    for i in range(start, start + size, LANES):
        x = load(values, i)
        level = _levels(x, shift, factor, low, high)
        weighted = load(weights, i) * level
        sum_l = sum_l + weighted
        sum_ll = sum_ll + weighted * level
        sum_lx = sum_lx + weighted * x
    return reduce_add(sum_l), reduce_add(sum_ll), reduce_add(sum_lx)


@kernel
def _loss(values, weights, start, size, step, offset, trial_offset, inverse, lowest, highest):
    """The loss of a block whose levels are those of a trial and whose step and offset are given."""
    total = broadcast(np.float32(0.0))
    low, high = broadcast(np.float32(lowest)), broadcast(np.float32(highest))
    shift, factor = broadcast(np.float32(trial_offset)), broadcast(np.float32(inverse))
    scale, minimum = broadcast(np.float32(step)), broadcast(np.float32(offset))
    for i in range(start, start + size, LANES):
        x = load(values, i)
        difference = scale * _levels(x, shift, factor, low, high) - minimum - x
        total = total + load(weights, i) * difference * difference
    return reduce_add(total)


@entry_point
def search_steps_and_offsets(values, weights, size, highest, steps, offsets):
    """Steps and offsets, none below zero, of blocks of `size` values whose levels are from 0 to `highest`.

    values, weights: [blocks * size] float32, size a multiple of `LANES`; steps, offsets: [blocks], out.
    """
    for block in range(steps.size):
        start = block * size
        least, greatest = np.float32(0.0), values[start]
        sum_w = sum_x = np.float32(0.0)
        for i in range(start, start + size):
            least, greatest = min(least, values[i]), max(greatest, values[i])
            sum_w += weights[i]
            sum_x += weights[i] * values[i]
        spread = greatest - least
        steps[block], offsets[block] = spread / np.float32(highest), -least
        if not spread > np.float32(0.0):
            continue
        best = np.float32(-np.inf)
        for _ in range(_PASSES):
            trial_offset = offsets[block]
            for trial in range(-_STEPS, _STEPS + 1):
                levels = np.float32(highest) + _REACH * np.float32(trial) / np.float32(_STEPS)
                inverse = levels / (greatest + trial_offset)
                sum_l, sum_ll, sum_lx = _fit(values, weights, start, size, trial_offset, inverse, 0, highest)
                determinant = sum_w * sum_ll - sum_l * sum_l
                if not determinant > np.float32(0.0):
                    continue
                step = (sum_w * sum_lx - sum_x * sum_l) / determinant
                offset = (sum_l * sum_lx - sum_ll * sum_x) / determinant
                if offset < np.float32(0.0):
                    step, offset = sum_lx / sum_ll, np.float32(0.0)
                # The loss is that of all zeros less this, for the step and the offset that fit best.
                gain = step * sum_lx - offset * sum_x
                if gain > best and step > np.float32(0.0):
                    best = gain
                    steps[block], offsets[block] = step, offset


@entry_point
def search_steps(values, weights, size, lowest, steps):
    """Steps of blocks of `size` values whose levels are from `lowest`, below 0, to `-lowest - 1`.

    As `search_steps_and_offsets`, without offsets; a step may be negative, so that the value of greatest
    magnitude can have the lowest level.
    """
    for block in range(steps.size):
        start = block * size
        extreme = np.float32(0.0)
        for i in range(start, start + size):
            if abs(values[i]) > abs(extreme):
                extreme = values[i]
        steps[block] = np.float32(0.0)
        if extreme == np.float32(0.0):
            continue
        best = np.float32(-1.0)
        for trial in range(-_STEPS, _STEPS + 1):
            stretched = np.float32(lowest) + _REACH * np.float32(trial) / np.float32(_STEPS)
            inverse = stretched / extreme
            _, sum_ll, sum_lx = _fit(
                values, weights, start, size, np.float32(0.0), inverse, lowest, -lowest - 1
            )
            # The least loss is that of all zeros less this.
            if sum_ll > np.float32(0.0) and sum_lx * sum_lx / sum_ll > best:
                best = sum_lx * sum_lx / sum_ll
                steps[block] = sum_lx / sum_ll
        if best < np.float32(0.0):  # nothing in it counts
            steps[block] = extreme / np.float32(lowest)


@kernel
def _nearest_within(value, unit, lowest, highest):
    """`value / unit` as a whole number within bounds; 0 where there is no unit."""
    ratio = value / unit if unit != np.float32(0.0) else np.float32(0.0)
    ratio = min(max(ratio, np.float32(lowest)), np.float32(highest))
    return np.int64(np.rint(ratio))


@kernel
def _inverse(step):
    return np.float32(1.0) / step if step != np.float32(0.0) else np.float32(0.0)


@entry_point
def round_spans(
    values, weights, size, bounds, units, steps, offsets, levels, multiples, offset_multiples, losses, sums
):  # fmt: skip
    """Levels, and steps and offsets as multiples of the units of their span, so that little is lost.

    size: of a block; bounds: int64 [6], the lowest and highest of levels, of multiples of steps and of those
    of offsets; units: [spans, 2] float32 of steps and of offsets; steps, offsets: [spans, blocks], what they
    should be. Out: levels int16 [spans * blocks * size], multiples and offset_multiples int16
    [spans, blocks], losses float64 [spans]; sums float64 [spans, 5]: over the span's values, with a the level
    times the step's multiple, b the offset's multiple and x the value, of w times a * a, a * b, b * b, a * x
    and b * x: what better units follow from.
    """
    lowest, highest = bounds[0], bounds[1]
    for span in range(steps.shape[0]):
        unit, offset_unit = units[span, 0], units[span, 1]
        losses[span] = 0.0
        for i in range(5):
            sums[span, i] = 0.0
        for block in range(steps.shape[1]):
            start = (span * steps.shape[1] + block) * size
            middle = _nearest_within(steps[span, block], unit, bounds[2], bounds[3])
            offset_middle = _nearest_within(offsets[span, block], offset_unit, bounds[4], bounds[5])
            best, best_multiple, best_offset = np.float32(np.inf), middle, offset_middle
            for multiple in range(max(middle - 1, bounds[2]), min(middle + 1, bounds[3]) + 1):
                step = unit * np.float32(multiple)
                for other in range(max(offset_middle - 1, bounds[4]), min(offset_middle + 1, bounds[5]) + 1):
                    offset = offset_unit * np.float32(other)
                    loss = _loss(
                        values, weights, start, size, step, offset, offset, _inverse(step), lowest, highest
                    )
                    if loss < best:
                        best, best_multiple, best_offset = loss, multiple, other
            multiples[span, block], offset_multiples[span, block] = best_multiple, best_offset
            losses[span] += np.float64(best)
            inverse = _inverse(unit * np.float32(best_multiple))
            offset = offset_unit * np.float32(best_offset)
            for i in range(start, start + size):
                level = np.rint((values[i] + offset) * inverse)
                level = min(max(level, np.float32(lowest)), np.float32(highest))
                levels[i] = np.int64(level)
                a, b = np.float64(level) * np.float64(best_multiple), np.float64(best_offset)
                w, x = np.float64(weights[i]), np.float64(values[i])
                sums[span, 0] += w * a * a
                sums[span, 1] += w * a * b
                sums[span, 2] += w * b * b
                sums[span, 3] += w * a * x
                sums[span, 4] += w * b * x
