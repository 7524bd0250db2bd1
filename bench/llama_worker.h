// What the measured processes of llama.cpp share: clocks, memory, the holder of memory, a quiet log.

#pragma once

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ggml-backend.h"
#include "llama.h"

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void fail(const char * what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// the fields after the name, which is in parentheses and may hold anything; empty when there is no such process
static const char * stat_fields(const char * pid, char * line, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    FILE * f = fopen(path, "r");
    line[0] = 0;
    if (f) {
        if (!fgets(line, (int) size, f)) line[0] = 0;
        fclose(f);
    }
    const char * end = strrchr(line, ')');
    return end ? end + 2 : line;
}

// when this process was started, on CLOCK_BOOTTIME
static double born(void) {
    char line[1024];
    const char * at = stat_fields("self", line, sizeof line);
    for (int field = 3; field < 22 && at; field++) at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL;
    return at ? atof(at) / sysconf(_SC_CLK_TCK) : now(CLOCK_BOOTTIME);
}

static long long status_bytes(const char * key) {
    char line[256];
    long long kb = 0;
    FILE * f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key))) kb = atoll(line + strlen(key) + 1);
    if (f) fclose(f);
    return kb << 10;
}

// end the process that holds memory and return when its memory is free: it is gone, or a zombie
static void release(const char * pid) {
    char line[1024];
    if (atol(pid) <= 0) return;
    kill((pid_t) atol(pid), SIGKILL);
    for (int i = 0; i < 1000; i++) {
        char state = *stat_fields(pid, line, sizeof line);
        if (state == 0 || state == 'Z') return;
        usleep(10000);
    }
}

static void problems_only(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static int best_of(const float * logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

// as the inside of a JSON string: what would need escaping is left out
static void print_system(void) {
    for (const char * c = llama_print_system_info(); *c; c++)
        if (*c >= ' ' && *c != '"' && *c != '\\') putchar(*c);
}
