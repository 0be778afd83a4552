/* Numbered UDP packets, received and sent.
 *
 * A numbered packet: flow id (u32), sequence number from 0 (u64), both big-endian, then padding.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static int sink_sock;

static void *sink(void *unused)
{
	int sock = sink_sock, size = 8 << 20;
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

/* What was sent by flows that ended, until udp-stop tells it. */
static struct {
	uint32_t flow;
	uint64_t packets;
} ended[FLOWS];
static int ended_count;
static atomic_int sending_count;
static atomic_bool stopping;

static void *sender(void *argument)
{
	struct sending sending = *(struct sending *)argument;
	uint64_t start = now_ns();

	free(argument);
	uint64_t seq;

	for (seq = 0; seq < sending.packets && !stopping; seq++) {
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
	pthread_mutex_lock(&lock);
	if (ended_count < FLOWS) {
		ended[ended_count].flow = sending.flow;
		ended[ended_count++].packets = seq;
	}
	pthread_mutex_unlock(&lock);
	sending_count--;
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
		sending_count++;
		pthread_create(&thread, NULL, sender, sending);
		pthread_detach(thread);
		say(reply, "ok");
	}
}

/* udp-stop: ends every flow of udp-send; a line for each since the last time: flow, packets sent. */
void udp_stop(struct reply *reply)
{
	stopping = 1;
	while (sending_count)
		usleep(1000);
	stopping = 0;
	for (int i = 0; i < ended_count; i++)
		say(reply, "%u %lu\n", ended[i].flow, ended[i].packets);
	ended_count = 0;
}

/* join GROUP INTERFACE: the sink is a member of the multicast group from then on. */
void join_group(struct reply *reply, const char *arguments)
{
	struct group_req request = { 0 };
	struct sockaddr_in *four = (struct sockaddr_in *)&request.gr_group;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)&request.gr_group;
	char group[INET6_ADDRSTRLEN], interface[IF_NAMESIZE];
	int level = IPPROTO_IPV6;

	if (sscanf(arguments, "%45s %15s", group, interface) != 2) {
		say(reply, "error: join GROUP INTERFACE");
		return;
	}
	request.gr_interface = if_nametoindex(interface);
	six->sin6_family = AF_INET6;
	if (inet_pton(AF_INET6, group, &six->sin6_addr) != 1) {
		level = IPPROTO_IP;
		memset(six, 0, sizeof *six);
		four->sin_family = AF_INET;
		if (inet_pton(AF_INET, group, &four->sin_addr) != 1) {
			say(reply, "error: no address: %s", group);
			return;
		}
	}
	if (setsockopt(sink_sock, level, MCAST_JOIN_GROUP, &request, sizeof request) &&
	    errno != EADDRINUSE)
		say(reply, "error: %s on %s: %s", group, interface, strerror(errno));
	else
		say(reply, "ok");
}

void start_traffic(void)
{
	pthread_t thread;

	sink_sock = listening(SOCK_DGRAM, PORT_SINK);
	pthread_create(&thread, NULL, sink, NULL);
	start_tcp();
}
