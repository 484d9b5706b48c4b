#!/usr/bin/env python3
"""Requests made from /openapi.json: valid, nearly valid and wrong. Every answer must be one that the description
names, never a 500, and JSON where it says so. With schemathesis (QIE_SCHEMATHESIS=its program) that runs too.

    test_service_schema.py PROGRAM FAKEWORKER [CASE ...]     QIE_TEST_LONG=1: 20 times as many
"""
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse

from servicelib import B64, LONG, PICTURE, Service, run_cases

# The same requests each time, so that a change of the code is what a failure means; others in the long tier.
SEED = int(os.environ.get("QIE_TEST_SEED", time.time() if os.environ.get("QIE_TEST_LONG") else 1))
STRANGE = ["", " ", "\x00", "\u2028", "ÿ", "𤮯", "\ud83d\ude00", "../../x", "a" * 5000, "null", "-1", "1e400", "NaN", "%s%n",
           "<b>", "'; DROP TABLE jobs; --", "data:;base64,", "http://[::", "random", "auto", "64x64"]
NUMBERS = [0, -1, 1, 2, 63, 64, 1.5, 4096, 4097, 2 ** 31, 2 ** 53 - 1, 2 ** 53, 2 ** 63, -2 ** 63, 1e308, -0.0]
ANY = [None, True, False, [], {}, [[]], {"a": 1}, [None], *NUMBERS, *STRANGE]


def valid(schema, rng):
    if "oneOf" in schema:
        return valid(rng.choice(schema["oneOf"]), rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "string")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "integer":
        return rng.choice([schema.get("minimum", 0), schema.get("maximum", 100),
                           rng.randint(schema.get("minimum", 0), min(schema.get("maximum", 100), 10 ** 6) )])
    if kind == "number":
        return rng.choice([schema.get("minimum", 0), rng.uniform(schema.get("minimum", 0), schema.get("maximum", 9))])
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        n = rng.randint(schema.get("minItems", 0), min(schema.get("maxItems", 3), 4))
        return [valid(schema.get("items", {}), rng) for _ in range(n)]
    if kind == "object":
        return {k: valid(v, rng) for k, v in schema.get("properties", {}).items() if rng.random() < 0.6}
    if kind == "null":
        return None
    return "x" * max(schema.get("minLength", 1), 1)


def request_body(schema, rng):
    """A body that is nearly always accepted, with some fields bent."""
    names = list(schema["properties"])
    body = {n: valid(schema["properties"][n], rng) for n in names if rng.random() < 0.15}
    body["prompt"] = rng.choice(["x", "refuse", "x" * 100])
    for n in ("image_base64", "images", "image_url", "lora", "output_path", "response", "mask"):
        if rng.random() < 0.8:
            body.pop(n, None)
    body.pop("stream", None)
    if rng.random() < 0.8 and "image_base64" in names:
        body["image_base64"] = rng.choice([B64, [B64], "data:image/png;base64," + B64, [B64] * 3])
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        body[rng.choice(names + ["unknown"])] = rng.choice(ANY)
    if rng.random() < 0.05:
        body.pop("prompt", None)
    return body


def form_of(body, rng):
    out = b""
    for k, v in body.items():
        if k.startswith("image"):
            continue
        v = v if isinstance(v, str) else json.dumps(v)
        out += b"--bb\r\nContent-Disposition: form-data; name=\"%s\"\r\n\r\n%s\r\n" % (
            k.encode(), v.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        data = rng.choice([PICTURE, PICTURE, PICTURE, PICTURE[:50], b"", bytes(rng.randrange(256) for _ in range(200))])
        out += b"--bb\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a\"\r\n\r\n" + data + b"\r\n"
    out += b"--bb--\r\n"
    if rng.random() < 0.1:
        out = out[:rng.randrange(len(out))]
    return out, "multipart/form-data; boundary=bb"


def judge(spec, path, method, code, headers, data):
    answers = spec["paths"][path][method]["responses"]
    assert str(code) in answers, f"{method} {path} answered {code}, which is not documented: {str(data)[:300]}"
    assert code != 500, (method, path, data)
    kinds = answers[str(code)].get("content", {})
    kind = headers.get("Content-Type", "").split(";")[0]
    assert not kinds or kind in kinds or any(k.endswith("/*") and kind.startswith(k[:-1]) for k in kinds), \
        f"{method} {path} {code}: {kind} instead of {list(kinds)}"
    if code >= 400 and path not in ("/health", "/health/ready"):
        e = data["error"]
        assert set(e) == {"message", "type", "param", "code"} and e["code"] == code and e["message"], (method, path, data)
    if code in (429, 503):
        assert int(headers["Retry-After"]) >= 1


def case_generated():
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as d, Service("--output-dir", d, "--queue-size", "500", fake=True).start() as s:
        spec = s.call("GET", "/openapi.json")[1]
        jobs, seen = [], {}
        for i in range(6000 if LONG else 300):
            path = rng.choice(list(spec["paths"]))
            method = rng.choice(list(spec["paths"][path]))
            op = spec["paths"][path][method]
            body, headers = None, {}
            if "requestBody" in op:
                schemas = {t: c["schema"] for t, c in op["requestBody"]["content"].items()}
                if rng.random() < 0.6 and "application/json" in schemas:
                    body = json.dumps(request_body(schemas["application/json"], rng)).encode()
                    headers["Content-Type"] = "application/json"
                    if rng.random() < 0.05:
                        body = body[:rng.randrange(len(body))]
                else:
                    body, headers["Content-Type"] = form_of(request_body(schemas["multipart/form-data"], rng), rng)
                if rng.random() < 0.02:
                    headers["Content-Type"] = rng.choice(["text/plain", "", "application/xml", "multipart/form-data"])
            elif method == "post":
                body = rng.choice([b"", b"{}", b"x" * 100])
            url, query = path, {}
            for p in op.get("parameters", []):
                value = str(rng.choice(ANY))
                if p["name"] == "id" and rng.random() < 0.8 and path.startswith("/v1/jobs"):
                    value = rng.choice(jobs or ["job_none"])
                elif p["name"] in ("n", "limit") and rng.random() < 0.7:
                    value = str(rng.randint(0, 3))
                if p["in"] == "path":
                    url = url.replace("{%s}" % p["name"], urllib.parse.quote(
                        value.encode("utf-8", "surrogatepass"), safe="")[:2000] or "%20")
                elif p["in"] == "query" and rng.random() < 0.5:
                    query[p["name"]] = value.encode("utf-8", "surrogatepass")[:2000]
            if query:
                url += "?" + urllib.parse.urlencode(query)
            if len(url) > 15000:
                continue
            code, data = s.call(method.upper(), url, body, headers, timeout=60)
            if code == 404 and "{" in path and path not in spec["paths"]:
                continue
            try:
                judge(spec, path, method, code, s.headers, data)
            except AssertionError:
                print(f"seed {SEED}, request {i}: {method} {url[:300]!r} {headers} {str(body)[:2000]}")
                raise
            seen[(path, method, code)] = seen.get((path, method, code), 0) + 1
            if code == 202 and path == "/v1/jobs":
                jobs.append(data["id"])
        assert s.call("GET", "/health")[0] == 200 and s.health()["workers"][0]["restarts"] == 0
        return f"seed {SEED}, {len(seen)} kinds of answers on {len({k[:2] for k in seen})} operations"


def case_schemathesis():
    program = os.environ.get("QIE_SCHEMATHESIS")
    if not program:
        return "skipped: QIE_SCHEMATHESIS names no program"
    with Service(fake=True).start() as s, tempfile.TemporaryDirectory() as d:
        r = subprocess.run([program, "run", f"http://127.0.0.1:{s.port}/openapi.json", "--checks",
                            "not_a_server_error,status_code_conformance,content_type_conformance,"
                            "response_schema_conformance,response_headers_conformance,unsupported_method",
                            "--max-examples", "300" if LONG else "30", "--continue-on-failure", "--no-color"],
                           cwd=d, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout[-3000:]
        return next((line for line in r.stdout.splitlines() if "generated" in line), "").strip()


def main():
    return 1 if run_cases([("case_generated", case_generated), ("case_schemathesis", case_schemathesis)]) else 0


if __name__ == "__main__":
    sys.exit(main())
