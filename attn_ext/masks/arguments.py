"""Checks of arguments that several builders share."""

import torch

BlockSize = int | tuple[int, int]


def device_of(given: torch.device | str | None) -> torch.device:
    """Return the device; of `None` torch's default, which torch.compile does not name."""
    return torch.empty(0, device=given).device


def lengths(op: str, seqlen_q: int, seqlen_k: int | None) -> tuple[int, int]:
    """Return (Sq, Sk), Sk = Sq where it is `None`; raise where one is negative."""
    sq, sk = int(seqlen_q), int(seqlen_q if seqlen_k is None else seqlen_k)
    if min(sq, sk) < 0:
        raise ValueError(f"{op}: expected sequence lengths of 0 or more; got {sq} and {sk}")
    return sq, sk


def sides(op: str, left: int, right: int) -> tuple[int, int]:
    """Return (left, right); raise where one is below -1, which stands for no limit."""
    if min(left, right) < -1:
        raise ValueError(
            f"{op}: expected left and right of -1 (unlimited) or more; got {left} and {right}"
        )
    return left, right


def at_least(op: str, least: int, **numbers: int) -> None:
    """Raise unless each number is an int of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{op}: expected {name} of {least} or more; got {number!r}")
