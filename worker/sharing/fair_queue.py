"""Choose which model's engine runs next on a device: start-time fair queueing.

Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996. Each member has a tag: the device time that it was charged.
The waiting member with the smallest tag is next. One that comes back from idleness starts at the tag of the last turn,
so that idleness earns no credit. Among members that always wait, the device times of any two differ by at most the
longest step of each, however long the steps of the others are (theorem 1, with equal weights).
"""

from __future__ import annotations


class FairQueue:
    """Members that wait for a device, and the one that has it. It reads no clock."""

    def __init__(self, members: int) -> None:
        """Start with a free device for which no member waits."""
        self._tags_s = [0.0] * members
        self._now_s = 0.0  # tag of the last turn when it began
        self._waiting: dict[int, None] = {}  # in the order of arrival
        self.holder: int | None = None

    @property
    def contended(self) -> bool:
        """True while a member waits for the one that has the device."""
        return self.holder is not None and bool(self._waiting)

    def want(self, member: int) -> None:
        """Let a member wait, unless it has the device or waits already."""
        if member == self.holder or member in self._waiting:
            return
        self._tags_s[member] = max(self._tags_s[member], self._now_s)
        self._waiting[member] = None

    def end_turn(self, member: int, used_s: float, *, more: bool) -> None:
        """Take the device back from its holder and charge `used_s`; with `more` it waits again.

        A member that only waits ends its wish.
        """
        if member != self.holder:
            self._waiting.pop(member, None)
            return
        self.holder = None
        self._tags_s[member] += used_s
        if more:
            self._waiting[member] = None

    def leave(self, member: int) -> None:
        """Forget a member whose process has ended, also while it has the device."""
        self._waiting.pop(member, None)
        if member == self.holder:
            self.holder = None

    def grant(self) -> int | None:
        """Give a free device to the next member and return it; None if it is taken or no member waits."""
        if self.holder is not None or not self._waiting:
            return None
        member = min(self._waiting, key=self._tags_s.__getitem__)  # the first of equals
        del self._waiting[member]
        self.holder, self._now_s = member, self._tags_s[member]
        return member
