// One measured process of llama.cpp: what decode.py does, against llama.h. Loads a GGUF file with llama.cpp's defaults
// (memory-mapped, f16 KV cache, flash attention where it thinks it right), on the processor alone, feeds given token
// ids (the prompt at once, then one at a time) and prints one JSON object with decode.py's keys. Logits go to a
// .safetensors file. Links against any llama.cpp since llama_model_load_from_file (January 2025).
//
// usage: llama_stream MODEL.gguf TOKENS.txt PROMPT THREADS MAX_SECONDS LOGITS.safetensors|- HOLDER|0
//   TOKENS.txt: ids between white space; MAX_SECONDS 0: none; HOLDER: a process that holds memory, ended before loading

#include "llama_worker.h"

static void save(const char * path, const float * rows, int n, int vocab) {
    char header[256];
    size_t bytes = (size_t) n * vocab * sizeof(float);
    int size = snprintf(header, sizeof header,
                        "{\"logits\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[0,%zu]}}", n, vocab, bytes);
    while (size % 8) header[size++] = ' ';
    uint64_t length = (uint64_t) size;
    FILE * f = fopen(path, "wb");
    if (!f || fwrite(&length, 8, 1, f) != 1 || fwrite(header, 1, length, f) != length ||
        fwrite(rows, 1, bytes, f) != bytes || fclose(f))
        fail("cannot write the logits");
}

int main(int argc, char ** argv) {
    if (argc != 8) fail("usage: llama_stream MODEL.gguf TOKENS.txt PROMPT THREADS MAX_SECONDS LOGITS|- HOLDER|0");
    const double start = born();
    const int prompt = atoi(argv[3]), threads = atoi(argv[4]);
    const double most = atof(argv[5]);
    int count = 0, room = 1024;
    llama_token * tokens = malloc(room * sizeof *tokens);
    FILE * f = fopen(argv[2], "r");
    if (!f) fail("cannot read the tokens");
    for (int id; fscanf(f, "%d", &id) == 1; tokens[count++] = id)
        if (count == room) tokens = realloc(tokens, (room *= 2) * sizeof *tokens);
    fclose(f);
    if (prompt < 1 || prompt > count || threads < 1)
        fail("PROMPT must be 1 to the number of tokens, THREADS 1 or more");

    llama_log_set(problems_only, NULL);
    ggml_backend_load_all();
    llama_backend_init();
    const double imported = now(CLOCK_BOOTTIME);
    const long long base = status_bytes("VmRSS");
    release(argv[7]);

    const double began = now(CLOCK_MONOTONIC);
    struct llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 0;
    struct llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) fail("llama.cpp cannot load the model");
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = (uint32_t) count + 1;
    if (cp.n_batch < (uint32_t) prompt) cp.n_batch = (uint32_t) prompt;
    cp.n_threads = cp.n_threads_batch = threads;
    struct llama_context * context = llama_init_from_model(model, cp);
    if (!context) fail("llama.cpp cannot make a context");
    const double load_s = now(CLOCK_MONOTONIC) - began;

    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int steps = count - prompt + 1;
    double * times = malloc(steps * sizeof *times);
    int * chosen = malloc(steps * sizeof *chosen);
    float * rows = malloc((size_t) steps * vocab * sizeof *rows);
    double first = 0;
    int done = 0;
    const double decoding = now(CLOCK_MONOTONIC);
    while (done < steps) {
        const double t = now(CLOCK_MONOTONIC);
        struct llama_batch batch =
            done ? llama_batch_get_one(tokens + prompt + done - 1, 1) : llama_batch_get_one(tokens, prompt);
        if (llama_decode(context, batch)) fail("llama_decode failed");
        const float * logits = llama_get_logits_ith(context, -1);
        if (!logits) fail("no logits");
        chosen[done] = best_of(logits, vocab);
        times[done] = now(CLOCK_MONOTONIC) - t;
        memcpy(rows + (size_t) done * vocab, logits, vocab * sizeof *rows);
        if (done++ == 0) first = now(CLOCK_BOOTTIME);
        if (most > 0 && done > 2 && now(CLOCK_MONOTONIC) - decoding > most) break;
    }
    if (strcmp(argv[6], "-")) save(argv[6], rows, done, vocab);

    double decode_s = 0;
    for (int i = 1; i < done; i++) decode_s += times[i];
    printf("{\"engine\": \"llama.cpp\", \"settings\": {\"n_ctx\": %u, \"system\": \"", llama_n_ctx(context));
    print_system();
    printf("\"}, \"prompt_tokens\": %d, \"import_s\": %.6f, \"load_s\": %.6f, \"start_to_first_token_s\": %.6f, "
           "\"ttft_s\": %.6f, \"decode_tokens_per_s\": ", prompt, imported - start, load_s, first - start, times[0]);
    if (decode_s > 0) printf("%.6f", (done - 1) / decode_s);
    else printf("null");
    printf(", \"step_s\": [");
    for (int i = 0; i < done; i++) printf("%s%.5f", i ? ", " : "", times[i]);
    printf("], \"new_tokens\": %d, \"argmax\": [", done);
    for (int i = 0; i < done; i++) printf("%s%d", i ? ", " : "", chosen[i]);
    printf("], \"base_rss_bytes\": %lld, \"peak_rss_bytes\": %lld, \"threads\": %d}\n", base,
           status_bytes("VmHWM"), threads);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
