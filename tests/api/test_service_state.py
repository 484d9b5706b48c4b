#!/usr/bin/env python3
"""The state folder and the machine around it: full, read-only, damaged, foreign, shared; clocks, descriptors, ports.

    test_service_state.py PROGRAM FAKEWORKER [CASE ...]
"""
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time

from servicelib import B64, PICTURE, Service, free_port, run_cases

CLOCK = os.path.join(os.path.dirname(os.path.abspath(sys.argv[2])), "fakeclock.so")


class Mount:
    """A small file system of its own; None where that is not allowed."""

    def __init__(self, size):
        self.path = tempfile.mkdtemp(prefix="qe-small-")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "qe", self.path], capture_output=True)
        self.ok = done.returncode == 0

    def remount(self, how):
        subprocess.run(["mount", "-o", "remount," + how, self.path], check=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.ok:
            subprocess.run(["umount", "-l", self.path])
        shutil.rmtree(self.path, ignore_errors=True)


def fill(path):
    with open(path, "wb") as f:
        try:
            while True:
                f.write(bytes(65536))
                f.flush()
        except OSError:
            pass


def case_full():
    with Mount("8m") as m:
        if not m.ok:
            return "skipped: no mount"
        with Service(state=os.path.join(m.path, "state"), fake=True).start() as s:
            running, waiting = s.accepted("sleep 1500"), s.accepted("x")
            s.until(lambda: s.look(running)["status"] == "running")
            fill(os.path.join(m.path, "ballast"))
            big = PICTURE + bytes(100000)  # another picture than those kept already
            code, a = s.form("/v1/jobs", {"prompt": "x"}, [("image", big)])
            assert code == 507 and a["error"]["type"] == "IO", (code, a)
            code, a = s.form("/v1/jobs", {"prompt": "x"}, [("image", PICTURE + bytes(2 << 20))])  # spooled to the disk
            assert code == 507, (code, a)
            time.sleep(2)
            code, h = s.call("GET", "/health")
            assert code == 200 and h["status"] == "degraded" and h["last_error"], h
            assert abs(h["last_error_at"] - time.time()) < 60
            start = time.monotonic()
            assert s.call("GET", "/health/live")[0] == 200 and time.monotonic() - start < 0.5, "the loop is not held up"
            assert s.look(running)["status"] == "running", "an end is told when it is in the file"
            os.unlink(os.path.join(m.path, "ballast"))
            assert s.finished(running)["status"] == "completed" and s.finished(waiting)["status"] == "completed"
            assert s.look(running)["attempts"] == 0
            s.until(lambda: s.health()["status"] == "ok")
            assert s.finished(s.accepted("x"))["status"] == "completed"


def case_full_and_killed():
    """The disk fills, the master dies, there is room again: the accepted jobs end."""
    with Mount("8m") as m:
        if not m.ok:
            return "skipped: no mount"
        with Service(state=os.path.join(m.path, "state"), fake=True).start() as s:
            jobs = [s.accepted("sleep 300") for _ in range(4)]
            fill(os.path.join(m.path, "ballast"))
            time.sleep(1)
            s.kill()
            s.start(wait=False)
            try:
                s.process.wait(3)  # a refusal with a reason is fine too
                assert s.process.returncode == 6 and "error" in s.log(), s.log()
            except subprocess.TimeoutExpired:
                s.kill()
            os.unlink(os.path.join(m.path, "ballast"))
            s.start()
            for j in jobs:
                assert s.finished(j)["status"] == "completed"


def case_read_only():
    with Mount("8m") as m:
        if not m.ok:
            return "skipped: no mount"
        m.remount("ro")
        s = Service(state=os.path.join(m.path, "state"), fake=True)
        s.start(wait=False)
        assert s.process.wait(30) == 6 and "read-only" in s.log().lower(), s.log()
        s.stop()


def refused(s, code, why):
    s.start(wait=False)
    assert s.process.wait(60) == code and why in s.log(), (s.process.returncode, s.log()[-500:])


def case_schema():
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "queue.db")
        s = Service(state=d, fake=True)
        with open(path, "w") as f:
            f.write("certainly no database " * 400)
        refused(s, 6, "not a database")
        os.unlink(path)
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE recipes(name TEXT)")
        db.commit()
        db.close()
        refused(s, 6, "another program")
        os.unlink(path)
        s.start()
        s.finished(s.accepted("x"))
        assert s.stop() == 0
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version=99")
        db.close()
        refused(s, 6, "newer")
        assert os.path.exists(path)
        s.stop()


def case_damaged():
    """A page of the table is overwritten: what the others hold goes on, the damaged file is kept."""
    with tempfile.TemporaryDirectory() as d:
        with Service(state=d, fake=True).start() as s:
            jobs = [s.accepted("x " + "long prompt " * 90) for _ in range(30)]
            for j in jobs:
                s.finished(j)
            waiting = [s.accepted("sleep 60000"), s.accepted("x " + "waits " * 300), s.accepted("x")]
            s.until(lambda: s.look(waiting[0])["status"] == "running")
            s.kill()
            db = sqlite3.connect(os.path.join(d, "queue.db"))
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            root = db.execute("SELECT rootpage FROM sqlite_schema WHERE name='jobs'").fetchone()[0]
            pages = [r[0] for r in db.execute("SELECT pageno FROM dbstat WHERE name='jobs' AND pagetype='leaf'")] \
                if "ENABLE_DBSTAT_VTAB" in str(db.execute("PRAGMA compile_options").fetchall()) else []
            size = db.execute("PRAGMA page_size").fetchone()[0]
            db.close()
            target = pages[1] if len(pages) > 2 else root + 5
            with open(os.path.join(d, "queue.db"), "r+b") as f:
                f.seek((target - 1) * size)
                f.write(b"\xa5" * size)
            s.start()
            assert "was damaged" in s.health()["last_error"], s.health()
            left = [j for j in jobs + waiting if s.call("GET", "/v1/jobs/" + j)[0] == 200]
            assert len(left) >= len(jobs) // 2, len(left)
            for j in [w for w in waiting[1:] if w in left]:
                s.until(lambda: s.call("POST", f"/v1/jobs/{waiting[0]}/cancel", b"")[0] in (202, 404, 409))
                assert s.finished(j)["status"] == "completed"
            assert [f for f in os.listdir(d) if ".damaged-" in f]
            assert s.finished(s.accepted("x"))["status"] == "completed"
            s.kill()
            s.start()
            assert not s.health()["last_error"], "mended for good"
            return f"{len(left)} of {len(jobs + waiting)} rows saved"


def case_clock():
    """The wall clock jumps a day back and forth: what is measured, waited for and kept does not mind."""
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "offset")
        open(path, "w").write("0")
        env = {"FAKE_CLOCK": path, "LD_PRELOAD": CLOCK, "ASAN_OPTIONS": "verify_asan_link_order=0",
               "TSAN_OPTIONS": os.environ.get("TSAN_OPTIONS", "")}
        with Service("--hang-limit", "5", fake=True, env=env).start() as s:
            first = s.accepted("x")
            s.finished(first)
            job, waiting = s.accepted("sleep 2000"), s.accepted("x")
            s.until(lambda: s.look(job)["status"] == "running")
            open(path, "w").write("-86400")
            last = s.accepted("x")
            assert s.look(last)["created_at"] < s.look(first)["created_at"] - 80000, "the shim works"
            for j in (job, waiting, last):
                end = s.finished(j)
                assert end["status"] == "completed" and end["attempts"] == 0, end
                t = end["result"]["timings"]
                assert 0 <= t["queued_s"] < 60, t
            assert s.call("GET", f"/v1/jobs/{first}/result")[0] == 200
            assert [j["id"] for j in s.call("GET", "/v1/jobs")[1]["data"]] == [last, waiting, job, first]
            h = s.health()
            assert h["workers"][0]["restarts"] == 0 and h["uptime_s"] < 600 and h["queue"]["oldest_s"] >= 0
            s.kill()
            s.start()
            assert s.finished(s.accepted("x"))["status"] == "completed"


def case_descriptors():
    """Few descriptors: fewer connections, told at the start; a crowd cannot take those that workers need."""
    low = ("prlimit", "--nofile=96:96")
    with Service(fake=True, prefix=low).start() as s:
        assert "open files leaves" in s.log()
        job = s.accepted("sleep 60000")
        crowd = []
        for _ in range(200):
            c = socket.socket()
            c.settimeout(1)
            try:
                c.connect(("127.0.0.1", s.port))
                c.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            except OSError:
                pass
            crowd.append(c)
        s.until(lambda: "worker 0 started" in s.log())
        pid = int(re.findall(r"worker 0 started, process (\d+)", s.log())[-1])
        os.kill(pid, signal.SIGKILL)
        s.until(lambda: s.log().count("worker 0 ready") >= 2, 30)
        for c in crowd:
            c.close()
        s.until(lambda: s.call("POST", f"/v1/jobs/{job}/cancel", b"", timeout=5)[0] == 202)
        assert s.finished(s.accepted("x"))["status"] == "completed"
    s = Service(fake=True, prefix=("prlimit", "--nofile=40:40"))
    refused(s, 6, "leaves no room for connections")
    s.stop()


def case_taken():
    with Service(fake=True).start() as s:
        twin = Service(state=s.state, fake=True)
        refused(twin, 3, "in use by another")
        twin.stop()
        other = Service(fake=True)
        other.port = s.port
        refused(other, 3, "cannot listen")
        other.stop()
        assert s.finished(s.accepted("x"))["status"] == "completed"
        assert s.health()["workers"][0]["restarts"] == 0, "nobody took its workers"


def main():
    cases = (case_full, case_full_and_killed, case_read_only, case_schema, case_damaged, case_clock, case_descriptors,
             case_taken)
    return 1 if run_cases([(f.__name__, f) for f in cases]) else 0


if __name__ == "__main__":
    sys.exit(main())
