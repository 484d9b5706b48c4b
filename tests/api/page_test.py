#!/usr/bin/env python3
"""The page in headless Chromium, as people use it; screenshots are kept.

    python3 tests/api/page_test.py [--program PROGRAM | --url URL] [--out DIR] [--only NAME ...]

With --program against the service of that program with the demo model, started here, which is also killed and refused
to; with --url against a running one (no key, a model that keeps small sizes, such as the demo); with neither against
page_mock.py. Every wait is for a condition. Exit status 77: no browser here.
"""
import argparse, base64, json, pathlib, re, shutil, sys, tempfile, time, traceback
from page_driver import Browser, Failed, CONTROL, ENTER, LEFT, RIGHT, HOME, END, TAB
from page_mock import Server, picture
from service import Service
import lora_files
import os, signal, threading

PURPLE_EN, PURPLE_ZH = "Paint the subject purple", "把图片里的主体颜色改成紫色，并保持整体风格一致。"
TESTS = []


def test(f):
    TESTS.append(f)
    return f


def check(truth, what):
    if not truth:
        raise Failed(what)


class Run:
    def __init__(self, url, out, mock, service):
        self.url, self.out, self.mock, self.service = url, out, mock, service
        self.files = pathlib.Path(tempfile.mkdtemp(prefix="page-"))
        self.red, self.blue, self.green = (self.files / f"{name}.png" for name in ("red", "blue", "green"))
        self.red.write_bytes(picture(192, 128))
        self.blue.write_bytes(picture(128, 160, (40, 90, 200), (225, 238, 225)))
        self.green.write_bytes(picture(160, 160, (30, 140, 70), (240, 235, 225)))
        (self.files / "notes.png").write_text("this is no picture")

    def open(self, b, fresh=True):
        b.go(self.url)
        if fresh:
            b.js("sessionStorage.clear(); localStorage.clear()")
            b.go(self.url)
        b.wait("the server's limits", "return document.getElementById('service-dot').dataset.is === 'good' && "
               "document.getElementById('num_inference_steps').min === '1'")

    def shot(self, b, name, full=False):
        b.screenshot(self.out / f"{name}.png", full)

    def add(self, b, *paths):
        before = b.js("return document.querySelectorAll('.pic').length")
        b.type("#file", "\n".join(str(p) for p in paths))
        b.wait("thumbnails", "return document.querySelectorAll('.pic').length === arguments[0]", before + len(paths))

    def steps(self, b, n):
        b.js("document.getElementById('advanced').open = true")
        b.type("#num_inference_steps", str(n), clear=True)

    def finished(self, b):
        """The result is on the stage and painted; its mean colour in the middle."""
        b.wait_state("done", 120)
        b.wait("the picture painted", "const i = document.getElementById('after'); return i.complete && i.naturalWidth > 0")
        return b.js("const i = document.getElementById('after'), c = document.createElement('canvas'); c.width = c.height = 1;"
                    "const g = c.getContext('2d'); g.drawImage(i, i.naturalWidth / 2 - 4, i.naturalHeight / 2 - 4, 8, 8, 0, 0, 1, 1);"
                    "return [...g.getImageData(0, 0, 1, 1).data].slice(0, 3)")


@test
def empty_page(r, b):
    r.open(b)
    check(b.js("return document.documentElement.lang") == "en", "an English browser gets English")
    check(b.js("return document.getElementById('stage').dataset.state") == "empty", "the stage is empty")
    r.shot(b, "01-empty-light")
    b.view(1360, 900, dark=True)
    r.shot(b, "02-empty-dark")
    b.view(1360, 900)
    # Nothing to send: said at the fields, nothing is posted.
    b.click("#generate")
    check(b.text("#pictures-error") == "Add at least one picture.", "no picture is said at the field")
    r.shot(b, "03-nothing-chosen")


@test
def names_for_screen_readers(r, b):
    r.open(b)
    r.add(b, r.red, r.blue)
    b.js("document.getElementById('advanced').open = true")
    nodes = b.cdp("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "spinbutton", "slider", "link", "radio", "checkbox", "progressbar", "image", "img"}
    nameless = [n["role"]["value"] for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in roles
                and not n.get("name", {}).get("value")]
    check(not nameless, f"without a name: {nameless}")
    names = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == "button" and not n.get("ignored")]
    for name in ("Move picture 1 back", "Move picture 2 forward", "Remove picture 2"):
        check(name in names, f"no button {name!r}")
    # Every field's help is tied to it.
    check(b.js("return [...document.querySelectorAll('.advanced-body input:not([type=radio]), .advanced-body textarea')].every("
               "e => (e.getAttribute('aria-describedby') || '').split(' ').every(id => document.getElementById(id)))"), "help of the fields")


@test
def upload_order_and_limits(r, b):
    r.open(b)
    r.add(b, r.red, r.blue)
    names = lambda: b.js("return [...document.querySelectorAll('.pic img')].map(i => i.alt)")
    numbers = b.js("return [...document.querySelectorAll('.pic-name')].map(e => e.textContent)")
    check(numbers == ["Picture 1", "Picture 2"], f"numbered: {numbers}")
    check(names() == ["red.png", "blue.png"], f"in the order of choice: {names()}")
    check(b.js("return !document.getElementById('prompt-hint').hidden"), "told how to name them")
    b.js("document.querySelector('[data-does=down]').focus()")
    b.keys([ENTER])
    b.wait("moved by keyboard", "return document.querySelector('.pic img').alt === 'blue.png'")
    check(b.js("return document.activeElement.dataset.does") in ("up", "down"), "the focus stays with the moved picture")
    one, two = (b.js("const q = document.querySelectorAll('.pic-frame')[arguments[0]].getBoundingClientRect(); return [q.x + q.width / 2, q.y + q.height / 2]", i) for i in (0, 1))
    b.drag(*two, *one)
    b.wait("moved by dragging", "return document.querySelector('.pic img').alt === 'red.png'")
    r.shot(b, "04-two-pictures")
    b.type("#file", str(r.files / "notes.png"))
    b.wait("refused", "return document.getElementById('pictures-error').textContent === 'notes.png is not a PNG, JPEG or WebP picture.'")
    limit = b.js("return Number(document.getElementById('pictures-count').textContent.match(/of (\\d+)/)[1])")
    r.add(b, *[r.red] * (limit - 2))
    check(b.js("return document.getElementById('drop').hidden"), "no place for more than the limit")


@test
def paste_and_keyboard(r, b):
    r.open(b)
    b.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    how = b.js_async(
        "const done = arguments[1]; const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));"
        "const blob = new Blob([bytes], {type: 'image/png'}); document.getElementById('prompt').focus();"
        "navigator.clipboard.write([new ClipboardItem({'image/png': blob})]).then(() => done('real'), e => done(String(e)))",
        base64.b64encode(r.red.read_bytes()).decode())
    check(how == "real", f"the clipboard takes a picture: {how}")
    b.keys([CONTROL, "v"])
    b.wait("the pasted picture", "return document.querySelectorAll('.pic').length === 1")
    b.type("#prompt", PURPLE_EN)
    b.keys([CONTROL, ENTER])
    b.wait("sent by Ctrl+Enter", "return document.getElementById('stage').dataset.state !== 'empty'")
    r.finished(b)
    r.paste_done = True


@test
def drop(r, b):
    r.open(b)
    fire = ("const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)), data = new DataTransfer();"
            "data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));"
            "for (const name of arguments[1]) document.body.dispatchEvent(new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true}))")
    data = base64.b64encode(r.red.read_bytes()).decode()
    b.js(fire, data, ["dragenter", "dragover"])
    check(b.js("return !document.getElementById('veil').hidden"), "told that it can be dropped")
    b.js(fire, data, ["drop"])
    b.wait("the dropped picture", "const p = document.querySelectorAll('.pic img'); return p.length === 1 && p[0].alt === 'dropped.png'")
    check(b.js("return document.getElementById('veil').hidden"), "the veil is gone")


@test
def generate_and_compare(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    n = 12 if r.mock else 40  # the demo is quick
    r.steps(b, n)
    b.js("document.getElementById('advanced').open = false")
    b.click("#generate")
    b.wait("steps counted", "return new RegExp(`^Step \\\\d+ of ${arguments[0]}$`).test(document.getElementById('progress-text').textContent)", n)
    b.wait("a live preview", "const p = document.getElementById('preview'); return !p.hidden && p.dataset.kind === 'preview' && p.complete && p.naturalWidth > 0")
    r.shot(b, "05-progress-light")
    check(b.js("return document.getElementById('live').textContent") != "", "progress is spoken")
    colour = r.finished(b)
    check(colour[2] > colour[1] + 20, f"the subject turned purple: {colour}")
    r.shot(b, "06-result-light")
    split = lambda: int(b.js("return document.getElementById('split').value"))
    b.js("document.getElementById('split').focus()")
    b.keys([LEFT], [LEFT])
    check(split() == 48, f"moved by the arrow keys: {split()}")
    b.keys([HOME])
    check(split() == 0, "to the start")
    b.keys([END])
    check(split() == 100, "to the end")
    check(b.js("return document.getElementById('split').getAttribute('aria-valuetext')") == "100 % before", "spoken")
    box = b.js("const q = document.getElementById('compare').getBoundingClientRect(); return [q.x, q.y, q.width, q.height]")
    b.drag(box[0] + box[2] - 2, box[1] + box[3] / 2, box[0] + box[2] * 0.3, box[1] + box[3] / 2)
    check(20 <= split() <= 40, f"moved by the pointer: {split()}")
    b.js("arguments[0].value = 50; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", {"element-6066-11e4-a52e-4f735466cecf": b.find("#split")})
    b.view(1360, 900, dark=True)
    r.shot(b, "07-result-dark")
    b.view(1360, 900)
    # What to do with it.
    check(b.js("const d = document.getElementById('download'); return d.href.startsWith('blob:') && /^qwen-edit-.*\\.png$/.test(d.download)"), "download")
    seed = b.text("#seed-reuse")
    check(re.fullmatch(r"\d+", seed), f"the seed is told: {seed}")
    b.js("document.addEventListener('copy', () => { window.copied = String(getSelection()) || document.activeElement.value })")
    b.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    b.click("#copy")
    b.wait("copied", "return document.getElementById('copy-text').textContent === 'Copied'")
    copied = json.loads(b.js_async("navigator.clipboard.readText().then(arguments[0], e => arguments[0](JSON.stringify(String(e))))"))
    check(copied.get("prompt") == PURPLE_EN and str(copied.get("seed")) == seed and copied.get("num_inference_steps") == n, f"copied: {copied}")
    b.click("#seed-reuse")
    check(b.js("return document.getElementById('seed').value") == seed, "the seed is in the form")
    b.click("#use")
    b.wait("the result is picture 1", "const p = document.querySelectorAll('.pic img'); return p.length === 1 && p[0].alt !== 'red.png'")
    check(b.js("return document.getElementById('seed-random').checked"), "an edit of a result does not keep the seed")
    b.click("#reuse")
    b.wait("settings back", "return document.getElementById('num_inference_steps').value === String(arguments[0])", n)
    check(b.js("return document.querySelectorAll('.card').length") == 1, "one job in the history")


@test
def three_pictures(r, b):
    r.open(b)
    r.add(b, r.red, r.blue, r.green)
    b.type("#prompt", "Put the ball of Picture 2 beside the one of Picture 1")
    r.shot(b, "24-three-pictures")
    b.click("#generate")
    r.finished(b)
    against = b.js("return [...document.querySelectorAll('#compare-with button')].map(e => [e.textContent, e.ariaPressed])")
    check(against == [["Picture 1", "false"], ["Picture 2", "false"], ["Picture 3", "true"]], f"compared with: {against}")
    size = b.js("return document.getElementById('facts').textContent")
    check("160 × 160" in size, f"the shape of the last one: {size}")
    b.click("#compare-with button")
    b.wait("picture 1 under the slider", "const i = document.getElementById('before'); return i.complete && i.naturalWidth === 192")
    r.shot(b, "25-three-pictures-result")


@test
def keyboard_only(r, b):
    """From the address bar to a result and back, without a pointer."""
    r.open(b)
    r.add(b, r.red, r.blue)
    b.js("document.activeElement.blur(); window.scrollTo(0, 0)")
    at = lambda: b.js("const e = document.activeElement; return e.id || e.dataset.does || e.className || e.tagName")
    ring = lambda: b.js("let e = document.activeElement; if (e.matches('.segments input')) e = e.nextElementSibling; if (e.id === 'split') e = document.querySelector('.handle');"
                        "if (e.id === 'file') e = e.parentElement; const s = getComputedStyle(e);"
                        "return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 || s.boxShadow !== 'none'")
    seen, bare = [], []
    for _ in range(60):
        b.keys([TAB])
        seen.append(at())
        if not ring():
            bare.append(seen[-1])
        if seen[-1] == "generate":
            break
    for name in ("skip", "theme", "language", "up", "down", "remove", "file", "prompt", "generate"):
        check(name in seen, f"not reached by Tab: {name}; reached: {seen}")
    check(not bare, f"focus that cannot be seen: {bare}")
    b.js("document.getElementById('prompt').focus()")
    b.keys(*[[c] for c in "turn it grey"])
    b.keys([CONTROL, ENTER])
    r.finished(b)
    reached = []
    for _ in range(12):
        b.keys([TAB])
        reached.append(at())
        check(ring(), f"focus that cannot be seen: {reached[-1]}")
        if reached[-1] == "reuse":
            break
    check([x for x in reached if x in ("split", "download", "use", "copy", "reuse")] == ["split", "download", "use", "copy", "reuse"], f"in the result: {reached}")


@test
def history(r, b):
    r.open(b)
    r.add(b, r.red)
    for n, prompt in enumerate(("Paint the subject purple", "Make the background blue"), 1):
        b.type("#prompt", prompt, clear=True)
        b.click("#generate")
        b.wait("listed", "return document.querySelectorAll('.card').length === arguments[0]", n)
        r.finished(b)
    b.click(".card:nth-child(2) .card-open")
    b.wait("the older one on the stage", "return document.getElementById('said').textContent === 'Paint the subject purple'")
    r.finished(b)
    b.go(r.url)
    b.wait("both still there", "return document.querySelectorAll('.card img').length === 2")
    r.finished(b)
    b.click("#clear")
    b.wait("asked", "return document.getElementById('clear-dialog').open")
    r.shot(b, "26-clear")
    b.click("#clear-dialog .danger")
    b.wait("gone", "return document.getElementById('history').hidden")
    check(b.js("return localStorage['qwen-edit.jobs']") in ("[]", None), "nothing is kept")


@test
def contrast(r, b):
    """Every text against what is really behind it, at least 4.5 to 1, in both colour schemes and the main states."""
    r.open(b)
    measure = """const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
        const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
        const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = (e) => { const layers = []; for (let x = e; x; x = x.parentElement) { const c = parse(getComputedStyle(x).backgroundColor); if (c[3] > 0) layers.push(c); if (c[3] === 1) break; }
          return layers.reduceRight((b, a) => over(a, b), [255, 255, 255, 1]); };
        const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const judge = (e, text, color) => { const back = behind(e), a = light(over(parse(color), back)), b = light(back);
          const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); if (ratio < 4.5) out.push([text.slice(0, 40), Math.round(ratio * 100) / 100]); };
        while (walk.nextNode()) { const e = walk.currentNode.parentElement, s = walk.currentNode.data.trim();
          if (s && e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && !e.closest('.sr, :disabled, option, noscript')) judge(e, s, getComputedStyle(e).color); }
        for (const e of document.querySelectorAll('[placeholder]')) if (e.checkVisibility() && !e.value && !e.disabled) judge(e, e.placeholder, getComputedStyle(e, '::placeholder').color);
        return out"""
    def look(where):
        for dark in (False, True):
            b.view(1360, 900, dark=dark)
            b.wait("the colours", "return document.documentElement.dataset.theme === arguments[0]", "dark" if dark else "light")
            b.js_async("const done = arguments[0], frame = () => new Promise(requestAnimationFrame); frame().then(frame).then(() => Promise.all(document.getAnimations().filter(a => a instanceof CSSTransition).map(a => a.finished.catch(() => 0)))).then(() => done())")
            weak = b.js(measure)
            check(not weak, f"{where}, {'dark' if dark else 'light'}: {weak}")
    b.js("document.getElementById('advanced').open = true")
    look("empty")
    b.click("#generate")
    look("errors at the fields")
    r.add(b, r.red, r.blue)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 200)
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    look("running")
    b.click("#cancel")
    b.wait("cancelled", "return document.getElementById('failed-title').textContent === 'Cancelled'")
    look("cancelled")
    r.steps(b, 2)
    b.click("#generate")
    r.finished(b)
    look("result")


@test
def gallery(r, b):
    """Nothing to check but the eye: each state at each width, both languages, light and dark."""
    r.open(b)
    looks = [(False, "en"), (True, "zh")]
    if os.environ.get("QIE_TEST_LONG"):
        looks += [(False, "zh"), (True, "en")]
    widths = ((1440, 900, False), (1024, 768, False), (390, 844, True))

    def shots(state):
        for width, height, mobile in widths:
            for dark, language in looks:
                b.view(width, height, mobile, dark)
                if b.js("return document.documentElement.lang") != ("zh-CN" if language == "zh" else "en"):
                    b.js("document.getElementById('language').click()")
                b.js("document.activeElement.blur(); window.scrollTo(0, 0)")
                if state == "error":  # what was said in the other language is gone
                    b.click("#generate")
                    b.wait("said at the field", "return document.getElementById('num_inference_steps-error').textContent !== ''")
                    b.js("document.activeElement.blur()")
                r.shot(b, f"gallery-{state}-{width}-{'dark' if dark else 'light'}-{language}", full=True)
        b.view(1440, 900)
        if b.js("return document.documentElement.lang") != "en":
            b.js("document.getElementById('language').click()")

    shots("empty")
    r.add(b, r.red, r.blue)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 100000)
    b.click("#generate")
    b.wait("said at the field", "return document.getElementById('num_inference_steps-error').textContent !== ''")
    shots("error")
    r.steps(b, 3)
    b.js("document.getElementById('advanced').open = false")
    b.click("#generate")
    r.finished(b)
    shots("result")
    r.steps(b, 200)
    b.js("document.getElementById('advanced').open = false")
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    shots("running")
    b.js("if (!document.getElementById('cancel').hidden) document.getElementById('cancel').click()")


@test
def cancel(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 200)
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    b.click("#cancel")
    b.wait("cancelled", "return document.getElementById('failed-title').textContent === 'Cancelled'", seconds=30)
    check(b.js("return document.querySelector('.card').dataset.status") == "cancelled", "the history knows")
    r.shot(b, "08-cancelled")


@test
def reload_and_second_tab(r, b):
    r.open(b)
    r.add(b, r.red, r.blue)
    b.type("#prompt", PURPLE_ZH)
    r.steps(b, 200)
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    step = lambda: int(re.search(r"\d+", b.text("#progress-text"))[0])
    before = step()
    b.go(r.url)
    b.wait("found again", "const m = document.getElementById('progress-text').textContent.match(/^Step (\\d+) of 200$/); return m && Number(m[1]) >= arguments[0]", before)
    b.wait("pictures back in the form", "return document.querySelectorAll('.pic').length === 2")
    check(b.js("return document.getElementById('prompt').value") == PURPLE_ZH, "the instruction is still there")
    # A second tab finds the same job without being told.
    first = b.ask("GET", "/window")
    second = b.ask("POST", "/window/new", {"type": "tab"})["handle"]
    b.ask("POST", "/window", {"handle": second})
    b.go(r.url)
    b.wait("in the second tab", "return /^Step \\d+ of 200$/.test(document.getElementById('progress-text').textContent)")
    r.shot(b, "09-second-tab")
    b.click("#cancel")
    b.wait("cancelled", "return document.getElementById('failed-title').textContent === 'Cancelled'")
    b.ask("DELETE", "/window")
    b.ask("POST", "/window", {"handle": first})
    b.wait("the first tab knows", "return document.getElementById('failed-title').textContent === 'Cancelled'")


@test
def queue_is_shown(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 200)
    jobs = "return document.querySelectorAll('.card').length"
    for n in (1, 2, 3):
        b.click("#generate")
        b.wait("accepted", jobs + " === arguments[0] && !document.getElementById('generate').disabled", n)
    b.wait("place in the queue", "return /number 2 in the queue/.test(document.getElementById('progress-text').textContent)")
    r.shot(b, "10-queue")
    # All of this browser's jobs can be ended from the history.
    for n in (2, 1, 0):
        b.click(".card-remove")
        b.wait("removed", jobs + " === arguments[0]", n)
    b.wait("the stage is empty again", "return document.getElementById('stage').dataset.state === 'empty'")


@test
def errors_in_the_servers_words(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 100000)
    b.click("#generate")
    b.wait("said at the field", "return document.getElementById('num_inference_steps-error').textContent !== ''")
    said = b.text("#num_inference_steps-error")
    told = b.js_async("const f = new FormData(); f.append('prompt', 'x'); f.append('num_inference_steps', '100000');"
                      "fetch('v1/jobs', {method: 'POST', body: f}).then(r => r.json()).then(j => arguments[0](j.error.message))")
    check(said == told and "200" in said, f"the field says {said!r}, the API {told!r}")
    check(b.js("return document.activeElement.id") == "num_inference_steps", "the focus is at the field")
    r.shot(b, "11-refused")


@test
def chinese(r, b):
    b.cdp("Emulation.setUserAgentOverride", userAgent=b.js("return navigator.userAgent"), acceptLanguage="zh-CN,zh")
    r.open(b)
    check(b.js("return document.documentElement.lang") == "zh-CN" and b.text("#generate-text") == "生成", "a Chinese browser gets Chinese")
    r.shot(b, "12-empty-chinese")
    b.click("#language")
    check(b.text("#generate-text") == "Generate", "switched to English")
    b.go(r.url)
    check(b.text("#generate-text") == "Generate", "and it stays so")
    b.click("#language")
    r.add(b, r.red)
    b.js("document.getElementById('advanced').open = true")
    b.type("#prompt", PURPLE_ZH)
    r.shot(b, "13-advanced-chinese")
    b.click("#generate")
    colour = r.finished(b)
    check(colour[2] > colour[1] + 20, f"purple: {colour}")
    r.shot(b, "14-result-chinese", full=True)
    # No text was left behind in the other language.
    left = b.js("""const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) { const e = walk.currentNode.parentElement, s = walk.currentNode.data.trim();
          if (s && e.checkVisibility() && /[a-z]{4}/i.test(s) && !/[\\u4e00-\\u9fff]/.test(s)) out.push(s); } return out""")
    allowed = re.compile(r"^(qwen-edit|Qwen.*|English|API .*|Qwen/.*|demo.*|Ctrl.*|automatic)$", re.I)
    check(not [s for s in left if not allowed.match(s)], f"not in Chinese: {left}")


@test
def both_languages_are_complete(r, b):
    r.open(b)
    got = b.js_async("import('/assets/i18n.js').then(m => arguments[0]([Object.keys(m.texts.en), Object.keys(m.texts.zh),"
                     "[...document.querySelectorAll('[data-i18n],[data-i18n-label],[data-i18n-placeholder]')].flatMap(e =>"
                     "[e.dataset.i18n, e.dataset.i18nLabel, e.dataset.i18nPlaceholder]).filter(Boolean)]))")
    check(set(got[0]) == set(got[1]), f"only in one table: {set(got[0]) ^ set(got[1])}")
    check(set(got[2]) <= set(got[0]), f"without a text: {set(got[2]) - set(got[0])}")


@test
def phone(r, b):
    b.view(390, 844, mobile=True)
    r.open(b)
    r.shot(b, "15-phone-empty", full=True)
    r.add(b, r.red, r.blue)
    b.type("#prompt", PURPLE_EN)
    r.shot(b, "16-phone-form")
    b.click("#generate")
    r.finished(b)
    r.shot(b, "17-phone-result")
    b.view(390, 844, mobile=True, dark=True)
    r.shot(b, "18-phone-dark", full=True)
    for width in (390, 320):
        b.view(width, 700, mobile=True)
        wide = b.js("return [document.documentElement.scrollWidth, innerWidth]")
        check(wide[0] <= wide[1] and wide[1] == width, f"scrolls sideways at {width}: {wide}")
    small = b.js("return [...document.querySelectorAll('button, a.primary, summary')].filter(e => e.checkVisibility() && !e.classList.contains('link')).map(e => ["
                 "e.id || e.className, Math.round(e.getBoundingClientRect().height)]).filter(x => x[1] < 28)")
    check(not small, f"too small for a finger: {small}")


@test
def no_other_host(r, b):
    r.open(b)
    origin = re.match(r"https?://[^/]+", r.url)[0]
    got = b.js("return performance.getEntriesByType('resource').map(e => e.name)")
    other = [u for u in got if not u.startswith((origin, "blob:", "data:"))]
    check(got and not other, f"asked elsewhere: {other}")
    policy = b.js_async("fetch('./').then(r => arguments[0](r.headers.get('Content-Security-Policy')))")
    check(policy and "default-src 'none'" in policy and "unsafe" not in policy, f"policy: {policy}")


CHOOSE = ("const s = document.getElementById(arguments[0]); s.value = arguments[1];"
          "s.dispatchEvent(new Event('input', {bubbles: true}));")


@test
def lora_of_the_folder(r, b):
    """Chosen from what the server has, it changes the result, which names it; a distilled one brings its settings."""
    r.open(b)
    b.wait("list of LoRAs", "return document.getElementById('lora').options.length === 3")
    check(not b.js("return document.getElementById('lora-field').hidden"), "the field is there")
    before = b.js("return document.getElementById('num_inference_steps').value")
    b.js(CHOOSE, "lora", "Test-Lightning-2steps")
    check(b.js("return document.getElementById('num_inference_steps').value") == "2", "a Lightning one brings its steps")
    b.js(CHOOSE, "lora", "style")
    check(b.js("return document.getElementById('num_inference_steps').value") == before, "and takes them out again")
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    b.click("#generate")
    b.wait_state("done")
    check("style" in b.text("#facts"), b.text("#facts"))


@test
def lora_and_cache(r, b):
    """Both set, sent, told beside the result and taken back from there, at both widths and in both languages."""
    for width, height, mobile, language in ((1360, 900, False, "en"), (390, 844, True, "zh")):
        b.view(width, height, mobile)
        r.open(b)
        if language == "zh":
            b.click("#language")
        fast, caching = ("快速", "缓存") if language == "zh" else ("Fast", "Caching")
        r.add(b, r.red)
        b.type("#prompt", PURPLE_EN)
        r.steps(b, 12)
        b.js(CHOOSE, "lora", "style")
        b.type("#lora_weight", "0.7", clear=True)
        b.js(CHOOSE, "cache", "fast")
        b.js("document.getElementById('cache').scrollIntoView({block: 'center', behavior: 'instant'})")
        r.shot(b, f"27-lora-and-cache-{width}-{language}")
        check(f"{caching} {fast}" in b.text("#advanced-note"), "named when the fields are folded away")
        b.click("#generate")
        r.finished(b)
        facts = b.text("#facts")
        check("style × 0.7" in facts and caching + fast in facts, facts)
        r.shot(b, f"28-lora-and-cache-result-{width}-{language}", full=True)
        if r.service:
            job = r.service.jobs()[0]["result"]
            check(job["cache"] == "fast" and job["skipped_forwards"] > 0 and job["loras"] == [{"name": "style", "weight": 0.7}],
                  f"what the service says: {job}")
        form = "return ['lora', 'lora_weight', 'cache'].map(n => document.getElementById(n).value)"
        b.js("document.getElementById('advanced').open = true")
        b.click("#defaults")
        check(b.js(form) == ["", "1", "off"], "back to the defaults")
        b.click("#reuse")
        b.wait("settings back", form + ".join() === 'style,0.7,fast'")
        b.go(r.url)
        b.wait("kept over a reload", form + ".join() === 'style,0.7,fast'")


# ---- what only a server that is ours can be made to do
def mock_only(f):
    f.needs = "mock"
    return test(f)


def service_only(f):
    f.needs = "service"
    return test(f)


@service_only
def worker_that_dies(r, b):
    """The real thing: its worker is killed until the service gives the job up; the reason is shown in its words."""
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 200)
    before = r.service.ask("GET", "/health")[1]["workers"][0]["restarts"]
    b.click("#generate")
    for attempt in range(3):
        worker = r.service.until(what="a worker at work", look=lambda: next(
            (w for w in r.service.ask("GET", "/health")[1]["workers"] if w["current"] and w["pid"] and w["restarts"] == before + attempt), None))
        if attempt:
            b.wait("told that it starts again", "return /^Started again: .*signal 9/.test(document.getElementById('progress-note').textContent)")
        os.kill(worker["pid"], signal.SIGKILL)
    b.wait("failed", "return document.getElementById('failed-title').textContent === 'The edit failed'")
    check("lost 3 times" in b.text("#failed-text") and "signal 9" in b.text("#failed-text"), f"why: {b.text('#failed-text')}")
    r.shot(b, "20-failed")
    r.service.until(what="ready again", look=lambda: r.service.ask("GET", "/health/ready")[0] == 200)
    b.click("#again")
    b.wait("settings back", "return document.getElementById('num_inference_steps').value === '200' && document.querySelectorAll('.pic').length === 1")


@service_only
def service_that_restarts(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 30)
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    r.service.kill()
    b.wait("the loss is told", "return /Connection lost/.test(document.getElementById('progress-note').textContent)")
    r.shot(b, "23-connection-lost")
    r.service.start()
    b.wait("and gone again", "return document.getElementById('progress-note').textContent === ''", seconds=60)
    r.finished(b)
    b.log()  # what it could not reach meanwhile


@service_only
def key_and_full_queue(r, b):
    with Service(r.service.program, "--api-key", "sesame-open", "--queue-size", "1", key="sesame-open") as s:
        b.go(s.url)
        b.wait("asked for a key", "return document.getElementById('key-dialog').open")
        r.shot(b, "22-key")
        b.type("#key", "wrong-key")
        b.keys([ENTER])
        b.wait("refused in the server's words", "return /API key is needed/.test(document.getElementById('key-error').textContent)")
        b.type("#key", "sesame-open")
        b.keys([ENTER])
        b.wait("let in", "return document.getElementById('service-dot').dataset.is === 'good' && !document.getElementById('key-dialog').open")
        b.wait("limits", "return document.getElementById('num_inference_steps').min === '1'")
        r.add(b, r.red)
        b.type("#prompt", PURPLE_EN)
        r.steps(b, 200)
        for n in (1, 2):
            b.click("#generate")
            b.wait("accepted", "return document.querySelectorAll('.card').length === arguments[0] && !document.getElementById('generate').disabled", n)
            if n == 1:
                s.until(what="running", look=lambda: s.jobs()[0]["status"] == "running")
        b.click("#generate")
        b.wait("refused", "return /^the queue is full/.test(document.getElementById('form-error-text').textContent)")
        check(b.js("return document.getElementById('generate').disabled"), "not before Retry-After")
        r.shot(b, "21-busy")
        for j in s.jobs():
            s.ask("POST", f"/v1/jobs/{j['id']}/cancel", b"")
        b.wait("can be sent again after Retry-After", "return !document.getElementById('generate').disabled")
        b.go("about:blank")  # the other tab of this browser keeps no connection open


@mock_only
def failed_job_and_full_queue(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", "fail please")
    b.click("#generate")
    b.wait("failed", "return document.getElementById('failed-text').textContent === 'the worker died twice while it ran this job (signal 9)'")
    r.shot(b, "20-failed")
    b.type("#prompt", "busy", clear=True)
    b.click("#generate")
    b.wait("refused", "return document.getElementById('form-error-text').textContent === 'the queue is full (64 jobs)'")
    r.shot(b, "21-busy")
    b.wait("can be sent again after Retry-After", "return !document.getElementById('generate').disabled")


@mock_only
def cut_stream(r, b):
    r.open(b)
    r.add(b, r.red)
    b.type("#prompt", PURPLE_EN)
    r.steps(b, 40)
    b.click("#generate")
    b.wait("running", "return /^Step [1-9]/.test(document.getElementById('progress-text').textContent)")
    job = b.js("return JSON.parse(localStorage['qwen-edit.jobs'])[0].id")
    r.mock.cut[job] = True
    b.wait("the loss is told", "return /Connection lost/.test(document.getElementById('progress-note').textContent)")
    b.wait("and gone again", "return document.getElementById('progress-note').textContent === ''")
    r.finished(b)


@mock_only
def key(r, b):
    r.mock.service.key = "sesame"
    try:
        b.go(r.url)
        b.js("sessionStorage.clear(); localStorage.clear()")
        b.go(r.url)
        b.wait("asked for a key", "return document.getElementById('key-dialog').open")
        r.shot(b, "22-key")
        b.type("#key", "wrong")
        b.keys([ENTER])
        b.wait("refused in the server's words", "return document.getElementById('key-error').textContent === 'this key is not known'")
        b.type("#key", "sesame")
        b.keys([ENTER])
        b.wait("let in", "return document.getElementById('service-dot').dataset.is === 'good' && !document.getElementById('key-dialog').open")
        r.add(b, r.red)
        b.type("#prompt", PURPLE_EN)
        b.js("document.getElementById('advanced').open = true")
        r.steps(b, 4)
        b.click("#generate")
        r.finished(b)
    finally:
        r.mock.service.key = ""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", default="")
    p.add_argument("--program", default="")
    p.add_argument("--out", default="")
    p.add_argument("--only", nargs="*", default=[])
    a = p.parse_args()
    if not shutil.which("chromedriver") or not (shutil.which("chromium") or shutil.which("google-chrome")):
        print("skip: no browser here (apt-get install chromium chromium-driver)")
        return 77
    out = pathlib.Path(a.out or tempfile.mkdtemp(prefix="page-shots-"))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    mock = service = None
    if a.program:
        loras = out / "loras"
        loras.mkdir(exist_ok=True)
        for name in ("style", "Test-Lightning-2steps"):
            lora_files.lora(loras / (name + ".safetensors"), 1)
        service = Service(a.program, "--lora-dir", str(loras)).start()
        a.url = service.url
    elif not a.url:
        mock = Server(step_ms=60)
        threading.Thread(target=mock.serve_forever, daemon=True).start()
        a.url = f"http://127.0.0.1:{mock.server_port}/"
    run = Run(a.url if a.url.endswith("/") else a.url + "/", out, mock, service)
    try:
        failed = run_all(run, a.only)
    finally:
        shutil.rmtree(run.files, ignore_errors=True)
        if service:
            tail, code = service.log()[-3000:], service.stop()
    if service and (failed or code):
        print(tail if failed else f"the service did not stop in order: {code}")
        failed = failed or ["stop"]
    print(f"screenshots in {out}; {len(failed)} failed" + (": " + " ".join(failed) if failed else ""))
    return 1 if failed else 0


def run_all(run, only):
    failed, browser = [], Browser()
    try:
        for f in TESTS:
            needs = getattr(f, "needs", None)
            if (only and f.__name__ not in only) or (needs and not getattr(run, needs)):
                continue
            began = time.monotonic()
            # A tab of its own for each: no emulation is left over.
            try:
                browser.ask("POST", "/window", {"handle": browser.ask("POST", "/window/new", {"type": "tab"})["handle"]})
                browser.view(1360, 900)
                f(run, browser)
                # Statuses that the test provoked are logged by the browser too; anything else in the log is a fault.
                bad = [e["message"] for e in browser.log() if e["level"] == "SEVERE" and "status of 4" not in e["message"]
                       and "ERR_INCOMPLETE_CHUNKED" not in e["message"]]
                check(not bad, f"in the browser's log: {bad}")
                print(f"ok   {f.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
            except Exception as e:
                failed.append(f.__name__)
                print(f"FAIL {f.__name__}: {e}", flush=True)
                if not isinstance(e, Failed):
                    traceback.print_exc()
                try:
                    run.shot(browser, f"fail-{f.__name__}")
                except Exception:
                    pass
            if len(browser.ask("GET", "/window/handles")) > 1:
                browser.ask("DELETE", "/window")
                browser.ask("POST", "/window", {"handle": browser.ask("GET", "/window/handles")[0]})
    finally:
        browser.close()
    return failed


if __name__ == "__main__":
    sys.exit(main())
