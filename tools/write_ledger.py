"""Writes the claims ledger, qlearn/results/claims.json, from book/claims.yml and the results."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "_ext")]

import ledger  # noqa: E402


def text() -> str:
    rows = [row._asdict() for row in ledger.ledger()]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    ledger.FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {ledger.FILE}")
