/* TCP servers: echo, discard, and a source that sends zeros as fast as they are taken. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

enum { ECHO, DISCARD, SOURCE, PIECE = 1 << 18 };

static void *source(void *argument)
{
	static char zeros[PIECE];
	int fd = (int)(intptr_t)argument;

	while (send(fd, zeros, sizeof zeros, MSG_NOSIGNAL) > 0)
		;
	close(fd);
	return NULL;
}

/* Each has a thread of its own: it blocks for as long as its peer does not read. */
static void start_source(int fd)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, source, (void *)(intptr_t)fd))
		close(fd);
	else
		pthread_detach(thread);
}

/* Echo is written back in place: a peer that sends without reading only stops itself and, for as
 * long as its window is closed, the other connections. Tests read what they send. */
static void *tcp_server(void *unused)
{
	int poll = epoll_create1(EPOLL_CLOEXEC);
	int servers[] = { [ECHO] = listening(SOCK_STREAM, PORT_ECHO),
			  [DISCARD] = listening(SOCK_STREAM, PORT_DISCARD),
			  [SOURCE] = listening(SOCK_STREAM, PORT_SOURCE) };
	static char data[PIECE];

	(void)unused;
	for (uint64_t i = ECHO; i <= SOURCE; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = i << 32 | (uint32_t)servers[i] };

		epoll_ctl(poll, EPOLL_CTL_ADD, servers[i], &event);
	}
	for (;;) {
		struct epoll_event event;

		if (epoll_wait(poll, &event, 1, -1) < 1)
			continue;
		int fd = (int)(uint32_t)event.data.u64, kind = (int)(event.data.u64 >> 32);

		if (fd == servers[kind]) {
			int peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

			event.data.u64 = (uint64_t)kind << 32 | (uint32_t)peer;
			if (peer >= 0 && kind == SOURCE)
				start_source(peer);
			else if (peer >= 0)
				epoll_ctl(poll, EPOLL_CTL_ADD, peer, &event);
			continue;
		}
		ssize_t length = recv(fd, data, sizeof data, 0);

		if (length <= 0 || (kind == ECHO && send(fd, data, (size_t)length, MSG_NOSIGNAL) != length))
			close(fd);
	}
	return NULL;
}

void start_tcp(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, tcp_server, NULL);
}
