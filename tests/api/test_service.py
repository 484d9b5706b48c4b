#!/usr/bin/env python3
"""The service from outside, with the demo model: contract, queue, events, limits, restarts.

    test_service.py PROGRAM FAKEWORKER [CASE ...]
Prints one line a case; exit status 1 if any failed. Nothing depends on how fast the machine is.
"""
import base64
import concurrent.futures
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from servicelib import B64, PICTURE, PROGRAM, ROOT, Service, free_port, run_cases

def refused(s, code, body, param=None, path="/edit"):
    got, answer = s.call("POST", path, body)
    assert got == code, (got, answer)
    assert set(answer["error"]) == {"message", "type", "param", "code"}, answer
    if param:
        assert answer["error"]["param"] == param, answer
    return answer["error"]["message"]


def case_contract(s):
    code, h = s.call("GET", "/health")
    assert code == 200 and h["status"] == "ok" and h["workers"][0]["gpu_id"] == -1, h
    code, r = s.call("POST", "/edit", {"prompt": "turn the subject purple", "image_base64": B64, "seed": 5},
                     {"X-Request-Id": "mine"})
    assert code == 200 and r["seed"] == 5 and s.headers["X-Request-Id"] == "mine", r
    assert base64.b64decode(r["image_base64"])[:4] == b"\x89PNG"
    again = s.form("/edit", {"prompt": "turn the subject purple", "seed": "5"}, [("image", PICTURE)])[1]
    assert again["image_base64"] == r["image_base64"], "same seed, same picture"
    code, r = s.call("POST", "/edit", {"prompt": "x", "images": [{"base64": B64}], "num_images": 2,
                                       "output_format": "webp", "num_inference_steps": 1})
    assert code == 200 and len(r["images"]) == 2 and base64.b64decode(r["images"][0])[:4] == b"RIFF", r
    code, r = s.form("/v1/images/edits", {"prompt": "x", "n": "1", "num_inference_steps": 1}, [("image[]", PICTURE)])
    assert code == 200 and r["data"][0]["b64_json"] and "created" in r, r
    assert s.call("GET", "/v1/models")[1]["data"][0]["id"] == "demo"
    assert s.call("GET", "/v1/models/demo")[0] == 200 and s.call("GET", "/v1/models/other")[0] == 404
    assert b"<!doctype html>" in s.call("GET", "/")[1][:40].lower()
    assert s.call("GET", "/openapi.json")[1]["openapi"].startswith("3.1")
    assert b"qwen_edit_jobs_total" in s.call("GET", "/metrics")[1]


def size_of(png):
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def case_sizes_and_seeds(s):
    """The switches of one edit; the demo keeps the size of its pictures unless told otherwise."""
    def edit(**more):
        code, r = s.call("POST", "/edit", {"prompt": "x", "image_base64": B64, "num_inference_steps": 1, **more})
        assert code == 200, r
        return r, base64.b64decode(r["image_base64"])
    given = size_of(PICTURE)
    assert size_of(edit()[1]) == given
    assert size_of(edit(keep_size=False, max_side=64)[1]) == (64, 64) != given
    assert size_of(edit(keep_size=True, max_side="none")[1]) == given
    assert size_of(edit(width=80)[1])[0] == 80
    first, png = edit(seed=5)
    assert b"seed" in png and b"seed" not in edit(metadata=False)[1]
    again = {"image_base64": base64.b64encode(png).decode(), "seed": 5}
    other = edit(**again)[0]
    assert other["seed"] != 5 and any("seed 5" in w for w in other["warnings"]) and edit(**again)[0]["seed"] == other["seed"], other["warnings"]
    assert edit(**again, force_seed=True)[0]["seed"] == 5
    refused(s, 422, {"prompt": "x", "image_base64": B64, "keep_size": True, "width": 64}, "keep_size")
    refused(s, 422, {"prompt": "x", "image_base64": B64, "ref_area": 3}, "ref_area")


def case_long_prompts(s):
    """What does not fit is refused at once, at the very token at which the engine itself refuses, in its words."""
    picture = os.path.join(ROOT, "demo", "samples", "ball.png")

    def engine(field, text):
        other = ["-p", text] if field == "prompt" else ["-p", "x", "-n", text, "--true-cfg-scale", "2"]
        r = subprocess.run([PROGRAM, "edit", "--model", "demo", "-i", picture, *other, "--dry-run"],
                           capture_output=True, text=True)
        return r.returncode == 0, r.stderr

    def service(field, text, path="/v1/jobs", **more):
        other = {"prompt": text} if field == "prompt" else {"prompt": "x", "negative_prompt": text, "true_cfg_scale": 2}
        return s.call("POST", path, {"image_base64": B64, **other, **more})

    for field in "prompt", "negative_prompt":
        fits, above = 1, 16000
        while above - fits > 1:
            middle = (fits + above) // 2
            code, r = service(field, "紫" * middle, dry_run=True)
            fits, above = (middle, above) if code == 200 else (fits, middle)
        assert 100 < fits < 15990, fits
        assert engine(field, "紫" * fits)[0]
        ok, words = engine(field, "紫" * above)
        for path in "/v1/jobs", "/edit":
            code, r = service(field, "紫" * above, path)
            assert not ok and code == 422 and r["error"]["param"] == field, r
            assert r["error"]["message"] in words, (r, words)
            assert r["error"]["message"].startswith(f"the {field} and pictures take 4"), r
    # unused: not counted
    assert s.call("POST", "/v1/jobs", {"image_base64": B64, "prompt": "x", "negative_prompt": "x" * 32000,
                                       "true_cfg_scale": 1, "dry_run": True})[0] == 200
    refused(s, 422, {"prompt": "an <|image_pad|>", "image_base64": B64}, "prompt")
    assert not s.call("GET", "/v1/jobs?status=failed")[1]["data"]


def case_refusals(s):
    good = {"prompt": "x", "image_base64": B64}
    refused(s, 422, {"image_base64": B64}, "prompt")
    refused(s, 422, {"prompt": "", "image_base64": B64}, "prompt")
    refused(s, 422, {"prompt": "x" * 32001, "image_base64": B64}, "prompt")
    refused(s, 422, {"prompt": "x"}, "image_base64")
    refused(s, 422, {"prompt": "x", "image_base64": "%%%"}, "image_base64")
    refused(s, 415, {"prompt": "x", "image_base64": base64.b64encode(b"no picture at all").decode()}, "image")
    refused(s, 413, {"prompt": "x", "image_base64": [B64] * 4})
    for name, value in (("seed", -1), ("seed", "seven"), ("num_inference_steps", 0), ("num_inference_steps", 201),
                        ("true_cfg_scale", 21), ("max_side", 63), ("num_images", 11), ("output_format", "bmp"),
                        ("priority", 10), ("nonsense", 1), ("response", "x"), ("num_inference_steps", "4"),
                        ("lora", [{"name": "a"}])):
        refused(s, 422, {**good, name: value}, name)
    for name, ours in (("steps", "num_inference_steps"), ("image", "image_base64"), ("cfg_scale", "true_cfg_scale"), ("n", "num_images")):
        assert f"did you mean '{ours}'" in refused(s, 422, {**good, name: 1}, name)
    assert "did you mean" not in refused(s, 422, {**good, "nonsense": 1}, "nonsense")
    assert "did you mean 'n'" in refused(s, 422, {"prompt": "x", "num_images_per_prompt": 2}, None, "/v1/images/edits")
    for path in ("../a.png", "/a.png", "a/../b.png", ".a.png", "a\\b.png", "a//b.png"):
        refused(s, 422, {**good, "response": "path", "output_path": path}, "output_path")
    refused(s, 422, {"prompt": "x", "mask": "x"}, "mask", "/v1/images/edits")
    for url in ("http://127.0.0.1/", "http://2130706433/", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
                "http://169.254.169.254/latest", "http://0x7f.1/", "http://localhost/", "file:///etc/passwd",
                "ftp://a/b"):
        refused(s, 422, {"prompt": "x", "image_url": url}, "image_url")
    for body in (b"{", b"[]", b'{"a":1,"a":2}'):
        code, a = s.call("POST", "/edit", body, {"Content-Type": "application/json"})
        assert code == 400, (code, a)
    assert s.call("POST", "/edit", b"x", {"Content-Type": "text/plain"})[0] == 415
    assert s.call("POST", "/edit", b"x", {"Content-Type": "multipart/form-data; boundary=a"})[0] == 400
    assert s.call("GET", "/edit")[0] == 405 and s.call("GET", "/none")[0] == 404
    assert s.call("GET", "/v1/jobs/none")[0] == 404
    assert s.call("GET", "/v1/jobs?limit=0")[0] == 422
    assert s.call("GET", "/health", headers={"Origin": "http://evil.example"})[0] == 403


def case_jobs(s):
    code, j = s.job(seed=1)
    assert code == 202 and j["status"] == "queued", j
    got = s.events(j["id"])
    names = [e["event"] for e in got]
    assert names[-1] == "completed" and "queued" in names, names
    assert [int(e["id"]) for e in got] == sorted({int(e["id"]) for e in got})
    assert s.events(j["id"], got[-1]["id"])[-1]["event"] == "completed"
    assert s.call("GET", f"/v1/jobs/{j['id']}/result")[1][:4] == b"\x89PNG"
    assert s.headers["Content-Type"] == "image/png"
    assert s.call("GET", f"/v1/jobs/{j['id']}/inputs/0")[1] == PICTURE
    assert s.call("GET", f"/v1/jobs/{j['id']}/inputs/1")[0] == 404
    assert s.call("POST", f"/v1/jobs/{j['id']}/cancel", b"")[0] == 409
    a, b = s.job(idempotency_key="k1", seed=2), s.job(idempotency_key="k1", seed=2)
    assert a[1]["id"] == b[1]["id"], (a, b)
    assert s.job(idempotency_key="k1", seed=3)[0] == 409
    first, second = s.job(num_inference_steps=100)[1], s.job(num_inference_steps=100)[1]
    for j2 in (second, first):
        assert s.call("POST", f"/v1/jobs/{j2['id']}/cancel", b"")[0] == 202
        assert s.finished(j2["id"])["status"] == "cancelled"
    s.finished(a[1]["id"])
    listed = s.call("GET", "/v1/jobs?limit=2")[1]
    assert len(listed["data"]) == 2 and listed["has_more"]
    assert s.call("DELETE", "/v1/jobs/" + j["id"])[0] == 204 and s.call("GET", "/v1/jobs/" + j["id"])[0] == 404


def case_concurrent(s):
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(lambda: s.job(num_inference_steps=1, max_side=64)) for _ in range(80)]
        answers = [c.result() for c in calls]
    accepted = [a["id"] for code, a in answers if code == 202]
    assert {code for code, _ in answers} <= {202, 429}, {code for code, _ in answers}
    assert len(accepted) >= 64, len(accepted)
    for j in accepted:
        assert s.finished(j)["status"] == "completed"
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        edit = {"prompt": "x", "image_base64": B64, "num_inference_steps": 1, "max_side": 64}
        assert all(c.result()[0] == 200 for c in [pool.submit(s.call, "POST", "/edit", edit) for _ in range(10)])


def case_hostile(s):
    for text in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /edit HTTP/1.1\r\nHost: a\r\n\r\n",
                 b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n",
                 b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                 b"GET / HTTP/1.1\r\nX: " + b"a" * 200000 + b"\r\n\r\n",
                 b"POST /edit HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", s.port), 30) as c:
            try:
                c.sendall(text)
                c.shutdown(socket.SHUT_WR)
                answer = c.recv(100)
                assert not answer or b" 4" in answer[:14] or b" 5" in answer[:14], answer
            except OSError:  # closed before all was sent
                pass
    body = json.dumps({"prompt": "x", "image_base64": B64, "num_inference_steps": 150}).encode()
    with socket.create_connection(("127.0.0.1", s.port), 30) as c:  # leaves while its edit runs
        c.sendall(b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                  % len(body) + body)
        s.until(lambda: s.call("GET", "/health")[1]["workers"][0]["current"])
    s.until(lambda: s.call("GET", "/v1/jobs?limit=1")[1]["data"][0]["status"] == "cancelled")


def case_one_master():
    s = Service().start()
    try:
        for args, what in ((["--port", str(free_port())], b"in use by another"), (None, b"cannot listen")):
            other = tempfile.mkdtemp()
            command = [PROGRAM, "serve", "--model", "demo", "--state-dir", s.state if args else other,
                       *(args or ["--port", str(s.port)])]
            r = subprocess.run(command, capture_output=True, timeout=60)
            assert r.returncode == 3 and what in r.stderr, r
            shutil.rmtree(other)
    finally:
        assert s.stop() == 0


def case_keys():
    s = Service("--api-key", "first-key-1", "--api-key", "second-key-2").start()
    try:
        a, b = {"Authorization": "Bearer first-key-1"}, {"Authorization": "Bearer second-key-2"}
        assert s.call("GET", "/health")[0] == 401 and s.call("GET", "/health/live")[0] == 200
        assert s.call("GET", "/health", headers={"Authorization": "Bearer first-key"})[0] == 401
        code, j = s.form("/v1/jobs", {"prompt": "x"}, [("image", PICTURE)], a)
        assert code == 202 and s.call("GET", "/v1/jobs/" + j["id"], headers=b)[0] == 403
        assert s.call("GET", "/v1/jobs", headers=b)[1]["data"] == []
    finally:
        assert s.stop() == 0


def main():
    with Service().start() as s:
        cases = [(f.__name__, lambda f=f: f(s)) for f in
                 (case_contract, case_sizes_and_seeds, case_long_prompts, case_refusals, case_jobs, case_concurrent, case_hostile)]
        failed = run_cases(cases + [("case_one_master", case_one_master), ("case_keys", case_keys)])
        if failed:
            sys.stderr.write(s.log()[-3000:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
