#define _GNU_SOURCE
#include "compute/plugin.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"

/* Candidates in order; the last one leaves the search to the loader. */
static void *load(const char *path, char *why, size_t cap) {
    static const char *const beside[] = {"qie_cuda.so", "../lib/qwen-edit/qie_cuda.so",
                                         "../qie_cuda.so"};
    char self[PATH_MAX - 64], full[PATH_MAX];
    const char *given = path ? path : getenv("QIE_CUDA_PLUGIN");
    if (given && *given) {
        void *lib = dlopen(given, RTLD_NOW | RTLD_LOCAL);
        if (!lib)
            snprintf(why, cap, "%s", dlerror());
        return lib;
    }
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    char *slash = strrchr(self, '/');
    for (size_t i = 0; slash && i < sizeof beside / sizeof *beside; i++) {
        snprintf(full, sizeof full, "%.*s/%s", (int)(slash - self), self, beside[i]);
        if (access(full, R_OK))
            continue;
        void *lib = dlopen(full, RTLD_NOW | RTLD_LOCAL);
        if (lib)
            return lib;
        snprintf(why, cap, "%s", dlerror());
        return NULL;
    }
    void *lib = dlopen("qie_cuda.so", RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        snprintf(why, cap, "%s", dlerror());
    return lib;
}

qie_status qie_plugin_open(const char *path, const qie_plugin **out, qie_error *err) {
    char why[512] = "";
    *out = NULL;
    void *lib = load(path, why, sizeof why);
    QIE_FAIL_IF(!lib, QIE_E_UNAVAILABLE, err, "device", "the GPU back end cannot be loaded: %s",
                why);
    const qie_plugin *(*entry)(void) = NULL;
    void *symbol = dlsym(lib, QIE_PLUGIN_ENTRY);
    memcpy(&entry, &symbol, sizeof entry); /* dlsym gives an object pointer */
    const qie_plugin *p = entry ? entry() : NULL;
    QIE_FAIL_IF(!p || p->api != QIE_PLUGIN_API, QIE_E_UNSUPPORTED, err, "device",
                "the GPU back end is of another version of this program (interface %u, %u is "
                "needed)",
                p ? p->api : 0u, QIE_PLUGIN_API);
    *out = p;
    return QIE_OK;
}
