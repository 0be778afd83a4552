/* Numbered UDP packets, received and sent, and TCP echo and discard servers.
 *
 * A numbered packet: flow id (u32), sequence number from 0 (u64), both big-endian, then padding.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum { FLOWS = 64, TRACKED = 4 << 20 /* sequence numbers whose duplicates are noticed */ };

static struct flow {
	uint32_t id;
	uint64_t received, duplicates, reordered, max, last_ns, gap_ns;
	uint8_t *seen;
} flows[FLOWS];
static int flow_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct flow *find_flow(uint32_t id)
{
	for (int i = 0; i < flow_count; i++)
		if (flows[i].id == id)
			return &flows[i];
	if (flow_count == FLOWS)
		return NULL;
	struct flow *flow = &flows[flow_count++];

	*flow = (struct flow){ .id = id, .seen = calloc(1, TRACKED / 8) };
	return flow;
}

static void count(uint32_t id, uint64_t seq)
{
	struct flow *flow = find_flow(id);
	uint64_t now = now_ns();

	if (!flow || !flow->seen)
		return;
	if (seq < TRACKED) {
		if (flow->seen[seq / 8] & 1 << seq % 8)
			flow->duplicates++;
		flow->seen[seq / 8] |= (uint8_t)(1 << seq % 8);
	}
	if (flow->received && seq < flow->max)
		flow->reordered++;
	if (seq > flow->max)
		flow->max = seq;
	if (flow->received && now - flow->last_ns > flow->gap_ns)
		flow->gap_ns = now - flow->last_ns;
	flow->last_ns = now;
	flow->received++;
}

static void *sink(void *unused)
{
	int sock = listening(SOCK_DGRAM, PORT_SINK), size = 8 << 20;
	unsigned char packet[65536];

	(void)unused;
	setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	for (;;) {
		ssize_t length = recv(sock, packet, sizeof packet, 0);
		uint32_t id;
		uint64_t seq;

		if (length < 12)
			continue;
		memcpy(&id, packet, 4);
		memcpy(&seq, packet + 4, 8);
		pthread_mutex_lock(&lock);
		count(be32toh(id), be64toh(seq));
		pthread_mutex_unlock(&lock);
	}
	return NULL;
}

/* One line a flow: id received duplicates reordered max-seq longest-gap-in-microseconds. */
void report_flows(struct reply *reply)
{
	pthread_mutex_lock(&lock);
	for (int i = 0; i < flow_count; i++)
		say(reply, "%u %lu %lu %lu %lu %lu\n", flows[i].id, flows[i].received,
		    flows[i].duplicates, flows[i].reordered, flows[i].max, flows[i].gap_ns / 1000);
	pthread_mutex_unlock(&lock);
}

void reset_flows(void)
{
	pthread_mutex_lock(&lock);
	for (int i = 0; i < flow_count; i++)
		free(flows[i].seen);
	flow_count = 0;
	pthread_mutex_unlock(&lock);
}

struct sending {
	int sock;
	uint32_t flow;
	uint64_t rate, packets;
};

static void *sender(void *argument)
{
	struct sending sending = *(struct sending *)argument;
	uint64_t start = now_ns();

	free(argument);
	for (uint64_t seq = 0; seq < sending.packets; seq++) {
		unsigned char packet[64] = { 0 };
		uint32_t id = htobe32(sending.flow);
		uint64_t number = htobe64(seq), due = start + seq * 1000000000u / sending.rate;
		struct timespec until = { (time_t)(due / 1000000000u), (long)(due % 1000000000u) };

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
		memcpy(packet, &id, 4);
		memcpy(packet + 4, &number, 8);
		send(sending.sock, packet, sizeof packet, 0);
	}
	close(sending.sock);
	return NULL;
}

/* udp-send ADDRESS PORT FLOW RATE COUNT: packets from a thread of their own, RATE a second. */
void udp_send(struct reply *reply, const char *arguments)
{
	struct sending *sending = calloc(1, sizeof *sending);
	struct sockaddr_in6 to = { .sin6_family = AF_INET6 };
	char host[64], mapped[80];
	unsigned port;
	pthread_t thread;

	if (sscanf(arguments, "%63s %u %u %lu %lu", host, &port, &sending->flow, &sending->rate,
		   &sending->packets) != 5 || !sending->rate) {
		say(reply, "error: udp-send ADDRESS PORT FLOW RATE COUNT");
		free(sending);
		return;
	}
	snprintf(mapped, sizeof mapped, "%s%s", strchr(host, ':') ? "" : "::ffff:", host);
	to.sin6_port = htons((uint16_t)port);
	sending->sock = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	errno = EINVAL;
	if (inet_pton(AF_INET6, mapped, &to.sin6_addr) != 1 ||
	    connect(sending->sock, (struct sockaddr *)&to, sizeof to)) {
		say(reply, "error: %s", strerror(errno));
		close(sending->sock);
		free(sending);
	} else {
		pthread_create(&thread, NULL, sender, sending);
		pthread_detach(thread);
		say(reply, "ok");
	}
}

/* Echo is written back in place: a peer that sends without reading only stops itself and, for as
 * long as its window is closed, the other connections. Tests read what they send. */
static void *tcp_server(void *unused)
{
	int poll = epoll_create1(EPOLL_CLOEXEC);
	int servers[] = { listening(SOCK_STREAM, PORT_ECHO), listening(SOCK_STREAM, PORT_DISCARD) };
	static char data[1 << 18];

	(void)unused;
	for (uint64_t i = 0; i < 2; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = i << 32 | (uint32_t)servers[i] };

		epoll_ctl(poll, EPOLL_CTL_ADD, servers[i], &event);
	}
	for (;;) {
		struct epoll_event event;

		if (epoll_wait(poll, &event, 1, -1) < 1)
			continue;
		int fd = (int)(uint32_t)event.data.u64, discard = event.data.u64 >> 32 & 1;

		if (fd == servers[discard]) {
			int peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

			event.data.u64 = (uint64_t)discard << 32 | (uint32_t)peer;
			if (peer >= 0)
				epoll_ctl(poll, EPOLL_CTL_ADD, peer, &event);
			continue;
		}
		ssize_t length = recv(fd, data, sizeof data, 0);

		if (length <= 0 || (!discard && send(fd, data, (size_t)length, MSG_NOSIGNAL) != length))
			close(fd);
	}
	return NULL;
}

void start_traffic(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, sink, NULL);
	pthread_create(&thread, NULL, tcp_server, NULL);
}
