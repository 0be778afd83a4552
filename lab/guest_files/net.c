/* The guest's addresses, set by the classic ioctls: no process, no netlink. Kept in step with
 * lab/addresses.py, which a unit test checks. */
#include <arpa/inet.h>
#include <linux/if_vlan.h>
#include <linux/ipv6.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

static const struct {
	int vlan;
	const char *ipv4, *ipv6;
} networks[] = {
	{ 0, "10.0.0.2", "fd00::2" },
	{ 100, "10.0.100.2", "fd00:100::2" },
	{ 200, "10.0.200.2", "fd00:200::2" },
};

static void complain(const char *what, const char *name)
{
	char text[80];

	snprintf(text, sizeof text, "guest network: %s %s", what, name);
	perror(text);
}

static void up(int sock, const char *name)
{
	struct ifreq request = { 0 };

	strcpy(request.ifr_name, name);
	request.ifr_flags = IFF_UP;
	if (ioctl(sock, SIOCSIFFLAGS, &request))
		complain("up", name);
}

static void address(int sock4, int sock6, const char *name, const char *ipv4, const char *ipv6)
{
	struct ifreq request = { 0 };
	struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
	struct in6_ifreq request6 = { .ifr6_prefixlen = 64 };

	strcpy(request.ifr_name, name);
	in->sin_family = AF_INET;
	inet_pton(AF_INET, ipv4, &in->sin_addr);
	if (ioctl(sock4, SIOCSIFADDR, &request))
		complain("address", name);
	inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
	if (ioctl(sock4, SIOCSIFNETMASK, &request))
		complain("netmask", name);
	up(sock4, name);
	request6.ifr6_ifindex = (int)if_nametoindex(name);
	inet_pton(AF_INET6, ipv6, &request6.ifr6_addr);
	if (ioctl(sock6, SIOCSIFADDR, &request6))
		complain("IPv6 address", name);
}

void configure_network(void)
{
	int sock4 = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int sock6 = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	up(sock4, "lo");
	if (!if_nametoindex("eth0")) {
		fprintf(stderr, "guest network: no eth0\n");
		return;
	}
	up(sock4, "eth0");
	for (size_t i = 0; i < sizeof networks / sizeof *networks; i++) {
		char name[IFNAMSIZ] = "eth0";

		if (networks[i].vlan) {
			/* Named eth0.100: the kernel's default, VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD. */
			struct vlan_ioctl_args args = { .cmd = ADD_VLAN_CMD };

			strcpy(args.device1, "eth0");
			args.u.VID = networks[i].vlan;
			if (ioctl(sock4, SIOCSIFVLAN, &args))
				complain("VLAN on", name);
			snprintf(name, sizeof name, "eth0.%d", networks[i].vlan);
		}
		address(sock4, sock6, name, networks[i].ipv4, networks[i].ipv6);
	}
	close(sock4);
	close(sock6);
}
