/* Work that each step repeats: called as it is the first time (libraries choose and load what they
 * need), captured as a graph the second time, and queued as that graph from then on: one call of
 * the host in place of a thousand. Only where the weights of every block are held: the slots of a
 * ring hold something else in each step. What cannot be captured runs operation by operation, and
 * that is said once. */
#include <stdio.h>

#include "compute/cuda/cu_c.hpp"
#include "compute/cuda/cu_state.hpp"

/* The lane's cards; false: some block is not held by the one that computes it. */
static bool cards_of(const cu_backend *b, bool on[CU_DEVICES]) {
    for (int d = 0; d < CU_DEVICES; d++)
        on[d] = false;
    for (size_t i = 0; i < b->n_groups; i++) {
        const cu_group *g = &b->groups[i];
        if (g->g->kind != QIE_GROUP_BLOCK)
            continue;
        if (!g->held[g->card[b->lane]])
            return false;
        on[g->card[b->lane]] = true;
    }
    return true;
}

/* The other cards' streams after this one's, or the other way round. */
static void fan_out(cu_backend *b, const cu_repeat *r) {
    for (int d = 0; d < b->n; d++)
        if (r->on[d] && d != r->origin)
            cu_after(b, d, r->origin);
}
static void gather(cu_backend *b, const cu_repeat *r) {
    for (int d = 0; d < b->n; d++)
        if (r->on[d] && d != r->origin)
            cu_after(b, r->origin, d);
}

static void launch(cu_backend *b, cu_repeat *r) {
    gather(b, r);
    if (!b->failed)
        cu_good(b, r->origin, cu_graph_launch(r->graph, b->cards[r->origin].compute));
    fan_out(b, r);
    b->current = r->end;
    b->active = r->active;
}

static void do_without(cu_backend *b, const char *why) {
    char text[384];
    b->graphs = false;
    snprintf(text, sizeof text, "steps run without a CUDA graph, operation by operation: %s", why);
    if (b->options.say)
        b->options.say(b->options.say_arg, text);
}

bool cu_repeat_begin(qie_compute *c, int key, const qie_weight_group *first, const qie_range *live,
                     size_t n_live) {
    cu_backend *b = cu_of(c);
    if (!b->graphs || b->profile || !b->placed || key < 0 || key >= QIE_ASSIGN_LANES)
        return false;
    b->compute.mem->begin_group(c, first, live, n_live, NULL);
    cu_repeat *r = &b->repeats[key];
    if (b->failed || r->times++ == 0)
        return false;
    if (r->graph) {
        launch(b, r);
        return true;
    }
    if (!cards_of(b, r->on))
        return false;
    r->origin = b->current;
    int rc = cu_capture_begin(b->cards[r->origin].compute);
    if (rc == CU_OK) {
        b->noting = r;
        fan_out(b, r);
    } else if (rc == CU_LOST)
        cu_good(b, r->origin, rc);
    else
        do_without(b, cu_text());
    return false;
}

bool cu_repeat_end(qie_compute *c, bool keep) {
    cu_backend *b = cu_of(c);
    cu_repeat *r = b->noting;
    if (!r)
        return true;
    r->end = b->current;
    r->active = b->active;
    gather(b, r);
    int failed = b->failed;
    int rc = cu_capture_end(b->cards[r->origin].compute, &r->graph);
    b->noting = NULL;
    b->failed = CU_OK; /* nothing of it ran; a card that is lost says so again */
    if (rc == CU_OK && !failed && keep) {
        launch(b, r);
        return true;
    }
    cu_graph_destroy(r->graph);
    r->graph = NULL;
    if (failed == CU_LOST)
        b->failed = failed; /* `why` names its card */
    else if (rc == CU_LOST)
        cu_good(b, r->origin, rc);
    if (!keep || b->failed)
        return true;
    do_without(b, failed ? b->why : cu_text());
    b->current = r->origin;
    return false;
}

void cu_repeat_forget(qie_compute *c) {
    cu_backend *b = cu_of(c);
    for (cu_repeat &r : b->repeats) {
        cu_graph_destroy(r.graph);
        r = cu_repeat();
    }
}
