"""How much the caches of this machine hold: what is longer is better written past them."""

from functools import cache
from pathlib import Path


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache that Linux tells of; 32 MiB where it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = path.read_text().strip().removesuffix("K")
        if number.isdecimal():
            sizes.append(int(number) << 10)
    return max(sizes, default=32 << 20)
