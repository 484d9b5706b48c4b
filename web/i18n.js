// Texts of the page in English and Chinese, and the functions that put them into the document.
// A text may hold {name}: replaced by the value given to t(). Keys are the same in both tables (tests/api/page_test.py).

export const texts = {
  en: {
    'lang.other': '中文', 'lang.switch': '切换到中文', 'title': 'qwen-edit: edit pictures by instruction',
    'skip': 'Skip to the instruction', 'theme.label': 'Colours: {mode}', 'theme.auto': 'as the system', 'theme.light': 'light', 'theme.dark': 'dark',
    'svc.connecting': 'Connecting…', 'svc.ready': 'Ready', 'svc.queue': 'Ready · {n} waiting', 'svc.starting': 'Loading the model…',
    'svc.degraded': 'Ready, a worker is restarting', 'svc.down': 'No worker is ready', 'svc.offline': 'No connection to the server', 'svc.key': 'Key needed',
    'form.label': 'Edit', 'pics.title': 'Pictures', 'pics.count': '{n} of {max}', 'pics.drop': 'Drop, paste or choose a picture', 'pics.more': 'Add a picture',
    'pics.hint': 'PNG, JPEG or WebP, up to {max}', 'pics.hint1': 'PNG, JPEG or WebP', 'pics.veil': 'Drop to add', 'pic.n': 'Picture {n}', 'pic.up': 'Move picture {n} forward', 'pic.down': 'Move picture {n} back', 'pic.remove': 'Remove picture {n}',
    'pic.moved': 'Now picture {n} of {max}', 'pic.removed': 'Picture {n} removed', 'pic.added': 'Picture {n} added',
    'pics.none': 'Add at least one picture.', 'pics.toomany': 'At most {max} pictures; {n} left out.', 'pics.type': '{name} is not a PNG, JPEG or WebP picture.', 'pics.size': 'Together the pictures are over {max} MB, the most this server takes. {name} was left out.', 'pics.broken': '{name} cannot be opened as a picture.',
    'prompt.title': 'Instruction', 'prompt.placeholder': 'What should change? For example: paint the subject purple and keep the style.', 'prompt.none': 'Write what should change.',
    'prompt.multi': 'Name pictures by their numbers, “Picture 1”, “Picture 2”. The result takes the shape of the last one.',
    'adv.title': 'Advanced', 'adv.steps': '{n} steps', 'adv.reset': 'Back to the defaults',
    'steps.title': 'Steps', 'steps.hint': 'More steps: finer, and slower in proportion.', 'side.title': 'Longest side', 'side.hint': 'Pixels at most. Empty: the model’s own size.', 'side.auto': 'automatic',
    'seed.title': 'Seed', 'seed.random': 'Random', 'seed.fixed': 'Reuse', 'seed.number': 'Seed number', 'seed.hint': 'The same seed, pictures and settings give the same result.', 'seed.bad': 'A whole number from 0 to 9007199254740991.',
    'cfg.title': 'True CFG scale', 'cfg.hint': 'How strictly to follow. Above 1, each step costs double.', 'guid.title': 'Guidance scale', 'guid.hint': 'Accepted for compatibility; this model ignores it.',
    'neg.title': 'Negative prompt', 'neg.placeholder': 'one space, the default', 'neg.hint': 'What to avoid. Counts only with a true CFG scale above 1.', 'num.bad': 'Not a number.',
    'lora.title': 'LoRA', 'lora.none': 'None chosen', 'lora.hint': 'A style or skill added to the model.', 'f.lora': 'LoRA', 'weight.title': 'Weight', 'weight.hint': 'How strongly; 1 is as it was made.',
    'cache.title': 'Step caching', 'cache.off': 'Off', 'cache.balanced': 'Balanced', 'cache.fast': 'Fast', 'cache.hint': 'Leaves out work that would hardly change anything: faster, slightly different. From 9 steps.', 'f.cache': 'Caching',
    'go': 'Generate', 'go.sending': 'Sending…', 'go.upload': 'Sending… {p} %', 'go.wait': 'Again in {s} s', 'cancel': 'Cancel', 'cancel.busy': 'Cancelling…', 'again': 'Try again with these settings',
    'stage.title': 'Result', 'empty.title': 'Say what should change', 'empty.text': 'Add a picture, write an instruction, press Generate. The result appears here beside the original.', 'empty.examples': 'Examples', 'empty.sample': 'Try it with a drawn sample',
    'progress.label': 'Progress', 'p.sending': 'Sending the pictures', 'p.queued': 'Waiting in the queue', 'p.position': 'Waiting, number {n} in the queue', 'p.next': 'Next in the queue', 'p.started': 'Starting', 'p.step': 'Step {k} of {n}', 'p.load': 'Loading the model', 'p.encode': 'Reading the pictures and the instruction', 'p.decode': 'Painting the result', 'p.fetch': 'Fetching the result', 'p.retry': 'Started again: {reason}', 'p.lost': 'Connection lost. The edit goes on at the server; connecting again…', 'p.left': '{t} left', 'p.leftabout': 'about {t}',
    't.s': '{n} s', 't.m': '{n} min', 't.ms': '{m} min {s} s', 't.h': '{h} h {m} min',
    'before': 'Before', 'after': 'After', 'split.label': 'Before and after', 'split.text': '{p} % before', 'compare.with': 'Compare with', 'img.after': 'Result: {prompt}', 'img.before': 'Picture {n}, before the edit', 'img.preview': 'Preview after step {k}',
    'download': 'Download', 'use': 'Use as input', 'use.done': 'The result is now picture 1.', 'use.seed': 'The result is now picture 1. The seed is random again: editing a result with the same seed harms it.', 'copy': 'Copy parameters', 'copy.done': 'Copied', 'copy.fail': 'Copying failed', 'reuse': 'Reuse settings', 'reuse.done': 'Instruction, pictures and settings are back in the form.', 'seed.reuse': 'Reuse seed {n}', 'seed.reused': 'The next edit reuses seed {n}.',
    'f.size': 'Size', 'f.steps': 'Steps', 'f.seed': 'Seed', 'f.cfg': 'Guidance', 'f.cfg.on': 'CFG {n}', 'f.cfg.off': 'without CFG', 'f.time': 'Time', 'f.model': 'Model', 'f.time.parts': '{t}, after {q} in the queue',
    'fail.failed': 'The edit failed', 'fail.cancelled': 'Cancelled', 'fail.cancelled.text': 'This edit was cancelled. Nothing was made.', 'fail.expired': 'No longer on the server', 'fail.expired.text': 'Results are kept for a limited time. The settings are still here.', 'fail.gone': 'Not on this server', 'err.network': 'The server does not answer. Check that it runs and that this machine can reach it.', 'err.id': 'request {id}',
    'hist.title': 'History of this browser', 'hist.clear': 'Clear', 'hist.remove': 'Remove: {prompt}', 'hist.open': '{status}: {prompt}', 's.queued': 'waiting', 's.running': 'running', 's.completed': 'done', 's.failed': 'failed', 's.cancelled': 'cancelled', 's.expired': 'expired', 's.gone': 'gone', 's.sending': 'sending',
    'a.done': 'The result is ready.', 'a.left': '{what}, {t} left.',
    'key.button': 'API key', 'key.title': 'This service asks for a key', 'key.text': 'It is sent to this server only, with every request.', 'key.label': 'API key', 'key.keep': 'Remember in this browser', 'key.ok': 'Continue', 'key.later': 'Not now',
    'clear.title': 'Clear the history?', 'clear.text': 'Finished edits are also deleted on the server. Running ones go on and stay listed.', 'clear.yes': 'Clear', 'clear.no': 'Keep',
    'examples': ['Paint the subject purple', 'Make the background blue', 'Turn the picture black and white', 'Remove the subject'],
  },
  zh: {
    'lang.other': 'English', 'lang.switch': 'Switch to English', 'title': 'qwen-edit：用文字编辑图片',
    'skip': '跳到指令', 'theme.label': '配色：{mode}', 'theme.auto': '跟随系统', 'theme.light': '浅色', 'theme.dark': '深色',
    'svc.connecting': '连接中…', 'svc.ready': '就绪', 'svc.queue': '就绪 · {n} 个排队', 'svc.starting': '正在加载模型…',
    'svc.degraded': '就绪，有工作进程正在重启', 'svc.down': '没有可用的工作进程', 'svc.offline': '无法连接服务器', 'svc.key': '需要密钥',
    'form.label': '编辑', 'pics.title': '图片', 'pics.count': '{n} / {max}', 'pics.drop': '拖入、粘贴或选择图片', 'pics.more': '添加图片',
    'pics.hint': 'PNG、JPEG 或 WebP，最多 {max} 张', 'pics.hint1': 'PNG、JPEG 或 WebP', 'pics.veil': '松开即可添加', 'pic.n': '图 {n}', 'pic.up': '将图 {n} 前移', 'pic.down': '将图 {n} 后移', 'pic.remove': '移除图 {n}',
    'pic.moved': '现在是第 {n} 张，共 {max} 张', 'pic.removed': '已移除图 {n}', 'pic.added': '已添加图 {n}',
    'pics.none': '请至少添加一张图片。', 'pics.toomany': '最多 {max} 张图片，{n} 张未添加。', 'pics.type': '{name} 不是 PNG、JPEG 或 WebP 图片。', 'pics.size': '图片合计超过服务器上限 {max} MB，{name} 未添加。', 'pics.broken': '{name} 无法作为图片打开。',
    'prompt.title': '指令', 'prompt.placeholder': '想改什么？例如：把图片里的主体颜色改成紫色，并保持整体风格一致。', 'prompt.none': '请写下要修改的内容。',
    'prompt.multi': '用编号指代图片，如“Picture 1”“Picture 2”。结果的画面比例取自最后一张。',
    'adv.title': '高级', 'adv.steps': '{n} 步', 'adv.reset': '恢复默认值',
    'steps.title': '步数', 'steps.hint': '步数越多越精细，耗时成比例增加。', 'side.title': '最长边', 'side.hint': '像素上限。留空则用模型自己的尺寸。', 'side.auto': '自动',
    'seed.title': '随机种子', 'seed.random': '随机', 'seed.fixed': '复用', 'seed.number': '种子数值', 'seed.hint': '种子、图片和设置都相同，结果就相同。', 'seed.bad': '请填 0 到 9007199254740991 之间的整数。',
    'cfg.title': 'True CFG 强度', 'cfg.hint': '遵循指令的严格程度。大于 1 时每步耗时翻倍。', 'guid.title': 'Guidance 强度', 'guid.hint': '仅为兼容而保留，此模型不使用。',
    'neg.title': '负面提示', 'neg.placeholder': '默认为一个空格', 'neg.hint': '不希望出现的内容。仅在 True CFG 大于 1 时起作用。', 'num.bad': '不是数字。',
    'lora.title': 'LoRA 模型', 'lora.none': '未选择', 'lora.hint': '附加的风格或能力。', 'f.lora': 'LoRA', 'weight.title': '权重', 'weight.hint': '作用强度，1 为原值。',
    'cache.title': '步骤缓存', 'cache.off': '关闭', 'cache.balanced': '均衡', 'cache.fast': '快速', 'cache.hint': '跳过几乎不改变结果的计算：更快，略有差别（9 步起）。', 'f.cache': '缓存',
    'go': '生成', 'go.sending': '发送中…', 'go.upload': '发送中… {p}%', 'go.wait': '{s} 秒后可重试', 'cancel': '取消', 'cancel.busy': '正在取消…', 'again': '用这些设置再试一次',
    'stage.title': '结果', 'empty.title': '说出想要的改变', 'empty.text': '添加图片，写下指令，点击“生成”。结果会与原图并排显示在这里。', 'empty.examples': '示例', 'empty.sample': '用一张示例图试试',
    'progress.label': '进度', 'p.sending': '正在发送图片', 'p.queued': '排队中', 'p.position': '排队中，第 {n} 位', 'p.next': '下一个就轮到', 'p.started': '开始处理', 'p.step': '第 {k} 步，共 {n} 步', 'p.load': '正在加载模型', 'p.encode': '正在理解图片和指令', 'p.decode': '正在生成画面', 'p.fetch': '正在取回结果', 'p.retry': '已重新开始：{reason}', 'p.lost': '连接中断。任务仍在服务器上进行，正在重新连接…', 'p.left': '剩余 {t}', 'p.leftabout': '约 {t}',
    't.s': '{n} 秒', 't.m': '{n} 分钟', 't.ms': '{m} 分 {s} 秒', 't.h': '{h} 小时 {m} 分',
    'before': '原图', 'after': '结果', 'split.label': '前后对比', 'split.text': '原图占 {p}%', 'compare.with': '对比对象', 'img.after': '结果：{prompt}', 'img.before': '图 {n}，编辑前', 'img.preview': '第 {k} 步后的预览',
    'download': '下载', 'use': '作为输入', 'use.done': '结果已成为图 1。', 'use.seed': '结果已成为图 1。种子已改回随机：用同一种子反复编辑会损害画质。', 'copy': '复制参数', 'copy.done': '已复制', 'copy.fail': '复制失败', 'reuse': '复用设置', 'reuse.done': '指令、图片和设置已放回表单。', 'seed.reuse': '复用种子 {n}', 'seed.reused': '下一次编辑将复用种子 {n}。',
    'f.size': '尺寸', 'f.steps': '步数', 'f.seed': '种子', 'f.cfg': '引导', 'f.cfg.on': 'CFG {n}', 'f.cfg.off': '未启用 CFG', 'f.time': '用时', 'f.model': '模型', 'f.time.parts': '{t}（此前排队 {q}）',
    'fail.failed': '编辑失败', 'fail.cancelled': '已取消', 'fail.cancelled.text': '此次编辑已取消，没有生成结果。', 'fail.expired': '服务器上已不再保留', 'fail.expired.text': '结果只保留一段时间。设置仍在这里。', 'fail.gone': '此服务器上没有该任务', 'err.network': '服务器没有响应。请确认它正在运行，且本机可以访问。', 'err.id': '请求 {id}',
    'hist.title': '本浏览器的历史', 'hist.clear': '清空', 'hist.remove': '移除：{prompt}', 'hist.open': '{status}：{prompt}', 's.queued': '排队中', 's.running': '进行中', 's.completed': '完成', 's.failed': '失败', 's.cancelled': '已取消', 's.expired': '已过期', 's.gone': '已不存在', 's.sending': '发送中',
    'a.done': '结果已生成。', 'a.left': '{what}，剩余 {t}。',
    'key.button': 'API 密钥', 'key.title': '此服务需要密钥', 'key.text': '密钥只随请求发送给本服务器。', 'key.label': 'API 密钥', 'key.keep': '在本浏览器中记住', 'key.ok': '继续', 'key.later': '暂不',
    'clear.title': '清空历史？', 'clear.text': '已结束的任务也会从服务器删除。进行中的任务会继续并保留在列表中。', 'clear.yes': '清空', 'clear.no': '保留',
    'examples': ['把图片里的主体颜色改成紫色', '把背景改成蓝色', '把图片变成黑白', '移除主体'],
  },
};

let current = 'en';

export const language = () => current;

export function t(key, values) {
  const text = texts[current][key] ?? texts.en[key] ?? key;
  return values ? text.replace(/\{(\w+)\}/g, (all, name) => (name in values ? values[name] : all)) : text;
}

/** The language that was chosen here before, else the first of the browser's that is one of ours. */
export function startLanguage(chosen) {
  if (chosen in texts) return chosen;
  for (const tag of navigator.languages ?? [navigator.language ?? 'en']) {
    if (/^zh/i.test(tag)) return 'zh';
    if (/^en/i.test(tag)) return 'en';
  }
  return 'en';
}

/** Put the texts of `name` on everything that carries data-i18n, data-i18n-label or data-i18n-placeholder. */
export function setLanguage(name) {
  current = name;
  document.documentElement.lang = name === 'zh' ? 'zh-CN' : 'en';
  for (const e of document.querySelectorAll('[data-i18n]')) e.textContent = t(e.dataset.i18n);
  for (const e of document.querySelectorAll('[data-i18n-label]')) e.setAttribute('aria-label', t(e.dataset.i18nLabel));
  for (const e of document.querySelectorAll('[data-i18n-placeholder]')) e.placeholder = t(e.dataset.i18nPlaceholder);
}

/** Seconds in words: "8 s", "2 min 5 s", "1 h 20 min". */
export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 10 && s !== Math.round(s)) return t('t.s', { n: s.toFixed(1) });
  const whole = Math.round(s);
  if (whole < 60) return t('t.s', { n: whole });
  if (whole < 600) return whole % 60 ? t('t.ms', { m: Math.floor(whole / 60), s: whole % 60 }) : t('t.m', { n: whole / 60 });
  if (whole < 3600) return t('t.m', { n: Math.round(whole / 60) });
  return t('t.h', { h: Math.floor(whole / 3600), m: Math.round((whole % 3600) / 60) });
}
