"""LMBatch: inputs and next-token targets of B sequences, padding masked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apr.config import IGNORE
from apr.errors import ShapeError


@dataclass(frozen=True)
class LMBatch:
    """inputs (B, T) int32 token ids; targets (B, T) int32, the next token or IGNORE where there is none."""

    inputs: np.ndarray
    targets: np.ndarray

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], pad_id: int, eos_id: int) -> "LMBatch":
        """From token sequences of any lengths.

        T is the longest length less one (at least 1). The longest sequences give T inputs and their T successors; a
        shorter one gives all its tokens, its last target is eos_id, and the rest is pad_id with targets IGNORE, so that
        padding never counts (upstream trained on it). Raises ShapeError for no sequences or an empty one.
        """
        if not sequences or any(len(s) == 0 for s in sequences):
            raise ShapeError("LMBatch.from_sequences", "one or more sequences of one or more tokens",
                             "none or an empty one", "drop it")
        t = max(max(len(s) for s in sequences) - 1, 1)
        inputs = np.full((len(sequences), t), pad_id, np.int32)
        targets = np.full((len(sequences), t), IGNORE, np.int32)
        for row, sequence in enumerate(sequences):
            known = np.asarray(sequence, np.int32)
            following = known[1:] if known.size == t + 1 else np.append(known[1:], np.int32(eos_id))
            inputs[row, :following.size] = known[:following.size]
            targets[row, :following.size] = following
        return cls(inputs, targets)

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "LMBatch":
        """From rows (B, T+1) of consecutive tokens."""
        return cls(np.ascontiguousarray(rows[:, :-1], np.int32), np.ascontiguousarray(rows[:, 1:], np.int32))

    @classmethod
    def single(cls, sequence: Sequence[int], pad_id: int, eos_id: int) -> "LMBatch":
        """One sequence."""
        return cls.from_sequences([sequence], pad_id, eos_id)

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.inputs.shape[0])

    @property
    def seq_len(self) -> int:
        """T."""
        return int(self.inputs.shape[1])

    @property
    def num_tokens(self) -> int:
        """Targets that count (not IGNORE)."""
        return int(np.count_nonzero(self.targets != IGNORE))

    def get_input(self, row: int) -> np.ndarray | None:
        """Inputs (T,) of one sequence, None beyond the last."""
        return self.inputs[row] if 0 <= row < self.batch_size else None

    def get_target(self, row: int) -> np.ndarray | None:
        """Targets (T,) of one sequence, None beyond the last."""
        return self.targets[row] if 0 <= row < self.batch_size else None
