"""Cards for tests without one: the driver (fakenvml.c) and the runtime (tests/cuda/double.cpp) say the same of them."""
import os
import tempfile

UUID = "GPU-0000000%d-0000-0000-0000-000000000000"
RUNTIME = 768  # MiB that a context takes of what the driver calls free


def cards(tests, frees, double="", cc=(8, 0)):
    """Environment of cards with so many MiB free, and the file that has to live as long. tests: folder of what was built."""
    script = tempfile.NamedTemporaryFile("w", suffix=".txt")
    for i, mib in enumerate(frees):
        script.write("gpu Double %d|%s|%d|%d|0|%d|%d|0|0\n" % (i, UUID % i, max(frees) << 20, mib << 20, *cc))
    script.flush()
    return {"QIE_NVML": os.path.join(tests, "fakenvml.so"), "FAKE_NVML": script.name,
            "QIE_CUDA_PLUGIN": os.path.join(tests, "qie_cuda_double.so"),
            "QIE_CUDA_DOUBLE": "devices=%d,memory=%s%s" % (len(frees), ":".join(str(m - RUNTIME) for m in frees), double)}, script
