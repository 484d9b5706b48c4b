#!/usr/bin/env python3
"""kill -9 of workers, of the master and of both, at random moments under load.

    test_service_kill.py PROGRAM FAKEWORKER [CASE ...]      QIE_TEST_LONG=1: 200 rounds

Held against the promise: no accepted job is lost, none ends twice, a death is seen within a second, the replacement
starts within three, and /health is not wrong for longer than a second. Times are only judged in runs without
sanitizers on a machine that is not overloaded: they are printed always, and judged with a margin.
"""
import collections
import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time

from servicelib import B64, LONG, SANITIZED, Service, run_cases

SEED = int(os.environ.get("QIE_TEST_SEED", time.time()))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Load(threading.Thread):
    """Submits jobs one behind another, each with its key, so that a lost answer is asked for again."""

    def __init__(self, s, name, make, pause):
        super().__init__(daemon=True)
        self.s, self.name, self.make, self.pause = s, name, make, pause
        self.accepted, self.ended, self.error = [], False, None

    def run(self):
        while not self.ended:
            body = {**self.make(), "image_base64": B64, "idempotency_key": f"{self.name}-{len(self.accepted)}"}
            job = None
            while not job:
                try:
                    code, j = self.s.call("POST", "/v1/jobs", body, timeout=20)
                    job = j["id"] if code == 202 else None
                    if code not in (202, 429, 503):
                        self.error = (code, j)
                        return
                except Exception:  # the master is away: the same again
                    pass
                time.sleep(0.02)
            self.accepted.append(job)
            time.sleep(self.pause)


class Watch(threading.Thread):
    """Compares /health with the processes: the longest time that it was wrong without a break."""

    def __init__(self, s):
        super().__init__(daemon=True)
        self.s, self.ended, self.worst, self.since, self.why, self.asked = s, False, 0, None, "", 0

    def wrong(self):
        try:
            code, h = self.s.call("GET", "/health", timeout=5)
        except Exception:
            return None
        self.asked += 1
        workers = h["workers"]
        for w in workers:
            if w["ready"] and not alive(w["pid"]):
                return f"ready, but process {w['pid']} is dead"
        any_ready = any(w["ready"] for w in workers)
        if (code == 200) != any_ready or (h["status"] in ("ok", "degraded")) != any_ready:
            return f"{code} {h['status']} with {any_ready}"
        return ""

    def run(self):
        while not self.ended:
            why = self.wrong()
            now = time.monotonic()
            if why:
                self.since = self.since or now
                if now - self.since > self.worst:
                    self.worst, self.why = now - self.since, why
            elif why == "":
                self.since = None
            time.sleep(0.03)


def replaced(s, pid, out):
    """How long until the death of this process is told, and until another is started in its place."""
    start, seen = time.monotonic(), None
    while time.monotonic() - start < 30:
        try:
            workers = s.call("GET", "/health", timeout=5)[1]["workers"]
        except Exception:
            return
        if seen is None and pid not in [w["pid"] for w in workers if w["ready"]]:
            seen = time.monotonic() - start
        if pid not in [w["pid"] for w in workers] and all(w["pid"] for w in workers):
            out.append((seen, time.monotonic() - start))
            return
        time.sleep(0.01)
    out.append((99, 99))


def check_ends(s, loads):
    accepted = [j for load in loads for j in load.accepted]
    assert len(set(accepted)) == len(accepted), "two keys, one job"
    states = collections.Counter()
    for j in accepted:
        end = s.finished(j)
        if end["status"] == "failed":
            assert end["attempts"] >= 3 and "lost 3 times" in end["error"]["message"], end
        else:
            assert end["status"] == "completed", end
            assert s.call("GET", f"/v1/jobs/{j}/result")[1][:4] == b"\x89PNG", j
        states[end["status"]] += 1
    ends = collections.Counter(re.findall(r"(?:completed|failed|cancelled) +job=(job_\w+)", s.log()))
    assert max(ends.values()) == 1, "an end was told twice"
    db = sqlite3.connect(os.path.join(s.state, "queue.db"))
    rows = dict(db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
    outputs = db.execute("SELECT count(*) FROM files f JOIN jobs j ON j.id=f.job WHERE j.status=2").fetchone()[0]
    db.close()
    assert sum(rows.values()) == len(accepted), (rows, len(accepted))
    assert outputs == 2 * states["completed"], "one picture in, one picture out"
    return states


def rounds(s, n, make, pause, judge_times=True):
    random.seed(SEED)
    loads = [Load(s, f"load{i}", make, pause) for i in range(3)]
    watch, times = Watch(s), []
    for t in loads + [watch]:
        t.start()
    for i in range(n):
        time.sleep(random.random() * 0.7)
        what = ("worker", "master", "both")[i % 3]
        try:
            pids = [w["pid"] for w in s.health()["workers"] if w["pid"]]
        except Exception:
            pids = []
        if what != "master" and pids:
            victim = random.choice(pids)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
            if what == "worker":
                replaced(s, victim, times)
        if what != "worker":
            s.kill()
            s.start(wait=random.random() < 0.7)
    for load in loads:
        load.ended = True
    for load in loads:
        load.join(60)
        assert load.error is None and not load.is_alive(), load.error
    s.until(lambda: s.call("GET", "/health/ready")[0] == 200)
    states = check_ends(s, loads)
    watch.ended = True
    watch.join(10)
    seen, again = max(t[0] for t in times), max(t[1] for t in times)
    note = (f"seed {SEED}, {n} rounds, {dict(states)}, deaths seen within {seen:.2f} s, replaced within {again:.2f} s, "
            f"/health wrong for {watch.worst:.2f} s at most ({watch.asked} looks)")
    if judge_times and not SANITIZED:
        assert seen <= 1.0 and again <= 3.0 and watch.worst <= 1.0, note + " " + watch.why
    return note


def case_stand_in():
    with Service("--workers", "2", "--queue-size", "500", fake=True).start() as s:
        return rounds(s, 200 if LONG else 9, lambda: {"prompt": "sleep %d" % random.randint(0, 400)}, 0.3)


def case_demo():
    with Service("--queue-size", "500").start() as s:
        return rounds(s, 200 if LONG else 3, lambda: {"prompt": "turn the subject purple", "num_inference_steps": 2}, 1.0)


def main():
    return 1 if run_cases([("case_stand_in", case_stand_in), ("case_demo", case_demo)]) else 0


if __name__ == "__main__":
    sys.exit(main())
