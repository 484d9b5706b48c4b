"""Records what tokenizers makes of random texts over all of Unicode with the released vocabulary.

  python make_unicode.py vocab.json merges.txt COUNT SEED | gzip -9n > unicode.txt.gz

One text a line: its UTF-8 in hexadecimal, a tab, its ids. Needs: tokenizers (PyPI).
"""
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
         "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
         "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

tok = Tokenizer(models.BPE.from_file(sys.argv[1], sys.argv[2]))
tok.normalizer = normalizers.NFC()
tok.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
for content in ADDED:
    tok.add_tokens([AddedToken(content, normalized=False, special=True)])

count, rnd = int(sys.argv[3]), random.Random(int(sys.argv[4]))
everything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
assigned = [c for c in everything if unicodedata.category(chr(c)) not in ("Cn", "Co")]
pools = [
    everything, assigned, list(range(0x80)),
    [c for c in assigned if unicodedata.combining(chr(c))],
    [c for c in assigned if unicodedata.decomposition(chr(c))],
    [c for c in range(0x3100) if chr(c).isspace()] + [0x180E, 0x200B, 0xFEFF],
    list(range(0x10D40, 0x10D90)) + list(range(0x11F00, 0x11F60)) + list(range(0x31340, 0x323C0, 17))
    + [0x7FD, 0x898, 0x1AC1, 0x1DF7, 0x11930, 0x11935, 0x11938],
    [ord(c) for c in "aeiostndlmrvST'  \n\r\t0123.,<|>_"],
    list(range(0x4E00, 0x9FFF)), list(range(0x1F300, 0x1F700)) + [0x200D, 0xFE0F],
    list(range(0x1100, 0x1200)) + list(range(0xAC00, 0xAC00 + 600)), [0x17F, 0x27, 0x73, 0x212A, 0xDF],
]
words = ["'s", "'LL", "'ve ", "<|im_end|>", "<|image_pad|>", "<|im_", " the", "The ", "\n\n", "\r\n",
         "  ", "e\u0301", "'\u017f", "\uac70\u11a7"]
for _ in range(count):
    chosen = rnd.sample(pools, rnd.randint(1, 4))
    text = "".join(rnd.choice(words) if rnd.random() < 0.08 else chr(rnd.choice(rnd.choice(chosen)))
                   for _ in range(rnd.choice([1, 2, 3, 5, 8, 13, 30])))
    print(text.encode().hex() + "\t" + " ".join(map(str, tok.encode(text).ids)))
