/* Threads that are kept between calls, asleep on a futex after a short spin, and memory that is too.
 *
 * One call at a time uses them; a second at the same time works alone.
 */
#include "kernels.h"
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_THREADS 256
#define SPIN 2000      /* pauses before a thread goes to sleep: a few microseconds to tens of them */

void relax(int *turns) {
    if (++*turns < 256)
        PAUSE();
    else
        sched_yield(); /* the thread waited for may want this core */
}

#define OPEN (1 << 30) /* there is a job to join */
#define ROOM (1 << 12) /* bits 12 to 23: how many more may join; below: how many are inside */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_uint epoch;   /* raised with every job; what sleepers sleep on */
static atomic_int door;     /* OPEN, ROOM, inside */
static atomic_int sleepers;
static int helpers;         /* threads there are; under in_use */
static void *_Atomic current; /* the job, and what is to be done with it */
static void (*_Atomic task)(void *);
static void *kept;          /* the last call's scratch memory; under in_use */
static size_t kept_size;

static void futex(atomic_uint *at, int what, unsigned value) {
    syscall(SYS_futex, at, what | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void *help(void *start) {
    unsigned seen = (unsigned)(uintptr_t)start;
    for (;;) {
        unsigned now;
        for (int i = 0; (now = atomic_load(&epoch)) == seen && i < SPIN; i++)
            PAUSE();
        if (now == seen) {
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&epoch) == seen)
                futex(&epoch, FUTEX_WAIT, seen);
            atomic_fetch_sub(&sleepers, 1);
            now = atomic_load(&epoch);
        }
        seen = now;
        int d = atomic_load(&door);
        while ((d & OPEN) && ((d / ROOM) & 0xfff))
            if (atomic_compare_exchange_weak(&door, &d, d - ROOM + 1)) {
                atomic_load(&task)(atomic_load(&current));
                atomic_fetch_sub(&door, 1);
                break;
            }
    }
    return NULL;
}

static void in_child(void) { /* only the thread that forked lives on */
    helpers = 0;
    atomic_store(&door, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&in_use, NULL);
}

static void at_first(void) { pthread_atfork(NULL, NULL, in_child); }

static void hire(int wanted) {
    sigset_t all, before;
    pthread_attr_t attr;
    if (helpers >= wanted || pthread_attr_init(&attr))
        return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 256 << 10);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that were here before */
    while (helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attr, help, (void *)(uintptr_t)atomic_load(&epoch)))
            break;
        helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

static void together(int threads, void (*work)(void *), void *job) {
    int wanted = (threads < MOST_THREADS ? threads : MOST_THREADS) - 1;
    hire(wanted);
    int others = helpers < wanted ? helpers : wanted;
    atomic_store(&task, work);
    atomic_store(&current, job);
    atomic_store(&door, OPEN | others * ROOM);
    atomic_fetch_add(&epoch, 1);
    if (atomic_load(&sleepers))
        futex(&epoch, FUTEX_WAKE, (unsigned)others);
    work(job);
    /* nothing is left to take: let nobody in, and wait for those who are still at their last block */
    int turns = 0;
    atomic_fetch_and(&door, ROOM - 1);
    while (atomic_load(&door))
        relax(&turns);
}

static char *aligned(void *memory) { return (char *)(((uintptr_t)memory + 63) / 64 * 64); }

void *enter(Turn *turn, size_t need) {
    need += 64;
    pthread_once(&once, at_first);
    turn->alone = pthread_mutex_trylock(&in_use) != 0;
    if (turn->alone) {
        turn->memory = malloc(need);
    } else {
        if (need > kept_size) {
            free(kept);
            kept = malloc(need);
            kept_size = kept ? need : 0;
        }
        turn->memory = kept;
    }
    if (!turn->memory) {
        if (!turn->alone)
            pthread_mutex_unlock(&in_use);
        return NULL;
    }
    return aligned(turn->memory);
}

void share(const Turn *turn, int threads, void (*work)(void *), void *job) {
    if (turn->alone || threads <= 1)
        work(job);
    else
        together(threads, work, job);
}

void leave(Turn *turn) {
    if (turn->alone)
        free(turn->memory);
    else
        pthread_mutex_unlock(&in_use);
}
