#!/usr/bin/env python3
"""Workers on GPUs: the service, the real worker and the CUDA back end on the double of the runtime (tests/cuda).

    test_service_gpu.py PROGRAM FAKEWORKER [CASE ...]
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import deep_model
from gpu_double import UUID, cards
from servicelib import PICTURE, PROGRAM, ROOT, Service, run_cases

sys.path.insert(0, os.path.join(ROOT, "bench"))
from gpu import psnr  # noqa: E402

TESTS = os.path.dirname(os.path.abspath(sys.argv[2]))


def on_double(frees, double, *args, demo=True):
    """A service on such cards."""
    env, script = cards(TESTS, frees, double)
    lost = tempfile.TemporaryDirectory()
    s = Service("--headroom-gib", "0", *args, env=dict(env, QIE_CUDA_DOUBLE_LOST=os.path.join(lost.name, "card")), demo=demo)
    s.lost = lost
    s.script = script  # lives as long as the service
    return s


def refused(gpus):
    """What the service says to this list instead of starting."""
    s = on_double([2048] * 2, "", "--gpus", gpus)
    r = subprocess.run(s.command(), capture_output=True, text=True, env=s.env, timeout=60)
    s.stop()
    assert r.returncode, r
    return r.stderr


def case_a_worker_on_each_card():
    with on_double([2048] * 2, "", "--gpus", "1,0").start() as s:
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert [(w["gpu_id"], w["gpu_name"]) for w in s.health()["workers"]] == [(1, "Double 1"), (0, "Double 0")]
        jobs = [s.accepted(num_inference_steps=1, max_side=64) for _ in range(2)]
        ends = [s.finished(j) for j in jobs]
        assert all(e["status"] == "completed" for e in ends), ends
        assert {e["result"]["gpu_id"] for e in ends} == {0, 1}, ends
        assert "files: " in s.log() and "calls: seccomp" in s.log(), s.log()


def case_a_lost_card_ends_its_worker():
    with on_double([2048], ",lose_at=300", "--gpus", "0").start() as s:
        first = s.worker_pid()
        end = s.finished(s.accepted(num_inference_steps=1, max_side=64))
        assert end["status"] == "failed" and end["attempts"] == 3, end
        assert "lost" in end["error"]["message"] and "GPU 0" in end["error"]["message"], end
        w = s.health()["workers"][0]
        assert "lost" in w["last_error"] and w["restarts"] >= 3, w
        assert s.worker_pid() != first


def case_a_group_of_cards_is_one_worker():
    """Killed at work, it comes back with both of its cards and the job is done; the other group works on."""
    with on_double([2048] * 4, "", "--gpus", "2+0,1+3").start() as s:
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert [w["gpu_id"] for w in s.health()["workers"]] == [2, 1], s.health()
        with open("/proc/%d/environ" % s.worker_pid()) as f:
            cards = [x[len("CUDA_VISIBLE_DEVICES="):] for x in f.read().split("\0") if x.startswith("CUDA_VISIBLE_DEVICES=")]
        assert cards == ["%s,%s" % (UUID % 2, UUID % 0)], cards
        job = s.accepted(num_inference_steps=8, max_side=64)
        before = s.until(lambda: [w["pid"] for w in s.health()["workers"] if w["current"] and w["current"]["step"] > 0])[0]
        os.kill(before, signal.SIGKILL)
        end = s.finished(job)
        assert end["status"] == "completed" and end["attempts"] == 1, end  # that were lost
        assert "retry" in s.log(), s.log()
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert before not in [w["pid"] for w in s.health()["workers"]], s.health()
        assert [w["gpu_id"] for w in s.health()["workers"]] == [2, 1], s.health()


def case_a_group_that_loses_a_card():
    with on_double([2048] * 2, ",lose_at=300", "--gpus", "0+1").start() as s:
        end = s.finished(s.accepted(num_inference_steps=1, max_side=64))
        assert end["status"] == "failed" and "lost" in end["error"]["message"], end
        assert len(s.health()["workers"]) == 1 and s.health()["workers"][0]["restarts"] >= 3, s.health()


class Deep:
    """A model with enough layers to be shared, an edit of it, and what that takes of one card."""
    EDIT = dict(seed=5, num_inference_steps=2)

    def __init__(self, precision):
        self.precision = precision
        self.folder = tempfile.TemporaryDirectory()
        self.model, self.picture = self.path("model"), self.path("in.png")
        deep_model.make(self.model, 24, max_side=64, ref_area=4096)
        with open(self.picture, "wb") as f:
            f.write(PICTURE)
        plan = self.plan([4096])
        assert plan.startswith("resident"), plan
        self.weights, self.need = [float(x) for x in re.findall(r"([0-9.]+) MiB", plan)]

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def edit(self, env, guidance, *args):
        """The program's answer to the edit that EDIT asks the service for."""
        r = subprocess.run([PROGRAM, "edit", "--model", self.model, "--precision", self.precision, "--headroom-gib", "0", "-i", self.picture,
                            "-p", "turn the subject purple", "-S", "5", "-s", "2",
                            "--true-cfg-scale", str(guidance), "--json", "--quiet", "--threads", "1", *args], capture_output=True,
                           text=True, env=dict(os.environ, **env), timeout=300)
        assert r.returncode == 0, r
        return json.loads(r.stdout.splitlines()[-1])

    def plan(self, frees, guidance=4, visible=None):
        """How --dry-run says that the edit would be placed."""
        env, _script = cards(TESTS, frees)
        if visible:
            env["CUDA_VISIBLE_DEVICES"] = visible
        return self.edit(env, guidance, "--device", "cuda", "--dry-run", "-o", self.path("none.png"))["placement"]

    def drawn(self, name, env, guidance, *args):
        self.edit(env, guidance, "-o", self.path(name), *args)
        return self.path(name)

    def result(self, s, job):
        """The picture of a job of the service that has ended well."""
        path = self.path(job + ".png")
        with open(path, "wb") as f:
            f.write(s.call("GET", "/v1/jobs/%s/result" % job)[1])
        return path

    def service(self, frees, *args):
        return on_double(frees, "", "--model", self.model, "--threads", "1", "--precision", self.precision, *args, demo=False)


def case_a_group_holds_what_no_card_of_it_can():
    """Guidance on and off: the pictures of one big card, near the CPU's; health and job say how it was placed, as --dry-run did."""
    deep = Deep("f32")
    small = int(deep.need - 0.4 * deep.weights)  # two of them have room for 1.2 times the weights beside the work of each
    assert deep.plan([small]).startswith("streamed"), deep.plan([small])
    big, script = cards(TESTS, [4096])
    with deep.service([small] * 4, "--gpus", "0+1,2+3").start() as s:
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert [w["placement"] for w in s.health()["workers"]] == [None, None], s.health()
        for guidance in (1, 4):  # what takes more is placed again
            jobs = [s.accepted(true_cfg_scale=guidance, **deep.EDIT) for _ in range(2)]
            ends = [s.finished(j) for j in jobs]
            assert all(e["status"] == "completed" and e["attempts"] == 0 for e in ends), ends
            at = {e["result"]["gpu_id"]: e["result"]["placement"] for e in ends}
            assert set(at) == {0, 2}, ends
            for first, placed in at.items():
                assert placed.startswith("sharded, GPU %d (Double %d): " % (first, first)), placed
                assert "; GPU %d (Double %d): " % (first + 1, first + 1) in placed and "pass through" not in placed, placed
                assert placed == deep.plan([small] * 4, guidance, "%d,%d" % (first, first + 1)), placed
            assert {w["gpu_id"]: w["placement"] for w in s.health()["workers"]} == at, s.health()
            whole = deep.drawn("whole.png", big, guidance, "--device", "cuda")
            cpu = deep.drawn("cpu.png", {}, guidance, "--device", "cpu")
            for j in jobs:
                assert psnr(deep.result(s, j), whole) == 99 and psnr(deep.result(s, j), cpu) >= 60, psnr(deep.result(s, j), cpu)
        a_card_is_lost(s, deep)


def a_card_is_lost(s, deep):
    """Of the group that works on card 2: its worker alone ends and comes back, the other one answers, nothing is lost."""
    def worker(first):
        return [w for w in s.health()["workers"] if w["gpu_id"] == first][0]
    edit = dict(deep.EDIT, true_cfg_scale=1)
    before, other = worker(2)["pid"], worker(0)["pid"]
    jobs = [s.accepted(**dict(edit, num_inference_steps=16)) for _ in range(2)]
    s.until(lambda: worker(2)["current"] and worker(2)["current"]["step"] > 0)
    with open(s.env["QIE_CUDA_DOUBLE_LOST"] + ".3", "w"):
        s.until(lambda: worker(2)["pid"] != before)
    os.unlink(s.env["QIE_CUDA_DOUBLE_LOST"] + ".3")
    assert "GPU 3 (Double 3): the device was lost" in worker(2)["last_error"], worker(2)
    more = [s.accepted(**edit) for _ in range(4)]
    ends = [s.finished(j) for j in jobs + more]
    assert all(e["status"] == "completed" for e in ends), ends
    assert sorted(e["attempts"] for e in ends) == [0] * 5 + [1], ends
    expected = deep.drawn("short.png", {}, 1, "--device", "cpu")
    assert all(psnr(deep.result(s, j), expected) >= 60 for j in more)
    s.until(lambda: worker(2)["ready"])
    assert worker(0)["pid"] == other and worker(0)["restarts"] == 0 and worker(2)["restarts"] == 1, s.health()


def case_unequal_cards_some_half_full():
    """Four cards with more and less free: doctor, --dry-run and the worker count the same, and shares follow the free memory."""
    deep = Deep("bf16")
    # beside the work of each, in MiB: one less of them would not do
    frees = [int(deep.need - deep.weights) + room for room in (4, 7, 5, 6)]
    planned = deep.plan(frees)
    env, script = cards(TESTS, frees)
    r = subprocess.run([PROGRAM, "doctor", "--json", "--model", deep.model, "--headroom-gib", "0"], capture_output=True, text=True,
                       env=dict(os.environ, **env), timeout=60)
    told = json.loads(r.stdout)["placement"]["assigned"]
    number = r"[0-9.]+(?= MiB)"
    assert re.sub(number, "#", told) == re.sub(number, "#", planned), (told, planned)
    # doctor does not know the prompt
    assert all(abs(float(a) - float(b)) < 1 for a, b in zip(re.findall(number, told), re.findall(number, planned))), (told, planned)
    with deep.service(frees, "--gpus", "0+1+2+3").start() as s:
        end = s.finished(s.accepted(true_cfg_scale=4, **deep.EDIT))
        assert end["status"] == "completed" and end["result"]["placement"] == planned, (end, planned)
        assert s.health()["workers"][0]["placement"] == planned, s.health()
        big, script = cards(TESTS, [4096])
        assert psnr(deep.result(s, end["id"]), deep.drawn("whole.png", big, 4, "--device", "cuda")) == 99
    shares = re.findall(r"GPU (\d) \(Double \d\): ([0-9.]+) MiB", planned)
    assert planned.startswith("sharded") and [card for card, _ in shares] == ["1", "3", "2", "0"], planned
    held = [float(mib) for _, mib in shares]
    assert held[0] > held[1] > held[2] > held[3] > 0.5 and "pass through" not in planned, planned


def case_a_refused_allocation_is_told():
    """The job goes on one placement lower; its result, /health and the log say so. The next one has nothing new to say."""
    with on_double([2048], ",fail_alloc=1", "--gpus", "0").start() as s:
        first, second = (s.finished(s.accepted(num_inference_steps=1, max_side=64))["result"] for _ in range(2))
        words = "the GPU has no room for the resident placement"
        assert [w for w in first["warnings"] if w.startswith(words)] and words in s.log(), (first, s.log())
        assert not any(words in w for w in second["warnings"]), second
        assert first["placement"].startswith("streamed, GPU 0") and second["placement"] == first["placement"], (first, second)
        assert s.health()["workers"][0]["placement"] == first["placement"], s.health()


def case_too_large_is_refused_before_it_starts():
    with on_double([1200], "", "--gpus", "0").start() as s:
        pid = s.worker_pid()
        end = s.finished(s.accepted(width=4096, height=4096, ref_area=1 << 24))
        assert end["status"] == "failed" and "working memory" in end["error"]["message"] and end["attempts"] == 0, end
        assert s.health()["workers"][0]["placement"] is None and s.worker_pid() == pid, s.health()  # no card was touched for it
        assert s.finished(s.accepted(num_inference_steps=1, max_side=64))["status"] == "completed"


def case_the_cause_is_named():
    with on_double([2048], ",error=214,lose_at=300", "--gpus", "0").start() as s:
        end = s.finished(s.accepted(num_inference_steps=1, max_side=64))
        words = "GPU 0 (Double 0): cudaErrorECCUncorrectable: provoked (ECC error, Xid 48): the card needs a reset"
        assert end["status"] == "failed" and words in end["error"]["message"], end
        assert words in s.health()["workers"][0]["last_error"], s.health()


def case_bad_cards_are_named():
    assert "'7'" in refused("0+7"), refused("0+7")
    assert "'GPU-ffff'" in refused("1,GPU-ffff+0"), refused("1,GPU-ffff+0")
    assert "--gpus" in refused("0+"), refused("0+")
    assert "0" in refused("0+0"), refused("0+0")


def main():
    return 1 if run_cases([(f.__name__, f) for f in
                           (case_a_worker_on_each_card, case_a_lost_card_ends_its_worker, case_a_group_of_cards_is_one_worker,
                            case_a_group_that_loses_a_card, case_a_group_holds_what_no_card_of_it_can,
                            case_unequal_cards_some_half_full, case_a_refused_allocation_is_told,
                            case_too_large_is_refused_before_it_starts, case_the_cause_is_named, case_bad_cards_are_named)]) else 0


if __name__ == "__main__":
    sys.exit(main())
