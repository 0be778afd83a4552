/* sender RATE PORT FLOW=ADDRESS...: numbered UDP packets to each address until SIGINT.
 *
 * A packet is a big-endian u32 flow and u64 number, and 52 bytes of padding. At its end it prints
 * FLOW=COUNT for each flow. A packet that the kernel refuses (no route, no neighbour) counts as
 * sent: it is lost, and the network is to blame.
 *
 * It stays on one CPU: a veth has a queue for each (net/core/dev.c, enqueue_to_backlog), so that what a
 * sender that changed its CPU sends may overtake what it sent before.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FLOWS 16

static volatile sig_atomic_t ending;

static void end(int number)
{
	(void)number;
	ending = 1;
}

static int connected(const char *address, uint16_t port)
{
	struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd;

	if (inet_pton(AF_INET6, address, &six.sin6_addr) == 1) {
		fd = socket(AF_INET6, SOCK_DGRAM, 0);
		if (fd >= 0 && connect(fd, (struct sockaddr *)&six, sizeof six) == 0)
			return fd;
	} else if (inet_pton(AF_INET, address, &four.sin_addr) == 1) {
		fd = socket(AF_INET, SOCK_DGRAM, 0);
		if (fd >= 0 && connect(fd, (struct sockaddr *)&four, sizeof four) == 0)
			return fd;
	}
	perror(address);
	exit(1);
}

int main(int argc, char **argv)
{
	struct { uint32_t flow; uint64_t number; char padding[52]; } __attribute__((packed)) packet;
	struct sigaction action = { .sa_handler = end };
	int fds[FLOWS], ids[FLOWS], flows = argc - 3, i;
	struct timespec due;
	uint64_t count = 0;
	cpu_set_t one;
	long rate;

	CPU_ZERO(&one);
	CPU_SET((size_t)sched_getcpu(), &one);
	sched_setaffinity(0, sizeof one, &one);
	if (argc < 4 || flows > FLOWS || (rate = atol(argv[1])) < 1) {
		fprintf(stderr, "usage: sender RATE PORT FLOW=ADDRESS...\n");
		return 2;
	}
	for (i = 0; i < flows; i++) {
		char *equals = strchr(argv[3 + i], '=');
		if (!equals)
			return 2;
		ids[i] = atoi(argv[3 + i]);
		fds[i] = connected(equals + 1, (uint16_t)atoi(argv[2]));
	}
	sigaction(SIGINT, &action, NULL);
	memset(&packet, 0, sizeof packet);
	clock_gettime(CLOCK_MONOTONIC, &due);
	while (!ending) {
		packet.number = htobe64(count++);
		for (i = 0; i < flows; i++) {
			packet.flow = htobe32((uint32_t)ids[i]);
			if (send(fds[i], &packet, sizeof packet, 0) < 0)
				continue;
		}
		due.tv_nsec += 1000000000L / rate;
		due.tv_sec += due.tv_nsec / 1000000000L;
		due.tv_nsec %= 1000000000L;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
	}
	for (i = 0; i < flows; i++)
		printf("%d=%llu\n", ids[i], (unsigned long long)count);
	return 0;
}
