"""Client of the service `qwen-edit serve`: standard library only, this one file, Python 3.8 or newer.

    from qwen_edit_client import Client
    client = Client("http://127.0.0.1:7860")
    result = client.edit(["photo.png"], "turn the subject purple", seed=7)
    result.save("out.png")                       # result.seed, result.width, result.warnings, ...

    job = client.submit(["a.png", "b.png"], "put the hat of Picture 2 on the cat of Picture 1", num_images=2)
    for event in job.events():                   # queued, started, progress, retrying, then completed | failed | cancelled
        print(event.name, event.data)
    job.result().save("out.png")                 # out-1.png and out-2.png
    job.cancel()

Fields are those of the HTTP interface (docs/API.md): negative_prompt, seed, force_seed, num_inference_steps, true_cfg_scale,
guidance_scale, max_side, width, height, ref_area, keep_size, num_images, output_format, output_compression, metadata,
response, output_path, lora ("NAME:WEIGHT" or a list of such, or of {"name", "weight"}), cache, priority, idempotency_key,
preview. Pictures are paths, bytes, open files, or addresses
("https://..."), which the service fetches.

On the command line:
    python3 qwen_edit_client.py URL PICTURE [PICTURE ...] PROMPT OUT.png [FIELD=VALUE ...]
"""
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid

__all__ = ["Client", "EditError", "Event", "Job", "Result"]

ENDS = ("completed", "failed", "cancelled", "expired")
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class EditError(Exception):
    """The service refused or failed, or cannot be reached (status 0).

    `status` is the HTTP status, `type` the category ("INVALID", "BUSY" ...), `param` the field at fault or None,
    `retry_after` the seconds after which to ask again or None, `body` the answer as parsed JSON or None."""

    def __init__(self, status, error, retry_after=None, body=None):
        super().__init__(error.get("message") or "HTTP %s" % status)
        self.status, self.type, self.param = status, error.get("type"), error.get("param")
        self.retry_after, self.body = retry_after, body


class Event:
    """What happened to a job: `name` and `data` as in the interface."""

    def __init__(self, name, data):
        self.name, self.data = name, data

    def __repr__(self):
        return "Event(%r, %r)" % (self.name, self.data)


class Result:
    """Pictures (bytes, as encoded) and what the service says about them: `seed`, `width`, `timings`, `warnings` ..."""

    def __init__(self, job_id, pictures, info):
        self.job_id, self.pictures, self.info = job_id, pictures, info

    def __getattr__(self, name):
        try:
            return self.__dict__["info"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __bytes__(self):
        return self.pictures[0]

    def save(self, path):
        """Write the picture; several are written to NAME-1.EXT, NAME-2.EXT ... Returns the paths."""
        base, ending = os.path.splitext(os.fspath(path))
        paths = [os.fspath(path)] if len(self.pictures) == 1 else ["%s-%d%s" % (base, i + 1, ending)
                                                                   for i in range(len(self.pictures))]
        for name, picture in zip(paths, self.pictures):
            with open(name, "wb") as f:
                f.write(picture)
        return paths


class Job:
    """An accepted job. `id`, and what the service said when it took it (`queue_position`, `eta_s`)."""

    def __init__(self, client, answer):
        self.client, self.id, self.accepted = client, answer["id"], answer

    def status(self):
        """The job as the service sees it now: a dict with `status`, `queue_position`, `progress`, `result`, `error`."""
        return self.client.job(self.id)

    def events(self):
        """Yield what happens until the job has ended; a connection that breaks is taken up again."""
        return self.client.events(self.id)

    def cancel(self):
        self.client.cancel(self.id)

    def delete(self):
        """Forget an ended job and its pictures."""
        self.client.delete(self.id)

    def wait(self, progress=None):
        """Follow to the end and return the Result; progress(name, data) is called for each event."""
        for event in self.events():
            if progress:
                progress(event.name, event.data)
            if event.name in ("failed", "cancelled", "expired"):
                error = event.data.get("error") or {"message": "the job is " + event.name}
                raise EditError(error.get("code") or 0, error)
        return self.result()

    def result(self):
        """The Result of a completed job."""
        return self.client.result(self.id)


class Client:
    """`key`: the API key, default QWEN_EDIT_API_KEY. `timeout`: seconds without a byte after which a connection is
    given up. `patience`: seconds for which a full or absent service is asked again (0: not at all)."""

    def __init__(self, url="http://127.0.0.1:7860", key=None, timeout=60, patience=60):
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self.key = key or os.environ.get("QWEN_EDIT_API_KEY") or None

    # ---- transport
    def _open(self, method, path, body=None, headers=None):
        headers = dict(headers or {})
        if self.key:
            headers["Authorization"] = "Bearer " + self.key
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as e:
            with e:
                try:
                    answer = json.loads(e.read())
                    error = answer.get("error")
                except (ValueError, AttributeError):
                    answer = error = None
                after = e.headers.get("Retry-After", "")
            if not isinstance(error, dict):
                error = {"message": "%s answers HTTP %d and is no qwen-edit service" % (self.url, e.code)}
            raise EditError(e.code, error, int(after) if after.isdigit() else None, answer) from None
        except OSError as e:  # urllib.error.URLError is one
            raise EditError(0, {"message": "cannot reach %s: %s" % (self.url, getattr(e, "reason", e)),
                                "type": "NETWORK"}) from None

    def _json(self, method, path, body=None, headers=None):
        """An answer in JSON; waits as long as a busy service asks for, within `patience`."""
        end = time.monotonic() + self.patience
        while True:
            try:
                with self._open(method, path, body, headers) as r:
                    text = r.read()
                return json.loads(text) if text else None
            except EditError as e:
                if e.status not in (429, 503) or e.retry_after is None or time.monotonic() + e.retry_after > end:
                    raise
                time.sleep(max(e.retry_after, 0.1))

    # ---- edits
    def submit(self, pictures, prompt, **fields):
        """Queue an edit and return its Job."""
        fields.setdefault("idempotency_key", uuid.uuid4().hex)  # asked twice, it is still one job
        body, kind = _form(pictures, dict(fields, prompt=prompt))
        return Job(self, self._json("POST", "/v1/jobs", body, {"Content-Type": kind}))

    def edit(self, pictures, prompt, progress=None, **fields):
        """Submit, follow and return the Result. Ctrl-C (and any exception of `progress`) cancels the job."""
        job = self.submit(pictures, prompt, **fields)
        try:
            return job.wait(progress)
        except EditError:
            raise
        except BaseException:
            try:
                job.cancel()
            except EditError:
                pass
            raise

    def plan(self, pictures, prompt, **fields):
        """Sizes, steps and memory of an edit that is not made."""
        body, kind = _form(pictures, dict(fields, prompt=prompt, dry_run=True))
        return self._json("POST", "/v1/jobs", body, {"Content-Type": kind})

    # ---- jobs
    def jobs(self, status=None, limit=50, after=None):
        """Own jobs, newest first: a list of dicts."""
        query = "?limit=%d" % limit + ("&status=" + status if status else "") + ("&after=" + after if after else "")
        return self._json("GET", "/v1/jobs" + query)["data"]

    def job(self, job_id):
        return self._json("GET", "/v1/jobs/" + job_id)

    def cancel(self, job_id):
        self._json("POST", "/v1/jobs/%s/cancel" % job_id, b"")

    def delete(self, job_id):
        self._json("DELETE", "/v1/jobs/" + job_id)

    def picture(self, job_id, n=0):
        """Result n as encoded bytes."""
        with self._open("GET", "/v1/jobs/%s/result?n=%d" % (job_id, n)) as r:
            return r.read()

    def result(self, job_id):
        info = dict(self.job(job_id).get("result") or {})
        count = len(info.pop("files", None) or [0])
        return Result(job_id, [self.picture(job_id, n) for n in range(count)], info)

    def events(self, job_id):
        last, lost_at, wait = None, None, 0.25
        while True:
            try:
                headers = {"Last-Event-ID": last} if last else {}
                with self._open("GET", "/v1/jobs/%s/events" % job_id, headers=headers) as r:
                    lost_at, wait = None, 0.25
                    for last, event in _events(r):
                        yield event
                        if event.name in ENDS:
                            return
                error = EditError(0, {"message": "the connection to %s was lost" % self.url, "type": "NETWORK"})
            except EditError as e:
                if e.status in (401, 403, 404, 410):
                    raise
                error = e
            except (OSError, ValueError) as e:  # in the middle of the stream
                error = EditError(0, {"message": "the connection to %s was lost: %s" % (self.url, e), "type": "NETWORK"})
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > self.patience:
                raise error
            time.sleep(wait)
            wait = min(wait * 2, 5)

    # ---- the service
    def health(self):
        """The state of the service, ready or not."""
        try:
            with self._open("GET", "/health") as r:
                return json.load(r)
        except EditError as e:
            if e.status != 503 or not e.body:
                raise
            return e.body

    def models(self):
        """Models with the defaults in force and the limits."""
        return self._json("GET", "/v1/models")["data"]


def _events(lines):
    """(id, Event) from the lines of a stream; lines end in LF or CRLF."""
    name, data, at = "message", [], None
    for line in lines:
        line = line.decode("utf-8").rstrip("\r\n")
        if not line:
            if data:
                yield at, Event(name, json.loads("\n".join(data)))
            name, data = "message", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "id":
                at = value


def _form(pictures, fields):
    """multipart/form-data of an edit: (body, content type)."""
    boundary, out = uuid.uuid4().hex, bytearray()

    def part(name, value, more=""):
        out.extend(('--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n' % (boundary, name, more)).encode())
        out.extend(value if isinstance(value, (bytes, bytearray)) else str(value).encode())
        out.extend(b"\r\n")

    for name, value in fields.items():
        if value is not None:
            part(name, json.dumps(value) if isinstance(value, (bool, list, dict)) else value)
    for picture in [pictures] if isinstance(pictures, (str, bytes, os.PathLike)) else pictures:
        if isinstance(picture, str) and picture.startswith(("http://", "https://")):
            part("image_url", picture)
            continue
        if hasattr(picture, "read"):
            picture = picture.read()
        elif not isinstance(picture, (bytes, bytearray)):
            with open(picture, "rb") as f:
                picture = f.read()
        part("image", picture, '; filename="picture"')
    out.extend(("--%s--\r\n" % boundary).encode())
    return bytes(out), "multipart/form-data; boundary=" + boundary


def main(arguments):
    fields = {}
    while arguments and "=" in arguments[-1] and arguments[-1].split("=")[0].replace("_", "").isalpha():
        name, value = arguments.pop().split("=", 1)
        fields[name] = value
    if len(arguments) < 4:
        sys.exit(__doc__)
    url, pictures, prompt, out = arguments[0], arguments[1:-2], arguments[-2], arguments[-1]
    ending = os.path.splitext(out)[1].lower()
    if ending not in FORMATS:
        sys.exit("'%s' must end in .png, .jpg, .jpeg or .webp" % out)
    fields.setdefault("output_format", FORMATS[ending])

    def progress(name, data):
        step = "%s %s/%s" % (data.get("stage"), data.get("step"), data.get("total")) if name == "progress" else ""
        print(name, step or data.get("position", ""), file=sys.stderr)

    try:
        result = Client(url).edit(pictures, prompt, progress, **fields)
    except EditError as e:
        sys.exit("error: " + (e.param + ": " if e.param and e.param not in str(e) else "") + str(e))
    except KeyboardInterrupt:
        sys.exit(130)
    print(*result.save(out), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
