"""Writes tests/python/zoo_conversions.json: the conversions of the models in tests/python/zoo.py.

The table lists, for each model and dtype, the bytes saved for backward before and after the conversion, and the number
of norms, activations and calls converted in each way. Review every change of the table: no byte count should grow
without a reason. Requires lomem and the packages of the tests.

    python tools/zoo_conversions.py             # write the table
    python tools/zoo_conversions.py --check     # exit 1 if the committed table is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests/python"
TABLE = TESTS / "zoo_conversions.json"
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from zoo import DTYPES, ZOO, conversion, converted  # noqa: E402


def text() -> str:
    """The table as JSON, with a line per model and dtype."""
    torch.set_num_threads(1)
    rows = []
    for name in ZOO:
        for dtype in DTYPES:
            _, _, report = converted(name, dtype)
            rows.append(f"{json.dumps(f'{name}/{dtype}')}: {json.dumps(conversion(report))}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main() -> int:
    """Writes or checks the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    check = parser.parse_args().check
    table = text()
    if not check:
        TABLE.write_text(table, encoding="utf-8")
        return 0
    before, after = json.loads(TABLE.read_text(encoding="utf-8")), json.loads(table)
    for key in [key for key in before | after if before.get(key) != after.get(key)]:
        print(f"{key}: {before.get(key)} in the table, now {after.get(key)}")
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
