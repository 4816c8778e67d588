"""Independent seeds derived from numbers and names, such as run, generation and purpose."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """Return a seed in 0..2^62 that depends on all parts and their order.

    >>> seed_of(0, "task", 3) == seed_of(0, "task", 3), seed_of(0, "task", 3) == seed_of(3, "task", 0)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 2
