"""Trains the embedded demo model from scratch: a Qwen-Image-Edit-2511 in miniature.

  python train_demo.py OUT_DIR [--minutes 60] [--threads 2] [--seed 0]

Same parts, layer types, names and folder layout as the released model (Qwen2.5-VL text encoder, double-stream DiT
with zero_cond_t, Qwen-Image VAE, flow-matching Euler scheduler); every dimension is small. The pictures, the
instructions and the edited pictures are synthesised here; the only photographs are those inside scikit-image.
Stages, each kept in OUT_DIR/work; a finished one is skipped and the DiT goes on where an interrupted run last saved:
  vae   vae_init.pt (closed-form encoder), then vae.pt: the decoder, trained on single frames (the earlier temporal
        taps of the causal convolutions stay zero: one frame never reads them)
  dit   latents.pt: scenes painted in several colours; any two paintings of a scene make a training pair;
        then dit.pt: DiT and text encoder jointly, flow matching (dit_part.pt while it runs)
  pack  OUT_DIR/model in bfloat16, from the newest of these files
  eval  diffusers' own pipeline on new pictures: OUT_DIR/sheet.png (input, output, exact target) and scores.json
Needs: torch torchvision diffusers transformers scikit-image pillow (PyPI). No downloads.
"""
import argparse, copy, json, math, pathlib, time
import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageDraw
from diffusers import (AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline,
                       QwenImageTransformer2DModel)
import diffusers.models.autoencoders.autoencoder_kl_qwenimage as qvae
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus
from tokenizers import Tokenizer, models, pre_tokenizers, trainers, decoders, normalizers, Regex
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor)
from transformers import Qwen2VLImageProcessorPil as Qwen2VLImageProcessor, Qwen2VLVideoProcessor

VAE_DIM, Z = 12, 16
DIT = dict(num_layers=6, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 12, 12))
TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rope_scaling=dict(mrope_section=[4, 6, 6], rope_type="default", type="default"))
VISION = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=128,
              fullatt_block_indexes=[1], window_size=112, tokens_per_second=2)
DROP = 64           # the pipeline drops the first 64 tokens: the fixed system prompt must take exactly that many
T0 = time.time()


def log(*a):
    print(f"[{(time.time() - T0) / 60:6.2f} min]", *a, flush=True)


# ----------------------------------------------------------------------------- pictures
COLORS = {  # name: (rgb, English names, Chinese names)
    "red": ((214, 40, 40), ["red"], ["红色"]),
    "orange": ((240, 130, 20), ["orange"], ["橙色"]),
    "yellow": ((244, 208, 30), ["yellow"], ["黄色"]),
    "green": ((46, 158, 62), ["green"], ["绿色"]),
    "cyan": ((32, 190, 200), ["cyan", "teal"], ["青色"]),
    "blue": ((40, 84, 214), ["blue"], ["蓝色"]),
    "purple": ((134, 48, 178), ["purple", "violet"], ["紫色"]),
    "pink": ((246, 120, 176), ["pink"], ["粉色", "粉红色"]),
    "black": ((34, 34, 38), ["black"], ["黑色"]),
    "white": ((240, 240, 240), ["white"], ["白色"]),
}
NAMES = list(COLORS)
SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形", "star": "星星", "heart": "爱心", "ring": "圆环",
          "mug": "杯子", "leaf": "叶子", "hexagon": "六边形", "drop": "水滴", "moon": "月亮", "cross": "十字",
          "blob": "物体", "polygon": "图形", "flower": "花", "ellipse": "椭圆", "box": "盒子", "bottle": "瓶子",
          "house": "房子", "arrow": "箭头"}


def rgb(name):
    return np.array(COLORS[name][0], np.float32) / 255


def shape_field(kind, x, y, rng):
    """Implicit function, negative inside; x right, y down, the shape fits about [-1, 1]."""
    r, a = np.hypot(x, y), np.arctan2(x, -y)

    def box(cx, cy, hx, hy, k=0.0):
        return np.maximum(np.abs(x - cx) - hx, np.abs(y - cy) - hy) + k * np.minimum(np.abs(x - cx), np.abs(y - cy))

    def polygon(n, k=1.0):
        s = 2 * np.pi / n
        return r * np.cos(np.mod(a + s / 2, s) - s / 2) - k * np.cos(np.pi / n)
    if kind == "circle":
        return r - 0.9
    if kind == "square":
        q = np.maximum(np.abs(x), np.abs(y)) - 0.78
        return q + 0.15 * np.maximum(0, np.minimum(np.abs(x), np.abs(y)) - 0.6)
    if kind == "triangle":
        return polygon(3, 1.0)
    if kind == "hexagon":
        return polygon(6, 0.95)
    if kind == "star":
        s = 2 * np.pi / 5
        b = np.abs(np.mod(a + s / 2, s) - s / 2)
        p, q = 1.0, 0.45
        bx, by = r * np.cos(b), r * np.sin(b)
        tx, ty = q * np.cos(s / 2), q * np.sin(s / 2)
        nx, ny = ty, p - tx
        return ((bx - p) * nx + by * ny) / np.hypot(nx, ny)
    if kind == "heart":
        X, Y = np.abs(x) * 1.15, -y * 1.15 + 0.15
        return (X * X + (Y - 0.75 * np.sqrt(X)) ** 2 - 0.85) * 0.5
    if kind == "ring":
        return np.abs(r - 0.66) - 0.26
    if kind == "mug":
        body = np.maximum(np.abs(x + 0.2) - 0.55, np.abs(y) - 0.75)
        hand = np.maximum(np.abs(np.hypot((x - 0.38) * 1.1, y) - 0.4) - 0.12, 0.35 - x)
        return np.minimum(body, hand)
    if kind == "leaf":
        return np.maximum(np.hypot(x - 0.55, y) - 1.1, np.hypot(x + 0.55, y) - 1.1)
    if kind == "drop":
        k = np.clip((0.25 - y) / 1.25, 0, 1)
        return np.where(y > 0.25, np.hypot(x, y - 0.25) - 0.65, (np.abs(x) - 0.65 * (1 - k ** 1.3)) * 0.8)
    if kind == "moon":
        return np.maximum(r - 0.9, 0.72 - np.hypot(x - 0.5, y + 0.15))
    if kind == "cross":
        return np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.3, np.maximum(np.abs(x), np.abs(y)) - 0.9)
    if kind == "blob":                                # a random closed curve
        k = np.arange(2, 7)
        amp, ph = rng.normal(0, 0.26, 5) / k ** 0.9, rng.uniform(0, 2 * np.pi, 5)
        return r - 0.72 * np.exp(sum(A * np.cos(n * a + p) for A, n, p in zip(amp, k, ph)))
    if kind == "polygon":                             # a random convex polygon
        n = int(rng.integers(3, 8))
        t = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
        return np.max([x * np.cos(q) + y * np.sin(q) - rng.uniform(0.5, 0.75) for q in t], axis=0)
    if kind == "flower":
        return r - (0.68 + rng.uniform(0.12, 0.25) * np.cos(int(rng.integers(4, 8)) * a))
    if kind == "ellipse":
        return np.hypot(x / rng.uniform(0.5, 0.75), y) - 0.9
    if kind == "box":
        hx, hy, c = rng.uniform(0.45, 0.85), rng.uniform(0.45, 0.85), rng.uniform(0.02, 0.4)
        qx, qy = np.abs(x) - hx + c, np.abs(y) - hy + c
        return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - c
    if kind == "bottle":
        n = rng.uniform(0.15, 0.25)
        return np.minimum(np.minimum(box(0, 0.3, 0.45, 0.6), box(0, -0.5, n, 0.42)), np.hypot(x, y + 0.25) - 0.44)
    if kind == "house":
        return np.minimum(box(0, 0.35, 0.62, 0.5), np.maximum((np.abs(x) * 0.8 + y + 0.85 - 0.08) * 0.75 - 0.08, y + 0.1))
    if kind == "arrow":
        return np.minimum(box(-0.3, 0, 0.55, 0.24), np.maximum((x - 0.9 + np.abs(y) * 1.1) * 0.7, -x + 0.1))
    raise ValueError(kind)


def soft(rng, h, w, cells):
    """Smooth random field in [0, 1]."""
    g = torch.from_numpy(rng.random((1, 1, max(2, cells * h // w + 1), cells + 1), dtype=np.float32))
    return F.interpolate(g, (h, w), mode="bicubic", align_corners=True)[0, 0].clamp(0, 1).numpy()


class Photos:
    """Crops of the real photographs that scikit-image carries inside its package."""
    FILES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png",
             "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "brick.png", "grass.png", "gravel.png", "camera.png",
             "coins.png", "color.png", "moon.png")

    def __init__(self):
        import skimage
        base = pathlib.Path(skimage.__file__).parent / "data"
        self.pics = []
        for f in self.FILES:
            if (base / f).exists():
                im = Image.open(base / f).convert("RGB")
                im.thumbnail((768, 768))
                self.pics.append(im)

    def crop(self, rng, h, w):
        im = self.pics[rng.integers(len(self.pics))]
        top = min(im.width / w, im.height / h)
        s = float(np.exp(rng.uniform(np.log(min(1.0, top * 0.5)), np.log(top))))
        cw, ch = w * s, h * s
        x, y = rng.uniform(0, max(1e-6, im.width - cw)), rng.uniform(0, max(1e-6, im.height - ch))
        out = im.resize((w, h), Image.BILINEAR, box=(x, y, x + cw, y + ch))
        a = np.asarray(out, np.float32) / 255
        return a[:, ::-1] if rng.random() < 0.5 else a


class Scene:
    """One arrangement of a background and one or two subjects; compose() paints it in any colours, exactly."""

    def __init__(self, rng, h, w, photos=None, two_tone=0.08):
        self.h, self.w = h, w
        yy, xx = np.mgrid[0:h, 0:w].astype(np.float32) + 0.5
        kind = rng.choice(["flat", "gradient", "stripes", "noise", "checker", "photo", "table", "dots", "vignette"],
                          p=[.2, .22, .1, .15, .05, .12, .08, .04, .04])
        self.photo, mod = None, np.ones((h, w), np.float32)
        th = rng.uniform(0, 2 * np.pi)
        u = ((xx - w / 2) * np.cos(th) + (yy - h / 2) * np.sin(th)) / max(h, w)
        if kind == "gradient":
            mod = 0.95 + rng.uniform(0.15, 0.5) * u
        elif kind == "stripes":
            p = rng.uniform(0.12, 0.4)
            mod = 1 - rng.uniform(0.12, 0.3) * np.clip(0.5 + np.sin(u / p * 2 * np.pi) * max(h, w) * p / 6, 0, 1)
        elif kind == "noise":
            mod = 0.75 + 0.35 * soft(rng, h, w, int(rng.integers(3, 9)))
        elif kind == "checker":
            p = rng.uniform(0.12, 0.3) * max(h, w)
            c = np.sin(xx / p * np.pi) * np.sin(yy / p * np.pi)
            mod = 1 - 0.22 * np.clip(0.5 + c * p / 3, 0, 1)
        elif kind == "table":                         # a wall and a table, darker or lighter
            edge = h * rng.uniform(0.5, 0.85)
            mod = 0.97 + 0.1 * u - rng.uniform(-0.1, 0.3) * np.clip(yy - edge, 0, 1)
        elif kind == "dots":
            p = rng.uniform(0.12, 0.25) * max(h, w)
            d = np.hypot(np.mod(xx, p) - p / 2, np.mod(yy, p) - p / 2) - p * rng.uniform(0.15, 0.35)
            mod = 1 - 0.22 * np.clip(0.5 - d, 0, 1)
        elif kind == "vignette":
            mod = 1.02 - rng.uniform(0.15, 0.4) * (((xx - w / 2) / w) ** 2 + ((yy - h / 2) / h) ** 2) * 2
        elif kind == "photo" and photos is not None:
            self.photo = photos.crop(rng, h, w)
            lum = self.photo @ np.array([.299, .587, .114], np.float32)
            mod = 0.35 + 0.75 * lum
        self.mod = mod.astype(np.float32)
        self.part = None                              # where a second background colour is: a table, a side, a corner
        if kind == "table":
            self.part = np.clip(yy - edge, 0, 1)
        elif self.photo is None and rng.random() < two_tone:
            self.part = np.clip(0.5 + (u - rng.uniform(-0.3, 0.3)) * max(h, w), 0, 1)
        self.kind = str(rng.choice(list(SHAPES)))
        size = rng.uniform(0.27, 0.47) * min(h, w)
        cx, cy = w / 2 + rng.uniform(-.5, .5) * (w - 2.1 * size), h / 2 + rng.uniform(-.5, .5) * (h - 2.1 * size)
        self.mask, self.shade, self.spec = self.subject(rng, self.kind, xx, yy, cx, cy, size)
        self.other = None
        if rng.random() < 0.25:                       # a second, clearly smaller subject that edits leave alone
            s2 = size * rng.uniform(0.3, 0.42)
            for _ in range(8):
                x2, y2 = rng.uniform(s2, w - s2), rng.uniform(s2, h - s2)
                if np.hypot(x2 - cx, y2 - cy) > (size + s2) * 1.05:
                    self.other = self.subject(rng, str(rng.choice(list(SHAPES))), xx, yy, x2, y2, s2)
                    self.other_rgb = any_color(rng)
                    break
        self.shadow = None
        if rng.random() < 0.4:
            d = max(1, int(size * 0.12))
            m = torch.from_numpy(np.pad(self.mask, ((d, 0), (d, 0)))[:h, :w].copy())[None, None]
            k = 2 * max(1, d // 2) + 1
            for _ in range(2):
                m = F.avg_pool2d(m, k, 1, k // 2, count_include_pad=True)
            self.shadow = 1 - 0.35 * m[0, 0].numpy()

    @staticmethod
    def subject(rng, kind, xx, yy, cx, cy, size):
        t = rng.normal(0, 0.22)
        x, y = (xx - cx) / size, (yy - cy) / size
        x, y = x * np.cos(t) + y * np.sin(t), -x * np.sin(t) + y * np.cos(t)
        if rng.random() < 0.5:
            x = -x
        f = shape_field(kind, x, y, rng)
        gy, gx = np.gradient(f)
        mask = np.clip(0.5 - f / np.maximum(np.hypot(gx, gy), 0.5 / size), 0, 1).astype(np.float32)
        style = rng.integers(4)
        shade, spec = np.ones_like(mask), np.zeros_like(mask)
        if style == 1:                                # lit from one side
            a = rng.uniform(0, 2 * np.pi)
            shade = 0.9 + 0.22 * (x * np.cos(a) + y * np.sin(a))
        elif style == 2:                              # ball-like, with a highlight
            shade = 1.08 - 0.38 * np.clip((x + .25) ** 2 + (y + .3) ** 2, 0, 1.5)
            spec = 0.45 * np.exp(-((x + .32) ** 2 + (y + .38) ** 2) / 0.035)
        elif style == 3:                              # an outline, or bands
            if rng.random() < 0.5:
                shade = 1 - rng.uniform(0.2, 0.7) * np.clip(0.5 + (f + rng.uniform(0.06, 0.14)) * size, 0, 1)
            else:
                shade = 1 - rng.uniform(0.1, 0.3) * np.clip(0.5 + np.sin(y * rng.uniform(5, 12)) * size / 6, 0, 1)
            shade = shade + rng.uniform(-0.1, 0.1) * x
        return mask, shade.astype(np.float32), spec.astype(np.float32)

    def compose(self, subject, background, with_subject=True):
        """subject: rgb; background: rgb or two of them, or None for the photograph in its own colours."""
        if isinstance(background, tuple):
            one, other = background
            img = self.mod[..., None] * (one + self.part[..., None] * (other - one))
        else:
            img = self.photo if background is None else self.mod[..., None] * background
        img = np.clip(img, 0, 1)
        if self.other is not None:
            m, s, p = self.other
            img = img + m[..., None] * (np.clip(s[..., None] * self.other_rgb + p[..., None], 0, 1) - img)
        if with_subject:
            if self.shadow is not None:
                img = img * self.shadow[..., None]
            col = np.clip(self.shade[..., None] * subject + self.spec[..., None], 0, 1)
            img = img + self.mask[..., None] * (col - img)
        return img.astype(np.float32)


def any_color(rng):
    """A named colour (slightly off), or any colour at all."""
    if rng.random() < 0.6:
        return np.clip(rgb(NAMES[rng.integers(len(NAMES))]) + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)
    return rng.uniform(0.05, 0.98, 3).astype(np.float32)


def far_color(rng, c, low=0.35):
    while True:
        d = any_color(rng)
        if np.abs(d - c).sum() > low:
            return d


def gray(img):
    return np.repeat((img @ np.array([.299, .587, .114], np.float32))[..., None], 3, -1)


# ----------------------------------------------------------------------------- instructions
EN_SUBJECT = ["the main subject", "the subject", "the main object", "the object", "the {s}"]
ZH_SUBJECT = ["图片里的主体", "主体", "图中的主体", "主要物体", "{z}"]
EN = {
    "subject": ["Change the main subject's color to {c} and keep the overall style consistent.",
                "Change the color of {o} to {c}.", "Make {o} {c}.", "Turn {o} {c}.", "Recolor {o} to {c}.",
                "Paint {o} {c} and keep everything else unchanged.", "Change {o} to {c}, keep the background.",
                "Change the colour of {o} to {c}.", "Give {o} a {c} color.", "I want {o} to be {c}."],
    "background": ["Change the background to {c}.", "Make the background {c}.", "Turn the background {c}.",
                   "Change the background color to {c} and keep the subject unchanged.", "Replace the background with {c}.",
                   "Change the colour of the background to {c}.", "Paint the background {c}."],
    "gray": ["Make it grayscale.", "Convert the image to black and white.", "Turn the picture into a grayscale photo.",
             "Remove all colors from the image.", "Make the picture grey."],
    "invert": ["Invert the colors.", "Invert all colors of the image.", "Make it a negative image.", "Invert the picture."],
    "remove": ["Remove {o}.", "Delete {o} from the picture.", "Erase {o} and keep the background."],
    "keep": ["Keep the picture as it is.", "Keep the image unchanged.", "Do not change anything.", "Leave the picture as it is."],
    "two": ["Give Picture 1's subject the colour of Picture 2.", "Make the subject of Picture 1 the color of Picture 2.",
            "Change the color of the subject in Picture 1 to the color of Picture 2."],
}
ZH = {
    "subject": ["把图片里的主体颜色改成{c}，并保持整体风格一致。", "把{o}的颜色改成{c}。", "将{o}变成{c}。", "把{o}改成{c}。",
                "请把{o}涂成{c}，其他保持不变。", "将{o}的颜色换成{c}，保持背景不变。", "把{o}变成{c}的。", "{o}换成{c}。"],
    "background": ["把背景改成{c}。", "将背景颜色改成{c}。", "把背景换成{c}，主体保持不变。", "请将背景变成{c}。", "把背景涂成{c}。"],
    "gray": ["把图片变成黑白。", "将图片转换为灰度图。", "把图片改成黑白照片。", "去掉图片的颜色。"],
    "invert": ["反转图片的颜色。", "将图片反色。", "把图片变成负片。"],
    "remove": ["移除{o}。", "删除{o}。", "去掉{o}，保留背景。"],
    "keep": ["保持图片不变。", "不要改变图片。", "图片保持原样。"],
    "two": ["把图1主体的颜色改成图2的颜色。", "将图1中主体的颜色换成图2的颜色。", "让图1的主体变成图2的颜色。"],
}


def instruction(rng, op, color=None, shape="circle", loose=True):
    zh = rng.random() < 0.5
    bank = (ZH if zh else EN)[op]
    text = bank[0 if rng.random() < 0.25 else rng.integers(len(bank))]
    who = (ZH_SUBJECT if zh else EN_SUBJECT)[rng.integers(5)].format(s=shape, z=SHAPES[shape])
    name = ""
    if color is not None:
        names = COLORS[color][2 if zh else 1]
        name = names[rng.integers(len(names))]
    text = text.format(c=name, o=who)
    if loose and rng.random() < 0.3:                  # as people type: without the full stop, in lower case, with "please"
        k = rng.integers(3)
        if zh:
            text = (text.rstrip("。"), text if text[0] == "请" else "请" + text, text.replace("，", ","))[k]
        else:
            text = (text.rstrip("."), text[0].lower() + text[1:], "Please " + text[0].lower() + text[1:])[k]
    return text


def corpus():
    """Every phrasing, for the tokenizer."""
    out = []
    for bank, col, subj in ((EN, 1, EN_SUBJECT), (ZH, 2, ZH_SUBJECT)):
        who = [s.format(s=k, z=v) for s in subj for k, v in SHAPES.items()]
        for op in bank:
            for t in bank[op]:
                for c in COLORS.values():
                    for n in c[col]:
                        out += [t.format(c=n, o=w) for w in who]
    return sorted(set(out))


# ----------------------------------------------------------------------------- model folder
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
            "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
            "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SYSTEM = ("Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
          "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
          "requirements while maintaining consistency with the original input where appropriate.")
PREFIX = "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n<|im_start|>user\n"
PICTURE = "Picture {}: <|vision_start|>{}<|vision_end|>"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


def tokenizer(path, init=None, vocab=1000):
    """A small byte-level BPE with the released tokenizer's normaliser, splitting and special tokens."""
    if init:                                          # the embeddings of an earlier model go with its vocabulary
        path.mkdir(parents=True, exist_ok=True)
        for f in ("vocab.json", "merges.txt"):
            (path / f).write_bytes((init / "tokenizer" / f).read_bytes())
    else:
        train_tokenizer(path, vocab)
    t = Qwen2Tokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"))
    t.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    return t


def train_tokenizer(path, vocab):
    tk = Tokenizer(models.BPE())
    tk.normalizer = normalizers.NFC()
    tk.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tk.decoder = decoders.ByteLevel()
    # the system prompt comes first in frequency, so that each of its words becomes one token, as in the released one
    text = corpus()
    texts = [SYSTEM] * (len(text) * 4) + ["system", "user", "assistant", "system\n", "Picture 1: Picture 2: Picture 3: "] * len(text) + text
    tk.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        max_token_length=18))
    path.mkdir(parents=True, exist_ok=True)
    model = json.loads(tk.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def new_vae():
    return AutoencoderKLQwenImage(base_dim=VAE_DIM, z_dim=Z, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                  temperal_downsample=[False, True, True], dropout=0.0,
                                  latents_mean=[0.0] * Z, latents_std=[1.0] * Z)


def new_dit():
    dit = QwenImageTransformer2DModel(patch_size=2, in_channels=4 * Z, out_channels=Z, guidance_embeds=False,
                                      joint_attention_dim=TEXT["hidden_size"], zero_cond_t=True, **DIT)
    d = dit.inner_dim
    for b in dit.transformer_blocks:                  # the modulation starts constant, its gates half open
        for m in (b.img_mod[1], b.txt_mod[1]):
            nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)
            m.bias.data[2 * d:3 * d] = 0.5
            m.bias.data[5 * d:] = 0.5
    for m in (dit.norm_out.linear, dit.proj_out):
        nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)
    # Two heads of each early block start out looking at the reference token of the same place (frame + 1, same row,
    # same column): constant queries and keys in the fastest rotary pairs. From there training is much quicker.
    hd, (af, ah, _) = DIT["attention_head_dim"], DIT["axes_dims_rope"]
    pairs = [0, af, af + 2, af + ah, af + ah + 2]
    for b in dit.transformer_blocks[:3]:
        at = b.attn
        for n in (at.norm_q, at.norm_k):
            for p in pairs:
                n.weight.data[p:p + 2] = 2.0
        for head in (0, 1):
            s = slice(head * hd, (head + 1) * hd)
            for lin, angle in ((at.to_q, 1.0), (at.to_k, 0.0)):
                lin.weight.data[s] *= 0.2
                lin.bias.data[s] = 0
                for p in pairs:
                    lin.bias.data[head * hd + p] = 1.0
                lin.bias.data[head * hd] = math.cos(angle)
                lin.bias.data[head * hd + 1] = math.sin(angle)
    return dit


def new_text_encoder(tok):
    ids = {s: tok.convert_tokens_to_ids(s) for s in SPECIALS}
    vocab = (max(ids.values()) + 8) // 8 * 8
    te = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=vocab, max_position_embeddings=128000, rope_theta=1e6, rms_norm_eps=1e-6,
                         use_sliding_window=False, tie_word_embeddings=False,
                         bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], **TEXT),
        vision_config=dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
                           hidden_act="silu", **VISION),
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"]))
    with torch.no_grad():
        # The picture reaches the DiT through its latents; the vision tower adds a small picture-dependent part to a
        # trained constant (its last bias), so that training may leave the tower out.
        out = te.model.visual.merger.mlp[2]
        nn.init.normal_(out.bias, std=0.05)
        out.weight.mul_(0.02 / out.weight.std() * 0.25)
        te.lm_head.weight.zero_()                     # never used for editing
        te.model.language_model.embed_tokens.weight.normal_(std=0.05)
    return te


def scheduler():
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=True,
                                           base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
                                           shift_terminal=0.02, time_shift_type="exponential", invert_sigmas=False,
                                           use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False,
                                           stochastic_sampling=False)


def assemble(tok, vae, dit, te):
    proc = Qwen2VLProcessor(Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056, patch_size=14, merge_size=2,
                                                  temporal_patch_size=2, image_mean=[0.48145466, 0.4578275, 0.40821073],
                                                  image_std=[0.26862954, 0.26130258, 0.27577711]), tok, Qwen2VLVideoProcessor())
    return QwenImageEditPlusPipeline(scheduler=scheduler(), vae=vae, text_encoder=te, tokenizer=tok, processor=proc, transformer=dit)


def save(out, tok_dir, tok, vae, dit, te, dtype=torch.bfloat16):
    pipe = assemble(tok, copy.deepcopy(vae), copy.deepcopy(dit), copy.deepcopy(te)).to(dtype)
    pipe.save_pretrained(out, max_shard_size="4GB")
    for part in ("tokenizer", "processor"):
        for f in ("vocab.json", "merges.txt"):
            (out / part / f).write_bytes((tok_dir / f).read_bytes())


# ----------------------------------------------------------------------------- VAE
def one_frame(on):
    """Single frames only touch the last temporal tap of a causal convolution: train with 2-D convolutions."""
    if not hasattr(one_frame, "keep"):
        one_frame.keep = qvae.QwenImageCausalConv3d.forward

    def conv2d(self, x, cache_x=None):
        p = self._padding
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (p[2], p[0])).unsqueeze(2)
    qvae.QwenImageCausalConv3d.forward = conv2d if on else one_frame.keep


def vae_encode(vae, x):
    """Moments of the posterior, without the pipeline's chunking over time."""
    return vae.quant_conv(vae.encoder(x[:, :, None]))[:, :, 0].chunk(2, 1)


def vae_decode(vae, z):
    return vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]


def psnr(a, b):
    return float((10 * torch.log10(4 / ((a.clamp(-1, 1) - b) ** 2).flatten(1).mean(1).clamp_min(1e-9))).mean())


def to_tensor(imgs):
    return torch.from_numpy(np.stack(imgs)).permute(0, 3, 1, 2).float().mul(2).sub(1).contiguous()


def vae_pool(rng, photos, n, side):
    pool = []
    while len(pool) < n:
        if rng.random() < 0.25:
            im = photos.crop(rng, side, side)
            pool.append(1 - im if rng.random() < 0.15 else gray(im) if rng.random() < 0.1 else im.copy())
            continue
        s = Scene(rng, side, side, photos)
        for k in range(2):
            im = s.compose(any_color(rng), None if s.photo is not None and k else any_color(rng), rng.random() < 0.92)
            r = rng.random()
            pool.append(1 - im if r < 0.1 else gray(im) if r < 0.18 else im)
    return torch.from_numpy((np.stack(pool) * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def patches(x):
    """[B, C, H, W] to 2x2 blocks as channels, in the order (dy, dx, channel)."""
    B, C, H, W = x.shape
    return x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(B, 4 * C, H // 2, W // 2)


def principal(x, k):
    """Mean, top-k principal directions (rows) and their deviations, of the channels of x."""
    f = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double()
    m = f.mean(0)
    val, vec = torch.linalg.eigh((f - m).T @ (f - m) / len(f))
    return m.float(), vec.T.flip(0)[:k].float().contiguous(), val.flip(0)[:k].clamp_min(1e-12).sqrt().float()


OFFSET = 3.0        # keeps the last RMS norm and SiLU of each half in their nearly linear range


@torch.no_grad()
def init_vae(vae, x):
    """Closed-form encoder: its residual branches start at zero and its strided convolutions are Haar-like principal
    components of the data x, so that the latents are the 16 strongest components of each 8x8 block, whitened:
    colour edits are then nearly linear in latent space. The decoder starts as a smooth upsampling of block colours."""
    for m in vae.modules():
        if isinstance(m, qvae.QwenImageResidualBlock):
            m.conv1.weight[:, :, :2] = 0
            m.conv1.weight[:, :, 2].mul_(1.7)
            m.conv1.bias.zero_()
            m.conv2.weight.zero_(), m.conv2.bias.zero_()
        if isinstance(m, qvae.QwenImageAttentionBlock):
            m.proj.weight.zero_(), m.proj.bias.zero_()
        if hasattr(m, "time_conv"):
            m.time_conv.weight.zero_(), m.time_conv.bias.zero_()
        if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3):
            m.weight[:, :, :2] = 0
    enc, C = vae.encoder, VAE_DIM
    enc.conv_in.weight.zero_(), enc.conv_in.bias.zero_()
    for c in range(3):
        enc.conv_in.weight[c, c, 2, 1, 1] = 1
    down = [m.resample[1] for m in enc.down_blocks if isinstance(m, qvae.QwenImageResample)]
    for m in enc.down_blocks:
        if isinstance(m, qvae.QwenImageResidualBlock) and isinstance(m.conv_shortcut, nn.Conv3d):
            w = m.conv_shortcut.weight
            w.zero_(), m.conv_shortcut.bias.zero_()
            for i in range(w.shape[1]):
                w[i, i] = 1
    f, used = x, 3
    for k, conv in enumerate(down):
        f = patches(f)
        if k == 0:
            m, P = torch.zeros(12), torch.eye(12)
        else:
            m, P, s = principal(f, Z if k == 2 else conv.weight.shape[0])
            if k == 2:
                P = P / s[:, None]
        conv.weight.zero_(), conv.bias.zero_()
        n = len(P)
        conv.weight[:n, :used, :2, :2] = P.view(n, 2, 2, used).permute(0, 3, 1, 2)
        conv.bias[:n] = -P @ m
        f, used = torch.einsum("oc,bchw->bohw", P, f - m[None, :, None, None]), n
    enc.mid_block.resnets[1].conv2.bias.fill_(OFFSET)
    one = F.silu(torch.ones(()))
    enc.conv_out.weight.zero_(), enc.conv_out.bias.zero_()
    for i in range(Z):
        enc.conv_out.weight[i, i, 2, 1, 1] = OFFSET / 0.93
        enc.conv_out.bias[i] = -one * OFFSET / 0.93
    enc.conv_out.bias[Z:] = -8
    for q, n in ((vae.quant_conv, 2 * Z), (vae.post_quant_conv, Z)):
        q.weight.zero_(), q.bias.zero_()
        q.weight[torch.arange(n), torch.arange(n)] = 1
    # decoder
    dec, z = vae.decoder, encode(vae, x)
    a = torch.cat([z.permute(0, 2, 3, 1).reshape(-1, Z), torch.ones(z[:, 0].numel(), 1)], 1)
    sol = torch.linalg.lstsq(a, F.avg_pool2d(x, 8).permute(0, 2, 3, 1).reshape(-1, 3)).solution
    dec.conv_in.weight.mul_(0.5)
    dec.conv_in.weight[:3] = 0
    dec.conv_in.weight[:3, :, 2, 1, 1], dec.conv_in.bias[:3] = sol[:Z].T, sol[Z]
    blur = torch.tensor([1., 2., 1.])
    blur = blur[:, None] * blur / 16
    for ub in dec.up_blocks:
        sc = ub.resnets[0].conv_shortcut
        if isinstance(sc, nn.Conv3d):
            sc.weight[:3], sc.bias[:3] = 0, 0
            for c in range(3):
                sc.weight[c, c] = 1
        if ub.upsamplers is not None:
            conv = ub.upsamplers[0].resample[1]
            conv.weight[:3], conv.bias[:3] = 0, 0
            for c in range(3):
                conv.weight[c, c] = blur
    dec.up_blocks[-1].resnets[-1].conv2.bias.fill_(OFFSET)
    dec.conv_out.weight.mul_(0.1)
    for c in range(3):
        dec.conv_out.weight[c, c, 2, 1, 1] = OFFSET / 0.93
        dec.conv_out.bias[c] = -one * OFFSET / 0.93


@torch.no_grad()
def encode(vae, x):
    """What the encoder computes while its residual branches are zero, without the work of computing them."""
    down = [m.resample[1] for m in vae.encoder.down_blocks if isinstance(m, qvae.QwenImageResample)]
    f, used = x, 3
    for k, c in enumerate(down):
        n = (12, 2 * VAE_DIM, Z)[k]
        f = F.conv2d(f, c.weight[:n, :used, :2, :2], c.bias[:n], stride=2)
        used = n
    C = vae.encoder.conv_out.weight.shape[1]
    h = f + OFFSET
    rms = (((h * h).sum(1, keepdim=True) + (C - Z) * OFFSET ** 2) / C).sqrt()
    w = vae.encoder.conv_out
    return F.silu(h / rms) * w.weight[0, 0, 2, 1, 1] + w.bias[0]


class Muon:
    """Momentum orthogonalised by Newton-Schulz steps, for the matrices; equal shapes go through together."""

    def __init__(self, params, lr, wd=0.0, beta=0.95):
        self.groups, self.lr, self.wd, self.beta = {}, lr, wd, beta
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.buf = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    def direction(self, s, g):
        m = self.buf[s]
        m.lerp_(g, 1 - self.beta)
        u = g.lerp(m, self.beta).bfloat16()
        u = u.mT if s[0] > s[1] else u
        u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            A = u @ u.mT
            u = 3.4445 * u + (-4.7750 * A + 2.0315 * A @ A) @ u
        return (u.mT if s[0] > s[1] else u).float() * (0.2 * math.sqrt(max(s)))

    @torch.no_grad()
    def step(self):
        for s, ps in self.groups.items():
            d = self.direction(s, torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in ps]))
            for p, u in zip(ps, d):
                p.mul_(1 - self.lr * self.wd).sub_(u, alpha=self.lr)


class ConvMuon(Muon):
    """Muon for convolutions (the last temporal tap only, seen as a matrix)."""

    def __init__(self, params, lr, beta=0.9):
        self.groups, self.lr, self.wd, self.beta = {}, lr, 0.0, beta
        for p in params:
            n = p[:, :, -1].numel() if p.ndim == 5 else p.numel()
            self.groups.setdefault((p.shape[0], n // p.shape[0]), []).append(p)
        self.buf = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self):
        last = lambda p, t: t[:, :, -1] if p.ndim == 5 else t
        for s, ps in self.groups.items():
            d = self.direction(s, torch.stack([last(p, p.grad).reshape(s) for p in ps]))
            for p, u in zip(ps, d):
                last(p, p).sub_(u.view(last(p, p).shape), alpha=self.lr)


def initial_vae(a, work, photos):
    """The VAE with its final encoder and an untrained decoder, in values that bfloat16 holds."""
    vae, f = new_vae(), work / "vae_init.pt"
    if f.exists():
        vae.load_state_dict(torch.load(f))
        return vae
    torch.manual_seed(a.seed + 1)
    init_vae(vae, vae_pool(np.random.default_rng(a.seed + 1), photos, 600, 96).float() / 127.5 - 1)
    vae.load_state_dict({k: v.bfloat16().float() for k, v in vae.state_dict().items()})
    torch.save(vae.state_dict(), f)
    return vae


def progress(t0, step, minutes, steps):
    """How much of a stage is done: by steps where a number was given (then a run repeats exactly), else by the clock."""
    return step / steps if steps else (time.time() - t0) / (minutes * 60)


def train_vae(a, work, vae, photos):
    t0 = time.time()
    pool = vae_pool(np.random.default_rng(a.seed + 4), photos, a.pool, 96)
    one_frame(True)
    check = vae_pool(np.random.default_rng(a.seed + 99), photos, 48, 128).float() / 127.5 - 1
    with torch.no_grad():
        ref = vae_encode(vae, check[:8])[0]
        log(f"vae pool {tuple(pool.shape)}, {time.time() - t0:.0f}s; encoder shortcut differs by {float((encode(vae, check[:8]) - ref).abs().max()):.2e};"
            f" latents std {ref.std().item():.2f}; start psnr {psnr(vae_decode(vae, ref), check[:8]):.2f}")
    vae.requires_grad_(False)
    params = [p for n, p in list(vae.decoder.named_parameters()) if "time_conv" not in n]
    big = [p for p in params if p.ndim >= 4 and min(p.shape[:2]) > 3]
    small = [p for p in params if not any(p is q for q in big)]
    for p in params:
        p.requires_grad_(True)
    muon, adam = ConvMuon(big, a.vae_lr), torch.optim.AdamW(small, lr=a.vae_lr, betas=(0.9, 0.98), weight_decay=0.0)
    ema, step, t0, hist = copy.deepcopy(vae).requires_grad_(False), 0, time.time(), []
    gen = torch.Generator().manual_seed(a.seed)
    while (frac := progress(t0, step, a.vae_minutes, a.vae_steps)) < 1:
        lr = a.vae_lr * min(1, (step + 1) / 50) * min(1, (1 - frac) / 0.6 + 0.01)
        muon.lr = lr
        for g in adam.param_groups:
            g["lr"] = lr
        i = torch.randint(len(pool), (a.vae_batch,), generator=gen)
        y0, x0 = torch.randint(33, (2,), generator=gen).tolist()
        x = pool[i, :, y0:y0 + 64, x0:x0 + 64].float() / 127.5 - 1
        x = x.flip(3) if torch.rand((), generator=gen) < 0.5 else x
        z = encode(vae, x)
        z = z + 0.04 * torch.randn(z.shape, generator=gen) * torch.rand(len(z), 1, 1, 1, generator=gen)
        with torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
            y = vae_decode(vae, z).float()
        e = y - x
        grad = (e[..., 1:] - e[..., :-1]).abs().mean() + (e[..., 1:, :] - e[..., :-1, :]).abs().mean()
        loss = e.abs().mean() + 2 * (e * e).mean() + 0.3 * grad + 0.5 * F.avg_pool2d(e, 8).abs().mean()
        for p in params:
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        muon.step(), adam.step()
        step += 1
        hist.append(psnr(y.detach(), x))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.decoder.parameters()), list(vae.decoder.parameters()), 1 - min(0.995, 1 - 1 / (step / 4 + 1)))
        if step % 100 == 0 or step in (10, 40):
            log(f"vae {step}: L1 {e.abs().mean().item():.4f} psnr {np.mean(hist[-50:]):.2f}, {(time.time() - t0) / step:.2f} s/step")
            torch.save(ema.state_dict(), work / "vae_part.pt")
    ema.load_state_dict({k: v.bfloat16().float() for k, v in ema.state_dict().items()})
    torch.save(ema.state_dict(), work / "vae.pt")
    with torch.no_grad():
        log(f"vae done: {step} steps, held-out psnr {psnr(vae_decode(ema, encode(ema, check)), check):.2f} dB")
    one_frame(False)
    return ema


# ----------------------------------------------------------------------------- latents
BUCKETS = [  # (height, width, scenes at --scenes 1, share of the steps, batch)
    (64, 64, 2200, .15, 64), (96, 96, 1700, .17, 32), (64, 96, 700, .06, 48), (96, 64, 700, .06, 48),
    (128, 128, 1700, .20, 20), (96, 160, 600, .07, 20), (160, 96, 600, .07, 20), (64, 128, 200, .02, 32), (128, 64, 200, .02, 32),
    (160, 160, 250, .03, 12), (128, 192, 220, .03, 12), (192, 128, 220, .03, 12), (64, 256, 120, .015, 20), (256, 64, 120, .015, 20),
    (192, 192, 200, .04, 8), (256, 160, 80, .01, 6), (160, 256, 80, .01, 6), (256, 256, 100, .03, 4)]
PER_SCENE = 12      # pictures: subject and background colours (0-5), without the subject (6, 7), grey (8, 9), inverted (10, 11)


def true_size(rng, h, w):
    """The size of a picture inside its bucket: a third of them are not multiples of 32 and get padded."""
    cut = lambda n: n - int(rng.integers(0, min(32, n - 47))) if rng.random() < 0.7 else n
    return (cut(h), cut(w)) if rng.random() < 0.35 else (h, w)


def pad(img, h, w):
    """Edge replication to the right and below, as the program does."""
    return np.pad(img, ((0, h - img.shape[0]), (0, w - img.shape[1]), (0, 0)), mode="edge")


def paint(rng, H, W, photos):
    """The twelve pictures of one scene (see PER_SCENE) and what is needed to name the colours in them."""
    h, w = true_size(rng, H, W)
    if rng.random() < 0.1:                            # a photograph: only the edits of the whole picture apply
        p = pad(photos.crop(rng, h, w), H, W)
        return [p] * 8 + [gray(p)] * 2 + [1 - p] * 2, dict(photo=True)
    s = Scene(rng, h, w, photos)
    c1, c2 = rng.choice(len(NAMES), 2, replace=False)
    b1 = rng.integers(len(NAMES))
    while b1 in (c1, c2):
        b1 = rng.integers(len(NAMES))
    back = [None if s.photo is not None else any_color(rng), rgb(NAMES[b1])]
    for _ in range(20):
        if back[0] is None or min(np.abs(back[0] - rgb(NAMES[c])).sum() for c in (c1, c2, b1)) > 0.4:
            break
        back[0] = any_color(rng)
    subj = [far_color(rng, back[1]), rgb(NAMES[c1]), rgb(NAMES[c2])]
    for _ in range(20):
        if back[0] is None or np.abs(subj[0] - back[0]).sum() > 0.35:
            break
        subj[0] = far_color(rng, back[1])
    if s.part is not None and rng.random() < 0.75:
        while True:
            other = any_color(rng)
            other = other if rng.random() < 0.5 else (0.4 * other + 0.6 * other.mean()).astype(np.float32)
            if min(np.abs(other - c).sum() for c in subj) > 0.3:
                break
        back[0] = (back[0], other)
    g = [s.compose(c, b) for b in back for c in subj]
    r = [s.compose(subj[0], b, False) for b in back]
    out = g + r + [gray(g[0]), gray(g[4]), 1 - g[0], 1 - g[4]]
    return [pad(x, H, W) for x in out], dict(photo=False, c=[None, NAMES[c1], NAMES[c2]], b=NAMES[b1], shape=s.kind)


class Pairs:
    """Scenes kept whole, for the instructions about two pictures: painted in any colours while training."""

    def __init__(self, seed, photos, each=130):
        rng = np.random.default_rng(seed)
        self.scenes = {b: [Scene(rng, *BUCKETS[b][:2], photos) for _ in range(each)] for b in range(7)}

    def picture(self, rng, b, color=None, also=None):
        """A picture of that bucket; with also, the same one with its subject in that colour, too."""
        s = self.scenes[b][rng.integers(len(self.scenes[b]))]
        back = None if s.photo is not None else any_color(rng)
        for _ in range(20):
            if back is None or color is None or np.abs(back - color).sum() > 0.4:
                break
            back = any_color(rng)
        one = far_color(rng, back if back is not None else rgb("red")) if color is None else color
        x = s.compose(one, back)
        return (x, s.compose(also, back)) if also is not None else x

    def swatch(self, rng, b, color):
        """A picture of little more than a colour."""
        s = self.scenes[b][rng.integers(len(self.scenes[b]))]
        mod = s.mod[..., None] if s.photo is None and rng.random() < 0.5 else 1 + rng.normal(0, 0.02, (s.h, s.w, 1))
        return np.clip(mod * color, 0, 1).astype(np.float32)

    def batch(self, rng, b, n):
        """Sources, pictures that give the colour, targets."""
        src, tgt, give = [], [], []
        for _ in range(n):
            c = rgb(NAMES[rng.integers(len(NAMES))]) if rng.random() < 0.4 else any_color(rng)
            x, y = self.picture(rng, b, None, c)
            src.append(x), tgt.append(y), give.append(self.swatch(rng, b, c))
        return src, give, tgt


@torch.no_grad()
def make_latents(a, work, vae, photos):
    rng, out, t0 = np.random.default_rng(a.seed + 2), [], time.time()
    for h, w, n, _, _ in BUCKETS:
        lat, meta = [], []
        for _ in range(max(4, int(n * a.scenes))):
            imgs, m = paint(rng, h, w, photos)
            lat.append(encode(vae, to_tensor(imgs)).half())
            meta.append(m)
        out.append((torch.stack(lat), meta))
        log(f"latents {h}x{w}: {len(meta)} scenes, {time.time() - t0:.0f}s")
    flat = torch.cat([lat.float().permute(2, 0, 1, 3, 4).flatten(1)[:, ::5] for lat, _ in out], 1)
    data = dict(data=out, mean=flat.mean(1), std=flat.std(1))
    if a.init:                                        # the earlier model's own scale
        data.update({k: torch.tensor(getattr(vae.config, "latents_" + k)) for k in ("mean", "std")})
    torch.save(data, work / "latents.pt")
    return data


def pick(rng, meta, n):
    """n training pairs from a bucket: (scene, source, target, instruction)."""
    rows = []
    for _ in range(n):
        i = int(rng.integers(len(meta)))
        m = meta[i]
        if m["photo"]:
            k = int(rng.choice([8, 10, 0]))
            rows.append((i, 0, k, instruction(rng, {8: "gray", 10: "invert", 0: "keep"}[k])))
            continue
        r = rng.random()
        if r < 0.42:
            b, t = int(rng.integers(2)), int(rng.integers(1, 3))
            s = int(rng.choice([x for x in range(3) if x != t])) if rng.random() < 0.97 else t
            rows.append((i, 3 * b + s, 3 * b + t, instruction(rng, "subject", m["c"][t], m["shape"])))
        elif r < 0.62:
            s = int(rng.integers(3))
            rows.append((i, s, 3 + s, instruction(rng, "background", m["b"], m["shape"])))
        elif r < 0.67:
            k = int(rng.integers(2))
            rows.append((i, 4 * k, 8 + k, instruction(rng, "gray")))
        elif r < 0.72:
            k = int(rng.integers(2))
            rows.append((i, 4 * k, 10 + k, instruction(rng, "invert")))
        elif r < 0.86:
            b = int(rng.integers(2))
            rows.append((i, 3 * b + int(rng.integers(3)), 6 + b, instruction(rng, "remove", None, m["shape"])))
        else:
            k = int(rng.integers(PER_SCENE))
            rows.append((i, k, k, instruction(rng, "keep")))
    return rows


# ----------------------------------------------------------------------------- DiT and text encoder
def condition_grid(h, w):
    """Rows and columns of the merged vision tokens the pipeline makes of a picture of this shape."""
    cw, ch = plus.calculate_dimensions(384 * 384, w / h)
    return round(ch / 28), round(cw / 28)


def attend(q, k, v, mask):
    """Plain attention: for short rows far quicker backwards than PyTorch's fused one on a CPU."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT + mask).softmax(-1).to(v.dtype) @ v


class Text:
    """The text encoder's forward pass, with few of the image tokens: each kept one counts for several
    (its attention logit is raised by the log of that), at its true position. With all of them kept and the
    vision tower's output passed in, this equals the released code (see --check)."""

    def __init__(self, te, tok):
        self.te, self.lm, self.tok, self.cache = te, te.model.language_model, tok, {}
        ids = lambda s: tok(s)["input_ids"]
        self.prefix, self.suffix = ids(PREFIX), ids("<|vision_end|>" + "x" + SUFFIX)
        self.suffix = self.suffix[-(len(ids(SUFFIX))):]
        self.before = [ids("Picture 1: <|vision_start|>"), ids("<|vision_end|>Picture 2: <|vision_start|>")]
        self.end = tok.convert_tokens_to_ids("<|vision_end|>")
        assert len(self.prefix) == DROP, len(self.prefix)

    def ids(self, text):
        if text not in self.cache:
            self.cache[text] = [self.end] + self.tok(text)["input_ids"] + self.suffix
        return self.cache[text]

    def __call__(self, texts, grid, pictures, mrope):
        """pictures: for each, the indices of the kept tokens and their embeddings [1 or B, kept, D].
        mrope: image tokens at their row and column (as the released model was trained; transformers 4), or all
        tokens numbered in a row (what diffusers 0.42 with transformers 5 computes: it passes no mm_token_type_ids).
        Returns embeddings [B, L, D] without the prefix, each key's logit offset [B, L], each token's position [L]."""
        gh, gw = grid
        n = gh * gw
        tails = [self.ids(t) for t in texts]
        longest = max(map(len, tails))
        head = self.prefix + self.before
        tail = torch.tensor([t + [0] * (longest - len(t)) for t in tails])
        B, emb, lm = len(texts), self.lm.embed_tokens, self.lm
        # everything before the instruction is the same for all rows when the pictures are
        rows, seq, pos, key, where, at, real = max(len(e) for _, e in pictures), [], [], [], [], 0, 0
        for k, (keep, image) in enumerate(pictures):
            words = (self.prefix if k == 0 else []) + self.before[k]
            H, idx = len(words), torch.tensor(keep)
            seq += [emb(torch.tensor(words))[None].expand(rows, -1, -1), image.expand(rows, -1, -1)]
            pos += [torch.arange(H).expand(3, -1) + at, torch.stack((idx * 0, idx // gw, idx % gw) if mrope else (idx, idx, idx)) + at + H]
            key += [torch.zeros(H), torch.full((len(keep),), math.log(n / len(keep)))]
            where += [torch.arange(H) + real, idx + real + H]
            at, real = at + H + (max(gh, gw) if mrope else n), real + H + n
        head, tail = torch.cat(seq, 1), emb(tail)
        at0 = head.shape[1]
        pos = torch.cat(pos + [(torch.arange(longest) + at).expand(3, -1)], 1)[:, None]
        key = torch.cat(key + [torch.zeros(longest)])
        where = torch.cat(where + [torch.arange(longest) + real])[DROP:] - DROP
        mask = torch.full((len(key),) * 2, float("-inf")).triu(1) + key
        cos, sin = (u[:, None] for u in lm.rotary_emb(head, pos))
        rot = lambda u: torch.cat([-u[..., u.shape[-1] // 2:], u[..., :u.shape[-1] // 2]], -1)
        for layer in lm.layers:
            at, past, new = layer.self_attn, None, []
            for x, sl in ((head, slice(0, at0)), (tail, slice(at0, None))):
                h = layer.input_layernorm(x)
                q, kk, v = (p(h).unflatten(-1, (-1, at.head_dim)).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj))
                q, kk = (q * cos[:, :, sl] + rot(q) * sin[:, :, sl]).to(v.dtype), (kk * cos[:, :, sl] + rot(kk) * sin[:, :, sl]).to(v.dtype)
                kk, v = (u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (kk, v))
                if past is not None:
                    kk, v = (torch.cat([o.expand(len(u), -1, -1, -1), u], 2) for o, u in zip(past, (kk, v)))
                past = (kk, v)
                o = attend(q, kk, v, mask[sl, :kk.shape[2]])
                x = x + at.o_proj(o.transpose(1, 2).flatten(2))
                new.append(x + layer.mlp(layer.post_attention_layernorm(x)))
            head, tail = new
        x = lm.norm(torch.cat([head[:, DROP:].expand(B, -1, -1), tail], 1))
        bias = key[DROP:].repeat(B, 1)
        for i, t in enumerate(tails):
            bias[i, at0 - DROP + len(t):] = float("-inf")
        return x, bias, where


PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def vision(te, imgs, grid):
    """The vision tower's embeddings [B, tokens, D] of pictures (arrays of one size), enlarged as the pipeline does."""
    gh, gw = grid
    x = torch.from_numpy(np.stack(imgs)).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (gh * 28, gw * 28), mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
    B = len(x)
    x = x.view(B, 3, gh, 2, 14, gw, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    x = x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(B * gh * gw * 4, -1)
    f = te.model.visual(x, grid_thw=torch.tensor([[1, 2 * gh, 2 * gw]] * B))
    f = f.pooler_output if hasattr(f, "pooler_output") else f
    f = torch.cat(list(f)) if isinstance(f, (tuple, list)) else f
    return f.view(B, gh * gw, -1)


def rope(u, cs):
    a, b = u.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cs
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(u.dtype)


def dit_forward(dit, x, ref, txt, t, bias, where, shape):
    """QwenImageTransformer2DModel.forward with zero_cond_t, references of the target's shape, and a key bias."""
    B, n = x.shape[:2]
    gh, gw = shape
    vf, tf = dit.pos_embed([[(1, gh, gw)] * (1 + ref.shape[1] // n)], max_txt_seq_len=int(where.max()) + 1, device=x.device)
    f = torch.cat([tf[where], vf])[None, :, None]
    cs = (f.real.contiguous(), f.imag.contiguous())
    h = dit.img_in(torch.cat([x, ref], 1))
    e = dit.txt_in(dit.txt_norm(txt))
    T = e.shape[1]
    tp = dit.time_text_embed(torch.cat([t, t * 0]), h)
    mask = torch.cat([bias, bias.new_zeros(B, n + ref.shape[1])], 1)[:, None, None].to(h.dtype)
    act = F.silu(tp)
    last = len(dit.transformer_blocks) - 1
    norm = lambda u: F.layer_norm(u, u.shape[-1:], eps=1e-6)

    def mod2(u, m):                                   # target tokens by time t, reference tokens by time 0
        s, c = m[0][:, None], m[1][:, None]
        u = norm(u)
        return torch.cat([u[:, :n] * (1 + s[:B]) + c[:B], u[:, n:] * (1 + s[B:]) + c[B:]], 1)

    def gate2(u, g):
        g = g[:, None]
        return torch.cat([u[:, :n] * g[:B], u[:, n:] * g[B:]], 1)
    for i, b in enumerate(dit.transformer_blocks):
        at = b.attn
        sh1, sc1, g1, sh2, sc2, g2 = b.img_mod[1](act).chunk(6, -1)
        tsh1, tsc1, tg1, tsh2, tsc2, tg2 = b.txt_mod[1](act[:B])[:, None].chunk(6, -1)
        hm, em = mod2(h, (sc1, sh1)), norm(e) * (1 + tsc1) + tsh1
        head = lambda u: u.unflatten(-1, (at.heads, -1))
        q = torch.cat([at.norm_added_q(head(at.add_q_proj(em))), at.norm_q(head(at.to_q(hm)))], 1)
        k = torch.cat([at.norm_added_k(head(at.add_k_proj(em))), at.norm_k(head(at.to_k(hm)))], 1)
        v = torch.cat([head(at.add_v_proj(em)), head(at.to_v(hm))], 1)
        q, k = rope(q, cs).to(v.dtype), rope(k, cs).to(v.dtype)
        o = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        o = o.transpose(1, 2).flatten(2)
        h = h + gate2(at.to_out[0](o[:, T:]), g1)
        h = h + gate2(b.img_mlp(mod2(h, (sc2, sh2))), g2)
        if i < last:
            e = e + tg1 * at.to_add_out(o[:, :T])
            e = e + tg2 * b.txt_mlp(norm(e) * (1 + tsc2) + tsh2)
    sc, sh = dit.norm_out.linear(act[:B]).chunk(2, -1)
    return dit.proj_out(norm(h[:, :n]) * (1 + sc[:, None]) + sh[:, None])


def pack(z):
    B, C, h, w = z.shape
    return z.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w // 4, C * 4)


def trained(dit, te):
    """What the last stage trains."""
    return [*dit.parameters(), *te.model.language_model.parameters(), *te.model.visual.parameters()]


SIGMAS = torch.tensor([1.0, 0.744, 0.426, 0.02])  # of the default four steps (they hardly depend on the size)


@torch.no_grad()
def pixel_weight(vae, data, power=1.0):
    """Per latent channel: how much a change of it shows in the decoded picture, to a power, on the mean one."""
    lat = data["data"][0][0][:24, 0].float()
    one_frame(True)
    base, out = vae_decode(vae, lat), []
    for c in range(Z):
        moved = lat.clone()
        moved[:, c] += 0.1 * data["std"][c]
        out.append((vae_decode(vae, moved) - base).square().mean().sqrt())
    one_frame(False)
    w = torch.stack(out) ** power
    return w / w.mean()


def train_dit(a, work, dit, te, tok, data, vae, photos):
    rng, gen = np.random.default_rng(a.seed + 3), torch.Generator().manual_seed(a.seed + 3)
    text, pairs = Text(te, tok), Pairs(a.seed + 5, photos)
    # Whitened latents count what a pixel hardly shows as much as its colour: weigh each channel by what it does to pixels.
    weigh = pixel_weight(vae, data).repeat_interleave(4)
    log("loss weights", [round(float(x), 2) for x in weigh[::4]])
    mean, std = data["mean"].view(1, -1, 1, 1), data["std"].view(1, -1, 1, 1)
    train = trained(dit, te)
    skip = {id(te.model.language_model.embed_tokens.weight), id(dit.proj_out.weight), id(dit.img_in.weight)}
    mats = [p for p in train if p.ndim == 2 and id(p) not in skip]
    rest = [p for p in train if not (p.ndim == 2 and id(p) not in skip)]
    muon, adam = Muon(mats, a.lr), torch.optim.AdamW(rest, lr=a.lr, betas=(0.9, 0.98), weight_decay=0.0)
    ema = [p.detach().clone() for p in train]
    step, t0, run, views, state = 0, time.time(), {}, {}, work / "dit_state.pt"
    if state.exists():                                # an interrupted run goes on where it last saved
        s = torch.load(state, weights_only=False)
        step, t0 = s["step"], t0 - s["seconds"]
        with torch.no_grad():
            for p, q in zip(train, s["params"]):
                p.copy_(q)
        ema, muon.buf = s["ema"], s["muon"]
        adam.load_state_dict(s["adam"])
        rng, gen = np.random.default_rng([a.seed + 3, step]), torch.Generator().manual_seed(a.seed + 3 + step)
        log(f"dit goes on at step {step}")
    # Several processes (--ranks) share each step: the same bucket, other rows, the gradients' mean. On a machine that others
    # use too, single-threaded ones lose far less time waiting than one with several threads.
    common, size = np.random.default_rng([a.seed + 6, step]), a.ranks
    if size > 1:
        rng, gen = np.random.default_rng([a.seed + 3, step, a.rank]), torch.Generator().manual_seed(a.seed + 3 + step + 7777 * a.rank)
        dist.init_process_group("gloo", init_method=f"file://{(work / 'meeting').absolute()}", rank=a.rank, world_size=size)
    share = np.array([b[3] for b in BUCKETS])
    shift = math.exp(a.shift)                         # more than the pipeline's own 0.5: what matters is the noisy end
    while True:
        clock = torch.tensor(progress(t0, step, a.dit_minutes, a.dit_steps))
        if size > 1:
            dist.broadcast(clock, 0)
        if (frac := clock.item()) >= 1:
            break
        lr = a.lr * min(1, (step + 1) / 100) * min(1, (1 - frac) / 0.6 + 0.01)
        muon.lr = lr
        for g in adam.param_groups:
            g["lr"] = lr
        bi = int(common.choice(len(BUCKETS), p=share / share.sum()))
        h, w, _, _, B = BUCKETS[bi]
        lat, meta = data["data"][bi]
        grid = condition_grid(h, w)
        n = grid[0] * grid[1]
        some = lambda k: sorted(rng.choice(n, size=min(n, k), replace=False).tolist())
        two = common.random() < a.two and bi < 7
        cast = torch.autocast("cpu", torch.bfloat16, enabled=a.bf16)
        if two:                                       # both pictures through the vision tower
            B = max(4, B // 3)
            imgs = pairs.batch(rng, bi, B)
            src, give, tgt = (pack((encode(vae, to_tensor(x)) - mean) / std) for x in imgs)
            texts = [instruction(rng, "two") for _ in range(B)]
            ref = src if rng.random() < 0.6 else torch.cat([src, give], 1)     # often only the tower shows the second one
            k1, k2 = some(int(rng.choice([4, 16]))), some(int(rng.choice([16, 32])))
            with cast:
                f = vision(te, imgs[0] + imgs[1], grid)
            seen = [(k1, f[:B, k1]), (k2, f[B:, k2])]
        else:                                         # the tower's view of some other picture: nothing to be learnt from it
            rows = pick(rng, meta, B)
            si = torch.tensor([r[0] for r in rows])
            src, tgt = (pack((lat[si, torch.tensor([r[j] for r in rows])].float() - mean) / std) for j in (1, 2))
            ref, texts, k1 = src, [r[3] for r in rows], some(int(rng.choice([4, 8, 16])))
            if bi not in views or rng.random() < 0.05:
                with torch.no_grad(), cast:
                    views[bi] = vision(te, [pairs.picture(rng, int(rng.integers(7)))], grid).float()
            seen = [(k1, views[bi][:, k1])]
        texts = [" " if rng.random() < 0.07 else t for t in texts]
        u = torch.rand(B, generator=gen)
        s = shift * u / (1 + (shift - 1) * u)
        # most of the noise levels are those of the default four steps
        pickd = SIGMAS[torch.multinomial(torch.tensor([.34, .27, .35, .04]), B, True, generator=gen)]
        s = torch.where(torch.rand(B, generator=gen) < 0.75, pickd, s)
        noise = torch.randn(tgt.shape, generator=gen)
        shape = (h // 16, w // 16)
        with cast:
            e, bias, where = text(texts, grid, seen, bool(rng.random() < 0.5))
            seems = tgt
            if common.random() < a.rollout and frac > 0.05:   # start from what the model itself makes of pure noise
                with torch.no_grad():
                    seems = noise - dit_forward(dit, noise, ref, e, torch.ones(B), bias, where, shape).float()
                s = torch.where(s > 0.999, SIGMAS[1 + (torch.rand(B, generator=gen) < 0.5).long()], s)
            # sometimes overdone, as guidance does it
            over = torch.where((torch.rand(B, generator=gen) < 0.12) & (s > 0.4), 1 + torch.rand(B, generator=gen), torch.ones(()))
            seems = src + over[:, None, None] * (seems - src)
            xt = seems + s[:, None, None] * (noise - seems)
            v = dit_forward(dit, xt, ref, e, s, bias, where, shape)
        goal = (xt - tgt) / s[:, None, None].clamp_min(0.02)
        err = ((v.float() - goal) ** 2 * weigh).mean((1, 2))
        err = err * (s / 0.3).clamp(max=1) ** 2
        loss = (2 * (1 + err).sqrt() - 2).mean()      # a few hopeless rows shall not outweigh the others
        run.setdefault((bi, two), []).append(loss.item())
        for p in train:
            p.grad = None
        loss.backward()
        if size > 1:
            flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in train])
            dist.all_reduce(flat)
            for p, g in zip(train, flat.div_(size).split([p.numel() for p in train])):
                p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(), adam.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema, train, 1 - min(0.998, 1 - 1 / (step / 6 + 1)))
        if step % 100 == 0 or step in (5, 25):
            log(f"dit {step}: lr {lr:.5f} " + " ".join(f"{BUCKETS[k][0]}x{BUCKETS[k][1]}{'*' * t}:{np.mean(v[-60:]):.4f}" for (k, t), v in sorted(run.items()) if k < 7)
                + f"  {(time.time() - t0) / step:.2f} s/step")
            run = {k: v[-60:] for k, v in run.items()}
        if step % 100 == 0 and a.rank == 0:
            torch.save(ema, work / "dit_part.pt")
            torch.save(dict(step=step, seconds=time.time() - t0, params=[p.data for p in train], ema=ema, muon=muon.buf,
                            adam=adam.state_dict()), state)
    with torch.no_grad():
        for p, q in zip(train, ema):
            p.copy_(q)
    if a.rank == 0:
        torch.save(ema, work / "dit.pt")
    log(f"dit done: {step} steps")


# ----------------------------------------------------------------------------- evaluation
def hue_error(a, b, m):
    """Degrees between the mean hues of two pictures inside a mask."""
    def vec(x):
        r, g, bl = (x[m].astype(np.float64).mean(0)).tolist()
        return math.atan2(math.sqrt(3) * (g - bl), 2 * r - g - bl)
    d = abs(vec(a) - vec(b)) % (2 * math.pi)
    return math.degrees(min(d, 2 * math.pi - d))


def held_out(seed, op, side, photos, color=None):
    """A new picture, its instruction, the exact target and where the subject is."""
    rng = np.random.default_rng(seed)
    h, w = side if isinstance(side, tuple) else (side, side)
    if op in ("gray", "invert") and seed % 3 == 0:
        src = photos.crop(rng, h, w)
        return src, instruction(rng, op), gray(src) if op == "gray" else 1 - src, np.ones((h, w), bool), np.zeros((h, w), bool)
    s = Scene(rng, h, w, photos)
    name = color or NAMES[seed % len(NAMES)]
    back = None if s.photo is not None else far_color(rng, rgb(name))
    subj = far_color(rng, back if back is not None else rgb(name))
    while np.abs(subj - rgb(name)).sum() < 0.4:
        subj = far_color(rng, back if back is not None else rgb(name))
    src = s.compose(subj, back)
    inside, outside = s.mask > 0.95, s.mask < 0.02
    tgt = {"subject": lambda: s.compose(rgb(name), back), "background": lambda: s.compose(subj, rgb(name)),
           "gray": lambda: gray(src), "invert": lambda: 1 - src, "remove": lambda: s.compose(subj, back, False)}[op]()
    return src, instruction(rng, op, name, s.kind), tgt, inside, outside


def evaluate(a, model, out, photos):
    pipe = QwenImageEditPlusPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image_pad, inner, mrope = pipe.text_encoder.config.image_token_id, pipe.text_encoder.forward, [False]

    def forward(*x, **k):                             # see Text: with and without positions by row and column
        if mrope[0]:
            k["mm_token_type_ids"] = (k["input_ids"] == image_pad).int()
        return inner(*x, **k)
    pipe.text_encoder.forward = forward
    pic = lambda x: Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))

    def edit(src, text, steps, cfg, seed=0):
        h, w = src.shape[:2]
        plus.VAE_IMAGE_SIZE = h * w
        t = time.time()
        im = pipe(image=[pic(src)], prompt=text, negative_prompt=" " if cfg > 1 else None, true_cfg_scale=cfg, width=w, height=h,
                  num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0]
        return np.asarray(im, np.float32) / 255, time.time() - t

    @torch.no_grad()
    def through_vae(x):
        z = pipe.vae.encode(to_tensor([x])[:, :, None]).latent_dist.mode()
        return (pipe.vae.decode(z).sample[0, :, 0].permute(1, 2, 0).numpy().clip(-1, 1) + 1) / 2

    def score(items, steps, cfg):
        rows, secs = [], []
        for op, src, text, tgt, inside, outside in items:
            res, t = edit(src, text, steps, cfg)
            secs.append(t)
            floor = through_vae(tgt)
            chroma = np.ptp(tgt[inside].mean(0))
            rows.append(dict(hue=hue_error(res, tgt, inside) if chroma > 0.15 else None,
                             inside=float(np.abs(res - tgt)[inside].mean()), floor_inside=float(np.abs(floor - tgt)[inside].mean()),
                             outside=float(np.abs(res - tgt)[outside].mean()) if outside.any() else None,
                             floor_outside=float(np.abs(floor - tgt)[outside].mean()) if outside.any() else None,
                             before=float(np.abs(src - tgt)[inside].mean())))
        mean = lambda k: round(float(np.mean([r[k] for r in rows if r[k] is not None])), 4) if any(r[k] is not None for r in rows) else None
        hues = [r["hue"] for r in rows if r["hue"] is not None]
        return dict({k: mean(k) for k in ("hue", "inside", "floor_inside", "before", "outside", "floor_outside")},
                    hue_median=round(float(np.median(hues)), 1) if hues else None,
                    hue_within_20=round(float(np.mean([h < 20 for h in hues])), 3) if hues else None, seconds=round(float(np.median(secs)), 3), n=len(rows))

    def items(op, side, n, first=50000):
        return [(op, *held_out(first + i, op, side, photos)) for i in range(n)]
    scores = {}

    def report(name, *x):
        scores[name] = score(*x)
        log(name, scores[name])
        (out / "scores.json").write_text(json.dumps(scores, indent=1))
    base = items("subject", 128, a.eval_n)
    for steps, cfg in ((8, 1.0), (8, 2.5), (20, 1.0), (20, 4.0), (4, 1.0)):
        report(f"subject 128 steps {steps} cfg {cfg}", base, steps, cfg)
    mrope[0] = True
    report("subject 128 steps 8 cfg 1.0, image tokens at rows and columns", base, 8, 1.0)
    mrope[0] = False
    for side in (64, (96, 160), 192, 256):
        report(f"subject {side} steps 8 cfg 1", items("subject", side, a.eval_n // 2), 8, 1.0)
    for op in ("background", "gray", "invert", "remove"):
        report(f"{op} 128 steps 8 cfg 1", items(op, 128, a.eval_n // 2), 8, 1.0)
    # contact sheet: input, output, exact target
    rows, cell = [], 128
    fixed = [("subject", "purple", ZH["subject"][0].format(c="紫色"), "ZH-1"), ("subject", "purple", EN["subject"][0].format(c="purple"), "EN-1")]
    plan = [(op, c, t, label, 60000 + i) for i, (op, c, t, label) in enumerate(fixed * 3)]
    plan += [("subject", c, None, "", 61000 + i) for i, c in enumerate(["red", "green", "blue", "yellow", "orange", "pink", "cyan", "white", "black", "purple"])]
    plan += [(op, c, None, "", 62000 + i) for i, (op, c) in enumerate([("background", "blue"), ("background", "yellow"), ("background", "white"),
             ("gray", None), ("gray", None), ("invert", None), ("invert", None), ("remove", None), ("remove", None), ("remove", None)])]
    for op, c, t, label, seed in plan:
        src, text, tgt, *_ = held_out(seed, op, cell, photos, c)
        res, _ = edit(src, t or text, 8, 1.0)
        tile = Image.new("RGB", (3 * cell + 24, cell + 20), "white")
        for k, x in enumerate((src, res, tgt)):
            tile.paste(pic(x), (k * (cell + 4), 16))
        text = t or text
        zh = any(ord(ch) > 127 for ch in text)
        ImageDraw.Draw(tile).text((2, 2), (f"[zh] {op} {c or ''}" if zh else text)[:66], fill="black")
        rows.append(tile)
    cols = 3
    sheet = Image.new("RGB", (cols * rows[0].width, -(-len(rows) // cols) * rows[0].height), "white")
    for i, tile in enumerate(rows):
        sheet.paste(tile, (i % cols * tile.width, i // cols * tile.height))
    sheet.save(out / "sheet.png")
    log("sheet:", out / "sheet.png", "(input, output, exact target)")


# ----------------------------------------------------------------------------- main
def check(dit, te, tok):
    """The training forward passes against the released code's."""
    torch.manual_seed(0)
    dit, te = copy.deepcopy(dit).eval(), copy.deepcopy(te).eval()
    for p in dit.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for p in te.parameters():
        p.data += 0.02 * torch.randn_like(p)
    h, w = 96, 128
    pipe = assemble(tok, new_vae(), dit, te)
    ims = [np.random.default_rng(k).integers(0, 255, (h, w, 3), dtype=np.uint8) for k in (0, 1)]
    cw, ch = plus.calculate_dimensions(384 * 384, w / h)
    grid, text = condition_grid(h, w), Text(te, tok)
    with torch.no_grad():
        for n, prompt in ((1, "把图片里的主体颜色改成紫色，并保持整体风格一致。"), (2, EN["two"][0])):
            conds = [pipe.image_processor.resize(Image.fromarray(im), ch, cw) for im in ims[:n]]
            want, _ = pipe.encode_prompt(prompt, image=conds, device="cpu")
            px = pipe.processor.image_processor(images=conds, return_tensors="pt")
            img = te.model.get_image_features(px["pixel_values"], px["image_grid_thw"])
            img = img.pooler_output if hasattr(img, "pooler_output") else img
            img = torch.cat(list(img)) if not torch.is_tensor(img) else img
            img = img.view(n, 1, grid[0] * grid[1], -1)
            mine = vision(te, [im.astype(np.float32) / 255 for im in ims[:n]], grid)
            log("vision", f"{float((mine - img[:, 0]).abs().mean()):.1e} of {float(img.std(2).mean()):.1e} (another resampling)")
            every = list(range(grid[0] * grid[1]))
            got, bias, where = text([prompt], grid, [(every, u) for u in img], False)
            log("text", tuple(want.shape), tuple(got.shape), f"{float((want - got).abs().max()):.2e} of {float(want.abs().max()):.2f}")
            x, ref, t = torch.randn(2, 48, 64), torch.randn(2, 48 * n, 64), torch.tensor([0.3, 0.9])
            a = dit(torch.cat([x, ref], 1), timestep=t, encoder_hidden_states=want.repeat(2, 1, 1),
                    img_shapes=[[(1, 6, 8)] * (1 + n)] * 2).sample[:, :48]
            b = dit_forward(dit, x, ref, want.repeat(2, 1, 1), t, bias.repeat(2, 1), where, (6, 8))
            log(f"dit {float((a - b).abs().max()):.2e} of {float(a.abs().max()):.2f}")


def warm_start(folder, dit, te, vae):
    """Weights of an earlier model; blocks that it lacks come before the last one and start nearly closed."""
    from safetensors.torch import load_file
    old = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    n = 1 + max(int(k.split(".")[1]) for k in old if k.startswith("transformer_blocks."))
    new, last = len(dit.transformer_blocks), f"transformer_blocks.{n - 1}."
    state = dit.state_dict()
    for k, v in old.items():
        state[k.replace(last, f"transformer_blocks.{new - 1}.") if k.startswith(last) else k] = v.float()
    d = dit.inner_dim
    for i in range(n - 1, new - 1):
        for m in ("img_mod", "txt_mod"):
            for at in (2 * d, 5 * d):
                state[f"transformer_blocks.{i}.{m}.1.bias"][at:at + d] = 0.05
    dit.load_state_dict(state)
    te.load_state_dict(type(te).from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).state_dict())
    out = te.model.visual.merger.mlp[2]               # a tower that was never trained says too little to learn from
    if out.weight.std() < 0.01:
        out.weight.data.mul_(0.02 / out.weight.std())
    old = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.load_state_dict(old.state_dict())
    vae.register_to_config(latents_mean=old.config.latents_mean, latents_std=old.config.latents_std)


def pack_model(a, out, work, dit, te, vae, tok):
    """OUT_DIR/model from the newest checkpoints (also from unfinished stages)."""
    first = lambda *names: next(torch.load(work / n, weights_only=False) for n in names if (work / n).exists())
    data = torch.load(work / "latents.pt", weights_only=False)
    vae.load_state_dict(first("vae.pt", "vae_part.pt"))
    vae.register_to_config(latents_mean=[round(float(v), 4) for v in data["mean"]], latents_std=[round(float(v), 4) for v in data["std"]])
    with torch.no_grad():
        for p, q in zip(trained(dit, te), first("dit.pt", "dit_part.pt")):
            p.copy_(q)
    save(out / "model", work / "tokenizer", tok, vae, dit, te)
    for f in sorted((out / "model").rglob("*")):
        if f.is_file():
            log(f"{f.stat().st_size:>10,} {f.relative_to(out)}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--minutes", type=float, default=60, help="whole training: a third for the VAE's decoder, the rest for the DiT")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--vae-minutes", type=float, help="instead of the share of --minutes")
    ap.add_argument("--dit-minutes", type=float, help="instead of the share of --minutes")
    ap.add_argument("--vae-steps", type=int, help="a number of steps instead of a time")
    ap.add_argument("--dit-steps", type=int, help="a number of steps instead of a time")
    ap.add_argument("--vae-lr", type=float, default=2e-3)
    ap.add_argument("--vae-batch", type=int, default=12)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--shift", type=float, default=1.2, help="of the training noise levels")
    ap.add_argument("--pool", type=int, default=4000, help="pictures to train the VAE on")
    ap.add_argument("--scenes", type=float, default=1.0, help="multiplies the number of scenes in BUCKETS")
    ap.add_argument("--init", type=pathlib.Path, help="start from this model folder (its VAE and vocabulary stay)")
    ap.add_argument("--two", type=float, default=0.25, help="share of the steps with instructions about two pictures")
    ap.add_argument("--rollout", type=float, default=0.35, help="share of the steps that start from the model's own first guess")
    ap.add_argument("--ranks", type=int, default=1, help="number of processes that train the DiT together")
    ap.add_argument("--rank", type=int, default=0, help="which of them this one is; the pictures must exist already")
    ap.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32 throughout")
    ap.add_argument("--layers", type=int, default=DIT["num_layers"], help="of the DiT")
    ap.add_argument("--heads", type=int, default=DIT["num_attention_heads"], help="of the DiT, 32 channels each")
    ap.add_argument("--stage", choices=("all", "vae", "dit", "pack", "eval", "check"), default="all",
                    help="one stage only; dit needs only the VAE's encoder, so it can run beside vae in another process")
    ap.add_argument("--eval-n", type=int, default=24, help="held-out pictures per measurement")
    a = ap.parse_args()
    a.vae_minutes = a.vae_minutes or a.minutes / 3
    a.dit_minutes = a.dit_minutes or a.minutes * 2 / 3
    DIT.update(num_layers=a.layers, num_attention_heads=a.heads)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    out = pathlib.Path(a.out)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    photos, tok = Photos(), tokenizer(work / "tokenizer", a.init)
    torch.manual_seed(a.seed)
    dit, te, vae = new_dit(), new_text_encoder(tok), new_vae()
    log("parameters:", *(f"{n} {sum(p.numel() for p in m.parameters()):,}" for n, m in (("dit", dit), ("text encoder", te), ("vae", vae))))
    if a.init:
        warm_start(a.init, dit, te, vae)
        for f in ("vae.pt", "vae_init.pt"):
            if not (work / f).exists():
                torch.save(vae.state_dict(), work / f)
        log("warm start from", a.init)
    if a.stage == "check":
        return check(dit, te, tok)
    if a.stage in ("all", "vae") and not (work / "vae.pt").exists():
        train_vae(a, work, initial_vae(a, work, photos), photos)
    if a.stage in ("all", "dit") and not (work / "dit.pt").exists():
        if not a.init:
            vae = initial_vae(a, work, photos)
        data = torch.load(work / "latents.pt", weights_only=False) if (work / "latents.pt").exists() else make_latents(a, work, vae, photos)
        train_dit(a, work, dit, te, tok, data, vae, photos)
    if a.stage in ("all", "pack"):
        pack_model(a, out, work, dit, te, vae, tok)
    if a.stage in ("all", "eval"):
        evaluate(a, out / "model", out, photos)


if __name__ == "__main__":
    main()
