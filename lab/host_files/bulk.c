/* bulk ADDRESS SECONDS [out=PORT] [in=PORT]: TCP as fast as it goes, to and from an address.
 *
 * After SECONDS (0: at SIGINT) it prints what went each way: `out BYTES MICROSECONDS`, and so for
 * `in`. A byte that was sent counts once it was acknowledged. Before the SECONDS there is one more
 * that does not count, for TCP to find its pace. Exit status 1: a connection broke.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 18 };

struct direction {
	const char *name;
	int fd;
	uint64_t bytes, us;
};

static enum { WARM_UP, COUNTING, ENDING } _Atomic stage;
static atomic_int broken;
static unsigned seconds;

static void next(int number)
{
	if (number == SIGINT || stage == COUNTING) {
		stage = ENDING;
	} else {
		stage = COUNTING;
		alarm(seconds);
	}
}

static int connected(const char *address, int port)
{
	struct sockaddr_in6 to = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port) };
	struct timeval wait = { 0, 100000 }; /* so that the end is noticed */
	char mapped[80];
	int fd = socket(AF_INET6, SOCK_STREAM, 0);

	snprintf(mapped, sizeof mapped, "%s%s", strchr(address, ':') ? "" : "::ffff:", address);
	if (inet_pton(AF_INET6, mapped, &to.sin6_addr) != 1 ||
	    connect(fd, (struct sockaddr *)&to, sizeof to)) {
		perror(address);
		exit(1);
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
	return fd;
}

static uint64_t now_us(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000u + (uint64_t)time.tv_nsec / 1000u;
}

static void *pump(void *argument)
{
	struct direction *direction = argument;
	int out = direction->name[0] == 'o', queued = 0;
	char *piece = calloc(1, PIECE);
	uint64_t start = now_us();

	for (int counting = stage != WARM_UP; stage != ENDING;) {
		if (!counting && stage == COUNTING) {
			counting = 1;
			start = now_us();
			direction->bytes = 0;
		}
		ssize_t done = out ? send(direction->fd, piece, PIECE, MSG_NOSIGNAL)
				   : recv(direction->fd, piece, PIECE, 0);

		if (done > 0) {
			direction->bytes += (uint64_t)done;
		} else if (!done || (errno != EAGAIN && errno != EINTR)) {
			atomic_store(&broken, 1);
			break;
		}
	}
	direction->us = now_us() - start;
	if (out && !ioctl(direction->fd, SIOCOUTQ, &queued) && (uint64_t)queued <= direction->bytes)
		direction->bytes -= (uint64_t)queued;
	free(piece);
	return NULL;
}

int main(int argc, char **argv)
{
	struct direction directions[2];
	struct sigaction action = { .sa_handler = next };
	pthread_t threads[2];
	int count = argc - 3;

	if (count < 1 || count > 2)
		return 2;
	for (int i = 0; i < count; i++) {
		char *port = strchr(argv[3 + i], '=');

		if (!port)
			return 2;
		directions[i] = (struct direction){ .name = argv[3 + i] };
		directions[i].fd = connected(argv[1], atoi(port + 1));
		*port = 0;
	}
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
	seconds = (unsigned)atoi(argv[2]);
	stage = seconds ? WARM_UP : COUNTING;
	if (seconds)
		alarm(1);
	for (int i = 0; i < count; i++)
		pthread_create(&threads[i], NULL, pump, &directions[i]);
	for (int i = 0; i < count; i++) {
		pthread_join(threads[i], NULL);
		printf("%s %llu %llu\n", directions[i].name, (unsigned long long)directions[i].bytes,
		       (unsigned long long)directions[i].us);
	}
	return atomic_load(&broken);
}
