/* Parts of the guest's agent. One program, PID 1 of the lab's guest: see init.c. */
#ifndef GODWIT_AGENT_H
#define GODWIT_AGENT_H

#include <stddef.h>
#include <stdint.h>

enum { PORT_CONTROL = 7000, PORT_SINK = 7001, PORT_ECHO = 7002, PORT_DISCARD = 7003,
       PORT_SOURCE = 7004 };
enum { REPLY_MAX = 60000, POWER_KEYS = 4 };

/* A reply under construction; what does not fit is cut off. */
struct reply {
	char text[REPLY_MAX];
	size_t length;
};
void say(struct reply *reply, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* control.c: answers requests; returns only if the control socket breaks. */
int listening(int type, int port);
void serve_control(int control, const int *power_keys, int count);

/* net.c: addresses on eth0 and its VLANs. */
void configure_network(void);

/* flows.c: numbered UDP packets in and out. */
void start_traffic(void);
void report_flows(struct reply *reply);
void reset_flows(void);
void udp_send(struct reply *reply, const char *arguments);
void udp_stop(struct reply *reply);
void join_group(struct reply *reply, const char *arguments);

/* tcp.c: TCP servers: echo, discard, and a source. */
void start_tcp(void);

/* vsock.c: streams between the guest and its host by vsock. */
void vsock_command(struct reply *reply, const char *arguments);

/* memory.c: memory whose contents can be judged after a migration. */
void memory_command(struct reply *reply, const char *arguments);
void hot_command(struct reply *reply, const char *arguments);

/* mischief.c: what a guest may do to its VMM. */
void hang(struct reply *reply, const char *arguments);
void flood(struct reply *reply, const char *arguments);

/* hostile.c: random values to every port, window and ring. */
long hostile(const char *arguments);

/* init.c: how the guest ends. */
void power_off(void);
void restart(void);
void triple_fault(void);

#endif
