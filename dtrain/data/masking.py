"""Masked-token training: hide some tokens, and ask for them.

    tokens    the  cat  sat  on   the  mat      15 % are selected; of these
    inputs    the  [M]  sat  on   dog  mat        80 % are hidden, 10 % become any token, 10 % stay as they are
    targets    -1  cat   -1  -1   the   -1        -1: no loss here

Invariant: the mask of a sample depends on (seed, position in the run) alone: not on the batch it is in, nor on ranks.
Each pass over the data masks anew.
Reference: Devlin, Chang, Lee, Toutanova, "BERT" (NAACL 2019), section 3.1.
"""

import numpy as np

from dtrain import random
from dtrain.arrays import Array

IGNORED = -1


def masked(
    batch: dict[str, Array], seed: int, positions: Array, mask_token: int, rate: float = 0.15
) -> dict[str, Array]:
    """A batch for BERT from the inputs (B, T) of a batch of tokens; targets are -1 where nothing is asked.

    `positions` (B,) are the consumed positions of the samples, as given to the sampler. Random replacements are tokens
    below `mask_token`. At least one token of a sample is selected, so that a loss exists.
    """
    tokens = batch["inputs"]
    assert tokens.shape[0] == len(positions), f"{len(positions)} positions for {tokens.shape[0]} samples"
    inputs, targets = tokens.copy(), np.full_like(tokens, IGNORED)
    for row, position in enumerate(positions.tolist()):
        words = random.words(seed, "mask", position, count=2 * tokens.shape[1]).reshape(2, -1)
        chance = words[0] >> np.uint64(11)  # 53 bits, uniform, exact in float64
        selected = chance < rate * 2.0**53
        selected[np.argmin(chance)] = True
        action = (words[1] >> np.uint64(32)).astype(np.float64) / 2.0**32
        other = ((words[1] & np.uint64(0xFFFFFFFF)) * np.uint64(mask_token)) >> np.uint64(32)
        targets[row, selected] = tokens[row, selected]
        inputs[row, selected & (action < 0.8)] = mask_token
        swapped = selected & (action >= 0.8) & (action < 0.9)
        inputs[row, swapped] = other[swapped].astype(tokens.dtype)
    return {"inputs": inputs, "targets": targets}
