/* The control socket: one text datagram in, one out. `#ID COMMAND` is answered by `#ID REPLY`;
 * an ID that was answered before gets the same answer again, so that a client may repeat a
 * request whose answer was lost without having it done twice. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <linux/input.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum { REMEMBERED = 8 };

void say(struct reply *reply, const char *format, ...)
{
	va_list arguments;
	size_t room = sizeof reply->text - reply->length;
	int length;

	va_start(arguments, format);
	length = vsnprintf(reply->text + reply->length, room, format, arguments);
	va_end(arguments);
	if (length > 0)
		reply->length += (size_t)length < room ? (size_t)length : room - 1;
}

/* A socket for IPv4 and IPv6 on every interface. */
int listening(int type, int port)
{
	int sock = socket(AF_INET6, type | SOCK_CLOEXEC, 0), on = 1, off = 0;
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port) };

	setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
	setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(sock, (struct sockaddr *)&any, sizeof any) || (type == SOCK_STREAM && listen(sock, 64)))
		perror("agent: bind");
	return sock;
}

/* sh COMMAND: its output, then a line `exit STATUS`. The agent answers nothing else meanwhile. */
static void shell(struct reply *reply, const char *command)
{
	char *argument = strdup(command), buffer[4096];
	int ends[2], status = 0;
	ssize_t length;

	if (pipe(ends) < 0)
		return;
	pid_t child = fork();

	if (!child) {
		dup2(ends[1], 1), dup2(ends[1], 2);
		close(ends[0]), close(ends[1]);
		execl("/bin/busybox", "sh", "-c", argument, NULL);
		_exit(127);
	}
	close(ends[1]);
	while ((length = read(ends[0], buffer, sizeof buffer)) > 0)
		say(reply, "%.*s", (int)length, buffer);
	close(ends[0]);
	waitpid(child, &status, 0);
	free(argument);
	say(reply, "exit %d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

/* cpuid: what the first CPU answers now, a line a leaf: function, index, EAX, EBX, ECX, EDX. The
 * kernel's own list of features is of the boot. */
static void report_cpuid(struct reply *reply)
{
	static const struct {
		unsigned int first, last;
	} ranges[] = { { 0, 0xd }, { 0x40000000, 0x40000001 }, { 0x80000000, 0x80000008 } };
	cpu_set_t before, one;

	sched_getaffinity(0, sizeof before, &before);
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof one, &one);
	for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
		for (unsigned int leaf = ranges[i].first; leaf <= ranges[i].last; leaf++)
			for (unsigned int index = 0; index < 4; index++) {
				unsigned int a, b, c, d;

				__cpuid_count(leaf, index, a, b, c, d);
				say(reply, "%x %x %x %x %x %x\n", leaf, index, a, b, c, d);
			}
	sched_setaffinity(0, sizeof before, &before);
}

static void (*answer(struct reply *reply, const char *request))(void)
{
	static const struct {
		const char *name;
		void (*with_arguments)(struct reply *, const char *);
	} commands[] = {
		{ "mem ", memory_command }, { "hot ", hot_command },
		{ "udp-send ", udp_send }, { "sh ", shell },
		{ "hang ", hang }, { "flood ", flood },
		{ "join ", join_group }, { "vsock ", vsock_command },
	};

	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
		size_t length = strlen(commands[i].name);

		if (!strncmp(request, commands[i].name, length)) {
			commands[i].with_arguments(reply, request + length);
			return NULL;
		}
	}
	if (!strcmp(request, "ping")) {
		say(reply, "pong");
	} else if (!strcmp(request, "flows")) {
		report_flows(reply);
	} else if (!strcmp(request, "reset-flows")) {
		reset_flows();
		say(reply, "ok");
	} else if (!strcmp(request, "udp-stop")) {
		udp_stop(reply);
	} else if (!strcmp(request, "cpus")) {
		say(reply, "%ld", sysconf(_SC_NPROCESSORS_ONLN));
	} else if (!strcmp(request, "cpuid")) {
		report_cpuid(reply);
	} else if (!strcmp(request, "clock")) {
		struct timespec real, mono;

		clock_gettime(CLOCK_REALTIME, &real);
		clock_gettime(CLOCK_MONOTONIC, &mono);
		say(reply, "%ld%09ld %ld%09ld", real.tv_sec, real.tv_nsec, mono.tv_sec, mono.tv_nsec);
	} else {
		static const struct {
			const char *name;
			void (*end)(void);
		} ends[] = { { "poweroff", power_off }, { "reboot", restart }, { "crash", triple_fault } };

		for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
			if (!strcmp(request, ends[i].name)) {
				say(reply, "ok");
				return ends[i].end; /* once the answer is sent */
			}
		say(reply, "error: unknown command");
	}
	return NULL;
}

static void serve_one(int control)
{
	static struct {
		char id[24];
		struct reply reply;
	} remembered[REMEMBERED];
	static int next;
	static char request[REPLY_MAX];
	struct sockaddr_in6 peer;
	socklen_t size = sizeof peer;
	char id[24];
	int skip = 0;
	ssize_t length = recvfrom(control, request, sizeof request - 1, 0, (struct sockaddr *)&peer, &size);

	if (length <= 0)
		return;
	request[length] = 0;
	if (sscanf(request, "#%22s %n", id, &skip) != 1 || !skip)
		return;
	for (int i = 0; i < REMEMBERED; i++)
		if (!strcmp(remembered[i].id, id)) {
			struct reply *reply = &remembered[i].reply;

			sendto(control, reply->text, reply->length, 0, (struct sockaddr *)&peer, size);
			return;
		}
	struct reply *reply = &remembered[next].reply;

	strcpy(remembered[next].id, id);
	next = (next + 1) % REMEMBERED;
	reply->length = 0;
	say(reply, "#%s ", id);
	void (*end)(void) = answer(reply, request + skip);

	sendto(control, reply->text, reply->length, 0, (struct sockaddr *)&peer, size);
	if (end)
		end();
}

void serve_control(int control, const int *power_keys, int count)
{
	struct pollfd waiting[1 + POWER_KEYS] = { { control, POLLIN, 0 } };

	for (int i = 0; i < count; i++)
		waiting[1 + i] = (struct pollfd){ power_keys[i], POLLIN, 0 };
	for (;;) {
		struct input_event event;

		if (poll(waiting, 1 + (nfds_t)count, -1) < 0 && errno != EINTR)
			return;
		if (waiting[0].revents)
			serve_one(control);
		for (int i = 1; i <= count; i++)
			while (waiting[i].revents && read(waiting[i].fd, &event, sizeof event) == sizeof event)
				if (event.type == EV_KEY && event.code == KEY_POWER && event.value)
					power_off();
	}
}
