"""Client of the service `qwen-edit serve`: standard library only, one file, Python 3.8 or newer.

    from qwen_edit_client import Client
    client = Client("http://127.0.0.1:7860")
    open("out.png", "wb").write(client.edit(["photo.png"], "turn the subject purple", seed=7))

On the command line: python3 qwen_edit_client.py URL PICTURE [PICTURE ...] PROMPT OUT.png
"""
import json
import sys
import urllib.error
import urllib.request
import uuid


class EditError(Exception):
    """The service refused or failed; `status`, `type` and `param` are as it worded them."""

    def __init__(self, status, error):
        super().__init__(error.get("message") or "HTTP %s" % status)
        self.status, self.type, self.param = status, error.get("type"), error.get("param")


class Client:
    def __init__(self, url, key=None, timeout=660):
        self.url, self.key, self.timeout = url.rstrip("/"), key, timeout

    def _open(self, method, path, body=None, headers=None):
        headers = dict(headers or {})
        if self.key:
            headers["Authorization"] = "Bearer " + self.key
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as e:
            try:
                error = json.loads(e.read()).get("error") or {}
            except ValueError:
                error = {}
            raise EditError(e.code, error) from None

    def submit(self, pictures, prompt, **fields):
        """Queue an edit; returns the job as a dict with `id`. Pictures are paths or bytes."""
        boundary, parts = uuid.uuid4().hex, []
        for name, value in dict(fields, prompt=prompt).items():
            parts.append(('--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
                          % (boundary, name, value)).encode())
        for picture in pictures:
            if not isinstance(picture, bytes):
                with open(picture, "rb") as f:
                    picture = f.read()
            parts.append(('--%s\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
                          % boundary).encode() + picture + b"\r\n")
        body = b"".join(parts) + ("--%s--\r\n" % boundary).encode()
        headers = {"Content-Type": "multipart/form-data; boundary=" + boundary}
        with self._open("POST", "/v1/jobs", body, headers) as r:
            return json.load(r)

    def events(self, job_id):
        """Yields (name, data) until the job has ended."""
        name = None
        with self._open("GET", "/v1/jobs/%s/events" % job_id) as r:
            for line in r:
                line = line.decode().rstrip("\n")
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    yield name, json.loads(line[6:])

    def job(self, job_id):
        with self._open("GET", "/v1/jobs/" + job_id) as r:
            return json.load(r)

    def cancel(self, job_id):
        self._open("POST", "/v1/jobs/%s/cancel" % job_id, b"").close()

    def result(self, job_id, n=0):
        with self._open("GET", "/v1/jobs/%s/result?n=%d" % (job_id, n)) as r:
            return r.read()

    def edit(self, pictures, prompt, progress=None, **fields):
        """Submit, follow, return the picture's bytes. progress(name, data) is called for each event."""
        job = self.submit(pictures, prompt, **fields)
        for name, data in self.events(job["id"]):
            if progress:
                progress(name, data)
            if name in ("failed", "cancelled"):
                error = data.get("error") or {}
                raise EditError(error.get("code"), error)
        return self.result(job["id"])


def main():
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    url, pictures, prompt, out = sys.argv[1], sys.argv[2:-2], sys.argv[-2], sys.argv[-1]
    picture = Client(url).edit(pictures, prompt, lambda name, data: print(name, data, file=sys.stderr))
    with open(out, "wb") as f:
        f.write(picture)
    print(out)


if __name__ == "__main__":
    main()
