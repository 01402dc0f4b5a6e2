"""How the engine runs a micro-batch, kept in the run folder for the next sitting: planned anew it could be another way,
and other last bits would come."""

import json
from pathlib import Path

from afina import durable
from afina.engine.block import Placement
from afina.engine.plan import Plan
from afina.train.resume import PLAN, STATE_BYTES


def kept_plan(place: Path) -> Plan | None:
    """The plan that this run's last sitting kept; None where there is none that can be read."""
    try:
        found = json.loads((place / PLAN).read_bytes()) if (place / PLAN).stat().st_size <= STATE_BYTES else {}
        rungs = [Placement(frozenset(one["away"]), frozenset(one["again"])) for one in found["placements"]]
        tokens, rows, size, held = (int(found[key]) for key in ("tokens", "rows_at_once", "bytes", "held"))
        return Plan(tokens, rungs, rows, found["host"], size, float(found["microseconds"]), held)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def keep_plan(place: Path, plan: Plan) -> None:
    """For the next sitting, if there is one."""
    rungs = [{"away": sorted(one.away), "again": sorted(one.again)} for one in plan.placements]
    durable.write_json(place / PLAN, {**vars(plan), "placements": rungs})
