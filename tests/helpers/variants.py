"""Which variants of a family a test takes, where all would take too long."""

from collections.abc import Iterable

from zoo.registry import index


def lightest_of_each_family(names: Iterable[str]) -> list[str]:
    """The variant with the fewest MACs of each family among these, sorted by name."""
    lightest: dict[str, str] = {}
    for name in sorted(names, key=lambda name: index()[name]["macs"]):
        lightest.setdefault(index()[name]["family"], name)
    return sorted(lightest.values())
