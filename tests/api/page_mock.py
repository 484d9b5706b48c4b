#!/usr/bin/env python3
"""A stand-in for `qwen-edit serve`, for work on the page: the part of the HTTP contract that the page uses.

    python3 tests/api/page_mock.py [--port N] [--key K] [--step-ms N] [--demo]

Serves web/ itself with the same Content-Security-Policy. Jobs run one after the other. Words in the prompt steer them:
"fail" fails at step 2, "busy" is refused with 429. The result is the scene of picture() with a purple subject.
"""
import argparse, base64, json, pathlib, re, struct, sys, threading, time, uuid, zlib
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WEB = pathlib.Path(__file__).resolve().parents[2] / "web"
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
       "base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
ENDED = ("completed", "failed", "cancelled", "expired")


def picture(width=192, height=128, subject=(216, 57, 43), ground=(242, 230, 201), noise=0):
    """PNG bytes of a disc over a ground with a darker floor: simple enough for the demo model."""
    rows = bytearray()
    cx, cy, r = width / 2, height / 2, min(width, height) * 0.3
    for y in range(height):
        rows.append(0)
        for x in range(width):
            inside = (x - cx) ** 2 + (y - cy) ** 2 <= r * r
            c = subject if inside else tuple(int(v * 0.86) for v in ground) if y > height * 0.72 else ground
            if noise:
                n = (x * 73 ^ y * 151 ^ x * y) % (2 * noise + 1) - noise
                c = tuple(max(0, min(255, v + n)) for v in c)
            rows += bytes(c)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(rows), 6)) + chunk(b"IEND", b""))


def size_of(png):
    return struct.unpack(">II", png[16:24]) if png[:4] == b"\x89PNG" else (192, 128)


class Refused(Exception):
    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


class Service:
    def __init__(self, key="", step_ms=60, demo=False):
        self.key, self.step_s, self.demo = key, step_ms / 1000, demo
        self.jobs, self.queue, self.changed = {}, [], threading.Condition()
        threading.Thread(target=self.work, daemon=True).start()

    def event(self, job, name, data):
        with self.changed:
            job["events"].append((name, data))
            self.changed.notify_all()

    def accept(self, fields, images):
        known = {"prompt", "num_inference_steps", "true_cfg_scale", "guidance_scale", "negative_prompt", "max_side", "seed",
                 "preview", "idempotency_key", "lora", "cache"}
        for name in fields:
            if name not in known:
                raise Refused(422, f"unknown field: {name}", name, "unknown_field")
        if "busy" in fields.get("prompt", ""):
            raise Refused(429, "the queue is full (64 jobs)", None, "queue_full", [("Retry-After", "2")])
        steps = fields.get("num_inference_steps", "4")
        if not re.fullmatch(r"\d+", steps) or not 1 <= int(steps) <= 200:
            raise Refused(422, f"num_inference_steps must be an integer from 1 to 200, not {steps}", "num_inference_steps",
                          "out_of_range")
        if not images:
            raise Refused(422, "at least one picture is needed", "image", "missing")
        with self.changed:
            for job in self.jobs.values():
                if fields.get("idempotency_key") and job["key"] == fields["idempotency_key"]:
                    return job
            job = {"id": "job_" + uuid.uuid4().hex[:20], "status": "queued", "fields": fields, "images": images, "events": [],
                   "key": fields.get("idempotency_key"), "steps": int(steps), "at": time.time(), "cancel": False,
                   "seed": int(fields["seed"]) if fields.get("seed", "random") != "random" else int(time.time() * 1e6) % 2 ** 53}
            self.jobs[job["id"]] = job
            self.queue.append(job)
        self.event(job, "queued", {"position": len(self.queue) - 1, "eta_s": len(self.queue) * job["steps"] * self.step_s})
        return job

    def work(self):
        while True:
            with self.changed:
                while not self.queue:
                    self.changed.wait()
                job = self.queue.pop(0)
                if job["cancel"]:
                    continue
                job["status"], job["started"] = "running", time.time()
            self.event(job, "started", {"worker": 0, "gpu_id": -1})
            self.event(job, "progress", {"stage": "encode", "step": 0, "total": 0})
            time.sleep(self.step_s)
            w, h = size_of(job["images"][-1])
            for k in range(1, job["steps"] + 1):
                time.sleep(self.step_s)
                if job["cancel"]:
                    job["status"] = "cancelled"
                    self.event(job, "cancelled", {})
                    break
                if k == 2 and "fail" in job["fields"]["prompt"]:
                    job["status"] = "failed"
                    job["error"] = {"message": "the worker died twice while it ran this job (signal 9)", "type": "server_error",
                                    "code": "worker_died", "param": None}
                    self.event(job, "failed", {"error": job["error"]})
                    break
                job["progress"] = {"stage": "denoise", "step": k, "total": job["steps"], "eta_s": (job["steps"] - k) * self.step_s}
                self.event(job, "progress", job["progress"])
                if job["fields"].get("preview") == "true" and k % 3 == 1:
                    part = k / job["steps"]
                    mix = tuple(int(a + (b - a) * part) for a, b in zip((216, 57, 43), (128, 60, 190)))
                    small = picture(max(16, w // 4), max(16, h // 4), mix, noise=int(90 * (1 - part)))
                    self.event(job, "preview", {"step": k, "b64_json": base64.b64encode(small).decode()})
            else:
                job["result"] = picture(w, h, (128, 60, 190))
                job["status"], job["ended"] = "completed", time.time()
                self.event(job, "completed", self.view(job))

    def view(self, job):
        v = {"id": job["id"], "object": "job", "status": job["status"], "created": int(job["at"]), "inputs": len(job["images"])}
        if job["status"] == "queued":
            v["queue_position"] = self.queue.index(job) if job in self.queue else 0
            v["eta_s"] = (v["queue_position"] + 1) * job["steps"] * self.step_s
        if job["status"] == "running":
            v["progress"] = job.get("progress", {"stage": "encode", "step": 0, "total": 0})
        if job["status"] == "failed":
            v["error"] = job["error"]
        if job["status"] == "completed":
            w, h = size_of(job["images"][-1])
            scale = float(job["fields"].get("true_cfg_scale", 1 if self.demo else 4))
            v.update(seed=job["seed"], width=w, height=h, num_inference_steps=job["steps"], true_cfg_scale=scale,
                     cfg=scale > 1, model="demo" if self.demo else "Qwen/Qwen-Image-Edit-2511",
                     timings={"queued_s": job["started"] - job["at"], "total_s": job["ended"] - job["started"]},
                     loras=[{"name": n, "weight": float(w)} for n, _, w in [job["fields"]["lora"].rpartition(":")]]
                     if "lora" in job["fields"] else [], cache=job["fields"].get("cache", "off"),
                     warnings=["guidance_scale has no effect on this model"] if "guidance_scale" in job["fields"] else [])
        return v


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", CSP),
                            ("X-Request-Id", uuid.uuid4().hex[:12]), ("X-Content-Type-Options", "nosniff"), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.route(self.path.split("?")[0], body)
        except Refused as e:
            self.send(e.status, {"error": {"message": str(e), "type": "invalid_request_error", "param": e.param, "code": e.code}},
                      headers=e.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_DELETE = handle_one

    def route(self, path, body):
        s = self.server.service
        if self.command == "GET" and (path == "/" or path.startswith("/assets/")):
            name = WEB / ("index.html" if path == "/" else path.removeprefix("/assets/"))
            if name.parent != WEB or not name.is_file() or name.suffix not in TYPES:
                raise Refused(404, "unknown path")
            return self.send(200, name.read_bytes(), TYPES[name.suffix])
        if s.key and self.headers.get("Authorization") != "Bearer " + s.key:
            raise Refused(401, "a key is needed: Authorization: Bearer KEY" if not self.headers.get("Authorization")
                          else "this key is not known", None, "invalid_api_key")
        if path == "/health":
            return self.send(200, {"status": "ok", "version": "0", "queue": {"depth": len(s.queue)},
                                   "workers": [{"id": 0, "ready": True, "state": "ready"}]})
        if path == "/v1/models":
            about = json.loads((WEB.parent / "demo/model/qwen_edit.json").read_text())["about"] if s.demo else None
            return self.send(200, {"object": "list", "data": [{
                "id": "demo" if s.demo else "Qwen/Qwen-Image-Edit-2511", "object": "model", "about": about,
                "defaults": {"num_inference_steps": 4 if s.demo else 40, "true_cfg_scale": 1.0 if s.demo else 4.0,
                             "guidance_scale": 1.0, "negative_prompt": " ", "max_side": None, "cache": "off"},
                "loras": [{"name": "Test-Lightning-2steps", "bytes": 1, "num_inference_steps": 2, "true_cfg_scale": 1.0},
                          {"name": "style", "bytes": 1}],
                "limits": {"max_images": 3, "max_body_bytes": 64 << 20, "num_inference_steps": [1, 200],
                           "true_cfg_scale": [0, 20], "max_side": [64, 4096]}}]})
        if path == "/v1/jobs" and self.command == "POST":
            kind = self.headers.get("Content-Type", "")
            parts = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body).get_payload()
            fields, images = {}, []
            for p in parts:
                name = p.get_param("name", header="Content-Disposition")
                data = p.get_payload(decode=True)
                if name == "image":
                    images.append(data)
                else:
                    fields[name] = data.decode()
            job = s.accept(fields, images)
            return self.send(202, {**s.view(job), "poll_url": f"/v1/jobs/{job['id']}", "events_url": f"/v1/jobs/{job['id']}/events"})
        m = re.fullmatch(r"/v1/jobs/(\w+)(?:/(result|events|cancel|inputs/(\d+)))?", path)
        job = m and s.jobs.get(m[1])
        if not job:
            raise Refused(404, "no such job" if m else "unknown path")
        if self.command == "DELETE":
            del s.jobs[m[1]]
            return self.send(200, {"id": m[1], "deleted": True})
        if m[2] is None:
            return self.send(200, s.view(job))
        if m[2] == "result":
            if "result" not in job:
                raise Refused(404, "this job has no result yet")
            return self.send(200, job["result"], "image/png")
        if m[3] is not None:
            return self.send(200, job["images"][int(m[3])], "image/png")
        if m[2] == "cancel":
            if job["status"] in ENDED:
                raise Refused(409, "this job has ended", None, "not_cancellable")
            job["cancel"] = True
            if job["status"] == "queued":
                job["status"] = "cancelled"
                s.queue.remove(job)
                s.event(job, "cancelled", {})
            return self.send(200, s.view(job))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        at = int(self.headers.get("Last-Event-ID") or 0)
        while True:
            with s.changed:
                while len(job["events"]) <= at:
                    s.changed.wait(15)
                name, data = job["events"][at]
                cut = self.server.cut.pop(job["id"], None) if self.server.cut else None
            if cut:
                return
            at += 1
            self.wfile.write(f"id: {at}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode())
            self.wfile.flush()
            if name in ENDED:
                return


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port=0, **options):
        super().__init__(("127.0.0.1", port), Handler)
        self.service, self.cut = Service(**options), {}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=7861)
    p.add_argument("--key", default="")
    p.add_argument("--step-ms", type=int, default=60)
    p.add_argument("--demo", action="store_true")
    a = p.parse_args()
    server = Server(a.port, key=a.key, step_ms=a.step_ms, demo=a.demo)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
