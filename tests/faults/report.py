"""`python tests/faults/report.py`: malformed files tried, refused, crashed and wrong, by row of the list and kind."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import all_cases, tally


def main() -> int:
    table = tally(all_cases())
    columns = ("tried", "refused", "crashed", "wrong")
    print(f"{'row':9}{'kind':13}" + "".join(f"{c:>9}" for c in columns))
    for (row, kind), count in sorted(table.items()):
        print(f"{row:9}{kind:13}" + "".join(f"{count[c]:9}" for c in columns))
    total = sum(table.values(), Counter())
    print(f"{'all':22}" + "".join(f"{total[c]:9}" for c in columns))
    return int(total["refused"] != total["tried"])


if __name__ == "__main__":
    raise SystemExit(main())
