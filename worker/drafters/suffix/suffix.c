/* The suffix index: which tokens followed a context of 1, 2, 3, 5 … tokens, how often, and how often that was right.
 *
 * A slot is one cache line: a context of one group and its last followers, the newest first. Slots are in pairs; of a
 * full pair the one that was not written for longer gives way. Pairs are taken as they are needed.
 * `python_kernels.py` computes the same, bit for bit. */

#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef uint64_t u64;
typedef uint32_t u32;
typedef int32_t i32;
typedef uint8_t u8;

typedef struct {
    i32 token;
    u32 writer; /* the text that had it last */
    u32 count;  /* 0: none */
} follower_t;

/* `SLOT` of memory.py */
typedef struct {
    u64 hash; /* of the context; 0: empty */
    u32 group, stamp;
    follower_t followers[FOLLOWERS];
} slot_t;

/* `TEXT` of memory.py: a sequence that is decoded */
typedef struct {
    u32 group, prompt, output; /* the last two as writers */
    u32 length;                /* tokens in `tail`, which ends with the newest */
    i32 tail[CONTEXT];
} text_t;

/* `IndexLayout` of memory.py */
typedef struct {
    slot_t *slots;
    text_t *texts;
    double *held, *trials; /* [classes] */
    const i64 *orders;     /* tokens of a context, ascending */
    const double *edges;   /* [EDGES] shares */
    u64 pair_mask, max_pair_mask;
    i64 used; /* slots */
    i64 order_count, always;
    double decay;
    u32 clock;
} index_t;

/* what a token is to the index */
enum { CONTEXT_ONLY, PROMPT, OUTPUT, FORCED, RETRACTED };

typedef struct {
    i64 count;
    u64 hashes[MAX_ORDERS];
} contexts_t;

typedef struct {
    i64 token, class;
    double probability;
} offer_t;

static u64 mixed(u64 h) {
    h ^= h >> 32;
    h *= 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

static slot_t *pair_of(const index_t *x, u64 hash) { return x->slots + 2 * (hash >> 8 & x->pair_mask); }

/* Hash the last tokens before `end`, of which there are `length`, for every order. */
static void hash_contexts(const index_t *x, u32 group, const i32 *end, i64 length, contexts_t *found) {
    u64 h = group;
    i64 order = 0;
    for (i64 i = 1; i <= length && order < x->order_count; i++) {
        h = mixed(h + (u32)end[-i] + 1);
        if (i != x->orders[order]) continue;
        found->hashes[order++] = h | 1;
        __builtin_prefetch(pair_of(x, h | 1));
        __builtin_prefetch(pair_of(x, h | 1) + 1);
    }
    found->count = order;
}

static slot_t *find(const index_t *x, u64 hash, u32 group) {
    slot_t *pair = pair_of(x, hash);
    for (i64 i = 0; i < 2; i++)
        if (pair[i].hash == hash && pair[i].group == group) return pair + i;
    return 0;
}

/* Return a new slot for a context, in the place of the one that was not written for longer. */
static slot_t *claim(index_t *x, u64 hash, u32 group) {
    slot_t *pair = pair_of(x, hash), *slot = pair;
    if (pair->hash && (!pair[1].hash || x->clock - pair[1].stamp > x->clock - pair->stamp)) slot = pair + 1;
    x->used += !slot->hash;
    memset(slot, 0, sizeof *slot);
    slot->hash = hash;
    slot->group = group;
    return slot;
}

/* Take as many pairs again, and move the contexts whose hash says so to their new pairs. */
static void split(index_t *x) {
    u64 pairs = x->pair_mask + 1;
    for (u64 i = 0; i < 2 * pairs; i++) {
        if (!(x->slots[i].hash >> 8 & pairs)) continue;
        x->slots[i + 2 * pairs] = x->slots[i];
        memset(x->slots + i, 0, sizeof *x->slots);
    }
    x->pair_mask = 2 * pairs - 1;
}

/* ---- what to offer ---- */

/* Return the class of a follower: order, what a longer context says, share of the context, and whether it is of the
 * same text. */
static i64 class_of(const index_t *x, i64 order, i64 below, u32 count, u32 total, i64 own) {
    i64 kind = count < 3 ? count - 1 : 2;
    if (count < total) {
        double share = (double)count / total;
        kind = 3;
        while (kind < 3 + EDGES && share >= x->edges[kind - 3]) kind++;
    }
    return ((order * 3 + below) * (4 + EDGES) + kind) * 2 + own;
}

/* Write the followers of the longest context, then the others of shorter ones; return their number. */
static i64 offers_of(const index_t *x, const contexts_t *contexts, const text_t *text, offer_t *out) {
    i64 found = 0, below = 0;
    for (i64 order = contexts->count - 1; order >= 0 && found < MAX_OFFERS; order--) {
        const slot_t *slot = find(x, contexts->hashes[order], text->group);
        if (!slot) continue;
        i64 size = 0;
        u32 total = 0;
        for (; size < FOLLOWERS && slot->followers[size].count; size++) total += slot->followers[size].count;
        for (i64 i = 0; i < size && found < MAX_OFFERS; i++) {
            follower_t one = slot->followers[i];
            i64 known = 0;
            while (known < found && out[known].token != one.token) known++;
            if (known < found) continue;
            i64 own = one.writer == text->prompt || one.writer == text->output;
            i64 class = class_of(x, order, below, one.count, total, own);
            offer_t offer = {one.token, class, x->held[class] / x->trials[class]};
            out[found++] = offer;
        }
        if (!below) below = size == 1 ? 1 : 2;
    }
    return found;
}

/* Offer the children of the nodes `frontier` [count]: tokens and probabilities [count, width], the best first.
 *
 * `rows` [trees] are the texts of the trees; `tree`, `parent` and `token` [nodes] the columns of the nodes. */
void lookup(const index_t *x, const i64 *rows, const i64 *tree, const i64 *parent, const i64 *token, const i64 *frontier,
            i64 count, i64 width, i64 *tokens, double *probabilities) {
    contexts_t contexts;
    offer_t offers[MAX_OFFERS];
    for (i64 row = 0; row < count; row++) {
        const text_t *text = x->texts + rows[tree[frontier[row]]];
        i32 recent[2 * CONTEXT], *end = recent + 2 * CONTEXT;
        i64 length = 0;
        for (i64 node = frontier[row]; parent[node] >= 0 && length < CONTEXT; node = parent[node])
            end[-++length] = token[node];
        memcpy(end - length - CONTEXT, text->tail, sizeof text->tail);
        hash_contexts(x, text->group, end, length + text->length, &contexts);
        i64 found = offers_of(x, &contexts, text, offers);
        double sum = 0.0;
        for (i64 i = 0; i < found; i++) {
            offer_t offer = offers[i];
            i64 at = i;
            for (; at && offers[at - 1].probability < offer.probability; at--) offers[at] = offers[at - 1];
            offers[at] = offer;
            sum += offer.probability;
        }
        for (i64 i = 0; i < width; i++) {
            tokens[row * width + i] = i < found ? offers[i].token : 0;
            probabilities[row * width + i] = i < found ? offers[i].probability / (sum > 1.0 ? sum : 1.0) : 0.0;
        }
    }
}

/* ---- reading ---- */

/* Count what the target drew for every follower that would have been offered. */
static void learn(const index_t *x, const contexts_t *contexts, const text_t *text, i32 token) {
    offer_t offers[MAX_OFFERS];
    i64 found = offers_of(x, contexts, text, offers);
    for (i64 i = 0; i < found; i++) {
        i64 class = offers[i].class;
        x->trials[class] = x->trials[class] * x->decay + 1.0;
        x->held[class] = x->held[class] * x->decay + (offers[i].token == token);
    }
}

/* Return the place of a token among the followers; if it is not there, the last place, or of equals in count the oldest. */
static i64 place_of(const slot_t *slot, i32 token) {
    i64 place = 0, rarest = FOLLOWERS - 1;
    for (; place < FOLLOWERS && slot->followers[place].count; place++)
        if (slot->followers[place].token == token) return place;
    if (place < FOLLOWERS) return place;
    for (place = FOLLOWERS - 2; place > 0; place--)
        if (slot->followers[place].count < slot->followers[rarest].count) rarest = place;
    return rarest;
}

/* Count a follower of every known context, and of the first unknown one. */
static void insert(index_t *x, const contexts_t *contexts, u32 group, u32 writer, i32 token) {
    i64 shorter = 1; /* whether the context before was known */
    x->clock++;
    if (x->used > (i64)x->pair_mask && x->pair_mask < x->max_pair_mask) split(x); /* half of the slots are used */
    for (i64 order = 0; order < contexts->count; order++) {
        slot_t *slot = find(x, contexts->hashes[order], group);
        if (!slot && !shorter && x->orders[order] > x->always) return;
        shorter = slot != 0;
        if (!slot) slot = claim(x, contexts->hashes[order], group);
        slot->stamp = x->clock;
        i64 place = place_of(slot, token);
        follower_t *one = slot->followers + place;
        u32 count = one->count && one->token == token ? one->count + 1 : 1;
        memmove(slot->followers + 1, slot->followers, place * sizeof *one);
        slot->followers[0] = (follower_t){token, writer, count};
        for (i64 i = 0; count > MAX_COUNT && i < FOLLOWERS; i++)
            slot->followers[i].count = (slot->followers[i].count + 1) / 2;
    }
}

/* Take back what `insert` counted once. */
static void retract(index_t *x, const contexts_t *contexts, u32 group, i32 token) {
    for (i64 order = 0; order < contexts->count; order++) {
        slot_t *slot = find(x, contexts->hashes[order], group);
        for (i64 i = 0; slot && i < FOLLOWERS; i++) {
            follower_t *one = slot->followers + i;
            if (!one->count || one->token != token) continue;
            if (--one->count) break;
            memmove(one, one + 1, (FOLLOWERS - 1 - i) * sizeof *one);
            memset(slot->followers + FOLLOWERS - 1, 0, sizeof *one);
            if (!slot->followers[0].count) {
                memset(slot, 0, sizeof *slot);
                x->used--;
            }
            break;
        }
    }
}

/* Read the next tokens of the texts `rows` [count]: `counts` [count] each, `tokens` and their `kinds` one after another. */
void read_tokens(index_t *x, const i64 *rows, const i64 *counts, i64 count, const i64 *tokens, const u8 *kinds) {
    contexts_t contexts;
    for (i64 i = 0, at = 0; i < count; i++) {
        text_t *text = x->texts + rows[i];
        for (i64 last = at + counts[i]; at < last; at++) {
            i32 token = (i32)tokens[at];
            if (kinds[at] != CONTEXT_ONLY) hash_contexts(x, text->group, text->tail + CONTEXT, text->length, &contexts);
            if (kinds[at] == OUTPUT) learn(x, &contexts, text, token);
            if (kinds[at] == RETRACTED) retract(x, &contexts, text->group, token);
            else if (kinds[at] != CONTEXT_ONLY)
                insert(x, &contexts, text->group, kinds[at] == PROMPT ? text->prompt : text->output, token);
            memmove(text->tail, text->tail + 1, (CONTEXT - 1) * sizeof token);
            text->tail[CONTEXT - 1] = token;
            text->length += text->length < CONTEXT;
        }
    }
}
