/* godwit.hostile=SECONDS,SEED: random values to every port, window and ring of the machine, from each CPU.
 *
 * The drivers of all PCI devices are taken off first: what is written is at random, and now and then
 * just what a driver would write, so that a device is started on rings full of nonsense. Rings are in
 * pages of this process, or anywhere: what a device writes there is the guest's own loss.
 *
 * Left out is what ends the VM: the sleep register, the reset ports.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum { DEVICES = 16, PAGES = 64, PAGE = 4096 };
enum { E1000_BAR = 0x20000 };

struct device {
	volatile uint8_t *window;
	uint32_t size;
};

static struct device devices[DEVICES];
static int count;
static uint8_t *pages;
static uint64_t physical[PAGES];
static double until;
static uint64_t seed;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void put(volatile uint8_t *at, unsigned width, uint64_t value)
{
	if (width == 0)
		*at = (uint8_t)value;
	else if (width == 1)
		*(volatile uint16_t *)at = (uint16_t)value;
	else if (width == 2)
		*(volatile uint32_t *)at = (uint32_t)value;
	else
		*(volatile uint64_t *)at = value;
}

/* A guest address: in one of our pages, mostly. */
static uint64_t somewhere(uint64_t *state)
{
	uint64_t r = next(state);

	if (r & 63)
		return physical[(r >> 8) % PAGES] + (r >> 16 & 15 ? 0 : r >> 24 & 0xfff);
	return r >> 20;
}

/* Descriptors of virtio (16 bytes: address, length, flags, next) or of the e1000 (address, word). */
static void scribble(uint64_t *state)
{
	uint8_t *page = pages + next(state) % PAGES * PAGE;
	uint64_t r = next(state);

	for (int at = 0; at < PAGE; at += 16) {
		uint64_t *half = (uint64_t *)(page + at);

		if (r & 3) {
			half[0] = somewhere(state);
			half[1] = next(state);
			if (r & 4) /* short, and a flag or two */
				half[1] = (half[1] & 0xffff) | (next(state) & 7) << 32 | (next(state) & 0xff) << 48;
		} else {
			half[0] = next(state);
			half[1] = next(state);
		}
	}
	if (r & 8) /* an avail ring: flags, an index near the last */
		*(uint32_t *)page = (uint32_t)(r >> 32 & 0xff) << 16;
}

static void virtio(struct device *device, uint64_t *state)
{
	volatile uint8_t *common = device->window;
	uint64_t r = next(state);

	put(common + 0x14, 0, 0);
	put(common + 0x14, 0, 3);
	put(common + 0x08, 2, 0);
	put(common + 0x0c, 2, r & 1 ? next(state) : 0x30ff8023 | (next(state) & next(state)));
	put(common + 0x08, 2, 1);
	put(common + 0x0c, 2, 1);
	put(common + 0x14, 0, 11);
	for (int queue = 0; queue < 3; queue++) {
		put(common + 0x16, 1, (uint64_t)queue);
		put(common + 0x18, 1, 1u << (next(state) % 9));
		put(common + 0x1a, 1, next(state) & 3);
		for (int address = 0x20; address <= 0x30; address += 8) {
			uint64_t where = somewhere(state) & ~15ull;

			put(common + address, 2, where);
			put(common + address + 4, 2, where >> 32);
		}
		put(common + 0x1c, 1, 1);
	}
	put(common + 0x14, 0, 15);
	for (int kick = 0; kick < 8; kick++) {
		put(device->window + 0x2000 + 4 * (next(state) % 4), 1, next(state));
		scribble(state);
	}
}

static void e1000(struct device *device, uint64_t *state)
{
	volatile uint8_t *window = device->window;
	static const uint32_t rings[] = { 0x2800, 0x3800 };

	for (int ring = 0; ring < 2; ring++) {
		uint64_t where = somewhere(state) & ~15ull;

		put(window + rings[ring], 2, where);
		put(window + rings[ring] + 4, 2, where >> 32);
		put(window + rings[ring] + 8, 2, next(state) & 3 ? 4096 : next(state));
		put(window + rings[ring] + 0x10, 2, next(state) & 255);
	}
	put(window + 0x100, 2, 2 | (next(state) & 0x07ffffff)); /* RCTL */
	put(window + 0x400, 2, 2 | (next(state) & 0x0fffffff)); /* TCTL */
	for (int kick = 0; kick < 8; kick++) {
		put(window + 0x3818, 2, next(state) & 255);
		put(window + 0x2818, 2, next(state) & 255);
		scribble(state);
	}
	if (!(next(state) & 7))
		put(window, 2, 1 << 26); /* CTRL.RST */
}

static void port(uint64_t *state)
{
	static const uint16_t known[] = { 0x3f8, 0x3fc, 0xcf8, 0xcfc, 0x600, 0x40, 0x70, 0xc000, 0xc100, 0x20 };
	uint64_t r = next(state);
	uint16_t at = r & 1 ? (uint16_t)(known[(r >> 8) % 10] + (r >> 16 & 7)) : (uint16_t)(r >> 24);
	uint32_t value = (uint32_t)next(state);

	if (at == 0xcf8 && (r & 1 << 30))
		value = 0x80000000 | (value & 0x7ffc); /* the first bus */
	/* Not the sleep register, the reset ports, the speaker's gate, the DMA page that POST writes to. */
	if ((at >= 0x601 && at <= 0x607) || at == 0x64 || (at >= 0xcf6 && at <= 0xcf9 && at != 0xcf8))
		return;
	if (r & 1 << 29)
		(void)(r & 1 << 28 ? inb(at) : inl(at));
	else if (r & 1 << 28)
		outb((uint8_t)value, at);
	else if (at != 0x3fc && at < 0xfffc)
		outl(value, at);
}

static void *attack(void *number)
{
	uint64_t state = seed * 0x9e3779b97f4a7c15ull + (uint64_t)(uintptr_t)number + 1;

	iopl(3);
	while (now() < until) {
		struct device *device = &devices[next(&state) % (uint64_t)(count ? count : 1)];
		uint64_t r = next(&state);
		unsigned width = (unsigned)(r >> 8 & 3);

		if ((r & 7) == 0 || !count)
			port(&state);
		else if ((r & 7) == 1)
			scribble(&state);
		else if ((r & 7) == 2 && device->size == E1000_BAR)
			e1000(device, &state);
		else if ((r & 7) == 2)
			virtio(device, &state);
		else if ((r & 7) == 3) /* where registers are */
			put(device->window + (next(&state) % 0x40 & ~((1ull << width) - 1)), width, next(&state));
		else
			put(device->window + (next(&state) % device->size & ~((1ull << width) - 1)), width,
			    r & 1 << 12 ? somewhere(&state) : next(&state));
	}
	return NULL;
}

static int write_to(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	int done = fd >= 0 && write(fd, text, strlen(text)) > 0;

	if (fd >= 0)
		close(fd);
	return done;
}

static void take_devices(void)
{
	DIR *all = opendir("/sys/bus/pci/devices");
	struct dirent *entry;

	while (all && (entry = readdir(all)) && count < DEVICES) {
		char path[400];
		struct stat status;
		int fd;

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver/unbind", entry->d_name);
		write_to(path, entry->d_name);
		snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", entry->d_name);
		write_to(path, "1");
		snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource0", entry->d_name);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0 || fstat(fd, &status))
			continue;
		devices[count].size = (uint32_t)status.st_size;
		devices[count].window = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (devices[count].window != MAP_FAILED)
			count++;
	}
	if (all)
		closedir(all);
	iopl(3);
	for (uint32_t slot = 1; slot < 32; slot++) { /* I/O, memory, bus master */
		outl(0x80000000 | slot << 11 | 4, 0xcf8);
		if (inw(0xcfc) != 0xffff)
			outw(7, 0xcfc);
	}
}

static int take_pages(void)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int known = 0;

	pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (fd < 0 || pages == MAP_FAILED || mlock(pages, PAGES * PAGE))
		return 0;
	for (int page = 0; page < PAGES; page++) {
		uint64_t entry = 0;

		memset(pages + page * PAGE, 0x5a, PAGE);
		if (pread(fd, &entry, 8, (off_t)((uintptr_t)(pages + page * PAGE) / PAGE * 8)) == 8)
			physical[page] = (entry & ((1ull << 55) - 1)) * PAGE;
		known += physical[page] != 0;
	}
	close(fd);
	return known == PAGES;
}

/* Return on how many CPUs it goes on from now on, or 0 with a reason on the console. */
long hostile(const char *arguments)
{
	double seconds;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	if (sscanf(arguments, "%lf,%lu", &seconds, &seed) != 2 || !take_pages()) {
		dprintf(1, "hostile: give SECONDS,SEED as root\n");
		return 0;
	}
	take_devices();
	until = now() + seconds;
	for (long cpu = 0; cpu < cpus; cpu++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, attack, (void *)(uintptr_t)cpu))
			return cpu;
		pthread_detach(thread);
	}
	return cpus;
}
