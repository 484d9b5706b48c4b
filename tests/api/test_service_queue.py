#!/usr/bin/env python3
"""Order, fairness, shares, keys, crowds, events and time, with a stand-in for the worker.

    test_service_queue.py PROGRAM FAKEWORKER [CASE ...]     QIE_TEST_LONG=1: 1,000 clients
"""
import collections
import concurrent.futures
import http.client
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time

from servicelib import B64, LONG, SANITIZED, Service, run_cases

PROXY = ("--trusted-proxy", "127.0.0.1/32")


def of(client):
    return {"X-Forwarded-For": f"198.51.100.{client}"}


def order_of(s):
    """Jobs in the order in which they were started."""
    db = sqlite3.connect(os.path.join(s.state, "queue.db"))
    rows = [r[0] for r in db.execute("SELECT id FROM jobs WHERE started>0 ORDER BY started")]
    db.close()
    return rows


def case_order():
    """Priority first; within one, the clients take turns; within a client, first come first served."""
    with Service(*PROXY, fake=True).start() as s:
        first = s.accepted("sleep 600000", headers=of(1))  # until it is cancelled, when all others wait
        s.until(lambda: s.look(first, of(1))["status"] == "running")
        a = [s.accepted("a", headers=of(1)) for _ in range(4)]
        b = [s.accepted("b", headers=of(2)) for _ in range(2)]
        c = [s.accepted("c", headers=of(3), priority=1)]
        d = [s.accepted("d", headers=of(1), priority=9)]
        places = [s.look(j, of(k))["queue_position"] for j, k in
                  [(d[0], 1), (c[0], 3), (b[0], 2), (a[0], 1), (b[1], 2), (a[1], 1), (a[2], 1), (a[3], 1)]]
        assert places == list(range(8)), places
        assert s.call("POST", f"/v1/jobs/{first}/cancel", b"", of(1))[0] == 202
        for j in a + d:
            s.finished(j, headers=of(1))
        for j, k in ((b[1], 2), (c[0], 3)):
            s.finished(j, headers=of(k))
        want = [first, d[0], c[0], b[0], a[0], b[1], a[1], a[2], a[3]]
        assert order_of(s) == want, [want.index(j) for j in order_of(s)]
        assert s.call("GET", "/v1/jobs/" + a[0], headers=of(2))[0] == 403
        assert s.call("DELETE", "/v1/jobs/" + a[0], headers=of(2))[0] == 403
        assert s.call("POST", f"/v1/jobs/{a[0]}/cancel", b"", of(2))[0] == 403
        assert s.call("GET", f"/v1/jobs/{a[0]}/events", headers=of(2))[0] == 403
        assert s.call("GET", f"/v1/jobs/{a[0]}/result", headers=of(2))[0] == 403


def case_share():
    """A client may fill the queue while it is alone; while others wait, half of it. Beyond: 429 with a usable time."""
    with Service(*PROXY, "--queue-size", "8", fake=True).start() as s:
        running = s.accepted("sleep 600000", headers=of(1))  # until it is cancelled
        s.until(lambda: s.health()["queue"]["depth"] == 0)
        codes = [s.job("x", headers=of(1))[0] for _ in range(10)]
        assert codes == [202] * 8 + [429] * 2, codes
        assert 1 <= int(s.headers["Retry-After"]) <= 3600
        queue = s.health()["queue"]
        assert (queue["depth"], queue["capacity"]) == (8, 8) and queue["oldest_s"] >= 0, queue
        assert s.call("POST", f"/v1/jobs/{running}/cancel", b"", of(1))[0] == 202
        s.until(lambda: s.health()["queue"]["depth"] == 0)
        running = s.accepted("sleep 600000", headers=of(1))
        s.until(lambda: s.health()["queue"]["depth"] == 0)
        s.accepted("x", headers=of(2))
        codes = [s.job("x", headers=of(1))[0] for _ in range(6)]
        assert codes == [202] * 4 + [429] * 2, codes
        assert s.job("x", headers=of(3))[0] == 202
        assert s.call("POST", f"/v1/jobs/{running}/cancel", b"", of(1))[0] == 202


def case_keys_once():
    """One key, many requests at once: one job, one answer, over a restart too."""
    with Service(fake=True).start() as s:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            calls = [pool.submit(s.job, "x", idempotency_key="once", seed=4) for _ in range(40)]
            got = [c.result() for c in calls]
        assert {c for c, _ in got} == {202} and len({j["id"] for _, j in got}) == 1, got
        job = got[0][1]["id"]
        s.finished(job)
        edit = {"prompt": "x", "image_base64": B64, "idempotency_key": "once", "seed": 4}
        code, a = s.call("POST", "/edit", edit)
        assert code == 200 and a["job_id"] == job, a
        s.kill()
        s.start()
        assert s.job("x", idempotency_key="once", seed=4)[1]["id"] == job
        assert s.job("y", idempotency_key="once", seed=4)[0] == 409
        assert s.call("GET", "/v1/jobs")[1]["data"].__len__() == 1


def crowd(s, n, what):
    """n clients at once, each on its own connection; a client that is sent away comes back when it was told to."""
    answers = collections.Counter()
    ids = []

    def one(i):
        for _ in range(200):
            try:
                code, a = what(i)
            except OSError:  # the backlog is full: the kernel's answer, not ours
                answers["refused"] += 1
                time.sleep(0.2)
                continue
            answers[code] += 1
            if code in (200, 202):
                return ids.append(a.get("id") or a["job_id"])
            assert code == 429, (code, a)
            time.sleep(min(2, int(s.headers.get("Retry-After", 1))) * 0.5)
        raise AssertionError("never got in")

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        for f in [pool.submit(one, i) for i in range(n)]:
            f.result()
    assert len(set(ids)) == n, "each client has its job"
    return ids, answers


def case_crowd():
    sizes = (10, 100, 1000) if LONG else (10, 100)
    notes = []
    with Service("--workers", "2", fake=True).start() as s:
        edit = {"prompt": "x", "image_base64": B64}
        for n in sizes:
            start = time.time()
            ids, got = crowd(s, n, lambda i: s.job("x"))
            for j in ids:
                assert s.finished(j)["status"] == "completed"
            ids2, got2 = crowd(s, n, lambda i: s.call("POST", "/edit", edit))
            notes.append(f"{n}: {dict(got)} {dict(got2)} {time.time() - start:.1f} s")
            ends = collections.Counter(re.findall(r"completed +job=(job_\w+)", s.log()))
            assert all(ends[j] == 1 for j in ids + ids2), "an end is told once"
        assert s.health()["queue"]["depth"] == 0
        s.until(lambda: s.metric("qwen_edit_connections")[0] <= 3)
    return "; ".join(notes)


def memory_kb(pid):
    return int(re.search(r"RssAnon:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1))


def case_listeners():
    """Many who wait for one event cost little, and each hears its first event at once."""
    n = 1000 if LONG else 200
    with Service("--max-connections", "1100", fake=True).start() as s:
        job = s.accepted("sleep 60000")
        s.until(lambda: s.look(job)["status"] == "running")
        before, conns, waits = memory_kb(s.process.pid), [], []
        for _ in range(n):
            c = socket.create_connection(("127.0.0.1", s.port))
            start = time.perf_counter()
            c.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            got = b""
            while b"event: " not in got:
                got += c.recv(4096)
            waits.append(time.perf_counter() - start)
            conns.append(c)
        cost = memory_kb(s.process.pid) - before
        assert SANITIZED or cost < 50 * 1024 * n / 1000, f"{cost} kB for {n} listeners"
        assert SANITIZED or sorted(waits)[n // 2] < 0.05, sorted(waits)[n // 2]
        assert len(os.listdir(f"/proc/{s.process.pid}/task")) < 20, "no thread per listener"
        assert s.call("POST", f"/v1/jobs/{job}/cancel", b"")[0] == 202
        for c in conns:
            c.settimeout(30)
            got = b""
            while b"event: cancelled" not in got:
                piece = c.recv(4096)
                assert piece, got
                got += piece
            c.close()
        s.until(lambda: s.metric("qwen_edit_connections")[0] <= 3)
    return f"{cost} kB for {n} listeners, first event after {1e3 * sorted(waits)[n // 2]:.1f} ms (median)"


def case_events():
    """Places move while one waits; a second listener hears the place as it is; ids resume; a restart goes on."""
    with Service(fake=True).start() as s:
        jobs = [s.accepted("sleep 700") for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            listening = pool.submit(s.events, jobs[3])
            s.finished(jobs[1])
            late = http.client.HTTPConnection("127.0.0.1", s.port, timeout=30)
            late.request("GET", f"/v1/jobs/{jobs[3]}/events")
            r = late.getresponse()
            text = b""
            while b"data: " not in text or not text.endswith(b"\n\n"):
                text += r.read1(4096)
            late.close()
            assert json.loads(re.search(rb"event: queued\ndata: (.*)", text).group(1))["position"] == 0, text
            got = listening.result()
        places = [json.loads(e["data"])["position"] for e in got if e["event"] == "queued"]
        assert places == sorted(places, reverse=True) and places[-1] == 0 and len(places) >= 2, places
        names = [e["event"] for e in got]
        assert names[-1] == "completed" and names.index("started") < names.index("progress"), names
        ids = [int(e["id"]) for e in got]
        assert ids == sorted(set(ids)), ids
        steps = [json.loads(e["data"])["step"] for e in got if e["event"] == "progress"]
        assert steps == sorted(steps), steps
        job, second = s.accepted("sleep 3000"), s.accepted("x")
        s.until(lambda: s.look(job)["status"] == "running")
        s.kill()
        s.start()
        after = s.events(second)
        assert after[0]["event"] == "queued" and "position" in json.loads(after[0]["data"]), after
        assert after[-1]["event"] == "completed" and s.finished(job)["attempts"] == 0


def case_gone():
    """Who leaves drops a queued edit and cancels a running one, unless it gave a key."""
    with Service(fake=True).start() as s:
        def leave(**more):
            body = json.dumps({"image_base64": B64, **more}).encode()
            c = socket.create_connection(("127.0.0.1", s.port))
            c.sendall(b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                      % len(body) + body)
            return c
        n = 0
        for prompts, keyed in ((["sleep 60000"], False), (["sleep 60000"] * 2, False), (["sleep 500"], True)):
            n += len(prompts)
            conns = [leave(prompt=p, **({"idempotency_key": p} if keyed else {})) for p in prompts]
            jobs = s.until(lambda: (d := s.call("GET", "/v1/jobs")[1]["data"]) and len(d) == n and d)[:len(prompts)]
            s.until(lambda: s.look(jobs[-1]["id"])["status"] == "running")
            for c in reversed(conns):
                c.close()
            for j in jobs:
                assert s.finished(j["id"])["status"] == ("completed" if keyed else "cancelled")
        assert s.health()["workers"][0]["restarts"] == 0


def case_timeout():
    with Service("--sync-timeout", "1", fake=True).start() as s:
        code, a = s.call("POST", "/edit", {"prompt": "sleep 2500", "image_base64": B64})
        assert code == 504 and a["error"]["type"] == "TIMEOUT", (code, a)
        assert s.finished(re.search(r"job_\w+", a["error"]["message"]).group(0))["status"] == "completed"


def case_expiry():
    with Service("--keep", "0.0005", fake=True).start() as s:  # 1.8 s
        job = s.accepted("x")
        s.finished(job)
        files = os.path.join(s.state, "files")
        kept = lambda: sum(len(f) for _, _, f in os.walk(files))
        assert kept() == 1  # input and result are the same picture here
        s.until(lambda: s.call("GET", f"/v1/jobs/{job}/result")[0] == 410)
        assert s.look(job)["status"] == "expired" and s.look(job)["prompt"] == ""
        s.until(lambda: kept() == 0)
        s.until(lambda: s.call("GET", "/v1/jobs/" + job)[0] == 404)


def case_expiry_of_many():
    """More at once than one write removes: all go at the next sweep, not some a minute."""
    with tempfile.TemporaryDirectory() as d:
        with Service(state=d, fake=True).start() as s:
            s.finished(s.accepted("x"))
        db = sqlite3.connect(os.path.join(d, "queue.db"))
        names = [c[1] for c in db.execute("PRAGMA table_info(jobs)") if c[1] not in ("seq", "id")]
        for i in range(900):
            db.execute(f"INSERT INTO jobs(id,{','.join(names)}) SELECT 'job_old{i}',{','.join(names)} FROM jobs WHERE id NOT LIKE "
                       "'job_old%' LIMIT 1")
        db.execute("UPDATE jobs SET status=2,finished=unixepoch()-9000")
        db.commit()
        db.close()
        with Service("--keep", "1", state=d, fake=True).start() as s:  # the next sweep would come in a minute
            s.until(lambda: s.call("GET", "/v1/jobs/job_old899")[0] == 404, seconds=20)
            s.until(lambda: s.jobs() == [], seconds=20)


def main():
    cases = (case_order, case_share, case_keys_once, case_crowd, case_listeners, case_events, case_gone, case_timeout,
             case_expiry, case_expiry_of_many)
    return 1 if run_cases([(f.__name__, f) for f in cases]) else 0


if __name__ == "__main__":
    sys.exit(main())
