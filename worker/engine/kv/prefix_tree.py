"""Radix tree of token ids: which KV slots or sequences share which prefix, exact to the token.

A lookup or an insertion compares each token of its text once, however many holders there are (cf. RadixAttention,
arXiv 2312.07104).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable
from typing import Generic, NamedTuple, TypeVar

from worker.engine.segments import TokenIds

Holder = TypeVar("Holder", bound=Hashable)


class _Node(Generic[Holder]):
    """An edge of the tree and its lower end; each holder below has all tokens of the edge."""

    __slots__ = ("children", "ends", "holders", "parent", "tokens")

    def __init__(self, tokens: TokenIds, parent: _Node[Holder] | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, _Node[Holder]] = {}  # by first token
        self.holders: dict[Holder, None] = {}  # in order of insertion
        self.ends: dict[Holder, None] = {}  # those that have no token beyond


class Match(NamedTuple, Generic[Holder]):
    """The longest prefix of a text that some holder has."""

    length: int  # tokens
    holders: Collection[Holder]  # that have it, the first inserted first
    ends: Collection[Holder]  # those of them that have no token beyond; without those that have only been copied to


class PrefixTree(Generic[Holder]):
    """The texts of many holders."""

    def __init__(self) -> None:
        """Start without a holder."""
        self._root: _Node[Holder] = _Node(array("i"), None)
        self._ends: dict[Holder, tuple[_Node[Holder], int]] = {}  # the last node of each holder, and its tokens
        self._nothing: Match[Holder] = Match(0, self._root.holders, self._root.ends)

    def __contains__(self, holder: Holder) -> bool:
        """Return whether a holder has tokens."""
        return holder in self._ends

    def length(self, holder: Holder) -> int:
        """Return how many tokens a holder has."""
        return self._ends.get(holder, (self._root, 0))[1]

    def shared_length(self, holder: Holder) -> int:
        """Return how many of the first tokens of a holder another one has, too."""
        node, at = self._ends.get(holder, (self._root, 0))
        while node.parent is not None and len(node.holders) == 1:
            node, at = node.parent, at - len(node.tokens)
        return at

    def insert(self, holder: Holder, ids: TokenIds, end: int) -> None:
        """Let a holder have `ids[:end]`, which continue what it has."""
        node, at = self._ends.get(holder, (self._root, 0))
        if at >= end:
            if at:
                node.ends[holder] = None
            return
        node.ends.pop(holder, None)
        if node.parent is not None and len(node.holders) == 1 and not node.children:  # its own leaf
            node.tokens += ids[at:end]
            at = end
        while at < end:
            child = node.children.get(ids[at])
            if child is None:
                child = node.children[ids[at]] = _Node(ids[at:end], node)
            else:
                common = common_prefix_length(child.tokens, ids[at : min(end, at + len(child.tokens))])
                child = child if common == len(child.tokens) else _split(child, common)
            child.holders[holder] = None
            node, at = child, at + len(child.tokens)
        node.ends[holder] = None
        self._ends[holder] = node, at

    def join(self, holder: Holder, ids: TokenIds, end: int, wanted: int) -> tuple[Holder | None, int]:
        """Let a new holder have `ids[:end]`.

        Return the first holder with the longest prefix of `ids[:wanted]` that another one has, and its length.
        """
        node, at, first, length = self._root, 0, None, 0
        while at < end:
            child = node.children.get(ids[at])
            if child is None:
                child = node.children[ids[at]] = _Node(ids[at:end], node)
            else:
                tokens = child.tokens
                own = ids[at : min(end, at + len(tokens))]
                if tokens != own:
                    child = _split(child, common_prefix_length(tokens, own))
                if at < wanted:
                    first, length = next(iter(child.holders)), min(wanted, at + len(child.tokens))
            child.holders[holder] = None
            node, at = child, at + len(child.tokens)
        node.ends[holder] = None
        self._ends[holder] = node, at
        return first, length

    def copy(self, source: Holder, target: Holder, length: int) -> None:
        """Let a new holder `target` have the first `length` tokens of `source`. Compares no tokens."""
        node = self._end_at(source, length)
        self._ends[target] = node, length
        while node.parent is not None:
            node.holders[target] = None
            node = node.parent

    def shrink(self, holder: Holder, length: int) -> None:
        """Let a holder keep only its first `length` tokens."""
        kept = self._end_at(holder, length)
        node, at = self._ends[holder]
        if node is not kept:
            node.ends.pop(holder, None)
            self._leave(holder, node, kept)
            kept.ends[holder] = None
        self._ends[holder] = kept, min(at, length)

    def remove(self, holder: Holder) -> None:
        """Forget a holder."""
        if holder in self._ends:
            node, _ = self._ends.pop(holder)
            node.ends.pop(holder, None)
            self._leave(holder, node, self._root)

    def longest(self, ids: TokenIds, end: int, like: tuple[Holder, int] | None = None) -> Match[Holder]:
        """Return the longest prefix of `ids[:end]` that some holder has; length 0 if none has the first token.

        With `like`, a holder and a length, `ids` start with as many tokens of it, which are not compared again.
        """
        node, at = self._root, 0
        if not end or ids[0] not in node.children:  # as most often where prompts have nothing in common
            return self._nothing
        if like is not None:
            node, at = self._ends.get(like[0], (node, at))
            while at > min(like[1], end) and node.parent is not None:
                node, at = node.parent, at - len(node.tokens)
        while at < end and (child := node.children.get(ids[at])) is not None:
            tokens = child.tokens
            own = ids[at : at + len(tokens)] if at + len(tokens) <= end else ids[at:end]
            if tokens != own:
                return Match(at + common_prefix_length(tokens, own), child.holders, ())
            node, at = child, at + len(tokens)
        return Match(at, node.holders, node.ends)

    def _end_at(self, holder: Holder, length: int) -> _Node[Holder]:
        """Return the node at which the first `length` tokens of a holder end."""
        node, at = self._ends[holder]
        while node.parent is not None and at - len(node.tokens) >= length:
            node, at = node.parent, at - len(node.tokens)
        return _split(node, length - at + len(node.tokens)) if at > length else node

    @staticmethod
    def _leave(holder: Holder, node: _Node[Holder], top: _Node[Holder]) -> None:
        """Take a holder out of the nodes from `node` up to, but not including, `top`."""
        while node is not top and node.parent is not None:
            del node.holders[holder]
            if not node.holders:
                del node.parent.children[node.tokens[0]]
            node = node.parent


def common_prefix_length(a: TokenIds, b: TokenIds) -> int:
    """Return the number of leading tokens that two texts have in common."""
    if a == b:
        return len(a)
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(node: _Node[Holder], at: int) -> _Node[Holder]:
    """Split an edge after `at` tokens; return its upper part."""
    assert node.parent is not None
    upper = _Node(node.tokens[:at], node.parent)
    upper.children[node.tokens[at]] = node
    upper.holders.update(node.holders)
    node.parent.children[node.tokens[0]] = upper
    node.tokens, node.parent = node.tokens[at:], upper
    return upper
