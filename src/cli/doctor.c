/* The command doctor. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/model_choice.h"
#include "cli/place.h"
#include "hub/cache.h"
#include "hub/doctor.h"

#define SERVICE_PORT 7860

/* ------------------------------------------------------------------ settings */

static const char *source_name(cli_source s) {
    static const char *const names[] = {"default", "config file", "environment", "flag", "request"};
    return names[s];
}

static void setting(qie_json *list, const char *name, const char *value, const char *origin) {
    qie_json *o = qie_json_new_object();
    qie_json_put(o, "name", qie_json_new_string(name));
    qie_json_put(o, "value", qie_json_new_string(value));
    qie_json_put(o, "origin", qie_json_new_string(origin));
    qie_json_push(list, o);
}

/* Variables in force; what may hold a password is shown without it. */
static qie_json *settings(const cli_values *v, const qie_hub_settings *hub, const char *cache,
                          const char *cache_from) {
    static const char *const names[] = {"QWEN_EDIT_2511_DIR",
                                        "QWEN_EDIT_FORCE_CPU",
                                        "QWEN_EDIT_MAX_CPU_THREADS",
                                        "QWEN_EDIT_NICE",
                                        "QWEN_EDIT_MAX_CONCURRENCY",
                                        "QWEN_EDIT_OFFLOAD_FOLDER",
                                        "OMP_NUM_THREADS",
                                        "MKL_NUM_THREADS",
                                        "CUDA_VISIBLE_DEVICES",
                                        "CUDA_DEVICE_ORDER",
                                        "HF_HOME",
                                        "HF_HUB_CACHE",
                                        "HUGGINGFACE_HUB_CACHE",
                                        "HF_HUB_OFFLINE",
                                        "PYTORCH_ALLOC_CONF",
                                        "PYTORCH_CUDA_ALLOC_CONF",
                                        "NO_PROXY",
                                        "no_proxy",
                                        "SSL_CERT_FILE"};
    qie_json *list = qie_json_new_array();
    char text[64];
    setting(list, "model", cli_text(v, OPT_MODEL, "(not named)"),
            source_name(cli_get(v, OPT_MODEL)->source));
    snprintf(text, sizeof text, "%.3g GiB", cli_number(v, OPT_HEADROOM, QIE_DEFAULT_HEADROOM_GIB));
    setting(list, "headroom", text, source_name(cli_get(v, OPT_HEADROOM)->source));
    setting(list, "cache", cache, cache_from);
    for (size_t i = 0; i < hub->n_endpoints; i++)
        setting(list, "endpoint", hub->endpoints[i].url, hub->endpoint_origin);
    setting(list, "token", hub->token[0] ? "set" : "none",
            hub->token[0] ? hub->token_origin : "default");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *value = getenv(names[i]);
        if (value && *value)
            setting(list, names[i], value, "environment");
    }
    char proxy[300];
    if (hub->n_endpoints) {
        qie_http_proxy_for(hub->endpoints[0].url, proxy, sizeof proxy);
        setting(list, "proxy", proxy[0] ? proxy : "none", proxy[0] ? "environment" : "default");
    }
    return list;
}

/* Words of ours in the list, in Chinese; names and values stay as they are. */
static const char *in_chinese(const char *text) {
    static const char *const words[][2] = {{"default", "默认"},
                                           {"config file", "配置文件"},
                                           {"environment", "环境变量"},
                                           {"flag", "命令行"},
                                           {"none", "无"},
                                           {"set", "已设置"},
                                           {"(not named)", "（未指定）"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (!strcmp(text, words[i][0]))
            return words[i][1];
    return text;
}

static void print_setting_row(const qie_json *o, bool zh) {
    const char *name = NULL, *value = NULL, *origin = NULL;
    qie_json_get_string(o, "name", "", &name, NULL);
    qie_json_get_string(o, "value", "", &value, NULL);
    qie_json_get_string(o, "origin", "", &origin, NULL);
    if (zh)
        printf("          %-26s %s（%s）\n", name, in_chinese(value), in_chinese(origin));
    else
        printf("          %-26s %s  (%s)\n", name, value, origin);
}

/* ------------------------------------------------------------------ output */

static const char *const LEVEL_NAMES[] = {"ok", "info", "warn", "fail"};

static void print_text(const qie_doctor_report *r, const qie_json *list, bool zh) {
    static const char *const zh_names[] = {"正常", "信息", "注意", "失败"};
    for (size_t i = 0; i < r->n; i++) {
        const qie_doctor_check *c = &r->checks[i];
        printf("%-6s  %s\n", zh ? zh_names[c->level] : LEVEL_NAMES[c->level], c->text);
        if (c->remedy[0])
            printf("          -> %s\n", c->remedy);
    }
    printf(zh ? "设置\n" : "settings\n");
    for (size_t i = 0; i < qie_json_size(list); i++)
        print_setting_row(qie_json_at(list, i), zh);
    printf(zh ? "\n下一步：%s\n" : "\nnext: %s\n", r->next);
}

static void print_json(qie_doctor_report *r, qie_json *list) {
    qie_json *checks = qie_json_new_array();
    for (size_t i = 0; i < r->n; i++) {
        const qie_doctor_check *c = &r->checks[i];
        qie_json *o = qie_json_new_object();
        qie_json_put(o, "id", qie_json_new_string(c->id));
        qie_json_put(o, "level", qie_json_new_string(LEVEL_NAMES[c->level]));
        qie_json_put(o, "text", qie_json_new_string(c->text));
        qie_json_put(o, "remedy",
                     c->remedy[0] ? qie_json_new_string(c->remedy) : qie_json_new_null());
        qie_json_push(checks, o);
    }
    qie_json *o = r->details;
    qie_json_put(o, "ok", qie_json_new_bool(r->n_failed == 0));
    qie_json_put(o, "failed", qie_json_new_int(r->n_failed));
    qie_json_put(o, "warned", qie_json_new_int(r->n_warned));
    qie_json_put(o, "checks", checks);
    qie_json_put(o, "settings", list);
    qie_json_put(o, "next", qie_json_new_string(r->next));
    qie_json_put(o, "version", qie_json_new_string(QIE_VERSION));
    qie_json_put(o, "seconds", qie_json_new_double(r->seconds));
    char *text = qie_json_text(o, 0);
    puts(text ? text : "{}");
    free(text);
}

qie_status cli_run_doctor(cli_values *v, qie_error *err) {
    qie_hub_settings hub;
    char *model = NULL, *cache = NULL, *plugin = cli_find_plugin();
    const char *cache_from = "", *root = getenv("QIE_ROOT"), *cpu = getenv("QWEN_EDIT_FORCE_CPU");
    const cli_value *endpoint = cli_get(v, OPT_ENDPOINT);
    qie_error model_error = {0};
    QIE_FAIL_IF(v->n_args, QIE_E_USAGE, err, "argument",
                "doctor takes no argument; name a model with --model");
    qie_status st = qie_hub_settings_read(endpoint->texts, endpoint->n, &hub, err);
    if (st == QIE_OK)
        st = qie_cache_dir(&cache, &cache_from, err);
    if (st != QIE_OK) {
        free(plugin);
        return st;
    }
    bool named = cli_is_set(v, OPT_MODEL);
    /* A partial copy in the cache is looked at, not passed over for the demo. */
    if (named)
        cli_choose_model(v, &model, &named, &model_error);
    else if (qie_hub_find_snapshot(QIE_HUB_DEFAULT_REPO, NULL, &model, NULL) != QIE_OK)
        model = NULL;
    bool demo = model && !strcmp(model, "demo");
    qie_doctor_options o = {
        .root = root ? root : "",
        .model = cli_text(v, OPT_MODEL, NULL),
        .model_dir = demo ? NULL : model,
        .is_demo = demo,
        .model_error = model_error.status ? model_error.message : NULL,
        .hub = &hub,
        .cache = cache,
        .headroom = (int64_t)(cli_number(v, OPT_HEADROOM, QIE_DEFAULT_HEADROOM_GIB) * 1073741824.0),
        .cuda_visible = getenv("CUDA_VISIBLE_DEVICES"),
        .force_cpu = cpu && *cpu && strcmp(cpu, "0"),
        .plugin = plugin,
        .port = SERVICE_PORT,
        .chinese = cli_speaks_chinese(),
    };
    qie_doctor_report *r = malloc(sizeof *r);
    if (r) {
        qie_doctor_run(&o, r);
        qie_json *list = settings(v, &hub, cache, cache_from);
        explicit_bzero(hub.token, sizeof hub.token);
        if (cli_on(v, OPT_JSON))
            print_json(r, list);
        else {
            print_text(r, list, o.chinese);
            qie_json_free(list);
        }
        st = r->n_failed ? QIE_E_UNHEALTHY : QIE_OK;
        qie_doctor_release(r);
    } else
        st = qie_fail(err, QIE_E_NO_MEMORY, NULL, "out of memory");
    free(r);
    free(model);
    free(cache);
    free(plugin);
    return st;
}
