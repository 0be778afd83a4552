/* What a guest may do to its VMM: answer nothing for a while, or flood the network with addresses. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

static double until;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *spin(void *unused)
{
	struct timespec second = { 1, 0 };

	(void)unused;
	nanosleep(&second, NULL); /* so that the answer leaves */
	while (now() < until)
		;
	return NULL;
}

/* Since Linux 6.12 ordinary tasks get 50 ms of each second whatever the limit for real-time ones says
 * (kernel/sched/deadline.c, fair_server): within them, a hung guest might answer. */
static void no_fair_server(long cpus)
{
	mount("debug", "/sys/kernel/debug", "debugfs", 0, NULL); /* it may be there already */
	for (long cpu = 0; cpu < cpus; cpu++) {
		char path[80];
		int fd;

		snprintf(path, sizeof path, "/sys/kernel/debug/sched/fair_server/cpu%ld/runtime", cpu);
		fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd >= 0) {
			if (write(fd, "0", 1) != 1)
				perror(path);
			close(fd);
		}
	}
}

/* hang SECONDS: nothing but interrupts is served on any CPU; the kernel's workers get no turn. */
void hang(struct reply *reply, const char *arguments)
{
	struct sched_param first = { .sched_priority = 99 };
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	int fd = open("/proc/sys/kernel/sched_rt_runtime_us", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "-1", 2) != 2) { /* no share is kept for the others */
		say(reply, "error: sched_rt_runtime_us");
		return;
	}
	close(fd);
	no_fair_server(cpus);
	until = now() + 1 + atof(arguments);
	for (long cpu = 0; cpu < cpus; cpu++) {
		pthread_attr_t how;
		pthread_t thread;
		cpu_set_t one;

		CPU_ZERO(&one);
		CPU_SET((size_t)cpu, &one);
		pthread_attr_init(&how);
		pthread_attr_setaffinity_np(&how, sizeof one, &one);
		pthread_attr_setinheritsched(&how, PTHREAD_EXPLICIT_SCHED);
		pthread_attr_setschedpolicy(&how, SCHED_FIFO);
		pthread_attr_setschedparam(&how, &first);
		if (pthread_create(&thread, &how, spin, NULL))
			say(reply, "error: no thread");
		else
			pthread_detach(thread);
	}
	say(reply, "ok");
}

/* flood INTERFACE COUNT: so many gratuitous ARPs, each from another MAC and IP address in another
 * VLAN. */
void flood(struct reply *reply, const char *arguments)
{
	unsigned char frame[60] = {
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 0, 0x81, 0, 0, 0,
		8, 6, 0, 1, 8, 0, 6, 4, 0, 1,
	};
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_halen = 6 };
	char name[IFNAMSIZ];
	unsigned long count, sent = 0;
	int on = 1, sock = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);

	/* Past the queueing discipline, which would go on sending after the answer. */
	setsockopt(sock, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on);
	if (sscanf(arguments, "%15s %lu", name, &count) != 2) {
		say(reply, "error: flood INTERFACE COUNT");
		close(sock);
		return;
	}
	to.sll_ifindex = (int)if_nametoindex(name);
	for (unsigned long i = 0; i < count; i++) {
		unsigned vid = 1 + (unsigned)(i % 4094);

		for (int byte = 0; byte < 4; byte++)
			frame[8 + byte] = (unsigned char)(i >> 8 * (3 - byte));
		frame[14] = (unsigned char)(vid >> 8), frame[15] = (unsigned char)vid;
		memcpy(frame + 26, frame + 6, 6);
		frame[32] = 10, frame[33] = frame[9], frame[34] = frame[10], frame[35] = frame[11];
		memcpy(frame + 42, frame + 32, 4);
		for (int tries = 0; tries < 100000; tries++) {
			if (sendto(sock, frame, sizeof frame, 0, (struct sockaddr *)&to, sizeof to) > 0) {
				sent++;
				break;
			}
			sched_yield(); /* the ring is full */
		}
	}
	close(sock);
	say(reply, "%lu", sent);
}
