/* Streams between the guest and its host by vsock: an echo server, and a connection to the host. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#include "agent.h"

enum { PIECE = 1 << 16, WAIT_S = 20 };

/* How the last connection of the server ended: an errno, 0 for an orderly end, -1 for not yet. */
static volatile int last_end = -1;
/* The connection to the host. */
static int kept = -1;

static void *echo(void *argument)
{
	char *data = malloc(PIECE);
	int fd = (int)(intptr_t)argument;
	ssize_t length;

	last_end = -1;
	while ((length = recv(fd, data, PIECE, 0)) > 0 && send(fd, data, (size_t)length, MSG_NOSIGNAL) == length)
		;
	last_end = length ? errno : 0;
	close(fd);
	free(data);
	return NULL;
}

static void *serve(void *argument)
{
	int server = (int)(intptr_t)argument;

	for (;;) {
		int fd = accept4(server, NULL, NULL, SOCK_CLOEXEC);
		pthread_t thread;

		if (fd >= 0 && !pthread_create(&thread, NULL, echo, (void *)(intptr_t)fd))
			pthread_detach(thread);
	}
	return NULL;
}

static void begin_server(struct reply *reply, unsigned int port)
{
	struct sockaddr_vm any = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	int server = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	pthread_t thread;

	if (server < 0 || bind(server, (struct sockaddr *)&any, sizeof any) || listen(server, 8) ||
	    pthread_create(&thread, NULL, serve, (void *)(intptr_t)server))
		say(reply, "error: vsock serve: %s", strerror(errno));
	else
		say(reply, "ok");
}

static void connect_host(struct reply *reply, unsigned int port)
{
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	struct timeval patience = { WAIT_S, 0 };

	if (kept >= 0)
		close(kept);
	kept = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(kept, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	setsockopt(kept, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	if (kept < 0 || connect(kept, (struct sockaddr *)&host, sizeof host))
		say(reply, "error: vsock connect: %s", strerror(errno));
	else
		say(reply, "ok");
}

static int send_all(const char *data, size_t length)
{
	while (length) {
		ssize_t sent = send(kept, data, length, MSG_NOSIGNAL);

		if (sent <= 0)
			return -1;
		data += sent, length -= (size_t)sent;
	}
	return 0;
}

/* Send so many bytes to the host, in pieces, and compare what comes back for each. */
static void exchange(struct reply *reply, unsigned int bytes)
{
	static char data[PIECE], back[PIECE];
	unsigned int seed = 1, done = 0;

	while (done < bytes) {
		size_t length = bytes - done < PIECE ? bytes - done : PIECE, got = 0;

		for (size_t i = 0; i < length; i++)
			data[i] = (char)(seed = seed * 1103515245 + 12345, seed >> 16);
		if (send_all(data, length)) {
			say(reply, "error: vsock send: %s", strerror(errno));
			return;
		}
		while (got < length) {
			ssize_t count = recv(kept, back + got, length - got, 0);

			if (count <= 0) {
				say(reply, "error: vsock recv: %s", count ? strerror(errno) : "end");
				return;
			}
			got += (size_t)count;
		}
		if (memcmp(data, back, length)) {
			say(reply, "error: vsock: other bytes came back");
			return;
		}
		done += (unsigned int)length;
	}
	say(reply, "ok %u", done);
}

/* How the connection to the host ends: an errno, 0 for an orderly end; EAGAIN if it does not. */
static void await_end(struct reply *reply)
{
	char byte;
	ssize_t count = recv(kept, &byte, 1, 0);

	say(reply, "%d", count < 0 ? errno : count ? -1 : 0);
}

/* vsock serve PORT, connect PORT, exchange BYTES, end, served */
void vsock_command(struct reply *reply, const char *arguments)
{
	unsigned int number = 0;
	char word[16] = "";

	sscanf(arguments, "%15s %u", word, &number);
	if (!strcmp(word, "serve"))
		begin_server(reply, number);
	else if (!strcmp(word, "connect"))
		connect_host(reply, number);
	else if (!strcmp(word, "exchange"))
		exchange(reply, number);
	else if (!strcmp(word, "end"))
		await_end(reply);
	else if (!strcmp(word, "served"))
		say(reply, "%d", last_end);
	else
		say(reply, "error: vsock serve PORT, connect PORT, exchange BYTES, end, served");
}
