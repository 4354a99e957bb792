"""Record of everything that decides which samples a run's batches hold. A resumed run compares it.

A position in the data is a number of consumed samples. It means something only where the samples, their order, the seed
and the batch sizes are what they were. The record is JSON-able:

    {"method": name of the way samples are chosen, "settings": {name: value}, "lists": [list_record, ...]}
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


def list_record(name: str, lines: Iterable[str]) -> dict[str, Any]:
    """The record of one list of samples.

    Args:
        name: for messages.
        lines: one for each sample, in order: what tells it from others, its content included.

    Returns:
        `name`, `count` and two digests: `ordered` of the list, `sorted` of the same lines in sorted order.
    """
    lines = list(lines)
    return {"name": name, "count": len(lines), "ordered": _digest(lines), "sorted": _digest(sorted(lines))}


def order_record(method: str, settings: Mapping[str, Any], lists: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record of a run.

    Args:
        settings: what besides the lists decides which samples a batch holds, by names for messages.
        lists: from `list_record`.
    """
    return {"method": method, "settings": dict(settings), "lists": list(lists)}


def order_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List what differs between two records. The list is empty if a position means the same in both."""
    changes = []
    if saved["method"] != current["method"]:
        changes.append(f"the order is made by {current['method']}, it was by {saved['method']}")
    before, after = saved["settings"], current["settings"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changes.append(f"{name} is {after.get(name)}, it was {before.get(name)}")
    names = [[entry["name"] for entry in record["lists"]] for record in (saved, current)]
    if names[0] != names[1]:
        return [*changes, f"the data is {', '.join(names[1])}, it was {', '.join(names[0])}"]
    changes += [
        change for pair in zip(saved["lists"], current["lists"], strict=True) if (change := _list_change(*pair))
    ]
    return changes


def check_order(saved: Mapping[str, Any], current: Mapping[str, Any], where: str, remedy: str) -> None:
    """Refuse to continue at a position that means another one now.

    Args:
        where: the checkpoint's folder.
        remedy: what the user can do besides going back, for the message.

    Raises:
        ValueError: naming all that changed.
    """
    if changes := order_changes(saved, current):
        raise ValueError(
            f"the checkpoint {where} cannot be continued exactly, for its position in the data means another one now: "
            f"{'; '.join(changes)}. Restore that, or {remedy}"
        )


def _list_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    name, count = after["name"], after["count"]
    if before["count"] != count:
        return f"{name} are {count}, they were {before['count']}"
    if before["ordered"] == after["ordered"]:
        return None
    if before["sorted"] == after["sorted"]:
        return f"{name} ({count}) are the same in another order"
    return f"{name} ({count}) are others, or have other contents"


def _digest(lines: list[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:32]
