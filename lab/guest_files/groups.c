/* join GROUP INTERFACE: the guest is a member of the multicast group from then on. Its sink gets
 * what is sent there (ip(7), IP_MULTICAST_ALL: a socket gets what any socket has joined). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

void join_group(struct reply *reply, const char *arguments)
{
	struct group_req request = { 0 };
	struct sockaddr_in *four = (struct sockaddr_in *)&request.gr_group;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)&request.gr_group;
	char group[INET6_ADDRSTRLEN], interface[IFNAMSIZ];
	int level, sock;

	if (sscanf(arguments, "%45s %15s", group, interface) != 2) {
		say(reply, "error: join GROUP INTERFACE");
		return;
	}
	request.gr_interface = if_nametoindex(interface);
	if (inet_pton(AF_INET, group, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		level = IPPROTO_IP;
	} else if (inet_pton(AF_INET6, group, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		level = IPPROTO_IPV6;
	} else {
		say(reply, "error: no address: %s", group);
		return;
	}
	/* Kept open: the membership ends with the socket. */
	sock = socket(request.gr_group.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0 || setsockopt(sock, level, MCAST_JOIN_GROUP, &request, sizeof request)) {
		say(reply, "error: %s on %s: %s", group, interface, strerror(errno));
		if (sock >= 0)
			close(sock);
		return;
	}
	say(reply, "ok");
}
