"""The order of training: shuffled documents, cut into rows; any batch is a pure function of its step.

In epoch e the training documents are laid end to end in an order drawn from (seed, e), the line is cut into rows of
tokens [r*T, r*T + T] (they overlap by one, so each token is predicted once), and the rows are taken in a second order
drawn from (seed, e): without it a batch would be a piece of one long document. The held-out rows come from the head of
the corpus, in its own order, and training starts at the token after them.
"""

import numpy as np

from apr.data.batch import LMBatch
from apr.data.shards import TokenSource
from apr.errors import ConfigError
from apr.rng import permutation


class TrainStream:
    """Training rows of a corpus from token `first_token` on.

    `rows_per_epoch` rows of T+1 tokens; the few tokens left at the end of an epoch wait for the next order. Raises
    ConfigError when there is not one row.
    """

    def __init__(self, source: TokenSource, seq_length: int, seed: int, first_token: int = 0) -> None:
        self.source, self.seq_length, self.seed = source, seq_length, seed
        starts = np.append(np.int64(first_token), source.starts[source.starts > first_token])
        if len(starts) == 1:  # no boundaries known: shuffle pieces of one row each
            starts = np.arange(first_token, source.tokens, seq_length + 1)
        self.starts, self.lengths = starts, np.diff(np.append(starts, source.tokens))
        self.tokens = source.tokens - first_token
        self.rows_per_epoch = max(self.tokens - 1, 0) // seq_length
        if self.rows_per_epoch == 0:
            raise ConfigError("dataset", f"at least {seq_length + 1} tokens to train on", f"{self.tokens}",
                              "give more text or a smaller --seq-length")
        self._epoch = -1
        self._order = self._ends = self._rows = np.empty(0, np.int64)

    def _lay_out(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = permutation(len(self.starts), self.seed, "documents", epoch)
            self._ends = np.cumsum(self.lengths[self._order])
            self._rows = permutation(self.rows_per_epoch, self.seed, "rows", epoch)
            self._epoch = epoch

    def row(self, index: int) -> np.ndarray:
        """Row `index`, counted through all epochs: (T+1,) int32."""
        epoch, within = divmod(index, self.rows_per_epoch)
        self._lay_out(epoch)
        position = int(self._rows[within]) * self.seq_length
        stop = position + self.seq_length + 1
        out, place = np.empty(stop - position, np.int32), int(np.searchsorted(self._ends, position, side="right"))
        filled = 0
        while position < stop:
            document = self._order[place]
            into = position - int(self._ends[place] - self.lengths[document])
            count = min(stop, int(self._ends[place])) - position
            begin = int(self.starts[document]) + into
            out[filled:filled + count] = self.source.read(begin, begin + count)
            filled, position, place = filled + count, position + count, place + 1
        return out

    def batch(self, first_row: int, rows: int) -> LMBatch:
        """The batch of rows [first_row, first_row + rows)."""
        return LMBatch.from_rows(np.stack([self.row(first_row + i) for i in range(rows)]))


def heldout_batches(source: TokenSource, seq_length: int, batch_size: int,
                    max_batches: int) -> tuple[list[LMBatch], int]:
    """Held-out batches from the head of the corpus, and the first token that may be trained on.

    At most max_batches * batch_size rows, and at most a tenth of the corpus. Raises ConfigError when not one row fits.
    """
    rows = min(max_batches * batch_size, (source.tokens // 10 - 1) // seq_length)
    if rows < 1:
        raise ConfigError("dataset", f"at least {10 * (seq_length + 2)} tokens, so that a tenth can be held out",
                          f"{source.tokens}", "give more text, a smaller --seq-length, or --val-shard")
    return sequential_batches(source, seq_length, batch_size, rows), rows * seq_length + 1


def sequential_batches(source: TokenSource, seq_length: int, batch_size: int, rows: int | None = None) -> list[LMBatch]:
    """The first `rows` rows of a corpus (all of them: None) in its own order; the last batch may be smaller."""
    available = max(source.tokens - 1, 0) // seq_length
    rows = available if rows is None else min(rows, available)
    if rows < 1:
        raise ConfigError("held-out data", f"at least {seq_length + 1} tokens", f"{source.tokens}", "give more")
    window = [source.read(r * seq_length, r * seq_length + seq_length + 1) for r in range(rows)]
    return [LMBatch.from_rows(np.stack(window[i:i + batch_size])) for i in range(0, rows, batch_size)]
