"""Cost of an interruption, as a run's rows tell it."""

import json
import time
from pathlib import Path

from trainer.resilience.interruption import interruption


def test_cost_of_an_interruption(tmp_path: Path) -> None:
    """From the rows before it; a torn last row does not count."""
    file = tmp_path / "metrics.jsonl"
    assert interruption(file, 0) is None and interruption(file, 30) is None
    now_s = time.time()
    rows = [{"step": step, "time": now_s - 100 + step} for step in range(10, 60, 10)]
    file.write_text("x" * (2 << 20) + "\n" + "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "ti')
    cost = interruption(file, 30)
    assert cost and cost.lost_steps == 20 and 70 <= cost.lost_s < 80
    assert str(cost).startswith("20 steps are trained again, 7")
    assert interruption(file, 5) is None, "the row of that step is gone"
    anew = interruption(file, 0)
    assert anew and anew.lost_steps == 50 and 90 <= anew.lost_s < 100
    after = interruption(file, 50)
    assert after and after.lost_steps == 0
