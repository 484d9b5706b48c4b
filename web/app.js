// The page: form, stage, history. One job is on the stage; it is followed by its event stream while the page is visible,
// and the other unfinished ones of this browser are asked for every few seconds (a browser has six connections a host).
// What this browser knows of its jobs is in localStorage, so that a reload or a second tab finds them again; the form's
// text is in sessionStorage. Pictures are never stored except as small thumbnails.

import { t, language, setLanguage, startLanguage, duration } from './i18n.js';
import { ApiError, call, getJson, health, upload, follow, hasKey, setKey, whenKeyWanted } from './api.js';

const $ = (id) => document.getElementById(id);
const NUMBERS = ['num_inference_steps', 'max_side', 'true_cfg_scale', 'guidance_scale'];
const ENDED = ['completed', 'failed', 'cancelled', 'expired', 'gone'];
const JOB_POLL_MS = 4000, HEALTH_POLL_MS = 15000, HISTORY_MAX = 60, THUMB_PX = 320;

const server = {
  known: false,
  model: '',
  about: null,
  previews: true,
  loras: [],
  defaults: { num_inference_steps: 40, true_cfg_scale: 4, guidance_scale: 1, negative_prompt: ' ', max_side: null, cache: 'off' },
  limits: { max_images: 3, max_body_bytes: 64 * 1024 * 1024, num_inference_steps: [1, 200], true_cfg_scale: [0, 20],
    guidance_scale: null, max_side: [64, 4096] },
};

// ---------------------------------------------------------------- small things
function make(tag, properties = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in e && name !== 'list') e[name] = value;
    else e.setAttribute(name, value);
  }
  e.append(...children);
  return e;
}

const SVG = 'http://www.w3.org/2000/svg';
function icon(path) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 20 20');
  svg.setAttribute('aria-hidden', 'true');
  const line = document.createElementNS(SVG, 'path');
  line.setAttribute('class', 'line');
  line.setAttribute('d', path);
  svg.append(line);
  return svg;
}
const ICON = { back: 'm11.5 5.5-4.5 4.5 4.5 4.5', on: 'm8.5 5.5 4.5 4.5-4.5 4.5', remove: 'm6 6 8 8m0-8-8 8' };

function say(text) { $('live').textContent = text; }

let toastTimer;
function toast(text) {
  clearTimeout(toastTimer);
  $('toast').hidden = false;
  $('toast').textContent = text;
  toastTimer = setTimeout(() => { $('toast').hidden = true; }, 5000);
}

function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
}

function words(error) {
  if (error instanceof ApiError) return error.status === 0 ? t('err.network') : error.message;
  return String(error?.message ?? error);
}

function meta(error) {
  if (!error) return '';
  const code = String(error.code ?? '') === String(error.status) ? null : error.code;
  return [error.status || null, code, error.param, error.requestId && t('err.id', { id: error.requestId })]
    .filter(Boolean).join(' · ');
}

/** A picture as the browser decodes it, turned as its EXIF says. */
async function decode(blob) {
  const image = new Image();
  const address = URL.createObjectURL(blob);
  try {
    image.src = address;
    await image.decode();
    return image;
  } finally {
    setTimeout(() => URL.revokeObjectURL(address), 0);
  }
}

function thumbnail(image) {
  const scale = Math.min(1, THUMB_PX / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = make('canvas', { width: Math.max(1, Math.round(image.naturalWidth * scale)), height: Math.max(1, Math.round(image.naturalHeight * scale)) });
  const c = canvas.getContext('2d');
  c.fillStyle = '#fff';
  c.fillRect(0, 0, canvas.width, canvas.height);
  c.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/jpeg', 0.8);
}

// ---------------------------------------------------------------- pictures
let pictures = []; // {id, blob, name, address, width, height, thumb}
let nextPicture = 1;

async function kindOf(blob) {
  const b = new Uint8Array(await blob.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...b);
  if (text.startsWith('\x89PNG\r\n\x1a\n')) return 'image/png';
  if (b[0] === 0xff && b[1] === 0xd8 && b[2] === 0xff) return 'image/jpeg';
  if (text.startsWith('RIFF') && text.slice(8, 12) === 'WEBP') return 'image/webp';
  return null;
}

async function addPictures(files) {
  const complaints = [];
  let added = 0;
  const list = [...files];
  const max = server.limits.max_images;
  for (const [i, file] of list.entries()) {
    if (pictures.length >= max) {
      complaints.push(t('pics.toomany', { max, n: list.length - i }));
      break;
    }
    const name = file.name || t('pic.n', { n: pictures.length + 1 });
    if (!await kindOf(file)) { complaints.push(t('pics.type', { name })); continue; }
    const sum = pictures.reduce((n, p) => n + p.blob.size, file.size);
    if (sum > server.limits.max_body_bytes) {
      complaints.push(t('pics.size', { name, max: Math.floor(server.limits.max_body_bytes / 1048576) }));
      continue;
    }
    try {
      const image = await decode(file);
      if (pictures.length >= max) break;
      pictures.push({ id: nextPicture++, blob: file, name, address: URL.createObjectURL(file),
        width: image.naturalWidth, height: image.naturalHeight, thumb: thumbnail(image) });
      added++;
    } catch {
      complaints.push(t('pics.broken', { name }));
    }
  }
  showPictures();
  showFieldError('pictures', complaints.join(' '));
  if (added) say(t('pic.added', { n: pictures.length }));
  return added;
}

function setPictures(list) {
  for (const p of pictures) URL.revokeObjectURL(p.address);
  pictures = [];
  return addPictures(list);
}

function movePicture(from, to) {
  if (to < 0 || to >= pictures.length || from === to) return;
  const [p] = pictures.splice(from, 1);
  pictures.splice(to, 0, p);
  showPictures();
  say(t('pic.moved', { n: to + 1, max: pictures.length }));
}

function showPictures() {
  const n = pictures.length, max = server.limits.max_images;
  const focused = document.activeElement?.closest?.('.pic button')?.dataset;
  $('pictures').replaceChildren(...pictures.map((p, i) => {
    const button = (does, path, label, off, act) => {
      const b = make('button', { type: 'button', disabled: off, ariaLabel: t(label, { n: i + 1 }), title: t(label, { n: i + 1 }) }, icon(path));
      b.dataset.does = does;
      b.dataset.picture = p.id;
      b.onclick = act;
      return b;
    };
    const tools = make('div', { className: 'pic-tools' });
    if (n > 1) {
      tools.append(button('up', ICON.back, 'pic.up', i === 0, () => movePicture(i, i - 1)),
        button('down', ICON.on, 'pic.down', i === n - 1, () => movePicture(i, i + 1)));
    }
    tools.append(button('remove', ICON.remove, 'pic.remove', false, () => {
      URL.revokeObjectURL(p.address);
      pictures.splice(i, 1);
      showPictures();
      say(t('pic.removed', { n: i + 1 }));
      ($('pictures').querySelector('[data-does="remove"]') ?? $('file')).focus();
    }));
    const frame = make('div', { className: 'pic-frame' }, make('img', { src: p.address, alt: p.name, draggable: false }));
    const item = make('li', { className: n > 1 ? 'pic movable' : 'pic' }, frame,
      make('div', {}, make('div', { className: 'pic-name', textContent: t('pic.n', { n: i + 1 }) }),
        make('div', { className: 'pic-size', textContent: `${p.width} × ${p.height}` })), tools);
    if (n > 1) dragging(item, frame, i);
    return item;
  }));
  if (focused) {
    const same = (does) => $('pictures').querySelector(`[data-picture="${focused.picture}"][data-does="${does}"]:not(:disabled)`);
    (same(focused.does) ?? same('up') ?? same('down'))?.focus();
  }
  $('pictures-count').textContent = n ? t('pics.count', { n, max }) : '';
  $('drop').hidden = n >= max;
  $('drop').classList.toggle('small', n > 0);
  $('drop').querySelector('.drop-main').textContent = t(n ? 'pics.more' : 'pics.drop');
  $('drop-hint').textContent = max > 1 ? t('pics.hint', { max }) : t('pics.hint1');
  $('prompt-hint').hidden = n < 2;
  if (n) showFieldError('pictures', '');
}

/** Order by dragging, with pointer events: the browsers' own drag and drop knows no touch. */
function dragging(item, frame, from) {
  let start = null, over = null;
  const end = () => {
    start = null;
    delete item.dataset.drag;
    item.style.transform = '';
    if (over) delete over.dataset.over;
    over = null;
  };
  frame.onpointerdown = (e) => {
    if (e.button !== 0) return;
    e.preventDefault();
    start = [e.clientX, e.clientY];
    frame.setPointerCapture(e.pointerId);
  };
  frame.onpointermove = (e) => {
    if (!start) return;
    const dx = e.clientX - start[0], dy = e.clientY - start[1];
    if (!('drag' in item.dataset) && Math.hypot(dx, dy) < 6) return;
    item.dataset.drag = '';
    item.style.transform = `translate(${dx}px, ${dy}px)`;
    const under = document.elementsFromPoint(e.clientX, e.clientY).map((x) => x.closest('.pic')).find((x) => x && x !== item) ?? null;
    if (under === over) return;
    if (over) delete over.dataset.over;
    over = under;
    if (over) over.dataset.over = '';
  };
  frame.onpointerup = () => {
    const to = over ? [...$('pictures').children].indexOf(over) : -1;
    end();
    movePicture(from, to);
  };
  frame.onpointercancel = end;
}

function watchDrops() {
  let depth = 0;
  const files = (e) => e.dataTransfer?.types.includes('Files');
  const end = () => { depth = 0; $('veil').hidden = true; };
  addEventListener('dragenter', (e) => { if (files(e)) { depth++; $('veil').hidden = false; } });
  addEventListener('dragleave', (e) => { if (files(e) && --depth <= 0) end(); });
  addEventListener('dragover', (e) => { if (files(e)) e.preventDefault(); });
  addEventListener('drop', (e) => {
    if (!files(e)) return;
    e.preventDefault();
    end();
    addPictures(e.dataTransfer.files);
  });
  addEventListener('paste', (e) => {
    const pasted = [...e.clipboardData?.files ?? []];
    if (!pasted.length) return; // text goes where it was pasted
    e.preventDefault();
    addPictures(pasted);
  });
  $('file').onchange = async () => {
    const chosen = [...$('file').files];
    $('file').value = '';
    await addPictures(chosen);
  };
}

// ---------------------------------------------------------------- the form's fields
function showFieldError(name, text) {
  const place = $(`${name}-error`);
  place.textContent = text;
  place.hidden = !text;
  const field = $(name === 'pictures' ? 'file' : name);
  if (text) field.setAttribute('aria-invalid', 'true');
  else field.removeAttribute('aria-invalid');
}

function clearErrors() {
  for (const name of ['pictures', 'prompt', 'seed', 'negative_prompt', 'lora', 'cache', ...NUMBERS]) showFieldError(name, '');
  $('form-error').hidden = true;
}

/** The fields as the API names them; what is at its default is left out. */
function readForm() {
  const params = { prompt: $('prompt').value.trim() };
  for (const name of NUMBERS) {
    const field = $(name), text = field.value.trim();
    if (field.validity.badInput) throw Object.assign(new Error(t('num.bad')), { param: name });
    if (text !== '' && Number(text) !== server.defaults[name]) params[name] = Number(text);
  }
  const negative = $('negative_prompt').value;
  if (negative.trim() !== '') params.negative_prompt = negative;
  if ($('lora').value) {
    const weight = $('lora_weight').value.trim();
    if ($('lora_weight').validity.badInput) throw Object.assign(new Error(t('num.bad')), { param: 'lora' });
    params.lora = `${$('lora').value}:${weight === '' ? 1 : Number(weight)}`;
  }
  if ($('cache').value !== server.defaults.cache) params.cache = $('cache').value;
  if ($('seed-fixed').checked) {
    const text = $('seed').value.trim();
    if (!/^\d{1,16}$/.test(text) || Number(text) > Number.MAX_SAFE_INTEGER) throw Object.assign(new Error(t('seed.bad')), { param: 'seed' });
    params.seed = Number(text);
  }
  return params;
}

function fillForm(params) {
  $('prompt').value = params.prompt ?? '';
  for (const name of NUMBERS) $(name).value = params[name] ?? server.defaults[name] ?? '';
  $('negative_prompt').value = (params.negative_prompt ?? '').trim() ? params.negative_prompt : '';
  setLora(params.lora ?? '');
  $('cache').value = params.cache ?? server.defaults.cache;
  setSeed(params.seed);
  noteAdvanced();
  keepDraft();
}

/** NAME:WEIGHT, or nothing; a name that is not there any more counts as none. */
function setLora(text) {
  const at = text.lastIndexOf(':');
  const name = text.slice(0, at);
  const known = server.loras.some((l) => l.name === name);
  $('lora').value = known ? name : '';
  $('lora_weight').value = known ? text.slice(at + 1) : 1;
  $('lora_weight').disabled = !known;
}

/** A LoRA that brings its own steps and guidance puts them into the form, and takes them out again. */
let brought = null;
function chooseLora() {
  const lora = server.loras.find((l) => l.name === $('lora').value);
  for (const name of ['num_inference_steps', 'true_cfg_scale']) {
    const before = String(brought?.[name] ?? server.defaults[name]);
    if ($(name).value === before) $(name).value = lora?.[name] ?? server.defaults[name];
  }
  brought = lora ?? null;
  $('lora_weight').disabled = !lora;
}

function showLoras() {
  const chosen = $('lora').value;
  $('lora-field').hidden = server.loras.length === 0;
  $('lora').replaceChildren(make('option', { value: '', textContent: t('lora.none') }),
    ...server.loras.map((l) => make('option', { value: l.name, textContent: l.name })));
  $('lora').value = server.loras.some((l) => l.name === chosen) ? chosen : '';
}

function setSeed(seed) {
  const fixed = seed !== undefined && seed !== null && seed !== 'random';
  $(fixed ? 'seed-fixed' : 'seed-random').checked = true;
  if (fixed) $('seed').value = seed;
  $('seed').disabled = !fixed;
}

function noteAdvanced() {
  const parts = [];
  if ($('num_inference_steps').value) parts.push(t('adv.steps', { n: $('num_inference_steps').value }));
  if ($('true_cfg_scale').value) parts.push(`CFG ${$('true_cfg_scale').value}`);
  if ($('max_side').value) parts.push(`${$('max_side').value} px`);
  if ($('lora').value) parts.push($('lora').value);
  if ($('cache').value !== 'off') parts.push(`${t('f.cache')} ${$('cache').selectedOptions[0].textContent}`);
  if ($('seed-fixed').checked && $('seed').value) parts.push(`${t('seed.title')} ${$('seed').value}`);
  $('advanced-note').textContent = parts.join(' · ');
}

function keepDraft() {
  if (!server.known) return; // what is at its default is left out, so the defaults must be known
  const draft = { prompt: $('prompt').value, negative_prompt: $('negative_prompt').value, open: $('advanced').open };
  for (const name of NUMBERS) if ($(name).value !== String(server.defaults[name] ?? '')) draft[name] = $(name).value;
  if ($('seed-fixed').checked) draft.seed = $('seed').value;
  if ($('lora').value) draft.lora = `${$('lora').value}:${$('lora_weight').value || 1}`;
  if ($('cache').value !== server.defaults.cache) draft.cache = $('cache').value;
  sessionStorage.setItem('qwen-edit.draft', JSON.stringify(draft));
}

function draftKept() {
  try { return JSON.parse(sessionStorage.getItem('qwen-edit.draft')) ?? {}; } catch { return {}; }
}

function restoreDraft() {
  const draft = draftKept();
  $('advanced').open = draft.open === true;
  fillForm(draft);
}

// ---------------------------------------------------------------- history: what this browser knows of its jobs
// {id, at, status, params, count, thumb, seed, result, error}
let jobs = [];

function loadJobs() {
  try { jobs = JSON.parse(localStorage.getItem('qwen-edit.jobs')) ?? []; } catch { jobs = []; }
}

/** Change one entry. Read again first: another tab may have written. */
function saveJob(id, change) {
  loadJobs();
  let job = jobs.find((j) => j.id === id);
  if (!job) {
    job = { id, at: Date.now(), status: 'queued', params: {}, count: 0 };
    jobs.unshift(job);
    jobs.length = Math.min(jobs.length, HISTORY_MAX);
  }
  Object.assign(job, change);
  writeJobs();
  return job;
}

function writeJobs() {
  for (let pictured = jobs.length; ; pictured = Math.floor(pictured / 2)) {
    jobs.forEach((j, i) => { if (i >= pictured) delete j.thumb; });
    try {
      localStorage.setItem('qwen-edit.jobs', JSON.stringify(jobs));
      break;
    } catch {
      if (pictured === 0) break; // full or forbidden: the page goes on without a memory
    }
  }
  showHistory();
}

const jobOf = (id) => jobs.find((j) => j.id === id);

/** Delete a job at the server. One that was just cancelled is refused (409) until it has really ended. */
async function erase(id) {
  for (let attempt = 0; attempt < 8; attempt++) {
    try {
      await call(`v1/jobs/${encodeURIComponent(id)}`, { method: 'DELETE' });
      return;
    } catch (e) {
      if (e.status !== 409) return;
      await new Promise((r) => { setTimeout(r, 500 * (attempt + 1)); });
    }
  }
}

async function forget(id, keepFocus) {
  const job = jobOf(id);
  const at = jobs.indexOf(job);
  if (job && !ENDED.includes(job.status)) await call(`v1/jobs/${encodeURIComponent(id)}/cancel`, { method: 'POST' }).catch(() => {});
  erase(id);
  loadJobs();
  jobs = jobs.filter((j) => j.id !== id);
  writeJobs();
  if (shown.id === id) showEmpty();
  if (keepFocus) ($('cards').querySelectorAll('.card-remove')[Math.min(at, jobs.length - 1)] ?? $('prompt')).focus();
}

function showHistory() {
  const focused = document.activeElement?.closest?.('.card');
  const which = focused && { id: focused.dataset.id, name: document.activeElement.className };
  $('history').hidden = jobs.length === 0;
  $('cards').replaceChildren(...jobs.map((job) => {
    const prompt = job.params.prompt ?? job.id;
    const frame = make('div', { className: 'card-frame' });
    if (job.thumb) frame.append(make('img', { src: job.thumb, alt: '' }));
    frame.append(make('span', { className: 'card-status', textContent: t(`s.${job.status}`) }));
    const open = make('button', { type: 'button', className: 'card-open', ariaLabel: t('hist.open', { status: t(`s.${job.status}`), prompt }) },
      frame, make('span', { className: 'card-text', textContent: prompt }));
    open.onclick = () => { show(job.id); toStage(); };
    const remove = make('button', { type: 'button', className: 'card-remove', ariaLabel: t('hist.remove', { prompt }), title: t('hist.remove', { prompt }) }, icon(ICON.remove));
    remove.onclick = () => forget(job.id, true);
    const card = make('li', { className: 'card' }, open, remove);
    card.dataset.id = job.id;
    card.dataset.status = job.status;
    if (shown.id === job.id) card.dataset.current = '';
    return card;
  }));
  if (which) $('cards').querySelector(`[data-id="${CSS.escape(which.id)}"] .${CSS.escape(which.name)}`)?.focus();
}

// ---------------------------------------------------------------- stage
const shown = { id: null, stop: null, error: null, progress: null, eta: null, etaAt: 0, inputs: [], result: null, against: 0, said: '', cancelling: false, running: false };

function stageIs(name) {
  for (const state of ['empty', 'working', 'failed', 'done']) $(state).hidden = state !== name;
  $('stage').dataset.state = name;
}

function leave() {
  shown.stop?.abort();
  for (const b of shown.inputs) if (b) URL.revokeObjectURL(b.address);
  if (shown.result) URL.revokeObjectURL(shown.result.address);
  Object.assign(shown, { id: null, stop: null, error: null, progress: null, eta: null, inputs: [], result: null, against: 0, said: '', cancelling: false, running: false });
  for (const name of ['preview', 'before', 'after']) $(name).removeAttribute('src');
  $('preview').hidden = true;
  $('progress-note').textContent = '';
  $('cancel').hidden = true;
}

function showEmpty() {
  leave();
  sessionStorage.removeItem('qwen-edit.shown');
  stageIs('empty');
  showHistory();
}

function toStage() {
  if (matchMedia('(max-width: 900px)').matches) $('stage').scrollIntoView({ behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth', block: 'start' });
  $('stage').focus({ preventScroll: true });
}

/** Put a job on the stage and follow it to its end. */
function show(id, inputs = []) {
  leave();
  shown.id = id;
  shown.inputs = inputs.map((blob) => ({ blob, address: URL.createObjectURL(blob) }));
  shown.stop = new AbortController();
  sessionStorage.setItem('qwen-edit.shown', id);
  showHistory();
  const job = jobOf(id);
  $('working-said').textContent = job?.params.prompt ?? '';
  if (job && ['failed', 'cancelled', 'expired', 'gone'].includes(job.status)) showEnd(job);
  else if (job?.status === 'completed') { working({ stage: 'fetch' }); finish(id, shown.stop.signal); }
  else { working({ stage: 'queued', position: null }); track(id, shown.stop.signal); }
}

/** What is being done, on the stage and, when it changes in kind, for screen readers. */
function working(progress, eta) {
  shown.progress = progress;
  if (eta !== undefined) { shown.eta = eta; shown.etaAt = performance.now(); }
  stageIs('working');
  $('cancel').hidden = progress.stage === 'fetch';
  $('cancel').disabled = shown.cancelling === true;
  $('cancel').textContent = t(shown.cancelling ? 'cancel.busy' : 'cancel');
  const { stage, step, total, position } = progress;
  const steps = total > 0 && (stage === undefined || /denoise|step|transformer|sampl/i.test(stage));
  let text;
  if (stage === 'sending') text = t('p.sending');
  else if (stage === 'queued') text = position > 0 ? t('p.position', { n: position + 1 }) : position === 0 ? t('p.next') : t('p.queued');
  else if (stage === 'fetch') text = t('p.fetch');
  else if (steps) text = t('p.step', { k: step, n: total });
  else if (/load/i.test(stage)) text = t('p.load');
  else if (/decod/i.test(stage)) text = t('p.decode');
  else if (/encod|text|refer|vision|prepare/i.test(stage)) text = t('p.encode');
  else text = t('p.started');
  $('progress-text').textContent = text;
  const bar = $('progress');
  if (steps) bar.value = step / total;
  else if (/decod/i.test(stage) || stage === 'fetch') bar.value = 1;
  else bar.removeAttribute('value');
  bar.setAttribute('aria-valuetext', text);
  countDown();
  // Spoken: every change of stage, and of the steps about each quarter.
  const quarter = steps ? Math.floor((4 * step) / total) : 0;
  const spoken = `${stage}${position ?? ''}${quarter}`;
  if (spoken !== shown.said) {
    shown.said = spoken;
    const left = secondsLeft();
    say(left === null ? text : t('a.left', { what: text, t: duration(Math.round(left)) }));
  }
  document.title = `${steps ? `${step}/${total}` : '…'} · qwen-edit`;
}

function secondsLeft() {
  if (shown.eta === null || shown.eta === undefined) return null;
  return Math.max(0, shown.eta - (performance.now() - shown.etaAt) / 1000);
}

function countDown() {
  const left = secondsLeft();
  $('progress-eta').textContent = left === null || left < 0.5 ? '' : t(shown.progress?.stage === 'queued' ? 'p.leftabout' : 'p.left', { t: duration(Math.ceil(left)) });
}

function showInputPreview() {
  const input = shown.inputs.at(-1);
  if (!input || $('preview').dataset.kind === 'preview' && !$('preview').hidden) return;
  $('preview').src = input.address;
  $('preview').alt = '';
  $('preview').dataset.kind = 'input';
  $('preview').hidden = false;
}

/** The pictures of the job, from the server: they are what it really worked on. */
async function fetchInputs(id, signal) {
  const count = jobOf(id)?.count ?? 1;
  const list = [];
  for (let n = 0; n < count; n++) {
    try {
      const blob = await (await call(`v1/jobs/${encodeURIComponent(id)}/inputs/${n}`, { signal })).blob();
      list.push({ blob, address: URL.createObjectURL(blob) });
    } catch (e) {
      if (signal.aborted) return;
      list.push(null);
    }
  }
  if (signal.aborted || shown.inputs.length) return;
  shown.inputs = list;
}

/** One view of a job, whatever of it is nested: status, place in the queue, progress, result, error. */
function view(body) {
  const inner = body.result && typeof body.result === 'object' ? body.result : {};
  const p = body.progress ?? body.current ?? null;
  return { ...inner, ...body, ...(p ? { stage: p.stage, step: p.step, total: p.total, eta_s: p.eta_s ?? body.eta_s } : {}) };
}

const RESULT_FIELDS = ['seed', 'width', 'height', 'num_inference_steps', 'true_cfg_scale', 'cfg', 'cfg_ran', 'timings', 'warnings', 'model', 'precision', 'cache', 'loras', 'output_format', 'gpu_id'];

/** Take over what the server says of a job. Returns true when it has ended. */
function learn(id, body) {
  const v = view(body);
  const change = { status: v.status };
  if (v.status === 'completed') {
    change.result = Object.fromEntries(RESULT_FIELDS.filter((f) => f in v).map((f) => [f, v[f]]));
  }
  if (v.status === 'failed') change.error = v.error ?? null;
  const job = jobOf(id);
  if (!job || job.status !== change.status || ENDED.includes(change.status)) saveJob(id, change);
  return ENDED.includes(v.status);
}

async function track(id, signal) {
  const mine = () => shown.id === id && !signal.aborted;
  (shown.inputs.length ? Promise.resolve() : fetchInputs(id, signal)).then(() => { if (mine() && !shown.result) showInputPreview(); });
  for (;;) {
    try {
      const body = await getJson(`v1/jobs/${encodeURIComponent(id)}`, { signal });
      if (!mine()) return;
      if (learn(id, body)) { await finish(id, signal); return; }
      const v = view(body);
      if (v.status === 'queued') working({ stage: 'queued', position: v.queue_position ?? null }, v.eta_s ?? null);
      else { shown.running = true; working({ stage: v.stage ?? (v.total ? undefined : 'started'), step: v.step ?? 0, total: v.total ?? 0 }, v.eta_s ?? null); }
      if (document.hidden) { // a hidden tab must not hold one of the six connections
        await new Promise((r) => { setTimeout(r, JOB_POLL_MS); document.addEventListener('visibilitychange', r, { once: true }); });
        continue;
      }
      const stream = new AbortController();
      const stop = () => stream.abort();
      signal.addEventListener('abort', stop, { once: true });
      const hide = () => { if (document.hidden) stop(); };
      document.addEventListener('visibilitychange', hide);
      try {
        await follow(id, {
          signal: stream.signal,
          onEvent: (name, data) => mine() && onEvent(id, name, data),
          onLost: () => { if (mine()) $('progress-note').textContent = t('p.lost'); },
          onBack: () => { if (mine()) $('progress-note').textContent = ''; },
        });
      } finally {
        document.removeEventListener('visibilitychange', hide);
      }
    } catch (e) {
      if (!mine()) return;
      if (e instanceof ApiError && [403, 404, 410].includes(e.status)) {
        saveJob(id, { status: e.status === 410 ? 'expired' : 'gone', error: { message: words(e), code: e.code } });
        showEnd(jobOf(id), e);
        return;
      }
      $('progress-note').textContent = e instanceof ApiError && e.status === 0 ? t('p.lost') : words(e);
      await new Promise((r) => { setTimeout(r, e.status === 401 ? 60000 : 2000); addEventListener('qwen-edit-key', r, { once: true }); });
      if (!mine()) return;
      $('progress-note').textContent = '';
    }
  }
}

/** One event of the stream; true ends it. */
function onEvent(id, name, data) {
  switch (name) {
    case 'queued':
      if (shown.running) return false; // an old event of a job that is past it
      working({ stage: 'queued', position: data.position ?? null }, data.eta_s ?? null);
      return false;
    case 'started':
      if (shown.running) return false; // a note of an earlier attempt stays: it says why this takes longer
      saveStatus(id, 'running');
      working({ stage: 'started' }, data.eta_s ?? null);
      return false;
    case 'progress':
      if (shown.running && data.total > 0 && data.total === shown.progress?.total && data.step < shown.progress.step) return false;
      shown.running = true;
      saveStatus(id, 'running');
      working({ stage: data.stage, step: data.step, total: data.total }, data.eta_s ?? null);
      return false;
    case 'preview': {
      const b64 = data.b64_json ?? data.image_base64;
      if (b64) {
        const kind = b64.startsWith('/9j') ? 'jpeg' : b64.startsWith('UklG') ? 'webp' : 'png';
        $('preview').src = `data:image/${kind};base64,${b64}`;
        $('preview').alt = t('img.preview', { k: data.step });
        $('preview').dataset.kind = 'preview';
        $('preview').hidden = false;
      }
      return false;
    }
    case 'retrying':
      shown.running = false;
      saveStatus(id, 'queued');
      $('progress-note').textContent = t('p.retry', { reason: data.reason ?? '' });
      working({ stage: 'queued', position: null }, null);
      return false;
    case 'completed': case 'failed': case 'cancelled': case 'expired':
      return true; // the job itself is asked for next: it says all
    default:
      return false;
  }
}

function saveStatus(id, status) {
  if (jobOf(id)?.status !== status) saveJob(id, { status });
}

async function finish(id, signal) {
  const job = jobOf(id);
  if (job.status !== 'completed') { showEnd(job); return; }
  working({ stage: 'fetch' }, null);
  try {
    const [blob] = await Promise.all([
      call(`v1/jobs/${encodeURIComponent(id)}/result`, { signal }).then((r) => r.blob()),
      shown.inputs.length ? null : fetchInputs(id, signal)]);
    const image = await decode(blob);
    if (signal.aborted) return;
    shown.result = { blob, address: URL.createObjectURL(blob), width: image.naturalWidth, height: image.naturalHeight };
    saveJob(id, { thumb: thumbnail(image) });
    showDone(jobOf(id));
  } catch (e) {
    if (signal.aborted) return;
    if (e instanceof ApiError && [403, 404, 410].includes(e.status)) {
      saveJob(id, { status: e.status === 410 ? 'expired' : 'gone' });
      showEnd(jobOf(id), e);
    } else {
      shown.error = e;
      $('failed-title').textContent = t('fail.failed');
      $('failed-text').textContent = words(e);
      $('failed-meta').textContent = meta(e);
      stageIs('failed');
    }
  }
}

function showEnd(job, error) {
  document.title = t('title');
  $('cancel').hidden = true;
  shown.error = error ?? null;
  const e = error ?? job.error ?? null;
  const notice = $('failed').querySelector('.notice');
  notice.classList.toggle('error', job.status === 'failed');
  notice.classList.toggle('neutral', job.status !== 'failed');
  $('failed-title').textContent = t(`fail.${job.status}`);
  $('failed-text').textContent = job.status === 'cancelled' ? t('fail.cancelled.text') : job.status === 'expired' ? t('fail.expired.text')
    : error ? words(error) : typeof e === 'string' ? e : e?.message ?? '';
  $('failed-meta').textContent = error ? meta(error) : [e?.type ?? e?.code, e?.param, job.id].filter(Boolean).join(' · ');
  stageIs('failed');
  say(`${$('failed-title').textContent}. ${$('failed-text').textContent}`);
}

function showDone(job) {
  document.title = t('title');
  $('cancel').hidden = true;
  const r = job.result ?? {}, picture = shown.result;
  stageIs('done');
  $('after').src = picture.address;
  $('after').alt = t('img.after', { prompt: job.params.prompt ?? '' });
  // Small results are shown larger, but no more than three times.
  const ratio = picture.width / picture.height;
  const width = Math.max(Math.min(picture.width, 1600), Math.min(picture.width * 3, 560));
  const height = Math.max(240, Math.min(innerHeight * 0.64, 720));
  $('compare').style.width = `${Math.round(Math.min(width, height * ratio))}px`;
  $('compare').style.aspectRatio = `${picture.width} / ${picture.height}`;
  $('after').style.width = '100%';
  $('after').style.height = '100%';
  const usable = shown.inputs.map((input, i) => input && i).filter((i) => i !== null);
  compareWith(usable.includes(shown.inputs.length - 1) ? shown.inputs.length - 1 : usable.at(-1) ?? -1, ratio);
  $('compare-with').hidden = usable.length < 2;
  $('compare-with').replaceChildren(...usable.map((i) => {
    const b = make('button', { type: 'button', textContent: t('pic.n', { n: i + 1 }), ariaPressed: String(i === shown.against) });
    b.onclick = () => {
      compareWith(i, ratio);
      for (const [k, other] of [...$('compare-with').children].entries()) other.ariaPressed = String(usable[k] === i);
    };
    return b;
  }));
  const type = picture.blob.type.replace('image/', '').replace('jpeg', 'jpg') || 'png';
  $('download').href = picture.address;
  $('download').download = `qwen-edit-${job.id.slice(0, 12)}.${type}`;
  const warnings = r.warnings ?? [];
  $('warnings').hidden = warnings.length === 0;
  $('warnings').replaceChildren(...warnings.map((w) => make('li', { textContent: typeof w === 'string' ? w : w.message ?? JSON.stringify(w) })));
  $('said').textContent = job.params.prompt ?? '';
  $('said').hidden = !job.params.prompt;
  showFacts(job);
  setSplit(50);
  say(t('a.done'));
}

function compareWith(i, ratio) {
  shown.against = i;
  $('compare').classList.toggle('single', i < 0);
  if (i < 0) return;
  const before = $('before');
  before.src = shown.inputs[i].address;
  before.alt = t('img.before', { n: i + 1 });
  before.onload = () => { // sizes are rounded to the model's grid: what is nearly the same shape lies exactly over it
    before.style.objectFit = Math.abs(before.naturalWidth / before.naturalHeight / ratio - 1) < 0.06 ? 'fill' : 'contain';
  };
}

function setSplit(value) {
  $('split').value = value;
  $('split').setAttribute('aria-valuetext', t('split.text', { p: value }));
  $('compare').style.setProperty('--split', `${value}%`);
}

function showFacts(job) {
  const r = job.result ?? {};
  const rows = [];
  rows.push(['f.size', `${shown.result?.width ?? r.width} × ${shown.result?.height ?? r.height}`]);
  const seed = r.seed ?? job.params.seed;
  if (seed !== undefined) {
    const reuse = make('button', { type: 'button', className: 'link', id: 'seed-reuse', textContent: String(seed), title: t('seed.reuse', { n: seed }), ariaLabel: t('seed.reuse', { n: seed }) });
    reuse.onclick = () => { setSeed(seed); noteAdvanced(); keepDraft(); toast(t('seed.reused', { n: seed })); };
    rows.push(['f.seed', reuse]);
  }
  const steps = r.num_inference_steps ?? job.params.num_inference_steps;
  if (steps !== undefined) rows.push(['f.steps', String(steps)]);
  const scale = r.true_cfg_scale ?? job.params.true_cfg_scale;
  if (scale !== undefined) {
    const ran = r.cfg ?? r.cfg_ran;
    const on = typeof ran === 'boolean' ? ran : scale > 1;
    rows.push(['f.cfg', on ? t('f.cfg.on', { n: scale }) : t('f.cfg.off')]);
  }
  if (r.timings?.total_s !== undefined) {
    const q = r.timings.queued_s ?? 0, total = r.timings.total_s;
    rows.push(['f.time', q >= 1 ? t('f.time.parts', { t: duration(total), q: duration(q) }) : duration(total)]);
  }
  if (r.loras?.length) rows.push(['f.lora', r.loras.map((l) => (l.weight === 1 ? l.name : `${l.name} × ${l.weight}`)).join(', ')]);
  if (r.cache && r.cache !== 'off') rows.push(['f.cache', t(`cache.${r.cache}`)]);
  if (r.model) rows.push(['f.model', r.model]);
  $('facts').replaceChildren(...rows.map(([name, value]) => make('div', {}, make('dt', { textContent: t(name) }), make('dd', {}, value))));
}

// ---------------------------------------------------------------- generate and cancel
let sending = false, retryTimer, retryIn = 0; // seconds that the server asked to wait

function showGenerate() {
  $('generate').disabled = sending || retryIn > 0;
  $('generate-text').textContent = sending ? t('go.sending') : retryIn > 0 ? t('go.wait', { s: retryIn }) : t('go');
}

function fail(error) {
  const param = error.param;
  const field = { prompt: 'prompt', seed: 'seed', negative_prompt: 'negative_prompt', lora: 'lora', cache: 'cache', ...Object.fromEntries(NUMBERS.map((n) => [n, n])) }[param]
    ?? (/^image/.test(param ?? '') ? 'pictures' : null);
  if (field) {
    if ([...NUMBERS, 'seed', 'negative_prompt', 'lora', 'cache'].includes(field)) $('advanced').open = true;
    showFieldError(field, words(error));
    $(field === 'pictures' ? 'file' : field).focus();
  } else {
    $('form-error-text').textContent = words(error);
    $('form-error-meta').textContent = meta(error);
    $('form-error').hidden = false;
  }
  if (error.retryAfter) {
    clearInterval(retryTimer);
    retryIn = Math.ceil(error.retryAfter);
    retryTimer = setInterval(() => {
      retryIn--;
      if (retryIn <= 0) clearInterval(retryTimer);
      if (!sending) showGenerate();
    }, 1000);
  }
}

async function generate() {
  if (sending || $('generate').disabled) return;
  clearErrors();
  let params;
  try {
    params = readForm();
    if (!pictures.length) throw Object.assign(new Error(t('pics.none')), { param: 'images' });
    if (!params.prompt) throw Object.assign(new Error(t('prompt.none')), { param: 'prompt' });
  } catch (e) {
    fail(e);
    return;
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(params)) form.append(name, String(value));
  // One key a click: an answer that got lost on the way does not make a second job.
  form.append('idempotency_key', randomId());
  if (server.previews) form.append('preview', 'true');
  for (const p of pictures) form.append('image', p.blob, p.name);
  const { thumb } = pictures.at(-1);
  const count = pictures.length;
  const inputs = pictures.map((p) => p.blob);

  sending = true;
  showGenerate();
  const progress = (part) => { $('generate-text').textContent = part < 1 ? t('go.upload', { p: Math.round(100 * part) }) : t('go.sending'); };
  try {
    let answer;
    for (let attempt = 0; ; attempt++) {
      try {
        answer = await upload('v1/jobs', form, progress);
        break;
      } catch (e) {
        if (e.status !== 0 || attempt === 2) throw e;
        await new Promise((r) => { setTimeout(r, 700 * (attempt + 1)); });
      }
    }
    saveJob(answer.id, { status: answer.status ?? 'queued', params, count, thumb, at: Date.now() });
    show(answer.id, inputs);
    if (shown.progress?.stage === 'queued') working({ stage: 'queued', position: answer.queue_position ?? null }, answer.eta_s ?? null);
    toStage();
  } catch (e) {
    if (e.status !== 401) fail(e); // the key dialog says it
    else pendingSubmit = true;
  } finally {
    sending = false;
    showGenerate();
  }
}

async function cancel() {
  if (!shown.id || shown.cancelling) return;
  const id = shown.id;
  shown.cancelling = true;
  $('cancel').disabled = true;
  $('cancel').textContent = t('cancel.busy');
  try {
    await call(`v1/jobs/${encodeURIComponent(id)}/cancel`, { method: 'POST' });
  } catch (e) {
    if (shown.id !== id) return;
    shown.cancelling = false;
    $('cancel').disabled = false;
    $('cancel').textContent = t('cancel');
    if (e.status !== 409) $('progress-note').textContent = words(e); // 409: it ended meanwhile, the stream tells how
  }
}

async function takeSettings() {
  const job = jobOf(shown.id);
  if (!job) return;
  clearErrors();
  const { signal } = shown.stop;
  if (!shown.inputs.length) await fetchInputs(job.id, signal);
  const blobs = shown.inputs.filter(Boolean).map((i) => i.blob);
  if (blobs.length) await setPictures(blobs);
  fillForm(job.params);
  toast(t('reuse.done'));
  $('prompt').focus();
}

async function useResult() {
  const { blob } = shown.result;
  const fixed = $('seed-fixed').checked;
  clearErrors();
  const type = blob.type.replace('image/', '') || 'png';
  await setPictures([new File([blob], `${shown.id.slice(0, 12)}.${type}`, { type: blob.type })]);
  if (fixed) setSeed('random'); // the same seed over and over degrades the picture
  noteAdvanced();
  keepDraft();
  toast(t(fixed ? 'use.seed' : 'use.done'));
  $('prompt').focus();
  $('prompt').select();
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no clipboard object on plain HTTP: the old way
    const area = make('textarea', { className: 'sr', value: text });
    const back = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    back?.focus();
    return done;
  }
}

async function copyParameters() {
  const job = jobOf(shown.id);
  const r = job.result ?? {};
  const all = { ...job.params };
  for (const name of ['seed', 'num_inference_steps', 'true_cfg_scale']) if (r[name] !== undefined) all[name] = r[name];
  const done = await copyText(JSON.stringify(all, null, 2));
  $('copy-text').textContent = t(done ? 'copy.done' : 'copy.fail');
  say($('copy-text').textContent);
  setTimeout(() => { $('copy-text').textContent = t('copy'); }, 2000);
}

// ---------------------------------------------------------------- a drawn sample, for the first minute
async function drawSample() {
  const canvas = make('canvas', { width: 128, height: 128 });
  const c = canvas.getContext('2d');
  c.fillStyle = '#f2e6c9';
  c.fillRect(0, 0, 128, 128);
  c.fillStyle = '#d8392b';
  c.beginPath();
  c.arc(64, 64, 34, 0, 2 * Math.PI);
  c.fill();
  const blob = await new Promise((r) => { canvas.toBlob(r, 'image/png'); });
  await setPictures([new File([blob], 'sample.png', { type: 'image/png' })]);
  if (!$('prompt').value.trim()) $('prompt').value = t('examples')[0];
  keepDraft();
  $('prompt').focus();
}

// ---------------------------------------------------------------- key, server, language
let pendingSubmit = false;

function askKey(error) {
  service('bad', 'svc.key');
  $('key-button').hidden = false;
  if ($('key-dialog').open) return;
  $('key-error').textContent = hasKey() ? words(error) : '';
  $('key-error').hidden = !hasKey();
  $('key').value = '';
  $('key-dialog').showModal();
}

function service(is, key, values) {
  $('service-dot').dataset.is = is;
  const text = t(key, values);
  if ($('service-text').textContent !== text) $('service-text').textContent = text;
  $('service-text').removeAttribute('data-i18n');
}

async function lookAtHealth() {
  try {
    const h = await health();
    const ready = (h.workers ?? []).filter((w) => w.ready).length;
    const waiting = h.queue?.depth ?? 0;
    if (h.status === 'starting' || (!ready && (h.workers ?? []).some((w) => /start|load/.test(w.state)))) service('wait', 'svc.starting');
    else if (h.status === 'down') service('bad', 'svc.down');
    else if (h.status === 'degraded') service('wait', 'svc.degraded');
    else service('good', waiting ? 'svc.queue' : 'svc.ready', { n: waiting });
    if (!server.known) await lookAtServer();
  } catch (e) {
    if (e.status !== 401) service('bad', 'svc.offline');
  }
}

/** Defaults and limits in force; what the server does not say keeps the contract's values. */
async function lookAtServer() {
  const list = await getJson('v1/models');
  const m = list.data?.[0] ?? {};
  server.known = m.defaults?.num_inference_steps !== undefined; // not yet while the model is loading
  server.model = server.known ? m.id ?? '' : '';
  server.about = m.about ?? null;
  server.loras = m.loras ?? [];
  for (const [to, from] of [[server.defaults, m.defaults], [server.limits, m.limits]]) {
    for (const [name, value] of Object.entries(from ?? {})) if (value !== null || to === server.defaults) to[name] = value;
  }
  for (const name of NUMBERS) {
    const range = server.limits[name];
    if (Array.isArray(range)) { [$(name).min, $(name).max] = range; }
    $(name).value = draftKept()[name] ?? server.defaults[name] ?? '';
  }
  showLoras();
  setLora(draftKept().lora ?? '');
  $('cache').value = draftKept().cache ?? server.defaults.cache;
  brought = server.loras.find((l) => l.name === $('lora').value) ?? null;
  keepDraft();
  showServer();
  noteAdvanced();
  showPictures();
}

function showServer() {
  const text = typeof server.about === 'string' ? server.about : server.about?.[language()] ?? '';
  $('about').textContent = text;
  $('about').hidden = !text;
  $('model').textContent = server.model.split('/').at(-1);
  $('model').title = server.model;
}

function showLanguage(name) {
  setLanguage(name);
  document.title = t('title');
  $('language').textContent = t('lang.other');
  $('language').lang = name === 'zh' ? 'en' : 'zh-CN';
  $('language').setAttribute('aria-label', t('lang.switch'));
  showTheme();
  $('examples').replaceChildren(...t('examples').map((text) => {
    const b = make('button', { type: 'button', textContent: text });
    b.onclick = () => { $('prompt').value = text; keepDraft(); $('prompt').focus(); };
    return b;
  }));
  clearErrors();
  showGenerate();
  showPictures();
  noteAdvanced();
  showHistory();
  showServer();
  showLoras();
  const job = jobOf(shown.id);
  if ($('stage').dataset.state === 'working' && shown.progress) working(shown.progress);
  else if ($('stage').dataset.state === 'failed' && job) showEnd(job, shown.error);
  else if ($('stage').dataset.state === 'done' && job) showDone(job);
  lookAtHealth();
}

function showTheme() {
  const label = t('theme.label', { mode: t(`theme.${localStorage.getItem('qwen-edit.theme') ?? 'auto'}`) });
  $('theme').setAttribute('aria-label', label);
  $('theme').title = label;
}

// ---------------------------------------------------------------- the others in the history
async function lookAtOthers() {
  for (const job of jobs.filter((j) => !ENDED.includes(j.status) && j.id !== shown.id)) {
    try {
      learn(job.id, await getJson(`v1/jobs/${encodeURIComponent(job.id)}`));
    } catch (e) {
      if ([403, 404, 410].includes(e.status)) saveJob(job.id, { status: e.status === 410 ? 'expired' : 'gone' });
      else return;
    }
  }
}

// ---------------------------------------------------------------- start
function start() {
  loadJobs();
  showLanguage(startLanguage(localStorage.getItem('qwen-edit.language')));
  restoreDraft();
  watchDrops();
  $('form').onsubmit = (e) => { e.preventDefault(); generate(); };
  $('form').oninput = (e) => {
    if (e.target.id && $(`${e.target.id}-error`)) showFieldError(e.target.id, '');
    if (e.target.id === 'lora') chooseLora();
    if (e.target.name === 'seed-mode') {
      $('seed').disabled = $('seed-random').checked;
      if ($('seed-fixed').checked) {
        if (!$('seed').value) $('seed').value = jobs.find((j) => j.result?.seed !== undefined)?.result.seed ?? '';
        $('seed').focus();
      }
    }
    noteAdvanced();
    keepDraft();
  };
  $('advanced').ontoggle = keepDraft;
  addEventListener('keydown', (e) => {
    if (e.key === 'Enter' && (e.ctrlKey || e.metaKey) && !document.querySelector('dialog[open]')) { e.preventDefault(); generate(); }
  });
  $('defaults').onclick = () => { clearErrors(); fillForm({ prompt: $('prompt').value }); };
  $('cancel').onclick = cancel;
  $('again').onclick = takeSettings;
  $('reuse').onclick = takeSettings;
  $('use').onclick = useResult;
  $('copy').onclick = copyParameters;
  $('sample').onclick = drawSample;
  $('split').oninput = () => setSplit($('split').value);
  $('language').onclick = () => {
    const name = language() === 'zh' ? 'en' : 'zh';
    localStorage.setItem('qwen-edit.language', name);
    showLanguage(name);
  };
  $('theme').onclick = () => {
    const modes = ['auto', 'light', 'dark'];
    const next = modes[(modes.indexOf(localStorage.getItem('qwen-edit.theme') ?? 'auto') + 1) % 3];
    localStorage.setItem('qwen-edit.theme', next);
    dispatchEvent(new Event('qwen-edit-theme'));
    showTheme();
  };
  whenKeyWanted(askKey);
  $('key-button').onclick = () => askKey(new ApiError(401));
  $('key-close').onclick = () => { pendingSubmit = false; $('key-dialog').close(); };
  $('key-form').onsubmit = async () => {
    setKey($('key').value, $('key-keep').checked);
    dispatchEvent(new Event('qwen-edit-key'));
    await lookAtHealth();
    if (pendingSubmit && !$('key-dialog').open) { pendingSubmit = false; generate(); }
  };
  $('clear').onclick = () => $('clear-dialog').showModal();
  $('clear-dialog').onclose = async () => {
    if ($('clear-dialog').returnValue !== 'yes') return;
    $('clear-dialog').returnValue = '';
    for (const job of jobs.filter((j) => ENDED.includes(j.status))) await forget(job.id);
    $('prompt').focus();
  };
  addEventListener('storage', (e) => {
    if (e.key !== 'qwen-edit.jobs') return;
    const had = new Set(jobs.map((j) => j.id));
    loadJobs();
    showHistory();
    const fresh = jobs.find((j) => !had.has(j.id) && !ENDED.includes(j.status));
    if (fresh && !shown.id) show(fresh.id); // made in another tab while this one is idle
  });
  document.addEventListener('visibilitychange', () => { if (!document.hidden) { lookAtHealth(); lookAtOthers(); } });
  let healthAt = 0;
  setInterval(() => { // often while the model is loading or the server is away
    const due = server.known && $('service-dot').dataset.is === 'good' ? HEALTH_POLL_MS : 2000;
    if (document.hidden || document.querySelector('dialog[open]') || performance.now() - healthAt < due) return;
    healthAt = performance.now();
    lookAtHealth();
  }, 1000);
  setInterval(() => { if (!document.hidden) lookAtOthers(); }, JOB_POLL_MS);
  setInterval(() => { if (!$('working').hidden) countDown(); }, 500);

  // The job that this tab showed, else the newest one that is still going on.
  const was = sessionStorage.getItem('qwen-edit.shown');
  const first = jobOf(was) ?? jobs.find((j) => !ENDED.includes(j.status));
  if (first) {
    show(first.id);
    if (jobOf(was)) { // a reload: the pictures of that job go back into the form
      fetchInputs(first.id, shown.stop.signal).then(() => {
        const blobs = shown.inputs.filter(Boolean).map((i) => i.blob);
        if (blobs.length && !pictures.length && shown.id === first.id) setPictures(blobs);
      });
    }
  } else {
    stageIs('empty');
  }
  lookAtOthers();
}

start();
