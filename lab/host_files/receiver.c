/* receiver PORT: counts the numbered UDP packets that arrive, until SIGINT.
 *
 * A packet begins with a big-endian u32 flow and u64 number, as sender.c and the guest's agent send
 * them. At its end it prints a line for each flow:
 * FLOW RECEIVED DUPLICATES REORDERED HIGHEST LONGEST-GAP-IN-MICROSECONDS, as the agent's `flows` does.
 */
#include <endian.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { FLOWS = 16, TRACKED = 1 << 22 /* numbers whose duplicates are noticed */ };

static struct flow {
	uint32_t id;
	uint64_t received, duplicates, reordered, highest, last_us, gap_us;
	uint8_t *seen;
} flows[FLOWS];
static int count;
static volatile sig_atomic_t ending;

static void end(int number)
{
	(void)number;
	ending = 1;
}

static struct flow *find(uint32_t id)
{
	for (int i = 0; i < count; i++)
		if (flows[i].id == id)
			return &flows[i];
	if (count == FLOWS)
		return NULL;
	flows[count].id = id;
	flows[count].seen = calloc(1, TRACKED / 8);
	return flows[count].seen ? &flows[count++] : NULL;
}

static void take(uint32_t id, uint64_t number)
{
	struct flow *flow = find(id);
	struct timespec time;
	uint64_t now;

	if (!flow)
		return;
	clock_gettime(CLOCK_MONOTONIC, &time);
	now = (uint64_t)time.tv_sec * 1000000u + (uint64_t)time.tv_nsec / 1000u;
	if (number < TRACKED) {
		if (flow->seen[number / 8] & 1 << number % 8)
			flow->duplicates++;
		flow->seen[number / 8] |= (uint8_t)(1 << number % 8);
	}
	if (flow->received && number < flow->highest)
		flow->reordered++;
	if (flow->received && now - flow->last_us > flow->gap_us)
		flow->gap_us = now - flow->last_us;
	if (number > flow->highest)
		flow->highest = number;
	flow->last_us = now;
	flow->received++;
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6 };
	struct sigaction action = { .sa_handler = end };
	int sock = socket(AF_INET6, SOCK_DGRAM, 0), off = 0, size = 8 << 20;

	if (argc != 2)
		return 2;
	any.sin6_port = htons((uint16_t)atoi(argv[1]));
	setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	if (bind(sock, (struct sockaddr *)&any, sizeof any)) {
		perror("receiver: bind");
		return 1;
	}
	sigaction(SIGINT, &action, NULL); /* without SA_RESTART: recv returns */
	while (!ending) {
		struct { uint32_t flow; uint64_t number; char padding[2036]; } __attribute__((packed)) packet;

		if (recv(sock, &packet, sizeof packet, 0) >= 12)
			take(be32toh(packet.flow), be64toh(packet.number));
	}
	for (int i = 0; i < count; i++) {
		struct flow *flow = &flows[i];

		printf("%" PRIu32 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
		       flow->id, flow->received, flow->duplicates, flow->reordered, flow->highest,
		       flow->gap_us);
	}
	return 0;
}
