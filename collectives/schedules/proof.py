"""What is said of a schedule that is right; `refusal.py` of one that is wrong."""

from dataclasses import dataclass

from dtrain.collectives.dtypes import Array


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found out. Shares are of the vector that `Cost` calls n."""

    steps: int  # in which any message travels
    messages: int
    sent: Array  # per rank, the share of n sent
    received: Array
    added: Array  # per rank, the share of n that was added to something
    equal_bits: bool  # all ranks that want a chunk get the same bits
    ordered: bool  # every sum is in the order of the ranks
