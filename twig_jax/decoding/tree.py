"""The shape of what is drafted: a tree of tokens, which is a chain where nodes have one child."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp


class Tree(NamedTuple):
    """Shape of a draft: the root's best E children, then E each of the best K_s at every level.

    "Best" is by the probability of the whole path from the root. Of all these candidates the best
    N are kept as drafts.

    Candidates are numbered level by level, C = K_s·E a level, of which the first has E alone.
    Expanded nodes have slots of their own: the root slot 0, then K_s a level. What is kept without
    having been expanded, leaves, comes behind these.
    """

    depth: int  # D, levels of drafts
    children: int  # E
    expanded: int  # K_s
    kept: int  # N

    @classmethod
    def of(cls, depth: int, children: int = 1, expanded: int = 1, nodes: int = 0) -> Self:
        """The shape without room for what cannot be; nodes 0: all are kept."""
        grown = [min(expanded, children**level) for level in range(1, depth)]
        every = children * (1 + sum(grown)) if depth else 0
        return cls(depth, children, max(grown, default=1), min(nodes or every, every))

    @property
    def offered(self) -> int:
        """C, candidates of a level."""
        return self.expanded * self.children

    @property
    def slots(self) -> int:
        """X, slots of expanded nodes."""
        return 1 + max(self.depth - 1, 0) * self.expanded

    @property
    def leaves(self) -> int:
        """U, the most nodes that are kept and were not expanded."""
        each = self.children - 1  # more of them with every node that is expanded
        return min(self.kept, self.children + (self.slots - 1) * each)

    @property
    def size(self) -> int:
        """X + U, all slots."""
        return self.slots + self.leaves

    def first_slot(self, level: jax.Array) -> jax.Array:
        """Where the expanded nodes of a level from 1 begin."""
        return 1 + (level - 1) * self.expanded

    def parent(self, candidate: jax.Array) -> jax.Array:
        """The slot of a candidate's parent; X for the number past the last candidate."""
        return jnp.maximum(1 + (candidate - self.offered) // self.children, 0)
