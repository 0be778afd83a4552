/* pinger INTERVAL-MS ADDRESS: numbered ICMP echo requests until SIGINT.
 *
 * It prints a line for each answer, `SECONDS.MICROSECONDS NUMBER`: when the kernel received it, by
 * CLOCK_REALTIME; and at its end `sent COUNT`. A request that the kernel refuses (no route, no
 * neighbour) counts as sent: it is lost, and the network is to blame.
 *
 * iputils' ping would do, but below 11 ms it waits by sched_yield, and so takes all of a CPU (its
 * main_loop, ping_common.c; seen with 20221126).
 *
 * It needs net.ipv4.ping_group_range to contain its group (icmp(7)).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t ending;

static void end(int number)
{
	(void)number;
	ending = 1;
}

struct echo {
	uint8_t type, code;
	uint16_t checksum, id, sequence; /* checksum and id are the kernel's to set */
	uint32_t number;
	uint8_t padding[52];
} __attribute__((packed));

static int connected(const char *address, uint8_t *type)
{
	struct sockaddr_in6 six = { .sin6_family = AF_INET6 };
	struct sockaddr_in four = { .sin_family = AF_INET };
	int fd = -1, on = 1;

	if (inet_pton(AF_INET6, address, &six.sin6_addr) == 1) {
		*type = ICMP6_ECHO_REQUEST;
		fd = socket(AF_INET6, SOCK_DGRAM, IPPROTO_ICMPV6);
		if (fd >= 0 && connect(fd, (struct sockaddr *)&six, sizeof six))
			fd = -1;
	} else if (inet_pton(AF_INET, address, &four.sin_addr) == 1) {
		*type = ICMP_ECHO;
		fd = socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP);
		if (fd >= 0 && connect(fd, (struct sockaddr *)&four, sizeof four))
			fd = -1;
	}
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on)) {
		perror(address);
		exit(1);
	}
	return fd;
}

/* Take one answer, if there is one. */
static int take(int fd, uint8_t type)
{
	uint8_t answer = type == ICMP_ECHO ? ICMP_ECHOREPLY : ICMP6_ECHO_REPLY;
	char control[256], line[64];
	struct echo echo;
	struct iovec data = { &echo, sizeof echo };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control
	};
	struct timespec at;
	struct cmsghdr *c;
	ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
	int size;

	if (got < 0)
		return 0;
	if (got != sizeof echo || echo.type != answer)
		return 1;
	clock_gettime(CLOCK_REALTIME, &at);
	for (c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS)
			memcpy(&at, CMSG_DATA(c), sizeof at);
	size = snprintf(line, sizeof line, "%lld.%06ld %u\n", (long long)at.tv_sec, at.tv_nsec / 1000,
			ntohl(echo.number));
	if (write(1, line, (size_t)size) != size) /* at once, and whole: others read along */
		exit(1);
	return 1;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = end };
	struct echo echo = { .type = 0 };
	struct timespec now, due, left;
	struct pollfd readable = { .events = POLLIN };
	uint32_t count = 0;
	long interval;

	if (argc != 3 || (interval = (long)(atof(argv[1]) * 1e6)) < 1) {
		fprintf(stderr, "usage: pinger INTERVAL-MS ADDRESS\n");
		return 2;
	}
	readable.fd = connected(argv[2], &echo.type);
	sigaction(SIGINT, &action, NULL);
	clock_gettime(CLOCK_MONOTONIC, &due);
	while (!ending) {
		long wait;

		clock_gettime(CLOCK_MONOTONIC, &now);
		wait = (due.tv_sec - now.tv_sec) * 1000000000L + due.tv_nsec - now.tv_nsec;
		if (wait > 0) {
			left.tv_sec = wait / 1000000000L;
			left.tv_nsec = wait % 1000000000L;
			if (ppoll(&readable, 1, &left, NULL) > 0)
				while (take(readable.fd, echo.type))
					;
			continue;
		}
		echo.sequence = htons((uint16_t)count);
		echo.number = htonl(count++);
		(void)!send(readable.fd, &echo, sizeof echo, MSG_DONTWAIT);
		if (wait < -interval)
			due = now; /* it was kept waiting: no burst to make up for it */
		due.tv_nsec += interval;
		due.tv_sec += due.tv_nsec / 1000000000L;
		due.tv_nsec %= 1000000000L;
	}
	printf("sent %u\n", count);
	return 0;
}
