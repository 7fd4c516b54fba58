"""Writes the claims ledger: qlearn/results/claims.json, and stated.json from the git history."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "_ext")]

import claim_history  # noqa: E402
import ledger  # noqa: E402


def text() -> str:
    """claims.json as it should be."""
    rows = [row._asdict() for row in ledger.ledger()]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def stated_text() -> str:
    """stated.json as the history says."""
    return json.dumps(claim_history.table(ROOT, ledger.written()), indent=1) + "\n"


if __name__ == "__main__":
    reason = claim_history.why_no_history(ROOT)
    if reason:
        print(f"{ledger.STATED} stays as it is: {reason}")
    else:
        ledger.STATED.write_text(stated_text(), encoding="utf-8")
        ledger.stated_table.cache_clear()
        print(f"wrote {ledger.STATED}")
    ledger.FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {ledger.FILE}")
