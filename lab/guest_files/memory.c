/* Memory whose contents can be judged: a still pattern, and a writer that never rests. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "agent.h"

enum { PAGE = 4096, MARKS = 8 /* words written in each page */ };

static uint64_t mix(uint64_t x) /* splitmix64's finaliser: every input bit reaches every output bit */
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static void *allocate(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

static uint64_t *still;
static size_t still_words;
static uint64_t still_sum;

static uint64_t sum_of(const uint64_t *words, size_t length)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < length; i++)
		sum = (sum << 7 | sum >> 57) + words[i]; /* order counts */
	return sum;
}

/* mem start MB | mem check | mem fill MB */
void memory_command(struct reply *reply, const char *arguments)
{
	size_t megabytes;

	if (sscanf(arguments, "start %zu", &megabytes) == 1) {
		if (still)
			munmap(still, still_words * 8);
		still = allocate(megabytes << 20);
		still_words = megabytes << 17;
		if (!still) {
			say(reply, "error: no memory");
			return;
		}
		for (size_t i = 0; i < still_words; i++)
			still[i] = (i + 1) * 0x9e3779b97f4a7c15u;
		still_sum = sum_of(still, still_words);
		say(reply, "ok %016lx", still_sum);
	} else if (sscanf(arguments, "fill %zu", &megabytes) == 1) {
		uint64_t *memory = allocate(megabytes << 20);

		for (size_t page = 0; memory && page < megabytes << 8; page++)
			memory[page * (PAGE / 8)] = mix(page + 1);
		say(reply, memory ? "ok" : "error: no memory");
	} else if (!strncmp(arguments, "check", 5) && still) {
		uint64_t sum = sum_of(still, still_words);

		say(reply, "%s %016lx", sum == still_sum ? "ok" : "bad", sum);
	} else {
		say(reply, "error: mem start MB | mem check | mem fill MB");
	}
}

static struct {
	uint64_t *memory;
	size_t pages;
	pthread_t thread;
	atomic_bool stop;
	atomic_ulong passes, bad; /* bad: number of the first wrong page, from 1 */
} hot;

/* Pass n leaves mix(page, n) in every mark of a page and first expects what pass n-1 left there,
 * so a page that went back in time, or never arrived, shows at the next visit. */
static void *writer(void *unused)
{
	(void)unused;
	for (uint64_t pass = 1; !hot.stop; pass++) {
		for (size_t page = 0; page < hot.pages && !hot.stop; page++) {
			uint64_t *words = hot.memory + page * (PAGE / 8);
			uint64_t old = pass == 1 ? 0 : mix(page << 32 ^ (pass - 1));
			uint64_t new = mix(page << 32 ^ pass);

			for (size_t mark = 0; mark < MARKS; mark++) {
				volatile uint64_t *word = &words[mark * (PAGE / 8 / MARKS)];

				if (*word != old && !hot.bad)
					hot.bad = page + 1;
				*word = new;
			}
		}
		hot.passes = pass;
	}
	return NULL;
}

static void stop_writer(void)
{
	if (!hot.memory)
		return;
	hot.stop = 1;
	pthread_join(hot.thread, NULL);
	munmap(hot.memory, hot.pages * PAGE);
	hot.memory = NULL;
}

/* hot start MB | hot check | hot stop */
void hot_command(struct reply *reply, const char *arguments)
{
	size_t megabytes;

	if (sscanf(arguments, "start %zu", &megabytes) == 1) {
		stop_writer();
		hot.pages = megabytes << 8;
		hot.memory = allocate(megabytes << 20);
		if (!hot.memory) {
			say(reply, "error: no memory");
			return;
		}
		hot.stop = 0;
		hot.passes = hot.bad = 0;
		pthread_create(&hot.thread, NULL, writer, NULL);
		say(reply, "ok 0");
	} else if (!strncmp(arguments, "check", 5) || !strncmp(arguments, "stop", 4)) {
		if (hot.bad)
			say(reply, "bad %lu", hot.bad - 1);
		else
			say(reply, "ok %lu", hot.passes);
		if (arguments[0] == 's')
			stop_writer();
	} else {
		say(reply, "error: hot start MB | hot check | hot stop");
	}
}
