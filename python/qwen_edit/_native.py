"""libqie as ctypes sees it: the structures of include/qie/*.h and the functions used. tests/api/test_python.py holds every
size and offset against the headers."""
import ctypes
import ctypes.util
import os
import pathlib
from ctypes import (CFUNCTYPE, POINTER, Structure, c_bool, c_char, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint8,
                    c_uint64, c_void_p)

VERSION = "0.1.0"  # of the headers that the structures below repeat
MAX_LORAS, MAX_IMAGES, MAX_WARNINGS = 8, 16, 8
PRECISIONS = ("auto", "f32", "bf16", "int8")
SCHEDULES = ("auto", "model", "lightning")
CACHES = ("off", "balanced", "fast")
PNG, JPEG, WEBP = 1, 2, 3


class Error(Structure):
    C_NAME = "qie_error"
    _fields_ = [("status", c_int), ("param", c_char * 64), ("message", c_char * 960)]


class LoraUse(Structure):
    C_NAME = "qie_lora_use"
    _fields_ = [("path", c_char_p), ("weight", c_double), ("name", c_char_p)]


class EngineOptions(Structure):
    C_NAME = "qie_engine_options"
    _fields_ = [("model", c_char_p), ("transformer", c_char_p), ("text_encoder", c_char_p), ("mmproj", c_char_p),
                ("vae", c_char_p), ("variant", c_char_p), ("precision", c_int), ("n_threads", c_int), ("backend", c_char_p),
                ("memory_limit_bytes", c_int64), ("device", c_char_p), ("gpus", c_char_p), ("gpu_headroom_bytes", c_int64),
                ("gpu_limit_bytes", c_int64), ("gpu_offload_folder", c_char_p), ("collect_importance", c_bool),
                ("loras", POINTER(LoraUse)), ("n_loras", c_size_t)]


class EngineInfo(Structure):
    C_NAME = "qie_engine_info"
    _fields_ = [("model", c_char_p), ("model_name", c_char_p), ("is_demo", c_bool), ("about_en", c_char_p),
                ("about_zh", c_char_p), ("precision", c_char_p), ("activations", c_char_p), ("backend", c_char_p),
                ("placement", c_char_p), ("cpu_level", c_char_p), ("n_threads", c_int), ("n_parameters", c_int64),
                ("weights_bytes", c_int64), ("zero_cond_t", c_bool), ("num_inference_steps", c_int),
                ("true_cfg_scale", c_double), ("keep_size", c_bool), ("max_side", c_int), ("ref_area", c_int64),
                ("lightning", c_bool)]


class Progress(Structure):
    C_NAME = "qie_progress"
    _fields_ = [("stage", c_char_p), ("step", c_int), ("total", c_int), ("i_image", c_int), ("n_images", c_int),
                ("elapsed_s", c_double), ("seconds_left", c_double), ("preview", c_void_p)]


PROGRESS_FN = CFUNCTYPE(None, c_void_p, POINTER(Progress))


class EditOptions(Structure):
    C_NAME = "qie_edit_options"
    _fields_ = [("images", POINTER(c_void_p)), ("n_images", c_size_t), ("prompt", c_char_p), ("negative_prompt", c_char_p),
                ("seed", c_uint64), ("num_inference_steps", c_int), ("true_cfg_scale", c_double),
                ("guidance_scale", c_double), ("max_side", c_int), ("width", c_int), ("height", c_int),
                ("ref_area", c_int64), ("keep_size", c_int), ("num_images", c_int), ("loras", POINTER(LoraUse)),
                ("n_loras", c_size_t), ("schedule", c_int), ("cache", c_int), ("cache_threshold", c_double),
                ("positions", c_int), ("noise", c_int), ("preview_max_px", c_int), ("injections", c_void_p),
                ("n_injections", c_size_t), ("progress", PROGRESS_FN), ("progress_arg", c_void_p)]


class PlanImage(Structure):
    _fields_ = [(name, c_int) for name in ("width", "height", "cond_width", "cond_height", "vae_width", "vae_height",
                                           "n_vision_tokens", "n_latent_tokens")]


class PlanLora(Structure):
    _fields_ = [("name", c_char * 128), ("weight", c_double), ("n_modules", c_int), ("max_rank", c_int)]


class Plan(Structure):
    C_NAME = "qie_edit_plan"
    _fields_ = [("width", c_int), ("height", c_int), ("output_width", c_int), ("output_height", c_int), ("n_images", c_int),
                ("images", PlanImage * MAX_IMAGES), ("n_prompt_tokens", c_int), ("n_negative_tokens", c_int),
                ("n_target_tokens", c_int), ("n_reference_tokens", c_int), ("num_inference_steps", c_int),
                ("true_cfg_scale", c_double), ("cfg", c_bool), ("lightning", c_bool), ("cache", c_int),
                ("n_loras", c_size_t), ("loras", PlanLora * MAX_LORAS), ("vae_tiled", c_bool), ("working_bytes", c_int64),
                ("weights_bytes", c_int64), ("available_bytes", c_int64), ("flops", c_double), ("seconds_estimate", c_double),
                ("placement", c_char * 512), ("n_warnings", c_int), ("warnings", (c_char * 256) * MAX_WARNINGS)]


class EditResult(Structure):
    C_NAME = "qie_edit_result"
    _fields_ = [("images", POINTER(c_void_p)), ("n_images", c_size_t), ("seed", c_uint64), ("plan", Plan),
                ("encode_s", c_double), ("denoise_s", c_double), ("decode_s", c_double), ("total_s", c_double),
                ("retried_f32", c_bool), ("n_forwards", c_int), ("n_skipped", c_int)]


class EncodeOptions(Structure):
    C_NAME = "qie_image_encode_options"
    _fields_ = [("format", c_int), ("quality", c_int), ("compression", c_int), ("parameters", c_char_p)]


STRUCTURES = (Error, LoraUse, EngineOptions, EngineInfo, Progress, EditOptions, Plan, EditResult, EncodeOptions)


def _paths():
    """Where the library may be: QWEN_EDIT_LIBRARY, beside an installed program, the build folder of a checkout."""
    named = os.environ.get("QWEN_EDIT_LIBRARY")
    if named:
        return [named]
    return ["libqie.so.0", os.fspath(pathlib.Path(__file__).resolve().parents[2] / "build" / "libqie.so.0")]


def load():
    """The library with its functions declared. Raises OSError that says what to do when it is nowhere."""
    tried = []
    for path in _paths():
        try:
            lib = ctypes.CDLL(path)
            break
        except OSError as e:
            tried.append(str(e))
    else:
        raise OSError("libqie.so.0 cannot be loaded; build it (sh quickstart.sh) or name it in QWEN_EDIT_LIBRARY: "
                      + "; ".join(tried))
    image, error, text = c_void_p, POINTER(Error), c_void_p  # text: to be released with free()
    for name, result, *arguments in (
            ("qie_version", c_char_p),
            ("qie_status_name", c_char_p, c_int),
            ("qie_engine_options_default", EngineOptions),
            ("qie_engine_open", c_int, POINTER(EngineOptions), POINTER(c_void_p), error),
            ("qie_engine_close", None, c_void_p),
            ("qie_engine_get_info", None, c_void_p, POINTER(EngineInfo)),
            ("qie_edit_options_default", EditOptions),
            ("qie_engine_plan", c_int, c_void_p, POINTER(EditOptions), c_bool, POINTER(Plan), error),
            ("qie_engine_edit", c_int, c_void_p, POINTER(EditOptions), POINTER(EditResult), error),
            ("qie_edit_result_release", None, POINTER(EditResult)),
            ("qie_engine_cancel", None, c_void_p),
            ("qie_engine_reset_cancel", None, c_void_p),
            ("qie_seed_random", c_uint64),
            ("qie_edit_parameters_json", text, c_void_p, POINTER(EditOptions), POINTER(EditResult), c_size_t),
            ("qie_image_create", c_int, c_int, c_int, POINTER(image), error),
            ("qie_image_destroy", None, image),
            ("qie_image_width", c_int, image),
            ("qie_image_height", c_int, image),
            ("qie_image_pixels", c_void_p, image),
            ("qie_image_decode", c_int, c_char_p, c_size_t, c_void_p, POINTER(image), error),
            ("qie_image_load", c_int, c_char_p, c_void_p, POINTER(image), error),
            ("qie_image_format_from_path", c_int, c_char_p),
            ("qie_image_encode_options_default", EncodeOptions),
            ("qie_image_encode", c_int, image, POINTER(EncodeOptions), POINTER(POINTER(c_uint8)), POINTER(c_size_t), error)):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    version = lib.qie_version().decode()
    if version != VERSION:  # the structures grow with the version
        raise OSError("%s is version %s, this package is for %s: use those of one release" % (lib._name, version, VERSION))
    lib.free = ctypes.CDLL(None).free
    lib.free.restype, lib.free.argtypes = None, [c_void_p]
    return lib
