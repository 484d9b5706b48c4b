"""The few WebDriver calls that the page's test needs, over HTTP with the standard library: chromedriver and headless Chromium."""
import base64, json, os, shutil, subprocess, time, urllib.error, urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
CONTROL, ENTER, TAB, SHIFT, LEFT, RIGHT, HOME, END = "\ue009", "\ue007", "\ue004", "\ue008", "\ue012", "\ue014", "\ue011", "\ue010"


class Failed(Exception):
    pass


class Browser:
    def __init__(self, languages="en-US,en"):
        self.process = subprocess.Popen([shutil.which("chromedriver") or "/usr/bin/chromedriver", "--port=0"], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        port = None
        for line in self.process.stdout:
            if "started successfully on port" in line:
                port = int(line.rstrip(". \n").rsplit(" ", 1)[1])
                break
        if port is None:
            raise Failed("chromedriver did not start")
        self.base, self.session = f"http://127.0.0.1:{port}", ""
        args = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb", "--window-size=1360,900",
                "--disable-dev-shm-usage", "--no-first-run"]
        if os.geteuid() == 0:
            args.append("--no-sandbox")
        answer = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": args, "prefs": {"intl.accept_languages": languages}}}}})
        self.session = "/session/" + answer["sessionId"]

    def ask(self, method, path, body=None):
        data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as r:
                return json.load(r)["value"]
        except urllib.error.HTTPError as e:
            value = json.load(e)["value"]
            raise Failed(f"{value['error']}: {value['message'].splitlines()[0]}") from None

    def close(self):
        try:
            self.ask("DELETE", "")
        except Exception:
            pass
        self.process.terminate()
        self.process.wait(10)

    def go(self, url):
        self.ask("POST", "/url", {"url": url})

    def js(self, code, *args):
        return self.ask("POST", "/execute/sync", {"script": code, "args": list(args)})

    def js_async(self, code, *args):
        return self.ask("POST", "/execute/async", {"script": code, "args": list(args)})

    def cdp(self, command, **params):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def find(self, css):
        return self.ask("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css):
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", css)
        self.ask("POST", f"/element/{self.find(css)}/click")

    def type(self, css, text, clear=False):
        element = self.find(css)
        if clear:
            self.ask("POST", f"/element/{element}/clear")
        self.ask("POST", f"/element/{element}/value", {"text": text})

    def keys(self, *chords):
        """Press each chord (a list of keys held together) where the focus is."""
        actions = []
        for chord in chords:
            actions += [{"type": "keyDown", "value": k} for k in chord] + [{"type": "keyUp", "value": k} for k in reversed(chord)]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def drag(self, x1, y1, x2, y2):
        move = lambda x, y, ms=0: {"type": "pointerMove", "x": int(x), "y": int(y), "duration": ms, "origin": "viewport"}
        self.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [
            move(x1, y1), {"type": "pointerDown", "button": 0}, move((x1 + x2) / 2, (y1 + y2) / 2, 100), move(x2, y2, 100),
            {"type": "pointerUp", "button": 0}]}]})

    def wait(self, what, code, *args, seconds=30):
        """Wait until the script returns something true; return it."""
        end = time.monotonic() + seconds
        while True:
            value = self.js(code, *args)
            if value:
                return value
            if time.monotonic() > end:
                raise Failed(f"waited {seconds} s for: {what}")
            time.sleep(0.05)

    def wait_state(self, state, seconds=60):
        self.wait(f"stage {state}", "return document.getElementById('stage').dataset.state === arguments[0]", state, seconds=seconds)

    def text(self, css):
        return self.js("return document.querySelector(arguments[0]).textContent.trim()", css)

    def screenshot(self, path, full=False):
        # Two frames, so that what was just changed is painted; images decoded; nothing animated half-way.
        self.js_async("const done = arguments[0]; Promise.all([...[...document.images].map(i => i.src && i.decode().catch(() => 0)), ...document.getAnimations()"
                      ".filter(a => a instanceof CSSTransition).map(a => a.finished.catch(() => 0))])"
                      ".then(() => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=full, format="png") if full else {"data": self.ask("GET", "/screenshot")}
        with open(path, "wb") as f:
            f.write(base64.b64decode(data["data"]))

    def view(self, width, height, mobile=False, dark=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if mobile else 1, mobile=mobile)
        self.cdp("Emulation.setFocusEmulationEnabled", enabled=True)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def log(self):
        return self.ask("POST", "/se/log", {"type": "browser"})
