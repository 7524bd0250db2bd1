// One measured process of llama.cpp with many requests: continuous batching over llama.h as its examples/parallel and
// its server do it. Every step decodes one token of each running sequence and fills what is left of the chunk with
// prompts; a sequence that is done leaves at once, and the next request takes its place where its keys and values have
// room. Memory-mapped file, f16 KV cache, greedy, no end token, on the processor alone. Prints one JSON object.
//
// usage: llama_batch MODEL.gguf REQUESTS.txt PARALLEL CONTEXT CHUNK unified|each THREADS MAX_SECONDS HOLDER|0
//   REQUESTS.txt: a line of numbers per request: new tokens, prompt tokens, the prompt's ids
//   CONTEXT: tokens of KV, all sequences together; `each`: divided among the sequences, else one buffer for all
//   CHUNK: tokens of a step at most (n_batch and n_ubatch); MAX_SECONDS 0: none
//   HOLDER: a process that holds memory, ended before loading

#include "llama_worker.h"

struct request {
    int wanted, length, fed, made;  // new tokens, prompt tokens; of both what has been computed
    int seq;                        // -1: not running
    int row;                        // of the step's batch that chooses its next token, -1: none
    double done_s;
    llama_token * prompt, * answer;
};

struct step {
    double seconds;
    int prompt, decoded;  // tokens computed
};

static struct request * read_requests(const char * path, int * count) {
    FILE * f = fopen(path, "r");
    struct request * all = NULL;
    int wanted, length;
    *count = 0;
    if (!f) fail("cannot read the requests");
    while (fscanf(f, "%d %d", &wanted, &length) == 2) {
        if (wanted < 1 || length < 1 || length > 1 << 24) fail("a request is not as it should be");
        all = realloc(all, (size_t) (*count + 1) * sizeof *all);
        struct request r = {.wanted = wanted, .length = length, .seq = -1, .row = -1};
        r.prompt = malloc((size_t) length * sizeof *r.prompt);
        r.answer = malloc((size_t) wanted * sizeof *r.answer);
        for (int i = 0; i < length; i++)
            if (fscanf(f, "%d", r.prompt + i) != 1) fail("a request is cut off");
        all[(*count)++] = r;
    }
    fclose(f);
    if (!*count) fail("there are no requests");
    return all;
}

// bytes that storage gave this process, page faults of mapped files included
static long long read_bytes(void) {
    char line[128];
    long long n = -1;
    FILE * f = fopen("/proc/self/io", "r");
    while (f && fgets(line, sizeof line, f)) sscanf(line, "read_bytes: %lld", &n);
    if (f) fclose(f);
    return n;
}

static void add(struct llama_batch * b, llama_token token, int pos, int seq, bool output) {
    b->token[b->n_tokens] = token;
    b->pos[b->n_tokens] = pos;
    b->n_seq_id[b->n_tokens] = 1;
    b->seq_id[b->n_tokens][0] = seq;
    b->logits[b->n_tokens++] = output;
}

// cells of KV a request fills: its last token is never fed
static int cells(const struct request * r) { return r->length + r->wanted - 1; }

int main(int argc, char ** argv) {
    if (argc != 10) fail("usage: llama_batch MODEL REQUESTS PARALLEL CONTEXT CHUNK unified|each THREADS MAX_S HOLDER|0");
    const double start = born();
    const int parallel = atoi(argv[3]), chunk = atoi(argv[5]), threads = atoi(argv[7]);
    const bool unified = !strcmp(argv[6], "unified");
    const double most = atof(argv[8]);
    int count;
    struct request * all = read_requests(argv[2], &count);
    if (parallel < 1 || parallel > chunk || threads < 1)
        fail("PARALLEL must be 1 to CHUNK, so that every sequence decodes in every step; THREADS 1 or more");

    llama_log_set(problems_only, NULL);
    ggml_backend_load_all();
    llama_backend_init();
    const double imported = now(CLOCK_BOOTTIME);
    const long long base = status_bytes("VmRSS");
    release(argv[9]);

    const double began = now(CLOCK_MONOTONIC);
    const long long before = read_bytes();
    struct llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    struct llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) fail("llama.cpp cannot load the model");
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = (uint32_t) atoi(argv[4]);
    cp.n_seq_max = (uint32_t) parallel;
    cp.n_batch = cp.n_ubatch = (uint32_t) chunk;
    cp.n_threads = cp.n_threads_batch = threads;
    cp.kv_unified = unified;
    struct llama_context * context = llama_init_from_model(model, cp);
    if (!context) fail("llama.cpp cannot make a context");
    llama_memory_t memory = llama_get_memory(context);
    const int room = (int) llama_n_ctx(context), each = unified ? room : room / parallel;
    for (int i = 0; i < count; i++)
        if (cells(all + i) > each) fail("CONTEXT is too small for a request");
    const double load_s = now(CLOCK_MONOTONIC) - began;
    const long long loaded = read_bytes();

    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_batch batch = llama_batch_init(chunk, 0, 1);
    struct request ** running = malloc((size_t) parallel * sizeof *running);  // in order of arrival
    bool * taken = calloc((size_t) parallel, sizeof *taken);
    struct step * steps = NULL;
    int n_steps = 0, n_running = 0, next = 0, held = 0;
    const double first = now(CLOCK_MONOTONIC);
    double last = first;
    while (n_running || next < count) {
        while (next < count && n_running < parallel && (!unified || held + cells(all + next) <= room)) {
            struct request * r = all + next++;
            for (r->seq = 0; taken[r->seq]; r->seq++) {}
            taken[r->seq] = true;
            held += cells(r);
            running[n_running++] = r;
        }
        struct step s = {0};
        batch.n_tokens = 0;
        for (int i = 0; i < n_running; i++) {
            struct request * r = running[i];
            r->row = -1;
            if (r->fed < r->length) continue;
            r->row = batch.n_tokens;
            add(&batch, r->answer[r->made - 1], r->length + r->made - 1, r->seq, true);
            s.decoded++;
        }
        for (int i = 0; i < n_running; i++) {
            struct request * r = running[i];
            for (; r->fed < r->length && batch.n_tokens < chunk; s.prompt++) {
                const bool output = r->fed == r->length - 1;
                if (output) r->row = batch.n_tokens;
                add(&batch, r->prompt[r->fed], r->fed, r->seq, output);
                r->fed++;
            }
        }
        if (llama_decode(context, batch)) fail("llama_decode failed");
        int still = 0;
        for (int i = 0; i < n_running; i++) {
            struct request * r = running[i];
            if (r->row >= 0) {
                const float * logits = llama_get_logits_ith(context, r->row);
                if (!logits) fail("no logits");
                r->answer[r->made++] = best_of(logits, vocab);
            }
            if (r->made == r->wanted) {
                llama_memory_seq_rm(memory, r->seq, -1, -1);
                taken[r->seq] = false;
                held -= cells(r);
                r->done_s = now(CLOCK_MONOTONIC) - first;
            } else {
                running[still++] = r;
            }
        }
        n_running = still;
        s.seconds = now(CLOCK_MONOTONIC) - last;
        last += s.seconds;
        steps = realloc(steps, (size_t) (n_steps + 1) * sizeof *steps);
        steps[n_steps++] = s;
        if (most > 0 && last - first > most) break;
    }

    printf("{\"engine\": \"llama.cpp\", \"settings\": {\"parallel\": %d, \"context\": %d, \"chunk\": %d, \"kv\": \"%s\", "
           "\"system\": \"", parallel, room, chunk, unified ? "unified" : "each");
    print_system();
    printf("\"}, \"import_s\": %.6f, \"load_s\": %.6f, \"job_s\": %.6f, \"steps\": [", imported - start, load_s,
           last - first);
    for (int i = 0; i < n_steps; i++)
        printf("%s[%.5f, %d, %d]", i ? ", " : "", steps[i].seconds, steps[i].prompt, steps[i].decoded);
    printf("], \"answers\": [");
    for (int i = 0; i < count; i++) {
        printf("%s[", i ? ", " : "");
        for (int k = 0; k < all[i].made; k++) printf("%s%d", k ? ", " : "", all[i].answer[k]);
        printf("]");
    }
    printf("], \"done_s\": [");
    for (int i = 0; i < count; i++) {
        if (i) printf(", ");
        if (all[i].made == all[i].wanted) printf("%.5f", all[i].done_s);
        else printf("null");
    }
    printf("], \"load_bytes_read\": %lld, \"bytes_read\": %lld, \"base_rss_bytes\": %lld, \"peak_rss_bytes\": %lld, "
           "\"threads\": %d}\n", loaded - before, read_bytes() - loaded, base, status_bytes("VmHWM"), threads);
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
