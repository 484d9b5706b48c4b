// HTTP of the page: the key, errors as the API words them, upload with progress, and the event stream.
// Addresses are relative to the document, so the page also works under a prefix of a proxy.

let key = sessionStorage.getItem('qwen-edit.key') ?? localStorage.getItem('qwen-edit.key') ?? '';
let onKeyWanted = () => {};

export const hasKey = () => key !== '';

export function setKey(value, keep) {
  key = value.trim();
  localStorage.removeItem('qwen-edit.key');
  sessionStorage.removeItem('qwen-edit.key');
  if (key) (keep ? localStorage : sessionStorage).setItem('qwen-edit.key', key);
}

/** `ask(error)` is called on every 401. */
export const whenKeyWanted = (ask) => { onKeyWanted = ask; };

export const url = (path) => new URL(path, document.baseURI).href;

/** What went wrong, in the server's own words. status 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, body, retryAfter, requestId) {
    const e = body?.error ?? {};
    super(typeof e === 'string' ? e : e.message || (status ? `HTTP ${status}` : ''));
    this.status = status;
    this.param = e.param ?? null;
    this.code = e.code ?? e.type ?? null;
    this.retryAfter = Number(retryAfter) > 0 ? Number(retryAfter) : 0;
    this.requestId = requestId ?? null;
  }
}

function parse(text) {
  try { return JSON.parse(text); } catch { return null; }
}

async function refuse(response) {
  const error = new ApiError(response.status, parse(await response.text().catch(() => '')),
    response.headers.get('Retry-After'), response.headers.get('X-Request-Id'));
  if (error.status === 401) onKeyWanted(error);
  return error;
}

/** fetch with the key; any status that is not 2xx is thrown as ApiError, and so is no answer (status 0). */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(url(path), { ...options, headers, cache: 'no-store' });
  } catch (e) {
    if (e.name === 'AbortError') throw e;
    throw new ApiError(0);
  }
  if (!response.ok) throw await refuse(response);
  return response;
}

export const getJson = async (path, options) => (await call(path, options)).json();

/** The body of /health, which comes with 503 too. */
export async function health() {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(url('health'), { headers, cache: 'no-store' });
  if (response.status === 503) return response.json();
  if (!response.ok) throw await refuse(response);
  return response.json();
}

/** POST a form; `onProgress(0..1)` while it goes up. XMLHttpRequest, because fetch does not tell. */
export function upload(path, form, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const x = new XMLHttpRequest();
    x.open('POST', url(path));
    if (key) x.setRequestHeader('Authorization', `Bearer ${key}`);
    x.upload.onprogress = (e) => { if (e.lengthComputable) onProgress(e.loaded / e.total); };
    x.onload = () => {
      const body = parse(x.responseText);
      if (x.status >= 200 && x.status < 300) { resolve(body); return; }
      const error = new ApiError(x.status, body, x.getResponseHeader('Retry-After'), x.getResponseHeader('X-Request-Id'));
      if (x.status === 401) onKeyWanted(error);
      reject(error);
    };
    x.onerror = () => reject(new ApiError(0));
    x.onabort = () => reject(new DOMException('aborted', 'AbortError'));
    signal?.addEventListener('abort', () => x.abort());
    x.send(form);
  });
}

const STALLED_MS = 45000; // the server sends a comment every 15 s

/**
 * Read one event stream until it ends. Lines end in LF, CR or CRLF; an event may be cut anywhere between reads.
 * Returns the id of the last event, for Last-Event-ID.
 */
async function readEvents(response, abort, lastId, onEvent) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = '', name = '', data = [], id = lastId;
  let watchdog = setTimeout(abort, STALLED_MS);
  try {
    for (;;) {
      const { value, done } = await reader.read();
      clearTimeout(watchdog);
      if (done) return id;
      watchdog = setTimeout(abort, STALLED_MS);
      rest += decoder.decode(value, { stream: true });
      const held = rest.endsWith('\r') ? '\r' : ''; // its LF may be in the next read
      const lines = (held ? rest.slice(0, -1) : rest).split(/\r\n|\n|\r/);
      rest = lines.pop() + held;
      for (const line of lines) {
        if (line === '') {
          if (data.length) onEvent(name || 'message', parse(data.join('\n')) ?? {}, id);
          name = ''; data = [];
        } else if (!line.startsWith(':')) {
          const colon = line.indexOf(':');
          const field = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '');
          if (field === 'event') name = text;
          else if (field === 'data') data.push(text);
          else if (field === 'id') id = text;
        }
      }
    }
  } finally {
    clearTimeout(watchdog);
  }
}

const pause = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener('abort', () => { clearTimeout(timer); resolve(); }, { once: true });
});

/**
 * Follow the events of a job until `onEvent` returns true (the end) or `signal` aborts. A cut connection is taken up
 * again with Last-Event-ID, after 0.5 s, 1 s … 10 s; `onLost` and `onBack` tell. Refusals (403, 404, 410) are thrown.
 */
export async function follow(jobId, { onEvent, onLost, onBack, signal }) {
  let lastId = '', wait = 500, ended = false, lost = false;
  while (!ended && !signal.aborted) {
    const inner = new AbortController();
    const stop = () => inner.abort();
    signal.addEventListener('abort', stop, { once: true });
    try {
      const headers = { Accept: 'text/event-stream' };
      if (lastId) headers['Last-Event-ID'] = lastId;
      const response = await call(`v1/jobs/${encodeURIComponent(jobId)}/events`, { headers, signal: inner.signal });
      if (lost) { lost = false; onBack?.(); }
      lastId = await readEvents(response, stop, lastId, (name, data, id) => {
        lastId = id; wait = 500;
        if (!ended && onEvent(name, data)) { ended = true; stop(); }
      });
    } catch (e) {
      if (signal.aborted || ended) return;
      if (e instanceof ApiError && [401, 403, 404, 410].includes(e.status)) throw e;
    } finally {
      signal.removeEventListener('abort', stop);
    }
    if (ended || signal.aborted) return;
    if (!lost) { lost = true; onLost?.(); }
    await pause(wait, signal);
    wait = Math.min(wait * 2, 10000);
  }
}
