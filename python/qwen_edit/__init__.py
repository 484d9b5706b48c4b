"""Pictures edited by instruction in this process: a thin layer over libqie (standard library only, Python 3.8 or newer).

    import qwen_edit
    with qwen_edit.Engine("/data/Qwen-Image-Edit-2511") as engine:      # or "demo", which needs no files
        result = engine.edit(["photo.png"], "turn the subject purple", seed=7)
        result.save("out.png")                                           # result.seed, result.warnings, result.images ...

Pictures go in as paths, encoded bytes, `Image` or anything with Pillow's `convert("RGB")`, `size` and `tobytes()`; they come
out as `Image`. The engine's errors are raised as `EditError`. For a service with a queue see qwen_edit_client.py.
"""
import concurrent.futures
import ctypes
import json
import os
import threading

from . import _native

__all__ = ["EditError", "Engine", "Image", "Result"]
__version__ = _native.VERSION

_lib_lock, _lib_loaded = threading.Lock(), []


def _lib():
    with _lib_lock:
        if not _lib_loaded:
            _lib_loaded.append(_native.load())
        return _lib_loaded[0]


class EditError(Exception):
    """Refused or failed. `type` is the category ("INVALID", "NOT_FOUND", "NO_MEMORY" ...), `param` the option, field or file
    at fault or None."""

    def __init__(self, kind, param, message):
        super().__init__(message)
        self.type, self.param = kind, param or None


def _check(status, error):
    if status:
        raise EditError(_lib().qie_status_name(status).decode(), error.param.decode("utf-8", "replace"),
                        error.message.decode("utf-8", "replace"))


def _text(value):
    """A C string, or None. Raises EditError for a NUL inside, which C would cut at."""
    if value is None:
        return None
    value = os.fspath(value)
    value = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in value:
        raise EditError("INVALID", None, "a text holds a NUL character")
    return value


def _choice(name, value, choices):
    try:
        return choices.index(value)
    except ValueError:
        raise EditError("INVALID", name, "%s: %r is none of %s" % (name, value, ", ".join(choices))) from None


class Image:
    """A picture of 8-bit RGB. `Image.open(path_or_bytes)`, `Image.from_rgb(width, height, bytes)`."""

    def __init__(self, handle):
        self._handle, self._release = handle, _lib().qie_image_destroy

    def __del__(self):
        if getattr(self, "_handle", None):
            self._release(self._handle)
            self._handle = None

    @classmethod
    def open(cls, source):
        """PNG, JPEG or WebP from a path or from encoded bytes, turned upright as its EXIF says."""
        handle, error = ctypes.c_void_p(), _native.Error()
        if isinstance(source, (bytes, bytearray, memoryview)):
            source = bytes(source)
            _check(_lib().qie_image_decode(source, len(source), None, ctypes.byref(handle), ctypes.byref(error)), error)
        else:
            _check(_lib().qie_image_load(_text(source), None, ctypes.byref(handle), ctypes.byref(error)), error)
        return cls(handle)

    @classmethod
    def from_rgb(cls, width, height, pixels):
        """From width * height * 3 bytes, rows from the top, R G B."""
        if len(pixels) != width * height * 3:
            raise EditError("INVALID", "pixels", "%d x %d needs %d bytes of RGB, not %d"
                            % (width, height, width * height * 3, len(pixels)))
        handle, error = ctypes.c_void_p(), _native.Error()
        _check(_lib().qie_image_create(width, height, ctypes.byref(handle), ctypes.byref(error)), error)
        ctypes.memmove(_lib().qie_image_pixels(handle), bytes(pixels), len(pixels))
        return cls(handle)

    @property
    def size(self):
        """(width, height)"""
        return _lib().qie_image_width(self._handle), _lib().qie_image_height(self._handle)

    def tobytes(self):
        """The pixels: height rows of width times R G B. PIL.Image.frombytes("RGB", image.size, image.tobytes()) is Pillow's."""
        width, height = self.size
        return ctypes.string_at(_lib().qie_image_pixels(self._handle), width * height * 3)

    def encode(self, format="png", quality=95, parameters=None):
        """Encoded bytes. `format`: "png", "jpeg" or "webp"; `parameters`: text kept in the file."""
        options = _lib().qie_image_encode_options_default()
        options.format = _choice("format", format, ("", "png", "jpeg", "webp"))
        options.quality, options.parameters = quality, _text(parameters)
        data, n, error = ctypes.POINTER(ctypes.c_uint8)(), ctypes.c_size_t(), _native.Error()
        _check(_lib().qie_image_encode(self._handle, ctypes.byref(options), ctypes.byref(data), ctypes.byref(n),
                                       ctypes.byref(error)), error)
        try:
            return ctypes.string_at(data, n.value)
        finally:
            _lib().free(data)


def _image(picture):
    if isinstance(picture, Image):
        return picture
    if hasattr(picture, "convert") and hasattr(picture, "tobytes"):  # Pillow's
        picture = picture.convert("RGB")
        return Image.from_rgb(*picture.size, picture.tobytes())
    return Image.open(picture)


class Result:
    """`images`, and what an edit was made with: `seed`, `warnings`, `parameters` (a dict, as stored in the file), `timings`."""

    def __init__(self, images, parameters, warnings, timings):
        self.images, self.parameters, self.warnings, self.timings = images, parameters, warnings, timings
        self.seed = parameters[0]["seed"]

    def save(self, path, quality=95, metadata=True):
        """Write the picture by the ending of `path`; several are written to NAME-1.EXT, NAME-2.EXT ... Returns the paths."""
        path = os.fspath(path)
        kind = _lib().qie_image_format_from_path(_text(path))
        if not kind:
            raise EditError("INVALID", "path", "%r must end in .png, .jpg, .jpeg or .webp" % path)
        base, ending = os.path.splitext(path)
        many, paths = len(self.images) > 1, []
        for i, (image, parameters) in enumerate(zip(self.images, self.parameters)):
            data = image.encode(("", "png", "jpeg", "webp")[kind], quality,
                                json.dumps(parameters, ensure_ascii=False) if metadata else None)
            paths.append("%s-%d%s" % (base, i + 1, ending) if many else path)
            with open(paths[-1], "wb") as f:
                f.write(data)
        return paths


class Engine:
    """A model, opened once. `model`: a folder in the diffusers layout or "demo". Options are those of qie_engine_options
    (include/qie/edit.h): transformer, text_encoder, mmproj, vae (files), variant, precision ("auto", "f32", "bf16", "int8"),
    n_threads, backend, device ("cpu", "cuda"), gpus, memory_limit_bytes, gpu_headroom_bytes, gpu_limit_bytes,
    gpu_offload_folder, and loras: paths or (path, weight) pairs. Edits of one engine run one after the other."""

    def __init__(self, model="demo", precision="auto", loras=(), **options):
        self._engine, self._turn = None, threading.Lock()
        o = _lib().qie_engine_options_default()
        keep = [_text(model)]
        o.model, o.precision = keep[0], _choice("precision", precision, _native.PRECISIONS)
        o.loras, o.n_loras = _loras(loras, keep)
        _fill(o, options, keep, "model", "precision", "loras", "n_loras", "collect_importance")
        engine, error = ctypes.c_void_p(), _native.Error()
        _check(_lib().qie_engine_open(ctypes.byref(o), ctypes.byref(engine), ctypes.byref(error)), error)
        # Edits run in a thread of their own, so that Ctrl-C reaches the caller while one computes.
        self._engine, self._runner = engine, concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()

    def close(self):
        """Give the model back; a running edit is waited for."""
        with self._turn:
            if self._engine:
                self._runner.shutdown()
                _lib().qie_engine_close(self._engine)
                self._engine = None

    @property
    def info(self):
        """What is known of the model: a dict of qie_engine_info."""
        self._alive()
        info = _native.EngineInfo()
        _lib().qie_engine_get_info(self._engine, ctypes.byref(info))
        return {name: value.decode() if isinstance(value, bytes) else value
                for name, value in ((name, getattr(info, name)) for name, _ in info._fields_)}

    def plan(self, pictures, prompt, probe=False, **fields):
        """Sizes, tokens and memory of an edit that is not made, as a dict; `probe`: with `seconds_estimate`."""
        with self._turn:
            self._alive()
            options = _edit_options(pictures, prompt, fields)
            plan, error = _native.Plan(), _native.Error()
            _check(_lib().qie_engine_plan(self._engine, ctypes.byref(options), probe, ctypes.byref(plan),
                                          ctypes.byref(error)), error)
        return _plan_dict(plan)

    def edit(self, pictures, prompt, progress=None, **fields):
        """One edit; the last picture decides the shape. Fields are those of qie_edit_options: negative_prompt, seed (default:
        random), num_inference_steps, true_cfg_scale, max_side, width, height, ref_area, keep_size, num_images, schedule
        ("auto", "model", "lightning"), cache ("off", "balanced", "fast"), loras.

        progress(stage, step, total, seconds_left) is called from another thread; what it raises ends the edit, as Ctrl-C does,
        and is raised here."""
        raised = []

        def tell(_, p):
            if progress and not raised:
                p = p.contents
                try:
                    progress(p.stage.decode(), p.step, p.total, p.seconds_left if p.seconds_left >= 0 else None)
                except BaseException as e:  # ctypes would print and forget it
                    raised.append(e)
                    _lib().qie_engine_cancel(self._engine)

        with self._turn:
            self._alive()
            options = _edit_options(pictures, prompt, fields)
            options.progress = _native.PROGRESS_FN(tell)
            result, error = _native.EditResult(), _native.Error()
            _lib().qie_engine_reset_cancel(self._engine)
            future = self._runner.submit(_lib().qie_engine_edit, self._engine, ctypes.byref(options), ctypes.byref(result),
                                         ctypes.byref(error))
            try:
                status = future.result()
            except BaseException:
                _lib().qie_engine_cancel(self._engine)
                future.result()
                _lib().qie_edit_result_release(ctypes.byref(result))
                raise
            if raised:
                _lib().qie_edit_result_release(ctypes.byref(result))
                raise raised[0]
            _check(status, error)
            try:
                return self._result(options, result)
            finally:
                _lib().qie_edit_result_release(ctypes.byref(result))

    def _alive(self):
        if not self._engine:
            raise EditError("CONFLICT", None, "the engine is closed")

    def _result(self, options, result):
        images, parameters = [], []
        for i in range(result.n_images):
            images.append(Image(ctypes.c_void_p(result.images[i])))
            result.images[i] = None  # the picture is ours now
            text = _lib().qie_edit_parameters_json(self._engine, ctypes.byref(options), ctypes.byref(result), i)
            parameters.append(json.loads(ctypes.string_at(text)))
            _lib().free(text)
        timings = {name: getattr(result, name) for name in ("encode_s", "denoise_s", "decode_s", "total_s")}
        return Result(images, parameters, _plan_dict(result.plan)["warnings"], timings)


def _loras(loras, keep):
    uses = [(use, 1.0) if isinstance(use, (str, bytes, os.PathLike)) else use for use in loras]
    array = (_native.LoraUse * max(len(uses), 1))()
    for use, (path, weight) in zip(array, uses):
        use.path, use.weight = _text(path), weight
    keep.append(array)
    return array, len(uses)


def _fill(structure, values, keep, *not_these):
    """Set fields of a structure by name; raises EditError for one that is unknown or of the wrong type."""
    kinds = dict(structure._fields_)
    for name, value in values.items():
        if name not in kinds or name in not_these:
            raise EditError("INVALID", name, "unknown option %r" % name)
        if kinds[name] is ctypes.c_char_p:
            value = _text(value)
            keep.append(value)
        try:
            setattr(structure, name, value)
        except TypeError as e:
            raise EditError("INVALID", name, "%s: %s" % (name, e)) from None
        if isinstance(value, int) and getattr(structure, name) != value:  # ctypes keeps the low bits
            raise EditError("INVALID", name, "%s: %d is out of range" % (name, value))


def _edit_options(pictures, prompt, fields):
    o, keep, fields = _lib().qie_edit_options_default(), [], dict(fields)
    single = isinstance(pictures, (str, bytes, bytearray, os.PathLike, Image)) or hasattr(pictures, "convert")
    images = [_image(p) for p in ([pictures] if single else pictures)]
    keep.append(images)
    o.images, o.n_images = (ctypes.c_void_p * max(len(images), 1))(*[i._handle for i in images]), len(images)
    keep.append(_text(prompt))
    o.prompt = keep[-1]
    o.schedule = _choice("schedule", fields.pop("schedule", "auto"), _native.SCHEDULES)
    o.cache = _choice("cache", fields.pop("cache", "off"), _native.CACHES)
    if "loras" in fields:  # () is: none, even if the engine has some
        o.loras, o.n_loras = _loras(fields.pop("loras"), keep)
    o.seed = _lib().qie_seed_random()
    if fields.get("seed", 0) is None:
        del fields["seed"]
    _fill(o, fields, keep, "images", "n_images", "prompt", "n_loras", "injections", "n_injections", "progress", "progress_arg",
          "preview_max_px", "positions", "noise")
    o.keep = keep  # as long as the structure, which the runner may hold longer than the caller
    return o


def _plan_dict(plan):
    def value(v):
        if isinstance(v, bytes):
            return v.decode("utf-8", "replace")
        if isinstance(v, ctypes.Structure):
            return {name: value(getattr(v, name)) for name, _ in v._fields_}
        return v
    out = {name: value(getattr(plan, name)) for name, _ in plan._fields_ if name not in ("images", "loras", "warnings")}
    out["images"] = [value(plan.images[i]) for i in range(plan.n_images)]
    out["loras"] = [value(plan.loras[i]) for i in range(plan.n_loras)]
    out["warnings"] = [plan.warnings[i].value.decode("utf-8", "replace") for i in range(plan.n_warnings)]
    out["cache"] = _native.CACHES[plan.cache]
    return out
